"""A Profile comes back as it was written, belongs to one model, and is written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import save_file

from trimtab.passes import profile as profile_module
from trimtab.passes.errors import ProfileError
from trimtab.passes.profile import FFNStats, Profile, ProfileInfo

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


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    made().save(tmp_path / "p")
    whole = (tmp_path / "p").read_bytes()
    bad = tmp_path / "bad"
    for content in (b"", b"hello", whole[:7], whole[:100], whole[: len(whole) // 2], whole[:-1], bytes(64)):
        bad.write_bytes(content)
        with pytest.raises(ProfileError, match="bad"):
            Profile.load(bad)
    for missing in (tmp_path / "none", tmp_path):
        with pytest.raises(ProfileError, match="no such profile"):
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
