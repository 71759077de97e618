"""Mutation suite: each historical bug, put into a copy of the library, makes one of the ordinary tests fail.

And the machinery itself: it must complain about an edit that changes nothing, a bug that no test notices, and a run that
ended for another reason than a failed assertion.
"""
import re
import subprocess
import sys

import lesson_measures as lm
import mutate
import mutations
import pytest
from conftest import ROOT
from mutate import Mutant, Runner, edit, objection
from mutations import BUGS, MUTATIONS, WAITING, Waiting, forgotten

NAMED = mutations.names()
# a small fault of a light module, a test that catches it, and one that does not
GUIDE = ("guidance.guide", "e_u + scale * (e_c - e_u)", "e_c + scale * (e_c - e_u)")
CATCHES, MISSES = "test_guidance.py::test_guide", "test_guidance.py::test_unknown_convention"


@pytest.fixture(scope="module")
def runner():
    runner = Runner()
    yield runner
    runner.close()


def verdict(runner, edits, *tests) -> str:
    """What speaks against these tests catching these edits; empty when nothing does."""
    with Mutant(edits) as mutant:
        return objection(runner.run(mutant, tests), mutant)


# ---------------------------------------------------------------- the suite


def test_every_chosen_test_passes_on_an_untouched_copy(runner):
    chosen = sorted({test for m in MUTATIONS for test in m.tests})
    with Mutant() as mutant:
        result = runner.run(mutant, chosen, first=False)
    assert result["code"] == 0 and not result["failed"] and not result["skipped"], result["log"][-3000:]
    passed = {test.split("[")[0].removeprefix("tests/") for test in result["passed"]}
    assert passed == set(chosen)
    assert all(path.startswith(str(mutant.folder)) for path in result["loaded"].values()), "the checkout's library was loaded"


@pytest.mark.parametrize("name", NAMED)
def test_bug_is_caught(runner, name):
    m = NAMED[name]
    reason = verdict(runner, [(m.where, m.old, m.new)], *m.tests)
    assert not reason, f"bug {m.bug}, {m.fault} ({m.where}): {reason}"


# ---------------------------------------------------------------- the table


def test_all_bugs_are_injected_or_wait_for_their_module():
    assert sorted(BUGS) == list(range(1, 29))
    assert {m.bug for m in MUTATIONS} | {w.bug for w in WAITING} == set(BUGS)
    edits = [(m.where, m.old, m.new) for m in MUTATIONS]
    assert len(set(edits)) == len(edits) and len({m.fault for m in MUTATIONS}) == len(MUTATIONS)
    assert all(t.startswith("test_") and ".py::test_" in t and "mutations" not in t for m in MUTATIONS for t in m.tests)


def test_no_module_has_arrived_without_its_mutation():
    missing = forgotten(lambda path: (ROOT / path).exists())
    assert not missing, f"{missing}: these modules exist now, so put the bug into MUTATIONS and take it off WAITING"


def test_waiting_ends_when_the_module_appears():
    known = (Waiting(4, "guidance", ("ldm_edu/guidance.py",)), Waiting(4, "losses", ("ldm_edu/losses.py",)))
    assert forgotten(lambda path: False, known) == []
    assert forgotten(lambda path: path == "ldm_edu/guidance.py", known) == [], "it has its mutation"
    assert forgotten(lambda path: True, known) == [known[1]], "a mutation of the same bug in another module does not count"


def test_the_page_shows_the_table():
    cells = {cell["id"]: cell for cell in lm.read(ROOT / "nbs" / "95_known_bugs.ipynb")["cells"]}
    shown = "".join(cells["bug-table"]["outputs"][0]["data"]["text/markdown"])
    assert shown.strip() == mutations.table().strip(), "run nbs/95_known_bugs.ipynb again: its table is not the one of tests/mutations.py"


# ---------------------------------------------------------------- the machinery, broken on purpose


@pytest.mark.parametrize("old, new, message", [
    ("e_u + scale * (e_c - e_u)", "e_u + scale * (e_c - e_u)", "changes nothing"),
    ("return e_u + scale", "return  (e_u) + scale", "changes nothing"),  # other spelling, same program
    ("e_u - scale * (e_c - e_u)", "e_u", "got 0 times"),
    ("scale", "1", "got [2-9] times"),
    ("e_u + scale * (e_c - e_u)", "e_u + scale * (e_c -", "is no Python"),
])
def test_edits_that_prove_nothing_are_refused(old, new, message):
    source = (ROOT / "ldm_edu" / "guidance.py").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        edit(source, "guidance.guide", old, new)
    with pytest.raises(ValueError, match=message), Mutant([("guidance.guide", old, new)]):
        pass


