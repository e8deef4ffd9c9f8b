"""Edits images in a real ComfyUI server, without ToPi and with it in both modes: `make demo`.

Queues `workflows/topi_quickstart_demo.json` over the server's API and puts all results into one picture and a table.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from topi_core.config import TOLERANCE
from topi_core.metrics import psnr, ssim
from topi_core.trace import SHORTER

from . import calibrate as calibration
from .provenance import setting
from .server import Server, ServerError, running
from .workflow import ALWAYS, BYPASSED, MUTED, to_prompt

WORKFLOW = Path(__file__).resolve().parent.parent / "workflows" / "topi_quickstart_demo.json"
EDITS = (  # one of each group of the grammar that changes something and has one right answer
    (1, "replace the circle with a square"),
    (2, "make the background teal"),
    (3, "shift the image left"),
    (4, "make it autumn"),
    (5, "put the star of the second image into the first"),
)


@dataclass(frozen=True)
class Way:
    """How ToPi Patch is set, in the order of its inputs. An interval of 0 is the mode's own; reuse does not use tau."""

    mode: str
    update_interval: int = 0
    tolerance: float = TOLERANCE
    tau: float = 0.85


WAYS = {"prune": Way("prune", tolerance=0.0), "default": Way("reuse")}
"""The paper's method, and ToPi Patch as it comes."""


@dataclass(frozen=True)
class Edited:
    """One edit with ToPi; images [H, W, 3] in 0..1, times in seconds."""

    image: Tensor
    kept: list[list[Tensor]]  # by anchor, the references with their kept tokens
    plot: Tensor  # of ToPi Report
    shares: list[float]  # by anchor
    step: float | None  # a shortened one; None where steps were only skipped
    run: float  # all steps but the first, which pays for loading
    predicted: float  # the whole run's speed-up by the count of operations


@dataclass(frozen=True)
class Outcome:
    """One edit, with the full context and with ToPi by its ways."""

    instruction: str
    sources: list[Tensor]
    full: Tensor
    expected: Tensor
    full_step: float
    full_run: float
    topi: dict[str, Edited]


def variant(workflow: dict, seed: int, instruction: str, way: Way | None) -> dict:
    """The quickstart with this instruction; its modes set as one would on the page. Without a way, without ToPi."""
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
            node["mode"] = ALWAYS if way else BYPASSED
            if way:
                node["widgets_values"] = [way.mode, way.update_interval, way.tolerance, way.tau]
        elif (
            node["type"].startswith("ToPi") and node["inputs"] and node["inputs"][0]["type"] == "TOPI_TRACE" and not way
        ):
            node["mode"] = MUTED
    return workflow


def _inside(node: dict, group: dict) -> bool:
    x, y, width, height = group["bounding"]
    return x <= node["pos"][0] < x + width and y <= node["pos"][1] < y + height


def edit(server: Server, nodes: dict, workflow: dict, seed: int, instruction: str) -> Outcome:
    def outputs(result, type_: str, title: str | None = None) -> list[dict]:
        found = (n for n in workflow["nodes"] if n["type"] == type_ and title in (None, n.get("title")))
        return [result.outputs[str(n["id"])] for n in found if str(n["id"]) in result.outputs]

    def images(result, *which) -> list[list[Tensor]]:
        return [[server.image(file) for file in output["images"]] for output in outputs(result, *which)]

    def edited(result) -> Edited:
        run = outputs(result, "ToPiReport")[0]["run"][0]
        # the time of a step, taken alike for all runs: from the end of the one before, as the server tells it
        kinds = [step["kind"] for step in run["steps"]][1:]
        shorter = [s for s, kind in zip(result.step_seconds, kinds, strict=True) if kind in SHORTER]
        return Edited(
            image=images(result, "SaveImage")[0][0],
            kept=[list(references) for references in zip(*images(result, "ToPiMaskPreview"), strict=True)],
            plot=images(result, "ToPiReport")[0][0],
            shares=[anchor["share"] for anchor in run["anchors"]],
            step=statistics.median(shorter) if shorter else None,
            run=sum(result.step_seconds),
            predicted=run["figures"]["predicted"],
        )

    results = {
        name: server.run(to_prompt(variant(workflow, seed, instruction, way), nodes))
        for name, way in ({"full": None} | WAYS).items()
    }
    full = results.pop("full")
    some = next(iter(results.values()))
    return Outcome(
        instruction=instruction,
        sources=images(some, "PreviewImage", "Reference")[0],
        full=images(full, "SaveImage")[0][0],
        expected=images(some, "PreviewImage", "Expected")[0][0],
        full_step=statistics.median(full.step_seconds),
        full_run=sum(full.step_seconds),
        topi={name: edited(result) for name, result in results.items()},
    )


