"""The benchmark: contenders that must agree, turns, ratios, counts, memory, files, and the command line. No figure of speed is asserted."""
import contextlib
import gc
import itertools
import json
import math
import re
import subprocess
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ldm_edu import bench, cli, contenders
from ldm_edu.attention import HalvedLinear
from ldm_edu.autoencoder import AutoencoderConfig
from ldm_edu.bench import (
    check_clock,
    compare_speed,
    job_flops,
    others_seconds,
    pair_ratios,
    pass_flops,
    peak_memory,
    product_rate,
    resident_growth,
    rows_of,
    speed_table,
    take_turns,
    time_jobs,
    warm_up,
)
from ldm_edu.contenders import (
    SETS,
    WORKLOADS,
    Contender,
    Remembered,
    Setting,
    Workload,
    agreement,
    check_effects,
    check_job,
    check_settings,
    conditions,
    contend,
    inputs,
    make_job,
    parts_of,
    peer,
    relative,
    settings_of,
    tf32,
)
from ldm_edu.unet import UNetConfig

TINY = Workload(UNetConfig(4, 4, 32, (1, 2), 1, (1, 2), head_dim=16, context_dim=24, num_groups=8), 8, 3, 2, 2)
PLAIN = Workload(UNetConfig(3, 3, 32, (1, 2), 1, (2,), head_dim=16, num_groups=8), 8, 0, 2, 2)
STAGE = Workload(AutoencoderConfig(4, 16, (1, 2), 1, (), True, num_groups=4), 16, 0, 2, 2)
JOBS = [(TINY, "train"), (TINY, "sample"), (PLAIN, "train"), (PLAIN, "sample"), (STAGE, "train"), (STAGE, "encode"), (STAGE, "decode")]
OURS, THEIRS = Setting(), Setting("diffusers")


@pytest.fixture
def tiny(monkeypatch):
    """The small workloads by name, and a matrix rate that costs nothing."""
    for name, workload in (("T", TINY), ("P", PLAIN), ("A", STAGE)):
        monkeypatch.setitem(WORKLOADS, name, workload)
    monkeypatch.setattr(bench, "product_rate", lambda device, precision, clock: 0.5)


# ------------------------------------------------------------------------------------------------ workloads and settings
def test_workloads_are_the_networks_that_they_are_named_for():
    count = {name: sum(p.numel() for p in w.build("meta").parameters()) for name, w in WORKLOADS.items()}
    assert count["Mfull"] == 394_984_196 and count["L"] == 859_520_964 and count["C"] == 274_056_163
    assert count["AEf4"] == count["AEf4-256"] == 55_312_063 and count["AEf8"] == count["AEf8-256"] == 83_653_863
    assert count["S8"] == count["S16"] and [WORKLOADS[n].size for n in ("S8", "S16", "M", "L", "AEf8", "AEf8-256")] == [8, 16, 32, 64, 64, 256]


@pytest.mark.parametrize("workload", [TINY, PLAIN, STAGE])
def test_built_weights_come_from_the_seed_and_no_matrix_is_zero(workload):
    a, b, other = workload.build(seed=3), workload.build(seed=3), workload.build(seed=4)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    assert any(not torch.equal(x, y) for x, y in zip(a.parameters(), other.parameters()))
    assert all(p.any() for p in a.parameters() if p.ndim > 1) and a.training


def test_check_job_names_what_can_be_timed():
    assert check_job("S8", "sample") is WORKLOADS["S8"]
    with pytest.raises(ValueError, match="workload: got 'Mful'.*did you mean 'Mfull'"):
        check_job("Mful", "train")
    with pytest.raises(ValueError, match="what to time of AEf4: got 'sample', expected one of 'train', 'encode', 'decode'"):
        check_job("AEf4", "sample")


def test_every_setting_has_a_name_that_says_it():
    words = {"precision": ("fp32", "tf32", "autocast", "bf16"), "channels_last": (False, True),
             "compile": ("", "default", "reduce-overhead", "max-autotune-no-cudagraphs"), "attention": ("", "cudnn", "flash", "math"),
             "search": (False, True), "optimizer": ("fused", "foreach", "plain"), "library": ("ldm_edu", "diffusers")}
    every = [Setting(**dict(zip(words, values))) for values in itertools.product(*words.values())] + [Setting(keep_context=True), Setting(share_start=True)]
    assert len({s.name for s in every}) == len(every)
    assert all(Setting.parse(s.name) == s for s in every)
    assert Setting.parse("diffusers").name == "diffusers+fp32" and Setting.parse("ldm_edu+compiled+bf16").name == "ldm_edu+bf16+compiled"


@pytest.mark.parametrize(("name", "message"), [
    ("torch", "library: got 'torch'"), ("ldm_edu+bf61", "did you mean 'bf16'"), ("diffusers+kept-context", "expected ldm_edu, eager"), ("diffusers+shared-start", "share_start: got it with library 'diffusers'"),
    ("ldm_edu+kept-context+compiled", "expected ldm_edu, eager"), ("", "library: got ''"), ("ldm_edu+", "got ''")])
