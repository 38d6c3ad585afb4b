"""A report is executed, rendered and consistent; probes agree with what can be computed another way."""

from __future__ import annotations

import io
import json
import math
import re
import signal
import subprocess
import sys
import threading
import time
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

import agentforge as af
from agentforge import audit
from agentforge.audit import probes
from agentforge.audit.claims import COLOURS
from agentforge.audit.drawing import MARKS, SHAPES, is_own, measured_text, totals, verdict_table
from agentforge.audit.report import _execute, _Progress, render, reports_folder
from agentforge.audit.workshop import EFFORTS
from agentforge.errors import AgentForgeError, BadInput
from reports.phase4_bitnet import project, ternary

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def workshop(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> probes.Workshop:
    return audit.workshop_for(str(tiny_llama), tmp_path_factory.mktemp("artifacts"), "selftext", 255, 128)


@pytest.fixture(scope="module")
def report(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The phase 4 report on a tiny model, made by papermill as `make audit` makes the real one."""
    folder = tmp_path_factory.mktemp("reports")
    return audit.run(
        "phase4_bitnet",
        model=str(tiny_llama),
        text="selftext",
        tokens=127,
        budget="standard",
        out=folder,
        progress=False,
    )


def test_all_four_forms_are_there_and_agree(report: Path) -> None:
    record = json.loads((report / "phase4_bitnet.json").read_text())
    html = (report / "phase4_bitnet.html").read_text()
    markdown = (report / "phase4_bitnet.md").read_text()
    notebook = json.loads((report / "phase4_bitnet.ipynb").read_text())
    assert all(cell.get("execution_count") for cell in notebook["cells"] if cell["cell_type"] == "code")
    for row in record["claims"]:
        # Markdown's marks and escapes are not in the page; the words are.
        words = re.sub(r"[^a-zA-Z0-9 ]", "", row["title"])
        assert words in re.sub(r"[^a-zA-Z0-9 ]", "", re.sub(r"&[a-z]+;", "", html)), row["id"]
        assert row["title"] in unescape(markdown), row["id"]
    assert sum(record["summary"].values()) == len(record["claims"])
    assert html.count('class="mark RED"') >= record["summary"]["refuted"]
    assert not re.search(r'(src|href)="https?:', html)


def test_every_verdict_of_the_record_follows_from_its_measurement(report: Path) -> None:
    record = json.loads((report / "phase4_bitnet.json").read_text())
    for row in record["claims"]:
        assert row["verdict"] != "error", f"{row['id']}: {row['failure']}"
        if row["measured"] is None:
            assert row["colour"] == "GREY"
            assert row["needs"]
            continue
        found = row["measured"]
        spread = 2 * (found["stderr"] or 0)
        low, high = found["interval"] or (found["value"] - spread, found["value"] + spread)
        bounds = [
            [-math.inf if a is None else a, math.inf if b is None else b]
            for a, b in filter(None, row["thresholds"].values())
        ]
        (least, most), wide = bounds[0], (min(a for a, _ in bounds), max(b for _, b in bounds))
        confirmed, refuted = least <= low <= high <= most, high < wide[0] or low > wide[1]
        expected = "confirmed" if confirmed else "refuted" if refuted else "partly"
        if row["about_other"] and (high < least or low > most):
            expected = "does not carry over"
        assert row["verdict"] == expected, row["id"]


def test_the_record_says_what_it_was_made_from(report: Path, tiny_llama: Path) -> None:
    record = json.loads((report / "phase4_bitnet.json").read_text())
    assert record["model"]["fingerprint"] == af.open_model(tiny_llama).fingerprint
    assert record["text"]["scored_tokens"] == 127
    assert record["environment"]["packages"]["torch"] == torch.__version__
    assert {row["stage"] for row in record["stages"]} >= {"rounding:bits=8,group=64", "ternary:rule=absmean"}


def test_a_kernel_whose_port_was_taken_is_started_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fates: list[Exception | None] = [RuntimeError("Kernel died before replying to kernel_info"), None]

    def execute(*args: Any, **options: Any) -> None:
        if fate := fates.pop(0):
            raise fate

    monkeypatch.setattr("papermill.execute_notebook", execute)
    _execute("report", tmp_path, {})
    assert not fates
    for words in ("Kernel died before replying to kernel_info", "Kernel died"):  # twice; while it ran
        fates = [RuntimeError(words)] * 2
        with pytest.raises(RuntimeError, match=words):
            _execute("report", tmp_path, {})
        assert len(fates) == (words == "Kernel died")


def test_a_failing_cell_leaves_the_old_report(report: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in report.iterdir()}
    with pytest.raises(AgentForgeError, match="no-such-model"):
        audit.run("phase4_bitnet", model="no-such-model", text="selftext", tokens=127, out=report.parent, progress=False)
    assert {path.name: path.read_bytes() for path in report.iterdir()} == before
    assert not [path for path in report.parent.iterdir() if path.name.startswith(".")]


def test_render_is_repeatable(report: Path, tmp_path: Path) -> None:
    copy = tmp_path / "again"
    copy.mkdir()
    for name in ("phase4_bitnet.ipynb", "phase4_bitnet.json"):
        (copy / name).write_bytes((report / name).read_bytes())
    render(copy, "phase4_bitnet")
    for path in report.iterdir():
        assert (copy / path.name).read_bytes() == path.read_bytes(), path.name


def test_tables_leave_out_empty_columns_and_escape_bars() -> None:
    row = {
        "id": "a.b",
        "section": "S",
        "title": "|w| small",
        "paper": "",
        "documentation": "",
        "code": "",
        "audit": "GREEN",
        "verdict": "not tested",
        "colour": "GREY",
        "undecided": False,
        "decides_at": None,
        "about_other": "",
        "measures": "",
        "measured": None,
        "failure": "",
        "needs": "more",
        "protocol": "",
        "remark": "",
    }
    table = verdict_table({"claims": [row]}, "S")
    assert "Paper" not in table
    assert "\\|w\\| small" in table
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_totals_count_a_paper_by_its_own_numbers_alone() -> None:
    def row(by: str, verdict: str, about_other: str = "", measures: str = "documented algorithm") -> dict[str, Any]:
        return {"claimed": {"by": by}, "verdict": verdict, "about_other": about_other, "measures": measures}

    rows = [row("paper", "confirmed"), row("paper", "does not carry over", "a model of 70 B"), row("ours", "refuted")]
    rows += [row("audit", "confirmed", measures="agentforge")]
    shown = totals({"claims": rows, "summary": {"confirmed": 2, "refuted": 1, "does not carry over": 1, "error": 0}})
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in shown.splitlines() if line.startswith("|")]
    counts = {line[0]: line[1:] for line in cells}
    assert counts["paper"] == ["1", "1", "0", "0"]
    assert counts["paper, about another model or size"] == ["1", "0", "0", "1"]
    assert counts["ours"] == ["1", "0", "1", "0"]
    assert counts["agentforge"] == ["1", "1", "0", "0"]
    assert [is_own(one) for one in rows] == [True, False, False, True]
    assert len(set(SHAPES.values())) == len(set(MARKS.values())) == len(COLOURS)  # told apart without their colour


def test_measured_text_names_value_error_n_and_threshold() -> None:
    row = {
        "failure": "",
        "measured": {"value": 6.864, "stderr": 0.25, "unit": "x", "n": 1234, "error": "standard error"},
        "about_other": "",
        "thresholds": {"confirmed": [8.0, None], "partly": None},
        "protocol": "P.",
        "remark": "R.",
        "needs": "",
    }
    assert measured_text(row) == "**6.864 ± 0.25 x** (n = 1,234; to confirm: at least 8). P. R."


def test_code_agreement_and_zero_share_against_plain_torch(workshop: probes.Workshop) -> None:
    lm = workshop.model
    same = zeros = total = 0
    for weight in lm.weights():
        w = weight.load().float()
        absmean = (w / w.abs().mean()).round().clamp(-1, 1)
        band = 0.1 * w.abs().mean(1, keepdim=True)
        threshold = torch.where(w.abs() < band, torch.zeros_like(w), w.sign())
        same += int((absmean == threshold).sum())
        zeros += int((threshold == 0).sum())
        total += w.numel()
    stage = "ternary:rule=threshold,tau=0.1"
    assert probes.zero_share(workshop, stage).value == pytest.approx(zeros / total, abs=1e-6)
    agreement = ternary.code_agreement(workshop, stage, "ternary:rule=absmean")
    assert agreement.value == pytest.approx(same / total, abs=1e-5)
    assert agreement.n == total


def test_ratio_and_bits_against_the_files(workshop: probes.Workshop) -> None:
    artifact = workshop.artifact("ternary:rule=absmean")
    size = sum(path.stat().st_size for path in artifact.path.glob("*.safetensors"))
    measured = probes.ratio(workshop, "ternary:rule=absmean", "whole model", 32)
    assert measured.value == pytest.approx(4 * workshop.model.parameters / size)
    count = sum(w.shape[0] * w.shape[1] for w in workshop.model.weights())
    planes = sum(-(-w.shape[0] * w.shape[1] // 5) + 4 for w in workshop.model.weights())
    assert probes.bits_per_weight(workshop, "ternary:rule=absmean").value == pytest.approx(8 * planes / count)
    with pytest.raises(BadInput, match="whole model"):
        probes.run(workshop, "ratio", {"stage": "ternary:rule=absmean", "of": "half of it", "bits": 32})


def test_exact_probes_on_ternary_weights(workshop: probes.Workshop) -> None:
    assert ternary.ternary_values(workshop, "ternary:rule=absmean").value == 1.0
    assert ternary.ternary_values(workshop, "rounding:bits=4,group=64").value < 0.5
    assert 0 < ternary.row_scale_error(workshop, "ternary:rule=threshold,tau=0.1").value < 2**-11
    assert ternary.kept_in_16_bits(workshop, "ternary:rule=absmean").value == 1.0
    assert ternary.perplexity_formula(workshop, tokens=63).value < 1e-5


def test_measuring_runs_each_probe_once_and_says_how_far_it_is(
    workshop: probes.Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    claims = audit.read_claims("phase4_bitnet")
    asked: list[str] = []
    lines: list[str] = []
    run = probes.run

    def count(workshop: probes.Workshop, name: str, parameters: dict[str, object]) -> object:
        asked.append(f"{name} {parameters}")
        return run(workshop, name, parameters)

    monkeypatch.setattr("agentforge.audit.record.run", count)
    record = audit.measure(claims, workshop, say=lambda line, **_: lines.append(line))
    probed = [claim for claim in claims.claims if claim.probe]
    assert len(asked) == len(set(asked)) == len({f"{c.probe} {c.parameters}" for c in probed})
    assert [line for line in lines if line.startswith("[now] ")][:-1] == [
        f"[now] {claim.title}" for claim in sorted(probed, key=lambda claim: claim.probe == "score")
    ]
    assert len(lines) == 2 + 2 * len(probed)
    assert re.match(rf"\[{len(probed)}/{len(probed)}\] ({'|'.join(COLOURS)}): ", lines[-2])
    assert not [line for line in lines if " left)" in line]  # nothing is known of how long anything takes
    assert [row["id"] for row in record["claims"]] == [claim.id for claim in claims.claims]
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["git"].keys() == {"commit", "dirty"}


def test_progress_is_coloured_on_a_terminal_only_and_never_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentforge.audit.report.QUIET", 0.5)
    for terminal in (False, True):
        progress = _Progress()
        progress.console = Console(
            file=io.StringIO(), force_terminal=terminal, color_system="standard" if terminal else "auto", width=200
        )
        ended = threading.Event()
        waiting = threading.Thread(target=progress.wait, args=(ended,))
        for text in ("Executing Cell 2---", "[1/2] refuted: First [bold]: 2 x (about 30 s left)\nnoise\n[now] Second\n"):
            progress.write(text)
        waiting.start()
        time.sleep(2.5)
        ended.set()
        waiting.join()
        first, *later = progress.console.file.getvalue().splitlines()  # type: ignore[attr-defined]
        assert ("\x1b[31mrefuted\x1b[0m" in first) == terminal
        assert re.sub(r"\x1b\[\d*m", "", first) == "[1/2] refuted: First [bold]: 2 x (about 30 s left)"
        assert later
        assert all(re.search(r"\d+ s: Second", line) for line in later)


def test_only_the_full_budget_writes_where_git_looks() -> None:
    tracked = reports_folder("full")
    assert tracked == ROOT / "reports"
    for budget in EFFORTS.keys() - {"full"}:
        folder = reports_folder(budget)
        assert tracked not in (folder, *folder.parents)
        assert subprocess.run(["git", "check-ignore", "-q", str(folder)], cwd=ROOT, check=False).returncode == 0


def test_likelihood_probes_rest_on_one_pass(workshop: probes.Workshop) -> None:
    workshop.compare(["rounding:bits=8,group=64", "rounding:bits=3,group=64"])
    factor = probes.perplexity_factor(workshop, "rounding:bits=8,group=64")
    assert factor.value == pytest.approx(1.0, abs=0.01)
    assert factor.stderr is not None
    eight = probes.top1_agreement(workshop, "rounding:bits=8,group=64").value
    assert eight > probes.top1_agreement(workshop, "rounding:bits=3,group=64").value


def test_the_code_is_as_short_typed_and_documented_as_the_probes_say(workshop: probes.Workshop) -> None:
    assert project.typed_functions(workshop).value == 1.0
    assert project.documented_functions(workshop).value == 1.0
    assert project.short_functions(workshop).value > 0.95
    assert project.short_functions(workshop, lines=1).value < 0.1


@pytest.mark.parametrize(("said", "share"), [("Likelihoods of stages", 0.8), ("Likelihoods of ratios", 1.0)])
def test_readmes_figures_are_read_by_their_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, share: float
) -> None:
    columns = ("Bits per weight", "Touched tensors, to 16 bits", "Whole model, to 16 bits", "Whole model, to its GGUF file")
    (tmp_path / "README.md").write_text(
        f"{said}: 4,088 tokens of wikitext2.\n| Stage | {' | '.join(columns)} | Perplexity | KL (nats per token) |\n"
        "| original | - | - | - | - | 33 | 0 |\n"
        "| ternary:tau=1 | 1.600 | 10.00x | 3.45x | 0.84x | 20.0 ± 1.0 | 9.0 ± 0.1 |\n"
    )
    monkeypatch.setattr(project, "CHECKOUT", tmp_path)
    sizes = {"bits": 1.6, "sha256": "", "touched tensors": 10.0, "whole model": 3.449}
    found = SimpleNamespace(perplexity=SimpleNamespace(value=21.0, stderr=1.0), kl=SimpleNamespace(value=2.0, stderr=1.0))
    shop: Any = SimpleNamespace(
        model=SimpleNamespace(name="smollm2-135m"),
        text=SimpleNamespace(name="wikitext2"),
        tokens=4088,
        used={},
        remember=lambda *_: sizes,
        divergence=lambda _: found,
        exact=lambda value, *_, **__: value,
    )
    assert project.figures_that_come_back(shop) == pytest.approx(share)  # the KL alone is another


def test_unknown_probes_and_parameters_are_refused(workshop: probes.Workshop) -> None:
    with pytest.raises(BadInput, match="choose from"):
        probes.run(workshop, "magic", {})
    with pytest.raises(BadInput, match="ratio"):
        probes.run(workshop, "ratio", {"stage": "ternary", "colour": "red"})


def test_bad_settings_of_a_report_are_refused() -> None:
    with pytest.raises(BadInput, match="tokens=1"):
        audit.run("phase4_bitnet", tokens=1)
    with pytest.raises(BadInput, match="phase4_bitnet"):
        audit.run("no_such_report")


def test_audit_is_a_verb_and_a_room() -> None:
    assert callable(af.audit)
    with pytest.raises(BadInput):
        af.audit("no_such_report")


@pytest.mark.slow
def test_sigterm_ends_the_kernel_too(tmp_path: Path) -> None:
    """Nor does the kernel warn of an unencrypted connection."""
    claim = {"id": "a", "stage": "pipeline", "section": "-", "title": "-", "documentation": "-", "protocol": "-"}
    claim |= {"probe": {"name": "takes_long"}, "confirmed": [0, None]}
    texts = dict.fromkeys(("report", "title", "about", "source"), "mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "claims.yaml").write_text(json.dumps({**texts, "model": "digits-mlp", "claims": [claim]}))
    (tmp_path / "mine" / "probes.py").write_text(
        "import time\nfrom agentforge.audit.probes import probe\n\n@probe()\ndef takes_long(workshop):\n    time.sleep(60)\n"
    )
    command = [sys.executable, "-m", "agentforge", "audit", "--claims", "mine", "--out", "out", "--fresh"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    find = ["pgrep", "-f", "-P", str(process.pid), "ipykernel"]
    while not (found := subprocess.run(find, capture_output=True, text=True, check=False).stdout.split()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    time.sleep(3)  # for the kernel to begin
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    time.sleep(2)
    assert not subprocess.run(["ps", "-p", ",".join(found), "-o", "args="], capture_output=True, check=False).stdout
    assert "TCP" not in process.communicate()[1]
