"""VPTQ on the real model: how much each idea lowers the output's error, with margins, and three bits against rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import agentforge as af
from agentforge import stages
from agentforge.evaluation import Text
from agentforge.models import LanguageModel, Weight
from agentforge.statistics import Calibration, InputStatistics, collect

pytestmark = pytest.mark.slow
LAYERS = ("model.layers.3.self_attn.q_proj.weight", "model.layers.10.self_attn.o_proj.weight")


@pytest.fixture(scope="module")
def statistics(smollm2: LanguageModel) -> dict[str, InputStatistics]:
    return collect(smollm2, Calibration(tokens=2048), progress=False)


@pytest.fixture(scope="module")
def weights(smollm2: LanguageModel) -> dict[str, Weight]:
    return {weight.name: weight for weight in smollm2.weights()}


def lost(settings: str, weights: dict[str, Weight], statistics: dict[str, InputStatistics]) -> float:
    """Share of the outputs' energy that is lost, tr(E H E^T) / tr(W H W^T), both layers together."""
    stage = stages.parse(f"vptq:{settings}")
    error = energy = 0.0
    for name in LAYERS:
        dense, stats = weights[name].load().float(), statistics[name]
        gap = (dense - stage.decode(stage.encode(dense, stats))).double()
        h = stats.hessian.double()
        error += float(((gap @ h) * gap).sum())
        energy += float(((dense.double() @ h) * dense.double()).sum())
    return error / energy


def test_each_idea_pays_on_real_layers(weights: dict[str, Weight], statistics: dict[str, InputStatistics]) -> None:
    base = "v=4,k=256"
    plain = lost(f"{base},refine=0,weighted=false,propagate=false", weights, statistics)
    weighted = lost(f"{base},refine=0,propagate=false", weights, statistics)
    propagated = lost(f"{base},refine=0", weights, statistics)
    refined = lost(base, weights, statistics)
    outliers = [lost(f"{base},outliers={s},outlier_v=2,outlier_k=256", weights, statistics) for s in (0.01, 0.02, 0.05)]
    print(f"plain {plain:.4f} weighted {weighted:.4f} propagated {propagated:.4f} refined {refined:.4f} outliers {outliers}")
    assert weighted < 0.95 * plain
    assert propagated < 0.6 * weighted
    assert refined < 0.98 * propagated
    assert outliers[0] < refined
    assert outliers[0] > outliers[1] > outliers[2]


def test_two_runs_give_the_same_bytes(weights: dict[str, Weight], statistics: dict[str, InputStatistics]) -> None:
    stage, name = stages.parse("vptq:v=4,k=256,norm=std,outliers=0.01,outlier_v=2"), LAYERS[0]
    threads = torch.get_num_threads()
    found = set()
    for count in (1, 2):
        torch.set_num_threads(count)
        found.add(stage.encode(weights[name].load(), statistics[name]).sha256)
    torch.set_num_threads(threads)
    assert len(found) == 1


def test_three_bits_beat_rounding(
    smollm2: LanguageModel, wikitext2: Text, statistics: dict[str, InputStatistics], tmp_path: Path
) -> None:
    """VPTQ with fewer bits per weight than rounding to three bits in groups of 64, clipped for least squared error."""
    found = {}
    for spec in ("vptq:bits=3,shared=true,norm=std,outliers=0.01,outlier_v=2,refine=1", "rounding:bits=3,group=64,clip=mse"):
        out = tmp_path / spec[:4]
        artifact = af.compress(
            smollm2, spec, out, calibration=Calibration(tokens=2048), statistics=statistics, progress=False
        )
        planes = (
            sum(row["bytes"] for row in artifact.rows if row["stage"])
            + (artifact.manifest["shared"] or {"bytes": 0})["bytes"]
        )
        result = af.divergence(af.load(out), smollm2, text=wikitext2, context=1024, tokens=1023, progress=False)
        found[spec[:4]] = planes, result.kl
        print(spec, planes, result.kl)
    (ours, kl), (theirs, other) = found["vptq"], found["roun"]
    assert ours < 0.95 * theirs
    assert kl.value + 3 * (kl.stderr or 0) < 0.6 * other.value
