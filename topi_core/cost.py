"""What a run should cost: the paper's operation counts (appendix F), with the model's true widths."""

from __future__ import annotations

from .trace import Kind, Run


def layer_flops(tokens: int, hidden: int, linear: int = 24, keys: int | None = None) -> int:
    """Operations of one layer over `tokens` (Eq. 13 to 17).

    The attention core takes 4 N^2 d; `linear` N d^2 are the projections (8) and the MLP (16 for d -> 4d -> d).
    Where the attention sees other `keys` than the tokens' own, as with reused ones, its core takes 4 N keys d.
    """
    return 4 * tokens * (tokens if keys is None else keys) * hidden + linear * tokens * hidden**2


def call_flops(run: Run, kind: Kind, full: int, tokens: int, keys: int | None = None) -> tuple[int, int]:
    """Operations of one cond in one call of the network over `full` tokens: as it ran, and with the full context.

    A pruned call runs its front layers in full, a reused one no layer; the others see `tokens`, and `keys`.
    """
    layer = layer_flops(full, run.hidden, run.linear)
    shorter = {"pruned": run.depth - run.front_layers, "reused": run.depth}.get(kind, 0)
    taken = (run.depth - shorter) * layer + shorter * layer_flops(tokens, run.hidden, run.linear, keys)
    return taken, run.depth * layer


def speedup(run: Run) -> float:
    """How much less a run should have taken than one in which every call sees the full context.

    A prompt without references weighs in both, calls that a cache answered in neither.
    """
    taken = sum(step.taken for step in run.steps)
    return sum(step.full for step in run.steps) / taken if taken else 1.0
