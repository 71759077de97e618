"""Samplers: counts, ends, seeds, agreement with diffusers, exact distributions, measured orders, historical bugs."""
import functools
import inspect
import math
import types
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from ldm_edu import samplers as lib
from ldm_edu import solvers
from ldm_edu.core import make_generators
from ldm_edu.samplers import (
    SAMPLERS,
    SPACINGS,
    Denoiser,
    Prediction,
    ddim,
    ddpm,
    dpmpp_2m,
    falling,
    half_log_snr,
    karras_timesteps,
    log_snr_timesteps,
    sample,
    timesteps,
)

T = 1000


def schedule_of(acp):
    return types.SimpleNamespace(alphas_cumprod=acp)


def scaled_linear(n=T):
    return torch.linspace(0.0015**0.5, 0.0195**0.5, n, dtype=torch.float64).square() * T / n


BETAS = scaled_linear()
SCHEDULE = schedule_of((1 - BETAS).cumprod(0).float())
ZERO_TERMINAL = schedule_of(torch.cat([SCHEDULE.alphas_cumprod[:-1] - SCHEDULE.alphas_cumprod[-1], torch.zeros(1)]))


# ---------------------------------------------------------------- oracles
class Gaussian:
    """The exact denoiser of N(mean, cov): linear, so that every moment of every sampler is known."""

    def __init__(self, mean, cov, schedule=SCHEDULE):
        self.mean, self.cov = torch.tensor(mean).double(), torch.tensor(cov).double()
        self.acp = schedule.alphas_cumprod.double()

    def gain(self, a):
        return math.sqrt(a) * self.cov @ torch.linalg.inv(a * self.cov + (1 - a) * torch.eye(len(self.mean)))

    def __call__(self, x_t, t):
        a = self.acp[t[0]].item()
        return (self.mean + (x_t.double() - math.sqrt(a) * self.mean) @ self.gain(a).T).to(x_t.dtype)

    def flow(self, x_T, a):
        """The probability-flow ODE's map from noise level a to clean data, in closed form."""
        values, basis = torch.linalg.eigh(self.cov)
        scale = (values / (a * values + 1 - a)).sqrt()
        return self.mean + (x_T - math.sqrt(a) * self.mean) @ basis * scale @ basis.T


class Mixture:
    """The exact denoiser of a mixture of round Gaussians in the plane."""

    def __init__(self, schedule=SCHEDULE, spread=0.35):
        self.means = torch.tensor([[1.4, 0.2], [-1.0, 1.0], [-0.3, -1.3]]).double()
        self.weights, self.spread = torch.tensor([0.5, 0.3, 0.2]).double(), spread
        self.acp = schedule.alphas_cumprod.double()

    def __call__(self, x_t, t):
        a = self.acp[t[0]].item()
        total = a * self.spread**2 + 1 - a
        offset = x_t[:, None] - math.sqrt(a) * self.means
        share = (self.weights.log() - offset.square().sum(-1) / (2 * total)).softmax(1)
        expected = self.means + math.sqrt(a) * self.spread**2 / total * offset
        return (share[..., None] * expected).sum(1)


def as_kind(kind, x0_model, schedule=SCHEDULE):
    """The same oracle in another language: an eps- or v-model, written out here independently of the library."""
    def model(x_t, t):
        a = schedule.alphas_cumprod.double()[t[0]].item()
        x0 = x0_model(x_t, t)
        eps = (x_t - math.sqrt(a) * x0) / math.sqrt(1 - a)
        return {"x0": x0, "eps": eps, "v": math.sqrt(a) * eps - math.sqrt(1 - a) * x0}[kind]
    return model


def net(channels=3, scale=0.5):
    """A random little image network that listens to the time."""
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Conv2d(channels, 8, 3, padding=1), torch.nn.Tanh(),
                                 torch.nn.Conv2d(8, channels, 3, padding=1)).requires_grad_(False)
    return lambda x, t: scale * layers(x + (t / T).reshape(-1, 1, 1, 1)) + 0.7 * x


def trace(function, denoiser, x_T, steps, **options):
    """Every state of a walk."""
    states = []
    out = function(denoiser, x_T, steps, callback=states.append, **options)
    return out, states


