"""Probes of what papers and documentation claim as numbers: on the model, on Gaussian weights, or by computing.

A coder in a claim is the text of a stage, or the name of one that the documentation defines, see `documented`.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import pydantic
import torch
from torch import nn

from agentforge import evaluation, stages
from agentforge.artifact import relative_error
from agentforge.audit.probes import Count, Natural, Positive, Share, StageText, probe
from agentforge.audit.workshop import Workshop
from agentforge.chain import Condition
from agentforge.errors import BadInput
from agentforge.evaluation import Measurement, intervals
from agentforge.models import quiet_transformers
from agentforge.opening import load, open_model
from agentforge.stages.seedlm_search import TAPS, lfsr
from agentforge.stages.trajectory import paper_bits_per_weight
from agentforge.stages.vptq import paper_bits
from agentforge.statistics import Calibration, InputStatistics, collect, first_tokens
from agentforge.training import mugrokfast
from agentforge.training.bitlinear import quantize_activations
from agentforge.training.mugrokfast import MuGrokfast
from agentforge.training.phase import size_of

from .documented import Coder, Shape, coder_of

Source = Literal["sample", "gaussian"]


def _coder(text: str) -> str:
    try:
        coder_of(text)
    except TypeError as error:  # a setting that a documented coder does not have
        raise ValueError(str(error)) from None
    return text


CoderText = Annotated[str, pydantic.AfterValidator(_coder)]
INPUT_TOKENS = 255  # of the text, for what is asked of layers' inputs
STATISTICS_TOKENS = 1024


# Arithmetic


@probe("names")
def distinct_names(workshop: Workshop, patterns: list[str]) -> Measurement:
    """How many distinct names a list has, where "a/{b,c}" stands for two."""
    names: set[str] = set()
    for pattern in patterns:
        parts = [part.split(",") for part in re.split(r"[{}]", pattern)]
        # Outside of braces a part is what it is; re.split puts these at even places.
        names |= {"".join(name) for name in itertools.product(*parts)}
    return Measurement(float(len(names)), "names", None, len(names), {"metric": "distinct names"})


@probe("share of gates")
def gates_that_pass(workshop: Workshop, gates: list[str], measured: dict[str, float]) -> Measurement:
    """Share of gates that pass for given values, as this project's chains decide."""
    conditions = [Condition.parse(gate) for gate in gates]
    values = {name: Measurement(value, "x", None, 1, {}) for name, value in measured.items()}
    passed = sum(condition.decide(values[condition.quantity]) == "passed" for condition in conditions)
    return workshop.exact(passed / len(gates), "share of gates", len(gates), "gates that pass", gates=gates, values=measured)


@probe("x")
def size_target(workshop: Workshop, parameters: Count) -> Measurement:
    """The ratio that the documentation's size-adaptive table asks of a model of this size."""
    size = size_of(parameters)
    return workshop.exact(size.ratio, "x", parameters, "size-adaptive target", size=size.name)


# Weights: the sampled matrices, or Gaussian ones


def gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Independent weights of the unit Gaussian: float32[rows, columns]."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((rows, columns), dtype=np.float32))


def _weights(
    workshop: Workshop, source: Source, rows: int, columns: int = 256, std: float = 1.0
) -> Iterator[tuple[torch.Tensor, int]]:
    """Weights, float32[out, in], each with its seed: on "sample" so many rows (0: all), spread over each sampled matrix; on
    "gaussian" a matrix of rows (0: 256) x columns for each of the effort's seeds."""
    if source == "gaussian":
        for seed in range(workshop.effort.seeds):
            yield std * gaussian(rows or 256, columns, seed), seed
        return
    if source != "sample":
        raise BadInput(f"source={source!r}; expected sample or gaussian")
    for weight in workshop.sample():
        dense = weight.load().to(torch.float32)
        yield dense if not rows else dense[_spread(len(dense), rows)], 0


def _spread(count: int, rows: int) -> torch.Tensor:
    return torch.linspace(0, count - 1, min(count, rows)).round().to(torch.int64)


