"""Perceptual distance, discriminator, adversarial losses, adaptive weight and the stage that holds them; historical bug 8."""
import copy
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from ldm_edu.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm_edu.losses import (
    ADVERSARIAL_LOSSES,
    DISCRIMINATOR_NORMS,
    STAGE_PARTS,
    AdversarialConfig,
    AdversarialStage,
    Judged,
    PatchDiscriminator,
    PerceptualDistance,
    adaptive_weight,
    discriminator_loss,
    fooling_loss,
    generator_loss,
    r1_penalty,
    real_fake_loss,
)
from ldm_edu.quantize import AutoencoderVQ, IdentityStage

SMALL = AutoencoderConfig(4, 8, (1, 2), 1, mid_attention=False, num_groups=4)
SMALL_VQ = AutoencoderConfig(4, 8, (1, 2), 1, mid_attention=False, num_groups=4, double_z=False, codes=16, codebook_decay=0.9)
TINY = AdversarialConfig(disc_channels=8, disc_layers=2)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(b=2, side=16, seed=0):
    return torch.rand((b, 3, side, side), generator=generator(seed)) * 2 - 1


def make_stage(config=TINY, first=SMALL, seed=0):
    torch.manual_seed(seed)
    return AdversarialStage(AutoencoderKL(first) if first.kind == "kl" else AutoencoderVQ(first), config)


class Convolution(nn.Module):
    """A one-layer pyramid with random weights."""

    def __init__(self, width=5, seed=0):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        with torch.no_grad():
            self.conv.weight.copy_(torch.randn(self.conv.weight.shape, generator=generator(seed)))

    def forward(self, x):
        return [self.conv(x)]

    def pyramid(self, x):
        return [self.conv(x), self.conv(x)[:, :, ::2, ::2]]


# ---------------------------------------------------------------- perceptual distance


def test_distance_is_the_formula_for_two_channels():
    """Maps (3, 4) and (4, 3) at one of two places, equal elsewhere: (0.2^2 w_0 + 0.2^2 w_1) / 2."""
    a, b = torch.zeros(1, 2, 1, 2), torch.zeros(1, 2, 1, 2)
    a[0, :, 0, 0], b[0, :, 0, 0] = torch.tensor([3.0, 4.0]), torch.tensor([4.0, 3.0])
    a[0, :, 0, 1] = b[0, :, 0, 1] = torch.tensor([1.0, 2.0])
    both = iter([a, b, a, b])
    pyramid = lambda x: [next(both)]
    x = torch.zeros(1, 3, 1, 2)
    assert_close(PerceptualDistance(pyramid)(x, x), torch.tensor([0.04]), atol=1e-6, rtol=0)
    weighed = PerceptualDistance(pyramid, [torch.tensor([1.0, 3.0])])
    assert_close(weighed(x, x), torch.tensor([0.5 * 0.04 * 4]), atol=1e-6, rtol=0)


def test_distance_identity_symmetry_and_sum_over_layers():
    x, y, net = pictures(4), pictures(4, seed=1), Convolution()
    two, one = PerceptualDistance(net.pyramid), PerceptualDistance(net)
    assert two(x, x).tolist() == [0.0] * 4 and (two(x, y) > 0).all() and two(x, y).shape == (4,)
    assert_close(two(x, y), two(y, x))
    halves = PerceptualDistance(lambda v: [net.pyramid(v)[1]])
    assert_close(two(x, y), one(x, y) + halves(x, y))


def test_distance_ignores_the_scale_of_features():
    x, y, net = pictures(3), pictures(3, seed=1), Convolution()
    plain, scaled = PerceptualDistance(net), PerceptualDistance(lambda v: [7.0 * m for m in net(v)])
    assert_close(plain(x, y), scaled(x, y))


