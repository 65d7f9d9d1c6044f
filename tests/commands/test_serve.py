"""The server as OpenAI's own client meets it, with the real engine behind it and a tiny model."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import openai
import pytest
from serving import Serving, serving, until

import tiny
from luthier import mesh
from luthier.commands.server.job import Served, read_chat, read_completion
from luthier.config import EngineKeys, ModelKeys
from luthier.data.chat import Rendering
from luthier.model import lora, param
from luthier.model.compute import Compute
from luthier.model.lora import Adapter
from luthier.model.model import Model
from luthier.rollout import adapters, text
from luthier.rollout.engine import Completion, Request, Sampling
from luthier.rollout.local import LocalEngine
from luthier.types import Batch

MODEL = Model.from_hf(tiny.TINY | {"vocab_size": 272}, "tiny")
KEYS = EngineKeys(max_num_seqs=4, prefill_chunk_length=16, decode_steps=4, max_target_length=128)
SERVED = Served("tiny/model", 7, tiny.tokenizer(), Rendering(), Sampling(max_new_tokens=12, stop_token_ids=(2,)), 272)
HI = [{"role": "user", "content": "hi"}]


@dataclass
class Here:
    """The server, a client, and the means to compute what it should say."""

    serving: Serving
    client: openai.OpenAI
    engine: LocalEngine
    params: Any
    mesh: Any

    def expected(self, prompt: list[int], samples: int = 1, **changes: Any) -> list[Completion]:
        """What another engine with the same weights completes, ordered by sample."""
        how = {"max_new_tokens": 12, "stop_token_ids": (2,), "seed": 5} | changes
        engine = LocalEngine(MODEL, self.params, Compute(), self.mesh, KEYS, tokenizer=SERVED.tokenizer)
        with mesh.use(self.mesh):
            done = engine.generate([Request(prompt, samples, Sampling(**how))])
            return sorted(done, key=lambda completion: completion.sample)

    def decoded(self, completion: Completion, after: list[int] | tuple[()] = ()) -> str:
        return text.decode(SERVED.tokenizer, completion, (), after)


@pytest.fixture(scope="module")
def here() -> Iterator[Here]:
    place = mesh.make(ModelKeys(), jax.devices()[:1])
    with mesh.use(place):
        # Sharper than at initialisation, so that wrong positions and settings show.
        params = param.initialise(MODEL.spec, jax.random.key(1), jnp.float32, place)
        params = jax.tree.map(lambda w: w * 3 if w.ndim > 1 else w, params)
        engine = LocalEngine(MODEL, params, Compute(), place, KEYS, tokenizer=SERVED.tokenizer)
        engine.reserve()
    with serving(SERVED, engine, place) as running, running.client() as client:
        yield Here(running, client, engine, params, place)


def ids(words: str) -> list[int]:
    return text.encode_text(SERVED.tokenizer, words)


@pytest.fixture(scope="module")
def adapted(here: Here) -> Iterator[tuple[openai.OpenAI, dict[str, Any]]]:
    """A client of a server with adapters, and each model's weights."""
    weights = {"tiny/model": here.params}
    with mesh.use(here.mesh):
        chosen = {name: Adapter(rank=rank, alpha=8) for name, rank in (("loud", 2), ("quiet", 3))}
        trees = {name: tiny.random_params(lora.spec(MODEL.spec, each), each.rank) for name, each in chosen.items()}
        weights |= {name: lora.attach(MODEL.spec, here.params, each, trees[name]) for name, each in chosen.items()}
        together = adapters.together(MODEL.spec, here.params, {name: (chosen[name], trees[name]) for name in chosen})
        engine = LocalEngine(MODEL, together, Compute(), here.mesh, KEYS, adapters=list(chosen))
    with serving(replace(SERVED, adapters=tuple(chosen)), engine, here.mesh) as running, running.client() as client:
        yield client, weights


