"""The doctor: references in closed form, every illness found for its own reason, the healthy cleared, honest refusals."""
import copy
import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from ldm_edu import checkup, cli, doctor
from ldm_edu.autoencoder import AutoencoderConfig, DiagonalGaussian
from ldm_edu.checkpoint import load_checkpoint
from ldm_edu.data import Scenes
from ldm_edu.doctor import EXAMINATIONS, examine, take_items
from ldm_edu.examinations import Effect, LinearDenoiser, Patient, fit_linear, make_cases, paired_factor, pick_rows
from ldm_edu.findings import Finding, Report, conclude, draw_curves
from ldm_edu.ldm import LatentDiffusion, LDMConfig, build, load
from ldm_edu.oracle import GaussianMixture
from ldm_edu.recipes import train_diffusion
from ldm_edu.schedule import ScheduleConfig, make_schedule
from ldm_edu.training import TrainConfig
from ldm_edu.unet import UNETS
from ldm_edu.viz import to_pil

CASES = 160


@pytest.fixture(scope="module")
def model():
    return load("scenes-class")


@pytest.fixture(scope="module")
def items():
    return Scenes(32, n=CASES, split="validation", objects=(1, 1), fields=("image", "label")).render(range(CASES))


@pytest.fixture(scope="module")
def well(model, items):
    return Patient(model, items, CASES)


def changed(model, net=None, stage=None, **config):
    """The model with some parts, or some of its config, exchanged."""
    return LatentDiffusion(model.config.replace(**config), stage or model.first_stage, net or copy.deepcopy(model.net), model.card).eval()


class Permuted(torch.nn.Module):
    """The first stage with its latents' channels in another order: as good, and another one."""

    def __init__(self, stage):
        super().__init__()
        self.stage, self.config = stage, stage.config

    def encode(self, x):
        q = self.stage.encode(x)
        return DiagonalGaussian(q.mean.roll(1, 1), q.logvar.roll(1, 1))

    def decode(self, z):
        return self.stage.decode(z.roll(-1, 1))


class Garbling(Permuted):
    """A first stage whose decoder belongs to another encoder."""

    def decode(self, z):
        return self.stage.decode(z)


# ------------------------------------------------------------------------------------------------ references in closed form
@pytest.mark.parametrize("t", [20, 250, 600, 999])
def test_the_linear_closed_form_is_what_the_exact_denoiser_of_a_gaussian_measures(t):
    """`mse` against a Monte-Carlo run of the oracle, which shares no code with it."""
    g = torch.Generator().manual_seed(t)
    mixing = torch.randn(9, 9, generator=g).double()
    gaussian = GaussianMixture(torch.randn(1, 9, generator=g), covariances=(mixing @ mixing.T / 9 + 0.01 * torch.eye(9))[None])
    values, axes = torch.linalg.eigh(gaussian.covariance)
    exact, schedule = LinearDenoiser(gaussian.mean, axes, values, 0.0), make_schedule()
    cases = make_cases(gaussian.sample(6000, g), schedule, 6000)
    acp = schedule.alphas_cumprod[t].double()
    x_t = acp.sqrt() * cases.x0 + (1 - acp).sqrt() * cases.eps
    errors = (gaussian.model(schedule, "v")(x_t, t) - (acp.sqrt() * cases.eps - (1 - acp).sqrt() * cases.x0)).square().mean(1)
    assert abs(errors.mean() - exact.mse(acp[None])[0]) < 4 * errors.std() / 6000**0.5
    assert_close(exact.v(x_t, acp.expand(6000)), gaussian.v(x_t, acp))


