"""What configs of others mean, by hand: heads, factors, predictions, none of which any tensor's shape would show."""
import json

import pytest
import torch
from weights_toy import KL, VQ, make, text_unet

from ldm_edu import foreign_configs as F
from ldm_edu import weights as W
from ldm_edu.attention import CrossAttention
from ldm_edu.unet import UNet, UNetConfig


@pytest.mark.parametrize("said, widths, plain, heads", [
    (8, (320, 640, 1280), False, (8, 8, 8)), ([5, 10, 20], (320, 640, 1280), False, (5, 10, 20)), ([8, 8, 8], (320, 640, 1280), False, (8, 8, 8)),
    (8, (320, 640, 1280), True, (40, 80, 160)), (None, (320, 640), True, (1, 1)),
])
def test_attention_head_dim_by_hand(said, widths, plain, heads):
    """Heads where there is a context, channels per head where there is none."""
    read = F.heads_of({"attention_head_dim": said, "block_out_channels": list(widths)}, plain)
    assert tuple(read.get("heads") or width // read["head_dim"] for width in widths) == heads


def test_a_network_has_the_heads_that_its_config_says():
    """The number of heads of every layer that is built from Stable Diffusion's way of saying it."""
    said = {**F.unet_values(text_unet(), 8), "attention_head_dim": 4}
    layers = [layer for layer in UNet(F.unet_config(said)).modules() if isinstance(layer, CrossAttention)]
    assert len(layers) == 4 and {layer.heads for layer in layers} == {4}


def test_predictions_and_schedules_by_hand():
    base = {"beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012}
    for theirs, ours in (("epsilon", "eps"), ("v_prediction", "v"), ("sample", "x0")):
        assert F.schedule_config({**base, "prediction_type": theirs}) == (F.ScheduleConfig("scaled_linear", 1000, 0.00085, 0.012), ours)
    assert F.schedule_config(base)[1] == "eps"


@pytest.mark.parametrize("stage, factor", [(KL, 0.18215), (VQ, 1.0)], ids=["kl", "vq"])
def test_scale_factors_that_old_folders_do_not_say(tmp_path, stage, factor):
    """Stable Diffusion's own for a KL stage; none for a codebook, whose latents the released models take as they are."""
    W.save_diffusers(make(stage), tmp_path / "p")
    assert W.load_diffusers(tmp_path / "p").config.scale_factor == 0.7
    file = tmp_path / "p" / "vqvae" / "config.json"
    said = json.loads(file.read_text())
    del said["scaling_factor"]
    file.write_text(json.dumps(said))
    assert W.load_diffusers(tmp_path / "p").config.scale_factor == factor


def test_scale_factors_of_released_models():
    """Of the recipe, or measured in training and kept in the file."""
    known = {name: F.released_config(name, "somewhere", 0.3).scale_factor for name, what in F.RELEASED.items() if what.reader not in F.ABSENT}
    assert known == {"celeba256": 1.0, "ffhq256": 1.0, "lsun_beds256": 1.0, "lsun_churches256": 0.3, "cin256-v2": 1.0, "sd-v1": 0.18215, "bsr-sr": 1.0}
    for name in ("txt2img-1p4B", "inpainting-big"):
        with pytest.raises(ValueError, match=f"condition: '{name}' reads"):
            F.released_config(name, "somewhere")


def test_a_file_s_scale_factor_is_compared(tmp_path):
    config = make().config
    F.check_tables({}, config, 0.7)
    with pytest.raises(ValueError, match="scale_factor: got 0.18215 in the file, expected 0.7"):
        F.check_tables({}, config, 0.18215)
    with pytest.raises(ValueError, match="betas: got 1000 values that differ"):
        F.check_tables({"betas": torch.linspace(1e-4, 0.02, 1000)}, config, None)


def test_plain_heads_of_one_width_only():
    unet = UNetConfig(4, 4, 32, (1, 2), 1, (1, 2), heads=4, num_groups=8)
    with pytest.raises(ValueError, match="expected heads of one width"):
        F.unet_values(unet, 8)


@pytest.mark.parametrize("changes", [{"c_dim": 8}, {"cross_levels": (2,)}])
def test_what_their_configs_cannot_say_is_refused(changes):
    config = UNetConfig(4, 4, 32, (1, 2), 1, (1, 2), head_dim=16, context_dim=24, num_groups=8)
    assert F.unet_values(config, 8)["cross_attention_dim"] == 24
    with pytest.raises(ValueError, match="expected neither: diffusers' configs cannot say them"):
        F.unet_values(config.replace(**changes), 8)
