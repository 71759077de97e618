"""Guidance: the algebra, the doubled batch, condition dropout, and the two historical bugs (PEERS 4 and 12)."""
import math

import pytest
import torch
from torch.testing import assert_close

from ldm_edu.core import make_generators
from ldm_edu.guidance import (
    CONVENTIONS,
    GuidedModel,
    drop_condition,
    drop_mask,
    guide,
    rescale_guidance,
    to_guidance_scale,
)
from ldm_edu.oracle import GaussianMixture, flow_log_prob, tilted_density
from ldm_edu.samplers import Denoiser, ddim, timesteps
from ldm_edu.schedule import make_schedule


class Rows:
    """The least a condition object must offer."""

    def __init__(self, values):
        self.values = values

    def __len__(self):
        return len(self.values)

    def cat(self, other):
        return Rows(torch.cat([self.values, other.values]))

    def select(self, keep, other):
        return Rows(torch.where(keep[:, None], self.values, other.values))


class Recorder:
    """A conditional model that mixes its rows' inputs non-linearly and remembers the batch sizes it saw."""

    def __init__(self):
        self.sizes = []

    def __call__(self, x, t, condition):
        values = condition if isinstance(condition, torch.Tensor) else condition.values
        assert len(x) == len(t) == len(values)
        self.sizes.append(len(x))
        return torch.tanh(x * values[:, :1]) + t[:, None] * values[:, 1:]


@pytest.fixture
def setting():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, generator=g)
    condition = torch.randn(5, 2, generator=g)
    return x, torch.tensor([3, 1, 4, 1, 5]), condition, torch.full((5, 2), 0.5)


def check_guide(rule):
    """What any correct rule satisfies: off at 1, unconditional at 0, straight line between and beyond."""
    g = torch.Generator().manual_seed(1)
    e_u, e_c = torch.randn(2, 4, 3, generator=g).double().unbind(0)
    assert_close(rule(e_u, e_c, 1.0), e_c)
    assert_close(rule(e_u, e_c, 0.0), e_u)
    assert_close(rule(e_u, e_c, 3.0) - rule(e_u, e_c, 2.0), e_c - e_u)
    assert_close(rule(e_c, e_c, 7.5), e_c)


def test_guide():
    check_guide(guide)


@pytest.mark.parametrize("mutant", [
    lambda e_u, e_c, s: s * e_c + (s - 1) * e_u,  # labml's comment
    lambda e_u, e_c, s: e_c + s * (e_c - e_u),  # off by one
    lambda e_u, e_c, s: s * e_c - s * e_u,
    lambda e_u, e_c, s: e_c + s * (e_u - e_c),  # swapped
])
def test_wrong_guidance_formulas_are_caught(mutant):
    with pytest.raises(AssertionError):
        check_guide(mutant)


def test_guide_takes_a_scale_per_image_and_leaves_its_inputs_alone():
    e_u, e_c = torch.randn(2, 4, 3, 2, 2).unbind(0)
    before = e_u.clone(), e_c.clone()
    scales = torch.tensor([0.0, 1.0, 2.0, 5.0])
    out = guide(e_u, e_c, scales.reshape(-1, 1, 1, 1))
    for i, s in enumerate(scales.tolist()):
        assert_close(out[i], guide(e_u[i], e_c[i], s))
    assert torch.equal(e_u, before[0]) and torch.equal(e_c, before[1])


@pytest.mark.parametrize("convention, value, scale", [("ldm", 1.0, 1.0), ("ldm", 7.5, 7.5), ("imagen", 7.5, 7.5),
                                                      ("ho", 0.0, 1.0), ("ho", 3.0, 4.0)])
def test_conventions(convention, value, scale):
    formulas = {"ldm": lambda u, c, s: u + s * (c - u), "imagen": lambda u, c, w: w * c + (1 - w) * u,
                "ho": lambda u, c, w: (1 + w) * c - w * u}
    assert set(formulas) == set(CONVENTIONS)
    assert to_guidance_scale(value, convention) == scale
    e_u, e_c = torch.randn(2, 8, dtype=torch.float64).unbind(0)
    assert_close(guide(e_u, e_c, scale), formulas[convention](e_u, e_c, value))


def test_unknown_convention():
    with pytest.raises(ValueError, match="'ldm', 'imagen', 'ho'"):
        to_guidance_scale(1.0, "labml")


@pytest.mark.parametrize("wrap", [lambda c: c, Rows], ids=["tensor", "object"])
@pytest.mark.parametrize("scale", [-1.0, 0.5, 2, 7.5])
def test_one_doubled_batch_equals_two_calls(setting, wrap, scale):
    x, t, condition, null = setting
    model = Recorder()
    before = x.clone()
    out = GuidedModel(model, wrap(condition), wrap(null), scale)(x, t)
    assert model.sizes == [10]
    assert out.shape == x.shape
    assert_close(out, guide(model(x, t, null), model(x, t, condition), scale))
    assert torch.equal(x, before)


