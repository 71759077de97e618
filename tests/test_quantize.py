"""Vector quantisation: gradients, averages, k-means, revival, sizes, parity with diffusers' VQModel, and historical bug 10."""
import copy
import dataclasses
import math
import threading

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from ldm_edu.autoencoder import (
    AUTOENCODERS,
    AutoencoderConfig,
    AutoencoderKL,
    PointLatent,
    first_stage_loss,
    latent_statistics,
)
from ldm_edu.ldm import LatentSpace, LDMConfig, load_state, save
from ldm_edu.quantize import (
    AutoencoderVQ,
    IdentityStage,
    Quantized,
    VectorQuantizer,
    code_entropy,
    code_histogram,
    coded_rate,
    codes_in_use,
    fixed_rate,
    kmeans,
    make_first_stage,
    nearest_code,
    perplexity,
    spread_centres,
)

SMALL = AutoencoderConfig(3, 8, (1, 2, 4), 1, num_groups=4, double_z=False, codes=32)
CONFIGS = {
    "f4": (SMALL, (16, 16)),
    "f8, two blocks, attention at levels": (
        AutoencoderConfig(4, 8, (1, 2, 2, 4), 2, attention_levels=(4, 8), num_groups=8, double_z=False, codes=128),
        (32, 48),
    ),
    "f2, no attention, rectangle": (
        AutoencoderConfig(2, 16, (1, 3), 1, mid_attention=False, num_groups=8, double_z=False, codes=50),
        (24, 10),
    ),
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def make(config, seed=0):
    """A model whose every parameter is random, biases and norms included, and whose codes lie where its latents lie."""
    torch.manual_seed(seed)
    model = AutoencoderVQ(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
    with torch.no_grad():
        model.decoder.conv_out.weight.mul_(0.3)
        z = model.encode(images(2, 32, 32, seed=5)).mean
        spread = torch.randn(config.codes, config.z_channels, generator=generator(seed))
        model.quantize.set_codes(torch.arange(config.codes), z.mean((0, 2, 3)) + z.std((0, 2, 3)) * spread)
    return model


def images(b, h, w, seed=0):
    return torch.rand(b, 3, h, w, generator=generator(seed)) * 2 - 1


def latents(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


def quantizer(codes=16, width=3, seed=0, dtype=torch.float32, **options):
    """A quantiser with standard normal codes."""
    layer = VectorQuantizer(codes, width, **options).to(dtype)
    layer.set_codes(torch.arange(codes), torch.randn(codes, width, generator=generator(seed + 100), dtype=dtype))
    return layer


# ---- sizes

PUBLISHED = {  # parameters, state-dict entries, f of the released first stages
    "vq-f4": (55_322_782, 205, 4),
    "vq-f4-noattn": (53_219_486, 185, 4),
    "vq-f8": (67_717_295, 299, 8),
    "vq-f8-n256": (67_652_783, 299, 8),
    "vq-f16": (69_593_371, 343, 16),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    with torch.device("meta"):
        model = make_first_stage(AUTOENCODERS[name])
    parameters, entries, factor = PUBLISHED[name]
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(model.state_dict()) == entries
    assert model.downsample_factor == factor


def test_published_names_and_shapes():
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in AutoencoderVQ(AUTOENCODERS["vq-f4"]).state_dict().items()}
    assert shapes["quantize.embedding.weight"] == (8192, 3)
    assert [k for k in shapes if k.startswith("quantize.")] == ["quantize.embedding.weight"]
    assert shapes["quant_conv.weight"] == shapes["post_quant_conv.weight"] == (3, 3, 1, 1)
    assert shapes["encoder.conv_out.weight"] == (3, 512, 3, 3)
    assert [sum(k.startswith(f"{half}.") for k in shapes) for half in ("encoder", "decoder")] == [88, 112]


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_every_named_config_can_be_built(name):
    config = AUTOENCODERS[name]
    with torch.device("meta"):
        model = make_first_stage(config)
    assert type(model) is {"kl": AutoencoderKL, "vq": AutoencoderVQ, "identity": IdentityStage}[config.kind]
    assert model.config is config and model.downsample_factor == config.downsample_factor


# ---- parity with the reference

@pytest.fixture(scope="module")
def reference():
    pytest.importorskip("diffusers", reason="needs diffusers, which `make test` installs")
    import diffusers_vae_map

    return diffusers_vae_map


@pytest.mark.parametrize("scaling_factor", [0.18215, 1.0])
@pytest.mark.parametrize("name", CONFIGS)
def test_parity(reference, name, scaling_factor):
    config, size = CONFIGS[name]
    model = make(config).eval()
    other = reference.make_vq_reference(config, scaling_factor=scaling_factor).eval()
    other.load_state_dict(reference.to_reference(model), strict=True)
    other.quantize.legacy = False  # the commitment's weight on the commitment
    x = images(2, *size)
    with torch.no_grad():
        z = model.encode(x).mode()
        assert_close(z, other.encode(x).latents, atol=1e-5, rtol=0)
        _, theirs, (_, _, index) = other.quantize(z)
        reconstruction, ours = model(x)
        assert torch.equal(ours.indices.flatten(), index) and ours.indices.unique().numel() > 5
        assert_close(ours.loss.mean(), theirs, atol=1e-6, rtol=1e-5)
        assert reconstruction.shape == x.shape
        assert_close(reconstruction, other.decode(z).sample, atol=1e-5, rtol=0)
        assert_close(model.decode(z), reconstruction, atol=1e-6, rtol=0)
        assert_close(model.decode_unquantised(z), other.decode(z, force_not_quantize=True).sample, atol=1e-5, rtol=0)
        assert (model.decode_unquantised(z) - reconstruction).abs().max() > 5e-4  # 50 times the tolerance


# ---- the nearest code

def brute_force(points, codebook):
    return torch.stack([((p - codebook) ** 2).sum(1).argmin() for p in points.double()]) if len(points) else torch.zeros(0, dtype=torch.int64)


@pytest.mark.parametrize("chunk", [1, 7, 40, 100, 2**24])
@pytest.mark.parametrize("n, codes, width", [(0, 5, 3), (1, 1, 1), (37, 20, 3), (64, 7, 16)])
def test_nearest_code_in_chunks(n, codes, width, chunk):
    points, codebook = latents(n, width), latents(codes, width, seed=1)
    index = nearest_code(points, codebook, chunk)
    assert index.dtype == torch.int64 and torch.equal(index, nearest_code(points, codebook))
    assert torch.equal(index, brute_force(points, codebook.double()))


def test_nearest_code_is_exact_far_from_the_origin():
    """|z|^2 - 2 z e + |e|^2 in float32 loses the digits that decide here."""
    codebook = 1000 + torch.arange(8.0)[:, None].expand(8, 4) * 0.01
    points = codebook.repeat(5, 1) + 0.002
    assert torch.equal(nearest_code(points, codebook), torch.arange(8).repeat(5))


def test_ties_and_what_is_not_finite():
    codebook = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [5.0, 5.0]])
    points = torch.tensor([[0.0, 3.0], [1.0, 0.1], [math.nan, 5.0], [math.inf, 5.0], [5.0, 4.0]])
    assert nearest_code(points, codebook).tolist() == [0, 0, 0, 0, 3]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_nearest_code_of_other_dtypes(dtype):
    points, codebook = latents(50, 3).to(dtype), latents(9, 3, seed=1).to(dtype)
    assert torch.equal(nearest_code(points, codebook), brute_force(points, codebook.double()))


def test_memory_is_bounded_by_the_chunk(monkeypatch):
    seen = []
    cdist = torch.cdist
    monkeypatch.setattr(torch, "cdist", lambda a, b, **options: seen.append(len(a) * len(b)) or cdist(a, b, **options))
    nearest_code(latents(1000, 3), latents(64, 3), chunk=1000)
    assert max(seen) <= 1000 and sum(seen) == 64_000


def test_shapes_are_checked():
    layer = quantizer()
    with pytest.raises(ValueError, match=r"points.*\(4, 2\)"):
        nearest_code(torch.zeros(4, 2), torch.zeros(3, 3))
    with pytest.raises(ValueError, match="z: got"):
        layer(torch.zeros(1, 4, 2, 2))
    with pytest.raises(ValueError, match="expected 0 to 15"):
        layer.lookup(torch.full((1, 2, 2), 16))
    with pytest.raises(ValueError, match="expected 0 to 15"):
        layer.lookup(torch.full((1, 2, 2), -1))
    with pytest.raises(ValueError, match="indices"):
        layer.lookup(torch.zeros(4, dtype=torch.int64))
    for wrong in ({"codes": 0}, {"width": 0}, {"commitment": -1.0}, {"decay": 1.0}, {"decay": -0.1}):
        with pytest.raises(ValueError, match=rf"{next(iter(wrong))}.* expected"):
            VectorQuantizer(**{"codes": 4, "width": 2, **wrong})


# ---- the three gradients

def head(q):
    """Something for a decoder to do."""
    return (torch.sin(2 * q) + q**3 / 7).flatten(1).sum(1)


def finite_difference(function, at, step=1e-5):
    gradient = torch.zeros_like(at)
    for i in range(at.numel()):
        move = torch.zeros_like(at).flatten()
        move[i] = step
        move = move.view_as(at)
        gradient.view(-1)[i] = (function(at + move) - function(at - move)) / (2 * step)
    return gradient


def test_straight_through_gradient_is_that_of_the_relaxed_objective():
    """With the choice of codes and what is detached held fixed, z -> head(q + z - z0) + beta |z - e|^2 / d."""
    layer, z = quantizer(dtype=torch.float64, commitment=0.3), latents(2, 3, 2, 3, dtype=torch.float64).requires_grad_()
    out = layer(z)
    (head(out.z) + out.loss).sum().backward()
    codes, start = layer.lookup(out.indices).detach(), z.detach()
    relaxed = lambda z: (head(codes + z - start) + 0.3 * (z - codes).square().flatten(1).mean(1)).sum()
    assert_close(z.grad, finite_difference(relaxed, start), atol=1e-8, rtol=1e-7)
    book = layer.embedding.weight.detach()
    of_codes = lambda book: (start - book[out.indices].permute(0, 3, 1, 2)).square().flatten(1).mean(1).sum()
    assert_close(layer.embedding.weight.grad, finite_difference(of_codes, book), atol=1e-8, rtol=1e-7)


def test_quantised_value_is_the_code():
    layer, z = quantizer(), latents(2, 3, 4, 5)
    out = layer(z)
    assert isinstance(out, Quantized) and torch.equal(out.z, layer.lookup(out.indices))
    assert out.indices.shape == (2, 4, 5) and torch.equal(out.counts, code_histogram(out.indices, 16)) and out.counts.sum() == 40
    assert out.loss.shape == out.codebook.shape == out.commitment.shape == (2,)


def gradients(term, **options):
    """Of the latents and of the codebook."""
    layer, z = quantizer(**options), latents(2, 3, 4, 5).requires_grad_()
    layer.embedding.requires_grad_(True)
    return torch.autograd.grad(term(layer(z)).sum(), (z, layer.embedding.weight), allow_unused=True, materialize_grads=True)


def test_each_term_moves_its_side_only():
    """Bug 10: exactly zero on the other side."""
    for term, encoder, book in ((lambda out: out.codebook, False, True), (lambda out: out.commitment, True, False), (lambda out: head(out.z), True, False)):
        for_z, for_codes = gradients(term)
        assert bool(for_z.abs().max() > 1e-3) is encoder and bool(for_codes.abs().max() > 1e-3) is book
        assert encoder or not for_z.any()
        assert book or not for_codes.any()


@pytest.mark.parametrize("beta", [0.0, 0.25, 2.0])
def test_beta_is_on_the_commitment(beta):
    """Bug 10: the codebook's gradient does not know beta, the encoder's is proportional to it."""
    (z_beta, book_beta), (z_one, book_one) = (gradients(lambda out: out.loss, commitment=b) for b in (beta, 1.0))
    assert_close(book_beta, book_one, rtol=0, atol=0)
    assert_close(z_beta, beta * z_one, rtol=1e-6, atol=1e-9)


def test_loss_by_hand():
    layer = VectorQuantizer(3, 2, commitment=0.5)
    layer.set_codes(torch.arange(3), torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]]))
    out = layer(torch.tensor([[[[1.0, 3.0]], [[0.0, 0.0]]], [[[0.0, 0.0]], [[0.0, 6.0]]]]))
    assert out.indices.tolist() == [[[0, 1]], [[0, 2]]] and out.counts.tolist() == [2, 1, 1]
    assert out.codebook.tolist() == out.commitment.tolist() == [0.5, 1.0]  # (1 + 1) / 4 numbers, 4 / 4 numbers
    assert out.loss.tolist() == [0.75, 1.5]


