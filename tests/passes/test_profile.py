"""A Profile comes back as it was written, belongs to one model, and is written whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import save_file
from seeds import seeded

from trimtab.passes import profile as profile_module
from trimtab.passes.errors import ProfileError
from trimtab.passes.profile import FFNStats, Profile, ProfileInfo, Received

D_MODEL, D_FF = 6, 10


def made(layers: int = 2, model: str = "a" * 64) -> Profile:
    rng = np.random.default_rng(0)
    profile = Profile(ProfileInfo(model=model, data="b" * 64, samples=3, tokens=17, versions={"numpy": "2"}))
    for layer in range(layers):
        sums = (rng.random(D_FF) for _ in range(3))
        profile.set_ffn(layer, FFNStats(17, *sums, rng.normal(size=(8, D_MODEL)).astype(np.float32)))
    profile.tensors["learned.recover.layer.0.w"] = rng.random((2, 3)).T  # not contiguous
    return profile


def test_round_trip(tmp_path: Path) -> None:
    first = made()
    first.save(tmp_path / "p")
    again = Profile.load(tmp_path / "p")
    assert again.info == first.info
    assert again.tensors.keys() == first.tensors.keys()
    for name, value in first.tensors.items():
        assert again.tensors[name].dtype == value.dtype
        np.testing.assert_array_equal(again.tensors[name], value)
    stats = again.ffn(1, D_FF, D_MODEL)
    assert stats.tokens == 17
    np.testing.assert_array_equal(stats.square_sum, first.tensors["ffn.1.square_sum"])
    assert list(again.learned("recover")) == ["layer.0.w"]
    assert [file.name for file in tmp_path.iterdir()] == ["p"]


def test_another_models_profile_is_refused() -> None:
    profile = made()
    profile.check("a" * 64)
    with pytest.raises(ProfileError, match="another model"):
        profile.check("c" * 64)


@pytest.mark.parametrize(("layer", "d_ff", "d_model", "what"), [
    (5, D_FF, D_MODEL, "no statistics"), (0, D_FF + 1, D_MODEL, "neurons"), (0, D_FF, D_MODEL + 1, "inputs"),
])  # fmt: skip
def test_statistics_that_do_not_fit_are_refused(layer: int, d_ff: int, d_model: int, what: str) -> None:
    with pytest.raises(ProfileError, match=rf"layer {layer} FFN: .*{what}"):
        made().ffn(layer, d_ff, d_model)


def test_who_may_read_a_file_may_read_a_profile(tmp_path: Path) -> None:
    made().save(tmp_path / "p")
    (tmp_path / "other").touch()
    assert (tmp_path / "p").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    made().save(tmp_path / "p")
    whole = (tmp_path / "p").read_bytes()
    bad = tmp_path / "bad"
    for content in (b"", b"hello", whole[:7], whole[:100], whole[: len(whole) // 2], whole[:-1], bytes(64)):
        bad.write_bytes(content)
        with pytest.raises(ProfileError, match="bad"):
            Profile.load(bad)
    for missing, says in ((tmp_path / "none", "no such profile"), (tmp_path, "is a directory, not a profile")):
        with pytest.raises(ProfileError, match=says):
            Profile.load(missing)


@pytest.mark.parametrize("text", [None, "{", "[]", '{"format": 1}', '{"format": 99}', '{"format": 1, "model": 3}'])
def test_files_that_are_no_profile_are_refused(tmp_path: Path, text: str | None) -> None:
    metadata = None if text is None else {"trimtab": text}
    save_file({"x": np.zeros(3)}, tmp_path / "p", metadata=metadata)
    with pytest.raises(ProfileError, match="p: "):
        Profile.load(tmp_path / "p")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    made().save(tmp_path / "p")
    before = (tmp_path / "p").read_bytes()

    def fail(tensors: object, path: Path, metadata: object) -> None:
        Path(path).write_bytes(b"half")
        raise error

    monkeypatch.setattr(profile_module, "save_file", fail)
    with pytest.raises(ProfileError, match="No space"):
        made(3).save(tmp_path / "p")
    assert (tmp_path / "p").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["p"]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="cannot write"):
        made().save(tmp_path / "none" / "p")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["ffn.1.states", "ffn.0.abs_sum", "head.states", "learned.recover.layer.0.w"])
def test_nan_and_infinity_are_refused_wherever_they_come_from(tmp_path: Path, name: str, value: float) -> None:
    seed = int(np.random.default_rng().integers(1 << 30))
    print("seed", seed)
    profile = made()
    profile.set_head(np.zeros((4, D_MODEL), np.float16))
    profile.check("a" * 64)
    profile.save(tmp_path / "p")
    flat = profile.tensors[name] = np.array(profile.tensors[name], order="C")
    flat.reshape(-1)[np.random.default_rng(seed).integers(flat.size)] = value
    with pytest.raises(ProfileError, match=rf"the profile: 1 of .*'{name}'"):
        profile.check("a" * 64)
    before = (tmp_path / "p").read_bytes()
    with pytest.raises(ProfileError, match=rf"p: 1 of .*'{name}'"):
        profile.save(tmp_path / "p")
    assert (tmp_path / "p").read_bytes() == before
    save_file(profile.tensors, tmp_path / "q", metadata={"trimtab": profile.info.model_dump_json()})
    with pytest.raises(ProfileError, match=rf"q: 1 of .*'{name}'"):
        Profile.load(tmp_path / "q")


FORMS: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray | None], str]] = {
    "a statistic is missing": ("ffn.0.sum", lambda value: None, "'ffn.0.sum' is missing, and 'ffn.0.\\w+' is there"),
    "states as one row": ("ffn.1.states", np.ravel, r"'ffn.1.states' has the shape \[48\], not \[n, d_model\]"),
    "sums of fewer neurons": ("ffn.0.square_sum", lambda value: value[1:], "'ffn.0.square_sum' has 9 entries, and"),
    "a number for sums": ("ffn.0.abs_sum", np.sum, r"'ffn.0.abs_sum' has the shape \[\], not \[d_ff\]"),
    "two counts": ("ffn.1.tokens", lambda value: np.array([3, 4]), r"'ffn.1.tokens' has the shape \[2\], not \[\]"),
    "a count that is no integer": ("ffn.1.tokens", np.float32, "'ffn.1.tokens' has values of type float32"),
    "a negative count": ("ffn.1.tokens", np.negative, "'ffn.1.tokens' has a value of -17"),
    "negative sizes": ("ffn.0.abs_sum", np.negative, "'ffn.0.abs_sum' has a value of"),
    "states that are integers": ("ffn.0.states", lambda value: value.astype(np.int32), "has values of type int32"),
    "states of the head as a cube": ("head.states", lambda value: value[None], "'head.states' has the shape"),
    "attention of fewer lengths": (
        "attention.1.lengths",
        lambda value: value[1:],
        "'attention.1.lengths' has 7 entries",
    ),
    "attention without positions": ("attention.1.positions", lambda value: None, "positions' is missing"),
    "learned truth values are numbers": ("learned.recover.layer.0.w", lambda value: value > 0.5, ""),
    "learned numbers that are complex": ("learned.recover.layer.0.w", np.complex64, "of type complex64, not numbers"),
}


@pytest.mark.parametrize("what", FORMS)
def test_tensors_of_the_wrong_form_are_refused(tmp_path: Path, what: str) -> None:
    name, change, reason = FORMS[what]
    profile, rng = made(), seeded()
    profile.set_head(rng.normal(size=(4, D_MODEL)).astype(np.float16))
    lengths = rng.integers(1, 9, 8)
    profile.set_received(1, Received(rng.random(8).astype(np.float32), lengths, lengths - 1))
    profile.check("a" * 64)
    value = change(profile.tensors.pop(name))
    if value is not None:
        profile.tensors[name] = value
    save_file(
        {key: np.asarray(value, order="C") for key, value in profile.tensors.items()},
        tmp_path / "p",
        metadata={"trimtab": profile.info.model_dump_json()},
    )
    for refuse in (lambda: profile.check("a" * 64), lambda: Profile.load(tmp_path / "p")):
        if reason:
            with pytest.raises(ProfileError, match=reason):
                refuse()
        else:
            refuse()
