"""Measure every notebook against the house style; `python tests/lesson_measures.py` prints the table."""
import json
import re
import statistics
import sys
from pathlib import Path

NBS = Path(__file__).resolve().parent.parent / "nbs"
LESSONS = sorted(p for p in NBS.glob("*.ipynb") if p.stem == "index" or p.stem[0] in "012")
SUPPORT = sorted(p for p in NBS.glob("9*.ipynb"))
TEST = re.compile(r"\bassert\b|assert_close|attempt\(|raises\(")


def read(path: Path) -> dict:
    """The notebook's JSON."""
    return json.loads(path.read_text(encoding="utf-8"))


def source(cell: dict) -> str:
    """A cell's text."""
    return "".join(cell["source"])


def code_lines(cell: dict) -> int:
    """Lines of a code cell that are not empty."""
    return sum(1 for line in source(cell).splitlines() if line.strip())


def longest_run(cells: list[dict]) -> int:
    """Most code cells in a row without prose between them."""
    best = run = 0
    for cell in cells:
        run = run + 1 if cell["cell_type"] == "code" else 0
        best = max(best, run)
    return best


def measure(path: Path) -> dict:
    """The house style's measures of one notebook."""
    cells = read(path)["cells"]
    code = [c for c in cells if c["cell_type"] == "code"]
    lines = [code_lines(c) for c in code] or [0]
    words = sum(len(re.sub(r"\$+[^$]*\$+", " x ", source(c)).split()) for c in cells if c["cell_type"] == "markdown")
    figures = sum(any(k.startswith("image/") for k in o.get("data", {})) for c in code for o in c["outputs"])
    share = lambda test: round(100 * sum(map(bool, map(test, code))) / max(1, len(code)))
    return {
        "cells": len(cells), "mean": round(statistics.mean(lines), 1), "p90": sorted(lines)[int(0.9 * len(lines))],
        "max": max(lines), "words/line": round(words / max(1, sum(lines)), 1), "run": longest_run(cells),
        "shown %": share(lambda c: c["outputs"]), "tests %": share(lambda c: TEST.search(source(c))),
        "figures": figures, "exercises": sum("exercise" in c["metadata"].get("tags", []) for c in code),
        "KB": round(path.stat().st_size / 1024),
    }


def table(paths: list[Path]) -> str:
    """One line per notebook."""
    rows = {p.stem: measure(p) for p in paths}
    if not rows:
        return "no notebooks"
    names = list(next(iter(rows.values())))
    width = max(len(stem) for stem in rows)
    lines = [" " * width + "  " + "  ".join(names)]
    lines += [f"{stem:<{width}}  " + "  ".join(f"{row[n]:>{len(n)}}" for n in names) for stem, row in rows.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(table(LESSONS + SUPPORT) + "\n")
