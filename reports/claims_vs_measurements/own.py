"""Probes of the audit itself: each checks a part that other rows rest on against something that shares no code with it.

They run the audit's own code, with inputs of which the right answer is known: texts, repositories, models and scores that
are made here, or a second computation by hand.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import math
import subprocess
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch

from agentforge import evaluation, statistics
from agentforge.audit import claims, record
from agentforge.audit import workshop as shops
from agentforge.audit.claims import Claim, ClaimsFile
from agentforge.audit.probes import StageText, probe, run, share
from agentforge.audit.workshop import Unmeasured, Workshop
from agentforge.digits import data as digits_data
from agentforge.errors import AgentForgeError
from agentforge.evaluation import Measurement, likelihood
from agentforge.models import LanguageModel, quiet_transformers
from agentforge.opening import open_model
from agentforge.pipeline import compress
from agentforge.training.phase import Phase

from ..phase4_bitnet import training
from ..phase4_bitnet.ternary import short_text
from ..phase8_compression import chain, stages
from . import paper, phase5
from .documented import coder_of

PIECE = 100  # characters of a calibration text that are looked for in the scored one


class _Calibrating(Exception):
    """Stops a probe when it would begin to collect statistics; has the windows of tokens."""


def calibration_windows(workshop: Workshop) -> list[torch.Tensor]:
    """The windows, int[1, context] each, that artifacts and probes of the audit would calibrate on."""
    rows = {"stage": "ternary:rule=calibrated", "reference": "ternary"}
    asks: list[Callable[[Workshop], Any]] = [
        lambda here: here.artifact("ternary:rule=calibrated"),
        functools.partial(run, name="output_error_ratio", parameters=rows),
        functools.partial(run, name="output_errors_compared", parameters=rows | {"rows": 1}),
        functools.partial(run, name="calibration_gain", parameters={"tokens": 512}),
    ]
    found, windows = list[torch.Tensor](), statistics._windows

    def stop(*args: Any) -> None:
        raise _Calibrating(windows(*args))

    with tempfile.TemporaryDirectory() as scratch, mock.patch.dict(paper._COLLECTED, clear=True):
        for ask in asks:
            try:
                with mock.patch.object(statistics, "_windows", stop):
                    ask(dataclasses.replace(workshop, folder=Path(scratch)))
            except _Calibrating as stopped:
                found += stopped.args[0]
                continue
            raise AgentForgeError("a probe that calibrates ran to its end without collecting statistics")
    return found


@probe("share of pieces")
def calibration_in_the_scored_text(workshop: Workshop) -> Measurement:
    """Share of the pieces of 100 characters of all that the audit calibrates on that stand in the text it scores."""
    if workshop.model.is_classifier:
        raise Unmeasured("a language model: a classifier is calibrated on pictures")
    tokenizer, pieces = workshop.model.tokenizer, set[str]()
    for window in calibration_windows(workshop):
        text = tokenizer.decode(window[0], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        pieces |= {text[at : at + PIECE] for at in range(0, len(text) - PIECE + 1, PIECE)}
    value = sum(piece in workshop.text.text for piece in pieces) / len(pieces)
    return workshop.exact(value, "share of pieces", len(pieces), "calibration text that is scored", text=workshop.text.name)


@probe("share of cases")
def picks_of_probes(workshop: Workshop) -> Measurement:
    """Share of cases in which what rows pick as the lowest of several is what sorting finds; the scores are made up."""

    def score(value: float, unit: str) -> Measurement:
        return Measurement(value, unit, 0.01, 100, {"metric": "made up"})

    right, names = [], ("curves", "ecsq", "rounding", "ternary")
    for values in itertools.permutations((0.2, 0.4, 0.6, 0.8)):
        scores = {name: score(value, "share of items") for name, value in zip(names, values, strict=True)}
        edges = {
            name: {"accuracy": score(value, "share of answers").to_json(), "retention": {"value": 1.1 - value}}
            for name, value in zip(names, values, strict=True)
        }
        with (
            mock.patch.object(phase5, "_rules", lambda *_, scores=scores: scores),
            mock.patch.object(phase5, "_edge", lambda _, stage, edges=edges: edges[stage]),
        ):
            lowest = run(workshop, "lowest_rule", {})
            passes = run(workshop, "edge_of_what_passes", {"stages": [*names], "least": 0.6})
        right += [lowest.value == 0.2, passes.value == 0.2]
    return share(workshop, right, "cases", "the lowest of made-up scores")


@probe("share of states")
def commits_told(workshop: Workshop) -> Measurement:
    """Share of states of a small git repository, made here, whose commit and dirty flag the audit tells as they are."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        right = [record.git_state(folder) == {"commit": None, "dirty": None}]

        def git(*words: str) -> str:
            command = ["git", "-c", "user.name=nobody", "-c", "user.email=nobody@example.org", *words]
            return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

        def write(name: str, text: str) -> None:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")

        try:
            git("init", "--quiet")
        except OSError:
            raise Unmeasured("git") from None
        for name in ("code/a.py", "reports/a.md", "README.md"):
            write(name, "1\n")
        for turn in range(2):
            git("add", ".")
            git("commit", "--quiet", "--message", f"{turn}")
            commit = git("rev-parse", "HEAD")
            for name, dirty in (("reports/a.md", False), ("README.md", False), ("code/a.py", True), ("code/b.py", True)):
                right.append(record.git_state(folder / "code") == {"commit": commit, "dirty": False})
                write(name, f"{turn} more\n")
                right.append(record.git_state(folder / "code") == {"commit": commit, "dirty": dirty})
                git("stash", "--include-untracked", "--quiet")
            write("code/a.py", f"{turn} at last\n")
    return share(workshop, right, "states", "commit and dirty flag of a repository")