# ---------------------------------------------------------------- time steps
def check_timesteps(choose):
    for spacing in SPACINGS:
        for n in (1, 2, 7, 64, T):
            for S in range(1, n + 1):
                steps = choose(S, n, spacing)
                assert len(steps) == S, f"{spacing}: {len(steps)} steps for S={S}"
                assert all(type(t) is int for t in steps)
                assert all(a > b for a, b in pairwise(steps)), f"{spacing}: not decreasing at S={S}"
                assert steps[0] < n and steps[-1] >= 0, f"{spacing}: {steps[0]}...{steps[-1]} leaves [0, {n})"
                if spacing != "leading":
                    assert steps[0] == n - 1
                if spacing == "leading" or spacing in ("linspace", "quadratic") and S > 1:
                    assert steps[-1] == 0


def test_exactly_S_steps_for_every_S():
    check_timesteps(timesteps)


@pytest.mark.parametrize("table", [SCHEDULE, ZERO_TERMINAL, schedule_of((torch.arange(T, 0, -1) / (T + 1)).square())],
                         ids=["scaled_linear", "zero_terminal", "quadratic"])
def test_log_snr_steps(table):
    acp = table.alphas_cumprod.tolist()
    for S in [*range(1, 60), *range(60, T, 37), T - 1, T]:
        steps = log_snr_timesteps(S, acp)
        assert len(steps) == S and all(type(t) is int for t in steps)
        assert all(a > b for a, b in pairwise(steps)) and steps[-1] >= 0
        assert steps[0] == T - 1 and (S == 1 or steps[-1] == 0)
    widest = lambda steps: max(half_log_snr(acp[b]) - half_log_snr(acp[a]) for a, b in pairwise(steps) if acp[a] > 0)
    assert widest(log_snr_timesteps(20, acp)) < 0.5 * widest(timesteps(20, T, "linspace"))
    for choose in (log_snr_timesteps, karras_timesteps):
        for S in (0, T + 1, 2.0):
            with pytest.raises(ValueError, match="steps: got"):
                choose(S, acp)
        assert choose(1, [0.0]) == [0]


@pytest.mark.parametrize("table", [SCHEDULE, ZERO_TERMINAL], ids=["scaled_linear", "zero_terminal"])
def test_karras_steps(table):
    acp = table.alphas_cumprod.tolist()
    for S in [*range(1, 60), *range(60, T, 37), T - 1, T]:
        steps = karras_timesteps(S, acp)
        assert len(steps) == S and all(type(t) is int for t in steps)
        assert all(a > b for a, b in pairwise(steps)) and steps[-1] >= 0
        assert steps[0] == T - 1 and (S == 1 or steps[-1] == 0)
    sigma = lambda t: math.exp(-half_log_snr(acp[t]))
    start = sigma(T - 1) if acp[-1] else sigma(T - 2)  # an infinite noise level has no place in a sum
    for k, t in enumerate(karras_timesteps(12, acp)):
        wanted = (start ** (1 / 7) + k / 11 * (sigma(0) ** (1 / 7) - start ** (1 / 7))) ** 7
        nearest = min(range(T), key=lambda u: abs(math.log(sigma(u) / wanted)) if acp[u] else math.inf)
        assert t == nearest or k == 0
    if acp[-1]:  # rho = 1: equal steps of the noise level itself, where the schedule is fine enough to have them
        gaps = [sigma(a) - sigma(b) for a, b in pairwise(karras_timesteps(12, acp, rho=1.0))]
        assert max(gaps) < 1.2 * min(gaps)
    nearly = karras_timesteps(12, acp, rho=1e6)  # rho without end is log-SNR
    assert max(abs(a - b) for a, b in zip(nearly, log_snr_timesteps(12, acp), strict=True)) <= 1


def test_quadratic_steps():
    assert timesteps(4, 10, "quadratic") == [9, 4, 1, 0] and timesteps(1, 10, "quadratic") == [9]
    roots = [t**0.5 for t in timesteps(11, T, "quadratic")]
    assert all(abs(a - b - 999**0.5 / 10) < 0.3 for a, b in pairwise(roots))
    assert falling([9, 9, 9, 0]) == [9, 8, 7, 0] and falling([3, 0, 0, 0]) == [3, 2, 1, 0] and falling([5]) == [5]


def test_half_log_snr():
    assert half_log_snr(0.5) == 0 and half_log_snr(1.0) == math.inf and half_log_snr(0.0) == -math.inf
    assert half_log_snr(0.8) == pytest.approx(math.log(2))


