"""The pack's ComfyUI nodes, one file each."""

from comfy_api.latest import ComfyExtension, io

from .calibrate import ToPiCalibrate
from .compare import ToPiCompare
from .demo_model import ToPiDemoModel
from .demo_scene import ToPiDemoScene
from .mask_preview import ToPiMaskPreview
from .patch import ToPiPatch
from .report import ToPiReport
from .save_profile import ToPiSaveProfile
from .settings import ToPiSettings
from .support import profile_files


class ToPiExtension(ComfyExtension):
    async def on_load(self) -> None:
        profile_files.register()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        calibration, demo = [ToPiCalibrate, ToPiSaveProfile], [ToPiDemoModel, ToPiDemoScene]
        return [ToPiPatch, ToPiSettings, ToPiMaskPreview, ToPiReport, ToPiCompare, *calibration, *demo]
