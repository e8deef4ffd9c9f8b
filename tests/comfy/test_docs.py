"""Every node has its help page."""

import re

import pytest

from tools.pictures import NODES


def test_all_nodes_are_listed_here(comfyui):
    assert {name for name in comfyui.nodes if name.startswith("ToPi")} == set(NODES)


@pytest.mark.parametrize("name", NODES)
def test_help_names_all_inputs_and_its_pictures_are_there(comfyui, name):
    folder = comfyui.pack / "web" / "docs"
    page = (folder / f"{name}.md").read_text(encoding="utf-8")
    schema = comfyui.nodes[name].GET_SCHEMA()
    assert page.startswith(f"# {schema.display_name}\n")
    for field in schema.inputs:
        assert f"`{field.id}`" in page and field.tooltip
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", page)
    assert pictures and all((folder / picture).is_file() for picture in pictures)