@pytest.mark.parametrize("n, d", [(50, 6), (6, 50), (20, 1), (12, 11)])
def test_the_shrunk_covariance_is_the_dense_formula(n, d):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(n)).double() * torch.linspace(0.5, 2, d).double()
    fit, sample = fit_linear(x), torch.atleast_2d(x.T.cov())
    trace, square = sample.trace(), (sample @ sample).trace()
    rho = min(1.0, (((1 - 2 / d) * square + trace**2) / ((n - 2 / d) * (square - trace**2 / d))).item()) if d > 1 else 1.0
    dense = (1 - rho) * sample + rho * trace / d * torch.eye(d).double()
    mine = (fit.axes * fit.values) @ fit.axes.T + fit.rest * (torch.eye(d).double() - fit.axes @ fit.axes.T)
    assert_close(mine, dense, rtol=1e-8, atol=1e-10)
    assert_close(fit.variance, (dense.trace() / d).item())
    y = x[:3] - x.mean(0)
    assert_close(fit.strangeness(x[:3]), (y @ dense.inverse() * y).mean(1), rtol=1e-6, atol=1e-8)


def test_the_references_meet_at_both_ends_and_who_knows_more_is_never_worse(well):
    fit, acp = well.fits[0], torch.linspace(1e-4, 1 - 1e-4, 50).double()
    alone = fit.variance / (acp * fit.variance + 1 - acp)
    assert (fit.mse(acp) <= alone).all() and (alone <= torch.minimum(1 / acp, fit.variance / (1 - acp))).all()  # eps = 0, x0 = the mean
    assert_close(fit.mse(torch.zeros(1)), torch.tensor([fit.variance]).double())  # no signal: the data's own variance, of v = -x0
    assert_close(fit.mse(torch.ones(1)), torch.ones(1).double())  # no noise: eps is anybody's guess
    with pytest.raises(ValueError, match="got 5 rows with a variance of 0"):
        fit_linear(torch.ones(5, 3))


def test_a_factor_is_sure_at_four_standard_errors_and_not_before():
    for z in (3.9, 4.1):
        assert Effect(z, 1.0).above == Effect(-z, 1.0).below == (z > 4) and not Effect(z, 1.0).below
    pair = paired_factor(torch.tensor([2.0, 8.0]), torch.tensor([1.0, 2.0]))
    assert_close(pair.times, 8**0.5)
    assert_close(pair.error, math.log(2) / 2)
    assert not paired_factor(torch.ones(9), torch.ones(9)).above


# ------------------------------------------------------------------------------------------------ the healthy
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_healthy_model_is_cleared(model, items, seed):
    report = examine(model, items, training=Scenes(32, n=32, objects=(1, 1), fields=("image", "label")), cases=96, seed=seed)
    assert report.diagnosis is None, str(report)
    assert {"average"} <= {f.name for f in report.findings if f.verdict == "not examined"} <= {"average", "null"}  # few cases may not do for the null
    assert [f.name for f in report.findings] == list(EXAMINATIONS)


def test_one_seed_gives_one_report_whatever_the_batch(model, items):
    one, two = (examine(model, items, cases=64, batch_size=b) for b in (64, 23))
    assert one == examine(model, items, cases=64) and one.curve != doctor.loss_curve(Patient(model, items, 64, seed=5))
    assert [f.verdict for f in one.findings] == [f.verdict for f in two.findings]
    assert_close(torch.tensor(one.curve["network"]), torch.tensor(two.curve["network"]), rtol=1e-3, atol=1e-6)


def test_global_generators_and_modes_stay_as_they_are(model, items):
    model.train()
    state = torch.get_rng_state()
    examine(model, items, cases=64)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    model.eval()


# ------------------------------------------------------------------------------------------------ the sick
def v_for_eps(model):
    return changed(model, prediction="eps")


def other_scale(model):
    return changed(model, scale_factor=0.18215)


def other_schedule(model):
    return changed(model, schedule=ScheduleConfig("cosine"))


def other_stage(model):
    return changed(model, stage=Permuted(model.first_stage))


def other_decoder(model):
    return changed(model, stage=Garbling(model.first_stage))


def never_null(model):
    sick = changed(model)
    sick.net.conditioner.table.weight.data[-1] = torch.randn(model.net.conditioner.table.weight.shape[1], generator=torch.Generator().manual_seed(0))
    return sick


