"""MaxText's checkpoints: its trees, what is in them, there and back; and beside MaxText itself, where it is installed.

`maxtext_arrays.json` was written down from MaxText 0.2.5 by `maxtext_peer.py`: the paths and shapes of its own models,
and checksums of what its `to_maxtext` makes of the weights in `maxtext_models.py`.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from folders import keys, one_device, smollm2
from maxtext_models import CONFIGS, arguments, multimodal, tensors, write_model

from luthier import cli
from luthier.checkpoint import huggingface, maxtext
from luthier.checkpoint import tensors as files
from luthier.checkpoint import tokenizer as tokenizer_lib
from luthier.checkpoint.maxtext_families import describe, vocabulary
from luthier.checkpoint.source import resolve
from luthier.errors import UserError
from luthier.model import published
from luthier.model.compute import Compute
from luthier.model.model import Model
from luthier.types import Batch
from tiny import KINDS

PYTHON = os.environ.get("MAXTEXT_PYTHON", sys.executable)
RECORDED = json.loads(Path(__file__).with_name("maxtext_arrays.json").read_text())
LAYOUTS = [pytest.param(name, scan, id=f"{name}-{scan}") for name in CONFIGS for scan in ("true", "false")]


def convert(*arguments):
    assert cli.main(["convert", *map(str, arguments)]) == 0


def to_maxtext(path, output, scan="true", *more):
    """Return the items of ``path`` as we convert it."""
    arguments = (f"load_parameters_path={path}", f"output_path={output}", "output_format=maxtext")
    convert(*arguments, f"scan_layers={scan}", *more)
    return output / "0" / "items"


def arrays(items):
    """{path: array} of what lies there."""
    return {path: maxtext._read_array(items, entry) for path, entry in maxtext._arrays(items).items()}


def checksum(array):
    return zlib.crc32(np.ascontiguousarray(array).tobytes())


def read(source):
    return {name: tensor.read() for name, tensor in source.tensors.items()}


def save_tree(items, tree):
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(items.absolute(), tree)


def nested(flat, *more):
    tree = {}
    for path, value in flat.items():
        place, parts = tree, (*path.split("/"), *more)
        for part in parts[:-1]:
            place = place.setdefault(part, {})
        place[parts[-1]] = value
    return tree


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A function that returns the items of a model of CONFIGS, converted once."""
    top, known = tmp_path_factory.mktemp("maxtext"), {}

    def make(name, scan="true"):
        folder = top / name
        if not folder.exists():
            write_model(folder, CONFIGS[name], tensors(CONFIGS[name]))
        if (name, scan) not in known:
            known[name, scan] = to_maxtext(folder, top / f"{name}-{scan}", scan)
        return known[name, scan]

    return make


@pytest.mark.parametrize("kind", ["scanned", "unscanned"])
def test_what_maxtext_converted_is_read_to_the_bit(data_folder, kind):
    folder = data_folder / "maxtext"
    given = folder / "llama3.1-tiny-hf"
    source = resolve(keys(folder / f"llama3.1-tiny-{kind}" / "0" / "items", model_name=str(given)))
    wanted, found = files.read_folder(given), read(source)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (source.tensors[name].shape, source.tensors[name].dtype) == (tensor.shape, tensor.dtype)
        np.testing.assert_array_equal(found[name], tensor.read(), err_msg=name)


@pytest.mark.parametrize(("name", "scan"), LAYOUTS)
def test_the_arrays_are_those_that_maxtext_makes(made, name, scan):
    recorded, found = RECORDED[name][scan], arrays(made(name, scan))
    assert {path: list(array.shape) for path, array in found.items()} == {
        path: entry[0] for path, entry in recorded.items()
    }
    sums = {path: zlib.crc32(np.ascontiguousarray(array).tobytes()) for path, array in found.items()}
    assert sums == {path: entry[1] or sums[path] for path, entry in recorded.items()}


@pytest.mark.parametrize(("name", "scan"), LAYOUTS)
def test_there_and_back_is_the_same(made, name, scan):
    items = made(name, scan)
    source = resolve(keys(items))  # whose config lies beside it
    wanted, found = tensors(CONFIGS[name]), read(source)
    assert found.keys() == wanted.keys()
    for tensor, values in wanted.items():
        np.testing.assert_array_equal(found[tensor], values, err_msg=tensor)


