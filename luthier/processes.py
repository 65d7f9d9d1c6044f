"""The processes of one run: how they find each other and agree. With one process, nothing happens.

JAX's own distributed runtime does the work: a coordinator that knows who is alive, collectives that carry values. A run
of several processes is one program: each of them goes through the same steps in the same order, and what only one of
them can know (a file, a signal, a reward) is told to all before anything is decided by it.

Left out on purpose: starting processes, which launchers do (``launch/``), and going on without one that has died: the
others end (``parting``), and the same command resumes.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import pickle
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from luthier import __version__, parting, runtime
from luthier.config.groups import HostKeys
from luthier.errors import RunError, UserError

SKYPILOT_PORT = 8476
OWN_KEYS = {"process_id", "jax_cache_dir", "hf_access_token"}
"""Keys that may differ between processes."""
LEAST_BYTES = 4096
"""Bytes in which values travel are this many, or twice as many, and so on: each size is a program of its own."""

T = TypeVar("T")


def start(keys: HostKeys) -> None:
    """Join the processes of the run, where keys or a launcher say that there are several.

    Call it before jax computes anything. Raises UserError where the keys are not enough, or differ between processes.
    """
    place = _place(keys)
    if place is None:
        return
    parting.say_last_words(
        f"jax.distributed ended it while it waited for the other processes ({_named(place)}). Not all came "
        f"within {keys.jax_distributed_initialization_timeout} s, or process 0 cannot be reached: start all of them, "
        "with the same coordinator_address and num_processes and each with a process_id of its own."
    )
    runtime.have_sums_right()
    # Signals are agreed on by `train.signals`; this service would take SIGTERM for itself.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            **place,
            initialization_timeout=keys.jax_distributed_initialization_timeout,
            heartbeat_timeout_seconds=keys.jax_distributed_heartbeat_timeout_seconds,
        )
    except (RuntimeError, ValueError, OSError) as error:
        if jax.distributed.is_initialized():
            raise
        reason = str(error).splitlines()[0]
        raise UserError(f"joining the other processes ({_named(place)}) failed: {reason}") from None
    parting.say_last_words(
        "jax.distributed ended it: another process of this run has died or gives no sign of life (its own output and "
        f"the lines above may say why). {parting.RESUME}"
    )
    check_same(keys)


def is_first() -> bool:
    """Say whether this process is the one that writes files and prints, and answers for all."""
    return not several() or jax.process_index() == 0


def several() -> bool:
    """Say whether the run has more than this process; a lone one's devices are not started for the question."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def gather(value: Any) -> list[Any]:
    """Return the value that each process gives, in the order of the processes; all call it."""
    if not several():
        return [value]
    data = _packed(value)
    lengths = multihost_utils.process_allgather(np.array(len(data)))
    rows = multihost_utils.process_allgather(_padded(data, int(lengths.max())))
    return [pickle.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]


def tell(value: Any) -> Any:
    """Return the first process's value; all call it, and what the others give is of no account."""
    if not several():
        return value
    data = _packed(value) if is_first() else np.zeros(0, np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.array(len(data))))
    return pickle.loads(multihost_utils.broadcast_one_to_all(_padded(data, length))[:length].tobytes())


def by_first(function: Callable[[], T]) -> T:
    """Return what the function gives in the first process, the only one that calls it; all call this.

    Where it raises UserError or RunError, all raise it.
    """
    if not several():
        return function()
    value = error = None
    if is_first():
        try:
            value = function()
        except (UserError, RunError) as raised:
            error = raised
    value, error = tell((value, error))
    if error is not None:
        raise error
    return value


def greatest(number: int) -> jax.Array:
    """Start to find the greatest number that a process gives; all call it, and none waits until it looks."""
    everyone = _everyone()
    with jax.set_mesh(everyone.mesh):
        numbers = np.full(jax.local_device_count(), number, np.int32)
        return _greatest()(jax.make_array_from_process_local_data(everyone, numbers))


def fetch(tree: Any) -> Any:
    """Return a tree of arrays as the host's, whole, those too that are split over processes; all call it."""
    leaves, structure = jax.tree.flatten(tree)
    far = {n: leaf for n, leaf in enumerate(leaves) if not (leaf.is_fully_addressable or leaf.is_fully_replicated)}
    if far:
        mesh = next(iter(far.values())).sharding.mesh
        for number, leaf in _whole(mesh)(far).items():
            leaves[number] = leaf
    return jax.tree.unflatten(structure, jax.device_get(leaves))


