"""The page, as Streamlit runs it: from top to bottom at every change, and the part that watches a run every two seconds.

What comes from files (names, settings, reasons) is escaped before it goes into Markdown; none of it becomes the page's HTML.
"""

from __future__ import annotations

import html
import os
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import altair as alt
import streamlit as st

from agentforge.audit.report import NAMES, reports_folder
from agentforge.chain import Chain, Condition
from agentforge.dashboard import frontier, runs, server
from agentforge.errors import AgentForgeError
from agentforge.evaluation import Measurement

EVERY = 2.0  # seconds between two looks at a run that is active
VIEWS = ("Run", "Compare", "Frontier", "Reports")
# Of a run: the colour of its state, and what that means.
STATES = {
    "running": ("blue", "its process is at work"),
    "pausing": ("orange", "what is being encoded or measured is finished first"),
    "paused": ("orange", "Resume continues from what is finished"),
    "aborting": ("red", "its process is being ended"),
    "aborted": ("red", "ended for good; what was accepted stays"),
    "finished": ("green", "the run is at its end: every step was accepted"),
    "stopped": ("orange", "the run is at its end: not every step passed its gates, and what was accepted stays"),
    "failed": ("red", "its process ended before the run did; Resume continues from what is finished"),
}
COLOURS = {state: colour for state, (colour, _) in STATES.items()} | {
    "accepted": "green",
    "rolled back": "red",
    "pending": "grey",
    "not reached": "grey",
}
HEADS = {
    "bytes": "bytes",
    "ratio": "ratio, whole model",
    "kl": "KL, nats/token",
    "perplexity": "perplexity",
    "accuracy": "accuracy",
    "total_retention": "accuracy kept, share",
}
LOG = alt.Scale(type="log", nice=False, padding=8)
# Told apart from each other, and from the page, in the light and in the dark.
SERIES = alt.Scale(range=["#4c8bf5", "#e8710a", "#2e9e5b", "#a35bd6", "#d8486b", "#8a8a2a"])
# A report is shown so that it can run nothing and fetch nothing.
FRAME = """<!doctype html><meta charset="utf-8"><meta http-equiv="Content-Security-Policy"
content="default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-src 'self'">
<style>:root {{ color-scheme: light dark; }} html, body, iframe {{ margin: 0; border: 0; width: 100%; height: 100%; }}
iframe {{ display: block; }} body {{ height: 100vh; }}</style>
<iframe sandbox="" title="{title}" srcdoc="{report}"></iframe>"""


def plain(text: object) -> str:
    """Text of any origin, in one line, so that Markdown shows it as it is."""
    return re.sub(r"([\\`*_\[\]<>$:#|~{}()!&^=+])", r"\\\1", " ".join(str(text).split()))


def badge(word: str) -> str:
    """A word with its colour, as Markdown."""
    return f":{COLOURS[word]}-badge[{word}]"


def attempted(action: Callable[..., None], *arguments: Any) -> None:
    """Do what a button stands for; what cannot be done is said at the top of the page."""
    try:
        action(*arguments)
    except AgentForgeError as error:
        st.session_state["problem"] = str(error)


def start(workspace: Path) -> None:
    """Start what the fields say now, which may be more than what they said when the button was drawn."""
    name = st.session_state["name"].strip()
    runs.start(workspace, name, st.session_state["model"], st.session_state["chain"])
    st.session_state["run"], st.session_state["name"] = name, free_name(workspace)


def free_name(workspace: Path) -> str:
    """A name that no run has yet."""
    taken = runs.names(workspace)
    return next(name for number in range(1, len(taken) + 2) if (name := f"run-{number}") not in taken)


def new_run(workspace: Path) -> None:
    """The choice of a model and a chain, and what that chain does."""
    known = runs.chains(workspace)
    with st.expander("New run", expanded=not runs.names(workspace)):
        st.session_state.setdefault("name", free_name(workspace))
        st.text_input("Name of the run", key="name", max_chars=64, placeholder="letters, digits, . _ -")
        st.selectbox("Model", runs.models(workspace), key="model")
        own = "Your own: put a model's folder (config.json and its weights) or a chain (.yaml) into"
        st.caption(f"{own} {plain(workspace)}, and load the page again.")
        chain = st.selectbox("Chain", list(known), key="chain")
        if chain is None:
            st.info("There is no chain yet; put a .yaml file into the workspace.")
            return
        try:
            described(runs.chain_named(workspace, chain))
        except AgentForgeError as error:
            st.error(plain(error))
        st.button("Start", type="primary", key="start", on_click=attempted, args=(start, workspace))


