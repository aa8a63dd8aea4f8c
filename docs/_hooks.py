"""Docstrings of `trainers` are in the format of TRL, which MkDocs does not know all of."""

import re
from typing import Any

TYPE = re.compile(r"\(<code>([^<]*?)(?:, \*optional\*[^<]*)?</code>")
QUOTES = re.compile(r"\[`~?|`\]|`")
REFERENCE = re.compile(r"\[<code>~?([^<]*)</code>\]")


def on_page_content(html: str, **kwargs: Any) -> str:
    """The type alone for each parameter, whose default follows, and names without brackets."""
    html = TYPE.sub(lambda found: f"(<code>{QUOTES.sub('', found[1])}</code>", html)
    return REFERENCE.sub(r"<code>\1</code>", html)
