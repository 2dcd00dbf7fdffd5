"""The stylesheet of a report."""

import base64
import hashlib

STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8882; --page: #fff; --shade: #0005;
  --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #cc79a7;
  --c4: #e69f00; --c5: #56b4e9; --c6: #7f7f7f; --c7: #8c564b; }
@media (prefers-color-scheme: dark) { :root { --page: #16181b; --shade: #fff6;
  --c0: #4aa3ea; --c1: #f58345; --c2: #2fc492; --c3: #e29ac6;
  --c4: #f2bb3f; --c5: #a4dcf7; --c6: #a8a8a8; --c7: #c79a8b; } }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 78rem;
  background: var(--page); overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
figure { margin: 1rem 0; min-width: 0; break-inside: avoid; }
figure svg { display: block; width: 100%; height: auto; }
figcaption, .note { font-size: .9rem; opacity: .8; max-width: 60rem; }
.note p { margin: .25rem 0; } :not(h2) + h3 { margin-top: 1.5rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr));
  gap: 1rem 2rem; align-items: start; }
/* A shadow at each edge where the table continues. */
.scroll { overflow-x: auto; margin: .5rem 0; background:
  linear-gradient(to right, var(--page) 1.5rem, #0000) left / 3rem 100% no-repeat local,
  linear-gradient(to left, var(--page) 1.5rem, #0000) right / 3rem 100% no-repeat local,
  linear-gradient(to right, var(--shade), #0000) left / .9rem 100% no-repeat scroll,
  linear-gradient(to left, var(--shade), #0000) right / .9rem 100% no-repeat scroll; }
.scroll::-webkit-scrollbar { height: .6rem; background: var(--soft); }
.scroll::-webkit-scrollbar-thumb { background: #888c; border-radius: .3rem; }
table { border-collapse: separate; border-spacing: 0; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: 5px .5rem; border-bottom: 1px solid var(--line); text-align: right;
  vertical-align: top; overflow-wrap: normal; }
th { vertical-align: bottom; font-weight: 600; line-height: 1.25; }
td { white-space: nowrap; }
th.text, td.text { text-align: left; }
th.group { text-align: center; border-bottom: 2px solid; }
thead td { border: 0; }
td.text:last-child { white-space: normal; overflow-wrap: break-word; min-width: 10rem; }
/* The row's name stays in sight. */
.scroll tr > :first-child { position: sticky; left: 0; z-index: 1; background: var(--page); }
.scroll thead tr > :first-child { background: linear-gradient(var(--soft) 0 0) var(--page); }
/* Whole pixels: a background that stays in sight would cover the line of the row above. */
tbody td, tbody th { line-height: 1.25rem; }
tbody th { min-width: 12rem; font-weight: 400; vertical-align: top; overflow-wrap: break-word; }
/* Of charts with many axes. */
.broad > figure { overflow-x: auto; } .broad .live { min-width: 38rem; }
tr.chosen > * { background: linear-gradient(var(--soft) 0 0) var(--page); font-weight: 600; }
th:has(> button) { padding: 0; }
th > button { font: inherit; color: inherit; background: none; border: 0; width: 100%; min-height: 1.75rem;
  padding: 5px .65rem 5px .5rem; text-align: inherit; position: relative; cursor: pointer; }
th > button::after { content: "↕"; position: absolute; right: 0; bottom: .3rem; font-size: .7em;
  opacity: .5; }
th[aria-sort] > button::after { content: "▲"; opacity: 1; }
th[aria-sort=descending] > button::after { content: "▼"; }
.filter { display: flex; flex-wrap: wrap; gap: .5rem .75rem; align-items: center; margin: .5rem 0;
  font-size: .85rem; }
.filter[hidden], tr[hidden] { display: none; }
.filter select, .filter input, .filter button { font: inherit; color: inherit; background: var(--page);
  border: 1px solid var(--line); border-radius: .3rem; min-height: 1.75rem; max-width: 12rem; }
tbody small { display: block; font-size: .75rem; opacity: .75; }
thead { background: var(--soft); }
details { margin-top: 1rem; } summary { cursor: pointer; }
pre { overflow-x: auto; background: var(--soft); padding: .6rem; font-size: .85rem; }
@media (max-width: 40rem) { tbody th { min-width: 7rem; max-width: 9rem; } }
@media print { body { max-width: none; } .scroll { overflow: visible; } table { font-size: .65rem; }
  details > * { display: block; } .filter > :not(output) { display: none; }
  /* What is positioned is left out of a table's head where that is repeated on the next page. */
  .scroll tr > :first-child, th > button { position: static; } tbody th { min-width: 0; }
  th > button { display: block !important; } th > button::after { content: none; } }
"""

# Of pages with charts.
CHARTS = """
main { display: block; }
h3 { font-size: 1rem; margin: 0 0 .5rem; }
a, summary, button { color: inherit; }
:focus-visible { outline: 3px solid var(--c0); outline-offset: 2px; }
.skip { position: absolute; left: -100vw; }
.skip:focus { left: 1rem; top: 0; z-index: 2; padding: .5rem 1rem; background: var(--page); }
figure.chart, figure:has(.static) { max-width: 40rem; }
figure.wide { grid-column: 1 / -1; max-width: none; }
figcaption { margin-top: .5rem; }
.live { width: 100%; min-width: 0; }
.live .vega-embed { width: 100%; display: block; }
.live svg { overflow: visible; }
figure:not(.drawn) .live, figure:not(.drawn) .legend, figure.drawn .static { display: none; }
.legend { display: flex; flex-wrap: wrap; gap: .25rem .5rem; }
.legend button { font: inherit; font-size: .85rem; line-height: 1.4; display: flex; align-items: center;
  gap: .4rem; max-width: 100%; min-height: 1.75rem; padding: .1rem .5rem; text-align: left; cursor: pointer;
  background: none; border: 1px solid var(--line); border-radius: .3rem; overflow-wrap: anywhere; }
.legend button[aria-pressed=false] { text-decoration: line-through; border-style: dashed; }
.legend button[aria-pressed=false] .swatch { visibility: hidden; }
.swatch { flex: none; width: 1.5rem; }
#vg-tooltip-element { visibility: hidden; position: fixed; z-index: 3; padding: .4rem .6rem; max-width: 90vw;
  pointer-events: none; font-size: .8rem; background: var(--page); border: 1px solid currentColor;
  border-radius: .3rem; font-variant-numeric: tabular-nums; }
#vg-tooltip-element.visible { visibility: visible; }
#vg-tooltip-element td { border: 0; padding: 0 .3rem; min-width: 0; overflow: hidden; text-overflow: ellipsis;
  max-width: 60vw; }
#vg-tooltip-element td.key { text-align: left; }
details.data { margin-top: .25rem; font-size: .9rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(15rem, 100%), 1fr)); gap: 1rem 2rem;
  margin: 1rem 0; }
.facts div { border-top: 2px solid var(--line); padding-top: .4rem; }
.facts div:first-child { grid-column: 1 / -1; border-top-color: var(--c0); }
.facts dt { font-size: .9rem; opacity: .8; }
.facts dd { margin: 0; font-size: 1.15rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.facts div:first-child dd { font-size: 2rem; line-height: 1.3; }
.facts small { display: block; font-size: .8rem; font-weight: normal; opacity: .8; line-height: 1.4; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1rem 2rem; }
.columns > div { min-width: 0; }
caption { text-align: left; font-size: .85rem; padding-bottom: .4rem; max-width: calc(100vw - 3rem); }
th[scope=row] { text-align: left; vertical-align: top; font-weight: normal; }
.matrix td, .matrix th { padding: .25rem; min-width: 1.6rem; text-align: center; }
.matrix th[scope=row] { text-align: right; overflow-wrap: normal; }
.matrix td { print-color-adjust: exact;
  background: color-mix(in srgb, var(--hue) calc(var(--share) * 60%), transparent); }
.matrix .right { --hue: var(--c0); } .matrix .wrong { --hue: var(--c1); }
.matrix .none { opacity: .6; }
.upright { writing-mode: vertical-rl; max-height: 10rem; overflow: hidden; }
.bar { print-color-adjust: exact; min-width: 8rem; background: linear-gradient(to right,
  color-mix(in srgb, var(--c0) 35%, transparent) calc(var(--share) * 100%), transparent 0); }
.stack { display: flex; height: 2.2rem; margin: .5rem 0; border-radius: .3rem; overflow: hidden; }
.part { flex-basis: 0; min-width: 2px; overflow: hidden; padding: .35rem .4rem; font-size: .85rem;
  white-space: nowrap; box-sizing: border-box; print-color-adjust: exact;
  background: color-mix(in srgb, var(--hue) 45%, transparent); border-left: 3px solid var(--hue); }
.part:empty { padding: 0; }
.mistakes { list-style: none; padding: 0; display: grid; gap: 1rem .5rem;
  grid-template-columns: repeat(auto-fill, minmax(min(11rem, 100%), 1fr)); }
.mistakes li { break-inside: avoid; min-width: 0; }
.mistakes img { image-rendering: pixelated; object-fit: contain; display: block; background: var(--soft); }
.mistakes table { font-size: .75rem; } .mistakes td, .mistakes th { padding: .1rem .4rem .1rem 0; min-width: 0; }
.mistakes td.text { white-space: normal; overflow-wrap: anywhere; min-width: 0; }
.mistakes .kept { font-weight: 600; } .mistakes .kept th { font-weight: 600; }
button[data-copies] { font: inherit; font-size: .85rem; padding: .2rem .7rem; background: none; cursor: pointer;
  border: 1px solid var(--line); border-radius: .3rem; }
section > pre, section pre[id] { white-space: pre-wrap; }
html:not(:has(figure.drawn)) .hint { display: none; }
@media (prefers-reduced-motion: reduce) { * { transition: none !important; animation: none !important; } }
@media print {
  figure.drawn .static { display: block; } .bar { min-width: 0; }
  .figures, .columns { grid-template-columns: 1fr 1fr; }
  details:not(.data)::details-content { content-visibility: visible; display: block; }
  .live, .legend, .skip, .hint, details.data, button { display: none !important; }
  figure.chart:not(:has(.static)) .live { display: block !important; }
  details pre { columns: 2; font-size: .65rem; } tr, figure { break-inside: avoid; } thead { display: table-header-group; }
  h1, h2, h3 { break-after: avoid; } }
"""


def digest(text: str) -> str:
    """Of a script or style, as a Content-Security-Policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
