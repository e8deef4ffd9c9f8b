"""Reuse: between anchors, the references' and the text's keys and values of the last anchor stand in for them.

An anchor keeps the keys (after RoPE) and values of every attention. Until the next one the sequence is the picture
alone, and each attention sees what was kept behind its own, extrapolated through the last two anchors (`kv`).
"""

from functools import partial

import torch
from torch import Tensor

from ..config import ReuseSettings
from ..kv import KVCache, KVStore, extend, extend_mask, not_reached
from ..plan import Attention, Call, Cut, Plan, Saving
from ..references import References
from ..trace import Run

TEXT_LEFT = 2
"""Tokens of a reused text that stay, though unseen: some kernels take none, and torch compiles for 0 and 1 apart."""


class Reuse(Saving):
    def __init__(self, run: Run, references: References, settings: ReuseSettings, key_heads: int | None = None):
        self.run = run
        self.references = references
        self.text = settings.reuse_text
        self.store = KVStore(settings.forecast, key_heads)
        self.cuts: dict[tuple, Cut] = {}  # until the next anchor

    def observe(self, plan: Plan, call: Call) -> bool:
        if self.run.interval == 1:
            return True  # every step that is computed is an anchor: nothing would be read
        assert call.memory is not None
        text = call.layout.text_tokens if self.text and call.text_leaves else 0
        size = call.images * call.memory.size(text + call.layout.reference_tokens)
        caches = self.store.open(call.conds, call.step, call.sigma, size, call.memory.where)
        self.run.offloaded = self.store.offloaded
        if not caches:
            self.run.no_room = True
            return False
        plan.notes[self] = caches
        plan.on_attention(partial(_keep, call, caches, self.text and call.text_leaves), range(self.run.model.depth))
        return True

    def apply(self, plan: Plan, call: Call) -> bool:
        """False where a prompt has no cache."""
        if not call.sets:
            return True
        self.references.settle()
        caches = [cache for cond in call.conds if (cache := self.store.get(cond)) is not None]
        if len(caches) < len(call.conds):
            return False
        for cache, of in zip(caches, call.sets, strict=True):
            if cache.kept is None and of.selection is not None:
                cache.shrink(of.selection.kept())  # as many of each reference's size, as `max_keep` has it
        texts = {cache.text for cache in caches}
        with_text = self.text and call.text_leaves and len(texts) == 1 and texts != {0}
        plan.kind, plan.cut = "reused", self._cut(caches, with_text, call)
        plan.on_attention(partial(_reuse, call, caches, plan.cut), range(self.run.model.depth))
        return True

    def commit(self, plan: Plan, call: Call, output: Tensor) -> None:
        if plan.kind != "anchor" or self not in plan.notes:
            return
        self.cuts.clear()
        for cond, cache in zip(call.conds, plan.notes[self], strict=True):
            missing = cache.missing(self.run.model.depth)
            if missing and not cond.replaced:
                raise RuntimeError(not_reached(missing[0]))
        self.run.cache_bytes = max(self.run.cache_bytes, self.store.nbytes)
        self.run.forecast |= any(cache.changes for cache in self.store.of_cond.values())

    def free(self) -> bool:
        given_up = self.store.give_up()
        self.run.no_room |= given_up
        return given_up

    def release(self) -> None:
        self.store.clear()

    def _cut(self, caches: list[KVCache], with_text: bool, call: Call) -> Cut:
        key = (with_text, *map(id, caches))
        if key not in self.cuts:
            every = torch.arange(caches[0].reference_tokens)[None]
            kept = [every if cache.kept is None else cache.kept for cache in caches]
            stand_in = torch.cat(kept) if any(cache.kept is not None for cache in caches) else every
            self.cuts[key] = Cut(TEXT_LEFT if with_text else None, None, stand_in.to(call.device), with_text)
        return self.cuts[key]


def _keep(call: Call, caches: list[KVCache], with_text: bool, seen: Attention) -> None:
    """Keeps an attention's keys and values of the references, and perhaps of the text, for each prompt of the call."""
    layout = call.layout.of(seen.k.shape[-2])
    if layout is None:
        raise RuntimeError(call.unexpected(seen.k.shape[-2]))
    parts = (layout.text, layout.reference) if with_text else (layout.reference,)
    for cache, k, v in zip(caches, seen.k.chunk(len(caches)), seen.v.chunk(len(caches)), strict=True):
        cache.put(seen.site, k, v, *parts)


def _reuse(call: Call, caches: list[KVCache], cut: Cut, seen: Attention) -> None:
    """Shows an attention the kept keys and values behind its own, and in place of those of text that left."""
    own = cut.own_keys(call.layout, seen.k.shape[-2])
    pairs = [cache.read(seen.site, seen.k.device, call.sigma, cut.stand_in_text) for cache in caches]
    keys, values = zip(*pairs, strict=True)
    if seen.mask is not None:
        seen.mask = extend_mask(seen.mask, seen.k.shape[-2], own, keys[0].held[0].shape[-2])
    seen.k = extend(seen.k, own, keys)
    seen.v = extend(seen.v, own, values)
