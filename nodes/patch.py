"""ToPi Patch: the node between the model loader and the sampler."""

import logging
from dataclasses import replace
from functools import partial

from comfy_api.latest import io
from torch import nn

from ..topi_core.config import MODES, TOLERANCE, LayerSettings, Model, Settings
from ..topi_core.profiles import default_front_layers
from ..topi_core.trace import Trace
from .engine.attach import Patch, attach
from .engine.families import family_of
from .engine.families.family import Family
from .settings import SettingsType
from .support import events, profile_files

TraceType = io.Custom("TOPI_TRACE")
log = logging.getLogger(__name__)


class ToPiPatch(io.ComfyNode):
    """Attaches ToPi to a clone of the model; see `engine/attach.py`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ToPiPatch", display_name="ToPi Patch", category="ToPi",
            description="Computes at each step only what has changed enough to matter: nearly the same edit, sooner.",
            inputs=[
                io.Model.Input("model",
                    tooltip="A model that edits by references, from its loader or LoRA: FLUX.1 Kontext, FLUX.2, "
                    "Qwen-Image-Edit, Mage-Flow, JoyImage, Krea 2, OmniGen2 or Boogu."),
                io.Combo.Input("mode", options=list(MODES), default="reuse",
                    tooltip="What becomes of the references between anchors. reuse: none of their tokens is computed, "
                    "the picture sees their keys and values of the anchor, which takes memory; in runs of 12 steps "
                    "and more skipping alone does better, and nothing is reused. prune: tokens of little influence "
                    "leave the sequence; with a tolerance of 0 it is the paper's method with its published settings."),
                io.Int.Input("update_interval", default=0, min=0, max=1000,
                    tooltip="Computed steps from one anchor to the next; at an anchor everything is computed, and "
                    "steps that are skipped do not count. 0: the mode's own, 10 for prune, and for reuse 2 after a "
                    "quarter of the steps in full. Higher is faster, lower is nearer to the unpatched image."),
                io.Float.Input("tolerance", default=TOLERANCE, min=0.0, max=1.0, step=0.005,
                    tooltip="The error that skipping a step may add to the picture, as a share of what the picture "
                    "holds by then. A step is skipped where the model's course can be extrapolated as well as that; "
                    "easy edits get fewer computed steps, hard ones more. Higher is faster; 0 computes every step, "
                    "and with mode prune is the paper's method."),
                io.Float.Input("tau", default=0.85, min=0.0, max=1.0, step=0.01,
                    tooltip="For prune: share of the references' influence that is kept. Lower is faster; 1, with a "
                    "tolerance of 0, gives the unpatched image, bit for bit. Reuse does not use it."),
                SettingsType.Input("settings", optional=True,
                    tooltip="From ToPi Settings, which has what rarely needs changing. Without it that node's defaults "
                    "apply."),
            ],
            outputs=[
                io.Model.Output(tooltip="The model with ToPi; connect it to the sampler."),
                TraceType.Output(display_name="trace",
                    tooltip="What the runs kept; connect it to ToPi Mask Preview or ToPi Report."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, **inputs):
        """A profile of the user's that changed, came or went may mean other layers; ToPi Settings looks by itself."""
        return [] if "settings" in inputs else profile_files.state("auto")

    @classmethod
    def execute(cls, model, mode, update_interval, tolerance, tau, settings: Settings | None = None) -> io.NodeOutput:
        settings = settings or Settings()
        anchors, keep = replace(settings.anchors, update_interval=update_interval), replace(settings.keep, tau=tau)
        settings = replace(settings, mode=mode, tolerance=tolerance, anchors=anchors, keep=keep)
        network = model.get_model_object("diffusion_model")
        family, trace = family_of(network), Trace()
        known = model_of(family, network, settings.layers)
        node_id = cls.hidden.unique_id if cls.hidden else None  # none outside of a prompt
        on_anchor = None if node_id is None else partial(events.announce, node_id)
        return io.NodeOutput(attach(model, Patch(family, known, settings, trace, on_anchor, events.watched)), trace)


def model_of(family: Family, network: nn.Module, s: LayerSettings) -> Model:
    """The model with its representative layers: as they were typed, or those of the profile that is asked for."""
    depth, hidden = len(family.blocks(network)), family.hidden(network)
    if s.profile != "auto":
        chosen = profile_files.named(s.profile, family.name, depth, hidden)
    else:
        by_hand = s.layers and s.front_layers != -1
        chosen = None if by_hand else profile_files.automatic(family.name, depth, hidden)
    if chosen is not None:
        log.info("ToPi: profile %s (%s)", chosen.name, chosen.source)
    front = default_front_layers(depth) if chosen is None else chosen.front_layers
    return Model(
        family=family.name,
        depth=depth,
        hidden=hidden,
        linear=family.linear,
        layers=s.layers or (chosen.layers if chosen else ()),
        front_layers=front if s.front_layers == -1 else s.front_layers,
        profile=chosen.name if chosen and not s.layers else "",
    )
