"""Which layers tell what a model looks at: context sensitivity (Eq. 4), the Top-M (Eq. 5), and many pairs together.

Axes as in `influence.py`; L layers, P image-prompt pairs.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from .influence import target_aware_score
from .layout import Layout
from .trace import Sampled

TOP_M = 3
"""How many layers the paper chooses, for either of its models."""


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
    references receive, which is what Fig. 1 shows. The order of the layers is the same, and a large image counts no
    more than a small one.
    """
    return target_aware_score(received, layout).sum(1)


def top_layers(sensitivity: Tensor, m: int) -> tuple[int, ...]:
    """The m layers of the highest sensitivity [L] (Eq. 5), in ascending order; of equal ones the first."""
    if not 1 <= m <= len(sensitivity):
        raise ValueError(f"top_m must be in [1, {len(sensitivity)}] for a model of {len(sensitivity)} layers, got {m}")
    return tuple(sorted(sensitivity.sort(descending=True, stable=True).indices[:m].tolist()))


@dataclass(frozen=True)
class Calibration:
    """The context sensitivity of all layers, one row a pair: merging adds rows, so nothing is lost or rounded.

    Rows are sorted by `pairs`, the numbers that tell one pair from another, whatever order they came in.
    """

    pairs: Tensor  # int64 [P]
    sensitivity: Tensor  # float64 [P, L], means over the timesteps of a run
    steps: Tensor  # int64 [P], how many timesteps

    @classmethod
    def of(cls, depth: int, rows: Iterable[tuple[int, Tensor, int]] = ()) -> Calibration:
        """rows: (pair, sensitivity [L], steps); of two rows of one pair the later one counts."""
        known = {pair: (row, steps) for pair, row, steps in rows}
        order = sorted(known)
        sensitivity = torch.stack([known[pair][0].double() for pair in order]) if order else torch.zeros(0, depth)
        return cls(
            torch.tensor(order, dtype=torch.int64),
            sensitivity.double(),
            torch.tensor([known[pair][1] for pair in order], dtype=torch.int64),
        )

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
    """Finds the representative layers of a run on its first anchor step alone: Eq. 4 and 5 over all rows with
    references.
    """

    def __init__(self, depth: int):
        self.depth = depth
        self.found: dict[Hashable, tuple[int, Tensor, int]] = {}  # set of references -> step, sum of S [L], rows

    def knows(self, references: Hashable, step: int) -> bool:
        return references in self.found and self.found[references][0] == step

    def add(self, references: Hashable, step: int, total: Tensor, rows: int) -> None:
        """total [L] is the sum of S over so many rows; calls of one step are added up."""
        if self.knows(references, step):
            _, before, count = self.found[references]
            total, rows = before + total, count + rows
        self.found[references] = step, total, rows

    def result(self) -> tuple[tuple[int, ...], int]:
        """The Top-M, and the step that told."""
        first = min(step for step, _, _ in self.found.values())
        of_first = [(total.cpu().double(), rows) for step, total, rows in self.found.values() if step == first]
        mean = torch.stack([total for total, _ in of_first]).sum(0) / sum(rows for _, rows in of_first)
        return top_layers(mean, min(TOP_M, self.depth)), first


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
        """The mean over the timesteps (Fig. 1); those calls that share a step are averaged first.

        Raises ValueError where no reference reached the model.
        """
        if not self.heard:
            raise ValueError(
                "nothing can be calibrated, as no reference reached the model: "
                "connect ReferenceLatent, or a node like it, to the conditioning"
            )
        mean = torch.stack([torch.stack(rows).mean(0) for rows in self.heard.values()]).mean(0)
        return Calibration.of(self.depth, zip(self.pairs, mean, [len(self.heard)] * len(self.pairs), strict=True))

    def __str__(self) -> str:
        """One line for the log."""
        if not self.heard:
            return "no reference reached the model, so nothing was calibrated"
        pairs = f"{len(self.pairs)} image-prompt pair{'s'[: len(self.pairs) > 1]}"
        return f"context sensitivity of {self.depth} layers at {len(self.heard)} steps of {pairs}"
