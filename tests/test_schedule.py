"""Noise schedules: closed forms, independent references, error paths, and the field's historical bugs 1, 2 and 20."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from ldm_edu.schedule import (
    SCHEDULES,
    NoiseSchedule,
    ScheduleConfig,
    gather,
    make_schedule,
    rescale_zero_terminal_snr,
    schedule_from_config,
)

NAMES = tuple(SCHEDULES)
T = 50


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def long_hand_alphas_cumprod(betas):
    """Products written out in Python floats: one factor per step up to and including t."""
    out, product = [], 1.0
    for beta in betas.double().tolist():
        product *= 1 - beta
        out.append(product)
    return torch.tensor(out, dtype=torch.float64)


# ---------------------------------------------------------------- tables


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("steps", [2, 10, 1000])
def test_tables_are_float32_of_length_t_and_decreasing(name, steps, zero):
    s = make_schedule(name, steps, zero_terminal_snr=zero)
    assert s.T == steps == s.config.T
    for table in (s.betas, s.alphas_cumprod, s.posterior_x0, s.posterior_x_t, s.posterior_variance, s.snr()):
        assert table.shape == (steps,) and table.dtype == torch.float32 and table.isfinite().all()
    assert (s.betas > 0).all() and (s.betas <= 1).all()
    assert (s.alphas_cumprod.diff() < 0).all() and s.alphas_cumprod[0] < 1 and s.alphas_cumprod[-1] >= 0
    assert (s.log_snr().diff() < 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_alphas_cumprod_is_the_product_up_to_t_and_not_to_T(name):
    """Historical bug 2: a product over all T steps, the same for every t."""
    s = make_schedule(name, T)
    assert_close(s.alphas_cumprod.double(), long_hand_alphas_cumprod(s.betas), rtol=1e-5, atol=1e-7)
    assert_close(s.alphas_cumprod[0], 1 - s.betas[0])
    assert s.alphas_cumprod.unique().numel() == T


@pytest.mark.parametrize(
    ("start", "end", "signal"),
    [(0.0015, 0.0195, 0.0119), (0.0015, 0.0155, 0.0259), (0.0015, 0.0205, 0.0098), (0.00085, 0.012, 0.0683), (0.0015, 0.015, 0.0285)],
    ids=["LDM", "churches", "layout", "Stable Diffusion", "RDM"],
)
def test_terminal_signal_of_the_released_models(start, end, signal):
    s = make_schedule("scaled_linear", 1000, start, end)
    assert round(s.alphas_cumprod[-1].sqrt().item(), 4) == signal


def test_terminal_signal_of_ddpm_and_terminal_snr_of_stable_diffusion():
    assert round(make_schedule("linear").alphas_cumprod[-1].sqrt().item(), 4) == 0.0064
    s = make_schedule("scaled_linear", 1000, 0.00085, 0.012)
    assert round(10 * math.log10(s.snr(999).item()), 1) == -23.3
    assert make_schedule().config.to_dict()["beta_end"] == 0.0195


@pytest.mark.parametrize(("name", "theirs"), [("linear", "linear"), ("scaled_linear", "scaled_linear"), ("cosine", "squaredcos_cap_v2")])
@pytest.mark.parametrize("zero", [False, True])
def test_betas_agree_with_diffusers(name, theirs, zero):
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers, which `make test` installs")
    start, end = (0.00085, 0.012) if name != "cosine" else (None, None)
    extra = {"beta_start": start, "beta_end": end} if start else {}
    reference = diffusers.DDIMScheduler(1000, beta_schedule=theirs, rescale_betas_zero_snr=zero, **extra)
    ours = make_schedule(name, 1000, start, end, zero_terminal_snr=zero)
    assert_close(ours.betas, reference.betas, rtol=2e-3 if zero else 1e-4, atol=1e-6)  # theirs is built in float32
    assert_close(ours.alphas_cumprod, reference.alphas_cumprod, rtol=1e-4, atol=1e-5)
    x0, eps, t = noise(4, 3, 8, 8), noise(4, 3, 8, 8, seed=1), torch.tensor([0, 10, 500, 999])
    assert_close(ours.add_noise(x0, eps, t), reference.add_noise(x0, eps, t), rtol=1e-4, atol=1e-4)


def test_each_schedule_has_its_shape():
    linear, scaled = (make_schedule(n, 5, 0.01, 0.09).betas for n in ("linear", "scaled_linear"))
    assert_close(linear, torch.tensor([0.01, 0.03, 0.05, 0.07, 0.09]))
    assert_close(scaled.sqrt(), torch.tensor([0.1, 0.15, 0.2, 0.25, 0.3]))
    f = lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    cosine = make_schedule("cosine", 100)
    assert_close(cosine.alphas_cumprod[49].item(), f(0.5) / f(0), rtol=1e-6, atol=0)
    assert cosine.betas.max().item() == pytest.approx(0.999)
    sigmoid = make_schedule("sigmoid", 100)
    g = lambda u: 1 / (1 + math.exp(-u))
    assert_close(sigmoid.alphas_cumprod[49].item(), 0.5, rtol=1e-6, atol=0)  # symmetric about the middle
    assert_close(sigmoid.alphas_cumprod[24].item(), (g(1.5) - g(-3)) / (g(3) - g(-3)), rtol=1e-6, atol=0)


def test_tables_are_built_in_float64():
    """A product of a thousand float32 factors would be off by far more than float32's last digits."""
    for name in NAMES:
        s = make_schedule(name)
        maker, *arguments = SCHEDULES[name]
        betas = maker(1000, *[a for a in arguments if a is not None])
        assert betas.dtype == torch.float64
        exact = long_hand_alphas_cumprod(betas)
        assert_close(s.alphas_cumprod, exact.float(), rtol=2e-7, atol=0)
        assert_close(s.snr(), (exact / (1 - exact)).float(), rtol=2e-7, atol=0)


