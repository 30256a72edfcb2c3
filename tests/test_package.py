"""What is installed: wdat_core.py, which needs no checkout; and in an editable install the checkout itself."""

import shutil
import subprocess
import sys
import zipfile

import pytest

from companion import files

PARTS = ("wdat_core.py", "pyproject.toml", "README.md", "LICENSE", "companion", "benchmarks", "assets")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Builds a wheel of a copy of the project by the function of that name, without network; its files by name."""
    pytest.importorskip("setuptools.build_meta", reason="the build backend, setuptools, is not installed")
    root = tmp_path_factory.mktemp("project")
    for part in PARTS:
        copy = shutil.copytree if (files.ROOT / part).is_dir() else shutil.copy
        copy(files.ROOT / part, root / part)

    def build(function):
        out = root / function
        code = f"from setuptools import build_meta; build_meta.{function}({str(out)!r})"
        done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        (wheel,) = out.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            return root, {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}

    return build


def test_wheel_holds_the_core_and_nothing_else(built):
    _, content = built("build_wheel")
    assert content == {"wdat_core.py": (files.ROOT / "wdat_core.py").read_bytes()}


def test_editable_install_puts_the_checkout_on_the_path(built):
    """So that a notebook finds companion/ whatever folder it runs in."""
    root, content = built("build_editable")
    ((name, path),) = content.items()
    assert name.endswith(".pth") and path.decode().strip() == str(root)
