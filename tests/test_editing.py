"""Editing: guides against exact posteriors, SDEdit, RePaint, inversion, interpolation, limits, seeds and bad requests."""
import copy
import math
import types

import pytest
import torch
from torch.testing import assert_close

from ldm_edu import editing as E
from ldm_edu import ldm as L
from ldm_edu.autoencoder import AutoencoderConfig
from ldm_edu.conditioning import ClassConditioner, ClassConfig, Condition
from ldm_edu.core import check_mask, make_generators
from ldm_edu.data import Scenes
from ldm_edu.oracle import GaussianMixture, gaussian_flow
from ldm_edu.samplers import SAMPLERS, Denoiser, Prediction, ddim, sample, timesteps
from ldm_edu.schedule import ScheduleConfig, make_schedule
from ldm_edu.solvers import ddim_invert
from ldm_edu.unet import UNetConfig

SCHEDULE = make_schedule()
TABLE = SCHEDULE.alphas_cumprod.double()
KINDS = ("eps", "x0", "v")
seeded = lambda seed: torch.Generator().manual_seed(seed)
normal = lambda *shape, seed=0: torch.randn(*shape, generator=seeded(seed))


def world():
    """Two classes of two components each in the plane."""
    means = torch.tensor([[-1.2, 0.3], [-0.4, 1.0], [0.9, -0.2], [0.3, -1.1]])
    return GaussianMixture(means, 0.35, labels=torch.tensor([0, 0, 1, 1]))


def exact_log_prob(mixture, y):
    """log p(y | x_t) of the exact classifier, as `classifier_guided` takes it."""
    return lambda x, t: mixture.class_posterior(x, TABLE[t])[:, y]


def oracle(mixture, kind="eps", schedule=SCHEDULE):
    return Denoiser(mixture.model(schedule, kind), schedule, kind)


def toy(kind="eps", schedule=SCHEDULE):
    """A smooth denoiser of any shape, without parameters, whose rows do not meet."""
    return Denoiser(lambda x, t: torch.tanh(0.7 * x) + 1e-4 * t.reshape(-1, *[1] * (x.ndim - 1)), schedule, kind)


@pytest.fixture(scope="module")
def tiny():
    """A random class-conditional model of 16-pixel pictures, 4 x 4 x 4 latents."""
    torch.manual_seed(0)
    conditioner = ClassConditioner(ClassConfig(3, ("a", "b", "c"), width=8))
    stage = AutoencoderConfig(4, 8, (1, 2, 2), 1, mid_attention=False, num_groups=4)
    unet = UNetConfig(4, 4, 8, (1, 2), 1, (1,), head_dim=8, num_groups=4, context_dim=conditioner.context_dim)
    model = L.build(L.LDMConfig(stage, unet, conditioner.to_dict(), ScheduleConfig(T=100), "v", 0.25, image_size=16)).eval()
    for p in model.net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


# ---------------------------------------------------------------- steering
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("t", [0, 200, 600, 999])
def test_the_exact_classifier_turns_the_whole_into_the_class(kind, t):
    """Bayes: score of x_t + gradient of log p(y | x_t) = score of x_t given y, and x0 and eps stay one point."""
    mixture, x = world(), normal(50, 2).double()
    for y in (0, 1):
        seen = E.classifier_guided(oracle(mixture, kind), exact_log_prob(mixture, y))(x, t)
        given, acp = mixture.given(y), TABLE[t].item()
        assert_close(seen.eps, given.eps(x, acp), rtol=1e-8, atol=1e-8)
        assert_close(seen.x0, given.x0(x, acp), rtol=1e-6, atol=1e-6)
        assert_close(math.sqrt(acp) * seen.x0 + math.sqrt(1 - acp) * seen.eps, x, rtol=1e-8, atol=1e-8)


def test_guided_samples_have_the_moments_of_the_class():
    mixture, n = world(), 4000
    guided = E.classifier_guided(oracle(mixture), exact_log_prob(mixture, 1))
    x = sample(guided, (n, 2), 100, "ddim", spacing="log_snr", generator=seeded(1), dtype=torch.float64)
    given = mixture.given(1)
    assert_close(x.mean(0), given.mean, rtol=0, atol=4 * given.covariance.diagonal().max().item() ** 0.5 / n**0.5)
    assert_close(x.T.cov(), given.covariance, rtol=0, atol=0.03)


@pytest.mark.parametrize("name", SAMPLERS)
def test_weight_zero_is_plain_sampling_bit_for_bit(name):
    never = lambda *_: pytest.fail("a guide of weight 0 was asked")
    run = lambda denoiser: sample(denoiser, (3, 2), 7, name, generator=make_generators(4, 3))
    assert torch.equal(run(E.classifier_guided(toy(), never, 0.0)), run(toy()))
    assert torch.equal(run(E.image_guided(toy(), never, 0)), run(toy()))
    assert torch.equal(run(E.image_guided(toy(), never, lambda acp: 0.0)), run(toy()))