# ---------------------------------------------------------------- zero terminal SNR


@pytest.mark.parametrize("name", NAMES)
def test_zero_terminal_snr(name):
    plain, zero = make_schedule(name), make_schedule(name, zero_terminal_snr=True)
    assert zero.alphas_cumprod[-1] == 0 and zero.betas[-1] == 1 and zero.snr(999) == 0 and zero.log_snr(999) == -math.inf
    assert_close(zero.alphas_cumprod[0], plain.alphas_cumprod[0])
    signal, before = zero.alphas_cumprod.double().sqrt(), plain.alphas_cumprod.double().sqrt()
    scale = before[0] / (before[0] - before[-1])
    assert_close(signal, (before - before[-1]) * scale, rtol=1e-5, atol=1e-6)  # an affine map of the signal rate
    x0, eps = noise(2, 3, 4, 4), noise(2, 3, 4, 4, seed=1)
    assert_close(zero.add_noise(x0, eps, 999), eps, rtol=0, atol=0)
    mean, variance = zero.posterior(x0, eps, 999)
    assert_close(mean, zero.alphas_cumprod[998].sqrt() * x0, rtol=1e-4, atol=1e-7)  # pure noise says nothing of x_{T-2}
    assert_close(variance.flatten(), (1 - zero.alphas_cumprod[998]).expand(2))


def test_rescaling_betas_by_hand_and_refusals():
    betas = torch.tensor([0.1, 0.2, 0.3])
    kept = betas.clone()
    out = rescale_zero_terminal_snr(betas)
    assert out.dtype == torch.float64 and out.shape == (3,) and out[-1] == 1
    assert_close(out[0].item(), 0.1)
    assert torch.equal(betas, kept)
    for bad in (torch.tensor([0.1]), torch.tensor([])):
        with pytest.raises(ValueError, match="at least 2"):
            rescale_zero_terminal_snr(bad)


# ---------------------------------------------------------------- the forward process


