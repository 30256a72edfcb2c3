"""Set the project up in .venv and run it. Needs Python 3.11 to 3.13, a package index, and nothing else.

python make.py demo       Table 4 with tau = 0.01, on the demo network, into out.ipynb
python make.py test       every check there is: ruff, mypy, Table 4, the tests (the book among them), the notebooks
python make.py book       the book, into _build/html
python make.py benchmark  speed and memory as ratios to named baselines, other libraries among them
python make.py lint       ruff and mypy
python make.py clean      remove what the above left, except .venv and .venv-peers
"""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PEERS = ROOT / ".venv-peers"  # for the benchmark alone: libraries that do not get on with ours
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
HTML = ROOT / "_build" / "html"
LEFTOVERS = [
    "_build",
    "book/figures",
    "book/notebooks",
    ".hypothesis",
    ".mypy_cache",
    ".pytest_cache",
    ".ruff_cache",
    "out.ipynb",
]

# ----------------------------------------------------------------------------------------------- steps


def python(*arguments):
    return run(python_of(VENV), *arguments)


def benchmark():
    wanted = ROOT / "benchmarks" / "requirements.txt"
    problem = set_up(PEERS, wanted, alone=wanted.with_name("requirements-alone.txt"))
    if problem:
        say("without the other libraries:", problem)
    peers = [] if problem else ["--peers", python_of(PEERS)]
    return python("benchmarks/speed.py", *peers)


def table4(*parameters):
    return python("-m", "papermill", "notebooks/table4.ipynb", "out.ipynb", "-p", "tau", "0.01", *parameters)


def clean():
    for path in map(ROOT.joinpath, LEFTOVERS):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return True


def book():
    """Build from nothing, so that nothing hides behind an earlier build, and look for every page."""
    shutil.rmtree(HTML.parent, ignore_errors=True)
    built = run(BIN / "jupyter-book", "build", "book/", "-W", "--keep-going")  # it has no `python -m`
    contents = (ROOT / "book" / "_toc.yml").read_text(encoding="utf-8")
    pages = set(re.findall(r"^[\s-]*(?:root|file):\s*[\"']?([^\s\"'#]+)", contents, re.MULTILINE))
    pages |= {"notebooks/" + notebook.stem for notebook in ROOT.glob("notebooks/*.ipynb")}
    pages = {re.sub(r"\.(md|ipynb|rst)$", "", page) for page in pages}
    missing = sorted(page for page in pages if not (HTML / (page + ".html")).is_file())
    say(len(pages) - len(missing), "of", len(pages), "expected pages are in _build/html")
    for page in missing:
        say("no page", page + ".html")
    return built and not missing


LINT = {
    "ruff check": lambda: python("-m", "ruff", "check"),
    "ruff format": lambda: python("-m", "ruff", "format", "--check"),
    "mypy": lambda: python("-m", "mypy"),
}
# Each target is a list of stages. The steps of a stage run at the same time.
TARGETS = {
    "demo": [{"table 4": table4}],
    "test": [
        {**LINT, "table 4": lambda: table4("-p", "eta", "0.1")},  # a column that the notebooks need too
        {"pytest": lambda: python("-m", "pytest", "--nbval", "-q")},
    ],
    "book": [{"book": book}],
    "benchmark": [{"benchmark": benchmark}],
    "lint": [LINT],
    "clean": [{"clean": clean}],
}

# ----------------------------------------------------------------------------------------- environment


def python_of(environment):
    return environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def set_up(environment, requirements, project=None, alone=None):
    """Make an environment as its requirements say, and with the project if given, unless it is so already.

    `alone` are requirements that are installed without what they ask for. Returns what went wrong, in one line, or
    None. The stamp is written last.
    """
    path, stamp = python_of(environment), environment / "installed"
    # The root belongs to it, since an environment that was moved is broken.
    wanted = requirements.read_bytes() + (alone.read_bytes() if alone else b"")
    digest = hashlib.sha256(wanted + str(ROOT).encode()).hexdigest()
    if path.exists() and stamp.exists() and stamp.read_text(encoding="ascii") == digest:
        return None
    uv = shutil.which("uv")
    if uv and subprocess.run([uv, "--version"], capture_output=True).returncode:
        uv = None  # a version manager's shim with nothing behind it
    if not uv and not importlib.util.find_spec("ensurepip"):
        return "this Python has no ensurepip: install uv, or python3-venv on Debian and Ubuntu"
    say("setting up " + environment.name + ", once (several GB on Linux: PyTorch comes with CUDA)")
    if uv:
        made = run(uv, "venv", "--quiet", "--clear", "--python", sys.executable, environment)
        install = [uv, "pip", "install", "--python", path]
    else:
        made = run(sys.executable, "-m", "venv", "--clear", environment)
        install = [path, "-m", "pip", "install", "--disable-pip-version-check"]
    if not made:
        return environment.name + " could not be made; the reason is above"
    if not run(*install, "-r", requirements):
        return "the packages could not be installed; the reason is above (no network or index?)"
    if alone and not run(*install, "--no-deps", "-r", alone):
        return "the packages of " + alone.name + " could not be installed; the reason is above"
    if project and not run(*install, "--quiet", "--no-deps", "--no-build-isolation", "--editable", project):
        return "the project itself could not be installed in " + environment.name + "; the reason is above"
    stamp.write_text(digest, encoding="ascii")
    return None


def run(*command):
    """Say one command and run it in the repository root, as if .venv were active. True where it succeeds."""
    command = [str(part) for part in command]
    say(*(part.removeprefix(str(ROOT) + os.sep) for part in command))
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONHOME", "PYTHONPATH")}
    env["VIRTUAL_ENV"] = str(VENV)
    env["PATH"] = os.pathsep.join([str(BIN), env.get("PATH", "")])
    env["JUPYTER_PATH"] = str(VENV / "share" / "jupyter")  # its python3 kernel goes before a user's
    env["PYTHONUTF8"] = "1"
    try:
        return subprocess.run(command, cwd=ROOT, env=env).returncode == 0
    except OSError as error:
        say(error)
        return False


def failures(stage):
    """Run the steps of a stage at the same time. The names of those that failed."""
    with ThreadPoolExecutor() as pool:
        running = {name: pool.submit(step) for name, step in stage.items()}
    return [name for name, step in running.items() if not step.result()]


def say(*words):
    print("make.py:", *words, flush=True)


def main(arguments):
    if len(arguments) != 1 or arguments[0] not in TARGETS:
        sys.exit(__doc__.strip())
    if not (3, 11) <= sys.version_info < (3, 14):
        sys.exit("make.py: Python 3.11, 3.12 or 3.13 is needed, and this is " + sys.version.split()[0])
    if arguments != ["clean"]:
        problem = set_up(VENV, ROOT / "requirements.txt", ".")
        if problem:
            sys.exit("make.py: " + problem)
    if arguments == ["test"]:
        os.environ["OMP_NUM_THREADS"] = "1"  # several processes share the cores; see conftest.py
    failed = [name for stage in TARGETS[arguments[0]] for name in failures(stage)]
    if failed:
        sys.exit("make.py: FAILED: " + ", ".join(failed))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