def test_codebook_term_pulls_codes_to_the_mean_of_their_latents():
    layer, z = quantizer(codes=1, width=2), latents(4, 2, 3, 3)
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.5)
    for _ in range(60):
        optimiser.zero_grad(), layer(z).loss.mean().backward(), optimiser.step()
    assert_close(layer.embedding.weight[0].detach(), z.mean((0, 2, 3)), atol=1e-5, rtol=0)


def test_loss_of_an_image_does_not_depend_on_its_neighbours():
    layer, z = quantizer(), latents(5, 3, 4, 4)
    together, alone = layer(z), layer(z[3:4])
    for name in ("loss", "codebook", "commitment", "z", "indices"):
        assert torch.equal(getattr(together, name)[3:4], getattr(alone, name))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    layer, z = quantizer().to(dtype), latents(2, 3, 4, 4).to(dtype).requires_grad_()
    before = z.detach().clone()
    out = layer(z)
    assert out.z.dtype == dtype and out.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    (out.z.float().sum() + out.loss.sum()).backward()
    assert z.grad.dtype == dtype and z.grad.isfinite().all() and torch.equal(z.detach(), before)


def test_half_precision_latents_meet_a_float32_codebook():
    layer, z = quantizer(decay=0.9), latents(2, 3, 4, 4).bfloat16()
    out = layer(z)
    assert out.z.dtype == torch.bfloat16 and out.loss.dtype == layer.embedding.weight.dtype == torch.float32


