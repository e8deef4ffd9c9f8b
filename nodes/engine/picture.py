"""A latent as a small picture, by the model's own latent-to-RGB factors."""

import numpy
import torch
from latent_preview import Latent2RGBPreviewer
from torch import Tensor


def picture(latent: Tensor, latent_format) -> Tensor | None:
    """latent [images, channels, (frames,) h, w] as the network sees it -> uint8 [images, n x h, n x w, 3], on the CPU.

    n is 2 where a cell stands for 2 x 2 pixels of the factors, as in FLUX.2, else 1.
    latent_format: a `comfy.latent_formats.LatentFormat`; None where it has no factors, or none for so many channels.
    """
    if latent_format.latent_rgb_factors is None or latent.shape[1] != latent_format.latent_channels:
        return None
    previewer = Latent2RGBPreviewer(
        latent_format.latent_rgb_factors,
        latent_format.latent_rgb_factors_bias,
        latent_format.latent_rgb_factors_reshape,
    )
    latent = latent.cpu().float()  # of a GPU's the previewer would read pixels that are still on their way
    rows = [previewer.decode_latent_to_preview(latent[i : i + 1]) for i in range(latent.shape[0])]
    return torch.stack([torch.from_numpy(numpy.array(row)) for row in rows])
