"""Fused transformer blocks in a model: the 2x rule, what they keep, and where they do not run."""

from __future__ import annotations

import copy
import pickle
import types

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import svf_fast
from svf_fast import SVFTransformerBlock
from svf_fast.layers.factored import svf_layers
from tests.svf_fast.gpu_path import interpreted, on_gpu
from tests.svf_fast.saved_bytes import saved_by
from tests.svf_fast.tolerance import accumulated, assert_error_within
from tests.svf_fast.transformers import BLOCKS, Block, DinoBlock, DropPath, drawn


def fused(name_or_block="timm", strategy="auto") -> nn.Module:
    block = BLOCKS[name_or_block]() if isinstance(name_or_block, str) else name_or_block
    model = svf_fast.convert(nn.Sequential(drawn(block)), None, strategy, progress=False)
    assert isinstance(model[0], SVFTransformerBlock) and isinstance(model[0], type(block))
    return model


def as_reference(model: nn.Module) -> nn.Module:
    """The same network with the paper's layers, nothing fused."""
    plain = copy.deepcopy(model)
    for module in list(plain.modules()):
        if isinstance(module, SVFTransformerBlock):
            module.unfuse()
    for layer in svf_layers(plain).values():
        layer.strategy = "reference"
        layer.refresh()
    return plain


def step(model: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    x = x.detach().clone().requires_grad_()
    y = model(x)
    trained = [p for p in model.parameters() if p.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, [x, *trained], grad.to(y.dtype))]


def compare(model: nn.Module, x: torch.Tensor) -> None:
    """The 2x rule; a gradient passes four layers and an attention."""
    reference = as_reference(model)
    truth = copy.deepcopy(reference).double()
    grad = torch.randn(x.shape).to(x.dtype)
    exact, expected = step(truth, x.double(), grad), step(reference, x, grad)
    for index, values in enumerate(zip(step(model, x, grad), expected, exact, strict=True)):
        magnitude = 5 * accumulated(values[2], x.dtype)
        assert_error_within(*values, magnitude=magnitude, channel_dim=None, name=str(index))


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
@pytest.mark.parametrize("strategy", ("auto", "chain", "fold"))
@pytest.mark.parametrize("name", BLOCKS)
def test_gradients_within_twice_the_error_of_the_reference(name, strategy, dtype, poisoned_memory):
    model = fused(name, strategy).to(dtype)
    assert model[0].unfused_reason() == ""
    for recompute in (False, True):
        model[0].recompute = recompute
        compare(model, torch.randn(2, 7, 16).to(dtype))


@pytest.mark.parametrize("core", ("band:1", "lowrank:2"))
@pytest.mark.parametrize("strategy", ("gram", "chain", "fold"))
def test_beyond_the_diagonal(core, strategy):
    """Cores of which the layers have different numbers of tensors, by the 2x rule."""
    block = drawn(BLOCKS["timm"]())
    model = svf_fast.convert(nn.Sequential(block), None, strategy, progress=False, core=core)
    assert isinstance(model[0], SVFTransformerBlock) and model[0].unfused_reason() == ""
    with torch.no_grad():
        for part in (p for p in model.parameters() if p.requires_grad):
            part.add_(0.02 * torch.randn_like(part))
    for recompute in (False, True):
        model[0].recompute = recompute
        compare(model, torch.randn(2, 7, 16))
        assert model[0].unfused_reason() == ""


def errors(run, truth: list[torch.Tensor]) -> torch.Tensor:
    pairs = zip(run, truth, strict=True)
    return torch.stack([(value.double() - true).norm() / true.norm() for value, true in pairs])


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("autocast", (False, True))
@pytest.mark.parametrize("name", ("timm", "DINOv2"))
def test_16_bit(name, autocast, dtype):
    """Over draws, the median error of each result at most twice that of the paper's layers."""
    mine, theirs = [], []
    for seed in range(11):
        torch.manual_seed(seed)
        model = fused(name)
        reference, truth = as_reference(model), as_reference(model).double()
        x, grad = torch.randn(2, 7, 16), torch.randn(2, 7, 16)
        if not autocast:
            model, reference, x = model.to(dtype), reference.to(dtype), x.to(dtype)
        exact = step(truth, x.double(), grad.double())
        with torch.autocast("cpu", dtype, enabled=autocast):
            mine.append(errors(step(model, x, grad), exact))
            theirs.append(errors(step(reference, x, grad), exact))
    mine, theirs = (torch.stack(each).median(dim=0).values for each in (mine, theirs))
    assert (mine <= 2 * theirs).all(), (mine, theirs)


