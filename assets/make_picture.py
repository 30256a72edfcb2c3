"""The picture of the README, drawn from the records of the demo network: python assets/make_picture.py"""

from companion import files
from companion.plots import plot_changes
from companion.records import read_records

if __name__ == "__main__":
    recorded = [
        r
        for r in read_records()
        if r["network"]["name"] == "demo" and r["data"]["train"] == 4000 and r["config"]["perturb"] == "whole"
    ]
    plot_changes(4, [], recorded).savefig(files.ASSETS / "table4.png", dpi=110, facecolor="white")
