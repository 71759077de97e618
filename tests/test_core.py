"""core: configs, checks, seeds, safe files, verdicts."""
import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from ldm_edu import core
from ldm_edu.data import Scenes


@dataclasses.dataclass(frozen=True)
class Inner(core.Config):
    widths: tuple[int, ...] = (1, 2)


@dataclasses.dataclass(frozen=True)
class Outer(core.Config):
    inner: Inner = dataclasses.field(default_factory=Inner)
    name: str = "a"
    maybe: tuple[int, int] | None = None


def test_config_round_trip_through_json():
    config = Outer(Inner((3, 4)), "b", (5, 6))
    assert Outer.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_config_refuses_unknown_keys_and_lists_known_ones():
    with pytest.raises(ValueError, match="unknown wdith.*name"):
        Outer.from_dict({"wdith": 3})
    with pytest.raises(ValueError, match="unknown.*widths"):
        Outer.from_dict({"inner": {"width": (1,)}})
    with pytest.raises(ValueError, match="expected a mapping"):
        Outer.from_dict([1])
    with pytest.raises(ValueError, match="unknown nam"):
        Outer().replace(nam="x")
    assert Outer().replace(name="x").name == "x"


def test_checks_say_got_and_expected():
    with pytest.raises(ValueError, match="'dim'.*'ddim', 'ddpm'.*did you mean 'ddim'"):
        core.check_choice("sampler", "dim", ["ddim", "ddpm"])
    with pytest.raises(ValueError, match=r"\(2, 3\).*b 4"):
        core.check_shape("x", torch.zeros(2, 3), "b 4")
    with pytest.raises(ValueError, match="b=5"):
        core.check_shape("x", torch.zeros(2, 3), "b c", b=5)
    with pytest.raises(TypeError, match="list"):
        core.check_shape("x", [1], "b")
    with pytest.raises(ValueError, match=r"expected \[-1, 1\]"):
        core.check_images(torch.full((1, 3, 2, 2), 255.0))
    with pytest.raises(ValueError):
        core.check_images(torch.full((1, 3, 2, 2), float("nan")))
    with pytest.raises(TypeError, match="uint8"):
        core.check_images(torch.zeros(1, 3, 2, 2, dtype=torch.uint8))


def test_profiles(monkeypatch):
    monkeypatch.setattr(core, "_current", None)
    monkeypatch.setenv("LDM_EDU_PROFILE", "gpu")
    assert core.profile().name == "gpu" and core.profile().steps(10) == 100
    assert core.use_profile("ci") is core.profile() and core.profile().samples(1) == 2
    monkeypatch.setattr(core, "_current", None)
    monkeypatch.setenv("LDM_EDU_PROFILE", "huge")
    with pytest.raises(ValueError, match="ci.*cpu.*gpu.*paper"):
        core.profile()


def test_seeds_do_not_depend_on_the_process():
    code = "from ldm_edu.core import derive_seed; print(derive_seed(1, 'a', 2))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                           env={**os.environ, "PYTHONHASHSEED": "7"}).stdout
    assert int(other) == core.derive_seed(1, "a", 2)
    seeds = [core.derive_seed(i, j) for i in range(40) for j in range(40)]
    assert len(set(seeds)) == 1600 and all(0 <= s < 2**63 for s in seeds)
    assert core.derive_seed("1") != core.derive_seed(1) and core.derive_seed(1, 23) != core.derive_seed(12, 3)


def test_noise_of_an_image_does_not_depend_on_its_batch():
    alone = core.randn((1, 2, 3), core.make_generators(12, 1))
    batch = core.randn((4, 2, 3), core.make_generators(10, 4))
    torch.testing.assert_close(batch[2:3], alone, rtol=0, atol=0)
    assert core.randn((2, 2), torch.Generator().manual_seed(0), dtype=torch.float64).dtype == torch.float64
    with pytest.raises(ValueError, match="got 2 generators, expected 3"):
        core.randn((3, 1), core.make_generators(0, 2))
    with pytest.raises(ValueError, match="got 2 seeds, expected 3"):
        core.make_generators([1, 2], 3)


@pytest.mark.parametrize("seed", [1.5, "42", b"4", None, torch.tensor(1.0), [0, 1.0, 2], torch.zeros(3, 1, dtype=torch.int64)])
def test_seeds_that_are_no_integers_are_refused(seed):
    with pytest.raises(TypeError, match="(?s)seed: got .*expected an integer"):
        core.make_generators(seed, 3)


def test_seeds_may_be_numbers_of_numpy_and_torch():
    noise = core.randn((3, 2), core.make_generators(7, 3))
    for seed in (np.int64(7), torch.tensor(7), [7, np.int32(8), torch.tensor(9)], np.arange(7, 10), torch.arange(7, 10), range(7, 10)):
        assert torch.equal(core.randn((3, 2), core.make_generators(seed, 3)), noise)


def test_two_seeds_that_the_generator_takes_for_one_are_refused():
    with pytest.raises(ValueError, match="seed: got 4294967301, expected 0 to 4294967295.*the picture of 5 "):
        core.check_seeds(5 + 2**32, 1)
    with pytest.raises(ValueError, match="got -1"):
        core.check_seeds(-1, 2)
    with pytest.raises(ValueError, match="got 4294967296"):
        core.check_seeds(2**32 - 1, 2)
    assert core.check_seeds(2**32 - 1, 1) == [2**32 - 1] and core.check_seeds([3, 1], 2) == [3, 1] and core.check_seeds(3, 2) == [3, 4]
    with pytest.raises(ValueError, match="got 2 seeds, expected 3"):
        core.check_seeds([1, 2], 3)