@pytest.mark.parametrize("name", ["llama3.1-8b", "gemma2-2b", "gemma3-4b"])
def test_bfloat16_comes_back_though_it_is_changed(tmp_path, name):
    """A head of 18 and a width of 72: factors that are no powers of two."""
    sizes = {"head_dim": 18, "hidden_size": 72, "query_pre_attn_scalar": 18}
    config = CONFIGS[name] | sizes
    given = tensors(config, ml_dtypes.bfloat16)
    items = to_maxtext(write_model(tmp_path / "hf", config, given), tmp_path / "out")
    kinds = {path: str(array.dtype) for path, array in arrays(items).items()}
    assert set(kinds.values()) == {"bfloat16", "float32"}
    convert(f"load_parameters_path={items}", f"output_path={tmp_path / 'back'}")
    back = files.read_folder(tmp_path / "back")
    assert back.keys() == given.keys()
    for tensor, values in given.items():
        assert back[tensor].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(back[tensor].read(), values, err_msg=tensor)


def test_the_type_asked_for_is_written(tmp_path):
    folder = write_model(tmp_path / "hf", CONFIGS["gemma2-2b"], tensors(CONFIGS["gemma2-2b"]))
    found = arrays(to_maxtext(folder, tmp_path / "out", "true", "dtype=bfloat16"))
    assert {str(array.dtype) for array in found.values()} == {"bfloat16"}


def trainers(flat):
    """The ways in which MaxText's trainers have saved the same parameters."""
    optimizer = {"mu": nested(flat), "count": np.zeros((), np.int32)}
    listed = {path.replace("layers_", "layers/", 1): array for path, array in flat.items()}
    nnx = nested(flat | {"decoder/dropout/rngs/count": np.zeros((2,), np.uint32)}, "value")
    return {
        "whole state": {"params": {"params": nested(flat)}, "opt_state": optimizer, "step": 3},
        "one params": {"params": nested(flat)},
        "nnx": nnx,
        "nnx for rl": {"base": nested(flat, "value")},
        "nnx with lists of layers": nested(listed, "value"),
    }


@pytest.mark.parametrize("trainer", ["whole state", "one params", "nnx", "nnx for rl", "nnx with lists of layers"])
def test_what_every_trainer_saves_is_read(tmp_path, made, trainer):
    flat = arrays(made("qwen3-0.6b", "false"))
    save_tree(tmp_path / "items", trainers(flat)[trainer])
    found = read(resolve(keys(tmp_path / "items", model_name=str(made("qwen3-0.6b").parents[1]))))
    for name, values in tensors(CONFIGS["qwen3-0.6b"]).items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


@pytest.mark.parametrize("name", ["llama3.1-8b", "qwen3-30b-a3b"])
def test_layers_may_be_stacked_along_another_axis(tmp_path, made, name):
    """MaxText's `param_scan_axis=0`."""
    flat, model = arrays(made(name)), str(made(name).parents[1])
    moved = {path: np.moveaxis(array, 1, 0) if "/layers/" in path else array for path, array in flat.items()}
    save_tree(tmp_path / "items", {"params": {"params": nested(moved)}})
    found = read(resolve(keys(tmp_path / "items", model_name=model)))
    for tensor, values in tensors(CONFIGS[name]).items():
        np.testing.assert_array_equal(found[tensor], values, err_msg=tensor)


def test_the_newest_step_of_a_run_is_meant(tmp_path, made):
    flat, model = arrays(made("qwen3-0.6b")), str(made("qwen3-0.6b").parents[1])
    for step in (9, 10):
        changed = {path: array * np.float32(step) for path, array in flat.items()}
        save_tree(tmp_path / "run" / "checkpoints" / str(step) / "items", {"params": {"params": nested(changed)}})
    for place, step in (("", 10), ("checkpoints", 10), ("checkpoints/9", 9), ("checkpoints/9/items", 9)):
        norm = resolve(keys(tmp_path / "run" / place, model_name=model)).tensors["model.norm.weight"].read()
        np.testing.assert_array_equal(norm, flat["decoder/decoder_norm/scale"] * np.float32(step))


@pytest.mark.parametrize("name", ["llama3.1-8b", "qwen3-30b-a3b", pytest.param("gemma3-4b", marks=pytest.mark.slow)])
def test_an_array_is_read_once_and_let_go(made, monkeypatch, name):
    items, seen = made(name), []
    one = maxtext._read_array
    monkeypatch.setattr(maxtext, "_read_array", lambda items, entry: seen.append(entry.keys) or one(items, entry))
    source = resolve(keys(items))
    read(source)
    assert len(seen) == len(set(seen)) == len(maxtext._arrays(items))
    model = Model.from_hf(source.config, name)
    huggingface.load(source, model.spec, jnp.float32, one_device())  # in the order of our arrays
    assert len(seen) == 2 * len(set(seen))


