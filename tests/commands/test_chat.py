"""`luthier chat`: what is said and kept, with a scripted engine and the real one; and the terminal as a process."""

from __future__ import annotations

import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import tiny
from luthier import cli
from luthier import mesh as mesh_lib
from luthier.checkpoint import huggingface
from luthier.checkpoint.source import Source
from luthier.commands import chat, chat_terminal
from luthier.commands.chat_session import HELP, Said, Session, Voice
from luthier.config import resolve
from luthier.data.chat import Rendering
from luthier.errors import UserError
from luthier.memory import GIB
from luthier.rollout import plan, text
from luthier.rollout.engine import Completion, Piece, Request, Sampling
from luthier.rollout.local import LocalEngine
from luthier.rollout.opened import open_model
from tiny import ROOT

CACHE = f"jax_cache_dir={ROOT / '.cache' / 'jax'}"
ENVIRONMENT = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT), "TERM": "xterm"}
WORDS = tiny.tokenizer()


class Scripted:
    """An engine that says what it is given, some tokens a step, and remembers what it was asked."""

    def __init__(self, *answers: str, limit: int | None = None, per_step: int = 3) -> None:
        self.answers, self.asked, self.cancelled = deque(answers), [], False
        self.limits, self.length, self.busy = SimpleNamespace(length=limit), limit, False
        self._per_step, self._left, self._said = per_step, [], []

    def check(self, request) -> None:
        pass

    def submit(self, request) -> int:
        self.asked.append(request)
        self._left = WORDS(self.answers.popleft(), add_special_tokens=False)["input_ids"]
        self._left = [*self._left, WORDS.eos_token_id][: request.sampling.max_new_tokens]
        self._said, self.cancelled = [], False
        return len(self.asked)

    def cancel(self, number: int) -> None:
        self.cancelled = number == len(self.asked)

    def step(self) -> list[Piece | Completion]:
        if self.cancelled:
            return [self._completion("cancelled")]
        new, self._left = self._left[: self._per_step], self._left[self._per_step :]
        self._said += new
        piece = Piece(len(self.asked), 0, np.array(new, np.int32), *(np.zeros(len(new)),) * 2)
        ended = "stop" if self._said[-1] == WORDS.eos_token_id else "length"
        return [piece] if self._left else [piece, self._completion(ended)]

    def _completion(self, finish) -> Completion:
        return Completion(len(self.asked), 0, np.array(self._said, np.int32), *(np.zeros(len(self._said)),) * 3, finish)


def voice(engine, name: str = "tiny", **generation) -> Voice:
    source = Source("huggingface", name, Path(name), {"eos_token_id": 2}, generation_config=generation)
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=len(WORDS)))
    return Voice(SimpleNamespace(name=name, source=source, model=model, tokenizer=WORDS), engine, Rendering())


def session(*voices: Voice, **keys: object) -> Session:
    config = resolve("chat", ["model_name=m", *(f"{name}={value}" for name, value in keys.items())], {})
    return Session(config, voices)


def said(here: Session, line: str) -> list[str]:
    """What each voice answers to a line, put together."""
    texts = [""] * len(here.voices)
    for number, new in here.answer(line):
        texts[number] += new
    return texts


def prompts(engine: Scripted) -> list[str]:
    return [WORDS.decode(request.prompt) for request in engine.asked]


def asked(*turns: str) -> str:
    """Turns as ChatML, each after its role, with the header of the reply."""
    rows = zip(turns[::2], turns[1::2], strict=True)
    return "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in rows) + "<|im_start|>assistant\n"


def test_the_history_is_said_again_with_each_message():
    engine = Scripted("One 🦊.", "Two.")
    here = session(voice(engine), system_prompt="Count.")
    assert said(here, "a") == ["One 🦊."]
    assert said(here, "b") == ["Two."]
    first = ("system", "Count.", "user", "a")
    assert prompts(engine) == [asked(*first), asked(*first, "assistant", "One 🦊.", "user", "b")]


def test_an_answer_streams_in_whole_characters():
    here = session(voice(Scripted("🦊🦊", per_step=1)))
    assert list(here.answer("a")) == [Said(0, "🦊"), Said(0, "🦊")]


