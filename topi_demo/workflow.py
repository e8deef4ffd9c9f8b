"""A workflow file of ComfyUI's page -> the prompt that its server runs.

The page does this itself when a workflow is queued; programs that queue one have to do the same.
"""

from __future__ import annotations

ALWAYS, MUTED, BYPASSED = 0, 2, 4
NOTES = ("Note", "MarkdownNote")
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


def to_prompt(workflow: dict, object_info: dict) -> dict[str, dict]:
    """workflow: the page's format; object_info: what the server's /object_info says of its nodes.

    A muted node falls away; a bypassed one hands on its first input of the output's type.
    """
    nodes = {node["id"]: node for node in workflow["nodes"]}
    links = {link[0]: (link[1], link[2]) for link in workflow["links"]}
    prompt = {}
    for node in nodes.values():
        if node["mode"] != ALWAYS or node["type"] in NOTES:
            continue
        if node["type"] not in object_info:
            raise ValueError(f"the server has no node {node['type']!r}, which the workflow uses")
        inputs = _widget_values(node, object_info[node["type"]]["input"])
        for port in node["inputs"]:
            source = _source(port["link"], nodes, links)
            if source is not None:
                inputs[port["name"]] = source
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def _widget_values(node: dict, groups: dict) -> dict:
    """The page stores the values of widgets as a list, in the order of the node's inputs."""
    values, inputs = iter(node.get("widgets_values", ())), {}
    for name, spec in {**groups.get("required", {}), **groups.get("optional", {})}.items():
        kind, options = spec[0], spec[1] if len(spec) > 1 else {}
        if (isinstance(kind, list) or kind in WIDGETS) and not options.get("forceInput"):
            inputs[name] = next(values, options.get("default"))
            if options.get("control_after_generate"):
                next(values, None)  # "fixed", "randomize" ...: for the page alone
    return inputs


def _source(link: int | None, nodes: dict, links: dict) -> list | None:
    """The node and output that a link comes from, through bypassed nodes; None where it comes from nowhere."""
    if link is None:
        return None
    node_id, slot = links[link]
    node = nodes[node_id]
    if node["mode"] == ALWAYS:
        return [str(node_id), slot]
    if node["mode"] == BYPASSED:
        kind = node["outputs"][slot]["type"]
        same = [port["link"] for port in node["inputs"] if port["type"] == kind]
        return _source(same[0], nodes, links) if same else None
    return None
