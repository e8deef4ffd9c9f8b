"""A real ComfyUI in this process: its sampler, its nodes, and our pack loaded as it loads any custom node."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from topi_demo.runtime import use_comfyui

ROOT = Path(__file__).resolve().parent.parent.parent
EXTRA_NODES = ("context_windows", "easycache", "torch_compile", "custom_sampler", "edit_model", "flux", "slg")

pytest.register_assert_rewrite("oracle", "reuse_oracle", "sampling")
BASE = Path(tempfile.mkdtemp(prefix="topi-comfyui-"))  # models, user, input and output: never those of the installation
COMFYUI = use_comfyui(BASE)


def pytest_sessionfinish():
    shutil.rmtree(BASE, ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def comfyui() -> SimpleNamespace:
    """ComfyUI with the nodes these tests use; the pack is linked into `custom_nodes` under another name."""
    import folder_paths

    import nodes

    for folder in (folder_paths.models_dir, folder_paths.get_output_directory(), folder_paths.get_user_directory()):
        assert Path(folder).is_relative_to(BASE), f"the tests delete files, and {folder} is the installation's"
    pack = BASE / "custom_nodes" / "in-context.pruning 1"
    pack.parent.mkdir(parents=True, exist_ok=True)
    pack.symlink_to(ROOT, target_is_directory=True)

    async def load():
        for name in EXTRA_NODES:
            file = COMFYUI / "comfy_extras" / f"nodes_{name}.py"
            assert await nodes.load_custom_node(str(file), module_parent="comfy_extras"), name
        assert await nodes.load_custom_node(str(pack)), "ComfyUI could not load the pack"

    asyncio.run(load())
    return SimpleNamespace(nodes=nodes.NODE_CLASS_MAPPINGS, pack=pack, folder=COMFYUI)


@pytest.fixture(autouse=True)
def few_threads():
    """Small models are slower with many threads, and results do not depend on how many there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, 2))
    yield
    torch.set_num_threads(before)