def asked_steps(name, steps):
    """Where each sampler asks the network, written out by hand."""
    if name == "heun" and len(steps) > 1:
        return [t for pair in pairwise(steps) for t in pair] + steps[-1:]
    return steps[:1] + steps[1:2] + steps[1:] if name == "plms" else steps


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("spacing, choose", lib.BY_LEVEL.items())
def test_spacing_by_noise_level(name, spacing, choose):
    asked = []
    model = lambda x, t: asked.append(t[0].item()) or 0.9 * x
    out = sample(Denoiser(model, ZERO_TERMINAL, "v"), (2, 1), 12, name, spacing=spacing)
    assert asked == asked_steps(name, choose(12, ZERO_TERMINAL.alphas_cumprod.tolist())) and torch.isfinite(out).all()


@pytest.mark.parametrize("S", [0, -1, T + 1, 2.0, "10", None, True])
def test_bad_S(S):
    with pytest.raises(ValueError, match=r"expected an integer in 1 \.\.\. 1000"):
        timesteps(S, T)


def test_unknown_names_list_the_choices():
    with pytest.raises(ValueError, match="'trailing', 'leading', 'linspace'"):
        timesteps(10, T, "uniform")
    denoiser = Denoiser(net(), SCHEDULE)
    with pytest.raises(ValueError, match="'ddpm', 'ddim', 'dpmpp_2m', 'euler', 'euler_a', 'heun', .*'unipc_3' .did you mean 'euler'"):
        sample(denoiser, (1, 3, 4, 4), 5, "eulr")
    with pytest.raises(ValueError, match="spacing"):
        sample(denoiser, (1, 3, 4, 4), 5, spacing="uniform")
    with pytest.raises(ValueError, match="'small', 'large'"):
        ddpm(denoiser, torch.zeros(1, 3, 4, 4), [5], variance="medium")
    with pytest.raises(ValueError, match="prediction"):
        Denoiser(net(), SCHEDULE, "noise")


@pytest.mark.parametrize("steps", [[], [5, 5], [3, 4], [T], [4, -1]])
def test_bad_step_lists(steps):
    with pytest.raises(ValueError, match="strictly decreasing"):
        ddim(Denoiser(net(), SCHEDULE), torch.zeros(1, 3, 4, 4), steps)


@pytest.mark.parametrize("eta", [-0.1, 1.1, math.nan])
def test_bad_eta(eta):
    with pytest.raises(ValueError, match="eta"):
        ddim(Denoiser(net(), SCHEDULE), torch.zeros(1, 3, 4, 4), [5], eta=eta)


# ---------------------------------------------------------------- evaluations
class Anything:
    """A state whose arithmetic costs nothing: every result is the same object."""

    shape, device, dtype = (1,), "cpu", torch.float32
    is_floating_point = lambda self: True
    to = lambda self, *_: self
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = lambda self, _: self


class Counter:
    """The cheapest denoiser there is: it counts its calls and always answers the same."""

    T = T
    table = SCHEDULE.alphas_cumprod.tolist()
    answer = Prediction(Anything(), Anything())

    def __init__(self):
        self.calls = 0

    def acp(self, t):
        return 1.0 if t == -1 else self.table[t]

    def __call__(self, x_t, t):
        self.calls += 1
        return self.answer


EXPECTED_NFE = {"heun": lambda S: 2 * S - 1, "plms": lambda S: S + 1 if S > 1 else 1}


@pytest.fixture(scope="module")
def every_S():
    return [timesteps(S, T) for S in range(1, T + 1)]


@pytest.mark.parametrize("name", SAMPLERS)
def test_evaluations_for_every_S(name, every_S, monkeypatch):
    """Every S for the samplers of the first lesson and for PLMS, whose count is famous for being wrong; elsewhere a part."""
    for module in (lib, solvers):
        monkeypatch.setattr(module, "randn", lambda *_: Anything())
    monkeypatch.setattr(solvers, "step_moments", lambda h, n: [1.0, 0.5])  # what the weights are changes no count
    monkeypatch.setattr(solvers, "node_weights", lambda nodes, h: nodes)
    x_T, info = Anything(), SAMPLERS[name]
    for S, steps in enumerate(every_S, start=1):
        if S > 100 and S % 37 and S < T - 3 and name not in ("ddpm", "ddim", "dpmpp_2m", "plms"):
            continue
        denoiser = Counter()
        info.function(denoiser, x_T, steps)
        expected = EXPECTED_NFE.get(name, lambda S: S)(S)
        assert denoiser.calls == expected == info.nfe(S), f"{denoiser.calls} evaluations for S={S}"


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_real_denoiser_counts_and_finite(name, spacing):
    calls = []
    model = lambda x, t: calls.append(t.tolist()) or 0.9 * x
    for S in (1, 2, 3, 9, 111, 350, *[999] * (name == "ddim")):
        calls.clear()
        out = sample(Denoiser(model, SCHEDULE), (2, 1), S, name, spacing=spacing)
        assert calls == [[t, t] for t in asked_steps(name, timesteps(S, T, spacing))]
        assert torch.isfinite(out).all()


