"""The command line and the two training calls, end to end on tiny runs: files, resuming, exit codes, messages."""
import hashlib
import importlib.metadata
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ldm_edu import cli, recipes
from ldm_edu.autoencoder import AutoencoderConfig
from ldm_edu.captions import parse_caption
from ldm_edu.conditioning import ClassConditioner, ClassConfig
from ldm_edu.data import Scenes
from ldm_edu.folders import Part
from ldm_edu.ldm import LDMConfig, build, load, load_first_stage, save
from ldm_edu.perceptual import load_perceptual
from ldm_edu.schedule import ScheduleConfig
from ldm_edu.unet import UNETS, UNetConfig
from ldm_edu.viz import to_pil

TINY = ["--model.model-channels", "8", "--model.num-groups", "4", "--batch-size", "4", "--size", "16"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a tiny first stage and a tiny text model, trained by the command line."""
    folder = tmp_path_factory.mktemp("runs")
    assert cli.main(["train-autoencoder", "--items", "32", "--steps", "3", "--sample-every", "3", "--out", str(folder / "ae"), *TINY]) == 0
    assert cli.main(["train", "--first-stage", str(folder / "ae"), "--items", "32", "--steps", "3", "--batch-size", "4", "--size", "16",
                     "--sample-every", "3", "--out", str(folder / "text")]) == 0
    return folder


def state(folder) -> str:
    """Hash of a finished model's weights."""
    return hashlib.sha256((folder / "model" / "model.safetensors").read_bytes()).hexdigest()


def test_trained_models_load_and_say_how_they_came_to_be(runs):
    assert load_first_stage(runs / "ae").card["steps"] == 3
    model = load(runs / "text")
    assert model.card["train"]["batch_size"] == 4 and model.config.image_size == 16
    assert model.card["data"].startswith("Scenes, 32 items, scenes-16x16-n32-train") and model.card["commit"]
    assert list((runs / "ae" / "samples").glob("*.png")) and list((runs / "text" / "samples").glob("*.png"))
    images = model.sample(["a red circle"], steps=2)
    assert images.shape == (1, 3, 16, 16)


def test_the_module_is_the_command_for_torchrun():
    done = subprocess.run([sys.executable, "-m", "ldm_edu", "sample", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--guidance-scale" in done.stdout
    assert subprocess.run([sys.executable, "-m", "ldm_edu", "sample", "--model", "nothing"], capture_output=True).returncode == 2


def test_pack_copies_in_half_precision_and_measures_the_copy(runs, tmp_path, capsys):
    out = tmp_path / "packed"
    few = ["--measures.size", "16", "--measures.samples", "8", "--measures.references", "16", "--measures.training", "16",
           "--measures.cache", str(tmp_path / "cache")]
    args = ["pack", "--model", str(runs / "text"), "--out", str(out), "--measures.prompts", "2", "--measures.steps", "1", *few]
    assert cli.main(args) == 0 and cli.main(args) == 2, "never over another model"
    assert str(out) in capsys.readouterr().err
    assert (out / "model.safetensors").stat().st_size < 0.6 * (runs / "text" / "model" / "model.safetensors").stat().st_size
    card = load(out).card
    assert card["steps"] == 3 and card["measured"]["single"]["n"] == 2 and card["measured"]["reconstruction"]["psnr"] > 0
    assert card["measured"]["distribution"]["samples"]["n"] == 8
    assert cli.main(["pack", "--model", str(runs / "ae"), "--out", str(tmp_path / "ae"), *few]) == 0
    assert load_first_stage(tmp_path / "ae").card["measured"]["data"].startswith("Scenes, 256 items")


def test_code_version_names_the_commit_of_a_checkout_only(tmp_path, monkeypatch):
    module = tmp_path / "ldm_edu" / "recipes.py"
    module.parent.mkdir()
    module.touch()
    monkeypatch.setattr(recipes, "__file__", str(module))
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    version = importlib.metadata.version("ldm_edu")
    assert recipes.code_version() == version
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-qm", "empty", "--allow-empty"], check=True)
    assert recipes.code_version() == version, "somebody else's checkout"
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "all"], check=True)
    assert re.fullmatch(rf"{re.escape(version)} [0-9a-f]{{12}}", recipes.code_version())
    module.write_text("changed")
    assert recipes.code_version().endswith("+")


def test_latents_have_unit_variance_after_scaling(runs):
    model = load(runs / "text")
    x = Scenes(16, n=32, objects=(1, 2), fields=("image",)).render(range(32))["image"]
    z = model.encode(x, generator=torch.Generator().manual_seed(0))
    assert abs(z.std().item() - 1) < 0.05, f"std {z.std():.3f}"


def test_sample_writes_pictures_and_never_over_others(runs, capsys):
    out = runs / "pictures"
    args = ["sample", "a red circle", "a blue square", "--model", str(runs / "text"), "--steps", "2", "--out", str(out)]
    assert cli.main(args) == 0
    assert Image.open(out / "0001.png").size == (16, 16) and json.loads((out / "samples.json").read_text())["prompts"][1] == "a blue square"
    before = (out / "sheet.png").read_bytes()
    assert cli.main(args) == 2 and "pictures holds 0000.png and others (4 in all) already" in capsys.readouterr().err
    assert cli.main([*args, "--overwrite", "--seed", "3"]) == 0 and (out / "sheet.png").read_bytes() != before
    assert cli.main([*args, "--overwrite", "--guidance-scale", "3", "--guidance-rescale", "0.7", "--guidance-interval", "100", "900"]) == 0
    assert json.loads((out / "samples.json").read_text())["guidance_interval"] == [100, 900]
    exact = np.asarray(Image.open(out / "0000.png"), dtype=float)
    assert cli.main([*args, "--overwrite", "--precision", "bf16", "--guidance-scale", "3", "--guidance-rescale", "0.7", "--guidance-interval", "100", "900"]) == 0
    assert json.loads((out / "samples.json").read_text())["precision"] == "bf16" and 0 < np.abs(np.asarray(Image.open(out / "0000.png")) - exact).mean() < 10
    assert cli.main([*args, "--overwrite", "--precision", "int8"]) == 2 and "precision" in capsys.readouterr().err


def pictures_in(folder) -> list[str]:
    """Names of what lies in a folder."""
    return sorted(path.name for path in folder.iterdir())


def test_sample_leaves_the_files_of_others_alone(runs, tmp_path, capsys):
    out, args = tmp_path / "mine", ["sample", "a red circle", "--model", str(runs / "text"), "--steps", "2"]
    out.mkdir()
    for name in ("0000.png", "0007.png"):  # without a sheet: whatever drew them, nobody asked to lose them
        (out / name).write_bytes(b"holiday")
    (out / "notes.txt").write_text("mine")
    assert cli.main([*args, "--out", str(out)]) == 2
    assert "holds 0000.png and others (2 in all) already" in capsys.readouterr().err and pictures_in(out) == ["0000.png", "0007.png", "notes.txt"]
    assert (out / "0000.png").read_bytes() == b"holiday"
    assert cli.main([*args, "--out", str(out), "--overwrite", "--n", "3"]) == 0  # asked for: what has the same name is replaced, the rest stays
    assert "also holds what is not of this call: 0007.png" in capsys.readouterr().err
    assert (out / "0007.png").read_bytes() == b"holiday" and (out / "notes.txt").read_text() == "mine"
    (out / "0002.png").write_bytes(b"retouched")
    assert cli.main([*args, "--out", str(out), "--overwrite"]) == 0
    assert pictures_in(out) == ["0000.png", "0002.png", "0007.png", "notes.txt", "samples.json", "sheet.png"], "0001.png was of the run before"
    assert (out / "0002.png").read_bytes() == b"retouched"


def test_a_list_of_samples_can_name_no_file_outside_its_folder(runs, tmp_path):
    from ldm_edu.asking import put_pictures

    (tmp_path / "out").mkdir()
    put_pictures(tmp_path, {"9999.png": b"kept"}, {})
    mark = json.loads((tmp_path / "samples.json").read_text())["files"]["9999.png"]
    (tmp_path / "out" / "samples.json").write_text(json.dumps({"files": {"../9999.png": mark}}))
    put_pictures(tmp_path / "out", {"0000.png": b"new"}, {})
    assert (tmp_path / "9999.png").exists()


def test_samples_json_draws_the_same_again(runs, tmp_path):
    args = ["sample", "a red circle", "--n", "2", "--model", str(runs / "text"), "--steps", "3", "--seed", "5", "--guidance-rescale", "0.5"]
    assert cli.main([*args, "--out", str(tmp_path / "a")]) == 0
    said = json.loads((tmp_path / "a" / "samples.json").read_text())
    assert said["guidance_scale"] == load(runs / "text").config.guidance_scale == 3.0 and said["size"] == [16, 16] and said["n"] == 2
    assert said["version"] == recipes.code_version() and len(said["weights"]) == 32 and list(said["files"]) == ["0000.png", "0001.png"]
    again = ["sample", *said["prompts"]]
    for name in ("model", "n", "steps", "sampler", "guidance_scale", "guidance_rescale", "seed", "precision"):
        again += [f"--{name.replace('_', '-')}", str(said[name])]
    assert cli.main([*again, "--size", *map(str, said["size"]), "--out", str(tmp_path / "b")]) == 0
    repeated = json.loads((tmp_path / "b" / "samples.json").read_text())
    assert repeated["files"] == said["files"] and repeated == said
    assert cli.main(["sample", "--model", str(runs / "text"), "--steps", "1", "--guidance-scale", "7", "--out", str(tmp_path / "c")]) == 0
    assert json.loads((tmp_path / "c" / "samples.json").read_text())["guidance_scale"] == 1.0, "nothing was asked, so nothing was guided"


@pytest.mark.parametrize("args", [
    ["sample", "a red circle", "--model", "TEXT", "--steps", "1", "--out"],
    ["evaluate", "--model", "TEXT", "--size", "16", "--out"],
    ["evaluate", "--model", "TEXT", "--size", "16", "--cache"],
    ["bench", "--workload", "S8", "--rounds", "1", "--out"],
    ["doctor", "--model", "TEXT", "--plot"],
    ["train-autoencoder", "--steps", "1", "--out"],
    ["train", "--steps", "1", "--out"],
    ["train-features", "--steps", "1", "--out"],
    ["train-perceptual", "--steps", "1", "--out"],
    ["pack", "--model", "TEXT", "--measures.size", "16", "--measures.cache", "CACHE", "--out"],
    ["convert", "--from", "TEXT", "--out"],
    ["shard", "--data", "PHOTOS", "--out"],
], ids=lambda args: args[0] + args[-1])
def test_a_place_that_takes_no_files_is_found_before_any_work(runs, tmp_path, monkeypatch, capsys, args):
    """Every command that writes: below a file no folder can be, whoever asks."""
    idle = lambda *args, **options: pytest.fail("work was done")
    for name in ("evaluate_samples", "reconstruction", "compare_speed", "train_autoencoder", "train_diffusion", "train_features", "train_perceptual",
                 "pack_images", "convert_model", "examine", "examine_run", "save"):
        monkeypatch.setattr(cli, name, idle)
    monkeypatch.setattr("ldm_edu.ldm.LatentDiffusion.sample", idle)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "photos").mkdir()
    places = {"TEXT": str(runs / "text"), "CACHE": str(tmp_path / "cache"), "PHOTOS": str(tmp_path / "photos")}
    asked = [places.get(a, a) for a in args]
    assert cli.main([*asked, str(tmp_path / "file" / "deeper" / "x")]) == 2
    assert re.search(r"(out|plot|cache): got .*deeper.*, but .*file is a file, expected a folder", capsys.readouterr().err)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_place_is_tried_not_asked(tmp_path, monkeypatch):
    """Root may write anywhere by its rights, and still not on a disk that is read-only or full."""
    from ldm_edu import asking

    def refuse(dir):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(asking.tempfile, "TemporaryFile", refuse)
    with pytest.raises(ValueError, match="out: got .*new, which takes no files .Read-only file system., expected a folder to write to"):
        asking.check_place(tmp_path / "new")
    with pytest.raises(ValueError, match="plot: got .*, which is a folder, expected a file's name"):
        asking.check_files([tmp_path], True, "plot")
    assert not list(tmp_path.iterdir()), "looking leaves nothing behind"


