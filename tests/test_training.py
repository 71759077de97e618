"""The trainer: resume bit for bit, also after a kill; splits and processes change nothing; faults are named."""
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import training_toy as toy
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ldm_edu import guards, training
from ldm_edu.checkpoint import (
    CheckpointError,
    LatentDataset,
    cache_latents,
    check_checkpoint,
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    rotate_checkpoints,
    save_checkpoint,
    state_hash,
)
from ldm_edu.core import Config
from ldm_edu.guards import locked
from ldm_edu.runs import collate_items, optimizer_tensors, restore_optimizer, seed_globals, slice_batch
from ldm_edu.training import (
    EMA,
    NonFiniteLoss,
    OutOfMemory,
    RowRandom,
    TrainConfig,
    TrainingInterrupted,
    TrainingTask,
    batch_indices,
    ema_decay,
    learning_rate,
    train,
)

QUICK = toy.CONFIG.replace(steps=12, save_every=4, validate_every=6, log_every=3)


def go(out, config=QUICK, task=None, data=None, **options):
    return train(task or toy.CircleTask(), toy.Circle() if data is None else data, config, out, **{"progress": False, **options})


def same(a, b):
    assert set(a) == set(b)
    return all(torch.equal(a[k], b[k]) for k in a)


# ---------------------------------------------------------------- randomness and order


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 40), batch=st.integers(1, 90), seed=st.integers(0, 2**40), epochs=st.integers(1, 4))
def test_every_item_comes_once_in_every_epoch(n, batch, seed, epochs):
    stream = []
    for step in range(-(-n * epochs // batch)):
        indices = batch_indices(n, batch, seed, step)
        assert len(indices) == batch
        stream += indices
    for epoch in range(epochs):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_epochs_and_seeds_are_shuffled_differently():
    assert batch_indices(50, 50, 0, 0) != batch_indices(50, 50, 0, 1) != batch_indices(50, 50, 1, 1)
    assert batch_indices(50, 50, 3, 7) == batch_indices(50, 50, 3, 7)


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(0, 12), max_size=4), seed=st.integers(0, 2**62), step=st.integers(0, 10**9))
def test_row_random_does_not_depend_on_the_cut(cuts, seed, step):
    places = [0, *sorted(cuts), 12]
    pieces = [range(a, b) for a, b in zip(places, places[1:]) if b > a]
    whole = RowRandom(seed, step, range(12))
    for draw in (lambda r: r.normal((3, 2), "noise"), lambda r: r.uniform("t"), lambda r: r.integers(1000, "t"),
                 lambda r: torch.stack([torch.rand((), generator=g) for g in r.generators("x")])):
        assert torch.equal(draw(whole), torch.cat([draw(RowRandom(seed, step, piece)) for piece in pieces]))


def test_row_random_is_random_and_tags_are_independent():
    rng = RowRandom(0, 3, range(4000))
    normal, other = rng.normal((2,), "a"), rng.normal((2,), "b")
    assert abs(normal.mean()) < 0.04 and abs(normal.std() - 1) < 0.03
    assert abs(torch.corrcoef(torch.stack([normal[:, 0], other[:, 0]]))[0, 1]) < 0.06
    assert abs(torch.corrcoef(torch.stack([normal[:, 0], RowRandom(0, 4, range(4000)).normal((2,), "a")[:, 0]]))[0, 1]) < 0.06
    uniform, integers = rng.uniform("u"), rng.integers(10, "i")
    assert uniform.min() >= 0 and uniform.max() < 1 and abs(uniform.mean() - 0.5) < 0.02
    assert torch.bincount(integers, minlength=10).min() > 320 and integers.max() == 9
    assert uniform.dtype == torch.float32 and integers.dtype == torch.int64


def test_row_random_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    RowRandom(0, 0, range(8)).normal((4,), "noise")
    assert torch.equal(before, torch.get_rng_state())


def test_what_is_drawn_ahead_is_what_the_next_step_would_draw():
    """And each asking owns its numbers: a task may write into them."""
    draws = [lambda r: r.normal((3, 2), "noise"), lambda r: r.uniform("t"), lambda r: r.integers(1000, "t"), lambda r: r.integers(10, "t"), lambda r: r.uniform("t", (2,))]
    now, fresh = RowRandom(3, 7, range(2, 6)), RowRandom(3, 8, range(2, 6))
    for draw in draws[:3]:
        draw(now)
    later = now.ahead()
    assert (later.step, later.rows) == (8, [2, 3, 4, 5]) and len(later._ready) == 3
    for draw in draws:
        first = draw(later)
        assert torch.equal(first, draw(fresh))
        assert torch.equal(draw(later), first.clone()) and draw(later).data_ptr() != first.data_ptr()
    assert not later._ready and len(later.ahead()._ready) == 5


def test_one_ahead_gives_all_batches_once_and_leaves_generators_alone():
    class Random(torch.utils.data.Dataset):
        def __getitem__(self, step):
            torch.manual_seed(step)
            return torch.rand(2), step

    ahead, seen = training.OneAhead(torch.utils.data.DataLoader(Random(), batch_size=None, sampler=range(3, 6), collate_fn=training._as_it_is),
                                    torch.device("cpu")), []
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for fetches in (0, 1, 2):
        for _ in range(fetches):
            ahead.fetch()
        seen.append(ahead.take()[1])
    assert seen == [3, 4, 5] and torch.equal(before, torch.get_rng_state())
    ahead.fetch()
    with pytest.raises(IndexError):
        ahead.take()


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_next_step_is_prepared_before_this_one_is_waited_for(tmp_path, monkeypatch, accumulation):
    """On an accelerator the processor would otherwise stand idle, and then the accelerator."""
    events, fill, apply, get = [], RowRandom._fill, training.apply_part, training.StepBatches.__getitem__
    noted = lambda what, real: lambda *rest: (events.append(what(*rest)), real(*rest))[1]
    monkeypatch.setattr(RowRandom, "_fill", noted(lambda self, *ask: f"draw {self.step}", fill))
    monkeypatch.setattr(training, "apply_part", noted(lambda run, *rest: f"apply {run.step}", apply))
    monkeypatch.setattr(training.StepBatches, "__getitem__", noted(lambda self, step: f"fetch {step}", get))
    go(tmp_path, QUICK.replace(steps=3, accumulation=accumulation, validate_every=0))
    once = list(dict.fromkeys(events))
    assert once == ["fetch 0", "draw 0", "draw 1", "fetch 1", "apply 0", "draw 2", "fetch 2", "apply 1", "draw 3", "apply 2"]


def test_what_was_drawn_for_another_step_is_not_used():
    """A part that was idle in between finds the numbers of the step that it skipped."""
    run = SimpleNamespace(batches=SimpleNamespace(rows=range(4, 9)), config=QUICK.replace(accumulation=2), ahead={}, step=5,
                          accelerator=SimpleNamespace(device=torch.device("cpu")))
    for prepared, used in ((4, True), (3, False)):
        before = [RowRandom(QUICK.seed, prepared, rows) for rows in ([4, 5], [6, 7, 8])]
        run.ahead["critic"] = [rng.ahead() for rng in before]
        pieces = training.step_random(run, "critic")
        assert [rng.step for _, rng in pieces] == [5, 5] and pieces[0][1].rows == [4, 5] and not run.ahead
        assert torch.equal(pieces[1][1].uniform("t"), RowRandom(QUICK.seed, 5, [6, 7, 8]).uniform("t")), used


