"""Writes `locales/en/nodeDefs.json` from the nodes' own schemas: `make locales`. The other languages are by hand."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from topi_demo.runtime import load_pack

ROOT = Path(__file__).resolve().parents[1]
ENGLISH = ROOT / "locales" / "en" / "nodeDefs.json"


def definitions(nodes: list) -> dict[str, dict]:
    """What ComfyUI's page can translate of these node classes, in its form of `nodeDefs.json`."""
    return {schema.node_id: definition(schema) for schema in (node.GET_SCHEMA() for node in nodes)}


def definition(schema) -> dict:
    made = {"display_name": schema.display_name, "description": schema.description, "inputs": {}, "outputs": {}}
    for field in schema.inputs:
        made["inputs"][field.id] = {"name": field.display_name or field.id, "tooltip": field.tooltip}
    for i, field in enumerate(schema.outputs):
        made["outputs"][str(i)] = {"name": field.display_name or field.io_type, "tooltip": field.tooltip}
    return {key: value for key, value in made.items() if value}


def dump(made: dict) -> str:
    return json.dumps(made, indent=2, ensure_ascii=False) + "\n"


def main() -> None:
    argparse.ArgumentParser(prog="python -m tools.locales", description=__doc__).parse_args()
    ours = [node for name, node in load_pack()[0].items() if name.startswith("ToPi")]
    ENGLISH.write_text(dump(definitions(ours)), encoding="utf-8")


if __name__ == "__main__":
    main()
