"""Escapes names for each place where they are shown.

Names come from file systems, recipes and class folders. They may hold markup, line ends, and bytes
that aren't UTF-8, which Python keeps as lone surrogates (``os.fsdecode``).
"""

from __future__ import annotations

import csv
import html
import io
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

# Line ends and other control characters, lone surrogates.
_UNSHOWN = ("Cc", "Cs", "Zl", "Zp")
_LONGEST_IN_PLOT = 60
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>#+!|~&$])")
# Braces around "*" and "[": after the end of a row they would be its options.
_LATEX = str.maketrans(
    {
        **{letter: f"\\{letter}" for letter in "&%$#_{}"},
        **{letter: f"{{{letter}}}" for letter in "*[]"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        '"': r"\char34{}",
        "`": r"\textasciigrave{}",
        "±": r"$\pm$",
    }
)


def on_a_line(name: object) -> str:
    """For a message or a table: control characters and lone surrogates are escaped (``\\udcff``).

    Takes whole sentences too.
    """
    return "".join(
        letter.encode("unicode_escape").decode()
        if unicodedata.category(letter) in _UNSHOWN
        else letter
        for letter in str(name)
    )


def in_html(name: object) -> str:
    """For the text or an attribute of an HTML page."""
    return html.escape(on_a_line(name))


def in_markdown(name: object) -> str:
    """For Markdown text."""
    return _MARKDOWN.sub(r"\\\1", on_a_line(name))


def in_latex(name: object) -> str:
    """For LaTeX text."""
    return on_a_line(name).translate(_LATEX).replace("--", "-{}-")


def in_plot(name: object) -> str:
    """For a figure. matplotlib omits labels with a leading underscore from a legend, so they get a
    space; long names are shortened to leave room for the axes."""
    text = on_a_line(name)
    longest = _LONGEST_IN_PLOT
    if any(unicodedata.east_asian_width(letter) in "WF" for letter in text):
        longest //= 2
    if len(text) > longest:
        text = f"{text[: longest // 2]}…{text[-longest // 2 :]}"
    return f" {text}" if text.startswith("_") else text


def as_csv(rows: Iterable[Sequence[object]]) -> str:
    """Rows as the text of a CSV file, with the format's own line ends, so that a cell may hold any."""
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue()


def counted(count: int, noun: str) -> str:
    """``1 epoch``, ``2 epochs``, ``1,000 classes``."""
    if count != 1:
        noun += "es" if noun.endswith(("s", "tch")) else "s"
    return f"{count:,} {noun}"


def first_names(names: Sequence[str], most: int) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


@contextmanager
def in_utf8(folder: Path) -> Iterator[Path]:
    """Gives a path to ``folder`` that is valid UTF-8, for libraries that accept no other."""
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


def in_prefix(count: float) -> str:
    """``1.23e12`` as ``"1.23 T"``."""
    for power, prefix in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if count >= 0.9995 * 10**power:
            return f"{count / 10**power:.3g} {prefix}"
    return f"{count:.3g}"
