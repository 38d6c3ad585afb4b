"""Chains: stages one after the other, each behind gates, with retries and rollback.

A step either *re-encodes*: it decodes what the last accepted step stored, and encodes that again ("vptq:bits=2").  Only the
last artifact's bytes count, so the ratios of such steps do not multiply.  Or it *refines* the planes of that step
("| entropy"), and its ratio does multiply.  The history says what each step contributed.

    model -> try 1 -> measured from disk -> gates -> accepted -> next step
                                             |
                                             +-> try 2, 3, ... -> none left: back to the last accepted artifact

A gate is a condition on a measurement ("retention >= 0.98"), decided with its standard error: within two of them the gate
is undecided, and more text is measured.  If it is still undecided then, the step is not accepted.  The result is always the
last accepted artifact, never one that failed.
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import pydantic
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from . import evaluation, stages, tracking
from .artifact import RECIPE, Artifact, joint_error
from .errors import AgentForgeError, BadInput
from .evaluation import Measurement, Text
from .evaluation.measurement import peak_memory
from .folders import check_out, foreign, locked, remove, replace
from .models import SAMPLED_TOKENS, LanguageModel, check_workers, device_named
from .opening import load, open_model
from .pipeline import compress, refine
from .statistics import Calibration
from .tensorfiles import problem_of, read_json, write_json
from .version import __version__
from .yamlfiles import read_yaml

LOG = logging.getLogger(__name__)
Decision = Literal["passed", "failed", "undecided"]
# What a gate may ask of an artifact.  "step" is against the last accepted artifact, "total" against the original.
QUANTITIES = {
    "bytes": "size of the weight files",
    "ratio": "total ratio, whole model, against `bits` per parameter",
    "step_ratio": "bytes of the last accepted artifact (at first `bits` per parameter) over these",
    "touched_ratio": "total ratio, encoded tensors alone, against `bits` per weight",
    "touched_step_ratio": "encoded tensors alone: last accepted artifact's bytes (at first `bits` per weight) over these",
    "error": "relative error of all weights that stages may touch, against the original's",
    "kl": "KL(original || this), nats per token",
    "top1": "share of tokens with the original's most likely next token",
    "perplexity": "of a language model",
    "accuracy": "share of right next tokens, or of right digits",
    "retention": "step: accuracy over accuracy",
    "total_retention": "total: accuracy over accuracy",
    "perplexity_retention": "step: perplexity before over perplexity after",
    "total_perplexity_retention": "total: perplexity before over perplexity after",
}
_CONDITION = re.compile(r"\s*([a-z_0-9]+)\s*(<=|>=)\s*([-+.0-9eE]+)\s*")


class Condition(NamedTuple):
    """`quantity` checked against a limit."""

    quantity: str
    sense: str
    limit: float

    @classmethod
    def parse(cls, text: str) -> Condition:
        """From text such as "retention >= 0.98".  Raises ValueError if it is none."""
        match = _CONDITION.fullmatch(text)
        try:
            if match and match[1] in QUANTITIES and math.isfinite(limit := float(match[3])):
                return cls(match[1], match[2], limit)
        except ValueError:
            pass
        raise ValueError(f"gate {text!r}; expected a condition like 'retention >= 0.98' on one of {', '.join(QUANTITIES)}")

    def decide(self, measured: Measurement) -> Decision:
        """Whether the value's 95% interval keeps to the limit, misses it, or neither; NaN fails."""
        low, high = (-math.inf, self.limit) if self.sense == "<=" else (self.limit, math.inf)
        decisions: dict[str, Decision] = {"inside": "passed", "outside": "failed", "undecided": "undecided"}
        return decisions[measured.within(low, high)]

    def __str__(self) -> str:
        return f"{self.quantity} {self.sense} {self.limit:g}"


def _known(text: str) -> str:
    try:
        stages.parse(f"rounding {text}" if text.startswith("|") else text)
    except BadInput as error:
        raise ValueError(str(error)) from None
    return text


class Setting(BaseModel):
    """One try.  stage: as for `compress`, or refinements of what the last accepted step stored, each after a bar, such as
    "| entropy".  calibration_tokens: of selftext, for stages that need input statistics."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    stage: Annotated[str, AfterValidator(_known)]
    calibration_tokens: int = Field(8192, ge=1)


GateText = Annotated[str, AfterValidator(lambda text: str(Condition.parse(text)))]
Try = Annotated[Setting, BeforeValidator(lambda given: {"stage": given} if isinstance(given, str) else given)]


class Step(BaseModel):
    """Settings that are tried in turn until one passes the gates; a setting may be just its stage's text."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)
    name: str
    settings: tuple[Try, ...] = Field(alias="try", min_length=1)
    gates: tuple[GateText, ...] = ()


