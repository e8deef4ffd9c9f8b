"""The record of what runs kept and took: bits and plain numbers, no scores."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from .layout import Layout

Kind = Literal["skipped", "full", "pruned", "anchor"]


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
class Anchor:
    """What one set of references kept from an anchor step on."""

    step: int
    sigma: float
    layout: Layout
    bits: Bits

    @property
    def kept(self) -> Tensor:
        """[images, C], True where the context token is kept."""
        return self.bits.unpack()

    @property
    def share(self) -> float:
        return self.kept.float().mean().item()


@dataclass(frozen=True)
class Step:
    """One sampling step; `tokens` is the sequence length of its pruned layers, `seconds` its whole time.

    A step is "skipped" when a cache inside of ToPi kept the network from running.
    """

    index: int
    sigma: float
    kind: Kind
    tokens: int
    seconds: float


@dataclass
class Run:
    """One sampling run, filled while it goes on."""

    family: str
    depth: int
    layers: tuple[int, ...]
    front_layers: int
    anchors: list[Anchor] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    finished: bool = False

    def seconds(self, kinds: Iterable[Kind]) -> list[float]:
        """Times of the steps of these kinds; the run's first step is left out, it pays for loading."""
        return [step.seconds for step in self.steps[1:] if step.kind in kinds]

    def summary(self) -> str:
        """One line for the log: what was pruned, and what a full and a pruned step took."""
        if not self.anchors:
            return f"no reference tokens were pruned in {len(self.steps)} steps"
        shares = ", ".join(f"{anchor.share:.0%}" for anchor in self.anchors)
        tokens = self.anchors[0].layout.context_tokens
        text = f"kept {shares} of {tokens} reference tokens at {len(self.anchors)} anchors"
        full, pruned = self.seconds(("full", "anchor")), self.seconds(("pruned",))
        if full and pruned:
            text += f"; a full step took {_mean(full):.3f} s, a pruned one {_mean(pruned):.3f} s"
        return text


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


class Trace:
    """The last runs of one patched model, newest last; older ones are forgotten."""

    def __init__(self, capacity: int = 16):
        self.runs: deque[Run] = deque(maxlen=capacity)
