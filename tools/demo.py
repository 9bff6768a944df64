# SPDX-License-Identifier: Apache-2.0
"""Train both scans on handwritten digits, within a minute on two idle cores.

Runs `vssm train` on digits/vmamba2d_test (2-D scan) and digits/vmamba_test (1-D scan) at the same time and writes the
checkpoints, the logs, metrics.json and the picture digits.png. The digits exercise the road from data to checkpoint;
they are too easy to tell the scans apart.
"""

import argparse
import hashlib
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..version import __version__
from ._common import console, load_config, write_json
from ._pictures import pyplot, save_figure
from ._tables import print_table

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes

EXAMPLE = 'vssm demo --work-dir work_dirs/digits'

CONFIGS = {'2d': 'digits/vmamba2d_test', '1d': 'digits/vmamba_test'}
TITLES = {'2d': '2-D scan', '1d': '1-D scan'}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--work-dir',
        metavar='DIR',
        type=Path,
        default=Path('work_dirs/digits'),
        help='where to write (default: work_dirs/digits)',
    )
    parser.add_argument('--force', action='store_true', help='train again, even if DIR holds the results of this code')


def run(args: argparse.Namespace) -> int:
    for package in ('mmengine', 'sklearn', 'matplotlib'):  # better told now than after the training
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(name=package)
    metrics_path = args.work_dir / 'metrics.json'
    fingerprint = _fingerprint()
    if metrics_path.is_file() and not args.force:
        metrics = json.loads(metrics_path.read_text())
        if metrics.get('fingerprint') == fingerprint:
            console.print(f'{args.work_dir} holds the results of this code; --force trains again.', soft_wrap=True)
            _show(metrics, args.work_dir)
            return 0

    start = time.time()
    cfg = load_config(CONFIGS['2d'])
    args.work_dir.mkdir(parents=True, exist_ok=True)
    run_dirs = {scan: args.work_dir / Path(config).name for scan, config in CONFIGS.items()}
    if not _train(run_dirs, cfg.train_cfg.max_epochs):
        return 1
    curves = {scan: _read_curves(run_dir, since=start) for scan, run_dir in run_dirs.items()}
    checkpoints = {scan: run_dir / 'checkpoint.safetensors' for scan, run_dir in run_dirs.items()}
    images, labels, predictions = _predict(checkpoints)
    _draw(args.work_dir / 'digits.png', curves, images, labels, predictions)
    metrics = {
        **{f'heldout_accuracy_{scan}': round((predictions[scan] == labels).mean().item(), 4) for scan in CONFIGS},
        'heldout_images': len(labels),
        'epochs': cfg.train_cfg.max_epochs,
        'seed': cfg.randomness.seed,
        'seconds': round(time.time() - start, 1),
        'checkpoints': {scan: str(path.relative_to(args.work_dir)) for scan, path in checkpoints.items()},
        'vssm': __version__,
        'fingerprint': fingerprint,
    }
    write_json(metrics_path, metrics)
    _show(metrics, args.work_dir)
    return 0


def _fingerprint() -> str:
    """A digest of what decides the results: our code and PyTorch's version."""
    import torch

    from .. import configs, models, ops

    digest = hashlib.sha256(torch.__version__.encode())
    for package in (configs, models, ops):
        for path in sorted(Path(package.__path__[0]).rglob('*')):
            if path.suffix in ('.py', '.so'):
                digest.update(path.read_bytes())
    digest.update(Path(__file__).read_bytes())
    return digest.hexdigest()


