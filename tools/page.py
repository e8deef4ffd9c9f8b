"""ComfyUI's page in Chromium: what a user does there, and sees. For the browser tests and the help pages' pictures."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import playwright.sync_api
from playwright.sync_api import BrowserContext, sync_playwright

OPTIONS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PACK_NAME = "comfyui-topi"
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Minimap.Visible": False,  # two cores draw all this without a GPU
    "LiteGraph.Canvas.MaximumFps": 10,
}

HELPERS = """
window.topiTest = {
  node: (type) => app.rootGraph.nodes.find((node) => node.type === type && node.mode === 0),
  root: (type) => topiTest.node(type)?.widgets.find((widget) => widget.name === "topi")?.element,
  images: (type) => [...(topiTest.root(type)?.querySelectorAll("img") ?? [])],
  ready: (type) => topiTest.images(type).length > 0 && topiTest.images(type).every((image) => image.naturalWidth),
  pixels: (type) => {
    const image = topiTest.images(type)[0];
    const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight);
    const context = canvas.getContext("2d");
    context.drawImage(image, 0, 0);
    return [canvas.width, canvas.height, [...context.getImageData(0, 0, canvas.width, canvas.height).data]];
  },
  done: 0,
  anchors: [],
};
app.api.addEventListener("execution_success", () => topiTest.done++);
app.api.addEventListener("topi.anchor", ({ detail }) => topiTest.anchors.push(detail));
"""


@contextlib.contextmanager
def browser(chromium: str, profile: Path, height: int = 800) -> Iterator[BrowserContext]:
    """chromium: its command; profile: a folder of its own. No asyncio while it is open: Playwright has its own loop."""
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            profile, executable_path=chromium, args=OPTIONS, viewport={"width": 1200, "height": height}
        )
        context.set_default_timeout(90_000)
        yield context
        context.close()


class Page:
    def __init__(self, page: playwright.sync_api.Page, address: str):
        self.page = page
        self.address = address
        self.errors: list[str] = []
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def run(self, script: str, *arguments):
        return self.page.evaluate(script, *arguments)

    def wait(self, condition: str) -> None:
        self.page.wait_for_function(condition)

    def open(self, vue: bool, settings: dict | None = None) -> None:
        """In one of the two renderers."""
        settings = SETTINGS | (settings or {}) | {"Comfy.VueNodes.Enabled": vue}
        assert self.page.request.post(f"{self.address}/settings", data=settings).ok
        self.page.goto(self.address, wait_until="commit")
        self._started()
        assert self.run("LiteGraph.vueNodesMode") == vue

    def reload(self) -> None:
        self.page.reload(wait_until="commit")
        self._started()

    def close(self) -> None:
        """Leaves nothing that the next page would open again."""
        self.run("localStorage.clear()")
        self.page.close()

    def _started(self) -> None:
        self.wait("window.app?.rootGraph?.nodes && app.extensionManager?.workflow?.activeWorkflow")
        self.run(HELPERS)

    def browse_templates(self) -> None:
        """In the template browser each pack has an entry of its own."""
        self.page.get_by_role("button", name="Templates").first.click()
        self.page.get_by_role("dialog").get_by_role("button", name=PACK_NAME).click()

    def load_template(self, name: str) -> None:
        self.browse_templates()
        before = self.run("app.extensionManager.workflow.activeWorkflow.path")
        active = "app.extensionManager.workflow.activeWorkflow"  # of a second one the name ends with its number
        opened = (
            f"{active}?.path !== {before!r} && {active}.filename.startsWith('{name}') && app.rootGraph.nodes.length"
        )
        card = self.page.get_by_test_id(f"template-workflow-{name}")
        card.click()
        try:
            self.page.wait_for_function(opened, timeout=30_000)
        except playwright.sync_api.TimeoutError:  # a click is lost where the list of templates is drawn anew under it
            if card.is_visible():
                card.click()
            self.wait(opened)

    def new_tab(self) -> None:
        """An empty workflow beside the others."""
        self.run("app.extensionManager.command.execute('Comfy.NewBlankWorkflow')")
        self.wait("!topiTest.node('ToPiMaskPreview')")

    def to_tab(self, name: str) -> None:
        self.page.get_by_test_id("topbar-workflow-tabs").get_by_text(name).click()

    def set(self, type_: str, widget: str, value) -> None:
        """Types a value into a node's widget."""
        self.run(
            "([type, name, value]) => { topiTest.node(type).widgets.find((w) => w.name === name).value = value; }",
            [type_, widget, value],
        )

    def queue(self, view: str | None = "ToPiMaskPreview") -> None:
        """Presses Run and waits for the end, and for the pictures on a node of ours."""
        before = self.run("topiTest.done")
        self.page.get_by_test_id("queue-button").click()
        self.wait(f"topiTest.done > {before}")
        if view:
            self.wait(f"topiTest.ready('{view}')")

    def look_at(self, type_: str) -> None:
        """Scrolls the graph to a node."""
        self.run(
            """(type) => {
              const node = topiTest.node(type);
              app.canvas.ds.scale = 1;
              app.canvas.ds.offset = [300 - node.pos[0], 150 - node.pos[1]];
              app.canvas.setDirty(true, true);
            }""",
            type_,
        )
        self.page.wait_for_timeout(500)

    def element(self, type_: str, selector: str):
        return self.page.evaluate_handle(
            "([type, selector]) => topiTest.root(type).querySelector(selector)", [type_, selector]
        ).as_element()

    def drag_slider(self, type_: str, share: float) -> None:
        """From where it is to this share of its length, with the mouse."""
        self.look_at(type_)
        slider = self.element(type_, "input")
        box = slider.bounding_box()
        value, largest = slider.evaluate("(slider) => [Number(slider.value), Number(slider.max)]")
        thumb = 8
        places = [box["x"] + thumb + at * (box["width"] - 2 * thumb) for at in (value / largest, share)]
        y = box["y"] + box["height"] / 2
        self.page.mouse.move(places[0], y)
        self.page.mouse.down()
        self.page.mouse.move(places[1], y, steps=5)
        self.page.mouse.up()

    def text(self, type_: str) -> str:
        return self.run("(type) => topiTest.root(type)?.innerText ?? ''", type_)

    def dark_tokens(self, type_: str, side: int) -> int:
        """How many squares of `side` pixels are black all over, in the picture that is on the node."""
        width, height, data = self.run("(type) => topiTest.pixels(type)", type_)
        dark = 0
        for top in range(0, height, side):
            for left in range(0, width, side):
                rows = (data[4 * (y * width + left) : 4 * (y * width + left + side)] for y in range(top, top + side))
                dark += not any(value for row in rows for i, value in enumerate(row) if i % 4 != 3)
        return dark
