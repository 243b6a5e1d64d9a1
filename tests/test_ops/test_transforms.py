"""The operators under torch.func, forward-mode differentiation and torch.fx."""

import copy

import pytest
import torch
from op_cases import backend_name, case_not_empty, every_generator, oracle
from test_fused import make as make_fused
from test_fused import two_steps
from test_involution2d import make
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils import _pytree as pytree

from mmcls_involution.ops import Involution2d, fused_involution2d, involution2d

fused_too = pytest.mark.parametrize('fused', [False, True])


def both(fused, backend, shape, groups, *rest):
    """The operator and what it has to equal, and float64 tensors for them."""
    shape = (2, 2 * groups, *shape[2:])
    if fused:
        tensors, options = make_fused(shape, groups, *rest)
        return (
            lambda *t: fused_involution2d(*t, **options, backend=backend),
            lambda *t: two_steps(*t, **options),
            tensors,
        )
    *tensors, arguments = make(shape, groups, *rest)
    return (
        lambda *t: involution2d(*t, *arguments, backend=backend),
        lambda *t: oracle(*t, *arguments),
        tensors,
    )


def assert_close(ours, right):
    ours, right = pytree.tree_leaves(ours), pytree.tree_leaves(right)
    assert ours and len(ours) == len(right)
    for our, their in zip(ours, right, strict=True):
        assert our.dtype == their.dtype
        torch.testing.assert_close(our, their, rtol=1e-10, atol=1e-10)


@backend_name
@fused_too
@case_not_empty
def test_forward_mode(backend, fused, shape, groups, kernel, stride, padding, dilation):
    function, expected, tensors = both(
        fused, backend, shape, groups, kernel, stride, padding, dilation
    )
    assert gradcheck(
        function,
        tensors,
        fast_mode=True,
        check_forward_ad=True,
        check_backward_ad=False,
    )
    tangents = tuple(torch.randn_like(t) for t in tensors)
    # All tangents, and the first one alone.
    for places in (range(len(tensors)), [0]):

        def along(f, places=places):
            def some(*varied):
                every = list(tensors)
                for place, tensor in zip(places, varied, strict=True):
                    every[place] = tensor
                return f(*every)

            primals, directions = (
                tuple(t[i].detach() for i in places) for t in (tensors, tangents)
            )
            return jvp(some, primals, directions)

        ours = along(function)
        assert ours[1].abs().max() > 0
        assert_close(ours, along(expected))


@backend_name
@fused_too
@case_not_empty
def test_transforms(backend, fused, shape, groups, kernel, stride, padding, dilation):
    """Gradients, those of each sample, and batches along any dimension."""
    function, expected, tensors = both(
        fused, backend, shape, groups, kernel, stride, padding, dilation
    )
    tensors = [t.detach() for t in tensors]
    places, first = tuple(range(len(tensors))), tensors[0]
    of_sample = (0, 0, None, None)[: len(tensors)]

    def loss(f):
        return lambda *t: f(*t).square().sum()

    def loss_of_sample(f):
        return lambda x, y, *t: f(x[None], y[None], *t).square().sum()

    for transform in (
        lambda f: grad(loss(f), places)(*tensors),
        lambda f: vmap(grad(loss_of_sample(f), places), of_sample)(*tensors),
        lambda f: vmap(lambda x: f(x, *tensors[1:]))(torch.stack([first, -2 * first])),
        lambda f: vmap(lambda y: f(first, y, *tensors[2:]), in_dims=3, out_dims=1)(
            torch.stack([tensors[1]] * 3, 3)
        ),
    ):
        assert_close(transform(function), transform(expected))


@backend_name
@fused_too
def test_second_derivatives(backend, fused):
    function, expected, tensors = both(fused, backend, (1, 2, 3, 4), 1, (3, 3), 2, 1, 1)
    places = tuple(range(len(tensors)))
    assert gradgradcheck(function, tensors, fast_mode=True, check_fwd_over_rev=True)
    detached = [t.detach() for t in tensors]
    for transform in (
        lambda f: hessian(lambda *t: f(*t).pow(3).sum(), places)(*detached),
        lambda f: jacrev(jacfwd(lambda *t: f(*t).pow(3).sum()))(*detached),
        lambda f: torch.autograd.functional.jacobian(
            f, tuple(detached), strategy='forward-mode', vectorize=True
        ),
    ):
        assert_close(transform(function), transform(expected))


@fused_too
def test_backward_of_several_gradients_at_once(fused):
    """Of a graph from outside of any transform."""
    function, expected, tensors = both(fused, None, (2, 4, 5, 6), 2, (3, 3), 1, 1, 1)
    out, right = function(*tensors), expected(*tensors)
    grads = torch.randn(3, *out.shape, dtype=out.dtype)
    assert_close(
        torch.autograd.grad(out, tensors, grads, is_grads_batched=True),
        torch.autograd.grad(right, tensors, grads, is_grads_batched=True),
    )

    def directional(out):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(grads[0], grads[1])
            found = torch.autograd.grad(out, tensors, dual)
            return [tuple(forward_ad.unpack_dual(t)) for t in found]

    assert_close(directional(function(*tensors)), directional(expected(*tensors)))


