"""The embedded engine against the plain forward pass, with sequences that come and go."""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from luthier import mesh, processes
from luthier.config import EngineKeys, ModelKeys
from luthier.errors import UserError
from luthier.model import param
from luthier.model.compute import Compute
from luthier.model.model import Model
from luthier.rollout import local, programs
from luthier.rollout.engine import Completion, Piece, Request, Sampling
from luthier.rollout.local import LocalEngine
from luthier.types import Batch

KEYS = EngineKeys(max_num_seqs=4, prefill_chunk_length=16, decode_steps=3, max_target_length=64)
kinds = pytest.mark.parametrize("kind", tiny.KINDS)
SLOW = pytest.mark.slow
slow_latent = pytest.mark.parametrize(  # latent attention before experts takes the longest to compile
    "kind", [pytest.param(kind, marks=SLOW if kind == "deepseek-v3" else []) for kind in tiny.KINDS]
)


def make(
    keys: EngineKeys = KEYS, devices: int = 1, seed: int = 0, kind: str = "llama", **axes: int
) -> tuple[LocalEngine, Any]:
    here, model = mesh.make(ModelKeys(**axes), jax.devices()[:devices]), tiny.kind_model(kind)
    params = param.initialise(model.spec, jax.random.key(1), jnp.float32, here)
    # Sharper than at initialisation, so that a wrong cache shows.
    params = jax.tree.map(lambda w: w * 3 if w.ndim > 1 else w, params)
    return LocalEngine(model, params, Compute(), here, keys, context_length=512, seed=seed), params


@pytest.fixture
def one_device() -> Iterator[None]:
    with mesh.use(mesh.make(ModelKeys(), jax.devices()[:1])):
        yield


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(0, 256, random.integers(1, 40)).tolist() for _ in range(count)]


def scored(
    params: Any, prompt: list[int], tokens_T: np.ndarray, temperature: float = 1.0, kind: str = "llama"
) -> np.ndarray:
    """Return the log-probs of a completion by one pass over all of it, in fp64 softmax."""
    ids = np.zeros((1, 64), np.int32)
    whole = [*prompt, *tokens_T.tolist()]
    ids[0, : len(whole)] = whole
    batch = Batch(
        ids, np.arange(64, dtype=np.int32)[None], (np.arange(64) < len(whole)).astype(np.int32)[None], ids > 0
    )
    logits = np.asarray(whole_pass(tiny.kind_model(kind), params, batch), np.float64)[0] / temperature
    logp = (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )
    return logp[np.arange(len(prompt) - 1, len(whole) - 1), tokens_T]


@functools.partial(jax.jit, static_argnums=0)
def whole_pass(model: Model, params: Any, batch: Batch) -> jax.Array:
    return model.logits(params, batch, Compute())


AXES = ("data", "fsdp", "expert", "tensor", "context")
MESHES = [
    *((kind, (1, 1, 1, 1)) for kind in tiny.KINDS),
    ("llama", (1, 8, 1, 1)),
    ("llama", (2, 4, 1, 1)),
    pytest.param("llama", (1, 2, 1, 1, 4), marks=SLOW),  # rows are not cut while sampling
    pytest.param("gemma3-text", (2, 2, 1, 2), marks=SLOW),
    pytest.param("qwen3-moe", (1, 2, 2, 2), marks=SLOW),
    pytest.param("deepseek-v3", (1, 1, 4, 2), marks=SLOW),
]


