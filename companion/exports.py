"""Exports: a fine-tuned network to take away, in a folder of its own that `load_network` takes for a name."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from companion.cards import model_card
from companion.files import digest, from_root, one_line, try_to_write, write_sums, write_whole
from companion.networks import PUBLISHED, load_network, weights_file, zoo
from companion.records import FinetuneRecord, Record, parse_record, record_bytes, record_stem
from companion.settings import FINETUNED, STAND_INS, ParameterError


def check_export(name: str, folder: str | Path, dataset: str = "cifar10", norm: str = "Linf") -> None:
    """Whether a network fine-tuned from the one of that name can be exported to the folder, before hours of training.

    Raises:
        ParameterError: its weights are not one file, or the folder cannot be written.
    """
    base = name.removesuffix(FINETUNED)
    if base not in STAND_INS and base not in PUBLISHED:
        entry = zoo(dataset, norm).get(base)
        if entry is None:
            raise ParameterError(
                f"{base} is your own network and cannot be exported: leave out the parameter export. For its weights"
                " call wdat_core.finetune yourself, as notebooks/own_network.ipynb does"
            )
        if not isinstance(entry.get("gdrive_id") or None, str):
            raise ParameterError(f"{base} cannot be exported: RobustBench does not keep its weights in one file")
    try:
        try_to_write(from_root(folder))
    except OSError as error:
        raise ParameterError(f"nothing can be exported to {folder}: give another folder ({one_line(error)})") from error


def export(
    model: nn.Module, record: FinetuneRecord, folder: str | Path, dataset: str = "cifar10", norm: str = "Linf"
) -> Path:
    """Write a fine-tuned network into a folder of its own: weights, record, model card and their digests.

    It appears whole or not at all, once it has been read back. Its name ends in the weights' digest, so that nothing is
    overwritten. The weights are NAME.safetensors for a stand-in or a published network. For one of RobustBench they
    are DATASET/NORM/NAME.pt: `robustbench.utils.load_model(NAME, model_dir=..., ...)` takes the folder as its own.

    Args:
        model: as `finetune` left it.
        record: of that run.
        folder: where the export's folder is made; a relative one starts at the repository.
        dataset: as `load_network` had it.
        norm: as `load_network` had it.

    Returns:
        The export's folder, which `load_network` takes for a name.

    Raises:
        ParameterError: the folder cannot be written, or the model is not of the record's architecture.
    """
    base = record.network.name.removesuffix(FINETUNED)
    check_export(base, folder, dataset, norm)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    weights = weights_file(base, dataset, norm)
    files = {weights: _serialised(base, state)}
    known = digest(files[weights])
    path = from_root(folder) / f"{record_stem(record)}-{known[:8]}"
    files["record.json"] = record_bytes(record)
    files["README.md"] = model_card(record, base, weights, known, dataset, norm).encode()
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as part:
            whole = Path(part) / path.name
            for name, content in files.items():
                write_whole(whole / name, content)
            write_sums(whole, list(files))
            back = load_network(str(whole), whole).model.state_dict()
            if back.keys() != state.keys() or not all(torch.equal(back[name], state[name]) for name in state):
                raise ParameterError(f"the model is not what {base} is in {record.network.source}")
            try:
                whole.rename(path)
            except OSError:
                if not path.is_dir():
                    raise
                load_network(str(path), path)  # the same network, if nothing has happened to it since
                path.rename(whole.with_name("former"))  # with the record of a run before
                whole.rename(path)
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
    if base in STAND_INS or base in PUBLISHED:
        from safetensors.torch import save

        return save(state)
    content = io.BytesIO()
    # RobustBench's loader wants this one of its networks as its authors stored it.
    torch.save({"last": state} if base == "Andriushchenko2020Understanding" else state, content)
    return content.getvalue()
