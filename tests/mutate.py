"""The machinery of the mutation suite: put one fault into a copy of the library and run chosen tests on that copy.

A `Mutant` is a folder with a damaged copy of `ldm_edu`. Its tests run in a child process that finds the copy first on its
path, so neither the checkout nor the process that asks is ever touched. Where forking is safe (Linux) one warm process
imports the heavy libraries once and forks a child for each request; elsewhere each request is a fresh process.
"""
import ast
import contextlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FORK = sys.platform == "linux"  # macOS kills forked processes that go on to use its system libraries
SECONDS = 600  # a child that takes longer hangs
HEAVY = ("numpy", "torch", "PIL.Image", "matplotlib.pyplot", "einops", "safetensors.torch", "tokenizers", "hypothesis.strategies",
         "accelerate", "torchvision", "tqdm.auto", "nbformat", "nbclient", "pytest_timeout")


# ---------------------------------------------------------------- edits
def span(source: str, name: str) -> tuple[int, int]:
    """First and last character of the definition `name` ("ddim", "NoiseSchedule.add_noise") in a module's source."""
    node = ast.parse(source)
    for part in filter(None, name.split(".")):
        inside = [n for n in node.body if getattr(n, "name", None) == part]
        if len(inside) != 1:
            raise ValueError(f"got {len(inside)} definitions of {name!r}, expected 1: did it move? Update tests/mutations.py")
        node = inside[0]
    if isinstance(node, ast.Module):
        return 0, len(source)
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    return starts[node.lineno - 1], starts[node.end_lineno]


def edit(source: str, where: str, old: str, new: str) -> str:
    """Replace the one occurrence of `old` inside the definition `where` = "module" or "module.name" of `source`.

    Raises ValueError when `old` occurs there never or twice, and when the result is no Python or the same program as before.
    """
    begin, end = span(source, where.partition(".")[2])
    count = source[begin:end].count(old)
    if count != 1:
        raise ValueError(f"{where}: got {count} times {old!r}, expected once: the code has changed, update tests/mutations.py")
    changed = source[:begin] + source[begin:end].replace(old, new) + source[end:]
    try:
        same = ast.dump(ast.parse(changed)) == ast.dump(ast.parse(source))
    except SyntaxError as err:
        raise ValueError(f"{where}: {new!r} is no Python ({err})") from err
    if same:
        raise ValueError(f"{where}: {old!r} -> {new!r} changes nothing")
    return changed


class Mutant:
    """A folder with a copy of the library, its shipped weights beside it, and the edits made: a context manager."""

    def __init__(self, edits: Sequence[tuple[str, str, str]] = ()):
        self.edits, self.modules = tuple(edits), {where.split(".")[0] for where, _, _ in edits}

    def __enter__(self) -> "Mutant":
        self._folder = tempfile.TemporaryDirectory(prefix="mutant-")
        self.folder = Path(self._folder.name).resolve()
        skip = shutil.ignore_patterns("__pycache__", "pretrained")
        shutil.copytree(ROOT / "ldm_edu", self.folder / "ldm_edu", ignore=skip)
        (self.folder / "data").symlink_to(ROOT / "data", target_is_directory=True)
        try:
            for where, old, new in self.edits:
                path = self.folder / "ldm_edu" / f"{where.split('.')[0]}.py"
                path.write_text(edit(path.read_text(encoding="utf-8"), where, old, new), encoding="utf-8")
        except BaseException:
            self._folder.cleanup()
            raise
        return self

    def __exit__(self, *_) -> None:
        self._folder.cleanup()


@contextlib.contextmanager
def imported(edits: Sequence[tuple[str, str, str]]) -> Iterator:
    """The damaged library as `ldm_edu` in this process, for a look at what it does; afterwards the real one is back."""
    names = lambda: [n for n in sys.modules if n == "ldm_edu" or n.startswith("ldm_edu.")]
    with Mutant(edits) as mutant:
        before = {name: sys.modules.pop(name) for name in names()}
        writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True
        sys.path.insert(0, str(mutant.folder))
        try:
            yield importlib.import_module("ldm_edu")
        finally:
            sys.path.remove(str(mutant.folder))
            sys.dont_write_bytecode = writes
            for name in names():
                del sys.modules[name]
            sys.modules.update(before)


# ---------------------------------------------------------------- running tests on a copy
class Recorder:
    """A pytest plugin that notes what became of each test, and what kind of error ended it."""

    def __init__(self):
        self.passed, self.skipped, self.failed = [], [], []

    def pytest_runtest_makereport(self, item, call):
        import pytest

        if call.excinfo is None:
            self.passed += [item.nodeid] if call.when == "call" else []
        elif call.excinfo.errisinstance(pytest.skip.Exception):
            self.skipped.append(item.nodeid)
        else:
            asserted = call.excinfo.errisinstance((AssertionError, pytest.fail.Exception))
            self.failed.append({"test": item.nodeid, "when": call.when, "error": call.excinfo.typename, "asserted": asserted,
                                "file": str(call.excinfo.traceback[-1].path), "message": str(call.excinfo.value)[:300]})


