"""The pages of ``fastokd watch`` around the reports: the list of runs, and the frame of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlencode

from fastokd.host.names import in_html
from fastokd.overview.columns import COLUMNS, MEANING, counts
from fastokd.overview.listing import STATES, Listed
from fastokd.report.style import STYLE, digest

KIND = "text/html; charset=utf-8"

_LIST_STYLE = """
nav a { margin-right: 1rem; } nav a[aria-current] { font-weight: 700; text-decoration: none; }
th a { color: inherit; } td small { white-space: normal; max-width: 30rem; }
td:first-child { min-width: 9rem; } .running { color: var(--c2); } .failed { color: var(--c1); }
.running::before { content: "● "; } .failed::before { content: "✕ "; }
"""
# Asks for the page again and puts in what has changed: neither the scroll position nor the focus is lost.
_LIST_SCRIPT = """
let tag = "";
async function look() {
  try {
    const got = await fetch(location.href, {cache: "no-store", headers: {"If-None-Match": tag}});
    if (got.ok) {
      tag = got.headers.get("ETag") || "";
      const page = new DOMParser().parseFromString(await got.text(), "text/html");
      const focused = document.activeElement && document.activeElement.getAttribute("href");
      for (const id of ["counts", "states", "rows"]) {
        const [now, next] = [document, page].map(where => where.getElementById(id));
        if (now.innerHTML !== next.innerHTML) now.innerHTML = next.innerHTML;
      }
      if (focused && document.activeElement === document.body) {
        const again = [...document.links].find(link => link.getAttribute("href") === focused);
        if (again) again.focus({preventScroll: true});
      }
    }
    document.getElementById("lost").hidden = true;
  } catch { document.getElementById("lost").hidden = false; }
  setTimeout(look, document.hidden ? 10000 : 2000);
}
setTimeout(look, 2000);
"""
_FRAME_STYLE = """
html, body { height: 100%; margin: 0; padding: 0; max-width: none; }
body { display: flex; flex-direction: column; }
header { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; align-items: baseline; padding: .4rem 1rem;
  border-bottom: 1px solid var(--line); }
header h1 { font-size: 1rem; margin: 0; } main { flex: 1; position: relative; }
iframe { position: absolute; inset: 0; width: 100%; height: 100%; border: 0; }
iframe.coming { visibility: hidden; }
"""
# Loads a new page behind the old one, scrolls and opens it alike, and then shows it.
_FRAME_SCRIPT = """
const said = document.getElementById("said"), paused = document.getElementById("paused");
let shown = document.querySelector("iframe").dataset.version, coming = null;
function alike(old, fresh) {
  const [from, to] = [old, fresh].map(frame => frame.contentDocument);
  from.querySelectorAll("details").forEach((one, at) => {
    const other = to.querySelectorAll("details")[at]; if (other) other.open = one.open; });
  from.querySelectorAll(".scroll").forEach((one, at) => {
    const other = to.querySelectorAll(".scroll")[at]; if (other) other.scrollLeft = one.scrollLeft; });
  fresh.contentWindow.scrollTo(old.contentWindow.scrollX, old.contentWindow.scrollY);
  return Math.abs(fresh.contentWindow.scrollY - old.contentWindow.scrollY) < 2;
}
function load(version) {
  const old = document.querySelector("iframe"), fresh = old.cloneNode();
  coming = version; fresh.className = "coming"; fresh.src = "page?" + version;
  fresh.onload = () => {
    let tries = 0;
    (function settle() {  // figures that are drawn by scripts make the page longer
      if (!alike(old, fresh) && ++tries < 20) { setTimeout(settle, 100); return; }
      fresh.className = ""; old.remove(); shown = version; coming = null;
    })();
  };
  old.after(fresh);
}
async function look() {
  try {
    const got = await fetch("state.json", {cache: "no-store"});
    if (got.status === 404) said.textContent = "this run is gone";
    else {
      const state = await got.json();
      said.textContent = state.says;
      if (state.version && state.version !== shown && !coming && !paused.checked) load(state.version);
    }
  } catch { said.textContent = "the server doesn't answer"; }
  setTimeout(look, document.hidden ? 10000 : 2000);
}
look();
"""


_SCRIPTS, _STYLES = (
    (_LIST_SCRIPT, _FRAME_SCRIPT),
    (STYLE + _LIST_STYLE, STYLE + _FRAME_STYLE, STYLE),
)
_COMMON = "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:"
POLICY = (
    f"{_COMMON}; script-src {' '.join(map(digest, _SCRIPTS))}; style-src {' '.join(map(digest, _STYLES))}; "
    "connect-src 'self'; frame-src 'self'; frame-ancestors 'none'"
)
# A report's scripts and styles are in the page; it loads nothing.
PAGE_POLICY = (
    f"{_COMMON} blob:; script-src 'unsafe-inline'; style-src 'unsafe-inline'; font-src data:; "
    "frame-ancestors 'self'"
)


def index(
    shown: Sequence[tuple[str, Listed]],
    every: Sequence[Listed],
    asked: Mapping[str, str],
    tops: Sequence[Path],
) -> str:
    """The list of runs, each with its key. ``asked``: ``sort`` and ``state`` of the URL."""
    where = ", ".join(map(str, tops))
    by = asked.get("sort", "run")
    heads = "".join(_head(name, by, asked) for name in COLUMNS)
    rows = "\n".join(_row(key, run) for key, run in shown)
    body = (
        f'<h1>Runs in {in_html(where)}</h1><p id="counts" role="status">{in_html(counts(every))}</p>'
        '<p id="lost" role="alert" hidden>The server doesn\'t answer: this is what it said last.</p>'
        f'<nav id="states" aria-label="States">{_states(every, asked)}</nav>'
        f'<div class="scroll" tabindex="0"><table><thead><tr>{heads}</tr></thead>'
        f'<tbody id="rows">\n{rows}\n</tbody></table></div>'
        f'<p class="note">{in_html(MEANING)}; size: of all files. The same as JSON: '
        '<a href="state.json">state.json</a>.</p>'
        f"<script>{_LIST_SCRIPT}</script>"
    )
    again = '<noscript><meta http-equiv="refresh" content="10"></noscript>'
    return _whole(f"Runs in {where}", _STYLES[0], body, again)


def frame(run: Listed, version: str) -> str:
    """A run's page of a ``version`` in a frame, with a line above it that says how far it is."""
    name = in_html(run.folder)
    body = (
        f'<header><a href="../../">All runs</a><h1>{name}</h1><span id="said" role="status">'
        f'{in_html(says(run))}</span><label><input type="checkbox" id="paused"> pause</label>'
        '<a href="page" target="_blank" rel="noopener">the page alone</a></header>'
        f'<main><iframe title="Report of {name}" src="page" data-version="{version}"></iframe></main>'
        f"<script>{_FRAME_SCRIPT}</script>"
    )
    return _whole(str(run.folder), _STYLES[1], body)


