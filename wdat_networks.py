"""The networks of the companion by name: the five of the paper, any other of RobustBench, and the stand-ins.

A stand-in is a network that this project pre-trained itself, so that every table can be computed where the five cannot
be had. It goes by its own name, never by a paper's.
"""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from companion import ASSETS, PAPER_NETWORKS, STAND_INS, ParameterError, digest, one_line


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
        x = self.blocks(F.relu(self.norm(self.stem(x))))
        return self.head(x.mean((2, 3)))


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
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.skip(x))


def new_stand_in(name: str) -> nn.Module:
    """A stand-in with untrained weights, drawn from the global generator."""
    return _channels_last(SmallResNet(STAND_INS[name]))


def _channels_last(model: nn.Module) -> nn.Module:
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
    """A network by name: a stand-in, one of the paper's five, or any CIFAR-10 l_inf network of RobustBench.

    Args:
        models: RobustBench's folder of weights. cifar10/Linf/NAME.pt in it is used, or downloaded to there.

    Raises:
        ParameterError: the name is unknown (with the nearest ones), or the weights are missing and cannot be
            downloaded, truncated, not weights at all, or those of another architecture.
    """
    if name in STAND_INS:
        return _stand_in(name)
    zoo = _zoo()
    if name not in zoo:
        near = difflib.get_close_matches(name, [*STAND_INS, *zoo], n=3, cutoff=0.3)
        raise ParameterError(
            f"unknown network {name!r}"
            + (f": did you mean {', '.join(near)}?" if near else "")
            + f" Known are {', '.join(STAND_INS)} and the CIFAR-10 l_inf networks of RobustBench"
        )
    return _robustbench(name, zoo[name], Path(models))


def _stand_in(name: str) -> Network:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = ASSETS / f"{name}.safetensors"
    model = new_stand_in(name)
    try:
        model.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ParameterError(
            f"{path} does not hold the weights of stand-in {name!r}: restore it from the repository ({one_line(error)})"
        ) from error
    return Network(name, model.eval(), "pre-trained by this project", digest(path.read_bytes()))


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

    path = models / "cifar10" / "Linf" / f"{name}.pt"
    expected = PAPER_NETWORKS[name]["architecture"] if name in PAPER_NETWORKS else "RobustBench's entry of that name"
    by_hand = f"place the file of RobustBench's model zoo at {path} (expected: the weights of {name}, {expected})"
    single = isinstance(entry.get("gdrive_id"), str)
    if single:
        if not path.exists():
            _download(entry["gdrive_id"], path, by_hand)
        _check_weights(path, by_hand)
    try:
        model = load_model(name, model_dir=str(models), dataset="cifar10", threat_model="Linf")
    except Exception as error:
        raise ParameterError(
            f"the weights of {name} in {path.parent} do not fit its architecture or could not be fetched:"
            f" {by_hand} ({one_line(error)})"
        ) from error
    known = digest(path.read_bytes()) if single else ""
    return Network(name, _channels_last(model.float()).eval(), "RobustBench", known)


def _download(file_id: str, path: Path, by_hand: str) -> None:
    """Into a temporary name first, so that no half file ever stands under the final one."""
    from robustbench.utils import download_gdrive_new

    part = path.with_suffix(".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        download_gdrive_new(file_id, part)
        _check_weights(part, by_hand)
        part.replace(path)
    except ParameterError:
        raise
    except Exception as error:  # no network, no room, a refusal: gdown has an exception for each
        raise ParameterError(f"no weights at {path}, and the download failed: {by_hand} ({one_line(error)})") from error
    finally:
        part.unlink(missing_ok=True)


def _check_weights(path: Path, by_hand: str) -> None:
    """The file holds tensors and nothing that would have to be executed."""
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
        torch.load(path, map_location="cpu", weights_only=True, mmap=head.startswith(b"pk"))
    except Exception as error:
        raise ParameterError(
            f"{path} ({path.stat().st_size:,} bytes) is truncated, damaged, or not plain weights:"
            f" delete it and {by_hand} ({one_line(error)})"
        ) from error
