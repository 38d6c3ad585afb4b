"""What the audited documentation and code call SeedLM, VPTQ, hypercompression and export, to be measured beside the stages.

None of them is what the papers define, nor a stage of this project: each is a small reference implementation, written from
its definition in the register of claims (section 2), of the arithmetic alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from agentforge.bits import bits_per_value
from agentforge.stages import parse
from agentforge.stages.kmeans import kmeans

Shape = tuple[int, int]


class Coder(NamedTuple):
    """A way to store a weight.  bits: all that decoding a weight of this shape takes.  approximate: the weight, and a seed
    for what is drawn at random, to what is decoded."""

    bits: Callable[[Shape], float]
    approximate: Callable[[torch.Tensor, int], torch.Tensor]


DOCUMENTED: dict[str, Callable[..., Coder]] = {}


def documented(function: Callable[..., Coder]) -> Callable[..., Coder]:
    """Decorator: makes a coder known under its function's name, after `_`."""
    DOCUMENTED[function.__name__[1:]] = function
    return function


def coder_of(text: str) -> Coder:
    """A coder by the text that stands in a claim."""
    name, _, rest = text.partition(":")
    if name in DOCUMENTED:
        settings = (part.partition("=") for part in rest.split(",") if part)
        return DOCUMENTED[name](**{key: int(value) for key, _, value in settings})
    stage = parse(text)
    return Coder(
        lambda shape: float(sum(bits_per_value(coding) * math.prod(size) for coding, size in stage.layout(shape).values())),
        lambda weight, seed: stage.decode(stage.encode(weight, seed=seed)),
    )


@documented
def _fp16() -> Coder:
    """A cast to half floats."""
    return Coder(lambda shape: 16.0 * math.prod(shape), lambda weight, _: weight.to(torch.float16).to(torch.float32))


@documented
def _zeros() -> Coder:
    """Nothing at all."""
    return Coder(lambda _: 0.0, lambda weight, _: torch.zeros_like(weight))


@documented
def _c4_export() -> Coder:
    """The audited export of phase 4: sign(w) times its row's scale, cut to an int8, if |w| is at least a tenth of it."""

    def approximate(weight: torch.Tensor, seed: int) -> torch.Tensor:
        alpha = weight.abs().mean(1, keepdim=True).clamp(min=1e-8)
        return (alpha * weight.sign() * (weight.abs() >= 0.1 * alpha)).to(torch.int8).to(torch.float32)

    return Coder(lambda shape: 8.0 * math.prod(shape) + 16 * shape[0], approximate)


@documented
def _c8_seedlm() -> Coder:
    """The audited SeedLM: of 256 normal vectors of 64, each scaled to a maximum of one, that of least L1 distance among 100
    drawn for a block; the layer is scaled by its largest |w|."""
    vectors = torch.stack([torch.randn(64, generator=torch.Generator().manual_seed(s)) for s in range(256)])
    vectors /= vectors.abs().amax(1, keepdim=True)

    def approximate(weight: torch.Tensor, seed: int) -> torch.Tensor:
        largest = weight.abs().max()
        blocks = _blocks(weight / largest, 64)
        distance = torch.cdist(blocks, vectors, p=1)
        draws = torch.rand(distance.shape, generator=torch.Generator().manual_seed(seed))
        distance[draws > draws.kthvalue(100, dim=1, keepdim=True)[0]] = math.inf
        return largest * _unblocked(vectors[distance.argmin(1)], weight)

    return Coder(lambda shape: 8.0 * math.ceil(math.prod(shape) / 64) + 32, approximate)


@documented
def _v1_seedlm(C: int, P: int, bits: int) -> Coder:
    """The first version's: blocks of C, scaled by 2^floor(log2 max|w|), as P integers times the best of 16 normal bases;
    the integers have no scale of their own."""

    def approximate(weight: torch.Tensor, seed: int) -> torch.Tensor:
        blocks = _blocks(weight, C)
        scale = torch.exp2(blocks.abs().amax(1, keepdim=True).clamp(min=1e-30).log2().floor())
        target, best = blocks / scale, torch.zeros_like(blocks)
        for basis in torch.from_numpy(np.random.default_rng(seed).standard_normal((16, C, P), np.float32)):
            fit = (target @ torch.linalg.pinv(basis).T).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) @ basis.T
            nearer = (fit - target).square().sum(1) < (best - target).square().sum(1)
            best[nearer] = fit[nearer]
        return _unblocked(best * scale, weight)

    return Coder(lambda shape: (16.0 + 8 * P + 8) * math.ceil(math.prod(shape) / C), approximate)


