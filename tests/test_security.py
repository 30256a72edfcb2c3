"""What SECURITY.md says of published files and of papermill's parameters."""

import ast
import shutil
import subprocess

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from papermill.translators import PythonTranslator

from companion import files
from companion.files import verified, write_sums, write_whole


def test_published_files_have_their_digests():
    sums = (files.ASSETS / "SHA256SUMS").read_text(encoding="utf-8")
    listed = [line.split("  ")[1] for line in sums.splitlines()]
    published = {p.name for p in files.ASSETS.iterdir() if p.suffix in (".safetensors", ".webp")}
    assert set(listed) == published | {"images.json", "paper.csv"} and listed == sorted(listed)
    for name in listed:
        verified(files.ASSETS, name)


@pytest.mark.skipif(not shutil.which("sha256sum"), reason="needs sha256sum")
def test_sha256sum_accepts_the_list(tmp_path):
    command = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    assert subprocess.run(command, cwd=files.ASSETS, capture_output=True).returncode == 0
    write_whole(tmp_path / "part" / "a", b"a")
    write_sums(tmp_path, ["part/a"])
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 0
    assert verified(tmp_path, "part/a") == b"a"


@given(st.text(st.characters(exclude_categories=["Cs"])) | st.text(st.sampled_from("\\\"'\r\n#;()x{}uN0")))
@example('"; import os; "')
@example('\\"; import os #')
def test_value_of_a_parameter_cannot_become_code(value):
    """Whatever text it is, what papermill writes into the notebook is one assignment of that very text."""
    (statement,) = ast.parse(PythonTranslator.codify({"network": value})).body
    assert isinstance(statement, ast.Assign) and ast.literal_eval(statement.value) == value
