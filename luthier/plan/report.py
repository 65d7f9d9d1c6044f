"""A plan in figures and in words: memory by part, work, traffic, the roofline, and the verdict.

Left out on purpose: what to change where it does not fit (``search``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax.numpy as jnp
from rich.console import Console

from luthier.memory import GIB
from luthier.model import param
from luthier.plan import roofline, traffic
from luthier.plan.roofline import Times, Work
from luthier.plan.stages import Stage
from luthier.plan.topologies import Topology
from luthier.train import display
from luthier.train.job import Job


@dataclass(frozen=True)
class Plan:
    """What a run of ``command`` would do on ``machine``: its programs, and the ``tokens`` of a step on all devices."""

    command: str
    config: Any
    job: Job[Any]
    machine: Topology
    stages: tuple[Stage, ...]
    tokens: float

    @property
    def estimated(self) -> bool:
        """Whether nothing was compiled: figures are reckoned from shapes."""
        return not self.machine.compiles or any(stage.reckoned for stage in self.stages)

    @property
    def greatest(self) -> Stage:
        """The program that needs the most memory."""
        return max(self.stages, key=lambda stage: stage.needed)

    @property
    def fits(self) -> bool:
        """Whether each program does."""
        return all(stage.work is not None for stage in self.stages) and self.greatest.needed <= self.machine.chip.memory

    @cached_property
    def work(self) -> Work | None:
        """What a device does in a step, None where a program does not fit."""
        total = Work(0.0, 0.0, 0.0, 0.0)
        for stage in self.stages:
            if stage.work is None:
                return None
            total += stage.work.times(stage.runs)
        return total

    @property
    def seconds(self) -> float:
        """The least time of a step: its programs run one after the other."""
        return sum(self.times(stage).bound * stage.runs for stage in self.stages)

    @property
    def seconds_apart(self) -> float:
        """The least time of a step whose devices wait for all that they exchange."""
        return sum(self.times(stage).apart * stage.runs for stage in self.stages)

    def times(self, stage: Stage) -> Times:
        """Return how long one run of a program keeps each resource busy."""
        return roofline.times(stage.work or Work(0.0, 0.0, 0.0, 0.0), self.machine)

    @property
    def tokens_per_second(self) -> float:
        """The most tokens a second that all devices can take."""
        return self.tokens / self.seconds

    @property
    def mfu(self) -> float:
        """The greatest share of the peak FLOP/s that useful work can have."""
        return (self.work.useful if self.work else 0.0) / (self.seconds * self.machine.chip.flops)

    def figures(self) -> dict[str, Any]:
        """Return everything as plain values, bytes and seconds, as ``output_path`` has it."""
        return {
            "command": self.command,
            "model": self.job.source.name,
            "parameters": param.count(self.job.model.spec),
            "trained_parameters": param.count(self.job.tuning.spec),
            "topology": self.machine.name,
            "devices": self.machine.chips,
            "mesh": {axis: size for axis, size in self.job.mesh.shape.items() if size > 1},
            "estimated": self.estimated,
            "fits": self.fits,
            "memory": {"limit": self.machine.chip.memory, "needed": self.greatest.needed},
            "programs": {stage.name: self._figures(stage) for stage in self.stages},
            **self._speed(),
        }

    def _speed(self) -> dict[str, Any]:
        if self.work is None:
            return {}
        return {
            "tokens_per_step": self.tokens,
            "seconds_at_least": self.seconds,
            "seconds_without_overlap": self.seconds_apart,
            "tokens_per_second_at_most": self.tokens_per_second,
            "mfu_at_most": self.mfu,
        }

    def _figures(self, stage: Stage) -> dict[str, Any]:
        found: dict[str, Any] = {"memory": dict(stage.parts), "runs": stage.runs, "kernels": list(stage.kernels)}
        if stage.work is not None:
            found |= {
                "flops": stage.work.flops,
                "useful_flops": stage.work.useful,
                "memory_traffic": stage.work.memory,
                "sent": stage.work.exchanged,
                "sent_over_network": stage.work.network,
                "collectives": collectives(self, stage),
                "seconds": self.times(stage).by_name,
            }
        return found


def collectives(plan: Plan, stage: Stage) -> dict[str, float]:
    """Return {kind and axes: bytes that a device sends in one run}, the most first."""
    totals = traffic.by_axes(stage.collectives, plan.job.mesh)
    ordered = sorted(totals.items(), key=lambda entry: -entry[1])
    return {f"{kind} over {' x '.join(axes) or 'no axis'}": total for (kind, axes), total in ordered}


def show(console: Console, plan: Plan) -> None:
    """Print a plan."""
    job, machine = plan.job, plan.machine
    axes = ", ".join(f"{axis} {size}" for axis, size in job.mesh.shape.items() if size > 1) or "one device"
    how = "an estimate from shapes: nothing was compiled" if plan.estimated else "compiled for these devices"
    title = f"luthier plan {plan.command}"
    display.table(
        console,
        title,
        {
            "model": f"{job.source.name} ({job.model.config.num_hidden_layers} layers)",
            "parameters": _parameters(job),
            "machine": f"{machine.words}: {machine.chips} x {machine.chip.kind} ({axes})",
            "figures": how,
        },
    )
    for stage in plan.stages:
        display.table(console, f"{stage.name}: memory of a device", _memory(stage.parts))
        if stage.work is not None:
            display.table(console, f"{stage.name}: one run on a device", _work(plan, stage))
    display.table(console, "Verdict", verdict(plan))


def verdict(plan: Plan) -> dict[str, str]:
    """Return what it comes to, in words."""
    limit, needed = plan.machine.chip.memory, plan.greatest.needed
    room = f"{needed / GIB:.1f} of {limit / GIB:.1f} GiB"
    if not plan.fits:
        return {"memory": f"does not fit: {plan.greatest.name} needs {room}"}
    slowest = {stage.name: plan.times(stage).slowest for stage in plan.stages}
    rows = {
        "memory": f"fits: {room} ({plan.greatest.name})",
        "a step": f"at least {plan.seconds:.3g} s; {plan.seconds_apart:.3g} s if devices wait for what they exchange",
        "tokens": f"{display.quantity(int(plan.tokens))} a step, at most {plan.tokens_per_second:,.0f} a second",
        "MFU": f"at most {plan.mfu:.0%}",
        "bound by": "; ".join(f"{name}: {what}" for name, what in slowest.items()),
    }
    if slowest.get("decode") == "links":
        rows["advice"] = (
            "for each token, all devices are sent all weights: raise ici_tensor_parallelism, with which each computes "
            "with its own."
        )
    return rows


def _parameters(job: Job[Any]) -> str:
    tuning = job.tuning
    count, dtype = display.quantity(param.count(job.model.spec)), jnp.dtype(tuning.trained_dtype).name
    if tuning.adapter is None:
        return f"{count}, all trained, {dtype}; computed in {job.compute.described}"
    kept = tuning.quantization or jnp.dtype(tuning.dtype).name
    return f"{count} that stay ({kept}), {display.quantity(param.count(tuning.spec))} trained ({dtype})"


def _memory(parts: Mapping[str, float]) -> dict[str, str]:
    rows = {name: f"{size / GIB:8.2f} GiB" for name, size in parts.items() if size}
    return rows | {"together": f"{sum(parts.values()) / GIB:8.2f} GiB"}


def _work(plan: Plan, stage: Stage) -> dict[str, str]:
    assert stage.work is not None
    work, times = stage.work, plan.times(stage)
    again = f", {work.flops - work.useful:.3g} of them computed again" if work.flops > work.useful else ""
    rows = {
        "FLOPs": f"{work.flops:.3g}{again}: {times.compute:.3g} s",
        "memory traffic": f"{work.memory / GIB:.1f} GiB: {times.memory:.3g} s",
    }
    if work.exchanged or work.network:
        rows["sent"] = f"{(work.exchanged + work.network) / GIB:.2f} GiB: {times.exchange + times.network:.3g} s"
        rows |= {f"  {name}": f"{size / GIB:.2f} GiB" for name, size in collectives(plan, stage).items() if size > 1e6}
    if stage.kernels:
        rows["kernels"] = ", ".join(stage.kernels)
    return rows
