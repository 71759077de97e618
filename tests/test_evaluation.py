"""From pictures to a table: the feature network, the one way in, provenance, caches, and what `ldm-edu evaluate` makes of them."""
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.testing import assert_close
from torchvision.transforms import functional as TF

from ldm_edu import cli, evaluation
from ldm_edu.core import read_json
from ldm_edu.data import Scenes
from ldm_edu.drawing import paint
from ldm_edu.evaluation import (
    Evaluator,
    FeatureSet,
    cached_features,
    compare,
    evaluate_samples,
    evaluation_table,
    find_weights,
    image_batches,
    inception_extractor,
    standard_lpips,
)
from ldm_edu.features import (
    Extractor,
    FeatureConfig,
    FeatureTraining,
    SceneFeatures,
    features_loss,
    load_features,
    measure_features,
    preprocess,
    save_features,
    scene_targets,
    scenes_extractor,
    train_features,
)
from ldm_edu.metrics import FeatureStatistics, fid, load_statistics, memorisation

N = 256


@pytest.fixture(scope="module")
def network():
    """The shipped feature network."""
    return load_features()


@pytest.fixture(scope="module")
def evaluator(network):
    """An evaluator around it."""
    return Evaluator(scenes_extractor(network))


@pytest.fixture(scope="module")
def reference(evaluator):
    """Features of unseen scenes."""
    return evaluator.features(Scenes(32, n=1024, split="validation", seed=5, fields=("image",)), "reference")


@pytest.fixture(scope="module")
def scenes():
    """Other unseen scenes."""
    return Scenes(32, n=N, split="validation", seed=6, fields=("image",))


@pytest.fixture(scope="module")
def x(scenes):
    """Their pictures."""
    return scenes.render(range(N))["image"]


def mean_extractor(size=8, mark="1", name="means"):
    """Features that need no network: 3 x 2 x 2 averages."""
    return Extractor(name, mark, size, lambda v: F.adaptive_avg_pool2d(v, 2).flatten(1))


# ------------------------------------------------------------------------------------------ the way in
def test_preprocess_crops_the_centre_and_antialiases():
    x = torch.rand(2, 3, 20, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(preprocess(x, 20), x[..., 6:26])
    assert torch.equal(preprocess(x.transpose(2, 3), 20), x.transpose(2, 3)[:, :, 6:26])
    stripes = torch.ones(1, 3, 64, 64)
    stripes[..., ::2] = -1
    assert preprocess(stripes, 8)[..., 1:-1].abs().max() < 0.1, "one-pixel stripes average out"
    expected = TF.resize(x[..., 6:26], [10, 10], antialias=True)
    assert_close(preprocess(x, 10), expected.clamp(-1, 1), atol=1e-6, rtol=0)
    for dtype in (torch.float16, torch.float64):
        assert preprocess(x.to(dtype), 10).dtype == torch.float32


@pytest.mark.parametrize("bad, error, message", [
    (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), TypeError, "uint8"),
    (torch.full((2, 3, 16, 16), 200.0), ValueError, "200"),
    (torch.zeros(3, 16, 16), ValueError, "shape"),
    (torch.zeros(2, 1, 16, 16), ValueError, "shape"),
    (torch.full((2, 3, 16, 16), float("nan")), ValueError, "expected"),
    (torch.rand(2, 3, 16, 16), ValueError, r"look like \[0, 1\]"),
    (torch.zeros(0, 3, 16, 16), ValueError, "none"),
    ([torch.zeros(2, 3, 16, 16) - 0.5, torch.zeros(2, 3, 16, 20)], ValueError, "16x16, 16x20"),
    ([], ValueError, "none"),
])
@pytest.mark.parametrize("method", ["features", "statistics"])
def test_evaluator_refuses_what_is_no_set_of_pictures(bad, error, message, method):
    with pytest.raises(error, match=message):
        getattr(Evaluator(mean_extractor()), method)(bad)


