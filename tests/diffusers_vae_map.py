"""First stages of diffusers with our weights: AutoencoderKL and VQModel."""
import torch
from diffusers import AutoencoderKL as Reference
from diffusers import VQModel as VQReference

from ldm_edu.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm_edu.keymaps import first_stage_entries, from_ours
from ldm_edu.quantize import AutoencoderVQ


def to_reference(model: AutoencoderKL | AutoencoderVQ) -> dict[str, torch.Tensor]:
    """Our state dict under diffusers' names; the 1x1 convolutions of attention become matrices."""
    return from_ours(first_stage_entries(model, "diffusers"), model.state_dict())


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
