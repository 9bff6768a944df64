# SPDX-License-Identifier: Apache-2.0
"""The gated readout: the kernels against PyTorch's operations, and who takes it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vssm.models import spatial_mamba
from vssm.ops import gated_readout, use_reference

NAMES = ('h', 'x', 'C', 'D', 'z', 'weight', 'bias')


def make_case(*shape, dtype=torch.float64):
    """The seven tensors for maps of that shape, each needing a gradient."""
    shapes = dict(C=(*shape[:-1], 1), **dict.fromkeys(('D', 'weight', 'bias'), shape[-1:]))
    return [torch.randn(shapes.get(name, shape), dtype=dtype).requires_grad_() for name in NAMES]


def definition(h, x, C, D, z, weight, bias, eps):
    return F.layer_norm(C * h + D * x, D.shape, weight, bias, eps) * F.silu(z)


def run(op, tensors, grad, eps=1e-5):
    y = op(*tensors, eps)
    return dict(y=y.detach(), **dict(zip(NAMES, torch.autograd.grad(y, tensors, grad), strict=True)))


@pytest.mark.parametrize(
    'shape', [(3, 3), (2, 5, 4, 7), (2, 3, 7, 37), (1, 1, 1, 64), (70, 213), (2, 9, 8, 512)], ids=str
)
def test_random_cases(shape, cpu_path, assert_close):
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.float64, 1e-13)):
        case = make_case(*shape, dtype=dtype)
        grad = torch.randn(shape, dtype=dtype)
        found = run(gated_readout, case, grad)
        expected = run(definition, [t.detach().double().requires_grad_() for t in case], grad.double())
        for name, wanted in expected.items():
            assert found[name].dtype == dtype
            assert_close(found[name], wanted, tolerance, name)


def test_gradcheck():
    assert torch.autograd.gradcheck(lambda *tensors: gated_readout(*tensors, 1e-5), make_case(2, 3, 9))


def test_far_gates(cpu_path):
    """Beyond the range of exp nothing overflows."""
    h, x, C, D, z, weight, bias = make_case(1, 40, dtype=torch.float32)
    with torch.no_grad():
        z.copy_(torch.linspace(-2000, 2000, 40))
    found = run(gated_readout, (h, x, C, D, z, weight, bias), torch.ones(1, 40))
    expected = run(definition, (h, x, C, D, z, weight, bias), torch.ones(1, 40))
    for name, wanted in expected.items():
        assert (found[name] - wanted).abs().max() <= 1e-5 * wanted.abs().max(), name


def test_any_strides_are_taken(assert_close):
    _, x, _, D, z, weight, bias = make_case(2, 3, 4, 5, dtype=torch.float32)
    strided = torch.randn(2, 5, 3, 4).permute(0, 2, 3, 1).requires_grad_()
    tensors = (strided, x, torch.randn(2, 3, 4, 7)[..., 3:4], D[:1].expand(5), z, weight, bias)
    y = gated_readout(*tensors, 1e-5)
    assert y.is_contiguous()
    assert_close(y, definition(*tensors, 1e-5), 1e-6)
    (grad,) = torch.autograd.grad(y, strided, torch.ones(1).expand(2, 3, 4, 5))
    assert_close(grad, *torch.autograd.grad(definition(*tensors, 1e-5).sum(), strided), 1e-5)


def test_any_number_of_threads_gives_the_same_bits(cpu_path):
    case, grad = make_case(3, 40, 50, 24, dtype=torch.float32), torch.randn(3, 40, 50, 24)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(run(gated_readout, case, grad))
    torch.set_num_threads(2)
    for result in results[1:]:
        assert all(torch.equal(result[name], results[0][name]) for name in result)


@pytest.mark.parametrize('value', (float('nan'), float('inf')))
def test_values_that_are_not_finite_stay_at_their_position(value, cpu_path):
    case = make_case(4, 5, 20, dtype=torch.float32)
    with torch.no_grad():
        clean = gated_readout(*case, 1e-5)
        case[0][1, 2, 3] = value
        changed = (gated_readout(*case, 1e-5) != clean).any(-1)
    assert changed[1, 2] and changed.sum() == 1


@pytest.mark.parametrize('dtype', (torch.float32, torch.float64), ids=str)
def test_opcheck(dtype):
    case = make_case(2, 3, 5, dtype=dtype)
    torch.library.opcheck(torch.ops.vssm.gated_readout, (*case, 1e-5))
    with torch.no_grad():
        torch.library.opcheck(torch.ops.vssm.gated_readout_backward, (torch.randn(2, 3, 5, dtype=dtype), *case, 1e-5))


def test_second_derivative_is_refused():
    case = make_case(2, 5)
    (grad,) = torch.autograd.grad(gated_readout(*case, 1e-5).sum(), case[0], create_graph=True)
    with pytest.raises(NotImplementedError, match='gated_readout.*second derivative.*use_reference'):
        grad.sum().backward()


@pytest.mark.parametrize('index', range(7), ids=NAMES)
@pytest.mark.parametrize('how', ('shape', 'dtype'))
def test_what_could_not_be_read_safely_is_refused(how, index):
    case = [t.detach() for t in make_case(2, 3, 5)]
    case[index] = case[index][..., :0] if how == 'shape' else case[index].float()
    with pytest.raises(RuntimeError, match='vssm::gated_readout: h, x and z must be'):
        gated_readout(*case, 1e-5)


def test_gradient_of_another_shape_is_refused():
    case = [t.detach() for t in make_case(2, 3, 5)]
    with pytest.raises(RuntimeError, match='vssm::gated_readout: grad_y has the wrong shape'):
        torch.ops.vssm.gated_readout_backward(case[0][:1], *case, 1e-5)


# ---- the mixer -------------------------------------------------------------------------------------------------------


class OtherNorm(nn.LayerNorm):
    pass


@pytest.mark.parametrize('who', ('hook', 'subclass', 'bias', 'float64', 'autocast', 'reference', 'vmap'))
def test_mixer_takes_it_unless_someone_looks_on(who, monkeypatch, assert_close):
    mixer = spatial_mamba.SpatialMixer(8).eval()
    x = torch.randn(2, 5, 6, 8)
    calls = []

    def counted(*args):
        calls.append(args)
        return gated_readout(*args)

    monkeypatch.setattr(spatial_mamba, 'gated_readout', counted)
    with torch.no_grad():
        expected = mixer(x)
    assert len(calls) == 1
    other = copy.deepcopy(mixer)
    if who == 'hook':
        other.act.register_forward_hook(lambda module, args, y: None)
    elif who == 'subclass':
        other.norm = OtherNorm(16)
    elif who == 'bias':
        other.norm = nn.LayerNorm(16, bias=False)
    elif who == 'float64':
        other, x = other.double(), x.double()
    with torch.no_grad(), use_reference(who == 'reference'), torch.autocast('cpu', enabled=who == 'autocast'):
        y = torch.vmap(other)(x[None])[0] if who == 'vmap' else other(x)
    assert len(calls) == 1
    assert_close(y, expected, 2e-2 if who == 'autocast' else 1e-5)
