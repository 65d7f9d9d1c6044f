"""The experts that the engine says tokens were sent to, against those of one pass over the whole sequence."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_variants import VARIANTS

import tiny
from luthier import mesh
from luthier.config import EngineKeys, ModelKeys
from luthier.errors import UserError
from luthier.model import cache
from luthier.model.compute import Compute
from luthier.model.model import Model
from luthier.rollout import episodes, programs
from luthier.rollout.engine import Completion, Request, Sampling
from luthier.rollout.environment import Observation
from luthier.rollout.episodes import Task
from luthier.rollout.local import LocalEngine
from luthier.rollout.prompts import Prompt
from luthier.types import Batch

LENGTH = 64
KEYS = EngineKeys(max_num_seqs=4, prefill_chunk_length=16, decode_steps=3, max_target_length=LENGTH)


@functools.cache
def model(name: str) -> Model:
    return Model.from_hf(VARIANTS[name].config, name)


def make(name: str, devices: int = 1, record: bool = True, **axes: int) -> tuple[LocalEngine, Any]:
    here = mesh.make(ModelKeys(**axes), jax.devices()[:devices])
    params = tiny.random_params(model(name).spec, seed=1)
    return LocalEngine(model(name), params, Compute(), here, KEYS, context_length=512, record_routes=record), params


@pytest.fixture
def one_device() -> Iterator[None]:
    with mesh.use(mesh.make(ModelKeys(), jax.devices()[:1])):
        yield


@functools.cache
def program(name: str) -> Any:
    return jax.jit(lambda params, batch: model(name).score(params, batch, Compute()).routed.chosen_BTk)


def chosen(name: str, params: Any, ids: list[int]) -> np.ndarray:
    """Return the experts of all tokens but the last by one pass over everything, ``[T, L, k]``, in order."""
    count = len(ids)
    tokens = np.zeros((1, LENGTH), np.int32)
    tokens[0, :count] = ids
    places = np.arange(LENGTH, dtype=np.int32)[None]
    batch = Batch(tokens, places, (places < count).astype(np.int32), places < count)
    return np.sort(np.asarray(program(name)(params, batch))[:, 0, : count - 1].swapaxes(0, 1))


def same(name: str, params: Any, prompt: Any, completion: Completion) -> None:
    assert completion.routes_TLk is not None
    assert completion.routes_TLk.dtype == np.int16
    expected = chosen(name, params, [*prompt, *completion.tokens_T.tolist()])
    np.testing.assert_array_equal(np.sort(completion.routes_TLk), expected)


def requests() -> list[Request]:
    """Prompts of all lengths, of which some begin alike, more of them than there are rows, several samples of each."""
    random = np.random.default_rng(0)
    lengths = (1, 2, 40, 17, 25, 9)
    prompts = [random.integers(0, 256, length).tolist() for length in lengths]
    prompts += [[*prompts[3], 5, 6, 7], prompts[2][:30]]
    return [Request(prompt, 1 + i % 3, Sampling(max_new_tokens=3 + 2 * i, seed=i)) for i, prompt in enumerate(prompts)]


EIGHT = {"ici_data_parallelism": 2, "ici_fsdp_parallelism": 2, "ici_expert_parallelism": 2}


@pytest.mark.parametrize(
    ("name", "devices", "axes"),
    [
        ("qwen3-moe", 1, {}),
        ("qwen3-moe", 8, EIGHT),
        pytest.param("qwen3-moe-mixed", 1, {}, marks=pytest.mark.slow),
        pytest.param("gpt-oss", 1, {}, marks=pytest.mark.slow),
        pytest.param("deepseek-v3", 1, {}, marks=pytest.mark.slow),
    ],
    ids=["heads", "eight-devices", "dense-between", "rings", "latent"],
)
def test_routes_are_those_of_one_whole_pass(name: str, devices: int, axes: dict[str, int]) -> None:
    engine, params = make(name, devices, **axes)
    asked = requests()
    with mesh.use(engine._mesh):
        done = list(engine.generate(asked))
    assert len(done) == sum(request.samples for request in asked)
    for one in done:
        same(name, params, asked[one.request].prompt, one)


@pytest.mark.usefixtures("one_device")
def test_a_turn_has_the_routes_of_the_turns_before_it() -> None:
    class Answers:
        stop: tuple[str, ...] = ()
        quick = True

        def reset(self, prompt: Prompt) -> None:
            self.turns = 0

        def step(self, tokens_T: np.ndarray) -> Observation:
            self.turns += 1
            return Observation([7, 8, 9], done=self.turns == 3)

    engine, params = make("qwen3-moe")
    prompt = Prompt("row 1", ({"role": "user", "content": "?"},), "?", row={})
    tasks = [Task(prompt, [number, *range(30, 50)], seed=number) for number in range(2)]
    how = Sampling(max_new_tokens=40, stop_token_ids=tuple(range(0, 256, 6)))
    played = dict(episodes.play(engine, tasks, 3, how, tiny.tokenizer(), make_environment=Answers))
    turns = [episode for group in played.values() for episode in group]
    assert max(episode.turns for episode in turns) == 3
    for episode in turns:
        whole = [*episode.prompt_T.tolist(), *episode.tokens_T.tolist()]
        np.testing.assert_array_equal(np.sort(episode.routes_TLk), chosen("qwen3-moe", params, whole))


@pytest.mark.usefixtures("one_device")
def test_tokens_keep_the_routes_of_the_weights_that_read_them() -> None:
    engine, params = make("qwen3-moe")
    other = tiny.random_params(model("qwen3-moe").spec, seed=2)
    prompt, how = list(range(20)), Sampling(max_new_tokens=9, seed=0)
    engine.submit(Request(prompt, 1, how))
    engine.step()
    engine.sync(other, version=1)
    ended: list[Any] = []
    while engine.busy:
        ended += [event for event in engine.step() if isinstance(event, Completion)]
    (one,) = ended
    assert one.versions_T.tolist() == [0] * 3 + [1] * 6
    before = len(prompt) - 1 + 3
    whole = [*prompt, *one.tokens_T.tolist()]
    old, found = chosen("qwen3-moe", params, whole), np.sort(one.routes_TLk)
    np.testing.assert_array_equal(found[:before], old[:before])
    assert (found[before:] != old[before:]).any()


@pytest.mark.usefixtures("one_device")
def test_recording_changes_nothing_else_and_is_off_unless_asked_for() -> None:
    (recording, _), (plain, _) = make("qwen3-moe"), make("qwen3-moe", record=False)
    assert recording.limits.lines.keys() - plain.limits.lines.keys() == {cache.ROUTES}
    both = [{(one.request, one.sample): one for one in engine.generate(requests())} for engine in (recording, plain)]
    for place, one in both[0].items():
        assert both[1][place].routes_TLk is None
        np.testing.assert_array_equal(both[1][place].tokens_T, one.tokens_T)
        np.testing.assert_array_equal(both[1][place].logp_T, one.logp_T)


@pytest.mark.usefixtures("one_device")
def test_the_record_is_counted_in_the_plan_and_compiled_for_in_advance() -> None:
    engine, _ = make("qwen3-moe")
    lines = model("qwen3-moe").cache_lines
    layers, top_k = 3, 3
    assert model("qwen3-moe").routes == (layers, top_k)
    own = cache.row_bytes(engine.limits.lines, LENGTH, jnp.float32) - cache.row_bytes(lines, LENGTH, jnp.float32)
    assert own == layers * top_k * LENGTH * 2
    engine.warm_up()
    compiled = programs.routes._cache_size()  # type: ignore[attr-defined]
    list(engine.generate(requests()))
    assert programs.routes._cache_size() <= compiled  # type: ignore[attr-defined]


def test_a_model_without_experts_has_nothing_to_record() -> None:
    assert model("qwen3").routes is None
    with pytest.raises(UserError, match=r"routing_replay=true.*no experts"):
        make("qwen3")
