"""The networks behind the perceptual distance: VGG16 against torchmetrics, distortions, ranking, training, folders; bug 9."""
import json

import pytest
import torch
from torch.testing import assert_close
from torchmetrics.functional.image import lpips as oracle
from torchvision.models import vgg16

from ldm_edu.core import read_json
from ldm_edu.data import Scenes
from ldm_edu.features import FeatureConfig, load_features
from ldm_edu.losses import PerceptualDistance
from ldm_edu.perceptual import (
    DISTORTIONS,
    GRADES,
    PERCEPTUAL_CONFIG,
    PerceptualTraining,
    VGGPyramid,
    channel_gaps,
    distort,
    distortion_table,
    load_perceptual,
    measure_perceptual,
    rank_weights,
    ranked_pairs,
    ranking_accuracy,
    save_perceptual,
    train_perceptual,
    vgg_perceptual,
)

TINY = FeatureConfig(widths=(4, 6, 8, 8), size=16)
SHORT = PerceptualTraining(steps=3, batch_size=4, rank_pictures=8, rank_steps=20)


def pictures(b=2, side=32, seed=0):
    return torch.rand((b, 3, side, side), generator=torch.Generator().manual_seed(seed)) * 2 - 1


class Labelled:
    """Random pictures in two classes, under the contract of `Pictures`."""

    def __init__(self, n=12, side=16):
        self.size, self.labels, self.class_names = (side, side), [i % 2 for i in range(n)], ["a", "b"]
        self.images = pictures(n, side, seed=3)

    def __len__(self):
        return len(self.labels)

    def __getitems__(self, rows):
        return [{"image": self.images[i], "label": self.labels[i] if self.labels else 0} for i in rows]

    def fingerprint(self):
        return "labelled"


# ---------------------------------------------------------------- VGG16


@pytest.fixture(scope="module")
def lpips_pair():
    """torchmetrics' LPIPS with its bundled heads over a randomly initialised VGG16, and ours from the same numbers."""
    torch.manual_seed(0)
    theirs = oracle._LPIPS(pretrained=True, net="vgg", pnet_rand=True)
    slices = [theirs.net.slice1, theirs.net.slice2, theirs.net.slice3, theirs.net.slice4, theirs.net.slice5]
    state = {f"features.{name}.{k}": v for part in slices for name, layer in part.named_children() for k, v in layer.state_dict().items()}
    heads = {f"lin{i}.model.1.weight": theirs.lins[i].model[1].weight for i in range(5)}
    return theirs, state, heads


@pytest.mark.parametrize("shape", [(2, 32, 32), (1, 48, 64), (1, 16, 16)])
def test_vgg_distance_is_that_of_torchmetrics(lpips_pair, shape):
    theirs, state, heads = lpips_pair
    x, y = (torch.rand((shape[0], 3, *shape[1:]), generator=torch.Generator().manual_seed(s)) * 2 - 1 for s in (0, 1))
    ours = vgg_perceptual(state, heads)
    with torch.no_grad():
        want = theirs(x, y).flatten()
        assert_close(ours(x, y), want, rtol=1e-4, atol=1e-6)
        assert want.min() > 1e-3, "a distance of nothing proves nothing"
        assert not torch.allclose(ours(x / 2, y / 2), want, rtol=0.01), "the comparison does not see the range of its input"


def test_vgg_scales_each_colour_once():
    """A first layer that copies colours shows what it was given: (x - shift) / scale."""
    net, x = VGGPyramid(), pictures(1, 16)
    first = net.features[0]
    with torch.no_grad():
        first.weight.zero_(), first.bias.zero_()
        first.weight[:3, :, 1, 1] = torch.eye(3)
        seen = []
        first.register_forward_hook(lambda module, args, out: seen.append(out[:, :3]))
        net(x)
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    assert_close(seen[0], (x - shift[:, None, None]) / scale[:, None, None])


def test_vgg_has_torchvisions_layers(tmp_path, lpips_pair):
    _, state, heads = lpips_pair
    torch.save(state | {"classifier.0.weight": torch.zeros(1)}, tmp_path / "vgg16.pth")
    torch.save(heads, tmp_path / "heads.pth")
    distance = vgg_perceptual(tmp_path / "vgg16.pth", str(tmp_path / "heads.pth"))
    with torch.device("meta"):
        wanted = {k: v.shape for k, v in vgg16(weights=None).state_dict().items() if k.startswith("features")}
    assert {k: v.shape for k, v in distance.network.state_dict().items()} == wanted and len(wanted) == 26
    assert [len(w) for w in distance.weights] == [64, 128, 256, 512, 512]


