"""A small task for the trainer's tests; as a program under torchrun it trains it: `training_toy.py FOLDER OPTIONS`."""
import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn

if torch.accelerator.is_available():  # several processes on one accelerator would not do
    os.environ.setdefault("ACCELERATE_USE_CPU", "true")

from ldm_edu.training import TrainConfig, TrainingInterrupted, TrainingTask, train  # noqa: E402

CONFIG = TrainConfig(steps=100, batch_size=16, lr=1e-2, warmup_steps=10, save_every=20, validate_every=25, log_every=10)


class Circle(torch.utils.data.Dataset):
    """Points of a circle, with their names."""

    def __init__(self, n: int = 97):
        angle = torch.rand(n, generator=torch.Generator().manual_seed(0)) * 2 * torch.pi
        self.points = torch.stack([angle.cos(), angle.sin()], dim=1)

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> dict:
        return {"point": self.points[index], "name": f"p{index}"}


class Net(nn.Module):
    """Predicts the noise of a noised point."""

    def __init__(self, dropout: float):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 32), nn.SiLU(), nn.Dropout(dropout), nn.Linear(32, 2))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, points, t):
        self.calls += 1
        return self.layers(torch.cat([points, t[:, None]], dim=1))


class CircleTask(TrainingTask):
    """Noise prediction on points; `pause` slows each step down so that a test can interrupt it."""

    def __init__(self, seed: int = 0, dropout: float = 0.0, pause: float = 0.0, poison: int = -1):
        torch.manual_seed(seed)
        self.model, self.pause, self.poison = Net(dropout), pause, poison

    def describe(self) -> dict:
        return {"task": "circle", "width": 32}

    def loss(self, model, batch, rng):
        time.sleep(self.pause)
        t, noise = rng.uniform("t"), rng.normal((2,), "noise")
        x_t = (1 - t).sqrt()[:, None] * batch["point"] + t.sqrt()[:, None] * noise
        losses = (model(x_t, t) - noise).square().mean(dim=1)
        if rng.step == self.poison:
            losses = losses * float("nan")
        return losses, {"t": t}


class Pair(nn.Module):
    """A player that moves points and a critic that scores them: all parameters of a two-part task in one module."""

    def __init__(self):
        super().__init__()
        self.player, self.critic = nn.Linear(2, 2), nn.Linear(2, 1)

    def forward(self, points, part):
        moved = self.player(points)
        if part == "player":
            return moved, self.critic(moved)
        return self.critic(points), self.critic(moved.detach())


class GameTask(TrainingTask):
    """The player wants high scores of its points, the critic low ones, with a quadratic leash on both."""

    parts = ("player", "critic")

    def __init__(self, seed: int = 0, critic_from: int = 0):
        torch.manual_seed(seed)
        self.model, self.critic_from = Pair(), critic_from

    def describe(self) -> dict:
        return {"task": "game", "critic_from": self.critic_from}

    def parameter_groups(self):
        return [{"params": list(self.model.player.parameters())},
                {"params": list(self.model.critic.parameters()), "part": "critic", "lr_scale": 2.0, "betas": (0.5, 0.9)}]

    def active(self, part, step):
        return part != "critic" or step >= self.critic_from

    def part_loss(self, part, model, batch, rng):
        points = batch["point"] + 0.1 * rng.normal((2,), part)
        if part == "player":
            moved, score = model(points, part)
            return (moved - points).square().mean(1) - score[:, 0], {"score": score[:, 0]}
        real, fake = model(points, part)
        return (fake - real)[:, 0] + 0.1 * (real.square() + fake.square())[:, 0], {"real": real[:, 0]}

    def loss(self, model, batch, rng):
        return self.part_loss("player", model, batch, rng)


def weights(folder: Path, stem: str = "ema") -> dict:
    """The tensors of the newest checkpoint of a run."""
    from safetensors.torch import load_file

    return load_file(sorted((folder / "checkpoints").glob("step-*"))[-1] / f"{stem}.safetensors")


def train_child(folder: str, options: dict) -> None:
    """Train slowly in a child process that somebody will kill."""
    torch.set_num_threads(1)
    train(CircleTask(pause=0.004), Circle(), CONFIG.replace(**options), folder, progress=False)


def train_stage(folder: str | Path, steps: int = 30, loss: dict | None = None, batch_size: int = 8, resume_at: int | None = None,
                **changes) -> list[dict]:
    """Train a tiny first stage on scenes, by the ordinary call, and return its log; `resume_at`: stop there and go on."""
    from ldm_edu.autoencoder import AutoencoderConfig
    from ldm_edu.data import Scenes
    from ldm_edu.features import load_features
    from ldm_edu.losses import PerceptualDistance
    from ldm_edu.recipes import FirstStageRecipe, train_autoencoder

    torch.set_num_threads(1)
    model = AutoencoderConfig(4, 8, (1, 2, 2), 1, mid_attention=False, num_groups=4, pixel_loss="l2").replace(**changes)
    config = CONFIG.replace(steps=steps, batch_size=batch_size, lr=2e-3, log_every=1, validate_every=10, save_every=5)
    data = Scenes(16, n=32, objects=(1, 1), fields=("image",))
    ruler = PerceptualDistance(load_features().pyramid) if loss else None

    def go(*callbacks):
        train_autoencoder(data, FirstStageRecipe(model, config), folder, validation=data, progress=False, loss=loss, perceptual=ruler,
                          callbacks=callbacks)

    def stop(report):
        if report.step == resume_at:
            raise KeyboardInterrupt

    if resume_at:
        with contextlib.suppress(KeyboardInterrupt):
            go(stop)
    go()
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").open()]


def leave() -> None:
    """Leave together: who tears its connections down while another still uses them may be aborted."""
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def main(folder: str, options: dict) -> None:
    """As one of several processes: be stopped by a signal that only the last one gets, then go on to the end."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    base = {"circle": CircleTask, "game": GameTask}[options.pop("task", "circle")]
    config = CONFIG.replace(**options)

    class Hurt(base):
        def part_loss(self, part, model, batch, rng):
            if rank == world - 1 and rng.step == 8 and part == self.parts[0]:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().part_loss(part, model, batch, rng)

    try:
        train(Hurt(seed=rank), Circle(), config, folder, validation=Circle(20), progress=False)
    except TrainingInterrupted as stop:
        Path(folder, f"stop{rank}").write_text(str(stop.step))
    result = train(base(seed=rank), Circle(), config, folder, validation=Circle(20), progress=False)
    if rank == 0:
        Path(folder, "losses.json").write_text(json.dumps(result.losses))
    leave()


if __name__ == "__main__":
    if "stage" in sys.argv[3:]:
        train_stage(sys.argv[1], **json.loads(sys.argv[2]))
        leave()
    else:
        main(sys.argv[1], json.loads(sys.argv[2]))
