"""Which tokens go together, and what stands for them: the mathematics of the baselines that merge, in torch alone.

Axes: B batch rows, L tokens of the images that are merged, K of those that stay, W width of the hidden states. Images
stand one behind the other in L, each row by row of its grid.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import normalize

from topi_core.layout import Grid


@cache
def windows(grids: tuple[Grid, ...], side: int) -> tuple[Tensor, ...]:
    """The windows of `side` x `side` tokens of each grid, those of one shape together: [windows, tokens of each].

    Where a grid's sides are no multiples, windows at its right and lower edge are smaller.
    """
    by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
    starts = accumulate((math.prod(grid) for grid in grids), initial=0)
    for start, grid in zip(starts, grids, strict=False):
        index = start + torch.arange(math.prod(grid)).view(grid)
        for band in index.split(side, 0):
            for window in band.split(side, 1):
                by_shape[window.shape].append(window.flatten())
    return tuple(torch.stack(alike) for alike in by_shape.values())


@dataclass(frozen=True, eq=False)
class Groups:
    """Each token goes into one that stays, and these into themselves."""

    kept: Tensor  # [B, K] indices of those that stay, ascending
    into: Tensor  # [B, L] places among them

    def merge(self, x: Tensor) -> Tensor:
        """The mean of each group, added up in float32 or more: x [B, L, W] -> [B, K, W]."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        sums = wide.new_zeros(len(x), self.kept.shape[1], x.shape[2])
        sums = sums.scatter_add(1, self.into[..., None].expand_as(x), wide)
        sizes = wide.new_zeros(sums.shape[:2]).scatter_add(1, self.into, wide.new_ones(self.into.shape))
        return (sums / sizes[..., None]).to(x.dtype)

    def unmerge(self, y: Tensor) -> Tensor:
        """Copies for all members of each group: y [B, K, W] -> [B, L, W]."""
        return y.gather(1, self.into[..., None].expand(-1, -1, y.shape[2]))


@dataclass(frozen=True, eq=False)
class Shares:
    """Each token goes in shares into the destinations of its window (ToMA, arXiv 2509.10918).

    parts: for windows of one shape their tokens [w, n], the places of their destinations among those kept [B, w, k],
    and the share of each token that goes to each of these [B, w, k, n], which sum to 1 over k.
    """

    kept: Tensor  # [B, K] indices of the destinations, ascending
    parts: Sequence[tuple[Tensor, Tensor, Tensor]]

    def merge(self, x: Tensor) -> Tensor:
        """The mean of what each destination gets, by the shares: x [B, L, W] -> [B, K, W]."""
        y = x.new_zeros(len(x), self.kept.shape[1], x.shape[2])
        for tokens, places, shares in self.parts:
            rows = shares / shares.sum(-1, keepdim=True).clamp(min=1e-12)
            means = (rows.to(x.dtype) @ x[:, tokens]).flatten(1, 2)  # [B, w * k, W]
            y = y.scatter(1, places.flatten(1)[..., None].expand_as(means), means)
        return y

    def unmerge(self, y: Tensor) -> Tensor:
        """The transpose: each token gets back of its destinations by its shares. y [B, K, W] -> [B, L, W]."""
        x = y.new_empty(len(y), sum(tokens.numel() for tokens, _, _ in self.parts), y.shape[2])
        for tokens, places, shares in self.parts:
            index = places.flatten(1)[..., None].expand(-1, -1, y.shape[2])
            x[:, tokens] = shares.mT.to(y.dtype) @ y.gather(1, index).unflatten(1, places.shape[1:])
        return x


def grouped(tokens: int, gone: Tensor, to: Tensor) -> Groups:
    """Groups of `tokens` tokens in which those of the indices `gone` [B, G] go into `to` [B, G], which stay."""
    own = torch.arange(tokens, device=gone.device).expand(len(gone), -1)
    into = own.scatter(1, gone, to)
    stays = into == own
    return Groups(_first(stays, tokens - gone.shape[1]), (stays.cumsum(1) - 1).gather(1, into))