def test_nan_shows_and_teaches_nothing():
    layer, z = quantizer(decay=0.5), latents(1, 3, 2, 2)
    layer.keep_alive(3)
    clean, twin = z.clone(), copy.deepcopy(layer)
    z[0, 1, 0, 0] = math.nan
    out = layer(z)
    assert out.z[0, :, 0, 0].isnan().any() and out.loss.isnan().all() and out.z[0, :, 1:].isfinite().all()
    assert all(v.isfinite().all() for v in layer.state_dict().values())
    before = copy.deepcopy(layer.state_dict())
    layer(torch.full_like(z, math.inf))
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    rest = torch.cat([clean[:, :, 0, 1:], clean[:, :, 1]], 2)[:, :, None]
    twin(rest)  # the cells that were finite, alone
    assert all(torch.equal(v, before[k]) for k, v in twin.state_dict().items())


# ---- averages

def test_average_closed_form():
    """Constant latents: count = g^t + (1 - g^t) n, sum = g^t e0 + (1 - g^t) S, code = their smoothed ratio."""
    g, steps, smoothing = 0.8, 7, 1e-5
    layer = VectorQuantizer(2, 2, decay=g)
    start = torch.tensor([[0.0, 0.0], [9.0, 9.0]])
    layer.set_codes(torch.arange(2), start)
    z = torch.tensor([[[[1.0, 0.0, 8.0]], [[0.0, 2.0, 8.0]]]])
    for _ in range(steps):
        layer(z)
    n, sums, kept = torch.tensor([2.0, 1.0]), torch.tensor([[1.0, 2.0], [8.0, 8.0]]), g**steps
    count, total = kept + (1 - kept) * n, kept * start + (1 - kept) * sums
    assert_close(layer.average_count, count), assert_close(layer.average_sum, total)
    smoothed = (count + smoothing) / (count.sum() + 2 * smoothing) * count.sum()
    assert_close(layer.embedding.weight, total / smoothed[:, None])
    assert_close(smoothed.sum(), count.sum())


