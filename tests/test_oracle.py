"""Oracle: closed forms against autograd, brute force, Monte Carlo and finite differences; extreme levels; errors."""
import dataclasses
import itertools
import math
import types

import pytest
import torch
from torch.testing import assert_close

from ldm_edu import oracle as lib
from ldm_edu.core import make_generators
from ldm_edu.objective import PREDICTIONS, make_target, to_eps, to_x0
from ldm_edu.oracle import (
    GaussianMixture,
    IdealDenoiser,
    exact_flow,
    flow_log_prob,
    gaussian_flow,
    grid_moments,
    noise_density,
    tilted_density,
)
from ldm_edu.samplers import Denoiser, ddim, log_snr_timesteps
from ldm_edu.schedule import make_schedule

LEVELS = (0.0, 1e-12, 0.05, 0.5, 0.9, 0.999, 1 - 1e-12, 1.0)
SCHEDULE = make_schedule()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def covariances_of(k, d, seed=0):
    root = randn(k, d, d, seed=seed)
    return root @ root.mT + 0.1 * torch.eye(d)


def make(name):
    """Mixtures of every kind, with labels."""
    weights, labels = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0, 1, 1])
    if name == "round":
        return GaussianMixture(randn(3, 2, seed=1), torch.tensor([0.3, 0.6, 1.2]), weights, labels=labels)
    if name == "full":
        return GaussianMixture(randn(3, 2, seed=1), weights=weights, covariances=covariances_of(3, 2), labels=labels)
    if name == "five":
        return GaussianMixture(randn(3, 5, seed=2), weights=weights, covariances=covariances_of(3, 5, 3), labels=labels)
    return GaussianMixture(randn(1, 3, seed=3), covariances=covariances_of(1, 3, 4), labels=torch.tensor([0]))


NAMES = ("round", "full", "five", "single")
mixtures = pytest.mark.parametrize("mixture", [make(n) for n in NAMES], ids=NAMES)


def reference(mixture, acp):
    """The noised mixture written with torch.distributed, independently of the library."""
    d = mixture.means.shape[1]
    own = torch.diag_embed(mixture.variances) if mixture.covariances is None else mixture.covariances
    parts = torch.distributions.MultivariateNormal(math.sqrt(acp) * mixture.means, acp * own + (1 - acp) * torch.eye(d).double())
    return torch.distributions.MixtureSameFamily(torch.distributions.Categorical(mixture.weights), parts)


# ---------------------------------------------------------------- mixtures
@mixtures
@pytest.mark.parametrize("acp", LEVELS)
def test_density_against_torch_distributions(mixture, acp):
    x = 2 * randn(50, mixture.means.shape[1], seed=5)
    expected = reference(mixture, acp)
    assert_close(mixture.log_prob(x, acp), expected.log_prob(x), rtol=1e-9, atol=1e-9)
    assert_close(mixture.noised(acp).log_prob(x), expected.log_prob(x), rtol=1e-9, atol=1e-9)
    assert_close(mixture.noised(acp).mean, expected.mean)


@mixtures
@pytest.mark.parametrize("acp", LEVELS)
def test_score_is_the_gradient_of_log_prob(mixture, acp):
    x = randn(40, mixture.means.shape[1], seed=6).requires_grad_()
    gradient, = torch.autograd.grad(reference(mixture, acp).log_prob(x).sum(), x)
    own, = torch.autograd.grad(mixture.log_prob(x, acp).sum(), x)
    for got in (own, mixture.score(x, acp), mixture.noised(acp).score(x)):
        assert got.shape == x.shape
        assert_close(got, gradient, rtol=1e-8, atol=1e-8)


@mixtures
def test_score_against_finite_differences(mixture):
    x, h = randn(10, mixture.means.shape[1], seed=7), 1e-5
    for i in range(x.shape[1]):
        step = torch.zeros_like(x)
        step[:, i] = h
        slope = (mixture.log_prob(x + step, 0.4) - mixture.log_prob(x - step, 0.4)) / (2 * h)
        assert_close(mixture.score(x, 0.4)[:, i], slope, rtol=1e-6, atol=1e-7)


