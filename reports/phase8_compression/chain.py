"""Probes of the chain of stages: its ratios and what it keeps, its gates, rollback, resuming and logging, the training of
what it stored, and what happens to weights and files that are not as they should be.

All on digits-mlp, which takes seconds; the documented chain itself on the workshop's model in full effort.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch

from agentforge import chain as chains
from agentforge import stages, tracking
from agentforge.artifact import MANIFEST, Artifact
from agentforge.audit.probes import Count, bits_per_weight, probe, share
from agentforge.audit.workshop import Unmeasured, Workshop
from agentforge.chain import Chain, Result, run_chain
from agentforge.digits import data as digits_data
from agentforge.errors import AgentForgeError, BadInput
from agentforge.evaluation import Measurement, intervals
from agentforge.evaluation.texts import CHECKOUT
from agentforge.models import LanguageModel
from agentforge.opening import load, open_model
from agentforge.pipeline import compress
from agentforge.planes import Packed
from agentforge.stages import Stage
from agentforge.training import mugrokfast
from agentforge.training import recover as recovery

from .stages import gaussian

Which = Literal["gated", "to the end"]


def _chain(workshop: Workshop, which: Which, digits: bool = False, track: Path | None = None) -> tuple[Result, Path]:
    """The documented chain, run once per workshop, and its folder: of digits-mlp but in full effort."""
    digits = digits or workshop.effort.name != "full"
    file = CHECKOUT / "chains" / f"documented{'_digits' * digits}{'_go_on' * (which != 'gated')}.yaml"
    if not file.is_file():
        raise Unmeasured(f"the chains that agentforge's repository has: chains/{file.name}")
    model, out = open_model("digits-mlp") if digits else workshop.model, workshop.folder / f"chain-{file.stem}"
    return run_chain(model, file, out, overwrite=True, progress=False, track=track), out


@probe()
def documented_chain(workshop: Workshop, chain: Which, quantity: str) -> Measurement:
    """A quantity of the last step that the documented chain accepted, or how many steps it did; 1 if that is none, as
    rollback then ends at the original."""
    result, out = _chain(workshop, chain)
    accepted = [row for row in result.attempts if row["decision"] == "accepted"]
    about = {"chain": out.name.removeprefix("chain-"), "steps": [row["setting"]["stage"] for row in accepted]}
    if accepted:  # beside one figure the others that say what it is worth
        last = accepted[-1]["measured"]
        about |= {name: round(last[name]["value"], 4) for name in ("touched_ratio", "total_retention")}
    if quantity == "steps":
        return workshop.exact(len(accepted), "steps", 3, "steps accepted", **about)
    if not accepted:
        return workshop.exact(1.0, "x", 1, quantity, **about)
    found = Measurement(**accepted[-1]["measured"][quantity])
    return dataclasses.replace(found, protocol={**found.protocol, **about})


@probe("share of tensors")
def steps_build_on_each_other(workshop: Workshop) -> Measurement:
    """Share of a step's encoded tensors equal, bit for bit, to its stage applied to the weights of the step before."""
    result, out = _chain(workshop, "to the end", digits=True)
    right, source = [], open_model("digits-mlp")
    for row in result.attempts:
        step = Artifact(out / f"step-{row['step']}")
        by_hand = compress(source, row["setting"]["stage"], workshop.folder / "by-hand", overwrite=True, progress=False)
        for one, other in zip(step.rows, by_hand.rows, strict=True):
            if one["stage"]:
                right.append(torch.equal(step.decode(one), by_hand.decode(other)))
        source = load(step.path)
    return share(workshop, right, "tensors", "steps made a second time", model="digits-mlp")


def _hits(model: LanguageModel) -> torch.Tensor:
    _, _, pixels, labels = digits_data()
    module = model.model  # built outside of inference mode, so that statistics can be taken of it
    with torch.inference_mode():
        hits: torch.Tensor = (module(pixels).argmax(1) == labels).double()
    return hits


