"""Recovery of a whole ternary model by distillation: how far it gets, and how fast, on this machine.

    python benchmarks/recovery.py --name cpu --steps 100 --batch 4 --context 256 --evaluate 10
    python benchmarks/recovery.py --name h100 --steps 3000 --batch 24 --context 1024 --evaluate 100

Every linear layer inside the decoder's blocks becomes ternary (absmean per tensor, int8 activations), and `recover` trains
them on selftext, the original being the teacher; the learning rate's schedule ends with --steps.  Then the packed model is
loaded back from disk, and measured on WikiText-2's test split (selftext's held-out one if WikiText-2 is missing), with
int8 activations (the packed runtime) and without (the decoded weights).

Writes OUT/NAME.json, OUT/recovery.md (one row per run) and OUT/recovery.png, the curves of all runs.  The artifact goes to
--work; killed, the same command continues from the last look.  `--report` writes table and picture again, and measures
nothing.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import bench
from matplotlib.figure import Figure

import agentforge
from agentforge.evaluation.measurement import environment
from agentforge.opening import load, open_model
from agentforge.training.recover import Settings, recover

Row = bench.Row
# What others came to on an H100, without tuning.  Tokens, seconds, perplexity, KL, top-1.
REFERENCE = (13.9e6, 230, 138.7, 0.630, 0.629)


def measure(options: argparse.Namespace) -> Row:
    """Train, load what was written, and measure it."""
    settings = Settings(
        steps=options.steps,
        batch=options.batch,
        context=options.context,
        passes=options.passes,
        lr=options.lr,
        optimizer=options.optimizer,
        evaluate=options.evaluate,
        heldout=options.heldout,
        recompute=options.recompute,
    )
    model = open_model(options.model)
    done = recover(model, options.work / f"{options.name}-recovered", settings=settings)
    protocol: dict[str, Any] = {"tokens": options.tokens, "context": model.sampled_context}
    path = done.artifact.path
    forms = {"int8": load(path, runtime="packed"), "floats": load(path)}
    found = {form: agentforge.divergence(student, model, **protocol)._asdict() for form, student in forms.items()}
    return {
        "name": options.name,
        "model": model.name,
        "recipe": done.artifact.manifest["recipe"],
        "history": done.history,
        "weight_bytes": done.artifact.weight_bytes,
        "ratio_to_16_bits": done.artifact.ratio,
        "measured": {form: {k: m.to_json() for k, m in each.items()} for form, each in found.items()},
        "environment": environment(),
    }


def best(row: Row) -> Row:
    """The look at the held-out text whose weights were kept."""
    return min(row["history"][1:], key=lambda look: look["kl"])


def report(rows: list[Row]) -> str:
    """The table as Markdown."""
    lines = ["# Recovery: all linear layers ternary, trained to say what the original says", ""]
    if not rows:
        return "\n".join([*lines, "No run yet."]) + "\n"
    first = rows[0]["measured"]["int8"]["perplexity"]
    base = rows[0]["measured"]["int8"]["original_perplexity"]
    lines += [
        f"Perplexity and KL from the original on {first['protocol']['text']}/{first['protocol']['split']}, {first['n']:,} "
        f"tokens, windows of {first['protocol']['context']} (original {base['value']:.2f} ± {base['stderr']:.2f}), of the "
        "artifact loaded back from disk: with int8 activations, and with floats.  Held-out KL: selftext, as training saw "
        "it.  ± is one standard error.",
        "",
    ]
    found = []
    for row in rows:
        start, kept, last = row["history"][0], best(row), row["history"][-1]
        int8, floats = row["measured"]["int8"], row["measured"]["floats"]
        machine = row["environment"]
        training = row["recipe"]["training"]
        cells = [
            row["name"],
            machine["gpu"] or f"{machine['cpu']}, {machine['threads']} thread{'s' * (machine['threads'] > 1)}",
            f"{last['tokens']:,}",
            f"{last['seconds']:,.0f}",
            f"{start['kl']:.2f}",
            f"{kept['kl']:.3f} ± {kept['stderr']:.3f}",
            f"{kept['top1']:.3f}",
            *(f"{m['perplexity']['value']:,.1f} ± {m['perplexity']['stderr']:,.1f}" for m in (int8, floats)),
            *(f"{m['kl']['value']:.3f} ± {m['kl']['stderr']:.3f}" for m in (int8, floats)),
            f"{training['steps']} steps of {training['batch']} x {training['context']}, {training['optimizer']}, "
            f"lr {training['lr']:g}",
        ]
        found.append(cells)
    head = "run | machine | tokens | seconds | held-out KL, untrained | trained | top-1 | perplexity, int8 | floats | "
    lines += bench.table(head + "KL, int8 | floats | settings", found, "l" * 12)
    tokens, seconds, perplexity, kl, top1 = REFERENCE
    lines += [
        "",
        f"For reference, not ours: an untuned run of the same kind on one H100 saw {tokens / 1e6:.1f} M tokens in {seconds} "
        f"s and came to a perplexity of {perplexity} (int8 activations, original 19.93, another stretch of WikiText-2), a "
        f"held-out KL of {kl:.3f} and a top-1 agreement of {top1}.",
        "",
        "![Held-out KL against tokens seen](recovery.png)",
    ]
    return "\n".join(lines) + "\n"


def picture(rows: list[Row]) -> bytes:
    """Held-out KL against tokens seen, one line per run."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        looks = row["history"][1:]
        axes.errorbar(
            [look["tokens"] for look in looks],
            [look["kl"] for look in looks],
            [look["stderr"] for look in looks],
            marker="o",
            markersize=3,
            label=row["name"],
        )
    axes.plot(REFERENCE[0], REFERENCE[3], "k*", label="untuned run of others, H100")
    axes.set(
        xscale="log", yscale="log", xlabel="tokens seen", ylabel="KL from the original, nats per token (held-out selftext)"
    )
    longest = max(rows, key=lambda row: row["history"][-1]["tokens"])
    start, kept, last = longest["history"][0], best(longest), longest["history"][-1]
    axes.set_title(
        f"{last['tokens']:,} tokens take ternary {longest['model']} from a KL of {start['kl']:.1f} to {kept['kl']:.2f}",
        loc="left",
    )
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    stream = io.BytesIO()
    figure.savefig(stream, dpi=110, metadata={"Software": None})
    return stream.getvalue()