@documented
def _g8_projection(best: int = 0) -> Coder:
    """The guide's SeedLM: blocks of 512 columns as 16 products with a normal projection, in 2 bits, decoded by its
    transpose.  best: exact products, decoded by the pseudo-inverse."""

    def approximate(weight: torch.Tensor, seed: int) -> torch.Tensor:
        wide = nn.functional.pad(weight, (0, -weight.shape[1] % 512)).reshape(len(weight), -1, 512)
        projection = torch.randn(16, 512, generator=torch.Generator().manual_seed(seed))
        latents = wide @ projection.T
        if not best:
            low, high = latents.amin((0, 2), keepdim=True), latents.amax((0, 2), keepdim=True)
            step = ((high - low) / 3).clamp(min=1e-30)
            latents = low + step * ((latents - low) / step).round()
        back = latents @ (torch.linalg.pinv(projection).T if best else projection)
        return back.reshape(len(weight), -1)[:, : weight.shape[1]]

    def bits(shape: Shape) -> float:
        blocks = math.ceil(shape[1] / 512)
        return 16.0 * blocks + 16 * (32 if best else 2) * shape[0] * blocks + 16 * blocks

    return Coder(bits, approximate)


@documented
def _c8_vptq(stages: int) -> Coder:
    """The audited VPTQ: k-means on flat vectors of 8, 256 words, and again on what is left, `stages` times."""

    def approximate(weight: torch.Tensor, seed: int) -> torch.Tensor:
        left = _blocks(weight, 8)
        target = left.clone()
        for stage in range(stages):
            left = left - _words(left, 256, 50, seed + stage)
        return _unblocked(target - left, weight)

    return Coder(lambda shape: stages * (8.0 * math.ceil(math.prod(shape) / 8) + 256 * 8 * 16), approximate)


@documented
def _v1_vptq(fixed: int = 0) -> Coder:
    """The first version's: four words of four weights.  Decoding multiplies by the standard deviation and adds the mean,
    though nothing was normalised; fixed: it does not."""

    def approximate(weight: torch.Tensor, seed: int) -> torch.Tensor:
        decoded = _unblocked(_words(_blocks(weight, 4), 4, 10, seed), weight)
        return decoded if fixed else decoded * weight.std() + weight.mean()

    return Coder(lambda shape: 2.0 * math.ceil(math.prod(shape) / 4) + 4 * 4 * 32, approximate)


@documented
def _g8_product() -> Coder:
    """The guide's VPTQ: vectors of 64 in four parts, a codebook of 256 words each."""

    def approximate(weight: torch.Tensor, seed: int) -> torch.Tensor:
        parts = _blocks(weight, 64).reshape(-1, 4, 16).unbind(1)
        return _unblocked(torch.cat([_words(part.contiguous(), 256, 100, seed) for part in parts], 1), weight)

    return Coder(lambda shape: 4.0 * 8 * math.ceil(math.prod(shape) / 64) + 4 * 256 * 16 * 16, approximate)


@documented
def _s2_rows() -> Coder:
    """The specification's VPTQ: 256 words, each as long as a row."""

    def approximate(weight: torch.Tensor, seed: int) -> torch.Tensor:
        if len(weight) <= 256:
            return weight
        chosen = torch.randperm(len(weight), generator=torch.Generator().manual_seed(seed))[:256]
        words = weight[chosen]
        for _ in range(10):
            nearest = torch.cdist(weight, words).argmin(1)
            counts = torch.bincount(nearest, minlength=256).unsqueeze(1)
            sums = torch.zeros_like(words).index_add_(0, nearest, weight)
            words = torch.where(counts > 0, sums / counts.clamp(min=1), words)
        return words[nearest]

    return Coder(lambda shape: 16.0 * min(256, shape[0]) * shape[1] + 8 * shape[0], approximate)


@documented
def _v1_unordered() -> Coder:
    """The first version's hypercompression at its best: a perfect curve over the weights sorted by |w|, the order of which
    is not stored, so that decoding puts the i-th value into the i-th place.  What the curve costs is not counted."""

    def approximate(weight: torch.Tensor, seed: int) -> torch.Tensor:
        flat = weight.reshape(-1)
        return flat[flat.abs().argsort()].reshape(weight.shape)

    return Coder(lambda _: 0.0, approximate)


def _blocks(weight: torch.Tensor, length: int) -> torch.Tensor:
    """The weight row by row in blocks, zeros at the end: float32[blocks, length]."""
    return nn.functional.pad(weight.reshape(-1), (0, -weight.numel() % length)).reshape(-1, length)


def _unblocked(blocks: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return blocks.reshape(-1)[: like.numel()].reshape(like.shape)


def _words(vectors: torch.Tensor, k: int, iterations: int, seed: int) -> torch.Tensor:
    """Each vector's centroid, by plain k-means."""
    found = kmeans(vectors.numpy(), k, seed=seed, iterations=iterations, threads=torch.get_num_threads())
    return torch.from_numpy(found.centroids[found.labels])
