"""Any data set, norm and network: made images and random weights for what no test can have, and a user's."""

import hashlib
import json
import math
import re
import sys
from collections import OrderedDict
from dataclasses import replace
from importlib import resources

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from companion import claims, files, networks
from companion.architectures import cnn_a
from companion.data import load_data
from companion.datasets import DATASETS, NORMS, is_own
from companion.exports import check_export, export
from companion.networks import PUBLISHED, check_fit, load_network, zoo
from companion.records import read_records
from companion.runs import attack_each, finetune_grid
from companion.settings import ParameterError, Settings

SIZES = {"train_images": 6, "val_images": 4, "test_images": 3}
SETTINGS = Settings().resolved()


def settings(data, **changes):
    return SETTINGS.model_copy(update={"data": str(data), **SIZES, **changes})


# ---------------------------------------------------------------------------------------------------------------------
# The rows
# ---------------------------------------------------------------------------------------------------------------------


def test_rows_agree_with_robustbench():
    zoo()
    from robustbench.utils import DATASET_CLASSES

    assert {row.robustbench: row.classes for row in DATASETS.values()} == {
        k.value: v for k, v in DATASET_CLASSES.items()
    }
    for key, row in DATASETS.items():
        assert key == row.robustbench
        assert set(row.delta) == {norm for norm in NORMS if zoo(key, norm)}  # a radius for all that has networks


@pytest.mark.parametrize(("dataset", "norm"), [("cifar10", "L2"), ("cifar100", "Linf"), ("imagenet", "Linf")])
def test_every_network_of_robustbench_is_known_by_name(dataset, norm, tmp_path, monkeypatch):
    monkeypatch.setattr(networks, "_robustbench", lambda *arguments: arguments)
    for name in zoo(dataset, norm):
        assert load_network(name, tmp_path, dataset, norm) == (name, tmp_path, dataset, norm)


def test_network_for_another_data_set_or_norm_says_which(tmp_path):
    with pytest.raises(
        ParameterError, match=r"no Augustin2020Adversarial for CIFAR-10 under Linf: .*cifar10 -p norm L2"
    ):
        load_network("Augustin2020Adversarial", tmp_path)
    with pytest.raises(ParameterError, match="give -p dataset imagenet -p norm Linf"):
        load_network("Salman2020Do_R18", tmp_path, "cifar100", "Linf")
    with pytest.raises(ParameterError, match=r"mean Augustin2020Adversarial.* networks for CIFAR-10 under L2"):
        load_network("Augustin2020Adversaria", tmp_path, "cifar10", "L2")


# ---------------------------------------------------------------------------------------------------------------------
# RobustBench's networks with random weights
# ---------------------------------------------------------------------------------------------------------------------


def wide(classes):
    """RobustBench's own architecture, as small as it gets."""
    from robustbench.model_zoo.architectures.wide_resnet import WideResNet

    return WideResNet(num_classes=classes, depth=10, widen_factor=1)


def big_images():
    """For ImageNet, whose loader puts "model." before every name of the file."""
    layers = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 1000))
    return nn.Sequential(OrderedDict(model=layers))


@pytest.fixture(params=["cifar10 L2", "cifar100 Linf", "imagenet Linf"])
def placed(request, tmp_path, monkeypatch):
    """A network of each (data set, norm) with random weights where RobustBench keeps them."""
    dataset, norm = request.param.split()
    name = next(iter(zoo(dataset, norm)))
    make = big_images if dataset == "imagenet" else lambda: wide(DATASETS[dataset].classes)
    monkeypatch.setitem(zoo(dataset, norm), name, {"model": make, "gdrive_id": "x"})
    model = make().eval()
    path = tmp_path / dataset / norm / f"{name}.pt"
    path.parent.mkdir(parents=True)
    torch.save({k.removeprefix("model."): v for k, v in model.state_dict().items()}, path)
    return dataset, norm, name, model, path


def test_weights_are_read_from_where_robustbench_keeps_them(placed, tmp_path):
    dataset, norm, name, model, path = placed
    network = load_network(name, tmp_path, dataset, norm)
    row = DATASETS[dataset]
    x = torch.rand(2, *row.shape)
    with torch.no_grad():
        torch.testing.assert_close(network.model(x), model(x))
    assert network.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert network.source == f"RobustBench, {row.name}, {norm}" and not network.model.training


