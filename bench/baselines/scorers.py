"""Other scores for a reference token, in place of its influence: feature similarity (Table 3), and chance."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from topi_core.influence import Scorer
from topi_core.layout import Layout


def similarity(hidden: Tensor, layout: Layout, prompts: int = 1) -> Tensor:
    """Table 3's feature similarity: mean cosine between a reference token and the target rows, moved to [0, 1].

    hidden [B, N, W], the block's input -> [B, C]
    """
    directions = torch.nn.functional.normalize(hidden.float(), dim=-1)
    mean = directions[:, layout.target].mean(1, keepdim=True)  # [B, 1, W]
    return (1 + (directions[:, layout.reference] @ mean.mT).squeeze(-1)) / 2


def random_score(generator: torch.Generator, hidden: Tensor, layout: Layout, prompts: int = 1) -> Tensor:
    """The baseline that the paper lacks: all tokens weigh the same, their order is random, and each prompt's alike.

    hidden [B, N, W] says how many rows there are -> [B, C]
    """
    shape = len(hidden) // prompts, layout.reference_tokens
    score = 1 + 1e-6 * torch.rand(shape, generator=generator, dtype=torch.float64)
    return score.repeat(prompts, 1).to(hidden.device)


SIMILARITY = Scorer("similarity", lambda seed: similarity, of_input=True)
RANDOM = Scorer("random", lambda seed: partial(random_score, torch.Generator().manual_seed(seed)), of_input=True)
OTHERS = {scorer.name: scorer for scorer in (SIMILARITY, RANDOM)}
