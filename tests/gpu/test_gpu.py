"""The library on a CUDA device: the same numbers as on the CPU, trainings that fall and resume, what memory switches save."""
import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from ldm_edu.autoencoder import AutoencoderConfig
from ldm_edu.channels import channels_last, copies_on_the_way_back
from ldm_edu.data import Scenes, make_prompts
from ldm_edu.features import scenes_extractor
from ldm_edu.grader import grade
from ldm_edu.inpainting import with_masks
from ldm_edu.ldm import load
from ldm_edu.losses import AdversarialConfig
from ldm_edu.metrics import psnr
from ldm_edu.quantize import make_first_stage
from ldm_edu.recipes import DiffusionRecipe, FirstStageRecipe, train_autoencoder, train_diffusion
from ldm_edu.runs import fetch_batch
from ldm_edu.scaling import for_sampling
from ldm_edu.tiling import tiled_decode
from ldm_edu.training import RowRandom, TrainConfig
from ldm_edu.unet import UNet, UNetConfig, build_unet

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
QUICK = TrainConfig(steps=30, batch_size=16, lr=2e-3, warmup_steps=5, save_every=15, validate_every=10, log_every=5)
STAGE = AutoencoderConfig(4, 8, (1, 2, 2), 1, mid_attention=False, num_groups=4)


