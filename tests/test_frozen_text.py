"""A frozen CLIP text encoder behind the contract of conditioners: equal to transformers, outside of the model, never another one."""
import builtins
import json

import pytest
import torch
from torch.testing import assert_close

import ldm_edu
from ldm_edu import ldm as L
from ldm_edu.autoencoder import AutoencoderConfig
from ldm_edu.cli import main
from ldm_edu.conditioning import make_conditioner
from ldm_edu.frozen_text import FrozenTextConditioner, FrozenTextConfig, load_clip
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
    read({"caption": ["a red circle"]}).c.sum().backward()
    assert read.pool.weight.grad is not None and all(p.grad is None and not p.requires_grad for p in read._encoder[0].parameters())
    told = read.bfloat16()({"caption": ["a"]})
    assert told.context.dtype == told.c.dtype == torch.bfloat16 and read._encoder[0].dtype == torch.float32  # the encoder keeps its own


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


def test_pickles_are_not_read(clip, tmp_path):
    folder = make_clip(tmp_path / "pickled")
    torch.save(transformers.CLIPTextModel.from_pretrained(str(folder)).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="safetensors"):
        load_clip(str(folder))


def test_without_transformers_one_sentence_says_so(clip, monkeypatch):
    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", lambda name, *rest: (_ for _ in ()).throw(ImportError(name)) if name == "transformers" else real(name, *rest))
    with pytest.raises(RuntimeError, match="pip install transformers"):
        reader(clip)


def test_train_and_sample_by_command(clip, tmp_path, capsys):
    clip = make_clip(tmp_path / "clip", positions=77)
    train = ["train", "--recipe", "text-demo", "--items", "48", "--steps", "4", "--batch-size", "8", "--out", str(tmp_path / "run")]
    assert main([*train, "--text-encoder", str(clip)]) == 0
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["conditioner"]["name"] == "frozen-text"
    assert "net.conditioner.pool.weight" in ldm_edu.load(tmp_path / "run").state_dict()  # as the recipe says
    assert main(["sample", "a red circle", "--model", str(tmp_path / "run"), "--steps", "2", "--out", str(tmp_path / "pictures")]) == 0
    assert main(["train", "--recipe", "class-tiny", "--text-encoder", str(clip), "--out", str(tmp_path / "other")]) == 2
    assert "expected a recipe that reads text" in capsys.readouterr().err
