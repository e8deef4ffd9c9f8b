"""Keys and values of the context, taken at an anchor step and used until the next one (mode "reuse").

A pruned token costs its linear layers and its queries as long as it is kept. A reused one costs a column of the
attention and nothing else: between anchors the sequence is text and target alone, and every attention sees the kept
tokens' keys (after RoPE) and values of the anchor beside its own. From the second anchor on they may be forecast: what
they changed by since the anchor before, they go on changing by.

Axes: I images of one cond, H heads, C context tokens, K kept ones, D head dimension. Keys and values are
[I, H, C, D], or [I, C, H * D] where a model splits its heads later; tokens are the last dimension but one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Place = tuple[int, int]
"""A layer, and which of its attentions: most have one."""


def cache_bytes(layers: int, tokens: int, hidden: int, itemsize: int, rows: int) -> int:
    """What keys and values of so many context tokens take at most, in all layers."""
    return 2 * layers * tokens * hidden * itemsize * rows


@dataclass
class ContextCache:
    """One cond's keys and values of its context, in every attention of the model, as they were at `sigma`.

    With `offload` they lie in host memory, pinned where the device is CUDA, and come back a layer ahead of their use.
    With `before`, the same cond's cache of the anchor before, on the same device, they are forecast; it is used up.
    """

    step: int
    sigma: float
    offload: bool = False
    before: ContextCache | None = None
    kept: Tensor | None = None  # [I, K] into the context, once it is known
    entries: dict[Place, tuple[Tensor, Tensor]] = field(default_factory=dict)
    changes: dict[Place, tuple[Tensor, Tensor]] = field(default_factory=dict)  # since the anchor before
    span: float = 0.0  # of sigma, since then
    coming: dict[Place, _Transfer] = field(default_factory=dict)
    stream: torch.cuda.Stream | None = None

    def put(self, place: Place, k: Tensor, v: Tensor) -> None:
        """Takes over the context's part of an attention's keys and values [I, .., C, D]; they are copied."""
        copy = _to_host if self.offload else torch.clone
        self.entries[place] = copy(k), copy(v)
        if self.before is not None:
            old = self.before.entries.pop(place)
            dk, dv = (_change(new, was, self.before.kept) for new, was in zip((k, v), old, strict=True))
            self.changes[place] = dk, dv
            self.span = self.sigma - self.before.sigma

    def shrink(self, kept: Tensor) -> None:
        """Drops the tokens that are not kept: kept [I, K], ascending, on any device."""
        some = next(iter(self.entries.values()))[0]
        self.kept = kept.to(some.device)
        if kept.shape[1] < some.shape[-2]:
            for pairs in (self.entries, self.changes):
                for place, (k, v) in pairs.items():
                    pairs[place] = _take(k, self.kept), _take(v, self.kept)

    def get(self, place: Place, device: torch.device, sigma: float) -> tuple[Tensor, Tensor]:
        """Keys and values of one attention, on the device, as they should be at `sigma`.

        The next attention's are sent for, where they lie in host memory.
        """
        if place in self.changes:
            ahead = forecast_weight(sigma - self.sigma, self.span)
            pairs = zip(self.entries[place], self.changes[place], strict=True)
            k, v = (x.add(change, alpha=ahead) for x, change in pairs)
            return k, v
        if not self.offload or device.type != "cuda":
            return self.entries[place]
        self.stream = self.stream or torch.cuda.Stream(device)
        transfer = self.coming.pop(place, None) or _Transfer(self.entries[place], self.stream)
        after = self._after(place)
        if after is not None:
            self.coming[after] = _Transfer(self.entries[after], self.stream)
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


def extend(x: Tensor, caches: Sequence[Tensor]) -> Tensor:
    """Keys or values with the context's behind their own: x [B, .., n, D] -> [B, .., n + K, D].

    The rows of the caches [I, .., K, D] make up B, one cond after the other.
    """
    n, k = x.shape[-2], caches[0].shape[-2]
    out = x.new_empty(*x.shape[:-2], n + k, x.shape[-1])
    out[..., :n, :] = x
    row = 0
    for cache in caches:
        out[row : row + len(cache), ..., n:, :] = cache
        row += len(cache)
    return out


def extend_mask(mask: Tensor, own: int, kept: int) -> Tensor:
    """A mask [.., own] over an attention's own keys, for `kept` more that nothing hides; a wider one stays."""
    if mask.shape[-1] != own:
        return mask
    return torch.nn.functional.pad(mask, (0, kept), value=mask.dtype == torch.bool)


def _take(x: Tensor, kept: Tensor) -> Tensor:
    """x [I, H, C, D] or [I, C, W] -> the same with K tokens."""
    taken = x.gather(-2, _index(kept, x))
    return taken.pin_memory() if x.is_pinned() else taken


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
    if x.device.type != "cuda":
        return x.to("cpu", copy=True)
    try:
        pinned = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    except RuntimeError:  # a system lets only a part of its memory be pinned; what is not is copied more slowly
        return x.to("cpu", copy=True)
    return pinned.copy_(x, non_blocking=True)


class _Transfer:
    """A copy from pinned memory to a CUDA device, on a stream of its own beside the current one's work."""

    def __init__(self, pair: tuple[Tensor, Tensor], stream: torch.cuda.Stream):
        self.stream = stream
        with torch.cuda.stream(stream):
            k, v = (x.to(stream.device, non_blocking=True) for x in pair)
            self.pair = k, v
            self.done = stream.record_event()

    def arrived(self) -> tuple[Tensor, Tensor]:
        current = torch.cuda.current_stream(self.stream.device)
        current.wait_event(self.done)
        for x in self.pair:
            x.record_stream(current)
        return self.pair
