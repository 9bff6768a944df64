# SPDX-License-Identifier: Apache-2.0
"""A network that someone changed, or looks into, computes what it computes without shortcuts.

Every kind of change comes to every inner module of every model. Then two runs are held against each other, by each
output, gradient and statistic and by what onlookers saw: one with the shortcuts, whose thresholds are so low that even
these small maps exceed them, and one without.
"""

import contextlib
import functools
import inspect
import itertools
import re

import pytest
import timm
import torch
from timm.layers import Attention, DropPath
from timm.layers.grn import GlobalResponseNorm
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import module as nn_module
from torch.nn.utils import parametrizations, parametrize, prune
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from vssm.models import layers
from vssm.models.weights import list_models

# VMamba's layers are 2DVMamba's, and take the same shortcuts.
SMALL = [name for name in list_models() if name.startswith('test_') and name != 'test_vmamba']
TINY = ('vmamba2d_tiny', 'spatial_mamba_tiny')
FIRST = 'test_spatial_mamba'  # which has all that is decorated in `layers.py`
FIRST_AND_SLOW = (FIRST, *(pytest.param(name, marks=pytest.mark.slow) for name in SMALL if name != FIRST))
SIZES = {  # of the small models; one block in each of two stages, where nothing else is said
    'test_groupmamba': dict(depths=(1,), dims=(16,), stem_dim=16),  # with another in the head
    'test_mambavision': dict(depths=(1, 1, 2, 1), dims=16),  # the first two stages are convolutions
    'test_vim': dict(depth=2, patch_size=4, patch_stride=4, img_size=(8, 16)),
}
RUNS = tuple(itertools.product((5, 2, 1), ('evaluation', 'gradients', 'training')))  # gradients are those of evaluation

STATEFUL = (nn.BatchNorm2d, nn.Dropout, DropPath)  # what evaluation changes


# ---- one run, and two of them ----------------------------------------------------------------------------------------


@functools.cache
def make_model(name):
    """A small model of a few blocks, a larger one with one in each of its own stages."""
    torch.manual_seed(1)
    size = SIZES.get(name, dict(depths=(1, 1), dims=(16, 64))) if name in SMALL else dict(depths=(1, 1, 1, 1))
    model = timm.create_model(name, num_classes=3, drop_path_rate=0.3, drop_rate=0.2, **size)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.std() == 0:
                parameter += 0.1 * torch.randn_like(parameter)  # ones and zeros would hide errors
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.1  # or the statistics of a few values would make much of rounding
        elif isinstance(module, nn.ReLU):
            module.inplace = False  # for hooks of the backward, which PyTorch refuses before an operation in place
    return model


@functools.cache
def called(name):
    """Names of the modules that a model calls."""
    model, names = make_model(name), set()
    with restored(model):
        for n, module in model.named_modules():
            module.register_forward_pre_hook(lambda module, args, n=n: names.add(n))
        run(model.eval(), 1, 'evaluation', [], contextlib.nullcontext)
    return names


@pytest.fixture(autouse=True)
def _low_thresholds(monkeypatch, one_thread):
    monkeypatch.setattr(layers, '_GROUP_BYTES', None)  # `run` sets it
    monkeypatch.setattr(layers, '_CONV_LEAST', (0, 0))
    monkeypatch.setattr(layers, '_FUSED_LEAST', (0, 0))


@contextlib.contextmanager
def without_shortcuts():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, '_is_eager_on_cpu', lambda *tensors: False)
        yield


