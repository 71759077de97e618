"""Other people's models as ours and ours as theirs: the same pictures as diffusers, the same bits after a round trip, one message for what is wrong."""
import json
import resource
import shutil

import numpy as np
import pytest
import torch
from diffusers_maps import randomise
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from weights_toy import KL, PROMPTS, VQ, compvis_file, make, same_weights, text_model, text_unet, write_clip

import ldm_edu
from ldm_edu import foreign_configs as F
from ldm_edu import ldm as L
from ldm_edu import weights as W
from ldm_edu.autoencoder import AUTOENCODERS, AutoencoderConfig
from ldm_edu.clip_text import ClipText, ClipTextConfig
from ldm_edu.core import make_generators
from ldm_edu.keymaps import first_stage_entries, from_ours, unet_entries
from ldm_edu.quantize import make_first_stage
from ldm_edu.schedule import ScheduleConfig
from ldm_edu.unet import UNETS, UNet, UNetConfig
from ldm_edu.weight_files import EMA, STAGE, UNET, read_folder

diffusers = pytest.importorskip("diffusers", reason="needs diffusers, which `make test` installs")
transformers = pytest.importorskip("transformers", reason="needs transformers, which `make test` installs")
diffusers.utils.logging.disable_progress_bar()
@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"))


def noise(z, seed, n=2, cells=8):
    return torch.stack([torch.randn(z, cells, cells, generator=g) for g in make_generators(seed, n)])


def ours_as_theirs(images):
    return (images.permute(0, 2, 3, 1).numpy() + 1) / 2


def their_pipeline(clip, prediction="epsilon", linear=False, seed=0):
    """A whole random pipeline of diffusers, with a text encoder of transformers."""
    write_clip(clip / "text_encoder", clip / "tokenizer")
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, cross_attention_dim=32,
        attention_head_dim=4, use_linear_projection=linear, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
    vae = diffusers.AutoencoderKL(
        block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, latent_channels=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    scheduler = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=True, steps_offset=1,
                                        timestep_spacing="trailing", prediction_type=prediction)
    pipe = diffusers.StableDiffusionPipeline(
        vae=randomise(vae, seed).eval(), unet=randomise(unet, seed + 1).eval(), scheduler=scheduler, safety_checker=None, feature_extractor=None,
        text_encoder=transformers.CLIPTextModel.from_pretrained(str(clip / "text_encoder")).eval(),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(str(clip / "tokenizer")), requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe_folder(tmp_path_factory):
    """A pipeline's folder that diffusers wrote; copy it before changing it."""
    place = tmp_path_factory.mktemp("pipe")
    their_pipeline(place / "clip").save_pretrained(place / "pipe")
    return place / "pipe"


@pytest.fixture
def pipe(pipe_folder, tmp_path):
    return shutil.copytree(pipe_folder, tmp_path / "pipe")


# ------------------------------------------------------------------------------------------------ diffusers' folders
@pytest.mark.parametrize("prediction, linear, safe", [("epsilon", False, True), ("v_prediction", True, False)])
def test_a_text_to_image_run_is_that_of_diffusers(tmp_path, prediction, linear, safe):
    """Tokenizer, text encoder, UNet, guidance, ten DDIM steps, decoder: at most 1e-4 on the image."""
    pipe = their_pipeline(tmp_path / "clip", prediction, linear)
    pipe.save_pretrained(tmp_path / "pipe", safe_serialization=safe)
    assert any((tmp_path / "pipe" / "unet").glob("*.safetensors")) == safe
    model = W.load_diffusers(tmp_path / "pipe")
    assert model.config.prediction == {"epsilon": "eps", "v_prediction": "v"}[prediction] and model.config.scale_factor == 0.18215
    theirs = pipe(PROMPTS, num_inference_steps=10, guidance_scale=5.0, latents=noise(4, 3), output_type="np").images
    ours = model.sample(PROMPTS, steps=10, sampler="ddim", guidance_scale=5.0, seed=3)
    assert ours.shape == (2, 3, 16, 16) and ours.std() > 0.1
    assert np.abs(ours_as_theirs(ours) - theirs).max() <= 1e-4
    W.save_diffusers(model, tmp_path / "again", linear=linear)  # theirs -> ours -> theirs, bit for bit
    for part in ("unet", "vae"):
        before, after = read_folder(tmp_path / "pipe" / part), read_folder(tmp_path / "again" / part)
        assert before.keys() == after.keys() and all(torch.equal(x, after[name]) for name, x in before.items())


def test_a_text_model_of_ours_opens_in_diffusers(clip, tmp_path):
    model = text_model(clip)
    W.save_diffusers(model, tmp_path / "pipe")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "pipe")
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(PROMPTS, num_inference_steps=10, guidance_scale=5.0, latents=noise(4, 0), output_type="np").images
    assert np.abs(ours_as_theirs(model.sample(PROMPTS, steps=10, sampler="ddim", guidance_scale=5.0)) - theirs).max() <= 1e-4
    again = W.load_diffusers(tmp_path / "pipe")
    assert same_weights(model, again)
    assert again.config.conditioner["config"]["mark"] == model.config.conditioner["config"]["mark"]
    assert again.config == model.config.replace(conditioner=again.config.conditioner)


