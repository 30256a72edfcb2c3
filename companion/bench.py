"""What a run works on, and the one way from a run to its record.

Compute or load: a run that runs/ already holds, with the same configuration, network, images, code, versions and
device, is read from there, unless the settings say `fresh`. Every other one is computed, and written when it is done.
"""

from __future__ import annotations

import math
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import wdat_core
from companion import files, own, parameters, processes
from companion.bases import SCHEMA, Begun, Record
from companion.data import Data, load_data
from companion.datasets import DATASETS, is_own
from companion.files import from_root
from companion.machine import core_digest, device_name, hardware, made_on, pick_device, versions
from companion.networks import Network, check_fit, load_network
from companion.records import check_writable, make_record, parse_record, protocol, record_name, subject, write_record
from companion.settings import NOTEBOOKS, PAPER_NETWORKS, PARAMETERS, PRESETS, ParameterError, Settings
from companion.terminal import arguments_of, progress
from wdat_core import Attack, Boundary, Images, Threat, WdatError


@dataclass(frozen=True)
class Bench:
    """What a run works on: the network on its device, the images there, and how it looks at them."""

    settings: Settings
    network: Network
    data: Data
    device: torch.device
    loss: str  # of the distributional attack: ReDLR, which needs three classes

    @property
    def model(self) -> nn.Module:
        return self.network.model

    @property
    def at_once(self) -> int:
        """How many images the network sees at once where that decides nothing; a CPU is faster on smaller batches."""
        return 128 if self.device.type == "cpu" else 1024

    @property
    def how(self) -> dict[str, Any]:
        return {"precision": self.settings.precision, "compiled": self.settings.compiled}

    @property
    def config(self) -> dict[str, Any]:
        """What the configuration of every record of this bench says."""
        return {"threat": self.threat(2.0), **self.how} | ({} if self.loss == "redlr" else {"loss": self.loss})

    def with_model(self, model: nn.Module) -> Bench:
        """The same for another model, such as the network in the middle of its training."""
        return replace(self, network=replace(self.network, model=model))

    def threat(self, p: float) -> Threat:
        return Threat(p=p, r=self.settings.r, delta=self.settings.delta)  # type: ignore[arg-type]

    def attack(self, images: Images, p: float, **options: Any) -> Attack:
        """W-PGD as in the paper's tables; the pointwise one, p = inf, is PGD with CE."""
        usual = {"loss": self.loss if p < math.inf else "ce", "steps": self.settings.steps, "batch_size": self.at_once}
        usual |= {**self.how, "group": processes.group()}
        part = processes.own(images)
        return processes.whole(wdat_core.wpgd(self.model, *part, self.threat(p), **{**usual, **options}))

    def boundary(self, images: Images, *, steps: int, keep: bool = False) -> Boundary:
        """The distances of images to the nearest misclassified ones; with `keep` these too."""
        show = self.progress("worst case")
        how = {"batch_size": self.at_once, "progress": show, **self.how}
        x, y = processes.own(images)
        found = Boundary(x.new_empty(0), self.settings.r, x)
        if len(x):
            found = wdat_core.boundary(self.model, x, y, r=self.settings.r, steps=steps, keep=keep, **how)
        x_adv = processes.gathered(found.x_adv) if keep and found.x_adv is not None else None
        return Boundary(processes.gathered(found.distance), self.settings.r, x_adv)

    def budget(self, images: Images, upsilon: float, show: Any) -> tuple[Tensor, float]:
        """W-PGD-budget for (W_2, l_r): which images stay right, and how far they went all together."""
        (x, y), size = images, int(self.settings.batch_size or 0)
        rows = processes.part(len(y), size)
        how = {"loss": self.loss, "steps": self.settings.steps, "batch_size": size, "progress": show, **self.how}
        own, distance = torch.empty(0, dtype=torch.bool, device=y.device), 0.0
        if len(y[rows]):
            attack = wdat_core.wpgd_budget(self.model, x[rows], y[rows], self.threat(2.0), upsilon=upsilon, **how)
            own, distance = attack.correct, attack.distance
        far = processes.gathered(torch.full((len(own),), distance, dtype=torch.float64))
        return processes.gathered(own), (distance if processes.count() == 1 else float(far.square().mean().sqrt()))

    def sensitivity(self, images: Images) -> float:
        return wdat_core.sensitivity(
            self.model,
            *processes.own(images),
            self.threat(2.0),
            loss=self.loss,
            batch_size=self.at_once,
            group=processes.group(),
            **self.how,
        )

    def progress(self, what: str) -> Any:
        return progress(f"{self.network.name}, {what}") if processes.is_first() else list