def test_edits_stay_inside_the_definition_they_name():
    source = "def one():\n    return 1\n\n\nclass Two:\n    def get(self):\n        return 1\n\n    def put(self):\n        return 1\n"
    assert edit(source, "m.one", "return 1", "return 2").count("return 2") == 1
    assert edit(source, "m.Two.put", "return 1", "return 2").endswith("def put(self):\n        return 2\n")
    for where in ("m.Two", "m"):
        with pytest.raises(ValueError, match="times"):
            edit(source, where, "return 1", "return 2")
    with pytest.raises(ValueError, match="got 0 definitions of 'three'"):
        edit(source, "m.three", "return 1", "return 2")


def test_a_bug_that_no_test_notices_is_reported(runner):
    assert verdict(runner, [GUIDE], CATCHES) == ""
    assert verdict(runner, [GUIDE], MISSES).startswith("SURVIVED: 1 tests passed")


@pytest.mark.parametrize("edits, tests, message", [
    ([], [CATCHES], "SURVIVED"),
    ([GUIDE], ["test_guidance.py::test_no_such_name"], "pytest ended with 4"),
    ([GUIDE], ["test_guidance.py", "-k", "nothing_is_called_this"], "pytest ended with 5"),
    ([("guidance", "import torch\n", "import torque\n")], [CATCHES], "pytest ended with [24]"),  # no import
    ([(GUIDE[0], GUIDE[1], "e_u + skale")], [CATCHES], "by NameError, expected a failed assertion"),
    ([(GUIDE[0], GUIDE[1], "[].assertion")], [CATCHES], "by AttributeError, expected a failed assertion"),
    ([(GUIDE[0], "return e_u", "assert False\n    return e_u")], [CATCHES], "the assertion that failed is the library's"),
])
def test_other_endings_do_not_count_as_caught(runner, edits, tests, message):
    assert re.search(message, verdict(runner, edits, *tests))


def test_a_failure_without_the_damaged_module_does_not_count(runner):
    """A test may fail for a fault elsewhere: the module named by the mutation must have been loaded from the copy."""
    with Mutant([GUIDE]) as mutant:
        result = runner.run(mutant, [CATCHES])
        assert objection(result, mutant) == ""
        mutant.modules = {"recipes"}
        assert objection(result, mutant) == "the tests did not load the damaged recipes"


def test_a_fresh_process_says_the_same_as_a_forked_one(runner):
    """macOS cannot fork after importing torch: there each request is a process of its own."""
    fresh = Runner(fork=False)
    assert verdict(fresh, [GUIDE], CATCHES) == verdict(runner, [GUIDE], CATCHES) == ""
    survived = verdict(fresh, [GUIDE], MISSES)
    assert survived == verdict(runner, [GUIDE], MISSES) and survived.startswith("SURVIVED")


def test_a_child_that_dies_is_an_error_and_the_next_request_works(runner):
    with Mutant([("guidance", "import torch\n", "import torch\nimport os\nos._exit(3)\n")]) as mutant, pytest.raises(RuntimeError, match="died without an answer"):
        runner.run(mutant, [CATCHES])
    assert verdict(runner, [GUIDE], CATCHES) == ""


def test_children_keep_the_offline_guard_and_lose_coverage(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests" / "offline"))
    monkeypatch.setenv("COV_CORE_SOURCE", "ldm_edu")
    monkeypatch.setenv("PYTEST_ADDOPTS", "-n 2")
    env = mutate.environment()
    assert not [k for k in env if k.startswith(("COV_CORE", "COVERAGE", "PYTEST"))]
    code = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=1)"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "the tests run offline" in done.stderr


def test_looking_at_a_mutant_leaves_this_process_as_it_was():
    import torch

    import ldm_edu.guidance as real

    path, names = list(sys.path), sorted(n for n in sys.modules if n.split(".")[0] == "ldm_edu")
    e_u, e_c = torch.zeros(1), torch.ones(1)
    with mutate.imported([GUIDE]) as damaged:
        from ldm_edu.guidance import guide

        assert guide is not real.guide and damaged.__file__ != real.__file__ and guide(e_u, e_c, 2.0) == 3
        assert {"scenes-text"} <= set(__import__("ldm_edu.ldm", fromlist=["ldm"]).pretrained_names())
    assert sys.modules["ldm_edu.guidance"] is real and real.guide(e_u, e_c, 2.0) == 2
    assert sys.path == path and sorted(n for n in sys.modules if n.split(".")[0] == "ldm_edu") == names
