"""Weights and adapters by the names that vLLM loads them by."""

from __future__ import annotations

import json
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load, load_file

import tiny
from luthier import mesh as mesh_lib
from luthier.checkpoint import huggingface, peft
from luthier.checkpoint.source import resolve
from luthier.config import ModelKeys
from luthier.errors import UserError
from luthier.model import lora, param, quant
from luthier.model.lora import Adapter
from luthier.model.model import Model
from luthier.rollout.vllm import adapters, named

ADAPTER = Adapter(rank=3, alpha=6.0, targets=("q_proj", "down_proj"))


def opened(folder, kind, devices=1, quantization="", **sizes):
    """Write a tiny model and return (source, spec, its mesh, its weights)."""
    tiny.write_model(folder, kind)
    keys = ModelKeys(load_parameters_path=str(folder), **sizes)
    source = resolve(keys)
    spec = Model.from_hf(source.config, "tiny").spec
    mesh = mesh_lib.make(keys, jax.devices()[:devices])
    return source, spec, mesh, huggingface.load(source, spec, jnp.float32, mesh, (), quantization)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_every_tensor_of_the_checkpoint_is_sent_as_it_is(tmp_path, kind):
    _, spec, _, params = opened(tmp_path, kind)
    sent = dict(named.full(spec, np.float32)(params))
    stored = load_file(tmp_path / "model.safetensors")
    assert sent.keys() == stored.keys()
    assert all(sent[name].tobytes() == value.tobytes() for name, value in stored.items())


def test_sharded_weights_are_gathered_one_at_a_time(tmp_path):
    if jax.device_count() < 4:
        pytest.skip("needs four devices")
    _, spec, _, params = opened(tmp_path, "llama", 4, ici_fsdp_parallelism=2, ici_tensor_parallelism=2)
    tensors = named.full(spec, jnp.bfloat16)(params)
    stored = load_file(tmp_path / "model.safetensors")
    for name, value in tensors:
        assert value.tobytes() == stored[name].astype(ml_dtypes.bfloat16).tobytes(), name


def test_layers_come_one_after_another(tmp_path):
    _, spec, _, params = opened(tmp_path, "qwen3-moe")
    names = [name for name, _ in named.full(spec, np.float32)(params)]
    layers = [int(found[1]) for name in names if (found := re.search(r"layers\.(\d+)\.", name))]
    assert layers == sorted(layers)
    assert len(set(layers)) == 3
    assert named._place("a.10.b") > named._place("a.9.b")


def test_what_has_to_be_exact_stays_fp32(tmp_path):
    _, spec, _, params = opened(tmp_path, "deepseek-v3")
    exact = {name for each in param.leaves(spec).values() if each.exact for name in each.tensors()}
    assert exact
    for name, value in named.full(spec, jnp.bfloat16)(params):
        assert value.dtype == (np.float32 if name in exact else ml_dtypes.bfloat16), name


@pytest.mark.parametrize(("kind", "quantization"), [("llama", "nf4"), ("qwen3-moe", "int8")])
def test_a_quantised_weight_is_sent_as_what_it_stands_for(tmp_path, kind, quantization):
    _, spec, mesh, params = opened(tmp_path, kind, quantization=quantization)

    def floats(weight):
        return weight.materialised(jnp.float32) if quant.kind(weight) else weight

    whole = jax.tree.map(floats, params, is_leaf=quant.is_quantised)
    wanted = dict(named.full(spec, np.float32)(jax.device_put(whole, param.shardings(spec, mesh))))
    with mesh_lib.use(mesh):
        sent = dict(named.full(spec, np.float32)(params))
    assert any(quant.kind(weight) for weight in jax.tree.leaves(params, is_leaf=quant.is_quantised))
    for name, value in wanted.items():
        np.testing.assert_allclose(sent[name], value, rtol=1e-5, atol=1e-7, err_msg=name)  # compiled, and not


def adapted(spec, mesh):
    """Return (the spec of an adapter, its weights, the same of another seed)."""
    own = lora.spec(spec, ADAPTER)
    return own, *(jax.device_put(tiny.random_params(own, seed), param.shardings(own, mesh)) for seed in (1, 2))


def test_an_adapted_weight_is_sent_as_its_base(tmp_path):
    _, spec, mesh, params = opened(tmp_path, "llama")
    attached = lora.attach(spec, params, ADAPTER, adapted(spec, mesh)[1])
    both = zip(named.full(spec, np.float32)(attached), named.full(spec, np.float32)(params), strict=True)
    assert all(
        one == other and np.array_equal(*values) for (one, other), values in (zip(*pair, strict=True) for pair in both)
    )


@pytest.mark.parametrize("pissa", [False, True])
def test_an_adapters_files_are_those_that_are_saved(tmp_path, pissa):
    source, spec, mesh, _ = opened(tmp_path / "base", "llama")
    own, weights, first = adapted(spec, mesh)
    origin = first if pissa else None
    files = adapters.files(own, ADAPTER, source)(weights, origin)
    peft.save(tmp_path / "saved", weights, own, ADAPTER, source, tiny.tokenizer(), origin=origin)
    assert json.loads(files[peft.CONFIG]) == json.loads((tmp_path / "saved" / peft.CONFIG).read_text())
    stored = load_file(tmp_path / "saved" / peft.WEIGHTS)
    sent = load(files[peft.WEIGHTS])
    assert sent.keys() == stored.keys()
    assert all(np.array_equal(sent[name], value) for name, value in stored.items())


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [("llama", {"dora": True}, "DoRA"), ("llama", {"rank": 600}, "lora_rank=600"), ("qwen3-moe", {}, "experts")],
)
def test_an_adapter_that_vllm_cannot_serve_is_refused(kind, settings, message):
    adapter = Adapter(**{"rank": 4, "alpha": 4.0, **settings})
    with pytest.raises(UserError, match=message):
        adapters.check(tiny.kind_model(kind).spec, adapter)


@pytest.mark.parametrize(("rank", "init", "room"), [(1, "default", 1), (4, "default", 8), (16, "pissa", 32)])
def test_room_for_an_adapter(rank, init, room):
    adapter = Adapter(rank=rank, alpha=4.0, init=init)
    adapters.check(tiny.kind_model("llama").spec, adapter)
    assert adapters.room(adapter) == room
