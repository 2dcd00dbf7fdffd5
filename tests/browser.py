"""A page in a real browser, for tests."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium")


def asked(page: str, folder: Path, script: str, width: int = 1300) -> Any:
    """What the body ``script`` of an async function returns in the loaded page, whose policy also admits it
    here, as JSON would hold it."""
    assert CHROMIUM is not None
    probe = (
        "addEventListener('load', async () => { await window.drawn; let found;"
        f"try {{ found = await (async () => {{ {script} }})() }} catch (e) {{ found = String(e) }}"
        "document.title = 'found ' + JSON.stringify(found) });"
    )
    digest = base64.b64encode(hashlib.sha256(probe.encode()).digest()).decode()
    text = page.replace("script-src ", f"script-src 'sha256-{digest}' ", 1)
    head, _, _ = text.rpartition("</body>")  # the libraries have that text, too
    probed = folder / "probed.html"
    probed.write_text(f"{head}<script>{probe}</script></body></html>")
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900",
         f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=20000", "--dump-dom",
         probed.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    title = re.search(r"<title>found (.*)</title>", done.stdout)
    assert title is not None, done.stdout[-1000:]
    return json.loads(html.unescape(title[1]))
