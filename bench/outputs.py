"""What ToPi gives, run for run, to prove that another version of it gives the same bits: `python -m bench.outputs`.

`--repo CHECKOUT --out ROWS.jsonl` makes all runs with the pack of a checkout, which may be another one than this; and
`--compare BEFORE.jsonl AFTER.jsonl` exits with 1 where a latent, a step or a choice of tokens differs. The hashes are
those of one machine and one torch.

One thread, one process, a real ComfyUI, this checkout's small test models and the other one's demo model. Inputs go to
ToPi Patch or to ToPi Settings, whichever has them.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import hashlib
import importlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXTRA_NODES = ("context_windows", "easycache", "torch_compile", "custom_sampler", "edit_model", "flux", "slg")
COUNT = ("latent", "kinds", "kept")  # of a row: what must not differ

PRUNE = {"mode": "prune", "tau": 0.8, "update_interval": 3}
REUSE = {  # this mode has no other tau any more; the others were its defaults once
    "mode": "reuse", "tau": 1.0, "update_interval": 3, "spacing": "sigma", "reuse_text": True,
}  # fmt: skip
MODES = {"prune": PRUNE, "reuse": REUSE}
HALF = {"min_keep": 0.5, "max_keep": 0.5}
SOME = {"min_keep": 0.6, "max_keep": 0.6}
WINDOW = {"start_percent": 0.2, "end_percent": 0.8}
SEARCHED = {"layers": "", "front_layers": -1}
ONE, TWO = ((16, 16),), ((16, 16), (12, 20))

EVERYWHERE = {  # for every family: ToPi's inputs, and the sizes of the references
    "prune 3": (PRUNE, TWO),
    "prune half from the first block on": (PRUNE | HALF | {"front_layers": 0}, ONE),
    "prune by attention": (PRUNE | {"metric": "attention"}, TWO),
    "prune by layers that it finds": (PRUNE | SEARCHED, ONE),
    "prune with tau 1": (PRUNE | {"tau": 1.0}, ONE),
    "prune spaced by sigma": (PRUNE | {"spacing": "sigma"}, ONE),
    "prune from step 2 on": (PRUNE | {"first_anchor": 2}, ONE),
    "prune in a window": (PRUNE | WINDOW | {"update_interval": 2}, TWO),
    "reuse 3": (REUSE, TWO),
    "reuse 2": (REUSE | {"update_interval": 2}, ONE),
    "reuse 1": (REUSE | {"update_interval": 1}, ONE),
    "reuse with ComfyUI's schedule": (REUSE | {"update_interval": 2}, ONE),
    "reuse without forecast": (REUSE | {"update_interval": 2, "forecast": False}, TWO),
    "reuse without text": (REUSE | {"update_interval": 2, "reuse_text": False}, TWO),
    "reuse 60%": (REUSE | {"update_interval": 2} | SOME, TWO),
    "reuse 60% by layers that it finds": (REUSE | SOME | SEARCHED, ONE),
    "reuse spaced by steps": (REUSE | {"spacing": "steps"}, ONE),
    "reuse from step 2 on": (REUSE | {"first_anchor": 2, "update_interval": 2}, ONE),
    "reuse in a window": (REUSE | WINDOW | {"update_interval": 2}, TWO),
}


def load(repo: Path, base: Path) -> None:
    """ComfyUI with its models and users in `base`, the nodes the cases use, and the checkout as one of its packs."""
    comfyui = Path(os.environ.get("COMFYUI_DIR") or repo / ".comfyui" / "0.30.0").resolve()
    sys.path[:0] = [str(comfyui), str(repo)]
    sys.path.append(str(ROOT / "tests" / "comfy"))  # the small models
    import comfy.cli_args
    import torch

    comfy.cli_args.args.base_directory = str(base)
    comfy.cli_args.args.cpu = True
    torch.set_num_threads(1)
    import utils.extra_config  # noqa: F401 (before `nodes`, as ComfyUI's main.py does)

    import nodes

    pack = base / "custom_nodes" / "topi"
    pack.parent.mkdir(parents=True)
    pack.symlink_to(repo, target_is_directory=True)

    async def load_nodes():
        for name in EXTRA_NODES:
            file = str(comfyui / "comfy_extras" / f"nodes_{name}.py")
            assert await nodes.load_custom_node(file, module_parent="comfy_extras"), name
        assert await nodes.load_custom_node(str(pack)), "ComfyUI could not load the pack"

    asyncio.run(load_nodes())


def inputs_of(name: str) -> dict:
    """A node's inputs and their defaults, None where they have none."""
    import nodes

    return {i.id: getattr(i, "default", None) for i in nodes.NODE_CLASS_MAPPINGS[name].GET_SCHEMA().inputs}


