"""A frozen CLIP text encoder behind the contract of conditioners: equal to transformers, outside of the model, never another one."""
import json
import os
import shutil

import pytest
import torch
from torch.testing import assert_close

import ldm_edu
from ldm_edu import ldm as L
from ldm_edu.autoencoder import AutoencoderConfig
from ldm_edu.checkpoint import state_hash
from ldm_edu.cli import main
from ldm_edu.conditioning import make_conditioner
from ldm_edu.frozen_text import FrozenTextConditioner, FrozenTextConfig, clip_config, find_clip, load_clip, save_clip
from ldm_edu.unet import UNetConfig

transformers = pytest.importorskip("transformers", reason="needs transformers, which `make test` installs")
PIECES = [*"abcdefghijklmnopqrstuvwxyz", *(c + "</w>" for c in "abcdefghijklmnopqrstuvwxyz"), "<|startoftext|>", "<|endoftext|>"]


def make_clip(folder, width=16, seed=0, positions=24):
    """A folder with a small CLIP text encoder of random weights and a tokenizer of letters."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(PIECES)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    torch.manual_seed(seed)
    transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=len(PIECES), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=positions, bos_token_id=len(PIECES) - 2, eos_token_id=len(PIECES) - 1, pad_token_id=len(PIECES) - 1)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return make_clip(tmp_path_factory.mktemp("clip") / "encoder")


def reader(clip, **options):
    torch.manual_seed(0)
    return FrozenTextConditioner(FrozenTextConfig(str(clip), **{"max_length": 24, **options}))


def test_tokens_are_those_of_transformers(clip):
    read, captions = reader(clip, masked=True, pooled=True), ["a red circle", "ring", "a b c d e"]
    told = read({"caption": captions})
    tokenizer, own = transformers.CLIPTokenizer.from_pretrained(str(clip)), transformers.CLIPTextModel.from_pretrained(str(clip)).eval()
    given = tokenizer(captions, padding="max_length", max_length=24, return_tensors="pt")
    with torch.no_grad():
        out = own(input_ids=given.input_ids)
    assert_close(told.context, out.last_hidden_state)
    assert torch.equal(told.context_mask, given.attention_mask.bool())
    assert_close(told.c, read.pool(out.pooler_output))
    assert reader(clip)({"caption": captions}).context_mask is None  # padding is read unless it is hidden


def test_cached_token_numbers_say_the_same(clip):
    read, captions = reader(clip), ["a red circle", "ring"]
    ids = read.tensors({"caption": captions})["token_ids"]
    assert ids.dtype == torch.int32 and ids.shape == (2, 24)
    assert_close(read({"token_ids": ids}).context, read({"caption": captions}).context)
    with pytest.raises(ValueError, match="token_ids"):
        read({"token_ids": ids[:, :5]})


def test_the_null_is_the_empty_caption(clip):
    read = reader(clip, masked=True, pooled=True)
    null, empty = read.null(3), read({"caption": [""]})
    assert len(null) == 3 and null.context_mask.sum(1).tolist() == [2, 2, 2]
    for part in ("context", "c"):
        assert_close(getattr(null, part)[2], getattr(empty, part)[0])


def test_the_encoder_is_no_part_of_the_model(clip):
    read = reader(clip, pooled=True)
    assert sorted(read.state_dict()) == ["anchor", "pool.bias", "pool.weight"]
    assert sorted(name for name, _ in read.requires_grad_(True).named_parameters()) == ["pool.bias", "pool.weight"]  # each gets a gradient, as DDP demands
    assert reader(clip).device.type == "cpu" and reader(clip).to("meta").device.type == "meta"
    read({"caption": ["a red circle"]}).c.sum().backward()
    assert read.pool.weight.grad is not None and all(p.grad is None and not p.requires_grad for p in read._encoder[0].parameters())
    told = read.bfloat16()({"caption": ["a"]})
    assert told.context.dtype == told.c.dtype == torch.bfloat16 and next(read._encoder[0].parameters()).dtype == torch.float32  # the encoder keeps its own


def test_a_model_finds_its_encoder_again_and_refuses_another(clip, tmp_path):
    mine = make_clip(tmp_path / "mine", seed=3)
    read = reader(mine)
    unet = UNetConfig(4, 4, 8, (1,), 1, (1,), head_dim=8, num_groups=4, context_dim=read.context_dim)
    model = L.build(L.LDMConfig(AutoencoderConfig(4, 8, (1, 2, 2), 1, mid_attention=False, num_groups=4), unet, read.to_dict(), image_size=16))
    L.save(model, tmp_path / "model")
    assert not any("encoder" in name for name in model.net.conditioner.state_dict()) and read.config.mark
    again = ldm_edu.load(tmp_path / "model")
    assert_close(again.sample(["a ring"], steps=2), model.eval().sample(["a ring"], steps=2))
    make_clip(mine, seed=4)
    with pytest.raises(ValueError, match="expected .*, which this model was trained with"):
        ldm_edu.load(tmp_path / "model")
    for file in mine.iterdir():
        file.unlink()
    with pytest.raises(ValueError, match="a folder with its config.json"):
        make_conditioner(read.to_dict())


def test_bad_requests_are_named(clip, tmp_path):
    read = reader(clip)
    for prompts, message in (("a ring", "expected a list"), (["a", " "], "is empty"), (["a", 3], "got int"),
                             (["abcdefghijklmnopqrstuvwxyz"], "28 tokens with start and end, expected at most 24")):
        with pytest.raises(ValueError, match=message):
            read.prepare(prompts)
    with pytest.raises(ValueError, match="max_length: got 25, expected 3 to 24"):
        reader(clip, max_length=25)
    with pytest.raises(ValueError, match="text encoder '.*nowhere'"):
        load_clip(str(tmp_path / "nowhere"))


def test_an_incomplete_encoder_is_refused(clip, tmp_path):
    """Its missing weights would be random, and other ones each time."""
    from safetensors.torch import load_file, save_file

    folder = make_clip(tmp_path / "cut")
    state = load_file(folder / "model.safetensors")
    save_file(dict(list(state.items())[:5]), folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{len(state) - 5} tensors are missing"):
        load_clip(str(folder))


def same(name, other) -> bool:
    """Whether two names lead to one encoder and one tokenizer."""
    (ours, words), (theirs, terms) = load_clip(str(name)), load_clip(str(other))
    return state_hash(ours) == state_hash(theirs) and ours.config == theirs.config and words("a red ring") == terms("a red ring")


def test_the_mark_is_the_hash_of_the_weights_whoever_reads_them(clip):
    own = transformers.CLIPTextModel.from_pretrained(str(clip))
    assert reader(clip).config.mark == state_hash(dict(own.named_parameters()))


def test_a_pickle_is_read_by_the_restricted_reader(clip, tmp_path):
    folder = make_clip(tmp_path / "pickled")
    state = transformers.CLIPTextModel.from_pretrained(str(folder)).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save({f"text_model.{name}": x for name, x in state.items()} | {"text_model.embeddings.position_ids": torch.arange(24)[None]}, folder / "pytorch_model.bin")
    assert same(folder, clip)

    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save({**state, "x": Payload()}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="refused before anything was called"):
        load_clip(str(folder))
    assert not (tmp_path / "ran").exists()


def test_half_precision_is_read_as_float32(clip, tmp_path):
    folder = make_clip(tmp_path / "half")
    transformers.CLIPTextModel.from_pretrained(str(folder)).half().save_pretrained(folder)
    encoder = load_clip(str(folder))[0]
    exact = load_clip(str(clip))[0].state_dict()
    for name, x in encoder.state_dict().items():
        assert x.dtype == torch.float32 and torch.equal(x, exact[name].half().float()), name


def test_the_text_half_of_a_whole_clip(clip, tmp_path):
    values = json.loads((clip / "config.json").read_text())
    text = {key: values[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings",
                                         "bos_token_id", "eos_token_id", "hidden_act")}
    image = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    torch.manual_seed(0)
    whole = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=image)).eval()
    shutil.copytree(clip, tmp_path / "whole")
    (tmp_path / "whole" / "model.safetensors").unlink()
    whole.save_pretrained(tmp_path / "whole")
    assert "text_config" in json.loads((tmp_path / "whole" / "config.json").read_text())
    encoder, tokenizer = load_clip(str(tmp_path / "whole"))
    ids = tokenizer.rows(["a red ring"], 24)
    with torch.no_grad():
        assert_close(encoder(ids), whole.text_model(input_ids=ids).last_hidden_state)


def test_a_pipeline_s_folder_and_several_files(clip, tmp_path):
    pipe, many = tmp_path / "pipe", tmp_path / "many"
    shutil.copytree(clip, many)
    (many / "model.safetensors").unlink()
    transformers.CLIPTextModel.from_pretrained(str(clip)).save_pretrained(many, max_shard_size="5KB")
    assert (many / "model.safetensors.index.json").is_file() and same(many, clip)
    for part, names in (("text_encoder", ("config.json", "model.safetensors")), ("tokenizer", ("vocab.json", "merges.txt"))):
        (pipe / part).mkdir(parents=True)
        for name in names:
            shutil.copy(clip / name, pipe / part / name)
    assert same(pipe, clip)


def test_the_hub_is_asked_for_what_is_needed_and_no_more(clip, tmp_path, monkeypatch):
    import fnmatch

    import huggingface_hub

    hub, asked = tmp_path / "hub", []
    shutil.copytree(clip, hub)
    (hub / "tf_model.h5").write_text("")
    (hub / "unet").mkdir()
    (hub / "unet" / "config.json").write_text("")

    def snapshot(name, allow_patterns):
        asked.append(name)
        for file in (p for p in hub.rglob("*") if p.is_file()):
            if any(fnmatch.fnmatch(file.relative_to(hub).as_posix(), pattern) for pattern in allow_patterns):
                shutil.copy(file, tmp_path / "cache" / file.name)
        return str(tmp_path / "cache")

    (tmp_path / "cache").mkdir()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert same("somebody/clip", clip) and set(asked) == {"somebody/clip"} and len(asked) == 1
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == ["config.json", "merges.txt", "model.safetensors", "vocab.json"]
    (hub / "model.safetensors").rename(hub / "pytorch_model.bin")
    (tmp_path / "cache" / "model.safetensors").unlink()
    find_clip("somebody/clip")
    assert len(asked) == 3 and (tmp_path / "cache" / "pytorch_model.bin").is_file()


def test_without_the_hub_one_sentence_says_so(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="text encoder 'nobody/nothing': expected .*no such folder, and the hub did not give it"):
        load_clip("nobody/nothing")


def test_configs_of_other_networks_are_refused(clip):
    values = json.loads((clip / "config.json").read_text())
    assert clip_config({"text_config": values, "model_type": "clip"}) == clip_config(values)
    for change, message in (({"model_type": "t5"}, "model_type 't5'"), ({"layer_norm_eps": 1e-6}, "layer_norm_eps 1e-06"), ({"hidden_act": "relu"}, "quick_gelu")):
        with pytest.raises(ValueError, match=message):
            clip_config({**values, **change})
    with pytest.raises(ValueError, match="got no num_attention_heads, hidden_act"):
        clip_config({key: value for key, value in values.items() if key not in ("num_attention_heads", "hidden_act")})


def test_a_tokenizer_of_another_encoder_is_refused(clip, tmp_path):
    shutil.copytree(clip, tmp_path / "mixed")
    pieces = json.loads((clip / "vocab.json").read_text())
    (tmp_path / "mixed" / "vocab.json").write_text(json.dumps({**pieces, "zz</w>": len(pieces) + 3}))
    with pytest.raises(ValueError, match=f"numbers up to {len(pieces) + 3}, expected below {len(pieces)}"):
        load_clip(str(tmp_path / "mixed"))


def test_weights_that_a_checkpoint_brings(clip, tmp_path):
    """They need the folder's tokenizer and config alone; where the folder has weights too, they must be the same."""
    words, exact = tmp_path / "words", load_clip(str(clip))[0].state_dict()
    shutil.copytree(clip, words)
    (words / "model.safetensors").unlink()
    brought = {f"transformer.text_model.{name}": x.half() for name, x in exact.items()}
    encoder = load_clip(str(words), brought)[0]
    assert all(torch.equal(x, exact[name].half().float()) for name, x in encoder.state_dict().items())
    assert same(clip, clip) and state_hash(load_clip(str(clip), brought)[0]) == state_hash(load_clip(str(clip))[0])  # the folder's, which are found again
    other = {**brought, "transformer.text_model.final_layer_norm.bias": torch.ones(16)}
    with pytest.raises(ValueError, match="1 of its tensors are not those of the checkpoint: it is another encoder"):
        load_clip(str(clip), other)
    with pytest.raises(ValueError, match="1 tensors are missing, for example final_layer_norm.bias"):
        load_clip(str(words), {name: x for name, x in brought.items() if "final_layer_norm.bias" not in name})
    (words / "config.json").unlink()
    with pytest.raises(ValueError, match="expected"):  # without a config it would be Stable Diffusion's, which this is not
        load_clip(str(words), brought)