@probe("share of changes")
def measured_anew(workshop: Workshop) -> Measurement:
    """Share of changes, one at a time to what a measurement depends on, after which it is not taken from the cache; and the
    same again, after which it is."""
    here = dataclasses.replace(workshop, memory=True)
    effort = dataclasses.replace(here.effort, seeds=here.effort.seeds + 1)
    # A text of the same name, a model of the same name, and so on: names are not what a measurement depends on.
    text = dataclasses.replace(here.text, text=here.text.text + ".")
    model, subject = (types.SimpleNamespace(fingerprint=of) for of in ("another", "a third"))
    changes: list[dict[str, Any]] = [{}, {"text": text}, {"model": model}, {"subject": subject}, {"effort": effort}]
    changes += [{"tokens": here.tokens - 1}, {"context": here.context + 1}, {"device": "another"}]
    others = [("another", {"a": 1}), ("kind", {"a": 2})]
    right: list[bool] = []
    with tempfile.TemporaryDirectory() as scratch, mock.patch.object(shops, "cache_dir", return_value=Path(scratch)):

        def again(shop: Workshop, kind: str = "kind", parameters: dict[str, Any] | None = None) -> bool:
            make = mock.Mock(return_value={})
            shop.remember(kind, parameters or {"a": 1}, make)
            return make.called

        right += [again(here), not again(here)]
        right += [again(dataclasses.replace(here, **change)) is bool(change) for change in changes]
        right += [again(here, *other) for other in others]
        for name in ("source_sha256", "environment"):
            with mock.patch.object(shops, name, return_value="another"):
                right.append(again(here))
        right.append(not again(here))
    return share(workshop, right, "changes", "measured again after a change, and not without one")


