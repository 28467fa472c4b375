"""Turns ONNX Runtime's exceptions into trimtab's errors: a plain sentence, and what to do.

The patterns match texts of ONNX Runtime 1.31. A text without a pattern is shown without the runtime's codes, source
paths and function signatures; `--debug` shows the whole text as the cause of the error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

from trimtab.passes.errors import TargetError

_LONGEST = 200  # limit of a text that no pattern matches, in characters
_EXPORT = "export the model again"
_TYPES = "convert the graph to float32, or give another precision"
_NEWER = "update onnxruntime, or export with an older opset"
_DATA = "copy or export the model again, with its data files"
_INPUTS = "see that the inputs fit the model and each other"
_MEMORY = "give smaller batches or shorter texts, end other programs, or use a machine with more memory"


class Explained(NamedTuple):
    """An exception of ONNX Runtime in plain words.

    Attributes:
        words: what is wrong; the message appends it to what failed.
        hint: what to do; None if unknown.
        by_inputs: whether the inputs of the call are at fault, not the model or the machine.
    """

    words: str
    hint: str | None = None
    by_inputs: bool = False


class _Pattern(NamedTuple):
    """A text of ONNX Runtime as a regular expression, and its translation, in which {where} is the node."""

    text: str
    words: str
    hint: str | None = None
    by_inputs: bool = False


_PATTERNS = [
    # When a session is opened: the file and its data.
    _Pattern("File doesn't exist", "there is no such file", "see that the path is right"),
    _Pattern("protobuf parsing failed|No graph was found", "it is no ONNX file, or cut off", _DATA),
    _Pattern(r'External data path does not exist: "(?P<path>[^"]*)"', "its data file {path} is missing", _DATA),
    _Pattern(
        "External initializer: (?P<name>.*?) offset.*out of bounds", "the data of weight {name!r} are cut off", _DATA
    ),
    _Pattern(
        r"Failed to load library (?P<path>\S+)", "the library {path} cannot be loaded", "install trimtab again"
    ),
    _Pattern(
        r"schema\(trimtab::", "{where}: the native kernels are of another version of trimtab",
        "install trimtab again, or run `make native` in a checkout",
    ),
    # The graph.
    _Pattern(
        r"No Op registered for (?P<op>\S+) with domain_version of (?P<v>\d+)", "it has no op {op} of opset {v}", _NEWER
    ),
    _Pattern(
        "No opset import for domain '(?P<domain>.*?)'", "the file imports no opset of the domain {domain!r}", _EXPORT
    ),
    _Pattern(
        r"Fatal error: (?P<op>\S+?)(?:\(-?\d+\))? is not a registered function/op", "it has no op {op}",
        "ops of other domains need the library that has them; export without them",
    ),
    _Pattern(
        r"Could not find an implementation for (?P<op>\w+)(?:\(\d+\))? node with name '(?P<node>.*?)'",
        "it has no kernel for {where} in the types that it is given", _TYPES,
    ),
    _Pattern("MLDataType for: (?P<type>.*?) is not currently registered", "it has no {type}", _TYPES),
    _Pattern(r"Opset (?P<v>\d+) is under development", "it does not support opset {v}", _NEWER),
    _Pattern(
        r"Unsupported model IR version: (?P<v>\d+), max supported IR version: (?P<most>\d+)",
        "the file is of IR version {v}, and this onnxruntime reads up to {most}", _NEWER,
    ),
    _Pattern(
        r"of Optype \((?P<op>\w+)\) bound to different types \((?P<a>\S+) and (?P<b>\S+) in node \((?P<node>.*?)\)",
        "{where} mixes {a} and {b}", _EXPORT,
    ),
    _Pattern(
        r"Type '(?P<type>.*?)' of input parameter \((?P<name>.*?)\) of operator \((?P<op>\w+)\) "
        r"in node \((?P<node>.*?)\)",
        "{where} does not take {type} for {name!r}", _EXPORT,
    ),
    # When it is run: inputs.
    _Pattern(r"Required inputs \(\[(?P<names>.*?)\]\) are missing", "inputs are missing: {names}", _INPUTS, True),
    _Pattern(r"Invalid input name: (?P<name>\S+)", "there is no input {name!r}", _INPUTS, True),
    _Pattern(r"Invalid output name: ?(?P<name>\S+)", "there is no output {name!r}", "ask for outputs it has", True),
    _Pattern(
        r"Invalid rank for input: (?P<name>\S+) Got: (?P<have>\d+) Expected: (?P<want>\d+)",
        "input {name!r} has {have} dimensions, and the model takes {want}", _INPUTS, True,
    ),
    _Pattern(
        r"invalid dimensions for input: (?P<name>\S+) .*?index: (?P<axis>\d+) "
        r"Got: (?P<have>\d+) Expected: (?P<want>\d+)",
        "input {name!r} has the size {have} along axis {axis}, and the model takes {want}", _INPUTS, True,
    ),
    _Pattern(
        r"input data type\. Actual: \((?:tensor\()?(?P<have>\w+)\)+ ?, expected: \((?:tensor\()?(?P<want>\w+)\)",
        "an input is {have}, and the model takes {want}", "convert it with .astype", True,
    ),
    _Pattern(
        r"element out of data bounds, idx=(?P<index>-?\d+) must be within the inclusive range \[-?\d+,(?P<most>\d+)\]",
        "the index {index} lies outside of 0 to {most}, at {where}", _INPUTS, True,
    ),
    _Pattern(
        r"broadcast an axis by a dimension other than 1\. (?P<a>\d+) by (?P<b>\d+)",
        "sizes {a} and {b} do not go together, at {where}", _INPUTS, True,
    ),
    _Pattern("dimension mismatch", "sizes of tensors do not go together, at {where}", _INPUTS, True),
    _Pattern(
        r"Input shape:\{(?P<a>.*?)\}, requested shape:\{(?P<b>.*?)\}",
        "a tensor of shape [{a}] cannot become [{b}], at {where}", _INPUTS, True,
    ),
    # The machine.
    _Pattern(
        r"Failed to allocate memory for requested buffer of size (?P<bytes>\d+)",
        "memory ran out: {bytes} bytes were wanted, at {where}", _MEMORY,
    ),
    _Pattern("CUDA out of memory|CUDNN_STATUS_ALLOC_FAILED|bad_alloc", "memory ran out", _MEMORY),
]  # fmt: skip

_NODES = [
    re.compile(pattern)
    for pattern in (
        r"while running (?P<op>\w+) node\. Name:'(?P<node>.*?)'",
        r'In Node, \("(?P<node>.*?)", (?P<op>\w+)',
        r"Node \((?P<node>.*?)\) Op \((?P<op>\w+)\)",
    )
]
_NOISE = [
    re.compile(pattern)
    for pattern in (
        r"^\[ONNXRuntimeError\] : \d+ : [A-Z_]+ : ",
        r"^Load model from .*? failed: ?",
        r"^Exception during \w+: ",
        r"This is an invalid model\. |^Invalid model\. ",
        r"^(?:In Node, .*?, |Fatal )?(?:Type )?Error:? (?:in execution: )?",
        r"^.*?Status Message: ",
        r"^.*? \[\w+InferenceError\] ",
        r"\S*\.(?:cc|cpp|cu|cuh|h|hpp):\d+ (?:.* was false\. |[^(]*\(.*?\) (?:const )?)?",
        r"(?:0x[0-9a-f]+|Stacktrace:.*)$",
    )
]
"""Text around the reason, in the order of removal."""


def explain(error: Exception) -> Explained:
    """Translate an exception of ONNX Runtime."""
    text = " ".join(str(error).split())
    nodes = (match for pattern in _NODES if (match := pattern.search(text)))
    node = next(nodes, None)
    for pattern in _PATTERNS:
        if match := re.search(pattern.text, text, re.IGNORECASE):
            parts = (node.groupdict() if node else {}) | match.groupdict()
            words = pattern.words.format(**parts, where=_where(parts))
            return Explained(words, pattern.hint, pattern.by_inputs)
    for noise in _NOISE:
        text = noise.sub("", text)
    text = text.strip().rstrip(".") or type(error).__name__
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    return Explained(f"{_where(node.groupdict())}: {text}" if node else text)


@contextmanager
def opening(name: str) -> Iterator[None]:
    """For a body that opens a session.

    Args:
        name: what the body opens, such as the path of the file.

    Raises:
        TargetError: ONNX Runtime refuses the graph.
    """
    try:
        yield
    except exceptions() as error:
        explained = explain(error)
        raise TargetError(
            f"{name}: ONNX Runtime does not take this graph: {explained.words}", hint=explained.hint
        ) from error


@contextmanager
def running(name: str) -> Iterator[None]:
    """For a body that runs a session.

    Args:
        name: what the body runs, such as "the model".

    Raises:
        TargetError: ONNX Runtime fails.
    """
    try:
        yield
    except exceptions() as error:
        explained = explain(error)
        raise TargetError(f"ONNX Runtime could not run {name}: {explained.words}", hint=explained.hint) from error


@lru_cache
def exceptions() -> tuple[type[Exception], ...]:
    """All classes that ONNX Runtime raises. Its own exceptions have no common base class."""
    try:  # imported late: code that only reads manifests or tokenizes does not need ONNX Runtime
        from onnxruntime.capi import onnxruntime_pybind11_state as state
    except ImportError:
        return (ValueError, RuntimeError)
    own = (kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception))
    return (ValueError, RuntimeError, *own)


def _where(parts: dict[str, str]) -> str:
    """The node that an error names: "node 'layer/up' (MatMul)"."""
    if not parts.get("node"):
        return f"an op {parts['op']}" if parts.get("op") else "an op"
    return f"node {parts['node']!r} ({parts['op']})" if parts.get("op") else f"node {parts['node']!r}"
