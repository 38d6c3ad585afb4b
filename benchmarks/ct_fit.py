"""Folders for vLLM by `agentforge fit --for compressed-tensors`, beside those of the format's own tool and of rounding.

    python benchmarks/ct_fit.py [--work DIR] [--only "4 bits"] [--out reports/ct_fit]

All of them have int4 and int8 in groups of 32, symmetric, with scales in float16, and embedding and head in 16 bits.  The
others get 4 bits everywhere, or 8 for some layers by a rule like that of llama.cpp's Q4_K_M; ours may have as many bytes as
rounding then, and chooses by itself.  llm-compressor (GPTQ) is shown the tokens that `fit` takes its statistics on.

* KL: between what agentforge computes with the folder and with the original, over the windows that `fit` measures on.
* transformers: what transformers and the package `compressed-tensors`, in a process without agentforge, compute with the
  folder beside that: the largest difference of two logits, and KL, on a few of the windows.
"""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from pathlib import Path

import bench
import interop
import peers
import torch

import agentforge as af
from agentforge import evaluation, open_model, stages
from agentforge.evaluation.likelihood import plan
from agentforge.fit_for import fit_for
from agentforge.models import SAMPLED, SAMPLED_TOKENS
from agentforge.statistics import Calibration, Collected, collect

TOOL, FORMAT, ROUNDED = "llm-compressor", "compressed-tensors", "rounding"
OURS = f"`fit --for {FORMAT}`"
OBSERVERS = {f"{TOOL}, GPTQ": "memoryless_minmax", f"{TOOL}, GPTQ, mse": "memoryless_mse"}  # how it finds scales
VERSION = peers.PINNED[TOOL][0]
ROUNDING = "rounding:bits={},group=32,symmetric=true,clip=mse"
WINDOWS = 2  # that transformers computes
# What gets 8 bits; q, k and v have to be alike in vLLM, and so have gate and up.
MIXES = {"4 bits": (), "8 bits for q, k, v and down": ("q_proj", "k_proj", "v_proj", "down_proj")}
QUANTISE = """
import json, sys, torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer
asked = json.load(open(sys.argv[1]))
model = AutoModelForCausalLM.from_pretrained(asked["folder"], dtype=torch.float32)
weights = {"type": "int", "strategy": "group", "group_size": 32, "symmetric": True, "observer": asked["observer"]}
groups = {f"group_{bits}": {"targets": names, "weights": weights | {"num_bits": bits}} for bits, names in asked["groups"]}
data = Dataset.from_dict({"input_ids": asked["windows"], "attention_mask": [[1] * len(ids) for ids in asked["windows"]]})
shown = {"num_calibration_samples": len(data), "max_seq_length": len(asked["windows"][0])}
tokenizer = AutoTokenizer.from_pretrained(asked["folder"])
recipe = GPTQModifier(config_groups=groups, ignore=["lm_head"])
oneshot(model=model, processor=tokenizer, dataset=data, recipe=recipe, **shown)
model.half().save_pretrained(sys.argv[2], save_compressed=True)
tokenizer.save_pretrained(sys.argv[2])
"""


class Folders:
    """The tool, the original, and what is known of it."""

    def __init__(self, work: Path) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self.work, self.model = work, open_model(bench.MODEL)
        windows = plan(self.model, evaluation.find_text(), SAMPLED, None, SAMPLED_TOKENS, None)[0]
        self.windows = [list(window.ids) for window in windows[:WINDOWS]]

    @functools.cached_property
    def statistics(self) -> Collected:
        """Of the text that the other tools see, and as much of it: a quarter of what `fit` reads by default."""
        return collect(self.model, Calibration().with_sensitivities())

    def make(self, mix: str, who: str, most: int | None) -> tuple[Path, bench.Row]:
        """A folder, of at most `most` bytes if that is for its maker to choose, and what is to be said of it."""
        place = self.work / f"{mix} {who}"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        names = [weight.name.removesuffix(".weight") for weight in self.model.weights()]
        groups = {bits: [n for n in names if n.endswith(MIXES[mix] or "-") == (bits == 8)] for bits in (4, 8)}
        kinds = {f"int{bits}": len(found) for bits, found in groups.items() if found}
        if who == OURS:
            made = fit_for(self.model, FORMAT, place / "folder", most or 0, statistics=self.statistics)
            return place / "folder", {"kinds": made.file.kinds, "predicted": made.predicted, **bench.to_json(made.measured)}
        if who == ROUNDED:
            each = {f"{n}.weight": stages.parse(ROUNDING.format(bits)) for bits, found in groups.items() for n in found}
            af.export(af.compress(self.model, each, place / "artifact"), FORMAT, place / "folder")
        else:
            asked: bench.Row = {"windows": peers.windows_of(self.model), "observer": OBSERVERS[who]}
            asked |= {"folder": str(self.model.path), "groups": [group for group in groups.items() if group[1]]}
            (place / "asked.json").write_text(json.dumps(asked), encoding="utf-8")
            python = peers.environment(TOOL, self.work)
            peers.run(python, "-c", QUANTISE, place / "asked.json", place / "folder", HF_HUB_OFFLINE="1")
        return place / "folder", {"kinds": kinds}

    def measure(self, mix: str, who: str, most: int | None) -> bench.Row:
        """Bytes, KL from the original, and how far transformers is from what agentforge computes with a folder."""
        folder, row = self.make(mix, who, most)
        opened = open_model(folder)
        if "kl" not in row:
            row |= bench.to_json(evaluation.divergence(opened, self.model, context=SAMPLED, tokens=SAMPLED_TOKENS))
        python, offline = peers.environment(TOOL, self.work), {"HF_HUB_OFFLINE": "1"}
        theirs = interop.elsewhere(self.work, python, interop.TRANSFORMERS, folder, offline, windows=self.windows)["logits"]
        with torch.inference_mode():
            ours = torch.cat([opened.model(input_ids=torch.tensor([ids])).logits for ids in self.windows])
        agrees = interop.compare(ours, theirs)
        size = (folder / "model.safetensors").stat().st_size
        shutil.rmtree(folder.parent)
        return {"bytes": size, **row, "transformers": agrees}


