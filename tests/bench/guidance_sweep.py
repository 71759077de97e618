"""Guidance from 0 to 10: what the shipped text model draws for the captions of unseen scenes, graded and compared.

`python tests/bench/guidance_sweep.py --out runs/guidance` draws the same 512 captions from the same noise at every scale and writes
`guidance.json`: how many pictures are as asked, Frechet distance, precision and recall against unseen scenes. What is finished is not
drawn again. Lesson 15 reads the copy in data/sweeps. Nothing here depends on the speed of the machine.
"""
import argparse
import json
from pathlib import Path

import torch

from ldm_edu.core import default_device, write_json
from ldm_edu.data import Scenes
from ldm_edu.evaluation import Evaluator, compare
from ldm_edu.features import scenes_extractor
from ldm_edu.grader import grade
from ldm_edu.ldm import load
from ldm_edu.recipes import code_version, machine, write_picture

SCALES = (0.0, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)


def measure(model, scale: float, captions: list[str], reference, evaluator, steps: int, out: Path) -> dict:
    """One scale: pictures of all captions, graded and compared."""
    images = model.sample(captions, guidance_scale=scale, steps=steps, seed=0)
    write_picture(out / f"scale-{scale:g}.png", images[:16])
    grades = {name: value for name, value in grade(images, captions).summary().items() if isinstance(value, dict)}
    compared = compare(evaluator.features(images, f"scale {scale}"), reference)
    return {"scale": scale, "contrast": images.std((1, 2, 3)).mean().item(), "grades": grades,
            **{name: compared[name] for name in ("n", "references", "fid", "precision", "recall")}}


def main() -> None:
    """Run what is not in the log yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/guidance"))
    parser.add_argument("--captions", type=int, default=512)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    path, evaluator = args.out / "guidance.json", Evaluator(scenes_extractor(), device=default_device())
    captions = Scenes(n=args.captions, split="validation", seed=77, objects=(1, 2), fields=("caption",)).captions()
    unseen = Scenes(n=2048, split="validation", objects=(1, 2), fields=("image",))
    model, reference = load("scenes-text", default_device()), evaluator.features(unseen, unseen.fingerprint())
    log = {"model": "scenes-text", "steps": args.steps, "captions": args.captions, "commit": code_version(), "hardware": machine(),
           "torch": torch.__version__, "rows": []}
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if any(kept[key] != log[key] for key in ("model", "steps", "captions")):
            raise SystemExit(f"{path} holds another sweep: choose another --out")
        log["rows"] = kept["rows"]
    for scale in SCALES:
        if scale not in {row["scale"] for row in log["rows"]}:
            log["rows"].append(measure(model, scale, captions, reference, evaluator, args.steps, args.out))
            write_json(path, log)
            print(json.dumps(log["rows"][-1]), flush=True)


if __name__ == "__main__":
    main()
