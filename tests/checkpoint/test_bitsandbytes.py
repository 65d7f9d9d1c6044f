"""Checkpoints that bitsandbytes has quantised, as Transformers saves them, against its own dequantisation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from folders import keys, one_device, spec_of, stored, tiny_tokenizer

from luthier.checkpoint import bitsandbytes, huggingface, tensors
from luthier.checkpoint.source import resolve
from luthier.errors import UserError
from tiny import CONFIGS, torch_twin

KINDS: dict[str, dict[str, Any]] = {
    "nf4-nested": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "nf4-in-bfloat16": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "bfloat16"},
    "int8": {"load_in_8bit": True},
}


@pytest.mark.parametrize("at_once", [64, 1 << 20])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_what_bitsandbytes_makes_of_it(
    kind: str, dtype: str, at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    monkeypatch.setattr(bitsandbytes, "_VALUES_AT_ONCE", at_once)
    torch_twin(CONFIGS["llama3.1"] | {"num_hidden_layers": 1}).save_pretrained(tmp_path / "plain")
    quantised = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=BitsAndBytesConfig(**KINDS[kind]), dtype=getattr(torch, dtype)
    )
    quantised.save_pretrained(tmp_path / "in")
    source = resolve(keys(tmp_path / "in"))
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    huggingface.check(source, spec_of(config))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "in")
    for name, weight in again.named_parameters():
        if type(weight).__name__ in ("Params4bit", "Int8Params"):
            module = again.get_submodule(name.removesuffix(".weight"))
            weight = dequantize_bnb_weight(weight, getattr(module, "state", None))
        ours = source.tensors[name].read()
        assert str(ours.dtype) == dtype
        np.testing.assert_array_equal(
            ours.astype(np.float32), weight.detach().to(getattr(torch, dtype)).float().numpy()
        )


def nf4(shape: tuple[int, int]) -> dict[str, Any]:
    """A weight of ones and minus twos, each row one block of 64 (arXiv 2305.14314)."""
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(shape)}
    table = np.linspace(-1, 1, 16).astype(np.float32)
    return {
        "a.weight": np.full((shape[0] * shape[1] // 2, 1), 0xF0, np.uint8),
        "a.weight.absmax": np.arange(1, 1 + shape[0], dtype=np.float32),
        "a.weight.quant_map": table,
        "a.weight.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(state).encode(), np.uint8),
    }


def read(found: dict[str, Any], folder: Path) -> dict[str, Any]:
    return bitsandbytes.read({name: stored(value) for name, value in found.items()}, {}, folder)


def test_four_bits_by_hand(tmp_path: Path) -> None:
    norm = np.ones(3, np.float32)
    found = read(nf4((2, 64)) | {"norm.weight": norm, "other.SCB": norm}, tmp_path)
    assert list(found) == ["a.weight", "norm.weight", "other.SCB"]
    assert found["a.weight"].read().astype(float).tolist() == [[1.0, -1.0] * 32, [2.0, -2.0] * 32]


def test_eight_bits_by_hand(tmp_path: Path) -> None:
    values = {"a.weight": np.full((2, 3), 127, np.int8), "a.SCB": np.float32([1, -2])}
    found = read(values | {"a.weight_format": np.zeros((), np.uint8)}, tmp_path)
    assert list(found) == ["a.weight"]
    assert found["a.weight"].dtype == np.float16
    np.testing.assert_array_equal(found["a.weight"].read(), [[1, 1, 1], [-2, -2, -2]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a.weight.absmax": None}, r"a.weight has four bits, and lacks 'a.weight.absmax'"),
        ({"a.weight.absmax": np.ones(3, np.float32)}, r"64 bytes and 3 scales, which do not fit \(2, 64\)"),
        ({"a.weight.quant_state.bitsandbytes__nf4": np.zeros(5, np.uint8)}, "is not the JSON that it should be"),
        ({"b.weight": np.zeros((2, 2), np.int8)}, "b.weight is int8 without b.SCB"),
        (
            {
                "b.weight": np.zeros((2, 2), np.int8),
                "b.SCB": np.zeros(2, np.float32),
                "b.weight_format": np.ones((), np.uint8),
            },
            "b.weight is stored in tiles",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    given = {name: value for name, value in (nf4((2, 64)) | change).items() if value is not None}
    with pytest.raises(UserError, match=message):
        read(given, tmp_path)


def test_a_quantised_checkpoint_is_saved_as_floats(tmp_path: Path) -> None:
    """What is made of it can be loaded by anyone: no trace of the quantisation is left."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    torch_twin(CONFIGS["smollm2"]).save_pretrained(tmp_path / "plain")
    settings = BitsAndBytesConfig(**KINDS["nf4-nested"])
    AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=settings).save_pretrained(
        tmp_path / "in"
    )
    source = resolve(keys(tmp_path / "in"))
    params = huggingface.load(source, spec_of(source.config), jnp.float32, one_device())
    huggingface.save(tmp_path / "out", params, spec_of(source.config), source, tiny_tokenizer())
    saved = tensors.read_folder(tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert {tensor.dtype for tensor in saved.values()} <= {np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert sum(weight.numel() for weight in again.parameters()) == sum(
        np.prod(tensor.shape) for tensor in saved.values()
    )
