"""What a run should cost: the paper's operation counts (appendix F), with the model's true widths."""

from __future__ import annotations

from .trace import Run


def layer_flops(tokens: int, hidden: int, linear: int = 24, keys: int | None = None) -> int:
    """Operations of one layer over `tokens` (Eq. 13 to 17).

    The attention core takes 4 N^2 d; `linear` N d^2 are the projections (8) and the MLP (16 for d -> 4d -> d).
    Where the attention sees other `keys` than the tokens' own, as with reused ones, its core takes 4 N keys d.
    """
    return 4 * tokens * (tokens if keys is None else keys) * hidden + linear * tokens * hidden**2


def speedup(run: Run) -> float:
    """How much less a run should have taken than one in which every step sees the full context.

    Steps that a cache skipped are left out of both.
    A pruned step runs its front layers in full, a reused one no layer.
    """
    if not run.anchors:
        return 1.0
    layer = layer_flops(run.anchors[0].layout.tokens, run.hidden, run.linear)
    full = taken = 0
    for step in run.steps:
        if step.kind == "skipped":
            continue
        full += run.depth * layer
        shorter = {"pruned": run.depth - run.front_layers, "reused": run.depth}.get(step.kind, 0)
        taken += (run.depth - shorter) * layer + shorter * layer_flops(step.tokens, run.hidden, run.linear, step.keys)
    return full / taken if taken else 1.0
