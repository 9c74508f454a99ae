"""Fixtures of several tests."""

import json
import subprocess
import sys
import time

import pytest


@pytest.fixture
def scheduler(tmp_path):
    """Address of a scheduler with one worker, both started as their users do."""
    file = tmp_path / "scheduler.json"
    commands = (
        ["scheduler", "--port", "0", "--no-dashboard", "--scheduler-file", str(file)],
        ["worker", "--scheduler-file", str(file), "--nthreads", "1", "--no-dashboard", "--death-timeout", "60"],
    )
    processes = []
    try:
        for command in commands:
            with (tmp_path / f"{command[0]}.log").open("w") as log:
                processes.append(
                    subprocess.Popen([sys.executable, "-m", "dask", *command], stdout=log, stderr=log, cwd=tmp_path)
                )
        deadline = time.monotonic() + 60
        while not file.exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield json.loads(file.read_text())["address"]
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            process.wait(30)
