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
    """Rows at a node that lets some of them leave, as shares of those of the data.

    Attributes:
        where: the node.
        what: "tokens" or "samples".
        entered, stayed: 1 is all of the data's.
    """

    where: str
    what: str
    entered: float
    stayed: float


class SettingCost(_Result):
    """One setting of the dials.

    Attributes:
        speed: None where dials alone were set.
        dials: dial → value.
        flops: executed, a sample.
        fewer: how many times fewer they are than the dense model's.
        quality: of the answers; None where trimtab knows no use of the outputs.
        exits: number of layers → share of the samples that ran as many; empty where the model does not tell.
        kept: in the order of computation.
        ms: of one call, in milliseconds, as the median over rounds; None where nothing was timed.
        faster: the dense model's time over this.
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
    """What was measured.

    Attributes:
        samples, batch: of the data; texts of a batch are filled up to the longest.
        padding: share of the tokens that is padding; None for data that are no text.
        dense_flops: of the dense model, a sample, on the same batches, padding and all.
        dense_ms: of one call of the dense model on the build's target.
        measured: what quality's score is, such as "accuracy".
        dense_score: of the dense model, where data have labels.
        settings: in the order asked for.
        path: the path of `speed` that a walk found; empty where none was asked for.
        warnings: sentences.
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
    """Speed and dials, as tables have them."""
    return ({} if setting.speed is None else {"speed": setting.speed}) | setting.dials


def setting_row(setting: SettingCost, measured: str | None) -> dict[str, Any]:
    """A setting as one row of a table."""
    row = named(setting) | {"FLOPs": setting.flops, "times fewer": setting.fewer}
    row |= {} if setting.quality is None else {str(measured): setting.quality.score}
    return row | ({} if setting.ms is None else {"ms": setting.ms, "times as fast": setting.faster})
