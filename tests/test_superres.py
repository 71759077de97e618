"""Super-resolution: degradations, pairs, the condition with its noise level, back-projection, spectra, training and commands."""
import json
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.testing import assert_close

from ldm_edu import cli
from ldm_edu import superres as S
from ldm_edu.asking import Asked, gather_prompts, read_picture
from ldm_edu.autoencoder import AutoencoderConfig
from ldm_edu.conditioning import ClassConditioner, ClassConfig, make_conditioner
from ldm_edu.core import make_generators
from ldm_edu.data import Scenes, degrade
from ldm_edu.folders import Part, WithField
from ldm_edu.layout import JointConditioner
from ldm_edu.ldm import ConditionalUNet, LatentDiffusion, LDMConfig, load
from ldm_edu.metrics import psnr
from ldm_edu.quantize import make_first_stage
from ldm_edu.recipes import DIFFUSIONS, default_conditioner, draw_steps, train_diffusion
from ldm_edu.training import RowRandom
from ldm_edu.unet import UNet, UNetConfig

STAGE = AutoencoderConfig(4, 8, (1, 1, 1), 1, mid_attention=False, num_groups=4)


def pictures(n=6, size=32):
    return Scenes(size, n=n, fields=("image",)).render(range(n))["image"]


def conditioner(**changes):
    torch.manual_seed(0)
    return S.LowResConditioner(S.LowResConfig(**{"width": 16, **changes})).eval()


def tiny(**changes):
    """A small latent diffusion model for super-resolution at random weights."""
    read = conditioner(**changes)
    unet = UNetConfig(4 + read.concat_channels, 4, 16, (1, 1), 1, (2,), head_dim=16, num_groups=4, c_dim=read.c_dim)
    return LatentDiffusion(LDMConfig(STAGE, unet, read.to_dict()), make_first_stage(STAGE), ConditionalUNet(UNet(unet), read)).eval()


# ---------------------------------------------------------------- degradations and pairs


