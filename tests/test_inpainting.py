"""Inpainting: masks, what the condition sees, known pixels bit for bit, larger canvases, diversity, grades, training and commands."""
import itertools
import json
import pickle
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from ldm_edu import cli
from ldm_edu import inpainting as I
from ldm_edu.asking import Asked, gather_prompts
from ldm_edu.autoencoder import AutoencoderConfig
from ldm_edu.checkpoint import LatentDataset
from ldm_edu.conditioning import ClassConditioner, ClassConfig, make_conditioner
from ldm_edu.data import Scenes, make_masks
from ldm_edu.drawing import counter_uniform
from ldm_edu.folders import Part
from ldm_edu.layout import JointConditioner
from ldm_edu.ldm import ConditionalUNet, LatentDiffusion, LDMConfig
from ldm_edu.placement import fill_rows, grade_fills
from ldm_edu.quantize import make_first_stage
from ldm_edu.recipes import default_conditioner, train_diffusion
from ldm_edu.training import RowRandom
from ldm_edu.unet import UNet, UNetConfig

STAGE = AutoencoderConfig(4, 8, (1, 1, 1), 1, mid_attention=False, num_groups=4)


def scenes(n=6, size=32):
    return Scenes(size, n=n).render(range(n))


def tiny(read=None):
    """A small inpainting model at random weights, none of them zero."""
    torch.manual_seed(0)
    read = read or I.InpaintConditioner(I.InpaintConfig())
    unet = UNetConfig(4 + read.concat_channels, 4, 16, (1, 1), 1, (2,), head_dim=16, num_groups=4, c_dim=read.c_dim, context_dim=read.context_dim)
    model = LatentDiffusion(LDMConfig(STAGE, unet, read.to_dict()), make_first_stage(STAGE), ConditionalUNet(UNet(unet), read)).eval()
    for parameter in model.net.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    return model


@pytest.fixture(scope="module")
def model():
    return tiny()


# ---------------------------------------------------------------- masks


