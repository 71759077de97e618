"""Networks of diffusers with our UNet's weights, for parity tests at random weights (never imported by the library)."""
import torch
from torch import Tensor, nn

from ldm_edu.keymaps import from_ours, unet_entries


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fill every parameter, the zero-initialised ones included, with values that keep activations near one."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.ndim > 1:
            value = noise / parameter[0].numel() ** 0.5
        else:  # norms' scales near one, biases near zero
            value = 0.1 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
        parameter.data.copy_(value)
    return model


def to_diffusers(unet: nn.Module, linear: bool = False) -> dict[str, Tensor]:
    """Our state dict under diffusers' names: UNet2DConditionModel, or UNet2DModel without context."""
    return from_ours(unet_entries(unet, "diffusers", linear), unet.state_dict())


def diffusers_unet(unet, linear: bool = False):
    """A diffusers network of the same architecture holding the same weights, in eval mode; loading is strict."""
    from diffusers import UNet2DConditionModel, UNet2DModel

    config = unet.config
    widths = tuple(config.model_channels * m for m in config.ch_mult)
    attention = [factor in config.attention_levels for factor in config.factors]
    common = {
        "sample_size": 8, "in_channels": config.in_channels, "out_channels": config.out_channels,
        "block_out_channels": widths, "layers_per_block": config.num_res_blocks, "norm_num_groups": config.num_groups,
        "norm_eps": 1e-5, "flip_sin_to_cos": True, "freq_shift": 0, "downsample_padding": 1,
        "resnet_time_scale_shift": "scale_shift" if config.use_scale_shift_norm else "default",
    }
    plain = config.context_dim is None
    if plain:
        kind = "resnet" if config.resblock_updown else "conv"
        theirs = UNet2DModel(
            **common, downsample_type=kind, upsample_type=kind, attn_norm_num_groups=config.num_groups,
            attention_head_dim=config.head_dim or widths[-1] // config.heads,
            down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attention),
            up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in attention[::-1]))
    else:
        heads = tuple(config.heads or w // config.head_dim for w in widths)
        theirs = UNet2DConditionModel(
            **common, cross_attention_dim=config.context_dim, attention_head_dim=heads,
            transformer_layers_per_block=config.transformer_depth, use_linear_projection=linear,
            down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention),
            up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in attention[::-1]))
    theirs.load_state_dict({k: torch.clone(v) for k, v in to_diffusers(unet, linear).items()}, strict=True)
    return theirs.eval()
