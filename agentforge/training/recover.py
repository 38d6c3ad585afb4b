"""Recovery: train a compressed model by distillation from its original.

The student starts as a copy of the original with other linear layers (`student`): ternary ones with straight-through
gradients, or such as decode from planes whose floats are trained while their integers stay.  The original is the teacher:
the loss is KL(teacher || student), averaged over all tokens, on any text; no labels are needed.  If the integers are codes
of tcq, both run block by block on the CPU (`distil`): in memory are one block, what is trained, and some windows' logits.

A run is a function of its settings: which windows a step sees depends on the seed and the step alone, so that a run
that was killed continues from its last checkpoint and, on the CPU, repeats the same losses.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from .. import digits, stages
from ..artifact import FORMAT, HISTORY, Artifact, Writer
from ..errors import BadInput
from ..evaluation import intervals
from ..evaluation.texts import Text, find_text
from ..folders import check_out, remove
from ..models import IN_PLACE, LanguageModel, device_named, fastest_device
from ..opening import open_model
from ..pipeline import compress, store
from ..planes import Packed
from ..progress import progress_bar
from ..statistics import Calibration, first_tokens
from ..tensorfiles import read_json, read_sealed, write_sealed
from ..version import __version__
from .bitlinear import convert, set_blend
from .distil import Pair
from .mugrokfast import MuGrokfast, parameter_groups
from .student import STILL, PlaneLinear, Student, layers_of

CLOCKS = {"seconds": time.perf_counter, "cpu_seconds": time.process_time}
HELDOUT = {"selftext": "heldout", "wikitext2": "test"}


@dataclass(frozen=True)
class Settings:
    """How to train.

    steps: of the optimizer.  batch: windows (for digits-mlp, pictures) per step.  context: tokens per window.  passes: parts
    that a batch is computed in, to save memory.  lr: its peak; it rises over `warmup` (a share of the steps) and falls
    along a cosine to a tenth; so does lambda rise, from the dense to the quantised layer.  weight_decay: decoupled.
    clip: largest norm of all gradients together.  evaluate: steps between two looks at the held-out text, each of which
    writes a checkpoint.  heldout: tokens (pictures) to look at.  activations: int8 activations, too.  dtype: "auto" is
    bfloat16 autocast on a GPU that has it.  recompute: gradient checkpointing, which halves the memory and costs a third
    more time.
    """

    steps: int = 1000
    batch: int = 8
    context: int = 512
    passes: int = 1
    lr: float = 1e-3
    optimizer: Literal["adamw", "mugrokfast"] = "adamw"
    warmup: float = 0.1
    weight_decay: float = 0.0
    clip: float = 1.0
    evaluate: int = 50
    heldout: int = 2048
    activations: bool = True
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    recompute: bool = False
    seed: int = 0

    @classmethod
    def of_codes(cls, steps: int, device: str = "cpu") -> Settings:
        """How to train a fitted model within its bytes: gains and norms take large steps well, which few tokens need.

        In float32 on a processor that does not multiply bfloat16, which would take it eight times as long.
        """
        able: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        slow = device == "cpu" and not any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
        dtype: Any = "float32" if slow else "bfloat16"
        return cls(steps=steps, batch=8, passes=2, lr=2e-3, warmup=0.05, evaluate=max(1, min(50, steps // 5)), dtype=dtype)

    def check(self) -> None:
        """Raise BadInput for a value out of range."""
        for name in ("steps", "batch", "context", "passes", "evaluate", "heldout"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise BadInput(f"recovery: {name}={getattr(self, name)!r}; expected a whole number of 1 or more")
        if self.batch % self.passes:
            raise BadInput(f"recovery: batch={self.batch} does not divide into passes={self.passes} equal parts")
        for name, low, high in (("lr", 0.0, 10.0), ("warmup", 0.0, 1.0), ("weight_decay", 0.0, 10.0)):
            if not low <= getattr(self, name) <= high:
                raise BadInput(f"recovery: {name}={getattr(self, name)}; expected {low} to {high}")
        if not self.clip > 0:
            raise BadInput(f"recovery: clip={self.clip}; expected more than 0")
        if self.optimizer not in ("adamw", "mugrokfast") or self.dtype not in ("auto", "float32", "bfloat16"):
            raise BadInput(
                f"recovery: optimizer={self.optimizer!r}, dtype={self.dtype!r}; expected adamw or mugrokfast, and auto, "
                "float32 or bfloat16"
            )


class Look(NamedTuple):
    """What a look at the held-out text gave: KL(teacher || student) in nats per token, its standard error (window by window;
    None for one window), the share of tokens with the teacher's most likely next token, and how many tokens."""

    kl: float
    stderr: float | None
    top1: float
    n: int


