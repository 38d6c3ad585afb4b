"""VPTQ (arXiv 2409.17066): vectors of weights become indices into codebooks, chosen column by column.

A vector is `v` consecutive output rows inside one input column (the rows are filled up with zeros to a multiple of v).
Quantising W to Q costs tr((W - Q) H (W - Q)^T), with H = E[x x^T] of the layer's inputs (Equation 1); H is damped by a
share of its mean diagonal, and an input that never fires gets H_ii = 1 and a column of zeros.

1. Codebooks by k-means, every vector weighted by its column's H_ii (section 3.2).
2. Columns in order of falling H_ii.  The Hessian is permuted first and factored after.  Each column takes the nearest
   centroids (in one column the second-order cost is plain Euclidean distance, section 3.1), and passes its error on to
   the columns that follow.
3. A second codebook for what is left (section 3.3), by k-means on the errors of the first pass; then a second pass from
   the original weights, nearest in the first and then in the second codebook.
4. Outliers (section 3.3): the columns of largest H_ii have a codebook with shorter vectors.  Groups: runs of the other
   columns have codebooks of their own.  Parts (product quantisation): so have the parts of a vector.
5. norm="std": columns are quantised less their mean and divided by their standard deviation s.  The Hessian there is
   S H S; here the cost stays in the units of the weights, and a column's target is divided by s where the nearest
   centroid is looked up, which is the same.
6. `refine` rounds, each of which can only lower the cost: the centroids (and s) of least cost for given indices, and for
   each column in turn the nearest centroids for given other columns.  The cost is E |W x - Q x|^2, so the first half
   *is* the paper's layer-wise fine-tuning of centroids and norm weights against the layer's output, solved by conjugate
   gradients instead of 100 steps of Adam.

The errors are passed on without inverting H.  With H = M D M^T, M upper triangular with ones on its diagonal, the cost
is sum_n D_n |w_n + sum_(m<n) e_m M_mn - q_n|^2 where e_m = w_m - q_m, so column n has the target w_n + sum_(m<n) e_m M_mn:
the same as the published update with the Cholesky factor of the inverse (section 3.1; Chee et al. 2023, Theorem 6).

shared=True (ours): all layers use the same codebooks, which then cost next to nothing.  In a small model one codebook
per layer would cost more than its indices.

Deviations from the authors' code: the order of columns is not stored, only which group or outliers a column belongs to,
and groups may differ by one column in size if the columns do not divide; norm divides by the standard deviation, as
the code did until commit b7304b8; codebooks are half floats, and indices are chosen for those.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch

from ..errors import BadArtifact, BadInput
from ..planes import Packed, Plane, power_of_two_exponent, times_power_of_two
from .base import InputStatistics, Layer, Layout, Stage, register
from .codebook import in_blocks
from .gpu_search import CPU
from .kmeans import kmeans
from .propagation import add_product, gather, product, scatter, sweep_block, unit_factor

PRESETS = {2: (6, 4096, 0), 3: (4, 4096, 0), 4: (6, 4096, 4096)}  # bits: v, k, residual (Tables 8 and 10)
BLOCK = 128  # columns between which errors are passed on one by one
SAMPLE = 256  # most vectors per centroid that k-means sees
ITERATIONS = 30  # of k-means
STEPS = 8  # of conjugate gradients
ENOUGH = 1e-3  # the least share by which a round of refinement lowers the cost
HALF_MAX = 65504.0

Books = list[list[np.ndarray]]  # of a segment: [main, residual?] of [parts] of float32[k, v / parts]
LEVELS = ("", "residual_")  # what the names of a codebook's planes begin with


class Segment(NamedTuple):
    """Columns that share codebooks.  first, last: their places in the order of processing.  sizes: centroids of each
    codebook, main and residual.  plane: what the names of its planes begin with; group: its place in these planes."""

    first: int
    last: int
    v: int
    parts: int
    sizes: tuple[int, ...]
    plane: str
    group: int


@dataclass(frozen=True)
class Problem:
    """A layer to be encoded: its columns in the order of processing, times 2**exponent.

    weight: float32[in, padded rows], transposed, less the columns' means, filled up with rows of zeros.  rows: the true
    number of rows.  hessian: float32[in, in], damped.  scale: float32[in], what centroids are multiplied by.  mean:
    float32[in].  order: int64[in], the original place of each column.
    """

    weight: np.ndarray
    rows: int
    hessian: np.ndarray
    scale: np.ndarray
    mean: np.ndarray
    order: np.ndarray
    exponent: int

    @property
    def inverse(self) -> np.ndarray:
        """1 / scale, and 0 if that is 0: float32[in]."""
        inverse = np.zeros_like(self.scale)
        np.divide(1, self.scale, out=inverse, where=self.scale > 0)
        return inverse


@dataclass(frozen=True)
class Codes:
    """What was chosen.  indices: of each segment and codebook int32[columns, parts, chunks].  error: W - Q, float32[in,
    padded rows].  target: what each column should have come close to, given the errors that were passed on to it."""

    indices: list[list[np.ndarray]]
    error: np.ndarray
    target: np.ndarray

    def left(self, problem: Problem) -> np.ndarray:
        """What is left of the targets for a second codebook: float32[in, padded rows]."""
        return np.asarray(self.target - (problem.weight - self.error))


@register
@dataclass(frozen=True)
class Vptq(Stage):
    """Vector quantisation with second-order error propagation.

    bits: 2, 3 or 4 for the paper's v, k and residual at these bits; 0 if v and k are given.  v: weights per vector.
    k: centroids of the main codebook.  residual: centroids of the second codebook, 0 for none.  parts: into how many
    parts with codebooks of their own a vector falls.  outliers: share of columns with the codebook (outlier_v,
    outlier_k).  groups: of the other columns.  norm: "none" or "std".  permute: process columns by falling H_ii.
    propagate: pass errors on.  weighted: weigh vectors by H_ii in k-means.  refine: most rounds of refinement.  shared:
    one set of codebooks for all layers.  damping: added to H_ii, as a share of their mean.
    """

    name: ClassVar[str] = "vptq"
    trains = "floats"
    uses_gpu: ClassVar[bool] = True
    bits: int = 0
    v: int = 0
    k: int = 0
    residual: int = 0
    parts: int = 1
    outliers: float = 0.0
    outlier_v: int = 4
    outlier_k: int = 4096
    groups: int = 1
    norm: Literal["none", "std"] = "none"
    permute: bool = True
    propagate: bool = True
    weighted: bool = True
    refine: int = 4
    shared: bool = False
    damping: float = 0.01

    def _check(self) -> None:
        if self.bits and (self.v or self.k or self.residual):
            raise BadInput(f"vptq: bits={self.bits} stands for v, k and residual; give either")
        if self.bits not in (0, *PRESETS):
            raise BadInput(f"vptq: bits={self.bits}; expected {', '.join(map(str, PRESETS))}, or 0 with v and k")
        v, k, residual = self._sizes
        for what, value, low, high in (
            ("v", v, 1, 64),
            ("k", k, 2, 65536),
            ("residual", residual or 2, 2, 65536),
            ("parts", self.parts, 1, v),
            ("outlier_v", self.outlier_v, 1, 64),
            ("outlier_k", self.outlier_k, 2, 65536),
            ("groups", self.groups, 1, 64),
            ("refine", self.refine, 0, 1000),
        ):
            if not low <= value <= high:  # v, k and residual may be those that bits stand for
                raise BadInput(f"vptq: {what}={value}; expected {low} to {high}")
        if v % self.parts:
            raise BadInput(f"vptq: parts={self.parts} does not divide v={v}")
        self._expect(0 <= self.outliers <= 0.5, "outliers", "a share from 0 to 0.5")
        self._expect(1e-6 <= self.damping <= 10, "damping", "1e-6 to 10")

    @property
    def needs_statistics(self) -> bool:
        """Everything but plain k-means on all columns alike."""
        return bool(self.propagate or self.weighted or self.refine or self.outliers or (self.permute and self.groups > 1))

    @property
    def _sizes(self) -> tuple[int, int, int]:
        """v, k and residual."""
        if self.bits or not (self.v or self.k or self.residual):
            return PRESETS[self.bits or 2]
        return self.v, self.k, self.residual

    def segments(self, shape: tuple[int, int]) -> list[Segment]:
        """The outliers, then the groups, of a weight [out, in].  A codebook has no more centroids than the power of two
        that is enough for every vector to have its own, unless layers share it."""
        rows, columns = shape
        v, k, residual = self._sizes
        outliers = min(math.ceil(self.outliers * columns), columns - 1)
        groups = min(self.groups, columns - outliers)
        ends = [outliers + (columns - outliers) * g // groups for g in range(groups + 1)]

        def sizes(count: int, v: int, *wanted: int) -> tuple[int, ...]:
            enough = max(2, 1 << (count * math.ceil(rows / v) - 1).bit_length())
            return tuple(k if self.shared else min(k, enough) for k in wanted if k)

        widest = max(b - a for a, b in pairwise(ends))
        main = sizes(widest, v, k, residual)
        found = [Segment(a, b, v, self.parts, main, "", g) for g, (a, b) in enumerate(pairwise(ends))]
        if outliers:
            of_outliers = sizes(outliers, self.outlier_v, self.outlier_k)
            found.insert(0, Segment(0, outliers, self.outlier_v, 1, of_outliers, "outlier_", 0))
        return found

    def layout(self, shape: tuple[int, int]) -> Layout:
        """Coding and shape of each plane."""
        planes: Layout = {}
        segments = self.segments(shape)
        for plane, level, members in _stored(segments):
            head = segments[members[0]]
            columns = sum(segments[i].last - segments[i].first for i in members)
            width = (head.sizes[level] - 1).bit_length()
            planes[f"{plane}indices"] = (f"uint{width}", (head.parts, math.ceil(shape[0] / head.v), columns))
        if not self.shared:
            planes.update(_books_layout(segments))
        if self._has_classes(segments):
            planes["class"] = (f"uint{(len(segments) - 1).bit_length()}", (shape[1],))
        if self.norm == "std":
            planes["scale"] = planes["mean"] = ("float16", (shape[1],))
        elif self.shared:
            planes["scale"] = ("float16", (1,))
        planes["exponent"] = ("uint8", (1,))
        return planes

    def shared_layout(self) -> Layout:
        """Coding and shape of the codebooks that all layers share."""
        return _books_layout(self.segments((1, 4096))) if self.shared else {}

    def _has_classes(self, segments: list[Segment]) -> bool:
        """Whether it has to be stored which columns are in which segment."""
        return len(segments) > 1 and (self.permute or bool(segments[0].plane))

    def row_blocks(self, shape: tuple[int, int]) -> tuple[int, dict[str, int]]:
        """A vector's rows, unless outliers have vectors of another length or the parts of a vector lie apart."""
        segments = self.segments(shape)
        if self.parts > 1 or segments[0].plane:
            return 0, {}
        return segments[0].v, {f"{name}indices": shape[1] for name in LEVELS[: len(segments[0].sizes)]}

    def _encode(self, weight: torch.Tensor, stats: InputStatistics | None, seed: int) -> Packed:
        shape, device = (weight.shape[0], weight.shape[1]), weight.device
        problem, segments = self._prepare(weight, stats), self.segments(shape)
        factor = unit_factor(problem.hessian)[0]
        books: Books = [[] for _ in segments]
        left = problem.weight
        for level in range(len(segments[-1].sizes)):
            for s, book in zip(segments, books, strict=True):
                if level < len(s.sizes):
                    book.append(self._train([_vectors(problem, s, left)], s, level, seed, device))
            codes = _sweep(problem, segments, books, factor)
            left = codes.left(problem)
        return self._pack(shape, segments, *self._refine(problem, segments, books, codes))

    def _encode_shared(self, weight: torch.Tensor, stats: InputStatistics | None, seed: int, shared: Packed) -> Packed:
        shape = (weight.shape[0], weight.shape[1])
        problem, segments = self._prepare(weight, stats), self.segments(shape)
        books = [_books(shared, s) for s in segments]
        codes = _sweep(problem, segments, books, unit_factor(problem.hessian)[0])
        return self._pack(shape, segments, *self._refine(problem, segments, books, codes))

    def fit_shared(self, layers: Sequence[Layer], seed: int = 0) -> Packed:
        """The codebooks: k-means on as many vectors of each layer, the residual's on their errors in a first pass."""
        segments, device = self.segments((1, 4096)), layers[0].load().device
        books: Books = [[] for _ in segments]

        def sample(layer: Layer, level: int) -> dict[tuple[str, int], tuple[np.ndarray, np.ndarray]]:
            problem = self._prepare(layer.load().contiguous(), layer.stats)
            mine = self.segments((problem.rows, len(problem.weight)))
            source = problem.weight
            if level:
                factor = unit_factor(problem.hessian)[0]
                source = _sweep(problem, mine, books[len(books) - len(mine) :], factor).left(problem)
            most = [max(1, SAMPLE * s.sizes[0] // len(layers)) for s in mine]
            return {
                (s.plane, s.group): _thinned(*_vectors(problem, s, source), n, seed) for s, n in zip(mine, most, strict=True)
            }

        for level in range(len(segments[-1].sizes)):
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                found = list(pool.map(partial(sample, level=level), layers))
            for s, book in zip(segments, books, strict=True):
                sets = [vectors[s.plane, s.group] for vectors in found if (s.plane, s.group) in vectors]
                if not sets:  # of outliers or groups that no layer is wide enough to have
                    sets = [(np.zeros((s.parts, 1, s.v // s.parts), np.float32), np.ones(1))]
                if level < len(s.sizes):
                    book.append(self._train(sets, s, level, seed, device))
        return Packed((1, 1), tuple(Plane(n, torch.from_numpy(v), "float16") for n, v in _stacked(segments, books).items()))

    def _prepare(self, weight: torch.Tensor, stats: InputStatistics | None) -> Problem:
        """The layer in the order of processing, with its damped Hessian in units of its mean diagonal."""
        weight = weight.to("cpu", torch.float32)
        exponent = power_of_two_exponent(weight)
        columns = np.ascontiguousarray(times_power_of_two(weight, exponent).numpy().T)
        n, rows = columns.shape
        hessian = np.eye(n) if stats is None else stats.hessian.numpy().astype(np.float64)
        live = np.diag(hessian) > 0
        hessian /= np.diag(hessian)[live].mean() if live.any() else 1.0
        hessian[~live, ~live] = 1.0
        columns[~live] = 0
        importance = np.diag(hessian).copy()
        hessian += np.eye(n) * (self.damping * importance.mean())
        if not self.propagate:
            hessian = np.diag(np.diag(hessian))
        order = np.argsort(-importance, kind="stable")
        if not self.permute:
            outliers = self.segments((rows, n))[0].last if self.outliers and n > 1 else 0
            order = np.concatenate([np.sort(order[:outliers]), np.sort(order[outliers:])])
        mean, scale = np.zeros(n, np.float32), np.ones(n, np.float32)
        if self.norm == "std":
            mean = _half(columns.mean(1, dtype=np.float64))
            columns -= mean[:, None]
            scale = _half(np.sqrt((columns.astype(np.float64) ** 2).mean(1)))
        elif self.shared:
            scale[:] = _half(np.sqrt((columns.astype(np.float64) ** 2).mean()))
        padded = max(s.v * math.ceil(rows / s.v) for s in self.segments((rows, n)))
        return Problem(
            np.pad(columns[order], ((0, 0), (0, padded - rows))),
            rows,
            np.ascontiguousarray(hessian[np.ix_(order, order)], np.float32),
            scale[order],
            mean[order],
            order,
            exponent,
        )

    def _train(
        self, sets: list[tuple[np.ndarray, np.ndarray]], segment: Segment, level: int, seed: int, device: torch.device = CPU
    ) -> np.ndarray:
        """A codebook by k-means on all these vectors: float32[parts, k, v / parts], of half floats.

        sets: vectors float32[parts, n, v / parts] and their weights, of one layer each.
        """
        k = segment.sizes[level]
        vectors, weights = np.concatenate([v for v, _ in sets], 1), np.concatenate([w for _, w in sets])
        vectors, weights = _thinned(vectors, weights, SAMPLE * k, seed)
        mass = weights if self.weighted else None
        threads = (os.cpu_count() or 1) if self.shared else 1
        found = (
            kmeans(part, k, mass, seed=seed, iterations=ITERATIONS, tolerance=1e-3, threads=threads, device=device)
            for part in vectors
        )
        return _half(np.stack([clusters.centroids for clusters in found]))

    def _refine(self, problem: Problem, segments: list[Segment], books: Books, codes: Codes) -> tuple[Problem, Books, Codes]:
        """Nearest centroids, and least-squares centroids and scales, by turns until the cost stops falling."""
        hessian = problem.hessian
        relaxation = hessian / np.diag(hessian)
        np.fill_diagonal(relaxation, 0)
        cost = _dot(codes.error, product(hessian, codes.error))
        for _ in range(self.refine):
            found = _sweep(problem, segments, books, relaxation, codes)
            places = _places(segments, found, problem.weight.shape)
            new, better = books, problem
            if not self.shared:
                new = _fit_books(problem, segments, books, places, found.error)
                found = replace(found, error=_error(problem, new, places))
            if self.norm == "std":
                better = _fit_scale(problem, new, places, found.error)
                found = replace(found, error=_error(better, new, places))
            last, cost = cost, _dot(found.error, product(hessian, found.error))
            if not cost < last:
                break
            problem, books, codes = better, new, found
            if last - cost < ENOUGH * last:
                break
        return problem, books, codes

    def _pack(self, shape: tuple[int, int], segments: list[Segment], problem: Problem, books: Books, codes: Codes) -> Packed:
        """The planes of `layout`; columns in their original order within a segment."""
        tensors: dict[str, np.ndarray] = {}
        ranks = [np.argsort(problem.order[s.first : s.last]) for s in segments]
        for plane, level, members in _stored(segments):
            columns = np.concatenate([codes.indices[i][level][ranks[i]] for i in members])
            tensors[f"{plane}indices"] = columns.transpose(1, 2, 0)
        if not self.shared:
            tensors |= _stacked(segments, books)
        classes = np.empty(shape[1], np.int32)
        for s in segments:
            classes[problem.order[s.first : s.last]] = _class(s, segments)
        inverse = np.argsort(problem.order)
        scale = problem.scale[inverse] if self.norm == "std" else problem.scale[:1]
        tensors |= {"class": classes, "scale": scale.astype(np.float16), "mean": problem.mean[inverse].astype(np.float16)}
        return self.packed(shape, tensors, problem.exponent)

    def _decode(self, packed: Packed) -> torch.Tensor:
        return self.dense(packed, {**packed.floats, **(packed.shared.floats if packed.shared else {})})

    def dense(self, packed: Packed, floats: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Centroids in place of their indices, then scale and mean of each column; `floats` with shared codebooks."""
        rows = packed.shape[0]
        segments = self.segments(packed.shape)
        found, pieces = self.columns(packed, segments), []
        starts = {s.plane: 0 for s in segments}
        for s, mine in zip(segments, found, strict=True):
            first, last = starts[s.plane], starts[s.plane] + len(mine)
            starts[s.plane] = last
            values: torch.Tensor | None = None
            for name in LEVELS[: len(s.sizes)]:
                book = floats[f"{s.plane}{name}codebook"][s.group]
                indices = packed[f"{s.plane}{name}indices"][:, :, first:last]
                if (last_index := int(indices.max())) >= book.shape[1]:
                    raise BadArtifact(
                        f"plane {s.plane}{name}indices: holds {last_index}; its codebook has {book.shape[1]} centroids"
                    )
                indices = indices.to(book.device, torch.int64)
                parts = torch.stack([book[part][indices[part].T] for part in range(s.parts)], 2)
                values = parts if values is None else values.add_(parts)
            assert values is not None  # [columns, chunks, parts, v / parts]
            pieces.append(values.reshape(len(mine), -1)[:, :rows])
        order = torch.from_numpy(np.argsort(np.concatenate(found), kind="stable")).to(pieces[0].device)
        out = torch.cat(pieces)[order]
        if self.norm == "std" or self.shared:
            out.mul_(floats["scale"].unsqueeze(1))
        if self.norm == "std":
            out.add_(floats["mean"].unsqueeze(1))
        return times_power_of_two(out.T.contiguous(), 128 - int(packed["exponent"]))

    def columns(self, packed: Packed, segments: list[Segment]) -> list[np.ndarray]:
        """The columns of each segment, in rising order."""
        if not self._has_classes(segments):
            return [np.arange(s.first, s.last) for s in segments]
        classes = packed["class"].cpu().numpy()
        found = [np.flatnonzero(classes == _class(s, segments)) for s in segments]
        for s, columns in zip(segments, found, strict=True):
            if len(columns) != s.last - s.first:
                raise BadArtifact(
                    f"plane class: holds {_class(s, segments)} {len(columns)} times; expected {s.last - s.first} times"
                )
        return found


def paper_bits(
    shapes: Sequence[tuple[int, int]],
    v: int,
    k: int,
    residual: int = 0,
    outliers: float = 0.0,
    outlier_v: int = 4,
    outlier_k: int = 4096,
    groups: int = 1,
) -> float:
    """Bits a weight as the paper counts them (Equations 3 to 5), over linear layers of these shapes (out, in): indices
    and codebooks of 16 bits; nothing for norm and order.  Equation 3's log2(k0 / v0) is a misprint for log2(k0) / v0."""
    index = outliers * math.log2(outlier_k) / outlier_v
    index += (1 - outliers) * (math.log2(k) + (math.log2(residual) if residual else 0)) / v
    codebook = 16 * ((outlier_v * outlier_k if outliers else 0) + groups * v * (k + residual))
    return index + codebook * len(shapes) / sum(rows * columns for rows, columns in shapes)


def _stored(segments: list[Segment]) -> list[tuple[str, int, list[int]]]:
    """What is stored together, of the groups, then of the outliers: what the names of its planes begin with, the level of
    its codebooks, and the places of its segments."""
    found = []
    for plane in sorted({segment.plane for segment in segments}):
        members = [i for i, segment in enumerate(segments) if segment.plane == plane]
        found += [(plane + LEVELS[level], level, members) for level in range(len(segments[members[0]].sizes))]
    return found


def _class(segment: Segment, segments: list[Segment]) -> int:
    return len(segments) - 1 if segment.plane else segment.group


def _books_layout(segments: list[Segment]) -> Layout:
    planes: Layout = {}
    for plane, level, members in _stored(segments):
        head = segments[members[0]]
        planes[f"{plane}codebook"] = ("float16", (len(members), head.parts, head.sizes[level], head.v // head.parts))
    return planes


def _stacked(segments: list[Segment], books: Books) -> dict[str, np.ndarray]:
    """The planes of `_books_layout`."""
    stored = _stored(segments)
    return {f"{name}codebook": np.stack([books[i][k] for i in members]).astype(np.float16) for name, k, members in stored}


def _books(packed: Packed, segment: Segment) -> list[np.ndarray]:
    """A segment's codebooks: float32[parts, k, v / parts] each."""
    names = [f"{segment.plane}{name}codebook" for name in LEVELS[: len(segment.sizes)]]
    return [packed[name].numpy()[segment.group].astype(np.float32) for name in names]


def _half(values: np.ndarray) -> np.ndarray:
    """Rounded to half floats, as float32."""
    return np.asarray(np.clip(values, -HALF_MAX, HALF_MAX).astype(np.float16), np.float32)


def _vectors(problem: Problem, segment: Segment, source: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A segment's vectors in units of the scale, float32[parts, n, v / parts], and the weight of each, 1 on average."""
    chunks = math.ceil(problem.rows / segment.v)
    mine = slice(segment.first, segment.last)
    scaled = source[mine, : chunks * segment.v] * problem.inverse[mine, None]
    vectors = scaled.reshape(-1, segment.parts, segment.v // segment.parts).transpose(1, 0, 2)
    mass = np.diag(problem.hessian)[mine] * problem.scale[mine].astype(np.float64) ** 2
    mass = mass / mass.mean() if mass.any() else mass + 1
    return np.ascontiguousarray(vectors), np.repeat(mass, chunks)


def _thinned(vectors: np.ndarray, weights: np.ndarray, most: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """At most so many of the vectors, drawn at random, with weights that make up for the others.

    Half of the chances are alike, half in proportion to what a vector adds to the weighted sum of squares (Bachem, Lucic
    and Krause 2018): models have single weights, twenty times as large as their neighbours, on which everything hangs,
    and a codebook that never saw them destroys the model.
    """
    n = len(weights)
    if n <= most:
        return vectors, weights
    energy = weights * (vectors.astype(np.float64) ** 2).sum((0, 2))
    chance = np.full(n, 1.0 / n)
    if energy.any():
        chance = (chance + energy / energy.sum()) / 2
    chosen, times = np.unique(np.random.default_rng(seed).choice(n, most, p=chance / chance.sum()), return_counts=True)
    return np.ascontiguousarray(vectors[:, chosen]), weights[chosen] * times / (most * chance[chosen])


def _sweep(
    problem: Problem, segments: list[Segment], books: Books, coefficients: np.ndarray, before: Codes | None = None
) -> Codes:
    """Every column in turn takes the centroids nearest to its target, w_n + sum_m coefficients[m, n] * error_m.

    With the factor of the Hessian, and no error yet, this is error propagation; with H_mn / H_nn and the errors of
    `before` it is coordinate descent, which can only lower the cost.
    """
    n, padded = problem.weight.shape
    error = np.zeros((n, padded), np.float32) if before is None else before.error.copy()
    target = problem.weight.copy()
    layer = problem.weight, problem.rows, coefficients, problem.scale, problem.inverse
    indices = []
    for i, (s, book) in enumerate(zip(segments, books, strict=True)):
        width = s.v // s.parts
        sizes = (s.last - s.first, s.parts, math.ceil(problem.rows / s.v))
        found = [np.zeros(sizes, np.int32), np.zeros(sizes, np.int32)]
        keep = before is not None and len(book) > 1
        if before is not None and keep:
            found[1][:] = before.indices[i][1]
        main, residual = _readable(book[0]), _readable(book[1] if len(book) > 1 else np.zeros((0, 1, width), np.float32))
        for first in range(s.first, s.last, BLOCK):
            last = min(first + BLOCK, s.last)
            until = first if before is None else n
            add_product(target[first:last], coefficients[:until, first:last], error[:until])
            mine = slice(first - s.first, last - s.first)
            chosen = found[0][mine], found[1][mine]
            sweep_block(first, last, layer, (main, residual), (0,) * width, keep, chosen, target, error)
        indices.append(found[: len(book)])
    return Codes(indices, error, target)


def _readable(book: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The codebooks of the parts as the kernel reads them: blocks, halves and centroids."""
    parts = [in_blocks(part) for part in book] or [in_blocks(np.zeros((1, book.shape[2]), np.float32))]
    blocks, halves = (np.stack(arrays)[: len(book)] for arrays in zip(*parts, strict=True))
    return blocks, halves, book


def _dot(a: np.ndarray, b: np.ndarray) -> float:
    """In double precision, not by BLAS, whose sums depend on the number of threads."""
    return float((a * b).sum(dtype=np.float64))


def _places(segments: list[Segment], codes: Codes, shape: tuple[int, int]) -> np.ndarray:
    """For every weight, where the number that stands for it lies among all centroids (`_flat`), int32[levels, in, padded
    rows]; if there is no residual codebook, at the end."""
    levels = max(len(s.sizes) for s in segments)
    end = sum(s.v * k for s in segments for k in s.sizes)
    places = np.full((levels, *shape), end, np.int32)
    start = 0
    for s, found in zip(segments, codes.indices, strict=True):
        width = s.v // s.parts
        for level, k in enumerate(s.sizes):
            part = np.arange(s.parts, dtype=np.int32)[:, None] * k
            first = start + (found[level] + part) * width  # [columns, parts, chunks]
            rows = first.transpose(0, 2, 1)[..., None] + np.arange(width, dtype=np.int32)
            places[level, s.first : s.last, : rows[0].size] = rows.reshape(len(rows), -1)
            start += s.v * k
    return places


def _flat(books: Books) -> np.ndarray:
    """All centroids one after the other, and a zero: float64."""
    return np.concatenate([*(level.ravel() for book in books for level in book), [0.0]])


def _error(problem: Problem, books: Books, places: np.ndarray) -> np.ndarray:
    return np.asarray(problem.weight - gather(_flat(books), places, problem.scale, problem.rows))


def _fit_books(problem: Problem, segments: list[Segment], books: Books, places: np.ndarray, error: np.ndarray) -> Books:
    """The centroids of least cost for these indices, rounded to half floats."""
    values = _flat(books)

    def apply(step: np.ndarray) -> np.ndarray:
        return np.asarray(gather(step, places, problem.scale, problem.rows))

    def collect(matrix: np.ndarray) -> np.ndarray:
        sums = np.zeros(len(values))
        scatter(sums, matrix, places, problem.scale, problem.rows)
        sums[-1] = 0  # the place of no centroid stays zero
        return sums

    curvature = (np.diag(problem.hessian) * problem.scale)[:, None]
    values += _least_squares(problem.hessian, error, apply, collect, np.broadcast_to(curvature, error.shape))
    ends = np.cumsum([level.size for book in books for level in book])
    parts = iter(np.split(values, ends))
    return [[_half(next(parts).reshape(level.shape)) for level in book] for book in books]


def _fit_scale(problem: Problem, books: Books, places: np.ndarray, error: np.ndarray) -> Problem:
    """The scales of least cost for these indices and centroids, rounded to half floats."""
    unscaled = gather(_flat(books), places, np.ones_like(problem.scale), problem.rows)

    def apply(step: np.ndarray) -> np.ndarray:
        return np.asarray(step[:, None] * unscaled, np.float32)

    def collect(matrix: np.ndarray) -> np.ndarray:
        return np.asarray((unscaled * matrix).sum(1, dtype=np.float64))

    curvature = np.diag(problem.hessian)[:, None] * unscaled
    step = _least_squares(problem.hessian, error, apply, collect, curvature)
    return replace(problem, scale=np.maximum(_half(problem.scale + step), 0))


def _least_squares(
    hessian: np.ndarray,
    error: np.ndarray,
    apply: Callable[[np.ndarray], np.ndarray],
    collect: Callable[[np.ndarray], np.ndarray],
    curvature: np.ndarray,
) -> np.ndarray:
    """The step x that lowers tr((E - A x) H (E - A x)^T) most, by conjugate gradients, preconditioned by the diagonal.

    apply: A x; collect: its transpose; curvature: what `collect` makes the diagonal of.
    """
    left = collect(product(hessian, error))
    diagonal = collect(np.ascontiguousarray(curvature))
    inverse = np.divide(1, diagonal, out=np.zeros_like(diagonal), where=diagonal > 0)
    step = np.zeros_like(left)
    direction = near = inverse * left
    size = first = _dot(left, near)
    for _ in range(STEPS):
        if not size > 1e-6 * first:
            break
        moved = collect(product(hessian, apply(direction)))
        bend = _dot(direction, moved)
        if not bend > 0:
            break
        step = step + size / bend * direction
        left = left - size / bend * moved
        near = inverse * left
        last, size = size, _dot(left, near)
        direction = near + size / last * direction
    return step
