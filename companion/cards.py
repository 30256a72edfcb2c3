"""The model card of an exported network."""

from __future__ import annotations

import json

from companion.datasets import DATASETS
from companion.intervals import accuracy, change
from companion.networks import PUBLISHED
from companion.origins import describe
from companion.records import FinetuneRecord
from companion.settings import METRICS, STAND_INS

# RobustBench's LICENSE: its weights are under the MIT licence, but for names that begin with one of these.
LICENCES = {
    "Hendrycks2019Using": "Apache-2.0",
    "Pang2020Boosting": "Apache-2.0",
    "Gowal2020Uncovering": "Apache-2.0",
    "Ding2020MMA": "CC-BY-NC-SA-4.0",
    "Rony2019Decoupling": "BSD-3-Clause",
    "Rebuffi2021Fixing": "Apache-2.0",
    "Gowal2021Improving": "Apache-2.0",
}


def model_card(record: FinetuneRecord, base: str, weights: str, known: str, dataset: str, norm: str) -> str:
    """The model card of an exported network, in Markdown: what it is, how it was made, its numbers and its limits.

    Args:
        record: of the fine-tuning.
        base: the network whose architecture it has: a stand-in, a published one, or one of RobustBench.
        weights: the file of its weights, with SHA-256 `known`.
        dataset: the key of the data set that `base` tells apart.
        norm: the norm of the pixels, "Linf" or "L2".
    """
    row = DATASETS[dataset]
    if base in STAND_INS:
        licence = "MIT"
    elif base in PUBLISHED:
        licence = f"{PUBLISHED[base].licence}, as it is where the weights of {base} come from, from which these derive"
    else:
        short = next((v for k, v in LICENCES.items() if base.startswith(k)), "MIT")
        licence = f"{short}, as RobustBench has it for the weights of {base}, from which these derive"
    network, data, config = record.network, record.data, record.config
    rows = [
        f"| {label} | {accuracy([record], 'before', m).text()} | {accuracy([record], 'after', m).text()}"
        f" | {change([record], m).text(signed=True)} |"
        for m, label in METRICS.items()
    ]
    load = (
        "from companion.networks import load_network  # of the companion\n\n"
        'model = load_network("path/to/this/folder", "models").model'
        if base in STAND_INS or base in PUBLISHED
        else "from robustbench.utils import load_model  # 1.1.1 wants a module autoattack: pyautoattack is one\n\n"
        f'model = load_model("{base}", model_dir="path/to/this/folder", dataset="{dataset}", threat_model="{norm}")'
    )
    delta = config.threat.delta
    size = f"{255 * delta:.4g}/255" if norm == "Linf" else f"{delta:.4g}"
    return f"""# {base}, fine-tuned

A classifier of {row.name}: `{network.name}` after Algorithm 1 of *Wasserstein Distributional Adversarial Training
for Deep Neural Networks* (arXiv 2502.09352). Images (b, {", ".join(map(str, row.shape))}) with values in [0, 1] go in,
{row.classes} logits come out.

```python
{load}
```

AutoAttack takes it as it is, with images that are `contiguous()`.

## How it was made

{describe([record], "The run").data}

| | |
|---|---|
| command | `{record.command}` |
| started from | `{network.name}`, {network.source}; SHA-256 `{network.digest}` |
| images | {data.source}; SHA-256 `{data.digest}` |
| weights | `{weights}`; SHA-256 `{known}` |
| epoch kept | {record.history.best} of {config.epochs}, the best on validation images under W₂ |
| code | `wdat_core.py`; SHA-256 `{record.core}` |
| finished | {record.created} |

The configuration, seed included:

```json
{json.dumps(record.stored()["config"], indent=1)}
```

## Accuracy

In per cent, on {data.test:,} test images that training did not see. ± is half of a 95 % interval of sampling those
images, for a change that of the paired differences. It does not hold what another seed of the training would change.

| attack | before | after | change |
|---|---|---|---|
{chr(10).join(rows)}

## Limits

An accuracy under attack is an upper bound: a stronger attack, AutoAttack among them, may find less. The numbers are
for images like those named above, for perturbations of at most {size} in the {"l_inf" if norm == "Linf" else "l_2"}
norm (pointwise, W∞; in the mean, W₂), and say nothing of other images, sizes or norms. Nothing here is fit to protect
people or property.

## Licence

{licence}.
"""
