"""Calibrates the demo model, as a user would any other (Eq. 4 and 5), on held-out scenes: `make calibrate`.

Writes the shipped profile, its chart and the rows of its figures. The pairs are stratified as the paper's 48 are: as
many of each group of edits. Everything is seeded. `ARGS="--out somewhere"` leaves the repository's files alone.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from PIL import Image

from topi_core import profiles
from topi_core.calibration import TOP_M, Calibration
from topi_core.profiles import Profile
from topi_core.report import describe, headline

from . import edits
from .evaluate import SAMPLER, SCHEDULER, SIDE, edit, held_out
from .provenance import setting
from .runtime import PACK, draw_chart, load_pack

NAME = "topi-demo"
PROFILE = f"topi_core/profiles/{NAME}{profiles.SUFFIX}"
CHART = "docs/images/calibration.png"
RESULTS = "bench/results/calibration.jsonl"


def listen(nodes: dict[str, type], group: str, count: int, seed: int, steps: int) -> Calibration:
    """The calibration of `count` pairs of one group of edits, spread over its kinds."""
    model, clip, vae = nodes["ToPiDemoModel"].execute().result
    model, calibrating = nodes["ToPiCalibrate"].execute(model, TOP_M).result
    kinds = [kind for kind, (of, _) in edits.GRAMMAR.items() if of == group]
    with torch.inference_mode():
        for kind, some in zip(kinds, spread(count, len(kinds)), strict=True):
            if some:
                edit((model, clip, vae), held_out(kind, some, "calibration"), seed, steps)
    rows = [row for run in calibrating.trace.runs for row in run.calibration().rows()]
    return Calibration.of(calibrating.model.depth, rows)


def spread(count: int, over: int) -> list[int]:
    """As even as whole numbers can be, the larger ones first."""
    return [count // over + (i < count % over) for i in range(over)]


def calibrate(pairs: int, seed: int, steps: int) -> tuple[Profile, dict[str, Calibration]]:
    """The demo model's profile, and what it is made of by group of edits."""
    from .model import ARCHITECTURE

    nodes, _ = load_pack()
    groups = {}
    for group, some in zip(edits.GROUPS, spread(pairs, len(edits.GROUPS)), strict=True):
        started = time.monotonic()
        groups[group] = listen(nodes, group, some, seed, steps)
        print(f"{group:9} {len(groups[group]):3} pairs, {time.monotonic() - started:4.0f} s", flush=True)
    first, *others = groups.values()
    for other in others:
        first = first.merge(other)
    where = setting()
    profile = Profile.calibrated(
        first,
        TOP_M,
        name=NAME,
        family="flux1",
        hidden=ARCHITECTURE["hidden_size"],
        versions=where["versions"] | {"weights": where["weights"]},
    )
    return profile, groups


def row(of: str, calibration: Calibration) -> dict:
    """Figures of some of the pairs, as plain values."""
    layers = calibration.top(TOP_M)
    return {
        "what": "calibration",
        "of": of,
        "pairs": len(calibration),
        "layers": layers,
        "agreement": calibration.agreement(layers),
        "sensitivity": calibration.mean().tolist(),
        "deviation": calibration.deviation().tolist(),
    }


def shipped() -> Profile:
    return profiles.read(profiles.shipped()[NAME], NAME)


def chart(profile: Profile) -> Image.Image:
    calibration = profile.calibration
    return draw_chart(calibration.mean().tolist(), calibration.deviation().tolist(), profile.layers, headline(profile))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m topi_demo.calibrate", description=__doc__.splitlines()[0])
    parser.add_argument("-n", type=int, default=48, help="image-prompt pairs, over all groups of edits")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=PACK, help="folder that the files are written below")
    args = parser.parse_args()
    profile, groups = calibrate(args.n, args.seed, args.steps)
    where = setting() | {
        "sampling": {"sampler": SAMPLER, "scheduler": SCHEDULER, "steps": args.steps, "side": SIDE, "seed": args.seed}
    }
    for file in (PROFILE, CHART, RESULTS):
        (args.out / file).parent.mkdir(parents=True, exist_ok=True)
    profiles.write(profile, args.out / PROFILE)
    chart(profile).save(args.out / CHART, optimize=True)
    rows = [row("all", profile.calibration), *(row(group, of) for group, of in groups.items())]
    text = "".join(json.dumps(row | where) + "\n" for row in rows)
    (args.out / RESULTS).write_text(text, encoding="utf-8")
    print(f"\n{describe(profile)}\n")
    for row_ in rows[1:]:
        print(f"{row_['of']:9} alone: {', '.join(map(str, row_['layers']))}")


if __name__ == "__main__":
    main()
