"""Higher-order solvers: measured orders, agreement with diffusers, exactness by hand, inversion, options and limits."""
import functools
import inspect
import math
import types
from itertools import pairwise

import pytest
import torch
from test_samplers import BETAS, SCHEDULE, X_T, ZERO_TERMINAL, T, as_kind, diffusers_kind, schedule_of, trace
from torch.testing import assert_close

from ldm_edu import samplers, solvers
from ldm_edu.core import make_generators
from ldm_edu.oracle import GaussianMixture, exact_flow
from ldm_edu.samplers import (
    BY_LEVEL,
    SAMPLERS,
    SPACINGS,
    Denoiser,
    Step,
    ddim,
    ddpm,
    dpmpp_2m,
    half_log_snr,
    log_snr_timesteps,
    sample,
    timesteps,
)
from ldm_edu.solvers import (
    block_sizes,
    ddim_invert,
    dpm_3s,
    dpmpp_3s,
    euler,
    euler_a,
    heun,
    hold_eps,
    hold_x0,
    mean_x0,
    node_weights,
    noise_level,
    plms,
    step_moments,
    unipc_2,
    unipc_3,
)

MULTI_EVALUATION = {"heun", "plms"}
seeded = lambda seed: torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------- the parts, by hand
@pytest.mark.parametrize("h", [-20.0, -3.0, -1.001, -0.999, -0.3, -1e-6, 1e-9, 1e-6, 0.02, 0.5, 0.999, 1.001, 3.0, 40.0])
def test_moments_are_the_integrals_they_stand_for(h):
    u = (torch.arange(200_000).double() + 0.5) / 200_000
    weight = (h * (u - 1.0 * (h > 0))).exp()
    exact = [((u**k * weight).sum() / weight.sum()).item() for k in range(5)]
    assert_close(torch.tensor(step_moments(h, 4)).double(), torch.tensor(exact).double(), rtol=1e-8, atol=1e-10)


def test_moments_at_the_ends():
    assert step_moments(math.inf, 3) == [1, 1, 1, 1]  # from pure noise only the end of a step counts
    assert_close(torch.tensor(step_moments(1e-12, 3)), torch.tensor([1, 1 / 2, 1 / 3, 1 / 4]))
    for k in range(4):  # the two ways to compute them meet at 1
        assert step_moments(1 - 1e-12, 3)[k] == pytest.approx(step_moments(1 + 1e-12, 3)[k], abs=1e-10)


@pytest.mark.parametrize("h", [-2.0, -0.1, 0.03, 0.7, 5.0])
@pytest.mark.parametrize("nodes", [[0.0], [0.0, -0.8], [0.0, 1.0], [0.0, -1.3, -2.1], [0.0, -0.5, -1.7, 1.0], [0.0, 1 / 3, 2 / 3]])
def test_node_weights_integrate_polynomials_exactly(nodes, h):
    weights = node_weights(nodes, h)
    for k, mean in enumerate(step_moments(h, len(nodes) - 1)):
        assert sum(w * node**k for w, node in zip(weights, nodes)) == pytest.approx(mean, abs=1e-11)


def test_plms_extrapolates_with_the_limit_of_small_steps():
    for n, row in enumerate(solvers.ADAMS_BASHFORTH, start=1):
        assert_close(torch.tensor(row), torch.tensor(node_weights([-float(k) for k in range(n)], 1e-9)), rtol=0, atol=1e-6)


def test_holding_x0_and_holding_eps_are_the_same_first_step():
    x0, eps = torch.randn(2, 5, generator=seeded(0)).double(), torch.randn(2, 5, generator=seeded(1)).double()
    for a, b in [(0.01, 0.2), (0.3, 0.31), (0.5, 1.0), (0.9, 0.999)]:
        step = Step(0, 1, 0, a, b)
        x_t = a**0.5 * x0 + (1 - a) ** 0.5 * eps
        expected = b**0.5 * x0 + (1 - b) ** 0.5 * eps
        assert_close(hold_x0(step, x_t, x0), expected)
        assert_close(hold_eps(step, x_t, eps), expected)
    assert_close(hold_x0(Step(0, 1, 0, 0.0, 0.4), eps, x0), 0.4**0.5 * x0 + 0.6**0.5 * eps)


def test_noise_level():
    assert noise_level(0.0) == math.inf and noise_level(1.0) == 0 and noise_level(0.5) == 1
    assert noise_level(0.3) == pytest.approx(math.exp(-half_log_snr(0.3)))


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("lone_start", [False, True])
def test_blocks_for_every_S(order, lone_start):
    for S in range(1, T + 1):
        sizes = block_sizes(S, order, lone_start)
        assert sum(sizes) == S and sizes[-1] == 1 and all(1 <= size <= order for size in sizes)
        assert not lone_start or sizes[0] == 1
        inner = sizes[1:-1] if lone_start else sizes[:-1]
        ones = 0 if sum(inner) == 0 or order == 3 and sum(inner) != 1 else sum(inner) % 2 if order == 2 else 1
        assert inner.count(1) == ones, (S, sizes)


# ---------------------------------------------------------------- identities
ORACLE = GaussianMixture(torch.tensor([[1.4, 0.2], [-1.0, 1.0], [-0.3, -1.3]]), 0.7, torch.tensor([0.5, 0.3, 0.2]))
IDEAL = Denoiser(ORACLE.model(SCHEDULE, "x0"), SCHEDULE, "x0")
START = torch.randn(64, 2, generator=seeded(0)).double()


