"""Probes of the stages: SeedLM, VPTQ and hypercompression, one by one.

Each is checked against something that shares no code with it: worked values of the papers, brute force, numpy or
scikit-learn, or a decoder written from the papers' text.  Probes that need a model use the workshop's; those that need only
weights use the first rows of sampled matrices.
"""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file

from agentforge import evaluation, stages
from agentforge.audit.probes import Count, Positive, StageText, probe, ratio, share
from agentforge.audit.workshop import Workshop
from agentforge.bits import stored_bytes
from agentforge.digits import data as digits_data
from agentforge.evaluation import Measurement, intervals
from agentforge.opening import load, open_model
from agentforge.planes import Packed, Plane
from agentforge.stages import Stage, curves, seedlm_search
from agentforge.statistics import Calibration, InputStatistics, collect
from agentforge.tensorfiles import write_tensors

from ..phase4_bitnet.ternary import kept_in_16_bits

Data = Literal["smooth", "weights"]
ROWS = 64  # of a sampled matrix that slow probes look at
# SeedLM's Table 6, as printed, for the registers that are built here a second time: taps of K = 2, 3, 4, ...
TABLE_6 = "01 01 01 02 01 01 0234 04 03 02 0128 0125 012C 01 013C 03 07 0125 03 02 01 05 0127"
PRINTED_TAPS = {K: tuple(int(j, 16) for j in taps) for K, taps in enumerate(TABLE_6.split(), start=2)}
# VPTQ's Table 10: outliers' share, v, k, residual, groups, bits.  Outliers always have v = 4, k = 4096.
TABLE_10 = (
    (0.0, 4, 256, 0, 1, 2.01),
    (0.0, 6, 4096, 0, 1, 2.02),
    (0.0, 8, 65536, 0, 1, 2.19),
    (0.0, 12, 4096, 4096, 1, 2.04),
    (0.01, 6, 4096, 0, 1, 2.03),
    (0.02, 6, 4096, 0, 1, 2.04),
    (0.05, 6, 4096, 0, 1, 2.07),
    (0.01, 12, 4096, 4096, 1, 2.06),
    (0.01, 12, 4096, 4096, 2, 2.09),
    (0.01, 12, 4096, 4096, 4, 2.17),
    (0.01, 12, 4096, 4096, 8, 2.30),
    (0.0, 4, 4096, 0, 1, 3.01),
    (0.0, 6, 4096, 4096, 1, 4.02),
)
LLAMA_2_13B = ((5120, 5120),) * 4 + ((13824, 5120),) * 2 + ((5120, 13824),)


def _parts(workshop: Workshop, rows: int = ROWS, matrices: int | None = None) -> list[torch.Tensor]:
    """The first rows of the sampled matrices, float32[rows, in]."""
    return [weight.load()[:rows].float().contiguous() for weight in workshop.sample()[:matrices]]


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    """Independent unit Gaussians, the same for the same seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _smooth() -> torch.Tensor:
    """Smooth curves with no noise: up to one period of a sine in each row of 64."""
    t = (torch.arange(64) + 0.5) / 64
    turns, phases = torch.linspace(0.2, 1.0, 16), torch.linspace(0.0, 3.0, 16)
    return torch.sin(2 * math.pi * turns[:, None] * t + phases[:, None])


def _data(workshop: Workshop, data: Data, rows: int = ROWS, matrices: int | None = None) -> list[torch.Tensor]:
    return [_smooth()] if data == "smooth" else _parts(workshop, rows, matrices)


def _through_disk(workshop: Workshop, stage: Stage, packed: Packed) -> Packed:
    """What a reader who knows only the stage and the shape gets from a file of the planes."""
    path = workshop.folder / "planes.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, {plane.name: plane.stored() for plane in packed})
    stored = load_file(path)
    layout = stage.layout(packed.shape).items()
    return Packed(packed.shape, tuple(Plane.from_stored(name, *about, stored[name]) for name, about in layout))


def _squared_error(stage: Stage, weight: torch.Tensor, stats: InputStatistics | None = None) -> float:
    """sum (w - decoded)^2; with statistics tr((W - Q) H (W - Q)^T), which is what a layer's output loses."""
    gap = weight.double() - stage.decode(stage.encode(weight, stats)).double()
    return float(((gap if stats is None else gap @ stats.hessian.double()) * gap).sum())


