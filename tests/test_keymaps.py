"""Other people's names: every map is one to one, reads strictly, tells all faults at once, and gives networks that agree."""
import re

import pytest
import torch
from diffusers_maps import randomise

from ldm_edu import keymaps as K
from ldm_edu.autoencoder import AUTOENCODERS, AutoencoderConfig, AutoencoderKL
from ldm_edu.quantize import AutoencoderVQ
from ldm_edu.unet import UNETS, UNet, UNetConfig

CONFIGS = {
    "text": UNetConfig(4, 4, 32, (1, 2), 1, (2,), heads=2, context_dim=16, num_groups=8),
    "deep": UNetConfig(4, 4, 32, (1, 2, 2), 2, (1, 4), head_dim=16, context_dim=16, num_groups=8, transformer_depth=2),
    "plain": UNetConfig(4, 4, 32, (1, 2), 1, (2,), head_dim=8, num_groups=8),
    "pooling": UNetConfig(4, 4, 32, (1, 2), 2, (1, 2), heads=4, num_groups=8, use_scale_shift_norm=True, resblock_updown=True),
    "one level": UNetConfig(3, 3, 32, (1,), 1, (), heads=2, num_groups=8),
}
STAGES = {"kl": AutoencoderConfig(3, 32, (1, 2, 2), 1, (2, 4), num_groups=8), "no attention": AutoencoderConfig(3, 32, (1, 2), 1, mid_attention=False, num_groups=8),
          "vq": AutoencoderConfig(3, 32, (1, 2), 1, double_z=False, codes=16, num_groups=8), "averaged vq": AutoencoderConfig(3, 32, (1,), 1, double_z=False, codes=8, num_groups=8, codebook_decay=0.9)}


