"""Transformer blocks found by their forward pass, and everything that must not be taken for one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import svf_fast
from svf_fast.fusion.tokens import TransformerBlock, find_transformers
from tests.svf_fast.transformers import BLOCKS, Block, DinoBlock, drawn


def examined(block: nn.Module):
    """What is found of it, and why not."""
    return find_transformers(nn.Sequential(drawn(block)), lambda _: True)


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_found(name):
    found, reasons = examined(BLOCKS[name]())
    assert not reasons
    block = found["0"][False]
    assert isinstance(block, TransformerBlock) and found["0"][True] == block
    assert block.layers == ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert block.norms == ("norm1", "norm2")
    assert block.gelu == ("tanh" if "tanh" in name else "none")
    scaled = "without" not in name
    assert (block.scale1, block.scale2) == (("ls1.gamma", "ls2.gamma") if scaled else ("", ""))


class Renamed(nn.Module):
    """The same with other names, methods and order of operands."""

    def __init__(self):
        super().__init__()
        block = Block()
        self.a, self.b, self.c = block.norm1, block.attn.qkv, block.attn.proj
        self.d, self.e, self.f = block.norm2, block.mlp.fc1, block.mlp.fc2
        self.weights = nn.ParameterDict({"g": torch.ones(16)})

    def forward(self, tokens):
        q, k, v = self.b(self.a(tokens)).chunk(3, dim=-1)
        mixed = self.c(torch.softmax(q @ k.mT / 4, dim=-1) @ v)
        tokens = torch.mul(self.weights["g"], mixed) + tokens
        return self.f(nn.functional.gelu(self.e(self.d(tokens)), approximate="tanh")) + tokens


def test_names_do_not_matter():
    block = examined(Renamed())[0]["0"][False]
    assert block.layers == ("b", "c", "e", "f") and block.norms == ("a", "d")
    assert (block.scale1, block.scale2, block.gelu) == ("weights.g", "", "tanh")


def changed(change, base=Block):
    """A subclass of the block with a forward of its own, or a changed block."""

    def build():
        block = base()
        change(block)
        return block

    return build


def forward(function, base=Block):
    return type("Other", (base,), {"forward": function})


class PostNorm(Block):
    def forward(self, x):
        x = self.norm1(x + self.attn(x))
        return self.norm2(x + self.mlp(x))


class Parallel(Block):
    def forward(self, x):
        return x + self.attn(self.norm1(x)) + self.mlp(self.norm2(x))


class Stored(Block):
    def forward(self, x):
        self.last = x
        return super().forward(x)


class TwoScales(Block):
    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x))) * x


class Overwritten(Block):
    def forward(self, x):
        x += self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class Leaking(Block):
    """Its attention adds the normalized input to what it returns."""

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.attn.proj(torch.tanh(self.attn.qkv(y)[..., :16]) + y)
        return x + self.mlp(self.norm2(x))


class Wide(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


REASONS = {
    "'norm2' (LayerNorm) stands where its last sum would fit": PostNorm,
    "'norm2' does not get what its branch is added to": Parallel,
    "its forward stores 'last' on the module": Stored,
    "it multiplies two maps": TwoScales,
    "it writes a sum over its operand": Overwritten,
    "the output of 'norm1' (LayerNorm) is used more than once": Leaking,
    "uses SiLU instead of GELU": lambda: Block(act=nn.SiLU),
    "'mlp.fc1' (Wide) is more than a linear layer": changed(
        lambda b: setattr(b.mlp, "fc1", Wide(16, 64))
    ),
    "'norm2' normalizes over [3, 16], not channels": changed(
        lambda b: setattr(b, "norm2", nn.LayerNorm((3, 16)))
    ),
    "'attn' has a forward hook": changed(lambda b: b.attn.register_forward_hook(lambda *_: None)),
    "it has an attribute 'recompute' of its own": changed(lambda b: setattr(b, "recompute", 1)),
    "its forward cannot be traced": forward(
        lambda self, x: Block.forward(self, x) if x.sum() > 0 else x
    ),
    "its forward cannot be traced (": forward(lambda self, x, y: x + y),
    "its forward returns something else": forward(lambda self, x: [Block.forward(self, x)]),
}


@pytest.mark.parametrize("reason", REASONS)
def test_what_does_not_fit_says_why(reason):
    found, reasons = examined(REASONS[reason]())
    assert not found
    assert reasons["0"].startswith(reason), reasons


def test_what_is_active_in_training_alone():
    for kind in (Block, DinoBlock):
        modes = examined(kind(drop_path=0.1))[0]["0"]
        assert isinstance(modes[False], TransformerBlock)
        assert isinstance(modes[True], str)
    assert "(DropPath) is active" in examined(Block(drop_path=0.1))[0]["0"][True]
    modes = examined(Block(drop=0.1))[0]["0"]
    assert isinstance(modes[False], TransformerBlock) and modes[True].endswith("is active")
    modes = examined(Block(attention_drop=0.1))[0]["0"]  # within the attention, which runs as it is
    assert isinstance(modes[True], TransformerBlock) and modes[True] != modes[False]


def test_a_block_counts_if_all_of_it_is_chosen():
    model = nn.Sequential(drawn(Block()), drawn(Block()))
    found, reasons = find_transformers(model, lambda name: name.startswith("0.") or "qkv" in name)
    assert list(found) == ["0"]
    assert reasons == {"1": "only 1 of its 4 linear layers are chosen"}
    assert find_transformers(model, lambda name: False) == ({}, {})


def test_a_layer_used_twice_in_the_model():
    model = nn.Sequential(drawn(Block()), nn.Identity())
    model[1].linear = model[0].mlp.fc1
    found, reasons = find_transformers(model, lambda _: True)
    assert not found and reasons == {"0": "'mlp.fc1' is used twice in the model"}


def test_the_model_is_as_it_was():
    block = Block(drop_path=0.1).train()
    state = {name: value.clone() for name, value in block.state_dict().items()}
    generator = torch.get_rng_state()
    find_transformers(nn.Sequential(block), lambda _: True)
    assert block.training and all(part.training for part in block.modules())
    assert torch.equal(generator, torch.get_rng_state())
    assert all(torch.equal(value, state[name]) for name, value in block.state_dict().items())


class Masked(nn.Module):
    """Attention whose mask is made of sizes, which C code reads as numbers."""

    def __init__(self, make):
        super().__init__()
        self.n1, self.n2, self.make = nn.LayerNorm(8), nn.LayerNorm(8), make
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        h = self.n1(x)
        w = (self.q(h) @ self.k(h).mT).softmax(-1)
        return self.n2(x + self.o(w @ self.v(h)) + self.make(x, x.shape[1]).sum())


MAKES = {
    "ones": lambda x, n: torch.ones(n, n).tril(),
    "zeros of a tuple": lambda x, n: torch.zeros((n, n)),
    "zeros on its device": lambda x, n: torch.zeros(n, n, device=x.device),
    "full": lambda x, n: torch.full((n,), 2.0),
    "eye": lambda x, n: torch.eye(n),
    "arange": lambda x, n: torch.arange(n // 2 + 1),
    "empty": lambda x, n: torch.empty(n).fill_(1.0),
    "linspace": lambda x, n: torch.linspace(0, 1, n),
    "tensor": lambda x, n: torch.tensor(n),
    "as_tensor": lambda x, n: torch.as_tensor(n),
    "as_tensor of its input": lambda x, n: torch.as_tensor(x),
    "size": lambda x, n: torch.ones(x.size(1), x.dim()),
}


@pytest.mark.parametrize("name", MAKES)
def test_sizes_are_no_tensors(name):
    """Once they said that they were, and a constructor in C ended the process."""
    model = nn.Sequential(Masked(MAKES[name])).requires_grad_(False)
    x = torch.randn(2, 5, 8)
    expected = model(x)
    svf_fast.convert(model, None, progress=False)
    torch.testing.assert_close(model(x), expected)