def test_pictures_that_are_not_square_stay_so(clip, tmp_path):
    model = text_model(clip)
    model.config = model.config.replace(image_size=(16, 24))
    W.save_diffusers(model, tmp_path / "pipe")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "pipe")
    pipe.set_progress_bar_config(disable=True)
    latents = torch.stack([torch.randn(4, 8, 12, generator=g) for g in make_generators(0, 2)])
    theirs = pipe(PROMPTS, num_inference_steps=10, guidance_scale=5.0, latents=latents, output_type="np").images
    again = W.load_diffusers(tmp_path / "pipe")
    assert theirs.shape == (2, 16, 24, 3) and again.config.image_size == (16, 24)
    assert np.abs(ours_as_theirs(again.sample(PROMPTS, steps=10, sampler="ddim", guidance_scale=5.0)) - theirs).max() <= 1e-4
    plain = make(KL, UNetConfig(KL.z_channels, KL.z_channels, 32, (1, 2), 1, (2,), head_dim=8, num_groups=8))
    plain.config = plain.config.replace(image_size=(16, 24))
    with pytest.raises(ValueError, match=r"image_size: got \(16, 24\), expected one side"):
        W.save_diffusers(plain, tmp_path / "plain")


@pytest.mark.parametrize("stage", [KL, KL.replace(mid_attention=False, attention_levels=(1,)), VQ], ids=["kl", "kl without attention in the middle", "vq"])
@pytest.mark.parametrize("unet", [{}, {"use_scale_shift_norm": True, "resblock_updown": True}], ids=["plain", "AdaGN and resblock_updown"])
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_an_unconditional_model_of_ours_opens_in_diffusers(tmp_path, stage, unet, prediction):
    config = UNetConfig(stage.z_channels, stage.z_channels, 32, (1, 2), 1, (2,), head_dim=8, num_groups=8, **unet)
    model = make(stage, config, prediction=prediction, schedule=ScheduleConfig("linear", zero_terminal_snr=prediction == "v"))
    W.save_diffusers(model, tmp_path / "pipe")
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "pipe")
    assert type(pipe).__name__ == "LDMPipeline"
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(batch_size=2, generator=make_generators(5, 2), num_inference_steps=10, output_type="np").images
    ours = model.sample(n=2, steps=10, sampler="ddim", seed=5)
    assert ours.std() > 0.1 and np.abs(ours_as_theirs(ours) - theirs).max() <= 1e-4
    again = W.load_diffusers(tmp_path / "pipe")
    assert same_weights(model, again) and again.config == model.config
    assert_close(again.sample(n=2, steps=3), model.sample(n=2, steps=3), rtol=0, atol=0)


def test_names_of_older_versions(pipe):
    """Attention layers of the first stage were once called query, key, value and proj_attn, with or without the shape of a convolution."""
    expected = W.load_diffusers(pipe)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    file = pipe / "vae" / "diffusion_pytorch_model.safetensors"
    for shape in (lambda x: x, lambda x: x[:, :, None, None].contiguous() if x.ndim == 2 else x):
        state = load_file(file)
        for new, name in old.items():
            for key in [key for key in state if f".{new}." in key]:
                state[key.replace(f".{new}.", f".{name}.")] = shape(state.pop(key))
        assert sum(".query." in key for key in state) == 4
        save_file(state, file)
        assert same_weights(W.load_diffusers(pipe), expected)
        state = {key: x.flatten(1) if "attentions" in key and x.ndim == 4 else x for key, x in state.items()}
        for new, name in old.items():
            state = {key.replace(f".{name}.", f".{new}."): x for key, x in state.items()}
        save_file(state, file)


def test_several_files_and_half_precision(pipe):
    expected, folder = W.load_diffusers(pipe), pipe / "unet"
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    names = sorted(state)
    for i in range(3):
        save_file({name: state[name] for name in names[i::3]}, folder / f"part-{i}.safetensors")
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {name: f"part-{i % 3}.safetensors" for i, name in enumerate(names)}}))
    assert same_weights(W.load_diffusers(pipe), expected)
    index.unlink()
    save_file({name: x.half() for name, x in state.items()}, folder / "diffusion_pytorch_model.fp16.safetensors")
    half = W.load_diffusers(pipe)
    for name, x in half.net.unet.state_dict().items():
        assert x.dtype == torch.float32 and torch.equal(x, expected.net.unet.state_dict()[name].half().float())


def change(path, **values):
    said = json.loads(path.read_text())
    path.write_text(json.dumps({**said, **values}))


