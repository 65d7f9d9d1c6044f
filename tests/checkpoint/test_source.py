import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from folders import keys, random_tensors, write_folder
from huggingface_hub import constants, errors
from huggingface_hub.utils import validate_repo_id

from luthier.checkpoint import hub
from luthier.checkpoint.maxtext_names import HUB_IDS
from luthier.checkpoint.source import resolve
from luthier.errors import UserError
from luthier.model.model import Model
from tiny import TINY


def test_a_folder(tmp_path):
    write_folder(tmp_path / "m", TINY, random_tensors(TINY))
    source = resolve(keys(tmp_path / "m"))
    assert (source.kind, source.path, source.config) == ("huggingface", tmp_path / "m", TINY)
    assert source.tensors["model.norm.weight"].shape == (64,)


def test_model_name_says_where_to_load_from_by_itself(tmp_path):
    write_folder(tmp_path / "m", TINY, {})
    assert resolve(keys(model_name=str(tmp_path / "m"))).path == tmp_path / "m"


def test_a_run_means_the_model_that_it_left(tmp_path):
    write_folder(tmp_path / "runs" / "sft" / "model", TINY, {})
    assert resolve(keys(tmp_path / "runs" / "sft")).path == tmp_path / "runs" / "sft" / "model"


def test_random_takes_only_the_config(tmp_path):
    write_folder(tmp_path, TINY, {})
    source = resolve(keys("random", model_name=str(tmp_path)))
    assert (source.kind, source.config, dict(source.tensors)) == ("random", TINY, {})


def unfinished_run(folder):
    (folder / "checkpoints").mkdir()


def maxtext(folder):
    (folder / "0" / "items").mkdir(parents=True)
    (folder / "_METADATA").write_text("{}")


def quantised(folder):
    write_folder(folder, TINY | {"quantization_config": {"quant_method": "gptq"}}, {})


def broken_config(folder):
    (folder / "config.json").write_text("{")


def config_in_another_encoding(folder):
    (folder / "config.json").write_bytes(b'{"model_type": "\xff"}')


def list_for_config(folder):
    (folder / "config.json").write_text('["model_type"]')


def broken_generation_config(folder):
    write_folder(folder, TINY, {})
    (folder / "generation_config.json").write_text('{"temperature": ')


def list_for_generation_config(folder):
    write_folder(folder, TINY, {})
    (folder / "generation_config.json").write_text("[]")


def other_json(folder):
    (folder / "config.json").write_text('{"name": "app"}')


def gguf_folder(folder):
    (folder / "a.gguf").write_bytes(b"")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "no config.json in this folder"),
        (unfinished_run, "has not written its model/ yet"),
        (maxtext, "a MaxText checkpoint, which does not say of which model it is. Set model_name"),
        (quantised, "quantised with gptq"),
        (broken_config, "not valid JSON"),
        (config_in_another_encoding, "config.json: not valid JSON"),
        (list_for_config, "config.json: not a JSON object"),
        (broken_generation_config, "generation_config.json: not valid JSON"),
        (list_for_generation_config, "generation_config.json: not a JSON object"),
        (other_json, "no `model_type`"),
        (lambda folder: write_folder(folder, TINY | {"text_config": [1]}, {}), "`text_config` is not a JSON object"),
        (gguf_folder, "a.gguf"),
    ],
)
def test_folders_that_cannot_be_read_say_what_to_do(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(UserError, match=message):
        resolve(keys(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "64"}, 'hidden_size="64" is not a positive integer'),
        ({"num_hidden_layers": 3.0}, "num_hidden_layers=3.0 is not a positive integer"),
        ({"vocab_size": True}, "vocab_size=true is not a positive integer"),
        ({"num_attention_heads": 0}, "num_attention_heads=0 is not a positive integer"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0 is not a positive integer"),
        ({"intermediate_size": [128]}, r"intermediate_size=\[128\] is not a positive integer"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
        ({"hidden_size": 66}, "hidden_size=66 is not a multiple of num_attention_heads=4"),
        ({"head_dim": 15}, "head_dim=15 is odd"),
        ({"rms_norm_eps": "1e-5"}, 'rms_norm_eps="1e-5" is not a positive number'),
        ({"rope_theta": 0}, "rope_theta=0 is not a positive number"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "4"}}, 'factor="4" is not a positive number'),
        ({"tie_word_embeddings": "false"}, 'tie_word_embeddings="false" is not true or false'),
    ],
)
def test_a_wrong_value_in_config_json_is_named_with_its_file(changes, message):
    with pytest.raises(UserError, match=f"^here/model: config.json: {message}.*original config.json"):
        Model.from_hf(TINY | changes, "here/model")