# ---------------------------------------------------------------- the end of the walk
def check_clean_end(module):
    """The last step lands exactly on the predicted x0: alphas_cumprod 1 and no noise.

    PLMS lands on its extrapolation of eps instead, so it is asked for what all must do: land on data of one point.
    """
    options = {"ddpm": [{}, {"variance": "large"}], "ddim": [{}, {"eta": 1.0}], "euler_a": [{}, {"eta": 0.5}]}
    dot = lambda x, t: torch.full_like(x, 0.3)
    for name, info in module.SAMPLERS.items():
        for extra in options.get(name, [{}]):
            for S in (1, 2, 3, 10):
                out = info.function(module.Denoiser(dot, SCHEDULE, "x0"), torch.randn(2, 3), module.timesteps(S, T), **extra)
                assert_close(out, torch.full_like(out, 0.3), rtol=0, atol=1e-5)
            if name == "plms":
                continue
            for S in (1, 2, 10):
                denoiser = module.Denoiser(net(), SCHEDULE)
                out, states = trace(info.function, denoiser, torch.randn(2, 3, 4, 4), module.timesteps(S, T), **extra)
                assert_close(out, states[-1].x0, rtol=1e-6, atol=1e-6)
                assert states[-1].step.acp_next == 1 and states[-1].step.last


def test_clean_end():
    check_clean_end(lib)


@pytest.mark.parametrize("name", SAMPLERS)
def test_no_noise_is_drawn_in_the_last_step(name):
    """One step of a stochastic sampler leaves its generators where they were."""
    generators = make_generators(0, 2)
    before = [g.get_state() for g in generators]
    for extra in ({"eta": 1.0} if name == "ddim" else {},):
        SAMPLERS[name].function(Denoiser(net(), SCHEDULE), torch.ones(2, 3, 4, 4), [T - 1], generator=generators, **extra)
    assert all(torch.equal(a, g.get_state()) for a, g in zip(before, generators, strict=True))


