"""ToPi Patch: the node between the model loader and the sampler."""

from __future__ import annotations

from comfy_api.latest import io

Trace = io.Custom("TOPI_TRACE")


class ToPiPatch(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ToPiPatch",
            display_name="ToPi Patch",
            category="ToPi",
            inputs=[
                io.Model.Input("model"),
                io.Float.Input("tau", default=0.85, min=0.0, max=1.0, step=0.01),
                io.Int.Input("update_interval", default=10, min=1, max=1000),
                io.Combo.Input("mode", options=["prune"], default="prune"),
                io.Combo.Input("profile", options=["auto"], default="auto"),
            ],
            outputs=[io.Model.Output(), Trace.Output("trace", display_name="trace")],
        )

    @classmethod
    def execute(cls, model, tau, update_interval, mode, profile) -> io.NodeOutput:
        return io.NodeOutput(model, None)
