"""What XLA made of a train step on a CPU: no matmul may miss the fast kernels.

A product whose operands come in the wrong layout still gives the right numbers, only twenty times slower, so no other
test would notice. XLA marks what it hands to its kernel library as a custom fusion; a ``dot`` anywhere else is slow.
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from luthier import mesh
from luthier.config import ModelKeys
from luthier.data.groups import Layout, pack
from luthier.model import param
from luthier.model.compute import Compute, fast_dtype
from luthier.model.model import Model
from luthier.types import Batch, PolicyBatch, Trajectory
from tiny import TINY

CONFIG = TINY | {"num_hidden_layers": 2, "hidden_size": 192, "intermediate_size": 512, "vocab_size": 1024}
HEADS = {"num_attention_heads": 3, "num_key_value_heads": 1, "tie_word_embeddings": True}
DTYPES = sorted({jnp.dtype(jnp.float32).name, jnp.dtype(fast_dtype()).name})


def slow_matmuls(hlo: str) -> list[str]:
    """Return the ``dot`` instructions of optimised HLO that lie outside the computations of custom fusions."""
    fast = set(re.findall(r"kind=kCustom, calls=%([\w.\-]+)", hlo))
    slow, computation = [], ""
    for line in hlo.splitlines():
        header = re.match(r"(?:ENTRY )?%([\w.\-]+) .*\{$", line)
        if header:
            computation = header[1]
        elif " dot(" in line and computation not in fast:
            slow.append(f"{computation}: {line.strip()}")
    return slow


def gradient_hlo(dtype: str, *, linear: bool, remat: str) -> str:
    """Return the optimised HLO of loss and gradient on one CPU device."""
    model = Model.from_hf(CONFIG | HEADS, "compiled step")
    ids_BT = jnp.zeros((2, 256), jnp.int32)
    batch = Batch(ids_BT, ids_BT, ids_BT, ids_BT)
    compute = Compute(dtype=jnp.dtype(dtype), remat=remat)

    def loss(params, batch: Batch):
        mask_BT = batch.mask_BT.astype(jnp.float32)
        scores = model.score(params, batch, compute, mask_BT if linear else None)
        return -jnp.sum(scores.logp_BT * mask_BT)

    with mesh.use(mesh.make(ModelKeys(), jax.devices()[:1])) as one:
        params = param.abstract(model.spec, jnp.float32, one)
        return jax.jit(jax.value_and_grad(loss)).lower(params, batch).compile().as_text()


def policy_hlo(dtype: str) -> str:
    """Return the optimised HLO of a policy's gradient on one CPU device, prompts shared and entropies asked for."""
    model, compute = Model.from_hf(CONFIG | HEADS, "compiled step"), Compute(dtype=jnp.dtype(dtype))
    token = np.zeros(32, np.int32)
    one = Trajectory(token, token, token == 0, *np.zeros((2, 32), np.float32), None, 1.0)
    batch = pack([one], Layout(rows=2, row_length=256, scored=224, sequences=7, completion_length=32))[0].batch

    def loss(params, batch: PolicyBatch):
        scores = model.score_tokens(params, batch, compute, temperature=0.9, entropy=True)
        return jnp.sum(jnp.square(scores.logp_BT) + scores.entropy_BT)

    with mesh.use(mesh.make(ModelKeys(), jax.devices()[:1])) as device:
        params = param.abstract(model.spec, jnp.float32, device)
        return jax.jit(jax.value_and_grad(loss)).lower(params, batch).compile().as_text()


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_matmul_of_a_policy_step_is_slow(dtype: str) -> None:
    hlo = policy_hlo(dtype)
    assert hlo.count(" dot(") >= 30
    assert slow_matmuls(hlo) == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("linear", "remat"), [(True, "dots"), (False, "full")])
def test_no_matmul_of_a_train_step_is_slow(dtype: str, linear: bool, remat: str) -> None:
    hlo = gradient_hlo(dtype, linear=linear, remat=remat)
    assert hlo.count(" dot(") >= 30  # forward, backward, attention's blocks
    assert slow_matmuls(hlo) == []


def test_a_slow_matmul_is_seen() -> None:
    x = np.ones((64, 64), np.int32)  # no fast kernel takes whole numbers
    assert slow_matmuls(jax.jit(lambda x: x @ x).lower(x).compile().as_text())