def test_range_is_judged_by_the_whole_set_not_by_a_batch():
    bright, dark = torch.full((3, 3, 16, 16), 0.5), torch.full((3, 3, 16, 16), -0.5)
    assert len(Evaluator(mean_extractor(), batch_size=3).features(torch.cat([bright, dark]))) == 6


def test_every_kind_of_source_gives_the_same_features(evaluator, scenes, x):
    whole = evaluator.features(x, "a")
    loader = torch.utils.data.DataLoader(scenes, batch_size=50)
    for source in (scenes, [x[:100], x[100:]], loader, ({"image": part} for part in x.split(7))):
        other = evaluator.features(source, "a")
        assert_close(other.values, whole.values, atol=1e-4, rtol=1e-4)
        assert other.provenance == whole.provenance
    assert [len(b) for b in image_batches(x, 100)] == [100, 100, 56]
    assert whole.provenance["n"] == N and whole.provenance["source"] == "32x32" and whole.values.shape == (N, 128)
    streamed = evaluator.statistics(x, "a")
    assert_close(streamed.covariance, whole.statistics().covariance)
    assert streamed.provenance == whole.provenance


# ------------------------------------------------------------------------------------------ provenance and caches
def test_sets_of_other_origin_are_refused(x):
    base = Evaluator(mean_extractor()).features(x)
    others = [Evaluator(mean_extractor(mark="2")).features(x), Evaluator(mean_extractor(size=16)).features(x),
              Evaluator(mean_extractor(name="other")).features(x), Evaluator(mean_extractor()).features(x[..., 4:28])]
    for other, word in zip(others, ("extractor_hash", "preprocessing", "extractor ", "source"), strict=True):
        with pytest.raises(ValueError, match=word):
            compare(other, base)
        with pytest.raises(ValueError, match=word):
            fid(other.statistics(), base.statistics())
    with pytest.raises(ValueError, match="at least 8"):
        compare(base.take(7), base)


def test_cache_is_used_only_where_provenance_agrees(tmp_path, scenes):
    calls = []
    counting = Extractor("means", "1", 8, lambda v: calls.append(len(v)) or F.adaptive_avg_pool2d(v, 2).flatten(1))
    first = cached_features(Evaluator(counting), scenes, tmp_path)
    assert sum(calls) == N
    again = cached_features(Evaluator(counting), scenes, tmp_path)
    assert sum(calls) == N and torch.equal(first.values, again.values) and again.provenance == first.provenance
    for other in (Extractor("means", "2", 8, counting.function), Extractor("means", "1", 16, counting.function)):
        before = sum(calls)
        assert cached_features(Evaluator(other), scenes, tmp_path).provenance != first.provenance and sum(calls) == before + N
    before = sum(calls)
    assert len(cached_features(Evaluator(counting), Scenes(32, n=9, split="validation", fields=("image",)), tmp_path)) == 9
    assert sum(calls) == before + 9
    assert len(cached_features(Evaluator(counting), scenes, None)) == N and sum(calls) == before + 9 + N
    statistics = [load_statistics(p) for p in tmp_path.glob("*.statistics.safetensors")]
    assert len(statistics) == 4 and any(s.provenance == first.provenance and s.n == N for s in statistics)


def test_a_cached_file_that_is_not_what_its_name_says_is_refused(tmp_path, scenes):
    evaluator = Evaluator(mean_extractor())
    first = cached_features(evaluator, scenes, tmp_path)
    path = next(tmp_path.glob("*.features.safetensors"))
    FeatureSet(first.values, {**first.provenance, "data": "others"}).save(path, overwrite=True)
    with pytest.raises(ValueError, match="others"):
        cached_features(evaluator, scenes, tmp_path)
    FeatureSet(first.values[:5], first.provenance).save(path, overwrite=True)
    with pytest.raises(ValueError, match="delete the file"):
        cached_features(evaluator, scenes, tmp_path)
    path.write_bytes(b"half a file")
    with pytest.raises(ValueError, match="another kind"):
        cached_features(evaluator, scenes, tmp_path)


