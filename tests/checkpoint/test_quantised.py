import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from folders import keys, one_device, random_tensors, spec_of, stored, tiny_tokenizer, write_folder

from luthier.checkpoint import huggingface, quantised, tensors
from luthier.checkpoint.source import resolve
from luthier.errors import UserError
from tiny import TINY

BF16 = np.dtype(ml_dtypes.bfloat16)
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}


def torch_of(values):
    """The same bits in torch, which numpy does not know these types of."""
    torch = pytest.importorskip("torch", reason="Transformers dequantises with torch")
    types = {BF16: torch.bfloat16, np.dtype(ml_dtypes.float8_e4m3fn): torch.float8_e4m3fn}
    if values.dtype in types:
        bits = values.view(f"i{values.dtype.itemsize}")
        return torch.from_numpy(bits).view(types[values.dtype])
    return torch.from_numpy(values)


def same_bits(found, theirs):
    torch = pytest.importorskip("torch")
    assert found.dtype == BF16
    assert theirs.dtype == torch.bfloat16
    assert found.shape == tuple(theirs.shape)
    np.testing.assert_array_equal(found.view(np.int16), theirs.contiguous().view(torch.int16).numpy())


def fp8(shape, grid, seed=0):
    random = np.random.default_rng(seed)
    values = (random.standard_normal(shape) * 100).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn)
    return values, (random.random(grid, np.float32) * 1e-3 + 1e-5).astype(np.float32)


def read(found, method, tmp_path):
    config = {"quantization_config": method}
    return quantised.as_floats({name: stored(value) for name, value in found.items()}, config, tmp_path)


@pytest.mark.parametrize(
    ("shape", "grid", "block"),
    [
        ((256, 384), (2, 3), [128, 128]),
        ((72, 80), (9, 10), [8, 8]),
        ((3, 16, 24), (3, 2, 3), [8, 8]),  # stacked experts
        ((32, 64), (), None),  # one scale for the tensor
        ((32, 64), (1, 1), None),
    ],
)
def test_fp8_is_what_transformers_makes_of_it(tmp_path, shape, grid, block):
    pytest.importorskip("torch", reason="Transformers dequantises with torch")
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    values, scale = fp8(shape, grid)
    scale = np.asarray(scale, np.float32)
    found = read({"a.weight": values, "a.weight_scale_inv": scale}, FP8 | {"weight_block_size": block}, tmp_path)
    assert list(found) == ["a.weight"]
    import torch

    same_bits(
        found["a.weight"].read(),
        Fp8Dequantize(None)._dequantize_one(torch_of(values), torch_of(scale), output_dtype=torch.bfloat16),
    )


def test_fp8_blocks_may_hang_over_the_edge(tmp_path, monkeypatch):
    """DeepSeek's kv_a_proj_with_mqa has 576 rows: four and a half blocks."""
    torch = pytest.importorskip("torch", reason="Transformers dequantises with torch")
    from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

    values, scale = fp8((72, 40), (5, 3))
    theirs = _dequantize_fp8_weight(torch_of(values), torch_of(scale), [16, 16], torch.float32).bfloat16()
    for size in (1, 16 * 40 * 2, 1 << 24):  # however many rows go at once
        monkeypatch.setattr(quantised, "_VALUES_AT_ONCE", size)
        settings = FP8 | {"weight_block_size": [16, 16]}
        found = read({"a.weight": values, "a.weight_scale_inv": scale}, settings, tmp_path)
        same_bits(found["a.weight"].read(), theirs)


def test_mxfp4_is_what_transformers_makes_of_it(tmp_path):
    pytest.importorskip("torch", reason="Transformers dequantises with torch")
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (3, 10, 2, 16), dtype=np.uint8)
    scales = random.integers(60, 200, (3, 10, 2), dtype=np.uint8)
    found = read({"x.gate_up_proj_blocks": blocks, "x.gate_up_proj_scales": scales}, MXFP4, tmp_path)
    assert list(found) == ["x.gate_up_proj"]
    same_bits(found["x.gate_up_proj"].read(), convert_moe_packed_tensors(torch_of(blocks), torch_of(scales)))


