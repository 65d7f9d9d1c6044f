import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from folders import files_of_at_most, keys, one_device
from jax.sharding import NamedSharding, PartitionSpec

from luthier import mesh as mesh_lib
from luthier.checkpoint.state import Checkpoints
from luthier.errors import RunError, UserError
from luthier.model import param
from luthier.model.model import Model
from tiny import TINY


def make_state(mesh, seed=0):
    """Weights, Adam's moments in another type, and a step, on ``mesh``."""
    spec = Model.from_hf(TINY, "test").spec
    random = np.random.default_rng(seed)
    shardings = param.shardings(spec, mesh)

    def draw(dtype):
        values = param.map_spec(lambda weight: random.standard_normal(weight.shape).astype(dtype), spec)
        return jax.device_put(values, shardings)

    everywhere = NamedSharding(mesh, PartitionSpec())
    count, step = jax.device_put((np.int32(7), np.int32(7)), everywhere)
    adam = optax.ScaleByAdamState(count, draw(jnp.bfloat16), draw(jnp.bfloat16))
    return {"params": draw(np.float32), "moments": (adam, optax.EmptyState()), "step": step}


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def same_bits(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert left.dtype == right.dtype
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes()


@pytest.mark.parametrize("asynchronous", [True, False])
def test_every_bit_comes_back_with_the_datas_state(tmp_path, asynchronous):
    state = make_state(one_device())
    with Checkpoints(tmp_path / "c", asynchronous=asynchronous) as checkpoints:
        assert checkpoints.latest() is None
        checkpoints.save(7, state, {"row": 12, "epochs": [1, 2]})
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.latest() == 7
        restored, data = checkpoints.restore(abstract(state))
    same_bits(restored, state)
    assert data == {"row": 12, "epochs": [1, 2]}
    assert (tmp_path / "c" / "7").is_dir()


def test_what_is_saved_is_the_state_at_that_moment_though_its_memory_is_given_away(tmp_path):
    state = {"w": jnp.arange(4_000_000, dtype=jnp.float32)}
    saved = np.array(state["w"])
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 2 + 1, tree), donate_argnums=0)
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(1, state, {})
        shape = abstract(state)
        for _ in range(5):
            state = step(state)
    with Checkpoints(tmp_path / "c") as checkpoints:
        np.testing.assert_array_equal(checkpoints.restore(shape)[0]["w"], saved)


@pytest.mark.parametrize("back", [True, False], ids=["eight-to-one", "one-to-eight"])
def test_another_mesh_can_resume(tmp_path, back):
    meshes = [one_device(), mesh_lib.make(keys(ici_fsdp_parallelism=4, ici_tensor_parallelism=2))]
    first, second = reversed(meshes) if back else meshes
    state = make_state(first)
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(7, state, {})
    other = make_state(second, seed=1)
    with Checkpoints(tmp_path / "c") as checkpoints:
        restored, _ = checkpoints.restore(abstract(other))
    same_bits(restored, state)
    assert restored["params"]["embed"].sharding == other["params"]["embed"].sharding


def test_the_newest_are_kept_and_saving_a_step_twice_does_nothing(tmp_path):
    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        for step in (1, 2, 3, 3):
            checkpoints.save(step, {"x": jnp.float32(step)}, {"step": step})
    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        assert sorted(path.name for path in (tmp_path / "c").iterdir() if path.name.isdigit()) == ["2", "3"]
        shape = {"x": jax.ShapeDtypeStruct((), jnp.float32, sharding=jnp.float32(0).sharding)}
        assert checkpoints.restore(shape)[1] == {"step": 3}
        checkpoints.close()


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    state = make_state(one_device())
    with Checkpoints(tmp_path / "c") as checkpoints:
        with pytest.raises(UserError, match="no checkpoint to resume from"):
            checkpoints.restore(abstract(state))
        checkpoints.save(7, state, {})
    wanted = abstract(state)
    wanted["params"]["norm"] = jax.ShapeDtypeStruct((63,), jnp.float32)
    with Checkpoints(tmp_path / "c") as checkpoints:
        with pytest.raises(UserError, match=r"`params/norm`: float32\[64\] saved, float32\[63\] wanted"):
            checkpoints.restore(wanted)
        del wanted["params"]["norm"], wanted["moments"]
        with pytest.raises(UserError, match=r"arrays of the train state differ.*none wanted"):
            checkpoints.restore(wanted)