@mixtures
@pytest.mark.parametrize("acp", LEVELS)
def test_predictions_agree_with_each_other_and_with_tweedie(mixture, acp):
    x_t = randn(30, mixture.means.shape[1], seed=8)
    x0, eps, v = mixture.x0(x_t, acp), mixture.eps(x_t, acp), mixture.v(x_t, acp)
    assert all(p.shape == x_t.shape and p.isfinite().all() for p in (x0, eps, v))
    assert_close(math.sqrt(acp) * x0 + math.sqrt(1 - acp) * eps, x_t, rtol=0, atol=1e-10)
    assert_close(eps, -math.sqrt(1 - acp) * mixture.score(x_t, acp), rtol=1e-10, atol=1e-10)
    assert_close(v, make_target("v", x0, eps, torch.tensor(acp, dtype=torch.float64)), rtol=0, atol=1e-12)
    if acp >= 0.05:
        tweedie = (x_t + (1 - acp) * mixture.score(x_t, acp)) / math.sqrt(acp)
        assert_close(x0, tweedie, rtol=1e-9, atol=1e-9)


@mixtures
def test_both_ends(mixture):
    x = randn(20, mixture.means.shape[1], seed=9)
    assert_close(mixture.x0(x, 1.0), x)
    assert_close(mixture.x0(x, 0.0), mixture.mean.expand_as(x))
    assert_close(mixture.eps(x, 0.0), x)
    assert_close(mixture.eps(x, 1.0), torch.zeros_like(x))
    assert_close(mixture.posterior(x, 0.0), mixture.weights.expand(len(x), -1))
    assert_close(mixture.noised(0.0).covariance, torch.eye(x.shape[1]).double(), rtol=0, atol=1e-12)
    far = mixture.x0(1e6 * torch.ones_like(x), 0.5)
    assert far.isfinite().all(), "far from all data the weights must not become 0 / 0"


@mixtures
def test_x0_and_eps_are_conditional_means(mixture):
    """Self-normalised Monte Carlo over the data, with the delta method's standard error: 4.5 of them for each element."""
    n, acp = 200_000, 0.3
    data, point = mixture.sample(n, seeded(1)), mixture.noised(acp).sample(3, seeded(2))
    for x_t in point:
        noise = (x_t - math.sqrt(acp) * data) / math.sqrt(1 - acp)
        fit = (-noise.square().sum(1) / 2).softmax(0)[:, None]
        for values, exact in ((data, mixture.x0(x_t[None], acp)[0]), (noise, mixture.eps(x_t[None], acp)[0])):
            average = (fit * values).sum(0)
            error = (fit.square() * (values - average).square()).sum(0).sqrt()
            assert ((average - exact).abs() < 4.5 * error).all() and (error < 0.3 * values.std(0)).all()


@mixtures
def test_no_denoiser_does_better(mixture):
    """The exact eps has the least mean squared error: any fixed change of it does worse on the same noise."""
    x0, eps, acp = mixture.sample(20_000, seeded(3)), randn(20_000, mixture.means.shape[1], seed=4), 0.6
    x_t = math.sqrt(acp) * x0 + math.sqrt(1 - acp) * eps
    best = mixture.eps(x_t, acp)
    loss = lambda guess: (guess - eps).square().mean()
    for other in (1.05 * best, 0.95 * best, best + 0.05, mixture.eps(x_t, 0.7), eps.mean(0).expand_as(eps)):
        assert loss(other) > loss(best)


@mixtures
def test_moments_and_samples(mixture):
    n, d = 100_000, mixture.means.shape[1]
    x = mixture.sample(n, seeded(11))
    assert x.shape == (n, d) and x.dtype == torch.float64
    apart = x - mixture.mean
    assert (apart.mean(0).abs() < 4.5 * x.std(0) / n**0.5).all()
    products = apart[:, :, None] * apart[:, None]
    assert ((products.mean(0) - mixture.covariance).abs() < 4.5 * products.std(0) / n**0.5).all()
    assert torch.equal(x, mixture.sample(n, seeded(11)))
    for acp in (0.2, 0.7):
        assert_close(mixture.noised(acp).mean, math.sqrt(acp) * mixture.mean)
        assert_close(mixture.noised(acp).covariance, acp * mixture.covariance + (1 - acp) * torch.eye(d).double())


def test_samples_fill_the_components_by_weight():
    mixture = GaussianMixture(torch.tensor([[-9.0], [0.0], [9.0]]), 0.1, [0.2, 0.0, 0.8])
    x = mixture.sample(20_000, seeded())
    assert not (x.abs() < 5).any(), "a weight of 0 is never drawn"
    assert abs((x > 0).double().mean() - 0.8) < 4.5 * (0.16 / 20_000) ** 0.5


def test_a_point_has_its_own_seed():
    mixture = make("full")
    batch, alone = mixture.sample(5, make_generators(3, 5)), mixture.sample(1, make_generators(6, 1))
    assert batch.shape == (5, 2) and torch.equal(batch[3], alone[0])
    with pytest.raises(ValueError, match="got 5 generators, expected 4"):
        mixture.sample(4, make_generators(0, 5))