@probe("share of gates")
def gates_that_are_right(workshop: Workshop) -> Measurement:
    """Share of gates that accept exactly when the retention, counted here, keeps to them by two errors: one at 95% for each
    setting, and for the coarse ones one that is kept by less than that, and one by more."""
    fine = ("rounding:bits=8,group=32", "rounding:bits=4,group=32", "rounding:bits=3,group=32", "vptq:v=4,k=16", "ecsq")
    coarse = ("rounding:bits=2,group=0", "ternary:rule=threshold,tau=2.5", "curves:degree=7,segment=26", "vptq:v=16,k=2")
    model, right, chances = open_model("digits-mlp"), [], {}
    before = _hits(model)
    for i, stage in enumerate((*fine, *coarse)):
        after = _hits(load(compress(model, stage, workshop.folder / f"gate-{i}-made", overwrite=True, progress=False).path))
        kept = float(after.sum() / before.sum())
        spread = float((after - kept * before).std(correction=0)) / (float(before.mean()) * math.sqrt(len(before)))
        # A gate one error below what is kept would pass by the value alone, and is undecided; four errors below it passes.
        for limit in (0.95, *(kept - errors * spread for errors in (1, 4) if stage in coarse)):
            step = {"name": stage, "try": [stage], "gates": [f"retention >= {limit}"]}
            spec = Chain.model_validate({"name": "gate", "steps": [step]})
            result = run_chain(model, spec, workshop.folder / f"gate-{i}", overwrite=True, progress=False)
            right.append(result.finished == (kept - 2 * spread >= limit))
        chances[stage] = round(kept, 4)
    return share(workshop, right, "gates", "gate against accuracy counted anew", model="digits-mlp", retention=chances)


THREE_STEPS = tuple(f"rounding:bits={bits},group=32" for bits in (8, 7, 6))


def _three(settings: tuple[str, ...] = THREE_STEPS) -> Chain:
    steps = [{"name": one, "try": [one], "gates": ["retention >= 0.9"]} for one in settings]
    return Chain.model_validate({"name": "three steps", "steps": steps})


def _fault(kind: str, failing: int) -> Any:
    """A patch that spoils step `failing` of THREE_STEPS."""
    rounding, bits = type(stages.get("rounding")), 9 - failing
    encode, decode, measure = rounding._encode, rounding._decode, chains._Run._measure

    def cannot(stage: Any, *rest: Any) -> Packed:
        if stage.bits == bits:
            raise BadInput("weight: cannot be encoded")
        return encode(stage, *rest)

    def spoiled(stage: Any, packed: Packed) -> torch.Tensor:
        dense = decode(stage, packed)
        if stage.bits != bits:
            return dense
        return dense / 0 if kind == "not finite" else gaussian(*dense.shape)

    def unmeasured(run: Any, artifact: Artifact, *rest: Any) -> dict[str, Measurement]:
        found = measure(run, artifact, *rest)
        if artifact.path.name == f"step-{failing}":
            found["retention"] = dataclasses.replace(found["retention"], value=math.nan)
        return found

    if kind == "no measurement":
        return mock.patch.object(chains._Run, "_measure", unmeasured)
    return mock.patch.object(rounding, *(("_encode", cannot) if kind == "cannot encode" else ("_decode", spoiled)))


@probe("share of runs")
def faults_judged_rightly(workshop: Workshop) -> Measurement:
    """Share of runs that hand over what they should: all three steps if nothing is wrong, and after a fault the step
    before, bit for bit; nothing if that is the first."""
    model, out = open_model("digits-mlp"), workshop.folder / "faults"
    sound = run_chain(model, _three(), out / "sound", overwrite=True, progress=False)
    right = [sound.finished and sound.artifact is not None]
    hashes = [Artifact(out / f"sound/step-{step}").sha256 if right[0] else "" for step in (1, 2, 3)]
    for kind in ("noise", "cannot encode", "not finite", "no measurement"):
        for failing in (1, 2, 3):
            with _fault(kind, failing):
                result = run_chain(model, _three(), out / f"{kind}-{failing}", overwrite=True, progress=False)
            handed = result.artifact.sha256 if result.artifact else None
            right.append(not result.finished and handed == (hashes[failing - 2] if failing > 1 else None))
    return share(workshop, right, "runs", "what is handed over after a fault", model="digits-mlp")


@probe("share of kills")
def chain_resumes(workshop: Workshop) -> Measurement:
    """Share of kills, in the middle of each step, after which the same command gives the bytes of a run without any."""
    settings = ("rounding:bits=8,group=32", "vptq:v=2,k=16,refine=0", "rounding:bits=7,group=32")
    model, out, right = open_model("digits-mlp"), workshop.folder / "kills", []
    whole = run_chain(model, _three(settings), out / "whole", overwrite=True, workers=1, progress=False)
    for killed in (1, 2, 3):
        step = stages.parse(settings[killed - 1])
        encode, calls = type(step)._encode, []  # type: ignore[var-annotated]

        def kill(stage: Any, *rest: Any, encode: Any = encode, step: Stage = step, calls: list[int] = calls) -> Packed:
            calls += [1] * (stage == step)
            if len(calls) == 2:  # the first weight of the step is written, the second is in memory
                raise KeyboardInterrupt
            packed: Packed = encode(stage, *rest)
            return packed

        shutil.rmtree(out / f"{killed}", ignore_errors=True)
        try:
            with mock.patch.object(type(step), "_encode", kill):
                run_chain(model, _three(settings), out / f"{killed}", workers=1, progress=False)
            struck = False
        except KeyboardInterrupt:
            struck = True
        again = run_chain(model, _three(settings), out / f"{killed}", workers=1, progress=False)
        files = [hash_of(r.artifact.path) for r in (whole, again) if r.artifact]
        right.append(struck and len(files) == 2 and files[0] == files[1])
    return share(workshop, right, "kills", "bytes after a kill", model="digits-mlp", steps=settings)


