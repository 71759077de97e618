"""Widgets under a real kernel: moving any control gives another picture, and an error is answered in place."""
import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

PLAYGROUND = """
import ldm_edu as ldm
from ldm_edu.widgets import Playground

playground = Playground(ldm.load("scenes-text"), size=64)
moves = {"prompt": "a blue star", "seed": 7, "steps": 3, "guidance": 1.0, "sampler": "ddpm"}
for name, value in moves.items():
    before = playground.image.value
    getattr(playground, name).value = value
    assert playground.image.value != before, name
    assert not playground.button.disabled and "model.sample" in playground.status.value, playground.status.value
before = playground.image.value
playground.prompt.value = "a red zebra"
assert "zebra" in playground.status.value and playground.image.value == before
playground.prompt.value = ""
assert "empty" in playground.status.value
playground.prompt.value = "a blue star"
playground.button.click()
assert playground.image.value == before
playground
"""
EXPLORER = """
from ldm_edu.widgets import ScheduleExplorer

explorer = ScheduleExplorer()
moves = {"beta_end": 0.05, "T": 200, "zero_snr": True, "name": "cosine"}
for name, value in moves.items():
    before = explorer.image.value
    getattr(explorer, name).value = value
    assert explorer.image.value != before, name
    assert "signal left" in explorer.status.value
assert explorer.beta_end.disabled
explorer
"""


@pytest.mark.parametrize("code", [PLAYGROUND, EXPLORER], ids=["playground", "explorer"])
def test_every_control_changes_the_picture(code):
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    NotebookClient(nb, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(ROOT / "nbs")}}).execute()
    shown = [o for o in nb.cells[0].outputs if o.output_type == "display_data"]
    assert any("application/vnd.jupyter.widget-view+json" in o.data for o in shown), "the widget is displayed as a widget"