def test_what_is_written_opens_in_transformers(clip, tmp_path):
    encoder, tokenizer = load_clip(str(clip))
    save_clip(encoder, tokenizer, tmp_path / "text_encoder", tmp_path / "tokenizer")
    assert same(tmp_path, clip)
    theirs, words = transformers.CLIPTextModel.from_pretrained(str(tmp_path / "text_encoder")).eval(), transformers.CLIPTokenizer.from_pretrained(str(tmp_path / "tokenizer"))
    ids = words(["a red ring"], padding="max_length", return_tensors="pt").input_ids
    assert torch.equal(ids, tokenizer.rows(["a red ring"], 24))
    with torch.no_grad():
        assert_close(encoder(ids), theirs(input_ids=ids).last_hidden_state)


def test_train_and_sample_by_command(clip, tmp_path, capsys):
    clip = make_clip(tmp_path / "clip", positions=77)
    train = ["train", "--recipe", "text-demo", "--items", "48", "--steps", "4", "--batch-size", "8", "--out", str(tmp_path / "run")]
    assert main([*train, "--text-encoder", str(clip)]) == 0
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["conditioner"]["name"] == "frozen-text"
    assert "net.conditioner.pool.weight" in ldm_edu.load(tmp_path / "run").state_dict()  # as the recipe says
    assert main(["sample", "a red circle", "--model", str(tmp_path / "run"), "--steps", "2", "--out", str(tmp_path / "pictures")]) == 0
    assert main(["train", "--recipe", "class-tiny", "--text-encoder", str(clip), "--out", str(tmp_path / "other")]) == 2
    assert "expected a recipe that reads text" in capsys.readouterr().err
