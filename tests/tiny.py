"""Tiny models and batches for tests: `config.json` fields by name, their Transformers twins, their tokenizer."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from luthier.types import Batch

needs_reasoning_gym = pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None, reason="reasoning-gym is not installed: make test"
)

ROOT = Path(__file__).resolve().parent.parent

TINY = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA31_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama2": TINY | {"num_key_value_heads": 4},
    "llama3": TINY | {"rope_theta": 500_000.0},
    "llama3.1": TINY | {"rope_theta": 500_000.0, "rope_scaling": LLAMA31_ROPE, "head_dim": 32},
    "llama-linear-rope": TINY | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama-biased": TINY | {"attention_bias": True, "mlp_bias": True},
    "smollm2": TINY
    | {"tie_word_embeddings": True, "rope_theta": 100_000.0, "num_attention_heads": 3, "num_key_value_heads": 1,
       "hidden_size": 48},
}  # fmt: skip


def make_batch(rows: int = 4, length: int = 32, vocab: int = 256, seed: int = 0) -> Batch:
    """Random tokens in rows of two segments and some padding, with a random loss mask."""
    random = np.random.default_rng(seed)
    tokens_BT = random.integers(0, vocab, (rows, length), dtype=np.int32)
    segments_BT, positions_BT = np.zeros_like(tokens_BT), np.zeros_like(tokens_BT)
    mask_BT = random.random((rows, length)) < 0.7
    for row in range(rows):
        first, end = random.integers(3, length // 2), random.integers(length // 2 + 3, length + 1)
        for number, (start, stop) in enumerate(((0, first), (first, end)), start=1):
            segments_BT[row, start:stop] = number
            positions_BT[row, start:stop] = np.arange(stop - start)
            mask_BT[row, start] = False
        tokens_BT[row, end:] = 0
        mask_BT[row, end:] = False
    return Batch(tokens_BT, positions_BT, segments_BT, mask_BT)


def torch_twin(config: dict[str, Any], seed: int = 0) -> Any:
    """Return Transformers' model of this config with random fp32 weights, biases and norms included."""
    import torch
    import transformers

    torch.manual_seed(seed)
    fields = {name: value for name, value in config.items() if name not in ("model_type", "architectures")}
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(config["model_type"], **fields, initializer_range=0.1),
        attn_implementation="eager",
    )
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight += 0.1 * torch.randn_like(weight)
    return model.float().eval()


def params_from_torch(spec: Any, model: Any) -> Any:
    """Return our weights filled from a Transformers model through each Param's own layout."""
    import jax.numpy as jnp

    from luthier.model.param import Param, map_spec

    tensors = {name: weight.detach().numpy() for name, weight in model.state_dict().items()}

    def fill(param: Param) -> Any:
        array = np.empty(param.shape, np.float32)
        for name, place in param.tensors().items():
            array[place] = param.from_tensor(tensors[name])
        return jnp.asarray(array)

    return map_spec(fill, spec)


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def tokenizer(chat_template: str | None = CHATML) -> Any:
    """Return a byte-level tokenizer with ChatML's special tokens and no merges: 259 ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({symbol: number for number, symbol in enumerate([*SPECIALS, *alphabet])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=SPECIALS[0], eos_token=SPECIALS[2], pad_token=SPECIALS[0]
    )
    fast.add_special_tokens({"additional_special_tokens": list(SPECIALS[1:])})
    fast.chat_template = chat_template
    return fast


def write_model(folder: Any, **changes: Any) -> None:
    """Write a random tiny Llama with its tokenizer into ``folder``, as Hugging Face lays it out."""
    import json

    from safetensors.numpy import save_file

    from luthier.model import param
    from luthier.model.model import Model

    config = TINY | {"vocab_size": 272, "bos_token_id": 0, "eos_token_id": 2} | changes
    random = np.random.default_rng(0)
    shapes = param.tensor_shapes(Model.from_hf(config, "tiny").spec)
    tensors = {
        name: random.normal(1.0 if len(shape) == 1 else 0.0, 0.05, shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer().save_pretrained(folder)
