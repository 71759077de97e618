"""core: configs, checks, seeds, safe files, verdicts."""
import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch

from ldm_edu import core


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
