"""Small random models behind the loaders of the workflows; a custom node pack that only the test server has.

They stand for FLUX.1 Kontext, FLUX.2 klein and Qwen-Image-Edit: ComfyUI's own classes with few and narrow layers, the
real tokenizers, and random weights, so the pictures are noise. A megapixel is made cheap without touching a workflow:
the FLUX models have a patch of many cells, and the VAE for Qwen-Image, whose patch cannot change, has large cells.
"""

from __future__ import annotations

import sys
from pathlib import Path

import comfy.latent_formats
import comfy.sd
import comfy.supported_models
import torch
from comfy.ldm.flux.model import Flux
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel
from comfy.supported_models_base import ClipTarget
from comfy.text_encoders import flux, qwen_image, qwen_vl
from comfy_api.latest import ComfyExtension, io
from torch import Tensor, nn
from torch.nn.functional import conv2d, conv_transpose2d

ROOT = Path(__file__).resolve().parents[3]
sys.path += [str(ROOT), str(ROOT / "tests" / "comfy")]

from small_models import NETWORKS, patcher, random_weights  # noqa: E402 (the path comes first)

WORDS = 64
"""Width of the features of FLUX.1's and FLUX.2's words."""
POOLED = 32
QWEN_WORDS = 128
NARROW = dict(hidden_size=128, num_heads=1)
FLOAT32 = {"dtype": torch.float32}
OPERATIONS = comfy.ops.disable_weight_init


def modest(model):
    """ComfyUI takes what a call needs from the picture's cells, and thinks of the true patch and width: 16 GB here."""
    model.model.memory_usage_factor /= 64
    return model


def flux1():
    settings = NETWORKS["flux1"][1] | NARROW | dict(depth=2, depth_single_blocks=3)
    settings |= dict(patch_size=16, context_in_dim=WORDS, vec_in_dim=POOLED)
    module = Flux(dtype=torch.float32, operations=OPERATIONS, **settings)
    return modest(patcher(comfy.supported_models.Flux({"image_model": "flux", **settings}), random_weights(module, 1)))


def flux2():
    settings = NETWORKS["flux2"][1] | NARROW | dict(patch_size=8, context_in_dim=3 * WORDS)
    module = Flux(dtype=torch.float32, operations=OPERATIONS, **settings)
    return modest(
        patcher(comfy.supported_models.Flux2({"image_model": "flux2", **settings}), random_weights(module, 2))
    )


class CoarseCells(comfy.latent_formats.Wan21):
    spacial_downscale_ratio = 64


def qwen_image_edit():
    settings = dict(num_layers=5, attention_head_dim=128, num_attention_heads=1, joint_attention_dim=QWEN_WORDS)
    module = QwenImageTransformer2DModel(dtype=torch.float32, operations=OPERATIONS, **settings)
    config = comfy.supported_models.QwenImage({"image_model": "qwen_image", **settings})
    model = patcher(config, random_weights(module, 3))
    model.model.latent_format = CoarseCells()
    return model


def clip(tokenizer, encoder, **sizes) -> comfy.sd.CLIP:
    """sizes: what is smaller than in ComfyUI's configuration of each text model."""
    made = comfy.sd.CLIP(ClipTarget(tokenizer, encoder), model_options=FLOAT32 | sizes)
    words = made.cond_stage_model
    words.load_state_dict(random_weights(words, 4))
    return made


def flux1_clip():
    return clip(
        flux.FluxTokenizer,
        flux.flux_clip(),
        clip_l_model_config=dict(hidden_size=POOLED, intermediate_size=64, num_attention_heads=2, num_hidden_layers=2),
        t5xxl_model_config=dict(d_model=WORDS, d_ff=128, d_kv=32, num_heads=2, num_layers=2),
    )


def flux2_clip():
    """Klein's; FLUX.2 dev's tokenizer is inside its weights. It takes features from three depths, the last is 27."""
    sizes = dict(hidden_size=WORDS, intermediate_size=64, num_hidden_layers=28, num_attention_heads=1)
    return clip(flux.KleinTokenizer, flux.klein_te(), qwen3_4b_model_config=sizes | dict(num_key_value_heads=1))


