# SPDX-License-Identifier: Apache-2.0
"""The stand-in for mmcv's operators: each against a formula of its own, and who calls it."""

import ast
import dataclasses
import functools
import importlib
import importlib.util
import itertools
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mmengine.registry import MODELS
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vssm.models.mm import mmcv_ext

mmcv = pytest.importorskip('mmcv', reason="mmcv is not installed: pip install '.[mmlab]'")
importlib.import_module('mmcv.ops')  # these need operators: the stand-in's, thanks to vssm.models.mm
PACKAGES = ('mmdet', 'mmseg')

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture
def stand_in():
    """The stand-in as a module of its own, whatever mmcv is installed."""
    module = importlib.util.module_from_spec(mmcv_ext._Finder.find_spec('mmcv._ext'))
    module.__spec__.loader.exec_module(module)
    return module


@pytest.fixture
def called(stand_in, monkeypatch):
    """Let mmcv use the stand-in, whatever is installed; the names of the operators that it has called."""
    names = set()

    def noting(name, operator):
        def call(*args, **kwargs):
            names.add(name)
            return operator(*args, **kwargs)

        return call

    for name, operator in mmcv_ext.OPERATORS.items():
        setattr(stand_in, name, noting(name, operator))
    for name, module in list(sys.modules.items()):
        if name.startswith('mmcv.ops.') and hasattr(module, 'ext_module'):
            monkeypatch.setattr(module, 'ext_module', stand_in)
    return names


@pytest.fixture
def on_gpu(monkeypatch):
    """Let mmcv, mmdet and mmseg take tensors for those of a GPU, where alone they call some operators."""

    def pretend():
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
        monkeypatch.setattr(Tensor, 'is_cuda', True, raising=False)
        monkeypatch.setattr(sys.modules['mmcv.ops.multi_scale_deform_attn'], 'IS_CUDA_AVAILABLE', True)

    return pretend


# ---- the module ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['nms_rotated', 'tin_shift_forward', 'top_pool_forward'])
def test_other_operators_say_what_to_install(stand_in, name):
    with pytest.raises(NotImplementedError, match=rf'mmcv\._ext\.{name} needs the compiled mmcv.*pip install') as error:
        getattr(stand_in, name)(1, im2col_step=2)
    assert '\n' not in str(error.value)
    with pytest.raises(AttributeError):
        stand_in.__wrapped__  # noqa: B018  # what Python itself looks for is not an operator


def test_the_stand_in_is_asked_last_and_says_so_once(tmp_path, monkeypatch):
    finders = [finder for finder in sys.meta_path if finder is mmcv_ext._Finder]
    mmcv_ext.install()
    assert finders == [finder for finder in sys.meta_path if finder is mmcv_ext._Finder] == [mmcv_ext._Finder]

    said = []
    monkeypatch.setattr('mmengine.logging.print_log', lambda *args, **kwargs: said.append((args, kwargs)))
    monkeypatch.setattr(mmcv, '__path__', [])
    monkeypatch.setitem(sys.modules, 'mmcv._ext', None)
    for _ in range(2):
        if not said:
            del sys.modules['mmcv._ext']
        assert importlib.import_module('mmcv._ext').nms is mmcv_ext.OPERATORS['nms']
    assert len(said) == 1 and said[0][1] == {} and 'stand in' in said[0][0][0]  # at print_log's own level, info

    (tmp_path / '_ext.py').write_text('nms = "compiled"\n')
    monkeypatch.setattr(mmcv, '__path__', [str(tmp_path)])
    del sys.modules['mmcv._ext']
    assert importlib.import_module('mmcv._ext').nms == 'compiled'


def test_the_environment_is_told(stand_in, monkeypatch):
    """As the first lines of every run of the packages' own scripts."""
    monkeypatch.setattr(sys.modules['mmcv.ops.info'], 'ext_module', stand_in)
    monkeypatch.setattr('mmcv.utils.env.mmengine_collect_env', dict)  # which runs compilers
    assert mmcv.utils.collect_env() == {'MMCV': mmcv.__version__, 'MMCV Compiler': 'n/a', 'MMCV CUDA Compiler': 'n/a'}


# ---- the formulas ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Case:
    """An operator as mmcv calls it, and the same by a formula, both of tensors some of which get gradients.

    Args:
        call: Function of mmcv's.
        formula: The same, differentiable.
        inputs: Function that makes the tensors, in float64, for a number of rows, regions, queries or images.
        counts: Numbers to try; 0 is left out where mmcv itself refuses it.
    """

    call: Callable[..., Tensor]
    formula: Callable[..., Tensor]
    inputs: Callable[[int], list[Tensor]]
    counts: tuple[int, ...] = (0, 4)


