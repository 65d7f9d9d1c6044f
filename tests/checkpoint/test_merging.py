"""Adapters merged into their base as it is read: against PEFT's merge_and_unload."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from folders import keys, one_device, tiny_tokenizer, write_folder
from peft_models import ADAPTERS, CASES, CONFIGS, write_adapter, write_base

from luthier.checkpoint import huggingface, merging, peft
from luthier.checkpoint import tokenizer as tokenizer_lib
from luthier.checkpoint.source import merge, resolve
from luthier.errors import UserError
from luthier.model import lora
from luthier.model.compute import Compute
from luthier.model.model import Model
from tiny import make_batch, stored_tensors

pytest.importorskip("torch", reason="PEFT needs torch")


def pair(tmp_path, name, **more):
    kind, told = ADAPTERS[name]
    theirs = write_adapter(tmp_path / "adapter", write_base(tmp_path / "base", CONFIGS[kind]), **told, **more)
    return theirs, resolve(keys(tmp_path / "adapter", model_name=str(tmp_path / "base")))


@pytest.mark.parametrize("name", CASES)
def test_what_is_read_of_an_adapter_is_pefts_merged_model(tmp_path, name):
    theirs, source = pair(tmp_path, name)
    wanted = stored_tensors(theirs.merge_and_unload())
    base = resolve(keys(tmp_path / "base")).tensors
    changed = 0
    assert source.tensors.keys() == base.keys()
    for tensor, stored in source.tensors.items():
        found = stored.read()
        assert found.dtype == base[tensor].dtype
        np.testing.assert_allclose(found, wanted[tensor], atol=2e-6, rtol=2e-6, err_msg=tensor)
        changed += not np.array_equal(found, base[tensor].read())
    assert changed


def test_a_merged_model_is_the_adapted_one(tmp_path):
    for name in ("dora", "experts"):
        _, source = pair(tmp_path / name, name)
        model, batch = Model.from_hf(source.config, name), make_batch(2, 16)
        base = huggingface.load(resolve(keys(tmp_path / name / "base")), model.spec, jnp.float32, one_device())
        adapter = peft.read_config(tmp_path / name / "adapter")
        weights = peft.load(tmp_path / name / "adapter", lora.spec(model.spec, adapter), one_device())
        merged = huggingface.load(source, model.spec, jnp.float32, one_device())
        adapted = lora.attach(model.spec, base, adapter, weights)
        run = jax.jit(lambda params, model=model, batch=batch: model.logits(params, batch, Compute()))
        np.testing.assert_allclose(run(merged), run(adapted), atol=1e-4, rtol=0)
        assert np.abs(run(merged) - run(base)).max() > 1e-2


def test_the_base_that_an_adapters_config_names_is_found(tmp_path):
    pair(tmp_path, "lora")
    path = tmp_path / "adapter" / peft.CONFIG
    config = json.loads(path.read_text())
    for named in (str(tmp_path / "base"), "../base"):
        path.write_text(json.dumps(config | {"base_model_name_or_path": named}))
        source = resolve(keys(tmp_path / "adapter"))
        assert source.path.resolve() == tmp_path / "base"
        assert source.adapter == tmp_path / "adapter"
        assert source.name == str(tmp_path / "adapter")


def test_a_run_that_trained_an_adapter_is_one(tmp_path):
    pair(tmp_path, "lora")
    (tmp_path / "run").mkdir()
    (tmp_path / "adapter").rename(tmp_path / "run" / "adapter")
    source = resolve(keys(tmp_path / "run", model_name=str(tmp_path / "base")))
    assert source.adapter == tmp_path / "run" / "adapter"
    assert merge(resolve(keys(tmp_path / "base")), str(tmp_path / "run")).adapter == source.adapter


def test_a_merge_into_sixteen_bits_rounds_once(tmp_path):
    theirs, _ = pair(tmp_path, "lora")
    base = {name: value.astype(ml_dtypes.bfloat16) for name, value in stored_tensors(theirs.unload()).items()}
    write_folder(tmp_path / "half", CONFIGS["llama"], base)
    source = resolve(keys(tmp_path / "adapter", model_name=str(tmp_path / "half")))
    name = "model.layers.1.self_attn.q_proj.weight"
    exact, rounded = source.exact_tensors[name].read(), source.tensors[name].read()
    assert (exact.dtype, rounded.dtype) == (np.float32, ml_dtypes.bfloat16)
    np.testing.assert_array_equal(exact.astype(ml_dtypes.bfloat16), rounded)
    parts = {
        side: tensor.read()
        for side, tensor in peft.read_tensors(tmp_path / "adapter").items()
        if "1.self_attn.q" in side
    }
    b, a = (next(value for side, value in parts.items() if which in side) for which in ("lora_B", "lora_A"))
    np.testing.assert_allclose(exact, base[name].astype(np.float32) + 7 / 4 * (b @ a), atol=1e-6)
    untouched = "model.layers.1.mlp.up_proj.weight"
    assert source.exact_tensors[untouched].dtype == ml_dtypes.bfloat16


def test_one_layers_adapter_is_read_once_for_all_its_experts(tmp_path, monkeypatch):
    _, source = pair(tmp_path, "experts")
    calls, original = [], merging._factors
    monkeypatch.setattr(merging, "_factors", lambda *given: calls.append(given[2:]) or original(*given))
    for tensor in source.tensors.values():
        tensor.read()
    assert len(calls) == 4  # two targets in each of two layers, of eight experts


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_model_name_or_path": None}, "names no base. Set model_name to the model it adapts"),
        ({"base_model_name_or_path": "./gone"}, r"an adapter of \./gone, which cannot be read"),
    ],
)
def test_an_adapter_without_its_base_is_refused(tmp_path, change, message):
    pair(tmp_path, "lora")
    path = tmp_path / "adapter" / peft.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        resolve(keys(tmp_path / "adapter"))


def test_the_tokenizer_that_came_with_an_adapter_is_taken(tmp_path):
    _, source = pair(tmp_path, "lora")
    assert tokenizer_lib.load(source).chat_template == tiny_tokenizer().chat_template
    tokenizer_lib.save(tiny_tokenizer(), tmp_path / "adapter", chat_template="{{ 'mine' }}")
    assert tokenizer_lib.load(source).chat_template == "{{ 'mine' }}"


def test_adapters_are_not_stacked(tmp_path):
    _, source = pair(tmp_path, "lora")
    with pytest.raises(UserError, match=r"is an adapter itself. Merge that one first \(`luthier convert`\)"):
        merge(source, str(tmp_path / "adapter"))


def test_an_adapter_of_another_model_is_refused_by_its_tensors(tmp_path):
    pair(tmp_path, "lora")
    write_base(tmp_path / "other", CONFIGS["llama"] | {"num_hidden_layers": 3})
    source = resolve(keys(tmp_path / "adapter", model_name=str(tmp_path / "other")))
    with pytest.raises(UserError, match=r"4 tensors of the adapter do not fit the model:\n  missing: .*layers\.2\."):
        _ = source.tensors
