"""Parameters of notebooks, checked: strict types, and one sentence for whatever is wrong.

Nothing here imports torch: parameters are checked before it is loaded."""

from __future__ import annotations

import difflib
import types
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError


class ParameterError(ValueError):
    """Something that the user can put right. A notebook shows the message and no traceback."""

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]


class Checked(BaseModel):
    """Parameters of which True is no number, nor "2" or NaN.

    Raises:
        ParameterError: a parameter is not known, has a wrong type, or an impossible value.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, **given: Any) -> None:
        try:
            super().__init__(**given)
        except ValidationError as error:
            raise ParameterError(_in_words(error.errors()[0], list(type(self).model_fields))) from None


def variables(namespace: dict[str, Any], known: Sequence[str]) -> dict[str, Any]:
    """The parameters among the variables of a notebook's namespace, its `globals()`.

    Raises:
        ParameterError: a variable is none of those that are known.
    """
    # In a live notebook the cell is run again when the names of all later cells are there as well.
    again = namespace.get("_parameters_were_checked", False)
    given = {}
    for name, value in namespace.items():
        if name.startswith("_") or name in ("In", "Out") or isinstance(value, types.ModuleType) or callable(value):
            continue
        if name in known:
            given[name] = value
        elif not again:
            raise ParameterError(unknown(name, known))
    namespace["_parameters_were_checked"] = True
    return given


def _in_words(error: Any, known: Sequence[str]) -> str:
    """One of pydantic's errors as one sentence."""
    name, value = str(error["loc"][0]), error["input"]
    if error["type"] == "extra_forbidden":
        return unknown(name, known)
    context = error.get("ctx", {})
    wanted = {
        "float_type": "a number",
        "int_type": "a whole number",
        "int_from_float": "a whole number",
        "string_type": "a text",
        "bool_type": "True or False",
        "finite_number": "a finite number",
        "literal_error": context.get("expected"),
        "greater_than": f"above {context.get('gt')}",
        "greater_than_equal": f"at least {context.get('ge')}",
        "less_than": f"below {context.get('lt')}",
        "less_than_equal": f"at most {context.get('le')}",
        "value_error": context.get("error"),
    }[error["type"]]
    wanted = str(wanted).removesuffix(".0")
    return f"{name} must be {'a number, a text, True or False' if name == 'value' else wanted}, not {value!r}"


def unknown(name: str, known: Sequence[str]) -> str:
    """What to say of a parameter that there is none of."""
    near = difflib.get_close_matches(name, known, n=1)
    hint = f": did you mean {near[0]!r}?" if near else "."
    return f"unknown parameter {name!r}{hint} Known are {', '.join(known)}"
