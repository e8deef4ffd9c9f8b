"""Small random models of every family, in ComfyUI's own classes, and what tests put on them.

Their attention is far from uniform and no modulation is zero, so that a token dropped by mistake shows in the image.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass, field

import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.supported_models
import comfyui_version
import pytest
import torch
from comfy.controlnet import ControlBase
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from topi_demo.runtime import VERSION

HIDDEN = 256  # of values: two heads of 128, but for OmniGen2 and Boogu
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
    methods: tuple[str | None, ...]  # its reference methods
    text_tokens: int = 6  # in a sequence, when a prompt has 6 tokens
    double_blocks: int = field(kw_only=True)
    text_width: int = field(default=TEXT_WIDTH, kw_only=True)
    order: str = field(default="xtc", kw_only=True)  # of text, target and context in its attention
    references_at: int | None = field(
        default=4, kw_only=True
    )  # their place among its arguments; None: it has no wrapper
    replacements: bool = field(default=True, kw_only=True)  # whether ComfyUI lets its blocks be replaced
    control: bool = field(default=False, kw_only=True)  # whether it takes a ControlNet's residuals
    method: str | None = field(default=None, kw_only=True)  # without one it would leave the references out
    token_mask: bool = field(default=False, kw_only=True)  # whether it counts its text by the attention mask


# ComfyUI itself cannot run index_timestep_zero on FLUX.1, whose modulation is by block.
FLUX1 = Family(
    "flux1", 8, (1, 4, 6), 2, 2, 16, False, ("offset", "index", "uxo"), double_blocks=3, references_at=5, control=True
)
FLUX2 = Family(
    "flux2", 4, (0, 2, 3), 1, 1, 128, False, (*FLUX1.methods, "index_timestep_zero"), 512,
    double_blocks=1, references_at=5, control=True,
)  # fmt: skip
_QWEN_METHODS = ("offset", "index", "negative_index", "index_timestep_zero")
QWEN = Family("qwen_image", 6, (2, 3, 5), 2, 2, 16, True, _QWEN_METHODS, double_blocks=6, control=True)
MAGE = Family("mage_flow", 5, (1, 2, 4), 2, 1, 128, False, (None,), double_blocks=5, control=True)
JOY = Family(
    "joyimage", 4, (0, 2, 3), 1, 2, 16, True, (None,), double_blocks=4, text_width=4096, order="tcx", references_at=3
)
KREA = Family(
    "krea2", 4, (1, 2, 3), 1, 2, 16, True, ("index", "index_timestep_zero"), double_blocks=0, text_width=80,
    replacements=False, method="index",
)  # fmt: skip
OMNI = Family(
    "omnigen2", 4, (1, 2, 3), 1, 2, 16, False, (None,), double_blocks=0, order="xct", references_at=None,
    replacements=False, token_mask=True,
)  # fmt: skip
BOOGU = Family(
    "boogu", 5, (1, 2, 4), 1, 2, 16, False, (None,), double_blocks=2, order="xct", references_at=None,
    replacements=False, token_mask=True,
)  # fmt: skip
FAMILIES = (FLUX1, FLUX2, QWEN, MAGE, JOY, KREA, OMNI, BOOGU)
by_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)

_LUMINA = dict(
    hidden_size=256, num_attention_heads=4, num_kv_heads=2, num_refiner_layers=1, multiple_of=64,
    axes_dim_rope=(16, 24, 24), timestep_scale=1000.0,
)  # fmt: skip
NETWORKS = {  # the class of a family's network, and its settings
    "flux1": ("comfy.ldm.flux.model.Flux", dict(
        in_channels=16, out_channels=16, vec_in_dim=POOLED_WIDTH, context_in_dim=TEXT_WIDTH, hidden_size=HIDDEN,
        mlp_ratio=4.0, num_heads=2, depth=3, depth_single_blocks=5, axes_dim=[16, 56, 56], theta=10000, patch_size=2,
        qkv_bias=True, guidance_embed=True, txt_ids_dims=[],
    )),
    "flux2": ("comfy.ldm.flux.model.Flux", dict(
        in_channels=128, out_channels=128, vec_in_dim=None, context_in_dim=TEXT_WIDTH, hidden_size=HIDDEN,
        mlp_ratio=3.0, num_heads=2, depth=1, depth_single_blocks=3, axes_dim=[32, 32, 32, 32], theta=2000,
        patch_size=1, qkv_bias=False, guidance_embed=True, txt_ids_dims=[3], global_modulation=True,
        mlp_silu_act=True, ops_bias=False, default_ref_method="index", ref_index_scale=10.0,
    )),
    "qwen_image": ("comfy.ldm.qwen_image.model.QwenImageTransformer2DModel", dict(
        num_layers=6, attention_head_dim=128, num_attention_heads=2, joint_attention_dim=TEXT_WIDTH,
    )),
    "mage_flow": ("comfy.ldm.mage_flow.model.MageFlowTransformer2DModel", dict(
        num_layers=5, num_attention_heads=2, joint_attention_dim=TEXT_WIDTH,
    )),
    "joyimage": ("comfy.ldm.joyimage.model.JoyImageTransformer3DModel", dict(
        num_layers=4, hidden_size=256, num_attention_heads=2, text_dim=4096, theta=10000,
    )),
    "krea2": ("comfy.ldm.krea2.model.SingleStreamDiT", dict(
        features=512, heads=4, kvheads=2, layers=4, txtdim=40, txtlayers=2,
    )),
    "omnigen2": ("comfy.ldm.omnigen.omnigen2.OmniGen2Transformer2DModel", dict(
        num_layers=4, text_feat_dim=TEXT_WIDTH, **_LUMINA,
    )),
    "boogu": ("comfy.ldm.boogu.model.BooguTransformer2DModel", dict(
        num_layers=3, num_double_stream_layers=2, instruction_feat_dim=TEXT_WIDTH, **_LUMINA,
    )),
}  # fmt: skip
UNDETECTED = {
    # ComfyUI's loader takes each of these for its published width, 0.7 GB a block for Qwen-Image even in 16 bits, so
    # small ones are built from ComfyUI's configuration classes.
    "qwen_image": "QwenImage",
    "mage_flow": "MageFlow",
    "omnigen2": "Omnigen2",
    "boogu": "Boogu",
}
SEEDS = {"flux1": 8, "flux2": 6, "qwen_image": 5, "mage_flow": 5, "joyimage": 4, "krea2": 4, "omnigen2": 4, "boogu": 5}


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
            if name.endswith(("to_v.weight", ".wv.weight", "qkv.weight", ".linear1.weight")):
                values = weights[name][2 * HIDDEN if "qkv" in name or "linear1" in name else 0 :][:HIDDEN]
                values[::128] *= 8  # so that their lengths differ between tokens
        elif name.endswith(("qnorm.scale", "knorm.scale")):
            weights[name] = 0.5 + 0.2 * noise  # Krea 2 adds 1
        elif "norm" in name:
            weights[name] = 1.5 + 0.2 * noise  # of queries and keys: logits with a deviation above 2
        else:
            weights[name] = 0.1 * noise
    return weights


def network_class(family: Family) -> type[nn.Module]:
    """The class of its network; skips the test where an older ComfyUI than the one we build for lacks the model."""
    module, name = NETWORKS[family.name][0].rsplit(".", 1)
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError:
        if comfyui_version.__version__ == VERSION:
            raise
        pytest.skip(f"ComfyUI {comfyui_version.__version__} has no {family.name}")


def build(family: Family, **settings) -> nn.Module:
    """The network of a small model, with weights that nobody has set yet."""
    settings = NETWORKS[family.name][1] | settings
    return network_class(family)(dtype=torch.float32, operations=comfy.ops.disable_weight_init, **settings)


@functools.cache
def _weights(family: Family) -> dict[str, Tensor]:
    return random_weights(build(family), SEEDS[family.name])


def patcher(config, weights: dict[str, Tensor], dtype=torch.float32, cast=None) -> comfy.model_patcher.ModelPatcher:
    """What ComfyUI's loader does once it knows the configuration."""
    config.set_inference_dtype(dtype, cast)
    model = config.get_model(weights, "")
    model.load_model_weights(dict(weights), "")
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def load(family: Family, dtype: torch.dtype = torch.float32, **settings):
    """A new, independent model of the family, through ComfyUI's loader where it detects what it is."""
    weights = random_weights(build(family, **settings), SEEDS[family.name]) if settings else _weights(family)
    weights = {k: v.to(dtype) for k, v in weights.items()}
    if family.name not in UNDETECTED:
        return comfy.sd.load_diffusion_model_state_dict(weights, model_options={"dtype": dtype})
    cast = None if dtype == torch.float32 else torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    settings = {"image_model": family.name} | NETWORKS[family.name][1] | settings
    config = getattr(comfy.supported_models, UNDETECTED[family.name])
    return patcher(config(settings), weights, dtype, cast)


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


