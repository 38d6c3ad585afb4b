"""Artifacts in transformers: `AutoModelForCausalLM.from_pretrained(folder)` after `import agentforge.huggingface`.

Importing this module registers a quantizer under the name that an artifact's config.json has.  transformers builds the
model without memory and loads the weight files itself, sharded or not, to whatever device; the quantizer puts packed layers
(`agentforge.runtime`) where the manifest has encoded weights, so that the planes are what is loaded.  Before that, manifest,
configuration and the headers of the weight files are checked against each other.
"""

from __future__ import annotations

import copy
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from . import stages
from .artifact import FORMAT, MANIFEST, TOKENIZER, Artifact, oriented, relative_error, write_manifest
from .bits import tensor_bytes
from .errors import BadArtifact, BadInput
from .opening import ArtifactModel
from .planes import Packed
from .runtime import TernaryLinear
from .runtime.packed import finish, name_in, replace
from .tensorfiles import (
    WEIGHTS_INDEX,
    Entry,
    describe_files,
    names_in,
    plain_file,
    read_json,
    read_tensor,
    write_json,
    write_safetensors,
)

if TYPE_CHECKING:
    from .evaluation import Measurement

METHOD = "agentforge"


class AgentForgeConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What config.json says of the quantization; the manifest beside it is what is read."""

    def __init__(self, quant_method: str = METHOD, format: int = FORMAT, stage: Any = None, **unknown: Any) -> None:
        if unknown:
            raise BadInput(f"quantization_config: {next(iter(unknown))!a:.80} is not a setting of agentforge; take it out")
        self.quant_method = quant_method
        self.format = format
        self.stage = stage


class AgentForgeQuantizer(HfQuantizer):  # type: ignore[misc]
    """Prepares a model that transformers builds for the planes of an artifact, and writes the artifact again."""

    requires_calibration = True
    artifact: Artifact
    loaded_config: dict[str, Any]
    loaded_generation: dict[str, Any]

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **_: Any) -> Any:
        if not checkpoint_files:
            raise BadInput("an artifact of agentforge is loaded from its folder; pass that to from_pretrained")
        folder = Path(checkpoint_files[0]).parent
        _fetch(model.config, folder, MANIFEST)
        self.artifact = Artifact(folder)
        entries = self.artifact.entries
        if {Path(file) for file in checkpoint_files} != {entry.file for entry in entries.values()}:
            raise BadArtifact(f"{folder}: transformers reads other weight files here than those that the manifest has")
        ArtifactModel(self.artifact).check()  # against config.json
        replace(model, self.artifact, model.dtype)
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        # A model may ask for float32 by parts of names (`_keep_in_fp32_modules`); planes are never to be converted.
        buffers = dict(model.named_buffers())
        for name, entry in self.artifact.entries.items():
            found = buffers.get(own := name_in(model, name))
            if found is not None and found.dtype != entry.dtype:
                path, _dot, leaf = own.rpartition(".")
                setattr(model.get_submodule(path), leaf, found.to(entry.dtype))
        finish(model)
        self.loaded_config = _config_of(model)
        self.loaded_generation = _generation_of(model)
        model.save_pretrained = MethodType(_save_pretrained, model)
        model.push_to_hub = MethodType(_push_to_hub, model)
        return model

    def is_serializable(self) -> bool:
        """True: `save_pretrained` writes the artifact."""
        return True

    @property
    def is_trainable(self) -> bool:
        """False: planes have no gradients."""
        return False


if METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config(METHOD)(AgentForgeConfig)
    register_quantizer(METHOD)(AgentForgeQuantizer)


def _fetch(config: Any, folder: Path, name: str) -> Path:
    """A file of the artifact; if it came from the hub, transformers has fetched only those that it knows."""
    path = plain_file(folder, name)
    if not path.is_file() and not Path(config.name_or_path).is_dir():
        from transformers.utils import cached_file

        # The folder is CACHE/models--OWNER--NAME/snapshots/COMMIT.
        cached_file(config.name_or_path, name, revision=folder.name, cache_dir=folder.parents[2])
    if not path.is_file():
        raise BadArtifact(f"{path}: is missing; fetch or write the artifact again")
    return path


def _config_of(model: Any) -> dict[str, Any]:
    config = copy.deepcopy(model.config.to_dict())
    return {key: value for key, value in config.items() if key not in ("quantization_config", "transformers_version")}


def _generation_of(model: Any) -> dict[str, Any]:
    config = getattr(model, "generation_config", None)
    return copy.deepcopy(config.to_dict()) if config is not None else {}


def _save_pretrained(
    self: Any, save_directory: str | Path, is_main_process: bool = True, push_to_hub: bool = False, **options: Any
) -> None:
    """Write the artifact again: the same bytes, if nothing was changed since it was loaded.  Its manifest leaves out the
    tokenizer's files, which lie there as they were: `tokenizer.save_pretrained` writes them in its own way.

    Kept tensors and settings of config.json and generation_config.json that were changed are written as they are now, with
    their hashes in the manifest.  push_to_hub: to `repo_id`, too, with the other options of `push_to_hub`.

    Raises BadInput for other options, for planes that were changed, or if the model holds only a part of the artifact
    or is offloaded.
    """
    if not push_to_hub and options:
        raise BadInput(f"save_pretrained: {next(iter(options))} is not an option for artifacts, which are written as read")
    if not is_main_process:
        return
    if push_to_hub:
        repo_id = options.pop("repo_id", Path(save_directory).name)
    out = Path(save_directory).expanduser()
    out.mkdir(parents=True, exist_ok=True)
    earlier = [file for file in out.iterdir() if file.suffix == ".safetensors" or file.name == WEIGHTS_INDEX]
    if earlier:
        ours = Artifact(out).manifest["files"] if (out / MANIFEST).is_file() else {}
        if strange := [file.name for file in earlier if file.name not in ours]:
            raise BadInput(f"{out}: holds the weights {strange[0]!a:.80}, not an artifact's; choose another folder")
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        _write(self, Path(scratch), with_tokenizer=False)
        names = names_in(Path(scratch))
        for file in earlier:  # weights of an earlier save would be read in place of these
            if file.name not in names:
                file.unlink()
        for name in sorted(names, key=lambda name: name == MANIFEST):  # the manifest last
            (out / name).parent.mkdir(exist_ok=True)
            os.replace(Path(scratch) / name, out / name)
    if push_to_hub:
        _push_to_hub(self, repo_id, **options)


def _write(model: Any, out: Path, with_tokenizer: bool = True) -> None:
    """Write the artifact that `model` was loaded from, as it is in memory, into the empty folder `out`.  with_tokenizer:
    whether its manifest is to vouch for the tokenizer's files, too."""
    artifact: Artifact = model.hf_quantizer.artifact
    entries = artifact.entries
    rows, changed = [], {}
    for row, now in _rows_now(model, artifact, entries):
        rows.append(row)
        if now is not None:
            changed[row["name"]] = now
    for file in artifact.manifest["files"]:
        source = _fetch(model.config, artifact.path, file)
        if not any(entries[name].file.name == file for name in changed):
            (out / file).parent.mkdir(exist_ok=True)
            shutil.copyfile(source, out / file)
            continue
        names = [name for name, entry in entries.items() if entry.file.name == file]
        names.sort(key=lambda name: entries[name].offset)  # the order in which they lie there
        about = {name: changed.get(name, entries[name]) for name in names}
        write_safetensors(
            out / file,
            [(name, of.dtype, tuple(of.shape)) for name, of in about.items()],
            (tensor_bytes(read_tensor(n, of) if isinstance(of, Entry) else of) for n, of in about.items()),
        )
    config, before = _config_of(model), model.hf_quantizer.loaded_config
    if changed := {key: value for key, value in config.items() if key not in before or before[key] != value}:
        write_json(out / "config.json", {**read_json(out / "config.json"), **changed})
    if _generation_of(model) != model.hf_quantizer.loaded_generation:
        model.generation_config.save_pretrained(out)
    files = {
        name: about for name, about in describe_files(out).items() if with_tokenizer or not re.fullmatch(TOKENIZER, name)
    }
    if rows == artifact.rows and files == artifact.manifest["files"]:
        shutil.copyfile(artifact.path / MANIFEST, out / MANIFEST)  # older ones may lack what reading them fills in
    else:
        write_manifest(out, {**artifact.manifest, "files": files, "tensors": rows})


