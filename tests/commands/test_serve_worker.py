"""The server around an engine that does as it is told: full queues, failures, ends, keys, and what is no request."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import openai
import pytest
from serving import Serving, serving, until

import tiny
from luthier import mesh
from luthier.commands.server import app, job, words
from luthier.commands.server.answer import Choice
from luthier.commands.server.job import Job, Served
from luthier.commands.server.refusal import Refusal
from luthier.commands.server.worker import Ticket
from luthier.config import ModelKeys
from luthier.data.chat import Rendering
from luthier.rollout.engine import Completion, Piece, Request, Sampling

SERVED = Served("tiny", 7, tiny.tokenizer(), Rendering(), Sampling(max_new_tokens=3), 259)
ASK = {"model": "tiny", "prompt": "a"}


def sampled(kind: Any, number: int, sample: int, ids: Sequence[int], *more: Any) -> Any:
    zeros_T = np.zeros(len(ids), np.float32)
    versions = [np.zeros(len(ids), np.int32)] if kind is Completion else []
    return kind(number, sample, np.asarray(ids, np.int32), zeros_T, zeros_T, *versions, *more)


class Scripted:
    """An engine of one slot that draws one letter a step, and only when it was given leave to."""

    length = 8

    def __init__(self) -> None:
        self.leave = threading.Semaphore(0)
        self.fail: Exception | None = None
        self.queue: list[list[Any]] = []  # [number, sample, letters so far, letters wanted, cancelled]
        self.count = 0
        self.stepping = False

    @property
    def busy(self) -> bool:
        return bool(self.queue)

    def check(self, request: Request) -> None:
        pass

    def submit(self, request: Request) -> int:
        self.count += 1
        wanted = request.sampling.max_new_tokens
        self.queue += [[self.count, sample, 0, wanted, False] for sample in range(request.samples)]
        return self.count

    def cancel(self, number: int) -> None:
        for entry in self.queue:
            entry[4] |= entry[0] == number

    def step(self) -> list[Piece | Completion]:
        gone = [entry for entry in self.queue if entry[4]]
        self.queue = [entry for entry in self.queue if not entry[4]]
        ended: list[Any] = [sampled(Completion, e[0], e[1], [67] * e[2], "cancelled") for e in gone]
        if not self.leave.acquire(timeout=0.005) or not self.queue:
            return ended
        if self.fail:
            raise self.fail
        first = self.queue[0]
        first[2] += 1
        pieces = [sampled(Piece, first[0], first[1], [67])]
        if first[2] == first[3]:
            ended.append(sampled(Completion, first[0], first[1], [67] * first[2], "length"))
            self.queue.pop(0)
        return [*pieces, *ended]

    def allow(self, steps: int) -> None:
        self.leave.release(steps)


@contextlib.contextmanager
def scripted(**options: Any) -> Iterator[tuple[Scripted, Serving, ThreadPoolExecutor]]:
    engine = Scripted()
    place = mesh.make(ModelKeys(), jax.devices()[:1])
    with ThreadPoolExecutor(8) as pool, serving(SERVED, engine, place, **options) as running:
        yield engine, running, pool


def ask(running: Serving, pool: ThreadPoolExecutor, **fields: Any) -> Future[Any]:
    return pool.submit(running.client().completions.create, **ASK | fields)


def waiting(running: Serving) -> int:
    return running.running.worker._waiting


def test_a_full_queue_refuses_with_the_time_to_try_again() -> None:
    with scripted(max_queue=2) as (engine, running, pool):
        first = ask(running, pool)
        until(lambda: waiting(running) == 1)
        engine.allow(1)
        until(lambda: waiting(running) == 0)  # begun
        others = [ask(running, pool), ask(running, pool)]
        until(lambda: waiting(running) == 2)
        with pytest.raises(openai.RateLimitError, match="2 completions are waiting, of 2 that may") as full:
            running.client().completions.create(**ASK)
        assert full.value.response.headers["retry-after"] == "1"
        assert full.value.code == "queue_full"
        engine.allow(8)
        assert [done.result().choices[0].text for done in (first, *others)] == ["aaa"] * 3
        engine.allow(3)
        assert running.client().completions.create(**ASK).choices[0].text == "aaa"


@pytest.mark.parametrize(
    ("fields", "field"),
    [({"n": 3}, "n"), ({"prompt": ["a", "b", "c"]}, "prompt"), ({"n": 2, "prompt": [[1], [2]]}, "n")],
)
def test_more_than_the_queue_holds_is_refused_for_good(fields: dict[str, Any], field: str) -> None:
    with scripted(max_queue=2) as (_, running, _), pytest.raises(openai.BadRequestError, match="takes 2 at most") as no:
        running.client().completions.create(**ASK | fields)
    assert no.value.param == field


def test_a_prompt_that_the_cache_has_no_room_for_is_refused_and_the_rest_goes_on() -> None:
    """The engine's own check is by the model's context, which memory may not allow."""
    with scripted() as (engine, running, _):
        for prompt in ([[1] * 8], [[1, 2], [1] * 9]):
            with pytest.raises(openai.BadRequestError, match=r"tokens, and .* have 8 here") as no:
                running.client().completions.create(**ASK | {"prompt": prompt})
            assert no.value.param == "prompt"
        engine.allow(3)
        assert running.client().completions.create(**ASK | {"prompt": [1] * 7}).choices[0].text == "aaa"


def test_a_long_body_does_not_hold_up_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    read, leave, begun = app.read_completion, threading.Event(), threading.Event()

    def slow(data: bytes, served: Served) -> Job:
        if len(data) > 100_000:
            begun.set()
            assert leave.wait(30)
        return read(data, served)

    monkeypatch.setattr(app, "read_completion", slow)
    with scripted() as (engine, running, pool):
        long = ask(running, pool, prompt="a" * 100_001)
        assert begun.wait(10)
        engine.allow(3)
        assert running.client().completions.create(**ASK).choices[0].text == "aaa"
        leave.set()
        with pytest.raises(openai.BadRequestError, match="have 8 here"):
            long.result()


def test_the_openai_client_tries_a_full_queue_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with scripted(max_queue=1) as (engine, running, pool):
        worker, refused = running.running.worker, threading.Event()
        submit = worker.submit

        def watched(job: Job) -> Ticket:
            try:
                return submit(job)
            except Refusal:
                refused.set()
                raise

        monkeypatch.setattr(worker, "submit", watched)
        first = ask(running, pool)
        until(lambda: waiting(running) == 1)
        second = pool.submit(running.client(max_retries=9).completions.create, **ASK)
        assert refused.wait(10)
        engine.allow(6)
        assert (first.result().choices[0].text, second.result().choices[0].text) == ("aaa", "aaa")


def test_one_who_goes_away_while_waiting_leaves_the_queue() -> None:
    with scripted(max_queue=2) as (engine, running, pool):
        first = ask(running, pool)
        until(lambda: waiting(running) == 1)
        with pytest.raises(openai.APITimeoutError):
            running.client(timeout=0.1).completions.create(**ASK)
        until(lambda: waiting(running) == 1)
        assert len(engine.queue) == 1
        engine.allow(3)
        assert first.result().choices[0].text == "aaa"
        worker = running.running.worker
        until(lambda: not (worker._open or worker._places or worker._unfinished or waiting(running)))


def test_a_failure_of_the_engine_reaches_all_and_ends_the_server() -> None:
    with scripted() as (engine, running, pool):
        whole = ask(running, pool, max_tokens=50)
        stream = running.client().completions.create(**ASK | {"max_tokens": 50, "stream": True})
        until(lambda: waiting(running) == 2)
        engine.allow(50)
        until(lambda: waiting(running) == 1)
        engine.allow(2)
        assert next(iter(stream)).choices[0].text == "a"
        engine.fail = MemoryError("the device is full")
        engine.allow(1)
        with pytest.raises(openai.APIError, match="the engine has failed"):
            list(stream)
        assert whole.result().choices[0].text == "a" * 50
        assert running.ended.wait(20)
        assert running.failure is engine.fail
        with pytest.raises(openai.APIConnectionError):
            running.client().completions.create(**ASK)


def test_a_failure_of_the_engine_is_status_500_before_the_first_token() -> None:
    with scripted() as (engine, running, pool):
        engine.fail = MemoryError("the device is full")
        asked = [ask(running, pool), ask(running, pool)]
        until(lambda: waiting(running) == 2)
        engine.allow(1)
        for future in asked:
            with pytest.raises(openai.InternalServerError) as failed:
                future.result()
            assert failed.value.status_code == 500
            assert failed.value.type == "server_error"
        assert running.ended.wait(20)


def test_what_runs_is_finished_when_the_server_stops() -> None:
    with scripted(patience=20) as (engine, running, pool):
        asked = ask(running, pool)
        until(lambda: waiting(running) == 1)
        running.stop()
        until(lambda: running.running.worker.draining)
        engine.allow(3)
        assert asked.result().choices[0].text == "aaa"
        assert running.ended.wait(10)
        assert running.failure is None


def test_what_does_not_finish_in_time_is_told_so() -> None:
    with scripted(patience=0.1) as (engine, running, pool):
        asked = ask(running, pool)
        stream = iter(running.client().completions.create(**ASK | {"stream": True}))
        until(lambda: waiting(running) == 2)
        running.stop()
        with pytest.raises(openai.InternalServerError, match="server was stopped") as stopped:
            asked.result()
        assert stopped.value.status_code == 503
        with pytest.raises(openai.APIError, match="server was stopped"):
            list(stream)
        assert running.ended.wait(10)
        assert running.failure is None
        assert not engine.busy


def request(running: Serving, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, Any]:
    """A request that no client of OpenAI's would send; return status, headers and JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=10)
    sent = {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body if isinstance(body, bytes) else json.dumps(body), sent)
    answer = connection.getresponse()
    data = answer.read()
    connection.close()
    return answer.status, answer.headers, json.loads(data) if data.startswith(b"{") else data