def test_damaged_weights_name_data_set_and_norm(placed, tmp_path):
    dataset, norm, name, _, path = placed
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(
        ParameterError, match=rf"{name}.pt .*truncated.*that name for {DATASETS[dataset].name} under {norm}"
    ):
        load_network(name, tmp_path, dataset, norm)


def test_weights_of_another_number_of_classes(placed, tmp_path):
    dataset, norm, name, _, path = placed
    torch.save(wide(7).state_dict(), path)
    with pytest.raises(ParameterError, match=rf"{name} in .* do not fit its architecture"):
        load_network(name, tmp_path, dataset, norm)


def test_network_whose_weights_come_without_a_file_is_not_downloaded(tmp_path, monkeypatch):
    """Standard_R50 has an empty id: torchvision fetches it."""
    assert zoo("imagenet", "Linf")["Standard_R50"]["gdrive_id"] == ""
    monkeypatch.setitem(zoo("imagenet", "Linf"), "Standard_R50", {"model": big_images, "gdrive_id": ""})
    monkeypatch.setattr(networks, "_download", pytest.fail)
    assert len(load_network("Standard_R50", tmp_path, "imagenet", "Linf").digest) == 64
    with pytest.raises(ParameterError, match="Standard_R50 cannot be exported: RobustBench does not keep"):
        check_export("Standard_R50", tmp_path, "imagenet", "Linf")


def exported_from(name, folder, dataset, norm, model):
    """An export of the model, as if it had been fine-tuned from the network of that name."""
    record = next(r for r in read_records() if r.network.name == "demo")
    record = record.model_copy(update={"network": record.network.model_copy(update={"name": name})})
    return export(model, record, folder, dataset, norm)


def test_robustbench_takes_an_export_for_any_data_set_and_norm(placed, tmp_path):
    from robustbench.utils import load_model

    dataset, norm, name, model, _ = placed
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    path = exported_from(name, tmp_path / "exports", dataset, norm, model)
    row, x = DATASETS[dataset], torch.rand(2, *DATASETS[dataset].shape)
    ours = load_network(str(path), tmp_path)
    theirs = load_model(name, model_dir=path, dataset=dataset, threat_model=norm)
    with torch.no_grad():
        for loaded in (ours.model, theirs):
            torch.testing.assert_close(loaded(x), model(x))
    assert (path / dataset / norm / f"{name}.pt").is_file()
    assert ours.name == f"{name}-finetuned" and ours.source.startswith(f"{name}, fine-tuned by this project")
    card = (path / "README.md").read_text(encoding="utf-8")
    assert f'dataset="{dataset}", threat_model="{norm}"' in card and f"A classifier of {row.name}: " in card
    assert f"{row.classes} logits" in card and ("in the l_2\nnorm" in card) is (norm == "L2")


# ---------------------------------------------------------------------------------------------------------------------
# Networks that others published as a plain file
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=PUBLISHED)
def published(request, tmp_path, monkeypatch):
    """A file of random weights in place of the published one, which is not the project's to give away."""
    torch.manual_seed(0)
    row = PUBLISHED[request.param]
    model = row.architecture().eval()
    path = tmp_path / row.file
    torch.save(model.state_dict(), path)
    known = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(PUBLISHED, request.param, replace(row, digest=known))
    return request.param, path, model


def test_published_file_is_loaded(published, tmp_path):
    name, path, model = published
    network = load_network(name, tmp_path)
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(network.model(x), model(x))
    assert network.digest == hashlib.sha256(path.read_bytes()).hexdigest()


def test_architecture_has_the_parts_of_the_published_file():
    model = cnn_a()
    assert sum(p.numel() for p in model.parameters()) == 214_918
    assert [*model.state_dict()] == [f"{i}.{part}" for i in (0, 2, 5, 7) for part in ("weight", "bias")]


def test_architecture_normalises_by_what_its_authors_did():
    model = cnn_a()
    mean, std = torch.tensor([125.3, 123.0, 113.9]) / 255, torch.tensor([63.0, 62.1, 66.7]) / 255
    x = torch.rand(2, 3, 32, 32)
    plain = nn.Sequential(*model)
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain((x - mean.view(3, 1, 1)) / std.view(3, 1, 1)))


