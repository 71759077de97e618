"""Programs for the tests of shards, each a process of its own: `shards_toy.py MODE FOLDER [...]`."""
import hashlib
import json
import os
import sys
import time
from pathlib import Path

import torch
from torch import nn

from ldm_edu import latent_shards
from ldm_edu.checkpoint import cache_identity

ROWS, BATCH, ITEMS = 16, 8, 100
KEEP = ("label", "caption")


class Pictures(torch.utils.data.Dataset):
    """Random pictures with a class and a caption."""

    flip_safe = True

    def __init__(self, n: int = ITEMS, size: int = 16):
        self.n, self.size = n, size

    def __len__(self) -> int:
        return self.n

    def fingerprint(self) -> str:
        return f"pictures {self.n} {self.size}"

    def __getitem__(self, i: int) -> dict:
        image = torch.rand(3, self.size, self.size, generator=torch.Generator().manual_seed(i)) * 2 - 1
        return {"image": image, "label": i % 7, "caption": f"a picture, number {i}" if i % 5 else ""}


def encoder(pause: float = 0.0, seen: list | None = None):
    """A first stage whose answer depends on the whole batch, so that equal latents mean equal batches.

    pause: seconds that a batch takes. seen: collects the sizes of the batches.
    """
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 4, 4), nn.SiLU(), nn.Conv2d(16, 8, 3, padding=1))

    def encode(images):
        time.sleep(pause)
        if seen is not None:
            seen.append(len(images))
        return (net(images) + images.mean()).chunk(2, dim=1)

    return encode


def identity(data) -> dict:
    """What `shard_latents` wants to know."""
    return cache_identity(data, "k", KEEP, True, "float32", "image")


def write(folder: str, pause: float = 0.0, seen: list | None = None) -> latent_shards.LatentShards:
    """The cache of the tests."""
    data = Pictures()
    return latent_shards.shard_latents(encoder(pause, seen), data, folder, info=identity(data), rows=ROWS, batch_size=BATCH, progress=False)


def digest(folder: Path) -> dict:
    """A hash of every file of a folder."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(Path(folder).iterdir())}


def together(folder: str) -> None:
    """One of several gloo processes that write one cache; says which batches it encoded."""
    torch.distributed.init_process_group("gloo")
    torch.distributed.barrier()
    seen = []
    cached = write(folder, 0.02, seen)
    rank = torch.distributed.get_rank()
    Path(folder, f"rank{rank}.json").write_text(json.dumps({"batches": len(seen), "mean": cached.fetch(range(ITEMS))["mean"].double().sum().item()}))
    torch.distributed.barrier()  # who leaves early may abort the others
    torch.distributed.destroy_process_group()


def memory(name: str) -> float:
    """MiB of this process: VmRSS now, VmHWM at most so far."""
    line = next(text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith(name))
    return int(line.split()[1]) / 1024


def large(folder: str) -> None:
    """Write and read 256 MiB in shards of 4 MiB, and say by how much the memory grew."""
    latent_shards.ONE_FILE_BYTES, latent_shards.SHARD_BYTES = 0, 2**22
    grow = lambda x: x[:, :2, :1, :1].expand(-1, 2, 128, 128) * torch.ones(1)
    before, data = memory("VmRSS"), Pictures(2048, 8)
    cached = latent_shards.latent_cache(grow, data, folder, key="k", batch_size=32, progress=False)
    written = memory("VmHWM") - before
    for _ in range(2):
        for rows in torch.randperm(len(cached)).split(32):
            cached.fetch(rows)
    size = sum(path.stat().st_size for path in cached.folder.iterdir()) / 2**20
    print(json.dumps({"size": size, "written": written, "read": memory("VmHWM") - before}))


def index(folder: str, report: str) -> None:
    """Look through shards beside another process, and say what was decoded."""
    from ldm_edu import tar_images


    real, decoded = tar_images.read_image, []
    tar_images.read_image = lambda *given: decoded.append(1) or time.sleep(0.005) or real(*given)
    data = tar_images.TarImages(folder, 8, workers=1)
    Path(report).write_text(json.dumps({"decoded": len(decoded), "fingerprint": data.fingerprint(), "sum": sum(x["image"].double().sum().item() for x in data)}))


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    {"together": together, "large": large, "index": index, "write": lambda folder: write(folder, 0.05)}[sys.argv[1]](*sys.argv[2:])
