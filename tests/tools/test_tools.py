# SPDX-License-Identifier: Apache-2.0
"""The command `vssm`: help, what it prints, and how it refuses bad input."""

import importlib
import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from fresh_processes import AS_MODULE, run_fresh
from fvcore.nn import FlopCountAnalysis
from fvcore.nn.jit_handles import elementwise_flop_counter
from rich.console import Console

import vssm
from vssm.models import weights as checkpoints
from vssm.ops import selective_scan_fvcore_macs, state_fusion_fvcore_macs, use_reference
from vssm.tools import _common, env, info, train
from vssm.tools import main as tools_main
from vssm.tools._options import parse_option
from vssm.tools._tables import markdown_table, print_table
from vssm.tools.main import COMMANDS, main, make_parser


@pytest.mark.parametrize('command', COMMANDS)
def test_help_shows_an_example_that_parses(command, capsys):
    with pytest.raises(SystemExit) as exit:
        main([command, '--help'])
    assert exit.value.code == 0
    example = importlib.import_module(f'vssm.tools.{command.replace("-", "_")}').EXAMPLE
    assert f'example:\n  {example}\n' in capsys.readouterr().out
    name, *argv = shlex.split(example)
    assert name == 'vssm'
    assert make_parser().parse_args(argv).command == command


def test_importing_the_command_is_light():
    """`vssm --help` waits for torch and timm, which the package itself imports, and for nothing else that is slow."""
    code = (
        'import sys; from vssm.tools.main import make_parser; make_parser(); '
        'print([m for m in ("mmengine", "sklearn", "matplotlib", "fvcore") if m in sys.modules])'
    )
    assert run_fresh(code).stdout == '[]\n'


def test_a_subcommand_runs_as_a_module():
    result = run_fresh(AS_MODULE, 'vssm.tools.configs')
    assert result.returncode == 0 and 'digits/vmamba_test' in result.stdout and not result.stderr


def test_tables_align_figures_and_keep_names_whole(capsys):
    rows = [('a-name-that-stays-whole', '1.5 s', 'words that may be [bold]broken'), ('b', '-', '')]
    print_table(['model', 'time', 'note'], rows, 'title', to=terminal(60))
    title, *lines = capsys.readouterr().out.splitlines()
    assert title.strip() == 'title' and all(len(line) <= 60 for line in lines)
    assert any('a-name-that-stays-whole │ 1.5 s │ words that' in line for line in lines)
    assert any('│ b                       │     - │' in line for line in lines) and '[bold]broken' in ''.join(lines)


def terminal(width):
    return Console(width=width, file=sys.stdout, force_terminal=True, color_system=None)


WIDE = [
    ('mambavision_large2_512', '241.515', '152.4170', '512x512', 'nvidia/MambaVision-L2-512-21K', 'cc-by-nc-sa-4.0'),
    ('vmamba_tiny', '30.249', '4.9056', '224x224', '-', 'mit'),
]


@pytest.mark.parametrize('width', [60, 80])
def test_a_table_that_is_too_wide_becomes_blocks(width, capsys):
    print_table(['model', 'params/M', 'GMACs', 'input', 'weights', 'licence'], WIDE, to=terminal(width))
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= width for line in lines) and '│' not in ''.join(lines)
    assert [line for line in lines if not line.startswith('  ')] == [row[0] for row in WIDE]
    words = ' '.join(lines).replace(',', '').split()
    assert all(cell in words for row in WIDE for cell in row)
    assert 'params/M 30.249, GMACs 4.9056' in ' '.join(' '.join(lines).split())


@pytest.mark.parametrize('width', [60, 80])
def test_a_long_name_with_words(width, capsys):
    """As `vssm configs` has them: at 60 columns nothing would be left for the words."""
    name, words = 'coco/mask-rcnn_groupmamba_base_fpn_8xb2-ms-3x_coco', 'words ' * 20
    print_table(['config', 'what it trains'], [(name, words.strip())], to=terminal(width))
    out = capsys.readouterr().out
    assert name in out and ('│' in out) == (width == 80) and out.split().count('words') == 20


def test_a_pipe_gets_plain_lines(capsys):
    rows = [('a', '1.5', 'any words, however many there are, stay in one line ' * 3), ('name', '10.25', 'b')]
    print_table(['model', 'time', 'note'], rows, 'title')
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == 'title' and [re.split('  +', line.rstrip()) for line in lines[2:]] == [
        [cell.strip() for cell in row] for row in rows
    ]
    assert lines[2].index('1.5') + 3 == lines[3].index('10.25') + 5


