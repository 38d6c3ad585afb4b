"""The Phase 8 audit is there row by row, and its probes agree with what can be computed another way."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import agentforge as af
from agentforge import audit, stages
from agentforge.artifact import Artifact
from agentforge.audit import PROBES, judge, probes
from agentforge.audit import workshop as shops
from agentforge.chain import Result
from agentforge.digits import data as digits_data
from agentforge.errors import BadInput
from agentforge.evaluation import Measurement
from agentforge.evaluation.likelihood import plan
from agentforge.models import LanguageModel
from agentforge.statistics import Calibration, _windows
from agentforge.training import recover
from reports.phase8_compression import chain
from reports.phase8_compression import stages as compression

LATER = {"score", "coverage", "figures_that_come_back"}  # computed from the other rows, or from files of a test run
CLAIMS = audit.read_claims("phase8_compression").claims
ROUNDING = "rounding:bits=3,group=16"


@pytest.fixture(scope="module")
def workshop(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> probes.Workshop:
    return audit.workshop_for(str(tiny_llama), tmp_path_factory.mktemp("artifacts"), "selftext", 255, 128)


def smoke(workshop: probes.Workshop) -> probes.Workshop:
    return dataclasses.replace(workshop, effort=shops.EFFORTS["smoke"])


def value(workshop: probes.Workshop, name: str, **parameters: Any) -> float:
    return probes.run(workshop, name, parameters).value


# ---- the claims


def test_the_phase_8_audit_is_there_row_by_row() -> None:
    """The audit's tables and lists, by section and number of rows; a section has more where one row became several."""
    rows = {
        "Executive summary": 5,
        "1.1 Compression techniques": 4,
        "1.2 Paper alignment": 3,
        "2 SeedLM": 7,
        "2 VPTQ": 6,
        "2 Hypercompression": 6,
        "2 Compression engine": 7,
        "2 Shares of features": 4,
        "3 Target against actual": 4 + 4,  # the documentation's target, and the audit's own estimate
        "3 Quality retention": 4 + 4,
        "4 Fully implemented": 6,
        "4 Partially implemented": 4,
        "4 Not implemented": 5,
        "5 Immediate": 3,
        "5 Short-term": 3,
        "5 Before production": 4,
        "6 Conclusion": 6,
    }
    for section, count in rows.items():
        assert sum(claim.section == section for claim in CLAIMS) >= count, section
    beside = {claim.section for claim in CLAIMS} - set(rows)
    assert all(section.startswith("Beside the audit") for section in beside)
    assert all(claim.audit for claim in CLAIMS if claim.section in rows)


def test_every_claim_has_a_probe_that_takes_its_parameters_or_a_need(workshop: probes.Workshop) -> None:
    sections, kinds = {claim.section for claim in CLAIMS}, {claim.stage for claim in CLAIMS}
    for claim in CLAIMS:
        if claim.probe in LATER:
            assert set(claim.parameters.get("sections", ())) <= sections - {claim.section}, claim.id
            assert set(claim.parameters.get("stages", ())) <= kinds, claim.id
        elif claim.probe:
            assert claim.probe in PROBES, claim.id
            for key in ("stage", "reference"):
                if key in claim.parameters:
                    stages.parse(claim.parameters[key])
        else:
            assert claim.needs, claim.id


def test_a_claim_that_is_true_to_the_digit_is_confirmed() -> None:
    """Thresholds are the claim's own numbers: whoever claims 20x and has 20x is right."""
    for claim in CLAIMS:
        if claim.claimed is None:
            continue
        stated = claim.claimed["value"]
        for one in stated if isinstance(stated, list) else [stated]:
            verdict = judge(claim, Measurement(one, claim.claimed["unit"], None, 1, {}, environment={})).verdict
            assert verdict == "confirmed", claim.id


def test_rows_of_one_probe_have_one_unit(workshop: probes.Workshop) -> None:
    """The claimed number is in the unit that is measured."""
    units: dict[str, set[str]] = {}
    for claim in CLAIMS:
        if claim.claimed is not None and claim.probe is not None:
            units.setdefault(f"{claim.probe} {claim.parameters}", set()).add(claim.claimed["unit"])
    assert all(len(found) == 1 for found in units.values())
    claimed = {claim.probe: claim.claimed["unit"] for claim in CLAIMS if claim.claimed and claim.probe not in LATER}
    for name, parameters in (
        ("stage_ratio", {"stage": ROUNDING, "of": "whole model", "bits": 32}),
        ("retention", {"stage": ROUNDING, "of": "accuracy"}),
        ("sample_bits", {"stage": ROUNDING, "rows": 2}),
        ("relative_squared_error", {"coder": ROUNDING, "source": "gaussian"}),
        ("table_10_bits", {}),
        ("explained_variance", {"stage": ROUNDING, "data": "weights"}),
        ("filter_gain", {"filter": "low", "signal": "constant"}),
        ("entropy_gain", {"stage": ROUNDING}),
    ):
        assert probes.run(workshop, name, parameters).unit == claimed[name], name


