"""The page to try models in a browser: one file, with its script and its style inside, allowed by their digests alone."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from pathlib import Path

from starlette.responses import HTMLResponse

PAGE = Path(__file__).parent / "templates" / "try_page.html"


@functools.cache
def page() -> tuple[str, str]:
    """The page, and the policy under which it is shown: nothing from elsewhere, nothing to elsewhere."""
    text = PAGE.read_text(encoding="utf-8")
    digests = {}
    for tag in ("script", "style"):
        inside = re.search(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)[1]
        digests[tag] = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digests['script']}'; style-src 'sha256-{digests['style']}'; "
        "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text, policy


def answer() -> HTMLResponse:
    text, policy = page()
    return HTMLResponse(text, headers={"content-security-policy": policy})
