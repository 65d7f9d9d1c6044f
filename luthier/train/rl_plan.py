"""What the keys of `luthier rl` come to: the loss with its settings, the algorithm's habits, the devices of each side.

Left out on purpose: anything that reads weights or rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp

from luthier.algorithms import policy
from luthier.algorithms.policy import Habits
from luthier.config import RlConfig
from luthier.data import reasoning
from luthier.errors import UserError
from luthier.types import Loss, Trajectory

ROUNDING = 0.01
"""A clip range under this is narrower than what bf16 makes of equal policies."""


@dataclass(frozen=True)
class Objective:
    """The loss of a policy step, ``loss(logp_BT, rollouts, entropy_BT)``, and what it asks of the loop.

    ``settings`` are all of the loss's own. ``old`` says which policy ratios are taken to: the ``sampler``, the
    ``trainer`` before the first update, or the ``current`` one, which is the trainer's where there is one update.
    """

    loss: Callable[..., Loss]
    settings: dict[str, Any]
    habits: Habits
    old: Literal["sampler", "trainer", "current"]
    entropy: bool

    def is_idle(self, one: Trajectory) -> bool:
        """Say whether a completion has no part in the gradient: its advantage is 0, and nothing else acts on it."""
        return one.advantage == 0 and not self.settings["beta"] and not self.entropy

    def weight(self, trajectories: Sequence[Trajectory]) -> float:
        """Return what completions weigh in the loss, as its ``Loss.weight`` says."""
        tokens = [int(one.mask_T.sum()) for one in trajectories]
        return float(sum(tokens) if self.settings.get("loss_aggregation") == "token" else sum(map(bool, tokens)))


def objective(config: RlConfig, dtype: Any) -> Objective:
    """Return the loss that ``config`` asks for, where policies are computed in ``dtype``.

    Raises UserError for a setting that the algorithm does not have.
    """
    name = config.loss_algo
    known = policy.settings(name)
    for key in ("epsilon_low", "epsilon_high", "dual_clip", "loss_aggregation"):
        if getattr(config, key) is not None and key not in known:
            listed = ", ".join(setting for setting in known if hasattr(config, setting))
            raise UserError(
                f"{key}={getattr(config, key)}: loss_algo={name} has no such setting. Leave it out; it has {listed}."
            )
    given = {key: getattr(config, key) for key in known if getattr(config, key, None) is not None}
    settings = known | given | {"importance_sampling_correction": _correction(config, known | given, dtype)}
    if "completion_length" in known:
        settings["completion_length"] = config.max_new_tokens
    # Another engine's log-probs are never the old policy's: their rounding would be taken for a policy that moved.
    foreign = settings["importance_sampling_correction"] != "none" or config.rollout_engine == "vllm"
    return Objective(
        loss=functools.partial(policy.ALGORITHMS[name], **settings),
        settings=settings,
        habits=habits(config),
        old="trainer" if updates(config) > 1 else "current" if foreign else "sampler",
        entropy=config.log_entropy or config.entropy_coefficient > 0,
    )


def updates(config: RlConfig) -> int:
    """Return how many updates a step's completions serve."""
    return config.num_iterations * config.num_mini_batches


def habits(config: RlConfig) -> Habits:
    """Return the algorithm's habits, but for the keys that say otherwise."""
    own = policy.HABITS[config.loss_algo]
    said = {field.name: getattr(config, field.name) for field in fields(Habits)}
    return replace(own, **{name: value for name, value in said.items() if value is not None})


def advice(config: RlConfig) -> list[str]:
    """Return what a user should know of these settings, though they may be meant."""
    found = []
    if config.loss_algo.startswith("gspo") and updates(config) == 1:
        found.append(
            f"loss_algo={config.loss_algo} with one update for each step's completions: the policy has not moved when "
            "the ratio is taken, so the gradient is that of GRPO. num_mini_batches=4, as in GSPO's paper, makes them "
            "differ."
        )
    if config.beta and config.kl_estimator == "k1":
        found.append("kl_estimator=k1: the gradient of its mean is 0, so beta pulls nowhere. Use k3-iw or k2.")
    if config.beta and config.kl_estimator == "k3":
        found.append("kl_estimator=k3: its gradient is that of the reverse divergence. k3-iw's is unbiased.")
    if config.filters:
        found.append(
            f"{', '.join(config.filters)}: completions are drawn from fewer tokens than the policy loss counts with, "
            "which biases its gradient."
        )
    return found


def reward_paths(config: RlConfig) -> Sequence[str]:
    """Return the reward functions: those asked for, else what suits the dataset; none where an environment rewards."""
    if config.reward_functions or config.environment_rewards:
        return config.reward_functions
    return ["reasoning_gym"] if config.hf_path.startswith(reasoning.PREFIX) else ["math"]


def devices(config: RlConfig, here: Sequence[Any] | None = None) -> tuple[Sequence[Any], Sequence[Any]]:
    """Return which of the devices ``here`` (default: all) train and which sample.

    They are the same, but where the embedded engine works ahead: vLLM's devices are none of JAX's. Raises UserError
    where the keys ask for devices that are not there, or for what these, or those of several processes, cannot do.
    """
    here = jax.devices() if here is None else here
    if config.starts_servers and here[0].platform == "tpu":
        raise UserError(
            "rollout_engine=vllm: on a TPU host one process has all chips, so servers cannot be started beside it. Run "
            "them on hosts of their own (`luthier vllm`), and set vllm_urls=..."
        )
    own = sum(device.process_index == here[0].process_index for device in here)
    if own < len(here):
        _check_processes(config, own)
        return here, here
    count = config.chips_per_vm or len(here)
    if len(here) % count:
        raise UserError(
            f"chips_per_vm={count} does not divide the {len(here)} devices of this host. Give a divisor of {len(here)}."
        )
    used = here[:count]
    if not config.max_staleness or config.rollout_engine == "vllm":
        return used, used
    trains, samples = (
        int(share * count + 1e-9) for share in (config.trainer_devices_fraction, config.sampler_devices_fraction)
    )
    if not trains or not samples:
        raise UserError(
            f"max_staleness={config.max_staleness}: sampler and trainer work side by side on devices of their own, and "
            f"of {count} the fractions give them {samples} and {trains}. Use more devices, or max_staleness=0."
        )
    return used[:trains], used[count - samples :]


def _check_processes(config: RlConfig, own: int) -> None:
    """Raise UserError for keys that a run of several processes, of ``own`` devices each, does not have."""
    if config.chips_per_vm not in (0, own):
        raise UserError(f"chips_per_vm={config.chips_per_vm}: a run of several processes uses all {own} of each.")
    if config.max_staleness and config.rollout_engine == "local":
        raise UserError(
            f"max_staleness={config.max_staleness}: of several processes all sample and train by turns. "
            "Set max_staleness=0, run one process, or have vLLM's servers sample (rollout_engine=vllm vllm_urls=...)."
        )


def _correction(config: RlConfig, settings: dict[str, Any], dtype: Any) -> str:
    asked = config.importance_sampling_correction
    if asked != "auto":
        return asked
    narrow = min(settings.get("epsilon_low", 1.0), settings.get("epsilon_high", 1.0)) < ROUNDING
    rounded = jnp.dtype(dtype).itemsize < 4 and narrow
    return "token" if config.max_staleness or rounded or config.rollout_engine == "vllm" else "none"
