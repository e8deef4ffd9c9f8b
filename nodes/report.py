"""ToPi Report: a run in numbers, as a table and as a plot."""

from dataclasses import asdict

from comfy_api.latest import io, ui
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..topi_core.report import figures, text, why_nothing
from ..topi_core.trace import SHORTER, Run
from .patch import TraceType
from .support.chart import as_image

SIZE = (960, 480)
COLORS = {"full": "#8a8f98", "anchor": "#5b8def", "pruned": "#f2b705", "reused": "#f2b705", "skipped": "#c04040"}


class ToPiReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ToPiReport", display_name="ToPi Report", category="ToPi", is_output_node=True,
            description="What a run kept at each anchor, what its steps took, and what that saved.",
            inputs=[
                TraceType.Input("trace", tooltip="From ToPi Patch."),
                io.Latent.Input("latent", tooltip="The sampler's output: it says which run is meant."),
            ],
            outputs=[
                io.String.Output(display_name="report", tooltip="What was kept and what it saved, as a short table."),
                io.Image.Output(display_name="plot", tooltip="Seconds of each step by its kind, and the kept share."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, trace, latent) -> io.NodeOutput:
        run = trace.find(latent["samples"])
        report, picture = text(run), plot(run)
        shown = ui.PreviewImage(picture, cls=cls).as_dict()
        return io.NodeOutput(report, picture, ui=shown | {"text": (report,), "run": (facts(run),)})


def facts(run: Run) -> dict:
    """The run in plain values, for the page and for programs that read the history."""
    return {
        "family": run.model.family,
        "layers": list(run.layers),
        "layers_found_at": run.found_at,
        "front_layers": run.model.front_layers,
        "cache_bytes": run.cache_bytes,
        "anchors": [
            {"step": a.step, "sigma": a.sigma, "share": a.share, "reference_tokens": a.layout.reference_tokens}
            for a in run.anchors
        ],
        "steps": [asdict(step) for step in run.steps],
        "figures": asdict(figures(run)),
        "nothing": why_nothing(run),
    }


def plot(run: Run) -> Tensor:
    """Bars: seconds of each step. Line: share of the reference tokens that take part in it. [1, H, W, 3]"""
    image = Image.new("RGB", SIZE, "#1f2126")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(15)
    left, right, top, bottom = 70, SIZE[0] - 70, 50, SIZE[1] - 50
    steps, place = run.steps, left
    for word, color in (("seconds a step:", "white"), *COLORS.items(), ("      kept share (line)", "white")):
        if color == "white" or any(step.kind == word for step in steps):
            pen.text((place, 16), word, color, font)
            place += pen.textlength(word, font) + 16
    if not steps:
        pen.text((left, top), "no steps", "white", font)
        return as_image(image)

    longest = max(step.seconds for step in steps) or 1e-9
    if len(steps) > 1:  # the first pays for loading: it may be cut off
        longest = min(longest, 2 * max(step.seconds for step in steps[1:]) or longest)
    wide = (right - left) / len(steps)
    pen.text((left - 8, top), f"{longest:.2g}", "white", font, "ra")
    pen.text((right + 8, top), "100%", "white", font)
    pen.text((right + 8, bottom - 16), "0", "white", font)
    share, line = 1.0, []
    for i, step in enumerate(steps):
        x = left + i * wide
        height = (bottom - top) * min(1, step.seconds / longest)
        pen.rectangle((x + 1, bottom - height, x + max(2, wide - 2), bottom), COLORS[step.kind])
        if i % -(-len(steps) // 25) == 0:
            pen.text((x + wide / 2, bottom + 6), str(step.index), "white", font, "ma")
        shares = [anchor.share for anchor in run.anchors if anchor.step == step.index]
        share = sum(shares) / len(shares) if shares else share
        level = bottom - (bottom - top) * (share if step.kind in SHORTER else 1.0)
        line += [(x, level), (x + wide, level)]
    pen.line(line, "white", 3)
    pen.line((left, top, left, bottom, right, bottom, right, top), "#5a5f68")
    pen.text(((left + right) / 2, bottom + 26), "step", "white", font, "ma")
    return as_image(image)
