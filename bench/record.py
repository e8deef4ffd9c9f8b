"""What a run's record costs, as a share of the run: `python -m bench.record`.

The record's own work (bits of the masks, pictures of the references, marks of the result) is done again on a finished
run's data, many times over, and set against the time that the run took. On the demo model, the smallest there is; a
larger one takes longer, and its record the same.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from importlib import import_module
from pathlib import Path

import torch

from topi_core.trace import Bits
from topi_demo.provenance import setting
from topi_demo.runtime import use_comfyui

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "record.jsonl"
STEPS, REPEATS = 20, 50


def main() -> None:
    argparse.ArgumentParser(prog="python -m bench.record", description=__doc__.splitlines()[0]).parse_args()
    use_comfyui()
    import nodes

    asyncio.run(nodes.load_custom_node(str(ROOT)))
    node = nodes.NODE_CLASS_MAPPINGS
    picture = import_module(".picture", node["ToPiPatch"].__module__.rpartition(".")[0]).picture
    model, clip, vae = node["ToPiDemoModel"].execute().result
    image, _ = node["ToPiDemoScene"].execute(seed=1, instruction="make it night").result
    reference = nodes.VAEEncode().encode(vae, image)[0]
    cond = nodes.CLIPTextEncode().encode(clip, "make it night")[0]
    cond = [[features, values | {"reference_latents": [reference["samples"]]}] for features, values in cond]
    model, trace = node["ToPiPatch"].execute(model, 0.85, 10, "prune", "auto").result
    empty = {"samples": torch.zeros_like(reference["samples"])}
    with torch.inference_mode():
        for _ in range(3):
            latent = nodes.KSampler().sample(model, 1, STEPS, 1.0, "euler", "simple", cond, cond, empty)[0]
    run = trace.runs[-1]

    def record() -> float:
        started = time.perf_counter()
        picture(reference["samples"], model.get_model_object("latent_format"))
        for anchor in run.anchors:
            Bits.of(anchor.kept)
        run.finish(latent["samples"])
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
