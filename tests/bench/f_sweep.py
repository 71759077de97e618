"""Latents of every size on one clock: train first stage and diffusion for f = 1, 2, 4, 8, 16 and measure what they draw.

`python tests/bench/f_sweep.py --out runs/f-sweep` trains on Scenes of 64 pixels, each first stage and each diffusion model for
the same number of seconds, and writes `f-sweep.json`; what is finished is not trained again, so a run that was cut goes on.
Lesson 14b reads the copy in data/sweeps. Seconds are turned into steps by speeds measured at the start, all in one go and kept:
start it on an idle machine; what else runs later changes how long the sweep takes, and not what comes out of it. That is why,
after the speeds, all sizes may train side by side. On a GPU:
`--size 128 --batch-size 64 --stage-batch-size 32 --seconds 45 --stage-seconds 20 --parallel`.
"""
import argparse
import functools
import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ldm_edu.autoencoder import AutoencoderConfig
from ldm_edu.core import default_device, write_json
from ldm_edu.data import Scenes, make_prompts
from ldm_edu.features import scenes_extractor
from ldm_edu.grader import grade
from ldm_edu.metrics import FeatureStatistics, fid_interval, psnr
from ldm_edu.quantize import IdentityStage
from ldm_edu.recipes import (
    DiffusionRecipe,
    FirstStageRecipe,
    code_version,
    machine,
    train_autoencoder,
    train_diffusion,
    write_picture,
)
from ldm_edu.training import TrainConfig

# f: (channels of a latent as in the paper's KL stages, ch_mult of the first stage, changes of the UNet "text-tiny")
SIZES = {
    1: (3, (1,), dict(model_channels=32, ch_mult=(1, 1, 2, 3), attention_levels=(8,))),
    2: (2, (1, 2), dict(model_channels=32, ch_mult=(1, 2, 3), attention_levels=(4,))),
    4: (3, (1, 2, 4), dict(model_channels=48, ch_mult=(1, 2), attention_levels=(2,))),
    8: (4, (1, 2, 4, 4), dict(model_channels=64, ch_mult=(1, 1), attention_levels=(1, 2))),
    16: (16, (1, 2, 4, 4, 4), dict(model_channels=64, ch_mult=(1, 1), attention_levels=(1, 2))),
}
STAGE = TrainConfig(batch_size=8, lr=2e-3, weight_decay=1e-4, warmup_steps=50, final_lr_fraction=0.0, ema_decay=0.99, precision="auto")
DIFFUSION = STAGE.replace(batch_size=16, lr=1e-3, warmup_steps=100, ema_decay=0.995)


class Pictures(torch.utils.data.Dataset):
    """Scenes drawn once and kept in 8 bits: large ones drawn again for every step would be all that the clock measures."""

    def __init__(self, captions: list[str], pixels: np.ndarray):
        self.captions, self.pixels = captions, pixels

    def __len__(self) -> int:
        return len(self.captions)

    def fetch(self, indices, flips=None) -> dict:
        """Pictures (b, 3, h, w) in [-1, 1] and their captions."""
        return {"image": torch.from_numpy(self.pixels[list(indices)]) / 127.5 - 1, "caption": [self.captions[i] for i in indices]}

    def __getitem__(self, i: int) -> dict:
        return {key: value[0] for key, value in self.fetch([i]).items()}

    def fingerprint(self) -> str:
        """Of all pixels."""
        return hashlib.sha256(self.pixels.tobytes()).hexdigest()[:16]

    def images(self) -> torch.Tensor:
        """All pictures (n, 3, h, w)."""
        return self.fetch(range(len(self)))["image"]


def _draw(job) -> np.ndarray:
    scenes, rows = job
    torch.set_num_threads(1)
    return (scenes.render(rows)["image"] * 127.5 + 127.5).round().clamp(0, 255).byte().numpy()


def pictures(args, split: str, n: int) -> Pictures:
    """Scenes of one split, drawn by all cores the first time and read from `out` later."""
    scenes = Scenes(args.size, n=n, objects=(1, 1), split=split, fields=("image", "caption"), seed=args.seed)
    path = Path(args.out) / f"pictures-{split}-{args.size}-{n}-{args.seed}.npy"
    if not path.exists():
        with multiprocessing.get_context("spawn").Pool(len(os.sched_getaffinity(0))) as pool:
            drawn = pool.map(_draw, [(scenes, range(i, min(i + 64, n))) for i in range(0, n, 64)])
        np.save(path.with_suffix(".part.npy"), np.concatenate(drawn))
        path.with_suffix(".part.npy").replace(path)
    return Pictures(scenes.captions(), np.load(path, mmap_mode="r"))


