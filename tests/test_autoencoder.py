import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from ldm_edu import autoencoder
from ldm_edu.autoencoder import (
    AUTOENCODERS,
    PIXEL_LOSSES,
    AutoencoderConfig,
    AutoencoderKL,
    Decoder,
    DiagonalGaussian,
    Encoder,
    first_stage_loss,
    latent_statistics,
    summed_kl_weight,
)
from ldm_edu.core import make_generators, randn
from ldm_edu.metrics import psnr, ssim

SMALL = AutoencoderConfig(z_channels=4, model_channels=8, ch_mult=(1, 2, 4), num_res_blocks=1, num_groups=4)
CONFIGS = {
    "f4": (SMALL, (16, 16)),
    "f8, two blocks, attention at levels": (
        AutoencoderConfig(4, 8, (1, 2, 2, 4), 2, attention_levels=(4, 8), num_groups=8),
        (32, 48),
    ),
    "f2, no attention, rectangle": (AutoencoderConfig(2, 16, (1, 3), 1, mid_attention=False, num_groups=8), (24, 10)),
    "f1": (AutoencoderConfig(3, 16, (1,), 1, num_groups=8), (9, 7)),
}


def make(config, seed=0):
    """A model whose every parameter is random, biases and norms included."""
    torch.manual_seed(seed)
    model = AutoencoderKL(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
    with torch.no_grad():
        model.decoder.conv_out.weight.mul_(0.3)  # images of about [-1, 1]
    return model


def images(b, h, w, seed=0):
    return torch.rand(b, 3, h, w, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# ---- sizes

PUBLISHED = {  # parameters, state-dict entries, f of the released first stages
    "kl-f4": (55_312_063, 204, 4),
    "kl-f8": (83_653_863, 248, 8),
    "kl-f16": (69_610_963, 342, 16),
    "kl-f32": (103_880_131, 436, 32),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    with torch.device("meta"):
        model = AutoencoderKL(AUTOENCODERS[name])
    parameters, entries, factor = PUBLISHED[name]
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(model.state_dict()) == entries
    assert model.downsample_factor == factor
    assert math.isclose(summed_kl_weight(model.config), 1e-6)


def test_published_names_and_shapes():
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in AutoencoderKL(AUTOENCODERS["kl-f8"]).state_dict().items()}
    assert sum(k.startswith("encoder.") for k in shapes) == 106
    assert sum(k.startswith("decoder.") for k in shapes) == 138
    assert shapes["quant_conv.weight"] == (8, 8, 1, 1) and shapes["post_quant_conv.weight"] == (4, 4, 1, 1)
    assert shapes["encoder.mid.attn_1.proj_out.weight"] == (512, 512, 1, 1)
    assert shapes["encoder.down.1.block.0.nin_shortcut.weight"] == (256, 128, 1, 1)
    assert shapes["encoder.down.0.downsample.conv.weight"] == (128, 128, 3, 3)
    assert "encoder.down.3.downsample.conv.weight" not in shapes and "decoder.up.0.upsample.conv.weight" not in shapes
    assert shapes["decoder.up.0.block.0.nin_shortcut.weight"] == (128, 256, 1, 1)  # up.0: full resolution
    assert shapes["decoder.up.3.block.2.conv2.weight"] == (512, 512, 3, 3)


def test_published_vq_encoder():
    """vq-f4 without its codebook and 1x1 convolutions: 88 and 112 entries, 55,322,782 parameters with them."""
    config = AUTOENCODERS["vq-f4"]
    with torch.device("meta"):
        encoder, decoder = Encoder(config), Decoder(config)
    assert (len(encoder.state_dict()), len(decoder.state_dict())) == (88, 112)
    count = sum(p.numel() for half in (encoder, decoder) for p in half.parameters())
    assert count + 2 * (3 * 3 + 3) + 8192 * 3 == 55_322_782


def test_tiny_is_tiny():
    count = {n: sum(p.numel() for p in AutoencoderKL(AUTOENCODERS[n]).parameters()) for n in ("kl-f4-tiny", "kl-f4-small")}
    assert 250_000 <= count["kl-f4-tiny"] <= 700_000 < count["kl-f4-small"] <= 5_000_000
    assert AUTOENCODERS["kl-f4-tiny"].z_channels == 4 and AUTOENCODERS["kl-f4-tiny"].downsample_factor == 4


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_config_round_trip(name):
    config = AUTOENCODERS[name]
    assert AutoencoderConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="embed_dim.*z_channels"):
        AutoencoderConfig.from_dict({**config.to_dict(), "embed_dim": 4})


# ---- the start

@pytest.mark.parametrize("mid_attention", [False, True])
def test_starts_as_a_pyramid(mid_attention):
    """Untrained, the decoder repeats each latent cell over its block, and the posterior's std is exp(-3)-like small."""
    torch.manual_seed(0)
    model = AutoencoderKL(SMALL.replace(mid_attention=mid_attention)).eval()
    with torch.no_grad():
        posterior = model.encode(images(2, 16, 16))
        image = model.decode(posterior.mode())
        blocks = F.interpolate(image[..., ::4, ::4], scale_factor=4.0, mode="nearest")
    assert_close(image, blocks, atol=1e-5, rtol=1e-5)
    assert posterior.std.mean() < 0.2 and image.std() < 1.0


def test_start_follows_the_seed():
    def start(seed):
        torch.manual_seed(seed)
        return AutoencoderKL(SMALL).state_dict()

    a, b, c = start(1), start(1), start(2)
    assert all(torch.equal(a[k], b[k]) for k in a) and not torch.equal(a["encoder.conv_in.weight"], c["encoder.conv_in.weight"])


# ---- parity with the reference

@pytest.fixture(scope="module")
def reference():
    pytest.importorskip("diffusers", reason="needs diffusers, which `make test` installs")
    import diffusers_vae_map

    return diffusers_vae_map


@pytest.mark.parametrize("name", CONFIGS)
def test_parity(reference, name):
    config, size = CONFIGS[name]
    model, other = make(config).eval(), reference.make_reference(config).eval()
    other.load_state_dict(reference.to_reference(model), strict=True)
    x = images(2, *size)
    with torch.no_grad():
        ours, theirs = model.encode(x), other.encode(x).latent_dist
        z = ours.mode()
        assert_close(ours.mean, theirs.mean, atol=1e-5, rtol=0)
        assert_close(ours.logvar, theirs.logvar, atol=1e-5, rtol=0)
        assert_close(ours.kl(), theirs.kl(), rtol=1e-5, atol=1e-4)
        assert_close(ours.nll(z + 0.1), theirs.nll(z + 0.1), rtol=1e-5, atol=1e-4)
        image = model.decode(z)
        assert image.shape == x.shape
        assert_close(image, other.decode(z).sample, atol=1e-5, rtol=0)


def _difference(reference, monkeypatch_model):
    """Largest difference to the reference once `monkeypatch_model` has damaged ours."""
    config, size = CONFIGS["f4"]
    model, other = make(config).eval(), reference.make_reference(config).eval()
    other.load_state_dict(reference.to_reference(model), strict=True)
    monkeypatch_model(model)
    x = images(2, *size) * 0.01  # dark, flat pictures, where a norm's eps shows
    with torch.no_grad():
        z = other.encode(x).latent_dist.mode()
        gaps = [model.encode(x).mean - z, model.decode(z) - other.decode(z).sample]
    return max(gap.abs().max().item() for gap in gaps)


def test_mutation_groupnorm_eps(reference):
    """Bug 16: GroupNorm eps of the UNet in the first stage."""

    def damage(model):
        for layer in model.modules():
            if isinstance(layer, nn.GroupNorm):
                layer.eps = 1e-5

    assert _difference(reference, lambda model: None) <= 1e-5
    assert _difference(reference, damage) > 1e-5
    norms = [layer for layer in make(SMALL).modules() if isinstance(layer, nn.GroupNorm)]
    assert norms and all(layer.eps == 1e-6 for layer in norms)


def test_every_group_norm_has_the_published_epsilon():
    """Bug 16: 1e-6 everywhere in a first stage, attention included; the UNet has 1e-5."""
    config = dataclasses.replace(SMALL, attention_levels=(2,))
    norms = {name: layer.eps for name, layer in AutoencoderKL(config).named_modules() if isinstance(layer, nn.GroupNorm)}
    assert len(norms) > 20 and set(norms.values()) == {1e-6}, norms


def test_mutation_symmetric_padding(reference, monkeypatch):
    """Bug 17: the asymmetric padding before a stride-2 convolution lost."""
    monkeypatch.setattr(
        autoencoder.AsymmetricDownsample,
        "forward",
        lambda self, x: F.conv2d(x, self.conv.weight, self.conv.bias, stride=2, padding=1),
    )
    assert _difference(reference, lambda model: None) > 1e-3


def test_downsample_by_hand():
    """With one kernel weight at the centre, the layer must pick pixels (1, 1), (1, 3), ...; zeros beyond the edge."""
    layer = autoencoder.AsymmetricDownsample(1)
    x = torch.arange(16.0).view(1, 1, 4, 4) + 1
    with torch.no_grad():
        layer.conv.bias.zero_(), layer.conv.weight.zero_()
        layer.conv.weight[..., 1, 1] = 1
        assert layer(x).tolist() == [[[[6.0, 8.0], [14.0, 16.0]]]]
        layer.conv.weight.zero_()[..., 2, 2] = 1
        assert layer(x).tolist() == [[[[11.0, 0.0], [0.0, 0.0]]]]


# ---- the posterior

def test_kl_against_monte_carlo():
    mean, logvar = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0)).unbind()
    posterior, prior = DiagonalGaussian(mean, logvar), DiagonalGaussian(torch.zeros_like(mean), torch.zeros_like(mean))
    generator = torch.Generator().manual_seed(1)
    draws = [posterior.sample(generator) for _ in range(4000)]
    ratio = torch.stack([prior.nll(z) - posterior.nll(z) for z in draws])
    error = ratio.std(0) / math.sqrt(len(draws))
    assert ((ratio.mean(0) - posterior.kl()).abs() < 4 * error).all()


