"""The roofline against limits by hand, rings against a ring that is really walked, shards and utilisation against published counts."""
import json
import math

import pytest
import torch

from ldm_edu import scaling
from ldm_edu.bench import pass_flops
from ldm_edu.contenders import WORKLOADS
from ldm_edu.costs import STILL, Costs
from ldm_edu.recipes import DIFFUSIONS
from ldm_edu.scaling import (
    Roofline,
    data_parallel_seconds,
    fsdp_bytes,
    fsdp_traffic,
    largest_unit,
    measure_roofline,
    memory_rate,
    mfu,
    original_learning_rate,
    ring_all_reduce_seconds,
    ring_bytes,
    share_out,
)
from ldm_edu.unet import UNETS, UNet


# ------------------------------------------------------------------------------------------------ roofline
@pytest.mark.parametrize("intensity, rate", [(0.0, 0.0), (1.0, 10.0), (9.0, 90.0), (10.0, 100.0), (11.0, 100.0), (1e9, 100.0)])
def test_the_roof_is_a_slope_and_then_flat(intensity, rate):
    machine = Roofline(100.0, 10.0)
    assert machine.ridge == 10.0 and machine.attainable(intensity) == pytest.approx(rate)


@pytest.mark.parametrize("operations, moved", [(1, 1), (1e12, 1), (1, 1e12), (500, 50), (499, 50), (501, 50)])
def test_seconds_and_attainable_rate_are_one_statement(operations, moved):
    machine = Roofline(100.0, 10.0)
    seconds = machine.seconds(operations, moved)
    assert operations / seconds == pytest.approx(machine.attainable(operations / moved))
    assert seconds * machine.flops >= operations * (1 - 1e-12) and seconds * machine.bandwidth >= moved * (1 - 1e-12), "neither limit is beaten"


@pytest.mark.parametrize("flops, bandwidth", [(0, 1), (1, 0), (-1, 1), (1, math.nan), (math.nan, 1)])
def test_a_machine_without_limits_is_refused(flops, bandwidth):
    with pytest.raises(ValueError, match="flops, bandwidth: got .* expected more than 0"):
        Roofline(flops, bandwidth)


def test_memory_rate_counts_what_is_read_and_what_is_written(monkeypatch):
    """By a clock of our own: the best of the rounds counts, and 3 MiB are 6 MiB moved."""
    heard = []

    def turns(jobs, rounds, device, clock):
        jobs["negate"]()
        heard.append((rounds, str(device), clock))
        return {"negate": [0.5, 0.25, 1.0]}

    monkeypatch.setattr(scaling, "take_turns", turns)
    assert memory_rate("cpu", mib=3, rounds=5, clock="cpu") == 2 * 3 * 2**20 / 0.25
    assert heard == [(5, "cpu", scaling.CLOCKS["cpu"])]
    with pytest.raises(ValueError, match="mib: got 0, expected at least 1"):
        memory_rate(mib=0)


def test_both_limits_are_measured_in_operations_and_bytes(monkeypatch):
    monkeypatch.setattr(scaling, "product_rate", lambda device, precision, clock: {"bf16": 2.5}[precision])  # TFLOP/s
    monkeypatch.setattr(scaling, "memory_rate", lambda device, clock: {"cpu": 8e9}[clock])
    assert measure_roofline("cpu", "bf16", "cpu") == Roofline(2.5e12, 8e9)


def test_this_machine_has_a_roofline():
    torch.set_num_threads(1)
    assert 1e8 < memory_rate(mib=16, rounds=3, clock="cpu") < 1e13


# ------------------------------------------------------------------------------------------------ utilisation
def test_utilisation_of_the_committed_runs(root):
    h200 = json.loads((root / "data/sweeps/speed-h200.json").read_text())
    rate = 1e12 * h200["matrix_tflops"]["bf16"]
    best = max(row["images_per_second"] for row in h200["comparisons"][0]["rows"])
    assert mfu(3 * pass_flops(WORKLOADS["L"], "train"), 1 / best, rate) == pytest.approx(0.385, abs=0.001)


