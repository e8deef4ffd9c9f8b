"""ToPi Save Profile: adds a run's calibration to a profile of the user's, and draws it."""

import platform

import torch
from comfy_api.latest import io, ui
from comfyui_version import __version__

from ..topi_core import profiles
from ..topi_core.calibration import Calibration
from ..topi_core.config import Model
from ..topi_core.profiles import Profile
from ..topi_core.report import describe, headline
from .calibrate import Calibrating, CalibrationType
from .support import profile_files
from .support.chart import as_image, chart


class ToPiSaveProfile(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ToPiSaveProfile", display_name="ToPi Save Profile", category="ToPi/calibration",
            is_output_node=True,
            description="Adds what ToPi Calibrate heard to a profile in output/topi, which ToPi Patch can use, and "
            "shows the context sensitivity of every layer. Queue it for as many images and prompts as you like.",
            inputs=[
                CalibrationType.Input("calibration", tooltip="From ToPi Calibrate."),
                io.Latent.Input("latent", tooltip="The sampler's output: it says which run is meant."),
                io.String.Input("name", default="my-model",
                    tooltip="Name of the file in output/topi, perhaps with folders, as in flux/my-model."),
                io.Boolean.Input("merge", default=True,
                    tooltip="Add to the profile of this name; off: begin it anew with this run alone."),
            ],
            outputs=[
                io.Image.Output(display_name="plot", tooltip="Context sensitivity by layer, the chosen ones in gold."),
                io.String.Output(display_name="text", tooltip="The layers, and how much the pairs agree on them."),
            ],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, name, **_):
        """A profile that was deleted is written again, also when nothing else changed."""
        path = profile_files.target(name)
        return path.stat().st_mtime_ns if path.exists() else 0

    @classmethod
    def execute(cls, calibration: Calibrating, latent, name, merge) -> io.NodeOutput:
        path = profile_files.target(name)
        new = calibration.trace.find(latent["samples"]).calibration()
        before = profiles.read(path, path.name) if merge and path.exists() else None
        profile = merged(before, new, calibration.model, calibration.top_m, path.name)
        if profile is not before:
            profiles.write(profile, path)
        text, told = describe(profile), facts(profile)
        picture = as_image(chart(told["sensitivity"], told["deviation"], profile.layers, headline(profile)))
        shown = ui.PreviewImage(picture, cls=cls).as_dict()
        return io.NodeOutput(picture, text, ui=shown | {"text": (text,), "profile": (told,)})


def merged(before: Profile | None, new: Calibration, model: Model, top_m: int, name: str) -> Profile:
    """The profile of all pairs: `before` itself, where these were in it already."""
    if before is not None:
        before.check(model.family, model.depth, model.hidden)
        new = before.calibration.merge(new)
        if new.equals(before.calibration) and len(before.layers) == top_m:
            return before
    versions = {"comfyui": __version__, "torch": torch.__version__, "python": platform.python_version()}
    return Profile.calibrated(new, top_m, name=name, family=model.family, hidden=model.hidden, versions=versions)


def facts(profile: Profile) -> dict:
    """The profile in plain values, for the page and for programs that read the history."""
    return {
        "name": profile.name,
        "family": profile.family,
        "pairs": len(profile.calibration),
        "layers": list(profile.layers),
        "front_layers": profile.front_layers,
        "sensitivity": profile.calibration.mean().tolist(),
        "deviation": profile.calibration.deviation().tolist(),
        "agreement": list(profile.calibration.agreement(profile.layers)),
    }