# ---------------------------------------------------------------- schedule and average


def test_learning_rate_is_warm_up_then_cosine():
    config = TrainConfig(steps=110, warmup_steps=10, lr=0.5, final_lr_fraction=0.1)
    assert learning_rate(config, 0) == pytest.approx(0.05)
    assert learning_rate(config, 9) == pytest.approx(0.5) == learning_rate(config, 10)
    assert learning_rate(config, 109) == pytest.approx(0.05)
    middle = learning_rate(config.replace(steps=111), 60)
    assert middle == pytest.approx(0.5 * 0.55)
    assert learning_rate(config.replace(lr_schedule="constant"), 109) == 0.5
    assert learning_rate(config.replace(warmup_steps=0, steps=1), 0) == 0.5


def test_ema_follows_its_formula():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    ema, decay = EMA(model, 0.9), 0.9
    expected = {k: v.clone() for k, v in model.named_parameters()}
    for step in range(1, 40):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
            model[1].running_mean.add_(1)
        ema.update(model, step)
        weight = min(decay, (1 + step) / (10 + step))
        expected = {k: weight * expected[k] + (1 - weight) * v for k, v in model.named_parameters()}
    for k, v in ema.model.named_parameters():
        torch.testing.assert_close(v, expected[k].detach(), rtol=1e-5, atol=1e-6)
        assert not v.requires_grad and v.dtype == torch.float32
    assert torch.equal(ema.model[1].running_mean, model[1].running_mean)
    assert ema_decay(1, 0.999) == 2 / 11 and ema_decay(10**6, 0.999) == 0.999 and ema_decay(1, 0.999, warmup=False) == 0.999


def test_ema_of_half_precision_weights_is_float32():
    model = nn.Linear(2, 2).to(torch.bfloat16)
    ema = EMA(model, 0.999, warmup=False)
    ema.update(model, 1)
    assert {p.dtype for p in ema.model.parameters()} == {torch.float32}


def test_ema_moves_once_per_optimiser_step_under_accumulation(tmp_path, monkeypatch):
    steps, update = [], EMA.update
    monkeypatch.setattr(EMA, "update", lambda self, model, step: (steps.append(step), update(self, model, step)))
    go(tmp_path, QUICK.replace(accumulation=4))
    assert steps == list(range(1, 13))


# ---------------------------------------------------------------- splits, precision, the loop of the lesson