@pytest.fixture(autouse=True)
def exact_products():
    """Float32 arithmetic in float32: no TF32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def random_weights(module):
    """Random values in place of the zeros that branches start from."""
    with torch.no_grad():
        for p in module.parameters():
            if not p.any():
                p.normal_(0, 0.05)
    return module


UNETS = {
    "text": UNetConfig(4, 4, 64, (1, 2), 1, (1, 2), heads=4, context_dim=32),
    "class": UNetConfig(4, 4, 64, (1, 2), 1, (2,), head_dim=32, c_dim=16, use_scale_shift_norm=True),
    "updown": UNetConfig(7, 4, 64, (1, 2), 1, (2,), head_dim=32, resblock_updown=True),
}


def unet_inputs(config, b=3):
    """Random inputs that fit a config, with padding in the context."""
    g = torch.Generator().manual_seed(0)
    x, t = torch.randn(b, config.in_channels, 16, 16, generator=g), torch.tensor([3, 500, 999])
    context = torch.randn(b, 5, config.context_dim, generator=g) if config.context_dim else None
    mask = torch.tensor([[True] * 5, [True] * 2 + [False] * 3, [False] * 5]) if config.context_dim else None
    c = torch.randn(b, config.c_dim, generator=g) if config.c_dim else None
    return [x, t, context, mask, c]


@pytest.mark.parametrize("name", UNETS)
def test_the_unet_predicts_what_it_predicts_on_the_cpu(name):
    torch.manual_seed(0)
    net, given = random_weights(UNet(UNETS[name])).eval(), unet_inputs(UNETS[name])
    moved = [None if v is None else v.cuda() for v in given]
    with torch.no_grad():
        expected = net(*given)
        net.cuda()
        assert_close(net(*moved).cpu(), expected, atol=1e-4, rtol=1e-4)
        with torch.autocast("cuda", torch.bfloat16):
            half = net(*moved).float().cpu()
    assert (half - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("kind", [{}, {"double_z": False, "codes": 64}])
def test_a_first_stage_codes_as_on_the_cpu_by_tiles_too(kind):
    torch.manual_seed(0)
    stage, x = random_weights(make_first_stage(STAGE.replace(**kind))).eval(), torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        z = stage.encode(x).mode()
        exact = z if stage.config.double_z else stage.quantize(z).z  # codes themselves: nothing is near a tie between two
        y, tiled = stage.decode(exact), tiled_decode(stage, exact, tile=8, overlap=4)
        stage.cuda()
        assert_close(stage.encode(x.cuda()).mode().cpu(), z, atol=1e-4, rtol=1e-4)
        assert_close(stage.decode(exact.cuda()).cpu(), y, atol=1e-4, rtol=1e-4)
        assert_close(tiled_decode(stage, exact.cuda(), tile=8, overlap=4).cpu(), tiled, atol=1e-4, rtol=1e-4)


SHIPPED = ["scenes-text", "scenes-class", "scenes-layout", "scenes-semantic", "scenes-superres", "scenes-inpaint"]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_model_draws_the_pictures_that_it_draws_on_the_cpu(name):
    model = load(name)
    keys = model.net.conditioner.keys
    fields = ("image", *(key for key in keys if key not in ("image", "mask")))
    items = fetch_batch(with_masks(Scenes(32, n=4, split="validation", objects=(1, 1), fields=fields)), range(4))
    batch = {key: items[key] for key in keys}
    expected = model.sample(batch=batch, steps=8, seed=3)
    drawn = model.to("cuda").sample(batch=batch, steps=8, seed=3)
    assert drawn.device.type == "cpu" and psnr(drawn, expected).min() > 40


def test_what_the_gpu_draws_passes_the_grader_and_has_features():
    model, prompts = load("scenes-text", "cuda"), make_prompts(64, seed=5, kind="single")
    images = model.sample(prompts, steps=20, seed=1)
    assert grade(images, prompts).summary()["pair"]["rate"] > 0.9
    extract = scenes_extractor()
    assert_close(extract(images.cuda()).cpu(), extract(images).cpu(), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_both_stages_train_and_go_on_where_they_stopped(tmp_path, precision):
    data = Scenes(16, n=256, objects=(1, 1), fields=("image", "caption"))
    config = QUICK.replace(precision=precision)
    stage = train_autoencoder(data, FirstStageRecipe(STAGE, config), tmp_path / "stage", progress=False)
    recipe = DiffusionRecipe("text-mini", "text", train=config)
    losses = []
    note = lambda report: losses.append(report.loss)
    train_diffusion(data, stage, recipe, tmp_path / "model", progress=False, callbacks=[note])
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    again = []
    for folder in (tmp_path / "model" / "checkpoints").glob("step-00000030"):
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    model = train_diffusion(data, stage, recipe, tmp_path / "model", progress=False, callbacks=[lambda report: again.append(report.loss)])
    assert len(again) == 15 and again == pytest.approx(losses[15:], rel=0.05), "on a GPU sums round differently from run to run"
    assert next(model.parameters()).is_cuda and model.sample("a red circle", n=2, steps=3).isfinite().all()


@pytest.mark.parametrize(("unet", "condition", "precision"), [("text-mini", "text", "fp32"), ("text-mini", "text", "bf16"), ("tiny", "none", "bf16")])  # in half precision with channels last
def test_the_compiled_network_trains_as_the_plain_one(tmp_path, unet, condition, precision):
    data = Scenes(16, n=64, objects=(1, 1), fields=("image", "caption"))
    stage = make_first_stage(STAGE).cuda().eval()
    runs = {}
    for compiled in (False, True):
        seen = runs[compiled] = []
        recipe = DiffusionRecipe(unet, condition, train=QUICK.replace(steps=6, compile=compiled, precision=precision))
        train_diffusion(data, stage, recipe, tmp_path / str(compiled), progress=False, callbacks=[lambda report, seen=seen: seen.append(report.loss)])
    assert runs[True] == pytest.approx(runs[False], rel=1e-2)


def test_an_adversarial_first_stage_trains(tmp_path):
    data = Scenes(32, n=64, objects=(1, 1), fields=("image",))
    recipe = FirstStageRecipe(STAGE, QUICK.replace(steps=12, batch_size=4), AdversarialConfig(disc_start=4))
    stage = train_autoencoder(data, recipe, tmp_path, progress=False)
    assert all(p.isfinite().all() for p in stage.parameters())


def peak_of(net, given) -> tuple[float, torch.Tensor]:
    """Peak MiB of a forward and backward pass beyond what lay there, and the input convolution's gradient."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    F.mse_loss(net(*given), given[0]).backward()
    gradient = net.conv_in.weight.grad.clone()
    net.zero_grad()
    return (torch.cuda.max_memory_allocated() - before) / 2**20, gradient


