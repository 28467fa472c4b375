"""Surroundings of every test: no network, a cache of its own, one thread, and the evaluation data where present."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
from seeds import seeded
from tokenizers import Tokenizer, models, pre_tokenizers

from trimtab.compiler.sources import child, trial
from trimtab.passes import pass_class
from trimtab.passes.errors import ModelError

SHARED = Path(__file__).resolve().parents[2] / "shared"

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers share few cores
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a background job; children would ignore Ctrl-C likewise
    signal.signal(signal.SIGINT, signal.default_int_handler)
_OWNER = "PYTEST_XDIST_WORKER" not in os.environ
if _OWNER:  # workers inherit it, so that an export is made once
    os.environ["TRIMTAB_CACHE"] = tempfile.mkdtemp(prefix="trimtab-test-cache-")


for _name in ("ffn-topk", "ffn-threshold", "ffn-route"):
    # Of random weights, all that is left out is lost; what the passes refuse has tests of its own (test_max_error.py).
    pass_class(_name).model_fields["max_error"].default = None
    pass_class(_name).model_rebuild(force=True)


_TRY_IN_CHILD = trial.in_child


def _try_here(path: Path, origin: Path) -> str:
    """What the child does, without the second that a process of its own takes; test_trial.py has the child."""
    try:
        trial.read_graph(path)
    except ModelError as error:
        named = error.message if str(path) in error.message else f"{origin}: {error.message}"
        raise ModelError(named, hint=error.hint) from error
    return "read"


trial.in_child = _try_here

_RUN_MODULE = child.run_module
_HERE = {f"trimtab.compiler.sources.{name}" for name in ("architecture", "export", "gguf_unpack")}


def _run_here(module: str, arguments: Sequence[str], log_file: Path, timeout_s: float | None) -> int:
    """What a child of `_HERE` does, without the seconds in which it imports torch and transformers.

    Their children run in tests of commands that start a process of their own, such as the README's quickstart, and
    where a test takes the fixture `real_children`.
    """
    if module not in _HERE:
        return _RUN_MODULE(module, arguments, log_file, timeout_s)
    main: Callable[[Sequence[str]], int] = import_module(module).main
    with log_file.open("w") as output, redirect_stdout(output), redirect_stderr(output), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return main(arguments)
        except Exception:
            traceback.print_exc(file=output)
            return 1


child.run_module = _run_here


@cache
def _freeze(_what: str) -> None:
    """Let garbage collections pass by what is here for good: they would visit thousands of tests, and torch's parts."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _torch_seed() -> None:
    """Another seed of torch's own generator for each test, printed where the test fails, as `seeded` does for NumPy."""
    torch = sys.modules.get("torch")  # tests that do not import it need not wait for it
    _freeze("tests" if torch is None else "torch")
    if torch is not None:
        seed = int(seeded().integers(1 << 30))
        print(f"torch seed {seed}")
        torch.manual_seed(seed)


def pytest_unconfigure() -> None:
    if _OWNER:
        shutil.rmtree(os.environ["TRIMTAB_CACHE"], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not SHARED.is_dir():
        skip = pytest.mark.skip(reason=f"evaluation data is absent ({SHARED})")
        for item in items:
            if item.get_closest_marker("shared"):
                item.add_marker(skip)


@pytest.fixture
def try_in_child(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, Path], str]:
    """Foreign ONNX files are read in a child first, as outside of tests."""
    monkeypatch.setattr(trial, "in_child", _TRY_IN_CHILD)
    return _TRY_IN_CHILD


@pytest.fixture
def real_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hugging Face directories and GGUF files are read in children, as outside of tests."""
    monkeypatch.setattr(child, "run_module", _RUN_MODULE)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with evaluation data and checkpoints; tests that use it are marked `shared`."""
    if not SHARED.is_dir():
        pytest.skip(f"evaluation data is absent ({SHARED})")
    return SHARED


@pytest.fixture
def word_tokenizer(tmp_path: Path) -> Path:
    """Folder of a tokenizer whose words are w0 (token 2) to w99 (token 101); 0 is padding, 1 is any other word."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    words = {"[PAD]": 0, "[UNK]": 1, **{f"w{i}": i + 2 for i in range(100)}}
    tokenizer = Tokenizer(models.WordLevel(words, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"pad_token": "[PAD]"}')
    return folder
