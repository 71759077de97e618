"""Conditions never wait for the device in a training step: shown without one, on the meta device, whose numbers cannot be read."""
import copy
import dataclasses

import pytest
import torch
from test_frozen_text import make_clip
from torch.utils._python_dispatch import TorchDispatchMode

from ldm_edu.clip_text import ClipText, ClipTextConfig
from ldm_edu.conditioning import make_conditioner
from ldm_edu.data import make_masks
from ldm_edu.frozen_text import FrozenTextConditioner, FrozenTextConfig, load_clip
from ldm_edu.inpainting import InpaintConditioner, InpaintConfig, fresh_masks
from ldm_edu.layout import JointConditioner, LayoutConditioner, LayoutConfig, SemanticConditioner, SemanticConfig
from ldm_edu.ldm import load
from ldm_edu.recipes import DIFFUSIONS, DiffusionTask
from ldm_edu.superres import LowResConditioner, LowResConfig
from ldm_edu.training import RowRandom

ROWS = 4


class Sent(TorchDispatchMode):
    """Shapes of the tensors that came from the CPU while it is on; a number that is read off a meta tensor is an error of torch's own."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        out = call(*args, **(kwargs or {}))
        given = [x for x in args if isinstance(x, torch.Tensor)]
        copies = call in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        if copies and out.device.type == "meta" and given[-1].device.type == "cpu" and out.numel():
            self.shapes.append(tuple(out.shape))
        return out


def test_the_spy_sees_what_waits():
    with Sent() as sent:
        torch.ones(3).to("meta"), torch.ones(0).to("meta"), torch.zeros(2, device="meta").copy_(torch.ones(2)), torch.ones(5, device="meta").bool()
    assert sent.shapes == [(3,), (2,)]
    for read in (lambda x: x.max().item(), lambda x: bool((x > 0).all()), lambda x: x.nonzero(), lambda x: x.cpu(), lambda x: x[x > 0], lambda x: x.tolist()):
        with pytest.raises((RuntimeError, NotImplementedError), match="[Mm]eta"):
            read(torch.ones(3, device="meta"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return make_clip(tmp_path_factory.mktemp("clip") / "encoder")


def meta(conditioner, **fields):
    """A conditioner and a batch of ROWS rows, as a training step on a device would have them."""
    return conditioner.to("meta"), {name: x.to("meta") for name, x in fields.items()}


def frozen(clip):
    read = FrozenTextConditioner(FrozenTextConfig(str(clip), max_length=24, masked=True, pooled=True))
    return meta(read, **read.tensors({"caption": ["a red circle"] * ROWS}))


def layout(clip):
    return meta(LayoutConditioner(LayoutConfig(("red ring", "blue star"), grid=9, width=16, pooled=True)),
                boxes=torch.rand(ROWS, 3, 4), box_labels=torch.zeros(ROWS, 3, dtype=torch.int64))


def semantic(clip):
    return meta(SemanticConditioner(SemanticConfig(5)), semantic=torch.zeros(ROWS, 16, 16, dtype=torch.int64))


def small_picture(clip):
    return meta(LowResConditioner(LowResConfig()), low_res=torch.zeros(ROWS, 3, 4, 4))


def clean_small_picture(clip):
    return meta(LowResConditioner(LowResConfig(noise=0.0)), low_res=torch.zeros(ROWS, 3, 4, 4))


def hole(clip):
    return meta(InpaintConditioner(InpaintConfig()), image=torch.zeros(ROWS, 3, 16, 16), mask=torch.zeros(ROWS, 1, 16, 16))


def hole_and_boxes(clip):
    (read, batch), (other, more) = layout(clip), hole(clip)
    joint = JointConditioner.of(make_conditioner(read.to_dict()), make_conditioner(other.to_dict()))
    return meta(joint, **batch, **more, drop_layout=torch.zeros(ROWS, dtype=torch.bool), drop_inpaint=torch.ones(ROWS, dtype=torch.bool))


def encode(images):
    x = torch.nn.functional.avg_pool2d(images, 4)
    return torch.cat([x, x[:, :1]], dim=1)


@pytest.mark.parametrize("make", [frozen, layout, semantic, small_picture, clean_small_picture, hole, hole_and_boxes])
def test_a_step_s_condition_reads_nothing_back(make, clip):
    """What is drawn for the step comes from the CPU, in pinned memory where that helps; nothing else does, and nothing goes back."""
    read, batch = make(clip)
    rng = RowRandom(0, 3, range(ROWS), "meta")
    batch = read.complete(batch, encode, rng)
    read(batch)  # a frozen encoder goes to the device with the first batch
    with Sent() as sent:
        told, null = read(batch), read.null(ROWS)
        drop = torch.zeros(ROWS, dtype=torch.bool, device="meta")
        mixed = null.select(drop, told)
    assert not sent.shapes and len(mixed) == ROWS
    assert all(x.device.type == "meta" for x in (getattr(told, f.name) for f in dataclasses.fields(told)) if x is not None)


def test_a_whole_step_on_captions_stays_on_the_device():
    """Forward and back: no number is read, and no tensor of the CPU is mixed with the device's."""
    model = load("scenes-text").to("meta")
    model.net.requires_grad_(True).train()
    task = DiffusionTask(model, DIFFUSIONS["text-tiny"], "hash")
    batch = {"caption": ["a red circle", "a large blue star"], "mean": torch.zeros(2, 4, 8, 8, device="meta"), "std": torch.ones(2, 4, 8, 8, device="meta")}
    loss, _ = task.loss(model.net, batch, RowRandom(0, 0, range(2), "meta"))
    loss.sum().backward()
    assert loss.device.type == "meta" and all(p.grad.device.type == "meta" for p in model.net.parameters())


