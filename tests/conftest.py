"""Surroundings of every test: no network, a cache of its own, one thread, and the evaluation data where present."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from seeds import seeded
from tokenizers import Tokenizer, models, pre_tokenizers

from trimtab.compiler.sources import trial
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


@pytest.fixture(autouse=True)
def _torch_seed() -> None:
    """Another seed of torch's own generator for each test, printed where the test fails, as `seeded` does for NumPy."""
    torch = sys.modules.get("torch")  # tests that do not import it need not wait for it
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
