"""What llama.cpp computes from our GGUF files, beside what transformers computes from the same weights, decoded.

    python benchmarks/interop.py [--work DIR] [--only NAME] [--out reports/interop]

Each artifact is exported twice: in blocks, and as float32 of what it decodes to.  The second file shows whether names,
order of rows, positions and tokenizer are right; the first what llama.cpp's own arithmetic adds.  llama.cpp is built in
--work from the sources of its Python package, at the version that `peers.py` pins; its cache of keys and values is float32.

* KL: KL(transformers || llama.cpp) per token, over windows of the text.
* greedy: how many tokens after the prompt are the same, of so many.
* rounded: the same of transformers with activations rounded to 8 bits in front of each matrix, as llama.cpp rounds them for
  blocks.  The two do not round alike for long: a difference of the last bit moves some codes, and from block to block more.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import bench
import numpy as np
import peers
import torch

import agentforge as af
from agentforge import evaluation
from agentforge.artifact import Artifact
from agentforge.exports import gguf
from agentforge.models import SAMPLED
from agentforge.opening import ArtifactModel

STAGES = {
    "Q4_1": "rounding:bits=4,group=32",
    "Q4_0": "rounding:bits=4,group=32,symmetric=true",
    "Q8_0": "rounding:bits=8,group=32,symmetric=true",
    "ternary": "ternary:rule=threshold",
}
WINDOWS, GREEDY = 4, 64
# What runs llama.cpp: logits of windows, the ids of the text by its own tokenizer, and greedy tokens after a prompt.
LLAMA = """
import json, sys, types
import numpy as np
sys.modules["diskcache"] = types.ModuleType("diskcache")  # which the package imports, and does not need here
from llama_cpp import Llama
asked = json.load(open(sys.argv[1]))
llama = Llama(asked["file"], n_ctx=asked["context"], n_batch=asked["context"], n_threads=asked["threads"],
              n_threads_batch=asked["threads"], logits_all=True, type_k=0, type_v=0, flash_attn=False, verbose=False)
logits = []
for window in asked["windows"]:
    llama.reset()
    llama.eval(window)
    logits.append(np.array(llama.scores[: len(window)], np.float32))
llama.reset()
llama.eval(asked["prompt"])
greedy = []
for _ in range(asked["greedy"]):
    greedy.append(int(np.argmax(llama.scores[llama.n_tokens - 1])))
    llama.eval(greedy[-1:])
ids = llama.tokenize(asked["text"].encode(), add_bos=False, special=False)
np.savez(sys.argv[2], logits=np.stack(logits), greedy=np.array(greedy), ids=np.array(ids))
"""


class Llama:
    """llama.cpp's library and its Python package, built when first needed."""

    def __init__(self, work: Path) -> None:
        self.work, self.build = work, work / "build"
        self.package = work / f"llama_cpp_python-{peers.LLAMA_CPP}"

    def prepare(self) -> None:
        """Fetch and build what is not there yet."""
        if not self.package.is_dir():
            peers.fetch("no-binary", f"llama-cpp-python=={peers.LLAMA_CPP}", self.work)
            peers.run("tar", "xf", f"{self.package.name}.tar.gz", cwd=self.work)
        if not (self.build / "bin" / "libllama.so").is_file():
            parts = ("SERVER", "TESTS", "EXAMPLES", "APP", "TOOLS", "COMMON")
            off = [f"-D{name}=OFF" for name in ("LLAMA_OPENSSL", *(f"LLAMA_BUILD_{part}" for part in parts))]
            how = ["-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=ON", *off]
            peers.run("cmake", "-S", self.package / "vendor" / "llama.cpp", "-B", self.build, *how)
            peers.run("cmake", "--build", self.build, "--target", "llama", "-j", "2")

    def __call__(self, file: Path, **asked: Any) -> Any:
        """What `LLAMA` finds with a file."""
        self.prepare()
        with tempfile.TemporaryDirectory(dir=self.work) as scratch:
            threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
            about = {"file": str(file), "context": SAMPLED, "threads": threads, **asked}
            (Path(scratch) / "asked.json").write_text(json.dumps(about), encoding="utf-8")
            where = {"PYTHONPATH": str(self.package), "LLAMA_CPP_LIB_PATH": str(self.build / "bin")}
            peers.run(sys.executable, "-c", LLAMA, f"{scratch}/asked.json", f"{scratch}/found.npz", **where)
            with np.load(f"{scratch}/found.npz") as found:
                return {name: torch.from_numpy(found[name]) for name in found}


def compare(ours: torch.Tensor, theirs: torch.Tensor) -> bench.Row:
    """KL(ours || theirs) per token with its standard error, of windows, and how often the likeliest token is the same."""
    a, b = ours.double().log_softmax(-1), theirs.double().log_softmax(-1)
    kl = (a.exp() * (a - b)).sum(-1)
    same = (ours.argmax(-1) == theirs.argmax(-1)).double()
    return {"kl": bench.mean(kl.mean(1).tolist()), "largest": float(kl.max()), "top1": float(same.mean())}


def rounding(model: Any, ternary: bool) -> None:
    """From here on, round what goes into each linear layer of the decoder: 8 bits in blocks of 32, of 256 for TQ1_0."""

    def rounded(module: torch.nn.Linear, inputs: tuple[torch.Tensor]) -> torch.Tensor:
        block = 256 if ternary and module.in_features % 256 == 0 else 32
        x = inputs[0].unflatten(-1, (-1, block))
        step = x.abs().amax(-1, keepdim=True) / 127
        codes = (x / step.clamp(min=1e-30)).round()
        return (codes * (step if block == 256 else step.half().float())).flatten(-2)

    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(rounded)


