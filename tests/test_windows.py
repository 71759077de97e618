import itertools
import math

import pytest
import torch
from test_ldm import tiny
from torch import nn
from torch.testing import assert_close

import ldm_edu
from ldm_edu import ldm as L
from ldm_edu.conditioning import Condition
from ldm_edu.core import make_generators
from ldm_edu.windows import WindowedModel, autocorrelation, place_windows, seam_ratio, window_condition

# ---- where windows lie


@pytest.mark.parametrize("window, overlap", [(1, 0), (4, 0), (4, 1), (4, 3), (8, 4), (8, 7), (9, 2)])
def test_windows_have_one_size_and_cover_every_axis(window, overlap):
    for cells in range(1, 70):
        axis = place_windows(cells, window, overlap)
        assert {s.stop - s.start for s in axis} == {min(cells, window)} and (len(axis) == 1) == (cells <= window)
        assert axis[0].start == 0 and axis[-1].stop == cells
        assert all(0 < b.start - a.start and a.stop - b.start >= overlap for a, b in itertools.pairwise(axis))
        assert len(axis) == max(1, math.ceil((cells - overlap) / (window - overlap)))  # no more windows than needed


@pytest.mark.parametrize("window, overlap", [(0, 0), (4, 4), (4, -1), (4, 9)])
def test_windows_that_cannot_be_placed(window, overlap):
    with pytest.raises(ValueError, match=f"got {window} and {overlap}"):
        place_windows(16, window, overlap)


# ---- what they are told


def test_what_a_window_is_told():
    told = Condition(context=torch.randn(2, 3, 5), c=torch.randn(2, 4), concat=torch.randn(2, 1, 6, 12))
    place = (slice(2, 6), slice(4, 8))
    part = window_condition(told, place, 3, 6, pictures=2)
    assert part.context is told.context and part.c is told.c and part.context_mask is None
    assert torch.equal(part.concat, told.concat[:, :, 2:6, 4:8])
    everywhere = window_condition(Condition(concat=torch.randn(2, 1, 1, 1)), place, 3, 6, pictures=2)
    assert everywhere.concat.shape == (2, 1, 1, 1)
    assert len(window_condition(Condition(), place, 0, 6, 2)) == 0


def test_a_row_for_every_window_of_every_picture():
    rows = Condition(c=torch.arange(6.0)[:, None], concat=torch.randn(6, 1, 4, 4))
    parts = [window_condition(rows, (slice(0, 4), slice(0, 4)), i, 3, pictures=2) for i in range(3)]
    assert [p.c[:, 0].tolist() for p in parts] == [[0, 3], [1, 4], [2, 5]]
    assert torch.equal(parts[1].concat, rows.concat[[1, 4]])  # maps of windows are not cut again


# ---- what they say


