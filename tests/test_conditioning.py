"""Conditions and conditioners: shapes, padding, dropout, prompts and their errors, saving, and a user's own class."""
import json
import pickle
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader

from ldm_edu.conditioning import (
    CLS,
    CONDITIONERS,
    PAD,
    SEP,
    SPECIAL,
    UNK,
    CaptionTokenizer,
    ClassConditioner,
    ClassConfig,
    Condition,
    Conditioner,
    NoCondition,
    TextConditioner,
    TextConfig,
    check_prompts,
    make_conditioner,
    train_tokenizer,
)
from ldm_edu.core import Config

CAPTIONS = ["a red circle left of a blue square", "a small green star", "two striped rings, one above the other",
            "a yellow cross", "a large purple triangle below a red ring"]
WORDS = sorted({w for c in CAPTIONS for w in c.replace(",", " ,").split()})


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(CAPTIONS * 20, 256)


def text(tokenizer, seed=0, **options):
    torch.manual_seed(seed)
    return TextConditioner(TextConfig(**{"width": 32, "depth": 2, "heads": 2, "max_length": 16} | options), tokenizer).eval()


@pytest.fixture
def model(tokenizer):
    return text(tokenizer)


def some(b, n=3, masked=False, full=False, value=None):
    fill = (lambda *s: torch.randn(*s)) if value is None else (lambda *s: torch.full(s, float(value)))
    mask = (torch.arange(n) < torch.arange(1, b + 1)[:, None]) if masked else None
    return Condition(fill(b, n, 4), mask, fill(b, 5) if full else None, fill(b, 2, 6, 7) if full else None)


# ---------------------------------------------------------------- Condition

def test_condition_counts_rows():
    assert len(Condition()) == 0
    assert len(some(3)) == 3
    assert len(Condition(c=torch.zeros(2, 5))) == 2
    assert len(Condition(concat=torch.zeros(4, 1, 8, 8))) == 4


@pytest.mark.parametrize("parts, word", [
    ({"context": torch.zeros(2, 3)}, "context"),
    ({"context": torch.zeros(2, 3, 4), "c": torch.zeros(3, 4)}, "c:"),
    ({"context": torch.zeros(2, 3, 4), "context_mask": torch.ones(2, 4, dtype=torch.bool)}, "context_mask"),
    ({"context_mask": torch.ones(2, 4, dtype=torch.bool)}, "context_mask"),
    ({"context": torch.zeros(2, 3, 4), "context_mask": torch.ones(2, 3)}, "bool"),
    ({"concat": torch.zeros(2, 3, 4)}, "concat"),
])
def test_condition_refuses_parts_that_do_not_fit(parts, word):
    with pytest.raises((ValueError, TypeError), match=word):
        Condition(**parts)


def test_to_casts_floats_and_leaves_the_mask_bool():
    for moved in (some(2, masked=True, full=True).to("cpu", torch.float64), some(2, masked=True, full=True).to(torch.float64)):
        assert moved.context.dtype == moved.c.dtype == moved.concat.dtype == torch.float64
        assert moved.context_mask.dtype == torch.bool
    assert some(2).to(device="meta").context.device.type == "meta"
    assert some(2).to("cpu", non_blocking=True).context.dtype == torch.float32
    assert len(Condition().to("cpu")) == 0


def test_rows_slices_every_part():
    condition = some(4, masked=True, full=True)
    part = condition.rows(1, 3)
    assert len(part) == 2 and len(condition.rows(1)) == 3
    for name in ("context", "context_mask", "c", "concat"):
        assert_close(getattr(part, name), getattr(condition, name)[1:3])


