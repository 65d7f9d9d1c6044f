"""Plans: what is in memory, what work it is, and what that comes to; reckoned here, compiled where it says slow."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import Any

import jax
import pytest
from rich.console import Console

from luthier import cli, config
from luthier import mesh as mesh_lib
from luthier.algorithms.sft import sft
from luthier.checkpoint.source import Source
from luthier.errors import UserError
from luthier.memory import GIB
from luthier.model import published
from luthier.model.model import Model
from luthier.plan import abstract, flops, plans, search, stages, topologies
from luthier.plan.report import Plan
from luthier.train import job as job_lib
from tiny import TINY


@pytest.fixture
def console() -> Console:
    return Console(quiet=True)


EIGHT_B = ["model_name=llama3.1-8b", "max_target_length=4096"]


def planned(*arguments: str, **settings: Any) -> Plan:
    asked = config.resolve("plan", arguments, {})
    machine = topologies.find(asked.topology, asked.topology_num_slices)
    return plans.plan(asked, machine, **{"compiles": False, **settings})


def of_h100(*arguments: str) -> Plan:
    return planned("sft", "topology=gpu-h100-80gb-8", *EIGHT_B, *arguments)


def test_weights_and_moments_are_counted_to_the_byte():
    (stage,) = of_h100("per_device_batch_size=1").stages
    count = published.PUBLISHED["meta-llama/Llama-3.1-8B"].parameters
    norms = (2 * 32 + 1) * 4096  # which every device has whole
    assert stage.parts["trained weights"] == 4 * ((count - norms) / 8 + norms)
    assert stage.parts["optimizer"] - 2 * stage.parts["trained weights"] == 4  # the number of the step
    assert stage.needed == sum(stage.parts.values())


def test_adapters_leave_gradients_and_moments_small():
    whole, adapter, quantised = (
        of_h100(*more).stages[0].parts for more in ([], ["lora_rank=16"], ["lora_rank=16", "quantization=nf4"])
    )
    assert adapter["gradients"] + adapter["optimizer"] < 0.05 * (whole["gradients"] + whole["optimizer"])
    assert adapter["other weights"] == pytest.approx(whole["trained weights"] / 2, rel=0.01)
    assert quantised["other weights"] < 0.4 * adapter["other weights"]


def test_recomputation_is_work_and_no_use():
    kept, again = of_h100().work, of_h100("remat_policy=full").work
    assert kept is not None
    assert again is not None
    assert again.useful == kept.useful == kept.flops
    assert 1.25 < again.flops / kept.flops < 1.34  # a third, but for the head
    model = abstract.source(config.resolve("plan", ["sft", "topology=v6e-8", *EIGHT_B], {}))
    assert model.kind == "random"
    assert model.config["hidden_size"] == 4096


def test_a_bound_is_that_of_the_slowest():
    plan = of_h100("per_device_batch_size=1")
    (stage,) = plan.stages
    times = plan.times(stage)
    assert plan.seconds == times.compute == max(times.compute, times.memory, times.exchange)
    assert plan.seconds_apart > plan.seconds
    assert plan.tokens_per_second == pytest.approx(8 * 4096 / plan.seconds)
    assert plan.mfu == pytest.approx(1.0)
    assert plan.estimated
    assert plan.fits


def test_accumulating_sends_weights_again_for_each_micro_batch():
    once, twice = (of_h100(f"gradient_accumulation_steps={steps}").work for steps in (1, 2))
    assert once is not None
    assert twice is not None
    assert twice.exchanged == pytest.approx(2 * once.exchanged)
    assert twice.useful == pytest.approx(2 * once.useful)


def test_what_leaves_a_slice_goes_over_the_network():
    one = of_h100().work
    copies, split = (of_h100("topology_num_slices=2", *more).work for more in (["dcn_data_parallelism=2"], []))
    assert one is not None
    assert copies is not None
    assert split is not None
    assert one.network == 0
    assert copies.exchanged == pytest.approx(one.exchanged, rel=1e-3)  # norms go over both
    assert 0 < copies.network < 0.2 * copies.exchanged  # gradients, of which a device has an eighth
    assert split.exchanged == 0
    assert split.network > one.exchanged


def test_reinforcement_learning_has_engine_and_trainer_on_the_same_chips():
    plan = planned("rl", "topology=gpu-h200-8", "model_name=gemma3-4b", "beta=0.01")
    parts = {stage.name: stage.parts for stage in plan.stages}
    assert set(parts) == {"prefill", "decode", "policy step"}
    for stage in parts.values():
        assert {"sampler's weights", "KV cache", "trained weights", "optimizer", "reference's weights"} <= set(stage)
    assert plan.tokens == 8 * 8 * 256
    decode = next(stage for stage in plan.stages if stage.name == "decode")
    assert plan.times(decode).slowest == "links"  # each token of a few rows has all weights sent to each device
    alone = planned("rl", "topology=gpu-h200", "model_name=gemma3-4b")
    assert alone.times(alone.stages[1]).slowest == "memory"


def test_an_adapters_sampler_has_the_base_and_no_copy():
    plan = planned("rl", "topology=gpu-h200", "model_name=gemma3-4b", "lora_rank=8", "quantization=nf4", "beta=0.1")
    decode = next(stage for stage in plan.stages if stage.name == "decode")
    assert set(decode.parts) == {"weights", "KV cache", "optimizer", "temporary"}
    assert decode.parts["weights"] < 0.5 * 2 * published.PUBLISHED["google/gemma-3-4b-pt"].parameters


def test_a_sampler_of_its_own_leaves_the_trainers_memory_alone():
    plan = planned("rl", "topology=gpu-h200-8", "model_name=gemma3-4b", "max_staleness=1")
    decode = next(stage for stage in plan.stages if stage.name == "decode")
    assert "optimizer" not in decode.parts
    assert "sampler's weights" in decode.parts


def test_this_machine_is_planned_for_by_compiling(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    plan = planned("sft", "topology=cpu", f"model_name={tmp_path}", "max_target_length=32", compiles=True)
    (stage,) = plan.stages
    assert plan.fits
    assert not plan.estimated
    assert stage.work is not None
    assert stage.work.memory > stage.parts["trained weights"]
    assert not stage.collectives


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["sft", "model_name=llama3.1-8b"], "no machine: set topology="),
        (["dpo", "topology=v6e-8"], "give sft or rl"),
        ([], "give sft or rl"),
        (["sft", "topology=gpu-h200", "model_name=lama"], "These can be planned for without a file: .*Llama-3.1-8B"),
        (["sft", "topology=gpu-h200-3", *EIGHT_B, "ici_tensor_parallelism=3"], "does not divide"),
        (["sft", "topology=gpu-h200", *EIGHT_B, "ici_fsdp_parallelism=4"], "4 devices"),
        (["sft", "topology=gpu-h200", *EIGHT_B, "topologi=x"], "Did you mean `topology`"),
    ],
)
def test_mistakes_are_named(arguments, says, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=says):
        planned(*arguments)


def test_the_closest_settings_that_fit_change_no_result_where_that_is_enough(console):
    found = planned("sft", "topology=gpu-h100-80gb-4", *EIGHT_B, "per_device_batch_size=8", "compile=false")
    assert not found.fits
    better = search.closest(found, console)
    assert better is not None
    assert better.plan.fits
    words = dict(word.partition("=")[::2] for word in shlex.split(better.command)[2:])
    assert better.command.startswith("luthier sft ")
    assert set(words) - {"model_name", "max_target_length", "hf_path"} <= search.SAME_RESULT
    again = config.resolve("sft", shlex.split(better.command)[2:], {})
    assert again.per_device_batch_size * again.gradient_accumulation_steps == 8


def test_a_model_too_big_to_train_is_given_an_adapter(console):
    found = planned("sft", "topology=gpu-h100-80gb", *EIGHT_B, "compile=false")
    better = search.closest(found, console)
    assert better is not None
    assert better.plan.fits
    assert "enable_lora=true" in better.command
    assert "quantization" not in better.command


def test_nothing_fits_a_model_that_is_far_too_big(console):
    found = planned("sft", "topology=gpu-h100-80gb", "model_name=deepseek3-671b", "compile=false")
    assert search.closest(found, console) is None


def test_the_command_prints_a_plan_and_writes_its_figures(tmp_path, capsys):
    path = tmp_path / "plan.json"
    words = ["sft", "topology=gpu-h100-80gb-4", *EIGHT_B, "per_device_batch_size=8", f"output_path={path}"]
    assert cli.main(["plan", *words]) == 0
    printed = capsys.readouterr().out
    assert "does not fit" in printed
    assert "luthier sft model_name=llama3.1-8b" in printed
    figures = json.loads(path.read_text())
    assert figures["estimated"]
    assert not figures["fits"]
    assert figures["fitting"]["fits"]
    assert figures["fitting"]["command"] in printed.replace("\n", " ")
    assert cli.main(["plan", "sft", "topology=v7-8", "model_name=llama3.1-8b"]) == 2


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, temporaries (298.38G) exceeds available HBM (31.25G).", 298.38),
        ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Used 33.40G of 31.25G hbm. Exceeded by 2G.", 33.4),
        ("RESOURCE_EXHAUSTED: ... Used 2.00M of vmem. Total hbm usage >= 40.00G:", 40.0),
    ],
)
def test_what_a_compiler_says_is_too_much_is_read(message, gib):
    assert stages.overflow(message) == pytest.approx(gib * GIB)
    assert stages.overflow(message.replace("RESOURCE_EXHAUSTED", "INTERNAL")) is None


def test_flops_are_those_that_the_program_has():
    """Counted from the traced program's own products, of a step whose attention is spelled out in full."""
    asked = config.resolve("sft", ["model_name=x", "hf_path=x", "max_target_length=64", "remat_policy=none"], {})
    mesh = mesh_lib.make(asked, jax.devices()[:1])
    with mesh_lib.use(mesh):
        job = job_lib.prepare(asked, Source("random", "x", Path(), TINY), Model.from_hf(TINY, "x"), mesh)
        traced = job_lib.trace_training(job, sft)
    tokens = asked.per_device_batch_size * 64
    assert flops.training(job, 64)[1] * tokens == pytest.approx(_products(traced.jaxpr.jaxpr), rel=0.12)


