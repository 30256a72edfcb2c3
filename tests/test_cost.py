"""What a run costs: the formula has the passes and the messages that the code makes, and a page invents no speed."""

import math
import statistics
import subprocess
import sys

import papermill
import pytest
import torch
import torch.distributed as dist
from altered import altered
from papermill.exceptions import PapermillExecutionError
from tiny import images, network, predict
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from companion import cost, cost_page, files
from companion.architectures import WideResNet
from companion.checked import ParameterError
from companion.cost import Passes, Reader
from companion.records import read_records
from companion.settings import PRESETS
from companion.words import HOW
from wdat_core import FinetuneConfig, Threat, boundary, evaluate, finetune, sensitivity, wpgd, wpgd_budget

STEPS, CLASSES, TRAIN, VAL, TEST = 5, 4, 23, 9, 17
THREAT = Threat(delta=0.05)


class Counter(nn.Module):
    """A network that counts the images of its passes; those of one image are checks."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.seen = inner, {"forward": 0, "gradient": 0, "update": 0}

    def forward(self, x):
        weights = any(p.requires_grad for p in self.parameters())
        all_weights = all(p.requires_grad for p in self.parameters())
        kind = "gradient" if x.requires_grad else "update" if torch.is_grad_enabled() and all_weights else "forward"
        assert not (kind == "gradient" and weights)
        self.seen[kind] += len(x) if len(x) > 1 else 0
        return self.inner(x)

    def passes(self):
        return Passes(**self.seen)


def subject(n, seed=0):
    model = network(dtype=torch.float32, classes=CLASSES)
    return Counter(model), *images(n, model, CLASSES, dtype=torch.float32, seed=seed)


def at_most(made, formula):
    """No kind of pass was made more often."""
    return all(0 <= getattr(made, kind) <= getattr(formula, kind) for kind in ("forward", "gradient", "update"))


@pytest.mark.parametrize("p", [2.0, math.inf])
def test_an_attack_is_its_steps_and_one_forward_pass(p):
    model, x, y = subject(TEST)
    wpgd(model, x, y, Threat(p=p, delta=0.05), loss="ce", steps=STEPS)
    assert model.passes() == cost.attack(TEST, STEPS)


@pytest.mark.parametrize("steps", [1, 5, 16, 40])
def test_the_worst_case_is_a_look_and_for_what_is_right_its_gradients(steps):
    model, x, y = subject(TEST)
    right = int((predict(model.inner, x) == y).sum())
    boundary(model, x, y, steps=steps)
    assert 1 < right < TEST
    assert model.passes() == cost.worst_case(TEST, steps, CLASSES, right)
    assert at_most(model.passes(), cost.worst_case(TEST, steps, CLASSES))


def test_an_evaluation_is_two_attacks_and_the_worst_case():
    model, x, y = subject(TEST)
    right = int((predict(model.inner, x) == y).sum())
    evaluate(model, x, y, delta=0.05, loss="ce", steps=STEPS, found_steps=8)
    assert model.passes() == cost.total(cost.evaluation(TEST, STEPS, 8, CLASSES, right))


def test_the_measurement_before_is_of_four_attacks_and_upsilon():
    """As companion.runs.attacked makes it; of ten classes, whose search has as many rivals as one of four here."""
    model, x, y = subject(TEST)
    right = int((predict(model.inner, x) == y).sum())
    evaluate(model, x, y, delta=0.05, loss="ce", steps=STEPS, found_steps=8)
    upsilon = sensitivity(model, x, y, THREAT, loss="ce")
    wpgd_budget(model, x, y, THREAT, upsilon=upsilon, loss="ce", steps=STEPS, batch_size=6)
    assert model.passes() == cost.before(TEST, STEPS, 8, right)


def trained(loss, perturb="whole", group=None, **sizes):
    """The network after a training of those sizes, with what it counted."""
    sizes = {"epochs": 2, "batch_size": 10, "steps": STEPS} | sizes
    model, x, y = subject(TRAIN)
    val = images(VAL, model.inner, CLASSES, dtype=torch.float32, seed=1)
    head = "inner.4" if perturb == "last_layer" else None  # looked for, it takes up to eight images more
    config = FinetuneConfig(
        perturb=perturb, head=head, threat=THREAT, loss=loss, tau=1e-4, augment=False, sample=cost.SAMPLE, **sizes
    )
    finetune(model, (x, y), val, config, group=group)
    return model.passes(), cost.total(cost.training(perturb, TRAIN, VAL, **sizes))


@pytest.mark.parametrize("perturb", ["whole", "last_layer"])
@pytest.mark.parametrize("sizes", [{}, {"steps": 1}, {"epochs": 1, "batch_size": 23}, {"batch_size": 512}])
def test_a_training_makes_the_passes_of_the_formula(perturb, sizes):
    made, formula = trained("ce", perturb, **sizes)
    assert made == formula


def test_under_redlr_the_formula_is_an_upper_bound():
    made, formula = trained("redlr")
    assert at_most(made, formula) and made.gradient < formula.gradient
    assert made.update == formula.update


def test_the_sizes_are_those_of_the_paper():
    assert {k: cost.PAPER[k] for k in ("train", "val", "test", "epochs")} == {
        "train": 40_000, "val": 10_000, "test": 10_000, "epochs": 20
    }  # fmt: skip
    config = FinetuneConfig()
    assert (config.sample, config.steps, config.batch_size) == (cost.SAMPLE, cost.STEPS, cost.PAPER["batch_size"])
    assert cost.PAPER["found_steps"] == PRESETS["paper"]["found_steps"]
    assert cost.sgd_steps() == 20 * 79
    whole, last = cost.total(cost.column()), cost.total(cost.column("last_layer"))
    assert whole.gradient == 1580 * 4000 + 20 * 40_000 * 20 + 20 * 10_000 * 20 + 2 * 10_000 * 20 + 10_000 * 100
    assert whole.update == last.forward - whole.forward == 2 * 20 * 40_000
    first = cost.before(10_000, found_steps=100)
    assert cost.grid() == (whole * 4 + last * 4 + first) * 5


# ---------------------------------------------------------------------------------------------- messages and weights


@pytest.fixture
def sent(tmp_path, monkeypatch):
    """The sizes in bytes of what a process gives in all messages, in a group of one process."""
    sizes = []
    dist.init_process_group("gloo", init_method=(tmp_path / "store").as_uri(), rank=0, world_size=1)

    def noted(name, place):
        real = getattr(dist, name)

        def call(*args, **kwargs):
            sizes.append(args[place].nbytes)
            return real(*args, **kwargs)

        monkeypatch.setattr(dist, name, call)

    noted("all_reduce", 0)
    noted("all_gather", 1)
    yield sizes
    dist.destroy_process_group()


@pytest.mark.parametrize("steps", [2, 5])
def test_messages_of_an_attack_and_of_an_evaluation(sent, steps):
    model, x, y = subject(TEST)
    wpgd(model, x, y, THREAT, loss="ce", steps=steps, group=dist.group.WORLD)
    assert len(sent) == cost.STEP_MESSAGES * steps + cost.ATTACK_MESSAGES and max(sent) <= cost.MESSAGE_BYTES
    sent.clear()
    evaluate(model, x, y, loss="ce", steps=steps, found_steps=8, group=dist.group.WORLD)
    assert sum(sent) + 8 * TEST <= cost.evaluation_bytes(TEST, steps)


@pytest.mark.parametrize("perturb", HOW)
@pytest.mark.parametrize("steps", [2, 5])
def test_messages_of_a_minibatch(sent, steps, perturb):
    model, x, y = subject(20)
    trained = model if perturb == "whole" else [part for part in model.modules() if isinstance(part, nn.Linear)][-1]
    parameters = sum(p.numel() for p in trained.parameters())
    gradients = 4 * parameters
    sizes = {"steps": steps, "epochs": 2, "batch_size": 10}
    config = FinetuneConfig(threat=THREAT, perturb=perturb, augment=False, tau=1e-4, **sizes)
    finetune(model, (x, y), None, config, group=dist.group.WORLD)
    small = [size for size in sent if size != gradients]
    assert len(sent) - len(small) == 4  # one a minibatch
    assert len(small) == 4 * cost.messages(steps) and max(small) <= cost.MESSAGE_BYTES
    assert gradients < sum(sent) / 4 <= cost.step_bytes(parameters, steps)


def test_passes_made_by_a_group_are_those_of_one_process(sent):
    made, formula = trained("ce", group=dist.group.WORLD)
    assert made == formula


def multiplications(work):
    with FlopCounterMode(display=False) as counted:
        work()
    return counted.get_total_flops()


def test_a_forward_pass_is_half_a_pass_and_an_update_one_and_a_half():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.Flatten())
    model.append(nn.Linear(8 * 36, 10))
    x = torch.rand(2, 8, 6, 6)
    with torch.no_grad():
        forward = multiplications(lambda: model(x))
    with_both = multiplications(lambda: model(x.clone().requires_grad_()).sum().backward())
    model.requires_grad_(False)
    gradient = multiplications(lambda: model(x.clone().requires_grad_()).sum().backward())
    assert (forward, with_both) == (cost.FORWARD * gradient, cost.UPDATE * gradient)


@pytest.mark.parametrize("name", cost.PARAMETERS_OF)
def test_parameters_of_the_paper_s_networks(name):
    _, depth, widen = name.split("-")
    with torch.device("meta"):
        model = WideResNet(int(depth), int(widen))
    assert sum(p.numel() for p in model.parameters()) == cost.PARAMETERS_OF[name]
    last = [part for part in model.modules() if isinstance(part, nn.Linear)][-1]
    assert sum(p.numel() for p in last.parameters()) == cost.LAST_LAYER


def test_hours_are_work_over_devices_and_bytes_over_bandwidth():
    passes = Passes(forward=2000, gradient=5000, update=800)
    assert passes.whole == 7200
    assert cost.hours(passes, rate=2) == 1
    assert cost.hours(passes, rate=2, devices=8) == 1 / 8
    assert cost.hours(passes, 2, 8, shared=3600e6, bandwidth=1e6) == pytest.approx(1 / 8 + 2 * 7 / 8)
    assert cost.sent(10, 1) == 0 and cost.sent(10, 2) == 10 and cost.sent(10, 1000) < 20


# --------------------------------------------------------------------------------------------------- the parameters


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"images_per_second": 0}, "images_per_second must be above 0, not 0"),
        ({"images_per_second": -2.5}, "images_per_second must be above 0, not -2.5"),
        ({"images_per_second": math.nan}, "images_per_second must be a finite number, not nan"),
        ({"images_per_second": math.inf}, "images_per_second must be a finite number, not inf"),
        ({"images_per_second": "fast"}, "images_per_second must be a number, not 'fast'"),
        ({"images_per_second": True}, "images_per_second must be a number, not True"),
        ({"parameters": 0}, "parameters must be above 0, not 0"),
        ({"parameters": 1.5}, "parameters must be a whole number, not 1.5"),
        ({"parameters": 10**16}, "parameters must be at most 1000000000000000, not 10000000000000000"),
        ({"bandwidth": -1}, "bandwidth must be above 0, not -1"),
        ({"bandwidth": "1 GB"}, "bandwidth must be a number, not '1 GB'"),
        ({"devices": 0}, f"devices must be {cost.COUNTS}, not 0"),
        ({"devices": -8}, f"devices must be {cost.COUNTS}, not -8"),
        ({"devices": "1, x"}, f"devices must be {cost.COUNTS}, not '1, x'"),
        ({"devices": ""}, f"devices must be {cost.COUNTS}, not ''"),
        ({"devices": "1.5"}, f"devices must be {cost.COUNTS}, not '1.5'"),
        ({"devices": "²"}, f"devices must be {cost.COUNTS}, not '²'"),
        ({"devices": 1.0}, f"devices must be {cost.COUNTS}, not 1.0"),
        ({"devices": True}, f"devices must be {cost.COUNTS}, not True"),
        ({"devices": None}, f"devices must be {cost.COUNTS}, not None"),
        ({"devices": 10**400}, f"devices must be {cost.COUNTS}, not 1"),
        ({"device": 8}, "unknown parameter 'device': did you mean 'devices'?"),
    ],
)
def test_a_bad_parameter_is_named(given, message):
    with pytest.raises(ParameterError) as caught:
        Reader.from_notebook(given, "cost")
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_good_parameters_are_taken():
    assert Reader().counts == [1, 8, 64] and Reader(devices=16).counts == [16]
    assert Reader.from_notebook({"devices": " 2,4 ", "images_per_second": 900}, "cost").counts == [2, 4]


def test_parameters_are_checked_before_torch_is_there():
    code = "import sys, companion.cost; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=files.ROOT).returncode == 0


# --------------------------------------------------------------------------------------------------------- the page

KNOWN = [record for kind in ("benchmark", "finetune", "evaluate") for record in read_records(kind=kind)]
BENCHMARK = next(record for record in KNOWN if record.kind == "benchmark")
CARD = {
    "WRN-28-10, bfloat16": {"images_per_second": 500.0, "projected_minutes": 50.0},
    "WRN-34-10, bfloat16": {"images_per_second": 400.0, "projected_minutes": 60.0},
    "WRN-34-10, float32": {"images_per_second": 100.0},
    "demo, float32": {"images_per_second": 9000.0},
}
GPU = altered(BENCHMARK, throughput=CARD).model_copy(
    update={"device": "A card", "created": "2027-01-01T00:00:00+00:00"}
)


def cells(table):
    """The rows of a table of Markdown, by their first cell."""
    lines = [line.strip("| ").split(" | ") for line in table.data.splitlines() if line.startswith("|")][2:]
    return {line[0]: line[1:] for line in lines}


def test_the_answer_has_the_grid_the_speed_and_three_numbers_of_devices():
    text = cost_page.cost_answer(KNOWN)
    assert text.startswith(
        f"The paper's grid, 5 networks with 8 columns each, is at most {cost_page.many(cost.grid().whole)} passes."
    )
    assert "one such device" in text and " on 8 and " in text and " on 64, " in text
    first, *_ = measured = cost_page.sources(KNOWN)
    assert "No GPU was measured" in text and f" measured with {first.name} on {first.device}," in text
    slow = min(measured, key=lambda source: source.rate)
    hours = cost_page.duration(cost.hours(cost.grid(), slow.rate))
    assert f"at the speed of {slow.name}, the slowest measured, one device would take {hours}." in text


def test_a_card_s_speed_is_taken_once_it_is_recorded():
    text = cost_page.cost_answer([*KNOWN, GPU])
    assert "At the 8,200 passes a second measured with WRN-34-10, bfloat16 on A card," in text
    assert "No GPU" not in text and "small" not in text
    names = [source.name for source in cost_page.sources([*KNOWN, GPU])]
    assert names[:4] == ["WRN-34-10, bfloat16", "WRN-34-10, float32", "WRN-28-10, bfloat16", "demo, float32"]
    predicted = {s.name: (f, r) for s, _, f, r in cost_page.checks([*KNOWN, GPU]) if s.gpu}
    assert predicted["WRN-34-10, bfloat16"] == (pytest.approx((6.32e6 + 16e6 + 2.4e6) / 8200), 3600)
    assert GPU in cost_page.used([*KNOWN, GPU])


def test_a_quick_benchmark_is_no_measurement():
    quick = altered(GPU, config={"quick": True})
    assert cost_page.sources([quick]) == [] and "othing is recorded here yet" in cost_page.cost_answer([quick])


def test_a_speed_is_that_of_the_attack_or_of_the_columns():
    found = {s.name: s for s in cost_page.sources(KNOWN) if s.device == BENCHMARK.device or "demo" not in s.name}
    row = next(
        r
        for r in BENCHMARK.rows
        if (r["name"], r["baseline"], r["network"]) == (cost_page.ATTACK, cost_page.BARE, "demo")
    )
    assert found["`demo`"].rate == pytest.approx(row["images"] * 20.5 / row["seconds"])
    column = found["`cnn_a_adv4`"]
    seconds = [
        record.seconds["finetune"]
        for record in KNOWN
        if record.kind == "finetune" and record.network.name == "cnn_a_adv4"
        if record.config.perturb == "whole" and record.device == column.device
    ]
    assert seconds
    training = cost.training("whole", 40_000, 10_000, 20, 512)
    assert column.rate == pytest.approx(cost.total(training).whole / statistics.median(seconds))


def test_times_are_of_what_was_measured_or_given():
    """None for ImageNet until the reader says how fast; none at all without a record."""
    rows = cells(cost_page.cost_table(Reader(), KNOWN))
    assert all((row[-3:] == ["–"] * 3) == name.startswith("ImageNet") for name, row in rows.items())
    assert all(row[-3:] == ["–"] * 3 for row in cells(cost_page.cost_table(Reader(), [])).values())
    given = Reader(images_per_second=1000, devices="1, 10")
    rows = cells(cost_page.cost_table(given, KNOWN))
    assert rows == cells(cost_page.cost_table(given, []))
    name = "ImageNet evaluation, 50,000 images"
    assert rows[name][-2:] == [cost_page.duration(cost.imagenet().whole / 1000 / n / 3600) for n in (1, 10)]
    assert "bandwidth` is not given" in cost_page.reader_words(given, KNOWN).data


def test_bandwidth_makes_it_longer_on_several_devices_only():
    without, with_it = (
        cells(cost_page.cost_table(Reader(images_per_second=1000, parameters=10**8, devices="1, 8", **more), KNOWN))
        for more in ({}, {"bandwidth": 1e8})
    )
    row = "a column, whole network"
    assert without[row][-2] == with_it[row][-2] and without[row][-1] != with_it[row][-1]
    shared = 1580 * cost.step_bytes(10**8)
    expected = cost.total(cost.column()).whole / 1000 / 8 + 2 * 7 / 8 * shared / 1e8
    assert with_it[row][-1] == cost_page.duration(expected / 3600)


def test_of_a_last_layer_its_own_gradients_are_added_up():
    whole, last, _, grid, *_ = cost_page.runs()
    own = 10**8 - 3
    assert (whole.shared(own), last.shared(own)) == (
        1580 * cost.step_bytes(own),
        1580 * cost.step_bytes(cost.LAST_LAYER),
    )
    assert grid.shared(own) == 20 * (whole.shared(own) + last.shared(own)) and grid.sgd_steps == 40 * 1580
    assert last.shared(5) == whole.shared(5)  # a network has no more


def test_the_formula_is_compared_with_other_records_than_its_speeds_are_from():
    found = cost_page.checks(KNOWN)
    assert {source.name for source, *_ in found} >= {"`small_trades`", "`small_pgd`", "`demo`"}
    for source, what, formula, recorded in found:
        assert formula > 0 and recorded > 0
        assert not ("fine-tuning" in source.how and "whole network" in what)


def test_numbers_are_easy_to_read():
    assert [cost_page.duration(h) for h in (1200, 25.5, 0.5, 1 / 3600, math.nan)] == [
        "1,200 h",
        "25.5 h",
        "30 min",
        "1 s",
        "–",
    ]
    assert [cost_page.size(n) for n in (0, 1500, 185e6, 292e9, 11.7e12)] == [
        "0 B",
        "1.5 kB",
        "185 MB",
        "292 GB",
        "11.7 TB",
    ]
    assert [cost_page.many(n) for n in (417_500, 30_265_000, 1.1869e9)] == ["417,500", "30.3 million", "1.19 billion"]


def test_a_bad_parameter_ends_the_page_in_one_line(tmp_path):
    page = files.ROOT / "notebooks" / "cost.ipynb"
    with pytest.raises(PapermillExecutionError) as caught:
        papermill.execute_notebook(
            page, tmp_path / "out.ipynb", {"devices": "[1, 8]"}, progress_bar=False, cwd=files.ROOT
        )
    (line,) = caught.value.traceback
    assert line == f"ParameterError: devices must be {cost.COUNTS}, not '[1, 8]'"
