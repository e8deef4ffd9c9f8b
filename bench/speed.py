"""What a step takes on full-size architectures with random weights: `python -m bench.speed`.

Weights mean nothing here, so the kept share is fixed. One workload is measured five ways, in turn and over again: the
full run; ToPi in both modes; the native run without references, which is the bound of what dropping references can do
(reuse lets the text go as well); and the native run with as many as were kept, which is the bound of pruning. Every
call of the network is timed by itself, with what ToPi does around it, and the GPU waited for. Figures are ratios; the
cost model's (appendix F) stand beside them.

On a CPU the same command runs a few blocks of the true width in float32, and its rows say so.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median

import torch

from topi_core.cost import layer_flops
from topi_core.savings.reuse import TEXT_LEFT
from topi_demo.provenance import read, setting
from topi_demo.runtime import load_pack, patch

RESULTS = Path(__file__).resolve().parent / "results" / "speed.jsonl"
STEP_COUNTS = (4, 8, 20, 40)
ANCHORS_EVERY = 5


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A model's true sizes; `blocks` are its double and single ones, `few` what a CPU runs of them."""

    name: str
    family: str
    hidden: int
    blocks: tuple[int, int]
    few: tuple[int, int]
    front: int
    linear: int
    channels: int
    patch: int
    cell: int  # pixels a latent cell
    text_tokens: int
    text_width: int


