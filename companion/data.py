"""The images: those embedded in the repository, CIFAR-10 and CIFAR-100, ImageNet, and a user's own."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tempfile
from collections.abc import Callable
from functools import cached_property
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from companion import files, own
from companion.datasets import DATASETS, EMBEDDED_SOURCE, DataSet, is_own
from companion.files import digest, from_root, one_line, verified
from companion.settings import ParameterError, Settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from wdat_core import Images

PARTS = ("train", "val", "test")


class Data:
    """Training, validation and test images, each a pair (x, y) as wdat_core takes them, and where they come from.

    A part is read when it is first asked for; what cannot be had raises a ParameterError then.

    Attributes:
        source: where they come from, for a record.
        shape: of an image, (channels, height, width).
        classes: how many the labels tell apart.
        all_classes: whether `classes` is all there are; for a user's own images it is what their labels show.
    """

    def __init__(
        self, source: str, shape: tuple[int, ...], classes: int, all_classes: bool, read: Callable[[str], Images]
    ) -> None:
        self.source, self.shape, self.classes, self.all_classes = source, shape, classes, all_classes
        self._read = read

    @cached_property
    def train(self) -> Images:
        return self._read("train")

    @cached_property
    def val(self) -> Images:
        return self._read("val")

    @cached_property
    def test(self) -> Images:
        return self._read("test")

    def digest(self, *parts: str) -> str:
        """The SHA-256 of the bytes of some of the parts, "train", "val" and "test"; all, where none is named."""
        known = hashlib.sha256()
        for part in parts or PARTS:
            x, y = (tensor.cpu() for tensor in getattr(self, part))
            for tensor in (_bytes(x), y):
                known.update(tensor.contiguous().numpy().data)
        return known.hexdigest()


def load_data(settings: Settings, device: torch.device | str = "cpu") -> Data:
    """The images that the settings name, on a device.

    `settings.data` is "embedded" (CIFAR-10 alone), a folder, or path/file.py:function. The training images of CIFAR-10
    and CIFAR-100 are split into those for training and for validation by a fixed permutation. Of ImageNet there are
    test images only: the 5,000 that RobustBench lists, in its order; the folder holds the validation images, in one
    folder a class. Of each part the settings say how many of the first images are taken.

    A function of the user's own takes nothing and returns a dict of parts, {"train": (x, y), "val": (x, y), "test":
    (x, y)}; a part that no run needs can be left out. x is a tensor (n, channels, height, width), of floats in [0, 1]
    or of bytes, and y a tensor (n,) of whole numbers, the classes from 0.

    Raises:
        ParameterError: the images are not there and cannot be put there, a file is damaged, there are fewer than asked
            for, or the user's function does not return what it has to.
    """
    row, sizes = DATASETS[settings.dataset], {part: getattr(settings, f"{part}_images") for part in PARTS}
    if is_own(str(settings.data)):
        return _own(str(settings.data), sizes, device)
    folder = from_root(str(settings.data))

    def read(part: str) -> Images:
        if settings.data == "embedded":
            x, y = (t[: sizes[part]] for t in embedded(part))
        elif row.name == "ImageNet":
            x, y = imagenet(folder, part, sizes[part])
        else:
            x, y = _split_of_cifar(row, folder, part, sizes)
        return floats(x).to(device), y.to(device)

    source = EMBEDDED_SOURCE if settings.data == "embedded" else row.name
    return Data(source, row.shape, row.classes, True, read)


def floats(x: Tensor) -> Tensor:
    """Bytes (n, c, h, w) as floats in [0, 1], channels_last."""
    import torch

    return x.float().div_(255).contiguous(memory_format=torch.channels_last)


def _bytes(x: Tensor) -> Tensor:
    """What `floats` made into floats; floats that no bytes would give stay as they are."""
    import torch

    bytes_ = x.mul(255).round_().to(torch.uint8)
    return bytes_ if torch.equal(bytes_.float().div_(255), x) else x


def embedded(part: str) -> tuple[Tensor, Tensor]:
    """The images of the repository, `EMBEDDED` says how many; bytes (n, 3, 32, 32), labels (n,).

    Training and validation images are the first 5,000 of CIFAR-10's training set, test images the first 1,000 of its
    test set. Each file is one lossless sheet of tiles, 50 in a row.
    """
    import numpy as np
    import torch
    from PIL import Image

    path = files.ASSETS / f"images_{part}.webp"
    try:
        index = json.loads(verified(files.ASSETS, "images.json"))[part]
        sheet = np.asarray(Image.open(io.BytesIO(verified(files.ASSETS, path.name))).convert("RGB"))
        if digest(sheet.tobytes()) != index["digest"]:
            raise OSError("its pixels are not those that were stored")
    except (OSError, ValueError) as error:
        raise ParameterError(
            f"{path} or images.json beside it is damaged or missing: restore both and SHA256SUMS from the repository"
            f" ({one_line(error)})"
        ) from error
    _, h, w = DATASETS["cifar10"].shape
    rows, columns = sheet.shape[0] // h, sheet.shape[1] // w
    tiles = sheet.reshape(rows, h, columns, w, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, h, w)
    return torch.from_numpy(tiles.copy()), torch.tensor([int(c) for c in index["labels"]])


# ---------------------------------------------------------------------------------------------------------------------
# CIFAR-10 and CIFAR-100
# ---------------------------------------------------------------------------------------------------------------------


def _split_of_cifar(row: DataSet, folder: Path, part: str, sizes: dict[str, int]) -> tuple[Tensor, Tensor]:
    import torch

    x, y = cifar(folder, train=part != "test", dataset=row.robustbench)
    if part == "test":
        return x[: sizes["test"]], y[: sizes["test"]]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    rows = order[: sizes["train"]] if part == "train" else order[len(order) - sizes["val"] :]
    return x[rows], y[rows]


def cifar(folder: Path, train: bool, dataset: str = "cifar10") -> tuple[Tensor, Tensor]:
    """CIFAR-10 or CIFAR-100 through torchvision: bytes (n, 3, 32, 32) and labels (n,).

    It is downloaded into the folder where it is not there yet.

    Raises:
        ParameterError: it is not there and cannot be downloaded, or there is no room or no right to write.
    """
    import torch
    from torchvision import datasets

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[dataset]
    try:
        try:
            images = kind(str(folder), train)  # checks md5 sums before it unpickles
        except RuntimeError:  # files are missing or damaged
            _fetch(kind, folder)
            images = kind(str(folder), train)
    except Exception as error:  # urllib, tarfile, pickle and the file system each have their own
        instead = ", or take the embedded images (data embedded)" if dataset == "cifar10" else ""
        raise ParameterError(
            f"{DATASETS[dataset].name} is not in {folder} and could not be put there ({one_line(error)}): place"
            f" {kind.filename} or the folder {kind.base_folder} there{instead}; images of your own come from"
            " path/file.py:function"
        ) from error
    return torch.from_numpy(images.data).permute(0, 3, 1, 2), torch.tensor(images.targets)


def _fetch(kind: Any, folder: Path) -> None:
    """The files of one of torchvision's classes into the folder, each whole, from its archive there or downloaded.

    Torchvision writes the archive and what it unpacks under their final names at once, where an interruption leaves
    halves and a second process reads them.
    """
    batches, archive = folder / kind.base_folder, folder / kind.filename
    there = next(place for place in (folder, *folder.parents) if place.is_dir())  # a name that is wrong makes no folder
    with tempfile.TemporaryDirectory(dir=there, prefix=".download-") as part:
        if archive.exists():
            shutil.copy(archive, part)  # where its md5 sum is wrong, it is fetched anew
        kind(part, download=True)
        batches.mkdir(parents=True, exist_ok=True)
        for file in (Path(part) / kind.base_folder).iterdir():
            file.replace(batches / file.name)


# ---------------------------------------------------------------------------------------------------------------------
# ImageNet
# ---------------------------------------------------------------------------------------------------------------------


def imagenet(folder: Path, part: str, n: int) -> tuple[Tensor, Tensor]:
    """The first n of the 5,000 validation images that RobustBench lists: bytes (n, 3, 224, 224) and labels (n,).

    Each is resized to 256 pixels on its shorter side and its centre cropped to 224, as RobustBench does for most of its
    networks (a few of them it gives another crop, so that their clean accuracy can differ a little from its
    leaderboard). No other image is read.

    Args:
        folder: holds one folder a class, such as n01440764, with the images of ImageNet's validation set.

    Raises:
        ParameterError: another part than "test" is asked for, or the folder or an image is missing or damaged.
    """
    import torch
    from PIL import Image
    from torchvision.transforms.functional import center_crop, pil_to_tensor, resize

    if part != "test":
        raise ParameterError(
            "of ImageNet this project has test images only: to fine-tune, give images of your own as data"
            " (path/file.py:function)"
        )
    if not folder.is_dir():
        raise ParameterError(
            f"there is no folder {folder}: give as data the folder of ImageNet's validation images, which holds one"
            " folder a class (n01440764, ...); they cannot be downloaded without an account"
        )
    spec = util.find_spec("robustbench")
    assert spec is not None and spec.origin is not None
    listed = Path(spec.origin).parent / "helper_files"
    names = (listed / "imagenet_test_image_ids.txt").read_text(encoding="utf-8").split()[:n]
    label = json.loads((listed / "imagenet_class_to_id_map.json").read_text(encoding="utf-8"))
    size = DATASETS["imagenet"].shape[1:]
    x = torch.empty(len(names), 3, *size, dtype=torch.uint8)
    for i, name in enumerate(names):
        try:
            with Image.open(folder / name) as image:
                x[i] = pil_to_tensor(center_crop(resize(image.convert("RGB"), [256]), list(size)))
        except OSError as error:
            raise ParameterError(
                f"{folder / name} is missing or damaged ({one_line(error)}): give as data the folder of ImageNet's"
                " validation images, which holds one folder a class (n01440764, ...), or ask for fewer test_images"
            ) from error
    return x, torch.tensor([label[name.split("/")[0]] for name in names])


# ---------------------------------------------------------------------------------------------------------------------
# A user's own images
# ---------------------------------------------------------------------------------------------------------------------


def _own(value: str, sizes: dict[str, int], device: torch.device | str) -> Data:
    parts = own.call(value, "data")
    if not isinstance(parts, dict) or not parts or not set(parts) <= set(PARTS):
        found = (
            f"a dict of {', '.join(map(repr, parts)) or 'nothing'}" if isinstance(parts, dict) else type(parts).__name__
        )
        needed = '{"train": (x, y), "val": (x, y), "test": (x, y)}, or some of these parts'
        raise ParameterError(f"{value} returned {found}, and a dict is needed: {needed}")
    for part, images in parts.items():
        if problem := _problem(images):
            raise ParameterError(f"{value}: {problem.format(part=repr(part))}")
    shapes = {part: tuple(x.shape[1:]) for part, (x, _) in parts.items()}
    if len(set(shapes.values())) > 1:
        raise ParameterError(f"{value}: the images of the parts differ in shape: {shapes}")

    def read(part: str) -> Images:
        if part not in parts:
            raise ParameterError(f"{value} returned no {part!r} images, which this run needs")
        x, y = parts[part]
        if len(y) < sizes[part]:
            raise ParameterError(
                f"{part}_images is {sizes[part]}, and {value} returned {len(y)}: ask for at most {len(y)}"
            )
        x, y = x[: sizes[part]], y[: sizes[part]]
        return _as_floats(x.detach()).to(device), y.long().to(device)

    classes = 1 + max(int(y.max()) for _, y in parts.values())
    return Data(f"own images, {own.words(value)}", next(iter(shapes.values())), classes, False, read)


def _as_floats(x: Tensor) -> Tensor:
    import torch

    return x.float().contiguous(memory_format=torch.channels_last) if x.is_floating_point() else floats(x)


def _problem(images: Any) -> str:
    """What is wrong with the images of a {part} that a user gave, in words; nothing, where they are fine."""
    import torch

    if not isinstance(images, tuple | list) or [type(t) for t in images] != [torch.Tensor] * 2:
        return "{part} has to be a pair of tensors (x, y)"
    x, y = images
    if x.ndim != 4 or not len(x):
        return f"x of {{part}} has shape {tuple(x.shape)}, and (n, channels, height, width) is needed, n at least 1"
    if not x.is_floating_point() and x.dtype != torch.uint8:
        return f"x of {{part}} is of {x.dtype}, and floats in [0, 1] or bytes (torch.uint8) are needed"
    if x.is_floating_point() and not (x.min() >= 0 and x.max() <= 1):  # neither holds for a NaN
        low, high = x.min().item(), x.max().item()
        return f"x of {{part}} goes from {low:.4g} to {high:.4g}, and [0, 1] is needed: normalise in the network"
    if y.shape != (len(x),):
        return f"y of {{part}} has shape {tuple(y.shape)}, and one label for each of the {len(x)} images is needed"
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        return f"y of {{part}} is of {y.dtype}, and whole numbers (torch.int64) are needed"
    if y.min() < 0:
        return f"y of {{part}} has the label {int(y.min())}, and classes are counted from 0"
    return ""
