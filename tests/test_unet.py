"""The UNet: parity with diffusers, published sizes, shapes refused, gradients, conditioning, historical bugs."""
import dataclasses
import json

import numpy as np
import pytest
import torch
from diffusers_maps import diffusers_unet, randomise, to_diffusers
from torch import nn

from ldm_edu.unet import UNETS, Downsample, ResBlock, UNet, UNetConfig, Upsample, build_unet, timestep_embedding

PUBLISHED = {  # counted on the original classes
    "celeba256": 274_056_163, "lsun-churches256": 294_966_916, "cin256": 394_984_196, "cin256-v2": 400_920_579,
    "text2img256": 403_623_939, "txt2img-1p4B": 872_300_484, "layout2img-openimages256": 246_277_379,
    "bsr-sr": 113_622_563, "inpainting-big": 387_245_827, "semantic-synthesis256": 215_229_315,
    "rdm768": 1_335_480_400, "sd-v1": 859_520_964,
}
SMALL = UNetConfig(4, 4, 32, (1, 2), 1, (1, 2), head_dim=16, context_dim=24, num_groups=8)
PARITY = {
    "one level": UNetConfig(3, 6, 32, (1,), 1, (1,), heads=1, context_dim=20, num_groups=8),
    "two levels": UNetConfig(4, 4, 64, (1, 2), 1, (1, 2), head_dim=32, context_dim=128),
    "sd shape": UNetConfig(4, 4, 32, (1, 2, 4, 4), 2, (1, 2, 4), heads=8, context_dim=48),
    "deep transformer": UNetConfig(7, 3, 48, (1, 3), 2, (2,), head_dim=24, context_dim=16, transformer_depth=3, num_groups=16),
    "scale shift": UNetConfig(4, 4, 32, (1, 2), 2, (2,), heads=4, context_dim=24, use_scale_shift_norm=True, num_groups=16),
}
SIZES = {"one level": (9, 7), "two levels": (8, 8), "sd shape": (16, 8), "deep transformer": (10, 6), "scale shift": (12, 12)}


def inputs(config, size=(8, 8), b=2, tokens=5, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(b, config.in_channels, *size, generator=generator)
    t = torch.randint(0, 1000, (b,), generator=generator)
    context = None if config.context_dim is None else torch.randn(b, tokens, config.context_dim, generator=generator)
    return x, t, context


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name):
    with torch.device("meta"):
        unet = UNet(UNETS[name])
    assert sum(p.numel() for p in unet.parameters()) == PUBLISHED[name]


def test_presets_are_published_or_class_room():
    assert set(PUBLISHED) < set(UNETS)
    with torch.device("meta"):
        sizes = {n: sum(p.numel() for p in UNet(c).parameters()) for n, c in UNETS.items() if n not in PUBLISHED}
    assert all(n < 30e6 for n in sizes.values()), sizes


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("name", PARITY)
def test_parity_with_diffusers(name, linear):
    config = PARITY[name]
    unet = randomise(UNet(config), seed=len(name)).eval()
    theirs = diffusers_unet(unet, linear)
    x, t, context = inputs(config, SIZES[name])
    with torch.no_grad():
        ours, reference = unet(x, t, context), theirs(x, t, context).sample
    assert ours.shape == reference.shape == (2, config.out_channels, *SIZES[name])
    assert reference.std() > 0.1  # the branches that start at zero speak
    assert (ours - reference).abs().max() <= 1e-5


@pytest.mark.parametrize("scale", [1e-3, 3e-3])
def test_parity_where_the_epsilons_of_the_norms_matter(scale):
    """Activations this small tell eps 1e-5 from 1e-6: swapping them is a bug that ordinary inputs hide."""
    unet = randomise(UNet(PARITY["two levels"]), seed=3).eval()
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if name.split(".")[-2] in ("conv1", "conv2", "shortcut", "conv_in", "conv", "time", "proj_out"):
                parameter.mul_(scale)
    theirs = diffusers_unet(unet)
    x, t, context = inputs(unet.config)
    with torch.no_grad():
        ours, reference = unet(x, t, context), theirs(x, t, context).sample
    torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5 * reference.abs().max().item())


