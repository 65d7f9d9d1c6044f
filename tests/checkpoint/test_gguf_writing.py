"""A GGUF file that we write, read by ourselves, by the gguf package and by Transformers."""

import functools
import json

import gguf as library
import numpy as np
import pytest
from folders import keys, random_tensors, spec_of, write_folder
from gguf_writing import write_gguf
from test_gguf_models import MODELS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from luthier.checkpoint import gguf, gguf_file, gguf_writing
from luthier.checkpoint.source import resolve
from luthier.checkpoint.tensors import Stored
from luthier.errors import RunError, UserError
from luthier.model import param
from luthier.model.model import Model
from tiny import KINDS, LLAMA31_ROPE, TINY

LLAMA31 = TINY | {
    "rope_theta": 500_000.0,
    "head_dim": 64,
    "rope_scaling": LLAMA31_ROPE | {"original_max_position_embeddings": 8192},
}
CONFIGS = {name: config for name, (config, _) in MODELS.items()} | {
    "llama": TINY,
    "llama-biased": TINY | {"attention_bias": True, "mlp_bias": True},
    "llama3.1": LLAMA31,
}


def write(folder, config, kind="f32", tensors=None, tokenizer=None):
    """Write a folder with these tensors, or random ones, as GGUF; return its source and the path of the file."""
    found = tensors or plain_tensors(config)
    source = resolve(keys(write_folder(folder / "hf", config, found)))
    words = tokenizer or small_tokenizer()
    model = Model.from_hf(source.config, source.name)
    gguf_writing.write(folder / "m.gguf", source, source.tensors, model.config, words, kind)
    return source, folder / "m.gguf"