class Chain(BaseModel):
    """steps: in order.  gates: of every step, beside its own.  on_failure: "stop" at a step of which no setting passed, or
    "go_on" with the next one.  text, tokens: what quality is measured on (default: WikiText-2 if it is there);
    most_tokens: if gates are undecided.  bits: per parameter, in the ratios."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    steps: tuple[Step, ...] = Field(min_length=1)
    gates: tuple[GateText, ...] = ()
    on_failure: Literal["stop", "go_on"] = "stop"
    text: str | None = None
    tokens: int = Field(SAMPLED_TOKENS, ge=2)
    most_tokens: int = Field(4 * SAMPLED_TOKENS, ge=2)
    bits: Literal[16, 32] = 16


def read_chain(path: str | Path) -> Chain:
    """A chain from a YAML file.  Raises BadInput, naming the place, for a file that is missing, no YAML, or no chain."""
    path = Path(path).expanduser()
    data, line = read_yaml(path, "a chain as a YAML file")
    try:
        return Chain.model_validate(data)
    except pydantic.ValidationError as error:
        raise BadInput(f"{path}, line {line(error.errors()[0]['loc'])}: {problem_of(error)}") from None


class Result(NamedTuple):
    """artifact: the last accepted one, None if no step was.  attempts: one row per try, as in the journal.  finished:
    whether every step was accepted."""

    artifact: Artifact | None
    attempts: list[dict[str, Any]]
    finished: bool


def run_chain(
    model: LanguageModel | str | Path,
    chain: Chain | str | Path,
    out: str | Path,
    *,
    workers: int | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    progress: bool = True,
    track: str | Path | None = None,
) -> Result:
    """Run a chain on `model` into the folder `out`: journal.json, a folder for each accepted step, and `artifact`, a copy of
    the last of them.  track: a folder for the metrics of all attempts, and W&B's files (see `tracking.track_chain`).
    device: for measuring, and for the search of stages that can use it.

    Run again after a kill, it continues with what is unfinished and gives the same bytes.  Raises BadInput if model, chain
    or `out` cannot be used; a gate that fails is no error, it is in the result.
    """
    device_named(device)
    check_workers(workers)  # before the journal: there it would be an attempt that was rejected
    model = open_model(model) if isinstance(model, str | Path) else model
    chain = chain if isinstance(chain, Chain) else read_chain(chain)
    model.check()
    _check_quantities(model, chain)
    out = check_out(out, model.path)
    text = None if model.is_classifier else evaluation.find_text(chain.text)
    recipe = {
        "agentforge": __version__,
        "model": model.fingerprint,
        "chain": chain.model_dump(mode="json", by_alias=True),
        "text": text and text.sha256,
    }
    tensors = {name: math.prod(entry.shape) for name, entry in sorted(model.entries.items())}
    check_out(out / "artifact")
    if out.exists() and not (out / "journal.json").is_file() and (not out.is_dir() or any(out.iterdir())):
        raise BadInput(f"{out}: is in the way and not a chain of agentforge; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    with locked(out, out):
        journal = _Journal(out, recipe, {"name": model.name, "tensors": tensors}, overwrite)
        run = _Run(model, chain, text, out, journal, workers, device, progress)
        finished = run.steps()
        result = Result(run.hand_over(), journal.attempts, finished)
    if track is not None:
        tracking.track_chain(Path(track).expanduser(), model, recipe, result.attempts, finished, result.artifact)
    return result


def _check_quantities(model: LanguageModel, chain: Chain) -> None:
    """Raise BadInput for a gate on something that this model does not have."""
    for gate in [*chain.gates, *(gate for step in chain.steps for gate in step.gates)]:
        name = Condition.parse(gate).quantity
        if model.is_classifier and (name in ("kl", "top1") or "perplexity" in name):
            raise BadInput(f"chain {chain.name}: gate {gate!r}: {model.name} is a classifier; expected one on its accuracy")


class _Journal:
    """out/journal.json: the recipe; name of the original and parameters of each of its tensors; a row for each finished
    attempt; and, for who watches, what is being done `now`.  It is replaced in one step whenever one of these changes."""

    def __init__(self, out: Path, recipe: dict[str, Any], original: dict[str, Any], overwrite: bool) -> None:
        self.path, self.recipe, self.original = out / "journal.json", recipe, original
        self.now: dict[str, Any] | None = None
        self.attempts = self._go_on(out, overwrite)
        self._write()

    def _go_on(self, out: Path, overwrite: bool) -> list[dict[str, Any]]:
        """The attempts of a run of the same recipe; what another one has made is refused, or discarded."""
        found: Any = read_json(self.path) if self.path.is_file() else {}
        if not found or found.get("recipe") == self.recipe:
            return list(found.get("attempts", []))
        if not overwrite:
            before = found.get("recipe")
            differs = [key for key in self.recipe if not isinstance(before, dict) or before.get(key) != self.recipe[key]]
            raise BadInput(f"{out}: holds a run with another {', '.join(differs)}; choose another --out or pass --overwrite")
        if strange := foreign(out):
            raise BadInput(f"{out}: {strange}; nothing of it is discarded, choose another --out or move that away")
        for child in out.iterdir():
            if child.is_dir():
                remove(child)
            elif child != self.path:
                child.unlink()
        return []

    def doing(self, what: str, row: dict[str, Any], **about: Any) -> None:
        """Say what is being done for an attempt: "encoding" or "measuring".  row: what is known of it already."""
        self.now = {**row, "doing": what, "since": time.time(), **about}
        LOG.info("%s, try %d, %s: %s", row["name"], row["attempt"], row["setting"]["stage"], what)
        self._write()

    def add(self, row: dict[str, Any]) -> None:
        """Add or replace an attempt's row; nothing is being done until `doing` says so."""
        LOG.info("%s, try %d: %s", row["name"], row["attempt"], ": ".join(filter(None, (row["decision"], row["reason"]))))
        self.now = None
        kept = [other for other in self.attempts if (other["step"], other["attempt"]) != (row["step"], row["attempt"])]
        self.attempts = sorted([*kept, row], key=lambda r: (r["step"], r["attempt"]))
        self._write()

    def _write(self) -> None:
        found = {"recipe": self.recipe, "original": self.original, "attempts": self.attempts, "now": self.now}
        write_json(self.path, found)


