"""Channels last: nothing is left for compiled convolutions to copy, and nothing else changes."""
import copy
import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from ldm_edu.autoencoder import AutoencoderConfig
from ldm_edu.channels import _after, _before, channels_last, copies_on_the_way_back, misplaced, norms_as_on_cuda
from ldm_edu.contenders import Setting, Workload, contend
from ldm_edu.quantize import make_first_stage
from ldm_edu.unet import UNet, UNetConfig


def lies_last(x: torch.Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def with_random_weights(net: nn.Module) -> nn.Module:
    """Branches that start at zero would hide what is wrong in them."""
    with torch.no_grad():
        for p in net.parameters():
            if not p.any():
                p.normal_(0, 0.05)
    return net


class Updown(nn.Module):
    """A UNet of the kinds that the page does not try: AdaGN, changes of resolution inside residual blocks, a vector, extra channels."""

    def __init__(self):
        super().__init__()
        self.unet = UNet(UNetConfig(6, 3, 16, (1, 2), 1, (2,), head_dim=8, c_dim=4, use_scale_shift_norm=True, resblock_updown=True, num_groups=4))

    def forward(self, x, t, c):
        return self.unet(x, t, None, None, c)


CASES = {
    "updown": (Updown, lambda: (torch.randn(2, 6, 8, 8), torch.tensor([3, 500]), torch.randn(2, 4))),
    "decoder": (lambda: make_first_stage(AutoencoderConfig(4, 8, (1, 2), 1, (), True, num_groups=4)).decoder, lambda: (torch.randn(2, 4, 8, 8),)),
}


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_left_to_copy(case):
    torch.manual_seed(0)
    build, inputs = CASES[case]
    net, given = with_random_weights(build()), [x.to(memory_format=torch.channels_last) if x.ndim == 4 else x for x in inputs()]
    before = misplaced(copy.deepcopy(net).to(memory_format=torch.channels_last), *given)
    after = misplaced(channels_last(net), *given)
    assert before["inputs"] > 0 and after == {**before, "inputs": 0, "gradients": 0}
    assert all(p.grad is None for p in net.parameters())


def test_a_compiled_network_answers_as_before_and_so_do_its_gradients():
    torch.manual_seed(0)
    plain, given = with_random_weights(Updown()), CASES["updown"][1]()
    last = channels_last(copy.deepcopy(plain))

    def run(call, net):
        made = call(*given)
        return made, torch.autograd.grad(made.square().mean(), list(net.parameters()))

    expected = run(plain, plain)
    with norms_as_on_cuda():
        assert_close(run(last, last), expected, atol=1e-5, rtol=1e-4)
        assert_close(run(torch.compile(last, backend="aot_eager", fullgraph=True), last), expected, atol=1e-5, rtol=1e-4)
        with torch.no_grad():
            assert_close(torch.compile(last, backend="aot_eager")(*given), expected[0], atol=1e-5, rtol=1e-4)


def test_hooks_are_set_once_come_along_in_copies_and_are_not_weights():
    net = channels_last(channels_last(nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 1), nn.Linear(4, 4))))
    for each in (net, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        hooks = [(list(m._forward_pre_hooks.values()), list(m._forward_hooks.values())) for m in each]
        assert hooks == [([_before], [_after]), ([], []), ([_before], [_after]), ([], [])]
        assert list(each.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias", "2.weight", "2.bias", "3.weight", "3.bias"]
        assert lies_last(each[0].weight)


def test_without_the_compiler_the_layout_alone_changes():
    net = channels_last(nn.Conv2d(3, 8, 3), compiled=False)
    assert lies_last(net.weight) and not net._forward_pre_hooks and not net._forward_hooks
    hooked = channels_last(nn.Conv2d(8, 8, 1))
    first = torch.randn(2, 8, 4, 4)
    seen = []
    hooked.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0] is first))
    hooked(first)
    assert seen == [True], "an uncompiled convolution is handed what it was given"


def test_the_norms_are_as_they_were_afterwards():
    real = nn.functional.group_norm
    x = torch.randn(2, 8, 4, 4).to(memory_format=torch.channels_last)
    with pytest.raises(KeyError), norms_as_on_cuda():
        assert not lies_last(nn.GroupNorm(2, 8)(x))
        raise KeyError
    assert nn.functional.group_norm is real and lies_last(nn.GroupNorm(2, 8)(x))


