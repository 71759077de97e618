"""Predicted costs against counts by hand, published sizes, what a real step keeps, and what a card took."""
import contextlib
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from ldm_edu import cli
from ldm_edu.autoencoder import AUTOENCODERS, AutoencoderConfig
from ldm_edu.costs import (
    KEPT_BY_AUTOCAST,
    LEAST_SECONDS,
    SHARE,
    SHARE_CPU_HALF,
    STILL,
    first_stage_costs,
    forward_flops,
    kept_bytes,
    latent_bytes,
    matrix_rate,
    part_flops,
    part_kept,
    predict_training,
    recipe_costs,
    stage_task,
    tell_bytes,
)
from ldm_edu.data import Scenes
from ldm_edu.losses import AdversarialConfig
from ldm_edu.perceptual import load_perceptual
from ldm_edu.quantize import make_first_stage
from ldm_edu.recipes import (
    DIFFUSIONS,
    FIRST_STAGES,
    PIXELS_ONLY,
    PUBLISHED_STAGES,
    AdversarialTask,
    FirstStageRecipe,
    FirstStageTask,
    default_conditioner,
)
from ldm_edu.scaling import share_out
from ldm_edu.training import TrainConfig
from ldm_edu.unet import UNETS, UNet, UNetConfig

PLAIN = UNetConfig(4, 4, 16, (1, 2), 1, (), num_groups=8, head_dim=16)
# GMAC of one evaluation at 256 pixels, and parameters, as counted from the released configurations
PUBLISHED = {"celeba256": (64, 0, 101, 274_056_163), "lsun-churches256": (32, 0, 21, 294_966_916), "cin256": (32, 1, 57, 394_984_196),
             "cin256-v2": (64, 1, 104, 400_920_579), "txt2img-1p4B": (32, 77, 91, 872_300_484), "layout2img-openimages256": (64, 92, 76, 246_277_379),
             "bsr-sr": (64, 0, 40, 113_622_563), "inpainting-big": (64, 0, 150, 387_245_827), "semantic-synthesis256": (64, 0, 104, 215_229_315),
             "sd-v1": (64, 77, 402, 859_520_964)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_operations_and_parameters_of_the_published_networks(name):
    side, tokens, gmac, parameters = PUBLISHED[name]
    assert abs(forward_flops(UNETS[name], side, tokens) / 2e9 - gmac) < 0.6
    costs = predict_training(UNETS[name], side, tokens, TrainConfig(batch_size=4), 1e12)
    assert costs.parameters == parameters and costs.flops == 12 * forward_flops(UNETS[name], side, tokens)


@pytest.mark.parametrize("changes", [{}, {"c_dim": 8}, {"use_scale_shift_norm": True}, {"resblock_updown": True}, {"attention_levels": (2,), "context_dim": 8}])
def test_what_is_kept_is_what_a_real_forward_pass_keeps(changes, monkeypatch):
    """Real tensors, with attention kept as the fused kernel keeps it on every machine."""
    config, kept = PLAIN.replace(**changes), {}
    torch.manual_seed(0)
    net = UNet(config)
    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}

    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            out = torch.zeros_like(q)  # in the order of q's memory
            ctx.save_for_backward(q, k, v, out)
            return out

        @staticmethod
        def backward(ctx, g):
            return g, g, g

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = (x.untyped_storage().nbytes(), x)
        return x

    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, attn_mask=None: Fused.apply(q, k, v))
    given = {"context": torch.randn(1, 5, 8)} if config.context_dim else {}
    given |= {"c": torch.randn(1, 8)} if config.c_dim else {}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        net(torch.randn(1, 4, 16, 16), torch.tensor([5]), **given)
    seen = sum(size for place, (size, _) in kept.items() if place not in weights)
    assert kept_bytes(config, 16, 5) == pytest.approx(seen, rel=0.02)


def test_memory_is_what_lies_still_and_what_the_batch_keeps():
    kept, half = kept_bytes(PLAIN, 16), TrainConfig(batch_size=8, precision="bf16")
    for train, rows, share in ((half, 8, KEPT_BY_AUTOCAST), (half.replace(accumulation=4), 2, KEPT_BY_AUTOCAST), (half.replace(accumulation=3), 3, KEPT_BY_AUTOCAST),
                               (half.replace(precision="fp32"), 8, 1.0)):
        costs = predict_training(PLAIN, 16, 0, train, 1e12)
        assert costs.memory == pytest.approx(STILL * costs.parameters + rows * share * kept, abs=1)


