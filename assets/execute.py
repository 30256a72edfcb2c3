"""Runs notebooks in place, so that the book shows what they show now: python assets/execute.py [NAME ...]

Without names, all of them. Times and versions, which change from run to run, are left out. Run it after a change of
the records in results/, of what draws them, or of the code in wdat_core.py.
"""

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent

if __name__ == "__main__":
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    known = sorted(path.stem for path in ROOT.glob("notebooks/*.ipynb"))
    names = sys.argv[1:] or known
    if unknown := [name for name in names if name not in known]:
        sys.exit(f"no notebook {', '.join(unknown)}; there are {', '.join(known)}")
    for name in names:
        path = ROOT / "notebooks" / f"{name}.ipynb"
        notebook = nbformat.read(path, as_version=4)
        metadata = notebook.metadata.copy()  # the kernel adds its version
        client = NotebookClient(notebook, timeout=None, kernel_name="python3", record_timing=False)
        client.execute(cwd=str(path.parent))
        notebook.metadata = metadata
        nbformat.write(notebook, path)
        print(name, flush=True)