def run_node(name: str, /, **inputs) -> tuple:
    """Executes a node with its schema's defaults for what is not given."""
    import nodes

    known = inputs_of(name)
    unknown = set(inputs) - set(known)
    assert not unknown, f"{name} has no input {unknown}"
    defaults = {key: value for key, value in known.items() if value is not None}
    return nodes.NODE_CLASS_MAPPINGS[name].execute(**defaults | inputs).result


def patch(model, **inputs) -> tuple:
    """ToPi Patch -> (model, trace); what it has no input for goes by way of ToPi Settings.

    No step is skipped unless a tolerance is given, which older checkouts do not have.
    """
    known = inputs_of("ToPiPatch")
    inputs = ({"tolerance": 0.0} if "tolerance" in known else {}) | inputs
    more = {name: value for name, value in inputs.items() if name not in known}
    inputs = {name: value for name, value in inputs.items() if name in known}
    if more:
        inputs["settings"] = run_node("ToPiSettings", **more)[0]
    return run_node("ToPiPatch", model=model, **inputs)[:2]


def pack_module(name: str):
    """A module of the pack as ComfyUI loaded it."""
    import nodes

    pack = nodes.NODE_CLASS_MAPPINGS["ToPiPatch"].__module__.rpartition(".nodes.")[0]
    return importlib.import_module(f"{pack}.{name}")


