"""The diffusion step of the recipes against oracles, the scale factor, and which weights a training call returns."""
import copy
import importlib.metadata
import json
import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
import torch._functorch.config
import training_toy as toy
from torch.testing import assert_close

from ldm_edu import recipes
from ldm_edu.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm_edu.checkpoint import state_hash
from ldm_edu.conditioning import NoCondition
from ldm_edu.data import Scenes
from ldm_edu.ldm import LDMConfig, build, load, load_first_stage, save
from ldm_edu.losses import AdversarialConfig, PatchDiscriminator
from ldm_edu.objective import PREDICTIONS
from ldm_edu.quantize import AutoencoderVQ, IdentityStage
from ldm_edu.recipes import (
    DIFFUSIONS,
    FIRST_STAGES,
    PIXELS_ONLY,
    PUBLISHED_STAGES,
    AdversarialTask,
    DiffusionRecipe,
    DiffusionTask,
    FirstStageRecipe,
    FirstStageTask,
    latent_scale,
    measure_latents,
    train_autoencoder,
    train_diffusion,
)
from ldm_edu.schedule import ScheduleConfig
from ldm_edu.training import NonFiniteLoss, RowRandom, TrainConfig, make_optimizer
from ldm_edu.unet import UNetConfig

STAGE = AutoencoderConfig(4, 8, (1, 2, 2), 1, mid_attention=False, num_groups=4)
UNET = UNetConfig(4, 4, 8, (1, 2), 1, (1,), head_dim=8, num_groups=4)
QUICK = TrainConfig(steps=3, batch_size=4, lr=1e-2, warmup_steps=0, save_every=0, validate_every=0)


def task_of(scale_factor=1.0, prediction="eps", schedule=None, dropout=0.1):
    """The diffusion task of a tiny model; its network is not called where a test brings its own."""
    config = LDMConfig(STAGE, UNET, NoCondition().to_dict(), schedule or ScheduleConfig(T=50), prediction, scale_factor, image_size=16)
    return DiffusionTask(build(config), DiffusionRecipe(condition_dropout=dropout), "hash")


def latents(b, mean=0.0, std=0.0):
    """A batch as the latent cache gives it."""
    return {"mean": torch.full((b, 4, 4, 4), mean), "std": torch.full((b, 4, 4, 4), std)}


# ---------------------------------------------------------------- one training step


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("scale_factor", [1.0, 0.4])
def test_a_perfect_network_costs_nothing(prediction, scale_factor):
    """All latents are 1.5, so a network that knows this can give the exact eps, x0 or v of the scaled latent."""
    task, z = task_of(scale_factor, prediction), 1.5 * scale_factor
    acp = task.ldm.schedule.alphas_cumprod.double()

    def perfect(kind):
        def model(x_t, t, batch, drop):
            signal, noise = (v[t].sqrt().reshape(-1, 1, 1, 1) for v in (acp, 1 - acp))
            eps = (x_t - signal * z) / noise
            return {"eps": eps, "x0": torch.full_like(eps, z), "v": signal * eps - noise * z}[kind].float()
        return model

    losses = {kind: task.loss(perfect(kind), latents(16, mean=1.5), RowRandom(0, 0, range(16)))[0] for kind in PREDICTIONS}
    assert losses[prediction].shape == (16,) and losses[prediction].max() < 1e-6
    assert all(loss.mean() > 1e-2 for kind, loss in losses.items() if kind != prediction), "another kind's answer must cost"


def test_a_training_latent_is_a_scaled_draw_from_the_posterior():
    """With almost no diffusion noise, what the network sees has mean 0.5 * 2 and deviation 0.5 * 3."""
    task, seen = task_of(0.5, schedule=ScheduleConfig("linear", 1, 1e-6, 1e-6)), []
    task.loss(lambda x_t, t, batch, drop: seen.append(x_t) or x_t, latents(500, mean=2.0, std=3.0), RowRandom(0, 0, range(500)))
    n = seen[0].numel()
    assert abs(seen[0].mean().item() - 1.0) < 4 * 1.5 / n**0.5
    assert abs(seen[0].std().item() - 1.5) < 4 * 1.5 / (2 * n) ** 0.5


@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.5, 1.0])
def test_conditions_are_dropped_at_the_recipes_rate(dropout):
    """Without dropped conditions the empty one, from which guidance starts, would never be learnt."""
    task, seen, n = task_of(dropout=dropout), [], 1000
    task.loss(lambda x_t, t, batch, drop: seen.append(drop) or x_t, latents(n), RowRandom(0, 0, range(n)))
    assert isinstance(seen[0], torch.Tensor) and seen[0].shape == (n,) and seen[0].dtype == torch.bool
    assert abs(seen[0].double().mean().item() - dropout) <= 4 * (dropout * (1 - dropout) / n) ** 0.5


