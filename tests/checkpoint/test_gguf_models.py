import numpy as np
import pytest
from folders import gemma3, keys
from gguf import GGMLQuantizationType as Kind
from gguf import RopeScalingType
from gguf_writing import MODEL_TYPES, write_gguf

from luthier.checkpoint import gguf
from luthier.checkpoint import tokenizer as tokenizer_lib
from luthier.checkpoint.source import resolve
from luthier.errors import UserError
from luthier.model.model import Model
from tiny import TINY

BASE = {name: value for name, value in TINY.items() if name != "architectures"}
GEMMA = BASE | {
    "head_dim": 32,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
}
SLIDING, FULL = "sliding_attention", "full_attention"
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
EXPERTS = [("add_expert_count", 4), ("add_expert_used_count", 2)]
FACTORS = {"long_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 3.5], "short_factor": [1.0, 1.25, 1.5, 1.5, 1.5, 1.5]}

# As released: (config.json, what the converter writes besides the usual).
MODELS = {
    "mistral": (BASE | {"model_type": "mistral", "sliding_window": None, "head_dim": 32}, []),
    "mixtral": (
        BASE | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
        EXPERTS,
    ),
    "qwen2": (BASE | {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 32768}, []),
    "qwen3": (BASE | {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True}, []),
    "qwen3, yarn": (
        BASE | {"model_type": "qwen3", "head_dim": 32, "rope_scaling": YARN},
        [
            ("add_rope_scaling_type", RopeScalingType.YARN),
            ("add_rope_scaling_factor", 4.0),
            ("add_rope_scaling_orig_ctx_len", 128),
        ],
    ),
    "qwen3-moe": (
        BASE
        | {
            "model_type": "qwen3_moe",
            "head_dim": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
        },
        [*EXPERTS, ("add_expert_feed_forward_length", 32)],
    ),
    "gemma": (GEMMA | {"model_type": "gemma"}, []),
    "gemma2": (
        GEMMA
        | {
            "model_type": "gemma2",
            "query_pre_attn_scalar": 32,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "sliding_window": 8,
        },
        [
            ("add_attn_logit_softcapping", 50.0),
            ("add_final_logit_softcapping", 30.0),
            ("add_sliding_window", 8),
        ],
    ),
    "gemma2-27b": (
        GEMMA | {"model_type": "gemma2", "num_hidden_layers": 46, "query_pre_attn_scalar": 16, "sliding_window": 8,
                 "attn_logit_softcapping": None, "final_logit_softcapping": None},
        [("add_sliding_window", 8)],
    ),
    "gemma3": (
        GEMMA
        | {
            "model_type": "gemma3_text",
            "num_hidden_layers": 7,
            "query_pre_attn_scalar": 32,
            "sliding_window": 8,
            "layer_types": [*[SLIDING] * 5, FULL, SLIDING],
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        [
            ("add_sliding_window", 8),
            ("add_rope_scaling_type", RopeScalingType.LINEAR),
            ("add_rope_scaling_factor", 8.0),
        ],
    ),
    "phi3": (
        BASE | {"model_type": "phi3", "sliding_window": 16},
        [("add_sliding_window", 16), ("add_rope_dimension_count", 16), ("add_rope_scaling_orig_ctx_len", 512)],
    ),
    "phi4-mini": (
        BASE
        | {
            "model_type": "phi3",
            "sliding_window": None,
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 128,
            "rope_scaling": {"type": "longrope"} | FACTORS,
        },
        [("add_sliding_window", 0), ("add_rope_dimension_count", 12), ("add_rope_scaling_orig_ctx_len", 128)],
    ),
}  # fmt: skip


def write(path, name, kind=Kind.F32):
    config, metadata = MODELS[name]
    scaling = config.get("rope_scaling") or {}
    factors = {f"rope_factors_{key.split('_')[0]}.weight": scaling[key] for key in FACTORS if key in scaling}
    return write_gguf(path, config, kind, factors, metadata)


@pytest.mark.parametrize("name", MODELS)
def test_an_architecture_is_the_model_that_it_was(tmp_path, name):
    write(tmp_path / "m.gguf", name)
    found = gguf.read_config(tmp_path / "m.gguf")
    config = MODELS[name][0]
    if name != "mistral":  # which llama.cpp stores as a Llama, and no tensor or number is another
        assert found["model_type"] == config["model_type"]
    assert Model.from_hf(found, "found").config == Model.from_hf(config, "given").config


@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q8_0], ids=lambda kind: kind.name)
@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("gemma2-27b", "qwen3, yarn")])
def test_an_architectures_tensors_are_hugging_faces(tmp_path, name, kind):
    wanted = write(tmp_path / "m.gguf", name, kind)
    found = gguf.read_tensors(tmp_path / "m.gguf")
    assert found.keys() == wanted.keys()
    for tensor, values in wanted.items():
        assert found[tensor].shape == values.shape
        np.testing.assert_array_equal(found[tensor].read(), values, err_msg=tensor)


def test_every_architecture_that_can_be_written_is_tested():
    assert {config["model_type"] for config, _ in MODELS.values()} | {"llama"} == set().union(*MODEL_TYPES.values())


def test_experts_where_there_should_be_none_are_refused(tmp_path):
    config, metadata = MODELS["qwen3"]
    write_gguf(tmp_path / "m.gguf", config, metadata=[*metadata, *EXPERTS])
    with pytest.raises(UserError, match="a mixture of experts, which is not supported for architecture `qwen3`"):
        resolve(keys(tmp_path / "m.gguf"))


@pytest.fixture(scope="module")
def real():
    return resolve(keys(gemma3()))


@pytest.mark.slow
def test_gemma_3s_config_is_the_published_one(real):
    published = {
        "model_type": "gemma3_text",
        "vocab_size": 262144,
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_hidden_layers": 18,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": None,
        "sliding_window": 512,
        "query_pre_attn_scalar": 256,
        "layer_types": ([SLIDING] * 5 + [FULL]) * 3,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    assert real.config | published == real.config


@pytest.mark.slow
def test_gemma_3s_weights_equal_transformers(real):
    torch = pytest.importorskip("torch", reason="Transformers' model needs torch")
    pytest.importorskip("accelerate", reason="Transformers reads GGUF files with accelerate")
    from transformers import AutoModelForCausalLM, GgufConfig

    theirs = AutoModelForCausalLM.from_pretrained(
        real.path.parent, gguf_file=real.path.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    named = dict(theirs.named_parameters())
    assert named.keys() == real.tensors.keys()
    for name, values in named.items():
        np.testing.assert_array_equal(real.tensors[name].read(), values.detach().numpy(), err_msg=name)


@pytest.mark.slow
def test_gemma_3s_tokenizer_cuts_as_transformers_reading_does(real):
    pytest.importorskip("torch", reason="Transformers reads GGUF files with torch")
    from transformers import AutoTokenizer

    ours = tokenizer_lib.load(real)
    theirs = AutoTokenizer.from_pretrained(real.path.parent, gguf_file=real.path.name)
    random = np.random.default_rng(0)
    # Without its letter for a space, beside which (and in runs of over 31 spaces) theirs is not the model's own.
    parts = [*"abXY019 \n\t.,'é½東가🙂", "  ", "    ", "\r\n", " the", "ing", "<start_of_turn>", "<b>", "\u0308"]
    texts = ["".join(random.choice(parts, 30)) for _ in range(200)] + ["", "Hello, world! 12 + 30 = 42."]
    for text in texts:
        assert ours(text).input_ids == theirs(text).input_ids, text
        assert ours.decode(ours(text).input_ids[1:]) == text