@pytest.mark.parametrize("name", SAMPLERS)
def test_callback_sees_the_whole_walk(name):
    x_T = torch.randn(2, 3, 4, 4)
    out, states = trace(SAMPLERS[name].function, Denoiser(net(), SCHEDULE), x_T, timesteps(7, T))
    assert [s.i for s in states] == list(range(7)) and [s.t for s in states] == timesteps(7, T)
    assert all(s.S == 7 and s.step.t == s.t for s in states)
    spent = {"heun": [2, 4, 6, 8, 10, 12, 13], "plms": [2, 3, 4, 5, 6, 7, 8]}.get(name, [1, 2, 3, 4, 5, 6, 7])
    assert [s.nfe for s in states] == spent
    assert [s.step.t_next for s in states] == [*timesteps(7, T)[1:], -1]
    assert torch.equal(states[0].x_t, x_T) and torch.equal(states[-1].x_next, out)
    assert all(torch.equal(a.x_next, b.x_t) for a, b in pairwise(states))
    for s in states:
        assert_close(s.step.acp**0.5 * s.x0 + (1 - s.step.acp) ** 0.5 * s.eps, s.x_t, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- seeds, precision, inputs
def check_alone_equals_batch(module):
    denoiser = module.Denoiser(lambda x, t: torch.tanh(x), SCHEDULE)

    def draw(seed, n, name, extra):
        return module.sample(denoiser, (n, 3, 4, 4), 6, name, generator=make_generators(seed, n), **extra)

    for name, extra in (*((name, {}) for name in module.SAMPLERS), ("ddim", {"eta": 1.0})):
        run = functools.partial(draw, name=name, extra=extra)
        together = run(10, 4)
        for i in range(4):
            assert torch.equal(run(10 + i, 1)[0], together[i]), f"{name}: image {i} depends on its neighbours"
        assert torch.equal(run(10, 2), together[:2])
        assert not torch.equal(together[0], together[1])


def test_alone_equals_batch():
    check_alone_equals_batch(lib)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("dtype, work", [(torch.float64, torch.float64), (torch.float32, torch.float32),
                                         (torch.bfloat16, torch.float32), (torch.float16, torch.float32)])
def test_precision(name, dtype, work):
    seen = []
    model = lambda x, t: seen.append(x.dtype) or (0.9 * x).to(dtype)
    out = SAMPLERS[name].function(Denoiser(model, SCHEDULE), torch.ones(2, 3, dtype=dtype), timesteps(5, T))
    assert out.dtype == work and set(seen) == {work}


def test_float64_is_float64_all_the_way():
    """In float64 the three kinds of model agree to 1e-10: no scalar was rounded to float32 on the way."""
    x_T = torch.randn(8, 2, dtype=torch.float64)
    for name in SAMPLERS:
        outs = [sample(Denoiser(as_kind(kind, Mixture()), SCHEDULE, kind), (8, 2), 20, name, x_T=x_T,
                       generator=make_generators(0, 8)) for kind in ("x0", "eps", "v")]
        assert outs[0].dtype == torch.float64
        assert_close(outs[1], outs[0], rtol=0, atol=1e-10)
        assert_close(outs[2], outs[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", SAMPLERS)
def test_inputs_are_not_modified(name):
    x_T, steps = torch.randn(2, 3, 4, 4), timesteps(5, T)
    before, steps_before = x_T.clone(), list(steps)
    seen = []
    SAMPLERS[name].function(Denoiser(net(), SCHEDULE), x_T, steps, callback=lambda s: seen.append((s, s.x_t.clone(), s.x0.clone())))
    assert torch.equal(x_T, before) and steps == steps_before
    assert all(torch.equal(s.x_t, x) and torch.equal(s.x0, x0) for s, x, x0 in seen), "a state changed after it was reported"


def test_input_errors():
    denoiser = Denoiser(net(), SCHEDULE)
    with pytest.raises(ValueError, match="floating point"):
        ddim(denoiser, torch.zeros(1, 3, 4, 4, dtype=torch.int64), [5])
    with pytest.raises(ValueError, match=r"x_T: got shape \(1, 3, 4, 4\), expected \(2, 3, 4, 4\)"):
        sample(denoiser, (2, 3, 4, 4), 5, x_T=torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="model output"):
        ddim(Denoiser(lambda x, t: x[:, :1], SCHEDULE), torch.zeros(1, 3, 4, 4), [5])


def test_gradients_are_not_kept():
    weight = torch.ones((), requires_grad=True)
    assert not sample(Denoiser(lambda x, t: weight * x, SCHEDULE), (1, 2), 3).requires_grad


# ---------------------------------------------------------------- zero terminal SNR
@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("kind", ["v", "x0"])
def test_zero_terminal_snr(name, kind):
    data = Gaussian([0.5, -1.0], [[0.3, 0.1], [0.1, 0.6]], ZERO_TERMINAL)
    denoiser = Denoiser(as_kind(kind, data, ZERO_TERMINAL), ZERO_TERMINAL, kind)
    for S in (1, 2, 50):
        assert torch.isfinite(sample(denoiser, (4, 2), S, name)).all()
    if not SAMPLERS[name].stochastic:
        x_T = torch.randn(16, 2, dtype=torch.float64)
        out = sample(denoiser, (16, 2), 1000, name, x_T=x_T)
        assert_close(out, data.flow(x_T, 0.0), rtol=0, atol=1e-2)


@pytest.mark.parametrize("name", SAMPLERS)
def test_eps_model_is_refused_at_zero_terminal_snr(name):
    denoiser = Denoiser(net(), ZERO_TERMINAL, "eps")
    with pytest.raises(ValueError, match="eps-model at t=999, where alphas_cumprod = 0"):
        sample(denoiser, (1, 3, 4, 4), 5, name)
    assert torch.isfinite(sample(denoiser, (1, 3, 4, 4), 5, name, spacing="leading")).all()


# ---------------------------------------------------------------- parity with diffusers
diffusers_kind = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}


def their_walk(scheduler, model, x, noises=None):
    """Drive a diffusers scheduler by hand; returns every state after x_T."""
    path = []
    for i, t in enumerate(scheduler.timesteps):
        extra = {} if noises is None else {"variance_noise": noises[i]}
        x = scheduler.step(model(x, t.expand(len(x))), t, x, **extra).prev_sample
        path.append(x)
    return path


def compare(ours, theirs):
    assert len(ours) == len(theirs)
    worst = max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))
    assert worst <= 1e-4, f"largest difference {worst:.2g}"


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers", reason="needs diffusers, which `make test` installs")


