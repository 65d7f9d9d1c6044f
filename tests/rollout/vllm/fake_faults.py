"""The ways in which the fake server misbehaves, and what an answer looks like before and after."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

FAULTS = (
    "dies",
    "hangs",
    "is late",
    "breaks off",
    "cuts its answer",
    "answers 500",
    "answers no JSON",
    "answers another request",
    "draws too few tokens",
    "draws too many tokens",
    "loses a log-prob",
    "leaves out log-probs",
    "draws no token",
    "goes past a stop token",
    "stops without a reason",
    "finishes in its own way",
    "aborts by itself",
    "has an older version",
    "has no version",
    "has half a version",
    "gives NaN",
    "gives infinity",
    "gives the floor",
    "gives a positive log-prob",
    "draws unknown tokens",
    "draws negative tokens",
    "gives another token's log-prob",
)
"""What a server may do in place of answering."""


def choice(drawn: Sequence[tuple[int, float, str]], finish: str, reason: int | None) -> dict[str, Any]:
    spans: list[dict[str, Any]] = []
    for place, (_, _, version) in enumerate(drawn):
        if not spans or spans[-1]["version"] != version:
            spans.append({"version": version, "start": place, "end": place})
        spans[-1]["end"] = place + 1
    return {
        "index": 0,
        "finish_reason": finish,
        "stop_reason": reason,
        "token_ids": [each for each, _, _ in drawn],
        "logprobs": {
            "content": [
                {"token_id": each, "logprob": logp, "rank": 1, "top_logprobs": [{"token_id": each, "logprob": logp}]}
                for each, logp, _ in drawn
            ]
        },
        "routed_experts": None,
        "weight_versions": spans,
    }


def spoilt(choice: dict[str, Any], fault: str, body: dict[str, Any]) -> dict[str, Any]:
    """Return a choice with what is wrong with it."""
    told = choice["logprobs"]["content"]
    logps = {
        "gives NaN": math.nan,
        "gives infinity": -math.inf,
        "gives the floor": -9999.0,
        "gives a positive log-prob": 0.7,
    }
    tokens = {"draws unknown tokens": 10**6, "draws negative tokens": -1}
    if fault in logps:
        told[-1]["logprob"] = told[-1]["top_logprobs"][0]["logprob"] = logps[fault]
    elif fault in tokens:
        choice["token_ids"][-1] = told[-1]["token_id"] = told[-1]["top_logprobs"][0]["token_id"] = tokens[fault]
    elif fault == "loses a log-prob":
        told.pop()
    elif fault == "leaves out log-probs":
        choice["logprobs"] = None
    elif fault == "gives another token's log-prob":
        told[-1]["token_id"] ^= 1
    elif fault == "draws no token":
        choice.update(token_ids=[], logprobs={"content": []}, weight_versions=[], finish_reason="stop", stop_reason=0)
    elif fault == "stops without a reason":
        choice.update(finish_reason="stop", stop_reason=None)
    elif fault == "finishes in its own way":
        choice["finish_reason"] = "repetition"
    elif fault == "aborts by itself":
        choice["finish_reason"] = "abort"
    elif fault == "has an older version":
        choice["weight_versions"] = [{"version": "-7", "start": 0, "end": len(told)}]
    elif fault == "has no version":
        choice["weight_versions"] = None
    elif fault == "turns its versions round":
        spans = choice["weight_versions"]
        names = [each["version"] for each in spans]
        choice["weight_versions"] = [{**each, "version": name} for each, name in zip(spans, names[::-1], strict=True)]
    elif fault == "has half a version":
        choice["weight_versions"][-1]["end"] -= 1
    elif fault == "goes past a stop token":
        stop = body["sampling_params"]["stop_token_ids"][0]
        choice["token_ids"][0] = told[0]["token_id"] = told[0]["top_logprobs"][0]["token_id"] = stop
    return choice