def test_wrong_names_of_settings_are_refused(name, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Setting.parse(name)


@pytest.mark.parametrize("values", [{"precision": "fp16"}, {"compile": "fast"}, {"attention": "xformers"}, {"optimizer": "sgd"}])
def test_wrong_values_of_settings_are_refused(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        Setting(**values)


def test_ready_sets_begin_with_the_peer_and_hold_both_libraries():
    for name, what in itertools.product(SETS, ("train", "sample", "decode")):
        settings = settings_of(name, what, guided=True)
        assert settings[0].library == "diffusers" and {s.library for s in settings} == {"ldm_edu", "diffusers"}
        assert all(s.optimizer == "fused" for s in settings) and len(set(settings)) == len(settings)
        if name != "cpu-compiled":  # there the peer's plain form is what both compiled ones are measured by
            ways = [{s.name.split("+", 1)[1].replace("+shared-start", "") for s in settings if s.library == library} for library in ("diffusers", "ldm_edu")]
            assert ways[0] == ways[1], "every way that we try, the peer tries"
        assert any(s.share_start for s in settings) == (what == "sample"), "sharing the start is for guided sampling alone"
        assert [s for s in settings if not s.share_start] == settings_of(name, what), "without a context there is nothing to share"
    assert all(s.precision != "bf16" for name in SETS for s in settings_of(name, "train")), "training needs weights in float32"
    with pytest.raises(ValueError, match="set: got 'tpu'"):
        settings_of("tpu", "train")


def test_what_cannot_run_here_is_refused_before_anything_is_built(monkeypatch):
    for settings in ([], [OURS, OURS]):
        with pytest.raises(ValueError, match="expected at least one, each once"):
            check_settings(settings, "cpu")
    for name in ("ldm_edu+tf32", "ldm_edu+cudnn", "ldm_edu+cuda-graphs"):
        with pytest.raises(ValueError, match="needs CUDA, got device 'cpu'"):
            check_settings([Setting.parse(name)], "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="sees no CUDA device here"):
        check_settings([OURS], "cuda")
    monkeypatch.setattr(contenders.importlib.util, "find_spec", lambda name: None)
    check_settings([OURS], "cpu")
    with pytest.raises(ValueError, match="pip install diffusers"):
        check_settings([OURS, THEIRS], "cpu")


# ------------------------------------------------------------------------------------------------ contenders
CONFIGS = {
    "context": TINY, "plain": PLAIN, "first stage": STAGE,
    "heads": Workload(TINY.model.replace(heads=4, head_dim=None, transformer_depth=2), 8, 3),
    "scale shift": Workload(TINY.model.replace(use_scale_shift_norm=True), 8, 3),
    "big gan": Workload(PLAIN.model.replace(resblock_updown=True, use_scale_shift_norm=True, attention_levels=(1, 2)), 8),
    "big gan, half attended": Workload(PLAIN.model.replace(resblock_updown=True, ch_mult=(1, 2, 2), attention_levels=(2,)), 8),
    "no attention": Workload(STAGE.model.replace(mid_attention=False), 16),
}


@pytest.mark.parametrize("workload", CONFIGS.values(), ids=CONFIGS)
def test_the_peer_is_the_same_network(workload):
    gaps = agreement(contend([THEIRS, OURS, Setting(channels_last=True)], workload, "train"))
    assert max(max(found.values()) for found in gaps.values()) < 1e-5
    net = workload.build()
    assert sum(p.numel() for p in peer(workload, net).parameters()) == sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(("workload", "what"), JOBS)
def test_half_precision_rounds_and_stays_near(workload, what):
    gaps = agreement(contend([OURS, Setting(precision="autocast"), Setting(precision="bf16"), Setting(attention="math")], workload, what))
    assert 1e-4 < gaps["ldm_edu+autocast"]["own"] < 0.1 and 1e-4 < gaps["ldm_edu+bf16"]["own"] < 0.1
    assert gaps["ldm_edu+bf16"]["float32"] == 0 and gaps["ldm_edu+fp32+math"]["own"] < 1e-5


def changed(change, setting=OURS, workload=TINY):
    """A right contender, and one whose network was changed before."""
    net = workload.build()
    with torch.no_grad():
        change(net)
    return [Contender(OURS, workload.build(), workload, "train"), Contender(setting, net, workload, "train")]


@pytest.mark.parametrize("setting", [OURS, Setting(precision="bf16"), Setting(precision="autocast", channels_last=True)])
@pytest.mark.parametrize(("change", "message"), [
    (lambda net: net.conv_in.weight[0, 0, 1, 1].add_(1e-3), "not the same network"),
    (lambda net: net.mid[0].attention.blocks[0].cross_attention.to_kv.weight[3, 3].add_(0.05), "not the same network"),
    (lambda net: net.conv_out.weight.mul_(1e-5), "too near to zero"), (lambda net: net.conv_out.weight.zero_(), "too near to zero"),
    (lambda net: net.conv_out.bias.fill_(math.inf), "not finite"), (lambda net: net.conv_in.weight[0, 0, 0, 0].fill_(math.nan), "not finite"),
    (lambda net: (net.conv_out.weight.zero_(), net.conv_out.bias.fill_(1.0)), "nearly the same answer")])
def test_agreement_catches_a_wrong_network(change, message, setting):
    with pytest.raises(RuntimeError, match=message):
        agreement(changed(change, setting))


def test_two_networks_that_are_wrong_alike_are_caught_too():
    pair = changed(lambda net: net.conv_out.weight.zero_())
    pair[0] = Contender(OURS, pair[1].net, TINY, "train")
    with pytest.raises(RuntimeError, match="too near to zero"):
        agreement(pair)


def test_agreement_catches_a_precision_that_is_not_in_use(monkeypatch):
    pair = contend([OURS, Setting(precision="autocast")], TINY, "train")
    agreement(pair)
    monkeypatch.setattr(contenders, "conditions", lambda setting, device: contenders.contextlib.nullcontext())
    with pytest.raises(RuntimeError, match="expected rounding of autocast"):
        agreement(pair)


def test_agreement_catches_what_a_setting_breaks():
    pair = contend([OURS, Setting(precision="bf16")], TINY, "train")
    with torch.no_grad():
        pair[1].net.conv_out.weight.mul_(1.5)  # after the float32 answers were taken
    with pytest.raises(RuntimeError, match="expected rounding of bf16"):
        agreement(pair)


def test_relative_is_infinite_where_nothing_can_be_compared():
    x = torch.tensor([1.0, -2.0])
    assert relative(x, x) == 0 and relative(x + 0.5, x) == 0.25
    for a, b in ((x, torch.zeros(2)), (torch.zeros(2), torch.zeros(2)), (x, x / 0), (x / 0, x / 0), (x * math.nan, x), (x, x * math.nan)):
        assert relative(a, b) == math.inf


def test_tf32_and_conditions_hold_inside_only():
    places = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [place.allow_tf32 for place in places]
    with pytest.raises(KeyError), tf32(not before[0]):
        assert all(place.allow_tf32 is (not before[0]) for place in places)
        raise KeyError
    assert [place.allow_tf32 for place in places] == before
    with conditions(Setting(precision="autocast"), torch.device("cpu")):
        assert torch.is_autocast_enabled("cpu")
    assert not torch.is_autocast_enabled("cpu")
    with conditions(OURS, torch.device("cpu")):
        assert not torch.is_autocast_enabled("cpu")
    flash = torch.backends.cuda.flash_sdp_enabled()
    with conditions(Setting(attention="math"), torch.device("cpu")):
        assert torch.backends.cuda.math_sdp_enabled() and not torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled() == flash
    flags = [torch.backends.cudnn.benchmark, *before]
    for setting, expected in ((Setting(search=True), [True, False, False]), (Setting(precision="tf32"), [False, True, True])):
        with conditions(setting, torch.device("cuda")):
            assert [torch.backends.cudnn.benchmark, *(place.allow_tf32 for place in places)] == expected
    assert [torch.backends.cudnn.benchmark, *(place.allow_tf32 for place in places)] == flags


def test_the_way_back_runs_under_the_same_conditions_as_the_way_there(monkeypatch):
    """On a card TF32 is allowed outside of them: gradients that should be exact were a thousandth off."""
    inside, seen = [False], []

    @contextlib.contextmanager
    def noting(setting, device):
        inside[0] = True
        yield
        inside[0] = False

    monkeypatch.setattr(contenders, "conditions", noting)
    net = TINY.build()
    net.conv_in.register_full_backward_hook(lambda *_: seen.append(inside[0]))
    Contender(OURS, net, TINY, "train")
    assert seen == [True] and not inside[0]


def test_a_remembered_layer_is_asked_again_when_it_must():
    class Count(nn.Linear):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    layer, x = Count(3, 2), torch.ones(1, 3)
    kept = Remembered(layer)
    with torch.no_grad():
        assert kept(x) is kept(x) and layer.calls == 1
        kept(x.clone())
        assert layer.calls == 2
        x = torch.ones(1, 3)
        first = kept(x)
        x.mul_(2)
        assert not torch.equal(kept(x), first)
    calls = layer.calls
    assert kept(x).requires_grad and kept(x).requires_grad and layer.calls == calls + 2


def test_a_setting_is_applied(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda module, mode: asked.append(mode) or module)
    c = Contender(Setting(precision="bf16", channels_last=True, compile="max-autotune-no-cudagraphs"), TINY.build(), TINY, "sample")
    assert asked == ["max-autotune-no-cudagraphs"] and all(p.dtype == torch.bfloat16 for p in c.net.parameters())
    assert c.net.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    batch = {key: c.place(value) for key, value in inputs(TINY, 2).items()}
    assert batch["x"].dtype == batch["context"].dtype == torch.bfloat16 and batch["t"].dtype == torch.int64
    assert batch["x"].is_contiguous(memory_format=torch.channels_last) and torch.equal(batch["t"], inputs(TINY, 2)["t"])
    assert all(x.dtype == torch.float32 for x in c.exact.values()) and c.place(None) is None
    Contender(Setting(compile="default"), STAGE.build(), STAGE, "train")
    assert asked[1:] == ["default", "default"]


# ------------------------------------------------------------------------------------------------ jobs
@pytest.mark.parametrize(("workload", "what"), JOBS)
def test_both_libraries_do_the_same_job(workload, what):
    a, b = (make_job(c, 2, steps=2)() for c in contend([THEIRS, OURS], workload, what))
    assert relative(a, b) < 1e-5 and not a.requires_grad
    latent, picture = (2, 4, 8, 8), (2, 3, 16, 16)
    x = inputs(workload, 2)["x"].shape
    assert a.shape == {"train": x, "sample": x, "encode": (2, 8, *latent[2:]), "decode": picture}[what]


@pytest.mark.parametrize("optimizer", ["fused", "foreach", "plain"])
def test_a_training_step_is_adamw_on_the_loss(optimizer):
    (c,) = contend([Setting(optimizer=optimizer)], TINY, "train")
    twin, data = TINY.build(), inputs(TINY, 2)
    job, other = make_job(c, 2), torch.optim.AdamW(twin.parameters(), lr=1e-6)
    for _ in range(2):
        made = twin(data["x"], data["t"], data["context"])
        (made - data["eps"]).square().mean().backward()
        other.step(), other.zero_grad()
        torch.testing.assert_close(job(), made.detach())
    for p, q, start in zip(c.net.parameters(), twin.parameters(), TINY.build().parameters()):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-7)
        assert not torch.equal(p, start) and p.grad is None


def test_sampling_is_ddim_of_fifty_steps(monkeypatch):
    (c,) = contend([OURS], TINY, "sample")
    seen = []
    monkeypatch.setattr(c, "predict", lambda x, t, context: seen.append((len(x), t.tolist(), len(context))) or torch.zeros_like(x))
    x, signal = inputs(TINY, 2)["x"], torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
    got = make_job(c, 2, steps=3)()
    assert seen == [(4, [t] * 4, 4) for t in (999, 979, 959)], "both halves in one batch"
    torch.testing.assert_close(got, x * (signal[939] / signal[999]).sqrt().float())  # no noise predicted: only the scale changes
    assert make_job(c, 2, steps=50)().isfinite().all() and seen[-1][1] == [19] * 4


def test_guidance_goes_beyond_the_told_half(monkeypatch):
    (c,) = contend([OURS], TINY, "sample")
    monkeypatch.setattr(c, "predict", lambda x, t, context, contexts=1: context.abs().amax((1, 2)).gt(0).float()[:, None, None, None].expand_as(x))
    x, signal = inputs(TINY, 2)["x"], torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0).float()
    now, then = signal[999], signal[979]
    expected = (then / now).sqrt() * (x - (1 - now).sqrt() * 3) + (1 - then).sqrt() * 3  # 0 without context, 1 with it, scale 3
    torch.testing.assert_close(make_job(c, 2, steps=1)(), expected)


def test_a_kept_context_is_projected_once_a_run_and_changes_nothing():
    plain, kept = contend([OURS, Setting(keep_context=True)], TINY, "sample")
    layers = [m for m in kept.net.modules() if isinstance(m, Remembered)]
    calls = []
    for layer in layers:
        layer.layer.register_forward_hook(lambda *_: calls.append(1))
    job = make_job(kept, 2, steps=4)
    assert torch.equal(job(), make_job(plain, 2, steps=4)()) and len(calls) == len(layers) == 7


@pytest.mark.parametrize("words", ["", "+channels-last", "+kept-context"])
def test_a_shared_start_sees_each_picture_once_and_changes_nothing(words):
    plain, shared = contend([OURS, Setting.parse(f"ldm_edu+shared-start{words}")], TINY, "sample")
    rows = []
    for c in (plain, shared):
        c.net.conv_in.register_forward_hook(lambda _, inputs, output: rows.append(len(inputs[0])))
    doubled = make_job(plain, 3, steps=2)()
    torch.testing.assert_close(make_job(shared, 3, steps=2)(), doubled, atol=1e-5, rtol=1e-4)
    assert rows == [6, 6, 3, 3]


# ------------------------------------------------------------------------------------------------ time
def test_turns_come_in_another_order_each_round():
    now, order = [0.0], []
    cost = {"a": 1.0, "b": 2.0, "c": 4.0}

    def job(name):
        order.append((name, gc.isenabled()))
        now[0] += cost[name]
    seconds = take_turns({name: lambda name=name: job(name) for name in cost}, 6, clock=lambda: now[0])
    assert "".join(name for name, _ in order) == "abc" "cba" "bca" "acb" "cab" "bac", "all six orders: none always follows the same neighbour"
    assert seconds == {name: [value] * 6 for name, value in cost.items()} and gc.isenabled() and not any(on for _, on in order)


def test_garbage_is_collected_again_after_a_failure():
    with pytest.raises(ZeroDivisionError):
        take_turns({"a": lambda: 1 / 0}, 2)
    assert gc.isenabled()
    with pytest.raises(ValueError, match="rounds: got 1, expected at least 2"):
        take_turns({"a": int}, 1)


def test_ratios_are_medians_of_pairs_and_not_ratios_of_medians():
    seconds = {"first": [1.0, 2.0, 4.0, 8.0, 3.0], "other": [0.5, 1.0, 2.0, 8.0, 1.0]}
    assert pair_ratios(*seconds.values()) == [2.0, 2.0, 2.0, 1.0, 3.0]
    first, other = rows_of(seconds, images=6, flops=3e12, rates={"first": 2.0, "other": 0}, memory={"other": 7.5})
    assert (first["ratio"], first["ratio_range"], first["ms"], first["images_per_second"], first["tflops"]) == (1.0, [1.0, 1.0], 3000.0, 2.0, 1.0)
    assert (other["ratio"], other["ratio_range"], other["ms"], other["peak_mib"]) == (2.0, [1.0, 3.0], 1000.0, 7.5)
    assert first["share_of_matrix_rate"] == 0.5 and other["share_of_matrix_rate"] is None and first["peak_mib"] is None
    assert first["spread"] == pytest.approx((4 - 2) / 3, abs=1e-4) and first["seconds"] == seconds["first"]
    with pytest.raises(ValueError):
        pair_ratios([1.0], [1.0, 2.0])


def test_drift_does_not_reach_the_ratio():
    now = [0.0]

    def work(cost):
        now[0] += cost * (1 + now[0])
    seconds = take_turns({"a": lambda: work(0.010), "b": lambda: work(0.008)}, 40, clock=lambda: now[0])
    assert rows_of(seconds, 1, 1, {}, {})[1]["ratio"] == pytest.approx(1.25, abs=0.01)
    assert seconds["a"][-1] > 1.5 * seconds["a"][0]


def test_who_else_computed_is_said_where_it_is_known(monkeypatch):
    ticks = iter([10.0, 10.5])
    monkeypatch.setattr(bench, "others_seconds", lambda: next(ticks))
    clock = iter([0.0, 1.0])
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(bench, "take_turns", lambda jobs, rounds, device, clock: {"a": [1.0]})
    monkeypatch.setattr(bench.os, "cpu_count", lambda: 2)
    assert time_jobs({}, 2, "cpu") == ({"a": [1.0]}, 0.25)
    clock = iter([0.0])
    monkeypatch.setattr(bench, "others_seconds", lambda: None)
    assert time_jobs({}, 2, "cpu") == ({"a": [1.0]}, None)


def test_others_seconds_grow_and_leave_out_our_own():
    before, own = others_seconds(), sum(bench.os.times()[:2])
    if before is None:
        pytest.skip("needs /proc/stat")
    while sum(bench.os.times()[:2]) - own < 0.3:
        sum(range(10_000))
    elapsed_by_all = others_seconds() - before
    assert -0.1 < elapsed_by_all < 60


def test_warming_up_compares_what_is_timed():
    heard, calls, x = [], [], torch.tensor([1.0, 2.0])
    jobs = {"a": lambda: calls.append("a") or x, "b": lambda: calls.append("b") or x + 1e-5}
    gaps = warm_up(jobs, {"a": OURS, "b": OURS}, "cpu", 3, heard.append)
    assert calls == ["a"] * 3 + ["b"] * 3 and gaps["a"] == 0 and 0 < gaps["b"] < 1e-4
    assert len(heard) == 2 and heard[1].startswith("warm after") and heard[1].endswith(": b")
    half = Setting(precision="bf16")
    warm_up({"a": lambda: x, "b": lambda: x * 1.1}, {"a": OURS, "b": half}, "cpu", 1, heard.append)
    for other in (x * 1.3, x * math.nan):
        with pytest.raises(RuntimeError, match="b: what is timed gives another answer than a"):
            warm_up({"a": lambda: x, "b": lambda other=other: other}, {"a": OURS, "b": half}, "cpu", 1, heard.append)


# ------------------------------------------------------------------------------------------------ counts and memory
def counted_by_hand(net, call) -> int:
    """Operations of every convolution, linear layer and attention, from the shapes that pass by."""
    total, handles = [0], []

    def hook(layer, given, out):
        per_output = layer.in_channels * layer.kernel_size[0] * layer.kernel_size[1] if isinstance(layer, nn.Conv2d) else layer.weight.shape[1]
        total[0] += 2 * sum(half.numel() for half in (out if isinstance(out, tuple) else [out])) * per_output
    for layer in net.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear, HalvedLinear)):
            handles.append(layer.register_forward_hook(hook))
    attention = nn.functional.scaled_dot_product_attention

    def attend(q, k, v, **options):
        total[0] += 2 * q[..., 0].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])
        return attention(q, k, v, **options)
    nn.functional.scaled_dot_product_attention = attend
    try:
        with torch.enable_grad():  # as in training: a single token is asked, too
            call()
    finally:
        nn.functional.scaled_dot_product_attention = attention
        for handle in handles:
            handle.remove()
    return total[0]


