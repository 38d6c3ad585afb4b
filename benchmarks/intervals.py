"""How often 95% intervals of samples hold the value of the whole text.

    python benchmarks/intervals.py [--windows 593] [--out reports/coverage] [--report]

The default model against its own 4-bit rounding is measured on WikiText-2's test text, windows of 512, once and whole (35
minutes of a core); the sums of every window are kept in OUT/coverage.json.  From them 200 samples of the default size are
drawn, and the intervals that `divergence` gives of each are held against the value of all windows.  `--report` draws again
from the sums that are there and measures nothing.
"""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path

import bench
import torch

from agentforge import compress, load, open_model, stages
from agentforge.evaluation import find_text
from agentforge.evaluation.likelihood import compared, divergence_of, plan
from agentforge.models import SAMPLED, SAMPLED_TOKENS

STAGE = "rounding:bits=4,group=64"
DRAWS = 200
SIZE = SAMPLED_TOKENS // (SAMPLED - 1)
QUANTITIES = ("kl", "perplexity", "top1", "retention", "perplexity_retention", "accuracy")
PLACED = ("even grid, random offset", "one at random of each twelfth", "random windows")
Row = bench.Row


def measure(windows: int) -> Row:
    """Sums of so many windows from the text's beginning on, and the spread of single tokens."""
    model, text = open_model(bench.MODEL), find_text("wikitext2")
    with tempfile.TemporaryDirectory() as folder:
        made = compress(model, stages.parse(STAGE), Path(folder) / "made")
        found, protocol = plan(model, text, SAMPLED, None, None, "none")
        tokens = compared([load(made.path)], model, found[:windows], True)[0]  # float64[tokens, 6] of each window
        about = {"protocol": protocol, "original": model.fingerprint, "model": made.sha256, "stage": STAGE}
    sums = [[len(window), *(round(float(x), 5) for x in window.sum(0))] for window in tokens]
    spread = [float(x) for x in torch.cat(tokens).std(0)]
    return {**about, "draws": DRAWS, "size": SIZE, "token_deviations": spread, "sums": sums}


def covered(sums: torch.Tensor, placed: str, size: int = SIZE, draws: int = DRAWS) -> dict[str, float]:
    """Share of samples of so many windows whose intervals hold the value of all windows, by quantity.

    sums: float64[windows, 7], as for `divergence_of`.
    """
    generator = torch.Generator().manual_seed(0)
    true = divergence_of(sums, "", {}, "", "")._asdict()
    held = dict.fromkeys(QUANTITIES, 0)
    for _ in range(draws):
        if placed == "random windows":
            drawn = torch.randperm(len(sums), generator=generator)[:size]
        else:
            offsets = torch.rand(1 if "grid" in placed else size, generator=generator).expand(size).tolist()
            drawn = torch.tensor([int((i + offset) * len(sums) / size) for i, offset in enumerate(offsets)])
        sample = divergence_of(sums[drawn], f"{size} windows", {}, "", "")._asdict()
        for name in QUANTITIES:
            low, high = sample[name].bounds
            held[name] += low <= true[name].value <= high
    return {name: count / draws for name, count in held.items()}


def covered_by_tokens(record: Row) -> dict[str, float]:
    """The same of random windows, had errors taken tokens as independent: what this project did before."""
    sums = torch.tensor(record["sums"], dtype=torch.float64)
    generator, n = torch.Generator().manual_seed(0), SIZE * (SAMPLED - 1)
    values = (sums[:, 1:4] / sums[:, :1]).T  # KL, top-1, losses: means of windows, of one size each
    names = ("kl", "top1", "perplexity")
    held = dict.fromkeys(names, 0)
    for _ in range(DRAWS):
        drawn = torch.randperm(len(sums), generator=generator)[:SIZE]
        for name, means, deviation in zip(names, values, record["token_deviations"], strict=False):
            held[name] += abs(float(means[drawn].mean() - means.mean())) <= 1.96 * deviation / math.sqrt(n)
    return {name: count / DRAWS for name, count in held.items()}


def report(record: Row) -> str:
    """The table, from the record alone."""
    sums, about = torch.tensor(record["sums"], dtype=torch.float64), record["protocol"]
    columns, before = [covered(sums, placed) for placed in PLACED], covered_by_tokens(record)
    whole, rows = divergence_of(sums, "", {}, "", "")._asdict(), []
    for name in QUANTITIES:
        shares = [*(f"{column[name]:.1%}" for column in columns), f"{before[name]:.1%}" if name in before else "-"]
        rows.append([name.replace("_", " "), f"{whole[name].value:.4g}", *shares])
    sizes = []
    for size in (4, 6, 8, 16):
        sizes.append([str(size), *(f"{share:.1%}" for share in covered(sums, PLACED[-1], size).values())])
    head = f"Quantity | Whole | {' | '.join(map(str.capitalize, PLACED))} | Tokens taken as independent"
    text = f"""
        # Do the 95% intervals hold?

        `{STAGE}` of smollm2-135m beside the original on the first {len(sums)} windows of {about["context"]} of
        {about["text"]}, {about["split"]}, measured whole: {int(sums[:, 0].sum()):,} scored tokens. From these,
        {DRAWS} samples of {SIZE} windows, the default size, are drawn. The table says how many of their intervals
        hold the value of all windows: it should be 95%, and with {DRAWS} draws 92% to 98% is noise.

        {bench.table(head, rows, "lr")}

        An even grid is what agentforge measures. Windows that are spread over the text come nearer to the whole than random
        ones, so that their intervals tend to hold more often: they are rather too wide than too narrow. There are only about
        {len(sums) // SIZE} even grids here, so that their shares move in steps. The last column is of random windows, had
        tokens, which resemble their neighbours, been taken as independent.

        Samples of other sizes, random windows:

        {bench.table("Windows | " + " | ".join(QUANTITIES).replace("_", " "), sizes, "r")}

        Again: `python benchmarks/intervals.py`; `--report` draws from the kept sums.
    """
    return bench.page(text)


def main(arguments: list[str] | None = None) -> None:
    options = bench.options(arguments, __doc__, "reports/coverage", windows=593)
    file = options.out / "coverage.json"
    if not options.report:
        record = json.dumps(measure(options.windows))
        bench.save(options.out, {file.name: record.replace("], [", "],\n[")})
    bench.save(options.out, {"coverage.md": report(bench.read(file))})


if __name__ == "__main__":
    main()
