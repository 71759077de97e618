"""When does drawing beat guessing? Super-resolution by diffusion and by regression, where little and where much is open.

`python tests/bench/superres.py --out runs/superres` trains the recipes `superres-tiny` and `superres-regression-tiny` for small copies
of 4 x 4 pixels (an eighth of the side; the shipped pair of weights reads 8 x 8), and measures both pairs on unseen scenes of 32 pixels:
PSNR, consistency and Fréchet distance, at several strengths of the small picture's noise. It writes `superres.json` and pictures; trainings that are
finished are not repeated. Lesson 18 reads the copy in data/sweeps. The distance is biased upwards by few pictures, for the truth too:
it is given for 256 pictures and for all of them.
"""
import argparse
import itertools
from pathlib import Path

import torch
import torch.nn.functional as F

from ldm_edu.core import write_json
from ldm_edu.data import Scenes, degrade
from ldm_edu.evaluation import Evaluator, compare
from ldm_edu.features import scenes_extractor
from ldm_edu.ldm import load, load_first_stage
from ldm_edu.recipes import code_version, machine, train_diffusion, write_picture
from ldm_edu.superres import back_project, grade_enlarged, low_res_pairs

PAIR = {"diffusion": "superres", "regression": "superres-regression"}
LEVELS = {4: (0.0, 0.1, 0.2, 0.3), 8: (0.0, 0.1)}  # noise of the small picture, by factor


def trained(factor: int, args) -> dict:
    """The shipped pair of weights for factor 4; for others, the committed recipes' trainings."""
    if factor == 4:
        return {way: load(f"scenes-{name}") for way, name in PAIR.items()}
    data = low_res_pairs(Scenes(32, n=args.scenes, objects=(1, 2), fields=("image",)), factor)
    stage, models = load_first_stage("scenes-kl-f4"), {}
    for way, name in PAIR.items():
        out = args.out / f"{name}-x{factor}"
        if not (out / "model").exists():
            train_diffusion(data, stage, f"{name}-tiny", out=out)
        models[way] = load(out / "model")
    return models


@torch.no_grad()
def answers(way: str, model, batch: dict, steps: int, seed: int = 0) -> torch.Tensor:
    """Regression answers in one step, diffusion draws, with seeds that are counted up from `seed`."""
    parts, n = [], len(batch["low_res"])
    for i in range(0, n, 256):
        part = {key: value[i : i + 256] for key, value in batch.items()}
        kind = {"steps": 1, "sampler": "ddim"} if way == "regression" else {"steps": steps, "seed": seed + i}
        parts.append(model.sample(batch=part, **kind))
    return torch.cat(parts)


def measure(images: torch.Tensor, truth: torch.Tensor, low: torch.Tensor, evaluator: Evaluator, others) -> dict:
    """PSNR, consistency and the distance of all pictures and of the first 256, with intervals."""
    distance = {n: compare(evaluator.features(images[:n], "answers"), others)["fid"] for n in sorted({min(256, len(images)), len(images)})}
    return {**grade_enlarged(images, truth, low), "fid": {str(n): found for n, found in distance.items()}}


def draw_sheet(factor: int, models: dict, truth: torch.Tensor, path: Path, steps: int) -> None:
    """Write nine scenes below each other: the small copy, regression, two draws, the truth."""
    low = degrade(truth, factor)
    rows = [F.interpolate(low, scale_factor=factor, mode="nearest"), answers("regression", models["regression"], {"low_res": low}, steps)]
    rows += [answers("diffusion", models["diffusion"], {"low_res": low}, steps, 1000 * k) for k in range(2)]
    write_picture(path, torch.cat([*rows, truth]), columns=len(truth))


def run(args) -> dict:
    """All rows: factor, noise, way."""
    evaluator = Evaluator(scenes_extractor())
    others = evaluator.features(Scenes(32, n=4 * args.n, split="validation", seed=1, objects=(1, 2), fields=("image",)), "others")
    truth = Scenes(32, n=args.n, split="validation", objects=(1, 2), fields=("image",)).render(range(args.n))["image"]
    rows = []
    for factor in args.factors:
        models, low = trained(factor, args), degrade(truth, factor)
        noise = torch.randn(low.shape, generator=torch.Generator().manual_seed(3))
        draw_sheet(factor, models, truth[:9], args.out / f"superres-x{factor}.png", args.steps)
        rows.append({"factor": factor, "way": "truth", "noise": 0.0, **measure(truth, truth, low, evaluator, others)})
        for level, (way, model) in itertools.product(LEVELS[factor], models.items()):
            made = answers(way, model, {"low_res": low + level * noise, "low_res_noise": torch.full((args.n,), level)}, args.steps)
            rows.append({"factor": factor, "way": way, "noise": level, "trained": model.card["steps"], **measure(made, truth, low, evaluator, others)})
            if level == 0:
                agreed = measure(back_project(made, low, 4), truth, low, evaluator, others)
                rows.append({"factor": factor, "way": f"{way}, back-projected", "noise": level, "trained": model.card["steps"], **agreed})
            print(rows[-1], flush=True)
    return {"n": args.n, "references": 4 * args.n, "steps": args.steps, "machine": machine(), "commit": code_version(), "rows": rows}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/superres"))
    parser.add_argument("--factors", type=int, nargs="+", default=list(LEVELS), choices=list(LEVELS))
    parser.add_argument("--n", type=int, default=2048, help="unseen scenes")
    parser.add_argument("--scenes", type=int, default=30_000, help="scenes of a training")
    parser.add_argument("--steps", type=int, default=20, help="sampling steps of the diffusion model")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if (args.out / "superres.json").exists():
        parser.error(f"{args.out / 'superres.json'} exists already: move it away, or give another --out")
    write_json(args.out / "superres.json", run(args))
