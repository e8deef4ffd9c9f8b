"""Keys and values of the context, taken at an anchor step and used until the next one (mode "reuse").

A pruned token costs its linear layers and its queries as long as it is kept. A reused one costs a column of the
attention and nothing else: between anchors the sequence is text and target alone, and every attention sees the kept
tokens' keys (after RoPE) and values of the anchor beside its own. From the second anchor on they may be forecast: what
they changed by since the anchor before, they go on changing by. The text may be reused in the same way: then it leaves
the sequence as well, and its keys and values stand before the context's in the cache.

Axes: I images of one cond, H heads, C context tokens, K kept ones, X text tokens, D head dimension. Keys and values are
[I, H, X + C, D], or [I, X + C, H * D] where a model splits its heads later; tokens are the last dimension but one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

Place = tuple[int, int]
"""A layer, and which of its attentions: most have one."""

TEXT_LEFT = 2
"""Tokens of a reused text that stay in the sequence, though nothing looks at them.

torch compiles lengths of 0 and 1 apart from all others, and some kernels take no empty input.
"""


class Line(NamedTuple):
    """Keys or values [I, .., K, D] as they were at an anchor, and where they go from there: x + ahead * change."""

    x: Tensor
    change: Tensor | None = None
    ahead: float = 0.0

    def behind(self, tokens: int) -> Line:
        """Without so many tokens at its beginning."""
        change = None if self.change is None else self.change[..., tokens:, :]
        return Line(self.x[..., tokens:, :], change, self.ahead)

    def write(self, out: Tensor) -> None:
        """Puts them into `out` [I, .., K, D], which may have more heads: as many in a row get the same."""
        if out.shape == self.x.shape and self.change is not None:
            torch.add(self.x, self.change, alpha=self.ahead, out=out)
            return
        now = self.x if self.change is None else self.x.add(self.change, alpha=self.ahead)
        if out.shape != now.shape:
            out, now = out.unflatten(1, (now.shape[1], -1)), now.unsqueeze(2)
        out.copy_(now)


@dataclass
class ContextCache:
    """One cond's keys and values of its context, in every attention of the model, as they were at `sigma`.

    With `offload` they lie in host memory, pinned where the device is CUDA, and come back a layer ahead of their use.
    `before` is the same cond's cache on the same device that this one takes the place of, layer by layer. Where that is
    of the anchor before, keys and values are forecast; an earlier call of the same anchor only makes room.
    """

    step: int
    sigma: float
    offload: bool = False
    key_heads: int | None = None  # where more heads than these come, in a row the same ones, they are held once
    before: ContextCache | None = None
    kept: Tensor | None = None  # [I, K] into the context, once it is known
    text: int = 0  # how many tokens before the context's are the text's; all of them stay
    entries: dict[Place, tuple[Tensor, Tensor]] = field(default_factory=dict)
    changes: dict[Place, tuple[Tensor, Tensor]] = field(default_factory=dict)  # since the anchor before
    span: float = 0.0  # of sigma, since then
    coming: dict[Place, _Transfer] = field(default_factory=dict)

    def put(self, place: Place, k: Tensor, v: Tensor, *parts: slice) -> None:
        """Copies what stands in `parts` of an attention's keys and values [I, .., N, D]: the context, or the text and
        the context; without `parts` all of it is context. With `key_heads` they are [I, H, N, D].
        """
        if self.key_heads:
            repeated = k.shape[1] // self.key_heads
            k, v = k[:, ::repeated], v[:, ::repeated]
        self.text = sum(part.stop - part.start for part in parts[:-1])
        k, v = (torch.cat([x[..., part, :] for part in parts or (slice(None),)], -2) for x in (k, v))
        if self.before is not None:
            old = self.before.entries.pop(place)
            if self.before.text != self.text:  # the prompt was padded to another length: nothing to compare with
                self.changes.pop(place, None)
            elif self.before.step != self.step:
                known = None if self.before.kept is None else self.before.rows(self.before.kept)
                dk, dv = (_change(new, was, known) for new, was in zip((k, v), old, strict=True))
                self.changes[place] = dk, dv
                self.span = self.sigma - self.before.sigma
        self.entries[place] = (_to_host(k), _to_host(v)) if self.offload else (k, v)

    def shrink(self, kept: Tensor) -> None:
        """Drops the tokens that are not kept: kept [I, K], ascending, on any device."""
        some = next(iter(self.entries.values()))[0]
        self.kept = kept.to(some.device)
        if self.text + kept.shape[1] < some.shape[-2]:
            rows = self.rows(self.kept)
            for pairs in (self.entries, self.changes):
                for place, (k, v) in pairs.items():
                    pairs[place] = _take(k, rows), _take(v, rows)

    def rows(self, kept: Tensor) -> Tensor:
        """The text and these tokens of the context [I, K], as tokens of the cache [I, X + K]."""
        text = torch.arange(self.text, device=kept.device).expand(len(kept), -1)
        return torch.cat((text, self.text + kept), 1)

    def get(self, place: Place, device: torch.device, sigma: float, text: bool = False) -> tuple[Line, Line]:
        """Keys and values of one attention, on the device, as they should be at `sigma`: those of the context, and
        with `text` those of the text before them.

        The next attention's are sent for, where they lie in host memory.
        """
        if place in self.changes:
            ahead = forecast_weight(sigma - self.sigma, self.span)
            pairs = zip(self.entries[place], self.changes[place], strict=True)
            k, v = (Line(x, change, ahead) for x, change in pairs)
        else:
            k, v = (Line(x) for x in self._arrived(place, device))
        return (k, v) if text or not self.text else (k.behind(self.text), v.behind(self.text))

    def clear(self) -> None:
        """Lets go of everything, also of what is on its way."""
        for transfer in self.coming.values():
            transfer.arrived()
        for part in (self.entries, self.changes, self.coming):
            part.clear()
        self.before = None

    def _arrived(self, place: Place, device: torch.device) -> tuple[Tensor, Tensor]:
        if not self.offload or device.type != "cuda":
            return self.entries[place]
        stream = _stream(device)
        transfer = self.coming.pop(place, None) or _Transfer(self.entries[place], stream)
        after = self._after(place)
        if after is not None:
            self.coming[after] = _Transfer(self.entries[after], stream)
        return transfer.arrived()

    def _after(self, place: Place) -> Place | None:
        places = list(self.entries)  # in the order of the layers, as the anchor met them
        i = places.index(place) + 1
        return places[i] if i < len(places) else None

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for pairs in (self.entries, self.changes) for pair in pairs.values() for x in pair)


def forecast_weight(since: float, span: float) -> float:
    """How much of what changed from one anchor to the next is added, when sigma went on by `since` from the later one.

    Between those two it went by `span`. A straight line through both, x + w (x - x_before) with w = since / span,
    followed no further than it is long: 0 <= w <= 1. Forecasting from a sampler's past is known from caches of whole
    blocks (TaylorSeer, arXiv 2503.06923); here it is the context's keys and values.
    """
    return min(max(since / span, 0.0), 1.0) if span else 0.0


def extend(x: Tensor, context: Sequence[Line]) -> Tensor:
    """Keys or values with the context's behind their own: x [B, .., n, D] -> [B, .., n + K, D].

    The rows of the context [I, .., K, D] make up B, one cond after the other.
    """
    n, k = x.shape[-2], context[0].x.shape[-2]
    out = x.new_empty(*x.shape[:-2], n + k, x.shape[-1])
    out[..., :n, :] = x
    row = 0
    for line in context:
        line.write(out[row : row + len(line.x), ..., n:, :])
        row += len(line.x)
    return out


def extend_mask(mask: Tensor, tokens: int, own: slice, kept: int) -> Tensor:
    """A mask [.., tokens] over the keys of a sequence, for those of its `own` part and `kept` more that nothing hides;
    one of another width stays.
    """
    if mask.shape[-1] != tokens:
        return mask
    return torch.nn.functional.pad(mask[..., own], (0, kept), value=mask.dtype == torch.bool)


def _take(x: Tensor, kept: Tensor) -> Tensor:
    """x [I, H, C, D] or [I, C, W] -> the same with K tokens, in pinned memory where x lies there."""
    shape = (*x.shape[:-2], kept.shape[1], x.shape[-1])
    out = x.new_empty(shape) if x.device.type != "cpu" else _on_host(shape, x.dtype, x.is_pinned())
    for image, own, taken in zip(x, kept, out, strict=True):
        torch.index_select(image, -2, own, out=taken)
    return out


def _index(kept: Tensor, x: Tensor) -> Tensor:
    """kept [I, K] as an index into the tokens of x [I, .., C, D]."""
    return kept.view(kept.shape[0], *[1] * (x.ndim - 3), -1, 1).expand(*x.shape[:-2], -1, x.shape[-1])


def _change(new: Tensor, old: Tensor, kept: Tensor | None) -> Tensor:
    """new [I, .., C, D] less the old of the tokens that were kept; none in those that were not."""
    if kept is None or new.shape == old.shape:
        return new - old
    index = _index(kept, new)
    return torch.zeros_like(new).scatter_(-2, index, new.gather(-2, index) - old)


def _to_host(x: Tensor) -> Tensor:
    out = _on_host(x.shape, x.dtype, pinned=x.device.type == "cuda")
    return out.copy_(x, non_blocking=out.is_pinned())


def _on_host(shape: Sequence[int], dtype: torch.dtype, pinned: bool) -> Tensor:
    """A system lets only a part of its memory be pinned; what is not is copied more slowly."""
    if pinned:
        with contextlib.suppress(RuntimeError):
            return torch.empty(shape, dtype=dtype, pin_memory=True)
    return torch.empty(shape, dtype=dtype)


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all transfers to a device: torch has 32 of them, and ComfyUI moves weights on others."""
    return torch.cuda.Stream(device)


class _Transfer:
    """A copy from pinned memory to a CUDA device, on a stream of its own beside the current one's work.

    Its memory is the current stream's, and the copy waits for what that had to do when it was ordered: so what the
    attentions before have used is used again, and two of them at most are ever on the device.
    """

    def __init__(self, pair: tuple[Tensor, Tensor], stream: torch.cuda.Stream):
        k, v = (torch.empty(x.shape, dtype=x.dtype, device=stream.device) for x in pair)
        self.pair, self.stream = (k, v), stream
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            for to, x in zip(self.pair, pair, strict=True):
                to.copy_(x, non_blocking=True)
            self.done = stream.record_event()

    def arrived(self) -> tuple[Tensor, Tensor]:
        torch.cuda.current_stream(self.stream.device).wait_event(self.done)
        return self.pair
