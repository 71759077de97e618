"""How a caption gets into the UNet: train every variant at equal parameters (within 7 %) and steps, with several seeds, and grade it.

`python tests/bench/ablation.py --out runs/ablation` trains each of VARIANTS once for each seed on Scenes of 32 pixels and writes
`ablation.json`; what is finished is not trained again, so a run that was cut goes on. Give two processes different --seeds and the
same --out, and they share the work. `--costs` measures seconds and bytes of a training step of every variant in turn, one step of
each before the next of any, so that a slow minute of the machine hits all alike; it wants an idle machine. No log of it is in
data/sweeps yet: it is for a lesson that is planned.
"""
import argparse
import contextlib
import json
import shutil
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from ldm_edu import attention
from ldm_edu.cli import with_relations
from ldm_edu.conditioning import CONDITIONERS, Condition, TextConditioner, TextConfig, train_tokenizer
from ldm_edu.core import default_device, make_generators, write_json
from ldm_edu.data import Scenes, make_prompts
from ldm_edu.grader import grade
from ldm_edu.ldm import load_first_stage
from ldm_edu.objective import diffusion_loss
from ldm_edu.reading import learn_to_read
from ldm_edu.recipes import DiffusionRecipe, all_captions, code_version, machine, train_diffusion, write_picture
from ldm_edu.training import TrainConfig
from ldm_edu.unet import UNet, UNetConfig

BASE = UNetConfig(4, 4, 32, (1, 1), 1, (1, 2), heads=2, context_dim=64, num_groups=2)
TRAIN = TrainConfig(batch_size=32, lr=1.5e-3, weight_decay=1e-4, warmup_steps=100, final_lr_fraction=0.0, ema_decay=0.995,
                    precision="auto", log_every=100, save_every=500, keep=1)
KINDS = {"single": "pair", "relation": "relation", "binding": "binding", "held_out": "pair"}  # of prompts; which grade counts


@dataclass(frozen=True)
class Variant:
    """One way in. `unet`: changes of BASE, whose width is then chosen to give as many parameters as BASE has."""

    group: str  # the question that it answers, with the base as the other answer
    name: str
    ways: tuple[str, ...] = ("tokens",)  # of tokens, vector, maps; () tells the UNet nothing
    unet: dict = field(default_factory=dict)
    width: int = 64  # of the text encoder and so of the context
    encoder: str = "joint after reading"  # or "joint from nothing", "frozen after reading", "frozen at random"
    block: str = "cross before feed-forward"  # or "feed-forward before cross"


NO_CROSS = dict(cross_levels=())  # the transformers stay, and read nothing
VARIANTS = (
    Variant("base", "cross-attention everywhere"),
    Variant("way", "nothing", (), NO_CROSS),
    Variant("way", "maps beside the input", ("maps",), NO_CROSS),
    Variant("way", "vector added to time", ("vector",), NO_CROSS),
    Variant("way", "vector modulates (AdaGN)", ("vector",), {**NO_CROSS, "use_scale_shift_norm": True}),
    Variant("way", "cross-attention and vector", ("tokens", "vector")),
    Variant("place", "at 8 x 8 alone", unet=dict(cross_levels=(1,))),
    Variant("place", "at 4 x 4 alone", unet=dict(cross_levels=(2,))),
    Variant("heads", "1 head", unet=dict(heads=1)),
    Variant("heads", "4 heads", unet=dict(heads=4)),
    Variant("heads", "8 heads", unet=dict(heads=8)),
    Variant("depth", "2 blocks deep", unet=dict(transformer_depth=2)),
    Variant("context", "context of 32", width=32),
    Variant("context", "context of 128", width=128),
    Variant("encoder", "joint from nothing", encoder="joint from nothing"),
    Variant("encoder", "frozen after reading", encoder="frozen after reading"),
    Variant("encoder", "frozen at random", encoder="frozen at random"),
    Variant("order", "feed-forward before cross", block="feed-forward before cross"),
)


class FeedForwardFirst(attention.TransformerBlock):
    """The order that the paper's Table 16 prints: self-attention, feed-forward, cross-attention."""

    def forward(self, tokens: Tensor, context: Tensor | None = None, context_mask: Tensor | None = None) -> Tensor:
        tokens = tokens + self.self_attention(self.norm_self(tokens))
        tokens = tokens + self.feed_forward(self.norm_ff(tokens))
        if self.cross_attention is not None:
            tokens = tokens + self.cross_attention(self.norm_cross(tokens), context, context_mask)
        return tokens


@dataclass(frozen=True)
class WaysConfig(TextConfig):
    """A text encoder, and how what it says goes on."""

    ways: tuple[str, ...] = ("tokens",)