def test_adapters_are_models_of_their_own(here: Here, adapted: Any) -> None:
    client, weights = adapted
    listed = client.models.list().data
    assert [model.id for model in listed] == list(weights)
    assert [(model.model_extra or {}).get("parent") for model in listed] == [None, "tiny/model", "tiny/model"]
    assert client.models.retrieve("quiet") == listed[2]

    def ask(model: str) -> Any:
        return client.completions.create(model=model, prompt="hello", temperature=0)

    with ThreadPoolExecutor(3) as pool:
        answers = dict(zip(weights, pool.map(ask, weights), strict=True))
    assert len({answer.choices[0].text for answer in answers.values()}) == 3
    for name in ("tiny/model", "loud"):
        answer = answers[name]
        (expected,) = replace(here, params=weights[name]).expected(ids("hello"), temperature=0)
        assert (answer.model, answer.choices[0].text) == (name, here.decoded(expected, ids("hello")))


def test_an_adapter_answers_a_chat(here: Here, adapted: Any) -> None:
    client, weights = adapted
    answer = client.chat.completions.create(model="loud", messages=HI, seed=5)
    prompt = text.encode(SERVED.tokenizer, SERVED.rendering, HI)
    (expected,) = replace(here, params=weights["loud"]).expected(prompt)
    assert (answer.model, answer.choices[0].message.content) == ("loud", here.decoded(expected))


def test_a_model_that_is_not_served_is_told_which_are(adapted: Any) -> None:
    for ask in (adapted[0].models.retrieve, lambda name: adapted[0].completions.create(model=name, prompt="a")):
        with pytest.raises(openai.NotFoundError, match=r"`other` is not .* `tiny/model`, `loud` and `quiet` are"):
            ask("other")


def test_models(here: Here) -> None:
    (model,) = here.client.models.list().data
    assert (model.id, model.created, model.object) == ("tiny/model", 7, "model")
    assert here.client.models.retrieve("tiny/model") == model
    with pytest.raises(openai.NotFoundError, match="`tiny/model` is"):
        here.client.models.retrieve("other")


def test_a_completion_is_what_the_engine_completes(here: Here) -> None:
    answer = here.client.completions.create(model="tiny/model", prompt="hello", seed=5)
    (choice,) = answer.choices
    (expected,) = here.expected(ids("hello"))
    assert choice.text == here.decoded(expected, ids("hello"))
    assert choice.finish_reason == expected.finish
    assert choice.logprobs is None
    assert answer.object == "text_completion"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, len(expected.tokens_T))
    assert answer.usage.total_tokens == 5 + len(expected.tokens_T)


def test_a_chat_is_rendered_by_the_template(here: Here) -> None:
    answer = here.client.chat.completions.create(model="tiny/model", messages=HI, seed=5)
    prompt = text.encode(SERVED.tokenizer, SERVED.rendering, HI)
    (expected,) = here.expected(prompt)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == here.decoded(expected)
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.object == "chat.completion"


def test_messages_in_parts_and_answers_sent_back_are_read(here: Here) -> None:
    def ask(messages: list[Any]) -> str:
        answer = here.client.chat.completions.create(model="tiny/model", messages=messages, seed=5)
        return answer.choices[0].message.content

    whole = [{"role": "system", "content": "ab"}, *HI, {"role": "assistant", "content": "yo"}, *HI]
    back = openai.types.chat.ChatCompletionMessage(role="assistant", content="yo").model_dump()
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    back |= {"annotations": [], "refusal": "", "reasoning_content": "hm", "audio": None}
    for role in ("system", "developer"):
        assert ask(whole) == ask([{"role": role, "content": parts}, *HI, back, *HI])


@pytest.mark.parametrize("prompt", [["ab", "hello"], "tokens"])
def test_prompts_in_lists_give_choices_in_order(here: Here, prompt: Any) -> None:
    prompts = [ids("ab"), ids("hello")]
    answer = here.client.completions.create(
        model="tiny/model", prompt=prompts if prompt == "tokens" else prompt, n=2, seed=5
    )
    expected = [here.decoded(done, each) for each in prompts for done in here.expected(each, 2)]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in answer.choices] == expected
    assert len(set(expected)) == 4
    assert answer.usage.prompt_tokens == 7


def test_a_list_of_token_ids_is_one_prompt(here: Here) -> None:
    texts = [
        here.client.completions.create(model="tiny/model", prompt=prompt, seed=5).choices[0].text
        for prompt in (ids("ab"), [ids("ab")], "ab", ["ab"])
    ]
    assert len(set(texts)) == 1


