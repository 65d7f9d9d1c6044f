"""Servers of a run's own, and one that is killed in the middle."""

from __future__ import annotations

import signal

import psutil
import pytest
import running
from running import Train

pytestmark = [pytest.mark.vllm, pytest.mark.multiprocess, pytest.mark.timeout(1800)]


def test_a_run_goes_on_without_a_server_that_is_killed(vllm_python: str, train: Train) -> None:
    killed: list[int] = []

    def kill(process: psutil.Process, done: int) -> None:
        """End one of the servers in the middle of the run, with all that it started, as a machine that fails does."""
        if done < 3 or killed:
            return
        servers = [each for each in process.children() if "vllm.entrypoints.openai.api_server" in each.cmdline()]
        assert len(servers) == 2
        for each in [servers[0], *servers[0].children(recursive=True)]:
            each.send_signal(signal.SIGKILL)
        killed.append(servers[0].pid)

    ran = train(
        *("steps=10", "vllm_servers=2", f"vllm_python={vllm_python}", "max_target_length=256", *running.SERVER),
        meddle=kill,
    )
    assert ran.code == 0, ran.output
    assert killed
    assert len(ran.differences) == 10
    assert max(ran.differences) < running.BOUND
    assert "completions are asked of others" in ran.output, ran.output
