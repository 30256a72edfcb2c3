"""From settings to records: what a run measures, and which finished run is taken instead of a new one."""

import ast
import json
import math

import pytest
import torch
from altered import altered

from companion import agreement, evidence, files, origins, plots, runs, tables
from companion.bases import images_of
from companion.bench import command
from companion.intervals import boundary_of
from companion.machine import core_digest
from companion.records import parse_record, read_records, record_name, write_record
from companion.settings import NOTEBOOKS, ONE_COLUMN, ParameterError, Settings
from companion.values import unpack
from wdat_core import WdatError

SMALL = {"train_images": 60, "val_images": 20, "test_images": 50, "batch_size": 20, "steps": 2, "epochs": 3}
ONE = Settings(tau=0.1, eta=1, **SMALL).resolved()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setattr(files, "RUNS", tmp_path_factory.mktemp("runs"))
    yield files.RUNS
    patch.undo()


@pytest.fixture(scope="module")
def curves(folder):
    (record,) = runs.finetune_grid(ONE, "whole", notebook="figure7_2", curves=True)
    return record


@pytest.fixture
def nothing_runs(monkeypatch):
    """From here on no network is looked at."""
    import wdat_core

    def fail(*_, **__):
        raise AssertionError("this was to be read, not computed")

    for name in ("evaluate", "finetune", "sensitivity", "wpgd", "wpgd_budget"):
        monkeypatch.setattr(wdat_core, name, fail)


def test_a_folder_of_runs_that_cannot_be_written_is_named_before_anything_is_measured(
    monkeypatch, tmp_path, nothing_runs
):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(files, "RUNS", tmp_path / "file")
    with pytest.raises(ParameterError, match=r"file could not be written .*: make room, or the folder writable"):
        runs.attack_each([ONE], "test", notebook="table2")


@pytest.mark.parametrize("part", ["test", "train"])
def test_attacks_on_a_part_are_of_its_images(folder, part):
    (record,) = runs.attack_each([ONE], part, notebook="table2")
    assert images_of(record, part) == SMALL[f"{part}_images"]
    for metric, value in record.metrics[part].items():
        assert unpack(record.correct[part][metric], images_of(record, part)).mean() == pytest.approx(value)
    scores = record.metrics[part]
    assert scores["w_2"] <= scores["clean"] and scores["budget"] <= scores["clean"]
    assert record.distance <= ONE.delta * (1 + 1e-6)  # eq. 5.5 keeps all batches together in the ball
    assert parse_record((folder / record_name(record)).read_bytes()) == record


def test_a_finished_run_is_read(folder, curves, nothing_runs):
    (held,) = runs.finetune_grid(ONE, "whole", notebook="table4")
    assert held == curves
    runs.attack_each([ONE], "test", notebook="table1")


@pytest.mark.parametrize("change", ["core", "device", "versions", "digest", "fresh", "steps", "test_images", "seed"])
def test_any_other_is_computed(folder, curves, nothing_runs, change):
    path = folder / record_name(curves)
    before, settings = path.read_bytes(), ONE
    if change == "fresh":
        settings = Settings(tau=0.1, eta=1, fresh=True, **SMALL).resolved()
    elif change in ("steps", "test_images", "seed"):
        settings = ONE.model_copy(update={change: 3})
    elif change == "digest":
        path.write_bytes(before.replace(b'"loss"', b'"lose"'))
    else:
        other = {"core": "0" * 64, "device": "another", "versions": curves.versions | {"torch": "0"}}
        write_record(altered(curves, **{change: other[change]}), folder)
    try:
        with pytest.raises(AssertionError, match="to be read"):
            runs.finetune_grid(settings, "whole", notebook="table4")
    finally:
        path.write_bytes(before)


def test_curves_hold_what_the_run_reports_and_change_nothing(folder, curves):
    kept = curves.history.epochs[curves.history.best - 1]
    assert kept["test_w_2"] == pytest.approx(curves.metrics["after"]["w_2"])
    assert kept["test_w_inf"] == pytest.approx(curves.metrics["after"]["w_inf"])
    start = curves.history.start
    assert start["test_w_2"] == pytest.approx(curves.metrics["before"]["w_2"])
    (estimate,) = runs.estimates_each([ONE], notebook="figure7_1")
    assert start["train_upsilon"] == pytest.approx(estimate.reference, rel=1e-4)
    fresh = Settings(tau=0.1, eta=1, fresh=True, **SMALL).resolved()
    (plain,) = runs.finetune_grid(fresh, "whole", notebook="table4")
    assert plain.correct == curves.correct and plain.history.upsilon == curves.history.upsilon
    assert plain.history.start is None
    (again,) = runs.finetune_grid(ONE, "whole", notebook="figure7_2", curves=True)  # the plain one is not enough
    assert again.history.start and again.correct == curves.correct


