"""Puts what was measured into the documents: `python -m bench.pages`; `--check` only says whether they are up to date.

A table stands between `<!-- name -->` and `<!-- end -->`, and is made of the rows in `results/`. The plot of fidelity
against speed is drawn from the same rows.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

from topi_demo import demo, evaluate
from topi_demo.provenance import read

from . import fidelity, nearness, speed
from .scenarios import CORE, README, Scenario

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PLOT = ROOT / "docs" / "images" / "fidelity.png"
EASYCACHE = "with EasyCache, bfloat16"


def _rows(name: str) -> list[dict]:
    return read(RESULTS / f"{name}.jsonl")


def _quality(part: int) -> str:
    return evaluate.markdown(_rows("demo_quality")).split("\n\n")[part]


def _points(rows: list[dict], s: Scenario, references: int) -> tuple[float, float, float] | None:
    """dB and SSIM to the full run, and the predicted speed-up, over a scenario's edits with so many references."""
    of = [row for row in rows if row["scenario"] == s.key and row["references"] == references]
    if not of:
        return None
    psnr, ssim = (fmean(v for row in of for v in row[key]) for key in ("psnr", "ssim"))
    return psnr, ssim, fmean(row["predicted"] for row in of for _ in row["psnr"])


def summary(scenarios: tuple[Scenario, ...]) -> str:
    """A line a scenario: with one reference, and with three."""
    rows = fidelity.best(_rows("fidelity"))
    lines = ["| | one reference | cost model | three references | cost model |", "|---|---|---|---|---|"]
    for s in scenarios:
        one, three = (_points(rows, s, references) for references in (1, 3))
        if one and three:
            mode = s.table.partition(":")[0] + ", " if ":" in s.table else ""
            plain = ", no forecast" * ("without the forecast" in s.table)
            cells = (f"{psnr:.1f} dB, {ssim:.3f} | {ratio:.2f}x" for psnr, ssim, ratio in (one, three))
            lines.append(f"| {mode}{s.name}{plain} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


TABLES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {
        "fidelity": lambda: summary(README),
        "speed": lambda: speed.steps_table(_rows("speed")),
    },
    "docs/demo_model.md": {
        "quality": lambda: _quality(0),
        "nearness": lambda: nearness.markdown(_rows("nearness")),
        "attention": lambda: _quality(1),
        "demo": lambda: demo.table(_rows("demo")),
    },
    "docs/fidelity.md": {"summary": lambda: summary(CORE), "tables": lambda: fidelity.markdown(_rows("fidelity"))},
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

    rows = fidelity.best(_rows("fidelity"))
    series = {  # what is plotted: its table, words in its scenarios' names, colour and style
        "prune, by tau": ("prune: tau (Table 1, Figure 10)", "", "#c04040", "s-"),
        "reuse, by anchors": ("reuse: anchors", "", "#8a8f98", "o--"),
        "reuse with text, by anchors": ("reuse with text: anchors", "", "#5b8def", "o-"),
        "EasyCache alone, by threshold": (EASYCACHE, "alone", "#8a8f98", "^:"),
        "EasyCache and prune": (EASYCACHE, "prune", "#c04040", "^:"),
        "EasyCache and reuse with text": (EASYCACHE, "with text", "#5b8def", "^:"),
    }
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.6), sharey=True)
    for panel, references in zip(panels, (1, 3), strict=True):
        for label, (table, words, color, style) in series.items():
            chosen = (s for s in CORE if s.table == table and words in s.name)
            found = [(s, p) for s in chosen if (p := _points(rows, s, references))]
            panel.plot([p[2] for _, p in found], [p[0] for _, p in found], style, color=color, label=label)
            for s, (psnr, _, ratio) in found:
                number = re.search(r"[\d.]+", s.name)[0]
                panel.annotate(number, (ratio, psnr), (4, 3), textcoords="offset points", fontsize=7, color=color)
        panel.set_title(f"{references} reference{'s'[: references > 1]}")
        panel.set_xlabel("speed-up of the whole run by the cost model")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("PSNR to the full run, dB")
    panels[1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


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