def test_masks_come_with_every_data_set_and_stay():
    data = Scenes(n=9, fields=("image", "label"))
    masked = I.with_masks(data, seed=2)
    alone, together = masked[4]["mask"], masked.__getitems__([1, 4])[1]["mask"]
    assert torch.equal(alone, together) and alone.shape == (1, 32, 32) and set(alone.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(pickle.loads(pickle.dumps(masked))[4]["mask"], alone) and not torch.equal(I.with_masks(data, seed=3)[4]["mask"], alone)
    assert len({I.with_masks(data, 2).fingerprint(), I.with_masks(data, 3).fingerprint(), I.with_masks(Part(data, range(4)), 2).fingerprint()}) == 3


def test_fresh_masks_differ_by_step_and_row_and_depend_on_nothing_else():
    one = I.fresh_masks(RowRandom(0, 7, range(16)), 32, 48)
    assert one.shape == (16, 1, 32, 48) and len({row.numpy().tobytes() for row in one}) == 16
    assert torch.equal(I.fresh_masks(RowRandom(0, 7, range(3, 5)), 32, 48), one[3:5])
    assert not torch.equal(I.fresh_masks(RowRandom(0, 8, range(16)), 32, 48), one)


def test_the_same_numbers_make_the_same_mask_at_every_size():
    chances = counter_uniform(0, np.arange(50), 6, 14)
    small, large = make_masks(chances, 32, 32), make_masks(chances, 128, 128)
    assert abs(small.mean((1, 2, 3)) - large.mean((1, 2, 3))).max() < 0.05


@pytest.mark.parametrize("f", [1, 2, 4, 8])
def test_shares_by_loops(f):
    mask = scenes(3)["mask"]
    shares = I.mask_shares(mask, f)
    for n, i, j in itertools.product(range(3), range(32 // f), range(32 // f)):
        cell = mask[n, 0, i * f : (i + 1) * f, j * f : (j + 1) * f]
        assert shares[n, 0, i, j] == cell.mean()


def test_a_thin_stroke_is_seen_however_thin():
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 5, :] = 1
    assert (I.mask_shares(mask, 4)[0, 0, 1] == 0.25).all() and I.mask_shares(mask, 4).sum() == 2


def test_hidden_pixels_are_grey_and_no_other_changes():
    batch = scenes()
    hidden = I.hide(batch["image"], batch["mask"])
    hole = batch["mask"].bool().expand(-1, 3, -1, -1)
    assert not hidden[hole].any() and torch.equal(hidden[~hole], batch["image"][~hole])


# ---------------------------------------------------------------- the condition


def test_the_condition_never_sees_what_is_hidden(model):
    batch = scenes()
    read = model.net.conditioner
    other = torch.where(batch["mask"].bool(), -batch["image"], batch["image"])
    told, again = (read(read.complete({**batch, "image": x}, model.encode)) for x in (batch["image"], other))
    assert torch.equal(told.concat, again.concat) and told.concat.shape == (6, 5, 8, 8)
    seen = torch.where(batch["mask"].bool(), batch["image"], -batch["image"])
    assert (read(read.complete({**batch, "image": seen}, model.encode)).concat - told.concat).abs().max() > 0.01


def test_the_condition_is_the_latents_of_the_holed_picture_and_the_shares(model):
    batch, read = scenes(), model.net.conditioner
    told = read(read.complete(batch, model.encode))
    assert_close(told.concat[:, :4], model.encode(batch["image"] * (1 - batch["mask"]))), assert_close(told.concat[:, 4:], I.mask_shares(batch["mask"], 4))


def test_training_draws_masks_and_sampling_keeps_them(model):
    batch, read = scenes(), model.net.conditioner
    trained = read.complete(batch, model.encode, RowRandom(0, 1, range(6)))
    assert torch.equal(trained["mask"], I.fresh_masks(RowRandom(0, 1, range(6)), 32, 32)) and not torch.equal(trained["mask"], batch["mask"])
    assert_close(trained["masked"], model.encode(I.hide(batch["image"], trained["mask"])))
    assert read.complete(trained, model.encode, RowRandom(0, 2, range(6))) is trained
    assert torch.equal(read.complete(batch, model.encode)["mask"], batch["mask"])


def test_null_is_a_picture_that_is_all_hole(model):
    null = model.net.conditioner.null(3)
    assert null.concat.shape == (3, 5, 1, 1) and not null.concat[:, :4].any() and (null.concat[:, 4] == 1).all()
    assert len(model.net.conditioner.null(0)) == 0
    assert model.sample(n=2, steps=1).shape == (2, 3, 32, 32), "without a picture it draws freely"


def test_incomplete_batches_say_so(model):
    batch, read = scenes(2), model.net.conditioner
    for call, message in ((lambda: read(batch), "complete"), (lambda: read.complete(batch), "encode=..."),
                          (lambda: read.complete({"image": batch["image"]}, model.encode), "'mask'.*image"),
                          (lambda: read.complete({**batch, "mask": batch["mask"] * 255}, model.encode), "0 and 1"),
                          (lambda: I.mask_shares(torch.zeros(1, 1, 30, 32), 4), "30x32 pixels, expected multiples of f = 4")):
        with pytest.raises(ValueError, match=message):
            call()


# ---------------------------------------------------------------- known pixels


@pytest.mark.parametrize("size", [(32, 32), (32, 48), (64, 32)])
def test_known_pixels_come_back_bit_for_bit(model, size):
    batch = Scenes(size, n=3).render(range(3))
    asked = {key: batch[key] for key in ("image", "mask")}
    images = model.sample(batch=asked, steps=2)
    hole = batch["mask"].bool().expand(-1, 3, -1, -1)
    assert images.shape == batch["image"].shape and torch.equal(images[~hole], batch["image"][~hole])
    assert (images[hole] != batch["image"][hole]).float().mean() > 0.95, "and the rest is new"
    assert_close(model.sample(list(zip(batch["image"], batch["mask"])), steps=2), images)


def test_many_fills_of_one_hole_differ_and_depend_on_the_seed_alone(model):
    batch = scenes(1)
    fills = model.sample([(batch["image"][0], batch["mask"][0])], n=4, steps=2)
    assert I.fill_diversity(fills, batch["mask"][0]) > 0.01
    assert_close(model.sample([(batch["image"][0], batch["mask"][0])], seed=2, steps=2), fills[2:3], rtol=1e-4, atol=1e-4)


def test_latents_are_given_as_drawn(model):
    batch = scenes(1)
    assert model.sample([(batch["image"][0], batch["mask"][0])], steps=1, decode=False).shape == (1, 4, 8, 8)


@pytest.mark.parametrize("margins", list(itertools.product((0, 8), repeat=4)))
def test_a_larger_canvas_asks_for_the_margins_only(margins):
    x = scenes(2)["image"]
    left, top, right, bottom = margins
    canvas, mask = I.outpaint(x, *margins)
    assert canvas.shape == (2, 3, 32 + top + bottom, 32 + left + right) and mask.shape == (2, 1, *canvas.shape[2:])
    inside = (..., slice(top, top + 32), slice(left, left + 32))
    assert torch.equal(canvas[inside], x) and not mask[inside].any() and mask.sum() == mask.numel() - 2 * 32 * 32


def test_outpainting_keeps_the_picture(model):
    x = scenes(1)["image"]
    canvas, mask = I.outpaint(x, right=16)
    images = model.sample(list(zip(canvas, mask)), steps=1)
    assert images.shape == (1, 3, 32, 48) and torch.equal(images[..., :32], x) and images[..., 32:].std() > 0
    with pytest.raises(ValueError, match="expected 0 or more"):
        I.outpaint(x, left=-4)


# ---------------------------------------------------------------- several conditions


def test_words_and_a_hole_together():
    joint = JointConditioner.of(ClassConditioner(ClassConfig(4, width=16)), I.InpaintConditioner(I.InpaintConfig()))
    model, batch = tiny(joint), scenes(2)
    pairs = list(zip(batch["image"], batch["mask"]))
    images = model.sample([{"class": 1, "inpaint": pairs[0]}, {"inpaint": pairs[1]}], steps=1)
    hole = batch["mask"].bool().expand(-1, 3, -1, -1)
    assert torch.equal(images[~hole], batch["image"][~hole])
    images = model.sample([{"class": 1}, {"inpaint": pairs[1]}], steps=1)
    assert torch.equal(images[1:][~hole[1:]], batch["image"][1:][~hole[1:]])
    assert not (images[0] == batch["image"][1])[~hole[1]].all(), "who asks for words alone gets no pixel of another's picture"
    assert model.sample([{"class": 1}], steps=1).shape == (1, 3, 32, 32)


# ---------------------------------------------------------------- prompts and configs


@pytest.mark.parametrize("prompts, message", [
    ([], "empty list"), ([torch.zeros(3, 8, 8)], "prompt 0: got Tensor, expected a pair"), ([(torch.zeros(3, 8, 8),)], "prompt 0"),
    ([(torch.zeros(3, 8, 8), torch.zeros(8, 8))], "mask 0"), ([(torch.zeros(3, 8, 8), torch.zeros(1, 8, 4))], "mask"),
    ([(torch.zeros(3, 8, 8), torch.full((1, 8, 8), 0.5))], "0 and 1"), ([(torch.full((3, 8, 8), 9.0), torch.zeros(1, 8, 8))], "picture 0: got values"),
    ([(torch.zeros(3, 8, 8), torch.zeros(1, 8, 8)), (torch.zeros(3, 8, 12), torch.zeros(1, 8, 12))], "one size"),
])
def test_bad_prompts(prompts, message):
    with pytest.raises(ValueError, match=message):
        I.InpaintConditioner(I.InpaintConfig()).prepare(prompts)


def test_it_is_built_again_from_its_dict():
    model = I.InpaintConditioner(I.InpaintConfig(3, 8))
    again = make_conditioner(model.to_dict())
    assert again.config == model.config and again.concat_channels == 4 and not again.state_dict()
    made = default_conditioner("inpaint", Scenes(n=2), None, stage=AutoencoderConfig(3, 8, (1, 1, 1, 1), num_groups=4))
    assert made.config == model.config
    for changes in ({"z_channels": 0}, {"downsample_factor": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            I.InpaintConfig(**changes)


# ---------------------------------------------------------------- measures


def test_diversity_by_loops():
    fills, mask = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 8, 8)
    mask[:, 2:5, 1:7] = 1
    hole = mask.bool().expand(3, -1, -1)
    pairs = [(a[hole] - b[hole]).square().mean().item() for a, b in itertools.combinations(fills, 2)]
    assert I.fill_diversity(fills, mask) == pytest.approx((sum(pairs) / len(pairs)) ** 0.5, rel=1e-5)
    assert I.fill_diversity(fills[:1].expand(3, -1, -1, -1), mask) == 0
    for bad in ((fills[:1], mask), (fills, mask * 0)):
        with pytest.raises(ValueError, match="at least 2 of at least 1"):
            I.fill_diversity(*bad)


def test_grades_of_fills():
    batch = scenes(64)
    truth = (batch["boxes"], batch["box_labels"], batch["semantic"], batch["mask"])
    rows = fill_rows(batch["image"], *truth)
    assert rows[:, 0].sum() / rows[:, 1].sum() > 0.93 and rows[:, 1].sum() > 20
    for i in (0, 7, 20):  # by hand: which objects are hidden by a tenth to six tenths
        shares = [batch["mask"][i, 0][batch["semantic"][i] == 1 + k].mean().item() for k in batch["box_labels"][i] if k >= 0]
        assert rows[i, 1] == sum(0.1 <= s <= 0.6 for s in shares)
    assert grade_fills(batch["image"], *truth)["objects_kept"]["value"] == pytest.approx((rows[:, 0].sum() / rows[:, 1].sum()).item())
    assert grade_fills(batch["image"].roll(8, -1), *truth)["objects_kept"]["value"] < 0.3, "at another place"
    assert grade_fills(batch["image"][:, [1, 2, 0]], *truth)["objects_kept"]["value"] < 0.4, "in another colour"
    with pytest.raises(ValueError, match="partly hidden"):
        grade_fills(batch["image"], *truth[:3], torch.zeros_like(batch["mask"]))


def test_grades_of_known_pixels():
    batch = scenes()
    exact = I.grade_filled(batch["image"], batch["image"], batch["mask"])
    assert exact["known"]["value"] == 1 and exact["psnr"]["value"] > 100
    shifted = I.grade_filled((batch["image"] * 0.9), batch["image"], batch["mask"])
    assert shifted["known"]["value"] < 0.6 and shifted["psnr"]["value"] < 40
    grey = I.grade_filled(I.hide(batch["image"], batch["mask"]), batch["image"], batch["mask"])
    hole = batch["mask"].bool().expand(-1, 3, -1, -1)
    by_hand = [10 * np.log10(4 / x[h].double().square().mean().item()) for x, h in zip(batch["image"], hole)]
    assert grey["known"]["value"] == 1 and grey["psnr"]["value"] == pytest.approx(np.mean(by_hand), rel=1e-5)


# ---------------------------------------------------------------- training and commands


def test_training_sees_new_masks_every_step(tmp_path, monkeypatch):
    seen = []
    complete = I.InpaintConditioner.complete
    monkeypatch.setattr(I.InpaintConditioner, "complete", lambda self, *args: seen.append(complete(self, *args)) or seen[-1])
    data = I.with_masks(Scenes(16, n=4, fields=("image",)))
    trained = train_diffusion(data, make_first_stage(STAGE), "inpaint-tiny", tmp_path / "run", steps=3, batch_size=4, progress=False,
                              unet={"model_channels": 16, "head_dim": 16})
    assert len({m.numpy().tobytes() for batch in seen[:3] for m in batch["mask"]}) == 12
    kept = torch.stack([item["image"] for item in data])
    found = min((seen[0]["image"][0] - x).abs().max().item() for x in kept)
    assert found <= 1 / 255 + 1e-6, "pictures are kept in bytes"
    folder, = (tmp_path / "run" / "latents").glob("latents-*")
    np.save(folder / "field-image.npy", kept.numpy())
    assert torch.equal(LatentDataset(folder).fetch(range(4))["image"], kept), "an older cache kept them as they were"
    asked = {"image": kept[:2], "mask": data[0]["mask"][None].repeat(2, 1, 1, 1)}
    drawn = trained.sample(batch=asked, steps=1)
    assert torch.equal(drawn * (1 - asked["mask"]), kept[:2] * (1 - asked["mask"]))


TINY = ["--size", "16", "--items", "32", "--steps", "2", "--batch-size", "4"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A tiny first stage and a tiny inpainting model, trained by the command line, pictures and masks."""
    folder = tmp_path_factory.mktemp("inpainting")
    assert cli.main(["train-autoencoder", *TINY, "--model.model-channels", "8", "--model.num-groups", "4", "--out", str(folder / "ae")]) == 0
    assert cli.main(["train", "--recipe", "inpaint-tiny", "--first-stage", str(folder / "ae"), *TINY, "--sample-every", "2", "--out", str(folder / "fill")]) == 0
    for name in ("one", "two"):
        Image.fromarray(np.random.default_rng(len(name)).integers(0, 256, (16, 24, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    hole = np.zeros((16, 24), dtype=np.uint8)
    hole[4:12, 4:12] = 255
    Image.fromarray(hole).save(folder / "hole.png")
    Image.fromarray(hole[:8]).save(folder / "flat.png")
    (folder / "real").mkdir()
    for i in range(24):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(folder / "real" / f"{i}.png")
    return folder


def test_sample_fills_files_and_keeps_their_pixels(runs, tmp_path):
    args = ["sample", "--model", str(runs / "fill"), "--steps", "1", "--images", str(runs / "one.png"), str(runs / "two.png"), "--masks",
            str(runs / "hole.png"), "--out", str(tmp_path / "out")]
    assert cli.main(args) == 0
    drawn, given = (np.array(Image.open(p)).astype(int) for p in (tmp_path / "out" / "0001.png", runs / "two.png"))
    known = np.array(Image.open(runs / "hole.png")) == 0
    assert (drawn[known] == given[known]).all() and (drawn[~known] != given[~known]).mean() > 0.5
    assert json.loads((tmp_path / "out" / "samples.json").read_text())["masks"] == [str(runs / "hole.png")]
    assert len(gather_prompts(I.InpaintConditioner(I.InpaintConfig()), Asked(images=[runs / "one.png"], masks=[runs / "hole.png"] * 3))) == 3


@pytest.mark.parametrize("args, message", [
    (["--images", "one.png"], "--images, --masks: got 1 and 0"), (["--images", "one.png", "two.png", "one.png", "--masks", "hole.png", "hole.png"], "got 3 and 2"),
    (["--images", "one.png", "--masks", "flat.png"], "one.png, .*flat.png: .*mask"), (["--images", "one.png", "--masks", "gone.png"], "gone.png")])
def test_bad_requests_name_file_and_option(runs, tmp_path, capsys, monkeypatch, args, message):
    monkeypatch.chdir(runs)
    assert cli.main(["sample", "--model", str(runs / "fill"), "--steps", "1", "--out", str(tmp_path / "out"), *args]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_evaluate_measures_fills(runs, tmp_path, capsys):
    few = ["--size", "16", "--samples", "0", "--prompts", "16", "--steps", "1"]
    assert cli.main(["evaluate", "--model", str(runs / "fill"), *few, "--out", str(tmp_path / "e.json")]) == 0
    results = json.loads((tmp_path / "e.json").read_text())["inpaint"]
    assert results["known"]["value"] == 1 and results["psnr"]["value"] > 0 and results["objects"] > 0
    assert "partly hidden" in capsys.readouterr().err


def test_folders_train_and_are_measured_by_the_same_commands(runs, tmp_path):
    data = ["--data", str(runs / "real"), "--size", "16"]
    assert cli.main(["train", "--recipe", "inpaint-tiny", "--first-stage", str(runs / "ae"), *data, "--steps", "1", "--batch-size", "4",
                     "--out", str(tmp_path / "run")]) == 0
    assert cli.main(["evaluate", "--model", str(tmp_path / "run"), *data, "--samples", "0", "--prompts", "2", "--steps", "1", "--out", str(tmp_path / "e.json")]) == 0
    results = json.loads((tmp_path / "e.json").read_text())["inpaint"]
    assert results["known"]["value"] == 1 and "objects" not in results
