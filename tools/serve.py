"""Starts ComfyUI's page with this pack in it; further arguments go to ComfyUI (`--port 9000`, `--listen`, ...)."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

from topi_demo.runtime import comfyui_dir

USER = Path(__file__).resolve().parent.parent / ".comfyui" / "user"


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--listen", nargs="?", const="0.0.0.0", default="127.0.0.1")
    parser.add_argument("--port", default="8188")
    address = parser.parse_known_args()[0]

    command = [sys.executable, str(comfyui_dir().resolve() / "main.py"), "--base-directory", str(USER)]
    command += ["--database-url", f"sqlite:///{USER / 'comfyui.db'}"]  # else it is made beside ComfyUI's tree
    if not torch.accelerator.is_available():
        command.append("--cpu")
    print(f"ComfyUI with ToPi starts at http://{address.listen}:{address.port} (Ctrl-C ends it)", flush=True)
    os.execv(command[0], command + sys.argv[1:])


if __name__ == "__main__":
    main()
