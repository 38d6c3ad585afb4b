"""Allocation: a stage and its setting for every weight, for the least damage that a budget of bytes allows.

A candidate's cost is counted by encoding the weight with it.  Its damage is predicted, to second order:

    KL(original || compressed) ~ 1/2 sum over weights of tr(G E H E^T), nats per token,

E the error of the weight, H = E[x x^T] of its inputs, G the curvature of the KL divergence in its outputs (Fisher's
information, of which the diagonal is taken).  Layers are taken to err independently of each other.  The prediction's size
is off if errors are not small; the search only needs to know which weights deserve the bytes, and the result is measured.

The search is Lagrange's: of each weight, the candidates on the lower convex hull of bytes and damage; in the order of damage
avoided per byte, whatever still fits the budget.  No allocation is better by more than the damage that one step on one hull
avoids (Shoham & Gersho 1988).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from . import evaluation, stages
from .artifact import Artifact, Encoded
from .blockwise import Spill
from .cache import use
from .errors import BadInput
from .evaluation import Divergence, Text
from .execution import Task, encode_tensor, price_tensor, results
from .folders import check_out, remove, replace
from .models import SAMPLED_TOKENS, LanguageModel, Weight, cache_dir, check_workers, device_named
from .opening import load, open_model
from .pipeline import compress
from .progress import progress_bar
from .sequential import encode_in_order
from .stages.base import InputStatistics
from .stages.base import damage as damage
from .statistics import FOR_FIT, Calibration, Collected, collect

if TYPE_CHECKING:
    from .training.recover import Settings

# Steps from 0.027 to 0.85 root mean squares, half an octave apart: from about 6.3 bits per weight to 1.2.
LADDER = tuple(stages.get("tcq", step=round(0.3 * 2 ** (k / 2), 6)) for k in range(-7, 4))
KEEP = "keep"  # in place of a stage: as it is
FINER = 4  # parts into which a step of the ladder is cut: half an octave is one, which costs 2% of the KL
PASSES = 6  # artifacts that are made at most on the way to a limit


class Candidate(NamedTuple):
    """A stage for a weight.  bytes: of its planes on disk.  damage: predicted, nats per token.  counted: whether planes were
    made to count their bytes, which are estimated otherwise."""

    stage: stages.Stage
    bytes: int
    damage: float
    counted: bool = True


@dataclass(frozen=True)
class Budget:
    """The limit to meet: exactly one of these.

    bytes: of all weight files, tensors that are kept and headers included.  bits: per weight, of the planes of all weights
    that get a setting.  max_kl: KL(original || compressed), nats per token, with two standard errors on top.
    """

    bytes: int | None = None
    bits: float | None = None
    max_kl: float | None = None

    def check(self) -> None:
        """Raise BadInput unless exactly one limit is set, and is positive, and not more than 32 bits per weight."""
        limits = [limit for limit in (self.bytes, self.bits, self.max_kl) if limit is not None]
        if len(limits) != 1 or not 0 < limits[0] < math.inf or (self.bits or 0) > 32:
            raise BadInput(
                f"budget {limits}; expected one positive limit: bytes, bits per weight (32 at most), or KL in nats per token"
            )


def budget_bytes(size: str | None, target: str | None, parameters: int) -> int | None:
    """Bytes from text such as "60MB" or "61440", or from a ratio such as "4x" against 16 bits for each of `parameters`.

    Raises BadInput for text of neither form, or if both are given.
    """
    if size is not None and target is not None:
        raise BadInput("a budget in bytes and a ratio were asked for; expected one of the two")
    number = r"([0-9]+\.?[0-9]*|\.[0-9]+)"
    if target is not None:
        ratio = re.fullmatch(rf"{number}x?", target)
        if not ratio or not 0 < float(ratio[1]) < math.inf:
            raise BadInput(f"target {target!r}; expected a ratio such as 4x")
        return int(2 * parameters / float(ratio[1]))
    if size is None:
        return None
    parts = re.fullmatch(rf"{number}\s*([kMG]?)B?", size)
    value = float(parts[1]) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}[parts[2]] if parts else 0.0
    if not 1 <= value < 1e15:
        raise BadInput(f"bytes {size!r}; expected a size such as 60MB, 1.5GB or 61440000")
    return int(value)


class Fit(NamedTuple):
    """artifact: meets the budget.  predicted: damage of the weights that got a setting, nats per token.  measured: as loaded
    back from disk.  bits: per weight, of their planes on disk.  counted: which they are, in words.  outside: the weights
    without statistics, because what they are multiplied with does not go through their layer: they are kept, and the bits do
    not count them."""

    artifact: Artifact
    predicted: float
    measured: Divergence
    bits: float
    counted: str
    outside: tuple[str, ...] = ()


def candidates(
    model: LanguageModel,
    statistics: Mapping[str, InputStatistics],
    calibration: Calibration,
    ladder: Sequence[stages.Stage] = LADDER,
    *,
    workers: int | None = None,
    device: str = "cpu",
    progress: bool = True,
    executor: Executor | None = None,
) -> dict[str, list[Candidate]]:
    """Bytes and damage of each stage of `ladder` on each weight that has statistics, sensitivity included, by its name.

    The result is kept in the cache folder, under a hash of all its inputs, one line per weight: a second budget,
    or a run after a kill, does not encode again.  device: "cuda" searches on a GPU in the stages that can.
    executor: works in place of threads, as for `compress`.  Raises BadInput if a stage cannot encode a weight, or shares
    planes.
    """
    check_workers(workers)
    for stage in ladder:
        stage.check()
        if stage.shared_layout():
            raise BadInput(f"{stage}: shares planes between weights, which takes one stage for all of them")
    device_named(device)
    journal = _journal(model, calibration, ladder)
    found: dict[str, list[tuple[int, float, bool]]] = _read_lines(journal)
    priced = statistics.sensitivities if isinstance(statistics, Collected) else statistics  # without reading every H
    weights = [weight for weight in model.weights(embeddings=True) if weight.name in priced]
    todo = [weight for weight in weights if len(found.get(weight.name, [])) != len(ladder)]
    journal.parent.mkdir(parents=True, exist_ok=True)
    use(journal.parent)
    bar = progress_bar("candidates" if progress else None, len(weights), "weight", len(weights) - len(todo))
    tasks = (partial(price_tensor, _task(model, w, ladder[0], statistics[w.name], device), ladder) for w in todo)
    with bar as shown, open(journal, "a", encoding="utf-8") as lines:
        for weight, rows in zip(todo, results(tasks, executor, workers), strict=True):
            found[weight.name] = rows
            lines.write(json.dumps({weight.name: rows}) + "\n")
            lines.flush()
            shown.update()
    return {w.name: [Candidate(s, *row) for s, row in zip(ladder, found[w.name], strict=True)] for w in weights}


def finer(ladder: Sequence[Candidate]) -> list[Candidate]:
    """The candidates of a ladder, and those between them: on the way from one stage to the next, bytes fall in proportion to
    the logarithm of the damage.  Those that an allocation takes are counted before they are kept."""
    found = list(ladder[:1])
    for one, other in pairwise(ladder):
        for share in (part / FINER for part in range(1, FINER)):
            stage = one.stage.between(other.stage, share)
            if stage is not None and one.damage > 0 < other.damage:
                size = round(one.bytes + share * (other.bytes - one.bytes))
                found.append(Candidate(stage, size, one.damage ** (1 - share) * other.damage**share, False))
        found.append(other)
    return found


def _task(model: LanguageModel, weight: Weight, stage: stages.Stage, stats: InputStatistics, device: str) -> Task:
    return Task(weight.name, model.reader(weight.name), weight.transposed, stage, stats, device=device)


def _journal(model: LanguageModel, calibration: Calibration, ladder: Sequence[stages.Stage]) -> Path:
    """The file of a model's candidates; its name is a hash of all their inputs, our own source included."""
    here = Path(__file__).parent
    others = ("statistics", "blockwise", "planes", "entropy", "cells", "trellis", "execution", "allocation")
    sources = [*sorted((here / "stages").glob("*.py")), *(here / f"{name}.py" for name in others)]
    depends = {
        "model": model.fingerprint,
        "calibration": calibration.to_json(),
        "ladder": [stage.to_json() for stage in ladder],
        "source": hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest(),
    }
    key = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:16]
    return cache_dir() / "candidates" / f"{key}.jsonl"