def test_estimates_are_drawn_from_the_training_set(folder):
    (record,) = runs.estimates_each([ONE], notebook="figure7_1")
    assert len(record.estimates) == 10 and len(set(record.estimates)) > 1
    (other,) = runs.estimates_each([Settings(seed=1, **SMALL).resolved()], notebook="figure7_1")
    assert other.reference == record.reference and other.estimates != record.estimates
    # Disjoint tenths would average to the whole in the q-th power; random ones stay below its maximum.
    assert max(record.estimates) <= record.reference * math.sqrt(10) * (1 + 1e-6)


def test_what_each_image_costs(folder):
    record, pictures = runs.spend(ONE, notebook="gallery")
    n = SMALL["test_images"]
    assert all(len(pictures[name]) == len(record.prediction[name]) == n for name in ("x", "w_inf", "w_2"))
    assert max(record.distance["w_inf"]) <= ONE.delta + 1e-6
    assert math.sqrt(sum(d**2 for d in record.distance["w_2"]) / n) <= ONE.delta + 1e-6
    found, label = boundary_of(record, "test").distance, torch.tensor(record.label)
    assert len(pictures["found"]) == n and record.boundary.steps == ONE.found_steps
    far = (pictures["found"] - pictures["x"]).flatten(1).norm(math.inf, dim=1)
    assert torch.where(found < math.inf, found, 0).numpy() == pytest.approx(far.numpy(), abs=1e-6)
    read = torch.tensor(record.prediction["found"])
    assert ((read != label) == (found < math.inf)).all()
    none, _ = runs.spend(ONE.model_copy(update={"found_steps": 0}), notebook="gallery")
    assert none.boundary is None and none.distance == record.distance
    (scores,) = runs.attack_each([ONE], "test", notebook="table1")
    for name, metric in (("x", "clean"), ("w_inf", "w_inf"), ("w_2", "w_2")):
        right = sum(a == b for a, b in zip(record.prediction[name], record.label, strict=True)) / n
        assert right == pytest.approx(scores.metrics["test"][metric])


def test_one_notebook_for_several_networks():
    names = [s.network for s in Settings.each_from_notebook({"preset": "paper"}, "table1")]
    assert len(names) == 5 and names[0] == "Zhang2019Theoretically"
    (one,) = Settings.each_from_notebook({"preset": "paper", "network": "demo"}, "table1")
    assert one.network == "demo"
    with pytest.raises(ParameterError, match=r"unknown parameter 'tau'"):
        Settings.each_from_notebook({"tau": 0.1}, "table1")


def test_network_table_has_a_dash_for_what_was_not_measured(folder):
    (record,) = runs.attack_each([ONE], "test", notebook="table1")
    table = tables.network_table(1, [record], []).data
    assert "| Zhang et al. (2019) | paper | 10,000 test images, CIFAR-10 | 84.92 | 57.05 | 42.99 |" in table
    assert table.count("|  | recorded here | – | – | – | – |") == 5
    assert f"| demo | this run | 50 test images, {record.data.source}, `steps=2`, `batch_size=20` |" in table
    renamed = record.network.model_copy(update={"name": "Wang2023Better_WRN-28-10"})
    other = record.model_copy(update={"network": renamed})
    assert tables.network_table(1, [], [other]).data.count("| recorded here | – |") == 4


def test_best_setting_is_chosen_on_validation_images(curves):
    def made(tau, seed, val, test):
        epochs = [{**row, "w_2": val} for row in curves.history.epochs]
        metrics = {**curves.metrics, "after": {**curves.metrics["after"], "w_2": test}}
        return altered(curves, {"tau": tau, "seed": seed}, {"epochs": epochs}, metrics=metrics)

    study = [made(0.1, 0, 0.5, 0.1), made(0.1, 1, 0.3, 0.1), made(0.01, 0, 0.35, 0.9), made(0.01, 1, 0.4, 0.9)]
    assert [r.config.tau for r in evidence.best_setting(study)] == [0.1, 0.1]
    assert evidence.studies(study) == [study]
    assert len(evidence.studies([study[0], altered(study[1], {"steps": 7})])) == 2
    assert "τ = 0.1, η = 1" in tables.best_table([], study).data.splitlines()[-1]