def described(chain: Chain) -> None:
    """What a chain does, before it is started."""
    for index, step in enumerate(chain.steps, 1):
        tries = ", then ".join(plain(setting.stage) for setting in step.settings)
        gates = ", ".join(plain(gate) for gate in (*step.gates, *chain.gates)) or "none"
        st.markdown(f"{index}. **{plain(step.name)}**: {tries}  \n   Gates: {gates}")


def watch(workspace: Path, name: str, looking: bool) -> None:
    """A run: its state, controls, timeline, progress, bytes, measurements and log.  looking: whether this is repeated."""
    try:
        run = runs.read(workspace, name)
        progress, sizes = runs.progress(run), runs.sizes(run)
    except AgentForgeError as error:
        st.error(plain(error))
        return
    if (run.status in runs.ACTIVE) != looking:
        st.rerun()
    st.header(plain(run.name))
    st.markdown(f"{badge(run.status)} {STATES[run.status][1]}{f': {plain(run.reason)}' if run.reason else ''}")
    times = [time.strftime("%Y-%m-%d %H\\:%M\\:%S", time.localtime(at)) for at in run.record.began]
    begun = ", ".join(times) or "never"
    st.caption(f"{plain(run.record.model)}, chain {plain(run.record.chain)}, begun {begun}")
    controls(workspace, run)
    st.subheader("Steps")
    timeline(run, progress)
    st.subheader("Bytes")
    falling(sizes)
    st.subheader("Measured")
    measurements(run)
    st.subheader("Log")
    st.code(runs.log_tail(run.folder, 15) or "nothing yet", language=None, wrap_lines=True)
    st.caption("The same in a terminal:")
    st.code(" ".join(run.command), language=None, wrap_lines=True)


def controls(workspace: Path, run: runs.Run) -> None:
    """Pause, resume and abort, each if possible."""
    over = run.status in ("finished", "stopped", "aborted")
    with st.container(horizontal=True, vertical_alignment="center"):

        def button(label: str, action: Callable[..., None], ready: bool) -> None:
            about = (action, workspace, run.name)
            st.button(label, key=label.lower(), disabled=not ready, on_click=attempted, args=about)

        button("Pause", runs.pause, run.status in runs.ACTIVE)
        button("Resume", runs.resume, run.status in ("paused", "failed"))
        sure = st.checkbox("Abort for good", key=f"sure-{run.name}", disabled=over)
        button("Abort", runs.abort, sure and not over)


def timeline(run: runs.Run, progress: runs.Progress | None) -> None:
    """The steps of the chain: what was tried, what each gate measured against its limit, what is under way."""
    for index, step in enumerate(run.chain.steps, 1):
        tried = [row for row in run.journal.attempts if row.step == index]
        now = run.journal.now if run.journal.now and run.journal.now.step == index else None
        with st.container(border=True):
            st.markdown(f"**{index}. {plain(step.name)}** {badge(state_of(run, tried, now))}")
            for row in tried:
                rolled = "" if row.decision == "accepted" else ", rolled back"
                st.markdown(f"Try {row.attempt}, {plain(row.stage)}: **{row.decision}**{rolled}, {row.seconds:.1f} s")
                gates(row)
                if row.reason and not row.gates:
                    st.markdown(plain(row.reason))
            if now is not None:
                under_way(run, now, progress)


def state_of(run: runs.Run, tried: list[runs.Done], now: runs.Now | None) -> str:
    """The state of a step, in a word."""
    if any(row.decision == "accepted" for row in tried):
        return "accepted"
    if now is not None:
        return run.status
    if tried:
        return "rolled back"
    return "pending" if run.status in (*runs.ACTIVE, "paused", "failed") else "not reached"