def _read_lines(journal: Path) -> dict[str, Any]:
    """All lines of a journal, one JSON object each, as one."""
    found: dict[str, Any] = {}
    for line in journal.read_text(encoding="utf-8").splitlines() if journal.is_file() else []:
        with suppress(ValueError):  # the end of a line that a kill cut off
            found.update(json.loads(line))
    return found


def allocate(
    options: Mapping[str, Sequence[Candidate]], budget: int, alike: Mapping[str, str] | None = None
) -> dict[str, Candidate]:
    """One candidate for each weight, of at most `budget` bytes together.

    alike: by weight; those of the same value have the same ladder, and get the same place in it.

    Raises BadInput if the smallest candidates do not fit.
    """
    groups: dict[str, list[str]] = {}
    for name in options:
        groups.setdefault((alike or {}).get(name, name), []).append(name)
    sums = {
        key: [
            Candidate(of[0].stage, sum(one.bytes for one in of), sum(one.damage for one in of))
            for of in zip(*(options[name] for name in names), strict=True)
        ]
        for key, names in groups.items()
    }
    hulls = {key: _hull(found) for key, found in sums.items()}
    chosen = dict.fromkeys(hulls, 0)
    spent = sum(hull[0].bytes for hull in hulls.values())
    if spent > budget:
        raise BadInput(f"budget of {budget:,} bytes; the smallest candidates of {len(options)} weights take {spent:,}")
    steps = [(_slope(*pair), name, i) for name, hull in hulls.items() for i, pair in enumerate(pairwise(hull), start=1)]
    for _, name, i in sorted(steps):  # along a hull the slopes rise, so that its steps come in their order
        cost = hulls[name][i].bytes - hulls[name][chosen[name]].bytes
        if chosen[name] == i - 1 and spent + cost <= budget:
            chosen[name], spent = i, spent + cost
    places = {key: sums[key].index(hulls[key][i]) for key, i in chosen.items()}
    return {name: options[name][places[key]] for key, names in groups.items() for name in names}


