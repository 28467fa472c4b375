"""Data files: what is in them is read as it is, and what is wrong in them is named by file and line."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import pickle
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from seeds import seeded

from trimtab.compiler.data import batches, class_number, label_values, read_data
from trimtab.compiler.data.limits import MAX_LINE, MAX_NAME
from trimtab.compiler.data.textfile import PAIRS
from trimtab.compiler.sources import Source
from trimtab.compiler.task import Task
from trimtab.passes.errors import DataError, ModelError

JSONL = '{"text": "one two", "label": 1}\n{"text": "drei — vier"}\n{"sentence": "five", "label": "good"}\n'
EXPECTED = [("one two", 1), ("drei — vier", None), ("five", "good")]


def write(path: Path, content: str | bytes) -> Path:
    raw = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


@pytest.mark.parametrize("pack", ["", ".gz"])
def test_jsonl(tmp_path: Path, pack: str) -> None:
    data = read_data(write(tmp_path / f"d.jsonl{pack}", JSONL))
    assert list(data.texts) == EXPECTED == list(data.texts)
    assert data.count == 3
    assert data.sha256 == hashlib.sha256(JSONL.encode()).hexdigest()


def test_txt_skips_blank_lines_and_keeps_odd_characters(tmp_path: Path) -> None:
    data = read_data(write(tmp_path / "D.TXT", "\ufeffone\r\n\n  \ntwo\u2028three\x0bfour\nlast"))
    assert list(data.texts) == [("one", None), ("two\u2028three\x0bfour", None), ("last", None)]


def test_tsv_with_header_without_and_with_quotes(tmp_path: Path) -> None:
    with_header = write(tmp_path / "a.tsv", 'idx\tLabel\tSentence\n0\t-1\tsay "hi\n1\tgood\tbye\n2\t\tnone\n')
    assert list(read_data(with_header).texts) == [('say "hi', -1), ("bye", "good"), ("none", None)]
    assert list(read_data(write(tmp_path / "b.tsv", "a b\t1\nc d\t0\n")).texts) == [("a b", None), ("c d", None)]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_pairs_under_every_name(tmp_path: Path, first: str, second: str) -> None:
    records = [{first: "w1 w2", second: "w3", "label": 0.5}, {first: "w4", second: "w5 w6", "label": 1, "other": "w7"}]
    expected = [(("w1 w2", "w3"), 0.5), (("w4", "w5 w6"), 1)]
    content = "".join(json.dumps(record) + "\n" for record in records)
    assert list(read_data(write(tmp_path / "d.jsonl", content)).texts) == expected
    rows = f"id\t{first.upper()}\tlabel\t{second}\n0\tw1 w2\t0.5\tw3\n1\tw4\t1\tw5 w6\n"
    assert list(read_data(write(tmp_path / "d.tsv", rows)).texts) == expected


def test_what_is_no_pair(tmp_path: Path) -> None:
    lines = '{"text": "a", "text_pair": null}\n{"text": "b", "query": "c", "document": "d"}\n{"sentence": "e"}\n'
    assert [text for text, _ in read_data(write(tmp_path / "d.jsonl", lines)).texts] == ["a", "b", "e"]


def test_labels_of_every_kind(tmp_path: Path) -> None:
    def labels(*values: object) -> list[object]:
        content = "".join(json.dumps({"text": "w1", "label": value}) + "\n" for value in values)
        return [label for _, label in read_data(write(tmp_path / "d.jsonl", content)).texts]

    assert labels(["spam", "toxic"], [], None, ["spam"]) == [("spam", "toxic"), (), None, ("spam",)]
    assert labels(1, 0.25, -3e2, None) == [1, 0.25, -300.0, None]
    assert labels("good", 2) == ["good", 2]
    tsv = write(tmp_path / "d.tsv", "sentence1\tsentence2\tscore\na\tb\t3.8\nc\td\t4\ne\tf\t1e-2\n")
    assert [label for _, label in read_data(tsv).texts] == [3.8, 4, 0.01]


def test_texts_of_like_length_come_together_as_pairs_too(tmp_path: Path) -> None:
    rng = seeded()
    sizes = rng.integers(1, 60, (40, 2))
    lines = "".join(json.dumps({"query": "q" * a, "passage": "p" * b}) + "\n" for a, b in sizes.tolist())
    lengths = [sum(map(len, text)) for text, _ in read_data(write(tmp_path / "d.jsonl", lines)).sample(40)]
    assert lengths == sorted(lengths) == sorted(sizes.sum(1).tolist())


def test_labels_as_their_task_has_them() -> None:
    classes, several, score = Task("classes", "y"), Task("labels", "y", "sigmoid"), Task("score", "y", "sigmoid")
    assert label_values([2, "b", "a"], classes, ("a", "b", "c"), 3).tolist() == [2, 1, 0]
    assert label_values([("c",), (), ("a", "c")], several, ("a", "b", "c"), 3).tolist() == [
        [False, False, True], [False] * 3, [True, False, True],
    ]  # fmt: skip
    assert label_values([1, 0.25], score, ("LABEL_0",), 1).tolist() == [[1.0], [0.25]]
    assert label_values([1, None], classes, None, 3) is None and label_values([1], Task("states", "y"), None, 3) is None
    assert label_values(np.array([[1, 0], [0, 0]]), several, None, 2).tolist() == [[True, False], [False, False]]
    assert label_values(np.array([0.5, 2]), score, None, 1).shape == (2, 1)
    for labels, task, message in (
        ([0.5], classes, "0.5 is a score"),
        ([("a",)], classes, "is a list"),
        ([3], classes, r"outside 0\.\.2"),
        (["a"], several, "is not a list"),
        ([1], several, "is not a list"),
        ([("a", "d")], several, "'d' is no class of the model; the model's are a, b, c"),
        (["a"], score, "'a' is a class"),
        ([("a",)], score, "is a class"),
        (np.array([0.5, 1]), classes, "float64"),
        (np.array([[0, 2, 0]]), several, "any number of 3 labels"),
        (np.array([[0.5, 1]]), Task("score", "y"), "3 scores"),
    ):
        with pytest.raises(DataError, match=message):
            label_values(labels, task, ("a", "b", "c"), 3)


def test_names_that_look_like_numbers_mean_the_same_in_every_file(tmp_path: Path) -> None:
    def cells(*texts: str) -> list[object]:
        content = "text\tlabel\n" + "".join(f"w\t{text}\n" for text in texts)
        return [label for _, label in read_data(write(tmp_path / "d.tsv", content)).texts]

    classes = Task("classes", "y")
    for names in (("1", "2", "3"), ("2", "0", "1"), ("007", "7", "+1"), ("1.0", "1e5", "x"), ("3.9", "3.10", "-1")):
        content = "".join(json.dumps({"text": "w", "label": name}) + "\n" for name in names)
        written = [label for _, label in read_data(write(tmp_path / "d.jsonl", content)).texts]
        for labels in (cells(*names), written):
            assert label_values(labels, classes, names, 3).tolist() == [0, 1, 2]
    assert label_values(cells("1", "0"), classes, ("a", "b"), 2).tolist() == [1, 0]  # numbers, where no name is one
    assert [class_number(label, ("1", "2")) for label in cells("-1")] == [-1]
    with pytest.raises(DataError, match="label '0' is no class of the model; the model's are 1, 2, 3"):
        label_values(cells("1", "0"), classes, ("1", "2", "3"), 3)
    names = ["007", "\u0661", "+1", "9" * 20, "9" * MAX_NAME, "1e999", "0x1", "1_0", "--1"]
    assert cells(*names) == names
    assert cells("-0", str((1 << 63) - 1), str(1 << 63)) == [0, (1 << 63) - 1, str(1 << 63)]
    assert [float(cell) for cell in cells(".5", "5.", "+0.25", "1E-2", "3")] == [0.5, 5, 0.25, 0.01, 3]
    assert label_values(cells("2", "0.5"), Task("score", "y"), ("1", "2"), 1).tolist() == [[2.0], [0.5]]
    for cell in pickle.loads(pickle.dumps(cells("12", "0.50"))):
        assert str(float(cell)) == str(float(cell.text))


@pytest.mark.parametrize(("name", "content", "message"), [
    ("d.jsonl", b'{"text": "a", "text_pair": "b"}\n{"text": "a"}\n', "line 2: a single text, where line 1 has a pair"),
    ("d.jsonl", b'{"text": "a"}\n{"text": "a"}\n{"text": "a", "text_pair": "b"}\n', "line 3: a pair of texts, where"),
    ("d.jsonl", b'{"text": "a", "text_pair": " "}\n', "line 1: the second text is ' '"),
    ("d.jsonl", b'{"text": "a", "text_pair": ["b"]}\n', "line 1: the second text is"),
    ("d.tsv", b"query\tpassage\na\t\n", "line 2: the second text is empty"),
    ("d.jsonl", b'{"text": "a", "label": 1}\n{"text": "a", "label": 0.5}\n{"text": "a", "label": "b"}\n',
     "line 3: the label is a class name, where line 2 has a score"),
    ("d.jsonl", b'{"text": "a", "label": []}\n{"text": "a", "label": "b"}\n', "line 2: .* line 1 has a list of class"),
    ("d.jsonl", b'{"text": "a", "label": 1}\n{"text": "a", "label": ["b"]}\n', "line 2: .* line 1 has a whole number"),
    ("d.jsonl", b'{"text": "a", "label": ["b", "b"]}\n', "names a class twice"),
    ("d.jsonl", b'{"text": "a", "label": [0, 1]}\n', "a list of other things than class names"),
    ("d.jsonl", b'{"text": "a", "label": NaN}\n', "no finite number"),
    ("d.jsonl", b'{"text": "a", "label": 1e999}\n', "no finite number"),
    ("d.jsonl", b'{"text": "a", "label": 99999999999999999999}\n', "no number of 64 bits"),
    ("d.jsonl", b'{"text": "a", "label": {"b": 1}}\n', "line 1: label"),
    ("d.txt", b"fine\ncaf\xe9\n", "line 2: not UTF-8"),
    ("d.txt.gz", b"fine\ncaf\xe9\n", "line 2: not UTF-8"),
    ("d.jsonl", b'{"text": "a"}\n{"text": "b"\n', "line 2: not JSON"),
    ("d.jsonl", b'{"text": "a"}\n\n', "line 2: not JSON"),
    ("d.jsonl", b'"a"\n', "line 1: not a JSON object"),
    ("d.jsonl", b'{"body": "a", "id": 3}\n', r"line 1: no 'text' among its keys \('body', 'id'\)"),
    ("d.jsonl", b'{"text": 3}\n', "line 1: the text is 3"),
    ("d.jsonl", b'{"text": " "}\n', "line 1: the text is ' '"),
    ("d.jsonl", b'{"text": "a", "label": [1]}\n', "line 1: label"),
    ("d.jsonl", b'{"text": "a", "label": true}\n', "line 1: label"),
    ("d.jsonl", b'{"text": "\\ud800"}\n', "line 1: .*surrogate"),
    ("d.tsv", b"label\ttext\n1\ta\n0\n", "line 3: 1 columns"),
    ("d.tsv", b"label\ttext\n1\t\n", "line 2: the text is empty"),
    ("d.txt", b"", "holds no text"),
    ("d.txt", b"\n \n", "holds no text"),
    ("d.tsv", b"text\tlabel\n", "holds no text"),
    ("d.csv", b"a", "unknown kind '.csv'"),
    ("d", b"a", "unknown kind"),
    ("d.npz", b"PK\x03\x04 no", "not an .npz"),
    ("d.npz", b"\x93NUMPY\x01\x00", "not an .npz"),
    ("d.tsv", b"text\tlabel\na\t" + b"9" * (MAX_NAME + 1), "line 2: label '9+.* over the limit of 1000"),
    ("d.jsonl", b'{"text": "a", "label": ["' + b"b" * (MAX_NAME + 1) + b'"]}', "line 1: .* over the limit of 1000"),
    ("d.jsonl", b'{"text": "a", "label": 1' + b"0" * 5000 + b"}", "line 1: holds an integer of thousands of digits"),
    ("d.jsonl", b'{"text": "a"}\n{"text": "a", "more": ' + b"[" * 70 + b"]" * 70 + b"}", "line 2: nested deeper"),
    ("d.txt", b"a\n" + b"b " * (MAX_LINE // 2 + 1), f"line 2: over the limit of {MAX_LINE} bytes"),
    ("d.jsonl.gz", b'{"text": "' + b"b " * (MAX_LINE // 2) + b'"}', f"line 1: over the limit of {MAX_LINE} bytes"),
])  # fmt: skip
def test_what_is_wrong_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        read_data(write(tmp_path / name, content))
    assert str(tmp_path / name) in error.value.message


def test_a_damaged_gzip_file(tmp_path: Path) -> None:
    packed = gzip.compress("\n".join(f"text {i}" for i in range(3000)).encode())
    for content in (b"plain text\n", packed[:-9], packed[: len(packed) // 2], packed[:50] + bytes(50) + packed[100:]):
        (tmp_path / "d.txt.gz").write_bytes(content)
        with pytest.raises(DataError, match="cannot be read"):
            read_data(tmp_path / "d.txt.gz")
    with pytest.raises(DataError, match="no such file"):
        read_data(tmp_path / "none.txt")


def test_sample_is_uniform_without_replacement_and_repeatable(tmp_path: Path) -> None:
    lines = [f"{i:03d}" for i in range(60)]
    data = read_data(write(tmp_path / "d.txt", "\n".join(lines)))
    assert list(data.sample(7, seed=3)) == list(data.sample(7, seed=3)) != list(data.sample(7, seed=4))
    assert sorted(text for text, _ in data.sample(1000)) == lines
    counts: Counter[str] = Counter()
    for seed in range(400):
        chosen = [text for text, _ in data.sample(6, seed)]
        assert len(set(chosen)) == 6
        counts.update(chosen)
    expected = 400 * 6 / 60
    assert 25 < sum((counts[line] - expected) ** 2 / expected for line in lines) < 100  # chi-square, 59 degrees


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    peaks = []
    for count in (2_000, 20_000):
        path = write(tmp_path / f"{count}.jsonl", (json.dumps({"text": "word " * 50}) + "\n") * count)
        tracemalloc.start()
        data = read_data(path)
        assert sum(1 for _ in data.sample(count)) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] * 1.2


def inputs(*names: str, dtype: type = np.int64) -> list[gs.Variable]:
    return [gs.Variable(name, dtype, ["batch", "tokens"]) for name in names]


def source(tokenizer: Path | None) -> Source:
    return Source("m", Path("m.onnx"), tokenizer, None, 9, "onnx")


def test_batches_of_texts(tmp_path: Path, word_tokenizer: Path) -> None:
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{j}" for j in rng.integers(0, 20, n)) for n in rng.integers(1, 15, 50)]
    data = read_data(write(tmp_path / "d.txt", "\n".join(texts)))
    wanted = [gs.Variable("input_ids", np.int32, ["b", "t"]), *inputs("position_ids")]
    seen = []
    for feeds in batches(data, source(word_tokenizer), 8, 12, 50, inputs=wanted):
        ids, mask = feeds["input_ids"], feeds["attention_mask"]
        assert set(feeds) == {"input_ids", "attention_mask", "position_ids"}
        assert ids.dtype == np.int32 and feeds["position_ids"].dtype == np.int64
        assert len(ids) <= 8 and ids.shape == mask.shape == feeds["position_ids"].shape
        assert ids.shape[1] == mask.sum(1).max() <= 9  # the model's limit, which is below ours
        seen += [tuple(row[keep]) for row, keep in zip(ids, mask.astype(bool), strict=True)]
    ordered = [tuple(int(word[1:]) + 2 for word in text.split()[:9]) for text, _ in data.sample(50)]
    assert seen == ordered
    assert Counter(seen) == Counter(tuple(int(word[1:]) + 2 for word in text.split()[:9]) for text in texts)
    orders = ([tuple(r) for f in batches(data, source(word_tokenizer), size, 12, 50, inputs=wanted)
               for r in f["input_ids"][:, :1]] for size in (1, 7, 50))  # fmt: skip
    assert all(a == b for a, b in itertools.pairwise(orders))


def test_a_decoder_gets_an_empty_cache(tmp_path: Path, word_tokenizer: Path) -> None:
    data = read_data(write(tmp_path / "d.txt", "w1 w2\nw3"))
    cache = gs.Variable("past_key_values.0.key", np.float16, ["batch", 4, "past", 8])
    (feeds,) = batches(data, source(word_tokenizer), inputs=[*inputs("input_ids"), cache])
    assert feeds[cache.name].shape == (2, 4, 0, 8) and feeds[cache.name].dtype == np.float16


def test_texts_for_a_model_that_takes_none(tmp_path: Path, word_tokenizer: Path) -> None:
    data = read_data(write(tmp_path / "d.txt", "a\nb"))
    with pytest.raises(DataError, match="do not give the input 'pixel_values'"):
        next(batches(data, source(word_tokenizer), inputs=inputs("pixel_values")))
    with pytest.raises(ModelError, match="no tokenizer"):
        next(batches(data, source(None), inputs=inputs("input_ids")))


def test_batches_of_tensors(tmp_path: Path) -> None:
    ids, x = np.arange(22, dtype=np.int32).reshape(11, 2), np.random.default_rng(0).random((11, 3))
    np.savez(tmp_path / "d.npz", ids=ids, x=x)
    data = read_data(tmp_path / "d.npz")
    assert data.count == 11
    wanted = [*inputs("ids"), gs.Variable("x", np.float32, ["batch", 3])]
    found = list(batches(data, source(None), 4, samples=10, inputs=wanted))
    assert [len(feeds["x"]) for feeds in found] == [4, 4, 2]
    assert found[0]["ids"].dtype == np.int64 and found[0]["x"].dtype == np.float32
    rows = np.concatenate([feeds["ids"] for feeds in found])[:, 0] // 2
    assert len(set(rows)) == 10
    np.testing.assert_array_equal(np.concatenate([feeds["x"] for feeds in found]), x[rows].astype(np.float32))
    with pytest.raises(DataError, match="texts are needed"):
        _ = data.texts


@pytest.mark.parametrize(("arrays", "message"), [
    ({}, "no samples"),
    ({"ids": np.zeros((0, 2), np.int64)}, "no samples"),
    ({"ids": np.int64(3)}, "no samples"),
    ({"ids": np.zeros((2, 2)), "x": np.zeros((3, 2))}, "differ in the number"),
    ({"ids": np.array([[1.0, np.nan]])}, "NaN or Inf"),
    ({"ids": np.array([{}, {}])}, "'ids.npy' is not an array of plain numbers"),
    ({"ids": np.array(["w0", "w1"])}, "'ids.npy' is not an array of plain numbers"),
    ({"ids": np.zeros((3, 2), np.complex64)}, "'ids.npy' is not an array of plain numbers"),
    ({"ids": np.zeros((3, 0), np.int64)}, r"'ids' has the shape \[3, 0\], so its samples are empty"),
])  # fmt: skip
def test_tensors_that_cannot_be_used(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(DataError, match=message):
        read_data(tmp_path / "d.npz")


@pytest.mark.parametrize(("arrays", "message"), [
    ({"idz": np.zeros((2, 2), np.int64)}, r"\['idz'\].*\['ids'\]"),
    ({"ids": np.zeros((2, 2))}, "float64"),
    ({"ids": np.zeros((2, 2, 2), np.int64)}, r"shape \(2, 2, 2\)"),
])  # fmt: skip
def test_tensors_that_do_not_fit_the_model(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(DataError, match=message):
        next(batches(read_data(tmp_path / "d.npz"), source(None), inputs=inputs("ids")))


@pytest.mark.shared
def test_evaluation_data_is_read(shared: Path) -> None:
    data = read_data(shared / "data" / "sst2" / "test.jsonl.gz")
    assert data.count == 872
    assert {label for _, label in data.texts} == {0, 1}
