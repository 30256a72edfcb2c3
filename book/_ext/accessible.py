"""Repairs to the markup of Sphinx and its extensions, for readers who hear a page or move in it by keyboard.

What can only be known in the browser is in _static/accessible.js. tests/test_accessible.py checks the built pages.
"""

from __future__ import annotations

import re
from typing import Any

from sphinx.application import Sphinx

REPAIRS = [
    # A signature's parameters, one a line: a definition list that defines nothing.
    (r'<dl>(?=\s*<dd><em class="sig-param">)', '<dl role="none">'),
    # The bibliography: a list of what are no list items, each with a role that is no longer used.
    (r'<div role="list" class="citation-list">', '<div class="citation-list">'),
    (r'(<div class="citation" id="[^"]*") role="doc-biblioentry"', r"\1"),
    # A hidden cell: its label replaces the text that one sees, and says less.
    (r'<summary aria-label="Toggle hidden content">', "<summary>"),
    # The corner of a table is no heading.
    (r'<th class="head"><p></p></th>', "<td></td>"),
]


def repair(body: str) -> str:
    for pattern, replacement in REPAIRS:
        body = re.sub(pattern, replacement, body)
    return body


def on_page(app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: object) -> None:
    if "body" in context:
        context["body"] = repair(context["body"])


def setup(app: Sphinx) -> dict[str, object]:
    app.connect("html-page-context", on_page)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