@pytest.mark.parametrize("make", [
    lambda d: E.classifier_guided(d, lambda x, t: -(x.sin() * x).flatten(1).sum(1)),
    lambda d: E.image_guided(d, lambda x0: (x0.sin() * x0).flatten(1).sum(1)),
])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_finite_differences(make, kind):
    guided, x, step = make(toy(kind)), normal(3, 2, 2).double(), 1e-5
    seen, gradient = guided.gradient(x, 400)
    value = lambda x: guided.look(x, 400)[1].detach()
    for place in range(4):
        nudge = torch.zeros(4, dtype=torch.float64)
        nudge[place] = step
        slope = (value(x + nudge.reshape(2, 2)) - value(x - nudge.reshape(2, 2))) / (2 * step)
        assert_close(gradient.flatten(1)[:, place], slope, rtol=1e-6, atol=1e-7)
    plain = toy(kind)(x, 400)
    assert_close(seen.x0, plain.x0)
    assert_close(seen.eps, plain.eps)
    acp = TABLE[400].item()
    assert_close(guided(x, 400).eps, plain.eps - (1 - acp) ** 0.5 * gradient)
    assert_close(guided(x, 400).x0, plain.x0 + (1 - acp) / acp**0.5 * gradient)


def posterior(mean, s, y, tau):
    """N(mean, s^2) seen through y = x0 + noise of spread tau."""
    gain = s**2 / (s**2 + tau**2)
    return GaussianMixture((mean + gain * (y - mean))[None], (gain * tau**2) ** 0.5)


def test_a_quadratic_loss_with_the_right_variance_gives_the_exact_posterior():
    """p(y | x_t) is as wide as the measurement and the prediction's own error together [PiGDM eq. 7]."""
    mean, y, s, tau = torch.tensor([0.5, -1.0]).double(), torch.tensor([1.5, 0.0]).double(), 0.8, 0.3
    prior, exact = GaussianMixture(mean[None], s), posterior(mean, s, y, tau)
    wide = lambda acp: 1 / (tau**2 + s**2 * (1 - acp) / (acp * s**2 + 1 - acp))
    guided = E.image_guided(oracle(prior), lambda x0: E.half_square(x0 - y), wide)
    for t in (10, 300, 700, 999):
        x = normal(20, 2, seed=t).double()
        assert_close(guided(x, t).eps, exact.eps(x, TABLE[t].item()), rtol=1e-6, atol=1e-6)
    x = sample(guided, (4000, 2), 100, "ddim", spacing="log_snr", generator=seeded(2), dtype=torch.float64)
    assert_close(x.mean(0), exact.mean, rtol=0, atol=0.03)
    assert_close(x.std(0), exact.covariance.diagonal().sqrt(), rtol=0.06, atol=0)


def test_a_certain_prediction_overstates_the_guide():
    """The plain guide, constant 1 / tau^2, moves x0 by v / tau^2 of the gap in place of v / (v + tau^2), v its own error [DPS]."""
    mean, y, s, tau = torch.zeros(1).double(), torch.ones(1).double(), 1.0, 0.5
    exact, prior = posterior(mean, s, y, tau), GaussianMixture(mean[None], s)
    guided = E.image_guided(oracle(prior), lambda x0: E.half_square(x0 - y), 1 / tau**2)
    x_t = normal(5, 1).double()
    for t in (100, 400, 800):
        acp = TABLE[t].item()
        plain, v = prior.x0(x_t, acp), 1 - acp  # prior variance 1: acp + 1 - acp = 1
        assert_close(guided(x_t, t).x0, plain + v / tau**2 * (y - plain), rtol=1e-6, atol=1e-6)
        assert_close(exact.x0(x_t, acp), plain + v / (v + tau**2) * (y - plain), rtol=1e-6, atol=1e-6)
    x = sample(guided, (4000, 1), 200, "ddim", spacing="log_snr", generator=seeded(3), dtype=torch.float64)
    assert x.std() < 0.5 * exact.covariance.sqrt().item() and x.mean() > y + 0.1, "too narrow, and beyond the measurement"


def test_steering_leaves_pure_noise_alone_and_works_with_every_sampler():
    ends = types.SimpleNamespace(alphas_cumprod=torch.cat([SCHEDULE.alphas_cumprod[:-1], torch.zeros(1)]))
    guided = E.image_guided(toy("v", ends), lambda x0: E.half_square(x0 - 1), 0.1)
    x = normal(2, 3)
    assert torch.equal(guided(x, 999).x0, toy("v", ends)(x, 999).x0)
    for name, info in SAMPLERS.items():
        before = guided.calls
        out = sample(guided, (2, 3), 6, name, generator=make_generators(0, 2))
        assert out.isfinite().all() and not out.requires_grad and guided.calls - before == info.nfe(6)
    assert ddim_invert(guided, x, timesteps(5, 1000)).isfinite().all()


