"""Settings, data, networks, records and tables: what a notebook's user can get right and wrong."""

import json
import math
import re
import runpy
import shlex
import string
import subprocess
import sys
import types
import urllib.error
import urllib.request
from typing import get_args

import numpy as np
import pytest
import torch
from altered import altered, recorded
from matplotlib.collections import PathCollection
from PIL import Image
from pydantic import ValidationError

from benchmarks.races import POINTS, SPEED
from companion import agreement, evidence, files, intervals, networks, worst
from companion.bench import check_clean, command
from companion.data import cifar, embedded, floats, load_data
from companion.datasets import DATASETS, NORMS
from companion.evidence import columns_of, paper_value
from companion.intervals import Estimate, accuracy, change, outcome_of_change
from companion.machine import pick_device
from companion.origins import describe
from companion.performance import strength_answer
from companion.plots import plot_changes
from companion.promises import promises, promises_table
from companion.records import LATER, make_record, newest_last, read_records, recorded_like, write_record
from companion.runs import finetune_grid
from companion.settings import GRIDS, METRICS, PAPER_NETWORKS, PRESETS, STRONGER, ParameterError, Settings
from companion.tables import compare, grid_rows, grid_table
from companion.values import pack, unpack
from wdat_core import Scores


def from_notebook(**parameters):
    """What a kernel's namespace holds when the first cell asks: the parameters, and IPython's own names."""
    noise = {"In": [], "Out": {}, "_ih": [], "exit": object.__init__, "get_ipython": lambda: None, "math": math}
    return Settings.from_notebook({**noise, **parameters}, "table4")


# ---------------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------------


def test_checking_parameters_needs_no_torch():
    code = (
        "import sys; from companion.settings import Settings; Settings().resolved(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=files.ROOT).returncode == 0


def test_preset_fills_in_what_is_not_given():
    settings = from_notebook(preset="paper", epochs=3)
    assert (settings.network, settings.epochs, settings.batch_size) == ("Zhang2019Theoretically", 3, 512)
    assert (settings.train_images, settings.val_images, settings.test_images) == (40_000, 10_000, 10_000)


def test_data_set_and_norm_give_the_usual_radius():
    assert from_notebook().delta == 8 / 255 and from_notebook().r == math.inf
    assert from_notebook(norm="L2").delta == 0.5 and from_notebook(norm="L2").r == 2
    assert from_notebook(norm="L2", delta=3).delta == 3
    assert from_notebook(dataset="cifar100", data="data").delta == 8 / 255
    imagenet = Settings.from_notebook({"dataset": "imagenet", "data": "data", "preset": "paper"}, "worst_case")
    assert (imagenet.delta, imagenet.test_images) == (4 / 255, 5000)


def test_data_sets_and_norms_are_those_of_the_rows():
    assert get_args(Settings.model_fields["dataset"].annotation) == tuple(DATASETS)
    assert get_args(Settings.model_fields["norm"].annotation) == NORMS


def test_settings_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        from_notebook().tau = 1.0


def test_grid_is_all_of_the_paper_or_the_one_asked_for():
    assert from_notebook().grid() == [(0.1, 0.1), (0.01, 0.1), (0.1, 1.0), (0.01, 1.0)]
    assert from_notebook(tau=0.01).grid() == [(0.01, 0.1), (0.01, 1.0)]
    assert from_notebook(tau=0.5, eta=1).grid() == [(0.5, 1.0)]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"tua": 0.01}, "unknown parameter 'tua': did you mean 'tau'"),
        ({"tau": "0.01"}, "tau must be a number, not '0.01'"),
        ({"tau": 0}, "tau must be above 0"),
        ({"tau": math.nan}, "tau must be a finite number, not nan"),
        ({"eta": 1.5}, "eta must be at most 1, not 1.5"),
        ({"eta": 0}, "eta must be above 0"),
        ({"delta": 0}, "delta must be at least 1e-06"),
        ({"delta": math.inf}, "delta must be a finite number"),
        ({"beta": -1}, "beta must be at least 0"),
        ({"steps": 0}, "steps must be above 0"),
        ({"steps": 2.5}, "steps must be a whole number"),
        ({"epochs": True}, "epochs must be a whole number"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"preset": "papr"}, "preset must be 'demo' or 'paper', not 'papr'"),
        ({"consistency": "mse"}, "consistency must be 'ce_detached', 'ce' or 'kl'"),
        ({"precision": "float16"}, "precision must be 'float32' or 'bfloat16'"),
        ({"compiled": 1}, "compiled must be True or False, not 1"),
        ({"upsilon_from": "full"}, "upsilon_from must be 'sample' or 'batch'"),
        ({"network": 7}, "network must be a text"),
        ({"export": True}, "export must be a text"),
        ({"test_images": 1001}, "test_images is 1001, and the 'embedded' data has 1000"),
        ({"preset": "paper", "train_images": 45_000}, "CIFAR-10 has 50000"),
        ({"tau": True}, "tau must be a number, not True"),
        ({"tau": None, "beta": None}, "beta must be a number, not None"),
        ({"delta": 8}, r"delta must be at most 1 in Linf, not 8.0: pixels are in \[0, 1\]"),
        ({"dataset": "mnist"}, "dataset must be 'cifar10', 'cifar100' or 'imagenet', not 'mnist'"),
        ({"norm": "l2"}, "norm must be 'Linf' or 'L2', not 'l2'"),
        ({"dataset": "cifar100"}, "the embedded images are of CIFAR-10: give the folder of CIFAR-100 as data"),
        ({"dataset": "cifar100", "data": "data", "norm": "L2"}, "delta must be given: .* CIFAR-100 in L2"),
        ({"dataset": "imagenet", "data": "data", "test_images": 5001}, "the 'data' data has 5000: ask for fewer"),
    ],
)
def test_bad_parameter_is_named(parameters, message):
    with pytest.raises(ParameterError, match=message) as caught:
        from_notebook(**parameters)
    assert caught.value._render_traceback_() == [f"ParameterError: {caught.value}"]


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


