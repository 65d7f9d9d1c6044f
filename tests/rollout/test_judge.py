"""A model as judge: what is asked of its endpoint, what is read from its replies, and what becomes of its failures."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from luthier.errors import UserError
from luthier.rollout import judge as judge_lib
from luthier.rollout import reward
from luthier.rollout.reward import Group
from luthier.rollout.workers import Scorers

KEY = "sk-not-to-be-shown"


class Endpoint:
    """A chat endpoint that answers what ``answer`` says: (status, reply) of a question and how often it was asked."""

    def __init__(self, answer: Callable[[str, int], tuple[int, Any]]):
        self.requests: list[dict[str, Any]] = []
        self.asked: dict[str, int] = {}
        self.at_once = self.most_at_once = 0
        lock, endpoint = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                question = body["messages"][0]["content"]
                with lock:
                    endpoint.requests.append({"path": self.path, "key": self.headers["Authorization"], **body})
                    endpoint.asked[question] = endpoint.asked.get(question, 0) + 1
                    endpoint.at_once += 1
                    endpoint.most_at_once = max(endpoint.most_at_once, endpoint.at_once)
                try:
                    status, reply = answer(question, endpoint.asked[question])
                    if status == 0:  # hang up
                        return
                    if isinstance(reply, str):
                        reply = {"choices": [{"message": {"role": "assistant", "content": reply}}]}
                    self.send_response(status)
                    if status == 429:
                        self.send_header("Retry-After", "0.1")
                    self.end_headers()
                    self.wfile.write(reply if isinstance(reply, bytes) else json.dumps(reply).encode())
                finally:
                    with lock:
                        endpoint.at_once -= 1

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_: Any) -> None:
                """The client is gone: it waits no longer than it is to."""

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


@pytest.fixture
def serve(monkeypatch) -> Iterator[Callable[..., Endpoint]]:
    monkeypatch.setattr(judge_lib, "_FIRST_WAIT", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    open_: list[Endpoint] = []

    def start(answer: Callable[[str, int], tuple[int, Any]]) -> Endpoint:
        open_.append(Endpoint(answer))
        threading.Thread(target=open_[-1].server.serve_forever, args=(0.02,), daemon=True).start()
        return open_[-1]

    yield start
    for each in open_:
        each.server.shutdown()
        each.server.server_close()


def score(url: str, *completions: Any, reference: str | None = None, asked: Any = "2 + 2?", **settings: Any) -> Any:
    """Judge completions, which by default are all that the judge sees."""
    settings = {"base_url": url, "model": "grader", "prompt": "{completion}"} | settings
    [loaded] = reward.load(["judge"], {"judge": settings})
    return reward.score(loaded, Group(asked, completions, [[1]] * len(completions), {}, reference, "line 3"))


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("Score: 7", 0.7), ("Score: **7**.", 0.7), ("7/10", 0.7), ("I gave it 3, but now 7 out of 10", 0.7),
        ("The 4 steps are right. Score: 10 / 10", 1.0), ("0", 0.0), ("2.5", 0.25), ("x10 is 5", 0.5),
    ],
)  # fmt: skip
def test_the_last_number_is_the_score(serve, reply, value):
    assert score(serve(lambda *_: (200, reply)).url, "four") == ([value], None)


def test_a_range_of_its_own(serve):
    endpoint = serve(lambda question, _: (200, question))
    assert score(endpoint.url, "-1", "0", "1", low=-1, high=1)[0] == [0, 0.5, 1]


@pytest.mark.parametrize("reply", ["no idea", "Score: 11", "-3", "", "7/100"])
def test_replies_without_a_score_are_failures(serve, reply):
    rewards, failure = score(serve(lambda *_: (200, reply)).url, "four")
    assert np.isnan(rewards).all()
    assert failure.lost == 1
    assert "the judge gave" in failure.reason


def test_what_is_asked(serve):
    endpoint = serve(lambda *_: (200, "5"))
    assert score(f"{endpoint.url}/", "four", options={"max_tokens": 9, "temperature": 0})[0] == [0.5]
    turns = [{"role": "system", "content": "Add."}, {"role": "user", "content": "2 + 2?"}]
    said = [{"role": "assistant", "content": "a {reference}"}]
    prompt = "Q {prompt} A {completion} R {reference} {high} {other} {"
    assert score(endpoint.url, said, asked=turns, reference="4", prompt=prompt, high=5)[0] == [1.0]
    first, second = endpoint.requests
    assert (first["path"], first["model"], first["key"]) == ("/v1/chat/completions", "grader", None)
    assert (first["max_tokens"], first["temperature"]) == (9, 0)
    assert first["messages"] == [{"role": "user", "content": "four"}]
    text = second["messages"][0]["content"]
    assert text == "Q system: Add.\n\nuser: 2 + 2? A a {reference} R 4 5 {other} {"


def test_the_prompts_by_default_show_a_reference_where_there_is_one(serve):
    endpoint, texts = serve(lambda *_: (200, "5")), []
    for reference in (None, "is 4"):
        assert score(endpoint.url, "four", reference=reference, prompt="") == ([0.5], None)
        texts.append(endpoint.requests[-1]["messages"][0]["content"])
    assert all("2 + 2?" in text and "four" in text and "from 0 to 10" in text for text in texts)
    assert "is 4" in texts[1]
    assert "eference" not in texts[0]


def test_a_prompt_with_a_reference_needs_one(serve):
    endpoint = serve(lambda *_: (200, "5"))
    rewards, failure = score(endpoint.url, "four", prompt="{completion} {reference}")
    assert np.isnan(rewards).all()
    assert failure is None
    assert not endpoint.requests


@pytest.mark.parametrize("status", [429, 500, 503, 0])
def test_what_may_pass_is_tried_again(serve, status):
    endpoint = serve(lambda _, tries: (200, "5") if tries == 3 else (status, "busy"))
    assert score(endpoint.url, "four", "five") == ([0.5, 0.5], None)
    assert endpoint.asked == {"four": 3, "five": 3}


@pytest.mark.parametrize("status", [429, 503, 0])
def test_tries_are_bounded_and_cost_one_completion(serve, status):
    endpoint = serve(lambda question, _: (status, "busy") if question == "five" else (200, "5"))
    rewards, failure = score(endpoint.url, "four", "five", "six", tries=2)
    np.testing.assert_array_equal(rewards, [0.5, np.nan, 0.5])
    assert failure.lost == 1
    assert failure.reason.endswith("(tried 2 times). (completion 2)")
    assert endpoint.asked["five"] == 2


@pytest.mark.parametrize(
    ("status", "reply", "message"),
    [
        (401, {"error": f"wrong key {KEY}"}, "status 401: {\"error\": \"wrong key ***\"}"),
        (404, "no such model", "status 404"),
        (200, b"<html>", "not that of a chat endpoint: JSONDecodeError"),
        (200, {"choices": []}, "not that of a chat endpoint: IndexError"),
        (200, {"choices": [{"message": {"content": None}}]}, "without a text"),
    ],
)  # fmt: skip
def test_what_will_not_pass_is_not_tried_again(serve, monkeypatch, status, reply, message):
    monkeypatch.setenv("GRADER_KEY", KEY)
    endpoint = serve(lambda *_: (status, reply))
    rewards, failure = score(endpoint.url, "four", api_key_variable="GRADER_KEY")
    assert np.isnan(rewards).all()
    assert message in failure.reason
    assert KEY not in failure.reason
    assert len(endpoint.requests) == 1
    assert endpoint.requests[0]["key"] == f"Bearer {KEY}"


def test_an_endpoint_that_is_not_there():
    rewards, failure = score("http://127.0.0.1:9/v1", "four", tries=1)
    assert np.isnan(rewards).all()
    assert "the judge cannot be reached" in failure.reason


def test_replies_that_do_not_come_cost_only_themselves(serve):
    endpoint = serve(lambda question, _: (200, "5") if question == "four" else (time.sleep(3), (200, "5"))[1])
    started = time.monotonic()
    rewards, failure = score(endpoint.url, "four", "five", "six", seconds=0.5)
    assert time.monotonic() - started < 2.5
    np.testing.assert_array_equal(rewards, [0.5, np.nan, np.nan])
    assert failure.lost == 2


def test_a_group_is_judged_side_by_side(serve):
    endpoint = serve(lambda *_: (time.sleep(0.2), (200, "5"))[1])
    assert score(endpoint.url, *"abcdefgh", concurrency=4) == ([0.5] * 8, None)
    assert 2 <= endpoint.most_at_once <= 4


def test_the_key_comes_from_the_environment(serve, monkeypatch):
    endpoint = serve(lambda *_: (200, "5"))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert score(endpoint.url, "four") == ([0.5], None)
    assert endpoint.requests[0]["key"] == f"Bearer {KEY}"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_url": "localhost:8000"}, "base_url='localhost:8000' is no address"),
        ({"prompt": "Grade it."}, "has no {completion} in it"),
        ({"low": 3, "high": 3}, "low must be under high"),
        ({"tries": 0}, "the others over 0"),
        ({"api_key_variable": "NOT_SET_ANYWHERE"}, "api_key_variable=NOT_SET_ANYWHERE: no such environment variable"),
        ({"api_key_variable": KEY}, "is no name of an environment variable"),
        ({"api_key": KEY}, "`judge` has no setting `api_key`. Did you mean `api_key_variable`?"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(UserError) as error:
        score("http://127.0.0.1:9/v1", "four", **settings)
    assert message in str(error.value)
    assert KEY not in str(error.value)


def test_a_judge_in_a_process(serve, monkeypatch):
    monkeypatch.setenv("GRADER_KEY", KEY)
    endpoint = serve(lambda question, _: (200, "4") if "four" in question else (400, "no"))
    settings = {"judge": {"base_url": endpoint.url, "model": "grader", "api_key_variable": "GRADER_KEY"}}
    with pytest.raises(UserError, match="`judge` needs a setting `base_url`"):
        Scorers(["judge"], workers=1)
    with Scorers(["judge"], settings, workers=1, timeout=30) as scorers:
        scored = scorers.submit(Group("2 + 2?", ["four", "five"], [[1], [2]], {}, "4", "line 3")).result()
    np.testing.assert_array_equal(scored.rewards_GF, [[0.4], [np.nan]])
    assert [(each.lost, "status 400" in each.reason) for each in scored.failures] == [(1, True)]
    assert endpoint.requests[0]["key"] == f"Bearer {KEY}"