@pytest.mark.parametrize(("kind", "axes"), MESHES, ids=str)
def test_log_probs_are_those_of_one_whole_pass(kind: str, axes: tuple[int, ...]) -> None:
    """Eleven prompts of all lengths through four rows, with completions of different lengths."""
    keys = {f"ici_{axis}_parallelism": size for axis, size in zip(AXES, axes, strict=False)}
    engine, params = make(devices=int(np.prod(axes)), kind=kind, **keys)
    requests = [
        Request(prompt, 1 + i % 3, Sampling(temperature=0.5 + i % 2, max_new_tokens=3 + 2 * i))
        for i, prompt in enumerate(prompts(11))
    ]
    with mesh.use(engine._mesh):
        done = list(engine.generate(requests))
        assert sorted((c.request, c.sample) for c in done) == [
            (i, j) for i, r in enumerate(requests) for j in range(r.samples)
        ]
        for c in done:
            request = requests[c.request]
            assert len(c.tokens_T) == min(request.sampling.max_new_tokens, 64 - len(request.prompt))
            assert c.finish == "length"
            expected = scored(params, list(request.prompt), c.tokens_T, request.sampling.temperature, kind)
            np.testing.assert_allclose(c.softmax_logp_T, expected, atol=1e-4)
            np.testing.assert_allclose(c.logp_T, expected, atol=1e-4)


@pytest.mark.usefixtures("one_device")
@slow_latent
def test_a_completion_does_not_depend_on_its_company(kind: str) -> None:
    engine, _ = make(kind=kind)
    wanted = Request(prompts(1)[0], 2, Sampling(seed=5, max_new_tokens=20))
    others = [Request(prompt, 2, Sampling(max_new_tokens=9)) for prompt in prompts(6, seed=1)]
    alone = {c.sample: c for c in engine.generate([wanted])}
    among = {c.sample: c for c in engine.generate([*others[:3], wanted, *others[3:]]) if c.request == 3}
    for sample in range(2):
        assert alone[sample].tokens_T.tolist() == among[sample].tokens_T.tolist()
        np.testing.assert_allclose(alone[sample].logp_T, among[sample].logp_T, atol=1e-5)
    assert alone[0].tokens_T.tolist() != alone[1].tokens_T.tolist()


@pytest.mark.usefixtures("one_device")
def test_noise_is_fresh_at_each_call_and_follows_the_engine_s_seed() -> None:
    request = [Request(prompts(1)[0], 1, Sampling(max_new_tokens=20))]
    engine, same, other = make()[0], make()[0], make(seed=1)[0]
    first, second = (next(engine.generate(request)).tokens_T.tolist() for _ in range(2))
    assert first != second
    assert [next(same.generate(request)).tokens_T.tolist() for _ in range(2)] == [first, second]
    assert next(other.generate(request)).tokens_T.tolist() != first


@pytest.mark.usefixtures("one_device")
def test_greedy_is_argmax() -> None:
    engine, params = make()
    prompt = prompts(1)[0]
    (done,) = engine.generate([Request(prompt, 1, Sampling(temperature=0, max_new_tokens=8))])
    text = list(prompt)
    for token in done.tokens_T:
        ids = np.zeros((1, 64), np.int32)
        ids[0, : len(text)] = text
        batch = Batch(ids, np.arange(64, dtype=np.int32)[None], np.ones_like(ids), ids > 0)
        assert int(whole_pass(tiny.kind_model("llama"), params, batch)[0, len(text) - 1].argmax()) == token
        text.append(int(token))
    assert done.logp_T.tolist() == [0.0] * 8
    np.testing.assert_allclose(done.softmax_logp_T, scored(params, prompt, done.tokens_T), atol=1e-4)


@pytest.mark.usefixtures("one_device")
def test_a_stop_token_ends_a_completion_and_is_part_of_it() -> None:
    engine, _ = make()
    request = Request([3, 4], 1, Sampling(seed=1, max_new_tokens=30))
    (free,) = engine.generate([request])
    stop = int(free.tokens_T[10])
    end = free.tokens_T.tolist().index(stop)
    (stopped,) = engine.generate([Request([3, 4], 1, Sampling(seed=1, max_new_tokens=30, stop_token_ids=(stop, 255)))])
    assert stopped.tokens_T.tolist() == free.tokens_T[: end + 1].tolist()
    assert (stopped.finish, stopped.stopped_by) == ("stop", stop)