def test_embedded_images():
    data = load_data(Settings(train_images=100, val_images=20).resolved())
    assert [len(y) for _, y in (data.train, data.val, data.test)] == [100, 20, 1000]
    for x, y in (data.train, data.val, data.test):
        assert x.shape[1:] == (3, 32, 32) and x.dtype == torch.float32 and y.dtype == torch.int64
        assert x.min() >= 0 and x.max() == 1
        assert torch.equal(x * 255, (x * 255).round())
    # Every class is there about as often as in CIFAR-10.
    assert data.test[1].bincount(minlength=10).min() > 80


def test_embedded_images_are_those_of_the_golden_file():
    with np.load(files.ROOT / "tests" / "golden" / "cifar10_test_256.npz") as golden:
        images, labels = (golden[name] for name in sorted(golden.files, key=lambda n: -golden[n].ndim))
    x, y = embedded("test")
    assert np.array_equal(x[:256].numpy(), images.reshape(256, 3, 32, 32)) and np.array_equal(y[:256].numpy(), labels)


def test_damaged_image_file_is_named(tmp_path, monkeypatch):
    for path in (*files.ASSETS.glob("images*"), files.ASSETS / "SHA256SUMS"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(files, "ASSETS", tmp_path)
    index = tmp_path / "images.json"
    labels = index.read_text(encoding="utf-8")
    index.write_text(labels.replace('"labels": "6', '"labels": "7'), encoding="utf-8")
    with pytest.raises(ParameterError, match=r"damaged or missing.*images.json does not have the digest"):
        embedded("test")
    index.write_text(labels, encoding="utf-8")
    assert len(embedded("test")[1]) == 1000
    sheet = tmp_path / "images_test.webp"
    for content in (sheet.read_bytes()[:10_000], b"", (tmp_path / "images_val.webp").read_bytes()):
        sheet.write_bytes(content)
        with pytest.raises(ParameterError, match=r"images_test.webp or .* damaged or missing: restore both"):
            embedded("test")
    sheet.unlink()
    with pytest.raises(ParameterError, match=r"images_test.webp or .* damaged or missing"):
        embedded("test")
    (tmp_path / "images.json").write_text("{")
    with pytest.raises(ParameterError, match=r"images.json beside it is damaged"):
        embedded("val")


def test_no_cifar10_and_no_network(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(ParameterError, match=r"CIFAR-10 is not in .* and could not be put there .*no route"):
        cifar(tmp_path, train=True)


# ---------------------------------------------------------------------------------------------------------------------
# Networks
# ---------------------------------------------------------------------------------------------------------------------


def test_demo_network_is_what_its_record_says(tmp_path):
    network = networks.load_network("demo", tmp_path)
    (record,) = [r for r in read_records(kind="pretrain") if r.network.name == "demo"]
    assert network.digest == record.network.digest and not network.model.training
    x, y = embedded("test")
    with torch.no_grad():
        correct = network.model(floats(x)).argmax(1) == y
    recorded = unpack(record.correct["after"]["clean"], record.data.test)[:1000]
    assert np.abs(correct.numpy() - recorded).sum() <= 5  # images at the boundary, on another machine


def test_damaged_stand_in_is_named(tmp_path, monkeypatch):
    """A flipped bit in a number would load as well as any other number."""
    for name in ("demo.safetensors", "SHA256SUMS"):
        (tmp_path / name).write_bytes((files.ASSETS / name).read_bytes())
    monkeypatch.setattr(files, "ASSETS", tmp_path)
    assert networks.load_network("demo", tmp_path).name == "demo"
    content = bytearray((tmp_path / "demo.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "demo.safetensors").write_bytes(content)
    with pytest.raises(ParameterError, match=r"demo.safetensors does not hold .* restore it"):
        networks.load_network("demo", tmp_path)


def test_unknown_network_gets_the_nearest(tmp_path):
    with pytest.raises(ParameterError, match=r"unknown network 'Zhang2019Theoretical'.*Zhang2019Theoretically"):
        networks.load_network("Zhang2019Theoretical", tmp_path)
    with pytest.raises(ParameterError, match=r"unknown network 'dmo': did you mean demo"):
        networks.load_network("dmo", tmp_path)


def test_the_five_are_in_the_zoo():
    assert set(PAPER_NETWORKS) <= set(networks.zoo())


@pytest.fixture
def tiny_zoo(monkeypatch):
    """RobustBench's real loader with one small entry under a paper's name, so that its files stay small."""
    entry = {"model": lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10)), "gdrive_id": "x"}
    zoo = networks.zoo()
    monkeypatch.setitem(zoo, "Zhang2019Theoretically", entry)
    return entry


def place(folder, content):
    path = folder / "cifar10" / "Linf" / "Zhang2019Theoretically.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    return path


def load(folder):
    return networks.load_network("Zhang2019Theoretically", folder)


def test_local_weights_come_first(tiny_zoo, tmp_path):
    state = tiny_zoo["model"]().state_dict()
    place(tmp_path, {f"module.{k}": v for k, v in state.items()})
    assert torch.equal(load(tmp_path).model.state_dict()["1.weight"], state["1.weight"])


@pytest.mark.parametrize("cut", [10, 1000, 100_000])
def test_truncated_weights(tiny_zoo, tmp_path, cut):
    path = place(tmp_path, tiny_zoo["model"]().state_dict())
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ParameterError, match=r"Zhang2019Theoretically.pt .*truncated.*place the file.*WRN-34-10"):
        load(tmp_path)


def test_weights_that_are_a_web_page(tiny_zoo, tmp_path):
    place(tmp_path, b"\n<!DOCTYPE html><html><body>Quota exceeded</body></html>")
    with pytest.raises(ParameterError, match=r"HTML page.*delete it and place the file"):
        load(tmp_path)


def test_weights_of_another_architecture(tiny_zoo, tmp_path):
    place(tmp_path, torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 7)).state_dict())
    with pytest.raises(ParameterError, match=r"do not fit its architecture .*place the file"):
        load(tmp_path)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("code of a weights file was executed",))


