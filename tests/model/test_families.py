"""Every variant of every family against Transformers and against itself: one tolerance each, never loosened.

A variant is a line of ``family_variants.VARIANTS``. What takes long runs by default for one variant of each kind and
with the slow tests for all.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import families_page
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_variants import ONE_EACH, VARIANTS, Config
from test_cached_forward import pieces_logp

import tiny
from luthier import mesh as mesh_lib
from luthier.checkpoint import huggingface, tensors
from luthier.checkpoint.source import resolve
from luthier.config import ModelKeys
from luthier.errors import UserError
from luthier.model import cache, families, param
from luthier.model.compute import Compute
from luthier.model.model import Model
from luthier.types import Batch

TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-3
ROUNDING = 1e-7  # of the greatest gradient: what is left of one that is zero, as that of a key's bias without RoPE
GROWTH = 1.2
LENGTH = 40
# Half the time to compile, and the same arithmetic.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

# One variant of each kind of model, for the tests that take long.
KINDS = ("llama3.1", "qwen2-window", "qwen3-moe", "gemma3-text", "deepseek-v3", "gpt-oss", "olmo3", "phi4-mini")

# Variants whose number of layers can be changed and nothing else, at least one of each model type.
DEEP = (
    "llama3.1",
    "smollm3-old",
    "qwen2-window-old",
    "qwen3",
    "qwen3-moe-mixed",
    "gemma",
    "gemma2-old",
    "gemma3-text-old",
    "gemma3",
    "mistral-window",
    "ministral",
    "ministral3",
    "mistral3",
    "mixtral",
    "deepseek-v2",
    "deepseek-v3",
    "gpt-oss-old",
    "olmo2",
    "olmo3-old",
    "phi3",
)


def variants(quick: Callable[[str], bool], every: Iterable[str] = tuple(VARIANTS)) -> Any:
    """Parametrise by every variant: those that are ``quick``, with the slow tests one of each type, and all."""

    def marked(name: str) -> Any:
        late = pytest.mark.slow if name in ONE_EACH else pytest.mark.exhaustive
        return name if quick(name) else pytest.param(name, marks=late)

    return pytest.mark.parametrize("name", list(map(marked, every)))


# A config that is written in an older way makes the program of the newer one, which is proved on its own.
NEWER = [name for name in VARIANTS if not name.endswith("-old")]

every_variant = variants(lambda name: True)
newer_first = variants(NEWER.__contains__)
kinds_first = variants(KINDS.__contains__)
newer_kinds_first = variants(KINDS.__contains__, NEWER)
newer_split_first = variants({"gemma3-text", "qwen3-moe", "deepseek-v3"}.__contains__, NEWER)
stacks_first = variants({"llama3.1", "qwen3-moe-mixed", "gemma3-text-old", "deepseek-v3"}.__contains__, DEEP)


@functools.cache
def model_of(name: str) -> Model:
    return Model.from_hf(VARIANTS[name].config, name)


@functools.cache
def twin_of(name: str) -> Any:
    return tiny.torch_twin(VARIANTS[name].config)


@functools.cache
def batch() -> Batch:
    """Four rows: one of a single segment, the others of two and some padding."""
    made = tiny.make_batch(4, LENGTH)
    arrays = [np.array(array) for array in (made.tokens_BT, made.positions_BT, made.segments_BT, made.mask_BT)]
    tokens_BT, positions_BT, segments_BT, mask_BT = arrays
    tokens_BT[0] = np.random.default_rng(1).integers(0, 256, LENGTH)
    positions_BT[0], segments_BT[0], mask_BT[0] = np.arange(LENGTH), 1, np.arange(LENGTH) > 0
    return Batch(tokens_BT, positions_BT, segments_BT, mask_BT)


def spans() -> Iterator[tuple[int, slice]]:
    """Yield (row, its columns) of each segment."""
    for row, segments_T in enumerate(np.asarray(batch().segments_BT)):
        for segment in range(1, segments_T.max() + 1):
            columns = np.flatnonzero(segments_T == segment)
            yield row, slice(columns[0], columns[-1] + 1)


@functools.cache
def theirs(name: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return Transformers' log-probs ``[B, T, V]``, each segment read alone, and the gradient of their mean."""
    torch = pytest.importorskip("torch")
    twin, here = twin_of(name), batch()
    logp_BTV, total = np.zeros((*here.tokens_BT.shape, 256), np.float32), 0.0
    for row, columns in spans():
        ids = torch.from_numpy(here.tokens_BT[row, columns].astype(np.int64))
        logp_TV = torch.log_softmax(twin(ids[None]).logits[0], -1)
        logp_BTV[row, columns] = logp_TV.detach().numpy()
        mask = torch.from_numpy(here.mask_BT[row, columns][1:].astype(np.float32))
        total = total - (logp_TV[:-1].gather(1, ids[1:, None])[:, 0] * mask).sum()
    (total / int(here.mask_BT.sum())).backward()
    gradients = {key: weight.grad for key, weight in twin.named_parameters() if weight.grad is not None}
    return logp_BTV, tiny.stored_tensors(twin, gradients)


