"""Probes of training, hand-offs and speed.

What a language model would take hours for is measured where it can be: on its last two blocks, or on digits-mlp, whose
phase 4 takes seconds.  The measurement's protocol says which.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from agentforge import evaluation, handoff, tracking
from agentforge.artifact import dequantize
from agentforge.audit.probes import Count, Positive, Share, probe
from agentforge.audit.workshop import Workshop
from agentforge.errors import BadInput
from agentforge.evaluation import Measurement, intervals, texts
from agentforge.opening import load, open_model
from agentforge.stages import parse
from agentforge.statistics import Calibration, collect
from agentforge.training import gates
from agentforge.training.bitlinear import BitLinear, convert, quantize_activations
from agentforge.training.phase import Phase, adaptive, phase, size_of
from agentforge.training.recover import Recovered, Settings, block_of, recover, windows
from agentforge.training.student import layers_of

DIGITS = Settings(steps=150, batch=128, lr=5e-3, evaluate=50)


def _student(workshop: Workshop) -> nn.Module:
    """The model with every weight that a stage may touch made ternary, straight through."""
    student: nn.Module = copy.deepcopy(workshop.model.model)
    convert(student, [weight.name for weight in workshop.model.weights()])
    return student


@probe("share of tensors")
def gradients_that_flow(workshop: Workshop) -> Measurement:
    """Share of the ternary model's trainable tensors that get a finite gradient, not zero everywhere, from one batch; of a
    ternary layer both gradients have to be those of the identity, dL/dW = (dL/dy)^T x_q and dL/dx = (dL/dy) W_q, however
    large weights and inputs are."""
    student = _student(workshop)
    masked: dict[str, bool] = {}
    for name, layer in layers_of(student, BitLinear):
        _hold_against_identity(f"{name}.weight", layer, masked)
    flow = gates.gradient_flow(student, windows(workshop.model, "selftext", 1, 64))
    total = len(flow.norms) + len(flow.missing) + len(flow.zero) + len(flow.infinite)
    good = [name for name in flow.norms if not masked.get(name)]
    about = {"batch": "64 tokens of selftext", "masked": sum(masked.values())}
    return workshop.exact(len(good) / total, "share of tensors", total, "gradient flow", **about)


def _hold_against_identity(name: str, layer: BitLinear, masked: dict[str, bool]) -> None:
    """Note under the weight's name, in the next backward pass, whether the layer's gradients are not the identity's."""
    seen: dict[str, torch.Tensor] = {}

    def forward(_: Any, args: tuple[torch.Tensor]) -> None:
        seen["x"] = quantize_activations(args[0].detach()).flatten(0, -2)

    def before(_: Any, of_y: tuple[torch.Tensor]) -> None:
        seen["y"] = of_y[0].flatten(0, -2)

    def after(_: Any, of_x: tuple[torch.Tensor | None], __: Any) -> None:
        if of_x[0] is not None:  # pictures need no gradient
            weight = layer.quantized()
            by_hand = seen["y"] @ (weight.T if layer.transposed else weight)
            masked[name] = masked.get(name, False) or not _near(of_x[0].flatten(0, -2), by_hand)

    def of_weight(gradient: torch.Tensor) -> None:
        by_hand = seen["y"].T @ seen["x"]
        masked[name] = masked.get(name, False) or not _near(gradient, by_hand.T if layer.transposed else by_hand)

    layer.register_forward_pre_hook(forward)
    layer.register_full_backward_pre_hook(before)
    layer.register_full_backward_hook(after)
    layer.weight.register_hook(of_weight)


def _near(found: torch.Tensor, by_hand: torch.Tensor) -> bool:
    return float((found - by_hand).norm()) <= 1e-3 * float(by_hand.norm())


@probe("share of weights")
def export_agreement(workshop: Workshop) -> Measurement:
    """Share of weights that are on disk, bit for bit, what the training's forward pass computes with."""
    stored = load(workshop.artifact("ternary").path)
    same = total = 0
    for name, layer in layers_of(_student(workshop), BitLinear):
        used = layer.quantized()
        same += int((used == stored.tensor(f"{name}.weight")).sum())
        total += used.numel()
    return workshop.exact(same / total, "share of weights", total, "forward pass against disk")