@mixtures
def test_noising_twice_is_noising_once(mixture):
    x = randn(10, mixture.means.shape[1], seed=13)
    assert_close(mixture.noised(0.8).noised(0.5).log_prob(x), mixture.noised(0.4).log_prob(x))


def test_round_and_full_are_one_mixture():
    means, stds = randn(4, 3, seed=14), torch.tensor([0.2, 0.5, 1.0, 2.0]).double()
    a, b = GaussianMixture(means, stds), GaussianMixture(means, covariances=torch.diag_embed(stds.square()[:, None].expand(4, 3)))
    x = randn(20, 3, seed=15)
    for method in ("x0", "eps", "v", "posterior", "score", "log_prob"):
        assert_close(getattr(a, method)(x, 0.4), getattr(b, method)(x, 0.4))
    assert_close(a.covariance, b.covariance)


@pytest.mark.parametrize("answer", ["x0", "eps", "v", "score", "log_prob", "posterior", "class_posterior"])
def test_a_level_per_row_equals_rows_alone(answer):
    mixture, levels = make("full"), torch.tensor([0.0, 0.2, 0.9, 1.0])
    x = randn(4, 2, seed=16)
    together = getattr(mixture, answer)(x, levels)
    alone = torch.cat([getattr(mixture, answer)(row[None], level.item()) for row, level in zip(x, levels)])
    assert_close(together, alone)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_follows_the_input_and_precision_does_not(dtype):
    mixture, data = make("round"), IdealDenoiser(randn(30, 2, seed=17).float())
    x = randn(8, 2, seed=18).to(dtype)
    for model in (mixture, data):
        for answer in ("x0", "eps", "v", "posterior"):
            got, wide = getattr(model, answer)(x, 0.7), getattr(model, answer)(x.double(), 0.7)
            assert got.dtype == dtype
            assert torch.equal(got, wide.to(dtype)), "computed in float64, rounded once"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_follows_the_input():
    x, t = randn(4, 2), torch.tensor([3, 500, 2, 999])
    for exact in (make("round"), make("full"), IdealDenoiser(randn(10, 2, seed=50), chunk=4)):
        for kind in PREDICTIONS:
            model = exact.model(SCHEDULE, kind)
            got = model(x.cuda(), t.cuda())
            assert got.is_cuda
            assert_close(got.cpu(), model(x, t))
    assert exact_flow(make("full").v, x.cuda(), 0.1, steps=5).is_cuda
    assert flow_log_prob(make("full").v, x.cuda(), 0.1, steps=5).is_cuda


def test_images_are_points_with_a_shape():
    mixture = GaussianMixture(randn(2, 12, seed=19), 0.4)
    x = randn(5, 3, 2, 2, seed=20)
    for answer in ("x0", "eps", "v", "score"):
        got = getattr(mixture, answer)(x, 0.5)
        assert got.shape == x.shape
        assert_close(got.flatten(1), getattr(mixture, answer)(x.flatten(1), 0.5))


# ---------------------------------------------------------------- classes
def test_classes():
    mixture, x = make("full"), randn(20, 2, seed=21)
    for acp in (0.0, 0.4, 1.0):
        posterior = mixture.class_posterior(x, acp).exp()
        assert_close(posterior.sum(1), torch.ones(20).double())
        assert_close(posterior[:, 0], mixture.posterior(x, acp)[:, 0])
        for y, prior in ((0, 0.5), (1, 0.5)):
            bayes = mixture.given(y).log_prob(x, acp) + math.log(prior) - mixture.log_prob(x, acp)
            assert_close(mixture.class_posterior(x, acp)[:, y], bayes)
    assert_close(mixture.given(1).weights, torch.tensor([0.6, 0.4]).double())
    inputs = x.clone().requires_grad_()
    gradient, = torch.autograd.grad(mixture.class_posterior(inputs, 0.4)[:, 1].sum(), inputs)
    assert_close(gradient, mixture.given(1).score(x, 0.4) - mixture.score(x, 0.4))


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("model", ["mixture", "data"])
def test_conditional_model_mixes_labels_in_a_batch(model, kind):
    exact = make("full") if model == "mixture" else IdealDenoiser(randn(30, 2, seed=22), torch.arange(30) % 2)
    x, t, y = randn(6, 2, seed=23), torch.tensor([10, 10, 300, 300, 999, 0]), torch.tensor([0, -1, 1, 0, -1, 1])
    got = exact.conditional_model(SCHEDULE, kind)(x, t, y)
    for i in range(6):
        part = exact if y[i] == -1 else exact.given(y[i].item())
        assert_close(got[i], part.model(SCHEDULE, kind)(x[i : i + 1], t[i : i + 1])[0])
    other = exact.conditional_model(SCHEDULE, kind, null=2)(x, t, torch.where(y == -1, 2, y))
    assert torch.equal(got, other)
    with pytest.raises(ValueError, match="label: got 7, expected one of"):
        exact.conditional_model(SCHEDULE, kind)(x, t, torch.full((6,), 7))


