"""ToPi Demo Scene: a picture that the demo model can edit, and what the edit should give."""

import random
import re

import torch
from comfy_api.latest import io

from ..topi_demo import edits

SIZE = 128


class ToPiDemoScene(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        sentences = "; ".join(sentence for _, sentence in edits.GRAMMAR.values())
        sentences = re.sub(r"{(\w+)}", lambda slot: slot[1].upper(), sentences)  # the page's translations eat braces
        return io.Schema(
            node_id="ToPiDemoScene", display_name="ToPi Demo Scene", category="ToPi/demo",
            description=f"Draws a random scene that the instruction fits, and the exact image that it asks for. "
            f"Instructions: {sentences}.",
            inputs=[
                io.Int.Input("seed", default=0, min=0, max=2**63 - 1, control_after_generate=True,
                    tooltip="Which scene: the same seed and instruction always draw the same one."),
                io.String.Input("instruction", default="make it night",
                    tooltip="The edit; the scene is chosen so that it can be applied. Give the same words to the text "
                    "encoder."),
            ],
            outputs=[
                io.Image.Output(display_name="image",
                    tooltip="The reference images: one, or two or three where the instruction speaks of them."),
                io.Image.Output(display_name="expected", tooltip="What a perfect edit would give."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, seed: int, instruction: str) -> io.NodeOutput:
        example = edits.example(random.Random(f"demo {seed}"), edits.parse(instruction), SIZE)
        references, expected = torch.stack(example.references), example.expected[None]
        return io.NodeOutput(references.movedim(1, -1), expected.movedim(1, -1).contiguous())