def measure(name: str, llama: Llama) -> bench.Row:
    """One artifact, in both files."""
    place = llama.work / name
    if not (place / "agentforge.json").is_file():
        af.compress(bench.MODEL, STAGES[name], place)
    artifact, model = Artifact(place), af.load(place)
    assert isinstance(model, ArtifactModel)
    text = evaluation.find_text().text
    ids = model.encode(text[: 10 * WINDOWS * SAMPLED])[: WINDOWS * SAMPLED]
    shown = model.tokenizer.decode(ids)
    prompt = model.encode(bench.PROMPT)
    windows = torch.tensor(ids).reshape(WINDOWS, SAMPLED)

    def logits() -> torch.Tensor:
        with torch.inference_mode():
            return torch.stack([model.model(input_ids=window[None]).logits[0] for window in windows])

    ours = logits()
    with torch.inference_mode():
        tokens = model.model.generate(
            torch.tensor([prompt]), max_new_tokens=GREEDY, min_new_tokens=GREEDY, do_sample=False, num_beams=1
        )[0, len(prompt) :]
    asked = {"windows": windows.tolist(), "prompt": prompt, "greedy": GREEDY, "text": shown}
    with tempfile.TemporaryDirectory(dir=llama.work) as scratch:
        made = af.export(artifact, "gguf", Path(scratch) / "blocks.gguf")
        rows = ((row["name"], artifact.decode(row).float()) for row in artifact.rows)
        gguf.write(Path(scratch) / "f32.gguf", model, rows, artifact.sha256)
        found = {kind: llama(Path(scratch) / f"{kind}.gguf", **asked) for kind in ("blocks", "f32")}
    row: bench.Row = {"bytes": made.bytes, "kinds": made.kinds, "rounded": len(made.rounded)}
    for kind, theirs in found.items():
        equal = (theirs["greedy"] == tokens).long().cumprod(0).sum()
        same_ids = theirs["ids"].tolist() == model.encode(shown)
        row[kind] = {**compare(ours, theirs["logits"]), "greedy": int(equal), "same_ids": same_ids}
    rounding(model.model, name == "ternary")
    row["rounded"] = compare(ours, logits())
    return row


def table(rows: list[bench.Row]) -> str:
    """The rows as Markdown."""
    cells = []
    for row in rows:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(row["kinds"].items()) if not kind.startswith("F"))
        about = [row["recipe"]["name"], f"`{row['recipe']['stage']}`", kinds, f"{row['bytes'] / 1e6:.0f}"]
        for kind in ("f32", "blocks"):
            found = row[kind]
            about += [bench.with_error(found["kl"], ".2g", ".1g"), f"{found['top1']:.2%}", f"{found['greedy']} of {GREEDY}"]
        cells.append([*about, bench.with_error(row["rounded"]["kl"], ".2g", ".1g"), f"{row['rounded']['top1']:.2%}"])
    columns = "file | stage | matrices | MB | float32: KL | same top token | greedy | blocks: KL | same top token | greedy"
    columns += " | transformers, activations rounded: KL | same top token"
    ids = "gives the ids of ours" if all(row[kind]["same_ids"] for row in rows for kind in ("f32", "blocks")) else "differs"
    text = f"""
        # llama.cpp and our files

        {bench.MODEL}, compressed, exported with `agentforge export --to gguf`, and run by llama.cpp (llama-cpp-python
        {rows[0]["recipe"]["version"]}); KL is from what transformers computes with the decoded weights in float32, nats per
        token, on {WINDOWS} windows of {SAMPLED} tokens of {rows[0]["recipe"]["text"]}, ± its standard error over windows.
        Greedy: tokens after a prompt until the first difference.  llama.cpp's own tokenizer {ids} on that text.

        The numbers in both files are the same.  From float32 llama.cpp computes in float32.  With blocks it rounds the
        activations to 8 bits, in blocks of 32 (256 for TQ1_0), before it multiplies.  The last columns are of transformers
        with activations rounded in this way, against itself without: what that alone loses.
    """
    return bench.page(text, bench.table(columns, cells, "lllrrrrrrr"))


def main(arguments: list[str] | None = None) -> None:
    work = Path(tempfile.gettempdir()) / "agentforge-interop"
    options = bench.options(arguments, __doc__, "reports/interop", work=work, only=[])
    rows = bench.read(options.out / "interop.json")

    def keep(rows: list[bench.Row]) -> None:
        bench.save(options.out, {"interop.json": rows, "interop.md": table(rows)})

    if options.report:
        return keep(rows)
    options.work.mkdir(parents=True, exist_ok=True)
    text = evaluation.find_text()
    about = {"version": peers.LLAMA_CPP, "windows": WINDOWS, "context": SAMPLED, "text": text.name, "sha256": text.sha256}
    wanted = {name: {"name": name, "stage": stage, "model": bench.MODEL, **about} for name, stage in STAGES.items()}
    llama = Llama(options.work.resolve())
    bench.run(rows, wanted, lambda name: measure(name, llama), keep, only=options.only)


if __name__ == "__main__":
    main()