def test_kl_against_torch_distributions():
    mean, logvar = torch.randn(2, 5, 4, 3, 3, dtype=torch.float64)
    ours = DiagonalGaussian(mean, logvar).kl()
    theirs = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, logvar.mul(0.5).exp()), torch.distributions.Normal(0.0, 1.0)
    )
    assert ours.dtype == torch.float64
    assert_close(ours, theirs.sum((1, 2, 3)))


def test_posterior_limits():
    shape = (2, 4, 3, 3)
    assert DiagonalGaussian(torch.zeros(shape), torch.zeros(shape)).kl().tolist() == [0.0, 0.0]
    wild = DiagonalGaussian(torch.zeros(shape), torch.full(shape, 1e9))
    assert wild.logvar.max() == 20 and torch.isfinite(wild.kl()).all()
    sure = DiagonalGaussian(torch.ones(shape), torch.full(shape, -1e9))
    assert sure.logvar.min() == -30
    assert_close(sure.sample(), sure.mode(), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="logvar"):
        DiagonalGaussian(torch.zeros(2, 4, 3, 3), torch.zeros(2, 4, 3, 2))


def test_sample_is_reparameterised():
    mean, logvar = torch.zeros(1, 1, 2, 2, requires_grad=True), torch.full((1, 1, 2, 2), 2.0, requires_grad=True)
    z = DiagonalGaussian(mean, logvar).sample(torch.Generator().manual_seed(3))
    eps = torch.randn(1, 1, 2, 2, generator=torch.Generator().manual_seed(3))
    z.sum().backward()
    assert_close(mean.grad, torch.ones_like(mean))
    assert_close(logvar.grad, 0.5 * math.e * eps)


