"""Training an adapter as a user does: what it leaves, what it keeps in memory, how it goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_variants import VARIANTS
from safetensors.numpy import load_file

import tiny
from luthier import cli, config
from luthier import mesh as mesh_lib
from luthier.algorithms.sft import sft
from luthier.model import lora, param
from luthier.model.compute import Compute
from luthier.model.model import Model
from luthier.model.published import PUBLISHED
from luthier.train import memory, optimizer, step, tuning
from luthier.train.tuning import Base, Tuning
from luthier.types import Batch
from tiny import KINDS, ROOT, kind_model, make_batch

pytestmark = pytest.mark.multiprocess

STEPS = 12
LORA = ("lora_rank=4", "lora_alpha=8")
KEYS = (
    *("run_name=run", "max_target_length=64", "per_device_batch_size=1", "dtype=float32", "learning_rate=2e-2"),
    *("lr_schedule_type=constant", "warmup_steps_fraction=0", f"jax_cache_dir={ROOT / '.cache' / 'jax'}"),
)
SLOW = pytest.mark.slow


def run(folder: Path, model: Path, rows: Path, *keys: str) -> int:
    place = (f"base_output_directory={folder}", f"load_parameters_path={model}", f"hf_path={rows}")
    return cli.main(["sft", *place, *KEYS, *keys])


def losses(folder: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def adapter(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "run" / "adapter" / "adapter_model.safetensors")


WAYS = {
    "lora": LORA,
    "dora with dropout": (*LORA, "use_dora=true", "lora_dropout=0.2"),
    "qlora": (*LORA, "quantization=nf4"),
    "pissa": (*LORA, "lora_init=pissa", "use_rslora=true"),
    "loftq": (*LORA, "lora_init=loftq", "quantization=int4"),
}


@pytest.mark.parametrize("way", [way if way == "lora" else pytest.param(way, marks=SLOW) for way in WAYS])
def test_a_run_learns_leaves_an_adapter_and_goes_on_bit_for_bit(
    way: str, tiny_model: Path, tiny_rows: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(whole, tiny_model, tiny_rows, *WAYS[way], f"steps={STEPS}") == 0
    assert "trained (an adapter of rank 4)" in capfd.readouterr().out.replace("\n", " ")
    assert sorted(path.name for path in (whole / "run").iterdir()) == [
        *("adapter", "checkpoints", "config.yml", "metrics.jsonl", "tensorboard")
    ]
    assert {path.name for path in (whole / "run" / "adapter").iterdir()} >= {
        *("adapter_model.safetensors", "adapter_config.json", "README.md", "tokenizer.json", "tokenizer_config.json")
    }
    assert losses(whole)[STEPS] < 0.9 * losses(whole)[1]
    assert run(parts, tiny_model, tiny_rows, *WAYS[way], "steps=5") == 0
    assert run(parts, tiny_model, tiny_rows, *WAYS[way], f"steps={STEPS}") == 0
    assert f"Going on after step 5 of {STEPS}" in capfd.readouterr().out
    assert losses(whole) == losses(parts)
    ours, theirs = adapter(whole), adapter(parts)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def test_an_adapter_can_be_gone_on_from_and_is_itself_a_model(
    tiny_model: Path, tiny_rows: Path, tmp_path: Path
) -> None:
    """A new run from an adapter, and one whose base the adapter is merged into, begin where the first one ended."""
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    held_out = ("eval_fraction=0.2", "steps=6")
    assert run(first, tiny_model, tiny_rows, *LORA, *held_out) == 0
    folder = first / "run" / "adapter"
    assert run(second, tiny_model, tiny_rows, f"lora_path={folder}", *held_out) == 0
    assert run(third, folder, tiny_rows, *LORA, *held_out) == 0

    def evaluations(place: Path) -> dict[int, float]:
        rows = [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
        return {row["step"]: row["eval/loss"] for row in rows if "eval/loss" in row}

    end = evaluations(first)[6]
    assert evaluations(second)[0] == pytest.approx(end, rel=1e-6)
    assert evaluations(third)[0] == pytest.approx(end, rel=1e-4)  # merged weights are rounded to the base's bfloat16
    assert abs(evaluations(second)[6] - end) > 1e-6
    assert evaluations(third)[6] < end


def adapted(kind: str) -> Tuning:
    keys = config.SftConfig(model_name="x", hf_path="y", lora_rank=4, dtype="float32")
    model = kind_model(kind) if kind in KINDS else Model.from_hf(VARIANTS[kind].config, kind)
    return tuning.of(keys, model, jnp.float32, jnp.float32)


def moved(trained: Any) -> Any:
    """An adapter that changes something, as b begins as zero."""
    keys = iter(jax.random.split(jax.random.key(7), len(jax.tree.leaves(trained))))
    return jax.tree.map(lambda leaf: leaf + 0.05 * jax.random.normal(next(keys), leaf.shape), trained)


def one_step(kind: str, batch: Batch, *, devices: int = 1, accumulate: int = 1) -> tuple[Any, dict[str, float]]:
    """One step of SGD at a learning rate of one: the change of the adapter is its gradient."""
    keys = config.SftConfig(
        model_name="x", hf_path="y", opt_type="sgd", adam_b1=0.0, gradient_clipping_threshold=0.0, lora_rank=4
    )
    mesh, tuned = mesh_lib.make(keys, jax.devices()[:devices]), adapted(kind)
    with mesh_lib.use(mesh):
        tx = optimizer.make(keys, tuned.spec)
        base = Base(param.initialise(tuned.model.spec, jax.random.key(0), jnp.float32, mesh, scale=0.1))
        trained = moved(lora.initialise(tuned.model.spec, base.params, tuned.adapter, jax.random.key(1), mesh))
        before = jax.device_get(trained)
        state = step.init_state(jax.device_put(trained, param.shardings(tuned.spec, mesh)), tx, tuned.spec, mesh)
        program = step.make_train_step(tuned.model, sft, tx, Compute(), weights=tuned.weights)
        state, metrics = program(state, step.place(batch, mesh, accumulate=accumulate), jnp.float32(1.0), base)
        after = jax.device_get(state.params)
    return jax.tree.map(np.subtract, before, after), {name: float(value) for name, value in metrics.items()}


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=SLOW) for kind in (*KINDS, "mistral-window", "mixtral")])
def test_a_step_is_the_same_accumulated_and_on_eight_devices(kind: str) -> None:
    batch = make_batch(rows=8)
    gradient, metrics = one_step(kind, batch)
    assert metrics["grad_norm"] > 1e-3
    for other in (one_step(kind, batch, accumulate=2), one_step(kind, batch, devices=8)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6), gradient, other[0])
        assert other[1]["loss"] == pytest.approx(metrics["loss"], rel=2e-5)


def test_the_base_has_no_gradient_no_moment_and_no_copy() -> None:
    """What the state holds, and what the compiled step takes, follow from the adapter; the base is only read."""
    large = tiny.TINY | {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "vocab_size": 2048}
    model = Model.from_hf(large, "x")
    keys = config.SftConfig(model_name="x", hf_path="y", lora_rank=4, max_target_length=32, per_device_batch_size=1)
    mesh = mesh_lib.make(keys, jax.devices()[:1])
    tuned = tuning.of(keys, model, jnp.float32, jnp.float32)
    with mesh_lib.use(mesh):
        tx = optimizer.make(keys, tuned.spec)
        state, base = step.abstract_state(tx, tuned.spec, jnp.float32, mesh), tuned.abstract_base(mesh)
        ids = jax.ShapeDtypeStruct((1, 1, 32), jnp.int32)
        batch = Batch(ids, ids, ids, jax.ShapeDtypeStruct((1, 1, 32), jnp.bool))
        program = step.make_train_step(model, sft, tx, Compute(remat="full"), weights=tuned.weights)
        compiled = program.lower(state, batch, jax.ShapeDtypeStruct((), jnp.float32), base).compile()
    weights, trained = 4 * param.count(model.spec), 4 * param.count(tuned.spec)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) < 3.01 * param.count(tuned.spec)
    analysis = compiled.memory_analysis()
    assert analysis.argument_size_in_bytes == pytest.approx(weights + 3 * trained, rel=0.01)
    assert analysis.output_size_in_bytes == pytest.approx(3 * trained, rel=0.01)
    layers = 4 * param.count(model.spec["layers"])
    assert analysis.temp_size_in_bytes < 0.5 * layers, "a gradient of the base would be as large as all layers"
    plan = memory.estimate(keys, tuned, mesh, Compute(remat="full"), row_length=32, accumulates=False)
    assert plan.total(1) - memory.PROCESS == pytest.approx(memory.of_program(compiled), rel=0.35)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["enable_lora=false", "lora_rank=4"], "enable_lora=false and lora_rank=4: leave one out"),
        (["quantization=nf4"], "quantised weights cannot be trained"),
        (["lora_rank=4", "lora_init=loftq"], "set quantization=nf4"),
        (["lora_path=/nowhere", "lora_rank=4"], "lora_path brings its own lora_rank"),
        (["lora_path=/nowhere"], "/nowhere"),
        (["lora_target_modules=[q_proj, w_proj]"], "w_proj"),
        (["lora_target_modules=.*nothing"], "nothing"),
        (["lora_target_modules=[lm_head]"], "lm_head"),
        (["lora_module_path=decoder/layers/mamba/in"], "Of MaxText's paths there are"),
        (["lora_rank=0"], "lora_rank=0"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    keys: list[str], words: str, tiny_model: Path, tiny_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, tiny_model, tiny_rows, "steps=2", *keys) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_maxtexts_names_of_keys_and_modules_are_taken() -> None:
    keys = ["lora.enable_lora=True", "lora.lora_rank=8", "lora.lora_alpha=16"]
    paths = "lora.lora_module_path=decoder/layers/(self_attention/(query|out)|mlp/(wi_0|wi_1|wo))"
    found = config.resolve("sft", ["model_name=x", "hf_path=y", *keys, paths], {})
    adapter = tuning.of(found, kind_model("llama"), jnp.float32, jnp.float32).adapter
    assert adapter is not None
    assert (adapter.rank, adapter.scale) == (8, 2.0)
    assert set(adapter.targets) >= {"q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert not {"k_proj", "v_proj"} & set(adapter.targets)


@SLOW
def test_a_step_of_qlora_on_8b_takes_the_base_in_four_bits_and_the_adapter_besides() -> None:
    """By the compiler's own count: nothing of the base is written."""
    model = Model.from_hf(PUBLISHED["meta-llama/Llama-3.1-8B"].config, "Llama-3.1-8B")
    settings = {"lora_rank": 16, "quantization": "nf4", "dtype": "bfloat16", "max_target_length": 512}
    keys = config.SftConfig(model_name="x", hf_path="y", per_device_batch_size=1, **settings)
    mesh, compute = mesh_lib.make(keys, jax.devices()[:1]), Compute(jnp.dtype(jnp.bfloat16), remat="full")
    tuned = tuning.of(keys, model, jnp.float32, jnp.dtype(jnp.bfloat16))
    with mesh_lib.use(mesh):
        tx = optimizer.make(keys, tuned.spec)
        state, base = step.abstract_state(tx, tuned.spec, jnp.float32, mesh), tuned.abstract_base(mesh)
        ids = jax.ShapeDtypeStruct((1, 1, 512), jnp.int32)
        batch = Batch(ids, ids, ids, jax.ShapeDtypeStruct((1, 1, 512), jnp.bool))
        program = step.make_train_step(model, sft, tx, compute, weights=tuned.weights)
        analysis = program.lower(state, batch, jnp.float32(0), base).compile().memory_analysis()
    trained = 4 * param.count(tuned.spec)
    assert tuned.base_bytes(mesh) < 5.5e9
    assert analysis.argument_size_in_bytes == pytest.approx(tuned.base_bytes(mesh) + 3 * trained, rel=0.01)
    assert analysis.output_size_in_bytes == pytest.approx(3 * trained, rel=0.01)