@probe("share of accuracy")
def drop_counted(workshop: Workshop) -> Measurement:
    """Largest deviation of the row on the drop of accuracy from counting pictures, of digits-mlp made so coarse that it
    loses some, and of one that loses hardly any."""
    worst, model = 0.0, open_model("digits-mlp")
    for stage in ("ternary:rule=threshold,tau=1.2", "rounding:bits=8"):
        with tempfile.TemporaryDirectory() as scratch:
            made = compress(model, stage, Path(scratch) / "quantized", progress=False)
            after, before = (_right_by_hand(folder) for folder in (made.path, model.path))
            done = Phase(Path(scratch), {}, [], True)
            with mock.patch.object(training, "_digits_phase", lambda _, done=done: done):
                worst = max(worst, abs(run(workshop, "accuracy_drop", {}).value - (1 - after / before)))
    return workshop.exact(worst, "share of accuracy", 450, "drop of accuracy against counted pictures", model="digits-mlp")


def _right_by_hand(folder: Path) -> int:
    """How many of the held-out digits a folder's digits-mlp names rightly, by numpy from its tensors."""
    _, _, pixels, labels = digits_data()
    tensors = {name: t.double().numpy() for name, t in open_model(folder).state_dict().items()}
    x = pixels.double().numpy()
    for name in ("layers.0", "layers.1", "head"):
        x = x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]
        x = x if name == "head" else np.maximum(x, 0)
    return int((x.argmax(1) == labels.numpy()).sum())


@probe("relative deviation")
def parameters_counted(workshop: Workshop) -> Measurement:
    """Largest relative deviation of the parameters that ratios count from the tensors in memory, each once: of the model
    that is here, and of small ones with a head of their own, tied, and tied but stored twice."""
    from transformers import LlamaConfig, LlamaForCausalLM

    small = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    worst = _off(workshop.model, [2 * workshop.model.parameters])
    with tempfile.TemporaryDirectory() as scratch:
        for kind in ("untied", "tied", "stored twice"):
            folder = Path(scratch) / kind
            with quiet_transformers():
                made = LlamaForCausalLM(LlamaConfig(**small, tie_word_embeddings=kind == "tied"))
                if kind == "stored twice":
                    made.lm_head.weight.data.copy_(made.model.embed_tokens.weight.data)
                    made.config.tie_word_embeddings = True
                made.save_pretrained(folder)
            opened = open_model(folder)
            made = compress(opened, "rounding", Path(scratch) / f"{kind} out", progress=False)
            counted = [16 / bits * made.ratio_to(bits) * made.weight_bytes for bits in (16, 32)]
            worst = max(worst, _off(opened, [2 * opened.parameters, *counted]))
    return workshop.exact(worst, "relative deviation", 4, "parameters counted against those in memory")


def _off(model: LanguageModel, two_each: list[float]) -> float:
    """How far counts, of two bytes per parameter, are from the distinct tensors of the module."""
    held: int = sum({p.data_ptr(): p.numel() for p in model.model.parameters()}.values())
    return max(abs(count / (2 * held) - 1) for count in two_each)


@probe("x")
def speed_by_a_clock(workshop: Workshop) -> Measurement:
    """How many times as fast the audit finds what takes a second than what takes three, by a clock that is set here."""
    clock = [0.0]

    def takes(seconds: float) -> None:
        clock[0] += seconds

    with mock.patch.object(training, "time", SimpleNamespace(perf_counter=lambda: clock[0])):
        return training._faster(workshop, lambda: takes(1), lambda: takes(3), 5, "float32", "made-up seconds")


