"""From influence to kept tokens (Eq. 10)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Selection:
    """Reference tokens by descending influence, and how many of them each row keeps."""

    order: Tensor  # [B, C] indices
    counts: tuple[int, ...]  # B

    def kept(self, count: int | None = None) -> Tensor:
        """Indices of the kept tokens, ascending: [B, K].

        Rows that keep fewer than `count` (by default the largest of `counts`) are filled up by influence.
        """
        count = max(self.counts) if count is None else count
        return self.order[:, :count].sort(dim=1).values

    def mask(self) -> Tensor:
        """[B, C], True where a row keeps the token itself, without filling up."""
        place = self.order.argsort(dim=1)
        return place < torch.tensor(self.counts, device=place.device)[:, None]

    def ranks(self) -> Tensor:
        """uint8 [B, C]: 255 for the most influential token of a row, 0 for the least, evenly between."""
        tokens = self.order.shape[1]
        place = self.order.argsort(dim=1)
        return (255 * (tokens - 1 - place) / max(tokens - 1, 1)).round().to(torch.uint8)


def select(influence: Tensor, tau: float, min_keep: float = 0.0, max_keep: float = 1.0) -> Selection:
    """Smallest set of reference tokens that holds the share `tau` of the influence (Eq. 10).

    influence [B, C], not negative. Ties keep the order of the sequence. `min_keep` and `max_keep` bound the kept
    fraction. tau = 1 keeps every token, also those without influence.
    """
    sorted_, order = influence.double().sort(dim=1, descending=True, stable=True)
    tokens = influence.shape[1]
    if tau >= 1:
        counts = torch.full((influence.shape[0],), tokens)
    else:
        held = sorted_.cumsum(1)  # [B, C]
        goal = tau * held[:, -1:]
        short = ~(held >= goal)  # a NaN anywhere keeps everything
        counts = (short.sum(1) + (~(goal <= 0)).squeeze(1)).clamp(max=tokens)
    low = math.ceil(min_keep * tokens)
    high = max(low, math.floor(max_keep * tokens))
    return Selection(order, tuple(counts.clamp(low, high).tolist()))
