"""ToPi Settings: what ToPi Patch is told beside its own inputs."""

from __future__ import annotations

from comfy_api.latest import io

from ..topi_core.config import (
    SPACINGS,
    AnchorSettings,
    KeepSettings,
    LayerSettings,
    ReuseSettings,
    Settings,
    parse_layers,
)
from ..topi_core.influence import SCORERS
from .support import profile_files

SettingsType = io.Custom("TOPI_SETTINGS")


class ToPiSettings(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ToPiSettings",
            display_name="ToPi Settings",
            category="ToPi",
            description="x",
            inputs=[
                io.Combo.Input("profile", options=["auto", *profile_files.names()], default="auto"),
                io.String.Input("layers", default=""),
                io.Int.Input("front_layers", default=-1, min=-1, max=200),
                io.Int.Input("first_anchor", default=0, min=0, max=1000),
                io.Float.Input("start_percent", default=0.0, min=0.0, max=1.0, step=0.01),
                io.Float.Input("end_percent", default=1.0, min=0.0, max=1.0, step=0.01),
                io.Float.Input("min_keep", default=0.0, min=0.0, max=1.0, step=0.01),
                io.Float.Input("max_keep", default=1.0, min=0.0, max=1.0, step=0.01),
                io.Combo.Input("metric", options=list(SCORERS), default="influence"),
                io.Combo.Input("spacing", options=list(SPACINGS), default="auto"),
                io.Boolean.Input("forecast", default=True),
                io.Boolean.Input("reuse_text", default=True),
            ],
            outputs=[SettingsType.Output(display_name="settings")],
        )

    @classmethod
    def execute(
        cls,
        profile,
        layers,
        front_layers,
        first_anchor,
        start_percent,
        end_percent,
        min_keep,
        max_keep,
        metric,
        spacing,
        forecast,
        reuse_text,
    ) -> io.NodeOutput:
        return io.NodeOutput(
            Settings(
                layers=LayerSettings(profile=profile, layers=parse_layers(layers), front_layers=front_layers),
                anchors=AnchorSettings(
                    first_anchor=first_anchor, start_percent=start_percent, end_percent=end_percent, spacing=spacing
                ),
                keep=KeepSettings(min_keep=min_keep, max_keep=max_keep, metric=SCORERS[metric]),
                reuse=ReuseSettings(forecast=forecast, reuse_text=reuse_text),
            )
        )