# ---------------------------------------------------------------- the scale factor


class Latents:
    """A cache of n latents whose means have deviation 2 and whose posteriors have deviation 1.5."""

    def __init__(self, n, std=1.5):
        self.mean, self.std = 2 * torch.randn(n, 4, 4, 4, generator=torch.Generator().manual_seed(0)) + 1, std

    def __len__(self):
        return len(self.mean)

    def fetch(self, indices):
        mean = self.mean[list(indices)]
        return {"mean": mean, "std": torch.full_like(mean, self.std)}


@pytest.mark.parametrize("n", [100, 9000])
def test_scaled_draws_have_unit_variance(n):
    scale, data = latent_scale(Latents(n)), Latents(n)
    assert abs(scale - (2**2 + 1.5**2) ** -0.5) < 0.01 * scale
    draws = scale * (data.mean + 1.5 * torch.randn(data.mean.shape, generator=torch.Generator().manual_seed(1)))
    assert abs(draws.std().item() - 1) < 0.02
    assert latent_scale(Latents(n, std=0.0)) == pytest.approx(0.5, rel=0.01)


# ---------------------------------------------------------------- what a training call returns


def states(reports, name):
    """The weights of the last step's model or average."""
    return reports[-1][name]


def note(reports):
    """A callback that keeps both sets of weights."""
    keep = lambda m: copy.deepcopy(m.state_dict())
    return lambda report: reports.append({"model": keep(report.model), "ema": keep(report.ema)})


def check_averaged(reports, *returned):
    """All of `returned` are the average of the last step, and the average is not the last weights."""
    average, last = states(reports, "ema"), states(reports, "model")
    assert any((average[k] - last[k]).abs().max() > 1e-4 for k in average)
    for state in returned:
        assert set(state) == set(average)
        for key, value in state.items():
            assert_close(value, average[key], rtol=0, atol=0, msg=lambda text, key=key: f"{key}: {text}")


def test_training_calls_return_and_save_the_averaged_weights(tmp_path):
    data, reports = Scenes(16, n=8, objects=(1, 1), fields=("image",)), []
    stage = train_autoencoder(data, FirstStageRecipe(STAGE, QUICK), tmp_path / "ae", progress=False, callbacks=[note(reports)])
    check_averaged(reports, stage.state_dict(), load_first_stage(tmp_path / "ae").state_dict())
    reports.clear()
    recipe = DiffusionRecipe("tiny", "none", train=QUICK)
    small = {"model_channels": 8, "head_dim": 8, "num_groups": 4}
    model = train_diffusion(data, stage, recipe, tmp_path / "ldm", progress=False, callbacks=[note(reports)], unet=small)
    check_averaged(reports, model.net.state_dict(), load(tmp_path / "ldm").net.state_dict())
    assert not model.training and not stage.training
    assert isinstance(model.first_stage, AutoencoderKL) and all(not p.requires_grad for p in model.first_stage.parameters())


# ---------------------------------------------------------------- the finished first stage


def test_a_first_stages_card_tells_its_latents(tmp_path):
    data = Scenes(16, n=24, objects=(1, 1), fields=("image",))
    train_autoencoder(data, FirstStageRecipe(STAGE, QUICK), tmp_path, progress=False)
    stage = load_first_stage(tmp_path)
    told = stage.card["latents"]
    with torch.no_grad():
        posterior = stage.encode(data.render(range(24))["image"])
    assert told["n"] == 24
    assert_close(torch.tensor(told["channel_mean"]), posterior.mean.mean((0, 2, 3)), atol=1e-4, rtol=0)
    variance = posterior.mean.var((0, 2, 3), correction=0) + posterior.std.square().mean((0, 2, 3))
    assert_close(torch.tensor(told["channel_std"]), variance.sqrt(), atol=1e-4, rtol=0)


