"""The runs of the study on the workers of a Dask cluster; results of finished runs are kept and not computed again."""

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from distributed import Worker, WorkerPlugin, get_worker

from lnpu.cluster import run_jobs
from lnpu.results import read_result
from lnpu.study.data import StudyData
from lnpu.study.gradient_error import GradientRun, measure
from lnpu.study.runs import Run, train

__all__ = ["AnyRun", "StudyError", "run_study"]

AnyRun = Run | GradientRun

_DATA = "lnpu_study_data"
_ALLOCATION = {"MALLOC_MMAP_THRESHOLD_": 4 << 30, "MALLOC_TRIM_THRESHOLD_": 8 << 30, "MALLOC_TOP_PAD_": 64 << 20}
"""Keeps freed tensors in the process: the pages of fresh ones cost more than what is computed in them."""


class StudyError(RuntimeError):
    """Runs have failed."""


class _Data(WorkerPlugin):
    """Gives the images to every worker, those that are started later included."""

    name = _DATA

    def __init__(self, data: StudyData) -> None:
        self.data = data

    def setup(self, worker: Worker) -> None:
        setattr(worker, _DATA, self.data)


def _compute_one(run: AnyRun, checkpoints: str) -> dict[str, Any]:
    """A run on a worker."""
    torch.set_num_threads(1)
    data: StudyData = getattr(get_worker(), _DATA)

    def progress(record: dict[str, Any]) -> None:
        numbers = {name: record[name] for name in ("epoch", "train_loss", "test_accuracy", "seconds")}
        print(f"{time.strftime('%H:%M:%S')} {run.title}:", *(f"{a} {b}" for a, b in numbers.items()), flush=True)

    if isinstance(run, GradientRun):
        return measure(run, data, progress)
    folder = Path(checkpoints)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # no file system in common with the client
        folder = Path(tempfile.gettempdir()) / "lnpu_study"
    return train(run, data, folder, progress)


def run_study(
    runs: Sequence[AnyRun],
    data: StudyData,
    directory: Path,
    *,
    scheduler: str | None = None,
    workers: int = 2,
    progress: Callable[[AnyRun, dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """Results of all runs; those that are not in the directory yet are computed and written there.

    A run whose worker is killed goes on elsewhere from its last epoch, and a study that is started again from there.

    Parameters
    ----------
    runs : sequence of Run and GradientRun
        The first are started first.
    data : StudyData
    directory : path
        A JSON file for each finished run; checkpoints of the others in `checkpoints`.
    scheduler : str or None
        Address of the cluster's scheduler, whose workers have one thread; None: a local cluster.
    workers : int
        Processes of the local cluster, each with one thread.
    progress : callable or None
        Called with every run that finishes now, and its result.

    Raises
    ------
    StudyError
        If runs have failed, after all others.
    OSError
        If the scheduler cannot be reached.
    """
    directory = directory.resolve()
    titles = {run.name: run.title for run in runs}
    failed = run_jobs(
        runs,
        _compute_one,
        (str(directory / "checkpoints"),),
        directory,
        prefix="study",
        scheduler=scheduler,
        workers=workers,
        progress=progress,
        plugin=_Data(data),
        environment=_ALLOCATION,
    )
    if failed:
        raise StudyError("; ".join(f"{titles[name]}: {error}" for name, error in failed.items()))
    results = [read_result(directory, run) for run in runs]
    return [result for result in results if result is not None]
