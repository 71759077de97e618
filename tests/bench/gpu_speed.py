"""All comparisons of speed on one GPU in one go, for a card that is lent for minutes.

`python tests/bench/gpu_speed.py --out runs/gpu-speed` starts a process for each comparison of a wave. They build and compile side by side, which takes
most of the time and little of the card; when all of a wave are warm, each is timed alone, one after another. It writes KEY.json for each comparison as it
ends, what Stable Diffusion 1 reaches in training at larger batches (mfu-BATCH.json), and where its time goes (profile-mfu-BATCH.txt).
`--with "COMMAND"` runs a command beside the first wave, such as the tests. Pages 99e and 24 read the copy in data/sweeps.
"""
import argparse
import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch._inductor.config
from torch.profiler import ProfilerActivity, profile

from ldm_edu.bench import bench_facts, compare_speed, job_flops, peak_memory, product_rate, speed_table, take_turns
from ldm_edu.contenders import WORKLOADS, Setting, agreement, contend, make_job
from ldm_edu.core import write_json

TRAIN, SAMPLE = "autocast+channels-last", "bf16+channels-last"


def named(form: str, *words: str) -> list[str]:
    """Settings such as diffusers+bf16+compiled from "diffusers" and "ldm_edu+compiled"."""
    return ["+".join([library, form, *rest]) for library, *rest in (word.split("+") for word in words)]


PEERS = ("diffusers", "ldm_edu", "diffusers+compiled", "ldm_edu+compiled")
GRAPHS = ("diffusers", "ldm_edu", "diffusers+cuda-graphs", "ldm_edu+cuda-graphs")
COMPARISONS = {  # workload, job, batch, settings
    "L-train": ("L", "train", 16, named(TRAIN, "diffusers", "ldm_edu", "diffusers+compiled", "ldm_edu+compiled")),
    "L-sample-16": ("L", "sample", 16, named(SAMPLE, *PEERS, "ldm_edu+compiled+shared-start")),
    "L-sample-1": ("L", "sample", 1, named(SAMPLE, *GRAPHS, "ldm_edu+cuda-graphs+shared-start")),
    "Mfull-train": ("Mfull", "train", 64, named(TRAIN, *PEERS)),
    "C-train": ("C", "train", 48, ["diffusers+fp32+math", *named(TRAIN, "diffusers", "ldm_edu+compiled")]),
    "M-train": ("M", "train", 4, named(TRAIN, *GRAPHS)),
    "M-sample": ("M", "sample", 4, named(SAMPLE, *GRAPHS, "ldm_edu+cuda-graphs+shared-start")),
    "S16-train": ("S16", "train", 32, named(TRAIN, *GRAPHS)),
    "S16-sample": ("S16", "sample", 16, named(SAMPLE, *GRAPHS, "ldm_edu+cuda-graphs+shared-start")),
}
WAVES = (("L-train", "Mfull-train"), ("mfu-64",), ("mfu-96+cuda-graphs",), ("L-sample-16", "L-sample-1"), ("C-train", "M-train", "M-sample", "S16-train", "S16-sample"))  # each fits 139 GiB


class Turn:
    """A process's place in the queue: it says that it is warm, and waits until it may use the card alone."""

    def __init__(self, out: Path, key: str):
        self.ready, self.go = out / f"{key}.ready", out / f"{key}.go"

    def wait(self) -> None:
        """Give back unused memory, say that all is warm, wait for the card."""
        torch.cuda.empty_cache()
        self.ready.touch()
        while not self.go.exists():
            time.sleep(0.05)


def compare(key: str, out: Path, device: str, rounds: int) -> None:
    """One comparison, timed when its turn has come."""
    name, what, batch, settings = COMPARISONS[key]
    turn, left = Turn(out, key), [len(settings)]

    def tell(line: str) -> None:
        print(f"[{key}] {line}", flush=True)
        torch.cuda.empty_cache()
        left[0] -= line.startswith("warm after")
        if not left[0]:
            turn.wait()

    result = compare_speed(name, what, [Setting.parse(s) for s in settings], device, rounds, batch, 5, 3, tell=tell)
    write_json(out / f"{key}.json", result)
    print(speed_table(result), flush=True)


