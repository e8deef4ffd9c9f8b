"""Puts savings of a benchmark on a model as ToPi Patch puts its own: same engine, same record, same cost model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any


def module_of(nodes: dict[str, type]):
    """The module of ToPi Patch as ComfyUI loaded it: from there its engine and its families are in reach."""
    return sys.modules[nodes["ToPiPatch"].__module__]


def attached(
    nodes: dict[str, type], model, make: Callable[..., Sequence], beside: bool = False, **settings: Any
) -> tuple:
    """The model with other savings in place of ToPi's, or `beside` and after them, and its trace -> (model, trace).

    make: (run, references, network, seed), as `nodes.engine.attach.Patch.savings` -> savings. settings: fields of
    `topi_core.config.Settings`; with the anchors of its `mode` unless they say otherwise.
    """
    node = module_of(nodes)
    core = node.__package__.rpartition(".")[0] + ".topi_core"
    config, trace = (import_module(f"{core}.{name}") for name in ("config", "trace"))
    network, chosen = model.get_model_object("diffusion_model"), config.Settings(**settings)
    family, record = node.family_of(network), trace.Trace()

    class Patch(node.Patch):
        def savings(self, *run):
            return [*(super().savings(*run) if beside else ()), *make(*run)]

    known = node.model_of(family, network, chosen.layers)
    return node.attach(model, Patch(family, known, chosen, record)), record
