"""What each ingredient of `fit` is worth: one at a time is taken away, on texts of four kinds.

    python benchmarks/ablation.py [--model smollm2-135m] [--bits 2.0] [--work FOLDER] [--out reports/ablation]

The model is fitted to --bits per weight of its linear layers, with everything that `fit` does by default.  Each other row is
the same allocation, but for what its name says; embedding and head stay.  What is on disk is loaded back and measured on
2,044 tokens each of WikiText-2, of selftext that nothing was calibrated on, of GSM8K (sums in words, with their solutions)
and of HellaSwag (instructions and captions, with their right endings).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import operator
import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import bench
from scipy.stats import spearmanr

import agentforge as af
from agentforge import __version__, evaluation, stages
from agentforge.allocation import FINER, LADDER, Candidate, allocate, candidates, finer
from agentforge.evaluation import Text, find_text, taskfiles
from agentforge.models import SAMPLED, LanguageModel
from agentforge.opening import open_model
from agentforge.stages.base import InputStatistics
from agentforge.stages.tcq import COARSER, TCQ
from agentforge.statistics import FOR_FIT, TOKENS, Calibration, Collected, collect

SCORED = 2044
EVERYTHING = "everything"
SLOPE = 2.1  # octaves of KL per bit, between 2.0 and 2.6 bits of reports/fit
Plan = dict[str, TCQ]


def unchanged(stage: TCQ) -> stages.Stage:
    """The stage itself."""
    return stage


def scalar(stage: TCQ) -> stages.Stage:
    """`ecsq` in about as many bits."""
    return stages.get("ecsq", step=2 * stage.step * (1 + COARSER * stage.step**2))


class Variant(NamedTuple):
    """tokens: of calibration text.  change: of each weight's stage.  without: what is not known of outputs.  alike: one
    step."""

    tokens: int = FOR_FIT.tokens
    change: Callable[[TCQ], stages.Stage] = unchanged
    without: tuple[str, ...] = ()
    alike: bool = False


VARIANTS = {
    EVERYTHING: Variant(),
    f"{TOKENS:,} tokens of text, not {FOR_FIT.tokens:,}": Variant(tokens=TOKENS),
    "values one by one (`ecsq`), no trellis": Variant(change=scalar),
    "a trellis of 32 states, not 8": Variant(change=partial(dataclasses.replace, states=32)),
    "rows of queries and keys on their own": Variant(without=("curvature",)),
    "outputs all count alike: no backward passes": Variant(without=("sensitivity", "curvature")),
    "inputs not looked at: no feedback, one step per row": Variant(change=partial(dataclasses.replace, damping=1e6)),
    "the same step for all layers: no allocation": Variant(alike=True),
}


def texts() -> dict[str, Text]:
    """By their names."""
    found = {name: find_text(name, split) for name, split in (("wikitext2", "test"), ("selftext", "heldout"))}
    for name, put in (
        ("gsm8k", lambda row: f"{row['question']}\n{row['answer']}"),
        ("hellaswag", lambda row: f"{row['query']} {row['choices'][row['label']]}"),
    ):
        questions = taskfiles.find(name)
        assert questions is not None, f"{name} is not in the folders of data"
        found[name] = Text(
            name, "questions", "\n\n".join(map(put, next(iter(questions.splits[""].values())))), questions.origin
        )
    return found


class Bench:
    """A model, and what is known of it."""

    def __init__(self, model: LanguageModel, bits: float, work: Path) -> None:
        self.model, self.bits, self.work, self.texts = model, bits, work, texts()
        self.parameters = {weight.name: math.prod(weight.shape) for weight in model.weights()}

    def calibration(self, tokens: int) -> Calibration:
        """Of so much text."""
        return dataclasses.replace(FOR_FIT, tokens=tokens).for_stage(LADDER[0]).for_model(self.model)

    @functools.lru_cache  # noqa: B019  (one model per process)
    def statistics(self, tokens: int) -> Collected:
        """Of so many tokens."""
        return collect(self.model, self.calibration(tokens))

    @functools.cached_property
    def priced(self) -> dict[str, list[Candidate]]:
        """What `fit` chooses from."""
        found = candidates(self.model, self.statistics(FOR_FIT.tokens), self.calibration(FOR_FIT.tokens))
        return {name: finer(one) for name, one in found.items()}

    def plan(self, alike: bool) -> Plan:
        """A stage for each weight, in about the bits that were asked for."""
        if not alike:
            budget = int(self.bits * sum(self.parameters.values()) / 8)
            found = allocate(self.priced, budget)
            return {name: one.stage for name, one in found.items() if isinstance(one.stage, TCQ)}
        whole = sum(self.parameters.values())
        bits = [8 * sum(found[FINER * i].bytes for found in self.priced.values()) / whole for i in range(len(LADDER))]
        for (more, fine), (less, coarse) in itertools.pairwise(zip(bits, LADDER, strict=True)):
            if less <= self.bits <= more:
                step = fine.step * (coarse.step / fine.step) ** ((more - self.bits) / (more - less))
                return dict.fromkeys(self.parameters, TCQ(step=step))
        raise ValueError(f"{self.bits} bits: the ladder goes from {bits[-1]:.2f} to {bits[0]:.2f}")

    def measure(self, name: str) -> bench.Row:
        """Bits on disk, and KL on each text."""
        variant, out = VARIANTS[name], self.work / "variant"
        plan = {weight: variant.change(stage) for weight, stage in self.plan(variant.alike).items()}
        seen: Mapping[str, InputStatistics] = self.statistics(variant.tokens)
        if variant.without:
            unknown: dict[str, Any] = dict.fromkeys(variant.without)
            seen = {name: dataclasses.replace(one, **unknown) for name, one in seen.items()}
        about: dict[str, Any] = {"calibration": self.calibration(variant.tokens), "statistics": seen, "overwrite": True}
        artifact = af.compress(self.model, plan, out, **about)
        planes = sum(row["bytes"] for row in artifact.rows if row["name"] in self.parameters)
        made: bench.Row = {"bits": 8 * planes / sum(self.parameters.values()), "kl": {}}
        loaded = af.load(out)
        for text, found in self.texts.items():
            kl = evaluation.divergence(loaded, self.model, found, SAMPLED, tokens=SCORED, progress=False).kl
            made["kl"][text] = kl.to_json()
        shutil.rmtree(out)
        return made


def report(rows: list[bench.Row]) -> str:
    """The table and what it says."""
    base = next(row for row in rows if row["recipe"]["name"] == EVERYTHING)
    names = list(base["kl"])

    def factor(row: bench.Row, text: str) -> float:
        """Of KL at the base's bits, against the base."""
        at_equal_bits = row["kl"][text]["value"] * 2 ** (SLOPE * (row["bits"] - base["bits"]))
        return float(at_equal_bits / base["kl"][text]["value"])

    def cells(row: bench.Row, text: str) -> str:
        return bench.with_error(row["kl"][text], ".3f", ".3f") + ("" if row is base else f" (x {factor(row, text):.2f})")

    lines = [[row["recipe"]["name"], f"{row['bits']:.3f}", *(cells(row, text) for text in names)] for row in rows]
    factors = [[factor(row, text) for row in rows] for text in names]
    alike = [spearmanr(factors[0], each).statistic for each in factors[1:]]
    ranks = ", ".join(f"{rank:.2f} with {name}" for rank, name in zip(alike, names[1:], strict=True))
    text = f"""
        # What each ingredient is worth

        smollm2-135m, dequantised Q4_1, fitted to {base["recipe"]["bits"]:g} bits per weight of its linear layers on disk.
        Each other row is the same allocation, but for what its name says.  KL(original || compressed), nats per token, on
        {base["kl"][names[0]]["n"]:,} tokens of each text in windows of {SAMPLED}, with its standard error (of windows);
        in brackets the factor of KL at as many bits (KL halves in {1 / SLOPE:.2f} bits).  All models saw the same tokens, so
        that factors are far surer than each KL.  Still, encoding once more, with nothing changed that matters, moves KL by
        some 3%: a factor from .97 to 1.03 says nothing.

        {bench.table(" | ".join(["what", "bits", *names]), lines, "lr")}

        Rank correlation of {names[0]}'s factors (Spearman): {ranks}.
    """
    return bench.page(text)


def main(arguments: list[str] | None = None) -> None:
    own = {"bits": 2.0, "work": Path(tempfile.gettempdir()) / "agentforge-ablation"}
    options = bench.options(arguments, __doc__, "reports/ablation", model=bench.MODEL, **own)
    file = options.out / "ablation.json"
    if not options.report:
        model = open_model(options.model)
        options.work.mkdir(parents=True, exist_ok=True)
        here = Bench(model, options.bits, options.work)
        about = {"bits": options.bits, "model": model.fingerprint, "agentforge": __version__, "tokens": SCORED}
        about |= {"heads": True, "finer": FINER}
        about["texts"] = {name: text.sha256 for name, text in here.texts.items()}
        wanted = {
            n: {"name": n} | about | {"calibration": here.calibration(v.tokens).to_json()} for n, v in VARIANTS.items()
        }

        def keep(rows: list[bench.Row]) -> None:
            bench.save(options.out, {file.name: rows})

        bench.run(bench.read(file), wanted, here.measure, keep, operator.itemgetter("name"))
    bench.save(options.out, {"ablation.md": report(bench.read(file))})


if __name__ == "__main__":
    main()
