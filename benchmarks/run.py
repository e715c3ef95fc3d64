# SPDX-License-Identifier: Apache-2.0
"""
Run the benchmarks, each in a process of its own, and write what they measure to `outputs/bench/<name>.json`.

```shell
python benchmarks/run.py                   # all of them, a few minutes on 2 cores
python benchmarks/run.py loss trie_build   # some
```
"""

import argparse
import json
import os
import subprocess
import sys
import time

from decoding import benchmark_decoding
from loss import benchmark_loss
from processor import benchmark_processor
from softmax_dpo import benchmark_softmax_dpo
from step import benchmark_step
from task import benchmark_task
from timing import OUTPUT_DIR, describe_machine
from trie_build import benchmark_trie_build


BENCHMARKS = {
    "loss": benchmark_loss,
    "step": benchmark_step,
    "trie_build": benchmark_trie_build,
    "processor": benchmark_processor,
    "decoding": benchmark_decoding,
    "task": benchmark_task,
    "softmax_dpo": benchmark_softmax_dpo,
}
# Targets: result → (at least or at most, limit, the absolute values behind it)
TARGETS = {
    "loss_vs_dense": (">=", 500, "loss_dense_s", "loss_sparse_s"),
    "loss_vs_trl_fused": (">=", 500, "loss_fused_s", "loss_sparse_s"),
    "loss_memory_vs_dense": ("<=", 0.01, "loss_sparse_peak_mb", "loss_dense_peak_mb"),
    "step_vs_backbone": ("<=", 1.05, "step_s", "backbone_s"),
    "trie_build_23k_s": ("<=", 0.1),
    "trie_build_1m_s": ("<=", 5),
    "trie_build_1m_mb": ("<=", 200),
    "processor_vs_transformers": (">=", 10, "transformers_marisa_s", "processor_s"),
    "processor_inplace_vs_transformers": (">=", 10, "transformers_marisa_s", "processor_inplace_s"),
    "task_1m_save_s": ("<=", 10),
    "task_1m_load_s": ("<=", 10),
    "request_1m_vs_search": ("<=", 1.5, "search_1m_ms", "request_1m_ms"),
    "request_1m_withdrawn_vs_search": ("<=", 1.5, "search_1m_ms", "request_1m_withdrawn_ms"),
    "request_1m_allowed_vs_search": ("<=", 1.5, "search_1m_allowed_ms", "request_1m_allowed_ms"),
    "decode_vs_generate_marisa": (">=", 8, "generate_marisa_users_per_s", "decode_users_per_s"),
    "decode_vs_generate_processor": (">=", 5, "generate_processor_users_per_s", "decode_users_per_s"),
    "decode_vocab_exact_vs_generate": (">=", 5, "generate_vocab_s", "decode_vocab_s"),
    "decode_bias_overhead": ("<=", 1.3, "decode_unbiased_s", "decode_bias_s"),
    "decode_user_bias_overhead": ("<=", 1.5, "decode_unbiased_s", "decode_user_bias_s"),
    "decode_memory_vs_generate": ("<=", 0.25, "decode_peak_mb", "generate_processor_peak_mb"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure speed and memory relative to the references.")
    parser.add_argument("names", nargs="*", help=f"benchmarks to run, of {', '.join(BENCHMARKS)}; all by default")
    parser.add_argument("--in-process", action="store_true", help="don't start a process for each benchmark")
    args = parser.parse_args()
    unknown = set(args.names) - BENCHMARKS.keys()
    if unknown:
        parser.error(f"unknown benchmarks {sorted(unknown)}: choose from {', '.join(BENCHMARKS)}")
    for name in args.names or BENCHMARKS:
        if args.in_process:
            run(name)
            continue
        start = time.perf_counter()
        # A process of its own, so that what one benchmark leaves in memory does not affect the next, and threads that
        # sleep while they wait: by default they spin, which makes short steps up to 50 times slower beside another job
        environment = {"OMP_WAIT_POLICY": "passive", **os.environ}
        subprocess.run([sys.executable, __file__, "--in-process", name], check=True, env=environment)
        print_results(name, time.perf_counter() - start)


def run(name: str) -> None:
    """Run one benchmark in this process and write its results, whole or not at all."""
    report = {"machine": describe_machine(), "results": BENCHMARKS[name]()}
    OUTPUT_DIR.mkdir(parents=True, exist_ok=True)
    temporary = OUTPUT_DIR / f".{name}.json.tmp"
    temporary.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, OUTPUT_DIR / f"{name}.json")


def print_results(name: str, seconds: float) -> None:
    """Print the results that have targets first, then every other number that the benchmark measured."""
    results = json.loads((OUTPUT_DIR / f"{name}.json").read_text(encoding="utf-8"))["results"]
    print(f"\n{name} ({seconds:.0f} s)")
    for key, (relation, limit, *behind) in TARGETS.items():
        if key in results:
            met = results[key] >= limit if relation == ">=" else results[key] <= limit
            print(_line(key, results, behind) + f"  target {relation} {limit:g}: {'met' if met else 'MISSED'}")
    for key, value in results.items():
        if key not in TARGETS and isinstance(value, (int, float)):
            print(_line(key, results, []))


def _line(key: str, results: dict, behind: list[str]) -> str:
    spread = results.get(f"{key}_range") or results.get(f"{key}_quartiles")
    details = [f"{spread[0]:.4g} to {spread[1]:.4g}"] if spread else []
    details += [f"{name} {results[name]:.4g}" for name in behind]
    return f"  {key:<36} {results[key]:>12.4g}  {', '.join(details)}"


if __name__ == "__main__":
    main()
