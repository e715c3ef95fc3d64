# SPDX-License-Identifier: Apache-2.0
"""
A catalogue of 1,000,000 items: its task saved and loaded, its size on disk beside that of the raw text, the exact top
10 for one user by a tiny model, and what a request to a `Recommender` takes beside that search. The texts are Book
titles with numbers after them, the tokenizer is Llama 3's. How long a search takes depends on how sure the model is:
`top10_1m` is a model with random weights times 6, and `top10_1m_untrained` one as it is made, for which the best of a
million items are hardly better than the others.

`request_1m` is `Recommender.recommend` for a user with a history of ten items, `request_1m_withdrawn` the same with
one item withdrawn, and `request_1m_allowed` with half of the catalogue allowed, prepared once. Each is compared with
`TrieDecoder.search` of the same prompt, with the same items left out: the work of a request must not grow with the
catalogue.
"""

import logging
import statistics
import tempfile
import time
from pathlib import Path

import torch
from catalogs import SHARED, VOCAB_SIZE
from models import small_llama
from timing import time_calls
from transformers import AutoTokenizer, LlamaForCausalLM

from trl_msl import ItemCatalog, PromptTemplate, RankingTask, Recommender, TrieDecoder


NUM_ITEMS = 1_000_000


def benchmark_task() -> dict:
    """Seconds, bytes and the latency of a request; see the module's docstring."""
    data, tokenizer = SHARED / "data" / "amazon_books", SHARED / "tokenizers" / "llama3"
    if not (data.is_dir() and tokenizer.is_dir()):
        return {"skipped": "no Book titles and no Llama 3 tokenizer at hand"}
    logging.getLogger("trl_msl").setLevel(logging.ERROR)  # it would report repeated titles
    tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    titles = ItemCatalog.from_json(data / "id2name4Rec.json", empty_texts="keep").texts
    texts = [f"{titles[index % len(titles)]} {index}" for index in range(NUM_ITEMS)]
    catalog = ItemCatalog(range(NUM_ITEMS), texts, template='"{text}"')
    task = RankingTask(catalog, tokenizer, PromptTemplate("{history}"))
    results = {"items": NUM_ITEMS, "raw_text_mb": sum(len(text.encode()) for text in texts) / 1e6}
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        task.save_pretrained(folder)
        results["task_1m_save_s"] = time.perf_counter() - start
        results["task_1m_mb"] = sum(path.stat().st_size for path in Path(folder).iterdir()) / 1e6
        start = time.perf_counter()
        task = RankingTask.from_pretrained(folder, tokenizer)
        results["task_1m_load_s"] = time.perf_counter() - start
    sure = small_llama(64, 2, 6.0)
    for name, model in (("top10_1m", sure), ("top10_1m_untrained", small_llama(64, 2))):
        results |= _time_searches(name, TrieDecoder(model, task.trie))
    return results | _compare_requests(sure, task)


def _compare_requests(model: LlamaForCausalLM, task: RankingTask, rounds: int = 15) -> dict:
    """Latency of requests to a `Recommender`, and of the searches that they make."""
    recommender, decoder = Recommender(model, task), TrieDecoder(model, task.trie)
    updated = recommender.update(withdraw=["12345"])
    half = range(0, NUM_ITEMS, 2)
    allowed, allowed_ids = decoder.prepare_allowed(half), recommender.prepare_allowed(map(str, half))
    history = [f"{index}" for index in range(7, NUM_ITEMS, NUM_ITEMS // 10)]
    indices = task.catalog.indices(history)
    written = [task.catalog.completions[index] for index in indices]
    rows = {"prompt": [task.prompt_template.render(written)], "history": [written]}
    prompts = task.ranking_prompts(rows)
    functions = {
        "search_1m": lambda: decoder.search(prompts, exclude=[indices]),
        "search_1m_allowed": lambda: decoder.search(prompts, exclude=[indices], allowed=allowed),
        "request_1m": lambda: recommender.recommend([history]),
        "request_1m_withdrawn": lambda: updated.recommend([history]),
        "request_1m_allowed": lambda: recommender.recommend([history], allowed=allowed_ids),
    }
    seconds = {name: statistics.median(times) for name, times in time_calls(functions, rounds).items()}
    results = {f"{name}_ms": 1000 * median for name, median in seconds.items()}
    for name in ("request_1m", "request_1m_withdrawn", "request_1m_allowed"):
        search = "search_1m_allowed" if name == "request_1m_allowed" else "search_1m"
        results[f"{name}_vs_search"] = seconds[name] / seconds[search]
    return results


def _time_searches(name: str, decoder: TrieDecoder, num_searches: int = 20) -> dict:
    """Latency of searches for one user each, with prompts of 160 tokens."""
    prompts = torch.randint(VOCAB_SIZE, (1 + num_searches, 1, 160)).tolist()
    seconds, found = [], []
    for prompt in prompts:
        start = time.perf_counter()
        found.append(decoder.search(prompt, top_k=10, max_expansions=10_000))
        seconds.append(time.perf_counter() - start)
    if not all(output.exact.all() for output in found):
        raise RuntimeError("a search was cut short by `max_expansions`")
    return {
        f"{name}_ms": 1000 * statistics.median(seconds[1:]),
        f"{name}_ms_range": [1000 * min(seconds[1:]), 1000 * max(seconds[1:])],
        f"{name}_expansions": statistics.mean(output.expansions.item() for output in found),
    }
