"""The latent diffusion model: scale factor both ways, shapes, seeds, saving, strict loading, bad requests."""
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import ldm_edu
from ldm_edu import ldm as L
from ldm_edu.autoencoder import AutoencoderConfig
from ldm_edu.conditioning import ClassConditioner, ClassConfig, Condition, NoCondition
from ldm_edu.data import Scenes, degrade
from ldm_edu.objective import PREDICTIONS
from ldm_edu.scaling import for_sampling
from ldm_edu.schedule import ScheduleConfig
from ldm_edu.unet import UNet, UNetConfig

STAGE = AutoencoderConfig(4, 8, (1, 2, 2), 1, mid_attention=False, num_groups=4)


def tiny(conditioner=None, ch_mult=(1, 2), **options):
    """A random model of 16-pixel pictures."""
    torch.manual_seed(0)
    conditioner = conditioner or ClassConditioner(ClassConfig(3, ("a", "b", "c"), width=8))
    unet = UNetConfig(4, 4, 8, ch_mult, 1, (1,), head_dim=8, num_groups=4, context_dim=conditioner.context_dim)
    config = L.LDMConfig(STAGE, unet, conditioner.to_dict(), ScheduleConfig(T=100), image_size=16, **options)
    model = L.build(config).eval()
    for p in model.net.parameters():  # the zero-initialised layers too, so that conditions show
        torch.nn.init.normal_(p, std=0.3)
    return model


def test_scale_factor_is_applied_both_ways():
    model = tiny(scale_factor=0.25)
    x = Scenes(16, n=4, fields=("image",)).render(range(4))["image"]
    raw = model.first_stage.encode(x).mode()
    torch.testing.assert_close(model.encode(x), 0.25 * raw)
    torch.testing.assert_close(model.decode(model.encode(x)), model.first_stage.decode(raw).clamp(-1, 1))


