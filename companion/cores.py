"""Which versions of wdat_core.py give the same numbers, by measurement: results/cores.json.

    python -m companion.cores --data data              repeat the sample with wdat_core.py, and note what came out
    python -m companion.cores --data data --file FILE  the same with another version, such as an older one

The sample: each stand-in attacked on the 10,000 test images, the column of Table 4 of the demo with tau 0.01 and eta 1,
one epoch of each small stand-in on 40,000 training images, and, where a version has them, the distances that `boundary`
finds for each stand-in and two short epochs of `worst_case`. What two versions both can do is compared. On one machine
they are the same where every bit is; on two machines, where no accuracy is further apart than 0.05 points. It takes
about ten minutes on one core.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.util
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from companion import files
from companion.checked import ParameterError
from companion.files import digest, write_whole

CORES = files.RESULTS / "cores.json"
WORST_CASE = "small_trades, worst case"  # a part of the sample
WITHIN = 0.0005  # of an accuracy as a fraction, between machines


@functools.cache
def is_current(core: str, worst_case: bool = False) -> bool:
    """Whether the code that made a record, by the digest in the record, gives the numbers of the present code.

    Also by way of others, to the bit: two versions may have been compared on one machine, and one of them with a third
    on another. The last step may be one between machines; tolerances do not add up. The part of the sample that is
    trained for the worst case counts for records that are, `worst_case`.
    """
    from wdat_core import code_digest

    entries, same = _entries() if worst_case else [_without_worst_case(e) for e in _entries()], {code_digest()}

    def joins(core: str) -> bool:  # alike to one of them to the bit, and seen to differ from none
        pairs = [(a, b) for a in entries for b in entries if a["core"] == core and b["core"] in same]
        return any(_same_bits(*pair) for pair in pairs) and not any(_other_bits(*pair) for pair in pairs)

    while more := {e["core"] for e in entries if e["core"] not in same and joins(e["core"])}:
        same |= more
    here = [e for e in entries if e["core"] in same]
    there = [e for e in entries if e["core"] in same or any(gives_the_same(e, one) for one in here)]
    there = [e for e in there if not any(_other_bits(e, one) for one in here)]
    return core in same or any(core in (e["core"], e["file"]) for e in there)


def _without_worst_case(entry: dict[str, Any]) -> dict[str, Any]:
    return entry | {"sample": {name: part for name, part in entry["sample"].items() if name != WORST_CASE}}


def gives_the_same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two entries of cores.json are of code that gives the same numbers."""
    if _on_one_machine(one, other):
        return _same_bits(one, other)
    pairs = _pairs(one, other)
    accuracies = [(a["accuracy"][m], b["accuracy"][m]) for a, b in pairs for m in a["accuracy"]]
    return bool(pairs) and all(abs(a - b) <= WITHIN for a, b in accuracies)


def _same_bits(one: dict[str, Any], other: dict[str, Any]) -> bool:
    pairs = _pairs(one, other)
    return _on_one_machine(one, other) and bool(pairs) and all(a["bits"] == b["bits"] for a, b in pairs)


