"""Conditionings, sampling and nodes, called the way ComfyUI's own nodes call them."""

from __future__ import annotations

import importlib

import comfy.sample
import comfyui_version
import node_helpers
import pytest
import torch
from small_models import POOLED_WIDTH, Family
from torch import Tensor

import nodes
from bench.baselines.scorers import OTHERS
from topi_demo import runtime


def latent(family: Family, height: int = 16, width: int = 16, batch: int = 1, seed: int = 0) -> Tensor:
    """Random latent; sizes are in pixels of a latent with 8 image pixels each, and shrink with the family's patch."""
    size = (height * family.patch // 2, width * family.patch // 2)
    frames = (1,) if family.frames else ()
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(batch, family.channels, *frames, *size, generator=generator)


def empty(family: Family, height: int = 16, width: int = 16, batch: int = 1) -> Tensor:
    return torch.zeros_like(latent(family, height, width, batch))


def conditioning(
    family: Family,
    refs: list[Tensor] | None = None,
    method: str | None = None,
    seed: int = 0,
    tokens: int = 6,
    width: int | None = None,
    **values,
) -> list:
    """What CLIPTextEncode, ReferenceLatent and FluxKontextMultiReferenceLatentMethod would make of a random prompt."""
    generator = torch.Generator().manual_seed(2000 + seed)
    text = torch.randn(1, tokens, width or family.text_width, generator=generator)
    cond = [[text, {"pooled_output": torch.randn(1, POOLED_WIDTH, generator=generator)}]]
    for reference in refs or []:
        cond = node_helpers.conditioning_set_values(cond, {"reference_latents": [reference]}, append=True)
    if method or family.method:
        values["reference_latents_method"] = method or family.method
    if family.token_mask:
        values["attention_mask"] = torch.ones(1, tokens, dtype=torch.long)
    return node_helpers.conditioning_set_values(cond, values)


def sample(
    model,
    positive: list,
    negative: list | None = None,
    *,
    latent: Tensor,
    cfg: float = 1.0,
    steps: int = 4,
    sampler: str = "euler",
    scheduler: str = "simple",
    seed: int = 7,
    denoise: float = 1.0,
    callback=None,
    **others,
) -> Tensor:
    """The KSampler node's work."""
    noise = comfy.sample.prepare_noise(latent, seed)
    with torch.inference_mode():
        return comfy.sample.sample(
            model, noise, steps, cfg, sampler, scheduler, positive, positive if negative is None else negative, latent,
            denoise=denoise, callback=callback, disable_pbar=True, seed=seed, **others,
        )  # fmt: skip


def run_node(name: str, /, **inputs) -> tuple:
    """Execute a node of ComfyUI's registry, with the defaults of its own schema for what is not given.

    Skips the test where an older ComfyUI than the one we build for lacks the node.
    """
    older = comfyui_version.__version__ != runtime.VERSION
    if older and name not in nodes.NODE_CLASS_MAPPINGS and not name.startswith("ToPi"):
        pytest.skip(f"ComfyUI {comfyui_version.__version__} has no {name}")
    node = nodes.NODE_CLASS_MAPPINGS[name]
    schema = node.GET_SCHEMA()
    known = {i.id: i.default for i in schema.inputs if getattr(i, "default", None) is not None}
    unknown = set(inputs) - {i.id for i in schema.inputs}
    assert not unknown, f"{name} has no input {unknown}"
    return node.execute(**(known | inputs)).result


def pack_module(name: str):
    """A module of the pack as ComfyUI loaded it."""
    pack = nodes.NODE_CLASS_MAPPINGS["ToPiPatch"].__module__.removesuffix(".nodes.patch")
    return importlib.import_module(f"{pack}.{name}")


CACHE = {"reuse_threshold": 1.2, "start_percent": 0.1, "end_percent": 0.95}  # of EasyCache and LazyCache
PAPER = {"mode": "prune", "tolerance": 0.0}


def patch(model, **inputs) -> tuple:
    """ToPi Patch and ToPi Settings -> (model, trace); the paper's method, unless other inputs are given."""
    scorer = OTHERS.get(inputs.get("metric"))
    if scorer:
        del inputs["metric"]
    return runtime.patch(nodes.NODE_CLASS_MAPPINGS, model, scorer, **PAPER | inputs)


def calibrate(model, top_m=3):
    """ToPi Calibrate -> (model, calibration)."""
    return run_node("ToPiCalibrate", model=model, top_m=top_m)


def last_calibration(calibrating):
    """What the newest run tells."""
    return calibrating.trace.runs[-1].calibration()


def layer_inputs(family: Family, front_layers: int | None = None) -> dict:
    """The representative layers of a small model, as the user types them."""
    front = family.front_layers if front_layers is None else front_layers
    return {"layers": ",".join(map(str, family.layers)), "front_layers": front}


def last_run(trace):
    return trace.runs[-1]


def kinds(trace) -> list[str]:
    """What each step of the newest run was."""
    return [step.kind for step in last_run(trace).steps]


def kept_sets(trace) -> list[tuple[int, list[list[int]]]]:
    """(step, kept tokens of each image), one for each anchor of the newest run and each set of references."""
    anchors = last_run(trace).anchors
    assert [anchor.step for anchor in anchors] == sorted(anchor.step for anchor in anchors)
    return sorted((anchor.step, [row.nonzero().flatten().tolist() for row in anchor.kept]) for anchor in anchors)


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference, as a share of the largest value."""
    return ((a - b).abs().max() / b.abs().max()).item()
