"""Trains the demo model from scratch: `python -m topi_demo.train` (resumes where it was interrupted).

Rectified flow on the codec's latents, jointly on text-to-image and on editing with one to three references:
trained on editing alone, a model copies every reference token and nothing about it is redundant. Beside it, a small
head that is thrown away asks the references' hidden states which shape they are of, and whether the instruction names
it: without that, 7,000 steps later "make the circle red" still painted everything red.
Needs ComfyUI on the path (`make train` sees to that); runs on two CPU cores, or on a GPU where there is one.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from . import codec, edits, text
from .model import ARCHITECTURE, SHIFT, TEXT_ENCODER, WEIGHTS
from .runtime import use_comfyui
from .scenes import SHAPES, coverage, draw, random_scene

# Share of the batches by what they hold: (references, side in pixels, batch relative to the 128 pixel one) -> weight.
BATCHES = {
    (0, 128, 1.3): 0.16,
    (1, 128, 1.0): 0.58,
    (2, 128, 0.65): 0.10,
    (3, 128, 0.45): 0.09,
    (0, 256, 0.30): 0.02,
    (1, 256, 0.20): 0.04,
    (2, 256, 0.13): 0.01,
}
# Share of the edits by how many references they have.
KINDS = {
    1: {
        "recolour": 10, "remove": 7, "replace": 8, "move": 9, "background": 6, "night": 3, "invert": 4,
        "blur": 3, "shift": 4, "zoom": 7, "winter": 2, "autumn": 2, "keep": 2,
        "add": 9, "something": 7, "front": 8, "snow": 6, "stars": 6, "fog": 6, "zoom out": 8, "painting": 7,
    },
    2: {"put": 5, "put ground": 4, "somewhere": 4},
    3: {"put two": 5, "put both": 3, "two somewhere": 3},
}  # fmt: skip
# How much more a latent cell counts where a local edit changes it. It makes the changed cells likelier than they are,
# which is harmless only where there is one right answer.
LOCAL_WEIGHT, OPEN_WEIGHT = 5.0, 2.0
DROP_TEXT = 0.1
HINT_LAYER = 2  # the single block whose output the head reads
HINT_WEIGHT = 0.1
RANK = 16  # of the modulation matrices
COVERED = 0.3  # a token is of a shape that covers as much of it
# Which object an edit means is decided while the picture is still noise: later, the noisy target itself shows it.
EARLY_SHARE, EARLY = 0.25, 0.7  # so this share of the edits is seen at times from here to 1

CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True)
class Batch:
    """Latents [B, 16, h, w], their references, tokens [B, X] and the weight of every cell [B, 1, h, w].

    Of the references' tokens [B, C]: the number of the shape they are of, 0 for none, and whether it is named, which is
    -1 where no shape is.
    """

    target: Tensor
    references: tuple[Tensor, ...]
    tokens: Tensor
    weight: Tensor
    shapes: Tensor
    named: Tensor

    def to(self, device: str) -> Batch:
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return Batch(
            **{k: tuple(x.to(device) for x in v) if k == "references" else v.to(device) for k, v in moved.items()}
        )


def batches(seed: int, size: int) -> Iterator[Batch]:
    """An endless stream; the same seed gives the same stream."""
    rng = random.Random(seed)
    while True:
        references, side, relative = rng.choices(list(BATCHES), list(BATCHES.values()))[0]
        rows, images, sentences, hints, weights = max(2, round(size * relative)), [], [], [], []
        for _ in range(rows):
            if references == 0:
                scene = random_scene(rng)
                images.append((draw(scene, side),))
                sentences.append(edits.caption(scene))
                hints.append(torch.zeros(2, 0, dtype=torch.long))
                weights.append(1.0)
                continue
            kind = rng.choices(list(KINDS[references]), list(KINDS[references].values()))[0]
            weights.append(OPEN_WEIGHT if edits.GRAMMAR[kind][0] == edits.OPEN else LOCAL_WEIGHT)
            example = edits.example(rng, edits.random_edit(rng, kind), side)
            images.append((example.expected, *example.references))
            sentences.append(str(example.edit) if rng.random() > DROP_TEXT else "")
            hints.append(_hints(example, side // (codec.BLOCK * ARCHITECTURE["patch_size"]), bool(sentences[-1])))
        tokens = torch.tensor([text.tokenize(s) for s in sentences])
        target, *refs = (codec.encode(torch.stack(column)) for column in zip(*images, strict=True))
        shapes, named = torch.stack(hints, 1)
        yield Batch(target, tuple(refs), tokens, _cell_weight(target, refs, torch.tensor(weights)), shapes, named)


def _hints(example: edits.Example, grid: int, told: bool) -> Tensor:
    """Shapes and named, as in `Batch`, of one row: [2, C]."""
    words = example.edit.words
    first, *donors = range(len(example.scenes))
    asked = dict(zip(donors or [first], (words.get("shape"), words.get("other")), strict=False))
    hints = []
    for number, scene in enumerate(example.scenes):
        covers = torch.stack(
            [torch.full((grid, grid), COVERED), *(coverage(o, grid, scene.zoom) for o in scene.objects)]
        )
        shape = torch.tensor([0, *(1 + SHAPES.index(o.shape) for o in scene.objects)])[covers.argmax(0)]
        wanted = 1 + SHAPES.index(asked[number]) if asked.get(number) else -1
        named = (shape == wanted).long() if told and "shape" in words else torch.full_like(shape, -1)
        hints.append(torch.stack((shape, named)).flatten(1))
    return torch.cat(hints, 1)


def _cell_weight(target: Tensor, references: list[Tensor], changed_weight: Tensor) -> Tensor:
    if not references:
        return torch.ones_like(target[:, :1])
    changed = ((target - references[0]).abs().amax(1, keepdim=True) > 0.05).float()
    local = (changed.mean((1, 2, 3), keepdim=True) < 0.5).float()
    weight = 1 + (changed_weight[:, None, None, None] - 1) * changed * local
    return weight / weight.mean((1, 2, 3), keepdim=True)


class LowRankLinear(nn.Module):
    """Linear layer whose weight is `up @ down`: [out, RANK] @ [RANK, in]."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.down = nn.Parameter(linear.weight.detach()[:RANK].clone())
        self.up = nn.Parameter(torch.zeros(linear.out_features, RANK))
        self.bias = nn.Parameter(torch.zeros(linear.out_features))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.down.mT @ self.up.mT + self.bias


