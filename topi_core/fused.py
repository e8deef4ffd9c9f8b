"""Eq. 2's sum over target rows as two Triton kernels, which never write the scores to memory.

The first finds each target row's log-sum-exp over all N keys, as flash attention does; with it the second adds up each
reference token's column, without atomics, so the same input gives the same sum. Products are of the inputs' half
precision and add up in float32, which is what `influence.attention_received_chunked` computes too. Needs Triton.
"""

from __future__ import annotations

from math import e, log2

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import Layout

ROWS = COLUMNS = 64
"""Target rows and keys of one tile. Two of 64 x 128 in half precision fit into the shared memory of any GPU."""


@triton.jit
def tile(start, count, width, stride, N: tl.constexpr, D: tl.constexpr):
    """Offsets of N tokens of `width` numbers from `start`, and which of them there are."""
    token, number = start + tl.arange(0, N), tl.arange(0, D)
    return token[:, None] * stride + number[None, :], (token < count)[:, None] & (number < width)[None, :]


@triton.jit
def head(x, plane, heads, batch_stride, head_stride):
    """Where one head of one batch row begins; planes count the heads of all rows."""
    return x + plane // heads * batch_stride + plane % heads * head_stride


@triton.jit(do_not_specialize=["heads", "rows", "tokens"])  # compiled once for all sizes of images
def log_sum_exp(
    q, k, out, scale, heads, rows, tokens, width, q_batch, q_head, q_token, k_batch, k_head, k_token,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """out [B, H, T]: log2 of the sum over all keys of 2 ** (scale q k), one program for ROWS target rows of a head."""
    plane = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * ROWS
    at, there = tile(start, rows, width, q_token, ROWS, D)
    queries = tl.load(head(q, plane, heads, q_batch, q_head) + at, mask=there, other=0.0)
    keys_of_head = head(k, plane, heads, k_batch, k_head)
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for first in range(0, tokens, COLUMNS):
        at, there = tile(first, tokens, width, k_token, COLUMNS, D)
        keys = tl.load(keys_of_head + at, mask=there, other=0.0)
        logits = tl.dot(queries, tl.trans(keys)) * scale
        logits = tl.where((first + tl.arange(0, COLUMNS) < tokens)[None, :], logits, float("-inf"))
        higher = tl.maximum(most, tl.max(logits, 1))
        total = total * tl.exp2(most - higher) + tl.sum(tl.exp2(logits - higher[:, None]), 1)
        most = higher
    row = start + tl.arange(0, ROWS)
    tl.store(out + plane * rows + row, most + tl.log2(total), mask=row < rows)


@triton.jit(do_not_specialize=["heads", "rows", "columns"])
def column_sums(
    q, k, lse, out, scale, heads, rows, columns, width, q_batch, q_head, q_token, k_batch, k_head, k_token,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """out [B, H, C]: the attention that keys receive from all target rows, one program for COLUMNS keys of a head."""
    plane = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * COLUMNS
    at, there = tile(start, columns, width, k_token, COLUMNS, D)
    keys = tl.load(head(k, plane, heads, k_batch, k_head) + at, mask=there, other=0.0)
    queries_of_head = head(q, plane, heads, q_batch, q_head)
    received = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, rows, ROWS):
        at, there = tile(first, rows, width, q_token, ROWS, D)
        queries = tl.load(queries_of_head + at, mask=there, other=0.0)
        row = first + tl.arange(0, ROWS)
        # a row that is not there has an infinite sum, and so gives nothing
        total = tl.load(lse + plane * rows + row, mask=row < rows, other=float("inf"))
        received += tl.sum(tl.exp2(tl.dot(queries, tl.trans(keys)) * scale - total[:, None]), 0)
    column = start + tl.arange(0, COLUMNS)
    tl.store(out + plane * columns + column, received, mask=column < columns)


def attention_received_fused(q: Tensor, k: Tensor, layout: Layout) -> Tensor:
    """`attention_received_plain` without a mask: q, k [B, H, N, D] in half precision -> [B, H, C] in float32."""
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q[:, :, layout.target], k))
    batch, heads, rows, width = q.shape
    columns, tokens = layout.reference_tokens, k.shape[2]
    lse, received = (torch.empty(batch, heads, n, dtype=torch.float32, device=q.device) for n in (rows, columns))
    scale, tiles = width**-0.5 * log2(e), dict(ROWS=ROWS, COLUMNS=COLUMNS, D=max(16, triton.next_power_of_2(width)))
    references = k[:, :, layout.reference]
    planes, strides = batch * heads, (*q.stride()[:3], *k.stride()[:3])
    with torch.cuda.device_of(q):
        log_sum_exp[triton.cdiv(rows, ROWS), planes](q, k, lse, scale, heads, rows, tokens, width, *strides, **tiles)
        column_sums[triton.cdiv(columns, COLUMNS), planes](
            q, references, lse, received, scale, heads, rows, columns, width, *strides, **tiles
        )
    return received
