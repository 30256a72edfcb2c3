"""The picture of the README, drawn from the records of the demo network: python assets/make_picture.py"""

import companion

if __name__ == "__main__":
    demo = companion.PRESETS["demo"]
    recorded = [
        r
        for r in companion.read_records()
        if r["network"]["name"] == "demo"
        and r["data"]["train"] == demo["train_images"]
        and r["config"]["perturb"] == "whole"
    ]
    companion.plot_changes(4, [], recorded).savefig(companion.ASSETS / "table4.png", dpi=110, facecolor="white")
