# SPDX-License-Identifier: Apache-2.0
"""Options, interleaved timing and the description of the machine, shared by the benchmark scripts."""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch

import vssm


def cpu_parser(description: str, rounds: int) -> argparse.ArgumentParser:
    """The options that scripts on the CPU share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--batch-size', type=int, default=8)
    parser.add_argument('--rounds', type=int, default=rounds)
    parser.add_argument('--threads', type=int, default=0, help="0: PyTorch's choice")
    parser.add_argument('--json', type=Path)
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Its arguments, with the threads and the seed set."""
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    return args


def interleaved(
    calls: dict[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 2,
    synchronize: Callable[[], None] = lambda: None,
    repeats: int = 1,
) -> dict[str, float]:
    """Median seconds of each call. Rounds are interleaved, so that a machine's drift hits all calls alike.

    Args:
        calls: What to time, by name.
        rounds: How often.
        warmup: Rounds before those that count.
        synchronize: Waits for the device, before and after.
        repeats: Calls in a row between two looks at the clock, where a single one is too short.
    """
    seconds = {name: [] for name in calls}
    for _ in range(warmup + rounds):
        for name, call in calls.items():
            synchronize()
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            synchronize()
            seconds[name].append((time.perf_counter() - start) / repeats)
    return {name: statistics.median(s[warmup:]) for name, s in seconds.items()}


def conditions(device: str = 'cpu') -> dict[str, Any]:
    """What a figure depends on: processor, threads, versions, kernel path."""
    gpu = {}
    if device == 'cuda':
        import triton

        gpu = dict(gpu=torch.cuda.get_device_name(), cuda=torch.version.cuda, triton=triton.__version__)
    return dict(
        **gpu,
        cpu=_cpu_name(),
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        kernel=torch.ops.vssm.cpu_capability(),
        python=platform.python_version(),
        torch=torch.__version__,
        timm=timm.__version__,
        vssm=vssm.__version__,
    )


def _cpu_name() -> str:
    cpuinfo = Path('/proc/cpuinfo')
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith('model name'):
                return line.partition(':')[2].strip()
    return platform.processor() or platform.machine()


def write_json(path: Path, script: str, rows: Any, taken_under: dict[str, Any] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix('.tmp')
    content = dict(command=script, conditions=taken_under or conditions(), rows=rows)
    temporary.write_text(json.dumps(content, indent=2) + '\n')
    temporary.replace(path)
