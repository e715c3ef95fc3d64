# SPDX-License-Identifier: Apache-2.0
"""Tables of interactions and items: their files, ids and times."""

from __future__ import annotations

import ast
import gzip
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from datasets import Dataset, load_dataset

from .catalog import is_unicode


Source = str | Path | Dataset | pd.DataFrame
_FILE = re.compile(
    r".*\.(?:(csv|tsv)(?:\.(?:gz|bz2|xz|zip|zst))?|(jsonl|ndjson)(?:\.gz)?|(parquet))", re.IGNORECASE | re.DOTALL
)
_ITEM = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|\d+)"""
# With commas: NumPy writes ['a' 'b'], which Python would read as ['ab']
_PYTHON_LIST = re.compile(rf"\[\s*{_ITEM}(?:\s*,\s*{_ITEM})*\s*,?\s*\]")
_HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


def read_table(source: Source, columns: list[str]) -> tuple[pd.DataFrame, str]:
    """
    The rows of a table, and its name for error messages.

    Args:
        source (`str`, `Path`, [`~datasets.Dataset`] or `pandas.DataFrame`):
            The table; its file, which is `.csv`, `.tsv` or `.jsonl`, also compressed (`.csv.gz`), or `.parquet`; or
            the name of a Hub dataset, of which the train split is read.
        columns (`list[str]`):
            Columns that the table must have once. It may have others.

    Returns:
        `tuple[pandas.DataFrame, str]`. Cells of a CSV or TSV file are strings as written, empty ones missing values.

    Raises:
        `ValueError`: if the table can't be read, has no rows, or lacks a column.
    """
    name = str(source) if isinstance(source, str | Path) else f"the {type(source).__name__}"
    try:
        table, names = _read(source)
    except Exception as error:  # the parsers of formats and compressions raise errors of many kinds
        raise ValueError(f"{name} cannot be read: {error}. Check its path, type and format.") from error
    if repeated := [column for column in columns if names.count(column) > 1]:
        raise ValueError(f"{name} has the columns {repeated} more than once: rename or drop the others.")
    if missing := [column for column in columns if column not in table.columns]:
        # The lists of users and windows are always named so
        remedy = "rename them" if "item_ids" in missing else "pass their names, as in `item_column`, or rename them"
        raise ValueError(f"{name} lacks the columns {missing} and has {list(table.columns)}: {remedy}.")
    if table.empty:
        raise ValueError(f"{name} has no rows: check how it was written.")
    return table, name


def _read(source: Source) -> tuple[pd.DataFrame, list[str]]:
    """The table, and the names of its columns as they are written."""
    if isinstance(source, str | Path):
        kind = _kind(source)
        if kind in ("csv", "tsv"):
            return _read_csv(str(source), "," if kind == "csv" else "\t")
        table = {"parquet": _read_parquet, "hub": _read_hub}.get(kind, _read_jsonl)(str(source))
    elif isinstance(source, Dataset | pd.DataFrame):
        table = source.to_pandas() if isinstance(source, Dataset) else source
    else:
        raise ValueError("it must be a DataFrame, one Dataset, a file, or a Hub dataset's name")
    return table, list(table.columns)


def _kind(source: str | Path) -> str:
    """What a name stands for: `hub`, or the format of a file."""
    name = str(source)
    found = _FILE.fullmatch(name)
    if "://" not in name and not Path(name).exists():
        if isinstance(source, str) and not found and _HUB_NAME.fullmatch(name):
            return "hub"
        raise ValueError("No such file")
    if found:
        return found[found.lastindex].lower()
    if isinstance(source, str) and Path(name).is_dir():  # a dataset as the Hub has it
        return "hub"
    raise ValueError("its format is not known: it must be .csv, .tsv, .jsonl (also .gz) or .parquet")


def _read_csv(name: str, separator: str) -> tuple[pd.DataFrame, list[str]]:
    # Only strings, so that ids keep leading zeros, and "NA" is an id: only empty cells are missing
    options = {"sep": separator, "dtype": str, "keep_default_na": False}
    table = pd.read_csv(name, na_values=[""], **options)
    if not isinstance(table.index, pd.RangeIndex):  # pandas has made an index of surplus cells
        raise ValueError("its rows have more cells than its header; quote cells that hold commas")
    # Read the header again, as pandas has renamed the second of two columns with the same name
    return table, pd.read_csv(name, header=None, nrows=1, **options).iloc[0].tolist()


def _read_jsonl(name: str) -> pd.DataFrame:
    # Not by pandas, which may make dates of numbers
    rows, opened = [], gzip.open if name.lower().endswith(".gz") else open
    with opened(name, "rt", encoding="utf-8-sig") as file:
        for line in filter(str.strip, file):
            rows.append(json.loads(line))
            if "\\u" in line and not is_unicode(json.dumps(rows[-1], ensure_ascii=False)):
                raise ValueError(f"a line holds half a character: {line[:200]!r}")
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError("it must have lines, each a JSON object")
    return pd.DataFrame(rows)


def _read_parquet(name: str) -> pd.DataFrame:
    table = pq.read_table(name)
    table.validate(full=True)  # for example, whether texts are UTF-8
    # Without pandas' notes on types and index: in files from elsewhere they can be anything
    table = table.select([column for column in table.column_names if not column.startswith("__index_level_")])
    return table.to_pandas(ignore_metadata=True)


def _read_hub(name: str) -> pd.DataFrame:
    try:
        return load_dataset(name, split="train").to_pandas()
    except Exception as error:
        raise ValueError(f"it is not a file, and as a dataset on the Hub: {error}") from error


def ids_as_strings(column: pd.Series, name: str) -> pd.Series:
    """Ids as they are written. Raises a `ValueError` where they are missing or neither strings nor integers."""
    strings = column.astype(str)
    _reject((column.isna() | (strings == "")).to_numpy(dtype=bool), column, name, "an id")
    kind = pd.api.types.infer_dtype(column.astype(object))  # as objects, so that categories are judged by their values
    if kind not in ("string", "integer"):  # not "floating": str(12.0) is another id than str(12)
        raise ValueError(f"{name}: {column.name!r} has {kind} ids: make all strings or, by astype('int64'), integers.")
    return strings


def parse_list(text: str) -> list | None:
    """The list in a text, in JSON or Python syntax; `None` for any other text."""
    try:
        items = json.loads(text)
    except (ValueError, RecursionError):
        try:
            items = ast.literal_eval(text.strip()) if _PYTHON_LIST.fullmatch(text.strip()) else None
        except (ValueError, SyntaxError):
            return None
    return items if isinstance(items, list) else None


def as_timestamps(column: pd.Series, name: str) -> np.ndarray:
    """Numbers as they are, dates as seconds since 1970; int64 if all are whole, otherwise float64."""
    numbers = pd.to_numeric(column, errors="coerce")
    if pd.api.types.is_datetime64_any_dtype(column) or numbers.isna().all():
        dates = pd.to_datetime(column, format="ISO8601", utc=True, errors="coerce")
        try:  # in microseconds, as nanoseconds reach only from 1677 to 2262
            numbers = (dates.dt.as_unit("us") - pd.Timestamp(0, tz="UTC").as_unit("us")).dt.total_seconds()
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{name}: {column.name!r} holds dates out of range ({error}): fix or drop.") from error
    floats = numbers.to_numpy(np.float64, na_value=np.nan)
    invalid = ~np.isfinite(floats)
    if invalid.any() and numbers.notna().any():
        _reject_mixed(numbers, column, name)
    _reject(invalid, column, name, "a number or an ISO 8601 date")
    exact = pd.api.types.is_signed_integer_dtype(numbers) or ((floats % 1 == 0) & (np.abs(floats) < 2**53)).all()
    return numbers.to_numpy(np.int64) if exact else floats


def _reject_mixed(numbers: pd.Series, column: pd.Series, name: str) -> None:
    """Raise a `ValueError` if some of the values that are not numbers are dates."""
    others = column[numbers.isna().to_numpy()]
    dates = others[pd.to_datetime(others, format="ISO8601", utc=True, errors="coerce").notna().to_numpy()]
    if len(dates):
        number = column[numbers.notna().to_numpy()].iloc[0]
        raise ValueError(
            f"{name}: {column.name!r} mixes {numbers.notna().sum()} numbers, such as {number!r}, with {len(dates)} "
            f"ISO 8601 dates, such as {dates.iloc[0]!r}: write all of them alike."
        )


def _reject(invalid: np.ndarray, column: pd.Series, name: str, expected: str) -> None:
    if len(rows := np.flatnonzero(invalid)):
        raise ValueError(
            f"{name}: {column.name!r} must hold {expected}, but {len(rows)} of {len(column)} rows do not (the first: "
            f"{rows[:5].tolist()}, with {repr(column.iloc[rows[0]])[:200]}): fix or drop them."
        )
