"""GPU kernels without a GPU: interpreted on the CPU, and compiled for every generation. With one: launched there."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from trimtab.plugins import OPS
from trimtab.plugins.dialect import Form
from trimtab.plugins.driver import gpu_present

pytest.importorskip("triton", reason="the Triton language is not installed")
pytest.importorskip("torch", reason="torch is not installed")

from trimtab.plugins.gpu.compile import CAPABILITIES, arguments, compile_kernel, forms
from trimtab.plugins.gpu.kernel import Tile
from trimtab.plugins.gpu.ptx import SHARED_BUDGET, assemble, only_parameters, parameters
from trimtab.plugins.tensorrt.kernels import has_kernel, kernel_of, launches, tactics

HERE = Path(__file__).parent
KERNELS = {name: kernel_of(op) for name, (op, _) in launches().items()}
"""Name of a launch → its kernel."""
HEADS = 12
SHAPES = {
    "q": (-1, HEADS * 64),
    "k": (-1, HEADS * 64),
    "v": (-1, HEADS * 64),
    "offsets": (-1,),
    "bias": (1, HEADS, -1, -1),
    "scores": (1, 11008),
    "up": (11008, 4096),
    "gate": (11008, 4096),
    "down": (11008, 4096),
    "weight": (32000, 4096),
}
FLOATS = ("float16", "bfloat16", "float")
TYPES = [(kind, kind) for kind in FLOATS] + [(kind, "int8") for kind in FLOATS]


def test_kernels_are_of_their_ops():
    assert set(KERNELS) >= {"SelectBlocks", "SparseUp", "SparseDown", "SparseHead", "AttentionRows"}
    assert all(kernel.op.name == name and OPS.get(name, kernel.op) is kernel.op for name, kernel in KERNELS.items())


@pytest.mark.slow
@pytest.mark.parametrize("op", [name for name, op in OPS.items() if has_kernel(op)])
def test_interpreted(op, tmp_path):
    seed = random.randrange(1 << 30)
    done = subprocess.run(
        [sys.executable, str(HERE / "interpreted.py"), op, str(seed)],
        env=os.environ | {"TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"seed {seed}\n{done.stderr[-3000:]}"


def test_several_outputs_and_counted_sizes(tmp_path):
    """Of an op for tests: interpreted with every choice of its outputs, and compiled without those left out."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(HERE / "counting_gpu.py")], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    from counting_gpu import KERNEL

    for unnamed, names in (((), ("total", "places")), (("total",), ("places",)), (("total", "places"), ())):
        form = Form({"x": "tensor(float16)"}, {}, frozenset(unnamed))
        made = compile_kernel(KERNEL, form, {"x": (-1,)}, Tile(1, 1, 64, 2), random.choice(CAPABILITIES))
        assert arguments(KERNEL, form) == ("x", "n", "values", *names, "found")
        assert len(parameters(made.ptx)) == 4 + len(names)