# ------------------------------------------------------------------------------------------ the feature network
def test_targets_are_the_truth():
    scenes = Scenes(32, n=60, fields=("image",))
    truth = scene_targets(scenes.layout(range(60)), 8)
    for i in range(60):
        for o in scenes.facts(i):
            row, column = int(o.y * 8), int(o.x * 8)
            assert abs((column + truth["offset"][i, 0, row, column]) / 8 - o.x) < 1e-6
            assert abs((row + truth["offset"][i, 1, row, column]) / 8 - o.y) < 1e-6
            assert truth["shape"][i, row, column] == ("circle", "square", "triangle", "star", "ring", "cross").index(o.shape)
            assert truth["size"][i, row, column] == ("small", "medium", "large").index(o.size)
        assert truth["count"][i] + 1 == len(scenes.facts(i)) == (truth["shape"][i] >= 0).sum() == truth["pairs"][i].sum()


def test_training_is_deterministic_and_leaves_the_global_state_alone():
    state = torch.get_rng_state()
    options = FeatureTraining(steps=3, batch_size=4)
    small = FeatureConfig((4, 4, 8, 8))
    a, b = train_features(small, options)[0], train_features(small, options)[0]
    assert torch.equal(torch.get_rng_state(), state)
    for p, q in zip(a.state_dict().values(), b.state_dict().values()):
        assert torch.equal(p, q)
    other = train_features(small, options.replace(seed=1))[0]
    assert not torch.equal(a.cell_head.weight, other.cell_head.weight) and not a.training


