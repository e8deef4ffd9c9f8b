"""ToPi Report: a run in numbers, as a table and as a plot."""

from __future__ import annotations

import numpy as np
import torch
from comfy_api.latest import io, ui
from PIL import Image, ImageDraw
from torch import Tensor

from ..topi_core.trace import Run
from .patch import TraceType

SIZE = (640, 320)
COLOURS = {"full": "#8a8f98", "anchor": "#5b8def", "pruned": "#f2b705", "skipped": "#c04040"}


class ToPiReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ToPiReport",
            display_name="ToPi Report",
            category="ToPi",
            description="What a run kept at each anchor, and what each of its steps took.",
            is_output_node=True,
            inputs=[
                TraceType.Input("trace", tooltip="From ToPi Patch."),
                io.Latent.Input("latent", tooltip="The sampler's output: it says which run is meant."),
            ],
            outputs=[
                io.String.Output(display_name="report", tooltip="The steps and the anchors as a table."),
                io.Image.Output(display_name="plot", tooltip="Seconds of each step by its kind, and the kept share."),
            ],
        )

    @classmethod
    def execute(cls, trace, latent) -> io.NodeOutput:
        run = trace.find(latent["samples"])
        report = table(run)
        picture = plot(run)
        shown = ui.PreviewImage(picture, cls=cls).as_dict()
        return io.NodeOutput(report, picture, ui=shown | {"text": (report,), "run": (facts(run),)})


def facts(run: Run) -> dict:
    """The run in plain values, for the page and for programs that read the history."""
    return {
        "family": run.family,
        "layers": list(run.layers),
        "front_layers": run.front_layers,
        "anchors": [
            {"step": a.step, "sigma": a.sigma, "share": a.share, "context_tokens": a.layout.context_tokens}
            for a in run.anchors
        ],
        "steps": [
            {"index": s.index, "sigma": s.sigma, "kind": s.kind, "tokens": s.tokens, "seconds": s.seconds}
            for s in run.steps
        ],
    }


def table(run: Run) -> str:
    lines = [
        f"{run.family}, {run.depth} layers: scored in {', '.join(map(str, run.layers))}, "
        f"pruned from layer {run.front_layers} on",
        run.summary(),
        "",
        "step   sigma  kind     tokens  seconds  kept",
    ]
    for step in run.steps:
        kept = ", ".join(f"{share:.1%}" for share in _shares(run, step.index))
        row = f"{step.index:4}  {step.sigma:6.3f}  {step.kind:7}  {step.tokens:6}  {step.seconds:7.3f}  {kept}"
        lines.append(row.rstrip())
    return "\n".join(lines)


def _shares(run: Run, step: int) -> list[float]:
    return [anchor.share for anchor in run.anchors if anchor.step == step]


def plot(run: Run) -> Tensor:
    """Bars: seconds of each step. Line: share of the reference tokens that take part in it. [1, H, W, 3]"""
    image = Image.new("RGB", SIZE, "#1f2126")
    pen = ImageDraw.Draw(image)
    width, height = SIZE
    left, right, top, bottom = 50, width - 50, 40, height - 30
    steps = run.steps
    pen.text((left, 12), "seconds a step" if steps else "no steps", "white")
    for i, (kind, colour) in enumerate(COLOURS.items()):
        pen.text((left + 130 + 60 * i, 12), kind, colour)
    pen.text((right - 110, 12), "kept share (line)", "white")
    if steps:
        longest = max(step.seconds for step in steps)
        wide = (right - left) / len(steps)
        pen.text((4, top), f"{longest:.2f}", "white")
        pen.text((right + 6, top), "100%", "white")
        share, line = 1.0, []
        for i, step in enumerate(steps):
            x = left + i * wide
            y = bottom - (bottom - top) * step.seconds / max(longest, 1e-9)
            pen.rectangle((x + 1, y, x + wide - 2, bottom), COLOURS[step.kind])
            pen.text((x + 2, bottom + 6), str(step.index), "white")
            shares = _shares(run, step.index)
            share = sum(shares) / len(shares) if shares else share
            now = share if step.kind == "pruned" else 1.0
            level = bottom - (bottom - top) * now
            line += [(x, level), (x + wide, level)]
        pen.line(line, "white", 2)
    pen.line((left, top, left, bottom, right, bottom, right, top), "#5a5f68")
    return torch.from_numpy(np.array(image)).float()[None] / 255
