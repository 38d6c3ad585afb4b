"""The documentation site's hook for MkDocs: what is written elsewhere becomes a page, and nothing is copied into git.

README, CHANGELOG, CONTRIBUTING, the notebooks with their outputs and the reports appear under the paths that they have in
the repository, so that their links to each other hold; the commands come from their own help, the modules from their
docstrings.  Formulas become MathML, which browsers draw without a script.
"""

from __future__ import annotations

import base64
import re
import runpy
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import griffe
import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "agentforge"
FENCE = "``````"
FOLDED = '<details markdown="1">'  # Markdown inside is read as such
AUDITS = ("phase4_bitnet", "phase8_compression", "claims_vs_measurements")


def on_config(config: MkDocsConfig) -> None:
    """Complete the navigation by what there is."""
    sections = {name: pages for entry in config.nav for name, pages in entry.items()}
    sections["Notebooks"] += [f"notebooks/{path.stem}.md" for path in notebooks()]
    sections["Reports"] += [f"reports/{name}/{name}.md" for name in reports()]
    sections["Python"] += [f"api/{name}.md" for name in modules()]


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the pages and pictures that come from elsewhere."""
    for path, content in {**texts(), **dict(generated())}.items():
        files.append(File.generated(config, path, content=content))
    for path in [*ROOT.glob("reports/*/*.png"), ROOT / "examples" / "model_card.yaml"]:
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    for name in AUDITS:
        path = ROOT / "reports" / name / f"{name}.html"
        files.append(File.generated(config, f"reports/{name}/one-file.html", abs_src_path=str(path)))


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The guide links to the rest of the repository from docs/, where it is."""
    return markdown.replace("](../", "](") if page.file.src_uri == "guide.md" else markdown


def on_post_page(output: str, **_: Any) -> str:
    """The theme's search has no name for those who hear the page."""
    return output.replace(
        'data-md-component="search" role="dialog"', 'data-md-component="search" role="dialog" aria-label="Search"'
    )


def on_page_content(html: str, **_: Any) -> str:
    """Formulas as MathML; tables, which scroll on narrow screens, can be reached by the keyboard."""
    from latex2mathml.converter import convert

    def formula(match: re.Match[str]) -> str:
        display = "block" if match[1] == "div" else "inline"
        return convert(unescape(match[2]), display=display)

    html = html.replace("<table>", '<table tabindex="0">')
    return re.sub(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', formula, html, flags=re.DOTALL)


def notebooks() -> list[Path]:
    return sorted(ROOT.glob("notebooks/*.ipynb"))


def reports() -> list[str]:
    """The names of all reports, the audits first."""
    rest = sorted(path.stem for path in ROOT.glob("reports/*/*.md"))
    return [*AUDITS, *(name for name in rest if name not in AUDITS)]


def modules() -> list[str]:
    """The package's subpackages and single modules."""
    found = [path for path in PACKAGE.iterdir() if (path / "__init__.py").exists() or path.suffix == ".py"]
    return sorted(path.stem for path in found if not path.name.startswith("_") and path.stem != "cli")


def texts() -> dict[str, str]:
    """Path in the site -> text, of the pages that are files of the repository."""
    paths = [ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", ROOT / "notebooks" / "README.md"]
    paths += ROOT.glob("reports/*/*.md")
    found = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}
    found["readme.md"] = (ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "](")
    for name in AUDITS:  # the titles of an audit's rows lead to its page in one file, which has another name here
        path = f"reports/{name}/{name}.md"
        found[path] = found[path].replace(f"]({name}.html#", "](one-file.html#")
    # A notebook's page has the notebook's name.
    return {path: re.sub(r"(\]\([\w./]+)\.ipynb\)", r"\1.md)", text) for path, text in found.items()}


def generated() -> Iterator[tuple[str, str | bytes]]:
    """Path in the site and content, of what is made here."""
    for path in [*notebooks(), *sorted(ROOT.glob("notebooks/solutions/*.ipynb"))]:
        yield from notebook(path)
    yield "commands.md", commands()
    results = runpy.run_path(str(ROOT / "tools" / "readme.py"))["results"]
    yield "results.md", f"# What came out\n\n{results()}\n"
    yield "reports/index.md", report_index()
    yield "api/index.md", verbs()
    for name in modules():
        yield f"api/{name}.md", module(name)


def notebook(path: Path) -> Iterator[tuple[str, str | bytes]]:
    """A notebook's page, and its pictures."""
    parts: list[str] = []
    pictures = 0
    page = path.relative_to(ROOT).with_suffix("")
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type == "markdown":
            text = cell.source.replace("<details>", FOLDED)
            parts.append(re.sub(r"(\]\([\w./]+)\.ipynb\)", r"\1.md)", text))
            continue
        code = f"{FENCE}python\n{cell.source}\n{FENCE}"
        folded = cell.metadata.get("jupyter", {}).get("source_hidden")
        parts.append(f"{FOLDED}<summary>Code of the figure</summary>\n\n{code}\n\n</details>" if folded else code)
        for output in [] if "slider" in cell.metadata.get("tags", []) else cell.outputs:
            data = output.get("data", {})
            if "image/png" in data:
                pictures += 1
                yield f"{page.as_posix()}-{pictures}.png", base64.b64decode(data["image/png"])
                parts.append(f"![{output.metadata['image/png']['alt']}]({page.name}-{pictures}.png)")
            else:
                error = output.output_type == "error"
                text = f"{output.ename}: {output.evalue}" if error else output.get("text") or data["text/plain"]
                parts.append(f"{FENCE}{{.text .output}}\n{text.rstrip()}\n{FENCE}")
    yield f"{page.as_posix()}.md", "\n\n".join(parts) + "\n"


def commands() -> str:
    """What `agentforge --help` and the commands' own --help say, as typer writes it."""
    import typer
    from typer.cli import get_docs_for_click

    from agentforge.cli import app

    command = typer.main.get_command(app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command), name="agentforge", title="Commands")
    # Its overview cuts the sentences off; each stands whole below.
    return re.sub(r"\*\*Commands\*\*:\n\n(\* .*\n)+", "", text)