@pytest.mark.parametrize("swap", ["residual blocks", "transformers"])
def test_swapped_epsilons_are_visible(swap):
    """The test above must be able to fail: swapping either epsilon moves the output by far more than it allows."""
    unet = randomise(UNet(PARITY["two levels"]), seed=3).eval()
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if name.split(".")[-2] in ("conv1", "conv2", "shortcut", "conv_in", "conv", "time", "proj_out"):
                parameter.mul_(1e-3)
        before = unet(*inputs(unet.config))
        for module in unet.modules():
            if isinstance(module, nn.GroupNorm) and module.eps == (1e-5 if swap == "residual blocks" else 1e-6):
                module.eps = 1e-6 if swap == "residual blocks" else 1e-5
        after = unet(*inputs(unet.config))
    assert (before - after).abs().max() > 1e-3 * before.abs().max()


def test_every_group_norm_has_the_published_epsilon():
    for name, module in build_unet("text-tiny").named_modules():
        if isinstance(module, nn.GroupNorm):
            assert module.eps == (1e-6 if name.endswith("attention.norm") else 1e-5), name
    for name, module in build_unet("tiny").named_modules():
        if isinstance(module, nn.GroupNorm):
            assert module.eps == 1e-5, name


@pytest.mark.parametrize("config", [
    UNetConfig(3, 3, 64, (1, 2), 1, (2,), head_dim=32),
    UNetConfig(3, 3, 32, (1, 2, 2), 2, (1, 2, 4), head_dim=32, use_scale_shift_norm=True, resblock_updown=True),
], ids=["celeba shape", "churches shape"])
def test_parity_of_unconditional_models(config):
    unet = randomise(UNet(config), seed=5).eval()
    theirs = diffusers_unet(unet)
    x, t, _ = inputs(config, (16, 8))
    with torch.no_grad():
        ours, reference = unet(x, t), theirs(x, t).sample
    assert ours.shape == reference.shape and reference.std() > 0.1
    assert (ours - reference).abs().max() <= 1e-5


def test_sd_v1_has_the_shapes_of_stable_diffusion():
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        ours = to_diffusers(UNet(UNETS["sd-v1"]))
        theirs = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8).state_dict()
    assert len(ours) == 686
    assert {k: tuple(v.shape) for k, v in ours.items()} == {k: tuple(v.shape) for k, v in theirs.items()}


@pytest.mark.parametrize("context_dim", [24, None], ids=["transformers", "plain attention"])
def test_head_count_changes_the_function_but_no_shape(context_dim):
    """The trap of the released configurations: one head of 64 and two of 32 load each other's weights silently."""
    config = SMALL.replace(context_dim=context_dim)
    one, two = (UNet(config.replace(head_dim=None, heads=heads)) for heads in (1, 4))
    randomise(one)
    two.load_state_dict(one.state_dict(), strict=True)
    with torch.no_grad():
        assert (one(*inputs(config)) - two(*inputs(config))).abs().max() > 1e-2


def test_exactly_one_of_heads_and_head_dim():
    with pytest.raises(ValueError, match="heads=4 and head_dim=16, expected exactly one"):
        UNetConfig(heads=4, head_dim=16)
    with pytest.raises(ValueError, match="heads=4 and head_dim=16, expected exactly one"):
        SMALL.replace(heads=4)
    assert UNetConfig().to_dict()["head_dim"] == 32 and UNetConfig(heads=2).head_dim is None


@pytest.mark.parametrize("changes, message", [
    ({"num_groups": 24}, "num_groups: got 24, expected a divisor of every width"),
    ({"head_dim": 24}, "head_dim: got 24, expected a divisor of the width"),
    ({"attention_levels": (1, 8)}, r"attention_levels: got \[8\], expected downsample factors among \[1, 2\]"),
    ({"cross_levels": (4,)}, r"cross_levels: got \[4\]"),
    ({"cross_levels": (1,), "context_dim": None}, "without context_dim"),
    ({"num_res_blocks": 0}, "num_res_blocks: got 0"),
    ({"ch_mult": ()}, "ch_mult: got"),
    ({"dropout": 1.5}, "dropout: got 1.5"),
    ({"context_dim": 0}, "context_dim: got 0"),
    ({"attention": (1,)}, "unknown attention"),
])
def test_bad_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        SMALL.replace(**changes)


@pytest.mark.parametrize("name", UNETS)
def test_configs_survive_json(name):
    assert UNetConfig.from_dict(UNETS[name].to_dict()) == UNETS[name]
    assert dataclasses.is_dataclass(UNETS[name])


def test_unknown_preset_lists_the_known():
    with pytest.raises(ValueError, match="sd-v1"):
        build_unet("sd-v2")


