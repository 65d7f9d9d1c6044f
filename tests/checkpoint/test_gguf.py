import copy

import gguf as library
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from folders import keys, one_device, smollm2, spec_of, tiny_tokenizer
from gguf import GGMLQuantizationType as Kind
from gguf_writing import write_gguf

from luthier.checkpoint import gguf, gguf_file, huggingface
from luthier.checkpoint import tokenizer as tokenizer_lib
from luthier.checkpoint.source import resolve
from luthier.errors import UserError
from luthier.model.compute import Compute
from luthier.model.model import Model
from luthier.model.rope import Rope, inverse_frequencies
from luthier.types import Batch
from tiny import CONFIGS, TINY

KINDS = [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_type_is_read_under_hugging_faces_names_and_order(tmp_path, kind):
    config = TINY | {"num_key_value_heads": 2, "hidden_size": 64}
    wanted = write_gguf(tmp_path / "m.gguf", config, kind)
    found = gguf.read_tensors(tmp_path / "m.gguf")
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert found[name].shape == values.shape
        np.testing.assert_array_equal(found[name].read(), values, err_msg=name)


def test_large_tensors_are_dequantised_by_groups_of_rows(tmp_path, monkeypatch):
    wanted = write_gguf(tmp_path / "m.gguf", TINY, Kind.Q8_0)
    monkeypatch.setattr(gguf_file, "_ROWS_AT_ONCE", 100)
    found = gguf.read_tensors(tmp_path / "m.gguf")
    np.testing.assert_array_equal(found["lm_head.weight"].read(), wanted["lm_head.weight"])


def half(block, at):
    return float(block[at : at + 2].view(np.float16)[0])


def k_scale(scales, j):
    """The scale and the minimum of the ``j``th group of 32, six bits each, packed in twelve bytes."""
    if j < 4:
        return scales[j] & 63, scales[j + 4] & 63
    return scales[j + 4] & 15 | scales[j - 4] >> 6 << 4, scales[j + 4] >> 4 | scales[j] >> 6 << 4


def reference_q4_k(block):
    d, least, scales, quants = half(block, 0), half(block, 2), block[4:16].tolist(), block[16:].tolist()
    values = []
    for j in range(8):
        scale, minimum = k_scale(scales, j)
        for number in quants[j // 2 * 32 : j // 2 * 32 + 32]:
            values.append(d * scale * (number >> 4 * (j % 2) & 15) - least * minimum)
    return values


def reference_q5_k(block):
    d, least, scales = half(block, 0), half(block, 2), block[4:16].tolist()
    high, quants, values = block[16:48].tolist(), block[48:].tolist(), []
    for j in range(8):
        scale, minimum = k_scale(scales, j)
        for place, number in enumerate(quants[j // 2 * 32 : j // 2 * 32 + 32]):
            quant = number >> 4 * (j % 2) & 15 | (high[place] >> j & 1) << 4
            values.append(d * scale * quant - least * minimum)
    return values


def reference_q6_k(block):
    low, high, scales = block[:128].tolist(), block[128:192].tolist(), block[192:208].view(np.int8).tolist()
    d, values = half(block, 208), [0.0] * 256
    for n in range(2):
        for place in range(32):
            for part in range(4):
                nibble = low[64 * n + 32 * (part % 2) + place] >> 4 * (part // 2) & 15
                quant = (nibble | (high[32 * n + place] >> 2 * part & 3) << 4) - 32
                values[128 * n + 32 * part + place] = d * scales[8 * n + 2 * part + place // 16] * quant
    return values


@pytest.mark.parametrize(
    ("kind", "reference", "halves"),
    [(Kind.Q4_K, reference_q4_k, (0, 2)), (Kind.Q5_K, reference_q5_k, (0, 2)), (Kind.Q6_K, reference_q6_k, (208,))],
    ids=["Q4_K", "Q5_K", "Q6_K"],
)
def test_k_quants_mean_what_their_layout_says(tmp_path, kind, reference, halves):
    _, size = library.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(0).integers(0, 256, (6, size), dtype=np.uint8)
    for at in halves:
        blocks[:, at : at + 2] = np.linspace(0.01, 0.1, 6, dtype=np.float16)[:, None].view(np.uint8)
    blocks.tofile(tmp_path / "blocks")
    found = gguf_file.values(tmp_path / "blocks", 0, (3, 512), kind)
    wanted = np.array([reference(block) for block in blocks]).reshape(3, 512)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama2", "llama3", "smollm2", "llama-biased"])
def test_the_config_is_recovered(tmp_path, name):
    config = CONFIGS[name]
    more = [("add_bos_token_id", 1), ("add_eos_token_id", 2)]
    write_gguf(tmp_path / "m.gguf", config, metadata=more)
    found = gguf.read_config(tmp_path / "m.gguf")
    assert found | config == found  # every field that was there, with its value
    assert (found["dtype"], found["pad_token_id"]) == ("float32", None)


def llama3_factors(settings, theta, head_dim):
    plain = inverse_frequencies(Rope(theta), head_dim)
    rope = Rope.from_hf({"rope_theta": theta, "rope_scaling": settings})
    return plain / inverse_frequencies(rope, head_dim)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_31s_rope_scaling_is_recovered_from_its_factors(tmp_path, factor):
    settings = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = TINY | {"rope_theta": 500_000.0, "head_dim": 64}
    write_gguf(tmp_path / "m.gguf", config, factors={"rope_freqs.weight": llama3_factors(settings, 500_000.0, 64)})
    assert gguf.read_config(tmp_path / "m.gguf")["rope_scaling"] == settings
    assert "rope_freqs.weight" not in gguf.read_tensors(tmp_path / "m.gguf")


def test_linear_rope_scaling_is_read(tmp_path):
    more = [("add_rope_scaling_type", library.RopeScalingType.LINEAR), ("add_rope_scaling_factor", 4.0)]
    write_gguf(tmp_path / "m.gguf", TINY, metadata=more)
    assert gguf.read_config(tmp_path / "m.gguf")["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metadata": [("add_string", "general.architecture", "t5")]}, "architecture `t5` is not supported"),
        ({"metadata": [("add_uint16", "split.count", 3)]}, "llama-gguf-split --merge"),
        ({"metadata": [("add_rope_scaling_type", library.RopeScalingType.LONGROPE)]}, "rope scaling `longrope`"),
        ({"factors": {"rope_freqs.weight": np.linspace(1, 5, 8)}}, "not Llama 3's rope scaling"),
    ],
)
def test_what_is_not_supported_is_refused(tmp_path, options, message):
    write_gguf(tmp_path / "m.gguf", TINY, **options)
    with pytest.raises(UserError, match=message):
        resolve(keys(tmp_path / "m.gguf"))


def test_a_type_that_cannot_be_dequantised_is_named(tmp_path):
    writer = library.GGUFWriter(tmp_path / "m.gguf", "llama")
    write_gguf(tmp_path / "whole.gguf", TINY)
    whole = gguf_file.read_header(tmp_path / "whole.gguf")
    for key, value in whole.metadata.items():
        if isinstance(value, int) and key.startswith("llama."):
            writer.add_uint32(key, value)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tensor("token_embd.weight", np.zeros((4, 66), np.uint8), raw_dtype=Kind.IQ2_XXS)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match=r"`token_embd.weight` has type IQ2_XXS, which cannot be read"):
        gguf.read_tensors(tmp_path / "m.gguf")


@pytest.mark.parametrize(("keep", "message"), [(0.999, "cut short: tensor"), (0.001, "header is cut short")])
def test_a_file_cut_short_is_refused(tmp_path, keep, message):
    path = tmp_path / "m.gguf"
    write_gguf(path, TINY)
    data = path.read_bytes()
    path.write_bytes(data[: max(100, int(len(data) * keep))])
    with pytest.raises(UserError, match=message):
        gguf.read_tensors(path)


def test_a_pointer_in_place_of_a_file_is_refused(tmp_path):
    (tmp_path / "m.gguf").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match="not a GGUF file"):
        resolve(keys(tmp_path / "m.gguf"))


def test_a_gguf_is_saved_in_float32_and_reads_back_the_same(tmp_path):
    wanted = write_gguf(tmp_path / "m.gguf", TINY, Kind.Q4_1)
    source = resolve(keys(tmp_path / "m.gguf"))
    params = huggingface.load(source, spec_of(source.config), jnp.float32, one_device())
    huggingface.save(tmp_path / "out", params, spec_of(source.config), source, tiny_tokenizer())
    again = resolve(keys(tmp_path / "out"))
    assert again.config == source.config
    for name, values in wanted.items():
        np.testing.assert_array_equal(again.tensors[name].read(), values)
    assert (tmp_path / "out" / "generation_config.json").is_file()


def test_smollm2s_config_is_the_published_one():
    found = resolve(keys(smollm2())).config
    published = {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-05,
        "rope_theta": 100000,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    assert found | published == found


@pytest.mark.slow
def test_smollm2s_weights_equal_transformers():
    torch = pytest.importorskip("torch", reason="Transformers' model needs torch")
    pytest.importorskip("accelerate", reason="Transformers reads GGUF files with accelerate")
    from transformers import AutoModelForCausalLM, GgufConfig

    path = smollm2()
    theirs = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    ours = resolve(keys(path)).tensors
    named = dict(theirs.named_parameters())
    assert named.keys() == ours.keys()
    for name, values in named.items():
        np.testing.assert_array_equal(ours[name].read(), values.detach().numpy(), err_msg=name)


@pytest.mark.slow
def test_smollm2_saved_gives_transformers_our_log_probs(tmp_path):
    torch = pytest.importorskip("torch", reason="Transformers' model needs torch")
    from transformers import AutoModelForCausalLM

    source = resolve(keys(smollm2()))
    model = Model.from_hf(source.config, source.name)
    params = huggingface.load(source, model.spec, jnp.float32, one_device())
    tokenizer = tokenizer_lib.load(source)
    huggingface.save(tmp_path / "out", params, model.spec, source, tokenizer)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    assert saved.dtype == torch.float32
    tokens_BT = np.array([tokenizer("The capital of France is Paris. 12 + 30 = 42.").input_ids], np.int32)
    ones_BT = np.ones_like(tokens_BT)
    batch = Batch(tokens_BT, np.arange(tokens_BT.shape[1], dtype=np.int32)[None], ones_BT, ones_BT)
    ours_BTV = jax.nn.log_softmax(jax.jit(lambda p: model.logits(p, batch, Compute()))(params))
    with torch.no_grad():
        theirs_BTV, exact_BTV = (
            torch.log_softmax(each(torch.from_numpy(tokens_BT).long()).logits, -1).numpy()
            for each in (saved, copy.deepcopy(saved).double())
        )
    # By the mean at each position, and in float64: the first token's states are a thousand times the others', and two
    # right float32 passes differ there by up to 1e-4 in a few of the 49,152, by the order of their sums alone.
    for each_BTV in (np.asarray(ours_BTV), theirs_BTV):
        np.testing.assert_array_less(np.abs(each_BTV - exact_BTV).mean(axis=-1), 5e-5)