def null_is_a_class(model):
    """Better than a stranger's condition (one time in six it is the right one), and no better than the average of three."""
    sick = changed(model)
    sick.net.conditioner.table.weight.data[-1] = model.net.conditioner.table.weight.data[0]
    return sick


def mixed_up(model):
    sick = changed(model)
    sick.net.conditioner.table.weight.data[:-1] = model.net.conditioner.table.weight.data[:-1].roll(1, 0)
    return sick


def deaf(model):
    sick = changed(model)
    sick.net.conditioner.table.weight.data[:] = model.net.conditioner.table.weight.data[-1]
    return sick


def timeless(model):
    sick, embed = changed(model), model.net.unet.embed
    sick.net.unet.embed = lambda t, c=None: embed(t // 1000, c)
    return sick


def late(model):
    sick, embed = changed(model), model.net.unet.embed
    sick.net.unet.embed = lambda t, c=None: embed((t + 150).clamp(max=999), c)
    return sick


def poisoned(model):
    sick = changed(model)
    sick.net.unet.conv_out.weight.data[0, 0, 0, 0] = float("nan")
    return sick


def overflowing(model):
    sick = copy.deepcopy(changed(model)).half()
    sick.net.unet.conv_in.weight.data *= 1e5
    return sick


def untrained(model):
    return changed(model, build(model.config).net)


ILL = {  # the examination that must find it, and what its finding must say
    v_for_eps: ("language", "prediction='v'"), other_scale: ("latents", "scale_factor would be 1.0"), other_schedule: ("clock", "another schedule"), late: ("clock", "told t -"),
    other_stage: ("home", "other latents"), other_decoder: ("first stage", "not the decoder"), never_null: ("null", "condition_dropout"), null_is_a_class: ("null", "the null's row"), mixed_up: ("condition", "better with a wrong"),
    deaf: ("condition", "does not hear"), timeless: ("time", "does not hear t"), poisoned: ("numbers", "conv_out.weight"), untrained: ("loss", "learnt nothing")}


@pytest.mark.parametrize("make", ILL, ids=lambda make: make.__name__)
def test_every_illness_is_found_by_its_own_examination_and_not_before(model, items, well, make):
    """All examinations up to the diagnosis: those upstream find nothing, this one does, and the healthy model passes it."""
    (name, word), found = ILL[make], {}
    patient = Patient(make(model), items, 2 * CASES if name == "null" else 80)
    for each, look in EXAMINATIONS.items():
        found[each] = look(patient)
        if each == name:
            break
    assert [f.name for f in found.values() if f.verdict == "sick"] == [name], found
    assert word in found[name].measured + found[name].advice and found[name].expected
    assert EXAMINATIONS[name](well).verdict == "ok"


@pytest.mark.parametrize("change, word, stops", [
    (lambda x: (x + 1) / 2, "[0, 1]", False), (lambda x: ((x + 1) * 127.5).to(torch.uint8), "x / 127.5 - 1", True), (lambda x: (x + 1) * 127.5, "bytes as floats", True),
    (lambda x: x * float("nan"), "NaN", True), (lambda x: x.mean(1, keepdim=True).expand(-1, 3, -1, -1), "grey", False),
])
def test_pictures_out_of_range(model, items, change, word, stops):
    report = examine(model, {**items, "image": change(items["image"])}, cases=64)
    assert word in report["pictures"].advice and report["pictures"].verdict == ("watch" if word == "grey" else "sick")
    assert (report["samples"].verdict == "not examined") == stops == (report.curve == {})
    if stops:
        with pytest.raises(ValueError, match="expected one of a loss that was measured: 'pictures' comes before any loss"):
            report.plot()


def test_overflow_in_half_precision_is_told_from_weights_that_are_not_finite(model, items):
    found = doctor.see_numbers(Patient(overflowing(model), items, 64))
    assert found.verdict == "sick" and "overflow" in found.advice and found.measured.startswith("float16")
    assert doctor.see_numbers(Patient(copy.deepcopy(changed(model)).half(), items, 64)).verdict == "ok"


def test_a_young_average_is_found_beside_its_raw_weights_and_a_good_one_is_not(model, items, well):
    average, start = changed(model), build(model.config)
    with torch.no_grad():
        for p, q in zip(average.net.parameters(), start.net.parameters()):
            p.lerp_(q, 0.9)
    young = examine(average, items, raw=model, cases=64)
    assert young.diagnosis == "average" and "ema_warmup" in young["average"].advice
    same = Patient(model, items, 64)
    same.raw = Patient(model, items, 64)
    assert doctor.see_average(same).verdict == "ok"


def test_memory_needs_pictures_of_the_training_and_measures_the_gap(well, monkeypatch):
    assert doctor.see_memory(well).verdict == "not examined"
    seen = copy.copy(well)
    for factor, verdict in ((1.0, "ok"), (0.9, "watch"), (0.1, "sick")):
        monkeypatch.setitem(seen.__dict__, "losses", factor * well.losses)
        monkeypatch.setattr(well, "training", seen)
        assert doctor.see_memory(well).verdict == verdict


@pytest.mark.parametrize("config, kind, verdict", [
    (ScheduleConfig("scaled_linear", 1000, 1e-5, 1e-4), "v", "sick"), (ScheduleConfig("scaled_linear", 1000, 0.00085, 0.012), "v", "watch"),
    (ScheduleConfig(zero_terminal_snr=True), "v", "ok"), (ScheduleConfig(zero_terminal_snr=True), "eps", "sick"), (ScheduleConfig(), "v", "ok"),
])
def test_the_last_step_must_be_noise(model, items, config, kind, verdict):
    patient = Patient(changed(model, schedule=config, prediction=kind), items, 64)
    if verdict == "watch":  # a picture whose brightness says nearly everything
        patient.fits = (fit_linear(torch.randn(40, 1, generator=torch.Generator().manual_seed(0)).expand(40, 256) + 0.01 * torch.randn(40, 256)),) * 2
    assert doctor.see_schedule(patient).verdict == verdict
    if kind == "eps":
        assert doctor.see_samples(patient).verdict == "sick" and doctor.see_home(patient).verdict == "not examined"


def test_levels_that_the_card_excuses_are_watched(model, items, monkeypatch):
    patient = Patient(model, items, CASES)
    monkeypatch.setitem(patient.__dict__, "losses", patient.linear * torch.cat([torch.full((20,), 3.0), torch.full((CASES - 20,), 0.5)]))
    assert doctor.see_loss(patient).verdict == "sick"
    monkeypatch.setattr(model, "card", {**model.card, "step_bias": 9.0})  # 0.125 ** 9: these steps hardly occurred
    assert doctor.see_loss(patient).verdict == "watch" and "hardly trained" in doctor.see_loss(patient).advice


# ------------------------------------------------------------------------------------------------ other models, refusals
def test_an_unconditional_model_of_pixels_is_examined(items):
    config = LDMConfig(AutoencoderConfig(3, 4, (1,), 1, num_groups=1, double_z=False), UNETS["pixel-tiny"], {"name": "none"}, prediction="x0", image_size=16)
    report = examine(build(config), {"image": items["image"][:40, :, :16, :16]}, cases=64)
    assert report["first stage"].verdict == "ok" and "pixels" in report["first stage"].measured
    assert report["condition"].verdict == report["null"].verdict == "not examined" and "unconditional" in report["null"].advice
    assert report.diagnosis is not None  # its weights are those of the first day


def test_refusals_name_what_is_wanting(model, items):
    with pytest.raises(ValueError, match="items with image, expected also label, which this model's ClassConditioner reads"):
        examine(model, {"image": items["image"]})
    with pytest.raises(ValueError, match="got 31 items and 512 cases, expected at least 32 and 64"):
        examine(model, Scenes(32, n=31, objects=(1, 1), fields=("image", "label")))
    with pytest.raises(ValueError, match="got 0 items"):
        take_items([], 10)
    with pytest.raises(ValueError, match="how: got 'nothing'"):
        Patient(model, items, 64).ask("nothing")


def test_latents_are_drawn_from_the_posterior_as_in_training(model, items, well):
    with torch.no_grad():
        posterior = model.first_stage.encode(items["image"])
    noise = (well.latents / model.config.scale_factor - posterior.mean) / posterior.std
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02


def test_each_half_is_judged_by_the_fit_of_the_other(well):
    levels = well.cases.acp.flatten()
    for half, fit in ((0, well.fits[1]), (1, well.fits[0])):
        rows = well.cases.rows % 2 == half
        assert_close(well.linear[rows], well.cases.errors(fit.v(well.cases.x_t, levels))[rows])
        own = well.cases.errors(well.fits[half].v(well.cases.x_t, levels))[rows]
        assert paired_factor(well.linear[rows], own).above  # a fit flatters what it was fitted to


@pytest.mark.parametrize("kind", ["eps", "v"])
def test_a_network_that_says_nothing_speaks_no_other_language_and_is_at_home_nowhere(model, items, kind):
    dead = Patient(changed(model, build(model.config).net, prediction=kind), items, 96)
    assert doctor.see_language(dead).verdict == "ok" and (kind == "eps" or doctor.see_home(dead).verdict == "ok")
    assert doctor.see_time(dead).verdict == "not examined" and doctor.see_loss(dead).verdict == "sick"


def test_items_are_spread_over_the_data_set_and_rows_may_be_picked_in_any_order(items):
    scenes = Scenes(32, n=1000, fields=("image", "caption"))
    taken = take_items(scenes, 5)
    assert taken["caption"] == [scenes[i]["caption"] for i in (0, 249, 499, 749, 999)]
    assert pick_rows(taken, torch.tensor([4, 0]))["caption"] == [taken["caption"][4], taken["caption"][0]]
    assert take_items(items, 3) is items


def test_a_further_examination_is_one_more_row(model, items):
    report = examine(model, items, cases=64, more={"mood": lambda patient: conclude("mood", "sunny", "sunny")})
    assert report.findings[-1].name == "mood" and "mood" in str(report)
    with pytest.raises(ValueError, match="moood.*did you mean 'mood'"):
        report["moood"]


# ------------------------------------------------------------------------------------------------ runs and the command
@pytest.fixture(scope="module")
def run(tmp_path_factory, model):
    """An interrupted run of a class model: 12 of 40 steps, an average without warm-up."""
    folder = tmp_path_factory.mktemp("run")
    data = Scenes(32, n=64, objects=(1, 1), fields=("image", "label"))
    with pytest.raises(KeyboardInterrupt):
        train_diffusion(data, model.first_stage, "class-tiny", folder, progress=False, steps=40, batch_size=8, lr=0.2, warmup_steps=0, log_every=1, save_every=4,
                        validate_every=0, ema_decay=0.999, ema_warmup=False, precision="fp32", callbacks=[_stop_after(12)])
    return folder


def _stop_after(step):
    def callback(report):
        if report.step == step:
            raise KeyboardInterrupt
    return callback


def test_a_run_is_examined_from_its_papers_and_its_newest_checkpoint(run, items):
    report = checkup.examine_run(run, items, cases=64)
    assert report["steps"].verdict == "watch" and report["steps"].measured == "8 of 40"
    assert report.diagnosis == "learning rate" and report["average's age"].verdict == "sick" and f"{0.999**8:.1%}" in report["average's age"].measured
    assert report["average"].measured  # raw and averaged weights were compared
    average, raw, _, done = checkup.open_run(run)
    saved, _ = load_checkpoint(run / "checkpoints" / "step-00000008")
    assert done == 8 and torch.equal(average.net.unet.conv_in.weight, saved["ema"]["unet.conv_in.weight"])
    assert torch.equal(raw.net.unet.conv_in.weight, saved["model"]["unet.conv_in.weight"]) and not torch.equal(saved["ema"]["unet.conv_in.weight"], raw.net.unet.conv_in.weight)


def test_runs_that_cannot_be_examined_say_why(run, items, tmp_path, model):
    with pytest.raises(ValueError, match="expected the folder of a training run"):
        checkup.examine_run(tmp_path, items)
    with pytest.raises(ValueError, match="first_stage: got weights of hash"):
        checkup.open_run(run, build(model.config).first_stage)
    said = json.loads((run / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match="got no checkpoint"):
        checkup.examine_run(tmp_path, items)
    (tmp_path / "run.json").write_text(json.dumps({**said, "task": {"task": "first-stage"}}))
    with pytest.raises(ValueError, match="got a run of 'first-stage'"):
        checkup.examine_run(tmp_path, items)


def test_the_log_is_read_past_a_line_that_was_cut(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 1.0, "lr": 0.1}\n{"step": 1, "validation": 2.0}\n{"step": 2, "loss": NaN, "lr": 0.1}\n{"step": 3, "lo')
    rows = checkup.read_log(tmp_path)
    assert [row["step"] for row in rows] == [1, 2]
    found = checkup.see_falling(rows)
    assert found.verdict == "sick" and "step 2" in found.measured


def test_a_loss_of_exactly_0_is_no_success():
    found = checkup.see_falling([{"step": 10 * i, "loss": 0.0 if i > 6 else 1.0} for i in range(20)])
    assert found.verdict == "sick" and found.measured == "0 at step 70"


@pytest.mark.parametrize("norms, clip, verdict", [([1.0] * 9 + [20.0], 1.0, "watch"), ([1.0] * 9 + [20.0], 0.0, "sick"), ([1.0] * 10, 0.0, "ok"),
                                                  ([1.0] * 9 + [float("inf")], 1.0, "sick"), ([], 1.0, "not examined")])
def test_gradients(norms, clip, verdict):
    assert checkup.see_gradients([{"step": i, "loss": 1.0, "grad_norm": x} for i, x in enumerate(norms)], TrainConfig(grad_clip=clip)).verdict == verdict


@pytest.mark.parametrize("log, verdict", [((0.0, 1.0), "sick"), ((0.0, -1.0), "ok"), ((0.0, 0.0), "watch")])
def test_falling_is_judged_by_the_spread_of_the_log(log, verdict):
    noise = 0.05 * torch.randn(60, generator=torch.Generator().manual_seed(1))
    losses = (torch.linspace(*log, 60) + noise).exp().tolist()
    assert checkup.see_falling([{"step": i, "loss": x} for i, x in enumerate(losses)]).verdict == verdict
    assert checkup.see_falling([{"step": i, "loss": x} for i, x in enumerate(losses[:8])]).verdict == "not examined"


def test_the_command_exits_with_0_for_healthy_1_for_sick_2_for_a_wrong_request(run, tmp_path, capsys):
    plot = tmp_path / "curve.png"
    asked = ["doctor", "--model", "scenes-class", "--items", "160", "--cases", "160", "--json", "--plot", str(plot)]
    assert cli.main(asked) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["diagnosis"] is None and said["findings"][0]["name"] == "pictures" and plot.stat().st_size > 1000
    assert {f["name"]: f["verdict"] for f in said["findings"]}["memory"] == "ok"  # the card tells where its pictures came from
    assert cli.main(asked) == 2 and "exists already" in capsys.readouterr().err
    assert cli.main(["doctor", "--model", str(run), "--items", "64", "--cases", "64", "--objects", "1", "1"]) == 1
    assert "diagnosis: learning rate" in capsys.readouterr().out
    assert cli.main(["doctor", "--model", "scenes-klass"]) == 2 and "scenes-class" in capsys.readouterr().err
    assert cli.main(["doctor", "--model", "scenes-kl-f4"]) == 2 and "first-stage" in capsys.readouterr().err


def test_the_command_says_when_a_folder_lacks_what_the_model_reads(tmp_path, capsys):
    from ldm_edu.viz import to_pil

    for i, image in enumerate(Scenes(32, n=40, fields=("image",)).render(range(40))["image"]):
        to_pil(image).save(tmp_path / f"{i:02}.png")
    assert cli.main(["doctor", "--model", "scenes-text", "--data", str(tmp_path)]) == 2
    assert "caption" in capsys.readouterr().err


def test_a_report_prints_its_reasons():
    report = Report((Finding("a", "1", "2", "ok"), Finding("b", "3", "4, because", "sick", "do it"), Finding("c", "", "", "not examined", "no c here")), {})
    lines = str(report).splitlines()
    assert lines[0].split() == ["ok", "a", "1"] and "4, because" in lines[2] and "do it" in lines[3] and "no c here" in lines[4] and lines[-1] == "diagnosis: b"


def test_a_folder_s_classes_count_in_the_model_s_order(tmp_path, model, items, capsys):
    """Folders come by name, classes as they were trained: told apart, or a healthy model would be found deaf to its conditions."""
    names = model.config.conditioner["config"]["class_names"]
    for i, (image, label) in enumerate(zip(items["image"], items["label"].tolist())):
        folder = tmp_path / "shapes" / names[label]
        folder.mkdir(parents=True, exist_ok=True)
        to_pil(image).save(folder / f"{i}.png")
    assert cli.main(["doctor", "--model", "scenes-class", "--data", str(tmp_path / "shapes"), "--items", "128", "--cases", "128", "--json"]) == 0
    found = {f["name"]: f["verdict"] for f in json.loads(capsys.readouterr().out)["findings"]}
    assert found["condition"] == "ok"
    (tmp_path / "shapes" / "star").rename(tmp_path / "shapes" / "stern")
    assert cli.main(["doctor", "--model", "scenes-class", "--data", str(tmp_path / "shapes")]) == 2
    assert "got the classes circle, cross, ring, square, stern, triangle, expected those of the model: circle, square" in capsys.readouterr().err


@pytest.mark.parametrize("told", ["fraction", "constant"])
def test_who_does_not_hear_t_has_no_clock(model, items, told):
    """The field's own bug: t / T where the embedding counts to T."""
    net = copy.deepcopy(model.net)
    embed = net.unet.embed
    net.unet.embed = lambda t, c=None: embed(t / 1000 if told == "fraction" else 0 * t, c)
    report = examine(changed(model, net), items, cases=CASES)
    assert report.diagnosis == "time" and report["clock"].verdict == "not examined"


def test_both_references_are_measured_on_the_same_cases(well):
    """A mean of logarithms against the logarithm of a mean would flatter every network, the more the more cases."""
    fit = well.fits[0]
    for name, theirs in (("linear", fit), ("alone", fit.by_itself())):
        seen = well.cases.rows % 2 == 1  # tested on the other half
        mine = well.cases.errors(theirs.v(well.cases.x_t, well.cases.acp.flatten()))
        assert_close(getattr(well, name)[seen], mine[seen])
    assert_close(fit.by_itself().variance, fit.variance)
    assert_close(fit.by_itself().mse(well.cases.acp.flatten()), fit.variance / (well.cases.acp.flatten() * fit.variance + 1 - well.cases.acp.flatten()))


@pytest.mark.parametrize("mine, above, lost", [(0.5, False, False), (0.6, True, False), (0.8, True, True), (0.4, False, False)])
def test_more_than_half_of_the_lead_is_what_counts_as_lost(mine, above, lost):
    """Better errors of 0.5 lead 1.0 by a factor of 2: half of that, in logarithms, is 0.71."""
    noise = torch.linspace(0.9, 1.1, 100).double()
    factor, found = doctor.lost_lead(SimpleNamespace(linear=noise), mine * noise.flip(0), 0.5 * noise)
    assert (factor.above, found) == (above, lost)


def test_a_report_comes_back_from_json_and_is_found_by_name():
    report = Report((Finding("a", "1", "2", "ok"), Finding("b", "3", "4", "sick", "do it", True)), {"t": [1, 2]})
    again = Report.from_dict(json.loads(json.dumps(report.to_dict())))
    assert again == report and again["b"].blocks and str(again) == str(report)
    with pytest.raises(ValueError, match="findings: got 'a' 2 times, expected each name once"):
        Report((Finding("a", "1", "2", "ok"), Finding("a", "3", "4", "sick")), {})


def test_curves_that_are_not_there_are_named():
    with pytest.raises(ValueError, match="curve: got none, expected one of a loss that was measured$"):
        Report((Finding("a", "1", "2", "ok"),), {}).plot()
    with pytest.raises(ValueError, match="curves: got none, expected at least one"):
        draw_curves({})
    with pytest.raises(ValueError, match=r"curves: got 'x' without \['network', 'high'\], expected t, network, "):
        draw_curves({"x": {key: [1.0] for key in ("t", "linear", "alone", "factor", "low")}})


def test_what_no_interval_can_be_made_of_is_refused():
    for these, those, message in ((torch.rand(5), torch.rand(5, 1), r"those: got shape \(5, 1\)"), (torch.rand(5), torch.rand(4), r"those: got shape \(4,\)"),
                                  (torch.rand(5, 1), 1.0, "these: got shape"), (torch.rand(1), 1.0, "these: got 1 cases, expected at least 2")):
        with pytest.raises(ValueError, match=message):
            paired_factor(these, those)
    assert str(paired_factor(torch.full((4,), 2.0), 1.0)) == str(paired_factor(torch.full((4,), 2.0), torch.tensor(1.0))) == "x 2 (2 to 2)"


@pytest.mark.parametrize("x, message", [(torch.zeros(0, 4), "got 0 rows"), (torch.randn(5), r"got shape \(5,\)"),
                                        (torch.tensor([[1.0, 2.0], [float("nan"), float("inf")], [0.0, 1.0]]), "with 2 numbers that are not finite")])
def test_rows_that_no_covariance_can_be_had_of(x, message):
    with pytest.raises(ValueError, match=message):
        fit_linear(x)


def test_cases_and_answers_are_as_many_as_asked_for():
    schedule = make_schedule()
    for latents, m in ((torch.zeros(0, 3, 2, 2), 64), (torch.zeros(3, 3, 2, 2), 0), (torch.zeros(3, 3, 2, 2), -1)):
        with pytest.raises(ValueError, match=f"got {m} cases of {len(latents)} latents, expected at least one of each"):
            make_cases(latents, schedule, m)
    cases = make_cases(torch.randn(8, 3, 2, 2), schedule, 64)
    with pytest.raises(ValueError, match=r"answers: got shape \(1, 3, 2, 2\), expected \(64, 3, 2, 2\)"):
        cases.errors(cases.eps[:1], "eps")  # one answer would be compared with every case


def test_items_that_do_not_fit_together_are_named(model, items):
    with pytest.raises(ValueError, match="got items with label and a batch_size of 64, expected an image"):
        Patient(model, {"label": items["label"]})
    with pytest.raises(ValueError, match="and a batch_size of 0, expected an image, and at least 1"):
        Patient(model, items, batch_size=0)
    with pytest.raises(ValueError, match=f"data: got 7 of label for {len(items['image'])} pictures, expected one for each"):
        Patient(model, {**items, "label": items["label"][:7]})


def test_odd_papers_are_not_a_crash(tmp_path):
    with pytest.raises(ValueError, match="run: got .*, expected the folder of a training run"):
        checkup.open_run(tmp_path)
    for said in ("{}", "[]", '{"task": {}}'):
        (tmp_path / "run.json").write_text(said)
        with pytest.raises(ValueError, match="run: got a run of None in"):
            checkup.open_run(tmp_path)
    (tmp_path / "log.jsonl").write_bytes(b'5\nnull\n["loss"]\n\xff\xfe\n{"step": 2, "loss": 1.0}\n')
    assert checkup.read_log(tmp_path) == [{"step": 2, "loss": 1.0}]
    found = checkup.see_rate([{"step": 1, "loss": 1.0, "lr": 0.1}], {"bias": torch.ones(3)})
    assert found.verdict == "not examined" and found.advice == "no matrix is among the weights"
