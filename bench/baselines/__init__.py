"""What ToPi is compared with, on its own interface: by name, (nodes, model, **constants) -> (patched model, trace)."""

from collections.abc import Callable

from . import steps, tokens

BASELINES: dict[str, Callable[..., tuple]] = {**steps.BASELINES, **tokens.BASELINES}
