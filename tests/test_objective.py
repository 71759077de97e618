"""Predictions, weights, losses and training steps: closed forms, Gaussian oracles, and the historical bugs 13 and 20."""
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from ldm_edu.core import make_generators
from ldm_edu.objective import (
    DISTANCES,
    PREDICTIONS,
    TIMESTEP_SAMPLERS,
    WEIGHTINGS,
    ObjectiveConfig,
    bits_per_dim,
    diffusion_loss,
    loss_weights,
    make_target,
    prior_kl,
    sample_timesteps,
    to_eps,
    to_v,
    to_x0,
    variational_bound,
    weights_at,
)
from ldm_edu.schedule import NoiseSchedule, gather, make_schedule

CONVERT = {"x0": to_x0, "eps": to_eps, "v": to_v}
PAIRS = list(itertools.product(PREDICTIONS, PREDICTIONS))


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def triple(acp, shape=(4, 3, 5, 5), dtype=torch.float64):
    """x0, eps, x_t and the velocity, written out here on their own."""
    x0, eps = noise(*shape, dtype=dtype), noise(*shape, seed=1, dtype=dtype)
    a, s = math.sqrt(acp), math.sqrt(1 - acp)
    return {"x0": x0, "eps": eps, "v": a * eps - s * x0}, a * x0 + s * eps


def gaussian_model(schedule, kind, spread=0.5):
    """The ideal network for x0 ~ N(0, spread^2): E[target | x_t] is linear in x_t."""

    def model(x_t, t):
        acp = gather(schedule.alphas_cumprod, t, x_t)
        total = acp * spread**2 + 1 - acp
        x0, eps = acp.sqrt() * spread**2 * x_t / total, (1 - acp).sqrt() * x_t / total
        return {"x0": x0, "eps": eps, "v": acp.sqrt() * eps - (1 - acp).sqrt() * x0}[kind].to(x_t.dtype)

    return model


# ---------------------------------------------------------------- conversions


@pytest.mark.parametrize(("source", "goal"), PAIRS)
@pytest.mark.parametrize("acp", [1e-6, 0.01, 0.5, 0.99, 1 - 1e-6])
def test_every_conversion_gives_the_truth(source, goal, acp):
    truth, x_t = triple(acp)
    got = CONVERT[goal](source, truth[source], x_t, torch.tensor(acp, dtype=torch.float64))
    assert got.shape == x_t.shape and got.dtype == x_t.dtype
    assert_close(got, truth[goal], rtol=1e-7, atol=1e-7)