def gates(row: runs.Attempt) -> None:
    """Each gate with the measured value and what came of it."""
    for gate, decision in row.gates.items():
        try:
            measured = row.measured[Condition.parse(gate).quantity]
        except (ValueError, KeyError):
            continue
        colour = {"passed": "green", "failed": "red", "undecided": "orange"}[decision]
        value = f"{plain(runs.shown(measured))} {plain(measured.unit)}"
        st.markdown(f"- {plain(gate)}: measured {value}, :{colour}[**{decision}**]")


def under_way(run: runs.Run, now: runs.Now, progress: runs.Progress | None) -> None:
    """What is done for a try at the moment, or was when its process ended."""
    doing = now.doing if run.status in runs.ACTIVE else f"was {now.doing} when its process ended"
    tokens = f" on {now.tokens:,} tokens" if now.doing == "measuring" and now.tokens else ""
    st.markdown(f"Try {now.attempt}, {plain(now.stage)}: **{doing}**{tokens}")
    if progress is not None and (progress.done or run.status in runs.ACTIVE):
        words = f"{progress.done} of {progress.total} tensors finished"
        words += f", {progress.rate:.2g} a second" if progress.rate else ""
        words += f", about {progress.left:.0f} s left" if progress.left is not None else ""
        st.progress(progress.done / max(1, progress.total), text=words)
        if progress.last:
            st.caption(f"Finished last: {plain(progress.last)}")
    gates(now)


def falling(sizes: list[runs.Size]) -> None:
    """The bytes, over the tensors that were encoded."""
    if not sizes:
        st.caption("The process has not opened the model yet.")
        return
    if len(sizes) == 1:
        st.caption(plain(f"{sizes[0].bytes:,} bytes ({sizes[0].what})."))
        return
    data = alt.InlineData(values=[size._asdict() for size in sizes])
    x = alt.X("tensors:Q", title="tensors finished, all tries counted", axis=alt.Axis(tickMinStep=1))
    y = alt.Y("bytes:Q", title="bytes (log scale)", scale=LOG, axis=alt.Axis(format="~s"))
    tooltip = ["what:N", "tensors:Q", alt.Tooltip("bytes:Q", format=",")]
    chart = alt.Chart(data).mark_line(point=True).encode(x=x, y=y, tooltip=tooltip)
    says = f"From {sizes[0].bytes:,} bytes ({sizes[0].what}) to {sizes[-1].bytes:,} ({sizes[-1].what})."
    st.altair_chart(chart, alt=says)
    st.caption(plain(says))


def measurements(run: runs.Run) -> None:
    """One row per try, with standard errors; of the one under way, what is known so far."""
    rows: list[tuple[runs.Attempt, str]] = [(row, row.decision) for row in run.journal.attempts]
    if run.journal.now and run.journal.now.measured:
        rows.append((run.journal.now, "undecided so far"))
    if not any(row.measured for row, _ in rows):
        st.caption("Nothing is measured yet.")
        return
    every = [row.measured for row, _ in rows]
    table = [
        {"try": f"{row.name}, {row.attempt}", **cells(row.measured, every, run.chain.bits), "decision": word}
        for row, word in rows
    ]
    st.dataframe(table, hide_index=True)
    st.caption(ways(every))


def cells(measured: dict[str, Measurement], all_of_them: Iterable[dict[str, Measurement]], bits: int) -> dict[str, str]:
    """The quantities of a table's row, each with its standard error; those that no row of the table has have no column.
    bits: per parameter, of the original that a ratio is of."""
    known = [name for name in HEADS if any(name in row for row in all_of_them)]
    of = {"ratio": f"x, to {bits} bits per parameter"}
    return {
        HEADS[name]: runs.shown(measured[name]) + of.get(name, "") if name in measured else "not measured" for name in known
    }


def ways(rows: Iterable[dict[str, Measurement]]) -> str:
    """How quality was measured, in a sentence; a warning if it was in more ways than one."""
    found: dict[str, None] = {}
    for measured in rows:
        for name in ("kl", "total_retention"):
            if name in measured:
                found[frontier.way(measured[name].protocol)] = None
                break
    several = " These are not to be compared with each other." if len(found) > 1 else ""
    return f"± is one standard error. Measured on {'; '.join(map(plain, found)) or 'nothing yet'}.{several}"


