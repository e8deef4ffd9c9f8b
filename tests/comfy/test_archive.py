"""The archive that the registry hands out, built by the registry's own CLI and installed into a clean ComfyUI."""

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from tools.package import comfy, pack
from topi_demo.demo import WAYS, variant
from topi_demo.server import running
from topi_demo.workflow import to_prompt

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = {
    "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "README.md", "__init__.py", "pyproject.toml", "requirements.txt",
    "docs", "locales", "nodes", "tools", "topi_core", "topi_demo", "web", "workflows",
}  # fmt: skip
SHIPPED_OF_THE_DEMO = {
    "__init__.py", "codec.py", "comfy_model.py", "edits.py", "model.py", "scenes.py", "text.py",
    "weights/topi_demo.safetensors",
}  # fmt: skip


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The archive, unpacked as an installer does it."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(pack(tmp_path_factory.mktemp("archive"))) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def server(installed, tmp_path_factory):
    with running(
        tmp_path_factory.mktemp("server") / "log.txt", name="topi from the registry", pack=installed
    ) as server:
        yield server


def test_the_registry_s_own_check_passes():
    words = comfy("node", "validate")
    assert "All validation checks passed" in words
    assert "arning" not in words


def test_it_holds_what_the_pack_needs_and_nothing_else(installed):
    assert {file.name for file in installed.iterdir()} == SHIPPED
    assert [file.name for file in (installed / "tools").iterdir()] == ["calibrate.py"]
    demo = installed / "topi_demo"
    assert {str(file.relative_to(demo)) for file in demo.rglob("*") if file.is_file()} == SHIPPED_OF_THE_DEMO
    assert not list(installed.rglob("__pycache__"))


def test_links_in_what_users_read_lead_to_files_that_are_there(installed):
    pages = [*installed.glob("*.md"), *(installed / "docs").glob("*.md")]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)#:]+)[^):]*\)", page.read_text("utf-8"))]
    assert len(links) >= 20
    assert [(page.name, link) for page, link in links if not (page.parent / link).exists()] == []


def test_what_the_linter_for_custom_nodes_flags_is_answered(installed):
    """Each file that it names says why it is as it is, by the linter's name."""
    lint = [sys.executable, "-m", "comfy_test", "lint", "--json", str(installed)]
    results = json.loads(subprocess.run(lint, capture_output=True, text=True).stdout)["results"]
    files = {"web/" + finding["file"] for finding in results["javascript"]["findings"]}
    files |= set(re.findall(r"^(\S+\.py):$", results["syntax"]["details"] or "", re.MULTILINE))
    assert results["javascript"]["summary"]["errors"] == 0
    assert files or results["syntax"]["passed"]
    for file in files:
        assert "comfy-test" in installed.joinpath(file).read_text(encoding="utf-8"), results


def test_requirements_ask_for_nothing():
    """ComfyUI ships all that the pack uses, most of it pinned: to name it again could only replace it."""
    lines = ROOT.joinpath("requirements.txt").read_text().splitlines()
    assert not [line for line in lines if line.strip() and not line.startswith("#")]


def test_one_version():
    """It is in pyproject.toml, and the changelog begins with what came in it."""
    version = re.search(r'^version = "(.+?)"', ROOT.joinpath("pyproject.toml").read_text(), re.MULTILINE)[1]
    newest = re.search(r"^## (\S+)", ROOT.joinpath("CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)[1]
    assert newest == version


def test_it_edits_in_a_clean_comfyui(server, installed, comfyui):
    """The nodes of the checkout, their page, texts and templates, and a run on the archive's own weights."""
    nodes = server.object_info()
    ours = {name for name in nodes if name.startswith("ToPi")}
    assert ours == {name for name in comfyui.nodes if name.startswith("ToPi")}

    (folder,) = (name for name in json.loads(server.get("/workflow_templates")) if name.startswith("topi"))
    templates = json.loads(server.get("/workflow_templates"))[folder]
    assert set(templates) == {file.stem for file in installed.joinpath("workflows").glob("*.json")}
    assert any(name.endswith("/topi.js") for name in json.loads(server.get("/extensions")))
    texts = json.loads(server.get("/i18n"))
    assert ours <= set(texts["zh"]["nodeDefs"]) and "topi_live" in texts["zh"]["settings"]

    workflow = json.loads(installed.joinpath("workflows", "topi_quickstart_demo.json").read_text(encoding="utf-8"))
    prompt = to_prompt(variant(workflow, 1, "make it night", WAYS["prune"]), nodes)
    for node in prompt.values():
        if node["class_type"] == "KSampler":
            node["inputs"]["steps"] = 2
    outputs = {prompt[node]["class_type"]: output for node, output in server.run(prompt).outputs.items()}
    assert [step["kind"] for step in outputs["ToPiReport"]["run"][0]["steps"]] == ["anchor", "pruned"]
    image = server.image(outputs["SaveImage"]["images"][0])
    assert image.shape == (128, 128, 3) and torch.isfinite(image).all()
