"""Released models at their full size, as shapes alone: what they weigh, that they trace, how meshes split them."""

from __future__ import annotations

import functools
import math
from copy import deepcopy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from luthier import mesh as mesh_lib
from luthier.config import ModelKeys
from luthier.model import families, param
from luthier.model.compute import Compute
from luthier.model.model import Model
from luthier.model.published import PUBLISHED, SAME, find
from luthier.types import Batch

BIG = 10**6  # numbers in one layer's tensor, more than which no device should hold whole
UNEVEN = 1.1

every_model = pytest.mark.parametrize("name", PUBLISHED)


@functools.cache
def model_of(name: str) -> Model:
    return Model.from_hf(PUBLISHED[name].config, name)


def test_every_family_of_a_released_model_is_here() -> None:
    missing = set(families.table()) - {published.config["model_type"] for published in PUBLISHED.values()}
    assert missing == {"ministral", "ministral3", "mistral3"}  # their kin of the same sizes are here


def test_a_release_of_the_same_sizes_is_found_as_what_it_is_the_same_as() -> None:
    assert not SAME.keys() & PUBLISHED.keys()
    assert all(find(tuned) is PUBLISHED[base] for tuned, base in SAME.items())
    assert find("nobody/knows-it") is None


@every_model
def test_a_model_weighs_what_is_published(name: str) -> None:
    assert param.count(model_of(name).spec) == PUBLISHED[name].parameters


@every_model
@pytest.mark.slow
def test_a_model_weighs_what_transformers_makes_of_its_config(name: str) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    own = deepcopy(PUBLISHED[name].config)  # Transformers writes into what it is given
    fields = {key: value for key, value in own.items() if key not in ("model_type", "architectures")}
    config = transformers.AutoConfig.for_model(PUBLISHED[name].config["model_type"], **fields)
    with torch.device("meta"):
        twin = transformers.AutoModelForCausalLM.from_config(getattr(config, "text_config", config))
    stored = twin.state_dict()
    weights = [*twin.parameters(), *(buffer for key, buffer in twin.named_buffers() if key in stored)]
    assert sum(weight.numel() for weight in weights) == PUBLISHED[name].parameters


@every_model
def test_a_model_traces_without_memory(name: str) -> None:
    """Initialising it, and its log-probs."""
    model, here = model_of(name), mesh_lib.make(ModelKeys(), jax.devices()[:1])
    tokens_BT = np.zeros((1, 16), np.int32)
    row = Batch(tokens_BT, np.arange(16, dtype=np.int32)[None], tokens_BT + 1, tokens_BT + 1)
    key = jax.eval_shape(lambda: jax.random.key(0))
    params = jax.eval_shape(lambda key: param.initialise(model.spec, key, jnp.bfloat16, here), key)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == PUBLISHED[name].parameters
    scores = jax.eval_shape(lambda params: model.score(params, row, Compute()), params)
    assert scores.logp_BT.shape == (1, 16)


def meshes(name: str) -> dict[str, dict[str, int]]:
    """Return how eight devices could be laid out: every way that the model's heads and experts allow."""
    config = PUBLISHED[name].config
    config = config.get("text_config", config)
    ways = {"fsdp": {"fsdp": 8}}
    if config.get("num_attention_heads", 8) % 2 == 0:
        ways["fsdp x tensor"] = {"fsdp": 4, "tensor": 2}
    if {"num_experts", "num_local_experts", "n_routed_experts"} & config.keys():
        ways["fsdp x expert"] = {"fsdp": 2, "expert": 4}
        ways["fsdp x expert x tensor"] = {"fsdp": 2, "expert": 2, "tensor": 2}
    return ways


@pytest.mark.parametrize(("name", "way"), [(name, way) for name in PUBLISHED for way in meshes(name)])
def test_no_big_tensor_is_left_whole(name: str, way: str) -> None:
    """And the eight devices have an eighth of the model each, but for heads of keys that cannot be shared out."""
    sizes = meshes(name)[way]
    here = mesh_lib.make(ModelKeys(**{f"ici_{axis}_parallelism": size for axis, size in sizes.items()}))
    held = 0
    for path, weight in param.leaves(model_of(name).spec).items():
        mine = mesh_lib.sharding(weight.axes, weight.shape, here).shard_shape(weight.shape)
        held += math.prod(mine)
        if math.prod(weight.slice_shape) > BIG:
            ways = math.prod(weight.shape) // math.prod(mine)
            assert ways >= 8 // sizes.get("tensor", 1), f"{path} {weight.shape} is split {ways} ways by {sizes}"
    assert held <= UNEVEN * PUBLISHED[name].parameters / 8
