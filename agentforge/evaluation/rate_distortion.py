"""Relative squared error against bits per weight, for any stage, beside what theory allows.

Three curves for independent Gaussian weights of unit variance frame every measurement:

* Shannon's bound D = 2**(-2 R) (Shannon 1959, section 6; Cover and Thomas, theorem 10.3.2): no coder of R bits per weight
  has a smaller mean squared error, however long its blocks.  Weights of another distribution and the same variance may
  fall below it: of all distributions, the Gaussian is the hardest.
* Lloyd and Max (Max 1960, table I): the best quantiser that looks at one weight at a time and spends log2(levels) bits.
* the best uniform quantiser (Max 1960, table II): the same with equally spaced levels, which is what rounding is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from ..bits import tensor_bytes
from ..errors import BadInput
from ..stages import Stage, parse
from ..stages.base import Layer
from ..statistics import InputStatistics
from . import intervals
from .measurement import Measurement

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = np.ndarray[Any, Any]
MOST_LEVELS = 512


class Quantiser(NamedTuple):
    """levels: what a value is replaced by, ascending, float64[n].  error: mean squared error on a unit Gaussian."""

    levels: Array
    error: float


@dataclass(frozen=True)
class Row:
    """What one stage costs and loses on one weight.

    bits: of all planes as they are stored, a weight.  coded_bits: the same after entropy coding.  error: relative
    squared error, |W - decoded|^2 / |W|^2, with its standard error over the weight's rows.
    """

    stage: str
    weight: str
    bits: Measurement
    coded_bits: Measurement
    error: Measurement

    @property
    def above_shannon(self) -> float:
        """Coded bits per weight beyond what Shannon's bound asks for this error on Gaussian weights."""
        return self.coded_bits.value + math.log2(max(self.error.value, 1e-300)) / 2

    def to_json(self) -> dict[str, Any]:
        """All fields, ready for json.dump."""
        return dataclasses.asdict(self)


def shannon(bits: float) -> float:
    """The least mean squared error of any coder of unit Gaussian values at this many bits per value."""
    return math.exp2(-2 * bits)


def lloyd_max(levels: int) -> Quantiser:
    """The quantiser of least squared error on a unit Gaussian: every level is the mean of what is nearest to it.

    Newton's method on that condition, from the asymptotic density of levels, that of a Gaussian of variance 3 (Panter
    and Dite 1951); levels are exact to 1e-9.  Raises BadInput for a number of levels outside 1 to 512.
    """
    x = math.sqrt(3) * _quantiles(levels)
    for _ in range(50):
        mass, moment, inner = _cells(x)
        mean, ends = moment / mass, np.concatenate([[0.0], inner, [0.0]])
        density = np.exp(-ends * ends / 2) / math.sqrt(2 * math.pi)
        # How the mean moves with the lower and upper end of its cell, each of which moves half as far as a level.
        lower = (density[:-1] * (mean - ends[:-1]) / mass)[1:] / 2
        upper = (density[1:] * (ends[1:] - mean) / mass)[:-1] / 2
        own = np.concatenate([[0.0], lower]) + np.concatenate([upper, [0.0]])
        step = np.linalg.solve(np.diag(1 - own) - np.diag(lower, -1) - np.diag(upper, 1), mean - x)
        x = x + step
        if abs(step).max() < 1e-12:
            break
    x = (x - x[::-1]) / 2  # symmetric to the last bit
    return Quantiser(x, 1 - float((_cells(x)[0] * x * x).sum()))


def uniform(levels: int) -> Quantiser:
    """The quantiser with equally spaced levels of least squared error on a unit Gaussian.

    Golden section search over the spacing.  Raises BadInput for a number of levels outside 1 to 512.
    """
    grid = np.arange(levels) - (levels - 1) / 2
    _quantiles(levels)  # refuses a number of levels

    def error(spacing: float) -> float:
        x = grid * spacing
        mass, moment, _ = _cells(x)
        return 1 - float((x * (2 * moment - mass * x)).sum())

    ratio = (math.sqrt(5) - 1) / 2
    low, high = 1e-3 / levels, 4.0
    while high - low > 1e-9:
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, b) if error(a) < error(b) else (a, high)
    return Quantiser(grid * low, error(low))


def _quantiles(levels: int) -> Array:
    if not 1 <= levels <= MOST_LEVELS:
        raise BadInput(f"levels={levels}; expected 1 to {MOST_LEVELS}")
    return np.array([NormalDist().inv_cdf((k + 0.5) / levels) for k in range(levels)])


def _cells(levels: Array) -> tuple[Array, Array, Array]:
    """Of what is nearest to each level on a unit Gaussian: the mass, and the integral of x; and the inner thresholds."""
    inner = (levels[1:] + levels[:-1]) / 2
    density = np.concatenate([[0.0], np.exp(-inner * inner / 2) / math.sqrt(2 * math.pi), [0.0]])
    # Both tails from their own side, so that the mass far out is not a difference of numbers near one.
    below = np.array([0.0, *(math.erfc(-t / math.sqrt(2)) / 2 for t in inner), 1.0])
    above = np.array([1.0, *(math.erfc(t / math.sqrt(2)) / 2 for t in inner), 0.0])
    mass = np.where(levels > 0, above[:-1] - above[1:], below[1:] - below[:-1])
    return mass, density[:-1] - density[1:], inner


def gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Independent weights of the unit Gaussian: float32[rows, columns]."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((rows, columns), dtype=np.float32))


