"""Our adapters against PEFT's on Transformers' models: logits and gradients."""

from __future__ import annotations

import functools
from typing import Any

import adapters as adapting
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from luthier.model import lora
from luthier.model.compute import Compute
from luthier.model.lora import Adapter
from luthier.model.model import Model
from luthier.types import Batch

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


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_log_probs_and_gradients_equal_pefts(kind: str, way: str) -> None:
    pytest.importorskip("peft")
    compare(tiny.KINDS[kind], WAYS[way])