def _rows_now(
    model: Any, artifact: Artifact, entries: Mapping[str, Entry]
) -> Iterator[tuple[dict[str, Any], torch.Tensor | None]]:
    """The row of each tensor as it is in memory, and the tensor if it was kept and changed since it was loaded.

    Raises BadInput if planes were changed, or the model lacks something.
    """
    state, modules = model.state_dict(), dict(model.named_modules())

    def in_memory(name: str) -> torch.Tensor:
        found = state.get(name_in(model, name))
        if found is None:
            raise BadInput(f"save_pretrained: the model has no {name}; load the whole artifact to save it")
        if found.device.type == "meta":
            raise BadInput(f"save_pretrained: {name} is offloaded; load the artifact into memory to save it")
        return found.detach().cpu()  # type: ignore[no-any-return]

    for row in artifact.rows:
        name = row["name"]
        layer = modules.get(name_in(model, name).rpartition(".")[0])
        if row["stage"] is not None:
            if isinstance(layer, TernaryLinear):
                packed = artifact.read(row)
                assert isinstance(packed, Packed)
                own = TernaryLinear.from_packed(packed)
                pairs = [(own.packed, layer.packed.cpu()), (own.scales, layer.scales.cpu())]
            else:
                planes = [f"{name}.{plane}" for plane in stages.from_json(row["stage"]).layout(oriented(row))]
                pairs = [(read_tensor(plane, entries[plane]), in_memory(plane)) for plane in planes]
            if not all(torch.equal(disk, memory) for disk, memory in pairs):
                raise BadInput(f"save_pretrained: planes of {name} are not the artifact's; compress the model again")
            yield row, None
            continue
        kept = read_tensor(name, entries[name])
        now = layer.bias.cpu() if isinstance(layer, TernaryLinear) and layer.bias is not None else in_memory(name)
        if torch.equal(kept.to(now.dtype), now):  # what was only rounded for memory is not changed
            yield row, None
            continue
        yield (
            {
                **row,
                "reason": "changed after it was loaded",
                "dtype": str(now.dtype).removeprefix("torch."),
                "bits": 8 * now.nbytes,
                "bytes": now.nbytes,
                "relative_error": relative_error(kept, now),  # against the one that it replaces
                "sha256": hashlib.sha256(tensor_bytes(now)).hexdigest(),
            },
            now,
        )


def _push_to_hub(
    self: Any,
    repo_id: str,
    *,
    measurements: Mapping[str, Measurement] | None = None,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Write the artifact and its model card to a repository of the hub, which is made if there is none.

    measurements: what the card says of quality, by name (`agentforge.perplexity` gives one).  Returns the commit's address.
    """
    from huggingface_hub import HfApi

    from .modelcard import model_card

    api = HfApi(token=token)
    repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        _write(self, folder)
        card = model_card(Artifact(folder), measurements, repo)
        (folder / "README.md").write_text(card, encoding="utf-8")
        done = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message=commit_message or "Upload an artifact of agentforge",
            revision=revision,
            create_pr=create_pr,
        )
    return str(done.commit_url)
