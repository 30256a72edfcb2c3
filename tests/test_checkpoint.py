"""A run that is stopped at any moment and goes on is the run that was never stopped; all else is said in one line."""

import ast
import contextlib
import copy
import hashlib
import io
import json
import os
import random
import re
import runpy
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from killable import RUNS, remembering, result, train
from tiny import images, named, network
from torch import nn
from torch.nn.functional import cross_entropy

import wdat_core
from wdat_core import (
    CHECKPOINT,
    NETWORK,
    FinetuneConfig,
    Threat,
    WdatError,
    _Checkpoint,
    ce,
    code_digest,
    finetune,
    wpgd,
)

HERE = Path(__file__).resolve().parent
KILLS = int(os.environ.get("WDAT_KILLS", "20"))
DAMAGES = int(os.environ.get("WDAT_DAMAGES", "2000"))
posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
every_run = pytest.mark.parametrize("name", RUNS)


def assert_same(a, b):
    """Bit for bit."""
    assert a["rows"] == b["rows"] and a["best"] == b["best"] and a["upsilon"] == b["upsilon"]
    assert a["state"].keys() == b["state"].keys()
    for name, value in a["state"].items():
        assert torch.equal(value, b["state"][name]), name


@pytest.fixture(scope="module")
def unstopped():
    """What each run gives when nothing is kept and nothing stops it."""
    found = {}

    def of(name):
        if name not in found:
            found[name] = result(*train(name))
        return found[name]

    return of


def contents(path):
    """What is in a checkpoint file."""
    content = path.read_bytes()
    return torch.load(io.BytesIO(content[len(CHECKPOINT) + 32 :]), weights_only=True)


# ------------------------------------------------------------------------------------------------ stopped and resumed


@every_run
def test_keeping_a_run_changes_nothing(name, unstopped, tmp_path):
    assert_same(result(*train(name, resume=tmp_path / "run", save_every=0)), unstopped(name))


@every_run
def test_a_run_in_pieces_of_one_minibatch_is_the_same(name, unstopped, tmp_path):
    pieces = 0
    while True:
        model, history = train(name, resume=str(tmp_path / "run"), stop_after=0)
        pieces += 1
        if history.finished:
            break
        so_far = result(model, history)
        assert so_far["rows"] == unstopped(name)["rows"][: len(history.epochs)]
        assert so_far["upsilon"] == unstopped(name)["upsilon"][:pieces]
    assert pieces == 3 * 3 + 1
    assert_same(result(model, history), unstopped(name))


def test_a_finished_run_is_not_repeated(unstopped, tmp_path):
    epochs = []
    for _ in range(2):
        run = train("whole", resume=tmp_path / "run", on_epoch=lambda epoch, model: epochs.append(epoch))
        assert_same(result(*run), unstopped("whole"))
    assert epochs == [1, 2, 3]


@pytest.mark.parametrize("name", ["whole", "last layer", "trades"])
def test_a_run_goes_on_with_the_model_as_the_stop_left_it(name, unstopped, tmp_path):
    model = network("full")
    data, val = images(14, model), images(9, model, seed=1)
    finished = False
    while not finished:
        history = finetune(model, data, val, RUNS[name], resume=tmp_path / "run", stop_after=0)
        finished = history.finished
    assert_same(result(model, history), unstopped(name))


def test_what_on_epoch_asks_of_the_model_is_no_part_of_the_run(unstopped, tmp_path):
    """Although the stop after the last minibatch of an epoch leaves it to a process that has trained nothing."""
    x, _ = images(6, network("full"), seed=2)
    ask, finished = lambda epoch, shown: {"asked": shown(x).mean()}, False
    while not finished:
        model, history = train("whole", resume=tmp_path / "run", stop_after=0, on_epoch=ask)
        finished = history.finished
    asked = [row.pop("asked") for row in history.epochs]
    assert asked == [row["asked"] for row in train("whole", on_epoch=ask)[1].epochs]
    assert_same(result(model, history), unstopped("whole"))


@pytest.mark.parametrize("exception", [KeyError, KeyboardInterrupt])
def test_the_run_goes_on_after_an_exception(exception, unstopped, tmp_path):
    """Everything up to the last checkpoint is kept, also when `on_epoch` fails, or somebody presses Ctrl-C in it."""

    def fails(epoch, model):
        if epoch == 2:
            raise exception("mine")

    with pytest.raises(exception, match="mine"):
        train("whole", resume=tmp_path / "run", save_every=0, on_epoch=fails)
    assert len(contents(tmp_path / "run")["rows"]) == 1 and len(contents(tmp_path / "run")["losses"]) == 3
    assert_same(result(*train("whole", resume=tmp_path / "run")), unstopped("whole"))


def test_numbers_of_the_caller_go_into_the_checkpoint_as_numbers(tmp_path):
    """Whatever holds them: nothing but plain numbers is read from a checkpoint."""
    kinds = {"numpy": np.float64(0.5), "integer": np.int64(2), "tensor": torch.tensor(0.25), "plain": 1}
    for stop_after in (0, None):
        run = train("whole", resume=tmp_path / "run", stop_after=stop_after, save_every=0, on_epoch=lambda *_: kinds)
    rows = [{name: row[name] for name in kinds} for row in run[1].epochs]
    assert rows == 3 * [{"numpy": 0.5, "integer": 2, "tensor": 0.25, "plain": 1}]
    assert {type(value) for row in run[1].epochs for name, value in row.items() if name in kinds} == {float}
    assert contents(tmp_path / "run")["rows"] == run[1].epochs