# ---------------------------------------------------------------- as networks
@pytest.mark.parametrize("exact", [make("full"), IdealDenoiser(randn(40, 2, seed=24)), IdealDenoiser(randn(40, 2, seed=24), std=0.2)],
                         ids=["mixture", "data", "blurred"])
def test_models_fit_the_samplers(exact):
    x_T, steps = randn(6, 2, seed=25), log_snr_timesteps(20, SCHEDULE.alphas_cumprod.tolist())
    walks = {kind: ddim(Denoiser(exact.model(SCHEDULE, kind), SCHEDULE, kind), x_T, steps) for kind in PREDICTIONS}
    for kind in PREDICTIONS:
        assert_close(walks[kind], walks["eps"], rtol=0, atol=1e-8)
        raw = exact.model(SCHEDULE, kind)(x_T, 500)
        acp = SCHEDULE.alphas_cumprod[500].double()
        assert_close(to_x0(kind, raw, x_T, acp), exact.x0(x_T, acp), rtol=0, atol=1e-9)
        assert_close(to_eps(kind, raw, x_T, acp), exact.eps(x_T, acp), rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="prediction: got 'noise'"):
        exact.model(SCHEDULE, "noise")


def test_zero_terminal_snr():
    schedule = make_schedule(zero_terminal_snr=True)
    for exact in (make("full"), IdealDenoiser(randn(40, 2, seed=26))):
        x = randn(3, 2, seed=27)
        mean = exact.mean if isinstance(exact, GaussianMixture) else exact.data.mean(0)
        assert_close(exact.model(schedule, "x0")(x, torch.full((3,), 999)), mean.expand(3, 2))
        assert_close(exact.model(schedule, "v")(x, torch.full((3,), 999)), -mean.expand(3, 2))
        assert_close(exact.model(schedule, "eps")(x, torch.full((3,), 999)), x)


# ---------------------------------------------------------------- the flow
@pytest.mark.parametrize("mixture", [make(n) for n in NAMES[:3]], ids=NAMES[:3])
def test_flow_order(mixture):
    x = randn(50, mixture.means.shape[1], seed=28)
    fine = exact_flow(mixture.v, x, 0.01, 1.0, steps=400)
    errors = [(exact_flow(mixture.v, x, 0.01, 1.0, steps=n) - fine).abs().max().item() for n in (25, 50, 100)]
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert min(orders) > 3.5, f"errors {errors}: a fourth-order rule gains 16 each time"
    assert errors[-1] < 1e-4, "by extrapolation the default of 400 steps is right to 1e-6"


@pytest.mark.parametrize("levels", [(0.0, 1.0), (1e-4, 1.0), (0.01, 0.9), (0.9, 0.01), (0.3, 0.3), (1.0, 0.0)])
def test_one_gaussian_in_closed_form(levels):
    gaussian, x = make("single"), randn(20, 3, seed=29)
    exact = gaussian_flow(gaussian, x, *levels)
    assert_close(exact_flow(gaussian.v, x, *levels, steps=300), exact, rtol=0, atol=1e-7)
    assert_close(gaussian_flow(gaussian, exact, *reversed(levels)), x, rtol=0, atol=1e-10)


def test_the_flow_carries_one_density_into_the_other():
    """The closed-form map is affine: mean and covariance go where the forward process puts them."""
    gaussian, (a, b) = make("single"), (0.2, 0.9)
    start, end = gaussian.noised(a), gaussian.noised(b)
    origin = gaussian_flow(gaussian, start.mean[None], a, b)[0]
    jacobian = gaussian_flow(gaussian, start.mean + torch.eye(3), a, b) - origin
    assert_close(origin, end.mean)
    assert_close(jacobian.T @ start.covariance @ jacobian, end.covariance)
    with pytest.raises(ValueError, match="got 3 components, expected one"):
        gaussian_flow(make("full"), torch.zeros(1, 2), a, b)


