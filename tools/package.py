"""Builds the archive that ComfyUI's registry hands out, with the registry's own CLI: `make package`."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class PackageError(Exception):
    """What the CLI said."""


def comfy(*arguments: str) -> str:
    """Runs comfy-cli on the repository -> its words. It reports nothing to anybody."""
    command = [sys.executable, "-m", "comfy_cli", "--skip-prompt", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"DO_NOT_TRACK": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    words = done.stdout.decode()
    if done.returncode:
        raise PackageError(words)
    return words


def pack(folder: Path) -> Path:
    """Packs what git tracks and `.comfyignore` leaves in -> the archive, in `folder`."""
    comfy("node", "pack")
    folder.mkdir(parents=True, exist_ok=True)
    return Path(shutil.move(ROOT / "node.zip", folder / "comfyui-topi.zip"))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.package", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder of the archive")
    folder = parser.parse_args().out
    try:
        print(comfy("node", "validate").strip())
        archive = pack(folder)
    except PackageError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"The archive is {archive}, {archive.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