def test_accumulation_changes_nothing(tmp_path):
    config = toy.CONFIG.replace(steps=40)
    one = go(tmp_path / "1", config)
    four = go(tmp_path / "4", config.replace(accumulation=4))
    five = go(tmp_path / "5", config.replace(accumulation=5))  # 16 rows in parts of 3 and 4
    np.testing.assert_allclose(one.losses, four.losses, rtol=0, atol=1e-6)
    np.testing.assert_allclose(one.losses, five.losses, rtol=0, atol=1e-6)
    for a, b in zip(one.ema.parameters(), four.ema.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_the_teaching_loop_agrees_with_the_trainer(tmp_path):
    config = toy.CONFIG.replace(steps=60)
    task = toy.CircleTask()
    losses, ema = training.simple_loop(task, toy.Circle(), config)
    result = go(tmp_path, config)
    np.testing.assert_allclose(losses, result.losses, rtol=0, atol=1e-6)
    for a, b in zip(ema.model.parameters(), result.ema.parameters()):
        torch.testing.assert_close(a, b.cpu(), rtol=0, atol=1e-5)


def test_learning_happens(tmp_path):
    losses = go(tmp_path, toy.CONFIG).losses
    assert np.mean(losses[-20:]) < 0.7 * np.mean(losses[:5])


def test_bf16_trains_float32_weights_and_leaves_the_model_clean(tmp_path):
    task = toy.CircleTask()
    result = go(tmp_path / "bf16", QUICK.replace(precision="bf16"), task)
    exact = go(tmp_path / "fp32", QUICK)
    assert {p.dtype for p in task.model.parameters()} == {torch.float32}
    assert 0 < max(abs(a - b) for a, b in zip(result.losses, exact.losses)) < 0.05
    assert task.model.forward.__func__ is toy.Net.forward
    assert result.step == 12


@pytest.mark.parametrize("flags, expected", [("fpu avx512_bf16 sse", "fp32"), ("fpu amx_bf16", "bf16"), ("fpu avx512f", "fp32")])
def test_auto_precision_follows_the_processor(flags, expected, monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda self: True)
    monkeypatch.setattr(Path, "read_text", lambda self: f"model name : any\nflags : {flags}\n")
    assert training.choose_precision("auto", torch.device("cpu")) == expected
    assert training.choose_precision("fp32", torch.device("cpu")) == "fp32"


def test_fp16_needs_a_gpu(tmp_path):
    with pytest.raises(ValueError, match="precision: got 'fp16' on a CPU"):
        go(tmp_path, QUICK.replace(precision="fp16"))


def test_workers_change_nothing(tmp_path):
    assert go(tmp_path / "0").losses == go(tmp_path / "2", QUICK.replace(workers=2)).losses


class Jittered(toy.Circle):
    """Augments with the global generators, as user code does."""

    def __getitem__(self, index):
        item = super().__getitem__(index)
        item["point"] = item["point"] + 0.01 * torch.randn(2) + float(np.random.rand()) * 0.01 + random.random() * 0.01
        return item


def test_augmentation_repeats_on_resume_with_workers_and_splits(tmp_path):
    plain = go(tmp_path / "a", data=Jittered())
    go(tmp_path / "b", data=Jittered(), stop_after=5)
    assert go(tmp_path / "b", QUICK.replace(workers=1), data=Jittered()).losses == plain.losses


def test_two_processes_equal_one_and_stop_together(tmp_path):
    options = {"steps": 30, "accumulation": 2}
    one = go(tmp_path / "one", toy.CONFIG.replace(**options), validation=toy.Circle(20))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", toy.__file__,
               str(tmp_path / "two"), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    stops = [int((tmp_path / "two" / f"stop{rank}").read_text()) for rank in range(2)]
    assert stops[0] == stops[1] and 8 < stops[0] < 11, stops
    two = json.loads((tmp_path / "two" / "losses.json").read_text())
    assert len(two) == 30
    np.testing.assert_allclose(one.losses, two, rtol=0, atol=1e-5)
    for key, value in toy.weights(tmp_path / "two").items():
        torch.testing.assert_close(value, toy.weights(tmp_path / "one")[key], rtol=0, atol=1e-4)
    logs = [[json.loads(line) for line in (tmp_path / folder / "log.jsonl").open()] for folder in ("one", "two")]
    for a, b in zip(*logs, strict=True):
        assert set(a) == set(b)
        assert all(a[k] == pytest.approx(b[k], abs=1e-4) for k in a if k != "seconds")
    again = go(tmp_path / "two", toy.CONFIG.replace(steps=32))  # and one process goes on where two stopped
    assert again.step == 32 and again.losses[:30] == two


# ---------------------------------------------------------------- tasks of two parts


def play_by_hand(config, task):
    """The game of `GameTask` as a loop that one would write for it: two optimisers, the player first."""
    player, critic = task.model.player, task.model.critic
    moves = {"player": torch.optim.AdamW(player.parameters(), lr=1.0, weight_decay=config.weight_decay),
             "critic": torch.optim.AdamW(critic.parameters(), lr=1.0, betas=(0.5, 0.9), weight_decay=config.weight_decay)}
    losses, data = [], toy.Circle()
    for step in range(config.steps):
        points = data.points[batch_indices(len(data), config.batch_size, config.seed, step)]
        for part, net, scale in (("player", player, 1.0), ("critic", critic, 2.0)):
            rng = RowRandom(config.seed, step, range(config.batch_size))
            if not task.active(part, step):
                continue
            loss = task.part_loss(part, task.model, {"point": points}, rng)[0].mean()
            gradients = torch.autograd.grad(loss, list(net.parameters()))
            for p, g in zip(net.parameters(), gradients, strict=True):
                p.grad = g
            nn.utils.clip_grad_norm_(net.parameters(), config.grad_clip)
            moves[part].param_groups[0]["lr"] = learning_rate(config, step) * scale
            moves[part].step()
            losses += [loss.item()] if part == "player" else []
    return losses


@pytest.mark.parametrize("critic_from", [0, 5])
def test_two_parts_are_two_optimisers_in_turn(tmp_path, critic_from):
    by_hand = toy.GameTask(critic_from=critic_from)
    losses = play_by_hand(QUICK, by_hand)
    task = toy.GameTask(critic_from=critic_from)
    result = go(tmp_path, task=task)
    np.testing.assert_allclose(result.losses, losses, rtol=0, atol=1e-6)
    for key, value in by_hand.model.state_dict().items():
        torch.testing.assert_close(task.model.state_dict()[key], value, rtol=0, atol=1e-6)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").open()]
    assert ("loss_critic" in rows[0]) == (critic_from == 0) and all({"loss", "score", "grad_norm"} <= set(r) for r in rows)
    assert {"loss_critic", "grad_norm_critic", "real"} <= set(rows[-1])


def test_a_part_moves_nothing_of_another(tmp_path):
    task = toy.GameTask(critic_from=10**9)
    before = {k: v.clone() for k, v in task.model.state_dict().items()}
    go(tmp_path, task=task)
    moved = {k for k, v in task.model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {"player.weight", "player.bias"}
    assert all(p.requires_grad for p in task.model.parameters())


def test_two_parts_resume_bit_for_bit_and_accumulate(tmp_path):
    whole = go(tmp_path / "whole", task=toy.GameTask())
    go(tmp_path / "parts", task=toy.GameTask(), stop_after=7)
    both = go(tmp_path / "parts", task=toy.GameTask(seed=9))
    assert both.losses == whole.losses
    for stem in ("model", "ema", "optimizer"):
        assert same(toy.weights(tmp_path / "whole", stem), toy.weights(tmp_path / "parts", stem)), stem
    cut = go(tmp_path / "cut", QUICK.replace(accumulation=3), toy.GameTask())
    np.testing.assert_allclose(cut.losses, whole.losses, rtol=0, atol=1e-6)


def test_a_nan_of_the_second_part_is_named(tmp_path):
    class Poisoned(toy.GameTask):
        def part_loss(self, part, model, batch, rng):
            losses, logs = super().part_loss(part, model, batch, rng)
            return (losses * float("nan") if part == "critic" and rng.step == 3 else losses), logs

    task = Poisoned()
    with pytest.raises(NonFiniteLoss, match="step 3"):
        go(tmp_path, task=task)
    assert all(p.isfinite().all() for p in task.model.parameters())


def test_two_processes_equal_one_in_a_game(tmp_path):
    options = {"steps": 20, "accumulation": 2}
    one = go(tmp_path / "one", toy.CONFIG.replace(**options), toy.GameTask())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", toy.__file__,
               str(tmp_path / "two"), json.dumps(options | {"task": "game"})]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    np.testing.assert_allclose(one.losses, json.loads((tmp_path / "two" / "losses.json").read_text()), rtol=0, atol=1e-5)


# ---------------------------------------------------------------- resume


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_train_100_is_train_50_and_resume_50(tmp_path, dropout):
    whole = go(tmp_path / "whole", toy.CONFIG, toy.CircleTask(dropout=dropout), validation=toy.Circle(20))
    half = go(tmp_path / "parts", toy.CONFIG, toy.CircleTask(dropout=dropout), validation=toy.Circle(20), stop_after=50)
    assert half.step == 50 and not (tmp_path / "parts" / "model").exists()
    other_start = toy.CircleTask(seed=99, dropout=dropout)
    both = go(tmp_path / "parts", toy.CONFIG, other_start, validation=toy.Circle(20))
    assert both.losses == whole.losses and len(both.losses) == 100
    for stem in ("model", "ema", "optimizer"):
        assert same(toy.weights(tmp_path / "whole", stem), toy.weights(tmp_path / "parts", stem)), stem
    logs = [[{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in (tmp_path / d / "log.jsonl").open()]
            for d in ("whole", "parts")]
    assert logs[0] == logs[1] and sum("validation" in line for line in logs[0]) == 4


def test_killed_three_times_equals_uninterrupted(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(toy.__file__).parent), prepend=os.pathsep)  # for the fork server's preload
    options = {"steps": 60, "save_every": 2, "validate_every": 0}
    whole = go(tmp_path / "whole", toy.CONFIG.replace(**options))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training_toy"])
    chance, out, steps = random.Random(), tmp_path / "killed", []
    for _ in range(3):
        start = max([s for s, _ in list_checkpoints(out / "checkpoints")], default=-1)
        child = context.Process(target=toy.train_child, args=(str(out), options))
        child.start()
        deadline = time.monotonic() + 60
        while not any(s > start for s, _ in list_checkpoints(out / "checkpoints")) and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.1))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert child.exitcode in (-signal.SIGKILL, 0)
        steps.append(max(s for s, _ in list_checkpoints(out / "checkpoints")))
    final = go(out, toy.CONFIG.replace(**options))
    assert final.losses == whole.losses, steps
    for stem in ("model", "ema", "optimizer"):
        assert same(toy.weights(tmp_path / "whole", stem), toy.weights(out, stem)), (stem, steps)
    assert [p.name for p in (out / "checkpoints").iterdir() if p.name.startswith(".")] == []


def test_finished_run_returns_at_once_and_can_be_prolonged(tmp_path):
    first = go(tmp_path)
    calls = []
    again = go(tmp_path, callbacks=[calls.append])
    assert again.losses == first.losses and calls == []
    longer = go(tmp_path, QUICK.replace(steps=15, log_every=1, keep=1, accumulation=2))
    assert longer.step == 15 and longer.losses[:12] == first.losses
    assert json.loads((tmp_path / "run.json").read_text())["config"]["steps"] == 15
    assert len(list_checkpoints(tmp_path / "checkpoints")) == 1
    assert json.loads((tmp_path / "model" / "model.json").read_text())["step"] == 15


def test_a_finished_run_keeps_its_model_and_its_steps(tmp_path):
    """Also when it is called with fewer steps; a model that is missing, or of fewer steps, is written."""
    go(tmp_path)
    card = tmp_path / "model" / "model.json"
    told = json.loads(card.read_text())
    card.write_text(json.dumps(told | {"measured": 1}))
    for config in (QUICK, QUICK.replace(steps=6)):
        assert go(tmp_path, config).step == 12
        assert json.loads(card.read_text()) == told | {"measured": 1}
        assert json.loads((tmp_path / "run.json").read_text())["config"]["steps"] == 12
    card.unlink()
    go(tmp_path, QUICK.replace(steps=6))
    assert json.loads(card.read_text()) == told
    card.write_text(json.dumps(told | {"step": 9}))
    go(tmp_path)
    assert json.loads(card.read_text()) == told


