"""Every lesson runs from top to bottom, and every exercise's stub fails its check while its solution passes."""
import os
import re

import lesson_measures as lm
import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

NOTEBOOKS = lm.LESSONS + lm.SUPPORT


def run(path):
    """Execute a notebook in a fresh kernel, from its own folder, and return it."""
    nb = nbformat.read(path, as_version=4)
    client = NotebookClient(nb, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(ROOT / "nbs")}})
    client.execute(env={**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline"})
    return nb


def verdict(cell) -> str:
    """What the last line of an exercise or solution cell displayed."""
    shown = [o["data"]["text/plain"] for o in cell.outputs if o.output_type == "execute_result"]
    assert shown, f"the cell shows no verdict:\n{cell.source}"
    return shown[-1]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_lesson_runs_and_its_exercises_are_sound(path):
    nb = run(path)
    code = [c for c in nb.cells if c.cell_type == "code" and c.source.strip()]
    assert all(c.execution_count for c in code), "a cell was not run"
    noise = {c.id: o.text for c in code for o in c.outputs if o.get("name") == "stderr"}
    assert not noise, f"a student sees warnings or logs: {noise}"
    stubs = [c for c in code if "exercise" in c.metadata.get("tags", [])]
    solutions = [c for c in code if "solution" in c.metadata.get("tags", [])]
    assert len(stubs) == len(solutions)
    headings = re.findall(r"^### Exercise", "\n".join(c.source for c in nb.cells if c.cell_type == "markdown"), re.M)
    assert len(headings) == len(stubs), "every exercise has a card, a stub and a solution"
    for cell in stubs:
        said = verdict(cell)
        assert said.startswith("Not yet: ") and "your code raised" not in said, said
    for cell in solutions:
        assert verdict(cell).startswith("Correct: "), verdict(cell)