def test_tables_in_markdown():
    rows = [('a', '1'), ('b', '2')]
    assert markdown_table(['x', 'y'], rows) == '| x | y |\n| --- | --- |\n| a | 1 |\n| b | 2 |\n'
    assert markdown_table(['x', 'y'], rows, align_right=True).splitlines()[1] == '| --- | ---: |'


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(['--version'])
    assert capsys.readouterr().out == f'vssm {vssm.__version__}\n'


@pytest.mark.parametrize(
    'name, scan, params, gmacs, top1, weights, license',
    [
        ('vmamba_tiny', '1-D', '30.249', '4.9056', '82.6', 'url', 'mit'),
        ('vmamba2d_small', '2-D', '50.148', '8.8169', '-', '-', '-'),
        ('spatial_mamba_tiny', 'fused', '26.749', '4.4677', '83.5', 'fetch', 'apache-2.0'),
        ('mambavision_tiny', '1-D', '31.794', '4.4816', '82.3', 'nvidia/MambaVision-T-1K', 'cc-by-nc-sa-4.0'),
    ],
)
def test_info_counts_what_was_published(
    name, scan, params, gmacs, top1, weights, license, capsys, tmp_path, monkeypatch
):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    expected = [name, scan, params, gmacs, '224x224', top1, weights, license]
    assert main(['info', name]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if name in line)
    assert row.split() == expected


def test_info_tells_cached_weights(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    path = checkpoints.cached_path(timm.get_pretrained_cfg('spatial_mamba_tiny'))
    path.parent.mkdir(parents=True)
    safetensors.torch.save_file({}, path)
    assert main(['info', 'spatial_mamba_*']) == 0
    weights = {line.split()[0]: line.split()[-2] for line in capsys.readouterr().out.splitlines()[1:]}
    assert weights == dict(spatial_mamba_tiny='cached', spatial_mamba_small='fetch', spatial_mamba_base='fetch')


@pytest.mark.parametrize('name', ['2dvmamba_tiny', 'vmamba2d_tiny.in1k'])
def test_info_knows_aliases_and_tags(name, capsys):
    assert main(['info', name]) == 0
    assert 'vmamba2d_tiny' in capsys.readouterr().out


def test_info_takes_beginnings(capsys):
    assert main(['info', 'test_vmamba2']) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == ['test_vmamba2d']


def test_info_takes_patterns(capsys):
    assert main(['info', 'test_*']) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]]
    assert names == [name for name in checkpoints.list_models() if name.startswith('test_')]
    assert len(names) >= 7


@pytest.mark.parametrize('name', [name for name in checkpoints.list_models() if name.startswith('test_')])
def test_macs_follow_the_rules_of_fvcore(name):
    model = timm.create_model(name).eval()
    image = torch.zeros(1, 3, 64, 32)
    analysis = FlopCountAnalysis(model, image).unsupported_ops_warnings(False)
    analysis.set_op_handle('vssm::selective_scan', selective_scan_fvcore_macs)
    analysis.set_op_handle('vssm::state_fusion', state_fusion_fvcore_macs)
    authors = {  # who counted otherwise than fvcore, which counts pooling so, too; and what it has no rule for
        'test_spatial_mamba': dict(batch_norm=5),
        'test_vim': dict(rms_norm=4),
        **{name: dict(mean=1) for name in ('test_vmamba', 'test_vmamba2d', 'test_vanilla_vmamba')},
    }
    for operation, macs in authors.get(name, {}).items():
        analysis.set_op_handle(f'aten::{operation}', elementwise_flop_counter(macs, 0))
    expected = analysis.total()
    model, image = model.to('meta'), image.to('meta')
    assert info.count_macs(model, image) == expected
    with use_reference():
        assert info.count_macs(model, image) == expected


def test_env(capsys):
    assert main(['env']) == 0
    out = capsys.readouterr().out
    versions = dict(line.split() for line in out.splitlines() if len(line.split()) == 2)
    assert versions['vssm'] == vssm.__version__
    assert versions['timm'] == timm.__version__
    assert torch.__version__.startswith(versions['torch'])
    assert f'{torch.get_num_threads()} thread' in out