def test_sample_draws_large_pictures_by_windows(runs, capsys):
    args = ["sample", "a red circle", "--model", str(runs / "text"), "--steps", "2", "--size", "16", "48", "--out"]
    assert cli.main([*args, str(runs / "whole")]) == 0
    assert cli.main([*args, str(runs / "windows"), "--window", "16", "--overlap", "8", "--tile", "16"]) == 0
    whole, windows = (np.asarray(Image.open(runs / name / "0000.png")) for name in ("whole", "windows"))
    assert whole.shape == windows.shape == (16, 48, 3) and (whole != windows).any()
    assert json.loads((runs / "windows" / "samples.json").read_text())["window"] == 16
    assert cli.main([*args, str(runs / "bad"), "--window", "16", "--overlap", "16"]) == 2
    assert "overlap: got 16 pixels" in capsys.readouterr().err


def test_evaluate_prints_and_writes(runs, capsys):
    few = ["--size", "16", "--samples", "8", "--references", "16", "--training", "16", "--cache", str(runs / "cache")]
    args = ["evaluate", "--model", str(runs / "text"), "--prompts", "2", "--steps", "1", "--out", str(runs / "e.json"), *few]
    assert cli.main(args) == 0
    results = json.loads((runs / "e.json").read_text())
    assert results["reconstruction"]["n"] == 256 and set(results) >= {"single", "relation", "held_out"}
    capsys.readouterr()
    assert cli.main(args) == 2 and "exists already" in capsys.readouterr().err
    assert cli.main(["evaluate", "--model", str(runs / "ae"), *few]) == 0


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A folder with an untrained class model of 16 x 24 pixels, and 90 photographs, of which 9 are kept aside, of 30 x 60."""
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    reads = ClassConditioner(ClassConfig(6, Scenes.class_names, width=8))
    stage = AutoencoderConfig(4, 8, (1, 2, 2), 1, mid_attention=False, num_groups=4)
    unet = UNetConfig(4, 4, 8, (1, 2), 1, (1,), head_dim=8, num_groups=4, context_dim=reads.context_dim)
    save(build(LDMConfig(stage, unet, reads.to_dict(), ScheduleConfig(T=100), image_size=(16, 24))), folder / "model")
    batch = Scenes((32, 64), n=90, objects=(1, 1), fields=("image", "label")).render(range(90))
    for i, (image, label) in enumerate(zip(batch["image"], batch["label"].tolist())):
        (folder / "photos" / Scenes.class_names[label]).mkdir(parents=True, exist_ok=True)
        to_pil(image[:, 1:-1, 2:-2]).save(folder / "photos" / Scenes.class_names[label] / f"{i}.png")
    return folder


@pytest.mark.parametrize("pictures", ["scenes", "photos"])
def test_a_model_of_pictures_that_are_not_square_is_measured_at_its_own_height_and_width(wide, tmp_path, monkeypatch, capsys, pictures):
    shapes, evaluate = [], cli.evaluate_samples
    look = lambda evaluator, images, reference, training, *more: (
        shapes.extend([images.shape[1:], reference[0]["image"].shape, training[0]["image"].shape]), evaluate(evaluator, images, reference, training, *more))[1]
    monkeypatch.setattr(cli, "evaluate_samples", look)
    few = ["--samples", "8", "--references", "16", "--training", "16", "--prompts", "4", "--steps", "1", "--cache", str(tmp_path / "cache")]
    args = ["evaluate", "--model", str(wide / "model"), "--data", "scenes" if pictures == "scenes" else str(wide / "photos"), *few]
    for wrong in ([], ["--size", "24", "16"], ["--size", "16"]):
        assert cli.main([*args, *wrong]) == 2
        assert f"got data of {' '.join(wrong[1:]) or 32} pixels for a model that draws 16 24: pass --size 16 24" in capsys.readouterr().err
    assert not shapes and cli.main([*args, "--size", "16", "24"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert shapes == [(3, 16, 24)] * 3 and results["distribution"]["features"]["source"] == "16x24" and results["reconstruction"]["psnr"] > 0
    assert results["notes"] == ["FID and the like look at the centre square: 16 x 16 of 16 x 24 pixels"]


@pytest.mark.parametrize("pictures", ["scenes", "photos"])
def test_doctor_examines_a_model_at_its_own_height_and_width(wide, monkeypatch, capsys, pictures):
    shapes, examine = [], cli.examine
    look = lambda model, data, **options: (shapes.append(data[0]["image"].shape), examine(model, data, **options))[1]
    monkeypatch.setattr(cli, "examine", look)
    data = "scenes" if pictures == "scenes" else str(wide / "photos")
    assert cli.main(["doctor", "--model", str(wide / "model"), "--data", data, "--items", "64", "--cases", "64", "--json"]) == 1
    found = {f["name"]: f for f in json.loads(capsys.readouterr().out)["findings"]}
    assert shapes == [(3, 16, 24)] and found["samples"]["measured"].startswith("32 of 32 stranger") and found["loss"]["verdict"] == "sick"


def test_both_stages_are_trained_on_pictures_that_are_not_square(tmp_path, capsys):
    size = ["--batch-size", "4", "--items", "32", "--steps", "2", "--size", "24", "16"]
    assert cli.main(["train-autoencoder", *TINY[:4], *size, "--out", str(tmp_path / "ae")]) == 0
    second = ["train", "--recipe", "class-tiny", "--first-stage", str(tmp_path / "ae"), *size, "--out", str(tmp_path / "run")]
    assert cli.main(second) == 0 and cli.main(["doctor", "--model", str(tmp_path / "run"), "--items", "64", "--cases", "64"]) == 1
    assert load(tmp_path / "run").config.image_size == (24, 16) and load(tmp_path / "run").sample(n=1, steps=1).shape == (1, 3, 24, 16)
    capsys.readouterr()
    assert cli.main([*second, "--dry-run"]) == 2 and "size: got 24 16, expected one side: --dry-run says what squares need" in capsys.readouterr().err
    assert cli.main([*second[:-3], "20", "--out", str(tmp_path / "other")]) == 2
    assert "size: got 24 20, expected a multiple of 8 (the first stage divides by 4, the UNet by 2)" in capsys.readouterr().err


@pytest.mark.parametrize("args, message", [
    (["sample", "", "--model", "TEXT"], "empty"),
    (["sample", "a red zebra", "--model", "TEXT"], "zebra"),
    (["sample", "a red circle " * 40, "--model", "TEXT"], "tokens"),
    (["sample", "a red circle", "--model", "TEXT", "--steps", "0"], "got 0"),
    (["sample", "a red circle", "--model", "TEXT", "--steps", "1001"], "1001"),
    (["sample", "a red circle", "--model", "TEXT", "--sampler", "euler9"], "euler9.*ddim"),
    (["sample", "a red circle", "--model", "TEXT", "--size", "20", "20"], "20x20"),
    (["sample", "a red circle", "--model", "TEXT", "--guidance-scale", "2", "--guidance-rescale", "2"], "rescale: got 2"),
    (["sample", "a red circle", "--model", "nowhere"], "nowhere.*expected"),
    (["sample", "a red circle", "--model", "AE"], "first-stage"),
    (["train", "--recipe", "txt-tiny"], "txt-tiny.*text-tiny"),
    (["train", "--first-stage", "AE", "--data", "missing-folder"], "missing-folder"),
    (["train-autoencoder", "--steps", "0"], "steps: got 0"),
    (["train-autoencoder", "--size", "18", "--items", "4", "--out", "OUT"], "size: got 18, expected a multiple of 4 .the first stage divides by 4"),
    (["train-autoencoder", "--betas", "0.9"], "betas: got .0.9,., expected two numbers"),
    (["train-autoencoder", "--betas", "0.9", "1.0"], "betas: got .0.9, 1.0., expected two numbers"),
    (["train-autoencoder", "--seed", "18446744073709551616"], "seed: got 18446744073709551616, expected an integer of 64 bits"),
    (["sample", "a red circle", "--model", "TEXT", "--seed", "4294967296"], "seed: got 4294967296"),
    (["train-autoencoder", "--model.ch-mult", "1", "0"], "model.ch_mult: got 1 0, expected a width of at least 1"),
    (["train", "--first-stage", "AE", "--betas", "0.9"], "betas: got .0.9,., expected two numbers"),
    (["train", "--first-stage", "AE", "--size", "36"], "size: got 36, expected a multiple of 8 .the first stage divides by 4, the UNet by 2"),
    (["train", "--first-stage", "AE", "--prediction", "y"], "prediction: got 'y', expected one of 'eps', 'x0', 'v'"),
    (["train", "--first-stage", "AE", "--condition-dropout", "1.5"], "condition_dropout, .*: got 1.5.*expected a share from 0 to 1"),
    (["train", "--first-stage", "AE", "--condition-dropout", "-1"], "condition_dropout, .*: got -1.0.*expected a share"),
    (["train", "--first-stage", "AE", "--condition-dropout", "nan"], "condition_dropout, .*: got nan.*expected a share"),
    (["train", "--first-stage", "AE", "--recipe", "class-tiny", "--reading-steps", "5"], "reading_steps: got 5 for a class condition, expected 0"),
    (["train", "--first-stage", "AE", "--start-from", "TEXT", "--prediction", "eps"], "start_from: got .*text, which predicts v, expected --prediction eps"),
    (["train", "--start-from", "TEXT"], "start_from: got .*text, a model of another first stage, expected scenes-kl-f4"),
    (["evaluate", "--model", "TEXT", "--prompts", "0"], "prompts: got 0, expected at least 1"),
    (["evaluate", "--model", "TEXT", "--samples", "-1"], "samples: got -1, expected at least 0"),
])
def test_bad_requests_exit_with_2_and_a_sentence(runs, capsys, tmp_path, monkeypatch, args, message):
    places = {"TEXT": str(runs / "text"), "AE": str(runs / "ae"), "OUT": str(tmp_path / "new")}
    args = [places.get(a, a) for a in args]
    if args[0] == "sample":
        args += ["--out", str(tmp_path / "none")]
    elif "--out" not in args:
        args += ["--out", str(tmp_path / "new")]
    if args[0].startswith("train") and "--data" not in args:
        monkeypatch.setattr(cli.DataOptions, "pictures", lambda *args: pytest.fail("pictures were opened"))
    assert cli.main(args) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.rglob("*.safetensors")) and not list(tmp_path.rglob("*.png")) and not list(tmp_path.rglob("*.part"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """24 pictures of scenes in folders by shape, which come in another order than scenes count them, and some in another set of classes."""
    folder = tmp_path_factory.mktemp("photos")
    batch = Scenes(16, n=200, objects=(1, 1), fields=("image", "caption", "label")).render(range(200))
    for place, names in (("shapes", Scenes.class_names), ("others", ("dog", "ship") * 3)):
        for kind, name in enumerate(names):
            (folder / place / name).mkdir(parents=True, exist_ok=True)
            for i in [i for i, label in enumerate(batch["label"].tolist()) if label == kind][:4]:
                pixels = ((batch["image"][i].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()
                caption = batch["caption"][i] if place == "shapes" else "a photo of mine"
                Image.fromarray(pixels).save(folder / place / name / f"{caption} {i}.png")
    return folder


@pytest.mark.parametrize("options, message", [
    ([], "data: got no caption in .*shapes, expected captions .--captions filename, sidecar, or a table."),
    (["--dry-run"], "data: got no caption in .*shapes, expected captions"),
    (["--recipe", "layout-tiny"], "data: got no boxes, box_labels in .*shapes, expected scenes"),
    (["--captions", "filename", "--reading-steps", "2", "--data", "PHOTOS/others"], "reading_steps: got 2 and a caption unlike those of scenes"),
    (["--dry-run", "--data", "PHOTOS/nowhere"], "nowhere"),
])
def test_what_pictures_lack_is_said_before_they_are_encoded(runs, photos, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.setattr(cli, "train_diffusion", lambda *args, **options: pytest.fail("training began"))
    if "data: got no caption" in message:
        monkeypatch.setattr(cli, "open_pictures", lambda *args, **options: pytest.fail("pictures were looked at"))
    options = [option.replace("PHOTOS", str(photos)) for option in options]
    out = tmp_path / "out"
    assert cli.main(["train", "--data", str(photos / "shapes"), "--size", "16", "--first-stage", str(runs / "ae"), "--out", str(out), *options]) == 2
    assert re.search(message, capsys.readouterr().err) and not list(out.rglob("*.safetensors"))


def test_a_dry_run_looks_at_the_data_and_leaves_nothing(runs, photos, tmp_path, capsys):
    args = ["train", "--data", str(photos / "shapes"), "--size", "16", "--first-stage", str(runs / "ae"), "--recipe", "class-tiny", "--steps", "22",
            "--batch-size", "4", "--dry-run", "--out", str(tmp_path / "out")]
    before = sorted(photos.rglob("*"))
    assert cli.main(args) == 0
    assert "shapes, 22 pictures, each seen 4 times, and 2 kept aside" in capsys.readouterr().out
    assert not list(tmp_path.iterdir()) and sorted(photos.rglob("*")) == before


def test_labels_count_in_the_order_of_the_model_s_classes(photos):
    """A folder's classes come by name, scenes' as they are listed: what one calls 0 is another class for the other."""
    data, _ = cli.DataOptions(str(photos / "shapes"), size=16).open(keys=("label",))
    config = load("scenes-class").config
    ordered = cli.in_order(data, config)
    named = [Scenes.class_names[int(ordered[i]["label"])] for i in range(len(ordered))]
    assert named == [data.names[i].split("/")[0] for i in range(len(data))] and len(set(named)) == len(Scenes.class_names)
    assert [int(data[i]["label"]) for i in range(len(data))] != [int(ordered[i]["label"]) for i in range(len(data))]
    assert cli.in_order(data, load("scenes-text").config) is data, "a model of no classes takes any"


def test_evaluate_refuses_classes_that_the_model_does_not_have(photos, monkeypatch, capsys):
    monkeypatch.setattr(cli, "reconstruction", lambda *args: pytest.fail("something was measured"))
    assert cli.main(["evaluate", "--model", "scenes-class", "--data", str(photos / "others"), "--size", "32", "--cache", "None"]) == 2
    assert "data: got the classes dog, ship, expected those of the model: " in capsys.readouterr().err


def test_few_pictures_are_said_to_be_those_of_the_training(photos, tmp_path, capsys):
    some = tmp_path / "some"
    some.mkdir()
    for path in list((photos / "others").rglob("*.png"))[:6]:
        (some / path.name).write_bytes(path.read_bytes())
    training, validation = cli.DataOptions(str(some), size=16).open()
    assert training is validation
    assert "got 6 pictures in " in (told := capsys.readouterr().err) and "expected at least 20 to keep some aside" in told
    cli.DataOptions(str(photos / "shapes"), size=16).open()
    assert not capsys.readouterr().err


def test_doctor_says_what_it_examines(runs, capsys):
    for model, what in ((runs / "ae", "a run of 'first-stage'"), ("scenes-kl-f4", "scenes-kl-f4 of kind 'first-stage'")):
        assert cli.main(["doctor", "--model", str(model)]) == 2
        told = capsys.readouterr().err
        assert f"model: got {what}" in told and "expected a diffusion model or its run" in told and "ldm-edu evaluate" in told
    assert cli.main(["doctor", "--model", str(runs / "text"), "--items", "64", "--cases", "64", "--json"]) in (0, 1), "the run's own first stage is in its model"
    assert json.loads(capsys.readouterr().out)["findings"]


def test_a_damaged_file_of_weights_is_a_sentence(runs, tmp_path, monkeypatch, capsys):
    from ldm_edu import features

    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((runs / "text" / "model" / name).read_bytes()[: 4000 if name == "model.safetensors" else None])
    assert cli.main(["sample", "a red circle", "--model", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "model.safetensors: not a readable safetensors file" in capsys.readouterr().err
    damaged = lambda *args: features.load_file(tmp_path / "model.safetensors")
    monkeypatch.setattr(cli, "load_features", damaged)
    assert cli.main(["evaluate", "--model", str(runs / "ae"), "--size", "16", "--cache", str(tmp_path / "cache")]) == 1
    assert "a .safetensors file could not be read or written whole" in capsys.readouterr().err


@pytest.mark.parametrize("change, message", [
    ({"unet": []}, "make no model"), ({"unet": None}, "make no model"), ({"schedule": 7}, "make no model"),
    ({"scale_factor": "x"}, "make no model"), ({"conditioner": {"name": "text"}}, "needs its tokenizer"), ({"prediction": "w"}, "prediction: got 'w'"),
])
def test_a_damaged_config_is_named_once(runs, tmp_path, capsys, change, message):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((runs / "text" / "model" / name).read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(json.loads((tmp_path / "config.json").read_text()) | change))
    for command in ("sample", "evaluate"):
        assert cli.main([command, "--model", str(tmp_path), "--out", str(tmp_path / command / "x.json")]) == 2
        told = capsys.readouterr().err
        assert re.match(f"ldm-edu: {re.escape(str(tmp_path / 'config.json'))}: .*({message})", told), told
        assert told.count(str(tmp_path)) == 1
    (tmp_path / "config.json").write_text("[1]")
    assert cli.main(["evaluate", "--model", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"ldm-edu: {tmp_path}: got a folder of kind None, expected 'latent-diffusion'\n"


def test_a_run_without_a_model_is_called_unfinished(runs, tmp_path, capsys):
    (tmp_path / "run.json").write_bytes((runs / "text" / "run.json").read_bytes())
    assert cli.main(["sample", "a red circle", "--model", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "a run that has not finished: the command that began it goes on with it" in capsys.readouterr().err


def test_a_model_of_photographs_is_not_measured_on_scenes(runs, tmp_path, monkeypatch, capsys):
    """By default `evaluate` and `pack` draw scenes: a distance to them says nothing about a model of something else."""
    model, stage = load(runs / "text"), load_first_stage(runs / "ae")
    model.card = stage.card = {"data": "ImageFolder, 60000 items, abc"}
    save(model, tmp_path / "text"), save(stage, tmp_path / "ae")
    few = ["size", "16", "samples", "8", "references", "16", "training", "16", "cache", str(tmp_path / "cache")]
    for prefix, args in (("", ["evaluate"]), ("measures.", ["pack", "--out", str(tmp_path / "copy")])):
        options = [f"--{prefix}{value}" if i % 2 == 0 else value for i, value in enumerate(few)]
        assert cli.main([*args, "--model", str(tmp_path / "text"), *options]) == 2
        assert "data: got scenes for a model of other pictures (ImageFolder, 60000 items, abc), expected such" in capsys.readouterr().err
        assert not list(tmp_path.rglob("copy/*"))
    options = [f"--{value}" if i % 2 == 0 else value for i, value in enumerate(few)]
    assert cli.main(["evaluate", "--model", str(tmp_path / "ae"), *options]) == 0  # a first stage may be asked how it does on others
    told = capsys.readouterr()
    assert json.loads(told.out)["notes"] == ["measured on scenes, trained on other pictures: ImageFolder, 60000 items, abc"]
    assert "measured on scenes, trained on other pictures" in told.err


def test_ctrl_c_is_no_fault(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("ldm_edu.ldm.LatentDiffusion.sample", lambda *args, **options: (_ for _ in ()).throw(KeyboardInterrupt))
    assert cli.main(["sample", "a red circle", "--model", str(runs / "text"), "--out", str(tmp_path / "out")]) == 130
    assert "stopped by SIGINT" in capsys.readouterr().err


def test_pack_leaves_nothing_half_made(runs, tmp_path, monkeypatch, capsys):
    out = tmp_path / "copy"
    monkeypatch.setattr(cli.Evaluate, "measure", lambda *args: (_ for _ in ()).throw(ValueError("no such data")))
    assert cli.main(["pack", "--model", str(runs / "ae"), "--out", str(out), "--measures.size", "16", "--measures.cache", str(tmp_path / "cache")]) == 2
    assert "no such data" in capsys.readouterr().err and pictures_in(tmp_path) == [], "nor the place where it was made"


def test_the_last_of_two_recipes_counts():
    command = cli._parse(["train", "--recipe", "text-demo", "--recipe", "class-tiny"])
    assert command.recipe == "class-tiny" and command.train == recipes.DIFFUSIONS["class-tiny"].train


def test_pack_does_not_take_the_place_of_the_model_itself(runs, capsys):
    before = state(runs / "ae")
    args = ["pack", "--model", str(runs / "ae"), "--out", str(runs / "ae" / "model"), "--overwrite", "--measures.size", "16"]
    assert cli.main(args) == 2
    assert "the folder of the model itself, expected another" in capsys.readouterr().err and state(runs / "ae") == before


def test_a_model_without_conditions_says_how_many_pictures_to_ask_for():
    from ldm_edu.asking import Asked, gather_prompts
    from ldm_edu.conditioning import NoCondition

    assert gather_prompts(NoCondition(), Asked()) == []
    with pytest.raises(ValueError, match="prompts: got 2, expected none: this model draws what it likes, as many pictures as --n says"):
        gather_prompts(NoCondition(), Asked(texts=["a red circle", "a blue square"]))


def test_a_map_is_read_by_no_program(tmp_path):
    """An EPS file by the name of a picture would be handed to Ghostscript."""
    from ldm_edu.asking import read_map

    Image.new("L", (4, 4)).save(tmp_path / "map.eps")
    (tmp_path / "map.eps").rename(tmp_path / "map.png")
    with pytest.raises(ValueError, match="map.png: not a readable map .cannot identify image file"):
        read_map(tmp_path / "map.png")


def test_rows_of_every_class_are_measured(photos, monkeypatch):
    """Folders come class by class: the first few pictures would all be of the first class."""
    data, _ = cli.DataOptions(str(photos / "shapes"), size=16).open(keys=("label",))
    asked = []

    class Model:
        first_stage, net = None, SimpleNamespace(conditioner=SimpleNamespace(keys=("label",)))

        def sample(self, batch, **options):
            asked.append(batch["label"])

    cli.draw_like(Model(), data, 6, 1, 0)
    assert len(set(map(int, asked[0]))) >= 4 and len(asked[0]) == 6
    cli.draw_like(Model(), data, 50, 1, 0)
    assert list(map(int, asked[1])) == [int(data[i % len(data)]["label"]) for i in range(50)]
    monkeypatch.setattr(cli, "evaluate_samples", lambda evaluator, images, reference, part, cache, seed: {"seen": part})
    seen = cli.Evaluate(samples=4, training=6).compare(Model(), data, Part(data, range(9)))["seen"]
    assert len({int(seen[i]["label"]) for i in range(len(seen))}) >= 4 and len(seen) == 6, "copies are looked for among all classes"


def test_a_log_of_another_program_is_not_written_over(tmp_path):
    from ldm_edu.runs import RunLog, check_folder

    (tmp_path / "log.jsonl").write_text('{"time": 3}\n')
    with pytest.raises(ValueError, match="holds a log.jsonl but no run.json: it is another program's"):
        check_folder(tmp_path, {"config": {}}, True)
    RunLog(tmp_path, 4).write(5, {"loss": 1.0})
    RunLog(tmp_path, 4)
    assert (tmp_path / "log.jsonl").read_text() == '{"time": 3}\n', "a line without a step stays, one of a later step goes"


def test_advice_for_little_memory_can_be_followed():
    """Another precision or batch is another run, which this folder refuses; another accumulation is not."""
    from ldm_edu.runs import OutOfMemory, explain_out_of_memory

    small, words = SimpleNamespace(accumulation=2), "Raise accumulation from 2 to 4 .*the run resumes.* Or start again in another folder, with precision='bf16'"
    with pytest.raises(OutOfMemory, match=words), explain_out_of_memory(small, 3, 64, torch.device("cpu")):
        raise torch.OutOfMemoryError("no room")


def test_a_folder_with_another_run_is_refused(runs, capsys):
    before = state(runs / "ae")
    assert cli.main(["train-autoencoder", "--items", "32", "--steps", "3", "--lr", "0.5", "--out", str(runs / "ae"), *TINY]) == 2
    assert "lr" in capsys.readouterr().err and state(runs / "ae") == before


def test_unknown_options_exit_with_2():
    with pytest.raises(SystemExit) as stop:
        cli.main(["sample", "--stepz", "3"])
    assert stop.value.code == 2


def test_help_documents_every_option():
    for command in ("demo", "train-autoencoder", "train", "sample", "evaluate", "doctor"):
        done = subprocess.run([sys.executable, "-c", "from ldm_edu.cli import main; main()", command, "--help"], capture_output=True, text=True,
                              env={**os.environ, "COLUMNS": "100"})
        assert done.returncode == 0 and "--seed" in done.stdout + "--seed"
        assert done.stdout.count("(default") >= 4


def test_class_model_of_real_pictures_survives_kill_9(cifar_folder, tmp_path):
    """Killed three times at random moments and restarted, the run ends with the weights of an undisturbed one."""
    stage = tmp_path / "ae"
    base = [sys.executable, "-c", "import sys; from ldm_edu.cli import main; sys.exit(main())"]
    data = ["--data", str(cifar_folder), "--size", "16"]
    ae = [*base, "train-autoencoder", *data, "--steps", "4", "--precision", "fp32", "--out", str(stage), "--model.model-channels", "8", "--model.num-groups", "4"]
    subprocess.run(ae, check=True, capture_output=True)
    train = [*base, "train", *data, "--first-stage", str(stage), "--recipe", "class-tiny", "--steps", "24", "--batch-size", "8",
             "--save-every", "3", "--precision", "fp32"]
    subprocess.run([*train, "--out", str(tmp_path / "whole")], check=True, capture_output=True)
    seconds, kills = random.Random(0), 0
    while kills < 3:
        process = subprocess.Popen([*train, "--out", str(tmp_path / "killed")], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        start = sorted((tmp_path / "killed" / "checkpoints").glob("step-*"))
        while process.poll() is None and sorted((tmp_path / "killed" / "checkpoints").glob("step-*")) == start:
            time.sleep(0.05)
        time.sleep(seconds.uniform(0, 1.0))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += 1
    subprocess.run([*train, "--out", str(tmp_path / "killed")], check=True, capture_output=True)
    assert state(tmp_path / "killed") == state(tmp_path / "whole")
    model = load(tmp_path / "whole")
    assert model.net.conditioner.config.class_names[0] == "airplane"
    assert model.sample(["cat", "dog"], steps=2).shape == (2, 3, 16, 16)


def test_broken_files_are_named_before_training(tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:60])
    args = ["train-autoencoder", "--data", str(folder), "--steps", "2", "--out", str(tmp_path / "out"), *TINY]
    assert cli.main(args) == 2 and "broken.png" in capsys.readouterr().err and not (tmp_path / "out" / "model").exists()
    with pytest.warns(UserWarning, match="broken.png"):
        assert cli.main([*args, "--on-error", "skip"]) == 0


def test_recipes_are_consistent():
    for name, recipe in recipes.DIFFUSIONS.items():
        assert recipe.unet in UNETS, name
        assert recipes.DiffusionRecipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert isinstance(recipes.DIFFUSIONS["text-tiny"].schedule, ScheduleConfig)
    with pytest.raises(ValueError, match="kl-f4-tiny"):
        recipes.train_autoencoder(Scenes(16, n=4), "kl-f4-tny", "nowhere")


def test_demo_makes_its_report(tmp_path, monkeypatch, capsys):
    """The whole demo with a few steps: every part of the report is there, with pictures inside the page."""
    from ldm_edu import demo

    (tmp_path / "file").write_text("")
    assert cli.main(["demo", "--out", str(tmp_path / "file")]) == 2 and "file is a file, expected a folder" in capsys.readouterr().err
    monkeypatch.setattr(demo, "pretrained_names", list)
    options = ["--scenes", "64", "--prompts", "2", "--first-stage-steps", "2", "--diffusion-steps", "2"]
    assert cli.main(["demo", "--out", str(tmp_path / "demo"), *options]) == 0
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert set(report) >= {"machine", "seconds", "accuracy", "reconstruction", "settings"}
    page = (tmp_path / "demo" / "report.html").read_text()
    assert page.count("data:image/png;base64") == 5 and "http" not in page
    assert "Try next" in capsys.readouterr().out


def test_relations_sets_the_share_of_related_pairs():
    make = lambda split, n: Scenes(16, n=n, split=split, objects=(1, 2), fields=("image", "caption"))
    for share in (0.0, 0.5, 0.8):
        part = cli.with_relations(make, 100, share)
        captions = [part[i]["caption"] for i in range(100)]
        assert sum(parse_caption(c).relation is not None for c in captions) == round(100 * share) and len(set(part.indices)) == 100
    assert cli.with_relations(make, 100, 0.5).fingerprint() == cli.with_relations(make, 100, 0.5).fingerprint()
    with pytest.raises(ValueError, match="got 1.5"):
        cli.with_relations(make, 100, 1.5)
    singles = lambda split, n: Scenes(16, n=n, split=split, objects=(1, 1), fields=("image", "caption"))
    with pytest.raises(ValueError, match="got 0 scenes with a relation"):
        cli.with_relations(singles, 100, 0.5)


def test_train_goes_on_from_a_model(runs, tmp_path):
    args = ["train", "--first-stage", str(runs / "ae"), "--items", "32", "--steps", "2", "--batch-size", "4", "--size", "16", "--relations", "0.5",
            "--recipe", "text-relations", "--reading-steps", "1", "--start-from", str(runs / "text"), "--out", str(tmp_path / "more")]
    assert cli.main(args) == 0
    card = load(tmp_path / "more").card
    assert card["started_from"]["steps"] == 3 and card["reading_steps"] == 1 and "of Scenes, 160 items" in card["data"]


def test_the_small_networks_are_trained_by_the_command_line(tmp_path, capsys):
    short = ["--steps", "2", "--batch-size", "4"]
    assert cli.main(["train-features", *short, "--out", str(tmp_path / "features")]) == 0
    assert json.loads((tmp_path / "features" / "card.json").read_text())["measured"]["scenes"] == 2048
    pictures = Scenes(32, n=40, fields=("image",)).render(range(40))["image"]
    for i, picture in enumerate(pictures):
        folder = tmp_path / "photos" / ("cat" if i % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(((picture.permute(1, 2, 0) + 1) * 127.5).byte().numpy()).save(folder / f"{i}.png")
    request = ["train-perceptual", *short, "--data", str(tmp_path / "photos"), "--rank-pictures", "4", "--rank-steps", "2", "--out", str(tmp_path / "eye")]
    assert cli.main(request) == 0
    card = json.loads((tmp_path / "eye" / "card.json").read_text())
    assert set(card["measured"]) == {"perceptual", "unit weights", "l2"} and card["pictures"] and card["commit"]
    distance = load_perceptual(tmp_path / "eye")
    assert (distance(pictures[:2], pictures[2:4]) > 0).all() and distance(pictures[:2], pictures[:2]).abs().max() < 1e-6
    assert cli.main(request) == 2 and "holds a model already" in capsys.readouterr().err
    assert cli.main(["train-autoencoder", "--items", "16", "--steps", "2", "--out", str(tmp_path / "stage"), "--loss.disc-weight", "0.5",
                     "--loss.disc-layers", "1", "--loss.disc-channels", "8", *TINY]) == 0
    assert load_first_stage(tmp_path / "stage").card["steps"] == 2


def test_a_first_stage_says_what_it_needs_and_what_it_said_is_what_is_trained(tmp_path, capsys):
    for name, more in {"kl": [], "vq": ["--recipe", "vq-f4-tiny", "--model.codes", "16", "--loss.disc-weight", "0.5", "--loss.disc-layers", "1", "--loss.disc-channels", "8",
                                        "--loss.disc-start", "2", "--loss.perceptual-weight", "1.0"]}.items():
        args = ["train-autoencoder", *more, "--items", "32", "--steps", "3", "--out", str(tmp_path / name), *TINY]
        assert cli.main([*args, "--dry-run"]) == 0 and not (tmp_path / name).exists()
        told = capsys.readouterr().out
        assert all(words in told for words in ("on pictures of 16 pixels", "3 steps", "32 pictures, each seen", "256 kept aside")) and "such devices" not in told
        assert cli.main(args) == 0
        assert f"{sum(p.numel() for p in load_first_stage(tmp_path / name).parameters()):,} parameters in the first stage" in told
        trained = load_file(tmp_path / name / "checkpoints" / "step-00000003" / "model.safetensors")
        critic = sum(value.numel() for key, value in trained.items() if key.startswith("discriminator."))
        assert (f"{critic:,} in its critic" in told) == (critic > 0) == ("perceptual network" in told) == (" from step 2 on" in told) == (name == "vq"), told
        capsys.readouterr()
    args = ["train-autoencoder", "--dry-run", "--items", "32", *TINY]
    assert cli.main([*args, "--processes", "4"]) == 0 and "on 4 such devices, sharding none" in capsys.readouterr().out
    assert cli.main([*args, "--processes", "4", "--sharding", "full"]) == 0 and "sharding full" in capsys.readouterr().out
    assert cli.main([*args, "--processes", "0"]) == 2 and "processes: got 0" in capsys.readouterr().err
    assert cli.main([*args, "--sharding", "full", "--recipe", "vq-f4-tiny"]) == 2 and "a first stage with a codebook" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train-autoencoder", "train"])
def test_a_dry_run_looks_at_the_place_too_and_leaves_nothing(command, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main([command, "--dry-run", "--items", "32", "--out", str(tmp_path / "file" / "run")]) == 2
    assert "is a file, expected a folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
