"""The pack's ComfyUI nodes, one file each."""

from comfy_api.latest import ComfyExtension, io

from .demo_model import ToPiDemoModel
from .demo_scene import ToPiDemoScene
from .patch import ToPiPatch


class ToPiExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [ToPiPatch, ToPiDemoModel, ToPiDemoScene]
