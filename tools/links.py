"""Check the links of a built site: python tools/links.py FOLDER

Exit code 1 if a link inside the site leads nowhere, anchors included, or if a page or a style sheet would load
anything from elsewhere (script, style, font, picture).  Links that a reader may follow to elsewhere are counted by host.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADS = {"src", "srcset", "poster", "data", "xlink:href"}  # and href of <link>
ELSEWHERE = re.compile(r"\s*(?:https?:)?//", re.IGNORECASE)
IN_STYLES = re.compile(r"""(?:url\(|@import)\s*["']?\s*((?:https?:)?//[^"')\s]*)""", re.IGNORECASE)


class Page(HTMLParser):
    """What a page refers to.  links: of <a> and <area>.  loads: what a browser fetches by itself.  ids: its anchors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.ids: set[str] = set()
        self._in_style = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._in_style = tag == "style"
        for name, value in attrs:
            if value is None:
                continue
            if name == "id" or (name == "name" and tag == "a"):
                self.ids.add(value)
            elif name == "href" and tag in ("a", "area"):
                self.links.append(value)
            elif name == "srcset":
                self.loads += [part.split()[0] for part in value.split(",") if part.strip()]
            elif name in LOADS or name == "href":
                self.loads.append(value)
            elif name == "style":
                self.loads += IN_STYLES.findall(value)

    def handle_data(self, data: str) -> None:
        if self._in_style:
            self.loads += IN_STYLES.findall(data)

    def handle_endtag(self, tag: str) -> None:
        self._in_style = False


def check(site: Path) -> tuple[list[str], Counter[str]]:
    """The faults of a site, one per line, and how many links lead to each host elsewhere."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    faults = [] if pages else [f"{site}: no pages"]
    hosts: Counter[str] = Counter()
    for path, page in pages.items():
        here = path.relative_to(site)
        for link in [*page.links, *page.loads]:
            parts = urlsplit(link)
            if parts.scheme in ("data", "mailto"):
                continue
            if parts.scheme or ELSEWHERE.match(link):
                if link in page.loads:
                    faults.append(f"{here}: loads {link}")
                hosts[parts.netloc or parts.scheme] += 1
                continue
            target = path
            if parts.path:
                start = site if parts.path.startswith("/") else path.parent
                target = (start / unquote(parts.path).lstrip("/")).resolve()
            if target.is_dir():
                target /= "index.html"
            if not target.is_file() or not target.is_relative_to(site.resolve()):
                faults.append(f"{here}: {link} leads nowhere")
            elif parts.fragment and unquote(parts.fragment) not in pages[target].ids:
                faults.append(f"{here}: {link} has no such anchor")
    for path in sorted(site.rglob("*.css")):
        found = IN_STYLES.findall(path.read_text(encoding="utf-8"))
        faults += [f"{path.relative_to(site)}: loads {link}" for link in found]
    return faults, hosts


def main() -> int:
    site = Path(sys.argv[1]).resolve()
    faults, hosts = check(site)
    print("links elsewhere, not followed: " + ", ".join(f"{host} ({n})" for host, n in hosts.most_common()))
    print("\n".join(faults) or "every link inside the site leads somewhere, and nothing is loaded from elsewhere")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
