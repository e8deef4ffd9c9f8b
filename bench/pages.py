"""Puts what was measured into the documents: `python -m bench.pages`; `--check` only says whether they are up to date.

A table stands between `<!-- name -->` and `<!-- end -->`, and is made of the rows in `results/`. The plot of fidelity
against speed is drawn from the same rows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

from topi_demo import demo, evaluate
from topi_demo.edits import GRAMMAR
from topi_demo.provenance import read

from . import fidelity, kernels, nearness, runs, speed
from .scenarios import FEW, FEWER, MAIN, PANELS, TOKENS, Scenario

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PLOT = ROOT / "docs" / "images" / "fidelity.png"
COLORS = {  # of the plot; others are grey
    FEWER: "black", "ToPi": "#c9184a", "EasyCache": "#e07a1f", "velocity held": "#8a8f98",
    "velocity linear": "#5b8def", "TeaCache's rule": "#2a9d5c", "RegionE's steps": "#7b3fb5",
    "ToPi without skipping": "#f29cb0",
}  # fmt: skip


def _rows(name: str) -> list[dict]:
    return read(RESULTS / f"{name}.jsonl")


def _quality(part: int) -> str:
    return evaluate.markdown(_rows("demo_quality")).split("\n\n")[part]


def _fidelity(scenarios: tuple[Scenario, ...], panels: tuple[str, ...] = tuple(PANELS)) -> str:
    return fidelity.Results(_rows("fidelity")).table(scenarios, panels)


def short() -> str:
    """The README's: what ToPi has by tolerance, and how far that is above plain fewer steps."""
    results = fidelity.Results(_rows("fidelity"))
    return results.table([s for s in MAIN if s.line in ("ToPi", "EasyCache")], PANELS)


PAPER = {"local": (27.55, 25.82), "global": (22.46, 21.04), "camera": (25.01, 25.07), "implicit": (29.40, 28.05)}
"""Table 1's PSNR of ToPi, FLUX.1 Kontext and Qwen-Image-Edit."""


def groups() -> str:
    """Prune with the paper's settings, by its groups of edits, beside its Table 1."""
    (prune,) = (s for s in TOKENS if s.key == "prune: tau 0.85")
    kinds = fidelity.Results(_rows("fidelity")).rows[prune.key, "closed"]
    lines = ["| prune, tau 0.85, dB to the full run | " + " | ".join(PAPER) + " |", "|---" * (len(PAPER) + 1) + "|"]
    cells = []
    for group in PAPER:
        mean, low, high = fidelity.interval(
            [v for kind in kinds if GRAMMAR[kind][0] == group for v in kinds[kind]["psnr"]]
        )
        cells.append(f"{mean:.1f} ±{(high - low) / 2:.1f}")
    lines.append("| demo model | " + " | ".join(cells) + " |")
    for i, model in enumerate(("FLUX.1 Kontext", "Qwen-Image-Edit")):
        lines.append(f"| {model}, Table 1 | " + " | ".join(f"{values[i]:.1f}" for values in PAPER.values()) + " |")
    return "\n".join(lines)


def perceived() -> str:
    """SSIM and LPIPS of some: half of the steps, ToPi, and the others at about 2x."""
    names = ("fewer steps: 10 of 20", "ToPi: ", "EasyCache: 0.2", "linear: 10", "rule: 0.05", "as 0.1.0")
    some = [s for s in MAIN if any(name in s.key for name in names)]
    return fidelity.Results(_rows("fidelity")).perceived(some, tuple(PANELS))


TABLES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"fidelity": short, "runs": lambda: runs.table(_rows("runs"))},
    "docs/demo_model.md": {
        "quality": lambda: _quality(0),
        "nearness": lambda: nearness.markdown(_rows("nearness")),
        "groups": groups,
        "attention": lambda: _quality(1),
        "demo": lambda: demo.table(_rows("demo")),
    },
    "docs/fidelity.md": {
        "main": lambda: _fidelity(MAIN),
        "few": lambda: _fidelity(FEW),
        "tokens": lambda: _fidelity(TOKENS),
        "perceived": perceived,
    },
    "docs/speed.md": {
        "kernels": lambda: kernels.table(_rows("kernels")),
        "speed": lambda: speed.steps_table(_rows("speed")),
    },
}


def filled(page: str) -> str:
    """A document's text with its tables made anew."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for name, table in TABLES[page].items():
        parts = text.split(f"<!-- {name} -->\n")
        if len(parts) != 2:
            raise ValueError(f"{page} must have one place for the table {name!r}, it has {len(parts) - 1}")
        text = f"{parts[0]}<!-- {name} -->\n{table()}\n<!-- end -->{parts[1].split('<!-- end -->', 1)[1]}"
    return text


def plot(path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = fidelity.Results(_rows("fidelity"))
    shown = [p for p in PANELS if any(results.has(s, p) for s in MAIN)]
    figure, axes = pyplot.subplots(1, len(shown), figsize=(4.2 * len(shown), 4.4), squeeze=False)
    for axis, panel in zip(axes[0], shown, strict=True):
        for name, points in groupby((*MAIN, *TOKENS), key=lambda s: s.line):
            found = [s for s in points if results.has(s, panel)]
            if not found:
                continue
            means = [fidelity.interval(results.values(s, panel)) for s in found]
            speeds = [results.speedup(s, panel) for s in found]
            low, high = ([abs(m[0] - m[i]) for m in means] for i in (1, 2))
            style = "o-" if name in COLORS else "x"
            axis.errorbar(speeds, [m[0] for m in means], (low, high), fmt=style, ms=4, lw=1.2, elinewidth=0.7,
                          color=COLORS.get(name, "#b9bcc2"), label=name)  # fmt: skip
        axis.set_title(panel)
        axis.set_xlabel("speed-up by the cost model")
        axis.set_xscale("log")
        axis.set_xticks([1, 1.5, 2, 3, 4], ["1", "1.5", "2", "3", "4"])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("PSNR to the full run, dB")
    axes[0][-1].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.pages", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where a table is out of date")
    args = parser.parse_args()
    made = {ROOT / page: filled(page) for page in TABLES}
    old = [str(page.relative_to(ROOT)) for page, text in made.items() if page.read_text(encoding="utf-8") != text]
    if args.check:
        print("\n".join(f"{page} is out of date: `python -m bench.pages`" for page in old) or "up to date")
        return bool(old)
    for page, text in made.items():
        page.write_text(text, encoding="utf-8")
    plot(PLOT)
    print(f"changed: {', '.join(old) or 'no table'}; drawn: {PLOT.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
