"""The files in ``launch/``: they start commands that the key parser takes, as processes that find each other."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from luthier import config, processes
from luthier.errors import UserError
from tiny import ROOT

LAUNCH = ROOT / "launch"
KEYS = ["recipes/smoltalk.yml", "run_name=a run", "train_data_columns=['messages']"]
"""Arguments with what a shell would take apart."""


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path whose programs write their arguments, NUL between them, into files of their own."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("srun", "xpk", "scontrol", "luthier"):
        write(folder / name, f'printf "%s\\0" "$@" >"{tmp_path}/{name}.$$"; exit ${{CODE:-0}}')
    write(folder / "ssh", 'shift; shift; exec bash -c "$*"')  # on this machine; -n and the host are let go of
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.chdir(ROOT)
    return tmp_path


def write(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def called(fakes: Path, name: str) -> list[list[str]]:
    return [path.read_text().split("\0")[:-1] for path in sorted(fakes.glob(f"{name}.*"))]


def start(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(LAUNCH / script), *arguments]
    return subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=60, check=False
    )


def resolved(command: list[str]) -> Any:
    """The configuration that `luthier COMMAND ...` would have."""
    return config.resolve(command[0], command[1:], {})


@pytest.mark.parametrize("script", ["slurm.sbatch", "slurm-vllm.sbatch", "by-hand.sh", "xpk.sh"])
def test_scripts_are_valid(script: str) -> None:
    subprocess.run(["bash", "-n", str(LAUNCH / script)], check=True)


def test_slurm_starts_the_command_on_each_node_with_all_its_gpus(fakes: Path) -> None:
    write(fakes / "bin" / "srun", f'printf "%s\\0" "$@" "$JAX_LOCAL_DEVICE_IDS" >"{fakes}/srun.$$"')
    done = start("slurm.sbatch", *KEYS, SLURM_GPUS_ON_NODE="4", SLURM_JOB_ID="7")
    assert done.returncode == 0, done.stderr
    ((option, program, *command, devices),) = called(fakes, "srun")
    assert (option, program, devices) == ("--kill-on-bad-exit=1", "luthier", "0,1,2,3")
    assert resolved(command).run_name == "a run"
    assert not called(fakes, "scontrol")


@pytest.mark.parametrize(("code", "again"), [(143, [["requeue", "7"]]), (1, [])])
def test_slurm_queues_again_what_was_told_to_stop(fakes: Path, code: int, again: list[list[str]]) -> None:
    write(fakes / "bin" / "srun", f"exit {code}")
    assert start("slurm.sbatch", *KEYS, SLURM_JOB_ID="7", CODE="0").returncode == code
    assert called(fakes, "scontrol") == again


NODES = 'if [[ $1 == show ]]; then printf "n1\\nn2\\nn3\\n"; else printf "%s\\0" "$@" >"{}/scontrol.$$"; fi'
"""What scontrol does where a job has three nodes."""


def test_slurm_has_vllm_sample_on_nodes_of_its_own(fakes: Path) -> None:
    write(fakes / "bin" / "scontrol", NODES.format(fakes))
    how = {"SLURM_GPUS_ON_NODE": "2", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-3]", "MODEL": "Qwen/Qwen3-8B"}
    write(
        fakes / "bin" / "srun",
        f'printf "%s\\0" "$@" "${{JAX_LOCAL_DEVICE_IDS:-}}" >"{fakes}/srun.$$"; [[ $* != *" rl "* ]] || exit 143',
    )
    keys = ["hf_path=rows", "run_name=a run"]
    done = start("slurm-vllm.sbatch", *keys, SERVERS="2", SERVER_KEYS="lora_rank=8 vllm_arguments=--x", **how)
    assert done.returncode == 143, done.stderr
    places = {}
    for *options, program, command in ([*call[:3], call[3], call[4:]] for call in called(fakes, "srun")):
        assert program == "luthier"
        places[command[0]] = options, resolved(command[:-1]), command[-1]
    options, server, devices = places["vllm"]
    assert options == ["--nodes=2", "--nodelist=n1,n2", "--kill-on-bad-exit=0"]
    assert (server.model_name, server.lora_rank, server.vllm_arguments, devices) == ("Qwen/Qwen3-8B", 8, "--x", "")
    options, trainer, devices = places["rl"]
    assert options == ["--nodes=1", "--nodelist=n3", "--kill-on-bad-exit=1"]
    assert (trainer.model_name, trainer.run_name, devices) == ("Qwen/Qwen3-8B", "a run", "0,1")
    assert trainer.vllm_urls == [f"http://n1:{server.port}", f"http://n2:{server.port}"]
    assert called(fakes, "scontrol") == [["requeue", "7"]]
    assert start("slurm-vllm.sbatch", *keys, SERVERS="3", **how).returncode == 2


def test_xpk_creates_a_workload(fakes: Path) -> None:
    done = start("xpk.sh", *KEYS, CLUSTER="mine", IMAGE="there", TPU="v5p-128", SLICES="2")
    assert done.returncode == 0, done.stderr
    ((*verbs, cluster, workload, image, kind, slices, restarts, command),) = called(fakes, "xpk")
    assert verbs == ["workload", "create"]
    assert [cluster, image, kind, slices] == [
        *("--cluster=mine", "--docker-image=there", "--tpu-type=v5p-128", "--num-slices=2")
    ]
    assert workload.startswith("--workload=")
    assert restarts.startswith("--max-restarts=")
    program, *rest = shlex.split(command.removeprefix("--command="))
    assert program == "luthier"
    assert resolved(rest).train_data_columns == ["messages"]
    assert "CLUSTER" in start("xpk.sh", *KEYS).stderr


def test_by_hand_numbers_the_processes(fakes: Path) -> None:
    done = start("by-hand.sh", *KEYS, HOSTS="one two three", PLACE=str(fakes))
    assert done.returncode == 0, done.stderr
    found = sorted((resolved(command) for command in called(fakes, "luthier")), key=lambda keys: keys.process_id)
    assert [keys.process_id for keys in found] == [0, 1, 2]
    assert {(keys.coordinator_address, keys.num_processes, keys.run_name) for keys in found} == {
        ("one:8476", 3, "a run")
    }
    assert start("by-hand.sh", *KEYS, HOSTS="one two", PLACE=str(fakes), CODE="2").returncode == 2


def test_by_hand_hands_a_signal_on(fakes: Path) -> None:
    write(
        fakes / "bin" / "luthier", 'trap "exit 143" TERM; for i in {1..200}; do sleep 0.05; [[ -e done ]] && exit; done'
    )
    environment = os.environ | {"HOSTS": "one", "PLACE": str(fakes), "PORT": "9000"}
    with subprocess.Popen(["bash", str(LAUNCH / "by-hand.sh"), *KEYS], env=environment) as process:
        deadline = time.monotonic() + 20
        while not (fakes / ".luthier-9000.pid").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 143


def test_the_jobset_fits_its_slice() -> None:
    jobset = yaml.safe_load((LAUNCH / "gke-jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (group,) = jobset["spec"]["replicatedJobs"]
    job = group["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert container["resources"]["requests"]["google.com/tpu"] == chips
    rows, columns = map(int, topology.split("x"))
    assert job["parallelism"] == job["completions"] == rows * columns // chips
    assert job["backoffLimit"] == 0
    assert pod["restartPolicy"] == "Never"
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert container["command"] == ["luthier"]
    assert resolved(container["args"]).base_output_directory.startswith("gs://")


def test_the_skypilot_task_runs_the_command() -> None:
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert task["num_nodes"] > 1
    assert task.keys() <= {"name", "workdir", "num_nodes", "resources", "envs", "setup", "run"}
    script = task["run"].replace("~/luthier/bin/luthier", "luthier")
    script = 'luthier() { for each in "$@"; do echo "$each"; done; }\n' + script
    shown = subprocess.run(
        ["bash", "-c", script], env=os.environ | task["envs"], capture_output=True, text=True, check=True
    )
    assert resolved(shown.stdout.splitlines()).base_output_directory.startswith("s3://")


def test_the_skypilot_task_has_vllm_sample_on_nodes_of_its_own() -> None:
    task = yaml.safe_load((LAUNCH / "skypilot-vllm.yaml").read_text())
    script = task["run"].replace("~/luthier/bin/luthier", "luthier")
    # Whether the trainer's port is there is told by a file; to sleep is to have it vanish.
    script = (
        'luthier() { for each in "$@"; do echo "$each"; done; }\n'
        "python3() { :; }; sleep() { gone=1; }; kill() { :; }; wait() { return 143; }\n"
    ) + script.replace('(exec 3<>"/dev/tcp/$first/8475") 2>/dev/null', "[ -z ${gone:-} ]")
    commands = []
    for rank in range(task["num_nodes"]):
        place = {"SKYPILOT_NODE_RANK": str(rank), "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2\n10.0.0.3"}
        values = {name: str(value) for name, value in task["envs"].items()}
        shown = subprocess.run(["bash", "-c", script], env=os.environ | values | place, capture_output=True, text=True)
        assert shown.returncode == 0, shown.stderr
        commands.append(resolved(shown.stdout.splitlines()))
    trainer, *servers = commands
    assert trainer.vllm_urls == [f"http://10.0.0.{number}:{servers[0].port}" for number in (2, 3)]
    assert processes._place(trainer) is None  # though SkyPilot says that there are three
    for server in servers:
        assert (server.model_name, server.max_target_length) == (trainer.model_name, trainer.max_target_length)
        assert server.host == "0.0.0.0"


SLURM = {"SLURM_JOB_ID": "5", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
SKY = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NODE_RANK": "1"}
LAUNCHERS = ("SLURM_", "SKYPILOT_", "OMPI_", "KUBERNETES_", "TPU_", "JOB_COMPLETION_INDEX")


def place(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], **keys: Any) -> dict[str, Any] | None:
    """What a run would tell `jax.distributed.initialize`; None: it would not call it."""
    for name in [name for name in os.environ if name.startswith(LAUNCHERS)]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return processes._place(config.SftConfig(model_name="m", hf_path="rows", **keys))


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (SLURM | {"SLURM_NTASKS": "1"}, None),
        (SLURM | {"SLURM_NTASKS": "2"}, {}),
        ({"SLURM_JOB_ID": "5", "SLURM_NTASKS": "2"}, None),  # a shell in an allocation, no step of it
        (SKY | {"SKYPILOT_NUM_NODES": "1"}, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # a pod that is no indexed job
        ({"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1", "OMPI_COMM_WORLD_SIZE": "4"}, {}),
    ],
)
def test_launchers_are_recognised(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: Any) -> None:
    assert place(monkeypatch, environment) == expected


def test_skypilot_says_where_and_who(monkeypatch: pytest.MonkeyPatch) -> None:
    found = place(monkeypatch, SKY | {"SKYPILOT_NUM_NODES": "2"})
    assert found is not None
    assert [found[name] for name in ("coordinator_address", "num_processes", "process_id")] == ["10.0.0.1:8476", 2, 1]


def test_keys_say_where_and_who(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {"coordinator_address": "10.0.0.1:8476", "num_processes": 2, "process_id": 0}
    found = place(monkeypatch, {}, **keys)
    assert found == keys | {"cluster_detection_method": "deactivate"}
    assert place(monkeypatch, {}, **keys | {"num_processes": 1}) is None
    with pytest.raises(UserError, match=r"num_processes=2, process_id=0 without coordinator_address.*Give all three"):
        place(monkeypatch, {}, num_processes=2, process_id=0)
    assert place(monkeypatch, SLURM | {"SLURM_NTASKS": "2"}, coordinator_address="n2:99") == {
        "coordinator_address": "n2:99"
    }


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["coordinator_address=10.0.0.1"], "HOST:PORT"),
        (["coordinator_address=:8476"], "HOST:PORT"),
        (["num_processes=2", "process_id=2"], "numbered from 0 to 1"),
    ],
)
def test_places_that_cannot_be_are_refused(keys: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        config.resolve("sft", ["model_name=m", "hf_path=rows", *keys], {})
