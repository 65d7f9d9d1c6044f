"""Tensors that hold several weights, weights that are stacked over two axes, and tensors that are no weight at all."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from folders import DTYPES, keys, one_device, tiny_tokenizer, write_folder

from luthier import mesh as mesh_lib
from luthier.checkpoint import huggingface, tensors
from luthier.checkpoint.source import resolve
from luthier.errors import UserError
from luthier.model.model import Model
from luthier.model.param import Param, Part, stacked
from tiny import TINY

N, K, H, D, F, E = 4, 2, 8, 16, 24, 4
LAYERS = (1, 3)  # as in a model whose other layers have no experts
IGNORED = (r"vision_tower\..*", r"model\.layers\.4\..*", r"never\..*")


def made_up_spec():
    """Joined q, k and v, interleaved gate and up, and experts with a tensor each."""

    def qkv(start, count, axis):
        part = Part("n", start, N + 2 * K)
        name = "model.layers.{layer}.qkv_proj.weight"
        return Param(name, "(n h) d -> d n h", ("embed", axis, "head_dim"), (D, count, H), part=part)

    def gate_up(place):
        part = Part("f", place, 2 * F, step=2)
        return Param("model.layers.{layer}.gate_up", "d f -> d f", ("embed", "mlp"), (D, F), part=part)

    expert = Param("model.layers.{layer}.experts.{expert}.up.weight", "f d -> d f", ("embed", "mlp"), (D, F))
    layers = {
        "q": qkv(0, N, "heads"),
        "k": qkv(N, K, "kv_heads"),
        "v": qkv(N + K, K, "kv_heads"),
        "gate": gate_up(0),
        "up": gate_up(1),
        **stacked({"expert": expert}, "expert", range(E)),
    }
    norm = Param("model.norm.weight", "d -> d", ("norm",), (D,), "ones")
    return {"layers": stacked(layers, "layer", LAYERS), "norm": norm}


def made_up_tensors(dtype):
    random, kind = np.random.default_rng(0), DTYPES[dtype]
    shapes = {"model.norm.weight": (D,)}
    for layer in LAYERS:
        shapes[f"model.layers.{layer}.qkv_proj.weight"] = ((N + 2 * K) * H, D)
        shapes[f"model.layers.{layer}.gate_up"] = (D, 2 * F)
        shapes |= {f"model.layers.{layer}.experts.{expert}.up.weight": (F, D) for expert in range(E)}
    return {name: random.standard_normal(shape).astype(kind) for name, shape in shapes.items()}


def beside():
    """What the model leaves out, of whatever type."""
    return {
        "vision_tower.patch.weight": np.linspace(0, 1, 6, dtype=np.float32).reshape(2, 3).astype(DTYPES["bfloat16"]),
        "vision_tower.positions": np.arange(5),
        "model.layers.4.eh_proj.weight": np.full((2, 2), 0.1, np.float16),
    }


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        tensor = found[name].read()
        assert (tensor.dtype, tensor.shape, tensor.tobytes()) == (value.dtype, value.shape, value.tobytes()), name


def saved(tmp_path, values, mesh, *, weights=jnp.float32, ignored=(), **options):
    source = resolve(keys(write_folder(tmp_path / "in", TINY, values)))
    params = huggingface.load(source, made_up_spec(), weights, mesh, ignored)
    huggingface.save(tmp_path / "out", params, made_up_spec(), source, tiny_tokenizer(), **options)
    return tensors.read_folder(tmp_path / "out")


MESHES = {
    "one": one_device,
    "tensor and fsdp": lambda: mesh_lib.make(keys(ici_tensor_parallelism=2, ici_fsdp_parallelism=4)),
    "fsdp": lambda: mesh_lib.make(keys(ici_fsdp_parallelism=8)),
}


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_shared_tensors_come_back_bit_for_bit(tmp_path, dtype, mesh):
    values = made_up_tensors(dtype)
    same(saved(tmp_path, values, MESHES[mesh]()), values)


def test_shared_tensors_come_back_from_weights_of_a_lesser_type(tmp_path):
    values = made_up_tensors("float32")
    wanted = {name: value.astype(DTYPES["bfloat16"]).astype(np.float32) for name, value in values.items()}
    same(saved(tmp_path, values, one_device(), weights=jnp.bfloat16), wanted)


def test_each_weight_is_its_part_of_the_tensor(tmp_path):
    values = made_up_tensors("float32")
    source = resolve(keys(write_folder(tmp_path, TINY, values)))
    params = huggingface.load(source, made_up_spec(), jnp.float32, one_device())
    for place, layer in enumerate(LAYERS):
        joined = values[f"model.layers.{layer}.qkv_proj.weight"].reshape(N + 2 * K, H, D)
        found = {name: np.asarray(params["layers"][name][place]) for name in ("q", "k", "v", "gate", "up", "expert")}
        np.testing.assert_array_equal(found["q"], joined[:N].transpose(2, 0, 1))
        np.testing.assert_array_equal(found["k"], joined[N : N + K].transpose(2, 0, 1))
        np.testing.assert_array_equal(found["v"], joined[N + K :].transpose(2, 0, 1))
        np.testing.assert_array_equal(found["gate"], values[f"model.layers.{layer}.gate_up"][:, 0::2])
        np.testing.assert_array_equal(found["up"], values[f"model.layers.{layer}.gate_up"][:, 1::2])
        for expert in range(E):
            tensor = values[f"model.layers.{layer}.experts.{expert}.up.weight"]
            np.testing.assert_array_equal(found["expert"][expert], tensor.T)


def test_every_entry_of_a_shared_tensor_is_read_once(tmp_path, monkeypatch):
    source = resolve(keys(write_folder(tmp_path, TINY, made_up_tensors("float32"))))
    reads = {name: np.zeros(tensor.shape, int) for name, tensor in source.tensors.items()}

    def counted(name, cut):
        def read(block):
            reads[name][tuple(block)] += 1
            return cut(block)

        return read

    for name, tensor in source.tensors.items():
        cut = counted(name, tensor.cut)
        object.__setattr__(tensor, "cut", cut)
        everything = [slice(0, size) for size in tensor.shape]
        object.__setattr__(tensor, "read", partial(cut, everything))
    huggingface.load(source, made_up_spec(), jnp.float32, one_device())
    for name, times in reads.items():
        assert (times == 1).all(), name


def test_a_shared_tensor_is_asked_for_whole(tmp_path):
    values = made_up_tensors("float32")
    values["model.layers.1.qkv_proj.weight"] = values["model.layers.1.qkv_proj.weight"][: N * H]
    del values["model.layers.3.experts.2.up.weight"]
    source = resolve(keys(write_folder(tmp_path, TINY, values)))
    with pytest.raises(UserError) as caught:
        huggingface.check(source, made_up_spec())
    assert "misshapen: model.layers.1.qkv_proj.weight is 32x16, config.json asks for 64x16" in str(caught.value)
    assert "missing: model.layers.3.experts.2.up.weight 24x16" in str(caught.value)


def test_what_a_model_leaves_out_is_let_pass_by_name_alone(tmp_path):
    values = made_up_tensors("float32") | beside()
    source = resolve(keys(write_folder(tmp_path, TINY, values)))
    huggingface.check(source, made_up_spec(), IGNORED)
    with pytest.raises(UserError) as caught:
        huggingface.check(source, made_up_spec(), IGNORED[:1])
    assert "unexpected: model.layers.4.eh_proj.weight 2x2" in str(caught.value)
    assert "vision_tower" not in str(caught.value)
    words = huggingface.left_out(source, made_up_spec(), IGNORED)
    assert words == r"2 tensors vision_tower\..*, 1 tensor model\.layers\.4\..*"
    assert huggingface.left_out(source, made_up_spec(), ()) == ""


def test_what_a_model_leaves_out_is_saved_as_it_was(tmp_path):
    values = made_up_tensors("bfloat16") | beside()
    found = saved(tmp_path, values, one_device(), ignored=IGNORED, shard_limit=2_000)
    same(found, values)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_what_a_model_leaves_out_keeps_its_types_where_the_weights_change_theirs(tmp_path):
    values = made_up_tensors("float32")
    found = saved(tmp_path, values | beside(), one_device(), ignored=IGNORED, dtype="bfloat16")
    same(found, {name: value.astype(DTYPES["bfloat16"]) for name, value in values.items()} | beside())


def test_a_multimodal_checkpoint_stays_whole_and_transformers_reads_it(tmp_path):
    torch = pytest.importorskip("torch", reason="Transformers' model needs torch")
    from transformers import AutoModelForImageTextToText, Gemma3Config, Gemma3ForConditionalGeneration

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    text = {"num_hidden_layers": 2, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 256}
    vision = {"num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(
        text_config=sizes | text | {"max_position_embeddings": 64},
        vision_config=sizes | vision,
        mm_tokens_per_image=4,
        image_token_index=255,
    )
    torch.manual_seed(0)
    Gemma3ForConditionalGeneration(config).bfloat16().save_pretrained(tmp_path / "in")
    source = resolve(keys(tmp_path / "in"))
    assert source.context_length == 64
    model = Model.from_hf(source.config, source.name)
    params = huggingface.load(source, model.spec, jnp.float32, one_device(), model.config.ignored)
    params = jax.tree.map(lambda x: x * 2, params)  # exact, so that all but the tower is known to be ours
    huggingface.save(tmp_path / "out", params, model.spec, source, tiny_tokenizer())
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == source.config
    towers = ("vision_tower.", "multi_modal_projector.")
    given = {name: tensor.read() for name, tensor in source.tensors.items()}
    same(
        tensors.read_folder(tmp_path / "out"),
        {name: value if name.startswith(towers) else value * value.dtype.type(2) for name, value in given.items()},
    )
    again, report = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    assert again.config.model_type == "gemma3"