def test_a_finished_model_without_checkpoints_is_not_trained_again(tmp_path):
    go(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for resume in (True, False):
        with pytest.raises(ValueError, match="holds a finished model of 12 steps and no checkpoint to go on from, expected another folder"):
            go(tmp_path, resume=resume)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_failed_start_leaves_the_model_as_it_was(tmp_path):
    """Also in half precision, where the model is wrapped while it trains."""
    go(tmp_path, QUICK.replace(precision="bf16"))
    for folder in (tmp_path / "checkpoints").glob("step-*"):
        (folder / "model.safetensors").write_bytes(b"")
    task = toy.CircleTask()
    with pytest.raises(CheckpointError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        go(tmp_path, QUICK.replace(precision="bf16"), task)
    points, t = torch.randn(4, 2), torch.rand(4)
    plain = toy.Net(0.0)
    plain.load_state_dict(task.model.state_dict())
    assert torch.equal(task.model(points, t), plain(points, t))


@pytest.mark.parametrize("refused", ["player", "critic"])
def test_refused_steps_are_counted_for_each_part(refused):
    """The fp16 scaler may refuse one part's steps for ever: the other's must not hide it, nor stop the average."""
    made = SimpleNamespace(config=QUICK.replace(precision="fp16"), skipped={}, optimizers={}, step=0, saved=None, out=Path("out"),
                           batches=SimpleNamespace(dataset=toy.Circle()))
    for part in ("player", "critic"):
        made.optimizers[part] = torch.optim.SGD([{"params": [nn.Parameter(torch.ones(1))], "lr": 1.0, "lr_scale": 1.0}])
    with pytest.raises(NonFiniteLoss):
        for _ in range(30):
            for part in ("player", "critic"):
                training.apply_part(made, part, 1.0, math.inf if part == refused else 1.0)
                assert not all(made.skipped.values()) or len(made.skipped) == 1
    assert made.skipped[refused] == 21


def test_a_stopped_run_may_end_where_it_is(tmp_path):
    go(tmp_path, stop_after=8)
    assert go(tmp_path, QUICK.replace(steps=8)).step == 8
    told = json.loads((tmp_path / "model" / "model.json").read_text())
    assert (told["step"], told["config"]["steps"]) == (8, 8)
    assert go(tmp_path).step == 12  # and go on later


# ---------------------------------------------------------------- two runs, one folder


def test_a_second_run_in_a_folder_is_refused_while_the_first_is_there(tmp_path):
    refused = []

    def second(report):
        if report.step == 5:
            with pytest.raises(ValueError, match=f"in use by process {os.getpid()} on") as caught:
                go(tmp_path / "run")
            refused.append(caught.value)

    first = go(tmp_path / "run", callbacks=[second])
    assert len(refused) == 1 and first.step == 12 and not (tmp_path / "run" / "run.lock").exists()
    assert [json.loads(line)["step"] for line in (tmp_path / "run" / "log.jsonl").open()] == [3, 6, 9, 12]
    with pytest.raises(ValueError, match="flip: got True"):
        go(tmp_path / "wrong", QUICK.replace(flip=True))
    assert not (tmp_path / "wrong").exists()


def test_a_run_in_another_process_is_named_and_its_kill_frees_the_folder(tmp_path):
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    child = context.Process(target=toy.train_child, args=(str(tmp_path / "run"), {"steps": 5000, "save_every": 5, "workers": 1}))
    child.start()
    while not list((tmp_path / "run" / "checkpoints").glob("step-*5")):
        time.sleep(0.02)
    with pytest.raises(ValueError, match=f"in use by process {child.pid} on .+ since"):
        go(tmp_path / "run", toy.CONFIG.replace(steps=5000, save_every=5))
    child.kill()
    child.join()
    assert (tmp_path / "run" / "run.lock").exists()
    done = list_checkpoints(tmp_path / "run" / "checkpoints")[-1][0]
    assert go(tmp_path / "run", toy.CONFIG.replace(steps=5000, save_every=5), stop_after=done + 5).step == done + 5


def test_all_processes_of_a_second_run_are_refused(tmp_path):
    """The main one alone asks for the folder; none of the others may wait for it for ever."""
    (tmp_path / "run").mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", toy.__file__, str(tmp_path / "run"), "{}"]
    with locked(tmp_path / "run" / "run.lock"):
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode != 0 and f"in use by process {os.getpid()} on" in done.stderr
    assert "ValueError: out: the first process could not have" in done.stderr and not list((tmp_path / "run").iterdir())


def test_what_happens_between_steps_does_not_change_the_run(tmp_path):
    task = toy.CircleTask(dropout=0.3)
    noisy = go(tmp_path / "a", task=task, callbacks=[lambda report: (torch.rand(3), np.random.rand(), random.random())])
    quiet = go(tmp_path / "b", QUICK.replace(validate_every=1, save_every=1), toy.CircleTask(dropout=0.3), validation=toy.Circle(20))
    assert noisy.losses == quiet.losses


def test_the_callers_generators_are_left_alone(tmp_path):
    task = toy.CircleTask()
    seed_globals(3)
    expected = torch.rand(1), np.random.rand(), random.random()
    seed_globals(3)
    go(tmp_path, task=task)
    assert (torch.rand(1), np.random.rand(), random.random()) == expected


def test_validation_noise_is_the_same_at_every_step(tmp_path):
    seen = []

    class Watcher(toy.CircleTask):
        def loss(self, model, batch, rng):
            if rng.step == "validation":
                seen.append((rng.normal((2,), "noise"), rng.uniform("t"), batch["name"]))
                assert not model.training and not torch.is_grad_enabled()
            return super().loss(model, batch, rng)

    go(tmp_path, task=Watcher(), validation=toy.Circle(20))
    assert len(seen) == 2 and torch.equal(seen[0][0], seen[1][0]) and torch.equal(seen[0][1], seen[1][1])
    assert seen[0][2] == [f"p{i * 20 // 16}" for i in range(16)]


def test_foreign_folder_is_refused_with_the_differing_keys(tmp_path):
    go(tmp_path)
    with pytest.raises(ValueError, match=r"config\.lr: 0\.01 there, 0\.5 here"):
        go(tmp_path, QUICK.replace(lr=0.5))
    other = toy.CircleTask()
    other.describe = lambda: {"task": "circle", "width": 64, "depth": 2}
    with pytest.raises(ValueError, match=r"task\.depth: None there, 2 here; task\.width: 32 there, 64 here"):
        go(tmp_path, task=other)
    with pytest.raises(ValueError, match="dataset.items: 97 there, 98 here"):
        go(tmp_path, data=toy.Circle(98))
    with pytest.raises(ValueError, match="holds a run already"):
        go(tmp_path, resume=False)
    moved = toy.Circle()
    moved.fingerprint = lambda: "with other times"
    with pytest.raises(ValueError, match=r"dataset.fingerprint: None there, .* same settings\. A fingerprint of files .* \(cp -a, rsync -a\)"):
        go(tmp_path, data=moved)
    (tmp_path / "run.json").unlink()
    with pytest.raises(ValueError, match="no run.json"):
        go(tmp_path)


def test_last_digits_of_a_measured_number_are_no_other_run(tmp_path):
    task = toy.CircleTask()
    for scale in (1.0140108352929862, 1.0140108352929684):  # of one data set, summed by one thread and by two
        task.describe = lambda scale=scale: {"task": "circle", "scale_factor": scale}
        go(tmp_path, task=task, stop_after=5)
    task.describe = lambda: {"task": "circle", "scale_factor": 1.01402}
    with pytest.raises(ValueError, match="task.scale_factor: 1.01401.* there, 1.01402 here"):
        go(tmp_path, task=task)


def test_a_run_of_an_older_version_goes_on_without_the_fields_that_came_later(tmp_path):
    @dataclass(frozen=True)
    class Shape(Config):
        width: int = 32
        extra: str = "none"  # came later

    task = toy.CircleTask()
    task.describe = lambda: {"task": "circle", "model": Shape()}
    go(tmp_path, task=task, stop_after=5)
    identity = json.loads((tmp_path / "run.json").read_text())
    assert identity["task"]["model"] == {"width": 32, "extra": "none"} and identity["config"]["compile"] is False
    del identity["task"]["model"]["extra"], identity["config"]["compile"]
    (tmp_path / "run.json").write_text(json.dumps(identity))
    go(tmp_path, task=task, stop_after=7)
    assert json.loads((tmp_path / "run.json").read_text())["task"]["model"]["extra"] == "none", "the fields are written from now on"
    task.describe = lambda: {"task": "circle", "model": Shape(extra="much")}
    with pytest.raises(ValueError, match="task.model.extra: 'none' there, 'much' here"):
        go(tmp_path, task=task)
    identity["config"]["gone"] = 1
    (tmp_path / "run.json").write_text(json.dumps(identity))
    with pytest.raises(ValueError, match="config.gone: 1 there, None here"):
        go(tmp_path)


def damage(path, how):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] if how == "truncated" else data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])


