"""Calibration and evaluation data: texts and tensors from files, and the tokenizer that turns texts into inputs."""

from trimtab.compiler.data.dataset import (
    LABEL,
    Dataset,
    batches,
    check_inputs,
    fit_arrays,
    read_data,
    text_feeds,
    with_labels,
)
from trimtab.compiler.data.labels import class_number, label_values
from trimtab.compiler.data.textfile import Example, Label
from trimtab.compiler.data.texts import Text

__all__ = [
    "LABEL",
    "Dataset",
    "Example",
    "Label",
    "Text",
    "batches",
    "check_inputs",
    "class_number",
    "fit_arrays",
    "label_values",
    "read_data",
    "text_feeds",
    "with_labels",
]
