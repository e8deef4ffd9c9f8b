"""The demo model: its architecture, and its weights as ComfyUI's own FLUX.1 state dict.

The network is ComfyUI's `comfy.ldm.flux.model.Flux`, never a copy. Its modulation matrices are trained and
stored as products of two thin ones (rank 16), which is what keeps the committed file small;
`load_weights` multiplies them out.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from . import codec, text
from .runtime import use_comfyui

WEIGHTS = Path(__file__).parent / "weights" / "topi_demo.safetensors"
RANK = 16
SHIFT = 1.5  # of the timesteps, in training and in sampling

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

_TEXT = "text_encoder."
_UP, _DOWN = ".up", ".down"


def load_weights(path: Path = WEIGHTS) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, str]]:
    """The transformer's state dict in ComfyUI's names, the text encoder's, and the file's metadata."""
    model: dict[str, Tensor] = {}
    words: dict[str, Tensor] = {}
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        for key in file.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
            if key.startswith(_TEXT):
                words[key.removeprefix(_TEXT)] = file.get_tensor(key)
            elif key.endswith(_UP):
                name = key.removesuffix(_UP)
                up, down = file.get_tensor(key), file.get_tensor(name + _DOWN)
                model[name + ".weight"] = (up.float() @ down.float()).to(up.dtype)
            elif not key.endswith(_DOWN):
                model[key] = file.get_tensor(key)
    return model, words, metadata


class LowRankLinear(nn.Module):
    """Linear layer whose weight is `up @ down`: [out, RANK] @ [RANK, in]."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.down = nn.Parameter(linear.weight.detach()[:RANK].clone())
        self.up = nn.Parameter(torch.zeros(linear.out_features, RANK))
        self.bias = nn.Parameter(torch.zeros(linear.out_features))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.down.mT @ self.up.mT + self.bias


class _TrainingOps:
    """The `operations` that ComfyUI's Flux is built from, fit for a backward pass.

    Flux adds to its hidden states in place, so a layer norm must not keep them for its gradient.
    """

    Linear = nn.Linear
    RMSNorm = nn.RMSNorm

    class LayerNorm(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.clone())


def new_model() -> nn.Module:
    """A fresh, trainable Flux with low-rank modulation, in float32."""
    use_comfyui()
    import comfy.ldm.flux.model
    import comfy.model_management

    comfy.model_management.in_training = True  # plain RoPE, which has a gradient
    model = comfy.ldm.flux.model.Flux(dtype=torch.float32, device="cpu", operations=_TrainingOps, **ARCHITECTURE)
    for module in list(model.modules()):
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    for block in model.double_blocks:
        block.img_mod.lin = LowRankLinear(block.img_mod.lin)
        block.txt_mod.lin = LowRankLinear(block.txt_mod.lin)
    for block in model.single_blocks:
        block.modulation.lin = LowRankLinear(block.modulation.lin)
    model.final_layer.adaLN_modulation[1] = LowRankLinear(model.final_layer.adaLN_modulation[1])
    nn.init.zeros_(model.final_layer.linear.weight)
    return model


def storable(model: nn.Module, words: text.TextEncoder) -> dict[str, Tensor]:
    """Both state dicts as one, in float16, as the weight file holds them."""
    tensors = dict(model.state_dict()) | {_TEXT + k: v for k, v in words.state_dict().items()}
    return {k: v.to(torch.float16).contiguous() for k, v in tensors.items()}


def restore(model: nn.Module, words: text.TextEncoder, tensors: dict[str, Tensor]) -> None:
    """Puts what `storable` gave back into a trainable model and its text encoder."""
    model.load_state_dict({k: v for k, v in tensors.items() if not k.startswith(_TEXT)})
    words.load_state_dict({k.removeprefix(_TEXT): v for k, v in tensors.items() if k.startswith(_TEXT)})
