"""The tests of what is promised, with far more cases than in a test run; one record of how many there were.

python benchmarks/reliability.py [--kills 200] [--examples 1000] [--damages 100000] [--out runs]

`--examples` is for each property of tests/test_hostile.py. A record is written only if every test passed.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from companion import files
from companion.bases import SCHEMA
from companion.machine import core_digest, made_on, pick_device
from companion.records import write_record

FILES = ("checkpoint", "downloads", "errors", "export", "hostile", "passes", "records", "security")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--damages", type=int, default=100_000)
    parser.add_argument("--out", type=Path, default=files.RUNS)
    given = parser.parse_args(arguments)
    core_digest()  # of the code that runs, should the file be edited meanwhile
    begin = time.perf_counter()
    numbers = {"WDAT_KILLS": given.kills, "WDAT_EXAMPLES": given.examples, "WDAT_DAMAGES": given.damages}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        tests = [str(files.ROOT / "tests" / f"test_{name}.py") for name in FILES]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", *tests, f"--junitxml={report}"],
            env=os.environ | {name: str(value) for name, value in numbers.items()},
            cwd=files.ROOT,
        )
        if done.returncode:
            sys.exit("reliability.py: tests failed, as shown above: there is nothing to record")
        suite = ET.parse(report).getroot().find("testsuite")
    assert suite is not None
    # Hypothesis reports properties of its own there.
    figures = {p.get("name"): int(v) for p in suite.iter("property") if (v := p.get("value", "")).isdigit()}
    figures |= {"tests": int(suite.get("tests", "")), "skipped": int(suite.get("skipped", ""))}
    record = {
        "schema": SCHEMA,
        "kind": "reliability",
        "config": {"kills": given.kills, "examples": given.examples, "damages": given.damages},
        "figures": figures,
        "seconds": {"total": round(time.perf_counter() - begin, 1)},
        **made_on(
            pick_device("cpu"),
            f"python benchmarks/reliability.py --kills {given.kills} --examples {given.examples}"
            f" --damages {given.damages}",
        ),
    }
    print(write_record(record, given.out))


if __name__ == "__main__":
    main(sys.argv[1:])
