"""The settings of a run, nested by what they concern and checked where they are made; their defaults are the node's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from .influence import INFLUENCE, Scorer
from .schedule import Spacing

Mode = Literal["reuse", "prune"]
AnySpacing = Literal["auto", "steps", "sigma"]
MODES, SPACINGS = get_args(Mode), get_args(AnySpacing)
OWN_INTERVAL: dict[Mode, int] = {"reuse": 5, "prune": 10}
"""Steps from anchor to anchor where update_interval is 0; 10 is the paper's."""


def parse_layers(text: str) -> tuple[int, ...]:
    """ "13, 18,31" -> (13, 18, 31), and an empty text -> ()."""
    try:
        return tuple(int(part) for part in text.split(",")) if text.strip() else ()
    except ValueError:
        raise ValueError(
            f"layers must be layer numbers with commas between them, as in '13,18,31', got {text!r}"
        ) from None


@dataclass(frozen=True, kw_only=True)
class LayerSettings:
    """Which layers score the references (Eq. 5), and how many front layers see all of them.

    What is typed in `layers` and `front_layers` stands in place of what the profile says.
    """

    profile: str = "auto"
    layers: tuple[int, ...] = ()
    front_layers: int = -1


@dataclass(frozen=True, kw_only=True)
class AnchorSettings:
    """Where the anchors stand (Eq. 11, `schedule.Schedule`); an update_interval of 0 is the mode's own."""

    update_interval: int = 0
    first_anchor: int = 0
    start_percent: float = 0.0
    end_percent: float = 1.0
    spacing: AnySpacing = "auto"

    def __post_init__(self) -> None:
        _within("update_interval", self.update_interval, 0, 1000)
        _within("first_anchor", self.first_anchor, 0, 1000)
        _within("start_percent", self.start_percent, 0, 1)
        _within("end_percent", self.end_percent, 0, 1)
        if self.start_percent > self.end_percent:
            raise ValueError(
                f"start_percent must not be above end_percent, got {self.start_percent} and {self.end_percent}"
            )
        _one_of("spacing", self.spacing, SPACINGS)


@dataclass(frozen=True, kw_only=True)
class KeepSettings:
    """How many reference tokens are kept, and by which score (Eq. 10, `select.select`)."""

    tau: float = 0.85
    min_keep: float = 0.0
    max_keep: float = 1.0
    metric: Scorer = INFLUENCE

    def __post_init__(self) -> None:
        for name in ("tau", "min_keep", "max_keep"):
            _within(name, getattr(self, name), 0, 1)
        if self.min_keep > self.max_keep:
            raise ValueError(f"min_keep must not be above max_keep, got {self.min_keep} and {self.max_keep}")


@dataclass(frozen=True, kw_only=True)
class ReuseSettings:
    """What the mode reuse does with keys and values (`savings.reuse`)."""

    forecast: bool = True
    reuse_text: bool = True


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that ToPi Patch and ToPi Settings are told."""

    mode: Mode = "reuse"
    layers: LayerSettings = field(default_factory=LayerSettings)
    anchors: AnchorSettings = field(default_factory=AnchorSettings)
    keep: KeepSettings = field(default_factory=KeepSettings)
    reuse: ReuseSettings = field(default_factory=ReuseSettings)

    def __post_init__(self) -> None:
        _one_of("mode", self.mode, MODES)

    @property
    def update_interval(self) -> int:
        return self.anchors.update_interval or OWN_INTERVAL[self.mode]

    @property
    def spacing(self) -> Spacing:
        """ "auto" is "steps" for prune, as in the paper, and "sigma" for reuse."""
        if self.anchors.spacing == "auto":
            return "sigma" if self.mode == "reuse" else "steps"
        return self.anchors.spacing

    @property
    def tau(self) -> float:
        """The share of the influence that is kept; with reuse all of it, but for min_keep and max_keep."""
        return 1.0 if self.mode == "reuse" else self.keep.tau

    @property
    def keeps_all(self) -> bool:
        """Whether every token is kept, whatever it scores."""
        return self.keep.min_keep == 1 or (self.tau == 1 and self.keep.max_keep == 1)


@dataclass(frozen=True, kw_only=True)
class Model:
    """What a run knows of its network.

    `layers` are the representative ones (Eq. 5), counted over the whole stack from 0; without any, the first anchor
    finds them. The first `front_layers` always see every token, when pruning. `profile` is where both come from.
    `hidden` and `linear` are the width and the layers' linear operations, as `cost.layer_flops` wants them.
    """

    family: str
    depth: int
    hidden: int = 0
    linear: int = 24
    layers: tuple[int, ...] = ()
    front_layers: int = 0
    profile: str = ""

    def __post_init__(self) -> None:
        last = self.depth - 1
        wrong = [layer for layer in self.layers if not 0 <= layer <= last]
        if wrong:
            raise ValueError(f"layers must be in [0, {last}] for this model, got {wrong[0]}")
        if not 0 <= self.front_layers <= last:
            raise ValueError(f"front_layers must be in [0, {last}] for this model, got {self.front_layers}")


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # also refuses NaN
        raise ValueError(f"{name} must be in [{low}, {high}], got {value}")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
