"""The batch script: read by bash, and run with Slurm's commands played by files."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from fieldfleet.__main__ import main

ANSWER = "#!/bin/bash\n"


def written(tmp_path: Path, *options: str) -> Path:
    path = tmp_path / "train.sbatch"
    assert main(["slurm", "toy_regression", "--out", str(tmp_path / "a run"), "--script", str(path), *options]) == 0
    return path


def test_the_script_starts_one_task_a_process_and_says_where_they_meet(tmp_path: Path) -> None:
    path = written(
        tmp_path, "--nodes", "2", "--tasks-per-node", "4", "--cpus-per-task", "3", "--partition", "short",
        "--set", "optimizer.lr=0.1", "--data", "generated",
    )  # fmt: skip
    text = path.read_text()
    for line in ("--nodes=2", "--ntasks-per-node=4", "--cpus-per-task=3", "--partition=short", "--requeue"):
        assert f"#SBATCH {line}\n" in text
    assert "--account" not in text
    tools = tmp_path / "tools"
    tools.mkdir()
    seen = tmp_path / "seen"
    (tools / "scontrol").write_text(ANSWER + "echo node7\necho node8\n")
    (tools / "srun").write_text(
        ANSWER + f'printf "%s\\n" "$MASTER_ADDR" "$MASTER_PORT" "$OMP_NUM_THREADS" "$@" > {seen}\n'
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tools}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_JOB_ID": "40123",
        "SLURM_CPUS_PER_TASK": "3",
    }
    done = subprocess.run(["bash", path], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    words = seen.read_text().splitlines()
    assert words[:3] == ["node7", "20123", "3"]
    assert words[words.index("fieldfleet") :][:4] == ["fieldfleet", "pretrain", "toy_regression", "--out"]
    assert str(tmp_path / "a run") in words
    assert words[-2:] == ["--set", "optimizer.lr=0.1"]


@pytest.mark.parametrize(
    "options",
    [["--nodes", "0"], ["--time", "soon"], ["--partition", "a;b"], ["--set", "optimizer.nothing=1"]],
)
def test_what_slurm_or_the_run_would_refuse_is_refused_before_the_queue(options: list[str], tmp_path: Path) -> None:
    path = tmp_path / "train.sbatch"
    assert main(["slurm", "toy_regression", "--out", "run", "--script", str(path), *options]) == 2
    assert not path.exists()


def test_a_script_is_never_overwritten(tmp_path: Path) -> None:
    path = written(tmp_path)
    before = path.read_bytes()
    assert main(["slurm", "toy_regression", "--out", "run", "--script", str(path)]) == 2
    assert path.read_bytes() == before
