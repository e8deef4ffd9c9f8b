"""What the benchmark of fidelity runs: one frozen scenario a line of a table."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

DEPTH = 12  # layers of the demo model


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """ToPi Patch with these inputs, `easycache` with ComfyUI's EasyCache before it."""

    table: str
    name: str
    inputs: dict = field(default_factory=dict)
    easycache: float | None = None
    steps: int = 20

    @property
    def key(self) -> str:
        return f"{self.table}: {self.name}"


HALF = {"min_keep": 0.5, "max_keep": 0.5}
"""The paper's ablations keep half of the tokens."""


def _layers(*layers: int) -> dict:
    return {"layers": ",".join(map(str, layers))}


def _table(table: str, common: dict, variants: dict[str, dict], **more) -> list[Scenario]:
    return [Scenario(table=table, name=name, inputs=common | own, **more) for name, own in variants.items()]


REUSE = {"mode": "reuse", "update_interval": 4}

SCENARIOS: tuple[Scenario, ...] = (
    *_table("tau (Table 1, Figure 10)", {}, {f"tau {t:g}": {"tau": t} for t in (0.95, 0.9, 0.85, 0.8, 0.7, 0.5)}),
    *_table(
        "metric, half kept (Table 3)", HALF,
        {m: {"metric": m} for m in ("influence", "attention", "similarity", "random")},
    ),
    *_table(
        "layers, half kept (Tables 2 and 5)", HALF,
        {
            "calibrated": {},
            "random": _layers(*sorted(random.Random(0).sample(range(DEPTH), 3))),
            "first": _layers(0, 1, 2),
            "last": _layers(*range(DEPTH - 3, DEPTH)),
            "all": _layers(*range(DEPTH)),
        },
    ),
    *_table(
        "update, half kept (Figure 11)", HALF,
        {"static": {"update_interval": 20}} | {f"every {i}": {"update_interval": i} for i in (10, 5, 3)},
    ),
    *_table("first anchor, half kept", HALF, {f"step {i}": {"first_anchor": i} for i in (0, 2, 4, 6)}),
    *_table("front layers, half kept", HALF, {f"{i} exempt": {"front_layers": i} for i in (0, 1, 2, 4, 6)}),
    *_table(
        "reuse: spacing of 5 anchors", REUSE | {"tau": 1.0},
        {"sigma": {}, "steps": {"spacing": "steps"}},
    ),
    *_table(
        "reuse: anchors, all kept", {"mode": "reuse", "tau": 1.0},
        {f"{-(-20 // i)} anchors": {"update_interval": i} for i in (20, 10, 7, 5, 4, 3, 2)},
    ),
    *_table("reuse: tau, 5 anchors", REUSE, {f"tau {t:g}": {"tau": t} for t in (0.95, 0.85, 0.7, 0.5)}),
    *_table(
        "reuse: metric, half kept, 5 anchors", REUSE | HALF,
        {m: {"metric": m} for m in ("influence", "attention", "random")},
    ),
    *_table("with EasyCache", {}, {"prune, tau 0.85": {}, "reuse, 5 anchors": REUSE | {"tau": 1.0}}, easycache=0.2),
)  # fmt: skip
SHORT = tuple(s for s in SCENARIOS if s.name in ("tau 0.85", "random", "influence", "sigma"))
