"""The documentation site builds without network, its links lead somewhere, and what its start page says is so."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
check = runpy.run_path(str(ROOT / "tools" / "links.py"))["check"]
# Where a download would be asked for, nobody answers.
NOWHERE = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        env={
            **os.environ,
            **NOWHERE,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "NO_MKDOCS_2_WARNING": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_every_link_of_the_site_leads_somewhere_and_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    faults, hosts = check(site)
    assert not faults
    assert hosts["arxiv.org"] > 10


@pytest.mark.slow
def test_the_site_has_a_page_for_all_there_is(site: Path) -> None:
    for path in [*ROOT.glob("notebooks/**/*.ipynb"), *ROOT.glob("reports/*/*.md")]:
        if ".ipynb_checkpoints" not in path.parts:
            assert (site / path.relative_to(ROOT)).with_suffix(".html").is_file(), path
    commands = (site / "commands.html").read_text()
    for name in ("compress", "fit", "verify", "evaluate", "recover", "pipeline", "audit"):
        assert f'id="agentforge-{name}"' in commands
    stages = (site / "api" / "stages.html").read_text()
    assert 'id="agentforge.stages.vptq.Vptq"' in stages
    notebook = (site / "notebooks" / "01_ternary_quantization.html").read_text()
    assert (
        "<math" in notebook and "<img" in notebook and "\\(" not in re.sub(r"<code.*?</code>", "", notebook, flags=re.DOTALL)
    )
    assert "<summary>Code of the figure</summary>" in notebook and "<summary>Hint</summary>" in notebook
    assert '<div class="md-search" data-md-component="search" role="dialog" aria-label="Search">' in notebook
    pictures = re.findall(r"<img[^>]*_quantization-\d[^>]*>", notebook)
    assert pictures and all(re.search(r'alt="[^"]{20,}"', picture) for picture in pictures)


def test_the_start_pages_first_commands_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from agentforge import cli

    section = (ROOT / "docs" / "index.md").read_text().partition("## Compress, look, check")[2]
    commands = section.split("```")[1].split("\n")
    commands = [command for command in commands if command]
    assert len(commands) == 4
    monkeypatch.chdir(tmp_path)
    for command in commands:
        monkeypatch.setattr(sys, "argv", command.split())
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert left.value.code == 0, command


@pytest.mark.parametrize("page", ["README.md", "docs/guide.md"])
def test_the_python_of_readme_and_guide_runs_on_another_model(
    page: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_llama: Path
) -> None:
    """As it stands, but for the model's name, in the folder where the commands before it have left small/."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "agentforge.json").write_text("{}")
    (code,) = re.findall(r"```python\n(import agentforge as af\n.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert code.count("smollm2-135m") == 1
    exec(code.replace("smollm2-135m", str(tiny_llama)), {})
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("ternary: 14 of ") and said[1].startswith("what ") and len(said) == 8
    assert re.fullmatch(r"[\d.e-]+ ± [\d.e-]+ nats/token \(n = 2,047\)", said[-1]), said[-1]


def test_a_docstring_says_on_a_page_what_it_says_in_the_code() -> None:
    import markdown

    plain = runpy.run_path(str(ROOT / "tools" / "docs.py"))["plain"]
    text = (
        "Let w ~ 2**(b - 1) * x_i * y_i | of [a][b] and <tag>, `a*b_c*`, E[x x^T].\n\n"
        "* first: 1 * 2 * 3\n* second\n\n    block * of * code\n\n"
        "bits: 2 to 8.  group, other: weights.  Raises BadInput: never."
    )
    html = markdown.markdown(plain(text, ["bits", "group", "other"]))
    said = unescape(re.sub(r"<[^>]+>", "", html))
    expected = text.replace("`", "").replace("* first", "first").replace("* second", "second")
    assert "".join(said.split()) == "".join(expected.split())
    assert html.count("<li>") == 4
    assert "<code>group, other</code>" in html


GOOD = (
    '<a href="b.html#here">b</a><img src="p.png"><a href="https://example.org/x">x</a><p id="top"></p><a href="#top">t</a>'
)


@pytest.mark.parametrize(
    ("page", "said"),
    [
        ('<a href="c.html">c</a>', "c.html leads nowhere"),
        ('<a href="b.html#there">b</a>', "b.html#there has no such anchor"),
        ('<a href="#bottom">b</a>', "#bottom has no such anchor"),
        ('<a href="../secret.html">s</a>', "../secret.html leads nowhere"),
        ('<img src="q.png">', "q.png leads nowhere"),
        ('<script src="https://example.org/x.js"></script>', "loads https://example.org/x.js"),
        ('<link rel="stylesheet" href="//example.org/x.css">', "loads //example.org/x.css"),
        ('<img srcset="p.png 1x, http://example.org/q.png 2x">', "loads http://example.org/q.png"),
        ('<p style="background: url(https://example.org/b.png)">', "loads https://example.org/b.png"),
        ("<style>@import 'https://example.org/f.css'</style>", "loads https://example.org/f.css"),
    ],
)
def test_the_link_checker_sees_a_fault(tmp_path: Path, page: str, said: str) -> None:
    site = tmp_path / "site"
    site.mkdir()
    (tmp_path / "secret.html").write_text("<p>")
    (site / "b.html").write_text('<h2 id="here">')
    (site / "p.png").write_bytes(b"")
    (site / "a.html").write_text(GOOD)
    faults, hosts = check(site)
    assert not faults and hosts == {"example.org": 1}
    (site / "a.html").write_text(GOOD + page)
    assert check(site)[0] == [f"a.html: {said}"]


def test_the_link_checker_reads_style_sheets_and_refuses_an_empty_site(tmp_path: Path) -> None:
    assert check(tmp_path)[0] == [f"{tmp_path}: no pages"]
    (tmp_path / "a.html").write_text(GOOD.replace("b.html#here", "a.html").replace("p.png", "a.html"))
    (tmp_path / "s.css").write_text("@font-face { src: url(https://example.org/f.woff2) }")
    assert check(tmp_path)[0] == ["s.css: loads https://example.org/f.woff2"]
