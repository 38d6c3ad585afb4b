"""Encode one tensor as a picklable task, and the executors that run such tasks.

A task says where its tensor is stored; the worker reads the tensor from there, so that only planes are sent back.  The
result does not depend on the worker.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from . import stages
from .artifact import Encoded, read_shared, relative_error
from .blockwise import give_back_freed_memory
from .errors import AgentForgeError, BadInput
from .models import as_matrix, device_named
from .statistics import InputStatistics
from .version import __version__

R = TypeVar("R")
FALLBACK = stages.get("rounding", bits=8)
PATIENCE = 5  # seconds until a scheduler that does not answer is given up


class Task(NamedTuple):
    """What it takes to encode a weight, in any process that sees the same files.

    read: gives the tensor as stored.  stats: if the stage asks for them.  shared: the file of the planes that the weights
    share, if the stage has any.  fallback: `FALLBACK` if the stage cannot encode it.  version: of the package that made the
    task.
    """

    name: str
    read: Callable[[], torch.Tensor]
    transposed: bool
    stage: stages.Stage
    stats: InputStatistics | None
    seed: int = 0
    device: str = "cpu"
    fallback: bool = False
    shared: Path | None = None
    version: str = __version__

    def load(self) -> torch.Tensor:
        """The weight as [out, in], in its own dtype."""
        return as_matrix(self.read(), self.transposed)


def encode_tensor(task: Task) -> Encoded | str:
    """Read a weight, encode it, and pack the planes for the disk; a text says why neither stage nor fallback could.

    Raises BadInput if the weight cannot be read, if the stage cannot encode it and there is to be no fallback, or
    if this process runs another agentforge than the one that asked.
    """
    _check_version(task)
    device = device_named(task.device)
    reasons: list[str] = []
    give_back_freed_memory()
    for stage in (task.stage, FALLBACK) if task.fallback else (task.stage,):
        shared = read_shared(task.shared, stage) if task.shared and stage.shared_layout() else None
        # From here on only what the current step needs is in memory: this bounds the peak.  Reading is not covered by
        # the fallback: an unreadable file is not a weight that is hard to encode.
        values = [task.load().to(device, torch.float32)]
        try:
            packed = stage.encode(values.pop(), task.stats, task.seed, name=task.name, shared=shared)
            decoded = stage.decode(packed)
            if not is_finite(decoded):
                raise BadInput(f"{task.name}: {stage} decodes to values that are not finite; leave it out or scale it")
        except BadInput as error:
            if not task.fallback:
                raise
            reasons.append(f"{stage.name}: {error}")
            continue
        error_ = relative_error(task.load(), decoded)
        del decoded
        return Encoded.of(stage, packed, error_, reasons[0] if reasons else None)
    return "; ".join(reasons)


def price_tensor(task: Task, ladder: Sequence[stages.Stage]) -> list[tuple[int, float, bool]]:
    """What `Stage.price` says of a weight, for each stage of `ladder`.

    Raises BadInput as `encode_tensor` does, without a fallback.
    """
    _check_version(task)
    give_back_freed_memory()
    dense, stats, device = task.load().to(torch.float32), task.stats, device_named(task.device)
    assert stats is not None
    scratch: dict[str, Any] = {}
    return [stage.price(dense.to(device) if stage.uses_gpu else dense, stats, task.name, scratch) for stage in ladder]


def _check_version(task: Task) -> None:
    if task.version != __version__:
        raise BadInput(
            f"{task.name}: a worker runs agentforge {__version__}, the command {task.version}; install the same on both"
        )


def is_finite(values: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite, without a tensor of the same size for the answer."""
    low, high = torch.aminmax(values)  # either is NaN if any value is
    return math.isfinite(float(low)) and math.isfinite(float(high))


def tasks_at_once(executor: Executor | None, workers: int | None) -> int:
    """How many tasks are under way at the same moment."""
    if executor and not workers:
        # Two each: a worker that has finished begins the next one while its planes are on the way.
        return 2 * (getattr(executor, "_max_workers", None) or os.cpu_count() or 1)
    return workers or os.cpu_count() or 1


def results(tasks: Iterator[Callable[[], R]], executor: Executor | None, workers: int | None) -> Iterator[R]:
    """What the tasks give, in their order, by the executor or by threads; a task is made when it can begin soon."""
    most = tasks_at_once(executor, workers)
    running: deque[Future[R]] = deque()
    with contextlib.nullcontext(executor) if executor else ThreadPoolExecutor(most) as pool:
        try:
            while True:
                running.extend(pool.submit(task) for task in islice(tasks, most - len(running)))
                if not running:
                    return
                with failures_of(executor):
                    result = running.popleft().result()
                yield result
        finally:
            for future in running:
                future.cancel()


@contextlib.contextmanager
def failures_of(executor: Executor | None) -> Iterator[None]:
    """Say in a sentence what goes wrong in an executor, whatever errors it has of its own; ours stay as they are."""
    try:
        yield
    except Exception as error:
        if executor is None or isinstance(error, AgentForgeError):
            raise
        text = " ".join(str(error).split())[:200]
        raise AgentForgeError(
            f"a worker or its executor failed ({type(error).__name__}{': ' if text else ''}{text}); the same command "
            "resumes from what is finished"
        ) from error


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[Executor | None]:
    """The workers of a Dask cluster as an executor for `compress`; None if there is no address.

    address: of the scheduler, such as tcp://host:8786.  The workers need the same agentforge and see the model's files
    under the same path.  Raises BadInput if distributed is not installed, no scheduler answers, or it has no workers.
    """
    if address is None:
        yield None
        return
    try:
        from distributed import Client
    except ImportError:
        raise BadInput("a scheduler needs the package distributed; install agentforge[dask]") from None
    try:
        client = Client(address, timeout=PATIENCE, set_as_default=False)
    except (OSError, ValueError, TypeError, AssertionError) as error:  # the last: its thread did not start in ten seconds
        text = " ".join(str(error).split())[:120]
        # A client that did not connect closes itself when it is collected.  While another starts, that hangs: so now.
        error.__traceback__ = error.__context__ = None
        gc.collect()
        raise BadInput(
            f"scheduler {address!r}: no Dask scheduler answers there ({type(error).__name__}: {text}); expected an address "
            "such as tcp://host:8786"
        ) from None
    with client:
        threads = sum(client.nthreads().values())
        if not threads:
            raise BadInput(f"scheduler {address!r}: has no workers; start some with dask worker {address}")
        # pure: a task is not to be recognised by a hash over its statistics, which takes longer than sending it.
        executor = client.get_executor(pure=False)
        executor._max_workers = threads  # under the name that the executors of the standard library have it
        yield executor