def _hull(options: Sequence[Candidate]) -> list[Candidate]:
    """The candidates on the lower convex hull of (bytes, damage), from the smallest to the least damaging."""
    hull: list[Candidate] = []
    for one in sorted(options, key=lambda c: (c.bytes, c.damage)):
        if hull and one.damage >= hull[-1].damage:
            continue
        while len(hull) > 1 and _slope(hull[-2], one) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(one)
    return hull


def _slope(a: Candidate, b: Candidate) -> float:
    return (b.damage - a.damage) / (b.bytes - a.bytes)


def smallest_and_largest(options: Mapping[str, Sequence[Candidate]]) -> tuple[int, int]:
    """Bytes of the smallest candidates of all weights together, and of the largest."""
    sizes = [[candidate.bytes for candidate in found] for found in options.values()]
    return sum(map(min, sizes)), sum(map(max, sizes))


def fit(
    model: LanguageModel | str | Path,
    out: str | Path,
    budget: Budget,
    *,
    ladder: Sequence[stages.Stage] = LADDER,
    embeddings: stages.Stage | str | None = None,
    calibration: Calibration | None = None,
    statistics: Collected | None = None,
    recovery: Settings | None = None,
    sequential: bool = False,
    text: str | Text | None = None,
    tokens: int = SAMPLED_TOKENS,
    workers: int | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    progress: bool = True,
    executor: Executor | None = None,
) -> Fit:
    """The artifact of least predicted damage in `budget`, measured as it is loaded back from `out`.

    ladder: the stages to choose from, for each linear layer, the token embedding and an output head of its own.  embeddings:
    "keep" for the last two as they are, or one stage for them; the budget of bits is that of the linear layers then.
    calibration: the text for statistics (default: `statistics.FOR_FIT`).
    statistics: what `statistics.collect` gave for this model and calibration, sensitivities included, if already available;
    those of `ends` are needed for embedding and head.  recovery: how to train gains and norms of linear layers afterwards,
    with a ladder of tcq, by distillation on selftext, within the same budget of bits, embedding and head as they are;
    without it nothing is trained.  sequential: encode linear layers in the model's order, each to make up for what was lost
    before it (`sequential`), which takes about as long again.  text, tokens: what the divergence is measured on; max_kl is
    checked against it.  device: for statistics, training, measuring, and the search of stages that can use it; sums are
    rounded differently on a GPU, so the recipe names it.  executor: works in place of threads, as for `compress`; the result
    is the same.

    Raises BadInput if the budget cannot be met, and as `compress` does.
    """
    budget.check()
    if device_named(device).type != "cpu" and sequential:
        raise BadInput(f"device {device}: encoding in the model's order runs on the CPU; expected one of the two")
    model = open_model(model) if isinstance(model, str | Path) else model
    model.check()
    if model.is_classifier:
        raise BadInput(f"{model.name}: is a classifier; fit measures KL divergence on text, so choose a language model")
    if recovery is not None:
        from .training.recover import check_trainable

        check_trainable(model)
    evaluation.check_causal(model)
    out = check_out(out, model.path, replace=True)
    check_free(out, overwrite or budget.bits is not None)
    found_text = evaluation.find_text(text)
    if recovery is not None and (budget.bits is None or embeddings not in (None, KEEP)):
        raise BadInput("recovery trains linear layers within a budget of bits; expected bits, and embeddings as they are")
    everything = embeddings is None and recovery is None
    embeddings = None if embeddings == KEEP else embeddings
    stage_of_rest = stages.parse(embeddings) if isinstance(embeddings, str) else embeddings
    calibration = dataclasses.replace((calibration or FOR_FIT).for_model(model), device=device)
    for stage in ladder:
        calibration = calibration.for_stage(stage)
    statistics = statistics or collect(model, calibration, workers, progress, ends=everything)
    how: dict[str, Any] = {"workers": workers, "executor": executor}
    options = candidates(model, statistics, calibration, ladder, device=device, progress=progress, **how)
    options = {name: finer(found) for name, found in options.items()}
    rest = {w.name: stage_of_rest for w in model.weights(True) if stage_of_rest and w.name not in options}
    settings = {"calibration": calibration, "statistics": statistics, **how}
    journal = _journal(model, calibration, ladder).with_suffix(".counted.jsonl")
    counted = _read_lines(journal)
    what = model, options, rest, found_text, tokens, device, progress
    search = Search(*what, settings, journal, counted, Spill(), {}, sequential=sequential)
    if budget.bytes is not None:
        return search.finished(*search.within_bytes(budget.bytes, out, overwrite))
    if budget.bits is None:
        return search.finished(*search.within_kl(budget.max_kl or 0.0, out, overwrite))
    planes = int(budget.bits * search.parameters / 8)
    if recovery is None:
        return search.finished(*search.make(planes, out, overwrite))
    return search.finished(*search.recovered(planes, recovery, out, overwrite))