def _has_amx() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware, three times as fast as float32."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())


def _recovered(workshop: Workshop, steps: int, lr: float, optimizer: str, seed: int) -> Recovered:
    blocks = sorted({block_of(w.name) for w in workshop.model.weights()}, key=lambda name: int(name.rpartition(".")[2]))[-2:]
    names = [w.name for w in workshop.model.weights() if block_of(w.name) in blocks]
    settings = Settings(
        steps=steps,
        batch=2,
        context=64,
        lr=lr,
        evaluate=steps,
        heldout=512,
        optimizer=optimizer,  # type: ignore[arg-type]
        dtype="bfloat16" if _has_amx() else "float32",
        seed=seed,
    )
    return recover(
        workshop.model,
        workshop.folder / f"recovered-{optimizer}-{lr:g}-{steps}-{seed}",
        settings=settings,
        names=names,
        overwrite=True,
        progress=False,
    )


def _kl_of_unigrams(workshop: Workshop) -> float:
    """KL(model || unigrams), nats per token, on the held-out text that `recovery` looks at: frequencies of the tokens of
    the text to train on, each counted once more than it is there."""
    seen = windows(workshop.model, "selftext", 512, 64).reshape(-1)
    held = windows(workshop.model, texts.find_text("selftext", "heldout"), 8, 64)
    with torch.inference_mode():
        logits = workshop.model.model(input_ids=held, use_cache=False).logits
        theirs = logits.flatten(0, 1).float().log_softmax(-1)
        counts = torch.bincount(seen, minlength=theirs.shape[-1]).double() + 1
        return float((theirs.exp() * (theirs - (counts / counts.sum()).log())).sum(-1).mean())


@probe("share of KL", slow=True)
def recovery(workshop: Workshop, steps: Count, lr: Positive = 1e-3, optimizer: str = "adamw") -> Measurement:
    """Share of the KL divergence that training takes back, the model's last two blocks being ternary; held-out selftext.

    Of no more than what unigrams lose, a model that has read nothing of the context: a model that is worse than that, and
    stays so, has recovered nothing, however much less bad it became.  The mean over seeds (which windows are seen in which
    order), whose error is that of the seeds: all look at one text.
    """
    runs = [_recovered(workshop, steps, lr, optimizer, seed) for seed in range(workshop.effort.seeds)]
    unigrams, before = _kl_of_unigrams(workshop), runs[0].before.kl
    left = torch.tensor([run.after.kl / min(before, unigrams) for run in runs], dtype=torch.float64)
    protocol = {
        "metric": "1 - KL after / the lesser of KL before and KL of unigrams",
        "weights": "the last two blocks",
        "steps": steps,
        "tokens": steps * 128,
        "lr": lr,
        "optimizer": optimizer,
        "text": "selftext/heldout",
        "seeds": len(runs),
        "dtype": "bfloat16" if _has_amx() else "float32",
        "KL of unigrams": unigrams,
        "KL before": before,
        "KL after": [run.after.kl for run in runs],
    }
    inputs = {"model": workshop.model.fingerprint}
    found = intervals.mean(1 - left, error=f"{len(runs)} seeds") | {"n": runs[0].after.n}
    return Measurement(unit="share of KL", protocol=protocol, seed=0, inputs=inputs, **found)


@probe("nats")
def resume_difference(workshop: Workshop) -> Measurement:
    """Largest difference between the losses of a run that was killed and went on, and one that was not (digits-mlp)."""
    from agentforge.training import recover as module

    model, folder = open_model("digits-mlp"), workshop.folder / "resumed"
    settings = Settings(steps=20, batch=64, lr=5e-3, evaluate=5)
    whole = recover(model, folder / "whole", settings=settings, overwrite=True, progress=False)
    step = module._Run._one_step

    def killed(run: Any) -> float:
        if run.step == 13:
            raise KeyboardInterrupt
        return step(run)

    shutil.rmtree(folder / "parts", ignore_errors=True)
    try:
        with mock.patch.object(module._Run, "_one_step", killed):
            recover(model, folder / "parts", settings=settings, overwrite=True, progress=False)
    except KeyboardInterrupt:
        pass
    parts = recover(model, folder / "parts", settings=settings, progress=False)
    losses = [[loss for row in run.history for loss in row["losses"]] for run in (whole, parts)]
    worst = max(abs(a - b) for a, b in zip(*losses, strict=True))
    return workshop.exact(worst, "nats", len(losses[0]), "killed at step 13 against not killed", model="digits-mlp")


