"""ToPi Patch: the node between the model loader and the sampler."""

from __future__ import annotations

import logging
from typing import get_args

from comfy_api.latest import io

from ..topi_core import profiles
from ..topi_core.config import MODES, Settings, parse_layers
from ..topi_core.influence import Metric
from ..topi_core.trace import Trace
from .attach import attach
from .events import announcer
from .families import family_of

TraceType = io.Custom("TOPI_TRACE")
log = logging.getLogger(__name__)


class ToPiPatch(io.ComfyNode):
    """Attaches ToPi to a clone of the model; see `attach.py`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ToPiPatch",
            display_name="ToPi Patch",
            category="ToPi",
            description="Drops the reference tokens that the model does not look at: the same edit, sooner.",
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="A model that edits by references, from its loader or LoRA: FLUX.1 Kontext, FLUX.2, "
                    "Qwen-Image-Edit, Mage-Flow, JoyImage, Krea 2, OmniGen2 or Boogu.",
                ),
                io.Float.Input(
                    "tau", default=0.85, min=0.0, max=1.0, step=0.01,
                    tooltip="Share of the references' influence that is kept. Lower is faster; 1 keeps every token and "
                    "gives the unpatched image, bit for bit.",
                ),
                io.Int.Input(
                    "update_interval", default=10, min=1, max=1000,
                    tooltip="Steps from one anchor to the next. At an anchor the full context runs and the tokens are "
                    "chosen anew.",
                ),
                io.Combo.Input(
                    "mode", options=list(MODES), default="prune",
                    tooltip="prune: dropped tokens leave the sequence until the next anchor, as in the paper.",
                ),
                io.Combo.Input(
                    "profile", options=["auto", *profiles.shipped()], default="auto",
                    tooltip="Which layers tell what the model looks at. auto picks by the model's family and depth.",
                ),
                io.String.Input(
                    "layers", default="", advanced=True,
                    tooltip='Representative layers, e.g. "13,18,31", in the whole stack. Empty: the profile\'s.',
                ),
                io.Int.Input(
                    "front_layers", default=-1, min=-1, max=200, advanced=True,
                    tooltip="The first layers that always see every token. -1: the profile's.",
                ),
                io.Int.Input(
                    "first_anchor", default=0, min=0, max=1000, advanced=True,
                    tooltip="The first anchor step; the steps before it run in full.",
                ),
                io.Float.Input(
                    "start_percent", default=0.0, min=0.0, max=1.0, step=0.01, advanced=True,
                    tooltip="Prune only from this part of the schedule on.",
                ),
                io.Float.Input(
                    "end_percent", default=1.0, min=0.0, max=1.0, step=0.01, advanced=True,
                    tooltip="Prune only up to this part of the schedule.",
                ),
                io.Float.Input(
                    "min_keep", default=0.0, min=0.0, max=1.0, step=0.01, advanced=True,
                    tooltip="Keep at least this fraction of the tokens. Equal to max_keep: a fixed ratio.",
                ),
                io.Float.Input(
                    "max_keep", default=1.0, min=0.0, max=1.0, step=0.01, advanced=True,
                    tooltip="Keep at most this fraction of the tokens.",
                ),
                io.Combo.Input(
                    "metric", options=list(get_args(Metric)), default="influence", advanced=True,
                    tooltip="What a token is scored by: the paper's influence, or what its ablations compare it with.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The model with ToPi; connect it to the sampler."),
                TraceType.Output(display_name="trace", tooltip="What the runs kept; connect it to ToPi Mask Preview."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, tau, update_interval, mode, profile,
        layers="", front_layers=-1, first_anchor=0, start_percent=0.0, end_percent=1.0,
        min_keep=0.0, max_keep=1.0, metric="influence",
    ) -> io.NodeOutput:  # fmt: skip
        network = model.get_model_object("diffusion_model")
        family = family_of(network)
        depth = len(family.blocks(network))
        if profile == "auto":
            chosen, guess = profiles.automatic(family.name, depth)
            if guess and not (layers and front_layers >= 0):
                log.warning(
                    "ToPi: no layers are known for %s with %d layers; as a guess it takes those of %s at the same "
                    "relative depth: layers %s, front_layers %d",
                    family.label, depth, chosen.name, ",".join(map(str, chosen.layers)), chosen.front_layers,
                )  # fmt: skip
        else:
            chosen = profiles.named(profile, family.name, depth)
        settings = Settings(
            depth=depth,
            layers=parse_layers(layers) if layers.strip() else chosen.layers,
            front_layers=chosen.front_layers if front_layers == -1 else front_layers,
            tau=tau,
            update_interval=update_interval,
            mode=mode,
            first_anchor=first_anchor,
            start_percent=start_percent,
            end_percent=end_percent,
            min_keep=min_keep,
            max_keep=max_keep,
            metric=metric,
        )
        trace = Trace()
        node_id = cls.hidden.unique_id if cls.hidden else None  # none outside of a prompt
        return io.NodeOutput(attach(model, family, settings, trace, announcer(node_id)), trace)