def _train(run_dirs: dict[str, Path], epochs: int) -> bool:
    """Run `vssm train` for all scans at the same time, and tell whether every one succeeded."""
    from ..models.mm import progress_bar

    start = time.time()
    logs = {scan: run_dir.with_suffix('.log') for scan, run_dir in run_dirs.items()}
    console.print(f'Training; logs: {", ".join(map(str, logs.values()))}', highlight=False, soft_wrap=True)
    progress = progress_bar(console)
    tasks = {scan: progress.add_task(TITLES[scan], total=epochs, status='starting') for scan in run_dirs}
    done = dict.fromkeys(run_dirs, 0)
    processes = {}
    try:
        for scan, run_dir in run_dirs.items():
            with open(logs[scan], 'w') as log:
                processes[scan] = subprocess.Popen(
                    [
                        sys.executable,
                        '-m',
                        'vssm.tools.train',
                        CONFIGS[scan],
                        '--work-dir',
                        str(run_dir),
                        '--overwrite',
                    ],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
        with progress:
            running = True
            while running:
                running = any(process.poll() is None for process in processes.values())
                for scan, run_dir in run_dirs.items():
                    accuracy = _read_curves(run_dir, since=start)['accuracy']
                    if len(accuracy) == done[scan]:
                        continue
                    done[scan] = len(accuracy)
                    status = f'held-out accuracy {accuracy[-1]:.2f} %'
                    progress.update(tasks[scan], completed=done[scan], status=status)
                    if not console.is_terminal and done[scan] % 5 == 0:
                        console.print(f'{TITLES[scan]}: epoch {done[scan]}/{epochs}, {status}', highlight=False)
                for scan, process in processes.items():
                    if process.poll():
                        console.print(f'[red]Training the {TITLES[scan]} failed:[/] {logs[scan]} ends with')
                        console.print('\n'.join(logs[scan].read_text().splitlines()[-10:]), markup=False)
                        return False
                time.sleep(0.5)
    finally:
        for process in processes.values():
            if process.poll() is None:
                process.terminate()
                process.wait()
    return True


def _read_curves(run_dir: Path, since: float) -> dict[str, list[float]]:
    """Training loss and held-out accuracy of every epoch so far, for the run that began after a point in time."""
    files = [path for path in run_dir.glob('*/vis_data/scalars.json') if path.stat().st_mtime >= since]
    records = [json.loads(line) for line in max(files).read_text().splitlines()] if files else []
    return {
        name: [record[key] for record in records if key in record]
        for name, key in (('loss', 'loss'), ('accuracy', 'accuracy/top1'))
    }


def _predict(checkpoints: dict[str, Path]) -> tuple['np.ndarray', 'np.ndarray', dict[str, 'np.ndarray']]:
    """The held-out images, (images, H, W), their labels, (images,), and what each checkpoint says, (images,)."""
    import timm
    import torch

    from ..models.mm import Digits
    from ..models.weights import read_checkpoint

    digits = Digits('heldout')
    images = torch.stack([digits[i]['inputs'] for i in range(len(digits))])
    predictions = {}
    for scan, path in checkpoints.items():
        _, metadata = read_checkpoint(path)
        model_args = json.loads(metadata['model_args'])
        model = timm.create_model(metadata['model'], checkpoint_path=str(path), **model_args).eval()
        with torch.inference_mode():
            predictions[scan] = torch.cat([model(batch) for batch in images.split(256)]).argmax(1).numpy()
    return images[:, 0].numpy(), torch.tensor(digits.labels).numpy(), predictions


def _draw(
    path: Path,
    curves: dict[str, dict[str, list[float]]],
    images: 'np.ndarray',
    labels: 'np.ndarray',
    predictions: dict[str, 'np.ndarray'],
) -> None:
    """Draw the curves of both scans, and below them held-out digits with what each scan takes them for."""
    plt = pyplot()
    fig, axes = plt.subplots(2, 2, figsize=(12, 9.5), height_ratios=(4, 5), layout='constrained')
    fig.get_layout_engine().set(w_pad=0.15, h_pad=0.15)
    for ax, name, title in zip(axes[0], ('loss', 'accuracy'), ('Training loss', 'Held-out accuracy (%)'), strict=True):
        for scan, colour, style in zip(CONFIGS, ('tab:blue', 'tab:orange'), ('-', '--'), strict=True):
            values = curves[scan][name]
            ax.plot(range(1, len(values) + 1), values, style, color=colour, linewidth=2, label=TITLES[scan])
        ax.set(title=title, xlabel='Epoch')
        ax.grid(alpha=0.3)
        ax.legend()
    axes[0, 0].set_ylim(bottom=0)
    axes[0, 1].set_ylim(top=100)
    for ax, scan in zip(axes[1], CONFIGS, strict=True):
        wrong = (predictions[scan] != labels).sum()
        ax.set_title(f'{TITLES[scan]}: {wrong} of {len(labels)} held-out digits wrong')
        _draw_digits(ax, images, labels, predictions[scan])
    fig.supxlabel('Below each digit what the network reads; if wrong, in red with the true digit in brackets.')
    save_figure(fig, path, dpi=110)


def _draw_digits(ax: 'Axes', images: 'np.ndarray', labels: 'np.ndarray', predictions: 'np.ndarray') -> None:
    """Draw a grid of digits over what they were taken for, the wrong ones first."""
    columns, rows = 10, 6
    order = sorted(range(len(labels)), key=lambda i: predictions[i] == labels[i])
    for cell, i in enumerate(order[: columns * rows]):
        row, x = divmod(cell, columns)
        y = 1.4 * row  # leaves room for the label
        right = predictions[i] == labels[i]
        ax.imshow(images[i], cmap='gray', extent=(x, x + 0.92, y + 0.92, y), vmin=-1, vmax=1)
        ax.text(
            x + 0.46,
            y + 1.14,
            labels[i] if right else f'{predictions[i]} ({labels[i]})',
            ha='center',
            va='center',
            fontsize=9,
            color='black' if right else 'red',
        )
    ax.set(xlim=(0, columns), ylim=(1.4 * rows, 0))
    ax.axis('off')


def _show(metrics: dict[str, Any], work_dir: Path) -> None:
    rows = [
        (TITLES[scan], f'{100 * metrics[f"heldout_accuracy_{scan}"]:.2f} %', metrics['checkpoints'][scan])
        for scan in CONFIGS
    ]
    print_table(['network', 'held-out accuracy', 'checkpoint'], rows)
    console.print(
        f'{metrics["heldout_images"]} held-out images, {metrics["epochs"]} epochs, seed {metrics["seed"]}, '
        f'{metrics["seconds"]} s. Picture: {work_dir / "digits.png"}',
        highlight=False,
        soft_wrap=True,
    )


if __name__ == '__main__':
    from .main import main

    sys.exit(main(['demo', *sys.argv[1:]]))