NUMBERS = [{"tau": 0.01, "beta": 6.0, "gamma": 0.0}, {"tau": np.float64(0.01), "beta": 6, "gamma": np.float64(0)}]


@pytest.mark.parametrize("first, second", [NUMBERS, NUMBERS[::-1]])
def test_equal_numbers_of_other_types_are_one_run(first, second, tmp_path):
    x, y = images(10, network("full"))
    p, delta = (2, np.float64(0.05)) if first is NUMBERS[1] else (2.0, 0.05)
    for fields, threat, stop_after in ((first, Threat(p=p, delta=delta), 0), (second, Threat(delta=0.05), None)):
        config = replace(small(**fields), threat=threat)
        numbers = [*asdict(config.threat).values(), *(getattr(config, name) for name in fields)]
        assert {type(number) for number in numbers} == {float}
        history = finetune(network("full"), (x, y), None, config, resume=tmp_path / "run", stop_after=stop_after)
    assert history.finished


class Extra(nn.Module):
    """A network with a state that is no tensor."""

    def __init__(self):
        super().__init__()
        self.inner, self.calls = network("full"), 0

    def forward(self, x):
        self.calls += self.training
        return self.inner(x)

    def get_extra_state(self):
        return {"calls": self.calls}

    def set_extra_state(self, state):
        self.calls = state["calls"]


def counting(batch):
    """An objective that remembers a number."""
    batch.memory.setdefault("sizes", []).append(float(len(batch.x)))
    return sum(batch.memory["sizes"]) * ce(batch.net(batch.x), batch.y).mean()


@pytest.mark.parametrize("kind, objective", [(Extra, "wdat"), (lambda: network("full"), counting)])
def test_what_is_no_tensor_is_kept_too(kind, objective, tmp_path):
    """The extra state of a module, and the numbers that an objective remembers."""
    x, y = images(10, network("full"))
    whole, finished = kind(), False
    finetune(whole, (x, y), None, small(objective=objective))
    while not finished:
        model = kind()
        run = finetune(model, (x, y), None, small(objective=objective), resume=tmp_path / "run", stop_after=0)
        finished = run.finished
    for name, value in model.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]) if isinstance(value, torch.Tensor) else value["calls"] == 8


class Weighted:
    """An objective with a number of its own."""

    def __call__(self, batch):
        return 0.5 * batch.net(batch.x).square().mean()


def test_an_objective_that_is_an_object_goes_on_in_another_process(tmp_path):
    """It has another address there, which is no part of the run."""
    x, y = images(10, network("full"))
    for stop_after in (0, None):
        config = small(objective=Weighted(), loss=partial(ce))
        history = finetune(network("full"), (x, y), (x, y), config, resume=tmp_path / "run", stop_after=stop_after)
    assert history.finished


def test_a_checkpoint_a_minute_and_one_an_epoch(tmp_path, monkeypatch):
    saves = []
    save = _Checkpoint.save
    monkeypatch.setattr(_Checkpoint, "save", lambda self, state: (saves.append(len(state["rows"])), save(self, state)))
    train("last layer", resume=tmp_path / "run")
    assert saves == [0, 1, 2, 3]
    saves.clear()
    clock = iter(range(0, 10**6, 25))  # seconds, at every look at it
    monkeypatch.setattr(wdat_core.time, "monotonic", lambda: float(next(clock)))
    train("last layer", resume=tmp_path / "other")
    assert len(saves) > 4


# ---------------------------------------------------------------------------------------------------- killed processes


