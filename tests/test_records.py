"""A record that was damaged, cut short, edited or made up is named and skipped, whatever became of it."""

import copy
import dataclasses
import json
import math
import subprocess
import sys

import pytest
from pydantic import ValidationError

from companion import files
from companion.kinds import KINDS
from companion.records import make_record, parse_record, read_records, record_bytes, record_name, write_record
from wdat_core import FinetuneConfig, Threat

SMALL = min(files.RESULTS.glob("finetune-*.json"), key=lambda path: path.stat().st_size)


@pytest.fixture
def record():
    return parse_record(SMALL.read_bytes())


def test_every_committed_record_is_whole_and_says_how_to_repeat_it(capsys):
    records = [record for kind in KINDS for record in read_records(kind=kind)]
    committed = [path for path in files.RESULTS.glob("*.json") if path.name != "cores.json"]
    assert len(records) == len(committed) >= 14 and not capsys.readouterr().err
    for record in records:
        assert "/" not in record.device and str(files.ROOT).encode() not in record_bytes(record)


def test_committed_records_are_found_by_the_protocol_that_they_followed():
    """Their names end in its digest, so no field that came later may change it."""
    for path in files.RESULTS.glob("*-*.json"):
        assert path.name == record_name(parse_record(path.read_bytes()))


def test_record_comes_back_as_it_was_written(record, tmp_path):
    path = write_record(record, tmp_path)
    assert parse_record(path.read_bytes()) == record and path.name == SMALL.name
    stored, first = json.loads(path.read_bytes()), json.loads(SMALL.read_bytes())
    assert list(stored) == list(first) and list(stored)[-1] == "digest"
    assert first.pop("config").items() <= stored.pop("config").items()  # a field that came later has its default
    assert {**stored, "digest": ""} == {**first, "digest": ""}
    assert write_record(record, tmp_path / "again").read_bytes() == path.read_bytes()


# ---------------------------------------------------------------------------------------------------------------------
# Damage
# ---------------------------------------------------------------------------------------------------------------------

DAMAGE = {
    "a flipped bit": lambda content, at: content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :],
    "another digit or letter": lambda content, at: content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :],
    "a lost byte": lambda content, at: content[:at] + content[at + 1 :],
    "an end too early": lambda content, at: content[:at],
    "zeros to the end": lambda content, at: content[:at] + bytes(len(content) - at),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_no_damage_to_any_byte_changes_what_is_read(record, damage):
    """Most of it is named; the rest is in the white space, and what is read is the same."""
    content, named = SMALL.read_bytes(), 0
    for at in range(len(content)):
        try:
            assert parse_record(DAMAGE[damage](content, at)) == record
        except ValueError:
            named += 1
    assert named > len(content) / 2


def test_damaged_files_are_named_in_one_line_each(record, tmp_path, capsys):
    content = SMALL.read_bytes()
    foreign = {"empty": b"", "deep": b"[" * 100_000, "image": b"\x89PNG\r\n\x1a\n\xff\xfe", "list": b"[]"}
    flipped = {f"flipped{at}": DAMAGE["a flipped bit"](content, at) for at in range(0, len(content), 397)}
    for name, damaged in {**foreign, **flipped, "good": content}.items():
        (tmp_path / f"{name}.json").write_bytes(damaged)
    (tmp_path / "folder.json").mkdir()
    assert read_records(tmp_path) == [record]
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(".json: ")[0] for line in lines] == sorted(
        f"skipped {n}" for n in (*foreign, *flipped, "folder")
    )


# ---------------------------------------------------------------------------------------------------------------------
# Whole, but not true
# ---------------------------------------------------------------------------------------------------------------------

