"""GGUF files by `agentforge fit --for gguf` beside those of llama.cpp's own quantiser, at no more bytes, run by llama.cpp.

    python benchmarks/gguf_fit.py [--work DIR] [--only Q2_K] [--out reports/gguf_fit]

llama.cpp's files are of its usual kinds, with an importance matrix of the tokens that `fit` takes its statistics on; ours
may have as many bytes as theirs.  KL is between what llama.cpp computes with the original in float32 and with the file, per
token, over the windows that `fit` measures on.  llama.cpp is built in --work, at the version that `peers.py` pins.
"""

from __future__ import annotations

import functools
import tempfile
from collections import Counter
from pathlib import Path

import bench
import interop
import peers
import torch
from gguf import GGUFReader

from agentforge import evaluation, open_model
from agentforge.evaluation.likelihood import plan
from agentforge.gguf_fit import fit_gguf
from agentforge.models import SAMPLED, SAMPLED_TOKENS
from agentforge.stages.ggml import FORMS
from agentforge.statistics import Calibration, Collected, collect

KINDS = ("Q2_K", "Q3_K_M", "IQ4_NL", "Q4_K_M")
OURS = {"ours": tuple(FORMS), "without Q4_1": tuple(kind for kind in FORMS if kind not in ("q4_1", "q5_1"))}


class Files:
    """llama.cpp's programs and its library, and what it computes with the original."""

    def __init__(self, work: Path) -> None:
        for part in ("programs", "library"):
            (work / part).mkdir(parents=True, exist_ok=True)
        self.work, self.model = work, open_model(bench.MODEL)
        self.programs, self.llama = peers.LlamaCpp(work / "programs"), interop.Llama(work / "library")
        windows = plan(self.model, evaluation.find_text(), SAMPLED, None, SAMPLED_TOKENS, None)[0]
        self.windows = [list(window.ids) for window in windows]

    @functools.cached_property
    def statistics(self) -> Collected:
        """What `fit` would collect each time."""
        return collect(self.model, Calibration().with_sensitivities(), ends=True)

    @functools.cached_property
    def original(self) -> torch.Tensor:
        """What llama.cpp computes with the original."""
        return self.logits(self.programs.full)

    def logits(self, file: Path) -> torch.Tensor:
        """float32[windows, tokens, vocabulary]."""
        asked = {"windows": self.windows, "prompt": self.windows[0][:8], "greedy": 1, "text": "", "context": SAMPLED}
        found: torch.Tensor = self.llama(file, **asked)["logits"]
        return found

    def compare(self, file: Path) -> bench.Row:
        """Bytes, types, and KL from the original with its standard error over windows."""
        each = [interop.compare(a[None, :-1], b[None, :-1]) for a, b in zip(self.original, self.logits(file), strict=True)]
        kl = bench.mean([one["kl"]["value"] for one in each])
        kinds = Counter(tensor.tensor_type.name for tensor in GGUFReader(file).tensors)
        top1 = sum(one["top1"] for one in each) / len(each)
        return {"bytes": file.stat().st_size, "kinds": dict(kinds), "kl": kl, "top1": top1}

    def measure(self, kind: str) -> bench.Row:
        """Their file and ours."""
        self.programs.prepare()
        if not self.programs.imatrix.is_file():
            self.programs.weigh()
        with tempfile.TemporaryDirectory(dir=self.work) as scratch:
            theirs, ours = Path(scratch) / "theirs.gguf", Path(scratch) / "ours.gguf"
            command = [self.programs.programs / "llama-quantize", "--imatrix", self.programs.imatrix]
            peers.run(*command, self.programs.full, theirs, kind, 1)
            found = {"theirs": self.compare(theirs)}
            for who, types in OURS.items():
                made = fit_gguf(self.model, ours, theirs.stat().st_size, types=types, statistics=self.statistics)
                found[who] = self.compare(ours) | {"measured": made.measured.kl.to_json(), "predicted": made.predicted}
                ours.unlink()
        return found


def table(rows: list[bench.Row]) -> str:
    """The rows as Markdown."""
    cells = []
    for row in rows:
        for who in ("theirs", *OURS):
            found = row[who]
            kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(found["kinds"].items()) if kind != "F32")
            name = f"llama-quantize {row['recipe']['name']}, imatrix" if who == "theirs" else f"`fit --for gguf`, {who}"
            share = f"{found['kl']['value'] / row['theirs']['kl']['value']:.2f}" if who != "theirs" else ""
            about = [name.removesuffix(", ours"), f"{found['bytes'] / 1e6:.2f}", bench.with_error(found["kl"], ".3g", ".1g")]
            cells.append([*about, share, f"{found['top1']:.1%}", kinds])
    text = f"""
        # Files for llama.cpp, by `agentforge fit --for gguf` and by llama.cpp's own quantiser

        {bench.MODEL}; KL, nats per token, is of what llama.cpp (llama-cpp-python {peers.LLAMA_CPP}) computes with the file
        from what it computes with the original in float32, on {SAMPLED_TOKENS} tokens of {rows[0]["recipe"]["text"]} in
        windows of {SAMPLED}, ± its standard error over windows; share: of llama-quantize's KL, at no more bytes.  Both have
        looked at the same tokens of selftext.

        The original is itself a dequantised Q4_1 file, its embedding Q8_0, of 98 MB: in these types a matrix loses nothing,
        which no other model's would.  So our files are also made without Q4_1 and Q5_1, which is what to go by elsewhere.
        Rows of 576 weights are no multiple of 256, so that only 30 of the 210 matrices can have the K types.
    """
    return bench.page(text, bench.table("file | MB | KL | share | same top token | matrices", cells, "lrrrrl"))


def main(arguments: list[str] | None = None) -> None:
    work = Path(tempfile.gettempdir()) / "agentforge-gguf-fit"
    options = bench.options(arguments, __doc__, "reports/gguf_fit", work=work, only=[])
    rows = bench.read(options.out / "gguf_fit.json")

    def keep(rows: list[bench.Row]) -> None:
        bench.save(options.out, {"gguf_fit.json": rows, "gguf_fit.md": table(rows)})

    if options.report:
        return keep(rows)
    text, files = evaluation.find_text(), Files(options.work.resolve())
    about = {"model": bench.MODEL, "version": peers.LLAMA_CPP, "text": f"{text.name}/{text.split}", "sha256": text.sha256}
    bench.run(rows, {kind: {"name": kind, **about} for kind in KINDS}, files.measure, keep, only=options.only)


if __name__ == "__main__":
    main()