def test_loss_reaches_every_parameter_and_falls():
    model, losses = SceneFeatures(FeatureConfig((4, 4, 8, 8))).train(), []
    scenes = Scenes(32, n=8, fields=("image",))
    features_loss(model.answer(scenes.render(range(8))["image"]), scene_targets(scenes.layout(range(8)), 8)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    train_features(FeatureConfig((8, 8, 16, 16)), FeatureTraining(steps=60, batch_size=16, lr=1e-2), lambda step, loss: losses.append(loss))
    assert len(losses) == 60 and np.mean(losses[-5:]) < 0.8 * np.mean(losses[:3])


@pytest.mark.parametrize("bad", [{"widths": (1, 2, 3)}, {"widths": (0, 2, 3, 4)}, {"size": 30}, {"size": 12}])
def test_config_refuses_what_cannot_be_built(bad):
    with pytest.raises(ValueError, match="expected"):
        FeatureConfig(**bad)


@pytest.mark.parametrize("bad", [{"steps": 0}, {"batch_size": 1}, {"lr": 0.0}, {"weight_decay": -1.0}])
def test_training_refuses_what_cannot_run(bad):
    with pytest.raises(ValueError, match="expected"):
        FeatureTraining(**bad)


@pytest.mark.parametrize("steps", [1, 9, 10])
def test_the_shortest_trainings_run(steps):
    assert train_features(FeatureConfig((2, 2, 2, 2)), FeatureTraining(steps=steps, batch_size=2))[1]["train"]["steps"] == steps


def test_shipped_network_is_small_and_reads_unseen_scenes(network, root):
    folder = root / "data" / "pretrained" / "scenes-features"
    assert (folder / "model.safetensors").stat().st_size <= 1_000_000 and (folder / "README.md").exists()
    measured = measure_features(network, Scenes(32, n=512, split="validation", seed=3, fields=("image",)))
    assert min(measured[k] for k in ("count", "shape", "colour", "size")) >= 0.985 and measured["pixels_off"] < 0.5
    assert {"data", "train", "minutes", "measured", "commit", "hardware"} <= set(network.card)


def test_saved_network_comes_back_and_damage_is_named(tmp_path):
    model = SceneFeatures(FeatureConfig((4, 4, 8, 8))).eval()
    save_features(model, tmp_path / "a", {"x": 1})
    back = load_features(tmp_path / "a")
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    assert_close(back(x), model(x), atol=5e-3, rtol=5e-3)
    assert back.card == {"x": 1} and scenes_extractor(back).mark == scenes_extractor(load_features(tmp_path / "a")).mark != scenes_extractor(model).mark
    with pytest.raises(ValueError, match="holds a model already"):
        save_features(model, tmp_path / "a", {})
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_features(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="another kind"):
        load_features(Path(__file__).parent.parent / "data" / "pretrained" / "scenes-kl-f4")
    config = read_json(tmp_path / "a" / "config.json")
    (tmp_path / "a" / "config.json").write_text(json.dumps({**config, "widths": [4, 4, 8, 16]}))
    with pytest.raises(ValueError, match="not the weights"):
        load_features(tmp_path / "a")
    (tmp_path / "a" / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="not the weights"):
        load_features(tmp_path / "a")


def test_classify_gives_probabilities_of_the_surest_object(network):
    singles = Scenes(32, n=64, objects=(1, 1), split="validation", fields=("image",))
    layout = singles.layout(range(64))
    with torch.no_grad():
        p = network.classify(singles.render(range(64))["image"])
    assert p.shape == (64, 48) and torch.allclose(p.sum(1), torch.ones(64), atol=1e-5)
    assert (p.argmax(1).numpy() == layout.shape[:, 0] * 8 + layout.colour[:, 0]).mean() > 0.95


@pytest.mark.parametrize("fault", ["blur", "noise", "hue", "shuffle", "missing"])
def test_fid_grows_with_every_fault(evaluator, reference, scenes, x, fault):
    """What the shipped features are for."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))

    def shuffle(share):
        patches = F.unfold(x, 8, stride=8).clone()
        for i, picture in enumerate(patches):
            chosen = torch.randperm(16, generator=torch.Generator().manual_seed(i))[: round(16 * share)]
            picture[:, chosen] = picture[:, chosen.roll(1)]
        return F.fold(patches, 32, 8, stride=8)

    def missing(share):
        layout, rows = scenes.layout(range(N)), np.arange(N)
        fewer = (np.random.default_rng(0).random(N) < share) & (layout.count > 1)  # no scene is empty
        return torch.from_numpy(paint(layout._replace(count=layout.count - fewer), scenes.key, rows, 32, 32)[0])

    ways = {"blur": (lambda s: TF.gaussian_blur(x, 9, s), (0.4, 0.6, 0.9, 1.3)), "noise": (lambda s: (x + s * noise).clamp(-1, 1), (0.05, 0.1, 0.2, 0.4)),
            "hue": (lambda s: 2 * TF.adjust_hue((x + 1) / 2, s) - 1, (0.015, 0.03, 0.05, 0.075)), "shuffle": (shuffle, (0.125, 0.25, 0.5, 1.0)),
            "missing": (missing, (0.25, 0.5, 0.75, 1.0))}
    make, levels = ways[fault]
    scores = [fid(evaluator.statistics(v.clamp(-1, 1)), reference.statistics()) for v in (x, *(make(s) for s in levels))]
    assert all(a < b for a, b in zip(scores, scores[1:])), scores


# ------------------------------------------------------------------------------------------ the numbers together
def test_compare_gives_every_number_with_n_and_interval(evaluator, reference, x):
    out = compare(evaluator.features(x), reference)
    assert out["n"] == N and out["references"] == 1024
    assert out["fid"]["low"] <= out["fid"]["value"] <= out["fid"]["high"]
    for name in ("precision", "recall", "coverage"):
        assert out[name]["low"] <= out[name]["value"] <= out[name]["high"] and out[name]["value"] > 0.5
    assert out["fid"]["value"] == pytest.approx(fid(evaluator.statistics(x), reference.statistics()), rel=1e-6)
    assert out == compare(evaluator.features(x), reference) and out != compare(evaluator.features(x), reference, seed=1)
    assert json.loads(json.dumps(out, allow_nan=False)) == out


def test_evaluate_samples_catches_a_memoriser(evaluator, x, scenes, tmp_path):
    training = Scenes(32, n=400, fields=("image",))
    unseen = Scenes(32, n=400, split="validation", seed=9, fields=("image",))
    honest = evaluate_samples(evaluator, x, unseen, training, tmp_path)
    copies = evaluate_samples(evaluator, training.render(range(N))["image"], unseen, training, tmp_path)
    assert copies["samples"]["fid"]["value"] < 1.2 * honest["samples"]["fid"]["value"]
    assert copies["memorisation"]["share"] == 1 and copies["memorisation"]["ratio"] < 0.01
    assert honest["memorisation"]["share"] < 0.06 and 0.8 < honest["memorisation"]["ratio"] < 1.25
    assert honest["floor"]["n"] == N and honest["features"]["extractor"] == "scenes-features"
    same = evaluate_samples(evaluator, x, unseen, unseen)
    assert "memorisation" not in same and "floor" not in same


def test_the_floor_is_measured_on_every_class_of_a_folder():
    """Rows that lie class by class, as an `ImageFolder` reads them: the first rows would be one class, and real pictures look wrong."""
    shades, noise = torch.linspace(-0.9, 0.9, 4).repeat_interleave(60), torch.Generator().manual_seed(0)
    pictures = (shades[:, None, None, None] + 0.05 * torch.randn(240, 3, 8, 8, generator=noise)).clamp(-1, 1)

    class Sorted:
        def __init__(self, rows):
            self.rows = rows

        def __len__(self):
            return len(self.rows)

        def __getitem__(self, i):
            return {"image": self.rows[i]}

        def fingerprint(self):
            return f"{len(self.rows)} rows from {self.rows[0].mean():.6f}"

    training, unseen = Sorted(pictures[::2]), Sorted(pictures[1::2])
    means = Evaluator(mean_extractor())
    out = evaluate_samples(means, unseen.rows[::3], unseen, training)
    first = compare(means.features(training.rows).take(40), means.features(unseen.rows))
    assert out["floor"]["fid"]["value"] < 0.05 < first["fid"]["value"] and out["floor"]["recall"]["value"] > 0.8
    assert first["recall"]["value"] < 0.5
    assert out["floor"]["n"] == 40


def test_scenes_are_in_no_order_so_the_floor_keeps_its_rows(evaluator, x, scenes):
    training, unseen = Scenes(32, n=300, fields=("image",)), Scenes(32, n=64, split="validation", seed=9, fields=("image",))
    floor = evaluate_samples(evaluator, x, unseen, training)["floor"]
    assert floor == compare(evaluator.features(training).take(N), evaluator.features(unseen)), "shipped cards were measured on the first rows"


def test_rows_are_taken_by_number_or_by_place():
    whole = FeatureSet(torch.arange(6.0)[:, None], {"n": 6})
    assert whole.take(2).values[:, 0].tolist() == [0, 1] and whole.take(9).provenance["n"] == 6
    assert whole.take([5, 2, 0]).values[:, 0].tolist() == [5, 2, 0] and whole.take([5, 2, 0]).provenance["n"] == 3


def test_memorisation_in_pixels_finds_exact_copies():
    train, held = (Scenes(32, n=200, split=s, fields=("image",)).render(range(200))["image"].flatten(1) for s in ("train", "validation"))
    assert memorisation(train[:50], train, held).share == 1.0


def test_table_holds_every_number():
    interval = {"value": 0.5, "low": 0.4, "high": 0.6}
    numbers = {"n": 9, "references": 9, "fid": interval, "fid_infinite": 1.25, "kid": {"value": 0.01, "error": 0.002, "subset_size": 4}, "precision": interval,
               "recall": interval, "coverage": interval, "density": {"value": 0.9}}
    grade = {"n": 4, "correct": 3, "rate": 0.75, "low": 0.3, "high": 0.95}
    results = {"reconstruction": {"n": 7, "psnr": 31.5, "psnr_interval": [31.0, 32.0], "ssim": 0.95, "lpips": 0.01},
               "held_out": {"n": 4, "pair": grade, "size": None},
               "distribution": {"samples": numbers, "floor": {**numbers, "fid": {**interval, "value": 0.125}},
                                "memorisation": {"ratio": 0.98, "share": 0.012, "threshold": 1.0, "quantile": 0.01, "low": 0.0, "high": 0.1}}}
    text = evaluation_table(results)
    for part in ("| reconstruction, PSNR (dB) | 31.5 | 31 to 32 | 7 |", "| grader, held out: pair | 0.750 | 0.3 to 0.95 | 4 |", "| FID | 0.5 | 0.4 to 0.6 | 9 | 0.125 |",
                 "infinite N | 1.25 |", "sd 0.002 (subsets of 4)", "| 0.980 |", "| 0.012 | 0 to 0.1 |"):
        assert part in text, part
    assert len({line.count("|") for line in text.strip().splitlines()}) == 1, "all rows are as wide"
    assert evaluation_table({"reconstruction": {"n": 1, "psnr": 3.0}}).count("\n") == 3


# ------------------------------------------------------------------------------------------ networks of others
def test_missing_weights_are_named_and_never_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    for call, file in ((inception_extractor, "weights-inception-2015-12-05-6726825d.pth"), (lambda: find_weights("vgg"), "vgg16-397923af.pth"),
                       (lambda: standard_lpips(torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 64, 64)), "alexnet-owt-7be5be79.pth")):
        with pytest.raises(FileNotFoundError, match=f"{file}.*https"):
            call()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "alexnet-owt-7be5be79.pth").write_bytes(b"something else")
    with pytest.raises(ValueError, match="SHA-256"):
        find_weights("alex")
    with pytest.raises(ValueError, match="inceptoin.*did you mean 'inception'"):
        find_weights("inceptoin")


def test_inception_runs_on_bytes_of_299_pixels_when_its_file_is_there(tmp_path, monkeypatch):
    """With a file of random weights under a name that fits its hash: the wiring, without the download."""
    from torch_fidelity import feature_extractor_inceptionv3 as theirs

    monkeypatch.setattr(theirs, "load_state_dict_from_url", lambda *a, **k: pytest.fail("a download"))
    seen = {}

    def build(name, features, feature_extractor_weights_path):
        seen.update(name=name, features=features, path=feature_extractor_weights_path)
        return torch.nn.Identity()

    path = tmp_path / "weights.pth"
    path.write_bytes(b"weights")
    mark = hashlib.sha256(b"weights").hexdigest()
    monkeypatch.setitem(evaluation.WEIGHT_FILES, "inception", (f"w-{mark[:8]}.pth", "https://"))
    monkeypatch.setattr(theirs, "FeatureExtractorInceptionV3", build)
    extractor = inception_extractor(path)
    given = torch.tensor([-1.0, 0.0, 1.0])[None, :, None, None].expand(2, 3, 40, 40)
    out = extractor(given)  # Identity returns the bytes; [0] picks the first picture of them
    assert out.shape == (3, 299, 299) and [out[c, 9, 9].item() for c in range(3)] == [0, 128, 255]
    assert extractor.mark == mark and seen["features"] == ["2048"] and extractor.size == 299


# ------------------------------------------------------------------------------------------ the command
@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """A tiny first stage, trained by the command line."""
    out = tmp_path_factory.mktemp("stage") / "ae"
    assert cli.main(["train-autoencoder", "--items", "32", "--steps", "2", "--sample-every", "3", "--out", str(out), "--model.model-channels", "8",
                     "--model.num-groups", "4", "--batch-size", "4", "--size", "16"]) == 0
    return out


def test_evaluate_writes_json_table_and_cache_and_never_over_others(stage, tmp_path, capsys):
    args = ["evaluate", "--model", str(stage), "--size", "16", "--samples", "16", "--references", "24", "--training", "32", "--items", "64",
            "--out", str(tmp_path / "e.json"), "--cache", str(tmp_path / "cache")]
    assert cli.main(args) == 0
    shown = capsys.readouterr()
    results = json.loads((tmp_path / "e.json").read_text())
    assert json.loads(shown.out) == {k: v for k, v in results.items() if k != "model"} and "| FID |" in shown.err
    table = (tmp_path / "e.md").read_text()
    assert "| FID |" in table and "| precision |" in table and "memorisation" in table and "PSNR" in table
    d = results["distribution"]
    assert d["samples"]["n"] == 16 and d["samples"]["references"] == 24 and d["training"]["n"] == 32 and set(d) >= {"floor", "memorisation", "features"}
    assert results["reconstruction"]["lpips"] > 0 and len(list((tmp_path / "cache").glob("*.safetensors"))) == 4
    assert cli.main(args) == 2 and "exists already" in capsys.readouterr().err
    (tmp_path / "e.json").unlink()
    assert cli.main(args) == 2 and "e.md exists already" in capsys.readouterr().err
    assert (tmp_path / "e.md").read_text() == table
    assert cli.main([*args, "--overwrite"]) == 0 and json.loads((tmp_path / "e.json").read_text()) == results
    assert cli.main([*args[:-4], "--out", str(tmp_path / "e.md")]) == 2 and "ending .md" in capsys.readouterr().err


def test_evaluate_against_a_folder(stage, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for i in range(120):
        Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(tmp_path / f"{i:03d}.png")
    args = ["evaluate", "--model", str(stage), "--data", str(tmp_path), "--size", "16", "--samples", "12", "--cache", str(tmp_path.parent / "cache")]
    assert cli.main(args) == 0
    d = json.loads(capsys.readouterr().out)["distribution"]
    assert d["samples"]["n"] == 12 and d["samples"]["references"] == 12 and d["training"]["n"] == 108 and d["features"]["source"] == "16x16"
    for path in sorted(tmp_path.glob("*.png"))[30:]:
        path.unlink()
    assert cli.main(args) == 0
    results = json.loads(capsys.readouterr().out)
    assert "distribution" not in results and "3 unseen pictures" in results["left_out"] and results["reconstruction"]["n"] == 3


def test_evaluate_of_another_size_is_refused(stage, tmp_path, capsys):
    assert cli.main(["train", "--first-stage", str(stage), "--items", "16", "--steps", "1", "--batch-size", "4", "--size", "16", "--sample-every", "3",
                     "--out", str(tmp_path / "text")]) == 0
    base = ["evaluate", "--model", str(tmp_path / "text"), "--prompts", "1", "--steps", "1", "--cache", str(tmp_path / "cache"), "--items", "64"]
    assert cli.main([*base, "--samples", "8", "--size", "32"]) == 2 and "--size 16" in capsys.readouterr().err
    assert cli.main([*base, "--samples", "8", "--references", "16", "--training", "16", "--size", "16"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["distribution"]["samples"]["n"] == 8 and results["single"]["n"] == 1
    assert cli.main([*base, "--samples", "0", "--size", "16"]) == 0 and "distribution" not in json.loads(capsys.readouterr().out)


def test_train_features_writes_a_network_with_its_card(tmp_path, capsys):
    args = ["train-features", "--steps", "2", "--batch-size", "4", "--out", str(tmp_path / "f")]
    assert cli.main(args) == 0
    model = load_features(tmp_path / "f")
    assert model.card["train"]["steps"] == 2 and model.card["measured"]["scenes"] == 2048 and model.card["commit"]
    assert cli.main(args) == 2 and "holds a model already" in capsys.readouterr().err
    statistics = FeatureStatistics(scenes_extractor(model)(torch.rand(4, 3, 32, 32) * 2 - 1))
    assert statistics.n == 4