@pytest.mark.parametrize(("workload", "what"), JOBS)
def test_operations_are_those_of_a_hand_count(workload, what):
    net, batch = workload.build(), inputs(workload, 1)
    parts = parts_of(net)
    calls = [lambda: net(batch["x"], batch["t"], batch["context"])] if "predict" in parts else [
        *([lambda: parts["encode"](batch["x"])] if what != "decode" else []), *([lambda: parts["decode"](batch["z"])] if what != "encode" else [])]
    assert pass_flops(workload, what) == sum(counted_by_hand(net, call) for call in calls)


def test_a_job_costs_its_passes():
    once = pass_flops(TINY, "train")
    assert job_flops(TINY, "train", 5, 9) == 15 * once and job_flops(TINY, "sample", 5, 9) == 2 * 9 * 5 * once
    assert job_flops(PLAIN, "sample", 5, 9) == 45 * pass_flops(PLAIN, "sample"), "nothing to guide by: one row a picture"
    halves = [pass_flops(STAGE, what) for what in ("encode", "decode")]
    assert job_flops(STAGE, "encode", 5, 9) == 5 * halves[0] and job_flops(STAGE, "train", 5, 9) == 15 * sum(halves)


def test_known_counts_of_known_networks():
    assert pass_flops(WORKLOADS["L"], "train") / 1e9 == pytest.approx(803, abs=1)
    assert [pass_flops(WORKLOADS["AEf8"], what) / 1e9 for what in ("encode", "decode")] == pytest.approx([16.9, 38.8], abs=0.05)