def test_a_seed_repeats_and_no_seed_does_not(here: Here) -> None:
    def ask(seed: int | None) -> str:
        return here.client.completions.create(model="tiny/model", prompt="a", seed=seed).choices[0].text

    assert ask(3) == ask(3) != ask(4)
    assert ask(-3) == ask(-3) != ask(3)
    assert ask(None) != ask(None)


@pytest.mark.parametrize(
    ("fields", "same"),
    [
        ({"temperature": 0}, {"temperature": 0.0}),
        ({"temperature": 0.5, "top_p": 0.9}, {"temperature": 0.5, "top_p": 0.9}),
        ({"extra_body": {"top_k": 3, "min_p": 0.2}}, {"top_k": 3, "min_p": 0.2}),
        ({"extra_body": {"top_k": -1}}, {}),
        ({"max_tokens": 30, "extra_body": {"ignore_eos": True}}, {"max_new_tokens": 30, "stop_token_ids": ()}),
    ],
)
def test_sampling_fields_reach_the_engine(here: Here, fields: dict[str, Any], same: dict[str, Any]) -> None:
    answer = here.client.completions.create(model="tiny/model", prompt="hello", seed=5, **fields)
    assert answer.choices[0].text == here.decoded(here.expected(ids("hello"), **same)[0], ids("hello"))


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 1e-6, "top_p": 1e-300, "extra_body": {"min_p": 1}},
        {"temperature": 1e3, "seed": -(2**63), "extra_body": {"top_k": 10**30}},
        {"temperature": 0, "max_tokens": 10**30, "seed": 2**63 - 1, "stop": ["a" * 256] * 64},
    ],
)
def test_numbers_at_the_edge_of_what_is_taken(here: Here, fields: dict[str, Any]) -> None:
    fields = {"logprobs": 20} | fields
    said = here.client.completions.create(model="tiny/model", prompt="hello", **fields).choices[0].logprobs
    assert said.token_logprobs
    assert np.isfinite(said.token_logprobs).all()


def test_max_completion_tokens_bounds_a_chat(here: Here) -> None:
    answer = here.client.chat.completions.create(model="tiny/model", messages=HI, seed=5, max_completion_tokens=3)
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (3, "length")


@pytest.mark.parametrize(("bound", "tokens"), [(None, 12), (10**4, "rest"), (10**4, 9)])
def test_a_chat_without_a_bound_goes_on_to_the_served_one(here: Here, bound: int | None, tokens: int | str) -> None:
    served = replace(SERVED, reply_tokens=bound)
    fields = {"max_tokens": tokens} if isinstance(tokens, int) and bound else {}
    fields |= {"model": "tiny/model", "messages": HI, "seed": 5, "ignore_eos": True}
    job = read_chat(json.dumps(fields).encode(), served)
    engine = LocalEngine(MODEL, here.params, Compute(), here.mesh, KEYS, tokenizer=SERVED.tokenizer)
    with mesh.use(here.mesh):
        (done,) = engine.generate(job.requests)
    assert len(done.tokens_T) == (128 - len(job.requests[0].prompt) if tokens == "rest" else tokens)
    body = {"model": "tiny/model", "prompt": "hi"}
    assert read_completion(json.dumps(body).encode(), served).sampling.max_new_tokens == 12, "of chats alone"


def test_a_completion_ends_with_the_context(here: Here) -> None:
    answer = here.client.completions.create(model="tiny/model", prompt=[9] * 120, seed=5, max_tokens=1000)
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (8, "length")


def test_stop_token_ids_come_on_top_of_the_end_tokens(here: Here) -> None:
    (expected,) = here.expected(ids("hello"), temperature=0.0)
    third = int(expected.tokens_T[2])
    answer = here.client.completions.create(
        model="tiny/model", prompt="hello", temperature=0, extra_body={"stop_token_ids": [third]}
    )
    first = expected.tokens_T.tolist().index(third) + 1
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (first, "stop")