def test_published_network_is_exported_and_comes_back(published, tmp_path):
    name, _, _ = published
    model = PUBLISHED[name].architecture().eval()
    path = exported_from(name, tmp_path / "exports", "cifar10", "Linf", model)
    network = load_network(str(path), tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(network.model.parameters(), model.parameters(), strict=True))
    assert network.name == f"{name}-finetuned" and (path / f"{name}.safetensors").is_file()
    assert f"## Licence\n\n{PUBLISHED[name].licence}, " in (path / "README.md").read_text(encoding="utf-8")


def test_missing_or_other_published_file_is_named_with_its_address(published, tmp_path):
    name, path, _ = published
    torch.save(PUBLISHED[name].architecture().state_dict(), path)
    with pytest.raises(ParameterError, match=rf"not the published file of {name} .*place the file from https://"):
        load_network(name, tmp_path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ParameterError, match=rf"truncated.*place the file from https://.*{path.name} there"):
        load_network(name, tmp_path)
    path.unlink()
    with pytest.raises(ParameterError, match=rf"no weights of {name} at .*: place the file from https://"):
        load_network(name, tmp_path)


@pytest.mark.parametrize("extra", [False, True])
def test_a_network_that_has_seen_more_images_is_no_judge_of_claims_about_cifar_10_alone(extra, monkeypatch):
    """Claims 3 and 4 speak of networks that were trained on CIFAR-10 and nothing else."""
    row = replace(PUBLISHED["cnn_a_adv4"], extra=extra)
    monkeypatch.setitem(PUBLISHED, "with_more", row)
    assert ("with_more" in claims.cifar10_only()) != extra and "cnn_a_adv4" in claims.cifar10_only()


# ---------------------------------------------------------------------------------------------------------------------
# ImageNet
# ---------------------------------------------------------------------------------------------------------------------


