import itertools
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import ldm_edu
from ldm_edu.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm_edu.data import Scenes
from ldm_edu.quantize import AutoencoderVQ, IdentityStage
from ldm_edu.tiling import Span, Tiling, WholePicture, blend_weights, sharing, spans, tiled_decode, tiled_encode

KL = AutoencoderConfig(4, 8, (1, 2), 1, mid_attention=False, num_groups=4)
STAGES = {  # what one cell is influenced by stays below 12 cells in each of them
    "kl": (AutoencoderKL, KL),
    "kl with attention in the middle and at a level": (AutoencoderKL, KL.replace(mid_attention=True, attention_levels=(2,))),
    "vq": (AutoencoderVQ, KL.replace(double_z=False, codes=16)),
}


def make(kind, config, seed=0, dtype=torch.float64):
    """A first stage whose every parameter is random, biases and norms included."""
    torch.manual_seed(seed)
    stage = kind(config).to(dtype)
    for name, parameter in stage.named_parameters():
        nn.init.normal_(parameter, std=0.2 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
        if "norm" in name and name.endswith("weight"):
            nn.init.normal_(parameter, 1.0, 0.2)
    return stage


def latents(*shape, dtype=torch.float64):
    """Latents whose mean and spread change from place to place, so that tiles differ."""
    z = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    return z * torch.linspace(0.2, 2, shape[-1], dtype=dtype) + torch.linspace(-1, 1, shape[-2], dtype=dtype)[:, None]


# ---- cutting


@pytest.mark.parametrize("tile, overlap", [(1, 0), (2, 1), (5, 0), (5, 2), (8, 4), (16, 3), (16, 8)])
def test_tiles_cover_every_axis(tile, overlap):
    for cells in range(1, 75):
        tiles = spans(cells, tile, overlap)
        assert tiles[0].start == 0 and tiles[-1].stop == cells and max(s.stop - s.start for s in tiles) <= tile
        assert all(a.stop - b.start == overlap for a, b in itertools.pairwise(tiles)) and (len(tiles) == 1) == (cells <= tile)
        assert [i for s in tiles for i in range(*s.core)] == list(range(cells))
        assert all(s.start <= s.core[0] < s.core[1] <= s.stop for s in tiles)


@pytest.mark.parametrize("tile, overlap, scale", [(1, 0, 1), (2, 1, 3), (8, 0, 2), (8, 4, 1), (16, 7, 4), (16, 8, 8)])
def test_weights_are_a_partition_of_unity(tile, overlap, scale):
    for cells in (1, tile, tile + 1, 3 * tile - 1, 77):
        tiles = spans(cells, tile, overlap)
        total = torch.zeros(cells * scale, dtype=torch.float64)
        for span, weight in zip(tiles, blend_weights(tiles, overlap, scale), strict=True):
            assert weight.shape == ((span.stop - span.start) * scale,) and (weight >= 0).all()
            total[span.start * scale : span.stop * scale] += weight
        assert_close(total, torch.ones_like(total))


def test_weights_are_smooth_and_zero_beside_inner_edges():
    tiles = spans(100, 60, 20)
    first, second = blend_weights(tiles, 20, 4)
    assert len(tiles) == 2 and (first[-20:] == 0).all() and (second[:20] == 0).all() and (first[:40] == 1).all()
    assert first.diff().abs().max() < 1.6 / 40 and (first.diff() <= 0).all()


# ---- equal to the whole


@pytest.mark.parametrize("name", STAGES)
def test_decode_equals_the_whole(name):
    stage = make(*STAGES[name])
    z = latents(2, 4, 21, 151)
    want = stage.decode(z)
    assert_close(tiled_decode(stage, z, 100, 50, keys=10_000), want, atol=1e-9, rtol=0)
    assert (tiled_decode(stage, z, 100, 50, layers=0) - want).abs().max() > 1e-3  # so the bound above means something


@pytest.mark.parametrize("name", STAGES)
def test_encode_equals_the_whole(name):
    stage = make(*STAGES[name])
    x = latents(2, 3, 302, 42).tanh()
    want, got = stage.encode(x), tiled_encode(stage, x, 100, 50, keys=10_000)
    assert type(got) is type(want)
    assert_close(got.mean, want.mean, atol=1e-9, rtol=0)
    assert_close(got.std, want.std, atol=1e-9, rtol=0)
    assert (tiled_encode(stage, x, 100, 50, layers=0).mean - want.mean).abs().max() > 1e-3


def test_tiles_along_both_axes():
    stage, z = make(AutoencoderKL, KL), latents(1, 4, 110, 130)
    assert_close(tiled_decode(stage, z, 100, 50), stage.decode(z), atol=1e-9, rtol=0)


def test_pictures_of_a_batch_do_not_mix():
    stage, z = make(AutoencoderKL, KL), latents(3, 4, 9, 40)
    alone = torch.cat([tiled_decode(stage, one[None], 20, 8) for one in z])
    assert_close(tiled_decode(stage, z, 20, 8), alone, atol=1e-10, rtol=0)


def test_one_tile_is_the_stage_itself():
    stage, z = make(AutoencoderKL, KL), latents(1, 4, 9, 12)
    assert torch.equal(tiled_decode(stage, z, 12, 4), stage.decode(z))


def test_identity_stage_gives_the_pixels_back():
    stage = IdentityStage(AutoencoderConfig(3, 32, (1,), double_z=False))
    x = torch.rand(2, 3, 37, 23) * 2 - 1
    assert_close(tiled_decode(stage, x, 8, 4), x)
    assert_close(tiled_encode(stage, x, 8, 4).mean, x)


def test_every_further_layer_helps_until_the_last_is_exact():
    stage, z = make(AutoencoderKL, KL), latents(1, 4, 21, 151)
    norms = sum(isinstance(layer, nn.GroupNorm) for layer in stage.decoder.modules())
    errors = [(tiled_decode(stage, z, 100, 50, layers=n) - stage.decode(z)).abs().max() for n in (0, norms - 1, norms)]
    assert errors[2] < 1e-9 < errors[1] < errors[0]


@pytest.mark.parametrize("keys, step", [(21 * 40, 1), (300, 2), (100, 3), (1, 40)])
def test_attention_sees_an_even_grid_of_the_whole(keys, step):
    cells, x = (21, 40), torch.arange(840.0).view(1, 1, 21, 40)
    whole, parts = WholePicture(cells, keys, math.inf), []
    for whole.rows, whole.columns in itertools.product(spans(21, 10, 3), spans(40, 16, 5)):
        tile = x[:, :, whole.rows.start : whole.rows.stop, whole.columns.start : whole.columns.stop]
        parts.append(whole.every(tile))
    got = torch.cat(parts, 2).flatten().sort().values
    assert_close(got, x[0, 0, ::step, ::step].flatten())
    assert len(got) <= keys


def test_fewer_keys_than_cells_are_close():
    stage, z = make(*STAGES["kl with attention in the middle and at a level"]), latents(1, 4, 21, 151)
    want = stage.decode(z)
    few = (tiled_decode(stage, z, 100, 50, keys=800) - want).abs()
    none = (tiled_decode(stage, z, 100, 50, layers=0) - want).abs()
    assert 1e-6 < few.max() and few.mean() < none.mean() / 2


# ---- the shipped first stage


def photo_like(size):
    """Coloured noise with a 1/f spectrum, an edge and a gradient."""
    frequency = torch.sqrt(torch.fft.fftfreq(size)[:, None] ** 2 + torch.fft.rfftfreq(size) ** 2).clamp(min=1 / size)
    noise = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    texture = torch.fft.irfft2(torch.fft.rfft2(noise) / frequency, s=(size, size))
    across = torch.linspace(-1, 1, size)
    return (0.3 * texture / texture.std() + 0.4 * torch.sign(across[:, None] - 0.3 * across) + 0.2 * across).clamp(-1, 1)


@torch.no_grad()
def test_no_seams_at_512_pixels():
    """At most 1e-2 anywhere, overlaps included; blending alone is more than ten times worse."""
    stage = ldm_edu.load_first_stage("scenes-kl-f4")
    x = torch.cat([Scenes(size=512, n=1, split="validation").render([0])["image"], photo_like(512)])
    z = stage.encode(x).mode()
    whole = stage.decode(z)
    largest = lambda y: (y - whole).abs().amax((1, 2, 3))
    assert (largest(tiled_decode(stage, z, 72, 16)) <= 1e-2).all()
    assert (largest(tiled_decode(stage, z, 72, 16, layers=0)) > 1e-1).all()


# ---- memory, errors, manners


def test_no_tensor_grows_with_the_picture():
    """The largest output of any module while 2048 x 2048 pixels are decoded, counted by hooks, is a tile's."""
    stage = make(AutoencoderKL, AutoencoderConfig(4, 2, (1, 1, 1), 1, mid_attention=False, num_groups=1), dtype=torch.float32)
    largest = 0

    def count(_, __, output):
        nonlocal largest
        largest = max(largest, output.numel() if isinstance(output, torch.Tensor) else 0)

    hooks = [layer.register_forward_hook(count) for layer in stage.decoder.modules()]
    y = tiled_decode(stage, torch.randn(1, 4, 512, 512), 64, 16, layers=2)
    for hook in hooks:
        hook.remove()
    assert y.shape == (1, 3, 2048, 2048) and y.isfinite().all()
    assert 2 * 200**2 < largest <= 3 * (64 * 4) ** 2 < y.numel() / 50


def test_the_stage_is_left_as_it_was():
    stage, z = make(AutoencoderKL, KL), latents(1, 4, 9, 40)
    before = stage.decode(z)
    tiled_decode(stage, z, 20, 8)
    with pytest.raises(RuntimeError), sharing(stage, WholePicture((9, 40), 1, 0)):
        raise RuntimeError
    assert torch.equal(stage.decode(z), before) and not any("forward" in layer.__dict__ for layer in stage.modules())


def test_dtype_is_that_of_the_input():
    stage = make(AutoencoderKL, KL, dtype=torch.bfloat16)
    z = latents(1, 4, 9, 40, dtype=torch.bfloat16)
    y = tiled_decode(stage, z, 20, 8)
    assert y.dtype == torch.bfloat16 and (y.float() - stage.decode(z).float()).abs().mean() < 0.1


@pytest.mark.parametrize("sizes", [{"tile": 0}, {"overlap": -1}, {"overlap": 33}, {"layers": -1}, {"keys": 0}])
def test_sizes_that_cannot_be_cut(sizes):
    with pytest.raises(ValueError, match="expected tile and keys"):
        Tiling(**{"tile": 64, "overlap": 16, **sizes})
    with pytest.raises(ValueError, match="expected tile and keys"):
        tiled_decode(make(AutoencoderKL, KL), latents(1, 4, 9, 40), **{"tile": 64, "overlap": 16, **sizes})


def test_inputs_that_are_no_pictures():
    stage = make(AutoencoderKL, KL)
    for z in (latents(4, 9, 9), latents(1, 3, 9, 9)):
        with pytest.raises(ValueError, match="z: got shape"):
            tiled_decode(stage, z)
    for x, words in ((latents(1, 3, 9, 10).tanh(), "multiples of 2"), (latents(1, 3, 8, 8) * 9, "expected"), (latents(1, 4, 8, 8), "got shape")):
        with pytest.raises(ValueError, match=words):
            tiled_encode(stage, x)


def test_span_is_plain_data():
    assert Span(0, 4, (0, 3)) == Span(0, 4, (0, 3))
