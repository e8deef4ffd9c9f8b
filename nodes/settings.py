"""ToPi Settings: what rarely needs changing in ToPi Patch, in a node of its own."""

from comfy_api.latest import io

from ..topi_core import config
from ..topi_core.influence import SCORERS
from .support import profile_files

SettingsType = io.Custom("TOPI_SETTINGS")


class ToPiSettings(io.ComfyNode):
    """Its mode, update_interval, tolerance and tau are defaults: ToPi Patch puts its own in their place."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ToPiSettings", display_name="ToPi Settings", category="ToPi",
            description="The settings of ToPi Patch that rarely need changing: its layers, where its anchors stand, "
            "how many tokens are kept. With the defaults it changes nothing.",
            inputs=[
                io.Combo.Input("profile", options=["auto", *profile_files.names()], default="auto",
                    tooltip="Which layers tell what the model looks at: a shipped profile, or one of yours in "
                    "models/topi or output/topi. auto picks by what the model is; where none fits and tokens are "
                    "dropped, the first anchor scores all layers and finds out."),
                io.String.Input("layers", default="",
                    tooltip='Representative layers, e.g. "13,18,31", in the whole stack. Empty: the profile\'s.'),
                io.Int.Input("front_layers", default=-1, min=-1, max=200,
                    tooltip="For prune: the first layers that always see every token. -1: the profile's."),
                io.Int.Input("first_anchor", default=0, min=0, max=1000,
                    tooltip="The first anchor step; those before it that are computed run in full. 0: the first step, "
                    "and for reuse with an update_interval of 0 the end of the first quarter."),
                io.Float.Input("start_percent", default=0.0, min=0.0, max=1.0, step=0.01,
                    tooltip="Prune, reuse or skip only from this part of the schedule on."),
                io.Float.Input("end_percent", default=1.0, min=0.0, max=1.0, step=0.01,
                    tooltip="Prune, reuse or skip only up to this part of the schedule."),
                io.Float.Input("min_keep", default=0.0, min=0.0, max=1.0, step=0.01,
                    tooltip="Prune keeps at least this fraction of the tokens. Equal to max_keep: a fixed ratio."),
                io.Float.Input("max_keep", default=1.0, min=0.0, max=1.0, step=0.01,
                    tooltip="Keep at most this fraction of the tokens, whatever tau says. With reuse too: fewer keys "
                    "and values are kept, which costs fidelity and saves hardly any time."),
                io.Combo.Input("metric", options=list(SCORERS), default="influence",
                    tooltip="What a token is scored by. influence: the paper's score; attention: the attention alone, "
                    "which its ablations compare it with. It matters where tokens are dropped."),
                io.Combo.Input("spacing", options=list(config.SPACINGS), default="auto",
                    tooltip="For a tolerance of 0. steps (auto): an anchor every update_interval steps. sigma: as "
                    "many, placed so that the noise level falls by the same amount from each to the next, and by half "
                    "of it after the last."),
                io.Boolean.Input("forecast", default=True,
                    tooltip="For reuse: between anchors keys and values go on along the line through the last two "
                    "anchors, instead of standing still. Nearer to the unpatched image, for twice the memory."),
                io.Boolean.Input("reuse_text", default=False,
                    tooltip="For reuse: the prompt's tokens are reused like the references'. A little faster, and "
                    "further from the unpatched image where the edit's outcome is open."),
            ],
            outputs=[SettingsType.Output(display_name="settings", tooltip="Connect it to ToPi Patch.")],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, profile, **_):
        """A profile of the user's that changed, came or went: ToPi Patch, which reads it, has to run again."""
        return profile_files.state(profile)

    @classmethod
    def execute(
        cls, profile, layers, front_layers, first_anchor, start_percent, end_percent, min_keep, max_keep, metric,
        spacing, forecast, reuse_text,
    ) -> io.NodeOutput:  # fmt: skip
        config.one_of("metric", metric, tuple(SCORERS))
        window = {"first_anchor": first_anchor, "start_percent": start_percent, "end_percent": end_percent}
        settings = config.Settings(
            layers=config.LayerSettings(profile=profile, layers=config.parse_layers(layers), front_layers=front_layers),
            anchors=config.AnchorSettings(**window, spacing=spacing),
            keep=config.KeepSettings(min_keep=min_keep, max_keep=max_keep, metric=SCORERS[metric]),
            reuse=config.ReuseSettings(forecast=forecast, reuse_text=reuse_text),
        )
        return io.NodeOutput(settings)