@settings(max_examples=60, deadline=None)
@given(pair=st.sampled_from(PAIRS), acp=st.floats(1e-4, 1 - 1e-4), seed=st.integers(0, 999))
def test_round_trips_of_arbitrary_predictions(pair, acp, seed):
    """A network's output is not the truth: conversions must still undo each other."""
    source, goal = pair
    acp = torch.tensor(acp, dtype=torch.float64)
    pred, x_t = noise(2, 7, seed=seed), noise(2, 7, seed=seed + 1)
    there = CONVERT[goal](source, pred, x_t, acp)
    assert_close(CONVERT[source](goal, there, x_t, acp), pred, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_converted_pairs_always_rebuild_x_t(kind):
    acp, x_t, pred = torch.tensor([0.001, 0.3, 0.6, 0.999]).double()[:, None], noise(4, 6), noise(4, 6, seed=1)
    x0, eps, v = (CONVERT[goal](kind, pred, x_t, acp) for goal in ("x0", "eps", "v"))
    assert_close(acp.sqrt() * x0 + (1 - acp).sqrt() * eps, x_t)
    assert_close(acp.sqrt() * eps - (1 - acp).sqrt() * x0, v)


def test_kinds_are_not_interchangeable():
    """Historical bug 13: an x0-prediction read as if it were noise."""
    schedule, t = make_schedule(), torch.tensor([100, 500])
    x0, eps = noise(2, 8), noise(2, 8, seed=1)
    acp, x_t = gather(schedule.alphas_cumprod, t, x0), schedule.add_noise(x0, eps, t)
    for network, reader in PAIRS:
        got = to_x0(reader, make_target(network, x0, eps, acp), x_t, acp)
        assert ((got - x0).abs().max() < 1e-5) == (network == reader), (network, reader)


def test_ideal_networks_of_each_kind_are_one_denoiser():
    schedule, t, x_t = make_schedule(), torch.tensor([0, 10, 500, 999]), noise(4, 8)
    acp = gather(schedule.alphas_cumprod, t, x_t)
    readings = {k: gaussian_model(schedule, k)(x_t, t) for k in PREDICTIONS}
    for goal, convert in CONVERT.items():
        for kind in PREDICTIONS:
            assert_close(convert(kind, readings[kind], x_t, acp), readings[goal], rtol=1e-6, atol=1e-6)


def test_limits_of_all_signal_and_all_noise():
    truth, nothing = triple(0.0)[0], torch.tensor(0.0)
    x_t = truth["eps"]
    assert_close(to_x0("v", truth["v"], x_t, nothing), truth["x0"])
    assert_close(to_x0("x0", truth["x0"], x_t, nothing), truth["x0"])
    assert_close(to_eps("x0", truth["x0"], x_t, nothing), truth["eps"])
    assert_close(to_v("x0", truth["x0"], x_t, nothing), -truth["x0"])
    assert not to_x0("eps", truth["eps"], x_t, nothing).isfinite().any()
    truth, everything = triple(1.0)[0], torch.tensor(1.0)
    x_t = truth["x0"]
    assert_close(to_eps("v", truth["v"], x_t, everything), truth["eps"])
    assert_close(to_x0("eps", truth["eps"], x_t, everything), truth["x0"])
    assert_close(to_v("eps", truth["eps"], x_t, everything), truth["eps"])
    assert not to_eps("x0", truth["x0"], x_t, everything).isfinite().any()


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_targets_by_hand_and_broadcasting(kind):
    acp = torch.tensor([0.2, 0.9]).double().reshape(2, 1, 1)
    x0, eps = noise(2, 3, 4), noise(2, 3, 4, seed=1)
    got = make_target(kind, x0, eps, acp)
    for i, a in enumerate((0.2, 0.9)):
        assert_close(got[i], {"x0": x0[i], "eps": eps[i], "v": a**0.5 * eps[i] - (1 - a) ** 0.5 * x0[i]}[kind])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("source", "goal"), PAIRS)
def test_conversions_keep_the_dtype_and_compute_in_float32(source, goal, dtype):
    truth, x_t = triple(0.99, dtype=torch.float64)
    pred, x_t = truth[source].to(dtype), x_t.to(dtype)
    got = CONVERT[goal](source, pred, x_t, torch.tensor(0.99))
    assert got.dtype == dtype
    exact = CONVERT[goal](source, pred.double(), x_t.double(), torch.tensor(0.99).double())
    assert_close(got.double(), exact, rtol=4 * torch.finfo(dtype).eps, atol=1e-4)
    mixed = CONVERT[goal](source, pred, x_t.float(), torch.tensor(0.99))  # autocast: half prediction, full x_t
    assert mixed.dtype == torch.promote_types(dtype, torch.float32)


def test_half_precision_alphas_do_not_lose_the_noise():
    x = torch.ones(1, 4, dtype=torch.bfloat16)
    assert to_eps("x0", 0 * x, x, torch.tensor(0.9999)).float().mean().item() == pytest.approx(100, rel=0.01)


