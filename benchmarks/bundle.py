# SPDX-License-Identifier: Apache-2.0
"""
A catalogue of 1,000,000 items: its bundle saved and loaded, its size on disk beside that of the raw text, and the
exact top 10 for one user by a tiny model. The texts are Book titles with numbers after them, the tokenizer is Llama
3's. How long a search takes depends on how sure the model is: `top10_1m` is a model with random weights times 6, and
`top10_1m_untrained` one as it is made, for which the best of a million items are hardly better than the others.
"""

import logging
import statistics
import tempfile
import time
from pathlib import Path

import torch
from catalogs import SHARED, VOCAB_SIZE
from models import small_llama
from transformers import AutoTokenizer

from trl_msl import Bundle, ItemCatalog, PromptTemplate, TrieDecoder


NUM_ITEMS = 1_000_000


def benchmark_bundle() -> dict:
    """Seconds, bytes and the latency of a request; see the module's docstring."""
    data, tokenizer = SHARED / "data" / "amazon_books", SHARED / "tokenizers" / "llama3"
    if not (data.is_dir() and tokenizer.is_dir()):
        return {"skipped": "no Book titles and no Llama 3 tokenizer at hand"}
    logging.getLogger("trl_msl").setLevel(logging.ERROR)  # it would report repeated titles
    tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    titles = ItemCatalog.from_json(data / "id2name4Rec.json", empty_texts="keep").texts
    texts = [f"{titles[index % len(titles)]} {index}" for index in range(NUM_ITEMS)]
    catalog = ItemCatalog(range(NUM_ITEMS), texts, template='"{text}"')
    bundle = Bundle(catalog, catalog.build_trie(tokenizer), PromptTemplate("{history}"))
    results = {"items": NUM_ITEMS, "raw_text_mb": sum(len(text.encode()) for text in texts) / 1e6}
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        bundle.save_pretrained(folder, tokenizer)
        results["bundle_1m_save_s"] = time.perf_counter() - start
        results["bundle_1m_mb"] = sum(path.stat().st_size for path in Path(folder).iterdir()) / 1e6
        start = time.perf_counter()
        bundle = Bundle.from_pretrained(folder, tokenizer)
        results["bundle_1m_load_s"] = time.perf_counter() - start
    for name, sharpness in (("top10_1m", 6.0), ("top10_1m_untrained", 1.0)):
        results |= _time_requests(name, TrieDecoder(small_llama(64, 2, sharpness), bundle.trie))
    return results


def _time_requests(name: str, decoder: TrieDecoder, num_requests: int = 20) -> dict:
    """Latency of requests of one user each, with prompts of 160 tokens."""
    prompts = torch.randint(VOCAB_SIZE, (1 + num_requests, 1, 160)).tolist()
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
