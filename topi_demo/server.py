"""A ComfyUI server of our own, and its API: for `make demo` and the tests."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import aiohttp
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .runtime import PACK, comfyui_dir


class ServerError(Exception):
    """One sentence, and the server's own words."""


@dataclass(frozen=True)
class Result:
    """What a prompt gave: the nodes' outputs of the history, and when each step of its sampler ended."""

    outputs: dict[str, dict]
    step_ends: tuple[float, ...]

    @property
    def step_seconds(self) -> list[float]:
        """Of the steps after the first, which pays for loading."""
        return [b - a for a, b in zip(self.step_ends, self.step_ends[1:], strict=False)]


class Server:
    """The API of a running server."""

    def __init__(self, address: str):
        self.address = address

    def get(self, path: str) -> bytes:
        async def get() -> bytes:
            async with (
                aiohttp.ClientSession(raise_for_status=True) as session,
                session.get(self.address + path) as answer,
            ):
                return await answer.read()

        return asyncio.run(get())

    def object_info(self) -> dict:
        return json.loads(self.get("/object_info"))

    def image(self, file: dict) -> Tensor:
        """An image of the history, as [H, W, 3] in 0..1."""
        query = "&".join(f"{key}={file[key]}" for key in ("filename", "subfolder", "type"))
        picture = Image.open(BytesIO(self.get(f"/view?{query}"))).convert("RGB")
        return torch.from_numpy(np.array(picture)).float() / 255

    def run(self, prompt: dict) -> Result:
        """Queue the prompt and wait for it; ServerError with the node's words when it fails."""
        return asyncio.run(self._run(prompt))

    async def _run(self, prompt: dict) -> Result:
        client, ends = uuid.uuid4().hex, []
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(f"{self.address}/ws?clientId={client}") as events,
        ):
            async with session.post(f"{self.address}/prompt", json={"prompt": prompt, "client_id": client}) as answer:
                queued = await answer.json()
            if "prompt_id" not in queued or queued.get("node_errors"):
                raise ServerError(f"the server refused the prompt: {json.dumps(queued)}")
            async for event in events:
                if event.type != aiohttp.WSMsgType.TEXT:
                    continue  # previews
                event = event.json()
                data = event["data"]
                if data.get("prompt_id") != queued["prompt_id"]:
                    continue
                if event["type"] == "progress" and prompt[data["node"]]["class_type"] == "KSampler":
                    ends.append(time.monotonic())
                elif event["type"] == "execution_error":
                    raise ServerError(f"{data['node_type']} failed: {data['exception_message'].strip()}")
                elif event["type"] == "executing" and data["node"] is None:
                    break  # only now is the history written
            else:
                raise ServerError("the server closed the connection before the prompt was done")
            async with session.get(f"{self.address}/history/{queued['prompt_id']}") as answer:
                history = await answer.json()
        return Result(history[queued["prompt_id"]]["outputs"], tuple(ends))


@contextlib.contextmanager
def running(
    log: Path,
    name: str = "comfyui-topi",
    timeout: float = 300,
    pack: Path = PACK,
    others: tuple[Path, ...] = (),
) -> Iterator[Server]:
    """ComfyUI as its own process on a free port, with the pack in a folder `name`, and other packs where given.

    Its models and results go to a folder that is removed at the end; its words go to `log`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="topi-") as base:
        (Path(base) / "custom_nodes").mkdir()
        for link, folder in {name: pack, **{other.name: other for other in others}}.items():
            (Path(base) / "custom_nodes" / link).symlink_to(folder, target_is_directory=True)
        command = [sys.executable, str(comfyui_dir().resolve() / "main.py"), "--base-directory", base]
        command += ["--port", str(port), "--database-url", f"sqlite:///{base}/comfyui.db"]
        command += ["--disable-auto-launch", "--disable-api-nodes"]
        command += ["--preview-method", "latent2rgb"]  # without previews not every step is announced
        if not torch.cuda.is_available():
            command.append("--cpu")
        with log.open("wb") as words:
            process = subprocess.Popen(command, stdout=words, stderr=subprocess.STDOUT)
        try:
            server = Server(f"http://127.0.0.1:{port}")
            _wait(server, process, log, time.monotonic() + timeout)
            yield server
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(server: Server, process: subprocess.Popen, log: Path, deadline: float) -> None:
    while True:
        try:
            server.get("/system_stats")
            return
        except aiohttp.ClientError:
            if process.poll() is not None:
                raise ServerError(f"ComfyUI ended while it started; its words are in {log}") from None
            if time.monotonic() > deadline:
                raise ServerError(f"ComfyUI did not start in time; its words are in {log}") from None
            time.sleep(0.2)