def test_the_matrix_rate_is_asked_in_the_arithmetic_of_the_setting(monkeypatch):
    assert product_rate("cpu", "fp32", enough=1e9, largest=256) > 0
    asked = []
    monkeypatch.setattr(bench, "matrix_rate", lambda device, dtype, clock, **more: asked.append((dtype, clock, more)) or 3e12)
    assert [product_rate("cpu", precision, "cpu", rounds=2) for precision in ("fp32", "bf16", "autocast")] == [3.0] * 3
    assert asked == [(dtype, bench.time.process_time, {"rounds": 2}) for dtype in (torch.float32, torch.bfloat16, torch.bfloat16)]


@pytest.mark.parametrize(("name", "what", "setting"), [("S8", "train", "ldm_edu+kept-context"), ("AEf4", "encode", "ldm_edu+kept-context"),
                                                       ("C", "sample", "ldm_edu+kept-context"), ("S8", "sample", "diffusers+foreach"), ("AEf4", "decode", "ldm_edu+plain"),
                                                       ("S8", "train", "ldm_edu+shared-start"), ("C", "sample", "ldm_edu+shared-start")])
def test_settings_without_effect_are_refused(name, what, setting):
    with pytest.raises(ValueError, match=rf"changes nothing in {name} {what}"):
        compare_speed(name, what, [Setting.parse(setting)])
    check_effects([Setting(keep_context=True)], "S8", "sample"), check_effects([Setting(optimizer="plain")], "AEf4", "train")