normal = functools.partial(torch.randn, dtype=torch.float64)
uniform = functools.partial(torch.rand, dtype=torch.float64)


def tent(places, size):
    """Bilinear weights of all positions along an axis, zero beyond it, (...) -> (..., size)."""
    return (1 - (places[..., None] - torch.arange(size)).abs()).clamp(min=0)


def sigmoid_focal(weighted):
    target = torch.tensor([0, 2, 1, 2 if weighted else 3])  # 3 is the background
    weight = torch.tensor([0.5, 2.0, 3.0]).double() if weighted else torch.ones(4).double()

    def call(x):
        return mmcv.ops.sigmoid_focal_loss(x, target[: len(x)], 1.5, 0.3, weight.to(x) if weighted else None, 'none')

    def formula(x):
        own = functional.one_hot(target[: len(x)], 4)[:, :3].double()
        p = 1 / (1 + (-x).exp())
        loss = -(0.3 * own * (1 - p) ** 1.5 * p.log() + 0.7 * (1 - own) * p**1.5 * (1 - p).log())
        return loss * weight[target[: len(x)], None]

    return Case(call, formula, lambda count: [3 * normal(count, 3)])


def softmax_focal(gamma):
    target, weight = torch.tensor([0, 1, -1, 2]), torch.tensor([0.5, 2.0, 3.0]).double()

    def call(x):
        return mmcv.ops.softmax_focal_loss(x, target, gamma, 0.3, weight.to(x), 'sum')

    def formula(x):
        loss = 0.0
        for row, label in zip(x, target.tolist(), strict=True):
            if label >= 0:
                p = row.exp()[label] / row.exp().sum()
                loss = loss - 0.3 * weight[label] * (1 - p) ** gamma * p.log()
        return loss

    return Case(call, formula, lambda count: [3 * normal(count, 3)], counts=(4,))


def attention():
    shapes, starts = torch.tensor([[4, 5], [2, 3]]), torch.tensor([0, 20])

    def call(value, *rest):
        function = mmcv.ops.multi_scale_deform_attn.MultiScaleDeformableAttnFunction
        return function.apply(value, shapes, starts, *rest, 64)

    def formula(value, places, weights):
        total = 0.0
        for level, ((height, width), start) in enumerate(zip(shapes.tolist(), starts.tolist(), strict=True)):
            maps = value[:, start : start + height * width].unflatten(1, (height, width))
            rows = tent(places[:, :, :, level, :, 1] * height - 0.5, height)
            columns = tent(places[:, :, :, level, :, 0] * width - 0.5, width)
            factors = rows, columns, weights[:, :, :, level], maps
            total = total + torch.einsum('bqnph,bqnpw,bqnp,bhwnc->bqnc', *factors)
        return total.flatten(2)

    def inputs(count):
        places = 1.4 * uniform(2, count, 2, 2, 3, 2) - 0.2  # some lie beyond the map
        return [normal(2, 26, 2, 3), places, uniform(2, count, 2, 2, 3)]

    return Case(call, formula, inputs)


GEOMETRY = ((2, 1), (1, 2), (1, 2), 2, 2)  # stride, padding, dilation, groups, groups of offsets


def deformed(x, offset, weight, mask=None, bias=None):
    """A deformable convolution by weights over the whole map."""
    stride, padding, dilation, groups, parts = GEOMETRY
    (batch, _, height, width), (_, _, kh, kw), (*_, oh, ow) = x.shape, weight.shape, offset.shape
    moves = offset.view(batch, parts, kh, kw, 2, oh, ow)
    i, j = torch.arange(kh).view(-1, 1, 1, 1), torch.arange(kw).view(-1, 1, 1)
    rows = torch.arange(oh)[:, None] * stride[0] - padding[0] + i * dilation[0] + moves[:, :, :, :, 0]
    columns = torch.arange(ow) * stride[1] - padding[1] + j * dilation[1] + moves[:, :, :, :, 1]
    maps = x.unflatten(1, (parts, -1))
    taps = torch.einsum('bgijpqh,bgijpqw,bgchw->bgcijpq', tent(rows, height), tent(columns, width), maps)
    if mask is not None:
        taps = taps * mask.view(batch, parts, 1, kh, kw, oh, ow)
    taps = taps.flatten(1, 2).unflatten(1, (groups, -1))
    y = torch.einsum('bgcijpq,gocij->bgopq', taps, weight.unflatten(0, (groups, -1))).flatten(1, 2)
    return y if bias is None else y + bias[:, None, None]


def deform_conv():
    def inputs(count):
        return [normal(count, 4, 6, 5), 2 * normal(count, 2 * 3 * 2 * 2, 3, 7), normal(6, 2, 3, 2)]

    return Case(lambda *tensors: mmcv.ops.deform_conv2d(*tensors, *GEOMETRY), deformed, inputs, counts=(2,))