@pytest.mark.parametrize("look, message", [
    (lambda x0: x0.square().sum(), "got shape ()"),
    (lambda x0: x0.square(), "got shape (2, 3)"),
    (lambda x0: torch.zeros(2), "without gradient"),
    (lambda x0: x0.square().sum(1).detach(), "without gradient"),
    (lambda x0: x0.square().sum(1) / 0, "expected finite numbers"),
])
def test_bad_losses_are_named(look, message):
    with pytest.raises(ValueError, match="log-likelihood") as caught:
        E.image_guided(toy(), look)(normal(2, 3), 500)
    assert message in str(caught.value)


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf])
def test_scales_are_finite(scale):
    with pytest.raises(ValueError, match="scale: got"):
        E.image_guided(toy(), E.half_square, scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_steering_keeps_the_precision(dtype):
    x = normal(2, 3).to(dtype)
    seen = E.image_guided(toy(), lambda x0: E.half_square(x0 - 1))(x, 300)
    plain = toy()(x, 300)
    assert seen.x0.dtype == plain.x0.dtype and seen.eps.dtype == plain.eps.dtype and not x.requires_grad


def test_a_guided_image_does_not_depend_on_its_neighbours(tiny):
    target = normal(1, 3, 4, 4)
    loss = lambda z: E.low_pass_loss(target)(E.unclipped_decode(tiny, z))
    run = lambda n, seed: sample(E.image_guided(E.prompt_denoiser(tiny, ["b"], n), loss, 0.01), (n, 4, 4, 4), 4, "ddpm",
                                 generator=make_generators(seed, n))
    assert_close(run(3, 5)[2:], run(1, 7), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- the classifier
def test_classifier_shapes_sizes_and_time():
    torch.manual_seed(0)
    net = E.NoisyClassifier(E.ClassifierConfig(5, 4, 32))
    for size in ((8, 8), (4, 6), (16, 2)):
        assert net(normal(3, 4, *size), torch.tensor([0, 500, 999])).shape == (3, 5)
    for block in net.blocks:  # the zero-initialised convolutions too, so that time shows
        torch.nn.init.normal_(block.conv2.weight, std=0.1)
    x = normal(1, 4, 8, 8)
    assert (net(x, torch.tensor([0])) - net(x, torch.tensor([900]))).abs().max() > 1e-4
    assert net.double()(x.double(), torch.tensor([3])).dtype == torch.float64


def test_classifier_log_prob_is_its_normalised_logit_and_differentiable():
    torch.manual_seed(0)
    net, x = E.NoisyClassifier(E.ClassifierConfig(3, 4, 32)).double(), normal(4, 4, 4, 4).double()
    t, y = torch.tensor([0, 9, 99, 999]), torch.tensor([2, 0, 1, 1])
    logits = net(x, t)
    assert_close(net.log_prob(y)(x, t), torch.stack([logits[i, k] - logits[i].logsumexp(0) for i, k in enumerate(y)]))
    assert_close(sum(net.log_prob(torch.full((4,), k))(x, t).exp() for k in range(3)), torch.ones(4).double())
    guided = E.classifier_guided(toy(), net.log_prob(y))
    _, gradient = guided.gradient(x, 400)
    nudge = 1e-5 * torch.nn.functional.normalize(normal(1, 64, seed=8).double()).reshape(1, 4, 4, 4)
    value = lambda x: net.log_prob(y)(x, torch.full((4,), 400)).detach()
    slope = (value(x + nudge) - value(x - nudge)) / 2e-5
    assert_close((gradient * nudge).flatten(1).sum(1) / 1e-5, slope, rtol=1e-5, atol=1e-8)


def test_classifier_learns_where_an_object_cannot_be_missed():
    """Bright against dark latents, under noise: 60 steps suffice, and at the noisy end nobody can know."""
    torch.manual_seed(0)
    net, g = E.NoisyClassifier(E.ClassifierConfig(2, 2, 16)), seeded(0)
    opt, y = torch.optim.AdamW(net.parameters(), 3e-3), torch.arange(64) % 2
    draw = lambda t: SCHEDULE.add_noise((2.0 * y - 1)[:, None, None, None].expand(64, 2, 4, 4), torch.randn(64, 2, 4, 4, generator=g), t)
    for _ in range(60):
        t = torch.randint(600, (64,), generator=g)
        loss = torch.nn.functional.cross_entropy(net(draw(t), t), y)
        opt.zero_grad(), loss.backward(), opt.step()
    right = lambda t: (net(draw(t), torch.full((64,), t)).argmax(1) == y).double().mean().item()
    assert right(100) > 0.95 and right(999) < 0.8


@pytest.mark.parametrize("config", [{"n_classes": 1}, {"width": 20}, {"width": 0}, {"num_groups": 0}, {"in_channels": 0}])
def test_classifiers_that_cannot_be_built(config):
    with pytest.raises(ValueError, match="expected at least 2 classes"):
        E.ClassifierConfig(**config)


@pytest.mark.parametrize("y", [torch.tensor([8]), torch.tensor([-1]), torch.tensor([0.0]), torch.tensor(3)])
def test_classes_out_of_range(y):
    with pytest.raises(ValueError, match="classes from 0 to 7"):
        E.NoisyClassifier(E.ClassifierConfig(8)).log_prob(y)


def test_the_classifier_refuses_other_channels():
    with pytest.raises(ValueError, match="x_t: got shape"):
        E.NoisyClassifier(E.ClassifierConfig(8))(normal(1, 3, 8, 8), torch.tensor([0]))


# ---------------------------------------------------------------- losses on pictures
def test_half_square_is_a_unit_gaussian():
    x = normal(3, 2, 2).double()
    gaussian = torch.distributions.Normal(torch.zeros(2, 2).double(), 1.0)
    gap = E.half_square(x) + gaussian.log_prob(x).sum((1, 2))
    assert_close(gap, gap[:1].expand(3))
    assert_close(E.half_square(torch.tensor([[3.0, 4.0]])), torch.tensor([12.5]))


def test_low_pass_loss_sees_block_means_only():
    images = normal(2, 3, 8, 12).requires_grad_()
    low = images.detach().reshape(2, 3, 2, 4, 3, 4).mean((3, 5))
    assert E.low_pass_loss(low)(images).abs().max() < 1e-10
    assert_close(E.low_pass_loss(low + 0.5)(images), torch.full((2,), 0.125 * 3 * 2 * 3))
    gradient, = torch.autograd.grad(E.low_pass_loss(low + 0.5)(images).sum(), images)
    assert_close(gradient, torch.full_like(images, -0.5 / 16))
    for wrong in ((2, 2), (2, 6), (3, 4)):
        with pytest.raises(ValueError, match="low: got"):
            E.low_pass_loss(torch.zeros(2, 3, *wrong))(images)


def test_masked_loss_sees_what_is_outside_the_mask():
    images, mask = normal(2, 3, 4, 4), torch.zeros(1, 1, 4, 4)
    mask[..., :2] = 1
    other = images.clone()
    other[..., :2] += 9.0
    assert torch.equal(E.masked_loss(images, mask)(other), torch.zeros(2))
    other[..., 2:] += 0.5
    assert_close(E.masked_loss(images, mask)(other), torch.full((2,), 0.125 * 3 * 4 * 2))


def test_colour_loss_sees_what_is_inside_the_mask():
    red, mask = torch.tensor([0.9, -0.8, -0.7]), torch.zeros(2, 1, 4, 4)
    mask[0, :, 1:3, 1:3], mask[1, :, 0] = 1, 1
    images = normal(2, 3, 4, 4)
    painted = torch.where(mask.bool(), red[:, None, None], images)
    assert torch.equal(E.colour_loss(red, mask)(painted), torch.zeros(2))
    assert_close(E.colour_loss(red, mask)(painted + 1), torch.full((2,), 0.5 * 3 * 4))
    assert_close(E.colour_loss(red)(red[:, None, None].expand(1, 3, 4, 4) - 1), torch.tensor([0.5 * 48]))
    with pytest.raises(ValueError, match="colour: got shape"):
        E.colour_loss(torch.zeros(1, 3))


# ---------------------------------------------------------------- masks
@pytest.mark.parametrize("mask, message", [
    (torch.zeros(2, 4, 4), "mask: got shape"),
    (torch.zeros(2, 3, 4, 4), "mask: got shape"),
    (torch.zeros(2, 1, 4, 5), "mask: got shape"),
    (torch.zeros(3, 1, 4, 4), "got 3 masks, expected 2"),
    (torch.full((2, 1, 4, 4), 0.5), "other than 0 and 1"),
    (torch.full((2, 1, 4, 4), math.nan), "other than 0 and 1"),
    (torch.full((2, 1, 4, 4), 255), "other than 0 and 1"),
])
def test_bad_masks(mask, message):
    x = normal(2, 3, 4, 4)
    for use in (lambda: check_mask(mask, x), lambda: E.masked_loss(x, mask), lambda: E.repaint(toy(), x, mask, 3)):
        with pytest.raises(ValueError) as caught:
            use()
        assert message in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int64, torch.uint8])