@pytest.mark.parametrize("wrap", [lambda c: c, Rows], ids=["tensor", "object"])
def test_scale_one_is_the_conditional_and_zero_the_unconditional(setting, wrap):
    x, t, condition, null = setting
    model = Recorder()
    assert torch.equal(GuidedModel(model, wrap(condition), wrap(null), 1)(x, t), model(x, t, condition))
    assert torch.equal(GuidedModel(model, wrap(condition))(x, t), model(x, t, condition))
    assert torch.equal(GuidedModel(model, wrap(condition), wrap(null), 0)(x, t), model(x, t, null))
    assert max(model.sizes) == 5, "scales 0 and 1 need no doubled batch"


def test_a_model_that_shares_sees_each_picture_once(setting):
    x, t, condition, null = setting
    model, seen = Recorder(), []

    def shares(x, t, both, conditions=1):
        seen.append((len(x), len(t), len(both), conditions))
        return model(torch.cat([x] * conditions), torch.cat([t] * conditions), both)

    for options in ({}, {"rescale": 0.7}, {"interval": (2, 4)}):
        assert_close(GuidedModel(shares, condition, null, 3.0, shares=True, **options)(x, t), GuidedModel(model, condition, null, 3.0, **options)(x, t))
    assert seen == [(5, 5, 10, 2)] * 3 + [(5, 5, 5, 1)], "the pair, and outside the interval the condition alone"
    assert torch.equal(GuidedModel(shares, condition, null, 1.0, shares=True)(x, t), model(x, t, condition))
    with pytest.raises(ValueError, match="model: got 5 rows for 5 under two conditions, expected 10"):
        GuidedModel(lambda x, t, both, conditions: x, condition, null, 3.0, shares=True)(x, t)


def test_negative_prompt_is_another_null(setting):
    x, t, condition, null = setting
    away = Recorder()
    a = GuidedModel(away, condition, condition.flip(0), 3.0)(x, t)
    assert_close(a, guide(away(x, t, condition.flip(0)), away(x, t, condition), 3.0))


def test_guidance_commutes_with_the_kind_of_prediction(setting):
    """eps, x0 and v are affine in each other at fixed x_t, so guiding any of them is the same thing."""
    g = torch.Generator().manual_seed(2)
    x_t, e_u, e_c = torch.randn(3, 4, 3, generator=g).double().unbind(0)
    acp = 0.3
    x0 = lambda eps: (x_t - (1 - acp) ** 0.5 * eps) / acp**0.5
    v = lambda eps: acp**0.5 * eps - (1 - acp) ** 0.5 * x0(eps)
    for kind in (x0, v):
        assert_close(guide(kind(e_u), kind(e_c), 4.0), kind(guide(e_u, e_c, 4.0)))


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_scale_must_be_finite(setting, scale):
    with pytest.raises(ValueError, match="finite"):
        GuidedModel(Recorder(), setting[2], setting[3], scale)


def test_null_is_needed_and_must_fit(setting):
    with pytest.raises(ValueError, match="null: got None at guidance_scale=2"):
        GuidedModel(Recorder(), setting[2], guidance_scale=2.0)
    with pytest.raises(ValueError, match="null: got 1 rows, expected 5"):
        GuidedModel(Recorder(), setting[2], setting[3][:1], 2.0)


# ---------------------------------------------------------------- rescale
def pictures(dtype=torch.float32):
    g = torch.Generator().manual_seed(3)
    e_u, e_c = torch.randn(2, 4, 3, 8, 8, generator=g).unbind(0)
    return guide(e_u, e_c, 7.5).to(dtype), e_c.to(dtype)


def test_rescale_against_the_papers_lines():
    """Lin et al. 2023, eq. 15-16, written out per image with Python numbers."""
    guided, e_c = pictures(torch.float64)
    for phi in (0.3, 0.7):
        out = rescale_guidance(guided, e_c, phi)
        for i in range(4):
            rescaled = guided[i] * (e_c[i].std().item() / guided[i].std().item())
            assert_close(out[i], phi * rescaled + (1 - phi) * guided[i], rtol=1e-9, atol=1e-12)


