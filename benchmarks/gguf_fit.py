"""GGUF files by `agentforge fit --for gguf` beside those of llama.cpp's own quantiser, at no more bytes, run by llama.cpp.

    python benchmarks/gguf_fit.py [--work DIR] [--only "wide Q2_K"] [--out reports/gguf_fit]

llama.cpp's files are of its usual kinds, with an importance matrix of the tokens that `fit` takes its statistics on; ours
may have as many bytes as theirs.  KL is between what llama.cpp computes with the original in float32 and with the file, per
token, over the windows that `fit` measures on.  Originals are the default model and, because its rows are no multiples of
256, one that `wide.py` makes of it.  llama.cpp is built in --work, at the version that `peers.py` pins.
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
import wide
from gguf import GGUFReader

from agentforge import evaluation, open_model
from agentforge.evaluation.likelihood import plan
from agentforge.exports import gguf
from agentforge.fit_for import TYPES, fit_for
from agentforge.models import SAMPLED, SAMPLED_TOKENS
from agentforge.statistics import Calibration, Collected, collect

KINDS = ("Q2_K", "Q3_K_M", "IQ4_NL", "Q4_K_M")
WIDE = "wide"
OURS = {"ours": TYPES["gguf"], "without Q4_1": tuple(kind for kind in TYPES["gguf"] if kind not in ("q4_1", "q5_1"))}
MODELS = {bench.MODEL: OURS, WIDE: {"ours": OURS["ours"]}}
BESIDE = 0.25  # of `wide.widen`


class Files:
    """llama.cpp, and what it computes with the original."""

    def __init__(self, work: Path, name: str) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self.work, self.name, self.model, self.programs = work, name, open_model(bench.MODEL), peers.LlamaCpp(work)
        windows = plan(self.model, evaluation.find_text(), SAMPLED, None, SAMPLED_TOKENS, None)[0]
        self.windows = [list(window.ids) for window in windows]
        self.widened: bench.Row = {}
        if name == WIDE:
            self._widen()

    def _widen(self) -> None:
        """Make the wide model and its float32 file, if they are not there; the same without what lies beside, to compare."""
        self.programs.full, self.programs.imatrix = self.work / "wide.gguf", self.work / "wide-imatrix.gguf"
        made, folders = self.work / "widened.json", [self.work / f"wide-{beside}" for beside in (0.0, BESIDE)]
        for beside, folder in zip((0.0, BESIDE), folders, strict=True):
            if not folder.is_dir():
                wide.widen(self.model, folder, 768, 4, beside)
        if not made.is_file():
            found = wide.compared(self.model, [open_model(folder) for folder in folders], self.windows[: interop.WINDOWS])
            bench.save(self.work, {made.name: dict(zip(("exact", "used"), found, strict=True))})
        self.widened = {"widened": bench.read(made)}
        self.model = open_model(folders[-1])
        if not self.programs.full.is_file():
            partial = self.programs.full.with_suffix(".partial")
            gguf.write(partial, self.model, self.model.state_dict().items(), "0" * 64)
            partial.rename(self.programs.full)

    @functools.cached_property
    def statistics(self) -> Collected:
        """Of the text that the other tools see, and as much of it: a quarter of what `fit` reads by default."""
        return collect(self.model, Calibration().with_sensitivities(), ends=True)

    @functools.cached_property
    def original(self) -> torch.Tensor:
        """What llama.cpp computes with the original."""
        return self.logits(self.programs.full)

    def logits(self, file: Path) -> torch.Tensor:
        """float32[windows, tokens, vocabulary]."""
        asked = {"windows": self.windows, "prompt": self.windows[0][:8], "greedy": 1, "text": "", "context": SAMPLED}
        found: torch.Tensor = interop.llama(self.programs, file, **asked)["logits"]
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
            found = self.widened | {"theirs": self.compare(theirs)}
            for who, types in MODELS[self.name].items():
                made = fit_for(self.model, "gguf", ours, theirs.stat().st_size, types=types, statistics=self.statistics)
                found[who] = self.compare(ours) | {"measured": made.measured.kl.to_json(), "predicted": made.predicted}
                ours.unlink()
        return found


def table(rows: list[bench.Row]) -> str:
    """The rows as Markdown."""
    tables: dict[str, list[list[str]]] = {name: [] for name in MODELS}
    for row in rows:
        for who in ("theirs", *MODELS[row["recipe"]["model"]]):
            found = row[who]
            kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(found["kinds"].items()) if kind != "F32")
            name = f"llama-quantize {row['recipe']['name']}, imatrix" if who == "theirs" else f"`fit --for gguf`, {who}"
            share = f"{found['kl']['value'] / row['theirs']['kl']['value']:.2f}" if who != "theirs" else ""
            about = [name.removesuffix(", ours"), f"{found['bytes'] / 1e6:.2f}", bench.with_error(found["kl"], ".3g", ".1g")]
            tables[row["recipe"]["model"]].append([*about, share, f"{found['top1']:.1%}", kinds])
    drawn = {
        name: bench.table("file | MB | KL | share | same top token | matrices", of, "lrrrrl") for name, of in tables.items()
    }
    text = f"""
        # Files for llama.cpp, by `agentforge fit --for gguf` and by llama.cpp's own quantiser

        KL, nats per token, is of what llama.cpp (llama-cpp-python {peers.LLAMA_CPP}) computes with the file
        from what it computes with the original in float32, on {SAMPLED_TOKENS} tokens of {rows[0]["recipe"]["text"]} in
        windows of {SAMPLED}, ± its standard error over windows; share: of llama-quantize's KL, at no more bytes.  Both have
        looked at the same tokens of selftext.

        ## {bench.MODEL}

        The original is itself a dequantised Q4_1 file, its embedding Q8_0, of 98 MB: in these types a matrix loses nothing,
        which no other model's would.  So our files are also made without Q4_1 and Q5_1, which is what to go by elsewhere.
        Rows of 576 weights are no multiple of 256, so that only 30 of the 210 matrices can have the K types.
    """
    widened = next((row["widened"] for row in rows if row["recipe"]["model"] == WIDE), None)
    if widened is None:
        return bench.page(text, drawn[bench.MODEL])
    exact, used = widened["exact"], widened["used"]
    about = f"""
        ## The same model, widened to rows of 768 and 1536

        Made by `benchmarks/wide.py`: the residual stream of 576 entries is turned at random into 768, and one of three
        groups of heads is there twice, with what multiplies its outputs split into two random parts.  No matrix has zeros,
        none lies on a grid of 4 bits, and embedding and head are two matrices.  So widened, the model computes what it did:
        on {interop.WINDOWS} of the windows KL is {exact["kl"]["value"]:.1g}, the largest difference of two logits
        {exact["largest"]:.1g}, in float32.

        Inputs of its matrices would lie in 576 of 768 directions, so that an error in the others would cost nothing, which
        `fit` knows and llama-quantize does not.  So what is written to the residual stream is also written to the 192 other
        directions, in three random mixes (embedding, attention, MLPs), with a mean square of about {BESIDE} of the stream's
        own.  That disturbs the norms: KL from {bench.MODEL} {bench.with_error(used["kl"], ".2g", ".1g")}.  Of the inputs of
        `o_proj`, 192 are copies of others still.  The turn makes the stream's entries alike, so that an importance matrix
        may have less to say there than in other models.
    """
    return bench.page(text, drawn[bench.MODEL], about, drawn[WIDE])


def main(arguments: list[str] | None = None) -> None:
    work = Path(tempfile.gettempdir()) / "agentforge-gguf-fit"
    options = bench.options(arguments, __doc__, "reports/gguf_fit", work=work, only=[])
    rows = bench.read(options.out / "gguf_fit.json")

    def keep(rows: list[bench.Row]) -> None:
        bench.save(options.out, {"gguf_fit.json": rows, "gguf_fit.md": table(rows)})

    if options.report:
        return keep(rows)
    text = evaluation.find_text()
    about = {"version": peers.LLAMA_CPP, "text": f"{text.name}/{text.split}", "sha256": text.sha256}
    wanted = {f"{name} {kind}": {"name": kind, "model": name, **about} for name in MODELS for kind in KINDS}
    files = functools.lru_cache(1)(lambda name: Files(options.work.resolve(), name))  # one model in memory
    bench.run(rows, wanted, lambda of: files(wanted[of]["model"]).measure(wanted[of]["name"]), keep, only=options.only)


if __name__ == "__main__":
    main()
