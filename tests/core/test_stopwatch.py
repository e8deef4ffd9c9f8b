"""The time of scoring."""

import time

import pytest
import torch

from topi_core.stopwatch import Stopwatch


def test_time_on_the_cpu_adds_up():
    watch = Stopwatch()
    for _ in range(2):
        with watch.on(torch.device("cpu")):
            time.sleep(0.02)
    assert 0.04 <= watch.seconds() < 0.5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_time_on_the_gpu_is_the_gpu_s():
    device = torch.device("cuda")
    a = torch.randn(4096, 4096, device=device)
    a @ a  # loads the kernel
    torch.cuda.synchronize()
    watch, started = Stopwatch(), time.perf_counter()
    with watch.on(device):
        for _ in range(50):
            a @ a
    asked = time.perf_counter() - started
    seconds = watch.seconds()
    taken = time.perf_counter() - started
    assert asked < 0.5 * taken  # nothing waited inside
    assert 0.7 * taken < seconds <= 1.01 * taken
