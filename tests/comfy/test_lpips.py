"""The benchmark's LPIPS: held to its authors' code, and to what can be said without it.

`make test` fetches the weights first; without them these tests fail, with the sentence that says how to get them.
"""

from __future__ import annotations

import importlib
import pickle
import warnings

import pytest
import torch
from torch import Tensor

import bench.lpips
from bench.lpips import Arrays, features, lpips, weights


def pictures(count: int, height: int = 96, width: int = 128, seed: int = 0) -> Tensor:
    """Clouds, which have coarse and fine structure as pictures do."""
    generator = torch.Generator().manual_seed(seed)
    layers = [torch.rand(count, 3, height // size, width // size, generator=generator) for size in (32, 8, 2)]
    return sum(torch.nn.functional.interpolate(x, (height, width), mode="bicubic") for x in layers).div(3).clamp(0, 1)


def noise(like: Tensor, seed: int = 1) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def authors():
    """The package `lpips` with the same convolutions. It carries its own weights of the channels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's, of how the package asks it for no weights
        reference = importlib.import_module("lpips").LPIPS(net="alex", pnet_rand=True, verbose=False)
    convolutions = [module for module in reference.net.modules() if isinstance(module, torch.nn.Conv2d)]
    for module, (kernel, bias) in zip(convolutions, weights()[0], strict=True):
        module.load_state_dict({"weight": kernel, "bias": bias})
    return reference


def test_it_is_what_its_authors_compute(authors):
    a = pictures(6)
    scale = torch.tensor([0, 0.01, 0.05, 0.2, 0.5, 1])[:, None, None, None]
    b = (a + scale * noise(a)).clamp(0, 1)
    with torch.inference_mode():
        expected = authors(a, b, normalize=True).flatten()
    torch.testing.assert_close(lpips(a, b), expected, atol=1e-5, rtol=1e-4)
    assert expected[-1] > 0.5


def test_the_weights_of_the_channels_are_the_authors(authors):
    for own, layer in zip(weights()[1], authors.lins, strict=True):
        assert torch.equal(own, layer.model[-1].weight.flatten())
        assert (own >= 0).all()  # so that no difference counts less than none


def test_equal_images_have_no_distance_and_both_ways_are_as_far():
    a, b = pictures(3), pictures(3, seed=5)
    assert lpips(a, a).tolist() == [0, 0, 0]
    assert torch.equal(lpips(a, b), lpips(b, a)) and (lpips(a, b) > 0).all()


def test_one_pair_counts_as_it_does_in_a_batch():
    a, b = pictures(3), pictures(3, seed=5)
    torch.testing.assert_close(torch.cat([lpips(a[i : i + 1], b[i : i + 1]) for i in range(3)]), lpips(a, b))


def test_more_noise_is_farther():
    a = pictures(2)
    distances = torch.stack([lpips(a, (a + sigma * noise(a)).clamp(0, 1)) for sigma in (0.01, 0.03, 0.1, 0.3)])
    assert (distances.diff(dim=0) > 0).all()


def test_it_orders_where_the_error_of_pixels_does_not():
    """Why it is there: a picture a little darker is nearer than a blurred one, though its pixels are farther off."""
    a = pictures(4)
    darker = a - 0.1
    blurred = torch.nn.functional.avg_pool2d(a, 5, 1, 2, count_include_pad=False)
    assert ((a - darker).square().mean((1, 2, 3)) > (a - blurred).square().mean((1, 2, 3))).all()
    assert (lpips(a, darker) < lpips(a, blurred)).all()


def test_a_layer_by_hand():
    """Of images in one colour all is known: each position inside of a convolution sees the same."""
    kernel, bias = weights()[0][0]
    colour = torch.tensor([0.2, 0.5, 0.9])
    seen = (2 * colour - 1 - torch.tensor([-0.030, -0.088, -0.188])) / torch.tensor([0.458, 0.448, 0.450])
    expected = (kernel.sum((2, 3)) @ seen + bias).relu()
    first = features(colour[None, :, None, None].expand(1, 3, 64, 64))[0]
    assert [x.shape[1] for x in features(pictures(1))] == [64, 192, 384, 256, 256]
    torch.testing.assert_close(first[0, :, 5, 5], expected, atol=1e-4, rtol=1e-4)


def test_what_it_refuses(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"one shape, got \[1, 3, 96, 128\] and \[2, 3, 96, 128\]"):
        lpips(pictures(1), pictures(2))
    monkeypatch.setattr(bench.lpips, "WEIGHTS", tmp_path / "alexnet.ckpt")
    with pytest.raises(FileNotFoundError, match=r"is not there: `python tools/setup.py lpips` fetches it"):
        weights.__wrapped__()


def test_a_pickle_that_would_run_something_is_refused(tmp_path):
    class Trap:
        def __reduce__(self):
            return (tmp_path.joinpath("trapped").touch, ())

    file = tmp_path / "trap.pickle"
    file.write_bytes(pickle.dumps({"AlexNet_0": Trap()}))
    with file.open("rb") as opened, pytest.raises(pickle.UnpicklingError, match="which no array needs"):
        Arrays(opened).load()
    assert not tmp_path.joinpath("trapped").exists()
