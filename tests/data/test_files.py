import csv
import json
import pickle
import time

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from luthier.data import files, hub, rows
from luthier.data.formatter import Formatted
from luthier.errors import UserError

ROWS = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(10)]


def write_as(path, suffix):
    path = path / f"rows{suffix}"
    if suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in ROWS))
    elif suffix == ".json":
        path.write_text(json.dumps(ROWS, indent=1))
    elif suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["question", "answer"])
            writer.writeheader()
            writer.writerows(ROWS)
    return path


def opened(path, split="train"):
    return files.open_split(files.open_splits(str(path)), split, str(path), "train_split")


@pytest.mark.parametrize(
    ("suffix", "place"),
    [(".jsonl", "line 3"), (".json", "row 3"), (".parquet", "row 3"), (".csv", "line 4")],
)
def test_formats_read_alike(tmp_path, suffix, place):
    path = write_as(tmp_path, suffix)
    read = opened(path)
    assert [read[i] for i in range(len(read))] == ROWS
    assert read.columns == ("question", "answer")
    assert read.place(2) == f"{path}, {place}"
    again = pickle.loads(pickle.dumps(read))
    assert again[9] == ROWS[9]
    assert again.fingerprint == read.fingerprint


def test_json_lines_count_blank_lines_and_take_a_byte_order_mark(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\n{"text": "\xc3\xa9"}')
    read = opened(path)
    assert [read[0], read[1]] == [{"text": "a"}, {"text": "é"}]
    assert read.place(1).endswith("line 3")


def test_content_changes_the_fingerprint(write):
    before = opened(write(ROWS)).fingerprint
    assert opened(write(ROWS)).fingerprint == before
    assert opened(write(ROWS[1:])).fingerprint != before


def test_folder_splits_by_name_and_globs_are_one_split(write, tmp_path):
    write(ROWS[:4], "set/train-0.jsonl")
    write(ROWS[4:6], "set/train-1.jsonl")
    write(ROWS[6:], "set/data/eval.jsonl")
    splits = files.open_splits(str(tmp_path / "set"))
    assert sorted(splits) == ["test", "train"]
    train = splits["train"]()
    assert [train[i] for i in range(len(train))] == ROWS[:6]
    assert train.place(4).endswith("train-1.jsonl, line 1")
    assert len(opened(tmp_path / "set" / "*.jsonl")) == 6
    assert len(opened(tmp_path / "set" / "**" / "*.jsonl")) == 10


def test_folder_of_parquet_shards_with_files_about_them(write, tmp_path):
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    for split, some in (("train", ROWS[:8]), ("test", ROWS[8:])):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(some), folder / "data" / f"{split}-00000.parquet")
    for name in ("dataset_infos.json", "dataset_dict.json", "README.md", "train_stats.json"):
        (folder / name).write_text("{}")
    assert {name: len(opened(folder, name)) for name in files.open_splits(str(folder))} == {"test": 2, "train": 8}


def test_folder_of_rows_with_files_about_them(write, tmp_path):
    write(ROWS, "set/rows.jsonl")
    (tmp_path / "set" / "dataset_info.json").write_text("{}")
    assert len(opened(tmp_path / "set")) == 10


def test_csv_fields_may_be_long(tmp_path):
    (tmp_path / "a.csv").write_text(f"text\n{'x' * 300_000}\n")
    assert opened(tmp_path / "a.csv")[0] == {"text": "x" * 300_000}


@pytest.mark.parametrize(
    ("split", "indices"),
    [
        ("train", range(10)),
        ("train[:3]", range(3)),
        ("train[-2:]", [8, 9]),
        ("train[20%:50%]", [2, 3, 4]),
        ("train[:10%]+train[90%:]", [0, 9]),
    ],
)
def test_slices(write, split, indices):
    read = opened(write(ROWS), split)
    assert [read[i] for i in range(len(read))] == [ROWS[i] for i in indices]
    assert read.place(0).endswith(f"line {indices[0] + 1}")


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("tran", "no split `tran` in"),
        ("tran", "which has train. Did you mean `train`?"),
        ("train[a:b]", "not a split"),
        ("train[10:]", "no rows"),
        ("train[:1000%]", "train[:1000%]: 1000% of the rows. Give a share from 0% to 100%"),
        ("train[-101%:]", "-101% of the rows"),
    ],
)
def test_wrong_splits(write, split, expected):
    with pytest.raises(UserError) as error:
        opened(write(ROWS), split)
    assert expected in str(error.value)


