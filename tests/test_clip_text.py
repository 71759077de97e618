"""CLIP's text encoder and tokenizer: number for number those of transformers, causal, strict about what they are given."""
import json

import pytest
import torch
from diffusers_maps import randomise
from torch.testing import assert_close

from ldm_edu.clip_text import ClipText, ClipTextConfig, ClipTokenizer, clip_weights

TEXTS = ["A red  circle and a Blue square", "it's 1234 reds!!! ...", "naïve café – ünï\n\ttab", "日本 emoji 😀", "", " ", "red,blue;and-red", "don't WE'LL", "a_b  c"]
MERGES = [("r", "e"), ("re", "d</w>"), ("c", "i"), ("ci", "r"), ("a", "n"), ("an", "d</w>"), ("b", "l"), ("bl", "u"), ("blu", "e</w>"), ("'", "s</w>")]


def byte_letters():
    """The 256 letters that byte-level pieces are made of: printable bytes as they are, the others moved up."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in plain] + [chr(256 + i) for i in range(256 - len(plain))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    letters = byte_letters()
    pieces = [*letters, *(c + "</w>" for c in letters), *("".join(pair) for pair in MERGES), ClipTokenizer.start, ClipTokenizer.end]
    place = tmp_path_factory.mktemp("clip")
    (place / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}), encoding="utf-8")
    (place / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in MERGES), encoding="utf-8")
    return place


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_tokens_are_those_of_transformers(activation):
    transformers = pytest.importorskip("transformers", reason="needs transformers, which `make test` installs")
    ours = randomise(ClipText(ClipTextConfig(60, 32, 3, 4, 64, 20, activation))).eval()
    theirs = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=20,
        hidden_act=activation, bos_token_id=58, eos_token_id=59)).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    for n in (20, 7, 1):
        ids = torch.randint(60, (3, n), generator=torch.Generator().manual_seed(n))
        with torch.no_grad():
            assert_close(ours(ids), theirs(input_ids=ids).last_hidden_state, atol=1e-5, rtol=0)


def test_an_encoder_of_one_layer_by_hand():
    """Embeddings, norm, attention that looks back, norm, two layers with OpenAI's bend, and the last norm [CLIP sec. 2.4]."""
    model = randomise(ClipText(ClipTextConfig(20, 8, 1, 2, 16, 6))).eval()
    w, ids = model.state_dict(), torch.tensor([[3, 19, 0, 7]])

    def norm(x, name):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{layer}.{name}.weight"].T + w[f"{layer}.{name}.bias"]

    layer = "encoder.layers.0"
    x = w["embeddings.token_embedding.weight"][ids[0]] + w["embeddings.position_embedding.weight"][:4]
    h = norm(x, f"{layer}.layer_norm1")
    q, k, v = (linear(h, f"self_attn.{name}_proj") for name in "qkv")
    read = []
    for part in (slice(0, 4), slice(4, 8)):
        scores = q[:, part] @ k[:, part].T / 2
        read.append(torch.stack([scores[i, : i + 1].softmax(0) @ v[: i + 1, part] for i in range(4)]))
    x = x + linear(torch.cat(read, 1), "self_attn.out_proj")
    wide = linear(norm(x, f"{layer}.layer_norm2"), "mlp.fc1")
    x = x + linear(wide / (1 + torch.exp(-1.702 * wide)), "mlp.fc2")
    assert_close(model(ids)[0], norm(x, "final_layer_norm"), atol=1e-5, rtol=1e-5)


def test_size_of_stable_diffusion_s_encoder():
    with torch.device("meta"):
        model = ClipText(ClipTextConfig())
    assert sum(p.numel() for p in model.parameters()) == 123_060_480 and len(model.state_dict()) == 196


def test_a_token_reads_only_what_stands_before_it():
    model = randomise(ClipText(ClipTextConfig(20, 16, 2, 2, 32, 8))).eval()
    ids = torch.arange(8)[None]
    with torch.no_grad():
        before, after = model(ids), model(ids.clone().index_fill_(1, torch.tensor([5]), 19))
    assert torch.equal(before[:, :5], after[:, :5]) and (before[:, 5:] - after[:, 5:]).abs().amax(-1).min() > 1e-4