class Search(NamedTuple):
    """What the artifacts of one fit are made of and measured on.  rest: a stage for each weight beside `options`.  settings:
    the same for every `compress`.  encoded: by weight and stage, what has been encoded already and waits on the disk.
    counted: bytes by weight and place in `options`, as the journal has them.  alike: as for `allocate`.  sequential: as for
    `fit`."""

    model: LanguageModel
    options: Mapping[str, list[Candidate]]
    rest: Mapping[str, stages.Stage]
    text: Text
    tokens: int
    device: str
    progress: bool
    settings: dict[str, Any]
    journal: Path
    counted: dict[str, int]
    spill: Spill
    encoded: dict[tuple[str, stages.Stage], Callable[[], Encoded]]
    alike: Mapping[str, str] | None = None
    sequential: bool = False

    @property
    def weights(self) -> list[Weight]:
        """Those that have options."""
        return [weight for weight in self.model.weights(embeddings=True) if weight.name in self.options]

    @property
    def ends(self) -> bool:
        """Whether embedding and head have options."""
        return len(self.weights) > sum(weight.name in self.options for weight in self.model.weights())

    @property
    def parameters(self) -> int:
        """How many there are in the weights that have options."""
        return sum(weight.shape[0] * weight.shape[1] for weight in self.weights)

    def make(self, plane_bytes: int, folder: Path, overwrite: bool) -> tuple[Artifact, float]:
        """The artifact of at most so many bytes of planes, and its predicted damage."""
        about = self.settings | {"embeddings": self.ends or bool(self.rest), "overwrite": overwrite}
        if self.sequential:
            about["ready_by"] = "sequential"
        # For their new targets codes take a little more, up to .0003 of all bytes; a second pass would cost more than that.
        aim = plane_bytes - plane_bytes // 1000 if self.sequential else plane_bytes
        while True:
            chosen = self.chosen(aim)
            plan = {name: one.stage for name, one in chosen.items()} | dict(self.rest)
            ready = {
                name: self.encoded[name, one.stage] for name, one in chosen.items() if (name, one.stage) in self.encoded
            }
            over = self._in_order(chosen, plan, ready) - plane_bytes if self.sequential else 0
            if over <= 0:
                break
            aim -= 2 * over
        artifact = compress(self.model, plan, folder, device=self.device, progress=self.progress, ready=ready, **about)
        return artifact, sum(one.damage for one in chosen.values())

    def _in_order(
        self, chosen: Mapping[str, Candidate], plan: Mapping[str, stages.Stage], ready: dict[str, Callable[[], Encoded]]
    ) -> int:
        """Encode the linear layers one after the other, into `ready`.  Gives the bytes of all that was chosen."""
        sizes = {name: one.bytes for name, one in chosen.items()}
        known, calibration = self.settings["statistics"], self.settings["calibration"]

        def keep(name: str, found: Encoded) -> None:
            sizes[name], ready[name] = sum(plane.nbytes for plane in found.planes), self._put(found)

        def decoded(weight: Weight) -> torch.Tensor:
            stage = plan[weight.name]
            return stage.decode(stage.encode(weight.load().to(torch.float32), known.get(weight.name), name=weight.name))

        inner = {weight.name for weight in self.model.weights()}
        linear = {name: plan[name] for name in chosen if name in inner}
        ends = {w.name: partial(decoded, w) for w in self.model.weights(True) if w.name in plan and w.name not in inner}
        encode_in_order(self.model, linear, ends, known, calibration, keep, self.progress)
        return sum(sizes.values())

    def chosen(self, plane_bytes: int) -> dict[str, Candidate]:
        """The allocation for so many bytes, counted ones: what was estimated is encoded, until nothing else is chosen."""
        while True:
            found = allocate(self.options, plane_bytes, self.alike)
            todo = [weight for weight in self.weights if not found[weight.name].counted]
            if not todo:
                return found
            keys = {w.name: f"{w.name} {self.options[w.name].index(found[w.name])}" for w in todo}
            # What an earlier run counted saves the work, and nothing else: the way to the result stays the same.
            new = [weight for weight in todo if keys[weight.name] not in self.counted]
            known = self.settings["statistics"]
            tasks = (
                partial(encode_tensor, _task(self.model, w, found[w.name].stage, known[w.name], self.device)) for w in new
            )
            how = self.settings["executor"], self.settings["workers"]
            title = "encoding" if self.progress else None
            with progress_bar(title, len(new), "weight") as bar, open(self.journal, "a", encoding="utf-8") as lines:
                for weight, encoded in zip(new, results(tasks, *how), strict=True):
                    assert isinstance(encoded, Encoded)
                    self.encoded[weight.name, encoded.stage] = self._put(encoded)
                    self.counted[keys[weight.name]] = sum(plane.nbytes for plane in encoded.planes)
                    lines.write(json.dumps({keys[weight.name]: self.counted[keys[weight.name]]}) + "\n")
                    lines.flush()
                    bar.update()
            for name, key in keys.items():
                # What one estimate was off by, those of its neighbours are, too; else each round would take another one that
                # only looks cheaper.
                one, options, size = found[name], self.options[name], self.counted[key]
                for place, other in enumerate(options):
                    if other is one:
                        options[place] = one._replace(bytes=size, counted=True)
                    elif not other.counted:
                        options[place] = other._replace(bytes=round(other.bytes * size / one.bytes))

    def _put(self, encoded: Encoded) -> Callable[[], Encoded]:
        waiting = [self.spill.put(torch.from_numpy(np.require(plane, requirements="W"))) for plane in encoded.planes]
        empty = encoded._replace(planes=())
        return lambda: empty._replace(planes=tuple(plane().numpy() for plane in waiting))

    def planes(self, artifact: Artifact) -> int:
        """Bytes of the planes of the weights that have options."""
        return sum(row["bytes"] for row in artifact.rows if row["name"] in self.options)

    def measure(self, opened: LanguageModel) -> Divergence:
        """What was made beside its original, as it is loaded back from disk."""
        both = opened.on(self.device), self.model.on(self.device)
        context = self.model.sampled_context
        return evaluation.divergence(*both, self.text, context, tokens=self.tokens, progress=self.progress)

    def finished(self, artifact: Artifact, predicted: float, measured: Divergence | None = None) -> Fit:
        """The result; measured: if it is already."""
        bits = 8 * self.planes(artifact) / self.parameters
        counted = "the linear layers, the embedding and the output head" if self.ends else "the linear layers"
        outside = tuple(weight.name for weight in self.model.weights() if weight.name not in self.options)
        return Fit(artifact, predicted, measured or self.measure(load(artifact.path)), bits, counted, outside)

    def recovered(self, planes: int, recovery: Settings, out: Path, overwrite: bool) -> tuple[Artifact, float]:
        """The artifact of at most `planes` bytes of codes and gains, trained.  Its start lies beside it until then."""
        from .training.recover import recover

        gains = 2 * sum(weight.shape[0] for weight in self.weights)
        start, predicted = self.make(planes - gains, out.with_name(out.name + ".start"), True)
        about: dict[str, Any] = {"device": self.device, "overwrite": overwrite, "progress": self.progress}
        done = recover(self.model, out, None, recovery, start=start, most_bytes=planes, **about)
        remove(start.path)
        return done.artifact, predicted

    def within_bytes(self, most: int, out: Path, overwrite: bool) -> tuple[Artifact, float]:
        """The artifact whose weight files have at most `most` bytes.

        The size of kept tensors and headers is known exactly only from an artifact: the second one is right.
        """
        encoded = {*self.options, *self.rest}
        kept = [entry for name, entry in self.model.entries.items() if name not in encoded]
        beside = sum(math.prod(e.shape) * (2 if len(e.shape) > 1 else e.dtype.itemsize) for e in kept)
        with folder_beside(out) as folder:
            for _ in range(PASSES):
                artifact, predicted = self.make(most - beside, folder / "trial", True)
                if artifact.weight_bytes <= most:
                    take(artifact.path, out, overwrite)
                    return Artifact(out), predicted
                beside = artifact.weight_bytes - self.planes(artifact) + 64  # digits of offsets in headers
        raise BadInput(f"budget of {most:,} bytes could not be met; allow a little more")

    def within_kl(self, most: float, out: Path, overwrite: bool) -> tuple[Artifact, float, Divergence]:
        """The smallest artifact found whose divergence, its whole 95% interval, is at most `most`.

        The first one's predicted damage is a quarter of that: of SmolLM2, from 3.1 to 1.6 bits per weight, what is measured
        on WikiText-2 is 3.0 to 3.2 times the prediction (twice on the calibration text itself: errors of one block pass
        through all others; and another text is 1.6 times as sensitive), and the limit is for the whole interval.  The
        prediction's error then gives the size of the next one, which has to lie between those that failed and those that
        passed, until 95% of the limit is used.
        """
        low, high = smallest_and_largest(self.options)
        largest = high
        at, ratio = _bytes_for(self.options, most / 4), 1.0
        passed: tuple[float, Divergence] | None = None
        with folder_beside(out) as folder:
            trial, best = folder / "trial", folder / "best"
            for _ in range(PASSES):
                artifact, predicted = self.make(at, trial, True)
                measured = self.measure(load(artifact.path))
                bound = measured.kl.bounds[1]
                if bound <= most:
                    high, passed = at, (predicted, measured)
                    shutil.rmtree(best, ignore_errors=True)
                    trial.rename(best)
                else:
                    low = at
                if low == largest or 0.95 * most < bound <= most or (passed and high - low < high / 200):
                    break
                ratio = bound / predicted if math.isfinite(bound) and predicted > 0 else 2 * ratio
                wanted = _bytes_for(self.options, 0.98 * most / ratio)
                at = min(max(wanted, low + (high - low) // 8), high - (high - low) // 8)
                if passed is None and at > high - (high - low) // 4:
                    at = high
            if passed is None:
                raise BadInput(
                    f"KL of {most:g}: {bound:.3g} was the least that the candidates gave; allow more, or a finer ladder"
                )
            take(best, out, overwrite)
        return Artifact(out), *passed


def _bytes_for(options: Mapping[str, Sequence[Candidate]], damage: float) -> int:
    """About the smallest budget of which the predicted damage is at most `damage`."""
    low, high = smallest_and_largest(options)
    while high - low > high // 1000 + 1:
        middle = (low + high) // 2
        if sum(one.damage for one in allocate(options, middle).values()) <= damage:
            high = middle
        else:
            low = middle
    return high


@contextmanager
def folder_beside(out: Path) -> Iterator[Path]:
    """A new folder next to `out`, on the same file system, which is gone afterwards."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as folder:
        yield Path(folder)


def check_free(out: Path, overwrite: bool) -> None:
    """Raise BadInput if there is anything in the folder `out`, unless that may go."""
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise BadInput(f"{out}: is in the way; choose another --out or pass --overwrite")


def take(made: Path, out: Path, overwrite: bool) -> None:
    """Rename a folder that was made to `out`."""
    check_free(out, overwrite)
    replace(made, out)