def test_reset_forgets_and_keeps_the_system_message():
    engine = Scripted("One.", "Two.", "Three.")
    here = session(voice(engine))
    assert here.command("/system") == "No system message is set."
    assert here.command("/system Be  brief.") == "The system message is set."
    said(here, "a")
    assert "goes on under it" in here.command("/system Count.")
    assert here.command("/system") == "System message: Count."
    assert here.command("/reset") == "A new conversation."
    said(here, "b")
    here.command("/reset")
    assert here.command("/system -") == "The system message is removed."
    said(here, "c")
    assert prompts(engine) == [
        asked("system", "Be  brief.", "user", "a"),
        asked("system", "Count.", "user", "b"),
        asked("user", "c"),
    ]


def test_settings_are_shown_changed_and_checked_by_the_keys():
    engine = Scripted("abcdef", "abcdef")
    here = session(voice(engine, temperature=0.7, top_k=20), top_p=0.9)
    assert here.command("/settings").startswith("temperature=0.7 top_k=20 top_p=0.9 min_p=0 max_new_tokens=256")
    shown = here.command("/settings temperature=0.2 max_tokens=3 stop='[\"b c\", d]'")
    assert shown.startswith("temperature=0.2 top_k=20 top_p=0.9 min_p=0 max_new_tokens=3 stop=['b c', 'd']")
    assert said(here, "a") == ["abc"]
    assert chat.ending(here, here.voices[0]) == "(cut at max_new_tokens=3; /settings max_new_tokens=6 allows more)"
    sampling = engine.asked[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.stop) == (0.2, 0.9, ("b c", "d"))
    for wrong, words in {
        "temprature=1": "Did you mean `temperature`?",
        "temperature=-1": "temperature=-1 (command line)",
        "temperature": "give key=value pairs",
        "stop='a": "Close the quotation",
        "seed=3": "unknown key `seed`",
    }.items():
        with pytest.raises(UserError) as error:
            here.command(f"/settings {wrong}")
        assert words in str(error.value)
    assert here.command("/settings") == shown, "a wrong line changes nothing"


def test_unknown_commands_and_help():
    here = session(voice(Scripted()))
    with pytest.raises(UserError, match=r"unknown command `/rest`. Did you mean `/reset`?"):
        here.command("/rest")
    with pytest.raises(UserError, match=r"`/qqq`. /help lists them"):
        here.command("/qqq")
    assert all(usage in here.command("/help") for usage in HELP)


def test_a_stopped_answer_is_kept_as_far_as_it_came():
    engine = Scripted("abcdefghi", "fine")
    here = session(voice(engine))
    heard = ""
    for _, new in here.answer("a"):
        heard += new
        here.stop()
    assert heard == "abc"
    assert chat.ending(here, here.voices[0]) == "(stopped)"
    here.stop()  # too late for that one, too soon for the next
    assert said(here, "b") == ["fine"]
    assert prompts(engine)[1] == asked("user", "a", "assistant", "abc", "user", "b")


def test_a_message_whose_answer_was_stopped_at_once_is_forgotten():
    engine = Scripted("abcdefghi", "fine")
    engine.check = lambda request: here.stop() if not engine.asked else None
    here = session(voice(engine))
    assert said(here, "a") == [""]
    assert said(here, "b") == ["fine"]
    assert prompts(engine)[1] == asked("user", "b")


def test_a_full_context_is_told_and_reset_helps():
    engine = Scripted("One.", "Two.", limit=80)
    here = session(voice(engine))
    said(here, "a" * 20)
    with pytest.raises(UserError) as error:
        said(here, "b" * 20)
    assert "tiny reads 80 tokens at most, and the conversation has" in str(error.value)
    assert "/reset" in str(error.value)
    here.command("/reset")
    assert said(here, "b" * 20) == ["Two."]


def test_several_models_keep_histories_of_their_own():
    engines = Scripted("One.", "Two."), Scripted("Eins, zwei, drei.", "Vier.")
    here = session(voice(engines[0], "before"), voice(engines[1], "after", temperature=0.5))
    order = [number for number, _ in here.answer("a")]
    assert order[:4] == [0, 1, 0, 1], "they take turns"
    assert said(here, "b") == ["Two.", "Vier."]
    assert prompts(engines[0])[1] == asked("user", "a", "assistant", "One.", "user", "b")
    assert prompts(engines[1])[1] == asked("user", "a", "assistant", "Eins, zwei, drei.", "user", "b")
    lines = here.command("/settings").splitlines()
    assert lines[0].startswith("before: temperature=1 ")
    assert lines[1].startswith("after: temperature=0.5 ")


