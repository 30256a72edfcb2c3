"""What tests/test_processes.py runs in each of several processes: python spread.py TASKS.pickle"""

import pickle
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tiny import images, network
from torch import nn

from wdat_core import (
    FinetuneConfig,
    Threat,
    WdatError,
    boundary,
    evaluate,
    finetune,
    sensitivity,
    worst_case,
    wpgd,
)


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


def noisy_training(group, checkpoint=None):
    """A network that draws random numbers, in minibatches that cannot be shared equally; stopped after each of them."""
    model, x, y = task(10, "full")
    for module in model:
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    config = FinetuneConfig(
        threat=Threat(delta=0.1), steps=1, epochs=2, batch_size=5, update_mode="train", augment=False
    )
    finished, start = False, {name: value.clone() for name, value in model.state_dict().items()}
    while not finished:
        model.load_state_dict(start)
        how = {"resume": checkpoint, "stop_after": 0} if checkpoint else {}
        finished = finetune(model, (x, y), None, config, group=group, **how).finished
    return dict(model.named_parameters())


def mixed(group):
    """A network with parameters of two types."""
    model, x, y = task(12)
    model.register_parameter("scale", nn.Parameter(torch.ones((), dtype=torch.float32)))
    model.register_forward_hook(lambda module, _, logits: logits * module.scale)
    finetune(model, (x, y), None, FinetuneConfig(augment=False, epochs=1, steps=1, batch_size=12), group=group)
    return {name: value.detach() for name, value in model.named_parameters()}


class Experts(nn.Module):
    """Two experts: one for dark images, one for bright ones."""

    def __init__(self):
        super().__init__()
        self.dark, self.bright = (network("linear", seed=seed) for seed in (1, 2))

    def forward(self, x):
        bright = x.flatten(1).mean(1) > 0.5
        if bright.all() or not bright.any():  # the other one gets no gradient then
            return (self.bright if bright.any() else self.dark)(x)
        return torch.where(bright[:, None], self.bright(x), self.dark(x))


def experts(group):
    """Minibatches of two images: in a process with one of them an expert may have no gradient."""
    model, x, y = task(12)
    x = torch.cat([0.45 * x[:6], 0.5 + 0.45 * x[6:]])
    model = Experts()
    config = FinetuneConfig(perturb="none", augment=False, objective=cross_entropy, epochs=2, batch_size=2, tau=0.1)
    finetune(model, (x, y), None, config, group=group)
    return model.state_dict()


def cross_entropy(batch):
    return torch.nn.functional.cross_entropy(batch.net(batch.x), batch.y)


def masked(group):
    """A network with a buffer that must not be added up."""
    model, x, y = task(12)
    model[0].register_buffer("mask", torch.tensor([0.0, torch.finfo(torch.float64).min, 0.1], dtype=torch.float64))
    finetune(model, (x, y), None, FinetuneConfig(augment=False, epochs=1, steps=1, batch_size=12), group=group)
    return model[0].mask


def sixteen_bits(group, ends):
    model = network("smooth", dtype=torch.bfloat16)
    x, y = images(3001, model, dtype=torch.bfloat16)
    rank = dist.get_rank(group) if group else 0
    attack = wpgd(model, shard(x, ends, rank), shard(y, ends, rank), Threat(delta=0.2), steps=2, group=group)
    return attack.accuracy, attack.loss


def other_settings(group, what, folder):
    model, x, y = task()
    second = dist.get_rank(group) == 1
    quick = {"epochs": 1, "steps": 1, "augment": False, "batch_size": 8}

    def trained(*images, **how):
        fields = quick | how.pop("fields", {})
        return finetune(model, images or (x, y), None, FinetuneConfig(**fields), group=group, **how)

    calls = {
        "steps": lambda: wpgd(model, x, y, Threat(), steps=2 + second, group=group),
        "labels": lambda: wpgd(model, x, y + 9 * second, Threat(), steps=2, group=group),
        "start": lambda: wpgd(model, x, y, Threat(), steps=2, random_start=0.5 * second, group=group),
        "random seed": lambda: wpgd(model, x, y, Threat(), steps=2, seed=-int(second), group=group),
        "shape": lambda: wpgd(model, x[:, :, : 3 - second], y, Threat(), steps=2, group=group),
        "network": lambda: wpgd(network("smooth", seed=int(second)), x, y, Threat(), steps=2, group=group),
        "nothing": lambda: wpgd(model, x[:0], y[:0], Threat(), steps=2, group=group),
        "found_steps": lambda: evaluate(model, x, y, steps=2, found_steps=4 * second, group=group),
        "negative": lambda: evaluate(model, x[: 9 * second], y[: 9 * second], steps=2, found_steps=-3, group=group),
        "gather": lambda: boundary(model, x, y, r=2.0 + second, steps=2).gather(group),
        "images": lambda: trained(x[second:], y[second:]),
        "seed": lambda: trained(fields={"seed": int(second)}),
        "few": lambda: trained(x[:9], y[:9]),
        "checkpoint": lambda: trained(resume=f"{folder}/{'other' if second else 'one'}.ckpt"),
        "no checkpoint": lambda: trained(resume=None if second else f"{folder}/one.ckpt"),
        "folder": lambda: trained(resume=f"{folder}/file/run.ckpt"),
        "epoch": lambda: trained(on_epoch=lambda epoch, model: 3 if second else None),
        "statistics": lambda: finetune(
            flat(), (x[:12], y[:12]), None,
            FinetuneConfig(**quick | {"attack_mode": "train", "sample": 0.1, "batch_size": 6}), group=group,
        ),
        "not finite": lambda: trained(fields={"objective": nan_in_the_second}),
    }  # fmt: skip
    return calls[what]()


def flat():
    """A network whose BatchNorm has one value an image and channel."""
    return nn.Sequential(nn.Flatten(), nn.Linear(18, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4)).double()


def nan_in_the_second(batch):
    """`worst_case`, on a network that answers with NaN in the second process, so that only there it is seen."""
    if dist.get_rank() == 1:
        with torch.no_grad():
            next(batch._run.model.parameters()).fill_(torch.nan)
    return worst_case(batch)


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
    if any("another process of the group does not" in str(result) for result in results):
        sys.exit(" ".join(filter(None, map(str, results))))
    dist.barrier()
    dist.destroy_process_group()
