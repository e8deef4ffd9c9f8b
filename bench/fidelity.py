"""How near a run with ToPi comes to the full one, on the demo model: `python -m bench.fidelity`.

Held-out edits with fixed seeds, as many of each of the paper's groups; every scenario makes all of them, and each image
is compared with the full run's and with the one that was asked for. A row of the results is one scenario on one kind of
edit, written as soon as it is measured: an interrupted benchmark goes on where it stopped. Rows of the same weights
count as done whatever the code was: after a change of it, delete those that it touches. Speed-ups in here are the cost
model's (appendix F); `bench.speed` measures them.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from topi_core import cost
from topi_core.metrics import psnr, ssim
from topi_demo import codec
from topi_demo.edits import GRAMMAR, GROUPS
from topi_demo.evaluate import edit, held_out
from topi_demo.provenance import read, setting
from topi_demo.runtime import load_pack, patch

from .scenarios import CORE, README, SCENARIOS, SHORT, Scenario

RESULTS = Path(__file__).resolve().parent / "results" / "fidelity.jsonl"
SEED = 0


def kinds(count: int) -> dict[str, int]:
    """How many edits of each kind make `count` of each group, evenly."""
    return {kind: -(-count // sum(g == group for g, _ in GRAMMAR.values())) for kind, (group, _) in GRAMMAR.items()}


def measure(scenarios: tuple[Scenario, ...], count: int, done: set[tuple]):
    """Rows of what is not in `done`, kind by kind, so that each full run is made once."""
    node, _ = load_pack()
    import comfy_extras.nodes_easycache as easycache

    model, clip, vae = node["ToPiDemoModel"].execute().result
    half = model.clone()
    half.set_model_compute_dtype(torch.bfloat16)
    models, where = {"float32": model, "bfloat16": half}, setting()
    for kind, number in kinds(count).items():
        todo = [s for s in scenarios if (s.key, kind, number, where["weights"]) not in done]
        if not todo:
            continue
        batch = held_out(kind, number)
        coded = codec.decode(codec.encode(batch.expected))
        wanted = {(s.dtype, s.steps) for s in todo}
        fulls = {(d, steps): edit((models[d], clip, vae), batch, SEED, steps) for d, steps in wanted}
        for s in todo:
            started = time.monotonic()
            base, full = models[s.dtype], fulls[s.dtype, s.steps]
            if s.easycache is not None:
                base = easycache.EasyCacheNode.execute(base, s.easycache, 0.15, 0.95, False).result[0]
            patched, trace = patch(node, base, s.scorer, **s.node_inputs)
            image = edit((patched, clip, vae), batch, SEED, s.steps)
            run = trace.runs[-1]
            computed = sum(step.kind != "skipped" for step in run.steps)  # a cache outside of ToPi hides its steps
            yield {
                "what": "fidelity",
                "scenario": s.key,
                "inputs": s.inputs,
                "easycache": s.easycache,
                "dtype": s.dtype,
                "steps": s.steps,
                "kind": kind,
                "group": GRAMMAR[kind][0],
                "edits": number,
                "references": len(batch.references),
                "psnr": _values(psnr(image, full).clamp(max=100), 2),
                "ssim": _values(ssim(image, full), 4),
                "psnr_to_expected": round(psnr(image, coded).mean().item(), 2),
                "psnr_of_full_to_expected": round(psnr(full, coded).mean().item(), 2),
                "kept": round(fmean(anchor.share for anchor in run.anchors), 4),
                "anchors": [anchor.step for anchor in run.anchors],
                "predicted": round(cost.speedup(run) * s.steps / computed, 4),
                "seconds": round(time.monotonic() - started, 2),
                **where,
            }


def _values(x: Tensor, digits: int) -> list[float]:
    return [round(value, digits) for value in x.tolist()]


def table(rows: list[dict], name: str) -> list[str]:
    """One table in Markdown: dB and SSIM to the full run by group, with what was kept and the predicted speed-up."""
    by_scenario = {
        s.name: of for s in SCENARIOS if s.table == name and (of := [r for r in rows if r["scenario"] == s.key])
    }
    present = [g for g in GROUPS if any(row["group"] == g for of in by_scenario.values() for row in of)]
    most, least = (f([sum(r["edits"] for r in of) for of in by_scenario.values()]) for f in (max, min))
    edits = f"{least} edits" if most == least else f"{least} to {most} edits"
    lines = [
        f"| {name}; {edits} | " + " | ".join(present) + " | all | kept | cost model |",
        "|---" * (len(present) + 4) + "|",
    ]
    for scenario, of in by_scenario.items():
        cells = [_near([row for row in of if row["group"] == group]) for group in present]
        groups = [some for group in present if (some := [row for row in of if row["group"] == group])]
        kept, speed = (fmean(fmean(row[key] for row in group) for group in groups) for key in ("kept", "predicted"))
        cells += [_near(of), f"{kept:.0%}", f"{speed:.2f}x"]
        lines.append(f"| {scenario} | " + " | ".join(cells) + " |")
    return lines


def best(rows: list[dict]) -> list[dict]:
    """Of rows of one scenario and kind of edit, the one of the most edits, and the newest of these."""
    found: dict[tuple, dict] = {}
    for row in rows:
        key = row["scenario"], row["kind"]
        if key not in found or row["edits"] >= found[key]["edits"]:
            found[key] = row
    return list(found.values())


def _near(rows: list[dict]) -> str:
    values = [[v for row in rows for v in row[key]] for key in ("psnr", "ssim")]
    return f"{fmean(values[0]):.1f}, {fmean(values[1]):.3f}" if values[0] else ""


def markdown(rows: list[dict]) -> str:
    rows, names = best(rows), dict.fromkeys(s.table for s in SCENARIOS)
    present = [name for name in names if any(row["scenario"].startswith(name + ": ") for row in rows)]
    return "\n\n".join("\n".join(table(rows, name)) for name in present)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.fidelity", description=__doc__.splitlines()[0])
    parser.add_argument("-n", type=int, default=64, help="held-out edits of each group")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--short", action="store_true", help="a few scenarios only")
    which.add_argument("--readme", action="store_true", help="those of the README's table")
    which.add_argument("--core", action="store_true", help="those of the plot and of the first table")
    parser.add_argument("--only", metavar="WORDS", nargs="+", help="scenarios whose name holds any of these words")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only print the tables of the results that are there")
    args = parser.parse_args()
    if not args.table:
        some = SHORT if args.short else README if args.readme else CORE if args.core else SCENARIOS
        chosen = tuple(s for s in some if not args.only or any(words in s.key for words in args.only))
        done = {(row["scenario"], row["kind"], row["edits"], row["weights"]) for row in read(args.out)}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with torch.inference_mode(), args.out.open("a", encoding="utf-8") as file:
            for row in measure(chosen, args.n, done):
                file.write(json.dumps(row, separators=(",", ":")) + "\n")
                file.flush()
                print(f"{row['kind']:10}  {row['scenario']:45}  {fmean(row['psnr']):5.1f} dB to the full run, "
                      f"{row['kept']:4.0%} kept, {row['predicted']:.2f}x predicted", flush=True)  # fmt: skip
    print(markdown(read(args.out)))


if __name__ == "__main__":
    main()
