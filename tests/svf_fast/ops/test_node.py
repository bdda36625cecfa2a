"""Second derivatives and torch.func's transforms: refused in plain words, or right."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint

import svf_fast

OPTIONS = [
    *({"strategy": name} for name in ("auto", "gram", "chain", "fold")),
    *({"strategy": name, "fuse": False} for name in ("auto", "chain", "fold")),
]
EVERY_OPTION = pytest.mark.parametrize("options", OPTIONS, ids=str)
REFUSED = "(fused block|SVF layer): expected a backward pass without create_graph=True"


def build(**options) -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * 36, 2))
    model = model.eval().double().requires_grad_(False)
    return svf_fast.convert(model, None, progress=False, **options)


def scales(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


IMAGES = torch.randn(4, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def images() -> Tensor:
    return IMAGES[:2].clone()


class Composed(nn.Module):
    """The same function of the same S, written with `weight`, which is differentiable."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        for name, child in copy.deepcopy(model).named_children():
            self.add_module(name, child)

    def forward(self, x: Tensor) -> Tensor:
        first, norm, relu, second, flatten, last = self.children()
        x = relu(norm(nn.functional.conv2d(x, first.weight, first.bias, padding=1)))
        x = nn.functional.conv2d(x, second.weight, second.bias)
        return nn.functional.linear(flatten(x), last.weight, last.bias)


def by_grad(loss: Tensor, inputs: list[Tensor]) -> Tensor:
    return torch.cat(torch.autograd.grad(loss, inputs))


def by_backward(loss: Tensor, inputs: list[Tensor]) -> Tensor:
    loss.backward()
    return torch.cat([x.grad for x in inputs])


def by_backward_of_inputs(loss: Tensor, inputs: list[Tensor]) -> Tensor:
    loss.backward(inputs=inputs)
    return torch.cat([x.grad for x in inputs])


def maml(model: nn.Module, ask) -> Tensor:
    """The outer gradient of one inner step on other images."""
    S = scales(model)
    loss = functional_call(model, S, (images(),)).square().mean()
    inner = torch.autograd.grad(loss, list(S.values()), create_graph=True)
    fast = {name: p - 0.5 * g for (name, p), g in zip(S.items(), inner, strict=True)}
    return ask(functional_call(model, fast, (IMAGES[2:],)).square().mean(), list(S.values()))