def test_settings_of_models_of_one_name_are_all_shown():
    here = session(voice(Scripted(), temperature=0.25), voice(Scripted(), temperature=0.5))
    lines = here.command("/settings").splitlines()
    assert [line.split()[:2] for line in lines] == [["tiny:", "temperature=0.25"], ["tiny:", "temperature=0.5"]]


def test_where_one_of_several_cannot_be_asked_none_is():
    engines = Scripted("One."), Scripted("Eins.", limit=10)
    here = session(voice(engines[0], "before"), voice(engines[1], "after"))
    with pytest.raises(UserError, match="after reads 10 tokens"):
        said(here, "a")
    assert engines[0].asked == []
    assert here.voices[0].history == []


class Lines:
    """A screen that types lines and keeps what is shown."""

    def __init__(self, *lines: str) -> None:
        self.lines, self.told, self.shown = deque(lines), [], []

    def read(self) -> str | None:
        return self.lines.popleft() if self.lines else None

    def tell(self, message: str) -> None:
        self.told.append(message)

    def show(self, names, answers) -> None:
        self.shown.append("".join(new for _, new in answers))


def test_a_conversation_survives_wrong_lines_and_ends_where_it_is_told_to():
    engine = Scripted("One.", "Two.")
    screen = Lines("", "/rest", "//a", "/settings top_p=2", "/help", "b", "/exit", "c")
    before = signal.getsignal(signal.SIGINT)
    chat.converse(session(voice(engine)), screen)
    assert screen.shown == ["One.", "Two."]
    assert list(screen.lines) == ["c"]
    assert len(screen.told) == 4, screen.told
    assert prompts(engine)[0] == asked("user", "/a"), "two slashes write one"
    assert signal.getsignal(signal.SIGINT) is before


def test_a_line_from_a_pipe_that_is_not_utf_8_is_named(monkeypatch):
    lines = io.BytesIO("é\r\n\nab\xff\n".encode("latin-1").replace(b"\xe9", "é".encode()))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(lines, encoding="utf-8"))
    engine, screen = Scripted("One."), chat_terminal.Pipe()
    monkeypatch.setattr(screen, "tell", lambda message: None)
    with pytest.raises(UserError, match="line 3: byte 0xff at place 3 is not UTF-8"):
        chat.converse(session(voice(engine)), screen)
    assert prompts(engine) == [asked("user", "é")], "what came before it is answered"


