"""A LoRA adapter (Hu et al. 2022) beside its base model: W + s B A, computed when the weight is read.

What an adapter's configuration says beyond what is known here is refused by its name, for it may change what is computed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .errors import BadInput
from .models import BuiltModel, LanguageModel
from .tensorfiles import Entry, index_file, plain_file, read_tensor, sha256_file

SETTINGS, FILE = "adapter_config.json", "adapter_model.safetensors"
INSTEAD = "merge it into its base first (peft: merge_and_unload, save_pretrained)"
# Which layers were chosen, and how they were trained: of no account once the matrices are there.
OF_TRAINING = {
    *("auto_mapping", "base_model_name_or_path", "peft_version", "revision", "task_type", "inference_mode"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "rank_pattern"),
    *("megatron_core", "qalora_group_size"),
}
FOLLOWED = {"peft_type", "r", "lora_alpha", "use_rslora", "fan_in_fan_out", "init_lora_weights", "bias"}
# Ways to begin that leave the base as it is; others change it.
BEGINNINGS = (None, True, False, "gaussian", "orthogonal", "eva")


class AdapterModel(LanguageModel):
    """A base model with an adapter merged into it.  Configuration and tokenizer are the base's.

    settings: of adapter_config.json.  Raises BadInput for an adapter that is no plain LoRA, or not one of this base.
    """

    def __init__(self, path: Path, settings: dict[str, Any], base: LanguageModel) -> None:
        super().__init__(path.resolve().name, base.path, dict(base.entries), {**base.source, "adapter": path.resolve().name})
        self.config, self._base, self._files = base.config, base, [path / SETTINGS, path / FILE]
        if isinstance(base, BuiltModel):
            raise BadInput(f"{path}: adapts {base.name}, whose tensors are renamed when it is opened; {INSTEAD}")
        try:
            self._pairs = _pairs(path, settings, base)
        except BadInput as error:
            raise BadInput(f"{path}: {error}; {INSTEAD}") from None
        for name in self._pairs:
            self.entries[name] = self.entries[name]._replace(dtype=torch.float32)
        self.weight_files = [*base.weight_files, path / FILE]

    def fingerprint_now(self) -> str:
        """A hash of the base's fingerprint and of the adapter's two files."""
        parts = [self._base.fingerprint_now(), *map(sha256_file, self._files)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def reader(self, name: str) -> Callable[[], torch.Tensor]:
        """`tensor(name)` as a function that can be sent to another process."""
        read = self._base.reader(name)
        return partial(_merged, read, *self._pairs[name]) if name in self._pairs else read


def _merged(read: Callable[[], torch.Tensor], down: Entry, up: Entry, scale: float, transposed: bool) -> torch.Tensor:
    """W + s B A, float32, as the base stores W.  down: where A lies, float[r, in].  up: B, float[out, r]."""
    change = read_tensor("lora_B", up).to(torch.float32) @ read_tensor("lora_A", down).to(torch.float32)
    return read().to(torch.float32).add(change.T if transposed else change, alpha=scale)


def _pairs(path: Path, settings: dict[str, Any], base: LanguageModel) -> dict[str, tuple[Entry, Entry, float, bool]]:
    """Of each weight that is changed: where A and B lie, s, and whether the base stores it transposed."""
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise BadInput(f"is an adapter of kind {kind!a:.40}, of which only LORA is known")
    unknown = [key for key, value in settings.items() if value and key not in OF_TRAINING | FOLLOWED]
    if settings.get("init_lora_weights") not in BEGINNINGS:
        unknown.append("init_lora_weights")
    if settings.get("bias", "none") != "none":
        unknown.append("bias")
    if unknown:
        raise BadInput(f"{SETTINGS} has {unknown[0]!a:.60}={settings[unknown[0]]!a:.60}, which is not known")
    alpha, roots = settings.get("lora_alpha"), settings.get("use_rslora")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not abs(alpha) < 1e30:
        raise BadInput(f"{SETTINGS} has lora_alpha={alpha!a:.40}, expected a number")
    file = plain_file(path, FILE)
    if not file.is_file():
        raise BadInput(f"{FILE} is missing (other formats are not opened)")
    stored = index_file(file)
    weights = {weight.name: weight for weight in base.weights(embeddings=True) if not weight.experts}
    found = {}
    for name, down in stored.items():
        stem = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        if name.endswith(".lora_B.weight") and name.replace(".lora_B.", ".lora_A.") in stored:
            continue
        up = stored.get(name.replace(".lora_A.", ".lora_B."))
        weight = weights.get(f"{stem}.weight")
        if not name.endswith(".lora_A.weight") or up is None or weight is None:
            raise BadInput(f"tensor {name!a:.120} does not belong to a LoRA of a linear layer of {base.name}")
        shapes, rank = (down.shape, up.shape), down.shape[0] if down.shape else 0
        if rank < 1 or shapes != ((rank, weight.shape[1]), (weight.shape[0], rank)):
            raise BadInput(f"{name}: {list(shapes[0])} and {list(shapes[1])} do not fit {weight.name} {list(weight.shape)}")
        if not (down.dtype.is_floating_point and up.dtype.is_floating_point):
            raise BadInput(f"{name}: is {down.dtype} and {up.dtype}, expected floats")
        found[weight.name] = down, up, alpha / (math.sqrt(rank) if roots else rank), weight.transposed
    if not found:
        raise BadInput(f"{FILE} holds no LoRA")
    return found
