"""The dialect's plugins against NVIDIA's own layer; test_tensorrt.py runs this where `tensorrt` can be imported."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import builder
import numpy as np
import pytest
import tensorrt as trt
from builder import Tensor, create, launch, outputs_of, patch, tune
from counting import COUNTING
from counting_gpu import KERNEL as COUNTING_KERNEL
from seeds import seeded
from tensorrt.plugin._lib import QDP_REGISTRY

from trimtab.plugins import OPS
from trimtab.plugins.dialect import Form, Op
from trimtab.plugins.gpu import GpuKernel, Tile
from trimtab.plugins.gpu.compile import CAPABILITIES, Compiled, compile_kernel
from trimtab.plugins.gpu.ptx import assemble, parameters
from trimtab.plugins.packed_attention.launches import ATTENTION_RECEIVED, ATTENTION_ROWS
from trimtab.plugins.sparse_up import ACTIVATIONS
from trimtab.plugins.tensorrt import PLUGINS, Plugin, kernels, missing, register
from trimtab.plugins.tensorrt.kernels import kernel_of
from trimtab.plugins.tensorrt.register import _register as declare

FLOATS = ("FLOAT", "HALF", "BF16")
ONNX = {"FLOAT": "float", "HALF": "float16", "BF16": "bfloat16", "INT8": "int8", "INT32": "int32"}
RANGES = {"batch": (1, 4), "tokens": (1, 64), "selections": (1, 256), "k": (1, 24), "ends": (1, 9), "places": (1, 64)}
CAPABILITY = int(np.random.default_rng().choice(CAPABILITIES))


@pytest.fixture(scope="module", autouse=True)
def declared() -> None:
    assert missing() is None
    register(capability=CAPABILITY)
    register(PLUGINS)  # again: each is left as it is


@pytest.fixture(autouse=True)
def in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    patch(monkeypatch)


@dataclass(frozen=True)
class Case:
    """A node of an op: types of its inputs by name, and its attributes."""

    op: Op
    kinds: Mapping[str, str]
    attributes: Mapping[str, int | str]

    def __str__(self) -> str:
        return "-".join(
            [self.op.name, *(f"{n}.{k}" for n, k in self.kinds.items()), *map(str, self.attributes.values())]
        )

    @property
    def plugin(self) -> Plugin:
        return Plugin(self.op, tuple(self.kinds), tuple(o.name for o in self.op.outputs))

    @property
    def form(self) -> Form:
        return Form({name: f"tensor({ONNX[kind]})" for name, kind in self.kinds.items()}, self.attributes)


def cases() -> Iterator[Case]:
    """Every form that a graph can have, in every type that kernels read."""
    rng = seeded()
    for x, weight in itertools.product(FLOATS, (*FLOATS, "INT8")):
        beside = str(rng.choice([x, "FLOAT"]))
        scaled = weight == "INT8"
        for gate, biased in itertools.product((False, True), (False, True)):
            given = {"x": x, "blocks": "INT32", "up": weight, "up_scale": beside, "up_bias": beside}
            given |= {"gate": weight, "gate_scale": beside, "gate_bias": beside}
            taken = {
                name: kind
                for name, kind in given.items()
                if (scaled or not name.endswith("_scale"))
                and (biased or not name.endswith("_bias"))
                and (gate or not name.startswith("gate"))
            }
            attributes = {
                "activation": str(rng.choice(list(ACTIVATIONS))),
                "block": int(rng.choice([1, 2, 8])),
                "keep": 0,
                "at_most": int(rng.choice([0, 1])),
            }
            yield Case(OPS["SparseUp"], taken, attributes)
        scale = {"down_scale": beside} if scaled else {}
        attributes = {"block": int(rng.choice([1, 8])), "at_most": int(rng.choice([0, 1]))}
        yield Case(OPS["SparseDown"], {"h": x, "blocks": "INT32", "down": weight} | scale, attributes)
        if not scaled:
            yield Case(OPS["GatherBlocks"], {"x": x, "blocks": "INT32"}, attributes)
        for biased in (False, True):
            head = {"x": x, "blocks": "INT32", "weight": weight}
            head |= {"weight_scale": beside} if scaled else {}
            yield Case(OPS["SparseHead"], head | ({"weight_bias": beside} if biased else {}), {})
    for x, shared, shards, dense in itertools.product(FLOATS, (0, 1), (1, 4), (-1, 0, 7)):
        attributes = {
            "k": int(rng.integers(1, 24)),
            "shared": shared,
            "shards": shards,
            "dense_above": dense,
            "at_most": int(rng.choice([0, 1])),
        }
        yield Case(OPS["SelectBlocks"], {"scores": x}, attributes)
    yield from attentions(rng)


def attentions(rng: np.random.Generator) -> Iterator[Case]:
    for x, packed, biased, scaled in itertools.product(FLOATS, (False, True), (False, True), (False, True)):
        kinds = {"q": x} | ({} if packed else {"k": x, "v": x}) | {"offsets": "INT32"}
        kinds |= {"bias": str(rng.choice([x, "FLOAT"]))} if biased else {}
        kinds |= {"scale": "FLOAT"} if scaled else {}
        kv_heads = int(rng.choice([1, 2, 4]))
        attributes = {"heads": 4, "kv_heads": kv_heads if kv_heads < 4 else int(rng.choice([0, 4]))}
        yield Case(ATTENTION_ROWS, kinds, attributes)
        received = {name: kind for name, kind in kinds.items() if name != "v"} | {"log_sum_exp": "FLOAT"}
        yield Case(ATTENTION_RECEIVED, received, attributes)


CASES = list(cases())


def tensors_of(case: Case, rng: np.random.Generator) -> list[Tensor]:
    """Inputs of a layer: sizes of tokens and choices vary, or some are known."""
    if "heads" in case.attributes:
        return attended(case, rng)
    width, neurons = int(rng.choice([64, 96, 200])), 192
    lead = [["tokens"], ["batch", "tokens"], [1, "tokens"], [2, 3]][int(rng.integers(4))]
    one = bool(rng.integers(2))
    k = "k" if rng.integers(2) else 6
    block = int(case.attributes.get("block", 1))
    chosen = f"k*{block}" if k == "k" else 6 * block
    blocks = [1 if one else math.prod(lead) if all(isinstance(n, int) for n in lead) else "selections", k]
    fixed = {
        "x": [*lead, width],
        "h": [*lead, chosen],
        "blocks": blocks,
        "scores": [*lead, 48],
        "down": [neurons, width],
    }
    fixed |= {name: [neurons, width] for name in ("up", "gate", "weight")}
    return [Tensor(kind, fixed.get(name, [neurons])) for name, kind in case.kinds.items()]


def attended(case: Case, rng: np.random.Generator) -> list[Tensor]:
    """Inputs of an attention, whose bias has two to four axes."""
    heads, dim = int(case.attributes["heads"]), int(rng.choice([32, 40, 64]))
    kv_heads = int(case.attributes["kv_heads"]) or heads
    columns = heads if "k" in case.kinds else heads + 2 * kv_heads
    lead = [[], [1], [heads], [1, 1], [1, heads]][int(rng.integers(5))]
    shapes: dict[str, list[int | str]] = {name: ["tokens", kv_heads * dim] for name in ("k", "v")}
    shapes |= {"q": ["tokens", columns * dim], "offsets": ["ends"], "bias": [*lead, "places", "places"], "scale": []}
    shapes["log_sum_exp"] = ["tokens", heads]
    return [Tensor(kind, shapes[name]) for name, kind in case.kinds.items()]


def ranges(tensors: list[Tensor]) -> dict[str, tuple[int, int]]:
    names = {size for t in tensors for size in t.shape if isinstance(size, str)}
    return {name: RANGES[name] if name in RANGES else (1, 24 * int(name[2:])) for name in names}


def run_sizes(tensors: list[Tensor], rng: np.random.Generator) -> dict[str, int]:
    """Sizes of one run, in which selections are as many as tokens."""
    sizes = {name: int(rng.integers(low, high + 1)) for name, (low, high) in ranges(tensors).items()}
    lead = tensors[0].shape[:-1]
    sizes["selections"] = math.prod(sizes[n] if isinstance(n, str) else n for n in lead)
    return sizes | {name: sizes["k"] * int(name[2:]) for name in sizes if name.startswith("k*")}


def at(shape: list[int | str], sizes: Mapping[str, int]) -> list[int]:
    return [sizes[size] if isinstance(size, str) else size for size in shape]


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that are compiled to the constants that they would have in them."""

    def made(kernel: GpuKernel, form: Form, shapes: object, tile: Tile, *_: object) -> Compiled:
        constants = kernel.constants(form, shapes, tile)
        return Compiled("none", repr(constants), tile.warps * 32, 1024, constants)

    monkeypatch.setattr(kernels, "_compiled_kernels", {})
    monkeypatch.setattr(kernels, "_spilled_bytes", lambda ptx, capability: 0)
    monkeypatch.setattr("trimtab.plugins.gpu.compile.compile_kernel", made)


