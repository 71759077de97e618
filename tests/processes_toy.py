"""Trainings for the tests of many processes; as a program under torchrun it does those that a JSON file lists, or a command."""
import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("ACCELERATE_USE_CPU", "true")

import torch  # noqa: E402
import training_toy as toy  # noqa: E402

from ldm_edu import checkpoint, training  # noqa: E402
from ldm_edu.processes import held_bytes, leave_together  # noqa: E402

CIRCLE = toy.CONFIG.replace(steps=30, save_every=4, validate_every=6, log_every=1)
DIFFUSION = toy.CONFIG.replace(steps=12, batch_size=8, lr=1e-3, warmup_steps=2, lr_schedule="constant", validate_every=4, save_every=4,
                               sample_every=4, log_every=1, flip=False)


@contextlib.contextmanager
def weigh(held: dict):
    """Note the bytes that this process holds before each update, when gradients are there."""
    real = training.apply_part

    def noting(run, part, loss, norm):
        parameters, states = list(run.model.parameters()), run.optimizers[part].state.values()
        held.update(weights=held_bytes(parameters), gradients=held_bytes(p.grad for p in parameters if p.grad is not None),
                    average=held_bytes(run.ema.model.parameters()), moments=held_bytes(s[k] for s in states for k in ("exp_avg", "exp_avg_sq")),
                    hollow=held_bytes(run.task.model.parameters()))
        real(run, part, loss, norm)

    training.apply_part = noting
    try:
        yield
    finally:
        training.apply_part = real


def dying_task(base, kill: dict | None):
    """A task whose process is killed at a step, or while it writes the checkpoint of a step."""
    if not kill or int(os.environ.get("RANK", 0)) != kill["rank"]:
        return base
    die, write = lambda: os.kill(os.getpid(), signal.SIGKILL), checkpoint.save_file

    def dying_write(tensors, path):
        if kill.get("save") is not None and path.stem == "optimizer" and f"{kill['save']:08d}" in str(path):
            die()
        write(tensors, path)

    checkpoint.save_file = dying_write

    class Dying(base):
        def loss(self, model, batch, rng):
            if rng.step == kill.get("step"):
                die()
            return super().loss(model, batch, rng)

    return Dying


def diffusion(kind: str, folder: str | Path, options: dict) -> None:
    """A tiny latent diffusion model of scenes with captions or classes, on a first stage that nobody trained."""
    from ldm_edu.autoencoder import AutoencoderConfig
    from ldm_edu.data import Scenes
    from ldm_edu.quantize import make_first_stage
    from ldm_edu.recipes import DiffusionRecipe, train_diffusion

    torch.manual_seed(0)
    stage = make_first_stage(AutoencoderConfig(4, 8, (1, 2, 2), 1, mid_attention=False, num_groups=4)).eval()
    scenes = lambda n, split: Scenes(16, n=n, split=split, objects=(1, 1), fields=("image", "caption", "label"))
    recipe = DiffusionRecipe({"text": "text-mini", "class": "class-tiny"}[kind], kind, train=DIFFUSION.replace(**options))
    train_diffusion(scenes(48, "train"), stage, recipe, folder, validation=scenes(16, "validation"), progress=False,
                    unet={"model_channels": 24, "num_groups": 4, "head_dim": 12})


def do(job: dict, folder: Path) -> dict:
    """One training: what this process held of it, and what it raised."""
    held, rank, out = {}, int(os.environ.get("RANK", 0)), folder / job["out"]
    out = out.with_name(f"{out.name}{rank}") if job.get("apart") else out
    try:
        with weigh(held):
            if job["task"] in ("text", "class"):
                diffusion(job["task"], out, job.get("options", {}))
            elif job["task"] == "stage":
                toy.train_stage(out, **job["options"])
            else:
                base = dying_task({"circle": toy.CircleTask, "game": toy.GameTask}[job["task"]], job.get("kill"))
                task = base(seed=job.get("seed", 0) + rank)  # other initial weights on each process
                result = training.train(task, toy.Circle(), CIRCLE.replace(**job.get("options", {})), out, validation=toy.Circle(20),
                                        progress=False, stop_after=job.get("stop_after"))
                held["losses"], held["average_norm"] = result.losses, sum(p.norm().item() for p in result.ema.parameters())
                held["model_norm"] = sum(p.norm().item() for p in task.model.parameters())
    except ValueError as err:
        held["error"] = str(err)
    return held


def start(*command: str, processes: int = 2, **options) -> subprocess.Popen:
    """Start a program, or a module after "-m", as so many processes."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **options.pop("env", {})}
    return subprocess.Popen([*torchrun, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, **options)


def launch(folder, jobs: list[dict], processes: int = 2, timeout: float = 300, **options) -> tuple[int, str, list[list[dict]]]:
    """Do the jobs in so many processes: the exit code, what was said, and what each process told of each job that ended."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    for old in folder.glob("told*"):
        old.unlink()
    running = start(__file__, str(folder), processes=processes, **options)
    try:
        out, err = running.communicate(timeout=timeout)
    finally:
        if running.poll() is None:  # torchrun ends its workers when it is asked to, and cannot when it is killed
            running.terminate()
            running.wait(60)
    told = [[json.loads(path.read_text()) for path in sorted(folder.glob(f"told{i}-*.json"))] for i in range(len(jobs))]
    return running.returncode, out + err, told


def losses_of(folder) -> list[float]:
    """Every step's loss, from a run's newest checkpoint."""
    return checkpoint.load_checkpoint(checkpoint.newest_checkpoint(folder / "checkpoints"))[0]["optimizer"]["history:loss"].tolist()


def main(folder: Path) -> None:
    """Do the jobs of `jobs.json` as one of several processes."""
    torch.set_num_threads(1)
    for i, job in enumerate(json.loads((folder / "jobs.json").read_text())):
        (folder / f"told{i}-{os.environ['RANK']}.json").write_text(json.dumps(do(job, folder)))
    leave_together()


def command_line(args: list[str]) -> int:
    """Run a command of `ldm-edu`, and say so if the process is still in a group at its end."""
    from ldm_edu import cli

    code = cli.main(args)
    if torch.distributed.is_initialized():
        print("still in a group", file=sys.stderr)
    return code


if __name__ == "__main__":
    if sys.argv[1] == "--cli":
        raise SystemExit(command_line(sys.argv[2:]))
    main(Path(sys.argv[1]))