def utilisation(key: str, out: Path, device: str, rounds: int, name: str) -> None:
    """Share of the matrix rate that a training step of Stable Diffusion 1 reaches, with and without cuDNN's search, and where its time goes.

    `key`: mfu-BATCH, or mfu-BATCH+cuda-graphs (kernels are chosen before they are recorded: with the search only).
    """
    batch, *words = key.removeprefix("mfu-").split("+")
    workload, batch = WORKLOADS[name], int(batch)
    c, = contend([Setting.parse("+".join([f"ldm_edu+{TRAIN}", *(words or ["compiled"])]))], workload, "train", device)
    agreement([c])  # that half precision rounds, and by how much at most
    job, settings = make_job(c, batch), [replace(c.setting, search=flag) for flag in ((True,) if words else (False, True))]

    def under(setting: Setting) -> None:
        c.setting = setting
        job()

    for setting in settings:
        began = time.perf_counter()
        for _ in range(3):
            under(setting)
        print(f"[{key}] warm after {time.perf_counter() - began:.1f} s: {setting.name}", flush=True)
    Turn(out, key).wait()
    seconds = take_turns({setting.name: (lambda setting=setting: under(setting)) for setting in settings}, rounds, device)
    flops, rate = job_flops(workload, "train", batch, 1), product_rate(device, "bf16") * 1e12
    rows = {s: {"ms": 1e3 * statistics.median(t), "share_of_matrix_rate": flops / statistics.median(t) / rate, "seconds": t} for s, t in seconds.items()}
    best = min(settings, key=lambda setting: rows[setting.name]["ms"])
    write_json(out / f"{key}.json", {**bench_facts(device), "workload": name, "what": "train", "batch": batch, "tflop": flops / 1e12, "matrix_tflops": rate / 1e12,
                                     "peak_mib": peak_memory(lambda: under(best), device), "rows": rows})
    for s, row in rows.items():
        print(f"[{key}] {s}: {row['ms']:.1f} ms, {row['share_of_matrix_rate']:.1%} of the matrix rate", flush=True)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], record_shapes=True) as seen:
        under(best)
        if device == "cuda":
            torch.cuda.synchronize()
    show = {"sort_by": "self_device_time_total" if device == "cuda" else "self_cpu_time_total", "max_name_column_width": 110}
    tables = [seen.key_averages(group_by_input_shape=shapes).table(row_limit=120, max_shapes_column_width=140, **show) for shapes in (False, True)]
    (out / f"profile-{key}.txt").write_text("\n".join(tables))


def run_wave(keys: list[str], out: Path, options: list[str], deadline: float, beside: list[subprocess.Popen]) -> None:
    """Start the processes of a wave, wait until each is warm or has ended, then let one after another have the card."""
    began = time.perf_counter()
    jobs = {}
    for key in keys:
        with open(out / f"{key}.log", "w") as log:
            jobs[key] = subprocess.Popen([sys.executable, __file__, "--only", key, "--out", str(out), *options], stderr=subprocess.STDOUT, stdout=log)
    while time.perf_counter() - began < deadline and (any(job.poll() is None and not (out / f"{key}.ready").exists() for key, job in jobs.items())
                                                      or any(job.poll() is None for job in beside)):
        time.sleep(0.2)
    print(f"{', '.join(keys)}: warm after {time.perf_counter() - began:.0f} s; ended early: {[key for key, job in jobs.items() if job.poll() is not None]}", flush=True)
    for key, job in jobs.items():
        if not (out / f"{key}.ready").exists() and job.poll() is None:
            print(f"{key}: not warm in time, stopped", flush=True)
            job.kill()
        (out / f"{key}.go").touch()
        job.wait()
        print("\n".join((out / f"{key}.log").read_text().splitlines()[-14:]), flush=True)
    print(f"wave of {time.perf_counter() - began:.0f} s", flush=True)


def main(argv=None) -> None:
    """Run the waves, or one comparison of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-speed"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", help="a comparison, or mfu-BATCH[+cuda-graphs]: without waiting for others' turns if --out holds KEY.go")
    parser.add_argument("--large", default="L", help="the workload of mfu-BATCH")
    parser.add_argument("--waves", nargs="*", default=[",".join(wave) for wave in WAVES], help="comparisons of a wave, with commas between")
    parser.add_argument("--deadline", type=float, default=300, help="seconds after which a wave no longer waits for those that are not warm")
    parser.add_argument("--inductor", nargs="*", default=[], help="settings of the compiler to try, such as max_pointwise_cat_inputs=1")
    parser.add_argument("--with", dest="beside", default="", help="a command that runs beside the first wave")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, value in (setting.split("=") for setting in options.inductor):
        setattr(torch._inductor.config, name, type(getattr(torch._inductor.config, name))(int(value)))
    if options.only:
        if options.only.startswith("mfu-"):
            utilisation(options.only, options.out, options.device, options.rounds, options.large)
        else:
            compare(options.only, options.out, options.device, options.rounds)
        return
    waves = [wave.split(",") for wave in options.waves]
    if unknown := [key for wave in waves for key in wave if key not in COMPARISONS and not key.startswith("mfu-")]:
        raise SystemExit(f"waves: got {', '.join(unknown)}, expected mfu-BATCH, mfu-BATCH+cuda-graphs, or some of {', '.join(COMPARISONS)}")
    if there := [path.name for wave in waves for key in wave for path in options.out.glob(f"{key}.*")]:
        raise SystemExit(f"{options.out} holds {', '.join(sorted(there))} already: choose another folder with --out")
    with open(options.out / "beside.log", "w") as log:
        beside = [subprocess.Popen(shlex.split(options.beside), stdout=log, stderr=subprocess.STDOUT)] if options.beside else []
        for wave in waves:
            run_wave(wave, options.out, ["--device", options.device, "--rounds", str(options.rounds), "--large", options.large, "--inductor", *options.inductor], options.deadline, beside)
            beside = []
    if options.beside:
        print("\n".join((options.out / "beside.log").read_text().splitlines()[-40:]), flush=True)


if __name__ == "__main__":
    main()
