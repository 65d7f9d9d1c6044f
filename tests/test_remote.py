"""Buckets, against servers of their protocols on this machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import fsspec
import jax
import jax.numpy as jnp
import maxtext_models
import numpy as np
import pytest
from buckets import server
from folders import keys, random_tensors, write_folder

import tiny
from luthier import cli, remote
from luthier.checkpoint import folder as folders
from luthier.checkpoint import source
from luthier.checkpoint.state import Checkpoints
from luthier.data import files as data_files
from luthier.errors import RunError, UserError
from luthier.train import folder
from tiny import ROOT


@pytest.fixture(scope="module", params=["s3", "gs"])
def bucket(request):
    """The address of a bucket."""
    with server(request.param) as (url, environment):
        yield SimpleNamespace(url=url, environment=environment, kind=request.param)


@pytest.fixture
def place(bucket, request, monkeypatch, tmp_path):
    """An address in the bucket for one test, whose copies are kept in its own folder."""
    monkeypatch.setattr(remote, "CACHE", tmp_path / "cache")
    return f"{bucket.url}/{re.sub(r'[^a-z0-9]', '-', request.node.name.lower())}"


def put(url, text="x"):
    fsspec.url_to_fs(url)[0].pipe_file(url.partition("://")[2], text.encode())


def listed(url):
    files, root = fsspec.url_to_fs(url)
    files.invalidate_cache()
    return sorted(name[len(root) + 1 :] for name in files.find(root))


def test_what_is_fetched_is_copied_once_and_again_when_it_changes(place, monkeypatch):
    for name in ("a.json", "b.bin", "deep/c.json"):
        put(f"{place}/{name}", name)
    found = remote.fetch(place, "hf_path", ["*.json"])
    assert sorted(path.name for path in found.iterdir()) == ["a.json"]
    assert remote.fetch(f"{place}/b.bin", "hf_path").read_text() == "b.bin"
    assert sorted(path.name for path in remote.fetch(place, "hf_path", deep=True).rglob("*.*")) == [
        "a.json",
        "b.bin",
        "c.json",
    ]
    put(f"{place}/a.json", "other")
    (found / "deep" / "c.json").write_text("untouched")
    assert (remote.fetch(place, "hf_path", deep=True) / "a.json").read_text() == "other"
    assert (found / "deep" / "c.json").read_text() == "untouched"
    fsspec.url_to_fs(place)[0].rm(f"{place.partition('://')[2]}/a.json")
    assert not (remote.fetch(place, "hf_path", deep=True) / "a.json").exists()


def test_what_another_use_has_fetched_of_a_folder_stays(place):
    for name in ("model.json", "rows.jsonl", "deep/rows.jsonl", "huge.bin"):
        put(f"{place}/{name}", name)
    found = Path(data_files._brought(f"{place}/*.jsonl", "hf_path")).parent
    assert sorted(path.name for path in found.rglob("*")) == ["rows.jsonl"]
    data_files._brought(f"{place}/**/*.jsonl", "hf_path")
    remote.fetch(place, "load_parameters_path", ["*.json"])
    assert sorted(path.name for path in found.rglob("*.*")) == ["model.json", "rows.jsonl", "rows.jsonl"]
    with pytest.raises(UserError, match=r"no file of a kind that is read \(\*test\*.jsonl\)"):
        data_files._brought(f"{place}/test*.jsonl", "hf_path")


def test_the_empty_files_by_which_consoles_show_folders_are_no_files(bucket, place, tmp_path):
    files, root = fsspec.url_to_fs(place)
    if bucket.kind == "gs":
        pytest.skip("the emulator takes no empty file")
    for name in ("", "rows/"):
        files.call_s3("put_object", Bucket="bucket", Key=f"{root.partition('/')[2]}/{name}", Body=b"")
    with pytest.raises(UserError, match="nothing is there"):
        remote.fetch(place, "hf_path", deep=True)
    put(f"{place}/rows/a", "row")
    assert (remote.fetch(place, "hf_path", deep=True) / "rows" / "a").read_text() == "row"
    remote.Mirror(tmp_path / "run", place).pull()
    assert (tmp_path / "run" / "rows" / "a").read_text() == "row"


def test_what_is_not_there_is_named(bucket, place):
    with pytest.raises(UserError, match=rf"hf_path={place}: nothing is there"):
        remote.fetch(place, "hf_path")
    with pytest.raises(UserError, match=r"load_parameters_path=.*: no config.json, no adapter_config.json"):
        source.resolve(keys(place))


@pytest.mark.parametrize(
    ("url", "message"),
    [("az://bucket/x", "`az://` is not known. Give gs://, s3://"), ("s3://", "names no bucket. Give s3://BUCKET/PATH")],
)
def test_what_is_no_bucket_is_refused(url, message):
    with pytest.raises(UserError, match=message):
        remote.fetch(url, "hf_path")


@pytest.mark.parametrize(("url", "extra"), [("s3://b/x", "s3"), ("gs://b/x", "gcs")])
def test_the_extra_that_is_missing_is_named(url, extra, monkeypatch):
    def missing(_):
        raise ImportError("Install s3fs", name="s3fs")

    monkeypatch.setattr(fsspec, "url_to_fs", missing)
    with pytest.raises(UserError, match=rf"pip install 'luthier\[{extra}\]'"):
        remote.fetch(url, "hf_path")


def test_models_and_rows_are_read_from_a_bucket(place, tmp_path):
    here = write_folder(tmp_path / "model", tiny.TINY, random_tensors(tiny.TINY))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "one"}) + "\n")
    for path in here.iterdir():
        fsspec.url_to_fs(place)[0].put_file(str(path), f"{place.partition('://')[2]}/run/model/{path.name}")
    put(f"{place}/rows/train.jsonl", (tmp_path / "rows.jsonl").read_text())
    ours = source.resolve(keys(here)).tensors
    for name in (f"{place}/run", f"{place}/run/model/"):
        theirs = source.resolve(keys(name)).tensors
        assert all(np.array_equal(ours[key].read(), theirs[key].read()) for key in ours.keys() | theirs.keys())
    for name in ("rows/train.jsonl", "rows", "rows/*.jsonl", "*/train.jsonl"):
        splits = data_files.open_splits(f"{place}/{name}")
        assert len(data_files.open_split(splits, "train", name, "train_split")) == 1


def test_what_was_converted_for_maxtext_is_read_from_a_bucket(place, tmp_path):
    config = maxtext_models.CONFIGS["llama2-7b"]
    here = maxtext_models.write_model(tmp_path / "model", config, maxtext_models.tensors(config))
    command = ["convert", f"load_parameters_path={here}", f"output_path={tmp_path / 'm'}", "output_format=maxtext"]
    assert cli.main(command) == 0
    fsspec.url_to_fs(place)[0].put(str(tmp_path / "m"), f"{place.partition('://')[2]}/m", recursive=True)
    ours, theirs = source.resolve(keys(here)).tensors, source.resolve(keys(f"{place}/m")).tensors
    assert all(np.array_equal(ours[key].read(), theirs[key].read()) for key in ours.keys() | theirs.keys())


def write(folder, **texts):
    for name, text in texts.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def step(folder, number, text="arrays"):
    write(folder, **{f"checkpoints__{number}__state__d__{text}": text, f"checkpoints__{number}__data": str(number)})


def test_a_mirrored_folder_is_whole_on_another_machine(place, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    write(here, config="c", metrics="1", model__weights="w", rollouts__one="r", **{".draft": "no"})
    step(here, 10)
    write(here, **{"checkpoints__20.orbax-checkpoint-tmp__data": "no", "checkpoints__7.damaged__data": "no"})
    remote.Mirror(here, place).push()
    sent = ["checkpoints/10/_UPLOADED.json", "checkpoints/10/data", "checkpoints/10/state/d/arrays"]
    assert listed(place) == sorted([*sent, "config", "metrics", "model/weights", "rollouts/one"])
    assert remote.Mirror(there, place).pull()
    assert (there / "checkpoints" / "10" / "data").read_text() == "10"
    assert (there / "rollouts" / "one").read_text() == "r"
    assert not (there / "model").exists()  # a run does not read it
    shutil.rmtree(there / "checkpoints" / "10")
    step(there, 20)
    write(there, metrics="12")
    remote.Mirror(there, place).push()
    assert "checkpoints/10/data" not in listed(place)
    assert "model/weights" in listed(place)
    remote.Mirror(here, place).pull()  # which goes on where the other machine was
    assert (here / "metrics").read_text() == "12"
    assert (here / "checkpoints" / "20" / "data").read_text() == "20"


def test_what_was_not_sent_is_kept_where_the_bucket_is_not_ahead(place, tmp_path):
    write(tmp_path / "here", config="c", metrics="1")
    step(tmp_path / "here", 10)
    mirror = remote.Mirror(tmp_path / "here", place)
    mirror.push()
    write(tmp_path / "here", metrics="1 and 2")
    step(tmp_path / "here", 20)
    again = remote.Mirror(tmp_path / "here", place)
    again.pull()
    assert (tmp_path / "here" / "metrics").read_text() == "1 and 2"
    assert sorted(path.name for path in (tmp_path / "here" / "checkpoints").iterdir()) == ["10", "20"]
    again.push()
    assert "checkpoints/20/_UPLOADED.json" in listed(place)


def test_a_checkpoint_whose_copy_is_not_whole_is_not_taken(place, tmp_path):
    write(tmp_path / "here", config="c")
    step(tmp_path / "here", 10)
    step(tmp_path / "here", 20)
    remote.Mirror(tmp_path / "here", place).push()
    files, root = fsspec.url_to_fs(place)
    files.rm(f"{root}/checkpoints/20/_UPLOADED.json")
    remote.Mirror(tmp_path / "there", place).pull()
    assert [path.name for path in (tmp_path / "there" / "checkpoints").iterdir()] == ["10"]
    put(f"{place}/checkpoints/10/data", "cut")
    remote.Mirror(tmp_path / "third", place).pull()
    assert not (tmp_path / "third" / "checkpoints").exists()


def test_a_run_that_is_gone_from_the_bucket_is_not_begun_again_silently(place, tmp_path):
    write(tmp_path / "here", config="c")
    remote.Mirror(tmp_path / "here", place).push()
    files, root = fsspec.url_to_fs(place)
    files.rm(root, recursive=True)
    with pytest.raises(UserError, match="the run is gone from there"):
        remote.Mirror(tmp_path / "here", place).pull()


def test_changes_are_copied_meanwhile_and_at_the_end(place, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "PERIOD", 0.05)
    write(tmp_path / "here", config="c")
    with remote.Mirror(tmp_path / "here", place):
        for _ in range(200):
            if listed(place) == ["config"]:
                break
        assert listed(place) == ["config"]
        monkeypatch.setattr(remote, "PERIOD", 1000)
        write(tmp_path / "here", metrics="1")
    assert listed(place) == ["config", "metrics"]


def test_a_bucket_that_is_not_there_is_one_message_and_nothing_is_lost(bucket, tmp_path):
    write(tmp_path / "here", config="c")
    with pytest.raises(RunError, match=r"://missing/run: the run could not be copied there from .*/here: .*Check the"):
        remote.Mirror(tmp_path / "here", f"{bucket.kind}://missing/run").push()
    assert (tmp_path / "here" / "config").is_file()


def test_a_copy_that_fails_meanwhile_is_told_and_the_last_one_ends_the_run(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "PERIOD", 0.05)
    write(tmp_path / "here", config="c")
    told = []
    mirror = remote.Mirror(tmp_path / "here", f"{bucket.kind}://missing/run", told.append)
    with pytest.raises(RunError, match="could not be copied"), mirror:  # noqa: PT012
        for _ in range(400):
            if told:
                break
            mirror._done.wait(0.05)
    assert "It is tried again." in told[0]


def test_a_result_written_into_a_mirrored_folder_is_copied_at_once(place, tmp_path):
    here = tmp_path / "run"
    write(here, config="c")
    remote.Mirror(here, place).push()
    folders.write(here / "model", {}, {"README.md": "words"}, lambda _: None)
    assert listed(place) == ["config", "model/README.md"]
    folders.write(tmp_path / "elsewhere", {}, {"README.md": "words"}, lambda _: None)


def config_of(url, **more):
    values = {"base_output_directory": url, "run_name": "run", "learning_rate": 1.0} | more
    return SimpleNamespace(**values, model_dump=lambda **_: dict(values))


def test_another_run_in_the_bucket_is_refused_by_a_machine_that_has_nothing_of_it(place, tmp_path, monkeypatch):
    write(tmp_path / "here", **{"config.yml": "learning_rate: 2.0\n"})
    step(tmp_path / "here", 10)
    remote.Mirror(tmp_path / "here", f"{place}/run").push()
    with pytest.raises(UserError, match=r"holds a different run: learning_rate \(there 2.0, here 1.0\)"):
        folder.check(config_of(place))
    assert folder.check(config_of(place, learning_rate=2.0)) == remote.local(f"{place}/run", "runs")
    assert folder.check(config_of(place, run_name="new")).name == "new"


@pytest.mark.parametrize("asynchronous", [True, False])
def test_orbax_writes_to_a_google_bucket_itself(bucket, place, asynchronous):
    if bucket.kind != "gs":
        pytest.skip("Orbax has no S3")
    states = {number: {"w": jnp.arange(600.0).reshape(20, 30) * number} for number in (1, 2, 3)}
    shape = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), states[1])
    with Checkpoints(f"{place}/c", keep=2, asynchronous=asynchronous) as checkpoints:
        for number, state in states.items():
            checkpoints.save(number, state, {"row": number})
    assert {name.split("/")[0] for name in listed(f"{place}/c")} == {"2", "3"}
    largest = max(
        (name for name in listed(f"{place}/c/3") if "/d/" in name),
        key=lambda name: fsspec.url_to_fs(place)[0].size(f"{place.partition('://')[2]}/c/3/{name}"),
    )
    fsspec.url_to_fs(place)[0].rm(f"{place.partition('://')[2]}/c/3/{largest}")
    told = []
    with Checkpoints(f"{place}/c", keep=2, warn=told.append) as checkpoints:
        state, data = checkpoints.restore(shape)
        assert checkpoints.latest() == 2
    np.testing.assert_array_equal(state["w"], states[2]["w"])
    assert data == {"row": 2}
    assert "c/3: damaged (it cannot be read" in told[0]
    assert {name.split("/")[0] for name in listed(f"{place}/c")} == {"2", "3.damaged"}


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_run_in_a_bucket_goes_on_on_another_machine(bucket, tmp_path, tiny_model, tiny_rows):
    files, _ = fsspec.url_to_fs(bucket.url)
    for path in tiny_model.iterdir():
        files.put_file(str(path), f"bucket/e2e/model/{path.name}")
    files.put_file(str(tiny_rows), "bucket/e2e/train.jsonl")

    def run(machine, *more):
        environment = {**os.environ, **bucket.environment, "HOME": str(tmp_path / machine), "PYTHONPATH": str(ROOT)}
        command = [
            *(sys.executable, "-m", "luthier.train.sft", f"base_output_directory={bucket.url}/e2e", "run_name=run"),
            *(f"load_parameters_path={bucket.url}/e2e/model", f"hf_path={bucket.url}/e2e/train.jsonl"),
            *("max_target_length=64", "per_device_batch_size=2", "checkpoint_period=2", "learning_rate=1e-3"),
            *(f"jax_cache_dir={ROOT / '.cache' / 'jax'}", "max_num_checkpoints_to_keep=2", *more),
        ]
        done = subprocess.run(command, env=environment | {"XLA_FLAGS": ""}, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("one", "steps=4")
    assert "Going on after step 4 of 6" in run("two", "steps=6")
    there = listed(f"{bucket.url}/e2e/run")
    assert {name.split("/")[1] for name in there if name.startswith("checkpoints/")} == {"4", "6"}
    assert {"config.yml", "metrics.jsonl", "model/model.safetensors", "model/config.json"} <= set(there)
    rows = files.cat_file("bucket/e2e/run/metrics.jsonl").decode().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [name for name in there if name.startswith("tensorboard/events")]
    model = remote.fetch(f"{bucket.url}/e2e/run/model", "load_parameters_path")
    assert Path(model / "model.safetensors").stat().st_size > 0