def test_held_out_rows_are_drawn_by_the_seed(write):
    read = opened(write(ROWS))

    def drawn(seed):
        return [[part[i]["question"] for i in range(len(part))] for part in files.hold_out(read, 0.3, seed)]

    train, held_out = drawn(0)
    assert len(held_out) == 3
    assert sorted(train + held_out) == sorted(row["question"] for row in ROWS)
    assert drawn(0) == [train, held_out]
    assert drawn(1) != [train, held_out]
    with pytest.raises(UserError, match="too few to hold any out"):
        files.hold_out(rows.Selected(read, np.array([0])), 0.5, 0)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', "a.jsonl, line 2: not valid JSON"),
        ("a.jsonl", b'{"a": 1}\n["b"]\n', "a.jsonl, line 2: list where an object"),
        ("a.jsonl", b'{"a": "\xff"}\n', "a.jsonl, line 1: not valid JSON: 'utf-8'"),
        ("a.json", b'[{"a": 1}, ]', "a.json: not valid JSON"),
        ("a.json", b'{\n"data": [{"a": 1}]}', "a.json, line 1: not valid JSON"),
        ("a.json", b'{\n"data": [{"a": 1}]}', "Give a list of rows, or one row a line"),
        ("a.json", b"[" * 200_000, "a.json: not valid JSON: maximum recursion depth"),
        ("a.jsonl", b'{"a": ' + b"[" * 200_000, "a.jsonl, line 1: not valid JSON: maximum recursion depth"),
        ("a.csv", b"a,b,a\n1,2,3\n", "a.csv, line 1: more than one column `a`"),
        ("a.json", b"[1]", "a.json, row 1: int where an object"),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", "a.csv, line 3: more or fewer fields than the header's 2"),
        ("a.csv", b"a,b\n1\n", "a.csv, line 2: more or fewer fields"),
        ("a.csv", b"a,b\n\xff,2\n", "not valid CSV in UTF-8"),
        ("a.parquet", b"nothing of the kind", "a.parquet: not a Parquet file"),
        ("a.txt", b"hello", "cannot read `.txt` files"),
        ("a.jsonl", b"", "no rows"),
    ],
)
def test_bad_files(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)

    def read_all():
        read = opened(tmp_path / name)
        return [read[index] for index in range(len(read))]

    with pytest.raises(UserError) as error:
        read_all()
    assert expected in str(error.value)


def test_missing_files(write, tmp_path):
    write(ROWS)
    for name, expected in (
        ("row.jsonl", "no such file or folder. Did you mean `rows.jsonl`?"),
        ("nowhere/", "no such file or folder"),
        ("*.parquet", "no .jsonl, .json, .parquet, .csv file matches"),
    ):
        with pytest.raises(UserError) as error:
            opened(tmp_path / name)
        assert expected in str(error.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="neither a saved dataset nor"):
        opened(tmp_path / "empty")


def test_saved_datasets(tmp_path):
    import datasets

    made = datasets.Dataset.from_list(ROWS)
    made.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": made, "validation": made.select([1])}).save_to_disk(str(tmp_path / "two"))
    read = opened(tmp_path / "one", "train[:2]")
    assert [read[0], read[1]] == ROWS[:2]
    assert read.fingerprint == opened(tmp_path / "one", "train[:2]").fingerprint
    validation = opened(tmp_path / "two", "validation")
    assert validation[0] == ROWS[1]
    assert validation.place(0) == f"{tmp_path / 'two'} (validation), row 1"
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(UserError, match="cannot load this folder"):
        opened(tmp_path / "one")