def _first(wanted: Tensor, count: int) -> Tensor:
    """Ascending indices of the `count` that are wanted in each row: bool [B, L] -> [B, count], without a wait."""
    return (~wanted).byte().argsort(dim=1, stable=True)[:, :count]


def _others(of: Tensor, tokens: int) -> Tensor:
    """Ascending indices of all tokens but those of [B, n] -> [B, tokens - n]."""
    all_ = torch.ones(len(of), tokens, dtype=torch.bool, device=of.device)
    return _first(all_.scatter(1, of, False), tokens - of.shape[1])


def match(x: Tensor, sources: Tensor, destinations: Tensor) -> tuple[Tensor, Tensor]:
    """Of each source the most similar destination, by the cosine of their hidden states.

    x [B, L, W], indices [B, S] and [B, D] -> cosines [B, S], indices of destinations [B, S]
    """
    directions = normalize(x.float(), dim=-1)
    some, others = (directions.gather(1, i[..., None].expand(-1, -1, x.shape[2])) for i in (sources, destinations))
    best, at = (some @ others.mT).max(-1)
    return best, destinations.gather(1, at)


def nearest(x: Tensor, kept: Tensor) -> Groups:
    """Every token that is not among kept [1 or B, K] goes into the kept one that is most like it (Table 4's merge)."""
    kept = kept.expand(len(x), -1)
    gone = _others(kept, x.shape[1])
    return grouped(x.shape[1], gone, match(x, gone, kept)[1])


def bipartite(x: Tensor, destinations: Sequence[Tensor], sources: Sequence[Tensor], away: int) -> Groups:
    """The `away` sources that are most like a destination of their own image go into it (ToMe, arXiv 2303.17604).

    x [B, L, W]; for each image indices [B, D] and [B, S]
    """
    pairs = [match(x, *both) for both in zip(sources, destinations, strict=True)]
    best, to = (torch.cat(some, 1) for some in zip(*pairs, strict=True))
    order = best.argsort(dim=1, descending=True, stable=True)[:, :away]
    return grouped(x.shape[1], torch.cat(list(sources), 1).gather(1, order), to.gather(1, order))


def strided(x: Tensor, grids: tuple[Grid, ...], side: int) -> tuple[list[Tensor], list[Tensor]]:
    """ToMeSD's split of each image: the first token of each window is a destination, all others are sources.

    x [B, L, W] -> for each image destinations [B, D] and sources [B, S], both ascending
    """
    every, start = ([], []), 0
    for grid in grids:
        own = torch.cat([window[:, 0] for window in windows((grid,), side)]).sort().values.to(x.device)
        own = own.expand(len(x), -1)
        for list_, index in zip(every, (own, _others(own, math.prod(grid))), strict=True):
            list_.append(start + index)
        start += math.prod(grid)
    return every


def medoids(similarity: Tensor, count: int) -> Tensor:
    """The `count` tokens j that cover all tokens i best: greedily the most of the sum over i of max over j of s_ij.

    This is ToMA's facility location. similarity [..., n, n] at least -1 -> ascending indices [..., count]
    """
    covered = torch.full_like(similarity[..., 0], -1.0)  # [..., n], how well each token is
    free = torch.ones_like(covered, dtype=torch.bool)
    for _ in range(count):
        gain = (similarity - covered[..., None]).clamp(min=0).sum(-2)  # [..., n], of each token if it were added
        chosen = gain.masked_fill(~free, -1.0).argmax(-1, keepdim=True)
        free = free.scatter(-1, chosen, False)
        added = similarity.gather(-1, chosen[..., None, :].expand(*similarity.shape[:-1], 1)).squeeze(-1)
        covered = torch.maximum(covered, added)
    return (~free).nonzero()[:, -1].view(*free.shape[:-1], count)


