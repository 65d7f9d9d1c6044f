import json
import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from folders import DTYPES, files_of_at_most, keys, one_device, random_tensors, spec_of, tiny_tokenizer, write_folder

from luthier import mesh as mesh_lib
from luthier.checkpoint import folder as whole
from luthier.checkpoint import huggingface, tensors
from luthier.checkpoint.card import model_card
from luthier.checkpoint.source import resolve
from luthier.errors import RunError, UserError
from luthier.model import param
from tiny import CONFIGS, KINDS, TINY, torch_twin


def round_trip(tmp_path, config, values, mesh, dtype="auto", **options):
    source = resolve(keys(write_folder(tmp_path / "in", config, values)))
    params = huggingface.load(source, spec_of(config), jnp.float32, mesh)
    huggingface.save(tmp_path / "out", params, spec_of(config), source, tiny_tokenizer(), dtype=dtype, **options)
    return {name: tensor.read() for name, tensor in tensors.read_folder(tmp_path / "out").items()}


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype, name
        assert found[name].tobytes() == value.tobytes(), name


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("name", ["llama3.1", "llama-biased", "smollm2"])
def test_load_then_save_gives_back_every_bit(tmp_path, name, dtype):
    values = random_tensors(CONFIGS[name], dtype)
    same(round_trip(tmp_path, CONFIGS[name], values, one_device()), values)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype


@pytest.mark.parametrize(
    "axes", [{"ici_fsdp_parallelism": 8}, {"ici_tensor_parallelism": 2, "ici_fsdp_parallelism": 4}]
)
def test_eight_devices_give_back_every_bit_too(tmp_path, axes):
    values = random_tensors(TINY, "bfloat16")
    same(round_trip(tmp_path, TINY, values, mesh_lib.make(keys(**axes))), values)


def test_each_device_holds_its_part_of_what_one_would_hold(tmp_path):
    values = random_tensors(TINY)
    source = resolve(keys(write_folder(tmp_path, TINY, values)))
    whole = huggingface.load(source, spec_of(TINY), jnp.float32, one_device())
    mesh = mesh_lib.make(keys(ici_fsdp_parallelism=4, ici_tensor_parallelism=2))
    parts = huggingface.load(source, spec_of(TINY), jnp.float32, mesh)
    jax.tree.map(np.testing.assert_array_equal, parts, whole)
    q = parts["layers"]["0"]["attention"]["q"]
    assert q.sharding == mesh_lib.sharding(("layer", "embed", "heads", "head_dim"), q.shape, mesh)
    assert q.addressable_shards[0].data.shape == (3, 16, 2, 16)


