"""Boxes, maps and several conditions at once: tokens, padding, order, nulls, prompts and their errors, saving, measures, commands."""
import itertools
import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.testing import assert_close
from torchvision.ops import box_iou as reference_iou

from ldm_edu import cli
from ldm_edu.asking import Asked, gather_prompts, read_map
from ldm_edu.attention import CrossAttention
from ldm_edu.autoencoder import AutoencoderConfig
from ldm_edu.captions import HELD_OUT_PAIRS, SceneObject
from ldm_edu.conditioning import (
    CONDITIONERS,
    ClassConditioner,
    ClassConfig,
    Condition,
    NoCondition,
    TextConditioner,
    TextConfig,
    make_conditioner,
    train_tokenizer,
)
from ldm_edu.data import SEMANTIC_CLASSES, Scenes, render_objects
from ldm_edu.drawing import COLOURS, SHAPES
from ldm_edu.evaluation import evaluation_table
from ldm_edu.folders import Part
from ldm_edu.layout import (
    JointConditioner,
    JointConfig,
    LayoutConditioner,
    LayoutConfig,
    SemanticConditioner,
    SemanticConfig,
    grid_lines,
    side_by_side,
    word_shares,
)
from ldm_edu.ldm import ConditionalUNet, LatentDiffusion, LDMConfig, build, fit_maps, load, save
from ldm_edu.placement import (
    box_iou,
    grade_classes,
    grade_layouts,
    grade_maps,
    layout_rows,
    map_rows,
    match_boxes,
    mean_iou,
    read_boxes,
    read_maps,
)
from ldm_edu.quantize import make_first_stage
from ldm_edu.recipes import (
    DIFFUSIONS,
    DiffusionRecipe,
    DiffusionTask,
    conditioner_keys,
    data_names,
    default_conditioner,
)
from ldm_edu.training import RowRandom
from ldm_edu.unet import UNet, UNetConfig

NAMES = Scenes.box_names
RED, BLUE, STAR = NAMES.index("red circle"), NAMES.index("blue circle"), NAMES.index("red star")
LAYOUTS = [[("red circle", 0.0, 0.0, 0.5, 0.5)],
           [("blue circle", 0.1, 0.2, 0.6, 0.7), ("red star", 0.5, 0.5, 1.0, 1.0), ("pink ring", 0.25, 0.0, 0.5, 0.25)],
           [("red star", 0.0, 0.25, 1.0, 0.75), ("blue circle", 0.5, 0.5, 0.75, 0.75)]]


def layout(seed=0, **options):
    torch.manual_seed(seed)
    return LayoutConditioner(LayoutConfig(**{"label_names": NAMES, "grid": 33, "width": 32, "heads": 2} | options)).eval()


def semantic(seed=0, **options):
    torch.manual_seed(seed)
    return SemanticConditioner(SemanticConfig(**{"n_classes": 5, "channels": 6, "width": 8} | options)).eval()


def text(width=32, pooled=False, seed=0):
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(["a red circle left of a blue square", "a green star"])
    return TextConditioner(TextConfig(width=width, depth=1, heads=2, max_length=16, pooled=pooled), tokenizer).eval()


def equal(a: Condition, b: Condition, **tolerance):
    for name in ("context", "context_mask", "c", "concat"):
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None), name
        if x is not None:
            assert_close(x, y, **tolerance)


# ---------------------------------------------------------------- corners and words

@pytest.mark.parametrize("grid", [2, 3, 33, 90])
def test_corners_are_rounded_to_the_nearest_line(grid):
    x = torch.rand(1000, generator=torch.Generator().manual_seed(grid), dtype=torch.float64)
    lines = grid_lines(x, grid)
    assert lines.dtype == torch.int64 and 0 <= lines.min() <= lines.max() <= grid - 1
    assert (lines / (grid - 1) - x).abs().max() <= 0.5 / (grid - 1) + 1e-6
    assert_close(grid_lines(torch.arange(grid) / (grid - 1), grid), torch.arange(grid))
    assert grid_lines(torch.tensor([-0.3, 1.7]), grid).tolist() == [0, grid - 1]


def test_lines_by_hand():
    assert grid_lines(torch.tensor([0.0, 0.25, 0.26, 0.5, 0.9, 1.0]), 33).tolist() == [0, 8, 8, 16, 29, 32]


def test_words_are_shared_between_labels():
    words, shares = word_shares(["red ring", "red star", "Blue star", "ring ring"])
    assert words == ["blue", "red", "ring", "star"]
    assert shares.tolist() == [[0, 1, 1, 0], [0, 1, 0, 1], [1, 0, 0, 1], [0, 0, 2, 0]]


def test_a_held_out_pair_is_the_sum_of_its_words():
    model = layout()
    lines = torch.zeros(1, 1, 4, dtype=torch.long)
    token = lambda name: model.encoder.tokens(torch.tensor([[NAMES.index(name)]]), lines)[0, 0, 0]
    for colour, shape in HELD_OUT_PAIRS:
        other_shape, other_colour = next(s for s in SHAPES if s != shape), next(c for c in COLOURS if c != colour)
        mixed = token(f"{colour} {other_shape}") + token(f"{other_colour} {shape}") - token(f"{other_colour} {other_shape}")
        assert_close(token(f"{colour} {shape}"), mixed, rtol=1e-4, atol=1e-5)


def test_the_three_tokens_are_what_where_from_where_to():
    encoder = layout().encoder.tokens
    labels, lines = torch.tensor([[STAR]]), torch.tensor([[[3, 7, 20, 30]]])
    what, start, end = encoder(labels, lines)[0, 0]
    words, _ = word_shares(NAMES)
    assert_close(what, encoder.word.weight[words.index("red")] + encoder.word.weight[words.index("star")] + encoder.role.weight[1])
    assert_close(start, encoder.column.weight[3] + encoder.row.weight[7] + encoder.role.weight[2])
    assert_close(end, encoder.column.weight[20] + encoder.row.weight[30] + encoder.role.weight[3])


# ---------------------------------------------------------------- layout

@pytest.mark.parametrize("pooled", [False, True])
def test_layout_shapes_and_widths(pooled):
    model = layout(pooled=pooled)
    condition = model.from_prompts(LAYOUTS)
    assert condition.context.shape == (3, 1 + 3 * 3, 32) and condition.context_mask.sum(1).tolist() == [4, 10, 7]
    assert (condition.c.shape == (3, 32)) if pooled else condition.c is None
    assert (model.context_dim, model.c_dim, model.concat_channels) == (32, 32 if pooled else None, 0)
    assert condition.concat is None and not condition.context[~condition.context_mask].any()