def test_an_image_depends_on_its_seed_and_prompt_alone():
    model = tiny()
    many = model.sample(["a", "b", "c", "b"], seed=5, steps=4, guidance_scale=2.0)
    alone = model.sample(["c"], seed=7, steps=4, guidance_scale=2.0)
    split = model.sample(["a", "b", "c", "b"], seed=5, steps=4, guidance_scale=2.0, batch_size=3)
    listed = model.sample(["b", "a"], seed=[8, 5], steps=4, guidance_scale=2.0)
    assert many.shape == (4, 3, 16, 16) and many.dtype == torch.float32 and many.abs().max() <= 1
    torch.testing.assert_close(many[2:3], alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(many, split, atol=1e-5, rtol=0)
    torch.testing.assert_close(listed, many[[3, 0]], atol=1e-5, rtol=0)
    assert (many[1] - many[3]).abs().max() > 1e-3, "other seeds, other pictures"


def test_dropped_rows_see_the_null_condition_and_the_others_their_own():
    """Condition dropout in training: bug 12, and its mirror image."""
    net, generator = tiny().net, torch.Generator().manual_seed(0)
    x_t, t, batch = torch.randn(4, 4, 4, 4, generator=generator), torch.tensor([3, 50, 7, 99]), {"label": torch.tensor([0, 1, 2, 1])}
    drop = torch.tensor([True, False, False, True])
    with torch.no_grad():
        own, null, mixed = net(x_t, t, batch), net.denoise(x_t, t, net.conditioner.null(4)), net(x_t, t, batch, drop)
    assert (own - null).abs().amax(dim=(1, 2, 3)).min() > 1e-3, "the conditions show"
    torch.testing.assert_close(mixed[drop], null[drop], atol=1e-5, rtol=0)
    torch.testing.assert_close(mixed[~drop], own[~drop], atol=1e-5, rtol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_sampler_reads_the_network_as_what_it_was_trained_for(prediction):
    model = tiny(prediction=prediction)
    condition, x_t = model.net.conditioner.null(2), torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    denoiser = model.denoiser(condition, condition)
    with torch.no_grad():
        raw, told = model.net.denoise(x_t, torch.tensor([60, 60]), condition), denoiser(x_t, 60)
    acp = model.schedule.alphas_cumprod[60]
    expected = {"eps": told.eps, "x0": told.x0, "v": acp.sqrt() * told.eps - (1 - acp).sqrt() * told.x0}
    torch.testing.assert_close(expected[prediction], raw, atol=1e-4, rtol=1e-4)
    assert all((value - raw).abs().max() > 1e-2 for kind, value in expected.items() if kind != prediction)


def test_the_denoiser_reads_no_padding():
    """Bug 18: tokens that the mask calls padding may hold anything."""
    net, generator = tiny().net, torch.Generator().manual_seed(0)
    x_t, t, context = torch.randn(2, 4, 4, 4, generator=generator), torch.tensor([9, 70]), torch.randn(2, 3, 8, generator=generator)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    other = torch.where(mask[..., None], context, 50.0)
    with torch.no_grad():
        one, two = (net.denoise(x_t, t, Condition(context=c, context_mask=mask)) for c in (context, other))
        alone = net.denoise(x_t[:1], t[:1], Condition(context=context[:1, :2]))
    torch.testing.assert_close(one, two, atol=0, rtol=0)
    torch.testing.assert_close(one[:1], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m"])
def test_guidance_limits(sampler):
    model = tiny()
    draw = lambda prompts, s: model.sample(prompts, n=2, seed=3, steps=3, guidance_scale=s, sampler=sampler)
    torch.testing.assert_close(draw("a", 0.0), draw(None, 1.0), atol=1e-5, rtol=0)
    assert (draw("a", 1.0) - draw(None, 1.0)).abs().max() > 1e-4
    assert (draw("a", 4.0) - draw("a", 1.0)).abs().max() > 1e-4


def test_guidance_options_reach_the_model():
    model = tiny()
    draw = lambda **options: model.sample("a", n=2, seed=3, steps=4, guidance_scale=4.0, decode=False, **options)
    plain, guided = model.sample("a", n=2, seed=3, steps=4, guidance_scale=1.0, decode=False), draw()
    torch.testing.assert_close(draw(guidance_interval=(0, 100)), guided)
    torch.testing.assert_close(draw(guidance_interval=(0, 0)), plain)
    torch.testing.assert_close(draw(guidance_rescale=0.0), guided)
    for options in ({"guidance_interval": (30, 60)}, {"guidance_rescale": 0.7}):
        assert (draw(**options) - guided).abs().max() > 1e-4, options
    rows = []
    forward = model.net.denoise
    model.net.denoise = lambda x, t, condition, conditions=1: rows.append((len(x), len(condition))) or forward(x, t, condition, conditions)
    draw(guidance_interval=(30, 60))  # trailing steps of 100: 99, 74, 49, 24
    assert rows == [(2, 2), (2, 2), (2, 4), (2, 2)]


@pytest.mark.parametrize("parts", [("context",), ("context", "mask"), ("context", "c"), ("context", "concat"), ("c",)], ids="+".join)
def test_several_conditions_of_the_same_latents(parts):
    """Only where the tokens alone differ may the network share; the answer is that of a repeated batch in any case."""
    g, k = torch.Generator().manual_seed(0), 3
    wide = {"context": torch.randn(2 * k, 3, 8, generator=g), "c": torch.randn(2 * k, 5, generator=g), "concat": torch.randn(2 * k, 1, 4, 4, generator=g)}
    given = {name: x for name, x in wide.items() if name in parts}
    if "mask" in parts:
        given["context_mask"] = torch.tensor([[True, True, False], [True] * 3]).repeat(k, 1)
    unet = UNet(UNetConfig(4 + ("concat" in parts), 4, 8, (1, 2), 1, (2,), head_dim=8, num_groups=4,
                           context_dim=8 if "context" in parts else None, c_dim=5 if "c" in parts else None))
    for p in unet.parameters():
        torch.nn.init.normal_(p, std=0.3, generator=g)
    net, condition, rows = L.ConditionalUNet(unet, ClassConditioner(ClassConfig(3))), Condition(**given), []
    unet.conv_in.register_forward_hook(lambda _, inputs, output: rows.append(len(inputs[0])))
    x_t, t = torch.randn(2, 4, 4, 4, generator=g), torch.tensor([9, 70])
    with torch.no_grad():
        together, repeated = net.denoise(x_t, t, condition, k), net.denoise(x_t.repeat(k, 1, 1, 1), t.repeat(k), condition)
    torch.testing.assert_close(together, repeated, atol=1e-5, rtol=1e-5)
    assert (together[:2] - together[2:4]).abs().max() > 1e-3, "the conditions show"
    assert rows == [2 if set(parts) <= {"context", "mask"} else 6, 6]


def test_guided_drawing_equals_drawing_with_doubled_batches(monkeypatch):
    model, rows = tiny(ch_mult=(1, 1)), []
    model.net.unet.conv_in.register_forward_hook(lambda _, inputs, output: rows.append(len(inputs[0])))
    draw = lambda: model.sample(["a", "b", "c"], seed=3, steps=4, guidance_scale=3.0, decode=False)
    shared = draw()
    doubled = L.GuidedModel
    monkeypatch.setattr(L, "GuidedModel", lambda *given, shares: doubled(*given))
    torch.testing.assert_close(draw(), shared, atol=1e-4, rtol=1e-4)
    assert rows == [3] * 4 + [6] * 4


def test_negative_prompts_replace_the_null_condition():
    model = tiny()
    same = model.sample("a", seed=0, steps=3, guidance_scale=3.0, negative="a")
    torch.testing.assert_close(same, model.sample("a", seed=0, steps=3, guidance_scale=1.0), atol=1e-5, rtol=0)


def test_other_sizes_and_latents():
    model = tiny()
    assert model.sample(["a"], size=(16, 32), steps=2).shape == (1, 3, 16, 32)
    assert model.sample(["a"], steps=2, decode=False).shape == (1, 4, 4, 4)
    seen = []
    model.sample(["a", "b"], steps=5, callback=seen.append)
    assert len(seen) == 5 and seen[0].x_t.shape == (2, 4, 4, 4)


@pytest.mark.parametrize("arguments, message", [
    ({"size": 20}, "20x20, expected multiples of 8"), ({"steps": 0}, "0"), ({"steps": 101}, "101"),
    ({"sampler": "euler9"}, "euler9.*ddim"), ({"n": 0}, "got 0"), ({"n": 3, "prompts": ["a", "b"]}, "3 images for 2"),
    ({"prompts": ["d"]}, "d.*a, b, c"), ({"prompts": []}, "empty list"), ({"seed": [1, 2, 3]}, "3 seeds, expected 1"),
    ({"guidance_scale": float("nan")}, "nan"), ({"guidance_rescale": 2.0}, "rescale: got 2"),
    ({"guidance_interval": (5, 1)}, "interval: got"), ({"batch_size": 0}, "batch_size"), ({"spacing": "even"}, "even.*trailing"),
    ({"guidance_scale": "3"}, "guidance_scale: got '3', expected a finite number"), ({"guidance_rescale": "0.5"}, "rescale: got '0.5', expected a number in"),
    ({"guidance_interval": 5}, "interval: got 5, expected two steps"), ({"guidance_interval": ("0", 5)}, "interval: got .*expected two steps"),
    ({"size": (32,)}, r"size: got \(32,\), expected one number of pixels, or two"), ({"size": "32"}, "size: got '32', expected an integer"),
    ({"size": (32.0, 32)}, "size: got 32.0"), ({"n": "2"}, "n: got '2', expected an integer"), ({"n": True}, "n: got True"), ({"batch_size": "2"}, "batch_size: got '2'"),
    ({"window": "16"}, "window: got '16', expected an integer"), ({"window": 16, "overlap": "8"}, "overlap: got '8'"), ({"tile": "16"}, "tile: got '16'"),
    ({"steps": "2"}, "steps: got '2', expected an integer in 1 ... 100"), ({"steps": 2.0}, "steps: got 2.0"), ({"steps": True}, "steps: got True"),
    ({"seed": 2**32}, "seed: got 4294967296, expected 0 to 4294967295"), ({"seed": -1}, "seed: got -1"), ({"prompts": 1.5}, "1.5"), ({"prompts": True}, "True"),
    ({"x_T": torch.zeros(2, 4, 4, 4)}, r"x_T: got shape \(2, 4, 4, 4\), expected \(1 4 4 4\)"),
])
def test_bad_requests_say_what_was_expected(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny().sample(**{"prompts": ["a"], "steps": 2, **arguments})


@pytest.mark.parametrize("arguments", [{"seed": 1.5}, {"seed": "42"}])
def test_seeds_that_are_no_integers_are_refused(arguments):
    with pytest.raises(TypeError, match="seed: got .*, expected an integer"):
        tiny().sample(["a"], steps=2, **arguments)


def test_numbers_of_numpy_and_torch_are_numbers():
    model, plain = tiny(), {"n": 2, "steps": 3, "seed": 5, "size": (16, 32), "batch_size": 1, "guidance_scale": 2.0, "guidance_interval": (0, 60)}
    drawn = model.sample([1, 1], **plain)
    theirs = {"n": np.int64(2), "steps": np.int64(3), "seed": np.int64(5), "size": (np.int64(16), torch.tensor(32)), "batch_size": torch.tensor(1),
              "guidance_scale": np.float32(2), "guidance_interval": (np.int64(0), torch.tensor(60))}
    for prompts in ([np.int64(1), torch.tensor(1)], np.array([1, 1]), torch.tensor([1, 1]), np.int64(1), torch.tensor(1)):
        assert torch.equal(model.sample(prompts, **theirs), drawn)


def test_conditions_are_encoded_as_they_are_needed():
    """Thousands of pictures are drawn in batches; nothing may be as large as all of them."""
    model = tiny()
    seen, prompts = [], [i % 3 for i in range(11)]
    model.net.conditioner.table.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    drawn = model.sample(prompts, steps=1, batch_size=4, negative="a", guidance_scale=2.0, decode=False)
    assert max(seen) == 4 and sum(seen) == 22, "each row of both conditions once"
    for start in (0, 4, 8):
        part = model.sample(prompts[start : start + 4], steps=1, seed=start, negative="a", guidance_scale=2.0, decode=False)
        assert torch.equal(drawn[start : start + 4], part), "a batch is what it would be alone"
    seen.clear()
    model.sample(batch={"label": torch.tensor(prompts), "name": "kept"}, n=11, steps=1, batch_size=4, decode=False)
    model.sample(n=11, steps=1, batch_size=4, decode=False)
    assert max(seen) == 4


def test_pictures_that_condition_are_encoded_as_they_are_needed():
    model, scenes = ldm_edu.load("scenes-inpaint"), Scenes(32, n=5, fields=("image",)).render(range(5))["image"]
    seen, mask = [], torch.zeros(5, 1, 32, 32)
    mask[..., :16] = 1
    model.first_stage.encoder.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    drawn = model.sample(batch={"image": scenes, "mask": mask}, steps=1, batch_size=2)
    assert seen == [2, 2, 1] and torch.equal(drawn[..., 16:], scenes[..., 16:])
    torch.testing.assert_close(drawn[4:], model.sample([(scenes[4], mask[4])], steps=1, seed=4), atol=1e-4, rtol=0)


def test_noise_to_start_from_is_cut_with_its_rows():
    model, noise = tiny(), torch.randn(7, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    drawn = model.sample(["b"] * 7, steps=2, x_T=noise, batch_size=3)
    torch.testing.assert_close(drawn, model.sample(["b"] * 7, steps=2, x_T=noise), atol=1e-5, rtol=0)
    assert torch.equal(drawn[3:6], model.sample(["b"] * 3, steps=2, x_T=noise[3:6]))
    with pytest.raises(ValueError, match=r"x_T: got shape \(6, 4, 4, 4\), expected \(7 4 4 4\)"):
        model.sample(["b"] * 7, steps=2, x_T=noise[:6], batch_size=3)


@pytest.mark.parametrize("n", [2, 6])
def test_batches_of_another_count_are_refused(n):
    model, mask = tiny(), torch.ones(4, 1, 32, 32)
    with pytest.raises(ValueError, match=f"n: got {n} images for a batch of 4 rows, expected 4"):
        model.sample(batch={"label": torch.tensor([0, 1, 2, 1])}, n=n, steps=2)
    with pytest.raises(ValueError, match=f"n: got {n} images for a batch of 4 rows, expected 4"):
        ldm_edu.load("scenes-inpaint").sample(batch={"image": torch.zeros(4, 3, 32, 32), "mask": mask}, n=n, steps=2)
    with pytest.raises(ValueError, match="4 rows of image, 3 rows of mask"):
        ldm_edu.load("scenes-inpaint").sample(batch={"image": torch.zeros(4, 3, 32, 32), "mask": mask[:3]}, steps=2)
    with pytest.raises(ValueError, match="reads 'label'"):
        model.sample(batch={"caption": ["a"]}, steps=2)
    assert tiny(NoCondition()).sample(batch={}, n=n, steps=1).shape[0] == n


def test_every_part_comes_back_into_its_own_mode():
    model = tiny()
    model.train()
    model.first_stage.eval()
    model.net.unet.mid.eval()
    modes = [part.training for part in model.modules()]
    model.sample(["a"], steps=1)
    assert [part.training for part in model.modules()] == modes and len(set(modes)) == 2
    with pytest.raises(RuntimeError), L.evaluating(model):
        assert not any(part.training for part in model.modules())
        raise RuntimeError
    assert [part.training for part in model.modules()] == modes


def test_pictures_need_not_be_square(tmp_path):
    square, wide = tiny(), tiny()
    wide.config = wide.config.replace(image_size=(16, 32))
    drawn = wide.sample(["a"], steps=2)
    assert drawn.shape == (1, 3, 16, 32) and torch.equal(drawn, square.sample(["a"], steps=2, size=(16, 32)))
    again = L.load(L.save(wide, tmp_path / "wide"))
    assert again.config == wide.config and again.config.image_size == (16, 32) and again.sample(["a"], steps=2).shape == drawn.shape
    assert square.config.replace(image_size=(16, 16)) == square.config and square.config.to_dict()["image_size"] == 16, "as it was always written"
    for size in (None, (16,), "16", 16.0, (16, 32, 3)):
        with pytest.raises(ValueError, match="image_size: got"):
            square.config.replace(image_size=size)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_in_another_precision_draws_in_it(dtype):
    plain, model = tiny(), tiny().to(dtype)
    prompts = ["a", "b"]
    torch.testing.assert_close(model.sample(prompts, steps=2), plain.sample(prompts, steps=2), atol=1e-4 if dtype == torch.float64 else 1.0, rtol=0)
    z = model.encode(torch.zeros(1, 3, 16, 16, dtype=torch.float64))
    assert z.dtype == torch.float64 and model.decode(z).dtype == torch.float64 and plain.decode(plain.encode(model.decode(z))).dtype == torch.float64


def test_where_float64_is_the_default_models_draw():
    torch.set_default_dtype(torch.float64)
    try:
        drawn = ldm_edu.load("scenes-class").sample([1], steps=2)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(drawn.float(), ldm_edu.load("scenes-class").sample([1], steps=2), atol=1e-3, rtol=0)


def test_a_compiled_part_is_saved_under_its_plain_names(tmp_path):
    model = tiny()
    drawn = model.sample(["b"], steps=2)
    model.net.unet, model.first_stage.decoder = torch.compile(model.net.unet, backend="eager"), torch.compile(model.first_stage.decoder, backend="eager")
    again = L.load(L.save(model, tmp_path / "m"))
    assert torch.equal(again.sample(["b"], steps=2), drawn) and not any("_orig_mod" in name for name in again.state_dict())


def test_weights_that_a_precision_cannot_hold_are_not_written(tmp_path):
    model = tiny()
    with torch.no_grad():
        model.net.unet.conv_in.weight[0, 0, 0, 0] = 70000.0
    with pytest.raises(ValueError, match="net.unet.conv_in.weight: got weights up to 7e.04, expected at most 6.55e.04 for torch.float16"):
        L.save(model, tmp_path / "m", dtype=torch.float16)
    assert not (tmp_path / "m").exists()
    L.load(L.save(model, tmp_path / "m", dtype=torch.bfloat16))


def test_first_stages_of_other_channels_encode(tmp_path):
    stage = AutoencoderConfig(4, 8, (1, 2, 2), 1, mid_attention=False, num_groups=4, in_channels=1)
    model = L.build(L.LDMConfig(stage, tiny().config.unet, tiny().config.conditioner, image_size=16)).eval()
    assert model.encode(torch.zeros(2, 1, 16, 16)).shape == (2, 4, 4, 4) and model.sample(["a"], steps=1).shape == (1, 1, 16, 16)
    with pytest.raises(ValueError, match="c=1"):
        model.encode(torch.zeros(2, 3, 16, 16))


def test_encoding_compiles_in_one_piece_and_needs_no_numbers():
    model, x = tiny(), Scenes(16, n=2, fields=("image",)).render(range(2))["image"]
    torch.testing.assert_close(torch.compile(model.encode, backend="eager", fullgraph=True)(x), model.encode(x), rtol=0, atol=0)
    assert model.to("meta").encode(x.to("meta")).shape == (2, 4, 4, 4)


def test_a_part_of_a_model_is_not_saved_as_something_else(tmp_path):
    for part in (tiny().net, tiny().net.unet):
        with pytest.raises(ValueError, match=f"model: got a {type(part).__name__}, expected a latent diffusion model"):
            L.save(part, tmp_path / "part")
    assert not (tmp_path / "part").exists()


def test_wrong_pictures_and_latents_are_refused():
    model = tiny()
    with pytest.raises(ValueError, match=r"\[-1, 1\]"):
        model.encode(torch.full((1, 3, 16, 16), 2.0))
    with pytest.raises(TypeError, match="uint8"):
        model.encode(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match="z=4"):
        model.decode(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="prediction"):
        L.LDMConfig(prediction="noise")
    with pytest.raises(ValueError, match="scale_factor"):
        L.LDMConfig(scale_factor=0.0)


def test_save_and_load_give_the_same_pictures(tmp_path):
    model = tiny(scale_factor=0.5)
    folder = L.save(model, tmp_path / "m", card={"steps": 3})
    again = L.load(folder)
    assert again.card == {"steps": 3} and again.config == model.config
    torch.testing.assert_close(again.sample(["b"], steps=3), model.sample(["b"], steps=3), rtol=0, atol=0)
    with pytest.raises(ValueError, match="holds a model already"):
        L.save(model, folder)
    L.save(model, folder, overwrite=True, dtype=torch.float16)
    torch.testing.assert_close(L.load(folder).sample(["b"], steps=3), model.sample(["b"], steps=3), rtol=0, atol=2e-2)
    stage = L.save(model.first_stage, tmp_path / "s")
    x = torch.zeros(1, 3, 16, 16)
    torch.testing.assert_close(L.load_first_stage(stage).encode(x).mean, model.first_stage.encode(x).mean, rtol=0, atol=0)
    with pytest.raises(ValueError, match="'first-stage', expected 'latent-diffusion'"):
        L.load(stage)


def test_an_unconditional_model_draws_without_prompts(tmp_path):
    model = tiny(NoCondition())
    assert model.sample(n=3, steps=2).shape == (3, 3, 16, 16)
    with pytest.raises(ValueError, match="this model is unconditional: it takes no prompts"):
        model.sample(["a"], steps=2)
    with pytest.raises(ValueError, match="this model is unconditional"):
        model.sample(negative="a", steps=2)


def test_weights_that_do_not_fit_are_listed(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = L.save(tiny(), tmp_path / "m")
    path = folder / "model.safetensors"
    state = load_file(path)
    first, second, *_ = state
    broken = {k: v for k, v in state.items() if k != first} | {"extra": torch.zeros(1), second: torch.zeros(2, 2)}
    save_file(broken, path)
    with pytest.raises(ValueError) as err:
        L.load(folder)
    assert all(part in str(err.value) for part in (str(path), f"missing {first}", "unexpected extra", f"{second}: got (2, 2)"))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors.*not a readable"):
        L.load(folder)
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match="config.json"):
        L.load(folder)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"kind": "latent-diffusion", "steps": 1}))
    with pytest.raises(ValueError, match="unknown steps"):
        L.load(folder)


@pytest.mark.parametrize("load, damage, message", [
    (L.load, lambda text: text[:200], "not valid JSON"), (L.load_first_stage, lambda text: text[:50], "not valid JSON"),
    (L.load, {"steps": 1}, "LDMConfig: got unknown steps"), (L.load_first_stage, {"steps": 1}, "AutoencoderConfig: got unknown steps"),
    (L.load, {"scale_factor": "1"}, "make no model .TypeError"), (L.load_first_stage, {"ch_mult": 3}, "make no model .TypeError"),
    (L.load, {"unet": None}, "make no model .AttributeError"), (L.load, {"prediction": "w"}, "prediction: got 'w'"),
    (L.load, {"conditioner": {"name": "class", "config": {"n_classes": 3, "width": -1}}}, "make no model .RuntimeError"),
    (L.load, {"conditioner": {"name": "class", "config": {}}}, "make no model .TypeError.*missing.*n_classes"),
    (L.load, {"conditioner": {"name": "text"}}, "needs its tokenizer"), (L.load, {"shared_first_stage": ["nowhere", "1"]}, "got 'nowhere'"),
    (L.load_first_stage, {"z_channels": 0}, "z_channels=0"), (L.load_first_stage, {"num_groups": 3}, "num_groups: got 3, expected a divisor"),
])
def test_a_damaged_config_is_named(tmp_path, load, damage, message):
    """By whoever opens it: from Python as from the command line, and once."""
    model = tiny()
    file = L.save(model if load is L.load else model.first_stage, tmp_path / "m") / "config.json"
    text = file.read_text()
    file.write_text(damage(text) if callable(damage) else json.dumps(json.loads(text) | damage))
    with pytest.raises(ValueError, match=message) as err:
        load(file.parent)
    assert str(err.value).startswith(f"{file}: ") and str(err.value).count(str(tmp_path)) == 1


@pytest.mark.parametrize("load, missing, where", [
    (L.load, "kind", ""), (L.load, "conditioner", "model.safetensors"), (L.load, "unet", "model.safetensors"), (L.load_first_stage, "kind", ""),
    (L.load_first_stage, "z_channels", "model.safetensors"),
])
def test_a_config_without_one_of_its_keys_is_named_with_its_folder(tmp_path, load, missing, where):
    """What a config leaves out has its default: where that is another network, the weights do not fit it."""
    model = tiny()
    folder = L.save(model if load is L.load else model.first_stage, tmp_path / "m")
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({key: value for key, value in said.items() if key != missing}))
    with pytest.raises(ValueError, match="expected '(latent-diffusion|first-stage)'|does not fit this model") as err:
        load(folder)
    assert str(err.value).startswith(f"{folder / where}: ")


def test_public_names_and_unknown_ones():
    assert ldm_edu.Scenes is Scenes and "load" in dir(ldm_edu)
    with pytest.raises(AttributeError, match="public names"):
        ldm_edu.lod  # noqa: B018
    with pytest.raises(ValueError, match="one of"):
        ldm_edu.load("no-such-model")


def test_first_picture_from_any_folder_offline_within_ten_seconds(tmp_path, root):
    code = ("import time; a = time.perf_counter(); import ldm_edu as ldm; model = ldm.load('scenes-text'); "
            "x = model.sample(['a red circle left of a blue square'], steps=20, guidance_scale=4.0, sampler='dpmpp_2m', seed=0); "
            "assert x.shape[1] == 3 and x.std() > 0.1; print(time.perf_counter() - a)")
    import os
    env = {**os.environ, "PYTHONPATH": str(root / "tests" / "offline"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) <= 10, f"{float(done.stdout):.1f} s to the first picture"


def test_a_first_stage_that_several_models_share_is_written_once(tmp_path):
    model = tiny(scale_factor=0.5)
    stage = L.save(model.first_stage, tmp_path / "stage")
    slim = L.save(model, tmp_path / "slim", first_stage=stage)
    assert (slim / "model.safetensors").stat().st_size < 0.9 * (L.save(model, tmp_path / "whole") / "model.safetensors").stat().st_size
    torch.testing.assert_close(dict(L.load(slim).state_dict()), dict(model.state_dict()), rtol=0, atol=0)
    other = tiny()
    torch.nn.init.zeros_(next(other.first_stage.parameters()))
    with pytest.raises(ValueError, match="not the ones that this model was trained with"):
        L.save(other, tmp_path / "other", first_stage=stage)
    with pytest.raises(ValueError, match="is a first stage itself"):
        L.save(model.first_stage, tmp_path / "other", first_stage=stage)
    assert not (tmp_path / "other").exists()
    L.save(other.first_stage, stage, overwrite=True)
    with pytest.raises(ValueError, match="not the ones that this model was trained with"):
        L.load(slim)
    shutil.rmtree(stage)
    with pytest.raises(ValueError, match=r"model: got .*stage"):
        L.load(slim)


# ---------------------------------------------------------------- half precision, compiled


@pytest.mark.parametrize("name, asked", [("scenes-text", {"prompts": ["a red circle", "a blue star"]}), ("scenes-superres", {"batch": {}})])
@pytest.mark.parametrize("precision, dtype", [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_a_model_in_half_precision_draws_the_same_pictures(name, asked, precision, dtype):
    images = Scenes(32, n=2, objects=(1, 1), fields=("image",)).render(range(2))["image"]
    if "batch" in asked:
        asked = {"batch": {"low_res": degrade(images, 4)}}
    plain, quick = L.load(name), for_sampling(L.load(name), precision)
    assert {p.dtype for p in quick.net.unet.parameters()} == {p.dtype for p in quick.first_stage.parameters()} == {dtype}
    assert {p.dtype for p in quick.net.conditioner.parameters()} <= {torch.float32}, "conditions are encoded once, as they were trained"
    a, b = (model.sample(**asked, steps=8, seed=3) for model in (plain, quick))
    assert b.dtype == torch.float32 and torch.equal(a, b) == (precision == "fp32") and (a - b).abs().mean() < 0.02
    z = quick.encode(images)
    assert z.dtype == quick.decode(z).dtype == quick.decode(z, tile=16).dtype == torch.float32
    assert (quick.decode(z) - plain.decode(plain.encode(images))).abs().mean() < 0.01


def test_an_answer_stays_when_the_next_one_is_computed():
    """CUDA graphs write every answer to the same place; samplers of higher order look back."""
    net, place = tiny().net, torch.zeros(2, 4, 4, 4)

    class Graph(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))

        def forward(self, x, t, **condition):
            return place.copy_(x * self.weight)
    net.unet = Graph()
    with torch.no_grad():
        first = net.denoise(torch.ones_like(place), torch.zeros(2), Condition())
        second = net.denoise(2 * torch.ones_like(place), torch.zeros(2), Condition())
    assert first.eq(1).all() and second.eq(2).all()


def test_a_compiled_model_draws_the_same_pictures_and_can_be_saved(tmp_path):
    model, asked = tiny(ch_mult=(1,)), {"prompts": ["a", "b"], "seed": 1, "steps": 3, "guidance_scale": 2.0}
    plain = model.sample(**asked)
    compiled = for_sampling(model, "fp32", compile="default")
    calls = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch.testing.assert_close(compiled.sample(**asked), plain, atol=1e-4, rtol=0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > calls, "something was compiled"
    L.save(compiled, tmp_path / "model")
    torch.testing.assert_close(L.load(tmp_path / "model").sample(**asked), plain, atol=1e-4, rtol=0)


@pytest.mark.parametrize("arguments, message", [(("int8",), "precision.*int8.*fp32"), (("fp32", "fast"), "compile.*fast.*reduce-overhead"), (("fp16",), "fp16.*on a CPU")])
def test_what_sampling_cannot_do_is_said(arguments, message):
    with pytest.raises(ValueError, match=message):
        for_sampling(tiny(), *arguments)