def _other_bits(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether they were seen to differ; of an entry that has fewer parts another may be alike to both."""
    return _on_one_machine(one, other) and any(a["bits"] != b["bits"] for a, b in _pairs(one, other))


def _on_one_machine(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one.get(key) == other.get(key) for key in ("device", "processor", "versions"))


def _pairs(one: dict[str, Any], other: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The parts of the sample that both have."""
    return [(part, other["sample"][name]) for name, part in one["sample"].items() if name in other["sample"]]


def _entries() -> list[dict[str, Any]]:
    return json.loads(CORES.read_text(encoding="utf-8")) if CORES.exists() else []


# ---------------------------------------------------------------------------------------------------------------------
# The sample
# ---------------------------------------------------------------------------------------------------------------------


def sample(core: Any, data: Path) -> dict[str, Any]:
    """What some version of wdat_core, as a module, gives: for each part accuracies, and the digest of every bit."""
    import torch

    from companion.data import cifar, embedded, floats
    from companion.networks import load_network

    def images(train: bool) -> tuple[Any, Any]:
        x, y = cifar(data, train)
        return floats(x), y

    def network(name: str) -> Any:
        return load_network(name, Path()).model

    def attacked(model: Any, test: Any) -> dict[str, Any]:
        scores = core.evaluate(model, *test, batch_size=128)
        accuracy = {m: getattr(scores, m) for m in ("clean", "w_inf", "w_2")}
        return {"accuracy": accuracy, "bits": _bits(*(scores.correct[m] for m in accuracy))}

    def found_by_boundary(model: Any, test: Any) -> dict[str, Any]:
        found = core.boundary(model, *test, keep=False, batch_size=128)
        threats = {f"p {p:g}": core.Threat(p=p) for p in (1, 2, math.inf)}
        accuracy = {name: found.accuracy(threat) for name, threat in threats.items()}
        return {"accuracy": accuracy, "bits": _bits(found.distance)}

    def trained(name: str, train: Any, val: Any, test: Any, epochs: int) -> dict[str, Any]:
        model = network(name)
        config = core.FinetuneConfig(perturb="whole", tau=0.01, eta=1.0, batch_size=512, epochs=epochs)
        history = core.finetune(model, train, val, config, eval_batch_size=128)
        found = attacked(model, test)
        upsilon = torch.tensor(history.upsilon, dtype=torch.float64)
        return found | {"bits": _bits(*model.state_dict().values(), upsilon, found["bits"])}

    def trained_for_the_worst_case() -> dict[str, Any]:
        model, (train, _, test) = network("small_trades"), column
        fields = {"objective": "worst_case", "beta": 3.0, "clip": 10.0, "threat": core.Threat(delta=4 / 255)}
        history = core.finetune(model, train, None, core.FinetuneConfig(epochs=2, **fields), eval_batch_size=128)
        found = found_by_boundary(model, test)
        losses = torch.tensor([row["loss"] for row in history.epochs], dtype=torch.float64)
        return found | {"bits": _bits(*model.state_dict().values(), losses, found["bits"])}

    def few(part: str, count: int) -> tuple[Any, Any]:
        x, y = embedded(part)
        return floats(x[:count]), y[:count]

    x, y = images(train=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:40_000]
    train, test = (x[order], y[order]), images(train=False)
    column = (few("train", 2000), few("val", 500), few("test", 1000))
    parts = {"demo, Table 4": lambda: trained("demo", *column, epochs=4)}
    for name in ("small_trades", "small_pgd"):
        parts[f"{name}, one epoch"] = lambda name=name: trained(name, train, None, test, epochs=1)  # type: ignore[misc]
    for name in ("demo", "small_trades", "small_pgd"):
        parts[f"{name}, attacked"] = lambda name=name: attacked(network(name), test)  # type: ignore[misc]
    for name in ("demo", "small_trades", "small_pgd") if hasattr(core, "boundary") else ():
        parts[f"{name}, distances"] = lambda name=name: found_by_boundary(network(name), test)  # type: ignore[misc]
    if hasattr(core, "worst_case"):
        parts[WORST_CASE] = trained_for_the_worst_case
    found = {}
    for name, part in parts.items():
        begin = time.perf_counter()
        found[name] = part()
        print(f"{name}: {time.perf_counter() - begin:.0f} s", flush=True)
    return found


def _bits(*parts: Any) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(part.encode() if isinstance(part, str) else part.cpu().contiguous().numpy().tobytes())
    return total.hexdigest()


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=files.ROOT / "data", help="folder of CIFAR-10")
    parser.add_argument("--file", type=Path, default=files.ROOT / "wdat_core.py", help="the version of wdat_core.py")
    given = parser.parse_args(arguments)
    try:
        _note(given.file, given.data)
    except (ParameterError, OSError) as error:
        sys.exit(f"cores: {error}")


def _note(file: Path, data: Path) -> None:
    import torch

    import wdat_core
    from companion.machine import made_on, processor

    torch.set_num_threads(1)
    content = file.read_bytes().replace(b"\r\n", b"\n")
    core = _load(file)
    entry = {
        **made_on(torch.device("cpu"), f"python -m companion.cores --file {file.name}"),
        "processor": processor(),
        "core": wdat_core.code_digest(file),
        "file": digest(content),
    }
    entry["sample"] = sample(core, data)
    same = ("core", "device", "processor")
    others = [e for e in _entries() if any(e.get(key) != entry[key] for key in same)]
    write_whole(CORES, (json.dumps([*others, entry], indent=1) + "\n").encode())
    alike = [e["core"][:8] for e in others if gives_the_same(_without_worst_case(e), _without_worst_case(entry))]
    print(f"{entry['core'][:8]} gives the same numbers as {', '.join(alike) or 'no other core here'}")
    if other := [e["core"][:8] for e in others if e["core"][:8] in alike and not gives_the_same(e, entry)]:
        print(f"but not where it is trained for the worst case: {', '.join(other)}")


def _load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("wdat_core_of_the_sample", path)
    if spec is None or spec.loader is None:
        raise ParameterError(f"{path} is not a file of Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for it there
    spec.loader.exec_module(module)
    if missing := [name for name in ("FinetuneConfig", "evaluate", "finetune") if not hasattr(module, name)]:
        raise ParameterError(f"{path} is no version of wdat_core.py: it has no {missing[0]}")
    return module


if __name__ == "__main__":
    main(sys.argv[1:])
