"""The machines that can be planned for, and what their makers publish of them.

A name is that of the cloud's: of v4 and v5p it counts cores, two a chip, of the others chips. GPUs are counted in
GPUs: ``gpu-h100-80gb`` is one, ``gpu-h100-80gb-8`` a host of them. ``cpu`` is the machine at hand, whose peaks nobody
publishes: they are measured.

Left out on purpose: prices, and machines of several kinds of device.
"""

from __future__ import annotations

import functools
import math
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from luthier.errors import UserError, did_you_mean
from luthier.memory import GIB, available
from luthier.model.compute import fast_dtype

TERA, GIGA = 1e12, 1e9


@dataclass(frozen=True)
class Chip:
    """A device: its dense bf16 FLOP/s, its memory and that memory's bytes/s, and what links it to others.

    ``memory`` is what a program can have of it. A link carries ``link`` bytes/s each way; ``network`` is what reaches
    another slice, or another host of GPUs. ``cores`` is how many of them a name counts for a chip. ``source`` is where
    the figures stand.
    """

    kind: str
    platform: Literal["tpu", "gpu", "cpu"]
    flops: float
    memory: float
    bandwidth: float
    link: float
    network: float
    source: str
    cores: int = 1
    ring: int = 0
    """Chips along a side from which on its ends are linked too; 0: never."""


# Of a TPU's HBM, a program can have what libtpu 0.0.42 says where one asks for too much. Links: a chip's published
# bandwidth between chips, in one direction, over its number of links (6 in a 3D torus, 4 in a 2D one).
CHIPS = {
    "v4": Chip(
        "TPU v4", "tpu", 275 * TERA, 30.75 * GIB, 1228 * GIGA, 50 * GIGA, 3.1 * GIGA,
        "https://cloud.google.com/tpu/docs/v4", cores=2, ring=4,
    ),
    "v5e": Chip(
        "TPU v5 lite", "tpu", 197 * TERA, 15.75 * GIB, 819 * GIGA, 50 * GIGA, 3.1 * GIGA,
        "https://cloud.google.com/tpu/docs/v5e", ring=16,
    ),
    "v5p": Chip(
        "TPU v5", "tpu", 459 * TERA, 95.74 * GIB, 2765 * GIGA, 100 * GIGA, 6.25 * GIGA,
        "https://cloud.google.com/tpu/docs/v5p", cores=2, ring=4,
    ),
    "v6e": Chip(
        "TPU v6 lite", "tpu", 918 * TERA, 31.25 * GIB, 1638 * GIGA, 100 * GIGA, 12.5 * GIGA,
        "https://cloud.google.com/tpu/docs/v6e", ring=16,
    ),
    "gpu-a100-80gb": Chip(
        "NVIDIA A100-SXM4-80GB", "gpu", 312 * TERA, 80 * GIGA, 2039 * GIGA, 300 * GIGA, 25 * GIGA,
        "https://www.nvidia.com/en-us/data-center/a100/",
    ),
    "gpu-h100-80gb": Chip(
        "NVIDIA H100 80GB HBM3", "gpu", 989 * TERA, 80 * GIGA, 3350 * GIGA, 450 * GIGA, 50 * GIGA,
        "https://www.nvidia.com/en-us/data-center/h100/",
    ),
    "gpu-h200": Chip(
        "NVIDIA H200", "gpu", 989 * TERA, 141 * GIGA, 4800 * GIGA, 450 * GIGA, 50 * GIGA,
        "https://www.nvidia.com/en-us/data-center/h200/",
    ),
}  # fmt: skip

# Chips -> how they stand, as the cloud hands them out.
FLAT = {
    1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16),
}  # fmt: skip
SOLID = {
    4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4), 128: (4, 4, 8), 256: (4, 8, 8),
    512: (8, 8, 8), 1024: (8, 8, 16), 2048: (8, 16, 16), 4096: (16, 16, 16), 6144: (16, 16, 24),
}  # fmt: skip
SHAPES = {"v4": SOLID, "v5e": FLAT, "v5p": SOLID, "v6e": FLAT}
GPUS_OF_A_HOST = 8
LIBTPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing is run on a TPU here, so that another process may have it
    "TPU_SKIP_MDS_QUERY": "1",  # nor is this machine one that has any
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


