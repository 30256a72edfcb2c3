"""What Jupyter Book cannot do from _config.yml: bring in notebooks and numbers from records, find wdat_core.

Sphinx reads only what lies inside book/, and the notebooks lie beside it. Before the table of contents is read they are
copied to book/notebooks/, which git ignores. Copies, because symbolic links are dropped silently on Windows. What was
found, the picture of the first page and the last column of the ledger are made from records then, so that they cannot
be older.
"""

from __future__ import annotations

import sys
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.config import Config


def copy_notebooks(source: Path, target: Path) -> None:
    """Make `target` hold the notebooks of `source` and no others.

    A copy that is up to date is left alone, so that its page is not built again.
    """
    target.mkdir(exist_ok=True)
    notebooks = {path.name: path.read_bytes() for path in source.glob("*.ipynb")}
    for copy in target.glob("*.ipynb"):
        if copy.name not in notebooks:
            copy.unlink()
    for name, content in notebooks.items():
        copy = target / name
        if not copy.exists() or copy.read_bytes() != content:
            copy.write_bytes(content)


def draw_budget(results: Path, target: Path) -> None:
    """Write the picture of the first page; one that is as it should be is left alone."""
    from companion.pictures import budget, opening
    from companion.records import read_records

    picture = budget(opening(read_records(results, "spend"))).encode()
    if not target.exists() or target.read_bytes() != picture:
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(picture)


def on_config(app: Sphinx, config: Config) -> None:
    from companion.pages import substitutions

    book = Path(app.srcdir)
    config.myst_substitutions = {**config.myst_substitutions, **substitutions(book.parent / "results")}
    copy_notebooks(book.parent / "notebooks", book / "notebooks")
    draw_budget(book.parent / "results", book / "figures" / "budget.html")


def setup(app: Sphinx) -> dict[str, object]:
    # autodoc imports wdat_core from this checkout, installed or not; we import companion from there too.
    sys.path.insert(0, str(Path(app.srcdir).parent))
    # sphinx_external_toc looks for the pages of _toc.yml in the same event, at priority 900.
    app.connect("config-inited", on_config, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
