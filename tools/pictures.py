"""Takes the help pages' pictures from the real page: `python -m tools.pictures` after a change of the views."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from topi_demo.server import running

from .page import PACK, Page, browser
from .setup import CHROMIUM

DOCS = Path(__file__).resolve().parents[1] / "web" / "docs"
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
                node.screenshot(path=DOCS / f"{name}.jpg", quality=85, type="jpeg")


if __name__ == "__main__":
    main()