@pytest.mark.parametrize("pooled", [False, True])
def test_a_layout_means_the_same_alone_and_beside_a_longer_one(pooled):
    model = layout(pooled=pooled)
    together = model.from_prompts(LAYOUTS)
    for i, boxes in enumerate(LAYOUTS):
        alone = model.from_prompts([boxes])
        n = alone.context.shape[1]
        assert_close(together.context[i, :n], alone.context[0], rtol=1e-5, atol=1e-5)
        assert not together.context[i, n:].any() and not together.context_mask[i, n:].any()
        if pooled:
            assert_close(together.c[i], alone.c[0], rtol=1e-5, atol=1e-5)


def test_what_padding_holds_does_not_matter():
    """Coordinates and words of places without a box are read by no token."""
    model = layout()
    batch = model.prepare(LAYOUTS)
    before = model(batch)
    padding = batch["box_labels"] < 0
    spoilt = {"boxes": batch["boxes"].masked_fill(padding[..., None], 0.8), "box_labels": batch["box_labels"].masked_fill(padding, -5)}
    equal(model(spoilt), before)


def test_columns_without_any_box_are_cut():
    model, batch = layout(), layout().prepare(LAYOUTS)
    wide = {"boxes": F.pad(batch["boxes"], (0, 0, 0, 5)), "box_labels": F.pad(batch["box_labels"], (0, 5), value=-1)}
    equal(model(wide), model(batch))


@pytest.mark.parametrize("depths", [(1, 1), (2, 1), (1, 3)])
def test_the_order_of_boxes_changes_nothing_but_the_order_of_tokens(depths):
    model = layout(box_depth=depths[0], depth=depths[1], pooled=True)
    first = model.from_prompts([LAYOUTS[1]])
    torch.manual_seed(1)
    reader = CrossAttention(16, context_dim=32, heads=2)
    queries = torch.randn(1, 5, 16)
    for order in itertools.permutations(range(3)):
        again = model.from_prompts([[LAYOUTS[1][i] for i in order]])
        tokens = [0, *(1 + 3 * i + k for i in order for k in range(3))]
        assert_close(again.context, first.context[:, tokens], rtol=1e-4, atol=1e-5)
        assert_close(again.c, first.c, rtol=1e-4, atol=1e-5)
        assert_close(reader(queries, again.context, again.context_mask), reader(queries, first.context, first.context_mask), rtol=1e-4, atol=1e-5)


def test_who_stands_where_matters():
    """Two layouts of the same labels and the same corners, tied otherwise, are told apart, also by the mean over all tokens."""
    model = layout()
    here, there = (0.0, 0.0, 0.5, 0.5), (0.5, 0.5, 1.0, 1.0)
    a, b = model.from_prompts([[("red circle", *here), ("blue star", *there)], [("red circle", *there), ("blue star", *here)]]).context.mean(1)
    assert (a - b).abs().max() > 1e-3
    c, d = model.from_prompts([[("red circle", 0.0, 0.0, 0.5, 0.5), ("blue star", 0.25, 0.25, 1.0, 1.0)],
                               [("red circle", 0.0, 0.0, 1.0, 1.0), ("blue star", 0.25, 0.25, 0.5, 0.5)]]).context.mean(1)
    assert (c - d).abs().max() > 1e-3, "which end belongs to which beginning"


def test_null_is_the_layout_without_boxes():
    model = layout(pooled=True)
    null = model.null(3)
    equal(null, model.from_prompts([[], [], []]))
    assert null.context_mask.sum(1).tolist() == [1, 1, 1] and len(model.null(0)) == 0
    alone = model.from_prompts([[], LAYOUTS[1]])
    assert_close(alone.context[0, :1], null.context[0, :1]), assert_close(alone.c[0], null.c[0])


def test_dropped_rows_carry_no_trace_of_their_boxes():
    model, keep = layout(pooled=True), torch.tensor([False, True, False])
    mixed = model.from_prompts(LAYOUTS).select(keep, model.null(3))
    for row in (0, 2):
        assert_close(mixed.context[row, :1], model.null(1).context[0, :1]), assert_close(mixed.c[row], model.null(1).c[0])
        assert not mixed.context[row, 1:].any() and mixed.context_mask[row].tolist() == [True] + [False] * 9


def test_gradients_reach_every_parameter_of_the_layout_encoder():
    model = layout(pooled=True).train()
    condition = model(Scenes(n=400, fields=("boxes", "box_labels")).render(range(400)))
    (condition.context.pow(2).cumsum(1).sum() + condition.c.pow(3).sum()).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0, name
    assert model.encoder.tokens.word.weight.grad.abs().sum(1).gt(0).all() and model.encoder.tokens.column.weight.grad.abs().sum(1).gt(0).sum() > 20


def test_prompts_and_data_mean_the_same():
    scenes = Scenes(n=20, fields=("boxes", "box_labels")).render(range(20))
    prompts = [[(NAMES[k], *box) for k, box in zip(labels, boxes) if k >= 0]
               for labels, boxes in zip(scenes["box_labels"].tolist(), scenes["boxes"].tolist())]
    model = layout()
    equal(model.from_prompts(prompts), model(scenes))


def test_labels_may_be_written_in_many_ways():
    model, corners = layout(), (0.0, 0.0, 0.5, 0.5)
    ways = ["red star", "Red  Star", "a red star", STAR, np.int64(STAR)]
    assert model.prepare([[(way, *corners)] for way in ways])["box_labels"].flatten().tolist() == [STAR] * 5
    listed = model.prepare([[["red star", 0, 0, 1, 1]]])
    assert listed["boxes"].tolist() == [[[0.0, 0.0, 1.0, 1.0]]] and listed["boxes"].dtype == torch.float32


BOX = ("red circle", 0.1, 0.2, 0.5, 0.6)