def bad_inputs():
    x, t, context = inputs(SMALL)
    mask = torch.ones(2, 5, dtype=torch.bool)
    return {
        r"x: got shape \(2, 3, 8, 8\), expected \(b c h w\), c=4": ((x[:, :3], t, context), {}),
        "height 7 and width 8, expected positive multiples of 2": ((x[:, :, :7], t, context), {}),
        "height 8 and width 5": ((x[..., :5], t, context), {}),
        r"t: got shape \(1,\), expected \(b\), b=2": ((x, t[:1], context), {}),
        r"t: got shape \(\)": ((x, t[0], context), {}),
        "context: got nothing, expected width 24": ((x, t), {}),
        r"context: got shape \(2, 5, 23\)": ((x, t, context[..., :23]), {}),
        r"context: got shape \(1, 5, 24\)": ((x, t, context[:1]), {}),
        r"c: got \(2, 8\), expected nothing": ((x, t, context), {"c": torch.zeros(2, 8)}),
        r"context_mask: got shape \(2, 4\)": ((x, t, context), {"context_mask": mask[:, :4]}),
        "context_mask: got dtype torch.int64": ((x, t, context), {"context_mask": mask.long()}),
        r"context: got shape \(2, 5, 24\), expected \(b n d\), b=4": ((x, t, context), {"contexts": 2}),
        r"context: got shape \(4, 5, 24\), expected \(b n d\), b=2": ((x, t, context.repeat(2, 1, 1)), {}),
        r"context_mask: got shape \(2, 5\), expected \(b n\), b=4": ((x, t, context.repeat(2, 1, 1)), {"context_mask": mask, "contexts": 2}),
        "contexts: got 0, expected at least 1": ((x, t, context), {"contexts": 0}),
        "contexts: got '2', expected at least 1, an integer": ((x, t, context), {"contexts": "2"}),
        "t: got dtype torch.bool, expected steps from 0": ((x, t > 0, context), {}),
    }


def test_a_config_is_the_same_however_its_numbers_came():
    plain = UNetConfig(4, 4, 32, (1, 2), 1, (2,), num_groups=8, cross_levels=(1,), context_dim=8)
    other = UNetConfig(np.int64(4), torch.tensor(4), 32, [1, np.int32(2)], 1, [2], num_groups=8, cross_levels=[1], context_dim=8)
    assert other == plain and hash(other) == hash(plain) and json.dumps(other.to_dict()) == json.dumps(plain.to_dict())
    assert UNetConfig.from_dict(json.loads(json.dumps(other.to_dict()))) == plain


@pytest.mark.parametrize("message", bad_inputs())
def test_bad_inputs_are_refused_with_numbers(message):
    args, kwargs = bad_inputs()[message]
    with pytest.raises(ValueError, match=message):
        UNet(SMALL)(*args, **kwargs)


def test_context_without_context_dim_is_refused():
    unet, (x, t, _) = UNet(SMALL.replace(context_dim=None)), inputs(SMALL)
    with pytest.raises(ValueError, match="expected nothing"):
        unet(x, t, torch.zeros(2, 5, 24))
    with pytest.raises(ValueError, match="without a context"):
        unet(x, t, None, torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="contexts: got 2 without a context, expected 1"):
        unet(x, t, contexts=2)


def test_new_networks_predict_zero_and_their_residual_branches_are_silent():
    unet = UNet(SMALL)
    assert torch.equal(unet(*inputs(SMALL)), torch.zeros(2, 4, 8, 8))
    res = ResBlock(32, 32, 128, num_groups=8)
    x, emb = torch.randn(2, 32, 4, 4), torch.randn(2, 128)
    assert torch.equal(res(x, emb), x)


@pytest.mark.parametrize("changes", [{}, {"use_scale_shift_norm": True}, {"resblock_updown": True}, {"c_dim": 6},
                                     {"context_dim": None}, {"cross_levels": (2,)}, {"transformer_depth": 2}])
def test_every_parameter_gets_a_gradient(changes):
    config = SMALL.replace(**changes)
    unet = randomise(UNet(config))
    x, t, context = inputs(config)
    c = torch.randn(2, 6) if config.c_dim else None
    unet(x, t, context, c=c).pow(2).mean().backward()
    for name, parameter in unet.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("kwargs", [{}, {"scale_shift": True}, {"resample": "down"}, {"resample": "up"}])
