"""The record of what runs kept and took: a byte or two per token, and plain numbers."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from torch import Tensor

from .config import Model, Settings
from .layout import Layout
from .plan import Kind

SHORTER: tuple[Kind, ...] = ("pruned", "reused")
"""The steps that ToPi made shorter."""


@dataclass(frozen=True)
class Reference:
    """What a reference was: the size of its latent in cells, and a picture of it with a pixel a cell, or several."""

    size: tuple[int, int]  # height, width
    picture: Tensor | None
    """uint8 [images, n x height, n x width, 3]; None where the model has no latent-to-RGB factors."""


@dataclass(frozen=True)
class Anchor:
    """What one set of references kept from an anchor step on; `seconds` is what scoring it took.

    `ranks` are the tokens by influence, from 0 to 255 (`select.Selection.ranks`).
    """

    step: int
    sigma: float
    layout: Layout
    references: tuple[Reference, ...]
    kept: Tensor  # bool [images, C]
    seconds: float = 0.0
    ranks: Tensor | None = None  # uint8 [images, C]

    @property
    def share(self) -> float:
        return self.kept.float().mean().item()


@dataclass
class Step:
    """One sampling step, filled while it goes on.

    `tokens` is the sequence length of its shortened layers, `seconds` its whole time.

    A step is "skipped" when a cache inside of ToPi kept the network from running. `keys` are how many tokens its
    attention sees, where they are not those of the sequence: a "reused" step sees the kept ones without having them.
    `flops` are the operations of an image in all of its calls, `full_flops` what they are when every call computes the
    whole sequence (`cost.call_flops`).
    """

    index: int
    sigma: float
    kind: Kind = "skipped"
    tokens: int = 0
    seconds: float = 0.0
    keys: int | None = None
    flops: int = 0
    full_flops: int = 0


@dataclass(kw_only=True)
class Sampled:
    """The record of a sampling run, which `Trace.find` knows again by what the run made."""

    finished: bool = False
    shape: tuple[int, ...] = ()
    fingerprint: Tensor | None = None

    def finish(self, latent: Tensor) -> None:
        """Remembers a few values of what the run made."""
        self.shape, self.fingerprint, self.finished = tuple(latent.shape), _fingerprint(latent), True


@dataclass
class Run(Sampled):
    """One sampling run, filled while it goes on."""

    model: Model
    settings: Settings
    patch: int = 1  # cells of a latent along one side of a token
    cell_pixels: int = 8  # pixels of the image along one side of a cell
    reference_tokens: int = 0  # the most that a call of the network had, whether or not they were ever scored
    cache_bytes: int = 0  # the most that kept keys and values took
    forecast: bool = False  # whether these were extrapolated
    offloaded: bool = False  # whether some lay in host memory
    no_room: bool = False  # whether for some, or for all, there was no memory
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
        """The run that made this latent; the newest, where several made the same.

        Raises ValueError where the trace holds no finished run, or none of them made it.
        """
        finished = [run for run in self.runs if run.finished]
        if not finished:
            raise ValueError(f"this trace holds no run: sample with the model of the same {self.node} first")
        fingerprint = _fingerprint(latent)
        near = [
            ((run.fingerprint - fingerprint).abs().max().item(), -i, run)
            for i, run in enumerate(finished)
            if run.fingerprint is not None and run.shape == tuple(latent.shape)
        ]
        if not near or min(near)[0] > 1e-3 * (1 + fingerprint.abs().max().item()):
            raise ValueError(
                f"none of the {len(finished)} runs in this trace made this latent of shape {tuple(latent.shape)}: "
                f"connect the output of the sampler that the same {self.node} feeds"
            )
        return min(near)[2]