def test_no_code_is_executed_from_weights(tiny_zoo, tmp_path):
    place(tmp_path, {"state_dict": Bomb()})
    with pytest.raises(ParameterError, match="not plain weights"):
        load(tmp_path)


def test_failed_download_leaves_nothing(tiny_zoo, tmp_path, monkeypatch):
    import robustbench.utils

    def half(file_id, path):
        path.write_bytes(b"PK half a file")
        raise OSError("connection reset")

    monkeypatch.setattr(robustbench.utils, "download_gdrive_new", half)
    with pytest.raises(ParameterError, match=r"download failed: place the file .*connection reset"):
        load(tmp_path)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_downloaded_web_page_leaves_nothing(tiny_zoo, tmp_path, monkeypatch):
    import robustbench.utils

    monkeypatch.setattr(
        robustbench.utils, "download_gdrive_new", lambda file_id, path: path.write_bytes(b"<html>no</html>")
    )
    with pytest.raises(ParameterError, match="HTML page"):
        load(tmp_path)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_clean_accuracy_far_from_the_published_one_is_refused():
    def on(name="Zhang2019Theoretically", **given):
        settings = Settings(**{"data": "data", **given})
        return types.SimpleNamespace(network=types.SimpleNamespace(name=name), settings=settings)

    check_clean(on(), 0.8492, 10_000)
    check_clean(on(), 0.82, 1000)
    for clean, images in ((0.83, 10_000), (0.1, 1000)):
        with pytest.raises(ParameterError, match=r"84.92 % is published"):
            check_clean(on(), clean, images)
    # RobustBench has networks of such names for other data and in another norm too.
    for given in ({"norm": "L2"}, {"dataset": "cifar100"}, {"data": "mine.py:f"}):
        check_clean(on("Wang2023Better_WRN-28-10", **given), 0.7, 10_000)