@dataclass
class _Run:
    """One run of a chain: its state."""

    original: LanguageModel
    chain: Chain
    text: Text | None
    out: Path
    journal: _Journal
    workers: int | None
    device: str
    progress: bool
    accepted: Path | None = None

    def steps(self) -> bool:
        """Take all steps; returns whether each was accepted."""
        finished = True
        for index, step in enumerate(self.chain.steps):
            if any(self._accepted(index, attempt, step) for attempt in range(len(step.settings))):
                continue
            finished = False
            if self.chain.on_failure == "stop":
                break
        return finished

    def hand_over(self) -> Artifact | None:
        """Copy the last accepted artifact to out/artifact, and check every byte of it."""
        final = self.out / "artifact"
        if self.accepted is None:  # what an earlier run handed over may have been lost since, and failed when made again
            remove(final)
            return None
        partial = self.out / "artifact.partial"
        if not final.exists() or _manifest_hash(final) != _manifest_hash(self.accepted):
            remove(partial)
            partial.mkdir()
            write_json(partial / RECIPE, {"copy of": self.accepted.name})
            shutil.copytree(self.accepted, partial / "folder")
            replace(partial / "folder", final)
        remove(partial)  # also what a kill just after the line above left
        artifact = Artifact(final)
        artifact.verify()
        return artifact

    def _accepted(self, index: int, attempt: int, step: Step) -> bool:
        """Make the attempt, unless the journal has it; whether it was accepted."""
        folder = self.out / f"step-{index + 1}"
        known = [row for row in self.journal.attempts if (row["step"], row["attempt"]) == (index + 1, attempt + 1)]
        row = known[0] if known else None
        if row is None or (row["decision"] == "accepted" and _manifest_hash(folder) != row["artifact"]):
            row = self._attempt(index, attempt, step, folder)
            if row["decision"] != "accepted":  # before the journal says so: a row that is there is done
                for path in (folder, folder.with_name(folder.name + ".partial")):
                    remove(path)
            self.journal.add(row)
        if row["decision"] != "accepted":
            return False
        self.accepted = folder
        return True

    def _last(self) -> LanguageModel | None:
        """The model in the last accepted artifact, by a name that holds no path: it goes into the next manifest."""
        if self.accepted is None:
            return None
        model = load(self.accepted)
        model.name, model.source = f"{self.original.name}, {self.accepted.name}", self.original.source
        return model

    def _attempt(self, index: int, attempt: int, step: Step, folder: Path) -> dict[str, Any]:
        """Encode, load back, measure, decide."""
        setting = step.settings[attempt]
        row = {"step": index + 1, "name": step.name, "attempt": attempt + 1, "setting": setting.model_dump()}
        conditions = [Condition.parse(gate) for gate in (*step.gates, *self.chain.gates)]
        start = time.perf_counter()
        before = self._last()
        if _manifest_hash(folder) is None:  # what is left of a damaged one
            remove(folder)
        options: dict[str, Any] = {"overwrite": True, "progress": self.progress}
        self.journal.doing("encoding", row)
        try:
            if setting.stage.startswith("|"):
                if self.accepted is None:
                    raise BadInput(f"{setting.stage}: there is no accepted step whose planes could be refined")
                how = setting.stage.removeprefix("|").strip()
                artifact = refine(Artifact(self.accepted), how, folder, original=self.original, **options)
            else:
                calibration = Calibration(tokens=setting.calibration_tokens)
                source = before or self.original
                options |= {"workers": self.workers, "device": self.device, "calibration": calibration}
                artifact = compress(source, setting.stage, folder, **options)
        except BadInput as error:  # a weight that the stage cannot encode; a full disk is not a BadInput
            return {**row, "decision": "rejected", "reason": str(error), "seconds": time.perf_counter() - start}
        encoded = time.perf_counter()
        for tensor in artifact.rows:
            if tensor["stage"] is not None:
                artifact.decode(tensor)
        decode_seconds = time.perf_counter() - encoded
        tokens, so_far = self.chain.tokens, dict[str, Any]()
        while True:
            self.journal.doing("measuring", row, tokens=None if self.text is None else tokens, **so_far)
            measured = self._measure(artifact, before, tokens)
            gates = {str(c): c.decide(measured[c.quantity]) for c in conditions}
            so_far = {"gates": gates, "measured": {name: m.to_json() for name, m in measured.items()}}
            if "undecided" not in gates.values() or "failed" in gates.values():
                break
            if self.text is None or 2 * tokens > self.chain.most_tokens:
                break
            tokens *= 2
        missed = [f"{c}: {gates[str(c)]} ({measured[c.quantity]})" for c in conditions if gates[str(c)] != "passed"]
        return {
            **row,
            "decision": "rejected" if missed else "accepted",
            "reason": "; ".join(missed),
            **so_far,
            "artifact": _manifest_hash(folder),
            "encode_seconds": encoded - start,
            "decode_seconds": decode_seconds,
            "seconds": time.perf_counter() - start,
            "peak_memory_bytes": peak_memory(),
        }

    def _measure(self, artifact: Artifact, before: LanguageModel | None, tokens: int) -> dict[str, Measurement]:
        """Every quantity that this model has, of the artifact as it is loaded from disk."""
        candidate, original = load(artifact.path).on(self.device), self.original.on(self.device)
        before = before and before.on(self.device)
        bits = self.chain.bits
        first = artifact.weight_bytes * artifact.ratio_to(bits)
        last = before.bytes_on_disk if before else first
        touched = artifact.ratios.of("touched tensors", bits)
        accepted = Artifact(self.accepted).ratios.of("touched tensors", bits) if self.accepted else None
        touched_last = accepted.bytes if accepted else touched.denominator_bytes
        exact: dict[str, tuple[float, str]] = {
            "bytes": (artifact.weight_bytes, "bytes"),
            "ratio": (artifact.ratio_to(bits), "x"),
            "step_ratio": (last / artifact.weight_bytes, "x"),
            "touched_ratio": (touched.ratio, "x"),
            "touched_step_ratio": (touched_last / touched.bytes, "x"),
            "error": (model_error(self.original, candidate), "share"),
        }
        inputs = {"model": candidate.fingerprint, "original": self.original.fingerprint}
        found = {
            name: Measurement(value, unit, None, 1, {"metric": QUANTITIES[name], "bits": bits}, inputs=inputs)
            for name, (value, unit) in exact.items()
        }
        if self.text is None:
            found["accuracy"] = evaluation.accuracy(candidate)
            found["total_retention"] = evaluation.accuracy_retention(candidate, original)
            found["retention"] = evaluation.accuracy_retention(candidate, before) if before else found["total_retention"]
            return found
        protocol: dict[str, Any] = {"tokens": tokens, "context": self.original.sampled_context}
        total = evaluation.divergence(candidate, original, self.text, **protocol, progress=self.progress)
        step = total
        if before:  # a pass of its own, whose standard errors are of pairs
            step = evaluation.divergence(candidate, before, self.text, **protocol, progress=self.progress)
        for name in ("kl", "top1", "perplexity", "accuracy"):
            found[name] = getattr(total, name)
        for name in ("retention", "perplexity_retention"):
            found[name], found[f"total_{name}"] = getattr(step, name), getattr(total, name)
        return found


def model_error(original: LanguageModel, candidate: LanguageModel) -> float:
    """The relative error of all weights that a stage may touch, together."""
    names = [weight.name for weight in original.weights()]
    return joint_error((original.tensor(name), candidate.tensor(name)) for name in names)


def _manifest_hash(folder: Path) -> str | None:
    """The hash of an artifact's manifest, which holds those of its files; None if there is no sound artifact."""
    with contextlib.suppress(AgentForgeError):
        artifact = Artifact(folder)
        artifact.check()
        return artifact.sha256
    return None