# ---- SeedLM


def _register(K: int, seed: int, count: int) -> list[int]:
    """The states after `seed`, bit by bit as section 3.1 has it: the tapped bits' sum comes in at the top."""
    states, bits = [], [seed >> i & 1 for i in range(K)]
    for _ in range(count):
        bits = [*bits[1:], sum(bits[j] for j in PRINTED_TAPS[K]) % 2]
        states.append(sum(bit << i for i, bit in enumerate(bits)))
    return states


def _blocks_by_hand(packed: Packed, K: int, C: int, P: int) -> np.ndarray:
    """What the planes stand for, U(s) q 2^e in double precision, before the tensor's power of two: [blocks, C]."""
    seeds = packed["seeds"].numpy().astype(np.int64)
    signed = [((packed[name].numpy().astype(np.int64) ^ 8) - 8) for name in ("exponents", "coefficients")]
    V = {seed: np.array(_register(K, seed, C * P)).reshape(C, P) for seed in np.unique(seeds).tolist()}
    half = 2 ** (K - 1)
    sums = np.stack([(V[seed] - half) @ q for seed, q in zip(seeds.tolist(), signed[1], strict=True)])
    return np.asarray(sums * (2.0 ** signed[0][:, None] / (half - 1)))


@probe("share of worked values")
def lfsr_conformance(workshop: Workshop) -> Measurement:
    """Share of the paper's worked values that the register gives: Figure 3, a 16-bit sequence, and for each K the states of
    a second register with the printed taps, and a full period.

    The period alone would not do: other taps have full periods, too.
    """
    figure = seedlm_search.lfsr(3, 4, 7).tolist() == [2, 5, 6, 7, 3, 1, 4]
    matrix = (seedlm_search.basis(3, 4, 2, 4) * 3 + 4).tolist() == [[2, 5], [6, 7], [3, 1], [4, 2]]
    sequence = [32768, 16384, 8192, 4096, 34816, 17408, 8704, 4352, 34944, 17472, 8736, 4368]
    right = [figure, matrix, seedlm_search.lfsr(16, 1, 12).tolist() == sequence]
    for K in range(2, 25 if workshop.effort.name == "full" else 21):
        # The register's step is one to one, so it runs through a cycle: of full length if it is back at 1 only at its end.
        states = seedlm_search.lfsr(K, 1, (1 << K) - 1)
        right.append(bool(states.min() > 0) and np.flatnonzero(states == 1).tolist() == [(1 << K) - 2])
        right.append(states[: 4 * K].tolist() == _register(K, 1, len(states[: 4 * K])))
    return share(workshop, right, "worked values", "Figure 3, its matrix, K = 16 from 1, taps and periods of Table 6")


@probe("share of entries")
def bases_from_seeds(workshop: Workshop) -> Measurement:
    """Share of basis entries, over seeds spread through all of them, that a second register gives exactly."""
    same = total = 0
    for K, C, P in ((8, 8, 3), (12, 7, 3), (16, 8, 3), (16, 12, 4)):
        for seed in np.linspace(1, (1 << K) - 1, 20 * workshop.effort.seeds).astype(int).tolist():
            half = 2 ** (K - 1)
            U = (np.array(_register(K, seed, C * P), np.float64).reshape(C, P) - half) / (half - 1)
            same += int((seedlm_search.basis(K, C, P, seed) == U).sum())
            total += C * P
    return workshop.exact(same / total, "share of entries", total, "U(s) by two registers")


@probe("share of weights")
def decoded_by_seed(workshop: Workshop) -> Measurement:
    """Share of weights that a second register and integer sums give to the last bit, from planes read back from a file."""
    stage, same, total = stages.get("seedlm", K=8, C=8, P=3), 0, 0
    for weight in _parts(workshop, 16):
        packed = _through_disk(workshop, stage, stage.encode(weight))
        values = _blocks_by_hand(packed, 8, 8, 3).astype(np.float32).reshape(-1)[: weight.numel()]
        by_hand = torch.from_numpy(np.ldexp(values, 128 - int(packed["exponent"]))).reshape(weight.shape)
        same += int((by_hand == stage.decode(packed)).sum())
        total += weight.numel()
    return workshop.exact(same / total, "share of weights", total, "decoded twice", stage=str(stage), rows=16)