def test_the_processors_clock_is_for_one_thread_of_a_cpu(monkeypatch):
    check_clock("wall", "cuda")
    monkeypatch.setattr(bench.torch, "get_num_threads", lambda: 2)
    with pytest.raises(ValueError, match="got cpu on cpu with 2 threads, expected one thread"):
        check_clock("cpu", "cpu")
    monkeypatch.setattr(bench.torch, "get_num_threads", lambda: 1)
    check_clock("cpu", "cpu")
    with pytest.raises(ValueError, match="got cpu on cuda"):
        check_clock("cpu", "cuda")


def test_a_training_step_that_answers_zeros_is_no_contender(tiny, monkeypatch):
    """Its loss is that of an untrained network to a few percent; its answer is not."""
    real = contenders.Contender.predict
    settings = [OURS, Setting(channels_last=True)]
    monkeypatch.setattr(bench, "agreement", lambda found: {c.setting.name: {"own": 0.0} for c in found})
    monkeypatch.setattr(contenders.Contender, "predict", lambda c, *given: real(c, *given) * (0 if c.setting.channels_last else 1))
    with pytest.raises(RuntimeError, match="what is timed gives another answer"):
        compare_speed("T", "train", settings, rounds=2, warm=1)


def test_memory_of_a_child_holds_gradients_and_averages():
    grown = resident_growth("S8", "train", OURS, 1)
    if grown is None:
        pytest.skip("needs Linux's /proc/self/clear_refs")
    assert 3 * 4 * 10_070_020 / 2**20 < grown < 400  # a gradient and two averages for each parameter, and activations of one row
    assert peak_memory(lambda: 1 / 0, "cpu") is None


