"""The fast gate: what a maintainer would otherwise find out too late."""
import ast
import configparser
import re
import shutil
import subprocess
import sys
from pathlib import Path

import lesson_measures as lm
import pytest
from conftest import ROOT

LIBRARY = ROOT / "ldm_edu"
# Nothing imports upward: a module may import modules of its own level or below, without cycles.
LEVELS = {
    0: "core drawing captions data schedule folders viz checkpoint processes channels runs weight_files shards tar_images latent_shards guards",
    1: "objective attention samplers solvers guidance grader oracle features metrics clip_text findings",
    2: "unet autoencoder quantize tiling losses perceptual conditioning layout superres inpainting windows frozen_text placement evaluation probing",
    3: "ldm training reading editing asking keymaps foreign_configs",
    4: "recipes costs weights contenders examinations doctor",
    5: "demo bench inspection convert scaling checkup",
    6: "cli widgets",
}
LEVEL = {name: level for level, names in LEVELS.items() for name in names.split()}
NOTEBOOKS = lm.LESSONS + lm.SUPPORT


def modules() -> list:
    """The library's modules."""
    return sorted(p for p in LIBRARY.glob("*.py") if p.stem not in ("__init__", "__main__", "_modidx"))


def imports_of(path) -> set[str]:
    """Modules of this package that a module imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            name = node.module or ""
            if node.level == 1 and name:
                found.add(name.split(".")[0])
            elif node.level == 0 and name.startswith("ldm_edu."):
                found.add(name.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("ldm_edu.")}
    return found


def external_imports(path) -> set[str]:
    """Top-level packages that a module imports from elsewhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").split(".")[0])
    return found


def test_every_module_has_a_level():
    assert {p.stem for p in modules()} == set(LEVEL)


@pytest.mark.parametrize("path", modules(), ids=lambda p: p.stem)
def test_imports_point_downward(path):
    upward = {name for name in imports_of(path) if LEVEL[name] > LEVEL[path.stem]}
    assert not upward, f"{path.stem} (level {LEVEL[path.stem]}) imports {upward} from above"


def test_imports_have_no_cycle():
    graph = {p.stem: imports_of(p) for p in modules()}
    while ready := [name for name, needs in graph.items() if not needs & set(graph)]:
        for name in ready:
            del graph[name]
    assert not graph, f"a cycle among {sorted(graph)}"


def test_libraries_stay_in_their_modules():
    where = {"matplotlib": {"viz"}, "ipywidgets": {"widgets"}, "tyro": {"cli"}, "accelerate": {"training"},
             "fastcore": set(), "nbdev": set(), "diffusers": {"contenders"}, "transformers": set(), "huggingface_hub": {"frozen_text"},
             "torchmetrics": {"evaluation"}, "torch_fidelity": {"evaluation"}}
    for path in modules():
        for package, allowed in where.items():
            assert package not in external_imports(path) or path.stem in allowed, f"{path.stem} imports {package}"


def test_requirements_name_what_the_library_imports():
    """What comes along with another requirement today may not tomorrow."""
    said = configparser.ConfigParser()
    said.read(ROOT / "settings.ini")
    named = {re.split("[<>=]", part)[0].replace("-", "_") for part in said["DEFAULT"]["requirements"].split()}
    asked = {"diffusers", "torchmetrics", "torch_fidelity"}  # by who wants them; a sentence says where they are missing
    notebook = {"IPython", "matplotlib_inline"}  # ours only where a notebook runs, which brings them
    imported = {name for path in modules() for name in external_imports(path)} - set(sys.stdlib_module_names) - {"ldm_edu"} - asked - notebook
    assert not {"pillow" if name == "PIL" else name for name in imported} - named


def test_public_names_are_defined_once():
    seen = {}
    for path in modules():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                seen.setdefault(node.name, []).append(path.stem)
    # a loop, a folder of a model and a checkpoint may all be "saved"; these are methods of speech, kept in their modules
    shared = {"save", "evaluate", "export", "train_step", "restore", "sample", "summary"}
    assert not {k: v for k, v in seen.items() if len(v) > 1 and k not in shared}