def test_env_counts_in_words(capsys, monkeypatch):
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 1)
    monkeypatch.setattr(env.os, 'cpu_count', lambda: 1)
    assert main(['env']) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith('1 CPU, 1 thread')


def test_env_names_every_package_of_the_extras():
    """But for what runs and checks the tests, and makes the pages."""
    project = tomllib.loads((Path(__file__).parents[2] / 'pyproject.toml').read_text())['project']
    extras = project['optional-dependencies']
    needed = [
        *project['dependencies'],
        *(name for extra in extras.keys() - {'dev', 'docs', 'test'} for name in extras[extra]),
    ]
    names = {re.match(r'[\w-]+', name)[0] for name in needed} - {'vssm'}
    assert names <= {name for distributions in env.PACKAGES.values() for name in distributions}


def test_env_names_a_fork_in_place_of_the_original(monkeypatch, capsys):
    monkeypatch.setattr(env, 'find_distribution', lambda name: '1.2' if name == 'onedl-mmcv' else None)
    assert main(['env']) == 0
    out = capsys.readouterr().out
    assert re.search(r'^onedl-mmcv +1\.2$', out, re.MULTILINE) and 'mmcv-lite' not in out


def test_env_names_the_kernels_in_use(cpu_path):
    assert env.backends()['CPU'] == f'on: {cpu_path}'
    assert env.backends()['reference'].startswith('off')


@pytest.mark.parametrize(
    'variable, value, backend, state',
    [
        ('VSSM_REFERENCE', '1', 'reference', 'on: VSSM_REFERENCE=1'),
        ('VSSM_REFERENCE', '1', 'CPU', 'off: VSSM_REFERENCE=1'),
        ('VSSM_CPU_CAPABILITY', 'mmx', 'CPU', 'off: VSSM_CPU_CAPABILITY must be one of'),
    ],
)
def test_env_says_why_a_backend_is_off(variable, value, backend, state, monkeypatch):
    monkeypatch.setenv(variable, value)
    assert env.backends()[backend].startswith(state)


@pytest.mark.parametrize(
    'pattern, shown',
    [
        (['digits/*'], {'digits/vmamba2d_test', 'digits/vmamba_test'}),
        (['digits'], {'digits/vmamba2d_test', 'digits/vmamba_test'}),
        (['digits/vmamba2d'], {'digits/vmamba2d_test'}),
        (['*2d_test'], {'digits/vmamba2d_test'}),
    ],
    ids=['folder', 'beginning', 'longer beginning', 'pattern'],
)
def test_configs_lists_names_and_what_they_are(pattern, shown, capsys):
    assert main(['configs', *pattern]) == 0
    out = capsys.readouterr().out
    assert {word for word in out.split() if word.startswith('digits/')} == shown
    assert 'handwritten digits' in out.replace('\n', ' ')


def test_configs_lists_all(capsys):
    assert main(['configs']) == 0
    names = re.findall(r'^(\S+/\S+)  ', capsys.readouterr().out, re.MULTILINE)
    assert names == _common.list_configs() and not [name for name in names if '/_' in name]


def test_the_path_of_a_config_is_what_another_inherits(capsys, tmp_path):
    assert main(['configs', '--path', 'digits/vmamba2d_test']) == 0
    path = capsys.readouterr().out.strip()
    own = tmp_path / 'own.py'
    own.write_text(f"_base_ = '{path}'\nmodel = dict(num_classes=3)\n")
    cfg = _common.load_config(str(own))
    assert cfg.model == dict(type='ImageClassifier', model_name='test_vmamba2d', num_classes=3, in_chans=1)


