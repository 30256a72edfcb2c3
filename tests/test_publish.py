"""What publishes the project refers to what exists, asks for no more rights than it needs, and is pinned."""

import re

import pytest
import yaml

import make
from companion import files

WORKFLOWS = sorted((files.ROOT / ".github" / "workflows").glob("*.yml"))


def read(path):
    """A workflow; YAML 1.1 reads its key `on` as True."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def steps_of(workflow):
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_pinned_and_commands_exist(path):
    steps = steps_of(read(path))
    uses = [step["uses"] for step in steps if "uses" in step]
    assert uses and all(re.fullmatch(r"actions/[\w-]+@v\d+", action) for action in uses)
    commands = [step["run"] for step in steps if "run" in step]
    assert commands and all(re.fullmatch(r"python make\.py (\w+)", command) for command in commands)
    assert {command.split()[-1] for command in commands} <= {*make.TARGETS}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_only_the_job_that_publishes_may_write(path):
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    writing = {name: job["permissions"] for name, job in workflow["jobs"].items() if "permissions" in job}
    assert writing in ({}, {"publish": {"pages": "write", "id-token": "write"}})
    assert workflow["concurrency"]["group"] and all("timeout-minutes" in job for job in workflow["jobs"].values())


def test_main_and_nothing_else_is_published():
    pages = read(files.ROOT / ".github" / "workflows" / "pages.yml")
    assert pages[True] == {"push": {"branches": ["main"]}, "workflow_dispatch": None}
    assert "refs/heads/main" in pages["jobs"]["publish"]["if"]
    (path,) = [step["with"]["path"] for step in steps_of(pages) if "upload-pages" in step.get("uses", "")]
    assert files.ROOT / path == make.HTML


def test_every_python_of_the_project_is_tested():
    tests = read(files.ROOT / ".github" / "workflows" / "tests.yml")
    assert tests["jobs"]["tests"]["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]
    assert 'requires-python = ">=3.11,<3.14"' in (files.ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_buttons_are_off_until_there_is_an_address_and_then_well_formed():
    text = (files.ROOT / "_config.yml").read_text(encoding="utf-8")
    off, on = (yaml.safe_load(t)["sphinx"]["config"]["html_theme_options"] for t in (text, text.replace("#: ", "")))
    assert {*on} - {*off} == {"repository_url", "repository_branch", "use_repository_button", "launch_buttons"}
    assert {name: on[name] for name in off} == off
    assert {*on["launch_buttons"]} == {"notebook_interface", "binderhub_url", "colab_url"}


def test_binder_gets_the_pinned_packages_and_the_project():
    (packages,) = [d["pip"] for d in read(files.ROOT / "environment.yml")["dependencies"] if isinstance(d, dict)]
    assert packages == ["-r requirements.txt", "-e ."]
    assert (files.ROOT / "requirements.txt").is_file() and (files.ROOT / "pyproject.toml").is_file()
