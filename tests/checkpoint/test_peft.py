"""Adapters in PEFT's layout: read, saved again bit for bit, loaded by PEFT, and refused by name."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from folders import keys, one_device, stored, tiny_tokenizer
from peft_models import ADAPTERS, CASES, CONFIGS, write_adapter, write_base

from luthier.checkpoint import huggingface, peft, tensors
from luthier.checkpoint.source import adapter_folder, resolve
from luthier.errors import UserError
from luthier.model import lora
from luthier.model.compute import Compute
from luthier.model.model import Model
from luthier.types import Batch

pytest.importorskip("torch", reason="PEFT needs torch")


def raw(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


def values(folder):
    return {name: tensor.read() for name, tensor in tensors.read_safetensors(folder / peft.WEIGHTS).items()}


def loaded(base, folder):
    """Return (source, model, adapter, its spec, its weights)."""
    source = resolve(keys(base))
    model = Model.from_hf(source.config, source.name)
    adapter = peft.read_config(folder)
    spec = lora.spec(model.spec, adapter)
    return source, model, adapter, spec, peft.load(folder, spec, one_device())


@pytest.mark.parametrize("name", CASES)
def test_pefts_adapter_is_saved_again_bit_for_bit(tmp_path, name):
    kind, told = ADAPTERS[name]
    write_adapter(tmp_path / "theirs", write_base(tmp_path / "base", CONFIGS[kind]), **told)
    source, _, adapter, spec, weights = loaded(tmp_path / "base", tmp_path / "theirs")
    peft.save(tmp_path / "ours", weights, spec, adapter, source, tiny_tokenizer())
    theirs, ours = values(tmp_path / "theirs"), values(tmp_path / "ours")
    assert ours.keys() == theirs.keys()
    for tensor, value in theirs.items():
        assert ours[tensor].tobytes() == value.tobytes(), tensor
    assert peft.read_config(tmp_path / "ours") == adapter or name in ("regex", "regex-and-experts", "multimodal")
    given, written = (json.loads((tmp_path / side / peft.CONFIG).read_text()) for side in ("theirs", "ours"))
    compared = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "peft_type", "task_type", "bias")
    assert {key: written[key] for key in compared} == {key: given[key] for key in compared}
    assert written["base_model_name_or_path"] == str(tmp_path / "base")


@pytest.mark.parametrize("name", CASES)
def test_peft_loads_what_we_save_and_computes_the_same(tmp_path, name):
    import torch
    from peft import PeftModel

    kind, told = ADAPTERS[name]
    theirs = write_adapter(tmp_path / "theirs", write_base(tmp_path / "base", CONFIGS[kind]), **told)
    source, _, adapter, spec, weights = loaded(tmp_path / "base", tmp_path / "theirs")
    peft.save(tmp_path / "ours", weights, spec, adapter, source, tiny_tokenizer())
    tokens_BT = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 16)))
    with torch.no_grad():
        wanted = theirs(tokens_BT).logits
        plain = theirs.unload()
        found = PeftModel.from_pretrained(plain, tmp_path / "ours").eval()(tokens_BT).logits
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", CASES)
def test_our_model_computes_what_pefts_does(tmp_path, name):
    import torch

    kind, told = ADAPTERS[name]
    theirs = write_adapter(tmp_path / "theirs", write_base(tmp_path / "base", CONFIGS[kind]), **told)
    source, model, adapter, _, weights = loaded(tmp_path / "base", tmp_path / "theirs")
    base = huggingface.load(source, model.spec, jnp.float32, one_device(), model.config.ignored)
    params = lora.attach(model.spec, base, adapter, weights)
    tokens_BT = np.random.default_rng(0).integers(0, 256, (2, 16), dtype=np.int32)
    ones_BT = np.ones_like(tokens_BT)
    batch = Batch(tokens_BT, np.broadcast_to(np.arange(16, dtype=np.int32), (2, 16)), ones_BT, ones_BT)
    ours = jax.jit(lambda params: jax.nn.log_softmax(model.logits(params, batch, Compute())))(params)
    with torch.no_grad():
        wanted = torch.log_softmax(theirs(torch.from_numpy(tokens_BT).long()).logits, -1).numpy()
        plain = torch.log_softmax(theirs.unload()(torch.from_numpy(tokens_BT).long()).logits, -1).numpy()
    np.testing.assert_allclose(ours, wanted, atol=1e-4, rtol=0)
    assert np.abs(wanted - plain).max() > 1e-2


def test_pissa_is_saved_as_an_adapter_of_the_unchanged_base(tmp_path):
    kind, told = ADAPTERS["rslora"]
    write_adapter(tmp_path / "theirs", write_base(tmp_path / "base", CONFIGS[kind]), **told)
    source, model, adapter, spec, weights = loaded(tmp_path / "base", tmp_path / "theirs")
    origin = jax.tree.map(lambda array: array + 0.25, weights)
    peft.save(tmp_path / "ours", weights, spec, adapter, source, tiny_tokenizer(), origin=origin)
    _, _, twice, _, both = loaded(tmp_path / "base", tmp_path / "ours")
    assert (twice.rank, twice.scale, twice.rslora) == (8, pytest.approx(adapter.scale), True)
    for name, now in weights["layers"].items():
        for module, own in now["attention"].items():
            first, found = origin["layers"][name]["attention"][module], both["layers"][name]["attention"][module]
            wanted = own["b"] @ own["a"] - first["b"] @ first["a"]
            np.testing.assert_allclose(found["b"] @ found["a"], wanted, atol=1e-5)
    assert lora.units(model.spec, twice)


def test_files_of_other_versions_and_types_are_read(tmp_path):
    kind, told = ADAPTERS["dora"]
    write_adapter(tmp_path / "theirs", write_base(tmp_path / "base", CONFIGS[kind]), **told)
    *_, spec, weights = loaded(tmp_path / "base", tmp_path / "theirs")
    given, renamed = values(tmp_path / "theirs"), {}
    for number, (name, value) in enumerate(given.items()):
        half = value.astype(ml_dtypes.bfloat16)
        if name.endswith("vector"):
            name += ".default.weight" if number % 2 else ".weight"
        name = name.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.my-own.")
        renamed[name.removeprefix("base_model.model.") if number % 3 else name] = stored(half)
    tensors.write_safetensors(tmp_path / "theirs" / peft.WEIGHTS, renamed)
    found = peft.load(tmp_path / "theirs", spec, one_device())
    halves = jax.tree.map(lambda array: array.astype(jnp.bfloat16).astype(jnp.float32), weights)
    jax.tree.map(np.testing.assert_array_equal, found, halves)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type=IA3 is not supported. LORA is"),
        ({"bias": "all"}, r'bias="all" is not supported. Merge the adapter with PEFT \(merge_and_unload\)'),
        ({"modules_to_save": ["lm_head"]}, r'modules_to_save=\["lm_head"\] is not supported'),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern=.* is not supported"),
        ({"layers_to_transform": [0]}, "layers_to_transform=.* is not supported"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=true is not supported"),
        (
            {"init_lora_weights": "pissa_niter_16"},
            "changes the base's weights.*path_initial_model_for_weight_conversion",
        ),
        ({"target_parameters": ["gate.weight"]}, "target_parameters names gate.weight, which is not supported"),
        ({"r": 0}, "r=0 is no positive number"),
        ({"lora_alpha": None}, "lora_alpha=null is no positive number"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path, change, message):
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": r".*q_proj"}
    (tmp_path / peft.CONFIG).write_text(json.dumps(config))
    assert peft.read_config(tmp_path) == lora.Adapter(4, 8.0, targets=r".*q_proj")
    (tmp_path / peft.CONFIG).write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=message):
        peft.read_config(tmp_path)


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no adapter_config.json there. Give a folder in PEFT's layout"):
        adapter_folder(str(tmp_path), "lora_path")
    with pytest.raises(UserError, match=r"lora_path=\./gone: no such folder"):
        adapter_folder("./gone", "lora_path")
    (tmp_path / peft.CONFIG).write_text("[")
    with pytest.raises(UserError, match="not valid JSON"):
        peft.read_config(tmp_path)
    (tmp_path / peft.CONFIG).write_text(
        json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q"]})
    )
    (tmp_path / "adapter_model.bin").touch()
    with pytest.raises(UserError, match=r"no adapter_model.safetensors. adapter_model.bin is a pickle"):
        peft.read_config(tmp_path)


def test_names_that_the_model_has_not_are_passed_over_as_peft_does(tmp_path):
    kind, _ = ADAPTERS["lora"]
    model = write_base(tmp_path / "base", CONFIGS[kind])
    write_adapter(tmp_path / "theirs", model, target_modules=["q_proj", "c_attn", "w1"])
    assert peft.read_config(tmp_path / "theirs").targets == ("q_proj",)
