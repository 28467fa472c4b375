"""`trimtab targets`: what can be built on this machine."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from trimtab.compiler.cli import console


def command(json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False) -> None:
    """List the targets and whether they work here."""
    from trimtab.compiler.targets import TARGET_NAMES

    found = [_probe(name) for name in TARGET_NAMES]
    if json:
        console.emit_json(found)
    else:
        rows = [(each["name"], "yes" if each["available"] else "no", each["reason"] or "") for each in found]
        console.print_table(("target", "works here", "why not"), rows)


def _probe(name: str) -> dict[str, Any]:
    from trimtab.compiler.targets import get_target
    from trimtab.passes.errors import TargetError

    try:
        capability = get_target(name).probe()
    except TargetError as error:
        return {"name": name, "available": False, "reason": str(error)}
    return {
        "name": name,
        "available": True,
        "reason": None,
        "weight_bits": sorted(capability.weight_bits),
        "negative_scales": capability.negative_scales,
        "float16": capability.float16,
    }
