"""What a run should cost: the paper's operation counts (appendix F), with the model's true widths."""

from .config import Model
from .layout import Layout
from .plan import Plan
from .trace import Run


def layer_flops(tokens: int, hidden: int, linear: int = 24, keys: int | None = None) -> int:
    """Operations of one layer over `tokens` (Eq. 13 to 17).

    The attention core takes 4 N^2 d; `linear` N d^2 are the projections (8) and the MLP (16 for d -> 4d -> d).
    Where the attention sees other `keys` than the tokens' own, as with reused ones, its core takes 4 N keys d.
    """
    return 4 * tokens * (tokens if keys is None else keys) * hidden + linear * tokens * hidden**2


def call_flops(model: Model, plan: Plan, layout: Layout) -> int:
    """Operations of one prompt in one call: of the plan's layers, those from the first on see what its cut leaves."""
    if plan.answer is not None:
        return 0
    whole = layer_flops(layout.tokens, model.hidden, model.linear)
    if plan.cut is None:
        return model.depth * whole
    short = layer_flops(plan.cut.tokens(layout), model.hidden, model.linear, plan.cut.key_tokens(layout))
    return plan.first_layer * whole + (model.depth - plan.first_layer) * short


def speedup(run: Run) -> float:
    """How much less a run should have taken than one in which every call computes the whole sequence.

    A prompt without references weighs in both, calls that a cache answered in neither.
    """
    flops = sum(step.flops for step in run.steps)
    return sum(step.full_flops for step in run.steps) / flops if flops else 1.0