class Recovered(NamedTuple):
    """artifact: the packed model.  history: one row per evaluation (step, tokens, loss, kl, ...).  before, after: the first
    and the best look."""

    artifact: Artifact
    history: list[dict[str, Any]]
    before: Look
    after: Look


def recover(
    model: LanguageModel | str | Path,
    out: str | Path,
    stage: stages.Stage | str | None = "ternary",
    settings: Settings | None = None,
    *,
    text: str | Text = "selftext",
    names: Iterable[str] | None = None,
    start: Artifact | str | Path | None = None,
    most_bytes: int | None = None,
    device: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Recovered:
    """Train `model` through `stage` and write the packed artifact `out`, with `history.json` in it.

    stage: ternary (the weights are trained), or any stage whose float planes can be (they are trained, the integers
    stay), or None: `start` is an artifact of tcq (any step each, as `fit` makes them), whose gains are trained.  text: to
    train on; held-out text is selftext's own split, WikiText-2's test split, or the last twentieth of any other text.
    names: weights to compress (default: all that a stage may touch).  start: for other stages than ternary, the artifact
    whose planes to begin with (default: made here by `stage`).  most_bytes: of all planes together, gains included, for
    stage None.  device: default cuda if there is one.

    After a kill, or Ctrl-C, the same call continues from the last checkpoint.  Raises BadInput if model, stage, text or
    settings cannot be used.
    """
    torch_device = device_named(device or fastest_device())
    model = open_model(model) if isinstance(model, str | Path) else model
    stage = stages.parse(stage) if isinstance(stage, str) else stage
    settings = settings or Settings()
    settings.check()
    model.check_context(settings.context)
    found = None if model.is_classifier else Calibration(text).find()
    weights = {weight.name: weight for weight in model.weights()}
    chosen = sorted(weights) if names is None else sorted(set(names))
    if odd := [name for name in chosen if name not in weights]:
        raise BadInput(f"{odd[0]}: is not a weight of {model.name} that a stage may touch; `agentforge models` lists them")
    begin = _start(stage, start)
    check_trainable(model, chosen)
    if stage is None and names is not None:
        raise BadInput("recovery: the weights are those that the artifact to start with encodes; expected names=None")
    ends = {row["name"] for row in begin.rows if row["stage"]} - set(weights) if begin and stage is None else set()
    if begin and ends:
        raise BadInput(f"{begin.path}: encodes {min(ends)}; recovery trains linear layers, so make it with embeddings kept")
    if most_bytes is not None and stage is not None:
        raise BadInput(f"recovery: {stage} has planes of one size; most_bytes is for stage=None")
    if most_bytes is not None and begin:
        rows = [row for row in begin.rows if row["stage"]]
        size = sum(r["bytes"] + (0 if r["stage"].get("gains") else 2 * weights[r["name"]].shape[0]) for r in rows)
        if size > most_bytes:
            raise BadInput(f"recovery: codes and gains take {size:,} bytes, {most_bytes:,} are allowed; start with fewer")
    recipe = {
        "format": FORMAT,
        "agentforge": __version__,
        "model": model.fingerprint,
        "stage": stage.to_json() if stage is not None else {"stage": "codes of the artifact to start with"},
        "embeddings": False,
        "seed": settings.seed,
        "training": {
            **asdict(settings),
            "text": found and found.sha256,
            "weights": hashlib.sha256("\n".join(chosen).encode()).hexdigest(),
            "start": begin and begin.sha256,
            **({"most_bytes": most_bytes} if most_bytes is not None else {}),
        },
    }
    out = check_out(out, model.path, *([begin.path] if begin else []), replace=overwrite)
    with Writer(out, recipe, overwrite) as writer:  # held while training: what cannot be written is refused before it
        if not writer.finished:
            data = _data(model, found, settings)
            run = _Run(model, stage, settings, chosen, writer, torch_device, progress, *data)
            run.prepare(begin)
            writer.history = run.train()
            packed, kept = run.result()
            by = {name: layer.stage for name, layer in run.layers.items()}
            store(model, by, packed, writer, kept=kept, progress=progress)
    history: Any = read_json(out / HISTORY)["history"]
    looks = [Look(row["kl"], row["stderr"], row["top1"], row["n"]) for row in history]
    return Recovered(Artifact(out), history, looks[0], min(looks[1:] or looks, key=lambda look: look.kl))


def check_trainable(model: LanguageModel, names: Iterable[str] | None = None) -> None:
    """Raise BadInput for a model that changes its weights in place, and if one of these weights (default: all that a stage
    may touch) is of experts: linear layers are trained."""
    if (kind := model.config.get("model_type")) in IN_PLACE:
        raise BadInput(f"{model.name}: {kind} changes its weights in place, so that it cannot be trained; compress it alone")
    experts = {weight.name for weight in model.weights() if weight.experts}
    if found := sorted(experts if names is None else experts & set(names)):
        raise BadInput(f"{model.name}: {found[0]} is of experts, and linear layers alone are trained; compress it alone")


def _start(stage: stages.Stage | None, start: Artifact | str | Path | None) -> Artifact | None:
    if start is None:
        if stage is None:
            raise BadInput("recovery: no stage, and no artifact to start with; expected one of the two")
        return None
    if stage is not None and stage.trains == "weights":
        raise BadInput(f"recovery: {stage} is trained from the model itself and takes no artifact to start with")
    return start if isinstance(start, Artifact) else Artifact(start)


def schedule(step: int, steps: int, warmup: float) -> tuple[float, float]:
    """What the learning rate is multiplied by at a step (from 0): the rise, up to 1 over `warmup` (a share of the steps),
    and the fall, from 1 along a cosine to a tenth."""
    rise = min(1.0, (step + 1) / max(1.0, warmup * steps))
    return rise, 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / steps))