@pytest.mark.parametrize('name', ['digits/vmamba_test'])
def test_a_copy_of_a_config_says_the_same_and_stands_alone(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(['configs', '--copy', name]) == 0
    file = f'{name.partition("/")[2]}.py'
    assert f'Written to {file}' in capsys.readouterr().out
    copy = _common.load_config(file)
    assert copy.to_dict() == _common.load_config(name).to_dict() and '_base_' not in (tmp_path / file).read_text()
    assert main(['configs', '--copy', name]) == 2
    assert f'must not replace a file, got {name}' in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize('name', ['ade20k/upernet_vmamba_tiny_4xb4-160k_ade20k-512x512'])
def test_a_copy_keeps_no_variable_that_changes_nothing(name, tmp_path, monkeypatch):
    pytest.importorskip('mmseg', reason="mmseg is not installed: pip install '.[mmlab]'")
    monkeypatch.chdir(tmp_path)
    assert main(['configs', '--copy', name]) == 0
    copy, whole = _common.load_config(f'{name.partition("/")[2]}.py').to_dict(), _common.load_config(name).to_dict()
    assert copy == {key: whole[key] for key in copy}
    left_out = set('backbone_norm_cfg backend_args crop_size data_root dataset_type img_ratios norm_cfg'.split())
    left_out |= {'optimizer', 'test_pipeline', 'train_pipeline', 'vis_backends'}
    assert whole.keys() - copy.keys() <= left_out and 'data_root' not in copy and 'tta_pipeline' in copy


MMENGINE_READS = ['1', '-2', '1e-3', '.5', 'inf', '-inf', 'nan', 'true', 'False', 'TRUE', 'None', 'none', 'cosine']
MMENGINE_READS += ['a,b', 'mIoU,mDice', '1,2', '[1,2]', '(1,2)', '[a,b]', '[(1,2),[a,b],c]', '()', '[]', 'a/b.py', '08']
MMENGINE_READS += ['[true,inf]', '(1333,800)', '[1, 2]', '[ a, b ]', 'http://h:1/x', "['a','b']", '"text"']


@pytest.mark.parametrize('text', MMENGINE_READS)
def test_values_are_read_as_mmengine_reads_them(text):
    from mmengine.config import DictAction

    key, value = parse_option(f'a.b={text}')
    expected = DictAction._parse_iterable(text)
    assert key == 'a.b' and repr(value) == repr(expected)  # NaN is not itself


@pytest.mark.parametrize(
    'text, value',
    [
        ("'1'", '1'),
        ('"traffic light"', 'traffic light'),
        ("['traffic light', 'car']", ['traffic light', 'car']),
        ("{'type': 'EMAHook', 'momentum': 1e-4}", dict(type='EMAHook', momentum=1e-4)),
        ("[{'type': 'EMAHook'}, 1]", [dict(type='EMAHook'), 1]),
        ('/my data/images', '/my data/images'),
        ('a=b', 'a=b'),
    ],
)
def test_what_mmengine_would_garble_is_read_as_python(text, value):
    """It has no dictionaries, and drops every blank and every quote."""
    assert parse_option(f'key={text}') == ('key', value)


UNKNOWN = [
    ('max_epoch=1', "what reads the config takes no 'max_epoch'. Did you mean 'train_cfg.max_epochs'?"),
    ('train_cfg.max_epoch=1', "train_cfg takes no 'max_epoch'. Did you mean 'train_cfg.max_epochs'?"),
    ('optim_wrapper.optimizer.typ=SGD', "takes no 'typ'. Did you mean 'optim_wrapper.optimizer.type'?"),
    ('optim_wrapper.acumulative_counts=2', "Did you mean 'optim_wrapper.accumulative_counts'?"),
    ('train_dataloader.batchsize=2', "Did you mean 'train_dataloader.batch_size'?"),
    ('train_dataloader.dataset.splt=a', "Did you mean 'train_dataloader.dataset.split'?"),
    ('train_dataloader.sampler.shufle=true', "Did you mean 'train_dataloader.sampler.shuffle'?"),
    ('default_hooks.checkpoint.intervall=2', "Did you mean 'default_hooks.checkpoint.interval'?"),
    ('default_hooks.checkpont.interval=2', "Did you mean 'default_hooks.checkpoint'?"),
    ('param_scheduler.0.ends=2', "Did you mean 'param_scheduler.0.end'?"),
    ('param_scheduler.2.end=2', "param_scheduler has entries 0 to 1, got '2'"),
    ('val_evaluator.topks=2', "Did you mean 'val_evaluator.topk'?"),
    ('randomness.sed=2', "Did you mean 'randomness.seed'?"),
    ('auto_scale_lr.enabel=true', "Did you mean 'auto_scale_lr.enable'?"),
    ('resum=true', "Did you mean 'resume'?"),
    ('train_cfg.max_epochs=abc', "train_cfg.max_epochs must be a number, as 30 in its place is, got 'abc'"),
    ('optim_wrapper.optimizer.lr=fast', "must be a number, as 0.004 in its place is, got 'fast'"),
    ('optim_wrapper.optimizer.fused=yes', "must be True or False, as True in its place is, got 'yes'"),
    ('model.with_cp=no', "model.with_cp must be True or False, as False in its place is, got 'no'"),
    ('model=test_vmamba', 'model must be a dictionary, as '),
]


@pytest.mark.parametrize('option, said', UNKNOWN, ids=[option for option, _ in UNKNOWN])
def test_options_without_an_effect_are_refused(option, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(['train', 'digits/vmamba2d_test', '--cfg-options', option]) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith('vssm train: --cfg-options ') and error.count('\n') == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    'options',
    [
        ['model.dims=24', 'model.drop_path_rate=0.1', 'model.with_cp=true'],
        ['model.pretrained=false', 'model.init_cfg.type=Pretrained', 'model.init_cfg.checkpoint=FILE'],
        ['optim_wrapper.optimizer.momentum=0.9', 'optim_wrapper.optimizer.type=sgd'],
        [
            'optim_wrapper.type=AmpOptimWrapper',
            'optim_wrapper.loss_scale=dynamic',
            'optim_wrapper.optimizer.betas=0.9,0.99',
        ],
        ['optim_wrapper.optimizer.layer_decay=0.7', 'optim_wrapper.clip_grad=None', 'train_cfg.val_begin=3'],
        ['train_cfg.by_epoch=false', 'train_cfg.max_iters=5', 'force=true'],
        ['default_hooks.timing.type=IterTimerHook', 'default_hooks.checkpoint.save_best=auto', 'unreadable=skip'],
        ["custom_hooks=[{'type': 'EMAHook'}]", 'find_unused_parameters=true', 'experiment_name=a', 'log_level=DEBUG'],
        ['train_dataloader.num_batch_per_epoch=2', 'train_dataloader.dataset.affine.shear=3', 'load_from=FILE'],
        ['val_evaluator.prefix=val', 'val_evaluator.topk=1,2', 'visualizer.type=Visualizer', 'sync_bn=torch'],
    ],
    ids=lambda options: options[0],
)
def test_options_that_something_takes_may_be_new(options, capsys):
    args = make_parser().parse_args(['train', 'digits/vmamba2d_test', '--cfg-options', *options])
    cfg = _common.read_config(args)
    for option in options:
        key, value = parse_option(option)
        node = cfg
        for name in key.split('.'):
            node = node[name]
        assert node == value
    assert not capsys.readouterr().err


def test_any_hook_of_a_run_may_be_left_out():
    mm = pytest.importorskip('vssm.models.mm.runner')
    options = [f'default_hooks.{name}=None' for name in mm.OWN_HOOKS]
    cfg = _common.read_config(make_parser().parse_args(['train', 'digits/vmamba2d_test', '--cfg-options', *options]))
    assert {name for name, hook in cfg.default_hooks.items() if hook is None} == mm.OWN_HOOKS.keys()


def test_a_new_key_that_is_nearly_an_old_one_is_noted(capsys):
    """Where anything may be new."""
    options = ['train_dataloader.dataset.affine.degree=3']
    _common.read_config(make_parser().parse_args(['train', 'digits/vmamba2d_test', '--cfg-options', *options]))
    note = (
        'note: train_dataloader.dataset.affine.degree is new to the config, where train_dataloader.dataset.affine has '
    )
    assert capsys.readouterr().err == f"{note}'degrees'.\n"


@pytest.mark.parametrize(
    'config, options, said',
    [
        ('digits/vmamba_test', ['--cfg-options', 'model.model_name=nope'], ('vmamba_test.py cannot be built', 'nope')),
        ('digits/vmamba_test', ['--cfg-options', 'unreadable=mend'], ("'stop' or 'skip', got 'mend'",)),
        (
            'digits/vmamba_test',
            ['--cfg-options', 'default_hooks.checkpoint.max_keep_ckpts=1'],
            ('max_keep_ckpts must be at least 2, or -1 for all, got 1',),
        ),
        (
            'imagenet/vmamba_tiny_8xb128-300e_in1k',
            ['--data-root', 'nowhere', '--cfg-options', 'model.model_name=test_vmamba'],
            ('data_root must be a folder, got nowhere, which does not exist', '--data-root'),
        ),
    ],
)
def test_config_that_cannot_run_gives_one_sentence(config, options, said, capsys, tmp_path):
    assert main(['train', config, '--work-dir', str(tmp_path), *options]) == 2
    message = capsys.readouterr().err
    assert all(part in message for part in said) and message.count('\n') == 1


@pytest.mark.parametrize(
    'argv, said',
    [
        (['train', 'digits/vmamba2d'], ("got 'digits/vmamba2d'", "Did you mean 'digits/vmamba2d_test'?")),
        (['train', 'nowhere.py'], ('nowhere.py does not exist', 'vssm configs')),
        (['train', 'digits/vmamba_test', '--cfg-options', 'seed'], ('KEY=VALUE', "got 'seed'")),
        (
            ['train', 'digits/vmamba_test', '--cfg-options', 'device.index=1'],
            ('--cfg-options must fit', 'device.index=1'),
        ),
        (
            ['train', 'digits/vmamba_test', '--cfg-options', 'load_from=no.pth'],
            ('load_from must be a checkpoint', 'got no.pth'),
        ),
        (
            ['train', 'digits/vmamba_test', '--cfg-options', 'custom_hooks=[dict(type="EMAHook")]'],
            ('must be Python literals', 'custom_hooks=[dict('),
        ),
        (['train', 'digits/vmamba_test', '--resume', 'no.pth'], ('must be a checkpoint', 'got no.pth')),
        (
            ['train', 'digits/vmamba_test', '--data-root', 'there'],
            ('--data-root needs a config whose data sets share',),
        ),
        (['train', 'digits/vmamba_test', '--auto-scale-lr'], ('--auto-scale-lr needs a config with auto_scale_lr',)),
        (
            ['train', 'digits/vmamba_test', '--amp', '--cfg-options', 'optim_wrapper.type=AmpOptimWrapper'],
            ('--amp needs a config whose optim_wrapper is an OptimWrapper, got AmpOptimWrapper',),
        ),
        (['test', 'digits/vmamba_test', 'no.pth'], ('no.pth does not exist', 'vssm train digits/vmamba_test')),
        (['train', 'digits/vmamba_test', '--work-dir', __file__], ('--work-dir must be a folder', 'which is a file.')),
        (['test', 'digits/vmamba_test', '/'], ('checkpoint / is a folder',)),
        (['info', 'vmamba2d_tny'], ("got 'vmamba2d_tny'", "Did you mean 'vmamba2d_tiny'?")),
        (['info', 'resnet50'], ("got 'resnet50'",)),
        (['configs', 'digist'], ('in ade20k, coco, digits,', "got 'digist'", "Did you mean 'digits'?")),
    ],
    ids=' '.join,
)
def test_bad_input_gives_one_sentence_and_exit_code_2(argv, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f'vssm {argv[0]}: ') and captured.err.count('\n') == 1
    assert all(part in captured.err for part in said), captured.err
    assert not captured.out and not list(tmp_path.iterdir())


@pytest.mark.parametrize('argv', [[], ['trian'], ['train']], ids=['nothing', 'unknown command', 'no config'])
def test_bad_arguments_give_exit_code_2(argv, capsys):
    with pytest.raises(SystemExit) as exit:
        main(argv)
    assert exit.value.code == 2
    assert 'usage: vssm' in capsys.readouterr().err


@pytest.mark.parametrize(
    'missing, argv, extra',
    [
        ('mmengine', ['train', 'digits/vmamba_test'], 'demo'),
        ('mmengine', ['train', 'finetune/vmamba_tiny_1xb64-50e_folder'], 'train'),
        ('mmengine', ['train', 'wsi/survival'], 'wsi'),
        ('mmengine', ['train', 'coco/mask-rcnn_vmamba_tiny_fpn_8xb2-1x_coco'], 'mmlab'),
        ('sklearn', ['train', 'digits/vmamba_test'], 'demo'),
        ('mmengine', ['demo'], 'demo'),
        ('sklearn', ['demo'], 'demo'),
        ('matplotlib', ['demo'], 'demo'),
    ],
)
def test_a_missing_extra_is_named(missing, argv, extra, capsys, tmp_path, monkeypatch):
    for module in [missing, *(name for name in sys.modules if name.startswith(f'{missing}.'))]:
        monkeypatch.setitem(sys.modules, module, None)  # importing it fails as if it were not installed
    assert main([*argv, '--work-dir', str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f'needs the package {missing}' in error and f'`pip install ".[{extra}]"` in a clone' in error


@pytest.mark.parametrize(
    'missing, config',
    [
        ('mmdet', 'coco/mask-rcnn_vmamba_tiny_fpn_8xb2-1x_coco'),
        ('mmseg', 'ade20k/upernet_vmamba_tiny_4xb4-160k_ade20k-512x512'),
    ],
)
def test_a_missing_base_is_named(missing, config, capsys, tmp_path, monkeypatch):
    from mmengine.config import config as module

    monkeypatch.setattr(module, 'check_installed', lambda name: False, raising=False)
    monkeypatch.setattr(module, 'is_installed', lambda name: False, raising=False)
    assert main(['train', config, '--work-dir', str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f'needs the package {missing}' in error and '`pip install ".[mmlab]"` in a clone' in error


@pytest.mark.parametrize('missing, fork', [('mmseg', 'onedl-mmsegmentation'), ('mmdet', 'onedl-mmdetection')])
def test_the_forks_of_openmmlab_are_not_overwritten(missing, fork, capsys, monkeypatch):
    """By the originals, which have the same names in Python."""

    def run(args):
        raise ModuleNotFoundError(name=missing)

    monkeypatch.setattr(env, 'run', run)
    monkeypatch.setattr(tools_main, 'find_distribution', lambda name: '1' if name == 'onedl-mmengine' else None)
    assert main(['env']) == 2
    error = capsys.readouterr().err
    assert f'which is not found beside onedl-mmengine: run `pip install --no-deps {fork}`' in error


def test_bases_of_a_fork_are_found_by_the_name_of_the_module(monkeypatch):
    from mmengine.config import utils

    packages = dict(mmseg='mmsegmentation', mmdet='mmdet', mmaction='mmaction2')  # the last is not there at all
    monkeypatch.setattr(utils, 'MODULE2PACKAGE', packages)
    monkeypatch.setattr(_common, 'find_distribution', lambda name: None)
    monkeypatch.setattr(_common.importlib.util, 'find_spec', lambda name: 'found' if name != 'mmaction' else None)
    _common._find_by_module()
    assert packages == dict(mmseg='mmseg', mmdet='mmdet', mmaction='mmaction2')


class Interrupted:
    """A runner in whose training Ctrl-C is pressed."""

    def __init__(self, last):
        self._last_checkpoint = last

    def train(self):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    'last, options, said',
    [
        ('work/epoch_3.pth', [], 'the same command with --resume goes on from work/epoch_3.pth.'),
        ('work/epoch_3.pth', ['--overwrite'], 'with --resume in place of --overwrite goes on from work/epoch_3.pth.'),
        (None, [], 'interrupted before a checkpoint was written; the same command begins again.'),
    ],
)
def test_an_interrupted_training_says_how_to_go_on(last, options, said, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(train, 'build_runner', lambda cfg: Interrupted(last))
    assert main(['train', 'digits/vmamba_test', '--work-dir', str(tmp_path / 'run'), *options]) == 130
    error = capsys.readouterr().err
    assert error.startswith('vssm train: interrupted') and error.endswith(f'{said}\n') and error.count('\n') == 1


@pytest.mark.parametrize('option', [None, '--overwrite', '--resume'])
def test_a_used_work_dir_is_not_overwritten_unasked(option, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(train, 'build_runner', lambda cfg: Interrupted(None))
    (tmp_path / 'epoch_1.pth').touch()
    options = [option] if option else []
    assert main(['train', 'digits/vmamba_test', '--work-dir', str(tmp_path), *options]) == (130 if option else 2)
    refused = f'{tmp_path} holds files of an earlier run (epoch_1.pth): --resume goes on'
    assert (refused in capsys.readouterr().err) == (option is None)


def test_a_missing_system_library_is_named(capsys, monkeypatch):
    def run(args):
        raise ImportError('libGL.so.1: cannot open shared object file')

    monkeypatch.setattr(env, 'run', run)
    assert main(['env']) == 2
    assert 'opencv-python-headless' in capsys.readouterr().err


@pytest.mark.parametrize('error', [ImportError('something else'), ModuleNotFoundError('no', name='torchfoo')])
def test_other_import_errors_are_not_hidden(error, monkeypatch):
    def run(args):
        raise error

    monkeypatch.setattr(env, 'run', run)
    with pytest.raises(type(error)):
        main(['env'])