def test_drawing_leaves_the_posterior_as_it_was():
    mean, logvar = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    before, posterior = mean.clone(), DiagonalGaussian(mean, logvar)
    first, second = (posterior.sample(make_generators(7, 3)) for _ in range(2))
    assert torch.equal(first, second) and torch.equal(mean, before) and torch.equal(posterior.mode(), before)


def test_sample_does_not_depend_on_the_batch():
    """Bug 21: one generator per row."""
    mean, logvar = torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3)
    together = DiagonalGaussian(mean, logvar).sample(make_generators(7, 4))
    alone = DiagonalGaussian(mean[2:3], logvar[2:3]).sample(make_generators([9], 1))
    assert torch.equal(together[2:3], alone)
    with pytest.raises(ValueError, match="4"):
        DiagonalGaussian(mean, logvar).sample(make_generators(7, 3))


def test_forward_does_not_depend_on_the_batch():
    model, x = make(SMALL), images(3, 16, 16)
    with torch.no_grad():
        together = model(x, make_generators(5, 3))[0]
        alone = model(x[1:2], make_generators([6], 1))[0]
    assert_close(together[1:2], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(dtype):
    model, x = make(SMALL).to(dtype), images(2, 16, 16).to(dtype)
    before = x.clone()
    loss, logs = first_stage_loss(model, x)
    posterior = model.encode(x)
    assert posterior.sample().dtype == posterior.mean.dtype == model.decode(posterior.mode()).dtype == dtype
    assert posterior.kl().dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.isfinite(loss).all() and torch.equal(x, before)


# ---- the linear-Gaussian autoencoder

def test_linear_gaussian_optimum():
    """x = a u + noise has the exact posterior N(a x/(a^2+s^2), s^2/(a^2+s^2)): gradient descent on the ELBO finds it."""
    a, s = 1.5, 0.5
    generator = torch.Generator().manual_seed(0)
    x = (a**2 + s**2) ** 0.5 * torch.randn(4096, 1, 1, 1, generator=generator)
    slope, logvar = torch.zeros((), requires_grad=True), torch.zeros((), requires_grad=True)
    optimiser = torch.optim.Adam([slope, logvar], lr=0.05)
    for _ in range(400):
        posterior = DiagonalGaussian(slope * x, logvar.expand_as(x))
        z = posterior.sample(generator)
        elbo = -((x - a * z).square() / (2 * s**2)).flatten(1).sum(1) - posterior.kl()
        optimiser.zero_grad(), (-elbo.mean()).backward(), optimiser.step()
    assert abs(slope.item() - a / (a**2 + s**2)) < 0.02
    assert abs(logvar.exp().item() - s**2 / (a**2 + s**2)) < 0.01
    exact = -0.5 * (math.log(2 * math.pi * (a**2 + s**2)) + x.square() / (a**2 + s**2)).mean()
    bound = elbo.mean() - 0.5 * math.log(2 * math.pi * s**2)
    assert abs(bound.item() - exact.item()) < 0.05  # the bound is tight at the exact posterior


# ---- the loss

@pytest.mark.parametrize("kind", PIXEL_LOSSES)
def test_loss_by_hand(kind):
    model, x = make(SMALL.replace(pixel_loss=kind, kl_weight=0.3)), images(3, 16, 16)
    loss, logs = first_stage_loss(model, x, make_generators(0, 3))
    posterior = model.encode(x)
    z = posterior.mean + posterior.std * randn(posterior.mean.shape, make_generators(0, 3))
    d = (model.decode(z) - x).flatten(1)
    pixel = {"l1": d.abs(), "l2": d**2, "l1+l2": d.abs() + d**2, "charbonnier": (d**2 + 1e-4).sqrt() - 0.01}[kind]
    assert loss.shape == (3,) and loss.dtype == torch.float32
    assert_close(loss, pixel.mean(1) + 0.3 * posterior.kl() / (4 * 4 * 4))
    assert_close(logs["pixels"], pixel.mean()), assert_close(logs["kl"], posterior.kl().mean() / 64)
    assert_close(logs["psnr"], psnr(model.decode(z), x).mean())
    assert all(v.ndim == 0 and not v.requires_grad for v in logs.values())


def test_loss_is_the_originals_divided_by_the_pixels():
    config = SMALL.replace(kl_weight=1e-3)
    model, x = make(config), images(2, 16, 16)
    loss, _ = first_stage_loss(model, x, make_generators(0, 2))
    reconstruction, posterior = model(x, make_generators(0, 2))
    summed = (reconstruction - x).abs().flatten(1).sum(1) + summed_kl_weight(config) * posterior.kl()
    assert_close(loss, summed / x[0].numel())


def test_every_parameter_gets_a_gradient():
    model = make(CONFIGS["f8, two blocks, attention at levels"][0])
    first_stage_loss(model, images(2, 32, 32))[0].mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.ndim > 0)