def test_averages_converge_to_the_cluster_means():
    layer, z = VectorQuantizer(2, 2, decay=0.5), latents(4, 2, 3, 3)
    layer.set_codes(torch.arange(2), torch.tensor([[-0.5, 0.0], [0.5, 0.0]]))
    for _ in range(60):
        out = layer(z)
    flat, index = z.permute(0, 2, 3, 1).reshape(-1, 2), out.indices.flatten()
    assert_close(layer.embedding.weight, torch.stack([flat[index == i].mean(0) for i in range(2)]), atol=1e-4, rtol=0)


def test_averages_leave_the_codebook_term_out():
    layer, z = quantizer(decay=0.9, commitment=0.3), latents(2, 3, 4, 4)
    assert not layer.embedding.weight.requires_grad
    out = layer(z.requires_grad_())
    assert_close(out.loss, 0.3 * out.commitment, rtol=0, atol=0)
    with torch.no_grad():
        assert_close(out.codebook, (layer.eval()(z).codebook * 0 + out.commitment))  # still reported
    assert set(layer.state_dict()) == {"embedding.weight", "average_count", "average_sum"}


def test_averages_leave_the_encoder_its_commitment():
    (for_z, _), (alone, _) = (gradients(term, decay=0.9, commitment=0.3) for term in (lambda out: out.loss, lambda out: out.commitment))
    assert for_z.any() and torch.allclose(for_z, 0.3 * alone)


@pytest.mark.parametrize("quiet", ["eval", "no_grad"])
def test_nothing_is_learnt_outside_training(quiet):
    layer, z = quantizer(decay=0.5), latents(2, 3, 4, 4)
    layer.keep_alive(1)
    before = copy.deepcopy(layer.state_dict())
    with torch.set_grad_enabled(quiet == "eval"):
        layer.train(quiet == "no_grad")(z)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    layer.train()(z)
    assert not any(torch.equal(v, before[k]) for k, v in layer.state_dict().items() if k != "unused")


def test_the_output_is_of_the_codes_before_they_moved():
    layer, z = quantizer(decay=0.1), latents(2, 3, 4, 4)
    before = layer.embedding.weight.clone()
    out = layer(z)
    assert torch.equal(out.z, before[out.indices].permute(0, 3, 1, 2)) and not torch.equal(layer.embedding.weight, before)


# ---- k-means

CENTRES = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0], [5.0, 20.0]])


def clusters(n=40, seed=0):
    return (CENTRES + 0.3 * torch.randn(n, 5, 2, generator=generator(seed))).reshape(-1, 2)


@pytest.mark.parametrize("seed", range(5))
def test_kmeans_finds_separated_clusters(seed):
    points = clusters()
    centres = kmeans(points, 5, generator(seed))
    index = nearest_code(CENTRES, centres)
    assert sorted(index.tolist()) == [0, 1, 2, 3, 4]
    assert_close(centres[index], points.view(-1, 5, 2).mean(0), atol=1e-5, rtol=0)