def test_checkpointing_saves_memory_and_changes_no_gradient():
    torch.manual_seed(0)
    net = random_weights(build_unet("text-small")).cuda()
    given = [torch.randn(16, 4, 32, 32).cuda(), torch.randint(0, 1000, (16,)).cuda(), torch.randn(16, 7, 256).cuda()]
    peak_of(net, given)  # buffers of the libraries
    plain, gradient = peak_of(net, given)
    net.gradient_checkpointing = True
    saved, same = peak_of(net, given)
    assert saved < 0.7 * plain
    assert_close(same, gradient, atol=1e-4, rtol=1e-2)


def test_channels_last_is_the_same_network():
    torch.manual_seed(0)
    net, given = random_weights(UNet(UNETS["text"])).eval().cuda(), [v if v is None else v.cuda() for v in unet_inputs(UNETS["text"])]
    other = copy.deepcopy(net).to(memory_format=torch.channels_last)
    with torch.no_grad():
        assert_close(other(given[0].contiguous(memory_format=torch.channels_last), *given[1:]), net(*given), atol=1e-4, rtol=1e-4)


def test_compiled_convolutions_copy_nothing_on_their_way_back():
    torch.manual_seed(0)
    net, given = random_weights(UNet(UNETS["text"])).cuda(), [v if v is None else v.cuda() for v in unet_inputs(UNETS["text"])]
    copies = {}
    for name, laid_out in (("plain", copy.deepcopy(net).to(memory_format=torch.channels_last)), ("kept", channels_last(copy.deepcopy(net)))):
        compiled = torch.compile(laid_out)
        for _ in range(2):
            with torch.autocast("cuda", torch.bfloat16), torch.profiler.profile() as seen:
                compiled(given[0].contiguous(memory_format=torch.channels_last), *given[1:]).float().square().mean().backward()
        copies[name] = copies_on_the_way_back(seen.events())
    assert copies["kept"] == 0 < copies["plain"]


@pytest.mark.parametrize("precision, compile, likeness", [("bf16", "", 40), ("fp16", "", 45), ("bf16", "reduce-overhead", 40), ("fp32", "reduce-overhead", 50)])
def test_half_precision_and_cuda_graphs_draw_the_same_pictures(precision, compile, likeness):
    prompts = make_prompts(8, seed=5, kind="single")
    expected = load("scenes-text", "cuda").sample(prompts, steps=8, seed=3)
    quick = for_sampling(load("scenes-text", "cuda"), precision, compile)
    for _ in range(3):  # a graph is recorded at the second call and replayed from the third on
        drawn = quick.sample(prompts, steps=8, seed=3)
    assert drawn.dtype == torch.float32 and psnr(drawn, expected).min() > likeness


def test_what_is_drawn_ahead_is_the_same_on_the_device():
    now, fresh = RowRandom(3, 7, range(4), "cuda"), RowRandom(3, 8, range(4))
    draws = [lambda r: r.normal((3, 2), "noise"), lambda r: r.uniform("t"), lambda r: r.integers(1000, "t")]
    for draw in draws:
        draw(now)
    later = now.ahead()
    for draw in draws:
        drawn = draw(later)
        assert drawn.is_cuda and torch.equal(drawn.cpu(), draw(fresh))


def test_a_training_step_waits_for_the_device_once(tmp_path):
    """For its loss: all that the next step needs from the processor is on its way by then."""
    data, stage = Scenes(16, n=64, objects=(1, 1), fields=("image",)), make_first_stage(STAGE).cuda().eval()
    config, counts = QUICK.replace(steps=12, save_every=100, validate_every=0, log_every=100, precision="bf16"), []
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            train_diffusion(data, stage, DiffusionRecipe("tiny", "none", train=config), tmp_path, progress=False,
                            callbacks=[lambda report: counts.append(sum("synchronizing" in str(w.message) for w in seen))])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert [later - now for now, later in zip(counts[4:-2], counts[5:-1])] == [1] * 6


def test_drawing_waits_for_the_device_as_often_for_many_steps_as_for_few():
    model, waits = load("scenes-text", "cuda"), {}
    model.sample("a red circle", n=2, steps=4)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        for steps in (4, 12):
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                model.sample("a red circle", n=2, steps=steps)
            waits[steps] = sum("synchronizing" in str(w.message) for w in seen)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert 0 < waits[4] == waits[12]
