"""The model card of an exported network."""

from __future__ import annotations

import json

from companion.intervals import accuracy, change
from companion.origins import describe
from companion.records import Record
from companion.settings import METRICS, STAND_INS

# RobustBench's LICENSE: its weights are under the MIT licence, but for names that begin with one of these.
LICENCES = {
    "Hendrycks2019Using": "Apache-2.0",
    "Pang2020Boosting": "Apache-2.0",
    "Gowal2020Uncovering": "Apache-2.0",
    "Ding2020MMA": "CC-BY-NC-SA-4.0",
    "Rebuffi2021Fixing": "Apache-2.0",
    "Gowal2021Improving": "Apache-2.0",
}


def model_card(record: Record, base: str, weights: str, known: str) -> str:
    """The model card of an exported network, in Markdown: what it is, how it was made, its numbers and its limits.

    Args:
        record: of the fine-tuning.
        base: the stand-in or network of RobustBench whose architecture it has.
        weights: the file of its weights, with SHA-256 `known`.
    """
    own = base in STAND_INS
    licence = "MIT" if own else next((v for k, v in LICENCES.items() if base.startswith(k)), "MIT")
    network, data, config = record["network"], record["data"], record["config"]
    rows = [
        f"| {label} | {accuracy([record], 'before', m).text()} | {accuracy([record], 'after', m).text()}"
        f" | {change([record], m).text(signed=True)} |"
        for m, label in METRICS.items()
    ]
    load = (
        "from companion.networks import load_network  # of the companion\n\n"
        'model = load_network("path/to/this/folder", "models").model'
        if own
        else "from robustbench.utils import load_model  # 1.1.1 wants a module autoattack: pyautoattack is one\n\n"
        f'model = load_model("{base}", model_dir="path/to/this/folder", dataset="cifar10", threat_model="Linf")'
    )
    return f"""# {base}, fine-tuned

A classifier of CIFAR-10: `{network["name"]}` after Algorithm 1 of *Wasserstein Distributional Adversarial Training for
Deep Neural Networks* (arXiv 2502.09352). Images (b, 3, 32, 32) with values in [0, 1] go in, 10 logits come out.

```python
{load}
```

AutoAttack takes it as it is, with images that are `contiguous()`.

## How it was made

{describe([record], "The run").data}

| | |
|---|---|
| command | `{record["command"]}` |
| started from | `{network["name"]}`, {network["source"]}; SHA-256 `{network["digest"]}` |
| images | {data["source"]}; SHA-256 `{data["digest"]}` |
| weights | `{weights}`; SHA-256 `{known}` |
| epoch kept | {record["history"]["best"]} of {config["epochs"]}, the best on validation images under W₂ |
| code | `wdat_core.py`; SHA-256 `{record["core"]}` |
| finished | {record["created"]} |

The configuration, seed included:

```json
{json.dumps(config, indent=1)}
```

## Accuracy

In per cent, on {data["test"]:,} test images that training did not see. ± is half of a 95 % interval of sampling those
images, for a change that of the paired differences. It does not hold what another seed of the training would change.

| attack | before | after | change |
|---|---|---|---|
{chr(10).join(rows)}

## Limits

An accuracy under attack is an upper bound: a stronger attack, AutoAttack among them, may find less. The numbers are
for images like those of CIFAR-10, for perturbations of at most {255 * config["threat"]["delta"]:.4g}/255 in the l_inf
norm (pointwise, W∞; in the mean, W₂), and say nothing of other images, sizes or norms. Nothing here is fit to protect
people or property.

## Licence

{licence}{"" if own else f", as RobustBench has it for the weights of {base}, from which these derive"}.
"""
