"""Runs notebooks in place, so that the book shows what they show now: python assets/execute.py [NAME ...]

Without names, all of them. What changes from run to run and says nothing, times and versions, is left out. To be run
after a change of the records in results/, or of wdat_core.py: pages mark the records that are older than it.
"""

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}

if __name__ == "__main__":
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    known = sorted(path.stem for path in ROOT.glob("notebooks/*.ipynb"))
    names = sys.argv[1:] or known
    if unknown := [name for name in names if name not in known]:
        sys.exit(f"no notebook {', '.join(unknown)}; there are {', '.join(known)}")
    for name in names:
        path = ROOT / "notebooks" / f"{name}.ipynb"
        notebook = nbformat.read(path, as_version=4)
        client = NotebookClient(notebook, timeout=None, kernel_name="python3", record_timing=False)
        client.execute(cwd=str(path.parent))
        notebook.metadata = METADATA
        nbformat.write(notebook, path)
        print(name, flush=True)