def _shapes(workshop: Workshop, source: Source, rows: int, columns: int) -> list[Shape]:
    return [(rows, columns)] if source == "gaussian" else [weight.shape for weight in workshop.sample()]


def _over(
    workshop: Workshop,
    pairs: Sequence[tuple[float, float]],
    unit: str,
    n: int,
    source: Source,
    metric: str,
    *,
    each: Any = "matrices",
    **protocol: Any,
) -> Measurement:
    a, b = torch.tensor(pairs, dtype=torch.float64).T
    about = {"metric": metric, "on": source, each: len(pairs), "weights": n, **protocol}
    seed = 0 if source == "gaussian" else None
    found = intervals.ratio(a, b, n, f"{len(pairs)} {each}")
    return Measurement(unit=unit, protocol=about, seed=seed, inputs={"model": workshop.model.fingerprint}, **found)


def _squares(weight: torch.Tensor) -> float:
    return float(weight.double().square().sum())


def _error(coder: Coder, weight: torch.Tensor, seed: int) -> float:
    """Relative squared error; zeros have 1."""
    return relative_error(weight, coder.approximate(weight, seed)) ** 2


@probe("share of squared weights")
def relative_squared_error(
    workshop: Workshop, coder: CoderText, source: Source, rows: Natural = 0, columns: Count = 256, std: Positive = 1.0
) -> Measurement:
    """|W - decoded|^2 / |W|^2, mean over matrices, or over all rows of Gaussian ones together; zeros have 1."""
    made, n = coder_of(coder), 0
    pairs: list[tuple[float, float]] = []
    for weight, seed in _weights(workshop, source, rows, columns, std):
        n += weight.numel()
        if source == "gaussian":  # rows are independent, and many enough to know the error by
            lost = (made.approximate(weight, seed) - weight).double().square().sum(1)
            pairs += zip(lost.tolist(), weight.double().square().sum(1).tolist(), strict=True)
        else:
            pairs.append((_error(made, weight, seed), 1.0))
    about = {"coder": coder, "std": std, "each": "rows" if source == "gaussian" else "matrices"}
    return _over(workshop, pairs, "share of squared weights", n, source, "relative squared error", **about)


@probe("R2")
def explained(workshop: Workshop, coder: CoderText, source: Source, rows: Natural = 0, columns: Count = 256) -> Measurement:
    """R2, 1 - squared error over squared deviation from the mean, mean over matrices: the audited code's quality."""
    made, weights = coder_of(coder), list(_weights(workshop, source, rows, columns))
    pairs = [(1 - _squares(made.approximate(w, s) - w) / _squares(w - w.double().mean()), 1.0) for w, s in weights]
    return _over(workshop, pairs, "R2", sum(w.numel() for w, _ in weights), source, "explained variance", coder=coder)


@probe("x of the squared error")
def errors_compared(
    workshop: Workshop, coder: CoderText, reference: CoderText, source: Source, rows: Natural = 0, columns: Count = 256
) -> Measurement:
    """Relative squared error of one coder over that of another, on the same weights, in pairs."""
    ours, theirs = coder_of(coder), coder_of(reference)
    weights = list(_weights(workshop, source, rows, columns))
    pairs = [(_error(ours, weight, seed), _error(theirs, weight, seed)) for weight, seed in weights]
    n = sum(weight.numel() for weight, _ in weights)
    return _over(
        workshop, pairs, "x of the squared error", n, source, "ratio of squared errors", coder=coder, reference=reference
    )


@probe("share")
def code_retention(
    workshop: Workshop, coder: CoderText, source: Source, rows: Natural = 0, columns: Count = 256, preserved: bool = False
) -> Measurement:
    """1 - mean |w - w'| / max |w|, mean over matrices: "retention" in the audited SeedLM.

    preserved: averaged, as there, with 1 for each of the model's tensors that no stage touches.
    """
    made, weights = coder_of(coder), list(_weights(workshop, source, rows, columns))
    kept = [1 - float((made.approximate(w, s) - w).abs().double().mean() / w.abs().max()) for w, s in weights]
    if preserved:
        touched, all_tensors = len(workshop.model.weights()), len(workshop.model.entries)
        kept = [(touched * value + all_tensors - touched) / all_tensors for value in kept]
    n = sum(weight.numel() for weight, _ in weights)
    return _over(workshop, [(value, 1.0) for value in kept], "share", n, source, "1 - L1 / max", coder=coder)


