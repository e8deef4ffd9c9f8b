"""Influence by Triton's kernels beside the plain chunks, at full size on a GPU: `python -m bench.kernels`."""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

import torch

from topi_core.influence import attention_received_chunked
from topi_core.layout import Layout
from topi_demo.provenance import read, setting

RESULTS = Path(__file__).resolve().parent / "results" / "kernels.jsonl"
HEADS, WIDTH, TEXT = 24, 128, 512


def milliseconds(call) -> float:
    from triton.testing import do_bench

    return do_bench(call, warmup=50, rep=300, return_mode="median")


def table(rows: list[dict]) -> str:
    lines = [
        "| references at 1024 px | kernels | chunks | an attention of all tokens | largest difference |",
        "|---" * 5 + "|",
    ]
    for row in rows:
        fused, chunks, attention = (row["milliseconds"][k] for k in ("fused", "chunks", "attention"))
        lines.append(
            f"| {row['references']} | {fused:.2f} ms | {chunks:.2f} ms | {attention:.2f} ms | {row['difference']:.1e} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only print the table of the rows that are there")
    args = parser.parse_args()
    if not args.table:
        from topi_core.fused import attention_received_fused

        with torch.inference_mode(), args.out.open("a", encoding="utf-8") as file:
            for references in (1, 3):
                layout = Layout(TEXT, (64, 64), ((64, 64),) * references)
                q, k, v = torch.randn(3, 1, HEADS, layout.tokens, WIDTH, device="cuda", dtype=torch.bfloat16)
                ways = {
                    "fused": partial(attention_received_fused, q, k, layout),
                    "chunks": partial(attention_received_chunked, q, k, layout),
                    "attention": partial(torch.nn.functional.scaled_dot_product_attention, q, k, v),
                }
                plain = ways["chunks"]()
                difference = ((ways["fused"]() - plain).abs().max() / plain.abs().max()).item()
                row = {"what": "kernels", "references": references, "tokens": layout.tokens, "difference": difference,
                       "milliseconds": {name: milliseconds(call) for name, call in ways.items()}}  # fmt: skip
                file.write(json.dumps(row | setting()) + "\n")
    print(table(read(args.out)))


if __name__ == "__main__":
    main()