def scored(params: Any, whole: list[int]) -> np.ndarray:
    """The trainer's log-probs of each next token, by one pass over all of them."""
    tokens_BT = np.asarray([whole], np.int32)
    positions_BT, segments_BT = np.arange(len(whole), dtype=np.int32)[None], np.ones((1, len(whole)), np.int32)
    logits = MODEL.logits(params, Batch(tokens_BT, positions_BT, segments_BT, segments_BT > 0), Compute())
    return np.asarray(jax.nn.log_softmax(logits[0, :-1], -1))


def test_log_probs_are_the_trainer_s(here: Here) -> None:
    answer = here.client.completions.create(model="tiny/model", prompt="hello", seed=5, logprobs=3)
    (expected,) = here.expected(ids("hello"), logprobs=3)
    said = answer.choices[0].logprobs
    with mesh.use(here.mesh):
        logp_TV = scored(here.params, ids("hello") + expected.tokens_T.tolist())[4:]
    drawn = logp_TV[np.arange(len(logp_TV)), expected.tokens_T]
    np.testing.assert_allclose(said.token_logprobs, drawn, atol=1e-4)
    np.testing.assert_allclose(said.token_logprobs, expected.softmax_logp_T, atol=1e-5)
    best = np.sort(logp_TV, -1)[:, ::-1]
    for place, top in enumerate(said.top_logprobs):
        assert top[said.tokens[place]] == said.token_logprobs[place]
        assert list(top.values()) == sorted(top.values(), reverse=True)
        others = [value for word, value in top.items() if word != said.tokens[place]]
        np.testing.assert_allclose(others, [v for v in best[place, :3] if abs(v - drawn[place]) > 1e-4], atol=1e-4)


def test_log_probs_alone_come_without_rivals(here: Here) -> None:
    answer = here.client.completions.create(model="tiny/model", prompt="hello", seed=5, logprobs=0)
    said = answer.choices[0].logprobs
    assert said.top_logprobs is None
    assert len(said.tokens) == len(said.token_logprobs) == answer.usage.completion_tokens


def test_log_probs_of_a_chat_hold_the_bytes(here: Here) -> None:
    answer = here.client.chat.completions.create(
        model="tiny/model", messages=HI, seed=5, max_tokens=40, logprobs=True, top_logprobs=2, extra_body={"top_k": 0}
    )
    entries = answer.choices[0].logprobs.content
    assert len(entries) == answer.usage.completion_tokens
    kept = [entry for entry in entries if not entry.token.startswith("<|")]
    whole = b"".join(bytes(entry.bytes) for entry in kept)
    assert whole.decode(errors="replace") == answer.choices[0].message.content
    assert all([each.logprob for each in entry.top_logprobs] == sorted(e.logprob for e in entry.top_logprobs)[::-1]
               for entry in entries)  # fmt: skip
    plain = here.client.chat.completions.create(model="tiny/model", messages=HI, seed=5, max_tokens=9, logprobs=True)
    assert [entry.top_logprobs for entry in plain.choices[0].logprobs.content] == [[]] * 9


@pytest.mark.parametrize("n", [1, 2])
def test_a_stream_adds_up_to_the_whole(here: Here, n: int) -> None:
    fields = {"model": "tiny/model", "prompt": "hello", "n": n, "seed": 5, "max_tokens": 30, "logprobs": 1}
    whole = here.client.completions.create(**fields)
    chunks = list(here.client.completions.create(**fields, stream=True))
    assert all(chunk.usage is None and chunk.id == chunks[0].id for chunk in chunks)
    assert len(chunks) > 3 * n
    for choice in whole.choices:
        parts = [part for chunk in chunks for part in chunk.choices if part.index == choice.index]
        assert "".join(part.text for part in parts) == choice.text
        assert [part.finish_reason for part in parts[:-1]] == [None] * (len(parts) - 1)
        assert parts[-1].finish_reason == choice.finish_reason
        for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
            streamed = [item for part in parts if part.logprobs for item in getattr(part.logprobs, name)]
            assert streamed == getattr(choice.logprobs, name)