@pytest.mark.parametrize("numbers", [(0, 1, 1), (1, 0, 1), (1, 1, 0), (1, -1, 1)])
def test_utilisation_of_nothing_is_refused(numbers):
    with pytest.raises(ValueError, match="operations, seconds, rate: got"):
        mfu(*numbers)


# ------------------------------------------------------------------------------------------------ rings
def walk(n: int, length: int) -> tuple[list[list[set]], list[int]]:
    """A ring walked with sets of names in place of sums: who is in each piece at the end, and numbers sent by each process."""
    pieces, sent = [[{i} for _ in range(n)] for i in range(n)], [0] * n
    for turn in range(n - 1):  # scatter the sums
        moving = [(i, (i - turn) % n, set(pieces[i][(i - turn) % n])) for i in range(n)]
        for i, k, names in moving:
            assert not pieces[(i + 1) % n][k] & names, "nobody is added twice"
            pieces[(i + 1) % n][k] |= names
            sent[i] += length // n
    for turn in range(n - 1):  # gather them
        moving = [(i, (i + 1 - turn) % n, set(pieces[i][(i + 1 - turn) % n])) for i in range(n)]
        for i, k, names in moving:
            pieces[(i + 1) % n][k] = names
            sent[i] += length // n
    return pieces, sent


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
def test_ring_bytes_are_those_of_a_ring(n):
    pieces, sent = walk(n, 120)
    assert all(names == set(range(n)) for row in pieces for names in row), "everybody has everything"
    assert set(sent) == {ring_bytes(120, n)}


def test_seconds_of_a_ring():
    assert ring_all_reduce_seconds(8e9, 2, 10e9) == pytest.approx(0.8) and ring_all_reduce_seconds(8e9, 8, 10e9) == pytest.approx(1.4)
    assert ring_all_reduce_seconds(8e9, 1, 10e9, latency=1.0) == 0
    assert ring_all_reduce_seconds(0, 5, 10e9, latency=0.01) == pytest.approx(0.08), "two times four turns"
    assert ring_all_reduce_seconds(1, 10**6, 1.0) < 2, "never more than twice the vector"


@pytest.mark.parametrize("call, words", [
    (lambda: ring_bytes(1, 0), "n: got 0"), (lambda: ring_bytes(1, 2.5), "n: got 2.5"), (lambda: fsdp_traffic(1, -1), "n: got -1"),
    (lambda: ring_all_reduce_seconds(1, 2, 0), "bandwidth, latency: got 0"), (lambda: ring_all_reduce_seconds(1, 2, 1, -1), "bandwidth, latency: got 1 and -1"),
    (lambda: data_parallel_seconds(1, 1, 2, 1, overlap=1.5), "compute, overlap: got 1 and 1.5"), (lambda: data_parallel_seconds(-1, 1, 2, 1), "compute, overlap: got -1"),
    (lambda: fsdp_bytes(10, 2, 11), "unit: got 11 of 10"), (lambda: fsdp_bytes(10, 2, 0), "unit: got 0 of 10"), (lambda: fsdp_bytes(10, 0, 1), "n: got 0")])
def test_impossible_clusters_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# ------------------------------------------------------------------------------------------------ replicas and shards
@pytest.mark.parametrize("overlap, seconds", [(0.0, 4.4), (0.2, 3.8), (7 / 15, 3.0), (2 / 3, 3.0), (1.0, 3.0)])
def test_a_step_hides_communication_as_far_as_it_can(overlap, seconds):
    assert data_parallel_seconds(3.0, 8e9, 8, 10e9, overlap=overlap) == pytest.approx(seconds)


def test_one_process_communicates_nothing():
    assert data_parallel_seconds(3.0, 1e12, 1, 1.0, latency=9.0) == 3.0 and fsdp_traffic(1e12, 1) == 0


@pytest.mark.parametrize("rho", [0.001, 0.0087, 0.03, 0.2])
def test_strong_scaling_falls_under_four_fifths_where_the_formula_says(rho):
    step, size, bandwidth = 2.0, 3e9, 3e9 / (2.0 * rho)
    efficiency = lambda n: step / n / data_parallel_seconds(step / n, size, n, bandwidth)
    last = int(1 + 1 / (8 * rho) + 1e-9)
    assert efficiency(last) >= 0.8 - 1e-12 > efficiency(last + 1)


