"""The keys and values that one run holds: a cache a cond, from anchor to anchor (mode "reuse")."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ..topi_core.reuse import ContextCache
from .memory import Room, Where, release_pinned

log = logging.getLogger(__name__)


class Caches:
    """Asks for room before it is taken. Without more of it there is no forecast, without any on the device they lie in
    host memory, and without any there the run goes on in full; the log says each of these once.
    """

    def __init__(self, forecast: bool, key_heads: int | None = None):
        self.forecast = forecast
        self.key_heads = key_heads
        self.crowded = False
        self.offloaded = False
        self.of_cond: dict[object, ContextCache] = {}
        self.filling: list[ContextCache] = []  # those of the newest anchor call

    def get(self, cond: object) -> ContextCache | None:
        return self.of_cond.get(cond)

    def fresh(self, conds: Sequence[object], step: int, sigma: float, size: float, room: Room) -> list[ContextCache]:
        """Empty caches of `size` bytes each for the conds of an anchor call; none where there is no room."""
        held = self._held(conds, step, size, room)
        if not held:
            for cond in conds:
                self.of_cond.pop(cond, None)  # before the new ones take their room
        where: Where | None = "device" if held else self._where(len(conds) * size, room)
        if where is None:
            return []
        self.filling = [ContextCache(step, sigma, where == "host", self.key_heads) for _ in conds]
        for cond, cache in zip(conds, self.filling, strict=True):
            before = held.get(cond)
            if before and before.step == step:  # another call of this very anchor: its first one found what changed
                cache.changes, cache.span = before.changes, before.span
            elif before:
                before.changes.clear()
                cache.before = before
        return self.filling

    def keep(self, conds: Sequence[object], caches: Sequence[ContextCache]) -> None:
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

    def clear(self) -> None:
        """Lets go of all memory at once, also where an error's frames still hold a cache."""
        caches = [*self.of_cond.values(), *self.filling]
        offloaded = any(cache.offload for cache in caches)
        for cache in caches:
            cache.clear()
        self.of_cond.clear()
        self.filling = []
        if offloaded:
            release_pinned()

    def _held(self, conds: Sequence[object], step: int, size: float, room: Room) -> dict[object, ContextCache]:
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

    def _where(self, size: float, room: Room) -> Where | None:
        where = None if self.crowded else room.where(size)
        if where is None and not self.crowded:
            self.crowded = True
            log.warning("ToPi: no room for %.1f GB of keys and values, so this run goes on in full", size / 1e9)
        if where == "host" and not self.offloaded:
            self.offloaded = True
            log.warning(
                "ToPi: no room on the GPU for %.1f GB of keys and values, so they lie in host memory and are not "
                "forecast, which is slower", size / 1e9,
            )  # fmt: skip
        return where
