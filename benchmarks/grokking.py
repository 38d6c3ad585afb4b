"""Does Grokfast's filter make a model grok sooner, at the same weight decay?

    python benchmarks/grokking.py [--seeds 5] [--cap 6000] [--only PREFIX] [--seconds S] [--out reports/grokking]

The task of the paper (arXiv 2405.20233, as its code has it): a b modulo 97 as the sequence a, *, b, =; a decoder of two
layers; half of the 97 * 96 products to train on, the other half to validate on; batches of 512 (the last one of an epoch has
48).  The paper sets a baseline without weight decay against the filter with a weight decay of 0.005.  Here both sides of
each comparison have the same, and the same seeds.  The paper's code uses torch.optim.Adam, where weight decay is an L2 term:
the gradient is filtered first, and Adam adds 0.005 W to what comes out.  So do the arms called Adam here.  AdamW and
MuGrokfast decay the weights directly (decoupled); 1.0 is what Power et al. (arXiv 2201.02177) grokked with.

A run that does not get there within the cap is censored: its steps are known to be more than the cap, and no more.  The
table has the runs with these settings, the JSON file has all; a second call takes only the runs that are missing.
After --seconds the run that is on its way is stored, and the next call continues with it, to the same result.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import itertools
import json
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import bench
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from agentforge.evaluation.measurement import environment
from agentforge.training import mugrokfast
from agentforge.training.mugrokfast import MuGrokfast, amplify_slow, parameter_groups

P, WIDTH, HEADS, LAYERS = 97, 128, 4, 2
BATCH, LR, WARMUP, BETAS, ALPHA = 512, 1e-3, 10, (0.9, 0.98), 0.98
EVERY, GOAL = 20, 0.95
PROTOCOL = 1  # raised where a change makes earlier runs another experiment
Row = bench.Row


class Arm(NamedTuple):
    """optimizer: "AdamW" or "MuGrokfast" (decoupled weight decay) or "Adam" (L2, as in the paper's code).  lamb: the
    filter's lambda, 0 for none."""

    optimizer: str
    weight_decay: float
    lamb: float = 0.0

    def __str__(self) -> str:
        filtered = f" + filter {self.lamb:g}" if self.lamb else ""
        return f"{self.optimizer}{filtered}, {'L2' if self.optimizer == 'Adam' else 'wd'} {self.weight_decay:.3g}"


# With and without the filter, most wanted first.
PAIRS = [
    (Arm(name, weight_decay), Arm(name, weight_decay, 2.0))
    for name, weight_decay in (("AdamW", 1.0), ("MuGrokfast", 1.0), ("Adam", 0.005), ("Adam", 0.0))
]
# On a gradient that stays the filter is a factor of 3.  Adam does not see a factor, but an L2 term beside it is then worth a
# third: this arm has that third, and no filter.
WEAKER = Arm("Adam", 0.005 / 3)
ORDER = [*PAIRS[:3], (WEAKER,), *PAIRS[3:]]
COMPARISONS = [
    *PAIRS,
    (Arm("Adam", 0.005), WEAKER),
    (WEAKER, Arm("Adam", 0.005, 2.0)),
    (Arm("AdamW", 1.0), Arm("MuGrokfast", 1.0)),  # Muon alone
    (Arm("AdamW", 1.0), Arm("MuGrokfast", 1.0, 2.0)),
    (Arm("Adam", 0.0), Arm("Adam", 0.005, 2.0)),  # the paper's own: two changes at once
    (Arm("Adam", 0.0), Arm("Adam", 0.005)),  # the one of them that is not the filter
]


class Block(nn.Module):
    """A layer as the paper's code has it: the first norm is outside the residual.  x = norm(x); x + attention; x + mlp."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def mix(self, q: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor]) -> torch.Tensor:
        """q: float[n, width]; keys, values: one float[n, width] for each position it looks at."""
        heads = (q.shape[0], HEADS, -1)
        scores = torch.stack([(q * k).view(heads).sum(-1) for k in keys], -1) / math.sqrt(q.shape[1] // HEADS)
        weights = scores.softmax(-1).unbind(-1)
        mixed = sum(w.unsqueeze(-1) * v.view(heads) for w, v in zip(weights, values, strict=True))
        return mixed.reshape(q.shape)

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        """x plus its MLP."""
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Decoder(nn.Module):
    """A causal decoder for the four tokens a, *, b, =, whose loss needs the last position only.

    What the first two positions compute depends on a alone: it is done once for each of the 97, not for each example; and
    the last layer computes the last position only.  Same function and same gradients as without these savings.
    """

    def __init__(self, p: int = P, width: int = WIDTH, layers: int = LAYERS) -> None:
        super().__init__()
        self.p = p
        self.tokens, self.positions = nn.Embedding(p + 2, width), nn.Embedding(4, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, p + 2, bias=False)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """a, b: int[n].  Returns the logits after "=": float[n, p + 2]."""
        p, n = self.p, len(a)
        token, position = self.tokens.weight, self.positions.weight
        # Rows: p for position 0, p for position 1, n for position 2, n for position 3.  Before the first attention those
        # with the same token at the same position are one row, of p, 1, p and 1.
        x = torch.cat(
            [
                token[:p] + position[0],
                (token[p + 1] + position[1])[None],
                token[:p] + position[2],
                (token[p] + position[3])[None],
            ]
        )
        rows = torch.cat([torch.arange(p), torch.full((p,), p), p + 1 + b, torch.full((n,), 2 * p + 1)])
        for i, block in enumerate(self.blocks):
            last = i == len(self.blocks) - 1
            x = block.norm1(x)
            q, k, v = block.q(x[-n:] if last else x), block.k(x), block.v(x)
            if i == 0:
                x, q, k, v = (part[rows] for part in (x, q, k, v))
            (k0, k1, *ks), (v0, v1, *vs) = k.split([p, p, n, n]), v.split([p, p, n, n])
            ks, vs = [k0[a], k1[a], *ks], [v0[a], v1[a], *vs]
            mixed = [block.mix(q[-n:], ks, vs)]
            if not last:
                q0, q1, q2, _ = q.split([p, p, n, n])
                mixed = [block.mix(q0, [k0], [v0]), block.mix(q1, [k0, k1], [v0, v1]), block.mix(q2, ks[:3], vs[:3]), *mixed]
            x = block.mlp((x[-n:] if last else x) + block.o(torch.cat(mixed)))
        return self.head(self.norm(x))


def products(seed: int, p: int = P) -> tuple[torch.Tensor, torch.Tensor]:
    """Training and validation half of all a * b with 0 <= a < p and 0 < b < p: int[3, n] each, of a, b and the product."""
    a, b = torch.cartesian_prod(torch.arange(p), torch.arange(1, p)).T
    table = torch.stack([a, b, a * b % p])[:, torch.randperm(p * (p - 1), generator=torch.Generator().manual_seed(seed))]
    return table[:, : p * (p - 1) // 2], table[:, p * (p - 1) // 2 :]


def batches(table: torch.Tensor, seed: int, size: int = BATCH) -> Iterator[torch.Tensor]:
    """Batches without end, in a new order each epoch."""
    generator = torch.Generator().manual_seed(seed + 1_000_000)
    while True:
        yield from table[:, torch.randperm(table.shape[1], generator=generator)].split(size, dim=1)


def optimizer_of(arm: Arm, model: nn.Module) -> torch.optim.Optimizer:
    """The arm's optimizer, its filter included."""
    if arm.optimizer != "Adam":
        muon = arm.optimizer == "MuGrokfast"
        groups = parameter_groups(model) if muon else [{"params": list(model.parameters()), "muon": False}]
        return MuGrokfast(groups, LR, weight_decay=arm.weight_decay, betas=BETAS, alpha=ALPHA, lamb=arm.lamb)
    adam = torch.optim.Adam(model.parameters(), LR, weight_decay=arm.weight_decay, betas=BETAS)

    def amplify(*_: Any) -> None:
        if "ema" not in adam.state:
            adam.state["ema"] = [parameter.grad.clone() for parameter in model.parameters()]  # stored and restored with it
        for parameter, mean in zip(model.parameters(), adam.state["ema"], strict=True):
            parameter.grad = amplify_slow(parameter.grad, mean, ALPHA, arm.lamb)

    if arm.lamb:
        adam.register_step_pre_hook(amplify)
    return adam


@torch.no_grad()
def accuracy(model: nn.Module, table: torch.Tensor) -> float:
    """The share of products that the model gets right."""
    right = [(model(a, b).argmax(-1) == product).sum() for a, b, product in table.split(1024, dim=1)]
    return int(sum(right)) / table.shape[1]


def run(recipe: Row, unfinished: Path, deadline: float = math.inf) -> Row | None:
    """One run; if `deadline` (of time.monotonic) comes first, None, and the file `unfinished` to continue from.

    steps: to 95% validation accuracy, None if the cap came first.  memorised: to 95% on the last batch.
    """
    arm, seed, cap = Arm(**recipe["arm"]), recipe["seed"], recipe["cap"]
    train, validation = products(seed, recipe["p"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Decoder(recipe["p"], recipe["width"])
    optimizer = optimizer_of(arm, model)
    schedule = LambdaLR(optimizer, lambda taken: min(1.0, taken / WARMUP))
    row: Row = {"steps": None, "memorised": None, "accuracy": 0.0, "cpu_seconds_a_step": 0.0, "every_100_steps": []}
    done, seconds = 0, 0.0
    saved = torch.load(unfinished) if unfinished.is_file() else {}
    if saved.get("recipe") == recipe:
        row, done, seconds = saved["row"], saved["done"], saved["seconds"]
        for part, state in zip((model, optimizer, schedule), saved["states"], strict=True):
            part.load_state_dict(state)
    start = time.process_time()
    for taken, (a, b, product) in enumerate(itertools.islice(batches(train, seed), done, cap), start=done + 1):
        logits = model(a, b)
        optimizer.zero_grad()
        F.cross_entropy(logits, product).backward()
        optimizer.step()
        schedule.step()
        if taken % EVERY and taken < cap:
            continue
        seconds += time.process_time() - start  # without looking
        if row["memorised"] is None and float((logits.argmax(-1) == product).float().mean()) >= GOAL:
            row["memorised"] = taken
        row |= {"accuracy": accuracy(model, validation), "cpu_seconds_a_step": seconds / taken}
        if taken % 100 == 0:
            row["every_100_steps"].append(round(row["accuracy"], 3))
        if row["accuracy"] >= GOAL:
            row["steps"] = taken
            break
        if time.monotonic() > deadline and taken < cap:
            states = [part.state_dict() for part in (model, optimizer, schedule)]
            kept = {"recipe": recipe, "row": row, "done": taken, "seconds": seconds, "states": states}
            unfinished.parent.mkdir(parents=True, exist_ok=True)
            torch.save(kept, unfinished)
            return None
        start = time.process_time()
    unfinished.unlink(missing_ok=True)
    sources = [Path(__file__), Path(inspect.getsourcefile(mugrokfast) or "")]
    hashes = {source.name: hashlib.sha256(source.read_bytes()).hexdigest() for source in sources}
    return {**row, "sources_sha256": hashes, "environment": environment()}


def recipe(arm: Arm, seed: int, options: argparse.Namespace) -> Row:
    """What a run depends on."""
    return {"arm": arm._asdict(), "seed": seed, **_settings(options)}


def _settings(options: argparse.Namespace) -> Row:
    """What all runs of a table have in common."""
    return {"cap": options.cap, "p": options.p, "width": options.width, "protocol": PROTOCOL}


Range = tuple[float, float]  # what is known of a number: between these two


def _known(row: Row, what: str) -> Range:
    """The steps of a run to the end, or until it had memorised: from the cap to infinity if it is censored."""
    return (row[what], row[what]) if row[what] else (row["recipe"]["cap"], math.inf)


def ratio(without: Range, with_filter: Range) -> Range:
    """How many times sooner the second one was."""
    return without[0] / with_filter[1], without[1] / with_filter[0]


def rank(n: int) -> tuple[int, float]:
    """The largest k for which the k-th smallest to the k-th largest of n values hold the median at 90% or more, or 1
    where n is too small for that; and that chance, 1 - 2 P(Binomial(n, 1/2) < k)."""
    chances = {k: 1 - 2 * sum(math.comb(n, i) for i in range(k)) / 2**n for k in range(1, max(n // 2, 1) + 1)}
    k = max((k for k, chance in chances.items() if chance >= 0.9), default=1)
    return k, chances[k]


def median(values: list[Range]) -> Range:
    """What is known of the median."""
    return statistics.median(low for low, _ in values), statistics.median(high for _, high in values)


def interval(values: list[Range]) -> Range:
    """From the k-th smallest to the k-th largest value, k from `rank`."""
    k, _ = rank(len(values))
    return sorted(low for low, _ in values)[k - 1], sorted(high for _, high in values)[-k]


def show(value: Range, digits: int = 0) -> str:
    """A number, or the side on which it is known."""
    low, high = value
    if low == high:
        return f"{low:,.{digits}f}"
    if math.isinf(high):
        return f"> {low:,.{digits}f}" if low else "not known"
    return f"{low:,.{digits}f} to {high:,.{digits}f}" if low else f"< {high:,.{digits}f}"


def verdict(ratios: list[Range]) -> str:
    """What the interval of the ratios says of the second arm."""
    low, high = interval(ratios)
    if rank(len(ratios))[1] < 0.9:
        return "too few seeds"
    return "sooner" if low > 1 else "later" if high < 1 else "no difference shown"


def table(rows: list[Row], options: argparse.Namespace) -> str:
    """The report as Markdown."""
    title = "# Grokking with and without Grokfast's filter, at the same weight decay"
    if not rows:
        return bench.page(title, "No run yet.")
    machine = rows[0]["environment"]
    runs = {arm: _runs(rows, arm) for group in ORDER for arm in group}
    steps = {arm: {seed: _known(run, "steps") for seed, run in found.items()} for arm, found in runs.items()}
    by_arm = []
    for arm, found in ((arm, found) for arm, found in runs.items() if found):
        values = list(steps[arm].values())
        learned = median([_known(run, "memorised") for run in found.values()])
        milliseconds = 1000 * statistics.median(run["cpu_seconds_a_step"] for run in found.values())
        cells = [str(arm), show(median(values)), _interval(values, 0), _by_seed(steps[arm], 0), show(learned)]
        by_arm.append([*cells, f"{milliseconds:.0f}"])
    compared = []
    for first, second in COMPARISONS:
        left, right = steps[first], steps[second]
        ratios = {seed: ratio(left[seed], right[seed]) for seed in left if seed in right}
        if values := list(ratios.values()):
            cells = [str(first), str(second), show(median(values), 2), _interval(values, 2), _by_seed(ratios, 2)]
            compared.append([*cells, verdict(values)])
    text = f"""
        Steps to {GOAL:.0%} validation accuracy on a b mod {options.p}; {LAYERS} layers, width {options.width}, {HEADS}
        heads; half of the products to train on, batches of {BATCH}, learning rate {LR:g}, warm-up of {WARMUP} steps, betas
        {BETAS[0]} and {BETAS[1]}, filter with alpha {ALPHA}; looked at every {EVERY} steps, at most {options.cap:,}.  A seed
        sets split, first weights and order of the batches, the same for every row.  wd: decoupled; L2: added to the filtered
        gradient, as in the paper's code.  {machine["cpu"]}, {machine["threads"]} thread, torch
        {machine["packages"]["torch"]}.

        "> {options.cap:,}": censored, not reached in {options.cap:,} steps.  Intervals of a median: order statistics, in
        brackets how often they hold it, whatever the distribution.

        ## Steps

        {bench.table("optimizer | median | interval | by seed | 95% of a training batch | CPU ms a step", by_arm, "lrrlrr")}

        ## Comparisons

        Steps of the first over steps of the second, seed by seed: above 1 the second is sooner.  Where the weight decay
        differs, so does more than the filter.  L2 0.00167 is 0.005 / 3: on a gradient that stays, the filter is a factor of
        3, which Adam takes out again, but for the L2 term, which is then worth a third.

        {bench.table("first | second | median ratio | interval | by seed | the second is", compared, "llrrll")}

        The paper: 39,890 steps without filter and weight decay, 910 with the filter and a weight decay of 0.005 (43.8).
    """
    return bench.page(title, text)


def _runs(rows: list[Row], arm: Arm) -> dict[int, Row]:
    """The runs of an arm by seed."""
    found = {row["recipe"]["seed"]: row for row in rows if row["recipe"]["arm"] == arm._asdict()}
    return dict(sorted(found.items()))


def _by_seed(values: dict[int, Range], digits: int) -> str:
    return ", ".join(f"{seed}: {show(value, digits)}" for seed, value in values.items())


def _interval(values: list[Range], digits: int) -> str:
    """The interval of the median, and its chance to hold it."""
    (low, high), (_, chance) = interval(values), rank(len(values))
    end = f"{high:,.{digits}f}" if math.isfinite(high) else "∞"
    return f"{low:,.{digits}f} to {end} ({chance:.1%})" if chance > 0 else "-"


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    return bench.options(
        arguments, __doc__, "reports/grokking", seeds=5, cap=6000, p=P, width=WIDTH, only=[], seconds=math.inf
    )


def main(arguments: list[str] | None = None) -> None:
    options = options_of(arguments)
    torch.set_num_threads(1)

    def write(rows: list[Row]) -> None:
        shown = [row for row in rows if _settings(options).items() <= row["recipe"].items()]
        data = "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"
        bench.save(options.out, {"grokking.json": data, "grokking.md": table(shown, options)})

    pairs = [(arm, seed) for group in ORDER for seed in range(options.seeds) for arm in group]
    wanted = {f"{arm}, seed {seed}": recipe(arm, seed, options) for arm, seed in pairs}
    unfinished, deadline = options.out / "unfinished.pt", time.monotonic() + options.seconds

    def take(name: str) -> Row | None:
        return run(wanted[name], unfinished, deadline)

    rows = bench.read(options.out / "grokking.json")
    write(rows if options.report else bench.run(rows, wanted, take, write, only=options.only))


if __name__ == "__main__":
    main()