def loss(model: Model, params: Any, here: Batch) -> jax.Array:
    """Return the mean negative log-prob of the masked tokens."""
    scores_BT = model.score(params, here, Compute()).logp_BT
    return -jnp.sum(scores_BT * here.mask_BT) / jnp.sum(here.mask_BT)


@functools.cache
def params_of(name: str) -> Any:
    pytest.importorskip("torch")
    return tiny.params_from_torch(model_of(name).spec, twin_of(name))


def log_probs(model: Model, params: Any) -> np.ndarray:
    """Return the log-probs ``[B, T, V]`` of the batch."""
    run = jax.jit(lambda params, here: model.logits(params, here, Compute()), compiler_options=QUICK)
    return np.asarray(jax.nn.log_softmax(run(params, jax.tree.map(jnp.asarray, batch()))))


def gradient(model: Model, params: Any) -> Any:
    run = jax.jit(jax.grad(lambda params, here: loss(model, params, here)), compiler_options=QUICK)
    return jax.tree.map(np.asarray, run(params, jax.tree.map(jnp.asarray, batch())))


@functools.cache
def our_gradient(name: str) -> Any:
    return gradient(model_of(name), params_of(name))


@pytest.fixture(scope="module")
def figures() -> Iterator[dict[str, float]]:
    """{variant: greatest difference of log-probs}, kept for the page of the families where WRITE_FAMILIES says so."""
    found: dict[str, float] = {}
    yield found
    if os.environ.get("WRITE_FAMILIES"):
        known = json.loads(families_page.FIGURES.read_text()) if families_page.FIGURES.exists() else {}
        measured = {name: (known | found)[name] for name in VARIANTS if name in known | found}
        families_page.FIGURES.write_text(json.dumps(measured, indent=2) + "\n")


def test_the_page_of_the_families_is_in_step_with_the_code() -> None:
    figures = json.loads(families_page.FIGURES.read_text())
    assert figures.keys() == VARIANTS.keys()
    assert max(figures.values()) < TOLERANCE
    assert families_page.PAGE.read_text() == families_page.markdown(figures), "run: make families"


def test_every_family_has_a_variant_and_every_variant_a_family() -> None:
    assert {variant.config["model_type"] for variant in VARIANTS.values()} == set(families.table())
    assert {VARIANTS[name].config["model_type"] for name in DEEP} == set(families.table())
    assert set(KINDS) <= set(VARIANTS)


@every_variant
def test_a_config_reads_like_what_transformers_writes_of_it(name: str) -> None:
    """Old and new ways of writing a config, with the defaults that Transformers fills in."""
    transformers = pytest.importorskip("transformers")
    config = VARIANTS[name].config
    fields = {key: deepcopy(value) for key, value in config.items() if key not in ("model_type", "architectures")}
    written = transformers.AutoConfig.for_model(config["model_type"], **fields).to_dict()
    assert Model.from_hf(json.loads(json.dumps(written)), name) == model_of(name)


@newer_first
def test_log_probs_equal_transformers(name: str, figures: dict[str, float]) -> None:
    theirs_BTV, _ = theirs(name)
    ours_BTV = log_probs(model_of(name), params_of(name))
    assert np.isfinite(ours_BTV[np.asarray(batch().segments_BT) > 0]).all()
    difference = max(np.abs(ours_BTV[place] - theirs_BTV[place]).max() for place in spans())
    figures[name] = float(difference)
    assert difference < TOLERANCE


@kinds_first
def test_gradients_equal_torchs(name: str) -> None:
    _, theirs_by_tensor = theirs(name)
    rounding = ROUNDING * max(np.abs(tensor).max() for tensor in theirs_by_tensor.values())
    seen: set[str] = set()

    def compare(weight: param.Param, ours_whole: jax.Array) -> None:
        for tensor, place in weight.tensors().items():
            seen.add(tensor)
            ours_slice = np.asarray(ours_whole[place])
            if tensor not in theirs_by_tensor:  # no gradient reaches it: a bias that only chooses, an idle expert
                assert not ours_slice.any(), tensor
                continue
            wanted = weight.from_tensor(theirs_by_tensor[tensor])
            error, size = np.abs(ours_slice - wanted).max(), np.abs(wanted).max()
            assert error <= GRADIENT_TOLERANCE * size + rounding, f"{tensor}: {error} of {size}"

    param.map_spec(compare, model_of(name).spec, our_gradient(name))
    assert theirs_by_tensor.keys() <= seen