@probe("share of blocks")
def block_independence(workshop: Workshop) -> Measurement:
    """Share of blocks that keep their code if every second block of the weight is another."""
    right: list[bool] = []
    for C, P in ((8, 3), (12, 4)):
        stage = stages.get("seedlm", K=8, C=C, P=P)
        one, other = (0.75 * gaussian(128, C, seed=seed) for seed in (0, 1))  # of one power of two, however they are mixed
        mixed = torch.where(torch.arange(128)[:, None] % 2 == 0, one, other)
        names = ("seeds", "exponents", "coefficients")
        a, b, found = ([stage.encode(w)[name] for name in names] for w in (one, other, mixed))
        for i in range(128):
            right.append(all(torch.equal(x[i], y[i]) for x, y in zip(b if i % 2 else a, found, strict=True)))
    return share(workshop, right, "blocks", "blocks whose code does not depend on the others", K=8)


@probe("relative excess")
def seed_search_excess(workshop: Workshop, K: Count, C: Count, P: Count) -> Measurement:
    """Largest relative excess of a block's squared error over Algorithm 1 by brute force: every seed, its pseudo-inverse,
    its rounded fit."""
    count = 16 * workshop.effort.seeds
    flat = [part.reshape(-1) for part in _parts(workshop, 2)]
    each = math.ceil(count / len(flat))
    blocks = torch.cat([part[: part.numel() // C * C].reshape(-1, C)[:each] for part in flat])[:count]
    stage = stages.get("seedlm", K=K, C=C, P=P)
    packed = stage.encode(blocks)
    ours = _blocks_by_hand(packed, K, C, P)
    states = np.array([1, *_register(K, 1, (1 << K) - 1 + C * P)])
    U = states[np.arange((1 << K) - 1)[:, None] + 1 + np.arange(C * P)].reshape(-1, C, P)
    U = (U - 2 ** (K - 1)) / (2 ** (K - 1) - 1)
    inverse = np.linalg.pinv(U, rcond=1e-9)
    worst = -math.inf
    for w, mine in zip(np.ldexp(blocks.double().numpy(), int(packed["exponent"]) - 128), ours, strict=True):
        t = inverse @ w
        largest = np.abs(t).max(1, keepdims=True)
        e = np.clip(np.floor(np.log2(np.maximum(largest, 1e-30))) - 2, -8, 7)
        t = np.clip(np.rint(t / 2**e), -8, 7) * 2**e
        least = float(((w - (U @ t[:, :, None])[:, :, 0]) ** 2).sum(1).min())
        worst = max(worst, float(((w - mine) ** 2).sum()) / max(least, 1e-30) - 1)
    return workshop.exact(worst, "relative excess", len(blocks), "largest error over brute force", K=K, C=C, P=P)


# ---- VPTQ


@probe("x")
def kmeans_excess(workshop: Workshop, k: Count) -> Measurement:
    """Squared distances to the nearest centroid over those of scikit-learn's k-means, the best of four starts."""
    from sklearn.cluster import KMeans

    plain = {"propagate": False, "weighted": False, "permute": False, "refine": 0}
    stage, pairs, count = stages.get("vptq", v=4, k=k, **plain), list[tuple[float, ...]](), 0
    for weight in _parts(workshop):
        weight = weight[: len(weight) // 4 * 4, :128].contiguous()
        vectors = weight.T.reshape(-1, 4).numpy()
        theirs = KMeans(k, n_init=4, random_state=0).fit(vectors.astype(np.float64)).inertia_
        pairs.append((_squared_error(stage, weight), float(theirs)))
        count += len(vectors)
    return _over(workshop, pairs, count, "inertia over scikit-learn's", stage=str(stage), starts=4)


def _over(workshop: Workshop, pairs: list[tuple[float, ...]], n: int, metric: str, **protocol: Any) -> Measurement:
    """The first over the second, summed over matrices, each a pair of n weights in all."""
    top, bottom = torch.tensor(pairs, dtype=torch.float64).T
    found = intervals.ratio(top, bottom, n, f"{len(pairs)} matrices")
    inputs = {"model": workshop.model.fingerprint}
    return Measurement(unit="x", protocol={"metric": metric, **protocol}, inputs=inputs, **found)


@probe("bits/weight")
def table_10_bits(workshop: Workshop) -> Measurement:
    """Largest deviation of the bits that are stored from those that the paper prints, order and scales aside."""
    weights, worst = sum(rows * columns for rows, columns in LLAMA_2_13B), 0.0
    for outliers, v, k, residual, groups, printed in TABLE_10:
        stage = stages.get("vptq", v=v, k=k, residual=residual, outliers=outliers, groups=groups)
        layouts = [stage.layout(shape).items() for shape in LLAMA_2_13B]
        planes = [about for layout in layouts for name, about in layout if name not in ("class", "exponent")]
        bits = 8 * sum(stored_bytes(coding, math.prod(shape)) for coding, shape in planes) / weights
        worst = max(worst, abs(bits - printed))
    return workshop.exact(worst, "bits/weight", len(TABLE_10), "bits against Table 10", shapes="Llama-2-13B")


@probe("share of vectors")
def nearest_centroids(workshop: Workshop) -> Measurement:
    """Share of vectors that decode to the nearest centroid of the codebook in the file, by brute force."""
    stage = stages.get("vptq", v=4, k=64, propagate=False, weighted=False, refine=0)
    right = total = 0
    for weight in _parts(workshop, 32):
        packed = _through_disk(workshop, stage, stage.encode(weight))
        scale = 2.0 ** (int(packed["exponent"]) - 128)
        padded = (torch.nn.functional.pad(w.double(), (0, 0, 0, -len(w) % 4)) for w in (weight, stage.decode(packed)))
        vectors, decoded = (w.T.reshape(-1, 4) * scale for w in padded)
        least = torch.cdist(vectors, packed["codebook"].double().reshape(-1, 4)).amin(1)
        right += int(((vectors - decoded).norm(dim=1) <= least * (1 + 1e-6) + 1e-9).sum())
        total += len(vectors)
    return workshop.exact(right / total, "share of vectors", total, "nearest centroid", stage=str(stage), rows=32)


@probe("share of weights")
def decoded_by_hand(workshop: Workshop, stage: StageText) -> Measurement:
    """Share of weights that VPTQ's definition gives, part by part and chunk by chunk from the planes of a file, to 1e-6 of
    the weights' size."""
    parsed, same, total = stages.parse(stage), 0, 0
    for weight in _parts(workshop, 32):
        packed = _through_disk(workshop, parsed, parsed.encode(weight))
        planes = {plane.name: plane.values.double().numpy() for plane in packed}
        levels = [name for name in ("", "residual_") if f"{name}indices" in planes]
        parts, chunks, columns = planes["indices"].shape
        width = planes["codebook"].shape[-1]
        by_hand = np.zeros((chunks * parts * width, columns))
        for chunk in range(chunks):
            for part in range(parts):
                first = (chunk * parts + part) * width
                for name in levels:
                    indices = planes[f"{name}indices"][part, chunk].astype(int)
                    by_hand[first : first + width] += planes[f"{name}codebook"][0, part][indices].T
        by_hand = by_hand * planes.get("scale", np.ones(columns)) + planes.get("mean", np.zeros(columns))
        by_hand = np.ldexp(by_hand[: len(weight)], 128 - int(packed["exponent"]))
        size = float(weight.double().square().mean().sqrt())
        same += int((np.abs(by_hand - parsed.decode(packed).double().numpy()) <= 1e-6 * size).sum())
        total += weight.numel()
    return workshop.exact(same / total, "share of weights", total, "decoded twice", stage=stage, rows=32)


@probe("x")
def error_ratio(workshop: Workshop, stage: StageText, reference: StageText) -> Measurement:
    """Squared error of one stage over that of another, all sampled matrices together."""
    parts, pair = _parts(workshop), (stages.parse(stage), stages.parse(reference))
    errors = [tuple(_squared_error(one, weight) for one in pair) for weight in parts]
    count = sum(part.numel() for part in parts)
    return _over(workshop, errors, count, "ratio of squared errors", stage=stage, reference=reference, rows=ROWS)


@probe("x")
def output_error_ratio(workshop: Workshop, stage: StageText, reference: StageText, tokens: Count = 512) -> Measurement:
    """Error of the layers' outputs, tr((W - Q) H (W - Q)^T), of one stage over that of another."""
    pair, lost, count = (stages.parse(stage), stages.parse(reference)), list[tuple[float, ...]](), 0
    seen = _moments(workshop, tokens)
    for weight, part in zip(workshop.sample(), _parts(workshop), strict=True):
        count += part.numel()
        lost.append(tuple(_squared_error(one, part, seen[weight.name]) for one in pair))
    protocol = {"stage": stage, "reference": reference, "tokens": tokens, "rows": ROWS}
    return _over(workshop, lost, count, "ratio of squared output errors", **protocol)


def _moments(workshop: Workshop, tokens: int) -> dict[str, InputStatistics]:
    """Second moments of the sampled layers' inputs, kept in a file: one pass over the text per workshop."""
    path = workshop.folder / f"moments-{workshop.model.fingerprint[:16]}-{workshop.effort.name}-{tokens}.pt"
    if not path.is_file():
        most = min(tokens, workshop.model.context or tokens)
        seen = collect(workshop.model, Calibration(tokens=tokens, context=most), progress=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({w.name: (seen[w.name].hessian, seen[w.name].n) for w in workshop.sample()}, path)
    return {name: InputStatistics(*about) for name, about in torch.load(path).items()}


# ---- hypercompression


def _segments(values: np.ndarray, length: int) -> list[np.ndarray]:
    """The flat weight in segments, the last one shorter if it does not come out even."""
    return [values[first : first + length] for first in range(0, len(values), length)]


@probe("of the weights")
def curve_fit(workshop: Workshop, data: Data, degree: Count = 7) -> Measurement:
    """Root mean square distance between what curves decode to and numpy's least-squares polynomials, over the data's."""
    length, away, power, count = (64 if data == "smooth" else 26), 0.0, 0.0, 0
    for weight in _data(workshop, data):
        flat = weight.double().numpy().reshape(-1)
        fits = []
        for part in _segments(flat, length):
            x = np.linspace(-1, 1, len(part))
            fits.append(np.polynomial.Legendre.fit(x, part, min(degree, len(part) - 1), domain=[-1, 1])(x))
        for kind in ("bezier", "polynomial"):
            stage = stages.get("curves", kind=kind, degree=degree, segment=length)
            decoded = stage.decode(stage.encode(weight)).double().numpy().reshape(-1)
            away += float(((decoded - np.concatenate(fits)) ** 2).sum())
            power += float((flat**2).sum())
            count += len(flat)
    value, protocol = math.sqrt(away / power), {"data": data, "segment": length}
    return workshop.exact(value, "of the weights", count, "distance from numpy's fit", **protocol)


@probe("R^2")
def explained_variance(
    workshop: Workshop, stage: StageText, data: Data, rows: Count = ROWS, matrices: Count | None = None
) -> Measurement:
    """R^2 of what a stage decodes to, 1 - sum (w - v)^2 / sum (w - mean)^2, all matrices together."""
    parsed, lost, power, count = stages.parse(stage), 0.0, 0.0, 0
    for weight in _data(workshop, data, rows, matrices):
        lost += _squared_error(parsed, weight)
        power += float((weight.double() - weight.double().mean()).square().sum())
        count += weight.numel()
    return workshop.exact(1 - lost / power, "R^2", count, "explained variance", stage=stage, data=data, rows=rows)


@probe("of the weights")
def curves_by_hand(workshop: Workshop) -> Measurement:
    """Largest distance of decoded weights from de Casteljau's algorithm on the control points in a file, over the weights'
    root mean square."""
    stage, worst, count = stages.get("curves", degree=7, segment=26), 0.0, 0
    for weight in _parts(workshop, 16):
        packed = _through_disk(workshop, stage, stage.encode(weight))
        found = []
        points = np.ldexp(packed["points"].double().numpy(), 128 - int(packed["exponent"]))
        for control, part in zip(points, _segments(weight.numpy().reshape(-1), 26), strict=True):
            t, p = np.linspace(0, 1, len(part))[:, None], control[None, : min(8, len(part))]
            while p.shape[1] > 1:
                p = (1 - t) * p[:, :-1] + t * p[:, 1:]
            found.append(np.broadcast_to(p[:, 0], len(part)))
        away = np.abs(stage.decode(packed).double().numpy().reshape(-1) - np.concatenate(found)).max()
        worst = max(worst, float(away) / float(weight.double().square().mean().sqrt()))
        count += weight.numel()
    return workshop.exact(worst, "of the weights", count, "distance from de Casteljau", stage=str(stage), rows=16)


@probe("x")
def chosen_curves(workshop: Workshop, bits: Positive = 2.0) -> Measurement:
    """Squared error of the curves that are chosen for a budget over the least of 60 random settings within it."""
    worst, draw, parts = 0.0, random.Random(0), _parts(workshop, 16)
    for weight in parts:
        tried: list[float] = []
        while len(tried) < 60:
            kind, degree, sort = draw.choice(("bezier", "polynomial")), draw.randrange(16), draw.choice(("none", "segment"))
            stage = curves.Curves(kind, degree, draw.randrange(degree + 1, 1025), sort=sort)  # type: ignore[arg-type]
            layout = stage.layout((weight.shape[0], weight.shape[1])).values()
            if sum(8 * stored_bytes(coding, math.prod(shape)) for coding, shape in layout) <= bits * weight.numel():
                tried.append(_squared_error(stage, weight))
        worst = max(worst, _squared_error(curves.choose(weight, bits), weight) / min(tried))
    return workshop.exact(worst, "x", 60 * len(parts), "error of the chosen over the best drawn", bits=bits, rows=16)


def _trajectory_entries(U: int, side: float, centroid: np.ndarray) -> np.ndarray:
    """The codebook by the formula, float64[U + 1, 2]: the centroid, then point(theta) for theta = 0 .. U - 1."""
    N, theta = math.isqrt(U - 1) + 1, np.arange(U)
    points = np.stack([theta * side / N**2, theta % N * side / N], 1) + centroid - side / 2
    return np.concatenate([centroid[None], points])


@probe("of the side l")
def trajectory_points(workshop: Workshop) -> Measurement:
    """Largest distance, in units of l, between what each index decodes to and the point that the formula gives."""
    worst, count, centroid = 0.0, 0, torch.tensor([0.01, -0.02])
    for U in (225, 361, 1600):
        stage = stages.get("trajectory", U=U, M=0, l=0.1, select=False)
        indices = Plane("indices", torch.arange(U + 1), stage.layout((1, 2 * U + 2))["indices"][0])
        packed = Packed((1, 2 * U + 2), (indices, Plane("centroid", centroid, "float32")))
        decoded = stage.decode(_through_disk(workshop, stage, packed)).double().numpy().reshape(-1, 2)
        away = np.abs(decoded - _trajectory_entries(U, 0.1, centroid.double().numpy()))
        worst, count = max(worst, float(away.max()) / 0.1), count + U + 1
    return workshop.exact(worst, "of the side l", count, "decoded points against the formula", U=[225, 361, 1600])


@probe("relative excess")
def trajectory_excess(workshop: Workshop, U: Count = 225) -> Measurement:
    """Squared error over that of the nearest entry by brute force, minus 1; the square holds all pairs of weights."""
    ours = least = 0.0
    count = 0
    for weight in _parts(workshop, 16):
        pairs = weight[:, : weight.shape[1] // 2 * 2].reshape(-1, 2)
        mean = pairs.double().mean(0)
        side = float(2.01 * (pairs.double() - mean).abs().max())
        stage = stages.get("trajectory", U=U, M=0, l=side, select=False)
        packed = _through_disk(workshop, stage, stage.encode(pairs))
        entries = _trajectory_entries(U, side, packed["centroid"].double().numpy()).astype(np.float32)
        ours += float((pairs.double() - stage.decode(packed).double()).square().sum())
        least += float(torch.cdist(pairs.double(), torch.from_numpy(entries).double()).amin(1).square().sum())
        count += len(pairs)
    return workshop.exact(ours / least - 1, "relative excess", count, "error over brute force", U=U, rows=16)


@probe("x")
def entropy_gain(workshop: Workshop, stage: StageText) -> Measurement:
    """Bytes of all planes over their bytes when they are entropy-coded."""
    parsed, before, after = stages.parse(stage), 0, 0
    for weight in _parts(workshop):
        packed = parsed.encode(weight)
        before += sum(plane.stored().nbytes for plane in packed)
        after += packed.coded_bytes
    return workshop.exact(before / after, "x", after, "bytes uncoded over coded", stage=stage, rows=ROWS)


@probe("share of planes")
def entropy_lossless(workshop: Workshop, stage: StageText) -> Measurement:
    """Share of planes whose values come back, one by one, from their entropy code."""
    parsed, right = stages.parse(stage), []
    for weight in _parts(workshop):
        for plane in parsed.encode(weight):
            shape, coded = tuple(plane.values.shape), plane.coded()
            back = Plane.from_stored(plane.name, coded.coding, shape, coded.stored())
            right.append(back.values.shape == plane.values.shape and bool((back.values == plane.values).all()))
    return share(workshop, right, "planes", "planes from their codes", stage=stage, rows=ROWS)


# ---- whole models


@probe("share of matrices")
def round_trips(workshop: Workshop, stage: StageText) -> Measurement:
    """Share of matrices that decode from a file as from memory, bit for bit, and encode to the same planes twice."""
    parsed, right = stages.parse(stage), []
    for weight in _parts(workshop):
        packed = parsed.encode(weight)
        back = _through_disk(workshop, parsed, packed)
        same = back.sha256 == packed.sha256 == parsed.encode(weight).sha256
        right.append(same and torch.equal(parsed.decode(back), parsed.decode(packed)))
    return share(workshop, right, "matrices", "encoded, stored, read back", stage=stage, rows=ROWS)


@probe("bits/weight")
def sample_bits(workshop: Workshop, stage: StageText, rows: Count) -> Measurement:
    """Bits a weight of all planes as they are stored, the first rows of sampled matrices together."""
    parsed, parts = stages.parse(stage), _parts(workshop, rows)
    bytes_ = sum(plane.stored().nbytes for weight in parts for plane in parsed.encode(weight))
    count = sum(weight.numel() for weight in parts)
    return workshop.exact(8 * bytes_ / count, "bits/weight", count, "bits of stored planes", stage=stage, rows=rows)


def whole_model(workshop: Workshop) -> Workshop:
    """The workshop for whole models: digits-mlp's in smoke effort, in which there is no time for a language model."""
    if workshop.effort.name != "smoke":
        return workshop
    return dataclasses.replace(workshop, model=open_model("digits-mlp"))


@probe("share", one_pass=True)
def retention(workshop: Workshop, stage: StageText, of: Literal["accuracy", "perplexity"]) -> Measurement:
    """Accuracy over the original's, or the original's perplexity over this one's, of the same tokens or pictures."""
    whole = whole_model(workshop)
    if not whole.model.is_classifier:
        found = whole.divergence(stage)
        measured = found.retention if of == "accuracy" else found.perplexity_retention
    else:
        candidate = load(whole.artifact(stage).path)
        measured = evaluation.accuracy_retention(candidate, whole.model)
        if of == "perplexity":
            _, _, pixels, labels = digits_data()
            modules = [model.model for model in (whole.model, candidate)]  # built outside of inference mode
            with torch.inference_mode():
                logits = [module(pixels).double() for module in modules]
            base, losses = (torch.nn.functional.cross_entropy(one, labels, reduction="none") for one in logits)
            protocol = {**measured.protocol, "metric": "original exp(loss) / exp(loss)"}
            found_loss = intervals.mean(base - losses, error="pairs", log=True)
            measured = dataclasses.replace(measured, protocol=protocol, **found_loss)
    return dataclasses.replace(measured, protocol={**measured.protocol, "model": whole.model.name, "stage": stage})


@probe("x")
def stage_ratio(
    workshop: Workshop, stage: StageText, of: Literal["whole model", "touched tensors"], bits: Literal[16, 32]
) -> Measurement:
    """Bytes on disk of the whole model, or of the touched tensors, against `bits` per parameter."""
    return ratio(whole_model(workshop), stage, of, bits)


@probe("share of parameters")
def kept_share(workshop: Workshop, stage: StageText) -> Measurement:
    """Share of the parameters that no stage touches which are stored with 16 bits or more."""
    return kept_in_16_bits(whole_model(workshop), stage)