@pytest.mark.parametrize("name", PLUGINS)
def test_declarations(name: str) -> None:
    """Accepted by the validators, or they were not declared; what the layer understood is what the op declares."""
    plugin, known = PLUGINS[name], QDP_REGISTRY[f"trimtab::{name}"]
    assert tuple(known.input_tensor_names) == plugin.inputs
    assert list(known.input_attrs) == [a.name for a in plugin.op.attributes]
    assert list(known.aot_impl_attr_names) == list(known.autotune_attr_names) == list(known.input_attrs)
    assert known.impl_func is None, "an embedded kernel is all there is, so nothing has to choose"
    creator = trt.get_plugin_registry().get_creator(name, "1", "trimtab")
    assert [f.name for f in creator.field_names] == [a.name for a in plugin.op.attributes]


def test_no_other_names() -> None:
    with pytest.raises(ValueError, match="no plugin of trimtab is called 'SparseUp'"):
        register(["SparseUp"])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_shapes_and_launches(case: Case, uncompiled: None) -> None:
    """Of every tactic: the grid and the sizes that the kernel is told are right in runs of any size."""
    rng = seeded()
    tensors, kernel = tensors_of(case, rng), kernel_of(case.op)
    plugin = create(case.plugin.name, case.plugin.encode(case.attributes))
    assert plugin.attrs == case.plugin.encode(case.attributes)
    kinds, inferred = outputs_of(plugin, tensors)
    own = {"tensor(int32)": trt.int32, "tensor(float)": trt.float32}
    assert list(kinds) == [
        own[o.type] if o.follows is None else getattr(trt.DataType, case.kinds[o.follows]) for o in case.op.outputs
    ]
    descs, tactics = tune(plugin, tensors, ranges(tensors))
    static = {n: [s if isinstance(s, int) else -1 for s in t.shape] for n, t in zip(case.kinds, tensors, strict=True)}
    tiles = kernel.tiles(case.form, static)
    assert sorted(tactics) == list(range(1, len(tiles) + 1))
    for tactic, tile in enumerate(tiles, 1):
        made = launch(plugin, descs, tactic, outputs=len(kinds))
        assert [size.at({}) for size in made.block] == [tile.warps * 32, 1, 1]
        assert made.shared.at({}) == 1024
        for _ in range(3):
            sizes = run_sizes(tensors, rng)
            shapes = {name: at(list(t.shape), sizes) for name, t in zip(case.kinds, tensors, strict=True)}
            wanted = case.op.shapes({i.name: shapes.get(i.name) for i in case.op.inputs}, case.attributes)
            assert [[size.at(sizes) for size in shape] for shape in inferred] == list(wanted.values())
            if case.op.name == "SelectBlocks":
                assert wanted["blocks"] == selected(case, shapes["scores"])
            measured = kernel.measure(shapes | wanted)
            assert [size.at(sizes) for size in made.extra] == [measured[name] for name in kernel.sizes]
            constants = kernel.constants(case.form, shapes, tile)
            assert made.code.decode() == repr(constants)
            grid = [size.at(sizes) for size in made.grid]
            assert grid == [int(size) for size in kernel.grid(measured, constants, tile)]
            assert min(grid) > 0


