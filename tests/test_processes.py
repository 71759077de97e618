"""Many processes: DDP, FSDP and one process train the same, go on from each other's checkpoints, and die in good order."""
import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import processes_toy as program
import pytest
import torch
import training_toy as toy
from processes_toy import launch, losses_of, start
from torch import nn

from ldm_edu import cli, processes, training
from ldm_edu.checkpoint import check_checkpoint, list_checkpoints, load_checkpoint, newest_checkpoint
from ldm_edu.unet import build_unet


def alone(folder, *jobs: dict) -> list[dict]:
    """Do the jobs in this process."""
    return [program.do(job, folder) for job in jobs]


def rows_of(folder) -> list[dict]:
    """The lines of a run's log."""
    return [json.loads(line) for line in (folder / "log.jsonl").open()]


def same_run(got, expected, weights: float = 1e-4) -> None:
    """Two finished runs have the same losses to 1e-5, the same log, and the same files of about the same weights."""
    np.testing.assert_allclose(losses_of(got), losses_of(expected), rtol=0, atol=1e-5)
    for a, b in zip(rows_of(got), rows_of(expected), strict=True):
        assert set(a) == set(b)
        assert all(a[key] == pytest.approx(b[key], abs=1e-4) for key in a if key != "seconds"), (a, b)
    (here, _), (there, _) = (load_checkpoint(newest_checkpoint(folder / "checkpoints")) for folder in (got, expected))
    for stem in ("model", "ema", "optimizer"):
        assert {k: (v.shape, v.dtype) for k, v in here[stem].items()} == {k: (v.shape, v.dtype) for k, v in there[stem].items()}
        for key in here[stem]:
            if stem != "optimizer" and key != "calls":  # which counts micro-batches
                torch.testing.assert_close(here[stem][key], there[stem][key], rtol=0, atol=weights, msg=lambda m, key=key: f"{key}: {m}")


# ---------------------------------------------------------------- one process


def test_every_parameter_lies_in_one_unit_and_units_are_called():
    net, called = build_unet("text-small", model_channels=32, head_dim=32), set()
    units = processes.sharding_units(net)
    for unit in units:
        unit.register_forward_hook(lambda module, *_: called.add(module))
    net(torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 2, 256))
    assert called == set(units), "a unit that is never called would never be gathered"
    assert {id(stage) for part in (net.down, net.mid, net.up) for stage in part} <= {id(unit) for unit in units}
    taken = {}
    for i, unit in enumerate([*units, net]):
        for p in unit.parameters():
            taken.setdefault(id(p), i)
    sizes = [sum(p.numel() for p in net.parameters() if taken[id(p)] == i) for i in range(len(units) + 1)]
    assert min(sizes[:-1]) > 0 and max(sizes) < 0.2 * sum(sizes), sizes


def test_containers_that_are_never_called_are_no_units():
    net = nn.Module()
    net.levels = nn.ModuleList([nn.Module(), nn.Identity(), nn.Linear(2, 2)])
    net.levels[0].blocks = nn.ModuleList([nn.Linear(2, 2), nn.ModuleList([nn.Linear(2, 2)])])
    assert processes.sharding_units(net) == [net.levels[0].blocks[1][0], net.levels[0].blocks[0], net.levels[2]]


def test_without_a_group_nothing_is_cut_and_sharding_changes_nothing(tmp_path):
    plain = training.train(toy.CircleTask(), toy.Circle(), program.CIRCLE, tmp_path / "none", progress=False)
    task = toy.CircleTask()
    full = training.train(task, toy.Circle(), program.CIRCLE.replace(sharding="full"), tmp_path / "full", progress=False)
    assert plain.losses == full.losses and all(not p.is_meta for p in task.model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(plain.ema.parameters(), full.ema.parameters(), strict=True))


