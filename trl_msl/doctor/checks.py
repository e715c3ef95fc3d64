# SPDX-License-Identifier: Apache-2.0
"""What is known to go wrong with recommenders of this kind, each looked for in data, tokenizer and model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, DatasetDict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data import ItemCatalog, RankingTask, build_rows, describe_end
from ..decoding import TrieDecoder, TrieLogitsProcessor
from ..model import check_head, head_projection
from ..trie import ItemTrie


_COMMON_MAX_NEW_TOKENS = 128  # of published code
_TOP_K = 10


@dataclass(frozen=True)
class Finding:
    """
    What a check found.

    Args:
        what (`str`):
            What was looked at.
        status (`str`):
            `"ok"`, `"note"` (something to know) or `"error"`.
        seen (`str`):
            What was seen: counts, and the first example.
        advice (`str`, *optional*, defaults to `""`):
            What to do about it.
    """

    what: str
    status: str
    seen: str
    advice: str = ""


@dataclass(frozen=True)
class Case:
    """What is examined, with what several checks need of it. See [`diagnose`]."""

    task: RankingTask
    windows: DatasetDict
    model: PreTrainedModel | None
    max_rows: int

    @property
    def catalog(self) -> ItemCatalog:
        return self.task.catalog

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.task.tokenizer

    @property
    def trie(self) -> ItemTrie:
        return self.task.trie

    @cached_property
    def rows(self) -> Dataset:
        """Rows of the first windows of the first split."""
        windows = next(iter(self.windows.values()))
        return build_rows(windows.select(range(min(self.max_rows, len(windows)))), self.task)

    @cached_property
    def sample(self) -> list[str]:
        """Items as they are written, spread over the catalogue."""
        return self.catalog.completions[:: max(1, len(self.catalog) // self.max_rows)]

    @cached_property
    def targets(self) -> torch.Tensor:
        """Trie node of the first targets of the first split."""
        windows = next(iter(self.windows.values()))
        indices = self.catalog.indices(ids[-1] for ids in windows["item_ids"][:100_000])
        return self.trie.item_nodes[indices].long()

    def prompts(self, rows: Dataset) -> list[list[int]]:
        """Token ids of the prompts of rows, however long."""
        return self.task.fit_prompts(rows[:], [float("inf")] * len(rows))

    def ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]


# ---------------------------------------------------------------------- texts


def _check_texts(case: Case) -> Iterator[Finding]:
    texts = case.catalog.texts
    empty = [item for item, text in zip(case.catalog.ids, texts) if not text.strip()]
    yield _note_if(
        "Empty titles",
        empty,
        len(texts),
        "`empty_texts='id'` writes the id instead; by default they are an error.",
    )
    seen = Counter(texts)
    repeated = [text for text in seen if seen[text] > 1 for _ in range(seen[text] - 1)]
    yield _note_if(
        "Duplicate titles", repeated, len(texts),
        "They share a leaf and a score; count hits by text (`match='text'`), or make titles unique.",
    )  # fmt: skip
    decoded = ItemCatalog(case.catalog.ids, texts, empty_texts="keep", html_entities="decode").texts
    entities = [text for text, other in zip(texts, decoded) if text != other]
    yield _note_if(
        "HTML entities in titles", entities, len(texts), "Decode them once, here: `html_entities='decode'`."
    )
    control = [text for text in texts if any(ord(character) < 32 for character in text)]
    yield _note_if("Control characters in titles", control, len(texts), "Remove them: the model has to write them.")


def _note_if(what: str, found: list, total: int, advice: str) -> Finding:
    if not found:
        return Finding(what, "ok", f"none of {total}")
    return Finding(what, "note", f"{len(found)} of {total}, such as {_shorten(found[0])!r}", advice)


def _shorten(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


# ---------------------------------------------------------------------- tokens


def _check_boundary(case: Case) -> Iterator[Finding]:
    what = "Tokens across the prompt's end"
    if case.task.conversational:
        yield Finding(what, "ok", "the chat template parts prompt and item")
        return
    prompts, items = case.rows["prompt"][:], case.rows["completion"][:]
    joint = case.tokenizer([prompt + item for prompt, item in zip(prompts, items)])["input_ids"]
    apart = [p + i for p, i in zip(case.task.encode_prompts(prompts), case.ids(items))]
    merged = [item for item, one, two in zip(items, joint, apart) if one[: len(two)] != two]
    yield _note_if(
        what, merged, len(items),
        "Nothing here: prompt and item are tokenised apart, in training and in use. Elsewhere: `encode_prompts`.",
    )  # fmt: skip
    if case.tokenizer("a")["input_ids"] == case.ids(["a"])[0]:
        yield Finding(
            "First token of a text", "note", "the tokenizer puts no BOS before it",
            "Code that cuts it off (`encode(text)[1:]`) loses a token of the title.",
        )  # fmt: skip


def _check_end_token(case: Case) -> Iterator[Finding]:
    end, after = describe_end(case.tokenizer, case.task.conversational, case.task.chat_template_kwargs)
    trie, nodes = case.trie, case.trie.item_nodes.long()
    open_ended = trie.num_valid_tokens(nodes) > 1
    index = int(open_ended.int().argmax())
    seen = f"{end!r}"
    if open_ended.any():
        example = _shorten(case.catalog.texts[index])
        seen += f"; {int(open_ended.sum())} items begin another one, such as {example!r}, and only it can end them"
    yield Finding("Token that ends an item", "ok", seen)
    if after:
        yield Finding(
            "What the chat template writes around an item", "note", f"{after}",
            "It is part of the trie; code that compares with the bare title would find no item.",
        )  # fmt: skip
    if case.tokenizer.pad_token_id is None:
        yield Finding(
            "Padding token", "note", "the tokenizer has none",
            "TRL pads with the end token. Do not add one: it would resize embeddings that an adapter does not save.",
        )  # fmt: skip
    elif case.tokenizer.pad_token == end:
        yield Finding(
            "Padding token", "note", f"it is the end token, {end!r}",
            "Nothing here: labels say what is supervised. Masking labels by `pad_token_id` would lose titles' ends.",
        )  # fmt: skip
    else:
        yield Finding("Padding token", "ok", repr(case.tokenizer.pad_token))


def _check_quotes(case: Case) -> Iterator[Finding]:
    before, after = case.catalog.template.split("{text}")
    what = "Closing characters of the template"
    if not after:
        yield Finding(what, "ok", "none")
        return
    texts = [text[: -len(after)] for text in case.sample]
    apart = [one + two for one, two in zip(case.ids(texts), case.ids([after] * len(texts)))]
    merged = [text for text, one, two in zip(case.sample, case.ids(case.sample), apart) if one != two]
    yield _note_if(
        what,
        merged,
        len(texts),
        f"Nothing here: items are tokenised whole. Gluing {after!r} on by hand makes other tokens.",
    )


def _check_trie(case: Case) -> Iterator[Finding]:
    trie = case.trie
    first = trie.first_branching_node
    if first < 0:
        yield Finding(
            "Where items begin to differ", "error", f"nowhere: all {len(case.catalog)} are written alike",
            "There is nothing to rank; check the text column.",
        )  # fmt: skip
        return
    yield Finding(
        "Valid tokens (AVT)", "ok",
        f"{trie.average_valid_tokens(case.targets):.2f} at a target's token on average, of {trie.vocab_size}",
    )  # fmt: skip
    depth = next(depth for depth, (start, end) in enumerate(trie.levels) if start <= first < end)
    yield Finding(
        "Where items begin to differ", "ok" if depth == 0 else "note",
        f"after {depth} token(s) that all share; {len(trie.children(first))} first tokens there",
        "" if depth == 0 else "Nothing here. Statistics of the root would say nothing: its only token is forced.",
    )  # fmt: skip
    paths = trie.paths(case.targets)
    paths_valid = trie.num_valid_tokens(paths.clamp(min=0))
    forced = ((paths_valid == 1) & (paths >= 0)).sum().item() / (paths >= 0).sum().item()
    yield Finding(
        "Tokens that are forced", "note" if forced > 0.5 else "ok", f"{forced:.0%} of the targets' tokens",
        "They cost nothing, so `length_penalty` 1.0, the default of `generate`, favours long titles: pass 0.0.",
    )  # fmt: skip
    at_first = trie.parents(paths.clamp(min=0)) == first
    tokens = Counter(trie.tokens(paths[at_first & (paths >= 0)]).tolist())
    token, count = tokens.most_common(1)[0]
    share = count / len(case.targets)
    yield Finding(
        "First token where items differ", "note" if share > 0.25 else "ok",
        f"{share:.0%} of the targets have {case.tokenizer.decode([token])!r}; {len(tokens)} different ones",
        "With `temperature_positions='first'` the adaptive temperature runs to its upper bound: use 'all'."
        if share > 0.25 else "",
    )  # fmt: skip
    missed = len(case.targets) - int(at_first.any(dim=1).sum())
    yield Finding(
        "Targets that never come to a choice", "error" if missed else "ok", f"{missed} of {len(case.targets)}"
    )


def _check_lengths(case: Case) -> Iterator[Finding]:
    lengths = case.trie.item_lengths
    longer = [text for text, n in zip(case.catalog.texts, lengths.tolist()) if n > _COMMON_MAX_NEW_TOKENS]
    yield Finding(
        "Longest item", "note" if longer else "ok",
        f"{case.trie.depth} tokens; {len(longer)} of {len(lengths)} longer than {_COMMON_MAX_NEW_TOKENS}"
        + (f", such as {_shorten(longer[0])!r}" if longer else ""),
        "Generate with `max_new_tokens=trie.depth`, or these can never be written." if longer else "",
    )  # fmt: skip
    if case.task.max_length is None:
        return
    items = case.task.encode_items(_texts(case.rows["completion"][:]))
    prompts = case.prompts(case.rows)
    room = [case.task.max_length - len(item) for item in items]
    num_long = sum(len(prompt) > most for prompt, most in zip(prompts, room))
    what, seen = f"Rows longer than {case.task.max_length} tokens", f"{num_long} of {len(items)}"
    try:
        case.task.fit_prompts(case.rows[:], room)
    except ValueError as error:
        yield Finding(what, "error", str(error), "Raise `max_length`.")
        return
    yield Finding(
        what, "note" if num_long else "ok", seen,
        "They lose their oldest items if you pass `prompt_template`. Cutting rows at their end would cut titles."
        if num_long else "",
    )  # fmt: skip


def _texts(completions: list) -> list[str]:
    return [text if isinstance(text, str) else text[0]["content"] for text in completions]


def _check_processor(case: Case) -> Iterator[Finding]:
    """Every item can be written, by a processor that sees rows in any order and is used again."""
    items = case.trie.item_nodes[torch.randperm(case.trie.num_items, generator=torch.Generator().manual_seed(0))[:64]]
    paths = case.trie.paths(items.cpu().long())
    tokens = case.trie.tokens(paths.clamp(min=0)).where(paths >= 0, 0)
    processor = TrieLogitsProcessor(case.trie, prompt_length=0)
    num_blocked = num_open = 0
    for step in range(tokens.shape[1]):
        rows = (paths[:, step] >= 0).nonzero().squeeze(-1).flip(0)
        scores = processor(tokens[rows, :step], torch.zeros(len(rows), case.trie.vocab_size))
        num_blocked += int(scores[torch.arange(len(rows)), tokens[rows, step]].isinf().sum())
        num_open += int((~scores.isinf()).all(dim=1).sum() if case.trie.vocab_size > 1 else 0)
    yield Finding(
        "Items that constrained generation can't write", "error" if num_blocked or num_open else "ok",
        f"{num_blocked} of {len(items)}; {num_open} steps without a constraint",
    )  # fmt: skip


# ---------------------------------------------------------------------- interactions


def _check_splits(case: Case) -> Iterator[Finding]:
    windows = case.windows
    missing = [name for name in ("train", "validation", "test") if name not in windows]
    sizes = ", ".join(f"{name} {len(split)}" for name, split in windows.items())
    yield Finding(
        "Splits", "error" if missing else "ok", sizes + (f"; no {' and no '.join(missing)}" if missing else ""),
        "Choose checkpoints and settings on validation, and report test once." if missing else "",
    )  # fmt: skip
    if missing:
        return
    if all("timestamp" in windows[name].column_names for name in ("train", "test")):
        last = max(windows["train"]["timestamp"])
        early = [str(time) for time in windows["test"]["timestamp"] if time < last]
        yield _note_if(
            "Test windows before the end of train", early, len(windows["test"]),
            "The model has seen the future of these users' items: split by time.",
        )  # fmt: skip
    train = {tuple(ids) for ids in windows["train"]["item_ids"]}
    leaked = [", ".join(ids) for ids in windows["test"]["item_ids"] if tuple(ids) in train]
    yield _note_if("Test windows that are in train, too", leaked, len(windows["test"]), "Remove them from train.")
    if "user_id" in windows["validation"].column_names:
        users = Counter(windows["validation"]["user_id"])
        repeated = [str(user) for user in users if users[user] > 1]
        yield _note_if(
            "Users with several validation windows", repeated, len(users),
            "Their windows overlap, so metrics look better and intervals narrower than they are; compare, don't "
            "report.",
        )  # fmt: skip


def _check_targets(case: Case) -> Iterator[Finding]:
    windows = [ids for split in case.windows.values() for ids in split["item_ids"]]
    repeated = [ids[-1] for ids in windows if ids[-1] in ids[:-1]]
    yield _note_if(
        "Targets that their history holds", repeated, len(windows),
        "`Recommender` never recommends these by default: pass `exclude_history=False` where people buy again.",
    )  # fmt: skip
    longest = max(len(set(ids[:-1])) for ids in windows)
    left = len(case.catalog) - longest
    yield Finding(
        f"Items left to fill a top {_TOP_K}", "ok" if left >= _TOP_K else "note",
        f"at least {max(left, 0)} of {len(case.catalog)} for each user",
        "" if left >= _TOP_K else "Ask for fewer, or beams shrink: results are then filled up with -1, and counted.",
    )  # fmt: skip


# ---------------------------------------------------------------------- model


def _check_model_head(case: Case) -> Iterator[Finding]:
    rows, size = case.model.get_output_embeddings().weight.shape[0], len(case.tokenizer)
    try:
        check_head(case.model, case.trie)
    except ValueError as error:
        yield Finding("LM head", "error", str(error))
        return
    yield Finding(
        "LM head", "ok" if size <= rows else "error", f"{rows} rows for a tokenizer of {size} tokens",
        "" if size <= rows else "Tokens were added: take them back, as an adapter does not save resized embeddings.",
    )  # fmt: skip
    try:
        TrieDecoder(case.model, case.trie)
    except ValueError as error:
        yield Finding("Exact decoding", "note", str(error))
    else:
        yield Finding("Exact decoding", "ok", "a tree of tokens gives the logits of its paths")


def _check_generation_config(case: Case) -> Iterator[Finding]:
    config = case.model.generation_config
    defaults = {"do_sample": (None, False), "top_k": (None, 50), "top_p": (None, 1.0), "temperature": (None, 1.0),
                "repetition_penalty": (None, 1.0), "length_penalty": (None, 1.0)}  # fmt: skip
    given = {name: getattr(config, name, None) for name in defaults}
    given = {name: value for name, value in given.items() if value not in defaults[name]}
    yield Finding(
        "Generation settings of the model", "note" if given else "ok",
        json.dumps(given) if given else "none of its own",
        "`recommend` leaves them aside. `generate` takes what you do not set: they break constrained beams silently."
        if given else "",
    )  # fmt: skip
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    used = set(case.trie.tokens(case.trie.item_nodes.long()).tolist())
    if missing := used - set(ends):
        tokens = [case.tokenizer.decode([token]) for token in sorted(missing)]
        yield Finding(
            "End tokens of `generate`", "note", f"{ends} lacks {tokens}, by which items end",
            "Pass `eos_token_id=` to `generate`; `recommend` does.",
        )  # fmt: skip
    most = config.max_new_tokens or config.max_length
    if most is not None and most < case.trie.depth:
        yield Finding(
            "Length limit of `generate`", "note", f"{most} tokens, and the longest item has {case.trie.depth}",
            "Pass `max_new_tokens=trie.depth`; `recommend` does.",
        )  # fmt: skip


@torch.no_grad()
def _check_precision(case: Case) -> Iterator[Finding]:
    """How many first tokens that differ in fp32 would be equal as bf16, among the ten best of each prompt."""
    rows = case.rows.select(range(min(8, len(case.rows))))
    prompts = case.prompts(rows)
    first = case.trie.first_branching_node
    if first < 0:
        return
    start = case.trie.paths(torch.tensor([first])) if first else torch.empty(1, 0, dtype=torch.int64)
    valid = case.trie.valid_tokens(torch.tensor([first]))[1]
    num_ties, largest = 0, torch.tensor(0.0)
    # In fp32 also where the model's own are bf16, which can't differ from bf16
    base = case.model.get_base_model() if is_peft_model(case.model) else case.model
    project = head_projection(base)
    for prompt in prompts:
        input_ids = torch.tensor([[*prompt, *case.trie.tokens(start)[0].tolist()]], device=case.model.device)
        hidden = base.base_model(input_ids=input_ids, use_cache=False).last_hidden_state[0, -1:]
        logits = project(hidden, rows=valid)[0].cpu()
        best = logits.topk(min(_TOP_K, len(logits))).values
        num_ties += len(best.unique()) - len(best.bfloat16().unique())
        largest = torch.maximum(largest, logits.abs().max())  # nan stays nan
    if not largest.isfinite():
        yield Finding("Logits in bf16", "error", f"the largest is {largest}", "Load the model in another dtype.")
        return
    yield Finding(
        "Logits in bf16", "note" if num_ties else "ok",
        f"up to {largest:.1f}; {num_ties} ties among the ten best of {len(prompts)} prompts that fp32 tells apart",
        "Loss and exact decoding compute them in fp32; `generate` does not." if num_ties else "",
    )  # fmt: skip


CHECKS = (
    _check_texts,
    _check_boundary,
    _check_end_token,
    _check_quotes,
    _check_trie,
    _check_lengths,
    _check_processor,
    _check_splits,
    _check_targets,
)
MODEL_CHECKS = (_check_model_head, _check_generation_config, _check_precision)