def noise(seed):
    """Three megabytes that do not compress."""
    return {"w": jnp.asarray(np.random.default_rng(seed).standard_normal(750_000), jnp.float32)}


def save_and_leave(folder, error, asynchronous=True):
    with Checkpoints(folder, asynchronous=asynchronous) as checkpoints:
        checkpoints.save(2, noise(0), {"row": 2})
        if error is not None:
            raise error


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_disk_that_refuses_is_one_message_and_the_last_checkpoint_stands(tmp_path, caplog, capfd, asynchronous):
    with Checkpoints(tmp_path / "c", asynchronous=asynchronous) as checkpoints:
        checkpoints.save(1, {"w": jnp.ones(4)}, {"row": 1})
    with pytest.raises(RunError) as caught, files_of_at_most(1_000_000):
        save_and_leave(tmp_path / "c", None, asynchronous=asynchronous)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'c'}: a checkpoint could not be written (File too large). ")
    assert "The checkpoint of step 1 stands. Free space" in message
    assert "Traceback" not in caplog.text + "".join(capfd.readouterr())
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.latest() == 1
        checkpoints.save(2, noise(0), {})
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["2"]


FULL = OSError(28, "No space left on device")
FULL_TENSORSTORE = ValueError("RESOURCE_EXHAUSTED: Failed writing: No space left on device [os_error_code='28']")


@pytest.mark.parametrize("error", [FULL, FULL_TENSORSTORE, PermissionError(13, "Permission denied"), ValueError("bug")])
def test_only_what_the_disk_refuses_is_told_so(tmp_path, monkeypatch, error):
    def refuse(*_, **__):
        raise error

    with Checkpoints(tmp_path / "c") as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "save", refuse)
        if error.args == ("bug",):
            with pytest.raises(ValueError, match="bug"):
                checkpoints.save(1, {"w": jnp.ones(4)}, {})
        else:
            reason = "Permission denied" if isinstance(error, PermissionError) else "No space left on device"
            with pytest.raises(RunError, match=rf"could not be written \({reason}\)"):
                checkpoints.save(1, {"w": jnp.ones(4)}, {})


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="file/c: a checkpoint could not be written"):
        Checkpoints(tmp_path / "file" / "c")


def test_what_ended_the_run_comes_before_the_checkpoint_that_failed_with_it(tmp_path):
    with pytest.raises(RunError, match="loss nan") as caught, files_of_at_most(1_000_000):
        save_and_leave(tmp_path / "c", RunError("loss nan"))
    assert "No checkpoint is there" in caught.value.__notes__[0]
    with pytest.raises(RunError, match="No checkpoint is there"), files_of_at_most(1_000_000):
        save_and_leave(tmp_path / "d", SystemExit(143))


def two_checkpoints(folder):
    states = {step: {"w": noise(step)["w"].reshape(750, 1000), "n": jnp.int32(step)} for step in (1, 2)}
    with Checkpoints(folder, keep=2, asynchronous=False) as checkpoints:
        for step, state in states.items():
            checkpoints.save(step, state, {"row": step})
    return states, abstract(states[1])


def flip(path, at=None):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 1
    path.write_bytes(content)


def largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