def test_masks_of_a_step_are_those_of_its_rows():
    """The same as from `uniform`, which would send the numbers to the device before the CPU can paint with them."""
    rng = RowRandom(2, 5, range(3, 9))
    expected = torch.from_numpy(make_masks(rng.uniform("mask", (14,)).double().numpy(), 16, 24))
    assert torch.equal(fresh_masks(RowRandom(2, 5, range(3, 9)), 16, 24), expected)
    assert fresh_masks(RowRandom(2, 5, range(3, 9), "meta"), 16, 24).device.type == "meta"


def test_numbers_of_tokens_are_looked_at_on_the_cpu(clip):
    """Where looking costs no wait: on their way to the device, too, and a tokenizer's once."""
    read = frozen(clip)[0]
    with pytest.raises(ValueError, match="ids: got 24 tokens from 0 to 54, expected at most 24 below 54"):
        read({"token_ids": torch.arange(24)[None].clamp(max=22).index_fill(1, torch.tensor([23]), 54)})
    with pytest.raises(ValueError, match="token_ids: .*24"):
        read({"token_ids": torch.zeros(1, 23, dtype=torch.int32, device="meta")})
    encoder, tokenizer = load_clip(str(clip))
    with pytest.raises(ValueError, match="tokenizer gives numbers up to 53, expected below 50"):
        FrozenTextConditioner(FrozenTextConfig("mine", max_length=24), (ClipText(ClipTextConfig(50, 16, 2, 4, 32, 24)), tokenizer))


def test_copies_share_the_frozen_encoder(clip):
    read = FrozenTextConditioner(FrozenTextConfig(str(clip), max_length=24, pooled=True))
    twin = copy.deepcopy(read)
    assert twin._encoder[0] is read._encoder[0] and twin._encoder is not read._encoder and twin.tokenizer is read.tokenizer
    assert twin.pool.weight is not read.pool.weight and torch.equal(twin.pool.weight, read.pool.weight)
    both = copy.deepcopy(torch.nn.ModuleList([read, read]))
    assert both[0] is both[1] and both[0]._encoder[0] is read._encoder[0]
    with torch.no_grad():
        twin.pool.weight.zero_()
    assert read.pool.weight.any() and torch.equal(twin({"caption": ["a"]}).context, read({"caption": ["a"]}).context)