@mixtures
def test_flow_and_back(mixture):
    x = mixture.sample(20, seeded(30))
    there = exact_flow(mixture.v, x, 1.0, 0.0, steps=300)
    assert_close(exact_flow(mixture.v, there, 0.0, 1.0, steps=300), x, rtol=0, atol=1e-4)
    assert (there.std(0) > 0.3).all()


def test_flow_dtype_and_errors():
    mixture = make("round")
    assert exact_flow(mixture.v, torch.zeros(2, 2), 0.1, steps=5).dtype == torch.float32
    x = torch.zeros(2, 2)
    assert torch.equal(exact_flow(mixture.v, x, 0.1, steps=5), exact_flow(mixture.v, x.double(), 0.1, steps=5).float())
    for steps in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="steps: got"):
            exact_flow(mixture.v, x, 0.1, steps=steps)
    for acp in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"expected \[0, 1\]"):
            exact_flow(mixture.v, x, acp)


@pytest.mark.parametrize("name", ["round", "full", "single"])
def test_flow_density_is_the_data_density(name):
    mixture = make(name)
    x = mixture.sample(40, seeded(31))
    assert_close(flow_log_prob(mixture.v, x, 0.0, 1.0, steps=150), mixture.log_prob(x), rtol=0, atol=1e-4)
    assert_close(flow_log_prob(mixture.v, x, 0.0, 0.6, steps=60), mixture.log_prob(x, 0.6), rtol=0, atol=1e-4)


# ---------------------------------------------------------------- finite data
def brute_force(data, x_t, acp, std=0.0):
    """E[x0 | x_t] one row and one item at a time, in Python floats where it matters."""
    variance = acp * std**2 + 1 - acp
    rows = []
    for row in x_t.double():
        logs = [-(row - math.sqrt(acp) * item).square().sum().item() / (2 * variance) for item in data.double()]
        top = max(logs)
        shares = [math.exp(value - top) for value in logs]
        expected = [item + math.sqrt(acp) * std**2 / variance * (row - math.sqrt(acp) * item) for item in data.double()]
        rows.append(sum(s * e for s, e in zip(shares, expected)) / sum(shares))
    return torch.stack(rows)