@pytest.mark.parametrize("S", [1, 2, 3, 20])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_euler_is_ddim(S, spacing):
    steps = timesteps(S, T, spacing)
    assert_close(euler(IDEAL, START, steps), ddim(IDEAL, START, steps), rtol=0, atol=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_euler_ancestral_is_ddim_with_eta_and_ddpm(eta):
    steps, run = timesteps(20, T), lambda f, **k: f(IDEAL, START, timesteps(20, T), generator=seeded(1), **k)
    assert_close(run(euler_a, eta=eta), run(ddim, eta=eta), rtol=0, atol=1e-11)
    if eta == 1:
        assert_close(run(euler_a), run(ddpm), rtol=0, atol=1e-11)
    if eta == 0:
        assert_close(run(euler_a, eta=0.0), euler(IDEAL, START, steps), rtol=0, atol=1e-12)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_unip_2_is_dpmpp_2m(spacing):
    for S in (1, 2, 3, 17):
        steps = timesteps(S, T, spacing)
        assert_close(unipc_2(IDEAL, START, steps, corrector="none"), dpmpp_2m(IDEAL, START, steps), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [n for n, info in SAMPLERS.items() if n not in ("ddpm", "euler_a", "dpmpp_2m_sde")])
def test_one_step_is_ddim(name):
    assert_close(SAMPLERS[name].function(IDEAL, START, [T - 1]), ddim(IDEAL, START, [T - 1]), rtol=0, atol=1e-10)


@pytest.mark.parametrize("S", [4, 7, 10])
def test_third_order_blocks_are_exact_where_x0_is_a_line_in_lambda(S):
    """Then the step is an integral of a line, and only an exact first moment gets it right at the end of each block."""
    clock = [half_log_snr(a) for a in SCHEDULE.alphas_cumprod.double().tolist()]
    line = Denoiser(lambda x, t: torch.full_like(x, 0.2 + 0.7 * clock[t[0]]), SCHEDULE, "x0")
    steps = log_snr_timesteps(S, SCHEDULE.alphas_cumprod.tolist())
    end, start = (clock[t] for t in (steps[-1], steps[0]))
    lam = torch.linspace(start, end, 100_001).double()
    integral = torch.trapezoid(lam.exp() * (0.2 + 0.7 * lam), lam)
    sigma = [(1 - SCHEDULE.alphas_cumprod[t].double()) ** 0.5 for t in (steps[0], steps[-1])]
    exact = sigma[1] / sigma[0] * START + sigma[1] * integral
    state = lambda f: trace(f, line, START, steps)[1][-1].x_t
    assert_close(state(dpmpp_3s), exact, rtol=0, atol=1e-7)
    assert (state(solvers.dpmpp_2s) - exact).abs().max() > 1e-4  # 1/2 in place of the moment


def test_correctors_repeat_the_step_through_its_end():
    """Two steps of UniPC-2 by hand: predict, ask, correct, predict through two points."""
    steps = [800, 500, 200]
    acp = [IDEAL.acp(t) for t in [*steps, -1]]
    lam = [half_log_snr(a) for a in acp]
    pieces = [Step(i, t, 0, acp[i], acp[i + 1]) for i, t in enumerate(steps)]
    m0 = IDEAL(START, 800).x0
    predicted = hold_x0(pieces[0], START, m0)
    m1 = IDEAL(predicted, 500).x0
    corrected = hold_x0(pieces[0], START, (m0 + m1) / 2)
    slope = (m0 - m1) / (lam[0] - lam[1]) * (lam[2] - lam[1])
    landed = hold_x0(pieces[1], corrected, m1 + slope / 2)
    states = trace(unipc_2, IDEAL, START, steps)[1]
    assert_close(states[1].x_t, predicted, rtol=0, atol=1e-12)
    assert_close(states[2].x_t, landed, rtol=0, atol=1e-12)
    m2 = IDEAL(landed, 200).x0
    again = hold_x0(pieces[1], corrected, mean_x0([(lam[1], m1), (lam[0], m0), (lam[2], m2)], pieces[1]))
    assert_close(states[2].x_next, hold_x0(pieces[2], again, m2), rtol=0, atol=1e-12)


# ---------------------------------------------------------------- orders
def even_clock(n, first=3.2, last=-2.6):
    """A schedule whose steps are equal in lambda: n + 1 levels, the last the noisiest."""
    return schedule_of(torch.sigmoid(2 * torch.linspace(first, last, n + 1, dtype=torch.float64)))


COUNTS = (10, 20, 40, 80, 160)  # evaluations before the last noise level (Heun: steps)
FINE = even_clock(160 * 624)


@functools.cache
def end_of_the_road():
    """Where the exact flow takes START over the fine clock."""
    return exact_flow(ORACLE.v, START, FINE.alphas_cumprod[-1].item(), FINE.alphas_cumprod[0].item(), steps=1000)


def error_at_the_end(function, K, schedule=FINE, exact=None, steps=None, **options):
    """Distance to the exact road at the last noise level, after K steps that end there."""
    n = len(schedule.alphas_cumprod) - 1
    steps = steps or [n * k // K for k in range(K, -1, -1)]
    denoiser = Denoiser(ORACLE.model(schedule, "x0"), schedule, "x0")
    state = trace(function, denoiser, START, steps, **options)[1][-1].x_t
    return (state - (end_of_the_road() if exact is None else exact)).square().mean().sqrt().item()


def slope_of(counts, errors):
    x, y = torch.tensor(counts).double().log(), torch.tensor(errors).double().log()
    return -(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()).item()


ORDERS = {  # name -> (function, lowest, highest slope)
    "ddim": (ddim, 0.85, 1.15), "euler": (euler, 0.85, 1.15),
    "heun": (heun, 1.75, 2.25), "dpm_2s": (solvers.dpm_2s, 1.75, 2.25), "dpmpp_2s": (solvers.dpmpp_2s, 1.75, 2.25),
    "dpmpp_2m": (dpmpp_2m, 1.75, 2.25), "unip_2": (functools.partial(unipc_2, corrector="none"), 1.75, 2.25),
    "unip_2 bh1": (functools.partial(unipc_2, corrector="none", variant="bh1"), 1.75, 2.25),
    "plms": (plms, 1.75, 2.25),  # PNDM's own theorem says 2, see test_plms_order_depends_on_the_clock
    "unipc_2": (unipc_2, 2.75, 3.25), "unipc_2 bh1": (functools.partial(unipc_2, variant="bh1"), 2.75, 3.25),
    "unipc_3": (unipc_3, 2.7, 4.5), "dpm_3s": (dpm_3s, 2.7, 3.4), "dpmpp_3s": (dpmpp_3s, 2.7, 3.4),
}


@pytest.mark.parametrize("name", ORDERS)
def test_order(name):
    function, low, high = ORDERS[name]
    errors = [error_at_the_end(function, K) for K in COUNTS]
    slope = slope_of(COUNTS, errors)
    assert low <= slope <= high, f"slope {slope:.2f}, errors {errors}"
    assert all(a > b for a, b in pairwise(errors))


def test_registered_orders_are_the_measured_ones():
    for name, info in SAMPLERS.items():
        if info.order is not None:
            function, low, high = ORDERS[name]
            assert function is info.function and (low <= info.order <= high)


@functools.cache
def usual_road():
    """LDM's own schedule in 100,000 steps, cut at lambda = 3; the exact end there; steps equal in log-SNR for each count."""
    n = 100_000
    betas = torch.linspace(0.0015**0.5, 0.0195**0.5, n, dtype=torch.float64).square() * T / n
    acp = (1 - betas).cumprod(0)
    tail = acp[int((acp - torch.sigmoid(torch.tensor(6.0).double())).abs().argmin()):]
    exact = exact_flow(ORACLE.v, START, tail[-1].item(), tail[0].item(), steps=1000)
    return schedule_of(tail), exact, {K: log_snr_timesteps(K + 1, tail.tolist()) for K in (20, 40, 80)}


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "unipc_2"])
def test_order_on_the_schedule_people_use(name):
    """Steps equal in log-SNR as far as 100,000 integers allow, on LDM's own schedule."""
    schedule, exact, chosen = usual_road()
    errors = [error_at_the_end(SAMPLERS[name].function, K, schedule, exact, steps) for K, steps in chosen.items()]
    assert abs(slope_of(list(chosen), errors) - SAMPLERS[name].order) < 0.25, errors