def test_hub_that_cannot_be_reached_is_said_quickly(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    began = time.perf_counter()
    with pytest.raises(UserError) as error:
        opened("someone/something")
    assert time.perf_counter() - began < 10
    for words in (
        "hf_path=someone/something",
        "cannot be reached",
        "https://huggingface.co/datasets/someone/something",
    ):
        assert words in str(error.value)


def test_hub_that_refuses_names_the_page_and_the_login(monkeypatch):
    import datasets

    def refuse(*_, **__):
        raise datasets.exceptions.DatasetNotFoundError("a gated dataset")

    monkeypatch.setattr(hub, "_ask", lambda *_: "")
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError) as error:
        hub.hub_splits("someone/gated", None, None, "hf_path")
    assert "https://huggingface.co/datasets/someone/gated" in str(error.value)
    assert "hf auth login" in str(error.value)


FORMATTER = """
def to_messages(row, drop_system=False):
    turns = [{"role": "user", "content": row["question"]}]
    if not drop_system:
        turns.insert(0, {"role": "system", "content": "s"})
    row["messages"] = turns
    return row

def fails(row):
    return row["nothing"]

def forgets(row):
    pass

number = 3
"""


@pytest.fixture
def formatters(tmp_path, monkeypatch):
    (tmp_path / "my_formatters.py").write_text(FORMATTER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "my_formatters", raising=False)
    return tmp_path


@pytest.mark.parametrize("path", ["my_formatters.to_messages", "my_formatters.py:to_messages"])
def test_formatter_by_module_or_file(formatters, write, path):
    raw = opened(write(ROWS))
    made = Formatted(raw, path, {"drop_system": True})
    assert made[1]["messages"] == [{"role": "user", "content": "q1"}]
    assert made.added == made.changed == ("messages",)
    assert made.place(1) == raw.place(1)
    assert made.fingerprint != Formatted(raw, path, {}).fingerprint
    assert pickle.loads(pickle.dumps(made))[1] == made[1]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("my_formatters.py:to_message", "no function `to_message` there. Did you mean `to_messages`?"),
        ("my_formatters.py:xyz", "It has: to_messages, fails, forgets"),
        ("my_formatters.py:number", "`number` is a int, not a function"),
        ("other.py:f", "no file other.py"),
        ("other_module.f", "No module named 'other_module'"),
        ("function", "no module named"),
        ("my_formatters.py:fails", "line 1: my_formatters.py:fails failed: KeyError: 'nothing'"),
        ("my_formatters.py:forgets", "returned NoneType; it should return the row, a dict"),
    ],
)
def test_wrong_formatters(formatters, write, path, expected):
    with pytest.raises(UserError) as error:
        Formatted(opened(write(ROWS)), path, {})[0]
    assert expected in str(error.value)


def test_missing_formatter_is_not_blamed_on_a_row(formatters, write):
    with pytest.raises(UserError, match=r"^formatting_func_path=other.py:f: no file other.py"):
        Formatted(opened(write(ROWS)), "other.py:f", {})


def test_formatter_that_changes_rows_in_place_leaves_the_source_alone(tmp_path):
    (tmp_path / "rows.json").write_text('[{"conversations": [1, 2, 3]}]')
    (tmp_path / "pops.py").write_text("def pops(row):\n    row['conversations'].pop()\n    return row\n")
    made = Formatted(opened(tmp_path / "rows.json"), f"{tmp_path}/pops.py:pops", {})
    assert [made[0]["conversations"] for _ in range(2)] == [[1, 2]] * 2
    assert made.changed == ("conversations",)
    assert made.added == ()


def test_formatter_whose_file_fails(formatters, write):
    (formatters / "broken.py").write_text("import nowhere_at_all\n")
    with pytest.raises(UserError, match="No module named 'nowhere_at_all'"):
        Formatted(opened(write(ROWS)), "broken.py:f", {})[0]