@pytest.mark.parametrize("shape", [(2,), (3, 4, 4), (1, 2, 2, 2)])
@pytest.mark.parametrize("std", [0.0, 0.3])
@pytest.mark.parametrize("acp", [0.0, 0.01, 0.5, 0.99, 1 - 1e-9])
def test_ideal_denoiser_against_brute_force(shape, std, acp):
    data, x_t = randn(37, *shape, seed=32), randn(5, *shape, seed=33)
    got = IdealDenoiser(data, std=std, chunk=10).x0(x_t, acp)
    assert got.shape == x_t.shape
    assert_close(got, brute_force(data, x_t, acp, std), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("chunk", [1, 7, 37, 1000])
def test_chunk_size_does_not_matter(chunk):
    data, x_t = randn(37, 3, 4, 4, seed=34), randn(5, 3, 4, 4, seed=35)
    a, b = IdealDenoiser(data), IdealDenoiser(data, chunk=chunk)
    for acp in (0.0, 0.3, 0.9999):
        assert_close(a.x0(x_t, acp), b.x0(x_t, acp), rtol=1e-12, atol=1e-12)
        assert_close(a.posterior(x_t, acp), b.posterior(x_t, acp), rtol=1e-9, atol=1e-12)
    assert torch.equal(a.nearest(x_t)[0], b.nearest(x_t)[0])


@pytest.mark.parametrize("std", [0.02, 0.3])
@pytest.mark.parametrize("acp", LEVELS)
def test_blurred_data_are_a_mixture(std, acp):
    data, x_t = randn(25, 6, seed=36), randn(7, 6, seed=37)
    mixture, ideal = GaussianMixture(data, std), IdealDenoiser(data, std=std, chunk=8)
    for answer in ("x0", "eps", "v", "posterior"):
        assert_close(getattr(ideal, answer)(x_t, acp), getattr(mixture, answer)(x_t, acp), rtol=1e-6, atol=1e-7)


def test_ideal_denoiser_at_extreme_levels():
    data, x_t = randn(50, 3, 4, 4, seed=38), 2 * randn(6, 3, 4, 4, seed=39)
    ideal = IdealDenoiser(data, chunk=16)
    index = torch.cdist(x_t.flatten(1), data.flatten(1)).argmin(1)
    for acp in (1 - 1e-15, 1.0):
        assert_close(ideal.x0(x_t, acp), data[index])
    assert_close(ideal.x0(x_t, 0.0), data.mean(0).expand_as(x_t))
    assert_close(ideal.eps(x_t, 0.0), x_t)
    for acp in (1e-15, 1 - 1e-15):
        assert ideal.eps(x_t, acp).isfinite().all() and ideal.v(x_t, acp).isfinite().all()
        assert_close(ideal.posterior(x_t, acp).sum(1), torch.ones(6).double())
    for answer in ("eps", "v"):
        with pytest.raises(ValueError, match="got 1 with std=0, where points have no score"):
            getattr(ideal, answer)(x_t, 1.0)
    far = ideal.x0(1e8 * torch.ones_like(x_t), 0.999)
    assert far.isfinite().all(), "log space: weights that all underflow still have a largest"


def test_float32_pictures_keep_float64_weights():
    """At little noise the logits are differences of large numbers: in float32 they would be wrong by whole nats."""
    data = torch.rand(64, 3, 16, 16, generator=seeded(40)) * 2 - 1
    twin = data[:1] + 0.002 * torch.randn(1, 3, 16, 16, generator=seeded(41))
    data = torch.cat([data, twin])
    x_t = data[:1]
    exact = torch.tensor([0.0, -(1 - 1e-3) * (data[0].double() - data[64].double()).square().sum() / (2 * 1e-3)]).double().softmax(0)
    got = IdealDenoiser(data, chunk=10).posterior(x_t.double() * math.sqrt(1 - 1e-3), 1 - 1e-3)[0, [0, 64]]
    assert_close(got, exact, rtol=1e-5, atol=1e-9)
    assert 0.01 < exact[1] < 0.5


def test_nearest():
    data = randn(40, 3, 4, 4, seed=42)
    ideal = IdealDenoiser(data, chunk=7)
    index, distance = ideal.nearest(data[[31, 2, 17]])
    assert index.tolist() == [31, 2, 17] and distance.tolist() == [0.0, 0.0, 0.0]
    x = randn(6, 3, 4, 4, seed=43)
    index, distance = ideal.nearest(x)
    all_distances = (x[:, None] - data).square().flatten(2).mean(2).sqrt()
    assert_close(distance, all_distances.min(1).values)
    assert torch.equal(index, all_distances.argmin(1))


def test_given_labels():
    data, labels = randn(30, 2, seed=44), torch.arange(30) % 3
    ideal, x = IdealDenoiser(data, labels, std=0.1, chunk=4), randn(5, 2, seed=45)
    for y in range(3):
        assert_close(ideal.given(y).x0(x, 0.4), brute_force(data[labels == y], x, 0.4, 0.1))
    with pytest.raises(ValueError, match=r"label: got 3, expected one of \[0, 1, 2\]"):
        ideal.given(3)
    with pytest.raises(ValueError, match="label: got 0, expected one of None"):
        IdealDenoiser(data).given(0)


def test_a_walk_of_the_ideal_denoiser_ends_on_the_data():
    data = torch.rand(60, 3, 8, 8, generator=seeded(46)) * 2 - 1
    ideal = IdealDenoiser(data)
    x = ddim(Denoiser(ideal.model(SCHEDULE, "x0"), SCHEDULE, "x0"), torch.randn(8, 3, 8, 8, generator=seeded(47)),
             log_snr_timesteps(20, SCHEDULE.alphas_cumprod.tolist()))
    index, distance = ideal.nearest(x)
    assert distance.max() < 1e-5 and len(set(index.tolist())) > 3


def test_memory_does_not_grow_with_the_set():
    """The softmax never holds more than one chunk: the largest tensor that it makes has (b, chunk) or (chunk, d) elements."""
    seen = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and not out._is_view():
                seen.append(out.numel())
            return out

    data, x = randn(4000, 10, seed=48), randn(3, 10, seed=49)
    ideal = IdealDenoiser(data, chunk=100)
    with Spy():
        ideal.x0(x, 0.5)
    assert max(seen) <= 1000, "more than a chunk was made at once"


# ---------------------------------------------------------------- grids
AXIS = (torch.arange(128).double() + 0.5) / 8 - 8


def test_tilted_density_at_scale_one_and_zero():
    mixture = make("full").noised(0.8)
    grid, width = torch.cartesian_prod(AXIS, AXIS), 1 / 8
    for scale, part in ((0.0, mixture), (1.0, mixture.given(1))):
        p = tilted_density(mixture, 1, scale, AXIS)
        assert p.shape == (128, 128) and abs(p.sum() - 1) < 1e-12
        assert_close(p, part.log_prob(grid).exp().reshape(128, 128) * width**2, rtol=3e-3, atol=1e-6)
        mean, covariance = grid_moments(p, AXIS)
        assert_close(mean, part.mean, rtol=0, atol=2e-3)
        assert_close(covariance, part.covariance, rtol=0, atol=2e-2)
    noisy = tilted_density(mixture, 1, 1.0, AXIS, acp=0.3)
    assert_close(noisy, tilted_density(mixture.noised(0.3), 1, 1.0, AXIS))


def test_tilted_gaussians_in_closed_form():
    """Two round Gaussians of one spread, equal weights: p(x|y)^s p(x)^(1-s) has moments that a fine sum in 1-D gives."""
    mixture = GaussianMixture(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]).double(), 0.5, labels=torch.tensor([0, 1]))
    line = torch.linspace(-8, 8, 20001).double()
    for s in (2.0, 5.0):
        normal = lambda centre: torch.exp(-(line - centre).square() / (2 * 0.25))
        mass = normal(1.0) ** s * (normal(1.0) + normal(-1.0)) ** (1 - s)
        mean = (mass * line).sum() / mass.sum()
        got, covariance = grid_moments(tilted_density(mixture, 1, s, AXIS), AXIS)
        assert_close(got, torch.stack([mean, torch.zeros(()).double()]), rtol=0, atol=1e-4)
        assert_close(covariance[1, 1], torch.tensor(0.25).double(), rtol=1e-3, atol=0)
        assert got[0] > 1.0


