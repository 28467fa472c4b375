"""What `trimtab cost` measures: FLOPs, quality, time, exits and rows that stay, for each setting of a build's dials."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from trimtab.compiler.checks.quality import Quality
from trimtab.compiler.checks.speed import Machine
from trimtab.passes.dials import SpeedPoint


class _Result(BaseModel):
    model_config = ConfigDict(frozen=True)


class Kept(_Result):
    """Rows at a node where some may leave, as shares of all rows of the data.

    Attributes:
        where: name of the node.
        what: "tokens" or "samples".
        entered, stayed: shares of the rows; 1 is all rows of the data.
    """

    where: str
    what: str
    entered: float
    stayed: float


class SettingCost(_Result):
    """One setting of the dials.

    Attributes:
        speed: the speed of this setting; None where dials alone were set.
        dials: dial → value.
        flops: FLOPs executed per sample.
        fewer: the dense model's FLOPs divided by `flops`.
        quality: task quality of the outputs; None where trimtab knows no task for the outputs.
        exits: number of layers → share of the samples that ran as many; empty where the model does not report it.
        kept: rows at each node where some may leave, in the order of computation.
        ms: milliseconds of one call, the median over rounds; None where nothing was timed.
        faster: the dense model's time divided by `ms`.
    """

    speed: float | None
    dials: dict[str, float]
    flops: float
    fewer: float
    quality: Quality | None
    exits: dict[int, float]
    kept: tuple[Kept, ...]
    ms: float | None
    faster: float | None


class CostReport(_Result):
    """The report of `trimtab cost`.

    Attributes:
        samples, batch: samples of the data, and samples in a batch; texts of a batch are padded to the longest.
        padding: share of the tokens that is padding; None for data that are no text.
        dense_flops: FLOPs of the dense model per sample, on the same batches, padding included.
        dense_ms: milliseconds of one call of the dense model on the build's target.
        measured: name of the quality's score, such as "accuracy".
        dense_score: score of the dense model, where the data have labels.
        settings: results of each setting, in the order asked for.
        path: the path of `speed` that a walk gave; empty where the user asked for no walk.
        warnings: sentences for people.
    """

    data: str
    samples: int
    batch: int
    padding: float | None
    machine: Machine
    versions: dict[str, str]
    dense_flops: float
    dense_ms: float | None
    measured: str | None
    dense_score: float | None
    settings: tuple[SettingCost, ...]
    path: tuple[SpeedPoint, ...] = ()
    warnings: tuple[str, ...] = ()

    def summary(self) -> dict[str, Any]:
        """What measured.json keeps: flat, so that the report shows it as tables."""
        single = {"data": self.data, "samples": self.samples, "batch": self.batch, "padding": self.padding,
                  "dense FLOPs": self.dense_flops, "dense ms": self.dense_ms,
                  f"dense {self.measured}": self.dense_score}  # fmt: skip
        rows = [setting_row(each, self.measured) for each in self.settings]
        exits = [named(each) | {f"{layers} layers": share for layers, share in each.exits.items()}
                 for each in self.settings if each.exits]  # fmt: skip
        kept = [named(each) | {passage.where: passage.stayed for passage in each.kept}
                for each in self.settings if each.kept]  # fmt: skip
        tables = {"settings": rows, "share of samples by layers run": exits, "share that stays": kept}
        return {key: value for key, value in (single | tables).items() if value not in (None, [])}


def named(setting: SettingCost) -> dict[str, Any]:
    """Speed and dials as columns of a table."""
    return ({} if setting.speed is None else {"speed": setting.speed}) | setting.dials


def setting_row(setting: SettingCost, measured: str | None) -> dict[str, Any]:
    """A setting as one row of a table."""
    row = named(setting) | {"FLOPs": setting.flops, "times fewer": setting.fewer}
    row |= {} if setting.quality is None else {str(measured): setting.quality.score}
    return row | ({} if setting.ms is None else {"ms": setting.ms, "times as fast": setting.faster})
