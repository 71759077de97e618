"""Small models at random weights, a tiny CLIP, and files in the original's layout, for tests of reading and writing (no diffusers needed)."""
import torch
from diffusers_maps import randomise

from ldm_edu import ldm as L
from ldm_edu import weights as W
from ldm_edu.autoencoder import AutoencoderConfig
from ldm_edu.clip_text import ClipText, ClipTextConfig, ClipTokenizer
from ldm_edu.frozen_text import save_clip
from ldm_edu.unet import UNetConfig

PIECES = [*"abcdefghijklmnopqrstuvwxyz", *(c + "</w>" for c in "abcdefghijklmnopqrstuvwxyz"), "re", "red</w>", ClipTokenizer.start, ClipTokenizer.end]
PROMPTS = ["a red circle", "blue"]
KL = AutoencoderConfig(4, 16, (1, 2), 1, num_groups=8)
VQ = AutoencoderConfig(3, 16, (1, 2), 1, (2,), num_groups=8, double_z=False, codes=8)


def text_unet(**changes):
    return UNetConfig(4, 4, 32, (1, 2), 1, (1,), **{"heads": 4, "context_dim": 32, "num_groups": 8, **changes})


def write_clip(folder, words=None, seed=0, width=32):
    """A small CLIP text encoder and its tokenizer in a folder."""
    torch.manual_seed(seed)
    encoder = randomise(ClipText(ClipTextConfig(len(PIECES), width, 2, 4, 2 * width, 24)), seed)
    save_clip(encoder, ClipTokenizer.from_merges({piece: i for i, piece in enumerate(PIECES)}, [("r", "e"), ("re", "d</w>")]), folder, words)
    return folder


def make(stage=KL, unet=None, conditioner=None, seed=0, **changes):
    """A model at random weights, the zero-initialised ones included."""
    unet = unet or UNetConfig(stage.z_channels, stage.z_channels, 32, (1, 2), 1, (2,), head_dim=8, num_groups=8)
    config = L.LDMConfig(stage, unet, conditioner or {"name": "none"}, **{"image_size": 16, "scale_factor": 0.7, **changes})
    torch.manual_seed(0)
    model = L.build(config)
    model.config = config.replace(conditioner=model.net.conditioner.to_dict())
    return randomise(model, seed).eval()


def text_model(clip, **changes):
    return make(unet=text_unet(), conditioner={"name": "frozen-text", "config": {"model": str(clip), "max_length": 24}}, guidance_scale=7.5, **changes)


def same_weights(one, other) -> bool:
    """Whether two modules hold the same bits under the same names."""
    theirs = other.state_dict()
    return one.state_dict().keys() == theirs.keys() and all(torch.equal(x, theirs[name]) and x.dtype == theirs[name].dtype for name, x in one.state_dict().items())


def compvis_file(model, path, **more):
    """The model's tensors in the original's layout, as a Lightning checkpoint."""
    torch.save({"state_dict": {**W.compvis_state(model), **more}, "epoch": 1}, path)
    return path
