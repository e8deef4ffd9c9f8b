"""The keys and values that one run holds: a cache a cond, from anchor to anchor (mode "reuse")."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from ..topi_core.reuse import ContextCache
from .memory import Room, room_for

log = logging.getLogger(__name__)


class Caches:
    """Asks for room before it is taken. Without any the run goes on in full, without twice as much it does not
    forecast, and the log says so once.
    """

    def __init__(self, forecast: bool):
        self.forecast = forecast
        self.crowded = False
        self.of_cond: dict[object, ContextCache] = {}

    def get(self, cond: object) -> ContextCache | None:
        return self.of_cond.get(cond)

    def fresh(
        self, conds: Sequence[object], step: int, sigma: float, size: int, device: torch.device
    ) -> list[ContextCache]:
        """Empty caches of `size` bytes each for the conds of an anchor call; none where there is no room."""
        held = self._held(conds, step, len(conds) * size, device)
        if not held:
            for cond in conds:
                self.of_cond.pop(cond, None)  # before the new ones take their room
        room: Room | None = "device" if held else self._room(len(conds) * size, device)
        if room is None:
            return []
        caches = [ContextCache(step, sigma, offload=room == "host") for _ in conds]
        for cond, cache in zip(conds, caches, strict=True):
            before = held.get(cond)
            if before and before.step == step:  # another call of this very anchor: its first one found what changed
                cache.changes, cache.span = before.changes, before.span
            elif before:
                before.changes.clear()
                cache.before = before
        return caches

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
        self.of_cond.clear()

    def _held(self, conds: Sequence[object], step: int, size: int, device: torch.device) -> dict[object, ContextCache]:
        """The conds' caches that a forecast starts from: held on the device, and not used yet in this very step."""
        if not self.forecast:
            return {}
        held = {cond: cache for cond in conds if (cache := self.of_cond.get(cond)) and not cache.offload}
        held = {cond: cache for cond, cache in held.items() if cache.step != step or cache.kept is None}
        if held and room_for(2 * size, device) != "device":
            self.forecast = False
            log.warning(
                "ToPi: no room for %.1f GB more, so keys and values are reused as they were instead of forecast",
                2 * size / 1e9,
            )
            return {}
        return held

    def _room(self, size: int, device: torch.device) -> Room | None:
        room = None if self.crowded else room_for(size, device)
        if room is None and not self.crowded:
            self.crowded = True
            log.warning("ToPi: no room for %.1f GB of keys and values, so this run goes on in full", size / 1e9)
        return room
