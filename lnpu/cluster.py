"""Jobs on the workers of a Dask cluster; results of finished jobs are kept and not computed again."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import dask
from distributed import Client, LocalCluster, WorkerPlugin, as_completed

from lnpu.results import Named, read_result, result_path, write_json

__all__ = ["run_jobs"]

Job = TypeVar("Job", bound=Named)

_RETRIES = 3


def run_jobs(
    jobs: Sequence[Job],
    function: Callable[..., dict[str, Any]],
    arguments: tuple[Any, ...],
    directory: Path,
    *,
    prefix: str,
    scheduler: str | None = None,
    workers: int = 2,
    progress: Callable[[Job, dict[str, Any]], None] | None = None,
    plugin: WorkerPlugin | None = None,
    environment: Mapping[str, int | str] | None = None,
) -> dict[str, str]:
    """Compute what is not in the directory yet, and write it there.

    A job whose worker is killed is given to another one.

    Parameters
    ----------
    jobs : sequence
        The first are started first.
    function : callable
        Called on a worker with a job and `arguments`; returns the job's result, for JSON.
    directory : path
        A JSON file for each finished job.
    prefix : str
        Of the names that the scheduler gets.
    scheduler : str or None
        Address of the cluster's scheduler, whose workers have one thread; None: a local cluster.
    workers : int
        Processes of the local cluster, each with one thread.
    progress : callable or None
        Called with every job that finishes now, and its result.
    plugin : WorkerPlugin or None
        Of all workers, those that are started later included.
    environment : mapping or None
        Variables of the local workers' environment.

    Returns
    -------
    dict
        What went wrong, by the name of the job: of those that raised an exception or whose workers died.

    Raises
    ------
    OSError
        If the scheduler cannot be reached.
    """
    todo = [job for job in jobs if read_result(directory, job) is None]
    if not todo:
        return {}
    directory.mkdir(parents=True, exist_ok=True)
    failed: dict[str, str] = {}
    with _client(scheduler, min(workers, len(todo)), environment or {}) as client:
        if plugin is not None:
            client.register_plugin(plugin)
        futures = {
            client.submit(
                function, job, *arguments, key=f"{prefix}-{job.name}", retries=_RETRIES, priority=-number
            ): job
            for number, job in enumerate(todo)
        }
        for future in as_completed(futures):
            job = futures[future]
            if future.status != "finished":
                failed[job.name] = repr(future.exception())
                continue
            result = future.result()
            write_json(result_path(directory, job), result)
            future.release()
            if progress is not None:
                progress(job, result)
    return failed


@contextmanager
def _client(scheduler: str | None, workers: int, environment: Mapping[str, int | str]) -> Iterator[Client]:
    # A worker may be killed more often than a job may fail by itself.
    settings: dict[str, Any] = {"distributed.scheduler.allowed-failures": 10}
    if environment:
        settings["distributed.nanny.pre-spawn-environ"] = dict(environment)
    with dask.config.set(settings):
        if scheduler is not None:
            with Client(scheduler) as client:
                yield client
            return
        with (
            tempfile.TemporaryDirectory() as scratch,
            LocalCluster(
                n_workers=workers,
                threads_per_worker=1,
                memory_limit=None,
                dashboard_address=":0",
                local_directory=scratch,
            ) as cluster,
            Client(cluster) as client,
        ):
            yield client
