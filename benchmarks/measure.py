"""Seconds and peak memory of contenders that do the same work, taken side by side."""

import ctypes
import gc
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median

# Before transformers is imported, here and in the processes started from here: nothing may reach for the network, but
# where a benchmark has a Hub of its own.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
import transformers  # noqa: E402
from tqdm import tqdm  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent

# Every figure is also given as a multiple of this contender's.
BASELINE = "limit"


def fresh(function, *args):
    """What a function of a module returns in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def timed(call) -> tuple[float, object]:
    """Seconds that a call takes, and what it returns."""
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def in_turns(calls: dict, rounds: int, title: str, check=None) -> dict[str, list[float]]:
    """[`interleaved_seconds`] of plain calls, each made once before: so no round pays for what is set up once."""
    for call in calls.values():
        call()
    contenders = {name: lambda call=call: timed(call) for name, call in calls.items()}
    return interleaved_seconds(contenders, rounds, title, check)


def interleaved_seconds(contenders: dict, rounds: int, title: str, check=None) -> dict[str, list[float]]:
    """
    Seconds of every contender in every round. Contenders return what `timed` does. Each round starts with another one,
    so that none always runs after the same. `check` is given the first round's results, by contender.
    """
    names = list(contenders)
    seconds, results = {name: [] for name in names}, {}
    with tqdm(total=rounds * len(names), desc=title) as progress:
        for number in range(rounds):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                progress.set_postfix_str(name)
                taken, result = contenders[name]()
                seconds[name].append(taken)
                if number == 0:
                    results[name] = result
                del result  # a result that is kept makes the next contender pay for fresh memory
                progress.update()
            if number == 0 and check:
                check(results)
            results.clear()
    return seconds


def peak_bytes(call) -> int:
    """The most resident memory during a call, its result included, above that before it. Linux only."""
    gc.collect()
    # Memory that is free but not given back would hide what the call takes.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before = status("VmRSS")
    call()
    return status("VmHWM") - before


def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def figures(seconds: dict[str, list[float]], peaks: dict[str, int]) -> dict[str, dict]:
    """Medians and ratios to the baseline of each contender. A time ratio is the median of the ratios in each round."""
    return {
        name: {
            "seconds": median(taken),
            "seconds_ratio": median(mine / limit for mine, limit in zip(taken, seconds[BASELINE])),
            "all_seconds": taken,
            "peak_bytes": peaks.get(name),
            "peak_ratio": peaks[name] / peaks[BASELINE] if name in peaks else None,
        }
        for name, taken in seconds.items()
    }


def figures_of_cases(cases, contenders, measure_seconds, measure_peak, rounds: dict[str, int]) -> dict[str, dict]:
    """[`figures`] of each case: all contenders' seconds in one fresh process, the peak of each in one of its own."""
    return {
        case: figures(
            fresh(measure_seconds, case, rounds[case]), {name: fresh(measure_peak, case, name) for name in contenders}
        )
        for case in cases
    }


def command(*words) -> float:
    """Runs a command of ours in a process of its own -> the seconds that it took."""
    return timed(lambda: subprocess.run([sys.executable, "-m", "phi3_tools", *map(str, words)], check=True))[0]


def table(columns: list[str], rows) -> list[str]:
    """Lines of Markdown, of rows with a cell for each column."""
    first, *others = (f"| {' | '.join(cells).lstrip()} |" for cells in (columns, *rows))
    return [first, f"|---|{'---:|' * (len(columns) - 1)}", *others]


def listed(about: dict) -> str:
    """What [`machine`] gives, as a page says it."""
    return ", ".join(f"{key} {value}" for key, value in about.items())


def machine() -> dict:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
