"""A page in a real browser, for tests."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium")


def asked(page: str, folder: Path, script: str, width: int = 1300) -> Any:
    """What the body ``script`` of an async function returns in the loaded page, as JSON would hold it.

    The page's own policy admits only its own scripts, so it is left out here.
    """
    assert CHROMIUM is not None
    probe = (
        "<script>addEventListener('load', async () => { await window.drawn; let found;"
        f"try {{ found = await (async () => {{ {script} }})() }} catch (e) {{ found = String(e) }}"
        "document.title = 'found ' + JSON.stringify(found) });</script></body>"
    )
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    head, _, _ = text.rpartition("</body>")  # the libraries have that text, too
    probed = folder / "probed.html"
    probed.write_text(head + probe)
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900",
         f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=20000", "--dump-dom",
         probed.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    title = re.search(r"<title>found (.*)</title>", done.stdout)
    assert title is not None, done.stdout[-1000:]
    return json.loads(html.unescape(title[1]))