def test_vgg_refuses_other_files(tmp_path, lpips_pair):
    _, state, heads = lpips_pair
    with pytest.raises(ValueError, match="vgg_weights"):
        vgg_perceptual({k: v for k, v in state.items() if "28" not in k}, heads)
    with pytest.raises(ValueError, match="lpips_weights"):
        vgg_perceptual(state, {k: v[:, :10] for k, v in heads.items()})
    with pytest.raises(ValueError, match="lpips_weights"):
        vgg_perceptual(state, {})
    with pytest.raises(FileNotFoundError):
        vgg_perceptual(tmp_path / "none.pth", heads)
    with pytest.raises(ValueError, match="at least 16"):
        vgg_perceptual(state, heads)(pictures(1, 8), pictures(1, 8))


# ---------------------------------------------------------------- distortions and ranking


@pytest.mark.parametrize("kind", DISTORTIONS)
def test_distortions_grow_with_their_grade(kind):
    x = Scenes(32, n=32, split="validation").render(range(32))["image"]
    generator = torch.Generator().manual_seed(0)
    spoilt = [distort(x, kind, grade, generator) for grade in range(1, GRADES + 1)]
    errors = [(s - x).square().mean().item() for s in spoilt]
    assert all(s.shape == x.shape and s.abs().max() <= 1 for s in spoilt) and errors == sorted(errors) and errors[0] > 0


def test_distortions_by_their_definitions():
    x = pictures(1, 16)
    assert_close(distort(x, "shift", 2)[..., :-2], x[..., 2:])
    blocks = distort(x, "blocks", 4)
    assert_close(blocks[..., 0, 0], x[..., :4, :4].mean((2, 3)))
    assert_close(distort(x, "contrast", 4).mean(), x.mean())
    flat = torch.full((1, 3, 16, 16), 0.5)
    for kind in ("blur", "shift", "contrast", "blocks"):
        assert_close(distort(flat, kind, 4), flat)
    grain = distort(torch.zeros(8, 3, 32, 32), "noise", 2, torch.Generator().manual_seed(0))
    assert abs(grain.std().item() - 0.12) < 2e-3


def test_distort_refuses():
    x = pictures(1, 16)
    for arguments, match in (((x, "sepia", 1), "kind"), ((x, "blur", 0), "grade"), ((x, "blur", 5), "grade"),
                             ((x[..., :15], "blur", 1), "multiples of 4"), ((x[..., :12, :12], "blur", 1), "from 16")):
        with pytest.raises(ValueError, match=match):
            distort(*arguments)


def test_ranked_pairs_are_counted_and_point_from_weak_to_strong():
    pairs = ranked_pairs()
    kinds = len(DISTORTIONS)
    assert pairs["within"].shape == (kinds * 6, 2) and pairs["across"].shape == (kinds * (kinds - 1) * 3, 2)
    for name, rows in pairs.items():
        grade, kind = rows % GRADES, rows // GRADES
        assert (grade[:, 0] < grade[:, 1]).all() and ((kind[:, 0] == kind[:, 1]) == (name == "within")).all()


def test_ranking_accuracy_of_perfect_wrong_and_kind_blind_measures():
    grades = torch.arange(1.0, GRADES + 1).expand(len(DISTORTIONS), GRADES)[..., None].expand(-1, -1, 3)
    assert ranking_accuracy(grades) == {"within": 1.0, "across": 1.0} and ranking_accuracy(-grades) == {"within": 0.0, "across": 0.0}
    partial = grades + 100 * torch.arange(len(DISTORTIONS))[:, None, None]  # a measure that minds one kind above all
    assert ranking_accuracy(partial) == {"within": 1.0, "across": 0.5}
    with pytest.raises(ValueError, match="table"):
        ranking_accuracy(grades[:, :2])


def test_channel_gaps_times_weights_are_the_distance():
    trunk, x, y = load_features(), pictures(3), pictures(3, seed=1)
    plain = PerceptualDistance(trunk.pyramid)
    gaps = channel_gaps(plain, x, y)
    weights = torch.rand(gaps.shape[1], generator=torch.Generator().manual_seed(0))
    assert_close(gaps.sum(1), plain(x, y))
    assert_close(gaps @ weights, PerceptualDistance(trunk.pyramid, weights.split(trunk.config.widths))(x, y))


def test_rank_weights_find_the_channel_that_ranks():
    """Channel 0 grows with the grade, channel 1 falls, channel 2 is large and says nothing."""
    grades = torch.arange(1.0, GRADES + 1).expand(len(DISTORTIONS), GRADES)[..., None].expand(-1, -1, 16)
    noise = 5 + torch.rand(grades.shape, generator=torch.Generator().manual_seed(0))
    gaps = torch.stack([grades, 5 - grades, noise], dim=-1)
    weights = rank_weights(gaps, 200, 0.05)
    assert (weights > 0).all() and abs(weights.mean().item() - 1) < 1e-5 and weights[0] > 10 * max(weights[1:])
    before, after = (ranking_accuracy(gaps @ w)["across"] for w in (torch.ones(3), weights))
    assert before < 0.8 and after > 0.99
    assert_close(rank_weights(gaps, 0, 0.05), torch.ones(3))


