# SPDX-License-Identifier: Apache-2.0
"""All that a card is asked for, in a few minutes: the GPU tests, the scan, and the models, eager and compiled.

    python benchmarks/gpu.py --out benchmarks/results/gpu

Each step is a process of its own with its part of `--minutes`; what one leaves unspent goes to the next. Its figures
stand in STEP.json, and as soon as it ends `gpu.json` and the page `gpu.md` are written anew. Of a step that fails or
runs out of time the page says so, and STEP.log keeps the end of what it printed; the others go on, and the exit status
is 1. From a checkout that is not installed it runs with PYTHONPATH=src, if the folders are linked there and the CPU
kernels are built.

Without a GPU, `--dry-run` makes the calls of every step once on the CPU, with small inputs, and measures nothing.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from _gpu_page import page
from _run import STARTED, command, parse_cuda

from vssm.tools._bench import conditions
from vssm.tools._common import write_file, write_json

BENCHMARKS = Path(__file__).parent
TESTS = BENCHMARKS.parent / 'tests'
MODELLED = BENCHMARKS / 'results' / 'gpu_model.json'
# The first is what the others are held to; compilation has time for three. On an H200 all of them were faster on
# channels-last input.
MODELS = (
    'swin_tiny_patch4_window7_224',
    'vmamba2d_tiny',
    'spatial_mamba_tiny',
    'convnext_tiny',
    'mambaout_tiny',
    'vmamba_tiny',
)
SMALL_MODELS = ('test_vmamba2d', '--size', '64')  # for a dry run
WEIGHTS = dict(op=60, models=90, compiled=180, tests=140)  # how steps share the time
BEGIN = 0.75  # the part of a step's time after which it begins nothing more
GRACE = 10  # seconds in which a step that was interrupted may write what it has
LOG_LINES = 200


# ---- the steps -------------------------------------------------------------------------------------------------------


def test_command(args: argparse.Namespace) -> list[str]:
    """The tests of the CUDA kernels, by as many workers as there are cores, and room for on the card."""
    chosen = 'finds_its_kernels_on_cuda or number_of_bands' if args.dry_run else 'not kernels_compile'
    options = ['-m', 'triton', '-k', chosen, '-q', '--draws', '40', '-p', 'no:cacheprovider']
    if find_spec('xdist') and not args.dry_run:
        room = int(torch.cuda.get_device_properties(0).total_memory // 4e9)
        options += ['-n', str(max(1, min(len(os.sched_getaffinity(0)) - 1, room))), '--dist', 'worksteal']
    file = str(args.out / 'tests.json')
    return [
        str(BENCHMARKS / '_gpu_tests.py'),
        file,
        str(TESTS / 'ops'),
        str(TESTS / 'models' / 'test_models.py'),
        *options,
    ]


def step_command(args: argparse.Namespace, step: str, seconds: float) -> list[str]:
    """The command of a step that has some seconds, but for Python itself."""
    if step == 'tests':
        return test_command(args)
    options = ['--json', str(args.out / f'{step}.json'), '--limit', str(int(BEGIN * seconds))]
    options += ['--dry-run'] * args.dry_run
    if step == 'op':
        return [str(BENCHMARKS / 'op_cuda.py'), '--dtypes', 'bfloat16', 'float32', '--no-reference', *options]
    names, options = MODELS, ['--large', '0', '--layouts', 'channels_last', *options]
    if step == 'compiled':
        names, options = MODELS[:3], ['--compile', *options]
    return [str(BENCHMARKS / 'model_cuda.py'), *(SMALL_MODELS if args.dry_run else names), *options]


# ---- running them ----------------------------------------------------------------------------------------------------


def end(process: subprocess.Popen) -> None:
    """Interrupt a process and those that it started, so that it writes what it has; then end what is left of them."""
    for how in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, how)
            process.wait(GRACE)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def run_step(command: list[str], seconds: float, log: Path, **env: str) -> dict[str, Any]:
    """Run the command of a step; returns how it ended, and its seconds.

    Args:
        command: Command, but for Python itself.
        seconds: Time that it has.
        log: File for the end of its output, where it did not go well.
        **env: Variables to add to its environment.
    """
    start = time.monotonic()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [sys.executable, *command],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | env,
            start_new_session=True,
        )
        try:
            code = process.wait(max(1.0, seconds - GRACE))
            status = 'done' if code == 0 else f'failed with exit status {code}'
        except subprocess.TimeoutExpired:
            status = f'ended at its limit of {seconds:.0f} s'
        finally:
            end(process)
        if status != 'done':
            output.seek(0)
            write_file(log, b''.join(output.readlines()[-LOG_LINES:]))
    return dict(status=status, seconds=round(time.monotonic() - start, 1))


def measure(args: argparse.Namespace, step: str, seconds: float) -> dict[str, Any]:
    """Run a step, and return how it ended with the figures that it has left."""
    file, log = args.out / f'{step}.json', args.out / f'{step}.log'
    for old in (file, log):
        old.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        # Tiles that tests tune side by side are no choice for what is measured.
        env = dict(TRITON_CACHE_DIR=folder) if step == 'tests' else {}
        result = run_step(step_command(args, step, seconds), seconds, log, **env)
    return result | (json.loads(file.read_text()) if file.exists() else {})


def machine(device: str) -> dict[str, Any]:
    """What the figures depend on besides the options: card, driver, versions, state of the clone."""
    found = dict(conditions(device))
    if device == 'cuda':
        card = torch.cuda.get_device_properties(0)
        found |= dict(memory_gib=round(card.total_memory / 2**30), multiprocessors=card.multi_processor_count)
        found['driver'] = says('nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader')
    return dict(found, commit=says('git', '-C', str(BENCHMARKS), 'describe', '--always', '--dirty'))


def modelled(file: Path = MODELLED) -> dict[str, float]:
    """Milliseconds that `gpu_model.py` has said, as kept: of networks, and of scans in two dimensions."""
    rows, found = json.loads(file.read_text())['rows'], {}
    for row in rows['networks']:
        step = 'train' if row['train'] else 'inference'
        found[f'{row["name"]} {row["batch_size"]}x{row["size"]} {step}'] = row['modelled_ms']
    for row in rows['launches']:
        repeated = row.get('train') and row['passes'] == 'forward'  # what the inference says already
        if row['op'] == 'scan' and row['kernel'].endswith('2d') and not repeated:
            key = f'scan {"x".join(map(str, row["shape"]))} {row["dtype"]} {row["passes"]}'
            found[key] = found.get(key, 0.0) + row['call_ms']
    return found


def says(*command: str) -> str | None:
    """The first line that a command prints; None where there is no such command, or it fails."""
    try:
        return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--steps', nargs='+', choices=WEIGHTS, default=list(WEIGHTS), help='steps to take, in order')
    parser.add_argument(
        '--out', metavar='FOLDER', type=Path, default=BENCHMARKS / 'results' / 'gpu', help='for results'
    )
    parser.add_argument('--minutes', type=float, default=8, help='time for all steps')
    args = parse_cuda(parser)
    args.out.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = dict(
        command=command(),
        date=datetime.now(UTC).isoformat(timespec='minutes'),
        dry_run=args.dry_run,
        minutes=args.minutes,
        conditions=machine(args.device),
        modelled=modelled(),
        steps={},
    )
    for i, step in enumerate(args.steps):
        left = STARTED + 60 * args.minutes - time.monotonic()
        seconds = left * WEIGHTS[step] / sum(WEIGHTS[later] for later in args.steps[i:])
        print(f'{step}: at most {seconds:.0f} s', flush=True)
        figures['steps'][step] = measure(args, step, seconds)
        print(f'{step}: {figures["steps"][step]["status"]}', flush=True)
        write_json(args.out / 'gpu.json', figures)
        write_file(args.out / 'gpu.md', page(figures).encode())
    print(args.out / 'gpu.md')
    return any(result['status'] != 'done' for result in figures['steps'].values())


if __name__ == '__main__':
    sys.exit(main())