def test_kmeans_rounds_never_raise_the_distortion():
    points = latents(400, 3)
    distortion = lambda c: (points - c[nearest_code(points, c)]).square().sum(1).mean()
    values = [distortion(kmeans(points, 12, generator(1), steps)) for steps in range(8)]
    assert all(b <= a + 1e-6 for a, b in zip(values, values[1:])) and values[-1] < 0.9 * values[0]


def test_kmeans_limits():
    points = latents(6, 2)
    assert_close(kmeans(points, 1), points.mean(0, keepdim=True))
    every = kmeans(points, 6, generator())
    assert sorted(nearest_code(points, every).tolist()) == list(range(6)) and torch.equal(every[nearest_code(points, every)], points)
    assert torch.equal(kmeans(points, 3, generator(4)), kmeans(points, 3, generator(4)))
    same = kmeans(torch.ones(5, 2), 3, generator())
    assert torch.equal(same, torch.ones(3, 2))  # copies; no NaN of an empty cluster
    spoilt = torch.cat([points, torch.full((1, 2), math.nan)])
    assert kmeans(spoilt, 6, generator()).isfinite().all()
    for k in (0, 7):
        with pytest.raises(ValueError, match=f"got {k} centres for 6 finite points"):
            kmeans(spoilt, k)


def test_spread_centres_follow_squared_distances():
    """Two equal points and one far away: after one of the twins the far one is certain."""
    points = torch.tensor([[0.0], [0.0], [5.0]])
    picks = torch.stack([spread_centres(points, 2, generator(s)).flatten().sort().values for s in range(30)])
    assert torch.equal(picks, torch.tensor([0.0, 5.0]).expand(30, 2))
    thirds = torch.tensor([[0.0], [1.0], [-2.0]])  # from 0: odds 1 to 4
    far = [row[1].item() for s in range(2000) if (row := spread_centres(thirds, 2, generator(s)))[0] == 0]
    assert abs(sum(v == -2 for v in far) / len(far) - 0.8) < 0.06 and set(far) == {1.0, -2.0}


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_initialise(decay):
    layer, z = VectorQuantizer(5, 2, decay=decay), clusters().view(2, 10, 10, 2).permute(0, 3, 1, 2)
    assert layer.eval()(z).codebook.min() > 10
    layer.initialise(z, generator())
    out = layer(z)
    assert codes_in_use(out.counts) == 1 and out.counts.tolist() == [40] * 5 and out.codebook.max() < 0.2
    if decay:
        assert torch.equal(layer.average_sum, layer.embedding.weight) and (layer.average_count == 1).all()


# ---- revival

def test_revive_moves_the_dead_only_onto_points():
    layer, points = quantizer(), latents(50, 3, seed=3)
    before, dead = layer.embedding.weight.detach().clone(), torch.tensor([1, 4, 5, 15])
    layer.revive(points, dead, generator(7))
    book = layer.embedding.weight.detach()
    living = torch.ones(16, dtype=torch.bool).index_fill(0, dead, False)
    assert torch.equal(book[living], before[living])
    rows = [(points == code).all(1).nonzero().flatten().tolist() for code in book[dead]]
    assert all(len(r) == 1 for r in rows) and len({r[0] for r in rows}) == 4  # four different points
    twin = quantizer()
    twin.revive(points, dead, generator(7))
    assert torch.equal(twin.embedding.weight, layer.embedding.weight)


def test_revive_with_few_points_repeats_them():
    layer, points = quantizer(), latents(3, 3)
    layer.revive(points, torch.arange(8), generator())
    index = nearest_code(layer.embedding.weight[:8], points)
    assert torch.equal(layer.embedding.weight[:8].detach(), points[index]) and index.bincount().tolist() in ([2, 3, 3], [3, 2, 3], [3, 3, 2])
    with pytest.raises(ValueError, match="got 0 points"):
        layer.revive(torch.zeros(0, 3), torch.tensor([0]))


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_unused_codes_move_after_their_patience(decay):
    layer, z = VectorQuantizer(8, 2, decay=decay), latents(2, 2, 6, 6)
    far = torch.full((8, 2), 100.0) + torch.arange(8.0)[:, None]
    far[0] = 0.0
    layer.set_codes(torch.arange(8), far)
    layer.keep_alive(3, seed=5)
    for expected in (1, 2):
        assert codes_in_use(layer(z).counts) == 1 / 8
        assert layer.unused.tolist() == [0] + [expected] * 7
        assert_close(layer.embedding.weight[1:].detach(), far[1:], rtol=1e-3, atol=0)
    layer(z)  # the third batch: they move after the lookup
    assert layer.unused.tolist() == [0] * 8 and layer.batches == 3
    flat = z.permute(0, 2, 3, 1).reshape(-1, 2)
    assert all((flat == code).all(1).any() for code in layer.embedding.weight[1:].detach())
    assert codes_in_use(layer(z).counts) == 1