def test_rescale_limits():
    guided, e_c = pictures()
    before = guided.clone(), e_c.clone()
    assert torch.equal(rescale_guidance(guided, e_c, 0.0), guided)
    assert_close(rescale_guidance(guided, e_c, 1.0).flatten(1).std(1), e_c.flatten(1).std(1))
    assert_close(rescale_guidance(e_c, e_c, 0.7), e_c)
    assert (guided.flatten(1).std(1) > 2 * e_c.flatten(1).std(1)).all(), "there was something to rescale"
    assert torch.equal(guided, before[0]) and torch.equal(e_c, before[1])
    assert rescale_guidance(torch.zeros(2, 3), torch.randn(2, 3), 0.7).isfinite().all(), "a constant has no spread"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rescale_keeps_the_dtype_and_each_row_its_own(dtype):
    guided, e_c = pictures(dtype)
    out = rescale_guidance(guided, e_c, 0.7)
    assert out.dtype == dtype and out.shape == guided.shape
    assert torch.equal(out[2:3], rescale_guidance(guided[2:3], e_c[2:3], 0.7))


@pytest.mark.parametrize("scale, rows", [(1.0, [5]), (0.0, [10]), (4.0, [10])])
def test_guided_model_rescales(setting, scale, rows):
    x, t, condition, null = setting
    model = Recorder()
    out = GuidedModel(model, condition, null, scale, rescale=0.7)(x, t)
    assert model.sizes == rows, "at scale 0 the conditional spread has to be asked for"
    e_c = model(x, t, condition)
    assert_close(out, rescale_guidance(guide(model(x, t, null), e_c, scale), e_c, 0.7))
    assert torch.equal(GuidedModel(model, condition, null, scale, rescale=0.0)(x, t), GuidedModel(model, condition, null, scale)(x, t))


# ---------------------------------------------------------------- interval
@pytest.mark.parametrize("wrap", [lambda c: c, Rows], ids=["tensor", "object"])
def test_interval_by_step(setting, wrap):
    x, _, condition, null = setting
    for t, inside in ((99, False), (100, True), (399, True), (400, False)):
        steps, model = torch.full((5,), t), Recorder()
        out = GuidedModel(model, wrap(condition), wrap(null), 4.0, interval=(100, 400))(x, steps)
        assert model.sizes == [10 if inside else 5], f"t = {t}: rows of network"
        wanted = guide(model(x, steps, null), model(x, steps, condition), 4.0 if inside else 1.0)
        assert_close(out, wanted)


def test_interval_limits(setting):
    x, t, condition, null = setting
    model = Recorder()
    plain, guided = GuidedModel(model, condition), GuidedModel(model, condition, null, 4.0)
    assert torch.equal(GuidedModel(model, condition, null, 4.0, interval=(0, 1000))(x, t), guided(x, t))
    for empty in ((0, 0), (3, 3), (700, 900)):
        model.sizes.clear()
        assert torch.equal(GuidedModel(model, condition, null, 4.0, interval=empty)(x, t), plain(x, t))
        assert model.sizes == [5, 5]
    assert torch.equal(GuidedModel(model, condition, null, 1.0, interval=(0, 3))(x, t), plain(x, t))


@pytest.mark.parametrize("scale, rescale", [(0.0, 0.0), (4.0, 0.0), (4.0, 0.7)])
def test_interval_where_rows_differ(setting, scale, rescale):
    """Training-like batches: each row is treated as it would be alone."""
    x, t, condition, null = setting
    options = {"guidance_scale": scale, "rescale": rescale, "interval": (3, 5)}
    out = GuidedModel(Recorder(), condition, null, **options)(x, t)
    for i in range(5):
        alone = GuidedModel(Recorder(), condition[i : i + 1], null[i : i + 1], **options)(x[i : i + 1], t[i : i + 1])
        assert_close(out[i], alone[0])


def test_network_rows_of_a_walk():
    """40 of 100 steps in the interval: 100 + 40 rows a sample, where guidance at all steps needs 200."""
    model, schedule = Recorder(), make_schedule()
    x, condition, null = torch.randn(3, 2), torch.randn(3, 2), torch.zeros(3, 2)
    for interval, rows in ((None, 200), ((0, 1000), 200), ((0, 0), 100), ((200, 600), 140)):
        model.sizes.clear()
        ddim(Denoiser(GuidedModel(model, condition, null, 2.0, interval=interval), schedule), x, timesteps(100, 1000))
        assert sum(model.sizes) == 3 * rows, interval


@pytest.mark.parametrize("options, message", [
    ({"rescale": -0.1}, "rescale: got -0.1"), ({"rescale": 1.5}, "rescale: got 1.5"), ({"rescale": math.nan}, "rescale: got nan"),
    ({"interval": (5, 3)}, r"interval: got \(5, 3\), expected two steps"), ({"interval": (-1, 3)}, "interval: got"),
    ({"interval": (1, 2, 3)}, "interval: got"), ({"interval": (math.nan, 3)}, "interval: got"),
])
def test_option_errors(setting, options, message):
    with pytest.raises(ValueError, match=message):
        GuidedModel(Recorder(), setting[2], setting[3], 2.0, **options)