def test_a_failing_child_is_heard(monkeypatch):
    with pytest.raises(RuntimeError, match=r"(?s)could not be measured: .*what to time of S8: got 'decode'"):
        resident_growth("S8", "decode", OURS, 1)
    asked = []
    monkeypatch.setattr(bench.subprocess, "run", lambda words, **_: asked.append(words) or SimpleNamespace(returncode=0, stdout="words\ngrown 12.5\n", stderr=""))
    assert resident_growth("M", "sample", Setting(precision="bf16"), 4, 2) == 12.5
    assert asked[0][3:] == ["M", "sample", "ldm_edu+bf16", "4", "2", str(torch.get_num_threads())]


# ------------------------------------------------------------------------------------------------ the whole
def test_a_comparison_says_what_its_figures_depend_on(tiny):
    heard = []
    result = compare_speed("T", "sample", [THEIRS, OURS, Setting(keep_context=True)], rounds=3, batch=2, steps=2, warm=1, tell=heard.append)
    assert json.loads(json.dumps(result)) == result
    assert {"machine", "device", "cpu_instructions", "threads", "python", "torch", "diffusers", "commit", "date", "others_share_of_machine", "matrix_tflops",
            "parameters", "agreement", "result_difference", "clock"} <= set(result)
    assert (result["workload"], result["what"], result["batch"], result["steps"], result["rounds"]) == ("T", "sample", 2, 2, 3)
    assert [row["setting"] for row in result["rows"]] == ["diffusers+fp32", "ldm_edu+fp32", "ldm_edu+fp32+kept-context"] == list(result["agreement"])
    for row in result["rows"]:
        assert len(row["seconds"]) == 3 and row["peak_mib"] is None
        assert row["images_per_second"] == pytest.approx(2 * 2 / 50 / (row["ms"] / 1e3), rel=0.02), "of whole runs of 50 steps"
        assert row["tflops"] == pytest.approx(job_flops(TINY, "sample", 2, 2) / (row["ms"] / 1e3) / 1e12, abs=1e-4)
    assert result["matrix_tflops"] == {"fp32": 0.5} and result["rows"][0]["ratio"] == 1 and len(heard) == 3
    table = speed_table(result)
    assert "T sample, batch 2, 2 of 50 guided steps, 3 rounds" in table and torch.__version__ in table and table.count("\n| ") == 4
    assert "wall clock; others used" in table and "answers differ from float32 by at most" in table
    assert speed_table(compare_speed("A", "encode", [OURS], rounds=2, warm=1)).count("guided") == 0