def test_living_codes_stay():
    layer, z = quantizer(codes=4), latents(4, 3, 8, 8)
    layer.keep_alive(1)
    before = layer.embedding.weight.detach().clone()
    assert codes_in_use(layer(z).counts) == 1
    assert torch.equal(layer.embedding.weight.detach(), before) and layer.unused.tolist() == [0] * 4


def test_keep_alive_is_an_option():
    layer = quantizer()
    assert set(layer.state_dict()) == {"embedding.weight"}
    layer.keep_alive(5)
    assert set(layer.state_dict()) == {"embedding.weight", "unused", "batches"}
    plain = quantizer(seed=1)
    plain.load_state_dict(layer.state_dict())  # a finished model does not need the counters
    assert torch.equal(plain.embedding.weight, layer.embedding.weight)
    with pytest.raises(RuntimeError, match="unused"):
        layer.load_state_dict(plain.state_dict())
    layer.keep_alive(0)
    assert set(layer.state_dict()) == {"embedding.weight"}
    with pytest.raises(ValueError, match="-1"):
        layer.keep_alive(-1)


def test_two_processes_learn_what_one_learns():
    """Counts and sums are summed over the processes, and moved codes are the same on each, from the latents of both."""
    z, barrier, slots, results = 0.3 * latents(4, 3, 4, 4), threading.Barrier(2), [None, None], [None, None]

    def work(rank):
        def reduce(tensor):
            slots[rank] = tensor.clone()
            barrier.wait()
            total = slots[0] + slots[1]
            barrier.wait()
            return total

        layer = quantizer(decay=0.7)
        layer.keep_alive(2, seed=3)
        layer.reduce, layer.process = reduce, (rank, 2)
        layer(z[2 * rank : 2 * rank + 2])
        after_one = copy.deepcopy(layer.state_dict())
        layer(z[2 * rank : 2 * rank + 2])
        results[rank] = after_one, copy.deepcopy(layer.state_dict())

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    [t.start() for t in threads], [t.join(60) for t in threads]
    single = quantizer(decay=0.7)
    single.keep_alive(2, seed=3)
    single(z)
    for mine, theirs in zip(results[0], results[1], strict=True):
        assert all(torch.equal(v, theirs[k]) for k, v in mine.items())
    assert (single.unused > 0).sum() > 1
    assert all(torch.allclose(v.double(), single.state_dict()[k].double(), atol=1e-6) for k, v in results[0][0].items())
    moved = results[0][1]["embedding.weight"][single.unused > 0]
    home = [(z.permute(0, 2, 3, 1).reshape(2, -1, 3) == code).all(2).any(1) for code in moved]
    owners = [h.nonzero().flatten().tolist() for h in home if h.any()]
    assert [0] in owners and [1] in owners  # each gave some


def test_processes_that_disagree_are_refused():
    layer = quantizer()
    layer.reduce = lambda tensor: 2 * tensor
    with pytest.raises(ValueError, match="as many processes"):
        layer.revive(latents(5, 3), torch.tensor([0]))


# ---- resuming

def train_some(model, optimiser, first, last):
    for step in range(first, last):
        loss, _ = first_stage_loss(model, images(4, 16, 16, seed=step))
        optimiser.zero_grad(), loss.mean().backward(), optimiser.step()


@pytest.mark.parametrize("decay", [0.0, 0.8])
def test_resume_is_bit_for_bit(decay):
    def start(seed):
        model = make(SMALL.replace(codebook_decay=decay), seed)
        model.quantize.keep_alive(2, seed=1)
        return model, torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    whole, optimiser = start(0)
    train_some(whole, optimiser, 0, 3)
    states = copy.deepcopy((whole.state_dict(), optimiser.state_dict()))
    resumed, other = start(9)
    resumed.load_state_dict(states[0]), other.load_state_dict(states[1])
    for model, opt in ((whole, optimiser), (resumed, other)):
        train_some(model, opt, 3, 7)
    assert all(torch.equal(v, resumed.state_dict()[k]) for k, v in whole.state_dict().items())
    assert whole.quantize.batches == 7 and whole.quantize.unused.max() < 2