def hash_of(folder: Path) -> dict[str, bytes]:
    """The weight files of an artifact, by name."""
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


@probe("metrics")
def chain_metrics(workshop: Workshop) -> Measurement:
    """How many documented metrics a tracked run of the documented chain logs with a finite value, read from its files."""
    folder = workshop.folder / "tracked-chain"
    _chain(workshop, "gated", digits=True, track=folder)
    found = tracking.read(folder)
    names = list(tracking.PHASE8_METRICS)
    for stage in ("seedlm", "vptq", "hypercompression"):
        short = {"hypercompression": "hyper"}.get(stage, stage)
        names += [name.format(short if name.startswith("compression/") else stage) for name in tracking.PHASE8_STAGE_METRICS]
    count = sum(name in found and math.isfinite(found[name]) for name in names)
    offline = len(list(folder.glob("wandb/offline-run-*")))
    return workshop.exact(count, "metrics", len(names), "metrics read back", model="digits-mlp", wandb_offline_runs=offline)


@probe("bytes")
def bytes_counted(workshop: Workshop) -> Measurement:
    """Largest deviation of the bytes of ratios and bits per weight from those that the weight files' own headers and sizes
    show."""
    worst, model = 0.0, open_model("digits-mlp")
    texts = ("seedlm:K=8,C=8,P=3", "vptq:v=4,k=16,shared=true", "rounding:bits=3,group=32 | entropy", "ternary")
    for text in texts:
        artifact = compress(model, text, workshop.folder / f"bytes-{texts.index(text)}", overwrite=True, progress=False)
        files = list(artifact.path.glob("*.safetensors"))
        kept = {row["name"] for row in artifact.rows if not row["stage"]}
        planes = 0
        for file in files:
            data = file.read_bytes()
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            header.pop("__metadata__", None)
            planes += sum(e["data_offsets"][1] - e["data_offsets"][0] for name, e in header.items() if name not in kept)
        found = {"whole model": sum(file.stat().st_size for file in files), "touched tensors": planes}
        worst = max(worst, *(abs(r.bytes - found[r.what]) for r in artifact.ratios))
        if artifact.manifest["shared"] is None:
            weights = sum(math.prod(row["shape"]) for row in artifact.rows if row["stage"])
            here = dataclasses.replace(workshop, model=model, folder=workshop.folder / "bytes")
            worst = max(worst, abs(bits_per_weight(here, text).value * weights / 8 - planes))
    return workshop.exact(worst, "bytes", len(texts), "bytes against the files", model="digits-mlp", stages=texts)


# ---- Grokfast


CODEBOOKS = "vptq:v=8,k=16"


def _kl(model: LanguageModel) -> torch.Tensor:
    """KL(digits-mlp || model) of each held-out picture, float64[450]."""
    _, _, pixels, _ = digits_data()
    modules = [open_model("digits-mlp").model, model.model]
    with torch.inference_mode():
        p, q = (module(pixels).double().log_softmax(1) for module in modules)
        divergence: torch.Tensor = (p.exp() * (p - q)).sum(1)
    return divergence


def _trained(workshop: Workshop, steps: int, filtered: bool, seed: int) -> torch.Tensor:
    """KL of each picture after `steps` of training on digits-mlp's VPTQ codebooks, with the filter or without."""
    settings = recovery.Settings(steps=steps, batch=128, lr=1e-3, optimizer="mugrokfast", evaluate=steps, seed=seed)
    out = workshop.folder / f"codebooks-{filtered}-{steps}-{seed}"
    optimizer, threads = functools.partial(mugrokfast.MuGrokfast, lamb=2.0 if filtered else 0.0), torch.get_num_threads()
    torch.set_num_threads(1)  # on matrices this small, threads wait for each other longer than they compute
    try:
        with mock.patch.object(recovery, "MuGrokfast", optimizer):
            done = recovery.recover("digits-mlp", out, CODEBOOKS, settings, overwrite=True, progress=False, device="cpu")
    finally:
        torch.set_num_threads(threads)
    return _kl(load(done.artifact.path))


