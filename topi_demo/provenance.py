"""Rows of measurements: what they must say about where they come from, and how they are read."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

from .model import WEIGHTS
from .runtime import VERSION


def setting(weights: Path = WEIGHTS) -> dict:
    """Commit ("+" where files were changed), weights, hardware and versions, as plain values."""
    return {
        "commit": _commit(),
        "weights": hashlib.sha256(weights.read_bytes()).hexdigest()[:16],
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cpu": f"{os.cpu_count()} cores, {_processor()}",
        "versions": {"comfyui": VERSION, "torch": torch.__version__, "python": platform.python_version()},
    }


def read(path: Path) -> list[dict]:
    """The rows of a file of JSON lines; none where it is not there yet."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def _commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(("git", *words), capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + ("+" if changed else "")