def test_time_is_operations_over_the_rate_that_is_reached():
    plain, compiled = (predict_training(PLAIN, 16, 0, TrainConfig(batch_size=8, compile=c), 1e9) for c in (False, True))
    assert plain.step_seconds == pytest.approx(plain.flops / (1e9 * SHARE["cuda"][False]))
    assert compiled.step_seconds / plain.step_seconds == pytest.approx(SHARE["cuda"][False] / SHARE["cuda"][True])
    for device, precision, share in (("cpu", "fp32", SHARE["cpu"][False]), ("cpu", "bf16", SHARE_CPU_HALF), ("cuda", "bf16", SHARE["cuda"][False])):
        costs = predict_training(PLAIN, 16, 0, TrainConfig(batch_size=8, precision=precision), 1e9, device)
        assert costs.step_seconds == pytest.approx(costs.flops / (1e9 * share))
    for parts in (1, 4):  # a card waits for the processor that starts its kernels
        waits = predict_training(PLAIN, 16, 0, TrainConfig(batch_size=8, accumulation=parts), 1e15)
        assert waits.step_seconds == LEAST_SECONDS["cuda"] * parts
    with pytest.raises(ValueError, match="expected one of 'cuda', 'cpu'"):
        predict_training(PLAIN, 16, 0, TrainConfig(), 1e12, "tpu")


@pytest.mark.parametrize(("name", "side", "tokens", "batch", "mib", "ms"), [("sd-v1", 64, 77, 16, 20_099, 188.7), ("cin256", 32, 1, 64, 15_631, 129.9)])
def test_predictions_meet_what_a_card_took(name, side, tokens, batch, mib, ms):
    """One H200, 795 TFLOP/s in bfloat16: peak of a step beyond weights, moments and averages; milliseconds, plain."""
    costs = predict_training(UNETS[name], side, tokens, TrainConfig(batch_size=batch, precision="bf16"), 795e12)
    assert (costs.memory - 16 * costs.parameters) / 2**20 == pytest.approx(mib, rel=0.1)
    assert 1000 * costs.step_seconds == pytest.approx(ms, rel=0.25)


@pytest.mark.parametrize("name", PUBLISHED_STAGES)
def test_published_recipes_keep_their_networks(name):
    recipe, stage = DIFFUSIONS[name], AUTOENCODERS[PUBLISHED_STAGES[name]]
    costs = recipe_costs(recipe, stage, 256, 1e12)
    more = {"bsr-sr": 41_600, "semantic-synthesis256": 14_976}.get(recipe.unet, 0)  # a vector of 64; 16 channels beside the latents for 3
    assert costs.parameters == PUBLISHED[recipe.unet][3] + more and costs.steps == recipe.train.steps
    assert stage.z_channels == UNETS[recipe.unet].out_channels, "the network fits its first stage"


def test_a_recipe_of_the_class_room_counts_its_vector_and_refuses_odd_sizes():
    stage = AUTOENCODERS["kl-f4"].replace(z_channels=4)
    preset = UNETS[DIFFUSIONS["text-tiny"].unet]
    with torch.device("meta"):
        expected = sum(p.numel() for p in UNet(preset.replace(c_dim=preset.context_dim)).parameters())
    assert recipe_costs(DIFFUSIONS["text-tiny"], stage, 32, 1e12).parameters == expected
    with pytest.raises(ValueError, match="multiple of 8"):
        recipe_costs(DIFFUSIONS["text-tiny"], stage, 36, 1e12)


def test_latents_and_words():
    assert latent_bytes(AUTOENCODERS["kl-f8"], 256) == 2 * 4 * 4 * 32 * 32
    costs = recipe_costs(DIFFUSIONS["celebahq256-ldm4"], AUTOENCODERS["vq-f4"], 256, 1e12)
    assert "274,056,163 parameters in the UNet" in costs.tell() and "batch 48" in costs.tell() and "days for 410,000 steps" in costs.tell()


@pytest.mark.parametrize("name", [name for name in DIFFUSIONS if name not in PUBLISHED_STAGES and DIFFUSIONS[name].conditioner != "text"])
def test_what_is_counted_is_what_the_recipe_builds(name):
    """The network that `train_diffusion` would assemble on Scenes, by its conditioner's own words."""
    recipe, stage = DIFFUSIONS[name], AUTOENCODERS["kl-f4"].replace(z_channels=4)
    conditioner = default_conditioner(recipe.conditioner, Scenes(32, n=2), UNETS[recipe.unet].context_dim, recipe.pooled, stage)
    config = UNETS[recipe.unet].replace(in_channels=4 + conditioner.concat_channels, out_channels=4, context_dim=conditioner.context_dim, c_dim=conditioner.c_dim)
    with torch.device("meta"):
        expected = sum(p.numel() for p in UNet(config).parameters())
    assert recipe_costs(recipe, stage, 32, 1e12).parameters == expected


