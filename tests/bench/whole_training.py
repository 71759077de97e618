"""What does a training step cost with all that belongs to it? The original's way against ours, on two of the paper's recipes.

`python tests/bench/whole_training.py --out runs/whole-training` takes CelebA-HQ LDM-4 and LSUN-Churches LDM-8 with both networks made
narrower by about the same factor (`REDUCED`), real files to read, one thread, and times in turns

- the original's way: read and encode the pictures in every step, attention by a stored n x n table, attention blocks computed again in
  the backward pass, AdamW and the average of weights tensor by tensor;
- that without computing attention again; that with latents encoded once;
- ours with the pictures read and encoded in every step; ours as `ldm-edu train` runs it.

All start from the same weights and see the same pictures, latents, steps and noise: their first losses must agree. glibc keeps freed memory
for all of them (our trainer asks for that). It writes `whole-training.json` with the machine, the spread, and what share of the operations
encoding is, at this width and as published. Lesson 24 reads the copy in data/sweeps.
"""
import argparse
import contextlib
import copy
import shutil
import tempfile
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint

from ldm_edu.attention import AttentionBlock, TransformerBlock
from ldm_edu.autoencoder import AUTOENCODERS
from ldm_edu.bench import bench_facts, pass_flops, rows_of, time_jobs
from ldm_edu.checkpoint import encode_batch
from ldm_edu.contenders import Workload
from ldm_edu.core import write_json
from ldm_edu.costs import forward_flops
from ldm_edu.data import Scenes
from ldm_edu.folders import ImageFolder
from ldm_edu.latent_shards import latent_cache
from ldm_edu.quantize import make_first_stage
from ldm_edu.recipes import DIFFUSIONS, PUBLISHED_STAGES, DiffusionTask, _assemble, _moments, default_conditioner
from ldm_edu.runs import fetch_batch
from ldm_edu.training import RowRandom, batch_indices, start_run, step_loader, train_step
from ldm_edu.unet import UNETS
from ldm_edu.viz import to_pil

REDUCED = {"celebahq256-ldm4": (96, 64), "lsun-churches256-ldm8": (96, 64)}  # widths of UNet and first stage, 224 and 192, and 128, as published


def counted(name: str, widths: tuple[int, int] | None, size: int) -> dict:
    """Operations of a picture in a training step, and the share that encoding it is."""
    stage, unet = AUTOENCODERS[PUBLISHED_STAGES[name]], UNETS[DIFFUSIONS[name].unet]
    if widths:
        unet, stage = unet.replace(model_channels=widths[0]), stage.replace(model_channels=widths[1])
    step, encode = 3 * forward_flops(unet, size // stage.downsample_factor, 0), pass_flops(Workload(stage, size), "encode")
    return {"unet_gflop": round(step / 1e9, 2), "encode_gflop": round(encode / 1e9, 2), "share_of_encoding": round(encode / (step + encode), 3)}


def table_attention(q, k, v, attn_mask=None):
    """Attention that stores its table of shares, as the original's."""
    assert attn_mask is None
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1) @ v


@contextlib.contextmanager
def tables():
    """Within, attention stores its tables."""
    kept, torch.nn.functional.scaled_dot_product_attention = torch.nn.functional.scaled_dot_product_attention, table_attention
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = kept


def compute_again(net) -> None:
    """Let attention blocks keep their inputs only, and compute the rest again in the backward pass."""
    for block in (m for m in net.modules() if isinstance(m, (AttentionBlock, TransformerBlock))):
        block.forward = lambda *inputs, forward=block.forward: checkpoint(forward, *inputs, use_reentrant=False)


class OriginalStep:
    """The original's step: one tensor after the other; called again and again it trains."""

    def __init__(self, run, pictures, again: bool, cached: bool):
        self.run, self.pictures, self.cached, self.step = run, pictures, cached, 0
        self.net = copy.deepcopy(run.model)
        if again:
            compute_again(self.net)
        self.average = {key: p.detach().clone() for key, p in self.net.named_parameters()}
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=run.config.lr, weight_decay=run.config.weight_decay, foreach=False, fused=False)

    def __call__(self) -> float:
        config = self.run.config
        indices = batch_indices(self.run.batches.dataset, config.batch_size, config.seed, self.step)
        with tables():
            batch = fetch_batch(self.run.batches.dataset, indices) if self.cached else encoded(self.run, self.pictures, indices)
            loss = self.run.task.loss(self.net, batch, RowRandom(config.seed, self.step, range(config.batch_size)))[0].mean()
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for key, p in self.net.named_parameters():
                self.average[key].sub_((1 - config.ema_decay) * (self.average[key] - p))
        self.step += 1
        return loss.item()