def report_index() -> str:
    """All reports, by the first heading that each has."""
    lines = ["# Reports", "", "Each is drawn from records of measurements that lie beside it in `reports/`.", ""]
    for name in reports():
        title = (ROOT / "reports" / name / f"{name}.md").read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
        whole = f" (also as [one file]({name}/one-file.html))" if name in AUDITS else ""
        lines.append(f"* [{title}]({name}/{name}.md){whole}")
    return "\n".join(lines) + "\n"


def verbs() -> str:
    """The public verbs."""
    import agentforge

    names = [name for name in agentforge.__all__ if name not in modules()]
    return "\n\n".join(["# Python", "`import agentforge as af` has these verbs:", *(f"::: agentforge.{n}" for n in names)])


def module(name: str) -> str:
    """A module, or a subpackage with its modules."""
    path = PACKAGE / name
    parts = [f"# {name}"]
    if path.is_dir():
        names = sorted(file.stem for file in path.glob("*.py") if not file.name.startswith("_"))
        parts += [f"::: agentforge.{name}\n    options:\n      members: false"]
        parts += [f"::: agentforge.{name}.{child}" for child in names]
    else:
        parts.append(f"::: agentforge.{name}")
    return "\n\n".join(parts)


class PlainText(griffe.Extension):
    """Docstrings are plain text, written beside the code: as Markdown they must say the same."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            names = [parameter.name for parameter in getattr(obj, "parameters", ())]
            names += [name for name, member in obj.members.items() if member.is_attribute] if obj.is_class else []
            obj.docstring.value = plain(obj.docstring.value, names)


def plain(text: str, names: list[str]) -> str:
    """Markdown of a docstring.  names: of parameters and fields, each of which gets a line of its own."""
    said = "|".join(map(re.escape, names)) or r"(?!)"
    lead = re.compile(rf"(?m)(?:^|(?<=\.  ))((?:{said})(?:, (?:{said}))*): ")
    lines: list[str] = []
    for line in text.splitlines():
        if line.startswith("    "):  # a block, shown as it is
            lines.append(line)
            continue
        bullet, rest = ("* ", line[2:]) if line.startswith("* ") else ("", line)
        pieces = rest.split("`")
        pieces[::2] = [re.sub(r"[\\*_<>&$\[\]]", lambda sign: f"&#{ord(sign[0])};", piece) for piece in pieces[::2]]
        lines.append(bullet + "`".join(pieces))
    return lead.sub(r"\n\n* `\1`: ", "\n".join(lines))