@pytest.mark.parametrize("what", ["w_2", "w_inf", "upsilon"])
def test_curves_are_drawn_as_the_table_says(curves, what):
    (axis,) = plots.plot_along(what, [], [curves]).axes
    scale = 1 if what == "upsilon" else 100
    for line, key in zip(axis.lines, evidence.ALONG[what], strict=True):
        assert line.get_ydata() == pytest.approx([scale * row[key] for row in evidence.along(curves)])
    # Of two seeds, the second of which is twice as good: the mean, and from the least to the greatest.
    key = next(iter(evidence.ALONG[what]))
    double = [{**row, key: 2 * row[key]} for row in evidence.along(curves)]
    other = altered(curves, history={"start": double[0], "epochs": double[1:]})
    (axis,) = plots.plot_along(what, [], [curves, other]).axes
    low = [scale * row[key] for row in evidence.along(curves)]
    assert axis.lines[0].get_ydata() == pytest.approx([1.5 * value for value in low])
    rows = tables.along_table(what, [curves, other]).data.splitlines()[2:]
    assert [row.split(" | ")[1] for row in rows] == [f"{1.5 * v:.2f} ({v:.2f} to {2 * v:.2f})" for v in low]
    assert rows[0].startswith("| 0, before fine-tuning |") and len(rows) == 1 + SMALL["epochs"]


def test_agreement_of_networks_and_estimates_fails_where_they_differ(folder):
    (record,) = runs.attack_each([ONE], "test", notebook="table1")
    good = agreement.of_networks("test", [record], [record], within=0).data
    assert "for 1 of 1 networks" in good
    none = dict.fromkeys(record.correct["test"], "AAAAAAAAAA==")
    with pytest.raises(AssertionError, match=r"demo, clean on test images: .* further apart than 0.5 points"):
        agreement.of_networks("test", [record], [altered(record, correct={"test": none})], within=0.5)
    (estimate,) = runs.estimates_each([ONE], notebook="figure7_1")
    assert "1 of 1" in agreement.of_estimates([estimate], [estimate], within=0).data
    other = altered(estimate, reference=1.2 * estimate.reference)
    with pytest.raises(AssertionError, match=r"Upsilon of demo: .* further apart than 5 %"):
        agreement.of_estimates([estimate], [other], within=0.05)


def test_provenance_names_records_and_marks_old_code(curves):
    line = origins.drawn_from([curves]).data
    assert record_name(curves) in line and "†" not in line
    old = origins.drawn_from([curves, altered(curves, core="0" * 64)]).data
    assert "2 records" in old and "00000000 †" in old and "earlier version of wdat_core.py" in old
    assert "Drawn from no record" in origins.drawn_from([]).data


def test_committed_records_have_the_names_that_they_would_be_given():
    for path in (p for p in files.RESULTS.glob("*.json") if p.name != "cores.json"):
        assert path.name == record_name(parse_record(path.read_bytes()))
    assert read_records()


@pytest.mark.parametrize(
    "notebook", [name for name, does in NOTEBOOKS.items() if "own" not in does and "cost" not in does]
)
@pytest.mark.parametrize("given", [{}, {"preset": "paper"}, {"preset": "paper", "network": "Zhang2019Theoretically"}])
def test_the_command_of_a_record_repeats_it(notebook, given):
    """What papermill would make of the line are the settings that it was made from; of a grid, those of the column."""
    does, one = NOTEBOOKS[notebook], {"tau": 0.01, "eta": 1.0}
    column = one if does in ("fine-tune", *ONE_COLUMN) else {}
    given = {**given, "delta": 4 / 255, "precision": "bfloat16"} | (one if does in ONE_COLUMN else {})
    settings = Settings.from_notebook(given, notebook)
    words = command(settings, notebook, **column).split()
    assert words[:3] == ["papermill", f"notebooks/{notebook}.ipynb", "out.ipynb"] and set(words[3::3]) == {"-p"}
    typed = {name: parse(text) for name, text in zip(words[4::3], words[5::3], strict=True)}
    again = Settings.from_notebook(typed, notebook)
    assert again == settings.model_copy(update=column)