def equal_spectra(block: nn.Module) -> nn.Module:
    """Layers that need no guard, which would keep its part of v."""
    for layer in block.modules():
        if isinstance(layer, nn.Linear):
            nn.init.orthogonal_(layer.weight)
    return block


@pytest.mark.parametrize("kind", (Block, DinoBlock))
def test_what_a_block_keeps(kind):
    count, channels, heads = 2 * 9, 32, 2
    model = fused(equal_spectra(kind(channels, heads)))
    x = torch.randn(2, 9, channels, requires_grad=True)
    frozen = saved_by(nn.Sequential(drawn(equal_spectra(kind(channels, heads)))), x)
    saved = saved_by(model, x)
    statistics = 2 * 2 * count * 4  # of the layer norms, which are computed again
    if kind is Block:
        assert saved == 10 * count * channels * 4 + count * heads * 4  # those of the softmax
        assert saved == frozen - statistics
    else:  # products and a softmax do not keep what they return
        assert saved == frozen - statistics + count * channels * 4
    model[0].recompute = True
    assert saved_by(model, x) == saved - 4 * count * channels * 4
    assert saved_by(as_reference(model), x) > frozen + 12 * count * channels * 4


def test_the_report_counts_what_is_kept():
    model = nn.Sequential(*(drawn(equal_spectra(Block(32))) for _ in range(3)))
    svf_fast.convert(model, None, progress=False)
    first = model[0].attn.qkv
    assert first.strategy_in_use == "gram" and first.guarded == 0
    shape = (2, 9, 32)
    for recompute in (False, True):
        for block in model:
            block.recompute = recompute
        report = svf_fast.memory_report(model, shape)
        assert report.saved_bytes == saved_by(model, torch.randn(shape))
        notes = {unit.note for unit in report.units if unit.layers}
        assert notes == ({"computes mlp.fc1 again"} if recompute else {""})
        positions, channels = 2 * 9, 32
        products = 2 * positions * channels**2 * (24 + 4 + 1 + 4 * recompute)
        assert [unit.flops for unit in report.units if unit.layers] == [products] * 3


def test_a_memory_budget_chooses_blocks():
    model = nn.Sequential(*(drawn(equal_spectra(Block(32))) for _ in range(3)))
    plain = copy.deepcopy(model)
    svf_fast.convert(model, None, progress=False)
    shape = (2, 9, 32)
    whole = svf_fast.memory_report(model, shape).saved_bytes
    hidden = 4 * 2 * 9 * 32 * 4
    svf_fast.convert(
        plain, None, progress=False, memory_budget=whole - hidden - 1, input_shape=shape
    )
    assert sum(block.recompute for block in plain) == 2
    x = torch.randn(shape)
    torch.testing.assert_close(plain(x), model(x))


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
def test_in_8_bits_dS_of_the_last_layer_alone_is_rounded(name, dtype):
    exact = fused(name).to(dtype)
    coded = copy.deepcopy(exact)
    coded[0].keeps_int8 = True
    x, grad = (torch.randn(3, 17, 16).to(dtype) for _ in range(2))
    trained = ["y", "dx", *(name for name, p in exact.named_parameters() if p.requires_grad)]
    last = trained[-1]
    assert last.endswith("fc2.S")
    for recompute in (False, True):
        exact[0].recompute = coded[0].recompute = recompute
        expected, got = (
            dict(zip(trained, step(model, x, grad), strict=True)) for model in (exact, coded)
        )
        rounded = [key for key in trained if not torch.equal(got[key], expected[key])]
        assert rounded == [last] * coded[0].takes_int8
        assert coded[0].takes_int8 == ("narrow" not in name)
        error = (got[last] - expected[last]).norm() / expected[last].norm()
        assert error < 0.02


def test_in_8_bits_on_the_path_of_a_gpu():
    exact = fused()
    coded = copy.deepcopy(exact)
    coded[0].keeps_int8 = True
    x, grad = torch.randn(2, 17, 16), torch.randn(2, 17, 16)
    with on_gpu(interpreted()) as calls:
        expected = step(exact, x, grad)
        assert not calls["quantize"]
        got = step(coded, x, grad)
        assert calls["quantize"] == 1
    for mine, true in zip(got[:-1], expected[:-1], strict=True):
        assert torch.equal(mine, true)
    assert 0 < (got[-1] - expected[-1]).norm() < 0.02 * expected[-1].norm()


