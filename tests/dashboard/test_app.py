"""The page, drawn by Streamlit without a browser; and, slow, in a real one."""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from agentforge import cli
from agentforge.audit.report import reports_folder
from agentforge.chain import run_chain
from agentforge.dashboard import runs, server
from agentforge.evaluation import Measurement
from agentforge.models import LanguageModel

pytest.importorskip("streamlit")
from streamlit.dataframe_util import convert_arrow_bytes_to_pandas_df
from streamlit.testing.v1 import AppTest

APP = Path(server.__file__).with_name("app.py")
CHAIN = """name: digits
steps:
  - {name: "*fine* <b>", try: ["rounding:bits=8,group=32"]}
  - {name: coarse, try: ["ternary:rule=threshold,tau=2.5"]}
  - {name: never, try: ["| entropy"]}
gates: ["retention >= 0.9"]
"""
EVIL = "![x](http://evil/x.png) <script>alert(1)</script> :red[a] $x$ `b`"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, digits: LanguageModel) -> Path:
    """A workspace with one run that stopped at its second step's gate."""
    workspace = runs.open_workspace(tmp_path_factory.mktemp("dashboard"))
    (workspace / "own.yaml").write_text(CHAIN, encoding="utf-8")
    folder = workspace / "one"
    folder.mkdir()
    shutil.copy(workspace / "own.yaml", folder / "chain.yaml")
    run_chain(digits, folder / "chain.yaml", folder / "out", progress=False)
    record = {"model": "digits-mlp", "chain": "own.yaml (workspace)", "began": [1.0], "pid": None, "asked": None}
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "result.json").write_text('{"finished": false}')
    (folder / "log.txt").write_text("first\n<b>last</b>\n")
    return workspace


Draw = Callable[..., Any]


@pytest.fixture
def draw(monkeypatch: pytest.MonkeyPatch) -> Draw:
    # Streamlit makes the page `__main__`, which a process that a later test spawns would run again.
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])

    def page(workspace: Path, view: str = "Run") -> Any:
        monkeypatch.setenv(server.WORKSPACE, str(workspace))
        found = AppTest.from_file(str(APP), default_timeout=60).run()
        if view != "Run":
            found.radio(key="view").set_value(view).run()
        assert not found.exception
        return found

    return page


def text(page: Any) -> str:
    """What is said in Markdown, its escapes taken away."""
    said = [*page.markdown, *page.caption, *page.error, *page.info]
    return re.sub(r"\\(.)", r"\1", "\n".join(element.value for element in said))


def test_an_empty_workspace_offers_a_run(tmp_path: Path, draw: Draw) -> None:
    page = draw(tmp_path)
    assert page.selectbox(key="model").options[:2] == ["smollm2-135m", "digits-mlp"]
    assert "documented.yaml" in page.selectbox(key="chain").options
    assert "retention >= 0.98" in text(page)  # of the first chain, before it is started
    page.text_input(key="name").input("../x")
    page.button(key="start").click().run()
    assert "run name '../x': expected at most 64" in text(page) and "../x" not in os.listdir(tmp_path)
    assert runs.names(tmp_path) == []


def test_the_page_is_what_the_journal_has(made: Path, draw: Draw) -> None:
    page = draw(made)
    fine, coarse = json.loads((made / "one/out/journal.json").read_text())["attempts"]
    said, table = text(page), page.dataframe[0].value
    assert "stopped" in said and "not reached" in said and "rolled back" in said
    for row, decision in ((fine, "passed"), (coarse, "failed")):
        kept = row["measured"]["retention"]
        value = f"{kept['value']:.4g} ± {kept['stderr']:.2g}"
        assert re.search(rf"retention >= 0\.9: measured {re.escape(value)} share, :\w+\[\*\*{decision}\*\*\]", said)
    assert list(table["bytes"]) == [f"{row['measured']['bytes']['value']:,}" for row in (fine, coarse)]
    assert list(table["decision"]) == ["accepted", "rejected"]
    assert "KL, nats/token" not in table  # a classifier has none
    assert page.code[0].value == "first\n<b>last</b>"
    (chart,) = page.get("vega_lite_chart")
    spec = json.loads(chart.proto.spec)
    points = convert_arrow_bytes_to_pandas_df(chart.proto.datasets[0].data.data)
    assert list(points["bytes"])[1] == fine["measured"]["bytes"]["value"]
    assert "log scale" in spec["encoding"]["y"]["title"] and "tensors finished" in spec["encoding"]["x"]["title"]


