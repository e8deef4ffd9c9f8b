"""What ToPi is compared with, on its own interface."""

from collections.abc import Callable

from . import steps

BASELINES: dict[str, Callable[..., tuple]] = {**steps.BASELINES}
"""Name -> (ComfyUI's nodes, model, **constants) -> (patched model, trace)."""
