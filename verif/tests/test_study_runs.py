"""Runs of the study: killed processes and workers resume with the same result, bit for bit."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
distributed = pytest.importorskip("distributed")

from lnpu.results import read_result, result_path  # noqa: E402
from lnpu.study.cluster import StudyError, run_study  # noqa: E402
from lnpu.study.data import Batches, StudyData, load_data  # noqa: E402
from lnpu.study.gradient_error import GradientRun  # noqa: E402
from lnpu.study.runs import Run, train  # noqa: E402

SMALL = {"width": 4, "image": 8, "batch": 96, "flip": False, "padding": 1, "rate": 0.05}


@pytest.fixture(scope="module")
def data() -> StudyData:
    return load_data(image=8)


@pytest.fixture(autouse=True)
def one_thread():
    """As the workers: sums are added in an order that depends on the threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def timeless(result: dict) -> dict:
    return result | {"epochs": [{k: v for k, v in epoch.items() if k != "seconds"} for epoch in result["epochs"]]}


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from lnpu.study.data import load_data
from lnpu.study.runs import Run, train
torch.set_num_threads(1)
data = load_data(image=8)

def progress(record):
    if record["epoch"] == 2:  # before its checkpoint
        os.kill(os.getpid(), signal.SIGKILL)

run = Run(data=data.digest, **eval(sys.argv[1]))
train(run, data, Path(sys.argv[2]), progress)
"""


def test_killed_process_resumes(data, tmp_path):
    numbers = {"format": "dynamic", "seed": 1, "epochs": 3, "interval": 5, **SMALL}
    killed = subprocess.run([sys.executable, "-c", KILLED, repr(numbers), str(tmp_path)], timeout=120)
    assert killed.returncode == -signal.SIGKILL
    run = Run(data=data.digest, **numbers)
    assert [path.name for path in tmp_path.iterdir()] == [f"{run.name}.pt"]
    epochs = []
    resumed = train(run, data, tmp_path, lambda record: epochs.append(record["epoch"]))
    assert epochs == [2, 3] and not list(tmp_path.iterdir())
    whole = train(run, data)
    assert timeless(resumed) == timeless(whole)
    losses = [epoch["train_loss"] for epoch in whole["epochs"]]
    assert losses[-1] < losses[0]
    assert whole["epochs"][-1]["loss_scale"] > whole["epochs"][0]["loss_scale"] > run.scale
    static = {name for name, entry in whole["epochs"][0]["tensors"].items() if "state" not in entry}
    assert static == {"images", "d.fc"}  # what the host encodes


def test_formats_of_a_seed_see_the_same_images(data):
    batches = [list(Batches(data.train, 96, (1, 2), padding=1, flip=False)) for _ in range(2)]
    for (a, chosen), (b, other) in zip(*batches, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(chosen, other)
    assert len(batches[0]) == len(data.train) // 96
    assert len(np.unique(np.concatenate([chosen for _, chosen in batches[0]]))) == len(batches[0]) * 96


def test_key_of_a_run(data):
    run = Run(format="fgmp", seed=0, data=data.digest)
    others = [Run(format="fp8", seed=0, data=data.digest), Run(format="fgmp", seed=1, data=data.digest)]
    others += [Run(format="fgmp", seed=0, data="other"), Run(format="fgmp", seed=0, data=data.digest, rate=0.2)]
    assert run.name == Run(format="fgmp", seed=0, data=data.digest).name
    assert len({run.name, *(other.name for other in others)}) == 5
    with pytest.raises(ValueError):
        train(others[2], data)
    for wrong in ({"format": "int8"}, {"epochs": 0}, {"rate": 0.0}, {"seed": -1}):
        with pytest.raises(ValueError):
            Run(**{"format": "fgmp", "seed": 0, "data": data.digest} | wrong)


def test_local_cluster(data, tmp_path):
    """Finished runs are kept; one that fails does not stop the others."""
    good = Run(format="fp8", seed=0, data=data.digest, epochs=1, **SMALL)
    bad = Run(format="fp8", seed=0, data="other", epochs=1, **SMALL)
    with pytest.raises(StudyError, match="data must be other"):
        run_study([bad, good], data, tmp_path, workers=1)
    finished = read_result(tmp_path, good)
    assert finished is not None and timeless(finished) == timeless(train(good, data))
    written = result_path(tmp_path, good).stat().st_mtime_ns
    assert run_study([good], data, tmp_path, scheduler="tcp://127.0.0.1:1") == [finished]  # asks no scheduler
    assert result_path(tmp_path, good).stat().st_mtime_ns == written


def test_killed_worker_of_an_external_scheduler(data, tmp_path, scheduler):
    deadline = time.monotonic() + 60
    with distributed.Client(scheduler) as client:
        client.wait_for_workers(1, timeout=60)
        (pid,) = client.run(os.getpid).values()
    run = Run(format="dynamic", seed=0, data=data.digest, epochs=6, **SMALL)
    results = tmp_path / "results"
    checkpoint = results / "checkpoints" / f"{run.name}.pt"
    killed = []

    def kill() -> None:
        while time.monotonic() < deadline + 60:
            if checkpoint.exists():
                killed.append(checkpoint.stat().st_size)
                os.kill(pid, signal.SIGKILL)
                return
            time.sleep(0.005)

    thread = threading.Thread(target=kill)
    thread.start()
    (result,) = run_study([run], data, results, scheduler=scheduler)
    thread.join()
    assert killed and not Path(f"/proc/{pid}").exists()
    assert timeless(result) == timeless(train(run, data))
    assert not checkpoint.exists()


def test_gradient_run_names(data):
    training = Run(format="fp32", seed=0, data=data.digest, epochs=2, **SMALL)
    run = GradientRun(training=training, epochs=(1, 2))
    assert run.name != GradientRun(training=training, epochs=(2,)).name
    for wrong in ({"epochs": (3,)}, {"epochs": ()}, {"batches": 0}):
        with pytest.raises(ValueError):
            GradientRun(**{"training": training, "epochs": (1,)} | wrong)
    with pytest.raises(ValueError):
        GradientRun(training=Run(format="fp8", seed=0, data=data.digest))
