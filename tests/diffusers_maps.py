"""Maps our UNet's weights onto diffusers' networks, for parity tests at random weights (never imported by the library)."""
import torch
from torch import Tensor, nn


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


def _res(weights: dict[str, Tensor], ours: str, theirs: str) -> dict[str, Tensor]:
    names = {"norm1": "norm1", "conv1": "conv1", "time": "time_emb_proj", "norm2": "norm2", "conv2": "conv2",
             "shortcut": "conv_shortcut"}
    return {f"{theirs}.{names[k.split('.')[0]]}.{k.split('.')[1]}": v for k, v in _under(weights, ours).items()}


def _under(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k[len(prefix) + 1 :]: v for k, v in weights.items() if k.startswith(prefix + ".")}


def _transformer(weights: dict[str, Tensor], ours: str, theirs: str, linear: bool) -> dict[str, Tensor]:
    out = {}
    for key, value in _under(weights, ours).items():
        head, _, rest = key.partition(".")
        if head in ("norm", "proj_in", "proj_out"):
            conv = head != "norm" and rest == "weight" and not linear
            out[f"{theirs}.{key}"] = value[:, :, None, None] if conv else value
            continue
        depth, part, rest = rest.split(".", 2)
        block = f"{theirs}.transformer_blocks.{depth}"
        if part.startswith("norm_"):
            out[f"{block}.norm{('self', 'cross', 'ff').index(part[5:]) + 1}.{rest}"] = value
        elif part == "feed_forward":
            layer, kind = rest.split(".")
            out[f"{block}.ff.net.{'0.proj' if layer == 'widen' else '2'}.{kind}"] = value
        else:
            attention = f"{block}.attn{1 if part == 'self_attention' else 2}"
            layer, kind = rest.split(".")
            if layer == "to_out":
                out[f"{attention}.to_out.0.{kind}"] = value
            else:
                letters = layer.removeprefix("to_")
                for letter, piece in zip(letters, value.chunk(len(letters))):
                    out[f"{attention}.to_{letter}.{kind}"] = piece
    return out


def _block_attention(weights: dict[str, Tensor], ours: str, theirs: str) -> dict[str, Tensor]:
    out = {}
    for key, value in _under(weights, ours).items():
        layer, kind = key.split(".")
        if layer == "qkv":
            out.update({f"{theirs}.to_{n}.{kind}": piece for n, piece in zip("qkv", value.chunk(3))})
        else:
            out[f"{theirs}.{'group_norm' if layer == 'norm' else 'to_out.0'}.{kind}"] = value
    return out


def _stage(weights, ours, block, index, plain, linear) -> dict[str, Tensor]:
    """One of our stages: resnets.i, attentions.i, and a down- or upsampler of the same diffusers block."""
    side = "downsamplers" if block.startswith("down") else "upsamplers"
    out = _res(weights, f"{ours}.res", f"{block}.resnets.{index}")
    if plain:
        out |= _block_attention(weights, f"{ours}.attention", f"{block}.attentions.{index}")
    else:
        out |= _transformer(weights, f"{ours}.attention", f"{block}.attentions.{index}", linear)
    inner = _under(weights, f"{ours}.resample")
    if "norm1.weight" in inner:
        out |= _res(weights, f"{ours}.resample", f"{block}.{side}.0")
    else:
        out |= {f"{block}.{side}.0.{k}": v for k, v in inner.items()}
    return out


def to_diffusers(unet, plain: bool = False, linear: bool = False) -> dict[str, Tensor]:
    """Our state dict under diffusers' names: UNet2DConditionModel, or UNet2DModel with `plain` attention blocks."""
    weights, per_level = unet.state_dict(), unet.config.num_res_blocks + 1
    out = {}
    for ours, theirs in (("time_mlp.0", "time_embedding.linear_1"), ("time_mlp.2", "time_embedding.linear_2"),
                         ("conv_in", "conv_in"), ("norm_out", "conv_norm_out"), ("conv_out", "conv_out")):
        out |= {f"{theirs}.{k}": v for k, v in _under(weights, ours).items()}
    for i in range(len(unet.down)):
        block, index = divmod(i, per_level)
        out |= _stage(weights, f"down.{i}", f"down_blocks.{block}", index, plain, linear)
    for i in range(len(unet.up)):
        block, index = divmod(i, per_level)
        out |= _stage(weights, f"up.{i}", f"up_blocks.{block}", index, plain, linear)
    for i in range(2):
        out |= _stage(weights, f"mid.{i}", "mid_block", i, plain, linear)
    return out


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
    theirs.load_state_dict({k: torch.clone(v) for k, v in to_diffusers(unet, plain, linear).items()}, strict=True)
    return theirs.eval()
