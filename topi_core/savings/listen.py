"""Listen: at every step, how much attention each layer pays to the references (Eq. 4), for a calibration."""

import torch
from torch import Tensor

from ..calibration import Listening
from ..kv import not_reached
from ..plan import Call, Plan, Saving
from .score import Heard


class Listen(Saving):
    """Saves nothing, and changes nothing."""

    def __init__(self, record: Listening):
        self.record = record

    def observe(self, plan: Plan, call: Call) -> bool:
        heard = plan.notes[self] = Heard(call, tuple(range(self.record.depth)), search=True)
        plan.on_attention(heard.hear, heard.layers)
        return True

    def commit(self, plan: Plan, call: Call, output: Tensor) -> None:
        heard: Heard | None = plan.notes.get(self)
        if heard is None or (heard.missing and call.step in self.record.heard):  # guidance left blocks out
            return
        if heard.missing:
            raise RuntimeError(not_reached(heard.missing[0]))
        rows = torch.stack([heard.sensitivity[layer] for layer in heard.layers], dim=1)  # [prompts x images, L]
        for prompt in rows.split(call.images):
            self.record.add(call.step, prompt)