@pytest.mark.parametrize(("name", "size", "theirs"), [("gemma2-2b", 256_000, 256_128), ("gemma3-4b", 262_208, 262_144)])
def test_maxtexts_own_vocabularies(tmp_path, name, size, theirs):
    small = {"vocab_size": size, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    config = CONFIGS[name] | small | {"num_key_value_heads": 1, "head_dim": 4, "num_hidden_layers": 6}
    given = tensors(config, ml_dtypes.bfloat16)
    if name == "gemma2-2b":
        folder = write_model(tmp_path / "hf", config, given)
    else:
        renamed = {f"language_model.{each}": values for each, values in given.items()}
        tower = {"vision_tower.patch": np.zeros(3, np.float32)}
        folder = write_model(tmp_path / "hf", multimodal(config), renamed | tower)
    items = to_maxtext(folder, tmp_path / "out")
    assert arrays(items)["token_embedder/embedding"].shape == (theirs, 8)
    back = resolve(keys(items, model_name=str(folder)))
    assert back.config["model_type"] == config["model_type"]
    embedding = back.tensors["model.embed_tokens.weight"]
    assert embedding.shape == (min(size, theirs), 8)
    np.testing.assert_array_equal(embedding.read(), given["model.embed_tokens.weight"][:theirs])
    assert Model.from_hf(back.config, "back").config.vocab_size == min(size, theirs)


@pytest.mark.parametrize(
    ("name", "scaled"),
    [("meta-llama/Llama-3.1-8B", True), ("meta-llama/Llama-3.3-70B-Instruct", False), ("Qwen/Qwen3-8B", False)],
)
def test_which_models_turn_pairs(name, scaled):
    found = published.find(name)
    rule = describe(found.config, name, "here")["decoder/layers/self_attention/query/kernel"].rule
    assert ("two half" in rule.layout) == scaled


def test_a_released_model_needs_no_network(tmp_path, made):
    """Its config is known here; what does not fit is told by name."""
    with pytest.raises(UserError) as error:
        _ = resolve(keys(made("llama3.1-8b"), model_name="llama3.1-8b")).tensors
    assert "arrays do not fit meta-llama/Llama-3.1-8B" in str(error.value)
    assert "misshapen: decoder/layers/mlp/wi_0/kernel is 64x3x128, the model has 4096x32x14336" in str(error.value)
    with pytest.raises(UserError, match="no-such-model"):
        resolve(keys(made("llama3.1-8b"), model_name="no-such-model"))


def lora(tree):
    tree["decoder"]["layers"]["mlp"]["wi_0"]["kernel_lora_a"] = np.zeros((2, 2), np.float32)


def quantised(tree):
    tree["decoder"]["layers"]["mlp"]["wi_0"] = {"AqtDotGeneral_0": {"qrhs": {"frozen": np.zeros((3, 2), np.int8)}}}


def without(tree):
    del tree["decoder"]["decoder_norm"]


def counted(tree):
    tree["decoder"]["decoder_norm"]["scale"] = np.zeros((64,), np.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lora, "an adapter in MaxText's layout. Merge it with MaxText's `to_huggingface`"),
        (quantised, "unexpected: decoder/layers/mlp/wi_0/AqtDotGeneral_0/qrhs/frozen 3x2"),
        (without, "missing: decoder/decoder_norm/scale 64"),
        (counted, "not a float: decoder/decoder_norm/scale is int32"),
        (
            lambda tree: tree.clear() or tree.update(other={"a": np.zeros(3)}),
            "without MaxText's parameters .it holds params",
        ),
    ],
)
def test_other_trees_are_told_by_name(tmp_path, made, change, message):
    tree = nested(arrays(made("qwen3-0.6b")))
    change(tree)
    save_tree(tmp_path / "items", {"params": {"params": tree}})
    with pytest.raises(UserError, match=message):
        _ = resolve(keys(tmp_path / "items", model_name=str(made("qwen3-0.6b").parents[1]))).tensors


@pytest.mark.parametrize("what", ["data", "metadata", "manifest"])
def test_a_damaged_checkpoint_is_told(tmp_path, made, what):
    shutil.copytree(made("qwen3-0.6b").parents[1], tmp_path / "m")
    items = tmp_path / "m" / "0" / "items"
    if what == "metadata":
        (items / "_METADATA").write_text("{")
    elif what == "manifest":
        for path in items.rglob("manifest.ocdbt"):
            path.unlink()
    else:
        for path in (path for path in items.rglob("*") if path.parent.name == "d"):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=r"items: .*Copy (it|the checkpoint) again") as error:
        read(resolve(keys(items)))
    assert "tensorstore_spec" not in str(error.value)


