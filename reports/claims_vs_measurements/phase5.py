"""Probes of the Phase 5 checks: whether they measure, and what a compressed model keeps of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch

from agentforge.audit.probes import Share, StageText, probe
from agentforge.audit.workshop import Unmeasured, Workshop
from agentforge.evaluation import Measurement, edge_of_chaos, eudaimonia, intervals
from agentforge.evaluation.choices import likelihoods
from agentforge.evaluation.phase5 import RULES, eudaimonia_items, right_answers
from agentforge.evaluation.questions import CHANCE, questions
from agentforge.models import LanguageModel
from agentforge.opening import load

ASKED = {"smoke": (4, 40), "standard": (8, 160), "full": (12, 400)}  # questions per level, and at the level found
TOLERANCE = 1e-3  # nats, between likelihoods of one text computed in two ways


@probe("share of checks", slow=True)
def phase5_checks(workshop: Workshop) -> Measurement:
    """Share of the five checks, edge of chaos and four rules, that give a value with its error and whose log-likelihoods a
    second computation, one text at a time by transformers' own loss, gives as well."""
    model = workshop.model
    edge = Measurement(**_edge(workshop, None)["accuracy"])
    scores = _rules(workshop, None)
    sound = {"edge of chaos": _is_sound(model, edge, [(q.prompt, q.options) for q in questions(30, 4)])}
    for rule in RULES:
        items = [item for item in eudaimonia_items() if item.rule == rule][:2]
        sound[rule] = _is_sound(model, scores[rule], [(i.situation, (f" {i.keeps}", f" {i.breaks}")) for i in items])
    lacking = [name for name, good in sound.items() if not good]
    return workshop.exact(
        1 - len(lacking) / len(sound), "share of checks", len(sound), "checks that measure", lacking=lacking
    )


@probe("share of answers", slow=True)
def edge_accuracy(workshop: Workshop, stage: StageText | None = None) -> Measurement:
    """Share of answers right at the original's edge of chaos: of the original, or of the model compressed with `stage`."""
    found = _edge(workshop, stage)
    return Measurement(**found["accuracy"])


@probe("share")
def edge_kept(workshop: Workshop, stage: StageText) -> Measurement:
    """Share of the original's accuracy at its edge of chaos that the model compressed with `stage` keeps, in pairs."""
    return Measurement(**_edge(workshop, stage)["retention"])


@probe("share of answers", slow=True)
def edge_of_what_passes(workshop: Workshop, stages: list[StageText], least: Share) -> Measurement:
    """Lowest share of answers right at the original's edge of chaos, among the stages that keep at least `least` of the
    original's; what each of them keeps stands in the protocol."""
    found = {stage: _edge(workshop, stage) for stage in stages}
    passing = {stage: one["accuracy"] for stage, one in found.items() if one["retention"]["value"] >= least}
    kept = {stage: one["retention"]["value"] for stage, one in found.items()}
    if not passing:
        raise Unmeasured(f"a stage that keeps {least:.0%} of the answers")
    lowest = Measurement(**min(passing.values(), key=lambda one: float(one["value"])))
    about = {**lowest.protocol, "metric": "lowest accuracy that passes", "least": least, "kept": kept}
    return dataclasses.replace(lowest, protocol=about)


@probe("share of items")
def lowest_rule(workshop: Workshop, stage: StageText | None = None) -> Measurement:
    """The lowest of the four rules' scores: of the original, or of the model compressed with `stage`."""
    return min(_rules(workshop, stage).values(), key=lambda score: score.value)


def _rules(workshop: Workshop, stage: str | None) -> dict[str, Measurement]:
    """The scores of the four rules, of the original or of the model compressed with `stage`; remembered."""

    def scores() -> dict[str, Any]:
        model = workshop.model if stage is None else load(workshop.artifact(stage).path)
        found = eudaimonia(workshop.on_device(model), progress=False).score
        return {"scores": {rule: score.to_json() for rule, score in found.items()}}

    found = workshop.remember("eudaimonia", {"stage": stage}, scores)["scores"]
    return {rule: Measurement(**score) for rule, score in found.items()}


def _edge(workshop: Workshop, stage: str | None) -> dict[str, Any]:
    """accuracy at the original's edge of chaos, and what is kept of the original's, as JSON; remembered."""
    per_level, count = ASKED[workshop.effort.name]

    def originals() -> dict[str, Any]:
        found = edge_of_chaos(workshop.on_device(workshop.model), per_level=per_level, items=2, progress=False)
        hits = right_answers(workshop.model, questions(found.at, count, 1), progress=False)
        return {"level": found.level.to_json(), "at": found.at, "hits": hits.tolist()}

    before = workshop.remember("edge of chaos", {}, originals)
    hits = before["hits"]

    def theirs() -> dict[str, Any]:
        assert stage is not None
        compressed = workshop.on_device(load(workshop.artifact(stage).path))
        return {"hits": right_answers(compressed, questions(before["at"], count, 1), progress=False).tolist()}

    if stage is not None:
        hits = workshop.remember("edge of chaos", {"stage": stage}, theirs)["hits"]
    mine, first = (torch.tensor(values, dtype=torch.float64) for values in (hits, before["hits"]))
    protocol = {
        "level": before["at"],
        "level_stderr": before["level"]["stderr"],
        "on_scale": before["level"]["protocol"]["on_scale"],
        "chance": CHANCE,
        "stage": stage,
    }
    inputs = {"model": workshop.model.fingerprint}
    kept = Measurement(
        unit="share",
        protocol={**protocol, "metric": "accuracy / original accuracy"},
        inputs=inputs,
        **intervals.pairs(mine, first),
    )
    about = {**protocol, "metric": "accuracy at the original's edge of chaos"}
    accuracy = Measurement(unit="share of answers", protocol=about, seed=0, inputs=inputs, **intervals.share(mine))
    return {"accuracy": accuracy.to_json(), "retention": kept.to_json()}


def _is_sound(model: LanguageModel, score: Measurement, asked: Sequence[tuple[str, Sequence[str]]]) -> bool:
    """Whether a score has a finite error, and differences between options are those of transformers' own losses."""
    if score.stderr is None or not math.isfinite(score.value + score.stderr):
        return False
    for (prompt, options), scored in zip(asked, likelihoods(model, asked), strict=True):
        theirs = torch.tensor([_by_loss(model, prompt + option) for option in options], dtype=torch.float64)
        ours = scored.sums
        if not torch.allclose(ours - ours[0], theirs - theirs[0], rtol=0, atol=TOLERANCE):
            return False
    return True


def _by_loss(model: LanguageModel, text: str) -> float:
    """The log-likelihood of a text's tokens after the first."""
    ids = torch.tensor([model.encode(text, special=True)], device=model.model.device)
    with torch.inference_mode():
        return -float(model.model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
