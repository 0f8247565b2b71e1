"""Columns that pass through with the documents: one type for each, settled over all files before any work is done.

Whole numbers and floating ones together become doubles, whole numbers of several widths int64; a column that is missing
in a file is null there. Any other mixture is an error that names the two files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from prep.documents import DOCUMENT, Columns, Input
from shards.errors import UserError


def settle_schema(found: Sequence[tuple[Input, dict[str, pa.DataType]]], columns: Columns) -> pa.Schema:
    """The schema of the documents of all files.

    Args:
        found: the files, and the columns that were found in each.
        columns: those to keep.

    Raises:
        UserError: a column that no file has, that cannot be kept, or whose types do not go together.
    """
    fields = list(DOCUMENT)
    for name in columns.keep:
        if name in DOCUMENT.names or name == columns.text or columns.keep.count(name) > 1:
            raise UserError(f"column '{name}' cannot be kept beside the documents: it is there already")
        kind, first = pa.null(), None
        for item, types in found:
            if name not in types:
                continue
            other = _plain(types[name], item, name)
            merged = _merge(kind, other)
            if merged is None:
                raise UserError(
                    f"column '{name}' holds {kind} in {first.path if first else ''} and {other} in {item.path}; "
                    f"give it one type in all files, or do not keep it"
                )
            first = item if pa.types.is_null(kind) else first
            kind = merged
        if not any(name in types for _, types in found):
            known = ", ".join(dict.fromkeys(other for _, types in found for other in types)) or "none"
            raise UserError(f"no file has a column '{name}' to keep; columns found: {known}")
        fields.append(pa.field(name, pa.string() if pa.types.is_null(kind) else kind))
    return pa.schema(fields)


def fit(name: str, value: Any, kind: pa.DataType) -> Any:
    """A JSON value as one of a column's type.

    Raises:
        ValueError: it is of another type.
    """
    if value is None:
        return None
    if pa.types.is_string(kind):
        if isinstance(value, str):
            return value
    elif pa.types.is_boolean(kind):
        if isinstance(value, bool):
            return value
    elif isinstance(value, int | float) and not isinstance(value, bool):
        try:
            if pa.types.is_floating(kind):
                return float(value)
            if isinstance(value, int):
                return pa.scalar(value, kind).as_py()
        except (OverflowError, pa.ArrowException):
            pass
    shown = repr(value)
    raise ValueError(f"column '{name}' holds {shown if len(shown) < 40 else shown[:40] + ' …'}, not {kind}")


def _plain(kind: pa.DataType, item: Input, name: str) -> pa.DataType:
    """The type without its storage form."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    binary = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)
    if pa.types.is_nested(kind) or any(test(kind) for test in binary):
        what = "bytes" if not pa.types.is_nested(kind) else "nested values (objects or arrays)"
        raise UserError(
            f"{item.path}: column '{name}' holds {what}; only text, numbers, times and booleans can be kept"
        )
    return kind


def _merge(a: pa.DataType, b: pa.DataType) -> pa.DataType | None:
    if pa.types.is_null(a) or a == b:
        return b
    if pa.types.is_null(b):
        return a
    if pa.types.is_integer(a) and pa.types.is_integer(b):
        return pa.int64()
    if all(pa.types.is_integer(kind) or pa.types.is_floating(kind) for kind in (a, b)):
        return pa.float64()
    return None