def staying(tokens: int, ratio: float) -> int:
    """How many destinations a window of so many tokens has: one at least."""
    return max(1, tokens - int(ratio * tokens))


def facilities(x: Tensor, grids: tuple[Grid, ...], side: int, ratio: float) -> list[Tensor]:
    """Destinations in each window by facility location, over windows of each shape: x [B, L, W] -> [B, w, k]."""
    directions, chosen = normalize(x.float(), dim=-1), []
    for tokens in windows(grids, side):
        own = directions[:, tokens.to(x.device)]  # [B, w, n, W]
        some = medoids(own @ own.mT, staying(tokens.shape[1], ratio))
        chosen.append(tokens.to(x.device).expand(len(x), -1, -1).gather(2, some))
    return chosen


def shared_out(x: Tensor, grids: tuple[Grid, ...], side: int, chosen: list[Tensor], temperature: float) -> Shares:
    """The shares of each token in its window's destinations: a softmax over these of cosine / temperature."""
    directions, parts = normalize(x.float(), dim=-1), []
    kept = torch.cat([index.flatten(1) for index in chosen], 1).sort(dim=1).values
    for tokens, index in zip(windows(grids, side), chosen, strict=True):
        tokens = tokens.to(x.device)
        flat = index.flatten(1)
        to = directions.gather(1, flat[..., None].expand(-1, -1, x.shape[2])).unflatten(1, index.shape[1:])
        shares = ((to @ directions[:, tokens].mT) / temperature).softmax(2)  # [B, w, k, n]
        parts.append((tokens, torch.searchsorted(kept, flat).view_as(index), shares))
    return Shares(kept, parts)


def dynamic_ratio(progress: float, ratio: float, deviation: float) -> float:
    """SDTM's share of tokens that go away, from ratio + deviation at the start to ratio - deviation at the end."""
    return ratio - deviation + 2 * deviation * math.cos(progress * math.pi / 2)


def structure(x: Tensor, grid: Grid, age: Tensor, count: int, weight: float) -> Groups:
    """SDTM's structure stage: the `count` most uniform windows of 2 x 2 tokens become one token each, the first one.

    How uniform: the mean cosine of its pairs, and `weight` times its mean age, by age [B, L] in steps since a token
    last stood for itself alone, of the oldest one's. x [B, L, W]; windows at an edge that are smaller stay.
    """
    (whole,) = (some for some in windows((grid,), 2) if some.shape[1] == 4)
    whole = whole.to(x.device)
    pairs = normalize(x.float(), dim=-1)[:, whole].sum(2).square().sum(-1)  # |sum of four|^2 [B, w] = 4 + 2 * six pairs
    uniform = (pairs - 4) / 12 + weight * _normalised(age)[:, whole].mean(-1)
    order = uniform.argsort(dim=1, descending=True, stable=True)[:, :count]
    merged = whole[order]  # [B, count, 4]
    return grouped(x.shape[1], merged[..., 1:].flatten(1), merged[..., :1].expand(-1, -1, 3).flatten(1))


def detail(x: Tensor, grid: Grid, age: Tensor, away: int) -> Groups:
    """SDTM's detail stage: of each window of 2 x 2 tokens the oldest is a destination of `bipartite`.

    x [B, L, W], age [B, L] in steps since a token last stood for itself alone
    """
    oldest = []
    for tokens in windows((grid,), 2):
        tokens = tokens.to(x.device)
        at = age[:, tokens].argmax(-1, keepdim=True)  # [B, w, 1]; the first of equals
        oldest.append(tokens.expand(len(x), -1, -1).gather(2, at).squeeze(2))
    destinations = torch.cat(oldest, 1).sort(dim=1).values
    return bipartite(x, [destinations], [_others(destinations, x.shape[1])], away)


def _normalised(age: Tensor) -> Tensor:
    return age / age.amax(1, keepdim=True).clamp(min=1)
