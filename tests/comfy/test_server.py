"""The real server with the pack in a folder of another name, through its API."""

import json

import pytest
import torch

from topi_demo import demo
from topi_demo.demo import WORKFLOW, Way, variant
from topi_demo.server import ServerError, running
from topi_demo.workflow import to_prompt


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(tmp_path_factory.mktemp("server") / "log.txt", name="my nodes.2") as server:
        yield server


@pytest.fixture(scope="module")
def object_info(server):
    return server.object_info()


@pytest.fixture
def queue(server, object_info):
    """Queue the quickstart -> the edited image [H, W, 3] and the outputs by node type."""

    def queue(instruction, seed=1, topi=True, tau=0.85, steps=3):
        way = Way("prune", tolerance=0.0, tau=tau) if topi else None
        workflow = variant(json.loads(WORKFLOW.read_text(encoding="utf-8")), seed, instruction, way)
        prompt = to_prompt(workflow, object_info)
        for node in prompt.values():
            if node["class_type"] == "KSampler":
                node["inputs"]["steps"] = steps
        outputs = {prompt[node]["class_type"]: output for node, output in server.run(prompt).outputs.items()}
        return server.image(outputs["SaveImage"]["images"][0]), outputs

    return queue


def test_quickstart_edits_and_a_second_queue_is_served(queue):
    first, outputs = queue("make it night", seed=1)
    assert first.shape == (128, 128, 3)
    assert len(outputs["ToPiMaskPreview"]["images"]) == 1
    assert [step["kind"] for step in outputs["ToPiReport"]["run"][0]["steps"]] == ["anchor", "pruned", "pruned"]
    second, _ = queue("make it night", seed=2)
    assert not torch.equal(first, second)


def test_tau_one_is_the_workflow_without_topi(queue):
    without, outputs = queue("make it winter", topi=False)
    assert "ToPiReport" not in outputs
    assert torch.equal(without, queue("make it winter", tau=1.0)[0])
    assert not torch.equal(without, queue("make it winter", tau=0.3)[0])


def test_two_references(queue):
    _, outputs = queue("put the star of the second image into the first")
    assert outputs["ToPiReport"]["run"][0]["anchors"][0]["reference_tokens"] == 128


def test_an_error_reaches_the_user_and_the_next_queue_is_served(queue):
    with pytest.raises(ServerError, match=r"ToPiDemoScene failed: .*'make it gloomy' is not one the demo scenes know"):
        queue("make it gloomy", seed=3)
    assert queue("make it night", seed=3)[0].shape == (128, 128, 3)


def test_the_demo_s_edit_with_its_table_and_pictures(server, object_info):
    workflow = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    sampler = next(node for node in workflow["nodes"] if node["type"] == "KSampler")
    sampler["widgets_values"][2] = 3
    made = demo.edit(server, object_info, workflow, 1, "put the star of the second image into the first")
    assert len(made.sources) == 2
    assert all(image.shape == (128, 128, 3) for image in (made.full, made.expected, *made.sources))
    assert [len(anchor) for anchor in made.topi["prune"].kept] == [2]
    rows = demo.rows(made)
    assert json.loads(json.dumps(rows)) == rows
    assert [(row["mode"], row["tolerance"]) for row in rows] == [("prune", 0.0), ("reuse", 0.05)]
    assert rows[0]["shares"][0] < 1 == rows[1]["shares"][0]
    head, _, *lines = demo.table(rows).splitlines()
    assert [line.count("|") for line in lines] == [head.count("|")] * 2
    assert demo.picture([made], side=64, gap=4).width == 4 + 6 * (64 + 4)  # with one picture of what was kept
    assert demo.strip(made.topi["prune"], side=64, gap=4).size == (64, 64 + 4 + 64)