def form_of(op: str, float_: str, weight: str):
    """A form of the op with a gate and a bias, where it has such, and the shapes of LLaMA-7B's constants, BERT's q."""
    kernel = KERNELS[op]
    known = [i.name for i in kernel.op.inputs]
    scales = [name for name in known if name.endswith("_scale") and weight == "int8"]
    attributes = {"SelectBlocks": {"k": 550}, "SparseUp": {"activation": "silu"}}.get(op, {})
    attributes = {"heads": HEADS} if "q" in known else attributes
    if any(attribute.name == "at_most" for attribute in kernel.op.attributes):
        attributes |= {"at_most": random.randint(0, 1)}
    names = ["gate", "up_bias", "k", "v", *random.sample(["bias", "scale"], random.randint(0, 2)), *scales]
    form = forms(kernel, f"tensor({float_})", f"tensor({weight})", names, **attributes)
    return form, {name: shape for name, shape in SHAPES.items() if name in form.given}


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("op", KERNELS)
def test_compiled(op, capability):
    """No spills, shared memory in the budget, and the parameters that TensorRT gives; benchmarks/gpu/ptx.py has all.

    Some tiles of attention do not fit, and are not offered.
    """
    kernel = KERNELS[op]
    form, shapes = form_of(op, *random.choice(TYPES if op.startswith("Sparse") else TYPES[:3]))
    if "q" in shapes:
        dim = random.choice((8 * random.randint(1, 16), 32, 64, 128))
        shapes |= {name: (-1, HEADS * dim) for name in ("q", "k", "v") if name in shapes}
    number, tile = random.choice([*enumerate(kernel.tiles(form, shapes), 1)])
    made = compile_kernel(kernel, form, shapes, tile, capability)
    found = assemble(made.ptx, capability)
    told = form, shapes, tile, found
    names = arguments(kernel, form)
    assert names[-1] == kernel.op.outputs[-1].name
    assert found.parameter_bytes == tuple(4 if name in kernel.sizes else 8 for name in names), told
    assert len(parameters(made.ptx)) == len(names)
    assert found.registers * made.threads <= 65536, told
    fits = found.spilled_bytes == 0 and made.shared_bytes + found.static_shared_bytes <= SHARED_BUDGET
    assert fits or ("q" in shapes and number not in tactics(kernel, form, shapes, 4096, capability)), told


@pytest.mark.parametrize("op", KERNELS)
def test_grids_of_large_vocabularies_and_prompts(op):
    """CUDA takes 65535 programs along the second and third axis, and 2³¹ - 1 along the first."""
    kernel = KERNELS[op]
    form, shapes = form_of(op, "float16", "float16")
    many = 151936 if op == "SparseHead" else 11008
    for tile in kernel.tiles(form, shapes):
        first = {"scores": [100000, 11008]} if op == "SelectBlocks" else {"x": [4096, 4096], "h": [4096, many]}
        packed = {"q": [1 << 20, 768], "offsets": [1 << 15]} if "q" in shapes else {}
        sizes = kernel.measure({**first, **shapes, **packed, "blocks": [1, many]})
        x, y, z = kernel.grid(sizes, kernel.constants(form, shapes, tile), tile)
        assert 1 <= x < 1 << 31
        assert 1 <= y <= 65535 >= z >= 1


def test_scratch_memory_is_refused():
    ptx = ".visible .entry f(\n\t.param .u64 a,\n\t.param .u64 b\n)\n{\n\tld.param.u64 %rd1, [b];\n}"
    assert parameters(only_parameters(ptx.replace("[b]", "[a]"), 1)) == [".param .u64 a"]
    with pytest.raises(ValueError, match="scratch memory"):
        only_parameters(ptx, 1)


@pytest.mark.parametrize(
    ("op", "weight", "attributes", "reason"),
    [
        ("SparseUp", "uint8", {}, "int4"),
        ("SparseUp", "float16", {"keep": 3}, "keep"),
        ("SelectBlocks", "float16", {"k": 5, "shards": 4}, "shards"),
        ("AttentionRows", "float16", {"heads": 5}, "no multiple"),
        ("AttentionRows", "float16", {"heads": 4, "kv_heads": 3}, "no multiple"),
        ("AttentionReceived", "float16", {"heads": 2}, "wider"),
    ],
)
def test_refused(op, weight, attributes, reason):
    kernel = KERNELS[op]
    form = forms(kernel, "tensor(float16)", f"tensor({weight})", [], **attributes)
    with pytest.raises(ValueError, match=reason):
        compile_kernel(kernel, form, {"scores": (1, 11008), "up": (64, 32), "q": (-1, 1536)}, Tile(1, 1, 32, 1), 90)


@pytest.mark.slow
@pytest.mark.skipif(not gpu_present(), reason="no NVIDIA GPU: the kernels are interpreted instead")
def test_launched():
    """As benchmarks/gpu/kernels.py checks them, all types and tiles against float64."""
    benchmark = HERE.parents[1] / "benchmarks" / "gpu"
    code = "import checks; wrong = [row for row in checks.check() if not row['right']]; assert not wrong, wrong"
    subprocess.run([sys.executable, "-c", code], cwd=benchmark, check=True, timeout=600)