# ---- SeedLM


def test_registers_and_blocks(workshop: probes.Workshop) -> None:
    found = probes.run(workshop, "lfsr_conformance", {})
    assert (found.value, found.n) == (1.0, 3 + 2 * 19)
    assert compression._register(3, 4, 7) == [2, 5, 6, 7, 3, 1, 4]
    for name in ("bases_from_seeds", "decoded_by_seed", "block_independence"):
        assert value(workshop, name) == 1.0, name


def test_the_search_is_held_against_every_seed(workshop: probes.Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    assert value(workshop, "seed_search_excess", K=8, C=8, P=3) == pytest.approx(0.0, abs=1e-9)
    search = stages.seedlm._searcher

    def half(*args: Any) -> Any:
        """Blocks of even number get the code of the block before, as after a search that stopped early."""
        found = search(*args)

        def searched(blocks: Any, h: Any) -> Any:
            seeds, codes = found(blocks, h)
            seeds[1::2] = seeds[:-1:2]
            return seeds, codes

        return searched

    monkeypatch.setattr(stages.seedlm, "_searcher", half)
    assert value(workshop, "seed_search_excess", K=8, C=8, P=3) > 0.1


# ---- VPTQ


def test_codebooks(workshop: probes.Workshop) -> None:
    assert 0.97 < value(workshop, "kmeans_excess", k=8) < 1.05
    assert value(workshop, "nearest_centroids") == 1.0
    for stage in ("vptq:v=4,k=16,norm=std", "vptq:v=6,k=16,residual=8", "vptq:v=4,k=16,parts=2"):
        assert value(workshop, "decoded_by_hand", stage=stage) == 1.0, stage


def test_bits_of_table_10_agree_with_the_papers_formula(workshop: probes.Workshop) -> None:
    by_formula = [
        abs(stages.vptq.paper_bits(compression.LLAMA_2_13B, v, k, r, share, groups=g) - bits)
        for share, v, k, r, g, bits in compression.TABLE_10
    ]
    assert value(workshop, "table_10_bits") == pytest.approx(max(by_formula), abs=0.005)


def test_errors_of_two_stages(workshop: probes.Workshop) -> None:
    """A step 7/15 as wide loses (7/15)^2 as much, about."""
    found = value(workshop, "error_ratio", stage="rounding:bits=4,group=64", reference="rounding:bits=3,group=64")
    assert found == pytest.approx((7 / 15) ** 2, rel=0.1)


def test_output_errors_against_the_inputs_themselves(workshop: probes.Workshop) -> None:
    """tr((W - Q) H (W - Q)^T) is |(W - Q) x|^2, averaged over the tokens that H was taken of."""
    (weight,) = workshop.sample()
    module = workshop.model.model
    seen: list[torch.Tensor] = []
    layer = dict(module.named_modules())[weight.name.rpartition(".")[0]]
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, args[0].shape[-1]).double()))
    with torch.no_grad():
        for window in _windows(workshop.model, Calibration(tokens=512, context=128)):
            module(window)
    hook.remove()
    x, w = torch.cat(seen), weight.load().float()[:64]
    pair = ("rounding:bits=4,group=16", ROUNDING)
    lost = [(x @ (w - stages.parse(s).decode(stages.parse(s).encode(w))).double().T).square().sum() for s in pair]
    found = value(workshop, "output_error_ratio", stage=pair[0], reference=pair[1])
    assert found == pytest.approx(float(lost[0] / lost[1]), rel=1e-4)


# ---- hypercompression


def test_curves(workshop: probes.Workshop) -> None:
    assert value(workshop, "curve_fit", data="smooth") < 0.001
    assert value(workshop, "curve_fit", data="weights") < 0.002
    assert value(workshop, "curves_by_hand") < 1e-6
    assert value(workshop, "chosen_curves") <= 1.0
    with pytest.raises(BadInput, match="'smooth' or 'weights'"):
        value(workshop, "curve_fit", data="noise")