@pytest.mark.parametrize("call", [to_x0, to_eps, to_v, make_target])
def test_unknown_kinds_are_refused(call):
    with pytest.raises(ValueError, match="eps"):
        call("epsilon", torch.zeros(1, 1), torch.zeros(1, 1), torch.tensor(0.5))


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize("name", [w for w in WEIGHTINGS if w != "simple"])
def test_a_weighting_is_one_objective_whatever_is_predicted(name):
    """The same wrong guess, written as eps, x0 or v, must cost the same under every named weighting but "simple"."""
    schedule, t = make_schedule(), torch.tensor([0, 1, 250, 600, 999])
    x0, eps = noise(5, 6), noise(5, 6, seed=1)
    x_t, acp = schedule.add_noise(x0, eps, t), gather(schedule.alphas_cumprod, t, x0)
    guess = noise(5, 6, seed=2)
    costs = []
    for kind in PREDICTIONS:
        pred = CONVERT[kind]("x0", guess, x_t, acp)
        error = (pred - make_target(kind, x0, eps, acp)).square().mean(1).float()
        costs.append(error * weights_at(name, kind, schedule, t))
        loss = diffusion_loss(lambda *_, p=pred: p, x0, schedule, t, eps, kind, name)
        assert_close(loss.float(), costs[-1], rtol=1e-5, atol=0)
    assert_close(costs[1], costs[0], rtol=1e-3, atol=0)
    assert_close(costs[2], costs[0], rtol=1e-3, atol=0)


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_vlb_is_the_kl_between_the_two_reverse_steps(kind):
    """DDPM eq. 5: L_{t-1} = KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)), here from the two posterior means."""
    schedule, t = make_schedule("linear", 200, 1e-3, 0.1), torch.tensor([1, 2, 50, 120, 199])
    x0, eps, guess = noise(5, 6), noise(5, 6, seed=1), noise(5, 6, seed=2)
    x_t, acp = schedule.add_noise(x0, eps, t), gather(schedule.alphas_cumprod, t, x0)
    (true_mean, variance), (model_mean, _) = schedule.posterior(x0, x_t, t), schedule.posterior(guess, x_t, t)
    kl = ((true_mean - model_mean) ** 2 / (2 * variance)).sum(1)
    pred = CONVERT[kind]("x0", guess, x_t, acp)
    loss = diffusion_loss(lambda *_: pred, x0, schedule, t, eps, kind, "vlb", reduction="sum")
    assert_close(loss, kl, rtol=1e-3, atol=0)


def test_vlb_weight_of_eps_is_ddpm_equation_12():
    schedule, t = make_schedule("linear", 200, 1e-3, 0.1), torch.arange(1, 200)
    beta, acp = schedule.betas.double()[t], schedule.alphas_cumprod.double()
    sigma2 = beta * (1 - acp[t - 1]) / (1 - acp[t])
    equation_12 = beta**2 / (2 * sigma2 * (1 - beta) * (1 - acp[t]))
    assert_close(weights_at("vlb", "eps", schedule, t).double(), equation_12, rtol=1e-3, atol=0)
    assert weights_at("vlb", "eps", schedule, torch.tensor([0])).item() == pytest.approx(0.5)  # Gaussian decoder


def test_weights_by_hand():
    snr = torch.tensor([0.1, 1.0, 5.0, 100.0])
    hand = {
        ("uniform_x0", "x0"): [1, 1, 1, 1],
        ("uniform_x0", "v"): [1 / 1.1, 1 / 2, 1 / 6, 1 / 101],
        ("uniform_eps", "eps"): [1, 1, 1, 1],
        ("uniform_eps", "x0"): [0.1, 1, 5, 100],
        ("uniform_v", "v"): [1, 1, 1, 1],
        ("uniform_v", "x0"): [1.1, 2, 6, 101],
        ("min_snr", "x0"): [0.1, 1, 5, 5],
        ("min_snr", "eps"): [1, 1, 1, 0.05],
        ("min_snr", "v"): [0.1 / 1.1, 1 / 2, 5 / 6, 5 / 101],
    }
    for (name, kind), expected in hand.items():
        assert_close(loss_weights(name, kind, snr), torch.tensor(expected, dtype=torch.float32))
    for kind in PREDICTIONS:
        assert_close(loss_weights("simple", kind, snr), torch.ones(4))
    assert_close(loss_weights("min_snr", "x0", snr, gamma=1.0), torch.tensor([0.1, 1, 1, 1]))
    assert_close(loss_weights("vlb", "x0", snr, 2 * snr), snr / 2)


