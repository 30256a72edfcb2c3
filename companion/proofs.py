"""Records of certified distances: below which it is proved that no image at all is read wrongly.

    python -m companion.proofs NETWORK... --data data --test-images 10000

The record goes to runs/; with one in results/ the page "How robust is it really" shows what lies between the proof and
the attack.
"""

from __future__ import annotations

import functools
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from companion.bench import begin, bench, data_words, each_network, network_words, recorded
from companion.certified import certified_distances
from companion.parts import CertifiedConfig
from companion.settings import ParameterError, Settings
from companion.values import pack_floats

METHOD = "CROWN (Zhang et al., 2018)"
MOST, BISECTIONS = 16 / 255, 8


def certify_each(settings: Sequence[Settings], *, most: float = MOST, bisections: int = BISECTIONS) -> list[Any]:
    """For each of the settings a record of kind "certified", of the test images.

    Raises:
        ParameterError: as `bench`; or the norm is not l_inf, or the network has a layer that is not handled.
    """
    records = []
    for one in settings:
        if one.norm != "Linf":
            raise ParameterError(f"norm must be Linf for certified distances, not {one.norm!r}")
        on = bench(one)
        config = CertifiedConfig(norm="Linf", most=most, bisections=bisections, method=METHOD)
        network, data = shlex.quote(network_words(str(one.network))), shlex.quote(data_words(one))
        command = f"python -m companion.proofs {network} --data {data} --test-images {one.test_images}"
        measure = functools.partial(_measured, on, config)
        records.append(recorded(begin("certified", on, ("test",), config), on, command, measure))
    return records


def _measured(on: Any, config: CertifiedConfig) -> dict[str, Any]:
    x, y = on.data.test
    distance = certified_distances(on.model, x, y, most=config.most, bisections=config.bisections)
    return {"distance": pack_floats(rounded_down(distance))}


def rounded_down(distance: Tensor) -> Tensor:
    """Distances in float32, none of them above what was proved."""
    near = distance.float()
    return torch.where(near.double() > distance.double(), near.nextafter(torch.zeros_like(near)), near)


def main(arguments: list[str]) -> None:
    each_network("proofs", __doc__, arguments, 10_000, certify_each)


if __name__ == "__main__":
    main(sys.argv[1:])