@probe("share", slow=True)
def calibration_gain(workshop: Workshop, tokens: Count) -> Measurement:
    """Output error of the calibrated ternary rule over that of the paper's, summed over the sample of matrices, on
    H = E[x x^T]."""
    seen = collect(workshop.model, Calibration(tokens=tokens, context=min(1024, tokens)), progress=False)
    rules = [parse("ternary:rule=calibrated"), parse("ternary")]
    lost, count = [0.0, 0.0], 0
    for weight in workshop.sample():
        dense, stats = weight.load().float(), seen[weight.name]
        count += dense.numel()
        for i, rule in enumerate(rules):
            gap = dense - rule.decode(rule.encode(dense, stats))
            lost[i] += float(((gap @ stats.hessian) * gap).sum(dtype=torch.float64))
    return workshop.exact(
        lost[0] / lost[1], "share", count, "output error, calibrated over plain", tokens=tokens, text="selftext/calibration"
    )


@probe("share", slow=True)
def fewer_samples(workshop: Workshop) -> Measurement:
    """Output error of the calibrated ternary rule with a quarter of the calibration text, over that with all of it, on text
    that neither has seen; mean over the sample of matrices, each checked against itself."""
    tokens = {"smoke": 512, "standard": 2048, "full": 8192}[workshop.effort.name]
    window = min(128, workshop.context)
    seen = {
        count: collect(workshop.model, Calibration("selftext", count, window), progress=False)
        for count in (tokens // 4, tokens)
    }
    unseen = texts.find_text("selftext", "heldout")
    judged_by = collect(workshop.model, Calibration(unseen, tokens, window), progress=False)
    rule, ratios = parse("ternary:rule=calibrated"), []
    for weight in workshop.sample():
        dense, hessian = weight.load().float(), judged_by[weight.name].hessian
        gaps = [dense - rule.decode(rule.encode(dense, seen[count][weight.name])) for count in seen]
        few, many = (float(((gap @ hessian) * gap).sum(dtype=torch.float64)) for gap in gaps)
        ratios.append(few / many)
    values = torch.tensor(ratios, dtype=torch.float64)
    protocol = {
        "metric": "output error, a quarter of the text over all of it",
        "tokens": tokens,
        "samples": tokens // window,
    }
    inputs = {"model": workshop.model.fingerprint}
    found = intervals.mean(values, error=f"{len(values)} matrices")
    return Measurement(unit="share", protocol=protocol, inputs=inputs, **found)


@probe("x")
def recovery_gain_of_filter(
    workshop: Workshop, alpha: Share = 0.98, lamb: float = 2.0, other_alpha: Share = 0.98, other_lamb: float = 0.0
) -> Measurement:
    """KL after recovery with another setting of Grokfast's filter (by default none), over that with this one; digits-mlp,
    MuGrokfast, pairs of runs of one seed."""
    from agentforge.training import mugrokfast
    from agentforge.training import recover as module

    model, gains = open_model("digits-mlp"), []
    for seed in range(max(3, workshop.effort.seeds)):
        left = []
        for a, strength in ((other_alpha, other_lamb), (alpha, lamb)):
            settings = Settings(steps=60, batch=128, lr=5e-3, evaluate=20, optimizer="mugrokfast", seed=seed)
            made = partial(mugrokfast.MuGrokfast, alpha=a, lamb=strength)
            folder = workshop.folder / f"filter-{a}-{strength}-{seed}"
            with mock.patch.object(module, "MuGrokfast", made):
                done = recover(model, folder, settings=settings, overwrite=True, progress=False)
            left.append(done.after.kl)
        gains.append(left[0] / left[1])
    values = torch.tensor(gains, dtype=torch.float64)
    protocol = {"metric": "KL with the other filter / KL with this one", "model": "digits-mlp", "steps": 60}
    protocol |= {"alpha": alpha, "lambda": lamb, "other alpha": other_alpha, "other lambda": other_lamb}
    found = intervals.mean(values, error=f"{len(values)} seeds")
    return Measurement(unit="x", protocol=protocol, seed=0, inputs={"model": model.fingerprint}, **found)


@probe("share of tokens", slow=True)
def dual_agreement(workshop: Workshop, tokens: Count = 511) -> Measurement:
    """Share of tokens at which the packed model and the dequantised float16 one have the same most likely next token."""
    artifact = workshop.artifact("ternary")
    folder = workshop.folder / "dequantized"
    shutil.rmtree(folder, ignore_errors=True)
    dense = open_model(dequantize(artifact, folder))
    tokens = min(tokens, workshop.tokens, workshop.context - 1)
    found = evaluation.divergence(
        dense, load(artifact.path), workshop.text, context=tokens + 1, tokens=tokens, progress=False
    )
    return found.top1


def _digits_phase(workshop: Workshop) -> Phase:
    """Phase 4 on digits-mlp, trained: once a workshop."""
    return phase("digits-mlp", workshop.folder / "phase-digits", DIGITS, always_train=True, progress=False)


@probe("metrics")
def metrics_with_values(workshop: Workshop) -> Measurement:
    """How many of the 19 documented metrics a run of phase 4 logs with a measured value (digits-mlp), read back."""
    found = tracking.read(_digits_phase(workshop).path / "tracking")
    count = sum(name in found and math.isfinite(found[name]) for name in tracking.METRICS)
    return workshop.exact(float(count), "metrics", len(tracking.METRICS), "metrics read back", model="digits-mlp")


@probe("share of accuracy")
def accuracy_drop(workshop: Workshop) -> Measurement:
    """Share of its accuracy that digits-mlp loses in phase 4, training included, on 450 test pictures."""
    result = _digits_phase(workshop)
    kept = evaluation.accuracy_retention(load(result.path / "quantized"), open_model("digits-mlp"))
    return kept.through(lambda x: 1 - x, "share of accuracy", metric="1 - accuracy / original accuracy", model="digits-mlp")


@probe("share of cases")
def triggers_that_are_right(workshop: Workshop) -> Measurement:
    """Share of cases in which training is triggered exactly when quality fell by more than 5% (digits-mlp)."""
    right = 0
    cases = ["ternary", "ternary:rule=threshold,tau=0.1", "ternary:rule=threshold,tau=1.2"]
    quick = Settings(steps=2, batch=64, evaluate=2)
    for i, stage in enumerate(cases):
        result = phase("digits-mlp", workshop.folder / f"trigger-{i}", quick, stage=stage, progress=False)
        right += result.trained == (result.metrics["compression/perplexity_degradation"] > gates.TRIGGER)
    return workshop.exact(right / len(cases), "share of cases", len(cases), "trigger at 5%", model="digits-mlp")


@probe("share of hand-offs")
def handoff_faults_refused(workshop: Workshop) -> Measurement:
    """Share of hand-offs judged rightly: a sound one accepted, and one refused for each of six injected faults."""
    sound = _digits_phase(workshop).path
    absent = {"absent.json": {"bytes": 1, "sha256": "0" * 64}}
    faults: list[Callable[[Path, Any], Any]] = [
        lambda folder, data: data.update(phase=3),
        lambda folder, data: data.update(models={}),
        lambda folder, data: data["models"]["quantized"]["quality"].update(value=0.5),
        lambda folder, data: data["models"]["dequantized"]["files"].update(absent),
        lambda folder, data: (folder / "quantized/model.safetensors").write_bytes(b"0"),
        lambda folder, data: data["models"].update({"../outside": data["models"].pop("quantized")}),
    ]
    right = int(bool(handoff.check_handoff(sound, 4, progress=False)))
    for i, damage in enumerate(faults):
        folder = workshop.folder / f"damaged-{i}"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(sound, folder)
        data = json.loads((folder / handoff.HANDOFF).read_text(encoding="utf-8"))
        damage(folder, data)
        (folder / handoff.HANDOFF).write_text(json.dumps(data), encoding="utf-8")
        try:
            handoff.check_handoff(folder, 4, progress=False)
        except BadInput:
            right += 1
    total = len(faults) + 1
    return workshop.exact(right / total, "share of hand-offs", total, "hand-offs judged rightly", model="digits-mlp")


@probe("share of faults")
def fallback_chain(workshop: Workshop) -> Measurement:
    """Share of faults after which a text is found all the same, and what was skipped is named."""
    faults = {"missing": BadInput("wikitext2: not there"), "broken": BadInput("wikitext2: its sha256 is another")}
    right = 0
    for fault in faults.values():
        with mock.patch.object(texts, "_wikitext2", side_effect=fault):
            found = evaluation.find_text()
        right += found.name == "selftext" and found.skipped == (str(fault),)
    return workshop.exact(right / len(faults), "share of faults", len(faults), "fallback named and used")


@probe("share of target")
def adaptive_ratio(workshop: Workshop) -> Measurement:
    """Ratio on disk, against 32 bits, that the size-adaptive table reaches on this model, over the one it promises."""
    stage, target = adaptive(workshop.model), size_of(workshop.model.parameters)
    reached = workshop.artifact(str(stage)).ratio_to(32)
    return workshop.exact(
        reached / target.ratio,
        "share of target",
        1,
        "size-adaptive ratio",
        size=target.name,
        target=target.ratio,
        ratio=reached,
    )


@probe("x")
def kernel_speed(workshop: Workshop, size: Count = 4096, against: str = "float32") -> Measurement:
    """How many times faster TernaryLinear multiplies one vector than torch does, medians of runs taken in turns."""
    from agentforge.runtime import TernaryLinear

    dense = nn.Linear(size, size, bias=False)
    packed = TernaryLinear.from_linear(dense)
    dtype = getattr(torch, against)
    x = torch.randn(1, size, generator=torch.Generator().manual_seed(0))
    dense, y = dense.to(dtype), x.to(dtype)
    return _faster(workshop, lambda: packed(x), lambda: dense(y), 40, against, f"{size} x {size}, one vector")


@probe("x")
def generation_speed(workshop: Workshop, against: str = "float32", tokens: Count = 16) -> Measurement:
    """How many times faster the ternary model generates from its packed planes than the same model in torch."""
    packed = load(workshop.artifact("ternary").path, runtime="packed").model
    dense = copy.deepcopy(load(workshop.artifact("ternary").path).model).to(getattr(torch, against))
    ids = torch.tensor([workshop.model.encode("The capital of France is", special=True)])
    generate: dict[str, Any] = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}

    def run(module: Any) -> Callable[[], Any]:
        return lambda: module.generate(ids, pad_token_id=0, **generate)

    found = _faster(workshop, run(packed), run(dense), 6, against, f"{tokens} tokens, batch 1, greedy")
    found.protocol["beside torch bfloat16"] = _in_llama_cpp()
    return found


