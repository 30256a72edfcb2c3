"""The images: those embedded in the repository, and CIFAR-10."""

from __future__ import annotations

import io
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from companion import files
from companion.files import digest, from_root, one_line, verified
from companion.settings import ParameterError, Settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from wdat_core import Images


@dataclass(frozen=True)
class Data:
    """Training, validation and test images, each a pair (x, y) as wdat_core takes them, and where they come from."""

    train: Images
    val: Images
    test: Images
    source: str

    def digest(self, *parts: str) -> str:
        """The SHA-256 of the bytes of some of the parts, "train", "val" and "test"; all, where none is named."""
        pairs = (getattr(self, part) for part in parts or ("train", "val", "test"))
        return digest(b"".join(t.cpu().numpy().tobytes() for x, y in pairs for t in (_bytes(x), y)))


def load_data(settings: Settings, device: torch.device | str = "cpu") -> Data:
    """The images that the settings name: the embedded ones, or CIFAR-10 split 40,000 / 10,000 by a fixed permutation.

    Raises:
        ParameterError: CIFAR-10 is not in the folder and cannot be put there, or a file is damaged.
    """
    import torch

    if settings.data == "embedded":
        parts = {name: embedded(name) for name in ("train", "val", "test")}
        source = "embedded CIFAR-10 images"
    else:
        folder = from_root(str(settings.data))
        x, y = cifar10(folder, train=True)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        train, val = order[: settings.train_images], order[len(order) - int(settings.val_images or 0) :]
        parts = {"train": (x[train], y[train]), "val": (x[val], y[val]), "test": cifar10(folder, train=False)}
        source = "CIFAR-10"
    sizes = {"train": settings.train_images, "val": settings.val_images, "test": settings.test_images}
    parts = {name: (x[: sizes[name]], y[: sizes[name]]) for name, (x, y) in parts.items()}
    ready = {name: (floats(x).to(device), y.to(device)) for name, (x, y) in parts.items()}
    return Data(**ready, source=source)


def floats(x: Tensor) -> Tensor:
    """Bytes (n, 3, h, w) as floats in [0, 1], channels_last."""
    import torch

    return x.float().div_(255).contiguous(memory_format=torch.channels_last)


def _bytes(x: Tensor) -> Tensor:
    """What `floats` made into floats."""
    import torch

    return x.mul(255).round_().to(torch.uint8).contiguous(memory_format=torch.contiguous_format)


def embedded(part: str) -> tuple[Tensor, Tensor]:
    """The images of the repository: "train" (4,000), "val" and "test" (1,000 each); bytes (n, 3, 32, 32), labels (n,).

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
    rows, columns = sheet.shape[0] // 32, sheet.shape[1] // 32
    tiles = sheet.reshape(rows, 32, columns, 32, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, 32, 32)
    return torch.from_numpy(tiles.copy()), torch.tensor([int(c) for c in index["labels"]])


def cifar10(folder: Path, train: bool) -> tuple[Tensor, Tensor]:
    """CIFAR-10 through torchvision: bytes (n, 3, 32, 32) and labels (n,); downloaded into the folder where it is not.

    Raises:
        ParameterError: it is not there and cannot be downloaded, or there is no room or no right to write.
    """
    import torch
    from torchvision.datasets import CIFAR10

    try:
        try:
            dataset = CIFAR10(str(folder), train)  # checks md5 sums before it unpickles
        except RuntimeError:  # files are missing or damaged
            _fetch_cifar10(folder)
            dataset = CIFAR10(str(folder), train)
    except Exception as error:  # urllib, tarfile, pickle and the file system each have their own
        raise ParameterError(
            f"CIFAR-10 is not in {folder} and could not be put there ({one_line(error)}): place"
            " cifar-10-python.tar.gz or the folder cifar-10-batches-py there, or use the embedded images (preset demo)"
        ) from error
    return torch.from_numpy(dataset.data).permute(0, 3, 1, 2), torch.tensor(dataset.targets)


def _fetch_cifar10(folder: Path) -> None:
    """The files of CIFAR-10 into the folder, each whole, from its archive there or downloaded.

    Torchvision writes the archive and what it unpacks under their final names at once, where an interruption leaves
    halves and a second process reads them.
    """
    from torchvision.datasets import CIFAR10

    batches, archive = folder / CIFAR10.base_folder, folder / CIFAR10.filename
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as part:
        if archive.exists():
            shutil.copy(archive, part)  # where its md5 sum is wrong, it is fetched anew
        CIFAR10(part, download=True)
        batches.mkdir(exist_ok=True)
        for file in (Path(part) / CIFAR10.base_folder).iterdir():
            file.replace(batches / file.name)
