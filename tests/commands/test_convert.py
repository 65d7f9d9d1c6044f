"""`luthier convert`, as a user runs it."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from folders import keys, one_device, smollm2
from peft_models import ADAPTERS, CONFIGS, write_adapter, write_base

from luthier import cli
from luthier.checkpoint import huggingface, tensors
from luthier.checkpoint import tokenizer as tokenizer_lib
from luthier.checkpoint.source import resolve
from luthier.model.compute import Compute
from luthier.model.model import Model
from luthier.types import Batch
from tiny import stored_tensors, write_model


def convert(*arguments):
    return cli.main(["convert", *map(str, arguments)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "hf"
    write_model(path)
    give_merge(path)
    return path


def give_merge(path):
    """A tokenizer without merges cannot be in a GGUF file."""
    state = json.loads((path / "tokenizer.json").read_text())
    state["model"]["vocab"]["ee"] = 259
    state["model"]["merges"] = [["e", "e"]]
    (path / "tokenizer.json").write_text(json.dumps(state))


def read(path):
    return {name: tensor.read() for name, tensor in resolve(keys(path)).tensors.items()}


def test_there_and_back_is_the_same(tmp_path, folder, capsys):
    assert convert(f"load_parameters_path={folder}", f"output_path={tmp_path / 'm.gguf'}") == 0
    assert "weights, 0.00 GB" in capsys.readouterr().err
    assert convert(f"load_parameters_path={tmp_path / 'm.gguf'}", f"output_path={tmp_path / 'back'}") == 0
    wanted, found = read(folder), read(tmp_path / "back")
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)
    ours, theirs = (resolve(keys(path)) for path in (folder, tmp_path / "back"))
    assert Model.from_hf(theirs.config, "back").config == Model.from_hf(ours.config, "given").config
    given, back = tokenizer_lib.load(ours), tokenizer_lib.load(theirs)
    text = "<|im_start|>we see 12 bees\n<|im_end|>"
    assert back(text).input_ids == given(text).input_ids
    assert back.chat_template == given.chat_template
    assert "written by `luthier convert`" in (tmp_path / "back" / "README.md").read_text()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_type_asked_for_is_written(tmp_path, folder, dtype):
    assert convert(f"load_parameters_path={folder}", f"output_path={tmp_path / 'out'}", f"dtype={dtype}") == 0
    found = tensors.read_folder(tmp_path / "out")
    assert {str(tensor.dtype) for tensor in found.values()} == {dtype}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype


def test_what_is_kept_exact_stays_so(tmp_path):
    write_model(tmp_path / "in", "deepseek-v3")
    assert convert(f"load_parameters_path={tmp_path / 'in'}", f"output_path={tmp_path / 'out'}", "dtype=bfloat16") == 0
    kinds = {name: str(tensor.dtype) for name, tensor in tensors.read_folder(tmp_path / "out").items()}
    exact = {name for name, kind in kinds.items() if kind == "float32"}
    assert exact == {name for name in kinds if name.endswith("e_score_correction_bias")}
    assert exact


@pytest.mark.parametrize("name", ["lora", "dora", "experts"])
def test_an_adapter_is_merged(tmp_path, name):
    pytest.importorskip("torch", reason="PEFT needs torch")
    kind, told = ADAPTERS[name]
    theirs = write_adapter(tmp_path / "adapter", write_base(tmp_path / "base", CONFIGS[kind]), **told)
    arguments = (f"load_parameters_path={tmp_path / 'base'}", f"lora_path={tmp_path / 'adapter'}")
    assert convert(*arguments, f"output_path={tmp_path / 'out'}") == 0
    found = read(tmp_path / "out")
    for tensor, values in stored_tensors(theirs.merge_and_unload()).items():
        np.testing.assert_allclose(found[tensor], values, atol=2e-6, rtol=2e-6, err_msg=tensor)
    assert f"the adapter `{tmp_path / 'adapter'}` merged into it" in (tmp_path / "out" / "README.md").read_text()
    assert not (tmp_path / "out" / "adapter_config.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no model: set model_name"),
        (("model_name={folder}",), "no output: set output_path"),
        (("model_name={folder}", "output_path={folder}"), "is there already. Name another, or remove it first"),
        (("model_name={folder}", "output_path={new}", "gguf_type=f16"), "gguf_type=f16 is for a .gguf file"),
        (("model_name={folder}", "output_path={new}.gguf", "dtype=float16"), "dtype=float16 is for a folder"),
        (
            ("model_name={folder}", "output_path={new}", "scan_layers=false"),
            "scan_layers=false is for MaxText's layout",
        ),
        (("model_name={folder}", "output_path={new}", "lora_path={folder}"), "no adapter_config.json there"),
        (("model_name=./gone", "output_path={new}"), "model_name=./gone: no such file or folder"),
        (("model_name={folder}", "output_path={new}", "gguf_tpye=f16"), "Did you mean `gguf_type`"),
    ],
)
def test_a_mistake_is_told_before_anything_is_written(tmp_path, folder, capsys, arguments, message):
    before = sorted(tmp_path.iterdir())
    assert convert(*(each.format(folder=folder, new=tmp_path / "new") for each in arguments)) == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_values_beyond_float16_are_refused(tmp_path, capsys):
    write_model(tmp_path / "in")
    found = read(tmp_path / "in")
    found["model.norm.weight"][3] = 1e6
    stored = {
        name: tensors.Stored(value.shape, value.dtype, lambda value=value: value) for name, value in found.items()
    }
    tensors.write_safetensors(tmp_path / "in" / "model.safetensors", stored)
    assert convert(f"model_name={tmp_path / 'in'}", f"output_path={tmp_path / 'out'}", "dtype=float16") == 2
    assert "model.norm.weight has values beyond float16's 65504. Set dtype=bfloat16" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


@pytest.mark.slow
def test_memory_stays_at_a_tensor(tmp_path):
    """A model of 400 MB: whatever is written, the process takes far less than it more than one of 4 MB does."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "head_dim": 64}

    def peak(layers, *more):
        folder = tmp_path / str(layers)
        if not folder.exists():
            write_model(folder, num_hidden_layers=layers, **sizes)
            give_merge(folder)
        script = (
            "import resource, sys\nfrom luthier import cli\nassert cli.main(sys.argv[1:]) == 0\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        name = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        arguments = [f"load_parameters_path={folder}", f"output_path={name}{more[0]}", *more[1:]]
        done = subprocess.run(
            [sys.executable, "-c", script, "convert", *arguments], check=True, capture_output=True, text=True
        )
        return int(done.stdout) / 1024

    for more in (("", "dtype=bfloat16"), (".gguf", "gguf_type=q8_0")):
        assert peak(24, *more) < peak(1, *more) + 40  # MB; the larger model has 390 MB of weights


@pytest.mark.slow
def test_smollm2_through_both_layouts_says_the_same(tmp_path):
    assert convert(f"load_parameters_path={smollm2()}", f"output_path={tmp_path / 'hf'}", "dtype=bfloat16") == 0
    q8 = tmp_path / "q8.gguf"
    assert convert(f"load_parameters_path={tmp_path / 'hf'}", f"output_path={q8}", "gguf_type=q8_0") == 0
    assert q8.stat().st_size < 0.56 * (tmp_path / "hf" / "model.safetensors").stat().st_size
    texts = [greedy(path) for path in (smollm2(), tmp_path / "hf", q8)]
    assert texts[0] == texts[1] == texts[2]
    assert texts[0].startswith(" Paris")


def greedy(path, count=8):
    source = resolve(keys(path))
    model, words = Model.from_hf(source.config, source.name), tokenizer_lib.load(source)
    params = huggingface.load(source, model.spec, jnp.float32, one_device())
    ids = words("The capital of France is").input_ids
    length = len(ids) + count
    run = jax.jit(lambda params, batch: jnp.argmax(model.logits(params, batch, Compute())[0], -1))
    for number in range(len(ids), length):
        tokens_BT = np.zeros((1, length), np.int32)
        tokens_BT[0, : len(ids)] = ids
        ones_BT = np.ones_like(tokens_BT)
        batch = Batch(tokens_BT, np.arange(length, dtype=np.int32)[None], ones_BT, ones_BT)
        ids.append(int(run(params, batch)[number - 1]))
    return words.decode(ids[-count:])