class Server:
    """The process of killable.py, which starts a child for each run."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, HERE / "killable.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])},
        )
        self.errors = []
        threading.Thread(target=lambda: self.errors.extend(self.process.stderr), daemon=True).start()

    def start(self, **order):
        self.process.stdin.write(json.dumps(order, default=str) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self):
        """The exit code of the child, minus the number of the signal that ended it."""
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.process.stdin.close()
    server.process.wait()


@posix
def test_killed_at_random_moments_a_run_ends_as_if_never_killed(server, unstopped, tmp_path, record_testsuite_property):
    """SIGKILL, with a checkpoint at every minibatch, so that many kills come while one is being written."""
    for warm in ("cold", "warm"):  # the server imports torch first
        begin = time.monotonic()
        server.start(run="whole", resume=tmp_path / warm, out=tmp_path / "out", save_every=0)
        assert server.wait() == 0
        takes = time.monotonic() - begin
    moments = random.Random(0)
    kills = finished = half_written = 0
    while kills < KILLS:
        name = list(RUNS)[finished % len(RUNS)]
        path, out = tmp_path / f"run{finished}", tmp_path / f"out{finished}"
        while not out.exists():
            child = server.start(run=name, resume=path, out=out, save_every=0)
            time.sleep(moments.uniform(0, takes))
            with contextlib.suppress(ProcessLookupError):  # it was faster
                os.kill(child, signal.SIGKILL)
            code = server.wait()
            assert code in (-signal.SIGKILL, 0), server.errors
            kills += code != 0
            half_written += len(list(tmp_path.glob("*.tmp")))
            for part in tmp_path.glob("*.tmp"):
                part.unlink()
        assert_same(torch.load(out, weights_only=True), unstopped(name))
        finished += 1
    record_testsuite_property("kills", kills)
    record_testsuite_property("killed_runs", finished)
    record_testsuite_property("kills_while_writing", half_written)


# -------------------------------------------------------------------------------------------- disks and damaged files


@posix
def test_a_file_that_may_not_grow_ends_the_run_in_one_line(server, tmp_path):
    """As on a full disk; what was written before is whole."""
    path, out = tmp_path / "run", tmp_path / "out"
    train("whole", resume=path, stop_after=0)
    size, before = path.stat().st_size, path.read_bytes()
    server.errors.clear()
    server.start(run="whole", resume=path, out=out, save_every=0, largest_file=size // 2)
    assert server.wait() == 3
    time.sleep(0.1)
    (line,) = server.errors
    assert "could not be written" in line and "make room" in line
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["run"]
    server.start(run="whole", resume=path, out=out)
    assert server.wait() == 0


FULL = OSError(28, "No space left on device"), WdatError, r"No space left on device.*make room"


@pytest.mark.parametrize("error, shown, words", [FULL, (KeyboardInterrupt(), KeyboardInterrupt, None)])
def test_a_checkpoint_that_is_not_written_to_its_end_leaves_the_last_one(
    error, shown, words, unstopped, tmp_path, monkeypatch
):
    path = tmp_path / "run"
    train("whole", resume=path, stop_after=0)
    before = path.read_bytes()

    def fails(descriptor):
        raise error

    with monkeypatch.context() as patch, pytest.raises(shown, match=words):
        patch.setattr(wdat_core.os, "fsync", fails)
        train("whole", resume=path, save_every=0)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    assert_same(result(*train("whole", resume=path)), unstopped("whole"))


def test_two_processes_that_keep_the_same_run_do_not_touch_each_other_s_file(tmp_path):
    theirs, left_behind, other = (
        tmp_path / name for name in ("run.wdat-1.tmp", "run.wdat-2.tmp", "another run.wdat-2.tmp")
    )
    for file in (theirs, left_behind, other):
        file.write_text("half")
    for file in (left_behind, other):
        os.utime(file, (time.time() - 7200,) * 2)
    train("whole", resume=tmp_path / "run")
    assert sorted(p.name for p in tmp_path.iterdir()) == [other.name, "run", theirs.name]


def test_a_folder_that_cannot_be_written_is_named_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    seen = []
    with pytest.raises(WdatError, match=r"could not be written"):
        train("whole", resume=tmp_path / "file" / "run", on_epoch=lambda epoch, model: seen.append(epoch))
    assert not seen


def test_a_damaged_checkpoint_is_never_taken(tmp_path, record_testsuite_property):
    """A bit of its bytes changed, and the file cut off at each."""
    path = tmp_path / "run"
    train("last layer", resume=path, stop_after=0)
    whole = path.read_bytes()
    checkpoint = _Checkpoint(path, {NETWORK: ""}, 60, 0)
    assert checkpoint.read()
    places = range(0, len(whole), 1 + len(whole) // DAMAGES)
    record_testsuite_property("damaged_checkpoints", 2 * len(places))
    for i in places:
        for broken in (whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :], whole[:i]):
            path.write_bytes(broken)
            with pytest.raises(WdatError, match=r"is damaged or no checkpoint of this version: give resume another"):
                checkpoint.read()


class Malicious:
    def __reduce__(self):
        return os.mkdir, (str(HERE / "executed"),)


def test_nothing_in_a_checkpoint_is_executed(tmp_path):
    stream = io.BytesIO()
    torch.save({"identity": {}, "model": Malicious()}, stream)
    content = stream.getvalue()
    (tmp_path / "run").write_bytes(CHECKPOINT + hashlib.sha256(content).digest() + content)
    with pytest.raises(WdatError, match="is damaged"):
        _Checkpoint(tmp_path / "run", {NETWORK: ""}, 60, 0).load()
    assert not (HERE / "executed").exists()


# ----------------------------------------------------------------------------------------------- whose checkpoint it is


def small(**fields):
    return FinetuneConfig(threat=Threat(delta=0.05), steps=1, epochs=2, batch_size=5, **fields)


OTHERS = {
    "tau": (lambda m, x, y, v: (m, (x, y), v, small(tau=0.1)), r"tau: there it was 0\.01, here it is 0\.1"),
    "threat": (
        lambda m, x, y, v: (m, (x, y), v, replace(small(), threat=Threat(p=3.0, delta=0.05))),
        r"threat: there it was Threat\(p=2\.0, .*here it is Threat\(p=3\.0",
    ),
    "epochs": (lambda m, x, y, v: (m, (x, y), v, replace(small(), epochs=3)), r"epochs: there it was 2, here it is 3"),
    "network": (
        lambda m, x, y, v: (network("full", seed=1), (x, y), v, small()),
        r"the tensors of the network: put that back as it was when the run began, give resume another file, or remove",
    ),
    "architecture": (
        lambda m, x, y, v: (network("mlp"), (x, y), v, small()),
        r"the tensors of the network: put that back as it was when the run began, give resume another file, or remove",
    ),
    "images": (lambda m, x, y, v: (m, (x.flip(0), y.flip(0)), v, small()), r"the training images:"),
    "labels": (lambda m, x, y, v: (m, (x, (y + 1) % 4), v, small()), r"the training images:"),
    "validation": (lambda m, x, y, v: (m, (x, y), None, small()), r"the validation images"),
    "objective": (
        lambda m, x, y, v: (m, (x, y), v, small(objective=remembering)),
        r"objective: there it was 'wdat', here it is killable\.remembering",
    ),
    "loss": (
        lambda m, x, y, v: (m, (x, y), v, small(loss=ce)),
        r"loss: there it was 'redlr', here it is wdat_core\.ce",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_checkpoint_of_another_run_is_refused_with_the_difference(case, tmp_path):
    path = tmp_path / "run"
    x, y = images(10, network("full"))
    finetune(network("full"), (x, y), (x, y), small(), resume=path, stop_after=0)
    before = path.read_bytes()
    change, words = OTHERS[case]
    model, *arguments = change(network("full"), x, y, (x, y))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(WdatError, match=rf"belongs to another run, it differs in {words}"):
        finetune(model, *arguments, resume=path)
    assert path.read_bytes() == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def scaled(batch, weight=1.0):
    return weight * ce(batch.net(batch.x), batch.y).mean()


def weighted(weight):
    return lambda batch: weight * scaled(batch)


@pytest.mark.parametrize(
    "name, one, other",
    [
        ("objective", lambda b: 0.5 * scaled(b), lambda b: 0.6 * scaled(b)),
        ("objective", lambda b: scaled(b) * 2.0, lambda b: scaled(b) + 2.0),
        ("objective", partial(scaled, weight=0.5), partial(scaled, weight=0.6)),
        ("objective", weighted(0.5), weighted(0.6)),
        ("loss", lambda z, y: 2.0 * ce(z, y), lambda z, y: 3.0 * ce(z, y)),
        ("loss", partial(cross_entropy, reduction="none"), partial(cross_entropy, reduction="none", ignore_index=9)),
    ],
)
def test_a_checkpoint_of_another_function_is_refused(name, one, other, tmp_path):
    """Whatever it is called."""
    x, y = images(10, network("full"))
    finetune(network("full"), (x, y), None, small(**{name: one}), resume=tmp_path / "run", stop_after=0)
    with pytest.raises(WdatError, match=f"belongs to another run, it differs in .*{name}[: ]"):
        finetune(network("full"), (x, y), None, small(**{name: other}), resume=tmp_path / "run")
    assert finetune(network("full"), (x, y), None, small(**{name: one}), resume=tmp_path / "run").finished


def test_a_function_has_one_name_in_every_process():
    assert "0x" not in str(named(partial(scaled, weight=ce)))


def with_other_words(source):
    """The code with other comments, docstrings and layout."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body[0].value.value = f"Other words for {getattr(node, 'name', 'all of it')}."
    return f"# One comment\n\n{ast.unparse(tree)}\n# and another.\n"


