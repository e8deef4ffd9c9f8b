"""The page's translations against the nodes' schemas: whoever changes a node is told which text is missing or stale."""

import json
import re

import pytest

from tools.locales import definitions, dump

LANGUAGES = ("en", "zh")
FILES = ("main.json", "nodeDefs.json", "settings.json")
HAN = re.compile("[\u4e00-\u9fff]")


@pytest.fixture(scope="module")
def ours(comfyui):
    """Every node of the pack, as the page's texts ought to have it in English."""
    return definitions([node for name, node in comfyui.nodes.items() if name.startswith("ToPi")])


@pytest.fixture
def read(comfyui):
    return lambda *path: json.loads(comfyui.pack.joinpath("locales", *path).read_text(encoding="utf-8"))


def leaves(tree, path=()):
    """(path, text) of all texts in a tree."""
    if isinstance(tree, str):
        yield path, tree
    else:
        for key, branch in tree.items():
            yield from leaves(branch, (*path, key))


def test_every_node_input_and_output_has_a_text(ours):
    for name, node in ours.items():
        assert node["display_name"] and node["description"], name
        for field in [*node.get("inputs", {}).values(), *node.get("outputs", {}).values()]:
            assert field["name"] and field["tooltip"], (name, field)


def test_english_is_what_the_schemas_say(comfyui, ours):
    written = comfyui.pack.joinpath("locales", "en", "nodeDefs.json").read_text(encoding="utf-8")
    assert json.loads(written) == ours, "run `make locales`"
    assert written == dump(json.loads(written))


@pytest.mark.parametrize("file", FILES)
def test_all_languages_have_the_same_texts(read, file):
    """None is missing and none is left of a node or an input that is gone."""
    english = {path for path, _ in leaves(read("en", file))}
    for language in LANGUAGES:
        assert {path for path, _ in leaves(read(language, file))} == english, language


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("file", FILES)
def test_no_text_has_signs_that_the_page_reads_as_its_own(read, language, file):
    """vue-i18n's message format gives these a meaning."""
    for path, text in leaves(read(language, file)):
        assert text.strip() and not set("{}@|") & set(text), (path, text)


def test_chinese_is_chinese_and_says_the_same_numbers_and_options(comfyui, ours, read):
    chinese = dict(leaves(read("zh", "nodeDefs.json")))
    for path, english in leaves(ours):
        text = chinese[path]
        if path[-1] != "name":
            assert HAN.search(text), (path, text)
        numbers = [set(re.findall(r"-?\d+(?:\.\d+)?", words)) for words in (english, text)]
        assert numbers[0] == numbers[1], (path, text)
    for name in ours:
        for field in comfyui.nodes[name].GET_SCHEMA().inputs:
            tooltip = chinese[name, "inputs", field.id, "tooltip"]
            for option in getattr(field, "options", None) or []:
                assert not re.search(rf"\b{option}:", field.tooltip) or option in tooltip, (name, option)


def test_settings_and_their_categories_are_those_of_the_page(comfyui, read):
    script = comfyui.pack.joinpath("web", "topi.js").read_text(encoding="utf-8")
    (name,) = re.findall(r'const LIVE = "(.*)";', script)
    (categories,) = re.findall(r"category: (\[.*\]),", script)
    (label,) = re.findall(r'name: "(.*)",\n\s*type: "boolean"', script)
    assert read("en", "settings.json") == {name.replace(".", "_"): {"name": label}}
    assert {*read("en", "main.json")["settingsCategories"]} == {*json.loads(categories)} - {name}
    parts = [node.GET_SCHEMA().category.split("/") for name, node in comfyui.nodes.items() if name.startswith("ToPi")]
    assert {first for first, *_ in parts} == {"ToPi"}
    assert {*read("en", "main.json")["nodeCategories"]} == {part for category in parts for part in category}
