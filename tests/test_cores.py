"""A record is current where its code is known to give the numbers of the present code: by measurement, not by text."""

import copy
import json

import pytest

from companion import cores, files
from companion.evidence import is_current
from companion.kinds import FinetuneRecord
from companion.records import read_records
from wdat_core import code_digest

ENTRY = {
    "core": "a" * 64,
    "file": "b" * 64,
    "device": "a processor, 1 thread",
    "versions": {"torch": "2.11.0"},
    "sample": {"demo, attacked": {"accuracy": {"clean": 0.6567, "w_2": 0.2624}, "bits": "c" * 64}},
}


def other(core="d" * 64, **changes):
    entry = copy.deepcopy(ENTRY) | {"core": core, "file": core}
    part = entry["sample"]["demo, attacked"]
    part["bits"] = changes.pop("bits", part["bits"])
    part["accuracy"] |= changes.pop("accuracy", {})
    return entry | changes


ELSEWHERE = {"device": "another processor, 1 thread"}


@pytest.mark.parametrize(
    "entry, same",
    [
        (other(), True),
        (other(bits="e" * 64), False),  # on one machine every bit counts
        (other(bits="e" * 64, **ELSEWHERE), True),
        (other(bits="e" * 64, versions={"torch": "2.12.0"}), True),
        (other(bits="e" * 64, accuracy={"w_2": 0.2628}, **ELSEWHERE), True),
        (other(bits="e" * 64, accuracy={"w_2": 0.2630}, **ELSEWHERE), False),
        (other(sample={}), False),
        (other(sample=ENTRY["sample"] | {"distances": {"accuracy": {}, "bits": "1"}}), True),  # what both can do
    ],
)
def test_two_cores_are_the_same_where_their_numbers_are(entry, same):
    assert cores.gives_the_same(ENTRY, entry) is cores.gives_the_same(entry, ENTRY) is same


@pytest.fixture
def known(tmp_path, monkeypatch):
    """A table of cores, and the present one in it."""

    def write(*entries):
        path = tmp_path / "cores.json"
        path.write_text(json.dumps(entries), encoding="utf-8")
        monkeypatch.setattr(cores, "CORES", path)
        cores.is_current.cache_clear()

    yield write
    cores.is_current.cache_clear()


def test_a_record_is_current_by_the_digest_of_its_code_or_of_its_file(known):
    known(ENTRY, other(core=code_digest()), other(core="f" * 64, bits="e" * 64))
    assert cores.is_current(code_digest())
    assert cores.is_current(ENTRY["core"]) and cores.is_current(ENTRY["file"])
    assert not cores.is_current("f" * 64) and not cores.is_current("0" * 64)


def test_a_record_is_current_by_way_of_a_version_that_two_machines_have(known):
    """ENTRY and `middle` gave the same bits on one machine, `middle` and the present code others on a second one."""
    middle, here = "d" * 64, {"processor": "cpu family 1", "bits": "9" * 64, "accuracy": {"w_2": 0.3}}
    known(ENTRY, other(middle), other(middle, **here), other(code_digest(), **here), other("f" * 64, bits="e" * 64))
    assert cores.is_current(ENTRY["core"]) and cores.is_current(ENTRY["file"]) and cores.is_current(middle)
    assert not cores.is_current("f" * 64)


def test_what_gives_the_same_bits_stands_for_the_present_code_on_another_machine(known):
    """`twin` does on one machine; on a second it is within the tolerance of ENTRY, which was measured on a third."""
    twin, here = "d" * 64, {"processor": "cpu family 1", "bits": "9" * 64, "accuracy": {"w_2": 0.3}}
    there = {"processor": "cpu family 2", "bits": "8" * 64, "accuracy": {"w_2": 0.2627}}
    known(ENTRY, other(code_digest(), **here), other(twin, **here), other(twin, **there))
    assert cores.is_current(twin) and cores.is_current(ENTRY["core"])
    known(ENTRY, other(code_digest(), **here), other(twin, **there))
    assert not cores.is_current(twin) and not cores.is_current(ENTRY["core"])


