"""Whoever encodes, the bytes are the same; and whatever breaks, the same command goes on from there to the same bytes."""

from __future__ import annotations

import errno
import gc
import hashlib
import json
import math
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import agentforge
from agentforge import artifact as artifact_module
from agentforge import cli, execution, opening, pipeline, stages
from agentforge.artifact import Artifact, Encoded
from agentforge.errors import AgentForgeError, BadInput
from agentforge.execution import Task, encode_tensor
from agentforge.models import BuiltModel, LanguageModel
from agentforge.statistics import Calibration, InputStatistics

STAGES = ["rounding:bits=4,group=64", "trajectory:select=false", "vptq:v=4,k=16,shared=true"]
SPOILED = "model.layers.1.mlp.up_proj.weight"


def hashes(folder: Path) -> dict[str, str]:
    """The hash of every file below `folder`."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def partial_of(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def assert_sentence(error: pytest.ExceptionInfo[BaseException], *parts: str) -> None:
    text = str(error.value)
    assert len(text.splitlines()) == 1, text
    for part in parts:
        assert part in text


def compress(model: LanguageModel | Path, stage: str, out: Path, **settings: Any) -> Artifact:
    return agentforge.compress(
        model, stage, out, progress=False, calibration=Calibration(tokens=256, context=64), **settings
    )


def pieces(out: Path) -> set[str]:
    return {piece.name for piece in (partial_of(out) / "tensors").glob("[0-9]*.safetensors")}


class Watched(Executor):
    """An executor whose tasks are counted, and that may do something else after so many of them."""

    def __init__(self, inner: Executor, after: int = 0, then: Callable[[], None] = lambda: None) -> None:
        self.inner, self.after, self.then = inner, after, then
        self.submitted = self.running = self.most = 0

    def submit(self, work: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future = self.inner.submit(work, *args, **kwargs)
        self.submitted += 1
        self.running += 1
        self.most = max(self.most, self.running)
        future.add_done_callback(self.done)
        if self.submitted == self.after:
            self.then()
        return future

    def done(self, _: Future[Any]) -> None:
        self.running -= 1


def kill_a_worker(pool: ProcessPoolExecutor) -> None:
    os.kill(next(iter(pool._processes)), signal.SIGKILL)
    while not pool._broken:  # type: ignore[attr-defined]  # else the other worker may finish what is left before the pool sees it
        time.sleep(0.001)


def processes(count: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(count, multiprocessing.get_context("spawn"))


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    with processes(2) as pool:
        yield pool


@pytest.fixture(scope="module")
def spoiled(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with three NaN in one weight."""

    folder = tmp_path_factory.mktemp("spoiled") / "model"
    shutil.copytree(tiny_llama, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[SPOILED][3, 5:8] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


# Whoever encodes


@pytest.mark.slow
@pytest.mark.parametrize("stage", [*STAGES, "ecsq", "tcq", "rounding:bits=4,group=64 | entropy"])
def test_processes_change_no_byte(tiny_llama: Path, pool: ProcessPoolExecutor, stage: str, tmp_path: Path) -> None:
    compress(tiny_llama, stage, tmp_path / "threads")
    compress(tiny_llama, stage, tmp_path / "processes", executor=pool)
    assert hashes(tmp_path / "threads") == hashes(tmp_path / "processes")


@pytest.mark.slow
def test_processes_decode_an_artifact_themselves(tiny_llama: Path, pool: ProcessPoolExecutor, tmp_path: Path) -> None:
    compress(tiny_llama, "rounding:bits=8", tmp_path / "first")
    compress(agentforge.load(tmp_path / "first"), "ternary", tmp_path / "threads")
    compress(agentforge.load(tmp_path / "first"), "ternary", tmp_path / "processes", executor=pool)
    assert hashes(tmp_path / "threads") == hashes(tmp_path / "processes")


def test_an_artifact_that_was_replaced_is_not_decoded_for_the_one_that_was_opened(
    digits: LanguageModel, tmp_path: Path
) -> None:
    compress(digits, "rounding:bits=8", tmp_path / "a")
    opened = agentforge.load(tmp_path / "a")
    name = opened.weights()[0].name
    read = opened.reader(name)
    assert torch.equal(read(), opened.tensor(name))
    compress(digits, "rounding:bits=4", tmp_path / "a", overwrite=True)
    opening._opened.cache_clear()  # as in another process
    with pytest.raises(BadInput, match="no longer the artifact"):
        read()


def test_a_model_that_had_to_be_built_is_sent(tiny_llama: Path, tmp_path: Path) -> None:
    """Its files name the tensors otherwise than its modules do, so a worker could not find them."""
    shutil.copytree(tiny_llama, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    save_file(
        {k.removeprefix("model."): v for k, v in tensors.items()}, tmp_path / "model" / "model.safetensors", {"format": "pt"}
    )
    opened = agentforge.open_model(tmp_path / "model")
    assert isinstance(opened, BuiltModel)
    name = opened.weights()[0].name
    read = pickle.loads(pickle.dumps(opened.reader(name)))
    assert torch.equal(read(), opened.tensor(name))


def test_a_task_holds_no_tensor_and_survives_the_way(tiny_llama: Path) -> None:
    model = agentforge.open_model(tiny_llama)
    weight = model.weights()[0]
    stats = InputStatistics(torch.eye(weight.shape[1]), 5)
    stage = stages.get("rounding")
    task = Task(weight.name, model.reader(weight.name), weight.transposed, stage, None)
    assert len(pickle.dumps(task)) < 2000
    buffers: list[pickle.PickleBuffer] = []
    sent = pickle.dumps(task._replace(stats=stats), protocol=5, buffer_callback=buffers.append)
    back = pickle.loads(sent, buffers=[bytes(buffer) for buffer in buffers])  # read-only, as what comes over a network
    assert len(buffers) == 1 and back.stats.sensitivity is None
    assert torch.equal(back.stats.hessian, stats.hessian)
    assert back.stats.n == 5
    found, again = encode_tensor(task), pickle.loads(pickle.dumps(encode_tensor(back)))
    assert isinstance(found, Encoded)
    assert (found.sha256, found.error) == (again.sha256, again.error)


def test_a_worker_of_another_version_is_refused(tiny_llama: Path) -> None:
    model = agentforge.open_model(tiny_llama)
    weight = model.weights()[0]
    task = Task(weight.name, model.reader(weight.name), weight.transposed, stages.get("rounding"), None)
    with pytest.raises(BadInput, match=r"the command 0\.0\.9; install the same on both"):
        encode_tensor(task._replace(version="0.0.9"))


@pytest.mark.parametrize(("workers", "most"), [(1, 1), (3, 3), (None, 4)])
def test_no_more_tensors_are_in_flight_than_asked_for(
    tiny_llama: Path, tmp_path: Path, workers: int | None, most: int
) -> None:
    with ThreadPoolExecutor(2) as threads:
        watched = Watched(threads)
        watched._max_workers = 2  # type: ignore[attr-defined]
        compress(tiny_llama, "ternary", tmp_path / "a", executor=watched, workers=workers)
    assert watched.submitted == 14
    assert watched.most <= most


def test_sizes_in_hand_stay_within_the_largest(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    seen: list[list[int]] = []
    lock = threading.Lock()

    def work(task: Task) -> Encoded | str:
        size = task.load().numel()
        with lock:
            held.append(size)
            seen.append(list(held))
        time.sleep(0.01)
        found = encode_tensor(task)
        with lock:
            held.remove(size)
        return found

    monkeypatch.setattr(pipeline, "encode_tensor", work)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    compress(tiny_llama, "ternary", tmp_path / "a")
    largest = max(math.prod(entry.shape) for entry in agentforge.open_model(tiny_llama).entries.values())
    assert len(seen) == 14
    assert max(sum(sizes) for sizes in seen) <= largest
    assert 1 < max(len(sizes) for sizes in seen) < 8


# Whatever breaks


@pytest.mark.slow
def test_a_killed_worker_ends_in_a_sentence_and_the_run_goes_on_later(
    tiny_llama: Path, pool: ProcessPoolExecutor, tmp_path: Path
) -> None:
    stage, out = STAGES[0], tmp_path / "a"
    compress(tiny_llama, stage, tmp_path / "whole")
    with processes(2) as mortal:
        watched = Watched(mortal, 9, lambda: kill_a_worker(mortal))
        with pytest.raises(AgentForgeError) as error:
            compress(tiny_llama, stage, out, executor=watched, workers=2)
        assert_sentence(error, "BrokenProcessPool", "the same command resumes")
        assert not isinstance(error.value, BadInput)
    before = pieces(out)
    assert before
    assert not out.exists()
    watched = Watched(pool)
    compress(tiny_llama, stage, out, executor=watched)
    assert watched.submitted < 14, "what was finished is not done again"
    assert hashes(out) == hashes(tmp_path / "whole")


def test_an_executor_that_takes_no_more_ends_in_a_sentence(tiny_llama: Path, tmp_path: Path) -> None:
    threads = ThreadPoolExecutor(1)
    threads.shutdown()
    with pytest.raises(AgentForgeError) as error:
        compress(tiny_llama, "ternary", tmp_path / "a", executor=threads)
    assert_sentence(error, "cannot schedule new futures")


def test_a_full_disk_under_an_executor(tiny_llama: Path, tmp_path: Path) -> None:
    stage, out, calls = STAGES[0], tmp_path / "a", iter(range(5))
    compress(tiny_llama, stage, tmp_path / "whole")
    real = artifact_module.write_sealed

    def full(path: Path, *rest: Any) -> None:
        if next(calls, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        real(path, *rest)

    with ThreadPoolExecutor(2) as threads:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(artifact_module, "write_sealed", full)
            with pytest.raises(AgentForgeError) as error:
                compress(tiny_llama, stage, out, executor=threads)
        assert_sentence(error, "No space left on device", "the same command resumes")
        assert len(pieces(out)) >= 5
        compress(tiny_llama, stage, out, executor=threads)
    assert hashes(out) == hashes(tmp_path / "whole")


@pytest.mark.parametrize("fault", ["truncated", "missing", "forbidden"])
def test_a_shard_that_becomes_unreadable(tiny_llama: Path, tmp_path: Path, fault: str) -> None:
    """Two shards, the second of which fails while the model is being read; it is not a weight for a fallback."""
    model, stage, out = tmp_path / "model", STAGES[0], tmp_path / "a"
    shutil.copytree(tiny_llama, model)
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    halves = {f"model-0000{i + 1}-of-00002.safetensors": sorted(tensors)[i::2] for i in range(2)}
    for file, names in halves.items():
        save_file({name: tensors[name] for name in names}, model / file, {"format": "pt"})
    weight_map = {name: file for file, names in halves.items() for name in names}
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    compress(model, stage, tmp_path / "whole")
    shard = model / "model-00002-of-00002.safetensors"
    content = shard.read_bytes()
    opened = agentforge.open_model(model)
    assert opened.fingerprint
    if fault == "truncated":
        shard.write_bytes(content[: len(content) // 2])
    elif fault == "missing":
        shard.unlink()
    else:
        shard.chmod(0)
        if os.access(shard, os.R_OK):
            pytest.skip("this user may read everything")
    with pytest.raises(BadInput) as error:
        compress(opened, stage, out, workers=1, fallback=True)
    assert_sentence(error, shard.name, "cannot be read")
    assert not out.exists()
    assert pieces(out)
    shard.unlink(missing_ok=True)
    shard.write_bytes(content)
    compress(model, stage, out)
    assert hashes(out) == hashes(tmp_path / "whole")


# Weights that a stage cannot encode


@pytest.mark.parametrize("stage", STAGES)
def test_nan_ends_the_run_and_a_fallback_goes_on_from_there(spoiled: Path, stage: str, tmp_path: Path) -> None:
    out = tmp_path / "a"
    with pytest.raises(BadInput) as error:
        compress(spoiled, stage, out, workers=1)
    assert_sentence(error, SPOILED, "NaN")
    before = pieces(out)
    artifact = compress(spoiled, stage, out, fallback=True)
    compress(spoiled, stage, tmp_path / "whole", fallback=True)
    assert hashes(out) == hashes(tmp_path / "whole")
    assert before or "shared" in stage, "codebooks that all weights share are refused before there is a tensor"
    rows = {row["name"]: row for row in artifact.fallbacks}
    assert rows[SPOILED]["stage"] is None
    assert "3 NaN and 0 infinite values" in rows[SPOILED]["reason"]
    assert artifact.manifest["fallbacks"] == len(rows)
    original = load_file(spoiled / "model.safetensors")[SPOILED]
    kept = artifact.decode(rows[SPOILED])
    assert kept.dtype == original.dtype
    assert kept.numpy().tobytes() == original.numpy().tobytes()
    assert any(SPOILED in check and "not finite" in check for check in artifact.verify())
    if "vptq" not in stage:  # which looks at inputs: those behind the weight are NaN, too
        assert list(rows) == [SPOILED]


def test_an_artifact_with_a_fallback_is_no_answer_to_a_call_without(spoiled: Path, tmp_path: Path) -> None:
    out = tmp_path / "a"
    compress(spoiled, "ternary", out, fallback=True)
    with pytest.raises(BadInput) as error:
        compress(spoiled, "ternary", out)
    assert_sentence(error, SPOILED, "--fallback")
    assert compress(spoiled, "ternary", out, fallback=True).fallbacks


def test_what_decodes_to_infinity_is_rounded_to_eight_bits(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ternary = type(stages.get("ternary"))
    real = ternary._decode

    def overflows(self: Any, packed: Any) -> torch.Tensor:
        dense = real(self, packed)
        return dense * float("inf") if packed.shape == (128, 64) else dense

    monkeypatch.setattr(ternary, "_decode", overflows)
    with pytest.raises(BadInput, match="not finite"):
        compress(tiny_llama, "ternary", tmp_path / "refused")
    artifact = compress(tiny_llama, "ternary", tmp_path / "a", fallback=True)
    rows = artifact.fallbacks
    assert len(rows) == 4
    assert all(row["stage"] == stages.get("rounding", bits=8).to_json() for row in rows)
    assert all("ternary: " in row["reason"] and "not finite" in row["reason"] for row in rows)
    assert artifact.manifest["fallbacks"] == 4
    monkeypatch.undo()
    artifact.verify()
    assert max(row["relative_error"] for row in rows) < 0.01


def test_without_a_need_a_fallback_changes_no_byte(tiny_llama: Path, tmp_path: Path) -> None:
    compress(tiny_llama, "ternary", tmp_path / "a")
    artifact = compress(tiny_llama, "ternary", tmp_path / "b", fallback=True)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    assert artifact.fallbacks == []
    assert "fallbacks" not in artifact.manifest


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`agentforge compress` in this process, which must succeed; returns what it printed."""
    monkeypatch.setenv("COLUMNS", "300")

    def call(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["agentforge", "compress", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        printed = capsys.readouterr()
        assert not stop.value.code, printed.err
        return printed.out

    return call


def test_the_command_says_what_was_not_as_asked(command: Callable[..., str], spoiled: Path, tmp_path: Path) -> None:
    asked = (spoiled, "--stage", "ternary", "--out", tmp_path / "a", "--fallback")
    said = json.loads(command(*asked, "--json"))["fallbacks"]
    assert list(said) == [SPOILED]
    assert "kept (float32)" in said[SPOILED]
    assert "3 NaN" in said[SPOILED]
    assert f"not as asked, {SPOILED}: kept (float32)" in " ".join(command(*asked).split())


# Dask


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=3, threads_per_worker=1, processes=True, dashboard_address=":0", silence_logs=50
    ) as cluster:
        yield cluster


@pytest.mark.slow
def test_a_dask_worker_that_is_killed_loses_nothing(cluster: Any, tiny_llama: Path, tmp_path: Path) -> None:
    stage = "rounding:bits=4,group=64,clip=mse"
    compress(tiny_llama, stage, tmp_path / "whole")
    with execution.connected(cluster.scheduler_address) as executor:
        assert executor is not None
        alive = executor._client.run(os.getpid)  # type: ignore[attr-defined]
        watched = Watched(executor, 5, lambda: os.kill(min(alive.values()), signal.SIGKILL))
        compress(tiny_llama, stage, tmp_path / "dask", executor=watched, workers=6)
        assert watched.submitted == 14
        left = executor._client.run(os.getpid)  # type: ignore[attr-defined]
    assert min(alive.values()) not in left.values()
    assert hashes(tmp_path / "dask") == hashes(tmp_path / "whole")


@pytest.mark.slow
def test_statistics_and_shared_planes_reach_dask_workers(cluster: Any, tiny_llama: Path, tmp_path: Path) -> None:
    stage = STAGES[2]
    compress(tiny_llama, stage, tmp_path / "whole")
    with execution.connected(cluster.scheduler_address) as executor:
        compress(tiny_llama, stage, tmp_path / "dask", executor=executor)
    assert hashes(tmp_path / "dask") == hashes(tmp_path / "whole")


@pytest.mark.slow
def test_what_a_dask_worker_refuses_is_said_as_it_is_here(cluster: Any, spoiled: Path, tmp_path: Path) -> None:
    with execution.connected(cluster.scheduler_address) as executor, pytest.raises(BadInput) as error:
        compress(spoiled, "ternary", tmp_path / "a", executor=executor)
    assert_sentence(error, SPOILED, "3 NaN")


@pytest.mark.slow
def test_the_command_with_a_scheduler(command: Callable[..., str], cluster: Any, tiny_llama: Path, tmp_path: Path) -> None:
    compress(tiny_llama, "ternary", tmp_path / "whole")
    asked = (tiny_llama, "--stage", "ternary", "--out", tmp_path / "a", "--json")
    assert json.loads(command(*asked, "--scheduler", cluster.scheduler_address))["fallbacks"] == {}
    assert hashes(tmp_path / "a") == hashes(tmp_path / "whole")


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "nonsense", "tcp://", "http://127.0.0.1:1"])
def test_a_scheduler_that_does_not_answer(address: str, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distributed = pytest.importorskip("distributed")
    monkeypatch.setattr(execution, "PATIENCE", 0.5)
    with pytest.raises(BadInput) as error, execution.connected(address):
        pass
    assert_sentence(error, repr(address), "tcp://host:8786")
    left = [one for one in gc.get_objects() if type(one) is distributed.Client]
    assert not left  # one that is collected while another starts makes that wait forever


def test_a_scheduler_without_workers_or_without_dask(monkeypatch: pytest.MonkeyPatch) -> None:
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=0, processes=False, dashboard_address=":0", silence_logs=50) as empty:
        with pytest.raises(BadInput) as error, execution.connected(empty.scheduler_address):
            pass
        assert_sentence(error, "has no workers")
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(BadInput, match=r"agentforge\[dask\]"), execution.connected("tcp://127.0.0.1:1"):
        pass


def test_no_scheduler_is_no_executor() -> None:
    with execution.connected(None) as executor:
        assert executor is None
