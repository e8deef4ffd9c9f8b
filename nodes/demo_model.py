"""ToPi Demo Model: a small in-context editor that comes with the pack."""

from comfy_api.latest import io


class ToPiDemoModel(io.ComfyNode):
    """Loads `topi_demo` as MODEL, CLIP and VAE; see `comfy_model.py` there."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ToPiDemoModel", display_name="ToPi Demo Model", category="ToPi/demo",
            description="A small FLUX.1-like model that edits the pictures of ToPi Demo Scene, for trying ToPi without "
            "gigabytes of weights. Takes the place of the loaders in a FLUX.1 Kontext workflow.",
            inputs=[],
            outputs=[
                io.Model.Output(tooltip="The editing model; ToPi Patch comes next."),
                io.Clip.Output(tooltip="Knows the words of the demo's instructions, and refuses any other by name."),
                io.Vae.Output(tooltip="8 x 8 pixels to 16 channels, a fixed linear codec."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls) -> io.NodeOutput:
        from ..topi_demo.comfy_model import load

        return io.NodeOutput(*load())