class _TrainingOps:
    """The `operations` that ComfyUI's Flux is built from, fit for a backward pass.

    Flux adds to its hidden states in place, so a layer norm must not keep them for its gradient.
    """

    Linear = nn.Linear
    RMSNorm = nn.RMSNorm

    class LayerNorm(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.clone())


def new_model() -> nn.Module:
    """A fresh, trainable Flux with low-rank modulation, in float32."""
    use_comfyui()
    import comfy.ldm.flux.model
    import comfy.model_management

    comfy.model_management.in_training = True  # plain RoPE, which has a gradient
    model = comfy.ldm.flux.model.Flux(dtype=torch.float32, device="cpu", operations=_TrainingOps, **ARCHITECTURE)
    for module in list(model.modules()):
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    for block in model.double_blocks:
        block.img_mod.lin = LowRankLinear(block.img_mod.lin)
        block.txt_mod.lin = LowRankLinear(block.txt_mod.lin)
    for block in model.single_blocks:
        block.modulation.lin = LowRankLinear(block.modulation.lin)
    model.final_layer.adaLN_modulation[1] = LowRankLinear(model.final_layer.adaLN_modulation[1])
    nn.init.zeros_(model.final_layer.linear.weight)
    return model


def storable(model: nn.Module, words: text.TextEncoder) -> dict[str, Tensor]:
    """Both state dicts as one, in float16, as the weight file holds them."""
    tensors = dict(model.state_dict()) | {TEXT_ENCODER + k: v for k, v in words.state_dict().items()}
    return {k: v.to(torch.float16).contiguous() for k, v in tensors.items()}