def measure(
    stages: Sequence[Stage | str],
    weights: Mapping[str, torch.Tensor],
    stats: Mapping[str, InputStatistics] | None = None,
    seed: int = 0,
) -> list[Row]:
    """Bits, coded bits and relative squared error of every stage on every weight, float[out, in], decoded from its planes.

    stats: input statistics, for the weights that have them.  Planes that a stage shares between weights are
    shared by all of `weights`, and their bits are charged in proportion to a weight's size.
    """
    stats = stats or {}
    layers = [Layer(name, lambda w=weight: w.to(torch.float32), stats.get(name)) for name, weight in weights.items()]  # type: ignore[misc]
    whole = sum(weight.numel() for weight in weights.values())
    rows = []
    for stage in (parse(stage) if isinstance(stage, str) else stage for stage in stages):
        shared = stage.fit_shared(layers, seed) if stage.shared_layout() else None
        for layer in layers:
            weight = layer.load()
            packed = stage.encode(weight, layer.stats, seed, name=layer.name, shared=shared)
            bits, coded = packed.bits / weight.numel(), 8 * packed.coded_bytes / weight.numel()
            if shared is not None:
                bits, coded = bits + shared.bits / whole, coded + 8 * shared.coded_bytes / whole
            rows.append(_row(stage, layer.name, weight, stage.decode(packed), bits, coded, seed))
    return rows


def _row(stage: Stage, name: str, weight: torch.Tensor, back: torch.Tensor, bits: float, coded: float, seed: int) -> Row:
    w, d = weight.numpy().astype(np.float64), back.numpy().astype(np.float64)
    top = float(abs(w).max()) or 1.0  # squares of 1e-200 would vanish
    lost, power = (((d - w) / top) ** 2).sum(1), ((w / top) ** 2).sum(1)
    error = intervals.ratio(torch.from_numpy(lost), torch.from_numpy(power), len(w), f"{len(w)} rows")
    if not power.sum():
        error = {"value": float(lost.any()), "stderr": None, "n": len(w)}
    about = {"weight": name, "shape": list(w.shape), "stage": stage.to_json()}
    inputs = {"weight_sha256": hashlib.sha256(tensor_bytes(weight)).hexdigest()}

    def taken(unit: str, metric: str, found: dict[str, Any]) -> Measurement:
        return Measurement(unit=unit, protocol={"metric": metric, **about}, seed=seed, inputs=inputs, **found)

    def exact(value: float) -> dict[str, Any]:
        return {"value": value, "stderr": None, "n": w.size}

    return Row(
        str(stage),
        name,
        taken("bits/weight", "bits of all planes", exact(bits)),
        taken("bits/weight", "bits of all planes, entropy coded", exact(coded)),
        taken("share of squared weights", "relative squared error", error),
    )


def plot(rows: Sequence[Row]) -> Figure:
    """Relative squared error against bits per weight: full markers as stored, hollow ones coded.

    One colour per stage, one marker per weight.

    Needs matplotlib (pip install "agentforge[lab]"); raises BadInput if it is missing or there is no row.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
    except ImportError:
        raise BadInput('plot: matplotlib is missing; pip install "agentforge[lab]"') from None
    if not rows:
        raise BadInput("plot: there are no rows; measure some first")
    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(row.stage.partition(":")[0] for row in rows))
    weights = list(dict.fromkeys(row.weight for row in rows))
    for row in rows:
        colour, marker = f"C{names.index(row.stage.partition(':')[0])}", "osD^vP*X<>"[weights.index(row.weight) % 10]
        y, spread = max(row.error.value, 1e-12), row.error.stderr
        axes.plot([row.coded_bits.value, row.bits.value], [y, y], color=colour, lw=0.7)
        axes.errorbar(row.bits.value, y, spread, color=colour, marker=marker)
        axes.plot(row.coded_bits.value, y, color=colour, marker=marker, mfc="white", ls="")
    most = 0.5 + max(4.0, *(row.bits.value for row in rows))
    line = np.linspace(0, most, 200)
    curves = axes.plot(line, [shannon(r) for r in line], "k-", label="Shannon's bound (unit Gaussian)")
    levels = [k for k in (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256) if math.log2(k) <= most]
    best = [lloyd_max(count).error for count in levels]
    curves += axes.plot(np.log2(levels), best, "k--", label="Lloyd and Max (unit Gaussian)")
    axes.set(xlabel="bits per weight", ylabel="relative squared error", yscale="log", xlim=(0, None))
    handles = [Line2D([], [], color=f"C{i}", marker="o", ls="", label=name) for i, name in enumerate(names)]
    handles += [Line2D([], [], color="grey", marker="osD^vP*X<>"[i % 10], ls="", label=w) for i, w in enumerate(weights)]
    handles.append(Line2D([], [], color="grey", marker="o", mfc="white", ls="", label="entropy coded"))
    axes.legend(handles=[*curves, *handles], fontsize="small")
    figure.suptitle(_finding(rows, np.log2(levels), np.log2(best)), fontsize="medium", wrap=True)
    return figure


def _finding(rows: Sequence[Row], bits: Array, log_error: Array) -> str:
    """The plot in a sentence: who comes nearest to the bound, and how many beat the best quantiser of single weights."""
    nearest = min(rows, key=lambda row: row.above_shannon)
    below = [row for row in rows if row.error.value < 2 ** np.interp(row.bits.value, bits, log_error)]
    return (
        f"Nearest to Shannon's bound, once coded: {nearest.stage} on {nearest.weight}, {nearest.above_shannon:.2f} bits per "
        f"weight above it; as stored, {len(below)} of {len(rows)} points lie below Lloyd and Max."
    )
