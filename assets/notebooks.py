"""Writes the notebooks that share one shape, Tables 3, 4 and 6 to 11 and Figures 7.2 to 7.4: python assets/notebooks.py

Two templates hold what the pages share, the tables of data below them what differs. A cell that stays as it was keeps
its output; one that changes has none until `python assets/execute.py NAME` runs it. Of the other notebooks this writes
the parameters cell. tests/test_notebooks.py says when a notebook is not what this file writes.
"""

# ruff: noqa: E501 (a line of a template is a line of a page)

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat

from companion import files
from companion.parameters import defaults, explained
from companion.settings import GRIDS, NOTEBOOKS, PAPER_NETWORKS

METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}

# A cell begins with a line "%% kind id tags"; "fold:" is the label of a folded cell, "alt:" the text of its image.
# «name» stands for what differs. Folded cells are native <details>, which open by mouse and by keyboard.
SHARED = """
%% code parameters parameters hide-cell
fold: Parameters
«parameters»

%% code check remove-cell
from companion.settings import Settings

settings = Settings.from_notebook(globals(), "«name»")
"""

TABLE = r"""
%% markdown title
# Table «number»: «how», «paper»
«shared»
%% code answer answer hide-input
fold: Code
alt: Changes of accuracy in each column of Table «number», for the paper's network and each network measured here; the numbers are in the table below.
from IPython.display import Markdown, display

from companion import evidence, plots, records, tables
from companion.answers import answer

known = records.read_records()
grids = evidence.grids("«perturb»", known)
full = [record for grid in grids if evidence.is_full(grid[0]) for record in grid]
display(Markdown(answer("«name»", known)))
display(plots.plot_changes(«number», [], full), tables.grid_table(«number», [], full))
display(*tables.diverged("«perturb»", records.read_records(kind="diverged"), known))

%% markdown paper
Accuracy in per cent; in brackets the change against the baseline, in percentage points. ± is half of a 95 % interval. A mark says
whether what the paper reports in this place holds here (✓), is contradicted (✗) or is not visible (○):
[how to read a table](../intro.md#how-to-read-a-table). Each network here was fine-tuned by the paper's whole protocol:
40,000 training, 10,000 validation and 10,000 test images, 20 epochs. *Worst case found* is the lowest accuracy that
[buying the cheapest images first](worst_case.ipynb) leaves in the same ball: an upper bound of the true one, no certificate.

## In the paper

The paper «change» with [Algorithm 1](#algorithm-1) for 20 epochs. It reports the
epoch with the best accuracy under the $(\mathcal W_2, l_\infty)$ attack on validation images. «trained»

«read»

## Details

%% code columns hide-cell
fold: What holds in which column
tables.outcome_table(«number», full)

%% code configuration hide-cell
fold: How it was run: network, sizes, devices, time
from companion import origins

display(*(origins.describe(study, "Recorded here") for study in evidence.studies(full)))

%% code smaller hide-cell
fold: The same table from smaller runs
smaller = [grid for grid in grids if not evidence.is_full(grid[0])]
for grid in smaller:
    display(origins.describe(grid, "Recorded here"), tables.grid_table(«number», [], grid))

%% markdown run-text
## This run

The notebook computes the same table with its own parameters: network, images, epochs. A column that is already in `runs/`,
of the same settings, code, versions and device, is read from there. The result stands beside the paper and beside what is
recorded here with the same settings. Training is short with the preset `demo`: 4 steps of SGD an epoch for 4 epochs, where
the paper takes 79 for 20. So its network stays close to where it was.

%% code run nbval-ignore-output hide-cell
fold: This run
alt: Changes of accuracy in each column of Table «number»: the paper, recorded here and this run; the numbers are in the table above.
from companion import agreement, runs

run = runs.finetune_grid(settings, "«perturb»", notebook="«name»")
recorded = records.recorded_like(run)
display(origins.describe(run, "This run"), origins.describe(recorded, "Recorded here"))
display(tables.grid_table(«number», run, recorded), plots.plot_changes(«number», run, recorded))
agreement.of_columns(run, recorded, before=0.5, after=6.0)

%% markdown run-it
## Run it

From the root of the repository, one column or all of them:

    papermill notebooks/«name».ipynb out.ipynb -p tau 0.01
    papermill notebooks/«name».ipynb out.ipynb -p preset paper -p tau 0.01 -p eta 1

%% code origin hide-input
fold: Code
origins.drawn_from([*full, *(record for grid in smaller for record in grid)])
"""

