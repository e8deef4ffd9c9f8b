"""The settings of the node, nested by what they concern; each part is checked once, where it is made.

They know no model: what depends on one (its layers, its profile) is settled when ToPi Patch runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import get_args

from .config import MODES, SPACINGS, AnySpacing, Mode
from .influence import Metric

OWN_INTERVAL: dict[Mode, int] = {"prune": 10, "reuse": 5}
"""The `update_interval` of each mode where none is given; of prune it is the paper's."""


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # also refuses NaN
        raise ValueError(f"{name} must be in [{low}, {high}], got {value}")


def _one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class LayerSettings:
    """Which layers are representative (Eq. 5), and how many of the first ones always see everything.

    `profile` is the name of a profile, or "auto": the one that fits the model. No `layers` and a `front_layers` of -1
    are those of the profile. Layers are counted over the whole stack from 0.
    """

    profile: str = "auto"
    layers: tuple[int, ...] = ()
    front_layers: int = -1


@dataclass(frozen=True, kw_only=True)
class AnchorSettings:
    """Which steps are anchors (Eq. 11), and the part of the schedule in which anything is saved.

    An `update_interval` of 0 is the mode's own. The `spacing` "auto" is "steps" for prune and "sigma" for reuse.
    """

    update_interval: int = 0
    first_anchor: int = 0
    start_percent: float = 0.0
    end_percent: float = 1.0
    spacing: AnySpacing = "auto"

    def __post_init__(self) -> None:
        _within("update_interval", self.update_interval, 0, 1000)
        _within("first_anchor", self.first_anchor, 0, 1000)
        for name in ("start_percent", "end_percent"):
            _within(name, getattr(self, name), 0, 1)
        if self.start_percent > self.end_percent:
            raise ValueError(
                f"start_percent must not be above end_percent, got {self.start_percent} and {self.end_percent}"
            )
        _one_of("spacing", self.spacing, SPACINGS)


@dataclass(frozen=True, kw_only=True)
class KeepSettings:
    """Which reference tokens are kept (Eq. 10): the share `tau` of the influence when pruning, all when reusing.

    `min_keep` and `max_keep` bound the kept fraction, in both modes.
    """

    tau: float = 0.85
    min_keep: float = 0.0
    max_keep: float = 1.0
    metric: Metric = "influence"

    def __post_init__(self) -> None:
        for name in ("tau", "min_keep", "max_keep"):
            _within(name, getattr(self, name), 0, 1)
        if self.min_keep > self.max_keep:
            raise ValueError(f"min_keep must not be above max_keep, got {self.min_keep} and {self.max_keep}")
        _one_of("metric", self.metric, get_args(Metric))


@dataclass(frozen=True, kw_only=True)
class ReuseSettings:
    """For the mode "reuse": whether keys and values are forecast, and whether those of the text are reused as well."""

    forecast: bool = True
    reuse_text: bool = True


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that a user can choose. The defaults are the node's."""

    mode: Mode = "reuse"
    layers: LayerSettings = field(default_factory=LayerSettings)
    anchors: AnchorSettings = field(default_factory=AnchorSettings)
    keep: KeepSettings = field(default_factory=KeepSettings)
    reuse: ReuseSettings = field(default_factory=ReuseSettings)

    def __post_init__(self) -> None:
        _one_of("mode", self.mode, MODES)