def test_names_from_files_are_text(made: Path, draw: Draw, tmp_path: Path) -> None:
    """No picture is fetched, no HTML and no directive comes from a step's name or a reason."""
    workspace = runs.open_workspace(tmp_path / "workspace")
    shutil.copytree(made / "one", workspace / "one")
    path = workspace / "one/out/journal.json"
    found = json.loads(path.read_text())
    found["attempts"][0] |= {"name": EVIL, "decision": "rejected", "reason": EVIL, "gates": {}, "setting": {"stage": EVIL}}
    path.write_text(json.dumps(found))
    page = draw(workspace)
    assert "**1. \\*fine\\* \\<b\\>**" in page.markdown[4].value or any("\\*fine\\*" in m.value for m in page.markdown)
    assert page.dataframe[0].value["try"][0].startswith(EVIL)  # whose cells are text, whatever they hold
    for value in (m.value for m in page.markdown):
        bare = re.sub(r"\\.", "", value)
        assert not re.search(r"!\[|<script|\$|`|:red\[a", bare), value
    assert sum(EVIL in re.sub(r"\\(.)", r"\1", m.value) for m in page.markdown) == 2


def test_controls_are_those_that_can_be_used(made: Path, draw: Draw) -> None:
    page = draw(made)
    assert all(page.button(key=key).disabled for key in ("pause", "resume", "abort"))
    (made / "one/result.json").rename(made / "one/result")
    try:
        page = draw(made)
        assert not page.button(key="resume").disabled and page.button(key="abort").disabled
        page.checkbox(key="sure-one").check().run()
        page.button(key="abort").click().run()
        assert "aborted" in text(page) and page.button(key="resume").disabled
    finally:
        (made / "one/result").rename(made / "one/result.json")


def test_a_run_that_cannot_be_read_is_a_sentence(made: Path, draw: Draw, tmp_path: Path) -> None:
    workspace = runs.open_workspace(tmp_path / "workspace")
    shutil.copytree(made / "one", workspace / "one")
    (workspace / "one/out/journal.json").write_text("{")
    assert "no valid JSON" in text(draw(workspace))
    assert "no valid JSON" in text(draw(workspace, "Compare"))


def test_progress_and_what_is_measured_so_far(made: Path, draw: Draw, tmp_path: Path) -> None:
    workspace = runs.open_workspace(tmp_path / "workspace")
    shutil.copytree(made / "one", workspace / "one")
    (workspace / "one/result.json").unlink()
    path = workspace / "one/out/journal.json"
    found = json.loads(path.read_text())
    coarse = found["attempts"].pop()
    kept = ("step", "name", "attempt", "setting", "measured")
    now = {key: coarse[key] for key in kept} | {"gates": {"retention >= 0.9": "undecided"}, "tokens": 4088}
    path.write_text(json.dumps({**found, "now": {**now, "doing": "measuring", "since": 1.0}}))
    page = draw(workspace)
    assert "was measuring when its process ended** on 4,088 tokens" in text(page)
    assert "6 of 6 tensors finished" in page.get("progress")[0].proto.text
    assert list(page.dataframe[0].value["decision"]) == ["accepted", "undecided so far"]
    assert ":orange[**undecided**]" in text(page)


def test_runs_are_compared(made: Path, draw: Draw) -> None:
    page = draw(made, "Compare")
    (row,) = page.dataframe[0].value.to_dict("records")
    fine = json.loads((made / "one/out/journal.json").read_text())["attempts"][0]
    assert (row["run"], row["state"], row["steps accepted"]) == ("one", "stopped", "1 of 3")
    assert row["bytes"] == f"{fine['measured']['bytes']['value']:,}"
    assert "450 held out" in text(page) and "2 tries; most of the accuracy is kept by one, *fine* <b>, try 1" in text(page)


def test_the_frontier_says_what_its_points_do(made: Path, draw: Draw) -> None:
    page = draw(made, "Frontier")
    names = page.selectbox(key="original").options
    # Trained on another processor than the reports', it rounds otherwise, and is another original.
    digits = [name for name in names if name == "digits-mlp" or name.startswith("digits-mlp (")]
    assert digits and "smollm2-135m" in names
    said, whats = "", []
    for name in digits:
        page.selectbox(key="original").select_index(names.index(name)).run()
        assert page.radio(key="quality").options == ["share of the accuracy kept"]  # a classifier's
        said += text(page)
        whats += list(page.dataframe[0].value["what"])
    assert "The fewest bits that keep 84% of the accuracy by the whole 95% interval: vptq:v=6,k=8" in said
    assert "one: rounding:bits=8,group=32" in whats
    page.selectbox(key="original").select_index(names.index("smollm2-135m")).run()
    page.radio(key="quality").set_value("kl").run()
    rows = json.loads((reports_folder() / "fit" / "fit.json").read_text())
    kl = next(row["kl"] for row in rows if row["recipe"]["bits"] == 2.6)
    low, high = Measurement(**kl).bounds
    lowest = f"{kl['value']:.3g} ({low:.3g} to {high:.3g}) (fit to 2.6 bits"
    assert f"At 3 bits per weight or fewer the lowest KL is {lowest}" in text(page)