def test_shards_are_read_and_written(tmp_path):
    values = random_tensors(TINY, "float16")
    same(round_trip(tmp_path / "one", TINY, values, one_device(), shard_limit=40_000), values)
    files = sorted(path.name for path in (tmp_path / "one" / "out").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert all((tmp_path / "one" / "out" / file).stat().st_size < 45_000 for file in files)
    source = resolve(keys(tmp_path / "one" / "out"))
    params = huggingface.load(source, spec_of(TINY), jnp.float32, one_device())
    np.testing.assert_array_equal(params["embed"], values["model.embed_tokens.weight"].astype(np.float32))


def test_mixed_types_are_kept_under_auto(tmp_path):
    values = random_tensors(TINY, "bfloat16")
    values["model.norm.weight"] = values["model.norm.weight"].astype(np.float32)
    same(round_trip(tmp_path, TINY | {"torch_dtype": "bfloat16"}, values, one_device()), values)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_save_dtype_is_what_is_written(tmp_path):
    values = random_tensors(TINY, "float32")
    found = round_trip(tmp_path, TINY | {"torch_dtype": "float32"}, values, one_device(), dtype="bfloat16")
    same(found, {name: value.astype(DTYPES["bfloat16"]) for name, value in values.items()})
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_what_must_be_exact_is_fp32_whatever_the_others_are(tmp_path):
    config = KINDS["deepseek-v3"]
    values = random_tensors(config)
    source, spec, mesh = resolve(keys(write_folder(tmp_path, config, values))), spec_of(config), one_device()
    loaded = huggingface.load(source, spec, jnp.bfloat16, mesh)
    random = param.initialise(spec, jax.random.key(0), jnp.bfloat16, mesh)
    for weights in (loaded, random, param.abstract(spec, jnp.bfloat16, mesh)):
        mlp = weights["layers"]["1"]["mlp"]
        assert (mlp["correction"].dtype, mlp["router"].dtype) == (jnp.float32, jnp.bfloat16)
    for number, correction_E in enumerate(loaded["layers"]["1"]["mlp"]["correction"], start=1):
        name = f"model.layers.{number}.mlp.gate.e_score_correction_bias"
        np.testing.assert_array_equal(correction_E, values[name])


def test_what_is_loaded_can_be_donated(tmp_path):
    source = resolve(keys(write_folder(tmp_path, TINY, random_tensors(TINY))))
    params = huggingface.load(source, spec_of(TINY), jnp.float32, one_device())
    places = [array.unsafe_buffer_pointer() for array in jax.tree.leaves(params)]
    stepped = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)(params)
    assert [array.unsafe_buffer_pointer() for array in jax.tree.leaves(stepped)] == places


def test_every_fault_is_listed_at_once_before_any_value_is_read(tmp_path):
    values = random_tensors(TINY)
    del values["model.layers.1.mlp.up_proj.weight"]
    values["model.norm.weight"] = np.zeros(63, np.float32)
    values["model.layers.3.mlp.up_proj.weight"] = np.zeros((2, 3), np.float32)
    values["lm_head.weight"] = np.zeros((256, 64), np.int8)
    source = resolve(keys(write_folder(tmp_path, TINY, values)))
    with pytest.raises(UserError) as caught:
        huggingface.check(source, spec_of(TINY))
    message = str(caught.value)
    assert "4 tensors do not fit" in message
    assert "missing: model.layers.1.mlp.up_proj.weight 128x64" in message
    assert "misshapen: model.norm.weight is 63, config.json asks for 64" in message
    assert "unexpected: model.layers.3.mlp.up_proj.weight 2x3" in message
    assert "lm_head.weight is int8" in message


def test_a_long_list_of_faults_is_cut_with_its_count(tmp_path):
    source = resolve(keys(write_folder(tmp_path, TINY, {})))
    with pytest.raises(UserError, match=r"30 tensors do not fit(.|\n)*and 10 more"):
        huggingface.check(source, spec_of(TINY))


def test_what_old_checkpoints_hold_besides_is_ignored(tmp_path):
    config = CONFIGS["smollm2"]
    values = random_tensors(config)
    extra = {
        "lm_head.weight": values["model.embed_tokens.weight"],
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(8, np.float32),
    }
    same(round_trip(tmp_path, config, values | extra, one_device()), values)