class WaysConditioner(TextConditioner):
    """Tokens as ever; and the vector of the whole caption beside them, on the time embedding or as constant maps."""

    config_class, map_channels = WaysConfig, 8

    def __init__(self, config: WaysConfig, tokenizer):
        super().__init__(config.replace(pooled=bool({"vector", "maps"} & set(config.ways))), tokenizer)
        self.c_dim = config.width if "vector" in config.ways else None
        self.concat_channels = self.map_channels if "maps" in config.ways else 0
        self.to_maps = torch.nn.Linear(config.width, self.map_channels) if "maps" in config.ways else None

    def _sent(self, told: Condition) -> Condition:
        maps = None if self.to_maps is None else self.to_maps(told.c)[:, :, None, None]
        return Condition(told.context, told.context_mask, told.c if self.c_dim else None, maps)

    def forward(self, batch) -> Condition:
        return self._sent(super().forward(batch))


CONDITIONERS["ways"] = WaysConditioner


def count(config: UNetConfig) -> int:
    """Parameters of a UNet, without building it."""
    with torch.device("meta"):
        return sum(p.numel() for p in UNet(config).parameters())


def sized(variant: Variant) -> UNetConfig:
    """The variant's UNet, as wide as makes it equal to BASE in parameters; widths are multiples of the heads."""
    heads = variant.unet.get("heads", BASE.heads)
    config = BASE.replace(**variant.unet, context_dim=variant.width, in_channels=4 + (8 if "maps" in variant.ways else 0),
                          c_dim=variant.width if "vector" in variant.ways else None)
    widths = range(16, 65, max(2, heads))
    return min((config.replace(model_channels=w) for w in widths), key=lambda c: abs(count(c) - count(BASE)))


def make_conditioner(variant: Variant, captions: list[str], seed: int) -> WaysConditioner:
    """The variant's text encoder, taught to read and frozen where the variant says so."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(captions)
    out = WaysConditioner(WaysConfig(variant.width, ways=variant.ways), tokenizer)
    if "reading" in variant.encoder:
        learn_to_read(out.train(), captions, seed=seed)
    out.encoder.requires_grad_("frozen" not in variant.encoder)
    return out


def ordered(variant: Variant):
    """While it is open, transformers are built with the variant's order of layers."""
    swap = mock.patch.object(attention, "TransformerBlock", FeedForwardFirst)
    return swap if variant.block.startswith("feed") else contextlib.nullcontext()


def data_sets(args) -> tuple:
    """Scenes to train on, half of them two objects and their relation, and unseen ones."""
    make = lambda split, n: Scenes(n=n, split=split, objects=(1, 2), fields=("image", "caption"))
    return with_relations(make, args.scenes, 0.5), make("validation", 512)


@torch.no_grad()
def validation_loss(model, data) -> float:
    """Mean error on unseen scenes with their captions, at 512 fixed steps and noises."""
    batch, total = data.render(range(len(data))), 0.0
    t = torch.linspace(0, model.schedule.T - 1, len(data)).long()[torch.randperm(len(data), generator=torch.Generator().manual_seed(0))]
    for rows in torch.arange(len(data)).split(64):
        z = model.encode(batch["image"][rows])
        eps = torch.stack([torch.randn(z.shape[1:], generator=g) for g in make_generators(int(rows[0]), len(rows))])
        told = {"caption": [batch["caption"][i] for i in rows.tolist()]}
        total += diffusion_loss(lambda x, t, told=told: model.net(x, t, told), z, model.schedule, t[rows], eps, prediction=model.config.prediction).sum().item()
    return total / len(data)


def measure(model, args) -> dict:
    """Shares of pictures that are as asked, for every kind of prompt."""
    out = {}
    for kind in ("single", "relation", "held_out"):
        prompts = make_prompts(args.prompts, seed=4321, kind=kind)
        grades = grade(model.sample(prompts, steps=20, guidance_scale=args.guidance, seed=99), prompts).summary()
        for name, which in KINDS.items():
            if name == kind or (name, kind) == ("binding", "relation"):
                out[name] = {key: grades[which][key] for key in ("n", "correct")}
    return out


