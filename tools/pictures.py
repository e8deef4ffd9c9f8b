"""Takes the pictures of the help pages and of the template browser from the real page: `python -m tools.pictures`.

With names of nodes (`python -m tools.pictures ToPiCalibrate`), only those.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from io import BytesIO
from pathlib import Path

from PIL import Image

from topi_demo.runtime import comfyui_dir
from topi_demo.server import Server, running

from .page import PACK_NAME, Page, browser
from .setup import CHROMIUM

ROOT = Path(__file__).resolve().parents[1]
NODES = (
    "ToPiPatch",
    "ToPiSettings",
    "ToPiMaskPreview",
    "ToPiReport",
    "ToPiCompare",
    "ToPiCalibrate",
    "ToPiSaveProfile",
    "ToPiDemoModel",
    "ToPiDemoScene",
)
CALIBRATING = ("ToPiCalibrate", "ToPiSaveProfile")  # last, as their profile would be ToPi Patch's own from then on
QUICKSTART, CALIBRATE = "topi_quickstart_demo", "topi_calibrate"
WORKFLOWS = ROOT / "workflows"
THUMBNAIL = (640, 400)
LARGE = {"width": 1600, "height": 1000}
SHOW_GROUPS = """
([width, height, titles]) => {
  const groups = app.rootGraph.groups.filter((group) => !titles || titles.includes(group.title));
  const boxes = groups.map(({ pos, size }) => [...pos, pos[0] + size[0], pos[1] + size[1]]);
  const [left, top] = [0, 1].map((i) => Math.min(...boxes.map((box) => box[i])) - 20);
  const [right, bottom] = [2, 3].map((i) => Math.max(...boxes.map((box) => box[i])) + 20);
  const scale = Math.min(width / (right - left), height / (bottom - top));
  app.canvas.ds.scale = scale;
  app.canvas.ds.offset = [(width / scale - right - left) / 2, (height / scale - bottom - top) / 2];
  app.canvas.setDirty(true, true);
  const [x, y] = [left + app.canvas.ds.offset[0], top + app.canvas.ds.offset[1]];
  return { x: x * scale, y: y * scale, width: (right - left) * scale, height: (bottom - top) * scale };
}
"""
ADD_SETTINGS = """
const settings = LiteGraph.createNode("ToPiSettings");
settings.pos = [3080, 60];
app.rootGraph.add(settings);
settings.connect(0, topiTest.node("ToPiPatch"), "settings");
"""
ADD_COMPARE = """
const compare = LiteGraph.createNode("ToPiCompare");
compare.pos = [2640, 60];
app.rootGraph.add(compare);
const [decoded, scene] = ["VAEDecode", "ToPiDemoScene"].map(topiTest.node);
decoded.connect(0, compare, 0);
scene.connect(1, compare, 1);
"""
ADD_CALIBRATION = """
const [calibrate, sampler, save] = ["ToPiCalibrate", "KSampler", "ToPiSaveProfile"].map((type, i) => {
  const node = LiteGraph.createNode(type);
  node.pos = [2640 + 420 * i, 600];
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
    with tempfile.TemporaryDirectory() as folder, running(Path(folder, "log.txt"), PACK_NAME) as server:
        pretend_to_have_models(server)
        with browser(chromium, Path(folder, "profile"), height=1000) as context:
            if not names:
                quickstart(Page(context.new_page(), server.address))  # before there is a profile of one pair
            page = Page(context.pages[0], server.address)
            page.open(vue=True)
            page.load_template("topi_quickstart_demo")
            page.run(f"() => {{{ADD_SETTINGS} {ADD_COMPARE}}}")
            page.queue()
            help_pictures(page, [name for name in names or NODES if name not in CALIBRATING])
            frame = context.request.get(page.run("topiTest.images('ToPiMaskPreview')[0].src")).body()
            page.run(f"() => {{{ADD_CALIBRATION}}}")
            page.queue()
            help_pictures(page, [name for name in names or NODES if name in CALIBRATING])
            if names:
                return
            frame = Image.open(BytesIO(frame)).convert("RGB").resize((400, 400), Image.NEAREST)
            frame.save(WORKFLOWS / f"{QUICKSTART}.jpg", quality=85)
            thumbnails(Page(context.new_page(), server.address))


def help_pictures(page: Page, names: list[str]) -> None:
    for name in names:
        page.look_at(name)
        page.page.mouse.move(5, 500)
        page.page.wait_for_timeout(1500)
        node = page.page.locator(f"[data-node-id='{page.run('(type) => topiTest.node(type).id', name)}']")
        node.screenshot(path=ROOT / "web" / "docs" / f"{name}.jpg", quality=85, type="jpeg")


def pretend_to_have_models(server: Server) -> None:
    """Empty files, or the page would mark the loaders as lacking theirs."""
    arguments = json.loads(server.get("/system_stats"))["system"]["argv"]
    base = Path(arguments[arguments.index("--base-directory") + 1])
    for path in WORKFLOWS.glob("*.json"):
        for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]:
            for model in node["properties"].get("models", ()):
                file = base / "models" / model["directory"] / model["name"]
                file.parent.mkdir(parents=True, exist_ok=True)
                file.touch()
    shutil.copy(comfyui_dir() / "input" / "example.png", base / "input")


def quickstart(page: Page) -> None:
    """The README's picture of the page after a run."""
    page.page.set_viewport_size(LARGE)
    page.open(vue=True, settings={"Comfy.Graph.CanvasInfo": False, "Comfy.Graph.CanvasMenu": False})
    page.load_template(QUICKSTART)
    page.queue()
    page.run("app.extensionManager.command.execute('Workspace.ToggleFocusMode')")
    shown = page.run(SHOW_GROUPS, [LARGE["width"], LARGE["height"], ["ToPi and sampling", "Results"]])
    shown["height"] *= 0.63  # the report's times, further down, are of a page that draws on the same cores
    page.page.wait_for_timeout(3000)
    page.page.screenshot(path=ROOT / "docs" / "images" / "page.jpg", quality=80, type="jpeg", clip=shown)
    page.close()


def thumbnails(page: Page) -> None:
    """The other workflows' graphs: their models are not here to run them, but for the one that has the demo model."""
    page.page.set_viewport_size(LARGE)
    page.open(vue=False, settings={"LiteGraph.Canvas.MinFontSizeForLOD": 0, "Comfy.Graph.CanvasInfo": False})
    for name in sorted(path.stem for path in WORKFLOWS.glob("*.json") if path.stem != QUICKSTART):
        page.load_template(name)
        if name == CALIBRATE:
            page.queue(view=None)
        page.run("app.extensionManager.command.execute('Workspace.ToggleFocusMode')")
        page.run(SHOW_GROUPS, [LARGE["width"], LARGE["height"]])
        page.page.wait_for_timeout(3000)
        picture = Image.open(BytesIO(page.page.screenshot())).convert("RGB")
        picture.resize(THUMBNAIL, Image.LANCZOS).save(WORKFLOWS / f"{name}.jpg", quality=85)
        page.run("app.extensionManager.command.execute('Workspace.ToggleFocusMode')")


if __name__ == "__main__":
    main()