def test_a_hollow_model_is_filled_again():
    torch.manual_seed(0)
    net = build_unet("tiny", model_channels=32, num_groups=8)
    net.conv_in.weight.requires_grad_(False)
    twin, names = copy.deepcopy(net), [name for name, _ in net.named_parameters()]
    assert processes.held_bytes(processes.hollow(net).parameters()) == 0
    assert names == [name for name, _ in net.named_parameters()] and not net.conv_in.weight.requires_grad
    processes.refill(net, twin, keep=False)
    assert processes.held_bytes(net.parameters()) == 0
    processes.refill(net, twin)
    assert all(torch.equal(a, b) and a.requires_grad == b.requires_grad for a, b in zip(net.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("value, expected", [("true", "full"), ("1", "full"), ("false", "none"), ("", "none")])
def test_accelerate_launch_with_fsdp_asks_for_sharding(value, expected, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", value)
    assert processes.asked_sharding("none") == expected and processes.asked_sharding("full") == "full"


def test_what_cannot_be_sharded_is_refused(tmp_path):
    full = program.CIRCLE.replace(sharding="full")
    with pytest.raises(ValueError, match="sharding: got 'full' for the parts player, critic of a GameTask, expected 'none'"):
        training.train(toy.GameTask(), toy.Circle(), full, tmp_path / "game", progress=False)
    with pytest.raises(ValueError, match="sharding: got 'full' for a VQ first stage"):
        sharded_vq(tmp_path / "vq")
    with pytest.raises(ValueError, match="sharding: got 'half', expected one of 'none', 'full'"):
        program.CIRCLE.replace(sharding="half")


def sharded_vq(folder):
    """Ask for a sharded VQ first stage."""
    from ldm_edu.autoencoder import AutoencoderConfig
    from ldm_edu.data import Scenes
    from ldm_edu.recipes import FirstStageRecipe, train_autoencoder

    model = AutoencoderConfig(4, 8, (1, 2, 2), 1, mid_attention=False, num_groups=4, double_z=False, codes=16)
    train_autoencoder(Scenes(16, n=32, fields=("image",)), FirstStageRecipe(model), folder, progress=False, steps=2, sharding="full")


def test_only_the_first_process_warns(monkeypatch):
    for rank, count in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        with warnings.catch_warnings(record=True) as caught, processes.one_voice():
            warnings.simplefilter("always") if rank == "0" else None
            warnings.warn("the same", stacklevel=1)
        assert len(caught) == count, rank


# ---------------------------------------------------------------- two processes: the same run, whoever trains it

@pytest.fixture(scope="module")
def relay(tmp_path_factory):
    """Runs that one and two processes, whole and sharded, hand on to each other, beside those that one process trained."""
    folder = tmp_path_factory.mktemp("relay")
    circle = lambda out, stop, **options: {"task": "circle", "out": out, "stop_after": stop, "options": options}
    ldm = lambda out, kind, steps, **options: {"task": kind, "out": out, "options": {"steps": steps, **options}}
    for job in [circle("circle", None), ldm("text", "text", 12), ldm("class", "class", 12)]:
        alone(folder, job)
    alone(folder, circle("c12", 10), circle("c1f", 10), ldm("t12", "text", 4))
    code, said, first = launch(folder, [
        circle("cddp", None, accumulation=2), circle("cfsdp", None, sharding="full"), circle("cfsdp2", None, sharding="full", accumulation=3),
        circle("c21", 10, accumulation=2), circle("cf1d", 10, sharding="full", accumulation=2),
        circle("c12", None), circle("c1f", None, sharding="full"),
        ldm("tfsdp", "text", 12, sharding="full", accumulation=2), ldm("cl2", "class", 4), ldm("t12", "text", 8, accumulation=2),
        {"task": "game", "out": "game", "options": {"sharding": "full"}}, {"task": "circle", "out": "apart", "apart": True, "stop_after": 4},
    ])
    assert code == 0, said[-3000:]
    alone(folder, circle("c21", 20), circle("cf1d", 20), ldm("cl2", "class", 8, accumulation=2), ldm("t12", "text", 12))
    code, said, second = launch(folder, [
        circle("c21", None, accumulation=2), circle("cf1d", None), ldm("cl2", "class", 12, sharding="full"),
        {"task": "circle", "out": "apart", "apart": True, "stop_after": 8},
    ])
    assert code == 0, said[-3000:]
    return folder, first, second


@pytest.mark.parametrize("name", ["cddp", "cfsdp", "cfsdp2"])
def test_two_processes_train_what_one_trains(relay, name):
    same_run(relay[0] / name, relay[0] / "circle")


def test_a_sharded_text_model_is_the_one_of_one_process(relay):
    same_run(relay[0] / "tfsdp", relay[0] / "text", weights=2e-3)


@pytest.mark.parametrize("name", ["c21", "cf1d", "c12", "c1f"])
def test_points_go_on_in_other_hands(relay, name):
    """2 -> 1 -> 2, FSDP -> 1 -> DDP, 1 -> 2 and 1 -> FSDP, with and without accumulation."""
    same_run(relay[0] / name, relay[0] / "circle")


@pytest.mark.parametrize("name, expected", [("cl2", "class"), ("t12", "text")])
def test_models_go_on_in_other_hands(relay, name, expected):
    """2 -> 1 -> FSDP with classes, 1 -> 2 -> 1 with captions."""
    same_run(relay[0] / name, relay[0] / expected, weights=2e-3)


def test_each_process_holds_half(relay):
    _, first, _ = relay
    for ddp, sharded in ((first[0], first[1]), (first[9], first[7])):
        for whole, part in zip(ddp, sharded, strict=True):
            assert whole["weights"] == whole["gradients"] == whole["average"] == whole["moments"] / 2 == whole["hollow"]
            assert part["hollow"] == 0
            for key in ("weights", "gradients", "average", "moments"):
                assert part[key] == pytest.approx(whole[key] / 2, rel=0.02), (key, part[key], whole[key])


def test_a_sharded_run_gives_its_model_back_on_every_process(relay):
    _, (ddp, sharded, *_), _ = relay
    for key in ("average_norm", "model_norm", "losses"):
        assert sharded[0][key] == sharded[1][key] == pytest.approx(ddp[0][key], abs=1e-4), key


def test_sharded_runs_write_the_same_files(relay):
    folder = relay[0]
    files = lambda run: {str(p.relative_to(folder / run)) for p in (folder / run).rglob("*") if p.is_file() and "latents" not in p.parts}
    assert files("tfsdp") == files("text") and {"samples/step-00000012.png", "model/model.safetensors", "run.json"} <= files("tfsdp")
    assert json.loads((folder / "tfsdp" / "run.json").read_text())["config"]["sharding"] == "full"
    from ldm_edu.ldm import load

    pictures = [load(folder / run).sample("a red circle", n=2, steps=4, seed=1) for run in ("tfsdp", "text")]
    torch.testing.assert_close(*pictures, rtol=0, atol=1e-2)


def test_logs_are_not_doubled(relay):
    for run in ("cddp", "cfsdp", "tfsdp", "c21"):
        steps = [row["step"] for row in rows_of(relay[0] / run) if "loss" in row]
        assert steps == list(range(1, steps[-1] + 1)), run


def test_two_parts_are_refused_on_every_process(relay):
    assert all("sharding: got 'full' for the parts player, critic" in told["error"] for told in relay[1][10])


def test_processes_that_see_different_folders_refuse(relay):
    assert all("the processes found checkpoints of steps [-1, 4] (-1: none)" in told["error"] for told in relay[2][3])


# ---------------------------------------------------------------- kills and signals


@pytest.mark.parametrize("kill, newest, sharding", [({"rank": 1, "step": 10}, 8, "none"), ({"rank": 0, "save": 8}, 4, "full")])
def test_a_killed_process_ends_all_and_leaves_a_run_that_goes_on(tmp_path, kill, newest, sharding):
    began = time.monotonic()
    options = {"sharding": sharding}
    code, said, _ = launch(tmp_path, [{"task": "circle", "out": "hurt", "kill": kill, "options": options}], timeout=90)
    assert code != 0 and "Signal 9 (SIGKILL)" in said and time.monotonic() - began < 75
    root = tmp_path / "hurt" / "checkpoints"
    assert [step for step, _ in list_checkpoints(root)][-1] == newest
    if "save" in kill:
        assert {p.name for p in next(root.glob(f".part-{kill['save']:08d}-*")).iterdir()} == {"model.safetensors", "ema.safetensors"}
    assert check_checkpoint(newest_checkpoint(root))["step"] == newest
    shutil.copytree(tmp_path / "hurt", tmp_path / "hurt1")
    alone(tmp_path, {"task": "circle", "out": "whole"}, {"task": "circle", "out": "hurt1", "seed": 5})
    same_run(tmp_path / "hurt1", tmp_path / "whole")
    code, said, _ = launch(tmp_path, [{"task": "circle", "out": "hurt", "seed": 7, "options": options}])
    assert code == 0, said[-3000:]
    same_run(tmp_path / "hurt", tmp_path / "whole")
    assert not list(root.glob(".*")), "what the kill left half-written is gone"


def command(folder, *more: str, module: tuple[str, str] = ("-m", "ldm_edu")) -> list[str]:
    """`ldm-edu train` as two processes that each write what they say into a file of their own."""
    return ["--log-dir", str(folder / "said"), "--redirects", "3", *module, "train", "--recipe", "text-demo", "--items", "48", "--size", "16", "--batch-size", "4",
            "--log-every", "1", "--validate-every", "0", "--out", str(folder / "run"), *more]


def said_by(folder, rank: int, stream: str = "*") -> str:
    """What a process said in the newest of the commands; not what torch 2.8's gloo says of itself."""
    logs = sorted((folder / "said").iterdir(), key=lambda path: path.stat().st_mtime)[-1]
    lines = [line for path in logs.glob(f"attempt_0/{rank}/{stream}.log") for line in path.read_text().splitlines(keepends=True)]
    return "".join(line for line in lines if not line.startswith("[Gloo] Rank"))


def test_the_command_line_in_two_processes_says_everything_once(tmp_path):
    """Also with a damaged checkpoint: one warning. And the processes have left their group."""
    watched = (program.__file__, "--cli")
    for steps, sharding in (("4", "full"), ("6", "none")):
        running = start(*command(tmp_path, "--steps", steps, "--save-every", "2", "--sample-every", "2", "--sharding", sharding, module=watched))
        out, err = running.communicate(timeout=300)
        assert running.returncode == 0, err + said_by(tmp_path, 0)
        assert said_by(tmp_path, 0, "stdout").count("draw with `ldm-edu sample") == 1 and f"{steps}/{steps}" in said_by(tmp_path, 0, "stderr")
        assert said_by(tmp_path, 1) == "" and "still in a group" not in said_by(tmp_path, 0) and "destroy_process_group" not in out + err
        assert ("checkpoint skipped" in said_by(tmp_path, 0)) == (steps == "6")
        path = tmp_path / "run" / "checkpoints" / "step-00000004" / "ema.safetensors"
        path.write_bytes(path.read_bytes()[:-9])
    assert [row["step"] for row in rows_of(tmp_path / "run")] == list(range(1, 7))
    assert sorted(path.name for path in (tmp_path / "run" / "samples").iterdir()) == [f"step-0000000{step}.png" for step in (2, 4, 6)]


def test_sigterm_to_torchrun_saves_and_the_run_goes_on_alone(tmp_path):
    running = start(*command(tmp_path, "--steps", "4000", "--save-every", "0", "--sharding", "full"))
    log, deadline = tmp_path / "run" / "log.jsonl", time.monotonic() + 120
    while not (log.exists() and len(log.read_text().splitlines()) >= 3) and time.monotonic() < deadline and running.poll() is None:
        time.sleep(0.05)
    began = time.monotonic()
    running.send_signal(signal.SIGTERM)
    running.communicate(timeout=60)
    assert running.returncode != 0 and time.monotonic() - began < 30
    step = check_checkpoint(newest_checkpoint(tmp_path / "run" / "checkpoints"))["step"]
    assert 3 <= step < 4000 and len(losses_of(tmp_path / "run")) == step
    assert said_by(tmp_path, 0).count(f"stopped by SIGTERM after step {step}") == 1 and said_by(tmp_path, 1) == ""
    assert cli.main(command(tmp_path, "--steps", str(step + 2), "--save-every", "0")[6:]) == 0
    assert [row["step"] for row in rows_of(tmp_path / "run")] == list(range(1, step + 3))


# ------------------------------------------------------------------------------------------------ memory that is kept
KEPT = """
import resource, sys
from ldm_edu.processes import keep_freed_memory
import torch

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        parts = [torch.ones(2**21) for _ in range(4)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.ones(2**21)
print(faults(), keep_freed_memory() if sys.argv[1] == "keep" else None, faults() and faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux's C library")
@pytest.mark.parametrize("asked", ["keep", "plain"])
def test_freed_memory_is_kept_where_it_is_asked_for(asked):
    """Page faults of a process that frees and fetches 32 MiB again and again.

    By itself glibc raises its threshold after the first large block, and what then is given back hangs on what
    lies at the heap's top: the tunable fixes where the process begins, so that both halves are of one state.
    """
    environment = os.environ | {"GLIBC_TUNABLES": f"glibc.malloc.mmap_threshold={2**17}"}
    done = subprocess.run([sys.executable, "-c", KEPT, asked], capture_output=True, text=True, check=True, env=environment)
    before, kept, after = done.stdout.split()
    assert kept == ("True" if asked == "keep" else "None") and int(before) > 80_000
    assert (int(after) < 0.2 * int(before)) == (asked == "keep")


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(processes.sys, "platform", "win32")
    assert processes.keep_freed_memory() is False
    monkeypatch.setattr(processes.sys, "platform", "linux")
    monkeypatch.setattr(processes.ctypes, "CDLL", lambda name: object())  # a C library without mallopt
    assert processes.keep_freed_memory() is False


@pytest.mark.parametrize("largest", [0, -5, 2**25 + 1, 2**40, "1", 1.5, True])
def test_a_threshold_that_c_would_cut_is_refused(largest):
    with pytest.raises(ValueError, match="largest: got .*, expected an integer from 1 to 33,554,432"):
        processes.keep_freed_memory(largest)


def test_an_optimiser_that_has_stepped_is_not_handed_over():
    net, other = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    processes.hand_over(optimizer, net, other)
    assert optimizer.param_groups[0]["params"][0] is other.weight and not optimizer.state[other.weight], "looking at the state makes an entry, no moments"
    processes.hand_over(optimizer, other, net), processes.hand_over(optimizer, net, other)
    other(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match="got one with moments of 2 parameters, expected one that has not stepped yet"):
        processes.hand_over(optimizer, other, net)
