"""Downloads that break off, from a server on this machine: nothing half-done stays, and the next try starts anew."""

import hashlib
import http.server
import io
import pickle
import subprocess
import sys
import tarfile
import threading
import time

import numpy as np
import pytest
import torch
import torchvision.datasets

from companion import data, files, networks
from companion.settings import ParameterError, Settings

NAME = "Zhang2019Theoretically"


class Server(http.server.ThreadingHTTPServer):
    """Serves `content` at any address, as `way` says: whole, cut after half, short (half, no length given), stalled."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.content, self.way = b"", "whole"
        self.closing = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"


class Answer(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        content, way = self.server.content, self.server.way
        self.send_response(200)
        self.send_header("Content-Type", "application/octet-stream")
        if way != "short":
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content if way == "whole" else content[: len(content) // 2])
        self.wfile.flush()
        if way == "stalled":
            self.server.closing.wait()

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()


def found_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# ---------------------------------------------------------------------------------------------------------------------
# Weights of RobustBench, which come through gdown
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def zoo(server, monkeypatch):
    """RobustBench's own loader and gdown's own download; the drive is the server, the network small."""
    entries = networks.zoo()
    import gdown

    def new_model():
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10))

    download = gdown.download
    monkeypatch.setattr(gdown, "download", lambda id, output: download(f"{server.url}/{id}", output, quiet=True))
    monkeypatch.setitem(entries, NAME, {"model": new_model, "gdrive_id": "x"})
    state, stored = new_model().state_dict(), io.BytesIO()
    torch.save(state, stored)
    server.content = stored.getvalue()
    return state


def load(folder):
    return networks.load_network(NAME, folder)


@pytest.mark.parametrize("way", ["cut", "short"])
def test_interrupted_weights_leave_nothing_and_start_anew(zoo, server, tmp_path, way):
    server.way = way
    with pytest.raises(ParameterError, match=r"Zhang2019Theoretically.pt.*place the file .*WRN-34-10") as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value) and not found_in(tmp_path)
    server.way = "whole"
    network = load(tmp_path)
    assert torch.equal(network.model.state_dict()["1.weight"], zoo["1.weight"])
    assert network.digest == hashlib.sha256(server.content).hexdigest()
    assert found_in(tmp_path) == [f"cifar10/Linf/{NAME}.pt"]


def test_ensemble_is_checked_member_by_member(zoo, server, tmp_path, monkeypatch):
    """All but what failed is kept, and is not fetched again."""
    entry = {"model": networks.zoo()[NAME]["model"], "gdrive_id": ["a", "b"]}
    monkeypatch.setitem(networks.zoo(), NAME, entry)
    download = networks._download

    def fail_at_b(file_id, *arguments):
        server.way = "cut" if file_id == "b" else "whole"
        download(file_id, *arguments)

    monkeypatch.setattr(networks, "_download", fail_at_b)
    with pytest.raises(ParameterError, match=r"no weights at .*_m1.pt, and the download failed"):
        load(tmp_path)
    assert found_in(tmp_path) == [f"cifar10/Linf/{NAME}.pt_m0.pt"]


def test_every_flipped_byte_of_weights_is_named(zoo, server, tmp_path):
    """torch.load itself takes a file with a wrong number in it."""
    path = tmp_path / "cifar10" / "Linf" / f"{NAME}.pt"
    path.parent.mkdir(parents=True)
    noticed = 0
    for at in range(0, len(server.content), 1009):
        content = bytearray(server.content)
        content[at] ^= 1
        path.write_bytes(content)
        try:
            state = load(tmp_path).model.state_dict()
        except ParameterError as error:
            assert f"{NAME}.pt" in str(error)
            noticed += 1
        else:  # between the numbers: padding of the archive
            assert all(torch.equal(state[key], zoo[key]) for key in zoo)
    assert noticed > 100


# ---------------------------------------------------------------------------------------------------------------------
# CIFAR-10 and CIFAR-100, which come through torchvision
# ---------------------------------------------------------------------------------------------------------------------


class Small:
    """Torchvision's own class for a data set, which looks for an archive of 24 images in all."""

    def __init__(self, dataset, labels, batches, meta):
        self.dataset, self.name = dataset, data.DATASETS[dataset].name
        self.kind = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[dataset]
        self.contents = {}
        for seed, (name, n) in enumerate(batches.items()):
            pixels = np.random.default_rng(seed).integers(0, 256, (n, 3072), dtype=np.uint8)
            self.contents[name] = pickle.dumps({"data": pixels, labels: [i % 4 for i in range(n)]})
        self.contents[meta] = pickle.dumps({self.kind.meta["key"]: list("abcd")})
        self.files = [f"{self.kind.base_folder}/{name}" for name in sorted(self.contents)]
        stored = io.BytesIO()
        with tarfile.open(fileobj=stored, mode="w:gz") as tar:
            for name, content in self.contents.items():
                member = tarfile.TarInfo(f"{self.kind.base_folder}/{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        self.archive = stored.getvalue()

    def expect(self, monkeypatch, url):
        """Make torchvision look for these files at that address."""
        md5 = {name: hashlib.md5(content).hexdigest() for name, content in self.contents.items()}
        *train, test, meta = md5
        small = {
            "url": f"{url}/{self.kind.filename}",
            "tgz_md5": hashlib.md5(self.archive).hexdigest(),
            "train_list": [[name, md5[name]] for name in train],
            "test_list": [[test, md5[test]]],
            "meta": {**self.kind.meta, "md5": md5[meta]},
        }
        for name, value in small.items():
            monkeypatch.setattr(self.kind, name, value)

    def load(self, folder, train=True):
        return data.cifar(folder, train, self.dataset)


SMALL = {
    "cifar10": ("labels", {f"data_batch_{i}": 4 for i in range(1, 6)} | {"test_batch": 4}, "batches.meta"),
    "cifar100": ("fine_labels", {"train": 20, "test": 4}, "meta"),
}


@pytest.fixture(params=SMALL)
def small(request, server, monkeypatch):
    small = Small(request.param, *SMALL[request.param])
    server.content = small.archive
    small.expect(monkeypatch, server.url)
    return small


@pytest.mark.parametrize("way", ["cut", "short"])
def test_interrupted_cifar_leaves_nothing_and_starts_anew(small, server, tmp_path, way):
    server.way = way
    with pytest.raises(ParameterError, match=rf"{small.name} is not in .*place {small.kind.filename}") as caught:
        small.load(tmp_path)
    assert "\n" not in str(caught.value) and not found_in(tmp_path)
    server.way = "whole"
    assert len(small.load(tmp_path)[1]) == 20
    server.way = "cut"  # all is there: nothing is fetched
    assert len(small.load(tmp_path, train=False)[1]) == 4
    assert found_in(tmp_path) == small.files


@pytest.mark.parametrize("damage", [lambda content: content[:100], lambda content: content[:-1] + b"\0", lambda _: b""])
def test_damaged_batch_is_fetched_anew(small, server, tmp_path, damage):
    small.load(tmp_path)
    name = next(iter(small.contents))
    path = tmp_path / small.kind.base_folder / name
    path.write_bytes(damage(path.read_bytes()))
    server.way = "cut"
    with pytest.raises(ParameterError, match=f"{small.name} is not in"):
        small.load(tmp_path)
    server.way = "whole"
    small.load(tmp_path)
    assert path.read_bytes() == small.contents[name]


def test_archive_placed_by_hand_is_used_if_it_is_whole(small, server, tmp_path):
    placed = tmp_path / small.kind.filename
    placed.write_bytes(server.content)
    server.way = "cut"
    assert len(small.load(tmp_path)[1]) == 20
    assert found_in(tmp_path) == sorted([*small.files, placed.name])


def test_half_an_archive_placed_by_hand_is_replaced_by_a_download(small, server, tmp_path):
    (tmp_path / small.kind.filename).write_bytes(server.content[:1000])
    server.way = "cut"
    with pytest.raises(ParameterError, match=f"{small.name} is not in"):
        small.load(tmp_path)
    server.way = "whole"
    assert len(small.load(tmp_path)[1]) == 20


def test_parts_are_those_of_the_data_set(small, server, tmp_path):
    """Training and validation images are disjoint, and come from the training images."""
    given = {"dataset": small.dataset, "data": str(tmp_path)}
    loaded = data.load_data(Settings(**given, train_images=15, val_images=5, test_images=3).resolved())
    x, _ = small.load(tmp_path)
    rows = [tuple(image.flatten().tolist()) for part in (loaded.train, loaded.val) for image in (255 * part[0]).round()]
    assert sorted(rows) == sorted(tuple(image.flatten().tolist()) for image in x.float())
    assert torch.equal(loaded.test[0], data.floats(small.load(tmp_path, train=False)[0][:3]))
    row = data.DATASETS[small.dataset]
    assert (loaded.source, loaded.shape, loaded.classes) == (row.name, row.shape, row.classes)


def test_process_killed_in_a_download_leaves_no_half_file_under_a_final_name(server, monkeypatch, tmp_path):
    small = Small("cifar10", *SMALL["cifar10"])
    server.content = small.archive
    small.expect(monkeypatch, server.url)
    code = (
        "import sys, pathlib, torchvision.datasets\n"
        "from companion.data import cifar\n"
        "torchvision.datasets.CIFAR10.url = sys.argv[1]\n"
        "cifar(pathlib.Path(sys.argv[2]), train=True)\n"
    )
    server.way = "stalled"
    arguments = [sys.executable, "-c", code, f"{server.url}/{small.kind.filename}", str(tmp_path)]
    process = subprocess.Popen(arguments, cwd=files.ROOT, stderr=subprocess.DEVNULL)
    while process.poll() is None and not any((tmp_path / name).stat().st_size for name in found_in(tmp_path)):
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert found_in(tmp_path)
    assert not [name for name in found_in(tmp_path) if not name.startswith(".download-")]
    server.closing.set()
    server.way = "whole"
    assert len(small.load(tmp_path)[1]) == 20