def test_a_stream_of_a_chat(here: Here) -> None:
    fields = {"model": "tiny/model", "messages": HI, "seed": 5, "max_tokens": 30, "logprobs": True}
    whole = here.client.chat.completions.create(**fields)
    *chunks, last = here.client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True})
    first = chunks[0].choices[0].delta
    assert (first.role, first.content) == ("assistant", "")
    assert all(chunk.object == "chat.completion.chunk" and chunk.usage is None for chunk in chunks)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    entries = [e for c in chunks if c.choices[0].logprobs for e in c.choices[0].logprobs.content]
    assert entries == whole.choices[0].logprobs.content
    assert (last.choices, last.usage) == ([], whole.usage)


def stop_text(here: Here) -> tuple[str, str]:
    """A completion's text and two letters in the midst of it: two tokens of this vocabulary of bytes."""
    words = here.client.completions.create(model="tiny/model", prompt="hello", seed=5, max_tokens=40).choices[0].text
    pairs = (words[at : at + 2] for at in range(4, len(words) - 1))
    return words, next(pair for pair in pairs if pair.isascii() and pair.isprintable() and words.find(pair) > 3)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_text_over_two_tokens_ends_and_is_cut(here: Here, stream: bool) -> None:
    words, stop = stop_text(here)
    answer = here.client.completions.create(
        model="tiny/model", prompt="hello", seed=5, max_tokens=40, stop=["~~~", stop], stream=stream
    )
    chunks = list(answer) if stream else [answer]
    assert "".join(chunk.choices[0].text for chunk in chunks) == words[: words.index(stop)]
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_what_begins_like_a_stop_text_is_shown_in_the_end(here: Here) -> None:
    words, stop = stop_text(here)
    count = 0
    for chunk in here.client.completions.create(
        model="tiny/model", prompt="hello", seed=5, max_tokens=40, stop=stop + "\0never", stream=True
    ):
        assert words.startswith(chunk.choices[0].text, count)
        count += len(chunk.choices[0].text)
    assert count == len(words)


def test_many_clients_at_once_get_what_they_would_alone(here: Here) -> None:
    def ask(number: int) -> str:
        answer = here.client.completions.create(model="tiny/model", prompt="x" * (1 + number), seed=number, n=2)
        return answer.choices[1].text

    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(ask, range(12)))
    assert together == [ask(number) for number in range(12)]


@pytest.mark.parametrize(
    ("create", "field"),
    [
        (lambda client: client.completions.create(model="tiny/model", prompt=[9] * 128), "prompt"),
        (lambda client: client.completions.create(model="tiny/model", prompt=[9] * 200, stream=True), "prompt"),
        (lambda client: client.completions.create(model="tiny/model", prompt=[9, 272]), "prompt"),
        (lambda client: client.completions.create(model="tiny/model", prompt=""), "prompt"),
        (
            lambda client: client.chat.completions.create(
                model="tiny/model", messages=[{"role": "user", "content": "long " * 40}]
            ),
            "messages",
        ),
        (
            lambda client: client.completions.create(
                model="tiny/model", prompt="a", extra_body={"stop_token_ids": [-1]}
            ),
            "stop_token_ids",
        ),
    ],
)
def test_what_the_model_cannot_take_is_refused_by_name(here: Here, create: Any, field: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        create(here.client)
    assert refused.value.param == field
    assert refused.value.body["type"] == "invalid_request_error"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_slots(here: Here, stream: bool) -> None:
    until(lambda: not here.engine.busy)
    fields = {"model": "tiny/model", "prompt": "hello", "n": 4, "stream": stream}
    fields |= {"max_tokens": 120, "extra_body": {"ignore_eos": True}}
    steps = []
    step = here.engine.step

    def slow_step() -> list[Any]:
        steps.append(time.sleep(0.1))
        return step()

    here.engine.step = slow_step  # type: ignore[method-assign]
    try:
        if stream:
            with here.client.completions.create(**fields) as chunks:
                next(iter(chunks))
        else:
            with pytest.raises(openai.APITimeoutError):
                here.client.completions.create(**fields, timeout=1)
        until(lambda: not here.engine.busy)
    finally:
        here.engine.step = step  # type: ignore[method-assign]
    assert 0 < len(steps) < 30  # which is what 120 tokens take, 4 at a time
    assert here.client.completions.create(model="tiny/model", prompt="a", n=4).usage.completion_tokens