def with_lora(model):
    """A LoRA of rank 4 on every projection of queries, keys and values."""
    generator = torch.Generator().manual_seed(11)
    lora = {}
    for name, weight in model.model.diffusion_model.state_dict().items():
        if any(
            name.endswith(end) for end in ("qkv.weight", "linear1.weight", "to_q.weight", "to_v.weight", "wv.weight")
        ):
            name = f"diffusion_model.{name.removesuffix('.weight')}"
            rows, columns = weight.shape
            lora[f"{name}.lora_A.weight"] = torch.randn(4, columns, generator=generator) * columns**-0.5
            lora[f"{name}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) * 0.5
    return comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0]


class SmallControl(ControlBase):
    """A control net without weights to load: what it adds to the target's tokens comes from the noisy latent."""

    def __init__(self, family, outputs: bool):
        super().__init__()
        self.family, self.outputs = family, outputs

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        patch = self.family.patch
        cells = torch.nn.functional.avg_pool2d(x_noisy.reshape(x_noisy.shape[0], -1, *x_noisy.shape[-2:]), patch)
        tokens = cells.flatten(2).mT  # [B, T, channels]
        wide = tokens.repeat(1, 1, 256 // tokens.shape[-1])
        layers = [wide.clone() * 0.2 * (i + 1) for i in range(4)]
        return {"input": layers[: self.family.double_blocks], "output": [None, *layers[:2]] if self.outputs else []}

    def copy(self):
        control = SmallControl(self.family, self.outputs)
        self.copy_to(control)
        return control


class ShortOfMemory(ModelPatcher):
    """A patcher on a machine with no memory to spare: every cond is a call of its own."""

    def get_free_memory(self, device):
        return 0


def as_class(cls: type[ModelPatcher], model):
    patcher = cls(model.model, model.load_device, model.offload_device)
    patcher.parent = model  # like a clone, so that ComfyUI knows whose weights these are
    return patcher


def _options(value) -> object:
    """model_options with identities in place of what they hold."""
    if isinstance(value, dict):
        return {key: _options(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_options(inner) for inner in value]
    return id(value)


def everything(model) -> dict:
    """What could be left on a model: options, wrappers, patches, and attributes of modules and of their classes."""
    modules = [model.model, *model.model.modules()]
    return {
        "options": _options(model.model_options),
        "wrappers": _options(model.wrappers),
        "callbacks": _options(model.callbacks),
        "patcher": set(vars(model)),
        "patches": (set(model.patches), set(model.object_patches), set(model.attachments), set(model.injections)),
        "modules": [set(vars(module)) for module in modules],
        "hooks": [
            [len(value) for name, value in vars(module).items() if name.endswith(("hooks", "hooks_with_kwargs"))]
            for module in modules
        ],
        "classes": {type(module): {k: id(v) for k, v in vars(type(module)).items()} for module in modules},
        "weights": {name: (id(w), w._version) for name, w in model.model.named_parameters()},
    }
