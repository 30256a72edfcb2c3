"""Trains small networks in processes that can be killed; run by test_checkpoint.py.

Reads one JSON line after another, {"run": NAME, "resume": FILE, "out": FILE, ...}; each starts a child, whose process
number is printed. The child trains, writes its weights and history to "out" and ends. This process imports torch once
and computes nothing, so that a child starts in milliseconds.
"""

import importlib
import json
import os
import sys
from pathlib import Path

import torch
from tiny import FROM_SCRATCH, images, network
from torch.nn.functional import cross_entropy

from wdat_core import FinetuneConfig, Threat, WdatError, finetune


def remembering(batch):
    """An objective that pulls the logits towards their mean over the minibatches before, by a random number.

    It remembers tensors of several shapes: the last minibatch of an epoch is smaller.
    """
    means, draws = batch.memory.setdefault("means", []), batch.memory.setdefault("draws", [])
    draws.append(torch.rand(len(batch.x), generator=batch.generator))
    logits = batch.net(batch.attack(Threat(delta=0.05), "ce"))
    means.append(logits.detach().mean(0))
    del means[:-4]
    return cross_entropy(logits, batch.y) + draws[-1][0] * (logits - torch.stack(means).mean(0)).square().mean()


OPTIONS = {"threat": Threat(delta=0.05), "steps": 2, "epochs": 3, "batch_size": 5}

# Every kind of state that a run can have: momentum, a schedule, averages, dropout, batch statistics, random starts and
# what an objective remembers.
RUNS = {
    "whole": FinetuneConfig(**OPTIONS, eta=0.3, momentum=0.9, schedule="cosine"),
    "last layer": FinetuneConfig(**OPTIONS, perturb="last_layer", tau=0.1),
    "batch": FinetuneConfig(**OPTIONS, upsilon_from="batch", random_start=0.5, gamma=1.0),
    "train mode": FinetuneConfig(**OPTIONS, attack_mode="train", first_upsilon="full"),
    "trades": FinetuneConfig(**(OPTIONS | FROM_SCRATCH), objective="trades", average=0.8),
    "remembering": FinetuneConfig(**OPTIONS, objective=remembering),
}


def train(name, resume=None, **options):
    """The network and the history of a run, which is the same whenever and however often it is called."""
    model = network("full")
    data, val = images(14, model), images(9, model, seed=1)
    return model, finetune(model, data, val, RUNS[name], resume=resume, **options)


def result(model, history):
    """What must be the same; seconds are not."""
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in history.epochs]
    return {"state": model.state_dict(), "rows": rows, "best": history.best, "upsilon": history.upsilon}


def main():
    torch.set_num_threads(1)
    importlib.import_module("torch._dynamo")  # an optimiser would, in every child anew, for seconds
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child:
            print(child, flush=True)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
            continue
        out, limit = order.pop("out"), order.pop("largest_file", None)
        if limit:
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        code = 0
        try:
            torch.save(result(*train(order.pop("run"), **order)), out + ".part")
            Path(out + ".part").replace(out)  # a child killed while it writes has not finished
        except WdatError as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            code = 3
        os._exit(code)


if __name__ == "__main__":
    main()
