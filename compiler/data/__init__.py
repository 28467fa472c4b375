"""Data in: texts and tensors from files, and the tokenizer that makes inputs of texts."""

from trimtab.compiler.data.dataset import (
    LABEL,
    Dataset,
    batches,
    class_number,
    fit_arrays,
    read_data,
    text_feeds,
    with_labels,
)

__all__ = ["LABEL", "Dataset", "batches", "class_number", "fit_arrays", "read_data", "text_feeds", "with_labels"]