def test_what_config_json_leaves_out_or_leaves_empty_has_transformers_defaults():
    empty = {"num_key_value_heads": None, "head_dim": None, "mlp_bias": None}
    layer = Model.from_hf(TINY | empty, "m").config.layers[0]
    assert (layer.attention.kv_heads, layer.attention.head_dim, layer.mlp.bias) == (4, 16, False)
    for config in (
        {name: value for name, value in TINY.items() if name != "hidden_size"},
        TINY | {"hidden_size": None},
    ):
        with pytest.raises(UserError, match=r"m: config\.json lacks 'hidden_size'"):
            Model.from_hf(config, "m")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/nowhere/at/all", "load_parameters_path=/nowhere/at/all: no such file or folder"),
        ("./nowhere", "no such file or folder"),
        ("nowhere.gguf", "no such file or folder"),
        ("a/b/c", "no such file or folder"),
        ("az://bucket/model", r"load_parameters_path=az://bucket/model: `az://` is not known. Give gs://, s3://"),
        ("llama3.1-8B", r"Did you mean `llama3.1-8b`\?"),
        ("gemma3-5b", r"no model name known here. Did you mean `gemma3-4b`\?"),
        ("qwen3-30b-a3", r"Did you mean `qwen3-30b-a3b`\?"),
        ("deepseek3-67b", r"Did you mean `deepseek3-671b`\?"),
    ],
)
def test_names_that_mean_nothing(name, message):
    with pytest.raises(UserError, match=message):
        resolve(keys(name))


def test_a_file_that_is_no_gguf(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"not a \.gguf"):
        resolve(keys(tmp_path / "model.bin"))


def test_maxtext_names_mean_hub_ids(tmp_path, monkeypatch):
    asked = []
    write_folder(tmp_path, TINY, {})
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda model, **_: asked.append(model) or str(tmp_path))
    source = resolve(keys(model_name="llama3.1-8b", hf_access_token="secret"))
    assert asked == ["meta-llama/Llama-3.1-8B"]
    assert source.hub_id == source.name == "meta-llama/Llama-3.1-8B"
    assert "secret" not in repr(source)


def test_the_text_models_settings_are_found_inside_a_multimodal_config(tmp_path):
    text = {"max_position_embeddings": 77, "eos_token_id": 5}
    write_folder(tmp_path, {"model_type": "gemma3", "bos_token_id": 3, "eos_token_id": [5, 6], "text_config": text}, {})
    source = resolve(keys(tmp_path))
    assert source.context_length == 77
    assert (source.text["bos_token_id"], source.text["eos_token_id"]) == (3, 5)
    assert source.config["eos_token_id"] == [5, 6]


@pytest.mark.parametrize("name", HUB_IDS)
def test_every_maxtext_name_is_a_well_formed_hub_id(tmp_path, monkeypatch, name):
    write_folder(tmp_path, TINY, {})
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    hub_id = resolve(keys(model_name=name)).hub_id
    validate_repo_id(hub_id)
    assert hub_id.count("/") == 1


def test_weights_of_a_hub_model_are_fetched_when_first_asked_for_at_the_same_commit(tmp_path, monkeypatch):
    calls = []
    write_folder(tmp_path / "abc123", TINY, random_tensors(TINY))

    def download(model, **options):
        calls.append(options)
        return str(tmp_path / "abc123")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    source = resolve(keys("someone/model"))
    assert "*.safetensors" not in calls[0]["allow_patterns"]
    assert source.tensors
    assert source.tensors
    assert len(calls) == 2
    assert "*.safetensors" in calls[1]["allow_patterns"]
    assert calls[1]["revision"] == "abc123"


def response(status):
    return SimpleNamespace(status_code=status, headers={}, request=None)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (lambda: errors.GatedRepoError("x", response=response(403)), r"gated.*huggingface.co/o/m.*hf auth login"),
        (lambda: errors.RepositoryNotFoundError("x", response=response(404)), "no such model"),
        (lambda: errors.HfHubHTTPError("x", response=response(401)), r"401.*hf auth login"),
        (lambda: errors.HfHubHTTPError("x", response=response(500)), "answered 500"),
        (lambda: errors.LocalEntryNotFoundError("x"), "cannot be reached"),
        (lambda: errors.OfflineModeIsEnabled("x"), "cannot be reached"),
        (lambda: errors.HFValidationError("x"), "not a hub id"),
    ],
)
def test_the_hubs_refusals_are_told_with_their_remedy(monkeypatch, error, message):
    def refuse(*_, **__):
        raise error()

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(UserError, match=message):
        hub.fetch("o/m", hub.SMALL_FILES, None)


def test_offline_is_named_as_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"someone/model.*HF_HUB_OFFLINE is set"):
        resolve(keys("someone/model"))


def test_resolving_imports_nothing_heavy(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    program = (
        "import sys\nfrom luthier.config import ModelKeys\nfrom luthier.checkpoint.source import resolve\n"
        f"resolve(ModelKeys(load_parameters_path={str(tmp_path)!r}))\n"
        "heavy = {'jax', 'transformers', 'torch', 'datasets', 'orbax'} & set(sys.modules)\nassert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
