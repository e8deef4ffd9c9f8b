import math

import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from topi_core.metrics import psnr, ssim


def pair(height: int, width: int, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(height)
    a = torch.rand(2, 3, height, width, generator=generator)
    return a, (a + noise * torch.randn(a.shape, generator=generator)).clamp(0, 1)


@pytest.mark.parametrize(("height", "width", "noise"), [(11, 11, 0.1), (40, 53, 0.02), (64, 32, 0.5)])
def test_as_scikit_image(height, width, noise):
    a, b = pair(height, width, noise)
    for i in range(2):
        x, y = a[i].double().numpy(), b[i].double().numpy()
        assert psnr(a, b)[i].item() == pytest.approx(peak_signal_noise_ratio(x, y, data_range=1), abs=1e-9)
        wang = structural_similarity(
            x, y, data_range=1, channel_axis=0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert ssim(a, b)[i].item() == pytest.approx(wang, abs=1e-9)


def test_of_an_image_with_itself():
    a, _ = pair(16, 16, 0)
    assert psnr(a, a)[0] == math.inf
    assert ssim(a, a)[0] == pytest.approx(1, abs=1e-12)


def test_refusals():
    a, _ = pair(16, 16, 0)
    with pytest.raises(ValueError, match=r"psnr needs two batches \[B, C, H, W\] of one shape, got \(2, 3, 16, 16\)"):
        psnr(a, a[:, :, :8])
    with pytest.raises(ValueError, match="at least 11 x 11 pixels"):
        ssim(a[:, :, :8], a[:, :, :8])