def test_residual_block_gradients_in_float64(kwargs):
    res = randomise(ResBlock(4, 6, 5, num_groups=2, **kwargs)).double()
    x = torch.randn(2, 4, 4, 4, dtype=torch.float64, requires_grad=True)
    emb = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(res, (x, emb))


def test_time_context_mask_and_c_reach_the_output():
    config = SMALL.replace(c_dim=6)
    unet = randomise(UNet(config)).eval()
    x, t, context = inputs(config)
    mask, c = torch.ones(2, 5, dtype=torch.bool), torch.randn(2, 6)
    fewer = mask.clone()
    fewer[1, 3:] = False
    with torch.no_grad():
        base = unet(x, t, context, mask, c)
        assert torch.allclose(base, unet(x, t, context, None, c), atol=1e-5)
        for other in (unet(x, t + 50, context, mask, c), unet(x, t, context + 1, mask, c), unet(x, t, context, mask, c + 1)):
            assert (other - base).abs().max() > 1e-3
        masked = unet(x, t, context, fewer, c)
        assert torch.allclose(masked[0], base[0], atol=1e-5)
        assert (masked[1] - base[1]).abs().max() > 1e-4
        changed = context.clone()
        changed[1, 3:] = 1e3  # padding may hold anything
        assert torch.allclose(unet(x, t, changed, fewer, c), masked, atol=1e-5)


@pytest.mark.parametrize("changes, shared", [
    ({}, 2), ({"attention_levels": (2,)}, 4), ({"attention_levels": ()}, 5), ({"cross_levels": (2,)}, 4), ({"cross_levels": ()}, 10),
    ({"c_dim": 6}, 2), ({"transformer_depth": 2, "use_scale_shift_norm": True}, 2), ({"resblock_updown": True, "attention_levels": (2,)}, 4)])
def test_contexts_of_a_picture_share_what_comes_before_they_are_read(changes, shared):
    config = SMALL.replace(**changes)
    unet = randomise(UNet(config)).eval()
    x, t, _ = inputs(config)
    context, mask = torch.randn(6, 5, 24, generator=torch.Generator().manual_seed(2)), torch.ones(6, 5, dtype=torch.bool)
    mask[4, 2:] = False
    c, rows = torch.randn(2, 6) if config.c_dim else None, []
    twice = lambda y: None if y is None else torch.cat([y, y, y])
    for layer in (unet.conv_in, *(stage.res or stage.resample for stage in (*unet.down, *unet.mid, *unet.up))):
        layer.register_forward_hook(lambda _, inputs, output: rows.append(len(inputs[0])))
    with torch.no_grad():
        together = unet(x, t, context, mask, c, contexts=3)
        assert rows == [2] * shared + [6] * (10 - shared)
        repeated = unet(twice(x), twice(t), context, mask, twice(c))
        assert together.shape == (6, 4, 8, 8)
        assert torch.allclose(together, repeated, atol=1e-5)
        if shared < 10:
            assert (together[:2] - together[2:4]).abs().max() > 1e-3, "the contexts show"
            assert torch.allclose(together[2:4], unet(x, t, context[2:4], mask[2:4], c), atol=1e-5)


@pytest.mark.parametrize("attention_levels", [(1, 2), (2,)])
def test_channels_last_stay_last_where_contexts_part(attention_levels):
    """A layout that is lost where one picture becomes two costs more than sharing brings."""
    unet = randomise(UNet(SMALL.replace(attention_levels=attention_levels))).eval().to(memory_format=torch.channels_last)
    x, t, context = inputs(SMALL, b=4)
    x, lost = x[:2].contiguous(memory_format=torch.channels_last), []
    for name, layer in unet.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.GroupNorm)):
            layer.register_forward_pre_hook(lambda layer, given, name=name: lost.append(name) if not given[0].is_contiguous(memory_format=torch.channels_last) else None)
    with torch.no_grad():
        unet(x, t[:2], context, contexts=2)
    assert not lost


def test_shared_contexts_teach_what_repeated_pictures_teach():
    gradients = []
    for k, checkpointing in ((1, False), (2, False), (2, True)):
        unet, (x, t, context) = randomise(UNet(SMALL)), inputs(SMALL, b=4)
        unet.gradient_checkpointing = checkpointing
        unet(x[:2].repeat(3 - k, 1, 1, 1), t[:2].repeat(3 - k), context, contexts=k).pow(2).mean().backward()
        gradients.append([p.grad.clone() for p in unet.parameters()])
    for other in gradients[1:]:
        for one, two in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-4)


