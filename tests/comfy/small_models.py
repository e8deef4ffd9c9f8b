"""Small random models of every family, in ComfyUI's own classes.

Their attention is far from uniform and no modulation is zero, so that a token dropped by mistake shows in the image.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.supported_models
import torch
from comfy.ldm.flux.model import Flux
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel
from torch import Tensor, nn

HIDDEN = 256  # two heads of 128
TEXT_WIDTH = 48
POOLED_WIDTH = 32


@dataclass(frozen=True)
class Family:
    """What a test has to know about a small model."""

    name: str
    depth: int  # blocks, double and single together
    layers: tuple[int, ...]  # representative layers used in the tests
    front_layers: int
    patch: int  # latent pixels a token, along one axis
    channels: int  # of its latents
    frames: bool  # whether its latents have a time axis
    methods: tuple[str, ...]  # its reference methods
    text_tokens: int = 6  # in a sequence, when a prompt has 6 tokens
    double_blocks: int = field(kw_only=True)


# ComfyUI itself cannot run index_timestep_zero on FLUX.1, whose modulation is by block.
FLUX1 = Family("flux1", 8, (1, 4, 6), 2, 2, 16, False, ("offset", "index", "uxo"), double_blocks=3)
FLUX2 = Family("flux2", 4, (0, 2, 3), 1, 1, 128, False, (*FLUX1.methods, "index_timestep_zero"), 512, double_blocks=1)
_QWEN_METHODS = ("offset", "index", "negative_index", "index_timestep_zero")
QWEN = Family("qwen_image", 6, (2, 3, 5), 2, 2, 16, True, _QWEN_METHODS, double_blocks=6)
FAMILIES = (FLUX1, FLUX2, QWEN)

_FLUX1 = dict(
    in_channels=16, out_channels=16, vec_in_dim=POOLED_WIDTH, context_in_dim=TEXT_WIDTH, hidden_size=HIDDEN,
    mlp_ratio=4.0, num_heads=2, depth=3, depth_single_blocks=5, axes_dim=[16, 56, 56], theta=10000, patch_size=2,
    qkv_bias=True, guidance_embed=True, txt_ids_dims=[],
)  # fmt: skip
_FLUX2 = dict(
    in_channels=128, out_channels=128, vec_in_dim=None, context_in_dim=TEXT_WIDTH, hidden_size=HIDDEN, mlp_ratio=3.0,
    num_heads=2, depth=1, depth_single_blocks=3, axes_dim=[32, 32, 32, 32], theta=2000, patch_size=1, qkv_bias=False,
    guidance_embed=True, txt_ids_dims=[3], global_modulation=True, mlp_silu_act=True, ops_bias=False,
    default_ref_method="index", ref_index_scale=10.0,
)  # fmt: skip
_QWEN = dict(num_layers=6, attention_head_dim=128, num_attention_heads=2, joint_attention_dim=TEXT_WIDTH)


def random_weights(module: nn.Module, seed: int) -> dict[str, Tensor]:
    """A state dict that keeps activations near 1, with sharp attention and active modulations."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, value in module.state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        if value.numel() == 0:
            weights[name] = value
        elif value.ndim > 1:
            weights[name] = noise * value[0].numel() ** -0.5
            if name.endswith((".to_v.weight", ".qkv.weight", ".linear1.weight")):
                values = weights[name][0 if "to_v" in name else 2 * HIDDEN :][:HIDDEN]
                values[::128] *= 8  # so that their lengths differ between tokens
        elif "norm" in name:
            weights[name] = 1.5 + 0.2 * noise  # of queries and keys: logits with a deviation above 2
        else:
            weights[name] = 0.1 * noise
    return weights


@functools.cache
def _flux_weights(name: str) -> dict[str, Tensor]:
    config = {"flux1": _FLUX1, "flux2": _FLUX2}[name]
    module = Flux(dtype=torch.float32, operations=comfy.ops.disable_weight_init, **config)
    return random_weights(module, seed=len(name) + config["depth"])


def patcher(config, weights: dict[str, Tensor], dtype=torch.float32, cast=None) -> comfy.model_patcher.ModelPatcher:
    """What ComfyUI's loader does once it knows the configuration."""
    config.set_inference_dtype(dtype, cast)
    model = config.get_model(weights, "")
    model.load_model_weights(dict(weights), "")
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def load(family: Family, dtype: torch.dtype = torch.float32, reference_method: str | None = None):
    """A new, independent model of the family.

    FLUX goes through ComfyUI's loader, which detects it. The loader takes every Qwen-Image for 3072 wide, 0.7 GB a
    block even in 16 bits, so a small one is built from ComfyUI's configuration class, with a default reference method.
    """
    if family.name != "qwen_image":
        weights = {k: v.to(dtype) for k, v in _flux_weights(family.name).items()}
        return comfy.sd.load_diffusion_model_state_dict(weights, model_options={"dtype": dtype})
    settings = dict(_QWEN) | ({"default_ref_method": reference_method} if reference_method else {})
    module = QwenImageTransformer2DModel(dtype=torch.float32, operations=comfy.ops.disable_weight_init, **settings)
    weights = {k: v.to(dtype) for k, v in random_weights(module, seed=5).items()}
    cast = None if dtype == torch.float32 else torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    config = comfy.supported_models.QwenImage({"image_model": "qwen_image", **settings})
    return patcher(config, weights, dtype, cast)


def load_qwen_of_true_width():
    """One block of Qwen-Image-Edit 2511 as wide as it is, detected by ComfyUI's loader; 0.7 GB."""
    settings = dict(num_layers=1, default_ref_method="index_timestep_zero", dtype=torch.bfloat16)
    with torch.device("meta"):
        module = QwenImageTransformer2DModel(operations=comfy.ops.disable_weight_init, **settings)
    pool = torch.randn(2**26, generator=torch.Generator().manual_seed(9), dtype=torch.bfloat16)
    weights = {}
    for number, (name, value) in enumerate(module.state_dict().items()):
        part = pool[number : number + value.numel()].view(value.shape)
        gain = value[0].numel() ** -0.5 if value.ndim > 1 else 0.1
        weights[name] = 1.5 + 0.2 * part if value.ndim == 1 and "norm" in name else gain * part
    return comfy.sd.load_diffusion_model_state_dict(weights, model_options={"dtype": torch.bfloat16})


@functools.cache
def shared(family: Family):
    """One model of the family for all tests that use it in float32; a node clones it and never changes it."""
    return load(family)
