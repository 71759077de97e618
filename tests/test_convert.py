"""From any layout to any: the same bits and the same pictures, all that stays behind told, nothing lost, guessed, replaced or half written."""
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from diffusers_maps import randomise
from safetensors.torch import load_file, save_file
from weights_toy import KL, PROMPTS, VQ, compvis_file, make, same_weights, text_model, write_clip

from ldm_edu import cli
from ldm_edu import convert as C
from ldm_edu import foreign_configs as F
from ldm_edu import inspection as I
from ldm_edu import weights as W
from ldm_edu.autoencoder import AUTOENCODERS
from ldm_edu.keymaps import first_stage_entries, from_ours, unet_entries
from ldm_edu.ldm import find_model, load, load_first_stage, save
from ldm_edu.quantize import make_first_stage
from ldm_edu.superres import LowResConditioner
from ldm_edu.unet import UNETS, UNet, UNetConfig
from ldm_edu.weight_files import EMA, STAGE, UNET

NAMES = {"ours": "m", "diffusers": "pipe", "compvis": "m.safetensors"}


@pytest.fixture
def clip(tmp_path):
    return write_clip(tmp_path / "clip")


def wrote(model, folder, layout):
    """A model in a layout, written by the library's own functions; its place."""
    write = {"ours": save, "diffusers": W.save_diffusers, "compvis": W.save_compvis}[layout]
    write(model, folder / NAMES[layout])
    return folder / NAMES[layout]


def opened(place, layout, config):
    return {"ours": load, "diffusers": W.load_diffusers}[layout](place) if layout != "compvis" else W.load_compvis(place, config)


