# SPDX-License-Identifier: Apache-2.0
"""Time and memory of a function, and the machine they were measured on."""

import ctypes
import gc
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
import trl


OUTPUT_DIR = Path(__file__).resolve().parents[1] / "outputs" / "bench"


def time_calls(
    functions: dict[str, Callable[[], object]],
    rounds: int,
    calls_per_round: dict[str, int] | None = None,
    warmup: int = 1,
) -> dict[str, list[float]]:
    """
    Time functions in turn, so that other load on the machine slows all of them alike.

    Args:
        functions (`dict[str, Callable]`):
            What to time, by name.
        rounds (`int`):
            Number of rounds. Each calls every function, every second round in reverse order.
        calls_per_round (`dict[str, int]`, *optional*):
            How often a round calls a function. Defaults to once; quick functions need more calls for a good median.
        warmup (`int`, *optional*, defaults to `1`):
            Number of calls of each function that are not timed.

    Returns:
        `dict[str, list[float]]`: seconds of each call, by name.
    """
    for function in functions.values():
        for _ in range(warmup):
            function()
    seconds = {name: [] for name in functions}
    for index in range(rounds):
        for name in functions if index % 2 == 0 else reversed(functions):
            for _ in range((calls_per_round or {}).get(name, 1)):
                start = time.perf_counter()
                functions[name]()
                seconds[name].append(time.perf_counter() - start)
    return seconds


def summarize(seconds: dict[str, list[float]]) -> dict[str, float | list[float]]:
    """Median seconds of each function as `{name}_s`, and the smallest and largest as `{name}_s_range`."""
    summary = {}
    for name, times in seconds.items():
        summary[f"{name}_s"] = statistics.median(times)
        summary[f"{name}_s_range"] = [min(times), max(times)]
    return summary


_M_MMAP_THRESHOLD = -3  # of malloc.h


def peak_memory(function: Callable[[], object], device: torch.device | None = None) -> int | None:
    """
    By how many bytes one call of `function` raises the memory in use by the process. Call `function` once before.

    Linux keeps the peak (`VmHWM`) of a process, and resets it to the current use (`VmRSS`) on request. Before that,
    glibc is told to return the freed memory that it keeps, and to return freed tensors at once from then on, so that
    the call cannot reuse hidden memory and what it frees does not count. Do not time anything afterwards. Unlike
    `ru_maxrss` this does not miss what stays below an earlier peak, and unlike a profiler of tensors it counts the
    buffers of the matrix library and Python's objects. `None` where there is no `/proc`. On a GPU (`device`) it is
    the peak of PyTorch's allocator.
    """
    if device is not None and device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    if not os.path.exists("/proc/self/clear_refs"):
        return None
    gc.collect()
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 16)
        ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = _status_bytes("VmRSS")
    function()
    return _status_bytes("VmHWM") - before


def describe_machine() -> dict[str, str | int | float]:
    """What is needed to compare times: processor, memory, threads and versions."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "load_average": round(os.getloadavg()[0], 2),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "trl": trl.__version__,
        "transformers": transformers.__version__,
    }


def _status_bytes(field: str) -> int:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def _cpu_model() -> str:
    if sys.platform == "linux":
        with open("/proc/cpuinfo") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
        if names:
            return names[0]
    return platform.processor()