@probe("bits/weight")
def coded_bits(
    workshop: Workshop, coder: CoderText, source: Source = "sample", rows: Natural = 256, columns: Count = 256
) -> Measurement:
    """Bits per weight: all that decoding takes, over the weights of the sampled matrices, or of one of rows x columns."""
    shapes = _shapes(workshop, source, rows, columns)
    bits, n = sum(map(coder_of(coder).bits, shapes)), sum(map(math.prod, shapes))
    return workshop.exact(bits / n, "bits/weight", n, "bits of all that is stored", coder=coder, on=source)


@probe("x")
def coded_ratio(
    workshop: Workshop, coder: CoderText, source: Source = "sample", rows: Natural = 256, columns: Count = 256
) -> Measurement:
    """32 bits per weight over all that decoding takes, as `coded_bits` counts it."""
    bits = coded_bits(workshop, coder, source, rows, columns)
    return bits.through(lambda x: 32 / x, "x", metric="32 bits over all that is stored")


@probe("share of weights")
def zeros(
    workshop: Workshop, tau: Positive, source: Source, rows: Natural = 0, columns: Count = 256, absolute: bool = False
) -> Measurement:
    """Share of weights below tau times their row's mean |w|, or below tau itself."""
    pairs = []
    for weight, _ in _weights(workshop, source, rows, columns):
        limit = torch.tensor(tau) if absolute else tau * weight.abs().double().mean(1, keepdim=True)
        pairs.append((float((weight.abs() < limit).sum()), float(weight.numel())))
    n = int(sum(count for _, count in pairs))
    return _over(workshop, pairs, "share of weights", n, source, "weights below a threshold", tau=tau, absolute=absolute)


@probe("of mean |w|")
def threshold_for_zeros(
    workshop: Workshop, share: Share, source: Source, rows: Natural = 0, columns: Count = 256
) -> Measurement:
    """The threshold, in units of a row's mean |w|, below which this share of a matrix lies; mean over matrices."""
    pairs, n = [], 0
    for weight, _ in _weights(workshop, source, rows, columns):
        relative = weight.abs().double() / weight.abs().double().mean(1, keepdim=True)
        pairs.append((float(np.quantile(relative.numpy(), share)), 1.0))
        n += weight.numel()
    return _over(workshop, pairs, "of mean |w|", n, source, "threshold for a share of zeros", share=share)


@probe("bits/weight")
def codes_entropy(workshop: Workshop, stage: StageText) -> Measurement:
    """-sum p log2 p of the frequencies of a ternary stage's codes, over the sampled matrices."""
    ternary, counts = stages.parse(stage), torch.zeros(3, dtype=torch.float64)
    for weight, _ in _weights(workshop, "sample", 0):
        counts += torch.bincount(ternary.encode(weight)["codes"].reshape(-1).to(torch.int64), minlength=3)
    return workshop.exact(_entropy(counts), "bits/weight", int(counts.sum()), "entropy of the codes", stage=stage)


def _entropy(counts: torch.Tensor) -> float:
    p = counts[counts > 0].double() / counts.sum()
    return float(-(p * p.log2()).sum())


@probe("x")
def sparse_gain(workshop: Workshop, tau: Positive) -> Measurement:
    """A byte a weight over a bit a weight and a byte for each that is not zero: what int8 codes gain by being sparse."""
    share = zeros(workshop, tau, "sample")
    return share.through(lambda x: 8 / (1 + 8 * (1 - x)), "x", metric="int8 over a bitmap and int8", tau=tau)