def test_guidance_does_not_sample_the_tilted_density():
    """The exact density that a guided ODE makes of noise, against p(x) p(y|x)^s: equal at s = 0 and 1, far apart above."""
    world = GaussianMixture(torch.tensor([[-0.8, 0.0], [0.8, 0.0]]), 0.5, labels=torch.tensor([0, 1]))
    axis = (torch.arange(32).double() + 0.5) / 4 - 4
    gaps = {}
    for s in (0.0, 1.0, 3.0):
        velocity = lambda x, acp, s=s: guide(world.v(x, acp), world.given(1).v(x, acp), s)
        made = flow_log_prob(velocity, torch.cartesian_prod(axis, axis), 0.0, steps=25).exp().reshape(32, 32) / 16
        assert abs(made.sum() - 1) < 5e-3
        gaps[s] = 0.5 * (made - tilted_density(world, 1, s, axis)).abs().sum().item()
    assert max(gaps[0.0], gaps[1.0]) < 5e-3 < 0.15 < gaps[3.0], gaps


def test_drop_mask_frequency_limits_and_given_values():
    n, p = 20_000, 0.1
    dropped = drop_mask(n, p, generator=torch.Generator().manual_seed(0))
    assert dropped.dtype == torch.bool and dropped.shape == (n,)
    assert abs(dropped.double().mean() - p) < 4 * (p * (1 - p) / n) ** 0.5
    assert not drop_mask(100, 0.0).any() and drop_mask(100, 1.0).all()
    assert drop_mask(3, 0.5, uniform=torch.tensor([0.1, 0.5, 0.9])).tolist() == [True, False, False]


def test_drop_mask_of_a_sample_does_not_depend_on_its_neighbours():
    together = drop_mask(32, 0.5, generator=make_generators(7, 32))
    alone = torch.cat([drop_mask(1, 0.5, generator=make_generators(7 + i, 1)) for i in range(32)])
    assert torch.equal(together, alone)
    assert together.any() and not together.all()


def test_drop_mask_errors():
    for p in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="probability"):
            drop_mask(4, p)
    with pytest.raises(ValueError, match="one per sample"):
        drop_mask(4, 0.5, generator=make_generators(0, 3))
    with pytest.raises(ValueError, match="one per sample"):
        drop_mask(4, 0.5, uniform=torch.rand(5))


@pytest.mark.parametrize("shape", [(4,), (4, 2), (4, 3, 2)])
def test_drop_condition_replaces_exactly_the_masked_rows(shape):
    condition, null = torch.randn(shape), torch.zeros(shape)
    mask = torch.tensor([True, False, False, True])
    before = condition.clone()
    out = drop_condition(condition, null, mask)
    assert out.shape == condition.shape
    assert torch.equal(out[mask], null[mask]) and torch.equal(out[~mask], condition[~mask])
    assert torch.equal(condition, before)


def test_drop_condition_of_an_object():
    condition, null = Rows(torch.ones(4, 2)), Rows(torch.zeros(4, 2))
    out = drop_condition(condition, null, torch.tensor([True, False, False, True]))
    assert out.values[:, 0].tolist() == [0, 1, 1, 0]


def unconditional_error(p: float) -> float:
    """Train a tiny network on E[x | label] with dropout p; return its error for the null label, where the mean is due."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    table = torch.nn.Embedding(3, 1)  # two labels and the null
    optimizer = torch.optim.Adam(table.parameters(), lr=0.1)
    for _ in range(200):
        label = torch.randint(0, 2, (64,), generator=generator)
        target = torch.where(label == 0, -1.0, 3.0)[:, None]
        kept = drop_condition(label, torch.full_like(label, 2), drop_mask(64, p, generator=generator))
        loss = (table(kept) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return abs(table.weight[2].item() - 1.0)


def test_training_without_dropout_leaves_the_null_unlearned():
    assert unconditional_error(0.2) < 0.3
    assert unconditional_error(0.0) > 0.5  # bug 12: the null embedding never saw a gradient


@pytest.mark.parametrize("options, message", [
    ({"guidance_scale": "3"}, "guidance_scale: got '3', expected a finite number"), ({"guidance_scale": None}, "guidance_scale: got None"),
    ({"rescale": "0.5"}, "rescale: got '0.5', expected a number in"), ({"rescale": float("nan")}, "rescale: got nan"), ({"interval": 5}, "interval: got 5, expected two steps"),
    ({"interval": (1,)}, "interval: got .1,., expected two steps"), ({"interval": ("0", 5)}, "interval: got '0', expected two steps"),
    ({"interval": (5, float("nan"))}, "interval: got nan"), ({"interval": "ab"}, "interval: got 'ab'")])
def test_guidance_that_is_no_number_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GuidedModel(lambda x, t, c: x, torch.zeros(2, 1), torch.zeros(2, 1), **{"guidance_scale": 2.0, **options})