def plain_tensors(config, seed=0):
    random = np.random.default_rng(seed)
    shapes = param.tensor_shapes(spec_of(config))
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@functools.cache
def small_tokenizer():
    """Of 256 tokens: bytes but for one, and a merge, without which no file can be."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet())[:-1], "ee"]
    backend = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, [("e", "e")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="!", chat_template="{{ messages }}")


def raw(path):
    return {tensor.name: tensor for tensor in library.GGUFReader(path).tensors}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_written_file_is_the_same_model(tmp_path, name):
    config = CONFIGS[name]
    source, path = write(tmp_path, config)
    found = resolve(keys(path))
    assert Model.from_hf(found.config, "found").config == Model.from_hf(config, "given").config
    assert found.tensors.keys() == source.tensors.keys()
    for tensor, values in source.tensors.items():
        wanted = values.read()
        if name.startswith("gemma") and tensor.endswith("norm.weight"):
            wanted = (wanted + np.float32(1)) - np.float32(1)
        np.testing.assert_array_equal(found.tensors[tensor].read(), wanted, err_msg=tensor)


@pytest.mark.parametrize("name", ["llama", *MODELS])
def test_names_shapes_and_values_are_those_of_llama_cpps_converter(tmp_path, name):
    config, metadata = MODELS.get(name, (TINY, []))
    values = write_gguf(tmp_path / "theirs.gguf", config, metadata=metadata)
    _, path = write(tmp_path, config, tensors=values)
    ours, theirs = raw(path), raw(tmp_path / "theirs.gguf")
    factors = {name for name in ours if name.startswith("rope_factors")}
    assert ours.keys() - factors == theirs.keys()
    for tensor, their in theirs.items():
        assert ours[tensor].tensor_type == their.tensor_type or tensor.endswith("ffn_gate_inp.weight")
        np.testing.assert_array_equal(ours[tensor].data, their.data, err_msg=tensor)
    ours, theirs = (gguf_file.read_header(file).metadata for file in (path, tmp_path / "theirs.gguf"))
    assert {key: ours.get(key) for key in theirs} == theirs


@pytest.mark.parametrize("kind", gguf_writing.KINDS)
def test_codes_are_those_of_the_gguf_packages_quantisation(tmp_path, kind):
    config = CONFIGS["qwen3-moe"]
    tensors = plain_tensors(config)
    _, path = write(tmp_path / "plain", config, tensors=tensors)
    _, other = write(tmp_path / "kind", config, kind, tensors=tensors)
    plain, found = raw(path), raw(other)
    wanted = library.GGMLQuantizationType[kind.upper()]
    for name, tensor in found.items():
        exact = tensor.data.ndim == 1 or name.endswith(("_norm.weight", "ffn_gate_inp.weight"))
        assert tensor.tensor_type == (library.GGMLQuantizationType.F32 if exact else wanted), name
        codes = library.quants.quantize(np.asarray(plain[name].data), tensor.tensor_type)
        assert tensor.data.tobytes() == codes.tobytes(), name


def test_rows_that_do_not_divide_into_blocks_are_kept_in_fp16(tmp_path):
    config = TINY | {"intermediate_size": 72, "hidden_size": 64}
    _, path = write(tmp_path, config, "q8_0")
    kinds = {name: tensor.tensor_type.name for name, tensor in raw(path).items()}
    assert kinds["blk.0.ffn_down.weight"] == "F16"
    assert kinds["blk.0.ffn_up.weight"] == "Q8_0"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits_keep_every_bit_of_the_type_that_they_have(tmp_path, dtype):
    tensors = random_tensors(TINY, dtype)
    source, path = write(tmp_path, TINY, {"float16": "f16", "bfloat16": "bf16"}[dtype], tensors)
    found = gguf.read_tensors(path)
    for name, tensor in source.tensors.items():
        values = tensor.read()
        assert found[name].read().astype(values.dtype).tobytes() == values.tobytes(), name


def test_values_beyond_fp16_are_refused(tmp_path):
    tensors = plain_tensors(TINY)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e6
    with pytest.raises(UserError, match=r"blk\.1\.ffn_up\.weight has values beyond fp16's 65504. Set gguf_type=bf16"):
        write(tmp_path, TINY, "f16", tensors)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (KINDS["deepseek-v3"], "model type `deepseek_v3` cannot be written as GGUF"),
        (CONFIGS["mistral"] | {"sliding_window": 64}, r"layers\[0\].attention.window: 64, in the file None"),
        (CONFIGS["qwen3-moe"] | {"norm_topk_prob": False}, r"layers\[0\].mlp.normalised: False, in the file True"),
        (TINY | {"rope_scaling": LLAMA31_ROPE}, "not Llama 3's rope scaling"),
        (KINDS["gemma3-text"], r"layers\[1\].attention.window: None, in the file 8"),
        ({name: TINY[name] for name in TINY if name != "max_position_embeddings"}, "lacks max_position_embeddings"),
    ],
)
def test_a_model_that_a_file_cannot_hold_is_refused_before_weights_are_read(tmp_path, config, message):
    source = resolve(keys(write_folder(tmp_path / "hf", config, plain_tensors(config))))
    weights = {
        name: Stored(tensor.shape, tensor.dtype, lambda: pytest.fail("read")) for name, tensor in source.tensors.items()
    }
    decoder = Model.from_hf(source.config, source.name).config
    with pytest.raises(UserError, match=message):
        gguf_writing.write(tmp_path / "m.gguf", source, weights, decoder, small_tokenizer(), "f32")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_the_text_tower_of_a_multimodal_checkpoint_is_written(tmp_path):
    text = CONFIGS["gemma3"]
    config = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": text}
    _, path = write(tmp_path, config | {"vocab_size": text["vocab_size"]})
    found = resolve(keys(path))
    assert found.config["model_type"] == "gemma3_text"
    assert Model.from_hf(found.config, "found").config == Model.from_hf(text, "text").config


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf_writing, "_write_tensor", full)
    with pytest.raises(RunError, match=r"No space left on device\). Have 0.00 GB free"):
        write(tmp_path, TINY)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


WHOLLY_READ = ("llama", "mistral", "qwen2")
"""Of the others Transformers does not read every number, and so must be told them."""


@pytest.mark.slow
@pytest.mark.parametrize("name", [*WHOLLY_READ, "qwen3", "qwen3-moe", "gemma2", "gemma3", "phi3"])
def test_transformers_computes_the_same_from_the_file(tmp_path, name):
    torch = pytest.importorskip("torch", reason="Transformers' model needs torch")
    pytest.importorskip("accelerate", reason="Transformers reads GGUF files with accelerate")
    from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

    write(tmp_path, CONFIGS[name])
    given = json.loads((tmp_path / "hf" / "config.json").read_text()) | {"pad_token_id": None}
    config = AutoConfig.for_model(given.pop("model_type"), **given)
    told = {} if name in WHOLLY_READ else {"config": config}
    options = {"quantization_config": GgufConfig(dequantize=True), "dtype": torch.float32}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", **told, **options)
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", config=config, dtype=torch.float32)
    tokens_BT = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 24)))
    with torch.no_grad():
        found, right = theirs(tokens_BT).logits, wanted(tokens_BT).logits
    assert right.std() > 0.1
    np.testing.assert_allclose(found.numpy(), right.numpy(), atol=1e-5, rtol=1e-5)
