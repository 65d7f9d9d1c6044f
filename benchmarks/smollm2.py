"""SmolLM2-135M's shape as files that every side of a benchmark reads: a model folder, random weights, and rows.

The tokenizer has the real one's size but words of its own, so that a row can be made of an exact number of tokens.
"""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100_000.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "initializer_range": 0.041666666666666664,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}<|im_start|> {{ message.role }} {{ message.content }} <|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


def write_model(folder: Path) -> None:
    """Write ``config.json`` and a tokenizer of 49,152 words between white space."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    words = [*SPECIALS, *(f"w{number}" for number in range(len(SPECIALS), CONFIG["vocab_size"]))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=SPECIALS[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": SPECIALS[2], "pad_token": SPECIALS[2], "unk_token": SPECIALS[0]}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHATML, **special).save_pretrained(folder)


def write_weights(folder: Path) -> None:
    """Write ``model.safetensors`` beside the configuration: random weights in bfloat16, norms of one."""
    D, F = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    N, K = (CONFIG[key] * CONFIG["head_dim"] for key in ("num_attention_heads", "num_key_value_heads"))
    products = {
        "self_attn.q_proj": (N, D),
        "self_attn.k_proj": (K, D),
        "self_attn.v_proj": (K, D),
        "self_attn.o_proj": (D, N),
        "mlp.gate_proj": (F, D),
        "mlp.up_proj": (F, D),
        "mlp.down_proj": (D, F),
    }
    random = np.random.default_rng(0)

    def drawn(*shape: int) -> np.ndarray:
        return (random.standard_normal(shape, np.float32) * CONFIG["initializer_range"]).astype(ml_dtypes.bfloat16)

    norm_D = np.ones(D, ml_dtypes.bfloat16)
    tensors = {"model.embed_tokens.weight": drawn(CONFIG["vocab_size"], D), "model.norm.weight": norm_D}
    for layer in range(CONFIG["num_hidden_layers"]):
        place = f"model.layers.{layer}"
        tensors |= {f"{place}.{name}.weight": norm_D for name in ("input_layernorm", "post_attention_layernorm")}
        tensors |= {f"{place}.{name}.weight": drawn(*shape) for name, shape in products.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def write_rows(path: Path, rows: int, length: int) -> None:
    """Write texts of ``length`` tokens each, the last of them the end token that every trainer adds."""
    drawn = np.random.default_rng(0).integers(len(SPECIALS), CONFIG["vocab_size"], (rows, length - 1))
    with path.open("w") as file:
        for row in drawn:
            file.write(json.dumps({"text": " ".join(f"w{number}" for number in row)}) + "\n")