@pytest.mark.parametrize("value, least, most, expected", [
    ("2", 1, None, "an integer of at least 1"), (True, None, None, "an integer"), (2.0, 1, 5, r"an integer in 1 \.\.\. 5"), (0, 1, 5, "1"), (6, 1, 5, "5"),
    (torch.tensor(2.0), None, None, "an integer"), (torch.tensor([1, 2]), None, None, "an integer"), (None, None, None, "an integer")])
def test_whole_numbers_that_are_none_are_refused(value, least, most, expected):
    with pytest.raises(ValueError, match=f"(?s)steps: got .*, expected {expected}" if "integer" in expected else f"got {value}, .*{expected}"):
        core.check_whole("steps", value, least, most)


@pytest.mark.parametrize("value", ["3", b"3", None, [1.0, 2.0], float("nan"), float("inf"), torch.ones(2)])
def test_numbers_that_are_none_are_refused(value):
    with pytest.raises(ValueError, match="(?s)scale: got .*, expected a finite number"):
        core.check_number("scale", value)


def test_numbers_of_numpy_and_torch_become_plain():
    for value in (np.int64(2), torch.tensor(2), 2):
        assert core.check_whole("steps", value, 1, 2) == 2 and type(core.check_whole("steps", value)) is int
    for value in (np.float32(0.5), torch.tensor(0.5), 0.5):
        assert core.check_number("scale", value) == 0.5 and type(core.check_number("scale", value)) is float


@pytest.mark.parametrize("counts, n", [([50] * 4, 8), ([50] * 4, 50), ([900, 50, 50], 40), ([7, 1, 1, 91], 99), ([1000], 3)])
def test_rows_for_all_come_from_every_class(counts, n):
    labels = np.repeat(np.arange(len(counts)), counts)
    rows = core.spread_rows(labels, n)
    assert rows == sorted(set(rows)) and len(rows) == n and 0 <= rows[0] and rows[-1] < len(labels) and rows == core.spread_rows(labels, n)
    shares = np.bincount(labels[rows], minlength=len(counts)) - n * np.array(counts) / len(labels)
    assert np.abs(shares).max() <= 2, "each class in proportion, to within one row at each of its ends"


@pytest.mark.parametrize("period", [2, 3, 5, 10])
def test_rows_for_all_hide_no_period(period):
    """Two views of every object, in turn: evenly spaced rows might show one of them only."""
    found = np.bincount(np.array(core.spread_rows(range(6000), 600)) % period, minlength=period)
    assert (np.abs(found - 600 / period) < 4 * (600 / period) ** 0.5).all()


def test_few_rows_are_all_and_scenes_are_in_no_order():
    class View:
        def __init__(self, dataset):
            self.dataset = dataset

        def __len__(self):
            return len(self.dataset)

    assert core.spread_rows(range(5), 5) == core.spread_rows(range(5), 9) == list(range(5)) and core.spread_rows(range(5), 0) == []
    scenes = Scenes(16, n=100)
    assert core.spread_rows(scenes, 7) == core.spread_rows(View(View(scenes)), 7) == list(range(7))
    assert core.spread_rows(View(range(100)), 7) == core.spread_rows(range(100), 7) != list(range(7))


def test_equal_choices_make_equal_configs():
    @dataclasses.dataclass(frozen=True)
    class Choice(core.Config):
        widths: tuple[int, ...] = (1, 2)
        extra: tuple[int, ...] | None = None
        rate: float = 0.5

        def __post_init__(self):
            self.settle()

    for same in (Choice([1, 2]), Choice([np.int64(1), torch.tensor(2)]), Choice(rate=np.float64(0.5))):
        assert same == Choice() and hash(same) == hash(Choice()) and json.dumps(same.to_dict()) == json.dumps(Choice().to_dict())
    assert Choice(extra=[3]).extra == (3,)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_seed_means_the_same_noise_in_every_precision(dtype):
    single = core.randn((2, 3), core.make_generators(5, 2))
    torch.testing.assert_close(core.randn((2, 3), core.make_generators(5, 2), dtype=dtype), single.to(dtype), rtol=0, atol=0)
    one = torch.Generator().manual_seed(5)
    torch.testing.assert_close(core.randn((2, 3), one, dtype=dtype), core.randn((2, 3), one.manual_seed(5)).to(dtype), rtol=0, atol=0)


def test_files_are_whole_or_untouched(tmp_path):
    path = core.write_json(tmp_path / "deep" / "a.json", {"a": 1})
    assert core.read_json(path) == {"a": 1}
    with pytest.raises(RuntimeError, match="half"), core.atomic_path(path) as part:
        part.write_text("half")
        raise RuntimeError("half")
    assert core.read_json(path) == {"a": 1} and [p.name for p in path.parent.iterdir()] == ["a.json"]
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match="bad.json"):
        core.read_json(tmp_path / "bad.json")


def test_attempt_tells_failures_apart():
    def check(f):
        if f(2) != 4:
            raise AssertionError("2 should give 4")

    def wrong(x):
        return x

    def stub(x):
        raise NotImplementedError("write me")

    def broken(x):
        return undefined  # noqa: F821

    assert core.attempt(check, lambda x: x * x).passed
    assert repr(core.attempt(check, wrong)) == "Not yet: 2 should give 4"
    assert core.attempt(check, stub).cause == "NotImplementedError"
    assert "your code raised NameError" in core.attempt(check, broken).message