def test_a_checkpoint_does_not_say_of_which_model_it_is(data_folder):
    with pytest.raises(UserError, match=r"does not say of which model it is\. Set model_name to its MaxText name"):
        resolve(keys(data_folder / "maxtext" / "llama3.1-tiny-scanned" / "0" / "items"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (KINDS["deepseek-v3"], "model_type deepseek_v3 cannot be in MaxText's layout here"),
        (CONFIGS["llama2-7b"] | {"attention_bias": True}, "llama has no place for model.layers.0.self_attn"),
        (CONFIGS["gemma2-2b"] | {"num_hidden_layers": 3}, "num_hidden_layers=3 is odd"),
        (KINDS["gemma3-text"], "with 5 sliding layers before each full one"),
    ],
)
def test_what_has_no_place_there_is_refused_before_anything_is_written(tmp_path, capsys, config, message):
    folder = write_model(tmp_path / "hf", config, tensors(config))
    command = ["convert", f"load_parameters_path={folder}", f"output_path={tmp_path / 'out'}", "output_format=maxtext"]
    assert cli.main(command) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_a_full_disk_leaves_nothing(tmp_path, capsys):
    """The system's limit on the size of files stands in for the disk's."""
    folder = write_model(tmp_path / "hf", CONFIGS["qwen3-0.6b"], tensors(CONFIGS["qwen3-0.6b"]))
    command = ["convert", f"load_parameters_path={folder}", f"output_path={tmp_path / 'out'}", "output_format=maxtext"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        assert cli.main(command) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    said = capsys.readouterr().err
    assert "the checkpoint could not be written (File too large)" in said
    assert "Traceback" not in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_values_beyond_float16_are_refused(tmp_path, capsys):
    weights = tensors(CONFIGS["qwen3-0.6b"])
    weights["model.norm.weight"][3] = 1e6
    folder = write_model(tmp_path / "hf", CONFIGS["qwen3-0.6b"], weights)
    command = ["convert", f"load_parameters_path={folder}", f"output_path={tmp_path / 'out'}", "output_format=maxtext"]
    assert cli.main([*command, "dtype=float16"]) == 2
    assert "model.norm.weight has values beyond float16's 65504" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_what_is_written_is_a_model_by_itself(tmp_path, made):
    root = made("llama3.1-8b").parents[1]
    source = resolve(keys(root))
    assert (source.kind, source.hub_id) == ("maxtext", "")
    assert (
        tokenizer_lib.load(source)("a bee").input_ids
        == tokenizer_lib.load(resolve(keys(root.parent / "llama3.1-8b")))("a bee").input_ids
    )
    assert json.loads((root / "0" / "_CHECKPOINT_METADATA").read_text())["custom_metadata"] == {"scan_layers": True}


@pytest.mark.slow
def test_smollm2_through_maxtexts_layout_is_the_same(tmp_path):
    given = read(resolve(keys(smollm2())))
    items = to_maxtext(smollm2(), tmp_path / "out")
    found = read(resolve(keys(items)))
    assert found.keys() == given.keys()
    for name, values in given.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)
    assert vocabulary("llama", len(given["model.embed_tokens.weight"])) == len(given["model.embed_tokens.weight"])