def test_the_trainer_resumes_with_moving_codes(tmp_path):
    """The loop of lesson 08, cut in two and in one go: equal weights, averages and counters."""
    from ldm_edu import training
    from ldm_edu.data import Scenes

    class Task(training.TrainingTask):
        def __init__(self):
            self.model = make(SMALL)
            self.model.quantize.keep_alive(2)

        def loss(self, model, batch, rng):
            return first_stage_loss(model, batch["image"])

    data = Scenes(size=16, n=32)
    config = training.TrainConfig(steps=8, batch_size=4, warmup_steps=1, log_every=0, validate_every=0, save_every=4)
    tasks = [Task(), Task(), Task()]
    training.train(tasks[0], data, config, tmp_path / "whole", progress=False)
    training.train(tasks[1], data, config, tmp_path / "cut", stop_after=4, progress=False)
    training.train(tasks[2], data, config, tmp_path / "cut", progress=False)
    whole, cut = tasks[0].model.state_dict(), tasks[2].model.state_dict()
    assert whole["quantize.batches"] == 8 and all(torch.equal(v, cut[k]) for k, v in whole.items())
    assert not torch.equal(whole["quantize.embedding.weight"], tasks[1].model.state_dict()["quantize.embedding.weight"])


# ---- histograms and bits

def test_usage_by_hand():
    counts = code_histogram(torch.tensor([[[0, 0], [0, 2]]]), 4)
    assert counts.tolist() == [3, 0, 1, 0] and codes_in_use(counts) == 0.5
    entropy = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))
    assert math.isclose(code_entropy(counts), entropy) and math.isclose(perplexity(counts), 2**entropy)


def test_usage_limits():
    even, one, none = torch.full((16,), 7), torch.eye(16, dtype=torch.int64)[3] * 9, torch.zeros(16, dtype=torch.int64)
    assert math.isclose(code_entropy(even), 4) and math.isclose(perplexity(even), 16) and codes_in_use(even) == 1
    assert code_entropy(one) == 0 and perplexity(one) == 1 and codes_in_use(one) == 1 / 16
    assert code_entropy(none) == 0 and codes_in_use(none) == 0
    rates = torch.rand(50, generator=generator()).mul(1000).long()
    assert 0 < code_entropy(rates) < math.log2(50)
    assert math.isclose(code_entropy(rates), torch.distributions.Categorical(probs=rates.double()).entropy() / math.log(2), rel_tol=1e-9)


def test_rates():
    assert fixed_rate(AUTOENCODERS["vq-f4"]) == 13 / 16 and fixed_rate(AUTOENCODERS["vq-f8"]) == 14 / 64
    assert coded_rate(SMALL, torch.full((32,), 3)) == fixed_rate(SMALL) == 5 / 16
    assert coded_rate(SMALL, torch.eye(32)[0]) == 0


# ---- the stage

def test_config_reaches_the_quantiser():
    model = AutoencoderVQ(SMALL.replace(commitment=0.7, codebook_decay=0.9))
    layer = model.quantize
    assert (layer.codes, layer.width, layer.commitment, layer.decay) == (32, 3, 0.7, 0.9)
    assert AutoencoderVQ(SMALL).quantize.decay == 0 and AutoencoderVQ(SMALL).quantize.embedding.weight.abs().max() <= 1 / 32


def test_stage_methods_agree():
    model, x = make(SMALL).eval(), images(3, 16, 24)
    with torch.no_grad():
        latent, (reconstruction, quantized), index = model.encode(x), model(x), model.codes(x)
        assert isinstance(latent, PointLatent) and latent.mean.shape == (3, 3, 4, 6) and not latent.std.any()
        assert torch.equal(index, quantized.indices) and torch.equal(model.decode_codes(index), reconstruction)
        assert torch.equal(model.decode(latent.mean), reconstruction)
        assert torch.equal(model.decode_unquantised(quantized.z), reconstruction)
        assert torch.equal(model.decode(quantized.z), reconstruction)  # quantising twice changes nothing
        assert not torch.equal(latent.mean, quantized.z)  # diffusion sees what is before


def test_decoding_lets_gradients_through():
    """Guidance by an image needs them: as if quantisation were not there."""
    model, z = make(SMALL).eval(), latents(1, 3, 4, 4).requires_grad_()
    model.decode(z).square().sum().backward()
    codes = model.quantize.lookup(model.quantize.indices(z)).detach().requires_grad_()
    model.decode_unquantised(codes).square().sum().backward()
    assert_close(z.grad, codes.grad) and z.grad.any()


def test_penalty_and_loss():
    model, x = make(SMALL), images(3, 16, 16)
    loss, logs = first_stage_loss(model, x)
    reconstruction, quantized = model(x)
    penalty, parts = model.penalty(quantized)
    assert torch.equal(penalty, quantized.loss) and set(parts) == {"codebook", "commitment", "usage", "perplexity"}
    assert_close(loss, (reconstruction - x).abs().flatten(1).mean(1) + penalty)
    assert loss.shape == (3,) and loss.dtype == torch.float32 and {"pixels", "psnr", *parts} == set(logs)
    assert 0 < logs["usage"] <= 1 <= logs["perplexity"] <= 32
    assert all(v.ndim == 0 and not v.requires_grad for v in logs.values())


