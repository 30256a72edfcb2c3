"""The networks of the companion by name: the five of the paper, any other of RobustBench, and the stand-ins.

A stand-in is a network that this project pre-trained itself, so that every table can be computed where the five cannot
be had. It goes by its own name, never by a paper's.
"""

from __future__ import annotations

import difflib
import io
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from companion import files
from companion.cards import model_card
from companion.files import digest, from_root, one_line, verified, write_sums, write_whole
from companion.records import Record, parse_record, record_bytes, record_stem
from companion.settings import FINETUNED, PAPER_NETWORKS, STAND_INS, ParameterError


class SmallResNet(nn.Module):
    """A residual network for small images: a stride-2 stem, then a block for each width, all but the first halving.

    Input (b, 3, h, w) in [0, 1], output logits (b, classes).
    """

    def __init__(self, widths: Sequence[int], classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        pairs = zip([widths[0], *widths], widths, strict=False)
        self.blocks = nn.Sequential(*(_Block(a, b, stride=2 if i else 1) for i, (a, b) in enumerate(pairs)))
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(_normed(self.stem, self.norm, x)))
        return self.head(x.mean((2, 3)))


class PatchResNet(nn.Module):
    """A residual network whose first pixels are patches of 4 x 4: a stem, then a block for each width.

    Where an image shrinks, four neighbours become one pixel of four times the channels and a 1 x 1 convolution brings
    these to the next width: every convolution has stride 1, whose gradient a CPU computes faster. Input
    (b, 3, h, w) in [0, 1], h and w multiples of 2^(1 + number of widths); output logits (b, classes).
    """

    def __init__(self, widths: Sequence[int], classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3 * 4**2, widths[0], 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        self.blocks = nn.Sequential(_Block(widths[0], widths[0], stride=1))
        for width_in, width in pairwise(widths):
            self.blocks.append(nn.PixelUnshuffle(2))
            self.blocks.append(nn.Conv2d(4 * width_in, width, 1, bias=False))
            self.blocks.append(_Block(width, width, stride=1))
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(_normed(self.stem, self.norm, F.pixel_unshuffle(x, 4))))
        return self.head(x.mean((2, 3)))