def test_plms_order_depends_on_the_clock():
    """Its coefficients are those of equal steps in sigma / alpha: 2 in any other clock, at least 3 there (its start's order)."""
    level = torch.linspace(noise_level(torch.sigmoid(torch.tensor(6.4)).item()), 13.0, 160 * 60 + 1, dtype=torch.float64)
    schedule = schedule_of(1 / (1 + level.square()))
    acp = schedule.alphas_cumprod
    exact = exact_flow(ORACLE.v, START, acp[-1].item(), acp[0].item(), steps=2000)
    counts = (40, 80, 160, 320, 640)
    slope = slope_of(counts, [error_at_the_end(plms, K, schedule, exact) for K in counts])
    assert slope >= 2.7, slope


def their_blocks(S, order, lone_start=False):
    """How diffusers 0.42.1 cuts a walk to clean data: for S = 2 (mod 3) one first-order step stands before the last."""
    assert order == 3
    return {0: [3] * (S // 3 - 1) + [2, 1], 1: [3] * (S // 3) + [1], 2: [3] * (S // 3) + [1, 1]}[S % 3]


def test_a_block_of_one_before_the_last_costs_an_order(monkeypatch):
    """Ended where x0 still moves (lambda = 0.5), where a first-order step shows: 3 for our blocks, 2 for theirs."""
    schedule, counts = even_clock(79 * 319 * 4, first=0.5), (20, 80, 320)
    exact = exact_flow(ORACLE.v, START, schedule.alphas_cumprod[-1].item(), schedule.alphas_cumprod[0].item(), steps=1000)
    n = len(schedule.alphas_cumprod) - 1
    measure = lambda f: slope_of(counts, [error_at_the_end(f, S - 1, schedule, exact, [round(n * k / (S - 1)) for k in range(S - 1, -1, -1)])
                                          for S in counts])
    for function in (dpm_3s, dpmpp_3s):
        assert measure(function) > 2.7
        with monkeypatch.context() as patch:
            patch.setattr(solvers, "block_sizes", their_blocks)
            assert 1.8 < measure(function) < 2.4


# ---------------------------------------------------------------- stochastic samplers: the right mean and covariance
@pytest.mark.parametrize("name, S, options", [("ddpm", 400, {}), ("ddim", 400, {"eta": 1.0}), ("euler_a", 400, {}), ("dpmpp_2m_sde", 60, {})])
def test_stochastic_samplers_reach_the_data(name, S, options):
    n, pure = 8000, Denoiser(ORACLE.model(ZERO_TERMINAL, "x0"), ZERO_TERMINAL, "x0")  # x_T ~ N(0, I) exactly
    x = sample(pure, (n, 2), S, name, spacing="log_snr", generator=seeded(3), dtype=torch.float64, **options)
    spread = ORACLE.covariance.diagonal()
    assert ((x.mean(0) - ORACLE.mean).abs() < 4 * (spread / n).sqrt()).all(), x.mean(0)
    centred = x - ORACLE.mean
    products = centred[:, :, None] * centred[:, None]
    error = products.std(0) / n**0.5
    assert ((products.mean(0) - ORACLE.covariance).abs() < 4 * error).all(), products.mean(0)


def test_2m_sde_on_gaussian_data_has_the_moments_of_its_formula():
    """One interior step from a known state: mean and variance in closed form."""
    step_from, step_to, x0 = 600, 300, 0.4
    denoiser = Denoiser(lambda x, t: torch.full_like(x, x0), SCHEDULE, "x0")
    x = torch.full((40_000, 1), 1.3).double()
    state = trace(solvers.dpmpp_2m_sde, denoiser, x, [step_from, step_to], generator=seeded(0))[1][1].x_t
    a, b = (SCHEDULE.alphas_cumprod[t].item() for t in (step_from, step_to))
    h = half_log_snr(b) - half_log_snr(a)
    mean = ((1 - b) / (1 - a)) ** 0.5 * math.exp(-h) * 1.3 + b**0.5 * (1 - math.exp(-2 * h)) * x0
    variance = (1 - b) * (1 - math.exp(-2 * h))
    assert abs(state.mean().item() - mean) < 4 * (variance / 40_000) ** 0.5
    assert abs(state.var().item() / variance - 1) < 4 * (2 / 40_000) ** 0.5


# ---------------------------------------------------------------- agreement with diffusers
TABLE = dict(trained_betas=BETAS.float().numpy())
SIGMA_SPACE = {"euler", "euler_a", "heun"}
LIBRARY = {  # name -> (scheduler, its settings)
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", dict(algorithm_type="dpmsolver++", solver_order=2)),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", dict(algorithm_type="sde-dpmsolver++", solver_order=2)),
    "dpm_2s": ("DPMSolverSinglestepScheduler", dict(algorithm_type="dpmsolver", solver_order=2, final_sigmas_type="sigma_min")),
    "dpm_3s": ("DPMSolverSinglestepScheduler", dict(algorithm_type="dpmsolver", solver_order=3, final_sigmas_type="sigma_min")),
    "dpmpp_2s": ("DPMSolverSinglestepScheduler", dict(algorithm_type="dpmsolver++", solver_order=2)),
    "dpmpp_3s": ("DPMSolverSinglestepScheduler", dict(algorithm_type="dpmsolver++", solver_order=3)),
    "unipc_2": ("UniPCMultistepScheduler", dict(solver_order=2, solver_type="bh2")),
    "unipc_3": ("UniPCMultistepScheduler", dict(solver_order=3, solver_type="bh2")),
    "unipc_2 bh1": ("UniPCMultistepScheduler", dict(solver_order=2, solver_type="bh1")),
    "unipc_3 bh1": ("UniPCMultistepScheduler", dict(solver_order=3, solver_type="bh1")),
}


def make_theirs(name, kind, steps):
    """A diffusers scheduler that visits exactly `steps`.

    Their spacing rules differ among themselves (S + 1 points without the last for DPM-Solver and UniPC, fractions for
    Euler's linspace, T // S in "leading"), so both sides get our steps. Where `set_timesteps` takes no list, the two
    attributes that it would fill are filled here. Their table of noise levels is rounded to float32, which Heun's second
    slope divides by the smallest of them; it is replaced by the same levels in float64 (UniPC's solve wants float32).
    """
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers, which `make test` installs")
    class_name, settings = LIBRARY[name]
    extra = dict(lower_order_final=True) if "Singlestep" in class_name else {}
    scheduler = getattr(diffusers, class_name)(**TABLE, **settings, **extra, prediction_type=diffusers_kind[kind])
    if "timesteps" in inspect.signature(scheduler.set_timesteps).parameters:
        scheduler.set_timesteps(timesteps=steps)
    else:
        scheduler.set_timesteps(len(steps))
        scheduler.timesteps = torch.tensor(steps, dtype=scheduler.timesteps.dtype)
    acp = SCHEDULE.alphas_cumprod[steps].double()
    levels = ((1 - acp) / acp).sqrt()
    if name == "heun":
        levels = torch.cat([levels[:1], levels[1:].repeat_interleave(2)])
    levels = torch.cat([levels, scheduler.sigmas[-1:].double()])  # ends at 0, or at sigma_min
    assert len(levels) == len(scheduler.sigmas)
    scheduler.sigmas = levels.float() if "UniPC" in class_name else levels
    if "Singlestep" in class_name:
        ours = [k + 1 for size in block_sizes(len(steps), settings["solver_order"]) for k in range(size)]
        same = scheduler.order_list == ours
        # the one disagreement, S = 2 (mod 3): test_a_block_of_one_before_the_last_costs_an_order says who is right
        assert same or settings["solver_order"] == 3 and len(steps) % 3 == 2
        scheduler.order_list = ours
    return scheduler


def their_states(name, scheduler, model, x, steps):
    """Drive a scheduler by hand; every state after x_T, in our coordinates."""
    acp, path = SCHEDULE.alphas_cumprod.double(), []
    if name in SIGMA_SPACE:
        x = x / acp[steps[0]].sqrt()
    for t in scheduler.timesteps:
        asked = scheduler.scale_model_input(x, t)
        x = scheduler.step(model(asked, t.long().expand(len(x))), t, x).prev_sample
        path.append(x)
    if name == "heun":
        path = [*path[1:-1:2], path[-1]] if len(steps) > 1 else path
    if name in SIGMA_SPACE:
        path = [x * acp[t].sqrt() for x, t in zip(path, steps[1:])] + path[-1:]
    return path


def bounded_net():
    """A random network whose x0 stays in [-1, 1], like a picture: states stay small, and float32 rounding with them.

    Both sides walk in float64 where theirs allows it (their tables of noise levels stay float32).
    """
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Tanh(),
                                 torch.nn.Conv2d(8, 3, 3, padding=1)).double().requires_grad_(False)
    return lambda x, t: torch.tanh(2 * layers(x.double() + (t / T).reshape(-1, 1, 1, 1))).to(x.dtype)


