"""Where the tokens of one model call stand in the sequence, by default [text | target | reference 1 | ...]."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Literal

Grid = tuple[int, int]
Part = Literal["text", "target", "references"]


@dataclass(frozen=True)
class Layout:
    """Plain integers; grids are (rows, columns) in tokens. Axis letters: X text, T target, C context, N all.

    `order` is that of the model's attention; the references stand together and keep their own order.
    """

    text_tokens: int
    target_grid: Grid
    reference_grids: tuple[Grid, ...]
    order: tuple[Part, Part, Part] = ("text", "target", "references")

    @property
    def target_tokens(self) -> int:
        return prod(self.target_grid)

    @property
    def context_tokens(self) -> int:
        return sum(prod(grid) for grid in self.reference_grids)

    @property
    def tokens(self) -> int:
        return self.text_tokens + self.target_tokens + self.context_tokens

    @property
    def text(self) -> slice:
        return self._place("text")

    @property
    def target(self) -> slice:
        return self._place("target")

    @property
    def context(self) -> slice:
        return self._place("references")

    @property
    def references(self) -> tuple[slice, ...]:
        """One slice of the sequence a reference."""
        slices, start = [], self.context.start
        for grid in self.reference_grids:
            slices.append(slice(start, start + prod(grid)))
            start += prod(grid)
        return tuple(slices)

    @property
    def without_text(self) -> Layout:
        """The same images where the text has a stream of its own."""
        return replace(self, text_tokens=0)

    def _place(self, part: Part) -> slice:
        lengths = {"text": self.text_tokens, "target": self.target_tokens, "references": self.context_tokens}
        start = sum(lengths[before] for before in self.order[: self.order.index(part)])
        return slice(start, start + lengths[part])
