"""The audit sees what is wrong: every fault of a table turns the named rows, which are green without it, red.

The faults are those that the audited repository had, or that one slip would make.  Rows are measured on a tiny model or
digits-mlp, so only such rows are named whose thresholds mean the same on any model.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from numba import njit

from agentforge import audit, chain, entropy, evaluation, registry, stages, tensorfiles
from agentforge.artifact import Artifact, Ratio
from agentforge.audit import claims, probes, record
from agentforge.audit import workshop as shops
from agentforge.audit.claims import Claim
from agentforge.bits import FLOATS
from agentforge.dashboard import runs
from agentforge.evaluation import Divergence, Measurement, Text, choices, find_text, intervals, likelihood, texts
from agentforge.models import LanguageModel
from agentforge.planes import Packed, Plane
from agentforge.stages import curves, rounding, seedlm, seedlm_search, ternary, trajectory, vptq
from agentforge.statistics import Calibration
from agentforge.training import mugrokfast, recover, student
from reports.claims_vs_measurements import paper, phase5
from reports.phase4_bitnet import training
from reports.phase8_compression import chain as chain_probes

CLAIMS: dict[str, Claim] = {
    claim.id: claim
    for file in ("phase4_bitnet", "claims_vs_measurements", "phase8_compression")
    for claim in audit.read_claims(file).claims
}
# Ids that both files have are phase 8's; these are phase 4's, under names of their own here.
CLAIMS |= {f"phase4/{claim.id}": claim for claim in audit.read_claims("phase4_bitnet").claims}
SOUND: dict[str, audit.Judged] = {}
Patch = Callable[[pytest.MonkeyPatch], None]


class Fault(NamedTuple):
    """patch: puts the fault in.  rows: claims that must turn from confirmed to refuted, or to an error that says `words`."""

    patch: Patch
    rows: tuple[str, ...]
    words: str = ""


def wrapped(owner: Any, name: str, around: Callable[..., Any]) -> Patch:
    """A patch that has `around(original, *args)` called in the place of owner.name(*args)."""

    def patch(to: pytest.MonkeyPatch) -> None:
        original = getattr(owner, name)
        to.setattr(owner, name, lambda *args, **more: around(original, *args, **more))

    return patch


def changed(packed: Packed, which: Callable[[Plane], bool], change: Callable[[torch.Tensor], torch.Tensor]) -> Packed:
    """The same planes, with other values in some of them."""
    planes = tuple(dataclasses.replace(p, values=change(p.values)) if which(p) else p for p in packed)
    return Packed(packed.shape, planes, packed.shared)


@njit
def shifts_left(seed: int, K: int, mask: int, states: np.ndarray) -> None:
    state = np.uint32(seed)
    for i in range(len(states)):
        bit, tapped = np.uint32(0), state & np.uint32(mask)
        while tapped:
            bit ^= tapped & np.uint32(1)
            tapped >>= np.uint32(1)
        state = ((state << np.uint32(1)) | bit) & np.uint32((1 << K) - 1)
        states[i] = state


def first_seeds_only(searcher: Any, *args: Any) -> Any:
    """Every second block gets the seed of the one before: a search that stopped at what it had."""
    search = searcher(*args)

    def searched(blocks: np.ndarray, h: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        seeds, codes = search(blocks, h)
        seeds[1::2] = seeds[:-1:2]
        return seeds, codes

    return searched


def next_index(dense: Any, stage: Any, packed: Packed, floats: Any) -> Any:
    books = {"indices": "codebook", "residual_indices": "residual_codebook"}
    shifted = packed
    for plane, book in books.items():
        if book in floats:
            k = floats[book].shape[2]
            shifted = changed(shifted, lambda p, plane=plane: p.name == plane, lambda v, k=k: (v.long() + 1) % k)
    return dense(stage, shifted, floats)


def other_floats(**factors: float) -> Callable[..., Any]:
    """Float planes multiplied by something at decoding; 0 for a plane that is forgotten."""

    def around(dense: Any, stage: Any, packed: Packed, floats: Any) -> Any:
        return dense(stage, packed, {name: value * factors.get(name, 1.0) for name, value in floats.items()})

    return around


def without_scale(dense: Any, stage: Any, packed: Packed, floats: Any) -> Any:
    dropped = {"scale": torch.ones_like, "mean": torch.zeros_like}
    return dense(stage, packed, {name: dropped.get(name, lambda v: v)(value) for name, value in floats.items()})


def band_of_04(encode: Any, stage: Any, weight: torch.Tensor, *rest: Any) -> Packed:
    """Zero where |w| < 0.4 gamma: what rounding gives for weights a quarter larger."""
    packed = encode(stage, weight * 1.25, *rest)
    return changed(packed, lambda p: p.name == "scale", lambda scale: scale / 1.25)


def reversed_points(matrices: Any, kind: str, degree: int, length: int) -> Any:
    fit, basis = matrices(kind, degree, length)
    return (fit, np.ascontiguousarray(basis[::-1])) if kind == "bezier" else (fit, basis)


def next_point(look_up: Any, indices: np.ndarray, centroid: Any, reaches: Any, lattice: Any, points: Any) -> None:
    look_up((indices + 1) % (int(lattice.box[0]) + 1), centroid, reaches, lattice, points)


def last_symbol_dropped(encode: Any, values: torch.Tensor, coding: str) -> bytes:
    values = values.clone()
    values.reshape(-1)[-1] = 0
    return bytes(encode(values, coding))


def scales_not_counted(to: pytest.MonkeyPatch) -> None:
    ratios = Artifact.ratios.fget  # type: ignore[attr-defined]

    def forgetful(artifact: Artifact) -> list[Ratio]:
        floats = 0
        for row in artifact.rows:
            packed = artifact.read(row)
            if isinstance(packed, Packed):
                floats += sum(p.stored().nbytes for p in packed if p.coding in FLOATS)
        return [
            dataclasses.replace(r, bytes=r.bytes - floats) if r.what == "touched tensors" else r for r in ratios(artifact)
        ]

    to.setattr(Artifact, "ratios", property(forgetful))


def failing_is_kept(attempt: Any, *args: Any) -> Any:
    row = attempt(*args)
    return {**row, "decision": "accepted"} if "measured" in row else row


def another_seed(to: pytest.MonkeyPatch) -> None:
    seeds, compress = itertools.count(), chain.compress
    to.setattr(chain, "compress", lambda *args, **more: compress(*args, seed=next(seeds), **more))


def padding_counted(measure: Any, losses: torch.Tensor, counts: torch.Tensor, *rest: Any) -> Any:
    return measure(losses, counts + 8, *rest)


def shifted_targets(scored: Any, *args: Any) -> Any:
    logits, targets = scored(*args)
    return logits, targets.roll(1)


def without_partner(register: Any, path: Path, *, uri: str, **more: Any) -> Any:
    found = register(path, uri=uri, **more)
    registry._client(uri).set_model_version_tag(found.name, str(found.packed), "dequantised_source", str(path))
    return found


def blind(run: Any, *args: Any) -> Any:
    """A scorer that ignores the model: every token is as likely as the next."""
    return [torch.zeros_like(logs).log_softmax(-1) for logs in run(*args)]


# Of the audit itself


def other_answer(probe: str, change: Callable[[Measurement], Measurement]) -> Patch:
    """A patch that changes what a probe answers."""
    original = probes.PROBES[probe]
    return lambda to: to.setitem(probes.PROBES, probe, lambda *args, **more: change(original(*args, **more)))


def by_name(file: Any, shop: Any, *args: Any) -> Path:
    """A cache that knows texts by their names."""
    nameless = dataclasses.replace(shop, text=Text(shop.text.name, shop.text.split, ""))
    return Path(file(nameless, *args))


def of_any_source(file: Any, *args: Any) -> Path:
    with mock.patch.object(shops, "source_sha256", return_value=""):
        return Path(file(*args))


def embedding_twice(to: pytest.MonkeyPatch) -> None:
    once = LanguageModel.parameters.fget  # type: ignore[attr-defined]

    def twice(model: LanguageModel) -> int:
        tied = "lm_head.weight" not in model.entries and model.entries.get("model.embed_tokens.weight")
        return int(once(model)) + (math.prod(tied.shape) if tied else 0)

    to.setattr(LanguageModel, "parameters", property(twice))


class Same(str):
    """A hash that is equal to every other one."""

    __slots__ = ()
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False


class Clipped(torch.autograd.Function):
    """A straight-through estimator that lets nothing through outside [-1, 1]."""

    @staticmethod
    def forward(context: Any, value: torch.Tensor, quantised: torch.Tensor, blend: float) -> torch.Tensor:
        context.save_for_backward(value)
        return torch.lerp(value, quantised.to(value.dtype), blend)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (value,) = context.saved_tensors
        return gradient * (value.abs() <= 1), None, None


def other_divergence(**changes: Callable[[Divergence], Measurement]) -> Patch:
    """A patch that takes a quantity of a divergence for another."""

    def around(measure: Any, *args: Any) -> Divergence:
        found: Divergence = measure(*args)
        return found._replace(**{name: change(found) for name, change in changes.items()})

    return wrapped(likelihood, "divergence_of", around)


def halved(ratio: Any, *args: Any, **more: Any) -> dict[str, Any]:
    """A standard error of half the size, and its interval."""
    found = ratio(*args, **more)
    if "interval" in found:
        low, high = (found["value"] + (end - found["value"]) / 2 for end in found["interval"])
        found |= {"stderr": found["stderr"] / 2, "interval": (low, high)}
    return dict(found)


def without_ends(within: Any, measured: Measurement, low: float, high: float) -> Any:
    return within(measured, math.nextafter(low, math.inf), math.nextafter(high, -math.inf))


def as_errors_are_refuted(judge: Any, *args: Any, **more: Any) -> audit.Judged:
    found: audit.Judged = judge(*args, **more)
    return dataclasses.replace(found, verdict="refuted") if found.verdict == "error" else found


def relabelled(kept: Any, before: dict[str, Any], *args: Any) -> Any:
    """Kept rows that claim to be of today's commit."""
    rows = kept(before, *args)
    return {key: one._replace(provenance={**one.provenance, **record.git_state()}) for key, one in rows.items()}