def restore(model: nn.Module, words: text.TextEncoder, tensors: dict[str, Tensor]) -> None:
    """Puts what `storable` gave back into a trainable model and its text encoder; words it lacks stay as they are."""
    model.load_state_dict({k: v for k, v in tensors.items() if not k.startswith(TEXT_ENCODER)})
    kept = {k.removeprefix(TEXT_ENCODER): v for k, v in tensors.items() if k.startswith(TEXT_ENCODER)}
    known, fresh = kept["word.weight"], words.word.weight.detach()
    words.load_state_dict(kept | {"word.weight": torch.cat((known.to(fresh), fresh[len(known) :]))})


class Hint(nn.Module):
    """Listens to a block, and tells what the references' hidden states should know."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.norm = nn.LayerNorm(ARCHITECTURE["hidden_size"])
        self.head = nn.Linear(ARCHITECTURE["hidden_size"], 1 + len(SHAPES) + 1)
        self.heard: Tensor | None = None
        model.single_blocks[HINT_LAYER].register_forward_hook(lambda block, args, out: setattr(self, "heard", out))

    def loss(self, batch: Batch) -> Tensor:
        """Cross-entropy of the shapes, and of what is named where something is; background counts for less."""
        out = self.head(self.norm(self.heard[:, -batch.shapes.shape[1] :].float())).float()
        background = torch.tensor([0.2] + [1.0] * len(SHAPES), device=out.device)
        shapes = F.cross_entropy(out[..., :-1].flatten(0, 1), batch.shapes.flatten(), background)
        told = batch.named.flatten() >= 0
        if not told.any():
            return shapes
        logit, named = out[..., -1].flatten()[told], batch.named.flatten()[told].float()
        return shapes + F.binary_cross_entropy_with_logits(
            logit, named, pos_weight=torch.tensor(5.0, device=out.device)
        )


def loss_of(model: nn.Module, words: text.TextEncoder, batch: Batch, generator: torch.Generator) -> Tensor:
    """Rectified-flow loss: the network predicts noise - image at a logit-normal, shifted time, or at an early one."""
    rows, device = len(batch.target), batch.target.device
    u = torch.sigmoid(torch.randn(rows, generator=generator))
    sigma = SHIFT * u / (1 + (SHIFT - 1) * u)
    if batch.references:
        early = torch.rand(rows, generator=generator) < EARLY_SHARE
        sigma = torch.where(early, EARLY + (1 - EARLY) * torch.rand(rows, generator=generator), sigma)
    sigma = sigma.to(device)
    noise = torch.randn(batch.target.shape, generator=generator).to(device)
    guidance = 1 + 7 * torch.rand(rows, generator=generator).to(device)  # it means nothing to this model
    mixed = torch.lerp(batch.target, noise, sigma[:, None, None, None])
    context, pooled = words(batch.tokens)
    out = model(mixed, sigma, context, pooled, guidance, ref_latents=list(batch.references) or None)
    # the codec's channels carry unequal energy; half way between equal latents and equal pixels
    channel = torch.tensor(codec.STD, device=device).sqrt()
    channel = (channel / channel.mean())[:, None, None]
    return ((out.float() - (noise - batch.target)).square() * channel * batch.weight).mean()


def optimizers(model: nn.Module, words: nn.Module, hint: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for everything else."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "_blocks." in n and n.endswith(".weight")]
    chosen = {id(p) for p in matrices}
    rest = [p for m in (model, words, hint) for p in m.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


class Average:
    """Exponential moving average of all parameters, started at the first step."""

    def __init__(self, modules: list[nn.Module], decay: float):
        self.live = [p for m in modules for p in m.parameters()]
        self.mean = [p.detach().clone() for p in self.live]
        self.decay = decay

    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.mean, [p.detach() for p in self.live], 1 - decay)

    def swap(self) -> None:
        for p, mean in zip(self.live, self.mean, strict=True):
            kept = p.detach().clone()
            p.data.copy_(mean)
            mean.copy_(kept)


def drawn(seed: int, size: int, workers: int, repeat: int) -> Iterator[Batch]:
    """`batches`, drawn by other processes where there are some; each batch `repeat` times in a row."""
    stream = batches(seed, size) if not workers else iter(DataLoader(_Drawing(seed, size), None, num_workers=workers))
    for batch in stream:
        for _ in range(repeat):
            yield batch


class _Drawing(IterableDataset):
    """Of every process, a stream of its own."""

    def __init__(self, seed: int, size: int):
        self.seed, self.size = seed, size

    def __iter__(self) -> Iterator[Batch]:
        yield from batches(self.seed + 104_729 * get_worker_info().id, self.size)


def cut(path: Path, size: int) -> list[Path]:
    """Writes the file again in numbered pieces of at most `size` bytes; `cat FILE.? > FILE` joins them."""
    data = path.read_bytes()
    pieces = [path.with_name(f"{path.name}.{i}") for i in range(-(-len(data) // size))]
    for i, piece in enumerate(pieces):
        piece.write_bytes(data[i * size : (i + 1) * size])
    return pieces


def rate(done: float, warm: float = 0.01, flat: float = 0.45) -> float:
    """Learning rate over the share of training done: warm-up, plateau, linear to nothing."""
    if done < warm:
        return done / warm
    return 1.0 if done < flat else max(0.0, (1 - done) / (1 - flat))


class Training:
    """All that a checkpoint holds, and what is done with it."""

    def __init__(self, init: Path | None, lr: float, device: str, dtype: str):
        self.model, self.words = new_model().to(device), text.TextEncoder(device=device)
        nn.init.normal_(self.words.word.weight, std=0.5)
        nn.init.normal_(self.words.place.weight, std=0.3)
        if init:
            restore(self.model, self.words, load_file(init))
        self.hint = Hint(self.model).to(device)
        self.optims = optimizers(self.model, self.words, self.hint, lr)
        self.average = Average([self.model, self.words], 0.998)
        self.lr, self.device, self.dtype = lr, device, dtype
        self.number, self.spent = 0, 0.0  # steps and seconds so far

    def load(self, checkpoint: Path) -> None:
        state = torch.load(checkpoint, map_location=self.device, weights_only=True)
        self.number, self.spent, self.average.mean = state["step"], state["spent"], state["mean"]
        for name in ("model", "words", "hint"):
            getattr(self, name).load_state_dict(state[name])
        for optim, kept in zip(self.optims, state["optims"], strict=True):
            optim.load_state_dict(kept)

    def save(self, checkpoint: Path) -> None:
        state = {"step": self.number, "spent": self.spent, "mean": self.average.mean}
        state |= {name: getattr(self, name).state_dict() for name in ("model", "words", "hint")}
        state["optims"] = [optim.state_dict() for optim in self.optims]
        partial = checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(checkpoint)

    def write(self, path: Path, **settings: object) -> None:
        """The averaged weights as the weight file holds them; settings go into its metadata."""
        metadata = {"step": self.number, "hours": f"{self.spent / 3600:.2f}", **settings, "rank": RANK}
        metadata |= {"lr": self.lr, "architecture": json.dumps(ARCHITECTURE)}
        path.parent.mkdir(parents=True, exist_ok=True)
        self.average.swap()
        save_file(storable(self.model, self.words), path, {k: str(v) for k, v in metadata.items()})
        self.average.swap()

    def step(self, batch: Batch, generator: torch.Generator, done: float) -> tuple[float, float]:
        """One step at the share `done` of the training; the loss and the hint's."""
        for optim in self.optims:
            for group in optim.param_groups:
                group["lr"] = self.lr * rate(done)
        batch = batch.to(self.device)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.dtype == "bfloat16"):
            loss = loss_of(self.model, self.words, batch, generator)
        hinted = self.hint.loss(batch) if batch.references else torch.zeros(())
        (loss + HINT_WEIGHT * hinted).backward()
        nn.utils.clip_grad_norm_(self.average.live, 1.0)
        for optim in self.optims:
            optim.step()
            optim.zero_grad()
        self.average.update(self.number)
        self.number += 1
        return loss.item(), hinted.item()


