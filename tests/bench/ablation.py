"""How a caption gets into the UNet: train every variant at equal parameters (within 7 %) and steps, with several seeds, and grade it.

`python tests/bench/ablation.py --out runs/ablation` trains each of VARIANTS once for each seed on Scenes of 32 pixels and writes
`ablation.json`; what is finished is not trained again, so a run that was cut goes on. Give two processes different --seeds and the
same --out, and they share the work. `--costs` measures seconds and bytes of a training step of every variant in turn, one step of
each before the next of any, so that a slow minute of the machine hits all alike; it wants an idle machine. While it trains, each
variant is asked what captions are worth to it (`Worth`): a ruler finer than grades, which are near the floor after so few steps.
All variants but one have two maps that say where each place is: without them some seeds bind colours to places in 500 steps and
others not in 1,500. Lesson 21 reads the copy of the log in data/sweeps.
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
from ldm_edu.captions import parse_caption
from ldm_edu.cli import with_relations
from ldm_edu.conditioning import CONDITIONERS, Condition, TextConditioner, TextConfig, train_tokenizer
from ldm_edu.core import default_device, make_generators, write_json
from ldm_edu.data import Scenes, make_prompts
from ldm_edu.grader import grade
from ldm_edu.ldm import load_first_stage
from ldm_edu.probing import caption_losses, colours_placed, mean_and_error, reverse_relation, swap_colours
from ldm_edu.reading import learn_to_read
from ldm_edu.recipes import DiffusionRecipe, all_captions, code_version, machine, train_diffusion, write_picture
from ldm_edu.schedule import schedule_from_config
from ldm_edu.training import TrainConfig
from ldm_edu.unet import UNet, UNetConfig

BASE = UNetConfig(6, 4, 32, (1, 1), 1, (1, 2), heads=2, context_dim=64, num_groups=2)  # 6: latent and coordinates
TRAIN = TrainConfig(batch_size=32, lr=1.5e-3, weight_decay=1e-4, warmup_steps=100, final_lr_fraction=0.0, ema_decay=0.995,
                    precision="auto", log_every=100, save_every=500, keep=1)
ASKED = {"single": ("colour", "shape", "pair"), "relation": ("colour", "shape", "binding", "relation"), "held_out": ("colour", "shape", "pair")}


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
    coordinates: bool = True  # two maps beside the latent say where each place is


NO_CROSS = dict(cross_levels=())  # the transformers stay, and read nothing
VARIANTS = (
    Variant("base", "cross-attention everywhere"),
    Variant("way", "nothing", (), NO_CROSS),
    Variant("way", "maps beside the input", ("maps",), NO_CROSS),
    Variant("way", "vector added to time", ("vector",), NO_CROSS),
    Variant("way", "vector modulates (AdaGN)", ("vector",), {**NO_CROSS, "use_scale_shift_norm": True}),
    Variant("way", "cross-attention and vector", ("tokens", "vector")),
    Variant("places", "no coordinates", coordinates=False),
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
    coordinates: bool = True


def in_maps(config) -> int:
    """Channels that a variant or its conditioner lays beside the latent."""
    return 2 * config.coordinates + (8 if "maps" in config.ways else 0)


class WaysConditioner(TextConditioner):
    """Tokens as ever; and the vector of the whole caption beside them, on the time embedding or as constant maps; and where places are."""

    config_class = WaysConfig

    def __init__(self, config: WaysConfig, tokenizer):
        super().__init__(config.replace(pooled=bool({"vector", "maps"} & set(config.ways))), tokenizer)
        self.c_dim = config.width if "vector" in config.ways else None
        self.to_maps = torch.nn.Linear(config.width, 8) if "maps" in config.ways else None
        self.concat_channels = in_maps(config)
        steps = (torch.arange(8) - 3.5) / 2.3  # coordinates of about unit variance
        self.register_buffer("coordinates", torch.stack(torch.meshgrid(steps, steps, indexing="ij"))[None])

    def _sent(self, told: Condition) -> Condition:
        maps = [self.coordinates.expand(len(told.context), -1, -1, -1)] if self.config.coordinates else []
        if self.to_maps is not None:
            maps.append(self.to_maps(told.c)[:, :, None, None].expand(-1, -1, 8, 8))
        return Condition(told.context, told.context_mask, told.c if self.c_dim else None, torch.cat(maps, 1) if maps else None)

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
    config = BASE.replace(**variant.unet, context_dim=variant.width, in_channels=4 + in_maps(variant),
                          c_dim=variant.width if "vector" in variant.ways else None)
    widths = range(16, 65, max(2, heads))
    return min((config.replace(model_channels=w) for w in widths), key=lambda c: abs(count(c) - count(BASE)))


def make_conditioner(variant: Variant, captions: list[str], seed: int) -> WaysConditioner:
    """The variant's text encoder, taught to read and frozen where the variant says so."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(captions)
    out = WaysConditioner(WaysConfig(variant.width, ways=variant.ways, coordinates=variant.coordinates), tokenizer)
    if "reading" in variant.encoder:
        learn_to_read(out.train(), captions, seed=seed)
    out.encoder.requires_grad_("frozen" not in variant.encoder)
    return out