def test_a_block_of_mxfp4_by_hand(tmp_path):
    """0x2F is -6 (code 15, the low half first) and 1 (code 2); the scale's byte 128 is 2."""
    blocks, scales = np.full((1, 1, 1, 16), 0x2F, np.uint8), np.full((1, 1, 1), 128, np.uint8)
    found = read({"a_blocks": blocks, "a_scales": scales}, MXFP4, tmp_path)["a"].read()
    assert found.shape == (1, 32, 1)
    assert found[0, :, 0].astype(float).tolist() == [-12.0, 2.0] * 16


def test_what_is_not_quantised_is_left_alone(tmp_path):
    norm = stored(np.ones(3, np.float32))
    settings = stored(np.ones((), np.float32))
    for method in (FP8, MXFP4):
        given = {"a.norm.weight": norm, "b_scales": norm, "c_scale_inv": norm}
        assert quantised.as_floats(given, {"quantization_config": method}, tmp_path) == given
    found = quantised.as_floats({"a.activation_scale": settings}, {"quantization_config": FP8}, tmp_path)
    assert found == {}


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        (FP8, {"a.weight": (8, 8)}, "a.weight is fp8 without a.weight_scale_inv"),
        (FP8, {"a.weight": (200, 8), "a.weight_scale_inv": (1, 1)}, r"asks for \(2, 1\)"),
        (MXFP4, {"a_blocks": (1, 2, 1, 16)}, "no a_scales of bytes to fit it"),
        (MXFP4, {"a_blocks": (1, 2, 1, 16), "a_scales": (1, 2)}, "no a_scales of bytes to fit it"),
    ],
)
def test_scales_that_do_not_fit_are_refused(tmp_path, method, given, message):
    types = {"a.weight": ml_dtypes.float8_e4m3fn, "a.weight_scale_inv": np.float32}
    with pytest.raises(UserError, match=message):
        read({name: np.zeros(shape, types.get(name, np.uint8)) for name, shape in given.items()}, method, tmp_path)


@pytest.mark.parametrize("place", ["top", "text"])
def test_other_methods_are_refused(tmp_path, place):
    method = {"quantization_config": {"quant_method": "awq"}}
    write_folder(tmp_path, TINY | (method if place == "top" else {"text_config": method}), {})
    with pytest.raises(UserError, match=r"quantised with awq, which cannot.*fp8, mxfp4, bitsandbytes can be read"):
        resolve(keys(tmp_path))


def test_an_fp8_checkpoint_is_loaded_and_saved_in_bfloat16(tmp_path):
    values = random_tensors(TINY, "bfloat16")
    given, wanted = dict(values), dict(values)
    for number, name in enumerate(name for name in values if name.endswith("_proj.weight")):
        rows, columns = values[name].shape
        given[name], scale = fp8(values[name].shape, (-(-rows // 48), -(-columns // 48)), number)
        given[f"{name}_scale_inv"] = scale
        spread = scale.repeat(48, 0)[:rows].repeat(48, 1)[:, :columns]
        wanted[name] = (given[name].astype(np.float32) * spread).astype(BF16)
    config = TINY | {"torch_dtype": "bfloat16", "quantization_config": FP8 | {"weight_block_size": [48, 48]}}
    source = resolve(keys(write_folder(tmp_path / "in", config, given)))
    params = huggingface.load(source, spec_of(config), jnp.float32, one_device())
    huggingface.save(tmp_path / "out", params, spec_of(config), source, tiny_tokenizer())
    found = tensors.read_folder(tmp_path / "out")
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (found[name].dtype, found[name].read().tobytes()) == (BF16, value.tobytes()), name
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == TINY | {"torch_dtype": "bfloat16"}
