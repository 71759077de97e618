"""Three first stages on real pictures at equal steps: pixels alone, with a perceptual distance, and with a critic beside it.

`python tests/bench/adversarial.py --data FOLDER --test FOLDER --out runs/adversarial` wants folders of classes (CIFAR-10 as PNG
files is what our figures come from) and writes `adversarial.json`; a run that was cut goes on. The rulers: PSNR; the perceptual
distance that the second and third were trained on; LPIPS and the Frechet distance in the features of scenes-features, which
was trained on neither these pictures nor for this; and the share of spectral power that reconstructions keep.
"""
import argparse
import json
from pathlib import Path

import torch

from ldm_edu.autoencoder import AutoencoderConfig
from ldm_edu.core import default_device, write_json
from ldm_edu.features import load_features, scenes_extractor
from ldm_edu.folders import ImageFolder
from ldm_edu.ldm import load_first_stage
from ldm_edu.metrics import FeatureStatistics, bootstrap, fid_interval, lpips, psnr
from ldm_edu.perceptual import load_perceptual
from ldm_edu.recipes import FirstStageRecipe, code_version, machine, train_autoencoder, write_picture
from ldm_edu.training import TrainConfig

STAGE = AutoencoderConfig(4, 16, (1, 2, 4), 1, (), False, num_groups=2, pixel_loss="l1", kl_weight=1e-6)
TRAIN = TrainConfig(batch_size=16, lr=2e-3, weight_decay=1e-4, warmup_steps=150, final_lr_fraction=0.1, ema_decay=0.995, log_every=20)
LOSSES = {
    "pixels": {"perceptual_weight": 0.0, "disc_weight": 0.0},
    "perceptual": {"perceptual_weight": 0.1, "disc_weight": 0.0},
    "adversarial": {"perceptual_weight": 0.1, "disc_weight": 0.5, "disc_channels": 32, "disc_layers": 2},
}


def detail(images: torch.Tensor) -> torch.Tensor:
    """Power above half the highest frequency of each picture, (b,)."""
    power = torch.fft.rfft2(images).abs().square()
    rows = torch.fft.fftfreq(images.shape[2]).abs()[:, None].maximum(torch.fft.rfftfreq(images.shape[3])[None])
    return power[..., rows > 0.25].sum((1, 2)).double()


@torch.no_grad()
def measure(stage, x: torch.Tensor, reference) -> dict:
    """All rulers on pictures x and their reconstructions, with 95 % intervals."""
    y = torch.cat([stage.decode(stage.encode(part).mode()).clamp(-1, 1).cpu() for part in x.to(default_device()).split(64)])
    ours, foreign, seed = load_perceptual(), load_features().pyramid, torch.Generator().manual_seed(0)
    over = lambda function: torch.cat([function(a, b) for a, b in zip(x.split(64), y.split(64), strict=True)])
    columns = {"psnr": psnr(y, x), "perceptual": over(ours), "lpips_foreign": over(lambda a, b: lpips(a, b, foreign)),
               "detail_kept": detail(y) / detail(x)}
    out = {name: [round(v, 4) for v in bootstrap(values, generator=seed)] for name, values in columns.items()}
    out["frechet_foreign"] = [round(v, 3) for v in fid_interval(scenes_extractor()(y), reference, generator=seed)]
    return out, y


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--out", default="runs/adversarial")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--disc-start", type=int, default=500)
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    data, unseen = ImageFolder(args.data, size=32), ImageFolder(args.test, size=32)
    x = torch.stack([unseen[i]["image"] for i in range(0, len(unseen), max(1, len(unseen) // args.pictures))][: args.pictures])
    reference = FeatureStatistics(scenes_extractor()(x))
    rows, sheets = {}, [x[:12]]
    for name, loss in LOSSES.items():
        start = {"disc_start": args.disc_start, "disc_warmup": 50} if loss["disc_weight"] else {}
        folder = Path(args.out) / name
        if not (folder / "model" / "config.json").exists():
            train_autoencoder(data, FirstStageRecipe(STAGE, TRAIN), folder, loss={**loss, **start}, steps=args.steps, seed=args.seed, progress=False)
        stage = load_first_stage(folder, default_device())
        rows[name], y = measure(stage, x, reference)
        rows[name]["minutes"] = stage.card["minutes"]
        sheets.append(y[:12])
        print(name, json.dumps(rows[name]), flush=True)
    write_picture(Path(args.out) / "reconstructions.png", torch.cat(sheets), columns=12)
    write_json(Path(args.out) / "adversarial.json", {
        "settings": {k: v for k, v in vars(args).items() if k not in ("data", "test", "out")}, "losses": LOSSES, "stage": STAGE.to_dict(),
        "train": TRAIN.to_dict(), "data": data.fingerprint(), "machine": machine(), "commit": code_version(), "rows": rows})


if __name__ == "__main__":
    main()