VQ = STAGE.replace(double_z=False, codes=32, pixel_loss="l2")


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_a_vq_stage_trains_resumes_and_carries_a_diffusion_model(tmp_path, decay):
    data, quick = Scenes(16, n=24, objects=(1, 1), fields=("image", "caption")), QUICK.replace(steps=40, log_every=1, lr=2e-3)
    recipe = FirstStageRecipe(VQ.replace(codebook_decay=decay), quick)

    def go(folder, **options):
        return train_autoencoder(data, recipe, tmp_path / folder, progress=False, **options)

    whole = go("whole")
    with pytest.raises(KeyboardInterrupt):
        go("parts", callbacks=[lambda report: raise_at(report.step, 17)], save_every=8)
    resumed = go("parts", save_every=8)
    assert isinstance(whole, AutoencoderVQ)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    x = data.render(range(24))["image"]
    with torch.no_grad():
        loaded = load_first_stage(tmp_path / "whole")
        assert state_hash(loaded) == state_hash(whole) and loaded.card == whole.card and whole.card["steps"] == 40
        assert not {"reduce", "process"} & set(vars(whole.quantize)) and whole.quantize.patience == 0, "nothing of the run is left"
        save(whole, tmp_path / "again")
        assert state_hash(load_first_stage(tmp_path / "again")) == state_hash(whole)
        assert_close(loaded.decode(loaded.encode(x).mode()), whole.decode(whole.encode(x).mode()))
    rows = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").open()]
    assert {"usage", "perplexity", "commitment", "psnr"} <= set(rows[-1]) and rows[-1]["usage"] > 0.3
    model = train_diffusion(data, whole, DiffusionRecipe("tiny", "none", guidance_scale=1.0, train=QUICK), tmp_path / "ldm", progress=False,
                            unet={"model_channels": 8, "num_groups": 4, "head_dim": 8, "attention_levels": (1,)})
    assert_close(load(tmp_path / "ldm").sample(n=2, steps=2), model.sample(n=2, steps=2))


def raise_at(step, wanted):
    """Stop a run as an interruption would."""
    if step == wanted:
        raise KeyboardInterrupt


def test_diffusion_on_pixels_by_the_identity_stage(tmp_path):
    data = Scenes(16, n=8, objects=(1, 1), fields=("image",))
    stage = IdentityStage(AutoencoderConfig(3, 8, (1,), double_z=False, num_groups=4))
    recipe = DiffusionRecipe("tiny", "none", guidance_scale=1.0, train=QUICK)
    small = {"model_channels": 8, "num_groups": 4, "head_dim": 8, "attention_levels": (2,)}
    model = train_diffusion(data, stage, recipe, tmp_path, progress=False, unet=small)
    assert model.config.scale_factor == pytest.approx(1 / data.render(range(8))["image"].std(correction=0).item(), rel=0.01)
    again = load(tmp_path)
    assert isinstance(again.first_stage, IdentityStage) and again.sample(n=2, steps=2).shape == (2, 3, 16, 16)
    assert_close(again.sample(n=2, steps=2), model.sample(n=2, steps=2))
    with pytest.raises(ValueError, match="nothing to train"):
        train_autoencoder(data, FirstStageRecipe(stage.config, QUICK), tmp_path / "stage", progress=False)


def test_a_model_of_pictures_that_are_not_square_draws_such(tmp_path):
    data = Scenes((16, 24), n=8, objects=(1, 1), fields=("image",))
    stage = IdentityStage(AutoencoderConfig(3, 8, (1,), double_z=False, num_groups=4))
    small = {"model_channels": 8, "num_groups": 4, "head_dim": 8, "attention_levels": (2,)}
    model = train_diffusion(data, stage, DiffusionRecipe("tiny", "none", train=QUICK), tmp_path, progress=False, unet=small)
    again = load(tmp_path)
    assert model.config == again.config and again.config.image_size == (16, 24)
    assert again.sample(n=2, steps=2).shape == (2, 3, 16, 24)


def test_the_returned_model_knows_where_it_comes_from(tmp_path):
    data = Scenes(16, n=8, objects=(1, 1), fields=("image",))
    stage = IdentityStage(AutoencoderConfig(3, 8, (1,), double_z=False, num_groups=4))
    options = {"progress": False, "unet": {"model_channels": 8, "num_groups": 4, "head_dim": 8, "attention_levels": (2,)}}
    model = train_diffusion(data, stage, DiffusionRecipe("tiny", "none", train=QUICK), tmp_path / "run", **options)
    save(model, tmp_path / "copy")
    assert load(tmp_path / "copy").card == load(tmp_path / "run").card == model.card and model.card["steps"] == 3
    card = tmp_path / "run" / "model" / "card.json"
    card.write_text(json.dumps(model.card | {"measured": 1, "date": "long ago"}))
    again = train_diffusion(data, stage, DiffusionRecipe("tiny", "none", train=QUICK), tmp_path / "run", **options)
    assert again.card == json.loads(card.read_text()) and again.card["measured"] == 1, "a finished run leaves its model alone"
    card.write_text(json.dumps(model.card | {"steps": 2}))
    assert train_diffusion(data, stage, DiffusionRecipe("tiny", "none", train=QUICK), tmp_path / "run", **options).card["steps"] == 3


