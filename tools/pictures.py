"""Takes the pictures of the help pages and of the template browser from the real page: `python -m tools.pictures`.

With names of nodes (`python -m tools.pictures ToPiCalibrate`), only those.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from io import BytesIO
from pathlib import Path

from PIL import Image

from topi_demo.server import running

from .page import PACK, Page, browser
from .setup import CHROMIUM

ROOT = Path(__file__).resolve().parents[1]
NODES = (
    "ToPiPatch",
    "ToPiMaskPreview",
    "ToPiReport",
    "ToPiCompare",
    "ToPiCalibrate",
    "ToPiSaveProfile",
    "ToPiDemoModel",
    "ToPiDemoScene",
)
ADD_COMPARE = """
const compare = LiteGraph.createNode("ToPiCompare");
compare.pos = [2560, 60];
app.rootGraph.add(compare);
const [decoded, scene] = ["VAEDecode", "ToPiDemoScene"].map(topiTest.node);
decoded.connect(0, compare, 0);
scene.connect(1, compare, 1);
"""
ADD_CALIBRATION = """
const [calibrate, sampler, save] = ["ToPiCalibrate", "KSampler", "ToPiSaveProfile"].map((type, i) => {
  const node = LiteGraph.createNode(type);
  node.pos = [2560 + 420 * i, 600];
  app.rootGraph.add(node);
  return node;
});
const first = topiTest.node("KSampler");
topiTest.node("ToPiDemoModel").connect(0, calibrate, 0);
calibrate.connect(0, sampler, 0);
for (const i of [1, 2, 3]) first.getInputNode(i).connect(first.getInputLink(i).origin_slot, sampler, i);
for (const widget of sampler.widgets) widget.value = first.widgets.find((other) => other.name === widget.name).value;
calibrate.connect(1, save, 0);
sampler.connect(0, save, 1);
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.pictures", description=__doc__.splitlines()[0])
    parser.add_argument("nodes", nargs="*", help=f"of {', '.join(NODES)}; without any, all of them")
    names = parser.parse_args().nodes
    chromium = next(filter(None, map(shutil.which, CHROMIUM)))
    with tempfile.TemporaryDirectory() as folder, running(Path(folder, "log.txt"), PACK) as server:
        with browser(chromium, Path(folder, "profile"), height=1000) as context:
            page = Page(context.pages[0], server.address)
            page.open(vue=True)
            page.load_template(PACK, "topi_quickstart_demo")
            page.run(f"() => {{{ADD_COMPARE} {ADD_CALIBRATION}}}")
            page.queue()
            for name in names or NODES:
                page.look_at(name)
                page.page.mouse.move(5, 500)
                page.page.wait_for_timeout(1500)
                node = page.page.locator(f"[data-node-id='{page.run('(type) => topiTest.node(type).id', name)}']")
                node.screenshot(path=ROOT / "web" / "docs" / f"{name}.jpg", quality=85, type="jpeg")
            if names:
                return
            frame = context.request.get(page.run("topiTest.images('ToPiMaskPreview')[0].src")).body()
            frame = Image.open(BytesIO(frame)).convert("RGB").resize((400, 400), Image.NEAREST)
            frame.save(ROOT / "workflows" / "topi_quickstart_demo.jpg", quality=85)


if __name__ == "__main__":
    main()