@pytest.fixture(scope="module")
def bare() -> Iterator[Serving]:
    with scripted() as (_, running, _):
        yield running


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status", "message"),
    [
        ("POST", "/v1/completions", b"{", {}, 400, "not valid JSON"),
        ("POST", "/v1/completions", ASK | {"model": "other"}, {}, 404, "`other` is not served here"),
        ("POST", "/v1/completions", ASK, {"Content_Type": "text/plain"}, 415, "application/json"),
        ("POST", "/v1/completions", b'"' + b"a" * (9 << 20) + b'"', {}, 413, "8 MiB"),
        ("GET", "/v1/completions", None, {}, 405, "method not allowed"),
        ("GET", "/v1/embeddings", None, {}, 404, "not found"),
    ],
)
def test_what_is_no_request_is_answered_in_the_same_shape(
    bare: Serving, method: str, path: str, body: Any, headers: dict[str, str], status: int, message: str
) -> None:
    answered, _, content = request(bare, method, path, body, **headers)
    assert answered == status
    assert content["error"].keys() == {"message", "type", "param", "code"}
    assert message in content["error"]["message"]


def test_a_fault_of_our_own_is_status_500_and_logged(
    bare: Serving, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("a fault")

    monkeypatch.setattr(job.text, "encode_text", broken)
    status, _, content = request(bare, "POST", "/v1/completions", ASK)
    assert (status, content["error"]["type"]) == (500, "server_error")
    assert "a fault" not in content["error"]["message"]
    until(lambda: "a fault" in caplog.text)
    assert request(bare, "GET", "/health")[0] == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:80", 200),
        ("localhost", 200),
        ("[::1]:8000", 200),
        ("LocalHost:1", 200),
        ("evil.example", 400),
        ("", 400),
        ("evil.example:localhost", 400),
        ("127.0.0.1.evil", 400),
    ],
)
def test_without_a_key_only_this_machine_s_names_are_answered(bare: Serving, host: str, status: int) -> None:
    answered, _, content = request(bare, "GET", "/v1/models", Host=host)
    assert answered == status
    if status == 400:
        assert content["error"].keys() == {"message", "type", "param", "code"}
        assert all(each in content["error"]["message"] for each in (f"`{host}`", "localhost", "api_key=", "host="))


