"""Plots the results of `trimtab cost`: quality against FLOPs and time, exits, and tokens that stay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.compiler.checks.cost_report import CostReport, SettingCost
from trimtab.passes.errors import DataError, TrimtabError
from trimtab.passes.optional import import_optional

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SUFFIXES = (".svg", ".png", ".pdf")


def check_plot(path: Path) -> None:
    """Refuse a file that no plot can be written to, before long work.

    Raises:
        DataError: the file name has no known suffix, or the folder is missing.
        TrimtabError: matplotlib is not installed.
    """
    if path.suffix.lower() not in _SUFFIXES:
        raise DataError(f"{path}: a plot is written as {', '.join(_SUFFIXES)}", hint="give a name such as cost.svg")
    if not path.absolute().parent.is_dir():
        raise DataError(f"{path.absolute().parent}: no such folder", hint="create the folder first")
    _figure_class()


def draw(report: CostReport, path: Path) -> None:
    """Draw `report` into the file `path`."""
    parts: list[Callable[[Axes, CostReport], None]] = []
    if report.measured is not None:
        parts.append(_draw_flops)
        parts += [_draw_time] if report.dense_ms is not None else []
    parts += [_draw_exits] if any(each.exits for each in report.settings) else []
    parts += [_draw_tokens] if any(_tokens(each) for each in report.settings) else []
    figure = _figure_class()(figsize=(4.5 * max(1, len(parts)), 3.6))
    for number, part in enumerate(parts, 1):
        part(figure.add_subplot(1, len(parts), number), report)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)


def _figure_class() -> Any:
    return import_optional("matplotlib.figure", TrimtabError, what="a plot", extra="plots").Figure


def _draw_flops(axis: Axes, report: CostReport) -> None:
    _draw_quality(axis, report, [each.fewer for each in report.settings], "times fewer FLOPs than dense")


def _draw_time(axis: Axes, report: CostReport) -> None:
    faster = [each.faster or 0.0 for each in report.settings]
    _draw_quality(axis, report, faster, f"times as fast as dense ({report.dense_ms:.3g} ms, batch {report.batch})")


def _draw_quality(axis: Axes, report: CostReport, costs: list[float], label: str) -> None:
    scores = [100 * each.quality.score if each.quality else 0.0 for each in report.settings]
    axis.plot(costs, scores, "o-", color="tab:blue", linewidth=1, markersize=5)
    for setting, x, y in zip(report.settings, costs, scores, strict=True):
        axis.annotate(_name(setting), (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7)
    if report.dense_score is not None:
        axis.axhline(100 * report.dense_score, color="0.7", linewidth=0.8, zorder=0)
    axis.set(xlabel=label, ylabel=f"{report.measured}, %")
    axis.grid(alpha=0.3)


def _draw_exits(axis: Axes, report: CostReport) -> None:
    layers = sorted({each for setting in report.settings for each in setting.exits})
    below = [0.0] * len(report.settings)
    for number, depth in enumerate(layers):
        heights = [100 * setting.exits.get(depth, 0.0) for setting in report.settings]
        shade = str(0.85 - 0.7 * number / max(1, len(layers) - 1))
        axis.bar(range(len(heights)), heights, bottom=below, color=shade, label=str(depth), width=0.7)
        below = [a + b for a, b in zip(below, heights, strict=True)]
    axis.set_xticks(range(len(report.settings)), [_name(each) for each in report.settings], fontsize=8)
    axis.set(xlabel=_axis(report), ylabel="% of the samples")
    axis.legend(title="layers run", fontsize=7, title_fontsize=7)


def _draw_tokens(axis: Axes, report: CostReport) -> None:
    for number, setting in enumerate(report.settings):
        shares = [1.0, *_tokens(setting)]
        shade = str(0.8 - 0.8 * number / max(1, len(report.settings) - 1))
        axis.plot(range(len(shares)), [100 * each for each in shares], "o-", color=shade, label=_name(setting))
    axis.set(xlabel="places where tokens leave", ylabel="% of the tokens that go on", ylim=(0, 105))
    axis.grid(alpha=0.3)
    axis.legend(title=_axis(report), fontsize=7, title_fontsize=7)


def _tokens(setting: SettingCost) -> list[float]:
    return [passage.stayed for passage in setting.kept if passage.what == "tokens"]


def _name(setting: SettingCost) -> str:
    if setting.speed is not None:
        return f"{setting.speed:g}"
    return ", ".join(f"{name} {value:g}" for name, value in setting.dials.items()) or "as compiled"


def _axis(report: CostReport) -> str:
    return "setting" if report.settings[0].speed is None else "speed"