SOURCE = Path(wdat_core.__file__).read_text(encoding="utf-8")
OTHER_CODE = {
    "a default": ("step_ratio: float = 1.0", "step_ratio: float = 1.5"),
    "a name": ("def sensitivity(", "def sensitivities("),
    "an operator": ("logits.argmax(1) == y", "logits.argmax(1) != y"),
    "a class": ("class WdatError(ValueError)", "class WdatError(TypeError)"),
    "a word in an error": ("must be a number", "has to be a number"),
    "a new line": ("def ce(", "LATER = 3\n\n\ndef ce("),
    "one function less": ("def ce(", "def ce():\n    pass\n\n\ndef ce("),
    "a comment that is none": ('"""The conjugate of p', 'self = self or """The conjugate of p'),
}


@pytest.fixture
def edited(tmp_path, monkeypatch):
    """Lets wdat_core find another source where its own is."""

    def edit(source):
        (tmp_path / "core.py").write_bytes(source.encode())
        monkeypatch.setattr(code_digest, "__defaults__", (tmp_path / "core.py",))

    return edit


def test_the_digest_of_the_code_ignores_comments_docstrings_and_layout(edited):
    before = code_digest()
    assert re.fullmatch("[0-9a-f]{64}", before)
    edited(with_other_words(SOURCE))
    assert code_digest() == before
    edited(SOURCE.replace("\n", "\r\n"))
    assert code_digest() == before


@pytest.mark.parametrize("change", OTHER_CODE)
def test_the_digest_of_the_code_changes_with_it(change, edited):
    before, (old, new) = code_digest(), OTHER_CODE[change]
    assert old in SOURCE
    edited(SOURCE.replace(old, new, 1))
    assert code_digest() != before


def test_the_code_is_the_one_that_runs_and_not_what_the_file_says_later(edited, tmp_path, monkeypatch):
    """In a notebook, after `git pull`."""
    edited(SOURCE)
    monkeypatch.setattr(wdat_core, "__file__", tmp_path / "core.py")
    before = code_digest()
    edited(SOURCE.replace("step_ratio: float = 1.0", "step_ratio: float = 1.5", 1))
    assert code_digest() == before != code_digest(str(tmp_path / "core.py"))
    (tmp_path / "core.py").unlink()
    assert code_digest() == before
    with pytest.raises(WdatError, match="the code cannot be read"):
        code_digest(tmp_path / "other.py")


