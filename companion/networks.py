"""The networks of the companion by name: the paper's five and any other of RobustBench, published ones, the stand-ins.

A stand-in is a network that this project pre-trained itself, so that every table can be computed where the five cannot
be had. It goes by its own name, never by a paper's. An export and a user's own network are named by their path.
"""

from __future__ import annotations

import difflib
import json
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from companion import files, own
from companion.architectures import channels_last, cnn_a, new_stand_in
from companion.data import Data
from companion.datasets import DATASETS, NORMS, is_own
from companion.files import digest, from_root, one_line, verified
from companion.settings import FINETUNED, PAPER_NETWORKS, STAND_INS, ParameterError

FROM_SCRATCH = "-from-scratch"  # ends the name of an architecture whose weights were drawn anew


@dataclass(frozen=True)
class Published:
    """A network for CIFAR-10 that others published as one plain file of weights, which lies in the folder `models`."""

    file: str
    digest: str  # SHA-256 of the file
    architecture: Callable[[], nn.Module]  # whose state dict the file holds
    source: str  # whose network it is
    address: str  # where the file comes from
    licence: str
    training: str  # how it was made robust, by those who published it
    extra: bool = False  # whether it has seen more images than CIFAR-10's


# alpha-beta-CROWN carries the files under its own licence.
_SDP = "https://raw.githubusercontent.com/Verified-Intelligence/alpha-beta-CROWN/main/complete_verifier/models/sdp/"
_DATHATHRI = "Dathathri et al. (2020), arXiv 2010.11645"
PUBLISHED = {
    "cnn_a_adv4": Published(
        "cifar_cnn_a_adv4.model",
        "f872a69536be3f0ab98397094bb7c3952d747b08321b81eafd00d9fab5eca0e7",
        cnn_a,
        _DATHATHRI,
        _SDP + "cifar_cnn_a_adv4.model",
        "BSD-3-Clause",
        "PGD",
    ),
    "cnn_a_mix4": Published(
        "cifar_cnn_a_mix4.model",
        "91d5ade259939afecdccbeb9f818f55f9c560466d9b5b0b01ecc86dc8eaa8d13",
        cnn_a,
        _DATHATHRI,
        _SDP + "cifar_cnn_a_mix4.model",
        "BSD-3-Clause",
        "PGD and interval bounds",
    ),
}


@dataclass(frozen=True)
class Network:
    """A network that was loaded: the module (eval mode, channels_last, on the CPU) and where it comes from."""

    name: str
    model: nn.Module
    source: str
    digest: str


def load_network(name: str, models: Path, dataset: str = "cifar10", norm: str = "Linf") -> Network:
    """A network by its name, or by the path of an export or of a function of the user's own.

    Args:
        name: a stand-in, a published network, or a network that RobustBench has for the data set and the norm.
            `path/file.py:function` is a function that takes nothing and returns an nn.Module, which takes images in
            [0, 1] to logits. Anything else with a folder in it, such as exports/mine or ./mine, is an `export`.
        models: the folder of weights. RobustBench's lie at DATASET/NORM/NAME.pt in it, or are downloaded to there.
        dataset: a key of `DATASETS`.
        norm: "Linf" or "L2".

    Raises:
        ParameterError: the name is unknown (with the nearest ones); or the weights are missing and cannot be
            downloaded, truncated, not weights at all, or those of another architecture; or a file of an export is
            missing or not what was exported; or the user's function does not return a network.
    """
    if is_own(name):
        return _own(name)
    if Path(name).name != name:
        return _exported(from_root(name))
    if name in STAND_INS:
        return _plain(name, files.ASSETS)
    if name in PUBLISHED:
        return _published(name, Path(models))
    check_name(name, dataset, norm)
    return _robustbench(name, Path(models), dataset, norm)


def check_name(name: str, dataset: str, norm: str) -> None:
    """The name is one that `load_network` knows, or a path to something that is there.

    Raises:
        ParameterError: it is not; says the nearest ones.
    """
    if is_own(name):
        own.parts(name, "network")
    elif Path(name).name != name:
        if not (from_root(name) / "record.json").is_file():
            raise ParameterError(f"{name} is not an export of this project: it has no record.json")
    elif name not in STAND_INS and name not in PUBLISHED and name not in zoo(dataset, norm):
        raise _unknown(name, dataset, norm)


def shape_of(name: str) -> tuple[str, int] | None:
    """The architecture of a network and how many parameters it has; None of networks that are not known by name."""
    with torch.device("meta"):  # nothing is allocated, and nothing drawn at random
        if name in STAND_INS:
            words, model = "{}{}".format(*STAND_INS[name]), new_stand_in(name)
        elif name in PUBLISHED:
            words, model = PUBLISHED[name].architecture.__name__, PUBLISHED[name].architecture()
        elif name in PAPER_NETWORKS:
            words, model = PAPER_NETWORKS[name]["architecture"], zoo()[name]["model"]()
        else:
            return None
    return words, sum(p.numel() for p in model.parameters())


