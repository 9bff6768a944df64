# SPDX-License-Identifier: Apache-2.0
"""Damages files of weights again and again, and reads each: it must be refused, or give the very same values.

python tests/weights/flip_loop.py --flips 1000

Each file is damaged by one flipped bit; in every tenth case by up to 64 KB of zeros in place of what was there.
"""

import argparse
import random
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import timm
import torch

from vssm.models.weights import read_checkpoint, write_safetensors


def write_weights(path):
    torch.save({'state_dict': timm.create_model('test_vmamba2d').state_dict(), 'epoch': 3}, path)


def write_ours(path):
    write_safetensors(path, timm.create_model('test_vmamba2d').state_dict(), dict(model='test_vmamba2d', epoch='3'))


def write_run(path):
    """What the Runner saves: weights, their average, an optimizer's states, histories and plain values."""
    from mmengine.logging import MessageHub

    model, average = (timm.create_model('test_vmamba2d') for _ in range(2))
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    hub = MessageHub('flips')
    for value in (2.5, 1.25):
        hub.update_scalar('train/loss', value)
    hub.update_info('iter', 7)
    ema = {f'module.{name}': value for name, value in average.state_dict().items()}
    run = dict(
        meta=dict(epoch=3, iter=7, seed=0, time='20240229', dataset_meta=dict(classes=('a', 'b'))),
        state_dict=model.state_dict(),
        ema_state_dict={**ema, 'steps': torch.tensor(7)},
        optimizer=optimizer.state_dict(),
        message_hub=hub.state_dict(),
        param_schedulers=[dict(last_step=7, base_values=[1e-3], numbers=np.arange(3.0))],
    )
    torch.save(run, path)


def read_run(path):
    from vssm.models import mm

    return mm.read_run(path)


KINDS = {  # the file's name, what writes it, and what reads it
    'run': ('epoch_3.pth', write_run, read_run),
    'pth': ('weights.pth', write_weights, read_checkpoint),
    'safetensors': ('weights.safetensors', write_ours, read_checkpoint),
}


def same(a, b):
    """Whether two contents of files are equal to the bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if type(a).__name__ == 'HistoryBuffer':
        return same(a.data, b.data) and a.max_length == b.max_length
    return a == b


def flip_loop(kind, flips, folder, seed=0):
    """How many of the damaged files were refused, gave identical values, or gave changed ones."""
    name, write, read = KINDS[kind]
    torch.manual_seed(seed)
    rng, path = random.Random(seed), Path(folder, name)
    write(path)
    whole, data = read(path), path.read_bytes()
    outcomes = Counter(refused=0, identical=0, changed=0)
    for i in range(flips):
        at = rng.randrange(len(data))
        if i % 10 == 9:
            length = min(rng.randrange(1, 2**16), len(data) - at)
            damage = bytes(length)
        else:
            damage = bytes([data[at] ^ 1 << rng.randrange(8)])
        with open(path, 'r+b') as file:
            file.seek(at)
            file.write(damage)
        try:
            outcomes['identical' if same(read(path), whole) else 'changed'] += 1
        except ValueError:
            outcomes['refused'] += 1
        with open(path, 'r+b') as file:
            file.seek(at)
            file.write(data[at : at + len(damage)])
    assert same(read(path), whole)
    return outcomes


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--flips', type=int, default=1000, help='number of damages of each kind of file')
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    changed = 0
    with tempfile.TemporaryDirectory() as folder:
        for kind, (name, *_) in KINDS.items():
            outcomes = flip_loop(kind, args.flips, folder, args.seed)
            changed += outcomes['changed']
            print(f'{kind}: {Path(folder, name).stat().st_size:,} bytes, {args.flips} damages:', dict(outcomes))
    raise SystemExit(changed > 0)


if __name__ == '__main__':
    main()
