"""What does it bring to keep freed memory in a training on a CPU? Processes in turns, with and without, each timed by its own clock.

`python tests/bench/kept_memory.py --out runs/kept-memory` starts, for each workload and library, process after process: glibc as it comes, then
asked to keep what is freed (`processes.keep_freed_memory`, for the rest of the process, so one process cannot do both). Each warms up and gives the median
processor time of some training steps. It writes `kept-memory.json`: all medians, and the ratios of neighbours. Lesson 24 reads the copy in data/sweeps.
"""
import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from ldm_edu.bench import CLOCKS, bench_facts, others_seconds, take_turns
from ldm_edu.contenders import Contender, Setting, check_job, make_job, peer
from ldm_edu.core import write_json
from ldm_edu.processes import keep_freed_memory


def measure(name: str, library: str, kept: str, steps: int) -> None:
    """In a process of its own: print the median seconds of a training step."""
    torch.set_num_threads(1)
    if kept == "kept" and not keep_freed_memory():
        raise RuntimeError("this C library cannot be asked to keep memory: expected glibc")
    workload, setting = check_job(name, "train"), Setting.parse(f"{library}+fp32")
    net = workload.build()
    job = make_job(Contender(setting, peer(workload, net) if library == "diffusers" else net, workload, "train"), workload.train_batch, 1)
    job(), job()
    print(json.dumps(statistics.median(take_turns({"step": job}, max(2, steps), "cpu", CLOCKS["cpu"])["step"])))


def main(argv=None) -> None:
    """Start the processes in turns, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/kept-memory"))
    parser.add_argument("--workloads", nargs="+", default=["S8", "S16", "M"])
    parser.add_argument("--libraries", nargs="+", default=["ldm_edu", "diffusers"])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure:
        measure(*args.measure, args.steps)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, library in [(name, library) for name in args.workloads for library in args.libraries]:
        seconds, before = {"plain": [], "kept": []}, others_seconds()
        for r in range(args.rounds):
            for kept in ("plain", "kept")[:: 1 if r % 2 == 0 else -1]:
                done = subprocess.run([sys.executable, __file__, "--steps", str(args.steps), "--measure", name, library, kept], capture_output=True, text=True, check=True)
                seconds[kept].append(json.loads(done.stdout))
        ratios = [plain / kept for plain, kept in zip(seconds["plain"], seconds["kept"])]
        others = None if before is None else round(others_seconds() - before, 1)
        rows.append({"workload": name, "library": library, "seconds": seconds, "ratios": [round(r, 4) for r in ratios], "others_seconds": others})
        print(f"{name:4} {library:10} x {statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f}) with memory kept; others used {others} s", flush=True)
        write_json(args.out / "kept-memory.json", {**bench_facts("cpu"), "threads": 1, "rounds": args.rounds, "steps": args.steps, "rows": rows})


if __name__ == "__main__":
    main()
