"""`luthier generate` as a user meets it: the lines it writes, the text it shows, the mistakes it refuses."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import tiny
from luthier import cli
from luthier.checkpoint import huggingface
from luthier.commands import generate, output, prompts
from luthier.commands.terminal import harmless
from luthier.config import resolve
from luthier.errors import RunError, UserError
from luthier.rollout.engine import Completion
from luthier.rollout.local import LocalEngine
from tiny import ROOT

CACHE = f"jax_cache_dir={ROOT / '.cache' / 'jax'}"
ENVIRONMENT = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}


def arguments(model: Path, **keys: object) -> list[str]:
    chosen = {"load_parameters_path": model, "max_new_tokens": 6} | keys
    return [*(f"{name}={value}" for name, value in chosen.items() if value is not None), CACHE]


@pytest.fixture
def run(tiny_model, capsys):
    """Run the command and return the objects of its lines."""

    def run(**keys):
        assert cli.main(["generate", *arguments(tiny_model, **keys)]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return run


@pytest.fixture
def refused(tiny_model, capsys, monkeypatch):
    """Run the command with something wrong, and return the message; no weight is read for it."""
    monkeypatch.setattr(huggingface, "load", lambda *_: pytest.fail("weights were read"))

    def refused(**keys):
        assert cli.main(["generate", *arguments(tiny_model, **keys)]) == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        assert shown.err.startswith("luthier generate: ")
        return shown.err

    return refused


@pytest.fixture
def three(tmp_path) -> Path:
    path = tmp_path / "three.txt"
    path.write_text("first\n\nsecond one\nthird\n")
    return path


def test_lines_are_in_order_and_a_seed_repeats_them(run, three):
    rows = run(prompts_path=three, num_generations=2, max_num_seqs=2)
    assert [(row["index"], row["sample"]) for row in rows] == [(i, s) for i in range(3) for s in range(2)]
    assert [row["prompt"] for row in rows[::2]] == ["first", "second one", "third"]
    words = tiny.tokenizer()
    for row in rows:
        asked = words.apply_chat_template([{"role": "user", "content": row["prompt"]}], add_generation_prompt=True)
        assert row["prompt_tokens"] == len(asked["input_ids"])
        assert row["finish_reason"] in ("length", "stop")
        assert 1 <= row["completion_tokens"] <= 6
    assert len({row["completion"] for row in rows}) > 4, "each prompt and each sample has noise of its own"
    again = run(prompts_path=three, num_generations=2)  # and however many are drawn at a time
    assert again == rows
    assert run(prompts_path=three, num_generations=2, seed=1) != rows


def test_greedy_is_the_same_for_all_samples(run):
    rows = run(prompt="hello", num_generations=3, temperature=0, top_p=0.5)
    assert len({row["completion"] for row in rows}) == 1


def test_log_probs_of_tokens_and_their_alternatives(run):
    (row,) = run(prompt="hello", logprobs=2, top_k=5, ignore_eos=True, seed=3)
    assert len(row["tokens"]) == row["completion_tokens"] == 6
    words = tiny.tokenizer()
    ids = [token["id"] for token in row["tokens"]]
    assert row["completion"] == words.decode(ids, skip_special_tokens=True)
    for token in row["tokens"]:
        assert token["token"] == words.convert_ids_to_tokens(token["id"])
        assert token["logprob"] < token["drawn_logprob"] < 0, "of five tokens, the one drawn is likelier than of all"
        first, second = (each["logprob"] for each in token["top_logprobs"])
        assert first >= max(second, token["logprob"])
    assert "top_logprobs" not in run(prompt="hello", logprobs=0)[0]["tokens"][0]


def test_raw_text_and_stop_texts(run):
    keys = {"prompt": "the quick", "use_chat_template": False, "max_new_tokens": 40, "ignore_eos": True}
    (row,) = run(**keys)
    assert row["prompt_tokens"] == len("the quick")
    middle = row["completion"][5:7]
    (cut,) = run(**keys, stop=json.dumps([middle]))
    assert cut["completion"] == row["completion"][: row["completion"].index(middle)]
    assert cut["finish_reason"] == "stop"


def test_rows_of_conversations(tiny_model, tmp_path, capsys):
    path, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [
        {"messages": turns},
        {"conversations": [{"from": "human", "value": "a"}]},
        {"prompt": [{"role": "system", "content": "own"}, turns[0]], "completion": "b"},
        {"question": "a", "answer": "b"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = arguments(tiny_model, prompts_path=path, output_path=out, system_prompt="be brief")
    assert cli.main(["generate", *keys]) == 0
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "1 of 4 prompts end with a reply, which is left out." in shown.err
    assert "4 completions of 4 prompts" in shown.err
    written = [json.loads(line)["prompt"] for line in out.read_text().splitlines()]
    brief = [{"role": "system", "content": "be brief"}, turns[0]]
    assert written == [brief, brief, [{"role": "system", "content": "own"}, turns[0]], brief]
    assert not (tmp_path / "out.jsonl.partial").exists()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "one\r\n\n  two\n", ["one", "  two"]),
        ("a.txt", "\ufeffone", ["one"]),
        ("a.jsonl", '{"prompt": "one"}\n\n{"prompt": "two\\nlines"}', ["one", "two\nlines"]),
        ("a.json", '[{"question": "one"}]', ["one"]),
        ("a.csv", "prompt,x\none,2\n", ["one"]),
        ("A.TXT", "one", ["one"]),
        ("A.CSV", "prompt,x\none,2\n", ["one"]),
        ("A.JSON", '[{"question": "one"}]', ["one"]),
    ],
)
def test_files_of_prompts(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content.encode())
    config = resolve("generate", ["model_name=m", f"prompts_path={tmp_path / name}"], {})
    assert [prompt.messages for prompt in prompts.read(config)] == [({"role": "user", "content": e},) for e in expected]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", "\n \n", ["a.txt", "no prompt in it"]),
        ("a.txt", b"fine\n\xff\n", ["a.txt, line 2", "UTF-8"]),
        ("a.jsonl", "", ["a.jsonl", "no prompt in it"]),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt"', ["a.jsonl, line 2", "not valid JSON"]),
        ("a.jsonl", '{"text": "a"}', ["line 1", "prompt, messages, conversations, question", "`text`. Rename"]),
        ("a.jsonl", '{"prompt": ""}', ["a.jsonl, line 1", "empty prompt"]),
        ("a.jsonl", '{"prompt": 3}', ["line 1: column `prompt`: 3 (int) where a text or a list", "Fix or remove"]),
        ("a.jsonl", '{"messages": null}', ["line 1: column `messages`: null where a text or a list"]),
        ("a.jsonl", '{"messages": [{"role": "robot", "content": ""}]}', ["line 1", "unknown role 'robot'"]),
        ("a.jsonl", '{"messages": [{"role": "assistant", "content": "a"}]}', ["line 1", "nothing comes before"]),
        ("a.jsonl", '{"prompt": "\\ud83e"}', ["line 1", "half of a character"]),
        ("a.md", "one", ["cannot read `.md` files", ".txt"]),
        ("prompts", "one", ["the name has no suffix", "Rename it", ".txt"]),
        (None, "", ["nowhere.txt: no such file", "prompts_path"]),
    ],
)  # fmt: skip
def test_bad_files_of_prompts(refused, tmp_path, name, content, words):
    path = tmp_path / (name or "nowhere.txt")
    if name:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = refused(prompts_path=path)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({}, ["prompt and prompts_path are both empty"]),
        ({"prompt": "a", "prompts_path": "b.txt"}, ["both set"]),
        ({"prompt": "a", "temperature": -1}, ["temperature=-1", "greater than or equal to 0"]),
        ({"prompt": "a", "num_generations": 0}, ["num_generations=0"]),
        ({"prompt": "a", "temprature": 1}, ["unknown key `temprature`", "`temperature`"]),
        ({"prompt": "a", "output_path": "/nowhere/at/all.jsonl"}, ["output_path", "no folder /nowhere/at"]),
        ({"prompt": "a", "output_path": "/tmp"}, ["output_path=/tmp", "a folder"]),
        ({"prompt": "a", "chat_template": "{% for %}"}, ["not valid Jinja"]),
        ({"prompt": "a", "chat_template": "{{ raise_exception('No!') }}"}, ["prompt: ", "No!", "chat_template_path"]),
        ({"prompt": "a" * 600}, ["prompt: a prompt of 619 tokens", "512"]),
        ({"prompt": "a" * 60, "max_target_length": 64}, ["max_target_length=64", "raise max_target_length"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)  # fmt: skip
def test_bad_keys(refused, keys, words):
    message = refused(**keys)
    assert all(word in message for word in words), message


def test_a_folder_is_no_file_of_prompts(refused, tmp_path):
    assert "is a folder" in refused(prompts_path=tmp_path)


def test_a_long_prompt_is_named_by_its_line(refused, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("short\n" + "long " * 200)
    assert f"{path}, line 2: a prompt of" in refused(prompts_path=path)


def test_a_base_model_needs_a_template_or_raw_text(tmp_path, capsys):
    tiny.write_model(tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink()
    assert cli.main(["generate", *arguments(tmp_path / "base", prompt="a")]) == 2
    assert "use_chat_template=false" in capsys.readouterr().err
    assert cli.main(["generate", *arguments(tmp_path / "base", prompt="a", use_chat_template="false")]) == 0


def test_completions_are_put_in_order_as_soon_as_they_can():
    order = [(2, 0), (0, 1), (0, 0), (1, 0), (2, 1), (1, 1)]
    taken = []

    def finished():
        for request, sample in order:
            taken.append((request, sample))
            yield Completion(request, sample, *(np.zeros(0),) * 4, "stop")

    seen = [(each.request, each.sample, len(taken)) for each in generate.in_order(finished(), samples=2)]
    assert seen == [(0, 0, 3), (0, 1, 3), (1, 0, 4), (1, 1, 6), (2, 0, 6), (2, 1, 6)]


def test_a_run_that_fails_leaves_a_good_file_alone(tiny_model, three, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out.jsonl"
    out.write_text("good\n")
    drawn = LocalEngine.generate

    def breaks(self, requests, on_piece=None):
        yield next(iter(drawn(self, requests[:1], on_piece)))
        raise RunError("lost the device")

    monkeypatch.setattr(LocalEngine, "generate", breaks)
    assert cli.main(["generate", *arguments(tiny_model, prompts_path=three, output_path=out)]) == 1
    shown = capsys.readouterr().err
    assert "lost the device" in shown
    assert f"{out}.partial has what was written so far" in shown.replace("\n", "")
    assert out.read_text() == "good\n"
    assert json.loads(Path(f"{out}.partial").read_text())["index"] == 0


def written(name: Path, *rows: dict) -> str:
    """Write lines as the command does, and return what was told."""
    console = Console(file=io.StringIO(), soft_wrap=True)
    output.check(str(name))
    with output.lines(str(name), console) as put:
        for row in rows:
            put(row)
    return console.file.getvalue()


def test_the_target_of_a_link_is_written(tmp_path):
    link, target = tmp_path / "link.jsonl", tmp_path / "there" / "out.jsonl"
    target.parent.mkdir()
    link.symlink_to(Path("there") / "out.jsonl")
    for number in range(2):  # where it is not there yet, and where it is
        written(link, {"number": number})
        assert link.is_symlink()
        assert json.loads(target.read_text()) == {"number": number}
    assert sorted(tmp_path.iterdir()) == [link, target.parent]
    target.unlink()
    target.parent.rmdir()
    with pytest.raises(UserError, match=r"no folder .*there"):
        output.check(str(link))


def test_a_pipe_is_written_to_and_stays_one(tmp_path):
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        for name in (pipe, link):
            written(name, {"a": "🦊"}, {"b": 1})
            assert os.read(reader, 100).decode() == '{"a": "🦊"}\n{"b": 1}\n'
        assert pipe.is_fifo()
        assert link.is_symlink()
        assert len(list(tmp_path.iterdir())) == 2, "no .partial"
    finally:
        os.close(reader)


@pytest.mark.multiprocess
def test_what_standard_output_is_open_on_is_written_by_it(tmp_path):
    out, link = tmp_path / "out.jsonl", tmp_path / "stdout"  # never the system's own: a mistake would replace it
    out.write_text("before\n")
    link.symlink_to("/proc/self/fd/1")
    script = (
        "import sys; from rich.console import Console; from luthier.commands import output\n"
        "for name in sys.argv[1:]:\n"
        "    output.check(name)\n"
        "    with output.lines(name, Console(stderr=True)) as put: put({'a': 1})\n"
    )
    with out.open("a") as file:
        subprocess.run([sys.executable, "-c", script, link, out], env=ENVIRONMENT, stdout=file, check=True)
    assert out.read_text() == 'before\n{"a": 1}\n{"a": 1}\n'
    assert sorted(tmp_path.iterdir()) == [out, link]


@pytest.mark.parametrize("kind", ["file", "link", "relative"])
def test_the_prompts_are_not_written_over(refused, three, tmp_path, monkeypatch, kind):
    (tmp_path / "link.txt").symlink_to(three)
    monkeypatch.chdir(tmp_path)
    name = {"file": three, "link": tmp_path / "link.txt", "relative": f"../{tmp_path.name}/three.txt"}[kind]
    message = refused(prompts_path=three, output_path=name)
    assert "the file that prompts_path names" in message
    assert three.read_text().startswith("first")


@pytest.mark.parametrize("folder", [False, True])
def test_what_a_stopped_run_had_finished_is_not_written_over(refused, tmp_path, folder):
    partial = tmp_path / "out.jsonl.partial"
    partial.mkdir() if folder else partial.write_text("finished\n")
    message = refused(prompt="a", output_path=tmp_path / "out.jsonl")
    assert f"{partial} is there" in message
    assert "Move or remove it" in message
    assert folder or partial.read_text() == "finished\n"


def test_a_run_that_finished_nothing_leaves_nothing_in_the_way(tmp_path):
    console = Console(file=io.StringIO(), soft_wrap=True)
    with pytest.raises(KeyboardInterrupt), output.lines(str(tmp_path / "out.jsonl"), console):
        raise KeyboardInterrupt
    assert "Not finished: nothing was written" in console.file.getvalue()
    assert list(tmp_path.iterdir()) == []


def test_lines_go_to_standard_output_beside_a_progress_bar(run, three, monkeypatch):
    bars = io.StringIO()
    monkeypatch.setattr(generate.terminal, "messages", lambda: Console(file=bars, force_terminal=True, soft_wrap=True))
    rows = run(prompts_path=three)
    assert [row["index"] for row in rows] == [0, 1, 2]
    assert "tokens/s" in bars.getvalue(), "the bar was shown"
    assert '"index"' not in bars.getvalue()


def test_a_full_disk_is_told_and_the_file_stands(tmp_path):
    from folders import files_of_at_most

    out, console = tmp_path / "out.jsonl", Console(file=io.StringIO())
    out.write_text("good\n")

    def write():
        with output.lines(str(out), console) as put:
            for _ in range(100):
                put({"completion": "x" * 50})

    with files_of_at_most(1000), pytest.raises(RunError, match=r"partial: the completions could not be written"):
        write()
    assert out.read_text() == "good\n"


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("samples", [1, 2])
def test_a_terminal_is_shown_the_text_alone_as_it_comes(run, tiny_model, three, monkeypatch, samples):
    keys = {"prompts_path": three, "num_generations": samples, "max_new_tokens": 20, "decode_steps": 3}
    rows = run(**keys)
    monkeypatch.setattr(sys, "stdout", shown := Tty())
    assert cli.main(["generate", *arguments(tiny_model, **keys)]) == 0
    parts = []
    for row in rows:
        sample = f", sample {row['sample'] + 1}/2" if samples > 1 else ""
        parts.append(f"[{row['index'] + 1}/3{sample}] {row['prompt']}\n{harmless(row['completion'])}\n")
    assert shown.getvalue() == "\n".join(parts)


def test_one_prompt_on_a_terminal_is_its_answer(run, tiny_model, monkeypatch):
    (row,) = run(prompt="hello")
    monkeypatch.setattr(sys, "stdout", shown := Tty())
    assert cli.main(["generate", *arguments(tiny_model, prompt="hello")]) == 0
    assert shown.getvalue() == harmless(row["completion"]) + "\n"


def test_what_a_model_writes_cannot_command_a_terminal():
    assert harmless("a\x1b[2J\tb\r\n\x9bc\x7f 🦊") == "a␛[2J\tb␍\n\ufffdc␡ 🦊"


@pytest.mark.multiprocess
@pytest.mark.slow
def test_a_reader_that_has_had_enough_is_no_failure(tiny_model, three):
    command = [sys.executable, "-m", "luthier", "generate", *arguments(tiny_model, prompts_path=three, n=20)]
    with subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert json.loads(process.stdout.readline())["index"] == 0
        process.stdout.close()
        errors = process.stderr.read()
        assert process.wait(timeout=120) == 0, errors
    assert "Traceback" not in errors
