"""ToPi Patch: the node between the model loader and the sampler."""

from __future__ import annotations

import logging
from dataclasses import replace

from comfy_api.latest import io

from ..topi_core import config
from ..topi_core.profiles import Profile, default_front_layers
from ..topi_core.settings import OWN_INTERVAL, LayerSettings, Settings
from ..topi_core.trace import Trace
from . import profile_files
from .attach import Patch, attach
from .events import announcer
from .families import family_of
from .settings import SettingsType

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
                io.Combo.Input(
                    "mode", options=list(config.MODES), default="reuse",
                    tooltip="reuse: between anchors no reference token is computed, the picture sees their keys and "
                    "values of the anchor; it takes memory, and on the demo model it is faster and closer to the "
                    "unpatched image. prune: the paper's method with its published settings; dropped tokens leave the "
                    "sequence until the next anchor.",
                ),
                io.Int.Input(
                    "update_interval", default=0, min=0, max=1000,
                    tooltip="Steps from one anchor to the next, on average; at an anchor everything is computed. 0: "
                    "the mode's own, 10 for prune and 5 for reuse. Higher is faster, lower is nearer to the unpatched "
                    "image. With prune they are evenly spaced, with reuse they stand where the noise level falls "
                    "most: see spacing of ToPi Settings.",
                ),
                io.Float.Input(
                    "tau", default=0.85, min=0.0, max=1.0, step=0.01,
                    tooltip="For prune: share of the references' influence that is kept. Lower is faster, and 1 gives "
                    "the unpatched image, bit for bit. Reuse, which keeps every token, does not use it.",
                ),
                SettingsType.Input(
                    "settings", optional=True,
                    tooltip="From ToPi Settings, which has what rarely needs changing. Without it that node's defaults "
                    "apply.",
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
    def fingerprint_inputs(cls, **inputs):
        """A profile of the user's that changed, came or went may mean other layers.

        ComfyUI asks this before anything runs, with None for what is connected. Then ToPi Settings knows which profile
        it is, and its own fingerprint makes ComfyUI run this node again as well.
        """
        return [] if "settings" in inputs else profile_files.state("auto")

    @classmethod
    def execute(cls, model, mode, update_interval, tau, settings: Settings | None = None) -> io.NodeOutput:
        known = settings or Settings()
        anchors = replace(known.anchors, update_interval=update_interval)
        chosen = replace(known, mode=mode, anchors=anchors, keep=replace(known.keep, tau=tau))
        network = model.get_model_object("diffusion_model")
        family = family_of(network)
        depth = len(family.blocks(network))
        profile = _profile(chosen.layers, family.name, depth, family.hidden(network))
        trace = Trace()
        node_id = cls.hidden.unique_id if cls.hidden else None  # none outside of a prompt
        patch = Patch(family, _for_model(chosen, depth, profile), trace, announcer(node_id))
        return io.NodeOutput(attach(model, patch), trace)


def _profile(layers: LayerSettings, family: str, depth: int, hidden: int) -> Profile | None:
    """The profile of a model, where one is asked for or needed, and there is one."""
    if layers.profile != "auto":
        found = profile_files.named(layers.profile, family, depth, hidden)
    elif layers.layers and layers.front_layers != -1:
        return None
    else:
        found = profile_files.automatic(family, depth, hidden)
    if found is not None:
        log.info("ToPi: profile %s (%s)", found.name, found.source)
    return found


def _for_model(settings: Settings, depth: int, profile: Profile | None) -> config.Settings:
    """The settings as the engine takes them, for a model of so many layers: reuse keeps every token that it may."""
    layers, anchors, keep, reuse = settings.layers, settings.anchors, settings.keep, settings.reuse
    front = default_front_layers(depth) if profile is None else profile.front_layers
    return config.Settings(
        depth=depth,
        layers=layers.layers or (() if profile is None else profile.layers),
        front_layers=front if layers.front_layers == -1 else layers.front_layers,
        profile="" if layers.layers or profile is None else profile.name,
        tau=1.0 if settings.mode == "reuse" else keep.tau,
        update_interval=anchors.update_interval or OWN_INTERVAL[settings.mode],
        mode=settings.mode,
        spacing=anchors.spacing,
        first_anchor=anchors.first_anchor,
        start_percent=anchors.start_percent,
        end_percent=anchors.end_percent,
        min_keep=keep.min_keep,
        max_keep=keep.max_keep,
        metric=keep.metric,
        forecast=reuse.forecast,
        reuse_text=reuse.reuse_text,
    )