DAMAGES = {
    "a flipped bit": (lambda step: flip(largest(step)), r"1 of 2 arrays are not what was saved, the first `w`"),
    "a missing shard": (lambda step: largest(step).unlink(), "it cannot be read"),
    "a shard cut short": (lambda step: os.truncate(largest(step), 1000), "it cannot be read"),
    "a flipped index": (lambda step: flip(step / "state" / "manifest.ocdbt"), "it cannot be read"),
    "a flipped place in the data": (lambda step: flip(step / "data" / "metadata"), "its record is"),
    "no record": (lambda step: (step / "data" / "metadata").unlink(), "its record is missing"),
    "Orbax's metadata cut": (lambda step: os.truncate(step / "state" / "_METADATA", 50), "it cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_set_aside_and_the_one_before_it_taken(tmp_path, damage):
    states, shape = two_checkpoints(tmp_path / "c")
    do, why = DAMAGES[damage]
    do(tmp_path / "c" / "2")
    warnings = []
    with Checkpoints(tmp_path / "c", keep=2, warn=warnings.append) as checkpoints:
        assert checkpoints.latest() == 2
        state, data = checkpoints.restore(shape)
        same_bits(state, states[1])
        assert data == {"row": 1}
        assert checkpoints.latest() == 1
        checkpoints.save(2, states[2], {"row": 2})  # the step is taken and saved again
    (said,) = warnings
    assert re.search(why, said)
    assert f"{tmp_path}/c/2: damaged (" in said
    assert "kept as 2.damaged, and the run goes on after step 1" in said
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["1", "2", "2.damaged"]
    with Checkpoints(tmp_path / "c", keep=2, warn=warnings.append) as checkpoints:
        same_bits(checkpoints.restore(shape)[0], states[2])
    assert len(warnings) == 1


def test_where_no_checkpoint_is_whole_the_run_is_refused_and_nothing_is_touched(tmp_path):
    _, shape = two_checkpoints(tmp_path / "c")
    flip(largest(tmp_path / "c" / "1"))
    largest(tmp_path / "c" / "2").unlink()
    before = sorted(tmp_path.rglob("*"))
    with Checkpoints(tmp_path / "c", keep=2) as checkpoints, pytest.raises(RunError) as caught:
        checkpoints.restore(shape)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'c'}: no checkpoint is whole (step 2: it cannot be read")
    assert "step 1: 1 of 2 arrays are not what was saved, the first `w`). Put one back from a copy" in message
    assert sorted(tmp_path.rglob("*")) == before


def test_a_checkpoint_that_may_not_be_read_is_not_taken_for_damaged(tmp_path, monkeypatch):
    _, shape = two_checkpoints(tmp_path / "c")

    def refuse(*_, **__):
        raise ValueError("PERMISSION_DENIED: Error reading local file [os_error_code='13']")

    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        monkeypatch.setattr(checkpoints._arrays, "restore", refuse)
        with pytest.raises(RunError, match=r"c/2: cannot be read \(Permission denied\)"):
            checkpoints.restore(shape)
        record = tmp_path / "c" / "2" / "data" / "metadata"
        record.unlink()
        record.mkdir()
        with pytest.raises(RunError, match=r"metadata: cannot be read \(Is a directory\)"):
            checkpoints.data()
    assert (tmp_path / "c" / "2").is_dir()


def test_any_flipped_bit_shows(tmp_path):
    """Bits of every file, at random: what comes back is what was saved, or is refused."""
    states, shape = two_checkpoints(tmp_path / "whole")
    random = np.random.default_rng(0)
    files = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole" / "2").rglob("*") if path.is_file()]
    refused = 0
    for name in files:
        shutil.copytree(tmp_path / "whole", tmp_path / "c")
        flip(tmp_path / "c" / name, int(random.integers((tmp_path / "c" / name).stat().st_size)))
        with Checkpoints(tmp_path / "c", keep=2, warn=lambda _: None) as checkpoints:
            state, data = checkpoints.restore(shape)
        refused += data["row"] == 1
        same_bits(state, states[data["row"]])
        shutil.rmtree(tmp_path / "c")
    assert refused >= 4  # of the files that matter: data, index, manifest, record


KILLED = """
import sys
from pathlib import Path
import jax.numpy as jnp
from luthier.checkpoint.state import Checkpoints

with Checkpoints(Path(sys.argv[1]), keep=1) as checkpoints:
    checkpoints.save(1, {"w": jnp.full(8_000_000, 1.0)}, {"step": 1})
    checkpoints.close()
    print("saved", flush=True)
    for step in range(2, 1000):
        checkpoints.save(step, {"w": jnp.full(8_000_000, float(step))}, {"step": step})
"""


@pytest.mark.multiprocess
def test_a_process_killed_while_saving_leaves_a_whole_checkpoint(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "c")], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "saved\n"
    started = tmp_path / "c"
    deadline = time.monotonic() + 60
    while not any("tmp" in path.name for path in started.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.001)
    child.send_signal(signal.SIGKILL)
    child.wait()
    left = [path.name for path in started.iterdir()]
    assert any("tmp" in name for name in left), f"the kill came between saves: {left}"
    shape = {"w": jax.ShapeDtypeStruct((8_000_000,), jnp.float32, sharding=jnp.float32(0).sharding)}
    with Checkpoints(tmp_path / "c", keep=1) as checkpoints:
        state, data = checkpoints.restore(shape)
        assert data == {"step": checkpoints.latest()}
        np.testing.assert_array_equal(np.unique(state["w"]), [float(checkpoints.latest())])
        checkpoints.save(5000, state, {})
    assert [path.name for path in Path(tmp_path / "c").iterdir()] == ["5000"]