def compare(workspace: Path) -> None:
    """Runs beside each other: the last accepted step of each, and every try in a chart."""
    chosen = st.multiselect("Runs", runs.names(workspace), default=runs.names(workspace)[:5], key="compared")
    found = []
    for name in chosen:
        try:
            found.append(runs.read(workspace, name))
        except AgentForgeError as error:
            st.error(plain(error))
    if not found:
        st.caption("Choose runs to compare.")
        return
    every = [row.measured for run in found for row in run.accepted]
    rows = []
    for run in found:
        last = run.accepted[-1].measured if run.accepted else {}
        seconds = sum(row.seconds for row in run.journal.attempts)
        head = {"run": run.name, "model": run.record.model, "state": run.status}
        taken = f"{len(run.accepted)} of {len(run.chain.steps)}"
        rows.append({**head, "steps accepted": taken, **cells(last, every, run.chain.bits), "seconds": f"{seconds:.1f}"})
    st.dataframe(rows, hide_index=True)
    st.caption(ways(every))
    tries = [
        (run, row, row.measured["bytes"].value, row.measured["total_retention"])
        for run in found
        for row in run.journal.attempts
        if {"bytes", "total_retention"} <= set(row.measured)
    ]
    if tries:
        beside(tries)


def beside(tries: list[tuple[runs.Run, runs.Done, float, Measurement]]) -> None:
    """Bytes and accuracy of every try, one colour per run."""
    data = [
        {
            "run": run.name,
            "try": f"{row.name}, {row.attempt}",
            "decision": row.decision,
            "bytes": size,
            "kept": kept.value,
            "low": kept.bounds[0],
            "high": kept.bounds[1],
        }
        for run, row, size, kept in tries
    ]
    title, below = "share of the accuracy kept", alt.Legend(orient="bottom")
    grey = alt.Legend(orient="bottom", symbolFillColor="grey", symbolStrokeColor="grey")
    x = alt.X("bytes:Q", title="bytes (log scale)", scale=LOG, axis=alt.Axis(format="~s"))
    base = alt.Chart(alt.InlineData(values=data)).encode(x=x, color=alt.Color("run:N", legend=below, scale=SERIES))
    y, shape = alt.Y("kept:Q", title=title, scale=alt.Scale(zero=False)), alt.Shape("decision:N", legend=grey)
    tooltip = ["run:N", "try:N", "decision:N", "bytes:Q", "kept:Q"]
    marks = base.mark_point(filled=True, size=80).encode(y=y, shape=shape, tooltip=tooltip)
    bars = base.mark_rule().encode(y=alt.Y("low:Q", title=title), y2="high:Q")
    run, row, size, kept = max(tries, key=lambda one: one[3].value)
    says = f"{len(tries)} tries; most of the accuracy is kept by {run.name}, {row.name}, try {row.attempt}: "
    says += f"{runs.shown(kept)}, at {size:,.0f} bytes."
    st.altair_chart(bars + marks, alt=says)
    st.caption(plain(says))


