"""A fine-tuned network taken away and brought back: the same logits, or one line that names the damaged file."""

import json
import re
import shutil
from importlib import metadata

import pyautoattack
import pytest
import torch

from companion import exports, files, networks
from companion.cards import LICENCES
from companion.data import embedded, floats
from companion.exports import check_export, export
from companion.intervals import accuracy, change
from companion.networks import load_network
from companion.records import parse_record
from companion.runs import finetune_grid
from companion.settings import METRICS, ParameterError, Settings
from companion.values import unpack

SIZES = {"train_images": 60, "val_images": 20, "test_images": 50, "batch_size": 20, "steps": 2, "epochs": 1}
ROBUSTBENCH = "Gowal2020Uncovering_28_10_extra"


@pytest.fixture(scope="module")
def images():
    x, y = embedded("test")
    return floats(x[:8]), y[:8]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The folder of an export as the notebook makes it, with its record."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "RUNS", tmp_path_factory.mktemp("runs"))
        folder = tmp_path_factory.mktemp("exports")
        settings = Settings(tau=0.01, eta=1, export=str(folder), **SIZES).resolved()
        (record,) = finetune_grid(settings, "whole", notebook="table4")
    (path,) = folder.iterdir()
    return path, record


def test_what_is_exported_is_not_computed_again(tmp_path, monkeypatch):
    """So a grid of exports that was stopped in its last column goes on there."""
    monkeypatch.setattr(files, "RUNS", tmp_path / "runs")
    settings = Settings(tau=0.01, eta=1, export=str(tmp_path / "exports"), **SIZES).resolved()
    first = finetune_grid(settings, "whole", notebook="table4")
    with monkeypatch.context() as patch:
        patch.setattr("wdat_core.finetune", lambda *_, **__: pytest.fail("computed again"))
        assert finetune_grid(settings, "whole", notebook="table4") == first
    (exported,) = (tmp_path / "exports").iterdir()
    shutil.rmtree(exported)
    finetune_grid(settings, "whole", notebook="table4")
    assert exported.is_dir()


def other_demo():
    """The demo network, but for its last bias."""
    model = load_network("demo", files.ROOT).model
    with torch.no_grad():
        model.head.bias += 1
    return model


def copy(folder, to):
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def of_network(record, name):
    """The record as if it were of another network."""
    return record.model_copy(update={"network": record.network.model_copy(update={"name": name})})


def load(folder):
    return load_network(str(folder), files.ROOT)


# ---------------------------------------------------------------------------------------------------------------------
# There and back
# ---------------------------------------------------------------------------------------------------------------------


def test_round_trip_gives_identical_logits(exported, tmp_path, images):
    model = other_demo()
    network = load(export(model, exported[1], tmp_path))
    with torch.no_grad():
        assert torch.equal(network.model(images[0]), model(images[0]))
    assert not network.model.training
    assert network.name == "demo-finetuned"
    assert network.source.startswith("demo, fine-tuned by this project: whole, tau 0.01, eta 1, ")


def test_notebook_exports_the_network_of_the_record(exported, images):
    """The recorded accuracy after fine-tuning is that of the exported network."""
    path, record = exported
    correct = unpack(record.correct["after"]["clean"], 50)[:8]
    with torch.no_grad():
        assert torch.equal(load(path).model(images[0]).argmax(1) == images[1], torch.tensor(correct) == 1)
    assert parse_record((path / "record.json").read_bytes()) == record
    assert path.name.endswith(load(path).digest[:8])


def test_export_is_fine_tuned_and_exported_again(exported, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "RUNS", tmp_path / "runs")
    network = str(exported[0])
    settings = Settings(tau=0.1, eta=1, network=network, export=str(tmp_path / "again"), **SIZES).resolved()
    (record,) = finetune_grid(settings, "whole", notebook="table4")
    assert record.network.digest == load(exported[0]).digest
    assert f"-p network exports/{exported[0].name} " in record.command and network not in json.dumps(record.stored())
    (path,) = (tmp_path / "again").iterdir()
    assert load(path).name == "demo-finetuned" and load(path).digest != load(exported[0]).digest