@pytest.mark.parametrize("name", ["llama3.1", "gemma2"])
def test_scores_are_those_of_the_tokens(name: str) -> None:
    """What training and the engine use, which never has whole logits."""
    theirs_BTV, _ = theirs(name)
    params = tiny.params_from_torch(model_of(name).spec, twin_of(name))
    scores = jax.jit(lambda p: model_of(name).score(p, batch(), Compute()), compiler_options=QUICK)(params)
    for row, columns in spans():
        targets = np.asarray(batch().tokens_BT[row, columns])[1:]
        logp_TV = theirs_BTV[row, columns][:-1]
        wanted_T = np.take_along_axis(logp_TV, targets[:, None], axis=1)[:, 0]
        np.testing.assert_allclose(scores.logp_BT[row, columns][1:], wanted_T, atol=TOLERANCE, rtol=0)
        np.testing.assert_array_equal(scores.correct_BT[row, columns][1:], logp_TV.argmax(-1) == targets)


@newer_kinds_first
def test_reading_through_the_cache_is_reading_at_once(name: str) -> None:
    """Chunks shorter and longer than the window, then token by token, past the window's end."""
    model, here = model_of(name), mesh_lib.make(ModelKeys(), jax.devices()[:1])
    params = tiny.random_params(model.spec)
    tokens_BT = np.random.default_rng(0).integers(0, 256, (3, 26), dtype=np.int32)
    positions_BT = np.broadcast_to(np.arange(26, dtype=np.int32), tokens_BT.shape)
    whole = Batch(tokens_BT, positions_BT, np.ones_like(tokens_BT), np.ones_like(tokens_BT, bool))
    with mesh_lib.use(here):
        logits = jax.jit(lambda p: model.logits(p, whole, Compute()), compiler_options=QUICK)
        empty = cache.make(model.cache_lines, 4, 32, jnp.float32, here)
        pieces = [[5, 12, 0], [12, 0, 12], [0, 12, 3], *[[1, 1, 1]] * 23]
        read_BTV = pieces_logp(model, params, tokens_BT, pieces, jnp.asarray([3, 0, 2]), empty)
        np.testing.assert_allclose(read_BTV, jax.nn.log_softmax(logits(params)), atol=TOLERANCE, rtol=0)


@newer_first
def test_loaded_and_saved_tensors_are_the_same_bit_for_bit(name: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    twin, model = twin_of(name), model_of(name)
    twin.save_pretrained(tmp_path / "in")
    (tmp_path / "in" / "config.json").write_text(json.dumps(VARIANTS[name].config))
    tiny.tokenizer().save_pretrained(tmp_path / "in")
    source = resolve(ModelKeys(load_parameters_path=str(tmp_path / "in")))
    here = mesh_lib.make(ModelKeys(), jax.devices()[:1])
    params = huggingface.load(source, model.spec, jnp.float32, here, model.config.ignored)
    huggingface.save(tmp_path / "out", params, model.spec, source, tiny.tokenizer())
    there = {key: tensor.read() for key, tensor in tensors.read_folder(tmp_path / "in").items()}
    saved = {key: tensor.read() for key, tensor in tensors.read_folder(tmp_path / "out").items()}
    assert saved.keys() == there.keys()
    for key, tensor in there.items():
        assert saved[key].dtype == tensor.dtype, key
        assert saved[key].tobytes() == tensor.tobytes(), key
    again, told = type(twin).from_pretrained(tmp_path / "out", attn_implementation="eager", output_loading_info=True)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    ids = torch.from_numpy(np.asarray(batch().tokens_BT[:1]).astype(np.int64))
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, twin(ids).logits, atol=0, rtol=0)


def parallel_keys(name: str) -> ModelKeys:
    """Return how eight devices share a variant: by heads where their number is even, by experts where there are any."""
    config = VARIANTS[name].config
    config = config.get("text_config", config)
    tensor = 2 if config["num_attention_heads"] % 2 == 0 else 1
    expert = 2 if {"num_experts", "num_local_experts", "n_routed_experts"} & config.keys() else 1
    return ModelKeys(
        ici_fsdp_parallelism=8 // (tensor * expert), ici_tensor_parallelism=tensor, ici_expert_parallelism=expert
    )