FIGURE = r"""
%% markdown title
# Figure 7.«number»: «title»
«shared»
%% code answer answer hide-input
fold: Code
alt: «alt»
from IPython.display import Markdown, display

from companion import evidence, pages, plots, records, tables
from companion.answers import answer

known = records.read_records()
followed = [r for grid in evidence.grids("whole", known) for r in grid if r.history.start]
full = [record for record in followed if evidence.is_full(record)]
display(Markdown(answer("«name»", known)))
display(plots.plot_along("«what»", [], full), pages.kept_table("«what»", full))

%% markdown paper
The line is the mean over seeds, the band goes from the lowest to the highest. Each network here was fine-tuned by the paper's
whole protocol: 40,000 training, 10,000 validation and 10,000 test images, 20 epochs, $\tau = 0.01$ and $\eta = 1$.

## In the paper

The paper follows its best run through 20 epochs: the whole network of Zhang et al. (2019) with $\tau = 0.01$ and $\eta = 1$. The
figure shows «shows», «solid» (solid) and «dashed» (dashed). It prints no numbers.
Figures 7.2 to 7.4 are three views of this one run.

«read»

## Details

%% code numbers hide-cell
fold: The numbers behind the curves
for study in evidence.studies(full):
    display(Markdown(f"**{study[0].network.name}**"), tables.along_table("«what»", study))

%% code configuration hide-cell
fold: How it was run: network, sizes, devices, time
from companion import origins

display(*(origins.describe(study, "Recorded here") for study in evidence.studies(full)))

%% markdown run-text
## This run

The notebook computes the same curves with its own parameters: network, images, epochs. A run that is already in `runs/`, of the
same settings, code, versions and device, is read from there. The result stands beside what is recorded here with the same
settings.

%% code run nbval-ignore-output hide-cell
fold: This run
alt: «alt»
from companion import agreement, runs

run = runs.finetune_grid(settings, "whole", notebook="«name»", curves=True)
recorded = evidence.with_curves(records.recorded_like(run), like=run)
display(origins.describe(run, "This run"), origins.describe(recorded, "Recorded here"))
display(plots.plot_along("«what»", run, recorded), tables.along_table("«what»", recorded))
agreement.of_columns(run, recorded, before=0.5, after=6.0)

%% markdown run-it
## Run it

From the root of the repository:

    papermill notebooks/«name».ipynb out.ipynb
    papermill notebooks/«name».ipynb out.ipynb -p preset paper

%% code origin hide-input
fold: Code
origins.drawn_from(followed)
"""

# ------------------------------------------------------------------------------------------------------- what differs