def test_the_benchmark_lays_out_ours_so_and_the_peers_plainly():
    pytest.importorskip("diffusers", reason="needs diffusers, which `make test` installs")
    tiny = Workload(UNetConfig(4, 4, 32, (1, 2), 1, (1, 2), head_dim=16, context_dim=24, num_groups=8), 8, 3, 2, 2)
    ours, theirs, plain = (c.net for c in contend([Setting(channels_last=True), Setting("diffusers", channels_last=True), Setting()], tiny, "sample"))
    hooked = [any(m._forward_pre_hooks for m in net.modules()) for net in (ours, theirs, plain)]
    assert hooked == [True, False, False]
    assert [lies_last(net.conv_in.weight) for net in (ours, theirs, plain)] == [True, True, False]


class Named(nn.Module):
    """Calls its convolution by the name of the input."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(input=x)


@pytest.mark.parametrize("net, shape", [(nn.Conv2d(3, 4, 3), (3, 8, 8)), (Named(), (2, 3, 8, 8))], ids=["one picture", "by name"])
def test_what_has_no_layout_is_compiled_as_it_is(net, shape):
    torch._dynamo.reset()
    x = torch.randn(shape)
    expected = net(x)
    assert_close(torch.compile(channels_last(net), backend="aot_eager", fullgraph=True)(x), expected)
    torch._dynamo.reset()


def test_transposed_convolutions_are_laid_out_too_and_inputs_may_be_missing():
    net = Upward().to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 6, 6).contiguous(memory_format=torch.channels_last)
    plain = misplaced(net, x, None)
    assert (plain["convolutions"], plain["inputs"]) == (2, 2), "what becomes of the gradients is another in torch 2.8 and 2.14"
    assert misplaced(channels_last(net), x, None) == {"convolutions": 2, "inputs": 0, "gradients": 0}
    with norms_as_on_cuda():
        assert not nn.functional.group_norm(input=x, num_groups=2).is_contiguous(memory_format=torch.channels_last)


def test_what_cannot_be_counted_is_refused():
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    with pytest.raises(ValueError, match="net: got a Conv2d without a parameter that is trained"):
        misplaced(nn.Conv2d(3, 4, 3).requires_grad_(False), x)
    with pytest.raises(TypeError, match="net: got an answer of type tuple, expected a tensor"):
        misplaced(Pair(), x)
    with torch.no_grad():
        assert misplaced(nn.Conv2d(3, 4, 3), x)["convolutions"] == 1
    assert x.grad is None
    with pytest.raises(TypeError, match="net: got Tensor, expected a torch.nn.Module"):
        channels_last(torch.zeros(1, 2, 3, 4))


class Pair(Named):
    """Answers with more than a tensor."""

    def forward(self, x):
        return self.conv(x), 1


class Upward(nn.Module):
    """A norm before each of two convolutions, the second a transposed one, and an input that may be missing."""

    def __init__(self):
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3, padding=1)
        self.again, self.up = nn.GroupNorm(2, 4), nn.ConvTranspose2d(4, 4, 2, stride=2)

    def forward(self, x, more):
        h = self.conv(self.norm(x if more is None else x + more))
        return self.up(self.again(h))


def backward_events(x, gradient, autocast=False):
    """The profile of one convolution's way back, and of a copy outside of it."""
    conv = nn.Conv2d(16, 16, 3, padding=1).to(memory_format=torch.channels_last)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = conv(x)
        y.backward(gradient.to(y.dtype))
        torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)  # nobody's way back
    return seen.events()


def test_copies_on_the_way_back_are_counted_where_they_are():
    last, first = (torch.randn(2, 16, 8, 8).contiguous(memory_format=layout) for layout in (torch.channels_last, torch.contiguous_format))
    given = last.clone().requires_grad_()
    assert copies_on_the_way_back(backward_events(given, last)) == 0
    assert copies_on_the_way_back(backward_events(given, first)) == 1
    assert copies_on_the_way_back(backward_events(given, last, autocast=True)) == 0, "a change of type is no change of layout"
    events = backward_events(given, first)
    assert any(e.name == "aten::copy_" and e.cpu_parent.name != "aten::convolution_backward" for e in events if e.cpu_parent), "the caller itself is another"