def test_gradient_against_finite_differences():
    model, x = make(SMALL).double(), images(1, 8, 8).double()
    loss = lambda: model.decode(model.encode(x).sample(torch.Generator().manual_seed(0))).square().mean()
    parameter = model.encoder.down[0].downsample.conv.weight
    (gradient,) = torch.autograd.grad(loss(), parameter)
    with torch.no_grad():
        direction, h = torch.randn_like(parameter), 1e-6
        parameter += h * direction
        high = loss()
        parameter -= 2 * h * direction
        low = loss()
    assert_close((gradient * direction).sum(), (high - low) / (2 * h), rtol=1e-5, atol=1e-8)


def test_loss_reads_a_wrapped_model():
    model, x = make(SMALL), images(2, 16, 16)
    wrapped = nn.DataParallel(model, device_ids=None) if torch.cuda.is_available() else _Wrapped(model)
    assert_close(first_stage_loss(wrapped, x, make_generators(0, 2))[0], first_stage_loss(model, x, make_generators(0, 2))[0])


class _Wrapped(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args):
        return self.module(*args)


def test_trains():
    torch.manual_seed(0)
    model = AutoencoderKL(SMALL)
    x = F.interpolate(images(4, 4, 4), scale_factor=4.0)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = first_stage_loss(model, x)[0].mean()
        optimiser.zero_grad(), loss.backward(), optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# ---- entry checks