def test_a_checkpoint_is_refused_when_the_code_changed_and_not_when_a_comment_did(edited, unstopped, tmp_path):
    path = tmp_path / "run"
    train("whole", resume=path, stop_after=0)
    edited(SOURCE.replace("step_ratio: float = 1.0", "step_ratio: float = 1.5", 1))
    with pytest.raises(WdatError, match=r"belongs to another run, it differs in the code of wdat_core\.py"):
        train("whole", resume=path)
    edited(with_other_words(SOURCE))
    assert_same(result(*train("whole", resume=path)), unstopped("whole"))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"resume": 3}, r"resume must be the path of a file, not 3"),
        ({"resume": ""}, r"resume must be the path of a file, not ''"),
        ({"resume": HERE}, r"resume must be the path of a file, and .* is a folder"),
        ({"stop_after": 5}, r"stop_after needs resume"),
        ({"resume": "x", "stop_after": -1}, r"stop_after must be a number at least 0"),
        ({"resume": "x", "save_every": "often"}, r"save_every must be a number"),
    ],
)
def test_wrong_arguments_are_named(options, words):
    with pytest.raises(WdatError, match=words):
        train("whole", **options)


# ---------------------------------------------------------------------------------------------- guards while it runs


def test_a_run_that_diverges_keeps_its_last_good_checkpoint(tmp_path):
    path = tmp_path / "run"
    x, y = images(10, network("full"))
    with pytest.raises(WdatError, match=r"diverged in epoch \d+, minibatch \d+, at learning rate 1e\+200.*lower"):
        finetune(network("full"), (x, y), None, small(tau=1e200), resume=path, save_every=0)
    assert all(value.isfinite().all() for value in contents(path)["best_state"].values())


class Endless(nn.Module):
    """A loss that is finite, and whose gradient in the parameters is not."""

    def __init__(self):
        super().__init__()
        self.inner, self.scale = network("mlp"), nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        return self.inner(x) + self.scale.sqrt()


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path):
    model = Endless()
    x, y = images(10, model.inner)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(WdatError, match=r"diverged in epoch 1, minibatch 1"):
        finetune(model, (x, y), None, small(noise=0.0))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


class Small(nn.Module):
    """A network on a device with room for a few images at once."""

    def __init__(self, inner, room, message="CUDA out of memory"):
        super().__init__()
        self.inner, self.room, self.error = inner, room, torch.cuda.OutOfMemoryError(message)
        self.largest = 0

    def forward(self, x):
        if len(x) > self.room:
            raise self.error
        self.largest = max(self.largest, len(x))
        return self.inner(x)


@pytest.mark.parametrize("loss", ["ce", "redlr"])
@pytest.mark.parametrize("room", [1, 3, 7])
def test_out_of_memory_an_attack_looks_at_fewer_images_at_once(room, loss):
    model = network("mlp")
    x, y = images(20, model)
    threat = Threat(delta=0.05)
    plain = wpgd(model, x, y, threat, loss=loss, steps=4)
    little = Small(model, room)
    attack = wpgd(little, x, y, threat, loss=loss, steps=4)
    torch.testing.assert_close(attack.x_adv, plain.x_adv, rtol=0, atol=1e-12)
    assert torch.equal(attack.correct, plain.correct) and 1 <= little.largest <= room


def test_out_of_memory_with_one_image_is_named():
    model = Small(network("mlp"), 1)
    x, y = images(4, model.inner)
    model.inner.register_forward_hook(lambda *_: setattr(model, "room", 0))  # after the check, on one image
    with pytest.raises(WdatError, match=r"out of memory on cpu with 1 images at once: the network is too large for it"):
        wpgd(model, x, y, Threat(delta=0.05), steps=1)


def test_out_of_memory_in_the_sgd_step_says_what_would_fit():
    """The attack is split by itself, the step cannot be: its batch statistics are those of the minibatch."""
    model = Small(network("full"), 6)
    x, y = images(24, model.inner)
    config = FinetuneConfig(threat=Threat(delta=0.05), steps=1, epochs=1, batch_size=12)
    with pytest.raises(
        WdatError, match=r"out of memory in the SGD step on a minibatch of 12 images: a batch_size of 6"
    ):
        finetune(model, (x, y), None, config)


class Holder:
    """An objective with a state."""

    def __init__(self, weight):
        self.weight = weight

    def __call__(self, batch):
        return self.weight * batch.net(batch.x).mean()

    def method(self, batch):
        return self(batch)


def doubled(inner):
    return lambda batch: inner(batch) * 2


def scaled_by(by):
    def objective(batch):
        return (lambda total: total * by)(batch.net(batch.x).mean())

    return objective


@pytest.mark.parametrize(
    "make",
    [
        Holder,
        lambda weight: Holder(weight).method,
        lambda weight: partial(Holder.method, Holder(weight)),
        lambda weight: doubled(Holder(weight)),
        lambda weight: doubled(scaled_by(weight)),
        lambda weight: doubled(torch.nn.Linear(1, 1).requires_grad_(False).apply(lambda m: m.weight.fill_(weight))),
        lambda weight: doubled((weight, {"a": [torch.tensor(weight)]})),
    ],
)
def test_objectives_that_differ_in_what_they_hold_have_other_names_and_the_same_ones_the_same(make):
    def name(weight):
        torch.manual_seed(0)
        return named(make(weight))

    assert name(1.0) == name(1.0) != name(2.0)
    assert "0x" not in name(1.0)


def test_a_function_that_calls_itself_has_a_name():
    def again(batch):
        return again(batch)

    assert named(again) == named(again)