def test_the_rate_is_a_rate():
    assert 1e8 < matrix_rate("cpu", largest=256, rounds=3) < 1e14
    ticks = iter(range(10**6))
    seen = matrix_rate("cpu", torch.bfloat16, enough=1.0, rounds=2, clock=lambda: next(ticks))
    assert seen == 2 * 256**3, "one tick a product: the first size is large enough"


def test_the_command_says_what_a_run_needs_and_trains_nothing(tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main(["train", "--recipe", "celebahq256-ldm4", "--dry-run", "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert all(words in told for words in ("256 pixels, first stage vq-f4", "274,056,163 parameters", "GiB at batch 48", "410,000 steps", "96 KiB a picture"))
    assert not out.exists()
    assert cli.main(["train", "--recipe", "celebahq256-ldm4", "--out", str(out)]) == 2
    assert "a configuration without weights" in capsys.readouterr().err and not out.exists()
    assert cli.main(["train", "--dry-run", "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "scenes-kl-f4" in told and "such devices" not in told
    assert cli.main(["train", "--dry-run", "--processes", "4", "--sharding", "full", "--out", str(out)]) == 0
    assert "on 4 such devices, sharding full" in capsys.readouterr().out
    assert cli.main(["train", "--dry-run", "--processes", "0", "--out", str(out)]) == 2 and "processes: got 0" in capsys.readouterr().err


KL = AutoencoderConfig(4, 16, (1, 2), 1, mid_attention=False, num_groups=8)
VQ = KL.replace(double_z=False, codes=32)
GAME = AdversarialConfig(disc_channels=8, disc_layers=2)
GAMES = {
    "kl": (KL, PIXELS_ONLY, ""), "vq": (VQ, PIXELS_ONLY, ""), "vq, averaged codes": (VQ.replace(codebook_decay=0.99), PIXELS_ONLY, ""),
    "kl, perceptual": (KL, GAME.replace(disc_weight=0.0), "stage"), "kl, judged": (KL, GAME, "stage"), "vq, judged": (VQ, GAME, "stage"),
    "not adaptive": (KL, GAME.replace(adaptive=False, perceptual_weight=0.0), "stage"), "not judged yet": (KL, GAME.replace(disc_warmup=9), "stage"),
    "critic": (VQ, GAME, "discriminator"), "batch": (KL, GAME.replace(disc_norm="batch"), "discriminator"),
    "spectral": (KL, GAME.replace(disc_norm="spectral"), "discriminator"), "r1": (KL, GAME.replace(r1_weight=1.0), "discriminator"),
}


def real_part(model, loss, part, rows, size):
    """The loss of one part with numbers on the CPU, and the storages of weights."""
    torch.manual_seed(0)
    stage, ruler = make_first_stage(model), load_perceptual()
    task = FirstStageTask(stage, size) if loss == PIXELS_ONLY else AdversarialTask(stage, size, "", loss, ruler)
    for name, p in task.model.named_parameters() if part else ():
        p.requires_grad_(p.requires_grad and name.startswith("discriminator") == (part == "discriminator"))
    chance = SimpleNamespace(step=0, generators=lambda tag: [torch.Generator().manual_seed(row) for row in range(rows)])
    x = torch.rand(rows, 3, size, size) * 2 - 1
    own = {t.untyped_storage().data_ptr() for net in (task.model, ruler) for t in net.parameters()}
    return task.part_loss(part, task.model, {"image": x}, chance)[0].mean(), own


@pytest.mark.parametrize("name", GAMES)
def test_a_part_is_counted_as_a_real_step_does_it(name):
    model, loss, part = GAMES[name]
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = contextlib.nullcontext()  # torch's own refuses r1's gradient in pixels
    counter.mod_tracker.parents = {"Global"}
    with counter:
        real_part(model, loss, part, 3, 24)[0].backward()
    make = lambda: stage_task(FirstStageRecipe(model, loss=loss), 24)
    assert part_flops(make(), part, 3, 0) == counter.get_total_flops() > 0
    kept = {}

    def note(x):
        kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        _, own = real_part(model, loss, part, 3, 24)
    seen = sum(x.untyped_storage().nbytes() for place, x in kept.items() if place not in own)
    assert part_kept(make(), part, 3, 0) == pytest.approx(seen, rel=0.02)


def test_a_run_is_its_spans_and_a_step_its_heavier_part():
    """10 steps: 4 without a critic, 3 in which it learns alone, 3 in which it judges."""
    train = TrainConfig(steps=10, batch_size=6, accumulation=2)
    recipe = FirstStageRecipe(KL, train, GAME.replace(disc_start=4, disc_warmup=3))
    count = lambda part, step: 2 * part_flops(stage_task(recipe, 24), part, 3, step)
    alone, learning, full = count("stage", 0), count("discriminator", 4), count("stage", 7)
    costs = first_stage_costs(recipe, 24, 1e9, "cpu")
    assert alone < full and (costs.first_flops, costs.flops, costs.full_from) == (alone, full + learning, 7)
    assert costs.step_seconds * 10 == pytest.approx((10 * alone + 6 * learning + 3 * (full - alone)) / (1e9 * SHARE["cpu"][False]))
    held = max(part_kept(stage_task(recipe, 24), part, 3, 7) for part in ("stage", "discriminator"))
    ruler = sum(p.numel() for p in load_perceptual().parameters())
    assert costs.memory == STILL * costs.parameters + 4 * ruler + held and costs.perceptual == ruler
    half = first_stage_costs(recipe.replace(train=train.replace(precision="bf16")), 24, 1e9, "cpu")
    assert costs.memory - half.memory == pytest.approx((1 - KEPT_BY_AUTOCAST) * held, abs=1)
    waits = first_stage_costs(recipe, 24, 1e15)
    assert waits.step_seconds == pytest.approx(LEAST_SECONDS["cuda"] * 2 * 16 / 10), "each part's kernels are started, in each of two pieces"


def test_a_critic_that_never_plays_has_no_gradient():
    train = TrainConfig(steps=4, batch_size=2)
    plays = FirstStageRecipe(KL, train, GAME.replace(disc_start=3, perceptual_weight=0.0))
    waits, silent = (first_stage_costs(FirstStageRecipe(KL, train, plays.loss.replace(**c)), 24, 1e9, "cpu") for c in ({"disc_start": 4}, {"disc_weight": 0.0, "perceptual_weight": 1.0}))
    kept = part_kept(stage_task(plays, 24), "stage", 2, 0)
    assert waits.memory == kept + STILL * (waits.parameters - waits.critic) + 8 * waits.critic and waits.full_from == 0
    assert first_stage_costs(plays, 24, 1e9, "cpu").memory > waits.memory + 12 * waits.critic
    assert silent.critic == waits.critic and silent.perceptual > 0 == waits.perceptual
    assert "in its critic" in waits.tell() and "perceptual network" not in waits.tell() and "at first" not in waits.tell()


def test_first_stages_that_networks_refuse_are_refused():
    for changes, size, says in (({"model": AUTOENCODERS["identity"]}, 32, "the identity stage, which has nothing to train"), ({}, 30, "multiples of 4"),
                                ({"train": TrainConfig(batch_size=1)}, 64, "batch of 1, expected at least 2"), ({}, 16, "expected at least 24 on a side")):
        recipe = FIRST_STAGES["vq-f4"].replace(model=VQ.replace(ch_mult=(1, 1, 1)), train=TrainConfig(steps=2)).replace(**changes)
        with pytest.raises(ValueError, match=says):
            first_stage_costs(recipe, size, 1e12)


def test_released_first_stages_are_predicted_whole():
    costs = first_stage_costs(FIRST_STAGES["kl-f8"], 256, 1e13)
    assert (costs.parameters - costs.critic, costs.critic, costs.full_from) == (83_653_863, 2_765_633, 50_001)
    assert f"from step 50,001 on, {costs.first_flops / 1e12:,.2f} at first" in costs.tell() and "s a step on average" in costs.tell()
    assert 1.3 < costs.flops / costs.first_flops < 1.4, "the critic's part decodes once more without gradients: a third"


def test_what_lies_still_is_not_shared_out_as_what_is_kept():
    """A critic that never plays has no gradients and moments, and a frozen network neither: they lie on each of several devices."""
    cost = first_stage_costs(FirstStageRecipe(KL, TrainConfig(steps=5, batch_size=8), GAME.replace(disc_start=10**9)), 24, 1e12)
    assert 0 < cost.still < cost.memory and cost.still != STILL * cost.parameters
    assert share_out(cost, 1) == cost and share_out(cost, 4).memory == pytest.approx(cost.still + (cost.memory - cost.still) / 4, abs=1)
    assert (tell_bytes(2**30), tell_bytes(42 * 2**20)) == ("1.0 GiB", "42 MiB")