def run(model, batch, mode, log, onlooker):
    """The results of a run by name, and what onlookers wrote into the log meanwhile."""
    height, width = 2 ** (len(model.feature_info) + 1), 2 ** (len(model.feature_info) + 2)  # the last map is 1x2
    floats = min(f['num_chs'] * height * width // f['reduction'] ** 2 for f in model.feature_info)
    layers._GROUP_BYTES = (
        1.95 * 4 * floats
    )  # the MLP cuts the narrowest map of one image into three, in training into two
    torch.manual_seed(2)
    log.clear()
    buffers = {key: value.clone() for key, value in model.named_buffers()}
    x = torch.randn(batch, 3, height, width, requires_grad=mode != 'evaluation')
    with torch.set_grad_enabled(mode != 'evaluation'), onlooker(log):
        y = model(x)
    found = {'y': y.detach()}
    if mode != 'evaluation':
        model.zero_grad()
        y.square().sum().backward()
        found |= {f'gradient of {key}': p.grad for key, p in (('images', x), *model.named_parameters())}
    for key, value in model.named_buffers():
        found[key] = value.clone()
        value.copy_(buffers[key])
    return found, list(log)


def differences(found, expected, kinks):
    """The names of the results of which an element differs by more than rounding."""
    if found.keys() != expected.keys():
        return sorted(found.keys() ^ expected.keys())
    least = 1e-2 * max((value.abs().max() for value in expected.values() if value is not None), default=0)
    return [key for key in expected if not is_close(key, found[key], expected[key], kinks, least)]


def is_close(key, a, b, kinks, least):
    if a is None or b is None or torch.equal(a, b):
        return (a is None) == (b is None)
    if re.search(r'\bconv\d\.bias$|skip_scale$', key):
        return True  # a norm takes it away again: its gradient is rounding, that of a bias in training
    tolerance = 2e-2 if kinks and key.startswith('gradient') else 2e-5
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * max(b.abs().max(), least))


def outcome(*args):
    try:
        return run(*args)
    except RuntimeError as error:  # PyTorch's own, such as that of a backward hook before an operation in place
        return {}, [str(error)]


def compare(what, model, batch, mode, log, onlooker=contextlib.nullcontext):
    """Run a model with and without shortcuts: results must be the same, and what onlookers saw, which is returned."""
    with without_shortcuts():
        expected, expected_log = outcome(model, batch, mode, log, onlooker)
    found, found_log = outcome(model, batch, mode, log, onlooker)
    kinks = any(isinstance(m, nn.ReLU) for m in model.modules())  # where rounding may choose the side
    different = differences(found, expected, kinks)
    assert not different, f'{what}, {mode} of {batch}: {different[:4]} differ'
    if found_log != expected_log:  # an assertion would show both at length
        at = next((i for i, (a, b) in enumerate(zip(found_log, expected_log, strict=False)) if a != b), -1)
        pytest.fail(f'{what}, {mode} of {batch}: saw {found_log[at]} in place of {expected_log[at]}')
    return found_log


@pytest.fixture
def taken(monkeypatch):
    """The names of the shortcuts that were taken."""
    names = set()

    def note(function, name):
        def noted(*args):
            names.add(name(*args))
            return function(*args)

        monkeypatch.setattr(layers, function.__name__, noted)

    note(layers._take_groups, lambda method, module, groups: f'{method.__module__}.{method.__qualname__}')
    note(layers._convolve, lambda layer, x, chunks: f'{chunks} convolutions')
    note(layers._fuse, lambda layer, x, chunks, act: f'{chunks} {act}')
    note(layers.gated_readout, lambda *args: 'readout')
    return names


# ---- changes of one module -------------------------------------------------------------------------------------------


def mix(y, log):
    """Something else than y, to which every image contributes; the log sees what came."""
    log.append(tuple(y.shape))
    return y + y.sin() / 2 + y.mean(0, keepdim=True) / 4


def mix_all(ys, log):
    return tuple(y if y is None else mix(y, log) for y in ys)


def mixing(forward, log):
    return functools.wraps(forward)(lambda *args, **kwargs: mix(forward(*args, **kwargs), log))


class Mixed(nn.Module):
    def __init__(self, inner, log):
        super().__init__()
        self.inner, self.log = inner, log

    def forward(self, *args):
        return mix(self.inner(*args), self.log)


def swapped(parent, name, module, log):
    setattr(parent, name, Mixed(module, log))


def of_a_subclass(parent, name, module, log):
    kind = type(module)
    members = dict(forward=mixing(kind.forward, log), __module__=kind.__module__)
    module.__class__ = type(kind.__name__, (kind,), members)


def with_a_forward_of_its_own(parent, name, module, log):
    module.forward = mixing(module.forward, log)


