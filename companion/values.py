"""What can stand in a record: its types, and how a configuration and the bits of images are written."""

from __future__ import annotations

import base64
import dataclasses
import math
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, PlainSerializer, PlainValidator, StringConstraints
from pydantic_core import PydanticCustomError

from wdat_core import FinetuneConfig, Threat, WdatError

if TYPE_CHECKING:
    from torch import Tensor

TEXT = r"[^<>\[\]|`\n]+"  # shown within Markdown: nothing in it may be markup


def plain(value: Any) -> Any:
    """A configuration as JSON can hold it: infinity as a text."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return "inf" if value == math.inf else value


def _with_infinity(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a configuration as they were before `plain`."""
    return {k: math.inf if isinstance(v, str) and v == "inf" else v for k, v in fields.items()}


def accuracy_name(threat: Threat) -> str:
    """The name in a history of the accuracy under a threat: "w_2", "w_inf", "w_4"."""
    return f"w_{threat.p:g}"


def pack(correct: Tensor) -> str:
    """Bools (n,) as text, eight to a byte."""
    import numpy as np

    return base64.b64encode(np.packbits(correct.cpu().numpy()).tobytes()).decode()


def unpack(text: str, n: int) -> Any:
    """What `pack` packed, as a numpy array of n floats 0 or 1."""
    import numpy as np

    return np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8), count=n).astype(float)


def pack_floats(values: Tensor) -> str:
    """Numbers (n,) as text, float32."""
    return base64.b64encode(values.cpu().numpy().astype("<f4").tobytes()).decode()


def unpack_floats(text: str) -> Any:
    """What `pack_floats` packed, as a numpy array of float64."""
    import numpy as np

    return np.frombuffer(base64.b64decode(text), "<f4").astype(float)


def _distances(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("not distances")
    try:
        numbers = unpack_floats(base64.b64encode(base64.b64decode(value, validate=True)).decode())
    except ValueError as error:
        raise ValueError("not distances") from error
    if not (numbers >= 0).all():
        raise ValueError("a distance is negative or not a number")
    return value


def _within(low: float, high: float) -> PlainValidator:
    """A number in a range, left as it is: 1 does not become 1.0, and True is no number."""

    def check(value: Any) -> Any:
        if type(value) not in (int, float) or not low <= value <= high:
            raise PydanticCustomError("range", "not in the range")
        return value

    return PlainValidator(check)


def _threat(value: Any) -> Threat:
    if isinstance(value, Threat):
        return value
    return _of_the_core(Threat, _with_infinity(_table("the threat", value)))


def finetune_config(value: Any) -> FinetuneConfig:
    """A configuration that wdat_core would run; a field that came later than the record has its default."""
    if not isinstance(value, FinetuneConfig):
        fields = _with_infinity(_table("it", value))
        fields = fields | ({"threat": _threat(fields["threat"])} if "threat" in fields else {})
        value = _of_the_core(FinetuneConfig, fields)
    for name, one in vars(value).items():
        if callable(one) or (isinstance(one, str) and not re.fullmatch(TEXT, one)):
            raise ValueError(f"{name} cannot be {one!r} in a record")
    return value


def _table(what: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what} cannot be {value!r:.100}")
    return value


def _of_the_core(kind: Callable[..., Any], fields: dict[str, Any]) -> Any:
    try:
        return kind(**fields)
    except (TypeError, WdatError) as error:  # an unknown field, or an impossible value
        raise ValueError(str(error)) from error


_AS_JSON = PlainSerializer(lambda value: plain(dataclasses.asdict(value)))
Text = Annotated[str, StringConstraints(pattern=f"^{TEXT}$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=1, lt=10**9)]
Whole = Annotated[int, Field(ge=0, lt=10**9)]
Label = Annotated[int, Field(ge=0, lt=1000)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Fraction = Annotated[float, _within(0, 1)]
Amount = Annotated[float, _within(0, sys.float_info.max)]
Value = Annotated[float, _within(-sys.float_info.max, sys.float_info.max)]
ThreatField = Annotated[Threat, PlainValidator(_threat), _AS_JSON]
ConfigField = Annotated[FinetuneConfig, PlainValidator(finetune_config), _AS_JSON]
Distances = Annotated[str, PlainValidator(_distances)]  # float32, of the images in their order; inf: none was found
Scores = dict[str, dict[str, Fraction]]  # of images ("before", "after", "test", ...), under an attack ("w_2", ...)
Bits = dict[str, dict[str, str]]  # which of these images are classified correctly, as `pack` has it
