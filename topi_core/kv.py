"""Keys and values of text and references, kept at an anchor and used until the next one.

From the second anchor on they may be extrapolated: what they changed by since the one before, they go on changing by.

Axes: I images of one prompt, H heads, C reference tokens, K kept ones, X text tokens, D head dimension. Keys and values
are [I, H, X + C, D], or [I, X + C, H * D] where a model splits its heads later; tokens are the last dimension but one.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from .plan import AttentionSite

log = logging.getLogger(__name__)

Location = Literal["device", "host"]
Held = tuple[Tensor, ...]  # keys or values in the form of a codec
Pair = tuple[Held, Held]  # keys and values of one attention


class Codec:
    """How keys or values [I, .., N, D] are held: this one as the model made them. Others encode and decode."""

    def encode(self, x: Tensor) -> Held:
        return (x,)

    def decode(self, held: Held) -> Tensor:
        return held[0]

    def difference(self, new: Tensor, old: Held) -> Held:
        """new less old, in the memory of old, which is not needed any more."""
        was = self.decode(old)
        return (torch.sub(new, was, out=was),)


PLAIN = Codec()


class Extrapolation(NamedTuple):
    """Keys or values [I, .., K, D] as they were at an anchor, and where they go from there: held + ahead * change."""

    held: Held
    change: Held | None = None
    ahead: float = 0.0
    codec: Codec = PLAIN

    def behind(self, tokens: int) -> Extrapolation:
        """Without so many tokens at its beginning."""
        held, change = (x and tuple(t[..., tokens:, :] for t in x) for x in (self.held, self.change))
        return self._replace(held=held, change=change)

    def write(self, out: Tensor) -> None:
        """Puts them into `out` [I, .., K, D], which may have more heads: as many in a row get the same."""
        x = self.codec.decode(self.held)
        if self.change is not None:
            to = out if out.shape == x.shape else None
            x = torch.add(x, self.codec.decode(self.change), alpha=self.ahead, out=to)
        if out.shape != x.shape:
            out, x = out.unflatten(1, (x.shape[1], -1)), x.unsqueeze(2)
        if x is not out:
            out.copy_(x)


def extrapolation_weight(since: float, span: float) -> float:
    """The w of x + w (x - x_before): sigma went by `span` between two anchors, and by `since` from the later one on.

    A straight line, followed no further than it is long: 0 <= w <= 1. Extrapolating from a sampler's past is known from
    caches of whole blocks (TaylorSeer, arXiv 2503.06923); here it is the references' keys and values.
    """
    return min(max(since / span, 0.0), 1.0) if span else 0.0


def extend(x: Tensor, own: slice, more: Sequence[Extrapolation]) -> Tensor:
    """Keys or values x [B, .., N, D] with the kept ones behind the n that are their `own` -> [B, .., n + K, D].

    The rows of `more` [I, .., K, D] make up B, one prompt after the other.
    """
    n, kept = own.stop - own.start, more[0].held[0]
    out = x.new_empty(*x.shape[:-2], n + kept.shape[-2], x.shape[-1])
    out[..., :n, :] = x[..., own, :]
    behind = out[..., n:, :]
    for each, rows in [(more[0], behind)] if len(more) == 1 else zip(more, behind.chunk(len(more)), strict=True):
        each.write(rows)
    return out


def extend_mask(mask: Tensor, tokens: int, own: slice, kept: int) -> Tensor:
    """A mask [.., tokens] over keys, for its `own` part and `kept` more that nothing hides; other widths stay."""
    if mask.shape[-1] != tokens:
        return mask
    return torch.nn.functional.pad(mask[..., own], (0, kept), value=mask.dtype == torch.bool)


@dataclass(eq=False)
class KVCache:
    """One prompt's keys and values in every attention of the model. One object for the run, updated at its anchors.

    On the host they are pinned where the device is CUDA, and come back a layer ahead of their use.
    """

    location: Location = "device"
    key_heads: int | None = None  # where more heads than these come, in a row the same ones, they are held once
    codec: Codec = PLAIN
    step: int = -1  # of the anchor that is held
    sigma: float = 0.0
    text: int = 0  # how many tokens before the references' are the text's; all of them stay
    kept: Tensor | None = None  # [I, K] reference tokens that are held; None: all
    used: bool = False  # since its anchor
    entries: dict[AttentionSite, Pair] = field(default_factory=dict)
    changes: dict[AttentionSite, Pair] = field(default_factory=dict)  # since the anchor before
    span: float = 0.0  # of sigma, since then
    reached: set[AttentionSite] = field(default_factory=set)  # by the newest anchor
    opening: tuple[int, float, bool] | None = None
    before: tuple[int, Tensor | None] | None = None  # text, and rows [I, X + K] of the anchor that is compared with
    coming: dict[AttentionSite, _Transfer] = field(default_factory=dict)

    def open(self, step: int, sigma: float, extrapolate: bool) -> None:
        """An anchor is about to come; until it puts something, nothing changes, as a cache may skip its call.

        With `extrapolate` it is compared with what is held of an earlier step. A second call of one and the same anchor
        takes the first one's place: that has found already what changed.
        """
        self.opening = step, sigma, extrapolate

    def put(self, site: AttentionSite, k: Tensor, v: Tensor, *parts: slice) -> None:
        """Copies what stands in `parts` of an attention's keys and values [I, .., N, D]: the references, or the text
        and the references; without `parts` all of it is references. With `key_heads` they are [I, H, N, D].
        """
        if self.opening is not None:
            self._begin(*self.opening)
        if self.key_heads:
            repeated = k.shape[1] // self.key_heads
            k, v = k[:, ::repeated], v[:, ::repeated]
        self.text = sum(part.stop - part.start for part in parts[:-1])
        k, v = (torch.cat([x[..., part, :] for part in parts or (slice(None),)], -2) for x in (k, v))
        old = self.entries.pop(site, None)
        if old is not None and self.before is not None:
            self.changes.pop(site, None)
            text, rows = self.before
            if text == self.text:  # else the prompt was padded to another length: nothing to compare with
                self.changes[site] = self._difference(k, old[0], rows), self._difference(v, old[1], rows)
        held = self.codec.encode(k), self.codec.encode(v)
        self.entries[site] = held if self.location == "device" else (_to_host(held[0]), _to_host(held[1]))
        self.reached.add(site)

    def _begin(self, step: int, sigma: float, extrapolate: bool) -> None:
        self.opening = self.before = None
        self.reached.clear()
        if step != self.step and extrapolate and self.entries:
            self.before = self.text, None if self.kept is None else self._rows()
            self.span = sigma - self.sigma
        elif step != self.step:
            self.changes.clear()
        self.step, self.sigma, self.kept, self.used = step, sigma, None, False

    def _difference(self, new: Tensor, old: Held, rows: Tensor | None) -> Held:
        """new [I, .., N, D] less the old, which had the tokens at `rows` [I, K] only; no change in the others."""
        if rows is None or new.shape == old[0].shape:
            return self.codec.difference(new, old)
        was = self.codec.decode(old)
        index = rows.view(len(rows), *[1] * (new.ndim - 3), -1, 1).expand_as(was)
        return self.codec.encode(torch.zeros_like(new).scatter_(-2, index, new.gather(-2, index) - was))

    def missing(self, depth: int) -> list[int]:
        """Layers of which the newest anchor has reached no attention. What was held of those is old, and is let go."""
        for site in set(self.entries) - self.reached:
            self.entries.pop(site)
            self.changes.pop(site, None)
        return sorted(set(range(depth)) - {layer for layer, _ in self.reached})

    def shrink(self, kept: Tensor) -> None:
        """Drops the reference tokens that are not kept: kept [I, K], ascending, on any device."""
        self.kept, self.used = kept.to(self._some.device), True
        if kept.shape[1] < self.reference_tokens:
            rows = self._rows()
            for pairs in (self.entries, self.changes):
                for site, (k, v) in pairs.items():
                    pairs[site] = tuple(_take(t, rows) for t in k), tuple(_take(t, rows) for t in v)

    def _rows(self) -> Tensor:
        """The text and the kept reference tokens, among all tokens of an anchor [I, X + K]."""
        assert self.kept is not None
        text = torch.arange(self.text, device=self.kept.device).expand(len(self.kept), -1)
        return torch.cat((text, self.text + self.kept), 1)

    def read(self, site: AttentionSite, device: torch.device, sigma: float, text: bool = False) -> list[Extrapolation]:
        """Keys and values of one attention, on the device, as they should be at `sigma`: those of the references, and
        with `text` those of the text before them. RuntimeError for an attention that no anchor has reached.
        """
        if site not in self.entries:
            raise RuntimeError(not_reached(site[0]))
        self.used, ahead = True, extrapolation_weight(sigma - self.sigma, self.span)
        k, v = self.entries[site] if self.location == "device" else self._arrived(site, device)
        dk, dv = self.changes.get(site, (None, None))
        both = [Extrapolation(k, dk, ahead, self.codec), Extrapolation(v, dv, ahead, self.codec)]
        return both if text or not self.text else [each.behind(self.text) for each in both]

    @property
    def reference_tokens(self) -> int:
        """How many tokens of the references are held."""
        return self._some.shape[-2] - self.text

    @property
    def nbytes(self) -> int:
        pairs = (*self.entries.values(), *self.changes.values())
        return sum(t.nbytes for pair in pairs for held in pair for t in held)

    @property
    def _some(self) -> Tensor:
        return next(iter(self.entries.values()))[0][0]

    def clear(self) -> None:
        """Lets go of everything, also of what is on its way."""
        for transfer in self.coming.values():
            transfer.arrived()
        for part in (self.entries, self.changes, self.coming):
            part.clear()
        self.before = None

    def _arrived(self, site: AttentionSite, device: torch.device) -> Pair:
        if device.type != "cuda":
            return self.entries[site]
        stream = _stream(device)
        transfer = self.coming.pop(site, None) or _Transfer(self.entries[site], stream)
        sites = list(self.entries)  # in the order of the layers, as the anchor met them
        for after in sites[sites.index(site) + 1 :][:1]:  # the next attention's are sent for
            self.coming[after] = _Transfer(self.entries[after], stream)
        return transfer.arrived()


def not_reached(layer: int) -> str:
    return (
        f"ToPi saw no attention in layer {layer}; another patch replaces this block's attention: "
        "remove it, or choose other layers"
    )


class Memory(Protocol):
    """What keys and values take beside one call of the model, and where there is room for them."""

    def size(self, tokens: int) -> int: ...  # bytes of so many tokens, in all attentions

    def where(self, size: float, back: float = 0) -> Location | None: ...  # `back` bytes on the host were given back


class KVStore:
    """The caches of one run, which asks for room before it takes it.

    Without more room nothing is extrapolated, without any on the device keys and values lie in host memory, and
    without any there the prompts that need it run in full; the log says each of these once. Where the device runs out
    of memory all the same, the rest of the run does without them.
    """

    def __init__(self, extrapolate: bool, key_heads: int | None = None):
        self.extrapolate = extrapolate
        self.key_heads = key_heads
        self.denied: set[Hashable] = set()  # those without room: they do not ask again
        self.offloaded = self.given_up = False
        self.of_cond: dict[Hashable, KVCache] = {}

    def get(self, cond: Hashable) -> KVCache | None:
        known = self.of_cond.get(cond)
        return known if known is not None and known.entries else None

    def open(self, conds: Sequence[Hashable], step: int, sigma: float, size: float, where: Callable) -> list[KVCache]:
        """The caches that an anchor call fills, `size` bytes each; none where there is no room (`Memory.where`)."""
        held = self._held(conds, step, size, where)
        old = [self.of_cond.pop(cond) for cond in conds if cond in self.of_cond and cond not in held]
        back = sum(each.nbytes for each in old if each.location == "host")
        for each in old:  # before the new ones take their room
            each.clear()
        location: Location | None = "device" if held else self._place(conds, len(conds) * size, where, back)
        if location is None:
            return []
        caches = [held.get(cond) or KVCache(location, self.key_heads) for cond in conds]
        self.of_cond |= zip(conds, caches, strict=True)
        for each in caches:
            each.open(step, sigma, self.extrapolate)
        return caches

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in self.of_cond.values())

    def give_up(self) -> bool:
        """Lets go of all memory, and takes none any more; False where there is none."""
        size = self.nbytes / 1e9
        if size:
            log.warning(
                "ToPi: the GPU ran out of memory beside %.1f GB of keys and values, so the rest of the run goes on in "
                "full", size,
            )  # fmt: skip
            self.clear()
            self.given_up = True
        return bool(size)

    def clear(self) -> None:
        """Lets go of all memory at once, also where an error's frames still hold a cache."""
        for each in self.of_cond.values():
            each.clear()
        self.of_cond.clear()
        if self.offloaded:
            release_pinned()

    def _held(self, conds: Sequence[Hashable], step: int, size: float, where: Callable) -> dict[Hashable, KVCache]:
        """The prompts' caches that an extrapolation starts from: on the device, and not used yet in this very step.

        They stay as they are beside what comes anew, and as much again for what changed.
        """
        held = {}
        for cond in conds if self.extrapolate else ():
            each = self.get(cond)
            if each is not None and each.location == "device" and (each.step != step or not each.used):
                held[cond] = each
        more = size * (len(conds) + len(held)) - sum(each.nbytes for each in held.values())
        if held and more > 0 and where(more) != "device":
            self.extrapolate = False
            for each in self.of_cond.values():  # of no prompt, or guidance would multiply the difference
                each.changes.clear()
            said = "ToPi: no room for %.1f GB more, so keys and values are reused as they were instead of forecast"
            log.warning(said, more / 1e9)
            return {}
        return held

    def _place(self, conds: Sequence[Hashable], size: float, where: Callable, back: float) -> Location | None:
        if self.given_up or self.denied.issuperset(conds):
            return None
        location = where(size, back)
        if location is None:
            if not self.denied:
                log.warning("ToPi: no room for %.1f GB of keys and values, so what needs them runs in full", size / 1e9)
            self.denied.update(conds)
        elif location == "host" and not self.offloaded:
            self.offloaded = True
            log.warning(
                "ToPi: no room on the GPU for %.1f GB of keys and values, so they lie in host memory and are not "
                "forecast, which is slower", size / 1e9,
            )  # fmt: skip
        return location


