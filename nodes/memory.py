"""Where the kept keys and values of a run may lie, by ComfyUI's own account of the memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import comfy.model_management as mm
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

Where = Literal["device", "host"]


@dataclass(frozen=True)
class Memory:
    """What the keys and values of a model's context take, and where there is room for them."""

    model: ModelPatcher
    keys: int
    """Width of a token's keys over all attentions."""

    def size(self, tokens: int) -> int:
        """Bytes of the keys and values of so many tokens."""
        return 2 * tokens * self.keys * self.model.model.get_dtype_inference().itemsize

    def room(self, latent: Tensor, references: Sequence[Tensor], prompts: int) -> Room:
        """The room beside a call with these latents [B, ...], whose own need is ComfyUI's estimate.

        Of several prompts half as much again stays free, as ComfyUI asks for before it runs them in one call.
        """
        shapes = {"ref_latents": [list(reference.shape) for reference in references]}
        step = self.model.model.memory_required(list(latent.shape), cond_shapes=shapes)
        together = 1.5 * step if prompts > 1 else 0
        reserve = max(mm.minimum_inference_memory(), step + mm.extra_reserved_memory(), together)
        return Room(self.model, latent.device, reserve)


@dataclass(frozen=True)
class Room:
    """The memory beside one model while it samples."""

    model: ModelPatcher
    device: torch.device
    reserve: float
    """Bytes that must stay free."""

    def where(self, size: float, back: float = 0) -> Where | None:
        """Where `size` bytes more fit beside what sampling needs: on the device, else on the host, else nowhere (None).

        Models that are not in use are unloaded for it, as for a model that is about to be loaded. Of the one that
        samples, what ComfyUI can stream anew counts as free, as when it decides how many prompts to run in one call.
        `back` are bytes on the host that were given back just now: torch still has them, and uses them again.
        """
        if self._free() < size + self.reserve:
            in_use = [loaded for loaded in mm.current_loaded_models if loaded.currently_used]
            mm.free_memory(size + self.reserve, self.device, keep_loaded=in_use)
        if self._free() >= size + self.reserve:
            return "device"
        host = torch.device("cpu")
        most = 2 * max(0, size - back)  # torch rounds each block of page-locked memory up to a power of two
        fits = self.device != host and mm.get_free_memory(host) >= most + mm.minimum_inference_memory()
        return "host" if fits else None

    def _free(self) -> float:
        return self.model.get_free_memory(self.device)


def release_pinned() -> None:
    """Gives page-locked memory that nothing holds back to the system; torch would keep it for the process's life."""
    empty = getattr(torch._C, "_host_emptyCache", None)
    if empty is not None and torch.cuda.is_available():
        torch.cuda.synchronize()  # what the GPU may still be reading stays
        empty()
