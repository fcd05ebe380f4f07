"""Dicts that Arrow has merged: all of a column have the same keys, with null for missing ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def has_struct(feature: Any) -> bool:
    """Whether a column's values are or contain structs, whose keys Arrow merges."""
    if isinstance(feature, (dict, list)):
        return True
    inner = getattr(feature, "feature", None)  # of a List
    return inner is not None and has_struct(inner)


def without_nulls(row: Mapping[str, Any], columns: frozenset[str]) -> tuple[dict[str, Any], bool]:
    """The row without the nulls that Arrow put into dicts, and whether a nested dict had any.

    A null that is a message's content stays, since messages with tool calls have it.
    """
    out, had_nulls = dict(row), False
    for key in columns:
        value, in_column = _without_nulls(out.get(key), depth=0)
        out[key], had_nulls = value, had_nulls or in_column
    return out, had_nulls


def _without_nulls(value: Any, depth: int) -> tuple[Any, bool]:
    if isinstance(value, list):
        parts = [_without_nulls(v, depth) for v in value]
        return [v for v, _ in parts], any(had_nulls for _, had_nulls in parts)
    if not isinstance(value, dict):
        return value, False
    items = {
        k: v for k, v in value.items() if v is not None or (k == "content" and "role" in value)
    }
    inner = {k: _without_nulls(v, depth + 1) for k, v in items.items()}
    had_nulls = depth > 0 and len(items) < len(value)
    had_nulls = had_nulls or any(nested for _, nested in inner.values())
    return {k: v for k, (v, _) in inner.items()}, had_nulls


def merged_columns(batch: Mapping[str, list], names: Iterable[str | None]) -> frozenset[str]:
    """Those of a batch's columns that Arrow seems to have merged, for a stream of unknown features.

    After a merge the dicts at the same place have the same keys in every row. Without one the
    arguments of different tool calls have different keys.
    """
    return frozenset(n for n in names if n is not None and _have_same_keys(batch.get(n, [])))


def _have_same_keys(values: list) -> bool:
    """Whether all dicts at the same place in these values have the same keys, recursively."""
    dicts = [v for v in values if isinstance(v, dict)]
    if any(list(d) != list(dicts[0]) for d in dicts):
        return False
    inside = [[item for v in values if isinstance(v, list) for item in v]]
    inside += [[d[key] for d in dicts] for key in (dicts[0] if dicts else ())]
    return all(_have_same_keys(part) for part in inside if part)