@pytest.mark.parametrize("masks", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("lengths", [(3, 3), (2, 5), (5, 2)])
def test_cat_pads_and_masks(masks, lengths):
    a, b = some(2, lengths[0], masks[0], full=True), some(3, lengths[1], masks[1], full=True)
    both = a.cat(b)
    assert len(both) == 5 and both.context.shape == (5, max(lengths), 4)
    for part, first in ((a, 0), (b, 2)):
        n = part.context.shape[1]
        assert_close(both.context[first:first + len(part), :n], part.context)
        assert not both.context[first:first + len(part), n:].any()
        if both.context_mask is not None:
            wanted = torch.ones(part.context.shape[:2], dtype=torch.bool) if part.context_mask is None else part.context_mask
            assert_close(both.context_mask[first:first + len(part), :n], wanted)
            assert not both.context_mask[first:first + len(part), n:].any()
    assert (both.context_mask is None) == (masks == (False, False) and lengths[0] == lengths[1])
    assert_close(both.c, torch.cat([a.c, b.c]))
    assert_close(both.concat, torch.cat([a.concat, b.concat]))


def test_cat_of_empty_conditions_is_empty():
    assert len(Condition().cat(Condition())) == 0
    assert len(Condition().select(torch.tensor([True, False]), Condition())) == 0


def test_conditions_with_other_parts_do_not_mix():
    with pytest.raises(ValueError, match="one has c,"):
        some(2, full=True).cat(some(2))
    with pytest.raises(ValueError, match="one has context,"):
        some(2).cat(Condition())


def test_select_is_where_by_row():
    a, b = some(4, 5, masked=True, full=True, value=1), some(4, 2, full=True, value=-1)
    before = a.context.clone()
    keep = torch.tensor([True, False, True, False])
    out = a.select(keep, b)
    assert out.context.shape == (4, 5, 4)
    assert_close(out.c[:, 0], torch.tensor([1.0, -1.0, 1.0, -1.0]))
    assert_close(out.concat[:, 1, 2, 3], torch.tensor([1.0, -1.0, 1.0, -1.0]))
    assert_close(out.context[keep], a.context[keep])
    assert_close(out.context_mask[keep], a.context_mask[keep])
    assert_close(out.context_mask[~keep], torch.tensor([[True, True, False, False, False]] * 2))
    assert not out.context[~keep][:, 2:].any()
    assert_close(a.context, before)  # nothing is modified in place


@pytest.mark.parametrize("keep", [torch.ones(4), torch.ones(3, dtype=torch.bool), torch.ones(4, 1, dtype=torch.bool), [True] * 4])
def test_select_refuses_bad_choices(keep):
    with pytest.raises(ValueError):
        some(4).select(keep, some(4))


def test_select_refuses_another_number_of_rows():
    with pytest.raises(ValueError, match="4 rows, 1 rows"):
        some(4).select(torch.ones(4, dtype=torch.bool), some(1))


def test_select_passes_gradients_to_both():
    a, b = (torch.zeros(2, 1, 3, requires_grad=True) for _ in range(2))
    Condition(a).select(torch.tensor([True, False]), Condition(b)).context.sum().backward()
    assert_close(a.grad[:, 0, 0], torch.tensor([1.0, 0.0]))
    assert_close(b.grad[:, 0, 0], torch.tensor([0.0, 1.0]))


# ---------------------------------------------------------------- tokenizer

def test_special_pieces_come_first(tokenizer):
    assert tokenizer.vocab[:4] == SPECIAL and (PAD, UNK, CLS, SEP) == (0, 1, 2, 3)
    assert tokenizer.words == set(WORDS)
    row = tokenizer.encode("A Red CIRCLE")
    assert row[0] == CLS and row[-1] == SEP and row == tokenizer.encode("a réd circle")


def test_an_encoded_caption_belongs_to_its_caller(tokenizer):
    """The tokenizer remembers captions; padding a row in place must not change what it remembers."""
    row = tokenizer.encode("a red circle")
    before = list(row)
    row += [PAD, PAD]
    assert tokenizer.encode("a red circle") == before


def test_special_pieces_cannot_be_typed(tokenizer):
    assert tokenizer.encode("[SEP]").count(SEP) == 1 and tokenizer.encode("a [PAD] ring").count(PAD) == 0


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=12))
def test_captions_survive_the_round_trip(tokenizer, words):
    caption = " ".join(words)
    row = tokenizer.encode(caption)
    assert UNK not in row and tokenizer.split(tokenizer.decode(row)) == tokenizer.split(caption)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=30))
def test_any_text_encodes_to_known_numbers(tokenizer, caption):
    row = tokenizer.encode(caption)
    assert row[0] == CLS and row[-1] == SEP and all(0 <= i < len(tokenizer) for i in row) and PAD not in row