BAD = {
    "uneven": (lambda: images(1, 18, 16), "18 x 16.*multiples of 4"),
    "too small": (lambda: images(1, 2, 2), "2 x 2"),
    "grey": (lambda: images(1, 16, 16)[:, :1], r"\(1, 1, 16, 16\)"),
    "no batch": (lambda: images(1, 16, 16)[0], r"\(3, 16, 16\)"),
    "bytes as floats": (lambda: (images(1, 16, 16) + 1) * 127.5, r"\[-1, 1\]"),
    "nan": (lambda: images(1, 16, 16) * float("nan"), "nan"),
}


@pytest.mark.parametrize("name", BAD)
def test_encode_refuses(name):
    bad, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        make(SMALL).encode(bad())


def test_decode_refuses():
    with pytest.raises(ValueError, match=r"\(1, 3, 4, 4\).*z=4"):
        make(SMALL).decode(torch.zeros(1, 3, 4, 4))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_groups": 5}, r"5.*\[8, 16, 32\]"),
        ({"ch_mult": ()}, r"\(\)"),
        ({"attention_levels": (16,)}, r"16.*\[1, 2, 4\]"),
        ({"pixel_loss": "l3"}, "l3.*charbonnier"),
        ({"z_channels": 0}, "z_channels.*0"),
        ({"kl_weight": -1.0}, "-1"),
    ],
)
def test_config_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


