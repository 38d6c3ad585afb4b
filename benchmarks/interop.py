"""What other programs compute from our files, beside what transformers computes from the same weights, decoded.

    python benchmarks/interop.py [--work DIR] [--only NAME] [--out reports/interop]

llama.cpp: each artifact is exported twice: in blocks, and as float32 of what it decodes to.  The second file shows whether
names, order of rows, positions and tokenizer are right; the first what llama.cpp's own arithmetic adds.  llama.cpp is built
in --work from the sources of its Python package, at the version that `peers.py` pins; its cache of keys and values is of
float32.

transformers: an exported folder, opened by `from_pretrained` in a process that never imports agentforge, in an environment
of --work that has compressed-tensors.  (Folders of VPTQ it opens with a GPU alone.)

* KL: KL(transformers with decoded weights || the other program) per token, over windows of the text.
* greedy: how many tokens after the prompt are the same, of so many.
* rounded: the same of transformers with activations rounded to 8 bits in front of each matrix, as llama.cpp rounds them for
  blocks.  The two do not round alike for long: a difference of the last bit moves some codes, and from block to block more.
  For bitnet, whose activations transformers rounds to 8 bits: of our packed runtime, which does so, too.
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
import transformers

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
FOLDERS = {
    "compressed-tensors": "rounding:bits=4,group=64,symmetric=true",
    "bitnet": "ternary:rule=absmean",
}
WINDOWS, GREEDY = 4, 64
BOUNDS = {"compressed-tensors": 1e-6, "bitnet": 0.02}  # of KL; where activations are rounded, codes next to a half move
# What runs llama.cpp: logits of windows, the ids of the text by its own tokenizer, and greedy tokens after a prompt.
LLAMA = """
import json, sys
import numpy as np
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
TRANSFORMERS = """
import json, sys
import numpy as np, torch
from transformers import AutoModelForCausalLM
asked = json.load(open(sys.argv[1]))
torch.compiler.set_stance("force_eager")  # its layers of bitnet ask for a compiler
model = AutoModelForCausalLM.from_pretrained(asked["file"], dtype=torch.float32).eval()
with torch.inference_mode():
    logits = torch.stack([model(input_ids=torch.tensor([window])).logits[0] for window in asked["windows"]])
if any(name.partition(".")[0] == "agentforge" for name in sys.modules):
    sys.exit("agentforge was imported")
np.savez(sys.argv[2], logits=logits.numpy())
"""


def elsewhere(work: Path, python: str | Path, script: str, file: Path, environment: dict[str, str], **asked: Any) -> Any:
    """What a script finds with a file, in a process of its own: tensors by name."""
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
        about = {"file": str(file), "context": SAMPLED, "threads": threads, **asked}
        (Path(scratch) / "asked.json").write_text(json.dumps(about), encoding="utf-8")
        peers.run(python, "-c", script, f"{scratch}/asked.json", f"{scratch}/found.npz", **environment)
        with np.load(f"{scratch}/found.npz") as found:
            return {name: torch.from_numpy(found[name]) for name in found}


def llama(built: peers.LlamaCpp, file: Path, **asked: Any) -> Any:
    """What `LLAMA` finds with a file."""
    built.build("llama")
    return elsewhere(built.work, sys.executable, LLAMA, file, built.environment, **asked)


def compare(ours: torch.Tensor, theirs: torch.Tensor) -> bench.Row:
    """KL(ours || theirs) per token with its standard error, of windows, and how often the likeliest token is the same."""
    a, b = ours.double().log_softmax(-1), theirs.double().log_softmax(-1)
    kl = (a.exp() * (a - b)).sum(-1)
    same = (ours.argmax(-1) == theirs.argmax(-1)).double()
    about = {"largest": float(kl.max()), "top1": float(same.mean()), "logit": float((ours - theirs).abs().max())}
    return {"kl": bench.mean(kl.mean(1).tolist()), **about}


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