class Log:
    """Losses as JSON lines, a line for every `EVERY` steps: their means, over all and by the number of references."""

    EVERY = 50

    def __init__(self, path: Path, step: int):
        self.path, self.losses, self.hints = path, [], []
        if path.exists():  # what came after the checkpoint is done again
            rows = path.read_text().splitlines()
            path.write_text("".join(row + "\n" for row in rows if json.loads(row)["step"] <= step))

    def add(self, step: int, hours: float, references: int, loss: float, hint: float) -> dict | None:
        """Takes up one step; the row, where one is full."""
        if not math.isfinite(loss):
            raise RuntimeError(f"the loss is not finite at step {step}")
        self.losses.append((references, loss))
        self.hints.append(hint)
        if step % self.EVERY:
            return None
        row = {"step": step, "hours": round(hours, 4), "loss": round(fmean(v for _, v in self.losses), 5)}
        for n in sorted({n for n, _ in self.losses}):
            row[f"loss_{n}_references"] = round(fmean(v for k, v in self.losses if k == n), 5)
        row["hint"] = round(fmean(self.hints), 4)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.losses, self.hints = [], []
        return row


def train(training: Training, args: argparse.Namespace, stopping: list) -> None:
    """Until the time is up, or until there is something in `stopping`; keeps checkpoints on the way."""
    log, checkpoint = Log(args.run / "train.jsonl", training.number), args.run / CHECKPOINT
    # a resumed run continues with a stream of its own; repeating the first one's scenes would teach nothing new
    seed = args.seed * 1_000_003 + training.number
    stream = drawn(seed, args.batch, args.workers, args.repeat)
    generator = torch.Generator().manual_seed(seed)
    total = 60 * args.minutes if args.minutes else 3600 * args.hours
    last, saved = time.monotonic(), training.spent
    while training.spent < total and not stopping:
        batch = next(stream)
        losses = training.step(batch, generator, training.spent / total)
        now = time.monotonic()
        training.spent, last = training.spent + now - last, now
        if row := log.add(training.number, training.spent / 3600, len(batch.references), *losses):
            print(f"{100 * training.spent / total:5.1f} %  {row}", flush=True)
        if training.spent - saved > args.save_every:
            training.save(checkpoint)
            training.write(args.run / "latest.safetensors", batch=args.batch, seed=args.seed)
            saved, last = training.spent, time.monotonic()
    training.save(checkpoint)


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m topi_demo.train", description=__doc__.splitlines()[0])
    parser.add_argument("--hours", type=float, default=2.0, help="training time, interruptions not counted")
    parser.add_argument("--minutes", type=float, help="the same in minutes")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the matrix products")
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="checkpoint, log and latest weights")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0, help="processes that draw; 0 draws between the steps")
    parser.add_argument("--repeat", type=int, default=1, help="steps, each with new noise, that every batch serves for")
    parser.add_argument("--init", type=Path, help="weight file to go on from, where there is no checkpoint")
    parser.add_argument("--save-every", type=float, default=180, metavar="SECONDS", help="between two checkpoints")
    parser.add_argument("--pieces", type=int, metavar="MIB", help="write the weights in pieces of at most as much, too")
    parser.add_argument("--finish", action="store_true", help="write the averaged weights of the checkpoint and stop")
    return parser


def main() -> None:
    args = options().parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    training, stopping = Training(args.init, args.lr, args.device, args.dtype), []
    args.run.mkdir(parents=True, exist_ok=True)
    if (args.run / CHECKPOINT).exists():
        training.load(args.run / CHECKPOINT)
        print(f"resumed at step {training.number}, {training.spent / 3600:.2f} h", flush=True)
    if not args.finish:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: stopping.append(number))
        train(training, args, stopping)
    if stopping:
        print(f"stopped at step {training.number}; the same command goes on from there", flush=True)
        return
    training.write(args.out, batch=args.batch, seed=args.seed)
    if args.pieces:
        cut(args.out, args.pieces << 20)


if __name__ == "__main__":
    main()
