"""Probes of the dashboard: its page, drawn by Streamlit without a browser, over runs of digits-mlp.

What it shows is checked against the journals on disk, and what its buttons do against the runs."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from agentforge.artifact import Artifact
from agentforge.audit.probes import probe, share
from agentforge.audit.workshop import PACKAGE, Unmeasured, Workshop
from agentforge.chain import run_chain
from agentforge.dashboard import runs, server
from agentforge.errors import AgentForgeError
from agentforge.evaluation import Measurement

CHAIN = """name: digits
steps:
  - {name: fine, try: ["rounding:bits=8,group=32"]}
  - {name: coarse, try: ["ternary:rule=threshold,tau=2.5", "rounding:bits=4,group=32"]}
  - {name: lossless, try: ["| entropy"]}
gates: ["retention >= 0.9"]
"""
PATIENCE = 120.0  # seconds until a run that does not come to its end is given up


def _workspace(workshop: Workshop, name: str) -> Path:
    """An empty workspace with one chain."""
    if importlib.util.find_spec("streamlit") is None:
        raise Unmeasured("the package streamlit: install agentforge[dashboard]")
    shutil.rmtree(workshop.folder / name, ignore_errors=True)
    workspace = runs.open_workspace(workshop.folder / name)
    (workspace / "digits.yaml").write_text(CHAIN, encoding="utf-8")
    return workspace


@contextlib.contextmanager
def _shown(workspace: Path) -> Iterator[None]:
    """While a page is drawn.  Streamlit makes it `__main__`, which a process that is spawned later would run again."""
    main = sys.modules["__main__"]
    with mock.patch.dict(os.environ, {server.WORKSPACE: str(workspace)}):
        try:
            yield
        finally:
            sys.modules["__main__"] = main


def _page(workspace: Path) -> Any:
    from streamlit.testing.v1 import AppTest

    with _shown(workspace):
        return AppTest.from_file(str(PACKAGE / "dashboard" / "app.py"), default_timeout=PATIENCE).run()


def _again(page: Any, workspace: Path) -> Any:
    with _shown(workspace):
        return page.run()


def _until(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + PATIENCE
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def _text(page: Any) -> str:
    """What Markdown on the page says, without its signs."""
    return re.sub(r"\\(.)", r"\1", "\n".join(element.value for element in page.markdown)).replace("**", "")


@probe("share of facts")
def dashboard_facts(workshop: Workshop) -> Measurement:
    """Share of the facts of a run that the page shows as the journal on disk has them: of every try its step, decision, gate
    with its measured value, bytes, ratio, accuracy and accuracy kept, with standard errors."""
    workspace = _workspace(workshop, "dashboard-facts")
    runs.start(workspace, "one", "digits-mlp", "digits.yaml (workspace)")
    _until(lambda: not runs.active(workspace))
    page = _page(workspace)
    text, table = _text(page), page.dataframe[0].value.to_dict("records") if page.dataframe else []
    rows = json.loads((workspace / "one" / "out" / "journal.json").read_text(encoding="utf-8"))["attempts"]
    right = [len(table) == len(rows)]
    for row, shown in zip(rows, table, strict=False):
        measured = row["measured"]

        def value(name: str, measured: dict[str, Any] = measured) -> str:
            return f"{measured[name]['value']:.4g} ± {measured[name]['stderr']:.2g}"

        ratio = "{value:.4g}x, to {protocol[bits]} bits per parameter".format(**measured["ratio"])
        tried = f"Try {row['attempt']}, {row['setting']['stage']}: {row['decision']}"
        ((gate, decision),) = row["gates"].items()
        right += [
            shown["try"] == f"{row['name']}, {row['attempt']}",
            shown["decision"] == row["decision"],
            shown["bytes"] == f"{measured['bytes']['value']:,}",
            shown["ratio, whole model"] == ratio,
            shown["accuracy"] == value("accuracy"),
            shown["accuracy kept, share"] == value("total_retention"),
            tried in text,
            re.search(re.escape(f"{gate}: measured {value('retention')} share, ") + rf":\w+\[{decision}\]", text)
            is not None,
        ]
    return share(workshop, right, "facts", "facts on the page against the journal", model="digits-mlp")


@probe("share of actions")
def dashboard_controls(workshop: Workshop) -> Measurement:
    """Share of actions on the page that do what they say: start; start twice, refused; pause; resume, to the bytes of a run
    that nobody paused; abort, with nothing half-written left; names that lead out of the workspace, refused."""
    workspace = _workspace(workshop, "dashboard-controls")
    page = _page(workspace)

    def start(name: str) -> Any:
        page.text_input(key="name").input(name)
        page.selectbox(key="model").select("digits-mlp")
        page.selectbox(key="chain").select("digits.yaml (workspace)")
        return press("start")

    def press(key: str) -> Any:
        if not page.button(key=key).disabled:  # what cannot be pressed does nothing
            page.button(key=key).click()
        return _again(page, workspace)

    def status(name: str) -> str:
        return runs.read(workspace, name).status

    start("one")
    right = [status("one") == "running" and "running" in _text(page)]
    right.append(any("is there already" in error.value for error in start("one").error))
    press("pause")
    _until(lambda: not runs.active(workspace))
    right.append(status("one") == "paused" and "paused" in _text(_again(page, workspace)))
    press("resume")
    _until(lambda: not runs.active(workspace))
    undisturbed = run_chain("digits-mlp", workspace / "digits.yaml", workshop.folder / "undisturbed", overwrite=True)
    same = (
        undisturbed.artifact is not None and Artifact(workspace / "one/out/artifact").sha256 == undisturbed.artifact.sha256
    )
    right.append(status("one") == "finished" and same)
    start("two")
    page.checkbox(key="sure-two").check()
    _again(page, workspace)
    press("abort")
    right.append(status("two") == "aborted" and not list((workspace / "two").rglob("*.partial")))
    for name in ("../out", "/tmp/out", "a/b", "..", "a\0b"):
        there = set(workspace.rglob("*")) | set(workspace.parent.glob("*"))
        try:
            runs.start(workspace, name, "digits-mlp", "digits.yaml (workspace)")
            right.append(False)
        except AgentForgeError:
            right.append(there == set(workspace.rglob("*")) | set(workspace.parent.glob("*")))
    return share(workshop, right, "actions", "what the page's buttons do", model="digits-mlp")