WRONG = [
    ("schema", 2, "not a record of schema 1"),
    ("kind", "finetunes", "not a record of schema 1"),
    ("kind", ["finetune"], "not a record of schema 1"),
    ("network.name", "../../demo", "network.name cannot be"),
    ("network.digest", "abc", "network.digest cannot be 'abc'"),
    ("network", "demo", "network cannot be 'demo'"),
    ("network.owner", "me", "network.owner is not known"),
    ("data.digest", "A" * 64, "data.digest cannot be"),
    ("data.test", 1000.0, "data.test cannot be 1000.0"),
    ("data.test", 999, "999 images|of its images"),
    ("data.test", 2000, "not of 2000 images"),
    ("data.train", True, "data.train cannot be True"),
    ("data.train", None, "data.train is missing"),
    ("config.taux", 0.1, "unexpected keyword argument 'taux'"),
    ("config.tau", 0, "tau must be"),
    ("config.tau", "0.1", "tau must be"),
    ("config.threat.r", "infinite", "r must be"),
    ("config.threat", None, "config: the threat cannot be None"),
    ("config", 3, "config: it cannot be 3"),
    ("config.consistency", "mse", "consistency must be"),
    ("metrics.after.clean", 1.5, "metrics.after.clean cannot be 1.5"),
    ("metrics.after.clean", "0.7", "metrics.after.clean cannot be '0.7'"),
    ("metrics.after.w_2", 0.999, "metrics.after.w_2 is 0.999, and .* of its images"),
    ("metrics.before", {}, "metrics.before.clean is missing"),
    ("correct.after.w_2", "AAAA", "correct.after.w_2 is not of 1000 images"),
    ("correct.after.w_2", "no base64!", "padding|base64"),
    ("correct.later", {"clean": "AAAA"}, "later"),
    ("history.best", 0, "history.best cannot be 0"),
    ("history.upsilon", [1.0, -2.0], "history.upsilon.1 cannot be -2.0"),
    ("history.epochs", [], r"history.epochs cannot be \[\]"),
    ("history.epochs.0.epoch", 0, "history.epochs.0.epoch cannot be 0"),
    ("history.epochs.0.loss", "low", "history.epochs.0.loss cannot be 'low'"),
    ("history.epochs.0.clean", 1.01, "history.epochs.0.clean cannot be 1.01"),
    ("history.epochs.0.test_w_inf", -0.1, "history.epochs.0.test_w_inf cannot be -0.1"),
    ("config.threat.p", "inf", "history.epochs.0.w_inf is missing"),
    ("config.threat.p", 4, "history.epochs.0.w_4 is missing"),
    ("config.threat.q", 2, "unexpected keyword argument 'q'"),
    ("metrics.after.clean", 10**400, "metrics.after.clean cannot be 1000"),
    ("seconds.finetune", None, "seconds.finetune cannot be None"),
    ("device", {"name": "a CPU"}, "device cannot be"),
    ("device", "<script>", "device cannot be '<script>'"),
    ("data.source", "[images](https://example.org)", "data.source cannot be"),
    ("core", "latest", "core cannot be 'latest'"),
    ("created", "yesterday", "created cannot be 'yesterday'"),
    ("command", "rm -r .", "command cannot be"),
]


def changed(record, field, value):
    """What is stored of the record, with another value in one place."""
    inside = fields = copy.deepcopy(record.stored())
    *path, last = (int(part) if part.isdigit() else part for part in field.split("."))
    for part in path:
        inside = inside[part]
    inside[last] = value
    return fields


def sealed(fields):
    """As somebody writes it who does not check it."""
    as_read = json.dumps(json.loads(json.dumps(fields)), sort_keys=True)
    return json.dumps({**fields, "digest": files.digest(as_read.encode())}).encode()


@pytest.mark.parametrize(("field", "value", "message"), WRONG)
def test_sealed_record_that_cannot_be_true_is_refused(record, field, value, message):
    """Its digest is right: somebody sealed it, or this project wrote it wrongly."""
    with pytest.raises(ValueError, match=message):
        parse_record(sealed(changed(record, field, value)))
    with pytest.raises(ValueError, match=message):
        make_record(changed(record, field, value))


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_number_that_is_none_is_refused(value):
    content = SMALL.read_bytes().replace(b'"best": ', f'"best": {value}, "worst": '.encode())
    with pytest.raises(ValueError, match=r"not JSON compliant"):
        parse_record(content)


@pytest.mark.parametrize("key", ["device", "config", "metrics", "correct", "history", "data", "network", "digest"])
def test_record_without_a_key_is_refused(record, key):
    stored = json.loads(sealed({k: v for k, v in record.stored().items() if k != key}))
    if key == "digest":
        del stored["digest"]
    with pytest.raises(ValueError, match=f"{key}.* is missing|digest"):
        parse_record(json.dumps(stored).encode())


