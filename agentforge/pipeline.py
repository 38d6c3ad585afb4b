"""Compress a model: every weight that may be touched goes through a stage, everything else is copied."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

import torch
from tqdm.auto import tqdm

from . import __version__, stages
from .artifact import FORMAT, Artifact, Writer, relative_error
from .errors import AgentForgeError, BadInput
from .models import LanguageModel, Weight, open_model


def compress(
    model: LanguageModel | str | Path,
    stage: stages.Stage | str,
    out: str | Path,
    *,
    embeddings: bool = False,
    seed: int = 0,
    workers: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Artifact:
    """Encode the model's weights with `stage` and write the artifact `out`.

    model: an opened model, or what `open_model` takes.  stage: a stage, or text such as "rounding:bits=4,group=64".
    embeddings: encode the token embedding (and an output head of its own), too.  workers: threads, each with one tensor
    in hand (default: one a core); the bytes do not depend on it.  overwrite: replace an artifact of another recipe.

    Run again after a kill, the same call goes on from the tensors that are finished and gives the same bytes; for an
    artifact that is complete it only returns it.  Raises BadInput where model, stage or `out` cannot be used.
    """
    model = open_model(model) if isinstance(model, str | Path) else model
    stage = stages.parse(stage) if isinstance(stage, str) else stage
    stage.check()
    if workers is not None and workers < 1:
        raise BadInput(f"workers={workers}; expected 1 or more")
    out = Path(out).expanduser()
    recipe = {
        "format": FORMAT,
        "agentforge": __version__,
        "model": model.fingerprint,
        "stage": stage.to_json(),
        "embeddings": embeddings,
        "seed": seed,
    }
    try:
        with Writer(out, recipe, overwrite) as writer:
            if writer.finished:
                return Artifact(out)
            _write_tensors(writer, model, stage, embeddings, seed, workers or os.cpu_count() or 1, progress)
            return writer.finish(model, len(model.entries))
    except OSError as error:
        raise AgentForgeError(
            f"{out}: could not be written ({error.strerror}); make room, then the same command goes on from what is finished"
        ) from None


def _write_tensors(
    writer: Writer, model: LanguageModel, stage: stages.Stage, embeddings: bool, seed: int, workers: int, progress: bool
) -> None:
    """Encode or copy every tensor that the writer has not finished yet, in the order of names."""
    model.check()
    touched = {weight.name: weight for weight in model.weights(embeddings)}
    reasons = model.kept(embeddings)
    if not touched:
        raise BadInput(f"{model.name}: has no weights that a stage may touch")

    def finish_tensor(index: int, name: str) -> None:
        if name in touched:
            _encode(writer, index, touched[name], stage, seed)
        else:
            writer.put_kept(index, name, model.tensor(name), reasons[name])

    todo = [(i, name) for i, name in enumerate(sorted(model.entries)) if not writer.has(i)]
    bar = tqdm(
        total=len(model.entries),
        initial=len(model.entries) - len(todo),
        unit="tensor",
        leave=False,
        desc=f"{stage.name}: {model.name}",
        disable=None if progress else True,
    )
    with bar:
        _run(finish_tensor, todo, workers, bar.update)


def _encode(writer: Writer, index: int, weight: Weight, stage: stages.Stage, seed: int) -> None:
    dense = weight.load()
    packed = stage.encode(dense, seed=seed, name=weight.name)
    decoded = stage.decode(packed)
    if not torch.isfinite(decoded).all():
        raise BadInput(f"{weight.name}: {stage} decodes to values that are not finite; leave it out or scale it")
    writer.put_encoded(index, weight, stage, packed, relative_error(dense, decoded))


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