def hooked(parent, name, module, log):
    module.register_forward_pre_hook(lambda module, args: (mix(args[0], log), *args[1:]))
    module.register_forward_hook(lambda module, args, y: mix(y, log))


def hooked_backward(parent, name, module, log):
    module.register_full_backward_hook(lambda module, dx, dy: mix_all(dx, log))
    module.register_full_backward_pre_hook(lambda module, dy: mix_all(dy, log))


def own_parameters(module):
    return {key: p for key, p in module._parameters.items() if p is not None}


class Scaled(nn.Module):
    def __init__(self, log):
        super().__init__()
        self.log = log

    def forward(self, x):
        self.log.append(tuple(x.shape))
        return 1.2 * x + 0.1


def parametrised(parent, name, module, log):
    for key in own_parameters(module):
        parametrize.register_parametrization(module, key, Scaled(log))


def weight_normed(parent, name, module, log):
    parametrizations.weight_norm(module)


def spectral_normed(parent, name, module, log):
    parametrizations.spectral_norm(module)


def pruned(parent, name, module, log):
    prune.random_unstructured(module, 'weight', amount=0.5)


class Watched(torch.Tensor):
    """A tensor with which functions compute something else, as those of quantisation are."""

    log: list = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            y = function(*args, **(kwargs or {}))
        name = getattr(function, '__name__', '')
        return mix(y, cls.log) if name in ('batch_norm', 'conv2d', 'layer_norm', 'linear') else y


def of_other_tensors(parent, name, module, log):
    Watched.log = log
    for key, p in own_parameters(module).items():
        module._parameters[key] = p.detach().as_subclass(Watched).requires_grad_()


def offloaded(parent, name, module, log):
    """As accelerate does it: the parameters of the module are nowhere but while it is called."""
    forward, parameters = module.forward, own_parameters(module)
    nowhere = {key: nn.Parameter(p.detach().to('meta')) for key, p in parameters.items()}

    @functools.wraps(forward)
    def fetch(*args):
        log.append(tuple(args[0].shape))
        module._parameters.update(parameters)
        y = forward(*args)
        module._parameters.update(nowhere)
        return y

    module._parameters.update(nowhere)
    module.forward = fetch


def frozen(parent, name, module, log):
    module.requires_grad_(False)


class LoRA(nn.Module):
    def __init__(self, base, log):
        super().__init__()
        self.base, self.log = base, log
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        self.log.append(tuple(x.shape))
        return self.base(x) + self.up(self.down(x))


def wrapped_in_lora(parent, name, module, log):
    setattr(parent, name, LoRA(module, log))


def in_the_other_mode(parent, name, module, log):
    """It learns, or draws random numbers, while the whole does not; or the other way round."""
    module.train(not module.training)


def without_running_statistics(parent, name, module, log):
    module.running_mean = module.running_var = module.num_batches_tracked = None
    module.track_running_stats = False


def anything(module):
    return True


def has_parameters(module):
    return bool(own_parameters(module))


def has_a_matrix(module):
    return isinstance(module, (nn.Conv2d, nn.Linear))


def is_linear(module):
    return isinstance(module, nn.Linear)


def is_batch_norm(module):
    return isinstance(module, nn.BatchNorm2d)


def tells_modes_apart(module):
    return any(isinstance(m, (nn.BatchNorm2d, nn.Dropout, DropPath)) for m in module.modules())


CHANGES = {  # each with what it is for, and whether the log must see it in every mode
    swapped: (anything, True),
    of_a_subclass: (anything, True),
    with_a_forward_of_its_own: (anything, True),
    hooked: (anything, True),
    hooked_backward: (anything, False),
    parametrised: (has_parameters, True),
    weight_normed: (has_a_matrix, False),
    spectral_normed: (has_a_matrix, False),
    pruned: (has_a_matrix, False),
    of_other_tensors: (has_parameters, False),
    offloaded: (has_parameters, True),
    frozen: (has_parameters, False),
    wrapped_in_lora: (is_linear, True),
    in_the_other_mode: (tells_modes_apart, False),
    without_running_statistics: (is_batch_norm, False),
}