def test_distance_is_linear_in_its_weights():
    x, y, net = pictures(3), pictures(3, seed=1), Convolution()
    parts = [PerceptualDistance(net, [torch.eye(5)[i]])(x, y) for i in range(5)]
    assert_close(sum(parts), PerceptualDistance(net)(x, y))
    weights = torch.tensor([0.0, 1.0, 2.0, 0.5, 0.0])
    assert_close(sum(w * p for w, p in zip(weights, parts)), PerceptualDistance(net, [weights])(x, y))


def test_distance_teaches_pictures_and_nothing_else():
    x, y, distance = pictures(2).requires_grad_(), pictures(2, seed=1), PerceptualDistance(Convolution().pyramid, [torch.ones(5)] * 2)
    distance(x, y).sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in distance.parameters()) and not [p for p in distance.parameters() if p.grad is not None]


def test_distance_gradient_is_that_of_finite_differences():
    net = Convolution().double()
    distance = PerceptualDistance(net, [torch.rand(5, generator=generator()).double()])
    x, y = pictures(1, 4).double().requires_grad_(), pictures(1, 4, seed=1).double()
    assert torch.autograd.gradcheck(lambda v: distance(v, y), x)


def test_distance_stays_in_evaluation_mode_and_moves_with_its_network():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    distance = PerceptualDistance(lambda x: [net(x)])
    assert list(distance.parameters()) == []  # a function owns nothing
    owner = Convolution()
    distance = PerceptualDistance(owner.pyramid, [torch.ones(5)] * 2, "mine").train()
    assert not distance.training and not owner.training and distance.name == "mine"
    doubled = copy.deepcopy(distance).double()
    assert {p.dtype for p in doubled.parameters()} == {torch.float64} and owner.conv.weight.dtype == torch.float32
    assert doubled(pictures(2).double(), pictures(2, seed=1).double()).dtype == torch.float64
    assert set(distance.state_dict()) == {"network.conv.weight", "network.conv.bias", "weight_0", "weight_1"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_distance_computes_in_at_least_float32(dtype):
    x, y, distance = pictures(2).to(dtype), pictures(2, seed=1).to(dtype), PerceptualDistance(Convolution())
    assert distance(x, y).dtype == torch.float32
    assert_close(distance(x, y), distance(x.float(), y.float()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert distance(x, y).dtype == torch.float32


def test_distance_refuses_what_does_not_fit():
    x, net = pictures(2), Convolution()
    with pytest.raises(ValueError, match="at least 0"):
        PerceptualDistance(net, [torch.tensor([1.0, -0.1, 1, 1, 1])])
    with pytest.raises(ValueError, match=r"expected \(c\)"):
        PerceptualDistance(net, [torch.ones(5, 1)])
    with pytest.raises(ValueError, match="channels"):
        PerceptualDistance(net, [torch.ones(4)])(x, x)
    with pytest.raises(ValueError):
        PerceptualDistance(net)(x, pictures(2, 8))
    with pytest.raises(ValueError, match="images"):
        PerceptualDistance(net)(x[:, :1], x[:, :1])


# ---------------------------------------------------------------- discriminator


def test_discriminator_has_the_original_size():
    """3 layers, 64 channels, batch norm: 4x4 kernels, biases in the first and last convolutions only."""
    net = PatchDiscriminator(AdversarialConfig(disc_norm="batch"))
    kernels = 16 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512 * 1)
    count = kernels + 64 + 1 + 2 * (128 + 256 + 512)
    assert count == 2_764_737 + 896 and sum(p.numel() for p in net.parameters()) == count == 2_765_633
    state = net.state_dict()
    assert len(state) == 22 and sum(k.endswith("num_batches_tracked") for k in state) == 3
    assert list(state)[:3] == ["main.0.weight", "main.0.bias", "main.2.weight"] and "main.11.bias" in state


@pytest.mark.parametrize("layers, field", [(1, 16), (2, 34), (3, 70), (4, 142)])
def test_receptive_field(layers, field):
    """The pixels that move one logit: their extent is the field, measured by gradient."""
    net = PatchDiscriminator(AdversarialConfig(disc_channels=4, disc_layers=layers, disc_norm="spectral")).eval()
    x = pictures(1, 256).requires_grad_()
    logits = net(x)
    middle = logits.shape[-1] // 2
    logits[0, 0, middle, middle].backward()
    seen = x.grad.abs().sum((0, 1)) > 0
    rows, columns = (seen.any(d).nonzero().flatten() for d in (1, 0))
    assert (rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1) == (field, field)


@pytest.mark.parametrize("norm", DISCRIMINATOR_NORMS)
@pytest.mark.parametrize("layers, shape, out", [(3, (32, 32), (2, 2)), (3, (24, 40), (1, 3)), (2, (16, 12), (2, 1)), (1, (6, 7), (1, 1))])
def test_discriminator_shapes(norm, layers, shape, out):
    x = torch.rand(2, 3, *shape) * 2 - 1
    assert PatchDiscriminator(AdversarialConfig(disc_channels=4, disc_layers=layers, disc_norm=norm))(x).shape == (2, 1, *out)


@pytest.mark.parametrize("norm", ["group", "spectral"])
def test_batch_of_one_works_and_pictures_do_not_mix(norm):
    net, x = PatchDiscriminator(AdversarialConfig(disc_channels=8, disc_norm=norm)), pictures(4, 32)
    net(x[:1]).mean().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())
    net.eval()
    assert_close(net(x)[:1], net(x[:1]))


def test_batch_norm_refuses_one_picture_in_training_only():
    net = PatchDiscriminator(AdversarialConfig(disc_channels=8, disc_norm="batch"))
    with pytest.raises(ValueError, match="batch of 1.*group"):
        net(pictures(1, 32))
    assert net.eval()(pictures(1, 32)).shape == (1, 1, 2, 2)


def test_spectral_norm_holds_every_singular_value_at_one():
    net = PatchDiscriminator(AdversarialConfig(disc_channels=8, disc_norm="spectral"))
    for _ in range(100):
        net(pictures(1, 32))
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) == 5 and all(conv.bias is not None for conv in convs)
    for conv in convs:
        assert_close(torch.linalg.matrix_norm(conv.weight.flatten(1), 2), torch.tensor(1.0), atol=0.02, rtol=0)


