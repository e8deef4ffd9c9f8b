"""The record of what runs kept and took: a byte or two per token, and plain numbers."""

from collections import deque
from dataclasses import dataclass, field
from math import inf
from typing import Generic, TypeVar

from torch import Tensor

from .config import Model, Settings
from .layout import Layout
from .plan import Kind

SHORTER: tuple[Kind, ...] = ("pruned", "reused")  # the steps that ToPi made shorter


@dataclass(frozen=True)
class Reference:
    """What a reference was, and a small picture of it, None where the model has no latent-to-RGB factors."""

    size: tuple[int, int]  # height, width of its latent in cells
    picture: Tensor | None  # uint8 [images, n x height, n x width, 3]


@dataclass(frozen=True)
class Anchor:
    """What one set of references kept from an anchor step on."""

    step: int
    sigma: float
    layout: Layout
    references: tuple[Reference, ...]
    kept: Tensor  # bool [images, C]
    seconds: float = 0.0  # that scoring it took
    ranks: Tensor | None = None  # uint8 [images, C], by influence (`select.Selection.ranks`)

    @property
    def share(self) -> float:
        return self.kept.float().mean().item()


@dataclass
class Step:
    """A sampling step, filled while it goes on; "skipped" when a cache inside of ToPi kept the network from running."""

    index: int
    sigma: float
    kind: Kind = "skipped"
    tokens: int = 0  # the sequence's length in the shortened layers
    seconds: float = 0.0  # all of its time
    keys: int | None = None  # that a "reused" step's attention sees: the kept ones, without having them as tokens
    flops: int = 0  # operations of an image in all calls (`cost.call_flops`)
    full_flops: int = 0  # if every call computed the whole sequence

    @property
    def extrapolated(self) -> bool:
        """Whether ToPi skipped it (`savings.skip`); of a step that a cache skipped no call is known."""
        return self.kind == "skipped" and self.full_flops > 0


@dataclass(kw_only=True)
class Sampled:
    """The record of a sampling run, which `Trace.find` knows again by what the run made."""

    shape: tuple[int, ...] = ()
    fingerprint: Tensor | None = None  # a few values of what the run made, when it has finished

    def finish(self, latent: Tensor) -> None:
        self.shape, self.fingerprint = tuple(latent.shape), _fingerprint(latent)


@dataclass
class Run(Sampled):
    """One sampling run, filled while it goes on."""

    model: Model
    settings: Settings
    patch: int = 1  # cells of a latent along one side of a token
    cell_pixels: int = 8  # pixels of the image along one side of a cell
    interval: int = 0  # computed steps from anchor to anchor, once there is a reference
    reference_tokens: int = 0  # the most that a call of the network had, whether or not they were ever scored
    cache_bytes: int = 0  # the most that kept keys and values took
    forecast: bool = False  # whether these were extrapolated
    offloaded: bool = False  # whether some lay in host memory
    no_room: bool = False  # whether for some, or for all, there was no memory
    noisy: bool = False  # whether the sampler adds noise of its own, so that no step could be skipped
    found_layers: tuple[int, ...] = ()  # that the run found itself, where the model's profile names none
    found_at: int | None = None  # the step that told; None where the middle one is taken, as every token is kept
    anchors: list[Anchor] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    @property
    def layers(self) -> tuple[int, ...]:
        """The representative layers (Eq. 5); none before the first anchor has found them."""
        return self.model.layers or self.found_layers

    @property
    def verb(self) -> str:
        """What becomes of the references between anchors."""
        return "reused" if self.settings.mode == "reuse" else "pruned"


def _fingerprint(latent: Tensor) -> Tensor:
    """At most 256 values, evenly spread; a run that came to nothing is known by its zeros."""
    flat = latent.detach().flatten()
    return flat[:: -(-len(flat) // 256)].float().cpu().nan_to_num()


R = TypeVar("R", bound=Sampled)


class Trace(Generic[R]):
    """The last runs of one model of the node `node`, newest last; older ones are forgotten."""

    def __init__(self, capacity: int = 128, node: str = "ToPi Patch"):
        self.runs: deque[R] = deque(maxlen=capacity)
        self.node = node

    def find(self, latent: Tensor) -> R:
        """The run that made this latent, the newest of several; ValueError where none did, or none has finished."""
        finished = [(run, run.fingerprint) for run in reversed(self.runs) if run.fingerprint is not None]
        if not finished:
            raise ValueError(f"this trace holds no run: sample with the model of the same {self.node} first")
        shape, made = tuple(latent.shape), _fingerprint(latent)
        alike = [((known - made).abs().max().item(), run) for run, known in finished if run.shape == shape]
        distance, run = min(alike, key=lambda pair: pair[0], default=(inf, None))
        if run is None or distance > 1e-3 * (1 + made.abs().max().item()):
            raise ValueError(
                f"none of the {len(finished)} runs in this trace made this latent of shape {shape}: "
                f"connect the output of the sampler that the same {self.node} feeds"
            )
        return run