def _products(jaxpr: Any) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            sizes = equation.invars[0].aval.shape
            inner = math.prod(sizes[axis] for axis in contracted)
            total += 2.0 * math.prod(equation.outvars[0].aval.shape) * inner
        turns = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            inside = getattr(value, "jaxpr", value)
            if hasattr(inside, "eqns"):
                total += turns * _products(inside)
    return total


@pytest.mark.slow
@pytest.mark.usefixtures("tpu_compiler")
def test_a_tpus_compiler_says_what_it_takes(tmp_path):
    """A small model compiled for v6e-8 with no TPU: the splash kernel is in it, and only weights are gathered."""
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"head_dim": 128, "hidden_size": 512}))
    plan = planned("sft", "topology=v6e-8", f"model_name={tmp_path}", "max_target_length=256", compiles=True)
    (stage,) = plan.stages
    assert plan.fits
    assert not plan.estimated
    assert any(kernel.startswith("splash_mha_fwd") for kernel in stage.kernels)
    assert any(kernel.startswith("splash_mha_dkv") for kernel in stage.kernels)
    assert stage.work is not None
    assert stage.work.memory > 0
    assert stage.work.exchanged > 0
    assert {axis for each in stage.collectives for axis in each.axes(plan.job.mesh)} == {"fsdp"}


@pytest.mark.slow
@pytest.mark.usefixtures("tpu_compiler")
def test_what_does_not_fit_a_tpu_is_a_verdict_and_no_traceback(tmp_path):
    wide = TINY | {"hidden_size": 8192, "intermediate_size": 65536, "num_hidden_layers": 8, "head_dim": 128}
    (tmp_path / "config.json").write_text(json.dumps(wide))
    plan = planned("sft", "topology=v6e-1", f"model_name={tmp_path}", "max_target_length=128", compiles=True)
    assert not plan.fits
    assert plan.work is None
    assert plan.greatest.needed > plan.machine.chip.memory
