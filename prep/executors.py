"""Who does the work: this process, processes on this machine, or a Ray cluster; the results are the same.

An executor maps a function over tasks and gives the results in the order of the tasks, with a bounded number of them
under way. Functions are module-level and tasks pickle. Processes are spawned, never forked (Arrow and numba have
threads), and die with the process that made them.
"""

from __future__ import annotations

import ctypes
import importlib
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Protocol, TypeVar

from prep.lean import hide_unused
from shards.errors import UserError, unknown_name

Task = TypeVar("Task")
Result = TypeVar("Result")
EXECUTORS = ("local", "ray")
PRELOADED = ("pyarrow", "prep.parts", "prep.dedup.passes", "prep.filters.rules")  # what most tasks need
_PR_SET_PDEATHSIG = 1


class Executor(Protocol):
    """Maps functions over tasks."""

    workers: int

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """Results in the order of the tasks; tasks are drawn as workers become free."""
        ...


def open_executor(name: str = "local", workers: int = 0) -> AbstractContextManager[Any]:
    """An executor for the length of a `with` block.

    Args:
        name: "local", or "ray": the cluster that RAY_ADDRESS names, else one on this machine.
        workers: processes; 0: one per core of this machine, or all that the cluster has.

    Raises:
        UserError: unknown executor, or Ray is not installed.
    """
    if name not in EXECUTORS:
        raise UserError(f"--executor: {unknown_name('executor', name, EXECUTORS)}")
    if name == "ray":
        return RayExecutor(workers)
    return LocalExecutor(workers or count_cores())


def count_cores() -> int:
    """Cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # macOS has none
    return cores or 1


class LocalExecutor:
    """Processes on this machine; with one worker, this process itself."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> LocalExecutor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def warm_up(self) -> None:
        """Start the processes, so that they load while the work is being prepared."""
        if self.workers > 1 and self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.workers, context, initializer=_begin_worker, initargs=(os.getpid(),))
            for _ in range(self.workers):
                self._pool.submit(os.getpid)

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """Results in the order of the tasks."""
        if self.workers == 1:
            yield from map(function, tasks)
            return
        self.warm_up()
        pool = self._pool
        assert pool is not None
        try:
            yield from _in_order(
                lambda task: pool.submit(function, task), lambda future: future.result(), tasks, self.workers + 1
            )
        except BrokenProcessPool:
            raise UserError(
                "a worker process died; most often the memory was not enough: use fewer --workers. What is finished "
                "is kept, the same command goes on from there"
            ) from None


class RayExecutor:
    """Tasks of a Ray cluster: inputs and outputs lie where all its machines see them.

    A task whose worker dies is tried again by Ray; parts are written whole or not at all, so nothing comes twice.
    """

    def __init__(self, workers: int) -> None:
        try:
            import ray
        except ImportError:
            raise UserError("--executor ray needs Ray: pip install 'minigpt[ray]'") from None
        self._ray = ray
        self._wanted, self._address = workers, os.environ.get("RAY_ADDRESS")
        self.workers = workers

    def __enter__(self) -> RayExecutor:
        ray = self._ray
        if not ray.is_initialized():
            os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
            options: dict[str, Any] = {"address": self._address} if self._address else {}
            if not self._address and self._wanted:
                options["num_cpus"] = self._wanted
            try:
                ray.init(log_to_driver=False, include_dashboard=False, logging_level="ERROR", **options)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise UserError(f"no Ray cluster at {self._address or 'this machine'}: {error}") from None
        self.workers = self._wanted or max(int(ray.cluster_resources().get("CPU", 1)), 1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ray.shutdown()

    def warm_up(self) -> None:
        """Ray starts its workers by itself."""

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """Results in the order of the tasks."""
        ray = self._ray
        remote, here = ray.remote(max_retries=3)(_run_in), os.getcwd()
        try:
            yield from _in_order(lambda task: remote.remote(here, function, task), ray.get, tasks, 2 * self.workers)
        except ray.exceptions.RayTaskError as error:
            raise error.cause or error from None
        except ray.exceptions.RayError as error:
            raise UserError(
                f"Ray could not finish a task ({type(error).__name__}: {error}). What is finished is kept, the same "
                f"command goes on from there"
            ) from None


def _in_order(
    submit: Callable[[Task], Any], wait: Callable[[Any], Result], tasks: Iterable[Task], limit: int
) -> Iterator[Result]:
    pending: deque[Any] = deque()
    try:
        for task in tasks:
            while len(pending) >= limit:
                yield wait(pending.popleft())
            pending.append(submit(task))
            del task  # it may hold much; from here on only its worker needs it
        while pending:
            yield wait(pending.popleft())
    finally:
        for future in pending:
            if isinstance(future, Future):
                future.cancel()


def _run_in(folder: str, function: Callable[[Task], Result], task: Task) -> Result:
    """Run a task of a Ray cluster where the command runs: its paths may start there."""
    try:
        os.chdir(folder)
    except OSError:
        raise UserError(
            f"{folder}: a machine of the Ray cluster does not see this folder; run the command in a shared one"
        ) from None
    return function(task)


def _begin_worker(parent: int) -> None:
    """Die with the parent, leave Ctrl-C to it, and use one core."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS"):
        os.environ[name] = "1"
    hide_unused()
    for module in PRELOADED:
        importlib.import_module(module)
    pyarrow = sys.modules["pyarrow"]
    pyarrow.set_cpu_count(1)
    pyarrow.set_io_thread_count(1)