def test_explained_variance_of_what_has_no_order(workshop: probes.Workshop) -> None:
    """A curve of degree d keeps d + 1 of a segment's dimensions; a constant for all weights explains nothing."""
    found = value(workshop, "explained_variance", stage="curves:degree=7,segment=26", data="weights")
    assert found == pytest.approx(8 / 26, abs=0.03)
    constant = "curves:kind=polynomial,degree=0,segments=1"
    assert value(workshop, "explained_variance", stage=constant, data="weights") == pytest.approx(0.0, abs=1e-3)
    assert value(workshop, "explained_variance", stage="curves:degree=7,segment=64", data="smooth") > 0.999


def test_trajectories(workshop: probes.Workshop) -> None:
    entries = compression._trajectory_entries(4, 2.0, torch.tensor([5.0, 7.0]).numpy())
    assert entries.tolist() == [[5, 7], [4, 6], [4.5, 7], [5, 6], [5.5, 7]]  # N = 2: theta / 2 and theta mod 2
    assert value(workshop, "trajectory_points") < 1e-6
    assert abs(value(workshop, "trajectory_excess")) < 1e-9


def test_entropy_coding_against_the_entropy(workshop: probes.Workshop) -> None:
    (w,) = (weight.load().float()[:64] for weight in workshop.sample())
    packed = stages.parse("rounding:bits=3,group=64").encode(w)
    counts = torch.bincount(packed["codes"].long().reshape(-1)).double()
    least = float(-(counts / counts.sum() * (counts / counts.sum()).log2()).sum())
    gain = value(workshop, "entropy_gain", stage="rounding:bits=3,group=64")
    assert 1.0 < gain < 3 / least
    assert value(workshop, "entropy_lossless", stage="rounding:bits=3,group=64") == 1.0


# ---- whole models


def test_bits_and_round_trips(workshop: probes.Workshop) -> None:
    assert value(workshop, "sample_bits", stage="seedlm:K=8,C=8,P=3", rows=2) == 8 * (32 * 3 + 1) / 256
    for stage in ("seedlm:K=8,C=8,P=3", "vptq:v=4,k=16", "curves", "trajectory"):
        assert value(workshop, "round_trips", stage=stage) == 1.0, stage
    assert value(workshop, "bytes_counted") == 0.0


def test_ratios_of_the_model_in_smoke_effort_of_digits(workshop: probes.Workshop) -> None:
    for at, model in ((workshop, workshop.model), (smoke(workshop), af.open_model("digits-mlp"))):
        found = probes.run(at, "stage_ratio", {"stage": ROUNDING, "of": "whole model", "bits": 32})
        folder = at.folder / f"{model.name}-rounding_bits_3_group_16_symmetric_False_clip_none"
        assert found.value == pytest.approx(4 * model.parameters / (folder / "model.safetensors").stat().st_size)
        assert value(at, "kept_share", stage=ROUNDING) == 1.0


def test_retention_against_argmax_by_hand(workshop: probes.Workshop) -> None:
    model, compressed = workshop.model, af.load(workshop.artifact(ROUNDING).path)
    hits, losses = [0.0, 0.0], [0.0, 0.0]
    scored = 0
    for window in plan(model, workshop.text, workshop.context, None, workshop.tokens, "none")[0]:
        batch = torch.tensor([window.ids])
        scored += len(window.ids) - 1
        for i, one in enumerate((model, compressed)):
            with torch.no_grad():
                logits = one.model(input_ids=batch).logits[0, :-1].double()
            targets = batch[0, 1:]
            hits[i] += float((logits.argmax(1) == targets).sum())
            losses[i] += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
    assert scored == workshop.tokens
    if hits[0]:
        assert value(workshop, "retention", stage=ROUNDING, of="accuracy") == pytest.approx(hits[1] / hits[0])
    expected = math.exp((losses[0] - losses[1]) / scored)
    assert value(workshop, "retention", stage=ROUNDING, of="perplexity") == pytest.approx(expected, rel=1e-4)
    with pytest.raises(BadInput, match="'accuracy' or 'perplexity'"):
        value(workshop, "retention", stage=ROUNDING, of="both")


def test_retention_in_smoke_effort(workshop: probes.Workshop, digits: LanguageModel) -> None:
    small = smoke(workshop)
    _, _, pixels, labels = digits_data()
    stage = "rounding:bits=2,group=0"
    found = {of: probes.run(small, "retention", {"stage": stage, "of": of}) for of in ("accuracy", "perplexity")}
    compressed = af.load(af.compress(digits, stage, small.folder / "by-hand", progress=False).path)
    logits = [model.model(pixels).detach().double() for model in (digits, compressed)]
    hits = [float((one.argmax(1) == labels).sum()) for one in logits]
    losses = [float(torch.nn.functional.cross_entropy(one, labels)) for one in logits]
    assert found["accuracy"].value == pytest.approx(hits[1] / hits[0])
    assert found["perplexity"].value == pytest.approx(math.exp(losses[0] - losses[1]))
    assert found["accuracy"].n == found["perplexity"].n == 450
    assert found["accuracy"].protocol["model"] == "digits-mlp"