HOW = {
    "whole": {
        "how": "whole network",
        "change": "adds small noise to all parameters of the network of «paper» and trains all layers",
    },
    "last_layer": {
        "how": "last layer",
        "change": "draws the last layer of the network of «paper» again at random and trains only this layer",
    },
}
TRAINED = {  # on which images a network was trained before
    "Zhang2019Theoretically": "This network was trained on CIFAR-10 only.",
    "Gowal2020Uncovering_28_10_extra": "Before, this network was also trained on images from outside CIFAR-10.\n"
    "Fine-tuning uses CIFAR-10 only.",
    "Cui2023Decoupled_WRN-28-10": "Before, this network was also trained on 20 million synthetic images.\n"
    "Fine-tuning uses CIFAR-10 only.",
    "Wang2023Better_WRN-28-10": "Before, this network was also trained on 20 million synthetic images.\n"
    "Fine-tuning uses CIFAR-10 only.",
}
READ = {  # what the paper's own numbers in each table say
    3: r"""Every column loses against the baseline, on clean images and under both attacks. Under the distributional attack the
smallest loss is with $\tau = 0.1$ and $\eta = 1$, from 42.99 to 41.76. The paper concludes that training only the last layer does
not make this network more robust. The last layer starts from random weights, so a short run also measures how far it has
recovered.""",
    4: r"""Every column gains under the distributional attack, most with $\tau = 0.01$ and $\eta = 1$, from 42.99 to 50.53. Every
column also gains a little under the pointwise attack.""",
    6: r"""No column gains under the distributional attack: 50.99 before, and 50.76 at best, with $\tau = 0.1$ and $\eta = 0.1$.
Every column loses under the pointwise attack.""",
    7: r"""One column gains under the distributional attack, $\tau = 0.01$ with $\eta = 1$, from 50.99 to 52.14. It loses about three
points under the pointwise attack. With $\tau = 0.1$ the network loses ten points or more under both attacks.""",
    8: r"""Every column gains under the distributional attack, most with $\tau = 0.1$ and $\eta = 1$, from 53.16 to 58.02 (also in
[Table 5](table5.ipynb)). Every column loses a little under the pointwise attack.""",
    9: r"""Only $\tau = 0.01$ with $\eta = 1$ gains under the distributional attack, from 53.16 to 55.48. Training only the last layer
gains more ([Table 8](table8.ipynb)). With $\tau = 0.1$ the network loses most of its accuracy, on clean images too.""",
    10: r"""Every column gains under the distributional attack, most with $\tau = 0.1$ and $\eta = 1$, from 52.14 to 55.93 (also in
[Table 5](table5.ipynb)). Every column loses a little under the pointwise attack.""",
    11: r"""No column gains under either attack. Under the distributional attack the network has 52.14 before, and 49.00 at best.
With $\tau = 0.1$ it loses most of its accuracy, on clean images too.""",
}
FIGURES = {
    2: {
        "title": "W₂ accuracy during fine-tuning",
        "what": "w_2",
        "shows": r"accuracy under the $\mathcal W_2$ attack after every epoch",
        "solid": "on test images",
        "dashed": "on validation images",
        "alt": "Accuracy under the W_2 attack by epoch of fine-tuning, on test and validation images; the numbers are in"
        " the table of all epochs.",
        "read": """The epoch that is kept is the one with the highest accuracy on validation images, from epoch 1 on. Sampling the test
images gives the whole curve one common error. Changes from epoch to epoch are known better, because the images are the same;
[Table 4](table4.ipynb) has intervals of such changes.""",
    },
    3: {
        "title": "W∞ accuracy during fine-tuning",
        "what": "w_inf",
        "shows": r"accuracy under the $\mathcal W_\infty$ attack after every epoch",
        "solid": "on test images",
        "dashed": "on validation images",
        "alt": "Accuracy under the W_inf attack by epoch of fine-tuning, on test and validation images; the numbers are in"
        " the table of all epochs.",
        "read": """Training against the distributional attacker also raises the accuracy under the pointwise one, from 57.05 to 59.99 at
the epoch that is kept ([Table 4](table4.ipynb)).""",
    },
    4: {
        "title": "Υ during fine-tuning",
        "what": "upsilon",
        "shows": r"the sensitivity $\Upsilon$ after every epoch",
        "solid": "of the test set",
        "dashed": "of the training set",
        "alt": "Upsilon by epoch of fine-tuning, of the test and the training images; the numbers are in the table of all"
        " epochs.",
        "read": r"""The paper calls the curve of the training set volatile. Between two minibatches the estimates that Algorithm 1 uses
differ more than these curves, because each comes from a sample of its own ([Figure 7.1](figure7_1.ipynb)). The moving average of
[(5.4)](#eq-5-4) with $\eta = 0.1$ should make them calmer. The paper finds that $\eta = 1$ does better, so the figure uses it.""",
    },
}