def reversed_kl(measure: Any, model: Any, original: Any, *args: Any, **more: Any) -> Any:
    found = measure([original], model[0], *args, **more)[0]
    there = measure(model, original, *args, **more)[0]
    return [there._replace(kl=found.kl)]


def bits_of_settings(shop: Any, stage: str) -> Measurement:
    rows = [row for row in shop.artifact(stage).rows if row["stage"]]
    bits = sum(Packed.bits.fget(shop.artifact(stage).read(row)) for row in rows)  # type: ignore[attr-defined]
    return shop.exact(bits / sum(math.prod(row["shape"]) for row in rows), "bits/weight", 1, "bits")


FAULTS: dict[str, Fault] = {
    "audit: it calibrates on the text it scores": Fault(
        lambda to: to.setattr(shops, "Calibration", partial(Calibration, find_text("selftext"))),
        ("self.calibration",),
    ),
    "calibration: the split that is measured on": Fault(
        lambda to: to.setattr(Calibration, "find", lambda _: find_text("selftext")), ("self.calibration",)
    ),
    "texts: the split that is calibrated on is scored": Fault(
        lambda to: to.setitem(texts.SPLITS, "selftext", ("calibration", "heldout")), ("self.calibration",)
    ),
    "audit: the highest is picked for the lowest": Fault(
        lambda to: to.setattr(phase5, "min", max, raising=False), ("self.lowest",)
    ),
    "audit: git is never dirty": Fault(
        wrapped(record, "git_state", lambda state, *args: {**state(*args), "dirty": False}), ("self.commit",)
    ),
    "audit: the cache knows texts by their names": Fault(wrapped(shops.Workshop, "_file", by_name), ("self.cache",)),
    "audit: the source is no part of the cache's key": Fault(
        wrapped(shops.Workshop, "_file", of_any_source), ("self.cache",)
    ),
    "audit: no accuracy is ever lost": Fault(
        other_answer("accuracy_drop", lambda m: dataclasses.replace(m, value=0.0)), ("self.drop",)
    ),
    "VPTQ: k-means of one iteration": Fault(lambda to: to.setattr(vptq, "ITERATIONS", 1), ("alignment.vptq",)),
    "models: a tied embedding counts twice": Fault(embedding_twice, ("self.parameters",)),
    "chain: a gate that only two errors more would fail": Fault(
        wrapped(chain.Condition, "decide", lambda decide, *args: decide(*args).replace("undecided", "passed")),
        ("features.gates",),
    ),
    "artifact: hashes of files are not compared": Fault(
        wrapped(tensorfiles, "sha256_file", lambda hash_of, *args: Same(hash_of(*args))), ("production.errors",)
    ),
    "training: the straight-through estimator is clipped": Fault(
        lambda to: to.setattr(student, "_StraightThrough", Clipped),
        ("phase4/components.ste", "phase4/algorithms.ste", "phase4/red.gradients"),
    ),
    "audit: the original is measured in place of what is on disk": Fault(
        wrapped(evaluation, "divergences", lambda measure, models, one, **more: measure([one] * len(models), one, **more)),
        ("self.divergence",),
    ),
    "divergence: KL the other way round": Fault(wrapped(evaluation, "divergences", reversed_kl), ("self.divergence",)),
    "divergence: agreement with the text in place of the original": Fault(
        other_divergence(top1=lambda d: d.accuracy), ("self.divergence",)
    ),
    "divergence: retention upside down": Fault(
        other_divergence(
            perplexity_retention=lambda d: dataclasses.replace(
                d.perplexity_retention, value=1 / d.perplexity_retention.value
            )
        ),
        ("self.divergence",),
    ),
    "divergence: the perplexities are swapped": Fault(
        other_divergence(perplexity=lambda d: d.original_perplexity, original_perplexity=lambda d: d.perplexity),
        ("self.divergence",),
    ),
    "sample: the first windows of the text": Fault(
        wrapped(likelihood, "_spread", lambda _, spans, wanted: spans), ("self.windows",)
    ),
    "errors: of tokens in place of windows": Fault(
        wrapped(likelihood, "_clusters", lambda clusters, windows: clusters(list(torch.cat(windows).split(1)))),
        ("self.errors",),
    ),
    "errors: half as large": Fault(wrapped(intervals, "ratio", halved), ("self.errors",)),
    "verdicts: by the value alone": Fault(
        lambda to: to.setattr(Measurement, "bounds", property(lambda m: (m.value, m.value))), ("self.verdicts",)
    ),
    "verdicts: thresholds are not included": Fault(
        wrapped(
            Measurement, "within", lambda within, m, low, high: within(m, math.nextafter(low, 9), math.nextafter(high, -9))
        ),
        ("self.verdicts", "self.lowest"),
    ),
    "verdicts: what fails is refuted": Fault(wrapped(claims, "judge", as_errors_are_refuted), ("self.verdicts",)),
    "record: kept rows get the last commit": Fault(wrapped(record, "_kept", relabelled), ("self.kept",)),
    "seeds: every draw is the first": Fault(
        wrapped(paper, "gaussian", lambda gaussian, rows, columns, seed: gaussian(rows, columns, 0)), ("self.seeds",)
    ),
    "seeds: training ignores its seed": Fault(
        wrapped(recover.Settings, "__init__", lambda init, *args, **more: init(*args, **{**more, "seed": 0})),
        ("self.seeds",),
    ),
    "divergence: what is kept is counted on other tokens": Fault(
        wrapped(intervals, "pairs", lambda pairs, top, bottom, *args: pairs(top, bottom.roll(1), *args)), ("self.errors",)
    ),
    "divergence: accuracies are swapped": Fault(
        other_divergence(accuracy=lambda d: d.original_accuracy, original_accuracy=lambda d: d.accuracy), ("self.errors",)
    ),
    "ratio: against half of the denominator": Fault(
        lambda to: to.setattr(Ratio, "ratio", property(lambda r: r.denominator_bytes / 2 / r.bytes)),
        ("self.parameters",),
    ),
    "bytes: bits come from settings": Fault(
        lambda to: to.setattr(chain_probes, "bits_per_weight", bits_of_settings), ("bytes.counted",)
    ),
    "speed: ours over theirs": Fault(
        wrapped(training, "_faster", lambda faster, shop, ours, theirs, *args: faster(shop, theirs, ours, *args)),
        ("self.speed",),
    ),
    "LFSR: a wrong tap": Fault(
        lambda to: to.setitem(seedlm_search.TAPS, 8, (0, 2, 3, 5)),
        ("alignment.seedlm", "features.seedlm_generation", "working.seedlm"),
    ),
    "LFSR: shifted the other way": Fault(
        lambda to: to.setattr(seedlm_search, "_run", shifts_left), ("alignment.seedlm", "features.seedlm_generation")
    ),
    "LFSR: the seed counts as the first state": Fault(
        wrapped(seedlm_search, "lfsr", lambda lfsr, K, seed, count: np.concatenate([[seed], lfsr(K, seed, count)[:-1]])),
        ("features.seedlm_lfsr", "features.seedlm_generation"),
    ),
    "SeedLM: the search stops early": Fault(wrapped(seedlm, "_searcher", first_seeds_only), ("features.seedlm_learned",)),
    "SeedLM: the exponent is off by one at decoding": Fault(
        wrapped(seedlm.SeedLM, "_decode", lambda decode, stage, packed: 2 * decode(stage, packed)),
        ("features.seedlm_decompression", "alignment.seedlm_error_4"),
    ),
    "VPTQ: the index is off by one at decoding": Fault(
        wrapped(vptq.Vptq, "dense", next_index),
        ("features.vptq_pipeline", "features.vptq_product", "features.vptq_residual"),
    ),
    "VPTQ: scale and mean are dropped": Fault(
        wrapped(vptq.Vptq, "dense", without_scale), ("features.vptq_product", "features.vptq_residual")
    ),
    "VPTQ: the second codebook is forgotten": Fault(
        wrapped(vptq.Vptq, "dense", other_floats(residual_codebook=0.0)), ("features.vptq_residual", "missing.product")
    ),
    "VPTQ: k-means stays where it starts": Fault(lambda to: to.setattr(vptq, "ITERATIONS", 0), ("alignment.vptq",)),
    "VPTQ: errors are passed on with the wrong sign": Fault(
        wrapped(vptq, "_factor", lambda factor, problem: -factor(problem)), ("alignment.vptq_second_order",)
    ),
    "ternary: the scale is dropped": Fault(
        wrapped(ternary.Ternary, "_decode", lambda decode, stage, packed: decode(stage, packed).sign()),
        ("phase4/components.scaling",),
    ),
    "ternary: a zero band of 0.4": Fault(wrapped(ternary.Ternary, "_encode", band_of_04), ("phase4/features.ste",)),
    "rounding: the zero point is dropped": Fault(
        wrapped(rounding.Rounding, "dense", other_floats(minimum=0.0)), ("features.rollback",)
    ),
    "trajectory: the index is off by one": Fault(
        wrapped(trajectory, "_look_up", next_point), ("alignment.hypercompression", "alignment.hypercompression_nearest")
    ),
    "curves: control points in reverse": Fault(
        wrapped(curves, "_matrices", reversed_points),
        ("features.hyper_framework", "features.hyper_fitting_smooth", "features.hyper_evaluation"),
    ),
    "entropy coding: the last symbol is dropped": Fault(
        wrapped(entropy, "encode", last_symbol_dropped), ("rivals.hyper_entropy_lossless",)
    ),
    "bytes: the scales are not counted": Fault(scales_not_counted, ("bytes.counted",)),
    "chain: a gate that always passes": Fault(
        lambda to: to.setattr(chain.Condition, "decide", lambda *_: "passed"), ("features.gates",)
    ),
    "chain: the failing artifact is kept": Fault(
        wrapped(chain._Run, "_attempt", failing_is_kept), ("features.rollback", "short.testing")
    ),
    "chain: another seed after a kill": Fault(another_seed, ("production.memory",)),
    "stages: NaN becomes zero": Fault(
        wrapped(
            stages.Stage, "encode", lambda encode, stage, w, *rest, **more: encode(stage, w.nan_to_num(), *rest, **more)
        ),
        ("production.stability",),
    ),
    "artifact: nothing is checked": Fault(
        lambda to: to.setattr(Artifact, "verify", lambda _: ["everything"]), ("production.errors",)
    ),
    "registry: the dequantised form is the packed one": Fault(
        wrapped(registry, "register", without_partner), ("features.registry", "recommendations.registry")
    ),
    "registry: the base is the artifact itself": Fault(
        wrapped(registry, "_lineage", lambda lineage, client, a: {**lineage(client, a), "base_sha256": a.sha256}),
        ("features.registry",),
    ),
    "Grokfast: the opposite filter": Fault(
        wrapped(mugrokfast, "amplify_slow", lambda slow, g, ema, alpha, lamb: (2 + lamb) * g - slow(g, ema, alpha, lamb)),
        ("features.grokfast",),
    ),
    "dashboard: every measurement is shown as the same number": Fault(
        lambda to: to.setattr(runs, "shown", lambda _: "0.5"), ("missing.dashboard",)
    ),
    "perplexity: padding is counted": Fault(wrapped(likelihood, "_perplexity", padding_counted), ("phase4/red.perplexity",)),
    "Phase 5: the scorer ignores the model": Fault(wrapped(choices, "_run", blind), ("missing.phase5", "short.phase5")),
    "Phase 5: targets are off by one": Fault(
        wrapped(choices, "_run", lambda run, *args: [logs.roll(1, 0) for logs in run(*args)]),
        ("missing.phase5", "short.phase5"),
    ),
    "perplexity: targets are off by one": Fault(wrapped(likelihood, "_scored", shifted_targets), ("phase4/red.perplexity",)),
}