def test_initial_weights_have_the_papers_spread():
    torch.manual_seed(0)
    for norm in ("batch", "group"):
        net = PatchDiscriminator(AdversarialConfig(disc_norm=norm))
        for layer in net.main:
            if isinstance(layer, nn.Conv2d):
                assert abs(layer.weight.std().item() - 0.02) < 1e-3 and abs(layer.weight.mean().item()) < 2e-3
            elif isinstance(layer, (nn.BatchNorm2d, nn.GroupNorm)):
                assert abs(layer.weight.mean().item() - 1) < 6e-3 and 0.01 < layer.weight.std().item() < 0.03 and not layer.bias.any()


def test_discriminator_refuses_small_pictures_and_other_channels():
    net = PatchDiscriminator(AdversarialConfig(disc_channels=4))
    with pytest.raises(ValueError, match="at least 24"):
        net(pictures(2, 23))
    with pytest.raises(ValueError, match="images"):
        net(torch.zeros(2, 1, 32, 32))


# ---------------------------------------------------------------- losses


def test_losses_are_their_formulas():
    real, fake = torch.tensor([[2.0, 0.5], [-1.0, 0.0]]), torch.tensor([[-2.0, 0.0], [0.5, 1.0]])
    assert_close(real_fake_loss(real, fake, "hinge"), 0.5 * torch.tensor([0.25 + 0.5, 1.5 + 1.75]))
    assert_close(fooling_loss(fake, "hinge"), -fake.mean(1))
    log = lambda v: torch.log(torch.sigmoid(v))
    assert_close(real_fake_loss(real, fake, "vanilla"), -0.5 * (log(real).mean(1) + torch.log(1 - torch.sigmoid(fake)).mean(1)))
    assert_close(fooling_loss(fake, "vanilla"), -log(fake).mean(1))