@pytest.mark.usefixtures("one_device")
def test_pieces_make_up_the_completions() -> None:
    engine, _ = make()
    pieces: dict[tuple[int, int], list[Piece]] = {}
    requests = [Request(prompt, 2, Sampling(max_new_tokens=7, logprobs=3)) for prompt in prompts(3)]
    done = list(engine.generate(requests, lambda p: pieces.setdefault((p.request, p.sample), []).append(p)))
    for c in done:
        own = pieces[c.request, c.sample]
        assert [len(piece.tokens_T) for piece in own] == [3, 3, 1]
        assert np.concatenate([piece.tokens_T for piece in own]).tolist() == c.tokens_T.tolist()
        assert c.alternatives is not None
        assert c.alternatives.ids_TA.shape == (7, 3)
        assert (np.diff(c.alternatives.logp_TA, axis=1) <= 0).all()


@pytest.mark.usefixtures("one_device")
@kinds
def test_a_prompt_is_read_once_for_all_its_samples(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where its samples have to wait, and the first have lost it when they come: in windows of 8 tokens."""
    engine, _ = make(KEYS.model_copy(update={"max_num_seqs": 16}), kind=kind)
    read: list[int] = []
    prefill = engine._prefill
    monkeypatch.setattr(
        engine, "_prefill", lambda items, *rest: (read.extend(len(i[1]) for i in items), prefill(items, *rest))
    )
    prompt = list(range(30))
    done = list(engine.generate([Request(prompt, 21, Sampling(temperature=0, max_new_tokens=4))]))
    assert read == [29, 13]  # in chunks of 16
    assert len({tuple(c.tokens_T) for c in done}) == 1
    read.clear()
    list(engine.generate([Request([*prompt, 77, 78], 1, Sampling(max_new_tokens=4))]))
    assert read == [2 if kind == "gemma3-text" else 1]  # what follows goes on where the last ended, or the prompt
    read.clear()
    several = [[100 + i, *range(17 + 4 * i)] for i in range(6)]
    list(engine.generate([Request(each, 9, Sampling(max_new_tokens=9 + 4 * i)) for i, each in enumerate(several)]))
    assert sum(min(16, count) for count in read) == sum(len(each) - 1 for each in several)


@pytest.mark.usefixtures("one_device")
@kinds
def test_the_next_turn_goes_on_from_a_row_that_holds_all_before_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ring too, which has lost what stood before its last tokens."""
    engine, params = make(kind=kind)
    engine.reserve()
    prompt = prompts(1, seed=3)[0]
    (first,) = engine.generate([Request(prompt, 1, Sampling(max_new_tokens=11))])
    read: list[int] = []
    prefill = engine._prefill
    monkeypatch.setattr(
        engine, "_prefill", lambda items, *rest: (read.extend(len(i[1]) for i in items), prefill(items, *rest))
    )
    longer = [*prompt, *first.tokens_T.tolist(), 5, 6, 7]
    for c in engine.generate([Request(longer, 3, Sampling(max_new_tokens=9))]):
        np.testing.assert_allclose(c.softmax_logp_T, scored(params, longer, c.tokens_T, kind=kind), atol=1e-4)
    assert read == [3]  # the last drawn token and two of the new ones; the last is the first that is decoded


@pytest.mark.usefixtures("one_device")
def test_new_weights_forget_what_was_read() -> None:
    engine, params = make()
    request = [Request(list(range(20)), 1, Sampling(seed=0, max_new_tokens=12))]
    list(engine.generate(request))
    changed = jax.tree.map(lambda w: w * 1.5, params)
    engine.sync(changed)
    (done,) = engine.generate(request)
    np.testing.assert_allclose(done.softmax_logp_T, scored(changed, list(range(20)), done.tokens_T), atol=1e-4)


@pytest.mark.usefixtures("one_device")
@slow_latent
def test_what_overflowed_in_a_row_does_not_reach_the_next_in_it(kind: str) -> None:
    (engine, _), (fresh, _) = (make(kind=kind) for _ in range(2))
    requests = [Request(prompt, 1, Sampling(seed=5, max_new_tokens=9)) for prompt in prompts(5)]
    for each in (engine, fresh):
        each.reserve(5, 64)
    engine._stored = jax.tree.map(lambda kept: jnp.full_like(kept, jnp.nan), engine._stored)
    for after, wanted in zip(engine.generate(requests), fresh.generate(requests), strict=True):
        assert (after.request, after.tokens_T.tolist()) == (wanted.request, wanted.tokens_T.tolist())
        np.testing.assert_array_equal(after.logp_T, wanted.logp_T)


def test_copying_a_row_does_not_gather_the_cache() -> None:
    engine, _ = make(devices=8)
    with mesh.use(engine._mesh):
        engine.reserve()
        rows = np.zeros(8, np.int32)
        compiled = programs.copy.lower(engine._stored, rows, rows, 1).compile().as_text()
    assert "all-gather" not in compiled


@pytest.mark.usefixtures("one_device")
def test_two_generators_do_not_mix() -> None:
    engine, _ = make()
    first, second = (engine.generate([Request([1], 1, Sampling(max_new_tokens=9))]) for _ in range(2))
    next(first)
    assert len(next(second).tokens_T) == 9
    third, fourth = (engine.generate([Request([1], 9, Sampling(max_new_tokens=9))]) for _ in range(2))
    next(third)
    with pytest.raises(RuntimeError, match="busy with other requests"):
        next(fourth)


@pytest.mark.usefixtures("one_device")
def test_a_cancelled_request_frees_its_rows() -> None:
    engine, _ = make()
    long, short = Sampling(max_new_tokens=50), Sampling(max_new_tokens=5)
    first = engine.submit(Request([1, 2, 3], 6, long))
    second = engine.submit(Request([4, 5], 1, short))
    engine.step()
    engine.cancel(first)
    ended = [event for event in engine.step() if isinstance(event, Completion)]
    assert [c.finish for c in ended if c.request == first] == ["cancelled"] * 6
    assert sorted(len(c.tokens_T) for c in ended if c.request == first) == [0, 0, 3, 3, 3, 3]
    while engine.busy:
        ended += [event for event in engine.step() if isinstance(event, Completion)]
    assert [len(c.tokens_T) for c in ended if c.request == second] == [5]


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("fault", ["prefill", "decode", "taken", "fetch"])
def test_after_a_failure_all_is_cancelled_and_the_next_request_is_served_as_ever(
    monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """A failure as prompts are read, as tokens are drawn, where the cache was taken over, and after that on the host.

    In windows of 8 tokens, what the device has drawn and the host has no record of is written over what was read.
    """
    engine, _ = make(kind="gemma3-text")
    request = Request(prompts(1)[0][:7], 1, Sampling(temperature=0, max_new_tokens=12))
    (before,) = engine.generate([request])
    engine.forget()

    def broken(*arguments: Any, **named: Any) -> Any:
        if fault == "taken":
            jax.tree.map(lambda leaf: leaf.delete(), engine._stored)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        place = processes if fault == "fetch" else programs
        patch.setattr(place, {"taken": "decode"}.get(fault, fault), broken)
        numbers = [engine.submit(request) for _ in range(6)]
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    assert engine.busy
    ended = engine.step()
    assert sorted(each.request for each in ended) == numbers
    assert all(isinstance(each, Completion) and each.finish == "cancelled" for each in ended)
    assert not engine.busy
    (after,) = engine.generate([request])
    np.testing.assert_array_equal(after.tokens_T, before.tokens_T)
    np.testing.assert_allclose(after.logp_T, before.logp_T, atol=1e-5)


@pytest.mark.usefixtures("one_device")
def test_a_cache_that_is_as_large_as_memory_allows_is_not_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = make(EngineKeys(prefill_chunk_length=16, kv_cache_gib=0.00035))
    requests = [Request(prompt, 1, Sampling(max_new_tokens=2)) for prompt in prompts(4)]
    assert engine.reserve(2, 200).rows < len(requests)
    monkeypatch.setattr(local.cache, "make", None)
    assert len(list(engine.generate(requests))) == 4
    assert list(engine.generate([])) == []


@pytest.mark.usefixtures("one_device")
def test_closing_the_iterator_ends_the_rest() -> None:
    engine, _ = make()
    stream = engine.generate([Request([1], 8, Sampling(max_new_tokens=i)) for i in (3, 30)])
    next(stream)
    stream.close()
    assert not engine.busy


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize(
    "kind", ["llama", "gemma3-text", *(pytest.param(kind, marks=SLOW) for kind in tiny.WITH_EXPERTS)]
)
def test_200_mixed_requests_compile_nothing_and_leave_nothing(kind: str) -> None:
    engine, _ = make(kind=kind)
    engine.reserve()
    engine.warm_up(logprobs=True)
    compiled: list[str] = []

    def listen(event: str, duration: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile"):
            compiled.append(event)

    def held() -> int:
        gc.collect()
        return sum(array.nbytes for array in jax.live_arrays())

    before = held()
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        random = np.random.default_rng(0)
        for batch in range(10):
            requests = [
                Request(
                    random.integers(0, 256, random.integers(1, 60)).tolist(),
                    int(random.integers(1, 4)),
                    Sampling(
                        temperature=float(random.choice([0, 0.7, 1])),
                        top_k=int(random.choice([0, 5])),
                        top_p=float(random.choice([0.9, 1])),
                        max_new_tokens=int(random.integers(1, 12)),
                        logprobs=int(random.choice([0, 3])),
                        seed=None if batch % 2 else batch,
                    ),
                )
                for _ in range(20)
            ]
            assert sum(1 for _ in engine.generate(requests)) == sum(request.samples for request in requests)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert compiled == []
    assert held() == before


@pytest.mark.usefixtures("one_device")
def test_the_cache_grows_while_idle_and_refuses_what_it_has_no_room_for() -> None:
    engine, _ = make(EngineKeys(max_num_seqs=2, decode_steps=3))
    list(engine.generate([Request([1, 2], 1, Sampling(max_new_tokens=3))]))
    short = engine.reserve(1, 1)
    engine.submit(Request([1, 2], 1, Sampling(max_new_tokens=9)))
    with pytest.raises(UserError, match=rf"{short.length + 5} tokens, and the cache was made for"):
        engine.submit(Request([3] * (short.length + 5), 1))
    while engine.busy:
        engine.step()
    (done,) = engine.generate([Request([3] * (short.length + 5), 1, Sampling(max_new_tokens=4))])
    assert len(done.tokens_T) == 4


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (Request([], 1), ["no tokens"]),
        (Request([272], 1), ["token 272", "vocabulary is 272", "tokenizer_path"]),
        (Request([1] * 64, 1), ["64 tokens", "max_target_length"]),
        (Request([1], 0), ["samples=0"]),
        (
            Request([1], 1, Sampling(temperature=-1)),
            ["temperature=-1", "0 (the likeliest token) or from 1e-06 to 1000"],
        ),
        (Request([1], 1, Sampling(temperature=float("nan"))), ["temperature=nan"]),
        (Request([1], 1, Sampling(temperature=1e300)), ["temperature=1e+300"]),
        (Request([1], 1, Sampling(top_k=2**31)), ["top_k=2147483648"]),
        (Request([1], 1, Sampling(top_p=0)), ["top_p=0", "over 0"]),
        (Request([1], 1, Sampling(top_k=-1)), ["top_k=-1"]),
        (Request([1], 1, Sampling(min_p=2)), ["min_p=2"]),
        (Request([1], 1, Sampling(max_new_tokens=0)), ["max_new_tokens=0"]),
        (Request([1], 1, Sampling(stop_token_ids=(272,))), ["stop_token_ids: 272"]),
        (Request([1], 1, Sampling(stop=("x",))), ["no tokenizer", "stop_token_ids"]),
        (Request([1], 1, Sampling(stop=("",))), ["empty text"]),
        (Request([1], 1, Sampling(logprobs=21)), ["logprobs=21", "0 to 20"]),
    ],
)
def test_a_bad_request_is_refused_before_any_is_begun(request_: Request, said: list[str]) -> None:
    engine, _ = make()
    with pytest.raises(UserError) as refused:
        engine.generate([Request([1], 1), request_])
    assert all(part in str(refused.value) for part in said), refused.value
    assert not engine.busy