def run_here(request: dict) -> None:
    """In a child process: run the tests on the copy, write what happened to `request["out"]`. Ends the process."""
    folder = Path(request["folder"])
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1), os.dup2(log, 2)
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(folder))
    os.chdir(ROOT)
    import pytest

    recorder = Recorder()
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:pytest_cov", "--tb=short", "--durations=0",
               f"--basetemp={folder / 'tmp'}", f"--rootdir={ROOT}", "-c", str(ROOT / "pyproject.toml"), "-W", "ignore"]
    code = pytest.main([*options, *(["-x"] if request["first"] else []), *(f"tests/{t}" if t.startswith("test_") else t for t in request["tests"])], plugins=[recorder])
    loaded = {n.removeprefix("ldm_edu."): m.__file__ for n, m in sys.modules.items() if n.startswith("ldm_edu.")}
    result = {"code": int(code), "loaded": loaded, **vars(recorder)}
    Path(request["out"]).write_text(json.dumps(result), encoding="utf-8")
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(0)


def serve() -> None:
    """Answer requests, one JSON line each: import what is heavy, then fork a child per request."""
    for name in HEAVY:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    assert not any(n.split(".")[0] == "ldm_edu" for n in sys.modules), "the server must not hold the library"
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            run_here(json.loads(line))
        os.waitpid(child, 0)
        sys.stdout.write("done\n")
        sys.stdout.flush()


def environment() -> dict:
    """This process's environment without what would make a child measure coverage, join xdist or inherit options."""
    drop = ("COV_CORE_", "COVERAGE_", "PYTEST_")
    env = {k: v for k, v in os.environ.items() if not k.startswith(drop)}
    return {**env, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "MPLBACKEND": "Agg",
            "HYPOTHESIS_STORAGE_DIRECTORY": os.path.join(tempfile.gettempdir(), "hypothesis-mutants")}


class Runner:
    """Runs tests on copies; keeps its warm process until closed. `fork=False` starts a fresh process for each request."""

    def __init__(self, fork: bool = FORK):
        self.fork, self.server = fork, None

    def run(self, mutant: Mutant, tests: Sequence[str], first: bool = True) -> dict:
        """What became of `tests` (node ids without "tests/") on this copy; `first` stops at the first failure."""
        out = mutant.folder / "result.json"
        request = json.dumps({"folder": str(mutant.folder), "tests": list(tests), "first": first, "out": str(out)})
        if self.fork:
            self._ask(request)
        else:
            self._fresh(request)
        log = (mutant.folder / "log.txt").read_text(encoding="utf-8", errors="replace") if (mutant.folder / "log.txt").exists() else ""
        if not out.exists():
            raise RuntimeError(f"the child process died without an answer; its output:\n{log[-3000:]}")
        return {**json.loads(out.read_text(encoding="utf-8")), "log": log}

    def _fresh(self, request: str) -> None:
        subprocess.run([sys.executable, __file__, "once"], input=request, text=True, env=environment(), timeout=SECONDS)

    def _ask(self, request: str) -> None:
        if self.server is None:
            self.server = subprocess.Popen([sys.executable, __file__, "serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                           text=True, env=environment(), start_new_session=True)
        watchdog = threading.Timer(SECONDS, self._kill)
        watchdog.start()
        try:
            self.server.stdin.write(request + "\n")
            self.server.stdin.flush()
            answer = self.server.stdout.readline()
        finally:
            watchdog.cancel()
        if answer.strip() != "done":
            self.close()
            raise RuntimeError(f"the process that runs the tests ended, or took more than {SECONDS} s for {request}")

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.server.pid, 9)  # its own session: itself and its children

    def close(self) -> None:
        """End the warm process."""
        if self.server is not None:
            self.server.stdin.close()
            try:
                self.server.wait(10)
            except subprocess.TimeoutExpired:
                self._kill()
            self.server.stdout.close()
            self.server = None


# ---------------------------------------------------------------- verdict
def objection(result: dict, mutant: Mutant) -> str:
    """Why this run does not prove that the tests catch the mutant; empty when it does.

    Caught means: pytest says that tests failed (not that it could not collect them), each failure is an assertion of the
    test itself, and the damaged module is the one that the tests loaded.
    """
    if result["code"] == 0:
        return f"SURVIVED: {len(result['passed'])} tests passed on the damaged library"
    if result["code"] != 1:
        return f"pytest ended with {result['code']} (2: no import, 4: no such test, 5: nothing collected), expected 1"
    for failure in result["failed"]:
        if failure["when"] != "call" or not failure["asserted"]:
            return f"{failure['test']} stopped in its {failure['when']} by {failure['error']}, expected a failed assertion: {failure['message']}"
        if failure["file"].startswith(str(mutant.folder)):
            return f"{failure['test']}: the assertion that failed is the library's, in {failure['file']}, expected the test's"
    foreign = [n for n in mutant.modules if not str(result["loaded"].get(n, "")).startswith(str(mutant.folder))]
    return f"the tests did not load the damaged {', '.join(foreign)}" if foreign else ""


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve()
    else:
        run_here(json.loads(sys.stdin.read()))
