"""A report whose every text was written by an attacker shows these texts, and runs none of them."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from bs4 import BeautifulSoup

from agentforge.audit import report
from agentforge.escaping import markdown, markdown_of, printable
from agentforge.tensorfiles import read_json, write_json

SETS = "document.title='PWNED';window.ran=1"
PAYLOADS = [
    f"<script>{SETS}</script>",
    f"</title></style></textarea></code></details></td><script>{SETS}</script>",
    f'<img src=x onerror="{SETS}">',
    f"<svg/onload={SETS}>",
    f'<iframe srcdoc="<script>parent.{SETS.replace(";", ";parent.")}</script>"></iframe>',
    f"[click](javascript:{SETS}) ![picture](http://attacker.example/x.png) <javascript:{SETS}>",
    f"[t]: javascript:{SETS}",
    "https://attacker.example/page",
    "<style>body{background:url(http://attacker.example/y)}</style><link rel=stylesheet href=http://attacker.example/z>",
    '<meta http-equiv="refresh" content="0;url=data:text/html,PWNED"><base href="http://attacker.example/">',
    f"{{{{7*7}}}} {{% raw %}} ${{7*7}} $x$ \\(x\\) <form action=http://attacker.example/><button autofocus onfocus={SETS}>",
    f'" onmouseover="{SETS}" style="x:y',
    f"| a | b |\n|---|---|\n| <details open ontoggle={SETS}> |\n\n# heading\n\n```\nfence\n```",
    f"🟢 <img src=x onerror={SETS}> 🔴",
    f"`</code><script>{SETS}</script>` **<script>{SETS}</script>** `&#60;script&#62;`",
    f"\\<script>{SETS}\\</script> \\` \\[a\\](javascript:{SETS}) &lt;script&gt; &#60;",
    "\x1b]0;PWNED\x07 \u202eevil\u2066 \x9b31m",
]
HOSTILE = " ".join(PAYLOADS)
# Words of a fixed list, which the record's schema holds to it; hashes; and what names a file.
FIXED = {"verdict", "colour", "by", "report", "id", "probe", "measures", "error", "sha256", "budget", "created"}
CLAIMS = """
report: hostile
title: T
about: A
source: S
model: digits-mlp
claims:
  - {id: a.one, stage: model, section: One, title: t, documentation: d, paper: p, code: c, protocol: p, remark: r,
     claimed: {by: paper, value: 2, unit: x},
     probe: {name: arithmetic, parameters: {expression: "1 + 1", unit: x}}, confirmed: [0, 9]}
  - {id: a.two, stage: model, section: Two, title: t, audit: x, needs: n}
"""


def hostile(data: Any, key: str = "") -> Any:
    if isinstance(data, dict):
        return {k: hostile(v, k) for k, v in data.items()}
    if isinstance(data, list):
        return [hostile(v, key) for v in data]
    return HOSTILE if isinstance(data, str) and key not in FIXED else data


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report drawn from a record in which every text holds all the payloads."""
    scratch = tmp_path_factory.mktemp("hostile")
    folder = scratch / "hostile"
    folder.mkdir()
    (scratch / "claims.yaml").write_text(CLAIMS, encoding="utf-8")
    settings = {"report": str(scratch / "claims.yaml"), "model": None, "against": None, "text": None, "tokens": 127}
    settings |= {"budget": "smoke", "device": "cpu", "fresh": True, "keep": None}
    path = folder / "hostile.json"
    report.obtain(str(path), str(scratch), settings)
    assert read_json(path)["claims"][0]["measured"], read_json(path)["claims"][0]["failure"]
    record: Any = hostile(read_json(path))
    one, two = record["claims"]
    record["claims"] = [one, two, {**one, "failure": HOSTILE, "measured": None}]
    record["artifacts"] = {HOSTILE: "0" * 64}
    record["figures"] = {"x": HOSTILE}
    one["measured"]["protocol"] |= {HOSTILE: [HOSTILE]}
    write_json(path, record)
    report._execute("hostile", folder, {"report": "hostile", "record_path": str(path)})
    report.render(folder, "hostile")
    return folder


def test_only_the_report_s_own_elements_are_in_the_page(made: Path) -> None:
    soup = BeautifulSoup((made / "hostile.html").read_text(encoding="utf-8"), "html.parser")
    tags = {tag.name for tag in soup.find_all(True)}
    assert not tags & {"script", "svg", "iframe", "object", "embed", "form", "button", "link", "base", "img", "textarea"}
    assert len(soup.find_all("style")) == 1 and len(soup.find_all("title")) == 1
    assert {meta.get("http-equiv") for meta in soup.find_all("meta")} == {None, "Content-Security-Policy"}
    assert soup.find("meta", {"http-equiv": True})["content"].startswith("default-src 'none'")
    for tag in soup.find_all(True):
        assert not [name for name in tag.attrs if name.startswith("on")], tag
        assert re.match(r"#|$", tag.get("href", "")), tag
    # What was written is there to be read: nothing is swallowed.
    assert "<script>document.title='PWNED';window.ran=1</script>" in soup.get_text()


