# SPDX-License-Identifier: Apache-2.0
"""The trie of a catalogue's token sequences. This room knows only integers."""

from .arrays import TRIE_FILE, check_regular, flatten_sequences, read_checksum, replacing
from .compressed import CompressedTrie
from .item_trie import ItemTrie
from .ragged import logsumexp_by_row, pad_rows, ragged_arange
from .sequence_index import FIRST_VECTOR_TOKEN
from .subset import subset


__all__ = [
    "CompressedTrie",
    "FIRST_VECTOR_TOKEN",
    "ItemTrie",
    "TRIE_FILE",
    "check_regular",
    "flatten_sequences",
    "logsumexp_by_row",
    "pad_rows",
    "ragged_arange",
    "read_checksum",
    "replacing",
    "subset",
]