# ------------------------------------------------------------------------------------------------- from text to cells


def notebooks() -> dict[str, Any]:
    """Every notebook of this file by its name, without outputs."""
    found = {}
    for number, (network, perturb) in GRIDS.items():
        paper = {"paper": PAPER_NETWORKS[network]["paper"], "trained": TRAINED[network], "read": READ[number]}
        found[f"table{number}"] = filled(TABLE, number, HOW[perturb] | paper | {"perturb": perturb})
    for number, about in FIGURES.items():
        found[f"figure7_{number}"] = filled(FIGURE, number, about)
    return {name: notebook(name, text) for name, text in found.items()}


def filled(template: str, number: int, values: dict[str, str]) -> str:
    """A template with its number and its values in place; a value may hold others."""
    text = template.replace("«shared»", SHARED).replace("«number»", str(number))
    for name, value in values.items():
        text = text.replace(f"«{name}»", value)
    return text.replace("«paper»", values.get("paper", ""))


def parameters(name: str) -> str:
    """The parameters cell of any notebook: each parameter, its value and what it means."""
    values = defaults(name)
    lines = [f"{parameter} = {literal(values[parameter])}  # {means}" for parameter, means in explained(name).items()]
    return "\n".join(lines)


def literal(value: Any) -> str:
    """A value as the notebooks write it."""
    if value == 4 / 255:
        return "4 / 255"
    return f'"{value}"' if isinstance(value, str) else repr(value)


def notebook(name: str, text: str) -> Any:
    """The notebook of a filled template: cells with ids, tags, labels and alternative texts."""
    cells = []
    text = text.replace("«name»", name).replace("«parameters»", parameters(name))
    for part in re.split(r"^%% ", text, flags=re.MULTILINE)[1:]:
        head, _, source = part.partition("\n")
        kind, cell_id, *tags = head.split()
        metadata: dict[str, Any] = {"tags": tags} if tags else {}
        while match := re.match(r"(fold|alt): (.*)\n", source):
            if match[1] == "fold":  # one label for open and closed: a screen reader adds which it is
                fold = {"code_prompt_show": match[2], "code_prompt_hide": match[2]}
                metadata.setdefault("mystnb", {}).update(fold)
            else:
                metadata.setdefault("mystnb", {})["image"] = {"alt": match[2]}
            source = source[match.end() :]
        new = nbformat.v4.new_markdown_cell if kind == "markdown" else nbformat.v4.new_code_cell
        cells.append(new(source.strip(), id=f"{name}-{cell_id}".replace("_", "-"), metadata=metadata))
    return nbformat.v4.new_notebook(cells=cells, metadata=METADATA)


def keep_outputs(new: Any, old: Any) -> None:
    """Give each cell of a notebook the output of the same cell in an older one."""
    known = {(cell.id, cell.source): cell for cell in old.cells if cell.cell_type == "code"}
    for cell in new.cells:
        if (cell.id, cell.source) in known:
            before = known[cell.id, cell.source]
            cell.outputs, cell.execution_count = before.outputs, before.execution_count


def path_of(name: str) -> Path:
    return files.ROOT / "notebooks" / f"{name}.ipynb"


if __name__ == "__main__":
    for name, written in notebooks().items():
        if path_of(name).exists():
            keep_outputs(written, nbformat.read(path_of(name), as_version=4))
        nbformat.write(written, path_of(name))
    for name in NOTEBOOKS.keys() - notebooks().keys():
        other = nbformat.read(path_of(name), as_version=4)
        (cell,) = [cell for cell in other.cells if "parameters" in cell.metadata.get("tags", [])]
        cell.source = parameters(name)
        nbformat.write(other, path_of(name))