def modulated_deform_conv(bias):
    def inputs(count):
        maps = [normal(count, 4, 6, 5), 2 * normal(count, 24, 3, 7), uniform(count, 12, 3, 7), normal(6, 2, 3, 2)]
        return [*maps, normal(6)] if bias else maps

    def call(x, offset, mask, weight, bias=None):
        return mmcv.ops.modulated_deform_conv2d(x, offset, mask, weight, bias, *GEOMETRY)

    def formula(x, offset, mask, weight, bias=None):
        return deformed(x, offset, weight, mask, bias)

    return Case(call, formula, inputs, counts=(2,))


def regions(count):
    """Maps, and regions some of which reach beyond them: (2, 3, 9, 13), (count, 5)."""
    corners = uniform(count, 2) * 30 - 6
    return [
        normal(2, 3, 9, 13),
        torch.cat([torch.randint(2, (count, 1)), corners, corners + uniform(count, 2) * 24], 1),
    ]


def samples(image, ys, xs):
    """Values between the positions, (C, H, W), (rows,), (columns,) -> (rows * columns, C)."""
    weights = []
    for places, size in zip((ys, xs), image.shape[1:], strict=True):
        inside = (places >= -1) & (places <= size)
        weights.append(tent(places.clamp(0, size - 1), size) * inside[:, None])
    return torch.einsum('yh,xw,chw->yxc', *weights, image).flatten(0, 1)


def sampled_cells(image, rois, ratio, aligned, reduce, offset=None):
    """Pooling by loops, at half the resolution of the regions, into three by three cells."""
    out = []
    for region, (b, *box) in enumerate(rois.detach()):
        x1, y1, x2, y2 = (0.5 * v - (0.5 if aligned else 0.0) for v in box)
        width, height = x2 - x1, y2 - y1
        if not aligned:
            width, height = width.clamp(min=1), height.clamp(min=1)
        rows, columns = (ratio or math.ceil(side / 3) for side in (height, width))
        for i, j in itertools.product(range(3), repeat=2):
            dx, dy = (0.0, 0.0) if offset is None else 0.1 * offset[region, :, i, j] * torch.stack([width, height])
            ys = y1 + dy + (i + (torch.arange(rows).double() + 0.5) / rows) * height / 3
            xs = x1 + dx + (j + (torch.arange(columns).double() + 0.5) / columns) * width / 3
            out.append(reduce(samples(image[int(b)], ys, xs)))
    return torch.stack(out).view(-1, 3, 3, 3).permute(0, 3, 1, 2) if out else image.new_zeros(0, 3, 3, 3)


def roi_align(mode, ratio, aligned):
    layer = mmcv.ops.RoIAlign(3, spatial_scale=0.5, sampling_ratio=ratio, pool_mode=mode, aligned=aligned)
    reduce = dict(avg=lambda values: values.mean(0), max=lambda values: values.amax(0))[mode]
    return Case(layer, lambda x, rois: sampled_cells(x, rois, ratio, aligned, reduce), regions)


def deform_roi_pool(ratio, moved):
    def call(x, rois, offset=None):
        return mmcv.ops.deform_roi_pool(x, rois, offset, 3, 0.5, ratio, 0.1)

    def formula(x, rois, offset=None):
        return sampled_cells(x, rois, ratio, True, lambda values: values.mean(0), offset)

    return Case(call, formula, lambda count: [*regions(count), *([normal(count, 2, 3, 3)] if moved else [])])


def roi_pool():
    def formula(x, rois):
        out = []
        for b, x1, y1, x2, y2 in rois.tolist():
            left, top, width, height = 0.5 * x1, 0.5 * y1, 0.5 * (x2 + 1 - x1), 0.5 * (y2 + 1 - y1)
            for i, j in itertools.product(range(3), repeat=2):
                rows, columns = (
                    slice(max(math.floor(start + k * side / 3), 0), max(math.ceil(start + (k + 1) * side / 3), 0))
                    for start, side, k in ((top, height, i), (left, width, j))
                )
                cell = x[int(b), :, rows, columns].flatten(1)
                out.append(cell.amax(1) if cell.numel() else x.new_zeros(3))
        return torch.stack(out).view(-1, 3, 3, 3).permute(0, 3, 1, 2) if out else x.new_zeros(0, 3, 3, 3)

    return Case(mmcv.ops.RoIPool(3, 0.5), formula, regions)


