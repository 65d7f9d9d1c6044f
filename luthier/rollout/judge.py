"""A reward from a model that judges, behind any endpoint that speaks OpenAI's chat completions.

The completions of a group are judged side by side, each by one request. One that fails in a way that may pass (no
connection, status 429 or 5xx) is tried again, later each time, until ``tries`` or ``seconds`` are used up. What then
has no score is given as an exception in its reward's place: it loses that one reward.

The API key is read from an environment variable, whose name is the setting: so no key stands in a recipe, in a run's
``config.yml`` or in a message.

Left out on purpose: several judges or votes (name the function's path twice in a file of your own), and streaming.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

from luthier.errors import UserError
from luthier.rollout.verifiers import Text, text_of

PROMPT = """You grade an answer to a task.

Task:
{prompt}

Answer to grade:
{completion}

Judge how correct and helpful the answer is. End with a line `Score: N`, where N is a number from {low} to {high}."""
WITH_REFERENCE = PROMPT.replace("\n\nAnswer to grade:", "\n\nReference answer:\n{reference}\n\nAnswer to grade:")
"""The prompts that a judge gets by default: for rows without and with a reference."""
_PLACES = re.compile(r"\{(prompt|completion|reference|low|high)\}")
_NUMBER = r"(?<![\w.])-?\d+(?:\.\d+)?"
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 8.0
"""Seconds before the second try, doubled before each further one up to the longest."""
_SHOWN = 200
"""Characters of an answer that a message shows."""


@dataclass(frozen=True)
class _Judge:
    url: str
    model: str
    key: str = field(repr=False)
    tries: int
    deadline: float
    options: Mapping[str, Any]


class _Passing(Exception):
    """A failure that a further try may mend, and how long the endpoint asks to wait before it."""

    def __init__(self, message: str, wait: float = 0.0):
        super().__init__(message)
        self.wait = wait


def judge(
    prompts: Sequence[Text],
    completions: Sequence[Text],
    reference: Sequence[str | None],
    *,
    base_url: str,
    model: str,
    api_key_variable: str = "",
    prompt: str = "",
    low: float = 0.0,
    high: float = 10.0,
    seconds: float = 45.0,
    tries: int = 4,
    concurrency: int = 16,
    options: Mapping[str, Any] | None = None,
) -> list[float | Exception | None]:
    """The score that a model gives, from 0 (``low``) to 1 (``high``); the last number of its reply is taken for it.

    ``prompt`` is what it is asked; in it, ``{prompt}``, ``{completion}``, ``{reference}``, ``{low}`` and ``{high}``
    are filled in. Rows without a reference, where that asks for one, are not judged: None. ``base_url`` is what
    ``/chat/completions`` is added to. ``api_key_variable`` is the environment variable with the API key, by default
    OPENAI_API_KEY, if it is set. ``seconds`` is for a whole group. ``options`` go into each request: ``max_tokens``
    and the like.
    """
    if not re.match(r"https?://\S+$", str(base_url)):
        raise UserError(f"base_url={base_url!r} is no address: http://... or https://...")
    if prompt and "{completion}" not in prompt:
        raise UserError("the setting `prompt` has no {completion} in it, so there would be nothing to judge.")
    if not low < high or seconds <= 0 or tries < 1 or concurrency < 1:
        raise UserError(
            f"low={low}, high={high}, seconds={seconds}, tries={tries}, concurrency={concurrency}: "
            "low must be under high, and the others over 0."
        )
    key, limits = _key(api_key_variable), {"low": f"{low:g}", "high": f"{high:g}"}
    endpoint = f"{base_url.rstrip('/')}/chat/completions"
    asked = _Judge(endpoint, model, key, tries, time.monotonic() + seconds, dict(options or {}))
    questions = [
        _question(prompt, {"prompt": _text_shown(said), "completion": text_of(given), "reference": known, **limits})
        for said, given, known in zip(prompts, completions, reference, strict=True)
    ]
    replies = _ask_all(asked, questions, min(concurrency, max(len(questions), 1)))
    return [reply if not isinstance(reply, str) else _scored(reply, low, high) for reply in replies]


def _text_shown(prompt: Text) -> str:
    """Return a prompt as one text: itself, or its messages with their roles where there are more than one."""
    if isinstance(prompt, str) or len(prompt) == 1:
        return text_of(prompt)
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _key(variable: str) -> str:
    if variable and not re.fullmatch(r"[A-Za-z_]\w*", variable):
        # What stands there may be the key itself: it is not shown.
        raise UserError("api_key_variable is no name of an environment variable. The key itself has no place there.")
    if variable and variable not in os.environ:
        raise UserError(f"api_key_variable={variable}: no such environment variable. Set it to the endpoint's API key.")
    return os.environ.get(variable or "OPENAI_API_KEY", "")


def _question(template: str, values: Mapping[str, str | None]) -> str | None:
    """Return what the judge is asked, None where there is no reference to fill in. What is filled in is left as is."""
    template = template or (PROMPT if values["reference"] is None else WITH_REFERENCE)
    if values["reference"] is None and "{reference}" in template:
        return None
    return _PLACES.sub(lambda place: values[place[1]] or "", template)


def _ask_all(asked: _Judge, questions: Sequence[str | None], workers: int) -> list[str | Exception | None]:
    """Return the reply to each question, None for none, and what went wrong where there is no reply."""
    pool = ThreadPoolExecutor(workers, "judge")
    futures: list[Future[str] | None] = [
        None if question is None else pool.submit(_reply, asked, question) for question in questions
    ]
    wait([future for future in futures if future is not None], max(asked.deadline - time.monotonic(), 0))
    # A reply that trickles in has no limit of its own: it is left behind.
    pool.shutdown(wait=False, cancel_futures=True)
    return [None if future is None else _outcome(future) for future in futures]


def _outcome(future: Future[str]) -> str | Exception:
    if future.cancelled() or not future.done():
        return TimeoutError("the judge did not reply in time")
    error = future.exception()
    # Without where it was raised: that is in this file, and no news to the user.
    return error.with_traceback(None) if isinstance(error, Exception) else future.result()


def _reply(asked: _Judge, question: str) -> str:
    """Return the reply to a question, asked as often as it may help."""
    pause, tried = _FIRST_WAIT, 1
    while True:
        try:
            return _request(asked, question)
        except _Passing as error:
            # Up to half as long again at random, so that not all requests come back at once.
            seconds = max(pause * random.uniform(1, 1.5), error.wait)
            if tried == asked.tries or time.monotonic() + seconds >= asked.deadline:
                raise ConnectionError(f"{error} (tried {tried} times)") from None
        time.sleep(seconds)
        pause, tried = min(2 * pause, _LONGEST_WAIT), tried + 1


def _request(asked: _Judge, question: str) -> str:
    """Return the reply to one request. Raises _Passing, or another exception where a further try is no use."""
    body = {"model": asked.model, "messages": [{"role": "user", "content": question}], **asked.options}
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {asked.key}"} if asked.key else {})
    request = urllib.request.Request(asked.url, json.dumps(body).encode(), headers)
    left = max(asked.deadline - time.monotonic(), 0.001)
    try:
        with urllib.request.urlopen(request, timeout=left) as response:
            answer = json.load(response)
        reply = answer["choices"][0]["message"]["content"]
    except urllib.error.HTTPError as error:
        said = f"the judge answered with status {error.code}: {_shown(_body(error), asked.key)}"
        if error.code == 429 or error.code >= 500:
            raise _Passing(said, _asked_wait(error.headers.get("Retry-After"))) from None
        raise ConnectionError(said) from None
    except (OSError, http.client.HTTPException) as error:
        raise _Passing(f"the judge cannot be reached: {_shown(str(error), asked.key)}") from None
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"the judge's answer is not that of a chat endpoint: {type(error).__name__}: {error}"
        ) from None
    if not isinstance(reply, str):
        raise ValueError("the judge replied without a text")
    return reply


def _body(error: urllib.error.HTTPError) -> str:
    try:
        return error.read().decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return error.reason


def _asked_wait(header: str | None) -> float:
    return float(header) if header and re.fullmatch(r"\d+(\.\d+)?", header) else 0.0


def _shown(text: str, key: str) -> str:
    return (text.replace(key, "***") if key else text)[:_SHOWN].strip()


def _scored(reply: str, low: float, high: float) -> float | Exception:
    """Return the last number of a reply as a share of the way from ``low`` to ``high``; ``7/10`` is 7."""
    numbers = re.findall(rf"({_NUMBER})(?:\s*(?:/|out of)\s*{re.escape(f'{high:g}')}(?![\d.]*\d))?", reply)
    if not numbers:
        return ValueError(f"the judge gave no number: {reply[-_SHOWN:]!r}")
    value = float(numbers[-1])
    if not low <= value <= high:
        return ValueError(f"the judge gave {value:g}, which is not from {low:g} to {high:g}: {reply[-_SHOWN:]!r}")
    return (value - low) / (high - low)
