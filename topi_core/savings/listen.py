"""Listen: at every step, how much attention each layer pays to the references (Eq. 4), for a calibration."""

import torch
from torch import Tensor

from ..calibration import Listening, sensitivity
from ..influence import attention_received
from ..kv import not_reached
from ..plan import Attention, Call, Plan, Saving


class Listen(Saving):
    """Saves nothing, and changes nothing."""

    def __init__(self, record: Listening):
        self.record = record

    def observe(self, plan: Plan, call: Call) -> bool:
        heard: dict[int, Tensor] = {}  # layer -> [B]

        def listen(seen: Attention) -> None:
            q, k, v = seen.heads_first()
            if seen.site[0] not in heard and all(x.shape[2] == call.layout.tokens for x in (q, k, v)):
                received = attention_received(q, k, call.layout, seen.four_dims())
                heard[seen.site[0]] = sensitivity(received, call.layout)

        plan.notes[self] = heard
        plan.on_attention(listen, range(self.record.depth))
        return True

    def commit(self, plan: Plan, call: Call, output: Tensor) -> None:
        heard = plan.notes.get(self)
        if heard is None:
            return
        missing = [layer for layer in range(self.record.depth) if layer not in heard]
        if missing and call.step in self.record.heard:
            return  # guidance left blocks out, behind a call that had them all
        if missing:
            raise RuntimeError(not_reached(missing[0]))
        rows = torch.stack([heard[layer] for layer in range(self.record.depth)], dim=1)  # [prompts x images, L]
        for prompt in rows.split(call.images):
            self.record.add(call.step, prompt)
