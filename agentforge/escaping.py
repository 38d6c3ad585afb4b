"""Text from others, made harmless for display: as Markdown or HTML, and in a terminal."""

from __future__ import annotations

import re
from typing import Any

# What Markdown, HTML or mathematics could read as more than itself: everywhere, around a word, in a URL, as a line begins.
_MARKUP = re.compile(r"[&<>\"\\`*\[\]{}|$~]|(?<!\w)_|_(?!\w)|:(?=//)|^[-+=#:]|^\d(?=\d*[.)])")


def printable(text: object) -> str:
    """Text in one line, whatever would steer a terminal or turn its direction (ESC, CR, a bidi override) spelt out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(text))


def markdown(text: object) -> str:
    """Text in one line, so that Markdown and HTML show it as it is.  `code` and **bold** are kept, nothing else is.

    Every character that could be read as markup becomes a character reference, which is text wherever it stands, in
    an attribute and in a cell of a table, too.
    """
    line = printable(" ".join(str(text).split()))
    escaped = _MARKUP.sub(lambda found: f"&#{ord(found[0])};", line)
    escaped = re.sub(r"&#96;((?:(?!&#96;).)+)&#96;", r"<code>\1</code>", escaped)
    return re.sub(r"&#42;&#42;(?=\S)((?:(?!&#42;|<).)+)(?<=\S)&#42;&#42;", r"**\1**", escaped)


def markdown_of(data: Any) -> Any:
    """JSON data, every text in it made fit for Markdown, keys included."""
    if isinstance(data, dict):
        return {markdown(key): markdown_of(value) for key, value in data.items()}
    if isinstance(data, list):
        return [markdown_of(value) for value in data]
    return markdown(data) if isinstance(data, str) else data