@pytest.mark.parametrize("prompts, parts", [
    ([], ["empty list"]), ("a red ring", ["list"]), (["a red ring"], ["layout 0", "(label, x0, y0, x1, y1)"]), ([3], ["layout 0", "3"]),
    ([{"red": 1}], ["layout 0"]), ([BOX], ["layout 0, box 0"]), ([[BOX[:4]]], ["layout 0, box 0", "0.5)"]),
    ([[BOX], [BOX, ("red zircle", 0, 0, 1, 1)]], ["layout 1, box 1", "red zircle", "'red circle'"]),
    ([[(48, 0, 0, 1, 1)]], ["48", "0 to 47"]), ([[(-1, 0, 0, 1, 1)]], ["-1"]), ([[(True, 0, 0, 1, 1)]], ["true"]), ([[(None, 0, 0, 1, 1)]], ["none"]),
    ([[("red circle", 0.5, 0.0, 0.2, 1.0)]], ["box 0", "x from 0.5 to 0.2"]), ([[("red circle", 0.0, 0.5, 1.0, 0.5)]], ["y from 0.5 to 0.5"]),
    ([[("red circle", -0.1, 0.0, 0.2, 1.0)]], ["x from -0.1"]), ([[("red circle", 0, 0, 20, 30)]], ["x from 0 to 20", "fractions"]),
    ([[("red circle", 0, 0, float("nan"), 1)]], ["nan", "finite"]), ([[("red circle", 0, 0, "1", 1)]], ["four finite numbers"]),
    ([[("red circle", 0, 0, True, 1)]], ["True"]), ([[("red circle", 0.5, 0, 0.52, 1)]], ["0.5 to 0.52", "0.0312"]), ([[BOX] * 31], ["31 boxes", "30"]),
])
def test_bad_layouts_are_named(prompts, parts):
    with pytest.raises(ValueError) as caught:
        layout().prepare(prompts)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("boxes, labels, word", [
    (torch.zeros(2, 3, 4), torch.zeros(2, 2).long(), "box_labels"), (torch.zeros(2, 3), torch.zeros(2, 3).long(), "boxes"),
    (torch.zeros(2, 3, 4), torch.full((2, 3), 48), "got 48"), (torch.zeros(2, 3, 4), torch.zeros(2, 3), "float32"),
    (torch.zeros(2, 3, 4).long(), torch.zeros(2, 3).long(), "int64"), (torch.full((1, 1, 4), 1.5), torch.zeros(1, 1).long(), "1.5"),
    (torch.full((1, 1, 4), float("nan")), torch.zeros(1, 1).long(), "nan"), (torch.zeros(1, 31, 4), torch.zeros(1, 31).long(), "31"),
])
def test_bad_batches_are_refused(boxes, labels, word):
    with pytest.raises(ValueError, match=word):
        layout()({"boxes": boxes, "box_labels": labels})


def test_missing_entries_are_named():
    with pytest.raises(ValueError, match="'box_labels'.*caption"):
        layout()({"boxes": torch.zeros(1, 1, 4), "caption": ["a"]})
    with pytest.raises(ValueError, match="'semantic'"):
        semantic()({"boxes": torch.zeros(1, 1, 4)})


def test_thirty_boxes_fit():
    model = layout()
    condition = model.from_prompts([[BOX] * 30, []])
    assert condition.context.shape == (2, 91, 32) and condition.context_mask.sum(1).tolist() == [91, 1]