@probe("share of the norm")
def requantised(workshop: Workshop, stage: StageText, times: Count) -> Measurement:
    """Share of the norm of what a stage decodes to that encoding and decoding it so many times more takes away."""
    made, pairs, n = coder_of(stage), [], 0
    for weight, seed in _weights(workshop, "sample", 0):
        first = again = made.approximate(weight, seed)
        for _ in range(times):
            again = made.approximate(again, seed)
        pairs.append((1 - math.sqrt(_squares(again) / _squares(first)), 1.0))
        n += weight.numel()
    return _over(workshop, pairs, "share of the norm", n, "sample", "norm lost", stage=stage, times=times)


@probe("R2")
def explained_at(workshop: Workshop, bits: Positive, rows: Count = 192) -> Measurement:
    """R2 of rounding to the mean of each cell, its step such that the codes' entropy is `bits` a weight; mean over matrices.

    Nothing but the entropy is counted, which no real coder reaches, so that this flatters the claim.
    """
    pairs, n = [], 0
    for weight, _ in _weights(workshop, "sample", rows):
        flat = weight.double().reshape(-1) - weight.double().mean()
        low, high = float(flat.std()) * 1e-3, 4 * float(flat.abs().max())
        for _ in range(20):  # the entropy falls as the step grows
            step = math.sqrt(low * high)
            low, high = (step, high) if _entropy(torch.bincount(_cells(flat, step))) > bits else (low, step)
        cells = _cells(flat, high)
        counts, sums = torch.bincount(cells), torch.bincount(cells, weights=flat)
        pairs.append((float((sums.square() / counts.clamp(min=1)).sum()) / _squares(flat), 1.0))
        n += flat.numel()
    return _over(workshop, pairs, "R2", n, "sample", "explained variance at an entropy", bits=bits)


def _cells(values: torch.Tensor, step: float) -> torch.Tensor:
    codes = (values / step).round().to(torch.int64)
    return codes - codes.min()


@probe("ms")
def decode_time(workshop: Workshop, stage: StageText, weights: Count, rows: Count) -> Measurement:
    """Milliseconds to decode so many weights, from the time for some rows of each sampled matrix, three rounds."""
    made, times = stages.parse(stage), []
    encoded = [made.encode(weight) for weight, _ in _weights(workshop, "sample", rows)]
    n = sum(math.prod(packed.shape) for packed in encoded)
    for _ in range(4):
        began = time.perf_counter()
        for packed in encoded:
            made.decode(packed)
        times.append(1e3 * (time.perf_counter() - began) * weights / n)
    # The first round warms up what the others use.
    found = intervals.mean(torch.tensor(times[1:]).double(), error="3 rounds") | {"n": n}
    protocol = {"metric": "time to decode", "stage": stage, "weights": weights, "threads": torch.get_num_threads()}
    return Measurement(unit="ms", protocol=protocol, inputs={"model": workshop.model.fingerprint}, **found)


# The papers' and the audited code's own arithmetic


@probe("R2")
def mismatched_decode(workshop: Workshop, count: Count, segments: Count, degree: Count) -> Measurement:
    """R2 of polynomials fitted to segments of a smooth wave, less that of what the audited code decodes from them.

    Its segments have floor(count / segments) values, and there is one more where some are left; it decodes as many as it
    stored, of equal lengths rounded up.
    """
    wave = np.sin(np.linspace(0, 6 * np.pi, count)) + 0.5 * np.cos(np.linspace(0, 10 * np.pi, count))
    short = count // segments
    parts = [wave[first : first + short] for first in range(0, count, short)]
    curves = [_polynomial(part, degree) for part in parts]
    fitted = [curve(np.linspace(-1, 1, len(part))) for curve, part in zip(curves, parts, strict=True)]
    decoded = [curve(np.linspace(-1, 1, math.ceil(count / len(parts)))) for curve in curves]
    after, before = (float(((np.concatenate(made)[:count] - wave) ** 2).mean() / wave.var()) for made in (decoded, fitted))
    about = {"segments": segments, "degree": degree, "R2 fitted": 1 - before, "R2 decoded": 1 - after}
    return workshop.exact(after - before, "R2", count, "R2 lost by decoding", **about)


