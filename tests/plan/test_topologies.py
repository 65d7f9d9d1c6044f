"""The table of machines: names as clouds use them, and what stands behind each."""

from __future__ import annotations

import pytest

from luthier import mesh as mesh_lib
from luthier.config import ModelKeys
from luthier.errors import UserError
from luthier.memory import GIB
from luthier.plan import topologies


@pytest.mark.parametrize(
    ("name", "chips", "host"),
    [
        ("v5p-8", 4, (2, 2, 1)),
        ("v5p-128", 64, (2, 2, 1)),
        ("v4-32", 16, (2, 2, 1)),
        ("v6e-1", 1, (1, 1)),
        ("v6e-8", 8, (2, 4)),
        ("v6e-256", 256, (2, 2)),
        ("v5e-16", 16, (2, 2)),
        ("gpu-h200", 1, (1,)),
        ("gpu-h100-80gb-16", 16, (8,)),
    ],
)
def test_a_name_says_how_many_chips(name, chips, host):
    machine = topologies.find(name)
    assert (machine.chips, machine.host) == (chips, host)


def test_every_usual_name_is_found():
    assert [topologies.find(name).name for name in topologies.names()] == topologies.names()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("v6e-9", "v6e comes in v6e-1, v6e-4, v6e-8"),
        ("v5p-7", "v5p comes in v5p-8"),
        ("v6f-8", "Did you mean"),
        ("", "no such machine"),
        ("gpu-h100-80gb-0", "no such machine"),
    ],
)
def test_other_names_are_refused(name, says):
    with pytest.raises(UserError, match=says):
        topologies.find(name)


@pytest.mark.parametrize("family", topologies.CHIPS)
def test_figures_are_of_a_plausible_size_and_have_a_source(family):
    chip = topologies.CHIPS[family]
    assert 1e14 < chip.flops < 1e16
    assert 10 * GIB < chip.memory < 200 * GIB
    assert chip.network * 100 > 1e11
    assert chip.network < chip.link < chip.bandwidth < 1e13
    assert chip.source.startswith("https://")


@pytest.mark.parametrize(("name", "links"), [("v6e-8", 2), ("v6e-256", 4), ("v5p-8", 2), ("v5p-128", 6), ("v6e-1", 0)])
def test_a_chip_sends_over_the_links_that_it_has_there(name, links):
    machine = topologies.find(name)
    assert machine.exchange == links * machine.chip.link


def test_slices_and_hosts_of_gpus_are_joined_by_the_network():
    assert topologies.find("v6e-8", 2).chips == 16
    assert topologies.find("gpu-h200-8", 2).exchange == topologies.find("gpu-h200-8").exchange
    assert [device.process_index for device in topologies.find("gpu-h200-4", 2).devices()] == [0] * 4 + [1] * 4
    two_hosts = topologies.find("gpu-h200-16")
    assert two_hosts.exchange == two_hosts.chip.network
    assert [device.process_index for device in two_hosts.devices()] == [0] * 8 + [1] * 8


@pytest.mark.slow
@pytest.mark.usefixtures("tpu_compiler")
@pytest.mark.parametrize(("name", "kind"), [("v6e-1", "TPU v6 lite"), ("v6e-8", "TPU v6 lite"), ("v5p-8", "TPU v5")])
def test_tpus_are_described_by_their_compiler(name, kind):
    machine = topologies.find(name)
    devices = machine.devices()
    assert [device.device_kind for device in devices] == [machine.chip.kind] * machine.chips == [kind] * machine.chips
    assert len({device.process_index for device in devices}) == 1


@pytest.mark.parametrize("name", ["v6e-8", "v5p-32", "v6e-256"])
def test_without_a_compiler_others_stand_for_the_devices(name):
    machine = topologies.find(name)
    keys = ModelKeys(ici_tensor_parallelism=4)
    mesh = mesh_lib.make(keys, machine.devices(compiles=False))
    assert mesh.size == machine.chips
    assert len({device.coords for device in mesh.devices.flat}) == machine.chips
