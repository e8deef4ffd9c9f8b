"""Where the kept keys and values of a run may lie, by ComfyUI's own account of the memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management as mm
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...topi_core.kv import Location


@dataclass(frozen=True)
class CallMemory:
    """The memory beside one call of a model, with these latents [B, ...] of so many prompts (`topi_core.kv.Memory`)."""

    model: ModelPatcher
    keys: int  # width of a token's keys over all attentions
    latent: Tensor
    references: Sequence[Tensor] = ()
    prompts: int = 1

    def size(self, tokens: int) -> int:
        """Bytes of the keys and values of so many tokens."""
        return 2 * tokens * self.keys * self.model.model.get_dtype_inference().itemsize

    @property
    def reserve(self) -> float:
        """Bytes that must stay free: what ComfyUI says that the call takes."""
        shapes = {"ref_latents": [list(reference.shape) for reference in self.references]}
        step = self.model.model.memory_required(list(self.latent.shape), cond_shapes=shapes)
        together = 1.5 * step if self.prompts > 1 else 0  # what ComfyUI wants to run several in one call
        return max(mm.minimum_inference_memory(), step + mm.extra_reserved_memory(), together)

    def where(self, size: float, back: float = 0) -> Location | None:
        """Where `size` bytes more fit beside what sampling needs: on the device, else on the host, else nowhere (None).

        Models that are not in use are unloaded for it. Of the one that samples, what ComfyUI can stream anew counts as
        free, as when it decides how many prompts to run in one call. `back` are bytes on the host that were given back
        just now: torch still has them, and uses them again.
        """
        device, needed = self.latent.device, size + self.reserve
        if self.model.get_free_memory(device) < needed:
            in_use = [loaded for loaded in mm.current_loaded_models if loaded.currently_used]
            mm.free_memory(needed, device, keep_loaded=in_use)
        if self.model.get_free_memory(device) >= needed:
            return "device"
        host = torch.device("cpu")
        most = 2 * max(0, size - back)  # torch rounds each block of page-locked memory up to a power of two
        free: Any = mm.get_free_memory(host)
        return "host" if device != host and free >= most + mm.minimum_inference_memory() else None
