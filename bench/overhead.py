"""What ToPi's own Python costs in a call of the network: `python -m bench.overhead`, `--against` another checkout.

Whole calls are timed from the sampler, outside of all that ToPi does. A reused step computes what an unpatched one
without references does, a pruned one what an unpatched one with as few reference tokens does: what either takes more is
ToPi's own. As most of the text leaves a reused step as well, it is compared with one of as short a text, too. What then
is left is the kept keys and values, put behind its own and looked at. On a CPU, with one thread, the clock is that of
the thread, so that other work on the machine counts less.

Every checkout has a process of its own, with the same ComfyUI and the same models, and they take turns: each repeat
runs all ways in the one, then in the other. What disturbs a call only adds to it, so of a run's calls of one kind the
shortest counts; figures are medians of those over the repeats, and of their differences within a repeat.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import sys
import time
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles

import torch

from bench.speed import ARCHITECTURES, Architecture, network
from topi_demo.provenance import read
from topi_demo.runtime import PACK, use_comfyui

RESULTS = Path(__file__).resolve().parent / "results" / "overhead.jsonl"
INTERVAL = 3  # steps from anchor to anchor
KEPT = 0.5
TEXT_LEFT = 2  # tokens of a reused text that stay in the sequence
COMPARED = (  # a way, a kind of its steps, and an unpatched way
    ("reuse", "later", "no references"),
    ("reuse", "later", "short text"),
    ("prune", "later", "cut reference"),
    ("reuse", "anchor", "one reference"),
    ("prune", "anchor", "one reference"),
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, a picture of `cells` x `cells` of its latent and a reference as large, the layers that anchors score.

    `steps` are those of a run with ToPi; one without has one for each anchor.
    """

    name: str
    architecture: Architecture | None  # None: the demo model
    cells: int
    text_tokens: int
    layers: str
    steps: int
    repeats: int


_FLUX1 = ARCHITECTURES["flux1-kontext"]
_NARROW = replace(_FLUX1, name="narrow", hidden=128, text_width=64)
CASES = (
    Case(
        name="57 narrow blocks", architecture=_NARROW, cells=8, text_tokens=4, layers="13,18,31", steps=12, repeats=30
    ),
    Case(name="demo model", architecture=None, cells=16, text_tokens=18, layers="6,8,11", steps=12, repeats=30),
    Case(
        name="FLUX.1 Kontext, 1 + 1 blocks, 256 px",
        architecture=replace(_FLUX1, blocks=_FLUX1.few), cells=32, text_tokens=128, layers="1", steps=6, repeats=3,
    ),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--against", type=Path, help="another checkout of this repository, to measure beside this one")
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in CASES], metavar="NAME")
    parser.add_argument("--repeats", type=float, default=1.0, help="times as many as the cases have by themselves")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only print the table of the results that are there")
    args = parser.parse_args()
    if not args.table:
        checkouts = [PACK, *([args.against.resolve()] if args.against else [])]
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("a", encoding="utf-8") as file:
            for row in measure(checkouts, [c for c in CASES if c.name in (args.cases or c.name)], args.repeats):
                file.write(json.dumps(row) + "\n")
                file.flush()
                print(table([row]).splitlines()[-1], flush=True)
    print(table(read(args.out)))


def measure(checkouts: list[Path], cases: list[Case], times: float):
    """Rows, one a case and checkout."""
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for checkout in checkouts:
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(checkout, theirs), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    settings = [pipe.recv() for pipe in pipes]
    for case in cases:
        repeats = max(1, round(case.repeats * times))
        rounds = [[] for _ in pipes]
        warm_up = repeats >= 10  # a few long ones need none: each drops its first step
        for number in range(repeats + warm_up):
            for pipe, own in zip(pipes, rounds, strict=True):
                pipe.send(case)
                found = pipe.recv()
                if number or not warm_up:
                    own.append(found)
        for checkout, where, own in zip(checkouts, settings, rounds, strict=True):
            yield {"what": "overhead", "case": case.name, "checkout": checkout.name, **summary(own),
                   "steps": case.steps, "kept": KEPT, "repeats": repeats, **where}  # fmt: skip
    for pipe, process in zip(pipes, processes, strict=True):
        pipe.send(None)
        process.join()


def summary(rounds: list[dict[str, dict[str, float]]]) -> dict:
    """Medians of seconds by way and kind of step; ToPi's own with the quarter and the three quarters beside them."""
    ways = {way: {kind: median(r[way][kind] for r in rounds) for kind in kinds} for way, kinds in rounds[0].items()}
    own = {}
    for way, kind, native in COMPARED:
        differences = [r[way][kind] - r[native]["later"] for r in rounds]
        low, middle, high = quantiles(differences, n=4) if len(differences) > 1 else differences * 3
        own[f"{way}, {kind}, to {native}"] = {"median": middle, "quarters": [low, high]}
    return {"seconds": ways, "own": own}