def test_after_a_nan_a_new_run_begins_with_what_was_learnt(tmp_path, monkeypatch):
    """What the error advises, done: finish the run at its last good checkpoint, then start another one from that model."""
    data = Scenes(16, n=8, objects=(1, 1), fields=("image",))
    stage = IdentityStage(AutoencoderConfig(3, 8, (1,), double_z=False, num_groups=4))
    recipe = DiffusionRecipe("tiny", "none", train=QUICK.replace(steps=6, save_every=2))
    small = {"model_channels": 8, "num_groups": 4, "head_dim": 8, "attention_levels": (2,)}
    real = DiffusionTask.loss
    monkeypatch.setattr(DiffusionTask, "loss", lambda self, model, batch, rng: (real(self, model, batch, rng)[0] * (float("nan") if rng.step == 5 else 1), {}))
    with pytest.raises(NonFiniteLoss, match="steps=4: that makes .*model of the checkpoint, for start_from"):
        train_diffusion(data, stage, recipe, tmp_path / "bad", progress=False, unet=small)
    monkeypatch.undo()
    good = train_diffusion(data, stage, recipe, tmp_path / "bad", progress=False, unet=small, steps=4)
    more = train_diffusion(data, stage, recipe, tmp_path / "more", progress=False, start_from=load(tmp_path / "bad"), steps=1, lr=0.0)
    assert state_hash(more.net) == state_hash(good.net) and more.card["started_from"]["steps"] == 4


def test_more_codes_than_latents_are_refused(tmp_path):
    data = Scenes(16, n=4, objects=(1, 1), fields=("image",))
    with pytest.raises(ValueError, match="codes: got 100"):
        train_autoencoder(data, FirstStageRecipe(VQ.replace(codes=100), QUICK), tmp_path, progress=False)


def two_processes(folder, options):
    """The log of `toy.train_stage` under two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", toy.__file__, str(folder),
               json.dumps(options), "stage"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in (folder / "log.jsonl").open()]


def column(log, name):
    """The values of one name in a log, in order."""
    return [row[name] for row in log if name in row]


def test_two_processes_train_the_codebook_of_one(tmp_path):
    """Sums, counts and revived codes are the global batch's: the loss curve is that of one process."""
    options = {"double_z": False, "codes": 16, "codebook_decay": 0.9, "steps": 26}
    one, two = toy.train_stage(tmp_path / "one", **options), two_processes(tmp_path / "two", options)
    np.testing.assert_allclose(column(two, "loss"), column(one, "loss"), rtol=0, atol=1e-5)
    assert 0 < max(column(two, "usage")) <= 1


# ---------------------------------------------------------------- beyond pixels

GAN = {"perceptual_weight": 0.1, "disc_weight": 0.5, "disc_start": 3, "disc_warmup": 2, "disc_channels": 8, "disc_layers": 1}


