import errno
import json
import multiprocessing

import numpy as np
import pytest
import templates

from luthier.data import source, store
from luthier.errors import RunError, UserError

EXCHANGES = [{"question": "hello " * (i % 7 + 1), "answer": "world " * (i % 5 + 1)} for i in range(40)]


def load(keys, tokenizer, **values):
    return source.load(keys(**values), tokenizer)


def all_batches(rows, **options):
    settings = {"batch_size": 2, "seed": 0, "shuffle": True, "num_epochs": 1.0} | options
    return list(source.batches(rows.packed, **settings))


def conversations(batches) -> list[list[int]]:
    """Return the tokens of each segment of each row."""
    found = []
    for item in batches:
        batch = item["batch"]
        for tokens_T, segments_T in zip(batch.tokens_BT, batch.segments_BT, strict=True):
            found += [tokens_T[segments_T == n].tolist() for n in range(1, segments_T.max() + 1)]
    return found


def rows_of(batches) -> list[int]:
    return [row for item in batches for row in item["rows"].tolist() if row >= 0]


@pytest.mark.parametrize("packing", [True, False])
def test_every_token_comes_once(write, keys, tokenizer, packing):
    write(EXCHANGES)
    rows, held_out = load(keys, tokenizer, packing=packing)
    assert held_out is None
    expected = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
        )["input_ids"]
        for row in EXCHANGES
    ]
    batches = all_batches(rows)
    assert sorted(conversations(batches)) == sorted(expected)
    assert all(item["batch"].tokens_BT.shape == (2, 64) for item in batches)
    trained = sum(int(item["batch"].mask_BT.sum()) for item in batches)
    report = rows.report
    assert (report.rows, report.tokens, report.trained_tokens) == (40, sum(map(len, expected)), trained)
    assert (len(rows) < 40) == packing
    assert len(rows) == report.packed_rows
    assert sorted(i for row in range(len(rows)) for i in rows.source_rows(row)) == list(range(40))
    assert rows.places(0)[0].endswith(f"rows.jsonl, line {rows.source_rows(0)[0] + 1}")
    assert report.summary().startswith("40 rows (question, answer); ")
    assert (report.schema, report.columns) == ("question", "question, answer")


def test_optional_column_of_a_late_row_is_read(write, keys, tokenizer):
    rows = [{"instruction": "hello", "output": "world"}] * 120
    write([*rows, rows[0] | {"input": "lazy dog"}])
    rows, _ = load(keys, tokenizer, packing=False, enable_data_shuffling=False)
    assert "lazy dog" in tokenizer.decode(rows.example(120).ids_T)
    assert "lazy dog" not in tokenizer.decode(rows.example(119).ids_T)


def test_unshuffled_and_unpacked_rows_keep_their_order(write, keys, tokenizer):
    write(EXCHANGES)
    rows, _ = load(keys, tokenizer, packing=False, enable_data_shuffling=False)
    assert [rows.source_rows(i) for i in range(40)] == [[i] for i in range(40)]
    assert rows_of(all_batches(rows, shuffle=False)) == list(range(40))


def test_second_load_reads_the_cache(write, keys, tokenizer, monkeypatch):
    write(EXCHANGES)
    first, _ = load(keys, tokenizer)
    monkeypatch.setattr(store, "tokenise_range", None)
    again, _ = load(keys, tokenizer)
    np.testing.assert_array_equal(again.example(0).ids_T, first.example(0).ids_T)
    load(keys, tokenizer, max_target_length=128)
    for changed in ({"chat_template": templates.LLAMA3}, {"sft_train_on_completion_only": False}):
        with pytest.raises(TypeError):
            load(keys, tokenizer, **changed)


@pytest.mark.multiprocess
def test_processes_make_the_same_tokens(write, keys, tokenizer, monkeypatch):
    write(EXCHANGES)
    alone, _ = load(keys, tokenizer)
    monkeypatch.setattr(store, "ROWS_WORTH_PROCESSES", 1)
    monkeypatch.setattr(store, "CHUNK", 16)
    config = keys(grain_worker_count=2)
    rows, _ = source.open_rows(config)
    job = store.Job(rows, source.selection(config, rows), tokenizer, source.chat.rendering(config, tokenizer))
    chunks = list(store._chunks(job, 2))
    assert len(chunks) == 3
    np.testing.assert_array_equal(np.concatenate([chunk.ids_T for chunk in chunks]), alone.packed.tokens.ids_T)
    write([*EXCHANGES, {"question": "a", "answer": None}])
    rows, _ = source.open_rows(config)
    with pytest.raises(UserError, match="line 41: column `answer`: null"):
        list(store._chunks(store.Job(rows, job.selection, tokenizer, job.how), 2))


