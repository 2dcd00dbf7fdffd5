"""How a name is shown: a function for each place where one may stand.

A name is whatever the file system, a recipe or a class folder gives: it may hold markup, line ends,
and bytes that no encoding knows, which Python keeps as lone surrogates (``os.fsdecode``).
"""

from __future__ import annotations

import html
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

# Line ends and other control characters, lone surrogates.
_UNSHOWN = ("Cc", "Cs", "Zl", "Zp")
_LONGEST_IN_PLOT = 60
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>()#+!|~&$])")


def on_a_line(name: object) -> str:
    """In a message or a table: what would break the line, or isn't text, as its escape (``\\udcff``).

    A whole sentence with names in it may be given.
    """
    return "".join(
        letter.encode("unicode_escape").decode()
        if unicodedata.category(letter) in _UNSHOWN
        else letter
        for letter in str(name)
    )


def in_html(name: object) -> str:
    """In the text or an attribute of a page."""
    return html.escape(on_a_line(name))


def in_markdown(name: object) -> str:
    """In the text of a card."""
    return _MARKDOWN.sub(r"\\\1", on_a_line(name))


def in_plot(name: object) -> str:
    """In a figure: matplotlib leaves labels that begin with an underscore out of a legend, and a
    long one leaves no room for the axes."""
    text = on_a_line(name)
    longest = _LONGEST_IN_PLOT
    if any(unicodedata.east_asian_width(letter) in "WF" for letter in text):
        longest //= 2
    if len(text) > longest:
        text = f"{text[: longest // 2]}…{text[-longest // 2 :]}"
    return f" {text}" if text.startswith("_") else text


def first_names(names: Sequence[str], most: int) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


@contextmanager
def in_utf8(folder: Path) -> Iterator[Path]:
    """Within it the folder, under a name for libraries that take UTF-8 alone."""
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        held = os.open(folder, os.O_RDONLY)
        try:
            yield Path(f"/proc/{os.getpid()}/fd/{held}")
        finally:
            os.close(held)
    else:
        yield folder
