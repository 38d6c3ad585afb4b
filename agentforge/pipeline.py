"""Compress a model: every weight that may be touched goes through a stage, everything else is copied."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from . import __version__, stages
from .artifact import FORMAT, Artifact, Writer, relative_error
from .errors import BadInput
from .models import LanguageModel, Weight, open_model
from .planes import Packed
from .statistics import Calibration, InputStatistics, collect


def compress(
    model: LanguageModel | str | Path,
    stage: stages.Stage | str,
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
) -> Artifact:
    """Encode the model's weights with `stage` and write the artifact `out`.

    model: an opened model, or what `open_model` takes.  stage: a stage, or text such as "rounding:bits=4,group=64".
    embeddings: encode the token embedding (and an output head of its own), too.  workers: threads, each with one tensor
    in hand (default: one a core).  device: "cuda" searches on a GPU in the stages that can.  The bytes depend on neither.
    overwrite: replace an artifact of another recipe.
    calibration: text for stages that need statistics.  statistics: what `statistics.collect` gave for this model and
    calibration, where it is at hand already.

    Run again after a kill, the same call goes on from the tensors that are finished and gives the same bytes; for an
    artifact that is complete it only returns it.  Raises BadInput where model, stage or `out` cannot be used.
    """
    model = open_model(model) if isinstance(model, str | Path) else model
    stage = stages.parse(stage) if isinstance(stage, str) else stage
    stage.check()
    if workers is not None and workers < 1:
        raise BadInput(f"workers={workers}; expected 1 or more")
    place = _device(device)
    out = Path(out).expanduser()
    recipe: dict[str, Any] = {
        "format": FORMAT,
        "agentforge": __version__,
        "model": model.fingerprint,
        "stage": stage.to_json(),
        "embeddings": embeddings,
        "seed": seed,
    }
    if stage.needs_statistics:
        calibration = calibration or Calibration()
        recipe["calibration"] = calibration.to_json()
    with Writer(out, recipe, overwrite) as writer:
        if writer.finished:
            return Artifact(out)
        job = _Job(writer, model, stage, embeddings, seed, workers or os.cpu_count() or 1, place, progress)
        job.run(calibration, statistics)
        return writer.finish(model, len(model.entries))


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise BadInput(f"device {name!r}: torch has no such device here; use cpu") from None
    return device


def store(
    model: LanguageModel,
    stage: stages.Stage,
    packed: Mapping[str, Packed],
    writer: Writer,
    *,
    kept: Mapping[str, torch.Tensor] | None = None,
    progress: bool = True,
) -> Artifact:
    """Write an artifact from planes that were made elsewhere (by training), one Packed for each weight that `stage` encoded.

    writer: of the artifact, open, and not finished yet.  kept: tensors that take the place of the model's own.
    Raises BadInput where a name is not the model's, or planes and weight have other shapes.
    """
    kept = dict(kept or {})
    touched = {weight.name: weight for weight in model.weights(embeddings=True) if weight.name in packed}
    for name in [*packed, *kept]:
        if name not in model.entries or (name in packed and name not in touched):
            raise BadInput(f"{name}: is no tensor of {model.name} that could be stored so")
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
            error = relative_error(touched[name].load(), stage.decode(packed[name]))
            writer.put_encoded(index, touched[name], stage, packed[name], error)
        else:
            writer.put_kept(index, name, kept.get(name, model.tensor(name)), reasons[name])
    return writer.finish(model, len(names))


@dataclass
class _Job:
    """One run of `compress`: what is the same for all its tensors."""

    writer: Writer
    model: LanguageModel
    stage: stages.Stage
    embeddings: bool
    seed: int
    workers: int
    device: torch.device
    progress: bool

    def run(self, calibration: Calibration | None, statistics: Mapping[str, InputStatistics] | None) -> None:
        """Encode or copy every tensor that the writer has not finished yet, in the order of names."""
        model, writer = self.model, self.writer
        model.check()
        touched = {weight.name: weight for weight in model.weights(self.embeddings)}
        reasons = model.kept(self.embeddings)
        if not touched:
            raise BadInput(f"{model.name}: has no weights that a stage may touch")
        names = sorted(model.entries)
        todo = [(i, name) for i, name in enumerate(names) if not writer.has(i)]
        if any(name in touched for _, name in todo) and calibration and self.stage.needs_statistics and statistics is None:
            statistics = collect(model, calibration, self.workers, self.progress)
        statistics = statistics or {}
        shared = self._shared([touched[name] for name in names if name in touched], statistics)

        def finish_tensor(index: int, name: str) -> None:
            if name in touched:
                self._encode(index, touched[name], statistics.get(name), shared)
            else:
                writer.put_kept(index, name, model.tensor(name), reasons[name])

        bar = tqdm(
            total=len(names),
            initial=len(names) - len(todo),
            unit="tensor",
            leave=False,
            desc=f"{self.stage.name}: {model.name}",
            disable=None if self.progress else True,
        )
        with bar:
            _run(finish_tensor, todo, self.workers, bar.update)

    def _shared(self, touched: list[Weight], statistics: Mapping[str, InputStatistics]) -> Packed | None:
        """The planes that the weights share, from an earlier run or fitted now; None for stages that share none."""
        layout = self.stage.shared_layout()
        if layout and not self.writer.has_shared():
            layers = [stages.Layer(w.name, partial(self._load, w), statistics.get(w.name)) for w in touched]
            self.writer.put_shared(self.stage, self.stage.fit_shared(layers, self.seed))
        return self.writer.shared(self.stage) if layout else None

    def _load(self, weight: Weight) -> torch.Tensor:
        return weight.load().to(self.device)

    def _encode(self, index: int, weight: Weight, stats: InputStatistics | None, shared: Packed | None) -> None:
        dense = weight.load()
        packed = self.stage.encode(dense.to(self.device), stats, self.seed, name=weight.name, shared=shared)
        decoded = self.stage.decode(packed)
        if not torch.isfinite(decoded).all():
            raise BadInput(f"{weight.name}: {self.stage} decodes to values that are not finite; leave it out or scale it")
        self.writer.put_encoded(index, weight, self.stage, packed, relative_error(dense, decoded))


def _run(work: Callable[[int, str], None], todo: list[tuple[int, str]], workers: int, done: Callable[[int], object]) -> None:
    """Run `work` on each item with `workers` threads, no more than that many in hand; the first error stops it all."""
    with ThreadPoolExecutor(workers) as pool:
        running: set[Future[None]] = set()
        items = iter(todo)
        try:
            while True:
                while len(running) < workers and (item := next(items, None)) is not None:
                    running.add(pool.submit(work, *item))
                if not running:
                    return
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    future.result()
                    done(1)
        finally:
            for future in running:
                future.cancel()