def listed(name):
    """The text of one of RobustBench's lists."""
    zoo()
    return (resources.files("robustbench") / "helper_files" / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def validation(tmp_path_factory):
    """A folder with the first three of the images that RobustBench lists, of several sizes, one of them grey."""
    folder, generator = tmp_path_factory.mktemp("val"), np.random.default_rng(0)
    names = listed("imagenet_test_image_ids.txt").split()[:3]
    for name, size in zip(names, [(300, 400, 3), (500, 256, 3), (280, 280)], strict=True):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(generator.integers(0, 256, size, dtype=np.uint8)).save(folder / name, "JPEG")
    return folder, names


def test_imagenet_is_what_robustbench_gives_its_networks(validation):
    """And no image is read that was not asked for: there are only three here, of 5,000."""
    zoo()
    from robustbench.data import PREPROCESSINGS

    folder, names = validation
    data = load_data(settings(folder, dataset="imagenet"))
    x, y = data.test
    theirs = torch.stack([PREPROCESSINGS["Res256Crop224"](Image.open(folder / n).convert("RGB")) for n in names])
    assert torch.equal(x, theirs) and x.shape == (3, 3, 224, 224)
    classes = json.loads(listed("imagenet_class_to_id_map.json"))
    assert y.tolist() == [classes[name.split("/")[0]] for name in names]
    assert (data.source, data.shape, data.classes) == ("ImageNet", (3, 224, 224), 1000)
    assert data.digest("test") == load_data(settings(folder, dataset="imagenet")).digest("test")


def test_what_imagenet_lacks_is_named(validation, tmp_path):
    folder, _ = validation
    with pytest.raises(ParameterError, match=r"JPEG is missing or damaged .*or ask for fewer test_images"):
        _ = load_data(settings(folder, test_images=4, dataset="imagenet")).test
    with pytest.raises(ParameterError, match="of ImageNet this project has test images only"):
        _ = load_data(settings(folder, dataset="imagenet")).train
    with pytest.raises(
        ParameterError, match=r"no folder .*missing: give as data the folder of ImageNet's validation images"
    ):
        _ = load_data(settings(tmp_path / "missing", dataset="imagenet")).test
    with pytest.raises(ParameterError, match=r"embedded images are of CIFAR-10: give the folder of ImageNet as data"):
        Settings(dataset="imagenet").resolved()


def test_imagenet_network_takes_imagenet_images(placed, validation, tmp_path):
    dataset, norm, name, _, _ = placed
    check = lambda: check_fit(  # noqa: E731
        load_network(name, tmp_path, dataset, norm), load_data(settings(validation[0], dataset="imagenet"))
    )
    if dataset == "imagenet":
        check()
    else:  # the images are too large for its last layer
        with pytest.raises(ParameterError, match=rf"{name} fails on .*ImageNet: shape \(3, 224, 224\), 1000 classes"):
            check()


# ---------------------------------------------------------------------------------------------------------------------
# A user's own
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def write(tmp_path):
    """Writes a file of the user's and returns the value of the parameter that names `f` in it."""

    def file(code):
        (tmp_path / "mine.py").write_text(f"import torch\nfrom torch import nn\n{code}\n", encoding="utf-8")
        return f"{tmp_path / 'mine.py'}:f"

    return file


NETWORK = "def f():\n    torch.manual_seed(0)\n    return nn.Sequential(nn.Flatten(), nn.Linear(48, 4))"
IMAGES = (
    "def part(n, seed):\n"
    "    g = torch.Generator().manual_seed(seed)\n"
    "    return torch.rand(n, 3, 4, 4, generator=g), torch.arange(n) % 4\n"
    "def f():\n"
    "    return {'train': part(8, 0), 'val': part(4, 1), 'test': part(5, 2)}"
)


@pytest.mark.parametrize(
    ("value", "own"),
    [("a.py:f", True), ("x/a.py:f", True), ("a.py", True), ("a.py:", True), ("demo", False), ("exports/a", False)],
)
def test_a_function_of_ones_own_is_told_from_a_name(value, own):
    assert is_own(value) is own


def test_own_network(write, tmp_path):
    value = write(NETWORK)
    network = load_network(value, tmp_path)
    assert network.name == "mine.f" and network.source == "own network, mine.py:f" and not network.model.training
    assert load_network(value, tmp_path).digest == network.digest
    assert load_network(write(NETWORK.replace("seed(0)", "seed(1)")), tmp_path).digest != network.digest  # read anew
    with pytest.raises(ParameterError, match=r"mine.f is your own network and cannot be exported"):
        check_export("mine.f", tmp_path)


def test_own_file_may_import_what_lies_beside_it_and_starts_at_the_repository(write, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "ROOT", tmp_path)
    (tmp_path / "beside.py").write_text("CLASSES = 5", encoding="utf-8")
    write("from beside import CLASSES\ndef f():\n    return nn.Linear(2, CLASSES)")
    network = load_network("mine.py:f", tmp_path)
    assert network.model.out_features == 5
    monkeypatch.delitem(sys.modules, "beside")
    (tmp_path / "beside.py").write_text("CLASSES = 3 + 2", encoding="utf-8")
    assert load_network("mine.py:f", tmp_path).digest != network.digest  # what it did is not known


def test_the_same_weights_in_another_forward_are_another_network(write, tmp_path):
    one, other = (
        load_network(
            write(f"class N(nn.Linear):\n    def forward(self, x): return {by} * x\ndef f(): return N(2, 2)"), ""
        )
        for by in (1, 2)
    )
    other.model.load_state_dict(one.model.state_dict())
    assert one.digest != other.digest


def test_what_a_record_says_of_an_own_file_can_be_in_a_record(tmp_path):
    (tmp_path / "my [net] 그물.py").write_text(
        "from torch import nn\ndef f(): return nn.Linear(2, 2)", encoding="utf-8"
    )
    network = load_network(f"{tmp_path}/my [net] 그물.py:f", tmp_path)
    assert (network.name, network.source) == ("my__net__그물.f", "own network, my _net_ 그물.py:f")


@pytest.mark.parametrize(
    ("code", "message", "cause"),
    [
        ("def f(): return 3", r"mine.py:f returned int, and a torch.nn.Module is needed", None),
        ("def f(): return nn.Linear", r"returned type, and a torch.nn.Module is needed", None),
        ("def g(): pass", r"mine.py has no function 'f'; what it defines is: g", None),
        ("f = 3", r"mine.py has no function 'f'; what it defines is: nothing", None),
        (
            "def f():\n    x = 1\n    return x / 0",
            r"raised ZeroDivisionError: .*\(line 5 of .*mine.py\)",
            ZeroDivisionError,
        ),
        ("def f(x): return x", r"mine.py:f raised TypeError: .*argument", TypeError),
        ("import sys\nsys.exit()", r"mine.py:f raised SystemExit.*line 4", SystemExit),
        ("def f(:", r"mine.py:f raised SyntaxError: .*\(line 3 of .*mine.py\)", SyntaxError),
        ("import no_such_module", r"raised ModuleNotFoundError: .*no_such_module.*line 3", ModuleNotFoundError),
    ],
)
def test_what_is_wrong_with_an_own_function_is_named(write, tmp_path, code, message, cause):
    with pytest.raises(ParameterError, match=message) as caught:
        load_network(write(code), tmp_path)
    assert "\n" not in str(caught.value)
    assert type(caught.value.__cause__) is (cause or type(None))


def test_own_file_or_function_that_is_not_there(tmp_path):
    with pytest.raises(ParameterError, match=r"network is '.*none.py:f', and there is no file .*none.py"):
        load_network(f"{tmp_path}/none.py:f", tmp_path)
    for value in ("mine.py", "mine.py:", "mine.py:f()"):
        with pytest.raises(
            ParameterError, match=re.escape(f"network is {value!r}, which names no function: write path")
        ):
            load_network(value, tmp_path)
    with pytest.raises(ParameterError, match=r"data is 'mine.py', which names no function"):
        load_data(settings("mine.py"))


def test_own_images(write):
    data = load_data(settings(write(IMAGES)))
    assert [tuple(x.shape) for x, _ in (data.train, data.val, data.test)] == [(6, 3, 4, 4), (4, 3, 4, 4), (3, 3, 4, 4)]
    assert data.train[1].tolist() == [0, 1, 2, 3, 0, 1] and data.train[1].dtype == torch.int64
    assert (data.source, data.shape, data.classes) == ("own images, mine.py:f", (3, 4, 4), 4)
    with pytest.raises(ParameterError, match=r"train_images is 9, and .*mine.py:f returned 8: ask for at most 8"):
        _ = load_data(settings(write(IMAGES), train_images=9)).train


def test_own_images_in_bytes_are_those_in_floats(write):
    both = "x = torch.arange(48, dtype=torch.uint8).view(1, 3, 4, 4)\ny = torch.tensor([0], dtype=torch.uint8)\n"
    given = [
        load_data(settings(write(f"{both}def f(): return {{'test': ({x}, y)}}"), test_images=1))
        for x in ("x", "x / 255")
    ]
    assert torch.equal(given[0].test[0], given[1].test[0]) and given[0].digest("test") == given[1].digest("test")


def test_digest_tells_apart_floats_that_no_bytes_give(write):
    code = "def f(): return {'test': (torch.full((1, 1, 2, 2), 0.5 + %s), torch.tensor([0]))}"
    digests = [load_data(settings(write(code % more), test_images=1)).digest("test") for more in ("0", "1e-6")]
    assert digests[0] != digests[1]


X, Y = "torch.rand(5, 3, 4, 4)", "torch.arange(5) % 4"


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("None", r"returned NoneType, and a dict is needed: {\"train\": \(x, y\)"),
        (f"(({X}, {Y}),)", r"returned tuple, and a dict is needed"),
        ("{}", r"returned a dict of nothing, and a dict is needed"),
        (f"{{'tset': ({X}, {Y})}}", r"returned a dict of 'tset', and a dict is needed"),
        (f"{{'test': {X}}}", r"'test' has to be a pair of tensors \(x, y\)"),
        (f"{{'test': ({X}, [0, 1, 2, 3, 0])}}", r"'test' has to be a pair of tensors \(x, y\)"),
        (f"{{'test': ({X}.numpy(), {Y})}}", r"'test' has to be a pair of tensors \(x, y\)"),
        (
            f"{{'test': ({X}[0], {Y})}}",
            r"x of 'test' has shape \(3, 4, 4\), and \(n, channels, height, width\) is needed",
        ),
        (f"{{'test': ({X}[:0], torch.arange(0))}}", r"x of 'test' has shape \(0, 3, 4, 4\).* n at least 1"),
        (f"{{'test': ({X}.long(), {Y})}}", r"x of 'test' is of torch.int64, and floats in \[0, 1\] or bytes"),
        (
            f"{{'val': (2 * {X} - 1, {Y})}}",
            r"x of 'val' goes from -\S+ to \S+, and \[0, 1\] is needed: normalise in the",
        ),
        (f"{{'val': ({X} * float('nan'), {Y})}}", r"x of 'val' goes from nan to nan"),
        (f"{{'test': ({X}, torch.zeros(4).long())}}", r"y of 'test' has shape \(4,\), .*each of the 5 images"),
        (f"{{'test': ({X}, torch.zeros(5, 4).long())}}", r"y of 'test' has shape \(5, 4\)"),
        (f"{{'test': ({X}, ({Y}).float())}}", r"y of 'test' is of torch.float32, and whole numbers"),
        (f"{{'test': ({X}, {Y} - 1)}}", r"y of 'test' has the label -1, and classes are counted from 0"),
        (
            f"{{'test': ({X}, {Y}), 'val': ({X}[:, :1], {Y})}}",
            r"differ in shape: .*'test': \(3, 4, 4\), 'val': \(1, 4, 4\)",
        ),
    ],
)
def test_what_is_wrong_with_own_images_is_named(write, returned, message):
    with pytest.raises(ParameterError, match=message) as caught:
        load_data(settings(write(f"def f(): return {returned}")))
    assert "mine.py:f" in str(caught.value) and "\n" not in str(caught.value)