def _polynomial(values: np.ndarray, degree: int) -> np.polynomial.Polynomial:
    x = np.linspace(-1, 1, len(values))
    return np.polynomial.Polynomial.fit(x, values, min(degree, len(values) - 1), domain=[-1, 1])


@probe("share of states")
def lfsr_states(workshop: Workshop, K: Count, seed: Count, states: list[int]) -> Measurement:
    """Share of printed states of a shift register that this project's has, too, at the same place."""
    same = int((lfsr(K, seed, len(states)) == np.array(states)).sum())
    return workshop.exact(same / len(states), "share of states", len(states), "equal states", K=K, from_seed=seed)


@probe("share of registers")
def full_periods(workshop: Workshop) -> Measurement:
    """Share of Table 6's registers that come back to their seed after 2^K - 1 steps and not before."""
    full = sum(int(np.argmax(lfsr(K, 1, (1 << K) - 1) == 1)) == (1 << K) - 2 for K in TAPS)
    return workshop.exact(full / len(TAPS), "share of registers", len(TAPS), "full period", K=[min(TAPS), max(TAPS)])


# Hidden size, feed-forward size, and outputs of k and v; all blocks of a model are alike.
LLAMAS = {
    "llama2-7b": (4096, 11008, 4096),
    "llama2-13b": (5120, 13824, 5120),
    "llama3-70b": (8192, 28672, 1024),
}


@probe("bits/weight")
def vptq_bits(workshop: Workshop, shapes: str, v: Count, k: Count, **settings: Any) -> Measurement:
    """Bits a weight as the VPTQ paper counts them, over the linear layers of a Llama, of one matrix, or of this model."""
    if shapes == "here":
        layers = [weight.shape for weight in workshop.model.weights()]
    elif shapes == "square-4096":
        layers = [(4096, 4096)]
    elif shapes in LLAMAS:
        wide, inner, narrow = LLAMAS[shapes]
        layers = [(wide, wide), (narrow, wide), (narrow, wide), (wide, wide), (inner, wide), (inner, wide), (wide, inner)]
    else:
        raise BadInput(f"vptq_bits: shapes={shapes!r}; expected here, square-4096, {', '.join(LLAMAS)}")
    value, n = paper_bits(layers, v, k, **settings), sum(map(math.prod, layers))
    return workshop.exact(value, "bits/weight", n, "bits by Equations 3 to 5", shapes=shapes, v=v, k=k, **settings)


@probe("x")
def trajectory_ratio(workshop: Workshop, stage: StageText, bits: Count) -> Measurement:
    """`bits` a weight over what the Hyper-Compression paper counts, over the sampled matrices."""
    made, counted, n = stages.parse(stage), 0.0, 0
    for weight, _ in _weights(workshop, "sample", 0):
        counted += paper_bits_per_weight(made.encode(weight)) * weight.numel()
        n += weight.numel()
    return workshop.exact(bits * n / counted, "x", n, "ratio by largest index", stage=stage, against=bits)


@probe("x of the squared error")
def output_errors_compared(workshop: Workshop, stage: StageText, reference: StageText, rows: Count) -> Measurement:
    """tr(dW H dW^T) relative to tr(W H W^T) of one stage over that of another, on some rows of the sampled matrices."""
    ours, theirs = stages.parse(stage), stages.parse(reference)
    statistics, pairs, n = _statistics(workshop), [], 0
    for weight in workshop.sample():
        dense = weight.load().to(torch.float32)
        dense, stats = dense[_spread(len(dense), rows)], statistics[weight.name]
        lost = [_output_error(made.decode(made.encode(dense, stats)) - dense, stats) for made in (ours, theirs)]
        whole = _output_error(dense, stats)
        pairs.append((lost[0] / whole, lost[1] / whole))
        n += dense.numel()
    about = {"stage": stage, "reference": reference, "tokens": STATISTICS_TOKENS, "text": "selftext/calibration"}
    return _over(workshop, pairs, "x of the squared error", n, "sample", "ratio of squared output errors", **about)