def table(rows: list[dict]) -> str:
    """Milliseconds a call: unpatched, with ToPi, and what of it is ToPi's own, with the quarters."""
    native, patched = ("no references", "short text", "one reference", "cut reference"), ("reuse", "prune")
    heads = [", ".join(native), *(f"{way}: anchor, later" for way in patched)]
    heads += [f"own of {way}, {kind}, to {base}" for way, kind, base in COMPARED]
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (1 + len(heads)) + "|"]
    for row in rows:
        seconds = row["seconds"]
        cells = [_ms(*(seconds[way]["later"] for way in native))]
        cells += [_ms(seconds[way]["anchor"], seconds[way]["later"]) for way in patched]
        cells += [f"{_ms(own['median'])} ({_ms(*own['quarters'])})" for own in row["own"].values()]
        lines.append(f"| {row['case']}; {row['checkout']} {row['commit']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _ms(*seconds: float) -> str:
    return ", ".join(f"{1e3 * value:.2f}" for value in seconds)


def work(checkout: Path, pipe) -> None:
    """A process that measures the pack of one checkout: for each case that it is sent, one repeat."""
    sys.stdout = sys.stderr  # the table alone goes there
    torch.set_num_threads(1)
    known, where = load(checkout)
    pipe.send(where)
    last, ways = None, {}
    with torch.inference_mode():
        while (case := pipe.recv()) is not None:
            if case != last:
                ways.clear()  # the model before
                last, ways = case, prepared(known, case)
            pipe.send({name: way() for name, way in ways.items()})


def load(checkout: Path) -> tuple[dict[str, type], dict]:
    """The nodes of ComfyUI and of a checkout, and the setting as its own provenance says it."""
    use_comfyui()
    import nodes

    asyncio.run(nodes.load_custom_node(str(checkout)))
    known = nodes.NODE_CLASS_MAPPINGS
    pack = known["ToPiPatch"].__module__.rpartition(".nodes.")[0]
    return known, import_module(f"{pack}.topi_demo.provenance").setting()


def patch(known: dict[str, type], model, **inputs):
    """ToPi Patch; what it has no input for goes by way of ToPi Settings, where a checkout has that node.

    No step is skipped: a checkout without the input `tolerance` never does.
    """

    def run(name: str, given: dict):
        return known[name].execute(**{k: v for k, v in _inputs(known[name]).items() if v is not None} | given).result[0]

    mine = _inputs(known["ToPiPatch"])
    inputs = ({"tolerance": 0.0} if "tolerance" in mine else {}) | inputs
    rest = {name: value for name, value in inputs.items() if name not in mine}
    own = {name: value for name, value in inputs.items() if name in mine}
    return run("ToPiPatch", {"model": model} | own | ({"settings": run("ToPiSettings", rest)} if rest else {}))


def _inputs(node: type) -> dict:
    """A node's inputs and their defaults, None where they have none."""
    return {i.id: getattr(i, "default", None) for i in node.GET_SCHEMA().inputs}


def prepared(known: dict[str, type], case: Case) -> dict:
    """The ways to run a case, each a function that gives the seconds of its steps."""
    a = case.architecture
    model = known["ToPiDemoModel"].execute().result[0] if a is None else network(a, a.blocks)
    flux = model.get_model_object("diffusion_model").params
    generator = torch.Generator().manual_seed(1)

    def latent(rows: int) -> torch.Tensor:
        return torch.randn(1, flux.in_channels, rows, case.cells, generator=generator)

    text = torch.randn(1, case.text_tokens, flux.context_in_dim, generator=generator)
    pooled = torch.zeros(1, flux.vec_in_dim)
    whole, kept_rows = latent(case.cells), round(case.cells // flux.patch_size * KEPT) * flux.patch_size
    share = kept_rows / case.cells
    common = dict(update_interval=INTERVAL, profile="auto", layers=case.layers, front_layers=0, spacing="steps")
    reuse = patch(known, model, mode="reuse", tau=1.0, reuse_text=True, **common)
    prune = patch(known, model, mode="prune", tau=0.85, **common, min_keep=share, max_keep=share)

    def way(patched, *references: torch.Tensor, text=text):
        values = {"pooled_output": pooled} | ({"reference_latents": list(references)} if references else {})
        native = patched is model
        return lambda: by_kind(
            timed(patched, [[text, values]], whole, case.steps // INTERVAL if native else case.steps), native
        )

    return {  # each beside what it is compared with
        "no references": way(model),
        "reuse": way(reuse, whole),
        "short text": way(model, text=text[:, :TEXT_LEFT]),
        "one reference": way(model, whole),
        "prune": way(prune, whole),
        "cut reference": way(model, latent(kept_rows)),
    }


def timed(model, conditioning: list, noise: torch.Tensor, steps: int) -> list[float]:
    """Seconds of each call that a sampler makes of the model, with all that is put around it."""
    import comfy.sample
    import comfy.samplers

    gpu = model.load_device.type == "cuda"
    clock = time.perf_counter if gpu else time.thread_time
    seconds = []

    def sampler(denoise, x, sigmas, extra_args=None, callback=None, disable=None):
        for sigma, following in pairwise(sigmas):
            at = sigma * x.new_ones(len(x))
            if gpu:
                torch.cuda.synchronize()
            started = clock()
            clean = denoise(x, at, **extra_args)
            if gpu:
                torch.cuda.synchronize()
            seconds.append(clock() - started)
            x = clean + (x - clean) * (following / sigma)
        return x

    comfy.sample.sample_custom(
        model, noise, 1.0, comfy.samplers.KSAMPLER(sampler), torch.linspace(1, 0, steps + 1), conditioning,
        conditioning, torch.zeros_like(noise), disable_pbar=True, seed=1,
    )  # fmt: skip
    return seconds


def by_kind(seconds: list[float], native: bool) -> dict[str, float]:
    """The shortest of a run's calls of each kind. The first pays for loading, the first interval has no forecast yet.

    What an anchor keeps is settled in the step behind it: "first".
    """
    if native:
        return {"later": min(seconds[1:])}
    parts = {"anchor": [], "first": [], "later": []}
    for step in range(INTERVAL, len(seconds)):
        parts[("anchor", "first", "later")[min(step % INTERVAL, 2)]].append(seconds[step])
    return {kind: min(values) for kind, values in parts.items()}


if __name__ == "__main__":
    main()