def test_a_key_is_asked_for() -> None:
    with scripted(api_key="sésame") as (engine, running, _):
        for given in ("", "Bearer", "Bearer wrong", "sésame"):
            status, headers, content = request(running, "GET", "/v1/models", Authorization=given)
            assert (status, headers["WWW-Authenticate"]) == (401, "Bearer")
            assert content["error"]["code"] == "invalid_api_key"
        with pytest.raises(openai.AuthenticationError):
            running.client("wrong").completions.create(**ASK)
        key = "Bearer sésame".encode().decode("latin-1")
        assert request(running, "GET", "/v1/models", Authorization=key, Host="models.example")[0] == 200
        assert request(running, "GET", "/v1/models", Authorization=key.replace("Bearer", "bearer"))[0] == 200
        assert request(running, "GET", "/health")[0] == 200
        assert not engine.busy


def test_a_connection_that_says_nothing_does_not_hold_the_end_up() -> None:
    with scripted() as (_, running, _), socket.create_connection(("127.0.0.1", running.port)):
        running.stop()
        assert running.ended.wait(10)


def test_each_token_of_a_character_is_at_its_place() -> None:
    ids = SERVED.tokenizer.encode("aé b😀c", add_special_tokens=False)
    asked = Job("tiny", (Request([67], 1, Sampling()),), "prompt", True, False, False, True)
    choice = Choice(0, asked, SERVED, words.reader(SERVED.tokenizer))
    text, tokens = choice.push(sampled(Piece, 0, 0, ids))
    assert text + choice.close() == "aé b😀c"
    assert [token.offset for token in tokens] == [0, 1, 1, 2, 3, 4, 4, 4, 4, 5]
    assert b"".join(bytes(token.word.bytes or []) for token in tokens) == "aé b😀c".encode()
    assert [token.word.text for token in tokens][:5] == ["a", r"bytes:\xc3", r"bytes:\xa9", " ", "b"]


@pytest.mark.parametrize(
    ("name", "expected"), [("<0xE4>", [0xE4]), ("ĠÃ", [0x20, 0xC3]), ("Ċ", [0x0A]), ("\ufffd", None), ("漢", None)]
)
def test_bytes_of_names_in_vocabularies(name: str, expected: list[int] | None) -> None:
    assert words._bytes(name) == expected
