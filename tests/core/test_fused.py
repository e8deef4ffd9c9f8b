"""The Triton kernels without a GPU: what they compute in Triton's interpreter, and that they compile for real ones.

The interpreter is chosen when Triton is imported, so it has a process of its own. It knows float16 and no bfloat16.
"""

import logging
import os
import subprocess
import sys

import pytest
import torch

from topi_core.influence import attention_received, fused_agrees, fusible
from topi_core.layout import Layout

triton = pytest.importorskip("triton")

INTERPRETED = """
import torch, triton.runtime.interpreter as interpreter

_patch = interpreter._patch_lang_tensor


def patch(tensor, scope):  # numpy 2.4 refuses the int() of an array of one number, which Triton 3.6 asks for
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


interpreter._patch_lang_tensor = patch

from topi_core import fused, influence
from topi_core.layout import Layout

"""


def interpreted(code: str) -> str:
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED + code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize("order", ["'text', 'target', 'references'", "'references', 'target', 'text'"])
@pytest.mark.parametrize("batch, heads, width", [(1, 2, 128), (2, 3, 8), (2, 2, 120)])
def test_fused_equals_plain(order, batch, heads, width):
    """Lengths that are no multiple of a tile, several tiles, strides of q, k and v in one tensor and of each alone."""
    interpreted(f"""
for layout in Layout(40, (9, 11), ((7, 9), (5, 5)), ({order})), Layout(3, (4, 5), ((2, 3),), ({order})):
    generator = torch.Generator().manual_seed(0)
    qkv = 2 * torch.randn({batch}, layout.tokens, 3, {heads}, {width}, generator=generator)
    q, k, _ = qkv.half().permute(2, 0, 3, 1, 4)
    plain = influence.attention_received_plain(q.double(), k.double(), layout)
    for form in torch.Tensor.contiguous, lambda x: x, lambda x: x.mT.contiguous().mT:
        received = fused.attention_received_fused(form(q), form(k), layout)
        assert received.dtype == torch.float32
        torch.testing.assert_close(received.double(), plain, rtol=1e-5, atol=1e-6)
""")


def test_the_kernels_are_taken_only_where_they_agree():
    said = interpreted("""
assert influence.fused_agrees(torch.device("cpu"), torch.float16, 64)
right = fused.attention_received_fused
fused.attention_received_fused = lambda *args: right(*args) * 1.01
assert not influence.fused_agrees(torch.device("cpu"), torch.float16, 32)
fused.attention_received_fused = lambda *args: right(*args) * float("nan")
assert not influence.fused_agrees(torch.device("cpu"), torch.float16, 16)
""")
    assert "Triton is off by 1.0e-02 here" in said and "Triton is off by nan here" in said


def test_where_triton_does_not_work_the_log_says_why_once(caplog):
    """There is no driver for a CPU."""
    fused_agrees.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert not any(fused_agrees(torch.device("cpu"), torch.float16, 64) for _ in range(2))
    assert [r.message for r in caplog.records if "Triton does not work here" in r.message] == [
        caplog.records[0].message
    ]


def test_a_cpu_is_not_asked():
    layout = Layout(3, (4, 5), ((2, 3),))
    q = torch.randn(1, 2, layout.tokens, 16).half()
    assert not fusible(q) and attention_received(q, q, layout).shape == (1, 2, 6)


@pytest.mark.skipif(sys.platform != "linux", reason="Triton brings the assembler for Linux alone")
@pytest.mark.parametrize(
    ("capability", "shared"), [(75, 64), (80, 163), (86, 99), (89, 99), (90, 227), (100, 227), (120, 99)]
)
@pytest.mark.parametrize("dtype, width", [("bf16", 128), ("fp16", 64)])
def test_the_kernels_compile_for_gpus(capability, shared, dtype, width, monkeypatch, tmp_path):
    """As they are launched: pointers, widths and strides are multiples of 16. shared: KiB that a program may have."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from topi_core.fused import COLUMNS, ROWS, column_sums, log_sum_exp

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {"ROWS": ROWS, "COLUMNS": COLUMNS, "D": width}
    for kernel in log_sum_exp, column_sums:
        types = {"q": f"*{dtype}", "k": f"*{dtype}", "lse": "*fp32", "out": "*fp32", "scale": "fp32"}
        names = kernel.arg_names
        signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
        any_number = {*constants, "scale", *(p.name for p in kernel.params if p.do_not_specialize)}
        attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in any_number}
        made = triton.compile(
            ASTSource(kernel, signature, constants, attributes), target=GPUTarget("cuda", capability, 32)
        )
        assert made.asm["cubin"] and made.metadata.shared <= shared * 1024


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_a_gpu_fused_equals_chunked(dtype):
    from topi_core.fused import attention_received_fused
    from topi_core.influence import attention_received_chunked

    layout = Layout(512, (33, 31), ((40, 24), (17, 19)))
    q, k = torch.randn(2, 1, 24, layout.tokens, 128, device="cuda").to(dtype)
    assert fusible(q)
    chunked = attention_received_chunked(q, k, layout)
    torch.testing.assert_close(attention_received_fused(q, k, layout), chunked, rtol=1e-3, atol=1e-5)
