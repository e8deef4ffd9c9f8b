"""The page in Chinese: what ComfyUI makes of our `locales/zh`."""

import json
from pathlib import Path

import pytest

from tools.page import Page

ROOT = Path(__file__).resolve().parents[2]
DEFINITION = """
(type) => {
  const node = LiteGraph.createNode(type);
  app.rootGraph.add(node);
  const slots = (slots) => slots.map((slot) => slot.localized_name ?? slot.label ?? slot.name);
  return [node.title, [...slots(node.inputs), ...slots(node.outputs)]];
}
"""


@pytest.fixture
def chinese(context, server):
    """An empty page in Chinese; the next one is in English again."""
    page = Page(context.new_page(), server.address)

    def speak(language: str) -> None:
        assert page.page.request.post(f"{server.address}/settings", data={"Comfy.Locale": language}).ok

    speak("zh")
    page.open(vue=False)
    yield page
    speak("en")
    page.close()


def test_titles_and_slots_are_translated(chinese):
    texts = json.loads((ROOT / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))
    for type_, expected in texts.items():
        title, slots = chinese.run(DEFINITION, type_)
        assert title == expected["display_name"]
        names = [field["name"] for field in (expected.get("inputs", {}) | expected["outputs"]).values()]
        assert set(slots) == set(names), type_
    assert not chinese.errors