def test_distortion_table_depends_on_its_seed_only():
    x, l2 = pictures(2, 16), lambda a, b: (a - b).square().mean((1, 2, 3))
    table = distortion_table(x, l2, seed=5)
    torch.manual_seed(123)
    assert table.shape == (len(DISTORTIONS), GRADES, 2) and torch.equal(table, distortion_table(x, l2, seed=5))
    assert not torch.equal(table, distortion_table(x, l2, seed=6))


# ---------------------------------------------------------------- training and folders


def test_training_is_deterministic_and_reports(tmp_path):
    losses = []
    distance, facts = train_perceptual(Labelled(), TINY, SHORT, lambda step, loss: losses.append((step, loss)))
    torch.rand(7)
    again, _ = train_perceptual(Labelled(), TINY, SHORT)
    assert [step for step, _ in losses] == [0, 1, 2]
    assert all(torch.equal(a, b) for a, b in zip(distance.state_dict().values(), again.state_dict().values(), strict=True))
    other, _ = train_perceptual(Labelled(), TINY, SHORT.replace(seed=1))
    assert not torch.equal(distance.weights[0], other.weights[0])
    assert facts["train"] == SHORT.to_dict() and facts["pictures"] == "labelled" and json.dumps(facts)
    assert [w.numel() for w in distance.weights] == list(TINY.widths) and min(w.min() for w in distance.weights) >= 0


def test_real_pictures_teach_the_trunk():
    scenes_only, facts = train_perceptual(None, TINY, SHORT)
    with_pictures, _ = train_perceptual(Labelled(), TINY, SHORT)
    assert "pictures" not in facts
    assert not torch.equal(scenes_only.network.stages[0][0][0].weight, with_pictures.network.stages[0][0][0].weight)


def test_a_minute_of_training_ranks_better_than_l2():
    distance, _ = train_perceptual(None, TINY.replace(widths=(8, 16, 24, 24)), SHORT.replace(steps=30, rank_pictures=64, rank_steps=150))
    held_out = Scenes(16, n=64, split="validation").render(range(64))["image"]
    scores = measure_perceptual(distance, held_out)
    assert set(scores) == {"perceptual", "unit weights", "l2"}
    assert scores["perceptual"]["across"] > scores["l2"]["across"] + 0.05
    assert scores["perceptual"]["across"] > scores["unit weights"]["across"]


@pytest.mark.parametrize("pictures_of", [lambda: Labelled(side=32), lambda: _without_labels()])
def test_training_refuses_pictures_without_classes_or_of_another_size(pictures_of):
    with pytest.raises(ValueError, match="pictures"):
        train_perceptual(pictures_of(), TINY, SHORT)


def _without_labels():
    data = Labelled()
    data.labels = None
    return data


@pytest.mark.parametrize("bad", [{"steps": 0}, {"batch_size": 1}, {"lr": 0}, {"rank_lr": 0}, {"rank_steps": -1}, {"class_weight": -1}, {"rank_pictures": 0}])
def test_training_config_refuses(bad):
    with pytest.raises(ValueError, match="expected"):
        PerceptualTraining(**bad)


def test_shipped_size_fits():
    from ldm_edu.features import SceneFeatures

    numbers = sum(v.numel() for v in SceneFeatures(PERCEPTUAL_CONFIG).state_dict().values()) + sum(PERCEPTUAL_CONFIG.widths)
    assert numbers <= 350_000


def test_save_and_load(tmp_path):
    distance, facts = train_perceptual(None, TINY, SHORT)
    folder = save_perceptual(distance, tmp_path / "mine", facts)
    loaded, x, y = load_perceptual(folder), pictures(2, 16), pictures(2, 16, seed=1)
    assert_close(loaded(x, y), distance(x, y), rtol=5e-3, atol=1e-4)
    assert loaded.card == facts and loaded.name == distance.name and read_json(folder / "config.json")["kind"] == "perceptual"
    assert {p.name for p in folder.iterdir()} == {"config.json", "model.safetensors", "card.json"}
    with pytest.raises(ValueError, match="overwrite"):
        save_perceptual(distance, folder, facts)
    save_perceptual(distance, folder, {}, overwrite=True)
    assert load_perceptual(folder).card == {}


def test_folders_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json"):
        load_perceptual(tmp_path)
    distance, _ = train_perceptual(None, TINY, SHORT)
    folder = save_perceptual(distance, tmp_path / "mine", {})
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not the weights"):
        load_perceptual(folder)
    (folder / "config.json").write_text('{"kind": "features"}')
    with pytest.raises(ValueError, match="another kind"):
        load_perceptual(folder)
    with pytest.raises(ValueError, match="train_perceptual"):
        save_perceptual(PerceptualDistance(lambda x: [x]), tmp_path / "other", {})
