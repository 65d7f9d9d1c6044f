"""Which devices a run of reinforcement learning takes. What else `rl_plan` decides is seen in `test_rl.py`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from luthier.config import RlConfig
from luthier.errors import UserError
from luthier.train import rl_plan


def devices(processes: int) -> list[Any]:
    """Four devices of each process."""
    return [SimpleNamespace(id=number, platform="cpu", process_index=number // 4) for number in range(4 * processes)]


def keys(**given: Any) -> RlConfig:
    return RlConfig.model_construct(**given)


def test_one_process_shares_its_devices_out() -> None:
    here = devices(1)
    assert rl_plan.devices(keys(), here) == (here, here)
    assert rl_plan.devices(keys(chips_per_vm=2), here) == (here[:2], here[:2])
    assert rl_plan.devices(keys(max_staleness=1), here) == (here[:2], here[2:])


def test_several_processes_take_all_devices_by_turns() -> None:
    here = devices(2)
    assert rl_plan.devices(keys(), here) == (here, here)
    assert rl_plan.devices(keys(chips_per_vm=4), here) == (here, here)
    with pytest.raises(UserError, match="chips_per_vm=2: a run of several processes uses all 4 of each"):
        rl_plan.devices(keys(chips_per_vm=2), here)
    with pytest.raises(UserError, match="max_staleness=1: of several processes all sample and train by turns"):
        rl_plan.devices(keys(max_staleness=1), here)


def test_vllms_servers_have_devices_of_their_own() -> None:
    here = devices(1)
    assert rl_plan.devices(keys(rollout_engine="vllm", max_staleness=1), here) == (here, here)
    both = devices(2)
    assert rl_plan.devices(keys(rollout_engine="vllm", vllm_urls=["http://a"], max_staleness=1), both) == (both, both)
    for device in here:
        device.platform = "tpu"
    with pytest.raises(UserError, match="on a TPU host one process has all chips"):
        rl_plan.devices(keys(rollout_engine="vllm"), here)
    assert rl_plan.devices(keys(rollout_engine="vllm", vllm_urls=["http://a"]), here) == (here, here)
