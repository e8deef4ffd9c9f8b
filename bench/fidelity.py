"""How near a cheaper run comes to the full one, on the demo model: `python -m bench.fidelity`.

Held-out edits with fixed seeds, in panels of at least `-n` each; every scenario makes all of a panel's, and each image
is compared with the full run's. A row of the results is one scenario on one kind of edit of a panel, written as soon as
it is measured: an interrupted benchmark goes on where it stopped. Rows of the same weights count as done whatever the
code was: after a change of it, delete those that it touches. Speed-ups in here are the cost model's (appendix F);
`bench.runs` measures them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import numpy as np
import torch

from topi_core import cost
from topi_core.metrics import psnr, ssim
from topi_demo.evaluate import Edits, edit, held_out
from topi_demo.provenance import read, setting
from topi_demo.runtime import load_pack, patch

from .baselines import BASELINES
from .lpips import lpips
from .scenarios import FEWER, PANELS, SCENARIOS, SETS, Panel, Scenario

RESULTS = Path(__file__).resolve().parent / "results" / "fidelity.jsonl"
SEED, RESAMPLES = 0, 2000
BATCH = 4  # edits that are sampled together; what is decided for one of them is decided for all


def measure(scenarios: Iterable[Scenario], panels: Iterable[Panel], count: int, done: set[tuple]) -> Iterator[dict]:
    """Rows of what is not in `done`, kind by kind, so that each full run is made once."""
    node, _ = load_pack()
    import comfy_extras.nodes_easycache as easycache

    model, clip, vae = node["ToPiDemoModel"].execute().result
    half = model.clone()
    half.set_model_compute_dtype(torch.bfloat16)
    models, where = {"float32": model, "bfloat16": half}, setting()
    for panel in panels:
        for kind, number in panel.counts(count).items():
            todo = [s for s in scenarios if (s.key, panel.name, kind, number, where["weights"]) not in done]
            fulls: dict[tuple, torch.Tensor] = {}
            parts = _parts(held_out(kind, number)) if todo else []

            def run(base, steps: int, parts: list[Edits] = parts, cfg: float = panel.cfg) -> torch.Tensor:
                return torch.cat([edit((base, clip, vae), part, SEED, steps, cfg=cfg) for part in parts])

            for s in todo:
                started, base = time.monotonic(), models[s.dtype]
                of = s.dtype, s.steps
                if of not in fulls:
                    fulls[of] = run(base, s.steps)
                if s.easycache is not None:
                    base = easycache.EasyCacheNode.execute(base, s.easycache, 0.15, 0.95, False).result[0]
                if s.plain:
                    patched, trace = base, None
                elif s.baseline:
                    patched, trace = BASELINES[s.baseline](node, base, **s.inputs)
                else:
                    patched, trace = patch(node, base, s.scorer, **s.node_inputs)
                image = run(patched, s.plain or s.steps)
                yield {
                    "what": "fidelity", "scenario": s.key, "panel": panel.name, "kind": kind, "edits": number,
                    "inputs": s.inputs, "psnr": _values(psnr(image, fulls[of]).clamp(max=100), 2),
                    "ssim": _values(ssim(image, fulls[of]), 4),
                    "lpips": _values(lpips(image, fulls[of]), 4), **_record(s, trace, len(parts)),
                    "seconds": round(time.monotonic() - started, 1), **where,
                }  # fmt: skip


def _parts(batch: Edits) -> list[Edits]:
    """A batch in parts of at most `BATCH` edits."""
    cuts = [slice(i, i + BATCH) for i in range(0, len(batch.instructions), BATCH)]
    return [
        replace(batch, instructions=batch.instructions[cut], expected=batch.expected[cut],
                references=[images[cut] for images in batch.references])
        for cut in cuts
    ]  # fmt: skip


def _record(s: Scenario, trace, parts: int) -> dict:
    """What the runs of the parts computed, and the cost model's speed-up of all of them."""
    if trace is None:
        return {"predicted": round(s.steps / s.plain, 4)}
    runs = list(trace.runs)[-parts:]
    found = {
        "predicted": round(1 / fmean(len(_reached(run)) / s.steps / cost.speedup(run) for run in runs), 4),
        "computed": [sum(step.kind != "skipped" for step in run.steps) for run in runs],
        "anchors": [len({anchor.step for anchor in run.anchors}) for run in runs],
    }
    shares = [anchor.share for run in runs for anchor in run.anchors]
    return found | ({"kept": round(fmean(shares), 4)} if shares else {})


def _reached(run) -> set[int]:
    """Steps that a cache outside of ToPi has not hidden, and that one inside of it has not answered."""
    return {step.index for step in run.steps if step.full_flops}


def _values(x: torch.Tensor, digits: int) -> list[float]:
    return [round(value, digits) for value in x.tolist()]


def interval(values: list[float]) -> tuple[float, float, float]:
    """The mean, and the bootstrap's interval of 95 % around it (percentiles of the resampled means)."""
    x, rng = np.asarray(values), np.random.default_rng(0)
    means = x[rng.integers(len(x), size=(RESAMPLES, len(x)))].mean(1)
    return float(x.mean()), *map(float, np.percentile(means, (2.5, 97.5)))


