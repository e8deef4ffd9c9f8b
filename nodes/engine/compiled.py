"""Beside torch.compile: a model's blocks are compiled one by one, and what ToPi does around them stays Python.

TorchCompileModel compiles the network as a whole and leaves transformer_options out of its guards, so an anchor step
would be replayed for all others. A run with ToPi takes over how to compile, and gives each block a compiled forward for
the time of a call. The blocks share their code, so there are only a few lengths of the sequence to compile for.
"""

import logging
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers.torch_compile import COMPILE_KEY, TORCH_COMPILE_KWARGS
from torch import Tensor, nn
from torch._dynamo import lookup_backend

from .families.family import Block

log = logging.getLogger(__name__)

CUDA_GRAPHS = "reduce-overhead", "max-autotune"  # modes of torch.compile that record them
INNER = "topi_attention"
"""In transformer_options: the override that the attention of a compiled block is to call, or None."""


@dataclass
class Compiled:
    """The compiled forwards of one run, made as they are needed; how: arguments of torch.compile."""

    how: dict[str, Any]
    forwards: dict[nn.Module, Callable] = field(default_factory=dict)

    def enter(self, blocks: Iterable[Block], until: ExitStack) -> None:
        """Lets these blocks run compiled until `until` is closed."""
        for block in blocks:
            module = block.module
            if module not in self.forwards:
                self.forwards[module] = torch.compile(module.forward, **self.how)
            until.callback(_restore, module, vars(module).get("forward"))
            module.forward = self.forwards[module]


def _restore(module: nn.Module, forward: Callable | None) -> None:
    """Gives a module back what it had: its class's forward, or one that another pack put on it."""
    if forward is None:
        del module.forward
    else:
        module.forward = forward


def take_over(model_options: dict[str, Any], patcher: ModelPatcher) -> Compiled | None:
    """What ComfyUI's compiling was asked for, taken out of a run's options; RuntimeError where ToPi cannot work so."""
    network = patcher.get_model_object("diffusion_model")
    if any(hasattr(part, "_orig_mod") for part in (network, *patcher.object_patches.values())):
        raise RuntimeError(
            "ToPi cannot prune a network that was compiled outside of ComfyUI's own compiling: use TorchCompileModel "
            "in place of the node that did it, or bypass ToPi Patch"
        )
    around = model_options.get("transformer_options", {}).get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {})
    if not around.get(COMPILE_KEY):
        return None
    asked = model_options[TORCH_COMPILE_KWARGS]
    options = {name: value for name, value in (asked["options"] or {}).items() if name != "guard_filter_fn"}
    if asked["fullgraph"]:
        raise RuntimeError(
            "ToPi cannot prune a model that is compiled with fullgraph, as each attention is left to Python: turn "
            "fullgraph off, or bypass ToPi Patch"
        )
    if asked["backend"] == "cudagraphs" or asked["mode"] in CUDA_GRAPHS or options.get("triton.cudagraphs"):
        raise RuntimeError(
            "ToPi cannot prune a model that is compiled into CUDA graphs, which keep to one length of the sequence: "
            "choose the backend inductor and a mode without them, or bypass ToPi Patch"
        )
    del around[COMPILE_KEY]
    log.info("ToPi: the model's blocks are compiled one by one, in place of the whole model")
    how = {"mode": asked["mode"], "options": options or None, "dynamic": asked["dynamic"]}
    return Compiled(how | {"backend": Backend(asked["backend"])})


@dataclass(frozen=True)
class Backend:
    """A backend of torch.compile, which is another one to torch.

    It finds code again by its backend and guards, and must not find what was compiled for these blocks without ToPi.
    """

    backend: str | Callable

    def __call__(self, graph: torch.fx.GraphModule, inputs: list, **how) -> Any:
        if self.backend != "inductor":
            return lookup_backend(self.backend)(graph, inputs, **how)
        options = torch._inductor.list_mode_options(how.get("mode", "default")) | how.get("options", {})
        return torch._inductor.compile(graph, inputs, options=options)


@torch.compiler.disable
def isolated_attention(function: Callable, *rest, **kwargs) -> Tensor:
    """The one override that compiled code sees, so that its guards hold; it leaves the attention to Python."""
    inner = kwargs["transformer_options"][INNER]
    return function(*rest, **kwargs) if inner is None else inner(function, *rest, **kwargs)
