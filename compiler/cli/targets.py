"""`trimtab targets`: what can be built on this machine."""

from __future__ import annotations

from typing import Any

from trimtab.compiler.cli import console, options


def command(json: options.Json = False) -> None:
    """List the targets and whether they work here."""
    from trimtab.compiler.targets import TARGET_NAMES

    probed = [_probe(name) for name in TARGET_NAMES]
    if json:
        console.emit_json(probed)
        return
    rows = [(each["name"], "yes" if each["available"] else "no", each["summary"]) for each in probed]
    console.print_table(("target", "works here", "what it builds"), rows)
    for each in probed:
        if not each["available"]:
            print(f"\n{each['reason']}")


def _probe(name: str) -> dict[str, Any]:
    from trimtab.compiler.targets import get_target
    from trimtab.passes.errors import TargetError

    target = get_target(name)
    try:
        capability = target.probe()
    except TargetError as error:
        return {"name": name, "summary": target.summary, "available": False, "reason": str(error)}
    return {
        "name": name,
        "summary": target.summary,
        "available": True,
        "reason": None,
        "weight_bits": sorted(capability.weight_bits),
        "negative_scales": capability.negative_scales,
        "float16": capability.float16,
    }
