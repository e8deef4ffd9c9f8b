"""ComfyUI's real page in Chromium, with the pack on a real server; once in each of its two renderers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext

from tools.page import PACK_NAME, Page, browser
from tools.setup import CHROMIUM
from topi_demo.server import Server, running


@pytest.fixture(scope="session")
def chromium() -> str:
    found = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if found is None:
        pytest.fail("the browser tests need Chromium, which is not here: `apt-get install chromium`", pytrace=False)
    return found


STAND_INS = Path(__file__).parent / "standins"


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> Iterator[Server]:
    """With small models in the place of the real ones, for the workflows that load those."""
    with running(tmp_path_factory.mktemp("server") / "log.txt", PACK_NAME, others=(STAND_INS,)) as server:
        yield server


@pytest.fixture(scope="session")
def temp_folder(server) -> Path:
    """Where the server keeps the pictures that nodes show."""
    arguments = json.loads(server.get("/system_stats"))["system"]["argv"]
    return Path(arguments[arguments.index("--base-directory") + 1]) / "temp"


@pytest.fixture(scope="module")
def context(chromium, server, temp_folder, tmp_path_factory) -> Iterator[BrowserContext]:
    """Opened after what uses asyncio."""
    with browser(chromium, tmp_path_factory.mktemp("profile")) as context:
        yield context


@pytest.fixture(scope="module", params=["canvas", "vue"])
def page(request, context, server) -> Iterator[Page]:
    """The quickstart, loaded from the template browser and run, in short."""
    page = Page(context.new_page(), server.address)
    page.open(vue=request.param == "vue")
    page.load_template("topi_quickstart_demo")
    for type_, name, value in (
        ("KSampler", "steps", 4), ("ToPiPatch", "update_interval", 2), ("ToPiPatch", "tau", 0.6),
        ("ToPiMaskPreview", "opacity", 1.0),
    ):  # fmt: skip
        page.set(type_, name, value)
    page.queue()
    yield page
    page.close()
