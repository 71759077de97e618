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

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_edu import cli, recipes
from ldm_edu.captions import parse_caption
from ldm_edu.data import Scenes
from ldm_edu.ldm import load, load_first_stage
from ldm_edu.perceptual import load_perceptual
from ldm_edu.schedule import ScheduleConfig
from ldm_edu.unet import UNETS

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
    assert cli.main(args) == 2 and "holds samples already" in capsys.readouterr().err
    assert cli.main([*args, "--overwrite", "--seed", "3"]) == 0 and (out / "sheet.png").read_bytes() != before
    assert cli.main([*args, "--overwrite", "--guidance-scale", "3", "--guidance-rescale", "0.7", "--guidance-interval", "100", "900"]) == 0
    assert json.loads((out / "samples.json").read_text())["guidance_interval"] == [100, 900]
    exact = np.asarray(Image.open(out / "0000.png"), dtype=float)
    assert cli.main([*args, "--overwrite", "--precision", "bf16", "--guidance-scale", "3", "--guidance-rescale", "0.7", "--guidance-interval", "100", "900"]) == 0
    assert json.loads((out / "samples.json").read_text())["precision"] == "bf16" and 0 < np.abs(np.asarray(Image.open(out / "0000.png")) - exact).mean() < 10
    assert cli.main([*args, "--overwrite", "--precision", "int8"]) == 2 and "precision" in capsys.readouterr().err


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
    (["train-autoencoder", "--size", "18", "--items", "4", "--out", "OUT"], "18"),
])
def test_bad_requests_exit_with_2_and_a_sentence(runs, capsys, tmp_path, args, message):
    import re

    places = {"TEXT": str(runs / "text"), "AE": str(runs / "ae"), "OUT": str(tmp_path / "new")}
    args = [places.get(a, a) for a in args]
    if args[0] == "sample":
        args += ["--out", str(tmp_path / "none")]
    elif "--out" not in args:
        args += ["--out", str(tmp_path / "new")]
    assert cli.main(args) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.rglob("*.safetensors")) and not list(tmp_path.rglob("*.png")) and not list(tmp_path.rglob("*.part"))


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
