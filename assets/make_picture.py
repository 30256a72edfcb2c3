"""The picture of the README, drawn from the records of the demo network: python assets/make_picture.py"""

import companion

if __name__ == "__main__":
    recorded = [
        r for r in companion.read_records() if r["network"]["name"] == "demo" and r["config"]["perturb"] == "whole"
    ]
    companion.plot_changes(4, [], recorded).savefig(companion.ASSETS / "table4.png", dpi=110, facecolor="white")
