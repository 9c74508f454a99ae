"""The runs of the study on the workers of a Dask cluster; results of finished runs are kept and not computed again."""

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import dask
import torch
from distributed import Client, LocalCluster, Worker, WorkerPlugin, as_completed, get_worker

from lnpu.study.data import StudyData
from lnpu.study.gradient_error import GradientRun, measure
from lnpu.study.runs import Run, read_result, result_path, train, write_json

__all__ = ["AnyRun", "StudyError", "run_study"]

AnyRun = Run | GradientRun

_RETRIES = 3
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
    todo = [run for run in runs if read_result(directory, run) is None]
    if todo:
        directory.mkdir(parents=True, exist_ok=True)
        # A worker may be killed more often than a run may fail by itself.
        with dask.config.set({
            "distributed.scheduler.allowed-failures": 10, "distributed.nanny.pre-spawn-environ": _ALLOCATION,
        }):  # fmt: skip
            if scheduler is not None:
                with Client(scheduler) as client:
                    _compute(client, todo, data, directory, progress)
            else:
                with (
                    tempfile.TemporaryDirectory() as scratch,
                    LocalCluster(
                        n_workers=min(workers, len(todo)),
                        threads_per_worker=1,
                        memory_limit=None,
                        dashboard_address=":0",
                        local_directory=scratch,
                    ) as cluster,
                    Client(cluster) as client,
                ):
                    _compute(client, todo, data, directory, progress)
    results = [read_result(directory, run) for run in runs]
    return [result for result in results if result is not None]


def _compute(
    client: Client,
    runs: Sequence[AnyRun],
    data: StudyData,
    directory: Path,
    progress: Callable[[AnyRun, dict[str, Any]], None] | None,
) -> None:
    client.register_plugin(_Data(data))
    futures = {
        client.submit(
            _compute_one,
            run,
            str(directory / "checkpoints"),
            key=f"study-{run.name}",
            retries=_RETRIES,
            priority=-number,
        ): run
        for number, run in enumerate(runs)
    }
    failed = []
    for future in as_completed(futures):
        run = futures[future]
        if future.status != "finished":
            failed.append(f"{run.title}: {future.exception()!r}")
            continue
        result = future.result()
        write_json(result_path(directory, run), result)
        future.release()
        if progress is not None:
            progress(run, result)
    if failed:
        raise StudyError("; ".join(failed))