def _in_llama_cpp() -> str:
    """How many times as fast as torch bfloat16 llama.cpp runs files of the default model: no part of the verdict."""
    record = json.loads((texts.CHECKOUT / "reports" / "runtime" / "runtime.json").read_text(encoding="utf-8"))
    rows = [row for name, row in record["rows"].items() if name.startswith("llama.cpp")]
    files = [f"{row['held'] / 1e6:.0f} MB {1 / row['generation']['float32']['ratio']['value']:.1f}x" for row in rows]
    return f"llama.cpp, {', '.join(files)} (reports/runtime, {record['model']}, {record['environment']['cpu']})"


def _faster(
    workshop: Workshop, ours: Callable[[], Any], theirs: Callable[[], Any], runs: int, against: str, what: str
) -> Measurement:
    """Median over pairs of runs of their time over ours."""
    times: list[tuple[float, float]] = []
    with torch.inference_mode():
        ours(), theirs()
        for _ in range(runs):
            taken = []
            for run in (ours, theirs):
                began = time.perf_counter()
                run()
                taken.append(time.perf_counter() - began)
            times.append((taken[0], taken[1]))
    protocol = {
        "metric": f"speed against torch {against}",
        "what": what,
        "threads": torch.get_num_threads(),
        "seconds ours": statistics.median(a for a, _ in times),
        "seconds theirs": statistics.median(b for _, b in times),
    }
    found = intervals.median([b / a for a, b in times])
    return Measurement(unit="x", protocol=protocol, inputs={"model": workshop.model.fingerprint}, **found)
