"""The demo model: its architecture, and its weights as ComfyUI's own FLUX.1 state dict.

The network is ComfyUI's `comfy.ldm.flux.model.Flux`, never a copy. Its modulation matrices are trained and
stored as products of two thin ones (rank 16), which is what keeps the committed file small;
`load_weights` multiplies them out.
"""

from __future__ import annotations

import math
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from . import codec, text

WEIGHTS = Path(__file__).parent / "weights" / "topi_demo.safetensors"
SHIFT = math.exp(1.15)  # of the timesteps, in training and in sampling; FLUX.1's at 1024 pixels

ARCHITECTURE = dict(
    in_channels=codec.CHANNELS,
    out_channels=codec.CHANNELS,
    vec_in_dim=text.WIDTH,
    context_in_dim=text.WIDTH,
    hidden_size=256,
    mlp_ratio=4.0,
    num_heads=2,
    depth=2,
    depth_single_blocks=10,
    axes_dim=[16, 56, 56],
    theta=10000,
    patch_size=2,
    qkv_bias=True,
    guidance_embed=True,
    txt_ids_dims=[],
)

TEXT_ENCODER = "text_encoder."  # before its tensors' names
_UP, _DOWN = ".up", ".down"


def load_weights(path: Path = WEIGHTS) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, str]]:
    """The transformer's state dict in ComfyUI's names, the text encoder's, and the file's metadata."""
    model: dict[str, Tensor] = {}
    words: dict[str, Tensor] = {}
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        for key in file.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
            if key.startswith(TEXT_ENCODER):
                words[key.removeprefix(TEXT_ENCODER)] = file.get_tensor(key)
            elif key.endswith(_UP):
                name = key.removesuffix(_UP)
                up, down = file.get_tensor(key), file.get_tensor(name + _DOWN)
                model[name + ".weight"] = (up.float() @ down.float()).to(up.dtype)
            elif not key.endswith(_DOWN):
                model[key] = file.get_tensor(key)
    return model, words, metadata
