"""The keys and values that one run holds: a cache a cond, from anchor to anchor (mode "reuse")."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple
from uuid import UUID

from ..topi_core.reuse import ContextCache
from .memory import Room, Where, release_pinned

log = logging.getLogger(__name__)


class Cond(NamedTuple):
    """What holds its own keys and values: a prompt, in a list of prompts, with blocks that others replace.

    ComfyUI gives a prompt's area to the other list by a copy with the same uuid. Skip layer guidance calls a prompt a
    second time with some blocks left out, context windows once for each part of the picture.
    """

    uuid: UUID
    index: int
    replaced: frozenset[tuple]
    window: tuple[int, ...] = ()

    @classmethod
    def of(cls, options: dict) -> tuple[Cond, ...]:
        """Those of one call, by its transformer_options."""
        replaced = frozenset(options.get("patches_replace", {}).get("dit", {}))
        window = tuple(getattr(options.get("context_window"), "index_list", ()))
        return tuple(
            cls(*pair, replaced, window) for pair in zip(options["uuids"], options["cond_or_uncond"], strict=True)
        )


class Caches:
    """Asks for room before it is taken. Without more of it there is no forecast, without any on the device they lie in
    host memory, and without any there the prompts that need it run in full; the log says each of these once. Where the
    device runs out of memory all the same, the rest of the run does without them.
    """

    def __init__(self, forecast: bool, key_heads: int | None = None):
        self.forecast = forecast
        self.key_heads = key_heads
        self.crowded: set[Cond] = set()  # those without room: they do not ask again
        self.offloaded = self.given_up = False
        self.of_cond: dict[Cond, ContextCache] = {}
        self.filling: list[ContextCache] = []  # those of the newest anchor call

    def get(self, cond: Cond) -> ContextCache | None:
        return self.of_cond.get(cond)

    def fresh(self, conds: Sequence[Cond], step: int, sigma: float, size: float, room: Room) -> list[ContextCache]:
        """Empty caches of `size` bytes each for the conds of an anchor call; none where there is no room."""
        held = self._held(conds, step, size, room)
        old = [self.of_cond.pop(cond) for cond in conds if cond in self.of_cond and cond not in held]
        back = sum(cache.nbytes for cache in old if cache.offload)
        for cache in old:  # before the new ones take their room
            cache.clear()
        where: Where | None = "device" if held else self._where(conds, len(conds) * size, room, back)
        if where is None:
            return []
        self.filling = [ContextCache(step, sigma, where == "host", self.key_heads) for _ in conds]
        for cond, cache in zip(conds, self.filling, strict=True):
            cache.before = before = held.get(cond)
            if before and before.step == step:  # another call of this very anchor: its first one found what changed
                cache.changes, cache.span = before.changes, before.span
            elif before:
                before.changes.clear()
        return self.filling

    def keep(self, conds: Sequence[Cond], caches: Sequence[ContextCache]) -> None:
        """Takes over what an anchor call filled, in place of what there was."""
        for cond, cache in zip(conds, caches, strict=True):
            cache.before = None
            self.of_cond[cond] = cache

    @property
    def nbytes(self) -> int:
        return sum(cache.nbytes for cache in self.of_cond.values())

    @property
    def forecasting(self) -> bool:
        return any(cache.changes for cache in self.of_cond.values())

    def give_up(self) -> bool:
        """Lets go of all memory, and takes none any more; False where there is none."""
        caches = {id(cache): cache for cache in (*self.of_cond.values(), *self.filling)}.values()
        size = sum(cache.nbytes for cache in caches)
        if not size:
            return False
        log.warning(
            "ToPi: the GPU ran out of memory beside %.1f GB of keys and values, so the rest of the run goes on in full",
            size / 1e9,
        )
        self.clear()
        self.given_up = True
        return True

    def clear(self) -> None:
        """Lets go of all memory at once, also where an error's frames still hold a cache."""
        for cache in (*self.of_cond.values(), *self.filling):
            cache.clear()
        self.of_cond.clear()
        self.filling = []
        if self.offloaded:
            release_pinned()

    def _held(self, conds: Sequence[Cond], step: int, size: float, room: Room) -> dict[Cond, ContextCache]:
        """The conds' caches that a forecast starts from: held on the device, and not used yet in this very step.

        The new ones take the place of what they held, and as much again for what changed.
        """
        if not self.forecast:
            return {}
        held = {cond: cache for cond in conds if (cache := self.of_cond.get(cond)) and not cache.offload}
        held = {cond: cache for cond, cache in held.items() if cache.step != step or cache.kept is None}
        more = max(0, size * (len(conds) + len(held)) - sum(cache.nbytes for cache in held.values()))
        if more and held and room.where(more) != "device":
            self.forecast = False
            for cache in self.of_cond.values():  # of no cond, or guidance would multiply the difference
                cache.changes.clear()
            log.warning(
                "ToPi: no room for %.1f GB more, so keys and values are reused as they were instead of forecast",
                more / 1e9,
            )
            return {}
        return held

    def _where(self, conds: Sequence[Cond], size: float, room: Room, back: float) -> Where | None:
        if self.given_up or self.crowded.issuperset(conds):
            return None
        where = room.where(size, back)
        if where is None:
            if not self.crowded:
                log.warning("ToPi: no room for %.1f GB of keys and values, so what needs them runs in full", size / 1e9)
            self.crowded.update(conds)
        if where == "host" and not self.offloaded:
            self.offloaded = True
            log.warning(
                "ToPi: no room on the GPU for %.1f GB of keys and values, so they lie in host memory and are not "
                "forecast, which is slower", size / 1e9,
            )  # fmt: skip
        return where
