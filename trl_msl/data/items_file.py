# SPDX-License-Identifier: Apache-2.0
"""The file of a catalogue's items, which may come from anyone."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..trie import check_regular, replacing


ITEMS_FILE = "items.parquet"
_TEMPLATE_KEY = b"trl_msl_template"
_ENTITIES_KEY = b"trl_msl_html_entities"
_COLUMNS = ["id", "text"]
_MAX_SMALL, _MAX_RATIO = 64 << 20, 100  # titles compress by less than 10


def write_items(folder: Path, ids: list[str], texts: list[str], template: str, html_entities: str) -> None:
    """Write items, with the template and `html_entities` as metadata."""
    metadata = {_TEMPLATE_KEY: template, _ENTITIES_KEY: html_entities}
    schema = pa.schema([(name, pa.string()) for name in _COLUMNS], metadata)
    with replacing(folder / ITEMS_FILE) as temporary:
        pq.write_table(pa.table([ids, texts], schema=schema), temporary)


def read_items_file(folder: Path) -> tuple[list[str], list[str], str, str]:
    """
    What `write_items` wrote; `html_entities` is `"keep"` in files of earlier versions, which lack it. Memory stays in
    proportion to the size of the file, unless the sizes in its metadata are false.

    Raises:
        `ValueError`, `OSError` or `pyarrow.ArrowException`: if the file can't be read.
    """
    path = folder / ITEMS_FILE
    check_regular(path)
    with pq.ParquetFile(path) as file:
        schema, metadata = file.schema_arrow, file.metadata
    if not all(schema.get_field_index(name) >= 0 and schema.field(name).type == pa.string() for name in _COLUMNS):
        raise ValueError(f"it must have the columns {_COLUMNS}, both strings, but has {schema}")
    if _TEMPLATE_KEY not in (schema.metadata or {}):
        raise ValueError("it has no template")
    size = path.stat().st_size
    limit = _MAX_SMALL + _MAX_RATIO * size
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    num_rows = sum(group.num_rows for group in groups)
    if num_rows > size:  # ids are unique, so each takes at least a byte
        raise ValueError(f"it would unpack to {num_rows} rows, more than it has bytes")
    unpacked = sum(
        group.column(index).total_uncompressed_size for group in groups for index in range(group.num_columns)
    )
    if unpacked > limit:
        raise ValueError(f"it would unpack from {size} bytes to {unpacked}")
    columns, decoded = {name: [] for name in _COLUMNS}, 0
    # A text that occurs often is stored once: as a dictionary it can be measured before it is repeated
    with pq.ParquetFile(path, read_dictionary=_COLUMNS) as file:
        for batch in file.iter_batches(1 << 13, columns=_COLUMNS):
            for name, values in columns.items():
                column = batch[name]
                decoded += pc.sum(pc.take(pc.binary_length(column.dictionary), column.indices)).as_py() or 0
                if decoded > limit:
                    raise ValueError(f"it would unpack from {size} bytes to more than {limit}")
                column = column.cast(pa.string())
                column.validate(full=True)  # a text that is not UTF-8, for example
                values += column.to_pylist()
    ids, texts = columns.values()
    return ids, texts, schema.metadata[_TEMPLATE_KEY].decode(), schema.metadata.get(_ENTITIES_KEY, b"keep").decode()