def test_missing_device_is_named():
    with pytest.raises(ParameterError, match="this machine has no device 'cuda:99': use auto or cpu"):
        pick_device("cuda:99")


# ---------------------------------------------------------------------------------------------------------------------
# Records and tables
# ---------------------------------------------------------------------------------------------------------------------


SMALL = {"train_images": 60, "val_images": 20, "test_images": 50, "batch_size": 20, "steps": 2}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A real run of two columns, as small as can be."""
    patch = pytest.MonkeyPatch()
    patch.setattr(files, "RUNS", tmp_path_factory.mktemp("runs"))
    records = finetune_grid(Settings(eta=1, **SMALL).resolved(), "whole", notebook="table4")
    yield records, files.RUNS
    patch.undo()


def test_a_column_stopped_by_its_time_goes_on_where_it_was(run, tmp_path, monkeypatch):
    """In pieces of one minibatch: the record of a run that was never stopped, and nothing else left behind."""
    monkeypatch.setattr(files, "RUNS", tmp_path)
    settings, stops = Settings(eta=1, tau=0.1, **SMALL, stop_after=1e-9).resolved(), 0
    while True:
        try:
            (record,) = finetune_grid(settings, "whole", notebook="table4")
            break
        except ParameterError as error:
            assert "stopped after 1e-09 seconds, as asked" in str(error) and "the same command goes on" in str(error)
            assert sorted(path.suffix for path in tmp_path.iterdir()) == [".checkpoint", ".json"]  # the baseline
            stops += 1
    assert stops == 4 * 3
    unstopped = run[0][0]
    for name in ("metrics", "correct", "config", "command"):
        assert getattr(record, name) == getattr(unstopped, name)
    assert record.history.upsilon == unstopped.history.upsilon
    assert [path.suffix for path in tmp_path.iterdir()] == [".json", ".json"]


def test_records_come_back_as_they_were_written(run):
    records, folder = run
    assert sorted(map(str, read_records(folder))) == sorted(map(str, records))
    assert recorded_like(records, folder) == read_records(folder)
    for record in records:
        assert make_record(json.loads(json.dumps(record.stored(), allow_nan=False))) == record


def test_record_accuracies_are_those_of_its_images(run):
    for record in run[0]:
        for when, scores in record.metrics.items():
            for metric, value in scores.items():
                bits = unpack(record.correct[when][metric], record.data.test)
                assert bits.mean() == pytest.approx(value)
                assert accuracy([record], when, metric).value == pytest.approx(100 * value)


def test_damaged_records_are_named_and_skipped(run, tmp_path, capsys):
    records, _ = run
    path = write_record(records[0], tmp_path)
    text = path.read_text()
    (tmp_path / "half.json").write_text(text[: len(text) // 2])
    (tmp_path / "foreign.json").write_text("{}")
    (tmp_path / "older.json").write_text(text.replace('"schema": 1', '"schema": 0'))
    assert read_records(tmp_path) == [records[0]]
    complaint = capsys.readouterr().err
    assert all(name in complaint for name in ("half.json", "foreign.json", "older.json"))


def test_folder_that_cannot_be_written(run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ParameterError, match="could not be written"):
        write_record(run[0][0], tmp_path / "file")


def test_full_disk_leaves_no_half_record(run, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(ParameterError, match=r"No space left on device.*make room"):
        write_record(run[0][0], tmp_path)
    assert not list(tmp_path.iterdir())


def test_records_of_another_protocol_are_not_mixed_in(run, tmp_path):
    records, _ = run
    for key, value in (("epochs", 7), ("consistency", "kl")):
        write_record(altered(records[0], {key: value}), tmp_path)
    assert len(read_records(tmp_path)) == 2 and not recorded_like(records, tmp_path)
    write_record(altered(records[0], {"seed": 5}), tmp_path)
    assert len(recorded_like(records, tmp_path)) == 1


def test_records_made_before_a_field_was_there_are_comparable(run, tmp_path):
    """Not to have the field is to have its first value, and no other."""
    records, _ = run
    fields = records[0].stored()
    fields["config"] = {k: v for k, v in fields["config"].items() if k not in LATER}
    assert make_record(fields) == records[0]
    write_record(make_record(fields), tmp_path)
    assert len(recorded_like(records, tmp_path)) == 1
    other = [altered(records[0], {"precision": "bfloat16"})]
    assert not recorded_like(other, tmp_path)
    assert "precision=bfloat16" in describe(other, "This").data
    assert "precision" not in describe(records, "This").data


def test_paired_interval():
    """On 100 images, 10 won and 4 lost: the mean of the differences, and 1.96 of its standard errors."""
    before = np.r_[np.zeros(50), np.ones(50)]
    after = np.r_[np.ones(10), np.zeros(40), np.zeros(4), np.ones(46)]

    bits = {when: {"w_2": pack(torch.tensor(b > 0))} for when, b in (("before", before), ("after", after))}
    record = altered(recorded("finetune-*"), correct=bits, data={"test": 100})
    got = change([record], "w_2")
    assert got.value == pytest.approx(6)
    assert got.half == pytest.approx(1.96 * math.sqrt((14 - 36 / 100) / 99 / 100) * 100)


def scores(correct):
    bits = {m: torch.tensor(correct) for m in METRICS}
    return Scores(**{m: b.float().mean().item() for m, b in bits.items()}, correct=bits)


def test_scores_are_compared_on_the_same_images():
    """Of 100 images 50 were right; 10 are won and 4 lost, as in `test_paired_interval`."""
    before = scores([False] * 50 + [True] * 50)
    after = scores([True] * 10 + [False] * 44 + [True] * 46)
    half, paired = (1.96 * math.sqrt(v / 99 / 100) * 100 for v in (25, 14 - 36 / 100))
    table = compare(before, after).data.replace("\u00a0", " ")
    assert f"| W₂ | 50.00 ± {half:.2f} | 56.00 ± " in table and f" | +6.00 ± {paired:.2f} |" in table
    assert table.count("\n") == 1 + len(METRICS)
    with pytest.raises(ParameterError, match="scores of 2 and 100 images cannot be paired"):
        compare(before, scores([True, False]))


def test_command_repeats_the_column_exactly():
    settings = from_notebook(delta=4 / 255, eta=1, seed=3, export="anywhere")
    assert command(settings, "table4", tau=0.01, eta=1.0) == (
        f"papermill notebooks/table4.ipynb out.ipynb -p tau 0.01 -p eta 1 -p delta {4 / 255!r} -p seed 3"
    )


def test_command_names_what_is_not_the_notebook_s_own_default():
    def again(**given):
        return command(Settings.from_notebook({"network": "small_trades", **given}, "stronger"), "stronger")

    assert again() == "papermill notebooks/stronger.ipynb out.ipynb"
    assert again(network="demo", test_images=50).endswith("-p network demo -p test_images 50")
    whole = again(preset="paper", network="small_pgd")
    assert whole == "papermill notebooks/stronger.ipynb out.ipynb -p preset paper -p network small_pgd"


def test_command_can_be_typed_and_stored_whatever_a_folder_is_called():
    settings = from_notebook(network="somewhere/net [v2] `x`").model_copy(update={"eta": 1.0})
    line = command(settings, "table4", tau=0.01, eta=1.0)
    assert "exports/net _v2_ _x_" in shlex.split(line) and not re.search(r"[<>\[\]|`]", line)


def test_where_all_images_agree_three_others_in_n_may_not():
    assert [intervals.estimate_of([np.zeros(n)]).half for n in (2, 500)] == [150, 0.6]
    assert intervals.side(*(getattr(intervals.estimate_of([np.ones(2)]), k) for k in ("low", "high"))) == ""
    assert intervals.estimate_of([np.array([0.0, 1.0] * 50)]).half < 10


def test_one_image_has_no_interval():
    one = {"after": {"w_2": pack(torch.tensor([True]))}}
    record = altered(recorded("finetune-*"), correct=one, data={"test": 1})
    assert accuracy([record], "after", "w_2") == Estimate(100.0, None)


def test_a_change_that_rounds_to_nothing_has_no_minus():
    assert [Estimate(v, None).text(signed=True) for v in (-0.004, 0.004, -0.006)] == ["+0.00", "+0.00", "-0.01"]


def test_table_shows_paper_beside_this_run_and_an_honest_dash(run):
    records, _ = run
    table = grid_table(4, records, []).data
    assert "| W₂ | paper: Zhang et al. (2019) | 42.99 | 45.20 (+2.21) | 50.53 (+7.54) |" in table
    assert "| recorded here: demo | – | – | – |" in table
    assert f"{100 * records[1].metrics['after']['w_2']:.2f} (" in table
    assert "paper: Zhang et al. (2019) | 42.99 | – |" in grid_table(4, [altered(records[0], {"tau": 0.3})], []).data


def test_a_distributional_attack_that_is_weaker_than_the_pointwise_one_is_named():
    record = next(r for r in read_records(kind="evaluate") if r.network.name == "demo" and "test" in r.correct)
    swapped = record.correct["test"] | {"w_2": record.correct["test"]["clean"]}
    weak = record.model_copy(update={"correct": record.correct | {"test": swapped}})
    assert "too weak" not in agreement.of_networks("test", [record], [record], within=0.5).data
    for known in ([], [weak]):
        said = agreement.of_networks("test", [weak], known, within=0.5).data
        assert "On `demo` W₂ accuracy is above W∞ accuracy" in said and "go by the worst case found" in said


@pytest.mark.parametrize("when", ["before", "after"])
def test_agreement_fails_where_the_numbers_differ(run, when):
    records, _ = run
    assert (
        "agrees with the recorded ones in 2 of 2 columns"
        in agreement.of_columns(records, records, before=0, after=0).data
    )
    assert "Nothing is recorded" in agreement.of_columns(records, [], before=0, after=0).data
    none = {m: pack(torch.zeros(50, dtype=torch.bool)) for m in METRICS}
    other = altered(records[0], correct={**records[0].correct, when: none})
    with pytest.raises(AssertionError, match=f"clean {when} fine-tuning at tau 0.1.*further apart than 0.5 points"):
        agreement.of_columns(records, [other], before=0.5, after=0.5)


def test_figure_shows_each_number_once(run):
    records, _ = run
    figure = plot_changes(4, records, records)
    dots = [c for axis in figure.axes for c in axis.collections if isinstance(c, PathCollection)]
    drawn = sorted(x for those in dots for x, _ in those.get_offsets())
    rows = grid_rows(4, records, records)
    wanted = sorted(cell[1].value for row in rows for cell in row["cells"].values())
    assert drawn == pytest.approx(wanted) and len(drawn) == 26  # the paper has no worst case


def test_paper_numbers_are_complete():
    """Cells per table: 5 networks x 3, 5 x 3, 4 x 3 for each grid, 5 x 5 for the summary, changes included."""
    counts = {}
    for row in evidence.paper_rows():
        counts[int(row["table"])] = counts.get(int(row["table"]), 0) + 1
        assert -10 < float(row["value"]) < 100
    assert counts == {1: 15, 2: 15, 5: 25} | dict.fromkeys((3, 4, 6, 7, 8, 9, 10, 11), 12)


def test_damaged_paper_number_is_named(tmp_path, monkeypatch):
    for name in ("paper.csv", "SHA256SUMS"):
        (tmp_path / name).write_bytes((files.ASSETS / name).read_bytes().replace(b"42.99", b"42.98"))
    monkeypatch.setattr(files, "ASSETS", tmp_path)
    with pytest.raises(ParameterError, match=r"the paper's numbers are damaged or missing: restore .*paper.csv"):
        paper_value(4, "Zhang2019Theoretically", "w_2")


@pytest.mark.parametrize(("table", "network", "perturb"), [(n, *what) for n, what in GRIDS.items()])
def test_each_grid_is_the_paper_s(table, network, perturb):
    """The notebook computes for the network and the perturbation that the paper's numbers are of."""
    rows = [row for row in evidence.paper_rows() if int(row["table"]) == table]
    assert {(row["network"], row["perturb"]) for row in rows} == {(network, perturb)}
    text = (files.ROOT / "notebooks" / f"table{table}.ipynb").read_text(encoding="utf-8")
    assert f'\\"{perturb}\\", notebook=\\"table{table}\\"' in text
    given = Settings.from_notebook({"preset": "paper"}, f"table{table}")
    assert given.network == network


