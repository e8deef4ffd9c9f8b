"""ToPi Calibrate: listens to every layer while the user's own sampling runs, and changes nothing about it."""

import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..topi_core.calibration import TOP_M, Listening
from ..topi_core.config import AnchorSettings, Model, Settings
from ..topi_core.savings.listen import Listen
from ..topi_core.trace import Trace
from .engine.attach import Patch, attach
from .engine.families import family_of
from .engine.run import Engine

CalibrationType = io.Custom("TOPI_CALIBRATION")


@dataclass(frozen=True)
class Calibrating:
    """What ToPi Calibrate hands to ToPi Save Profile: the model, and what its runs tell."""

    model: Model
    top_m: int
    trace: Trace[Listening] = field(default_factory=lambda: Trace(node="ToPi Calibrate"))


class ToPiCalibrate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ToPiCalibrate", display_name="ToPi Calibrate", category="ToPi/calibration",
            description="Finds out in which layers a model looks at its references, while it edits as ever: the images "
            "stay the same bit for bit, and take longer. ToPi Save Profile keeps the result.",
            inputs=[
                io.Model.Input("model", tooltip="The model to calibrate, from its loader or LoRA, without ToPi Patch."),
                io.Int.Input("top_m", default=TOP_M, min=1, max=200,
                    tooltip="How many layers the profile shall name; the paper takes 3."),
            ],
            outputs=[
                io.Model.Output(tooltip="The model that listens; connect it to the sampler."),
                CalibrationType.Output(display_name="calibration", tooltip="Connect it to ToPi Save Profile."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, top_m) -> io.NodeOutput:
        network = model.get_model_object("diffusion_model")
        family = family_of(network)
        depth = len(family.blocks(network))
        if not 1 <= top_m <= depth:
            raise ValueError(f"top_m must be in [1, {depth}] for this model of {depth} layers, got {top_m}")
        known = Model(family=family.name, depth=depth, hidden=family.hidden(network))
        calibrating = Calibrating(known, top_m)
        every_step = Settings(anchors=AnchorSettings(update_interval=1, spacing="steps"))
        return io.NodeOutput(attach(model, Calibrator(family, known, every_step, calibrating.trace)), calibrating)


class Calibrator(Patch):
    """The same wrappers: every call with references is an anchor, and all that is done there is to listen."""

    def savings(self, *_) -> list:
        return []  # who listens is made with what the run samples

    def engine(self, guider, arguments: dict[str, Any]) -> Engine:
        engine = super().engine(guider, arguments)
        noise = arguments["noise"]
        asked = {"noise": noise, "positive": guider.conds.get("positive"), "latent": arguments.get("latent_image")}
        pairs = tuple(fingerprint(asked, image, engine.images) for image in range(engine.images))
        engine.record = Listening(self.model.depth, pairs)
        engine.savings = [Listen(engine.record)]
        return engine


def fingerprint(value, image: int, images: int) -> int:
    """64 bits of what one image of a batch was made from: tensors, numbers and words, in whatever they lie."""
    digest = hashlib.blake2b(digest_size=8)

    def add(value) -> None:
        if isinstance(value, Tensor):
            own = value[image : image + 1] if value.ndim and len(value) == images else value
            digest.update(f"{own.dtype} {tuple(own.shape)}".encode())
            digest.update(own.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(value, (list, tuple)):
            for part in value:
                add(part)
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                digest.update(str(key).encode())
                add(value[key])
        elif isinstance(value, (str, int, float)):
            digest.update(repr(value).encode())

    add(value)
    return int.from_bytes(digest.digest(), "big", signed=True)
