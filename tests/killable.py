"""Trains small networks in processes that can be killed; run by test_checkpoint.py.

Reads one JSON line after another, {"run": NAME, "resume": FILE, "out": FILE, ...}; each starts a child, whose process
number is printed. The child trains, writes its weights and history to "out" and ends. This process imports torch once
and computes nothing, so that a child starts in milliseconds.
"""

import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
from tiny import INF, images, network

from wdat_core import FinetuneConfig, PretrainConfig, Threat, WdatError, finetune, pretrain

OPTIONS = {"steps": 2, "epochs": 3, "batch_size": 5}
DISTRIBUTIONAL, POINTWISE = Threat(delta=0.05), Threat(p=INF, delta=0.05)

# Every kind of state that a run can have: momentum, a schedule, averages, dropout, batch statistics, random starts.
RUNS = {
    "whole": FinetuneConfig(threat=DISTRIBUTIONAL, **OPTIONS, eta=0.3, momentum=0.9, schedule="cosine"),
    "last layer": FinetuneConfig(threat=DISTRIBUTIONAL, **OPTIONS, perturb="last_layer", tau=0.1),
    "batch": FinetuneConfig(threat=DISTRIBUTIONAL, **OPTIONS, upsilon_from="batch", random_start=0.5, gamma=1.0),
    "train mode": FinetuneConfig(threat=DISTRIBUTIONAL, **OPTIONS, attack_mode="train", first_upsilon="full"),
    "trades": PretrainConfig(threat=POINTWISE, **OPTIONS, average=0.8),
}


class Slow(torch.nn.Module):
    """A network that takes its time, so that a signal comes within a minibatch."""

    def __init__(self, inner, seconds):
        super().__init__()
        self.inner, self.seconds = inner, seconds

    def forward(self, x):
        time.sleep(self.seconds)
        return self.inner(x)


def train(name, resume=None, slow=0.0, **options):
    """The network and the history of a run, which is the same whenever and however often it is called."""
    config = RUNS[name]
    model = network("full")
    data, val = images(14, model), images(9, model, seed=1)
    model = Slow(model, slow)
    run = pretrain if isinstance(config, PretrainConfig) else finetune
    return model, run(model, data, val, config, resume=resume, **options)


def result(model, history):
    """What must be the same; seconds are not."""
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in history.epochs]
    return {"state": model.state_dict(), "rows": rows, "best": history.best, "upsilon": history.upsilon}


def main():
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests run in the background
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
        except KeyboardInterrupt:
            code = 130
        os._exit(code)


if __name__ == "__main__":
    main()