def test_a_run_goes_on_where_the_generators_are_those_of_another_device(monkeypatch):
    """A run has one device. Its checkpoint says "device", and not which."""
    states, seen = {"cuda:0": torch.arange(3), "cuda:1": torch.arange(2)}, {}

    class Module:
        get_rng_state = staticmethod(lambda device: states[str(device)])
        set_rng_state = staticmethod(lambda state, device: seen.update({str(device): state}))

    model, generator = torch.nn.Linear(1, 1), torch.Generator()
    monkeypatch.setattr(torch, "get_device_module", lambda device: Module)
    monkeypatch.setattr(wdat_core, "_accelerators", lambda model: [torch.device("cuda:0")])
    saved = wdat_core._random_state(model, generator)
    monkeypatch.setattr(wdat_core, "_accelerators", lambda model: [torch.device("cuda:1")])
    wdat_core._set_random_state(model, generator, saved)
    assert torch.equal(seen["cuda:1"], states["cuda:0"])
    wdat_core._set_random_state(model, generator, {name: saved[name] for name in ("run", "cpu")})  # of a CPU


# ------------------------------------------------------------------------------------------- what is easily overlooked


class Slotted:
    """An objective whose state is in no dict."""

    __slots__ = ("weight",)

    def __init__(self, weight):
        self.weight = weight

    def __call__(self, batch):
        return self.weight * batch.net(batch.x).mean()


class Scaled(nn.Module):
    """An objective with a plain attribute beside its parameters, of which it has none."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, batch):
        return self.weight * batch.net(batch.x).mean()


def closed_over(weight):
    table = np.zeros(3000)
    table[1500] = weight  # the words of numpy leave it out
    return lambda batch: float(table.sum()) * batch.net(batch.x).mean()


@pytest.mark.parametrize(
    "make",
    [
        Slotted,
        Scaled,
        closed_over,
        lambda weight: nn.CrossEntropyLoss(reduction="none", label_smoothing=weight / 4),
        lambda weight: nn.Sequential(nn.Identity(), Scaled(weight)),
        lambda weight: partial(ce, np.float32(weight)),
    ],
)
def test_what_an_object_holds_in_other_ways_is_in_its_name_too(make):
    names = [named(make(weight)) for weight in (1.0, 1.0, 2.0)]
    assert names[0] == names[1] != names[2] and "0x" not in names[0]


def test_functions_of_numpy_keep_their_own_names():
    assert named(np.exp) != named(np.log)


def test_a_checkpoint_with_another_loss_module_is_refused(tmp_path):
    x, y = images(10, network("full"))
    for smoothing, words in ((0.0, None), (0.5, "differs in loss")):
        config = small(loss=nn.CrossEntropyLoss(reduction="none", label_smoothing=smoothing))
        with pytest.raises(WdatError, match=words) if words else contextlib.nullcontext():
            finetune(network("full"), (x, y), None, config, resume=tmp_path / "run", stop_after=0)


def test_where_nothing_can_be_written_the_model_stays_as_it_was(tmp_path):
    (tmp_path / "file").write_text("")
    model = network("full")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(WdatError, match="could not be written"):
        finetune(model, images(10, model), None, small(), resume=tmp_path / "file" / "run")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [*tmp_path.iterdir()] == [tmp_path / "file"]


class Counting(nn.Module):
    """A network with a buffer that is not saved with it, and moves with every update."""

    def __init__(self):
        super().__init__()
        self.inner = network("mlp")
        self.register_buffer("seen", torch.zeros(4, dtype=torch.float64), persistent=False)

    def forward(self, x):
        logits = self.inner(x) + self.seen
        if self.training:
            self.seen.add_(0.1 * logits.detach().mean(0))
        return logits


def test_buffers_that_are_not_saved_with_a_model_are_part_of_the_run_and_of_its_best_epoch(tmp_path):
    x, y = images(20, network("mlp"))
    config = replace(small(), epochs=4, tau=0.05)
    seen, whole = {}, Counting()
    history = finetune(whole, (x, y), (x, y), config, on_epoch=lambda e, m: seen.update({e: m.seen.clone()}))
    assert torch.equal(whole.seen, seen[history.best]) and len({float(s[0]) for s in seen.values()}) == 4
    finished = False
    while not finished:
        model = Counting()
        finished = finetune(model, (x, y), (x, y), config, resume=tmp_path / "run", stop_after=0).finished
    assert torch.equal(model.seen, whole.seen)
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in model.state_dict().items())


def forgetful(batch):
    """An objective that remembers, from its second minibatch on, what torch does not load again."""
    batch.memory.setdefault("what", []).append(threading.Thread if batch.memory.get("what") else 1.0)
    return batch.net(batch.x).square().mean()


def test_what_could_not_be_loaded_again_is_named_and_the_last_checkpoint_stays(tmp_path):
    model = network("full")
    with pytest.raises(WdatError, match="memory holds what torch does not load again"):
        finetune(model, images(10, model), None, small(objective=forgetful), resume=tmp_path / "run", save_every=0)
    assert len(contents(tmp_path / "run")["losses"]) == 1


# ---------------------------------------------------------------------------------------------- in a notebook


class Stopped:
    """A progress that ends the run at its k-th minibatch, as Ctrl-C does."""

    def __init__(self, at):
        self.left = at

    def __call__(self, things):
        for thing in things:
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt
            yield thing


def test_a_run_goes_on_from_each_network_at_which_it_was_entered(unstopped, tmp_path):
    """Stopped, gone on with the network of the stop, interrupted, and then from the start of it all or from there."""
    model = network("full")
    data, val = images(14, model), images(9, model, seed=1)

    def go_on(model, **options):
        return finetune(model, data, val, RUNS["whole"], resume=tmp_path / "run", **options)

    go_on(model, stop_after=0)
    stopped = copy.deepcopy(model)
    with pytest.raises(KeyboardInterrupt):
        go_on(model, save_every=0, progress=Stopped(2))
    for entered in (network("full"), stopped, network("full")):
        go_on(entered, stop_after=0)
    history = go_on(model)
    assert_same(result(model, history), unstopped("whole"))
    go_on(model)  # which is that of the best epoch now
    assert_same(result(model, history), unstopped("whole"))
    with pytest.raises(WdatError, match="differs in the tensors of the network: put that back as it was when"):
        go_on(network("full", seed=5))


@pytest.mark.parametrize("at", [1, 2, 5, 8])
def test_the_same_call_with_the_same_model_goes_on_after_an_interrupt(at, unstopped, tmp_path):
    model = network("full")
    before = copy.deepcopy(model.state_dict())
    data, val = images(14, model), images(9, model, seed=1)
    with pytest.raises(KeyboardInterrupt):
        finetune(model, data, val, RUNS["whole"], resume=tmp_path / "run", save_every=0, progress=Stopped(at))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    if at > 1:
        assert len(contents(tmp_path / "run")["losses"]) + 3 * len(contents(tmp_path / "run")["rows"]) == at - 1
    else:  # there is nothing to keep
        assert not (tmp_path / "run").exists()
    history = finetune(model, data, val, RUNS["whole"], resume=tmp_path / "run")
    assert_same(result(model, history), unstopped("whole"))


def test_without_a_checkpoint_an_interrupt_keeps_what_was_learned():
    model = network("full")
    before = copy.deepcopy(model.state_dict())
    data = images(14, model)
    for at, changed in ((1, False), (3, True)):
        with pytest.raises(KeyboardInterrupt):
            finetune(model, data, None, RUNS["whole"], progress=Stopped(at))
        assert changed != all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_first_minibatch_that_fails_perturbs_nothing():
    """Else a second try would start from a network that is perturbed twice."""
    model = network("full")
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):
        with pytest.raises(WdatError, match="must return a scalar"):
            finetune(model, images(14, model), None, small(objective=lambda batch: batch.net(batch.x)))
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Versioned(nn.Module):
    """A network that reads its version when its weights are loaded, as those of torchvision's MNASNet do."""

    _version = 2

    def __init__(self):
        super().__init__()
        self.inner = network("full")

    def forward(self, x):
        return self.inner(x)

    def _load_from_state_dict(self, state, prefix, metadata, *others):
        if metadata.get("version") not in (1, 2):
            raise ValueError(f"version should be 1 or 2, not {metadata.get('version')}")
        super()._load_from_state_dict(state, prefix, metadata, *others)