def carafe(function):
    def formula(features, masks):
        (batch, channels, height, width), windows = features.shape, functional.unfold(features, 3, padding=1)
        windows = windows.view(batch, 2, channels // 2, 9, height, width)
        windows = windows.repeat_interleave(2, -1).repeat_interleave(2, -2)
        return (windows * masks.unflatten(1, (2, 1, 9))).sum(3).flatten(1, 2)

    def inputs(count):
        return [normal(count, 4, 3, 5), normal(count, 18, 6, 10)]

    return Case(lambda *maps: getattr(mmcv.ops, function)(*maps, 3, 2, 2), formula, inputs, counts=(2,))


def psa_mask(kind):
    def formula(x):
        (batch, _, height, width), out = x.shape, []
        for n, seen, at in itertools.product(range(batch), range(height * width), range(height * width)):
            seen, at = (at, seen) if kind == 'distribute' else (seen, at)
            (y, column), (h, w) = divmod(seen, width), divmod(at, width)
            row, column = y - h + 2, column - w + 1  # in a window of five rows and three columns
            inside = 0 <= row < 5 and 0 <= column < 3
            out.append(x[n, row * 3 + column, h, w] if inside else x.new_zeros(()))
        return torch.stack(out).view(batch, -1, height, width)

    return Case(mmcv.ops.PSAMask(kind, (5, 3)), formula, lambda count: [normal(count, 15, 3, 2)], counts=(2,))


CASES = {
    'sigmoid_focal_loss': functools.partial(sigmoid_focal, weighted=False),
    'sigmoid_focal_loss of weighted classes': functools.partial(sigmoid_focal, weighted=True),
    'softmax_focal_loss': functools.partial(softmax_focal, gamma=2.0),
    'softmax_focal_loss, a cross entropy': functools.partial(softmax_focal, gamma=0.0),
    'ms_deform_attn': attention,
    'deform_conv': deform_conv,
    'modulated_deform_conv': functools.partial(modulated_deform_conv, bias=True),
    'modulated_deform_conv without bias': functools.partial(modulated_deform_conv, bias=False),
    **{
        f'roi_align, {mode}, {ratio} samples, {"aligned" if aligned else "corner"}': functools.partial(
            roi_align, mode, ratio, aligned
        )
        for mode, ratio, aligned in itertools.product(('avg', 'max'), (0, 2), (False, True))
    },
    'deform_roi_pool': functools.partial(deform_roi_pool, ratio=0, moved=True),
    'deform_roi_pool of two samples': functools.partial(deform_roi_pool, ratio=2, moved=True),
    'deform_roi_pool without moves': functools.partial(deform_roi_pool, ratio=0, moved=False),
    'roi_pool': roi_pool,
    'carafe': functools.partial(carafe, 'carafe'),
    'carafe_naive': functools.partial(carafe, 'carafe_naive'),
    'psamask, collect': functools.partial(psa_mask, 'collect'),
    'psamask, distribute': functools.partial(psa_mask, 'distribute'),
}
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2}


@pytest.mark.parametrize('dtype', TOLERANCES, ids=str)
@pytest.mark.parametrize('name', CASES)
def test_an_operator_and_its_gradients(name, dtype, called, monkeypatch, assert_close):
    case, tolerance = CASES[name](), TOLERANCES[dtype]
    if name == 'carafe_naive':
        monkeypatch.setattr(Tensor, 'is_cuda', True, raising=False)  # which its backward pass asks for
    for count in case.counts:
        inputs = [tensor.to(dtype).requires_grad_() for tensor in case.inputs(count)]
        exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
        output, expected = case.call(*inputs), case.formula(*exact)
        assert output.dtype == dtype
        assert count == 0 or expected.abs().max() > 0.1
        assert_close(output, expected, tolerance, f'output for {count}')
        weight = normal(expected.shape).to(dtype)
        output.backward(weight)
        expected.backward(weight.double()) if expected.requires_grad else None
        for i, (tensor, truth) in enumerate(zip(inputs, exact, strict=True)):
            if truth.grad is not None:
                assert tensor.grad.dtype == dtype
                assert_close(tensor.grad, truth.grad, tolerance, f'gradient {i} for {count}')
            else:
                assert tensor.grad is None or not tensor.grad.any()
    operator = name.partition(',')[0].partition(' ')[0]
    assert {other for other in called if not other.startswith(operator)} == set()
    assert any(other.endswith('forward') for other in called) and any('backward' in other for other in called)


@pytest.mark.parametrize('wanted', list(itertools.product((False, True), repeat=3)), ids=str)
def test_each_gradient_of_a_deformable_convolution_alone(wanted, called, assert_close):
    """mmcv asks for that of the weights by a call of its own, here twice over one graph with other gradients."""
    case = deform_conv()
    inputs = [tensor.requires_grad_(want) for tensor, want in zip(case.inputs(2), wanted, strict=True)]
    if not any(wanted):
        return
    output, expected = case.call(*inputs), case.formula(*inputs)
    for _ in range(2):
        weight = normal(output.shape)
        leaves = [tensor for tensor in inputs if tensor.requires_grad]
        found, truth = (torch.autograd.grad(y, leaves, weight, retain_graph=True) for y in (output, expected))
        for gradient, true in zip(found, truth, strict=True):
            assert_close(gradient, true, 1e-10)