def make_stage(name):
    config = STAGES[name]
    return randomise((AutoencoderVQ if config.codes else AutoencoderKL)(config))


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("layout", K.LAYOUTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_unet_there_and_back_bit_for_bit(name, layout, linear):
    net = randomise(UNet(CONFIGS[name]))
    entries = K.unet_entries(net, layout, linear)
    K.check_bijective(entries)
    assert [e.ours for e in entries] == list(net.state_dict())
    other = UNet(CONFIGS[name])  # what the map forgets would differ
    back = K.to_ours(entries, K.from_ours(entries, net.state_dict()), other)
    assert all(torch.equal(back[key], x) for key, x in net.state_dict().items())
    other.load_state_dict(back, strict=True)


@pytest.mark.parametrize("layout", K.LAYOUTS)
@pytest.mark.parametrize("name", STAGES)
def test_first_stage_there_and_back_bit_for_bit(name, layout):
    stage = make_stage(name)
    entries = K.first_stage_entries(stage, layout)
    K.check_bijective(entries)
    state = K.from_ours(entries, stage.state_dict())
    other = type(stage)(STAGES[name])
    back = K.to_ours(entries, state, other)
    assert back.keys() == stage.state_dict().keys()
    assert all(torch.equal(back[key], x) for key, x in stage.state_dict().items() if not key.startswith("quantize.average"))
    other.load_state_dict(back, strict=True)
    assert not any(key.startswith("quantize.average") for key in state)


@pytest.mark.parametrize(("name", "keys"), [("sd-v1", 686), ("txt2img-1p4B", 686), ("lsun-churches256", None), ("cin256", None), ("inpainting-big", None), ("bsr-sr", None)])
def test_published_unets_map_one_to_one_in_both_layouts(name, keys):
    with torch.device("meta"):
        net = UNet(UNETS[name])
        maps = {layout: K.unet_entries(net, layout) for layout in K.LAYOUTS}
        states = [K.from_ours(entries, net.state_dict()) for entries in maps.values()]
    for entries in maps.values():
        K.check_bijective(entries)
    assert keys is None or [len(state) for state in states] == [keys, keys]
    assert sum(x.numel() for x in states[0].values()) == sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(("name", "keys"), [("kl-f8", 248), ("vq-f4", 205)])
def test_published_first_stages_have_the_known_number_of_tensors(name, keys):
    config = AUTOENCODERS[name]
    with torch.device("meta"):
        stage = (AutoencoderVQ if config.codes else AutoencoderKL)(config)
    assert len(K.first_stage_entries(stage, "diffusers")) == len(K.first_stage_entries(stage)) == keys


def test_original_names_of_stable_diffusion():
    """Places that the released files are known to have: downsamplings, and upsamplings behind attention and without."""
    with torch.device("meta"):
        names = {name for entry in K.unet_entries(UNet(UNETS["sd-v1"])) for name in entry.theirs}
    assert {n for n in names if re.search(r"\.op\.weight$", n)} == {f"input_blocks.{i}.0.op.weight" for i in (3, 6, 9)}
    assert {n for n in names if n.endswith(".conv.weight")} == {"output_blocks.2.1.conv.weight", "output_blocks.5.2.conv.weight", "output_blocks.8.2.conv.weight"}
    attended = {int(m[1]) for n in names if (m := re.match(r"input_blocks\.(\d+)\.1\.norm", n))}
    assert attended == {1, 2, 4, 5, 7, 8} and "middle_block.1.transformer_blocks.0.attn2.to_k.weight" in names


def test_names_of_first_stages_in_diffusers():
    """Its way up counts from the lowest resolution, ours (and the original's) from the highest."""
    names = {entry.ours: entry.theirs[0] for entry in K.first_stage_entries(make_stage("kl"), "diffusers")}
    expected = {
        "decoder.up.0.block.1.conv1.weight": "decoder.up_blocks.2.resnets.1.conv1.weight", "decoder.up.2.upsample.conv.bias": "decoder.up_blocks.0.upsamplers.0.conv.bias",
        "encoder.down.1.attn.0.q.weight": "encoder.down_blocks.1.attentions.0.to_q.weight", "encoder.mid.attn_1.proj_out.bias": "encoder.mid_block.attentions.0.to_out.0.bias",
        "encoder.down.1.block.0.nin_shortcut.weight": "encoder.down_blocks.1.resnets.0.conv_shortcut.weight", "encoder.norm_out.weight": "encoder.conv_norm_out.weight",
        "decoder.mid.block_2.norm1.weight": "decoder.mid_block.resnets.1.norm1.weight", "post_quant_conv.weight": "post_quant_conv.weight",
    }
    assert {name: names.get(name) for name in expected} == expected


def test_projections_are_read_as_matrices_and_as_convolutions():
    net = randomise(UNet(CONFIGS["text"]))
    for written in (False, True):
        state = K.from_ours(K.unet_entries(net, linear=written), net.state_dict())
        assert state["middle_block.1.proj_in.weight"].ndim == (2 if written else 4)
        for read in (False, True):
            back = K.to_ours(K.unet_entries(net, linear=read), state, net)
            assert torch.equal(back["mid.0.attention.proj_in.weight"], net.state_dict()["mid.0.attention.proj_in.weight"])


def test_names_that_diffusers_used_before():
    stage = make_stage("kl")
    state = K.from_ours(K.first_stage_entries(stage, "diffusers"), stage.state_dict())
    old = dict(state)
    for new, before in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        old = {name.replace(f".{new}.", f".{before}."): x for name, x in old.items()}
    read = K.newest_names(old)
    assert any(".proj_attn." in name for name in old) and read.keys() == state.keys()
    odd = [name for name, x in state.items() if not torch.equal(read[name], x)]
    assert not odd, f"{odd} hold another tensor under today's names"


def test_a_joined_layer_computes_what_its_released_parts_do():
    """Self- and cross-attention from the released matrices, by hand: four products, one softmax for each head."""
    net = randomise(UNet(CONFIGS["text"]))
    block, heads, d = net.mid[0].attention.blocks[0], 2, 32
    state = K.from_ours(K.unet_entries(net), net.state_dict())
    tokens, context = (torch.randn(1, n, width, generator=torch.Generator().manual_seed(n)) for n, width in ((5, 64), (3, 16)))
    for name, layer, read, inputs in (("attn1", block.self_attention, tokens, (tokens,)), ("attn2", block.cross_attention, context, (tokens, context))):
        part = {key: state[f"middle_block.1.transformer_blocks.0.{name}.to_{key}.weight"] for key in "qkv"}
        out = state[f"middle_block.1.transformer_blocks.0.{name}.to_out.0.weight"], state[f"middle_block.1.transformer_blocks.0.{name}.to_out.0.bias"]
        q, k, v = tokens[0] @ part["q"].T, read[0] @ part["k"].T, read[0] @ part["v"].T
        rows = [slice(i * d, (i + 1) * d) for i in range(heads)]
        by_head = [(q[:, r] @ k[:, r].T / d**0.5).softmax(-1) @ v[:, r] for r in rows]
        torch.testing.assert_close(layer(*inputs)[0], torch.cat(by_head, 1) @ out[0].T + out[1], atol=1e-5, rtol=1e-5)


def test_plain_attention_is_read_in_the_order_of_its_rows():
    """The original sorts rows by head, then query, key, value."""
    net = randomise(UNet(CONFIGS["plain"]))
    width, heads = 64, 8
    rows = net.state_dict()["mid.0.attention.qkv.weight"]
    theirs = K.from_ours(K.unet_entries(net), net.state_dict())["middle_block.1.qkv.weight"]
    assert theirs.shape == (3 * width, width, 1)
    d = width // heads
    for head in range(heads):
        for kind in range(3):
            start = (head * 3 + kind) * d
            assert torch.equal(theirs[start : start + d, :, 0], rows[kind * width + head * d : kind * width + (head + 1) * d])


def test_all_faults_are_told_at_once():
    net = UNet(CONFIGS["text"])
    entries = K.unet_entries(net)
    state = K.from_ours(entries, net.state_dict())
    state |= {"extra": torch.zeros(1), "out.2.weight": torch.zeros(3, 3)}
    del state["out.0.bias"]
    with pytest.raises(ValueError) as err:
        K.to_ours(entries, state, net, "model.ckpt")
    assert all(part in str(err.value) for part in ("model.ckpt", "3 faults", "missing out.0.bias", "unexpected extra", "out.2.weight: got (3, 3), expected (4, 32, 3, 3)"))
    with pytest.raises(ValueError, match="another layout"):
        K.to_ours(entries, K.from_ours(K.unet_entries(net, "diffusers"), net.state_dict()), net)


def test_a_map_with_holes_is_refused():
    net = UNet(CONFIGS["plain"])
    entries = K.unet_entries(net)[:40]
    with pytest.raises(ValueError, match="no entry for 88 tensors of UNet"):
        K.to_ours(entries, K.from_ours(entries, net.state_dict()), net)


def test_a_pixel_s_convolution_comes_as_a_matrix_and_fits():
    net = randomise(UNet(CONFIGS["text"]))
    entries = K.unet_entries(net)
    state = K.from_ours(entries, net.state_dict())
    name = next(name for name in state if name.endswith("skip_connection.weight"))
    net.load_state_dict(K.to_ours(entries, {**state, name: state[name][:, :, 0, 0]}, net), strict=True)


def test_half_precision_is_read_into_the_network_s_type():
    net = randomise(UNet(CONFIGS["text"]))
    entries = K.unet_entries(net)
    half = {name: x.half() for name, x in K.from_ours(entries, net.state_dict()).items()}
    back = K.to_ours(entries, half, net)
    assert {x.dtype for x in back.values()} == {torch.float32}
    assert all(torch.equal(back[e.ours], net.state_dict()[e.ours].half().float()) for e in entries)


def test_what_a_layout_cannot_say_is_refused():
    for changes in ({"c_dim": 8}, {"cross_levels": (2,)}):
        with pytest.raises(ValueError, match="no names"):
            K.unet_entries(UNet(CONFIGS["text"].replace(**changes)))
    with pytest.raises(ValueError, match="layout"):
        K.unet_entries(UNet(CONFIGS["text"]), "other")
    with pytest.raises(ValueError, match="layout"):
        K.first_stage_entries(make_stage("kl"), "other")
    with pytest.raises(ValueError, match="more than once"):
        K.check_bijective([K.Entry("a", ("x",)), K.Entry("b", ("x",))])
    with pytest.raises(ValueError, match="more than once"):
        K.check_bijective([K.Entry("a", ("x",)), K.Entry("a", ("y",))])
