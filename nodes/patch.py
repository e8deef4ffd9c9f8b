"""ToPi Patch: the node between the model loader and the sampler."""

from __future__ import annotations

import logging
from typing import get_args

from comfy_api.latest import io

from ..topi_core.config import MODES, SPACINGS, Settings, parse_layers
from ..topi_core.influence import Metric
from ..topi_core.profiles import default_front_layers
from ..topi_core.trace import Trace
from . import profile_files
from .attach import Patch, attach
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
            description="Stops computing the reference images anew at every step: nearly the same edit, sooner.",
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="A model that edits by references, from its loader or LoRA: FLUX.1 Kontext, FLUX.2, "
                    "Qwen-Image-Edit, Mage-Flow, JoyImage, Krea 2, OmniGen2 or Boogu.",
                ),
                io.Float.Input(
                    "tau", default=1.0, min=0.0, max=1.0, step=0.01,
                    tooltip="Share of the references' influence that is kept. With reuse keep 1, all tokens: fewer "
                    "cost fidelity and save little. With prune lower is faster, 0.85 is a good start, and 1 gives the "
                    "unpatched image, bit for bit.",
                ),
                io.Int.Input(
                    "update_interval", default=5, min=1, max=1000,
                    tooltip="Steps from one anchor to the next, on average; at an anchor everything is computed. 5 in "
                    "20 steps are four anchors. Higher is faster, lower is nearer to the unpatched image. With prune "
                    "they are evenly spaced, with reuse they stand where the noise level falls most: see spacing.",
                ),
                io.Combo.Input(
                    "mode", options=list(MODES), default="reuse",
                    tooltip="reuse: between anchors no reference token is computed, the picture sees their keys and "
                    "values of the anchor; it takes memory, and on the demo model it is faster and closer to the "
                    "unpatched image. prune: dropped tokens leave the sequence until the next anchor, as in the paper.",
                ),
                io.Combo.Input(
                    "profile", options=["auto", *profile_files.names()], default="auto",
                    tooltip="Which layers tell what the model looks at: a shipped profile, or one of yours in "
                    "models/topi or output/topi. auto picks by what the model is; where none fits and tau is "
                    "below 1, the first anchor scores all layers and finds out.",
                ),
                io.String.Input(
                    "layers", default="", advanced=True,
                    tooltip='Representative layers, e.g. "13,18,31", in the whole stack. Empty: the profile\'s.',
                ),
                io.Int.Input(
                    "front_layers", default=-1, min=-1, max=200, advanced=True,
                    tooltip="For prune: the first layers that always see every token. -1: the profile's.",
                ),
                io.Int.Input(
                    "first_anchor", default=0, min=0, max=1000, advanced=True,
                    tooltip="The first anchor step; the steps before it run in full.",
                ),
                io.Float.Input(
                    "start_percent", default=0.0, min=0.0, max=1.0, step=0.01, advanced=True,
                    tooltip="Prune or reuse only from this part of the schedule on.",
                ),
                io.Float.Input(
                    "end_percent", default=1.0, min=0.0, max=1.0, step=0.01, advanced=True,
                    tooltip="Prune or reuse only up to this part of the schedule.",
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
                    tooltip="What a token is scored by. influence: the paper's score; attention, similarity: what its "
                    "ablations compare it with; random: a baseline of ours. It matters where tokens are dropped.",
                ),
                io.Combo.Input(
                    "spacing", options=list(SPACINGS), default="auto", advanced=True,
                    tooltip="steps: an anchor every update_interval steps. sigma: as many, placed so that the noise "
                    "level falls by the same amount from each to the next, and by half of it after the last. auto: "
                    "steps for prune, sigma for reuse.",
                ),
                io.Boolean.Input(
                    "forecast", default=True, advanced=True,
                    tooltip="For reuse: between anchors keys and values go on along the line through the last two "
                    "anchors, instead of standing still. Nearer to the unpatched image, for twice the memory.",
                ),
                io.Boolean.Input(
                    "reuse_text", default=True, advanced=True,
                    tooltip="For reuse: the prompt's tokens are reused like the references'. Faster, and on the demo "
                    "model nearly as close to the unpatched image.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The model with ToPi; connect it to the sampler."),
                TraceType.Output(
                    display_name="trace",
                    tooltip="What the runs kept; connect it to ToPi Mask Preview or ToPi Report.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, profile, **_):
        """A profile of the user's that changed, came or went may mean other layers."""
        return profile_files.state(profile)

    @classmethod
    def execute(
        cls, model, tau, update_interval, mode, profile,
        layers="", front_layers=-1, first_anchor=0, start_percent=0.0, end_percent=1.0,
        min_keep=0.0, max_keep=1.0, metric="influence", spacing="auto", forecast=True, reuse_text=True,
    ) -> io.NodeOutput:  # fmt: skip
        network = model.get_model_object("diffusion_model")
        family = family_of(network)
        depth = len(family.blocks(network))
        model_is = family.name, depth, family.hidden(network)
        by_hand = bool(layers.strip())
        if profile != "auto":
            chosen = profile_files.named(profile, *model_is)
        else:
            chosen = None if by_hand and front_layers != -1 else profile_files.automatic(*model_is)
        if chosen is None:
            known, front = (), default_front_layers(depth)
        else:
            known, front = chosen.layers, chosen.front_layers
            log.info("ToPi: profile %s (%s)", chosen.name, chosen.source)
        settings = Settings(
            depth=depth,
            layers=parse_layers(layers) if by_hand else known,
            front_layers=front if front_layers == -1 else front_layers,
            profile="" if by_hand or chosen is None else chosen.name,
            tau=tau,
            update_interval=update_interval,
            mode=mode,
            spacing=spacing,
            first_anchor=first_anchor,
            start_percent=start_percent,
            end_percent=end_percent,
            min_keep=min_keep,
            max_keep=max_keep,
            metric=metric,
            forecast=forecast,
            reuse_text=reuse_text,
        )
        trace = Trace()
        node_id = cls.hidden.unique_id if cls.hidden else None  # none outside of a prompt
        return io.NodeOutput(attach(model, Patch(family, settings, trace, announcer(node_id))), trace)