def test_maxima_of_nothing_and_of_what_is_no_number(called):
    """A cell without a position is zero, without a gradient; NaN in a map is seen."""
    beyond, within = torch.tensor([[0.0, 90, 90, 99, 99]]), torch.tensor([[0.0, 0, 0, 7, 7]])
    for layer in (mmcv.ops.RoIPool(2), mmcv.ops.RoIAlign(2, pool_mode='max')):
        x = torch.randn(1, 2, 8, 8, requires_grad=True)
        y = layer(x, beyond)
        y.sum().backward()
        assert not y.any() and not x.grad.any()
        x.data[0, 0, 1, 1] = torch.nan
        assert layer(x, within)[0].isnan().any(2).any(1).tolist() == [True, False]
    turned = torch.tensor([[0.0, 5, 5, 2, 2]])  # x2 < x1
    assert not mmcv.ops.RoIPool(2)(x, turned).any() and not mmcv.ops.RoIAlign(2, pool_mode='max')(x, turned).any()


def test_focal_losses_refuse_targets_that_are_no_classes(called):
    x = torch.randn(2, 3)
    for target, weight in (([0, 4], None), ([0, 3], torch.ones(3)), ([-1, 0], torch.ones(3))):
        with pytest.raises(ValueError, match='sigmoid_focal_loss: target must be'):
            mmcv.ops.sigmoid_focal_loss(x, torch.tensor(target), 2.0, 0.25, weight)
    with pytest.raises(ValueError, match='softmax_focal_loss: target must be at most 2, got 0 to 3'):
        mmcv.ops.softmax_focal_loss(x, torch.tensor([0, 3]), 2.0, 0.25)


def test_focal_losses_of_the_very_sure_are_finite(called):
    x = torch.tensor([[200.0, -200.0], [-200.0, 200.0]], requires_grad=True)
    for loss in (mmcv.ops.sigmoid_focal_loss, mmcv.ops.softmax_focal_loss):
        for gamma in (0.0, 0.5, 2.0):
            value = loss(x, torch.tensor([0, 0]), gamma, 0.25, None, 'sum')
            (gradient,) = torch.autograd.grad(value, x)
            assert value.isfinite() and gradient.isfinite().all() and gradient[1].any()


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


@pytest.mark.parametrize('name', ['ms_deform_attn', 'roi_pool', 'roi_align, max, 2 samples, aligned', 'carafe'])
def test_nothing_is_held_for_all_samples_at_once(name, called):
    """No tensor is larger than arguments and result; all samples together have several times as many elements."""
    count = 40
    inputs = [tensor.requires_grad_() for tensor in CASES[name]().inputs(count)]
    with Largest() as mode:
        output = CASES[name]().call(*inputs)
        output.sum().backward()
    padded = 2 if name == 'carafe' else 1  # the map with zeros around it
    assert mode.elements <= padded * max(tensor.numel() for tensor in (output, *inputs))


# ---- boxes -----------------------------------------------------------------------------------------------------------


def make_boxes(count, dtype=torch.float64):
    corners = uniform(count, 2) * 40
    return torch.cat([corners, corners + 1 + uniform(count, 2) * 20], 1).to(dtype), uniform(count).to(dtype)


def overlap(a, b, offset=0, over='union'):
    (x1, y1, x2, y2), (u1, v1, u2, v2) = a, b
    common = max(0.0, min(x2, u2) - max(x1, u1) + offset) * max(0.0, min(y2, v2) - max(y1, v1) + offset)
    first, second = (x2 - x1 + offset) * (y2 - y1 + offset), (u2 - u1 + offset) * (v2 - v1 + offset)
    return common / (first + second - common if over == 'union' else first)