BOUNDED = bounded_net()


@pytest.fixture
def shared_noise(monkeypatch):
    """The same noise for both sides, call by call."""
    noises = [torch.randn(X_T.shape, generator=seeded(i)) for i in range(60)]
    ours, theirs = iter(noises), iter(noises)
    for module in (samplers, solvers):
        monkeypatch.setattr(module, "randn", lambda *_: next(ours))
    for part in ("euler_ancestral_discrete", "dpmsolver_multistep"):
        module = pytest.importorskip(f"diffusers.schedulers.scheduling_{part}", reason="needs diffusers, which `make test` installs")
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: next(theirs))


GRID = [(kind, spacing, S) for kind in ("eps", "v") for spacing in ("leading", "linspace", "trailing") for S in (1, 2, 3, 8, 21)]
GRID += [(kind, "trailing", S) for kind in ("eps", "v", "x0") for S in (10, 50)]


@pytest.mark.parametrize("name", LIBRARY)
@pytest.mark.parametrize("kind, spacing, S", GRID)
def test_agrees_with_diffusers(name, kind, spacing, S, shared_noise):
    steps, model = timesteps(S, T, spacing), as_kind(kind, BOUNDED)
    scheduler = make_theirs(name, kind, steps)
    if name == "euler_a" and kind == "x0":
        with pytest.raises(NotImplementedError):  # "prediction_type not implemented yet: sample"
            their_states(name, scheduler, model, X_T.double(), steps)
        return
    their_path = their_states(name, scheduler, model, X_T.double(), steps)
    function, _, variant = name.partition(" ")
    options = {"variant": variant} if variant else {}
    states = trace(SAMPLERS[function].function, Denoiser(model, SCHEDULE, kind), X_T.double(), steps, **options)[1]
    our_path = [s.x_next for s in states]
    assert len(our_path) == len(their_path) == S
    if name.startswith("dpm_"):  # theirs refuses to end eps-solvers at zero noise (final_sigmas_type): ours does end there
        our_path, their_path = our_path[:-1], their_path[:-1]
    if variant == "bh1":  # theirs computes inf * 0 in the step to zero noise: the sample is not a number
        assert their_path[-1].isnan().all() and our_path[-1].isfinite().all()
        our_path, their_path = our_path[:-1], their_path[:-1]
    worst = [(a - b).abs().max().item() for a, b in zip(our_path, their_path)]
    assert all(difference <= 1e-4 for difference in worst), f"differences {worst}"


