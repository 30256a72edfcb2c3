"""Many processes and sets larger than memory: the benchmark ends in a record, and the page says what is in it."""

import subprocess
import sys

import pytest

from benchmarks import scale
from companion import files
from companion.records import read_records
from companion.scale import ALONE, APART, scale_answer, scale_table

SMALL = {"rounds": 6, "lap": 4, "epochs": 1, "images": 2000, "steps": 2, "distances": 100_000}


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """Of sizes that show nothing but that everything runs."""
    out = tmp_path_factory.mktemp("scale")
    words = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    script = [sys.executable, str(files.ROOT / "benchmarks" / "scale.py"), *words]
    done = subprocess.run([*script, "--folder", str(out), "--out", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in out.iterdir()] == [done.stdout.split()[-1].split("/")[-1]]  # nothing else stays
    (found,) = read_records(out, kind="scale")
    return found


def test_each_work_is_compared_with_one_process_and_with_two_that_share_nothing(record):
    assert [row["baseline"] for row in record.rows] == [ALONE, APART] * 2
    assert len({row["group"] for row in record.rows}) == 2
    for row in record.rows:
        assert 0 < row["low"] <= row["ratio"] <= row["high"] and row["rounds"] == SMALL["rounds"]


def test_an_iterate_takes_two_messages_at_most(record):
    """One for accuracy, loss and Upsilon, one for the projection, for 20 steps; a few at the start and at the end.

    A lap of training is one iteration here.
    """
    attack, training = (row for row in record.rows if "messages" in row)
    assert 20 < attack["messages"] <= 2 * 20 + 10 and attack["sent"] < 2000
    assert 20 < training["messages"] <= 2 * 20 + 10 + 20
    for row in (attack, training):
        least, most = row["talked"]
        assert 0 < least <= most < 1


def test_what_is_beyond_memory_is_measured(record):
    stream, mapped, histogram = (record.figures[name] for name in ("stream", "mapped", "histogram"))
    assert [images for images, _ in stream] == [100, 500, 2000]
    assert mapped["bytes"] == 2000 * 3072 * 4 and 0 < mapped["distance"] <= 8 / 255 * (1 + 1e-6)
    assert histogram["n"] == 100_000 and 0 <= histogram["low"] <= histogram["high"] <= 1


def test_the_page_says_what_the_record_says(record):
    text = scale_answer([record])
    _, attack, _, training = ((f"**{r['ratio']:.2f}** ({r['low']:.2f} to {r['high']:.2f})", r) for r in record.rows)
    assert f"An attack by two processes that share the images takes {attack[0]} times as long as by two" in text
    assert f"Fine-tuning by two processes that share the images takes {training[0]} times as long as by two" in text
    assert "A stream of 2,000 made images (0.0 GB)" in text and "W-PGD on 2,000 images in a file" in text
    assert "100,000 distances" in text
    table = scale_table(record).data
    assert table.count("\n") == 5 and f"in {record.rows[0]['messages']} messages" in table


def test_without_a_record_it_says_how_to_make_one():
    assert scale_answer([]) == "Many processes are not measured yet: `python benchmarks/scale.py` does it."


def test_the_newest_record_counts(record):
    slow = [row | {"ratio": 9.0, "low": 8.0, "high": 10.0} for row in record.rows]
    newer = record.model_copy(update={"created": "2999-01-01T00:00:00+00:00", "rows": slow})
    assert scale_answer([newer, record]) == scale_answer([newer]) != scale_answer([record])
    assert ", 1 epoch |" in scale_table(record).data


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--folder", "not/there"], "--folder must be a folder that is there, not not/there"),
        (["--images", "0"], "--images must be at least 1, not 0"),
        (["--rounds", "5"], "--rounds must be at least 6: with fewer there is no interval"),
    ],
)
def test_what_cannot_be_is_named_before_anything_runs(words, problem, capsys, monkeypatch):
    monkeypatch.setattr(scale, "answered", lambda *_: pytest.fail("it ran"))
    with pytest.raises(SystemExit):
        scale.main(words)
    assert capsys.readouterr().err.splitlines()[-1].endswith(problem)


def test_a_part_that_fails_leaves_no_record(tmp_path, monkeypatch):
    """It comes before what takes long: no laps are lost."""
    monkeypatch.setattr(scale, "scaling", lambda *_: pytest.fail("it ran"))
    answered = scale.answered
    monkeypatch.setattr(scale, "answered", lambda script, *words: answered(script, *words, "--nonsense"))
    with pytest.raises(SystemExit, match=r"mapped\.py: error: unrecognized arguments: --nonsense"):
        scale.main(["--images", "10", "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())
