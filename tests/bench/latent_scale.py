"""How large should latents be? The same model on latents of standard deviation 1/4, 1 and 4, drawn at 64 times the training area.

`python tests/bench/latent_scale.py --out runs/latent-scale` trains the recipe `semantic-tiny` on Scenes of 32 pixels once for each
standard deviation, draws pictures of 32 and of 256 pixels, and writes `latent-scale.json` and `latent-scale.png`; what is finished is
not trained again. Lesson 20 reads the copies in data/sweeps (the experiment of the paper's appendix D.1).
"""
import argparse
import json
import shutil
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ldm_edu.core import default_device, write_json
from ldm_edu.data import Scenes
from ldm_edu.ldm import load_first_stage
from ldm_edu.placement import grade_maps
from ldm_edu.recipes import DIFFUSIONS, code_version, machine, train_diffusion
from ldm_edu.viz import to_pil

SIDE = 32  # pixels of a training picture, and of the blocks of a large one


def poster_maps(n: int, rows: int, columns: int, seed: int) -> Tensor:
    """(n, rows * 32, columns * 32): semantic maps of unseen scenes, side by side."""
    scenes = Scenes(SIDE, n=n * rows * columns, split="validation", seed=seed, objects=(1, 2), fields=("semantic",))
    maps = scenes.render(range(len(scenes)))["semantic"]
    return maps.unflatten(0, (n, rows, columns)).transpose(2, 3).reshape(n, rows * SIDE, columns * SIDE)


def blocks(x: Tensor) -> Tensor:
    """(n, ..., h, w) -> (n * blocks, ..., 32, 32)."""
    return x.unfold(-2, SIDE, SIDE).unfold(-2, SIDE, SIDE).movedim((-4, -3), (1, 2)).flatten(0, 2)


def ground_levels(images: Tensor, maps: Tensor) -> Tensor:
    """Mean brightness of the ground in each 32-pixel block (n, blocks), in [-1, 1]."""
    ground = (blocks(maps) == 0).double()
    light = (blocks(images).double().mean(1) * ground).sum((1, 2)) / ground.sum((1, 2)).clamp(min=1)
    return light.unflatten(0, (len(images), -1))


def measure(model, args) -> dict:
    """Right maps at both sizes, and how much the ground differs: between small pictures, and between the blocks of one large picture."""
    small, large = poster_maps(args.small, 1, 1, seed=5), poster_maps(args.large, 8, 8, seed=6)
    drawn = model.sample(batch={"semantic": small}, steps=20, seed=0)
    poster = model.sample(batch={"semantic": large}, steps=20, seed=1000, batch_size=1)
    between, within = ground_levels(drawn, small)[:, 0].std().item(), ground_levels(poster, large).std(1)
    return {"miou": {"32": grade_maps(drawn, small), "256": grade_maps(blocks(poster), blocks(large))},
            "ground": {"between_pictures": between, "within_a_poster": within.mean().item(), "posters": [round(v, 4) for v in within.tolist()]}}


def run_one(std: float, args) -> dict:
    """Train and measure one standard deviation, and draw its row of the picture."""
    out = args.out / f"std-{std:g}"
    if (out / "result.json").exists():
        return json.loads((out / "result.json").read_text())
    data = Scenes(SIDE, n=args.scenes, objects=(1, 2), fields=("image", "semantic"))
    recipe, stage = DIFFUSIONS["semantic-tiny"].replace(latent_std=std), load_first_stage("scenes-kl-f4").to(default_device())
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "latents").is_symlink():
        (args.out / "latents").mkdir(exist_ok=True)
        (out / "latents").symlink_to("../latents")
    model = train_diffusion(data, stage, recipe, out, steps=args.steps, seed=args.seed, progress=False)
    acp = float(model.schedule.alphas_cumprod[-1])
    for i, seed in enumerate((11, 12)):
        image = model.sample(batch={"semantic": poster_maps(1, 2, 8, seed=6)}, steps=20, seed=seed)[0]
        to_pil(image).save(out / f"poster-{i}.png")
    row = {"std": std, "steps": args.steps, "signal_at_the_last_step": std * acp**0.5, **measure(model, args)}
    write_json(out / "result.json", row)
    for name in ("checkpoints", "model"):
        shutil.rmtree(out / name, ignore_errors=True)
    return row


def main() -> None:
    """Run what is not in the log yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/latent-scale"))
    parser.add_argument("--stds", type=float, nargs="+", default=[0.25, 1.0, 4.0])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--scenes", type=int, default=20_000)
    parser.add_argument("--small", type=int, default=256)
    parser.add_argument("--large", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows = []
    for std in args.stds:
        rows.append(run_one(std, args))
        print(json.dumps(rows[-1]), flush=True)
    parts = [Image.open(args.out / f"std-{std:g}" / f"poster-{i}.png") for std in args.stds for i in range(2)]
    width, height = parts[0].size
    sheet = Image.new("RGB", (width * 2 + 4, (height + 4) * len(args.stds) - 4), "white")
    for k, part in enumerate(parts):
        sheet.paste(part, (k % 2 * (width + 4), k // 2 * (height + 4)))
    sheet.save(args.out / "latent-scale.png")
    settings = {name: getattr(args, name) for name in ("steps", "scenes", "small", "large", "seed")}
    write_json(args.out / "latent-scale.json", {"settings": settings, "machine": machine(), "commit": code_version(), "torch": torch.__version__, "rows": rows})


if __name__ == "__main__":
    main()
