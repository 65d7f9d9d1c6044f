"""The lm-eval adapter by itself, which is quick: what it takes, and what it makes of what a task asks.

Its numbers against the harness's own model are in ``test_lm_eval``, which is slow.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from luthier.errors import UserError
from tiny import ROOT

pytest.importorskip("lm_eval", reason="the lm-eval harness is not installed: pip install 'luthier[lm-eval]'")

from lm_eval.api.instance import Instance

from luthier.commands.lm_eval_adapter import LuthierLM

MAX_LENGTH = 96
REFUSES_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"


def opened(folder: Path, **arguments: Any) -> LuthierLM:
    return LuthierLM(
        path=str(folder),
        dtype="float32",
        max_length=MAX_LENGTH,
        jax_cache_dir=str(ROOT / ".cache" / "jax"),
        **arguments,
    )


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> LuthierLM:
    """One whose default for completions, 256 tokens, is more than it reads: what scores alone asks for none."""
    return opened(tiny_model, trust_remote_code=True)


def scores(model: LuthierLM, *pairs: tuple[str, str]) -> list[float]:
    asked = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    return [logp for logp, _ in model.loglikelihood(asked, True)]


def test_white_space_alone_is_scored_after_the_first_token(model):
    """The harness moves it into the continuation, which then has no context."""
    found = scores(model, ("\n", "fox"), ("", "\nfox"))
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({"num_beams": 1, "repetition_penalty": 1.0}, {"temperature": 0.0}),
        ({"max_gen_toks": None, "max_new_tokens": 5}, {"max_new_tokens": 5}),
        ({"do_sample": None, "temperature": 0.5, "top_p": None}, {"temperature": 0.5, "top_p": 1.0}),
        ({"do_sample": None, "temperature": None, "until": None}, {"temperature": 0.0, "stop": ()}),
        ({"do_sample": False, "temperature": 0.5}, {"temperature": 0.0}),
    ],
)
def test_what_says_nothing_changes_nothing(model, wanted, expected):
    sampling = model._sampling({"max_gen_toks": 8, **wanted})
    assert {name: getattr(sampling, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"num_beams": 4}, "num_beams=4 is not done here. Set it to 1"),
        ({"repetition_penalty": 1.2}, "repetition_penalty=1.2 is not done here"),
        ({"max_gen_toks": None}, f"max_gen_toks=256 leaves no room for a prompt in max_length={MAX_LENGTH}"),
    ],
)
def test_what_would_change_something_is_refused(model, wanted, message):
    with pytest.raises(UserError, match=message):
        model._sampling(wanted)


@pytest.mark.parametrize(
    "argument",
    [
        {"temperature": 0.7},
        {"top_p": 0.9},
        {"top_k": 5},
        {"min_p": 0.1},
        {"decode_sampling_temperature": 1.0},
        {"stop": ["x"]},
        {"stop_token_ids": [5]},
        {"ignore_eos": True},
    ],
)
def test_how_tokens_are_drawn_is_no_argument_of_the_model(tiny_model, argument):
    with pytest.raises(UserError, match="--gen_kwargs"):
        opened(tiny_model, **argument)


def test_a_system_message_that_is_refused_is_left_out(model, monkeypatch, caplog):
    asked = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    plain = model.apply_chat_template(asked[1:])
    assert model.apply_chat_template(asked) != plain
    monkeypatch.setattr(model.tokenizer, "chat_template", REFUSES_SYSTEM + model.tokenizer.chat_template)
    with caplog.at_level(logging.WARNING):
        assert [model.apply_chat_template(asked) for _ in range(2)] == [plain] * 2
    (said,) = [record.getMessage() for record in caplog.records]
    assert "no system here" in said
    monkeypatch.setattr(model.tokenizer, "chat_template", "{{ raise_exception('never') }}")
    with pytest.raises(UserError, match="refuses a conversation of user: never"):
        model.apply_chat_template(asked)
