"""Latent attention against Transformers' layers, its absorbed form against the expanded one, and its weights."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_close

from luthier import mesh
from luthier.config import ModelKeys
from luthier.model import cache, layers, param, quant
from luthier.model.compute import Compute
from luthier.model.context import Here
from luthier.model.latent import Latent
from luthier.model.lora import Lora
from luthier.model.rope import Rope
from tiny import params_from_torch

SIZES = {"heads": 4, "kv_rank": 24, "nope_dim": 16, "rope_dim": 8, "value_dim": 12}
HIDDEN = 32
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "mscale": 0.8,
    "mscale_all_dim": 0.6,
}
LATENTS = {
    "v2-lite": Latent(q_rank=None, rope=Rope(interleaved=True), **SIZES),
    "v2-yarn": Latent(q_rank=20, rope=Rope.from_hf({"rope_scaling": YARN}, interleaved=True), **SIZES),
    "v3-yarn": Latent(q_rank=20, rope=Rope.from_hf({"rope_scaling": YARN}, interleaved=True), bias=True, **SIZES),
    "v3-halves": Latent(q_rank=20, rope=Rope.from_hf({"rope_scaling": YARN}), **SIZES),
}


def theirs(name: str):
    """Return Transformers' attention of ``LATENTS[name]``, with its rotary module, and random weights."""
    torch = pytest.importorskip("torch")
    latent = LATENTS[name]
    if name.startswith("v2"):
        from transformers.models.deepseek_v2 import modeling_deepseek_v2 as module

        config, classes = module.DeepseekV2Config, (module.DeepseekV2Attention, module.DeepseekV2RotaryEmbedding)
    else:
        from transformers.models.deepseek_v3 import modeling_deepseek_v3 as module

        config = functools.partial(module.DeepseekV3Config, rope_interleave=latent.rope.interleaved)
        classes = (module.DeepseekV3Attention, module.DeepseekV3RotaryEmbedding)
    config = config(
        hidden_size=HIDDEN,
        num_attention_heads=latent.heads,
        num_key_value_heads=latent.heads,
        q_lora_rank=latent.q_rank,
        kv_lora_rank=latent.kv_rank,
        qk_nope_head_dim=latent.nope_dim,
        qk_rope_head_dim=latent.rope_dim,
        v_head_dim=latent.value_dim,
        attention_bias=latent.bias,
        max_position_embeddings=64,
        rope_parameters=YARN.copy() if latent.rope.rope_type == "yarn" else None,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    attention, rotary = classes[0](config, 0), classes[1](config)
    with torch.no_grad():
        for weight in attention.parameters():
            weight.copy_((weight.ndim == 1) + 0.3 * torch.randn_like(weight))
    return attention, rotary


def here(latent: Latent, positions_BT, segments=None, past=None) -> Here:
    ropes = {latent.rope: layers.rope_tables(positions_BT, latent.rope, latent.rope_dim)}
    return Here(positions_BT, segments, Compute(), ropes, past)


def random_params(latent: Latent):
    device = mesh.make(ModelKeys(), jax.devices()[:1])
    return param.initialise(latent.spec(HIDDEN, "layer."), jax.random.key(0), jnp.float32, device, scale=0.3)


@functools.partial(jax.jit, static_argnums=0)
def applied(latent: Latent, params, x_BTD, positions_BT, segments=None):
    return latent.apply(params, x_BTD, here(latent, positions_BT, segments))[0]


def positions(rows: int, length: int):
    return jnp.tile(jnp.arange(length), (rows, 1))


@pytest.mark.parametrize("name", LATENTS)
def test_values_and_gradients_equal_transformers(name: str) -> None:
    torch = pytest.importorskip("torch")
    latent, (attention, rotary) = LATENTS[name], theirs(name)
    block = torch.nn.ModuleDict({"self_attn": attention})  # so that tensors are named as in a model
    params = params_from_torch(latent.spec(HIDDEN, ""), block)
    B, T = 2, 24
    x_BTD, direction_BTD = np.random.default_rng(0).normal(size=(2, B, T, HIDDEN)).astype(np.float32)

    def loss(params, x_BTD):
        out_BTD, _ = latent.apply(params, x_BTD, here(latent, positions(B, T)))
        return jnp.sum(out_BTD * direction_BTD), out_BTD

    (_, out_BTD), ours = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, x_BTD)
    x = torch.tensor(x_BTD, requires_grad=True)
    tables = rotary(x, torch.arange(T)[None].repeat(B, 1))
    mask = torch.full((T, T), -1e30).triu(1)[None, None]
    out, _ = attention(hidden_states=x, attention_mask=mask, position_embeddings=tables)
    (out * torch.from_numpy(direction_BTD)).sum().backward()
    assert_close(out_BTD, out.detach(), 1e-5)
    assert_close(ours[1], x.grad, 1e-5)
    with torch.no_grad():
        for weight in attention.parameters():
            weight.copy_(weight.grad)
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-5), ours[0], params_from_torch(latent.spec(HIDDEN, ""), block))