def their_plms(kind, S, spacing):
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers, which `make test` installs")
    scheduler = diffusers.PNDMScheduler(**TABLE, skip_prk_steps=True, set_alpha_to_one=True, timestep_spacing=spacing,
                                        prediction_type=diffusers_kind[kind])
    scheduler.set_timesteps(S)
    scheduler.alphas_cumprod = SCHEDULE.alphas_cumprod.double()  # the same table; their quotients of float32 scalars would cancel to 2e-4
    return scheduler


def plms_states(scheduler, model, x):
    path = [x := scheduler.step(model(x, t.expand(len(x))), t, x).prev_sample for t in scheduler.timesteps]
    return path[1:] if len(path) > 1 else path  # the first of two calls is only the trial step


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("S", [1, 2, 4, 5, 10, 50])
def test_plms_agrees_with_diffusers(S, spacing):
    """eps-models, and S that divide T: theirs steps from t to t - T // S whatever the next chosen step is.

    In float64, with a bounded network: with `net()` and S = 2 states grow to 270, and float32 alone makes 2e-4 of that.
    """
    model, x = as_kind("eps", BOUNDED), X_T.double()
    ours = [s.x_next for s in trace(plms, Denoiser(model, SCHEDULE), x, timesteps(S, T, spacing))[1]]
    theirs = plms_states(their_plms("eps", S, spacing), model, x)
    assert len(ours) == len(theirs) == S
    worst = [(a - b).abs().max().item() for a, b in zip(ours, theirs)]
    assert all(difference <= 1e-4 for difference in worst), f"differences {worst}"