def parse(text):
    """A value as papermill reads it."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def test_settings_can_be_changed_in_a_live_notebook():
    namespace = {"preset": "demo", "tau": 0.1, "eta": 1}
    assert Settings.from_notebook(namespace, "table4").tau == 0.1
    namespace |= {"tau": 0.01, "run": [], "name": "something of a later cell"}
    assert Settings.from_notebook(namespace, "table4").tau == 0.01


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tau": None}, "tau must be a number, not None"),
        ({"stop_after": 60, "fresh": True}, "would never end"),
        ({"delta": 8}, "delta must be at most 1 in Linf, not 8"),
        ({"seed": 2**70}, "seed must be below 9223372036854775808, not "),
        ({"export": "exports"}, "unknown parameter 'export'"),
    ],
)
def test_what_cannot_be_is_named(given, message):
    with pytest.raises(ParameterError, match=message):
        Settings.from_notebook({"tau": 0.01, "eta": 1.0, **given}, "figure7_2")


def test_curves_are_of_the_columns_asked_for(curves):
    other = altered(curves, {"tau": 0.01})
    assert evidence.with_curves([curves, other], like=[curves]) == [curves]
    bare = altered(curves, history={"start": None})
    assert evidence.with_curves([bare], like=[curves]) == []


def test_a_page_without_records_says_what_made_it():
    line = origins.made_here("papermill notebooks/own_network.ipynb out.ipynb").data
    assert "papermill notebooks/own_network.ipynb" in line and core_digest()[:8] in line and "torch" in line


def test_every_executed_page_ends_in_where_its_numbers_come_from():
    for path in files.ROOT.glob("notebooks/*.ipynb"):
        last = json.loads(path.read_text(encoding="utf-8"))["cells"][-1]
        assert 'class=\\"provenance' in json.dumps(last["outputs"]), path.name


def test_a_training_that_diverges_is_recorded_as_that(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "RUNS", tmp_path)
    far = ONE.model_copy(update={"tau": 1e30})
    with pytest.raises(WdatError, match="training diverged in epoch 1, minibatch 2, at learning rate 1e"):
        runs.finetune_grid(far, "whole", notebook="table4")
    (path,) = tmp_path.glob("diverged-*.json")
    record = parse_record(path.read_bytes())
    assert path.name.startswith("diverged-demo-whole-tau1e+30-eta1-seed0-")
    assert record.message.startswith("training diverged in epoch 1, minibatch 2") and record.config.tau == 1e30
    assert record.command.startswith("papermill notebooks/table4.ipynb out.ipynb -p tau ")
    assert tables.diverged("whole", [record]) == []  # not the whole protocol

    full = altered(record, data={"train": 40_000, "val": 10_000, "test": 10_000, "source": "CIFAR-10"})
    full = altered(full, config={"steps": 20, "epochs": 20, "batch_size": 512})
    (said,) = tables.diverged("whole", [full])
    words = "training diverged for `demo` with τ = 1e+30, η = 1, seed 0 (epoch 1, minibatch 2)."
    assert said.data == f"No accuracies for the whole network: {words}"
    assert tables.diverged("last_layer", [full]) == []


def test_an_error_that_is_no_divergence_leaves_no_record(tmp_path, monkeypatch):
    import wdat_core

    def fails(*_, **__):
        raise WdatError("out of memory")

    monkeypatch.setattr(files, "RUNS", tmp_path)
    monkeypatch.setattr(wdat_core, "finetune", fails)
    with pytest.raises(WdatError, match="out of memory"):
        runs.finetune_grid(ONE, "whole", notebook="table4")
    assert not list(tmp_path.glob("diverged-*.json"))


def test_a_column_that_diverges_leaves_the_others_and_is_not_trained_again(tmp_path, monkeypatch, capsys):
    import wdat_core

    monkeypatch.setattr(files, "RUNS", tmp_path)
    trained, finetune = [], wdat_core.finetune

    def diverging(model, train, val, config, **options):
        trained.append(config.tau)
        if config.tau == 0.1:
            raise WdatError("training diverged in epoch 1, minibatch 2, at learning rate 0.1: try a lower one")
        return finetune(model, train, val, config, **options)

    monkeypatch.setattr(wdat_core, "finetune", diverging)
    both = Settings(eta=1, **SMALL).resolved()
    for _ in range(2):
        (record,) = runs.finetune_grid(both, "whole", notebook="table4")
        assert record.config.tau == 0.01
        assert "A column is left out: training diverged in epoch 1, minibatch 2" in capsys.readouterr().out
    assert trained == [0.1, 0.01] and not list(tmp_path.glob("*.checkpoint"))
    with pytest.raises(WdatError, match="training diverged"):
        runs.finetune_grid(both.model_copy(update={"tau": 0.1}), "whole", notebook="table4")

    (path,) = tmp_path.glob("diverged-*.json")
    full = {"data": {"train": 40_000, "val": 10_000, "test": 10_000, "source": "CIFAR-10"}}
    full |= {"config": {"steps": 20, "epochs": 20, "batch_size": 512}}
    ended = altered(parse_record(path.read_bytes()), **full)
    assert tables.diverged("whole", [ended], [record])
    ran_well = record.model_copy(update={"config": ended.config})
    assert tables.diverged("whole", [ended], [ran_well]) == []