def ordered(variant: Variant):
    """While it is open, transformers are built with the variant's order of layers."""
    swap = mock.patch.object(attention, "TransformerBlock", FeedForwardFirst)
    return swap if variant.block.startswith("feed") else contextlib.nullcontext()


def training_scenes(args):
    """Scenes of one or two objects, half of them two with their relation."""
    return with_relations(lambda split, n: Scenes(n=n, split=split, objects=(1, 2), fields=("image", "caption")), args.scenes, 0.5)


class Worth:
    """What captions are worth to a model: how much its error grows when it is told something else, at the same steps and noises.

    Four captions for each of `n` unseen scenes of two objects: its own; another scene's; its own with the colours exchanged
    (the same words, bound otherwise); its own with the relation reversed.
    """

    def __init__(self, first_stage, n: int = 256):
        pool = Scenes(n=8 * n, split="validation", objects=(2, 2), fields=("image", "caption"))
        fits = lambda claim: claim.relation is not None and claim.objects[0].colour != claim.objects[1].colour
        rows = [i for i, caption in enumerate(pool.captions()) if fits(parse_caption(caption))][:n]
        batch = pool.render(rows)
        own = batch["caption"]
        self.captions = {"own": own, "another": own[1:] + own[:1], "swapped": [swap_colours(c) for c in own], "reversed": [reverse_relation(c) for c in own]}
        with torch.no_grad():
            self.z = first_stage.encode(batch["image"].to(next(first_stage.parameters()).device)).mode()
        self.eps = torch.stack([torch.randn(self.z.shape[1:], generator=g) for g in make_generators(0, n)]).to(self.z)
        self.t = torch.linspace(0, 999, n).long()[torch.randperm(n, generator=torch.Generator().manual_seed(0))].to(self.z.device)

    def __call__(self, net, schedule, scale_factor: float) -> dict:
        """{"loss": with the own captions, "caption", "binding", "relation": [what it grows by, standard error]}."""
        was_training = net.training
        losses = caption_losses(net.eval(), self.z * scale_factor, self.captions, schedule, self.t, self.eps)
        net.train(was_training)
        grown = {key: mean_and_error(losses[name] - losses["own"]) for key, name in (("caption", "another"), ("binding", "swapped"), ("relation", "reversed"))}
        return {"loss": round(losses["own"].mean().item(), 5), **{key: [round(x, 5) for x in values] for key, values in grown.items()}}


