"""What the benchmark of fidelity runs: panels of edits, and frozen scenarios, each a point of a line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from topi_core.config import KeepSettings
from topi_core.influence import Scorer
from topi_demo.edits import GRAMMAR, OPEN
from topi_demo.train import KINDS

from .baselines.fit import constants
from .baselines.scorers import OTHERS

STEPS = 20
FEWER = "fewer steps"  # the line that all others are set beside


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Edits that are averaged over: open or closed, with so many references, at this CFG."""

    name: str
    open: bool
    references: int
    cfg: float = 1.0

    @property
    def kinds(self) -> list[str]:
        return [kind for kind in KINDS[self.references] if (GRAMMAR[kind][0] == OPEN) == self.open]

    def counts(self, edits: int) -> dict[str, int]:
        """How many edits of each kind make at least `edits`, evenly."""
        return {kind: -(-edits // len(self.kinds)) for kind in self.kinds}


PANELS = {
    panel.name: panel
    for panel in (
        Panel(name="closed", open=False, references=1),
        Panel(name="open", open=True, references=1),
        Panel(name="open, CFG 4", open=True, references=1, cfg=4.0),
        Panel(name="closed, 3 references", open=False, references=3),
        Panel(name="open, 3 references", open=True, references=3),
    )
}


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A way to make edits at less cost: ToPi's two nodes with `inputs`, or one of `bench.baselines`, or fewer steps.

    `easycache` is the threshold of ComfyUI's EasyCache before it. That one needs a model in half precision: in float32
    ComfyUI 0.30.0 changes the sampler's latent in place.
    """

    line: str
    name: str
    inputs: dict = field(default_factory=dict)
    baseline: str = ""
    easycache: float | None = None
    plain: int = 0  # as many steps without anything, set beside the run of `steps`
    steps: int = STEPS

    @property
    def scorer(self) -> Scorer | None:
        """The metric, where the node does not offer it."""
        return OTHERS.get(self.inputs.get("metric", ""))

    @property
    def node_inputs(self) -> dict:
        return {name: value for name, value in self.inputs.items() if name != "metric" or self.scorer is None}

    @property
    def key(self) -> str:
        return f"{self.line}: {self.name}" + f", {self.steps} steps" * (self.steps != STEPS)

    @property
    def dtype(self) -> str:
        return "float32" if self.easycache is None else "bfloat16"


def line(name: str, points: dict[str, dict], **common) -> Iterator[Scenario]:
    """Scenarios of one line; a point's own inputs go over the common ones."""
    inputs = common.pop("inputs", {})
    for point, own in points.items():
        yield Scenario(line=name, name=point, inputs=inputs | own, **common)


def fewer(steps: int, counts: tuple[int, ...]) -> Iterator[Scenario]:
    for count in counts:
        yield Scenario(line=FEWER, name=f"{count} of {steps}", plain=count, steps=steps)


PAPER = {"mode": "prune", "tolerance": 0.0}
"""The paper's method with its published settings."""
HALF = {"min_keep": 0.5, "max_keep": 0.5}
"""The paper's ablations keep half of the tokens."""
COMPUTED = {"mode": "reuse", "tolerance": 0.0}
"""Reuse alone, without skipped steps."""
EVERY_STEP = COMPUTED | {"update_interval": 1}
"""The unpatched model bit by bit, whose trace tells which steps a cache skipped."""
BEFORE = COMPUTED | {"update_interval": 5, "spacing": "sigma", "reuse_text": True}
"""What version 0.1.0 did by default."""
TOLERANCES = (0.02, 0.05, 0.1, 0.2)


def _teacache(threshold: float) -> Scenario:
    inputs = constants("teacache", STEPS) | {"threshold": threshold}
    return Scenario(line="TeaCache's rule", name=f"{threshold:g}", baseline="teacache", inputs=inputs)


def _regione(delta: float) -> Scenario:
    inputs = constants("regione", STEPS) | {"delta": delta}
    return Scenario(line="RegionE's steps", name=f"{delta:g}", baseline="regione", inputs=inputs)


MAIN: tuple[Scenario, ...] = (
    *fewer(STEPS, (17, 15, 12, 10, 8, 6, 5)),
    *line("ToPi", {f"tolerance {t:g}": {"tolerance": t} for t in TOLERANCES}),
    *(Scenario(line="EasyCache", name=f"{t:g}", inputs=EVERY_STEP, easycache=t) for t in (0.1, 0.2)),
    *line("velocity held", {f"{n} computed": {"steps": STEPS, "computed": n} for n in (10, 7)}, baseline="held"),
    *line("velocity linear", {f"{n} computed": {"steps": STEPS, "computed": n} for n in (10, 7)}, baseline="linear"),
    _teacache(0.05),
    _teacache(0.12),
    _regione(0.04),
    *line("ToPi without skipping", {"own anchors": COMPUTED, "as 0.1.0": BEFORE}),
    *line("FluxKVCache's rule", {"once": {}}, baseline="flux_kv_cache"),
)
"""What the README's plot and table are made of, in all panels."""
TOKENS: tuple[Scenario, ...] = (
    *line("prune", {f"tau {t:g}": PAPER | {"tau": t} for t in (0.95, 0.85, 0.7)}),
    *line("prune, half kept", {m: PAPER | HALF | {"metric": m} for m in ("influence", "attention", "random")}),
    *line("merge", {"half kept": {}}, baseline="merge", inputs={"keep": KeepSettings(tau=1.0, **HALF)}),
    *line("ToMeSD", {"0.5": {"ratio": 0.5}}, baseline="tomesd"),
    *line("ToMeSD*", {"0.5": {"ratio": 0.5}}, baseline="tomesd_refs"),
    *line("ToMA", {"0.5": {"ratio": 0.5}}, baseline="toma"),
    *line("ToMA*", {"0.5": {"ratio": 0.5}}, baseline="toma_refs"),
    *line("SDTM", {"alone": {}}, baseline="sdtm"),
    *line("SDTM", {"with reuse": {}}, baseline="sdtm_reuse"),
)
"""What removes or merges tokens, with one reference."""
FEW: tuple[Scenario, ...] = (
    *fewer(8, (7, 6, 5, 4, 3)),
    *line("ToPi", {f"tolerance {t:g}": {"tolerance": t} for t in (0.0, 0.05, 0.1)}, steps=8),
    *fewer(4, (3, 2)),
    *line("ToPi", {f"tolerance {t:g}": {"tolerance": t} for t in (0.0, 0.05)}, steps=4),
)
"""Runs of few steps, as distilled models make them."""
SETS = {"main": MAIN, "tokens": TOKENS, "few": FEW}
SCENARIOS = (*MAIN, *TOKENS, *FEW)