def release_pinned() -> None:
    """Gives page-locked memory that nothing holds back to the system; torch would keep it for the process's life."""
    empty = getattr(torch._C, "_host_emptyCache", None)
    if empty is not None and torch.cuda.is_available():
        torch.cuda.synchronize()  # what the GPU may still be reading stays
        empty()


def _take(x: Tensor, kept: Tensor) -> Tensor:
    """x [I, H, C, D] or [I, C, W] -> the same with K tokens, in pinned memory where x lies there."""
    shape = (*x.shape[:-2], kept.shape[1], x.shape[-1])
    out = x.new_empty(shape) if x.device.type != "cpu" else _on_host(shape, x.dtype, x.is_pinned())
    for image, own, taken in zip(x, kept, out, strict=True):
        torch.index_select(image, -2, own, out=taken)
    return out


def _to_host(held: Held) -> Held:
    out = [_on_host(x.shape, x.dtype, pinned=x.device.type == "cuda") for x in held]
    return tuple(to.copy_(x, non_blocking=to.is_pinned()) for to, x in zip(out, held, strict=True))


def _on_host(shape: Sequence[int], dtype: torch.dtype, pinned: bool) -> Tensor:
    """A system lets only a part of its memory be pinned; what is not is copied more slowly."""
    if pinned:
        with contextlib.suppress(RuntimeError):
            return torch.empty(shape, dtype=dtype, pin_memory=True)
    return torch.empty(shape, dtype=dtype)


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all transfers to a device: torch has 32 of them, and ComfyUI moves weights on others."""
    return torch.cuda.Stream(device)


class _Transfer:
    """A copy from pinned memory to a CUDA device, on a stream of its own beside the current one's work.

    Its memory is the current stream's, whose work so far it waits for: what the attentions before have used is used
    again, and two of them at most are ever on the device.
    """

    def __init__(self, pair: Pair, stream: torch.cuda.Stream):
        k, v = (tuple(torch.empty(x.shape, dtype=x.dtype, device=stream.device) for x in held) for held in pair)
        self.pair, self.stream = (k, v), stream
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            for to, x in zip((*k, *v), (*pair[0], *pair[1]), strict=True):
                to.copy_(x, non_blocking=True)
            self.done = stream.record_event()

    def arrived(self) -> Pair:
        torch.cuda.current_stream(self.stream.device).wait_event(self.done)
        return self.pair
