"""What a run's record costs, as a share of the run: `python -m bench.record`.

The record's own work (pictures of the references, a few values of the result) is done again on a finished run's data,
many times over, and set against the time that the run took. On the demo model, the smallest there is; a larger one
takes longer, and its record the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from importlib import import_module
from pathlib import Path

import torch

from topi_demo.evaluate import edit, held_out
from topi_demo.provenance import setting
from topi_demo.runtime import load_pack, patch

RESULTS = Path(__file__).resolve().parent / "results" / "record.jsonl"
SEED, STEPS, REPEATS = 1, 20, 50


def main() -> None:
    argparse.ArgumentParser(prog="python -m bench.record", description=__doc__.splitlines()[0]).parse_args()
    known, pack = load_pack()
    picture = import_module(f"{pack.__name__}.engine.picture").picture
    model, clip, vae = known["ToPiDemoModel"].execute().result
    batch = held_out("night", 1)
    reference = vae.encode(batch.references[0].movedim(1, -1))  # as large as the result
    model, trace = patch(known, model, mode="prune")
    with torch.inference_mode():
        for _ in range(3):
            edit((model, clip, vae), batch, SEED, STEPS)
    run = trace.runs[-1]

    def record() -> float:
        started = time.perf_counter()
        picture(reference, model.get_model_object("latent_format"))
        run.finish(reference)
        return time.perf_counter() - started

    record_seconds = statistics.median(record() for _ in range(REPEATS))
    run_seconds = statistics.median(sum(step.seconds for step in r.steps) for r in trace.runs)
    row = {
        "what": "record of a run",
        "steps": STEPS,
        "anchors": len(run.anchors),
        "record_seconds": record_seconds,
        "run_seconds": run_seconds,
        "share": record_seconds / run_seconds,
        "repeats": REPEATS,
    }
    RESULTS.write_text(json.dumps(row | setting()) + "\n", encoding="utf-8")
    print(f"the record takes {1e3 * record_seconds:.2f} ms of {run_seconds:.2f} s: {record_seconds / run_seconds:.3%}")


if __name__ == "__main__":
    main()