def test_the_first_interrupt_stops_the_answer_and_the_second_the_program():
    stopped = []
    with chat_terminal.interruptible(lambda: stopped.append(True)):
        signal.raise_signal(signal.SIGINT)
        assert stopped == [True]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_several_answers_are_shown_side_by_side(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    answers = iter([Said(0, "left "), Said(1, "right\x1b[2J"), Said(0, "side")])
    chat_terminal.Terminal().show(["before", "after"], answers)
    shown = capsys.readouterr().out.splitlines()
    assert any("before" in line and "after" in line for line in shown)
    assert any("left side" in line and "right␛[2J" in line for line in shown)


@pytest.fixture(scope="module")
def real(tiny_model):
    """The tiny model opened, on one device, with an engine."""
    config = resolve("chat", [f"load_parameters_path={tiny_model}", CACHE, "max_num_seqs=1", "max_new_tokens=8"], {})
    with pytest.MonkeyPatch.context() as patch:
        devices = jax.devices()[:1]
        make = mesh_lib.make
        patch.setattr(mesh_lib, "make", lambda keys, _=None: make(keys, devices))
        opened = open_model(config)

    def made(**keys) -> Session:
        chosen = config.model_copy(update=keys)
        with mesh_lib.use(opened.mesh):
            engine = LocalEngine(
                opened.model, opened.params, opened.compute, opened.mesh, chosen,
                tokenizer=opened.tokenizer, context_length=opened.context_length,
            )  # fmt: skip
        return Session(chosen, [Voice(opened, engine, Rendering())])

    with mesh_lib.use(opened.mesh):
        yield made


def test_the_real_engine_answers_as_it_does_to_the_whole_conversation(real):
    here = real(temperature=0.0)
    for line in ("hello", "and more"):
        said(here, line)
    second = here.voices[0]
    # The same turns at once, with nothing read before.
    fresh = real(temperature=0.0)
    fresh.voices[0].history = second.history[:2]
    said(fresh, "and more")
    np.testing.assert_array_equal(fresh.voices[0].answer.tokens_T, second.answer.tokens_T)
    decoded = text.decode(WORDS, second.answer, ())
    assert second.said == second.history[-1]["content"] == decoded


def test_the_real_engine_stops_at_once_and_goes_on(real):
    here = real(max_new_tokens=200, ignore_eos=True, decode_steps=2)
    for _ in here.answer("hello"):
        here.stop()
    assert here.voices[0].answer.finish == "cancelled"
    assert len(here.voices[0].answer.tokens_T) < 50
    here.command("/settings max_new_tokens=5")
    said(here, "more")
    assert len(here.voices[0].answer.tokens_T) == 5


def test_the_real_engine_fills_the_context(real):
    here = real(max_target_length=64, max_new_tokens=60, ignore_eos=True)
    said(here, "hello")
    assert "cut: the conversation fills the 64 tokens" in chat.ending(here, here.voices[0])
    with pytest.raises(UserError, match="reads 64 tokens at most"):
        said(here, "hello")


def test_where_one_of_several_cannot_begin_none_answers_later(real, monkeypatch):
    here, fresh = real(temperature=0.0), real(temperature=0.0)
    second = voice(Scripted("Eins."), "after")
    here.voices.append(second)

    def full(request):
        raise UserError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(second.engine, "submit", full)
        with pytest.raises(UserError, match="no room"):
            said(here, "a message that is refused")
    first = here.voices[0]
    assert not first.engine.busy
    assert first.history == []
    assert said(here, "hello") == [*said(fresh, "hello"), "Eins."]
    assert not first.engine.busy


def test_an_answer_that_nobody_hears_out_is_not_the_next_one(real):
    here = real(max_new_tokens=200, ignore_eos=True, decode_steps=2)
    answers = here.answer("hello")
    next(answers)
    answers.close()
    engine = here.voices[0].engine
    assert not engine.busy
    engine.submit(Request([5, 6, 7], 1, Sampling(max_new_tokens=4)))  # somebody else's
    here.command("/settings max_new_tokens=5")
    said(here, "more")
    assert here.voices[0].answer.request == here.voices[0]._number
    assert len(here.voices[0].answer.tokens_T) == 5


def test_where_memory_cut_the_cache_that_is_what_is_told(real, monkeypatch):
    monkeypatch.setattr(plan, "LENGTH_FIRST", 64)
    here = real(kv_cache_gib=1e-9, max_new_tokens=100, ignore_eos=True)
    row = here.voices[0].engine.limits._bytes(64)
    here = real(kv_cache_gib=row / GIB, max_new_tokens=100, ignore_eos=True)
    here.voices[0].engine.reserve(1)
    said(here, "hello")
    note = chat.ending(here, here.voices[0])
    assert "cut: the conversation fills the 64 tokens" in note
    assert "kv_cache_gib) it can have up to 512" in note
    with pytest.raises(UserError, match=r"reads 64 tokens at most.*left out.*kv_cache_gib") as error:
        said(here, "hello")
    assert "up to 512" in str(error.value)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"compare": "[./nowhere]"}, ["load_parameters_path=./nowhere", "no such file"]),
        ({"compare": "nowhere"}, ["load_parameters_path=nowhere", "no such folder"]),
        ({"chat_template": "{{ raise_exception('No!') }}"}, ["No!", "chat_template_path"]),
        ({"top_p": 2}, ["top_p=2", "less than or equal to 1"]),
        ({"load_parameters_path": ""}, ["no model"]),
    ],
)
def test_what_cannot_be_talked_with_is_refused_before_weights_are_read(tiny_model, capsys, monkeypatch, keys, words):
    if "compare" not in keys:
        monkeypatch.setattr(huggingface, "load", lambda *_: pytest.fail("weights were read"))
    chosen = {"load_parameters_path": tiny_model} | keys
    assert cli.main(["chat", CACHE, *(f"{name}={value}" for name, value in chosen.items())]) == 2
    message = capsys.readouterr().err
    assert message.startswith("luthier chat: ")
    assert all(word in message for word in words), message


def test_a_template_that_is_named_is_not_for_models_that_have_one(tiny_model, tmp_path, monkeypatch, capsys):
    tiny.write_model(tmp_path / "bare")
    (tmp_path / "bare" / "chat_template.jinja").unlink()
    (tmp_path / "own.jinja").write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    heard = []
    monkeypatch.setattr(chat, "converse", lambda session, screen: heard.extend(session.voices))
    keys = (f"chat_template_path={tmp_path / 'own.jinja'}", f"compare=[{tiny_model},{tmp_path / 'bare'}]")
    assert cli.main(["chat", CACHE, f"load_parameters_path={tiny_model}", *keys]) == 0
    asked_by = [WORDS.decode(each.prompt([{"role": "user", "content": "a"}])) for each in heard]
    assert asked_by == ["<a>", asked("user", "a"), "<a>"]
    told = capsys.readouterr().err.replace("\n", " ")
    assert told.count("goes by a chat template of its own") == 1