ARCHITECTURES = {
    a.name: a
    for a in (
        Architecture(
            name="flux1-kontext", family="flux1", hidden=3072, blocks=(19, 38), few=(1, 1), front=10, linear=24,
            channels=16, patch=2, cell=8, text_tokens=512, text_width=4096,
        ),
        Architecture(
            name="qwen-image-edit", family="qwen_image", hidden=3072, blocks=(60, 0), few=(2, 0), front=10, linear=24,
            channels=16, patch=2, cell=8, text_tokens=512, text_width=3584,
        ),
        Architecture(
            name="flux2-klein-4b", family="flux2", hidden=3072, blocks=(5, 20), few=(1, 1), front=4, linear=26,
            channels=128, patch=1, cell=16, text_tokens=512, text_width=7680,
        ),
    )
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A picture of `side` pixels and references as large; `rows` of a call (2: cond and uncond); the kept share."""

    architecture: str
    side: int
    references: int
    rows: int
    kept: float


def network(a: Architecture, blocks: tuple[int, int]):
    """The model as ComfyUI loads it from a file, with random weights of a moderate size.

    In bfloat16 on a GPU. On a CPU in float32: from anything else ComfyUI would cast the weights anew in every call.
    """
    import comfy.ops
    import comfy.sd
    from comfy.ldm.flux.model import Flux
    from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel

    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    common = dict(dtype=dtype, operations=comfy.ops.disable_weight_init)
    with torch.device("meta"):
        if a.family == "qwen_image":
            module = QwenImageTransformer2DModel(num_layers=blocks[0], default_ref_method="index", **common)
        else:
            sizes = dict(
                in_channels=a.channels, out_channels=a.channels, hidden_size=a.hidden, num_heads=a.hidden // 128,
                depth=blocks[0], depth_single_blocks=blocks[1], patch_size=a.patch, context_in_dim=a.text_width,
            )  # fmt: skip
            if a.family == "flux1":
                sizes |= dict(vec_in_dim=768, mlp_ratio=4.0, axes_dim=[16, 56, 56], theta=10000, qkv_bias=True,
                              guidance_embed=True, txt_ids_dims=[])  # fmt: skip
            else:
                sizes |= dict(vec_in_dim=None, mlp_ratio=3.0, axes_dim=[32, 32, 32, 32], theta=2000, qkv_bias=False,
                              guidance_embed=False, txt_ids_dims=[3], global_modulation=True, mlp_silu_act=True,
                              ops_bias=False, default_ref_method="index", ref_index_scale=10.0)  # fmt: skip
            module = Flux(**common, **sizes)
    pool = torch.randn(2**27, generator=torch.Generator().manual_seed(9)).to(dtype)
    weights = {}
    for number, (name, value) in enumerate(module.state_dict().items()):
        part = pool[number : number + value.numel()].view(value.shape)
        weights[name] = part * value[0].numel() ** -0.5 if value.ndim > 1 else 1 + 0.1 * part
    return comfy.sd.load_diffusion_model_state_dict(weights, model_options={"dtype": dtype})


class Inputs:
    """What runs of an architecture are given: random latents and prompts, always the same ones in the same order."""

    def __init__(self, architecture: Architecture):
        self.architecture, self.generator = architecture, torch.Generator().manual_seed(1)

    def latent(self, rows: int, columns: int) -> torch.Tensor:
        frames = (1,) if self.architecture.family == "qwen_image" else ()
        return torch.randn(1, self.architecture.channels, *frames, rows, columns, generator=self.generator)

    def conditioning(self, references: list[torch.Tensor]) -> list:
        a = self.architecture
        values = {"pooled_output": torch.zeros(1, 768)} | ({"reference_latents": references} if references else {})
        return [[torch.randn(1, a.text_tokens, a.text_width, generator=self.generator), values]]


class CallTimes:
    """An APPLY_MODEL wrapper: it times every call of the network, outside of the wrapper in which ToPi works."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: list[float] = []

    def __call__(self, executor, *args, **kwargs):
        self._wait()
        started = time.perf_counter()
        result = executor(*args, **kwargs)
        self._wait()
        self.seconds.append(time.perf_counter() - started)
        return result

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measure(w: Workload, model, blocks: tuple[int, int], topi: Callable, repeats: int) -> dict:
    """Medians of one workload's calls, by way of running it; `topi` gives a patched model and its trace.

    A part of the blocks has no front layers: they would be another share of it than of the whole.
    """
    import comfy.sample
    from comfy.patcher_extension import WrappersMP

    a = ARCHITECTURES[w.architecture]
    cells = w.side // a.cell
    given = Inputs(a)
    whole = [given.latent(cells, cells) for _ in range(w.references)]
    kept_rows = max(1, round(cells // a.patch * w.kept)) * a.patch
    cut = [given.latent(kept_rows, cells) for _ in range(w.references)]
    share = kept_rows / cells
    depth = sum(blocks)
    front = a.front if blocks == a.blocks else 0
    common = dict(
        tolerance=0.0, update_interval=2, spacing="steps", layers=f"{depth // 2}", front_layers=front,
        min_keep=share, max_keep=share,
    )  # fmt: skip
    prune, trace = topi(model, mode="prune", **common)
    reuse, _ = topi(model, mode="reuse", **common)
    ways = {
        "full": (model, whole),
        "prune": (prune, whole),
        "reuse": (reuse, whole),
        "no references": (model, []),
        "cut references": (model, cut),
    }
    device = model.load_device
    calls, peak = defaultdict(lambda: defaultdict(list)), defaultdict(int)
    for _, (name, (patched, references)) in product(range(repeats), ways.items()):
        times = CallTimes(device)
        timed = patched.clone()
        timed.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "bench", times)
        noise = given.latent(cells, cells)
        conds = [given.conditioning(references) for _ in range(2)]
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        comfy.sample.sample(
            timed, noise, 4, 3.0 if w.rows == 2 else 1.0, "euler", "simple", *conds, torch.zeros_like(noise),
            disable_pbar=True, seed=1,
        )  # fmt: skip
        if device.type == "cuda":
            peak[name] = max(peak[name], torch.cuda.max_memory_allocated(device))
        steps = [sum(part) for part in _split(times.seconds, 4)]
        if name in ("prune", "reuse"):  # anchors at 0 and 2; the first pays for loading, the last step has a forecast
            calls[name]["anchor"].append(steps[2])
            calls[name]["later"].append(steps[3])
        else:
            calls[name]["later"] += steps[1:]
    seconds = {name: {when: median(values) for when, values in of.items()} for name, of in calls.items()}
    tokens = {
        "text": a.text_tokens,
        "target": (cells // a.patch) ** 2,
        "references": w.references * (cells // a.patch) ** 2,
        "kept": w.references * (kept_rows // a.patch) * (cells // a.patch),
    }
    scoring = median(anchor.seconds for run in trace.runs for anchor in run.anchors)  # of one layer
    return {
        "seconds": seconds, "scoring": scoring, "tokens": tokens, "peak_bytes": dict(peak), "front_layers": front,
        "blocks": blocks, "hidden": a.hidden, "linear": a.linear,
    }  # fmt: skip


def _split(values: list[float], parts: int) -> list[list[float]]:
    size = len(values) // parts
    return [values[i * size : (i + 1) * size] for i in range(parts)]


def predicted(row: dict) -> dict[str, float]:
    """The cost model's time of a later step, as a share of a full one."""
    t, hidden, linear = row["tokens"], row["hidden"], row["linear"]
    own = t["text"] + t["target"]
    depth, front = sum(row["blocks"]), row["front_layers"]
    full = layer_flops(own + t["references"], hidden, linear)
    cut = layer_flops(own + t["kept"], hidden, linear)
    return {
        "prune": (front * full + (depth - front) * cut) / (depth * full),
        "reuse": layer_flops(t["target"] + TEXT_LEFT, hidden, linear, own + t["kept"]) / full,
        "no references": layer_flops(own, hidden, linear) / full,
        "cut references": cut / full,
    }


def speedups(row: dict, steps: int) -> dict[str, float]:
    """Of whole runs of `steps`, an anchor in every ANCHORS_EVERY, put together from the medians."""
    seconds = row["seconds"]
    full = seconds["full"]["later"] * steps
    anchors = -(-steps // ANCHORS_EVERY)
    result = {}
    for name, of in seconds.items():
        whole = anchors if "anchor" in of else 0
        result[name] = full / (whole * of.get("anchor", 0) + (steps - whole) * of["later"])
    return result


def scoring_share(row: dict, steps: int = 40, layers: int = 3, anchors: int = 4) -> float:
    """What scoring takes of a run of the paper's settings, with all blocks, from what one layer's scoring took here."""
    depth = sum(ARCHITECTURES[row["workload"]["architecture"]].blocks)
    of_a_layer = row["scoring"] / (row["seconds"]["full"]["later"] / sum(row["blocks"]))
    return of_a_layer * layers * anchors / (depth * steps)


def _named(row: dict) -> str:
    w = row["workload"]
    guided = ", guided" * (w["rows"] == 2)
    references = f"{w['references']} reference{'s'[: w['references'] > 1]}, {w['kept']:.0%} kept"
    return f"{w['architecture']}, {row['blocks'][0]} + {row['blocks'][1]} blocks, {w['side']} px{guided}; {references}"


def steps_table(rows: list[dict]) -> str:
    """Of one step, the speed-up over a full one, each with the cost model's in brackets."""
    lines = [
        "| | reused step | no references | pruned step | cut references | pruned to cut | anchor: prune, reuse | "
        "scoring, of 40 steps |",
        "|---" * 8 + "|",
    ]
    for row in rows:
        seconds, model = row["seconds"], predicted(row)
        full = seconds["full"]["later"]
        cells = [
            f"{full / seconds[name]['later']:.2f}x ({1 / model[name]:.2f}x)"
            for name in ("reuse", "no references", "prune", "cut references")
        ]
        cells.append(f"{seconds['prune']['later'] / seconds['cut references']['later'] - 1:+.1%}")
        cells.append(", ".join(f"{seconds[name]['anchor'] / full - 1:+.1%}" for name in ("prune", "reuse")))
        cells.append(f"{scoring_share(row):.2%}")
        lines.append(f"| {_named(row)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def runs_table(rows: list[dict]) -> str:
    """Of whole runs, put together from the medians of their steps: prune, reuse."""
    lines = ["| | " + " | ".join(f"{n} steps" for n in STEP_COUNTS) + " |", "|---" * (1 + len(STEP_COUNTS)) + "|"]
    for row in rows:
        runs = [speedups(row, n) for n in STEP_COUNTS]
        cells = [f"{run['prune']:.2f}x, {run['reuse']:.2f}x" for run in runs]
        lines.append(f"| {_named(row)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.speed", description=__doc__.splitlines()[0])
    parser.add_argument("--architectures", nargs="+", choices=list(ARCHITECTURES), default=list(ARCHITECTURES))
    parser.add_argument("--sides", nargs="+", type=int, default=[512, 768, 1024])
    parser.add_argument("--references", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--rows", nargs="+", type=int, choices=[1, 2], default=[1, 2], help="2: cond and uncond")
    parser.add_argument("--kept", nargs="+", type=float, default=[1.0, 0.75, 0.5, 0.25])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--whole", action="store_true", help="all blocks, also on a CPU")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only print the table of the results that are there")
    args = parser.parse_args()
    if not args.table:
        known, _ = load_pack()
        whole = args.whole or torch.cuda.is_available()
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with torch.inference_mode(), args.out.open("a", encoding="utf-8") as file:
            for name in args.architectures:
                a = ARCHITECTURES[name]
                blocks = a.blocks if whole else a.few
                model = network(a, blocks)
                for side, references, rows, kept in product(args.sides, args.references, args.rows, args.kept):
                    w = Workload(architecture=name, side=side, references=references, rows=rows, kept=kept)
                    found = measure(w, model, blocks, partial(patch, known), args.repeats)
                    row = {"what": "speed", "workload": asdict(w), **found, "repeats": args.repeats, **setting()}
                    file.write(json.dumps(row) + "\n")
                    file.flush()
                    print(steps_table([row]).splitlines()[-1], flush=True)
                del model
    rows = read(args.out)
    print(steps_table(rows), runs_table(rows), sep="\n\n")


if __name__ == "__main__":
    main()
