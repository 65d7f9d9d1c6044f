"""Our adapters against PEFT's on Transformers' models: logits and gradients."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import adapters as adapting
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_close
from family_variants import ONE_EACH, VARIANTS

import tiny
from luthier import mesh as mesh_lib
from luthier.config import ModelKeys
from luthier.model import lora, param
from luthier.model.compute import Compute
from luthier.model.lora import Adapter
from luthier.model.model import Model
from luthier.types import Batch

pytest.importorskip("peft")

TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-3
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

PLAIN = Adapter(4, 8.0)
WAYS = {
    "lora": PLAIN,
    "rslora": Adapter(4, 8.0, rslora=True),
    "dora": Adapter(4, 8.0, dora=True, targets=r".*layers\.\d+\.(?!mlp\.experts\.).*"),
}


@functools.cache
def row() -> Batch:
    """One text: what PEFT does to a token depends on nothing but its hidden state."""
    tokens_BT = np.random.default_rng(0).integers(0, 256, (2, 24), dtype=np.int32)
    ones_BT = np.ones_like(tokens_BT)
    positions_BT = np.broadcast_to(np.arange(24, dtype=np.int32), tokens_BT.shape)
    return Batch(tokens_BT, positions_BT, ones_BT, ones_BT)


def theirs(adapted: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return PEFT's log-probs ``[B, T, V]``, and the gradient of a loss by its adapters' names in memory."""
    import torch

    ids = torch.from_numpy(row().tokens_BT.astype(np.int64))
    adapted.eval()
    logp_BTV = torch.log_softmax(adapted(ids).logits, -1)
    (-logp_BTV[:, :-1].gather(2, ids[:, 1:, None]).mean()).backward()
    gradients = {name: weight.grad.numpy() for name, weight in adapted.named_parameters() if weight.grad is not None}
    return logp_BTV.detach().numpy(), gradients


def ours(model: Model, base: Any, adapter: Adapter, adapters: Any) -> tuple[np.ndarray, Any]:
    """Return our log-probs, and the gradient of the same loss by the adapters."""
    tokens_BT = row().tokens_BT

    def loss(adapters: Any) -> Any:
        logits_BTV = model.logits(lora.attach(model.spec, base, adapter, adapters), row(), Compute())
        logp_BTV = jax.nn.log_softmax(logits_BTV)
        return -jnp.mean(jnp.take_along_axis(logp_BTV[:, :-1], tokens_BT[:, 1:, None], axis=2)), logp_BTV

    (_, logp_BTV), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)(adapters)
    return np.asarray(logp_BTV), gradient


def compare(config: dict[str, Any], adapter: Adapter) -> None:
    twin = tiny.torch_twin(config)
    model = Model.from_hf(config, "tiny")
    base = tiny.params_from_torch(model.spec, twin)
    adapters = adapting.random_adapters(model, adapter)
    their_logp, their_gradients = theirs(adapting.peft_twin(twin, model, adapter, adapters))
    our_logp, gradient = ours(model, base, adapter, adapters)
    np.testing.assert_allclose(our_logp, their_logp, atol=TOLERANCE, rtol=0)
    our_gradients = adapting.tensors_of(lora.spec(model.spec, adapter), gradient)
    assert {adapting.in_memory(name) for name in our_gradients} == their_gradients.keys()
    for name, tensor in our_gradients.items():
        wanted = their_gradients[adapting.in_memory(name)]
        np.testing.assert_allclose(tensor, wanted, atol=GRADIENT_TOLERANCE * np.abs(wanted).max(), rtol=0, err_msg=name)


# Each kind's weights once, and each way once where it differs, with the fast tests.
FIRST = {("llama", "rslora"), ("llama", "dora"), ("deepseek-v3", "lora")}


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        (kind, way) if (kind, way) in FIRST else pytest.param(kind, way, marks=pytest.mark.slow)
        for kind in tiny.KINDS
        for way in WAYS
    ],
)
def test_log_probs_and_gradients_equal_pefts(kind: str, way: str) -> None:
    compare(tiny.KINDS[kind], WAYS[way])


# One variant of each family, and DoRA where several weights lie in one module or experts beside them.
SLOW = [*((name, "lora") for name in ONE_EACH), ("phi3", "dora"), ("gpt-oss", "dora"), ("deepseek-v2-lite", "dora")]


@pytest.mark.parametrize(
    ("name", "way"),
    [
        pytest.param(name, way, marks=pytest.mark.slow if (name, way) in SLOW else pytest.mark.exhaustive)
        for name in VARIANTS
        if not name.endswith("-old")
        for way in ("lora", "dora")
    ],
)
def test_every_familys_variants_equal_pefts(name: str, way: str) -> None:
    compare(VARIANTS[name].config, WAYS[way])


@pytest.mark.parametrize("kind", ["llama", "deepseek-v3", pytest.param("gpt-oss", marks=pytest.mark.slow)])
def test_tensors_are_named_and_shaped_as_in_pefts_file(kind: str, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    config = tiny.KINDS[kind] if kind in tiny.KINDS else VARIANTS[kind].config
    model = Model.from_hf(config, kind)
    for way in ("lora", "dora"):
        adapted = adapting.peft_twin(tiny.torch_twin(config), model, WAYS[way])
        adapted.save_pretrained(tmp_path / way)
        saved = load_file(tmp_path / way / "adapter_model.safetensors")
        declared = param.tensor_shapes(lora.spec(model.spec, WAYS[way]))
        assert {name: tensor.shape for name, tensor in saved.items()} == declared


@pytest.mark.slow
def test_pissa_begins_as_pefts() -> None:
    """The adapter's product is PEFT's; its factors may differ in sign."""
    adapter = Adapter(4, 8.0, targets=("q_proj",), init="pissa")
    twin = tiny.torch_twin(tiny.KINDS["llama"])
    model = tiny.kind_model("llama")
    base = tiny.params_from_torch(model.spec, twin)
    here = mesh_lib.make(ModelKeys(), jax.devices()[:1])
    ours = lora.initialise(model.spec, base, adapter, jax.random.key(0), here)["layers"]["0"]["attention"]["q_proj"]
    state = adapting.peft_twin(twin, model, adapter, init_lora_weights="pissa").state_dict()
    for layer in range(3):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        a, b = (state[f"{name}.lora_{letter}.default.weight"].numpy() for letter in "AB")
        assert_close(ours["b"][layer] @ ours["a"][layer], b @ a, 1e-2)
