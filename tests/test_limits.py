"""docs/limits.md has the limits that the code has."""

from __future__ import annotations

from pathlib import Path

import pytest

from trimtab.compiler import engine_options, feeds, workload
from trimtab.compiler.checks import selfcheck
from trimtab.compiler.data import cutting, limits
from trimtab.compiler.schema import json_text, yaml_text
from trimtab.compiler.sources import config, trial
from trimtab.passes.graph import densify
from trimtab.passes.graph.wellformed import check

ROOT = Path(__file__).resolve().parents[1]
LIMITS = {
    "recipe": [yaml_text.MAX_BYTES, yaml_text.MAX_DEPTH, yaml_text.MAX_VALUES],
    "`workload`": [workload.MAX_SIZE, workload.MAX_TOKENS],
    "`threads`, `shards`": [engine_options.MAX_THREADS],
    "JSON files": [json_text.MAX_BYTES, json_text.MAX_DEPTH],
    "ONNX graph": [check.MAX_NODES, check.MAX_NESTING],
    "ONNX file": [int(trial.MAX_SECONDS)],
    "random inputs": [feeds.MAX_BYTES],
    "check behind": [int(selfcheck.MAX_SECONDS), selfcheck.MAX_TOKENS],
    "sparse": [densify.MAX_BYTES],
    "layers": [config.MAX_PARTS],
    "line": [limits.MAX_LINE],
    "packed data": [limits.MAX_UNPACKED],
    "name of a class": [limits.MAX_NAME],
    "text": [cutting.MAX_CHARACTERS],
}


@pytest.mark.parametrize("what", LIMITS)
def test_the_table_has_the_limits_of_the_code(what: str) -> None:
    lines = (ROOT / "docs" / "limits.md").read_text().splitlines()
    (row,) = (line for line in lines if line.startswith(f"| {what}"))
    for limit in LIMITS[what]:
        assert str(limit) in row.split("|")[2]
    for module in row.split("`")[1::2]:
        assert "/" not in module or (ROOT / module).is_file()