@pytest.mark.parametrize("n", [2, 3, 8, 64])
def test_shards_send_half_as_much_again(n):
    assert fsdp_traffic(7e9, n) / ring_bytes(7e9, n) == pytest.approx(1.5)


def test_shards_of_the_published_counts():
    """ZeRO, figure 1: 7.5 B parameters in mixed precision, 16 bytes each: 120 GB whole, 1.9 GB among 64."""
    assert fsdp_bytes(7_500_000_000, 1, 1) / 1e9 == pytest.approx(120)
    assert (fsdp_bytes(7_500_000_000, 64, 1) - 8) / 1e9 == pytest.approx(1.9, abs=0.03)
    assert fsdp_bytes(100, 4, 10, still=20) == 20 * 25 + 8 * 10 and fsdp_bytes(100, 1, 100) == 1600


def test_a_prediction_is_shared_out_between_what_lies_still_and_what_rows_keep():
    one = Costs(parameters=10**9, flops=10**15, memory=STILL * 10**9 + 64 * 10**9, step_seconds=8.0, steps=5, batch_size=64)
    assert share_out(one, 1) == one and share_out(one, 1, "full", 10**7) == one
    plain, sharded = share_out(one, 8), share_out(one, 8, "full", 10**7)
    assert plain.memory == STILL * 10**9 + 8 * 10**9 and sharded.memory == STILL * 10**9 / 8 + 8 * 10**7 + 8 * 10**9
    assert plain.step_seconds == sharded.step_seconds == 1.0 and plain.batch_size == 64
    with pytest.raises(ValueError, match="unit: got None with sharding 'full'"):
        share_out(one, 8, "full")
    with pytest.raises(ValueError, match="sharding.*half.*full"):
        share_out(one, 8, "half")
    with pytest.raises(ValueError, match="n: got 0"):
        share_out(one, 0)


def test_the_largest_unit_is_the_largest_of_all_that_is_gathered():
    config = UNETS["text-tiny"]
    net = UNet(config)
    whole = [sum(p.numel() for p in item.parameters()) for stages in (net.down, net.mid, net.up) for item in stages]
    assert largest_unit(config) == max(whole) and 0.05 < largest_unit(UNETS["sd-v1"]) / 859_520_964 < 0.15


@pytest.mark.parametrize("name, base", [("celebahq256-ldm4", 2e-6), ("lsun-bedrooms256-ldm4", 2e-6), ("imagenet256-ldm8", 1e-6), ("ffhq256-ldm4", 2e-6)])
def test_published_rates_are_products(name, base):
    train = DIFFUSIONS[name].train
    assert original_learning_rate(base, 1, train.batch_size) == pytest.approx(train.lr)
    assert original_learning_rate(base, 2, train.batch_size // 2) == pytest.approx(train.lr) == pytest.approx(original_learning_rate(base, 1, train.batch_size // 2, 2))


# ------------------------------------------------------------------------------------------------ committed figures
def test_committed_cpu_figures_are_whole(root):
    runs = json.loads((root / "data/sweeps/speed-cpu.json").read_text())["comparisons"]
    assert len({(run["workload"], run["what"], run.get("memory_kept", False), *(row["setting"] for row in run["rows"])) for run in runs}) == len(runs) >= 4
    for run in runs:
        assert run["device"] == "cpu" and run["threads"] == 1 and run["clock"] in ("wall", "cpu")
        assert max(gaps["float32"] for gaps in run["agreement"].values()) < 2e-5, "contenders agreed before they were timed"
        factor = {"train": 3, "sample": 2 * (run["steps"] or 0)}.get(run["what"], 1)
        operations = pass_flops(WORKLOADS[run["workload"]], run["what"]) * run["batch"] * factor
        for row in run["rows"]:
            assert len(row["seconds"]) == run["rounds"] and row["tflops"] * row["ms"] / 1e3 == pytest.approx(operations / 1e12, rel=5e-3)