def test_noise_density_is_the_forward_process():
    mixture = make("full").noised(0.9)
    clean = tilted_density(mixture, 1, 1.0, AXIS)
    for acp in (0.0, 0.2, 0.7, 0.95):
        noised = noise_density(clean, AXIS, acp)
        assert_close(noised, tilted_density(mixture.noised(acp), 1, 1.0, AXIS), rtol=0, atol=2e-5)
    assert torch.equal(noise_density(clean, AXIS, 1.0), clean)
    for acp in (0.9999, -0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="a noise of at least one cell"):
            noise_density(clean, AXIS, acp)


def test_guided_flows_keep_their_mass():
    """`flow_log_prob` takes any velocity: a guided one makes a density too, but another one than the class."""
    mixture = GaussianMixture(torch.tensor([[-0.8, 0.0], [0.8, 0.0]]), 0.5, labels=torch.tensor([0, 1]))
    axis = (torch.arange(24).double() + 0.5) / 3 - 4
    part = mixture.given(1)
    guided = lambda x, acp: mixture.v(x, acp) + 2 * (part.v(x, acp) - mixture.v(x, acp))
    made = flow_log_prob(guided, torch.cartesian_prod(axis, axis), 0.0, steps=20).exp().reshape(24, 24) / 9
    assert abs(made.sum() - 1) < 5e-3
    assert (made - tilted_density(mixture, 1, 1.0, axis)).abs().sum() > 0.2


# ---------------------------------------------------------------- errors
@pytest.mark.parametrize("change, message", [
    ({"means": torch.zeros(3)}, r"means: got shape \(3,\), expected \(k d\)"),
    ({"means": torch.full((3, 2), math.nan)}, "means: got values that are not finite"),
    ({"stds": None}, "got none of stds and covariances"),
    ({"covariances": torch.eye(2).expand(3, 2, 2)}, "got both of stds and covariances"),
    ({"stds": torch.ones(2)}, r"stds.*got shape \(2,\), expected \(k\), k=3"),
    ({"stds": torch.eye(2).expand(3, 2, 2)}, r"full matrices are covariances=.*got shape \(3, 2, 2\)"),
    ({"stds": [1.0, 0.0, 1.0]}, "stds: got .* expected numbers above 0"),
    ({"stds": [1.0, math.inf, 1.0]}, "stds: got values that are not finite"),
    ({"stds": None, "covariances": torch.eye(2).expand(2, 2, 2)}, r"covariances: got shape \(2, 2, 2\)"),
    ({"stds": None, "covariances": torch.zeros(3, 2, 2)}, "smallest eigenvalue of 0"),
    ({"stds": None, "covariances": torch.tensor([[1.0, 0.5], [0.0, 1.0]]).expand(3, 2, 2)}, "not symmetric"),
    ({"weights": [1.0, -1.0, 1.0]}, "weights: got"),
    ({"weights": [0.0, 0.0, 0.0]}, "not all 0"),
    ({"weights": torch.ones(4)}, r"weights: got shape \(4,\)"),
    ({"weights": [1.0, math.nan, 1.0]}, "weights: got values that are not finite"),
    ({"labels": torch.zeros(4)}, r"labels: got shape \(4,\)"),
])
def test_mixture_errors(change, message):
    with pytest.raises(ValueError, match=message):
        GaussianMixture(**{"means": torch.zeros(3, 2), "stds": torch.ones(3), **change})