def test_part_that_was_left_out_is_missed_only_where_it_is_needed(write):
    data = load_data(settings(write(f"def f(): return {{'test': ({X}, {Y})}}")))
    assert len(data.test[1]) == 3
    with pytest.raises(ParameterError, match=r"mine.py:f returned no 'train' images, which this run needs"):
        _ = data.train


# ---------------------------------------------------------------------------------------------------------------------
# Network against images
# ---------------------------------------------------------------------------------------------------------------------


def fit(write, tmp_path, network, images=IMAGES):
    (tmp_path / "net.py").write_text(f"import torch\nfrom torch import nn\n{network}", encoding="utf-8")
    check_fit(load_network(f"{tmp_path / 'net.py'}:f", tmp_path), load_data(settings(write(images))))


def test_network_and_images_that_fit(write, tmp_path):
    fit(write, tmp_path, NETWORK)
    fit(write, tmp_path, NETWORK.replace("48, 4", "48, 9"))  # not every class has to be among a user's images
    check_fit(load_network("demo", tmp_path), load_data(SETTINGS))


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (
            NETWORK.replace("48, 4", "48, 3"),
            r"net.f tells 3 classes apart, .*own images, mine.py:f: shape \(3, 4, 4\), 4 c",
        ),
        (NETWORK.replace("48, 4", "50, 4"), r"net.f fails on an image of the data .*shape \(3, 4, 4\).*RuntimeError"),
        ("def f(): return nn.Identity()", r"net.f gives shape \(1, 3, 4, 4\) for one image, and logits of shape"),
        (
            "class Two(nn.Module):\n    def forward(self, x):\n        return x, x\ndef f(): return Two()",
            r"net.f gives tuple for one image",
        ),
        (
            "class Bug(nn.Module):\n    def forward(self, x):\n        return y\ndef f(): return Bug()",
            r"NameError: name 'y' is not defined \(line 5 of .*net.py\)",
        ),
    ],
)
def test_network_and_images_that_do_not_fit(write, tmp_path, network, message):
    with pytest.raises(ParameterError, match=message):
        fit(write, tmp_path, network)