def test_freed_memory_is_kept_for_all_when_asked_for(tiny, monkeypatch):
    asked = []
    monkeypatch.setattr(bench, "keep_freed_memory", lambda: asked.append(1) or True)
    kept, not_kept = (compare_speed("P", "train", [OURS], rounds=2, warm=1, keep_memory=keep) for keep in (True, False))
    assert len(asked) == 1 and kept["memory_kept"] and not not_kept["memory_kept"]
    assert "freed memory kept" in speed_table(kept) and "freed memory kept" not in speed_table(not_kept)
    monkeypatch.setattr(bench, "keep_freed_memory", lambda: False)
    with pytest.raises(ValueError, match="keep_memory: got True .*expected glibc"):
        compare_speed("P", "train", [OURS], keep_memory=True)


def test_memory_is_measured_in_children_when_asked_for(tiny, monkeypatch):
    monkeypatch.setattr(bench, "resident_growth", lambda name, what, setting, batch, steps: len(setting.name))
    rows = compare_speed("P", "train", [THEIRS, OURS], rounds=2, warm=1, memory=True)["rows"]
    assert [row["peak_mib"] for row in rows] == [len("diffusers+fp32"), len("ldm_edu+fp32")]


@pytest.mark.parametrize("instructions", [["avx2"], ["amx_bf16", "avx2"]])
def test_a_processor_without_bfloat16_is_said(tiny, monkeypatch, instructions):
    heard, facts = [], bench.bench_facts("cpu")
    monkeypatch.setattr(bench, "bench_facts", lambda device: {**facts, "cpu_instructions": instructions})
    compare_speed("T", "train", [OURS, Setting(precision="autocast")], rounds=2, warm=1, tell=heard.append)
    assert any("no instructions for bfloat16" in line for line in heard) == (instructions == ["avx2"])


@pytest.mark.parametrize("values", [{"steps": 0}, {"steps": 51}, {"rounds": 1}, {"warm": 0}, {"batch": 0}])
def test_bad_numbers_are_refused(values):
    with pytest.raises(ValueError, match=f"{next(iter(values))}={next(iter(values.values()))}"):
        compare_speed("S8", "sample", [OURS], **values)


def test_contenders_that_do_not_agree_are_never_timed(tiny, monkeypatch):
    real = contenders.peer

    def wrong(workload, net):
        other = real(workload, net)
        with torch.no_grad():
            other.conv_in.weight[0, 0, 0, 0] += 0.01
        return other
    monkeypatch.setattr(contenders, "peer", wrong)
    monkeypatch.setattr(bench, "take_turns", lambda *_, **__: pytest.fail("timed"))
    with pytest.raises(RuntimeError, match="not the same network"):
        compare_speed("T", "train", [THEIRS, OURS])


