"""Takes the pictures of the help pages and of the template browser from the real page: `python -m tools.pictures`."""

from __future__ import annotations

import shutil
import tempfile
from io import BytesIO
from pathlib import Path

from PIL import Image

from topi_demo.server import running

from .page import PACK, Page, browser
from .setup import CHROMIUM

ROOT = Path(__file__).resolve().parents[1]
NODES = ("ToPiPatch", "ToPiMaskPreview", "ToPiReport", "ToPiCompare", "ToPiDemoModel", "ToPiDemoScene")
ADD_COMPARE = """
const compare = LiteGraph.createNode("ToPiCompare");
compare.pos = [2560, 60];
app.rootGraph.add(compare);
const [decoded, scene] = ["VAEDecode", "ToPiDemoScene"].map(topiTest.node);
decoded.connect(0, compare, 0);
scene.connect(1, compare, 1);
"""


def main() -> None:
    chromium = next(filter(None, map(shutil.which, CHROMIUM)))
    with tempfile.TemporaryDirectory() as folder, running(Path(folder, "log.txt"), PACK) as server:
        with browser(chromium, Path(folder, "profile"), height=1000) as context:
            page = Page(context.pages[0], server.address)
            page.open(vue=True)
            page.load_template(PACK, "topi_quickstart_demo")
            page.run(f"() => {{{ADD_COMPARE}}}")
            page.queue()
            for name in NODES:
                page.look_at(name)
                page.page.mouse.move(5, 500)
                page.page.wait_for_timeout(1500)
                node = page.page.locator(f"[data-node-id='{page.run('(type) => topiTest.node(type).id', name)}']")
                node.screenshot(path=ROOT / "web" / "docs" / f"{name}.jpg", quality=85, type="jpeg")
            frame = context.request.get(page.run("topiTest.images('ToPiMaskPreview')[0].src")).body()
            frame = Image.open(BytesIO(frame)).convert("RGB").resize((400, 400), Image.NEAREST)
            frame.save(ROOT / "workflows" / "topi_quickstart_demo.jpg", quality=85)


if __name__ == "__main__":
    main()
