"""The benchmark on a CUDA device: contenders agree in float32 and round in half precision, and what is timed gives one answer."""
import pytest
import torch

from ldm_edu.bench import compare_speed, peak_memory, product_rate
from ldm_edu.contenders import WORKLOADS, Setting, agreement, contend, settings_of

pytest.importorskip("diffusers", reason="needs diffusers, which `make test` installs")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
EAGER = ("diffusers+fp32", "ldm_edu+fp32", "ldm_edu+fp32+channels-last", "ldm_edu+tf32", "diffusers+autocast+channels-last", "ldm_edu+autocast+channels-last",
         "diffusers+bf16", "ldm_edu+bf16", "ldm_edu+bf16+channels-last", "ldm_edu+bf16+math")


@pytest.mark.parametrize(("name", "what"), [("S16", "train"), ("M", "sample"), ("AEf4", "encode"), ("AEf4", "decode")])
def test_contenders_agree_in_float32_and_round_in_half_precision(name, what):
    gaps = agreement(contend([Setting.parse(text) for text in EAGER], WORKLOADS[name], what, "cuda"))
    print("\n".join(f"{name} {what} {setting}: {found}" for setting, found in gaps.items()))
    assert max(found["float32"] for found in gaps.values()) <= 1e-4
    assert all(1e-4 < found["own"] < 0.1 for setting, found in gaps.items() if "bf16" in setting or "autocast" in setting)


@pytest.mark.parametrize("what", ["train", "sample"])
def test_the_ready_set_of_a_gpu_runs(what):
    settings = [s for s in settings_of("gpu", what) if not s.compile] + ([Setting(precision="bf16", **{field: True}) for field in ("keep_context", "share_start")] if what == "sample" else [])
    result = compare_speed("S8", what, settings, "cuda", rounds=3, batch=4, steps=3)
    assert all(row["peak_mib"] > 0 and 0 <= row["share_of_matrix_rate"] < 1 for row in result["rows"])
    assert max(result["result_difference"].values()) < 0.2


def test_peak_memory_sees_what_a_job_needs_and_frees():
    assert peak_memory(lambda: torch.empty(64 * 2**20, dtype=torch.uint8, device="cuda"), "cuda") == pytest.approx(64, abs=2)
    assert product_rate("cuda", "bf16") > product_rate("cuda", "fp32")
