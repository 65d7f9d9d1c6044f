"""What is asked of vLLM, and that an answer is right in every respect or none at all."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest

from luthier.rollout.engine import Sampling
from luthier.rollout.vllm import wire
from luthier.rollout.vllm.wire import Asked, Wrong

HOW = Sampling(temperature=0.7, max_new_tokens=4, stop_token_ids=(9,), stop=("end",), seed=11)
ASKED = Asked("a", [3, 1, 4], HOW)
VOCAB = 50


def said(tokens=(5, 6, 7, 8), finish="length", reason=None, spans=(("3", 0, 4),), **more):
    """Return an answer as vLLM gives it."""
    content = [{"token_id": token, "logprob": -0.25 * token, "rank": 1, "top_logprobs": []} for token in tokens]
    choice = {
        "index": 0,
        "token_ids": list(tokens),
        "finish_reason": finish,
        "stop_reason": reason,
        "logprobs": {"content": content},
        "weight_versions": [{"version": name, "start": start, "end": end} for name, start, end in spans],
    }
    return {"request_id": "generate-tokens-a", "choices": [choice | more]}


def test_nothing_is_left_to_the_servers_defaults():
    body = wire.request(replace(ASKED, prompt=np.array([3, 1, 4], np.int32), adapter="policy"))
    assert body["token_ids"] == [3, 1, 4]
    assert body["model"] == "policy"
    assert body["request_id"] == "a"
    assert body["sampling_params"] == {
        "n": 1, "temperature": 0.7, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "max_tokens": 4, "stop_token_ids": [9],
        "stop": ["end"], "detokenize": True, "skip_special_tokens": False, "ignore_eos": True, "seed": 11,
        "logprobs": 0,
    }  # fmt: skip
    assert "model" not in wire.request(ASKED)


def test_a_right_answer_is_read_as_it_is():
    answer = wire.read(ASKED, said(spans=(("3", 0, 1), ("5", 1, 4))), VOCAB)
    assert answer.tokens_T.tolist() == [5, 6, 7, 8]
    assert answer.tokens_T.dtype == np.int32
    assert answer.logp_T.tolist() == [-1.25, -1.5, -1.75, -2.0]
    assert answer.logp_T.dtype == np.float32
    assert answer.softmax_logp_T.tolist() == answer.logp_T.tolist()
    assert answer.versions_T.tolist() == [3, 5, 5, 5]
    assert (answer.finish, answer.stopped_by) == ("length", None)


@pytest.mark.parametrize(
    ("tokens", "finish", "reason", "read"),
    [((5, 9), "stop", 9, ("stop", 9)), ((5, 6), "stop", "end", ("stop", "end")),
     ((5,), "abort", None, ("cancelled", None)), ((), "abort", None, ("cancelled", None))],
)  # fmt: skip
def test_ways_to_end(tokens, finish, reason, read):
    answer = wire.read(ASKED, said(tokens, finish, reason, [("3", 0, len(tokens))] if tokens else []), VOCAB)
    assert (answer.finish, answer.stopped_by) == read
    assert len(answer.tokens_T) == len(tokens)


@pytest.mark.parametrize("filters", [{"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_under_filters_the_whole_softmax_is_not_known(filters):
    answer = wire.read(replace(ASKED, sampling=replace(HOW, **filters)), said(), VOCAB)
    assert np.isnan(answer.softmax_logp_T).all()
    assert answer.logp_T[0] == -1.25


def test_at_temperature_0_a_token_was_certain():
    answer = wire.read(replace(ASKED, sampling=replace(HOW, temperature=0.0)), said(), VOCAB)
    assert (answer.logp_T == 0).all()
    assert answer.softmax_logp_T[0] == -1.25


def test_alternatives_are_the_likeliest_ones_whatever_was_drawn():
    how = replace(HOW, max_new_tokens=1, logprobs=2)
    asked = replace(ASKED, sampling=how)
    assert wire.request(asked)["sampling_params"]["logprobs"] == 3
    answer = said((5,), spans=[("3", 0, 1)])
    top = [{"token_id": token, "logprob": logp} for token, logp in ((5, -3.0), (7, -0.5), (8, -1.0))]
    answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"] = top
    alternatives = wire.read(asked, answer, VOCAB).alternatives
    assert alternatives.ids_TA.tolist() == [[7, 8]]
    assert alternatives.logp_TA.tolist() == [[-0.5, -1.0]]


def changed(path, value):
    """Return a right answer with one thing changed."""
    answer = copy.deepcopy(said())
    place = answer
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return answer


def content():
    """Return the log-probs of a right answer."""
    return said()["choices"][0]["logprobs"]["content"]


FIRST = ("choices", 0, "logprobs", "content", 0)
WRONG = {
    "not of this request": (changed(("request_id",), "generate-tokens-b"), "one to generate-tokens-b"),
    "no choices": ({"request_id": "generate-tokens-a", "choices": []}, "not what vLLM answers"),
    "two choices": (changed(("choices",), said()["choices"] * 2), "not what vLLM answers"),
    "text": ("<html>", "not what vLLM answers"),
    "nothing": (None, "not what vLLM answers"),
    "no log-probs": (changed(("choices", 0, "logprobs"), None), "not what vLLM answers"),
    "one log-prob less": (changed(("choices", 0, "logprobs", "content"), content()[1:]), "4 tokens and 3 log-probs"),
    "another token's log-prob": (changed((*FIRST, "token_id"), 6), "the log-prob of token 6"),
    "NaN": (changed((*FIRST, "logprob"), float("nan")), "token 5 is nan"),
    "what vLLM says for NaN": (changed((*FIRST, "logprob"), -9999.0), "token 5 is -9999"),
    "a probability over 1": (changed((*FIRST, "logprob"), 0.5), "token 5 is 0.5"),
    "a log-prob that is no number": (changed((*FIRST, "logprob"), None), "not what vLLM answers"),
    "a token too few": (said((5, 6, 7), spans=[("3", 0, 3)]), "by length with 3 tokens, and 4"),
    "a token too many": (said((5, 6, 7, 8, 9), spans=[("3", 0, 5)]), "by length with 5 tokens, and 4"),
    "too many, by a stop token": (said((5, 6, 7, 8, 9), "stop", 9, [("3", 0, 5)]), "by stop with 5 tokens, and 4"),
    "stopped before anything": (said((), "stop", 9, []), "by stop with 0 tokens"),
    "outside the vocabulary": (said((5, 6, 7, 50)), "token 50, and the vocabulary is 50"),
    "below it": (said((5, 6, 7, -1)), "token -1"),
    "half a token": (changed(("choices", 0, "token_ids", 0), 5.5), "not whole numbers"),
    "went on after its end": (said((5, 9, 7, 8)), "went on after token 9"),
    "an unknown end": (said(finish="repetition"), "'repetition'"),
    "no end": (said(finish=None), "None"),
    "a stop token of its own": (said((5, 2), "stop", 2, [("3", 0, 2)]), "stopped because of 2"),
    "no reason to stop": (said((5, 6), "stop", None, [("3", 0, 2)]), "stopped because of None"),
    "a stop token that is not there": (said((5, 6), "stop", 9, [("3", 0, 2)]), "stopped because of 9"),
    "no version": (said(spans=[]), "of 0 of its 4 tokens"),
    "versions of some tokens": (said(spans=[("3", 0, 3)]), "of 3 of its 4 tokens"),
    "versions with a gap": (said(spans=[("3", 0, 1), ("4", 2, 4)]), "tokens 2 to 4, after 1"),
    "versions of more tokens": (said(spans=[("3", 0, 5)]), "tokens 0 to 5"),
    "weights that we never named": (said(spans=[("default", 0, 4)]), "'default'"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_no_answer(name):
    answer, message = WRONG[name]
    with pytest.raises(Wrong) as raised:
        wire.read(ASKED, answer, VOCAB)
    assert message in str(raised.value)