def rate_and_quality(workspace: Path) -> None:
    """The frontier of a model: from the reports, and from this workspace's runs."""
    known = frontier.originals(workspace)
    if not known:
        st.caption("There are no reports and no runs that are measured yet.")
        return
    original = st.selectbox("Original", list(known), format_func=lambda key: known[key], key="original")
    measured = {quality: frontier.points(workspace, quality) for quality in frontier.UNITS}
    qualities = [quality for quality, points in measured.items() if any(point.original == original for point in points)]
    quality = st.radio("Quality", qualities, format_func=lambda key: frontier.UNITS[key], key="quality", horizontal=True)
    if quality is None:
        st.caption("No quality of this model is measured yet.")
        return
    found = frontier.front(measured[quality], original, quality)
    # A logarithm takes what is above zero.
    data = [point._asdict() for point in found.points if quality != "kl" or point.value > 0]
    front = [point._asdict() | {"number": str(number)} for number, point in enumerate(found.best, 1)]
    scale = LOG if quality == "kl" else alt.Scale(zero=True)
    title = frontier.UNITS[quality] + (", log scale" if quality == "kl" else "")
    x = alt.X("bits:Q", title="bits per weight of the encoded tensors (log scale)", scale=LOG)
    y = alt.Y("value:Q", title=title, scale=scale)
    tooltip = ["what:N", "source:N", "bits:Q", "value:Q", "low:Q", "high:Q", "way:N"]
    legend = alt.Legend(orient="bottom", title=None, columns=1)
    colour = alt.Color("source:N", legend=legend, scale=SERIES)
    shape = alt.Shape("source:N", legend=legend)
    every, best = (alt.Chart(alt.InlineData(values=rows)).encode(x=x, y=y) for rows in (data, front))
    marks = every.mark_point(filled=True, size=60).encode(color=colour, shape=shape, tooltip=tooltip)
    line = best.mark_line(interpolate="step-after", opacity=0.6)
    # Odd numbers above the line, even ones below it: neighbours leave each other room.
    above, below = (
        best.transform_filter(f"datum.number % 2 == {odd}")
        .mark_text(dx=7 * side, dy=-8 * side, fontSize=12, color="grey")
        .encode(text="number:N", tooltip=tooltip)
        for odd, side in ((1, 1), (0, -1))
    )
    st.altair_chart(line + marks + above + below, height=420, alt=found.says)
    st.caption(plain(found.says))
    beside = f" {len(found.beside)} points were measured otherwise and take no part." if found.beside else ""
    st.caption(plain(f"The line: measured on {found.way}.{beside} Ratios are of the encoded tensors alone."))
    with st.expander("The points on the line by their numbers, and those of this workspace", expanded=True):
        own = [point for point in found.points if point.source == frontier.OWN]
        rows = [
            {
                "number": str(found.best.index(point) + 1) if point in found.best else "-",
                "what": point.what,
                "bits": f"{point.bits:.3f}",
                frontier.UNITS[quality]: frontier.shown(point),
                "from": point.source,
                "measured on": point.way,
            }
            for point in [*found.best, *(point for point in own if point not in found.best)]
        ]
        st.dataframe(rows, hide_index=True)


def reports(workspace: Path) -> None:
    """A report that can run nothing and fetch nothing, the three audits first; and as a file."""
    found: dict[str, Path] = {}
    for place in (reports_folder(), workspace / "reports"):
        for folder in sorted(place.glob("*"), key=lambda folder: (folder.name not in NAMES, folder)):
            for file in (folder / f"{folder.name}.html", folder / f"{folder.name}.md"):
                if file.is_file() and file.resolve().is_relative_to(place.resolve()) and file.stat().st_size <= runs.LARGEST:
                    found.setdefault(f"{folder.name}{' (workspace)' if place == workspace / 'reports' else ''}", file)
    if not found:
        st.caption("There are no reports; `agentforge audit` makes some.")
        return
    chosen = st.selectbox("Report", list(found), key="report")
    file = found[chosen]
    data = file.read_bytes()
    st.download_button("Download", data, file_name=file.name, key="download")
    text = data.decode("utf-8", "replace")
    if file.suffix == ".html":
        st.iframe(FRAME.format(title=html.escape(file.stem, quote=True), report=html.escape(text, quote=True)), height=800)
    else:
        for index, part in enumerate(re.split(r"!\[[^\]]*\]\(([\w-]+\.png)\)", text)):
            picture = file.parent / part
            if index % 2 == 0:
                st.markdown(re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", part))
            elif picture.is_file() and not picture.is_symlink() and picture.stat().st_size <= runs.LARGEST:
                st.image(picture.read_bytes(), width=640)


def main() -> None:
    """The page."""
    st.set_page_config(page_title="agentforge", layout="wide", menu_items={})
    workspace = runs.open_workspace(os.environ[server.WORKSPACE])
    st.title("agentforge")
    view = st.radio("View", VIEWS, key="view", horizontal=True, label_visibility="collapsed")
    if problem := st.session_state.pop("problem", None):
        st.error(plain(problem))
    if view == "Run":
        new_run(workspace)
        known = runs.names(workspace)
        if known:
            name = st.selectbox("Run", known, key="run")
            active = name in runs.active(workspace)
            st.fragment(watch, run_every=EVERY if active else None)(workspace, name, active)
    elif view == "Compare":
        compare(workspace)
    elif view == "Frontier":
        try:
            rate_and_quality(workspace)
        except AgentForgeError as error:
            st.error(plain(error))
    else:
        reports(workspace)
    st.caption(f"Workspace: {plain(workspace)}")


main()