class Local(nn.Module):
    """A model that looks at a neighbourhood, its maps, its step and its vector."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Conv2d(5, 4, 3, padding=1)

    def forward(self, x, t, condition):
        maps = torch.zeros_like(x[:, :1]) if condition.concat is None else condition.concat.expand(-1, -1, *x.shape[2:])
        told = 0 if condition.c is None else condition.c[:, :, None, None]
        return self.layer(torch.cat([x, maps], 1)) + t[:, None, None, None] + told


def test_far_from_its_edges_a_window_says_what_the_whole_would():
    model, x, t = Local().double(), torch.randn(2, 4, 20, 31, dtype=torch.float64), torch.tensor([3, 5])
    told = Condition(concat=torch.randn(2, 1, 20, 31, dtype=torch.float64), c=torch.randn(2, 1, dtype=torch.float64))
    with torch.no_grad():
        whole = model(x, t, told)
        for rows in (1, 2, 7, 100):  # how many are asked at once changes nothing
            # with an overlap of 8 the outer two cells of a window have no weight, and the layer looks one cell far
            assert_close(WindowedModel(model, 16, 8, rows)(x, t, told), whole, rtol=1e-9, atol=1e-9)
        assert (WindowedModel(model, 16, 0)(x, t, told) - whole).abs().max() > 1e-2


def test_windows_are_blended_by_weights_that_sum_to_one():
    constant = lambda x, t, condition: torch.ones_like(x) * 3
    for window, overlap in ((4, 0), (5, 1), (8, 4), (8, 7), (30, 3)):
        out = WindowedModel(constant, window, overlap)(torch.zeros(1, 2, 13, 21), torch.tensor([0]), Condition())
        assert_close(out, torch.full((1, 2, 13, 21), 3.0))


def test_each_window_hears_its_own_row():
    model = WindowedModel(lambda x, t, condition: x * 0 + condition.c[:, :, None, None], 4, 0, rows=3)
    told = Condition(c=torch.arange(12.0)[:, None])  # two pictures of 2 x 3 windows
    out = model(torch.zeros(2, 1, 8, 12), torch.zeros(2), told)
    assert torch.equal(out[:, 0, ::4, ::4], torch.arange(12.0).reshape(2, 2, 3))


def test_half_precision_and_no_rows():
    out = WindowedModel(lambda x, t, condition: x, 4, 2)(torch.ones(1, 1, 6, 6, dtype=torch.bfloat16), torch.tensor([0]), Condition())
    assert out.dtype == torch.bfloat16 and (out.float() - 1).abs().max() < 1e-2
    with pytest.raises(ValueError, match="rows: got 0"):
        WindowedModel(lambda x, t, c: x, 4, 2, rows=0)


# ---- in a model


def test_one_window_is_the_model_itself():
    model = tiny()
    draw = lambda **how: model.sample(["a", "b"], steps=3, size=(16, 32), guidance_scale=2.0, seed=3, **how)
    assert torch.equal(draw(window=32), draw())
    assert torch.equal(draw(window=64, overlap=8), draw())
    assert not torch.equal(draw(window=16), draw())


def test_pictures_by_windows_do_not_depend_on_the_batch():
    model = tiny()
    many = model.sample(["a", "b", "c"], steps=3, size=(16, 32), window=16, seed=5)
    assert many.shape == (3, 3, 16, 32)
    assert_close(model.sample(["c"], steps=3, size=(16, 32), window=16, seed=7), many[2:], atol=1e-4, rtol=0)
    assert_close(model.sample(["a", "b", "c"], steps=3, size=(16, 32), window=16, seed=5, batch_size=2), many, atol=1e-4, rtol=0)


def test_tiles_decode_what_the_whole_does():
    model = tiny(scale_factor=0.5)
    z = torch.randn(1, 4, 24, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_close(model.decode(z, tile=64), model.decode(z), atol=2e-2, rtol=0)
    assert torch.equal(model.decode(z, tile=96), model.decode(z))  # one tile


@pytest.mark.parametrize("options, message", [
    ({"window": 12}, "got 12x12"), ({"window": 16, "overlap": 6}, "got 6 pixels, expected a multiple of 4"),
    ({"window": 16, "overlap": 16}, "below the window's 16"), ({"window": 16, "overlap": -4}, "got -4"), ({"tile": 10}, "got 10x10"),
])
def test_windows_and_tiles_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        tiny().sample(["a"], steps=2, size=32, **options)


def test_prompts_for_windows_through_the_denoiser():
    model = tiny()
    read = model.net.conditioner
    draw = lambda prompts: L.draw_latents(
        lambda i, j: model.denoiser(read.from_prompts(prompts), read.null(len(prompts)), 1.5, window=16, overlap=0), (4, 4, 8), make_generators(0, 1), 1, 2,
        "ddim", lambda z: z)
    with torch.no_grad():
        left, right = draw(["a", "a"]), draw(["a", "b"])
    assert torch.equal(left[..., :4], right[..., :4]) and not torch.equal(left[..., 4:], right[..., 4:])


def test_memory_of_windows_is_that_of_rows():
    seen = []
    model = WindowedModel(lambda x, t, condition: seen.append(tuple(x.shape)) or x, 8, 4, rows=6)
    model(torch.zeros(2, 1, 40, 40), torch.zeros(2), Condition())
    assert max(shape[0] for shape in seen) == 6 and {shape[2:] for shape in seen} == {(8, 8)}
    model(torch.zeros(9, 1, 16, 16), torch.zeros(9), Condition())  # more pictures than rows: one window of each
    assert seen[-1][0] == 9


# ---- seams and repeats


def test_seams_by_hand():
    ramp = torch.tensor([0.0, 1, 2, 3, 9, 10, 11, 12]).div(12).expand(2, 3, 4, 8)
    assert seam_ratio(ramp, [4])["value"] == pytest.approx(6.0)
    assert seam_ratio(ramp, [2])["value"] == pytest.approx(1 / ((5 + 6) / 6))
    keep = torch.ones(2, 4, 8, dtype=torch.bool)
    keep[..., 6:] = False
    assert seam_ratio(ramp, [4], keep)["value"] == pytest.approx(6.0)
    keep[..., 4] = False  # no pair at the line counts any more
    with pytest.raises(ValueError, match="keep: got 0 pairs"):
        seam_ratio(ramp, [4], keep)


def test_seams_ignore_what_does_not_count():
    x = torch.zeros(1, 3, 6, 12)
    x[..., 6:] = 0.5
    x += torch.linspace(0, 0.1, 12)
    keep = torch.ones(1, 6, 12, dtype=torch.bool)
    spoiled, keep[:, 2:4, 3:5] = x.clone(), False
    spoiled[:, :, 2:4, 3:5] = -1
    assert_close(torch.tensor(seam_ratio(spoiled, [6], keep)["value"]), torch.tensor(seam_ratio(x, [6], keep)["value"]))


@pytest.mark.parametrize("lines", [[], [0], [8], [-1], range(1, 8)])
def test_lines_that_are_none(lines):
    with pytest.raises(ValueError, match="expected some of 1 to 7"):
        seam_ratio(torch.zeros(1, 3, 4, 8), lines)


def test_autocorrelation_of_waves():
    x = torch.sin(2 * math.pi * torch.arange(240.0) / 24).expand(2, 3, 4, 240)
    r = autocorrelation(x, [0, 6, 12, 24])
    assert_close(r, torch.tensor([1.0, 0, -1, 1], dtype=torch.float64).expand(2, 4), atol=0.02, rtol=0)
    assert autocorrelation(torch.full((1, 3, 4, 8), 0.3), [2]).abs().max() == 0  # nothing to compare
    for lags in ([-1], [8]):
        with pytest.raises(ValueError, match="expected 0 to 7"):
            autocorrelation(torch.zeros(1, 3, 4, 8), lags)


def test_the_shipped_model_draws_wide_pictures_without_seams():
    model = ldm_edu.load("scenes-semantic")
    maps = torch.zeros(1, 32, 128, dtype=torch.int64)
    for how in ({}, {"window": 32}):
        x = model.sample(batch={"semantic": maps}, n=1, steps=8, **how)
        assert x.shape == (1, 3, 32, 128) and seam_ratio(x, [32, 64, 96])["value"] < 2
    torn = model.sample(batch={"semantic": maps}, n=1, steps=8, window=32, overlap=0)
    assert seam_ratio(torn, [32, 64, 96])["value"] > 3
