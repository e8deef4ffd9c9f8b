"""The demo model as ComfyUI's MODEL, CLIP and VAE, for its stock nodes.

Only ComfyUI's own types are used: the transformer goes through its loader, the words through its CLIP class, and the
codec stands in a VAE, so that LoRA loaders, samplers, previews and cropping treat them like any other model.
"""

from __future__ import annotations

import math
from pathlib import Path

import comfy.latent_formats
import comfy.model_management
import comfy.model_sampling
import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher
from comfy.supported_models_base import ClipTarget
from torch import Tensor, nn

from . import codec, text
from .model import SHIFT, WEIGHTS, load_weights

FLOAT32 = {"dtype": torch.float32}  # the model is small, and then every device draws the same image


def load(path: Path = WEIGHTS) -> tuple[ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE]:
    if not path.is_file():
        raise FileNotFoundError(f"the demo model's weights are not in {path}: `make train` makes them, in hours")
    weights, words, _ = load_weights(path)
    model = comfy.sd.load_diffusion_model_state_dict(weights, model_options=FLOAT32)
    # the loader takes it for a FLUX.1; set here and not as an object patch, which previews would not see
    model.model.latent_format = Latent()
    model.add_object_patch("model_sampling", _sampling(model.model.model_config))
    clip = comfy.sd.CLIP(ClipTarget(Tokenizer, Words), model_options=FLOAT32, state_dict=[words])
    return model, clip, Codec()


def _sampling(config) -> nn.Module:
    """Rectified flow with the timestep shift of the training, as the ModelSamplingFlux node makes it."""

    class Sampling(comfy.model_sampling.ModelSamplingFlux, comfy.model_sampling.CONST):
        pass

    sampling = Sampling(config)
    sampling.set_parameters(shift=math.log(SHIFT))
    return sampling


class Latent(comfy.latent_formats.LatentFormat):
    """The codec's latents are normalised already; previews see the mean colour of every block."""

    latent_channels = codec.CHANNELS

    def __init__(self):
        colours = codec.basis().mean((2, 3))  # [16, 3]
        self.latent_rgb_factors = (colours * torch.tensor(codec.STD)[:, None]).tolist()
        self.latent_rgb_factors_bias = (torch.tensor(codec.MEAN) @ colours).tolist()


class Tokenizer:
    """Words of the demo's vocabulary, as CLIPTextEncode hands them over; weights of words are not read."""

    def __init__(self, embedding_directory=None, tokenizer_data=None):
        pass

    def tokenize_with_weights(self, prompt: str, return_word_ids: bool = False, **options) -> list[int]:
        return text.tokenize(prompt)

    def state_dict(self) -> dict[str, Tensor]:
        return {}


class Words(text.TextEncoder):
    """The text encoder behind the methods that ComfyUI's CLIP class calls."""

    disable_offload = True

    def __init__(self, dtype=None, device=None, model_options=None):
        super().__init__(dtype=dtype, device=device)
        self.dtypes = {dtype}

    def set_clip_options(self, options: dict) -> None:
        pass

    def reset_clip_options(self) -> None:
        pass

    def encode_token_weights(self, tokens: list[int]) -> tuple[Tensor, Tensor]:
        features, pooled = self(torch.tensor([tokens], device=self.place.weight.device))
        to = comfy.model_management.intermediate_device()
        return features.to(to), pooled.to(to)

    def load_sd(self, weights: dict[str, Tensor]):
        return self.load_state_dict(weights)


class Codec(comfy.sd.VAE):
    """A VAE without a network. Its blocks are independent, so tiles change nothing."""

    def __init__(self):
        self.first_stage_model = nn.Module()
        self.latent_channels = codec.CHANNELS
        self.downscale_ratio = self.upscale_ratio = codec.BLOCK
        self.latent_dim = 2
        self.output_channels = 3
        self.pad_channel_value = None
        self.crop_input = True

    def encode(self, pixel_samples: Tensor) -> Tensor:
        return codec.encode(self.vae_encode_crop_pixels(pixel_samples).movedim(-1, 1).float())

    def decode(self, samples_in: Tensor, vae_options=None) -> Tensor:
        return codec.decode(samples_in.float()).movedim(1, -1)

    def encode_tiled(self, pixel_samples: Tensor, **tiles) -> Tensor:
        return self.encode(pixel_samples)

    def decode_tiled(self, samples: Tensor, **tiles) -> Tensor:
        return self.decode(samples)
