"""What loading the pack does to a ComfyUI: nothing that its user could feel."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

ALONE = """
import importlib.util, json, sys
before = set(sys.modules)
spec = importlib.util.spec_from_file_location("some name.1", sys.argv[1])
sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(json.dumps(sorted(set(sys.modules) - before - {spec.name})))
"""

IN_COMFYUI = """
import asyncio, json, os, sys
from pathlib import Path
from topi_demo.runtime import use_comfyui
use_comfyui()
import folder_paths, nodes, server  # what is there before custom nodes are loaded
import comfy_api.latest, comfy_config.config_parser
pack = Path(sys.argv[1])
opened, before, path = [], set(sys.modules), list(sys.path)

def watch(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, os.PathLike)):
        opened.append(os.path.realpath(arguments[0]))

sys.addaudithook(watch)
assert asyncio.run(nodes.load_custom_node(str(pack)))
new = set(sys.modules) - before
root = os.path.realpath(pack) + os.sep
file_of = lambda name: getattr(sys.modules[name], "__file__", None) or ""
ours = {name for name in new if file_of(name).startswith((root, f"{pack}{os.sep}"))}
print(json.dumps({
    "ours": sorted(map(file_of, ours)),
    "foreign": sorted({name.split(".")[0] for name in new - ours} - {name.split(".")[0] for name in before}),
    "opened": sorted({file for file in opened if file.startswith(root)}),
    "path": sys.path == path,
}))
"""


def run(code: str, *arguments: object) -> object:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_pack_alone_imports_nothing():
    """Before ComfyUI asks for the nodes; pytest and installers meet it without torch, too."""
    assert run(ALONE, ROOT / "__init__.py") == []


def test_loading_it_brings_no_packages_and_reads_no_weights(tmp_path):
    """From a folder that is no Python name. All but its own modules and Python's is loaded in ComfyUI already."""
    pack = tmp_path / "custom_nodes" / "2 in-context.pruning"
    pack.parent.mkdir()
    pack.symlink_to(ROOT, target_is_directory=True)
    seen = run(IN_COMFYUI, pack)
    assert set(seen["foreign"]) <= sys.stdlib_module_names
    assert seen["path"], "it changed sys.path"
    modules = {Path(file).name for file in seen["ours"]}
    assert "patch.py" in modules
    assert not modules & {"comfy_model.py", "model.py", "train.py", "server.py", "runtime.py"}
    assert not [file for file in map(Path, seen["opened"]) if file.is_file() and file.stat().st_size > 1e6]
