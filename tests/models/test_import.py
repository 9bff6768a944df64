# SPDX-License-Identifier: Apache-2.0
"""What importing the package does to the process besides registering models and operators."""

import json

from fresh_processes import run_fresh

SCRIPT = """
import atexit, gc, json, locale, logging, os, random, signal, sys, threading, warnings

import numpy, timm, torch, torch.utils._python_dispatch, torchvision


def state():
    backends = {
        f'{name}.{flag}': getattr(getattr(torch.backends, name), flag)
        for name, flags in dict(
            cudnn=('enabled', 'benchmark', 'deterministic', 'allow_tf32'), mkldnn=('enabled', 'deterministic'),
        ).items()
        for flag in flags
    }
    loggers = {None: logging.root, **logging.root.manager.loggerDict}
    module = torch.nn.modules.module
    return dict(
        arguments=sys.argv,
        atexit=atexit._ncallbacks(),
        autocast=[torch.is_autocast_enabled('cpu'), torch.is_autocast_enabled('cuda')],
        backends=backends,
        default_device=torch.get_default_device(),
        default_dtype=torch.get_default_dtype(),
        deterministic=torch.are_deterministic_algorithms_enabled(),
        environment=dict(os.environ),
        excepthooks=[sys.excepthook, sys.unraisablehook, threading.excepthook, sys.displayhook],
        finders=[*sys.meta_path, *sys.path_hooks],
        garbage=[gc.get_threshold(), gc.isenabled()],
        gradients=[torch.is_grad_enabled(), torch.is_anomaly_enabled()],
        locale=locale.setlocale(locale.LC_ALL),
        loggers={
            name: [logger.level, logger.handlers, logger.filters, logger.propagate, logger.disabled]
            for name, logger in loggers.items()
            if isinstance(logger, logging.Logger) and (logger.handlers or logger.level or logger.filters)
        },
        matmul=torch.get_float32_matmul_precision(),
        modes=[torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()],
        module_hooks=[len(value) for name, value in sorted(vars(module).items()) if name.startswith('_global_')
                      and hasattr(value, '__len__')],
        number_format=[numpy.get_printoptions(), numpy.geterr(), torch._tensor_str.PRINT_OPTS],
        random=[random.getstate(), numpy.random.get_state(), torch.get_rng_state().tolist()],
        recursion=sys.getrecursionlimit(),
        safe_globals=torch.serialization.get_safe_globals(),
        search_path=sys.path,
        sharing=torch.multiprocessing.get_sharing_strategy(),
        signals={number: signal.getsignal(number) for number in signal.valid_signals()},
        start_method=torch.multiprocessing.get_start_method(allow_none=True),
        switch_interval=sys.getswitchinterval(),
        threads=[torch.get_num_threads(), torch.get_num_interop_threads(), threading.active_count()],
        tracing=[sys.gettrace(), sys.getprofile()],
        warnings=warnings.filters,
        working_directory=os.getcwd(),
    )


def text(value):
    if isinstance(value, (list, tuple)):
        return [text(item) for item in value]
    return {str(key): text(item) for key, item in value.items()} if isinstance(value, dict) else repr(value)


before = text(state())
import vssm
print(json.dumps([before, text(state()), sorted(vssm.models.backbone.ALIASES)]))
"""


def test_importing_the_package_leaves_the_process_as_it_was():
    """But for a class that timm's `checkpoint_path=` needs and the warnings that timm has for aliases."""
    result = run_fresh(SCRIPT)
    assert result.returncode == 0, result.stderr
    assert not result.stderr
    before, after, aliases = json.loads(result.stdout)
    changed = {key for key in before if before[key] != after[key]}
    assert changed == {'safe_globals', 'warnings'}
    added = {key: [item for item in after[key] if item not in before[key]] for key in changed}
    assert all(len(added[key]) == len(after[key]) - len(before[key]) for key in changed)  # and nothing was removed
    assert added['safe_globals'] == [["<class 'collections.OrderedDict'>", "'yacs.config.CfgNode'"]]
    assert len(added['warnings']) == len(aliases)
    for alias in aliases:
        assert any(f'Mapping deprecated model name {alias} ' in str(item) for item in added['warnings']), alias