@probe("relative deviation")
def divergence_by_hand(workshop: Workshop, stage: StageText) -> Measurement:
    """Largest deviation of what one pass over a text says of a compressed model from a second computation, in double
    precision, whose weights are decoded from the file and put into a copy of the original.

    Of one window of text: KL, top-1 agreement, both perplexities and accuracies, both retentions; relative to their size.
    """
    text, ids = short_text(workshop, min(128, workshop.context))
    here = dataclasses.replace(
        workshop, text=text, tokens=len(ids) - 1, context=len(ids), memory=False, _divergences={}, used={}
    )
    found = here.divergence(stage)
    module = copy.deepcopy(workshop.model.model)
    artifact, named = here.artifact(stage), dict(module.named_parameters())
    with torch.no_grad():
        for row in artifact.rows:
            named[row["name"]].copy_(artifact.decode(row))
        p, q = (one(input_ids=torch.tensor([ids])).logits[0, :-1].double().numpy() for one in (workshop.model.model, module))
    p, q = (x - np.log(np.exp(x - x.max(1, keepdims=True)).sum(1, keepdims=True)) - x.max(1, keepdims=True) for x in (p, q))
    next_ids, at = np.array(ids[1:]), np.arange(len(ids) - 1)
    right, right_before = (float((x.argmax(1) == next_ids).mean()) for x in (q, p))
    after, before = (math.exp(-x[at, next_ids].mean()) for x in (q, p))
    by_hand = {
        "kl": float((np.exp(p) * (p - q)).sum(1).mean()),
        "top1": float((p.argmax(1) == q.argmax(1)).mean()),
        "perplexity": after,
        "original_perplexity": before,
        "accuracy": right,
        "original_accuracy": right_before,
        "retention": right / right_before if right_before else math.nan,
        "perplexity_retention": before / after,
    }
    values = {name: getattr(found, name).value for name in by_hand}
    away = {name: abs(values[name] - value) / (abs(value) or 1.0) for name, value in by_hand.items() if math.isfinite(value)}
    about = {"stage": stage, "by hand": by_hand, "deviations": away}
    return workshop.exact(max(away.values()), "relative deviation", len(ids) - 1, "divergence against by hand", **about)


SAMPLE: dict[str, Any] = {"context": 32, "tokens": 8 * 31}  # eight windows of any text