class QwenWords(qwen_image.te()):
    def __init__(self, device="cpu", dtype=None, model_options=None):
        super().__init__(device, dtype, model_options)
        self.qwen25_7b.transformer.visual = qwen_vl.Qwen2VLVisionTransformer(
            hidden_size=64, output_hidden_size=QWEN_WORDS, intermediate_size=64, num_heads=2, num_layers=1,
            device=device, dtype=dtype, ops=OPERATIONS,
        )  # fmt: skip


def qwen_image_clip():
    sizes = dict(hidden_size=QWEN_WORDS, intermediate_size=128, num_hidden_layers=2, num_attention_heads=1)
    sizes |= dict(num_key_value_heads=1)
    return clip(qwen_image.QwenImageTokenizer, QwenWords, qwen25_7b_model_config=sizes)


class LinearVAE(comfy.sd.VAE):
    """A random linear map of each cell of pixels to channels, and back."""

    def __init__(self, cell: int, channels: int, frames: bool = False):
        self.first_stage_model = nn.Module()
        self.cell, self.frames = cell, frames
        self.latent_channels = channels
        self.downscale_ratio = self.upscale_ratio = cell
        self.latent_dim = 3 if frames else 2
        self.output_channels = 3
        self.pad_channel_value = None
        self.crop_input = True
        random = torch.Generator().manual_seed(cell)
        self.weight = torch.randn(channels, 3, cell, cell, generator=random) / (3 * cell * cell) ** 0.5

    def encode(self, pixel_samples: Tensor) -> Tensor:
        pixels = self.vae_encode_crop_pixels(pixel_samples).movedim(-1, 1).float()
        latent = conv2d(2 * pixels - 1, self.weight, stride=self.cell)
        return latent.unsqueeze(2) if self.frames else latent

    def decode(self, samples_in: Tensor, vae_options=None) -> Tensor:
        latent = samples_in.float().movedim(2, 1).flatten(0, 1) if self.frames else samples_in.float()
        return (conv_transpose2d(latent, self.weight, stride=self.cell) / 2 + 0.5).clamp(0, 1).movedim(1, -1)


FAMILIES = {
    "flux1": (flux1, flux1_clip, lambda: LinearVAE(8, 16)),
    "flux2": (flux2, flux2_clip, lambda: LinearVAE(16, 128)),
    "qwen_image": (qwen_image_edit, qwen_image_clip, lambda: LinearVAE(64, 16, frames=True)),
}


def stand_in(node_id: str, place: int, output) -> type[io.ComfyNode]:
    class StandIn(io.ComfyNode):
        @classmethod
        def define_schema(cls) -> io.Schema:
            inputs = [io.Combo.Input("family", options=list(FAMILIES))]
            return io.Schema(node_id=node_id, category="test", inputs=inputs, outputs=[output.Output()])

        @classmethod
        def execute(cls, family: str) -> io.NodeOutput:
            return io.NodeOutput(FAMILIES[family][place]())

    return StandIn


class StandInLora(io.ComfyNode):
    """A small change of the first layer."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [io.Model.Input("model")]
        return io.Schema(node_id="StandInLora", category="test", inputs=inputs, outputs=[io.Model.Output()])

    @classmethod
    def execute(cls, model) -> io.NodeOutput:
        changed, name = model.clone(), "diffusion_model.img_in.weight"
        weight = model.get_model_object(name)
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(6)) / weight[0].numel() ** 0.5
        assert changed.add_patches({name: ("diff", (0.1 * noise,))}) == [name]
        return io.NodeOutput(changed)


class StandIns(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        kinds = (("StandInModel", io.Model), ("StandInClip", io.Clip), ("StandInVae", io.Vae))
        return [*(stand_in(node_id, place, kind) for place, (node_id, kind) in enumerate(kinds)), StandInLora]


async def comfy_entrypoint() -> ComfyExtension:
    return StandIns()