@pytest.mark.parametrize("name", ADVERSARIAL_LOSSES)
def test_losses_average_over_patches_in_float32(name):
    real, fake = torch.randn(3, 1, 4, 5, generator=generator()), torch.randn(3, 1, 4, 5, generator=generator(1))
    for loss in (real_fake_loss(real.bfloat16(), fake.bfloat16(), name), fooling_loss(fake.bfloat16(), name)):
        assert loss.shape == (3,) and loss.dtype == torch.float32
    assert_close(real_fake_loss(real, fake, name)[1], real_fake_loss(real[1:2], fake[1:2], name)[0])
    assert_close(fooling_loss(fake, name)[2], fooling_loss(fake[2:], name)[0])


def optimum(p, q, name):
    """The best logit of each outcome of a game between two discrete distributions, by gradient descent."""
    d = torch.zeros(len(p), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([d], lr=0.05)
    for _ in range(400):
        loss = ADVERSARIAL_LOSSES[name]
        value = 0.5 * ((p * loss.real(d)).sum() + (q * loss.fake(d)).sum())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return d.detach(), value.item()


def test_optimal_discriminators_of_two_discrete_distributions():
    """Vanilla: d = log p/q and the value is log 2 - JS(p, q). Hinge: d = sign(p - q) and the value is 1 - TV(p, q)."""
    p, q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
    d, value = optimum(p, q, "vanilla")
    m = (p + q) / 2
    js = 0.5 * ((p * (p / m).log()).sum() + (q * (q / m).log()).sum())
    assert_close(d, (p / q).log(), atol=1e-3, rtol=0)
    assert abs(value - (math.log(2) - js.item())) < 1e-6
    d, value = optimum(p, q, "hinge")
    assert_close(d, torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64), atol=0.03, rtol=0)
    assert abs(value - (1 - 0.5 * (p - q).abs().sum().item())) < 0.01


@pytest.mark.parametrize("name", ADVERSARIAL_LOSSES)
def test_gradients_point_the_right_way(name):
    real, fake = torch.zeros(1, 1, requires_grad=True), torch.zeros(1, 1, requires_grad=True)
    grads = torch.autograd.grad(real_fake_loss(real, fake, name).sum(), (real, fake))
    assert grads[0] < 0 < grads[1]
    far = torch.full((1, 1), -20.0, requires_grad=True)  # a made picture that nobody believes still learns
    assert torch.autograd.grad(fooling_loss(far, name).sum(), far)[0] < -0.99


def test_r1_of_a_linear_discriminator():
    """D(x) = <a, x>: the gradient is a wherever x is; the penalty's gradient in a is 2 a."""
    a = torch.randn(12, generator=generator(), requires_grad=True)
    x = torch.randn(5, 3, 2, 2, generator=generator(1)).requires_grad_()
    penalty = r1_penalty((x.flatten(1) @ a)[:, None], x)
    assert_close(penalty, a.square().sum().expand(5))
    assert_close(torch.autograd.grad(penalty.mean(), a)[0], 2 * a)


def test_r1_is_per_picture_and_of_the_mean_logit():
    x = pictures(3, 4).double().requires_grad_()
    scale = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64).view(3, 1, 1, 1)
    logits = (scale * x.square()).sum(1, keepdim=True)  # 16 patches; d mean / dx = 2 scale x / 16
    assert_close(r1_penalty(logits, x), (2 * scale * x / 16).square().flatten(1).sum(1))
    with pytest.raises(ValueError, match="requires_grad"):
        r1_penalty(logits.detach(), x)
    with pytest.raises(ValueError, match="requires_grad"):
        r1_penalty(logits, x.detach())


# ---------------------------------------------------------------- adaptive weight