@dataclass(frozen=True)
class Topology:
    """A machine: ``slices`` times ``chips`` of a kind, which stand in ``shape``."""

    name: str
    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        """The devices of all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def words(self) -> str:
        """Its name, and how many there are of it."""
        return self.name if self.slices == 1 else f"{self.slices} x {self.name}"

    @property
    def compiles(self) -> bool:
        """Whether its programs can be compiled here; else they are traced, and their figures are estimates."""
        return self.chip.platform != "gpu"

    @property
    def host(self) -> tuple[int, ...]:
        """The chips of a host, as they stand."""
        if self.chip.platform != "tpu":
            return (min(math.prod(self.shape), GPUS_OF_A_HOST),)
        if len(self.shape) == 2:
            return self.shape if math.prod(self.shape) <= 8 else (2, 2)
        return (2, 2, 1)

    @property
    def exchange(self) -> float:
        """The bytes/s that the chip with the fewest links sends to its neighbours, over all of them at once."""
        if self.chip.platform == "gpu":
            return self.chip.link if math.prod(self.shape) <= GPUS_OF_A_HOST else self.chip.network
        return self.chip.link * sum(self._links(size) for size in self.shape)

    def _links(self, size: int) -> int:
        if size == 1:
            return 0
        return 2 if self.chip.ring and size >= self.chip.ring and size % self.chip.ring == 0 else 1

    def devices(self, *, compiles: bool = True) -> Sequence[Any]:
        """Return the devices to compile for, or those that stand for them where nothing compiles, or is to.

        Raises UserError where libtpu, which compiles for TPUs, is not installed.
        """
        if self.chip.platform == "cpu":
            return jax.devices("cpu")[:1]
        if compiles and self.compiles:
            return _described(self)
        return [Stand(number, self) for number in range(self.chips)]


@dataclass(frozen=True)
class Stand:
    """A device that is not there and for which nothing is compiled: enough of one to split arrays over."""

    id: int
    machine: Topology

    @property
    def platform(self) -> str:
        """Its kind, as jax names it."""
        return self.machine.chip.platform

    @property
    def device_kind(self) -> str:
        """Its name, as jax has it."""
        return self.machine.chip.kind

    @property
    def slice_index(self) -> int | None:
        """The slice that it is in."""
        each = self.machine.chips // self.machine.slices
        return self.id // each if self.machine.slices > 1 else None

    @property
    def process_index(self) -> int:
        """The process that would have it: one a host."""
        return self.id // math.prod(self.machine.host)

    @property
    def coords(self) -> tuple[int, ...]:
        """Where it stands."""
        x, y, z = (*self.machine.shape, 1, 1)[:3]
        number = self.id % (x * y * z)
        return number % x, number // x % y, number // (x * y)

    @property
    def core_on_chip(self) -> int:
        """Which of a chip's devices it is."""
        return 0


@functools.cache  # programs are traced anew for devices that are others
def _described(machine: Topology) -> Sequence[Any]:
    """Return the devices of a TPU as its compiler describes them."""
    for name, value in {**LIBTPU, "TPU_ACCELERATOR_TYPE": machine.name}.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    solid, host = ((*sides, 1)[:3] for sides in (machine.shape, machine.host))
    words: dict[str, Any] = {"chips_per_host_bounds": solid if machine.chips < 4 else host}
    if machine.chip.cores > 1:
        words["chip_config_name"] = "megacore"  # a chip's two cores are one device
    if machine.slices > 1:
        words["num_slices"] = machine.slices
    name = f"{machine.name.partition('-')[0]}:{'x'.join(map(str, machine.shape))}"
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **words).devices
    except (RuntimeError, NotImplementedError) as error:
        raise UserError(
            f"topology={machine.name}: its compiler could not be started ({str(error).splitlines()[0]}). Install it: "
            "pip install 'luthier[plan]'."
        ) from None


def find(name: str, slices: int = 1) -> Topology:
    """Return the machine of that name. Raises UserError where there is none."""
    if name == "cpu":
        return Topology(name, _this_cpu(), (1,))
    family, _, count = name.rpartition("-")
    if name in CHIPS and CHIPS[name].platform == "gpu":
        family, count = name, "1"
    chip = CHIPS.get(family)
    if chip is None or not re.fullmatch(r"[1-9]\d*", count):
        hint = did_you_mean(name, names()) or f" There are {', '.join(f'{each}-N' for each in CHIPS)} and cpu."
        raise UserError(f"topology={name}: no such machine is known.{hint}")
    if chip.platform == "gpu":
        return Topology(name, chip, (int(count),), slices)
    chips, rest = divmod(int(count), chip.cores)
    shape = SHAPES[family].get(chips)
    if rest or shape is None:
        sizes = ", ".join(f"{family}-{chips * chip.cores}" for chips in SHAPES[family])
        raise UserError(f"topology={name}: {family} comes in {sizes}.")
    return Topology(name, chip, shape, slices)


@functools.cache
def _this_cpu() -> Chip:
    """Return the CPU of this machine: what it does in a large product, and in going through a large array."""
    square, array = jnp.ones((2048, 2048), fast_dtype()), jnp.ones(2**26, jnp.float32)
    product = _seconds(jax.jit(lambda x: x @ x), square)
    copied = _seconds(jax.jit(lambda x: x + 1), array)
    memory = available(Mesh(np.array(jax.devices("cpu")[:1]), ("data",))) or 0.0
    return Chip("CPU, peaks as measured", "cpu", 2 * 2048**3 / product, memory, 2 * 4 * 2**26 / copied, 0.0, 1.0, "")


def _seconds(function: Callable[[jax.Array], jax.Array], argument: jax.Array) -> float:
    """Return the least time of some calls."""
    function(argument).block_until_ready()
    times = []
    for _ in range(5):
        started = time.perf_counter()
        function(argument).block_until_ready()
        times.append(time.perf_counter() - started)
    return min(times)


def names() -> list[str]:
    """Return the usual names."""
    tpus = [f"{family}-{chips * CHIPS[family].cores}" for family, shapes in SHAPES.items() for chips in shapes]
    gpus = [name + size for name, chip in CHIPS.items() if chip.platform == "gpu" for size in ("", "-8")]
    return [*tpus, *gpus, "cpu"]