def command(model, *keys: str) -> list[str]:
    return [sys.executable, "-m", "luthier", "chat", f"load_parameters_path={model}", CACHE, *keys]


@pytest.mark.multiprocess
def test_lines_from_a_pipe_are_answered(tiny_model):
    keys = (f"compare=[{tiny_model}]", "temperature=0", "max_new_tokens=5", "ignore_eos=true")
    lines = "hello\n/settings top_k=3\n/rest\nmore\n"
    done = subprocess.run(
        command(tiny_model, *keys), input=lines, env=ENVIRONMENT, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr
    blocks = done.stdout.split(f"[{tiny_model}]\n")
    assert blocks[0] == ""
    assert len(blocks) == 5, "two answers of two models"
    assert blocks[1] == blocks[2], "the same model answers the same"
    assert "Did you mean `/reset`?" in done.stderr
    assert "top_k=3" in done.stderr
    assert "Traceback" not in done.stderr


CONTROLLED = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)
"""A program that runs another under the terminal it was given, so that Ctrl-C reaches it."""


class Person:
    """Someone at the other end of a pseudo-terminal."""

    def __init__(self, *command: str) -> None:
        self._ours, theirs = pty.openpty()
        ends = {"stdin": theirs, "stdout": theirs, "stderr": theirs, "start_new_session": True}
        self.process = subprocess.Popen([sys.executable, "-c", CONTROLLED, *command], env=ENVIRONMENT, **ends)
        os.close(theirs)
        self.unread = self.seen = ""

    def wait_for(self, what: str, seconds: float = 120) -> None:
        """Read until ``what`` comes."""
        deadline = time.monotonic() + seconds
        while what not in self.unread:
            assert time.monotonic() < deadline, self.seen
            if select.select([self._ours], [], [], 0.1)[0]:
                new = os.read(self._ours, 65536).decode(errors="replace")
                self.unread, self.seen = self.unread + new, self.seen + new
        self.unread = self.unread.split(what, 1)[1]

    def type(self, keys: str) -> None:
        """Wait for the prompt, and for the program to read a line, and type."""
        self.wait_for("> ")
        self.settle()
        os.write(self._ours, keys.encode())

    def settle(self) -> None:
        """Wait until the main thread sleeps, as it does where it waits for a key, however busy the machine is."""
        stat, deadline, sleeps = Path(f"/proc/{self.process.pid}/stat"), time.monotonic() + 120, 0
        while sleeps < 5:
            assert time.monotonic() < deadline, self.seen
            time.sleep(0.05)
            # Where there is no such file, the time alone has to do.
            sleeps = sleeps + 1 if not stat.exists() or stat.read_text().rpartition(") ")[2][0] == "S" else 0

    def press(self, key: str) -> None:
        """Press a key at once."""
        os.write(self._ours, key.encode())

    def leave(self) -> None:
        """Hang up."""
        os.close(self._ours)
        self.process.wait(timeout=60)


@pytest.mark.multiprocess
@pytest.mark.slow
def test_a_terminal_streams_stops_and_is_left(tmp_path):
    tiny.write_model(tmp_path / "model", max_position_embeddings=20_000)
    keys = ("max_new_tokens=19000", "ignore_eos=true", "temperature=0")
    person = Person(*command(tmp_path / "model", *keys)[1:])
    person.type("hello\n")
    person.wait_for("hello\r\n")
    time.sleep(1)  # an answer of minutes is under way, or the program for it is being compiled
    person.press("\x03")
    person.wait_for("(stopped)")
    person.type("/system be\n")
    person.wait_for("The system message is set")
    person.type("not sent")
    person.wait_for("not sent")
    person.settle()  # readline takes up a signal while it waits, not while it reads what came with it
    person.press("\x03")
    person.wait_for("Ctrl-C again, Ctrl-D or /exit leaves.")
    person.type("\x04")
    assert person.process.wait(timeout=60) == 0
    assert "Traceback" not in person.seen
    person.leave()