@pytest.mark.parametrize("what, message", [
    (lambda p: shutil.rmtree(p / "unet"), "expected a folder unet"),
    (lambda p: shutil.rmtree(p / "vae"), "expected a folder vae or vqvae"),
    (lambda p: (p / "vae" / "config.json").unlink(), "vae: got no config.json"),
    (lambda p: (p / "scheduler" / "scheduler_config.json").unlink(), "scheduler: got no scheduler_config.json"),
    (lambda p: (p / "model_index.json").unlink(), "got no model_index.json, expected a diffusers pipeline's folder"),
    (lambda p: (p / "unet" / "config.json").write_text("{"), "config.json: not valid JSON"),
    (lambda p: shutil.rmtree(p / "text_encoder"), r"UNet: got 4 channels in, 4 out, context of width 32, .* \(NoCondition\) give 4, 4, None"),
    (lambda p: change(p / "unet" / "config.json", in_channels=9), "UNet: got 9 channels in, 4 out"),
    (lambda p: change(p / "unet" / "config.json", addition_embed_type="text_time", norm_eps=1e-6), "norm_eps 1e-06 .expected 1e-05.; addition_embed_type 'text_time'"),
    (lambda p: change(p / "unet" / "config.json", something_new=True), "something_new True: a network that is not in this library"),
    (lambda p: change(p / "unet" / "config.json", _class_name="DiTTransformer2DModel"), "class: got 'DiTTransformer2DModel'"),
    (lambda p: change(p / "scheduler" / "scheduler_config.json", beta_schedule=None), "expected all four, beta_schedule scaled_linear"),
    (lambda p: change(p / "scheduler" / "scheduler_config.json", prediction_type="flow"), "prediction_type: got 'flow'"),
    (lambda p: change(p / "vae" / "config.json", use_quant_conv=False), "use_quant_conv False .expected True."),
    (lambda p: change(p / "vae" / "config.json", shift_factor=0.1), "shift_factor 0.1"),
    (lambda p: change(p / "unet" / "config.json", block_out_channels=[32, 128]), r"UNet: .*down_blocks.1.resnets.0.conv1.weight: got \(64, 32, 3, 3\), expected \(128, 32, 3, 3\)"),
    (lambda p: write_clip(p / "text_encoder", p / "tokenizer", width=16), r"context of width 32, .* give 4, 4, 16"),
])
def test_a_folder_that_is_not_whole_is_named(pipe, what, message):
    what(pipe)
    with pytest.raises(ValueError, match=message):
        W.load_diffusers(pipe)


def test_all_faults_of_a_folder_are_told_at_once(pipe):
    for part in ("unet", "vae"):
        file = pipe / part / "diffusion_pytorch_model.safetensors"
        state = load_file(file)
        del state[min(name for name in state if name.endswith("conv1.bias"))]
        save_file({**state, "extra": torch.ones(1)}, file)
    with pytest.raises(ValueError) as caught:
        W.load_diffusers(pipe)
    for words in ("2 of 2 parts", "UNet: ", "first stage: ", "missing down_blocks.0.resnets.0.conv1.bias", "missing decoder.mid_block.resnets.0.conv1.bias", "unexpected extra"):
        assert words in str(caught.value), words
    change(pipe / "unet" / "config.json", act_fn="gelu")
    change(pipe / "vae" / "config.json", norm_type="spatial")
    with pytest.raises(ValueError, match="2 of 3 parts(.|\n)*norm_type 'spatial'(.|\n)*act_fn 'gelu'"):
        W.load_diffusers(pipe)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_payload_in_a_folder_is_refused(pipe, part, tmp_path):
    import os

    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    for file in (pipe / part).glob("*.safetensors"):
        file.unlink()
    torch.save({"x": torch.ones(1), "y": Payload()}, pipe / part / ("pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"))
    with pytest.raises(ValueError, match="refused before anything was called"):
        W.load_diffusers(pipe)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["scenes-inpaint", "scenes-semantic", "scenes-class", "scenes-text", "scenes-layout", "scenes-superres"])
