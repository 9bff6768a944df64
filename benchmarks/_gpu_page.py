# SPDX-License-Identifier: Apache-2.0
"""The page of what `gpu.py` measured, made from its figures alone."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vssm.tools._tables import markdown_table

Figures = Mapping[str, Any]

CONDITIONS = dict(
    processor='card',
    memory_gib='its memory, GiB',
    multiprocessors='its multiprocessors',
    driver='driver',
    cuda='CUDA of PyTorch',
    torch='PyTorch',
    triton='Triton',
    timm='timm',
    python='Python',
    vssm='vssm',
    commit='commit',
    cores='cores of the CPU',
)
PARTS = dict(models='eager', compiled='compiled')  # the steps that measure models
STEPS = dict(inference='images/s', train='training images/s')
PASSES = ('forward', 'backward')


def page(figures: Figures) -> str:
    """What was measured, in Markdown; `-` stands for what was not."""
    steps, conditions = figures['steps'], figures['conditions']
    found = [[said, str(conditions[key])] for key, said in CONDITIONS.items() if conditions.get(key)]
    took = [[name, step['status'], counted(step), f'{step["seconds"]:.0f}'] for name, step in steps.items()]
    parts = [
        f'`{figures["command"]}`, {figures["date"]}\n',
        '**A dry run on the CPU: nothing was measured.**\n' if figures['dry_run'] else '',
        markdown_table(['', ''], found),
        markdown_table(['step', 'how it ended', 'measured', 'seconds'], took, align_right=True),
        listed('Not measured', {f'{name}, {what}': why for name, step in steps.items() for what, why in missing(step)}),
        listed('Tests that failed', dict.fromkeys(steps.get('tests', {}).get('failures', ()), '')),
        models(steps),
        scan(steps.get('op', {}).get('rows', ())),
        beside_model(figures),
    ]
    return '\n'.join(['# On a GPU\n', *filter(None, parts)])


def counted(step: Figures) -> str:
    """How much a step has measured."""
    if 'passed' in step:
        counts = {key: step[key] for key in ('passed', 'failed', 'skipped')}
        counts |= {'not run': rest} if (rest := step['chosen'] - sum(counts.values())) > 0 else {}
        return ', '.join(f'{count} {key}' for key, count in counts.items())
    return f'{len(step["rows"])} rows' if 'rows' in step else '-'


def missing(step: Figures) -> list[tuple[str, str]]:
    """What a step has left out, and why."""
    reasons = [(f'{count} tests skipped', why) for why, count in step.get('reasons', {}).items()]
    return [*step.get('left_out', {}).items(), *reasons]


def listed(title: str, lines: Mapping[str, str]) -> str:
    if not lines:
        return ''
    return f'{title}:\n\n' + ''.join(f'- {what}{why and ": "}{why}\n' for what, why in lines.items())


def cell(row: Figures, key: str, form: str, unit: float = 1) -> str:
    return f'{row[key] / unit:{form}}' if key in row else '-'


def models(steps: Figures) -> str:
    """The models' speed, beside that of the first, and their memory."""
    by_part = {part: {row['name']: row for row in steps.get(part, {}).get('rows', ())} for part in PARTS}
    names = list(dict.fromkeys(name for rows in by_part.values() for name in rows))
    if not names:
        return ''
    header, columns = ['model'], []
    for what, said in STEPS.items():
        for part, how in PARTS.items():
            header += [f'{said}, {how}', 'ratio']
            columns.append((by_part[part], f'{what}_images_per_s'))
    cells = []
    for name in names:
        line = [f'`{name}`']
        for rows, key in columns:
            row, first = rows.get(name, {}), rows.get(names[0], {})
            line += [cell(row, key, '.0f'), cell(row, key, '.2f', first[key]) if key in first else '-']
        cells.append([*line, *(cell(rows.get(name, {}), 'train_peak_mb', '.1f', 1e3) for rows in by_part.values())])
    header += [f'training GB, {how}' for how in PARTS.values()]
    row = next(iter(next(rows for rows in by_part.values() if rows).values()))
    title = f'## Models\n\nBatch {row["batch_size"]}, {row["size"]}x{row["size"]}, bfloat16 by autocast; ratios are to'
    return f'{title} `{names[0]}` in the same process.\n\n{markdown_table(header, cells, align_right=True)}'


def scan(rows: Sequence[Figures]) -> str:
    """The scan by itself, against a copy of its bytes and the 1-D scan."""
    if not rows:
        return ''
    header = ['shape', 'states', 'dtype']
    for what in PASSES:
        header += [f'{what} ms', 'of copy', '2-D / 1-D']
    cells = []
    for row in rows:
        line = [f'{row["batch"]}x{row["size"]}x{row["size"]}x{row["dim"]}', str(row['states']), row['dtype']]
        for what in PASSES:
            line += [cell(row, f'{what}_2d_ms', '.3f'), cell(row, f'{what}_of_copy', '.0%')]
            line.append(cell(row, f'{what}_2d_ms', '.2f', row[f'{what}_1d_ms']))
        cells.append(line)
    title = f'## The scan\n\nFour orders; a copy moves {rows[0]["copy_gb_per_s"]:.0f} GB/s, read and written.'
    return f'{title}\n\n{markdown_table(header, cells, align_right=True)}'


def measured(steps: Figures) -> Iterator[tuple[str, str, float]]:
    """What the model of a card may have an answer for: its key there, in words, and milliseconds."""
    for part, how in PARTS.items():
        for row in steps.get(part, {}).get('rows', ()):
            for what in STEPS:
                if (speed := row.get(f'{what}_images_per_s')) is not None:
                    key = f'{row["name"]} {row["batch_size"]}x{row["size"]} {what}'
                    yield key, f'`{row["name"]}`, {what}, {how}', 1e3 * row['batch_size'] / speed
    for row in steps.get('op', {}).get('rows', ()):
        for what in PASSES:
            if f'{what}_2d_ms' in row:
                key = f'scan {row["batch"]}x{row["size"]}x{row["size"]}x{row["dim"]} {row["dtype"]} {what}'
                yield key, key.replace(' ', ', '), row[f'{what}_2d_ms']


def beside_model(figures: Figures) -> str:
    """What was measured, beside what the model said before."""
    modelled = figures.get('modelled', {})
    cells = [
        [words, f'{ms:.2f}', f'{modelled[key]:.2f}', f'{ms / modelled[key]:.2f}']
        for key, words, ms in measured(figures['steps'])
        if key in modelled
    ]
    if not cells:
        return ''
    header = ['', 'measured ms', 'modelled ms', 'measured / modelled']
    title = '## Beside the model\n\nModelled for an H100 without a card, by `python benchmarks/gpu_model.py`.'
    return f'{title}\n\n{markdown_table(header, cells, align_right=True)}'