@newer_split_first
def test_eight_devices_equal_one(name: str) -> None:
    model, eight = model_of(name), mesh_lib.make(parallel_keys(name))
    wanted_BTV, wanted = log_probs(model, params_of(name)), our_gradient(name)
    with mesh_lib.use(eight):
        placed = jax.device_put(params_of(name), param.shardings(model.spec, eight))
        found_BTV, found = log_probs(model, placed), gradient(model, placed)
    real_BT = np.asarray(batch().segments_BT) > 0
    np.testing.assert_allclose(found_BTV[real_BT], wanted_BTV[real_BT], atol=TOLERANCE, rtol=0)
    rounding = ROUNDING * max(np.abs(tensor).max() for tensor in jax.tree.leaves(wanted))
    for path, tensor in param.leaves(wanted).items():
        error = np.abs(param.leaves(found)[path] - tensor).max()
        assert error <= GRADIENT_TOLERANCE * np.abs(tensor).max() + rounding, path


def deepened(config: Config, layers: int) -> Config:
    """Return ``config`` with this number of layers, whose period goes on."""
    if "text_config" in config:
        return config | {"text_config": deepened(config["text_config"], layers)}
    config = config | {"num_hidden_layers": layers}
    if kinds := config.get("layer_types"):
        period = next(n for n in range(1, len(kinds) + 1) if kinds[n:] == kinds[:-n])
        config["layer_types"] = [kinds[i % period] for i in range(layers)]
    return config


def lowered(config: Config) -> tuple[int, int]:
    """Return the lines of a gradient's program, and the Python calls it takes to trace and lower it."""
    model, here = Model.from_hf(config, "deep"), mesh_lib.make(ModelKeys(), jax.devices()[:1])
    params = param.abstract(model.spec, jnp.float32, here)
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event == "call"

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        program = jax.jit(jax.grad(lambda p: loss(model, p, batch()))).lower(params)
    finally:
        sys.setprofile(before)
    return len(program.as_text().splitlines()), calls


@stacks_first
def test_a_program_does_not_grow_with_its_layers(name: str) -> None:
    """Work is counted in calls, which are the same on every machine, where seconds are not."""
    config = VARIANTS[name].config
    shallow, deep = deepened(config, 8), deepened(config, 80)
    lowered(shallow), lowered(deep)  # the first fills JAX's caches
    for few, many in zip(lowered(shallow), lowered(deep), strict=True):
        assert many < GROWTH * few


def test_a_long_rope_reaches_every_branch_of_llama31_scaling() -> None:
    """The scaled and the unscaled model differ, so the parity above does exercise the scaling."""
    config = VARIANTS["llama3.1"].config
    scaled, unscaled = (Model.from_hf(c, "x") for c in (config, config | {"rope_scaling": None}))
    params = tiny.random_params(scaled.spec)
    one, other = (np.asarray(model.logits(params, batch(), Compute())) for model in (scaled, unscaled))
    assert np.abs(one - other).max() > 1e-3


def test_families_are_found_by_model_type_and_an_unknown_one_is_refused() -> None:
    assert families.find({"model_type": "llama"}, "x").__name__.endswith("llama")
    with pytest.raises(UserError, match=r"x: model type `lama` is not supported\. Did you mean `llama`"):
        families.find({"model_type": "lama"}, "x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act=`gelu` is not supported"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type=`dynamic` is not supported"),
    ],
)
def test_a_config_that_cannot_be_computed_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Model.from_hf(tiny.TINY | change, "x")


def test_a_config_that_lacks_a_field_is_refused() -> None:
    config = {name: value for name, value in tiny.TINY.items() if name != "vocab_size"}
    with pytest.raises(UserError, match=r"x: config\.json lacks 'vocab_size'"):
        Model.from_hf(config, "x")


def test_a_llama31_checkpoint_scores_as_its_recorded_reference(data_folder: Path) -> None:
    """Transformers' fp32 log-probs of a Llama 3.1 checkpoint on disk, through our own reading of it."""
    folder = data_folder / "maxtext" / "llama3.1-tiny-hf"
    source = resolve(ModelKeys(load_parameters_path=str(folder)))
    model, reference = Model.from_hf(source.config, source.name), np.load(folder / "reference.npz")
    tokens_BT = reference["tokens"].astype(np.int32)
    ones_BT = np.ones_like(tokens_BT)
    positions_BT = np.tile(np.arange(tokens_BT.shape[1], dtype=np.int32), (len(tokens_BT), 1))
    row = Batch(tokens_BT, positions_BT, ones_BT, ones_BT)
    params = huggingface.load(source, model.spec, jnp.float32, mesh_lib.make(ModelKeys(), jax.devices()[:1]))
    logits_BTV = jax.jit(lambda p: model.logits(p, row, Compute()))(params)
    np.testing.assert_allclose(jax.nn.log_softmax(logits_BTV), reference["logp"], atol=TOLERANCE, rtol=0)
