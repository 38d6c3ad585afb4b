"""The two exhaustive searches, nearest centroid and seed, in torch on a GPU, with the results of the CPU's kernels.

Both go in two steps.  Plain products in double precision score everything; whatever is too close to the best to be told
apart by such scores is then scored again by the CPU's own code.  So the result is that of the CPU, bit for bit, in
whatever order a GPU takes its sums.
"""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit

from .codebook import in_blocks, nearest_kernel
from .seedlm_search import LARGEST_Q, LEAST_Q, Rule, cycle, fit_seed

CPU = torch.device("cpu")  # for every other device there are the searches here
SCORES = 1 << 26  # at a time: 0.5 GB, and a few times that while they are taken
LEAST = 1e-37  # below which float32 may lose more than a share of a number
PAIRS = 1 << 19  # blocks and seeds that are fitted at a time
FITS = 1 << 14  # blocks and seeds that a thread of the CPU fits at a time
GUESSES = 4
CLOSE = 1e-9  # relative; numbers in double precision that differ by less may come out in the other order on the CPU
SINGULAR = 1e-6  # share of a column's square that lies outside the columns before it

Array = np.ndarray[Any, Any]


def nearest(vectors: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Index of the nearest centroid of every vector, int32[n], as `kmeans.nearest` gives it: of equal ones the first.

    vectors: float32[n, v], centroids: float32[k, v], both on one device.
    """
    (blocks, of_blocks), c = in_blocks(centroids.cpu().numpy()), centroids.double()
    halves, norms = c.square().sum(1) / 2, c.norm(dim=1)
    found = torch.empty(len(vectors), dtype=torch.int32, device=vectors.device)
    step = max(1, SCORES // len(c))
    for x, part in zip(vectors.split(step), found.split(step), strict=True):
        scores, places = torch.topk(halves - x.double() @ c.T, min(2, len(c)), largest=False)
        part.copy_(places[:, 0])
        close = (~(scores[:, -1] - scores[:, 0] > _margins(x, norms))).nonzero().squeeze(1)  # NaN is close, too
        again = np.empty(len(close), np.int32)
        nearest_kernel(x[close].cpu().numpy(), blocks, of_blocks, (0,) * x.shape[1], again)
        part[close] = torch.from_numpy(again).to(part.device)
    return found


def _margins(x: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """By how much the best centroid must lead for the CPU to find the same: float32[n], infinite beyond float32's range.

    The CPU's |c|^2 / 2 - x.c, v products summed in float32, is wrong by less than (v + 1) 2^-24 (|x| |c| + |c|^2 / 2); both
    scores may be wrong.  A centroid longer than R = 4 |x| + 2 min|c| is farther from x than the shortest one is, by far more
    than these errors, so that only lengths up to R count.
    """
    size = x.double().norm(dim=1)
    reach = (4 * size + 2 * norms.min()).clamp(max=norms.max())
    margins: torch.Tensor = (size * reach + reach * reach / 2).float() * ((x.shape[1] + 2) * 2.0**-23) + LEAST
    return margins


def search(blocks: Array, h: Array, K: int, P: int, rule: Rule, device: torch.device) -> tuple[Array, Array]:
    """The seed of least error for every block, uint32[n], and its exponent and coefficients, int8[n, P + 1].

    blocks: float32[n, C].  h: float64[C], the weight of each column's error.  K, P, rule: as for
    `seedlm_search.search_seeds`, whose result this is.

    The energy of a seed is the share of |w|**2 that lies in the span of U(s); one less the energy is the error of the best
    unquantised fit.  The seeds of most energy, one of each of `GUESSES` parts of all seeds, set an error that others must
    be able to beat; those that can are fitted on the device, and those that are best, or too close to call, on the CPU.
    """
    n, C = blocks.shape
    job = _Job.of(h, K, C, P, rule, device)
    parts: list[tuple[Array, Array]] = []
    step = max(1, SCORES // len(job.states))
    for first in range(0, n, step):
        some, places = _survivors(job, torch.from_numpy(blocks[first : first + step]).to(device).double())
        parts.append((some.cpu().numpy() + first, places.cpu().numpy()))
    owners, positions = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    fits, errors = np.empty((len(owners), P + 1), np.int64), np.empty(len(owners))

    def fit(first: int) -> None:
        part = slice(first, first + FITS)
        _fit(blocks[owners[part]], h, job.values, positions[part], rule, fits[part], errors[part])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(fit, range(0, len(owners), FITS)))
    order = np.lexsort((job.states[positions], errors, owners))  # of equal errors the lowest seed
    owners, firsts = np.unique(owners[order], return_index=True)
    best = order[firsts]
    seeds, codes = np.ones(n, np.uint32), np.zeros((n, P + 1), np.int8)
    codes[:, 0] = rule[0]  # of a block of zeros, as the CPU's search has it
    seeds[owners], codes[owners] = job.states[positions[best]], fits[best]
    return seeds, codes


class _Job(NamedTuple):
    """What is the same for all blocks.  values, states: as in `seedlm_search.Tables`.  On the device: weights, float64[C],
    entries, the values, and bases, float64[seeds, P, C], see `_bases`."""

    h: Array
    rule: Rule
    values: Array
    states: Array
    weights: torch.Tensor
    entries: torch.Tensor
    bases: torch.Tensor

    @classmethod
    def of(cls, h: Array, K: int, C: int, P: int, rule: Rule, device: torch.device) -> _Job:
        """The tables of a search on `device`: arguments as for `search`."""
        states, values = cycle(K, (1 << K) - 1 + C * P)
        weights, entries = torch.from_numpy(h).to(device), torch.from_numpy(values).to(device)
        positions = torch.arange(len(states), device=device)
        return cls(h, rule, values, states, weights, entries, _bases(_matrices(entries, positions, C, P), weights.sqrt()))


def _matrices(entries: torch.Tensor, positions: torch.Tensor, C: int, P: int) -> torch.Tensor:
    """U of the seeds at these positions: float64[m, C, P]."""
    return entries[positions.view(-1, 1, 1) + 1 + torch.arange(C * P, device=positions.device).view(C, P)]


def _bases(matrices: torch.Tensor, root: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis of the span of diag(root) U for each seed: float64[seeds, P, C].

    Gram and Schmidt, twice over, which is enough; if a column depends on those before it, it gives zeros.
    """
    basis: list[torch.Tensor] = []
    for column in (matrices * root.view(-1, 1)).unbind(2):
        q, size = column, column.norm(dim=1, keepdim=True)
        for _ in range(2):
            for other in basis:
                q = q - (q * other).sum(1, keepdim=True) * other
        norm = q.norm(dim=1, keepdim=True)
        basis.append(torch.where(norm > 1e-10 * size, q / norm, 0.0))
    return torch.stack(basis, 1)


def _survivors(job: _Job, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks, in ascending order, and the positions of the seeds that may be the best for them.  blocks: float64[n, C]."""
    w = blocks * job.weights.sqrt()
    size = w.norm(dim=1, keepdim=True)
    x = w / size.clamp(min=1e-300)
    energies = torch.zeros(len(x), len(job.bases), dtype=torch.float64, device=x.device)
    for vectors in job.bases.unbind(1):
        energies += (x @ vectors.T).square_()
    everyone = torch.arange(len(x), device=x.device)
    least = torch.where(size.squeeze(1) > 0, math.inf, 0.0).double()  # nothing is sought for a block of zeros
    first = 0
    for some in energies.tensor_split(min(GUESSES, len(job.states)), dim=1):
        errors, certain = _plain_errors(job, blocks, everyone, some.argmax(1) + first)
        first += some.shape[1]
        least = torch.where(certain, torch.minimum(errors, least), least)
    pairs = (energies >= (1 - CLOSE - least).unsqueeze(1)).nonzero()
    found = [_plain_errors(job, blocks, *some.T) for some in pairs.split(PAIRS)]
    (owners, positions), (errors, certain) = pairs.T, (torch.cat(columns) for columns in zip(*found, strict=True))
    least.scatter_reduce_(0, owners[certain], errors[certain], "amin")
    keep = energies[owners, positions] >= 1 - CLOSE - least[owners]
    if not job.rule[3]:  # what is refined on the CPU may still fall below any other
        keep &= ~certain | (errors <= least[owners] * (1 + CLOSE))
    return owners[keep], positions[keep]


def _plain_errors(
    job: _Job, blocks: torch.Tensor, owners: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Relative errors of these seeds, float64[m], fitted and rounded as in `seedlm_search.fit_seed` without refinement, and
    whether the CPU is certain to find the same: not if a number is about to be rounded the other way, or U is nearly
    singular."""
    least, largest, shift, _ = job.rule
    w, u = blocks[owners], _matrices(job.entries, positions, blocks.shape[1], job.bases.shape[1])
    weighted = u * job.weights.view(-1, 1)
    gram = u.mT @ weighted
    factor, wrong = torch.linalg.cholesky_ex(gram)
    t = torch.cholesky_solve(weighted.mT @ w.unsqueeze(2), factor).squeeze(2)
    pivots = factor.diagonal(dim1=1, dim2=2).square()
    certain = (wrong == 0) & (pivots > SINGULAR * gram.diagonal(dim1=1, dim2=2)).all(1)
    biggest = t.abs().amax(1)
    mantissa, exponent = torch.frexp(biggest)
    certain &= ((mantissa - 0.75).abs() < 0.25 - CLOSE) & torch.isfinite(biggest)
    powers = torch.tensor([2.0**e for e in range(least, largest + 1)], dtype=torch.float64, device=w.device)
    scale = powers[(exponent - 1 + shift).clamp(least, largest).long() - least].unsqueeze(1)
    z = t / scale
    certain &= (((z - z.floor() - 0.5).abs() > 1e3 * CLOSE) | (z.abs() > LARGEST_Q + 2)).all(1)
    t = z.round().clamp(LEAST_Q, LARGEST_Q) * scale
    error = ((w - (u @ t.unsqueeze(2)).squeeze(2)).square() * job.weights).sum(1)
    square = (w.square() * job.weights).sum(1)
    return error / square, certain & (square > 0)


@njit(nogil=True)  # not cached: it takes in `fit_seed`, and numba would not notice that file change
def _fit(blocks: Array, h: Array, values: Array, positions: Array, rule: Rule, codes: Array, errors: Array) -> None:
    """What `seedlm_search.search_seeds` makes of each block and the seed at its position: codes and relative error."""
    for i in range(len(blocks)):
        square = 0.0
        for c in range(len(h)):
            square += h[c] * np.float64(blocks[i, c]) ** 2
        errors[i] = fit_seed(blocks[i], h, values, positions[i] + 1, codes.shape[1] - 1, rule, codes[i]) / square