def test_the_folder_is_whole(tmp_path):
    config = TINY | {"rope_scaling": None, "something_of_their_own": [1]}
    folder = write_folder(tmp_path / "in", config, random_tensors(config))
    (folder / "generation_config.json").write_text('{"temperature": 0.6}')
    source = resolve(keys(folder))
    params = huggingface.load(source, spec_of(config), jnp.float32, one_device())
    card = model_card(source, "sft", "rows.jsonl", {"learning_rate": 1e-5, "train_data_columns": ["messages"]})
    tokenizer = tiny_tokenizer()
    huggingface.save(tmp_path / "out", params, spec_of(config), source, tokenizer, chat_template="{{ 1 }}", card=card)
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert json.loads((out / "config.json").read_text()) == config | {"dtype": "float32"}
    assert json.loads((out / "generation_config.json").read_text()) == {"temperature": 0.6}
    assert (out / "chat_template.jinja").read_text() == "{{ 1 }}"
    readme = (out / "README.md").read_text()
    assert readme.startswith("---\nlibrary_name: transformers\n")
    assert "| `learning_rate` | `1e-05` |" in readme
    assert "rows.jsonl" in readme
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_failed_save_leaves_the_last_good_model_and_the_next_one_replaces_it(tmp_path):
    values = random_tensors(TINY)
    same(round_trip(tmp_path, TINY, values, one_device()), values)
    source = resolve(keys(tmp_path / "in"))
    params = huggingface.load(source, spec_of(TINY), jnp.float32, one_device())
    zeros = jax.tree.map(jnp.zeros_like, params)

    class Broken:
        def __init__(self, error):
            self.error = error

        def save_pretrained(self, folder):
            raise self.error

    # The tokenizers library raises its own kind; the last is a fault of ours, and not the disk's.
    for error, message in (
        (OSError(28, "No space left on device"), r"No space left on device\). The model that was there before stands"),
        (Exception("No space left on device (os error 28)"), r"could not be written \(No space left on device\)"),
        (PermissionError(13, "Permission denied"), r"could not be written \(Permission denied\)"),
    ):
        with pytest.raises(RunError, match=message):
            huggingface.save(tmp_path / "out", zeros, spec_of(TINY), source, Broken(error))
    with pytest.raises(KeyError, match="bug"):
        huggingface.save(tmp_path / "out", zeros, spec_of(TINY), source, Broken(KeyError("bug")))
    same({name: tensor.read() for name, tensor in tensors.read_folder(tmp_path / "out").items()}, values)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    huggingface.save(tmp_path / "out", zeros, spec_of(TINY), source, tiny_tokenizer())
    found = tensors.read_folder(tmp_path / "out")["model.norm.weight"].read()
    np.testing.assert_array_equal(found, np.zeros(64))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_a_disk_too_small_for_the_weights_says_what_they_need(tmp_path):
    source = resolve(keys(write_folder(tmp_path / "in", TINY, random_tensors(TINY))))
    params = huggingface.load(source, spec_of(TINY), jnp.float32, one_device())
    with pytest.raises(RunError) as caught, files_of_at_most(100_000):
        huggingface.save(tmp_path / "out", params, spec_of(TINY), source, tiny_tokenizer())
    assert str(caught.value).startswith(
        f"{tmp_path / 'out'}: the model could not be written (File too large). No model"
    )
    assert "Have 0.00 GB free" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_an_old_model_is_put_back_where_the_new_one_cannot_be(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(FileNotFoundError):
        whole._replace(tmp_path / "nowhere", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_random_weights_are_saved_in_their_own_type(tmp_path):
    write_folder(tmp_path / "in", TINY | {"architectures": None}, {})
    source = resolve(keys("random", model_name=str(tmp_path / "in")))
    params = param.initialise(spec_of(TINY), jax.random.key(0), jnp.bfloat16, one_device())
    huggingface.save(tmp_path / "out", params, spec_of(TINY), source, tiny_tokenizer())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["dtype"], config["architectures"]) == ("bfloat16", ["LlamaForCausalLM"])
    found = {name: tensor.shape for name, tensor in tensors.read_folder(tmp_path / "out").items()}
    assert found == dict(param.tensor_shapes(spec_of(TINY)))


@pytest.mark.parametrize("name", ["llama3.1", "smollm2"])
def test_transformers_reads_what_is_saved_and_the_other_way_round(tmp_path, name):
    pytest.importorskip("torch", reason="Transformers' model needs torch")
    from transformers import AutoModelForCausalLM

    model = torch_twin(CONFIGS[name])
    model.save_pretrained(tmp_path / "in")
    source = resolve(keys(tmp_path / "in"))
    params = huggingface.load(source, spec_of(source.config), jnp.float32, one_device())
    huggingface.save(tmp_path / "out", params, spec_of(source.config), source, tiny_tokenizer())
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    for key, value in model.state_dict().items():
        assert (again.state_dict()[key] == value).all(), key


MEMORY = """
import resource, sys
from pathlib import Path
import jax, jax.numpy as jnp
from folders import one_device, keys, spec_of, tiny_tokenizer
from luthier.checkpoint import huggingface
from luthier.checkpoint.source import resolve

def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024

folder = Path(sys.argv[1])
for name in ("small", "big"):  # the small one first brings in what is the same for any size
    source = resolve(keys(folder / name))
    spec = spec_of(source.config)
    before = peak()
    params = huggingface.load(source, spec, jnp.float32, one_device())
    loaded = peak()
    huggingface.save(folder / "out", params, spec, source, tiny_tokenizer())
    saved = peak()
size = sum(x.nbytes for x in jax.tree.leaves(params))
largest = max(t.nbytes for t in source.tensors.values())
print((loaded - before - size) / largest, (saved - before - size) / largest)
"""


@pytest.mark.multiprocess
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak memory from /proc")
def test_memory_stays_at_the_model_and_two_tensors(tmp_path):
    """160 MB in 24 layers; the largest stack is 48 MB, the largest tensor 16 MB."""
    big = TINY | {"hidden_size": 256, "intermediate_size": 2048, "num_hidden_layers": 24, "vocab_size": 16384}
    for name, config in (("small", TINY), ("big", big)):
        write_folder(tmp_path / name, config, random_tensors(config))
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    paths = {"PYTHONPATH": ":".join(sys.path), "JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"}
    paths["MALLOC_MMAP_THRESHOLD_"] = "1048576"  # what is freed goes back at once, so that the peak is what was held
    done = subprocess.run(command, check=True, timeout=120, capture_output=True, text=True, env=paths)
    load, save = map(float, done.stdout.split())
    assert load <= 2.75, done.stdout  # largest tensors above the model; the rest is compiled programs
    assert save <= 2.75, done.stdout


TWO_PROCESSES = """
import sys
from pathlib import Path
import jax
jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]))
import jax.numpy as jnp
import numpy as np
from folders import keys, spec_of, tiny_tokenizer
from luthier import mesh as mesh_lib
from luthier.checkpoint import huggingface
from luthier.checkpoint.source import resolve
from luthier.checkpoint.state import Checkpoints

folder, process = Path(sys.argv[3]), jax.process_index()
source = resolve(keys(folder / "in"))
spec = spec_of(source.config)
params = huggingface.load(source, spec, jnp.float32, mesh_lib.make(keys(ici_fsdp_parallelism=4)))
assert jax.process_count() == 2 and not params["embed"].is_fully_addressable
huggingface.save(folder / "out", params, spec, source, tiny_tokenizer())
data = {"row": 3, "note": "é"}
with Checkpoints(folder / "checkpoints") as checkpoints:
    checkpoints.save(3, params, data)
with Checkpoints(folder / "checkpoints") as checkpoints:
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params)
    again, found = checkpoints.restore(abstract)
assert found == data
for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True):
    for mine, theirs in zip(one.addressable_shards, other.addressable_shards, strict=True):
        np.testing.assert_array_equal(mine.data, theirs.data)
"""


@pytest.mark.multiprocess
def test_two_processes_load_save_and_resume_together(tmp_path):
    values = random_tensors(TINY, "bfloat16")
    write_folder(tmp_path / "in", TINY, values)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", TWO_PROCESSES, port]
    children = [
        subprocess.Popen([*command, str(process), str(tmp_path)], env=os.environ | flags) for process in range(2)
    ]
    assert [child.wait(timeout=120) for child in children] == [0, 0]
    same({name: tensor.read() for name, tensor in tensors.read_folder(tmp_path / "out").items()}, values)