def test_a_stage_against_a_critic_trains_logs_resumes_and_is_alone_in_the_end(tmp_path):
    whole = toy.train_stage(tmp_path / "whole", 12, GAN)
    parts = toy.train_stage(tmp_path / "parts", 12, GAN, resume_at=8)
    for a, b in zip(whole, parts, strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == {k: v for k, v in b.items() if k != "seconds"}
    rows = {row["step"]: row for row in whole if "loss" in row}
    assert "logits_real" not in rows[3] and {"logits_real", "logits_fake", "loss_discriminator"} <= set(rows[4])
    assert "gan_weight" not in rows[5] and {"gan_weight", "grad_rec", "grad_gan", "perceptual", "kl"} <= set(rows[6])
    assert len(column(whole, "validation")) == 2
    states = [load_first_stage(tmp_path / name).state_dict() for name in ("whole", "parts")]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    for name in ("losses", "logits", "weights", "gradients"):
        assert (tmp_path / "whole" / f"log-{name}.png").stat().st_size > 3000


def test_a_critic_works_on_one_picture_a_step(tmp_path):
    log = toy.train_stage(tmp_path, 8, GAN, batch_size=1)
    assert all(np.isfinite(column(log, name)).all() for name in ("loss", "loss_discriminator", "gan_weight"))


@pytest.mark.parametrize(("size", "options", "loss", "message"), [
    (16, {}, {"disc_layers": 3}, "got pictures of 16 x 16 pixels, expected at least 24 on a side for a critic of 3 layers"),
    (16, {"compile": True}, {"r1_weight": 1.0}, "compile: got True with r1_weight 1.0, expected False"),
    (16, {"accumulation": 2, "batch_size": 3}, {"disc_norm": "batch"}, "batch_size: got 3 in 2 pieces .processes times accumulation., expected at least 2 pictures in each"),
    (16, {"betas": (0.9, 0.9)}, {}, r"betas: got \(0.9, 0.9\) for a training against a critic"),
])
def test_what_a_critic_cannot_do_is_said_before_its_first_step(tmp_path, size, options, loss, message):
    """The critic begins later, after hours: at step 50,001 in the original's configurations."""
    recipe = FirstStageRecipe(STAGE, QUICK.replace(**options), AdversarialConfig(**{**GAN, "disc_start": 50_001, "perceptual_weight": 0.0, **loss}))
    with pytest.raises(ValueError, match=message):
        train_autoencoder(Scenes(size, n=8, fields=("image",)), recipe, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
    assert AdversarialConfig(disc_layers=1).shortest == 6
    PatchDiscriminator(AdversarialConfig(disc_layers=1, disc_channels=8))(torch.zeros(1, 3, 6, 6))


def test_processes_divide_a_critic_s_batch_too():
    game, size = AdversarialConfig(disc_norm="batch", disc_layers=1), (16, 16)
    recipes.check_game(game, QUICK, size, 2), recipes.check_game(game.replace(disc_norm="group"), QUICK, size, 4), recipes.check_game(game.replace(disc_weight=0.0), QUICK, size, 4)
    task = AdversarialTask(AutoencoderKL(STAGE), 16, "", game.replace(perceptual_weight=0.0), None)
    task.process = 0, 4
    for refuse in (lambda: recipes.check_game(game, QUICK, size, 4), lambda: task.configure(Scenes(16, n=8, fields=("image",)), QUICK, torch.device("cpu"))):
        with pytest.raises(ValueError, match="batch_size: got 4 in 4 pieces"):
            refuse()


def test_a_compiled_stage_plays_the_game_of_the_plain_one(tmp_path, monkeypatch):
    """The weight's gradients go back through the network before the step's own does, with what the compiler kept for one way back."""
    game, runs = AdversarialConfig(perceptual_weight=0.0, disc_start=1, disc_layers=1, disc_channels=8), {}
    monkeypatch.setattr(torch._functorch.config, "donated_buffer", True)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    for compiled in (False, True):
        torch._dynamo.reset()
        seen = runs[compiled] = []
        train_autoencoder(Scenes(16, n=32, fields=("image",)), FirstStageRecipe(STAGE, QUICK.replace(compile=compiled), game), tmp_path / str(compiled), progress=False,
                          callbacks=[lambda report, seen=seen: seen.append((report.loss, float(report.logs.get("gan_weight", 0))))])
    torch._dynamo.reset()
    assert [weight > 0 for _, weight in runs[True]] == [False, True, True]
    assert np.allclose(runs[True], runs[False], rtol=1e-4)


def test_without_weights_nothing_but_pixels_is_trained(tmp_path):
    nothing = {"perceptual_weight": 0.0, "disc_weight": 0.0}
    plain, off = toy.train_stage(tmp_path / "plain", 6), toy.train_stage(tmp_path / "off", 6, nothing)
    assert column(plain, "loss") == column(off, "loss") and not column(off, "loss_discriminator")
    critic_off = toy.train_stage(tmp_path / "perceptual", 6, {**GAN, "disc_weight": 0.0, "disc_start": 0})
    assert column(critic_off, "perceptual") and not column(critic_off, "loss_discriminator")


def test_the_first_stage_and_its_critic_have_the_originals_betas(tmp_path):
    """Adam(0.5, 0.9) for both, as in lesson 12; a training without a critic keeps its own."""
    game, stage = AdversarialConfig(perceptual_weight=0.0, disc_channels=8, disc_layers=1), AutoencoderKL(STAGE)
    task = AdversarialTask(stage, 16, "", game, None)
    for part in task.parts:
        assert [g["betas"] for g in make_optimizer(task, QUICK, torch.device("cpu"), part).param_groups] == [(0.5, 0.9)]
    for quiet in (AdversarialTask(stage, 16, "", game.replace(disc_weight=0.0), None), FirstStageTask(stage, 16)):
        assert make_optimizer(quiet, QUICK.replace(betas=(0.8, 0.99)), torch.device("cpu")).param_groups[0]["betas"] == (0.8, 0.99)
    assert all(recipe.train.betas == (0.9, 0.999) for recipe in FIRST_STAGES.values() if recipe.loss == PIXELS_ONLY)
    data = Scenes(16, n=8, objects=(1, 1), fields=("image",))
    run = lambda **options: train_autoencoder(data, FirstStageRecipe(STAGE, QUICK, game), tmp_path / "run", progress=False, **options)
    with pytest.raises(ValueError, match=r"betas: got \(0\.8, 0\.99\) for a training against a critic, expected \(0\.5, 0\.9\)"):
        run(betas=(0.8, 0.99))
    run()
    told = json.loads((tmp_path / "run" / "run.json").read_text())
    del told["task"]["stage_betas"]  # as runs were written before
    (tmp_path / "run" / "run.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match=r"holds another run \(task\.stage_betas: None there, \[0\.5, 0\.9\] here\)"):
        run()


def test_published_first_stages(tmp_path):
    """The released configurations' numbers; every diffusion training's first stage is there; one of them runs, made small."""
    assert set(PUBLISHED_STAGES.values()) <= set(FIRST_STAGES)
    for name, (lr, steps, start, weight, layers) in {"kl-f8": (1.8e-5, 246_803, 50_001, 0.5, 3), "vq-f4-noattn": (3.6e-5, 658_131, 11, 0.75, 3),
                                                     "vq-f16": (6.3e-5, 1_101_166, 250_001, 0.75, 2)}.items():
        recipe = FIRST_STAGES[name]
        assert recipe.train.lr == pytest.approx(lr) and (recipe.train.steps, recipe.train.betas, recipe.train.weight_decay) == (steps, (0.5, 0.9), 0)
        assert (recipe.loss.disc_start, recipe.loss.disc_weight, recipe.loss.disc_layers, recipe.loss.perceptual_weight) == (start, weight, layers, 1)
    original = sum(p.numel() for p in PatchDiscriminator(FIRST_STAGES["kl-f4"].loss).parameters())
    assert original == 2_765_633
    data = Scenes(32, n=32, objects=(1, 1), fields=("image",))
    small = {"model_channels": 8, "num_groups": 4, "num_res_blocks": 1, "codes": 64}
    stage = train_autoencoder(data, "vq-f8", tmp_path, progress=False, model=small, steps=4, batch_size=4, log_every=1,
                              loss={"disc_channels": 8}, perceptual=Nearness())
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").open()]
    assert "loss_discriminator" not in rows[0] and "loss_discriminator" in rows[1] and stage.config.codes == 64


class Nearness(torch.nn.Module):
    """A perceptual distance that asks little."""

    def forward(self, x, y):
        return (x - y).abs().flatten(1).mean(1)


def test_the_version_is_known_or_said_to_be_unknown(monkeypatch):
    """A run of hours must not end in an error about its card."""
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    assert recipes.code_version().startswith(importlib.metadata.version("ldm_edu"))
    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert recipes.code_version().startswith("not installed")


@pytest.mark.parametrize("batch_size", [8, 7])
def test_two_processes_play_the_game_of_one(tmp_path, batch_size):
    """Also where one of them has a row more: the critic's weight is that of all rows.

    Few steps: with betas of (0.5, 0.9) a change of 6e-8 in the first weights grows to a percent within 14.
    """
    options = {"steps": 6, "loss": {**GAN, "disc_start": 1, "disc_warmup": 1}, "batch_size": batch_size}
    one, two = toy.train_stage(tmp_path / "one", **options), two_processes(tmp_path / "two", options)
    for name in ("loss", "loss_discriminator", "gan_weight"):
        np.testing.assert_allclose(column(two, name), column(one, name), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- what will not do is said before anything is encoded


class Pictures:
    """Pictures as somebody else's data set gives them, altered by `change`."""

    def __init__(self, n=8, change=lambda item: item, size=(16, 16)):
        self.n, self.change, self.size = n, change, size

    def __len__(self):
        return self.n

    def fingerprint(self):
        return "pictures"

    def __getitem__(self, index):
        if not 0 <= index < self.n:
            raise IndexError(index)
        return self.change({"image": torch.full((3, *self.size), index / 10), "label": index % 2})


WRONG = {
    "text": ("photos", "got a str, expected a data set"), "tensor": (torch.zeros(4, 3, 16, 16), "got a Tensor, expected a data set"),
    "iterator": (iter([1]), "expected a data set with items and a length"), "empty": (Pictures(0), "data: got 0 items"),
    "tuples": (Pictures(change=lambda item: (item["image"], 0)), "items with a tuple, expected mappings with image"),
    "no image": (Pictures(change=lambda item: {"pixels": item["image"]}), "items with pixels, expected mappings with image too"),
    "bytes": (Pictures(change=lambda item: {"image": (item["image"] * 255).byte()}), "torch.uint8 of shape .* expected float32"),
    "float64": (Pictures(change=lambda item: {"image": item["image"].double()}), "torch.float64 of shape .* expected float32"),
    "range": (Pictures(change=lambda item: {"image": item["image"] * 255 + 200}), r"from 200 to 200, expected .* in \[-1, 1\]"),
    "last": (Pictures(change=lambda item: {"image": item["image"].movedim(0, -1)}), r"of shape \(16, 16, 3\)"),
    "a list": (Pictures(change=lambda item: {"image": item["image"].tolist()}), "an image that is list"),
    "size": (Pictures(size=(16, 18)), "16 x 18 pixels, expected multiples of .*, not 18"),
}


@pytest.mark.parametrize("name", WRONG)
def test_data_that_will_not_do(tmp_path, name):
    data, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        train_autoencoder(data, FirstStageRecipe(STAGE, QUICK), tmp_path / "stage", progress=False)
    with pytest.raises(ValueError, match=message if hasattr(data, "fingerprint") else "without `fingerprint|expected a data set"):
        train_diffusion(data, AutoencoderKL(STAGE), DiffusionRecipe("tiny", "none", train=QUICK), tmp_path / "ldm", progress=False)
    assert not list(tmp_path.iterdir())
    if name == "empty":  # of that there is no validation, as ever
        return
    with pytest.raises(ValueError, match="expected 16 x 16 as in the data" if name == "size" else f"validation: .*{message.removeprefix('data: ')}"):
        train_autoencoder(Pictures(), FirstStageRecipe(STAGE, QUICK), tmp_path / "stage", validation=data, progress=False)
    assert not list(tmp_path.iterdir())


SMALL = {"model_channels": 8, "num_groups": 4, "head_dim": 8, "attention_levels": (1,)}


def test_numpy_pictures_and_lists_train(tmp_path):
    arrays = Pictures(change=lambda item: {**item, "image": item["image"].numpy()})
    stage = train_autoencoder([arrays[i] for i in range(8)], FirstStageRecipe(STAGE, QUICK), tmp_path / "ae", progress=False)
    model = train_diffusion(arrays, stage, DiffusionRecipe("tiny", "none", train=QUICK), tmp_path / "ldm", progress=False, unet=SMALL)
    assert model.card["steps"] == 3
    with pytest.raises(ValueError, match="got a list without `fingerprint"):
        train_diffusion([arrays[i] for i in range(8)], stage, DiffusionRecipe("tiny", "none", train=QUICK), tmp_path / "no", progress=False)


class Odd(AutoencoderKL):
    """A first stage with a layer that its config does not know."""

    def __init__(self, config):
        super().__init__(config)
        self.more = torch.nn.Linear(2, 2)


@pytest.mark.parametrize("recipe, options, message", [
    ("text-tiny", {}, "items with image, label, expected mappings with caption too: .*--captions"),
    ("inpaint-tiny", {}, "mask too: inpainting.with_masks"), ("superres-tiny", {}, "low_res too: superres.low_res_pairs"),
    ("unconditional-tiny", {"unet": {"in_channels": 8}}, "unet: got in_channels, expected other fields"),
    ("unconditional-tiny", {"unet": {"channels": 8}}, "got unknown channels"), ("unconditional-tiny", {"unet": UNET}, "unet: got a UNetConfig, expected a dict"),
    ("unconditional-tiny", {"recipe_options": {"schedule": "cosine"}}, "schedule: got 'cosine', expected a ScheduleConfig"),
    ("unconditional-tiny", {"recipe_options": {"unet": "huge"}}, "unet: got 'huge', expected one of"),
    ("unconditional-tiny", {"recipe_options": {"prediction": "y"}}, "prediction: got 'y', expected one of 'eps', 'x0', 'v'"),
    ("unconditional-tiny", {"recipe_options": {"condition_dropout": 1.5}}, "got 1.5, .* expected a share"),
    ("unconditional-tiny", {"recipe_options": {"condition_dropout": float("nan")}}, "got nan, .* expected a share"),
    ("unconditional-tiny", {"recipe_options": {"distance": "l1", "weighting": "x0"}}, "simple beside l1|expected one of"),
    ("unconditional-tiny", {"recipe_options": {"latent_std": "1"}}, "latent_std: got '1', expected a number"),
    ("class-tiny", {"recipe_options": {"reading_steps": 5}}, "reading_steps: got 5 for a class condition"),
    ("unconditional-tiny", {"steps": 2.5}, "steps: got 2.5, expected an integer"),
    ("unconditional-tiny", {"validation": Pictures(size=(32, 32))}, "validation: got pictures of 32 x 32 pixels, expected 16 x 16"),
    ("unconditional-tiny", {"stage": Odd(STAGE)}, r"first_stage: got more.bias of shape \(2,\), expected None .*2 such entries"),
    ("unconditional-tiny", {"stage": torch.nn.Conv2d(3, 4, 1)}, "first_stage: got a Conv2d, expected a first stage with"),
])
def test_requests_that_will_not_do(tmp_path, recipe, options, message):
    options = dict(options)
    stage = options.pop("stage", None) or AutoencoderKL(STAGE)
    stage.encode = None  # nothing may be encoded
    with pytest.raises(ValueError, match=message):
        train_diffusion(Pictures(), stage, recipe, tmp_path / "ldm", progress=False, **options)
    assert not list(tmp_path.iterdir())


def test_what_does_not_fit_a_model_to_start_from(tmp_path):
    """It brings its network, schedule, scale factor and guidance; what was asked for otherwise is refused, not forgotten."""
    stage = AutoencoderKL(STAGE)
    recipe = DiffusionRecipe("tiny", "none", train=QUICK)
    model = train_diffusion(Pictures(), stage, recipe, tmp_path / "first", progress=False, unet=SMALL)
    encode, stage.encode = stage.encode, None

    def more(**options):
        return train_diffusion(Pictures(size=(32, 32)), stage, recipe, tmp_path / "more", progress=False, start_from=model, **options)

    for asked, message in (({"prediction": "eps"}, "predicts v, expected eps"), ({"schedule": ScheduleConfig("cosine")}, "got a model of ScheduleConfig"),
                           ({"guidance_scale": 7.5, "unet": "tiny"}, "got guidance_scale, unet in recipe_options"), ({"latent_std": 0.5}, "got latent_std")):
        with pytest.raises(ValueError, match=f"start_from: .*{message}"):
            more(recipe_options=asked)
    assert not (tmp_path / "more").exists()
    stage.encode = encode
    assert more().config.image_size == 32 and load(tmp_path / "more").config.image_size == 32


def test_training_leaves_the_callers_generators_alone(tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    stage = train_autoencoder(Pictures(), FirstStageRecipe(STAGE, QUICK), tmp_path / "ae", progress=False)
    train_diffusion(Pictures(), stage, DiffusionRecipe("tiny", "none", train=QUICK), tmp_path / "ldm", progress=False, unet=SMALL)
    assert torch.equal(torch.rand(1), expected)


def test_the_mean_absolute_error_is_minimised_where_a_recipe_says_so(tmp_path):
    assert {name for name, recipe in DIFFUSIONS.items() if recipe.distance == "l1"} == {
        "lsun-churches256-ldm8", "openimages256-layout-ldm4", "places256-inpaint-ldm4", "landscapes256-semantic-ldm4"}
    squares, sizes = task_of(), task_of()
    sizes.recipe = sizes.recipe.replace(distance="l1")
    model = lambda x_t, t, batch=None, drop=None: torch.zeros_like(x_t)
    rng = RowRandom(0, 0, range(4))
    eps = rng.normal((4, 4, 4), "eps")
    assert_close(sizes.loss(model, latents(4), rng)[0], eps.abs().flatten(1).mean(1))
    assert_close(squares.loss(model, latents(4), rng)[0], eps.square().flatten(1).mean(1))
    assert "distance" not in squares.describe() and sizes.describe()["distance"] == "l1"


def test_latents_are_measured_in_all_parts_of_the_data(tmp_path):
    """Data in the order of their classes: the first items are of one class alone."""
    class Ordered(Pictures):
        def __getitem__(self, index):
            return {"image": torch.full((3, 4, 4), -1.0 if index < self.n // 2 else 1.0)}

    told = measure_latents(IdentityStage(AutoencoderConfig(3, 8, (1,), double_z=False, num_groups=4)), Ordered(30), images=20).to_dict()
    assert told["n"] == 20 and told["channel_mean"] == pytest.approx([0, 0, 0], abs=1e-6)


def test_a_compiled_model_is_compiled_once_whatever_the_texts():
    """Texts become token numbers before it (of texts the compiler makes a function for each, and gives up after eight), all of one length."""
    made, before = [], []
    torch._dynamo.reset()
    model = load("scenes-text")
    model.net.requires_grad_(True).train()
    task, net = DiffusionTask(model, DIFFUSIONS["text-tiny"], "hash"), torch.compile(model.net, backend=lambda graph, _: made.append(graph) or graph.forward)
    scenes = Scenes(32, n=48, fields=("caption",))
    try:
        for step in range(12):
            captions = [scenes[i]["caption"] for i in range(4 * step, 4 * step + 4)]
            before.append(len(made))
            task.loss(net, {"caption": captions, "mean": torch.randn(4, 4, 8, 8), "std": torch.ones(4, 4, 8, 8)}, RowRandom(0, step, range(4)))
    finally:
        torch._dynamo.reset()
    assert before == [0] + [1] * 11 and len(made) == 1, f"graphs before each step: {before}"