def test_models_that_diffusers_has_no_pipeline_for_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="condition: got .*expected NoCondition, or FrozenTextConditioner.*ldm.save writes any model"):
        W.save_diffusers(ldm_edu.load(name), tmp_path / "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [{"masked": True}, {"pooled": True}])
def test_text_that_is_read_otherwise_than_by_stable_diffusion_is_refused(clip, tmp_path, options):
    unet = text_unet(c_dim=32 if "pooled" in options else None)
    model = make(unet=unet, conditioner={"name": "frozen-text", "config": {"model": str(clip), "max_length": 24, **options}})
    with pytest.raises(ValueError, match=f"FrozenTextConditioner with masked {'masked' in options}, pooled {'pooled' in options} and a kl stage"):
        W.save_diffusers(model, tmp_path / "x")


def test_what_theirs_cannot_say_is_refused_before_anything_is_written(tmp_path):
    identity = AutoencoderConfig(4, 16, (1,), num_groups=8, double_z=False, in_channels=4)
    unet = UNetConfig(4, 4, 32, (1, 2), 1, (1, 2), heads=4, num_groups=8)
    for model, message in ((make(unet=unet), "heads of one width"), (make(schedule=ScheduleConfig("sigmoid")), "schedule: got 'sigmoid'"),
                           (make(identity, unet.replace(heads=None, head_dim=8)), "first stage: got identity")):
        with pytest.raises(ValueError, match=message):
            W.save_diffusers(model, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_a_folder_is_whole_or_absent(tmp_path, monkeypatch):
    """A disk that is full after the first network leaves nothing, and a former pipeline as it was."""
    model, other, real, calls = make(), make(seed=1), save_file, []

    def fails_at_second(*arguments, **options):
        calls.append(1)
        if len(calls) % 2 == 0:
            raise OSError("no space left on device")
        real(*arguments, **options)

    monkeypatch.setattr(W, "save_file", fails_at_second)
    with pytest.raises(OSError, match="no space"):
        W.save_diffusers(model, tmp_path / "pipe")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(W, "save_file", real)
    W.save_diffusers(model, tmp_path / "pipe")
    with pytest.raises(ValueError, match="exists: choose another folder, or pass overwrite=True to replace a pipeline"):
        W.save_diffusers(other, tmp_path / "pipe")
    monkeypatch.setattr(W, "save_file", fails_at_second)
    with pytest.raises(OSError, match="no space"):
        W.save_diffusers(other, tmp_path / "pipe", overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["pipe"] and same_weights(W.load_diffusers(tmp_path / "pipe"), model)
    monkeypatch.setattr(W, "save_file", real)
    W.save_diffusers(other, tmp_path / "pipe", overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["pipe"] and same_weights(W.load_diffusers(tmp_path / "pipe"), other)
    (tmp_path / "empty").mkdir()
    assert W.save_diffusers(model, tmp_path / "empty") == tmp_path / "empty"
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(ValueError, match="exists: choose another folder$"):
        W.save_diffusers(model, tmp_path / "thesis", overwrite=True)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"


# ------------------------------------------------------------------------------------------------ configs
def test_our_tables_of_what_they_say_are_complete():
    """Every entry of diffusers' own configs at their defaults is known, so that an unknown one means another network."""
    for name in ("UNet2DModel", "UNet2DConditionModel"):
        net = getattr(diffusers, name)(block_out_channels=(32, 64), norm_num_groups=8, attention_head_dim=8, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
        said = json.loads(net.to_json_string())
        assert F.unet_config(said).model_channels == 32 and said.pop("_class_name") == name
    for name, codes in (("AutoencoderKL", 0), ("VQModel", 256)):
        net = getattr(diffusers, name)(block_out_channels=(32,))
        assert F.stage_config(json.loads(net.to_json_string())).codes == codes


@pytest.mark.parametrize("name, theirs", [(ours, theirs) for theirs, ours in F.THEIR_BETAS.items()])
@pytest.mark.parametrize("zero", [False, True])
def test_noise_tables_are_those_of_diffusers(name, theirs, zero):
    said = json.loads(diffusers.DDIMScheduler(beta_schedule=theirs, beta_start=0.001, beta_end=0.02, rescale_betas_zero_snr=zero).to_json_string())
    config, prediction = F.schedule_config(said)
    from ldm_edu.schedule import schedule_from_config

    assert (config.name, prediction) == (name, "eps")
    expected = diffusers.DDIMScheduler.from_config(said).alphas_cumprod
    assert_close(schedule_from_config(config).alphas_cumprod, expected, atol=1e-5, rtol=1e-4)
    assert F.schedule_values(config, "x0")["prediction_type"] == "sample"


@pytest.mark.parametrize("changes, message", [
    ({"down_block_types": ["SimpleCrossAttnDownBlock2D", "DownBlock2D"]}, "got blocks"), ({"up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]}, "and the same going up"),
    ({"transformer_layers_per_block": [1, 2]}, r"transformer_layers_per_block \[1, 2\]"), ({"layers_per_block": [1, 2]}, r"layers_per_block \[1, 2\]"),
    ({"block_out_channels": [32, 48]}, "one multiple of the first width"), ({"cross_attention_dim": [32, 32]}, "expected one width of the context"),
    ({"attention_head_dim": [4, 5]}, "expected as many heads at every level"), ({"norm_num_groups": None}, "got no norm_num_groups"),
    ({"cross_attention_dim": None}, "cross_attention_dim None"), ({"class_embed_type": "timestep"}, "class_embed_type 'timestep'"),
    ({"num_attention_heads": 4}, "num_attention_heads 4"), ({"downsample_type": "resnet"}, "both conv or both resnet"),
    ({"_class_name": "UNet2DModel", "cross_attention_dim": None, "downsample_type": "resnet", "upsample_type": "resnet"}, "expected AttnDownBlock2D or ResnetDownsampleBlock2D"),
])
def test_unets_that_we_do_not_have_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        F.unet_config({**F.unet_values(text_unet(), 8), **changes})


def test_heads_mean_what_diffusers_does_with_them():
    """attention_head_dim is heads with a context and channels per head without: read from their own layers, and understood from their config."""
    for config in (text_unet(heads=4), text_unet(heads=None, head_dim=16), UNetConfig(4, 4, 32, (1, 2), 1, (1, 2), head_dim=16, num_groups=8)):
        said = F.unet_values(config, 8)
        net = getattr(diffusers, said.pop("_class_name")).from_config(said)
        theirs = {module.to_q.weight.shape[0]: module.heads for name, module in net.named_modules() if hasattr(module, "to_q")}
        for read in (config, F.unet_config(json.loads(net.to_json_string()))):
            with torch.device("meta"):
                layers = [module for module in UNet(read).modules() if hasattr(module, "heads")]
            ours = {(layer.to_out if hasattr(layer, "to_out") else layer.proj_out).weight.shape[0]: layer.heads for layer in layers}
            assert ours == theirs and len(ours) == 2, config


# ------------------------------------------------------------------------------------------------ the original's layout
@pytest.mark.parametrize("name", ["scenes-inpaint", "scenes-semantic"])
def test_shipped_models_go_round(tmp_path, name):
    model = ldm_edu.load(name)
    W.save_compvis(model, tmp_path / "m.safetensors")
    again = W.load_compvis(tmp_path / "m.safetensors", model.config)
    assert same_weights(model, again) and again.config == model.config and not again.training
    batch = {"image": torch.zeros(1, 3, 32, 32), "mask": torch.ones(1, 1, 32, 32)} if name == "scenes-inpaint" else {"semantic": torch.zeros(1, 32, 32, dtype=torch.int64)}
    assert torch.equal(again.sample(batch=batch, steps=2), model.sample(batch=batch, steps=2))
    before, after = load_file(tmp_path / "m.safetensors"), W.compvis_state(again)
    assert before.keys() == after.keys() and all(torch.equal(x, after[key]) for key, x in before.items())


@pytest.mark.parametrize("name", ["scenes-class", "scenes-text", "scenes-layout", "scenes-superres"])
def test_models_with_a_vector_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="got a UNet with c_dim .* has no names for them"):
        W.save_compvis(ldm_edu.load(name), tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


def random_compvis(config, reader, seed=0):
    """A state dict in the original's layout for a config: names and shapes from the map, numbers drawn here."""
    with torch.device("meta"):
        unet, stage = UNet(config.unet), make_first_stage(config.first_stage)
    shapes = {UNET + key: x.shape for key, x in from_ours(unet_entries(unet), unet.state_dict()).items()}
    shapes |= {STAGE + key: x.shape for key, x in from_ours(first_stage_entries(stage), stage.state_dict()).items()}
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in {**shapes, **reader}.items()}


@pytest.mark.parametrize("kind", ["none", "class", "plain attention", "vq"])
def test_compvis_to_ours_to_compvis(tmp_path, kind):
    """Their file -> ours -> their file, bit for bit; the class embedding under its released name."""
    classes = {"name": "class", "config": {"n_classes": 10, "width": 32}} if kind == "class" else {"name": "none"}
    reader = {"cond_stage_model.embedding.weight": (11, 32)} if kind == "class" else {}
    stage = VQ if kind == "vq" else KL
    unet = text_unet() if kind == "class" else UNetConfig(stage.z_channels, stage.z_channels, 32, (1, 2), 1, (1, 2), head_dim=8, num_groups=8)
    config = L.LDMConfig(stage, unet, classes, image_size=16, scale_factor=0.5)
    state = random_compvis(config, reader)
    save_file(state, tmp_path / "m.safetensors")
    model = W.load_compvis(tmp_path / "m.safetensors", config)
    W.save_compvis(model, tmp_path / "again.safetensors")
    after = load_file(tmp_path / "again.safetensors")
    assert set(after) - set(state) == {"betas", "alphas_cumprod", "scale_factor"}
    assert all(torch.equal(x, after[name]) for name, x in state.items())
    if kind == "class":
        assert torch.equal(model.net.conditioner.table.weight, state["cond_stage_model.embedding.weight"])
    assert model.sample(n=1, steps=1).isfinite().all()


def test_a_checkpoint_brings_its_text_encoder(clip, tmp_path):
    """With the tokenizer's folder alone; where the folder has weights they are compared; another encoder is refused."""
    model = text_model(clip)
    path = compvis_file(model, tmp_path / "m.ckpt", **{"cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(24)[None]})
    assert sum(name.startswith("cond_stage_model.transformer.text_model.") for name in torch.load(path)["state_dict"]) == 37
    pictures = model.sample(PROMPTS, steps=2)
    words = shutil.copytree(clip, tmp_path / "words")
    (words / "model.safetensors").unlink()
    say = lambda folder: model.config.replace(conditioner={"name": "frozen-text", "config": {"model": str(folder), "max_length": 24}})
    for folder in (words, clip):
        again = W.load_compvis(path, say(folder))
        assert torch.equal(again.sample(PROMPTS, steps=2), pictures)
        assert again.config.conditioner["config"]["mark"] == model.config.conditioner["config"]["mark"]
    other = write_clip(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="condition: .*of its tensors are not those of the checkpoint: it is another encoder"):
        W.load_compvis(path, say(other))
    without = {name: x for name, x in torch.load(path)["state_dict"].items() if not name.startswith("cond_stage_model.")}
    torch.save(without, path)
    assert torch.equal(W.load_compvis(path, say(clip)).sample(PROMPTS, steps=2), pictures)  # not in the file: the folder's
    with pytest.raises(ValueError, match="condition: text encoder .*expected diffusion_pytorch_model.safetensors, model.safetensors"):
        W.load_compvis(path, say(words))


def test_averaged_or_last_is_a_choice(tmp_path):
    model, mean = make(), make(seed=7)
    state = W.compvis_state(model)
    averages = {EMA + ("diffusion_model." + name.removeprefix(UNET)).replace(".", ""): x for name, x in W.compvis_state(mean).items() if name.startswith(UNET)}
    both = {**state, **averages, "model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(5)}
    torch.save({"state_dict": both}, tmp_path / "both.ckpt")
    with pytest.raises(ValueError, match="both.ckpt: got both averaged and last weights .*choose ema=True"):
        W.load_compvis(tmp_path / "both.ckpt", model.config)
    assert same_weights(W.load_compvis(tmp_path / "both.ckpt", model.config, ema=False).net, model.net)
    chosen = W.load_compvis(tmp_path / "both.ckpt", model.config, ema=True)
    assert same_weights(chosen.net, mean.net) and same_weights(chosen.first_stage, model.first_stage) and chosen.card["averaged"] is True
    torch.save({name: x for name, x in both.items() if not name.startswith(UNET)}, tmp_path / "mean.ckpt")  # no wrapper, no last weights
    only = W.load_compvis(tmp_path / "mean.ckpt", model.config)
    assert same_weights(only.net, mean.net) and only.card["averaged"] is True
    with pytest.raises(ValueError, match="got averaged weights of the UNet alone: leave ema out, or pass ema=True"):
        W.load_compvis(tmp_path / "mean.ckpt", model.config, ema=False)
    torch.save(state, tmp_path / "one.ckpt")  # one copy under the last weights' names, as in files released for sampling: the file does not say which
    assert W.load_compvis(tmp_path / "one.ckpt", model.config).card["averaged"] is None and chosen.card["averaged"]
    with pytest.raises(ValueError, match=r"got one copy of the UNet, under model.diffusion_model. \(in files released for sampling.* leave ema out"):
        W.load_compvis(tmp_path / "one.ckpt", model.config, ema=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("which", [(UNET, STAGE), ""], ids=["networks", "the whole file"])
def test_half_precision_is_converted(tmp_path, dtype, which):
    model = make()
    save_file({name: x.to(dtype) if name.startswith(which) else x for name, x in W.own_tensors(W.compvis_state(model)).items()}, tmp_path / "m.safetensors")
    again = W.load_compvis(tmp_path / "m.safetensors", model.config)
    for part in ("net", "first_stage"):
        before = getattr(model, part).state_dict()
        for name, x in getattr(again, part).state_dict().items():
            assert x.dtype == torch.float32 and torch.equal(x, before[name].to(dtype).float()), name


@pytest.mark.parametrize("damage, message", [
    ("cut", "begins as a .safetensors file does and is cut off or damaged: fetch it again"), ("suffix", "begins like .safetensors: rename it to end in .safetensors"),
    ("stage", "a first stage alone: weights.load_released_stage reads it"), ("their unet", "one network of a diffusers folder: give the folder to weights.load_diffusers"),
    ("clip", "a text encoder alone"), ("ours", "a model of this library: ldm_edu.load reads its folder"), ("nothing", "no such file"), ("empty", "got no UNet .*but no tensors"),
    ("payload", "refused before anything was called"),
])
def test_files_that_are_something_else_are_named(tmp_path, clip, damage, message):
    import os

    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    model, path = make(), tmp_path / "m.safetensors"
    W.save_compvis(model, path)
    whole = path.read_bytes()
    stage, unet = model.first_stage, model.net.unet
    write = {
        "cut": lambda: path.write_bytes(whole[: len(whole) // 2]), "suffix": lambda: path.rename(tmp_path / "m.ckpt"), "nothing": path.unlink,
        "stage": lambda: save_file(from_ours(first_stage_entries(stage), stage.state_dict()), path), "clip": lambda: shutil.copy(clip / "model.safetensors", path),
        "their unet": lambda: save_file(W.own_tensors(from_ours(unet_entries(unet, "diffusers"), unet.state_dict())), path),
        "ours": lambda: save_file(model.state_dict(), path), "empty": lambda: save_file({}, path),
        "payload": lambda: torch.save({"state_dict": {"x": torch.ones(1)}, "y": Payload()}, tmp_path / "m.ckpt"),
    }
    write[damage]()
    with pytest.raises(ValueError, match=message):
        W.load_compvis(tmp_path / "m.ckpt" if damage in ("suffix", "payload") else path, model.config)
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_under_another_name_is_recognised(tmp_path, monkeypatch):
    for module in (W, F):
        monkeypatch.setitem(module.UNETS, "small", UNetConfig(4, 4, 32, (1, 2), 1, (2,), head_dim=8, num_groups=8))
        monkeypatch.setitem(module.UNETS, "wide", UNetConfig(4, 4, 32, (1, 4), 1, (2,), head_dim=8, num_groups=8))
        monkeypatch.setitem(module.AUTOENCODERS, "small-kl", KL)
    for name in ("small", "wide"):
        monkeypatch.setitem(F.RELEASED, name, F.Released(name, "small-kl", "none"))
    model = make(schedule=ScheduleConfig("scaled_linear", 1000, 0.0015, 0.0195), scale_factor=1.0)
    W.save_compvis(model, tmp_path / "m.safetensors")
    assert same_weights(W.load_compvis(tmp_path / "m.safetensors", "small"), model)
    with pytest.raises(ValueError) as caught:
        W.load_compvis(tmp_path / "m.safetensors", "wide")
    assert "1 of 4 parts" in str(caught.value) and "Its UNet is that of small." in str(caught.value)
    with pytest.raises(ValueError, match="released model: got 'smal', expected .*did you mean 'small'"):
        W.load_compvis(tmp_path / "m.safetensors", "smal")


def test_all_faults_of_a_checkpoint_are_told_at_once(tmp_path):
    model = make(unet=text_unet(), conditioner={"name": "class", "config": {"n_classes": 10, "width": 32}})
    state = W.own_tensors(W.compvis_state(model))
    del state[UNET + "out.2.bias"], state[STAGE + "quant_conv.bias"], state["cond_stage_model.embedding.weight"]
    state |= {"alphas_cumprod": state["alphas_cumprod"] ** 2, STAGE + "encoder.conv_in.bias": torch.ones(3), "cond_stage_model.x": torch.ones(1)}
    save_file(state, tmp_path / "m.safetensors")
    with pytest.raises(ValueError) as caught:
        W.load_compvis(tmp_path / "m.safetensors", model.config)
    for words in ("4 of 4 parts", "missing out.2.bias", "missing quant_conv.bias", "encoder.conv_in.bias: got (3,), expected (16,)", "missing embedding.weight", "unexpected x",
                  "alphas_cumprod: got 1000 values"):
        assert words in str(caught.value), words


def test_noise_tables_and_scale_factor_are_checked(tmp_path):
    model = make()
    path = tmp_path / "m.safetensors"
    W.save_compvis(model, path)
    for change, message in (({"schedule": ScheduleConfig("scaled_linear", 1000, 0.0015, 0.0155)}, "betas: got 1000 values that differ"),
                            ({"schedule": ScheduleConfig(T=500)}, "got 1000 values that differ from the config's 500 by inf"),
                            ({"scale_factor": 0.7001}, "scale_factor: got 0.69999.* in the file, expected 0.7001")):
        with pytest.raises(ValueError, match=message):
            W.load_compvis(path, model.config.replace(**change))
    state = load_file(path)
    save_file({**state, "betas": torch.full((1000,), float("nan"))}, path)
    with pytest.raises(ValueError, match="betas"):
        W.load_compvis(path, model.config)


def test_writing_is_careful(tmp_path):
    model = make()
    with pytest.raises(ValueError, match="another suffix, expected a new .safetensors file"):
        W.save_compvis(model, tmp_path / "m.ckpt")
    W.save_compvis(model, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="overwrite=True"):
        W.save_compvis(model, tmp_path / "m.safetensors")
    W.save_compvis(make(seed=1), tmp_path / "m.safetensors", overwrite=True)
    assert same_weights(W.load_compvis(tmp_path / "m.safetensors", model.config), make(seed=1))
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_a_first_stage_that_was_released_alone(tmp_path, monkeypatch):
    for name, config in (("kl", KL), ("vq", VQ.replace(attention_levels=()))):
        monkeypatch.setitem(W.AUTOENCODERS, name, config)
        stage = randomise(make_first_stage(config))
        torch.save({"state_dict": {**stage.state_dict(), "loss.logvar": torch.zeros(()), "loss.perceptual_loss.lin0.model.1.weight": torch.ones(1)}}, tmp_path / "m.ckpt")
        assert same_weights(W.load_released_stage(tmp_path / "m.ckpt", name), stage)
    with pytest.raises(ValueError, match=r"m.ckpt does not fit: .*encoder.conv_out.weight: got \(3, 32, 3, 3\), expected \(8, 32, 3, 3\)"):
        W.load_released_stage(tmp_path / "m.ckpt", "kl")


def test_the_recipes_of_released_models():
    for name, params in (("celeba256", 274_056_163), ("lsun_churches256", 294_966_916), ("cin256-v2", 400_920_579), ("sd-v1", 859_520_964)):
        config = F.released_config(name, encoder="somewhere", scale_factor=0.2)
        assert sum(p.numel() for p in W.empty_unet(config.unet).parameters()) == params
        assert (config.scale_factor, config.schedule.T) == ({"lsun_churches256": 0.2, "sd-v1": 0.18215}.get(name, 1.0), 1000)
        assert config.unet.in_channels == config.first_stage.z_channels
    assert F.released_config("cin256-v2").unet.heads == 1  # as trained; the released config of its elder sister says otherwise
    for name, message in (("lsun_churches256", "scale_factor: got none in the file"), ("sd-v1", "encoder: got none")):
        with pytest.raises(ValueError, match=message):
            F.released_config(name)


# ------------------------------------------------------------------------------------------------ Stable Diffusion 1 at full size
def fill_in_place(module, seed=0):
    """Random numbers for a network on the meta device, without the time and memory of its own initialisation."""
    module.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
        parameter.data.uniform_(-1.7, 1.7, generator=generator).mul_(scale)
        if parameter.ndim == 1 and "norm" in name and name.endswith("weight"):
            parameter.data.add_(1)
    return module.eval()


def close(ours, theirs):
    """Largest difference over the largest number."""
    assert ours.shape == theirs.shape and theirs.abs().max() > 0.1
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@torch.no_grad()
def test_stable_diffusion_s_unet_at_full_size():
    config, x = UNETS["sd-v1"], torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    fill_in_place(theirs)
    state = theirs.state_dict()
    assert len(state) == 686 and sum(x.numel() for x in state.values()) == 859_520_964
    context = torch.randn(1, 77, 768, generator=torch.Generator().manual_seed(1))
    expected = theirs(x, torch.tensor([500]), context).sample
    unet = W.empty_unet(config)
    entries = unet_entries(unet, "diffusers")
    del theirs
    W.fill(unet, entries, state, "Stable Diffusion")  # most tensors are the same memory
    assert F.unet_config({**F.unet_values(config, 64), "attention_head_dim": 8}) == config
    assert close(unet.eval()(x, torch.tensor([500]), context), expected) <= 1e-5
    back = from_ours(entries, unet.state_dict())
    assert back.keys() == state.keys() and all(torch.equal(x, back[name]) for name, x in state.items())
    assert len([name for entry in unet_entries(unet) for name in entry.theirs]) == 686


@torch.no_grad()
def test_stable_diffusion_s_first_stage_at_full_size():
    config = AUTOENCODERS["kl-f8"]
    said = F.stage_values(config, 512, 0.18215)
    name = said.pop("_class_name")
    with torch.device("meta"):
        theirs = getattr(diffusers, name).from_config(said)
    fill_in_place(theirs)
    state = theirs.state_dict()
    assert len(state) == 248 and sum(x.numel() for x in state.values()) == 83_653_863
    with torch.device("meta"):
        stage = make_first_stage(config)
    W.fill(stage, first_stage_entries(stage, "diffusers"), state, "Stable Diffusion").eval()
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert close(stage.encode(x).mean, theirs.encode(x).latent_dist.mean) <= 1e-5
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert close(stage.decode(z), theirs.decode(z).sample) <= 1e-5


@torch.no_grad()
def test_stable_diffusion_s_text_encoder_at_full_size():
    with torch.device("meta"):
        ours, theirs = ClipText(ClipTextConfig()), transformers.CLIPTextModel(transformers.CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12))
    fill_in_place(theirs)
    for module in theirs.modules():
        if hasattr(module, "position_ids"):
            module.position_ids = torch.arange(77)[None]
    state = dict(theirs.named_parameters())
    assert len(state) == 196 and sum(x.numel() for x in state.values()) == 123_060_480
    ours.load_state_dict(state, assign=True, strict=True)
    ids = torch.randint(49_408, (1, 77), generator=torch.Generator().manual_seed(0))
    assert close(ours.eval()(ids), theirs(input_ids=ids).last_hidden_state) <= 1e-5


def test_memory_of_this_file():
    """Shared tensors keep three networks of full size, each beside its twin, below 9 GB."""
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2 < 9, "GB"
