"""From scratch, equal tokens: does a ternary model learn as well as one in full precision, at this size?

    python benchmarks/from_scratch.py [--seeds 3] [--steps 250] [--out reports/from_scratch]

BitNet b1.58 (arXiv 2402.17764, table 1) reports 12.87 against 12.33 perplexity at 700 M weights, and matches from 3 B on.
Here the same small Llama (5.8 M weights, a vocabulary made from the same text) learns selftext twice: as it is, and with
BitLinear in place of every linear layer of its blocks (RMSNorm inside, the norms before attention and feed-forward taken
out, int8 activations), on the same windows in the same order.  Learning rates are tuned first, for each arm alone, on a
quarter of the steps with a seed that is not used again.  Loss is measured on selftext's held-out split.  Intervals are
Student's over the seeds; the difference is taken seed by seed.  A second call takes only the runs that are missing.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from typing import Any

import bench
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from agentforge.evaluation.intervals import student
from agentforge.evaluation.measurement import environment
from agentforge.evaluation.texts import selftexts
from agentforge.training.bitlinear import convert
from agentforge.training.recover import schedule

ARMS = ("full precision", "BitNet b1.58")
RATES = [1e-3, 2e-3, 4e-3, 8e-3]
BATCH, CONTEXT, TUNING_SEED = 8, 256, 100
Row = bench.Row


def tokens(vocabulary: int, heldout: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows to train on and held-out ones, int64[n, CONTEXT], by a byte-level BPE that the training text makes."""
    train, held = selftexts("calibration"), selftexts("heldout")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    about = {"special_tokens": ["<end>"], "initial_alphabet": sorted(pre_tokenizers.ByteLevel.alphabet())}
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, show_progress=False, **about)
    tokenizer.train_from_iterator(train, trainer)

    def windows(texts: list[str]) -> torch.Tensor:
        ids = [i for encoding in tokenizer.encode_batch(texts) for i in (*encoding.ids, 0)]
        rows = len(ids) // CONTEXT
        return torch.tensor(ids[: rows * CONTEXT]).reshape(rows, CONTEXT)

    return windows(train), windows(held)[: max(1, heldout // CONTEXT)]


def build(arm: str, seed: int, options: argparse.Namespace) -> LlamaForCausalLM:
    """The model with fresh weights; both arms of a seed begin with the same ones."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": options.hidden * 11 // 4}
    size = {"vocab_size": options.vocabulary, "hidden_size": options.hidden, "num_hidden_layers": options.layers}
    config = LlamaConfig(**size, **heads, max_position_embeddings=CONTEXT, tie_word_embeddings=True)
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
    groups = [{"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.1}]
    groups.append({"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    curve, began = [], time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * math.prod(schedule(step, steps, warmup=0.1))
        batch = windows[order[torch.arange(step * BATCH, (step + 1) * BATCH) % len(order)]]
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
    row = {"arm": arm, "seed": seed, "rate": rate, "steps": steps, "tokens": steps * BATCH * CONTEXT}
    row |= {"parameters": sum(p.numel() for p in model.parameters()), "curve": [round(x, 4) for x in curve]}
    row |= {"loss": float(each.mean()) if math.isfinite(curve[-1]) else math.inf, "n": len(each)}
    row |= {"stderr": float(each.std() / math.sqrt(len(each))), "seconds": time.perf_counter() - began}
    return {**row, "environment": environment(), "size": [options.vocabulary, options.hidden, options.layers]}


def sweep(arm: str, rows: list[Row]) -> dict[float, float]:
    """The held-out losses of the learning rates that were tried."""
    return {row["rate"]: row["loss"] for row in rows if row["arm"] == arm and row["seed"] == TUNING_SEED}


def wanted(rows: list[Row], options: argparse.Namespace) -> tuple[str, int, float, int] | None:
    """The next run to take: the sweep of both arms, then seeds, both arms of each, at the rate of least loss."""
    done = {(row["arm"], row["seed"], row["rate"], row["steps"]) for row in rows}
    todo = [(arm, TUNING_SEED, rate, max(1, options.steps // 4)) for rate in options.rates for arm in ARMS]
    if all(run in done for run in todo):
        losses = {arm: sweep(arm, rows) for arm in ARMS}
        best = {arm: min(found, key=found.__getitem__) for arm, found in losses.items()}
        todo = [(arm, seed, best[arm], options.steps) for seed in range(options.seeds) for arm in ARMS]
    return next((run for run in todo if run not in done), None)


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and the half width of Student's 95% interval; infinite for a single value."""
    found = bench.mean(values)
    return found["value"], student(len(values) - 1) * found["stderr"] if len(values) > 1 else math.inf


def report(rows: list[Row], options: argparse.Namespace) -> str:
    """The result as Markdown."""
    title = "# From scratch: ternary against full precision, equal tokens"
    if not rows:
        return bench.page(title)
    first, rates = rows[0], options.rates
    swept = [[arm, *(f"{sweep(arm, rows).get(rate, math.nan):.3f}" for rate in rates)] for arm in ARMS]
    text = f"""
        A Llama of {first["parameters"] / 1e6:.1f} M weights, {options.steps * BATCH * CONTEXT:,} tokens of selftext;
        loss on {first["n"]:,} held-out tokens, nats per token.  {first["environment"]["cpu"]}, torch
        {first["environment"]["packages"]["torch"]}.

        Learning rates, tuned on {max(1, options.steps // 4)} steps with seed {TUNING_SEED}:
    """
    parts = [title, text, bench.table(" | ".join(["arm", *(f"{rate:g}" for rate in rates)]), swept)]
    final = [row for row in rows if row["seed"] != TUNING_SEED and row["steps"] == options.steps]
    losses = {arm: {row["seed"]: row["loss"] for row in final if row["arm"] == arm} for arm in ARMS}
    found = []
    for arm, by_seed in losses.items():
        if by_seed:
            mean, half = interval(list(by_seed.values()))
            rate = next(row["rate"] for row in final if row["arm"] == arm)
            each = ", ".join(f"{loss:.4f}" for loss in by_seed.values())
            found.append([arm, f"{rate:g}", each, f"{mean:.4f} ± {half:.4f}", f"{math.exp(mean):.2f}"])
    if found:
        parts.append(bench.table("arm | learning rate | held-out loss, seed by seed | mean | perplexity", found))
    full, ternary = losses.values()
    if pairs := [ternary[seed] - full[seed] for seed in full if seed in ternary]:
        mean, half = interval(pairs)
        verdict = "no difference shown" if abs(mean) <= half else f"ternary is {'worse' if mean > 0 else 'better'}"
        parts.append(f"""
            Difference, seed by seed: {mean:+.4f} ± {half:.4f} nats (n = {len(pairs)}; 95%): {verdict}.  The arms differ in
            the place of their norms, too, as the paper has it; and so few tokens show the beginning of learning, not its
            end.
        """)
    return bench.page(*parts)


def main(arguments: list[str] | None = None) -> None:
    own = {"vocabulary": 4096, "hidden": 256, "layers": 6, "heldout": 32768}
    options = bench.options(arguments, __doc__, "reports/from_scratch", seeds=3, steps=250, rates=RATES, **own)
    size = [options.vocabulary, options.hidden, options.layers]
    rows: list[Row] = [row for row in bench.read(options.out / "from_scratch.json") if row["size"] == size]

    def write() -> None:
        bench.save(options.out, {"from_scratch.json": json.dumps(rows) + "\n", "from_scratch.md": report(rows, options)})

    data = None
    while not options.report and (run := wanted(rows, options)):
        data = data or tokens(options.vocabulary, options.heldout)
        bench.say(f"{run[0]}, seed {run[1]}, rate {run[2]:g}, {run[3]} steps ...")
        rows.append(train(*run, options, data))
        write()
    write()


if __name__ == "__main__":
    main()