def test_adaptive_weight_is_the_ratio_on_a_linear_toy():
    """Losses <a, w> and <b, w> have gradients a and b."""
    w, a, b = torch.zeros(3, requires_grad=True), torch.tensor([3.0, 4.0, 0.0]), torch.tensor([0.0, 0.6, 0.8])
    weight, norms = adaptive_weight(w @ a, w @ b, w)
    assert_close(weight, torch.tensor(5 / 1.0001))
    assert (norms["grad_rec"].item(), round(norms["grad_gan"].item(), 6)) == (5.0, 1.0)
    assert not weight.requires_grad and weight.shape == () and w.grad is None


def test_adaptive_weight_is_clamped_and_survives_zeros():
    w = torch.zeros(1, requires_grad=True)
    assert adaptive_weight((1e9 * w).sum(), (1e-9 * w).sum(), w)[0] == 1e4
    assert adaptive_weight((0 * w).sum(), (0 * w).sum(), w)[0] == 0
    assert_close(adaptive_weight((2 * w).sum(), (0 * w).sum(), w)[0], torch.tensor(1e4))


def test_adaptive_weight_reduces_gradients_before_norms():
    """Two processes with opposite gradients: the sum's norm is 0 and not 2."""
    w, seen = torch.ones(2, requires_grad=True), []
    weight, norms = adaptive_weight(w.sum(), (2 * w).sum(), w, lambda g: (seen.append(g.clone()), g - g)[1])
    assert len(seen) == 2 and norms["grad_rec"] == 0 and weight == 0
    doubled, _ = adaptive_weight(w.sum(), (2 * w).sum(), w, lambda g: 2 * g)
    assert_close(doubled, torch.tensor(0.5), atol=1e-4, rtol=0)


def test_adaptive_weight_refuses_losses_without_gradient():
    w = torch.zeros(1, requires_grad=True)
    with pytest.raises(ValueError, match="gradient"):
        adaptive_weight(w.sum(), w.detach().sum(), w)
    with torch.no_grad(), pytest.raises(ValueError, match="gradient"):
        adaptive_weight(w.sum(), w.sum(), w)


# ---------------------------------------------------------------- config


@pytest.mark.parametrize("bad", [
    {"disc_loss": "wasserstein"}, {"disc_norm": "layer"}, {"perceptual_weight": -1}, {"disc_weight": -0.1}, {"r1_weight": -1},
    {"disc_start": -1}, {"disc_warmup": -1}, {"disc_channels": 6}, {"disc_channels": 0}, {"disc_layers": 0},
])
def test_config_refuses(bad):
    with pytest.raises(ValueError, match="expected"):
        AdversarialConfig(**bad)


def test_config_round_trip_and_when_each_part_acts():
    config = AdversarialConfig(disc_start=10, disc_warmup=5)
    assert AdversarialConfig.from_dict(config.to_dict()) == config
    assert [config.trains_discriminator(s) for s in (0, 9, 10, 14)] == [False, False, True, True]
    assert [config.judges(s) for s in (0, 10, 14, 15)] == [False, False, False, True]
    assert AdversarialConfig().judges(0) and not AdversarialConfig(disc_weight=0).judges(100)


# ---------------------------------------------------------------- the stage


def perceptual():
    return PerceptualDistance(Convolution())


def test_each_part_computes_what_it_needs():
    stage, x = make_stage(), pictures()
    calls = []
    stage.discriminator.register_forward_hook(lambda module, args, out: calls.append(args[0].requires_grad))
    made = stage(x, generator(), "reconstruction")
    assert calls == [] and made.logits_fake is None and made.penalty.shape == (2,) and "kl" in made.logs
    made = stage(x, generator(), "generator")
    assert calls == [True] and made.logits_fake.shape == (2, 1, 2, 2)
    assert_close(made.reconstruction, stage.first_stage(x, generator())[0])
    judged = stage(x, generator(), "discriminator")
    assert calls == [True, False, False] and judged.r1 is None
    assert_close(judged.logits_fake, made.logits_fake)
    assert_close(judged.logits_real, stage.discriminator(x))
    with pytest.raises(ValueError, match="part"):
        stage(x, None, "critic")


