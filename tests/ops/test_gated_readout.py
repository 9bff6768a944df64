# SPDX-License-Identifier: Apache-2.0
"""What is particular to the gated readout, beside the suite of test_ops.py.

Its definition in numbers, and kernels against the reference at the edges of their blocks.
"""

import itertools

import pytest
import torch
from op_cases import READOUT_NAMES, make_readout
from torch import nn

from vssm.ops import gated_readout, gated_readout_ref


def make_case(*shape, dtype=torch.float64):
    """The seven tensors for maps of that shape, each needing a gradient."""
    tensors, _ = make_readout(shape, dtype=dtype)
    return [t.requires_grad_() for t in tensors.values()]


def run(op, tensors, grad, eps=1e-5):
    y = op(*tensors, eps)
    return dict(y=y.detach(), **dict(zip(READOUT_NAMES, torch.autograd.grad(y, tensors, grad), strict=True)))


@pytest.mark.parametrize('shape', [(3, 3), (2, 5, 4), (5,)], ids=str)
def test_readout_reference_is_the_definition(shape, assert_close):
    """Position by position, in numbers."""
    h, x, C, D, z, weight, bias = make_case(*shape)
    expected = torch.empty(shape, dtype=torch.float64)
    with torch.no_grad():
        for p in itertools.product(*map(range, shape[:-1])):
            u = C[p] * h[p] + D * x[p]
            variance = (u - u.sum() / len(u)).square().sum() / len(u)
            normed = (u - u.sum() / len(u)) / (variance + 1e-5).sqrt() * weight + bias
            expected[p] = normed * z[p] / (1 + (-z[p]).exp())
    assert_close(gated_readout_ref(h, x, C, D, z, weight, bias, 1e-5), expected, 1e-13)


@pytest.mark.parametrize(
    'shape', [(3, 3), (2, 5, 4, 7), (2, 3, 7, 37), (1, 1, 1, 64), (70, 213), (2, 9, 8, 512)], ids=str
)
def test_random_readouts(shape, cpu_path, assert_close):
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.float64, 1e-13)):
        case = make_case(*shape, dtype=dtype)
        grad = torch.randn(shape, dtype=dtype)
        found = run(gated_readout, case, grad)
        expected = run(gated_readout_ref, [t.detach().double().requires_grad_() for t in case], grad.double())
        for name, wanted in expected.items():
            assert found[name].dtype == dtype
            assert_close(found[name], wanted, tolerance, name)


def test_far_gates_of_a_readout(cpu_path):
    """Beyond the range of exp nothing overflows."""
    h, x, C, D, z, weight, bias = make_case(1, 40, dtype=torch.float32)
    with torch.no_grad():
        z.copy_(torch.linspace(-2000, 2000, 40))
    found = run(gated_readout, (h, x, C, D, z, weight, bias), torch.ones(1, 40))
    expected = run(gated_readout_ref, (h, x, C, D, z, weight, bias), torch.ones(1, 40))
    for name, wanted in expected.items():
        assert (found[name] - wanted).abs().max() <= 1e-5 * wanted.abs().max(), name


def test_readout_takes_views_and_expanded_maps(assert_close):
    _, x, _, D, z, weight, bias = make_case(2, 3, 4, 5, dtype=torch.float32)
    strided = torch.randn(2, 5, 3, 4).permute(0, 2, 3, 1).requires_grad_()
    tensors = (strided, x, torch.randn(2, 3, 4, 7)[..., 3:4], D[:1].expand(5), z, weight, bias)
    y = gated_readout(*tensors, 1e-5)
    assert y.is_contiguous()
    assert_close(y, gated_readout_ref(*tensors, 1e-5), 1e-6)
    (grad,) = torch.autograd.grad(y, strided, torch.ones(1).expand(2, 3, 4, 5))
    assert_close(grad, *torch.autograd.grad(gated_readout_ref(*tensors, 1e-5).sum(), strided), 1e-5)


@pytest.mark.parametrize('value', (float('nan'), float('inf')))
def test_readout_values_that_are_not_finite_stay_at_their_position(value, cpu_path):
    case = make_case(4, 5, 20, dtype=torch.float32)
    with torch.no_grad():
        clean = gated_readout(*case, 1e-5)
        case[0][1, 2, 3] = value
        changed = (gated_readout(*case, 1e-5) != clean).any(-1)
    assert changed[1, 2] and changed.sum() == 1


def test_vmap_takes_a_readout_of_one_position():
    """It has no axis into which the mapped one could be folded."""
    h, x, C, D, z, weight, bias = (t.detach() for t in make_case(4, 9))
    expected = gated_readout(h, x, C, D, z, weight, bias, 1e-5)
    y = torch.vmap(lambda h, x, C, z: gated_readout(h, x, C, D, z, weight, bias, 1e-5))(h, x, C, z)
    assert torch.equal(y, expected)


@pytest.mark.filterwarnings('ignore:.*torch.jit.*:DeprecationWarning')
def test_readout_counts_as_the_operations_that_it_stands_for():
    """For fvcore, and so for the published numbers of a network that calls either."""
    from fvcore.nn import FlopCountAnalysis

    class Operations(nn.Module):
        def forward(self, *tensors):
            return gated_readout_ref(*tensors, 1e-5)

    tensors = tuple(t.detach().float() for t in make_case(2, 3, 4, 5))
    assert FlopCountAnalysis(Operations(), tensors).unsupported_ops_warnings(False).total() == 5 * 2 * 3 * 4 * 5


@pytest.mark.parametrize(
    ('name', 'shape', 'parts'),
    [
        ('h', (), ('h must be (..., E) and not empty', '()')),
        ('h', (2, 0, 5), ('h must be (..., E) and not empty', '(2, 0, 5)')),
        ('C', (2, 3, 5), ('C must be (..., 1) = (2, 3, 1) for h of shape (2, 3, 5)', '(2, 3, 5)')),
        ('z', (2, 1, 5), ('z must be (..., E) = (2, 3, 5)', '(2, 1, 5)')),
        ('bias', (1,), ('bias must be (E,) = (5,)', '(1,)')),
    ],
    ids=('scalar', 'empty', 'C', 'broadcast', 'bias'),
)
def test_bad_shapes_of_a_readout(name, shape, parts):
    tensors, options = make_readout((2, 3, 5))
    tensors[name] = torch.zeros(shape)
    with pytest.raises(ValueError) as error:
        gated_readout(**tensors, **options)
    for part in ('gated_readout: ', *parts):
        assert part in str(error.value)


@pytest.mark.parametrize('index', range(7), ids=READOUT_NAMES)
@pytest.mark.parametrize('how', ('shape', 'dtype'))
def test_readout_operator_refuses_what_it_could_not_read_safely(how, index):
    case = [t.detach() for t in make_case(2, 3, 5)]
    case[index] = case[index][..., :0] if how == 'shape' else case[index].float()
    with pytest.raises(RuntimeError, match='vssm::gated_readout: h, x and z must be'):
        torch.ops.vssm.gated_readout(*case, 1e-5)


def test_readout_operator_refuses_a_gradient_of_another_shape():
    case = [t.detach() for t in make_case(2, 3, 5)]
    with pytest.raises(RuntimeError, match='vssm::gated_readout: grad_y has the wrong shape'):
        torch.ops.vssm.gated_readout_backward(case[0][:1], *case, 1e-5, [True] * 7)
