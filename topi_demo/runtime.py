"""Makes the real ComfyUI importable outside its server: for training, evaluation, benchmarks and tests."""

from __future__ import annotations

import asyncio
import os
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

VERSION = "0.30.0"
PACK = Path(__file__).resolve().parent.parent


def comfyui_dir() -> Path:
    """`COMFYUI_DIR`, or the installation that `make setup` made in the repository."""
    default = PACK / ".comfyui" / VERSION
    folder = Path(os.environ.get("COMFYUI_DIR") or default)
    if not (folder / "comfy" / "ldm").is_dir():
        raise FileNotFoundError(f"there is no ComfyUI in {folder}; run `make setup`, or set COMFYUI_DIR to one")
    return folder


def use_comfyui(base_directory: Path | None = None) -> Path:
    """Put ComfyUI on the path, on the CPU where torch finds no GPU; returns its folder.

    base_directory: for models, user, input, output and temporary files in place of the installation's own.
    """
    folder = comfyui_dir()
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    import comfy.cli_args
    import torch

    if base_directory is not None:  # read when `folder_paths` is imported, which the next line does
        comfy.cli_args.args.base_directory = str(base_directory)
    import utils.extra_config  # noqa: F401 (first, as main.py does: older `nodes` put comfy/, with a `utils.py`, in front)

    if not torch.cuda.is_available():
        comfy.cli_args.args.cpu = True
    return folder


def load_pack() -> tuple[dict[str, type], ModuleType]:
    """The nodes of ComfyUI and this pack in this process, and the package of the pack's nodes as ComfyUI names it."""
    use_comfyui()
    import nodes

    known = nodes.NODE_CLASS_MAPPINGS
    if "ToPiPatch" not in known:
        asyncio.run(nodes.load_custom_node(str(PACK)))
    return known, sys.modules[known["ToPiPatch"].__module__.rpartition(".")[0]]


def patch(nodes: dict[str, type], model, scorer=None, **inputs) -> tuple:
    """ToPi Patch, with ToPi Settings before it -> (model, trace).

    nodes: ComfyUI's, by name. Each input goes to the one of the two that has it; for the others their defaults count.
    A scorer that no node offers stands in place of the metric.
    """
    defaults = {
        name: {field.id: field.default for field in nodes[name].GET_SCHEMA().inputs if hasattr(field, "default")}
        for name in ("ToPiPatch", "ToPiSettings")
    }
    unknown = sorted(set(inputs).difference(*defaults.values()))
    if unknown:
        raise TypeError(f"neither ToPi Patch nor ToPi Settings has an input {', '.join(unknown)}")
    own, more = ({id_: inputs.get(id_, value) for id_, value in known.items()} for known in defaults.values())
    (settings,) = nodes["ToPiSettings"].execute(**more).result
    if scorer is not None:
        settings = replace(settings, keep=replace(settings.keep, metric=scorer))
    return nodes["ToPiPatch"].execute(model=model, settings=settings, **own).result


def draw_chart(*values):
    """The pack's `nodes/support/chart.py`, reached as a file: outside of ComfyUI the pack is no package."""
    return runpy.run_path(str(PACK / "nodes" / "support" / "chart.py"))["chart"](*values)
