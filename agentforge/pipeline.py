"""Compress a model: every weight that may be touched goes through a stage, everything else is copied."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm.auto import tqdm

from . import stages
from .artifact import FORMAT, Artifact, Encoded, Writer, read_shared, relative_error
from .errors import AgentForgeError, BadInput
from .execution import Task, Unencoded, encode_tensor, from_worker, is_finite
from .folders import check_out
from .models import LanguageModel, Weight, check_workers, device_named
from .opening import open_model
from .planes import Packed
from .stages.text import with_refinement
from .statistics import Calibration, InputStatistics, collect
from .version import __version__

_T = TypeVar("_T")
_R = TypeVar("_R")


def compress(
    model: LanguageModel | str | Path,
    stage: stages.Stage | str | Mapping[str, stages.Stage],
    out: str | Path,
    *,
    embeddings: bool = False,
    seed: int = 0,
    workers: int | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    progress: bool = True,
    calibration: Calibration | None = None,
    statistics: Mapping[str, InputStatistics] | None = None,
    executor: Executor | None = None,
    fallback: bool = False,
) -> Artifact:
    """Encode the model's weights with `stage` and write the artifact `out`.

    model: an opened model, or what `open_model` takes.  stage: a stage, or text such as
    "rounding:bits=4,group=64 | entropy", or a stage for each weight by its name; weights without one are kept.
    embeddings: encode the token embedding (and an output head of its own), too.
    workers: threads, each with one tensor in memory (default: one per core, but together never larger than the largest
    tensor, so that three times that in float32, and 500 MB, are enough memory for a stage without statistics).
    executor: encodes in place of these threads, `workers` tensors at a time (default: two for each of its workers):
    processes on this machine or on others that see the model's files under the same path.  This process writes.
    device: "cuda" searches on a GPU in the stages that can.  The bytes depend on none of these three.
    overwrite: replace an artifact of another recipe.
    fallback: a weight that the stage cannot encode (it holds NaN, say) is encoded with rounding:bits=8, or kept as it is
    if that cannot either; its row says why, and `Artifact.fallbacks` lists it.  Otherwise such a weight ends the run.
    calibration: text for stages that need statistics.  statistics: what `statistics.collect` gave for this model and
    calibration, if already available.

    Run again after a kill, the same call continues from the tensors that are finished and gives the same bytes; for an
    artifact that is complete it only returns it.  Raises BadInput if model, stage or `out` cannot be used, and
    AgentForgeError if the disk is full or the executor broke down; the same call resumes then, too.
    """
    model = open_model(model) if isinstance(model, str | Path) else model
    plan = _plan(model, stages.parse(stage) if isinstance(stage, str) else stage, embeddings)
    check_workers(workers)
    if executor is None:
        device_named(device)
    out = check_out(out, model.path)
    recipe: dict[str, Any] = {
        "format": FORMAT,
        "agentforge": __version__,
        "model": model.fingerprint,
        "stage": _plan_to_json(stage, plan),
        "embeddings": embeddings,
        "seed": seed,
    }
    if any(one.needs_statistics for one in plan.values()):
        calibration = calibration or Calibration()
        for one in plan.values():
            calibration = calibration.for_stage(one)
        recipe["calibration"] = calibration.to_json()
    with Writer(out, recipe, overwrite) as writer:
        replaced = Artifact(out).fallbacks if writer.finished else writer.fallbacks()
        if replaced and not fallback:
            raise BadInput(
                f"{out}: {_names(plan)} could not encode {replaced[0]['name']}, a fallback took its place; pass --fallback, "
                "too, or choose another --out"
            )
        if writer.finished:
            return Artifact(out)
        job = _Job(writer, model, plan, embeddings, seed, workers, device, progress, executor, fallback)
        job.run(calibration, statistics)
        return writer.finish(model, len(model.entries))


def _plan(
    model: LanguageModel, stage: stages.Stage | Mapping[str, stages.Stage], embeddings: bool
) -> dict[str, stages.Stage]:
    """The stage of each weight, by name.  Raises BadInput if there is no weight, or a stage that does not fit."""
    names = [weight.name for weight in model.weights(embeddings)]
    if not names:
        raise BadInput(f"{model.name}: has no weights that a stage may touch")
    if isinstance(stage, stages.Stage):
        stage.check()
        return dict.fromkeys(names, stage)
    for name, one in stage.items():
        if name not in names:
            raise BadInput(f"{name}: is not a weight of {model.name} that a stage may touch")
        one.check()
        if one.shared_layout():
            raise BadInput(f"{name}: {one} shares planes between weights, which takes one stage for all of them")
    if not stage:
        raise BadInput(f"{model.name}: no weight has a stage; name at least one")
    return {name: stage[name] for name in names if name in stage}


def _plan_to_json(stage: object, plan: Mapping[str, stages.Stage]) -> dict[str, Any]:
    """What a recipe says of the plan: the one stage, or that of each weight."""
    return several_to_json(plan) if isinstance(stage, Mapping) else next(iter(plan.values())).to_json()


def several_to_json(plan: Mapping[str, stages.Stage]) -> dict[str, Any]:
    """A stage for each weight, as a recipe has them."""
    return {"stage": "several", "weights": {name: one.to_json() for name, one in sorted(plan.items())}}


def _names(plan: Mapping[str, stages.Stage]) -> str:
    return ", ".join(sorted({stage.name for stage in plan.values()}))


def refine(
    artifact: Artifact,
    how: str,
    out: str | Path,
    *,
    original: LanguageModel,
    overwrite: bool = False,
    progress: bool = True,
) -> Artifact:
    """Refine the planes of an artifact, and write the artifact `out` of what comes of it; nothing is encoded again.

    how: the refinement, "entropy" (see `stages.refined`).  original: the model that the artifact stands for; the errors are
    those against its weights.

    Goes on after a kill as `compress` does.  Raises BadInput if the artifact's planes are refined already.
    """
    refined = {row["name"]: with_refinement(_stage_of(row), how) for row in artifact.rows if row["stage"]}
    if not refined:
        raise BadInput(f"{artifact.path}: holds no encoded tensors, so that there is nothing to refine")
    stage = next(iter(refined.values()))
    recipe: dict[str, Any] = {
        "format": FORMAT,
        "agentforge": __version__,
        "model": original.fingerprint,
        "artifact": artifact.sha256,
        "stage": {"stage": "refinement", "by": how},
    }
    with Writer(check_out(out, original.path, artifact.path), recipe, overwrite) as writer:
        if writer.finished:
            return Artifact(out)
        if stage.shared_layout() and not writer.has_shared():
            writer.put_shared(stage, stage.refine(artifact.shared))
        shared = read_shared(writer.shared_piece, stage) if stage.shared_layout() else None
        weights = {weight.name: weight for weight in original.weights(embeddings=True)}
        bar = tqdm(
            artifact.rows,
            unit="tensor",
            leave=False,
            desc=f"refining: {original.name}",
            disable=None if progress else True,
        )
        for index, row in enumerate(bar):
            if writer.has(index):
                continue
            found = artifact.read(row)
            if isinstance(found, torch.Tensor):
                writer.put_kept(index, row["name"], found, row["reason"])
                continue
            by = refined[row["name"]]
            packed = by.refine(found)
            decoded = by.decode(Packed(packed.shape, packed.planes, shared))
            if not is_finite(decoded):
                raise BadInput(f"{row['name']}: {by} decodes to values that are not finite")
            weight = weights[row["name"]]
            writer.put_encoded(index, weight, Encoded.of(by, packed, relative_error(weight.load(), decoded)))
        return writer.finish(original, len(artifact.rows))


def _stage_of(row: dict[str, Any]) -> stages.Stage:
    return stages.from_json(row["stage"])


def store(
    model: LanguageModel,
    stage: stages.Stage | Mapping[str, stages.Stage],
    packed: Mapping[str, Packed],
    writer: Writer,
    *,
    kept: Mapping[str, torch.Tensor] | None = None,
    progress: bool = True,
) -> Artifact:
    """Write an artifact from planes that were made elsewhere (by training), one Packed for each weight that `stage` encoded.

    stage: one for all of them, or each one's own by its name.  writer: of the artifact, open, and not finished yet.
    kept: tensors that take the place of the model's own.  Raises BadInput if a name is not the model's, or planes and
    weight have other shapes.
    """
    kept = dict(kept or {})
    touched = {weight.name: weight for weight in model.weights(embeddings=True) if weight.name in packed}
    for name in [*packed, *kept]:
        if name not in model.entries or (name in packed and name not in touched):
            raise BadInput(f"{name}: is not a tensor of {model.name} that could be stored so")
    for name, weight in touched.items():
        if packed[name].shape != weight.shape:
            raise BadInput(f"{name}: is {list(weight.shape)}, its planes stand for {list(packed[name].shape)}")
    for name, tensor in kept.items():
        if tuple(tensor.shape) != model.entries[name].shape:
            raise BadInput(f"{name}: is {list(model.entries[name].shape)}, the tensor to keep is {list(tensor.shape)}")
    reasons = {**dict.fromkeys(model.entries, "not encoded"), **model.kept(), **dict.fromkeys(kept, "trained")}
    names = sorted(model.entries)
    bar = tqdm(names, unit="tensor", leave=False, desc=f"writing {model.name}", disable=None if progress else True)
    for index, name in enumerate(bar):
        if writer.has(index):
            continue
        if name in touched:
            by = stage[name] if isinstance(stage, Mapping) else stage
            error = relative_error(touched[name].load(), by.decode(packed[name]))
            writer.put_encoded(index, touched[name], Encoded.of(by, packed[name], error))
        else:
            writer.put_kept(index, name, kept.get(name, model.tensor(name)), reasons[name])
    return writer.finish(model, len(names))


@dataclass
class _Job:
    """One run of `compress`: what is the same for all its tensors."""

    writer: Writer
    model: LanguageModel
    plan: Mapping[str, stages.Stage]
    embeddings: bool
    seed: int
    workers: int | None
    device: str
    progress: bool
    executor: Executor | None
    fallback: bool

    def run(self, calibration: Calibration | None, statistics: Mapping[str, InputStatistics] | None) -> None:
        """Encode or copy every tensor that the writer has not finished yet, in the order of names."""
        model, writer = self.model, self.writer
        model.check()
        touched = {weight.name: weight for weight in model.weights(self.embeddings) if weight.name in self.plan}
        reasons = {**dict.fromkeys(model.entries, "no stage was chosen for it"), **model.kept(self.embeddings)}
        names = sorted(model.entries)
        todo = [(i, name) for i, name in enumerate(names) if not writer.has(i)]
        needing = {name for name, stage in self.plan.items() if stage.needs_statistics}
        if any(name in needing for _, name in todo) and calibration and statistics is None:
            statistics = collect(model, calibration, self.workers, self.progress)
        statistics = statistics or {}
        shared = self._shared([touched[name] for name in names if name in touched], statistics)

        def task(name: str) -> Task:
            return Task.of(
                touched[name],
                model.reader(name),
                self.plan[name],
                statistics.get(name),
                shared,
                seed=self.seed,
                device=self.device,
                fallback=self.fallback,
            )

        def put(index: int, name: str, found: Encoded | Unencoded | None) -> None:
            if isinstance(found, Encoded):
                writer.put_encoded(index, touched[name], found)
            elif found:
                writer.put_kept(index, name, model.tensor(name), found.reason, fallback=True)
            else:
                writer.put_kept(index, name, model.tensor(name), reasons[name])

        bar = tqdm(
            total=len(names),
            initial=len(names) - len(todo),
            unit="tensor",
            leave=False,
            desc=f"{_names(self.plan)}: {model.name}",
            disable=None if self.progress else True,
        )
        with bar:
            if self.executor:
                self._distribute(self.executor, todo, lambda name: task(name) if name in touched else None, put, bar.update)
            else:
                self._thread(
                    todo, lambda i, name: put(i, name, encode_tensor(task(name)) if name in touched else None), bar.update
                )

    def _thread(self, todo: list[tuple[int, str]], work: Callable[[int, str], None], done: Callable[[], object]) -> None:
        """Run `work` on each tensor in threads of this process."""
        sizes = {name: math.prod(entry.shape) for name, entry in self.model.entries.items()}
        limit = max(sizes.values()) if self.workers is None else None  # a number that was asked for is kept
        threads = self.workers or os.cpu_count() or 1
        with ThreadPoolExecutor(threads) as pool:

            def finish(_: tuple[int, str], future: Future[None]) -> None:
                future.result()
                done()

            _drive(todo, lambda item: pool.submit(work, *item), finish, threads, lambda item: sizes[item[1]], limit)

    def _distribute(
        self,
        executor: Executor,
        todo: list[tuple[int, str]],
        task: Callable[[str], Task | None],
        put: Callable[[int, str, Encoded | Unencoded | None], None],
        done: Callable[[], object],
    ) -> None:
        """Have the executor encode the tensors for which there is a task; everything is written here."""

        def submit(item: tuple[int, str]) -> Future[Encoded | Unencoded | None]:
            if (asked := task(item[1])) is not None:
                try:
                    return executor.submit(encode_tensor, asked)
                except Exception as error:  # of whatever kind: executors have errors of their own
                    raise from_worker(error) from error
            kept: Future[Encoded | Unencoded | None] = Future()
            kept.set_result(None)
            return kept

        def finish(item: tuple[int, str], future: Future[Encoded | Unencoded | None]) -> None:
            try:
                found = future.result()
            except AgentForgeError:
                raise
            except Exception as error:
                raise from_worker(error) from error
            put(*item, found)
            done()

        # Two each: a worker that has finished begins the next one while its planes are on the way.
        most = self.workers or 2 * (getattr(executor, "_max_workers", None) or os.cpu_count() or 1)
        _drive(todo, submit, finish, most)

    def _shared(self, touched: list[Weight], statistics: Mapping[str, InputStatistics]) -> Path | None:
        """The file of the planes that the weights share, from an earlier run or fitted now; None for stages without any."""
        stage = next(iter(self.plan.values()))  # what is shared is shared by all
        if not stage.shared_layout():
            return None
        if not self.writer.has_shared():
            layers = [stages.Layer(w.name, partial(self._load, w), statistics.get(w.name)) for w in touched]
            sound = [layer for layer in layers if _sound(layer)]
            if len(sound) < (1 if self.fallback else len(layers)):
                # Behind a weight that is not finite, the statistics are not either: name the weight, if there is one.
                culprit = min((layer for layer in layers if not _sound(layer)), key=lambda layer: is_finite(layer.load()))
                what = "its statistics hold" if is_finite(culprit.load()) else "holds"
                raise BadInput(f"{culprit.name}: {what} NaN or infinite values; fix the weight or leave it out")
            self.writer.put_shared(stage, stage.fit_shared(sound, self.seed))
        return self.writer.shared_piece.absolute()

    def _load(self, weight: Weight) -> torch.Tensor:
        return weight.load().to(device_named(self.device))


def _sound(layer: stages.Layer) -> bool:
    return is_finite(layer.load()) and (layer.stats is None or is_finite(layer.stats.hessian))


def _drive(
    todo: Iterable[_T],
    submit: Callable[[_T], Future[_R]],
    finish: Callable[[_T, Future[_R]], None],
    most: int,
    size: Callable[[_T], int] = lambda _: 0,
    limit: int | None = None,
) -> None:
    """Submit the items in turn, and hand each one's future to `finish` when it is done; the first error stops it all.

    At most `most` are in memory at any time, of at most `limit` together, unless a single one is larger.
    """
    waiting, running, held = deque(todo), dict[Future[_R], _T](), 0
    try:
        while waiting or running:
            while waiting and len(running) < most and (not running or limit is None or held + size(waiting[0]) <= limit):
                item = waiting.popleft()
                running[submit(item)] = item
                held += size(item)
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                item = running.pop(future)
                finish(item, future)
                held -= size(item)
    finally:
        for future in running:
            future.cancel()