def gradients(stage, loss):
    """Which of the two networks get a gradient that is not zero."""
    stage.zero_grad()
    loss.mean().backward()
    return tuple(any(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters()) for net in (stage.first_stage, stage.discriminator))


@pytest.mark.parametrize("first", [SMALL, SMALL_VQ], ids=["kl", "vq"])
@pytest.mark.parametrize("r1", [0.0, 10.0])
def test_discriminator_step_moves_the_discriminator_only(first, r1):
    stage, x = make_stage(TINY.replace(r1_weight=r1), first), pictures()
    before = {k: v.clone() for k, v in stage.first_stage.state_dict().items()}
    loss, logs = discriminator_loss(stage, stage(x, generator(), "discriminator"))
    assert gradients(stage, loss) == (False, True) and ("r1" in logs) == bool(r1)
    assert all(torch.equal(v, before[k]) for k, v in stage.first_stage.state_dict().items()), "a codebook moved"


def test_discriminator_learns_from_both_kinds():
    real, fake = (torch.zeros(2, 1, 1, 1, requires_grad=True) for _ in range(2))
    loss, _ = discriminator_loss(make_stage(), Judged(real, fake, None))
    assert loss.requires_grad
    gradient_real, gradient_fake = torch.autograd.grad(loss.sum(), (real, fake), allow_unused=True)
    assert gradient_real is not None and gradient_fake is not None
    assert_close(gradient_real, torch.full((2, 1, 1, 1), -0.5))
    assert_close(gradient_fake, torch.full((2, 1, 1, 1), 0.5))


def test_generator_step_reaches_the_first_stage_through_the_discriminator():
    """With every other term's weight at 0 the logits alone move the first stage; the discriminator can be frozen meanwhile."""
    stage, x = make_stage(TINY.replace(perceptual_weight=0.0, adaptive=False)), pictures()
    stage.discriminator.requires_grad_(False)
    made = stage(x, generator(), "generator")
    assert made.logits_fake.requires_grad, "the judgement must lead back to the first stage"
    assert gradients(stage, fooling_loss(made.logits_fake)) == (True, False)
    with_gan, _ = generator_loss(stage, made, x)
    without, _ = generator_loss(stage, stage(x, generator(), "reconstruction"), x)
    assert_close(with_gan, without + 0.5 * fooling_loss(made.logits_fake))


def test_both_sides_learn_over_alternating_steps():
    """Discriminator steps alone raise its share of right answers; first-stage steps alone raise the logits of what it makes."""
    stage, x = make_stage(TINY.replace(perceptual_weight=0.0, adaptive=False, disc_weight=1.0)), pictures(4)
    disc = torch.optim.Adam(stage.discriminator.parameters(), 2e-3)
    first = torch.optim.Adam(stage.first_stage.parameters(), 2e-3)
    history = []
    for optimizer, part in [(disc, "discriminator")] * 20 + [(first, "generator")] * 15:
        stage.zero_grad()
        out = stage(x, generator(), part)
        loss, logs = discriminator_loss(stage, out) if part == "discriminator" else generator_loss(stage, out, x)
        loss.mean().backward()
        optimizer.step()
        history.append(logs)
    assert history[19]["disc_right"] > 0.9 and history[19]["logits_real"] > history[19]["logits_fake"] + 0.5
    assert history[34]["logits_made"] > history[20]["logits_made"] + 0.5