def files_of(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


# ------------------------------------------------------------------------------------------------ round the layouts
@pytest.mark.parametrize("to", I.TARGETS)
@pytest.mark.parametrize("layout", I.TARGETS)
@pytest.mark.parametrize("kind", ["none", "text", "vq"])
def test_every_layout_to_every_layout(tmp_path, clip, kind, layout, to):
    """The same bits, the same pictures, the same config but for what is told to stay behind."""
    model = text_model(clip) if kind == "text" else make(VQ if kind == "vq" else KL)
    source, out = wrote(model, tmp_path, layout), tmp_path / "out" / NAMES[to]
    given = {"recipe": model.config, "encoder": clip if kind == "text" else None} if layout == "compvis" else {}
    done = C.convert_model(source, out, to, **given)
    assert files_of(tmp_path / "out")[0] == NAMES[to] and not [p for p in tmp_path.rglob("*") if ".part" in p.name]
    again = opened(out, to, model.config)
    assert same_weights(model, again) and not C.differing(C.all_tensors(model), C.all_tensors(again))
    assert (done.tensors, done.rounding) == (len(C.all_tensors(model)), 0.0) and (done.tensors > len(model.state_dict())) == (kind == "text")
    prompts = PROMPTS if kind == "text" else None
    assert torch.equal(again.sample(prompts, n=None if prompts else 2, steps=2), model.sample(prompts, n=None if prompts else 2, steps=2))
    assert again.config.scale_factor == 0.7 and again.config.unet.replace(heads=None, head_dim=8) == model.config.unet.replace(heads=None, head_dim=8)


def test_a_text_model_is_whole_wherever_it_goes(tmp_path, clip):
    """Its encoder and its tokenizer lie in the folder of ours, which may move; the first encoder may go."""
    model = text_model(clip)
    pictures = model.sample(PROMPTS, steps=2)
    C.convert_model(wrote(model, tmp_path, "diffusers"), tmp_path / "a" / "m")
    shutil.rmtree(clip), shutil.rmtree(tmp_path / "pipe")
    (tmp_path / "a").rename(tmp_path / "b")
    again = load(tmp_path / "b" / "m")
    assert torch.equal(again.sample(PROMPTS, steps=2), pictures)
    assert json.loads((tmp_path / "b" / "m" / "config.json").read_text())["conditioner"]["config"]["model"] == "./text_encoder"
    assert again.config.conditioner["config"]["model"] == str(tmp_path / "b" / "m" / "text_encoder")
    C.convert_model(tmp_path / "b" / "m", tmp_path / "c", "diffusers")
    assert torch.equal(W.load_diffusers(tmp_path / "c").sample(PROMPTS, steps=2), pictures)


@pytest.mark.parametrize("to", I.TARGETS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_rounded_once_and_read_back(tmp_path, clip, to, dtype):
    model, kind = text_model(clip), getattr(torch, dtype)
    done = C.convert_model(wrote(model, tmp_path, "ours"), tmp_path / "out" / NAMES[to], to, dtype=dtype)
    again = opened(done.out, to, model.config.replace(conditioner={"name": "frozen-text", "config": {"model": str(clip), "max_length": 24}}))
    if to != "compvis":  # whose encoder is the folder's, where there is one
        assert not C.differing({name: x.to(kind).float() for name, x in C.all_tensors(model).items()}, C.all_tensors(again))
    assert all(torch.equal(x, model.state_dict()[name].to(kind).float()) for name, x in again.state_dict().items())
    files = [done.out] if to == "compvis" else list(done.out.rglob("*.safetensors"))
    found = {name: x for file in files for name, x in load_file(file).items()}
    tables = {"betas", "alphas_cumprod", "scale_factor"} if to == "compvis" else set()
    assert {x.dtype for name, x in found.items() if name not in tables} == {kind} and {found[name].dtype for name in tables} <= {torch.float32}
    if to == "compvis":
        assert abs(found["scale_factor"].item() - 0.7) < 1e-7
    assert 0 < done.rounding <= (2**-11 if dtype == "float16" else 2**-8) and f"rounded by at most {done.rounding:.1e}" in done.tell()


def test_tables_are_not_rounded_with_the_weights(tmp_path):
    """A noise table in half precision would be another schedule, and 0.18215 another factor."""
    model = make(scale_factor=0.18215)
    W.save_compvis(model, tmp_path / "m.safetensors", dtype=torch.bfloat16)
    found = load_file(tmp_path / "m.safetensors")
    assert torch.equal(found["alphas_cumprod"], model.schedule.alphas_cumprod) and abs(found["scale_factor"].item() - 0.18215) < 1e-8
    assert {x.dtype for name, x in found.items() if name.startswith((UNET, STAGE))} == {torch.bfloat16}


def test_numbers_that_do_not_fit_are_refused(tmp_path):
    model = make()
    with torch.no_grad():
        model.net.unet.conv_out.bias[0] = 1e5
    source = wrote(model, tmp_path, "ours")
    with pytest.raises(ValueError, match=r"torch.float16: got 1 tensors with numbers that it cannot hold, for example net.unet.conv_out.bias .up to 1e\+05"):
        C.convert_model(source, tmp_path / "x", dtype="float16")
    C.convert_model(source, tmp_path / "y", dtype="bfloat16")
    with torch.no_grad():
        model.net.unet.conv_out.bias[0] = float("nan")
    save(model, source, overwrite=True)
    with pytest.raises(ValueError, match="float32: got 1 tensors with numbers"):
        C.convert_model(source, tmp_path / "x")
    assert not (tmp_path / "x").exists()


# ------------------------------------------------------------------------------------------------ files of the original's layout
@pytest.fixture
def both(tmp_path):
    """A file with averaged and last weights, and the model of each."""
    last, mean = make(), make(seed=7)
    averages = {EMA + ("diffusion_model." + name.removeprefix(UNET)).replace(".", ""): x for name, x in W.compvis_state(mean).items() if name.startswith(UNET)}
    compvis_file(last, tmp_path / "both.ckpt", **averages, **{"model_ema.decay": torch.tensor(0.9999), "logvar": torch.zeros(1000)})
    return tmp_path / "both.ckpt", last, mean


def test_averaged_or_last_weights_by_choice(tmp_path, both, capsys):
    path, last, mean = both
    save(last, tmp_path / "recipe")
    ask = ["convert", "--from", str(path), "--config", str(tmp_path / "recipe")]
    assert cli.main([*ask, "--out", str(tmp_path / "x")]) == 2 and "ema: got no choice for a file that holds both" in capsys.readouterr().err
    for choice, model in (("yes", mean), ("no", last)):
        assert cli.main([*ask, "--out", str(tmp_path / choice), "--ema", choice]) == 0
        told = capsys.readouterr().out
        assert f"taken: {'averaged' if choice == 'yes' else 'last'}" in told and f"the {'last' if choice == 'yes' else 'averaged'} weights of the UNet" in told
        assert "1 tensors outside these parts: logvar" in told and "epoch, of its training" in told
        assert same_weights(load(tmp_path / choice).net.unet, model.net.unet) and same_weights(load(tmp_path / choice).first_stage, last.first_stage)
    assert cli.main([*ask, "--out", str(tmp_path / "x"), "--ema", "maybe"]) == 2 and not (tmp_path / "x").exists()


def test_counters_of_averages_are_no_averages(tmp_path):
    """Files from which the averages were taken out, or put in the place of the last weights, often keep the two counters."""
    model = make()
    compvis_file(model, tmp_path / "m.ckpt", **{"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(5)})
    found = I.inspect_model(tmp_path / "m.ckpt", model.config)
    assert found.facts["UNet's weights"] == "last weights alone; taken: last" and not found.wanting and found.left == ("epoch, of its training",)
    assert same_weights(found.open(), model)


@pytest.fixture
def small(monkeypatch):
    """Three small models in the table of released ones: two of one recipe, one whose condition is not here."""
    for module in (W, F, I, C):
        if hasattr(module, "UNETS"):
            monkeypatch.setitem(module.UNETS, "small", UNetConfig(4, 4, 32, (1, 2), 1, (2,), head_dim=8, num_groups=8))
            monkeypatch.setitem(module.UNETS, "reads", UNetConfig(4, 4, 32, (1, 2), 1, (2,), head_dim=8, num_groups=8, context_dim=16))
        if hasattr(module, "AUTOENCODERS"):
            monkeypatch.setitem(module.AUTOENCODERS, "small-kl", KL)
    for name, row in (("faces", F.Released("small", "small-kl", "none")), ("beds", F.Released("small", "small-kl", "none")), ("words", F.Released("reads", "small-kl", "bert"))):
        monkeypatch.setitem(F.RELEASED, name, row)
    return make(schedule=F.ScheduleConfig("scaled_linear", 1000, 0.0015, 0.0195), scale_factor=1.0)


def test_a_released_model_is_known_by_its_names(tmp_path, small):
    W.save_compvis(small, tmp_path / "m.safetensors")
    found = I.inspect_model(tmp_path / "m.safetensors")
    assert found.facts["config"] == "faces or beds, by the names and shapes of its UNet (one recipe)" and not found.wanting
    assert found.facts["scale factor"] == "1.0, of its recipe" and "beta 0.0015 to 0.0195" in found.facts["noise schedule"] and found.facts["prediction"] == "eps"
    done = C.convert_model(tmp_path / "m.safetensors", tmp_path / "x")
    assert same_weights(load(tmp_path / "x"), small) and "read back and equal bit for bit" in done.tell()
    state = load_file(tmp_path / "m.safetensors")  # the averages alone are known as well
    means = {EMA + name.removeprefix("model.").replace(".", "") if name.startswith(UNET) else name: x for name, x in state.items()}
    save_file(means, tmp_path / "means.safetensors")
    found = I.inspect_model(tmp_path / "means.safetensors")
    assert found.facts["config"].startswith("faces or beds") and found.facts["UNet's weights"] == "averaged weights alone; taken: averaged"
    assert same_weights(found.open(), small)


def test_two_recipes_that_fit_are_not_chosen_from(tmp_path, small, monkeypatch):
    monkeypatch.setitem(F.RELEASED, "cats", F.Released("small", "small-kl", "none", beta_end=0.0155))
    W.save_compvis(small, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="config: got none, and it is unknown: its UNet is that of faces or beds or cats; expected one of celeba256"):
        C.convert_model(tmp_path / "m.safetensors", tmp_path / "x")
    C.convert_model(tmp_path / "m.safetensors", tmp_path / "x", recipe="faces")
    with pytest.raises(ValueError, match="betas: got 1000 values that differ"):
        C.convert_model(tmp_path / "m.safetensors", tmp_path / "y", recipe="cats")
    with pytest.raises(ValueError, match="config: got 'fases', expected a config.json of this library, its folder, or one of celeba256"):
        C.convert_model(tmp_path / "m.safetensors", tmp_path / "y", recipe="fases")
    assert not (tmp_path / "y").exists()


def test_a_condition_that_is_not_here_is_named_and_its_networks_open(tmp_path, small):
    with torch.device("meta"):
        unet, stage = UNet(UNETS["reads"]), make_first_stage(KL)
    unet, stage = (randomise(part.to_empty(device="cpu")) for part in (unet, stage))
    state = {UNET + key: x for key, x in from_ours(unet_entries(unet), unet.state_dict()).items()}
    state |= {STAGE + key: x for key, x in from_ours(first_stage_entries(stage), stage.state_dict()).items()}
    save_file(W.own_tensors({**state, "cond_stage_model.transformer.norm.weight": torch.ones(16)}), tmp_path / "m.safetensors")
    found = I.inspect_model(tmp_path / "m.safetensors")
    assert found.facts["config"].startswith("words, by") and "BERT's pieces of words, trained with the model: not in this library" in found.facts["condition by"]
    with pytest.raises(ValueError, match="condition: 'words' reads a transformer of 32 layers over BERT's pieces.*convert.load_networks"):
        C.convert_model(tmp_path / "m.safetensors", tmp_path / "x")
    one, two = C.load_networks(tmp_path / "m.safetensors", "words")
    assert same_weights(one, unet) and same_weights(two, stage) and not one.training and not (tmp_path / "x").exists()
    torch.save({name: x for name, x in state.items() if name != UNET + "out.2.bias"}, tmp_path / "m.ckpt")
    with pytest.raises(ValueError, match="1 of 2 parts(.|\n)*missing out.2.bias"):
        C.load_networks(tmp_path / "m.ckpt", "words")


@pytest.mark.parametrize("name, tensors, numbers, stage", [
    ("celeba256", 368, 274_056_163, 205), ("ffhq256", 368, 274_056_163, 205), ("lsun_beds256", 368, 274_056_163, 205), ("lsun_churches256", 520, 294_966_916, 248),
    ("cin256-v2", 688, 400_920_579, 205), ("sd-v1", 686, 859_520_964, 248), ("bsr-sr", 306, 113_622_563, 205), ("cin256", 626, 394_984_196, 299),
    ("text2img256", 688, 403_623_939, 205), ("txt2img-1p4B", 686, 872_300_484, 248), ("layout2img-openimages256", 1328, 246_277_379, 205),
    ("inpainting-big", 416, 387_245_827, 185), ("semantic-synthesis256", 216, 215_229_315, 205), ("rdm768", 688, 1_335_480_400, 342),
])
def test_released_networks_have_the_published_names_and_sizes(name, tensors, numbers, stage):
    what = F.RELEASED[name]
    with torch.device("meta"):
        unet, first = UNet(UNETS[what.unet]), make_first_stage(AUTOENCODERS[what.first_stage])
    theirs = from_ours(unet_entries(unet), unet.state_dict())
    assert (len(theirs), sum(x.numel() for x in theirs.values())) == (tensors, numbers) and len(first_stage_entries(first)) == stage
    same = W.recognise(theirs)
    assert name in same and {F.RELEASED[other] for other in same} == {what}
    assert set(F.RELEASED) == {mark.args[1][i][0] for mark in test_released_networks_have_the_published_names_and_sizes.pytestmark for i in range(len(mark.args[1]))}


def test_the_released_super_resolution_reads_a_small_picture_and_nothing_else(tmp_path, monkeypatch):
    """Its UNet reads latents and, behind them, the small picture as it is: by hand at one step, and through a file of its layout."""
    released = F.released_config("bsr-sr")
    assert released.conditioner["config"]["width"] == 0 and released.unet.in_channels == 6
    stage = VQ.replace(ch_mult=(1, 2, 2), attention_levels=())
    model = make(stage, UNetConfig(6, 3, 32, (1, 2), 1, (2,), head_dim=8, num_groups=8), released.conditioner, image_size=32, scale_factor=1.0)
    read = model.net.conditioner
    assert isinstance(read, LowResConditioner) and (read.c_dim, read.concat_channels) == (None, 3) and not any(p.numel() for p in read.parameters())
    low, z, t = torch.rand(2, 3, 8, 8) * 2 - 1, torch.randn(2, 3, 8, 8), torch.tensor([5, 900])
    condition = read({"low_res": low})
    assert torch.equal(model.net.denoise(z, t, condition), model.net.unet(torch.cat([z, low], 1), t)) and condition.c is None
    assert read.null(2).c is None and model.sample(list(low), steps=2).shape == (2, 3, 32, 32)
    W.save_compvis(model, tmp_path / "m.safetensors")
    assert not [name for name in load_file(tmp_path / "m.safetensors") if name.startswith("cond_stage_model") and "nothing" not in name]
    done = C.convert_model(tmp_path / "m.safetensors", tmp_path / "x", recipe=model.config)
    assert torch.equal(load(tmp_path / "x").sample(list(low), steps=2), model.sample(list(low), steps=2)) and done.tensors == len(model.state_dict())
    with pytest.raises(ValueError, match="condition: got LowResConditioner"):
        C.convert_model(tmp_path / "x", tmp_path / "y", "diffusers")


def test_a_tokenizer_that_is_not_at_hand_is_asked_for(tmp_path, clip, monkeypatch, capsys):
    """Never made up and never left out in silence: the weights in the file, the words in a folder, both in what is written."""
    model = text_model(clip, schedule=F.ScheduleConfig("scaled_linear", 1000, 0.00085, 0.012), scale_factor=0.18215)
    for module in (W, F):
        monkeypatch.setitem(module.UNETS, "small", model.config.unet)
        monkeypatch.setitem(module.AUTOENCODERS, "small-kl", KL)
    monkeypatch.setitem(F.RELEASED, "small", F.Released("small", "small-kl", "frozen-text", 0.00085, 0.012, 0.18215, 16, 7.5))
    compvis_file(model, tmp_path / "m.ckpt")
    ask = ["convert", "--from", str(tmp_path / "m.ckpt"), "--out", str(tmp_path / "x")]
    assert cli.main(ask) == 2 and "encoder: got none, expected for 'small' a folder" in capsys.readouterr().err
    words = shutil.copytree(clip, tmp_path / "words")
    (words / "vocab.json").unlink()
    assert cli.main([*ask, "--encoder", str(words)]) == 2 and "expected vocab.json and merges.txt" in capsys.readouterr().err
    shutil.copy(clip / "vocab.json", words), (words / "model.safetensors").unlink()
    found = I.inspect_model(tmp_path / "m.ckpt", encoder=words)
    assert found.facts["config"] == "small, by the names and shapes of its UNet" and found.parts["condition"].tensors == 36
    save(model, tmp_path / "recipe")
    assert cli.main([*ask, "--encoder", str(words), "--config", str(tmp_path / "recipe")]) == 0
    shutil.rmtree(words), shutil.rmtree(clip)
    assert torch.equal(load(tmp_path / "x").sample(PROMPTS, steps=2), model.sample(PROMPTS, steps=2))


def test_files_that_are_something_else_are_refused(tmp_path, clip):
    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save({"state_dict": {UNET + "x": torch.ones(1)}, "y": Payload()}, tmp_path / "evil.ckpt")
    for source, message in ((tmp_path / "evil.ckpt", "refused before anything was called"), (clip / "model.safetensors", "a text encoder alone"), (tmp_path / "none.ckpt", "got no file or folder"),
                            (clip, "holds|expected|kind"), (tmp_path, "got a folder with neither model_index.json nor config.json")):
        with pytest.raises(ValueError, match=message):
            C.convert_model(source, tmp_path / "x")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "x").exists()


# ------------------------------------------------------------------------------------------------ diffusers' folders, first stages alone
def test_parts_without_a_place_are_told_or_refused(tmp_path):
    pipe = wrote(make(), tmp_path, "diffusers")
    index = json.loads((pipe / "model_index.json").read_text())
    (pipe / "model_index.json").write_text(json.dumps({**index, "safety_checker": ["x", "Checker"], "feature_extractor": [None, None]}))
    found = I.inspect_model(pipe)
    assert [what for what in found.left if "safety_checker" in what] and not [what for what in found.left if "feature_extractor" in what]
    assert any("the sampler DDIMScheduler" in what for what in found.left)
    (pipe / "model_index.json").write_text(json.dumps({**index, "text_encoder_2": ["transformers", "CLIPTextModel"]}))
    with pytest.raises(ValueError, match="got text_encoder_2 in a LDMPipeline, expected no parts but unet, .*: they would be lost"):
        C.convert_model(pipe, tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("config", [KL, VQ], ids=["kl", "vq"])
def test_a_first_stage_alone(tmp_path, config, monkeypatch, capsys):
    model = make(config)
    stage = model.first_stage
    pipe = wrote(model, tmp_path, "diffusers")
    place = pipe / "vqvae"  # a pipeline without text calls it so, whatever it is
    C.convert_model(place, tmp_path / "a")
    assert same_weights(load_first_stage(tmp_path / "a"), stage) and "the scale factor 0.7: a first stage of ours has none" in I.inspect_model(place).left[0]
    C.convert_model(tmp_path / "a", tmp_path / "b.safetensors", "compvis", dtype="float16")
    with pytest.raises(ValueError, match="config: got none, and it is unknown: its first stage is that of none that we know"):
        C.convert_model(tmp_path / "b.safetensors", tmp_path / "c")
    for recipe in (tmp_path / "a", model.config):
        C.convert_model(tmp_path / "b.safetensors", tmp_path / "c", recipe=recipe, overwrite=True)
        assert all(torch.equal(x, stage.state_dict()[name].half().float()) for name, x in load_first_stage(tmp_path / "c").state_dict().items())
    monkeypatch.setitem(W.AUTOENCODERS, "small-stage", config)
    torch.save({"state_dict": {**stage.state_dict(), "loss.logvar": torch.zeros(())}, "epoch": 3}, tmp_path / "d.ckpt")
    found = I.inspect_model(tmp_path / "d.ckpt")
    assert found.facts["config"].startswith("small-stage, by") and found.left == ("epoch, of its training", "1 tensors of the losses that it was trained with")
    assert same_weights(found.open(), stage)
    for source, to, message in ((tmp_path / "a", "diffusers", "to: got diffusers for a first stage alone"), (pipe / "unet", "ours", "got a UNet2DModel alone")):
        assert cli.main(["convert", "--from", str(source), "--to", to, "--out", str(tmp_path / "x")]) == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "x").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", ["scenes-text", "scenes-layout", "scenes-semantic"])
def test_conditions_that_diffusers_has_no_class_for_are_refused(tmp_path, name, capsys):
    assert cli.main(["convert", "--from", name, "--to", "diffusers", "--out", str(tmp_path / "x")]) == 2
    assert "condition: got" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_averages_of_a_codebook_are_told(tmp_path):
    model = make(VQ.replace(codebook_decay=0.9))
    done = C.convert_model(wrote(model, tmp_path, "ours"), tmp_path / "p", "diffusers")
    assert done.left == ("2 averages of the codebook, which only training needs",)
    kept = C.convert_model(tmp_path / "m", tmp_path / "n")
    assert kept.left == () and same_weights(load(tmp_path / "n"), model)


def test_what_a_file_cannot_say_is_told(tmp_path, clip):
    model = text_model(clip, prediction="v")
    model.card = {"steps": 3, "batch_size": 2, "minutes": 1, "hardware": "a pencil"}
    save(model, tmp_path / "m")
    told = C.convert_model(tmp_path / "m", tmp_path / "m.safetensors", "compvis").tell()
    for words in ("prediction 'v'", "the tokenizer of 56 pieces", "its card: how it was trained"):
        assert words in told, words
    told = C.convert_model(tmp_path / "m", tmp_path / "p", "diffusers").tell()
    assert "the guidance scale 7.5" in told and "tokenizer" not in told
    assert load(C.convert_model(tmp_path / "m", tmp_path / "n", dtype="bfloat16").out).card == {**model.card, "converted_from": "m", "dtype": "bfloat16"}


# ------------------------------------------------------------------------------------------------ whole or not at all, and never over something else
@pytest.mark.parametrize("to", I.TARGETS)
def test_a_killed_conversion_leaves_nothing_that_looks_whole(tmp_path, to):
    source, out = wrote(make(), tmp_path, "ours"), tmp_path / "out" / NAMES[to]
    code = ("import sys, time; from ldm_edu import convert as C\n"
            "C._put = lambda *a: (print('written', flush=True), time.sleep(100))\n"
            "C.convert_model(sys.argv[1], sys.argv[2], sys.argv[3])")
    with subprocess.Popen([sys.executable, "-c", code, str(source), str(out), to], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline().strip() == "written"
        process.send_signal(signal.SIGKILL)
    left = list((tmp_path / "out").iterdir())
    assert not out.exists() and len(left) == 1 and left[0].name.startswith(f".{NAMES[to]}.") and left[0].name.endswith(".part")
    with pytest.raises(ValueError, match="got no file or folder"):
        I.layout_of(out)
    C.convert_model(source, out, to)  # is not in the way
    assert same_weights(opened(out, to, load(source).config), load(source))


@pytest.mark.parametrize("to", I.TARGETS)
def test_nothing_is_replaced_unless_asked(tmp_path, to, monkeypatch, capsys):
    source, out = wrote(make(), tmp_path / "source", "ours"), tmp_path / NAMES[to]
    other = wrote(make(seed=1), tmp_path / "other", "ours")
    ask = ["convert", "--to", to, "--out", str(out), "--from"]
    assert cli.main([*ask, str(source)]) == 0
    capsys.readouterr()
    assert cli.main([*ask, str(other)]) == 2 and f"{out} exists: choose another --out, or pass --overwrite to replace it" in capsys.readouterr().err
    real = C._read_back

    def full(*arguments):
        raise OSError("no space left on device")

    monkeypatch.setattr(C, "_read_back", full)
    with pytest.raises(OSError, match="no space"):
        C.convert_model(other, out, to, overwrite=True)
    monkeypatch.setattr(C, "_read_back", real)
    config = load(source).config
    assert same_weights(opened(out, to, config), load(source)) and not list(tmp_path.glob(".*"))
    assert cli.main([*ask, str(other), "--overwrite"]) == 0 and same_weights(opened(out, to, config), load(other)) and not list(tmp_path.glob(".*"))
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "chapter.txt").write_text("years of work")
    assert cli.main(["convert", "--to", to, "--out", str(thesis), "--from", str(source), "--overwrite"]) == 2
    assert (thesis / "chapter.txt").read_text() == "years of work"
    if to == "ours":
        with pytest.raises(ValueError, match="which is what is read"):
            C.convert_model(source, source, overwrite=True)


@pytest.mark.parametrize("to", I.TARGETS)
def test_what_does_not_read_back_is_not_put_there(tmp_path, to, monkeypatch, capsys):
    """One number of one tensor, changed between writing and reading, ends in exit code 1 and an empty place."""
    source, real = wrote(make(), tmp_path, "ours"), C._write

    def faulty(model, part, *rest):
        real(model, part, *rest)
        file = next(part.rglob("*.safetensors"))
        state = load_file(file)
        name = max(state, key=lambda key: state[key].numel())
        state[name].view(-1)[7] += 1e-3
        save_file(state, file)

    monkeypatch.setattr(C, "_write", faulty)
    assert cli.main(["convert", "--from", str(source), "--to", to, "--out", str(tmp_path / "out" / NAMES[to])]) == 1
    assert "1 of 226 tensors did not read back" in capsys.readouterr().err.replace(f"of {len(C.all_tensors(load(source)))} ", "of 226 ")
    assert not list((tmp_path / "out").iterdir())


# ------------------------------------------------------------------------------------------------ the command
def test_a_dry_run_says_what_is_there_and_writes_nothing(tmp_path, both, capsys):
    path, last, _ = both
    before = files_of(tmp_path)
    assert cli.main(["convert", "--from", str(path), "--dry-run", "--out", str(tmp_path / "x")]) == 2
    out, err = capsys.readouterr()
    numbers = sum(x.numel() for x in last.net.unet.state_dict().values())
    for words in ("the original's, wrapped in a state_dict", "both averaged and last weights: choose", f"{numbers:,} numbers, float32", "unknown: its UNet is that of none that we know"):
        assert words in out, words
    assert "ema: got no choice" in err and "config: got none" in err and files_of(tmp_path) == before
    for name in ("scenes-text", "scenes-kl-f4"):
        assert cli.main(["convert", "--from", name, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "ours, latent-diffusion" in out and "ours, first-stage" in out and "heads of 28 channels" in out and "steps of" in out


@pytest.mark.parametrize("options, message", [
    ([], "--from: got nothing"), (["--from", "nowhere"], "nowhere: got no file or folder, expected .*scenes-text"), (["--from", "scenes-text", "--to", "onnx"], "to: got 'onnx', expected one of 'ours'"),
    (["--from", "scenes-text", "--dtype", "int8"], "dtype: got 'int8'"), (["--from", "scenes-text", "--ema", "perhaps"], "ema: got 'perhaps', expected one of 'yes', 'no'"),
    (["--from", "scenes-text", "--ema", "yes"], "ema: got a choice for scenes-text, a folder"), (["--from", "scenes-text", "--to", "compvis"], r"expected a file that ends in .safetensors"),
])
def test_bad_requests_exit_with_2_and_a_sentence(tmp_path, capsys, options, message):
    import re

    assert cli.main(["convert", *options, "--out", str(tmp_path / "x")]) == 2
    assert re.search(message, capsys.readouterr().err) and not list(tmp_path.iterdir())


def test_types_without_fractions_are_refused_and_leave_the_weights():
    model = make()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    for dtype in (torch.int8, torch.bool, "float16"):
        with pytest.raises(ValueError, match=f"dtype: got {dtype!r}, expected a floating point type such as torch.float32"):
            C.round_weights(model, dtype)
    assert not C.differing(before, model.state_dict())


def test_states_differ_by_their_bits():
    zero, number = torch.tensor([0.0, 1.0]), torch.tensor(float("nan"))
    assert C.differing({"a": zero}, {"a": torch.tensor([-0.0, 1.0])}) == ["a"]
    assert C.differing({"a": zero}, {"a": zero[None]}) == C.differing({"a": zero}, {"a": zero.half()}) == C.differing({"a": zero}, {}) == ["a"]
    grid = torch.arange(6.0).reshape(2, 3)
    assert not C.differing({"n": number, "t": grid.T, "e": torch.zeros(0, 2)}, {"n": number.clone(), "t": grid.T.contiguous(), "e": torch.zeros(0, 2)})


def test_an_unknown_layout_is_named(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with pytest.raises(ValueError, match="to: got 'onnx', expected one of 'ours', 'diffusers', 'compvis'"):
        C.check_out(tmp_path / "full", "onnx", tmp_path / "none", False)


@pytest.mark.parametrize("name, said, got", [("config.json", "5", "int"), ("config.json", "[]", "list"), ("model_index.json", "[]", "list")])
def test_json_that_is_no_object_is_named(tmp_path, name, said, got):
    (tmp_path / name).write_text(said)
    with pytest.raises(ValueError, match=f"{name}: got JSON of type {got}, expected an object with names"):
        I.inspect_model(tmp_path)
    if name == "config.json":
        with pytest.raises(ValueError, match=f"{name}: got JSON of type {got}, expected an object with names"):
            I.read_recipe(tmp_path / name)


def test_a_recipe_is_not_made_up(tmp_path):
    for said in ({"unet": 1}, 5, [], ""):
        with pytest.raises(ValueError, match="config: got .*, expected a config.json of this library, its folder, or one of celeba256"):
            I.read_recipe(said)
    for values, got in (({}, "None"), ({"kind": "perceptual"}, "'perceptual'")):
        (tmp_path / "config.json").write_text(json.dumps(values))
        with pytest.raises(ValueError, match=f"config.json: kind: got {got}, expected one of 'first-stage', 'latent-diffusion'"):
            I.read_recipe(tmp_path / "config.json")
    config = find_model("scenes-text") / "config.json"
    values = {name: value for name, value in json.loads(config.read_text()).items() if name not in ("kind", "shared_first_stage")}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert I.read_recipe(tmp_path / "config.json") == I.read_recipe(config), "what `to_dict` gives says no kind"
    torch.save({"state_dict": 5}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="x.ckpt: got a state_dict of type int, expected tensors by name"):
        I.inspect_model(tmp_path / "x.ckpt")
