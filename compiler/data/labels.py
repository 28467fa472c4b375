"""Converts the labels of data to numbers that are compared with a model's outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from trimtab.compiler.data.textfile import Label, ScoreCell, WholeCell
from trimtab.compiler.task import Task
from trimtab.passes.errors import DataError


def class_number(label: Label, names: Sequence[str] | None) -> int | None:
    """The number of the class that a text's label gives as a number or a name; None for a label of None.

    The text of a .tsv cell is matched with the class names first. If class names are numbers, such as ratings "1" to
    "5", it is matched with the names alone, since file and model may count from different numbers. Numbers below 0 are
    never classes.

    Raises:
        DataError: the model has no class of that name, or the label is a score or a list.
    """
    if isinstance(label, WholeCell | ScoreCell) and names and _is_name(label, names):
        return _index(label.text, names)
    if label is None or isinstance(label, int):
        return None if label is None else int(label)  # a plain int, without a cell's text
    if isinstance(label, float):
        raise DataError(
            f"label {label!r} is a score, and the model gives each sample one class",
            hint="give the number or name of a class; config.json's `problem_type` says regression for scores",
        )
    if isinstance(label, tuple):
        raise DataError(
            f"label {list(label)!r} is a list, and the model gives each sample one class",
            hint="give one class; config.json's `problem_type` says multi_label_classification for lists",
        )
    return _index(label, names)


def label_values(
    labels: Sequence[Label] | np.ndarray, task: Task, names: Sequence[str] | None, width: int | None
) -> np.ndarray | None:
    """Convert labels to the task's form.

    Args:
        labels: the label of each sample, as read from a file of texts or an .npz file.
        names: names of the model's classes.
        width: number of the model's logits, or None if it is unknown before the model runs.

    Returns:
        int64 [samples] for classes, bool [samples, labels] for labels, float64 [samples, scores] for scores. None where
        the task has no labels, or a sample has none.

    Raises:
        DataError: labels are of another kind than the task's, or name a class that the model does not have.
    """
    if task.kind not in ("classes", "labels", "score"):
        return None
    if isinstance(labels, np.ndarray):
        return _of_array(labels, task, width)
    present = [label for label in labels if label is not None]
    values = {"classes": _classes, "labels": _lists, "score": _scores}[task.kind](present, names, width)
    return values if len(present) == len(labels) and present else None


def _classes(labels: Sequence[Label], names: Sequence[str] | None, width: int | None) -> np.ndarray:
    return _in_range(np.array([class_number(label, names) for label in labels], np.int64), width)


def _lists(labels: Sequence[Label], names: Sequence[str] | None, width: int | None) -> np.ndarray:
    count = width or len(names or ())
    values = np.zeros((len(labels), count), bool)
    for row, label in zip(values, labels, strict=True):
        if not isinstance(label, tuple):
            raise DataError(
                f"label {label!r} is not a list, and the model gives each sample any number of labels",
                hint='write the names of all that it has, such as "label": ["toxic", "spam"], or [] for none',
            )
        for name in label:
            row[_index(name, names)] = True
    return values


def _scores(labels: Sequence[Label], names: Sequence[str] | None, width: int | None) -> np.ndarray:
    for label in labels:
        if not isinstance(label, int | float):
            shown = list(label) if isinstance(label, tuple) else label
            raise DataError(
                f"label {shown!r} is a class, and the model gives each sample a score",
                hint='give a number, such as "label": 0.73',
            )
    if width is not None and width > 1 and labels:
        raise DataError(
            f"a label is one number, and the model gives {width} scores", hint="give tensors and labels as .npz"
        )
    return np.array(labels, np.float64).reshape(-1, 1)


def _of_array(labels: np.ndarray, task: Task, width: int | None) -> np.ndarray:
    """Convert the label array of an .npz file."""
    what = f"labels are {labels.dtype} {list(labels.shape)}"
    if task.kind == "score":
        values = labels.astype(np.float64).reshape(len(labels), -1)
        if width is not None and values.shape[1] != width:
            raise DataError(
                f"{what}, and the model gives {width} scores for each sample", hint=f"give floats [samples, {width}]"
            )
        return values
    if task.kind == "classes":
        if labels.ndim != 1 or labels.dtype.kind == "f":
            raise DataError(f"{what}, and the model gives each sample one class", hint="give integers [samples]")
        return _in_range(labels.astype(np.int64), width)
    if labels.ndim != 2 or (width is not None and labels.shape[1] != width) or not np.isin(labels, (0, 1)).all():
        raise DataError(
            f"{what}, and the model gives each sample any number of {width or 'its'} labels",
            hint="give ones and zeros [samples, labels]",
        )
    return labels.astype(bool)


def _in_range(values: np.ndarray, width: int | None) -> np.ndarray:
    if width is not None and len(values) and (values.min() < 0 or values.max() >= width):
        raise DataError(
            f"the label {values[(values < 0) | (values >= width)][0]} is outside 0..{width - 1}, the model's classes",
            hint="number the classes from 0 as the model does, or give their names",
        )
    return values


def _index(label: str, names: Sequence[str] | None) -> int:
    if names is None or label not in names:
        choices = f"the model's are {_listed(names)}" if names else "the model does not name its classes: number them"
        raise DataError(f"label {label!r} is no class of the model", hint=choices)
    return list(names).index(label)


def _is_name(label: WholeCell | ScoreCell, names: Sequence[str]) -> bool:
    """Whether the cell's text is a class name, or must be one because class names are numbers."""
    if label.text in names:
        return True
    return isinstance(label, WholeCell) and label >= 0 and any(n.isascii() and n.isdecimal() for n in names)


def _listed(names: Sequence[Any]) -> str:
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
