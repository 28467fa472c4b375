"""Names the activation between two projections by evaluating it, so that GELU is GELU however an exporter writes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto
from scipy.special import erf, expit

from trimtab.passes.graph.weights import values

Function = Callable[[np.ndarray], np.ndarray]

_SMALL = np.geomspace(1e-6, 0.1, 24)  # thresholds of such sizes lie between no two points of even spacing
_NEAR = np.concatenate([np.linspace(-8, 8, 161), -_SMALL, _SMALL, [-30.0, 30.0]])
_POWERS = 10.0 ** np.arange(2, 39)  # up to the end of float32, so that every clipping bound is covered
PROBES = np.concatenate([_NEAR, -_POWERS, _POWERS])
"""The points at which functions are compared."""
_IS_FAR = np.abs(PROBES) > 30
_SIZES = np.clip(np.abs(PROBES), _SMALL[0], 1)
_GATED = np.array([-2.5, -1.0, 0.5, 1.0, 3.0])
_TOLERANCE = 1e-4  # half-precision constants differ by less; gelu and gelu_tanh differ by 4.7e-4


def _gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + erf(x / np.sqrt(2)))


def _gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _softplus(x: np.ndarray) -> np.ndarray:
    return np.logaddexp(0, x)


def _hard_sigmoid(x: np.ndarray, alpha: float = 0.2, beta: float = 0.5) -> np.ndarray:
    return np.clip(alpha * x + beta, 0, 1)


KNOWN: dict[str, Function] = {
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": lambda x: x * expit(1.702 * x),
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x * expit(x),
    "relu_squared": lambda x: np.maximum(x, 0) ** 2,
    "sigmoid": expit,
    "tanh": np.tanh,
    "softplus": _softplus,
    "mish": lambda x: x * np.tanh(_softplus(x)),
    "elu": lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))),
    "hard_swish": lambda x: x * _hard_sigmoid(x, 1 / 6),
    "identity": lambda x: x,
}
"""Name → function, in float64. "identity" occurs only with a gate (a bilinear unit)."""


def _gelu_op(attrs: dict, x: np.ndarray) -> np.ndarray:
    return _gelu_tanh(x) if attrs.get("approximate", "none") == "tanh" else _gelu(x)


def _elu_op(attrs: dict, x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x, attrs.get("alpha", 1.0) * np.expm1(np.minimum(x, 0)))


def _selu_op(attrs: dict, x: np.ndarray) -> np.ndarray:
    return attrs.get("gamma", 1.05070098) * _elu_op({"alpha": attrs.get("alpha", 1.67326324)}, x)


def _clip_op(attrs: dict, x: np.ndarray, *bounds: np.ndarray | None) -> np.ndarray:
    low, high = (*bounds, None, None)[:2] if bounds else (attrs.get("min"), attrs.get("max"))
    return np.clip(x, -np.inf if low is None else low, np.inf if high is None else high)


def _of_all(function: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Callable[..., np.ndarray]:
    """A binary `function`, applied to one argument or more from left to right."""
    return lambda *args: reduce(function, args)


def _plain(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    return lambda attrs, *args: function(*args)


_OPS: dict[tuple[str, str], Callable[..., np.ndarray]] = {
    **{
        ("", op): _plain(function)
        for op, function in {
            "Abs": np.abs, "Add": np.add, "Cast": np.asarray, "Div": np.divide, "Erf": erf, "Exp": np.exp,
            "Identity": np.asarray, "Log": np.log, "Max": _of_all(np.maximum), "Min": _of_all(np.minimum),
            "Mish": KNOWN["mish"], "Mul": np.multiply, "Neg": np.negative, "Pow": np.power,
            "Reciprocal": np.reciprocal, "Relu": KNOWN["relu"], "Sigmoid": expit, "Softplus": _softplus,
            "Sqrt": np.sqrt, "Sub": np.subtract, "Tanh": np.tanh,
            "HardSwish": KNOWN["hard_swish"], "Softsign": lambda x: x / (1 + np.abs(x)),
        }.items()
    },
    ("", "Clip"): _clip_op,
    ("", "Elu"): _elu_op,
    ("", "Selu"): _selu_op,
    ("", "Gelu"): _gelu_op,
    ("", "HardSigmoid"): lambda attrs, x: _hard_sigmoid(x, attrs.get("alpha", 0.2), attrs.get("beta", 0.5)),
    ("", "LeakyRelu"): lambda attrs, x: np.where(x > 0, x, attrs.get("alpha", 0.01) * x),
    ("", "Swish"): lambda attrs, x: x * expit(attrs.get("alpha", 1.0) * x),
    ("", "ThresholdedRelu"): lambda attrs, x: np.where(x > attrs.get("alpha", 1.0), x, 0),
    ("com.microsoft", "Gelu"): _plain(_gelu),
    ("com.microsoft", "FastGelu"): _plain(_gelu_tanh),
    ("com.microsoft", "QuickGelu"): lambda attrs, x: x * expit(attrs.get("alpha", 1.702) * x),
}  # fmt: skip


_FLOATS = (TensorProto.BFLOAT16, TensorProto.DOUBLE, TensorProto.FLOAT, TensorProto.FLOAT16)


def is_elementwise(node: gs.Node) -> bool:
    """True if `evaluate` supports the op. A Cast must be to a float type: casts to integers round."""
    if node.op == "Cast" and node.attrs.get("to") not in _FLOATS:
        return False
    return (node.domain or "", node.op) in _OPS


def evaluate(nodes: Sequence[gs.Node], feeds: dict[int, np.ndarray], output: gs.Tensor) -> np.ndarray:
    """Run elementwise `nodes`, in topological order, in float64.

    Args:
        feeds: tensor id → values.
    """
    computed = dict(feeds)
    with np.errstate(all="ignore"):
        for node in nodes:
            args = [_value(tensor, computed) for tensor in node.inputs]
            computed[id(node.outputs[0])] = _OPS[node.domain or "", node.op](node.attrs, *args)
    return computed[id(output)]


def _value(tensor: gs.Tensor, computed: dict[int, np.ndarray]) -> np.ndarray | None:
    if not tensor.name:
        return None  # an omitted optional input
    return values(tensor).astype(np.float64).reshape(()) if isinstance(tensor, gs.Constant) else computed[id(tensor)]


def name_of(function: Function) -> str:
    """The name of `function` in `KNOWN`, or "unknown"."""
    with np.errstate(all="ignore"):
        actual = function(PROBES)
        return next((name for name, candidate in KNOWN.items() if _agree(actual, candidate(PROBES))), "unknown")


def is_linear(function: Function) -> bool:
    """True if f(x) = c x + d on the probe points."""
    actual = function(PROBES)
    near = actual[: len(_NEAR)]
    if not np.all(np.isfinite(near)):
        return False
    with np.errstate(all="ignore"):
        scale = np.abs(near).max() or 1.0  # the fit's error grows with the values
        return _agree(actual / scale, np.polyval(np.polyfit(_NEAR, near / scale, 1), PROBES))


def _agree(actual: np.ndarray, expected: np.ndarray) -> bool:
    """Whether two functions are the same at `PROBES`, along the first axis.

    Points far from 0 at which `actual` overflows do not count: a function written with Exp overflows there. The
    tolerance shrinks with the point, since all values near 0 of a function through 0 are small.
    """
    far, sizes = (each.reshape(-1, *[1] * (actual.ndim - 1)) for each in (_IS_FAR, _SIZES))
    return bool(
        np.all((np.abs(actual - expected) <= _TOLERANCE * (sizes + np.abs(expected))) | (far & ~np.isfinite(actual)))
    )


def find_gate(function: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> tuple[int, Function] | None:
    """The position of the gate in f(a, b) = g(gate) · up, and g; None if f is no such product.

    If both arguments could be the gate (a · b), the first one is.
    """
    for gate in (0, 1):

        def of(x: np.ndarray, up: np.ndarray, gate: int = gate) -> np.ndarray:
            return function(x, up) if gate == 0 else function(up, x)

        def act(x: np.ndarray, of: Callable[..., np.ndarray] = of) -> np.ndarray:
            return of(x, np.ones_like(x))

        with np.errstate(all="ignore"):
            actual = of(PROBES[:, None] + 0 * _GATED, _GATED + 0 * PROBES[:, None])
            if _agree(actual, act(PROBES)[:, None] * _GATED):
                return gate, act
    return None