DOT = 0.4
def one_point(kind):  # noqa: E302
    """The perfect network for data of one point: eps never changes along a road, and every consistent solver is exact."""
    return as_kind(kind, lambda x, t: torch.full_like(x, DOT))


def distance_to_the_road(states, steps, eps):
    """How far each state is from where it should be: on the straight road between the point and its noise."""
    levels = [SCHEDULE.alphas_cumprod[t].item() for t in steps[1:]] + [1.0]
    return max((x - (a**0.5 * DOT + (1 - a) ** 0.5 * eps)).abs().max().item() for x, a in zip(states, levels))


def test_diffusers_plms_mixes_velocities_of_different_levels():
    """Theirs adds up past v-predictions and converts the sum at the current level: not exact even for one point."""
    S, steps, eps = 10, timesteps(10, T), torch.randn(4, 2, generator=seeded(0))
    a = SCHEDULE.alphas_cumprod[steps[0]].item()
    x = a**0.5 * DOT + (1 - a) ** 0.5 * eps
    error = lambda kind: distance_to_the_road(plms_states(their_plms(kind, S, "trailing"), one_point(kind), x), steps, eps)
    ours = [s.x_next for s in trace(plms, Denoiser(one_point("v"), SCHEDULE, "v"), x, steps)[1]]
    assert distance_to_the_road(ours, steps, eps) < 1e-4 and error("eps") < 1e-4 and error("v") > 0.05


@pytest.mark.parametrize("their_class", ["PNDMScheduler", "DDIMScheduler"])
def test_diffusers_linspace_lands_beside_the_next_step(their_class):
    """Theirs steps from t to t - T // S, but asks at the next point of linspace: states carry another level's noise."""
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers, which `make test` installs")
    S, eps = 10, torch.randn(4, 2, generator=seeded(0))
    steps = timesteps(S, T, "linspace")
    a = SCHEDULE.alphas_cumprod[steps[0]].item()
    x = a**0.5 * DOT + (1 - a) ** 0.5 * eps
    extra = dict(skip_prk_steps=True) if their_class == "PNDMScheduler" else dict(clip_sample=False)
    scheduler = getattr(diffusers, their_class)(**TABLE, set_alpha_to_one=True, timestep_spacing="linspace", **extra)
    scheduler.set_timesteps(S)
    assert sorted(set(scheduler.timesteps.tolist()), reverse=True) == steps
    theirs = plms_states(scheduler, one_point("eps"), x) if their_class == "PNDMScheduler" else their_states(
        "ddim", scheduler, one_point("eps"), x, steps)
    function = plms if their_class == "PNDMScheduler" else ddim
    ours = [s.x_next for s in trace(function, Denoiser(one_point("eps"), SCHEDULE), x, steps)[1]]
    assert distance_to_the_road(ours, steps, eps) < 1e-4 < 0.02 < distance_to_the_road(theirs, steps, eps)


@pytest.mark.parametrize("S", [5, 12, 30])
def test_karras_steps_agree_with_diffusers(S):
    """Theirs then keeps the unrounded noise levels beside the rounded steps; ours has a network's own levels."""
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers, which `make test` installs")
    theirs = diffusers.DPMSolverMultistepScheduler(**TABLE, use_karras_sigmas=True)
    theirs.set_timesteps(S)
    assert theirs.timesteps.tolist() == BY_LEVEL["karras"](S, SCHEDULE.alphas_cumprod.tolist())


@pytest.mark.parametrize("name", [n for n, info in SAMPLERS.items() if not info.stochastic])
@pytest.mark.parametrize("kind", ["x0", "eps", "v"])
def test_one_point_keeps_every_solver_on_its_road(name, kind):
    """Whatever is averaged is constant then, so weights that sum to 1 and a step that solves exactly leave no error."""
    for S in (1, 2, 5, 12):
        steps, eps = timesteps(S, T), torch.randn(4, 2, generator=seeded(0)).double()
        a = SCHEDULE.alphas_cumprod[steps[0]].item()
        x = a**0.5 * DOT + (1 - a) ** 0.5 * eps
        states = trace(SAMPLERS[name].function, Denoiser(one_point(kind), SCHEDULE, kind), x, steps)[1]
        assert distance_to_the_road([s.x_next for s in states], steps, eps) < 1e-9


# ---------------------------------------------------------------- few steps, zero terminal SNR
@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("spacing", [*SPACINGS, *BY_LEVEL])
def test_few_steps_degrade_gracefully(name, spacing):
    """Fewer steps than a method has stages or history: lower order, the promised cost, finite states."""
    for schedule, kind in ((SCHEDULE, "eps"), (ZERO_TERMINAL, "v"), (ZERO_TERMINAL, "x0")):
        for S in range(1, 8):
            denoiser = Denoiser(lambda x, t: 0.9 * x, schedule, kind)
            assert torch.isfinite(sample(denoiser, (2, 3), S, name, spacing=spacing, generator=seeded(0))).all()
            assert denoiser.calls == SAMPLERS[name].nfe(S)


@functools.cache
def road_from_pure_noise():
    return exact_flow(ORACLE.v, START, 0.0, ZERO_TERMINAL.alphas_cumprod[0].item(), steps=1000)