def test_modules_that_ask_for_their_version_are_trained_and_resumed(tmp_path):
    model, plain = Versioned(), network("full")
    data = images(14, plain)
    expected = finetune(plain, data, None, RUNS["whole"])
    finetune(model, data, None, RUNS["whole"], resume=tmp_path / "run", stop_after=0)
    history = finetune(Versioned(), data, None, RUNS["whole"], resume=tmp_path / "run")
    assert [row["loss"] for row in history.epochs] == [row["loss"] for row in expected.epochs]


class Weight:
    """An object with no words of its own."""

    def __init__(self, value):
        self.value = value


GLOBAL = 1.0


def weighted_by_a_global(batch):
    return GLOBAL * cross_entropy(batch.net(batch.x), batch.y)


def by_way_of_another(batch):
    return next(weighted_by_a_global(one) for one in (batch,))


def weighted_by_an_object(value):
    held = Weight(value)
    return lambda batch: held.value * cross_entropy(batch.net(batch.x), batch.y)


@pytest.mark.parametrize(
    "make",
    [weighted_by_an_object, lambda _: weighted_by_a_global, lambda _: by_way_of_another],
    ids=["object", "global", "global of another function"],
)
def test_what_an_objective_takes_from_elsewhere_belongs_to_the_run(make, tmp_path, monkeypatch):
    model = network("full")

    def go_on(value):
        monkeypatch.setitem(globals(), "GLOBAL", value)
        config = small(objective=make(value))
        finetune(copy.deepcopy(model), images(10, model), None, config, resume=tmp_path / "run", stop_after=0)

    go_on(1.0)
    go_on(1.0)
    with pytest.raises(WdatError, match=r"differs in (held\.value|GLOBAL) .*there it was 1\.0, here it is 100\.0: put"):
        go_on(100.0)


def test_a_logger_that_an_objective_holds_is_no_other_run(tmp_path):
    """Its file has another name at every start."""

    def objective(name):
        writer = Weight(None)
        writer.folder, writer.file = f"runs/{name}", (tmp_path / name).open("w")
        return lambda batch: (writer.file.write("."), cross_entropy(batch.net(batch.x), batch.y))[1]

    model = network("full")
    for name in ("first", "second"):
        config = small(objective=objective(name))
        finetune(copy.deepcopy(model), images(10, model), None, config, resume=tmp_path / "run", stop_after=0)


def test_an_objective_that_fills_a_list_goes_on_whatever_is_in_it(tmp_path):
    model, log = network("full"), []

    def objective(batch):
        log.append(len(log))
        return cross_entropy(batch.net(batch.x), batch.y)

    def go_on():
        finetune(copy.deepcopy(model), images(10, model), None, config, resume=tmp_path / "run", stop_after=0)

    config = small(objective=objective)
    go_on()
    go_on()
    assert log == [0, 1]
    log.clear()
    go_on()
    log.append(7)
    go_on()


