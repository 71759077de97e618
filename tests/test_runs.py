"""What surrounds a training loop: what a folder's run says of itself, and what faults advise."""
from types import SimpleNamespace

import pytest
import torch

from ldm_edu.core import write_json
from ldm_edu.runs import NonFiniteLoss, OutOfMemory, check_folder, explain_out_of_memory
from ldm_edu.training import TrainConfig


def identity(steps: int = 120, **changes) -> dict:
    """What a run of so many steps is."""
    return {"task": {"task": "toy"}, "dataset": {"items": 8, "fingerprint": "a"} | changes, "config": TrainConfig(steps=steps)}


@pytest.fixture
def folder(tmp_path):
    """A folder whose run has done 120 steps."""
    write_json(tmp_path / "run.json", {"task": {"task": "toy"}, "dataset": {"items": 8, "fingerprint": "a"}, "config": TrainConfig(steps=120).to_dict()})
    for step in (60, 120):
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    return tmp_path


def test_a_run_is_not_asked_for_fewer_steps_than_are_done(folder):
    """Its card would say 60 of a model that was trained for 120."""
    for steps in (120, 121):
        check_folder(folder, identity(steps), True, ("steps",))
    with pytest.raises(ValueError, match="steps: got 60 for .*, where 120 are done already; expected at least 120, or another folder"):
        check_folder(folder, identity(60), True, ("steps",))
    (folder / "checkpoints" / "step-00000120").rmdir()
    check_folder(folder, identity(60), True, ("steps",))


def test_other_pictures_of_the_same_number_are_told_in_words(folder):
    words = "have files been changed, renamed or copied since"
    with pytest.raises(ValueError, match=f"dataset.fingerprint: 'a' there, 'b' here.*{words}"):
        check_folder(folder, identity(fingerprint="b"), True, ("steps",))
    with pytest.raises(ValueError, match="dataset.items: 8 there, 9 here") as caught:
        check_folder(folder, identity(fingerprint="b", items=9), True, ("steps",))
    assert words not in str(caught.value), "that there are more says enough"


def test_advice_can_be_followed():
    """Another learning rate, precision or batch is another run, which this folder refuses; another accumulation is not."""
    told = str(NonFiniteLoss(7, float("nan"), 1.0, [1, 2], None))
    assert "start again in another folder, with a lower lr or a precision of more range" in told
    small, words = SimpleNamespace(accumulation=2), "Raise accumulation from 2 to 4 .*the run resumes.* Or start again in another folder, with precision='bf16'"
    with pytest.raises(OutOfMemory, match=words), explain_out_of_memory(small, 3, 64, torch.device("cpu")):
        raise torch.OutOfMemoryError("no room")
