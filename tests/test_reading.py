"""Reading: labels and places against the captions' grammar, and an encoder that learns them; training that goes on from a model."""
import pytest
import torch

from ldm_edu.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm_edu.captions import RELATIONS, SIZES
from ldm_edu.checkpoint import state_hash
from ldm_edu.conditioning import ClassConditioner, ClassConfig, TextConditioner, TextConfig, train_tokenizer
from ldm_edu.data import Scenes
from ldm_edu.drawing import COLOURS, SHAPES
from ldm_edu.folders import Part
from ldm_edu.ldm import load
from ldm_edu.reading import READ_CLASSES, learn_to_read, noun_places, reading_labels, reading_loss
from ldm_edu.recipes import DIFFUSIONS, DiffusionRecipe, all_captions, describe_data, draw_steps, train_diffusion
from ldm_edu.training import RowRandom


@pytest.fixture(scope="module")
def captions():
    return Scenes(16, n=4000, objects=(2, 2), fields=("caption",)).captions()


def reader(captions, width=32):
    torch.manual_seed(0)
    return TextConditioner(TextConfig(width=width, depth=2, heads=2), train_tokenizer(captions))


def test_captions_of_scenes_are_those_of_its_items():
    scenes = Scenes(16, n=9, seed=3, objects=(1, 2))
    assert scenes.captions() == [scenes[i]["caption"] for i in range(9)] == all_captions(scenes)
    part = Part(scenes, [5, 2])
    assert all_captions(part) == [scenes[5]["caption"], scenes[2]["caption"]]
    assert describe_data(part).startswith("Part, 2 items, ") and describe_data(part).endswith(f", of {describe_data(scenes)}")


@pytest.mark.parametrize("caption, labels", [
    ("a red circle left of a small blue square", [("left of", "red", "circle", None), ("right of", "blue", "square", "small")]),
    ("a picture of a large pink star above a green ring", [("above", "pink", "star", "large"), ("below", "green", "ring", None)]),
    ("a cyan cross", [(None, "cyan", "cross", None)]),
    ("a cyan cross, a red ring and a blue star", [(None, "cyan", "cross", None), (None, "red", "ring", None), (None, "blue", "star", None)]),
])
def test_labels_say_side_colour_shape_and_size(caption, labels):
    code = lambda known, word: len(known) if word is None else known.index(word)
    expected = [(code(RELATIONS, r), COLOURS.index(c), SHAPES.index(s), code(SIZES, z)) for r, c, s, z in labels]
    assert reading_labels(caption) == expected
    assert all(0 <= label < n for row in expected for label, n in zip(row, READ_CLASSES, strict=True))


def test_every_noun_is_found_at_its_last_piece(captions):
    few = TextConditioner(TextConfig(width=32, heads=2), train_tokenizer(captions, vocab_size=75))  # most words in several pieces
    for conditioner in (reader(captions), few):
        for caption in captions[:200]:
            ids, places = conditioner.tokenizer.encode(caption), noun_places(conditioner, caption)
            ends = [conditioner.tokenizer.encode(s)[-2] for s in (SHAPES[label[2]] for label in reading_labels(caption))]
            assert [ids[p] for p in places] == ends, caption


def test_an_encoder_learns_to_read_sentences_it_never_saw(captions):
    conditioner = reader(captions)
    unseen = Scenes(16, n=200, split="validation", objects=(2, 2), fields=("caption",)).captions()
    before = learn_to_read(reader(captions), captions, steps=5)
    assert learn_to_read(conditioner, captions, steps=500, lr=3e-3) > 0.9 > before + 0.5
    probe = torch.nn.Linear(32, sum(READ_CLASSES))
    optimizer = torch.optim.Adam(probe.parameters(), 3e-2)
    for start in range(0, 3840, 64):  # a new head on the frozen encoder reads as well: the facts are in the vectors
        loss, _ = reading_loss(conditioner.requires_grad_(False), probe, captions[start : start + 64])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert reading_loss(conditioner, probe, unseen)[1] > 0.8


def test_reading_repeats_and_changes_the_encoder_only(captions):
    one, two, other = reader(captions), reader(captions), reader(captions)
    pool = one.pool
    learn_to_read(one, captions, steps=3, seed=1)
    learn_to_read(two, captions, steps=3, seed=1)
    learn_to_read(other, captions, steps=3, seed=2)
    assert state_hash(one) == state_hash(two) != state_hash(other) and one.pool is pool