@probe("x")
def codebook_gain_of_filter(workshop: Workshop, steps: Count) -> Measurement:
    """KL divergence that is left with the filter over that without, mean over seeds."""
    found = []
    for seed in range(workshop.effort.seeds):
        on, off = (float(_trained(workshop, steps, filtered, seed).mean()) for filtered in (True, False))
        found.append(on / off)
    protocol = {"metric": "KL with over without the filter", "model": "digits-mlp", "stage": CODEBOOKS, "by seed": found}
    mean = intervals.mean(torch.tensor(found, dtype=torch.float64), error=f"{len(found)} seeds")
    return Measurement(unit="x", protocol={**protocol, "steps": steps}, inputs=_digits(), **mean)


def _digits() -> dict[str, str]:
    """The hash of the model that these probes train."""
    return {"model": open_model("digits-mlp").fingerprint}


# ---- what goes wrong


@probe("share of cases")
def extremes_handled(workshop: Workshop) -> Measurement:
    """Share of cases handled: NaN and infinity refused by the tensor's name; zeros, tiny and huge weights decoded to
    finite ones, zeros to zeros."""
    texts = ("rounding", "ternary", "seedlm:K=8,C=8,P=3", "vptq:v=4,k=16", "trajectory", "curves", "ecsq")
    right: list[bool] = []
    for stage in map(stages.parse, texts):
        for bad in (math.nan, math.inf):
            weight = gaussian(13, 37)
            weight[3, 5] = bad
            try:
                stage.encode(weight, name="layers.3.q_proj")
                right.append(False)
            except BadInput as error:
                right.append("layers.3.q_proj" in str(error))
        for scale in (0.0, 1e-30, 1e30):
            decoded = stage.decode(stage.encode(scale * gaussian(13, 37)))
            right.append(bool(torch.isfinite(decoded).all()) and (scale > 0 or not decoded.any()))
    return share(workshop, right, "cases", "NaN, infinity, 0, 1e-30, 1e30", stages=texts)


@probe("share of artifacts")
def damaged_artifacts_refused(workshop: Workshop) -> Measurement:
    """Share of artifacts judged rightly by a check and by loading: sound ones accepted, damaged copies refused with an error
    of agentforge's own in one line."""

    def flip(place: float) -> Callable[[Path], Any]:
        def damage(folder: Path) -> None:
            data = bytearray((folder / "model.safetensors").read_bytes())
            data[int(place * (len(data) - 1))] ^= 16
            (folder / "model.safetensors").write_bytes(data)

        return damage

    def cut(folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1])

    def row(**changes: Any) -> Callable[[Path], Any]:
        def damage(folder: Path) -> None:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            next(one for one in manifest["tensors"] if one["stage"]).update(changes)
            manifest.pop("sha256", None)  # its own, which would tell before any other check
            (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")

        return damage

    def only_for(which: str) -> Callable[[Path], Any]:
        """A byte of a plane is another, and every hash but one is made to match: only that one can tell."""

        def damage(folder: Path) -> None:
            file, manifest = folder / "model.safetensors", json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            data = bytearray(file.read_bytes())
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            about = next(one for one in manifest["tensors"] if not one["stage"])
            first, last = (8 + int.from_bytes(data[:8], "little") + at for at in header[about["name"]]["data_offsets"])
            data[first] ^= 1
            file.write_bytes(data)
            hashes = {"file": hashlib.sha256(data).hexdigest(), "tensor": hashlib.sha256(data[first:last]).hexdigest()}
            if which != "file":
                manifest["files"][file.name]["sha256"] = hashes["file"]
            if which != "tensor":
                about["sha256"] = hashes["tensor"]
            manifest.pop("sha256", None)  # its own, which would tell before any other check
            (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")

        return damage

    def side_file(folder: Path) -> None:
        (folder / "config.json").write_text((folder / "config.json").read_text(encoding="utf-8") + " ", encoding="utf-8")

    damages: list[Callable[[Path], Any]] = [flip(place) for place in (0.0, 0.02, 0.3, 0.5, 0.7, 1.0)]
    damages += [cut, row(bits=8), row(bytes=1), row(shape=[1, 1]), row(sha256="0" * 64), row(relative_error=-1.0)]
    damages += [lambda folder: (folder / "model.safetensors").unlink(), lambda folder: (folder / MANIFEST).unlink()]
    damages += [only_for("file"), only_for("tensor"), side_file]
    right: list[bool] = []
    for i, stage in enumerate(("seedlm:K=8,C=8,P=3", "rounding:bits=3,group=32 | entropy")):
        sound = compress(open_model("digits-mlp"), stage, workshop.folder / f"sound-{i}", overwrite=True, progress=False)
        right.append(bool(sound.verify()) and bool(load(sound.path).model))
        for damage in damages:
            folder = workshop.folder / "damaged"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(sound.path, folder)
            damage(folder)
            try:
                Artifact(folder).verify()
                right.append(False)
            except AgentForgeError as error:
                right.append(len(str(error).splitlines()) == 1)
    return share(workshop, right, "artifacts", "damaged copies refused", model="digits-mlp")
