"""Edits images in a real ComfyUI server, with and without ToPi: `make demo`.

Queues `workflows/topi_quickstart_demo.json` over the server's API and puts all results into one picture and a table.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from topi_core.metrics import psnr, ssim

from . import calibrate as calibration
from .record import setting
from .server import Server, ServerError, running
from .workflow import ALWAYS, BYPASSED, MUTED, to_prompt

WORKFLOW = Path(__file__).resolve().parent.parent / "workflows" / "topi_quickstart_demo.json"
EDITS = (  # one of each group of the grammar that changes something
    (1, "replace the circle with a square"),
    (2, "make the background teal"),
    (3, "shift the image left"),
    (4, "make it autumn"),
    (5, "put the star of the second image into the first"),
)


@dataclass(frozen=True)
class Outcome:
    """One edit, with the full context and with ToPi; images [H, W, 3] in 0..1."""

    instruction: str
    sources: list[Tensor]
    full: Tensor
    pruned: Tensor
    expected: Tensor
    kept: list[list[Tensor]]  # by anchor, the references with their kept tokens
    plot: Tensor  # of ToPi Report
    shares: list[float]  # by anchor
    full_step: float
    pruned_step: float
    full_run: float  # all steps but the first, which pays for loading
    pruned_run: float
    predicted: float  # the whole run's speed-up by the count of operations


def variant(workflow: dict, seed: int, instruction: str, topi: bool, tau: float) -> dict:
    """The quickstart with this instruction; its modes set as one would on the page."""
    workflow = copy.deepcopy(workflow)
    second = next(group for group in workflow["groups"] if group["title"].startswith("Second reference"))
    for node in workflow["nodes"]:
        if "second image" in instruction and _inside(node, second):
            node["mode"] = ALWAYS
        if node["type"] == "PrimitiveString":
            node["widgets_values"][0] = instruction
        elif node["type"] in ("ToPiDemoScene", "KSampler"):
            node["widgets_values"][0] = seed
        elif node["type"] == "ToPiPatch":
            node["widgets_values"][0] = tau
            node["mode"] = ALWAYS if topi else BYPASSED
        elif (
            node["type"].startswith("ToPi")
            and node["inputs"]
            and node["inputs"][0]["type"] == "TOPI_TRACE"
            and not topi
        ):
            node["mode"] = MUTED
    return workflow


def _inside(node: dict, group: dict) -> bool:
    x, y, width, height = group["bounding"]
    return x <= node["pos"][0] < x + width and y <= node["pos"][1] < y + height


def edit(server: Server, nodes: dict, workflow: dict, seed: int, instruction: str, tau: float) -> Outcome:
    def outputs(result, type_: str, title: str | None = None) -> list[dict]:
        found = (n for n in workflow["nodes"] if n["type"] == type_ and title in (None, n.get("title")))
        return [result.outputs[str(n["id"])] for n in found if str(n["id"]) in result.outputs]

    def images(result, *which) -> list[list[Tensor]]:
        return [[server.image(file) for file in output["images"]] for output in outputs(result, *which)]

    full = server.run(to_prompt(variant(workflow, seed, instruction, False, tau), nodes))
    pruned = server.run(to_prompt(variant(workflow, seed, instruction, True, tau), nodes))
    run = outputs(pruned, "ToPiReport")[0]["run"][0]
    # the time of a step, taken alike for both runs: from the end of the one before, as the server tells it
    kinds = [step["kind"] for step in run["steps"]][1:]
    pruned_steps = [s for s, kind in zip(pruned.step_seconds, kinds, strict=True) if kind == "pruned"]
    return Outcome(
        instruction=instruction,
        sources=images(pruned, "PreviewImage", "Reference")[0],
        full=images(full, "SaveImage")[0][0],
        pruned=images(pruned, "SaveImage")[0][0],
        expected=images(pruned, "PreviewImage", "Expected")[0][0],
        kept=[list(references) for references in zip(*images(pruned, "ToPiMaskPreview"), strict=True)],
        plot=images(pruned, "ToPiReport")[0][0],
        shares=[anchor["share"] for anchor in run["anchors"]],
        full_step=statistics.median(full.step_seconds),
        pruned_step=statistics.median(pruned_steps),
        full_run=sum(full.step_seconds),
        pruned_run=sum(pruned.step_seconds),
        predicted=run["figures"]["predicted"],
    )


def table(outcomes: list[Outcome]) -> str:
    head = ("instruction", "kept", "full step", "pruned step", "speed-up", "whole run", "cost model",
            "PSNR to full", "SSIM to full", "PSNR to expected: full", "ToPi")  # fmt: skip
    rows = [head]
    for o in outcomes:
        near = [_pair(psnr, *pair) for pair in ((o.pruned, o.full), (o.full, o.expected), (o.pruned, o.expected))]
        rows.append((
            o.instruction, ", ".join(f"{share:.0%}" for share in o.shares),
            f"{1000 * o.full_step:.0f} ms", f"{1000 * o.pruned_step:.0f} ms", f"{o.full_step / o.pruned_step:.2f}x",
            f"{o.full_run / o.pruned_run:.2f}x", f"{o.predicted:.2f}x",
            f"{near[0]:.1f} dB", f"{_pair(ssim, o.pruned, o.full):.3f}",
            f"{near[1]:.1f} dB", f"{near[2]:.1f} dB",
        ))  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([lines[0], "-|-".join("-" * width for width in widths), *lines[1:]])


def row(o: Outcome) -> dict:
    """One edit's numbers as plain values; seconds, dB."""
    return {
        "instruction": o.instruction,
        "shares": o.shares,
        "seconds": {
            "full step": o.full_step,
            "pruned step": o.pruned_step,
            "full run": o.full_run,
            "pruned run": o.pruned_run,
        },
        "speedup": {"run": o.full_run / o.pruned_run, "predicted": o.predicted},
        "psnr_to_full": _pair(psnr, o.pruned, o.full),
        "ssim_to_full": _pair(ssim, o.pruned, o.full),
        "psnr_to_expected": {"full": _pair(psnr, o.full, o.expected), "topi": _pair(psnr, o.pruned, o.expected)},
    }