@pytest.mark.parametrize("how", ["truncated", "one bit"])
@pytest.mark.parametrize("stem", ["model.safetensors", "ema.safetensors", "optimizer.safetensors"])
def test_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(tmp_path, stem, how):
    whole = go(tmp_path / "whole")
    go(tmp_path / "hurt", stop_after=10)
    damage(tmp_path / "hurt" / "checkpoints" / "step-00000010" / stem, how)
    with pytest.warns(UserWarning, match=f"step-00000010.*{stem}: damaged"):
        assert go(tmp_path / "hurt").losses == whole.losses
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_checkpoint(newest_checkpoint(tmp_path / "hurt" / "checkpoints"))["step"] == 12


def test_when_all_checkpoints_are_damaged_nothing_is_overwritten(tmp_path):
    go(tmp_path)
    for _, folder in list_checkpoints(tmp_path / "checkpoints"):
        (folder / "state.json").write_text("{")
    with pytest.warns(UserWarning), pytest.raises(CheckpointError, match="no whole checkpoint is left"):
        go(tmp_path)


# ---------------------------------------------------------------- stops and faults


def test_nan_stops_before_any_weight_changes(tmp_path):
    go(tmp_path / "good", QUICK, stop_after=7)
    task = toy.CircleTask(poison=7)
    with pytest.raises(NonFiniteLoss, match="step 7: loss nan") as caught:
        go(tmp_path / "bad", task=task)
    assert caught.value.indices == batch_indices(97, 16, 0, 7)
    assert caught.value.checkpoint == tmp_path / "bad" / "checkpoints" / "step-00000004"
    assert str(caught.value.checkpoint) in str(caught.value) and str(caught.value.indices[0]) in str(caught.value)
    good = toy.weights(tmp_path / "good", "model")
    assert all(torch.equal(good[name], p) for name, p in task.model.named_parameters())
    assert go(tmp_path / "bad").step == 12  # once the cause is gone


def test_the_advice_after_a_nan_works(tmp_path):
    """The folder takes no other settings, and says so; but it gives away what was learnt until its last checkpoint."""
    with pytest.raises(NonFiniteLoss, match="Other settings need another folder; .* with steps=4: that makes .*model of the checkpoint") as caught:
        go(tmp_path / "bad", task=toy.CircleTask(poison=7))
    assert str(tmp_path / "bad" / "model") in str(caught.value)
    with pytest.raises(ValueError, match=r"config\.lr"):
        go(tmp_path / "bad", QUICK.replace(lr=1e-3))
    assert go(tmp_path / "bad", QUICK.replace(steps=4)).step == 4
    assert same(training_file(tmp_path / "bad" / "model" / "model.safetensors"), toy.weights(tmp_path / "bad"))
    with pytest.raises(NonFiniteLoss, match="folder\\.$"):  # nothing was learnt yet
        go(tmp_path / "first", task=toy.CircleTask(poison=2))


def test_infinite_gradient_stops_too(tmp_path):
    class Steep(toy.CircleTask):
        def loss(self, model, batch, rng):
            losses, logs = super().loss(model, batch, rng)
            return (losses - losses.detach()).abs().sqrt() + losses.detach(), logs  # finite value, infinite slope

    with pytest.raises(NonFiniteLoss, match="gradient norm (nan|inf)"):
        go(tmp_path, task=Steep())


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signals_finish_the_step_and_leave_a_checkpoint(tmp_path, signum):
    before = signal.getsignal(signum)

    class Stopped(toy.CircleTask):
        def loss(self, model, batch, rng):
            if rng.step == 5:
                os.kill(os.getpid(), signum)
                time.sleep(0.01)
            return super().loss(model, batch, rng)

    with pytest.raises(TrainingInterrupted) as caught:
        go(tmp_path / "stopped", task=Stopped())
    assert caught.value.step == 6 and caught.value.exit_code == 128 + signum
    assert check_checkpoint(caught.value.checkpoint)["step"] == 6 and str(caught.value.checkpoint) in str(caught.value)
    assert signal.getsignal(signum) is before
    assert go(tmp_path / "stopped").losses == go(tmp_path / "whole").losses


def test_out_of_memory_says_what_to_change(tmp_path):
    class Hungry(toy.CircleTask):
        def loss(self, model, batch, rng):
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(OutOfMemory, match="16 rows at a time. Raise accumulation from 1 to 2"):
        go(tmp_path, task=Hungry())