def test_masks_of_every_dtype(dtype):
    mask = (normal(2, 1, 4, 4) > 0).to(dtype)
    assert torch.equal(check_mask(mask, normal(2, 3, 4, 4)), mask.bool())


@pytest.mark.parametrize("f", [1, 2, 4])
@pytest.mark.parametrize("grow", [0, 1, 2])
def test_latent_masks_by_loops(f, grow):
    mask = torch.rand(3, 1, 16, 24, generator=seeded(f)) > 0.985
    cells = E.latent_mask(mask, f, grow)
    assert cells.shape == (3, 1, 16 // f, 24 // f) and cells.dtype == mask.dtype
    for b in range(3):
        for i in range(16 // f):
            for j in range(24 // f):
                near = mask[b, 0, max(0, (i - grow) * f):(i + grow + 1) * f, max(0, (j - grow) * f):(j + grow + 1) * f]
                assert cells[b, 0, i, j] == near.any()


@pytest.mark.parametrize("f, grow", [(3, 0), (5, 1), (4, -1), (0, 0)])
def test_bad_latent_masks(f, grow):
    with pytest.raises(ValueError, match="expected multiples of f"):
        E.latent_mask(torch.zeros(1, 1, 16, 24 if f != 3 else 25), f, grow)


# ---------------------------------------------------------------- SDEdit
@pytest.mark.parametrize("steps", [1, 2, 7, 20, 50])
def test_a_strength_keeps_its_share_of_the_steps(steps):
    whole = timesteps(steps, 1000)
    for strength in (1e-9, 0.05, 0.3, 0.5, 0.55, 0.7, 0.999, 1, 1.0):
        kept = E.last_timesteps(toy(), steps, strength)
        assert len(kept) == max(1, round(strength * steps)) and kept == whole[-len(kept):]
    assert E.last_timesteps(toy(), steps) == whole


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("strength", [0.04, 0.3, 0.55, 1.0])
def test_sdedit_asks_the_network_exactly_as_often_as_it_says(name, strength):
    denoiser, states = toy(), []
    out = E.sdedit(denoiser, normal(2, 3), 20, strength, name, generator=make_generators(0, 2), callback=states.append)
    kept = {0.04: 1, 0.3: 6, 0.55: 11, 1.0: 20}[strength]
    assert denoiser.calls == SAMPLERS[name].nfe(kept) and len(states) == kept and out.isfinite().all()
    assert states[-1].step.acp_next == 1


@pytest.mark.parametrize("name", SAMPLERS)
def test_strength_one_ignores_the_picture_bit_for_bit(name):
    plain = sample(toy(), (3, 2), 9, name, generator=make_generators(1, 3))
    for x0 in (torch.zeros(3, 2), normal(3, 2), 100 * torch.ones(3, 2)):
        assert torch.equal(E.sdedit(toy(), x0, 9, 1.0, name, generator=make_generators(1, 3)), plain)


def test_sdedit_of_a_gaussian_is_noise_and_exact_flow():
    """The exact denoiser of N(m, s^2) carries the noised picture along lines that are known."""
    gaussian, x0, steps = GaussianMixture(torch.tensor([[0.4, -0.6]]), 0.7), normal(2000, 2).double() * 0.1 + 2.0, 400
    out = E.sdedit(oracle(gaussian), x0, steps, 0.5, "ddim", generator=seeded(5))
    acp = TABLE[E.last_timesteps(oracle(gaussian), steps, 0.5)[0]].item()
    noise = torch.randn(2000, 2, generator=seeded(5)).double()
    expected = gaussian_flow(gaussian, math.sqrt(acp) * x0 + math.sqrt(1 - acp) * noise, acp)
    assert_close(out, expected, rtol=0, atol=0.04)
    assert_close(E.noised_to(acp, x0, noise).std(0), (acp * 0.01 + 1 - acp) ** 0.5 * torch.ones(2).double(), rtol=0.05, atol=0)
    far = [(E.sdedit(oracle(gaussian), x0, 50, s, "ddim", generator=seeded(5)) - x0).square().mean().item() for s in (0.1, 0.3, 0.6, 0.9)]
    assert far == sorted(far), "a stronger edit goes further"


@pytest.mark.parametrize("name", ["ddpm", "dpmpp_2m", "euler_a"])
def test_sdedit_alone_equals_batch_and_leaves_its_input_alone(name):
    x0 = normal(4, 3, 2)
    before = x0.clone()
    many = E.sdedit(toy(), x0, 10, 0.6, name, generator=make_generators(3, 4))
    alone = E.sdedit(toy(), x0[2:3], 10, 0.6, name, generator=make_generators(5, 1))
    assert torch.equal(many[2:3], alone) and torch.equal(x0, before)
    assert E.sdedit(toy(), x0.half(), 10, 0.6, name).dtype == torch.float32
    assert E.sdedit(toy(), x0.double(), 10, 0.6, name).dtype == torch.float64


def test_options_reach_the_sampler():
    runs = [E.sdedit(toy(), normal(2, 2), 8, 0.5, "ddim", eta=eta, spacing=spacing, generator=make_generators(0, 2))
            for eta, spacing in ((0.0, "trailing"), (1.0, "trailing"), (0.0, "karras"))]
    assert not torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("change, message", [
    ({"strength": 0.0}, "strength: got 0.0"), ({"strength": 1.01}, "strength"), ({"strength": -0.5}, "strength"),
    ({"strength": math.nan}, "strength"), ({"steps": 0}, "steps"), ({"steps": 1001}, "steps"), ({"sampler": "dimm"}, "did you mean"),
    ({"spacing": "trailling"}, "did you mean"), ({"x0": torch.zeros(2, 3, dtype=torch.int64)}, "x0: got dtype"),
])
def test_bad_edits(change, message):
    request = {"x0": torch.zeros(2, 3), "steps": 10, "strength": 0.5, "sampler": "ddim", **change}
    with pytest.raises(ValueError, match=message):
        E.sdedit(toy(), **request)


# ---------------------------------------------------------------- RePaint
def test_a_path_by_hand():
    assert E.repaint_path(4, 2, 1) == [0, 1, 2, 3, 4]
    assert E.repaint_path(5, 2, 2) == [0, 1, 2, 0, 1, 2, 3, 4, 2, 3, 4, 5]
    assert E.repaint_path(4, 2, 3) == [0, 1, 2, 0, 1, 2, 0, 1, 2, 3, 4]


@pytest.mark.parametrize("S", [1, 2, 5, 12, 30])
@pytest.mark.parametrize("jump", [1, 2, 5, 40])
@pytest.mark.parametrize("rounds", [1, 2, 4])
def test_paths_and_evaluations(S, jump, rounds):
    path = E.repaint_path(S, jump, rounds)
    down = [(a, b) for a, b in zip(path, path[1:]) if b > a]
    up = [(a, b) for a, b in zip(path, path[1:]) if b < a]
    assert path[0] == 0 and path[-1] == S and path.count(S) == 1
    assert all(b - a == 1 for a, b in down) and all(a - b == jump for a, b in up)
    assert len(down) == S + (rounds - 1) * jump * ((S - 1) // jump)
    denoiser, states = toy(), []
    E.repaint(denoiser, normal(1, 1, 2, 2), torch.ones(1, 1, 2, 2), S, jump=jump, rounds=rounds, callback=states.append)
    assert denoiser.calls == len(states) == states[-1].nfe == len(down)
    assert [s.i for s in states] == list(range(len(down))) and states[-1].step.acp_next == 1


@pytest.mark.parametrize("numbers", [(0, 1, 1), (5, 0, 1), (5, 2, 0), (5, -1, 2)])
def test_bad_paths(numbers):
    with pytest.raises(ValueError, match="expected at least 1 each"):
        E.repaint_path(*numbers)


@pytest.mark.parametrize("rounds", [1, 3])
def test_an_empty_mask_is_the_picture(rounds):
    x0 = normal(2, 3, 4, 4)
    assert torch.equal(E.repaint(toy(), x0, torch.zeros(1, 1, 4, 4), 10, jump=3, rounds=rounds), x0)


def test_a_full_mask_is_ancestral_sampling_bit_for_bit():
    x0, full = normal(2, 3, 4, 4), torch.ones(1, 1, 4, 4)
    for steps in (1, 10):
        plain = sample(toy(), x0.shape, steps, "ddpm", generator=make_generators(6, 2))
        assert torch.equal(E.repaint(toy(), x0, full, steps, rounds=1, generator=make_generators(6, 2)), plain)
        assert torch.equal(E.repaint(toy(), 9 * x0, full, steps, rounds=1, generator=make_generators(6, 2)), plain)


def test_what_is_known_stays_bit_for_bit_and_what_is_not_is_new():
    x0, mask = normal(3, 2, 4, 6), (torch.rand(3, 1, 4, 6, generator=seeded(1)) > 0.5).float()
    out, before = E.repaint(toy(), x0, mask, 12, jump=4, rounds=2, generator=make_generators(0, 3)), x0.clone()
    fresh = mask.bool().expand_as(x0)
    assert torch.equal(out[~fresh], x0[~fresh]) and (out[fresh] != x0[fresh]).all() and torch.equal(x0, before)
    assert E.repaint(toy(), x0.half(), mask, 3).dtype == torch.float32


def test_known_parts_stand_at_the_right_level_at_every_step():
    """Mean sqrt(acp) x0 and variance 1 - acp wherever the walk is, also after it was noised back up."""
    x0, mask = torch.full((4000, 1, 1, 2), 1.5).double(), torch.tensor([1.0, 0.0]).reshape(1, 1, 1, 2)
    gaussian, states = GaussianMixture(torch.zeros(1, 2), 1.0), []
    E.repaint(oracle(gaussian), x0, mask, 12, jump=3, rounds=2, generator=seeded(3), callback=states.append)
    for s in states:
        for values, acp in ((s.x_t, s.step.acp), (s.x_next, s.step.acp_next)):
            known, fresh = values[..., 1].flatten(), values[..., 0].flatten()
            assert_close(known.mean().item(), 1.5 * acp**0.5, rtol=0, atol=0.07)
            assert_close(known.std().item(), (1 - acp) ** 0.5, rtol=0.06, atol=1e-12)
            assert abs(fresh.mean()) < 0.08, "N(0, 1) without correlation: the hole learns nothing"


def test_rounds_let_the_new_part_agree_with_the_old():
    """Two correlated pixels, one known: its neighbour's mean must be rho times it. One round falls short."""
    rho, known = 0.9, 1.5
    gaussian = GaussianMixture(torch.zeros(1, 2), covariances=torch.tensor([[[1.0, rho], [rho, 1.0]]]))
    x0, mask = torch.full((2000, 1, 1, 2), known).double(), torch.tensor([1.0, 0.0]).reshape(1, 1, 1, 2)
    mean = {r: E.repaint(oracle(gaussian), x0, mask, 30, jump=1, rounds=r, generator=seeded(4))[..., 0].mean().item() for r in (1, 8)}
    gap = {r: abs(rho * known - value) for r, value in mean.items()}
    assert gap[8] < 0.5 * gap[1], mean


def test_repaint_alone_equals_batch():
    x0, mask = normal(4, 2, 4, 4), (torch.rand(4, 1, 4, 4, generator=seeded(2)) > 0.5).float()
    many = E.repaint(toy(), x0, mask, 9, jump=3, rounds=2, generator=make_generators(3, 4))
    assert torch.equal(many[2:3], E.repaint(toy(), x0[2:3], mask[2:3], 9, jump=3, rounds=2, generator=make_generators(5, 1)))
    with pytest.raises(ValueError, match="generator: got 2"):
        E.repaint(toy(), x0, mask, 3, generator=make_generators(0, 2))


def test_repaint_refuses_integers():
    with pytest.raises(ValueError, match="x0: got dtype"):
        E.repaint(toy(), torch.zeros(1, 1, 2, 2, dtype=torch.int64), torch.ones(1, 1, 2, 2), 3)


def test_inpainting_keeps_every_known_pixel_and_never_looks_under_the_mask(tiny):
    images = Scenes(16, n=3, fields=("image",)).render(range(3))["image"]
    mask = torch.zeros(3, 1, 16, 16)
    mask[:, :, 3:9, 2:7] = 1
    denoiser = E.prompt_denoiser(tiny, ["a", "b", "c"])
    run = lambda pictures, m=mask: E.inpaint(denoiser, tiny, pictures, m, 5, jump=2, rounds=2, generator=make_generators(0, 3))
    out = run(images)
    hole = mask.bool().expand_as(images)
    assert torch.equal(out[~hole], images[~hole]) and (out[hole] != images[hole]).any() and out.abs().max() <= 1
    scribbled = torch.where(hole, torch.rand(images.shape, generator=seeded(0)) * 2 - 1, images)
    assert torch.equal(run(scribbled), out), "the fill depends on what it must not see"
    assert torch.equal(run(images, torch.zeros(1, 1, 16, 16)), images)
    with pytest.raises(ValueError, match="images: got values"):
        run(images * 3)


def test_blanked_pictures_hold_their_own_mean():
    images, mask = torch.rand(2, 3, 4, 4, generator=seeded(0)), torch.zeros(2, 1, 4, 4)
    mask[0, :, 1:3, 1:3], mask[1] = 1, 1
    out = E.blank(images, mask)
    outside = images[0][:, ~mask[0, 0].bool()]
    assert_close(out[0][:, mask[0, 0].bool()], outside.mean(1, keepdim=True).expand(3, 4))
    assert torch.equal(out[0][:, ~mask[0, 0].bool()], outside) and torch.equal(out[1], torch.zeros(3, 4, 4))
    assert_close(E.blank(images, mask[:1])[1][:, 1, 1], images[1][:, ~mask[0, 0].bool()].mean(1))


def test_inpainting_a_whole_picture_is_plain_sampling(tiny):
    images, denoiser = Scenes(16, n=2, fields=("image",)).render(range(2))["image"], E.prompt_denoiser(tiny, ["a", "b"])
    out = E.inpaint(denoiser, tiny, images, torch.ones(1, 1, 16, 16), 5, rounds=1, generator=make_generators(2, 2))
    assert torch.equal(out, tiny.sample(["a", "b"], steps=5, sampler="ddpm", guidance_scale=1.0, seed=2))


def test_cells_around_the_hole_are_drawn_anew_as_asked(tiny):
    images, mask = Scenes(16, n=1, fields=("image",)).render([0])["image"], torch.zeros(1, 1, 16, 16)
    mask[..., 4:8, 4:8] = 1  # exactly one latent cell
    seen = {}
    for grow in (0, 1):
        states = []
        E.inpaint(E.prompt_denoiser(tiny, ["a"]), tiny, images, mask, 3, grow=grow, generator=make_generators(0, 1), callback=states.append)
        z = tiny.encode(E.blank(images, mask))
        seen[grow] = (states[-1].x_next != z).any(1).sum().item()
    assert seen == {0: 1, 1: 9}


# ---------------------------------------------------------------- inversion
def test_inversion_between_gaussians_is_a_shift():
    """Equal covariances, other means: the flow up through one and down through the other moves every point by the difference."""
    a, b = (GaussianMixture(torch.tensor([m]), 0.6) for m in ([-1.0, 0.5], [1.0, 1.0]))
    x0, shift, gaps = a.sample(200, seeded(0)), torch.tensor([2.0, 0.5]).double(), []
    for steps in (50, 100, 200):
        moved = E.edit_by_inversion(oracle(a), oracle(b), x0, steps, spacing="log_snr")
        gaps.append((moved - x0 - shift).square().mean().sqrt().item())
    assert gaps[-1] < 0.05 and gaps[1] < 0.75 * gaps[0] and gaps[2] < 0.75 * gaps[1], gaps


@pytest.mark.parametrize("strength, kept", [(1.0, 10), (0.5, 5), (0.01, 1)])
def test_inversion_asks_each_denoiser_once_a_step(strength, kept):
    a, b = toy(), toy("v")
    E.edit_by_inversion(a, b, normal(2, 3), 10, strength)
    assert (a.calls, b.calls) == (kept, kept)


def test_inversion_with_itself_is_inversion_and_ddim():
    x0, steps = normal(3, 2), timesteps(12, 1000)
    there = E.edit_by_inversion(toy(), toy(), x0, 12)
    assert torch.equal(there, ddim(toy(), ddim_invert(toy(), x0, steps), steps))
    assert torch.equal(E.edit_by_inversion(toy(), toy(), x0[1:2], 12), there[1:2])
    near = E.edit_by_inversion(toy(), toy(), x0, 100, 0.2)
    assert (near - x0).abs().max() < (E.edit_by_inversion(toy(), toy(), x0, 10, 0.2) - x0).abs().max()


def test_inversion_needs_one_schedule():
    with pytest.raises(ValueError, match="different schedules"):
        E.edit_by_inversion(toy(), toy(schedule=make_schedule("cosine")), normal(1, 2), 5)
    with pytest.raises(ValueError, match="strength"):
        E.edit_by_inversion(toy(), toy(), normal(1, 2), 5, 0.0)


# ---------------------------------------------------------------- interpolation
def test_slerp_ends_angles_and_norms():
    a, b = normal(5, 4, 8, 8).double(), normal(5, 4, 8, 8, seed=1).double()
    assert torch.equal(E.slerp(a, b, 0.0), a) and torch.equal(E.slerp(a, b, 1.0), b)
    unit = lambda x: torch.nn.functional.normalize(x.flatten(1))
    angle = lambda x, y: (unit(x) * unit(y)).sum(1).clamp(-1, 1).acos()
    u, v = unit(a), unit(b)
    for w in (0.1, 0.5, 0.8):
        mid = E.slerp(u, v, w)
        assert_close(mid.norm(dim=1), torch.ones(5).double())
        assert_close(angle(u, mid), w * angle(u, v))
        assert_close(E.slerp(v, u, 1 - w), mid)
        assert_close(E.slerp(a, b, w).flatten(1).std(1), torch.ones(5).double(), rtol=0.12, atol=0)
    assert torch.lerp(a, b, 0.5).std() < 0.75, "what slerp is for"


def test_slerp_of_one_direction_is_lerp_and_rows_are_alone():
    a = normal(3, 6)
    b = torch.stack([2 * a[0], a[1] + 1e-4, normal(6, seed=3)])
    out = E.slerp(a, b, 0.25)
    assert_close(out[0], 1.25 * a[0])
    assert_close(out[1], a[1], rtol=1e-3, atol=1e-3)
    assert torch.equal(out[2:], E.slerp(a[2:], b[2:], 0.25))
    assert E.slerp(a.half(), a.half(), 0.5).dtype == torch.float32


def test_slerp_keeps_gaussian_noise_gaussian():
    """Of independent standard normals, lerp at 1/2 has variance 1/2; slerp's stays 1 up to the two's chance angle."""
    out = E.slerp(normal(400, 256), normal(400, 256, seed=1), 0.5)
    assert_close(out.var().item(), 1.0, rtol=0.02, atol=0)


@pytest.mark.parametrize("a, b, weight, message", [
    (normal(2, 3), normal(2, 4), 0.5, "b: got shape"), (normal(3), normal(3), 0.5, "b: got shape"),
    (normal(2, 3), normal(2, 3, seed=1), 1.5, "weight"), (normal(2, 3), normal(2, 3, seed=1), -0.1, "weight"),
    (normal(2, 3), normal(2, 3, seed=1), math.nan, "weight"), (normal(2, 3), -normal(2, 3), 0.5, "opposite directions"),
])
def test_bad_arcs(a, b, weight, message):
    with pytest.raises(ValueError, match=message):
        E.slerp(a, b, weight)


def test_blended_conditions():
    mask = torch.tensor([[True, True, False]]).expand(2, 3)
    a = Condition(normal(2, 3, 4), mask, normal(2, 5))
    b = Condition(normal(2, 3, 4, seed=1), mask, normal(2, 5, seed=1))
    for w, end in ((0.0, a), (1.0, b)):
        mixed = E.blend_conditions(a, b, w)
        assert torch.equal(mixed.context, end.context) and torch.equal(mixed.c, end.c) and torch.equal(mixed.context_mask, mask)
    assert_close(E.blend_conditions(a, b, 0.25).c, 0.75 * a.c + 0.25 * b.c)
    assert E.blend_conditions(a, b, 0.25).concat is None


@pytest.mark.parametrize("other, message", [
    (Condition(normal(2, 4, 4), torch.ones(2, 4, dtype=torch.bool), normal(2, 5)), "context: got"),
    (Condition(normal(2, 3, 4), torch.ones(2, 3, dtype=torch.bool), normal(2, 5)), "numbers of tokens"),
    (Condition(normal(2, 3, 4), torch.tensor([[True, True, False]] * 2)), "c: got"),
])
def test_conditions_that_do_not_fit(other, message):
    a = Condition(normal(2, 3, 4), torch.tensor([[True, True, False]] * 2), normal(2, 5))
    with pytest.raises(ValueError, match=message):
        E.blend_conditions(a, other, 0.5)
    with pytest.raises(ValueError, match="weight"):
        E.blend_conditions(a, a, math.inf)


# ---------------------------------------------------------------- the model's side
def test_the_prompt_denoiser_is_what_sample_uses(tiny):
    for prompts, scale, negative in ((["a", "c"], 2.5, None), (["a", "c"], 1.0, None), (["b"], 3.0, ["a"])):
        n = 2
        denoiser = E.prompt_denoiser(tiny, prompts, n, scale, negative)
        z = sample(denoiser, (n, 4, 4, 4), 5, "dpmpp_2m", generator=make_generators(3, n))
        assert torch.equal(tiny.decode(z), tiny.sample(prompts, n=n, steps=5, guidance_scale=scale, negative=negative, seed=3))
    z = sample(E.prompt_denoiser(tiny, n=2), (2, 4, 4, 4), 5, "dpmpp_2m", generator=make_generators(3, 2))
    assert torch.equal(tiny.decode(z), tiny.sample(n=2, steps=5, seed=3))
    with pytest.raises(ValueError, match="n: got 3 images for 2 prompts"):
        E.prompt_denoiser(tiny, ["a", "b"], 3)


def test_decoding_without_clipping_is_decoding(tiny):
    z, tiny = normal(2, 4, 4, 4, seed=2), copy.deepcopy(tiny)
    tiny.first_stage.decoder.conv_out.weight.mul_(5)
    free = E.unclipped_decode(tiny, z)
    assert free.abs().max() > 1, "something to clip"
    assert torch.equal(free.clamp(-1, 1), tiny.decode(z))


def test_inputs_keep_their_gradients_off(tiny):
    """A guide may run inside no_grad, and leaves no graph behind."""
    with torch.no_grad():
        loss = lambda z: E.colour_loss(torch.zeros(3))(E.unclipped_decode(tiny, z))
        seen = E.image_guided(E.prompt_denoiser(tiny, n=1), loss, 0.1)(normal(1, 4, 4, 4), 50)
    assert isinstance(seen, Prediction) and not seen.x0.requires_grad
    assert all(p.grad is None for p in tiny.parameters())