@pytest.mark.parametrize("name", WEIGHTINGS)
@pytest.mark.parametrize("kind", PREDICTIONS)
def test_weights_never_are_nan_or_infinite_and_take_their_limits(name, kind):
    snr = torch.tensor([0.0, 1e-30, 1e30, math.inf])
    weights = loss_weights(name, kind, snr, torch.tensor([1e-5, 1e-5, math.inf, math.inf]))
    assert weights.shape == (4,) and weights.dtype == torch.float32 and weights.isfinite().all() and (weights >= 0).all()
    if (name, kind) in {("min_snr", "eps"), ("uniform_eps", "eps")}:
        assert weights[0] == 1
    if (name, kind) in {("uniform_eps", "v"), ("uniform_v", "eps"), ("uniform_v", "v")}:
        assert weights[-1] == 1
    if (name, kind) == ("vlb", "eps"):
        assert weights[-1] == 0.5


def test_zero_terminal_snr_still_trains_v_and_x0_at_the_last_step():
    schedule, last = make_schedule(zero_terminal_snr=True), torch.tensor([999])
    for name in ("simple", "uniform_v", "uniform_x0"):
        assert weights_at(name, "v", schedule, last).item() == 1
    x0, eps = noise(1, 6, dtype=torch.float32), noise(1, 6, seed=1, dtype=torch.float32)
    assert_close(make_target("v", x0, eps, gather(schedule.alphas_cumprod, last, x0)), -x0)


def test_weight_refusals():
    snr = torch.ones(2)
    with pytest.raises(ValueError, match="min_snr"):
        loss_weights("minsnr", "eps", snr)
    with pytest.raises(ValueError, match="prediction"):
        loss_weights("simple", "noise", snr)
    with pytest.raises(ValueError, match="snr_previous"):
        loss_weights("vlb", "eps", snr)


# ---------------------------------------------------------------- the loss


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("shape", [(3, 2), (3, 4, 5, 6)])
def test_loss_by_hand(prediction, shape):
    schedule, t = make_schedule(), torch.tensor([0, 400, 999])
    x0, eps, pred = noise(*shape).float(), noise(*shape, seed=1).float(), noise(*shape, seed=2).float()
    seen = {}

    def model(x_t, steps):
        seen.update(x_t=x_t, t=steps)
        return pred

    loss = diffusion_loss(model, x0, schedule, t, eps, prediction)
    assert loss.shape == (3,) and loss.dtype == torch.float32
    assert_close(seen["x_t"], schedule.add_noise(x0, eps, t))
    assert torch.equal(seen["t"], t)
    for i in range(3):
        acp = schedule.alphas_cumprod[t[i]]
        target = {"x0": x0[i], "eps": eps[i], "v": acp.sqrt() * eps[i] - (1 - acp).sqrt() * x0[i]}[prediction]
        assert_close(loss[i], ((pred[i] - target) ** 2).mean())
    total = diffusion_loss(model, x0, schedule, t, eps, prediction, reduction="sum")
    assert_close(total, loss * x0[0].numel())
    absolute = diffusion_loss(model, x0, schedule, t, eps, prediction, distance="l1")
    assert_close(absolute[0], (pred[0] - make_target(prediction, x0, eps, schedule.alphas_cumprod[0])[0]).abs().mean())