def test_reports_can_run_nothing(made: Path, draw: Draw) -> None:
    folder = made / "reports" / "evil"
    folder.mkdir(parents=True)
    (folder / "evil.html").write_text('<script>alert(1)</script>"><img src=http://evil/x>')
    (made / "reports" / "linked").mkdir()
    (made / "reports" / "linked" / "linked.html").symlink_to("/etc/hostname")
    page = draw(made, "Reports")
    report = page.selectbox(key="report")
    assert "linked (workspace)" not in report.options
    report.select("evil (workspace)").run()
    (frame,) = page.get("iframe")
    assert 'sandbox=""' in frame.proto.srcdoc and "default-src 'none'" in frame.proto.srcdoc
    assert "<script" not in frame.proto.srcdoc and "&lt;script&gt;" in frame.proto.srcdoc
    page.selectbox(key="report").select("phase8_compression").run()
    assert "Phase 8" in page.get("iframe")[0].proto.srcdoc
    page.selectbox(key="report").select("fit").run()
    assert "What a budget of bits buys" in text(page) and "](" not in text(page)


def test_the_command_refuses_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    for arguments, says in (
        (["--workspace", str(tmp_path / "file")], "cannot be a workspace"),
        (["--port", "1"] if os.geteuid() else ["--port", "0"], "port"),
    ):
        monkeypatch.setattr(sys, "argv", ["agentforge", "dashboard", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 2 and says in capsys.readouterr().err.lower()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["agentforge", "dashboard", "--workspace", str(tmp_path / "new")])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2 and "install agentforge[dashboard]" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.fixture(scope="module")
def driving() -> ModuleType:
    file = Path(__file__).parents[2] / "tools" / "drive_dashboard.py"
    spec = importlib.util.spec_from_file_location("drive_dashboard", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_name_that_is_not_this_machine_s_is_refused(driving: ModuleType, tmp_path: Path) -> None:
    """A page whose own name leads to 127.0.0.1 (DNS rebinding) gets neither the page nor its connection."""
    with driving.served(tmp_path) as (address, process):
        port = int(address.rpartition(":")[2])

        def status(host: str, path: str, connecting: bool) -> int:
            headers = {"Host": host, "Origin": f"http://{host}"}
            if connecting:
                headers |= {"Connection": "Upgrade", "Upgrade": "websocket"}
                headers |= {"Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA=="}
            server = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
            server.request("GET", path, headers=headers)
            return server.getresponse().status

        for host in (f"127.0.0.1:{port}", f"localhost:{port}"):
            assert status(host, "/", False) == 200
            assert status(host, "/_stcore/stream", True) == 101
        for host in (f"attacker.example:{port}", "127.0.0.1.attacker.example", "x@127.0.0.1", "[::1", "0.0.0.0", ""):
            for path, connecting in (("/", False), ("/_stcore/health", False), ("/_stcore/stream", True)):
                assert status(host, path, connecting) == 400, (host, path)
    assert process.returncode == 0


@pytest.mark.slow
def test_a_browser_compresses_digits_by_the_keyboard(driving: ModuleType, tmp_path: Path) -> None:
    """In Chromium: the whole compression, the figures on the page held against the journal; and no address but loopback."""
    pytest.importorskip("selenium")
    if driving.CHROMIUM is None or driving.DRIVER is None:
        pytest.skip("chromium and chromedriver are not installed")
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    (workspace / "digits.yaml").write_text(driving.CHAIN, encoding="utf-8")
    with driving.served(workspace) as (address, process), driving.browser(tmp_path) as driver:
        page = driving.Page(driver, address)
        driving.compress_digits(page, workspace)
        listening = subprocess.run(["cat", f"/proc/{process.pid}/net/tcp"], capture_output=True, text=True).stdout
        port = f":{int(address.rpartition(':')[2]):04X} 00000000:0000"
        assert [line.split()[1] for line in listening.splitlines() if port in line] == [f"0100007F{port[:5]}"]
    assert process.returncode == 0 and "the dashboard has ended; no run goes on" in process.stdout.read()


@pytest.mark.slow
def test_runs_go_on_when_the_dashboard_ends(driving: ModuleType, tmp_path: Path, draw: Draw) -> None:
    workspace = runs.open_workspace(tmp_path)
    (workspace / "digits.yaml").write_text(driving.CHAIN, encoding="utf-8")
    with driving.served(workspace) as (_, process):
        runs.start(workspace, "one", "digits-mlp", "digits.yaml (workspace)")
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        assert process.stdout is not None and "going on: one" in process.stdout.read()
    driving.until(lambda: not runs.active(workspace), "it ends")
    assert "every step was accepted" in text(draw(workspace))