def encoded(run, pictures, indices) -> dict:
    """A batch read from files and encoded, as the cache would give it."""
    latents = torch.from_numpy(encode_batch(lambda x: _moments(run.task.ldm.first_stage, x), [pictures[i] for i in indices], "image", False))[:, 0]
    parts = dict(zip(("mean", "std"), latents.unbind(1)))
    return {"std": torch.zeros_like(parts["mean"]), **parts}


class OurStep:
    """`training.train_step` on what its loader gives, or on pictures that are read and encoded first."""

    def __init__(self, run, pictures=None):
        self.run, self.pictures = run, pictures
        self.loader = iter(step_loader(run.batches, 0, run.config.steps, torch.device("cpu")))

    def __call__(self) -> float:
        if self.pictures is None:
            return train_step(self.run, next(self.loader))[0]
        config = self.run.config
        indices = batch_indices(self.run.batches.dataset, config.batch_size, config.seed, self.run.step)
        return train_step(self.run, encoded(self.run, self.pictures, indices))[0]


def write_pictures(folder: Path, n: int, size: int) -> None:
    """Scenes as JPEG files."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(Scenes(size, n=n, fields=("image",)).render(range(n))["image"]):
        to_pil(image).save(folder / f"{i:04d}.jpg", quality=95)


def contenders(name: str, args) -> tuple[dict, dict]:
    """The five ways, and what was counted of them."""
    widths, recipe = REDUCED[name], DIFFUSIONS[name]
    torch.manual_seed(0)
    stage = make_first_stage(AUTOENCODERS[PUBLISHED_STAGES[name]].replace(model_channels=widths[1])).eval().requires_grad_(False)
    pictures = ImageFolder(args.place / "pictures", size=args.size, cache=False)
    latents = latent_cache(lambda x: _moments(stage, x), pictures, args.place / f"latents-{name}", key=name, progress=False, batch_size=4)
    ldm = _assemble(stage, default_conditioner(recipe.conditioner, None, None), recipe, {"model_channels": widths[0]}, latents, args.size)
    with torch.no_grad():
        for p in (p for p in ldm.net.parameters() if p.ndim > 1 and not p.any()):
            p.normal_(0, 0.02)  # layers that start at zero would hide what lies before them from the check
    options = recipe.train.replace(batch_size=args.batch_size, precision="fp32", steps=10_000, warmup_steps=1)
    runs = [start_run(DiffusionTask(copy.deepcopy(ldm), recipe, name), latents, options, args.place / f"run-{name}-{i}", None, True) for i in range(2)]
    ways = {"the original's way": OriginalStep(runs[0], pictures, True, False), "attention kept": OriginalStep(runs[0], pictures, False, False),
            "original's way, latents kept": OriginalStep(runs[0], pictures, True, True), "ours, encoding": OurStep(runs[0], pictures), "ours": OurStep(runs[1])}
    return ways, {"reduced": counted(name, widths, args.size), "published": counted(name, None, 256)}


def check_losses(ways: dict, steps: int = 2) -> dict:
    """Warm up, and let the losses of the first steps agree: the same arithmetic in another order."""
    losses = {name: [way() for _ in range(steps)] for name, way in ways.items()}
    first = losses[next(iter(losses))]
    gaps = {name: max(abs(a / b - 1) for a, b in zip(these, first)) for name, these in losses.items()}
    if max(gaps.values()) > 1e-4:
        raise RuntimeError(f"the ways do not train the same: losses {losses}")
    return gaps


def main(argv=None) -> None:
    """Time, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/whole-training"))
    parser.add_argument("--recipes", nargs="+", default=list(REDUCED), choices=list(REDUCED))
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--pictures", type=int, default=32)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    args.place = Path(tempfile.mkdtemp())  # pictures, latents, checkpoints: nothing of them is kept
    write_pictures(args.place / "pictures", args.pictures, args.size)
    args.out.mkdir(parents=True, exist_ok=True)
    rows, facts = [], bench_facts("cpu")
    for name in args.recipes:
        ways, counts = contenders(name, args)
        gaps = check_losses(ways)
        seconds, others = time_jobs(ways, args.rounds, "cpu", "cpu")
        flops = args.batch_size * counts["reduced"]["unet_gflop"] * 1e9
        table = rows_of(seconds, args.batch_size, flops, {}, {})
        rows.append({"recipe": name, "widths": list(REDUCED[name]), "batch": args.batch_size, "size": args.size, "counts": counts,
                     "others_share_of_machine": others, "loss_gaps": gaps, "rows": table})
        print(name, counts, f"others used {others}")
        for row in table:
            print(f"  {row['setting']:30} {row['ms']:9.0f} ms  {row['ratio']:.2f} ({row['ratio_range'][0]:.2f}-{row['ratio_range'][1]:.2f})", flush=True)
        write_json(args.out / "whole-training.json", {**facts, "rounds": args.rounds, "clock": "cpu", "recipes": rows})
    shutil.rmtree(args.place)


if __name__ == "__main__":
    main()
