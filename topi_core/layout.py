"""Where the tokens of one model call stand in the sequence: [text | target | reference 1 | reference 2 | ...]."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

Grid = tuple[int, int]


@dataclass(frozen=True)
class Layout:
    """Plain integers; grids are (rows, columns) in tokens. Axis letters: X text, T target, C context, N all."""

    text_tokens: int
    target_grid: Grid
    reference_grids: tuple[Grid, ...]

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
    def target(self) -> slice:
        return slice(self.text_tokens, self.text_tokens + self.target_tokens)

    @property
    def context(self) -> slice:
        return slice(self.target.stop, self.tokens)

    @property
    def references(self) -> tuple[slice, ...]:
        """One slice of the sequence a reference."""
        slices, start = [], self.context.start
        for grid in self.reference_grids:
            slices.append(slice(start, start + prod(grid)))
            start += prod(grid)
        return tuple(slices)
