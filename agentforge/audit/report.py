"""From a template notebook to a report: papermill runs it, nbconvert draws it, and the record says what is true.

A report is made from claims.yaml in its folder, and, if they are there, probes.py and template.ipynb.  What is made lies
beside these, or in a folder of its own: NAME.json, the record; and drawn from it NAME.ipynb (as it was run), NAME.html (one
file, nothing fetched), NAME.md with its figures, NAME.sarif, and NAME.intoto.json.  It is made in a temporary folder beside
the place and moved there when it is whole.  Drawing needs the record alone: `check` draws a report again and refuses one
that does not match its record.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import html
import json
import logging
import os
import re
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from ..errors import AgentForgeError, BadInput
from ..escaping import markdown_of
from ..evaluation.texts import CHECKOUT, SPLITS
from ..folders import check_out, replace
from ..names import MODELS, REPORTS, is_path
from ..tensorfiles import read_json, write_json
from .attestation import attestation
from .claims import COLOURS, ClaimsFile, read_claims
from .drawing import MARKS, SHAPES, sections, verdict_table
from .probes import COMPARES, import_probes
from .record import check_record, duration, expected_seconds, measure, record_sha256
from .sarif import sarif
from .workshop import Workshop, check_settings, workshop_for

TEMPLATE = Path(__file__).parent / "template.ipynb"  # of a report without one of its own
NAMES = ("phase4_bitnet", "phase8_compression", "claims_vs_measurements")
STYLE = Path(__file__).parent / "report.css"
STYLES = {"GREEN": "green", "YELLOW": "yellow", "RED": "red", "GREY": "bright_black", "ERROR": "bold magenta"}  # terminal
FOLDED = 40  # rows of a section that a page shows before somebody unfolds it
QUIET = 10  # seconds after which a line says what is being done
# A page runs nothing and fetches nothing: its style and its figures are in it.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def run(
    report: str | Path = "phase4_bitnet",
    *,
    model: str | None = None,
    against: str | None = None,
    text: str | None = None,
    tokens: int | None = None,
    budget: str = "quick",
    device: str = "cpu",
    out: str | Path | None = None,
    fresh: bool = False,
    keep: bool = False,
    progress: bool = True,
) -> Path:
    """Run a report's notebook and write the report; returns its folder.

    report: the name of a report, or the path of a claims file of your own, or of a folder with one (see `read_claims`).
    model: what is measured (default: the claims file's model).  against: the original that `model` was made from, for
    claims that compare.  text, tokens: what likelihoods are measured on (default: the first text that is there, as much as
    the budget says).  budget: smoke, quick, standard or full.  device: cpu or cuda.  out: the folder for reports (default:
    that of `reports_folder`).  fresh: measure everything again, and keep nothing.  Compressed models are made again, in a
    temporary folder; claims whose inputs have not changed are taken from the cache of measurements.  keep: what the report
    in `out` has measured stays if its claim is the same; the report says how many rows these are, and each names the source
    that measured it.

    Raises BadInput for an unknown report, unusable settings and a folder in the way that is not a report, AgentForgeError if
    a cell of the notebook fails.
    """
    if is_path(report):
        report = Path(report).expanduser().absolute()  # the notebook runs elsewhere
    claims = read_claims(report)
    check_settings(tokens, budget, device)
    model, against, text = _places(claims, {"model": model, "against": against, "text": text})
    folder = (Path(out).expanduser().absolute() if out is not None else reports_folder(budget)) / claims.report
    beside = folder == claims.folder  # the report lies beside its own claims and probes, which stay
    check_out(folder, replace=not beside)
    before = folder / f"{claims.report}.json"
    if keep and not before.is_file():
        raise BadInput(f"{before}: there is no report to keep anything of; run without --keep")
    if keep:
        check_record(read_json(before))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{claims.report}-") as scratch:
        made = Path(scratch) / claims.report
        made.mkdir()
        parameters = {"report": str(report), "model": model, "against": against, "text": text, "tokens": tokens}
        parameters |= {"budget": budget, "device": device, "fresh": fresh, "keep": str(before.resolve()) if keep else None}
        parameters["record_path"] = str((made / f"{claims.report}.json").resolve())
        parameters["artifacts"] = str((Path(scratch) / "artifacts").resolve())
        with _lines_of_progress() if progress else contextlib.nullcontext() as lines:
            _execute(claims.report, made, parameters, _template(claims), lines)
        check_record(read_json(made / f"{claims.report}.json"), claims)
        render(made, claims.report)
        if beside:
            put(made, folder)
        else:
            replace(made, folder)
    return folder


def put(made: Path, folder: Path) -> None:
    """Rename the files of a report into a folder that has others, too; the record last: all that is drawn names its hash.
    Figures that the report of before shows, and this one does not, are removed."""
    with contextlib.suppress(OSError):
        for name in re.findall(r"\((figure-\d+\.png)\)", (folder / f"{made.name}.md").read_text(encoding="utf-8")):
            (folder / name).unlink(missing_ok=True)
    for file in sorted(made.iterdir(), key=lambda file: file.name == f"{made.name}.json"):
        os.replace(file, folder / file.name)


def obtain(record_path: str | None, artifacts: str | None, settings: dict[str, Any]) -> dict[str, Any]:
    """The record that a template draws: of `record_path` if it is there already, else measured now and written there.

    Whatever it says came from files that others may have written: every text is returned escaped, fit for Markdown and HTML.

    settings: report, model, against, text, tokens, budget, device and fresh, as `run` has them; keep, the path of a record.
    """
    if record_path and Path(record_path).is_file():
        record: dict[str, Any] = read_json(Path(record_path))
        return dict(markdown_of(record))
    claims = read_claims(settings["report"])
    with contextlib.ExitStack() as stack:
        folder = Path(artifacts or stack.enter_context(tempfile.TemporaryDirectory()))
        workshop = _workshop(claims, folder, settings)
        before: Any = read_json(Path(settings["keep"])) if settings.get("keep") else None
        record = measure(claims, workshop, before=before, last=last_record(claims.report, settings["budget"]))
        for figure in getattr(claims.folder and import_probes(claims.folder), "FIGURES", ()):
            name = figure.__name__
            kept = before and before["figures"].get(name)
            found = kept or workshop.remember(f"figure {name}", {}, partial(figure, workshop))
            record["figures"][name] = {key: value for key, value in found.items() if key != "seconds"}
    record = json.loads(json.dumps(record))  # what is drawn is what is written
    if record_path:
        write_json(Path(record_path), record)
    return dict(markdown_of(record))


def only(report: str | Path, ids: Sequence[str], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a few claims, measured now; nothing is written but the cache.  settings: as for `obtain`.

    Raises BadInput for a claim that the file does not have, and for a score of other rows.
    """
    claims = read_claims(report)
    settings = settings | dict(zip(("model", "against", "text"), _places(claims, settings), strict=True))
    known = {claim.id: claim for claim in claims.claims}
    if unknown := [name for name in ids if name not in known]:
        raise BadInput(f"claim {unknown[0]!r} is not in {claims.report}; choose from {', '.join(sorted(known))}")
    if scores := [name for name in ids if known[name].probe == "score"]:
        raise BadInput(f"claim {scores[0]}: counts the verdicts of other rows; measure the whole report instead")
    few = dataclasses.replace(claims, claims=tuple(known[name] for name in ids), baselines=())
    with tempfile.TemporaryDirectory() as folder:
        rows: list[dict[str, Any]] = measure(few, _workshop(few, Path(folder), settings), lambda *_, **__: None)["claims"]
    return rows


def _workshop(claims: ClaimsFile, folder: Path, settings: dict[str, Any]) -> Workshop:
    model, against = settings["model"] or claims.model, settings["against"] or claims.against
    made = workshop_for(
        against or model,
        folder,
        settings["text"],
        settings["tokens"],
        effort=settings["budget"],
        device=settings["device"],
        subject=None if claims.report in NAMES else model,
        memory=not settings["fresh"],
        own=None if claims.folder and claims.folder.parent == REPORTS else claims.folder,  # the checkout's all count anyway
    )
    for claim in claims.claims:
        if claim.probe in COMPARES and (made.subject is None or made.subject.fingerprint == made.model.fingerprint):
            raise BadInput(
                f"{claims.places[claim.id]}: probe {claim.probe} compares with an original; name that one with --against"
            )
    return made


def check(folder: Path, claims: ClaimsFile) -> None:
    """Raise BadInput if a report is not what its record gives: its verdicts, or any of the forms drawn from it.

    claims: the claims file that the record has to be of.
    Pictures have to be there; their bytes may differ between machines.
    """
    record_file = folder / f"{folder.name}.json"
    record: Any = read_json(record_file)
    check_record(record, claims)
    with tempfile.TemporaryDirectory(prefix="agentforge-check-") as scratch:
        again = draw(record, claims, Path(scratch))
        for file in sorted(again.iterdir()):
            if not (folder / file.name).is_file():
                raise BadInput(f"{folder / file.name}: is missing; make the report again")
            if file.suffix != ".png" and _comparable(file) != _comparable(folder / file.name):
                raise BadInput(f"{folder / file.name}: is not what its record gives; make the report again")


def draw(record: dict[str, Any], claims: ClaimsFile, folder: Path) -> Path:
    """Write a record, and all that is drawn from it, into a new folder of its report's name in `folder`; returns that."""
    name = str(record["report"])
    made = folder / name
    made.mkdir()
    write_json(made / f"{name}.json", record)
    _execute(name, made, {"report": name, "record_path": str(made / f"{name}.json")}, _template(claims))
    render(made, name)
    return made


def _comparable(file: Path) -> str:
    """A report's file without what may differ between machines: pictures, and a notebook's metadata."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        for cell in cells:
            for output in cell.get("outputs", ()):
                output.get("data", {}).pop("image/png", None)
        return json.dumps([[cell["source"], cell.get("outputs")] for cell in cells])
    return re.sub(r"data:image/png;base64,[A-Za-z0-9+/=\n]*", "", text)


def _places(claims: ClaimsFile, settings: dict[str, Any]) -> list[str | None]:
    """Model, original and text, as asked for or as the claims have them, seen from the current folder: paths absolute, names
    (of ours, or a hub id) as they are."""
    asked = [settings["model"] or claims.model, settings["against"] or claims.against, settings["text"]]
    for index, name in enumerate(asked):
        if name and name not in (*MODELS, *SPLITS) and os.path.exists(path := os.path.abspath(os.path.expanduser(name))):
            asked[index] = path
    return asked


def reports_folder(budget: str = "full") -> Path:
    """Where reports go by default: those of the full budget to the checkout's reports/, which git tracks, others to its
    build/reports/; all of them to reports/ of the folder one is in, if there is no checkout."""
    if not (CHECKOUT / "reports").is_dir():
        return Path("reports")
    return CHECKOUT / "reports" if budget == "full" else CHECKOUT / "build" / "reports"


def last_record(report: str, budget: str) -> dict[str, Any] | None:
    """The last record of a report, of this budget if there is one, else of the full one; to foresee the next by."""
    for folder in (reports_folder(budget), reports_folder()):
        with contextlib.suppress(AgentForgeError, OSError):
            record: dict[str, Any] = read_json(folder / report / f"{report}.json")
            return record
    return None


def foreseen(reports: Sequence[str | Path], budget: str) -> str:
    """One sentence: how many claims of these reports are ahead, and how long and how large the work was last time."""
    claims = [read_claims(report) for report in reports]
    last = [record for one in claims if (record := last_record(one.report, budget))]
    words = (
        f"{sum(len(one.claims) for one in claims)} claims in {len(claims)} report{'s' * (len(claims) > 1)}, budget {budget}"
    )
    if len(last) < len(claims):
        return words
    seconds = sum(sum(expected_seconds(*pair).values()) for pair in zip(claims, [budget] * len(last), last, strict=True))
    said = "as rows took last time" if all(record["budget"] == budget for record in last) else "by rows of larger samples"
    size = max(sum(stage["ratios"][0]["bytes"] for stage in record["stages"]) for record in last) / 1e6
    return f"{words}: {duration(seconds)}, {said}, and {size:,.0f} MB of compressed models meanwhile"


def _template(claims: ClaimsFile) -> Path:
    """The notebook that draws a report: that of its folder, or the package's."""
    own = claims.folder and claims.folder / "template.ipynb"
    return own if own and own.is_file() else TEMPLATE


def _execute(
    name: str, folder: Path, parameters: dict[str, Any], template: Path = TEMPLATE, lines: _Progress | None = None
) -> None:
    """Run a report's template in a kernel, into `folder`/NAME.ipynb.  lines: gets what it prints."""
    try:
        import papermill
        from papermill.exceptions import PapermillExecutionError
        from traitlets.config import Config
    except ImportError:
        raise BadInput("reports need papermill and nbconvert: pip install 'agentforge[lab]'") from None

    logging.getLogger("blib2to3").setLevel(logging.ERROR)
    before = dict(os.environ)
    # The kernel's own folder is an empty one, in which no relative path leads anywhere; so it is told where this package is.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(CHECKOUT), *filter(None, [before.get("PYTHONPATH")])])
    os.environ |= {key: os.path.abspath(before[key]) for key in ("AGENTFORGE_CACHE", "AGENTFORGE_DATA") if key in before}
    # A backend that was chosen for this process (Streamlit does, when it is imported) would leave the page without pictures.
    os.environ.pop("MPLBACKEND", None)
    run = partial(
        papermill.execute_notebook,
        template,
        folder / f"{name}.ipynb",
        parameters=parameters,
        cwd=folder,
        stdout_file=lines,
        stderr_file=lines,
        progress_bar=False,
        kernel_name="python3",
        config=Config(KernelManager={"transport_encryption": "auto"}),  # else the kernel warns of plain TCP
        extra_arguments=["--IPKernelApp.log_level=50"],  # else it calls the interrupt that ends it an error
    )
    try:
        try:
            run()
        except RuntimeError as error:
            if "before replying" not in str(error):
                raise
            run()  # another process took a port between its choice and the kernel's start
    except PapermillExecutionError as error:
        if error.ename == "BadInput":
            raise BadInput(error.evalue) from None
        raise AgentForgeError(f"{template.name}: cell {error.exec_count} failed: {error.ename}: {error.evalue}") from None
    finally:
        os.environ.clear()
        os.environ.update(before)


class _Progress:
    """Shows the lines of progress that the measuring cell prints, and nothing else of what it prints."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.doing, self.since, self.said = "starting", time.monotonic(), time.monotonic()

    def flush(self) -> None:
        """Nothing waits."""

    def write(self, text: str) -> None:
        """Show the lines of a text that are lines of progress."""
        for line in text.splitlines():
            match = re.match(rf"(\[\d+/\d+\] )({'|'.join(COLOURS)})?", line)
            if match or line.startswith(("[now] ", "fetching ")):  # the default model is fetched before anything is measured
                self.doing, self.since = re.sub(r"^\[.*?\] ", "", line), time.monotonic()
            if match:
                style = STYLES.get(COLOURS.get(match[2] or "", ""), "")
                self.show(Text(match[1]) + Text(match[2] or "", style) + Text(line[match.end() :]))

    def show(self, line: Text) -> None:
        """Print a line, and remember when."""
        self.said = time.monotonic()
        self.console.print(line)

    def wait(self, ended: threading.Event) -> None:
        """Say what is being done whenever nothing was said for QUIET seconds."""
        while not ended.wait(1):
            if time.monotonic() - self.said >= QUIET:
                self.show(Text(f"  {time.monotonic() - self.since:.0f} s: {self.doing}", "dim"))


@contextlib.contextmanager
def _lines_of_progress() -> Iterator[_Progress]:
    """Show lines of progress, in colour on a terminal, and one at least every QUIET seconds."""
    lines, ended = _Progress(), threading.Event()
    threading.Thread(target=lines.wait, args=(ended,), daemon=True).start()
    try:
        yield lines
    finally:
        ended.set()


def render(folder: Path, name: str) -> None:
    """Draw NAME.html, NAME.md, NAME.sarif and NAME.intoto.json from the record and the executed NAME.ipynb in `folder`,
    which loses what only this machine knows."""
    import nbformat
    from nbconvert import HTMLExporter, MarkdownExporter
    from traitlets.config import Config

    record: Any = read_json(folder / f"{name}.json")
    sha256 = record_sha256(record)
    notebook = nbformat.read(folder / f"{name}.ipynb", as_version=4)
    notebook.metadata = nbformat.from_dict({"kernelspec": notebook.metadata.get("kernelspec", {}), "record_sha256": sha256})
    notebook.cells = [c for c in notebook.cells if "injected-parameters" not in c.metadata.get("tags", [])]
    for index, cell in enumerate(notebook.cells):
        cell.id = f"cell-{index}"
        cell.metadata = nbformat.from_dict({"tags": cell.metadata["tags"]} if cell.metadata.get("tags") else {})
        if "progress" in cell.metadata.get("tags", []):
            cell.outputs = []
    shown = copy.deepcopy(notebook)
    shown.cells = [c for c in shown.cells if not {"parameters", "progress"} & set(c.metadata.get("tags", []))]
    config = Config()
    config.NbConvertBase.display_data_priority = ["text/markdown", "image/png", "text/html", "text/plain"]
    body, _ = HTMLExporter(template_name="basic", exclude_input=True, config=config).from_notebook_node(shown)
    page = (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="record-sha256" content="{sha256}">\n<title>{html.escape(record["title"])}</title>\n'
        f"<style>{STYLE.read_text(encoding='utf-8')}</style>\n</head>\n"
        f"<body>\n<main>{_for_readers(body, record)}</main>\n</body>\n</html>\n"
    )
    (folder / f"{name}.html").write_text(page, encoding="utf-8")
    markdown, resources = MarkdownExporter(exclude_input=True, config=config).from_notebook_node(shown)
    for i, (file, data) in enumerate(sorted(resources["outputs"].items()), start=1):
        figure = f"figure-{i}.png"
        markdown = markdown.replace(f"![png]({file})", f"![Figure {i}; what it shows stands below it]({figure})")
        (folder / figure).write_bytes(data)
    said = markdown_of(record)
    for section in sections(said):  # short enough to be read: a page has the rest
        markdown = markdown.replace(verdict_table(said, section), verdict_table(said, section, f"{name}.html"))
    markdown = re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in markdown.splitlines())).strip()
    (folder / f"{name}.md").write_text(f"{markdown}\n\n<!-- record sha256: {sha256} -->\n", encoding="utf-8")
    nbformat.write(notebook, folder / f"{name}.ipynb")
    claims_file = f"reports/{name}/claims.yaml" if (REPORTS / name / "claims.yaml").is_file() else f"{name}.yaml"
    write_json(folder / f"{name}.sarif", sarif(record, claims_file))
    write_json(folder / f"{name}.intoto.json", attestation(record, folder / f"{name}.json"))


def _for_readers(body: str, record: dict[str, Any]) -> str:
    """The page with a bar of verdicts that chooses rows, contents, an anchor per row, sections that fold, marks that every
    font has, and cells that know their column; without a script."""
    from bs4 import BeautifulSoup

    def made(markup: str) -> Any:
        return BeautifulSoup(markup, "html.parser")

    soup, verdicts = made(body), {row["id"]: row["verdict"] for row in record["claims"]}
    shapes = {mark: _mark(verdict) for verdict, mark in MARKS.items()}
    for text in soup.find_all(string=re.compile("|".join(shapes))):  # in text alone: in an attribute a tag would end it
        parts = [shapes.get(part) or html.escape(part) for part in re.split(f"({'|'.join(shapes)})", text)]
        text.replace_with(made("".join(parts)))
    counts: dict[str, str] = {}  # of the verdicts of a section, by its anchor
    for table in soup.find_all("table"):
        labels = [cell.get_text() for cell in table.find_all("th")]
        table["class"] = "claims" if "Verdict" in labels else "figures"
        for tr in table.find_all("tr"):
            for label, cell in zip(labels, tr.find_all("td"), strict=False):
                cell["data-label"] = label
        rows = [(details.find_parent("tr"), details) for details in table.select("details[id]")]
        for tr, details in rows:
            tr["id"] = details["id"]
            tr["data-verdict"] = verdicts.get(tr["id"], "")
            details.append(made(f' <a href="#{html.escape(tr["id"])}">Link to this row</a>'))
            del details["id"]
        heading = table.find_previous("h3")
        if rows and heading is not None:
            found = Counter(tr["data-verdict"] for tr, _ in rows)
            counts[heading["id"]] = " ".join(
                f"{_mark(v)}{found[v]}<span class='unseen'> {v}</span>" for v in MARKS if found[v]
            )
            opened = " open" * (len(rows) <= FOLDED)
            section = made(f'<details class="section"{opened}><summary>{counts[heading["id"]]}</summary></details>').details
            table.wrap(section)
            section.summary.insert(0, heading.extract())
    for image in soup.find_all("img"):
        said = image.find_next("em")
        image["alt"] = said.get_text() if said is not None else "figure"
    entries = [
        f'<li class="{tag.name}"><a href="#{html.escape(tag["id"])}">{html.escape(tag.find(string=True))}</a> '
        f"{counts.get(tag['id'], '')}</li>"
        for tag in soup.find_all(["h2", "h3"])
        if tag.get("id")
    ]
    top = made(f'{_bar(record)}<nav id="contents" aria-label="Contents"><ul>{"".join(entries)}</ul></nav>')
    soup.insert(0, top)  # outside of any cell, whose end would take the bar with it
    if (title := soup.find("h1")) is not None:
        soup.insert(0, title.extract())
    return str(soup)


def _mark(verdict: str) -> str:
    return f'<span class="mark {COLOURS[verdict]}" aria-hidden="true">{SHAPES[verdict]}</span>'


def _bar(record: dict[str, Any]) -> str:
    """The verdicts, as wide as they are many: each shows its rows alone."""
    choices = [("all", "", 0, f"all {len(record['claims'])}")]
    choices += [
        (verdict, COLOURS[verdict], count, f"{_mark(verdict)} {count} <span>{verdict}</span>")
        for verdict, count in record["summary"].items()
        if count
    ]
    labels = [
        f'<label class="{colour}" style="flex-grow: {count}"><input type="radio" name="shown" value="{verdict}"'
        f"{' checked' * (verdict == 'all')}>{words}</label>"
        for verdict, colour, count, words in choices
    ]
    return (
        f'<fieldset class="bar"><legend class="unseen">Rows that are shown</legend>{"".join(labels)}'
        '<a href="#contents">Contents</a></fieldset>'
    )