def test_generator_loss_is_the_sum_of_its_terms():
    stage, x = make_stage(TINY.replace(perceptual_weight=2.0, disc_weight=0.7)), pictures()
    made, distance = stage(x, generator(), "generator"), perceptual()
    loss, logs = generator_loss(stage, made, x, distance)
    pixels, far = (made.reconstruction - x).abs().mean((1, 2, 3)), distance(made.reconstruction, x)
    rebuilt = pixels + 2 * far
    weight, norms = adaptive_weight(rebuilt.mean(), fooling_loss(made.logits_fake).mean(), stage.last_layer)
    assert_close(loss, rebuilt + made.penalty + 0.7 * weight * fooling_loss(made.logits_fake))
    assert loss.shape == (2,) and loss.dtype == torch.float32
    wanted = {"pixels", "psnr", "kl", "std", "perceptual", "grad_rec", "grad_gan", "fooling", "gan_weight", "logits_made"}
    assert set(logs) == wanted and all(v.shape == () and not v.requires_grad for v in logs.values())
    assert_close(logs["gan_weight"], 0.7 * weight)
    assert_close(logs["grad_rec"], norms["grad_rec"])


def test_weighed_gradients_balance_at_the_last_layer():
    """At the decoder's last weights the adversarial term pulls disc_weight times as hard as the others."""
    stage, x = make_stage(TINY.replace(disc_weight=0.5)), pictures()
    made, distance = stage(x, generator(), "generator"), perceptual()
    _, logs = generator_loss(stage, made, x, distance)
    pull = torch.autograd.grad(logs["gan_weight"] * fooling_loss(made.logits_fake).mean(), stage.last_layer)[0].norm()
    assert_close(pull, 0.5 * logs["grad_rec"], rtol=0.02, atol=0)


def test_evaluation_needs_no_gradient_and_no_discriminator():
    stage, x = make_stage(), pictures()
    with torch.no_grad():
        loss, logs = generator_loss(stage, stage(x, generator()), x, perceptual())
        judged = make_stage(TINY.replace(r1_weight=1.0))(x, generator(), "discriminator")
        assert "gan_weight" not in logs and loss.shape == (2,) and judged.r1 is None
        with pytest.raises(ValueError, match="gradient"):
            generator_loss(stage, stage(x, generator(), "generator"), x, perceptual())


def test_r1_enters_with_half_its_weight():
    stage, x = make_stage(TINY.replace(r1_weight=10.0, disc_norm="spectral")), pictures()
    judged = stage(x, generator(), "discriminator")
    loss, logs = discriminator_loss(stage, judged)
    assert_close(loss, real_fake_loss(judged.logits_real, judged.logits_fake) + 5 * judged.r1)
    assert_close(logs["r1"], judged.r1.mean().detach())
    assert not x.requires_grad, "the caller's pictures were changed"


@pytest.mark.parametrize("norm", ["group", "spectral"])
@pytest.mark.parametrize("name", ADVERSARIAL_LOSSES)
def test_batch_of_one_trains(norm, name):
    stage, x = make_stage(TINY.replace(disc_norm=norm, disc_loss=name, r1_weight=1.0)), pictures(1)
    for part in STAGE_PARTS:
        out = stage(x, generator(), part)
        loss, _ = discriminator_loss(stage, out) if part == "discriminator" else generator_loss(stage, out, x, perceptual())
        assert loss.shape == (1,) and loss.isfinite().all()
        loss.mean().backward()
    assert all(p.grad.isfinite().all() for p in stage.discriminator.parameters())


def test_stage_survives_bfloat16_autocast():
    stage, x = make_stage(TINY.replace(r1_weight=1.0)), pictures()
    for part in STAGE_PARTS:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = stage(x, generator(), part)
            loss, _ = discriminator_loss(stage, out) if part == "discriminator" else generator_loss(stage, out, x, perceptual())
        assert loss.dtype == torch.float32 and loss.isfinite().all()
        loss.mean().backward()


def test_stage_refuses_what_cannot_be_trained():
    with pytest.raises(ValueError, match="identity"):
        AdversarialStage(IdentityStage(AutoencoderConfig(3, 8, (1,), num_groups=4, double_z=False)))
    stage, x = make_stage(), pictures()
    with pytest.raises(ValueError, match="PerceptualDistance"):
        generator_loss(stage, stage(x), x)