@pytest.mark.slow
def test_memory_stays_at_an_array(tmp_path):
    """A model of 330 MB: the process takes far less than it more than one of 14 MB does, in both directions."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "head_dim": 64}

    def peak(*arguments):
        script = (
            "import resource, sys\nfrom luthier import cli\nassert cli.main(sys.argv[1:]) == 0\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        command = [sys.executable, "-c", script, "convert", *map(str, arguments)]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / 1024

    there, back = {}, {}
    for layers in (1, 24):
        config = CONFIGS["llama3.1-8b"] | sizes | {"num_hidden_layers": layers}
        folder, out = write_model(tmp_path / f"{layers}", config, tensors(config)), tmp_path / f"{layers}-out"
        there[layers] = peak(f"load_parameters_path={folder}", f"output_path={out}", "output_format=maxtext")
        back[layers] = peak(f"load_parameters_path={out}", f"output_path={tmp_path / f'{layers}-back'}")
    largest = 24 * 512 * 2048 * 4 / 2**20  # of 6 or 7 such arrays
    assert there[24] - there[1] < 2.5 * largest
    assert back[24] - back[1] < 2.5 * largest


def logits(folder, config, tokens_BT, rounds_head):
    """Our logits; ``rounds_head``: as MaxText computes a head that is the embedding, which it rounds to bfloat16."""
    source, model = resolve(keys(folder)), Model.from_hf(config, "given")
    params = huggingface.load(source, model.spec, jnp.float32, one_device())
    ones_BT = np.ones_like(tokens_BT)
    batch = Batch(
        tokens_BT, np.broadcast_to(np.arange(tokens_BT.shape[1], dtype=np.int32), tokens_BT.shape), ones_BT, ones_BT
    )
    with jax.default_matmul_precision("highest"):
        if not rounds_head:
            return np.asarray(model.logits(params, batch, Compute()))
        hidden_BTD = np.asarray(model.hidden(params, batch, Compute()), np.float32)
    embedding_VD = read(source)["model.embed_tokens.weight"]
    width = np.float32(model.config.hidden_size**0.5) if "gemma" in config["model_type"] else np.float32(1)
    found = hidden_BTD @ (embedding_VD * width).astype(ml_dtypes.bfloat16).astype(np.float32).T / width
    cap = model.config.softcap
    return np.tanh(found / cap) * cap if cap else found


def job(folder, name):
    """What MaxText is to do with a model of CONFIGS."""
    given, config = tensors(CONFIGS[name]), CONFIGS[name]
    hf = write_model(folder / "hf", config, given)
    ours = {scan: str(to_maxtext(hf, folder / f"ours-{scan}", scan)) for scan in ("true", "false")}
    if name == "gemma3-4b":  # which its converter knows by the names of a multimodal checkpoint
        renamed = {each.replace("model.", "model.language_model.", 1): values for each, values in given.items()}
        config = multimodal(config)
        hf = write_model(folder / "multimodal", config, renamed)
    tokens = np.random.default_rng(1).integers(3, 272, (1, 24)).tolist()
    return {
        "name": name, "arguments": arguments(name), "config": config, "folder": str(hf), "ours": ours,
        "tokens": tokens, "output": str(folder / "out"),
    }  # fmt: skip


# What MaxText 0.2.5 cannot do: stack the routers of Mixtral, and write the biases of Qwen 2.5.
BEYOND_IT = {"mixtral-8x7b": {"theirs-true"}, "qwen2.5-7b": {"back-true", "back-false"}}
BEYOND_IT["qwen2.5-1.5b"] = BEYOND_IT["qwen2.5-7b"]


def seen(output, scan):
    """{path: shape, and checksum where MaxText's converter made the array}."""
    tree, theirs = json.loads((output / f"tree-{scan}.json").read_text()), output / f"theirs-{scan}" / "0" / "items"
    sums = {path: checksum(array) for path, array in arrays(theirs).items()} if theirs.exists() else {}
    return {path: [shape, sums.get(path)] for path, shape in sorted(tree.items())}


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", CONFIGS)
def test_maxtext_itself_reads_and_computes_the_same(tmp_path, name):
    if subprocess.run([PYTHON, "-c", "import maxtext"], capture_output=True, check=False).returncode:
        pytest.skip(f"{PYTHON} has no maxtext: install it (Python 3.12), and name that one in MAXTEXT_PYTHON")
    case, config, given = job(tmp_path, name), CONFIGS[name], tensors(CONFIGS[name])
    (tmp_path / "job.json").write_text(json.dumps([case]))
    command = [PYTHON, Path(__file__).with_name("maxtext_peer.py"), tmp_path / "job.json"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    failed = json.loads(done.stdout.strip().split("\n")[-1])[name]
    assert failed.keys() == BEYOND_IT.get(name, set()), failed
    output = tmp_path / "out"
    wanted_BTV = logits(tmp_path / "hf", config, np.asarray(case["tokens"], np.int32), config["tie_word_embeddings"])
    for scan in ("true", "false"):
        assert seen(output, scan) == RECORDED[name][scan]
        found_BTV = np.load(output / f"logits-{scan}.npz")["logits"]
        np.testing.assert_allclose(found_BTV, wanted_BTV, atol=2e-5)
        if not (output / f"back-{scan}").exists() or failed:
            continue
        back = files.read_folder(output / f"back-{scan}")
        for tensor, values in given.items():
            theirs = tensor.replace("model.", "model.language_model.", 1) if name == "gemma3-4b" else tensor
            np.testing.assert_allclose(back[theirs].read(), values, rtol=2e-7, atol=2e-7, err_msg=tensor)