@pytest.mark.parametrize("shape", [(4,), (4, 2), (4, 3, 8), (4, 3, 5, 7), (4, 2, 3, 4, 5)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_add_noise_by_hand_for_any_rank_and_dtype(shape, dtype):
    s, t = make_schedule(T=T), torch.tensor([0, 7, 33, 49], dtype=torch.int32)
    x0, eps = noise(*shape, dtype=torch.float64).to(dtype), noise(*shape, seed=1, dtype=torch.float64).to(dtype)
    x_t = s.add_noise(x0, eps, t)
    assert x_t.shape == x0.shape and x_t.dtype == dtype
    for i in range(4):
        acp = s.alphas_cumprod[t[i]].double()
        terms = acp.sqrt() * x0[i].double(), (1 - acp).sqrt() * eps[i].double()
        bound = 2 * torch.finfo(dtype).eps * (terms[0].abs() + terms[1].abs())  # of the terms, not of their sum: they may cancel
        assert ((x_t[i].double() - terms[0] - terms[1]).abs() <= bound).all()


def test_half_precision_keeps_the_noise_of_the_first_step():
    """In float16 1 - 0.9999 is off by a fifth, in bfloat16 it is 0: the rates must be taken before rounding."""
    s, zeros = make_schedule("linear"), torch.zeros(1, 1000, dtype=torch.bfloat16)
    x_t = s.add_noise(zeros, torch.ones_like(zeros), 0)
    assert x_t.float().mean().item() == pytest.approx(0.01, rel=0.01)


def test_integer_and_tensor_steps_agree():
    s, x0, eps = make_schedule(T=T), noise(3, 4), noise(3, 4, seed=1)
    for t in (0, 20, 49):
        assert torch.equal(s.add_noise(x0, eps, t), s.add_noise(x0, eps, torch.full((3,), t)))
        assert torch.equal(s.add_noise(x0, eps, torch.tensor(t)), s.add_noise(x0, eps, torch.full((3,), t)))
    assert s.snr(3).shape == () and s.snr(torch.tensor([[1, 2], [3, 4]])).shape == (2, 2)
    assert s.snr(torch.tensor([[1, 2], [3, 4]]))[1, 0] == s.snr()[3] == s.snr(3)
    assert_close(s.snr(), s.alphas_cumprod / (1 - s.alphas_cumprod), rtol=1e-4, atol=0)
    assert_close(s.log_snr(7), s.snr(7).log())


@pytest.mark.parametrize("name", NAMES)
def test_the_chain_of_steps_has_the_closed_forms_mean_and_variance(name):
    """Historical bug 1 (noise scaled by beta instead of sqrt(beta)) changes the chain's variance.

    Each step is linear, x -> a x + b eps, so probing it with (1, 0) and (0, 1) yields a and b exactly: no sampling.
    """
    s, one, nought = make_schedule(name, T), torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    mean, variance = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    for t in range(T):
        signal, spread = s.add_noise_step(one, nought, t), s.add_noise_step(nought, one, t)
        assert_close(signal**2 + spread**2, one)  # variance preserving
        mean, variance = signal * mean, signal**2 * variance + spread**2
        assert_close(s.add_noise(one, nought, t), mean, rtol=1e-5, atol=1e-6)
        assert_close(s.add_noise(nought, one, t) ** 2, variance, rtol=2e-3, atol=1e-6)


def test_noise_levels_are_square_roots():
    """Historical bug 1 in the closed form: the noise rate is sqrt(1 - acp), the step's is sqrt(beta)."""
    s, one = make_schedule(T=T), torch.ones(1, 1)
    for t in (0, 25, 49):
        assert_close(s.add_noise(one * 0, one, t).item() ** 2, 1 - s.alphas_cumprod[t].item())
        assert_close(s.add_noise_step(one * 0, one, t).item() ** 2, s.betas[t].item())
        assert_close(s.add_noise(one, one * 0, t).item() ** 2, s.alphas_cumprod[t].item())


def test_simulated_chain_matches_the_closed_form_within_standard_errors():
    s, n, g = make_schedule(T=T, beta_start=0.005, beta_end=0.1), 20_000, torch.Generator().manual_seed(0)
    x = torch.full((n, 1), 1.5)
    for t in range(T):
        x = s.add_noise_step(x, torch.randn(n, 1, generator=g), t)
    acp = s.alphas_cumprod[-1].item()
    assert abs(x.mean().item() - 1.5 * acp**0.5) < 4 * (1 - acp) ** 0.5 / n**0.5
    assert abs(x.var().item() - (1 - acp)) < 4 * (1 - acp) * (2 / n) ** 0.5


@settings(max_examples=50, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    steps=st.integers(2, 300),
    zero=st.booleans(),
    where=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_variance_is_preserved_and_signal_can_be_removed(name, steps, zero, where, seed):
    s = make_schedule(name, steps, zero_terminal_snr=zero)
    t = round(where * (steps - 1))
    one = torch.ones(1, 1, dtype=torch.float64)
    assert_close(s.add_noise(one, 0 * one, t) ** 2 + s.add_noise(0 * one, one, t) ** 2, one, rtol=0, atol=1e-12)
    x0, eps = noise(2, 5, seed=seed, dtype=torch.float64), noise(2, 5, seed=seed + 1, dtype=torch.float64)
    acp = s.alphas_cumprod[t].double()
    assert_close((s.add_noise(x0, eps, t) - acp.sqrt() * x0) / (1 - acp).sqrt(), eps, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------- the posterior


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("zero", [False, True])
def test_posterior_is_bayes_rule_in_precisions(name, zero):
    """Two Gaussians in x_{t-1}: the prior from x0 and the likelihood of x_t. Their precisions add."""
    s = make_schedule(name, T, zero_terminal_snr=zero)
    maker, start, end = SCHEDULES[name]
    betas = maker(T) if start is None else maker(T, start, end)
    betas = rescale_zero_terminal_snr(betas) if zero else betas
    acp = (1 - betas).cumprod(0)
    x0, x_t = noise(1, 6, dtype=torch.float64), noise(1, 6, seed=1, dtype=torch.float64)
    for t in range(1, T):
        prior_variance, beta, alpha = 1 - acp[t - 1], betas[t], 1 - betas[t]
        precision = 1 / prior_variance + alpha / beta
        mean = (acp[t - 1].sqrt() * x0 / prior_variance + alpha.sqrt() * x_t / beta) / precision
        got, variance = s.posterior(x0, x_t, t)
        assert got.shape == (1, 6) and variance.shape == (1, 1) and got.dtype == torch.float64
        assert_close(got, mean, rtol=1e-5, atol=1e-6)
        assert_close(variance.item(), (1 / precision).item(), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_posterior_at_the_first_step_is_x0_and_certain(name):
    s, x0, x_t = make_schedule(name), noise(2, 3, 4, 4), noise(2, 3, 4, 4, seed=1)
    mean, variance = s.posterior(x0, x_t, 0)
    assert_close(mean, x0, rtol=0, atol=0)
    assert variance.shape == (2, 1, 1, 1) and (variance == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_posterior_composed_with_the_jump_gives_the_marginal_one_step_earlier(name):
    """q(x_{t-1} | x0) = integral of q(x_{t-1} | x_t, x0) q(x_t | x0): check both moments, by linearity."""
    s, one = make_schedule(name, T), torch.ones(1, 1, dtype=torch.float64)
    for t in range(1, T):
        acp, previous = s.alphas_cumprod[t].double(), s.alphas_cumprod[t - 1].double()
        mean, variance = s.posterior(one, acp.sqrt() * one, t)
        slope = s.posterior(0 * one, one, t)[0]
        assert_close(mean, previous.sqrt() * one, rtol=1e-5, atol=1e-6)
        assert_close(variance + slope**2 * (1 - acp), (1 - previous) * one, rtol=1e-3, atol=1e-6)


def test_posterior_agrees_with_diffusers():
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers, which `make test` installs")
    reference = diffusers.DDPMScheduler(1000, beta_schedule="scaled_linear", beta_start=0.0015, beta_end=0.0195,
                                        prediction_type="sample", clip_sample=False, variance_type="fixed_small")
    s, x0, x_t = make_schedule(), noise(1, 3, 4, 4, dtype=torch.float64), noise(1, 3, 4, 4, seed=1, dtype=torch.float64)
    for t in (1, 100, 999):
        g = torch.Generator().manual_seed(t)
        theirs = reference.step(x0, t, x_t, generator=g).prev_sample
        eps = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
        mean, variance = s.posterior(x0, x_t, t)
        assert_close(mean + variance.sqrt() * eps, theirs, rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------- inputs, equality, devices


def test_inputs_and_tables_are_never_modified():
    """Historical bug 20: an in-place update of what the caller still holds."""
    s = make_schedule(T=T)
    tables = {k: v.clone() for k, v in vars(s).items() if isinstance(v, torch.Tensor)}
    x0, eps, t = noise(4, 3, 8, 8), noise(4, 3, 8, 8, seed=1), torch.tensor([0, 7, 33, 49])
    copies = [v.clone() for v in (x0, eps, t)]
    outputs = [s.add_noise(x0, eps, t), s.add_noise_step(x0, eps, t), *s.posterior(x0, eps, t), s.snr(t), s.log_snr(t)]
    s.nearest_t(s.log_snr(t))
    gather(s.alphas_cumprod, t, x0)
    for output in outputs:
        output.mul_(0)  # and results share no memory with inputs
    assert all(torch.equal(a, b) for a, b in zip((x0, eps, t), copies, strict=True))
    assert all(torch.equal(getattr(s, k), v) for k, v in tables.items())


def test_whole_curves_do_not_expose_the_tables():
    s = make_schedule(T=T)
    before = s.snr().clone()
    s.snr().mul_(0)
    s.log_snr().mul_(0)
    assert torch.equal(s.snr(), before)


def test_add_noise_is_differentiable_in_both_inputs():
    s, t = make_schedule(T=T), torch.tensor([3, 40])
    x0, eps = (noise(2, 3, seed=i, dtype=torch.float64).requires_grad_() for i in (0, 1))
    assert torch.autograd.gradcheck(lambda a, b: s.add_noise(a, b, t), (x0, eps))
    assert torch.autograd.gradcheck(lambda a, b: s.posterior(a, b, t)[0], (x0, eps))


@pytest.mark.parametrize("bad", [-1, T, torch.tensor([0, T]), torch.tensor([-1, 0])])
def test_steps_outside_the_schedule_are_refused(bad):
    s, x = make_schedule(T=T), torch.zeros(2, 3)
    for call in (lambda: s.add_noise(x, x, bad), lambda: s.add_noise_step(x, x, bad), lambda: s.posterior(x, x, bad), lambda: s.snr(bad)):
        with pytest.raises(ValueError, match=r"expected \[0, 50\)"):
            call()


@pytest.mark.parametrize("bad", [torch.tensor([0.5, 1.0]), 0.5, True, torch.tensor([True, False])])
def test_steps_that_are_not_integers_are_refused(bad):
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="integer"):
        make_schedule(T=T).add_noise(x, x, bad)


@pytest.mark.parametrize("bad", [torch.tensor([1]), torch.tensor([1, 2, 3]), torch.tensor([[1, 2]])])
def test_steps_of_another_length_are_refused(bad):
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="one step per row"):
        make_schedule(T=T).add_noise(x, x, bad)


def test_shapes_that_would_broadcast_and_integers_are_refused():
    s = make_schedule(T=T)
    with pytest.raises(ValueError, match=r"eps: got shape \(2, 1\), expected \(2, 3\)"):
        s.add_noise(torch.zeros(2, 3), torch.zeros(2, 1), 0)
    with pytest.raises(ValueError, match="floating point"):
        s.add_noise(torch.zeros(2, 3, dtype=torch.uint8), torch.zeros(2, 3, dtype=torch.uint8), 0)
    with pytest.raises(ValueError, match="floating point"):
        s.add_noise(torch.tensor(1.0), torch.tensor(1.0), 0)
    with pytest.raises(ValueError, match="x_t"):
        s.posterior(torch.zeros(2, 3), torch.zeros(3, 2), 0)


def test_an_empty_batch_passes_through():
    x = torch.zeros(0, 3, 4, 4)
    assert make_schedule(T=T).add_noise(x, x, torch.zeros(0, dtype=torch.long)).shape == (0, 3, 4, 4)


@pytest.mark.parametrize(
    "arguments",
    [
        {"name": "lineer"},
        {"T": 0},
        {"T": 10.0},
        {"T": True},
        {"T": 1, "zero_terminal_snr": True},
        {"beta_start": 0.0},
        {"beta_start": 0.5, "beta_end": 0.1},
        {"beta_end": 1.0},
        {"beta_start": float("nan")},
        {"name": "cosine", "beta_start": 0.1},
    ],
)
def test_impossible_schedules_are_refused(arguments):
    with pytest.raises(ValueError, match="got|no beta_start"):
        make_schedule(**arguments)


@pytest.mark.parametrize(
    "betas", [[], [[0.1, 0.2]], [0.0, 0.1], [0.1, 1.0, 0.5], [-0.1, 0.5], [0.1, 1.5], [0.1, math.nan]]
)
def test_impossible_betas_are_refused(betas):
    with pytest.raises(ValueError, match="betas"):
        NoiseSchedule(torch.tensor(betas))


def test_one_step_and_custom_betas_work():
    s = make_schedule(T=1)
    assert s.T == 1 and s.snr().shape == (1,)
    custom = NoiseSchedule(torch.tensor([0.1, 0.5, 1.0]))
    assert custom.config is None and custom.alphas_cumprod[-1] == 0 and "T=3" in repr(custom)


def test_config_round_trip_defaults_and_equality():
    s = make_schedule("cosine", 20, zero_terminal_snr=True)
    assert schedule_from_config(ScheduleConfig.from_dict(s.config.to_dict())) == s
    assert ScheduleConfig() == ScheduleConfig(beta_start=0.0015, beta_end=0.0195)
    assert make_schedule() == make_schedule(beta_start=0.0015) and hash(make_schedule()) == hash(make_schedule())
    assert make_schedule() != make_schedule("linear") and make_schedule() != make_schedule(T=999) and make_schedule() != 3
    assert "scaled_linear" in repr(make_schedule())
    with pytest.raises(ValueError, match="unknown"):
        ScheduleConfig.from_dict({"nmae": "linear"})


def test_to_returns_another_schedule_and_keeps_this_one():
    s = make_schedule(T=T)
    meta = s.to("meta")
    assert meta.device.type == "meta" and s.device.type == "cpu" and meta.T == T and meta.config == s.config
    assert {v.device.type for v in vars(meta).values() if isinstance(v, torch.Tensor)} == {"meta"}
    assert s.to("cpu") == s


def test_nearest_t_inverts_log_snr():
    for name in NAMES:
        for zero in (False, True):
            s = make_schedule(name, 100, zero_terminal_snr=zero)
            assert torch.equal(s.nearest_t(s.log_snr()), torch.arange(100))
    s = make_schedule()
    assert s.nearest_t(torch.tensor([[math.inf], [-math.inf]])).tolist() == [[0], [999]]
    assert abs(s.log_snr(s.nearest_t(torch.tensor(0.0))).item()) < 0.01


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_equals_cpu_wherever_the_tables_and_steps_are():
    s, x0, eps, t = make_schedule(), noise(4, 3, 8, 8), noise(4, 3, 8, 8, seed=1), torch.tensor([0, 10, 500, 999])
    expected = s.add_noise(x0, eps, t)
    for schedule in (s, s.to("cuda")):
        for steps in (t, t.cuda()):
            assert_close(schedule.add_noise(x0.cuda(), eps.cuda(), steps).cpu(), expected)
