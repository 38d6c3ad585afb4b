"""The workshop: what probes share, and the memory of what they have measured.

A measurement is kept in the cache folder under the hash of all that it depends on: the probe and its parameters, the models,
the text, how much of it, our own source, the packages and the machine.  A second audit takes from there what nothing has
changed for; whatever changed is measured again.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import evaluation, stages
from ..artifact import Artifact
from ..cache import use
from ..errors import AgentForgeError, BadInput
from ..evaluation import Divergence, Measurement, Text
from ..evaluation.measurement import environment
from ..evaluation.texts import CHECKOUT, local_data
from ..models import SAMPLED, SAMPLED_TOKENS, LanguageModel, Weight, cache_dir, device_named
from ..names import unknown
from ..opening import load, open_model
from ..pipeline import compress
from ..planes import Packed
from ..statistics import Calibration
from ..tensorfiles import write_atomic

PACKAGE = Path(__file__).parent.parent


class Unmeasured(AgentForgeError):
    """A probe cannot measure here and now; the message says what it would take."""


@dataclass(frozen=True)
class Effort:
    """How much is measured.  tokens: scored for likelihoods.  every: of the model's matrices, one in so many is in the
    sample that slow probes take.  seeds: of probes with randomness.  calibration: tokens that stages look at inputs on."""

    name: str
    tokens: int
    every: int
    seeds: int
    calibration: int = Calibration().tokens


EFFORTS = {
    effort.name: effort
    for effort in (
        Effort("smoke", 1022, 42, 2, 2048),
        Effort("quick", 1022, 42, 2, 2048),
        Effort("standard", 4088, 14, 2, 4096),
        Effort("full", SAMPLED_TOKENS, 5, 5),
    )
}

# What takes longer than the quick budget has for everything: it leaves such rows untested, and says so.
LEFT_OUT = "the budgets standard and full measure it"
PLAIN = ("rounding", "ternary")  # stages that encode a language model in seconds


@dataclass
class Workshop:
    """What probes share, so that each artifact is made, and each text scored, once.

    model: the original.  folder: where artifacts go.  text, tokens, context: how likelihoods are measured.
    effort: how large samples are.  subject: a compressed model that was made elsewhere, if that is what is audited.
    memory: whether measurements are taken from the cache and put there.  own: the folder of a report with probes of its own.
    rows: of the record, those that are judged already.
    """

    model: LanguageModel
    folder: Path
    text: Text
    tokens: int
    context: int = SAMPLED
    effort: Effort = EFFORTS["standard"]
    device: str = "cpu"
    subject: LanguageModel | None = None
    memory: bool = False
    own: Path | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    used: dict[str, str] = field(default_factory=dict)
    _divergences: dict[str, Divergence] = field(default_factory=dict)

    def artifact(self, stage: str, embeddings: bool = False) -> Artifact:
        """The model compressed with `stage`, on disk.  Raises Unmeasured if the budget has no time for that."""
        if not self.has_time_for(stage):
            raise Unmeasured(f"the time to encode a whole language model by {stage}; {LEFT_OUT}")
        parsed = stages.parse(stage)
        name = "".join(c if c.isalnum() or c in ".-" else "_" for c in f"{parsed}{'+embeddings' if embeddings else ''}")
        made = compress(
            self.model,
            parsed,
            self.folder / f"{self.model.name}-{name}",
            embeddings=embeddings,
            device=self.device,
            overwrite=True,
            progress=False,
            calibration=Calibration(tokens=self.effort.calibration),
        )
        self.used[f"{stage}{', embeddings too' if embeddings else ''}"] = made.sha256
        return made

    def has_time_for(self, stage: str) -> bool:
        """Whether the budget has the time to encode the whole model: the quick one has for small models and plain stages."""
        return self.effort.name != "quick" or self.model.is_classifier or stages.parse(stage).name in PLAIN

    def compare(self, stages: Sequence[str]) -> None:
        """Take `divergence` of several stages in one pass over the text."""
        missing = [stage for stage in dict.fromkeys(stages) if stage not in self._divergences]
        for stage in missing.copy():
            if kept := self._recall("divergence", {"stage": stage}):
                self._divergences[stage] = Divergence(**{name: Measurement(**m) for name, m in kept.items()})
                missing.remove(stage)
        if missing:
            results = evaluation.divergences(
                [self.on_device(load(self.artifact(stage).path)) for stage in missing],
                self.on_device(self.model),
                text=self.text,
                tokens=self.tokens,
                context=self.context,
                progress=False,
            )
            for stage, result in zip(missing, results, strict=True):
                self._divergences[stage] = result
                self._keep("divergence", {"stage": stage}, {name: m.to_json() for name, m in result._asdict().items()})

    def divergence(self, stage: str) -> Divergence:
        """KL, agreement and both perplexities of the model compressed with `stage`, loaded back from disk."""
        self.compare([stage])
        return self._divergences[stage]

    def encoded(self, stage: str) -> list[tuple[str, Packed]]:
        """Name and planes of every encoded tensor, read back from disk."""
        artifact = self.artifact(stage)
        return [(row["name"], p) for row in artifact.rows if row["stage"] and isinstance(p := artifact.read(row), Packed)]

    def sample(self) -> list[Weight]:
        """The matrices that slow probes look at: one in `effort.every`, of all depths and kinds."""
        weights = self.model.weights()
        # A step that shares no divisor with the number of kinds in a block, seven, visits all of them.
        return weights[:: self.effort.every + (self.effort.every % 7 == 0)]

    def exact(self, value: float, unit: str, n: int, metric: str, **protocol: Any) -> Measurement:
        """A measurement without sampling error: a count, or a size."""
        return Measurement(value, unit, None, n, {"metric": metric, **protocol}, inputs={"model": self.model.fingerprint})

    def on_device(self, model: LanguageModel) -> LanguageModel:
        """The same model, its module where this workshop computes."""
        return model if self.device == "cpu" else model.on(self.device)

    def remember(self, kind: str, parameters: Mapping[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `make` gives, an object of JSON, from the cache if nothing that it depends on has changed."""
        kept = self._recall(kind, parameters)
        if kept is None:
            began = time.perf_counter()
            kept = make()
            self._keep(kind, parameters, kept | {"seconds": round(time.perf_counter() - began, 2)})
        return kept

    def _recall(self, kind: str, parameters: Mapping[str, Any]) -> dict[str, Any] | None:
        if not self.memory:
            return None
        try:
            entry = json.loads(self._file(kind, parameters).read_text(encoding="utf-8"))
            found: dict[str, Any] = entry["found"]
            return found if {**entry, "found": None} == {**_entry(found), "found": None} else None
        except (OSError, ValueError, TypeError, LookupError, RecursionError):  # not there, damaged, or of another form
            return None

    def _keep(self, kind: str, parameters: Mapping[str, Any], found: dict[str, Any]) -> None:
        if self.memory:
            file = self._file(kind, parameters)
            file.parent.mkdir(parents=True, exist_ok=True)
            use(file.parent)
            write_atomic(file, [json.dumps(_entry(found)).encode()])

    def _file(self, kind: str, parameters: Mapping[str, Any]) -> Path:
        depends = {
            "kind": kind,
            "parameters": dict(parameters),
            "model": self.model.fingerprint,
            "subject": self.subject.fingerprint if self.subject else None,
            "text": self.text.sha256,
            "tokens": self.tokens,
            "context": self.context,
            "effort": dataclasses.asdict(self.effort),
            "device": self.device,
            "source": source_sha256(self.own),
            "environment": environment(),
            "data": local_data(),
        }
        key = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:32]
        return cache_dir() / "measurements" / f"{key}.json"