@pytest.mark.parametrize("name", S.DEGRADATIONS)
@pytest.mark.parametrize("factor", [2, 4, 8])
def test_degradations_shrink_and_stay_in_range(name, factor):
    x = pictures()
    low = S.DEGRADATIONS[name](x, factor, make_generators(0, 6))
    assert low.shape == (6, 3, 32 // factor, 32 // factor) and -1 <= low.min() and low.max() <= 1
    assert psnr(low, degrade(x, factor)).min() > (60 if name == "bicubic" else 8), "still the same pictures"


def test_bsr_depends_on_each_picture_s_generator_alone():
    x = pictures()
    whole = S.degrade_bsr(x, 4, make_generators(0, 6))
    assert torch.equal(S.degrade_bsr(x[2:3], 4, make_generators(2, 1)), whole[2:3]) and torch.equal(S.degrade_bsr(x, 4, make_generators(0, 6)), whole)
    other = S.degrade_bsr(x, 4, make_generators(100, 6))
    assert ((other - whole).abs().amax((1, 2, 3)) > 0.02).all()
    with pytest.raises(ValueError, match="shorter|longer"):
        S.degrade_bsr(x, 4, make_generators(0, 5))


def test_bsr_varies_in_strength_and_order():
    x = pictures(1).expand(40, -1, -1, -1)
    error = psnr(S.degrade_bsr(x, 4, make_generators(0, 40)), degrade(x, 4))
    assert error.max() - error.min() > 8 and len({round(v, 2) for v in error.tolist()}) == 40


@pytest.mark.parametrize("name", S.DEGRADATIONS)
def test_pairs_are_the_same_whenever_asked_and_in_any_batch(name):
    data = Scenes(n=9, fields=("image", "label"))
    pairs = S.low_res_pairs(data, 4, name, seed=3)
    alone, together = pairs[4]["low_res"], pairs.__getitems__([1, 4, -1])
    assert torch.equal(alone, together[1]["low_res"]) and torch.equal(pairs[8]["low_res"], together[2]["low_res"])
    assert set(pairs[0]) == {"image", "label", "low_res"} and len(pairs) == 9 and not pairs.flip_safe
    assert torch.equal(pickle.loads(pickle.dumps(pairs))[4]["low_res"], alone), "workers get a copy"
    if name == "bicubic":
        assert torch.equal(alone, degrade(data[4]["image"][None])[0])
    else:
        assert not torch.equal(S.low_res_pairs(data, 4, name, seed=4)[4]["low_res"], alone)


def test_pairs_have_a_fingerprint_of_their_own():
    data = Scenes(n=9, fields=("image",))
    marks = {S.low_res_pairs(data, r, name, seed).fingerprint() for r in (2, 4) for name in S.DEGRADATIONS for seed in (0, 1)}
    assert len(marks) == 8 and data.fingerprint() not in marks
    assert S.low_res_pairs(Part(data, range(3))).fingerprint() not in marks


@pytest.mark.parametrize("changes, message", [({"factor": 3}, "factor: got 3 for pictures of 32x32"), ({"factor": 1}, "factor: got 1"),
                                              ({"degradation": "jpeg"}, "jpeg.*bicubic")])
def test_pairs_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        S.low_res_pairs(Scenes(n=3, fields=("image",)), **changes)


def test_a_field_reads_its_index_and_keeps_captions():
    data = Scenes(n=5, fields=("image", "caption"))
    counted = WithField(data, "place", lambda item, index: index, "index")
    assert [item["place"] for item in counted.__getitems__([3, -1, 0])] == [3, 4, 0] and counted.captions() == data.captions()
    assert WithField(Scenes(n=5, fields=("image",)), "x", len, "").dataset.n == 5
    for index in (5, -6):
        with pytest.raises(IndexError):
            counted[index]


# ---------------------------------------------------------------- the condition


@pytest.mark.parametrize("factor, f, channels, sides", [(4, 4, 3, (4, 6)), (2, 4, 12, (4, 6)), (8, 4, 3, (4, 6)), (2, 8, 48, (2, 3)), (3, 1, 3, (24, 36))])
def test_maps_come_to_the_grid_of_latents_without_loss(factor, f, channels, sides):
    model = conditioner(factor=factor, downsample_factor=f)
    low = torch.rand(2, 3, sides[0] * f // factor, sides[1] * f // factor) if factor <= f else torch.rand(2, 3, sides[0] // (factor // f), sides[1] // (factor // f))
    told = model({"low_res": low})
    assert told.concat.shape == (2, channels, *sides) and model.concat_channels == channels and told.c.shape == (2, 16)
    back = F.pixel_shuffle(told.concat, f // factor) if factor <= f else told.concat[..., :: factor // f, :: factor // f]
    assert_close(back, low, rtol=0, atol=0)


def test_noise_is_added_in_training_only_and_told():
    model, low = conditioner(noise=0.3), torch.zeros(64, 3, 8, 8)
    assert model.complete({"low_res": low}) == {"low_res": low}
    batch = model.complete({"low_res": low, "label": 1}, rng=RowRandom(0, 5, range(64)))
    level = batch["low_res_noise"]
    assert batch["label"] == 1 and 0 <= level.min() and level.max() <= 0.3 and level.std() > 0.05
    found = batch["low_res"].flatten(1).std(1)
    assert_close(found, level, rtol=0.25, atol=0.002), "the level told is the noise that is there"
    assert model.complete(batch, rng=RowRandom(0, 6, range(64))) is batch, "what is complete stays"
    again = model.complete({"low_res": low[:3]}, rng=RowRandom(0, 5, range(3)))
    assert torch.equal(again["low_res"], batch["low_res"][:3]), "a row's noise does not depend on the rows beside it"
    assert conditioner(noise=0.0).complete({"low_res": low}, rng=RowRandom(0, 5, range(64))) == {"low_res": low}


def test_the_level_reaches_the_vector():
    model, low = conditioner(), torch.zeros(3, 3, 8, 8)
    told = model({"low_res": low, "low_res_noise": torch.tensor([0.0, 0.1, 0.3])})
    assert_close(told.c[0], model({"low_res": low}).c[0])
    assert (told.c[0] - told.c[1]).abs().max() > 1e-3 < (told.c[1] - told.c[2]).abs().max()


def test_null_fits_every_size_and_carries_nothing():
    model = conditioner()
    with torch.no_grad():
        model.nothing.normal_()
    told, null = model({"low_res": torch.rand(2, 3, 8, 12)}), model.null(2)
    mixed = told.select(torch.tensor([True, False]), null)
    assert_close(mixed.concat[0], told.concat[0]), assert_close(mixed.c[1], model.nothing)
    assert not mixed.concat[1].any() and len(model.null(0)) == 0


def test_prompts_are_pictures_or_pairs_with_their_noise():
    model, low = conditioner(noise=0.2), torch.rand(3, 8, 8)
    batch = model.prepare([low, (low, 0.1)])
    assert batch["low_res"].shape == (2, 3, 8, 8) and batch["low_res_noise"].tolist() == pytest.approx([0, 0.1])
    assert len(model.from_prompts([low])) == 1


@pytest.mark.parametrize("prompts, message", [
    ([], "empty list"), ([torch.rand(8, 8)], "picture 0"), ([torch.rand(3, 8, 8), torch.rand(4, 8, 8)], "picture 1"),
    ([torch.rand(3, 8, 8) * 255], "picture 0: got values"), ([(torch.rand(3, 8, 8), 0.5)], "picture 0: got noise 0.5, expected 0 to 0.3"),
    ([torch.rand(3, 8, 8), torch.rand(3, 8, 12)], "8x8, 8x12.*one size"), ([(torch.rand(3, 8, 8), float("nan"))], "noise nan"),
])
def test_bad_prompts(prompts, message):
    with pytest.raises(ValueError, match=message):
        conditioner().prepare(prompts)


def test_bad_batches():
    model = conditioner(factor=2, downsample_factor=8)
    with pytest.raises(ValueError, match="low_res.*image"):
        model({"image": 1})
    with pytest.raises(ValueError, match="6x8 pixels, expected multiples of 4"):
        model({"low_res": torch.rand(1, 3, 6, 8)})
    with pytest.raises(ValueError, match="low_res_noise"):
        model({"low_res": torch.rand(1, 3, 8, 8), "low_res_noise": torch.zeros(2)})


@pytest.mark.parametrize("changes", [{"factor": 1}, {"factor": 3}, {"downsample_factor": 0}, {"noise": -0.1}, {"noise": 1.5}, {"width": 5}, {"width": -2}])
def test_bad_configs(changes):
    with pytest.raises(ValueError, match="got"):
        S.LowResConfig(**changes)


def test_it_is_built_again_from_its_dict_and_joins_others():
    model = conditioner(factor=2, noise=0.1)
    again = make_conditioner(model.to_dict())
    again.load_state_dict(model.state_dict())
    low = torch.rand(2, 3, 16, 16)
    assert_close(again({"low_res": low}).concat, model({"low_res": low}).concat)
    joint = JointConditioner.of(ClassConditioner(ClassConfig(4, width=16, pooled=True)), model)
    batch = joint.complete({"label": torch.tensor([1, 2]), "low_res": low}, rng=RowRandom(0, 0, range(2)))
    assert "low_res_noise" in batch and joint(batch).concat.shape == (2, 12, 8, 8)
    silent = joint.complete({"label": torch.tensor([1, 2]), "drop_superres": torch.tensor([True, True])}, rng=RowRandom(0, 0, range(2)))
    assert "low_res" not in silent and joint(silent).c.shape == (2, 16)


# ---------------------------------------------------------------- judging


def test_consistency_and_back_projection():
    x = pictures()
    low = degrade(x)
    assert S.consistency(x, low).min() > 60 and S.consistency(x.flip(-1), low).max() < 40
    rough = (x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)
    better = S.back_project(rough, low)
    assert (S.consistency(better, low) - S.consistency(rough, low)).min() > 8 and better.abs().max() <= 1
    assert psnr(better, x).mean() > psnr(rough, x).mean()
    assert torch.equal(S.back_project(rough, low, rounds=0), rough)
    with pytest.raises(ValueError, match="one fraction"):
        S.consistency(x, torch.rand(6, 3, 8, 16))


@pytest.mark.parametrize("period", [4, 8, 16])
def test_a_wave_has_its_power_at_its_frequency(period):
    wave = torch.cos(2 * math.pi * torch.arange(64) / period).expand(2, 3, 64, 64)
    frequencies, power = S.power_spectrum(wave)
    assert frequencies[power.argmax()].item() == pytest.approx(1 / period) and frequencies[-1] == 0.5 and len(power) == 32
    assert power.max() > 100 * power.sort().values[-2]


def test_white_noise_is_flat_and_a_constant_has_nothing():
    noise = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    frequencies, power = S.power_spectrum(noise)
    assert ((power - 1).abs() < 0.1).all(), "variance 1 at every frequency"
    assert S.power_spectrum(torch.full((1, 3, 16, 16), 0.7))[1].max() < 1e-12


def test_grades_are_means_with_intervals():
    x = pictures()
    grades = S.grade_enlarged(x.roll(1, -1), x, degrade(x))
    assert grades["n"] == 6 and grades["psnr"]["value"] == pytest.approx(psnr(x.roll(1, -1), x).mean().item(), rel=1e-4)
    assert grades["consistency"]["low"] < grades["consistency"]["value"] < grades["consistency"]["high"]


# ---------------------------------------------------------------- models


@pytest.mark.parametrize("factor, sides", [(2, (16, 24)), (4, (8, 12)), (8, (4, 6))])
def test_pictures_take_the_size_of_the_small_ones(factor, sides):
    model, low = tiny(factor=factor), torch.rand(2, 3, *sides) * 2 - 1
    images = model.sample(batch={"low_res": low}, steps=2)
    assert images.shape == (2, 3, 32, 48)
    assert_close(model.sample([low[0], low[1]], steps=2), images)
    alone = model.sample([low[1]], steps=2, seed=1)
    assert_close(alone, images[1:], rtol=1e-4, atol=1e-4)


def test_the_small_picture_and_its_noise_change_the_picture():
    model = tiny()
    for parameter in model.net.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    low = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    base = model.sample([low[0]], steps=2, decode=False)
    assert (model.sample([-low[0]], steps=2, decode=False) - base).abs().max() > 1e-3
    assert (model.sample([(low[0], 0.3)], steps=2, decode=False) - base).abs().max() > 1e-4


def test_regression_is_a_walk_of_one_step_from_pure_noise():
    recipe = DIFFUSIONS["superres-regression-tiny"]
    assert set(draw_steps(RowRandom(0, 0, range(500)), 1000, recipe.step_bias).tolist()) == {999}
    assert recipe.prediction == "x0" and recipe.condition_dropout == 0
    assert recipe.train == DIFFUSIONS["superres-tiny"].train and recipe.unet == DIFFUSIONS["superres-tiny"].unet, "an equal network, equally trained"


def test_default_conditioner_fits_the_pairs():
    data = Scenes(n=4, fields=("image",))
    for factor in (2, 4, 8):
        made = default_conditioner("superres", S.low_res_pairs(data, factor), None, stage=STAGE)
        assert made.config.factor == factor and made.config.downsample_factor == 4
    with pytest.raises(ValueError, match="low_res_pairs"):
        default_conditioner("superres", data, None)


def test_training_draws_new_noise_every_step(tmp_path, monkeypatch):
    seen = []
    complete = S.LowResConditioner.complete
    monkeypatch.setattr(S.LowResConditioner, "complete", lambda self, *args: seen.append(complete(self, *args)) or seen[-1])
    data = S.low_res_pairs(Scenes(16, n=8, fields=("image",)), 4)
    model = train_diffusion(data, make_first_stage(STAGE), "superres-tiny", tmp_path / "run", steps=3, batch_size=4, progress=False,
                            unet={"model_channels": 16, "head_dim": 16})
    levels = torch.stack([batch["low_res_noise"] for batch in seen[:3]])
    assert len(levels.unique()) == 12
    assert model.sample(batch={"low_res": data[0]["low_res"][None]}, steps=1).shape == (1, 3, 16, 16)


# ---------------------------------------------------------------- commands

TINY = ["--size", "16", "--items", "32", "--steps", "2", "--batch-size", "4"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A tiny first stage and a tiny model that enlarges by 4, trained by the command line, and a small picture."""
    folder = tmp_path_factory.mktemp("superres")
    assert cli.main(["train-autoencoder", *TINY, "--model.model-channels", "8", "--model.num-groups", "4", "--out", str(folder / "ae")]) == 0
    assert cli.main(["train", "--recipe", "superres-tiny", "--first-stage", str(folder / "ae"), *TINY, "--sample-every", "2", "--out", str(folder / "x4")]) == 0
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)).save(folder / "small.png")
    (folder / "real").mkdir()
    for i in range(24):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(folder / "real" / f"{i}.png")
    return folder


def test_sample_enlarges_files(runs, tmp_path):
    args = ["sample", "--model", str(runs / "x4"), "--steps", "1", "--images", str(runs / "small.png"), "--n", "2", "--out", str(tmp_path / "out")]
    assert cli.main(args) == 0
    assert Image.open(tmp_path / "out" / "0001.png").size == (48, 32)
    assert json.loads((tmp_path / "out" / "samples.json").read_text())["images"] == [str(runs / "small.png")]


@pytest.mark.parametrize("args, message", [
    (["a red circle"], "prompts: got some.*--images"), (["--masks", "small.png"], "--images, --masks: got 0 and 1"),
    (["--images", "missing.png"], "missing.png"), (["--images", "x4/log.jsonl"], "log.jsonl: not a readable picture")])
def test_bad_requests_name_file_and_option(runs, tmp_path, capsys, monkeypatch, args, message):
    monkeypatch.chdir(runs)
    assert cli.main(["sample", "--model", str(runs / "x4"), "--steps", "1", "--out", str(tmp_path / "out"), *args]) == 2
    import re
    assert re.search(message, capsys.readouterr().err)


def test_evaluate_measures_enlarged_pictures(runs, tmp_path, capsys):
    few = ["--size", "16", "--samples", "8", "--references", "16", "--training", "16", "--prompts", "4", "--steps", "1", "--cache", str(tmp_path)]
    assert cli.main(["evaluate", "--model", str(runs / "x4"), *few, "--out", str(tmp_path / "e.json")]) == 0
    results = json.loads((tmp_path / "e.json").read_text())
    assert results["superres"]["n"] == 4 and results["superres"]["consistency"]["value"] > 0 and results["distribution"]["samples"]["n"] == 8
    assert "made small again" in capsys.readouterr().err


@pytest.mark.parametrize("extra", [[], ["--factor", "2"], ["--degradation", "bsr"]])
def test_folders_train_by_the_same_command(runs, tmp_path, extra):
    data = ["--data", str(runs / "real"), "--size", "16", "--steps", "1", "--batch-size", "4", *extra]
    assert cli.main(["train", "--recipe", "superres-tiny", "--first-stage", str(runs / "ae"), *data, "--out", str(tmp_path / "run")]) == 0
    model = load(tmp_path / "run")
    assert model.net.conditioner.config.factor == (2 if "--factor" in extra else 4)
    assert model.sample(gather_prompts(model.net.conditioner, Asked(images=[runs / "small.png"])), steps=1).shape[0] == 1


def test_read_picture_is_rgb_in_range(runs):
    picture = read_picture(runs / "small.png")
    assert picture.shape == (3, 8, 12) and -1 <= picture.min() < picture.max() <= 1


def test_real_pictures_are_enlarged_by_the_same_commands(cifar_folder, runs, tmp_path):
    data = ["--data", str(cifar_folder), "--size", "32"]
    assert cli.main(["train", "--recipe", "superres-tiny", "--first-stage", str(runs / "ae"), *data, "--steps", "2", "--batch-size", "8", "--out", str(tmp_path / "run")]) == 0
    assert load(tmp_path / "run").card["data"].startswith("WithField, ")
    few = ["--samples", "8", "--training", "16", "--prompts", "4", "--steps", "1", "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "e.json")]
    assert cli.main(["evaluate", "--model", str(tmp_path / "run"), *data, *few]) == 0
    results = json.loads((tmp_path / "e.json").read_text())
    assert results["superres"]["n"] == 4 and results["distribution"]["samples"]["n"] == 8
    one = sorted(p for p in cifar_folder.rglob("*") if p.is_file())[0]
    assert cli.main(["sample", "--model", str(tmp_path / "run"), "--steps", "1", "--images", str(one), "--out", str(tmp_path / "out")]) == 0
    assert Image.open(tmp_path / "out" / "0000.png").size == (128, 128)