@probe("share of parts")
def windows_spread(workshop: Workshop) -> Measurement:
    """Share of the eight equal parts of the text in which one of eight sampled windows begins."""
    with mock.patch.object(likelihood, "compared", return_value=[_made_up()]) as compared:
        evaluation.divergences([workshop.model], workshop.model, workshop.text, **SAMPLE, progress=False)
    ids = workshop.model.encode(workshop.text.text)
    begin, parts = 0, set[int]()
    for window in compared.call_args.args[2]:
        begin = next(i for i in range(begin, len(ids)) if ids[i : i + len(window.ids)] == window.ids)
        parts.add(8 * begin // len(ids))
    return workshop.exact(len(parts) / 8, "share of parts", 8, "parts of the text that are sampled", text=workshop.text.name)


def _made_up() -> list[torch.Tensor]:
    """What could be measured of eight windows of 31 tokens, whose tokens are alike in a window: float64[31, 6] each."""
    draw = np.random.default_rng(0)
    made = draw.uniform(1, 2, (8, 1, 6)) + draw.uniform(-0.01, 0.01, (8, 31, 6))
    hits = [1, 4, 5]
    made[:, :, hits] = draw.uniform(0, 2, (8, 31, 3)) < made[:, :, hits]
    return [*torch.from_numpy(made)]


@probe("relative deviation")
def errors_of_windows(workshop: Workshop) -> Measurement:
    """Largest relative deviation of values, standard errors and 95% intervals from those that numpy, and scipy's Student
    distribution, give for eight windows whose tokens are alike: KL, perplexity by the exponential, retention by the delta
    method; and of the values of shares."""
    from scipy.stats import t as student  # takes long to import

    with mock.patch.object(likelihood, "compared", return_value=[_made_up()]):
        found = evaluation.divergences([workshop.model], workshop.model, workshop.text, **SAMPLE, progress=False)[0]
    kl, same, loss, _, hits, before = torch.stack(_made_up()).mean(1).T.numpy()
    kept = hits.sum() / before.sum()
    pairs = [
        (found.top1.value, same.mean()),
        (found.accuracy.value, hits.mean()),
        (found.original_accuracy.value, before.mean()),
    ]
    for measured, value, gaps, through in (
        (found.kl, kl.mean(), kl - kl.mean(), float),
        (found.perplexity, loss.mean(), loss - loss.mean(), math.exp),
        (found.retention, kept, (hits - kept * before) / before.mean(), float),
    ):
        spread = math.sqrt(float((gaps**2).sum()) / 7 / 8)
        wide = float(student.ppf(0.975, 7)) * spread
        pairs += [
            (measured.value, through(value)),
            *zip(measured.bounds, (through(value - wide), through(value + wide)), strict=True),
        ]
        pairs.append((measured.stderr or 0.0, spread * (through(value) if through is math.exp else 1)))
    worst = max(abs(given / by_hand - 1) for given, by_hand in pairs)
    return workshop.exact(worst, "relative deviation", 8, "values and errors of windows against numpy's")


@probe("share of verdicts")
def verdicts_by_points(workshop: Workshop) -> Measurement:
    """Share of verdicts, over intervals and thresholds of all orders, that 101 points of the interval give as well: all
    confirmed, none, or some; and failures, which are errors."""
    right = []
    ends = (0.0, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5)
    for low, high in ((a, b) for a in ends for b in ends if a <= b):
        points = np.linspace(low, high, 101)
        measured = dataclasses.replace(workshop.exact((low + high) / 2, "x", 1, "made up"), interval=(low, high))
        for confirmed, partly in itertools.product(((1.0, 2.0), (1.0, math.inf)), (None, (0.5, 2.0))):
            wide = confirmed if partly is None else (min(confirmed[0], partly[0]), max(confirmed[1], partly[1]))
            green, yellow = ((points >= least) & (points <= most) for least, most in (confirmed, wide))
            for other in ("", "another model"):
                about: dict[str, Any] = {"confirmed": confirmed, "partly": partly, "about_other": other}
                claim = dataclasses.replace(Claim("made.up", "project", "", "", probe="made_up"), **about)
                expected = "confirmed" if green.all() else "partly"
                if not green.any() and (other or not yellow.any()):
                    expected = "does not carry over" if other else "refuted"
                right.append(claims.judge(claim, measured).verdict == expected)
                right.append(claims.judge(claim, None, failure="broke").verdict == "error")
    return share(workshop, right, "verdicts", "verdicts against points of the interval")


@probe("share of rows")
def kept_rows_told(workshop: Workshop) -> Measurement:
    """Share of rows of a second record that say rightly which commit and source took them: kept ones those of the first,
    new ones their own."""

    def row(name: str, expression: str) -> Claim:
        parameters = {"expression": expression, "unit": "x"}
        return Claim(name, "project", "", "made up", probe="arithmetic", parameters=parameters, confirmed=(1.0, 1.0))

    def measured(*rows: Claim, before: dict[str, Any] | None = None) -> dict[str, Any]:
        file = ClaimsFile("made_up", "Made up", "", "", workshop.model.name, rows)
        return record.measure(file, dataclasses.replace(workshop, memory=False), lambda *_, **__: None, before)

    first = measured(row("kept", "1 + 0"))
    first["claims"][0]["provenance"] |= {"commit": "1" * 40, "source": "2" * 64}
    again = measured(row("kept", "1 + 0"), row("new", "0 + 1"), before=first)["claims"]
    named = {one["id"]: (one["provenance"]["commit"], one["provenance"]["source"]) for one in again}
    right = [named["kept"] == ("1" * 40, "2" * 64), named["new"] == (record.git_state()["commit"], shops.source_sha256())]
    return share(workshop, right, "rows", "commit and source of kept rows")


@probe("share of draws")
def seeds_heard(workshop: Workshop) -> Measurement:
    """Share of draws that are the same for the same seed, and others for another: Gaussian weights of three kinds, and a
    step of training."""
    draws: list[Callable[[int], torch.Tensor]] = [
        lambda seed: stages.gaussian(4, 8, seed=seed),
        lambda seed: list(paper._weights(workshop, "gaussian", 4, 8))[seed][0],
        lambda seed: coder_of("c8_seedlm").approximate(torch.linspace(-1, 1, 640).reshape(10, 64), seed),
        lambda seed: chain._trained(workshop, 1, True, seed),
    ]
    right = [torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1)) for draw in draws]
    return share(workshop, right, "draws", "draws by their seeds")