@pytest.mark.parametrize(
    ("name", "chunks"), [("v2-lite", (9, 5, 1, 1)), ("v3-yarn", (1,) * 6), ("v3-yarn", (140, 3, 1))]
)
def test_absorbed_through_a_cache_equals_expanded(name: str, chunks: tuple[int, ...]) -> None:
    """Each way of reading a text in chunks gives what reading it at once does."""
    latent, (whole, B) = LATENTS[name], (sum(chunks), 2)
    params = random_params(latent)
    x_BTD = jax.random.normal(jax.random.key(1), (B, whole, HIDDEN))
    expanded_BTD = applied(latent, params, x_BTD, positions(B, whole))
    lines = {"line": latent.line(1)}
    kept = cache.make(lines, B, whole, jnp.float32, mesh.make(ModelKeys(), jax.devices()[:1]))

    @jax.jit
    def step(x_BTD, past: cache.Past, counts_B):
        positions_BT = past.lengths_B[:, None] + jnp.arange(x_BTD.shape[1])
        out_BTD, fresh = latent.apply(params, x_BTD, here(latent, positions_BT, past=past.layer("line", jnp.int32(0))))
        stacked = jax.tree.map(lambda x: x[None], fresh)
        return out_BTD, cache.write(past, {"line": stacked}, counts_B)

    lengths_B = np.zeros(B, np.int32)
    for number, count in enumerate(chunks):
        # Of its first chunk the second row has one token less, which is padding there, and so lags behind.
        counts_B = np.array([count, count - (number == 0 and count > 1)], np.int32)
        chunk = np.zeros((B, count, HIDDEN), np.float32)
        for row in range(B):
            chunk[row, : counts_B[row]] = x_BTD[row, lengths_B[row] : lengths_B[row] + counts_B[row]]
        out_BTD, kept = step(chunk, cache.Past(kept, jnp.asarray(lengths_B)), counts_B)
        for row in range(B):
            wanted = expanded_BTD[row, lengths_B[row] : lengths_B[row] + counts_B[row]]
            assert_close(out_BTD[row, : counts_B[row]], wanted, 1e-5)
        lengths_B += counts_B


def adapted(declared: param.Param, weight: jax.Array) -> Lora:
    generator = np.random.default_rng(0)
    ends = ((8, weight.shape[0]), (weight[0].size, 8))
    return Lora(weight, *(jnp.asarray(0.3 * generator.normal(size=shape), jnp.float32) for shape in ends), scale=0.5)


def quantised(kind: str):
    return lambda declared, weight: jax.tree.map(jnp.asarray, quant.quantised(declared, np.asarray(weight), kind))


UP = {"array": lambda declared, weight: weight, "int8": quantised("int8"), "nf4": quantised("nf4"), "lora": adapted}


@pytest.mark.parametrize("kind", UP)
@pytest.mark.parametrize(("float32", "tolerance"), [("none", 1e-2), ("attention", 1e-5)])
def test_in_bf16_both_forms_multiply_by_the_same_weights(kind: str, float32: str, tolerance: float) -> None:
    """Weights are rounded alike in both, those too that are computed on the way; so what is kept in fp32 agrees."""
    latent = Latent(4, None, 64, 32, 16, 32, Rope(interleaved=True))
    compute, (B, T) = Compute(jnp.bfloat16, float32=float32), (2, 24)
    device = mesh.make(ModelKeys(), jax.devices()[:1])
    with mesh.use(device):
        spec = latent.spec(128, "layer.")
        params = param.initialise(spec, jax.random.key(0), jnp.float32, device, scale=0.3)
        params |= {name: UP[kind](spec[name], params[name]) for name in ("k_up", "v_up")}
        x_BTD = jax.random.normal(jax.random.key(1), (B, T, 128)).astype(compute.attention_dtype)
        kept = cache.make({"line": latent.line(1)}, B, T, compute.cached("auto"), device)

        @jax.jit
        def both(params, x_BTD, kept):
            around = dataclasses.replace(here(latent, positions(B, T)), compute=compute)
            past = cache.Past(kept, jnp.zeros(B, jnp.int32)).layer("line", jnp.int32(0))
            return [latent.apply(params, x_BTD, dataclasses.replace(around, past=each))[0] for each in (None, past)]

        expanded_BTD, absorbed_BTD = (np.asarray(out, np.float32) for out in both(params, x_BTD, kept))
    assert np.linalg.norm(expanded_BTD - absorbed_BTD) <= tolerance * np.linalg.norm(expanded_BTD)


def test_a_token_costs_its_small_vector_and_one_key() -> None:
    line = LATENTS["v3-yarn"].line(3)
    assert cache.row_bytes({"line": line}, 10, jnp.float32) == 3 * 10 * (24 + 8) * 4


def test_segments_do_not_see_each_other() -> None:
    latent = LATENTS["v2-yarn"]
    params, x_BTD = random_params(latent), jax.random.normal(jax.random.key(1), (1, 11, HIDDEN))
    segments_BT, positions_BT = jnp.array([[1] * 6 + [2] * 5]), jnp.array([[*range(6), *range(5)]])
    packed_BTD = applied(latent, params, x_BTD, positions_BT, segments_BT)
    assert_close(packed_BTD[:, 6:], applied(latent, params, x_BTD[:, 6:], positions(1, 5)))


def test_weights_go_back_into_the_tensors_they_came_from() -> None:
    torch = pytest.importorskip("torch")
    block = torch.nn.ModuleDict({"self_attn": theirs("v3-yarn")[0]})
    spec = LATENTS["v3-yarn"].spec(HIDDEN, "")
    params = params_from_torch(spec, block)
    tensors = {name: np.zeros(shape, np.float32) for name, shape in param.tensor_shapes(spec).items()}
    for path, one in param.leaves(spec).items():
        for name, place in one.tensors().items():
            one.into_tensor(np.asarray(params[path])[place], tensors[name])
    assert set(tensors) == {name for name, _ in block.named_parameters()}
    for name, weight in block.named_parameters():
        np.testing.assert_array_equal(tensors[name], weight.detach().numpy())
