"""How close two images are: PSNR and SSIM."""

import torch
import torch.nn.functional as F
from torch import Tensor


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of images [B, C, H, W] in 0..1 -> [B]; infinite where they are equal."""
    _same_shape("psnr", a, b)
    return -10 * (a.double() - b.double()).square().mean((1, 2, 3)).log10()


def ssim(a: Tensor, b: Tensor, window: int = 11, sigma: float = 1.5) -> Tensor:
    """Structural similarity (Wang et al. 2004) of images [B, C, H, W] in 0..1 -> [B], the mean over channels.

    Gaussian window, K1 = 0.01, K2 = 0.03; only windows that lie inside the image count.
    """
    _same_shape("ssim", a, b)
    if min(a.shape[-2:]) < window:
        raise ValueError(f"ssim needs images of at least {window} x {window} pixels, got {tuple(a.shape)}")
    a, b = a.double(), b.double()
    place = torch.arange(window, dtype=a.dtype, device=a.device) - (window - 1) / 2
    weight = torch.exp(-0.5 * (place / sigma) ** 2)
    weight = weight / weight.sum()

    def local_mean(x: Tensor) -> Tensor:
        x = x.flatten(0, 1)[:, None]  # [B * C, 1, H, W]
        x = F.conv2d(F.conv2d(x, weight[None, None, :, None]), weight[None, None, None, :])
        return x.view(*a.shape[:2], *x.shape[2:])

    mean_a, mean_b = local_mean(a), local_mean(b)
    var_a, var_b = local_mean(a * a) - mean_a**2, local_mean(b * b) - mean_b**2
    cov = local_mean(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    map_ = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return map_.mean((1, 2, 3))


def _same_shape(name: str, a: Tensor, b: Tensor) -> None:
    shapes = tuple(a.shape), tuple(b.shape)
    if shapes[0] != shapes[1] or a.ndim != 4:
        raise ValueError(f"{name} needs two batches [B, C, H, W] of one shape, got {shapes[0]} and {shapes[1]}")
