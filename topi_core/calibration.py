"""Which layers tell what a model looks at: context sensitivity (Eq. 4), the Top-M (Eq. 5), and many pairs together.

Axes as in `influence.py`; L layers, P image-prompt pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from .influence import target_aware_score
from .layout import Layout
from .trace import Sampled

TOP_M = 3  # how many layers the paper chooses, for either of its models


def sensitivity_plain(q: Tensor, k: Tensor, layout: Layout, mask: Tensor | None = None) -> Tensor:
    """Context sensitivity of one layer as Eq. 4 has it: all attention that the target pays to the references.

    q, k [B, H, N, D], mask additive, broadcastable to [B, H, N, N] -> [B], a sum over heads, rows and tokens.
    """
    logits = (q @ k.mT) * q.shape[-1] ** -0.5  # [B, H, N, N]
    attention = (logits if mask is None else logits + mask).softmax(-1)
    return attention[:, :, layout.target, layout.reference].sum((1, 2, 3))


def sensitivity(received: Tensor, layout: Layout) -> Tensor:
    """Context sensitivity of one layer, from `attention_received` [B, H, C] -> [B], in [0, 1].

    It is Eq. 4 by head and target row, the sum of all S_j (Eq. 3): the share of the target's attention that the
    references receive (Fig. 1). It orders layers as Eq. 4 does, and a large image counts no more than a small one.
    """
    return target_aware_score(received, layout).sum(1)


def top_layers(sensitivity: Tensor, m: int) -> tuple[int, ...]:
    """The m layers of the highest sensitivity [L] (Eq. 5), in ascending order; of equal ones the first."""
    if not 1 <= m <= len(sensitivity):
        raise ValueError(f"top_m must be in [1, {len(sensitivity)}] for a model of {len(sensitivity)} layers, got {m}")
    return tuple(sorted(sensitivity.sort(descending=True, stable=True).indices[:m].tolist()))


@dataclass(frozen=True)
class Calibration:
    """The context sensitivity of all layers, one row a pair: merging adds rows, so nothing is lost or rounded."""

    pairs: Tensor  # int64 [P], the numbers that tell one pair from another, ascending
    sensitivity: Tensor  # float64 [P, L], means over the timesteps of a run
    steps: Tensor  # int64 [P], how many timesteps

    @classmethod
    def of(cls, depth: int, rows: Iterable[tuple[int, Tensor, int]] = ()) -> Calibration:
        """rows: (pair, sensitivity [L], steps); of two rows of one pair the later one counts."""
        known = {pair: (row.double(), steps) for pair, row, steps in rows}
        pairs = sorted(known)
        none = torch.zeros(0, depth, dtype=torch.float64)
        sensitivity = torch.stack([known[pair][0] for pair in pairs]) if pairs else none
        steps = torch.tensor([known[pair][1] for pair in pairs], dtype=torch.int64)
        return cls(torch.tensor(pairs, dtype=torch.int64), sensitivity, steps)

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def depth(self) -> int:
        return self.sensitivity.shape[1]

    def rows(self) -> list[tuple[int, Tensor, int]]:
        return list(zip(self.pairs.tolist(), self.sensitivity, self.steps.tolist(), strict=True))

    def merge(self, newer: Calibration) -> Calibration:
        """All pairs of both. A pair that both have counts once, as the newer one measured it."""
        if self.depth != newer.depth:
            raise ValueError(f"calibrations of {self.depth} and of {newer.depth} layers cannot be merged")
        return Calibration.of(self.depth, [*self.rows(), *newer.rows()])

    def equals(self, other: Calibration) -> bool:
        """Bit by bit."""
        return all(torch.equal(getattr(self, f.name), getattr(other, f.name)) for f in fields(self))

    def mean(self) -> Tensor:
        """S of every layer (Eq. 4, the expectation over the pairs): [L]."""
        return self.sensitivity.mean(0)

    def deviation(self) -> Tensor:
        """Standard deviation between pairs: [L], 0 where there is only one."""
        return self.sensitivity.std(0) if len(self) > 1 else torch.zeros(self.depth, dtype=torch.float64)

    def top(self, m: int) -> tuple[int, ...]:
        return top_layers(self.mean(), m)

    def agreement(self, layers: Sequence[int]) -> tuple[float, ...]:
        """For each of these layers, the share of the pairs whose own Top-M, as many as these, holds it."""
        own = [top_layers(row, len(layers)) for row in self.sensitivity]
        return tuple(sum(layer in top for top in own) / len(own) for layer in layers)


class LayerSearch:
    """Finds a run's representative layers on its first anchor step alone: Eq. 4 and 5 over all rows with references."""

    def __init__(self):
        self.told: dict[int, list[Tensor]] = {}  # by step, S of each row [B, L] of each call

    def add(self, step: int, s: Tensor) -> None:
        self.told.setdefault(step, []).append(s)

    def result(self) -> tuple[tuple[int, ...], int]:
        """The Top-M, and the step that told."""
        first = min(self.told)
        mean = torch.cat(self.told[first]).cpu().double().mean(0)
        return top_layers(mean, min(TOP_M, len(mean))), first


@dataclass
class Listening(Sampled):
    """What one sampling run tells, collected while it goes on: a pair for each of its images."""

    depth: int
    pairs: tuple[int, ...]
    heard: dict[int, list[Tensor]] = field(default_factory=dict)
    """By step, the sensitivity [images, L] of each cond of each call."""

    def add(self, step: int, rows: Tensor) -> None:
        self.heard.setdefault(step, []).append(rows.cpu().double())

    def calibration(self) -> Calibration:
        """The mean over the timesteps (Fig. 1), each the mean of its calls; ValueError where there was no reference."""
        if not self.heard:
            raise ValueError(
                "nothing can be calibrated, as no reference reached the model: "
                "connect ReferenceLatent, or a node like it, to the conditioning"
            )
        mean = torch.stack([torch.stack(rows).mean(0) for rows in self.heard.values()]).mean(0)
        return Calibration.of(self.depth, zip(self.pairs, mean, [len(self.heard)] * len(self.pairs), strict=True))

    def __str__(self) -> str:
        if not self.heard:
            return "no reference reached the model, so nothing was calibrated"
        pairs = f"{len(self.pairs)} image-prompt pair{'s'[: len(self.pairs) > 1]}"
        return f"context sensitivity of {self.depth} layers at {len(self.heard)} steps of {pairs}"