def test_readme_says_what_presets_and_records_say():
    text = " ".join((files.ROOT / "README.md").read_text(encoding="utf-8").split())
    for p in PRESETS.values():
        sizes = " / ".join(f"{p[f'{part}_images']:,}" for part in ("train", "val", "test"))
        assert f"{sizes}, " in text and f"| {p['epochs']}, {p['batch_size']} |" in text
    (record,) = [r for r in read_records(kind="pretrain") if r.network.name == "demo"]
    scores = {m: f"{100 * v:.2f} %" for m, v in record.metrics["after"].items()}
    assert f"{scores['clean']} clean, {scores['w_inf']} under the pointwise and {scores['w_2']} under the" in text
    columns = [r for r in read_records() if not evidence.has_curves(r)]
    small = [r for r in columns if r.network.name.startswith("small_") and evidence.is_full(r)]
    minutes = [r.seconds["finetune"] / 60 for r in small]
    assert "half an hour to an hour and a quarter on one CPU core" in text and 28 < min(minutes) < max(minutes) < 76
    demo = [r for r in columns if r.network.name == "demo" and (r.data.train, r.config.epochs) == (2000, 4)]
    assert "one to three minutes a column" in text
    assert all(sum(r.seconds[k] for k in ("finetune", "evaluate", "baseline")) < 180 for r in demo) and demo


