"""Several processes on CUDA devices: a sharded run is the plain one, and hands its checkpoints on to it."""
import pytest
import torch
from processes_toy import launch, losses_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
ON_CUDA = {"ACCELERATE_USE_CPU": "false"}


def job(out: str, steps: int = 12, **options) -> dict:
    """A tiny text model's training, alike whoever does it."""
    return {"task": "text", "out": out, "options": {"steps": steps, **options}}


def near(got: list[float], expected: list[float], precision: str) -> None:
    """Losses agree as far as sums on a GPU do: TF32 products in fp32, roundings of half precision otherwise."""
    assert got == pytest.approx(expected, rel=1e-2 if precision == "fp32" else 5e-2)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_sharded_run_of_one_process_is_the_plain_one_and_goes_on_as_it(tmp_path, precision):
    """One process shares with nobody, but its parameters, gradients and moments pass through all of the sharding."""
    code, said, told = launch(tmp_path, [job("plain", precision=precision), job("sharded", precision=precision, sharding="full"),
                                         job("handed", 6, precision=precision, sharding="full"), job("handed", precision=precision)],
                              processes=1, env=ON_CUDA)
    assert code == 0, said[-3000:]
    assert told[1][0]["hollow"] == 0 and told[1][0]["weights"] == told[0][0]["weights"]
    for run in ("sharded", "handed"):
        near(losses_of(tmp_path / run), losses_of(tmp_path / "plain"), precision)


def test_a_sharded_run_compiles(tmp_path):
    code, said, _ = launch(tmp_path, [job("plain"), job("compiled", sharding="full", compile=True)], processes=1, env=ON_CUDA)
    assert code == 0, said[-3000:]
    near(losses_of(tmp_path / "compiled"), losses_of(tmp_path / "plain"), "fp32")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_devices_share_out_what_one_holds(tmp_path, precision):
    code, said, _ = launch(tmp_path, [job("plain", precision=precision)], processes=1, env=ON_CUDA)
    assert code == 0, said[-3000:]
    code, said, told = launch(tmp_path, [job("ddp", precision=precision), job("sharded", precision=precision, sharding="full")], env=ON_CUDA)
    assert code == 0, said[-3000:]
    for rank in range(2):
        assert told[1][rank]["weights"] == pytest.approx(told[0][rank]["weights"] / 2, rel=0.02)
    for run in ("ddp", "sharded"):
        near(losses_of(tmp_path / run), losses_of(tmp_path / "plain"), precision)
