"""A record as it is not: for tests of what draws on records."""

import dataclasses


def altered(record, config=None, history=None, **parts):
    """The record with other parts, unchecked; `config` and `history` say which of their fields are other."""
    if config:
        parts["config"] = dataclasses.replace(record.config, **config)
    if history:
        parts["history"] = record.history.model_copy(update=history)
    return record.model_copy(update=parts)
