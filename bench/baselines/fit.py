"""Constants of TeaCache and RegionE for the demo model: `python -m bench.baselines.fit`.

The published ones are for other models. These come from full runs of calibration edits, which are neither the held-out
edits nor those of ToPi's own calibration.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from topi_core.plan import Call, Plan, Saving
from topi_demo.edits import GRAMMAR
from topi_demo.evaluate import SAMPLER, SCHEDULER, SIDE, Edits, edit, held_out
from topi_demo.model import WEIGHTS
from topi_demo.provenance import setting
from topi_demo.runtime import load_pack

from .steps import Watch, polynomial, relative_change, watched

CONSTANTS = Path(__file__).with_name("constants.json")
PURPOSE = "calibration of baselines"
STEPS = (20, 28)
NAMES = {"teacache": "coefficients", "regione": "gammas"}  # baseline -> its constants


class Seen(NamedTuple):
    """One step of a full run of B edits."""

    sigma: float
    modulated: Tensor  # the first block's input, of the target alone [B, T, W]
    velocity: Tensor  # [B, C, h, w]


class Follow(Saving):
    """Saves nothing, and remembers every step."""

    def __init__(self, watch: Watch, course: list[Seen]):
        self.watch, self.course = watch, course

    def commit(self, plan: Plan, call: Call, output: Tensor) -> None:
        self.course.append(Seen(call.sigma, self.watch.current.modulated(), output))


def polynomial_fit(x: Tensor, y: Tensor, degree: int = 4) -> list[float]:
    """Least squares; the coefficient of the highest power is the first. x [n], y [n]."""
    powers = torch.linalg.vander(x.double(), N=degree + 1).flip(1)  # [n, degree + 1]
    return torch.linalg.lstsq(powers, y.double()[:, None]).solution.flatten().tolist()


def changes(course: list[Seen]) -> tuple[Tensor, Tensor]:
    """Relative L1 changes from step to step, of the modulated input and of the velocity; each [steps - 1, B].

    The velocity is what this network puts out.
    """
    pairs = list(zip(course[1:], course, strict=False))
    x = [relative_change(now.modulated, before.modulated, (1, 2)) for now, before in pairs]
    y = [relative_change(now.velocity, before.velocity, (1, 2, 3)) for now, before in pairs]
    return torch.stack(x), torch.stack(y)


def decays(course: list[Seen]) -> Tensor:
    """RegionE's gamma_i = |v_i| / |v_(i-1)| / (1 + sigma_i - sigma_(i-1)) of each edit [steps - 1, B]."""
    norms = torch.stack([seen.velocity.float().flatten(1).norm(dim=1) for seen in course])  # [steps, B]
    sigmas = torch.tensor([seen.sigma for seen in course])
    return norms[1:] / norms[:-1] / (1 + sigmas.diff())[:, None]


def batches(count: int) -> list[Edits]:
    """Calibration edits, evenly over all kinds; those with as many references make one batch."""
    kinds, found = list(GRAMMAR), defaultdict(list)
    for kind, number in Counter(kinds[i * len(kinds) // count] for i in range(count)).items():
        some = held_out(kind, number, PURPOSE)
        found[len(some.references)].append(some)
    return [
        Edits(
            "calibration",
            [words for each in of for words in each.instructions],
            [torch.cat(column) for column in zip(*(each.references for each in of), strict=True)],
            torch.cat([each.expected for each in of]),
        )
        for of in found.values()
    ]


def fit(count: int, steps: int, seed: int) -> dict:
    """Constants for so many steps, and how well the polynomial explains what it was fitted to."""
    nodes, _ = load_pack()
    model, clip, vae = nodes["ToPiDemoModel"].execute().result
    x, y, gammas = [], [], []
    for batch in batches(count):
        course: list[Seen] = []
        patched, _ = watched(nodes, model, steps, lambda watch, course=course: [Follow(watch, course)], ends=True)
        edit((patched, clip, vae), batch, seed, steps)
        for known, new in zip((x, y), changes(course), strict=True):
            known.append(new.flatten())
        gammas.append(decays(course))
    changed, expected = torch.cat(x), torch.cat(y)
    coefficients = polynomial_fit(changed, expected)
    error = polynomial(coefficients, changed.double()) - expected.double()
    return {
        "what": "constants",
        "steps": steps,
        "edits": count,
        "teacache": coefficients,
        "explained": round(1 - (error.var() / expected.double().var()).item(), 4),
        "changes": [round(v, 4) for v in (changed.min().item(), changed.max().item())],
        "regione": torch.cat(gammas, 1).mean(1).tolist(),
    }


def constants(baseline: str, steps: int, weights: Path = WEIGHTS, path: Path = CONSTANTS) -> dict:
    """What a baseline of `steps.BASELINES` takes: its constants, and the number of steps that they are for.

    ValueError where there are none for so many steps or for these weights.
    """
    rows = json.loads(path.read_text(encoding="utf-8"))
    known = {row["steps"]: row for row in rows}
    if steps not in known:
        raise ValueError(
            f"{path.name} has constants of {baseline} for {', '.join(map(str, known))} steps, and not for {steps}"
        )
    row, these = known[steps], setting(weights)["weights"]
    if row["weights"] != these:
        raise ValueError(
            f"{path.name} has constants of {baseline} for the weights {row['weights']}, and these are {these}: "
            "run `python -m bench.baselines.fit`"
        )
    return {"steps": steps, NAMES[baseline]: row[baseline]}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.baselines.fit", description=__doc__.splitlines()[0])
    parser.add_argument("-n", type=int, default=16, help="calibration edits, over all kinds")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--out", type=Path, default=CONSTANTS)
    args = parser.parse_args()
    rows, where = [], setting()
    sampling = {"sampler": SAMPLER, "scheduler": SCHEDULER, "side": SIDE, "seed": args.seed}
    with torch.inference_mode():
        for steps in args.steps:
            started = time.monotonic()
            row = fit(args.n, steps, args.seed)
            rows.append(row | {"sampling": sampling, "seconds": round(time.monotonic() - started, 1), **where})
            print(f"{steps} steps: the polynomial explains {row['explained']:.0%}", flush=True)
    args.out.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
