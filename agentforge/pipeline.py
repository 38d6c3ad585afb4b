"""Compress a model: every weight that may be touched goes through a stage, everything else is copied."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import stages
from .artifact import FORMAT, Artifact, Encoded, Writer, read_shared, relative_error
from .errors import BadInput
from .execution import Task, encode_tensor, failures_of, is_finite, tasks_at_once
from .folders import check_out
from .models import LanguageModel, Weight, check_workers, device_named
from .opening import open_model
from .planes import Packed
from .progress import progress_bar
from .stages.text import with_refinement
from .statistics import Calibration, InputStatistics, collect
from .version import __version__


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
    ready: Mapping[str, Callable[[], Encoded]] | None = None,
    ready_by: str | None = None,
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
    calibration, if already available.  ready: weights that are encoded already, with the same stage, seed and statistics;
    ready_by: what encoded them, if it was anything else, for the recipe.

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
    several = {"stage": "several", "weights": {name: one.to_json() for name, one in sorted(plan.items())}}
    recipe: dict[str, Any] = {
        "format": FORMAT,
        "agentforge": __version__,
        "model": model.fingerprint,
        "stage": several if isinstance(stage, Mapping) else next(iter(plan.values())).to_json(),
        "embeddings": embeddings,
        "seed": seed,
    }
    torch.set_num_threads(torch.get_num_threads())  # in a process that was forked, two threads at once would fail to do it
    if any(one.needs_statistics for one in plan.values()):
        calibration = (calibration or Calibration()).for_model(model)
        for one in plan.values():
            calibration = calibration.for_stage(one)
        recipe["calibration"] = calibration.to_json()
    if ready_by:
        recipe["ready_by"] = ready_by
    with Writer(out, recipe, overwrite) as writer:
        replaced = Artifact(out).fallbacks if writer.finished else writer.fallbacks()
        if replaced and not fallback:
            raise BadInput(
                f"{out}: {_names(plan)} could not encode {replaced[0]['name']}, a fallback took its place; pass --fallback, "
                "too, or choose another --out"
            )
        if writer.finished:
            return Artifact(out)
        model.check()
        touched = {weight.name: weight for weight in model.weights(embeddings) if weight.name in plan}
        names = sorted(model.entries)
        needing = {name for name, one in plan.items() if one.needs_statistics}
        if statistics is None and calibration and any(n in needing and not writer.has(i) for i, n in enumerate(names)):
            statistics = collect(model, calibration, workers, progress)
        known = statistics or {}

        def load(weight: Weight) -> torch.Tensor:
            return weight.load().to(device_named(device))

        # One after the other: each has its statistics in memory.
        layers = (stages.Layer(name, partial(load, touched[name]), known.get(name)) for name in names if name in touched)
        shared = _shared(writer, next(iter(plan.values())), layers, seed, fallback)
        common: dict[str, Any] = {"shared": shared, "seed": seed, "device": device, "fallback": fallback}

        def work(name: str) -> Callable[[], Encoded | str] | None:  # made when its turn comes, with its statistics
            if name not in touched:
                return None
            about = name, model.reader(name), touched[name].transposed, plan[name], known.get(name)
            return partial(encode_tensor, Task(*about, **common))

        reasons = {**dict.fromkeys(names, "no stage was chosen for it"), **model.kept(embeddings)}
        title = f"{_names(plan)}: {model.name}" if progress else None

        def keep(name: str) -> tuple[torch.Tensor, str]:
            return model.tensor(name), reasons[name]

        return _fill(writer, model, names, keep, title, ready or {}, work, workers, executor)


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
    refined = {row["name"]: with_refinement(stages.from_json(row["stage"]), how) for row in artifact.rows if row["stage"]}
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
        if stage.shared_layout() and not writer.has("shared"):
            writer.put_shared(stage, stage.refine(artifact.shared))
        shared = read_shared(writer.piece("shared"), stage) if stage.shared_layout() else None
        weights = {weight.name: weight for weight in original.weights(embeddings=True)}
        rows = {row["name"]: row for row in artifact.rows}

        def again(name: str) -> Encoded:
            by, found = refined[name], artifact.read(rows[name])
            assert isinstance(found, Packed)
            packed = by.refine(found)
            decoded = by.decode(Packed(packed.shape, packed.planes, shared))
            if not is_finite(decoded):
                raise BadInput(f"{name}: {by} decodes to values that are not finite")
            return Encoded.of(by, packed, relative_error(weights[name].load(), decoded))

        def keep(name: str) -> tuple[torch.Tensor, str]:
            return artifact.decode(rows[name]), rows[name]["reason"]

        ready = {name: partial(again, name) for name in refined}
        return _fill(writer, original, list(rows), keep, f"refining: {original.name}" if progress else None, ready)


def store(
    model: LanguageModel,
    stage: Mapping[str, stages.Stage],
    packed: Mapping[str, Callable[[], Packed]],
    writer: Writer,
    *,
    kept: Mapping[str, torch.Tensor],
    progress: bool = True,
) -> Artifact:
    """Write an artifact from planes that were made elsewhere (by training): what gives them, for each weight that `stage`
    encoded, is called when its turn comes.

    stage: each weight's own, by its name.  writer: of the artifact, open, and not finished yet.  kept: tensors that take the
    place of the model's own.
    """
    touched = {weight.name: weight for weight in model.weights() if weight.name in packed}
    reasons = {**dict.fromkeys(model.entries, "not encoded"), **model.kept(), **dict.fromkeys(kept, "trained")}

    def encoded(name: str) -> Encoded:
        planes = packed[name]()
        return Encoded.of(stage[name], planes, relative_error(touched[name].load(), stage[name].decode(planes)))

    def keep(name: str) -> tuple[torch.Tensor, str]:
        return kept.get(name, model.tensor(name)), reasons[name]

    ready = {name: partial(encoded, name) for name in touched}
    return _fill(writer, model, sorted(model.entries), keep, f"writing {model.name}" if progress else None, ready)


def _fill(
    writer: Writer,
    model: LanguageModel,
    names: list[str],
    keep: Callable[[str], tuple[torch.Tensor, str]],
    title: str | None,
    ready: Mapping[str, Callable[[], Encoded]],
    work: Callable[[str], Callable[[], Encoded | str] | None] = lambda _: None,
    workers: int | None = None,
    executor: Executor | None = None,
) -> Artifact:
    """Write the tensors of these names that the writer has not finished yet, in this order, and finish the artifact.

    ready: give weights at once.  work: gives what encodes a weight, to be called by the executor, or by threads of this
    process.  Any other tensor stays as `keep` says: the tensor, and why.  title: of the bar; None for no bar.
    """
    weights = {weight.name: weight for weight in model.weights(embeddings=True)}
    sizes = {name: math.prod(entry.shape) for name, entry in model.entries.items()}
    todo = deque((index, name) for index, name in enumerate(names) if not writer.has(index))
    most = tasks_at_once(executor, workers)
    # Together they are no larger than the largest; a number that was asked for is kept.
    limit = sum(sizes.values()) if workers or executor else max(sizes.values())
    running, held = dict[Future[Encoded | str], tuple[int, str]](), 0
    shown = progress_bar(title, len(names), "tensor", len(names) - len(todo))
    with shown as bar, nullcontext(executor) if executor else ThreadPoolExecutor(most) as pool:
        try:
            while todo or running:
                while todo and len(running) < most and held + sizes[todo[0][1]] <= limit:
                    index, name = todo.popleft()
                    if name in ready:
                        writer.put_encoded(index, weights[name], ready[name]())
                        bar.update()
                    elif job := work(name):
                        with failures_of(executor):
                            running[pool.submit(job)] = index, name
                        held += sizes[name]
                    else:
                        writer.put_kept(index, name, *keep(name))
                        bar.update()
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    index, name = running.pop(future)
                    with failures_of(executor):
                        found = future.result()
                    if isinstance(found, Encoded):
                        writer.put_encoded(index, weights[name], found)
                    else:
                        writer.put_kept(index, name, model.tensor(name), found, fallback=True)
                    held -= sizes[name]
                    bar.update()
        finally:
            for future in running:
                future.cancel()
    return writer.finish(model, len(names))


def _shared(writer: Writer, stage: stages.Stage, layers: Iterable[stages.Layer], seed: int, fallback: bool) -> Path | None:
    """The file of the planes that the weights share, from an earlier run or fitted now; None for stages without any."""
    if not stage.shared_layout():
        return None
    if not writer.has("shared"):
        layers = list(layers)
        sound = [layer for layer in layers if _sound(layer)]
        if len(sound) < (1 if fallback else len(layers)):
            # Behind a weight that is not finite, the statistics are not either: name the weight, if there is one.
            culprit = min((layer for layer in layers if not _sound(layer)), key=lambda layer: is_finite(layer.load()))
            what = "its statistics hold" if is_finite(culprit.load()) else "holds"
            raise BadInput(f"{culprit.name}: {what} NaN or infinite values; fix the weight or leave it out")
        writer.put_shared(stage, stage.fit_shared(sound, seed))
    return writer.piece("shared").absolute()


def _sound(layer: stages.Layer) -> bool:
    return is_finite(layer.load()) and (layer.stats is None or is_finite(layer.stats.hessian))