@fused_too
def test_autocast(fused):
    function, _, tensors = both(fused, None, (2, 4, 5, 6), 2, (3, 3), 1, 1, 1)
    tensors = tuple(t.detach().float() for t in tensors)
    with torch.autocast('cpu', torch.bfloat16):
        out, tangent = jvp(
            lambda x: function(x, *tensors[1:]), tensors[:1], tensors[:1]
        )
        found = grad(lambda x: function(x, *tensors[1:]).float().sum())(tensors[0])
        plain = function(*tensors)
    assert out.dtype == tangent.dtype == torch.bfloat16
    # Kernels are rounded, which the fused operator does not do.
    torch.testing.assert_close(out, plain, rtol=0.02, atol=0.1 if fused else 0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(tangent, out)  # linear in the input


def test_wrong_values_are_refused_as_they_are_elsewhere():
    x, weight = torch.zeros(3, 2, 4, 5, 6), torch.zeros(2, 2, 3, 3, 5, 5)
    with pytest.raises(ValueError, match='weight must hold one kernel per.*5x6.*5x5'):
        vmap(lambda x: involution2d(x, weight, padding=1))(x)


@pytest.mark.parametrize('requires_grad', [False, True])
@pytest.mark.parametrize('functional', [False, True])
def test_an_operator_by_its_name_is_refused_in_forward_mode(requires_grad, functional):
    """torch would return zeros."""
    x, weight, _ = make((2, 4, 5, 6), 2, (3, 3), 1, 1, 1)
    x.requires_grad_(requires_grad)
    one = [1, 1]

    def call(x):
        return torch.ops.mmcls_involution.involution2d(x, weight, one, one, one, '')

    with pytest.raises(NotImplementedError, match='involution2d has no forward-mode'):
        if functional:
            jvp(call, (x,), (x,))
        else:
            with forward_ad.dual_level():
                call(forward_ad.make_dual(x, x))


def test_compiled_transforms():
    x, weight, arguments = make((2, 4, 5, 6), 2, (3, 3), 1, 1, 1)
    x, weight = x.detach(), weight.detach()

    def loss(x):
        return involution2d(x, weight, *arguments).square().sum()

    for transform in (
        lambda x: grad(loss)(x),
        lambda x: jvp(loss, (x,), (x,))[1],
        lambda x: vmap(lambda x: involution2d(x[None], weight[:1], *arguments))(x),
    ):
        compiled = torch.compile(transform, backend='aot_eager')
        torch.testing.assert_close(compiled(x), transform(x))


@fused_too
@every_generator
def test_module(generator, fused):
    """Gradients of each sample, and the derivative by differences."""
    module = Involution2d(8, 3, 2, group_channels=4, generator=generator, fused=fused)
    module = module.double().eval()
    x = torch.randn(3, 8, 5, 6, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def loss(parameters, x):
        return functional_call(module, parameters, (x[None],)).square().sum()

    of_samples = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i, sample in enumerate(x):
        found = torch.autograd.grad(
            module(sample[None]).square().sum(), list(module.parameters())
        )
        assert_close([value[i] for value in of_samples.values()], found)
    step = 1e-6
    difference = (module(x + step * x) - module(x - step * x)) / (2 * step)
    torch.testing.assert_close(
        jvp(module, (x,), (x,))[1], difference, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize('inside', [False, True])
@pytest.mark.parametrize('fused', [None, False, True])
@every_generator
def test_symbolic_trace(generator, fused, inside):
    """The module itself, and as a layer: outputs and gradients bit for bit."""
    module = Involution2d(16, 3, 2, generator=generator, fused=fused)
    if inside:
        module = nn.Sequential(module, nn.BatchNorm2d(16))
    traced = torch.fx.symbolic_trace(copy.deepcopy(module))
    if inside:
        assert [n.op for n in traced.graph.nodes].count('call_module') == 2
    x = torch.randn(2, 16, 9, 7)
    outputs = [m(x) for m in (module, traced)]
    assert torch.equal(*outputs)
    for out in outputs:
        out.square().sum().backward()
    theirs = dict(traced.named_parameters())
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter.grad, theirs[name].grad)


def test_symbolic_trace_of_the_functions():
    class Both(nn.Module):
        def forward(self, x, weight, spans):
            out = involution2d(x, weight, padding=1)
            return out + fused_involution2d(x, x, spans, kernel_size=3, padding=1)

    x, weight, _ = make((2, 4, 5, 6), 2, (3, 3), 1, 1, 1)
    arguments = x, weight, torch.randn(9, 4, 1, 1, dtype=x.dtype)
    traced = torch.fx.symbolic_trace(Both())
    assert torch.equal(traced(*arguments), Both()(*arguments))


def test_subclasses_of_tensor_are_kept():
    class Named(torch.Tensor):
        pass

    x, weight, arguments = make((2, 4, 5, 6), 2, (3, 3), 1, 1, 1)
    out = involution2d(x.as_subclass(Named), weight, *arguments)
    assert isinstance(out, Named)
    assert torch.equal(
        out.as_subclass(torch.Tensor), involution2d(x, weight, *arguments)
    )