def bench(settings: Settings, classes: int = 2) -> Bench:
    """Network, images and device of the settings.

    Args:
        classes: how many the network must have, at least.

    Raises:
        ParameterError: one of them is not there, or the network does not take the images (see `load_network`,
            `load_data`, `check_fit`, `pick_device`), or has fewer classes.
    """
    core_digest()  # of the code that runs, should the file be edited meanwhile
    device = pick_device(settings.device)
    network = load_network(str(settings.network), from_root(settings.models), settings.dataset, settings.norm)
    data = load_data(settings, device)
    check_fit(network, data)
    network.model.to(device)
    with torch.no_grad():
        logits = network.model(torch.full((1, *data.shape), 0.5, device=device))
    if logits.shape[1] < classes:
        raise ParameterError(
            f"this compares attacks by DLR and ReDLR, which need {classes} classes, and {network.name} has"
            f" {logits.shape[1]}: tables 1 to 11 and worst_case take two"
        )
    return Bench(settings, network, data, device, "redlr" if logits.shape[1] > 2 else "margin")


# ---------------------------------------------------------------------------------------------------------------------
# From a run to its record
# ---------------------------------------------------------------------------------------------------------------------


def recorded(begun: Begun, on: Bench, command: str, measure: Callable[[], dict[str, Any]]) -> Record:
    """The finished run in runs/ that this one would repeat; if there is none, what `measure` finds, written there."""
    return held(begun, on) or measured(begun, on, command, measure)


def measured(begun: Begun, on: Bench, command: str, measure: Callable[[], dict[str, Any]]) -> Record:
    """The record of what `measure` finds, written to runs/; its time is the total, unless `measure` says more.

    Raises:
        ParameterError: runs/ cannot be written, which is known before anything is measured.
    """
    if processes.is_first():
        check_writable(files.RUNS)
    begin = time.perf_counter()
    found = measure()
    seconds = {"total": round(time.perf_counter() - begin, 1)}
    known = {name: getattr(begun, name) for name in ("kind", "network", "data", "config")}
    record = make_record({"schema": SCHEMA, **known, "seconds": seconds, **found, **made_on(on.device, command)})
    if processes.is_first():
        write_record(record, files.RUNS)
    return processes.of_first(lambda: record)  # with one time and one date, and not before it is there


def begin(kind: str, on: Bench, parts: Sequence[str], config: Any, **data: int) -> Begun:
    """A run that has not started: its kind, its configuration and the parts of the data that it uses.

    Args:
        data: what else the record says of the data.
    """
    about = subject(on.network, on.data, *parts)
    return Begun(schema=SCHEMA, kind=kind, network=about["network"], data=about["data"] | data, config=config)


def kept_at(begun: Begun, on: Bench, *also: Any) -> Path:
    """Where a training is kept while it runs, for the next call with the same settings, code, versions and device."""
    run = [begun, *also, core_digest(), hardware(device_name(on.device)), versions()]
    return files.RUNS / f"{files.digest(repr(run).encode())[:16]}.checkpoint"


