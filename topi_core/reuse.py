"""Keys and values of the context, taken at an anchor step and used until the next one (mode "reuse").

A pruned token costs its linear layers and its queries as long as it is kept. A reused one costs a column of the
attention and nothing else: between anchors the sequence is text and target alone, and every attention sees the kept
tokens' keys (after RoPE) and values of the anchor beside its own.

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
    """One cond's keys and values of its context, in every attention of the model.

    With `offload` they lie in host memory, pinned where the device is CUDA, and come back a layer ahead of their use.
    """

    offload: bool = False
    kept: Tensor | None = None  # [I, K] into the context, once it is known
    entries: dict[Place, tuple[Tensor, Tensor]] = field(default_factory=dict)
    coming: dict[Place, _Transfer] = field(default_factory=dict)
    stream: torch.cuda.Stream | None = None

    def put(self, place: Place, k: Tensor, v: Tensor) -> None:
        """Takes over the context's part of an attention's keys and values [I, .., C, D]; they are copied."""
        copy = _to_host if self.offload else torch.clone
        self.entries[place] = copy(k), copy(v)

    def shrink(self, kept: Tensor) -> None:
        """Drops the tokens that are not kept: kept [I, K], ascending, on any device."""
        some = next(iter(self.entries.values()))[0]
        self.kept = kept.to(some.device)
        if kept.shape[1] < some.shape[-2]:
            for place, (k, v) in self.entries.items():
                self.entries[place] = _take(k, self.kept), _take(v, self.kept)

    def get(self, place: Place, device: torch.device) -> tuple[Tensor, Tensor]:
        """Keys and values of one attention, on the device; the next attention's are sent for."""
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
        return sum(x.nbytes for pair in self.entries.values() for x in pair)


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
    index = kept.view(kept.shape[0], *[1] * (x.ndim - 3), -1, 1)
    taken = x.gather(-2, index.expand(*x.shape[:-2], -1, x.shape[-1]))
    return taken.pin_memory() if x.is_pinned() else taken


def _to_host(x: Tensor) -> Tensor:
    if x.device.type != "cuda":
        return x.to("cpu", copy=True)
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


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