@pytest.mark.parametrize("vocab_size", [50, 70, 256])
def test_every_process_learns_the_same_vocabulary(vocab_size):
    code = ("import json; from ldm_edu.conditioning import train_tokenizer as t; "
            f"print(t({CAPTIONS * 20!r}, {vocab_size}).to_json())")
    first, second = (subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in range(2))
    assert first == second
    learned = json.loads(first)["vocab"]
    assert len(learned) <= vocab_size and set(SPECIAL) < set(learned)


def test_small_vocabularies_fall_back_on_pieces():
    small = train_tokenizer(CAPTIONS, 50)
    row = small.encode("a striped circle")
    assert len(row) > 5 and UNK not in row and small.decode(row) == "a striped circle"


@pytest.mark.parametrize("captions, vocab_size, word", [
    ([], 100, "none"), (["", " "], 100, "none"), (["a red ring", 3], 100, "int"), (CAPTIONS, 10, "vocab_size"),
])
def test_tokenizer_training_errors(captions, vocab_size, word):
    with pytest.raises(ValueError, match=word):
        train_tokenizer(captions, vocab_size)


def test_tokenizer_json_and_pickle(tokenizer):
    for copy in (CaptionTokenizer.from_json(tokenizer.to_json()), pickle.loads(pickle.dumps(tokenizer))):
        assert copy.vocab == tokenizer.vocab and copy.words == tokenizer.words
        assert copy.encode("a red ring, one above") == tokenizer.encode("a red ring, one above")
    with pytest.raises(ValueError, match="vocab"):
        CaptionTokenizer(["a", "b", "c", "d"], [])
    for bad in ("{", "[]", '{"words": []}'):
        with pytest.raises(ValueError, match="tokenizer"):
            CaptionTokenizer.from_json(bad)


# ---------------------------------------------------------------- text

@pytest.mark.parametrize("pooled", [False, True])
def test_text_shapes(tokenizer, pooled):
    model = text(tokenizer, pooled=pooled)
    condition = model({"caption": CAPTIONS[:2]})
    longest = max(len(tokenizer.encode(c)) for c in CAPTIONS[:2])
    assert condition.context.shape == (2, longest, 32) and model.context_dim == 32
    assert condition.context_mask.sum(1).tolist() == [len(tokenizer.encode(c)) for c in CAPTIONS[:2]]
    assert (condition.c.shape == (2, 32) if pooled else condition.c is None) and model.c_dim == (32 if pooled else None)
    assert model.null(5).context.shape == (5, 2, 32) and model.concat_channels == 0
    assert len(model.null(0)) == 0


@pytest.mark.parametrize("pooled", [False, True])
def test_a_caption_means_the_same_alone_and_beside_a_longer_one(tokenizer, pooled):
    """PEERS bug 18: padding must not be attended."""
    model = text(tokenizer, pooled=pooled)
    together = model({"caption": CAPTIONS})
    for i, caption in enumerate(CAPTIONS):
        alone = model({"caption": [caption]})
        n = alone.context.shape[1]
        assert_close(together.context[i, :n], alone.context[0], rtol=1e-5, atol=1e-5)
        assert not together.context[i, n:].any()
        if pooled:
            assert_close(together.c[i], alone.c[0], rtol=1e-5, atol=1e-5)


def test_padding_tokens_have_no_influence_even_when_their_embedding_is_huge(model):
    before = model({"caption": CAPTIONS})
    with torch.no_grad():
        model.encoder.token.weight[PAD] = 1e4
    after = model({"caption": CAPTIONS})
    assert_close(after.context, before.context)


def test_a_row_of_padding_gives_no_nan(model):
    ids = torch.zeros(2, 6, dtype=torch.long)
    ids[1, :3] = torch.tensor([CLS, 20, SEP])
    condition = model({"token_ids": ids})
    assert torch.isfinite(condition.context).all() and not condition.context[0].any()
    condition.context.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert torch.isfinite(model({"token_ids": torch.zeros(1, 4, dtype=torch.long)}).context).all()


def test_cached_ids_equal_captions(model):
    cached = model.tensors({"caption": CAPTIONS})
    assert cached["token_ids"].shape == (len(CAPTIONS), 16) and cached["token_ids"].dtype == torch.int32
    a, b = model({"token_ids": cached["token_ids"][1:3]}), model({"caption": CAPTIONS[1:3]})
    assert_close(a.context, b.context)
    assert_close(a.context_mask, b.context_mask)


