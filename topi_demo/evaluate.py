"""Measures the demo model on held-out scenes: `make evaluate`; `ARGS=--table` prints the last results.

Quality of full-context edits against the image that was asked for, as the codec can show it and as it was drawn, the
same without the reference, and how much attention the reference receives in each layer (Eq. 3). Open edits have no one
right image: of them, as of all others, the run of half the steps is compared with the full run. ToPi takes no part in
it. Runs ComfyUI's sampler in process.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from topi_core.calibration import sensitivity
from topi_core.influence import attention_received
from topi_core.layout import Layout
from topi_core.metrics import psnr

from . import codec, edits, text
from .model import ARCHITECTURE, WEIGHTS
from .provenance import read, setting
from .runtime import use_comfyui

RESULTS = Path(__file__).resolve().parent.parent / "bench" / "results" / "demo_quality.jsonl"
SIDE, SAMPLER, SCHEDULER, GUIDANCE = 128, "euler", "simple", 2.5
TOKEN = codec.BLOCK * ARCHITECTURE["patch_size"]


@dataclass(frozen=True)
class Edits:
    """Held-out edits of one kind: references, each [B, 3, S, S], and what they should become."""

    kind: str
    instructions: list[str]
    references: list[Tensor]
    expected: Tensor


def held_out(kind: str, count: int, purpose: str = "held out", side: int = SIDE) -> Edits:
    """Their seeds are words, so no stream of the training, whose seeds are numbers, holds the same scenes.

    Each purpose has scenes of its own; they are the same at every size.
    """
    examples = []
    for i in range(count):
        rng = random.Random(f"{purpose} {kind} {i}")
        examples.append(edits.example(rng, edits.random_edit(rng, kind), side))
    references = [torch.stack(column) for column in zip(*(e.references for e in examples), strict=True)]
    return Edits(kind, [str(e.edit) for e in examples], references, torch.stack([e.expected for e in examples]))


class AttentionShare:
    """Listens to ComfyUI's attention: the share of the target's attention that the references receive.

    That is the context sensitivity. `shares[step][layer]` is its mean over the images.
    """

    def __init__(self, layout: Layout):
        self.layout = layout
        self.shares: list[dict[int, float]] = []

    def __call__(self, attention: Callable, q: Tensor, k: Tensor, v: Tensor, heads: int, *args, **options):
        place = options["transformer_options"]
        layer = place["block_index"] + (ARCHITECTURE["depth"] if place["block_type"] == "single" else 0)
        if layer == 0:
            self.shares.append({})
        received = attention_received(q, k, self.layout)  # [B, H, C]
        self.shares[-1][layer] = sensitivity(received, self.layout).mean().item()
        return attention(q, k, v, heads, *args, **options)


def edit(
    objects: tuple,
    batch: Edits,
    seed: int,
    steps: int,
    with_references: bool = True,
    listen: Callable | None = None,
    cfg: float = 1.0,
    negative: str = "",
) -> Tensor:
    """All edits of the batch in one run of ComfyUI's sampler -> images [B, 3, S, S].

    listen: called in place of ComfyUI's attention, as an attention override. cfg above 1 runs a second, negative
    conditioning with the same references, as Qwen-Image-Edit does.
    """
    import comfy.sample

    model, clip, vae = objects
    references = [vae.encode(image.movedim(1, -1)) for image in batch.references] if with_references else []

    def conditioning(sentences: list[str]) -> list:
        encoded = [clip.encode_from_tokens(clip.tokenize(words), return_pooled=True) for words in sentences]
        values = {"pooled_output": torch.cat([pooled for _, pooled in encoded]), "guidance": GUIDANCE}
        if references:
            values["reference_latents"] = references
        return [[torch.cat([features for features, _ in encoded]), values]]

    cond = conditioning(batch.instructions)
    uncond = conditioning([negative] * len(batch.instructions)) if cfg > 1 else cond
    if listen is not None:
        model = model.clone()
        model.model_options["transformer_options"]["optimized_attention_override"] = listen
    side = batch.expected.shape[-1] // codec.BLOCK
    empty = torch.zeros(len(batch.instructions), codec.CHANNELS, side, side)
    noise = comfy.sample.prepare_noise(empty, seed)
    latent = comfy.sample.sample(
        model, noise, steps, cfg, SAMPLER, SCHEDULER, cond, uncond, empty, disable_pbar=True, seed=seed
    )
    return vae.decode(latent).movedim(-1, 1)


def measure(count: int, seed: int, steps: int, kinds: list[str], weights: Path = WEIGHTS) -> Iterator[dict]:
    """One row per kind of edit, then one row per layer for the kinds with one reference."""
    use_comfyui()
    from .comfy_model import load

    objects = load(weights)
    where = setting(weights) | {
        "sampling": {"sampler": SAMPLER, "scheduler": SCHEDULER, "steps": steps, "side": SIDE, "seed": seed},
        "edits": count,
    }
    grid = (SIDE // TOKEN, SIDE // TOKEN)
    by_layer: list[list[dict[int, float]]] = []
    with torch.inference_mode():
        for kind in kinds:
            batch, started = held_out(kind, count), time.monotonic()
            listen = AttentionShare(Layout(text.LENGTH, grid, (grid,) * len(batch.references)))
            full = edit(objects, batch, seed, steps, listen=listen)
            seconds = time.monotonic() - started
            half = edit(objects, batch, seed, steps // 2)
            determined = edits.GRAMMAR[kind][0] != edits.OPEN
            blind = edit(objects, batch, seed, steps, with_references=False) if determined else None
            coded = codec.decode(codec.encode(batch.expected))
            if len(batch.references) == 1:
                by_layer.append(listen.shares)
            yield {
                "what": "quality",
                "kind": kind,
                "group": edits.GRAMMAR[kind][0],
                "references": len(batch.references),
                "psnr": psnr(full, coded).tolist() if determined else [],
                "psnr_without_reference": psnr(blind, coded).tolist() if determined else [],
                "psnr_to_drawn": psnr(full, batch.expected).tolist() if determined else [],
                "psnr_of_half": psnr(half, full).clamp(max=100).tolist(),
                "psnr_of_codec": psnr(coded, batch.expected).tolist(),
                "attention": fmean(share for step in listen.shares for share in step.values()),
                "seconds": round(seconds, 2),
                **where,
            }
    for layer in range(ARCHITECTURE["depth"] + ARCHITECTURE["depth_single_blocks"] if by_layer else 0):
        course = [fmean(shares[step][layer] for shares in by_layer) for step in range(steps)]
        yield {"what": "attention", "layer": layer, "share": fmean(course), "by_step": course, **where}


def markdown(rows: list[dict]) -> str:
    """Tables of `docs/demo_model.md`: dB by kind and group, then the reference's share of the attention by layer."""
    groups = defaultdict(list)
    for row in rows:
        if row["what"] == "quality":
            groups[row["group"]].append(row)
    lines = [
        "| edits | PSNR | without the reference | to the image as drawn | the codec alone | half the steps |",
        "|---|---|---|---|---|---|",
    ]

    def line(name: str, of: list[dict]) -> str:
        keys = ("psnr", "psnr_without_reference", "psnr_to_drawn", "psnr_of_codec", "psnr_of_half")
        values = ([v for row in of for v in row.get(key, ())] for key in keys)
        return f"| {name} | " + " | ".join(f"{fmean(some):.1f} dB" if some else "" for some in values) + " |"

    for group, of in groups.items():
        lines.append(line(f"**{group}**", of))
        lines += [line(row["kind"], [row]) for row in of if len(of) > 1]
    layers = [row for row in rows if row["what"] == "attention"]
    if layers:
        quarter = max(1, len(layers[0]["by_step"]) // 4)
        lines += [
            "",
            "| layer | " + " | ".join(str(row["layer"]) for row in layers) + " |",
            "|---" * (len(layers) + 1) + "|",
        ]
        for name, part in (
            ("all steps", slice(None)),
            ("first quarter", slice(quarter)),
            ("last quarter", slice(-quarter, None)),
        ):
            cells = (f"{fmean(row['by_step'][part]):.2f}" for row in layers)
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m topi_demo.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("-n", type=int, default=16, help="held-out edits of each kind")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--kinds", nargs="+", choices=list(edits.GRAMMAR), default=list(edits.GRAMMAR), metavar="KIND")
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only print the tables of the results that are there")
    args = parser.parse_args()
    if not args.table:
        rows = []
        for row in measure(args.n, args.seed, args.steps, args.kinds, args.weights):
            rows.append(row)
            if row["what"] == "quality":
                right = f"{fmean(row['psnr']):5.1f} dB" if row["psnr"] else " many right"
                print(f"{row['kind']:13} {right}, half the steps {fmean(row['psnr_of_half']):5.1f} dB, "
                      f"{row['seconds']:.0f} s", flush=True)  # fmt: skip
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(markdown(read(args.out)))


if __name__ == "__main__":
    main()
