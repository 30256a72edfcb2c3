"""What tests/test_processes.py runs in each of several processes: python spread.py TASKS.pickle"""

import pickle
import sys
from pathlib import Path

import torch.distributed as dist
from tiny import images, network
from torch import nn

from wdat_core import FinetuneConfig, Threat, WdatError, boundary, evaluate, finetune, sensitivity, wpgd


def shard(x, ends, rank):
    """The part of a process: from one end to the next."""
    return x[ends[rank] : ends[rank + 1]]


def task(n=23, kind="smooth"):
    model = network(kind)
    for module in model:  # its masks are of a process's own share
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model, *images(n, model, low=0.1, high=0.9)


def attacks(group, ends, threats):
    model, x, y = task()
    own = [shard(tensor, ends, dist.get_rank(group)) for tensor in (x, y)]
    found = []
    for threat, loss in threats:
        attack = wpgd(model, *own, threat, loss=loss, steps=6, step_ratio=2.0, batch_size=4, group=group)
        found.append((attack, sensitivity(model, *own, threat, loss=loss, group=group)))
    return found


def scores(group, ends):
    model, x, y = task()
    own = [shard(tensor, ends, dist.get_rank(group)) for tensor in (x, y)]
    return evaluate(model, *own, delta=0.05, steps=4, found_steps=8, group=group)


def distances(group, ends):
    model, x, y = task()
    own = [shard(tensor, ends, dist.get_rank(group)) for tensor in (x, y)]
    return boundary(model, *own, steps=8).gather(group)


def training(group, fields, kind, checkpoint=None, stop_after=None):
    model, x, y = task(40, kind)
    config = FinetuneConfig(**fields)
    val = (x[:11], y[:11])
    how = {"resume": checkpoint, "stop_after": stop_after, "save_every": 0.0} if checkpoint else {}
    history = finetune(model, (x, y), val, config, group=group, **how)
    return model.state_dict(), history


def training_that_dies(group, fields, kind, checkpoint, rank):
    """One process ends as by SIGKILL in the second epoch."""
    import os
    import signal

    def on_epoch(epoch, model):
        if epoch == 2 and dist.get_rank(group) == rank:
            os.kill(os.getpid(), signal.SIGKILL)

    model, x, y = task(40, kind)
    finetune(model, (x, y), None, FinetuneConfig(**fields), group=group, resume=checkpoint, on_epoch=on_epoch)


def other_settings(group, what):
    model, x, y = task()
    second = dist.get_rank(group) == 1
    if what == "steps":
        return wpgd(model, x, y, Threat(), steps=2 + second, group=group)
    if what == "labels":
        return wpgd(model, x, y + 9 * second, Threat(), steps=2, group=group)
    if what == "images":
        return finetune(model, (x[second:], y[second:]), None, FinetuneConfig(epochs=1), group=group)
    if what == "seed":
        return finetune(model, (x, y), None, FinetuneConfig(epochs=1, seed=int(second)), group=group)
    assert what == "few"
    return finetune(model, (x[:9], y[:9]), None, FinetuneConfig(epochs=1, batch_size=8), group=group)


def records(group, item, given, folder):
    """The records that the command makes, in a folder of their own."""
    from companion import files, items
    from companion.records import record_name

    files.RUNS = Path(folder)
    made = items.compute(item, items.checked(item, given))
    return [(record_name(record), record.stored()) for record in made]


def done(name, given):
    try:
        return globals()[name](dist.group.WORLD, *given)
    except WdatError as error:
        return str(error)


if __name__ == "__main__":
    path = Path(sys.argv[1])
    dist.init_process_group("gloo")
    results = [done(name, given) for name, given in pickle.loads(path.read_bytes())]
    path.with_name(f"{path.name}.{dist.get_rank()}").write_bytes(pickle.dumps(results))
    if any("another process of the group has ended" in str(result) for result in results):
        sys.exit(" ".join(filter(None, map(str, results))))
    dist.barrier()
    dist.destroy_process_group()
