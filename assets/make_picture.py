"""The picture of the README, drawn from the records of the paper's whole protocol: python assets/make_picture.py"""

from companion import files
from companion.evidence import changed, is_full
from companion.plots import plot_protocol
from companion.records import read_records

if __name__ == "__main__":
    recorded = [r for r in read_records() if is_full(r) and not changed(r)]
    plot_protocol(recorded).savefig(files.ASSETS / "protocol.png", dpi=110, facecolor="white")
