"""What it costs that the first anchor scores all layers, as a share of a run: `python -m bench.scoring`.

Runs of the demo model with the layers of its profile, and with none, so that the first of two anchors finds them, in
turn. Scoring is timed inside of each run, by ToPi's own stopwatch.
"""

from __future__ import annotations

import argparse
import json
import statistics
from importlib import import_module
from pathlib import Path

import torch

from topi_demo.evaluate import edit, held_out
from topi_demo.provenance import setting
from topi_demo.runtime import load_pack

RESULTS = Path(__file__).resolve().parent / "results" / "scoring.jsonl"
SEED, STEPS, REPEATS = 1, 20, 11


def main() -> None:
    argparse.ArgumentParser(prog="python -m bench.scoring", description=__doc__.splitlines()[0]).parse_args()
    nodes, pack = load_pack()
    attach, families = (import_module(f"{pack.__name__}.engine.{name}") for name in ("attach", "families"))
    core = pack.__name__.rpartition(".")[0] + ".topi_core"
    config, trace, profiles = (import_module(f"{core}.{name}") for name in ("config", "trace", "profiles"))
    model, clip, vae = nodes["ToPiDemoModel"].execute().result
    batch = held_out("night", 1)
    profile = profiles.read(profiles.shipped()["topi-demo"], "topi-demo")
    family = families.family_of(model.get_model_object("diffusion_model"))

    traces, models = {}, []
    for name, layers in (("profile", profile.layers), ("first anchor", ())):
        traces[name] = trace.Trace()
        measures = dict(depth=profile.depth, hidden=profile.hidden, front_layers=profile.front_layers)
        known = config.Model(family=family.name, layers=layers, **measures)
        patch = attach.Patch(family, known, config.Settings(mode="prune"), traces[name])
        models.append(attach.attach(model, patch))
    with torch.inference_mode():
        for _ in range(REPEATS + 1):
            for each in models:
                edit((each, clip, vae), batch, SEED, STEPS)

    row = {"what": "scoring", "depth": profile.depth, "steps": STEPS, "repeats": REPEATS}
    for name, each in traces.items():
        runs = list(each.runs)[1:]  # the first pays for loading
        row[name] = {
            "layers": list(runs[0].layers),
            "first_anchor_seconds": statistics.median(run.anchors[0].seconds for run in runs),
            "next_anchor_seconds": statistics.median(run.anchors[1].seconds for run in runs),
            "run_seconds": statistics.median(sum(step.seconds for step in run.steps) for run in runs),
            "share_of_first_anchor": statistics.median(
                run.anchors[0].seconds / sum(step.seconds for step in run.steps) for run in runs
            ),
        }
    RESULTS.write_text(json.dumps(row | setting()) + "\n", encoding="utf-8")
    for name in traces:
        part = row[name]
        print(
            f"layers from the {name}: scoring takes {1e3 * part['first_anchor_seconds']:.1f} ms at the first anchor, "
            f"{part['share_of_first_anchor']:.2%} of a run of {part['run_seconds']:.2f} s"
        )


if __name__ == "__main__":
    main()