def test_kl_needs_a_variance():
    with pytest.raises(ValueError, match="double_z"):
        AutoencoderKL(SMALL.replace(double_z=False))


# ---- statistics of latents

def test_latent_statistics_against_samples():
    model = make(SMALL).eval()
    batches = [images(n, 16, 16, seed=n) for n in (3, 5, 2)]
    statistics = latent_statistics(model, batches)
    with torch.no_grad():
        z = torch.cat([model.encode(x).sample() for x in batches for _ in range(200)])
    assert statistics.n == 10
    assert_close(torch.tensor(statistics.mean), z.mean(), atol=0.02, rtol=0)
    assert_close(torch.tensor(statistics.std), z.std(), atol=0, rtol=0.02)
    assert_close(torch.tensor(statistics.channel_std), z.std((0, 2, 3)), atol=0, rtol=0.03)
    assert_close(torch.tensor(statistics.channel_mean), z.mean((0, 2, 3)), atol=0.05, rtol=0)
    assert abs((z * statistics.scale_factor).std().item() - 1) < 0.02
    noise = torch.cat([model.encode(x).std for x in batches]).square().mean().sqrt()
    assert_close(torch.tensor(statistics.posterior_std), noise.detach(), rtol=1e-5, atol=0)


def test_latent_statistics_do_not_depend_on_the_batches():
    model, x = make(SMALL).eval(), images(6, 16, 16)
    one, many = latent_statistics(model, [x]), latent_statistics(model, [{"image": part} for part in x.split(2)])
    assert one.n == many.n
    assert_close(torch.tensor(one.channel_std), torch.tensor(many.channel_std), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="no image"):
        latent_statistics(model, [])


# ---- PSNR and SSIM against numpy written from the definitions

def _numpy_ssim(x, y, window=11, sigma=1.5, data_range=2.0):
    offsets = np.arange(window) - (window - 1) / 2
    weights = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * sigma**2))
    weights /= weights.sum()
    c1, c2, values = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2, []
    for c in range(x.shape[0]):
        for i in range(x.shape[1] - window + 1):
            for j in range(x.shape[2] - window + 1):
                p, q = x[c, i : i + window, j : j + window], y[c, i : i + window, j : j + window]
                mp, mq = (weights * p).sum(), (weights * q).sum()
                vp, vq = (weights * (p - mp) ** 2).sum(), (weights * (q - mq) ** 2).sum()
                cov = (weights * (p - mp) * (q - mq)).sum()
                values.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    return np.mean(values)


def test_psnr_and_ssim_against_numpy():
    x, y = images(3, 17, 14), (images(3, 17, 14) + 0.3 * images(3, 17, 14, seed=1)).clamp(-1, 1)
    for i in range(3):
        a, b = x[i].double().numpy(), y[i].double().numpy()
        assert abs(psnr(x, y)[i].item() - 10 * np.log10(4 / np.mean((a - b) ** 2))) < 1e-3
        assert abs(ssim(x, y)[i].item() - _numpy_ssim(a, b)) < 1e-5


def test_metric_limits():
    x, y = images(2, 16, 16), images(2, 16, 16, seed=1)
    assert psnr(x, x).tolist() == [math.inf] * 2
    assert_close(ssim(x, x), torch.ones(2)), assert_close(ssim(x, y), ssim(y, x))
    assert_close(psnr(x, x + 0.2), torch.full((2,), 20.0), atol=1e-3, rtol=0)
    assert_close(psnr((x + 1) / 2, (y + 1) / 2, data_range=1.0), psnr(x, y))
    assert (ssim(x, y) < 0.1).all() and (ssim(x, 0.9 * x) > 0.9).all()
    with pytest.raises(ValueError, match="10.*11"):
        ssim(x[..., :10], x[..., :10])
    for metric in (psnr, ssim):
        with pytest.raises(ValueError, match="y"):
            metric(x, x[:1])
