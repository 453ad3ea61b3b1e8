"""The Slurm file, with pretended commands of Slurm that say how they were called."""

import os
import subprocess
from pathlib import Path

import pytest

SBATCH = Path(__file__).parents[2] / "examples/slurm/distill.sbatch"
SLURM = {
    "SLURM_JOB_ID": "123456",
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_NNODES": "2",
    "SLURM_CPUS_PER_TASK": "16",
    "SLURM_GPUS_ON_NODE": "4",
}


@pytest.fixture
def submit(tmp_path):
    def run(environment):
        for name, script in {
            "srun": 'echo "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT"; printf "%s\\n" "$@"',
            "scontrol": "printf 'node1\\nnode2\\n'",
        }.items():
            (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
            (tmp_path / name).chmod(0o755)
        own = {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | environment
        command = ["bash", str(SBATCH), "recipe.toml", "--out", "a run"]
        return subprocess.run(command, env=own, capture_output=True, text=True, check=False)

    return run


def test_each_node_has_its_cores_and_a_process_for_each_gpu(submit):
    done = submit(SLURM)
    assert done.returncode == 0, done.stderr
    timeout, *words = done.stdout.splitlines()
    assert words[:2] == ["--cpus-per-task=16", "torchrun"]
    assert {"--nnodes=2", "--nproc-per-node=4", "--rdzv-endpoint=node1:23456"} <= set(words)
    assert words[-6:] == ["-m", "cli.main", "distill", "recipe.toml", "--out", "a run"]
    seconds_until_the_limit = int(SBATCH.read_text().split("--signal=TERM@")[1].split()[0])
    assert 30 < int(timeout) < seconds_until_the_limit


def test_without_gpus_it_says_what_to_ask_for(submit):
    done = submit({name: value for name, value in SLURM.items() if name != "SLURM_GPUS_ON_NODE"})
    assert done.returncode == 4
    assert "--gpus-per-node" in done.stderr
    assert done.stdout == ""