def test_a_full_disk_leaves_the_former_checkpoint(tmp_path, monkeypatch):
    from ldm_edu import checkpoint

    go(tmp_path, stop_after=4)
    real = checkpoint.save_file

    def full(tensors, path):
        if "optimizer" in str(path):
            raise OSError(28, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        go(tmp_path)
    assert [s for s, _ in list_checkpoints(tmp_path / "checkpoints")] == [0, 4]
    assert not list((tmp_path / "checkpoints").glob(".part*"))


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    """What safetensors raises is no OSError; the disk's own refusal is one, and nothing is left behind."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        with pytest.raises(OSError, match=r"model\.safetensors: could not be written \("):
            save_checkpoint(tmp_path, 3, {"model": {"w": torch.zeros(10_000)}}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("values, message", [
    ({"steps": 0}, "steps: got 0"), ({"precision": "int8"}, "expected one of 'fp32', 'bf16', 'fp16'"), ({"keep": 0}, "keep: got 0"),
    ({"lr_schedule": "cosin"}, "did you mean 'cosine'"), ({"ema_decay": 1.0}, "expected less than 1"), ({"lr": float("nan")}, "lr: got nan"),
    ({"learning_rate": 1}, "unknown learning_rate"),
    ({"steps": 3.0}, "steps: got 3.0, expected an integer"), ({"lr": "1e-3"}, "lr: got '1e-3', expected a number"), ({"keep": True}, "keep: got True"),
    ({"flip": 1}, "flip: got 1, expected True or False"), ({"seed": 2**64}, "seed: got 18446744073709551616, expected an integer of 64 bits"),
    ({"betas": (0.9,)}, r"betas: got \(0.9,\), expected two numbers"), ({"betas": 0.9}, "betas: got 0.9"), ({"betas": (0.9, 1.0)}, "less than 1"),
])
def test_config_refuses(values, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig.from_dict(values)


def test_config_round_trip():
    config = TrainConfig(betas=(0.5, 0.9), steps=7)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    numpys = TrainConfig(steps=np.int64(7), lr=np.float32(0.5), flip=np.bool_(True), weight_decay=np.float64(0), seed=-3)
    assert numpys == TrainConfig(steps=7, lr=0.5, flip=True, weight_decay=0.0, seed=-3) and '"steps": 7' in json.dumps(numpys.to_dict())


def test_other_refusals(tmp_path):
    with pytest.raises(ValueError, match="flip: got True"):
        go(tmp_path / "a", QUICK.replace(flip=True))
    with pytest.raises(ValueError, match="0 items"):
        go(tmp_path / "b", data=toy.Circle(0))
    with pytest.raises(ValueError, match="batch_size: got 16, expected at least processes x accumulation"):
        go(tmp_path / "c", QUICK.replace(accumulation=17))

    class Scalar(toy.CircleTask):
        def loss(self, model, batch, rng):
            losses, logs = super().loss(model, batch, rng)
            return losses.mean(), logs

    with pytest.raises(ValueError, match=r"loss: got shape \(\), expected \(b\), b=16"):
        go(tmp_path / "d", task=Scalar())
    with pytest.raises(NotImplementedError, match="must define loss"):
        task = TrainingTask()
        task.model = nn.Linear(1, 1)
        go(tmp_path / "e", task=task)


def test_log_samples_export_and_tensorboard(tmp_path, monkeypatch):
    class Drawing(toy.CircleTask):
        def draw(self, ema_model, step, folder):
            (folder / f"{step}.txt").write_text(str(ema_model.training))

    result = go(tmp_path / "a", QUICK.replace(sample_every=5, tensorboard=True), Drawing())
    assert sorted(p.name for p in (tmp_path / "a" / "samples").iterdir()) == ["10.txt", "12.txt", "5.txt"]
    lines = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").open()]
    assert [line["step"] for line in lines] == [3, 6, 9, 12]
    assert lines[1]["loss"] == pytest.approx(np.mean(result.losses[3:6])) and set(lines[0]) == {"step", "loss", "lr", "grad_norm", "seconds", "t"}
    assert lines[0]["t"] == pytest.approx(RowRandom(0, 2, range(16)).uniform("t").mean().item(), abs=1e-6)
    assert list((tmp_path / "a" / "tensorboard").iterdir())
    assert same(dict(result.ema.state_dict()), training_file(tmp_path / "a" / "model" / "model.safetensors"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        go(tmp_path / "b", QUICK.replace(tensorboard=True))


def training_file(path):
    from safetensors.torch import load_file

    return load_file(path)


def test_collate_and_slices():
    items = [{"a": torch.ones(2) * i, "b": i, "c": 0.5 * i, "d": f"{i}", "e": np.full(3, i), "f": (i, "x"), "g": True} for i in range(4)]
    batch = collate_items(items)
    assert batch["a"].shape == (4, 2) and batch["b"].tolist() == [0, 1, 2, 3] and batch["b"].dtype == torch.int64
    assert batch["c"].dtype == torch.float32 and batch["d"] == list("0123") and batch["e"].shape == (4, 3)
    assert batch["g"].dtype == torch.bool
    cut = slice_batch(batch, 1, 3)
    assert cut["d"] == ["1", "2"] and cut["f"][1] == ["x", "x"] and cut["f"][0].tolist() == [1, 2]


# ---------------------------------------------------------------- checkpoint files and cached latents


def test_checkpoint_round_trip_with_tied_and_strided_tensors(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    group = {"tied": base, "again": base, "strided": base.t(), "view": base[1], "empty": torch.zeros(0, 3), "int": torch.tensor(3)}
    folder = save_checkpoint(tmp_path, 7, {"model": group}, {"note": "é"})
    tensors, state = load_checkpoint(folder)
    assert same(tensors["model"], {k: v.contiguous() for k, v in group.items()}) and state["note"] == "é" and state["step"] == 7
    save_checkpoint(tmp_path, 7, {"model": {"tied": base + 1}}, {})  # the same step again
    assert torch.equal(load_checkpoint(folder)[0]["model"]["tied"], base + 1)


def test_foreign_and_stray_entries_are_no_checkpoints(tmp_path):
    save_checkpoint(tmp_path, 1, {"model": {"a": torch.ones(1)}}, {})
    (tmp_path / "step-best").mkdir()
    (tmp_path / "step-00000009").mkdir()
    (tmp_path / "step-00000009" / "state.json").write_text('{"format": "someone else"}')
    (tmp_path / "step-00000010").write_text("a file")
    with pytest.warns(UserWarning, match="not a checkpoint of this library"):
        assert newest_checkpoint(tmp_path).name == "step-00000001"
    assert newest_checkpoint(tmp_path / "nothing") is None


def test_rotation_never_deletes_good_ones_for_damaged_later_ones(tmp_path):
    for step in (1, 2, 3, 9):
        save_checkpoint(tmp_path, step, {"model": {"a": torch.ones(1)}}, {})
    (tmp_path / ".part-00000004-1").mkdir()
    rotate_checkpoints(tmp_path, keep=2, step=3)
    assert [s for s, _ in list_checkpoints(tmp_path)] == [2, 3, 9] and not (tmp_path / ".part-00000004-1").exists()


def test_a_checkpoint_killed_between_two_renames_is_found_again(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 3, {"model": {"a": torch.ones(1)}}, {})
    real, renames = os.replace, []

    def dying(source, target):
        if renames:
            raise KeyboardInterrupt("killed between the two renames")
        renames.append(target)
        real(source, target)

    monkeypatch.setattr(os, "replace", dying)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 3, {"model": {"a": torch.zeros(1)}}, {})
    monkeypatch.undo()
    assert not list_checkpoints(tmp_path) and list(tmp_path.glob(".old-*"))
    tensors, _ = load_checkpoint(newest_checkpoint(tmp_path))
    assert tensors["model"]["a"] == 1
    rotate_checkpoints(tmp_path, keep=2, step=3)
    assert [s for s, _ in list_checkpoints(tmp_path)] == [3]


def test_state_hash():
    torch.manual_seed(0)
    a, b = nn.Linear(3, 2), nn.Linear(3, 2)
    assert state_hash(a) != state_hash(b)
    b.load_state_dict(a.state_dict())
    assert state_hash(a) == state_hash(b) == state_hash(dict(reversed(a.state_dict().items())))
    with torch.no_grad():
        b.weight[0, 0] = torch.nextafter(b.weight[0, 0], torch.tensor(9.0))
    assert state_hash(a) != state_hash(b) and state_hash({"x": torch.zeros(2, 3)}) != state_hash({"x": torch.zeros(3, 2)})


class Pictures(torch.utils.data.Dataset):
    """Random pictures with a label and a caption."""

    flip_safe = True

    def __init__(self, n=23):
        self.images = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1

    def __len__(self):
        return len(self.images)

    def fingerprint(self):
        return f"pictures-{len(self)}"

    def __getitem__(self, index):
        return {"image": self.images[index], "label": index % 5, "caption": f"number {index}", "boxes": torch.zeros(4, 4)}


def encode(images):
    """A stand-in for a first stage: patch means, and a spread."""
    mean = nn.functional.avg_pool2d(images, 4) * torch.tensor([1.0, 2.0])[None, None, None]
    return mean, mean.abs() + 0.1


def test_cached_latents_equal_encoding(tmp_path):
    data = Pictures()
    cached = cache_latents(encode, data, tmp_path, key="k", keys_to_keep=("label", "caption"), batch_size=6, flips=True, progress=False)
    mean, std = encode(data.images)
    batch = cached.fetch([3, 22, 0])
    assert torch.equal(batch["mean"], mean[[3, 22, 0]]) and torch.equal(batch["std"], std[[3, 22, 0]])
    assert batch["label"].tolist() == [3, 2, 0] and batch["caption"] == ["number 3", "number 22", "number 0"]
    flipped = cached.fetch([3, 4], torch.tensor([True, False]))
    assert torch.equal(flipped["mean"][0], encode(data.images[3:4].flip(-1))[0][0]) and torch.equal(flipped["mean"][1], mean[4])
    assert not torch.equal(flipped["mean"][0], mean[3].flip(-1))  # a flipped latent is another thing
    assert len(cached) == 23 and cached[-1]["caption"] == "number 22" and cached[2]["mean"].shape == (3, 2, 2)
    with pytest.raises(IndexError):
        cached[23]
    import pickle

    assert torch.equal(pickle.loads(pickle.dumps(cached))[5]["std"], std[5]) and len(pickle.dumps(cached)) < 4000


def test_cache_is_found_again_and_keyed(tmp_path):
    calls = []

    def counted(images):
        calls.append(len(images))
        return encode(images)[0]

    first = cache_latents(counted, Pictures(), tmp_path, key="k", batch_size=10, progress=False)
    assert calls == [10, 10, 3] and "std" not in first[0]
    cache_latents(counted, Pictures(), tmp_path, key="k", batch_size=5, progress=False)
    assert len(calls) == 3
    second = cache_latents(counted, Pictures(), tmp_path, key="other weights", batch_size=23, dtype="float16", progress=False)
    assert len(calls) == 4 and second.fingerprint() != first.fingerprint() and second[0]["mean"].dtype == torch.float32
    torch.testing.assert_close(second[0]["mean"], first[0]["mean"], rtol=1e-3, atol=1e-3)
    cache_latents(counted, Pictures(22), tmp_path, key="k", batch_size=22, progress=False)
    assert len(calls) == 5


def test_interrupted_cache_goes_on(tmp_path, monkeypatch):
    from ldm_edu import checkpoint

    monkeypatch.setattr(checkpoint, "PROGRESS_SECONDS", 0)
    calls = []

    def dying(images):
        calls.append(len(images))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(images)

    options = {"key": "k", "keys_to_keep": ("caption", "label"), "batch_size": 5, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        cache_latents(dying, Pictures(), tmp_path, **options)
    cached = cache_latents(dying, Pictures(), tmp_path, **options)
    assert len(calls) == 3 + 3
    assert torch.equal(cached.fetch(range(23))["mean"], encode(Pictures().images)[0])
    assert cached.fetch([0, 7, 12])["caption"] == ["number 0", "number 7", "number 12"]


def encode_beside(folder, wait, pause, told):
    """In a process of its own: encode slowly, and tell how many rows of the cache are not what they should be."""
    torch.set_num_threads(1)
    time.sleep(wait)

    def slowly(images):
        time.sleep(pause)
        return encode(images)

    try:
        cached = cache_latents(slowly, Pictures(), folder, key="k", keys_to_keep=("caption",), batch_size=4, progress=False)
        told.put(int((cached.fetch(range(23))["mean"] != encode(Pictures().images)[0]).flatten(1).any(1).sum()))
    except Exception as err:
        told.put(f"{type(err).__name__}: {err}")


@pytest.mark.parametrize("wait, pauses", [(0.0, (0.1, 0.1)), (0.4, (0.15, 0.15)), (0.3, (0.3, 0.05)), (0.25, (0.1, 0.5))])
def test_two_runs_encode_into_one_folder(tmp_path, wait, pauses):
    """Both get the whole cache, whoever is first, and the slower one leaves nothing behind."""
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    told = context.Queue()
    runs = [context.Process(target=encode_beside, args=(tmp_path, *how, told)) for how in zip((0.0, wait), pauses, strict=True)]
    for run in runs:
        run.start()
    assert [told.get(timeout=60) for _ in runs] == [0, 0]
    for run in runs:
        run.join()
    assert [path.name[:8] for path in tmp_path.iterdir()] == ["latents-"]
    cached = cache_latents(encode, Pictures(), tmp_path, key="k", keys_to_keep=("caption",), progress=False)
    assert cached.fetch([0, 22])["caption"] == ["number 0", "number 22"]


def test_without_locks_each_process_still_has_its_own_part(tmp_path, monkeypatch):
    monkeypatch.setattr(guards, "fcntl", None)
    with locked(tmp_path / "a.lock") as held:
        assert held is False
    seen = []
    cached = cache_latents(lambda x: seen.extend(p.name for p in tmp_path.glob(".part-*")) or encode(x), Pictures(), tmp_path, key="k", progress=False)
    assert str(os.getpid()) in seen[0] and len(cached) == 23 and [path.name[:8] for path in tmp_path.iterdir()] == ["latents-"]


def hold(path, told):
    """In a process of its own: hold a lock until somebody kills it."""
    with locked(path):
        told.put(os.getpid())
        time.sleep(60)


def test_a_lock_names_its_owner_and_dies_with_it(tmp_path):
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    told, path = context.Queue(), tmp_path / "new" / "run.lock"
    owner = context.Process(target=hold, args=(path, told))
    owner.start()
    pid = told.get(timeout=60)
    for _ in range(2):  # a refusal does not loosen it
        with pytest.raises(ValueError, match=rf"new: in use by process {pid} on .+ since \d{{4}}-\d\d-\d\d .*wait until it is done"), locked(path):
            pass
    owner.kill()
    owner.join()
    assert path.exists()
    with locked(path) as held:
        assert held and json.loads(path.read_text())["pid"] == os.getpid()
        with pytest.raises(ValueError, match=f"in use by process {os.getpid()} on"), locked(path):
            pass
        assert path.exists()
    assert not path.exists() and path.parent.exists()
    with pytest.raises(KeyError), locked(tmp_path / "made" / "run.lock"):
        raise KeyError
    assert not (tmp_path / "made").exists()


def test_cache_refusals(tmp_path):
    data = Pictures()
    with pytest.raises(ValueError, match="'boxes'.*would not be mirrored"):
        cache_latents(encode, data, tmp_path, key="a", keys_to_keep=("boxes",), flips=True, progress=False)
    with pytest.raises(ValueError, match="got 'captions', expected some of image, label, caption, boxes"):
        cache_latents(encode, data, tmp_path, key="b", keys_to_keep=("captions",), progress=False)
    with pytest.raises(ValueError, match="NaN"):
        cache_latents(lambda x: x * math.nan, data, tmp_path, key="c", progress=False)
    data.flip_safe = False
    with pytest.raises(ValueError, match="flips: got True"):
        cache_latents(encode, data, tmp_path, key="d", flips=True, progress=False)
    with pytest.raises(ValueError, match="dtype"):
        cache_latents(encode, data, tmp_path, key="e", dtype="int8", progress=False)
    assert isinstance(cache_latents(encode, data, tmp_path, key="f", keys_to_keep=("boxes",), progress=False), LatentDataset)


class Flawed(Pictures):
    """Pictures of which item 17 is altered by `change`."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def __getitem__(self, index):
        item = super().__getitem__(index)
        return item | (self.change(item) if index == 17 else {})


@pytest.mark.parametrize("change, message", [
    (lambda item: {"image": item["image"] * math.nan}, r"items 16 to 22: encode: got NaN or infinite latents in rows \[1\]"),
    (lambda item: {"image": item["image"][:, :4]}, r"items 16 to 22: image: got shape \(3, 4, 8\) in row 1 and \(3, 8, 8\) in row 0"),
    (lambda item: {"boxes": torch.zeros(2, 4)}, r"items 16 to 22: boxes: got Tensor of shape \(4, 4\), \(2, 4\), expected numbers of one shape"),
    (lambda item: {"label": None}, r"items 16 to 22: label: got int, NoneType of shape \(\), expected numbers"),
    (lambda item: {"caption": None}, r"items 16 to 22: caption: got str, NoneType"), (lambda item: {"label": ["a", "b"]}, r"label: got int, list of shape \(\), \(2,\)"),
])
def test_a_bad_item_is_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        cache_latents(encode, Flawed(change), tmp_path, key="k", keys_to_keep=("label", "caption", "boxes"), batch_size=8, progress=False)


def test_what_a_data_set_gives_beside_its_pictures(tmp_path):
    """Pictures in numpy are as good as tensors; Python's fractions come as the trainer itself would stack them, in float32."""
    class Mixed(Pictures):
        def __getitem__(self, index):
            return {"image": self.images[index].numpy(), "weight": index / 2, "exact": np.float64(index)}

    cached = cache_latents(encode, Mixed(), tmp_path, key="k", keys_to_keep=("weight", "exact"), progress=False)
    batch = cached.fetch([0, 5])
    assert torch.equal(batch["mean"], encode(Pictures().images[[0, 5]])[0]) and batch["exact"].dtype == torch.float64
    assert batch["weight"].dtype == collate_items([0.5, 1.0]).dtype == torch.float32 and batch["weight"].tolist() == [0.0, 2.5]
    with pytest.raises(ValueError, match="got a list without `fingerprint"):
        cache_latents(encode, [Pictures()[0]], tmp_path, key="k", progress=False)


def test_long_texts_are_not_copied_with_every_batch(tmp_path):
    """Time grows with the number of items, not with its square."""
    class Told(Pictures):
        def __init__(self, n):
            self.n = n

        def __len__(self):
            return self.n

        def __getitems__(self, indices):
            return [{"image": torch.zeros(3, 1, 1), "caption": str(i)} for i in indices]

    from ldm_edu import checkpoint
    seen = []
    real = checkpoint._save_progress
    checkpoint._save_progress = lambda part, arrays, texts, done: seen.append(texts.get("caption")) or real(part, arrays, texts, done)
    try:
        cache_latents(lambda x: x, Told(60), tmp_path, key="k", keys_to_keep=("caption",), batch_size=7, progress=False)
        checkpoint.PROGRESS_SECONDS, before = 0, checkpoint.PROGRESS_SECONDS
        cached = cache_latents(lambda x: x, Told(61), tmp_path, key="k", keys_to_keep=("caption",), batch_size=7, progress=False)
    finally:
        checkpoint._save_progress, checkpoint.PROGRESS_SECONDS = real, before
    lists = {id(texts) for texts in seen[1:]}
    assert len(seen) > 5 and len(lists) == 1 and cached.fetch([0, 60])["caption"] == ["0", "60"]


def test_training_on_cached_latents_with_flips(tmp_path):
    class LatentTask(TrainingTask):
        def __init__(self):
            torch.manual_seed(0)
            self.model = nn.Linear(12, 12)

        def loss(self, model, batch, rng):
            z = batch["mean"] + batch["std"] * rng.normal(batch["mean"].shape[1:], "posterior")
            self.seen = batch["caption"]
            return (model(z.flatten(1)) - z.flatten(1)).square().mean(1), {}

    plain = cache_latents(encode, Pictures(), tmp_path, key="k", keys_to_keep=("caption",), progress=False)
    with pytest.raises(ValueError, match="flip: got True"):
        go(tmp_path / "x", QUICK.replace(flip=True), LatentTask(), plain)
    both = cache_latents(encode, Pictures(), tmp_path, key="k", keys_to_keep=("caption",), flips=True, progress=False)
    straight, mirrored = (go(tmp_path / str(flip), QUICK.replace(flip=flip), LatentTask(), both).losses for flip in (False, True))
    assert straight != mirrored and len(mirrored) == 12


def test_flipped_pictures_are_whole_pictures(tmp_path):
    seen = []

    class Watch(TrainingTask):
        def __init__(self):
            self.model = nn.Linear(1, 1)

        def loss(self, model, batch, rng):
            seen.append(batch)
            return model(torch.ones(len(batch["image"]), 1))[:, 0], {}

    data = Pictures()
    go(tmp_path, QUICK.replace(flip=True), Watch(), data)
    mirrored = 0
    for step, batch in enumerate(seen):
        for image, index in zip(batch["image"], batch_indices(23, 16, 0, step)):
            flipped = torch.equal(image, data.images[index].flip(-1))
            mirrored += flipped
            assert flipped or torch.equal(image, data.images[index])
    assert 0.35 < mirrored / (12 * 16) < 0.65


def test_restored_moments_lie_in_memory_as_their_parameters_do():
    """A fused update walks parameter, gradient and moments side by side: other strides would pair other elements."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8).contiguous(memory_format=torch.channels_last)

    def make():
        torch.manual_seed(1)
        net = torch.nn.Conv2d(3, 6, 3).to(memory_format=torch.channels_last)
        return net, torch.optim.AdamW(net.parameters(), lr=1e-2, fused=True)

    def step(net, optimizer):
        net(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    net, optimizer = make()
    step(net, optimizer)
    saved = {name: value.contiguous().clone() for name, value in optimizer_tensors(net, optimizer).items()}
    other, restored = make()
    other.load_state_dict(net.state_dict())
    restore_optimizer(other, restored, saved)
    for p in other.parameters():
        assert restored.state[p]["exp_avg"].stride() == p.stride()
    step(net, optimizer)
    step(other, restored)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), net.parameters(), strict=True))