def test_an_old_version_that_lacks_a_part_is_no_way_around_it(known):
    """It is alike to both versions in what it has; they were seen to differ in what it lacks."""

    def with_distances(bits):
        return ENTRY["sample"] | {"distances": {"accuracy": {"p 2": 0.1}, "bits": bits}}

    present, changed = (other(code_digest(), sample=with_distances("1")), other("f" * 64, sample=with_distances("2")))
    known(present, changed)
    assert not cores.is_current("f" * 64)
    known(present, changed, ENTRY)
    assert cores.is_current(ENTRY["core"]) and not cores.is_current("f" * 64)


def test_tolerances_of_several_machines_do_not_add_up(known):
    """Each entry is 0.04 points from the next: the present code's neighbours are current, theirs are not."""
    steps = [
        other(core, bits=core, processor=core, accuracy={"w_2": 0.2624 + 0.0004 * k})
        for k, core in enumerate((code_digest(), "d" * 64, "f" * 64))
    ]
    known(*steps)
    assert cores.is_current("d" * 64) and not cores.is_current("f" * 64)


def test_training_for_the_worst_case_counts_for_records_of_it_alone(known):
    """Two versions that differ there give the same numbers everywhere else."""
    one, two = ({cores.WORST_CASE: {"accuracy": {"p 2": value}, "bits": f"{value}"}} for value in (0.1, 0.2))
    known(other(sample=ENTRY["sample"] | one), other(code_digest(), sample=ENTRY["sample"] | two))
    assert cores.is_current("d" * 64) and not cores.is_current("d" * 64, worst_case=True)
    assert cores.is_current(code_digest(), worst_case=True)
    slope, algorithm1 = (
        next(r for r in read_records(kind="objective") if r.config.objective == objective).model_copy(
            update={"core": "d" * 64}
        )
        for objective in ("slope", "algorithm1")
    )
    assert is_current(algorithm1) and not is_current(slope)


def test_one_name_of_a_processor_may_be_two_machines():
    there = other(bits="e" * 64, processor="cpu family 1")
    assert cores.gives_the_same(ENTRY, there)
    assert not cores.gives_the_same(ENTRY | {"processor": "cpu family 1"}, there)


def test_without_a_table_only_the_present_code_is_current(known, tmp_path):
    known(ENTRY)
    assert cores.is_current(code_digest()) and not cores.is_current(ENTRY["core"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--file", "none.py"], "No such file"),
        (["--file", str(files.ROOT / "README.md")], "is not a file of Python"),
        (["--file", str(files.ROOT / "make.py")], "is no version of wdat_core.py: it has no FinetuneConfig"),
        (["--data", "embedded"], "CIFAR-10 is not in"),
    ],
)
def test_what_is_no_core_and_no_images_is_named(arguments, words, known):
    known(ENTRY)
    with pytest.raises(SystemExit, match=f"cores: .*{words}"):
        cores.main(arguments)


def test_a_comment_changes_no_core_and_a_number_does(tmp_path):
    file = tmp_path / "core.py"
    digests = []
    for text in ("x = 1\n", '"""Words."""\n# more\nx = (\n    1  # one\n)\n', "x = 2\n"):
        file.write_text(text, encoding="utf-8")
        digests.append(code_digest(file))
    assert digests[0] == digests[1] != digests[2]


def test_what_the_claims_count_was_made_by_code_that_gives_the_present_numbers():
    full = [r for r in read_records() if isinstance(r, FinetuneRecord) and r.config.epochs == 20]
    others = [r.network.name for r in full if not cores.is_current(r.core)]
    assert len(full) > 10 and others == [], "the code changed: python -m companion.cores --data data, see CONTRIBUTING"
