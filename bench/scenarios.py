"""What the benchmark of fidelity runs: one frozen scenario a line of a table."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from topi_core.influence import Scorer

from .baselines.scorers import OTHERS

DEPTH = 12  # layers of the demo model


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """ToPi Patch and ToPi Settings with these inputs, `easycache` with ComfyUI's EasyCache before it.

    That one needs a model in half precision: in float32 ComfyUI 0.30.0 changes the sampler's latent in place.
    """

    table: str
    name: str
    inputs: dict = field(default_factory=dict)
    easycache: float | None = None
    steps: int = 20

    @property
    def scorer(self) -> Scorer | None:
        """The metric, where the node does not offer it."""
        return OTHERS.get(self.inputs.get("metric", ""))

    @property
    def node_inputs(self) -> dict:
        return {name: value for name, value in self.inputs.items() if name != "metric" or self.scorer is None}

    @property
    def key(self) -> str:
        return f"{self.table}: {self.name}"

    @property
    def dtype(self) -> str:
        return "float32" if self.easycache is None else "bfloat16"


HALF = {"min_keep": 0.5, "max_keep": 0.5}
"""The paper's ablations keep half of the tokens."""


def _layers(*layers: int) -> dict:
    return {"layers": ",".join(map(str, layers))}


def _table(table: str, common: dict, variants: dict[str, dict], **more) -> list[Scenario]:
    return [Scenario(table=table, name=name, inputs=common | own, **more) for name, own in variants.items()]


def _anchors(interval: int) -> str:
    count = -(-20 // interval)
    return f"{count} anchor{'s'[: count > 1]}"


PRUNE = {"mode": "prune", "tau": 0.85, "update_interval": 10}
REUSE = {"mode": "reuse", "update_interval": 5, "reuse_text": False}
"""Of the references alone, without the text."""
WITH_TEXT = REUSE | {"reuse_text": True}
EVERY_STEP = {"mode": "reuse", "update_interval": 1}
"""An anchor at every step is the unpatched model bit by bit, and its trace tells which steps a cache skipped."""

CORE: tuple[Scenario, ...] = (
    *_table("prune: tau (Table 1, Figure 10)", PRUNE, {f"tau {t:g}": {"tau": t} for t in (0.95, 0.9, 0.85, 0.7, 0.5)}),
    *_table(
        "prune: metric, half kept (Table 3)", PRUNE | HALF,
        {m: {"metric": m} for m in ("influence", "attention", "similarity", "random")},
    ),
    *_table("reuse: anchors", REUSE, {_anchors(i): {"update_interval": i} for i in (20, 10, 7, 5, 4, 3)}),
    *_table("reuse with text: anchors", WITH_TEXT, {_anchors(i): {"update_interval": i} for i in (20, 10, 7, 5, 4, 3)}),
    *_table(
        "reuse: without the forecast", REUSE | {"forecast": False},
        {_anchors(i): {"update_interval": i} for i in (10, 5, 3)},
    ),
    *(
        scenario
        for t in (0.05, 0.1, 0.2)
        for scenario in _table(
            "with EasyCache, bfloat16", {},
            {
                f"EasyCache {t:g} alone": EVERY_STEP,
                f"EasyCache {t:g}, prune": PRUNE,
                f"EasyCache {t:g}, reuse": REUSE,
                f"EasyCache {t:g}, with text": WITH_TEXT,
            },
            easycache=t,
        )
    ),
)  # fmt: skip
"""What the plot and the first table of docs/fidelity.md are made of."""

_README = {
    *("tau 0.85", "tau 0.5", "2 anchors", "4 anchors", "7 anchors"),
    *("EasyCache 0.1 alone", "EasyCache 0.1, with text"),
}
README = tuple(s for s in CORE if s.name in _README and s.table != "reuse: without the forecast")
"""The lines of the README's table."""

SCENARIOS: tuple[Scenario, ...] = (
    *CORE,
    *_table(
        "prune: layers, half kept (Tables 2 and 5)", PRUNE | HALF,
        {
            "calibrated": {},
            "random": _layers(*sorted(random.Random(0).sample(range(DEPTH), 3))),
            "first": _layers(0, 1, 2),
            "last": _layers(*range(DEPTH - 3, DEPTH)),
            "all": _layers(*range(DEPTH)),
        },
    ),
    *_table(
        "prune: update, half kept (Figure 11)", PRUNE | HALF,
        {"static": {"update_interval": 20}} | {f"every {i}": {"update_interval": i} for i in (10, 5, 3)},
    ),
    *_table("prune: first anchor, half kept", PRUNE | HALF, {f"step {i}": {"first_anchor": i} for i in (0, 2, 4, 6)}),
    *_table("prune: front layers, half kept", PRUNE | HALF, {f"{i} exempt": {"front_layers": i} for i in (0, 1, 2, 4)}),
    *_table(
        "reuse: metric, half kept, 4 anchors", REUSE | HALF,
        {m: {"metric": m} for m in ("influence", "attention", "random")},
    ),
    *_table("reuse: spacing of 4 anchors", REUSE, {s: {"spacing": s} for s in ("sigma", "steps")}),
    *_table(
        "reuse: 8 steps", REUSE, {_anchors(i * 20 // 8): {"update_interval": i} for i in (8, 4, 3)}, steps=8,
    ),
    *_table("reuse: 4 steps", REUSE, {_anchors(i * 20 // 4): {"update_interval": i} for i in (4, 2)}, steps=4),
    *_table(
        "reuse with text: 8 steps", WITH_TEXT, {_anchors(i * 20 // 8): {"update_interval": i} for i in (8, 4, 3)},
        steps=8,
    ),
    *_table(
        "reuse with text: 4 steps", WITH_TEXT, {_anchors(i * 20 // 4): {"update_interval": i} for i in (4, 2)}, steps=4,
    ),
)  # fmt: skip
SHORT = tuple(s for s in CORE if s.name in ("tau 0.85", "influence", "random", "4 anchors"))