class Clock:
    """A trainer's callback that notes when each step ended."""

    def __init__(self):
        self.times = []

    def __call__(self, report) -> None:
        self.times.append(time.perf_counter())

    @property
    def seconds_per_step(self) -> float:
        """Median over all but the first five."""
        gaps = torch.tensor(self.times[5:], dtype=torch.float64).diff()
        return gaps.median().item()


def stage_steps(f: int, args) -> int:
    """How many steps of the first stage fit into its seconds."""
    speed = json.loads((Path(args.out) / f"f{f}" / "speed.json").read_text())
    return int(args.stage_seconds / speed["stage"]) if f > 1 else 0


def train_stage(f: int, args, data, out, steps: int, callbacks=()):
    """The first stage of one f: identity at f = 1, else a KL stage trained on pixels alone."""
    z, mult, _ = SIZES[f]
    if f == 1:
        return IdentityStage(AutoencoderConfig(3, 32, (1,), double_z=False))
    config = AutoencoderConfig(z, 16, mult, 1, (), False, num_groups=2, pixel_loss="l2", kl_weight=1e-4)
    recipe = FirstStageRecipe(config, STAGE.replace(batch_size=args.stage_batch_size))
    return train_autoencoder(data, recipe, out, steps=steps, seed=args.seed, callbacks=callbacks, progress=False)


def unet_changes(f: int) -> dict:
    """In what the UNet of one f differs from "text-tiny"."""
    return {"num_groups": 8, "head_dim": 32, **SIZES[f][2]}


def train_model(f: int, args, data, stage, out, steps: int, callbacks=()):
    """The diffusion model of one f on the latents of `stage`."""
    recipe = DiffusionRecipe("text-tiny", "text", train=DIFFUSION.replace(batch_size=args.batch_size))
    return train_diffusion(data, stage, recipe, out, unet=unet_changes(f), steps=steps, seed=args.seed, callbacks=callbacks, progress=False)


def measure_speed(f: int, args, data) -> dict:
    """Seconds of a training step of both stages, and pictures drawn a second, by a few steps of untrained networks."""
    few, clocks = Pictures(data.captions[:512], data.pixels[:512]), (Clock(), Clock())
    with tempfile.TemporaryDirectory() as folder:
        stage = train_stage(f, args, few, Path(folder) / "stage", 25, [clocks[0]]).to(default_device()).eval()
        model = train_model(f, args, few, stage, Path(folder) / "model", 25, [clocks[1]])
    start = time.perf_counter()
    model.sample(make_prompts(32, seed=0, kind="single"), steps=20, seed=0).cpu()
    drawn = 32 / (time.perf_counter() - start)
    return {"stage": clocks[0].seconds_per_step if f > 1 else 0.0, "diffusion": clocks[1].seconds_per_step, "pictures_per_second": drawn}


def remembered(path: Path, measure):
    """What `measure` returned the first time: a run that goes on keeps its speeds and so its number of steps."""
    if not path.exists():
        write_json(path, measure())
    return json.loads(path.read_text())


@torch.no_grad()
def measure_stage(f: int, args, data, held_out, reference, spectrum) -> dict:
    """What the first stage alone loses on unseen pictures: PSNR (None at f = 1, where nothing is lost), Frechet distance, spectrum."""
    stage = train_stage(f, args, data, Path(args.out) / f"f{f}" / "stage", stage_steps(f, args)).to(default_device()).eval()
    x = held_out.images()
    y = torch.cat([stage.decode(stage.encode(part.to(default_device())).mode()).clamp(-1, 1).cpu() for part in x.split(32)])
    interval = fid_interval(scenes_extractor()(y), reference, generator=torch.Generator().manual_seed(0))
    return {"psnr": round(psnr(y, x).mean().item(), 2) if f > 1 else None, "frechet": [round(v, 3) for v in interval],
            "spectrum_gap_db": round((log_spectrum(y) - spectrum).abs().mean().item(), 2)}


def log_spectrum(images) -> torch.Tensor:
    """Mean power of each spatial frequency, in decibel."""
    return 10 * torch.fft.rfft2(images - images.mean((2, 3), keepdim=True)).abs().square().mean((0, 1)).clamp_min(1e-6).log10()


