"""Recovery of a whole ternary model by distillation: how far it gets, and how fast, on this machine.

    python benchmarks/recovery.py --name cpu --steps 100 --batch 4 --context 256 --evaluate 10
    python benchmarks/recovery.py --name h100 --steps 3000 --batch 24 --context 1024 --evaluate 100

Every linear layer of the decoder becomes ternary (absmean per tensor, int8 activations), and `recover` trains them on
selftext.  What is loaded back from disk is measured on --tokens of WikiText-2 (selftext's held-out split if it is missing).
--batch: windows per step, of --context tokens, computed in --passes parts.  --evaluate: steps between two looks at --heldout
tokens.  --recompute: gradient checkpointing.  OUT/NAME.json has the run, table and picture have all runs.  Killed, the same
command continues from the last look, in --work.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import bench
from matplotlib.figure import Figure

from agentforge import divergence, load, open_model
from agentforge.evaluation.measurement import environment
from agentforge.training.recover import Settings, recover

Row = bench.Row
SETTINGS = ("steps", "batch", "context", "passes", "lr", "optimizer", "evaluate", "heldout", "recompute")
# What others came to on an H100, without tuning.  Tokens, seconds, perplexity, KL, top-1.
REFERENCE = (13.9e6, 230, 138.7, 0.630, 0.629)


def measure(options: argparse.Namespace) -> Row:
    """Train, load what was written, and measure it."""
    model, settings = open_model(options.model), Settings(**{name: getattr(options, name) for name in SETTINGS})
    done = recover(model, options.work / f"{options.name}-recovered", settings=settings)
    made = done.artifact
    measured = {}
    for form, student in {"int8": load(made.path, runtime="packed"), "floats": load(made.path)}.items():
        found = divergence(student, model, tokens=options.tokens, context=model.sampled_context)
        measured[form] = bench.to_json(found)
    about = {"name": options.name, "model": model.name, "recipe": made.manifest["recipe"], "history": done.history}
    about |= {"weight_bytes": made.weight_bytes, "ratio_to_16_bits": made.ratio}
    return {**about, "measured": measured, "environment": environment()}


def best(row: Row) -> Row:
    """The look at the held-out text whose weights were kept."""
    return min(row["history"][1:], key=lambda look: look["kl"])


def _cells(row: Row) -> list[str]:
    start, kept, last = row["history"][0], best(row), row["history"][-1]
    both = [row["measured"][form] for form in ("int8", "floats")]
    machine, training = row["environment"], row["recipe"]["training"]
    return [
        row["name"],
        machine["gpu"] or f"{machine['cpu']}, {machine['threads']} thread{'s' * (machine['threads'] > 1)}",
        f"{last['tokens']:,}",
        f"{last['seconds']:,.0f}",
        f"{start['kl']:.2f}",
        f"{kept['kl']:.3f} ± {kept['stderr']:.3f}",
        f"{kept['top1']:.3f}",
        *(bench.with_error(found["perplexity"], ",.1f", ",.1f") for found in both),
        *(bench.with_error(found["kl"], ".3f", ".3f") for found in both),
        f"{training['steps']} steps of {training['batch']} x {training['context']}, {training['optimizer']}, "
        f"lr {training['lr']:g}",
    ]


def report(rows: list[Row]) -> str:
    """The table as Markdown."""
    title = "# Recovery: all linear layers ternary, trained to say what the original says"
    if not rows:
        return bench.page(title, "No run yet.")
    first = rows[0]["measured"]["int8"]["perplexity"]
    about, base = first["protocol"], bench.with_error(rows[0]["measured"]["int8"]["original_perplexity"], ".2f", ".2f")
    tokens, seconds, perplexity, kl, top1 = REFERENCE
    head = "run | machine | tokens | seconds | held-out KL, untrained | trained | top-1 | perplexity, int8 | floats | "
    text = f"""
        Perplexity and KL from the original on {about["text"]}/{about["split"]}, {first["n"]:,} tokens, windows of
        {about["context"]} (original {base}), of the artifact loaded back from disk: with int8 activations, and with
        floats.  Held-out KL: selftext, as training saw it.  ± is one standard error.

        {bench.table(head + "KL, int8 | floats | settings", map(_cells, rows))}

        For reference, not ours: an untuned run of the same kind on one H100 saw {tokens / 1e6:.1f} M tokens in {seconds} s
        and came to a perplexity of {perplexity} (int8 activations, original 19.93, another stretch of WikiText-2), a
        held-out KL of {kl:.3f} and a top-1 agreement of {top1}.

        ![Held-out KL against tokens seen](recovery.png)
    """
    return bench.page(title, text)


def picture(rows: list[Row]) -> bytes:
    """Held-out KL against tokens seen, one line per run."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        tokens, kl, error = zip(*((look["tokens"], look["kl"], look["stderr"]) for look in row["history"][1:]), strict=True)
        axes.errorbar(tokens, kl, error, marker="o", markersize=3, label=row["name"])
    axes.plot(REFERENCE[0], REFERENCE[3], "k*", label="untuned run of others, H100")
    axes.set(
        xscale="log", xlabel="tokens seen", yscale="log", ylabel="KL from the original, nats per token (held-out selftext)"
    )
    longest = max(rows, key=lambda row: row["history"][-1]["tokens"])
    start, last = longest["history"][0], longest["history"][-1]
    title = f"{last['tokens']:,} tokens take ternary {longest['model']} from a KL of {start['kl']:.1f} to "
    axes.set_title(f"{title}{best(longest)['kl']:.2f}", loc="left")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return bench.png(figure)


def main(arguments: list[str] | None = None) -> None:
    own = {"steps": 100, "batch": 4, "context": 256, "passes": 1, "lr": 1e-3, "optimizer": "adamw", "evaluate": 10}
    own |= {"heldout": 2048, "recompute": False, "tokens": 6132, "work": Path(tempfile.gettempdir()) / "agentforge-recovery"}
    options = bench.options(arguments, __doc__, "reports/recovery", name="cpu", model=bench.MODEL, **own)
    if not options.report:
        options.work.mkdir(parents=True, exist_ok=True)
        bench.save(options.out, {f"{options.name}.json": json.dumps(measure(options)) + "\n"})
    rows = [bench.read(file) for file in sorted(options.out.glob("*.json"))]
    bench.save(options.out, {"recovery.md": report(rows), **({"recovery.png": picture(rows)} if rows else {})})


if __name__ == "__main__":
    main()
