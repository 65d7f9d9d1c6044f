"""How much memory a run will take, before anything is loaded.

An estimate from shapes, good to about a third, so that only what is clearly too much is refused. The compiled program's
own figure follows in the run's output. Left out on purpose: the exact search over settings, which compiles each.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from luthier import mesh as mesh_lib
from luthier.config import RlConfig, SftConfig, TrainKeys
from luthier.errors import UserError
from luthier.memory import GIB
from luthier.model import cost, param
from luthier.model.compute import Compute
from luthier.train.tuning import Tuning

MOMENTS = {"adamw": 2.0, "adafactor": 0.05, "muon": 1.3, "sgd": 1.0}
OVERESTIMATE = 1.35
PROCESS = 1.0 * GIB  # the interpreter, its libraries and compiled programs, where they share the devices' memory


@dataclass(frozen=True)
class Plan:
    """Bytes on one device: what stays (weights, moments, gradients) and what each row of the micro-batch adds."""

    fixed: float
    per_row: float

    def total(self, rows: int) -> float:
        """Return the bytes for a micro-batch of ``rows`` rows a device."""
        return self.fixed + rows * self.per_row


def estimate(
    config: TrainKeys, tuning: Tuning, mesh: Mesh, compute: Compute, *, row_length: int, accumulates: bool
) -> Plan:
    """Return the bytes that training on rows of ``row_length`` tokens takes on each device.

    ``accumulates`` says that gradients are added up over several micro-batches.
    """
    c = tuning.model.config
    weights = param.count(tuning.spec)
    shards = mesh.size // mesh.shape["data"]
    weight_bytes = jnp.dtype(tuning.trained_dtype).itemsize
    moment_bytes = MOMENTS[config.opt_type] * jnp.dtype(config.mu_dtype).itemsize
    gradients = 2.0 if accumulates else 1.0
    state = weights * (weight_bytes * (1 + gradients) + moment_bytes) / shards + tuning.base_bytes(mesh)
    itemsize = jnp.dtype(compute.dtype).itemsize
    # A layer's weights, as it is computed with them, and their gradient, if they have one.
    copies = 2 if tuning.adapter is None else 1
    gathered = cost.largest_layer(c) * itemsize * copies / (mesh.shape["tensor"] * mesh.shape["expert"])
    in_flight = 8 * 4 * cost.widest(c)  # one layer and its gradients, fp32
    per_token = (cost.saved_bytes(c, compute) + in_flight) / mesh.shape["tensor"]
    logits = 3 * 4 * 512 * c.vocab_size / mesh.shape["tensor"]
    process = PROCESS if mesh_lib.platform() == "cpu" else 0.0
    return Plan(state + gathered + logits + process, per_row=per_token * row_length / mesh.shape["context"])


def sampling(config: RlConfig, tuning: Tuning, mesh: Mesh, compute: Compute) -> float:
    """Return the bytes that reinforcement learning needs beside the train step, the cache of keys and values aside.

    These are the sampler's copy of the weights, where it computes in another type, and the reference policy's. An
    adapter's sampler and reference are the base itself; vLLM's weights are on devices of its own.
    """
    ahead = config.max_staleness > 0 and config.rollout_engine == "local"
    if tuning.adapter is not None:
        return tuning.base_bytes(mesh) if ahead else 0.0
    weights = param.count(tuning.spec) * mesh.shape["data"] / mesh.size
    own, computed = jnp.dtype(config.weight_dtype), jnp.dtype(compute.dtype)
    copied = computed.itemsize if ahead or (own != computed and config.rollout_engine == "local") else 0
    return weights * (copied + (own.itemsize if config.beta else 0))


def check(config: SftConfig | RlConfig, plan: Plan, limit: float | None, row: str) -> None:
    """Raise UserError where the plan is over the limit even if a third is overestimated, saying what would fit.

    ``row`` names the key that says how long a row is, and its value.
    """
    rows = config.per_device_batch_size
    if limit is None or plan.total(rows) / OVERESTIMATE <= limit:
        return
    fitting = int((limit - plan.fixed) // plan.per_row)
    if fitting >= 1:
        remedy = f"per_device_batch_size={fitting} fits"
        if isinstance(config, SftConfig) and (product := rows * config.gradient_accumulation_steps) % fitting == 0:
            remedy += f" (with gradient_accumulation_steps={product // fitting} the step stays the same)"
        if config.remat_policy != "full":
            remedy += "; remat_policy=full needs less for each row"
    else:
        remedy = "not even one row fits: set " + ", ".join(_savings(config, row)) + ", or use more devices"
    raise UserError(
        f"per_device_batch_size={rows} with {row} needs about "
        f"{plan.total(rows) / GIB:.1f} GiB on each device, and {limit / GIB:.1f} GiB are free: {remedy}."
    )


def _savings(config: TrainKeys, row: str) -> list[str]:
    changes = {
        "remat_policy=full": config.remat_policy != "full",
        "mu_dtype=bfloat16": config.mu_dtype != "bfloat16",
        "weight_dtype=bfloat16": config.weight_dtype != "bfloat16",
        "opt_type=adafactor": config.opt_type != "adafactor",
    }
    return [change for change, open_ in changes.items() if open_] + [f"a smaller {row.partition('=')[0]}"]


def of_program(compiled: jax.stages.Compiled) -> float | None:
    """Return the bytes a compiled program takes on a device, its arguments included, where the backend says."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    return float(
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
        + analysis.temp_size_in_bytes
    )