def run_one(variant: Variant, seed: int, args, data, unseen) -> dict:
    """Train and grade one variant with one seed; its checkpoints go when the result is there."""
    out = Path(args.out) / f"{variant.group}-{variant.name.replace(' ', '-')}-{seed}"
    result = out / "result.json"
    if result.exists():
        return json.loads(result.read_text())
    out.mkdir(parents=True, exist_ok=True)
    config, start = sized(variant), time.monotonic()
    unet = {key: getattr(config, key) for key in ("model_channels", "ch_mult", "num_res_blocks", "attention_levels", "heads", "head_dim",
                                                  "transformer_depth", "cross_levels", "use_scale_shift_norm", "num_groups")}
    shared = out / "latents"  # one cache for all: they see the same pictures
    if not shared.is_symlink():
        (Path(args.out) / "latents").mkdir(exist_ok=True)
        shared.symlink_to("../latents")
    with ordered(variant):
        conditioner = make_conditioner(variant, all_captions(data), seed)
        model = train_diffusion(data, load_first_stage("scenes-kl-f4").to(default_device()), DiffusionRecipe(step_bias=1.6, train=TRAIN), out, conditioner=conditioner,
                                unet=unet, steps=args.steps, seed=seed, progress=False)
    parameters = {"unet": sum(p.numel() for p in model.net.unet.parameters()), "text": sum(p.numel() for p in model.net.conditioner.parameters())}
    row = {"group": variant.group, "name": variant.name, "seed": seed, "steps": args.steps, "width": config.model_channels, "parameters": parameters,
           "validation": round(validation_loss(model, unseen), 5), "grades": measure(model, args), "minutes": round((time.monotonic() - start) / 60, 1)}
    write_picture(out / "samples.png", model.sample(make_prompts(16, seed=1, kind="relation"), steps=20, guidance_scale=args.guidance, seed=5))
    write_json(result, row)
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    shutil.rmtree(out / "model", ignore_errors=True)
    return row


def saved_bytes(step) -> int:
    """Bytes that a forward pass keeps for its backward pass, each storage once."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = step()
    size = sum(kept.values())
    loss.backward()
    return size


def measure_costs(args) -> list[dict]:
    """Seconds (median) and bytes of a training step of every variant, and seconds of one evaluation when drawing."""
    captions = Scenes(n=2000, objects=(1, 2), fields=("caption",)).captions()
    steps, timings = [], [[] for _ in VARIANTS]
    for variant in VARIANTS:
        with ordered(variant):
            torch.manual_seed(0)
            net, read = UNet(sized(variant)), make_conditioner(Variant("", "", variant.ways, width=variant.width, encoder="joint from nothing"), captions, 0)
        read.encoder.requires_grad_("frozen" not in variant.encoder)
        tokens = read.tensors({"caption": captions[: TRAIN.batch_size]})
        weights = [p for p in [*net.parameters(), *read.parameters()] if p.requires_grad]
        x, t = torch.randn(TRAIN.batch_size, 4, 8, 8), torch.randint(1000, (TRAIN.batch_size,))

        def forward(net=net, read=read, x=x, t=t, tokens=tokens):
            told = read(tokens)
            maps = [] if told.concat is None else [told.concat.expand(-1, -1, 8, 8)]
            return net(torch.cat([x, *maps], 1), t, told.context, told.context_mask, told.c).square().mean()

        steps.append((forward, torch.optim.AdamW(weights, lr=1e-6)))
    bytes_kept = [saved_bytes(forward) for forward, _ in steps]
    for turn in range(args.rounds + 3):
        for (forward, optimizer), seconds in zip(steps, timings, strict=True):
            begin = time.perf_counter()
            forward().backward()
            optimizer.step()
            optimizer.zero_grad()
            if turn >= 3:
                seconds.append(time.perf_counter() - begin)
    return [{"group": v.group, "name": v.name, "seconds": round(statistics.median(s), 5), "spread": [round(q, 5) for q in statistics.quantiles(s, n=4)[::2]],
             "bytes": size} for v, s, size in zip(VARIANTS, timings, bytes_kept, strict=True)]


def main() -> None:
    """Run what is not in the log yet, and write the log of all that is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="runs/ablation")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--scenes", type=int, default=20_000)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--costs", action="store_true", help="measure seconds and bytes of a step, and train nothing")
    parser.add_argument("--rounds", type=int, default=40, help="timed steps of each variant")
    args = parser.parse_args()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    if args.costs:
        write_json(out / "costs.json", {"batch_size": TRAIN.batch_size, "machine": machine(), "rows": measure_costs(args)})
    else:
        data, unseen = data_sets(args)
        for seed in args.seeds:
            for variant in VARIANTS:
                print(json.dumps(run_one(variant, seed, args, data, unseen)), flush=True)
    rows = [json.loads(path.read_text()) for path in sorted(out.glob("*/result.json"))]
    costs = json.loads((out / "costs.json").read_text()) if (out / "costs.json").exists() else None
    settings = {key: getattr(args, key) for key in ("steps", "scenes", "prompts", "guidance")}
    write_json(out / "ablation.json", {"settings": settings, "train": TRAIN.to_dict(), "machine": machine(), "commit": code_version(), "rows": rows, "costs": costs})


if __name__ == "__main__":
    main()
