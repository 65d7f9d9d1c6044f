"""The words around a run of `luthier rl`: the header before it, evaluations in it, the summary after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh
from rich.console import Console

from luthier.algorithms.policy import Habits
from luthier.config import RlConfig
from luthier.memory import GIB, available, peak_resident
from luthier.model.compute import Compute
from luthier.train import display, memory, report, rl_plan
from luthier.train.job import Job
from luthier.train.learner import Learner
from luthier.train.report import Evaluations
from luthier.train.sampler import Collected, Sampler
from luthier.train.tuning import Tuning

NUMBERS: display.Numbers = (
    ("reward", "reward {:.3f}"),
    ("kl", "KL {:.4f}"),
    ("completions/mean_length", "length {:.0f}"),
    ("clip_ratio/region_mean", "ratios clipped {:.1%}"),
    ("sampling/logp_difference/mean", "mismatch {:.1e}"),
    ("seconds/sampling", "sampling {:.1f} s"),
    ("seconds/reward", "reward {:.1f} s"),
    ("seconds/training", "training {:.1f} s"),
)
"""What is shown of a step."""


def header(
    console: Console, job: Job[RlConfig], sampler: Sampler, learner: Learner, plan: memory.Plan, total: int, place: Path
) -> None:
    """Print what is about to happen."""
    config, free = job.config, available(job.mesh)
    needed = plan.total(config.per_device_batch_size)
    lines = {
        "model": f"{job.source.name} ({job.model.config.num_hidden_layers} layers)",
        "parameters": report.parameters(job),
        "devices": _devices(config, job.mesh, sampler.mesh),
        "prompts": f"{len(sampler.tasks):,} of {config.hf_path} ({config.train_split}), "
        f"{sampler.tasks.shortest} to {sampler.tasks.longest} tokens",
    }
    if sampler.held_out is not None:
        lines["held out"] = f"{len(sampler.held_out):,} prompts"
    lines |= {
        "rewards": ", ".join(sampler.names),
        "step": f"{config.prompts_per_step} prompts x {config.num_generations} completions of at most "
        f"{config.max_new_tokens} tokens; {rl_plan.updates(config)} "
        f"{'update' if rl_plan.updates(config) == 1 else 'updates'}, rows of {learner.layout.row_length} tokens",
        "loss": _loss(config, learner.objective),
        "training": f"{total} steps of {config.opt_type}, learning rate {config.learning_rate:g} "
        f"({config.lr_schedule_type})",
        "memory": f"about {needed / GIB:.1f} GiB a device expected" + (f", {free / GIB:.1f} GiB free" if free else ""),
        "output": str(place),
    }
    lines |= report.left_out(job)
    display.table(console, "luthier rl", lines)
    for sentence in rl_plan.advice(config):
        display.warn(console, sentence)


def nothing_trained(collected: Collected, habits: Habits) -> str:
    """Return what to say of a step whose completions are all left out."""
    flat = len(collected.groups) - len(collected.kept)
    return (
        f"step {collected.number}: no completion is trained on, so the weights stay what they are: {flat} of "
        f"{len(collected.groups)} groups have rewards that are all alike (zero_variance_groups="
        f"{habits.zero_variance_groups}), and in the others none is left (truncated_completions="
        f"{habits.truncated_completions}). Are the prompts too hard or too easy, or is max_new_tokens too low?"
    )


def evaluation(console: Console, number: int, values: dict[str, float]) -> None:
    """Print what an evaluation found."""
    measured = [name for name in values if f"{name}/low" in values]
    shown = (
        f"{name} {values[name]:.3f} ({values[f'{name}/low']:.3f} to {values[f'{name}/high']:.3f})" for name in measured
    )
    console.print(f"held-out prompts at step {number}: {', '.join(shown) or 'no prompt has a reward'}")


def summary(console: Console, place: Path, evaluations: Evaluations, tuning: Tuning) -> None:
    """Print what came of it and where it lies."""
    lines = {}
    if len(evaluations) > 1:
        before, after = evaluations[min(evaluations)], evaluations[max(evaluations)]
        for name in (name for name in before if f"{name}/low" in before and name in after):
            said = (
                f"{each[name]:.3f} (95%: {each[f'{name}/low']:.3f} to {each[f'{name}/high']:.3f})"
                for each in (before, after)
            )
            lines[f"held-out {name}"] = "{} before, {} after".format(*said)
    lines["peak memory"] = f"{peak_resident() / GIB:.1f} GiB in this process"
    lines["metrics"] = str(place / "metrics.jsonl")
    lines["completions"] = str(place / "rollouts")
    folder = report.result(tuning, place)
    lines[folder.name] = str(folder)
    display.table(console, "Done", lines)


def _devices(config: RlConfig, trains: Mesh, samples: Mesh) -> str:
    if config.rollout_engine == "vllm":
        servers = len(config.vllm_urls) or config.vllm_servers
        sampler = f"{servers} vLLM {'server samples' if servers == 1 else 'servers sample'}"
    else:
        sampler = f"{report.devices(samples)} sample"
    if config.max_staleness:
        steps = "step" if config.max_staleness == 1 else "steps"
        return f"{report.devices(trains)} train, {sampler}, at most {config.max_staleness} {steps} behind"
    return report.devices(trains) if config.rollout_engine == "local" else f"{report.devices(trains)} train, {sampler}"


def _loss(config: RlConfig, objective: rl_plan.Objective) -> str:
    shown = ("epsilon_low", "epsilon_high", "dual_clip", "loss_aggregation", "beta", "entropy_coefficient")
    settings = [
        f"{name} {objective.settings[name]:g}"
        if isinstance(objective.settings[name], float)
        else f"{name} {objective.settings[name]}"
        for name in shown
        if objective.settings.get(name)
    ]
    settings.append(f"advantages {objective.habits.advantages}")
    if (correction := objective.settings["importance_sampling_correction"]) != "none":
        settings.append(f"sampler corrected by {correction}")
    return f"{config.loss_algo}: {', '.join(settings)}"


def mismatch(config: RlConfig, compute: Compute, number: int, apart: float) -> str:
    """Return what to say where sampler and trainer are too far apart, and the likely cause."""
    if config.rollout_engine == "vllm":
        cause = _of_vllm(config, compute.dtype)
    elif config.max_staleness:
        cause = (
            f"the sampler's weights are older (max_staleness={config.max_staleness}), which is corrected for; lower "
            "it, or learning_rate"
        )
    elif jnp.dtype(compute.dtype).itemsize < 4:
        less = "" if compute.float32 == "attention" else "float32_activations=attention rounds less, and "
        cause = (
            f"the model is computed in {compute.described}, which rounds: where it grows, the policy has become "
            f"too sure or too unstable; {less}dtype=float32 tells rounding from other causes"
        )
    else:
        cause = "in float32 both should agree to 1e-4: this is a fault, of the engine or of the train step; report it"
    return (
        f"step {number}: log-probs of sampler and trainer differ by {apart:.2g} on average, over max_logp_difference="
        f"{config.max_logp_difference:g}. Likely: {cause}."
    )


def _of_vllm(config: RlConfig, dtype: Any) -> str:
    """Return why vLLM's log-probs may be far from the trainer's."""
    behind = max(config.max_staleness, config.weight_sync_interval - 1)
    steps = "step" if behind == 1 else "steps"
    older = f"vLLM's weights are up to {behind} {steps} older, which is corrected for; or " if behind else ""
    if jnp.dtype(dtype).itemsize < 4:
        return (
            f"{older}vLLM computes in {jnp.dtype(dtype).name} by other kernels, which round otherwise. It is corrected "
            "for, as long as it does not grow; dtype=float32 tells rounding from other causes"
        )
    return (
        f"{older}vLLM computes something else, since in float32 both agree to 1e-3: with another dtype or quantised "
        "weights (vllm_arguments), or another form of this model"
    )
