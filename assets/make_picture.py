"""The picture of the README, drawn from the records of the paper's whole protocol: python assets/make_picture.py"""

from companion import files
from companion.evidence import deviations, is_full
from companion.plots import plot_protocol
from companion.records import read_records, record_name

recorded = [r for r in read_records() if is_full(r) and not deviations(r)]
# In the file, so that a test sees when it is older than the records.
source = f"SHA-256 of its numbers: {files.digest(repr([(record_name(r), r.metrics) for r in recorded]).encode())}"

if __name__ == "__main__":
    picture = files.ASSETS / "protocol.png"
    plot_protocol(recorded).savefig(picture, dpi=110, facecolor="white", metadata={"Description": source})
