"""What pyproject.toml cannot say to pytest."""

import os
from pathlib import Path

ROOT = Path(__file__).parent

# nbval starts each notebook in its own folder: its kernel finds this checkout's modules here.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))

# A notebook in the root is what papermill wrote, not a test.
collect_ignore = [notebook.name for notebook in ROOT.glob("*.ipynb")]