def test_bad_row_is_named_and_nothing_is_cached(write, keys, tokenizer, tmp_path):
    path = write([*EXCHANGES, {"question": "a", "answer": None}])
    for _ in range(2):
        with pytest.raises(UserError) as error:
            load(keys, tokenizer)
        assert str(error.value).startswith(f"{path}, line 41: column `answer`: null where text should be")
    assert not list(tmp_path.glob("cache/luthier/tokens/*"))


def test_progress_is_told_up_to_the_end_and_not_too_often(write, keys, tokenizer, monkeypatch):
    monkeypatch.setattr(store, "CHUNK", 4)
    write(EXCHANGES)
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(store, "PROGRESS_SECONDS", 0.0)
    source.load(keys(), tokenizer, lambda *counts: told.append(counts))
    assert told == [(done, 40) for done in range(4, 41, 4)]
    source.load(keys(), tokenizer, lambda *counts: told.append(counts))
    assert len(told) == 10
    monkeypatch.setattr(store, "PROGRESS_SECONDS", 3600.0)
    source.load(keys(sft_train_on_completion_only=False), tokenizer, lambda *counts: told.append(counts))
    assert told[10:] == [(40, 40)]


@pytest.mark.multiprocess
def test_progress_is_told_by_processes_too(write, keys, tokenizer, monkeypatch):
    monkeypatch.setattr(store, "ROWS_WORTH_PROCESSES", 1)
    monkeypatch.setattr(store, "CHUNK", 16)
    monkeypatch.setattr(store, "PROGRESS_SECONDS", 0.0)
    write(EXCHANGES)
    told: list[tuple[int, int]] = []
    source.load(keys(grain_worker_count=2), tokenizer, lambda *counts: told.append(counts))
    assert told == [(16, 40), (32, 40), (40, 40)]


def test_full_disk_names_the_folder(write, keys, tokenizer, monkeypatch, tmp_path):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    write(EXCHANGES)
    monkeypatch.setattr(np, "save", full)
    with pytest.raises(RunError, match=r"cannot write tokens to .*luthier/tokens: .*No space left.*XDG_CACHE_HOME"):
        load(keys, tokenizer)
    assert not list(tmp_path.glob("cache/luthier/tokens/*"))


def test_cache_folder_that_cannot_be_made_is_said_before_rows_are_read(write, keys, tokenizer, monkeypatch, tmp_path):
    write(EXCHANGES)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(store, "tokenise_range", None)
    with pytest.raises(RunError, match=r"cannot write tokens to .*XDG_CACHE_HOME"):
        load(keys, tokenizer)


def test_template_that_refuses_a_row_names_it(write, keys, tokenizer):
    write([{"messages": [{"role": "assistant", "content": "a"}]}])
    with pytest.raises(UserError, match=r"line 1: the chat template fails .*roles must alternate"):
        load(keys, tokenizer, chat_template=templates.ALTERNATING)


def test_overlong_rows_are_cut_or_dropped_and_counted(write, keys, tokenizer):
    write([*EXCHANGES, {"question": "hello", "answer": "world " * 300}, {"question": "hello " * 300, "answer": "b"}])
    cut, _ = load(keys, tokenizer)
    assert (cut.report.truncated, cut.report.untrained, cut.report.dropped) == (1, 1, 0)
    assert cut.report.conversations == 41
    assert any(
        "the prompt alone fills max_target_length=64" in text and "line 42" in text for text in cut.report.warnings
    )
    assert max(map(len, conversations(all_batches(cut)))) == 64
    dropped, _ = load(keys, tokenizer, overlong_rows="drop")
    assert (dropped.report.truncated, dropped.report.untrained, dropped.report.dropped) == (0, 0, 2)
    assert dropped.report.conversations == 40


@pytest.mark.parametrize(
    ("rows", "values", "expected"),
    [
        ([{"question": "hello " * 300, "answer": "b"}], {}, "prompts alone fill it"),
        ([{"question": "hello " * 300, "answer": "b"}], {"overlong_rows": "drop"}, "all 1 rows are over"),
        ([{"messages": [{"role": "user", "content": "a"}]}], {}, "none of its 1 rows has a trained token"),
    ],
)
def test_nothing_to_train_is_refused(write, keys, tokenizer, rows, values, expected):
    write(rows)
    with pytest.raises(UserError, match=expected):
        load(keys, tokenizer, **values)