@pytest.mark.parametrize("name", [n for n, info in SAMPLERS.items() if not info.stochastic])
@pytest.mark.parametrize("kind", ["v", "x0"])
def test_zero_terminal_snr_leads_to_the_right_place(name, kind):
    """From pure noise along the exact ODE of a mixture; the first step crosses an infinite stretch of lambda."""
    denoiser = Denoiser(ORACLE.model(ZERO_TERMINAL, kind), ZERO_TERMINAL, kind)
    exact = road_from_pure_noise()
    state = lambda S: trace(SAMPLERS[name].function, denoiser, START, log_snr_timesteps(S, denoiser.table))[1][-1].x_t
    few, many = ((state(S) - exact).square().mean().sqrt().item() for S in (25, 100))
    assert many < (0.15 if SAMPLERS[name].order == 1 else 0.03) and many < few, (few, many)


@pytest.mark.parametrize("options", [{"variant": "bh1"}, {"corrector": "none"}, {"variant": "bh1", "corrector": "none"}])
def test_unipc_variants_from_pure_noise(options):
    denoiser = Denoiser(ORACLE.model(ZERO_TERMINAL, "v"), ZERO_TERMINAL, "v")
    for function in (unipc_2, unipc_3):
        for S in (1, 2, 3, 20):
            assert torch.isfinite(function(denoiser, START, timesteps(S, T), **options)).all()


# ---------------------------------------------------------------- options and errors
@pytest.mark.parametrize("eta", [-0.1, 1.1, math.nan])
def test_eta_is_checked(eta):
    with pytest.raises(ValueError, match="eta: got"):
        euler_a(IDEAL, START, [5], eta=eta)


@pytest.mark.parametrize("function", [unipc_2, unipc_3])
def test_unknown_variants_list_the_known(function):
    with pytest.raises(ValueError, match="variant: got 'bh3', expected one of 'bh2', 'bh1'"):
        function(IDEAL, START, [5], variant="bh3")
    with pytest.raises(ValueError, match="corrector: got 'on', expected one of 'unic', 'none'"):
        function(IDEAL, START, [5], corrector="on")


@pytest.mark.parametrize("name", SAMPLERS)
def test_unknown_options_name_the_sampler(name):
    with pytest.raises(TypeError, match=rf"{name}\(\) got an unexpected keyword argument 'churn'"):
        sample(IDEAL, (1, 2), 3, name, churn=1.0)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [[], [5, 5], [3, 4], [T], [4, -1]])
def test_bad_step_lists(name, steps):
    with pytest.raises(ValueError, match="strictly decreasing"):
        SAMPLERS[name].function(IDEAL, START, steps)


def test_every_model_knows_every_sampler():
    import ldm_edu

    model = ldm_edu.load("scenes-text")
    assert model.sample(["a red circle"], steps=2, sampler="heun").shape[1] == 3
    with pytest.raises(ValueError) as error:
        model.sample(["a red circle"], steps=2, sampler="huen")
    assert all(repr(name) in str(error.value) for name in SAMPLERS) and "did you mean 'heun'" in str(error.value)


# ---------------------------------------------------------------- inversion
def test_inversion_speaks_all_kinds():
    x, steps = ORACLE.sample(32, seeded(0)), timesteps(30, T)
    outs = [ddim_invert(Denoiser(ORACLE.model(SCHEDULE, kind), SCHEDULE, kind), x, steps) for kind in ("x0", "eps", "v")]
    assert_close(outs[1], outs[0], rtol=0, atol=1e-10)
    assert_close(outs[2], outs[0], rtol=0, atol=1e-10)


