"""The settings of a run, checked once where they are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from .influence import Metric
from .schedule import Spacing

Mode = Literal["reuse", "prune"]
AnySpacing = Literal["auto", "steps", "sigma"]
MODES, SPACINGS = get_args(Mode), get_args(AnySpacing)


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # also refuses NaN
        raise ValueError(f"{name} must be in [{low}, {high}], got {value}")


def parse_layers(text: str) -> tuple[int, ...]:
    """ "13, 18,31" -> (13, 18, 31)."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(
            f"layers must be layer numbers with commas between them, as in '13,18,31', got {text!r}"
        ) from None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to prune a model of `depth` layers; layers are counted over the whole stack from 0.

    `layers` are the representative ones (Eq. 5); without any, the first anchor finds them, where anything depends on
    it. The first `front_layers` always see the full context, when pruning. `profile` is where both come from, for the
    report. `spacing` "auto" is "steps" for the mode prune, as in the paper, and "sigma" for reuse (`Schedule.anchors`).
    `forecast` and `reuse_text` are for reuse alone (`reuse.ContextCache`).
    """

    depth: int
    layers: tuple[int, ...] = ()
    front_layers: int
    profile: str = ""
    tau: float = 0.85
    update_interval: int = 10
    mode: Mode = "prune"
    spacing: AnySpacing = "auto"
    first_anchor: int = 0
    start_percent: float = 0.0
    end_percent: float = 1.0
    min_keep: float = 0.0
    max_keep: float = 1.0
    metric: Metric = "influence"
    forecast: bool = True
    reuse_text: bool = True

    def __post_init__(self) -> None:
        for name in ("tau", "start_percent", "end_percent", "min_keep", "max_keep"):
            _within(name, getattr(self, name), 0, 1)
        _within("update_interval", self.update_interval, 1, 1000)
        _within("first_anchor", self.first_anchor, 0, 1000)
        if self.min_keep > self.max_keep:
            raise ValueError(f"min_keep must not be above max_keep, got {self.min_keep} and {self.max_keep}")
        if self.start_percent > self.end_percent:
            raise ValueError(
                f"start_percent must not be above end_percent, got {self.start_percent} and {self.end_percent}"
            )
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        if self.spacing not in SPACINGS:
            raise ValueError(f"spacing must be one of {', '.join(SPACINGS)}, got {self.spacing!r}")
        if self.metric not in get_args(Metric):
            raise ValueError(f"metric must be one of {', '.join(get_args(Metric))}, got {self.metric!r}")
        wrong = [layer for layer in self.layers if not 0 <= layer < self.depth]
        if wrong:
            raise ValueError(f"layers must be in [0, {self.depth - 1}] for this model, got {wrong[0]}")
        if not 0 <= self.front_layers < self.depth:
            raise ValueError(f"front_layers must be in [0, {self.depth - 1}] for this model, got {self.front_layers}")

    @property
    def keeps_all(self) -> bool:
        """Whether every token is kept, whatever it scores."""
        return self.min_keep == 1 or (self.tau == 1 and self.max_keep == 1)

    @property
    def anchor_spacing(self) -> Spacing:
        if self.spacing == "auto":
            return "sigma" if self.mode == "reuse" else "steps"
        return self.spacing
