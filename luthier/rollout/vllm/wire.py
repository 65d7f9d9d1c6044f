"""A completion as vLLM's JSON has it: what is asked for, and what counts as an answer to that.

An answer is right in every respect or none: so many tokens with so many log-probs, all of them possible, ended in a way
that was asked for, drawn by weights with a known name. Left out on purpose: experts' routes, which vLLM gives of the
tokens alone that it did not find in its cache.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from luthier.rollout.engine import Alternatives, Finish, Sampling

_NOT_A_NUMBER = -9999.0
"""What vLLM says for a log-prob that is NaN or minus infinity."""
_FINISHES: dict[str, Finish] = {"stop": "stop", "length": "length", "abort": "cancelled"}


@dataclass(frozen=True)
class Asked:
    """One completion to draw: ``name`` is the request's id, of its own; ``adapter`` "" is the base.

    ``sampling.seed`` and ``sampling.max_new_tokens`` are taken as they are: the engine derives the one for each sample
    and cuts the other to what fits. ``sampling.logprobs`` is for sampling without filters.
    """

    name: str
    prompt: Sequence[int]
    sampling: Sampling
    adapter: str = ""


@dataclass(frozen=True)
class Answer:
    """One completion as a server drew it; arrays as in ``engine.Completion``.

    ``softmax_logp_T`` is NaN where there are filters: the server says what the log-probs are after them.
    """

    tokens_T: np.ndarray
    logp_T: np.ndarray
    softmax_logp_T: np.ndarray
    versions_T: np.ndarray
    finish: Finish
    stopped_by: int | str | None = None
    alternatives: Alternatives | None = None


class Wrong(Exception):
    """An answer that cannot be one to what was asked."""


def called(name: str) -> str:
    """Return what vLLM calls a request of this name."""
    return f"generate-tokens-{name}"


def request(asked: Asked) -> dict[str, Any]:
    """Return the body of ``POST /inference/v1/generate``.

    Nothing is left to the server's defaults: it stops where it is told to and nowhere else.
    """
    how = asked.sampling
    drawn = {name: getattr(how, name) for name in ("temperature", "top_p", "top_k", "min_p")}
    return {
        "request_id": asked.name,
        "token_ids": [int(token) for token in asked.prompt],
        "sampling_params": {
            **drawn,
            "stop": list(how.stop),
            "detokenize": bool(how.stop),
            "skip_special_tokens": False,
            "n": 1,
            "max_tokens": how.max_new_tokens,
            "stop_token_ids": list(how.stop_token_ids),
            "ignore_eos": True,
            "seed": how.seed,
            # The one that was drawn comes first, whatever its rank, and takes the place of one of them.
            "logprobs": how.logprobs + 1 if how.logprobs else 0,
        },
        **({"model": asked.adapter} if asked.adapter else {}),
    }


def read(asked: Asked, said: Any, vocab_size: int | None) -> Answer:
    """Return the completion that a server's JSON holds. Raises Wrong where it is none to what was asked."""
    try:
        if said["request_id"] != called(asked.name):
            raise Wrong(f"it is one to {said['request_id']}, and {called(asked.name)} was asked")
        (choice,) = said["choices"]
        tokens, finish = list(choice["token_ids"]), choice["finish_reason"]
        content, spans = choice["logprobs"]["content"], choice["weight_versions"] or []
        if finish not in _FINISHES:
            raise Wrong(f"it ended by {finish!r}, which is no way to end")
        ended = _FINISHES[finish]
        _check_tokens(tokens, ended, asked.sampling, vocab_size)
        logp_T = _logp(tokens, content)
        versions_T = _versions(spans, len(tokens))
        stopped_by = _stopped_by(choice.get("stop_reason"), tokens, asked.sampling) if ended == "stop" else None
        alternatives = _alternatives(content, asked.sampling.logprobs) if asked.sampling.logprobs else None
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        raise Wrong(f"it is not what vLLM answers: {type(error).__name__}: {error}") from None
    drawn_T, softmax_T = _both(logp_T, asked.sampling)
    return Answer(np.array(tokens, np.int32), drawn_T, softmax_T, versions_T, ended, stopped_by, alternatives)


def _check_tokens(tokens: Sequence[Any], finish: Finish, how: Sampling, vocab_size: int | None) -> None:
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in tokens):
        raise Wrong("its tokens are not whole numbers")
    outside = [token for token in tokens if token < 0 or (vocab_size is not None and token >= vocab_size)]
    if outside:
        raise Wrong(f"it drew token {outside[0]}, and the vocabulary is {vocab_size}")
    most = how.max_new_tokens
    if len(tokens) > most or (finish == "length" and len(tokens) < most) or (finish == "stop" and not tokens):
        raise Wrong(f"it ended by {finish} with {len(tokens)} tokens, and {most} were asked for")
    early = [token for token in tokens[:-1] if token in how.stop_token_ids]
    if early:
        raise Wrong(f"it went on after token {early[0]}, which ends a completion")


def _logp(tokens: Sequence[int], content: Sequence[Mapping[str, Any]]) -> np.ndarray:
    if len(content) != len(tokens):
        raise Wrong(f"it has {len(tokens)} tokens and {len(content)} log-probs")
    for token, entry in zip(tokens, content, strict=True):
        logp = entry["logprob"]
        if entry["token_id"] != token:
            raise Wrong(f"it drew token {token} and has the log-prob of token {entry['token_id']}")
        if not math.isfinite(logp) or logp <= _NOT_A_NUMBER or logp > 1e-3:
            raise Wrong(f"the log-prob of token {token} is {logp}")
    return np.array([entry["logprob"] for entry in content], np.float32)


def _versions(spans: Sequence[Mapping[str, Any]], count: int) -> np.ndarray:
    versions_T = np.zeros(count, np.int32)
    done = 0
    for span in spans:
        if span["start"] != done or not done < span["end"] <= count:
            raise Wrong(f"it says which weights drew tokens {span['start']} to {span['end']}, after {done} of {count}")
        if not str(span["version"]).lstrip("-").isdigit():
            raise Wrong(f"it was drawn by weights called {span['version']!r}, and it was given none of that name")
        versions_T[done : span["end"]] = int(span["version"])
        done = span["end"]
    if done != count:
        raise Wrong(f"it says of {done} of its {count} tokens which weights drew them")
    return versions_T


def _stopped_by(reason: Any, tokens: Sequence[int], how: Sampling) -> int | str:
    is_token = isinstance(reason, int) and reason in how.stop_token_ids and reason == tokens[-1]
    if not is_token and reason not in how.stop:
        raise Wrong(f"it stopped because of {reason!r}, which was not asked for")
    return reason


def _alternatives(content: Sequence[Mapping[str, Any]], count: int) -> Alternatives:
    rows = []
    for entry in content:
        likeliest = sorted(entry["top_logprobs"], key=lambda one: -one["logprob"])[:count]
        if len(likeliest) != count:
            raise Wrong(f"it names {len(likeliest)} likeliest tokens, and {count} were asked for")
        rows.append([(one["token_id"], one["logprob"]) for one in likeliest])
    pairs_TA2 = np.array(rows, np.float64).reshape(len(rows), count, 2)
    return Alternatives(pairs_TA2[..., 0].astype(np.int32), pairs_TA2[..., 1].astype(np.float32))


def _both(logp_T: np.ndarray, how: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """Return the log-probs as drawn, and under the whole softmax: at temperature 0 the server says those at 1."""
    if how.temperature == 0:
        return np.zeros_like(logp_T), logp_T
    return logp_T, np.full_like(logp_T, np.nan) if how.filtered else logp_T