def test_untrained_rows_and_missing_ends_are_warned_of(write, keys, tokenizer):
    write([{"messages": [{"role": "user", "content": "a"}]}, EXCHANGES[0] | {"messages": [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}])  # fmt: skip
    rows, _ = load(keys, tokenizer, chat_template=templates.MARKED_WITHOUT_END)
    assert any("no trained token" in text and "1 of 2 rows" in text for text in rows.report.warnings)
    assert any("no end-of-turn token" in text for text in rows.report.warnings)


def test_empty_replies_are_counted_named_and_refused_where_there_is_nothing_else(write, keys, tokenizer, tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,completion\na,b\nc,\nd,e\n")
    path = str(tmp_path / "rows.csv")
    rows, _ = load(keys, tokenizer, hf_path=path)
    (warning,) = rows.report.warnings
    assert warning.startswith("an empty reply")
    assert warning.endswith("(1 of 3 rows: " + path + ", line 3)")
    for bad in ({"prompt": "a", "completion": ""}, {"messages": [{"role": "assistant", "content": []}]}):
        write([bad, bad])
        with pytest.raises(UserError, match=r"a reply is empty in each of its 2 rows \(first: .*line 1\)"):
            load(keys, tokenizer)


def test_formatter_runs_before_the_columns_are_checked(write, keys, tokenizer, tmp_path):
    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    write([{"conversations": turns}])
    (tmp_path / "mine.py").write_text(
        "def keep(row, drop_system=False):\n"
        "    names = {'human': 'user', 'gpt': 'assistant', 'system': 'system'}\n"
        "    turns = [{'role': names[t['from']], 'content': t['value']} for t in row['conversations']]\n"
        "    row['messages'] = [t for t in turns if not (drop_system and t['role'] == 'system')]\n"
        "    return row\n"
    )
    values = {"train_data_columns": ["conversations"], "formatting_func_path": f"{tmp_path}/mine.py:keep"}
    kept, _ = load(keys, tokenizer, **values)
    dropped, _ = load(keys, tokenizer, **values, formatting_func_kwargs={"drop_system": True})
    assert "system" in tokenizer.decode(kept.example(0).ids_T)
    assert "system" not in tokenizer.decode(dropped.example(0).ids_T)


@pytest.mark.parametrize(
    ("body", "wanted", "schema"),
    [
        ("row['text'] = 't'", None, "text"),
        ("row['text'] = 't'", ["question", "answer"], "text"),
        ("row['text'] = 't'; row['answer'] = row['answer'].upper()", ["question", "answer"], "question"),
        ("row['text'] = 't'; row['prompt'] = 'p'; row['completion'] = 'c'", ["text"], "text"),
        ("row['text'] = 't'; row['prompt'] = 'p'; row['completion'] = 'c'", None, "prompt"),
        ("row['answer'] = 'b'", None, "question"),
        ("row['note'] = 'b'", {"prompt": "question", "completion": "answer"}, "prompt"),
        ("row['messages'] = [{'role': 'user', 'content': 'a'}]", ["id"], "messages"),
    ],
)
def test_key_wins_over_added_columns_where_the_formatter_made_what_it_names(
    write, keys, tmp_path, body, wanted, schema
):
    write([row | {"id": "1"} for row in EXCHANGES])
    (tmp_path / "mine.py").write_text(f"def made(row):\n    {body}\n    return row\n")
    config = keys(train_data_columns=wanted, formatting_func_path=f"{tmp_path}/mine.py:made")
    rows, _ = source.open_rows(config)
    assert source.selection(config, rows).schema == schema


def test_held_out_rows(write, keys, tokenizer, tmp_path):
    write(EXCHANGES)
    train, held_out = load(keys, tokenizer, eval_fraction=0.25, packing=False)
    assert (len(train), len(held_out)) == (30, 10)
    together = conversations(all_batches(train)) + conversations(all_batches(held_out, shuffle=False))
    assert len(together) == 40
    write(EXCHANGES[:5], "other.jsonl")
    _, other = load(keys, tokenizer, hf_eval_path=str(tmp_path / "other.jsonl"), packing=False)
    assert len(other) == 5
    _, slice_ = load(keys, tokenizer, hf_eval_split="train[:3]", packing=False)
    assert len(slice_) == 3
    with pytest.raises(UserError, match="hf_eval_split=test: no split `test`"):
        load(keys, tokenizer, hf_eval_split="test")


@pytest.fixture
def unpacked(write, keys, tokenizer):
    write(EXCHANGES)
    return load(keys, tokenizer, packing=False)[0]


def test_epochs_differ_in_order_and_hold_all_rows(unpacked):
    order = rows_of(all_batches(unpacked, num_epochs=2.0))
    first, second = order[:40], order[40:]
    assert sorted(first) == sorted(second) == list(range(40))
    assert first != second
    assert rows_of(all_batches(unpacked, num_epochs=2.0)) == order
    assert rows_of(all_batches(unpacked, num_epochs=2.0, seed=1)) != order
    assert len(rows_of(all_batches(unpacked, num_epochs=0.3))) == 12


@pytest.mark.parametrize(("batch_size", "processes"), [(1, 1), (3, 1), (64, 1), (6, 2), (28, 4)])
def test_processes_share_the_batches_of_one_and_the_last_is_filled_up(unpacked, batch_size, processes):
    whole = all_batches(unpacked, batch_size=batch_size)
    assert sorted(rows_of(whole)) == list(range(40))
    for own in np.arange(batch_size).reshape(-1, processes).T:
        share = all_batches(unpacked, batch_size=batch_size, own=own)
        assert len(share) == len(whole)
        for mine, everyones in zip(share, whole, strict=True):
            np.testing.assert_array_equal(mine["rows"], everyones["rows"])
            assert mine["batch"].tokens_BT.shape == (len(own), 64)
            for name in ("tokens_BT", "mask_BT", "segments_BT", "positions_BT"):
                theirs = getattr(everyones["batch"], name)[own]
                np.testing.assert_array_equal(getattr(mine["batch"], name), theirs)
    filler = whole[-1]["rows"] < 0
    assert not whole[-1]["batch"].segments_BT[filler].any()
    assert not whole[-1]["batch"].mask_BT[filler].any()


def test_another_number_of_processes_goes_on_where_one_stopped(unpacked):
    options = {"batch_size": 6, "seed": 5, "shuffle": True, "num_epochs": 2.0}
    whole, first = source.batches(unpacked.packed, **options), source.batches(unpacked.packed, **options, own=[0, 1, 2])
    for _ in range(4):
        assert next(first)["rows"].tolist() == next(whole)["rows"].tolist()
    state = json.loads(json.dumps(first.get_state()))
    others = [source.batches(unpacked.packed, **options, own=own) for own in ([0, 3], [1, 4], [2, 5])]
    for other in others:
        other.set_state(state)
    for _ in range(4):
        expected = next(whole)
        parts = [next(other) for other in others]
        for place, part in zip((0, 1, 2), parts, strict=True):
            np.testing.assert_array_equal(part["rows"], expected["rows"])
            np.testing.assert_array_equal(part["batch"].tokens_BT, expected["batch"].tokens_BT[[place, place + 3]])


@pytest.mark.parametrize("num_epochs", [3.0, 5.5])
def test_state_resumes_with_the_same_batches(unpacked, num_epochs):
    options = {"batch_size": 3, "seed": 5, "shuffle": True, "num_epochs": num_epochs}
    whole = source.batches(unpacked.packed, **options)
    for _ in range(17):
        next(whole)
    state = json.loads(json.dumps(whole.get_state()))
    expected = [next(whole) for _ in range(9)]
    resumed = source.batches(unpacked.packed, **options)
    next(resumed)
    resumed.set_state(state)
    for item in expected:
        again = next(resumed)
        np.testing.assert_array_equal(again["rows"], item["rows"])
        np.testing.assert_array_equal(again["batch"].tokens_BT, item["batch"].tokens_BT)
    whole.set_state(state)
    np.testing.assert_array_equal(next(whole)["rows"], expected[0]["rows"])


@pytest.mark.parametrize("first_epochs", [0.5, 1.0])
def test_more_epochs_go_on_with_the_first_row_not_yet_seen(write, keys, tokenizer, first_epochs):
    write(EXCHANGES[:12])
    rows, _ = load(keys, tokenizer, packing=False)

    def loader(num_epochs):
        return source.batches(rows.packed, batch_size=5, seed=3, shuffle=True, num_epochs=num_epochs)

    seen, state = [], None
    for num_epochs in (first_epochs, 2.0):
        resumed = loader(num_epochs)
        if state is not None:
            resumed.set_state(state)
        left, items = len(resumed), list(resumed)
        assert len(items) == left
        seen += rows_of(items)
        state = json.loads(json.dumps(resumed.get_state()))
    assert sorted(seen[:12]) == sorted(seen[12:]) == list(range(12))
    assert seen == rows_of(loader(2.0))
    assert state == {"rows": 24, "batch_size": 5, "fingerprint": state["fingerprint"]}


def test_state_of_other_batches_is_refused(unpacked):
    state = source.batches(unpacked.packed, batch_size=3, seed=0, shuffle=True).get_state()
    with pytest.raises(UserError, match=r"begun with 3 rows in a step .* go on with 8.*run_name"):
        source.batches(unpacked.packed, batch_size=8, seed=0, shuffle=True).set_state(state)
    source.batches(unpacked.packed, batch_size=3, seed=0, shuffle=True, num_epochs=2, own=[1]).set_state(state)


@pytest.mark.parametrize(
    "changed",
    [
        {"chat_template": templates.LLAMA3},
        {"sft_train_on_completion_only": False},
        {"max_target_length": 65},
        {"packing": True},
        {"train_split": "train[:39]"},
        {"seed": 1},
        {"enable_data_shuffling": False},
    ],
)
def test_state_of_other_rows_is_refused(write, keys, tokenizer, changed):
    write(EXCHANGES)

    def loader(**values):
        config = keys(**{"packing": False, **values})
        rows, _ = source.load(config, tokenizer)
        return source.batches(rows.packed, batch_size=3, seed=config.seed, shuffle=config.enable_data_shuffling)

    state = loader().get_state()
    loader().set_state(state)
    with pytest.raises(UserError, match=r"not those that the run was begun with.*run_name"):
        loader(**changed).set_state(state)


def test_state_does_not_depend_on_how_the_same_tokens_were_made(write, keys, tokenizer, tmp_path):
    path = write(EXCHANGES)
    first, _ = load(keys, tokenizer)
    write([row | {"id": 5} for row in EXCHANGES], "other.jsonl")
    other, _ = load(keys, tokenizer, hf_path=str(path.with_name("other.jsonl")))
    assert other.packed.tokens.folder != first.packed.tokens.folder
    assert other.packed.fingerprint == first.packed.fingerprint


def test_number_of_batches_is_known(unpacked):
    batches = source.batches(unpacked.packed, batch_size=7, seed=0, shuffle=True, num_epochs=1.5)
    assert len(batches) == len(list(batches)) == 9
    assert len(batches) == 0
    assert next(batches, None) is None


@pytest.mark.multiprocess
def test_worker_processes_give_the_same_batches(unpacked, monkeypatch):
    monkeypatch.setattr("luthier.data.batches.TOKENS_WORTH_PROCESSES", 1)
    expected = all_batches(unpacked, batch_size=8)
    found = all_batches(unpacked, batch_size=8, worker_count=2)
    for item, other in zip(expected, found, strict=True):
        np.testing.assert_array_equal(item["rows"], other["rows"])
        np.testing.assert_array_equal(item["batch"].mask_BT, other["batch"].mask_BT)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_data_process_that_dies_loses_no_row(unpacked, monkeypatch, caplog):
    monkeypatch.setattr("luthier.data.batches.TOKENS_WORTH_PROCESSES", 1)
    options = {"batch_size": 1, "seed": 0, "shuffle": True}
    expected = source.batches(unpacked.packed, **options, num_epochs=2.0)
    reading = source.batches(unpacked.packed, **options, num_epochs=2.0, worker_count=2)
    for number, item in enumerate(expected):
        if number == 7:
            multiprocessing.active_children()[0].kill()
        np.testing.assert_array_equal(item["rows"], next(reading)["rows"])
    assert "A process that reads data ended" in caplog.text
    reading = source.batches(unpacked.packed, **options, num_epochs=20.0, worker_count=2)
    next(reading)
    multiprocessing.active_children()[0].kill()
    begin_again = reading._begin_again
    monkeypatch.setattr(reading, "_begin_again", lambda reason: (begin_again(reason), begin_again(reason)))
    with pytest.raises(RunError, match=r"ended twice, before the batch .*grain_worker_count=0"):
        list(reading)
    reading.close()


@pytest.mark.parametrize(
    ("name", "count"), [("glaive_toolcall_en_demo", 300), ("kto_en_demo", 300), ("gsm8k_test", 1319)]
)
def test_real_datasets(data_folder, keys, tokenizer, name, count):
    tokenizer.chat_template = templates.WITH_TOOLS
    path = data_folder / f"{name}.jsonl"
    rows, _ = load(keys, tokenizer, hf_path=str(path), max_target_length=16384)
    assert (rows.report.rows, rows.report.conversations, rows.report.warnings) == (count, count, ())
    assert rows.report.efficiency > 0.8
