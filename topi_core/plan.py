"""What one call of the network computes: a plan, made by the savings, and carried out by what knows the network.

Axes: B batch rows, H heads, N tokens of the whole sequence, n of the rows that are computed, D head dimension.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from uuid import UUID

import torch
from torch import Tensor

from .layout import Layout

if TYPE_CHECKING:
    from .kv import Memory
    from .references import ReferenceSet

Kind = Literal["skipped", "full", "pruned", "reused", "anchor"]
"""What becomes of a call or a step, in the order in which the calls of one step outrank one another."""
AttentionSite = tuple[int, int]  # a layer, and which of its attentions: most have one


@dataclass
class Attention:
    """What one attention is about to compute. Who listens may put other keys, values and masks in their place.

    q, k, v are [B, H, N, D], or [B, N, H * D] where the model `splits_later`; keys and values may have fewer heads than
    queries (grouped-query attention).
    """

    site: AttentionSite
    q: Tensor
    k: Tensor
    v: Tensor
    heads: int
    mask: Tensor | None
    splits_later: bool

    def heads_first(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v as [B, H, N, D], all with as many heads as the queries."""
        q, k, v = self.q, self.k, self.v
        if self.splits_later:
            q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        k, v = (x if x.shape[1] == self.heads else x.repeat_interleave(self.heads // x.shape[1], 1) for x in (k, v))
        return q, k, v

    def four_dims(self) -> Tensor | None:
        """The mask as ComfyUI's attention reads it: [N, N] and [B, N, N] are for all heads."""
        mask = self.mask
        if mask is None or mask.ndim == 4:
            return mask
        return mask[None, None] if mask.ndim == 2 else mask[:, None]


OnAttention = Callable[[Attention], None]
OnInput = Callable[[int, Tensor, Layout], None]
"""Sees a layer's hidden states [B, N, W] before it runs, and their layout."""
OnOutput = Callable[[Tensor, Layout], Tensor]
"""Takes the last block's hidden states, [B, n, W] where the plan has a cut, and gives those that go on."""


@dataclass(frozen=True, eq=False)
class Cut:
    """Which rows of the sequence the blocks compute, and which keys their attentions see (Eq. 12).

    Rows: the first `text` tokens of the text (None: all), the target, and the references' tokens `kept`, [1 or B, K]
    ascending indices (None: all). Keys: those of the rows. But keys and values of the references' tokens `stand_in`
    [1 or B, K] are kept from an anchor: no row of any reference is computed, and they stand behind the attention's own;
    with `stand_in_text` so do those of the whole text, before the references'.
    """

    text: int | None = None
    kept: Tensor | None = None
    stand_in: Tensor | None = None
    stand_in_text: bool = False
    _indices: dict[tuple[Layout, bool], Tensor] = field(default_factory=dict)

    def rows(self, layout: Layout) -> Tensor:
        """Indices of the rows that are computed, [1 or B, n] into the sequence of this layout."""
        return self._index(layout, keys=False)

    def keys(self, layout: Layout) -> Tensor:
        """Where the attention's keys come from, [1 or B, m] into the sequence of this layout."""
        return self._index(layout, keys=self.stand_in is not None)

    def tokens(self, layout: Layout) -> int:
        """How many rows are computed."""
        references = layout.reference_tokens if self.kept is None else self.kept.shape[1]
        return self._text(layout) + layout.target_tokens + (references if self.stand_in is None else 0)

    def key_tokens(self, layout: Layout) -> int:
        """How many keys an attention sees."""
        if self.stand_in is None:
            return self.tokens(layout)
        return layout.text_tokens + layout.target_tokens + self.stand_in.shape[1]

    def own_keys(self, layout: Layout, tokens: int) -> slice:
        """Of an attention's own keys, those that nothing stands in for: all but the text's, which is at one end."""
        text = self._text(layout) if self.stand_in_text else 0
        return slice(text, tokens) if layout.text.start == 0 else slice(0, tokens - text)

    def gather(self, x: Tensor, layout: Layout, dim: int = 1) -> Tensor:
        """x with only those rows that are computed, along `dim`, which runs over the sequence of this layout."""
        return _take(x, self.rows(layout), dim)

    def scatter(self, short: Tensor, whole: Tensor, layout: Layout) -> Tensor:
        """`whole` [B, N, W] with the computed rows `short` [B, n, W] in their places."""
        rows = self.rows(layout).expand(len(whole), -1)[..., None].expand_as(short)
        return whole.scatter(1, rows, short)

    def shorten(self, x: Tensor, layout: Layout, dims: Iterable[int]) -> Tensor:
        """x, positions or a mask, gathered along those of `dims` that run over all or the images' tokens; -1: keys."""
        for dim in dims:
            of = layout.of(x.shape[dim])
            if of is not None:
                x = _take(x, self.keys(of) if dim == -1 else self.rows(of), dim % x.ndim)
        return x

    def _text(self, layout: Layout) -> int:
        return layout.text_tokens if self.text is None else min(self.text, layout.text_tokens)

    def _index(self, layout: Layout, keys: bool) -> Tensor:
        if (layout, keys) not in self._indices:
            some = self.kept if self.stand_in is None else self.stand_in
            every = torch.arange(layout.tokens, device=None if some is None else some.device)[None]
            text, target = every[:, layout.text], every[:, layout.target]
            references = every[:, layout.reference] if some is None else layout.reference.start + some
            own, behind = {"text": text[:, : self.text], "target": target, "references": references}, []
            if self.stand_in is not None:
                behind = [own.pop("references")]
            if self.stand_in_text and keys:
                del own["text"]
                behind = [text, *behind]
            parts = [own[part] for part in layout.order if part in own] + behind * keys
            batch = max(map(len, parts))
            self._indices[layout, keys] = torch.cat([part.expand(batch, -1) for part in parts], 1)
        return self._indices[layout, keys]


def _take(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """x [1 or B, ..., N, ...] by index [1 or B, n] along `dim`; each row of the batch by its own indices."""
    if len(index) == 1:
        return x.index_select(dim, index[0])
    if dim == 0:  # a mask [N, N], for all rows of the batch
        x, dim = x[None], 1
    rows = x.expand(len(index), *x.shape[1:])
    return torch.stack([row.index_select(dim - 1, own) for row, own in zip(rows, index, strict=True)])


@dataclass(eq=False)
class Plan:
    """What one call computes, and who looks on. Without a cut it is what the network does by itself."""

    kind: Kind = "full"
    cut: Cut | None = None
    first_layer: int = 0  # of those that the cut holds for
    attention: dict[int, list[OnAttention]] = field(default_factory=lambda: defaultdict(list))
    inputs: dict[int, list[OnInput]] = field(default_factory=lambda: defaultdict(list))
    output: list[OnOutput] = field(default_factory=list)
    answer: Tensor | None = None  # in place of the network's output: nothing is computed
    notes: dict[Saving, Any] = field(default_factory=dict)  # what a saving wants to find again when the call has run
    counts: bool = True  # an anchor is the newest one of its sets of references

    def on_attention(self, handler: OnAttention, layers: Iterable[int]) -> None:
        for layer in layers:
            self.attention[layer].append(handler)

    def on_input(self, handler: OnInput, layers: Iterable[int]) -> None:
        for layer in layers:
            self.inputs[layer].append(handler)


class CondKey(NamedTuple):
    """What has its own keys and values."""

    uuid: UUID  # of a prompt
    side: int  # which list of prompts: ComfyUI gives an area to the other one by a copy with the same uuid
    replaced: frozenset[tuple]  # blocks; skip layer guidance calls a prompt a second time without some of them
    window: tuple[int, ...] = ()  # context windows call a prompt once for each part of the picture


@dataclass(eq=False)
class Call:
    """One call of the network: its rows are `conds` x `images`, prompt by prompt."""

    step: int
    sigma: float
    layout: Layout  # with the text as the blocks get it, once `computed`
    conds: tuple[CondKey, ...]
    images: int
    device: torch.device
    sets: Sequence[ReferenceSet] = ()  # the references of each prompt; empty where the call has none
    text_leaves: bool = False  # whether the network bears that its text leaves the sequence
    memory: Memory | None = None
    computed: bool = False  # turns true when the network really runs, as a cache may answer in its place
    steps: int = 1  # of the run

    def rows(self, prompt: int) -> slice:
        return slice(prompt * self.images, (prompt + 1) * self.images)

    def unexpected(self, tokens: int) -> str:
        """The sentence for a sequence of another length than the layout's."""
        return (
            f"ToPi expected {self.layout.tokens} tokens ({self.layout}) and found {tokens}; "
            "another patch changes the sequence: remove it or ToPi Patch"
        )


class Saving:
    """A way to compute less, or something that only looks on. It lives for one run.

    At an anchor everything is computed, and a saving asks to see what it will need. Between anchors it takes away from
    the plan what it can do without.
    """

    def observe(self, plan: Plan, call: Call) -> bool:
        """At an anchor. False: it cannot take part, and the call is no anchor but runs in full."""
        return True

    def apply(self, plan: Plan, call: Call) -> bool:
        """Between anchors. False: it lacks what it needs, and the call must be an anchor."""
        return True

    def commit(self, plan: Plan, call: Call, output: Tensor) -> None:
        """The call has run, and this is what the network made of it."""

    def free(self) -> bool:
        """Out of memory: lets go of what takes any; False where that is nothing."""
        return False

    def release(self) -> None:
        """The run is over."""