def test_bad_sizes_and_numbers_are_named():
    model = ClipText(ClipTextConfig(20, 16, 1, 2, 32, 8))
    for ids in (torch.zeros(1, 9, dtype=torch.int64), torch.tensor([[20]]), torch.tensor([[-1]])):
        with pytest.raises(ValueError, match="expected at most 8 below 20"):
            model(ids)
    with pytest.raises(ValueError, match="divide the width"):
        ClipTextConfig(width=10, heads=3)
    with pytest.raises(ValueError, match="quick_gelu.*gelu"):
        ClipTextConfig(activation="relu")


def test_pieces_are_those_of_transformers(folder, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs transformers, which `make test` installs")
    theirs = transformers.CLIPTokenizer.from_pretrained(str(folder))
    theirs(TEXTS[0], padding="max_length", max_length=40, truncation=True)  # leaves its padding in the file that it writes
    theirs.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").exists() and not (tmp_path / "vocab.json").exists()
    for ours in (ClipTokenizer.from_folder(folder), ClipTokenizer.from_folder(tmp_path)):
        for text in TEXTS:
            assert ours(text) == theirs(text).input_ids, text


def test_rows_are_padded_by_the_end_mark(folder):
    tokenizer = ClipTokenizer.from_folder(folder)
    end = tokenizer.vocabulary[tokenizer.end]
    rows = tokenizer.rows(["red", "red and blue"], 8)
    assert rows.shape == (2, 8) and rows.dtype == torch.int64 and rows[0].tolist() == [tokenizer.vocabulary[tokenizer.start], tokenizer.vocabulary["red</w>"], *[end] * 6]
    assert tokenizer.rows([], 8).shape == (0, 8)
    with pytest.raises(ValueError, match="'red red red' has 5 tokens with start and end, expected at most 4"):
        tokenizer.rows(["red red red"], 4)


def test_broken_folders_are_named(folder, tmp_path):
    with pytest.raises(ValueError, match="expected vocab.json and merges.txt"):
        ClipTokenizer.from_folder(tmp_path)
    (tmp_path / "vocab.json").write_text("{")
    with pytest.raises(ValueError, match="expected vocab.json and merges.txt"):
        ClipTokenizer.from_folder(tmp_path)
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(ValueError, match="startoftext"):
        ClipTokenizer.from_folder(tmp_path)
    (tmp_path / "vocab.json").write_text((folder / "vocab.json").read_text())
    (tmp_path / "merges.txt").write_text("one_piece_alone\n")
    with pytest.raises(ValueError, match="merges.txt"):
        ClipTokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("prefix", ["cond_stage_model.transformer.text_model.", "transformer.text_model.", "text_model.", ""])
def test_names_of_all_who_saved_it(prefix):
    model = ClipText(ClipTextConfig(20, 16, 1, 2, 32, 8))
    found = clip_weights({**{prefix + name: x for name, x in model.state_dict().items()}, prefix + "embeddings.position_ids": torch.arange(8)[None],
                          "logit_scale": torch.ones(()), "vision_model.post_layernorm.bias": torch.ones(3), "text_projection.weight": torch.ones(2, 2)})
    model.load_state_dict(found, strict=True)


@pytest.mark.parametrize("pad", ["!", {"content": "!", "lstrip": False}])
@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_other_padding_is_refused(tmp_path, file, pad):
    """Stable Diffusion 2 pads with "!": the UNet would read other tokens than it was trained with."""
    words = {mark: i for i, mark in enumerate(("!", "!</w>", ClipTokenizer.start, ClipTokenizer.end))}
    (tmp_path / "vocab.json").write_text(json.dumps(words)), (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / file).write_text(json.dumps({"pad_token": ClipTokenizer.end}))
    assert ClipTokenizer.from_folder(tmp_path).rows(["!"], 4).tolist() == [[2, 1, 3, 3]]
    (tmp_path / file).write_text(json.dumps({"pad_token": pad}))
    with pytest.raises(ValueError, match=f"{file}: got padding by '!', expected '<|endoftext|>'".replace("|", r"\|")):
        ClipTokenizer.from_folder(tmp_path)