def test_a_teacher_that_learns_where_no_checkpoint_keeps_it_is_named_in_the_first_minibatch(tmp_path):
    """Else the run would go on with another teacher, and not end as it would have."""

    class Mean:
        def __init__(self, model):
            self.model, self.teacher = model, copy.deepcopy(model)

        def __call__(self, batch):
            for a, b in zip(self.teacher.parameters(), self.model.parameters(), strict=True):
                a.data.lerp_(b.data, 0.1)
            return (batch.net(batch.x) - self.teacher(batch.x).detach()).square().mean() + ce(
                batch.net(batch.x), batch.y
            ).mean()

    model = network("mlp")
    config, data = small(objective=Mean(model)), images(20, model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(WdatError, match=r"tensor \d\.weight of objective\.teacher changes while the run goes on"):
        finetune(model, data, None, config, resume=tmp_path / "run")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert finetune(model, data, None, config).finished


class Logging:
    """Changes what it reads for the first time in its third minibatch, and `on_epoch` changes more."""

    def __init__(self):
        self.calls, self.log, self.epoch, self.weight = 0, [], 0, 1.0

    def __call__(self, batch):
        self.calls += 1
        if self.calls % 3 == 0:
            self.log.append(1.0)
        return self.weight * ce(batch.net(batch.x), batch.y).mean() + 0 * (len(self.log) + self.epoch)


@pytest.mark.parametrize("at", ["a minibatch", "on_epoch"])
def test_what_changed_first_after_the_last_checkpoint_is_the_runs_own_work_too(at, tmp_path):
    objective, data, stopped = Logging(), images(20, network("full")), []

    def on_epoch(epoch, model):
        objective.epoch = epoch
        if at == "on_epoch" and not stopped:
            stopped.append(epoch)
            raise KeyboardInterrupt

    def progress(things):
        for k, thing in enumerate(things):
            if k == 3 and at == "a minibatch" and not stopped:
                stopped.append(k)
                raise KeyboardInterrupt
            yield thing

    def go_on():
        config, calls = small(objective=objective), {"on_epoch": on_epoch, "progress": progress}
        return finetune(network("full"), data, data, config, resume=tmp_path / "run", **calls)

    with pytest.raises(KeyboardInterrupt):
        go_on()
    assert objective.log and stopped
    objective.weight = 2.0
    with pytest.raises(WdatError, match=r"differs in objective\.weight: there it was 1\.0, here it is 2\.0"):
        go_on()
    objective.weight = 1.0
    assert go_on().finished


def test_gradients_in_the_memory_go_on(tmp_path):
    """As those of a weight that the objective itself raises, one minibatch later."""

    def objective(batch):
        (weight,) = batch.memory.setdefault("weight", [torch.tensor(1.0, dtype=torch.float64, requires_grad=True)])
        if weight.grad is not None:
            with torch.no_grad():
                weight += 0.5 * weight.grad
            weight.grad = None
        return weight * ce(batch.net(batch.x), batch.y).mean()

    ends, data = [], images(20, network("full"))
    for stops in (0, 3):
        for _ in range(stops):
            finetune(network("full"), data, None, small(objective=objective), resume=tmp_path / "run", stop_after=0)
        model = network("full")
        finetune(model, data, None, small(objective=objective), resume=tmp_path / "run" if stops else None)
        ends.append([parameter.clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_a_teacher_in_eval_mode_goes_on_and_one_whose_statistics_move_is_named(tmp_path):
    def make(training):
        teacher = network("full").train(training)  # with batch statistics
        return lambda batch: (batch.net(batch.x) - teacher(batch.x).detach()).square().mean()

    ends, data = [], images(20, network("full"))
    for stops in (0, 2):
        for _ in range(stops):
            finetune(network("full"), data, None, small(objective=make(False)), resume=tmp_path / "run", stop_after=0)
        model = network("full")
        finetune(model, data, None, small(objective=make(False)), resume=tmp_path / "run" if stops else None)
        ends.append([parameter.clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    with pytest.raises(
        WdatError, match=r"running_mean of teacher of objective changes .* put that network in eval mode"
    ):
        finetune(network("full"), data, None, small(objective=make(True)), resume=tmp_path / "other")


def test_functions_that_all_call_each_other_are_named_at_once(tmp_path):
    names = [f"f{k}" for k in range(12)]
    lines = [f"def {name}(): return {', '.join(names)}, {k}" for k, name in enumerate(names)]

    def module(*lines):
        (tmp_path / "many.py").write_text("\n".join(lines), encoding="utf-8")
        return runpy.run_path(str(tmp_path / "many.py"))

    begin = time.perf_counter()
    first = named(module(*lines)["f0"])
    assert time.perf_counter() - begin < 10
    assert named(module(*lines)["f0"]) == first
    assert named(module(*lines[:-1], "def f11(): return f0, f1, f2")["f0"]) != first


@posix
def test_a_checkpoint_behind_a_link_stays_there(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "large disk")
    train("whole", resume=tmp_path / "link", stop_after=0)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "large disk").is_file()


def test_an_object_that_holds_itself_has_a_name():
    held = Weight(None)
    held.value = {"inside": [held], "all": frozenset([held])}
    assert named(held) == named(held)