def test_the_stage_does_not_see_the_batch():
    model, x = make(SMALL), images(4, 16, 16)
    together, alone = first_stage_loss(model, x)[0], first_stage_loss(model, x[2:3])[0]
    assert_close(together[2:3], alone, atol=1e-5, rtol=1e-5)


def test_starts_as_a_pyramid():
    """Untrained and unquantised, the decoder repeats each latent cell over its block, as a KL stage does."""
    torch.manual_seed(0)
    model = AutoencoderVQ(SMALL).eval()
    with torch.no_grad():
        image = model.decode_unquantised(model.encode(images(2, 16, 16)).mean)
        blocks = nn.functional.interpolate(image[..., ::4, ::4], scale_factor=4.0, mode="nearest")
    assert_close(image, blocks, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_stage_dtypes(dtype):
    model, x = make(SMALL).to(dtype), images(2, 16, 16).to(dtype)
    loss, _ = first_stage_loss(model, x)
    assert model.encode(x).mean.dtype == model.decode(model.encode(x).mean).dtype == dtype and loss.isfinite().all()


def test_stage_errors():
    model = AutoencoderVQ(SMALL)
    for wrong in (AUTOENCODERS["kl-f4-tiny"], AUTOENCODERS["identity"]):
        with pytest.raises(ValueError, match="expected 'vq'"):
            AutoencoderVQ(wrong)
    for size in ((15, 16), (16, 18), (0, 16)):
        with pytest.raises(ValueError, match="multiples of 4"):
            model.encode(torch.zeros(1, 3, *size))
    with pytest.raises(ValueError, match=r"expected \[-1, 1\]"):
        model.encode(torch.full((1, 3, 16, 16), 255.0))
    with pytest.raises(ValueError, match="x: got"):
        model.codes(torch.zeros(1, 4, 16, 16))
    for decode in (model.decode, model.decode_unquantised):
        with pytest.raises(ValueError, match="z: got"):
            decode(torch.zeros(1, 4, 4, 4))
    with pytest.raises(ValueError, match="expected 0 to 31"):
        model.decode_codes(torch.full((1, 2, 2), 32))


def test_statistics_and_files(tmp_path):
    model, x = make(SMALL).eval(), images(8, 16, 16)
    statistics = latent_statistics(model, x.split(4))
    with torch.no_grad():
        assert math.isclose(statistics.std, model.encode(x).mean.double().std(correction=0).item(), rel_tol=1e-5)
    assert statistics.posterior_std == 0
    save(model, tmp_path / "stage")
    other = make_first_stage(model.config)
    load_state(other, tmp_path / "stage" / "model.safetensors")
    assert torch.equal(other.eval().codes(x), model.codes(x))


# ---- pixels as latents

def test_identity_stage(tmp_path):
    config = AUTOENCODERS["identity"]
    model, x = make_first_stage(config), images(3, 9, 7)
    reconstruction, latent = model(x)
    assert torch.equal(reconstruction, x) and torch.equal(latent.mean, x) and torch.equal(model.decode(x), x)
    penalty, logs = model.penalty(latent)
    assert penalty.tolist() == [0.0] * 3 and logs == {} and model.downsample_factor == 1
    assert sum(p.numel() for p in model.parameters()) == 0 and not any(p.requires_grad for p in model.parameters())
    loss, _ = first_stage_loss(model, x)
    assert loss.tolist() == [0.0] * 3
    assert math.isclose(latent_statistics(model, [x]).std, x.double().std(correction=0), rel_tol=1e-6)
    save(model, tmp_path / "stage")
    load_state(make_first_stage(config), tmp_path / "stage" / "model.safetensors")
    assert next(model.to(torch.float64).parameters()).dtype == torch.float64


@pytest.mark.parametrize("config", [AUTOENCODERS["identity"], SMALL])
def test_a_latent_space_of_any_stage(config):
    stage = make_first_stage(config).eval()
    space, x = LatentSpace(LDMConfig(first_stage=config, scale_factor=2.0), stage), images(2, 16, 16)
    z = space.encode(x)
    assert_close(z, 2 * stage.encode(x).mean) and space.device.type == "cpu"
    assert_close(space.encode(x, generator()), z, rtol=0, atol=0)
    assert_close(space.decode(z), stage.decode(z / 2).clamp(-1, 1))


def test_identity_errors():
    model = IdentityStage(AUTOENCODERS["identity"])
    with pytest.raises(ValueError, match="expected 'identity'"):
        IdentityStage(SMALL)
    with pytest.raises(ValueError, match=r"expected \[-1, 1\]"):
        model.encode(torch.full((1, 3, 4, 4), 2.0))
    with pytest.raises(ValueError, match="z: got"):
        model.decode(torch.zeros(1, 4, 4, 4))


def test_quantized_is_plain_data():
    assert [f.name for f in dataclasses.fields(Quantized)] == ["z", "indices", "codebook", "commitment", "loss", "counts"]