def test_readme_quotes_the_whole_protocol_from_the_records():
    lines = (files.ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    full = {
        (grid[0].network.name, perturb): columns_of(grid)
        for perturb in ("whole", "last_layer")
        for grid in evidence.grids(perturb, read_records())
        if evidence.is_full(grid[0])
    }
    whole = {name: columns[0.01, 1.0] for (name, perturb), columns in full.items() if perturb == "whole"}
    gains = {"holds": "yes", "not visible": "not visible", "contradicted": "no, it falls"}
    rows = [line for line in lines if line.endswith(tuple(f"| {word} |" for word in gains.values()))]
    outcomes = []
    for line in rows:
        name = line.split("`")[1]
        cells = [change(whole[name], metric).text(signed=True).replace("\u00a0", " ") for metric in ("w_2", "clean")]
        outcomes.append(outcome_of_change(1, whole[name], "w_2"))
        assert line.endswith(f"| {len(whole[name])} | {cells[0]} | {cells[1]} | {gains[outcomes[-1]]} |")
    assert {line.split("`")[1] for line in rows} == whole.keys() and len(rows) == len(whole)
    count = ["none", "one", "two", "three", "four", "five"]
    text = " ".join(lines)
    assert f"on {count[len(rows)]} small networks" in text and f"network and {count[len(rows)]} small ones]" in text
    first = change(whole["small_trades"], "w_2").text(signed=True).replace("\u00a0", " ")
    gaining = count[outcomes.count("holds")]
    assert f"W₂ accuracy rises on {gaining} of them, most on `small_trades`, by {first} points" in text
    assert max(whole, key=lambda name: change(whole[name], "w_2").value) == "small_trades"
    assert "and falls on `small_pgd`; on `demo` no change is visible" in text
    assert change(whole["small_pgd"], "w_2").high < 0 and outcome_of_change(1, whole["demo"], "w_2") == "not visible"
    diverged = [r for r in read_records(kind="diverged") if evidence.is_full(r)]
    missing = 8 * len(whole) - sum(map(len, full.values())) - len(diverged)
    assert (missing > 0) == ("A column without a point is not yet measured" in text)
    assert {(r.network.name, r.config.perturb, r.config.tau) for r in diverged} == {("cnn_a_adv4", "whole", 0.1)}
    assert "`cnn_a_adv4`, whole network, τ = 0.1: there the training diverged in the first epoch." in text
    assert all("in epoch 1, " in r.message for r in diverged)


def test_readme_quotes_the_strongest_attacks_from_the_records():
    attacks = [name for name, attack in STRONGER.items() if attack.p == 2]
    changes = []
    for name in ("small_trades", "small_pgd"):
        records = {r.network.source: r for r in read_records(kind="stronger") if name in r.network.name}
        (before,) = (r for r in records.values() if r.network.name == name)
        (after,) = (r for source, r in records.items() if "whole, tau 0.01, eta 1, 40000 images, 20 epochs" in source)
        left = [min((intervals.bits(r, a, "accuracy") for a in attacks), key=sum) for r in (after, before)]
        changes.append(intervals.estimate_of([left[0] - left[1]]).text(signed=True).replace("\u00a0", " "))
    text = " ".join((files.ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"six distributional attacks the first seed's networks change by {changes[0]} and {changes[1]}:" in text
    assert len(attacks) == 6


def test_readme_quotes_the_worst_case_from_the_records():
    text = " ".join((files.ROOT / "README.md").read_text(encoding="utf-8").split())
    given = {r.network.name: r for r in worst.measured(read_records(kind="evaluate"))}

    def left(name, metric):
        return f"{intervals.accuracy([given[name]], 'test', metric).value:.2f} %"

    trades = [left("small_trades", metric) for metric in ("w_2_found", "w_2")]
    assert (
        f"leaves {trades[0]} of the images of `small_trades` right where the paper's attack leaves {trades[1]}" in text
    )
    assert f"{left('small_pgd', 'w_2_found')} against {left('small_pgd', 'w_2')} on `small_pgd`" in text
    (tuned,) = [
        r
        for r in read_records()
        if r.network.name == "small_trades" and evidence.setting_of(r) == ("whole", 0.01, 1.0) and r.config.seed == 0
        if evidence.is_full(r) and not evidence.deviations(r)
    ]
    gains = [change([tuned], intervals.found_at(2, d)).text(signed=True).replace("\u00a0", " ") for d in (4, 8)]
    assert f"is {gains[0]} points at δ = 4/255 and {gains[1]} at 8/255" in text


def test_readme_quotes_the_strength_of_the_search_from_the_newest_benchmark():
    text = " ".join((files.ROOT / "README.md").read_text(encoding="utf-8").split())
    record = newest_last(read_records(kind="benchmark"))[-1]
    assert "never weaker than adv-lib's FMN on our three stand-ins" in text
    assert ": **met**." in strength_answer(record).splitlines()[0]
    rows = [row for row in record.rows if row["group"] == "Worst case: beside AutoAttack"]
    points, times = ([row["ratio"] for row in rows if row["unit"] == unit] for unit in (POINTS, SPEED))
    assert f"within {max(points):g} points of AutoAttack, {min(times):.0f} to {max(times):.0f} times as fast" in text
    assert len(points) == len(times) == 3 and "1 thread" in record.device


def test_readme_picture_is_of_the_records():
    source = runpy.run_path(str(files.ASSETS / "make_picture.py"))["source"]
    with Image.open(files.ASSETS / "protocol.png") as picture:
        assert picture.text["Description"] == source, "draw it again: python assets/make_picture.py"


def test_every_promise_names_tests_that_exist():
    assert len(promises()) > 10
    for row in promises():
        for test in row["tests"].split(";"):
            file, _, name = test.strip().partition("::")
            assert f"def {name}(" in (files.ROOT / "tests" / file).read_text(encoding="utf-8"), test


def test_figures_of_the_promises_are_counted_by_tests():
    figures = {name for row in promises() for _, name, *_ in string.Formatter().parse(row["figure"]) if name}
    sources = "".join(path.read_text(encoding="utf-8") for path in (files.ROOT / "tests").glob("test_*.py"))
    assert figures and not [name for name in figures if f'"{name}"' not in sources]
    (record,) = read_records(kind="reliability")
    record = altered(record, figures=dict.fromkeys([*figures, "tests", "skipped"], 7))
    assert "7 kills in 7 runs" in promises_table(record).data
    assert promises_table(None).data.count("| – |") == len(promises())