def test_null_is_the_empty_caption_and_is_trained(model):
    null, empty = model.null(3), model({"caption": ["", "", ""]})
    assert_close(null.context, empty.context)
    assert null.context_mask.tolist() == [[True, True]] * 3
    null.context[:, 0].pow(3).sum().backward()
    assert model.encoder.token.weight.grad[CLS].abs().sum() > 0


def test_dropped_rows_carry_no_trace_of_their_caption(model):
    """PEERS bug 12: what condition dropout leaves must be exactly what guidance calls null."""
    keep = torch.tensor([True, False, True, False, False])
    mixed = model({"caption": CAPTIONS}).select(keep, model.null(5))
    null = model.null(1)
    for row in (~keep).nonzero().flatten().tolist():
        assert_close(mixed.context[row, :2], null.context[0])
        assert not mixed.context[row, 2:].any() and mixed.context_mask[row].tolist().count(True) == 2
    other = model({"caption": [CAPTIONS[0], "a yellow cross", CAPTIONS[2], "a ring", "a red cross"]}).select(keep, model.null(5))
    assert_close(mixed.context, other.context)


def test_order_of_words_matters(model):
    a, b = model({"caption": ["a red circle left of a blue square", "a blue circle left of a red square"]}).context
    assert (a[0] - b[0]).abs().max() > 1e-4


@pytest.mark.parametrize("prompts, parts", [
    ("a red ring", ["list"]), (None, ["list"]), ([], ["empty list"]), ([""], ["''", "empty"]), (["  "], ["empty"]),
    (["\u200b"], ["empty"]), ([3], ["3", "int"]), ([None], ["None"]), (["a red ring", "a blu square"], ["a blu square", "'blu'", "'blue'"]),
    (["a zebra"], ["'zebra'", "triangle"]), (["a red ring!"], ["'!'"]), (["red " * 30], ["32 tokens", "at most 16"]),
])
def test_prompt_errors_name_the_fault(model, prompts, parts):
    with pytest.raises(ValueError) as caught:
        model.prepare(prompts)
    for part in parts:
        assert part in str(caught.value)


def test_prompts_with_known_words_pass(model):
    batch = model.prepare(["A yellow RING above a small square", "a cross"])
    assert batch["token_ids"].shape == (2, 16)
    assert_close(model.from_prompts(["a cross"]).context, model({"caption": ["a cross"]}).context)


def test_open_vocabulary_accepts_new_words_made_of_known_letters(tokenizer):
    strict, free = text(tokenizer), text(tokenizer, open_vocabulary=True)
    with pytest.raises(ValueError, match="'greens'"):
        strict.prepare(["two greens"])
    assert len(free.prepare(["two greens"])["token_ids"]) == 1
    with pytest.raises(ValueError, match="'zq'"):
        free.prepare(["a zq"])