def table(rows: list[dict]) -> str:
    """Markdown: a line for each edit and each way."""
    head = ("edit", "mode", "kept, by anchor", "a full step", "a shorter step", "whole run", "cost model",
            "to the full edit", "full edit to expected", "ToPi to expected")  # fmt: skip
    lines = [head]
    for row in rows:
        seconds, ratio, expected = row["seconds"], row["speedup"], row["psnr_to_expected"]
        lines.append((
            row["instruction"], row["mode"], _shares(row["shares"]),
            _milliseconds(seconds["full step"]), _milliseconds(seconds["shorter step"]),
            f"{ratio['run']:.2f}x", f"{ratio['predicted']:.2f}x",
            f"{row['psnr_to_full']:.1f} dB, SSIM {row['ssim_to_full']:.3f}",
            f"{expected['full']:.1f} dB", f"{expected['topi']:.1f} dB",
        ))  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    made = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines]
    return "\n".join([made[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *made[1:]])


def _milliseconds(seconds: float | None) -> str:
    return "none" if seconds is None else f"{1000 * seconds:.0f} ms"


def _shares(shares: list[float]) -> str:
    return "all" if min(shares) == 1 else ", ".join(f"{share:.0%}" for share in shares)


def rows(o: Outcome) -> list[dict]:
    """One edit's numbers as plain values, a row each way; seconds, dB."""
    return [
        {
            "instruction": o.instruction,
            **asdict(WAYS[name]),
            "shares": e.shares,
            "seconds": {"full step": o.full_step, "shorter step": e.step, "full run": o.full_run, "run": e.run},
            "speedup": {"run": o.full_run / e.run, "predicted": e.predicted},
            "psnr_to_full": _pair(psnr, e.image, o.full),
            "ssim_to_full": _pair(ssim, e.image, o.full),
            "psnr_to_expected": {"full": _pair(psnr, o.full, o.expected), "topi": _pair(psnr, e.image, o.expected)},
        }
        for name, e in o.topi.items()
    ]


def _pair(metric, a: Tensor, b: Tensor) -> float:
    return metric(a.movedim(-1, 0)[None], b.movedim(-1, 0)[None]).item()


def picture(outcomes: list[Outcome], side: int = 216, gap: int = 12) -> Image.Image:
    """One row an edit: references, full edit, ToPi's edits, what was asked for, and the tokens that pruning kept."""
    edits = [[[e.image] for e in o.topi.values()] for o in outcomes]
    rows = [
        [o.sources, [o.full], *topi, [o.expected], *o.topi["prune"].kept]
        for o, topi in zip(outcomes, edits, strict=True)
    ]
    titles = ["reference", "full context", *(f"ToPi, {name}" for name in WAYS), "expected", "kept by prune, by anchor"]
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
        each = (
            f"{name}: {_pair(psnr, e.image, o.full):.1f} dB to the full edit, {o.full_run / e.run:.2f}x as fast"
            for name, e in o.topi.items()
        )
        words = "   ·   ".join([o.instruction, f"full {o.full_run:.1f} s", *each])
        pen.text((gap, head + j * (side + foot) + side + 6), words, (90, 90, 90), small)
    return canvas


def _tile(images: list[Tensor], side: int) -> Image.Image:
    """One image in a square, or several smaller ones down its diagonal."""
    tile, small = Image.new("RGB", (side, side), (250, 250, 248)), side // len(images)
    for i, image in enumerate(images):
        pixels = Image.fromarray((image * 255).round().byte().numpy())
        tile.paste(pixels.resize((small, small), Image.LANCZOS), (i * small, i * small))
    return tile


def strip(edited: Edited, side: int = 384, gap: int = 12) -> Image.Image:
    """What ToPi Mask Preview shows: one frame per anchor, one row per reference."""
    rows = list(zip(*edited.kept, strict=True))
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
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    workflow, outcomes = json.loads(WORKFLOW.read_text(encoding="utf-8")), []
    print("Starting ComfyUI", flush=True)
    try:
        with running(args.out / "server.log") as server:
            nodes = server.object_info()
            for seed, instruction in EDITS:
                print(f"Editing: {instruction}", flush=True)
                outcomes.append(edit(server, nodes, workflow, seed, instruction))
    except (ServerError, FileNotFoundError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    picture(outcomes).save(args.out / "demo.png")
    strip(outcomes[0].topi["prune"]).save(args.out / "overlay.png")
    _image(outcomes[0].topi["prune"].plot).save(args.out / "plot.png")
    calibration.chart(calibration.shipped()).save(args.out / "calibration.png")
    where, measured = setting(), [row for o in outcomes for row in rows(o)]
    text = table(measured)
    with (args.out / "demo.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row | where) + "\n" for row in measured)
    (args.out / "demo.txt").write_text(text + "\n", encoding="utf-8")
    print(
        f"\n{text}\n\nThe picture is {args.out / 'demo.png'}; overlay.png and plot.png show the run of its first row, "
        "calibration.png in which layers the model looks at its references"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
