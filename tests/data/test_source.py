import json

import numpy as np
import pytest
import templates

from luthier.data import source, store
from luthier.errors import UserError

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
    assert "40 rows" in report.summary()


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
    monkeypatch.setattr(store, "WORTH_PROCESSES", 1)
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


@pytest.mark.parametrize(("batch_size", "process_count"), [(1, 1), (3, 1), (64, 1), (3, 2), (7, 4)])
def test_hosts_share_the_rows_and_the_last_batch_is_filled_up(unpacked, batch_size, process_count):
    options = {"batch_size": batch_size, "process_count": process_count}
    shares = [all_batches(unpacked, process_index=i, **options) for i in range(process_count)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(row for share in shares for row in rows_of(share)) == list(range(40))
    for share in shares:
        assert all(item["batch"].tokens_BT.shape == (batch_size, 64) for item in share)
        last = share[-1]
        filler = last["rows"] < 0
        assert not last["batch"].segments_BT[filler].any()
        assert not last["batch"].mask_BT[filler].any()


@pytest.mark.parametrize("num_epochs", [3.0, None])
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


def test_number_of_batches_is_known(unpacked):
    batches = source.batches(unpacked.packed, batch_size=7, seed=0, shuffle=True, num_epochs=1.5)
    assert len(batches) == len(list(batches)) == 9
    assert next(batches, None) is None


@pytest.mark.multiprocess
def test_worker_processes_give_the_same_batches(unpacked, monkeypatch):
    monkeypatch.setattr("luthier.data.batches.WORTH_PROCESSES", 1)
    expected = all_batches(unpacked, batch_size=8)
    found = all_batches(unpacked, batch_size=8, worker_count=2)
    for item, other in zip(expected, found, strict=True):
        np.testing.assert_array_equal(item["rows"], other["rows"])
        np.testing.assert_array_equal(item["batch"].mask_BT, other["batch"].mask_BT)


@pytest.mark.parametrize(
    ("name", "count"), [("glaive_toolcall_en_demo", 300), ("kto_en_demo", 300), ("gsm8k_test", 1319)]
)
def test_real_datasets(data_folder, keys, tokenizer, name, count):
    tokenizer.chat_template = templates.WITH_TOOLS
    path = data_folder / f"{name}.jsonl"
    rows, _ = load(keys, tokenizer, hf_path=str(path), max_target_length=16384)
    assert (rows.report.rows, rows.report.conversations, rows.report.warnings) == (count, count, ())
    assert rows.report.efficiency > 0.8