@pytest.fixture
def shared_noise(monkeypatch):
    """The same noise for both sides: ours is drawn through `randn`, diffusers' DDPM through `randn_tensor`."""
    noises = [torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(T)]
    ours, theirs = iter(noises), iter(noises)
    for module in (lib, solvers):
        monkeypatch.setattr(module, "randn", lambda *_: next(ours))
    module = pytest.importorskip("diffusers.schedulers.scheduling_ddpm", reason="needs diffusers, which `make test` installs")
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: next(theirs))
    return noises


KINDS = pytest.mark.parametrize("kind", ["eps", "v", "x0"])
COUNTS = pytest.mark.parametrize("S", [1, 2, 10, 50])
X_T = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(3))


@KINDS
@COUNTS
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_parity_ddim(diffusers, shared_noise, kind, S, spacing, eta):
    theirs = diffusers.DDIMScheduler(trained_betas=BETAS.float().numpy(), clip_sample=False, set_alpha_to_one=True,
                                     prediction_type=diffusers_kind[kind], timestep_spacing=spacing)
    theirs.set_timesteps(S)
    assert theirs.timesteps.tolist() == timesteps(S, T, spacing)
    x, path = X_T, []
    for t, noise in zip(theirs.timesteps, shared_noise[:S], strict=True):
        x = theirs.step(net()(x, t.expand(3)), t, x, eta=eta, variance_noise=noise if eta else None).prev_sample
        path.append(x)
    _, states = trace(ddim, Denoiser(net(), SCHEDULE, kind), X_T, timesteps(S, T, spacing), eta=eta)
    compare([s.x_next for s in states], path)


DDPM_WALKS = [(kind, S, spacing, variance) for spacing, variance in (("leading", "small"), ("leading", "large"), ("trailing", "small"), ("linspace", "small"))
              for S in (1, 2, 10, 50, T) for kind in diffusers_kind
              if (S < T or kind == "eps") and (S > 1 or spacing != "linspace")]  # a linspace of one step is t = 0 there, T - 1 here


@pytest.mark.parametrize("kind, S, spacing, variance", DDPM_WALKS)
def test_parity_ddpm(diffusers, shared_noise, kind, S, spacing, variance):
    """Their "fixed_large" adds noise at the last step unless that step is t = 0, hence only "leading" for it."""
    theirs = diffusers.DDPMScheduler(trained_betas=BETAS.float().numpy(), clip_sample=False, timestep_spacing=spacing,
                                     prediction_type=diffusers_kind[kind], variance_type=f"fixed_{variance}")
    theirs.set_timesteps(S)
    assert theirs.timesteps.tolist() == timesteps(S, T, spacing)
    _, states = trace(ddpm, Denoiser(net(), SCHEDULE, kind), X_T, timesteps(S, T, spacing), variance=variance)
    compare([s.x_next for s in states], their_walk(theirs, net(), X_T))


@KINDS
@pytest.mark.parametrize("S", [1, 2, 3, 10, 20, 50])
def test_parity_dpmpp_2m(diffusers, kind, S):
    theirs = diffusers.DPMSolverMultistepScheduler(
        trained_betas=BETAS.float().numpy(), prediction_type=diffusers_kind[kind], algorithm_type="dpmsolver++",
        solver_order=2, solver_type="midpoint", final_sigmas_type="zero", timestep_spacing="trailing")
    theirs.set_timesteps(S)
    assert theirs.timesteps.tolist() == timesteps(S, T)
    _, states = trace(dpmpp_2m, Denoiser(net(), SCHEDULE, kind), X_T, timesteps(S, T))
    compare([s.x_next for s in states], their_walk(theirs, net(), X_T))


# ---------------------------------------------------------------- exact distributions
GAUSSIAN = Gaussian([0.5, -1.0], [[0.3, 0.15], [0.15, 0.6]])