def test_reading_refuses_what_it_cannot_read(captions):
    with pytest.raises(ValueError, match="zebra"):
        learn_to_read(reader(captions), ["a red zebra"], steps=1)
    with pytest.raises(ValueError, match="ClassConditioner"):
        learn_to_read(ClassConditioner(ClassConfig(2, ("a", "b"), width=8)), captions, steps=1)
    with pytest.raises(ValueError, match="0 steps"):
        learn_to_read(reader(captions), captions, steps=0)


def test_biased_steps_follow_their_law():
    rng = RowRandom(0, 0, range(20_000))
    assert torch.equal(draw_steps(rng, 1000), rng.integers(1000, "t"))
    t = draw_steps(rng, 1000, bias=1.6)
    assert t.dtype == torch.int64 and t.min() >= 0 and t.max() <= 999
    for x in (0.2, 0.5, 0.9):
        share, expected = (t < 1000 * x).float().mean().item(), x**1.6
        assert abs(share - expected) < 4 * (expected * (1 - expected) / len(t)) ** 0.5
    for wrong in ({"step_bias": 0.0}, {"reading_steps": -1}):
        with pytest.raises(ValueError, match="step_bias, latent_std, reading_steps"):
            DiffusionRecipe(**wrong)


@pytest.fixture(scope="module")
def parts(tmp_path_factory, captions):
    """A random first stage, pictures, and a text model trained for two steps on them."""
    torch.manual_seed(0)
    stage = AutoencoderKL(AutoencoderConfig(4, 8, (1, 2, 2), 1, mid_attention=False, num_groups=4)).eval()
    data = Scenes(16, n=24, objects=(1, 2), fields=("image", "caption"))
    folder = tmp_path_factory.mktemp("start")
    options = {"batch_size": 4, "precision": "fp32", "progress": False}
    train_diffusion(data, stage, "text-demo", folder / "first", steps=2, **options)
    return stage, data, folder, options


class Stop(Exception):
    """A power cut."""


def test_a_run_that_started_from_a_model_resumes_into_the_same_weights(parts):
    stage, data, folder, options = parts
    recipe = DIFFUSIONS["text-relations"].replace(reading_steps=2)
    start = lambda: load(folder / "first")

    def cut(report):
        if report.step == 2:
            raise Stop

    whole = train_diffusion(data, stage, recipe, folder / "whole", start_from=start(), steps=4, save_every=1, **options)
    with pytest.raises(Stop):
        train_diffusion(data, stage, recipe, folder / "cut", start_from=start(), steps=4, save_every=1, callbacks=[cut], **options)
    again = train_diffusion(data, stage, recipe, folder / "cut", start_from=start(), steps=4, save_every=1, **options)
    assert state_hash(whole.net) == state_hash(again.net) != state_hash(start().net)
    card = load(folder / "cut").card
    assert card["started_from"]["steps"] == 2 and card["reading_steps"] == 2 and card["step_bias"] == 1.6
    assert load(folder / "cut").config.scale_factor == start().config.scale_factor


def test_starting_from_a_model_begins_with_its_weights(parts):
    stage, data, folder, options = parts
    model = train_diffusion(data, stage, "text-demo", folder / "still", start_from=load(folder / "first"), steps=1, lr=0.0,
                            weight_decay=0.0, **options)
    assert state_hash(model.net) == state_hash(load(folder / "first").net)


def test_models_that_do_not_fit_are_refused(parts):
    stage, data, folder, options = parts
    torch.manual_seed(1)
    other = AutoencoderKL(stage.config)
    start = lambda: load(folder / "first")
    with pytest.raises(ValueError, match="another first stage"):
        train_diffusion(data, other, "text-demo", folder / "no", start_from=start(), steps=1, **options)
    with pytest.raises(ValueError, match="predicts v, expected eps"):
        train_diffusion(data, stage, DIFFUSIONS["text-demo"].replace(prediction="eps"), folder / "no2", start_from=start(), steps=1, **options)
    with pytest.raises(ValueError, match="conditioner"):
        train_diffusion(data, stage, "text-demo", folder / "no3", start_from=start(), conditioner=start().net.conditioner, steps=1, **options)
    with pytest.raises(ValueError, match="started_from"):
        train_diffusion(data, stage, "text-demo", folder / "first", start_from=start(), steps=2, **options)
