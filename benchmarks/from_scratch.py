"""From scratch, equal tokens: does a ternary model learn as well as one in full precision, at this size?

    python benchmarks/from_scratch.py [--seeds 3] [--steps 250] [--seconds S] [--out reports/from_scratch]

BitNet b1.58 (arXiv 2402.17764, table 1) reports 12.87 against 12.33 perplexity at 700 M weights, and matches from 3 B on.
Here the same small Llama (6 layers, hidden 256: 5.8 M weights, a vocabulary of 4,096 made from the same text) learns
selftext twice: as it is, and with BitLinear in place of every linear layer of its blocks (RMSNorm inside, the norms before
attention and feed-forward taken out, int8 activations).  Both arms see the same windows in the same order, 2,048 tokens per
step; AdamW (0.9, 0.95), weight decay 0.1, ten percent warm-up, cosine to a tenth.

Learning rates are tuned first, for each arm alone, on a quarter of the steps with a seed that is not used again.  Loss is
measured on selftext's held-out split.  Intervals are Student's over the seeds; the difference is taken seed by seed.

Writes OUT/from_scratch.json and OUT/from_scratch.md after each run; a second call takes only the runs that are missing.
After --seconds no further run is begun.  `--report` writes the table again and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from typing import Any

import bench
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from agentforge.evaluation.intervals import student
from agentforge.evaluation.measurement import environment
from agentforge.evaluation.texts import selftexts
from agentforge.training.bitlinear import convert
from agentforge.training.recover import schedule

ARMS = ("full precision", "BitNet b1.58")
RATES = (1e-3, 2e-3, 4e-3, 8e-3)
BATCH, CONTEXT, TUNING_SEED = 8, 256, 100
Row = bench.Row


def tokens(vocabulary: int, heldout: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows to train on and held-out ones, int64[n, CONTEXT], by a byte-level BPE that the training text makes."""
    train, held = selftexts("calibration"), selftexts("heldout")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<end>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(train, trainer)

    def windows(texts: list[str]) -> torch.Tensor:
        ids = [i for encoding in tokenizer.encode_batch(texts) for i in (*encoding.ids, 0)]
        rows = len(ids) // CONTEXT
        return torch.tensor(ids[: rows * CONTEXT]).reshape(rows, CONTEXT)

    return windows(train), windows(held)[: max(1, heldout // CONTEXT)]


def build(arm: str, seed: int, options: argparse.Namespace) -> LlamaForCausalLM:
    """The model with fresh weights; both arms of a seed begin with the same ones."""
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 11 // 4,
        num_hidden_layers=options.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    if arm == ARMS[1]:
        convert(model, norm="inside")
        for block in model.model.layers:  # their norms before attention and feed-forward: each layer brings its own now
            block.input_layernorm = block.post_attention_layernorm = torch.nn.Identity()
    return model


def train(arm: str, seed: int, rate: float, steps: int, options: argparse.Namespace, data: Any) -> Row:
    """One run: held-out loss at its end, and the curve of training losses."""
    windows, held = data
    model = build(arm, seed, options)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], lr=rate, betas=(0.9, 0.95)
    )
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    curve, began = [], time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * math.prod(schedule(step, steps, warmup=0.1))
        rows = order[torch.arange(step * BATCH, (step + 1) * BATCH) % len(order)]
        batch = windows[rows]
        optimizer.zero_grad()
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        curve.append(loss.item())
        if not math.isfinite(curve[-1]):
            break
    model.eval()
    losses = []
    with torch.no_grad():
        for part in held.split(BATCH):
            logits = model(input_ids=part).logits[:, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none"))
    each = torch.cat(losses).double()
    return {
        "arm": arm,
        "seed": seed,
        "rate": rate,
        "steps": steps,
        "tokens": steps * BATCH * CONTEXT,
        "parameters": sum(p.numel() for p in model.parameters()),
        "loss": float(each.mean()) if math.isfinite(curve[-1]) else math.inf,
        "stderr": float(each.std() / math.sqrt(len(each))),
        "n": len(each),
        "curve": [round(x, 4) for x in curve],
        "seconds": time.perf_counter() - began,
        "environment": environment(),
        "size": [options.vocabulary, options.hidden, options.layers],
    }


def best_rate(arm: str, rows: list[Row], options: argparse.Namespace) -> float | None:
    """The learning rate with the least held-out loss in the sweep; None while a run of it is missing."""
    sweep = {row["rate"]: row["loss"] for row in rows if row["arm"] == arm and row["seed"] == TUNING_SEED}
    return min(sweep, key=sweep.__getitem__) if set(sweep) >= set(options.rates) else None


def wanted(rows: list[Row], options: argparse.Namespace) -> tuple[str, int, float, int] | None:
    """The next run to take: the sweep of both arms, then seeds, both arms of each."""
    done = {(row["arm"], row["seed"], row["rate"], row["steps"]) for row in rows}
    short = max(1, options.steps // 4)
    for rate in options.rates:
        for arm in ARMS:
            if (arm, TUNING_SEED, rate, short) not in done:
                return arm, TUNING_SEED, rate, short
    for seed in range(options.seeds):
        for arm in ARMS:
            rate = best_rate(arm, rows, options)
            assert rate is not None
            if (arm, seed, rate, options.steps) not in done:
                return arm, seed, rate, options.steps
    return None


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and the half width of Student's 95% interval; infinite for a single value."""
    found = bench.mean(values)
    return found["value"], student(len(values) - 1) * found["stderr"] if len(values) > 1 else math.inf


def report(rows: list[Row], options: argparse.Namespace) -> str:
    """The result as Markdown."""
    final = [row for row in rows if row["seed"] != TUNING_SEED and row["steps"] == options.steps]
    lines = ["# From scratch: ternary against full precision, equal tokens", ""]
    if rows:
        first = rows[0]
        lines += [
            f"A Llama of {first['parameters'] / 1e6:.1f} M weights, {options.steps * BATCH * CONTEXT:,} tokens of selftext; "
            f"loss on {first['n']:,} held-out tokens, nats per token.  {first['environment']['cpu']}, torch "
            f"{first['environment']['packages']['torch']}.",
            "",
            f"Learning rates, tuned on {max(1, options.steps // 4)} steps with seed {TUNING_SEED}:",
            "",
        ]
        found = []
        for arm in ARMS:
            sweep = {row["rate"]: row["loss"] for row in rows if row["arm"] == arm and row["seed"] == TUNING_SEED}
            found.append([arm, *(f"{sweep.get(rate, math.nan):.3f}" for rate in options.rates)])
        lines += bench.table(
            " | ".join(["arm", *(f"{rate:g}" for rate in options.rates)]), found, "l" * (len(options.rates) + 1)
        )
    if final:
        found = []
        for arm in ARMS:
            mine = [row for row in final if row["arm"] == arm]
            if mine:
                mean, half = interval([row["loss"] for row in mine])
                each = ", ".join(f"{row['loss']:.4f}" for row in mine)
                found.append([arm, f"{mine[0]['rate']:g}", each, f"{mean:.4f} ± {half:.4f}", f"{math.exp(mean):.2f}"])
        head = "arm | learning rate | held-out loss, seed by seed | mean | perplexity"
        lines += ["", *bench.table(head, found, "lllll")]
        pairs = [
            b["loss"] - a["loss"]
            for a in final
            for b in final
            if a["arm"] == ARMS[0] and b["arm"] == ARMS[1] and a["seed"] == b["seed"]
        ]
        if pairs:
            mean, half = interval(pairs)
            verdict = "no difference shown" if abs(mean) <= half else f"ternary is {'worse' if mean > 0 else 'better'}"
            lines += [
                "",
                f"Difference, seed by seed: {mean:+.4f} ± {half:.4f} nats (n = {len(pairs)}; 95%): {verdict}.  The arms "
                "differ in the place of their norms, too, as the paper has it; and so few tokens show the beginning of "
                "learning, not its end.",
            ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = bench.parser("Ternary against full precision, from scratch, on equal tokens.", "reports/from_scratch")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES))
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heldout", type=int, default=32768)
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args(arguments)
    size = [options.vocabulary, options.hidden, options.layers]
    rows: list[Row] = [row for row in bench.read(options.out / "from_scratch.json") if row["size"] == size]

    def write() -> None:
        files = {"from_scratch.json": json.dumps(rows) + "\n", "from_scratch.md": report(rows, options)}
        bench.save(options.out, files)

    began = time.perf_counter()
    data = None
    while not options.report and (run := wanted(rows, options)) and time.perf_counter() - began < options.seconds:
        data = data or tokens(options.vocabulary, options.heldout)
        print(f"{run[0]}, seed {run[1]}, rate {run[2]:g}, {run[3]} steps ...", file=sys.stderr, flush=True)
        rows.append(train(*run, options, data))
        write()
    if options.report:
        write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
