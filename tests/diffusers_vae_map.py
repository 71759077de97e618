"""Names and shapes of a first stage's weights in diffusers' AutoencoderKL and VQModel."""
import re

import torch
from diffusers import AutoencoderKL as Reference
from diffusers import VQModel as VQReference

from ldm_edu.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm_edu.quantize import AutoencoderVQ

ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def reference_name(name: str, levels: int) -> str:
    """Our parameter name -> diffusers'."""
    name = re.sub(r"up\.(\d+)\.", lambda m: f"up_blocks.{levels - 1 - int(m[1])}.", name)
    name = re.sub(r"down\.(\d+)\.", r"down_blocks.\1.", name)
    name = re.sub(r"\.block\.(\d+)\.", r".resnets.\1.", name)
    name = name.replace(".downsample.", ".downsamplers.0.").replace(".upsample.", ".upsamplers.0.")
    name = name.replace("mid.block_1", "mid_block.resnets.0").replace("mid.block_2", "mid_block.resnets.1")
    name = name.replace("norm_out", "conv_norm_out").replace("nin_shortcut", "conv_shortcut")
    attention = re.fullmatch(r"(.*)\.(?:attn_1|attn\.(\d+))\.(\w+)\.(weight|bias)", name)
    if attention:
        place, index, layer, kind = attention.groups()
        place = "mid_block".join(place.rsplit("mid", 1)) if index is None else place
        return f"{place}.attentions.{index or 0}.{ATTENTION[layer]}.{kind}"
    return name


def to_reference(model: AutoencoderKL | AutoencoderVQ) -> dict[str, torch.Tensor]:
    """Our state dict under diffusers' names; the 1x1 convolutions of attention become matrices."""
    levels, result = len(model.config.ch_mult), {}
    for name, value in model.state_dict().items():
        if re.search(r"attn.*\.(q|k|v|proj_out)\.weight$", name):
            value = value[:, :, 0, 0]
        result[reference_name(name, levels)] = value
    return result


def architecture(config: AutoencoderConfig) -> dict:
    """What both reference classes are told of a first stage's architecture."""
    kinds = [2**i in config.attention_levels for i in range(len(config.ch_mult))]
    return {
        "in_channels": config.in_channels,
        "out_channels": config.in_channels,
        "latent_channels": config.z_channels,
        "block_out_channels": config.widths,
        "layers_per_block": config.num_res_blocks,
        "norm_num_groups": config.num_groups,
        "mid_block_add_attention": config.mid_attention,
        "down_block_types": tuple("AttnDownEncoderBlock2D" if k else "DownEncoderBlock2D" for k in kinds),
        "up_block_types": tuple("AttnUpDecoderBlock2D" if k else "UpDecoderBlock2D" for k in reversed(kinds)),
    }


def make_reference(config: AutoencoderConfig) -> Reference:
    """diffusers' model of the same architecture, freshly initialised."""
    return Reference(**architecture(config))


def make_vq_reference(config: AutoencoderConfig, **options) -> VQReference:
    """diffusers' VQ model of the same architecture, freshly initialised; `to_reference` maps its weights too."""
    return VQReference(**architecture(config), num_vq_embeddings=config.codes, **options)
