"""The settings of a run, nested by what they concern and checked where they are made; their defaults are the node's."""

from dataclasses import dataclass
from typing import Literal, get_args

from .influence import INFLUENCE, Scorer
from .schedule import Spacing

Mode = Literal["reuse", "prune"]
AnySpacing = Literal["auto", "steps", "sigma"]
MODES, SPACINGS = get_args(Mode), get_args(AnySpacing)
OWN_INTERVAL: dict[Mode, int] = {"reuse": 2, "prune": 10}
"""Computed steps from anchor to anchor where update_interval is 0; 10 is the paper's. See `Settings.interval`."""
LONG = 12
"""Steps of a long run."""
TOLERANCE = 0.05
"""The node's default: the error that a skipped step may add to the picture (`savings.skip`)."""
WARM_UP = 0.25
"""Share of the steps before reuse begins, where update_interval is 0: keys and values change most at the start."""


def parse_layers(text: str) -> tuple[int, ...]:
    """ "13, 18,31" -> (13, 18, 31), and an empty text -> ()."""
    try:
        return tuple(map(int, text.split(","))) if text.strip() else ()
    except ValueError:
        raise ValueError(
            f"layers must be layer numbers with commas between them, as in '13,18,31', got {text!r}"
        ) from None


def _within(low: int, high: int, **values: float) -> None:
    for name, value in values.items():
        if not low <= value <= high:  # also refuses NaN
            raise ValueError(f"{name} must be in [{low}, {high}], got {value}")


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class LayerSettings:
    """Which layers score the references (Eq. 5), and how many front layers see all of them, where not the profile's."""

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
        start, end = self.start_percent, self.end_percent
        _within(0, 1000, update_interval=self.update_interval, first_anchor=self.first_anchor)
        _within(0, 1, start_percent=start, end_percent=end)
        if start > end:
            raise ValueError(f"start_percent must not be above end_percent, got {start} and {end}")
        one_of("spacing", self.spacing, SPACINGS)


@dataclass(frozen=True, kw_only=True)
class KeepSettings:
    """How many reference tokens are kept, and by which score (Eq. 10, `select.select`)."""

    tau: float = 0.85
    min_keep: float = 0.0
    max_keep: float = 1.0
    metric: Scorer = INFLUENCE

    def __post_init__(self) -> None:
        _within(0, 1, tau=self.tau, min_keep=self.min_keep, max_keep=self.max_keep)
        if self.min_keep > self.max_keep:
            raise ValueError(f"min_keep must not be above max_keep, got {self.min_keep} and {self.max_keep}")


@dataclass(frozen=True, kw_only=True)
class ReuseSettings:
    """What the mode reuse does with keys and values (`savings.reuse`)."""

    forecast: bool = True
    reuse_text: bool = False


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that ToPi Patch and ToPi Settings are told."""

    mode: Mode = "reuse"
    tolerance: float = 0.0
    layers: LayerSettings = LayerSettings()
    anchors: AnchorSettings = AnchorSettings()
    keep: KeepSettings = KeepSettings()
    reuse: ReuseSettings = ReuseSettings()

    def __post_init__(self) -> None:
        one_of("mode", self.mode, MODES)
        _within(0, 1, tolerance=self.tolerance)

    @property
    def update_interval(self) -> int:
        return self.anchors.update_interval or OWN_INTERVAL[self.mode]

    def interval(self, steps: int) -> int:
        """Computed steps from anchor to anchor in a run of so many steps.

        In a long run skipping alone brings more than reusing between computed steps does (docs/fidelity.md): where both
        may happen, reuse's own interval is 1 there, and nothing is reused. A sampler that adds noise of its own keeps
        steps from being skipped: a run that sees that goes on with `update_interval`.
        """
        own = self.mode == "reuse" and not self.anchors.update_interval
        if own and self.tolerance and steps >= LONG:
            return 1
        return self.update_interval

    @property
    def spacing(self) -> Spacing:
        """ "auto" is "steps"."""
        return "steps" if self.anchors.spacing == "auto" else self.anchors.spacing

    def first_anchor(self, steps: int) -> int:
        """The step of the first anchor in a run of so many: reuse's own is the last one of its warm-up."""
        if self.mode == "reuse" and not self.anchors.update_interval and not self.anchors.first_anchor:
            return max(0, int(steps * WARM_UP) - 1)
        return self.anchors.first_anchor

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
    """What a run knows of its network."""

    family: str
    depth: int
    hidden: int = 0  # the width
    linear: int = 24  # linear operations of a layer (`cost.layer_flops`)
    layers: tuple[int, ...] = ()  # the representative ones (Eq. 5), from 0; without any, the first anchor finds them
    front_layers: int = 0  # how many always see every token, when pruning
    profile: str = ""  # where both come from

    def __post_init__(self) -> None:
        last = self.depth - 1
        wrong = [layer for layer in self.layers if not 0 <= layer <= last]
        if wrong:
            raise ValueError(f"layers must be in [0, {last}] for this model, got {wrong[0]}")
        if not 0 <= self.front_layers <= last:
            raise ValueError(f"front_layers must be in [0, {last}] for this model, got {self.front_layers}")