@pytest.mark.parametrize("options, word", [
    ({"label_names": ()}, "label_names"), ({"label_names": ("a", " ")}, "label_names"), ({"label_names": ("red ring", "ring red")}, "2 names of 1"),
    ({"grid": 1}, "grid"), ({"most": 0}, "most"), ({"box_depth": 0}, "box_depth"), ({"depth": 0}, "depth"), ({"heads": 3}, "multiple of the 3"),
])
def test_layout_config_errors(options, word):
    with pytest.raises(ValueError, match=word):
        LayoutConfig(**{"label_names": NAMES} | options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_dtype_is_the_weights(dtype):
    for model, prompts in ((layout(pooled=True), LAYOUTS), (semantic(), [torch.zeros(8, 8).long()])):
        wide, narrow = model.from_prompts(prompts), model.to(dtype).from_prompts(prompts)
        for name in ("context", "c", "concat"):
            if getattr(wide, name) is not None:
                assert getattr(narrow, name).dtype == dtype
                assert_close(getattr(narrow, name).float(), getattr(wide, name), rtol=0, atol=1e-4 if dtype == torch.float64 else 0.2)


# ---------------------------------------------------------------- semantic maps

@pytest.mark.parametrize("f", [1, 2, 4, 8])
@pytest.mark.parametrize("h, w", [(8, 8), (16, 32), (40, 24)])
def test_maps_of_any_size_reach_the_latents_size(f, h, w):
    model = semantic(downsample_factor=f)
    condition = model({"semantic": torch.randint(5, (3, h, w), generator=torch.Generator().manual_seed(0))})
    assert condition.concat.shape == (3, 6, h // f, w // f) and condition.context is None and condition.c is None
    assert (model.concat_channels, model.context_dim, model.c_dim) == (6, None, None)


def test_a_code_per_class_is_the_one_hot_map_times_a_table():
    model, maps = semantic(downsample_factor=1), torch.randint(5, (2, 6, 6), generator=torch.Generator().manual_seed(0))
    one_hot = F.one_hot(maps, 5).float().movedim(-1, 1)
    kernel = (model.encoder.out.weight[:, :, 0, 0] @ model.encoder.codes.weight.T)[:, :, None, None]
    assert_close(model({"semantic": maps}).concat, F.conv2d(one_hot, kernel, model.encoder.out.bias), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("f", [2, 4])
def test_a_map_moved_by_a_cell_gives_maps_moved_by_a_cell(f):
    model = semantic(downsample_factor=f)
    maps = torch.randint(5, (1, 16 * f, 16 * f), generator=torch.Generator().manual_seed(0))
    a, b = (model({"semantic": m}).concat for m in (maps, maps.roll((f, 2 * f), (1, 2))))
    assert_close(b[:, :, 5:-5, 5:-5], a.roll((1, 2), (2, 3))[:, :, 5:-5, 5:-5], rtol=1e-4, atol=1e-5)


def test_arrangement_within_a_cell_is_seen():
    """Means over 4 x 4 pixels cannot tell a left half from a right half; strided convolutions can."""
    left = torch.zeros(1, 4, 4, dtype=torch.long)
    left[:, :, :2] = 1
    right = left.flip(-1)
    means = [F.avg_pool2d(F.one_hot(m, 5).float().movedim(-1, 1), 4) for m in (left, right)]
    assert_close(*means)
    a, b = (semantic()({"semantic": m}).concat for m in (left, right))
    assert (a - b).abs().max() > 1e-2


def test_the_null_map_is_learned_and_fits_every_size():
    model = semantic()
    null = model.null(2)
    assert null.concat.shape == (2, 6, 1, 1) and len(model.null(0)) == 0
    with torch.no_grad():
        model.nothing.copy_(torch.arange(6.0))
    told = model({"semantic": torch.zeros(2, 8, 12).long()})
    for both, rows in ((model.null(2).cat(told), slice(0, 2)), (told.cat(model.null(2)), slice(2, 4))):
        assert both.concat.shape == (4, 6, 2, 3) and (both.concat[rows] == torch.arange(6.0)[:, None, None]).all()
        assert_close(both.concat[2:] if rows.start == 0 else both.concat[:2], told.concat)
    keep = torch.tensor([True, False])
    for mixed in (told.select(keep, model.null(2)), model.null(2).select(~keep, told)):
        assert_close(mixed.concat[0], told.concat[0]), assert_close(mixed.concat[1], torch.arange(6.0)[:, None, None].expand(6, 2, 3))
    mixed.concat.sum().backward()
    assert model.nothing.grad.tolist() == [6.0] * 6


def test_conditions_with_maps_of_two_sizes_do_not_mix():
    a, b = Condition(concat=torch.zeros(1, 2, 4, 4)), Condition(concat=torch.zeros(1, 2, 4, 8))
    with pytest.raises(ValueError, match="4x4.*4x8"):
        a.cat(b)
    with pytest.raises(ValueError, match="4x4.*4x8"):
        a.select(torch.tensor([True]), b)


def test_gradients_reach_every_parameter_of_the_map_encoder():
    model = semantic().train()
    condition = model({"semantic": torch.randint(5, (4, 16, 16))}).select(torch.tensor([True, True, True, False]), model.null(4))
    (condition.concat + 1).pow(2).sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_maps_come_as_tensors_arrays_or_lists():
    maps = torch.randint(5, (2, 8, 8), generator=torch.Generator().manual_seed(0))
    model, forms = semantic(), (maps, list(maps), maps.numpy(), [m.tolist() for m in maps], [m.numpy().astype(np.uint8) for m in maps])
    for form in forms:
        batch = model.prepare(form)
        assert_close(batch["semantic"], maps)


@pytest.mark.parametrize("prompts, parts", [
    ([], ["empty list"]), ("a map", ["list"]), (torch.zeros(8, 8).long(), ["map 0", "(h w)"]), ([torch.zeros(8, 8)], ["map 0", "float32"]),
    ([torch.zeros(8, 8).bool()], ["bool"]), ([torch.zeros(8, 8).long(), torch.zeros(8, 10).long()], ["map 1", "8x10", "f = 4"]),
    ([torch.zeros(8, 8).long(), torch.zeros(8, 16).long()], ["8x8, 8x16"]), ([torch.zeros(0, 8).long()], ["0x8"]),
    ([torch.eye(8).long() * 5], ["class 5 at row 0, column 0", "0 to 4"]), ([-torch.eye(8).long()], ["class -1"]),
])
def test_bad_maps_are_named(prompts, parts):
    with pytest.raises(ValueError) as caught:
        semantic().prepare(prompts)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("maps, word", [(torch.zeros(8, 8).long(), "b h w"), (torch.zeros(1, 8, 8), "float32"), (torch.zeros(1, 6, 8).long(), "6x8"),
                                        (torch.full((1, 8, 8), 5), "class 5")])
def test_bad_map_batches_are_refused(maps, word):
    with pytest.raises(ValueError, match=word):
        semantic()({"semantic": maps})


@pytest.mark.parametrize("options, word", [({"n_classes": 0}, "n_classes"), ({"channels": 0}, "channels"), ({"width": 0}, "width"),
                                           ({"downsample_factor": 3}, "got 3"), ({"downsample_factor": 0}, "got 0")])
def test_semantic_config_errors(options, word):
    with pytest.raises(ValueError, match=word):
        SemanticConfig(**{"n_classes": 5} | options)


# ---------------------------------------------------------------- several at once

def random_condition(b, n=None, d=4, c=None, k=None, size=(2, 3), masked=False):
    mask = (torch.arange(n) < torch.arange(1, b + 1)[:, None]) if masked else None
    return Condition(None if n is None else torch.randn(b, n, d), mask, None if c is None else torch.randn(b, c), None if k is None else torch.randn(b, k, *size))


@pytest.mark.parametrize("masked", [(False, False), (True, False), (False, True), (True, True)])
def test_side_by_side_by_hand(masked):
    a, b, nothing = random_condition(2, 3, c=5, k=1, masked=masked[0]), random_condition(2, 4, c=5, k=2, size=(1, 1), masked=masked[1]), Condition()
    both = side_by_side([a, nothing, b])
    assert_close(both.context, torch.cat([a.context, b.context], 1)), assert_close(both.c, a.c + b.c)
    assert_close(both.concat, torch.cat([a.concat, b.concat.expand(2, 2, 2, 3)], 1))
    if masked == (False, False):
        assert both.context_mask is None
    else:
        assert both.context_mask is not None
        full = torch.ones(2, 4, dtype=torch.bool)
        assert_close(both.context_mask, torch.cat([full[:, :3] if a.context_mask is None else a.context_mask, full if b.context_mask is None else b.context_mask], 1))
    assert len(side_by_side([Condition(), Condition()])) == 0
    assert side_by_side([random_condition(2, k=1, size=(1, 1))] * 2).concat.shape == (2, 2, 1, 1)


@pytest.mark.parametrize("conditions, word", [
    ([random_condition(2, 3), random_condition(3, 3)], "2, 3 rows"), ([random_condition(2, 3), random_condition(2, 3, d=6)], "context: got widths 4, 6"),
    ([random_condition(2, c=3), random_condition(2, c=4)], "c: got widths 3, 4"), ([random_condition(2, k=1), random_condition(2, k=1, size=(3, 3))], "2x3, 3x3"),
])
def test_what_does_not_fit_side_by_side_is_refused(conditions, word):
    with pytest.raises(ValueError, match=word):
        side_by_side(conditions)


def joint(pooled=False):
    return JointConditioner.of(text(pooled=pooled), layout(pooled=pooled), semantic()).eval()


PROMPTS = [{"text": "a red circle", "layout": LAYOUTS[1], "semantic": torch.ones(8, 8).long()}, {"text": "a green star"}, {"layout": LAYOUTS[0], "text": None}]


@pytest.mark.parametrize("pooled", [False, True])
def test_joint_conditions_are_their_parts(pooled):
    model = joint(pooled)
    batch = {"caption": ["a red circle", "a green star"], **layout().prepare(LAYOUTS[:2]), "semantic": torch.randint(5, (2, 8, 8))}
    assert model.keys == ("caption", "boxes", "box_labels", "semantic") and model.drops == ("drop_text", "drop_layout", "drop_semantic")
    equal(model(batch), side_by_side([part(batch) for part in model.parts.values()]))
    equal(model(model.tensors(batch)), model(batch))
    null = model.null(2)
    equal(null, side_by_side([part.null(2) for part in model.parts.values()]))
    assert (model.context_dim, model.c_dim, model.concat_channels) == (32, 32 if pooled else None, 6)
    assert null.context.shape[1] == 2 + 1 and null.concat.shape == (2, 6, 1, 1)


def test_each_part_can_be_dropped_alone():
    model = joint()
    batch = {"caption": ["a red circle"] * 8, **{k: v.expand(8, *v.shape[1:]) for k, v in layout().prepare(LAYOUTS[1:2]).items()}, "semantic": torch.ones(8, 8, 8).long()}
    drops = torch.tensor(list(itertools.product([False, True], repeat=3)))
    got = model(batch | dict(zip(model.drops, drops.T)))
    for row, choice in enumerate(drops.tolist()):
        parts = [part.null(1) if dropped else part({k: v[:1] for k, v in batch.items()}) for part, dropped in zip(model.parts.values(), choice)]
        alone = side_by_side(parts)
        assert_close(got.context[row][got.context_mask[row]], alone.context[0][alone.context_mask[0]], rtol=1e-5, atol=1e-5)
        assert_close(got.concat[row], alone.concat[0].expand(6, 2, 2), rtol=1e-5, atol=1e-5)


def test_prompts_may_leave_parts_out():
    model = joint()
    batch = model.prepare(PROMPTS)
    assert [batch[key].tolist() for key in model.drops] == [[False, False, True], [False, True, False], [False, True, True]]
    got = model(batch)
    for i, prompt in enumerate(PROMPTS):
        parts = [part.null(1) if prompt.get(name) is None else part.from_prompts([prompt[name]]) for name, part in model.parts.items()]
        alone = side_by_side(parts)
        assert_close(got.context[i][got.context_mask[i]], alone.context[0][alone.context_mask[0]], rtol=1e-5, atol=1e-5)
        assert_close(got.concat[i], alone.concat[0].expand(6, 2, 2), rtol=1e-5, atol=1e-5)
    assert "boxes" not in model.prepare([{"text": "a red circle"}]) and model.from_prompts([{"text": "a red circle"}]).concat.shape == (1, 6, 1, 1)


@pytest.mark.parametrize("prompts, parts", [
    ([], ["empty list"]), ("a red ring", ["list"]), (["a red circle"], ["prompt 0", "mapping", "text, layout, semantic"]),
    ([{"text": "a red circle"}, {"txt": "a red circle"}], ["prompt 1", "'txt'", "'text'"]), ([{}], ["prompt 0", "nothing said"]),
    ([{"text": None}], ["nothing said"]), ([{"text": "a zebra"}], ["zebra"]), ([{"layout": [("red circle", 0, 0, 0, 1)]}], ["box 0"]),
])
def test_bad_joint_prompts_are_named(prompts, parts):
    with pytest.raises(ValueError) as caught:
        joint().prepare(prompts)
    for part in parts:
        assert part in str(caught.value)


def test_joint_errors():
    with pytest.raises(ValueError, match="got none"):
        JointConditioner(JointConfig(()))
    with pytest.raises(ValueError, match="semantic, semantic"):
        JointConditioner.of(semantic(), semantic())
    with pytest.raises(ValueError, match="context_dim: got widths 16, 32"):
        JointConditioner.of(text(16), layout())
    with pytest.raises(ValueError, match="drop"):
        joint()({"drop_text": torch.zeros(2, 2).bool(), "caption": ["a red circle"]})


def test_gradients_reach_every_part():
    model = joint(pooled=True).train()
    batch = {"caption": ["a red circle left of a blue square", "a green star"] * 10, **Scenes(n=20, fields=("boxes", "box_labels")).render(range(20)), "semantic": torch.randint(5, (20, 8, 8))}
    condition = model(batch | {key: torch.arange(20) % 5 == 0 for key in model.drops})
    (condition.context.pow(2).cumsum(1).sum() + condition.c.pow(3).sum() + (condition.concat + 1).pow(2).sum()).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


def built(name):
    return {"layout": layout, "semantic": semantic, "joint": joint,
            "with a class": lambda: JointConditioner.of(ClassConditioner(ClassConfig(3, width=32)), layout())}[name]()


@pytest.mark.parametrize("name", ["layout", "semantic", "joint", "with a class"])
def test_saved_conditioners_come_back(name):
    model = built(name)
    values = json.loads(json.dumps(model.to_dict()))
    again = make_conditioner(values).eval()
    again.load_state_dict(model.state_dict())
    assert again.to_dict() == values and again.config == make_conditioner(values).config
    equal(again.null(2), model.null(2), rtol=0, atol=0)
    prompts = {"layout": LAYOUTS, "semantic": [torch.ones(8, 8).long()], "joint": PROMPTS, "with a class": [{"class": 2, "layout": LAYOUTS[0]}]}[name]
    equal(again.from_prompts(prompts), model.from_prompts(prompts), rtol=0, atol=0)


def test_registered_and_refused():
    assert {"layout", "semantic", "joint"} <= set(CONDITIONERS)
    with pytest.raises(ValueError, match="gird"):
        make_conditioner({"name": "layout", "config": {"label_names": ["a"], "gird": 3}})
    with pytest.raises(ValueError, match="label_names"):
        make_conditioner({"name": "layout", "config": {"label_names": []}})


# ---------------------------------------------------------------- in a model

STAGE = AutoencoderConfig(4, 8, (1, 2, 4), 1, mid_attention=False, num_groups=2)


def ldm(conditioner, seed=0):
    torch.manual_seed(seed)
    unet = UNetConfig(4 + conditioner.concat_channels, 4, 16, (1, 2), 1, (2,), heads=1, num_groups=4, context_dim=conditioner.context_dim, c_dim=conditioner.c_dim)
    config = LDMConfig(STAGE, unet, conditioner.to_dict(), image_size=16, guidance_scale=2.0)
    model = LatentDiffusion(config, make_first_stage(STAGE), ConditionalUNet(UNet(unet), conditioner)).eval()
    for p in model.net.unet.parameters():  # its last layers start at zero, which would hide the condition
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return model


def test_maps_fit_or_are_refused():
    x = torch.zeros(2, 3, 4, 6)
    assert fit_maps(torch.ones(2, 5, 1, 1), x).shape == (2, 5, 4, 6) and fit_maps(torch.ones(2, 5, 4, 6).double(), x).dtype == torch.float32
    with pytest.raises(ValueError, match="2x6 for latents of 4x6"):
        fit_maps(torch.ones(2, 5, 2, 6), x)


@pytest.mark.parametrize("name", ["layout", "semantic", "joint"])
def test_models_draw_under_guidance_and_come_back(name, tmp_path):
    model = ldm(built(name))
    maps = [torch.randint(5, (16, 16), generator=torch.Generator().manual_seed(i)) for i in range(3)]
    prompts = {"layout": LAYOUTS, "semantic": maps, "joint": [{"text": "a red circle", "layout": k, "semantic": m} for k, m in zip(LAYOUTS, maps)]}[name]
    images = model.sample(prompts, steps=2, seed=3)
    assert images.shape == (3, 3, 16, 16)
    assert_close(model.sample(prompts[1:2], steps=2, seed=4), images[1:2], rtol=1e-3, atol=1e-3)
    assert (model.sample(prompts, steps=2, seed=3, guidance_scale=1.0) - images).abs().max() > 1e-4
    assert_close(model.sample(prompts, steps=2, seed=3, guidance_scale=0.0), model.sample(n=3, steps=2, seed=3))
    again = load(save(model, tmp_path / "model"))
    assert_close(again.sample(prompts, steps=2, seed=3), images, rtol=0, atol=0)
    assert build(again.config).config == again.config


def test_pictures_take_the_size_of_their_maps():
    model = ldm(semantic())
    wide = [torch.zeros(16, 32).long()]
    assert model.sample(wide, steps=1).shape == (1, 3, 16, 32) == model.sample(wide, steps=1, size=(16, 32)).shape
    assert model.sample(n=2, steps=1).shape == (2, 3, 16, 16) and model.sample(n=1, steps=1, size=(32, 16)).shape == (1, 3, 32, 16)
    with pytest.raises(ValueError, match="4x8 for latents of 4x4"):
        model.sample(wide, steps=1, size=16)
    with pytest.raises(ValueError, match="2x2 for latents of 4x4"):
        model.sample([torch.zeros(8, 8).long()], steps=1, size=16)
    two = model.sample(n=2, steps=1, batch={"semantic": torch.zeros(2, 16, 16).long()})
    assert_close(two[1], model.sample([torch.zeros(16, 16).long()], n=2, steps=1)[1])


def test_negative_prompts_keep_one_part():
    model, words = ldm(joint()), {"text": "a red circle"}
    both = model.sample([words | {"layout": LAYOUTS[0]}], negative=[words], steps=2, guidance_scale=2.0)
    assert (both - model.sample([words | {"layout": LAYOUTS[0]}], steps=2, guidance_scale=2.0)).abs().max() > 1e-5
    assert_close(model.sample(words, n=2, steps=2), model.sample([words, words], steps=2))


@pytest.mark.parametrize("dropout", [0.0, 0.3, 1.0])
def test_training_drops_parts_at_the_recipes_rate_and_independently(dropout):
    conditioner, seen = joint(), []
    task = DiffusionTask(ldm(conditioner), DiffusionRecipe("tiny", "text", condition_dropout=dropout), "hash")

    def spy(x_t, t, batch, drop):
        seen.append(torch.stack([drop, *(batch[key] for key in conditioner.drops)]))
        return torch.zeros_like(x_t)

    batch = {"mean": torch.zeros(500, 4, 4, 4), "std": torch.ones(500, 4, 4, 4)}
    task.loss(spy, batch, RowRandom(0, 0, range(500)))
    rates = seen[0].float().mean(1)
    assert (rates - dropout).abs().max() < 0.08 and "drop_text" not in batch
    if dropout == 0.3:
        agree = torch.corrcoef(seen[0].float())
        assert (agree - torch.eye(4)).abs().max() < 0.2


# ---------------------------------------------------------------- recipes

def test_default_conditioners_fit_the_data():
    data = Scenes(n=50, fields=("image", "caption", "boxes", "box_labels", "semantic"))
    made = default_conditioner("layout", data, 64, True)
    assert made.config.label_names == NAMES and made.config.width == 64 and made.config.pooled
    made = default_conditioner("semantic", Part(data, range(5)), None, stage=AutoencoderConfig(ch_mult=(1, 1, 1, 1)))
    assert made.config.n_classes == SEMANTIC_CLASSES and made.config.downsample_factor == 8
    both = default_conditioner("text+semantic", data, 64)
    assert list(both.parts) == ["text", "semantic"] and both.context_dim == 64
    assert isinstance(default_conditioner("none", data, None), NoCondition)
    assert conditioner_keys("text+layout") == ("caption", "boxes", "box_labels") and conditioner_keys("none") == ()
    with pytest.raises(ValueError, match="layot.*'layout'"):
        default_conditioner("layot", data, 64)
    with pytest.raises(ValueError, match="labelled boxes"):
        data_names([], "box_names")
    assert {"layout-tiny", "semantic-tiny"} <= set(DIFFUSIONS)


def test_names_of_scenes_are_the_numbers_in_its_batches():
    scenes = Scenes(64, n=20, objects=(1, 1), fields=("box_labels", "semantic"))
    for i in range(20):
        item, (thing,) = scenes[i], scenes.facts(i)
        assert NAMES[item["box_labels"][0]] == f"{thing.colour} {thing.shape}"
        assert {Scenes.semantic_names[k] for k in item["semantic"].unique()} == {"ground", f"{thing.colour} {thing.shape}"}


# ---------------------------------------------------------------- measures

def test_iou_is_torchvisions():
    generator = torch.Generator().manual_seed(0)
    make = lambda n: torch.rand(n, 4, generator=generator).view(n, 2, 2).sort(1).values.flatten(1)
    a, b = make(40), make(30)
    assert_close(box_iou(a, b), reference_iou(a, b), rtol=1e-5, atol=1e-6)
    assert_close(box_iou(a, a).diagonal(), torch.ones(40)), assert_close(box_iou(a, b).T, box_iou(b, a))
    assert box_iou(torch.zeros(1, 4), torch.zeros(1, 4)).item() == 0 and box_iou(a, a[:0]).shape == (40, 0)
    with pytest.raises(ValueError, match="a: got shape"):
        box_iou(a[0], b)


def test_matching_is_one_to_one_and_greedy():
    asked = torch.tensor([[0.0, 0, 1, 1], [0, 0, 0.9, 1], [3, 3, 4, 4]])
    found = torch.tensor([[0.0, 0, 1, 1], [0.5, 0, 1.5, 1]])
    pairs = match_boxes(asked, found)
    assert [p[:2] for p in pairs] == [(0, 0), (1, 1)] and pairs[0][2] == 1 and abs(pairs[1][2] - 0.4 / 1.5) < 1e-6
    assert match_boxes(asked[:0], found) == [] and match_boxes(asked, found[:0]) == [] and match_boxes(asked[2:], found) == []


@pytest.mark.parametrize("size, split", [(32, "validation"), (64, "test"), ((32, 48), "test"), ((64, 32), "validation")])
def test_real_renders_score_near_one(size, split):
    scenes = Scenes(size, n=40, split=split, fields=("image", "boxes", "box_labels", "semantic")).render(range(40))
    boxes, maps = grade_layouts(scenes["image"], scenes["boxes"], scenes["box_labels"]), grade_maps(scenes["image"], scenes["semantic"])
    assert boxes["iou"]["value"] > 0.92 and boxes["label"]["value"] > 0.97 and boxes["surplus"]["value"] < 0.03, boxes
    assert maps["miou"]["value"] > 0.93 and maps["pixels"]["value"] > 0.98, maps
    assert boxes["boxes"] == int((scenes["box_labels"] >= 0).sum()) and boxes["n"] == maps["n"] == 40
    for result in (boxes["iou"], boxes["label"], maps["miou"], maps["pixels"]):
        assert result["low"] <= result["value"] <= result["high"]
    assert maps["classes"] == len(scenes["semantic"].unique())


def test_faults_of_a_picture_are_told_apart():
    red, blue = SceneObject("circle", "red", x=0.3, y=0.3), SceneObject("square", "blue", x=0.7, y=0.7)
    image = render_objects([red, blue], 32)[None]
    (boxes, labels), = read_boxes(image)
    assert labels.sort().values.tolist() == sorted([RED, NAMES.index("blue square")])
    rows = lambda asked, names: layout_rows(image, torch.as_tensor(asked)[None], torch.tensor([names]))[0].tolist()
    assert rows(boxes, labels.tolist())[1:] == [2, 2, 0]
    assert rows(boxes[:1], labels[:1].tolist())[1:] == [1, 1, 1], "one object too many"
    assert rows(boxes, [labels[0].item(), BLUE])[1:] == [1, 2, 0], "a wrong label in the right place"
    moved = torch.cat([boxes, torch.tensor([[0.9, 0.0, 1.0, 0.1]])])
    got = rows(moved, [*labels.tolist(), STAR])
    assert got[1:] == [2, 3, 0] and abs(got[0] - 2) < 1e-6, "a missing object"
    assert rows(boxes, [-1, -1]) == [0, 0, 0, 2]
    plain = torch.full((1, 3, 32, 32), 0.2)
    assert read_boxes(plain)[0][0].shape == (0, 4) and not read_maps(plain).any() and read_boxes(plain[:0]) == []
    with pytest.raises(ValueError, match="got none in 1 pictures"):
        grade_layouts(plain, torch.zeros(1, 1, 4), torch.full((1, 1), -1))
    with pytest.raises(ValueError, match="boxes"):
        layout_rows(plain, torch.zeros(2, 1, 4), torch.zeros(2, 1).long())


def test_mean_iou_is_what_a_loop_over_pixels_says():
    generator = torch.Generator().manual_seed(0)
    asked, found = torch.randint(4, (6, 5, 7), generator=generator), torch.randint(5, (6, 5, 7), generator=generator)
    shares = []
    for k in range(4):
        both = sum(a == k and b == k for a, b in zip(asked.flatten().tolist(), found.flatten().tolist()))
        either = sum(a == k or b == k for a, b in zip(asked.flatten().tolist(), found.flatten().tolist()))
        shares.append(both / either)
    assert mean_iou(map_rows(asked, found, 6)) == pytest.approx(sum(shares) / 4)
    assert mean_iou(map_rows(asked, asked, 6)) == 1
    assert mean_iou(map_rows(torch.zeros(1, 2, 2).long(), torch.ones(1, 2, 2).long(), 3)) == 0
    with pytest.raises(ValueError, match="expected .n, h, w."):
        grade_maps(torch.zeros(2, 3, 32, 32), torch.zeros(2, 16, 16).long())


def test_a_map_moved_by_a_pixel_scores_less():
    scenes = Scenes(32, n=40, fields=("image", "semantic")).render(range(40))
    found = read_maps(scenes["image"])
    values = [mean_iou(map_rows(scenes["semantic"].roll(k, -1), found)) for k in (0, 1, 3)]
    assert values[0] > values[1] + 0.05 > values[2] + 0.1


def test_the_table_has_a_row_for_every_measure():
    interval = {"value": 0.5, "low": 0.4, "high": 0.6}
    table = evaluation_table({"layout": {"n": 7, "iou": interval, "label": interval, "surplus": interval}, "semantic": {"n": 7, "miou": interval, "pixels": interval}})
    assert table.count("| 0.500 | 0.4 to 0.6 | 7 |") == 5 and "mean IoU" in table and "mIoU" in table


# ---------------------------------------------------------------- the command line

TINY = ["--size", "16", "--items", "32", "--steps", "2", "--batch-size", "4"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A tiny first stage and tiny models of boxes and of maps, trained by the command line; files to ask with."""
    folder = tmp_path_factory.mktemp("layout")
    assert cli.main(["train-autoencoder", *TINY, "--model.model-channels", "8", "--model.num-groups", "4", "--out", str(folder / "ae")]) == 0
    for name in ("layout", "semantic"):
        assert cli.main(["train", "--recipe", f"{name}-tiny", "--first-stage", str(folder / "ae"), *TINY, "--sample-every", "2", "--out", str(folder / name)]) == 0
    (folder / "asked.json").write_text(json.dumps([[["red circle", 0.1, 0.2, 0.5, 0.6]], [["blue star", 0, 0, 0.5, 0.5], ["pink ring", 0.5, 0.5, 1, 1]]]))
    values = np.zeros((16, 16), dtype=np.uint8)
    values[4:10, 4:10] = 48
    picture = Image.fromarray(values, "P")
    picture.putpalette([i for k in range(256) for i in (k, 255 - k, k)])
    picture.save(folder / "map.png")
    Image.fromarray(values, "L").save(folder / "grey.png")
    np.save(folder / "map.npy", values.astype(np.int32))
    np.save(folder / "wide.npy", np.zeros((16, 32), dtype=np.int64))
    return folder


def test_trained_models_know_their_boxes_and_maps(runs):
    assert load(runs / "layout").net.conditioner.config.label_names == NAMES
    assert load(runs / "semantic").net.conditioner.config.n_classes == SEMANTIC_CLASSES
    assert "boxes+box_labels" in load(runs / "layout").card["data"] and list((runs / "semantic" / "samples").glob("*.png"))


def test_sample_takes_layouts_and_maps(runs, tmp_path):
    base = ["sample", "--steps", "1", "--out"]
    assert cli.main([*base, str(tmp_path / "a"), "--model", str(runs / "layout"), "--layouts", str(runs / "asked.json"), "--n", "2"]) == 0
    assert len(list((tmp_path / "a").glob("0*.png"))) == 4 and json.loads((tmp_path / "a" / "samples.json").read_text())["layouts"].endswith("asked.json")
    maps = [str(runs / name) for name in ("map.png", "grey.png", "map.npy")]
    assert cli.main([*base, str(tmp_path / "b"), "--model", str(runs / "semantic"), "--maps", *maps]) == 0
    pictures = [np.asarray(Image.open(tmp_path / "b" / f"000{i}.png")) for i in range(3)]
    assert pictures[0].shape == (16, 16, 3) and json.loads((tmp_path / "b" / "samples.json").read_text())["maps"] == maps
    for kind, name in (("layout", "c"), ("semantic", "d")):
        assert cli.main([*base, str(tmp_path / name), "--model", str(runs / kind)]) == 0, "nothing asked"
    assert cli.main([*base, str(tmp_path / "e"), "--model", str(runs / "semantic"), "--maps", str(runs / "wide.npy")]) == 0
    assert Image.open(tmp_path / "e" / "0000.png").size == (32, 16)


def test_the_three_forms_of_a_map_are_one(runs):
    maps = [read_map(runs / name) for name in ("map.png", "grey.png", "map.npy")]
    assert all((m == maps[0]).all() and m.dtype == np.int64 for m in maps) and set(np.unique(maps[0])) == {0, 48}


@pytest.mark.parametrize("model, arguments, content, message", [
    ("layout", ["--layouts", "FILE.json"], "[[", r"FILE\.json: not valid JSON"), ("layout", ["--layouts", "FILE.json"], "{}", r"FILE\.json: expected a list of layouts"),
    ("layout", ["--layouts", "FILE.json"], "[]", r"FILE\.json: expected a list"), ("layout", ["--layouts", "FILE.json"], '[["red circle", 0, 0, 1, 1]]', "one more pair of brackets"),
    ("layout", ["--layouts", "FILE.json"], '[[["red zircle", 0, 0, 1, 1]]]', r"FILE\.json: layout 0, box 0.*zircle"),
    ("layout", ["--layouts", "FILE.json"], '[[], [["red star", 0, 0.9, 1, 0.3]]]', r"FILE\.json: layout 1, box 0: got y from 0\.9 to 0\.3"),
    ("layout", ["--layouts", "none.json"], None, r"none\.json"), ("layout", ["a red circle"], None, r"prompts: got some, but this model takes --layouts"),
    ("layout", ["--maps", "MAP"], None, r"--maps: got some, but this model takes --layouts"), ("semantic", ["--layouts", "ASKED"], None, "takes --maps"),
    ("semantic", ["--maps", "FILE.png"], "text", r"FILE\.png: not a readable map"), ("semantic", ["--maps", "FILE.npy"], "text", r"FILE\.npy: not a readable map"),
    ("semantic", ["--maps", "none.npy"], None, r"none\.npy"), ("semantic", ["--maps", "MAP", "--size", "32", "32"], None, "4x4 for latents of 8x8"),
])
def test_bad_requests_name_the_file(runs, tmp_path, capsys, model, arguments, content, message):
    names = {"MAP": str(runs / "map.png"), "ASKED": str(runs / "asked.json")}
    arguments = [names.get(a, str(tmp_path / a) if "." in a else a) for a in arguments]
    if content is not None:
        (tmp_path / arguments[1].split("/")[-1]).write_text(content)
    assert cli.main(["sample", "--model", str(runs / model), "--steps", "1", "--out", str(tmp_path / "out"), *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("array, message", [
    (np.zeros((16, 16)), "float64"), (np.zeros((1, 16, 16), dtype=int), r"\(1, 16, 16\)"), (np.full((16, 16), 49), "class 49 at row 0, column 0"), (np.zeros((16, 18), dtype=int), "16x18"),
])
def test_bad_arrays_name_the_file(runs, tmp_path, capsys, array, message):
    np.save(tmp_path / "bad.npy", array)
    assert cli.main(["sample", "--model", str(runs / "semantic"), "--maps", str(tmp_path / "bad.npy"), "--out", str(tmp_path / "out")]) == 2
    assert re.search(r"bad\.npy: .*" + message, capsys.readouterr().err)


def test_a_coloured_picture_is_no_map(runs, tmp_path, capsys):
    Image.new("RGB", (16, 16)).save(tmp_path / "rgb.png")
    assert cli.main(["sample", "--model", str(runs / "semantic"), "--maps", str(tmp_path / "rgb.png"), "--out", str(tmp_path / "out")]) == 2
    assert "rgb.png: not a readable map (got a picture of mode RGB" in capsys.readouterr().err


def test_joint_models_take_words_and_files(runs):
    model = joint()
    asked = gather_prompts(model, Asked(("a red circle", "a green star"), runs / "asked.json"))
    assert [set(p) for p in asked] == [{"text", "layout"}] * 2 and asked[1]["layout"][0][0] == "blue star"
    one = gather_prompts(model, Asked(("a red circle",), runs / "asked.json"))
    assert [p["text"] for p in one] == ["a red circle"] * 2
    with pytest.raises(ValueError, match="2 of layout for 3 pictures"):
        gather_prompts(model, Asked(("a red circle",) * 3, runs / "asked.json"))
    assert gather_prompts(NoCondition(), Asked()) == [] == gather_prompts(model, Asked())
    with pytest.raises(ValueError, match="map.png: semantic|map.png: map 0: got class 48"):
        gather_prompts(model, Asked(maps=(runs / "map.png",)))


def test_evaluate_measures_placement(runs, tmp_path, capsys):
    few = ["--size", "16", "--samples", "0", "--prompts", "4", "--steps", "1"]
    for name, fields in (("layout", {"iou", "label", "surplus"}), ("semantic", {"miou", "pixels"})):
        assert cli.main(["evaluate", "--model", str(runs / name), *few, "--out", str(tmp_path / f"{name}.json")]) == 0
        results = json.loads((tmp_path / f"{name}.json").read_text())
        assert fields <= set(results[name]) and results[name]["n"] == 4 and results["placement"]["objects"] == [1, 2]
        assert ("mIoU" if name == "semantic" else "mean IoU") in (tmp_path / f"{name}.md").read_text()
    assert "placement" in capsys.readouterr().out


def test_text_and_boxes_train_together(runs, tmp_path):
    from ldm_edu.ldm import load_first_stage
    from ldm_edu.recipes import train_diffusion

    data = Scenes(16, n=16, objects=(1, 2), fields=("image", "caption", "boxes", "box_labels"))
    model = train_diffusion(data, load_first_stage(runs / "ae"), DiffusionRecipe("text-mini", "text+layout"), tmp_path / "both", steps=2, batch_size=4, progress=False)
    assert isinstance(model.net.conditioner, JointConditioner)
    again = load(tmp_path / "both")
    prompts = [{"text": "a red circle", "layout": [("red circle", 0.1, 0.2, 0.5, 0.6)]}, {"layout": [("red star", 0.1, 0.2, 0.5, 0.6)]}]
    assert_close(again.sample(prompts, steps=1), model.sample(prompts, steps=1))


def test_classes_are_graded_by_the_shape_of_their_label():
    scenes = Scenes(32, n=24, split="validation", objects=(1, 1), fields=("image", "label")).render(range(24))
    right = grade_classes(scenes["image"], scenes["label"])
    assert right["n"] == 24 and right["shown"]["value"] == right["alone"]["value"] == 1 and right["shown"]["low"] < 1
    wrong = grade_classes(scenes["image"], (scenes["label"] + 1) % 6)
    assert wrong["shown"]["value"] == wrong["alone"]["value"] == 0
    two = Scenes(32, n=24, split="validation", objects=(2, 2), fields=("image", "label")).render(range(24))
    crowded = grade_classes(two["image"], two["label"])
    assert crowded["shown"]["value"] > 0.9 and crowded["alone"]["value"] == 0
    for labels in (scenes["label"][:5], scenes["label"] + 6, scenes["label"] - 7):
        with pytest.raises(ValueError, match="labels"):
            grade_classes(scenes["image"], labels)