@pytest.mark.parametrize("function, bound", [(ddim, 1.5e-2), (dpmpp_2m, 5e-3)])
def test_flow_map_of_a_gaussian(function, bound):
    x_T = torch.randn(64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = GAUSSIAN.flow(x_T, SCHEDULE.alphas_cumprod[-1].item())
    errors = [(function(Denoiser(GAUSSIAN, SCHEDULE, "x0"), x_T, timesteps(S, T)) - exact).abs().max().item()
              for S in (100, 1000)]
    assert errors[1] < bound and errors[1] < errors[0] / 5, errors


def moments_of_ddpm(steps, variance):
    """Push mean and covariance through the ancestral chain by hand: everything is linear for Gaussian data."""
    acp = SCHEDULE.alphas_cumprod.double()
    mean, cov, eye = torch.zeros(2).double(), torch.eye(2).double(), torch.eye(2).double()
    for t, s in pairwise([*steps, -1]):
        a, b = acp[t].item(), acp[s].item() if s >= 0 else 1.0
        beta = 1 - a / b
        gain = GAUSSIAN.gain(a)
        x0_weight, x_weight = b**0.5 * beta / (1 - a), (a / b) ** 0.5 * (1 - b) / (1 - a)
        step = x0_weight * gain + x_weight * eye
        mean = step @ mean + x0_weight * (GAUSSIAN.mean - math.sqrt(a) * gain @ GAUSSIAN.mean)
        noise = 0.0 if s < 0 else beta if variance == "large" else beta * (1 - b) / (1 - a)
        cov = step @ cov @ step.T + noise * eye
    return mean, cov


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("S", [7, 1000])
def test_ddpm_has_the_right_moments(variance, S):
    n = 20_000
    x_T = torch.randn(n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = ddpm(Denoiser(GAUSSIAN, SCHEDULE, "x0"), x_T, timesteps(S, T), variance=variance,
             generator=torch.Generator().manual_seed(1))
    mean, cov = moments_of_ddpm(timesteps(S, T), variance)
    if S == 1000:  # the chain of all steps reaches the data itself
        assert_close(mean, GAUSSIAN.mean, rtol=0, atol=2e-3)
        assert_close(cov, GAUSSIAN.cov, rtol=0.02, atol=2e-3)
        mean, cov = GAUSSIAN.mean, GAUSSIAN.cov
    spread = cov.diagonal()
    assert ((x.mean(0) - mean).abs() < 4 * (spread / n).sqrt()).all()
    error = ((cov**2 + spread[:, None] * spread) / n).sqrt()  # of a sample covariance
    assert ((x.T.cov() - cov).abs() < 4 * error).all(), (x.T.cov(), cov)


def test_all_steps_is_ddpm_equation_11():
    """At S = T every step is the original one, written with beta_t, alpha_t and eps [DDPM alg. 2]."""
    denoiser = Denoiser(lambda x, t: torch.tanh(x) + t[0] / T, SCHEDULE)
    _, states = trace(ddpm, denoiser, X_T.double(), timesteps(T, T), generator=torch.Generator().manual_seed(0))
    replay = torch.Generator().manual_seed(0)
    for s in states[:-1]:
        noise = torch.randn(s.x_t.shape, generator=replay).double()
        beta = BETAS[s.t].item()
        acp, acp_before = (1 - BETAS).cumprod(0)[s.t].item(), (1 - BETAS).cumprod(0)[s.t - 1].item()
        mean = (s.x_t - beta / math.sqrt(1 - acp) * s.eps) / math.sqrt(1 - beta)
        expected = mean + math.sqrt(beta * (1 - acp_before) / (1 - acp)) * noise
        assert_close(s.x_next, expected, rtol=0, atol=1e-4 * s.x_next.abs().max().item())


def check_ddim_eta_one_is_ddpm(module):
    denoiser = module.Denoiser(net(), SCHEDULE)
    run = lambda f, **k: f(denoiser, X_T, module.timesteps(20, T), generator=make_generators(0, 3), **k)
    assert_close(run(module.ddim, eta=1.0), run(module.ddpm), rtol=1e-4, atol=1e-4)


def test_ddim_eta_one_is_ddpm():
    check_ddim_eta_one_is_ddpm(lib)


def measured_order(function):
    """Slope of log error against log steps, at a fixed noise level before the jump to clean data."""
    x_T = torch.randn(32, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    last, span = 39, 960

    def state_at_last(f, S):
        steps = [last + span * k // S for k in range(S, -1, -1)]
        return trace(f, Denoiser(Mixture(), SCHEDULE, "x0"), x_T, steps)[1][-1].x_t

    exact, counts = state_at_last(dpmpp_2m, 960), (40, 80, 160)
    errors = [(state_at_last(function, S) - exact).square().mean().sqrt().log2().item() for S in counts]
    return (errors[0] - errors[-1]) / 2


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m"])
def test_measured_order(name):
    assert abs(measured_order(SAMPLERS[name].function) - SAMPLERS[name].order) < 0.35


def check_all_kinds_alike(module):
    x_T = torch.randn(8, 2, dtype=torch.float64)

    def draw(kind, name):
        denoiser = module.Denoiser(as_kind(kind, Mixture()), SCHEDULE, kind)
        return module.sample(denoiser, (8, 2), 12, name, x_T=x_T, generator=make_generators(0, 8))

    for name in module.SAMPLERS:
        x0, eps, v = (draw(kind, name) for kind in ("x0", "eps", "v"))
        assert_close(eps, x0, rtol=0, atol=1e-8)
        assert_close(v, x0, rtol=0, atol=1e-8)


# ---------------------------------------------------------------- the field's bugs, put in one by one
SOURCE = inspect.getsource(lib)
MUTANTS = {
    "3 noise in the last step": ("        if step.last:\n            return mean\n", "", check_clean_end),
    "5 direction without sigma": ("1 - step.acp_next - variance", "1 - step.acp_next", check_ddim_eta_one_is_ddpm),
    "6 CompVis steps": ("    if spacing == \"leading\":", "    if spacing == \"leading\":\n"
                        "        return [t + 1 for t in range(0, T, T // S)][::-1]\n    if spacing == \"leading\":",
                        lambda m: check_timesteps(m.timesteps)),
    "7 ends at acp[0]": ("1.0 if t == -1 else", "self.table[0] if t == -1 else", check_clean_end),
    "13 every model taken for eps": ("to_x0(self.prediction, raw", "to_x0('eps', raw", check_all_kinds_alike),
    "21 one seed for the batch": ("randn(x_t.shape, generator, x_t.device",
                                  "randn(x_t.shape, generator[0] if generator else None, x_t.device", check_alone_equals_batch),
}


@pytest.mark.parametrize("bug", MUTANTS)
def test_historical_bugs_are_caught(bug):
    old, new, check = MUTANTS[bug]
    assert old in SOURCE, f"the line that bug {bug} would change is gone: update this test"
    mutant = types.ModuleType("mutant")
    mutant.__package__ = lib.__package__  # the source imports its siblings relatively
    exec(compile(SOURCE.replace(old, new), "mutant", "exec"), mutant.__dict__)
    check(lib)
    with pytest.raises(AssertionError):
        check(mutant)


def test_kinds_alike():
    check_all_kinds_alike(lib)


def test_registry():
    for name, info in SAMPLERS.items():
        assert info.function.__name__ == name and info.function.__doc__
        parameters = inspect.signature(info.function).parameters
        assert list(parameters)[:3] == ["denoiser", "x_T", "timesteps"]
        assert {"generator", "callback"} <= set(parameters)
        x_T = torch.randn(2, 3, 4, 4)
        runs = [info.function(Denoiser(net(), SCHEDULE), x_T, timesteps(4, T), generator=make_generators(s, 2)) for s in (0, 9)]
        assert torch.equal(*runs) is not info.stochastic


@pytest.mark.parametrize("t", [-2, -1, T, 1000000, 2.0, "3", True, torch.tensor(1.5)])
def test_steps_that_the_schedule_has_not_are_refused(t):
    denoiser = Denoiser(lambda x_t, t: x_t, SCHEDULE)
    with pytest.raises(ValueError, match=rf"t: got .*, expected an integer in 0 \.\.\. {T - 1}"):
        denoiser(torch.zeros(2, 3), t)
    assert denoiser.calls == 0


def test_steps_may_be_numbers_of_numpy_and_torch():
    denoiser = Denoiser(lambda x_t, t: x_t * (1 + t[:, None]), SCHEDULE)
    plain = denoiser(torch.ones(2, 3), 7)
    for t in (np.int64(7), torch.tensor(7), np.array(7)):
        assert all(torch.equal(a, b) for a, b in zip(denoiser(torch.ones(2, 3), t), plain))
    assert timesteps(np.int64(5), T) == timesteps(torch.tensor(5), T) == timesteps(5, T)
    with pytest.raises(ValueError, match="steps: got '5', expected an integer in 1"):
        timesteps("5", T)