def test_mixtures_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make("round").means = torch.zeros(3, 2)
    given = torch.zeros(1, 2)
    mixture = GaussianMixture(given, 1.0)
    given += 1
    assert mixture.mean.tolist() == [0.0, 0.0]


def test_input_errors():
    mixture, ideal = make("round"), IdealDenoiser(torch.zeros(4, 3, 2, 2))
    with pytest.raises(ValueError, match=r"got shape \(5, 3\), expected 2 elements a row"):
        mixture.x0(torch.zeros(5, 3), 0.5)
    with pytest.raises(ValueError, match=r"got shape \(5, 3\), expected \(b, 3, 2, 2\)"):
        ideal.x0(torch.zeros(5, 3), 0.5)
    for model, x in ((mixture, torch.zeros(4, 2)), (ideal, torch.zeros(4, 3, 2, 2))):
        for acp in (-0.1, 1.1, math.nan):
            with pytest.raises(ValueError, match=r"acp: got values in .* expected \[0, 1\]"):
                model.eps(x, acp)
        with pytest.raises(ValueError, match=r"acp: got shape \(3,\), expected one number or \(4,\)"):
            model.x0(x, torch.full((3,), 0.5))
        with pytest.raises(ValueError, match="expected floating point"):
            model.x0(x.long(), 0.5)
    with pytest.raises(ValueError, match="got 2 levels, expected one"):
        mixture.noised(torch.tensor([0.1, 0.2]))
    unlabelled = GaussianMixture(torch.zeros(1, 2), 1.0)
    with pytest.raises(ValueError, match="labels: got None"):
        unlabelled.class_posterior(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="label: got 0, expected one of None"):
        unlabelled.given(0)
    with pytest.raises(ValueError, match=r"label: got 5, expected one of \[0, 1\]"):
        mixture.given(5)


@pytest.mark.parametrize("arguments, message", [
    ({"data": torch.zeros(0, 3)}, r"data: got .* of shape \(0, 3\)"),
    ({"data": torch.zeros(3)}, r"expected floating point \(n, \.\.\.\)"),
    ({"data": torch.zeros(3, 2).long()}, "torch.int64"),
    ({"data": [[0.0]]}, "data: got list"),
    ({"data": torch.full((3, 2), math.inf)}, "not finite"),
    ({"labels": torch.zeros(2)}, r"labels: got shape \(2,\), expected \(3,\)"),
    ({"std": -1.0}, "std=-1"),
    ({"std": math.nan}, "std=nan"),
    ({"chunk": 0}, "chunk=0"),
])
def test_data_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        IdealDenoiser(**{"data": torch.zeros(3, 2), **arguments})


def test_grid_errors():
    mixture = make("full").noised(0.8)
    with pytest.raises(ValueError, match="mixture.means: got shape"):
        tilted_density(make("five"), 0, 1.0, AXIS)
    with pytest.raises(ValueError, match="label: got 9"):
        tilted_density(mixture, 9, 1.0, AXIS)
    with pytest.raises(ValueError, match="widen or refine"):
        tilted_density(mixture, 0, 1.0, AXIS / 8)
    with pytest.raises(ValueError, match="widen or refine"):
        tilted_density(GaussianMixture(torch.zeros(1, 2), 0.01, labels=torch.zeros(1)), 0, 1.0, AXIS)
    for axis in (AXIS.flip(0), AXIS.square(), AXIS[:1]):
        with pytest.raises(ValueError, match="axis: expected"):
            tilted_density(mixture, 0, 1.0, axis)
    with pytest.raises(ValueError, match="density: got shape"):
        grid_moments(torch.ones(3, 3), AXIS)
    with pytest.raises(ValueError, match="density: got shape"):
        noise_density(torch.ones(3, 3), AXIS, 0.5)
    with pytest.raises(ValueError, match="x: got shape"):
        flow_log_prob(make("five").v, torch.zeros(2, 5, 1), 0.0)


def test_public_names_have_sources():
    """Each formula's docstring says where it is from."""
    for owner, name in ((lib.MixtureDensity, "score"), (GaussianMixture, "x0"), (GaussianMixture, "eps"), (GaussianMixture, "noised"),
                        (lib.ExactDenoiser, "v"), (IdealDenoiser, "x0"), (lib, "exact_flow"), (lib, "flow_log_prob")):
        assert "[" in getattr(owner, name).__doc__
    assert isinstance(lib, types.ModuleType)