def test_a_hostile_cell_stays_in_its_row(made: Path) -> None:
    text = (made / "hostile.md").read_text(encoding="utf-8")
    soup = BeautifulSoup((made / "hostile.html").read_text(encoding="utf-8"), "html.parser")
    tables = [table for table in soup.find_all("table") if "claims" in table.get("class", ())]
    assert sum(len(table.find("tbody").find_all("tr")) for table in tables) == 3
    for table in tables:
        width = len(table.find_all("th"))
        assert all(len(row.find_all("td")) == width for row in table.find("tbody").find_all("tr"))
    assert not re.search(r"<(?!/?(code|details|summary)\b|!-- record sha256: )", text)
    # The only links are those of the titles, to their rows in the page; each has its anchor there.
    links = sorted(re.findall(r"\]\(([^)]*)\)", text))
    assert links == ["hostile.html#a.one", "hostile.html#a.one", "hostile.html#a.two"]
    assert text.count("](") == 3 and {row["id"] for row in soup.select("tr[data-verdict]")} == {"a.one", "a.two"}
    assert "://" not in text and "\x1b" not in text and "\u202e" not in text


def test_the_notebook_carries_no_html_and_no_script(made: Path) -> None:
    notebook = nbformat.read(made / "hostile.ipynb", as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert kinds <= {"text/markdown", "text/plain", "image/png"}
    said = "\n".join(output["data"].get("text/markdown", "") for output in outputs if "data" in output)
    assert "PWNED" in said
    assert not re.search(r"<(?!/?(code|details|summary)\b)", said)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    pytest.importorskip("selenium")
    file = Path(__file__).parents[2] / "tools" / "drive_dashboard.py"
    spec = importlib.util.spec_from_file_location("drive_dashboard", file)
    assert spec is not None and spec.loader is not None
    driving = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(driving)
    if driving.CHROMIUM is None or driving.DRIVER is None:
        pytest.skip("chromium and chromedriver are not installed")
    with driving.browser(tmp_path_factory.mktemp("browser")) as found:
        yield found


@pytest.mark.parametrize("policy", [True, False], ids=["with the policy", "without the policy"])
def test_a_browser_runs_nothing(made: Path, driver: Any, tmp_path: Path, policy: bool) -> None:
    """Escaping holds without the Content-Security-Policy, and is not what stands alone."""
    page = (made / "hostile.html").read_text(encoding="utf-8")
    if not policy:
        page = re.sub(r'<meta content="default-src[^>]*>|<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
        assert "default-src" not in page
    path = tmp_path / "page.html"
    path.write_text(page, encoding="utf-8")
    driver.get(path.as_uri())
    driver.execute_script("for (const d of document.querySelectorAll('details')) d.open = true")
    driver.execute_script(
        "for (const e of document.querySelectorAll('*')) for (const k of ['mouseover', 'focus', 'toggle', 'error', 'load'])"
        " e.dispatchEvent(new Event(k, {bubbles: true}))"
    )
    assert driver.current_url == path.as_uri()
    assert driver.execute_script("return window.ran") is None
    assert "PWNED" in driver.title and driver.title != "PWNED"  # its own title, which quotes the payloads
    assert driver.execute_script("return performance.getEntriesByType('resource').length") == 0


def test_the_browser_would_see_a_script_run(driver: Any, tmp_path: Path) -> None:
    """The test above can fail: the same payloads, not escaped, do run; and the policy alone stops them."""
    for policy, ran in (("", 1), (f'<meta http-equiv="Content-Security-Policy" content="{report.POLICY}">', None)):
        (tmp_path / "raw.html").write_text(f"<!doctype html>{policy}<body>{PAYLOADS[0]}{PAYLOADS[2]}", encoding="utf-8")
        driver.get((tmp_path / "raw.html").as_uri())
        assert driver.execute_script("return window.ran") == ran


def test_markdown_keeps_code_and_bold_and_changes_no_plain_text() -> None:
    plain = "A claim, 98.2% of row_scale (n = 3); rounding:bits=4,group=64 is 2-bit. Don't!"
    assert markdown(plain) == plain
    assert markdown("`a<b` and **bold**") == "<code>a&#60;b</code> and **bold**"
    assert markdown("2 ** 3 ** 4") == "2 &#42;&#42; 3 &#42;&#42; 4"
    assert markdown_of({"k|": ["<", 1, None]}) == {"k&#124;": ["&#60;", 1, None]}


def test_printable_spells_out_what_steers_a_terminal() -> None:
    assert printable("a\x1b[31m\r\u202e\x9b\udcff") == r"a\x1b[31m\r\u202e\x9b\udcff"
    assert printable("Größe ± 1") == "Größe ± 1"
    json.dumps(printable("\udcff")).encode()
