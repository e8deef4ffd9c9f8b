"""The time of scoring."""

import time
from types import SimpleNamespace

import pytest
import torch

from topi_core.stopwatch import Stopwatch


def test_time_on_the_cpu_adds_up(monkeypatch):
    clock = SimpleNamespace(perf_counter=iter((1.0, 1.5, 4.0, 4.25)).__next__)
    monkeypatch.setattr("topi_core.stopwatch.time", clock)
    watch = Stopwatch()
    for _ in range(2):
        with watch.on(torch.device("cpu")):
            pass
    assert watch.seconds() == 0.75


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
