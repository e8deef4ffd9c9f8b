"""Whole runs of ComfyUI's sampler on full-size architectures with random weights: `python -m bench.runs`.

In turn and over again: the run without ToPi; ToPi's savings, each alone; plain fewer steps, as many as cost
what reuse costs; the run without references. Beside every ratio of whole runs stands the cost model's (appendix F),
with the peak of the GPU's memory. Weights mean nothing here: prune keeps a fixed share. Rows are written as they are
measured.

On a CPU the same command runs a few blocks of the true width in float32, and its rows say so.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch

from topi_demo.provenance import read, setting
from topi_demo.runtime import load_pack, patch

from .speed import ARCHITECTURES, CallTimes, Inputs, network

RESULTS = Path(__file__).resolve().parent / "results" / "runs.jsonl"
COMPUTED = {"tolerance": 0.0}  # every step
WAYS = {
    "reuse": COMPUTED | dict(mode="reuse", update_interval=5, spacing="sigma", reuse_text=True),
    "reuse, text computed": COMPUTED | dict(mode="reuse", update_interval=3),
    "prune": COMPUTED | dict(mode="prune", min_keep=0.5, max_keep=0.5),
}
"""Without skipped steps: how well the course of random weights can be extrapolated says nothing of a model's."""
FEWER = "fewer steps"


def measure(name: str, blocks: tuple[int, int], model, topi, side: int, references: int, steps: int, cfg: float,
            repeats: int) -> dict:  # fmt: skip
    """Seconds, calls and peak memory of every way, and what the cost model predicts of it."""
    import comfy.sample
    from comfy.patcher_extension import WrappersMP

    a = ARCHITECTURES[name]
    cells, device = side // a.cell, model.load_device
    given = Inputs(a)
    whole, layer = [given.latent(cells, cells) for _ in range(references)], f"{sum(blocks) // 2}"
    patched = {way: topi(model, layers=layer, **inputs) for way, inputs in WAYS.items()}
    found: dict[str, dict] = {}

    def run(way: str, patched_model, refs: list[torch.Tensor], count: int) -> None:
        times, timed = CallTimes(device), patched_model.clone()
        timed.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "bench", times)
        conds = [given.conditioning(refs) for _ in range(2)]
        noise = given.latent(cells, cells)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        started = time.perf_counter()
        out = comfy.sample.sample(
            timed, noise, count, cfg, "euler", "simple", *conds, torch.zeros_like(noise), disable_pbar=True, seed=1
        )
        seconds = time.perf_counter() - started  # the picture has come back: nothing is under way
        row = found.setdefault(way, {"steps": count, "seconds": [], "calls": []})
        row["seconds"].append(seconds)
        row["calls"].append(times.seconds)
        row["finite"] = bool(out.isfinite().all())
        if device.type == "cuda":
            row["peak_bytes"] = torch.cuda.max_memory_allocated(device)

    run("warm-up", model, whole, 1)
    for m, _ in patched.values():
        run("warm-up", m, whole, 2)
    del found["warm-up"]
    for _ in range(repeats):
        run("full", model, whole, steps)
        for way, (m, trace) in patched.items():
            run(way, m, whole, steps)
            last = list(trace.runs)[-1]
            full, own = (sum(getattr(s, k) for s in last.steps) for k in ("full_flops", "flops"))
            found[way] |= {"predicted": full / own, "anchors": len(last.anchors),
                           "scoring": [anchor.seconds for anchor in last.anchors]}  # fmt: skip
        fewer = round(steps / found["reuse"]["predicted"])
        run(FEWER, model, whole, fewer)
        found[FEWER]["predicted"] = steps / fewer
        run("no references", model, [], steps)
    return {"what": "runs", "architecture": name, "side": side, "references": references, "steps": steps, "cfg": cfg,
            "blocks": blocks, "repeats": repeats, "ways": found}  # fmt: skip


def table(rows: list[dict]) -> str:
    """Of whole runs: seconds, speed-up (the cost model's), memory beyond the full run's."""
    lines = ["| | way | seconds | speed-up | cost model | peak memory |", "|---" * 6 + "|"]
    for row in rows:
        full = median(row["ways"]["full"]["seconds"])
        what = (f"{row['architecture']}, {row['blocks'][0]} + {row['blocks'][1]} blocks, {row['side']} px, "
                f"{row['references']} references, {row['steps']} steps, cfg {row['cfg']:g}")  # fmt: skip
        for way, of in row["ways"].items():
            seconds = median(of["seconds"])
            label = f"{way} ({of['steps']})" if of["steps"] != row["steps"] else way
            guess = f"{of['predicted']:.2f}x" if "predicted" in of else ""
            peak = f"{of['peak_bytes'] / 2**30:.1f} GiB" if "peak_bytes" in of else ""
            lines.append(f"| {what} | {label} | {seconds:.2f} | {full / seconds:.2f}x | {guess} | {peak} |")
            what = ""
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.runs", description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", choices=list(ARCHITECTURES), default="flux1-kontext")
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--references", nargs="+", type=int, default=[1, 3])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cfg", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--whole", action="store_true", help="all blocks, also on a CPU")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only print the table of the rows that are there")
    args = parser.parse_args()
    if not args.table:
        known, _ = load_pack()
        a = ARCHITECTURES[args.architecture]
        blocks = a.blocks if args.whole or torch.cuda.is_available() else a.few
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with torch.inference_mode(), args.out.open("a", encoding="utf-8") as file:
            model = network(a, blocks)
            for references in args.references:
                row = measure(args.architecture, blocks, model, partial(patch, known), args.side, references,
                              args.steps, args.cfg, args.repeats)  # fmt: skip
                file.write(json.dumps(row | setting()) + "\n")
                file.flush()
                print(table([row]), flush=True)
    print(table(read(args.out)))


if __name__ == "__main__":
    main()
