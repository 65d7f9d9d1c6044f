"""Adapters in the embedded engine, alone and several over one base in one batch, and bases that are quantised."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from luthier import mesh
from luthier.checkpoint import placing
from luthier.config import EngineKeys, ModelKeys
from luthier.errors import UserError
from luthier.model import lora, param, quant
from luthier.model.compute import Compute
from luthier.model.lora import Adapter, Lora
from luthier.rollout import adapters
from luthier.rollout.engine import Completion, Request, Sampling
from luthier.rollout.local import LocalEngine

KEYS = EngineKeys(max_num_seqs=4, prefill_chunk_length=16, decode_steps=3, max_target_length=64)
ATTENTION = {"deepseek-v3": ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")}
SLOW = pytest.mark.slow
GREEDY = Sampling(temperature=0, max_new_tokens=9)


def settings(kind: str) -> dict[str, Adapter]:
    """Two adapters that differ in rank, scale and targets."""
    attention = ATTENTION.get(kind, ("q_proj", "k_proj", "v_proj", "o_proj"))
    widest = "all-linear" if kind not in tiny.WITH_EXPERTS else attention
    return {
        "all": Adapter(rank=4, alpha=8, targets=widest),
        "few": Adapter(rank=2, alpha=6, rslora=True, targets=attention[1::2]),
    }


def base(kind: str, place: Any) -> Any:
    """Weights sharper than at initialisation, so that a wrong cache shows."""
    params = param.initialise(tiny.kind_model(kind).spec, jax.random.key(1), jnp.float32, place)
    return jax.tree.map(lambda w: w * 3 if w.ndim > 1 else w, params)


def drawn(kind: str, adapter: Adapter, seed: int = 0) -> Any:
    return tiny.random_params(lora.spec(tiny.kind_model(kind).spec, adapter), seed)


def engine(kind: str, params: Any, place: Any, names: Sequence[str] = (), **compute: Any) -> LocalEngine:
    model = tiny.kind_model(kind)
    return LocalEngine(model, params, Compute(**compute), place, KEYS, context_length=512, adapters=names)


def completed(by: LocalEngine, requests: Sequence[Request]) -> dict[tuple[int, int], Completion]:
    return {(each.request, each.sample): each for each in by.generate(requests)}


@pytest.fixture
def place() -> Iterator[Any]:
    made = mesh.make(ModelKeys(), jax.devices()[:1])
    with mesh.use(made):
        yield made


def prompts(count: int) -> list[list[int]]:
    random = np.random.default_rng(0)
    return [random.integers(0, 256, 20).tolist() for _ in range(count)]


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=SLOW if kind in tiny.WITH_EXPERTS else []) for kind in tiny.KINDS]
)
def test_each_adapter_gives_in_a_mixed_batch_what_it_gives_alone(kind: str, place: Any) -> None:
    """The same prompts for all, so that a row that another adapter has read would show."""
    spec, weights, chosen = tiny.kind_model(kind).spec, base(kind, place), settings(kind)
    trees = {name: drawn(kind, adapter, seed) for seed, (name, adapter) in enumerate(chosen.items())}
    alone = {"": weights}
    alone |= {name: lora.attach(spec, weights, adapter, trees[name]) for name, adapter in chosen.items()}
    mixed = adapters.together(spec, weights, {name: (chosen[name], trees[name]) for name in chosen})
    requests = [Request(prompt, 2, GREEDY, name) for prompt in prompts(2) for name in alone]
    found = completed(engine(kind, mixed, place, list(chosen)), requests)
    seen = set()
    for name, params in alone.items():
        own = [(index, each) for index, each in enumerate(requests) if each.adapter == name]
        expected = completed(engine(kind, params, place), [Request(each.prompt, 1, GREEDY) for _, each in own])
        for place_of, (index, _) in enumerate(own):
            for sample in range(2):
                got, wanted = found[index, sample], expected[place_of, 0]
                assert got.tokens_T.tolist() == wanted.tokens_T.tolist(), (name, index)
                np.testing.assert_allclose(got.softmax_logp_T, wanted.softmax_logp_T, atol=1e-5)
        seen.add(tuple(expected[0, 0].tokens_T.tolist()))
    assert len(seen) == len(alone), "adapters that change nothing"


@pytest.mark.parametrize("quantization", ["", "nf4"])
def test_dora_is_sampled_as_it_is_trained(quantization: str, place: Any) -> None:
    """Its norms of rows are worked out once for all steps."""
    model, adapter = tiny.kind_model("llama"), Adapter(rank=4, alpha=8, dora=True)
    weights = base("llama", place)
    weights = placing.quantise(weights, model.spec, quantization, place) if quantization else weights
    params = lora.attach(model.spec, weights, adapter, drawn("llama", adapter))
    settled = lora.settled(model.spec, params)
    assert settled["layers"]["0"]["mlp"]["up"].norms.shape == (3, 128)
    batch = tiny.make_batch(vocab=272)
    found, wanted = (np.asarray(model.logits(each, batch, Compute())) for each in (settled, params))
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())
    assert engine("llama", params, place)._params["layers"]["0"]["attention"]["o"].norms is not None


@pytest.mark.parametrize("axes", [(2, 2, 2), pytest.param((1, 8, 1), marks=SLOW)])
def test_several_devices_sample_what_one_does(axes: tuple[int, ...]) -> None:
    spec, chosen = tiny.kind_model("llama").spec, settings("llama")
    trees = {name: drawn("llama", adapter) for name, adapter in chosen.items()}
    requests = [Request(prompt, 1, GREEDY, name) for prompt in prompts(2) for name in ("", *chosen)]
    found = []
    for sizes in ((1, 1, 1), axes):
        keys = zip(("data", "fsdp", "tensor"), sizes, strict=True)
        split = ModelKeys(**{f"ici_{axis}_parallelism": size for axis, size in keys})
        place = mesh.make(split, jax.devices()[: int(np.prod(sizes))])
        with mesh.use(place):
            here = {
                name: (chosen[name], jax.device_put(tree, param.shardings(lora.spec(spec, chosen[name]), place)))
                for name, tree in trees.items()
            }
            mixed = adapters.together(spec, base("llama", place), here)
            done = completed(engine("llama", mixed, place, list(chosen)), requests)
            found.append({key: each.tokens_T.tolist() for key, each in done.items()})
    assert found[0] == found[1]


def test_weights_of_other_types_are_taken_as_they_are(place: Any) -> None:
    """A base is cast as in training without an adapter; what adapts it is not."""
    spec, adapter = tiny.kind_model("llama").spec, settings("llama")["few"]
    params = lora.attach(spec, base("llama", place), adapter, drawn("llama", adapter))
    attention = engine("llama", params, place, dtype=jnp.bfloat16)._params["layers"]["0"]["attention"]
    assert isinstance(attention["o"], Lora)
    assert [attention["o"].base.dtype, attention["q"].dtype] == [jnp.bfloat16] * 2
    assert [attention["o"].a.dtype, attention["o"].b.dtype] == [jnp.float32] * 2


@pytest.mark.parametrize(
    ("kind", "quantization"),
    [
        ("llama", "nf4"),
        *(
            pytest.param(*each, marks=SLOW)
            for each in (("gemma3-text", "int8"), ("qwen3-moe", "int4"), ("deepseek-v3", "nf4"))
        ),
    ],
)
def test_a_quantised_base_samples_as_its_floats_do(kind: str, quantization: str, place: Any) -> None:
    """With an adapter over it, too."""
    spec, adapter = tiny.kind_model(kind).spec, settings(kind)["few"]
    codes = placing.quantise(base(kind, place), spec, quantization, place)
    floats = param.map_spec(
        lambda _, weight: weight.materialised(jnp.float32) if quant.is_quantised(weight) else weight, spec, codes
    )
    requests = [Request(prompt, 1, GREEDY, name) for prompt in prompts(2) for name in ("", "few")]
    few = {"few": (adapter, drawn(kind, adapter))}
    by = [engine(kind, adapters.together(spec, weights, few), place, ["few"]) for weights in (codes, floats)]
    found, wanted = (completed(each, requests) for each in by)
    for key, each in wanted.items():
        assert found[key].tokens_T.tolist() == each.tokens_T.tolist()
        np.testing.assert_allclose(found[key].softmax_logp_T, each.softmax_logp_T, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "adapter", "words"),
    [
        ("llama", Adapter(rank=2, alpha=2, dora=True), "DoRA"),
        ("qwen3-moe", Adapter(rank=2, alpha=2), "experts"),
    ],
)
def test_what_cannot_share_a_batch_is_refused_with_the_remedy(kind: str, adapter: Adapter, words: str) -> None:
    with pytest.raises(UserError, match=rf"adapter odd: .*{words}.*luthier convert"):
        adapters.check(tiny.kind_model(kind).spec, {"odd": adapter})


def test_an_adapter_that_is_not_there_is_named(place: Any) -> None:
    chosen = settings("llama")
    mixed = adapters.together(
        tiny.kind_model("llama").spec, base("llama", place), {"few": (chosen["few"], drawn("llama", chosen["few"]))}
    )
    with pytest.raises(UserError, match=r"adapter=fwe: .* Did you mean `few`"):
        engine("llama", mixed, place, ["few"]).check(Request([1], adapter="fwe"))
    with pytest.raises(UserError, match=r"adapter=few: .* Leave it out"):
        engine("llama", base("llama", place), place).check(Request([1], adapter="few"))
