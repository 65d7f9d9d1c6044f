import json

import ml_dtypes
import numpy as np
import pytest
from folders import stored

from luthier.checkpoint import tensors
from luthier.errors import UserError


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.int64, bool])
def test_what_is_written_is_read_back_here_and_by_the_library(tmp_path, dtype):
    safetensors = pytest.importorskip("safetensors.numpy")
    values = {"a": np.arange(6).astype(dtype).reshape(2, 3), "b": np.ones((), dtype), "c": np.zeros((0, 4), dtype)}
    tensors.write_safetensors(tmp_path / "x.safetensors", {name: stored(value) for name, value in values.items()})
    found = tensors.read_safetensors(tmp_path / "x.safetensors")
    theirs = safetensors.load_file(tmp_path / "x.safetensors")
    for name, value in values.items():
        assert found[name].shape == value.shape
        assert found[name].read().tobytes() == value.tobytes() == theirs[name].tobytes()
        assert found[name].dtype == value.dtype == theirs[name].dtype


def test_the_library_writes_what_is_read_here(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    values = {"a": np.arange(6, dtype=np.float32), "b": np.ones((2, 2), np.float16)}
    safetensors.save_file(values, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = tensors.read_folder(tmp_path)
    assert {name: tensor.read().tolist() for name, tensor in found.items()} == {
        name: value.tolist() for name, value in values.items()
    }


def test_shards_hold_at_most_the_limit_and_all_tensors_once():
    sizes = [4, 4, 4, 100, 4, 8]
    values = {f"t{i}": stored(np.zeros(size, np.uint8)) for i, size in enumerate(sizes)}
    shards = tensors.shard(values, limit=12)
    assert [list(group) for group in shards.values()] == [["t0", "t1", "t2"], ["t3"], ["t4", "t5"]]
    assert next(iter(shards)) == "model-00001-of-00003.safetensors"
    assert tensors.index(shards)["metadata"]["total_size"] == sum(sizes)
    assert list(tensors.shard(values, limit=1000)) == ["model.safetensors"]


def test_a_file_cut_short_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    tensors.write_safetensors(path, {"a": stored(np.zeros(100, np.float32))})
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="cut short at"):
        tensors.read_folder(tmp_path)


def test_a_pointer_in_place_of_a_file_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n")
    with pytest.raises(UserError, match="not a safetensors file"):
        tensors.read_folder(tmp_path)


@pytest.mark.parametrize(
    "header",
    [b"not JSON", b"[1, 2]", b'{"a": 1}', b'{"a": {"dtype": "F32"}}', b"\xff\xfe", b'{"a": {"data_offsets": ["x"]}}'],
)
def test_a_garbled_header_is_refused_with_its_file(tmp_path, header):
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(UserError, match=r"model.safetensors: its header is garbled.*Download it again"):
        tensors.read_folder(tmp_path)


@pytest.mark.parametrize("index", ["{", "{}", "[]", '{"weight_map": ["a"]}', '{"weight_map": {"a": {}}}'])
def test_a_garbled_index_is_refused_with_its_file(tmp_path, index):
    (tmp_path / tensors.INDEX).write_text(index)
    with pytest.raises(UserError, match=r"model.safetensors.index.json: no JSON with a `weight_map`"):
        tensors.read_folder(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (tmp_path / tensors.INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match="1 of 1 shards"):
        tensors.read_folder(tmp_path)


@pytest.mark.parametrize(
    ("file", "message"),
    [("pytorch_model.bin", "save_pretrained"), ("other.safetensors", "Name the one file"), ("x.txt", "no weights")],
)
def test_a_folder_without_safetensors_names_the_remedy(tmp_path, file, message):
    (tmp_path / file).write_bytes(b"")
    with pytest.raises(UserError, match=message):
        tensors.read_folder(tmp_path)
