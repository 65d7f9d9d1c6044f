"""Tiny models and batches for tests: `config.json` fields by name, their Transformers twins, their tokenizer."""

from __future__ import annotations

import functools
import importlib.util
from copy import deepcopy
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

# One model of each kind that training and sampling are tested with, which differ in what a layer is made of and keeps.
_SLIDES, _FULL = "sliding_attention", "full_attention"
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True, "vocab_size": 272}
KINDS: dict[str, dict[str, Any]] = {
    "llama": TINY | {"vocab_size": 272},
    # Windows much shorter than the tests' sequences, two rotations, norms of queries and keys, tied embeddings.
    "gemma3-text": TINY
    | {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "hidden_act": "gelu_pytorch_tanh",
       "vocab_size": 272, "num_hidden_layers": 4, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16,
       "layer_types": [_SLIDES, _FULL] * 2, "rope_local_base_freq": 1e3, "tie_word_embeddings": True},
    # Softmax routing, which all layers have.
    "qwen3-moe": TINY
    | {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "head_dim": 16, "num_experts": 8}
    | _EXPERTS,
    # Latent attention, a dense layer before those with experts, groups, a shared expert, a correction of the choice.
    "deepseek-v3": TINY
    | {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "num_key_value_heads": 4,
       "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12,
       "first_k_dense_replace": 1, "n_routed_experts": 8, "n_shared_experts": 1, "n_group": 4, "topk_group": 2,
       "routed_scaling_factor": 2.5, "rope_interleave": True}
    | _EXPERTS,
}  # fmt: skip
WITH_EXPERTS = ("qwen3-moe", "deepseek-v3")


@functools.cache
def kind_model(kind: str) -> Any:
    """Return the model of a kind, the same object each time: programs are compiled for it once."""
    from luthier.model.model import Model

    return Model.from_hf(KINDS[kind], kind)


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
    """Return Transformers' model of this config with random fp32 weights, of which none is what it begins as.

    Biases, norms, sinks and the buffers that checkpoints hold are random too.
    """
    import torch
    import transformers

    torch.set_num_threads(1)  # over matrices this small, more of them only wait for each other
    torch.manual_seed(seed)
    # A copy: Transformers writes into what it is given.
    fields = {name: deepcopy(value) for name, value in config.items() if name not in ("model_type", "architectures")}
    if "text_config" in fields:
        fields["text_config"] = fields["text_config"] | {"initializer_range": 0.1}
    model = getattr(transformers, config["architectures"][0])._from_config(
        transformers.AutoConfig.for_model(config["model_type"], **fields, initializer_range=0.1),
        attn_implementation="eager",
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1 or "bias" in name:
                weight += (0.5 if "sinks" in name else 0.1) * torch.randn_like(weight)
        stored = model.state_dict()
        for name, buffer in model.named_buffers():
            if name in stored:
                buffer += 0.3 * torch.randn_like(buffer)
    return model.float().eval()


def stored_tensors(model: Any, tensors: dict[str, Any] | None = None) -> dict[str, np.ndarray]:
    """Return a Transformers model's weights under the names and in the shapes that its checkpoints have.

    Given ``tensors`` by the names of its own weights, those instead: its gradients.
    """
    from transformers.core_model_loading import revert_weight_conversion

    given = model.state_dict() if tensors is None else tensors
    return {name: tensor.detach().numpy() for name, tensor in revert_weight_conversion(model, given).items()}


def params_from_torch(spec: Any, model: Any) -> Any:
    """Return our weights filled from a Transformers model through each Param's own layout."""
    import jax.numpy as jnp

    from luthier.model.param import Param, map_spec

    tensors = stored_tensors(model)

    def fill(param: Param) -> Any:
        array = np.empty(param.shape, np.float32)
        for name, place in param.tensors().items():
            array[place] = param.from_tensor(tensors[name])
        return jnp.asarray(array)

    return map_spec(fill, spec)


def random_params(spec: Any, seed: int = 0) -> Any:
    """Return random fp32 weights, of which none is what it begins as, norms and biases included."""
    import jax.numpy as jnp

    from luthier.model.param import Param, map_spec

    random = np.random.default_rng(seed)

    def draw(param: Param) -> Any:
        middle = 1.0 if param.init == "ones" else 0.0
        return jnp.asarray(random.normal(middle, 0.1, param.shape), jnp.float32)

    return map_spec(draw, spec)


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


def write_model(folder: Any, kind: str = "llama", **changes: Any) -> None:
    """Write a random tiny model of a kind with its tokenizer into ``folder``, as Hugging Face lays it out."""
    import json

    from safetensors.numpy import save_file

    from luthier.model import param
    from luthier.model.model import Model

    config = KINDS[kind] | {"bos_token_id": 0, "eos_token_id": 2} | changes
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