def selected(case: Case, scores: list[int]) -> list[int]:
    """Shape of the chosen blocks, as the op's documentation has it."""
    tokens, limit = math.prod(scores[:-1]), int(case.attributes["dense_above"])
    if 0 <= limit < tokens:
        return [1, scores[-1]]
    return [1 if case.attributes["shared"] else tokens, int(case.attributes["k"])]


def test_one_token_needs_no_tiles_of_many(uncompiled: None) -> None:
    case = next(c for c in CASES if c.op.name == "SparseDown")
    tensors = [Tensor("FLOAT", [1, 1, 48]), Tensor("INT32", [1, 48]), Tensor("FLOAT", [192, 64])]
    plugin = create("SparseDownPlugin", {"block": 1, "at_most": 0})
    _, tactics = tune(plugin, tensors, {})
    tiles = kernel_of(case.op).tiles(case.form, {"h": [1, 1, 48], "blocks": [1, 48], "down": [192, 64]})
    assert {tiles[tactic - 1].tokens for tactic in tactics} == {1} != {tile.tokens for tile in tiles}


@pytest.mark.parametrize("spills", [False, True])
def test_tiles_that_ask_too_much_are_no_tactics(spills: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of shared memory, or of registers; the latter are better than none."""

    def made(kernel: GpuKernel, form: Form, shapes: object, tile: Tile, *_: object) -> Compiled:
        constants = kernel.constants(form, shapes, tile)
        return Compiled("none", str(tile.tokens), 32, kernels.SHARED_BUDGET + (tile.tokens > 16), constants)

    monkeypatch.setattr(kernels, "_compiled_kernels", {})
    monkeypatch.setattr(kernels, "_spilled_bytes", lambda ptx, capability: spills or ptx != "1")
    monkeypatch.setattr("trimtab.plugins.gpu.compile.compile_kernel", made)
    case = next(c for c in CASES if c.op.name == "SparseDown" and c.kinds["down"] != "INT8")
    tensors = [Tensor("FLOAT", ["tokens", 48]), Tensor("INT32", [1, 48]), Tensor("FLOAT", [192, 64])]
    plugin = create("SparseDownPlugin", {"block": 1, "at_most": 0})
    _, tactics = tune(plugin, tensors, ranges(tensors))
    tiles = kernel_of(case.op).tiles(case.form, {"h": [-1, 48], "blocks": [1, 48], "down": [192, 64]})
    most = 16 if spills else 1
    assert {tiles[tactic - 1].tokens for tactic in tactics} == {t.tokens for t in tiles if t.tokens <= most}


def some(count: int) -> list[Case]:
    """Of each op, some cases of the types that models have: weights in that of activations, or in int8."""
    rng = seeded()
    usual = [c for c in CASES if set(c.kinds.values()) & set(FLOATS) == {next(iter(c.kinds.values()))}]
    groups = [[c for c in usual if c.op.name == name] for name in {c.op.name for c in CASES}]
    return [group[int(n)] for group in groups for n in rng.choice(len(group), count, replace=False)]


@pytest.mark.parametrize("case", some(1), ids=str)
def test_kernels_take_what_is_given(case: Case) -> None:
    """What is embedded has pointers to the inputs, 32-bit sizes and a pointer to the output, and nothing more: so PTX
    declares it, and so the assembler has it in the machine code."""
    rng = seeded()
    tensors, kernel = tensors_of(case, rng), kernel_of(case.op)
    plugin = create(case.plugin.name, case.plugin.encode(case.attributes))
    descs, tactics = tune(plugin, tensors, ranges(tensors))
    for tactic in tactics:
        made = launch(plugin, descs, tactic, outputs=len(case.op.outputs))
        code = made.code.decode()
        types = [line.split()[1] for line in parameters(code)]
        assert types == [".u64"] * len(tensors) + [".u32"] * len(kernel.sizes) + [".u64"] * len(case.op.outputs)
        assert f".entry {made.kernel}(" in code
        assembled = assemble(code, CAPABILITY)
        assert assembled.parameter_bytes == tuple({".u64": 8, ".u32": 4}[kind] for kind in types)
        assert assembled.spilled_bytes == 0
        assert made.shared.at({}) <= kernels.SHARED_BUDGET


@pytest.mark.parametrize("named", [("values",), ("values", "places"), ("values", "total", "places")])
def test_several_outputs_and_counted_sizes(named: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two outputs have the size that a tensor behind them holds, at most that of x; those left out are not there."""
    monkeypatch.setattr(import_module("trimtab.plugins.tensorrt.register"), "kernel_of", lambda op: COUNTING_KERNEL)
    declared = Plugin(COUNTING, ("x",), named)
    assert declared.name == "_".join(["CountingPlugin", *named[1:]])
    declare(declared, CAPABILITY)
    plugin, tensors = create(declared.name, {}), [Tensor("HALF", ["tokens"])]
    kinds, shapes = outputs_of(plugin, tensors)
    wanted = {"values": trt.float16, "total": trt.float16, "places": trt.int32}
    assert list(kinds) == [*(wanted[name] for name in named), trt.int32]
    found = f"output {len(named)}"
    for counted in (0, 3, 40):
        sizes = {"tokens": 30, found: counted}
        for name, shape in zip(named, shapes, strict=False):
            assert [size.at(sizes) for size in shape] == ([] if name == "total" else [min(counted, 30)])
        assert list(shapes[-1]) == []
    descs, tactics = tune(plugin, tensors, RANGES)
    for tactic in tactics:
        made = launch(plugin, descs, tactic, outputs=len(kinds))
        types = [line.split()[1] for line in parameters(made.code.decode())]
        assert types == [".u64", ".u32", *[".u64"] * (len(named) + 1)]
        assert [size.at({"tokens": 30}) for size in made.extra] == [30]


def test_layers_that_are_alike_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def counted(*arguments: Any) -> Compiled:
        calls.append(arguments)
        return compile_kernel(*arguments)

    monkeypatch.setattr(kernels, "_compiled_kernels", {})
    monkeypatch.setattr("trimtab.plugins.gpu.compile.compile_kernel", counted)
    tensors = [Tensor("HALF", ["tokens", 48]), Tensor("INT32", [1, 48]), Tensor("HALF", [192, 64])]
    for _ in range(2):
        plugin = create("SparseDownPlugin", {"block": 1, "at_most": 0})
        descs, tactics = tune(plugin, tensors, ranges(tensors))
        for tactic in tactics:
            launch(plugin, descs, tactic)
    assert len(calls) == len({tile for *_, tile, _, _ in calls}) >= len(tactics)


def test_builder_is_what_it_says() -> None:
    """The stand-in for TensorRT's expressions computes, folds constants, and knows names."""
    made = builder.Builder().operation(trt.DimensionOperation.CEIL_DIV, builder.Expr.of("n"), builder.Expr.of(4))
    assert made.at({"n": 9}) == 3
