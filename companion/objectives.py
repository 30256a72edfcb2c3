"""A network trained further for one objective or another, all from the same start and at the same number of passes.

    python -m companion.objectives NETWORK... --objective slope --beta 3 --delta 4 --data data
    python -m companion.objectives NETWORK... --objective algorithm1 --gamma 0 1 3 6 --data data
    python -m companion.objectives NETWORK... --scratch --objective trades algorithm1 --tau 0.1 --epochs 30 --data data

The second is the joint objective, eq. 5.6. The third takes of the network its architecture alone: weights drawn anew.

Every record has the distances of the validation and of the test images, from which every accuracy follows: what is
chosen is chosen on the first, what is shown is of the second. The weights are those of the last epoch. Records go to
runs/; with them in results/ the page "Training for the worst case" shows them.
"""

from __future__ import annotations

import copy
import itertools
import os
import shlex
import sys
import time
from dataclasses import replace
from typing import Any

import wdat_core
from companion.bench import Bench, begin, bench, data_words, held, kept_at, measured, network_words
from companion.networks import new_network
from companion.objective_functions import OBJECTIVES
from companion.parts import ObjectiveConfig
from companion.records import record_name
from companion.runs import attacked, found
from companion.settings import ParameterError, Settings
from companion.terminal import arguments_of
from wdat_core import FinetuneConfig, Threat, WdatError

CLIP = 10.0  # of the gradient, for all alike
JOINT = "algorithm1"  # the objective that has a pointwise term
# From scratch the stand-ins' own recipe (assets/make_demo.py), but in float32 and without averaged weights. Upsilon
# comes from the minibatches: a sample of 1,000 images for each 128 would be 8 more passes, and passes are to be equal.
SCRATCH: dict[str, Any] = {
    "perturb": "none",
    "batch_size": 128,
    "schedule": "one_cycle",
    "momentum": 0.9,
    "nesterov": True,
    "weight_decay": 5e-4,
    "upsilon_from": "batch",
}


def train_for(settings: Settings, objective: str, *, gamma: float = 0.0, scratch: bool = False) -> Any:
    """A record of kind "objective": the whole network trained, with the tau and eta of the settings.

    Args:
        objective: a key of `OBJECTIVES`.
        gamma: weight of the pointwise term, eq. 5.6.
        scratch: only the architecture is the network's; the weights are drawn anew from the seed.

    Raises:
        ParameterError: as `bench`; the objective is not known, or has no pointwise term to give a weight to; or there
            is no such architecture.
    """
    if objective not in OBJECTIVES:
        raise ParameterError(f"objective must be one of {', '.join(OBJECTIVES)}, not {objective!r}")
    if gamma and objective != JOINT:
        raise ParameterError(f"gamma is of objective {JOINT} alone, eq. 5.6: {objective!r} has no such term")
    on, how = bench(settings), OBJECTIVES[objective]
    if scratch:
        new = new_network(str(settings.network), settings.seed)
        new.model.to(on.device)
        on = replace(on, network=new)
    shared: dict[str, Any] = {"threat": Threat(how.p, settings.r, settings.delta), "clip": CLIP, "perturb": "whole"}  # type: ignore[arg-type]
    shared |= {
        name: getattr(settings, name) for name in ("tau", "eta", "beta", "steps", "epochs", "batch_size", "seed")
    }
    shared |= ({"gamma": gamma} if gamma else {}) | (SCRATCH if scratch else {})
    shared |= {} if on.loss == "redlr" else {"loss": on.loss}
    how_to_train = FinetuneConfig(objective=how.function, **shared)  # which says what cannot be
    config = ObjectiveConfig(objective=objective, found_steps=int(settings.found_steps or 0), **shared)
    begun = begin("objective", on, ("train", "val", "test"), config)
    if known := held(begun, on):
        return known
    kept = kept_at(begun, on)
    command = _command(settings, objective, gamma, scratch)
    record = measured(begun, on, command, lambda: _trained(on, how_to_train, kept))
    kept.unlink(missing_ok=True)
    return record