def check_fit(network: Network, data: Data) -> None:
    """The network takes the images, and has a logit for each class.

    Raises:
        ParameterError: it does not; says what it takes or gives, and what the images are.
    """
    what = f"{data.source}: shape {data.shape}, {data.classes} classes"
    try:
        with torch.no_grad():
            logits = network.model(torch.full((1, *data.shape), 0.5))
    except Exception as error:  # whatever a layer says of a size that it does not take
        raise ParameterError(
            f"{network.name} fails on an image of the data ({what}): {one_line(error)}{own.where(error)}."
            " Give the images that the network takes, or another network"
        ) from error
    if not isinstance(logits, torch.Tensor) or logits.shape[:-1] != (1,):
        found = f"shape {tuple(logits.shape)}" if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ParameterError(f"{network.name} gives {found} for one image, and logits of shape (1, classes) are needed")
    if logits.shape[1] != data.classes and (data.all_classes or logits.shape[1] < data.classes):
        raise ParameterError(
            f"{network.name} tells {logits.shape[1]} classes apart, which is not what the data has ({what}):"
            " give the data set that it was trained on, or another network"
        )


def _unknown(name: str, dataset: str, norm: str) -> ParameterError:
    elsewhere = [(d, n) for d in DATASETS for n in NORMS if name in zoo(d, n)]
    if elsewhere:
        places = " or ".join(f"-p dataset {d} -p norm {n}" for d, n in elsewhere)
        return ParameterError(f"RobustBench has no {name} for {DATASETS[dataset].name} under {norm}: give {places}")
    near = difflib.get_close_matches(name, [*STAND_INS, *PUBLISHED, *zoo(dataset, norm)], n=3, cutoff=0.3)
    return ParameterError(
        f"unknown network {name!r}"
        + (f": did you mean {', '.join(near)}?" if near else ".")
        + f" Known are {', '.join([*STAND_INS, *PUBLISHED])}, RobustBench's networks for {DATASETS[dataset].name} under"
        f" {norm}, exports by their path, and your own by path/file.py:function"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Weights on their own: stand-ins, published files, a user's network, exports
# ---------------------------------------------------------------------------------------------------------------------


def weights_file(name: str, dataset: str, norm: str) -> str:
    """Where the weights of a network lie in an export; those of RobustBench where they lie in `models` too."""
    if name in STAND_INS or name in PUBLISHED:
        return f"{name}.safetensors"
    return f"{DATASETS[dataset].robustbench}/{norm}/{name}.pt"


def _plain(name: str, folder: Path) -> Network:
    """A stand-in from the assets; or a stand-in or a published network from an export."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    file = f"{name}.safetensors"
    model = new_stand_in(name) if name in STAND_INS else channels_last(PUBLISHED[name].architecture())
    try:
        content = verified(folder, file)
        model.load_state_dict(load(content))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ParameterError(
            f"{folder / file} does not hold the weights of {name!r}: restore it and SHA256SUMS beside it from where"
            f" they came ({one_line(error)})"
        ) from error
    return Network(name, model.eval(), "pre-trained by this project", digest(content))


def _published(name: str, models: Path) -> Network:
    row = PUBLISHED[name]
    path, model = models / row.file, row.architecture()
    by_hand = f"place the file from {row.address} there"
    if not path.exists():
        raise ParameterError(f"no weights of {name} at {path}: {by_hand}")
    check_weights(path, by_hand)
    if digest(path.read_bytes()) != row.digest:
        raise ParameterError(f"{path} is not the published file of {name} (its SHA-256 is another): {by_hand}")
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return Network(name, channels_last(model).eval(), row.source, row.digest)


def _own(value: str) -> Network:
    model = own.call(value, "network")
    if not isinstance(model, nn.Module):
        raise ParameterError(f"{value} returned {type(model).__name__}, and a torch.nn.Module is needed")
    model, words = channels_last(model.cpu().float()).eval(), own.words(value)
    name = words.replace(".py:", ".").replace(" ", "_")  # as the name of a record's file can be
    known = digest(_state_digest(model).encode() + own.code(value))  # the same weights can be in another forward
    return Network(name, model, f"own network, {words}", known)


def _state_digest(model: nn.Module) -> str:
    return digest(b"".join(tensor.numpy().tobytes() for tensor in model.state_dict().values()))


def _exported(folder: Path) -> Network:
    """The network of an export, once each of its files is the one that was written."""
    if folder.is_file():
        raise ParameterError(
            f"{folder} is a file, and weights alone are no network: give path/file.py:function, a function that returns"
            " the network with its weights"
        )
    try:
        record = json.loads(verified(folder, "record.json"))
        verified(folder, "README.md")
        base = record["network"]["name"].removesuffix(FINETUNED)
        if base in STAND_INS or base in PUBLISHED:
            network = _plain(base, folder)
        else:
            sums = (folder / "SHA256SUMS").read_text(encoding="utf-8", errors="replace").split()
            (weights,) = (name for name in sums if name.endswith(f"/{base}.pt"))
            verified(folder, weights)
            dataset, norm, _ = weights.split("/")
            network = _robustbench(base, folder, dataset, norm)
        config, images = record["config"], record["data"]["train"]
        how = f"{config['perturb']}, tau {config['tau']:g}, eta {config['eta']:g}"
        how += f", {images} images, {config['epochs']} epochs"
        source = f"{base}, fine-tuned by this project: {how}, seed {config['seed']}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ParameterError(
            f"{folder} is not an export of this project, or not whole: export it again ({one_line(error)})"
        ) from error
    return replace(network, name=base + FINETUNED, source=source)


def new_network(name: str, seed: int) -> Network:
    """The architecture of a stand-in or of a published network with weights drawn anew, under a name of its own.

    Raises:
        ParameterError: it is neither.
    """
    if name not in STAND_INS and name not in PUBLISHED:
        known = ", ".join([*STAND_INS, *PUBLISHED])
        raise ParameterError(f"from scratch there are the architectures of {known}, not that of {name!r}")
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = new_stand_in(name) if name in STAND_INS else channels_last(PUBLISHED[name].architecture())
    if name in STAND_INS:
        architecture, widths = STAND_INS[name]
        words = "-".join([architecture, *map(str, widths)])
    else:
        words = PUBLISHED[name].architecture.__name__
    return Network(words + FROM_SCRATCH, model.eval(), "from scratch: weights drawn anew", _state_digest(model))


# ---------------------------------------------------------------------------------------------------------------------
# RobustBench
# ---------------------------------------------------------------------------------------------------------------------


def zoo(dataset: str = "cifar10", norm: str = "Linf") -> dict[str, dict[str, Any]]:
    """RobustBench's entries for a data set and a norm, by name; none, where it has no networks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pkg_resources says that it is deprecated
        try:
            import autoattack  # noqa: F401
        except ImportError:  # robustbench imports it by its old name
            import pyautoattack

            sys.modules["autoattack"] = pyautoattack
        from robustbench.model_zoo import model_dicts
        from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel
    return model_dicts[BenchmarkDataset(DATASETS[dataset].robustbench)].get(ThreatModel(norm), {})


def robustbench_files(name: str, models: Path, dataset: str, norm: str) -> dict[Path, str]:
    """The files of a network's weights, each with RobustBench's id of its download.

    One; several for an ensemble; none where timm or torchvision fetches the weights.
    """
    ids = zoo(dataset, norm)[name].get("gdrive_id") or ()
    path = models / weights_file(name, dataset, norm)
    return {path: ids} if isinstance(ids, str) else {Path(f"{path}_m{i}.pt"): one for i, one in enumerate(ids)}


def _robustbench(name: str, models: Path, dataset: str, norm: str) -> Network:
    row = DATASETS[dataset]
    known = PAPER_NETWORKS.get(name, {}) if (dataset, norm) == ("cifar10", "Linf") else {}
    expected = known.get("architecture", f"RobustBench's entry of that name for {row.name} under {norm}")

    def by_hand(file: Path) -> str:
        return f"place the file of RobustBench's model zoo at {file} (expected: the weights of {name}, {expected})"

    path = models / weights_file(name, dataset, norm)
    parts = robustbench_files(name, models, dataset, norm)
    for file, file_id in parts.items():
        if not file.exists():
            _download(file_id, file, by_hand(file))
        check_weights(file, by_hand(file))
    from robustbench.utils import load_model

    try:
        model = load_model(name, model_dir=str(models), dataset=row.robustbench, threat_model=norm)
    except Exception as error:
        raise ParameterError(
            f"the weights of {name} in {path.parent} do not fit its architecture or could not be fetched:"
            f" {by_hand(path)} ({one_line(error)})"
        ) from error
    known_digest = digest(b"".join(file.read_bytes() for file in parts)) if parts else _state_digest(model)
    # Records of the paper's setting were made before there was another one to tell it from.
    source = "RobustBench" if (dataset, norm) == ("cifar10", "Linf") else f"RobustBench, {row.name}, {norm}"
    return Network(name, channels_last(model.float()).eval(), source, known_digest)


def _download(file_id: str, path: Path, by_hand: str) -> None:
    """Into a folder of its own first: no half file ever stands under the final name, and gdown leaves halves behind."""
    from robustbench.utils import download_gdrive_new

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".download-") as folder:
            part = Path(folder) / path.name
            download_gdrive_new(file_id, part)
            check_weights(part, by_hand)
            part.replace(path)
    except ParameterError:
        raise
    except Exception as error:  # no network, no room, a refusal: gdown has an exception for each
        raise ParameterError(f"no weights at {path}, and the download failed: {by_hand} ({one_line(error)})") from error


def check_weights(path: Path, by_hand: str) -> None:
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