def measure(model, args) -> dict:
    """Of every kind of prompt, how many pictures show what was asked, by what was asked."""
    out = {}
    for kind, asked in ASKED.items():
        prompts = make_prompts(4 * args.prompts, seed=4321, kind=kind)
        prompts = [p for p in prompts if len({o.colour for o in parse_caption(p).objects}) == len(parse_caption(p).objects)][: args.prompts]
        images = model.sample(prompts, steps=15, guidance_scale=args.guidance, seed=99)
        grades = grade(images, prompts).summary()
        out[kind] = {"n": len(prompts), **{key: grades[key]["correct"] for key in asked}}
        if kind == "relation":
            out[kind]["placed"] = sum(colours_placed(images, prompts))
    return out


def run_one(variant: Variant, seed: int, args, data, worth: Worth) -> dict:
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
    recipe, curve = DiffusionRecipe(step_bias=1.6, train=TRAIN), out / "worth.jsonl"  # one line for each measurement, so that a run that goes on keeps them
    schedule = schedule_from_config(recipe.schedule)

    def watch(report):
        if report.step % args.measure_every == 0:
            scale = json.loads((out / "run.json").read_text())["task"]["model"]["scale_factor"]
            with curve.open("a") as file:
                file.write(json.dumps({"step": report.step, **worth(report.ema, schedule, scale)}) + "\n")

    with ordered(variant):
        conditioner = make_conditioner(variant, all_captions(data), seed)
        stage = load_first_stage("scenes-kl-f4").to(default_device())
        model = train_diffusion(data, stage, recipe, out, conditioner=conditioner, unet=unet, steps=args.steps, seed=seed, progress=False, callbacks=[watch])
    parameters = {"unet": sum(p.numel() for p in model.net.unet.parameters()), "text": sum(p.numel() for p in model.net.conditioner.parameters())}
    row = {"group": variant.group, "name": variant.name, "seed": seed, "steps": args.steps, "width": config.model_channels, "parameters": parameters,
           "worth": list({line["step"]: line for line in map(json.loads, curve.read_text().splitlines())}.values()), "grades": measure(model, args), "minutes": round((time.monotonic() - start) / 60, 1)}
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
            net, read = UNet(sized(variant)), make_conditioner(Variant("", "", variant.ways, width=variant.width, encoder="joint from nothing", coordinates=variant.coordinates), captions, 0)
        read.encoder.requires_grad_("frozen" not in variant.encoder)
        tokens = read.tensors({"caption": captions[: TRAIN.batch_size]})
        weights = [p for p in [*net.parameters(), *read.parameters()] if p.requires_grad]
        x, t = torch.randn(TRAIN.batch_size, 4, 8, 8), torch.randint(1000, (TRAIN.batch_size,))

        def forward(net=net, read=read, x=x, t=t, tokens=tokens):
            told = read(tokens)
            maps = [] if told.concat is None else [told.concat]
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
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--scenes", type=int, default=20_000)
    parser.add_argument("--prompts", type=int, default=192, help="of each kind")
    parser.add_argument("--measure-every", type=int, default=125, help="steps between two measurements of what captions are worth")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="variants by name; all by default")
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--costs", action="store_true", help="measure seconds and bytes of a step, and train nothing")
    parser.add_argument("--rounds", type=int, default=40, help="timed steps of each variant")
    args = parser.parse_args()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    if args.costs:
        write_json(out / "costs.json", {"batch_size": TRAIN.batch_size, "machine": machine(), "rows": measure_costs(args)})
    else:
        data, worth = training_scenes(args), Worth(load_first_stage("scenes-kl-f4").to(default_device()))
        for seed in args.seeds:
            for variant in [v for v in VARIANTS if args.only is None or v.name in args.only]:
                print(json.dumps(run_one(variant, seed, args, data, worth)), flush=True)
    rows = [json.loads(path.read_text()) for path in sorted(out.glob("*/result.json"))]
    costs = json.loads((out / "costs.json").read_text()) if (out / "costs.json").exists() else None
    settings = {key: getattr(args, key) for key in ("steps", "scenes", "prompts", "guidance", "measure_every")}
    write_json(out / "ablation.json", {"settings": settings, "train": TRAIN.to_dict(), "machine": machine(), "commit": code_version(), "rows": rows, "costs": costs})


if __name__ == "__main__":
    main()