@pytest.mark.parametrize('dtype', [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('count', [0, 1, 60])
def test_nms(called, count, offset, dtype):
    boxes, scores = make_boxes(count, dtype)
    expected = []
    for i in scores.argsort(descending=True, stable=True).tolist():
        if all(overlap(boxes[i].tolist(), boxes[j].tolist(), offset) <= 0.3 for j in expected):
            expected.append(i)
    _, kept = mmcv.ops.nms(boxes, scores, iou_threshold=0.3, offset=offset)
    assert kept.tolist() == expected
    assert count < 60 or 5 < len(kept) < 55


@pytest.mark.parametrize('offset, kept', [(0, [1, 0, 2]), (1, [1, 2])])
def test_nms_by_hand(called, offset, kept):
    """The first two overlap in 2 x 4 of 4 x 4 + 4 x 4 - 8 = 24, or in 3 x 5 of 25 + 25 - 15 = 35."""
    boxes = torch.tensor([[0.0, 0, 4, 4], [2, 0, 6, 4], [9, 9, 12, 12]])
    dets, indices = mmcv.ops.nms(boxes, torch.tensor([0.8, 0.9, 0.1]), iou_threshold=0.4, offset=offset)
    assert indices.tolist() == kept
    assert torch.equal(dets[:, :4], boxes[kept])


@pytest.mark.parametrize('dtype', [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize('method', ['naive', 'linear', 'gaussian'])
@pytest.mark.parametrize('count', [0, 1, 40])
def test_soft_nms(called, count, method, dtype):
    boxes, scores = make_boxes(count, dtype)
    offset, left, values, expected = count % 3, dict(enumerate(scores.tolist())), boxes.tolist(), []
    while left:
        best = max(left, key=left.get)
        expected.append((best, left.pop(best)))
        for other in list(left):
            shared = overlap(values[best], values[other], offset)
            lowered = dict(naive=0.0, linear=1 - shared).get(method) if shared >= 0.3 else 1.0
            left[other] *= math.exp(-(shared**2) / 0.5) if method == 'gaussian' else lowered
            if left[other] < 0.05:
                del left[other]
    dets, kept = mmcv.ops.soft_nms(boxes, scores, 0.3, 0.5, 0.05, method, offset)
    assert kept.tolist() == [i for i, _ in expected] and called == {'softnms'}
    assert torch.equal(dets[:, :4], boxes[kept]) and dets.dtype == dtype
    assert dets[:, 4].tolist() == pytest.approx(
        [score for _, score in expected], rel=1e-2 if dtype.itemsize == 2 else 1e-5
    )
    assert count < 40 or 5 < len(kept) <= 40


def test_soft_nms_of_boxes_without_an_area(called):
    dets, kept = mmcv.ops.soft_nms(torch.ones(2, 4), torch.tensor([0.5, 0.9]), method='gaussian')
    assert kept.tolist() == [1, 0] and dets[:, 4].tolist() == pytest.approx([0.9, 0.5])


@pytest.mark.parametrize('count', [0, 1, 40])
def test_nms_match(called, count):
    boxes, scores = make_boxes(count)
    left, expected = scores.argsort(descending=True).tolist(), []
    while left:
        first, *others = left
        near = [i for i in others if overlap(boxes[first].tolist(), boxes[i].tolist()) >= 0.2]
        expected.append([first, *near])
        left = [i for i in others if i not in near]
    groups = mmcv.ops.nms_match(torch.cat([boxes, scores[:, None]], 1), 0.2)
    assert [group.tolist() for group in groups] == expected
    assert count < 40 or 1 < max(map(len, expected)) < 40


@pytest.mark.parametrize('dtype', [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize('mode, offset', [('iou', 0), ('iou', 1), ('iof', 0)])
def test_overlaps_of_boxes(called, mode, offset, dtype):
    (first, _), (second, _) = make_boxes(6, dtype), make_boxes(4, dtype)
    table = [
        [overlap(a, b, offset, 'union' if mode == 'iou' else 'first') for b in second.tolist()] for a in first.tolist()
    ]
    for aligned in (False, True):
        some = first[:4] if aligned else first
        found = mmcv.ops.bbox_overlaps(some, second, mode, aligned, offset)
        expected = [table[i][i] for i in range(4)] if aligned else sum(table, [])
        assert found.dtype == dtype
        assert found.flatten().tolist() == pytest.approx(expected, abs=2e-3 if dtype.itemsize == 2 else 1e-6)
    assert called == {'bbox_overlaps'} and max(map(max, table)) > 0.1
    assert mmcv.ops.bbox_overlaps(first[:0], second).shape == (0, 4)


@pytest.mark.parametrize('padding', [0, 1, 2])
def test_a_convolution_of_some_positions_alone(called, padding):
    layer = mmcv.ops.MaskedConv2d(2, 3, 3, padding=padding)
    x, mask = torch.randn(1, 2, 6, 5), torch.zeros(1, 6, 5)
    mask[0, 0, 0] = mask[0, 3, 2] = mask[0, 2, 1] = 1
    with torch.no_grad():
        whole, some, none = layer(x), layer(x, mask), layer(x, 0 * mask)
    there = functional.pad(mask, (0, whole.shape[3] - 5, 0, whole.shape[2] - 6)) > 0
    torch.testing.assert_close(some, torch.where(there, whole, 0), rtol=1e-5, atol=1e-6)
    assert not none.any() and called == {'masked_im2col_forward', 'masked_col2im_forward'}


# ---- who calls them --------------------------------------------------------------------------------------------------


def both_ways(build, inputs, on_gpu):
    """Outputs and gradients of a module as on a CPU, and as on a GPU."""
    module = build()
    for _ in range(2):
        module.zero_grad()
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        output = module(*leaves)
        output.sum().backward()
        yield [output, *(leaf.grad for leaf in leaves), *(p.grad.clone() for p in module.parameters())]
        on_gpu()


def test_focal_loss_of_mmdet_on_a_gpu(called, on_gpu):
    registry = pytest.importorskip('mmdet.registry', reason="mmdet is not installed: pip install '.[mmlab]'")
    importlib.import_module('mmdet.models')
    target, weight = torch.tensor([0, 3, 2, 1, 3]), torch.rand(5)
    loss = registry.MODELS.build(dict(type='mmdet.FocalLoss'))
    loss_of = functools.partial(loss.forward, target=target, weight=weight, avg_factor=3)
    loss.forward = loss_of
    cpu, gpu = both_ways(lambda: loss, [3 * torch.randn(5, 3)], on_gpu)
    torch.testing.assert_close(gpu, cpu)
    assert called == {'sigmoid_focal_loss_forward', 'sigmoid_focal_loss_backward'}


def test_focal_loss_of_mmseg_on_a_gpu(called, on_gpu):
    registry = pytest.importorskip('mmseg.registry', reason="mmseg is not installed: pip install '.[mmlab]'")
    importlib.import_module('mmseg.models')
    x, target = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randint(3, (2, 4, 4))
    target[0, 0] = 255  # which is ignored
    own = functional.one_hot(target.where(target < 3, 0), 3).movedim(3, 1)
    p = torch.where(own == 1, x, -x).sigmoid()
    expected = (torch.where(own == 1, 0.5, 0.5) * (1 - p) ** 2 * -p.log() * (target < 3)[:, None]).mean()
    on_gpu()
    loss = registry.MODELS.build(dict(type='mmseg.FocalLoss'))(x, target)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, x)[0] for value in (loss, expected)))
    assert called == {'sigmoid_focal_loss_forward', 'sigmoid_focal_loss_backward'}


def test_deformable_detr_on_a_gpu(called, on_gpu):
    layers = pytest.importorskip('mmdet.models.layers', reason="mmdet is not installed: pip install '.[mmlab]'")
    attention = dict(embed_dims=32, num_heads=4, num_levels=2, num_points=3, batch_first=True)
    config = dict(self_attn_cfg=attention, ffn_cfg=dict(embed_dims=32, feedforward_channels=8))
    shapes = torch.tensor([[4, 5], [2, 3]])
    encoder = layers.DeformableDetrTransformerEncoder(num_layers=2, layer_cfg=config).eval()
    encoder.forward = functools.partial(
        encoder.forward,
        key_padding_mask=torch.arange(26).expand(2, -1) > 24,
        spatial_shapes=shapes,
        level_start_index=torch.tensor([0, 20]),
        valid_ratios=torch.ones(2, 2, 2),
    )
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    cpu, gpu = both_ways(lambda: encoder, [torch.randn(2, 26, 32), torch.randn(2, 26, 32)], on_gpu)
    torch.testing.assert_close(gpu, cpu, rtol=1e-4, atol=1e-4)
    assert called == {'ms_deform_attn_forward', 'ms_deform_attn_backward'}


class RegionLayer(torch.nn.Module):
    """A layer of regions on regions of its own."""

    def __init__(self, name, **options):
        super().__init__()
        self.layer = getattr(mmcv.ops, name)(output_size=3, **options)
        self.rois = torch.tensor([[0.0, 1, 1, 6, 6], [1, 0, 2, 4, 7]])

    def forward(self, x):
        return self.layer(x, self.rois)


LAYERS = {  # what is called on CPUs too, and the operator
    'DCN': ('deform_conv', lambda: mmcv.cnn.build_conv_layer(dict(type='DCN', deform_groups=2), 4, 6, 3, padding=1)),
    'DCNv2': ('modulated_deform_conv', lambda: mmcv.cnn.build_conv_layer(dict(type='DCNv2'), 4, 6, 3, padding=1)),
    'SAC': ('deform_conv', lambda: mmcv.cnn.build_conv_layer(dict(type='SAC', use_deform=True), 4, 6, 3, padding=1)),
    'carafe': ('carafe', lambda: mmcv.cnn.build_upsample_layer(dict(type='carafe', channels=4, scale_factor=2))),
    'RoIPool': ('roi_pool', lambda: RegionLayer('RoIPool')),
    'RoIAlign': ('roi_align', lambda: RegionLayer('RoIAlign', pool_mode='max')),
    **{
        name: ('deform_roi_pool', lambda name=name: RegionLayer(name, output_channels=4, deform_fc_channels=8))
        for name in ('DeformRoIPoolPack', 'ModulatedDeformRoIPoolPack')
    },
}


@pytest.mark.parametrize('name', LAYERS)
def test_layers_that_configs_name_train(name, called):
    operator, build = LAYERS[name]
    layer, x = build(), torch.randn(2, 4, 8, 8, requires_grad=True)
    layer(x).square().sum().backward()
    gradients = [x.grad, *(parameter.grad for parameter in layer.parameters() if parameter.grad is not None)]
    assert all(gradient.isfinite().all() for gradient in gradients) and x.grad.any()
    assert {name.partition('_forward')[0].partition('_backward')[0] for name in called} == {operator}


def test_a_batch_norm_over_processes(called, monkeypatch):
    """Of one process here: the sums of several are mmcv's to make, between the operators."""
    monkeypatch.setattr('torch.distributed.get_world_size', lambda group: 1)
    layers = mmcv.ops.SyncBatchNorm(4, group='any'), torch.nn.BatchNorm2d(4)
    maps = [torch.randn(3, 4, 5, 2).mul_(3).add_(1).requires_grad_()]
    maps.append(maps[0].detach().clone().requires_grad_())
    layers[1].load_state_dict(layers[0].state_dict())
    weight = torch.randn(3, 4, 5, 2)
    for layer, x in zip(layers, maps, strict=True):
        (layer(x) * weight).sum().backward()
    for one, other in zip(*([*layer.state_dict().values()] for layer in layers), strict=True):
        torch.testing.assert_close(one, other)
    for one, other in zip(
        *([x.grad, layer.weight.grad, layer.bias.grad] for layer, x in zip(layers, maps, strict=True)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert called == {operator for operator in mmcv_ext.OPERATORS if operator.startswith('sync_bn')}


# What mmdet's and mmseg's models, layers and configs name of mmcv's operators and the stand-in does not have.
STILL_REFUSED: set[str] = set()


def test_operators_that_the_packages_name_are_there():
    """Read off the sources: names that they import from mmcv.ops, and types in the configs that they bring along."""
    layers = {
        type_: each.__name__ for type_, each in MODELS.module_dict.items() if each.__module__.startswith('mmcv.ops')
    }
    named = set()
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None:
            pytest.skip(f"{package} is not installed: pip install '.[mmlab]'")
        root = Path(spec.origin).parent
        for path in root.rglob('*.py'):
            text = path.read_text()
            if '.mim' in path.parts:
                types = re.findall(r"""type=['"](?:mmcv\.)?(\w+)['"]""", text)
                named |= {layers.get(type_, type_) for type_ in types}
            for names in re.findall(r'from mmcv\.ops[\w.]* import (\([^)]*\)|.*)', text):
                named |= set(re.findall(r'\w+', names.replace(' as ', ' ')))
    assert {'sigmoid_focal_loss', 'MultiScaleDeformableAttention', 'RoIAlign', 'DeformConv2d', 'soft_nms'} <= named
    needed = set().union(*(operators_of(name) for name in named if hasattr(mmcv.ops, name)))
    assert {'ms_deform_attn_forward', 'sigmoid_focal_loss_backward', 'carafe_forward', 'softnms', 'nms'} <= needed
    assert needed - mmcv_ext.OPERATORS.keys() == STILL_REFUSED


@functools.cache
def definitions(module):
    """What each name of a file of mmcv.ops uses: names, and operators of the extension."""
    uses = {}
    for node in ast.parse((Path(mmcv.ops.__file__).parent / f'{module}.py').read_text()).body:
        inner = list(ast.walk(node))
        names = {each.id for each in inner if isinstance(each, ast.Name)}
        operators = {
            each.attr
            for each in inner
            if isinstance(each, ast.Attribute) and isinstance(each.value, ast.Name) and each.value.id == 'ext_module'
        }
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            uses.update({alias.name: ({f'{node.module}.{alias.name}'}, set()) for alias in node.names})
        for name in [
            getattr(node, 'name', None),
            *(getattr(target, 'id', None) for target in getattr(node, 'targets', [])),
        ]:
            if name:
                uses[name] = (names - {name}, operators)
    return uses


def operators_of(name):
    """The operators of the extension that a name of mmcv.ops may call, through all that it uses there."""
    ways, seen, found = [('__init__', name)], set(), set()
    while ways:
        way = ways.pop()
        if way in seen:
            continue
        seen.add(way)
        module, name = way
        if '.' in name:
            module, name = name.split('.')
        names, operators = definitions(module).get(name, ((), ()))
        found |= set(operators)
        ways += [(module, other) for other in names]
    return found