def _output_error(gap: torch.Tensor, stats: InputStatistics) -> float:
    return float(((gap @ stats.hessian) * gap).sum(dtype=torch.float64))


_COLLECTED: dict[str, dict[str, InputStatistics]] = {}


def _statistics(workshop: Workshop) -> dict[str, InputStatistics]:
    """Input statistics of the sampled layers, of the last model that asked for them."""
    names = [weight.name for weight in workshop.sample()]
    key = f"{workshop.model.fingerprint} {names}"
    if key not in _COLLECTED:
        calibration = Calibration(tokens=STATISTICS_TOKENS, context=min(STATISTICS_TOKENS, workshop.context))
        found = collect(workshop.model, calibration, progress=False)
        _COLLECTED.clear()  # one model's are enough to keep
        _COLLECTED[key] = {name: found[name] for name in names}
    return _COLLECTED[key]


# The model


@probe("share of parameters")
def quantised_share(workshop: Workshop, kept: bool = False) -> Measurement:
    """Share of the model's parameters that stages may touch, or that are kept; tied ones count once."""
    total = workshop.model.parameters
    touched = sum(math.prod(weight.shape) for weight in workshop.model.weights())
    value = (total - touched if kept else touched) / total
    return workshop.exact(value, "share of parameters", total, "kept" if kept else "quantised")


@probe("share of bytes")
def memory_saved(workshop: Workshop) -> Measurement:
    """1 - bytes of the running packed ternary model's tensors over those of its parameters in float32."""
    packed = load(workshop.artifact("ternary:rule=absmean").path, runtime="packed").model
    # Embedding and head may be two names for the same memory.
    held = sum({tensor.data_ptr(): tensor.nbytes for tensor in [*packed.parameters(), *packed.buffers()]}.values())
    whole = 4 * sum(parameter.numel() for parameter in workshop.model.model.parameters())
    return workshop.exact(1 - held / whole, "share of bytes", whole, "memory of weights", bytes=held)


def _listen(workshop: Workshop, layers: str, hook: Callable[[torch.Tensor], None]) -> int:
    """Call `hook` with the inputs of every touched layer whose name contains `layers`, on the text's first tokens."""
    modules = dict(workshop.model.model.named_modules())
    names = [weight.name.removesuffix(".weight") for weight in workshop.model.weights()]
    chosen = [modules[name] for name in names if layers in name]
    if not chosen:
        known = ", ".join(sorted({n.split(".")[-1] for n in names}))
        raise BadInput(f"no layer's name contains {layers!r}; choose from {known}")
    tokens = min(INPUT_TOKENS, workshop.context)
    ids = torch.tensor([first_tokens(workshop.model, workshop.text.text, tokens)])
    handles = [module.register_forward_pre_hook(lambda _, args: hook(args[0])) for module in chosen]
    try:
        with torch.inference_mode():
            workshop.model.model(input_ids=ids)
    finally:
        for handle in handles:
            handle.remove()
    return tokens


@probe()
def activation_error(workshop: Workshop, unit: Literal["mean squared error of zeros", "dB"]) -> Measurement:
    """The signal's distance from the squared error of 8-bit activations, over all layers' inputs; or the mean squared error
    of activations that are all zero, which a bound on the error has to refuse."""
    sums = torch.zeros(3, dtype=torch.float64)

    def hook(x: torch.Tensor) -> None:
        sums.add_(torch.tensor([_squares(quantize_activations(x) - x), _squares(x), float(x.numel())], dtype=torch.float64))

    tokens = _listen(workshop, "", hook)
    lost, power, count = sums.tolist()
    value = power / count if unit != "dB" else 10 * math.log10(power / lost)
    found = workshop.exact(value, unit, int(count), "activations of 8 bits", text=workshop.text.name, tokens=tokens)
    return dataclasses.replace(found, error="unknown")  # of the one window