def penalty(model: nn.Module, ask) -> Tensor:
    """The gradient of a loss with a penalty on the slope at x."""
    x = images().requires_grad_()
    out = model(x)
    (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    return ask(out.square().mean() + slope.square().sum(), list(scales(model).values()))


def by_create_graph(model: nn.Module, ask) -> Tensor:
    model(images()).square().sum().backward(create_graph=True)
    S = list(scales(model).values())
    return ask(sum(p.grad.square().sum() for p in S), S)


WAYS = [maml, penalty, by_create_graph]


@EVERY_OPTION
@pytest.mark.parametrize("ask", [by_grad, by_backward, by_backward_of_inputs])
@pytest.mark.parametrize("way", WAYS)
def test_a_second_derivative_is_an_error_in_every_way_of_asking(way, ask, options):
    with pytest.raises(RuntimeError, match=f"{REFUSED}.*strategy='reference'"):
        way(build(**options), ask)


@pytest.mark.parametrize("ask", [by_grad, by_backward_of_inputs])
@pytest.mark.parametrize("way", [maml, penalty])
def test_the_reference_has_the_second_derivative(way, ask):
    """Against the network whose weights are composed from S by ordinary operations."""
    model = build(strategy="reference")
    torch.testing.assert_close(way(model, ask), way(Composed(model), ask))


@EVERY_OPTION
def test_a_checkpoint_asks_for_the_first_derivative_alone(options):
    model, expected = build(**options), build(**options)
    S = list(scales(model).values())
    for reentrant in (False, True):
        x = images().requires_grad_()
        checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    found = torch.cat([p.grad / 2 for p in S])
    wanted = by_grad(expected(images()).square().sum(), list(scales(expected).values()))
    torch.testing.assert_close(found, wanted)

    x = images().requires_grad_()
    out = checkpoint(model, x, use_reentrant=False)
    with pytest.raises(RuntimeError, match=REFUSED):
        torch.autograd.grad(out.sum(), x, create_graph=True)


@pytest.mark.parametrize("strategy", ["auto", "gram", "chain"])
@pytest.mark.parametrize("fuse", [True, False])
def test_a_compiled_network_refuses_it_too(strategy, fuse):
    torch._dynamo.reset()
    model = build(strategy=strategy, fuse=fuse)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    first = by_grad(compiled(images()).square().sum(), list(scales(model).values()))
    torch.testing.assert_close(
        first, by_grad(model(images()).square().sum(), list(scales(model).values()))
    )
    x = images().requires_grad_()
    (slope,) = torch.autograd.grad(compiled(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(slope.square().sum(), list(scales(model).values()))


def loss_of(model: nn.Module, x: Tensor):
    return lambda S: functional_call(model, S, (x,)).square().mean()


def per_sample(model: nn.Module) -> dict[str, Tensor]:
    def loss(S, image):
        return loss_of(model, image[None])(S)

    return vmap(grad(loss), (None, 0))(detached(model), images())


def detached(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in scales(model).items()}


TRANSFORMS = {
    "grad": lambda model: grad(loss_of(model, images()))(detached(model)),
    "vmap of grad": per_sample,
    "vmap": lambda model: vmap(lambda S: functional_call(model, S, (images(),)))(
        {name: torch.stack([p, 2 * p]) for name, p in detached(model).items()}
    ),
    "jacrev": lambda model: jacrev(loss_of(model, images()))(detached(model)),
    "jvp": lambda model: jvp(model, (images(),), (images(),))[1],
    "hessian": lambda model: hessian(loss_of(model, images()))(detached(model)),
    "batched gradients": lambda model: torch.autograd.functional.jacobian(
        model, images(), vectorize=True
    ),
    "compiled grad": lambda model: torch.compile(
        grad(loss_of(model, images())), backend="aot_eager"
    )(detached(model)),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("options", OPTIONS[:1] + OPTIONS[4:], ids=str)
def test_transforms_are_refused_in_plain_words(transform, options):
    torch._dynamo.reset()
    words = "expected no transform of torch.func .*strategy='reference'"
    with pytest.raises(RuntimeError, match=words):
        TRANSFORMS[transform](build(**options))


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_the_reference_works_under_transforms(transform, fuse):
    torch._dynamo.reset()
    model = build(strategy="reference", fuse=fuse)
    found, wanted = TRANSFORMS[transform](model), TRANSFORMS[transform](Composed(model))
    torch.testing.assert_close(found, wanted)


def test_a_layer_told_to_compute_as_the_reference_works_under_transforms():
    model = build()
    for layer in model.modules():
        if isinstance(layer, svf_fast.SVFConv2d | svf_fast.SVFLinear):
            layer.strategy = "reference"
    wanted = build(strategy="reference")
    torch.testing.assert_close(TRANSFORMS["grad"](model), TRANSFORMS["grad"](wanted))


def test_ensembles_of_stacked_models():
    models = [build(strategy="reference") for _ in range(3)]
    for factor, model in enumerate(models):
        for S in scales(model).values():
            S.data.mul_(1 + factor)
    parameters, buffers = stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")
    found = vmap(lambda p, b: functional_call(base, (p, b), (images(),)))(parameters, buffers)
    torch.testing.assert_close(found, torch.stack([model(images()) for model in models]))


def test_functional_call_alone_works_with_every_strategy():
    for options in OPTIONS:
        model = build(**options)
        S = {name: 2 * p for name, p in detached(model).items()}
        changed = copy.deepcopy(model)
        changed.load_state_dict({**changed.state_dict(), **S})
        torch.testing.assert_close(functional_call(model, S, (images(),)), changed(images()))