def test_autoattack_runs_on_an_export(exported, images):
    x, y = images
    model = load(exported[0]).model
    attack = pyautoattack.AutoAttack(model, attacks=["apgd-ce", "apgd-t"], eps=8 / 255, seed=0, version="custom")
    attack.apgd.n_iter = attack.apgd_targeted.n_iter = 5
    x_adv, _ = attack.run_standard_evaluation(x.contiguous(), y)
    assert 0 < (x_adv - x).abs().max() <= 8 / 255 + 1e-6
    with torch.no_grad():
        assert (model(x_adv).argmax(1) == y).sum() < (model(x).argmax(1) == y).sum()


@pytest.fixture
def tiny_zoo(monkeypatch):
    """RobustBench's own loader, and a small architecture under two of its names."""
    zoo = networks.zoo()
    from robustbench.utils import load_model

    entry = {"model": lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10)), "gdrive_id": "x"}
    for name in (ROBUSTBENCH, "Andriushchenko2020Understanding"):
        monkeypatch.setitem(zoo, name, entry)
    return entry["model"], load_model


@pytest.mark.parametrize("name", [ROBUSTBENCH, "Andriushchenko2020Understanding"])
def test_robustbench_takes_the_export_as_its_own(exported, tiny_zoo, tmp_path, images, name):
    new_model, load_model = tiny_zoo
    model = new_model()
    record = of_network(exported[1], name)
    path = export(model, record, tmp_path)
    theirs = load_model(name, model_dir=path, dataset="cifar10", threat_model="Linf")
    with torch.no_grad():
        for loaded in (theirs, load(path).model):
            assert torch.equal(loaded(images[0]), model(images[0]))
    torch.load(path / "cifar10" / "Linf" / f"{name}.pt", weights_only=True)
    assert "load_model" in (path / "README.md").read_text(encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# The model card
# ---------------------------------------------------------------------------------------------------------------------


def test_card_says_what_the_record_says(exported):
    path, record = exported
    card = (path / "README.md").read_text(encoding="utf-8")
    for metric, label in METRICS.items():
        after, moved = accuracy([record], "after", metric), change([record], metric)
        assert f"| {label} |" in card and f"| {after.text()} | {moved.text(signed=True)} |" in card
    known = (record.command, record.network.digest, record.data.digest, load(path).digest)
    assert all(f"`{text}`" in card for text in known)
    assert json.loads(re.search(r"```json\n(.*?)```", card, re.DOTALL)[1]) == record.stored()["config"]
    assert card.endswith("## Licence\n\nMIT.\n")


def test_licences_are_those_of_robustbench():
    """Its LICENSE lists the networks that are not under the MIT licence."""
    (file,) = (f for f in metadata.files("robustbench") if f.name == "LICENSE")
    pattern = r"^- CIFAR-\S+, \S+, (\w+)\*?: ([^;]*);"
    short = {
        "Apache License 2.0": "Apache-2.0",
        "Attribution-NonCommercial-ShareAlike 4.0 International": "CC-BY-NC-SA-4.0",
        "BSD 3-Clause License": "BSD-3-Clause",
    }
    listed = re.findall(pattern, file.locate().read_text(encoding="utf-8"), re.MULTILINE)
    assert {name: short[licence] for name, licence in listed} == LICENCES


# ---------------------------------------------------------------------------------------------------------------------
# What can go wrong
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["demo.safetensors", "record.json", "README.md", "SHA256SUMS"])
def test_damaged_file_is_named(exported, tmp_path, name):
    file = copy(exported[0], tmp_path) / name
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for content in (whole[: len(whole) // 2], b"", bytes(flipped)):
        file.write_bytes(content)
        with pytest.raises(ParameterError, match=r"not an export of this project, or not whole.*SHA256SUMS") as caught:
            load(tmp_path)
        assert "\n" not in str(caught.value)
    file.unlink()
    with pytest.raises(ParameterError, match=f"not whole.*{name}"):
        load(tmp_path)
    file.write_bytes(whole)
    assert load(tmp_path).name == "demo-finetuned"


def test_weights_of_another_export_are_named(exported, tmp_path):
    """Whole in themselves, but not those of the record and the card beside them."""
    copy(exported[0], tmp_path)
    other = export(other_demo(), exported[1], tmp_path / "other")
    (tmp_path / "demo.safetensors").write_bytes((other / "demo.safetensors").read_bytes())
    with pytest.raises(ParameterError, match=r"demo.safetensors does not have the digest"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["./nothing", "exports/nothing/", "/dev/null"])
def test_path_without_an_export_is_named(name):
    with pytest.raises(ParameterError, match=r"is not an export of this project"):
        load_network(name, files.ROOT)


def test_missing_weights_are_not_fetched_into_an_export(exported, tiny_zoo, tmp_path, monkeypatch):
    """An export of a network of RobustBench looks like a folder of its downloads, and those are other weights."""
    record = of_network(exported[1], ROBUSTBENCH)
    path = export(tiny_zoo[0](), record, tmp_path)
    (path / "cifar10" / "Linf" / f"{ROBUSTBENCH}.pt").unlink()
    monkeypatch.setattr("robustbench.utils.download_gdrive_new", pytest.fail)
    with pytest.raises(ParameterError, match=rf"not whole.*{ROBUSTBENCH}.pt"):
        load(path)


def test_model_of_another_architecture_is_not_exported(exported, tmp_path):
    with pytest.raises(ParameterError, match="does not hold the weights of 'demo'"):
        export(torch.nn.Linear(2, 2), exported[1], tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", ["fsync", "replace", "mkdir"])
def test_full_disk_leaves_nothing(exported, tmp_path, monkeypatch, call):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, call, full)
    with pytest.raises(ParameterError, match=r"No space left on device") as caught:
        export(other_demo(), exported[1], tmp_path)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_training_is_kept_until_its_export_is_whole(exported, tmp_path, monkeypatch):
    """With room made, the same settings end in the same network, and do not train again."""

    def full(*arguments):
        raise ParameterError("no room")

    monkeypatch.setattr(files, "RUNS", tmp_path / "runs")
    settings = Settings(tau=0.01, eta=1, export=str(tmp_path / "exports"), **SIZES).resolved()
    with monkeypatch.context() as patch:
        patch.setattr(exports, "export", full)
        with pytest.raises(ParameterError, match="no room"):
            finetune_grid(settings, "whole", notebook="table4")
    monkeypatch.setattr(torch.optim.SGD, "step", pytest.fail)
    finetune_grid(settings, "whole", notebook="table4")
    (path,) = (tmp_path / "exports").iterdir()
    assert path.name == exported[0].name and not list((tmp_path / "runs").glob("*.checkpoint"))


def test_folder_that_cannot_be_written_is_named_before_training(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("wdat_core.wpgd", pytest.fail)
    settings = Settings(tau=0.01, eta=1, export=str(tmp_path / "file"), **SIZES).resolved()
    with pytest.raises(ParameterError, match=r"nothing can be exported to .*file: give another folder"):
        finetune_grid(settings, "whole", notebook="table4")


def test_ensemble_cannot_be_exported(tmp_path):
    with pytest.raises(ParameterError, match="Chen2020Adversarial cannot be exported"):
        check_export("Chen2020Adversarial", tmp_path)


def test_exporting_twice_changes_nothing(exported, tmp_path):
    paths = [export(other_demo(), exported[1], tmp_path) for _ in range(2)]
    assert paths[0] == paths[1] and list(tmp_path.iterdir()) == paths[:1]
    (paths[0] / "demo.safetensors").write_bytes(b"damaged since")
    with pytest.raises(ParameterError, match=r"not whole.*demo.safetensors"):
        export(other_demo(), exported[1], tmp_path)


def test_a_run_with_a_longer_search_replaces_the_record_of_its_export(tmp_path, monkeypatch):
    """Else the column would never count as exported, and be trained anew at every call."""
    monkeypatch.setattr(files, "RUNS", tmp_path / "runs")
    usual = {"tau": 0.01, "eta": 1, "export": str(tmp_path / "exports"), **SIZES}
    for steps in (2, 4):
        settings = Settings(**usual, found_steps=steps).resolved()
        (record,) = finetune_grid(settings, "whole", notebook="table4")
        (path,) = (tmp_path / "exports").iterdir()
        assert parse_record((path / "record.json").read_bytes()) == record and record.boundary.steps == steps
        load_network(str(path), tmp_path)
    monkeypatch.setattr("wdat_core.finetune", None)  # from here on nothing is trained
    for steps in (4, 3):  # the longer search is kept
        (again,) = finetune_grid(Settings(**usual, found_steps=steps).resolved(), "whole", notebook="table4")
        assert again == record