class Results:
    """Of a scenario, panel and kind of edit the row of most edits, and the newest of these."""

    def __init__(self, rows: list[dict]):
        self.rows: dict[tuple[str, str], dict[str, dict]] = {}
        for row in rows:
            kinds = self.rows.setdefault((row["scenario"], row["panel"]), {})
            if row["kind"] not in kinds or row["edits"] >= kinds[row["kind"]]["edits"]:
                kinds[row["kind"]] = row

    def has(self, s: Scenario, panel: str) -> bool:
        return (s.key, panel) in self.rows and set(PANELS[panel].kinds) <= set(self.rows[s.key, panel])

    def values(self, s: Scenario, panel: str, name: str = "psnr") -> list[float]:
        """Of every edit of the panel, in an order that is the same for all scenarios."""
        kinds = self.rows[s.key, panel]
        return [v for kind in PANELS[panel].kinds for v in kinds[kind][name]]

    def speedup(self, s: Scenario, panel: str) -> float:
        """Of all edits: what they would cost in full by what they cost."""
        kinds = self.rows[s.key, panel]
        return 1 / fmean(1 / kinds[kind]["predicted"] for kind in PANELS[panel].kinds for _ in kinds[kind]["psnr"])

    def ahead(self, s: Scenario, panel: str) -> tuple[float, float, float] | None:
        """dB above plain fewer steps at the same cost, edit by edit; None outside of what was measured of these.

        Of a kind with more edits in one of the two, the first ones, which are the same.
        """
        plain = [p for p in SCENARIOS if p.line == FEWER and p.steps == s.steps and self.has(p, panel)]
        plain.sort(key=lambda p: self.speedup(p, panel))
        at = self.speedup(s, panel)
        for a, b in pairwise(plain):
            low, high = self.speedup(a, panel), self.speedup(b, panel)
            if low <= at <= high:
                t = (np.log(at) - np.log(low)) / (np.log(high) - np.log(low))
                differences = []
                for kind in PANELS[panel].kinds:
                    values = (self.rows[each.key, panel][kind]["psnr"] for each in (s, a, b))
                    differences += [x - (1 - t) * y - t * z for x, y, z in zip(*values, strict=False)]
                return interval(differences)
        return None

    def table(self, scenarios: Iterable[Scenario], panels: Iterable[str]) -> str:
        """dB to the full run with the interval's half width, the cost model's speed-up, and dB above fewer steps."""
        panels = [p for p in panels if any(self.has(s, p) for s in scenarios)]
        lines = ["| | " + " | ".join(panels) + " |", "|---" * (len(panels) + 1) + "|"]
        for s in scenarios:
            if any(self.has(s, p) for p in panels):
                lines.append(f"| {s.key} | " + " | ".join(self._cell(s, p) for p in panels) + " |")
        return "\n".join(lines)

    def perceived(self, scenarios: Iterable[Scenario], panels: tuple[str, ...]) -> str:
        """SSIM and LPIPS to the full run, the means."""
        panels = tuple(p for p in panels if any(self.has(s, p) for s in scenarios))
        lines = ["| SSIM, LPIPS | " + " | ".join(panels) + " |", "|---" * (len(panels) + 1) + "|"]
        for s in scenarios:
            if any(self.has(s, p) for p in panels):
                cells = (
                    f"{fmean(self.values(s, p, 'ssim')):.3f}, {fmean(self.values(s, p, 'lpips')):.3f}"
                    if self.has(s, p) else "" for p in panels
                )  # fmt: skip
                lines.append(f"| {s.key} | " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def _cell(self, s: Scenario, panel: str) -> str:
        if not self.has(s, panel):
            return ""
        mean, low, high = interval(self.values(s, panel))
        text = f"{mean:.1f} ±{(high - low) / 2:.1f} at {self.speedup(s, panel):.2f}x"
        ahead = None if s.plain else self.ahead(s, panel)
        return text + (f" ({ahead[0]:+.1f} ±{(ahead[2] - ahead[1]) / 2:.1f})" if ahead else "")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.fidelity", description=__doc__.splitlines()[0])
    parser.add_argument("-n", type=int, default=64, help="held-out edits of each panel, at least")
    parser.add_argument("--panels", nargs="+", choices=list(PANELS), default=list(PANELS), metavar="PANEL")
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS), help="of scenarios")
    parser.add_argument("--only", metavar="WORDS", nargs="+", help="scenarios whose name holds any of these words")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only print the tables of the results that are there")
    args = parser.parse_args()
    some = [s for name in args.sets for s in SETS[name]]
    chosen = [s for s in some if not args.only or any(words in s.key for words in args.only)]
    if not args.table:
        names = ("scenario", "panel", "kind", "edits", "weights")
        done = {tuple(row[name] for name in names) for row in read(args.out)}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with torch.inference_mode(), args.out.open("a", encoding="utf-8") as file:
            for row in measure(chosen, [PANELS[p] for p in args.panels], args.n, done):
                file.write(json.dumps(row, separators=(",", ":"), default=repr) + "\n")
                file.flush()
                print(f"{row['panel']:22}  {row['kind']:10}  {row['scenario']:45}  {fmean(row['psnr']):5.1f} dB, "
                      f"{row['predicted']:.2f}x", flush=True)  # fmt: skip
    print(Results(read(args.out)).table(chosen, args.panels))


if __name__ == "__main__":
    main()