def up_the_fine_clock(S, x):
    """Invert over S + 1 steps equal in lambda; the noise, the steps and the denoiser."""
    n = len(FINE.alphas_cumprod) - 1
    steps, denoiser = [n * k // S for k in range(S, -1, -1)], Denoiser(ORACLE.model(FINE, "x0"), FINE, "x0")
    return ddim_invert(denoiser, x, steps), steps, denoiser


def test_inversion_round_trip_is_first_order():
    x, counts, errors = ORACLE.sample(64, seeded(1)), (20, 40, 80, 160), []
    for S in counts:
        x_T, steps, denoiser = up_the_fine_clock(S, x)
        errors.append((ddim(denoiser, x_T, steps) - x).square().mean().sqrt().item())
    assert errors[-1] < 0.05 and 0.8 < slope_of(counts, errors) < 1.3, errors


def test_inversion_follows_the_exact_flow_upwards():
    x = ORACLE.sample(64, seeded(1))
    exact = exact_flow(ORACLE.v, x, 1.0, FINE.alphas_cumprod[-1].item(), steps=1000)
    errors = [(up_the_fine_clock(S, x)[0] - exact).square().mean().sqrt().item() for S in (40, 160)]
    assert errors[1] < 0.03 and errors[1] < errors[0] / 3, errors


def test_inversion_contract():
    x, steps = torch.randn(2, 3, 4, 4, generator=seeded(0)), timesteps(6, T)
    before, asked, states = x.clone(), [], []
    model = lambda x, t: asked.append(t[0].item()) or 0.9 * x
    out = ddim_invert(Denoiser(model, SCHEDULE), x, steps, callback=states.append)
    assert torch.equal(x, before) and steps == timesteps(6, T)
    assert asked == [steps[-1], *steps[:0:-1]]
    assert [s.t for s in states] == [-1, *steps[:0:-1]] and [s.step.t_next for s in states] == steps[::-1]
    assert [s.nfe for s in states] == [1, 2, 3, 4, 5, 6] and all(s.S == 6 for s in states)
    assert torch.equal(states[-1].x_next, out) and torch.equal(states[0].x_t, x) and states[0].step.acp == 1
    for state in states:
        assert_close(state.step.acp**0.5 * state.x0 + (1 - state.step.acp) ** 0.5 * state.eps, state.x_t, rtol=1e-4, atol=1e-4)
    alone = ddim_invert(Denoiser(lambda x, t: 0.9 * x, SCHEDULE), x[1:], steps)
    assert torch.equal(alone[0], out[1])
    assert ddim_invert(Denoiser(model, SCHEDULE), x.half(), steps).dtype == torch.float32
    assert not ddim_invert(Denoiser(lambda x, t: torch.ones((), requires_grad=True) * x, SCHEDULE), x, steps).requires_grad
    # it never asks at the highest step, so an eps-model may be inverted up to zero terminal SNR
    assert torch.isfinite(ddim_invert(Denoiser(model, ZERO_TERMINAL), x, steps)).all()
    assert torch.isfinite(ddim_invert(Denoiser(model, ZERO_TERMINAL, "v"), x, steps)).all()


def test_inversion_errors():
    with pytest.raises(ValueError, match="x0: got dtype torch.int64"):
        ddim_invert(IDEAL, torch.zeros(1, 2, dtype=torch.int64), [5])
    for steps in ([], [3, 4], [T], [4, -1]):
        with pytest.raises(ValueError, match="strictly decreasing"):
            ddim_invert(IDEAL, START, steps)


# ---------------------------------------------------------------- mistakes, put in one by one
SOURCE = inspect.getsource(solvers)


def check_order_of(name, low):
    def check(module):
        errors = [error_at_the_end(getattr(module, name), K) for K in (20, 80)]
        assert slope_of((20, 80), errors) > low
    return check


def check_no_memory(module):
    """A second walk gives what the first gave: no history survives."""
    for name in ("plms", "unipc_3", "dpmpp_3s", "dpmpp_2m_sde"):
        first, again = (getattr(module, name)(IDEAL, START, timesteps(7, T), generator=seeded(0)) for _ in range(2))
        assert torch.equal(first, again), name


def check_seeds(module):
    for name in ("euler_a", "dpmpp_2m_sde"):
        batch, alone = (getattr(module, name)(IDEAL, START[:1].expand(n, 2), timesteps(5, T), generator=make_generators(seed, n))
                        for seed, n in ((4, 3), (6, 1)))
        assert torch.equal(batch[2], alone[0]), name


def check_moments_of_euler_a(module):
    out = module.euler_a(IDEAL, START, timesteps(20, T), generator=seeded(0))
    assert_close(out, ddpm(IDEAL, START, timesteps(20, T), generator=seeded(0)), rtol=0, atol=1e-9)


MUTANTS = {
    "history shared by all walks": ("    past = deque(maxlen=4)", "    past = _SHARED", check_no_memory),
    "corrector left out": ("if before and correct:", "if False:", check_order_of("unipc_2", 2.6)),
    "corrector steps on from the predicted state": ("hold_x0(before[0], before[1],", "hold_x0(before[0], x_t,",
                                                    check_order_of("unipc_2", 2.6)),
    "corrector repeats the wrong step": ("hold_x0(before[0], before[1],", "hold_x0(step, before[1],", check_order_of("unipc_2", 2.6)),
    "PLMS mixes up two coefficients": ("(3 / 2, -1 / 2)", "(3 / 2, 1 / 2)", check_order_of("plms", 1.6)),
    "half in place of the first moment": ("0.5 if place[step.i] == 1 else step_moments(h if kind == \"x0\" else -h, 1)[1]", "0.5",
                                          check_order_of("dpmpp_3s", 2.5)),
    "sign of h in eps-blocks": ("step_moments(h if kind == \"x0\" else -h, 1)", "step_moments(h, 1)", check_order_of("dpm_3s", 2.5)),
    "stage restarts from the newest state": ("HOLD[kind](span, x_start, mean)", "HOLD[kind](step, x_t, mean)", check_order_of("dpm_3s", 2.5)),
    "Heun looks again where it started": ("denoiser(trial, step.t_next)", "denoiser(x_t, step.t)", check_order_of("heun", 1.6)),
    "one seed for the batch": ("randn(x_t.shape, generator, x_t.device", "randn(x_t.shape, generator[0], x_t.device", check_seeds),
    "down without the root": ("math.sqrt(sigma_next**2 - up**2)", "(sigma_next - up)", check_moments_of_euler_a),
}


@pytest.mark.parametrize("bug", MUTANTS)
def test_mistakes_are_caught(bug):
    old, new, check = MUTANTS[bug]
    assert old in SOURCE, f"the line that {bug!r} would change is gone: update this test"
    mutant = types.ModuleType("mutant")
    mutant.__package__ = solvers.__package__
    registered = dict(SAMPLERS)
    exec(compile(SOURCE.replace(old, new).replace("VARIANTS =", "_SHARED = deque(maxlen=4)\nVARIANTS =", 1), "mutant", "exec"), mutant.__dict__)
    SAMPLERS.update(registered)  # the mutant registered itself too
    check(solvers)
    with pytest.raises((AssertionError, ValueError)):
        check(mutant)