def main(arguments: list[str] | None = None) -> int:
    parser = bench.parser("Ternary recovery of a whole model.", "reports/recovery")
    parser.add_argument("--name", default="cpu", help="name of the run, and of its file")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4, help="windows per step")
    parser.add_argument("--context", type=int, default=256, help="tokens per window")
    parser.add_argument("--passes", type=int, default=1, help="parts a batch is computed in, to save memory")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--optimizer", default="adamw", choices=["adamw", "mugrokfast"])
    parser.add_argument("--evaluate", type=int, default=10, help="steps between two looks at the held-out text")
    parser.add_argument("--heldout", type=int, default=2048, help="tokens to look at")
    parser.add_argument("--recompute", action="store_true", help="gradient checkpointing")
    parser.add_argument("--tokens", type=int, default=6132, help="tokens to measure on at the end")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "agentforge-recovery")
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args(arguments)
    if not options.report:
        options.work.mkdir(parents=True, exist_ok=True)
        bench.save(options.out, {f"{options.name}.json": json.dumps(measure(options)) + "\n"})
    rows = [bench.read(file) for file in sorted(options.out.glob("*.json"))]
    bench.save(options.out, {"recovery.md": report(rows), **({"recovery.png": picture(rows)} if rows else {})})
    return 0


if __name__ == "__main__":
    sys.exit(main())