@dataclass
class _Run:
    """One run of `recover`: teacher, student, optimizer, and where they stand.  writer: of the artifact; what training goes
    on from after a kill lies among its pieces."""

    model: LanguageModel
    stage: stages.Stage | None
    settings: Settings
    names: list[str]
    writer: Writer
    device: torch.device
    progress: bool
    inputs: torch.Tensor
    heldout: torch.Tensor

    def prepare(self, start: Artifact | None) -> None:
        """Build teacher, student and optimizer; take up a checkpoint."""
        settings = self.settings
        half = {"auto": self.device.type == "cuda" and torch.cuda.is_bf16_supported(), "bfloat16": True}
        still, at_once = None if self.stage else start, settings.batch // settings.passes
        self.pair = Pair(self.model, still, self.device, at_once, half.get(settings.dtype, False))
        self.student = self.pair.student
        if self.stage is not None:
            self._compress(self.stage, start)
        self.layers = {f"{name}.weight": layer for name, layer in layers_of(self.student, Student)}
        self.trained = self._trainable()
        for parameter in self.trained.values():
            parameter.requires_grad_(True)
        if settings.recompute and not self.pair.by_window and not self.model.is_classifier:
            # transformers renamed it in 5.2x; the older one stays for the GPU machine's version.
            name = "activation_checkpointing_enable"
            getattr(self.student, name, self.student.gradient_checkpointing_enable)()
            self.student.enable_input_require_grads()
        self.optimizer = self._optimizer()
        self.step, self.history = 0, []  # type: int, list[dict[str, Any]]
        pieces = self.writer.tensors
        self._checkpoint, self._best = pieces / "checkpoint.safetensors", pieces / "best.safetensors"
        self._load()

    def _compress(self, stage: stages.Stage, start: Artifact | None) -> None:
        """Put students in the place of the layers: ternary ones, or of the planes of `start`; without one they are made in a
        folder that is removed again."""
        if stage.trains == "weights":
            convert(self.student, self.names, self.settings.activations, stage=stage)
            return
        if not stage.trains:
            able = ", ".join(["ternary", *(name for name in stages.names() if stages.get(name).trains == "floats")])
            raise BadInput(f"recovery: {stage.name} has no float planes that can be trained; choose from {able}")
        folder = self.writer.out.with_name(self.writer.out.name + ".training-start")
        artifact = start or compress(self.model, stage, folder, overwrite=True)
        if artifact.manifest["recipe"]["stage"] != stage.to_json():
            raise BadInput(f"{artifact.path}: was not made with {stage}; pass the stage it was made with")
        rows, layers = {row["name"]: row for row in artifact.rows if row["stage"]}, dict(self.student.named_modules())
        for name in self.names:
            packed, owner = artifact.read(rows[name]), name.removesuffix(".weight")
            assert isinstance(packed, Packed)
            self.student.set_submodule(owner, PlaneLinear(layers[owner], stage, packed))
        self.student.to(self.device)
        if start is None:
            remove(folder)

    def _trainable(self) -> dict[str, nn.Parameter]:
        """What is trained: parameters of the compressed layers, and the vectors (norms) of the blocks they are in."""
        layers = {name.removesuffix(".weight") for name in self.layers}
        blocks = {block_of(name) for name in layers}
        found = {}
        for name, parameter in self.student.named_parameters():
            inside = name.rpartition(".")[0].removesuffix(".floats") in layers
            beside = parameter.dim() == 1 and block_of(name) in blocks and block_of(name) != ""
            if parameter.is_floating_point() and (inside or beside) and not name.endswith(f".{STILL}"):
                found[name] = parameter
        return found

    def _optimizer(self) -> torch.optim.Optimizer:
        settings = self.settings
        if settings.optimizer == "mugrokfast":
            groups = parameter_groups(self.student)
            return MuGrokfast(groups, lr=settings.lr, weight_decay=settings.weight_decay)
        matrices = [p for p in self.trained.values() if p.dim() >= 2]
        vectors = [p for p in self.trained.values() if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        return torch.optim.AdamW([g for g in groups if g["params"]], lr=settings.lr, betas=(0.9, 0.95), fused=True)

    def train(self) -> list[dict[str, Any]]:
        """Train to the end; leaves the best state in the student."""
        settings = self.settings
        title = f"recovery: {self.model.name}" if self.progress else None
        before = self.history[-1] if self.history else dict.fromkeys(CLOCKS, 0.0)
        began = {name: clock() - before[name] for name, clock in CLOCKS.items()}
        losses: list[float] = []
        with progress_bar(title, settings.steps, "step", self.step) as bar:
            if not self.history:
                self._note(losses, began)
            while self.step < settings.steps:
                losses.append(self._one_step())
                self.step += 1
                bar.update()
                if self.step % settings.evaluate == 0 or self.step == settings.steps:
                    self._note(losses, began)
                    losses = []
                    bar.set_postfix(kl=f"{self.history[-1]['kl']:.4f}")
        if best := read_sealed(self._best):
            self._restore(best[0])
        set_blend(self.student, 1.0)
        return self.history

    def _one_step(self) -> float:
        """Forward, backward, and one step of the optimizer.  Returns the loss."""
        settings = self.settings
        rise, fall = schedule(self.step, settings.steps, settings.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr * rise * fall
        set_blend(self.student, rise if settings.warmup > 0 else 1.0)
        self.optimizer.zero_grad(set_to_none=True)
        total = self.pair.gradients(self._batch(self.step))
        if not math.isfinite(total):
            raise BadInput(f"recovery: the loss is {total} at step {self.step}; use a lower lr, or a longer warmup")
        nn.utils.clip_grad_norm_(list(self.trained.values()), settings.clip)
        self.optimizer.step()
        return total

    def _batch(self, step: int) -> torch.Tensor:
        """The inputs of a step: all of them in an order of its own each time round, which the seed fixes."""
        rows, count = len(self.inputs), self.settings.batch
        picked: list[int] = []
        while len(picked) < count:
            position = step * count + len(picked)
            generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + position // rows)
            order = torch.randperm(rows, generator=generator)
            picked += order[position % rows : position % rows + count - len(picked)].tolist()
        return self.inputs[picked]

    def look(self) -> Look:
        """KL and agreement on the held-out text."""
        kl, same = zip(*self.pair.beside(self.heldout), strict=True)
        values = torch.cat(kl)
        found = intervals.mean(values.reshape(len(self.heldout), -1).mean(1))
        return Look(found["value"], found["stderr"], float(torch.cat(same).mean()), values.numel())

    def _note(self, losses: list[float], began: dict[str, float]) -> None:
        """Look, add a row to the history, and write a checkpoint; the best state goes to a file of its own."""
        set_blend(self.student, 1.0)
        look = self.look()
        best = all(look.kl < row["kl"] for row in self.history[1:])
        self.history.append(
            {
                "step": self.step,
                "tokens": self.step * self.settings.batch * (1 if self.model.is_classifier else self.settings.context),
                "epochs": self.step * self.settings.batch / len(self.inputs),
                "lr": self.optimizer.param_groups[0]["lr"] if self.step else 0.0,
                "loss": sum(losses) / len(losses) if losses else None,
                "losses": list(losses),
                **look._asdict(),
                **{name: clock() - began[name] for name, clock in CLOCKS.items()},
            }
        )
        if self.step:
            if best:
                write_sealed(self._best, {name: p.detach().cpu() for name, p in self.trained.items()}, {})
            self._save()

    def _save(self) -> None:
        """Parameters, the optimizer's state, the step and the history, in one file that is replaced in one step."""
        tensors = {f"model.{name}": p.detach().cpu() for name, p in self.trained.items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": value.cpu() for key, value in state.items()}
        write_sealed(self._checkpoint, tensors, {"step": str(self.step), "history": json.dumps(self.history)})

    def _load(self) -> None:
        """Continue from the checkpoint, if it and the best state are there and as they were written; else begin."""
        found = read_sealed(self._checkpoint)
        if found is None or read_sealed(self._best) is None:
            self._best.unlink(missing_ok=True)
            return
        tensors, metadata = found
        self.step, self.history = int(metadata["step"]), json.loads(metadata["history"])
        self._restore(tensors, "model.")
        state: dict[int, dict[str, Any]] = {}
        for key, tensor in tensors.items():
            kind, _, rest = key.partition(".")
            if kind == "optimizer":
                index, _, name = rest.partition(".")
                state.setdefault(int(index), {})[name] = tensor
        whole = self.optimizer.state_dict()
        self.optimizer.load_state_dict({**whole, "state": state})

    @torch.no_grad()
    def _restore(self, tensors: dict[str, torch.Tensor], prefix: str = "") -> None:
        for name, parameter in self.trained.items():
            parameter.copy_(tensors[prefix + name])

    def result(self) -> tuple[dict[str, Callable[[], Packed]], dict[str, torch.Tensor]]:
        """Planes of the compressed weights, and the other tensors that were trained, by their names in the model."""
        packed: dict[str, Callable[[], Packed]] = {name: layer.packed for name, layer in self.layers.items()}
        layers = {name.removesuffix(".weight") for name in packed}
        kept = {
            name: p.detach().cpu()
            for name, p in self.trained.items()
            if name in self.model.entries and name not in packed and (name.rpartition(".")[0] not in layers or p.dim() == 1)
        }
        return packed, kept


def _data(model: LanguageModel, text: Text | None, settings: Settings) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs to train on, and held-out ones: int[windows, context], or float[pictures, 64]."""
    if text is None:
        pictures = digits.data()[0]
        held = max(1, min(settings.heldout, len(pictures) // 10))
        return pictures[:-held], pictures[-held:]
    inputs = windows(model, text, settings.steps * settings.batch, settings.context)
    count = max(1, settings.heldout // settings.context)
    if text.name in HELDOUT:
        return inputs, windows(model, find_text(text.name, HELDOUT[text.name]), count, settings.context)
    count = min(count, max(1, len(inputs) // 20))
    if len(inputs) <= count:
        raise BadInput(f"text {text.name} has {len(inputs)} windows of {settings.context} tokens; too few to hold some out")
    return inputs[:-count], inputs[-count:]


def windows(model: LanguageModel, text: str | Text, count: int, context: int) -> torch.Tensor:
    """At most the first `count` windows of a text to train on, int[count, context]; pictures, float[n, 64], for
    digits-mlp."""
    if model.is_classifier:
        return digits.data()[0]
    found = Calibration(text).find()
    ids = first_tokens(model, found.text, count * context)
    rows = len(ids) // context
    if rows == 0:
        raise BadInput(f"text {found.name}/{found.split} has {len(ids)} tokens; a window takes {context}")
    return torch.tensor(ids[: rows * context]).reshape(rows, context)


def block_of(name: str) -> str:
    """The decoder block that a parameter or layer is in: its name up to and with the first number, "" for none."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: i + 1])
    return ""