def test_a_long_list_of_words_is_not_printed():
    tokenizer = train_tokenizer([f"w{i}" for i in range(1000)], 4000)
    with pytest.raises(ValueError) as caught:
        text(tokenizer).prepare(["zebra"])
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("options", [{"max_length": 2}, {"max_length": 78}, {"width": 30, "heads": 4}, {"depth": 0}])
def test_text_config_errors(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        TextConfig(**options)


def test_batch_errors(model):
    with pytest.raises(ValueError, match="'caption'.*label"):
        model({"label": torch.zeros(2)})
    with pytest.raises(ValueError, match="token_ids"):
        model({"token_ids": torch.zeros(3, dtype=torch.long)})
    with pytest.raises(ValueError, match="at most 16"):
        model({"token_ids": torch.full((1, 17), 5)})
    with pytest.raises(ValueError, match="at most 16"):
        model({"caption": ["red " * 30]})


def test_half_precision(model):
    half = model.to(torch.bfloat16)({"caption": CAPTIONS})
    assert half.context.dtype == torch.bfloat16 and torch.isfinite(half.context).all()


def test_the_text_encoder_learns_which_colour_belongs_to_which_shape(tokenizer):
    """The [CLS] token must tell 'red circle, blue square' from 'blue circle, red square' after a short training."""
    model = text(tokenizer, pooled=True, depth=2)
    pairs = [("red", "blue"), ("blue", "red"), ("red", "green"), ("green", "red"), ("blue", "green"), ("green", "blue")]
    captions = [f"a {a} circle left of a {b} square" for a, b in pairs]
    target = torch.tensor([["red", "blue", "green"].index(a) for a, _ in pairs])
    head = nn.Linear(32, 3)
    optimizer = torch.optim.Adam([*model.parameters(), *head.parameters()], 3e-3)
    for _ in range(80):
        loss = nn.functional.cross_entropy(head(model({"caption": captions}).c), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (head(model({"caption": captions}).c).argmax(1) == target).all()


def test_labels_may_be_numbers_of_numpy_and_torch():
    read = ClassConditioner(ClassConfig(3, ("a", "b", "c"), width=8))
    plain = read.prepare([0, 2, 1])["label"]
    for prompts in ([np.int64(0), torch.tensor(2), "b"], np.array([0, 2, 1]), torch.tensor([0, 2, 1]), np.array(["a", "c", "b"])):
        assert torch.equal(read.prepare(prompts)["label"], plain)
    for wrong, message in ((np.int64(3), "class 3: expected 0 to 2"), (torch.tensor(1.0), "class 1.0 is unknown"), (np.bool_(True), "class True is unknown")):
        with pytest.raises(ValueError, match=message):
            read.prepare([wrong])


def test_a_model_without_condition_says_so():
    with pytest.raises(ValueError, match="this model is unconditional: it takes no prompts"):
        NoCondition().prepare(["a red circle"])


# ---------------------------------------------------------------- class and none

@pytest.mark.parametrize("pooled", [False, True])
def test_class_shapes_and_null(pooled):
    model = ClassConditioner(ClassConfig(3, ("cat", "dog", "cow"), width=8, pooled=pooled))
    condition, null = model({"label": torch.tensor([0, 2])}), model.null(2)
    assert condition.context.shape == null.context.shape == (2, 1, 8) and condition.context_mask is None
    assert_close(null.context[0, 0], model.table.weight[3])
    assert_close(condition.context[1, 0], model.table.weight[2])
    assert (condition.c is not None) == pooled and model.c_dim == (8 if pooled else None)
    assert_close(model.from_prompts(["cow", 2, "2", " cow "]).context, model.table.weight[[2, 2, 2, 2]][:, None])
    assert_close(model.tensors({"label": [0, 1]})["label"], torch.tensor([0, 1]))


@pytest.mark.parametrize("prompt, parts", [
    ("dgo", ["'dgo'", "'dog'", "cat"]), (3, ["3", "0 to 2"]), (-1, ["-1"]), ("7", ["7", "0 to 2"]), (None, ["None"]),
    (1.5, ["1.5"]), (True, ["True"]), ("", ["''"]),
])
def test_class_prompt_errors(prompt, parts):
    with pytest.raises(ValueError) as caught:
        ClassConditioner(ClassConfig(3, ("cat", "dog", "cow"))).prepare([prompt])
    for part in parts:
        assert part in str(caught.value)


def test_class_errors():
    model = ClassConditioner(ClassConfig(3))
    with pytest.raises(ValueError, match="no class names"):
        model.prepare(["cat"])
    with pytest.raises(ValueError, match="0 to 2"):
        model({"label": torch.tensor([0, 3])})  # the null class is not for data
    with pytest.raises(ValueError, match="label"):
        model({"label": torch.zeros(2, 2, dtype=torch.long)})
    with pytest.raises(ValueError, match="n_classes"):
        ClassConfig(0)
    for names in (("cat",), ("cat", "cat", "dog")):
        with pytest.raises(ValueError, match="class_names"):
            ClassConfig(3, names)


def test_no_condition():
    model = NoCondition()
    assert len(model({})) == len(model.null(4)) == 0 and model.context_dim is None and model.keys == ()
    with pytest.raises(ValueError, match="no prompts"):
        model.prepare(["a red ring"])


# ---------------------------------------------------------------- registry, saving, workers

def built(tokenizer):
    torch.manual_seed(1)
    return {"none": NoCondition(), "class": ClassConditioner(ClassConfig(3, ("cat", "dog", "cow"))), "text": text(tokenizer, pooled=True)}


@pytest.mark.parametrize("name", ["none", "class", "text"])
def test_save_and_load_give_the_same_conditioner(tokenizer, name):
    model = built(tokenizer)[name]
    values = json.loads(json.dumps(model.to_dict()))
    assert values["name"] == name
    copy = make_conditioner(values)
    copy.load_state_dict(model.state_dict())
    assert copy.config == model.config
    batch = {"caption": CAPTIONS, "label": torch.tensor([0, 1, 2, 0, 1])}
    for a, b in ((copy(batch), model(batch)), (copy.null(2), model.null(2))):
        assert len(a) == len(b)
        for part in ("context", "context_mask", "c"):
            assert_close(getattr(a, part), getattr(b, part), rtol=0, atol=0) if getattr(b, part) is not None else None


def test_the_tokenizer_may_come_apart(tokenizer):
    values = text(tokenizer).to_dict()
    apart = make_conditioner({"name": "text", "config": values["config"]}, values["tokenizer"])
    assert apart.tokenizer.vocab == tokenizer.vocab
    with pytest.raises(ValueError, match="tokenizer"):
        make_conditioner({"name": "text", "config": values["config"]})


def test_registry_errors():
    with pytest.raises(ValueError, match="'none', 'class', 'text'"):
        make_conditioner({"name": "txt"})
    with pytest.raises(ValueError, match="unknown colour"):
        make_conditioner({"name": "class", "config": {"n_classes": 3, "colour": 1}})
    with pytest.raises(ValueError, match="sort"):
        make_conditioner({"name": "none", "sort": 1})
    with pytest.raises(ValueError, match="list"):
        check_prompts("a")


class _Captions(torch.utils.data.Dataset):
    def __init__(self, model):
        self.model = model

    def __len__(self):
        return len(CAPTIONS)

    def __getitem__(self, i):
        return self.model.tensors({"caption": [CAPTIONS[i]]})["token_ids"][0]


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_conditioners_work_in_data_loader_workers(model, context, capfd):
    loader = DataLoader(_Captions(model), batch_size=5, num_workers=1, multiprocessing_context=context)
    assert_close(next(iter(loader)), model.tensors({"caption": CAPTIONS})["token_ids"])
    assert "parallelism" not in capfd.readouterr().err


@dataclass(frozen=True)
class CountConfig(Config):
    most: int = 4
    width: int = 16


class CountConditioner(Conditioner):
    """How many objects to draw, as one token; 0 means "not said"."""

    config_class, keys = CountConfig, ("n_objects",)

    def __init__(self, config):
        super().__init__(config, context_dim=config.width)
        self.table = nn.Embedding(config.most + 1, config.width)

    def forward(self, batch):
        return Condition(context=self.table(batch["n_objects"].to(self.device))[:, None])

    def null(self, n):
        return self({"n_objects": torch.zeros(n, dtype=torch.long)})

    def prepare(self, prompts):
        return {"n_objects": torch.tensor([int(p) for p in check_prompts(prompts)])}


def test_your_own_conditioning_in_twenty_lines():
    model = CountConditioner(CountConfig())
    with pytest.raises(ValueError, match="CONDITIONERS"):
        model.to_dict()
    CONDITIONERS["count"] = CountConditioner
    try:
        copy = make_conditioner(model.to_dict())
        copy.load_state_dict(model.state_dict())
        assert_close(copy.from_prompts([1, 4]).context, model({"n_objects": torch.tensor([1, 4])}).context)
        mixed = copy.from_prompts([1, 4]).select(torch.tensor([True, False]), copy.null(2))
        assert_close(mixed.context[1], copy.null(1).context[0])
        assert copy.tensors({"n_objects": torch.tensor([2])})["n_objects"].tolist() == [2]
    finally:
        del CONDITIONERS["count"]


def test_the_base_class_says_what_is_missing():
    class Half(Conditioner):
        keys = ("thing",)

    with pytest.raises(NotImplementedError):
        Half(CountConfig())({})
    with pytest.raises(NotImplementedError):
        Half(CountConfig()).null(1)
    with pytest.raises(ValueError, match="thing"):
        Half(CountConfig()).prepare(["x"])