def measure(name: str, stage: str, built: peers.LlamaCpp) -> bench.Row:
    """One artifact: both of its files in llama.cpp, or its folder in transformers."""
    place = built.work / name
    if not (place / "agentforge.json").is_file():
        af.compress(bench.MODEL, stage, place)
    artifact, model = Artifact(place), af.load(place)
    assert isinstance(model, ArtifactModel)
    text = evaluation.find_text().text
    ids = model.encode(text[: 10 * WINDOWS * SAMPLED])[: WINDOWS * SAMPLED]
    windows = torch.tensor(ids).reshape(WINDOWS, SAMPLED)

    def logits(module: Any) -> torch.Tensor:
        with torch.inference_mode():
            return torch.stack([module(input_ids=window[None]).logits[0] for window in windows])

    ours = logits(model.model)
    with tempfile.TemporaryDirectory(dir=built.work) as scratch:
        if name in FOLDERS:
            made = af.export(artifact, name, Path(scratch) / "folder")
            python = peers.environment("compressed-tensors", built.work)
            found = elsewhere(built.work, python, TRANSFORMERS, made.path, {}, windows=windows.tolist())["logits"]
            row: bench.Row = {"bytes": made.bytes, "kinds": made.kinds, "folder": compare(ours, found)}
            if name == "bitnet":
                row["rounded"] = compare(logits(af.load(place, runtime="packed").model), found)
            if row.get("rounded", row["folder"])["kl"]["value"] > BOUNDS[name]:
                raise AssertionError("transformers computes something else from the folder")
            return row
        shown, prompt = model.tokenizer.decode(ids), model.encode(bench.PROMPT)
        with torch.inference_mode():
            tokens = model.model.generate(
                torch.tensor([prompt]), max_new_tokens=GREEDY, min_new_tokens=GREEDY, do_sample=False, num_beams=1
            )[0, len(prompt) :]
        asked = {"windows": windows.tolist(), "prompt": prompt, "greedy": GREEDY, "text": shown}
        made = af.export(artifact, "gguf", Path(scratch) / "blocks.gguf")
        rows = ((row["name"], artifact.decode(row).float()) for row in artifact.rows)
        gguf.write(Path(scratch) / "f32.gguf", model, rows, artifact.sha256)
        files = {kind: llama(built, Path(scratch) / f"{kind}.gguf", **asked) for kind in ("blocks", "f32")}
    row = {"bytes": made.bytes, "kinds": made.kinds}
    for kind, theirs in files.items():
        equal = (theirs["greedy"] == tokens).long().cumprod(0).sum()
        same_ids = theirs["ids"].tolist() == model.encode(shown)
        row[kind] = {**compare(ours, theirs["logits"]), "greedy": int(equal), "same_ids": same_ids}
    rounding(model.model, name == "ternary")
    row["rounded"] = compare(ours, logits(model.model))
    return row


def table(rows: list[bench.Row]) -> str:
    """The rows as Markdown."""
    cells, folders = [], []
    for row in rows:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(row["kinds"].items()) if not kind.startswith("F"))
        about = [row["recipe"]["name"], f"`{row['recipe']['stage']}`", kinds, f"{row['bytes'] / 1e6:.0f}"]
        if "folder" in row:
            del about[2]
            for found in map(row.get, ("folder", "rounded")):
                kl = bench.with_error(found["kl"], ".2g", ".1g") if found else "-"
                about += [kl, f"{found['top1']:.2%}", f"{found['logit']:.2g}"] if found else ["-"] * 3
            folders.append(about)
            continue
        for kind in ("f32", "blocks"):
            found = row[kind]
            about += [bench.with_error(found["kl"], ".2g", ".1g"), f"{found['top1']:.2%}", f"{found['greedy']} of {GREEDY}"]
        cells.append([*about, bench.with_error(row["rounded"]["kl"], ".2g", ".1g"), f"{row['rounded']['top1']:.2%}"])
    columns = "file | stage | matrices | MB | float32: KL | same top token | greedy | blocks: KL | same top token | greedy"
    columns += " | transformers, activations rounded: KL | same top token"
    kinds_of = {kind: [row for row in rows if kind in row] for kind in ("blocks", "folder")}
    versions = {kind: "; ".join(dict.fromkeys(row["recipe"]["version"] for row in of)) for kind, of in kinds_of.items()}
    same = all(row[kind]["same_ids"] for row in kinds_of["blocks"] for kind in ("f32", "blocks"))
    text = f"""
        # Our files in other programs

        {bench.MODEL}, compressed and exported with `agentforge export`; KL is from what transformers computes with the
        decoded weights in float32, nats per token, on {WINDOWS} windows of {SAMPLED} tokens of
        {rows[0]["recipe"]["text"]}, ± its standard error over windows.

        ## llama.cpp

        `--to gguf`, run by llama.cpp (llama-cpp-python {versions["blocks"]}).  Greedy: tokens after a prompt until the first
        difference.  llama.cpp's own tokenizer {"gives the ids of ours" if same else "differs"} on that text.

        The numbers in both files are the same.  From float32 llama.cpp computes in float32.  With blocks it rounds the
        activations to 8 bits, in blocks of 32 (256 for TQ1_0), before it multiplies.  The last columns are of transformers
        with activations rounded in this way, against itself without: what that alone loses.
    """
    others = f"""
        ## transformers

        `--to compressed-tensors` and `--to bitnet`, opened by `AutoModelForCausalLM.from_pretrained` in a process that does
        not import agentforge ({versions["folder"]}), in float32.  Logits: the largest difference.  For bitnet transformers
        rounds the activations to 8 bits, one scale per token; the last columns are against our packed runtime, which does
        so, too.
    """
    head = "format | stage | MB | KL | same top token | logits | from the packed runtime: KL | same top token | logits"
    return bench.page(text, bench.table(columns, cells, "lllrrrrrrr"), others, bench.table(head, folders, "llr"))


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
    about = {"windows": WINDOWS, "context": SAMPLED, "text": text.name, "sha256": text.sha256}
    version = f"transformers {transformers.__version__}, {peers.PINNED['compressed-tensors'][0]}"
    versions = dict.fromkeys(STAGES, peers.LLAMA_CPP) | dict.fromkeys(FOLDERS, version)
    chosen = {**STAGES, **FOLDERS}
    wanted = {n: {"name": n, "stage": chosen[n], "model": bench.MODEL, "version": versions[n], **about} for n in chosen}
    built = peers.LlamaCpp(options.work.resolve())
    bench.run(rows, wanted, lambda name: measure(name, chosen[name], built), keep, only=options.only)


if __name__ == "__main__":
    main()
