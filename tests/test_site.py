"""The site that `make docs` builds: its groups, titles and links, and how pages look on a phone and at night."""

from __future__ import annotations

import functools
import html
import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {str(page.relative_to(DOCS)) for page in [*DOCS.glob("*.md"), *DOCS.glob("methods/*.md")]}
LINK = re.compile(r"\[([^\]]*)\]\(([\w./-]+\.md)(?:#[\w-]+)?\)")


def title(page: str) -> str:
    return (DOCS / page).read_text().split("\n")[0].removeprefix("# ")


def groups(page: str) -> dict[str, list[str]]:
    """The pages of each table of contents on ``page``, by its caption."""
    found = {}
    for block in re.findall(r"```\{toctree\}\n(.*?)```", (DOCS / page).read_text(), re.DOTALL):
        caption = re.search(r"^:caption: (.+)$", block, re.MULTILINE)
        names = [line for line in block.splitlines() if line and not line.startswith(":")]
        found[caption[1] if caption else ""] = [f"{name}.md" for name in names]
    return found


def test_every_page_is_in_one_group_of_the_sidebar() -> None:
    index = groups("index.md")
    assert all(index), "a group has no caption"
    times = Counter(
        page for pages in (*index.values(), *groups("methods.md").values()) for page in pages
    )
    assert times == dict.fromkeys(PAGES - {"index.md"}, 1)


def test_links_of_index_tables_are_titles() -> None:
    """The sidebar takes its links from the titles; none is given by hand."""
    for page in ("index.md", "methods.md"):
        for pages in groups(page).values():
            assert not [name for name in pages if "<" in name]
        for line in (DOCS / page).read_text().splitlines():
            for text, target in LINK.findall(line if line.startswith("|") else ""):
                assert text == title(target), f"{page}: {target}"


@pytest.mark.parametrize("page", sorted(PAGES))
def test_no_link_is_named_by_its_file(page: str) -> None:
    for text, target in LINK.findall((DOCS / page).read_text()):
        assert not text.endswith(".md"), f"{target}: write {title(Path(target).name)!r}"


@pytest.mark.parametrize("drawing", sorted(DOCS.rglob("*.svg")), ids=lambda drawing: drawing.name)
def test_drawings_are_on_white(drawing: Path) -> None:
    """docs/_static/site.css inverts them in the dark theme, whatever the system's own theme is."""
    text = drawing.read_text()
    assert re.search(r'<rect width="100%" height="100%" fill="(white|#fff)"', text)
    assert "prefers-color-scheme" not in text


HARNESS = """<!doctype html><iframe id="frame" style="border:0;width:400px;height:900px"></iframe><pre></pre><script>
(async () => {
  const wide = {};
  for (const page of PAGES) {
    await new Promise(loaded => { frame.onload = loaded; frame.src = page; });
    const inside = frame.contentDocument;
    for (const whole of [inside.documentElement, inside.querySelector(".content")])
      if (whole.scrollWidth > whole.clientWidth) wide[page] = whole.scrollWidth;
  }
  document.querySelector("pre").textContent = JSON.stringify(wide);
})();
</script>"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; a warning is an error."""
    pytest.importorskip("sphinx")
    pytest.importorskip("sphinx_copybutton")
    built = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    done = subprocess.run(
        [*command, str(DOCS), str(built)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return built


@pytest.mark.proof
def test_code_can_be_copied(site: Path) -> None:
    page = (site / "start.html").read_text()
    assert "copybutton.js" in page
    assert "site.css" in page


@pytest.mark.proof
def test_no_page_is_wider_than_a_phone(site: Path, tmp_path: Path) -> None:
    """Wide code and tables scroll by themselves."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs chromium")
    pages = sorted(str(page.relative_to(site)) for page in site.rglob("*.html"))
    (site / "phone.html").write_text(HARNESS.replace("PAGES", json.dumps(pages)))
    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        seen = subprocess.run(
            [
                chromium,
                *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
                *("--virtual-time-budget=600000", "--dump-dom", f"--user-data-dir={tmp_path}"),
                f"http://127.0.0.1:{server.server_port}/phone.html",
            ],
            capture_output=True,
            text=True,
            timeout=300,
        )
        server.shutdown()
    (wide,) = re.findall(r"<pre>(.*?)</pre>", seen.stdout, re.DOTALL)
    assert json.loads(html.unescape(wide)) == {}


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves the site without a log."""

    def log_message(self, *_: object) -> None:
        pass