def test_bytes_in_8_bits():
    count, channels = 2 * 9, 32
    model = fused(equal_spectra(Block(channels)))
    x = torch.randn(2, 9, channels, requires_grad=True)
    for recompute in (False, True):
        model[0].recompute, model[0].keeps_int8 = recompute, False
        exact = saved_by(model, x)
        model[0].keeps_int8 = True
        assert exact - saved_by(model, x) == 3 * count * channels - 3 * 4 * channels
        report = svf_fast.memory_report(model, (2, 9, channels))
        assert "keeps 8 bits" in str(report)
        frozen_input = saved_by(model, x.detach())
        assert report.saved_bytes == frozen_input


def test_convert_keeps_8_bits_with_gram_alone():
    def block() -> nn.Sequential:
        return nn.Sequential(drawn(equal_spectra(Block(32))))

    model = svf_fast.convert(block(), None, keep="int8", progress=False)
    assert model[0].keeps_int8
    with pytest.warns(UserWarning, match="transformer blocks with the strategy 'gram'"):
        model = svf_fast.convert(block(), None, "chain", keep="int8", progress=False)
    assert not model[0].keeps_int8
    with torch.device("meta"):
        model = nn.Sequential(Block(32)).eval().requires_grad_(False)
    model = svf_fast.convert(model, None, keep="int8", progress=False)
    assert model[0].keeps_int8
    with pytest.raises(ValueError, match="model: expected values, .* got 0.attn.qkv on the meta"):
        svf_fast.memory_report(model, (2, 9, 32))
    shape = (2, 9, 32)
    exact = svf_fast.convert(block(), None, progress=False)
    for way in ("keeps_int8", "recompute"):  # the plan of both at once
        setattr(exact[0], way, True)
    budget = {"memory_budget": svf_fast.memory_report(exact, shape).saved_bytes}
    model = svf_fast.convert(
        block(), None, keep="auto", progress=False, input_shape=shape, **budget
    )
    assert model[0].keeps_int8 and model[0].recompute


def test_state_copies_and_merging():
    plain = nn.Sequential(drawn(DinoBlock()), drawn(Block()))
    x = torch.randn(2, 7, 16)
    expected, keys = plain(x), list(plain.state_dict())
    model = svf_fast.convert(copy.deepcopy(plain), None, progress=False)
    assert isinstance(model[0], DinoBlock)
    torch.testing.assert_close(model(x), expected)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(again[0], SVFTransformerBlock) and again[0].unfused_reason() == ""
        assert torch.equal(again(x), model(x))
        assert list(again.state_dict()) == list(model.state_dict())
    merged = svf_fast.merge(model)
    assert type(merged[0]) is DinoBlock and list(merged.state_dict()) == keys
    torch.testing.assert_close(merged(x), expected)


def test_a_mask_runs_as_the_block_has_it():
    model = fused()
    plain = copy.deepcopy(model)
    plain[0].unfuse()
    x, mask = torch.randn(2, 7, 16), torch.randn(7, 7)
    assert torch.equal(model[0](x, mask), plain[0](x, mask))
    assert torch.equal(model[0](x, attn_mask=mask), plain[0](x, attn_mask=mask))
    assert not torch.equal(model[0](x, mask), model[0](x))
    assert torch.equal(model[0](x, attn_mask=None), model[0](x))
    with pytest.raises(AssertionError):
        fused("DINOv2")[0]([x])  # as DINOv2's without xFormers


def test_bad_input():
    model = fused()
    with pytest.raises(
        ValueError, match=r"SVFBlock: expected x of shape \[..., 16\], got \[2, 7, 8\]"
    ):
        model(torch.randn(2, 7, 8))
    with pytest.raises(TypeError, match="torch.float32, the dtype of the factors"):
        model(torch.randn(2, 7, 16).double())


def set_reference(block):
    block.mlp.fc2.strategy = "reference"


