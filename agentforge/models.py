"""Find and open a model; say which of its weights a stage may touch, and why every other tensor stays as it is.

Whatever is opened (a Hugging Face folder, a hub id, a GGUF file, one of the two models that agentforge can fetch or
make itself) ends up as a folder with config.json and safetensors; what is not such a folder already is converted once
into the user's cache.  Tensors are read from there one by one, so that compressing needs no built model.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import digits
from .errors import BadInput
from .tensorfiles import (
    TEMPLATES,
    WEIGHTS_INDEX,
    Entry,
    plain_file,
    read_json,
    read_tensor,
    sha256_file,
)

SAMPLED = 512  # context of samples: short, so that a few thousand tokens are enough windows for an error
SAMPLED_TOKENS = 12 * (SAMPLED - 1)  # twelve windows
SOURCE_FILE = "agentforge-source.json"
SIDE_FILES = (
    *("*.json", "*.txt", "*.model", "*.jinja", f"{TEMPLATES}/*.jinja"),
    *("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*"),
)
# Layers of experts that transformers does not mark: whether they are transposed.
UNMARKED = {"Llama4TextExperts": True, "JetMoeParallelExperts": False, "LongcatFlashExperts": False}
IN_PLACE = ("rwkv",)  # model types whose modules change their own weights and states while they compute
LOWEST = -1e8  # of a logit that says anything
OF_QUANTISERS = ("quantize_config.json", "quant_config.json")  # lie beside weights, of which config.json says the same
LABELS = 1_000_000  # of a classifier's head; transformers makes a name for each
PATIENCE, SLOWEST = 20.0, 20_000  # a tokenizer's: seconds, and characters per second (they take 100,000 and more)


@dataclass(frozen=True)
class Weight:
    """A weight that a stage may touch.

    name: its name in the model.  shape: (out, in) as a stage sees it.  dtype: as stored.  module: the type of the
    module it belongs to.  transposed: stored as [in, out] (GPT-2's Conv1D, the experts of GPT-OSS and Llama4).  experts: if
    it is stored as [experts, out / experts, in], or transposed as [experts, in, out / experts], the number of experts, whose
    matrices lie below each other; 0 for one matrix.
    """

    name: str
    shape: tuple[int, int]
    dtype: torch.dtype
    module: str
    transposed: bool
    _read: Callable[[str], torch.Tensor] = field(repr=False, compare=False)
    experts: int = 0

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape in which the model has it."""
        rows, columns = self.shape
        rows //= self.experts or 1
        matrix = (columns, rows) if self.transposed else (rows, columns)
        return (self.experts, *matrix) if self.experts else matrix

    def load(self) -> torch.Tensor:
        """The weight as [out, in], in its own dtype."""
        return as_matrix(self._read(self.name), self.transposed)


def as_matrix(tensor: torch.Tensor, transposed: bool) -> torch.Tensor:
    """A weight as the model stores it, as the matrix [out, in] that a stage sees."""
    tensor = tensor.mT.contiguous() if transposed else tensor
    return tensor.reshape(-1, tensor.shape[-1])


def as_stored(matrix: torch.Tensor, shape: Sequence[int], transposed: bool) -> torch.Tensor:
    """A matrix [out, in] as the model stores it, in this shape: what `as_matrix` undoes."""
    if not transposed:
        return matrix.reshape(*shape)
    *experts, columns, rows = shape
    return matrix.reshape(*experts, rows, columns).mT.contiguous()


class LanguageModel:
    """An opened model: its tensors on disk, its configuration, and, built when first asked for, model and tokenizer.

    name: what it was opened as.  path: its folder.  entries: its tensors on disk by name.  source: where it came from.
    """

    def __init__(self, name: str, path: Path, entries: dict[str, Entry], source: dict[str, Any]) -> None:
        self.name, self.path, self.entries, self.source = name, path, entries, source
        self.weight_files = sorted({entry.file for entry in entries.values()})
        self.config = read_json(path / "config.json")
        self.config.pop("transformers_weights", None)  # names a file, which what is made of the model does not have

    def __repr__(self) -> str:
        return f"LanguageModel({self.name!r}, {self.parameters / 1e6:.1f} M parameters, {self.path})"

    @property
    def is_classifier(self) -> bool:
        """True for digits-mlp, which has labels and no tokens."""
        return self.config.get("model_type") == digits.MODEL_TYPE

    @property
    def parameters(self) -> int:
        """Number of parameters that are stored (tied ones once)."""
        return sum(entry.bytes // entry.dtype.itemsize for entry in self.entries.values())

    @property
    def bytes_on_disk(self) -> int:
        """Size of all weight files together."""
        return sum(file.stat().st_size for file in self.weight_files)

    @property
    def opened_bytes(self) -> int:
        """Size of what the user has: of the GGUF file if the weight files are its conversion, else `bytes_on_disk`."""
        return converted_bytes(self.source) or self.bytes_on_disk

    @property
    def context(self) -> int | None:
        """The most tokens the model takes at once, if its configuration says so."""
        longest = self.config.get("max_position_embeddings") or self.config.get("n_positions")
        return longest if isinstance(longest, int) else None

    def check_context(self, context: int) -> None:
        """Raise BadInput for windows of more tokens than the model takes at once."""
        if self.context and context > self.context:
            raise BadInput(f"context={context}: {self.name} takes at most {self.context} tokens")

    @property
    def usual_context(self) -> int:
        """Tokens per window to measure with: 2048, or as many as the model takes."""
        return min(2048, self.context or 2048)

    @property
    def sampled_context(self) -> int:
        """Tokens per window of a sample: `SAMPLED`, or as many as the model takes."""
        return min(SAMPLED, self.context or SAMPLED)

    @property
    def side_files(self) -> list[Path]:
        """Configuration, tokenizer and licence: all files beside the weights that belong to the model.

        Raises BadInput for a link that leads out of the folder.
        """
        found = {file for pattern in SIDE_FILES for file in self.path.glob(pattern)}
        checked = [plain_file(self.path, file.relative_to(self.path).as_posix()) for file in sorted(found)]
        return [file for file in checked if file.is_file() and file.name not in (SOURCE_FILE, WEIGHTS_INDEX, *OF_QUANTISERS)]

    @cached_property
    def fingerprint(self) -> str:
        """A hash over the bytes of weight files, configuration, tokenizer and licence."""
        return self.fingerprint_now()

    def fingerprint_now(self) -> str:
        """`fingerprint`, of the files as they are now: another one if they were changed since it was first asked for."""
        digest = hashlib.sha256()
        for file in [*self.side_files, *self.weight_files]:
            try:
                digest.update(f"{file.name} {sha256_file(file)}\n".encode())
            except OSError as error:
                raise BadInput(f"{file}: cannot be read ({error.strerror}); fetch or write the folder again") from None
        return digest.hexdigest()

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor by its name in the model: as stored, or float32 if it is computed from what is stored."""
        return self.reader(name)()

    def reader(self, name: str) -> Callable[[], torch.Tensor]:
        """`tensor(name)` as a function that can be sent to another process, which then reads the files by itself."""
        entry = self.entries[name]
        return partial(read_tensor, name, entry._replace(file=entry.file.absolute()))

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All tensors, by name."""
        return {name: self.tensor(name) for name in self.entries}

    @cached_property
    def model(self) -> Any:
        """The torch module, float32 on the CPU, in evaluation mode."""
        self.check()
        if self.is_classifier:
            module = self.skeleton(device="cpu")
            module.load_state_dict({k: v.to(torch.float32) for k, v in self.state_dict().items()})
            return module.eval()
        return self._build(self.state_dict())

    def _build(self, tensors: dict[str, torch.Tensor]) -> Any:
        """The module of these tensors.  Raises BadInput if transformers fails, lacks a tensor or does not know one."""
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

        config = self._hf_config
        try:
            with quiet_transformers():
                built, report = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
                    None, config=config, state_dict=tensors, dtype=torch.float32, output_loading_info=True
                )
        except Exception as error:
            raise BadInput(f"{self.path}: transformers does not open it ({first_line(error)})") from None
        for keys, problem in (
            (report["missing_keys"], "is missing"),
            (report["unexpected_keys"], f"is not part of a {type(built).__name__}"),
        ):
            if keys:
                raise BadInput(f"{self.path}: tensor {min(keys)} {problem}; is config.json its own?")
        return built.eval()

    @property
    def in_blocks(self) -> bool:
        """Whether the module can be built without its matrices, which are then read block by block."""
        kind = self.config.get("model_type")
        return "model" not in vars(self) and not self.is_classifier and kind not in IN_PLACE

    def hollow(self) -> tuple[Any, list[str]]:
        """The module, and the names of its matrices that are not in memory: none if it was built before."""
        if not self.in_blocks:
            return self.model, []
        self.check()
        parameters = dict(self._structure.named_parameters(remove_duplicate=False))
        names = [name for name, e in self.entries.items() if len(e.shape) > 1 and name in parameters]
        gone = {name: absent(self.entries[name].shape) for name in names}
        module = self._build({name: gone[name] if name in gone else self.tensor(name) for name in self.entries})
        return module.requires_grad_(False), names

    def on(self, device: str) -> LanguageModel:
        """Itself, its module moved to this device, on which it is measured and trained from then on; one that has not been
        built yet need not be on the CPU.

        Raises BadInput if there is no such device.
        """
        found = device_named(device)
        if found.type != "cpu" or "model" in vars(self):
            self.model.to(found)
        return self

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer.  Raises BadInput if the model has none."""
        from transformers import AutoTokenizer

        if self.is_classifier:
            raise BadInput(f"{self.name} is a classifier of pictures and has no tokenizer; use a language model")
        try:
            with quiet_transformers():
                return AutoTokenizer.from_pretrained(self.path, trust_remote_code=False)
        except Exception as error:
            raise BadInput(f"{self.path}: its tokenizer cannot be opened ({first_line(error)})") from None

    def encode(self, text: str, special: bool = False) -> list[int]:
        """The ids of a text's tokens; special: with those that the tokenizer puts around a text.

        Raises BadInput if the tokenizer fails on it, does not come to an end (its splitting rule is a regular expression
        that came with the model, and may take for ever), or gives ids that the model does not have.
        """
        found: list[Any] = []
        tokenizer = self.tokenizer

        def cut() -> None:
            try:
                found.append(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
            except BaseException as error:  # a panic of the library is not an Exception
                found.append(error)

        thread = threading.Thread(target=cut, daemon=True)  # which can be left behind, as it cannot be stopped
        thread.start()
        limit, began = PATIENCE + len(text) / SLOWEST, time.process_time()
        last = time.monotonic() + 10 * limit
        thread.join(limit)
        # On a busy machine the clock says little: it is the processor's seconds that count.
        while not found and time.process_time() - began < limit and time.monotonic() < last:
            thread.join(0.1)
        ids = found[0] if found else TimeoutError(f"not done after {limit:.0f} s")
        if isinstance(ids, BaseException):
            raise BadInput(f"{self.path}: its tokenizer cannot cut the text ({first_line(ids)})") from None
        return self.known(ids)

    def known(self, ids: list[int]) -> list[int]:
        """The same ids.  Raises BadInput if the model does not have one of them."""
        size = self.vocabulary
        if size is not None and max(ids, default=0) >= size:
            raise BadInput(
                f"{self.path}: its tokenizer gives the id {max(ids)}, its model knows {size} tokens; use its own tokenizer"
            )
        return ids

    @cached_property
    def first_ids(self) -> list[int]:
        """The BOS token, if the tokenizer puts it before every text; else nothing."""
        bos = self.tokenizer.bos_token_id
        return [bos] if bos is not None and self.encode("a", special=True)[:1] == [bos] else []

    @property
    def vocabulary(self) -> int | None:
        """How many tokens the model knows, if its configuration says so."""
        size = None if self.is_classifier else getattr(self._hf_config.get_text_config(), "vocab_size", None)
        return size if isinstance(size, int) else None

    def check_finite(self, found: torch.Tensor | float) -> None:
        """Raise BadInput if what the model gave is not finite, naming a tensor that is the reason if there is one."""
        if torch.isfinite(torch.as_tensor(found)).all():
            return
        broken = (name for name in self.entries if not torch.isfinite(self.tensor(name).float()).all())
        name = next(broken, None)
        why = f"its tensor {name} holds NaN or infinity" if name else "numbers grow beyond float32 on the way"
        raise BadInput(f"{self.name}: what it computes is not finite ({why}); fix the weights")

    def check(self) -> None:
        """Raise BadInput if tensors are missing, unknown or of another shape than config.json asks for."""
        for _ in self._classified(embeddings=False):
            pass
        module = self._structure
        tied: dict[str, str] = getattr(module, "all_tied_weights_keys", {})  # told by transformers even while it loads
        stored = {tied.get(name, name) for name in self.entries}
        for name, _ in module.named_parameters(remove_duplicate=False):
            if tied.get(name, name) not in stored:
                raise BadInput(f"{self.path}: tensor {name} is missing; fetch or write the folder again")

    @cached_property
    def dtypes(self) -> str:
        """The dtypes of the weight files, for a label."""
        return ", ".join(sorted({str(e.dtype).removeprefix("torch.") for e in self.entries.values()}))

    def skeleton(self, device: str = "meta") -> nn.Module:
        """The module without its weights, to be asked about its structure."""
        if self.is_classifier:
            hidden = self.config.get("hidden")
            if not isinstance(hidden, list) or not all(type(h) is int and 0 < h <= 1 << 16 for h in hidden):
                raise BadInput(f"{self.path}/config.json: expected 'hidden' as a list of layer widths, found {hidden!r}")
            with torch.device(device):
                return digits.DigitsMLP(tuple(hidden))
        from transformers import AutoModelForCausalLM

        config = self._hf_config
        try:
            with torch.device(device), quiet_transformers():
                module = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        except Exception as error:
            raise BadInput(f"{self.path}/config.json: no model can be built from it ({first_line(error)})") from None
        assert isinstance(module, nn.Module)
        return module

    @cached_property
    def _structure(self) -> nn.Module:
        return self.skeleton()

    def weights(self, embeddings: bool = False) -> list[Weight]:
        """The weights a stage may touch: linear layers (and GPT-2's Conv1D) and layers of experts inside the decoder's
        blocks, found by module type.  embeddings: the token embedding, and the output head if it is a matrix of its own,
        too."""
        return [item for _, item in self._classified(embeddings) if isinstance(item, Weight)]

    def kept(self, embeddings: bool = False) -> dict[str, str]:
        """Every other stored tensor, and why it stays."""
        return {name: item for name, item in self._classified(embeddings) if isinstance(item, str)}

    @cached_property
    def _hf_config(self) -> Any:
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

        labels = self.config.get("num_labels")
        if isinstance(labels, int) and labels > LABELS:
            raise BadInput(f"{self.path}/config.json: num_labels is above {LABELS:,}, and each takes memory; lower it")
        try:
            config = AutoConfig.from_pretrained(self.path, trust_remote_code=False)
        except Exception as error:
            raise BadInput(f"{self.path}/config.json: transformers does not open it ({first_line(error)})") from None
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise BadInput(f"{self.path}: {config.model_type!r} is not a causal language model that transformers knows")
        layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
        if not 0 <= layers <= max(1, len(self.entries)):
            raise BadInput(f"{self.path}/config.json: {layers} layers, but only {len(self.entries)} tensors")
        config._attn_implementation = None  # the default; a name from the file could be code to fetch from the hub
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # our own planes are decoded before the model is built
        return config

    def _classified(self, embeddings: bool) -> Iterator[tuple[str, Weight | str]]:
        """Each stored tensor with a Weight if a stage may touch it, else with the reason why not."""
        module = self._structure
        owners: dict[str, tuple[nn.Module, str]] = {}
        for prefix, owner in module.named_modules():
            for leaf, _ in list(owner.named_parameters(recurse=False)) + list(owner.named_buffers(recurse=False)):
                owners[f"{prefix}.{leaf}" if prefix else leaf] = (owner, leaf)
        blocks = [block for block in module.modules() if isinstance(block, nn.ModuleList) and len(block)]
        in_blocks = {inner for block in blocks for inner in block.modules()}
        ends = {
            getattr(module, f"get_{side}_embeddings", lambda: None)(): what
            for side, what in (("output", "output head"), ("input", "token embedding"))
        }
        for name, entry in self.entries.items():
            if name not in owners:
                raise BadInput(
                    f"{self.path}: tensor {name} is not part of a {type(module).__name__}; is config.json its own?"
                )
            owner, leaf = owners[name]
            expected = tuple(getattr(owner, leaf).shape)
            if expected != entry.shape:
                raise BadInput(f"{self.path}: tensor {name} is {list(entry.shape)}; config.json asks for {list(expected)}")
            end = ends.get(owner)
            if end and not embeddings and leaf == "weight" and len(entry.shape) == 2:
                yield name, f"{end}: kept unless embeddings are asked for"
            else:
                yield name, self._classify(name, entry, owner, leaf, owner in in_blocks, end is not None)

    def _classify(self, name: str, entry: Entry, owner: nn.Module, leaf: str, in_block: bool, is_end: bool) -> Weight | str:
        kind = type(owner).__name__
        conv = kind == "Conv1D"
        # transformers marks its layers of experts by how they hold their matrices: [experts, out, in], or transposed.
        transposed: Any = getattr(owner, "is_transposed", UNMARKED.get(kind))
        if len(entry.shape) == 3 and in_block and entry.dtype.is_floating_point and transposed is not None:
            experts, rows, columns = entry.shape
            rows, columns = (columns, rows) if transposed else (rows, columns)
            return Weight(name, (experts * rows, columns), entry.dtype, kind, transposed, self.tensor, experts)
        if leaf != "weight" or len(entry.shape) != 2:
            rank = len(entry.shape)
            return f"{leaf} of {kind}: {'a vector' if rank == 1 else f'{rank} dimensions'}, not the matrix of a linear layer"
        if not is_end and not isinstance(owner, nn.Linear) and not conv:
            return f"{kind}: not a linear layer"
        if not is_end and not in_block:
            return f"{kind} outside the decoder's blocks"
        shape = (entry.shape[1], entry.shape[0]) if conv else (entry.shape[0], entry.shape[1])
        return Weight(name, shape, entry.dtype, kind, conv, self.tensor)


class BuiltModel(LanguageModel):
    """A model whose files name their tensors otherwise than its modules do: built first, then read from there."""

    def __init__(self, opened: LanguageModel) -> None:
        super().__init__(opened.name, opened.path, opened.entries, opened.source)
        self.config, self.weight_files, self._opened = opened.config, opened.weight_files, opened
        module, _ = self.model, self.dtypes  # while `entries` are still those of the files
        self.entries = {}
        seen: set[int] = set()
        for key, tensor in module.state_dict().items():
            if tensor.data_ptr() not in seen:
                self.entries[key] = Entry(self.path, tuple(tensor.shape), tensor.dtype)
            seen.add(tensor.data_ptr())

    @cached_property
    def model(self) -> Any:
        """The torch module, built by transformers from the tensors as the files name them."""
        return self._build(self._opened.state_dict())

    def reader(self, name: str) -> Callable[[], torch.Tensor]:
        """A function that holds the tensor itself, float32: another process would have to build the model first."""
        return partial(torch.tensor, self.model.state_dict()[name].numpy())


def absent(shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of NaN that takes no memory."""
    return torch.tensor(torch.nan).expand(shape)


def converted_bytes(source: Any) -> int | None:
    """Bytes of the GGUF file that a model with this `source` was converted from; None if it was not converted."""
    size = source.get("bytes") if isinstance(source, dict) and "artifact" not in source else None
    return size if type(size) is int and size > 0 else None


def fastest_device() -> str:
    """cuda if there is one, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_named(name: str) -> torch.device:
    """The device of this name.  Raises BadInput if there is none."""
    try:
        found = torch.device(name)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError):
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise BadInput(f"device {name!r}: torch has no such device here; use cpu")
    return found


def check_workers(workers: int | None) -> None:
    """Raise BadInput for a number of workers that is not 1 or more; None is the default number."""
    if workers is not None and workers < 1:
        raise BadInput(f"workers={workers}; expected 1 or more")


def cache_dir() -> Path:
    """AGENTFORGE_CACHE, else agentforge/ in the user's cache folder."""
    if os.environ.get("AGENTFORGE_CACHE"):
        return Path(os.environ["AGENTFORGE_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "agentforge"


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """transformers without progress bars and warnings."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def first_line(error: BaseException) -> str:
    """The type of an error and the first line of what it says."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:160]}"