@probe("share of inputs")
def activation_zeros(workshop: Workshop, layers: str) -> Measurement:
    """Share of the inputs of layers of this name that 8 bits per token round to zero."""
    counts = [0, 0]

    def hook(x: torch.Tensor) -> None:
        counts[0] += int((quantize_activations(x) == 0).sum())
        counts[1] += x.numel()

    tokens = _listen(workshop, layers, hook)
    about = {"layers": layers, "text": workshop.text.name, "tokens": tokens}
    found = workshop.exact(counts[0] / counts[1], "share of inputs", counts[1], "inputs rounded to 0", **about)
    return dataclasses.replace(found, error="unknown")  # of the one window


@probe("x", slow=True)
def activation_cost(workshop: Workshop) -> Measurement:
    """Perplexity with 8-bit inputs of every touched layer, over the original's, in pairs, window by window."""
    changed = copy.copy(workshop.model)
    module = vars(changed)["model"] = copy.deepcopy(workshop.model.model)
    layers = dict(module.named_modules())
    for weight in workshop.model.weights():
        layer = layers[weight.name.removesuffix(".weight")]
        layer.register_forward_pre_hook(lambda _, args: (quantize_activations(args[0]), *args[1:]))
    found = evaluation.divergence(
        changed, workshop.model, workshop.text, workshop.context, tokens=workshop.tokens, progress=False
    ).perplexity_retention
    return found.through(lambda x: 1 / x, "x", metric="perplexity with 8-bit activations / perplexity")


@probe("x")
def padded_perplexity(workshop: Workshop, texts: Count) -> Measurement:
    """Perplexity with padding counted as tokens and labels, over that of the tokens alone; original model.

    As the audited code prepares them: texts of more than 100 characters, cut or filled up to 512 tokens.
    """
    model, tokenizer = workshop.model.model, workshop.model.tokenizer
    length = min(512, workshop.context)
    lines = [line for line in workshop.text.text.splitlines() if len(line) > 100][:texts]
    if not lines:
        raise BadInput(f"padded_perplexity: text {workshop.text.name} has no line of more than 100 characters")
    padded, alone, counts = [], [], []
    for line in lines:
        ids = tokenizer(line, add_special_tokens=False)["input_ids"][:length]
        mask = torch.tensor([[1] * len(ids) + [0] * (length - len(ids))])
        batch = torch.tensor([ids + [tokenizer.eos_token_id or 0] * (length - len(ids))])
        with torch.inference_mode():
            logits = model(input_ids=batch, attention_mask=mask).logits[0, :-1]
        losses = nn.functional.cross_entropy(logits.float(), batch[0, 1:], reduction="none").double()
        padded.append(float(losses.mean()))
        alone.append(float(losses[: len(ids) - 1].sum()))
        counts.append(len(ids) - 1)
    with_padding, losses, count = (torch.tensor(x, dtype=torch.float64) for x in (padded, alone, counts))
    # Linear in each text, so that its mean is the difference of the two means, and its error that of pairs.
    each = with_padding - losses.sum() / count.sum() - (losses - losses.sum() / count.sum() * count) / count.mean()
    about = {"metric": "perplexity, padding counted", "text": workshop.text.name, "texts": len(lines)}
    found = intervals.mean(each, error=f"{len(lines)} texts", log=True) | {"n": int(count.sum())}
    return Measurement(unit="x", protocol=about, inputs={"model": workshop.model.fingerprint}, **found)