REASONS = {
    "norm1.weight trains": lambda b: b.norm1.weight.requires_grad_(),
    "ls2.gamma trains": lambda b: b.ls2.gamma.requires_grad_(),
    "attn.proj.bias trains": lambda b: b.attn.proj.bias.requires_grad_(),
    "mlp.act has a hook": lambda b: b.mlp.act.register_forward_hook(lambda *_: None),
    "mlp.fc2 computes as 'reference'": set_reference,
    "mlp.act was GELU at conversion and is ReLU now": lambda b: setattr(b.mlp, "act", nn.ReLU()),
    "mlp.act.approximate was 'none' at conversion": lambda b: setattr(
        b.mlp.act, "approximate", "tanh"
    ),
    "attn.num_heads was 2 at conversion and is 4 now": lambda b: setattr(b.attn, "num_heads", 4),
    "drop_path1 was Identity at conversion": lambda b: setattr(
        b, "drop_path1", DropPath(0.5).eval()
    ),
    "mlp.fc1 has a forward of its own": lambda b: setattr(
        b.mlp.fc1, "forward", lambda x: x.new_ones(*x.shape[:-1], 64)
    ),
}


@pytest.mark.parametrize("reason", REASONS)
def test_runs_module_by_module_where_it_must(reason):
    model = fused()
    x = torch.randn(2, 7, 16)
    model(x).sum().backward()
    REASONS[reason](model[0])
    if reason.startswith("attn.num_heads"):
        model[0].attn.head_dim = 4
    assert model[0].unfused_reason().startswith(reason)
    plain = copy.deepcopy(model)
    plain[0].unfuse()
    assert torch.equal(model(x), plain(x))
    if "forward" in reason:
        return
    model.zero_grad()
    model(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    if "hook" not in reason:
        note = svf_fast.memory_report(model, x.shape)
        assert any(f"not fused: {reason}" in row.note for row in note.units)


def test_a_norm_that_trains_is_seen_in_the_next_pass():
    model = fused()
    x = torch.randn(2, 7, 16)
    fused_result = model(x)
    model[0].norm2.bias.requires_grad_(True)
    model(x).sum().backward()
    assert model[0].norm2.bias.grad.any()
    with torch.no_grad():
        assert model[0].unfused_reason() == ""
    model[0].norm2.bias.requires_grad_(False)
    with torch.no_grad():
        model[0].norm2.bias += 1
    assert not torch.equal(model(x), fused_result)
    compare(model, x)


def test_drop_path_is_fused_in_evaluation_alone():
    for kind in (Block, DinoBlock):
        model = fused(kind(drop_path=0.5))
        x = torch.randn(8, 7, 16)
        assert model[0].unfused_reason() == ""
        compare(model, x)
        model.train()
        assert model[0].unfused_reason()
        torch.manual_seed(0)
        drawn_result = model(x)
        plain = copy.deepcopy(model)
        plain[0].unfuse()
        torch.manual_seed(0)
        assert torch.equal(drawn_result, plain(x))
        model.eval()
        model[0].drop_path1.train()
        assert model[0].unfused_reason() == "drop_path1 is in another mode than the block"


def test_dropout_within_the_attention_is_drawn_as_it_was():
    model = fused(Block(attention_drop=0.4))
    plain = copy.deepcopy(model)
    plain[0].unfuse()
    x = torch.randn(2, 7, 16)
    torch.testing.assert_close(model(x), plain(x))
    model.train(), plain.train()
    assert model[0].unfused_reason() == ""
    torch.manual_seed(0)
    mine = model(x)
    torch.manual_seed(0)
    torch.testing.assert_close(mine, plain(x))
    torch.manual_seed(1)
    assert not torch.equal(model(x), mine)


def test_partly_converted_blocks_say_so():
    model = nn.Sequential(drawn(Block()), drawn(Block()))
    svf_fast.convert(model, ["*.attn.qkv"], progress=False)
    assert not any(isinstance(module, SVFTransformerBlock) for module in model)
    svf_fast.convert(model, ["1"], progress=False)
    assert isinstance(model[1], SVFTransformerBlock)
    notes = {unit.name: unit.note for unit in svf_fast.memory_report(model, (2, 7, 16)).units}
    assert "'attn.proj' is a Linear" in notes["0.attn.qkv"] or notes["0.attn.qkv"] == ""


def test_convert_warns_of_norms_that_train():
    model = nn.Sequential(drawn(Block()), drawn(Block()))
    model[1].norm1.weight.requires_grad_(True)
    with pytest.warns(UserWarning, match="of 1 of the 2 transformer blocks layer norms"):
        svf_fast.convert(model, None, progress=False)
    assert [block.unfused_reason() for block in model] == [
        "",
        "norm1.weight trains: call requires_grad_(False) on it",
    ]


def test_log_scale_trains():
    model = svf_fast.convert(
        nn.Sequential(drawn(Block())), None, progress=False, trains="log_scale"
    )
    with torch.no_grad():
        for layer in svf_layers(model).values():
            layer.log_scale.normal_(0, 0.1)
    compare(model, torch.randn(2, 7, 16))


@pytest.mark.parametrize("int8", (False, True))
def test_checkpointing_and_compile(int8):
    torch._dynamo.reset()
    model = fused(equal_spectra(Block()))
    model[0].keeps_int8 = int8
    x, grad = torch.randn(2, 7, 16), torch.randn(2, 7, 16)
    expected = step(model, x, grad)
    model.forward = lambda x: checkpoint(model[0], x, use_reentrant=False)
    for mine, plain in zip(step(model, x, grad), expected, strict=True):
        assert torch.equal(mine, plain)
    del model.forward
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for mine, eager in zip(step(compiled, x, grad), expected, strict=True):
        torch.testing.assert_close(mine, eager)


def test_data_parallel_replicas_and_threads_read_for_themselves():
    model = fused()
    x = torch.randn(2, 7, 16)
    model(x)
    replica = model[0]._replicate_for_data_parallel()
    assert "_reading" not in replica.__dict__


@pytest.mark.parametrize("name", ("timm", "DINOv2"))
def test_exported_on_shapes_and_in_inference(name):
    model, x = fused(name), torch.randn(2, 7, 16)
    expected = model(x)
    assert torch.equal(torch.export.export(model, (x,)).module()(x), expected)
    assert copy.deepcopy(model).to("meta")(x.to("meta")).shape == x.shape
    with torch.inference_mode():
        assert torch.equal(model(x), expected)


def test_transforms_of_torch_func_run_as_the_paper_has_it():
    model, x = fused().double(), torch.randn(2, 7, 16).double()
    (expected,) = torch.autograd.grad(model(y := x.clone().requires_grad_()).sum(), y)
    with pytest.raises(RuntimeError, match="no transform of torch.func"):
        torch.func.grad(lambda x: model(x).sum())(x)
    reference = as_reference(model)
    torch.testing.assert_close(torch.func.grad(lambda x: reference(x).sum())(x), expected)


def test_a_block_used_twice():
    block = drawn(BLOCKS["timm"]())
    plain = nn.Sequential(block, block)
    x = torch.randn(2, 7, 16)
    expected = plain(x)
    model = svf_fast.convert(plain, None, progress=False)
    assert model[0] is model[1] and isinstance(model[0], SVFTransformerBlock)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


class Pooling(nn.Module):
    def __init__(self, channels, width=None):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.qkv, self.proj = (
            nn.Linear(channels, 3 * channels),
            nn.Linear(channels, width or channels),
        )
        self.fc1, self.fc2 = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.pools = width is None

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        attended = functional.scaled_dot_product_attention(q, k, v)
        if self.pools:
            attended = attended.mean(dim=-2, keepdim=True)
        x = x + self.proj(attended)
        return x + self.fc2(functional.gelu(self.fc1(self.norm2(x))))


@pytest.mark.parametrize("width", (None, 1), ids=("fewer tokens", "fewer channels"))
def test_a_branch_that_is_broadcast(width):
    """In the sum; its gradient is one of fewer numbers."""
    model = svf_fast.convert(nn.Sequential(drawn(Pooling(16, width))), None, progress=False)
    compare(model, torch.randn(2, 7, 16))


def test_a_method_replaced_on_the_block_or_in_it():
    model = fused()
    x = torch.randn(2, 7, 16)
    before = model(x)
    assert model[0].unfused_reason() == ""
    model[0].attn.forward_features = lambda x: x  # of no method: nothing runs it
    assert torch.equal(model(x), before)
    model[0].mlp.forward = types.MethodType(lambda self, x: 0 * x, model[0].mlp)
    assert "forward of its own" in model[0].unfused_reason()
    del model[0].mlp.forward
    kind = type(model[0]).original
    kind.halved = lambda self, x: x
    try:
        model = fused()
        model(x)
        model[0].halved = lambda x: x / 2  # one that its forward might call
        assert "halved is not what it was at conversion" in model[0].unfused_reason()
        model(x)
    finally:
        del kind.halved
