# SPDX-License-Identifier: Apache-2.0
"""
Write items as semantic ids, codes by residual quantisation of their titles' embeddings, and give a model their tokens.

```bash
trl-msl semantic-ids --model_name_or_path Qwen/Qwen3-0.6B --items items.csv --output_dir outputs/semantic
trl-msl train --config recipes/configs/semantic_ids.yaml --interactions log.parquet --output_dir outputs/mine/semantic
```

`output_dir` then holds the model and its tokenizer with the new tokens, `items.json` with the id of each item, such as
`<a_12><b_7><c_201>`, `title_rows.jsonl` with a row for each title, to train on as well (`--extra_rows`), and the
quantiser, by which `trl-msl update-catalog --semantic_ids` gives ids to new items.

An embedding is the mean of the last hidden states over a title's tokens. `item_vectors` takes other vectors.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file
from trl import ModelConfig

from ..data import (
    ItemCatalog,
    SemanticIds,
    encode_items,
    encode_prompts,
    read_item_vectors,
    read_items,
    texts_with_special_tokens,
)
from ..model import add_embeddings, embed_titles, embedding_names
from ..recommender import load_causal_lm
from .command_line import command
from .derived import new_folder
from .loading import TRAINABLE_TOKENS_FILE, load_model, load_tokenizer
from .outputs import write_json, write_table


TITLE_PROMPT = "Which item has this title?\n{title}\n\n### Response:\n"


@dataclass
class SemanticIdsArguments:
    """
    Arguments of this command, besides those of the model.

    Parameters:
        items (`str`):
            Items: a table, or a JSON file that maps ids to titles.
        output_dir (`str`):
            Folder to write, which must not exist.
        item_vectors (`str`, *optional*):
            Vectors to quantise in place of the titles' embeddings, as for [`read_item_vectors`].
        num_levels, codebook_size, seed (`int`, *optional*, defaults to `3`, `256` and `0`):
            As for [`SemanticIds.fit`].
        batch_size (`int`, *optional*, defaults to `32`):
            Titles to embed at a time.
        item_column, text_column (`str`, *optional*):
            Columns of `items`.
        empty_texts, html_entities (`str`, *optional*):
            As for [`ItemCatalog`].
    """

    items: str = field(metadata={"help": "Items: CSV, TSV, JSONL, Parquet, Hub dataset or JSON."})
    output_dir: str = field(metadata={"help": "Folder to write, which must not exist."})
    item_vectors: str | None = field(default=None, metadata={"help": "Vectors of the items, in place of embeddings."})
    num_levels: int = field(default=3, metadata={"help": "Number of codes of an item."})
    codebook_size: int = field(default=256, metadata={"help": "Number of codes to choose from, a power of two."})
    seed: int = field(default=0, metadata={"help": "Seed of the quantiser."})
    batch_size: int = field(default=32, metadata={"help": "Titles to embed at a time."})
    item_column: str = field(default="item_id", metadata={"help": "Id column of the items."})
    text_column: str = field(default="title", metadata={"help": "Text column of the items."})
    empty_texts: str = field(default="error", metadata={"help": "Items without text: 'error', 'keep' or 'id'."})
    html_entities: str = field(default="keep", metadata={"help": "HTML entities in texts: 'keep' or 'decode'."})


def main(args: SemanticIdsArguments, model_args: ModelConfig) -> None:
    name = model_args.model_name_or_path
    if find_adapter_config_file(name, revision=model_args.model_revision) is not None:
        raise ValueError(f"`model_name_or_path` = {name!r} is an adapter: merge it first (`trl-msl merge`).")
    with new_folder(args.output_dir) as folder:
        tokenizer = load_tokenizer(model_args)
        policies = {"empty_texts": args.empty_texts, "html_entities": args.html_entities}
        titles = read_items(args.items, args.item_column, args.text_column, **policies)
        SemanticIds.check_options(len(titles), args.num_levels, args.codebook_size)
        model = load_model(model_args)
        encoded, first = split_titles(tokenizer, titles.texts)
        if args.item_vectors is None:
            vectors = embed_titles(model, encoded, first, args.batch_size)
        else:
            vectors = read_item_vectors(args.item_vectors, titles)
        quantizer = SemanticIds.fit(vectors, args.num_levels, args.codebook_size, args.seed)
        codes = quantizer.encode(vectors)
        texts = quantizer.write(codes)
        tokens = add_tokens(tokenizer, quantizer.tokens, texts)
        add_embeddings(model, tokens, encoded, codes + torch.arange(args.num_levels) * args.codebook_size)
        folder.mkdir(parents=True)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        quantizer.save_pretrained(folder)
        write_json(folder / TRAINABLE_TOKENS_FILE, dict.fromkeys(embedding_names(model), tokens))
        write_json(folder / "items.json", dict(zip(titles.ids, texts)))
        write_table(folder / "title_rows.jsonl", title_rows(tokenizer, titles.texts, texts))
    num_codes, num_ids = len({tuple(row) for row in codes.tolist()}), len(set(texts))
    print(f"{len(texts):,} items: {num_codes:,} different codes, {num_ids:,} different ids.\n{args.output_dir}")


def code_new_items(items: ItemCatalog, folder: str, source: str | None, taken: Sequence[str]) -> ItemCatalog:
    """
    New items with semantic ids in place of titles, by the quantiser in a folder that this command wrote.

    Args:
        items ([`ItemCatalog`]):
            The new items, with titles.
        folder (`str`):
            That folder. The model in it, not trained since, embeds the titles as it did then.
        source (`str`, *optional*):
            File of the items' vectors, if the others' came from a file too.
        taken (`Sequence[str]`):
            Ids of the items that there are already.

    Raises:
        `ValueError`: if those are not semantic ids, or the folder was not written by this command.
    """
    quantizer = SemanticIds.from_pretrained(folder)
    if others := [text for text in taken if not quantizer.has_written(text)]:
        raise ValueError(
            f"`semantic_ids` = {folder!r}: the model's catalogue has {len(others)} items with other texts, such as "
            f"{others[0]!r}. Leave it out for a model that was trained on titles."
        )
    written = json.loads(Path(folder, "items.json").read_text(encoding="utf-8")).values()
    if unknown := set(written) - set(taken):
        raise ValueError(
            f"`semantic_ids` = {folder!r}: {len(unknown)} of its ids, such as {min(unknown)!r}, are not in the "
            "model's catalogue. Name the folder that the model was trained from."
        )
    if source is None:
        model, tokenizer = load_causal_lm(folder, dtype="auto"), AutoTokenizer.from_pretrained(folder)
        vectors = embed_titles(model, *split_titles(tokenizer, items.texts))
    else:
        vectors = read_item_vectors(source, items)
    return ItemCatalog(items.ids, quantizer.write(quantizer.encode(vectors), taken))


def split_titles(tokenizer: PreTrainedTokenizerBase, titles: Sequence[str]) -> tuple[list[list[int]], list[int]]:
    """Token ids of titles, and what stands before them: BOS or, if the tokenizer puts nothing there, EOS."""
    (first,) = encode_prompts(tokenizer, [""])
    return [ids[len(first) :] for ids in encode_prompts(tokenizer, titles)], first or [tokenizer.eos_token_id]


def add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: list[str], texts: Sequence[str]) -> list[int]:
    """
    Add the tokens of semantic ids to a tokenizer, ordinary ones, as item text is cut within special tokens.

    Returns:
        `list[int]`: their ids.

    Raises:
        `ValueError`: if it has some of them already, or reads one of the `texts`, the items' ids, in another way.
    """
    if known := set(tokens) & tokenizer.get_vocab().keys():
        raise ValueError(
            f"`model_name_or_path` has {len(known)} of the tokens already, such as {min(known)!r}: pass the model "
            "without semantic ids, or add items by `trl-msl update-catalog --semantic_ids`."
        )
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    for text, ids in zip(texts, encode_items(tokenizer, texts)):
        found = tokenizer.convert_ids_to_tokens(ids[:-1])
        if "".join(found) != text or not set(found) <= set(tokens):
            raise ValueError(
                f"`model_name_or_path`: its tokenizer reads {text!r} as {found}, not as one token for each code: use "
                "another model."
            )
    return tokenizer.convert_tokens_to_ids(tokens)


def title_rows(tokenizer: PreTrainedTokenizerBase, titles: Sequence[str], texts: Sequence[str]) -> pd.DataFrame:
    """
    Rows whose prompt is a title and whose completion is the item's semantic id: the first of LC-Rec's alignment tasks.
    The other way round, completions would not be items. Empty titles are left out, and those that spell out a special
    token, which would be one in a prompt.
    """
    left_out = {*texts_with_special_tokens(tokenizer, titles), *(title for title in titles if not title.strip())}
    rows = [(TITLE_PROMPT.format(title=title), text) for title, text in zip(titles, texts) if title not in left_out]
    return pd.DataFrame(rows, columns=["prompt", "completion"])


run = command(main)


if __name__ == "__main__":
    run()
