"""How near the demo model is to the real ones: `python -m bench.nearness`.

What decides how well a run can be shortened, measured without ToPi, by ComfyUI's own hooks: what fewer steps cost, what
a velocity that is held, or extrapolated, over skipped steps costs, what EasyCache costs, how far the references' keys
and values drift from the first step's, how much the velocity turns from step to step, and how much of the picture's
attention the references receive. The table sets each figure beside a published one of a real model. A row of the
results is one kind of edit, written as soon as it is measured: an interrupted benchmark goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from topi_core.metrics import psnr
from topi_demo import codec, text
from topi_demo.edits import GRAMMAR, GROUPS, OPEN, caption
from topi_demo.evaluate import SIDE, Edits, edit, held_out
from topi_demo.model import ARCHITECTURE, WEIGHTS
from topi_demo.provenance import read, setting
from topi_demo.runtime import use_comfyui
from topi_demo.scenes import draw, random_scene

RESULTS = Path(__file__).resolve().parent / "results" / "nearness.jsonl"
CAPTIONS = "text to image"  # beside the kinds of edit
LAYERS = ARCHITECTURE["depth"] + ARCHITECTURE["depth_single_blocks"]

# Figures of real models, and where they are from.
PUBLISHED = {
    "half": ("30.6", "Qwen-Image, text to image, 50 steps (LinCa, table 2)"),
    "fifth": ("28.6", "the same"),
    "key quarter": ("0.35", "MiniMax-H3, 50 steps (vLLM-Omni RFC 6491)"),
    "value quarter": ("0.51", "the same"),
    "key end": ("0.51", "the same; 0.94 in the layer that drifts most"),
    "value end": ("0.67", "the same; 1.10 in the layer that drifts most"),
    "cosine": ("about 1", "FLUX.1 Kontext, 28 steps (RegionE)"),
    "norm": ("0.991 to 1.008", "FLUX.1 Kontext, steps 5 to 27 of 28 (from RegionE's constants)"),
    "share": ("below 0.3", "FLUX.1 Kontext (ToPi, 2602.01609, figures 1 and 3)"),
}


def captions(count: int, side: int = SIDE) -> Edits:
    """Held-out pictures from text alone; the expected image is one of many."""
    scenes = [random_scene(random.Random(f"held out caption {i}")) for i in range(count)]
    return Edits(CAPTIONS, [caption(s) for s in scenes], [], torch.stack([draw(s, side) for s in scenes]))


@dataclass
class AttentionRecord:
    """An attention override that measures, for every step and layer, means over the images.

    keys, values: relative L2 distance of the references' keys and values to the first step's.
    shares: share of the picture's attention that the references receive.
    """

    target: int  # tokens of the picture
    keys: list[list[float]] = field(default_factory=list)  # [step][layer]
    values: list[list[float]] = field(default_factory=list)
    shares: list[list[float]] = field(default_factory=list)
    first: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # [layer]

    def __call__(self, attention: Callable, q: Tensor, k: Tensor, v: Tensor, heads: int, *args, **options):
        place = options["transformer_options"]
        if place["block_type"] == "double" and place["block_index"] == 0:
            for course in (self.keys, self.values, self.shares):
                course.append([])
        start = text.LENGTH + self.target  # of the references; q, k, v are [B, H, text | picture | references, D]
        if k.shape[2] > start:
            if len(self.first) < LAYERS:
                self.first.append((k[:, :, start:].clone(), v[:, :, start:].clone()))
            layer = len(self.keys[-1])
            for course, now, then in zip((self.keys, self.values), (k, v), self.first[layer], strict=True):
                course[-1].append(_distance(now[:, :, start:], then).mean().item())
            logits = q[:, :, text.LENGTH : start] @ k.mT * q.shape[-1] ** -0.5  # [B, H, T, S]
            self.shares[-1].append(logits.softmax(-1)[..., start:].sum(-1).mean().item())
        return attention(q, k, v, heads, *args, **options)


def _distance(now: Tensor, then: Tensor) -> Tensor:
    return (now - then).flatten(1).norm(dim=1) / then.flatten(1).norm(dim=1)


@dataclass
class Velocities:
    """A wrapper of ComfyUI's model call that keeps the velocities [B, C, h, w] and may put others in their place.

    computed: the steps at which the model runs, all where it is None. At the others stands the last velocity, or the
    line through the last two over sigma.
    """

    computed: frozenset[int] | None = None
    linear: bool = False
    step: int = 0
    kept: list[tuple[float, Tensor]] = field(default_factory=list)

    def __call__(self, apply_model: Callable, call: dict) -> Tensor:
        x, sigma = call["input"], call["timestep"].flatten()[0].item()
        if self.computed is None or self.step in self.computed:
            denoised = apply_model(x, call["timestep"], **call["c"])
            self.kept.append((sigma, (x - denoised) / sigma))
        else:
            denoised = x - sigma * self._forecast(sigma)
        self.step += 1
        return denoised

    def _forecast(self, sigma: float) -> Tensor:
        (*_, (newest, v)) = self.kept
        if not self.linear or len(self.kept) < 2:
            return v
        older, w = self.kept[-2]
        return v + (sigma - newest) / (newest - older) * (v - w)


def some_steps(steps: int, every: int) -> frozenset[int]:
    """The first three, the last two, and every so many between them."""
    return frozenset((0, 1, 2, *range(2, steps, every), steps - 2, steps - 1))


def measure_kind(objects: tuple, batch: Edits, seed: int, steps: int, cfg: float) -> dict:
    """The figures of one batch of edits, as plain values."""
    model, clip, vae = objects
    side = batch.expected.shape[-1]

    def run(steps: int, velocities: Velocities | None = None, listen: Callable | None = None) -> Tensor:
        base = model
        if velocities is not None:
            base = model.clone()
            base.set_model_unet_function_wrapper(velocities)
        return edit((base, clip, vae), batch, seed, steps, cfg=cfg, listen=listen)

    record, velocities = AttentionRecord((side // 16) ** 2), Velocities()
    # with CFG a step is two conditionings in one call, of which the record would take the mean
    full = run(steps, velocities, listen=record if cfg == 1 else None)
    plain = {n: run(n) for n in sorted({4, 8, round(steps / 5), steps // 2, 20}) if n < steps} | {steps: full}
    skipped = {}
    for every, linear in ((2, False), (2, True), (4, True)):
        some = Velocities(some_steps(steps, every), linear)
        skipped[f"{'linear' if linear else 'held'} {len(some.computed)}"] = _decibels(run(steps, some), full)
    neighbours = list(zip(velocities.kept, velocities.kept[1:], strict=False))
    coded = codec.decode(codec.encode(batch.expected))
    determined = batch.kind != CAPTIONS and GRAMMAR[batch.kind][0] != OPEN
    return {
        "plain": {str(n): _decibels(image, full) for n, image in plain.items() if n != steps},
        "to_expected": {str(n): _decibels(image, coded) for n, image in plain.items()} if determined else {},
        "skipped": skipped,
        "keys": record.keys,
        "values": record.values,
        "share": record.shares,
        "cosine": [_cosine(a, b).mean().item() for (_, a), (_, b) in neighbours],
        "norm": [(b.flatten(1).norm(dim=1) / a.flatten(1).norm(dim=1)).mean().item() for (_, a), (_, b) in neighbours],
    }


def _decibels(image: Tensor, wanted: Tensor) -> list[float]:
    return [round(v, 2) for v in psnr(image, wanted).clamp(max=100).tolist()]


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return torch.cosine_similarity(a.flatten(1), b.flatten(1))


def measure(
    count: int, seed: int, steps: int, side: int, cfg: float, kinds: list[str], weights: Path, done: set[tuple]
):
    """Rows of the kinds that are not in `done`."""
    use_comfyui()
    from topi_demo.comfy_model import load

    objects, where = load(weights), setting(weights)
    for kind in kinds:
        row = {
            "what": "nearness",
            "kind": kind,
            "group": CAPTIONS if kind == CAPTIONS else GRAMMAR[kind][0],
            "edits": count,
            "steps": steps,
            "side": side,
            "cfg": cfg,
        }
        if key(row | where) in done:
            continue
        started = time.monotonic()
        batch = captions(count, side) if kind == CAPTIONS else held_out(kind, count, side=side)
        row |= measure_kind(objects, batch, seed, steps, cfg)
        yield row | {"references": len(batch.references), "seconds": round(time.monotonic() - started, 1), **where}


def key(row: dict) -> tuple:
    return tuple(row[name] for name in ("kind", "edits", "steps", "side", "cfg", "weights"))


def markdown(rows: list[dict]) -> str:
    """One table per setting: a column for each group of edits, and the published figure with its source."""
    settings = dict.fromkeys((row["steps"], row["side"], row["cfg"]) for row in rows)
    return "\n\n".join(
        "\n".join(table([row for row in rows if (row["steps"], row["side"], row["cfg"]) == s])) for s in settings
    )


def table(rows: list[dict]) -> list[str]:
    present = [g for g in (*GROUPS, CAPTIONS) if any(row["group"] == g for row in rows)]
    steps, side, cfg = (rows[0][name] for name in ("steps", "side", "cfg"))
    lines = [
        f"| {steps} steps, {side} pixels, CFG {cfg:g} | " + " | ".join(present) + " | published | of |",
        "|---" * (len(present) + 3) + "|",
    ]
    for name, published, cell in _lines(rows[0]):
        cells = [cell([row for row in rows if row["group"] == group]) for group in present]
        lines.append(f"| {name} | " + " | ".join(cells) + " | " + " | ".join(PUBLISHED.get(published, ("", ""))) + " |")
    return lines


def _lines(first: dict) -> Iterator[tuple[str, str, Callable[[list[dict]], str]]]:
    """Name, key of the published figure, and what makes a cell of the rows of a group."""
    steps = first["steps"]

    def decibels(*path: str) -> Callable[[list[dict]], str]:
        def cell(rows: list[dict]) -> str:
            found = [_at(row, path) for row in rows]
            values = [v for some in found if some for v in some]
            return f"{fmean(values):.1f}" if values else ""

        return cell

    def number(name: str, part: slice, digits: int = 2) -> Callable[[list[dict]], str]:
        def cell(rows: list[dict]) -> str:
            courses = [[fmean(s) if isinstance(s, list) else s for s in row[name] if s != []][part] for row in rows]
            values = [v for course in courses for v in course]
            return f"{fmean(values):.{digits}f}" if values else ""

        return cell

    for n in first["plain"]:
        known = {steps // 2: "half", round(steps / 5): "fifth"}.get(int(n), "")
        yield f"plain, {n} steps, dB to the full run", known, decibels("plain", n)
    for name in first["skipped"]:
        yield f"{name} of {steps} computed, dB", "", decibels("skipped", name)
    for n in first["to_expected"] or (str(n) for n in (4, 8, steps)):
        yield f"dB to the expected image, {n} steps", "", decibels("to_expected", n)
    quarter = slice(steps // 4, steps // 4 + 1)  # of [step][layer]
    for kind, name in (("key", "keys"), ("value", "values")):
        yield f"drift of the references' {name}, a quarter", f"{kind} quarter", number(name, quarter)
        yield f"drift of the references' {name}, the last step", f"{kind} end", number(name, slice(-1, None))
    yield "cosine of neighbouring velocities", "cosine", number("cosine", slice(None), 4)
    yield "ratio of their norms from step 5 on", "norm", number("norm", slice(4, None), 3)
    yield "references' share of the attention", "share", number("share", slice(None))


def _at(row: dict, path: tuple[str, ...]):
    for name in path:
        row = row.get(name) if row else None
    return row


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.nearness", description=__doc__.splitlines()[0])
    kinds = [*GRAMMAR, CAPTIONS]
    parser.add_argument("-n", type=int, default=16, help="held-out edits of each kind")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--side", type=int, default=SIDE, help="pixels; 16 make a token")
    parser.add_argument("--cfg", type=float, default=1.0)
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds, metavar="KIND")
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only print the tables of the results that are there")
    args = parser.parse_args()
    if not args.table:
        done = {key(row) for row in read(args.out)}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        settings = args.n, args.seed, args.steps, args.side, args.cfg, args.kinds, args.weights, done
        with torch.inference_mode(), args.out.open("a", encoding="utf-8") as file:
            for row in measure(*settings):
                file.write(json.dumps(row, separators=(",", ":")) + "\n")
                file.flush()
                print(f"{row['kind']:13}  half the steps {fmean(row['plain'][str(args.steps // 2)]):5.1f} dB, "
                      f"{row['seconds']:.0f} s", flush=True)  # fmt: skip
    print(markdown(read(args.out)))


if __name__ == "__main__":
    main()