def each_network(
    name: str, doc: str | None, arguments: Sequence[str], test_images: int, each: Callable[[list[Settings]], list[Any]]
) -> None:
    """The command line of a module that makes one record of test images for each network; it prints their names."""
    parser = arguments_of(doc)
    parser.add_argument("networks", nargs="+", help="names of networks")
    parser.add_argument("--test-images", type=int, default=test_images)
    given = parser.parse_args(arguments)
    try:
        for network in given.networks:
            settings = Settings(network=network, data=given.data, models=given.models, test_images=given.test_images)
            print(*map(record_name, each([settings.resolved()])), sep="\n", flush=True)
    except (ParameterError, WdatError) as error:
        sys.exit(f"{name}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{name}: interrupted")


def held(begun: Begun, on: Bench) -> Any:
    """The finished run in runs/ that this one would repeat, or None."""
    return None if on.settings.fresh else processes.of_first(lambda: _held(begun, on))


def _held(begun: Begun, on: Bench) -> Any:
    try:
        record = parse_record((files.RUNS / record_name(begun)).read_bytes())
    except (OSError, ValueError):
        return None
    here = made_on(on.device, record.command)
    alike = all(getattr(record, name) == here[name] for name in ("core", "versions"))
    alike &= hardware(record.device) == hardware(here["device"])
    return record if alike and protocol(record) == protocol(begun) else None


def data_words(settings: Settings) -> str:
    """The images of a run as another machine calls them: in the folder data, or of a user's own file by its name."""
    data = str(settings.data)
    return own.words(data) if is_own(data) else data if data == "embedded" else "data"


def command(settings: Settings, notebook: str, **column: Any) -> str:
    """The papermill line that repeats a record, without the folders of this machine.

    In it the folder of images is data, that of an export exports, and a user's own file has its name alone.

    Args:
        column: the tau and eta of the record, where the notebook takes them.
    """
    defaults = {**Settings().model_dump(), **PRESETS[settings.preset]}
    defaults["delta"] = DATASETS[settings.dataset].delta.get(settings.norm)
    if own_default := parameters.defaults(notebook).get("network"):
        defaults["network"] = own_default
    elif settings.preset == "paper":
        del defaults["network"]  # another one in other notebooks
    words = {"network": network_words(str(settings.network)), "data": data_words(settings)}
    one = {**settings.model_dump(), **words, **column}
    elsewhere = ("device", "models", "stop_after", "export", "fresh")  # of the machine, not of the numbers
    known = [k for k in PARAMETERS[NOTEBOOKS[notebook]] if k not in elsewhere]
    given = {k: one[k] for k in known if k not in defaults or one[k] != defaults[k]}
    return " ".join(
        [
            f"papermill notebooks/{notebook}.ipynb out.ipynb",
            *(
                f"-p {k} {shlex.quote(str(int(v) if isinstance(v, float) and v.is_integer() else v))}"
                for k, v in given.items()
            ),
        ]
    )


def network_words(network: str) -> str:
    """A network as a command in a record has it: an export in the folder exports, a user's file without its folder."""
    if is_own(network):
        return own.words(network)
    return network if Path(network).name == network else f"exports/{own.words(network)}"


def check_clean(on: Bench, clean: float, images: int) -> None:
    """The clean accuracy is the published one, up to what a sample of that many images can differ (4 sigma).

    That is known of the paper's networks, on CIFAR-10: names are used again for other data sets and norms.

    Raises:
        ParameterError: it is not.
    """
    network, settings = on.network, on.settings
    theirs = (settings.dataset, settings.norm) == ("cifar10", "Linf") and not is_own(str(settings.data))
    if network.name not in PAPER_NETWORKS or not theirs:
        return
    published = PAPER_NETWORKS[network.name]["clean"] / 100
    allowed = 0.005 if images == 10_000 else 4 * math.sqrt(published * (1 - published) / images)
    if abs(clean - published) > allowed:
        raise ParameterError(
            f"{network.name} classifies {100 * clean:.2f} % of {images} clean test images correctly, and"
            f" {100 * published:.2f} % is published: these are not its weights, or not its images"
        )