def measure(model, args, reference, spectrum) -> dict:
    """Frechet distance with its interval, distance of the log spectra, grader accuracy."""
    prompts = make_prompts(args.prompts, seed=0, kind="single")
    images = model.sample(prompts, steps=20, seed=1000).cpu()
    write_picture(Path(args.out) / f"f{model.config.first_stage.downsample_factor}" / "samples.png", images[:16])
    interval = fid_interval(scenes_extractor()(images), reference, generator=torch.Generator().manual_seed(0))
    grades = grade(images, prompts).summary()
    gap = (log_spectrum(images) - spectrum).abs().mean().item()
    return {"frechet": [round(v, 3) for v in interval], "spectrum_gap_db": round(gap, 2),
            "grades": {k: grades[k] for k in ("colour", "shape", "pair")}}


def run_one(f: int, args, data, speed, reference, spectrum) -> dict:
    """Everything of one f."""
    out = Path(args.out) / f"f{f}"
    steps = {"stage": stage_steps(f, args), "diffusion": int(args.seconds / speed["diffusion"])}
    stage = train_stage(f, args, data, out / "stage", steps["stage"]).to(default_device()).eval()
    model = train_model(f, args, data, stage, out / "diffusion", steps["diffusion"])
    count = sum(p.numel() for p in model.net.unet.parameters())
    return {"f": f, "z_channels": SIZES[f][0], "steps": steps,
            "seconds_per_step": {k: round(speed[k], 4) for k in ("stage", "diffusion")},
            "pictures_trained_per_second": round(args.batch_size / speed["diffusion"], 1),
            "pictures_drawn_per_second": round(speed["pictures_per_second"], 2),
            "unet_parameters": count, **measure(model, args, reference, spectrum)}


def side_by_side(args) -> None:
    """Train every size in a process of its own, all at once; what they find lies in `out` afterwards."""
    given = [word for word in sys.argv[1:] if word != "--parallel"]
    jobs = [subprocess.Popen([sys.executable, __file__, *given, "--factors", str(f)]) for f in args.factors]
    codes = [job.wait() for job in jobs]
    if any(codes):
        raise SystemExit(f"of the sizes {args.factors} some failed: exit codes {codes}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="runs/f-sweep")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=360, help="of diffusion training, each f")
    parser.add_argument("--stage-seconds", type=float, default=150, help="of first-stage training, each f")
    parser.add_argument("--scenes", type=int, default=6000)
    parser.add_argument("--batch-size", type=int, default=DIFFUSION.batch_size)
    parser.add_argument("--stage-batch-size", type=int, default=STAGE.batch_size)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--factors", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--parallel", action="store_true", help="train all sizes at the same time, once their speeds are known")
    args = parser.parse_args()
    out, rows = Path(args.out), []
    for f in args.factors:
        (out / f"f{f}").mkdir(parents=True, exist_ok=True)
    data, held_out = pictures(args, "train", args.scenes), pictures(args, "validation", args.prompts)
    unseen, extractor = pictures(args, "test", 1024).images(), scenes_extractor()
    speeds = {f: remembered(out / f"f{f}" / "speed.json", functools.partial(measure_speed, f, args, data)) for f in args.factors}
    if args.parallel:
        side_by_side(args)
    reference = FeatureStatistics(torch.cat([extractor(part) for part in unseen.split(128)]))
    spectrum = log_spectrum(unseen)
    for f in args.factors:
        run = functools.partial(run_one, f, args, data, speeds[f], reference, spectrum)
        drawn = remembered(out / f"f{f}" / "result.json", run)
        alone = remembered(out / f"f{f}" / "stage.json", functools.partial(measure_stage, f, args, data, held_out, reference, spectrum))
        rows.append({**drawn, "stage": alone, "unet": unet_changes(f)})
        print(json.dumps(rows[-1]), flush=True)
    if len(args.factors) == 1:
        return
    sheets = [np.asarray(Image.open(out / f"f{f}" / "samples.png").convert("RGB"))[: args.size + 1] for f in args.factors]
    Image.fromarray(np.concatenate(sheets)).save(out / "f-sweep.jpg", quality=92, subsampling=0)
    write_json(out / "f-sweep.json", {"settings": vars(args), "machine": machine(), "commit": code_version(), "rows": rows})


if __name__ == "__main__":
    main()