def _normed(conv: nn.Conv2d, norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """norm(conv(x)). In eval mode the norm is affine and goes into the kernel, which saves passes over the images."""
    if norm.training:
        return norm(conv(x))
    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    kernel, shift = conv.weight * scale.view(-1, 1, 1, 1), norm.bias - norm.running_mean * scale
    return F.conv2d(x, kernel, shift, conv.stride, conv.padding)  # type: ignore[arg-type]


class _Block(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        same = stride == 1 and width_in == width
        self.skip = nn.Identity() if same else nn.Conv2d(width_in, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(_normed(self.conv1, self.norm1, x))
        return F.relu(_normed(self.conv2, self.norm2, y) + self.skip(x))


class WideResNet(nn.Module):
    """The wide residual network of Zagoruyko and Komodakis (2016), WRN-depth-widen, as RobustBench has it.

    Input (b, 3, h, w) in [0, 1], output logits (b, classes); the depth is 6 k + 4 for k blocks in each of three groups.
    """

    def __init__(self, depth: int, widen: int, classes: int = 10) -> None:
        super().__init__()
        if depth < 10 or depth % 6 != 4:
            raise ParameterError(f"the depth of a wide residual network is 10, 16, 22, 28, ..., not {depth!r}")
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        blocks, width_in = [], 16
        for group in range(3):
            width = 16 * widen * 2**group
            for i in range((depth - 4) // 6):
                blocks.append(_WideBlock(width_in, width, stride=2 if group and i == 0 else 1))
                width_in = width
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(width_in)
        self.head = nn.Linear(width_in, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.blocks(self.stem(x))))
        return self.head(x.mean((2, 3)))


class _WideBlock(nn.Module):
    """Normalisation and ReLU come before each convolution; a block that changes the width projects after them."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.skip = None if width_in == width else nn.Conv2d(width_in, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.norm1(x))
        y = self.conv2(F.relu(self.norm2(self.conv1(active))))
        return y + (x if self.skip is None else self.skip(active))


def new_stand_in(name: str) -> nn.Module:
    """A stand-in with untrained weights, drawn from the global generator."""
    architecture, widths = STAND_INS[name]
    return channels_last({"SmallResNet": SmallResNet, "PatchResNet": PatchResNet}[architecture](widths))


def channels_last(model: nn.Module) -> nn.Module:
    """The layout in which convolutions are fastest, on CPUs and GPUs; `Module.to` is typed without it."""
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


@dataclass(frozen=True)
class Network:
    """A network that was loaded: the module (eval mode, channels_last, on the CPU) and where it comes from."""

    name: str
    model: nn.Module
    source: str
    digest: str


def load_network(name: str, models: Path) -> Network:
    """A network by name: a stand-in, one of the paper's five, any CIFAR-10 l_inf network of RobustBench, or an export.

    Args:
        name: what has a folder in it, such as exports/mine or ./mine, is the path of an `export`.
        models: RobustBench's folder of weights. cifar10/Linf/NAME.pt in it is used, or downloaded to there.

    Raises:
        ParameterError: the name is unknown (with the nearest ones), or the weights are missing and cannot be
            downloaded, truncated, not weights at all, or those of another architecture; or a file of the export is
            missing or not what was exported.
    """
    if Path(name).name != name:
        return _exported(from_root(name))
    if name in STAND_INS:
        return _stand_in(name, files.ASSETS)
    zoo = _zoo()
    if name not in zoo:
        near = difflib.get_close_matches(name, [*STAND_INS, *zoo], n=3, cutoff=0.3)
        raise ParameterError(
            f"unknown network {name!r}"
            + (f": did you mean {', '.join(near)}?" if near else ".")
            + f" Known are {', '.join(STAND_INS)}, the CIFAR-10 l_inf networks of RobustBench, and exports by path"
        )
    return _robustbench(name, zoo[name], Path(models))


def _weights_file(name: str) -> str:
    """Where the weights of a stand-in or of a network of RobustBench lie in a folder of them."""
    return f"{name}.safetensors" if name in STAND_INS else f"cifar10/Linf/{name}.pt"


def _stand_in(name: str, folder: Path) -> Network:
    from safetensors import SafetensorError
    from safetensors.torch import load

    file = _weights_file(name)
    model = new_stand_in(name)
    try:
        content = verified(folder, file)
        model.load_state_dict(load(content))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ParameterError(
            f"{folder / file} does not hold the weights of stand-in {name!r}: restore it and SHA256SUMS beside it from"
            f" where they came ({one_line(error)})"
        ) from error
    return Network(name, model.eval(), "pre-trained by this project", digest(content))


def _zoo() -> dict[str, dict[str, Any]]:
    """RobustBench's entries for CIFAR-10 under l_inf."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pkg_resources says that it is deprecated
        try:
            import autoattack  # noqa: F401
        except ImportError:  # robustbench imports it by its old name
            import pyautoattack

            sys.modules["autoattack"] = pyautoattack
        from robustbench.model_zoo import model_dicts
        from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel
    return model_dicts[BenchmarkDataset.cifar_10][ThreatModel.Linf]


def _robustbench(name: str, entry: dict[str, Any], models: Path) -> Network:
    from robustbench.utils import load_model

    expected = PAPER_NETWORKS[name]["architecture"] if name in PAPER_NETWORKS else "RobustBench's entry of that name"

    def by_hand(file: Path) -> str:
        return f"place the file of RobustBench's model zoo at {file} (expected: the weights of {name}, {expected})"

    path = models / _weights_file(name)
    ids = entry.get("gdrive_id")  # one; a list for an ensemble, None where timm fetches the weights
    files = {path: ids} if isinstance(ids, str) else {Path(f"{path}_m{i}.pt"): one for i, one in enumerate(ids or ())}
    for file, file_id in files.items():
        if not file.exists():
            _download(file_id, file, by_hand(file))
        _check_weights(file, by_hand(file))
    try:
        model = load_model(name, model_dir=str(models), dataset="cifar10", threat_model="Linf")
    except Exception as error:
        raise ParameterError(
            f"the weights of {name} in {path.parent} do not fit its architecture or could not be fetched:"
            f" {by_hand(path)} ({one_line(error)})"
        ) from error
    parts = [file.read_bytes() for file in files] or [t.numpy().tobytes() for t in model.state_dict().values()]
    return Network(name, channels_last(model.float()).eval(), "RobustBench", digest(b"".join(parts)))


def _download(file_id: str, path: Path, by_hand: str) -> None:
    """Into a folder of its own first: no half file ever stands under the final name, and gdown leaves halves behind."""
    from robustbench.utils import download_gdrive_new

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".download-") as folder:
            part = Path(folder) / path.name
            download_gdrive_new(file_id, part)
            _check_weights(part, by_hand)
            part.replace(path)
    except ParameterError:
        raise
    except Exception as error:  # no network, no room, a refusal: gdown has an exception for each
        raise ParameterError(f"no weights at {path}, and the download failed: {by_hand} ({one_line(error)})") from error


def _check_weights(path: Path, by_hand: str) -> None:
    """The file is whole, and holds tensors and nothing that would have to be executed."""
    try:
        with path.open("rb") as file:
            head = file.read(512).lstrip().lower()
    except OSError as error:
        raise ParameterError(f"{path} cannot be read: {by_hand} ({one_line(error)})") from error
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ParameterError(
            f"{path} is an HTML page, not weights (a download that was refused): delete it and {by_hand}"
        )
    try:
        if head.startswith(b"pk"):
            with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
                if damaged := archive.testzip():
                    raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
        torch.load(path, map_location="cpu", weights_only=True, mmap=head.startswith(b"pk"))
    except Exception as error:
        raise ParameterError(
            f"{path} ({path.stat().st_size:,} bytes) is truncated, damaged, or not plain weights:"
            f" delete it and {by_hand} ({one_line(error)})"
        ) from error


# ---------------------------------------------------------------------------------------------------------------------
# Exports: a fine-tuned network to take away
# ---------------------------------------------------------------------------------------------------------------------


def check_export(name: str, folder: str | Path) -> None:
    """Whether a network fine-tuned from the one of that name can be exported to the folder, before hours of training.

    Raises:
        ParameterError: its weights are not one file, or the folder cannot be written.
    """
    base = name.removesuffix(FINETUNED)
    if base not in STAND_INS and not isinstance(_zoo().get(base, {}).get("gdrive_id"), str):
        raise ParameterError(f"{base} cannot be exported: RobustBench does not keep its weights in one file")
    try:
        from_root(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(dir=from_root(folder)).cleanup()
    except OSError as error:
        raise ParameterError(f"nothing can be exported to {folder}: give another folder ({one_line(error)})") from error


def export(model: nn.Module, record: Record, folder: str | Path) -> Path:
    """Write a fine-tuned network into a folder of its own: weights, record, model card and their digests.

    It appears whole or not at all, once it has been read back. Its name ends in the weights' digest, so that nothing is
    overwritten. The weights are NAME.safetensors for a stand-in. For a network of RobustBench they are
    cifar10/Linf/NAME.pt: `robustbench.utils.load_model(NAME, model_dir=...)` takes the folder as its own.

    Args:
        model: as `finetune` left it.
        record: of that run.
        folder: where the export's folder is made; a relative one starts at the repository.

    Returns:
        The export's folder, which `load_network` takes for a name.

    Raises:
        ParameterError: the folder cannot be written, or the model is not of the record's architecture.
    """
    base = record["network"]["name"].removesuffix(FINETUNED)
    check_export(base, folder)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    weights = _weights_file(base)
    files = {weights: _serialised(base, state)}
    known = digest(files[weights])
    path = from_root(folder) / f"{record_stem(record)}-{known[:8]}"
    files["record.json"] = record_bytes(record)
    files["README.md"] = model_card(record, base, weights, known).encode()
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as part:
            whole = Path(part) / path.name
            for name, content in files.items():
                write_whole(whole / name, content)
            write_sums(whole, list(files))
            back = _exported(whole).model.state_dict()
            if back.keys() != state.keys() or not all(torch.equal(back[name], state[name]) for name in state):
                raise ParameterError(f"the model is not what {base} is in {record['network']['source']}")
            try:
                whole.rename(path)
            except OSError:
                if not path.is_dir():
                    raise
                _exported(path)  # the same network, if nothing has happened to it since
    except OSError as error:
        raise ParameterError(
            f"{path} could not be written ({one_line(error)}): make room, or give another folder"
        ) from error
    return path


def is_exported(record: Record, folder: str | Path) -> bool:
    """Whether the folder holds an export of this very run."""
    for path in from_root(folder).glob(f"{record_stem(record)}-*/record.json"):
        try:
            if parse_record(path.read_bytes()) == record:
                return True
        except (OSError, ValueError):
            continue
    return False


def _serialised(base: str, state: dict[str, Tensor]) -> bytes:
    if base in STAND_INS:
        from safetensors.torch import save

        return save(state)
    content = io.BytesIO()
    # RobustBench's loader wants this one of its networks as its authors stored it.
    torch.save({"last": state} if base == "Andriushchenko2020Understanding" else state, content)
    return content.getvalue()


def _exported(folder: Path) -> Network:
    """The network of an export, once each of its files is the one that was written."""
    try:
        record = parse_record(verified(folder, "record.json"))
        base = record["network"]["name"].removesuffix(FINETUNED)
        for name in ("README.md", _weights_file(base)):
            verified(folder, name)
        network = _stand_in(base, folder) if base in STAND_INS else _robustbench(base, _zoo()[base], folder)
    except (OSError, ValueError, KeyError) as error:
        raise ParameterError(
            f"{folder} is not an export of this project, or not whole: export it again ({one_line(error)})"
        ) from error
    config, images = record["config"], record["data"]["train"]
    how = (
        f"{config['perturb']}, tau {config['tau']:g}, eta {config['eta']:g}, {images} images, {config['epochs']} epochs"
    )
    source = f"{base}, fine-tuned by this project: {how}, seed {config['seed']}"
    return replace(network, name=base + FINETUNED, source=source)