def test_all_classes_of_a_data_set_are_needed(write, tmp_path):
    network = load_network(write("def f(): return nn.Sequential(nn.Flatten(), nn.Linear(3072, 100))"), tmp_path)
    with pytest.raises(ParameterError, match=r"mine.f tells 100 classes apart, .*CIFAR-10 images: .*10 classes"):
        check_fit(network, load_data(SETTINGS))


# ---------------------------------------------------------------------------------------------------------------------
# From parameters to a record
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder_of_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "RUNS", tmp_path / "runs")


TINY = {"batch_size": 2, "steps": 2, **SIZES}


def test_own_network_on_own_images_from_parameters_to_a_record(write, tmp_path, folder_of_runs):
    (tmp_path / "net.py").write_text(f"import torch\nfrom torch import nn\n{NETWORK}", encoding="utf-8")
    parameters = {"network": f"{tmp_path / 'net.py'}:f", "data": write(IMAGES), "delta": 0.1, **TINY}
    (record,) = attack_each([Settings(**parameters).resolved()], "test", notebook="table1")
    network, data = load_network(parameters["network"], tmp_path), load_data(Settings(**parameters).resolved())
    assert (record.network.name, record.network.digest) == ("net.f", network.digest)
    assert (record.data.source, record.data.test) == ("own images, mine.py:f", 3)
    with torch.no_grad():
        clean = (network.model(data.test[0]).argmax(1) == data.test[1]).float().mean().item()
    assert record.metrics["test"]["clean"] == pytest.approx(clean) and record.metrics["test"]["w_2"] <= clean
    assert "-p network net.py:f" in record.command and "-p data mine.py:f" in record.command
    assert str(tmp_path) not in json.dumps(record.stored())
    (tuned,) = finetune_grid(Settings(**parameters, tau=0.1, eta=1, epochs=1).resolved(), "whole", notebook="table4")
    assert tuned.network.digest == network.digest and len(tuned.history.epochs) == 1