def _entry(found: dict[str, Any]) -> dict[str, Any]:
    """A file of the cache: its form, what was found, and the hash of that."""
    digest = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()
    return {"form": 2, "found": found, "sha256": digest}


@functools.cache
def source_sha256(own: Path | None = None) -> str:
    """The hash of the source that measurements depend on: the package, with what judges and draws, the chains, and the
    probes of reports.  own: the folder of a report outside of the checkout."""
    files = [*PACKAGE.rglob("*.py"), *(PACKAGE / "data").iterdir(), *(CHECKOUT / "chains").glob("*.yaml")]
    files += [*CHECKOUT.glob("reports/*/*.py"), *([] if own is None else own.glob("*.py"))]
    digest = hashlib.sha256()
    for path in sorted(files):
        data = path.read_bytes()
        digest.update(f"{path.name} {len(data)}\n".encode() + data)
    return digest.hexdigest()


def check_settings(tokens: int | None, effort: str, device: str) -> None:
    """Raise BadInput for settings out of range."""
    if effort not in EFFORTS:
        raise unknown("budget", effort, EFFORTS, "expected one of")
    if tokens is not None and tokens < 2:
        raise BadInput(f"tokens={tokens}; expected 2 or more")
    device_named(device)


def workshop_for(
    model: str,
    folder: Path,
    text: str | None,
    tokens: int | None = None,
    context: int = SAMPLED,
    *,
    effort: str = "standard",
    device: str = "cpu",
    subject: str | None = None,
    memory: bool = False,
    own: Path | None = None,
) -> Workshop:
    """A workshop around a model by name, with a text by name (or the first of the chain that is there).

    tokens: to score (default: the effort's).  subject: a model to audit, made elsewhere, `model` being its original.
    Raises BadInput for names that lead nowhere, and for settings out of range.
    """
    check_settings(tokens, effort, device)
    opened, found = open_model(model), evaluation.find_text(text)
    tokens = EFFORTS[effort].tokens if tokens is None else tokens
    context = min(context, opened.context or context, tokens + 1)
    other = open_model(subject) if subject else None
    size = EFFORTS[effort]
    return Workshop(opened, folder, found, tokens, context, size, device, subject=other, memory=memory, own=own)