def caches_cleared() -> None:
    """What was computed with a fault, or without it, is not taken for the other."""
    for function in (seedlm_search.tables_of, curves._matrices, trajectory._lattice):
        function.cache_clear()


def judged(row: str, model: Path, folder: Path) -> audit.Judged:
    """The row as an audit would have it."""
    workshop = audit.workshop_for(str(model), folder, "selftext", 127, 128)
    workshop.effort = shops.EFFORTS["smoke"]
    taken = record.take(workshop, CLAIMS[row])
    return audit.judge(CLAIMS[row], taken.measured, taken.failure, taken.missing)


@pytest.mark.parametrize("name", FAULTS)
def test_the_fault_turns_its_rows_red(name: str, wide_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row whose probe fails says nothing about its claim: it counts only if the failure names the fault."""
    fault = FAULTS[name]
    for row in fault.rows:
        # Rows of one probe and one set of thresholds are one measurement.
        key = f"{CLAIMS[row].probe} {CLAIMS[row].parameters} {CLAIMS[row].confirmed}"
        if key not in SOUND:
            SOUND[key] = judged(row, wide_llama, tmp_path / f"sound-{row.replace('/', '-')}")
        assert SOUND[key].verdict == "confirmed", f"{row} without any fault: {SOUND[key]}"
    caches_cleared()
    try:
        with monkeypatch.context() as context:
            fault.patch(context)
            found = {row: judged(row, wide_llama, tmp_path / f"fault-{row.replace('/', '-')}") for row in fault.rows}
    finally:
        caches_cleared()
    for row, one in found.items():
        assert one.verdict == ("error" if fault.words else "refuted"), f"{row}: {one}"
        assert fault.words in one.failure


def test_the_rows_are_claims_of_the_audits() -> None:
    assert len(FAULTS) >= 12
    assert all(CLAIMS[row].probe for fault in FAULTS.values() for row in fault.rows)