def _trained(on: Bench, config: FinetuneConfig, kept: Any) -> dict[str, Any]:
    tuned, start = copy.deepcopy(on.model), time.perf_counter()
    pointwise = f"gamma {config.gamma:g}, " if config.gamma else ""
    show = on.progress(f"beta {config.beta:g}, {pointwise}tau {config.tau:g}, seed {config.seed}")
    history = wdat_core.finetune(
        tuned, on.data.train, None, config, eval_batch_size=on.at_once, resume=kept, progress=show
    )
    trained, steps = time.perf_counter(), int(on.settings.found_steps or 0)
    there = on.with_model(tuned)
    validation = found(there, steps, "val")["boundary"]["distance"]
    return {
        "history": {"epochs": history.epochs, "best": history.best},
        **found(there, steps, "test", **validation),
        "seconds": {
            "train": round(history.seconds, 1),
            "evaluate": round(time.perf_counter() - trained, 1),
            "total": round(time.perf_counter() - start, 1),
        },
    }


def as_it_is(settings: Settings) -> list[Any]:
    """The records of the network before it is trained, of validation and of test images: where every frontier starts.

    Raises:
        ParameterError: as `bench`.
    """
    on, line = bench(settings), _command(settings, "none")
    return [attacked(on, part, line) for part in ("val", "test")]


def _command(settings: Settings, objective: str, gamma: float = 0.0, scratch: bool = False) -> str:
    assert settings.delta is not None
    given: dict[str, Any] = {
        "beta": settings.beta,
        "delta": round(255 * settings.delta, 9),
        "tau": settings.tau,
        "eta": settings.eta,
    }
    given |= {"gamma": gamma} if gamma else {}
    given |= {name.replace("_", "-"): getattr(settings, name) for name in ("seed", *SIZES)}
    network = shlex.quote(network_words(str(settings.network)))
    parts = [*(f"--{name} {value!r}" for name, value in given.items()), *["--scratch"] * scratch]
    parts.append(f"--data {shlex.quote(data_words(settings))}")
    return f"python -m companion.objectives {network} --objective {objective} {' '.join(parts)}"


SIZES = {"train_images": 10_000, "val_images": 2_000, "test_images": 10_000, "epochs": 20, "found_steps": 100}


def main(arguments: list[str]) -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("networks", nargs="+", help="names of networks")
    parser.add_argument("--objective", nargs="+", default=["slope"], help=f"of {', '.join(OBJECTIVES)}; none: as it is")
    parser.add_argument("--beta", nargs="+", type=float, default=[6.0], help="weight of the term that makes it robust")
    parser.add_argument("--gamma", nargs="+", type=float, default=[0.0], help=f"of the pointwise term; {JOINT} alone")
    parser.add_argument("--delta", nargs="+", type=float, default=[8.0], help="radius, in 255ths")
    parser.add_argument("--tau", nargs="+", type=float, default=[0.01])
    parser.add_argument("--eta", nargs="+", type=float, default=[1.0])
    parser.add_argument("--seed", nargs="+", type=int, default=[0])
    parser.add_argument("--scratch", action="store_true", help="the network's architecture, with weights drawn anew")
    for name, value in SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    given = parser.parse_args(arguments)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        sys.exit("objectives: it runs in one process; start several of it for several runs")
    if small := [delta for delta in given.delta if 0 < delta < 0.1]:
        sys.exit(f"objectives: --delta is in 255ths: 4 means 4/255, and {small[0]:g} is next to nothing")
    if given.found_steps < 1:
        sys.exit("objectives: --found-steps must be at least 1: every record has the distances of its images")
    sizes = {name: getattr(given, name) for name in SIZES}
    lists = ("seed", "networks", "objective", "beta", "gamma", "delta", "tau", "eta")
    each = itertools.product(*(getattr(given, name) for name in lists))
    for seed, network, objective, beta, gamma, delta, tau, eta in each:
        one = {"beta": beta, "delta": delta / 255, "tau": tau, "eta": eta, "seed": seed, **sizes}
        try:
            settings = Settings(preset="paper", network=network, data=given.data, models=given.models, **one)
            settings = settings.resolved()
            if objective == "none" and (gamma or given.scratch):
                raise ParameterError('objective "none" is the network as it is: it takes no gamma and no scratch')
            how = {"gamma": gamma, "scratch": given.scratch}
            made = as_it_is(settings) if objective == "none" else [train_for(settings, objective, **how)]
            print(*map(record_name, made), sep="\n", flush=True)
        except (ParameterError, WdatError) as error:
            sys.exit(f"objectives: {error}")
        except KeyboardInterrupt:
            sys.exit("objectives: interrupted: run it again to go on")


if __name__ == "__main__":
    main(sys.argv[1:])