def test_any_data_set_and_norm_from_parameters_to_a_record(placed, validation, tmp_path, folder_of_runs, monkeypatch):
    dataset, norm, name, _, path = placed
    row, made = DATASETS[dataset], (torch.randint(256, (9, 3, 32, 32)).byte(), torch.arange(9))
    monkeypatch.setattr("companion.data.cifar", lambda *_, **__: made)
    parameters = {"network": name, "dataset": dataset, "norm": norm, "models": str(tmp_path), **TINY}
    chosen = Settings(data=str(validation[0]), **parameters).resolved()
    state = torch.load(path, weights_only=True)
    list(state.values())[-1][load_data(chosen).test[1][0]] += 100  # the bias of a class: one image is classified right
    torch.save(state, path)
    (record,) = attack_each([chosen], "test", notebook="table1")
    assert record.network.source == f"RobustBench, {row.name}, {norm}" and record.data.source == row.name
    assert (record.config.threat.r, record.config.threat.delta) == (2 if norm == "L2" else math.inf, row.delta[norm])
    assert record.metrics["test"]["clean"] == pytest.approx(1 / 3)
    assert ("-p norm L2" in record.command) is (norm == "L2")
    assert (f"-p dataset {dataset}" in record.command) is (dataset != "cifar10")


def test_network_that_does_not_fit_is_named_before_any_attack(write, folder_of_runs, monkeypatch):
    monkeypatch.setattr("wdat_core.wpgd", lambda *_, **__: pytest.fail("attacked"))
    with pytest.raises(ParameterError, match="demo tells 10 classes apart, which is not what the data has"):
        attack_each([Settings(data=write(IMAGES.replace("% 4", "+ 7")), **TINY).resolved()], "test", notebook="table1")


def test_network_that_is_never_right_is_named(write, tmp_path, folder_of_runs):
    (tmp_path / "net.py").write_text(f"import torch\nfrom torch import nn\n{NETWORK}", encoding="utf-8")
    value = f"{tmp_path / 'net.py'}:f"
    wrong = "def f():\n    x = torch.rand(5, 3, 4, 4)\n    return {'test': (x, (net.f()(x).argmax(1) + 1) % 4)}"
    parameters = {"network": value, "data": write(f"import net\n{wrong}"), **TINY}
    with pytest.raises(ParameterError, match=r"net.f classifies none of the 3 test images correctly"):
        attack_each([Settings(**parameters).resolved()], "test", notebook="table1")


def test_missing_training_images_are_named_before_any_attack(write, folder_of_runs, monkeypatch):
    monkeypatch.setattr("wdat_core.wpgd", lambda *_, **__: pytest.fail("attacked"))
    one = "def f(): return {'test': (torch.rand(5, 3, 32, 32), torch.arange(5))}"
    with pytest.raises(ParameterError, match="returned no 'train' images"):
        finetune_grid(Settings(data=write(one), tau=0.1, eta=1, **TINY).resolved(), "whole", notebook="table4")