def test_a_perfect_network_costs_nothing_and_one_step_serves_all_rows():
    schedule, x0, eps = make_schedule(), noise(3, 4).float(), noise(3, 4, seed=1).float()
    for prediction, weighting in itertools.product(PREDICTIONS, WEIGHTINGS):
        acp = gather(schedule.alphas_cumprod, 321, x0)
        target = make_target(prediction, x0, eps, acp)
        shapes = []
        loss = diffusion_loss(lambda x, t, y=target, s=shapes: s.append(t.shape) or y, x0, schedule, 321, eps, prediction, weighting)
        assert_close(loss, torch.zeros(3)) and shapes == [(3,)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_loss_is_taken_in_float32_from_half_precision(dtype):
    """A sum of 40,000 squares overflows float16 and loses its digits in bfloat16."""
    x0 = torch.zeros(1, 40_000, dtype=dtype)
    loss = diffusion_loss(lambda x, t: torch.full_like(x, 2.0), x0, make_schedule(), 0, torch.zeros_like(x0), reduction="sum")
    assert loss.dtype == torch.float32 and loss.item() == 160_000


def test_a_rows_loss_does_not_depend_on_its_neighbours():
    schedule, x0, eps, t = make_schedule(), noise(4, 5), noise(4, 5, seed=1), torch.tensor([3, 50, 600, 999])
    model = lambda x, t: x * 0.5
    together = diffusion_loss(model, x0, schedule, t, eps, "v", "min_snr")
    for i in range(4):
        assert_close(diffusion_loss(model, x0[i : i + 1], schedule, t[i : i + 1], eps[i : i + 1], "v", "min_snr")[0], together[i])


def test_gradient_reaches_the_network_and_is_right():
    schedule, t = make_schedule(), torch.tensor([5, 700])
    x0, eps, gain = noise(2, 3), noise(2, 3, seed=1), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    for prediction, weighting in itertools.product(PREDICTIONS, WEIGHTINGS):
        loss = lambda w, p=prediction, name=weighting: diffusion_loss(lambda x, t: w * x, x0, schedule, t, eps, p, name).sum()
        assert torch.autograd.gradcheck(loss, (gain,), rtol=1e-3)


def test_inputs_are_never_modified():
    """Historical bug 20: noise or data changed in place, so that the next use of it is wrong."""
    schedule, x0, eps, t = make_schedule(), noise(4, 3, 4, 4), noise(4, 3, 4, 4, seed=1), torch.tensor([0, 1, 500, 999])
    copies, table = [v.clone() for v in (x0, eps, t)], schedule.alphas_cumprod.clone()
    acp = gather(schedule.alphas_cumprod, t, x0)
    for kind, weighting in itertools.product(PREDICTIONS, WEIGHTINGS):
        diffusion_loss(lambda x, t: x.mul_(0.5), x0, schedule, t, eps, kind, weighting)  # a rude network
        for convert in (to_x0, to_eps, to_v):
            convert(kind, eps, x0, acp)
        make_target(kind, x0, eps, acp)
    prior_kl(x0, schedule)
    assert all(torch.equal(a, b) for a, b in zip((x0, eps, t), copies, strict=True))
    assert torch.equal(schedule.alphas_cumprod, table)


def test_loss_refusals():
    schedule, x = make_schedule(), torch.zeros(2, 3, 4, 4)
    ok = lambda x, t: x
    for arguments, match in [
        ({"model": lambda x, t: x[:, :1]}, r"pred: got shape \(2, 1, 4, 4\), expected \(2, 3, 4, 4\)"),
        ({"eps": torch.zeros(2, 3, 1, 1)}, "eps: got shape"),
        ({"t": torch.tensor([0, 1000])}, "expected"),
        ({"t": torch.tensor([0.0, 1.0])}, "integer"),
        ({"prediction": "score"}, "prediction"),
        ({"weighting": "snr"}, "weighting"),
        ({"distance": "l3"}, "distance"),
        ({"distance": "l1", "weighting": "min_snr"}, "simple"),
        ({"reduction": "none"}, "reduction"),
    ]:
        call = {"model": ok, "x0": x, "schedule": schedule, "t": torch.tensor([0, 1]), "eps": x, **arguments}
        with pytest.raises(ValueError, match=match):
            diffusion_loss(**call)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ideal_predictor_has_the_closed_forms_loss(prediction):
    """Gaussian data: E|target - E[target | x_t]|^2 = c^2 (1 - acp) / total for x0, by Gaussian conditioning."""
    schedule, c, n = make_schedule(), 0.5, 100_000
    for t in (20, 300, 800):
        acp = schedule.alphas_cumprod[t].item()
        total = acp * c**2 + 1 - acp
        exact = {"x0": c**2 * (1 - acp) / total, "eps": acp * c**2 / total, "v": c**2 / total}[prediction]
        x0, eps = c * noise(n, 1, seed=t), noise(n, 1, seed=t + 1)
        loss = diffusion_loss(gaussian_model(schedule, prediction), x0, schedule, t, eps, prediction)
        assert abs(loss.mean().item() - exact) < 4 * loss.std().item() / n**0.5


# ---------------------------------------------------------------- the bound


def test_prior_kl_against_torch():
    schedule, x0 = make_schedule("scaled_linear", 1000, 0.00085, 0.012), noise(3, 2, 4)
    acp = schedule.alphas_cumprod[-1].double()
    q = torch.distributions.Normal(acp.sqrt() * x0, (1 - acp).sqrt())
    exact = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum((1, 2))
    assert_close(prior_kl(x0, schedule), exact, rtol=1e-3, atol=1e-6)
    assert_close(prior_kl(x0, make_schedule(zero_terminal_snr=True)), torch.zeros(3).double())
    assert prior_kl(x0.half(), schedule).dtype == torch.float32


def reverse_chain_variance(schedule, spread):
    """Variance of x0 drawn by the ideal linear reverse chain that the bound speaks of, in floats."""
    variance = 1.0
    for t in reversed(range(schedule.T)):
        acp = schedule.alphas_cumprod[t].item()
        gain = acp**0.5 * spread**2 / (acp * spread**2 + 1 - acp)
        slope = schedule.posterior_x0[t].item() * gain + schedule.posterior_x_t[t].item()
        variance = slope**2 * variance + (schedule.posterior_variance[t].item() if t else 1 / schedule.snr(0).item())
    return variance


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_variational_bound_lies_above_the_chains_exact_likelihood(prediction):
    spread, n = 0.5, 4000
    x0 = spread * noise(n, 1)
    gaps = []
    for T in (20, 200):
        acp = torch.linspace(8, -8, T, dtype=torch.float64).sigmoid()  # even steps of log snr: the gap can close
        schedule = NoiseSchedule(1 - acp / torch.cat([torch.ones(1).double(), acp[:-1]]))
        bound = variational_bound(gaussian_model(schedule, prediction, spread), x0, schedule, prediction, torch.Generator().manual_seed(0))
        assert bound.shape == (n,)
        exact = -torch.distributions.Normal(0.0, reverse_chain_variance(schedule, spread) ** 0.5).log_prob(x0)[:, 0]
        error = (bound - exact).std().item() / n**0.5
        gaps.append((bound - exact).mean().item())
        assert gaps[-1] > -4 * error
        snr = (acp / (1 - acp)).tolist()  # DDPM eq. 5 in closed form: E|x0 - E[x0 | x_t]|^2 = c^2 / (1 + c^2 snr)
        terms = [((snr[t - 1] - snr[t]) if t else snr[0]) / 2 * spread**2 / (1 + spread**2 * snr[t]) for t in range(T)]
        expected = sum(terms) + prior_kl(x0, schedule).mean().item() + 0.5 * math.log(2 * math.pi / snr[0])
        assert abs(bound.mean().item() - expected) < 4 * bound.std().item() / n**0.5
    assert gaps[1] < gaps[0] / 5  # smaller steps, tighter bound


def test_bits_per_dim():
    x0 = torch.zeros(2, 3, 4, 4)
    assert_close(bits_per_dim(torch.full((2,), 48 * math.log(2)), x0), torch.ones(2))


# ---------------------------------------------------------------- which t


@pytest.mark.parametrize("how", TIMESTEP_SAMPLERS)
@pytest.mark.parametrize("T", [1, 7, 1000])
def test_timesteps_are_int64_in_range_and_repeat_with_their_seed(how, T):
    draw = lambda seed: sample_timesteps(513, T, torch.Generator().manual_seed(seed), how=how)
    t = draw(0)
    assert t.shape == (513,) and t.dtype == torch.int64 and t.min() >= 0 and t.max() < T
    assert torch.equal(t, draw(0)) and (T == 1 or not torch.equal(t, draw(1)))
    assert sample_timesteps(4, T, how=how).shape == (4,)


def test_uniform_timesteps_are_uniform():
    n, T = 100_000, 10
    counts = sample_timesteps(n, T, torch.Generator().manual_seed(0)).bincount(minlength=T).double()
    chi2 = ((counts - n / T) ** 2 / (n / T)).sum().item()
    assert chi2 < 27.9  # 0.999 quantile of chi-squared with 9 degrees of freedom


def test_stratified_timesteps_cover_every_level_and_each_row_is_uniform():
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        t = sample_timesteps(50, 1000, g, how="stratified").sort().values
        assert ((t.diff() >= 19) & (t.diff() <= 21)).all()
    rows = torch.stack([sample_timesteps(4, 4, g, how="stratified") for _ in range(4000)])
    for row in rows.T:
        assert ((row.bincount(minlength=4) - 1000).abs() < 4 * (4000 * 3 / 16) ** 0.5).all()


def test_logit_normal_timesteps_have_their_quantiles():
    t = sample_timesteps(100_000, 1000, torch.Generator().manual_seed(0), how="logit_normal").double() / 1000
    for z in (-1.0, 0.0, 1.0):
        share = (t < 1 / (1 + math.exp(-z))).double().mean().item()
        assert abs(share - 0.5 * (1 + math.erf(z / 2**0.5))) < 0.008


@pytest.mark.parametrize("how", ["uniform", "logit_normal"])
def test_one_generator_per_row_frees_a_row_from_its_neighbours(how):
    together = sample_timesteps(4, 1000, make_generators(7, 4), how=how)
    alone = torch.cat([sample_timesteps(1, 1000, make_generators(7 + i, 1), how=how) for i in range(4)])
    assert torch.equal(together, alone)


def test_timestep_refusals():
    with pytest.raises(ValueError, match="one generator"):
        sample_timesteps(2, 10, make_generators(0, 2), how="stratified")
    with pytest.raises(ValueError, match="got 3 generators, expected 2"):
        sample_timesteps(2, 10, make_generators(0, 3))
    with pytest.raises(ValueError, match="timesteps"):
        sample_timesteps(2, 10, how="unifrom")


# ---------------------------------------------------------------- configuration


def test_config_round_trip_and_methods():
    config = ObjectiveConfig("v", "min_snr", 3.0, timesteps="stratified")
    assert ObjectiveConfig.from_dict(config.to_dict()) == config
    schedule, x0, eps, t = make_schedule(), noise(3, 4), noise(3, 4, seed=1), torch.tensor([1, 500, 900])
    model = lambda x, t: x
    assert_close(config.loss(model, x0, schedule, t, eps), diffusion_loss(model, x0, schedule, t, eps, "v", "min_snr", gamma=3.0))
    assert_close(ObjectiveConfig(distance="l1").loss(model, x0, schedule, t, eps), diffusion_loss(model, x0, schedule, t, eps, distance="l1"))
    g = lambda: torch.Generator().manual_seed(1)
    assert torch.equal(config.sample_timesteps(8, 100, g()), sample_timesteps(8, 100, g(), how="stratified"))


@pytest.mark.parametrize(
    "bad",
    [{"prediction": "noise"}, {"weighting": "elbo"}, {"distance": "mse"}, {"timesteps": "random"}, {"gamma": 0.0}, {"gamma": math.nan},
     {"distance": "l1", "weighting": "vlb"}],
)
def test_impossible_configs_are_refused(bad):
    with pytest.raises(ValueError, match="got"):
        ObjectiveConfig(**bad)


def test_registries_agree():
    assert set(DISTANCES) == {"l1", "l2"} and PREDICTIONS == ("eps", "x0", "v") and WEIGHTINGS[0] == "simple"
    assert isinstance(NoiseSchedule(torch.tensor([0.1, 0.2])).snr(), torch.Tensor)