def wait(what: str) -> None:
    """Return when all processes have come here."""
    if several():
        multihost_utils.sync_global_devices(what)


def check_same(keys: HostKeys) -> None:
    """Raise UserError, in every process, naming the keys that differ between them."""
    values = keys.model_dump(exclude=OWN_KEYS) | _versions()
    if len(set(gather(_digest(values)))) == 1:
        return
    first, *others = gather(values)
    number, other = next((number, other) for number, other in enumerate(others, 1) if other != first)
    differing = [
        f"{name} ({first.get(name)!r} in process 0, {other.get(name)!r} in process {number})"
        for name in first | other  # other versions may have other keys
        if first.get(name) != other.get(name)
    ]
    raise UserError(
        f"the processes of this run were started differently: {', '.join(differing)}. "
        "Give all of them the same command (but for process_id) and the same versions."
    )


def check_alike(what: str, value: str) -> None:
    """Raise UserError, in every process, where ``value`` is not the same in all of them; ``what`` names it."""
    values = gather(value)
    odd = [number for number, other in enumerate(values) if other != values[0]]
    if odd:
        raise UserError(
            f"{what} differ between processes: those of {', '.join(map(str, odd[:8]))} are not process 0's. "
            "Give all of them the same files, tokenizer and versions."
        )


def _place(keys: HostKeys) -> dict[str, Any] | None:
    """Return what ``jax.distributed.initialize`` is to be told, empty where it finds out; None for a lone process."""
    asked = {"coordinator_address": keys.coordinator_address or None}
    asked |= {"num_processes": keys.num_processes, "process_id": keys.process_id}
    given = {name: value for name, value in asked.items() if value is not None}
    if keys.num_processes == 1:
        return None
    if len(given) == len(asked):
        return {**given, "cluster_detection_method": "deactivate"}
    found = _launched()
    if found is None and not given:
        return None
    if found is None:
        missing = [name for name in asked if name not in given]
        raise UserError(
            f"{', '.join(f'{name}={value}' for name, value in given.items())} without {' and '.join(missing)}: no "
            "launcher was found that says these (SLURM, GKE, SkyPilot, Open MPI, TPU hosts). Give all three."
        )
    return found | given


def _launched(environment: Mapping[str, str] = os.environ) -> dict[str, Any] | None:
    """Return what the launcher says that is not found by JAX itself; None where there is none, or for one process."""
    nodes = int(environment.get("SKYPILOT_NUM_NODES", "1"))
    if nodes > 1:
        first = environment["SKYPILOT_NODE_IPS"].split()[0]
        rank = int(environment["SKYPILOT_NODE_RANK"])
        address = {"coordinator_address": f"{first}:{SKYPILOT_PORT}", "num_processes": nodes, "process_id": rank}
        return {**address, "cluster_detection_method": "deactivate"}
    from jax._src.clusters import ClusterEnv, K8sCluster  # jax has no public way to ask without starting

    for cluster in ClusterEnv._cluster_types:
        # A pod is one of several in an indexed job alone; of others, it cannot be asked how many they are.
        if cluster.opt_in_only_method or (cluster is K8sCluster and "JOB_COMPLETION_INDEX" not in environment):
            continue
        if cluster.is_env_present():
            return {} if cluster.get_process_count() > 1 else None
    return None


def _named(place: Mapping[str, Any]) -> str:
    told = [f"{name}={value}" for name, value in place.items() if name != "cluster_detection_method"]
    return ", ".join(told) or "as the launcher says"


def _versions() -> dict[str, str]:
    return {"version of luthier": __version__, "version of jax": jax.__version__}


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def _packed(value: Any) -> np.ndarray:
    return np.frombuffer(pickle.dumps(value), np.uint8)


def _padded(data: np.ndarray, length: int) -> np.ndarray:
    size = LEAST_BYTES
    while size < length:
        size *= 2
    return np.concatenate([data, np.zeros(size - len(data), np.uint8)])


@functools.cache
def _everyone() -> Any:
    return NamedSharding(Mesh(np.asarray(jax.devices()), ("all",)), P("all"))


@functools.cache
def _greatest() -> Any:
    return jax.jit(jnp.max)


@functools.cache
def _whole(mesh: Any) -> Any:
    """Return the program that gathers arrays onto every device of a mesh."""
    return jax.jit(lambda arrays: arrays, out_shardings=NamedSharding(mesh, P()))