@contextlib.contextmanager
def restored(model):
    """Give back to each module, in the end, what it is and has now."""
    before = [
        (module, type(module), {k: v.copy() if isinstance(v, dict) else v for k, v in vars(module).items()})
        for module in model.modules()
    ]
    try:
        yield
    finally:
        for module, kind, members in before:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(members)


class Page:
    """What one writes into the log, under a name."""

    def __init__(self, log, name):
        self.log, self.name = log, name

    def append(self, entry):
        self.log.append((self.name, entry))


def regions(model, names):
    """The inner modules by name, in lists of which no shortcut takes in two: each stage, and what is around them. Of
    those that stand in one place of one kind of module, as in parallel mixers, a list has one."""
    by_region = {}
    for name in [name for name, _ in model.named_modules() if name and name in names]:
        parent, _, last = name.rpartition('.')
        region = by_region.setdefault(name.split('.')[1] if name.startswith('stages.') else '', {})
        region.setdefault((type(model.get_submodule(parent)), last), name)
    return [list(region.values()) for region in by_region.values()]


@pytest.mark.parametrize('change', CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize('name', FIRST_AND_SLOW)
def test_every_change_of_every_module_is_honoured(name, change):
    """One of each region at a time. The runs take turns: of layers of a kind there are many, which see them all."""
    model = make_model(name)
    concerns, is_seen = CHANGES[change]
    concerned = (
        [name for name in names if concerns(model.get_submodule(name))] for names in regions(model, called(name))
    )
    runs = itertools.cycle(RUNS)
    for row in itertools.zip_longest(*concerned):
        modules = {name: model.get_submodule(name) for name in row if name}
        parents = {name: model.get_submodule(name.rpartition('.')[0]) for name in modules}
        batch, mode = next(runs)
        with restored(model):
            model.train(mode == 'training').requires_grad_()
            log = []
            for name, module in modules.items():
                change(parents[name], name.rpartition('.')[2], module, Page(log, name))
            seen = compare(f'{change.__name__} {list(modules)}', model, batch, mode, log)
        assert not is_seen or {name for name, _ in seen} == modules.keys()


# ---- parts that are none of ours -------------------------------------------------------------------------------------


class BatchNormOfTokens(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


def batch_norm_of_rows(*shape):
    return nn.BatchNorm2d(shape[1]) if len(shape) == 4 else nn.BatchNorm1d(shape[1])


def batch_norm_of_tokens(*shape):
    return BatchNormOfTokens(shape[-1])


def response_norm(*shape):
    kind = functools.partial(GlobalResponseNorm, channels_last=True) if len(shape) == 4 else BatchNormOfTokens
    return kind(shape[-1])


PARTS = {  # by the end of their names; each is made for the shape of what it takes
    'mlp.norm': (
        response_norm,
        batch_norm_of_rows,
        lambda *shape: nn.LayerNorm(shape[-2:]),
        batch_norm_of_tokens,
    ),
    'mlp.fc1': (lambda *shape: nn.Sequential(layers.Linear(shape[-1], 4 * shape[-1]), nn.Softmax(1)),),
    'mlp.act': (lambda *shape: nn.Softmax(0), batch_norm_of_rows),
    'mlp.drop1': (lambda *shape: nn.Dropout(0.5), lambda *shape: DropPath(0.5)),
    'mixer.norm': (
        lambda *shape: nn.LayerNorm(shape[-2:]),
        lambda *shape: nn.LayerNorm(shape[-1], bias=False),
        lambda *shape: nn.LayerNorm(shape[-1], elementwise_affine=False),
        batch_norm_of_tokens,
    ),
    'mixer.act': (lambda *shape: nn.Softmax(1), lambda *shape: nn.Sequential(nn.SiLU(), nn.Dropout(0.5))),
    'norm1': (batch_norm_of_rows, batch_norm_of_tokens),
}


@pytest.mark.parametrize('name', SMALL)
def test_another_part_is_honoured(name):
    """The first one of the network, in a block."""
    model = make_model(name)
    shapes = {}
    with restored(model):
        for n, module in model.named_modules():
            if 'blocks.' in n:
                module.register_forward_pre_hook(lambda module, args, n=n: shapes.update({n: args[0].shape}))
        run(model.eval(), 1, 'evaluation', [], contextlib.nullcontext)
    for part, makes in PARTS.items():
        full_name = next((n for n in shapes if n.endswith(f'.{part}')), None)
        for make, (batch, mode) in itertools.product(makes, ((5, 'evaluation'), (2, 'training'))) if full_name else ():
            with restored(model):
                model.set_submodule(full_name, make(*shapes[full_name]))
                compare(full_name, model.train(mode == 'training'), batch, mode, [])


# ---- changes of everything -------------------------------------------------------------------------------------------

FUNCTIONS = {  # by which layers compute
    'batch_norm': nn.BatchNorm2d,
    'conv2d': nn.Conv2d,
    'dropout': nn.Dropout,
    'gelu': nn.GELU,
    'layer_norm': nn.LayerNorm,
    'linear': nn.Linear,
    'relu': nn.ReLU,
    'rms_norm': nn.RMSNorm,
    'scaled_dot_product_attention': Attention,
    'silu': nn.SiLU,
}


@pytest.mark.parametrize('name', SMALL)
def test_a_patched_function_is_honoured(name, monkeypatch):
    model = make_model(name)
    for function, (batch, mode) in itertools.product(FUNCTIONS, RUNS[:3]):
        with monkeypatch.context() as patch:
            patch.setattr(F, function, mixing(getattr(F, function), log := []))
            seen = compare(function, model.train(mode == 'training'), batch, mode, log)
        assert bool(seen) == any(isinstance(module, FUNCTIONS[function]) for module in model.modules()), function


def reaches(kind, base):
    """Whether a call of a module comes to the `forward` of a base of its class: those before it pass it on."""
    before = itertools.takewhile(lambda c: c is not base, kind.__mro__)
    forwards = [inspect.unwrap(vars(c)['forward']) for c in before if 'forward' in vars(c)]
    return issubclass(kind, base) and all('super' in forward.__code__.co_names for forward in forwards)


@pytest.mark.parametrize('name', SMALL)
def test_a_patched_class_is_honoured(name, monkeypatch):
    """Bases too: our linear layers and MLPs are PyTorch's and timm's."""
    model = make_model(name)
    modules = [model.get_submodule(n) for n in called(name)]
    kinds = {c for m in model.modules() for c in type(m).__mro__ if 'forward' in vars(c) and c is not nn.Module}
    for kind in sorted(kinds, key=str):
        with monkeypatch.context() as patch:
            patch.setattr(kind, 'forward', mixing(kind.forward, log := []))
            seen = compare(kind.__name__, model.eval(), 5, 'gradients', log)
        assert len(seen) >= sum(reaches(type(module), kind) for module in modules), kind


@contextlib.contextmanager
def patched_call(log):
    call = nn.Module.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, '__call__', lambda self, x: log.append((type(self), tuple(x.shape))) or call(self, x))
        yield


@contextlib.contextmanager
def hooks_of_all_modules(log):
    def note(module, args, *_):
        log.append((type(module), tuple(args[0].shape)))

    with contextlib.ExitStack() as stack:
        for register in (
            nn_module.register_module_forward_pre_hook,
            nn_module.register_module_forward_hook,
            nn_module.register_module_full_backward_hook,
        ):
            stack.callback(register(note).remove)
        yield


class Functions(TorchFunctionMode):
    def __init__(self, log):
        super().__init__()
        self.log = log

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.log.append(getattr(function, '__name__', str(function)))
        return function(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    def __init__(self, log):
        super().__init__()
        self.log = log

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.log.append((str(operator), [tuple(a.shape) for a in args if isinstance(a, torch.Tensor)]))
        return operator(*args, **(kwargs or {}))


@contextlib.contextmanager
def flop_counter(log):
    with FlopCounterMode(display=False) as counter:
        yield
    log.extend((module, sorted(map(str, counts.items()))) for module, counts in counter.get_flop_counts().items())


def elsewhere(log):
    """What the backward needs is kept elsewhere, and comes as another tensor."""
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().numpy().copy(), torch.from_numpy)


ONLOOKERS = (patched_call, hooks_of_all_modules, Functions, Operators, flop_counter, elsewhere)


@pytest.mark.parametrize('onlooker', ONLOOKERS, ids=lambda onlooker: onlooker.__name__)
@pytest.mark.parametrize('name', SMALL)
def test_onlookers_see_every_layer_and_whole_batches(name, onlooker):
    model = make_model(name)
    for batch, mode in RUNS[::2]:
        seen = compare(onlooker.__name__, model.train(mode == 'training'), batch, mode, [], onlooker)
        if onlooker in (patched_call, hooks_of_all_modules):
            assert {kind for kind, _ in seen} == {type(model.get_submodule(n)) for n in called(name)}
            assert {shape[0] for _, shape in seen} == {batch}


@pytest.mark.parametrize('name', SMALL)
def test_parameters_that_are_given_are_honoured(name):
    model = make_model(name)
    given = {key: 1.1 * p.detach() for key, p in model.named_parameters()}
    for batch, mode in RUNS:
        model.train(mode == 'training')
        with restored(model), torch.nn.utils.stateless._reparametrize_module(model, given):
            compare('given parameters', model, batch, mode, [])


@pytest.mark.parametrize('name', SMALL)
def test_parameters_elsewhere_are_an_error(name):
    """But those of PyTorch's own layers, which mistake a CPU and the meta device for one."""
    model = make_model(name).eval()
    for module in model.modules():
        for key in () if isinstance(module, (nn.Conv2d, nn.Linear)) else own_parameters(module):
            with restored(model), pytest.raises((RuntimeError, ValueError), match=r'device|meta'):
                module._parameters[key] = nn.Parameter(module._parameters[key].detach().to('meta'))
                run(model, 5, 'evaluation', [], contextlib.nullcontext)


# ---- and what nobody changed -----------------------------------------------------------------------------------------


ALWAYS = {  # by file, the shortcuts in any mode
    'vmamba': {'layers.Mlp.forward'},
    'spatial_mamba': {'layers.Mlp.forward', '2 convolutions', 'readout'},
    'vim': {'2 convolutions'},
    'groupmamba': {'2 convolutions'},
    'mambavision': {'layers.Mlp.forward', '2 convolutions'},
}
OF_SEVERAL_IMAGES = {  # those that cut a batch, of images or of one token each
    'spatial_mamba': {'spatial_mamba.Downsample.convolve'},
    'groupmamba': {'layers.Mlp.forward'},
}
WITHOUT_STEM = {'test_vanilla_vmamba', 'test_vim'}  # of one convolution, whose shortcut would be none


@pytest.mark.parametrize('name', (*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in TINY)))
def test_an_untouched_model_takes_every_shortcut(name, taken):
    model = make_model(name)
    file = type(model).__module__.rpartition('.')[2]
    always = {'1 convolutions', *({'2 convolutions'} if name == 'test_vanilla_vmamba' else ALWAYS[file])}
    fused = {name.replace('convolutions', 'none') for name in always}  # without a gradient, where PyTorch has it
    fused |= {'1 gelu'} if any(type(module) is layers.Mlp for module in model.modules()) else set()
    several = OF_SEVERAL_IMAGES.get(file, set())
    evaluation = several | {'layers.Blocks.forward', *(() if name in WITHOUT_STEM else [f'{file}.Stem.forward'])}
    training = several | ({'groupmamba.ConvMlp.forward'} if file == 'groupmamba' else set())  # else blocks are cut
    for batch, mode in RUNS:
        taken.clear()
        compare('untouched', model.train(mode == 'training'), batch, mode, [])
        cut = set() if batch == 1 else training if mode == 'training' else evaluation
        expected = cut | (fused if mode == 'evaluation' and layers._HAS_FUSED else always)
        assert {shortcut.removeprefix('vssm.models.') for shortcut in taken} == expected, (batch, mode)