def test_other_kinds_need_their_own_keys(record):
    """A benchmark has no network, a measurement of Upsilon no accuracy."""
    stored = record.stored()
    every = {k: stored[k] for k in ("schema", "device", "versions", "core", "created", "command")}
    every["seconds"] = {"total": 12.5}
    empty = {"rows": [], "growth": {}, "memory": {}, "throughput": {}}
    benchmark = {**every, "kind": "benchmark", "config": {"rounds": 3}, **empty}
    upsilon = {**every, "kind": "upsilon", **{k: stored[k] for k in ("network", "data", "config")}}
    upsilon["points"] = {"minibatch": [0, 8], "whole": [40.5, 41.0]}
    for whole, key in ((benchmark, "growth"), (upsilon, "points"), (upsilon, "data")):
        made = make_record(whole)
        assert made.stored() == whole and parse_record(record_bytes(made)) == made
        with pytest.raises(ValueError, match=f"{key}.* is missing"):
            parse_record(sealed({k: v for k, v in whole.items() if k != key}))


@pytest.mark.parametrize(
    ("change", "message"), [({"rate": "0.1"}, "rate cannot be"), ({"taux": 1}, "taux is not known")]
)
def test_a_stand_in_made_by_the_former_trainer_is_read_as_strictly(change, message):
    (demo,) = [record for record in read_records(kind="pretrain") if record.network.name == "demo"]
    fields = demo.stored()
    assert demo.config.rate == 0.1 and demo.config.threat.p == math.inf
    with pytest.raises(ValueError, match=message):
        make_record({**fields, "config": {**fields["config"], **change}})


def test_a_stand_in_made_by_the_one_trainer_has_its_configuration(record):
    (demo,) = [record for record in read_records(kind="pretrain") if record.network.name == "demo"]
    fields = {**demo.stored(), "config": FinetuneConfig(threat=Threat(p=math.inf))}
    assert make_record(fields).config.threat.p == math.inf
    assert make_record(fields).stored()["config"]["threat"] == {"p": "inf", "r": "inf", "delta": 8 / 255}


def test_a_record_cannot_be_changed(record):
    with pytest.raises(ValidationError, match="frozen"):
        record.core = "0" * 64


# ---------------------------------------------------------------------------------------------------------------------
# Names and writers
# ---------------------------------------------------------------------------------------------------------------------


def test_runs_that_differ_have_names_that_differ(record, tmp_path):
    """Also in a digit that is usually not shown."""
    configs = [{"seed": 1234567}, {"seed": 1234568}, {"tau": 0.01}, {"tau": 0.010000001}, {"eta": 0.3}]
    names = {
        write_record(record.model_copy(update={"config": dataclasses.replace(record.config, **c)}), tmp_path).name
        for c in configs
    }
    assert len(names) == len(configs)


def test_processes_that_write_the_same_record_at_once_do_no_harm(record, tmp_path):
    code = (
        "import sys, pathlib\n"
        "from companion.records import parse_record, write_record\n"
        "record = parse_record(pathlib.Path(sys.argv[1]).read_bytes())\n"
        "print(flush=True)\n"
        "sys.stdin.readline()\n"
        "for _ in range(50): write_record(record, pathlib.Path(sys.argv[2]))\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": files.ROOT}
    writers = [subprocess.Popen([sys.executable, "-c", code, str(SMALL), str(tmp_path)], **pipes) for _ in range(3)]
    for writer in writers:
        writer.stdout.readline()  # ready
    for writer in writers:
        writer.stdin.write("\n")
        writer.stdin.flush()
    reads = 0
    while any(writer.poll() is None for writer in writers):
        for path in tmp_path.glob("*.json"):
            assert parse_record(path.read_bytes()) == record
            reads += 1
    for writer in writers:
        assert writer.wait() == 0
        writer.stdin.close()
        writer.stdout.close()
    assert reads and [path.name for path in tmp_path.iterdir()] == [SMALL.name]
