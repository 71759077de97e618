"""Conditions inside a compiled network: one graph, whatever a batch says, and the answer of the plain one."""
import dataclasses

import pytest
import torch
from test_device_waits import ROWS, encode
from test_frozen_text import make_clip
from torch.testing import assert_close

from ldm_edu.conditioning import ClassConditioner, ClassConfig, TextConditioner, TextConfig, train_tokenizer
from ldm_edu.core import can_look
from ldm_edu.data import make_masks
from ldm_edu.frozen_text import FrozenTextConditioner, FrozenTextConfig
from ldm_edu.inpainting import InpaintConditioner, InpaintConfig
from ldm_edu.layout import JointConditioner, LayoutConditioner, LayoutConfig, SemanticConditioner, SemanticConfig
from ldm_edu.superres import LowResConditioner, LowResConfig
from ldm_edu.training import RowRandom

CAPTIONS = ["a red circle", "a large blue star", "a red star", "a blue one"]
KNOWN = {"caption": lambda g: {"caption": [CAPTIONS[i] for i in torch.randint(4, (ROWS,), generator=g).tolist()]},
         "label": lambda g: {"label": torch.randint(7, (ROWS,), generator=g)}}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return make_clip(tmp_path_factory.mktemp("clip") / "encoder")


def some_boxes(g):
    corners = torch.rand(ROWS, 3, 2, 2, generator=g).sort(2).values.flatten(2)
    padding = torch.randint(1, 4, (ROWS, 1), generator=g) <= torch.arange(3)  # one to three boxes in a row
    return {"boxes": corners, "box_labels": torch.randint(2, (ROWS, 3), generator=g).masked_fill(padding, -1)}


def conditioners(clip):
    """By name: a conditioner, and a function from a generator to a batch for it."""
    picture = lambda key, side: lambda g: {key: torch.rand(ROWS, 3, side, side, generator=g) * 2 - 1}
    masks = lambda g: {"mask": torch.from_numpy(make_masks(torch.rand(ROWS, 14, generator=g).double().numpy(), 16, 16))}
    torch.manual_seed(0)
    layout, hole = (lambda: LayoutConditioner(LayoutConfig(("red ring", "blue star"), grid=9, width=16, pooled=True))), (lambda: InpaintConditioner(InpaintConfig()))
    quiet = lambda g: {f"drop_{name}": torch.rand(ROWS, generator=g) < 0.4 for name in ("layout", "inpaint")}
    return {
        "class": (ClassConditioner(ClassConfig(7, width=16, pooled=True)), KNOWN["label"]),
        "text": (TextConditioner(TextConfig(width=16, depth=1, heads=2, max_length=24, pooled=True), train_tokenizer(CAPTIONS, 80)), KNOWN["caption"]),
        "frozen text": (FrozenTextConditioner(FrozenTextConfig(str(clip), max_length=24, masked=True, pooled=True)), KNOWN["caption"]),
        "layout": (layout(), some_boxes),
        "semantic": (SemanticConditioner(SemanticConfig(5)), lambda g: {"semantic": torch.randint(5, (ROWS, 16, 16), generator=g)}),
        "superres": (LowResConditioner(LowResConfig()), picture("low_res", 4)),
        "inpaint": (hole(), lambda g: picture("image", 16)(g) | masks(g)),
        "layout and inpaint": (JointConditioner.of(layout(), hole()), lambda g: some_boxes(g) | picture("image", 16)(g) | masks(g) | quiet(g)),
    }


class Dropped(torch.nn.Module):
    """A conditioner that says nothing in some rows, as in training."""

    def __init__(self, read):
        super().__init__()
        self.read = read

    def forward(self, batch, silence):
        return self.read(batch).select(~silence, self.read.null(ROWS))


def told(condition):
    """A condition's tensors by name."""
    return {f.name: x for f in dataclasses.fields(condition) if (x := getattr(condition, f.name)) is not None}


@pytest.mark.parametrize("name", ["class", "text", "frozen text", "layout", "semantic", "superres", "inpaint", "layout and inpaint"])
def test_a_condition_is_one_graph_whatever_it_says(name, clip):
    read, draw = conditioners(clip)[name]
    made, g = [], torch.Generator().manual_seed(0)
    torch._dynamo.reset()
    try:
        silence = torch.arange(ROWS) % 2 == 1  # rows that are told nothing, as condition dropout leaves them
        compiled = torch.compile(Dropped(read), backend=lambda graph, _: made.append(graph) or graph.forward, fullgraph=True)
        for step in range(6):
            batch = draw(g)
            batch = read.complete({**batch, **read.tensors(batch)} if "caption" in batch else batch, encode, RowRandom(0, step, range(ROWS)))
            batch = {key: value for key, value in batch.items() if key != "caption"}
            plain, once = told(Dropped(read)(batch, silence)), told(compiled(batch, silence))
            n = plain["context_mask"].shape[1] if "context_mask" in plain else None  # uncompiled, columns that are padding everywhere are cut
            for key, x in once.items():
                if key in ("context", "context_mask") and n is not None:
                    assert key != "context_mask" or not x[:, n:].any()
                    x = x[:, :n]
                at = plain["context_mask"] if key == "context" and n is not None else slice(None)
                assert_close(x[at], plain[key][at], atol=1e-5, rtol=1e-5)
            assert plain.keys() == once.keys()
    finally:
        torch._dynamo.reset()
    assert len(made) == 1


def test_numbers_are_looked_at_on_the_cpu_only_and_not_by_the_compiler():
    assert can_look(torch.ones(2)) and not can_look(torch.ones(2, device="meta"))
    seen = []

    @torch.compile(backend="eager", fullgraph=True)
    def f(x):
        seen.append(can_look(x))
        return x + 1
    f(torch.ones(2))
    assert seen == [False]