@probe("share of layers")
def conv1d_layers(workshop: Workshop) -> Measurement:
    """Share of the Conv1D layers of a small GPT-2, made here, that a stage may touch."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = workshop.folder / "gpt2"
    shutil.rmtree(folder, ignore_errors=True)
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    with quiet_transformers():
        made = GPT2LMHeadModel(config)
        made.save_pretrained(folder)
    layers = sum(type(module).__name__ == "Conv1D" for module in made.modules())
    found = sum(weight.module == "Conv1D" for weight in open_model(folder).weights())
    return workshop.exact(found / layers, "share of layers", layers, "layers found in GPT-2")


# Grokfast and Muon


@probe("x")
def filter_gain(
    workshop: Workshop, filter: Literal["low", "high"], signal: Literal["constant", "alternating"], steps: Count = 500
) -> Measurement:
    """Root mean square of a filtered gradient over the plain one's, alpha 0.98, lambda 2, after so many steps.

    "low" is this project's, Grokfast's; "high" the documented one, g + lambda (g - running mean).
    """
    first = gaussian(1, 64)[0]
    mean = first.clone()
    for step in range(steps):
        gradient = -first if signal == "alternating" and step % 2 else first
        if filter == "low":
            out = mugrokfast.amplify_slow(gradient, mean, 0.98, 2.0)
        else:
            mean.lerp_(gradient, 0.02)
            out = gradient + 2.0 * (gradient - mean)
    value = math.sqrt(_squares(out) / _squares(first))
    return workshop.exact(value, "x", steps, "gain of a filter", filter=filter, signal=signal, alpha=0.98, lamb=2.0)


def _muons_step(gradient: torch.Tensor) -> torch.Tensor:
    """What MuGrokfast's Muon makes of a gradient at a learning rate of 1, without filter and decay, float64[rows, columns]:
    0.2 sqrt(max(rows, columns)) times the result of Newton-Schulz."""
    weight = nn.Parameter(torch.zeros_like(gradient))
    weight.grad = gradient
    MuGrokfast([{"params": [weight], "muon": True}], lr=1.0, momentum=0.0, weight_decay=0.0, lamb=0.0).step()
    return -weight.detach().double()


@probe("share of singular values")
def singular_values(workshop: Workshop, low: float, high: float) -> Measurement:
    """Share of singular values within low..high after Newton-Schulz, on 128 x 256 Gaussian matrices."""
    pairs = []
    for weight, _ in _weights(workshop, "gaussian", 128):
        found = torch.linalg.svdvals(_muons_step(weight)) / (0.2 * math.sqrt(max(weight.shape)))
        pairs.append((float(((found >= low) & (found <= high)).sum()), float(len(found))))
    n = int(sum(count for _, count in pairs))
    return _over(workshop, pairs, "share of singular values", n, "gaussian", "singular values", low=low, high=high)


@probe("root mean square")
def step_size(workshop: Workshop, rows: Count, columns: Count) -> Measurement:
    """Root mean square of Muon's scaled step, at a learning rate of 1, from Gaussian gradients."""
    steps = [_muons_step(weight) for weight, _ in _weights(workshop, "gaussian", rows, columns)]
    pairs = [(math.sqrt(_squares(step) / step.numel()), 1.0) for step in steps]
    return _over(workshop, pairs, "root mean square", rows * columns * len(pairs), "gaussian", "size of a step")


@probe("share of shapes")
def muon_shapes(workshop: Workshop, shapes: list[list[int]]) -> Measurement:
    """Share of shapes of which MuGrokfast's Muon makes a finite step that is not zero."""
    good = 0
    for shape in shapes:
        norm = _step_norm([torch.Size(shape)], [True], lr=0.1)
        good += math.isfinite(norm) and norm > 0
    return workshop.exact(good / len(shapes), "share of shapes", len(shapes), "Muon's steps")


@probe("norm of the step")
def step_at_zero_rate(workshop: Workshop) -> Measurement:
    """Norm of what one step of MuGrokfast changes at a learning rate of 0: a matrix by Muon, a vector by AdamW."""
    norm = _step_norm([torch.Size((64, 128)), torch.Size((64,))], [True, False], lr=0.0)
    return workshop.exact(norm, "norm of the step", 64 * 129, "one step at rate 0")


def _step_norm(shapes: Sequence[torch.Size], muon: Sequence[bool], lr: float) -> float:
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer = MuGrokfast([{"params": [p], "muon": m} for p, m in zip(parameters, muon, strict=True)], lr=lr)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    return math.sqrt(sum(_squares(after.detach() - old) for after, old in zip(parameters, before, strict=True)))
