"""An exported run gets the distances of its worst case later, and only from the images and the network it is of."""

import json
import shutil

import pytest
from test_export import SIZES

from companion import complete, files
from companion.complete import main
from companion.intervals import accuracy, has_found
from companion.records import parse_record, record_bytes, write_record
from companion.runs import finetune_grid
from companion.settings import ParameterError, Settings


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    """An export whose record has no distances, and the record of the same run with them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "RUNS", tmp_path_factory.mktemp("runs"))
        folder = tmp_path_factory.mktemp("exports")
        settings = Settings(tau=0.01, eta=1, export=str(folder), found_steps=0, **SIZES).resolved()
        (bare,) = finetune_grid(settings, "whole", notebook="table4")
        (path,) = folder.iterdir()
        as_usual = settings.model_copy(update={"found_steps": 6, "export": None})
        (whole,) = finetune_grid(as_usual, "whole", notebook="table4")
    assert bare.boundary is None and has_found(whole, "before", "after")
    return path, whole


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(files, "RESULTS", tmp_path / "results")
    return files.RUNS


def test_the_distances_are_those_of_the_run_itself(without, runs):
    path, whole = without
    main([str(path), "--data", "embedded", "--found-steps", "6"])
    (written,) = runs.glob("finetune-*.json")
    record = parse_record(written.read_bytes())
    assert record.boundary.distance == whole.boundary.distance and record.boundary.steps == 6
    assert (record.metrics, record.correct, record.history.upsilon) == (
        whole.metrics,
        whole.correct,
        whole.history.upsilon,
    )
    assert accuracy([record], "after", "w_2_found").value <= accuracy([record], "after", "w_2").value


def test_a_recorded_run_of_the_same_bits_keeps_what_else_it_has(without, runs):
    path, whole = without
    known = whole.stored() | {"command": "papermill notebooks/figure7_2.ipynb out.ipynb"}
    del known["boundary"]
    write_record(known, files.RESULTS)
    main([str(path), "--data", "embedded", "--found-steps", "6"])
    (written,) = runs.glob("finetune-*.json")
    assert parse_record(written.read_bytes()).command == known["command"]


def test_other_images_and_another_network_are_refused(without, runs, tmp_path, monkeypatch):
    path, _ = without
    record = json.loads((path / "record.json").read_text(encoding="utf-8"))
    record.pop("digest")
    record["data"]["digest"] = "0" * 64
    other = tmp_path / "other"
    shutil.copytree(path, other)
    (other / "record.json").write_bytes(record_bytes(record))
    with pytest.raises(ParameterError, match="the images in embedded are not those of the record"):
        complete.complete(str(other), "embedded", "models", 6)
    plain = complete.scores
    monkeypatch.setattr(complete, "scores", lambda *args: {m: ~bits for m, bits in plain(*args).items()})
    with pytest.raises(ParameterError, match=r"clean before: .* here and .* in the record"):
        complete.complete(str(path), "embedded", "models", 6)
    with pytest.raises(SystemExit, match=r"complete: .*nothing is not an export of this project: it has no record"):
        main([str(tmp_path / "nothing")])
    with pytest.raises(SystemExit, match="complete: --found-steps must be at least 1"):
        main([str(path), "--found-steps", "0"])
    assert not runs.exists() or not list(runs.glob("finetune-*.json"))


def test_an_export_that_began_from_an_export_asks_for_that_one(without, runs, tmp_path):
    first, _ = without
    settings = Settings(
        tau=0.01, eta=1, network=str(first), export=str(tmp_path / "exports"), found_steps=0, **SIZES
    ).resolved()
    finetune_grid(settings, "whole", notebook="table4")
    (second,) = (tmp_path / "exports").iterdir()
    with pytest.raises(
        SystemExit, match=r"complete: .* began from an export, demo-finetuned: give its folder with --b"
    ):
        main([str(second), "--data", "embedded", "--found-steps", "2"])
    main([str(second), "--data", "embedded", "--found-steps", "2", "--before", str(first)])
    found = [parse_record(path.read_bytes()) for path in runs.glob("finetune-demo-finetuned-*.json")]
    assert any(has_found(record, "before", "after") for record in found)


def test_the_search_is_as_precise_as_the_record_says(tmp_path, runs, monkeypatch):
    usual = {"tau": 0.01, "eta": 1, "export": str(tmp_path / "exports"), "found_steps": 0, "precision": "bfloat16"}
    finetune_grid(Settings(**usual, **SIZES).resolved(), "whole", notebook="table4")
    (path,) = (tmp_path / "exports").iterdir()
    seen, bench = [], complete.bench
    monkeypatch.setattr(complete, "bench", lambda settings: seen.append(settings.precision) or bench(settings))
    main([str(path), "--data", "embedded", "--found-steps", "2"])
    assert seen == ["bfloat16", "bfloat16"]
