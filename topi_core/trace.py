"""The record of what runs kept and took: bits, ranks of a byte, and plain numbers."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor

from .config import Settings
from .layout import Layout

Kind = Literal["skipped", "full", "pruned", "reused", "anchor"]
SHORTER: tuple[Kind, ...] = ("pruned", "reused")
"""The steps that ToPi made shorter."""


@dataclass(frozen=True)
class Bits:
    """A boolean tensor, eight to a byte."""

    packed: Tensor  # uint8
    shape: tuple[int, ...]

    @classmethod
    def of(cls, mask: Tensor) -> Bits:
        flat = mask.detach().cpu().flatten().to(torch.uint8)
        padded = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
        return cls((padded << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8), tuple(mask.shape))

    def unpack(self) -> Tensor:
        bits = (self.packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
        return bits.flatten()[: torch.Size(self.shape).numel()].view(self.shape).bool()


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
    bits: Bits
    seconds: float = 0.0
    ranks: Tensor | None = None  # uint8 [images, C]

    @property
    def kept(self) -> Tensor:
        """[images, C], True where the context token is kept."""
        return self.bits.unpack()

    @property
    def share(self) -> float:
        return self.kept.float().mean().item()


@dataclass
class Step:
    """One sampling step, filled while it goes on.

    `tokens` is the sequence length of its shortened layers, `seconds` its whole time.

    A step is "skipped" when a cache inside of ToPi kept the network from running. `keys` are how many tokens its
    attention sees, where they are not those of the sequence: a "reused" step sees the kept ones without having them.
    `taken` are the operations of an image in all of its calls, `full` what they are with the full context
    (`cost.call_flops`).
    """

    index: int
    sigma: float
    kind: Kind = "skipped"
    tokens: int = 0
    seconds: float = 0.0
    keys: int | None = None
    taken: int = 0
    full: int = 0


@dataclass(kw_only=True)
class Sampled:
    """The record of a sampling run, which `Trace.find` knows again by what the run made."""

    finished: bool = False
    shape: tuple[int, ...] = ()
    marks: Tensor | None = None

    def finish(self, latent: Tensor) -> None:
        """Remembers a few values of what the run made."""
        self.shape, self.marks, self.finished = tuple(latent.shape), _marks(latent), True


@dataclass
class Run(Sampled):
    """One sampling run, filled while it goes on.

    A token covers `patch` x `patch` cells of a latent, a cell `cell_pixels` x `cell_pixels` pixels of its image.
    `hidden` and `linear` are the model's width and its layers' linear operations, as `cost.layer_flops` wants them.
    `context_tokens` are the most that a call of the network had, whether or not they were ever scored; `cache_bytes`
    the most that its kept keys and values took, `forecast` says that these were forecast, `offloaded` that some lay in
    host memory, and `no_room` that for some, or for all, there was no memory.
    `found` are the layers that the run found itself, at the step `found_at`, where its settings name none; the middle
    one, without a step, where every token is kept anyway.
    """

    family: str
    settings: Settings
    patch: int = 1
    cell_pixels: int = 8
    hidden: int = 0
    linear: int = 24
    context_tokens: int = 0
    cache_bytes: int = 0
    forecast: bool = False
    offloaded: bool = False
    no_room: bool = False
    found: tuple[int, ...] = ()
    found_at: int | None = None
    anchors: list[Anchor] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    @property
    def depth(self) -> int:
        return self.settings.depth

    @property
    def front_layers(self) -> int:
        return self.settings.front_layers

    @property
    def layers(self) -> tuple[int, ...]:
        """The representative layers (Eq. 5); none before the first anchor has found them."""
        return self.settings.layers or self.found

    @property
    def word(self) -> str:
        """What becomes of the context between anchors."""
        return "reused" if self.settings.mode == "reuse" else "pruned"

    def seconds(self, kinds: Iterable[Kind]) -> list[float]:
        """Times of the steps of these kinds; the run's first step is left out, it pays for loading."""
        return [step.seconds for step in self.steps[1:] if step.kind in kinds]

    def summary(self) -> str:
        """One line for the log: what was pruned, and what a full and a pruned step took."""
        if not self.anchors:
            return f"no reference tokens were {self.word} in {len(self.steps)} steps"
        shares = ", ".join(f"{anchor.share:.0%}" for anchor in self.anchors)
        tokens = self.anchors[0].layout.context_tokens
        text = f"kept {shares} of {tokens} reference tokens at {len(self.anchors)} anchor{'s'[: len(self.anchors) > 1]}"
        full = self.seconds(("full", "anchor"))
        for kind in SHORTER:
            if full and (shorter := self.seconds((kind,))):
                text += f"; a full step took {median(full):.3f} s, a {kind} one {median(shorter):.3f} s"
        if self.cache_bytes:
            text += f"; {self.cache_bytes / 1e6:.0f} MB of keys and values were kept"
        return text


def _marks(latent: Tensor) -> Tensor:
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
        marks = _marks(latent)
        near = [
            ((run.marks - marks).abs().max().item(), -i, run)
            for i, run in enumerate(finished)
            if run.marks is not None and run.shape == tuple(latent.shape)
        ]
        if not near or min(near)[0] > 1e-3 * (1 + marks.abs().max().item()):
            raise ValueError(
                f"none of the {len(finished)} runs in this trace made this latent of shape {tuple(latent.shape)}: "
                f"connect the output of the sampler that the same {self.node} feeds"
            )
        return min(near)[2]