def latent(family, height: int = 16, width: int = 16, batch: int = 1, seed: int = 0):
    """Random; a token is two cells high and wide here, and shrinks with the family's patch."""
    import torch

    size = (height * family.patch // 2, width * family.patch // 2)
    frames = (1,) if family.frames else ()
    return torch.randn(batch, family.channels, *frames, *size, generator=torch.Generator().manual_seed(1000 + seed))


def empty(family, height: int = 16, width: int = 16, batch: int = 1):
    return latent(family, height, width, batch).mul(0)


def references(family, sizes=ONE, batch: int = 1, seed: int = 0) -> list:
    return [latent(family, *size, batch=batch, seed=seed + i) for i, size in enumerate(sizes)]


def conditioning(family, refs=(), method: str | None = None, seed: int = 0, tokens: int = 6, **values) -> list:
    """What CLIPTextEncode, ReferenceLatent and the method's node would make of a random prompt."""
    import node_helpers
    import torch
    from small_models import POOLED_WIDTH

    generator = torch.Generator().manual_seed(2000 + seed)
    text = torch.randn(1, tokens, family.text_width, generator=generator)
    values["pooled_output"] = torch.randn(1, POOLED_WIDTH, generator=generator)
    if refs:
        values["reference_latents"] = list(refs)
    if method or family.method:
        values["reference_latents_method"] = method or family.method
    if family.token_mask:
        values["attention_mask"] = torch.ones(1, tokens, dtype=torch.long)
    return node_helpers.conditioning_set_values([[text, {}]], values)


def sample(
    model, positive, negative=None, *, latent, steps, cfg=1.0, sampler="euler", scheduler="simple", seed=7, **others
):
    """The KSampler node's work."""
    import comfy.sample
    import torch

    noise = comfy.sample.prepare_noise(latent, seed)
    with torch.inference_mode():
        return comfy.sample.sample(
            model, noise, steps, cfg, sampler, scheduler, positive, positive if negative is None else negative, latent,
            disable_pbar=True, seed=seed, **others,
        )  # fmt: skip


def edit(family, inputs: dict, positive=None, negative=None, *, model=None, after=None, sizes=ONE, **sampling) -> dict:
    """One run through ToPi Patch, by the family's own layers unless `inputs` name others, and what it gave.

    Sigmas fall evenly unless `sampling` says otherwise, so that steps are reused behind more than one anchor: ComfyUI's
    schedulers leave most of the way to the last step of so few. `after` puts something on the patched model.
    """
    import torch
    from small_models import shared

    layers = {"layers": ",".join(map(str, family.layers)), "front_layers": family.front_layers}
    patched, trace = patch(shared(family) if model is None else model, **layers | inputs)
    if after is not None:
        patched = after(patched)
    if positive is None:
        positive = conditioning(family, references(family, sizes))
    sampling = {"latent": empty(family), "steps": 6} | sampling
    if not {"scheduler", "denoise", "start_step"} & sampling.keys():
        sampling["sigmas"] = torch.linspace(1, 0, sampling["steps"] + 1)
    made = sample(patched, positive, negative, **sampling)
    return told(made, trace.runs[-1])


def told(made, run) -> dict:
    """A row of what a run gave, whatever the names of its record's fields are by now."""
    kept = sorted((anchor.step, [row.nonzero().flatten().tolist() for row in anchor.kept]) for anchor in run.anchors)
    return {
        "latent": digest(made),
        "kinds": [step.kind for step in run.steps],
        "kept": [[step, digest(rows)] for step, rows in kept],
        "shares": [round(anchor.share, 6) for anchor in run.anchors],
        "layers": list(run.layers),
        "predicted": pack_module("topi_core.cost").speedup(run),
        "cache_bytes": run.cache_bytes,
        "forecast": getattr(run, "forecast", None),
        "no_room": getattr(run, "no_room", None),
        "reference_tokens": named(run, "context_tokens", "reference_tokens"),
        "steps": [
            {
                "index": step.index,
                "sigma": step.sigma,
                "kind": step.kind,
                "tokens": step.tokens,
                "keys": step.keys,
                "flops": named(step, "taken", "flops"),
                "full_flops": named(step, "full", "full_flops"),
            }
            for step in run.steps
        ],
    }


def named(thing, *names: str):
    """The attribute that has one of these names."""
    return next((getattr(thing, name) for name in names if hasattr(thing, name)), None)


def digest(value) -> str:
    """sha256 of a tensor's bytes, type and shape, or of a plain value."""
    import torch

    if isinstance(value, torch.Tensor):
        data = value.detach().cpu().contiguous()
        what = f"{data.dtype} {tuple(data.shape)} ".encode() + data.flatten().view(torch.uint8).numpy().tobytes()
    else:
        what = json.dumps(value).encode()
    return hashlib.sha256(what).hexdigest()


# --- the cases ---------------------------------------------------------------------------------------------------

Cases = Iterator[tuple[str, Callable[[], dict]]]


def cases() -> Cases:
    for part in (inputs, methods, guidance, prompts, samplers, others, caches, memory, compiled, calibrations, demo):
        for name, case in part():
            yield f"{part.__name__}: {name}", case


def inputs() -> Cases:
    from small_models import FAMILIES

    for family in FAMILIES:
        for name, (settings, sizes) in EVERYWHERE.items():
            schedule = {"scheduler": "simple", "steps": 8} if "schedule" in name or "window" in name else {}
            yield f"{family.name}, {name}", functools.partial(edit, family, settings, sizes=sizes, **schedule)


def methods() -> Cases:
    """Reference methods, and what else is special about a family's references."""
    from small_models import FAMILIES, FLUX1, KREA, QWEN, load, shared

    for family in FAMILIES:
        for number, method in enumerate(family.methods[1:]):
            for mode in MODES:
                positive = conditioning(family, references(family, TWO), method)
                more = {} if number % 2 else SOME
                yield (
                    f"{family.name}, {method}, {mode}",
                    functools.partial(edit, family, MODES[mode] | more, positive),
                )
    four = ((16, 16), (8, 20), (22, 12), (4, 6))
    for family, mode in ((FLUX1, "prune"), (QWEN, "reuse")):
        yield f"{family.name}, four references, {mode}", functools.partial(edit, family, MODES[mode], sizes=four)
    odd = ((15, 11), (9, 14))
    for family, mode in ((FLUX1, "reuse"), (QWEN, "prune")):
        start = empty(family, 13, 17)
        yield f"{family.name}, odd sizes, {mode}", functools.partial(edit, family, MODES[mode], sizes=odd, latent=start)
    for mode in MODES:
        model = functools.partial(load, QWEN, default_ref_method="index_timestep_zero")
        yield f"qwen_image, the model's own method, {mode}", lambda m=model, i=MODES[mode]: edit(QWEN, i, model=m())
        layered = functools.partial(load, QWEN, use_additional_t_cond=True, default_ref_method="negative_index")
        start = empty(QWEN).expand(-1, -1, 3, -1, -1).contiguous()
        yield (
            f"qwen_image, layered, {mode}",
            lambda m=layered, i=MODES[mode], s=start: edit(QWEN, i, model=m(), latent=s),
        )
    plain = [[text, {"pooled_output": v["pooled_output"]}] for text, v in conditioning(KREA)]
    plain[0][1]["reference_latents"] = references(KREA)
    yield "krea2, no method, no references", lambda: edit(KREA, REUSE, plain)

    def with_method():
        model = shared(KREA).clone()
        model.add_object_patch("diffusion_model.default_ref_method", "index")
        return edit(KREA, REUSE, plain, model=model)

    yield "krea2, the model's own method", with_method
    yield "flux1, without references", lambda: edit(FLUX1, PRUNE, conditioning(FLUX1))
    yield "flux1, one token", lambda: edit(FLUX1, PRUNE, sizes=((2, 2),))


def guidance() -> Cases:
    """Cond and uncond, batches, and calls in parts."""
    from small_models import FAMILIES, FLUX1, QWEN, ShortOfMemory, as_class, shared

    for number, family in enumerate(FAMILIES):
        for mode in MODES:
            refs = references(family, ONE if number % 2 else TWO, batch=2)
            positive, negative = conditioning(family, refs), conditioning(family, refs, seed=1, tokens=9)
            start = empty(family, batch=2)
            yield (
                f"{family.name}, batch of 2, cfg 3, a longer negative prompt, {mode}",
                functools.partial(edit, family, MODES[mode], positive, negative, cfg=3.0, latent=start, steps=5),
            )
            more = SOME if mode == "reuse" else {}
            positive, negative = conditioning(family, references(family, TWO)), conditioning(family, seed=1)
            yield (
                f"{family.name}, cfg 3, negative without references, {mode}",
                functools.partial(edit, family, MODES[mode] | more, positive, negative, cfg=3.0, steps=5),
            )
    for family in (FLUX1, QWEN):
        for mode in MODES:
            refs = references(family, TWO)
            positive, negative = conditioning(family, refs), conditioning(family, refs, seed=1)
            for cls in (ShortOfMemory, comes_and_goes()):
                yield (
                    f"{family.name}, {cls.__name__}, {mode}",
                    lambda f=family, c=cls, i=MODES[mode], p=positive, n=negative: edit(
                        f, i, p, n, model=as_class(c, shared(f)), cfg=2.5, steps=5
                    ),
                )
            other = conditioning(family, references(family, ((12, 12),), seed=5), seed=1)
            same = conditioning(family, references(family, TWO, seed=5), seed=1)
            for name, negative in (("other sizes", other), ("other references", same)):
                yield (
                    f"{family.name}, negative with {name}, {mode}",
                    functools.partial(edit, family, MODES[mode] | SOME, positive, negative, cfg=2.0, steps=5),
                )


@functools.cache
def comes_and_goes() -> type:
    from comfy.model_patcher import ModelPatcher

    class MemoryComesAndGoes(ModelPatcher):
        """Room for cond and uncond together only at every other step."""

        def get_free_memory(self, device):
            self.asked = getattr(self, "asked", 0) + 1
            return 0 if self.asked % 3 else super().get_free_memory(device)

    return MemoryComesAndGoes


def prompts() -> Cases:
    """Areas, several prompts, times, masks, tokens before the prompt's."""
    import torch
    from small_models import FLUX1, FLUX2, OMNI, QWEN, shared

    import nodes

    area = nodes.ConditioningSetArea().append
    for family in (FLUX1, FLUX2, OMNI):
        refs = references(family)
        side = 8 * 4 * family.patch
        (left,) = area(conditioning(family, refs, seed=1), side, side * 2, 0, 0, 1.0)
        (right,) = area(conditioning(family, refs, seed=2, tokens=9), side * 2, side, side, 0, 1.0)
        for mode in MODES:
            yield (
                f"{family.name}, areas, {mode}",
                functools.partial(edit, family, MODES[mode], conditioning(family, refs) + left + right),
            )
    for mode in MODES:
        for family in (FLUX1, QWEN):
            both = conditioning(family, references(family, seed=1)) + conditioning(family, references(family), seed=3)
            yield f"{family.name}, two prompts, {mode}", functools.partial(edit, family, MODES[mode], both)
        refs = references(FLUX1)
        first = conditioning(FLUX1, refs, end_percent=0.5)
        then = conditioning(FLUX1, refs, seed=4, start_percent=0.5)
        more = {"update_interval": 10}
        yield (
            f"flux1, a prompt that starts in mid-run, {mode}",
            functools.partial(edit, FLUX1, MODES[mode] | more, first + then, steps=8),
        )
        late = conditioning(FLUX1, references(FLUX1, seed=2), start_percent=0.51)
        yield (
            f"flux1, a reference that joins in mid-run, {mode}",
            functools.partial(edit, FLUX1, MODES[mode] | more, conditioning(FLUX1, refs) + late, steps=8),
        )
        for family in (FLUX1, FLUX2):
            tokens = family.text_tokens + 64 + 64 + 60
            generator = torch.Generator().manual_seed(3)
            mask = -2.0 * torch.rand(1, tokens, tokens, generator=generator)
            mask.masked_fill_(torch.rand(mask.shape, generator=generator) < 0.2, -1e4)
            positive = conditioning(
                family, references(family, TWO), attention_mask=mask, attention_mask_img_shape=(8, 8)
            )
            yield (
                f"{family.name}, a mask over everything, {mode}",
                functools.partial(edit, family, MODES[mode], positive),
            )
        mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
        positive = conditioning(QWEN, references(QWEN), attention_mask=mask)
        yield f"qwen_image, a mask of the text, {mode}", functools.partial(edit, QWEN, MODES[mode], positive)
        for family in (FLUX1, FLUX2, QWEN):
            yield (
                f"{family.name}, tokens before the prompt's, {mode}",
                lambda f=family, i=MODES[mode]: edit(f, i, model=with_more_text(shared(f))),
            )


def with_more_text(model):
    """As USO's style reference does."""
    import torch

    def post_input(args):
        more = torch.full_like(args["txt"][:, :5], 0.1)
        ids = args.get("txt_ids")
        changed = args | {"txt": torch.cat((more, args["txt"]), 1)}
        return changed if ids is None else changed | {"txt_ids": torch.cat((torch.zeros_like(ids[:, :5]), ids), 1)}

    model = model.clone()
    model.set_model_patch(post_input, "post_input")
    return model


def samplers() -> Cases:
    from small_models import FLUX1, JOY, KREA, MAGE, OMNI, QWEN

    two, even = {"update_interval": 2}, {"spacing": "steps"}
    for mode in MODES:
        for name in ("heun", "dpm_2", "euler_ancestral", "heunpp2", "dpmpp_sde"):
            yield f"flux1, {name}, {mode}", functools.partial(edit, FLUX1, MODES[mode] | two, sampler=name)
        for family, name in ((QWEN, "heun"), (KREA, "dpm_2"), (OMNI, "euler_ancestral")):
            yield (
                f"{family.name}, {name}, {mode}",
                functools.partial(edit, family, MODES[mode] | two | even, sampler=name, sizes=TWO, steps=4),
            )
        for family in (FLUX1, MAGE, JOY, OMNI):
            start = latent(family, seed=4)
            yield (
                f"{family.name}, denoise 0.6, {mode}",
                functools.partial(edit, family, MODES[mode] | two | even, latent=start, denoise=0.6),
            )
        yield f"flux1, beta, {mode}", functools.partial(edit, FLUX1, MODES[mode], scheduler="beta", steps=8)
        yield (
            f"flux1, a part of the schedule, {mode}",
            functools.partial(edit, FLUX1, MODES[mode] | two, steps=8, start_step=3, last_step=7),
        )


def others() -> Cases:
    """What else is put on a model."""
    import torch
    from small_models import BOOGU, FAMILIES, FLUX1, JOY, MAGE, QWEN, SmallControl, load, shared, with_lora

    def guided(family, inputs, model):
        refs = references(family)
        positive, negative = conditioning(family, refs), conditioning(family, refs, seed=1)
        return edit(family, inputs, positive, negative, model=model, cfg=2.0)

    for mode in MODES:
        for family in FAMILIES:
            if family.control:
                control = SmallControl(family, outputs=family not in (QWEN, MAGE))
                positive = conditioning(family, references(family), control=control)
                yield f"{family.name}, ControlNet, {mode}", functools.partial(edit, family, MODES[mode], positive)
            yield (
                f"{family.name}, bfloat16, {mode}",
                lambda f=family, i=MODES[mode]: edit(f, i, model=load(f, torch.bfloat16), steps=5),
            )
        for family in (FLUX1, QWEN, JOY, BOOGU):
            yield (
                f"{family.name}, LoRA, {mode}",
                lambda f=family, i=MODES[mode]: edit(f, i, model=with_lora(load(f)), sizes=TWO, steps=5),
            )
        for dtype in (torch.float16, torch.float8_e4m3fn):
            yield (
                f"flux1, {dtype}, {mode}",
                lambda t=dtype, i=MODES[mode]: edit(FLUX1, i, model=load(FLUX1, t), steps=5),
            )
        for node in ("SkipLayerGuidanceDiT", "SkipLayerGuidanceDiTSimple"):
            for name, layers in (("given layers", {}), ("layers that it finds", SEARCHED | SOME)):
                yield (
                    f"flux1, {node}, {name}, {mode}",
                    lambda n=node, i=MODES[mode] | layers: guided(
                        FLUX1,
                        i,
                        run_node(n, model=shared(FLUX1), double_layers="1", single_layers="0, 1", start_percent=0.2,
                                 end_percent=0.7)[0],
                    ),
                )  # fmt: skip
        for fuse in ("flat", "pyramid"):
            yield (
                f"flux1, context windows, {fuse}, {mode}",
                lambda i=MODES[mode], f=fuse: edit(FLUX1, i, sizes=((16, 24),), latent=empty(FLUX1, 16, 32),
                                                   after=lambda m: windows(m, f)),
            )  # fmt: skip
        yield f"flux1, another attention, {mode}", lambda i=MODES[mode]: edit(FLUX1, i, model=cooler(shared(FLUX1)))
        yield (
            f"flux1, twice in a row, {mode}",
            lambda i=MODES[mode]: edit(FLUX1, i, model=patch(shared(FLUX1), **PRUNE | HALF)[0]),
        )
        yield f"flux1, its second run, {mode}", lambda i=MODES[mode]: second_run(FLUX1, i)


def windows(model, fuse: str):
    from comfy.context_windows import ContextSchedules

    overlap = 0 if fuse == "flat" else 4
    return run_node(
        "ContextWindowsManual", model=model, context_length=16, context_overlap=overlap, dim=3, fuse_method=fuse,
        closed_loop=False, context_schedule=ContextSchedules.STATIC_STANDARD, context_stride=1,
        causal_window_fix=False,
    )[0]  # fmt: skip


def cooler(model):
    def override(func, q, k, v, heads, *args, **kwargs):
        return func(q * 0.9, k, v, heads, *args, **kwargs)

    model = model.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = override
    return model


def second_run(family, inputs: dict) -> dict:
    """After a run with another reference on the same patched model."""
    other = conditioning(family, references(family, TWO, seed=3))

    def after(model):
        sample(model, other, latent=empty(family), steps=3)
        return model

    return edit(family, inputs, after=after)


def caches() -> Cases:
    """ComfyUI's own, which skip steps, on either side of ToPi."""
    import torch
    from small_models import FLUX1, KREA, QWEN, load, shared

    settings = {"reuse_threshold": 1.2, "start_percent": 0.1, "end_percent": 0.95}

    def run(family, cache, order, inputs, dtype):
        model = shared(family) if dtype == torch.float32 else load(family, dtype)
        own = settings | ({"reuse_threshold": 2.0} if family is KREA else {})
        put = functools.partial(run_node, cache, **own)
        refs = references(family)
        prompts = conditioning(family, refs), conditioning(family, refs, seed=1)
        sampling = dict(cfg=1.5, steps=10)
        if order == "before":
            return edit(family, inputs, *prompts, model=put(model=model)[0], **sampling)
        return edit(family, inputs, *prompts, model=model, after=lambda m: put(model=m)[0], **sampling)

    for cache in ("EasyCache", "LazyCache"):
        rarely = {"update_interval": 5} if cache == "LazyCache" else {}  # it skips most steps
        for order in ("before", "after"):
            for mode in MODES:
                for family, dtype in ((FLUX1, torch.float32), (QWEN, torch.bfloat16), (KREA, torch.float32)):
                    if family is KREA and order == "before":
                        continue
                    yield (
                        f"{family.name}, {cache} {order}, {mode}",
                        functools.partial(run, family, cache, order, MODES[mode] | rarely, dtype),
                    )


def memory() -> Cases:
    """What becomes of the kept keys and values where there is no room for them."""
    import comfy.model_management as mm
    from comfy.model_patcher import ModelPatcher
    from small_models import FLUX1, HIDDEN, QWEN, as_class, shared

    size = 2 * FLUX1.depth * (FLUX1.text_tokens + 64) * HIDDEN * 4

    class RoomForNoForecast(ModelPatcher):
        def get_free_memory(self, device):
            return mm.minimum_inference_memory() + 1.2 * size

    @contextmanager
    def full():
        before = mm.EXTRA_RESERVED_VRAM
        try:
            mm.EXTRA_RESERVED_VRAM = 2**50
            yield
        finally:
            mm.EXTRA_RESERVED_VRAM = before

    def from_the_start(family):
        with full():
            return edit(family, REUSE)

    def from_step(family, step):
        filled = full()

        def fill(i, *_):
            if i == step:
                filled.__enter__()

        try:
            return edit(family, REUSE | {"spacing": "steps"}, callback=fill, steps=8)
        finally:
            filled.__exit__(None, None, None)

    for family in (FLUX1, QWEN):
        yield f"{family.name}, out of room", functools.partial(from_the_start, family)
        yield f"{family.name}, out of room in mid-run", functools.partial(from_step, family, 1)
    yield (
        "flux1, no room for a forecast",
        lambda: edit(FLUX1, REUSE | SOME, model=as_class(RoomForNoForecast, shared(FLUX1)), steps=8),
    )


def compiled() -> Cases:
    """TorchCompileModel with Dynamo's backend that generates no code."""
    import torch
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from small_models import FLUX1, KREA, load

    def compile_(model):
        model = model.clone()
        options = {"guard_filter_fn": lambda guards: ["transformer_options" not in guard.name for guard in guards]}
        set_torch_compile_wrapper(model, backend="eager", options=options)
        return model

    def run(family, order, inputs):
        torch._dynamo.reset()
        if order == "before":
            return edit(family, inputs, model=compile_(load(family)), steps=5)
        return edit(family, inputs, model=load(family), after=compile_, steps=5)

    for family, order, mode in ((FLUX1, "before", "prune"), (FLUX1, "after", "reuse"), (KREA, "before", "reuse")):
        yield f"{family.name}, {order}, {mode}", functools.partial(run, family, order, MODES[mode])


def calibrations() -> Cases:
    from small_models import FAMILIES, shared

    def run(family):
        model, calibrating = run_node("ToPiCalibrate", model=shared(family), top_m=3)
        refs = references(family, TWO, batch=2)
        positive, negative = conditioning(family, refs), conditioning(family, refs, seed=1)
        made = sample(model, positive, negative, latent=empty(family, batch=2), cfg=2.0, steps=2)
        found = calibrating.trace.runs[-1].calibration()
        return {
            "latent": digest(made),
            "kept": [digest(found.sensitivity), found.steps.tolist(), list(found.top(3))],
            "pairs": found.pairs.tolist(),
        }

    for family in FAMILIES:
        yield family.name, functools.partial(run, family)


def demo() -> Cases:
    """Held-out edits of the demo model, with the layers of its profile."""
    import torch

    objects = functools.cache(lambda: run_node("ToPiDemoModel"))

    def run(kind, inputs, count=1, easycache=None):
        from topi_demo.evaluate import edit, held_out

        model, clip, vae = objects()
        if easycache is not None:
            model = model.clone()
            model.set_model_compute_dtype(torch.bfloat16)
            model = run_node("EasyCache", model=model, reuse_threshold=easycache)[0]
        patched, trace = patch(model, **inputs)
        with torch.inference_mode():
            image = edit((patched, clip, vae), held_out(kind, count), 0, 8)
        return told(image, trace.runs[-1])

    prune = PRUNE | {"tau": 0.85, "update_interval": 4}
    for kind, name, inputs in (
        ("recolour", "prune", prune),
        ("night", "prune half", prune | HALF),
        ("put two", "prune", prune),
        ("winter", "prune with another front", prune | {"front_layers": 2}),
        ("recolour", "reuse 4", REUSE | {"update_interval": 4}),
        ("shift", "reuse 2 without text", REUSE | {"update_interval": 2, "reuse_text": False}),
        ("put two", "reuse 3", REUSE),
        ("put", "reuse 60%", REUSE | SOME),
        ("keep", "reuse 1", REUSE | {"update_interval": 1}),
    ):
        yield f"{kind}, {name}", functools.partial(run, kind, inputs)
    yield "move, prune, batch of 3", functools.partial(run, "move", prune, 3)
    yield "move, reuse, batch of 3", functools.partial(run, "move", REUSE, 3)
    yield "blur, EasyCache and reuse", functools.partial(run, "blur", REUSE, easycache=0.1)


# --- comparing ---------------------------------------------------------------------------------------------------


def compare(before: Path, after: Path) -> bool:
    """Prints what differs; whether all that counts is the same."""
    a, b = ({row["case"]: row for row in map(json.loads, path.read_text().splitlines())} for path in (before, after))
    wrong, notes = [], []
    for name in sorted(a.keys() ^ b.keys()):
        wrong.append(f"{name}: only in {before if name in a else after}")
    for name in (name for name in a if name in b):
        for key in sorted((a[name].keys() | b[name].keys()) - {"case"}):
            one, other = a[name].get(key), b[name].get(key)
            if one != other:
                (wrong if key in (*COUNT, "error") else notes).append(f"{name}: {key}: {_shown(one, other)}")
    both = a.keys() & b.keys()
    same = sum(a[name].get("latent") == b[name].get("latent") for name in both)
    print(f"{len(both)} runs in both, {same} latents the same; {len(wrong)} differences, {len(notes)} notes")
    for title, lines in (("Differences", wrong), ("Notes", notes)):
        if lines:
            print(f"\n{title}:", *lines, sep="\n  ")
    return not wrong


def _shown(one, other) -> str:
    """The values, or of two lists as long as each other the parts that differ."""
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return "; ".join(f"[{i}] {_shown(x, y)}" for i, (x, y) in enumerate(zip(one, other, strict=True)) if x != y)
    if isinstance(one, dict) and isinstance(other, dict):
        keys = [key for key in one.keys() | other.keys() if one.get(key) != other.get(key)]
        return ", ".join(f"{key} {_shown(one.get(key), other.get(key))}" for key in sorted(keys))
    return f"{str(one)[:80]} -> {str(other)[:80]}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.outputs", description=__doc__.splitlines()[0])
    parser.add_argument("--repo", type=Path, help="the checkout whose pack makes the runs")
    parser.add_argument("--out", type=Path, help="where its rows go")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("BEFORE", "AFTER"), help="rows of two")
    args = parser.parse_args()
    if args.compare:
        sys.exit(0 if compare(*args.compare) else 1)
    if not args.repo or not args.out:
        parser.error("--repo and --out, or --compare")
    base = Path(tempfile.mkdtemp(prefix="topi-golden-"))
    started, count, failed = time.monotonic(), 0, 0
    try:
        load(args.repo.resolve(), base)
        with args.out.open("w", encoding="utf-8") as file:
            for name, case in cases():
                if args.only not in name:
                    continue
                at = time.monotonic()
                try:
                    row = case()
                except Exception as error:
                    row, failed = {"error": f"{type(error).__name__}: {error}"}, failed + 1
                file.write(json.dumps({"case": name} | row) + "\n")
                file.flush()
                count += 1
                print(f"{count:4} {time.monotonic() - at:6.2f} s  {name}  {row.get('error', '')}", file=sys.stderr)
    finally:
        shutil.rmtree(base, ignore_errors=True)
    print(f"{count} runs in {time.monotonic() - started:.0f} s, {failed} of them with an error")


if __name__ == "__main__":
    main()
