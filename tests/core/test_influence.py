import subprocess
import sys

import pytest
import torch

from topi_core.influence import (
    attention_received,
    attention_received_chunked,
    attention_received_plain,
    influence,
    target_aware_score,
)
from topi_core.layout import Layout

LAYOUT = Layout(3, (4, 5), ((2, 3), (3, 3)))


def qkv(rows=2, heads=3, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(rows, heads, LAYOUT.tokens, width, generator=generator).double() for _ in range(3)]


def masks():
    generator = torch.Generator().manual_seed(1)
    n = LAYOUT.tokens
    keep = torch.rand(2, 1, n, n, generator=generator) > 0.3
    keep[..., 0] = True
    return {
        "none": None,
        "bool": keep,
        "additive": torch.randn(2, 3, n, n, generator=generator).double(),
        "keys only": torch.randn(2, 1, 1, n, generator=generator).double(),
    }


@pytest.mark.parametrize("mask", masks())
@pytest.mark.parametrize("budget", [1, 3000, 9000, 2**20], ids="budget{}".format)
def test_chunked_equals_plain(mask, budget):
    q, k, _ = qkv()
    mask = masks()[mask]
    plain = attention_received_plain(q, k, LAYOUT, mask)
    torch.testing.assert_close(attention_received_chunked(q, k, LAYOUT, mask, budget), plain, rtol=1e-12, atol=1e-14)


def test_influence_equals_equation_9_written_out():
    q, k, v = qkv(rows=1)
    expected = torch.zeros(LAYOUT.reference_tokens, dtype=torch.float64)
    for h in range(3):
        for i in range(LAYOUT.target.start, LAYOUT.target.stop):
            logits = torch.stack([q[0, h, i] @ k[0, h, j] / 8**0.5 for j in range(LAYOUT.tokens)])
            attention = logits.exp() / logits.exp().sum()
            for c, j in enumerate(range(LAYOUT.reference.start, LAYOUT.reference.stop)):
                expected[c] += v[0, h, j].norm() * attention[j]
    torch.testing.assert_close(influence(attention_received_plain(q, k, LAYOUT), v, LAYOUT)[0], expected)


def test_target_aware_score_is_an_average_over_heads_and_target():
    q, k, _ = qkv()
    weights = ((q[:, :, LAYOUT.target] @ k.mT) / 8**0.5).softmax(-1)[..., LAYOUT.reference]
    score = target_aware_score(attention_received(q, k, LAYOUT), LAYOUT)
    torch.testing.assert_close(score, weights.mean((1, 2)))
    assert (score.sum(1) < 1).all()


def test_low_precision_is_scored_in_float32():
    q, k, v = (x.bfloat16() for x in qkv())
    received = attention_received(q, k, LAYOUT)
    assert received.dtype == torch.float32
    plain = attention_received_plain(q.double(), k.double(), LAYOUT)
    torch.testing.assert_close(received.double(), plain, rtol=1e-4, atol=1e-6)
    assert influence(received, v, LAYOUT).dtype == torch.float32


def test_memory_stays_within_the_budget_at_full_image_size():
    """4096 target rows against 8704 keys are 142 MB a head; with 16 MB of budget the process grows by far less."""
    code = """
import resource, torch
from topi_core.influence import attention_received_chunked
from topi_core.layout import Layout
torch.set_num_threads(1)
layout = Layout(512, (64, 64), ((64, 64),))
q = torch.randn(1, 2, layout.tokens, 8)
attention_received_chunked(q[:, :, :64], q[:, :, :64], Layout(16, (4, 4), ((4, 8),)))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
attention_received_chunked(q, q, layout, budget=16 * 2**20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    grown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(grown) * 1024 < 3 * 16 * 2**20


def test_wrong_shapes_are_named():
    q, k, _ = qkv()
    with pytest.raises(ValueError, match=r"must both be \[B, H, 38, D\]"):
        attention_received(q[:, :, 1:], k[:, :, 1:], LAYOUT)