def note(text: str, *, soon: bool = False) -> str:
    """A page with one sentence. ``soon``: it is loaded again after two seconds."""
    again = '<meta http-equiv="refresh" content="2">' if soon else ""
    return _whole("fastokd", STYLE, f"<p>{in_html(text)}</p>", again)


def says(run: Listed) -> str:
    """A run's state in words."""
    parts = [run.state]
    if run.epoch is not None:
        parts.append(f"epoch {run.epoch} of {run.epochs}")
    if run.top1 is not None:
        parts.append(f"test top-1 {run.top1:.4f}")
    return ", ".join(parts) + (f": {run.reason}" if run.reason else "")


def _whole(title: str, style: str, body: str, again: str = "") -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,">{again}<title>{in_html(title)}</title>'
        f"<style>{style}</style></head><body>{body}</body></html>\n"
    )


def _link(text: str, asked: Mapping[str, str], more: str = "") -> str:
    return f'<a href="./?{in_html(urlencode(asked))}"{more}>{text}</a>'


def _head(name: str, by: str, asked: Mapping[str, str]) -> str:
    """A column's heading, which sorts by it; a second time the other way round."""
    sorted_by = by.removeprefix("-") == name
    other = f"-{name}" if by == name else name
    order = (
        f' aria-sort="{"descending" if by.startswith("-") else "ascending"}"' if sorted_by else ""
    )
    arrow = (" ▼" if by.startswith("-") else " ▲") if sorted_by else ""
    kind = "" if COLUMNS[name].number else ' class="text"'
    return f'<th scope="col"{kind}{order}>{_link(name + arrow, {**asked, "sort": other})}</th>'


def _states(every: Sequence[Listed], asked: Mapping[str, str]) -> str:
    found = [run.state for run in every]
    rest = {name: value for name, value in asked.items() if name == "sort"}
    links = []
    for state in (None, *STATES):
        count = len(found) if state is None else found.count(state)
        if count or state == asked.get("state"):
            current = ' aria-current="true"' if state == asked.get("state") else ""
            to = rest if state is None else {**rest, "state": state}
            links.append(_link(f"{state or 'all'} {count}", to, current))
    return " ".join(links)


def _row(key: str, run: Listed) -> str:
    cells = []
    for name, column in COLUMNS.items():
        text = in_html(column.text(run))
        if name == "run":
            text = f'<a href="run/{key}/">{text}</a>'
        if name == "state":
            text = f'<span class="{run.state}">{text}</span>'
            text += f"<small>{in_html(run.reason)}</small>" if run.reason else ""
        kind = "" if column.number else ' class="text"'
        cells.append(f"<td{kind}>{text}</td>")
    return f"<tr>{''.join(cells)}</tr>"
