"""Where the tokens of one model call stand in the sequence, by default [text | target | reference 1 | ...]."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Literal

Grid = tuple[int, int]
Part = Literal["text", "target", "references"]


@dataclass(frozen=True)
class Layout:
    """Plain integers; grids are (rows, columns) in tokens.

    Axis letters: X text, T target, C all references (the paper's context), N the whole sequence.
    `order` is that of the model's attention; the references stand together and keep their own order.
    """

    text_tokens: int
    target_grid: Grid
    reference_grids: tuple[Grid, ...]
    order: tuple[Part, Part, Part] = ("text", "target", "references")

    @cached_property
    def target_tokens(self) -> int:
        return prod(self.target_grid)

    @cached_property
    def reference_tokens(self) -> int:
        """Of all references together."""
        return sum(prod(grid) for grid in self.reference_grids)

    @cached_property
    def tokens(self) -> int:
        return self.text_tokens + self.target_tokens + self.reference_tokens

    @cached_property
    def text(self) -> slice:
        return self._place("text")

    @cached_property
    def target(self) -> slice:
        return self._place("target")

    @cached_property
    def reference(self) -> slice:
        """All references together."""
        return self._place("references")

    @cached_property
    def references(self) -> tuple[slice, ...]:
        """One slice of the sequence per reference."""
        slices, start = [], self.reference.start
        for grid in self.reference_grids:
            slices.append(slice(start, start + prod(grid)))
            start += prod(grid)
        return tuple(slices)

    @cached_property
    def without_text(self) -> Layout:
        """The same images where the text has a stream of its own."""
        return replace(self, text_tokens=0)

    def with_text(self, tokens: int) -> Layout:
        """The same images beside a text of so many tokens."""
        return self if tokens == self.text_tokens else replace(self, text_tokens=tokens)

    def of(self, tokens: int) -> Layout | None:
        """The layout of so many tokens: the whole sequence's, or that of the images alone; None for any other."""
        if tokens == self.tokens:
            return self
        return self.without_text if tokens == self.without_text.tokens else None

    def _place(self, part: Part) -> slice:
        lengths = {"text": self.text_tokens, "target": self.target_tokens, "references": self.reference_tokens}
        start = sum(lengths[before] for before in self.order[: self.order.index(part)])
        return slice(start, start + lengths[part])
