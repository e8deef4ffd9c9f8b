"""What the documents say, held to the code: commands, names, sentences, links."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import yaml

from tools import setup

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
NOT_OURS = ("git clone ", "cd ", "pip install -r requirements.txt")  # what an installation by hand takes


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def commands() -> list[tuple[str, str]]:
    """(page, command) of every line in a code block without a language, and of every `make` and `python` inline."""
    found = []
    for page in PAGES:
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```", read(page), re.MULTILINE | re.DOTALL):
            if language in ("", "bash", "sh"):
                lines = block.replace("\\\n", " ").splitlines()  # a command may go on in the next line
                found += [(page.name, line.split("  #")[0].strip()) for line in lines]
        found += [(page.name, command) for command in re.findall(r"`((?:make|python) [^`]+)`", read(page))]
    return sorted({(page, command) for page, command in found if command and not command.startswith(NOT_OURS)})


def start(module: str, *arguments: str) -> tuple[object, str]:
    """`python -m module`, in this process, as most of them import torch, which takes seconds -> exit code, words."""
    with contextlib.redirect_stdout(io.StringIO()) as said, mock.patch.object(sys, "argv", [module, *arguments]):
        try:
            code = importlib.import_module(module).main()
        except SystemExit as end:
            code = end.code
    return code or 0, said.getvalue()


@functools.cache
def help_of(module: str) -> str:
    """What it says of its options; a module without any would start to work instead."""
    source = read(ROOT / (module.replace(".", "/") + ".py"))
    assert "argparse" in source and 'if __name__ == "__main__":' in source, module
    if "os.exec" in source:  # it would take the place of this process
        shown = subprocess.run([sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True)
        code, words = shown.returncode, shown.stdout
    else:
        code, words = start(module, "--help")
    assert code == 0, module
    return words


def in_ci() -> str:
    return "\n".join(read(file) for file in (ROOT / ".ci" / "run", *ROOT.glob(".github/workflows/*.yml")))


@pytest.mark.parametrize("page, command", commands())
def test_every_command_is_one_that_ci_runs_or_knows_its_options(page, command):
    """What CI runs is proven there. Of the others, the module that `make` would start is asked for its help."""
    words = shlex.split(command)
    module, options = None, words[3:]
    if words[0] == "make":
        target = words[1] if len(words) > 1 else ""
        if re.search(rf"^\s*(?:- run: )?make {target}\b", in_ci(), re.MULTILINE):
            return
        dry = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
        assert dry.returncode == 0, dry.stderr
        module = re.findall(r"python -m (\S+)", dry.stdout)[-1:] or None
        options = shlex.split(next((word[5:] for word in words if word.startswith("ARGS=")), ""))
        if module is None:  # `make setup`, `make help`
            return
        module = module[0]
    elif words[:2] == ["python", "-m"]:
        module = words[2]
    elif words[0] == "python" and words[1].endswith(".py"):
        module, options = words[1].removesuffix(".py").replace("/", "."), words[2:]
    assert module, f"{page}: neither a test nor CI runs `{command}`"
    if module == "pytest":
        assert all((ROOT / option).exists() for option in options if option.startswith("tests/"))
        return
    for option in options:
        assert not option.startswith("-") or re.search(rf"(?<!\w){option}\b", help_of(module)), (module, option)
    assert help_of(module)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)", read(page)):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_method_names_what_is_there():
    names = set(re.findall(r"`([a-z]+)\.([A-Za-z_]+)`", read(ROOT / "docs" / "method.md")))
    assert len(names) >= 15
    for module, name in sorted(names):
        assert hasattr(importlib.import_module(f"topi_core.{module}"), name), f"{module}.{name}"


def text_of(node: ast.AST) -> str | None:
    """A text in the code; what is filled into it is a … ."""
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[.\d]*\w", "…", node.value)
    return None


def nodes_of(*folders: str) -> list[ast.AST]:
    files = [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]
    return [node for file in files for node in ast.walk(ast.parse(read(file)))]


def quotes() -> dict[str, re.Pattern]:
    """The headings of the troubleshooting page that quote the code."""
    found = re.findall(r"^### (.+)$", read(ROOT / "docs" / "troubleshooting.md"), re.MULTILINE)
    return {quote: re.compile(".+".join(map(re.escape, quote.split("…"))).removesuffix(".+")) for quote in found}


def test_troubleshooting_quotes_what_the_code_says():
    known = list(filter(None, map(text_of, nodes_of("nodes", "topi_core", "topi_demo"))))
    assert len(quotes()) > 15
    for quote, pattern in quotes().items():
        assert any(pattern.match(text) for text in known), quote


def test_troubleshooting_has_every_sentence_that_a_node_raises_or_warns_with():
    """What `topi_core` raises of a programmer's mistakes is not for this page."""
    for node in nodes_of("nodes"):
        call = node.exc if isinstance(node, ast.Raise) else node
        name = getattr(call.func, "attr", "raise") if isinstance(call, ast.Call) else None
        if name in ("warning", "_warn_once") or isinstance(node, ast.Raise):
            text = text_of(call.args[0]) if isinstance(call, ast.Call) and call.args else None
            if text and text != "ToPi: …":  # one that was made elsewhere
                assert any(pattern.match(text) for pattern in quotes().values()), text


def test_the_workflows_of_github_are_well_formed():
    """They run what a developer runs, and use nobody's actions but GitHub's and the registry's."""
    for file in ROOT.glob(".github/**/*.yml"):
        assert isinstance(yaml.safe_load(read(file)), dict), file
    assert re.search(r"- run: \.ci/run$", read(ROOT / ".github" / "workflows" / "test.yml"), re.MULTILINE)
    for action in re.findall(r"uses: (\S+)", in_ci()):
        assert action.startswith(("actions/", "Comfy-Org/", "./.github/")), action
    targets = set(re.findall(r"^([a-z-]+):", read(ROOT / "Makefile"), re.MULTILINE))
    assert set(re.findall(r"make ([a-z-]+)", in_ci() + read(ROOT / ".pre-commit-config.yaml"))) <= targets


def test_the_oldest_comfyui_is_named_once_and_for_all():
    assert f".comfyui/{setup.OLDEST_COMFYUI} " in read(ROOT / "Makefile")
    assert f'requires-comfyui = ">={setup.OLDEST_COMFYUI}"' in read(ROOT / "pyproject.toml")
    assert setup.OLDEST_COMFYUI in setup.RELEASES


def test_tables_are_those_of_the_measured_rows():
    assert start("bench.pages", "--check") == (0, "up to date\n")