# ------------------------------------------------------------------------------------------------ command line
def test_the_command_writes_table_and_json_and_never_over_others(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ["bench", "--workload", "T", "--batch", "1", "--rounds", "2", "--warm", "1", "--device", "cpu"]
    assert cli.main(args) == 0
    out, err = capsys.readouterr()
    path = tmp_path / "runs" / "bench" / "T-train-cpu-fp32.json"
    result = json.loads(path.read_text())
    assert out.strip() == path.with_suffix(".md").read_text().strip() == speed_table(result).strip() and "warm after" in err
    assert [row["setting"] for row in result["rows"]] == [s.name for s in settings_of("cpu-fp32", "train")]
    before = path.read_text()
    assert cli.main(args) == 2 and "exists already" in capsys.readouterr().err and path.read_text() == before
    path.unlink()
    assert cli.main(args) == 2, "the table alone is not replaced either"
    assert cli.main([*args, "--overwrite"]) == 0 and path.exists()
    own = [*args, "--out", str(tmp_path / "own.json"), "ldm_edu", "ldm_edu+channels-last"]
    assert cli.main(own) == 0
    assert [row["setting"] for row in json.loads((tmp_path / "own.json").read_text())["rows"]] == ["ldm_edu+fp32", "ldm_edu+fp32+channels-last"]


@pytest.mark.parametrize(("args", "message"), [
    (["--workload", "Mful"], "did you mean 'Mfull'"), (["--what", "decode"], "what to time of S16: got 'decode'"), (["--set", "tpu"], "set: got 'tpu'"),
    (["diffuser+fp32"], "library: got 'diffuser'"), (["ldm_edu", "--set", "cpu-fp32"], "expected one of the first two"), (["--threads", "0"], "at least 1 thread"),
    (["--device", "cuda"], "sees no CUDA device"), (["--clock", "sun"], "clock: got 'sun'"), (["--out", "x.md"], "expected a name for JSON"),
    (["--rounds", "1"], "rounds=1"), (["--set", "gpu", "--what", "sample", "--device", "cpu"], "needs CUDA")])
def test_bad_requests_exit_with_2_and_a_sentence(args, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["bench", "--device", "cpu", *args] if "--device" not in args else ["bench", *args]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_without_diffusers_the_command_says_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(contenders.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["bench", "--device", "cpu"]) == 2 and "pip install diffusers" in capsys.readouterr().err


def test_importing_the_command_line_does_not_import_diffusers():
    code = "import sys, ldm_edu.cli; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([bench.sys.executable, "-c", code]).returncode == 0


def test_graphs_have_no_peak(monkeypatch):
    """A replay allocates nothing, so that 0 would be said of what needs most."""
    monkeypatch.setattr(bench, "peak_memory", lambda job, device: job())
    settings = {name: Setting.parse(name) for name in ("ldm_edu+bf16", "ldm_edu+bf16+compiled", "ldm_edu+bf16+cuda-graphs")}
    peaks = bench.peaks_of({name: lambda name=name: len(name) for name in settings}, settings, "cuda")
    assert peaks == {"ldm_edu+bf16": 12, "ldm_edu+bf16+compiled": 21}


# ------------------------------------------------------------------------------------------------ committed figures
def test_committed_figures_are_whole(root):
    h200 = json.loads((root / "data/sweeps/speed-h200.json").read_text())
    assert "Agreement was not established" in h200["note"] and h200["torch"] == "2.11.0+cu130" and h200["diffusers"] == "0.42.1"
    assert len(h200["comparisons"]) == 6 and all(run["rows"][0]["ratio"] == 1 for run in h200["comparisons"])
    for run in [*h200["comparisons"], *h200["checked"]]:
        flops = pass_flops(WORKLOADS[run["workload"]], run["what"]) * run["batch"] * (3 if run["what"] == "train" else 2 * run["steps"])
        assert all(row["tflops"] * row["ms"] / 1e3 == pytest.approx(flops / 1e12, rel=2e-3) for row in run["rows"])
    celeba = json.loads((root / "data/sweeps/celeba256-h200.json").read_text())
    assert len(celeba["losses"]) * celeba["log_every"] == celeba["steps"] == 200 and celeba["loss_last_20"] < 0.1 * celeba["loss_first_20"]
    assert celeba["images_per_second"] == pytest.approx(celeba["batch_size"] / celeba["seconds_per_step_median"])
    for run in h200["checked"]:
        assert all(gaps["float32"] <= 1e-5 and gaps["gradient"] < 2e-3 and gaps["own"] < 0.05 for gaps in run["agreement"].values())
        assert all(f"| {row['setting']} | {row['ms']:.1f} |" in speed_table(run) for row in run["rows"])
        assert all((row["peak_mib"] is None) == ("cuda-graphs" in row["setting"]) for row in run["rows"])
    large = h200["larger_batch"]
    for run in (large, large["before"]):
        assert all(row["share_of_matrix_rate"] == pytest.approx(1e3 * large["tflop"] / row["ms"] / run["matrix_tflops"]) for row in run["rows"].values())
    steps = json.loads((root / "data/sweeps/profile-h200-64.json").read_text())
    for profile in (steps, steps["before"]):
        assert 0.8 * profile["total_ms"] < sum(row["ms"] for row in profile["operations"]) < profile["total_ms"]
    assert len((root / "data/sweeps/profile-h200.txt").read_text().splitlines()) == 24
    cpu = json.loads((root / "data/sweeps/speed-cpu.json").read_text())["comparisons"]
    assert all(f"| {row['setting']} | {row['ms']:.1f} |" in speed_table(run) for run in cpu for row in run["rows"])