def _pair(metric, a: Tensor, b: Tensor) -> float:
    return metric(a.movedim(-1, 0)[None], b.movedim(-1, 0)[None]).item()


def picture(outcomes: list[Outcome], side: int = 216, gap: int = 12) -> Image.Image:
    """One row an edit: references, full edit, ToPi's edit, what was asked for, and the kept tokens by anchor."""
    rows = [[o.sources, [o.full], [o.pruned], [o.expected], *o.kept] for o in outcomes]
    titles = ["reference", "full context", "ToPi", "expected", "kept tokens, by anchor"]
    font, small = ImageFont.load_default(17), ImageFont.load_default(14)
    head, foot = 40, 34
    columns = max(map(len, rows))
    canvas = Image.new("RGB", (gap + columns * (side + gap), head + len(rows) * (side + foot) + gap), (250, 250, 248))
    pen = ImageDraw.Draw(canvas)
    for i, title in enumerate(titles):
        pen.text((gap + i * (side + gap), 12), title, (40, 40, 40), font)
    for j, row in enumerate(rows):
        for i, images in enumerate(row):
            canvas.paste(_tile(images, side), (gap + i * (side + gap), head + j * (side + foot)))
    for j, o in enumerate(outcomes):
        words = (
            f"{o.instruction}   ·   kept {', '.join(f'{share:.0%}' for share in o.shares)}   ·   a step "
            f"{1000 * o.full_step:.0f} ms in full, {1000 * o.pruned_step:.0f} ms pruned   ·   "
            f"{_pair(psnr, o.pruned, o.full):.1f} dB to the full edit"
        )
        pen.text((gap, head + j * (side + foot) + side + 6), words, (90, 90, 90), small)
    return canvas


def _tile(images: list[Tensor], side: int) -> Image.Image:
    """One image in a square, or several smaller ones down its diagonal."""
    tile, small = Image.new("RGB", (side, side), (250, 250, 248)), side // len(images)
    for i, image in enumerate(images):
        pixels = Image.fromarray((image * 255).round().byte().numpy())
        tile.paste(pixels.resize((small, small), Image.LANCZOS), (i * small, i * small))
    return tile


def strip(outcome: Outcome, side: int = 384, gap: int = 12) -> Image.Image:
    """What ToPi Mask Preview shows: a frame an anchor, one row a reference."""
    rows = list(zip(*outcome.kept, strict=True))
    canvas = Image.new("RGB", (len(rows[0]) * (side + gap) - gap, len(rows) * (side + gap) - gap), (250, 250, 248))
    for j, row in enumerate(rows):
        for i, frame in enumerate(row):
            canvas.paste(_image(frame).resize((side, side), Image.NEAREST), (i * (side + gap), j * (side + gap)))
    return canvas


def _image(pixels: Tensor) -> Image.Image:
    return Image.fromarray((pixels * 255).round().byte().numpy())


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m topi_demo.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo_output"), help="folder of the picture and the log")
    parser.add_argument("--tau", type=float, default=0.85, help="share of influence that ToPi keeps")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    workflow, outcomes = json.loads(WORKFLOW.read_text(encoding="utf-8")), []
    print("Starting ComfyUI", flush=True)
    try:
        with running(args.out / "server.log") as server:
            nodes = server.object_info()
            for seed, instruction in EDITS:
                print(f"Editing: {instruction}", flush=True)
                outcomes.append(edit(server, nodes, workflow, seed, instruction, args.tau))
    except (ServerError, FileNotFoundError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    picture(outcomes).save(args.out / "demo.png")
    strip(outcomes[0]).save(args.out / "overlay.png")
    _image(outcomes[0].plot).save(args.out / "plot.png")
    calibration.chart(calibration.shipped()).save(args.out / "calibration.png")
    text = table(outcomes)
    where = setting()
    with (args.out / "demo.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row(o) | {"tau": args.tau} | where) + "\n" for o in outcomes)
    (args.out / "demo.txt").write_text(text + "\n", encoding="utf-8")
    print(
        f"\n{text}\n\nThe picture is {args.out / 'demo.png'}; overlay.png and plot.png show the run of its first row, "
        "calibration.png in which layers the model looks at its references"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
