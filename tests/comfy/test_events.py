"""The live event, as a page gets it from the real server."""

import asyncio
import base64
import io
import json
import uuid

import aiohttp
import pytest
from PIL import Image

from topi_demo.demo import WORKFLOW, Way, variant
from topi_demo.server import running
from topi_demo.workflow import to_prompt


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(tmp_path_factory.mktemp("server") / "log.txt") as server:
        yield server


@pytest.fixture
def prompt(server):
    """Two references, two anchors in four steps."""
    instruction = "put the star of the second image into the first"
    workflow = variant(json.loads(WORKFLOW.read_text("utf-8")), 1, instruction, Way("prune", tolerance=0.0, tau=0.6))
    nodes = to_prompt(workflow, server.object_info())
    for node in nodes.values():
        if node["class_type"] == "KSampler":
            node["inputs"]["steps"] = 4
        if node["class_type"] == "ToPiPatch":
            node["inputs"]["update_interval"] = 2
    return nodes


def run(server, prompt, queued_by_gone_page=False) -> tuple[list[dict], list[str]]:
    """-> the anchors' events that a page gets for a prompt, and the nodes that were executed for it."""

    async def listen():
        client, events, executed = uuid.uuid4().hex, [], []
        sender = uuid.uuid4().hex if queued_by_gone_page else client
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(f"{server.address}/ws?clientId={client}") as socket,
        ):
            answer = await session.post(f"{server.address}/prompt", json={"prompt": prompt, "client_id": sender})
            queued = (await answer.json())["prompt_id"]
            done = asyncio.create_task(finished(session, queued))
            while True:
                try:
                    message = await socket.receive(timeout=0.5)
                except asyncio.TimeoutError:
                    if done.done():
                        break
                    continue
                if message.type != aiohttp.WSMsgType.TEXT:
                    continue
                event = message.json()
                if event["type"] == "topi.anchor":
                    events.append(event["data"])
                elif event["type"] == "executing" and event["data"]["node"] is not None:
                    executed.append(event["data"]["node"])
            await done
        return events, executed

    async def finished(session, queued):
        while True:
            history = await (await session.get(f"{server.address}/history/{queued}")).json()
            if queued in history:
                assert history[queued]["status"]["status_str"] == "success", history[queued]["status"]
                return
            await asyncio.sleep(0.1)

    return asyncio.run(listen())


def post(server, path, value):
    async def send():
        async with aiohttp.ClientSession(raise_for_status=True) as session:
            await session.post(server.address + path, json=value)

    asyncio.run(send())


def of_type(prompt, name):
    return next(id_ for id_, node in prompt.items() if node["class_type"] == name)


def test_each_anchor_is_announced_with_the_patch_node_also_when_that_comes_from_the_cache(server, prompt):
    events, executed = run(server, prompt)
    patch = of_type(prompt, "ToPiPatch")
    assert patch in executed
    assert [(event["node"], event["step"]) for event in events] == [(patch, 0), (patch, 2)]
    assert [event["tokens"] for event in events] == [128, 128]
    assert all(0 < event["share"] < 1 for event in events)
    pictures = [Image.open(io.BytesIO(base64.b64decode(p.partition(",")[2]))) for p in events[0]["pictures"]]
    assert [(picture.mode, picture.size) for picture in pictures] == [("RGB", (16, 16))] * 2

    prompt[of_type(prompt, "KSampler")]["inputs"]["seed"] += 1
    events, executed = run(server, prompt)
    assert patch not in executed
    assert [(event["node"], event["step"]) for event in events] == [(patch, 0), (patch, 2)]


def test_nothing_is_sent_without_a_browser_or_when_the_setting_is_off(server, prompt):
    prompt[of_type(prompt, "KSampler")]["inputs"]["seed"] += 2
    assert run(server, prompt, queued_by_gone_page=True)[0] == []
    prompt[of_type(prompt, "KSampler")]["inputs"]["seed"] += 1
    post(server, "/settings/topi.live", False)
    try:
        events, executed = run(server, prompt)
        assert of_type(prompt, "KSampler") in executed and events == []
    finally:
        post(server, "/settings/topi.live", True)


def test_scores_that_decide_nothing_are_made_where_something_looks_at_them(server, prompt):
    """With every token kept: for a page or a ToPi Mask Preview, and for nothing else."""
    prompt[of_type(prompt, "ToPiPatch")]["inputs"]["mode"] = "reuse"
    alone = {id_: node for id_, node in prompt.items() if node["class_type"] != "ToPiMaskPreview"}

    def scored(prompt, **page) -> bool:
        prompt[of_type(prompt, "KSampler")]["inputs"]["seed"] += 10
        run(server, prompt, **page)
        (newest,) = json.loads(server.get("/history?max_items=1")).values()
        (text,) = newest["outputs"][of_type(prompt, "ToPiReport")]["text"]
        return "nothing was scored" not in text

    assert scored(alone) and scored(prompt, queued_by_gone_page=True)
    assert not scored(alone, queued_by_gone_page=True)