# ---- the chain


def test_the_documented_chain_and_its_journal(workshop: probes.Workshop) -> None:
    assert value(workshop, "documented_chain", chain="to the end", quantity="steps") == 3
    rows = json.loads((workshop.folder / "chain-documented_digits_go_on/journal.json").read_text())["attempts"]
    last = rows[-1]["measured"]
    for quantity in ("ratio", "touched_ratio", "total_retention"):
        found = probes.run(workshop, "documented_chain", {"chain": "to the end", "quantity": quantity})
        assert found.value == last[quantity]["value"] and found.stderr == last[quantity]["stderr"]
    artifact = Artifact(workshop.folder / "chain-documented_digits_go_on/artifact")
    assert value(workshop, "documented_chain", chain="to the end", quantity="ratio") == artifact.ratio_to(32)
    assert value(workshop, "steps_build_on_each_other") == 1.0
    with pytest.raises(BadInput, match="'gated' or 'to the end'"):
        value(workshop, "documented_chain", chain="half way", quantity="steps")


def test_the_gated_chain_and_what_it_logs(workshop: probes.Workshop) -> None:
    kept = value(workshop, "documented_chain", chain="gated", quantity="total_retention")
    artifact = af.load(workshop.folder / "chain-documented_digits/artifact")
    original = af.open_model("digits-mlp")
    assert kept == pytest.approx(af.accuracy(artifact).value / af.accuracy(original).value)
    found = probes.run(workshop, "chain_metrics", {})
    lines = (workshop.folder / "tracked-chain/metrics.jsonl").read_text().splitlines()
    names = {name for line in lines for name in json.loads(line)}
    assert 25 <= found.value <= len(names) and found.n == 18 + 3 * 7
    assert {"seedlm/compression_ratio", "compression/hyper_ratio", "compression/total_ratio"} <= names


def test_nothing_accepted_is_the_original(
    workshop: probes.Workshop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Rollback ends there: 1x, and all of the quality."""
    nothing = Result(None, [{"decision": "rejected", "setting": {"stage": ROUNDING}}], False)
    monkeypatch.setattr(chain, "run_chain", lambda *_, **__: nothing)
    assert value(workshop, "documented_chain", chain="to the end", quantity="touched_ratio") == 1.0
    assert value(workshop, "documented_chain", chain="gated", quantity="total_retention") == 1.0
    assert value(workshop, "documented_chain", chain="to the end", quantity="steps") == 0


@pytest.mark.parametrize(
    ("name", "n"),
    [
        ("faults_judged_rightly", 13),
        ("chain_resumes", 3),
        ("extremes_handled", 35),
        ("damaged_artifacts_refused", 36),
    ],
)
def test_nothing_is_judged_wrongly(workshop: probes.Workshop, name: str, n: int) -> None:
    """That these probes see what is wrong is in test_mutations.py."""
    found = probes.run(workshop, name, {})
    assert (found.value, found.n) == (1.0, n)


def test_gates_meet_settings_on_both_sides(workshop: probes.Workshop) -> None:
    found = probes.run(workshop, "gates_that_are_right", {})
    kept = found.protocol["retention"].values()
    assert (found.value, found.n) == (1.0, 17)
    assert sum(share > 0.98 for share in kept) >= 3 and sum(share < 0.9 for share in kept) >= 3


# ---- Grokfast


def test_training_codebooks(workshop: probes.Workshop, digits: LanguageModel) -> None:
    optimizer = recover.MuGrokfast
    gain = probes.run(smoke(workshop), "codebook_gain_of_filter", {"steps": 4})
    _, _, pixels, _ = digits_data()
    ratios = []
    for seed in range(2):
        made = [digits, *(af.load(workshop.folder / f"codebooks-{filtered}-4-{seed}") for filtered in (True, False))]
        p, a, b = (model.model(pixels).detach().softmax(1).double() for model in made)
        on, off = (float((p * (p / q).log()).sum(1).mean()) for q in (a, b))
        ratios.append(on / off)
    assert gain.value == pytest.approx(sum(ratios) / 2, abs=1e-3)
    assert gain.n == 2 and gain.value != 1.0
    assert recover.MuGrokfast is optimizer
    assert torch.equal(chain._kl(digits), torch.zeros(450, dtype=torch.float64))
