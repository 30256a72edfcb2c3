"""W-PGD on a set larger than memory: what is as large as the images lies in files, and nothing else changes."""

import errno
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from tiny import INF, images, network

from wdat_core import Threat, WdatError, evaluate, wpgd


def momentum(gradient, before):
    return before + gradient / gradient.abs().sum((1, 2, 3), keepdim=True).clamp(min=1e-12)


def plain(x):
    return x.clone()


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("laid_out", [plain, channels_last])
@pytest.mark.parametrize("options", [{}, {"loss": "ce", "rule": momentum}, {"loss": "ce", "random_start": 0.7}])
@pytest.mark.parametrize("threat", [Threat(2, INF, 0.1), Threat(2, 2.0, 0.3), Threat(INF, INF, 0.1)])
def test_the_attack_is_the_same_to_the_bit_and_leaves_no_file(threat, options, laid_out, tmp_path):
    model = network("conv")
    x, y = images(23, model)
    x = laid_out(x)
    here = wpgd(model, x, y, threat, steps=6, step_ratio=2.0, batch_size=5, **options)
    there = wpgd(model, x, y, threat, steps=6, step_ratio=2.0, batch_size=5, folder=tmp_path, **options)
    assert torch.equal(here.x_adv, there.x_adv) and torch.equal(here.correct, there.correct)
    assert (here.accuracy, here.loss, here.distance, here.history) == (
        there.accuracy,
        there.loss,
        there.distance,
        there.history,
    )
    assert not [*tmp_path.iterdir()]
    there.x_adv.add_(1)  # it is an ordinary tensor
    assert not torch.equal(here.x_adv, there.x_adv)


def test_images_in_a_file_are_attacked_and_not_changed(tmp_path):
    model = network("conv", dtype=torch.float32)
    x, y = images(23, model, dtype=torch.float32)
    file = tmp_path / "images"
    file.write_bytes(x.numpy().tobytes())
    mapped = torch.from_file(str(file), shared=True, size=x.numel()).view(x.shape)
    attack = wpgd(model, mapped, y, Threat(delta=0.1), steps=5, folder=tmp_path)
    assert torch.equal(attack.x_adv, wpgd(model, x, y, Threat(delta=0.1), steps=5).x_adv)
    assert file.read_bytes() == x.numpy().tobytes()
    assert [*tmp_path.iterdir()] == [file]


def test_all_accuracies_are_measured_so(tmp_path):
    model = network("conv", dtype=torch.float32)
    x, y = images(23, model, dtype=torch.float32)
    here, there = (evaluate(model, x, y, steps=3, found_steps=4, folder=folder) for folder in (None, tmp_path))
    assert repr(here) == repr(there)
    assert all(torch.equal(here.correct[name], there.correct[name]) for name in here.correct)


@pytest.mark.parametrize("folder", ["not/there", 3, True, __file__, ""])
def test_a_folder_that_is_none_is_named(folder):
    model = network("conv")
    with pytest.raises(WdatError, match="folder must be a folder that is there, not"):
        wpgd(model, *images(6, model), Threat(), folder=folder)


@pytest.mark.parametrize("bad", [lambda x: x.to_sparse(), lambda x: x.to("meta"), lambda x: x.tolist()])
def test_images_that_are_none_are_named_with_a_folder_too(bad, tmp_path):
    model = network("conv")
    x, y = images(6, model)
    with pytest.raises(WdatError, match=r"images must be a (dense|floating-point) tensor"):
        wpgd(model, bad(x), y, Threat(), folder=tmp_path)


def test_too_small_a_disk_is_named_before_the_attack(tmp_path, monkeypatch):
    model = network("conv")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=10))
    with pytest.raises(WdatError, match=r"has no room for twice the images, 1.73e-06 GB"):
        wpgd(model, *images(6, model), Threat(), folder=tmp_path)


def test_an_inference_tensor_is_attacked_as_any_other(tmp_path):
    model = network("conv")
    x, y = images(9, model)
    with torch.inference_mode():
        inside = x.clone()
    attack = wpgd(model, inside, y, Threat(delta=0.1), steps=3, folder=tmp_path)
    assert torch.equal(attack.x_adv, wpgd(model, x, y, Threat(delta=0.1), steps=3).x_adv)
    assert not attack.x_adv.is_inference()


def test_a_full_disk_is_named_before_it_can_kill_the_process(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    model = network("conv")
    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(WdatError, match=r"folder .* has no room for .* GB, or cannot be written: .*No space left"):
        wpgd(model, *images(6, model), Threat(), folder=tmp_path)
    assert not [*tmp_path.iterdir()]


MEASURE = """
import sys, torch
from pathlib import Path
from wdat_core import Threat, wpgd

def private():  # what the process holds that is in no file, in bytes
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])

torch.set_num_threads(1)
n = 20_000
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10)).eval()
x = torch.from_file(sys.argv[1] + "/x", shared=True, size=n * 3072).view(n, 3, 32, 32)
x.uniform_(generator=torch.Generator().manual_seed(0))
y = torch.arange(n) % 10
if sys.argv[3] == "permuted":
    x = x.view(n, 32, 32, 3).permute(0, 3, 1, 2)
wpgd(model, x[:64], y[:64], Threat(), steps=2, loss="ce")  # few: what it frees is taken again, and not seen
most, before = 0, private()

def watched(steps):
    global most
    for step in steps:
        yield step
        most = max(most, private())

how = {"steps": 3, "step_ratio": 2.0, "loss": "ce", "batch_size": 64}
wpgd(model, x, y, Threat(), **how, progress=watched, folder=sys.argv[2] or None)
most = max(most, private())
print((most - before) / (x.numel() * 4))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux says how much memory is in no file")
def test_memory_that_is_in_no_file_stays_far_below_the_images(tmp_path):
    def times_the_images(folder, layout="plain"):
        script = [sys.executable, "-c", MEASURE, str(tmp_path), str(folder), layout]
        done = subprocess.run(script, capture_output=True, text=True, check=True)
        return float(done.stdout)

    assert times_the_images("") > 1.9  # the attack and its best iterate
    assert times_the_images(tmp_path) < 0.1
    assert times_the_images(tmp_path, "permuted") < 0.1
