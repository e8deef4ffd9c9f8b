"""Prune: between anchors, reference tokens of little influence leave the sequence (the paper's method)."""

import torch
from torch import Tensor

from ..plan import Call, Cut, Plan, Saving
from ..references import References
from ..select import Selection


class Prune(Saving):
    """The blocks from `front_layers` on compute the kept tokens only (Eq. 12): the model crops its output anyway."""

    def __init__(self, references: References, front_layers: int):
        self.references = references
        self.front_layers = front_layers
        self.cuts: dict[tuple[Selection | None, ...], Cut | None] = {}  # until the next anchor

    def apply(self, plan: Plan, call: Call) -> bool:
        if call.sets:
            self.references.settle(list(call.sets))
            key = tuple(each.selection for each in call.sets)
            if key not in self.cuts:
                self.cuts[key] = cut_of(key, call.device)
            plan.kind, plan.cut, plan.first_layer = "pruned", self.cuts[key], self.front_layers
        return True

    def commit(self, plan: Plan, call: Call, output: Tensor) -> None:
        if plan.kind == "anchor":
            self.cuts.clear()


def cut_of(selections: tuple[Selection | None, ...], device: torch.device) -> Cut | None:
    """The cut to what these prompts of one call keep; None where that is everything."""
    chosen = [selection for selection in selections if selection is not None]
    if len(chosen) < len(selections):
        return None
    count = max(count for selection in chosen for count in selection.counts)  # one length: others are filled up
    if count == chosen[0].order.shape[1]:
        return None
    return Cut(kept=torch.cat([selection.kept(count) for selection in chosen]).to(device))