def table(rows: list[bench.Row]) -> str:
    """The rows as Markdown."""
    lines = []
    for row in rows:
        theirs, recipe = row["transformers"], row["recipe"]
        layers = ", ".join(f"{n} {kind}" for kind, n in sorted(row["kinds"].items()) if kind.startswith("int"))
        rule = "" if recipe["who"] == OURS else f", {recipe['mix']}"
        cells = [f"{row['bytes'] / 1e6:.2f}", bench.with_error(row["kl"], ".3g", ".1g"), f"{row['top1']['value']:.1%}"]
        agrees = f"{theirs['logit']:.1g}, KL {theirs['kl']['value']:.1g}"
        lines.append([recipe["who"] + rule, *cells, layers, agrees])
    text = f"""
        # Folders for vLLM, by `agentforge fit --for {FORMAT}` and by others

        KL, nats per token, from {bench.MODEL} in float32, on {SAMPLED_TOKENS} tokens of {rows[0]["recipe"]["text"]} in
        windows of {SAMPLED}, ± its standard error, and how often the likeliest token is the same.  MB: of model.safetensors,
        embedding in 16 bits.  All layers are symmetric, in groups of 32 with scales in float16; ours has at most the bytes
        of the rounding before it, and q, k and v of a block have one type, as have gate and up.  {TOOL} ({VERSION}) has
        looked at the same tokens of selftext as `fit`; it finds scales from minima and maxima, or of least squares (mse).
        Difference: the largest of two logits, and KL, between what transformers computes with the folder and the package
        {FORMAT}, without agentforge, and what agentforge computes with it, on {WINDOWS} windows, in float32.

        The original is itself a dequantised Q4_1 file.  These types have no minimum, so that it does not lie on their grids.
    """
    head = "folder | MB | KL | same top token | layers | difference"
    return bench.page(text, bench.table(head, lines, "lrrrll"))


def main(arguments: list[str] | None = None) -> None:
    work = Path(tempfile.gettempdir()) / "agentforge-ct-fit"
    options = bench.options(arguments, __doc__, "reports/ct_fit", work=work, only=[])
    rows = bench.read(options.out / "ct_fit.json")

    def keep(found: list[bench.Row]) -> None:
        rows[:] = found
        bench.save(options.out, {"ct_fit.json": rows, "ct_fit.md": table(rows)})

    if options.report:
        return keep(rows)
    text = evaluation.find_text()
    about = {"version": VERSION, "model": bench.MODEL, "text": f"{text.name}/{text.split}", "sha256": text.sha256}
    wanted = {f"{mix} {who}": {"mix": mix, "who": who, **about} for mix in MIXES for who in (ROUNDED, *OBSERVERS, OURS)}
    folders = functools.cache(lambda: Folders(options.work.resolve()))

    def measure(name: str) -> bench.Row:
        mix, who = (wanted[name][key] for key in ("mix", "who"))
        most = next((r["bytes"] for r in rows if r["recipe"] == wanted[f"{mix} {ROUNDED}"]), None)
        return folders().measure(mix, who, most)

    bench.run(rows, wanted, measure, keep, only=options.only)


if __name__ == "__main__":
    main()
