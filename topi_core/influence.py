"""How much each reference token matters to the target (Eq. 2, 3 and 9).

Axes: B batch rows, H heads, T target, C references, N the whole sequence, D head dimension. Queries and keys come
after RoPE; the softmax runs over all N keys and its scale is 1 / sqrt(D).
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from .layout import Layout

log = logging.getLogger(__name__)

BUDGET = 256 * 2**20  # bytes that the score matrices of one chunk may take, whatever the size of the image


def attention_received_plain(q: Tensor, k: Tensor, layout: Layout, mask: Tensor | None = None) -> Tensor:
    """Attention that each reference token receives from all target rows: the sum over i of A_ij (Eq. 2).

    q, k [B, H, N, D], mask bool or additive, broadcastable to [B, H, N, N] -> [B, H, C]
    """
    logits = (q[:, :, layout.target] @ k.mT) * q.shape[-1] ** -0.5  # [B, H, T, N]
    if mask is not None:
        logits = _masked(logits, mask if mask.shape[-2] == 1 else mask[..., layout.target, :])
    return logits.softmax(-1)[..., layout.reference].sum(-2)


def attention_received(q: Tensor, k: Tensor, layout: Layout, mask: Tensor | None = None) -> Tensor:
    """`attention_received_plain`, computed in float32 (float64 stays): fused where `fusible`, else in chunks."""
    if q.shape != k.shape or q.shape[2] != layout.tokens:
        shapes = f"queries {tuple(q.shape)} and keys {tuple(k.shape)}"
        raise ValueError(f"{shapes} must both be [B, H, {layout.tokens}, D] for {layout}")
    if mask is None and fusible(q):
        from .fused import attention_received_fused

        return attention_received_fused(q, k, layout)
    return attention_received_chunked(q, k, layout, mask)


def fusible(q: Tensor) -> bool:
    """Whether `attention_received` runs as Triton kernels for queries like these; the first question compiles them."""
    nvidia = q.is_cuda and torch.version.hip is None  # of AMD's, some hang in Triton's products, which nothing catches
    return nvidia and q.dtype in (torch.float16, torch.bfloat16) and fused_agrees(q.device, q.dtype, q.shape[-1])


@cache
def fused_agrees(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether the fused form runs on this device, and gives on a small case what the plain one gives."""
    try:
        from .fused import attention_received_fused
    except ImportError:  # Triton is not part of every torch
        return False
    layout = Layout(16, (9, 11), ((7, 9), (5, 5)))
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, layout.tokens, 2, width, generator=generator).to(dtype).transpose(2, 3)
    plain = attention_received_plain(q.float(), k.float(), layout)
    try:
        fused = attention_received_fused(q.to(device), k.to(device), layout).cpu()
        error = (fused / plain - 1).abs().max().item()
    except Exception as reason:  # no compiler, no driver, a GPU that Triton does not know
        log.warning("ToPi: Triton does not work here, so influence is computed without it, which is slower: %s", reason)
        return False
    if not error < 1e-3:
        log.warning("ToPi: Triton is off by %.1e here, so influence is computed without it, which is slower", error)
    return error < 1e-3


def attention_received_chunked(
    q: Tensor, k: Tensor, layout: Layout, mask: Tensor | None = None, budget: int = BUDGET
) -> Tensor:
    """`attention_received_plain` in chunks over heads and target rows, computed in float32 (float64 stays).

    The score matrices of a chunk and their softmax take at most `budget` bytes, as long as one row fits.
    """
    rows, heads, tokens, width = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    if mask is not None:
        mask = mask.expand(rows, heads, mask.shape[-2], tokens)
    received = torch.zeros(rows, heads, layout.reference_tokens, dtype=dtype, device=q.device)
    height = max(1, budget // (2 * tokens * dtype.itemsize))  # score rows in a chunk, over all its heads
    step = min(height, layout.target_tokens)
    together = max(1, height // max(1, layout.target_tokens))
    for b in range(rows):
        for h in range(0, heads, together):
            some = slice(h, h + together)
            keys = k[b, some].to(dtype).mT
            for i in range(layout.target.start, layout.target.stop, step):
                chunk = slice(i, min(i + step, layout.target.stop))
                logits = (q[b, some, chunk].to(dtype) * width**-0.5) @ keys  # [h, t, N]
                if mask is not None:
                    logits = _masked(logits, mask[b, some] if mask.shape[-2] == 1 else mask[b, some, chunk])
                received[b, some] += logits.softmax(-1)[..., layout.reference].sum(-2)
    return received


def _masked(logits: Tensor, mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return logits.masked_fill(~mask, float("-inf"))
    return logits + mask.to(logits.dtype)


def influence(received: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """Token influence of one layer (Eq. 9): the norm of a token's value times the attention it receives.

    received [B, H, C] from `attention_received`, v [B, H, N, D] -> [B, C]. Layers are added up.
    """
    norms = torch.linalg.vector_norm(v[:, :, layout.reference].to(received.dtype), dim=-1)  # [B, H, C]
    return (norms * received).sum(1)


def target_aware_score(received: Tensor, layout: Layout) -> Tensor:
    """S_j, the average attention a reference token receives (Eq. 3): received [B, H, C] -> [B, C]."""
    return received.mean(1) / layout.target_tokens


@dataclass(frozen=True)
class Scorer:
    """A way to score the reference tokens in one layer; a benchmark brings others.

    A run asks `begin(seed)` once for its function, which returns [B, C], not negative: score(received, v, layout), of
    the attention that is received [B, H, C] and the values [B, H, N, D]; for `of_input` score(hidden, layout, prompts),
    of the block's input [B, N, W] and the number of prompts in the batch.
    """

    name: str
    begin: Callable[[int], Callable[..., Tensor]]
    of_input: bool = False


INFLUENCE = Scorer("influence", lambda seed: influence)
ATTENTION = Scorer("attention", lambda seed: lambda received, v, layout: received.sum(1))  # Table 3's attention alone
SCORERS = {scorer.name: scorer for scorer in (INFLUENCE, ATTENTION)}