def test_library_is_what_the_notebooks_export(tmp_path):
    """Export into a copy and compare, both ways: also finds modules whose notebook is gone."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("nbs", "ldm_edu"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in ("settings.ini", "pyproject.toml"):
        shutil.copy(ROOT / name, copy / name)
    for path in (copy / "ldm_edu").glob("*.py"):
        if path.name not in ("__init__.py", "__main__.py"):
            path.unlink()
    subprocess.run([Path(sys.executable).parent / "nbdev_export"], cwd=copy, check=True, capture_output=True)
    got = {p.name: p.read_text(encoding="utf-8") for p in LIBRARY.glob("*.py")}
    expected = {p.name: p.read_text(encoding="utf-8") for p in (copy / "ldm_edu").glob("*.py")}
    assert sorted(got) == sorted(expected), "modules without a notebook, or notebooks without a module: run `make export`"
    differing = [name for name in got if got[name] != expected[name]]
    assert not differing, f"{differing} differ from what the notebooks export: run `make export`"


def test_every_notebook_exports_to_its_own_module():
    targets = {}
    for path in NOTEBOOKS:
        for match in re.findall(r"#\| default_exp (\S+)", path.read_text(encoding="utf-8")):
            targets.setdefault(match.rstrip('\\n",'), []).append(path.name)
    assert not {k: v for k, v in targets.items() if len(v) > 1}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_well_formed(path):
    nb = lm.read(path)
    ids = [c.get("id") for c in nb["cells"]]
    assert (nb["nbformat"], nb["nbformat_minor"]) == (4, 5) and all(ids) and len(set(ids)) == len(ids), "stable cell ids"
    assert "widgets" not in nb["metadata"], "widget state is stored"
    assert path.stat().st_size <= 300 * 1024, f"{path.stat().st_size / 1024:.0f} KB"
    text = path.read_text(encoding="utf-8")
    assert "<<<<<<<" not in text and ">>>>>>>" not in text, "merge markers"
    assert not re.search(r"eval:\s*false|skip_exec|#\|\s*(cuda|slow|net)\b", text), "a cell that CI would not run"
    assert "auto" not in path.stem
    for cell in nb["cells"]:
        if cell["cell_type"] == "code":
            assert all(o["output_type"] != "error" for o in cell["outputs"]), "an error is stored"
            assert cell["execution_count"] is not None or not lm.source(cell).strip(), "a cell was never executed"


def test_no_machine_paths_in_tracked_files():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    pattern = re.compile(r"/(?:home|Users)/\w+|/(?:root)/|/(?:tmp)/(?!$)\w+_|/\w+/\S*/site-packages/|C:\\\\Users")
    bad = []
    for name in files:
        path = ROOT / name
        if path.suffix in (".safetensors", ".png") or not path.is_file():
            continue
        bad += [f"{name}: {m.group(0)}" for m in pattern.finditer(path.read_text(encoding="utf-8", errors="ignore"))][:1]
    assert not bad


def test_doc_stems_are_unique():
    stems = [re.sub(r"^\d+[a-z]?_", "", p.stem) for p in NOTEBOOKS]
    assert len(set(stems)) == len(stems)


@pytest.mark.parametrize("path", [p for p in lm.LESSONS if p.stem != "index"], ids=lambda p: p.stem)
def test_lesson_measures(path):
    """The house style's measures, with a little room: a page may be better for breaking one."""
    m = lm.measure(path)
    assert m["cells"] <= 125 and m["mean"] <= 14 and m["p90"] <= 28 and m["max"] <= 42 and m["run"] <= 4, m
    assert m["words/line"] >= 2.5 and m["shown %"] >= 35 and m["tests %"] >= 15, m
    assert m["figures"] >= 5 and m["exercises"] >= 2, m


def test_import_is_light():
    """`import ldm_edu` costs at most a second beyond `import torch`, and draws in no plotting, widgets or trainer."""
    code = ("import time, sys; import torch; a = time.perf_counter(); import ldm_edu; b = time.perf_counter(); "
            "heavy = [m for m in ('matplotlib', 'ipywidgets', 'accelerate', 'tyro') if m in sys.modules]; "
            "print(b - a); assert not heavy, heavy")
    best = min(float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout) for _ in range(3))
    assert best <= 1.0, f"import ldm_edu took {best:.2f} s beyond torch"
