"""The report of a build, in Markdown for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from trimtab.compiler.builds.manifest import Manifest, PassReport
from trimtab.compiler.builds.measured import Measured
from trimtab.compiler.checks.measure import in_brief


def render(manifest: Manifest, measured: Measured) -> str:
    """The report of a build: sizes, what each pass changed and left, the check, and later measurements."""
    parts = [
        f"# {manifest.origin}, compiled for {manifest.target}",
        f"Made {manifest.created} by trimtab {manifest.versions.get('trimtab', '')} in "
        f"{sum(manifest.seconds.values()):.1f} s.",
        f"Profile: {manifest.profile_origin}." if manifest.profile_origin else "",
        _sizes(manifest),
        _dials(manifest),
        *(_pass(report) for report in manifest.passes),
        _check(manifest),
        _measured("Quality", measured.quality, "trimtab validate"),
        _measured("Speed", measured.speed, "trimtab bench"),
        _measured("Cost", measured.cost, "trimtab cost") if manifest.dials or measured.cost else "",
        "## Time\n\n" + table(("phase", "seconds"), [(k, f"{v:.2f}") for k, v in manifest.seconds.items()]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def megabytes(count: int | None) -> str:
    """A number of bytes in megabytes, for people."""
    return "unknown" if count is None else f"{count / 1e6:,.1f} MB"


def share(part: int | None, whole: int) -> str:
    """`part` of `whole` in per cent."""
    return f"{100 * part / whole:.1f} %" if part is not None and whole else "-"


def _sizes(manifest: Manifest) -> str:
    sizes = manifest.sizes
    rows = [
        ("all weights", sizes.dense_bytes, sizes.compiled_bytes),
        ("FFN weights", sizes.dense_ffn_bytes, sizes.compiled_ffn_bytes),
    ]
    return "## Size\n\n" + table(
        ("", "dense", "compiled", "of dense"),
        [(name, megabytes(dense), megabytes(ours), share(ours, dense)) for name, dense, ours in rows],
    )


def _dials(manifest: Manifest) -> str:
    if not manifest.dials:
        return ""
    columns = ("dial", "meaning", "values", "default", "exact at", "fast at")
    rows = [(d.name, d.meaning, d.range, d.default, d.exact, d.fast) for d in manifest.dials]
    names = [dial.name for dial in manifest.dials]
    path = [(point.speed, *(point.dials[name] for name in names)) for point in manifest.speed]
    return "\n\n".join(["## Dials", table(columns, rows), "### Speed", table(("speed", *names), path)])


def _pass(report: PassReport) -> str:
    parts = [f"## {report.name}", f"Changed {report.changed} places, left {len(report.left)}."]
    if report.left:
        parts.append(table(("left", "why"), [(place.where, place.why) for place in report.left]))
    return "\n\n".join([*parts, *_tables(report.details)])


def _tables(values: Mapping[str, Any]) -> list[str]:
    """One table of all single values, and one table for each list of mappings, such as one row per layer."""
    single = [(key, value) for key, value in values.items() if not _is_rows(value)]
    parts = [table(("", "value"), single)] if single else []
    for key, rows in values.items():
        if _is_rows(rows):
            columns = list(dict.fromkeys(column for row in rows for column in row))
            parts.append(f"### {key}\n\n" + table(columns, [[row.get(c, "") for c in columns] for row in rows]))
    return parts


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _check(manifest: Manifest) -> str:
    check = manifest.check
    if not check.ran:
        return f"## Check against the dense model\n\nNot run: {check.why}."
    brief = in_brief(check.outputs, lambda error: error.severity)
    rows = [(what, e.where, e.max_abs, e.relative_l2, e.cosine) for what, e in brief]
    columns = ("output", "random inputs of", "max |y - y_dense|", "‖y - y_dense‖ / ‖y_dense‖", "cosine")
    return "## Check against the dense model\n\n" + table(columns, rows)


def _measured(title: str, results: Mapping[str, Any], command: str) -> str:
    if not results:
        return f"## {title}\n\nNot measured yet: run `{command}`."
    return "\n\n".join([f"## {title}", *_tables(results)])


def _cell(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