def test_all_padding_is_finite_and_backward_is_finite():
    unet = randomise(UNet(SMALL))
    x, t, context = inputs(SMALL)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0] = False
    out = unet(x, t, context, mask)
    out.pow(2).mean().backward()
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(p.grad).all() for p in unet.parameters())


def test_samples_do_not_see_their_neighbours():
    unet = randomise(UNet(SMALL)).eval()
    x, t, context = inputs(SMALL, b=3)
    with torch.no_grad():
        together = unet(x, t, context)
        for i in range(3):
            assert torch.allclose(unet(x[i : i + 1], t[i : i + 1], context[i : i + 1]), together[i : i + 1], atol=1e-5)


@pytest.mark.parametrize("size", [(8, 8), (16, 8), (6, 14)])
def test_any_size_that_fits_the_factor(size):
    assert UNet(SMALL)(*inputs(SMALL, size)).shape == (2, 4, *size)


def test_bfloat16_weights_and_autocast_stay_close():
    unet = randomise(UNet(SMALL)).eval()
    x, t, context = inputs(SMALL)
    with torch.no_grad():
        exact = unet(x, t, context)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = unet(x, t, context)
        low = unet.bfloat16()(x.bfloat16(), t, context.bfloat16())
    assert mixed.dtype == low.dtype == torch.bfloat16
    for other in (mixed, low):
        assert (other.float() - exact).pow(2).mean().sqrt() < 0.05 * exact.std()


def test_bfloat16_autocast_trains():
    unet = randomise(UNet(SMALL))
    x, t, context = inputs(SMALL)
    with torch.autocast("cpu", torch.bfloat16):
        out = unet(x, t, context)
    out.float().pow(2).mean().backward()
    assert all(p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in unet.parameters())


def test_gradient_checkpointing_changes_nothing():
    unet = randomise(UNet(SMALL.replace(dropout=0.1)))
    gradients = []
    for flag in (False, True):
        unet.gradient_checkpointing = flag
        unet.zero_grad()
        torch.manual_seed(0)
        unet(*inputs(SMALL)).pow(2).mean().backward()
        gradients.append([p.grad.clone() for p in unet.parameters()])
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other)


def test_dropout_only_in_training():
    unet = randomise(UNet(SMALL.replace(dropout=0.5)))
    assert not torch.equal(unet(*inputs(SMALL)), unet(*inputs(SMALL)))
    unet.eval()
    assert torch.equal(unet(*inputs(SMALL)), unet(*inputs(SMALL)))


def test_state_dict_round_trip_and_inputs_left_alone():
    unet = randomise(UNet(SMALL)).eval()
    again = UNet(UNetConfig.from_dict(unet.config.to_dict())).eval()
    again.load_state_dict(unet.state_dict())
    x, t, context = inputs(SMALL)
    copies = x.clone(), t.clone(), context.clone()
    with torch.no_grad():
        assert torch.equal(unet(x, t, context), again(x, t, context))
    assert all(torch.equal(a, b) for a, b in zip((x, t, context), copies))


def test_timestep_embedding_against_the_formula():
    t = torch.tensor([0, 1, 37, 999])
    emb = timestep_embedding(t, 8)
    assert emb.shape == (4, 8) and emb.dtype == torch.float32
    for i, step in enumerate(t.tolist()):
        for k in range(4):
            angle = torch.tensor(step / 10_000 ** (k / 4), dtype=torch.float64)
            assert abs(emb[i, k].item() - angle.cos().item()) < 1e-4
            assert abs(emb[i, 4 + k].item() - angle.sin().item()) < 1e-4
    with pytest.raises(ValueError, match="got 7"):
        timestep_embedding(t, 7)
    assert torch.equal(timestep_embedding(t.to(torch.int32), 8), emb)


def test_downsample_pads_symmetrically_and_upsample_repeats():
    down, up = Downsample(1), Upsample(1)
    for layer in (down, up):
        nn.init.zeros_(layer.conv.bias)
        nn.init.zeros_(layer.conv.weight)
        layer.conv.weight.data[0, 0, 1, 1] = 1.0  # the kernel's centre alone: what position does it read?
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert torch.equal(down(x), x[:, :, ::2, ::2])
    assert torch.equal(up(x), x.repeat_interleave(2, 2).repeat_interleave(2, 3))
