"""Where the kept keys and values of a run may lie, by ComfyUI's own account of the memory."""

from __future__ import annotations

from typing import Literal

import comfy.model_management as mm
import torch

Room = Literal["device", "host"]


def room_for(size: int, device: torch.device) -> Room | None:
    """Where `size` bytes fit beside what sampling needs: on the device, else in host memory, else nowhere (None).

    Models that are not in use are unloaded for it, as for a model that is about to be loaded.
    """
    reserve = int(mm.minimum_inference_memory())
    if mm.get_free_memory(device) < size + reserve:
        in_use = [loaded for loaded in mm.current_loaded_models if loaded.currently_used]
        mm.free_memory(size + reserve, device, keep_loaded=in_use)
    if mm.get_free_memory(device) >= size + reserve:
        return "device"
    host = torch.device("cpu")
    return "host" if device != host and mm.get_free_memory(host) >= size + reserve else None
