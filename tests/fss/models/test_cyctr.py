"""CyCTR: tokens drawn by the episode alone, both attentions against loops, files of its authors."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional

from fss.config import ModelConfig, OptimizerConfig
from fss.models import build_backbone, build_model
from fss.models.cyctr import CyCTR, _with_both
from fss.models.cyctr_transformer import (
    CycleAttention,
    CycleTransformer,
    DeformableAttention,
    sine_position,
)
from fss.models.loss import dice
from fss.models.official import load_official
from fss.models.random_numbers import random_numbers
from fss.models.token_sampling import TOKENS, Drawn, draw_tokens
from fss.training.optimizer import build_optimizer, build_scheduler


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def small(dropout: float = 0.0) -> CyCTR:
    backbone = build_backbone("resnet18", width=4, late_dilation=True)
    model = CyCTR(backbone, channels=8, dropout=dropout)
    for name, parameter in model.named_parameters():  # which begin blind to the tokens
        if name.endswith(("offsets.weight", "self_attention.weights.weight")):
            nn.init.normal_(parameter, std=0.3)
    return model.double()


def episodes(batch: int = 2, shots: int = 1, size: int = 41) -> dict[str, torch.Tensor]:
    images = torch.randn(batch, 1 + shots, 3, size, size, dtype=torch.float64)
    masks = (torch.rand(batch, 1 + shots, size // 8 + 1, size // 8 + 1) > 0.6).long()
    masks = masks.repeat_interleave(8, 2).repeat_interleave(8, 3)[..., :size, :size]
    padding = torch.zeros(batch, size, size, dtype=torch.bool)
    padding[:, -9:] = True
    masks[:, :, -9:] = 255
    return {
        "query_image": images[:, 0],
        "support_images": images[:, 1:].contiguous(),
        "support_masks": masks[:, 1:].contiguous(),
        "query_mask": masks[:, 0].contiguous(),
        "sampling": torch.arange(batch) + 11,
        "query_padding": padding,
    }


def logits(model: CyCTR, batch: dict[str, torch.Tensor], **changes: object) -> torch.Tensor:
    batch = batch | changes
    return model(*(batch[name] for name in model.inputs)).logits


# random numbers and draws


def test_random_numbers_are_splitmix64s():
    """The published test vector of seed 1234567, and 64-bit arithmetic of Python's integers."""
    numbers = random_numbers(torch.tensor([1234567, 0]), 0, 3)
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [n % 2**64 for n in numbers[0].tolist()] == published

    def number(seed: int, place: int) -> int:
        z = (seed + (place + 1) * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    found = random_numbers(torch.tensor([2**62 + 5]), 3, 4)[0].tolist()
    assert [n % 2**64 for n in found] == [number(2**62 + 5, (3 << 32) + n) for n in range(4)]


def place_of(kind: torch.Tensor, index: int) -> int:
    return int((kind[:index] == kind[index]).sum())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("shots", "objects"), [(1, 100), (1, 500), (1, 900), (2, 700), (1, 5)])
def test_a_draw_against_loops(shots, objects, training):
    """As the published code: what it draws, and for what it takes what it drew."""
    generator = torch.Generator().manual_seed(objects)
    count = 1000 * shots
    foreground = torch.zeros(2, count, dtype=torch.bool)
    for row in foreground:
        row[torch.randperm(count, generator=generator)[:objects]] = True
    padded = torch.rand(2, count, generator=generator) < 0.3
    seeds = torch.tensor([5, 6])
    for layer in (0, 1):
        drawn = draw_tokens(seeds, layer, foreground, padded, shots, training)
        keys = random_numbers(seeds, 2 * layer, count)
        for b in range(2):
            wanted = TOKENS * shots
            if training:
                low, high = (0.6, 4.0) if shots == 1 else (0.6, 1.4)
                bits = random_numbers(seeds, 2 * layer + 1, 1)[b].item() % 2**64
                wanted = math.floor(wanted * (low + (high - low) * (bits >> 40) / 2**24) + 1e-9)
            kinds = {
                kind: sorted(
                    (n for n in range(count) if foreground[b, n] == kind),
                    key=lambda n: keys[b, n].item(),
                )
                for kind in (True, False)
            }
            few, rest = len(kinds[True]) < wanted, len(kinds[False]) < wanted
            if few:
                chosen = kinds[True] + kinds[False][: 2 * wanted - len(kinds[True])]
            elif rest:
                chosen = kinds[True][: 2 * wanted - len(kinds[False])] + kinds[False]
            else:
                chosen = kinds[True][:wanted] + kinds[False][:wanted]
            valid = torch.ones_like(drawn.index[b]).bool() if not training else drawn.valid[b]
            assert sorted(drawn.index[b][valid].tolist()) == sorted(chosen)
            for n, one, other in zip(
                drawn.index[b][valid].tolist(), drawn.foreground[b], drawn.padded[b]
            ):
                own = few if foreground[b, n] else not few and rest
                place = n if own else place_of(foreground[b], n)
                assert one == foreground[b, place] and other == padded[b, place]
    most = 600 * shots * ((4 if shots == 1 else 1.4) if training else 1)
    assert drawn.index.shape[1] == min(count, most)


def test_factors_of_a_training_draw():
    """From 0.6 to 4.0, spread evenly, of their own in each layer."""
    seeds = torch.arange(4000)
    few = torch.zeros(4000, 2, dtype=torch.bool)
    few[:, 0] = True
    layers = []
    for layer in (0, 1):
        numbers = random_numbers(seeds, 2 * layer + 1, 1)
        layers.append(0.6 + 3.4 * ((numbers >> 40) & (2**24 - 1)).double() / 2**24)
        assert layers[-1].min() < 0.61 and layers[-1].max() > 3.99
        assert layers[-1].mean() == pytest.approx(2.3, abs=0.06)
    assert (layers[0] != layers[1]).all()


@pytest.mark.parametrize("training", [False, True])
def test_a_prediction_depends_on_the_episode_alone(training):
    """Two together are each alone; the same again; another number draws other tokens."""
    model, batch = small().train(training), episodes(size=217)
    together = logits(model, batch)
    state = torch.random.get_rng_state()
    assert torch.equal(logits(model, batch), together)
    assert torch.equal(torch.random.get_rng_state(), state)
    for b in range(2):
        alone = logits(model, {name: value[b : b + 1] for name, value in batch.items()})
        torch.testing.assert_close(alone, together[b : b + 1], rtol=1e-10, atol=1e-10)
    other = logits(model, batch, sampling=torch.tensor([11, 5]))
    torch.testing.assert_close(other[:1], together[:1], rtol=1e-10, atol=1e-10)
    assert (other[1] - together[1]).abs().max() > 1e-6


def test_no_number_is_zero():
    model, batch = small().eval(), episodes(size=217)
    zero = logits(model, batch, sampling=torch.zeros(2, dtype=torch.int64))
    assert torch.equal(logits(model, batch, sampling=None), zero)
    supports = [
        model.encode_supports(batch["support_images"][b], batch["support_masks"][b])
        for b in range(2)
    ]
    padding = batch["query_padding"]
    for b in range(2):
        one = model.segment(
            batch["query_image"][b : b + 1], supports[b], None, None, padding[b : b + 1]
        )
        torch.testing.assert_close(one, zero[b : b + 1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shots", [1, 5])
def test_layers_share_a_draw_only_in_tests(monkeypatch, shots):
    calls = Counter()

    def counted(seeds, layer, *rest):
        calls[layer] += 1
        return draw_tokens(seeds, layer, *rest)

    monkeypatch.setattr("fss.models.cyctr_transformer.draw_tokens", counted)
    model, batch = small(), episodes(shots=shots)
    logits(model.eval(), batch)
    assert calls == {0: 1}
    logits(model.train(), batch)
    assert calls == {0: 2, 1: 1}


# attention


def bilinear(plane: torch.Tensor, x: float, y: float) -> torch.Tensor:
    """The value of a map [h, w, d] at a point, pixel (0, 0) being at x = y = 0; 0 outside."""
    total = torch.zeros_like(plane[0, 0])
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < plane.shape[0] and 0 <= column < plane.shape[1]:
                share = (1 - abs(y - row)) * (1 - abs(x - column))
                total = total + share * plane[row, column]
    return total


@torch.no_grad()
def test_deformable_attention_against_loops():
    heads, points, height, width = 4, 9, 4, 5
    attention = DeformableAttention(8, heads, points).double().eval()
    for name in ("offsets", "weights"):
        nn.init.normal_(getattr(attention, name).weight, std=0.4)
    tokens, position = torch.randn(2, 2, height * width, 8, dtype=torch.float64).unbind(0)
    padded = torch.rand(2, height * width) < 0.2
    found = attention(tokens, position, padded, (height, width))
    for b in range(2):
        values = attention.values(tokens[b])
        values[padded[b]] = 0
        planes = values.reshape(height, width, heads, 2)
        for n in range(height * width):
            placed = (tokens + position)[b, n]
            offsets = attention.offsets(placed).reshape(heads, points, 2).tolist()
            weights = attention.weights(placed).reshape(heads, points).softmax(1)
            seen = [
                sum(
                    weights[h, p] * bilinear(planes[:, :, h], n % width + x, n // width + y)
                    for p, (x, y) in enumerate(offsets[h])
                )
                for h in range(heads)
            ]
            expected = attention.project(torch.cat(seen))
            torch.testing.assert_close(found[b, n], expected, rtol=1e-9, atol=1e-9)


def test_points_begin_around_the_token():
    """Head n of 8 looks in direction n·45°, 1 to 9 pixels away along the longer axis."""
    bias = DeformableAttention(16, 8).offsets.bias.unflatten(0, (8, 9, 2))
    torch.testing.assert_close(bias[2, 4], torch.tensor([0.0, 5.0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(bias[3, 8], torch.tensor([-9.0, 9.0]))
    assert bias.abs().amax(dim=2).tolist() == [[pytest.approx(n) for n in range(1, 10)]] * 8


@torch.no_grad()
def test_cycle_attention_against_loops():
    """Inconsistent and padded tokens weigh nothing, nor do places that no token was drawn for."""
    heads, queries, count = 2, 7, 12
    attention = CycleAttention(8, heads).double().eval()
    tokens, supports = torch.randn(2, queries, 8), torch.randn(2, count, 8)
    tokens, supports = tokens.double(), supports.double()
    foreground = torch.rand(2, count) < 0.5
    padded, valid = torch.rand(2, count) < 0.2, torch.ones(2, count, dtype=torch.bool)
    valid[:, -3:] = False
    supports[:, -3:] *= 50  # which would win each comparison
    drawn = Drawn(torch.arange(count).expand(2, -1), foreground, padded, valid)
    found = attention(tokens, supports, drawn)
    inconsistent = 0
    for b in range(2):
        out = []
        for h in range(heads):
            part = slice(4 * h, 4 * h + 4)
            query, key, value = (
                linear(x[b])[:, part]
                for linear, x in (
                    (attention.query, tokens),
                    (attention.key, supports),
                    (attention.value, supports),
                )
            )
            scores = query[:, None].mul(key[None]).sum(2)[:, :-3] / math.sqrt(4)
            seen = []
            for j in range(count - 3):
                nearest = max(range(queries), key=lambda i: scores[i, j])
                back = max(range(count - 3), key=lambda k: scores[nearest, k])
                inconsistent += bool(foreground[b, back] != foreground[b, j])
                if foreground[b, back] == foreground[b, j] and not padded[b, j]:
                    seen.append(j)
            assert seen
            out.append(scores[:, seen].softmax(1) @ value[seen])
        expected = attention.project(torch.cat(out, dim=1))
        torch.testing.assert_close(found[b], expected, rtol=1e-9, atol=1e-9)
    assert inconsistent > 2


def test_where_all_tokens_are_hidden_all_are_seen():
    attention = CycleAttention(8, 2).double().eval()
    tokens, supports = torch.randn(2, 1, 5, 8, dtype=torch.float64).unbind(0)
    kinds = torch.tensor([[True, True, False, False, True]])
    seen = [
        attention(tokens, supports, Drawn(torch.arange(5)[None], kinds & False, hidden, None))
        for hidden in (torch.ones_like(kinds), torch.zeros_like(kinds))
    ]
    torch.testing.assert_close(*seen, rtol=1e-9, atol=1e-9)


def test_what_the_training_draws_leave_out_changes_nothing():
    """Tokens beyond the drawn number have no gradient."""
    transformer = CycleTransformer(8, dropout=0.0, depth=1).double().train()
    seed = next(n for n in range(99) if _wanted_of(n) < 300)
    query, supports = torch.randn(1, 8, 4, 4).double(), torch.randn(1, 1, 8, 40, 40).double()
    supports.requires_grad_()
    foreground = torch.rand(1, 1, 40, 40) < 0.5
    nothing = torch.zeros(1, 1, 40, 40, dtype=torch.bool)
    out = transformer(
        query, nothing[0, :, :4, :4], supports, foreground, nothing, torch.tensor([seed])
    )
    (gradient,) = torch.autograd.grad(out.square().sum(), supports)
    touched = gradient.abs().sum(2).flatten().nonzero().flatten()
    drawn = draw_tokens(torch.tensor([seed]), 0, foreground.flatten(1), nothing.flatten(1), 1, True)
    assert set(touched.tolist()) <= set(drawn.index[drawn.valid].tolist())
    assert 0 < len(touched) <= 600 < drawn.index.shape[1]


def _wanted_of(seed: int) -> int:
    half = torch.arange(4800)[None] < 2400
    drawn = draw_tokens(torch.tensor([seed]), 0, half, ~half, 1, True)
    return int(drawn.valid.sum()) // 2


@pytest.mark.parametrize("channels", [8, 24])
def test_positions_against_loops(channels):
    """DETR's, over what is not padding; rows first."""
    padding = torch.zeros(1, 3, 4, dtype=torch.bool)
    padding[:, 2], padding[:, :, 3] = True, True
    found = sine_position(padding, channels).reshape(3, 4, channels)
    half = channels // 2
    for y in range(2):
        for x in range(3):
            for start, number, last in ((0, y + 1, 2), (half, x + 1, 3)):
                for k in range(half):
                    angle = 2 * math.pi * number / (last + 1e-6) / 10000 ** (k // 2 * 2 / half)
                    expected = math.cos(angle) if k % 2 else math.sin(angle)
                    assert found[y, x, start + k].item() == pytest.approx(expected, abs=1e-5)


def test_heads_share_the_channels():
    assert CycleTransformer(24).layers[0].cross_attention.heads == 12
    assert CycleTransformer(16).layers[0].self_attention.heads == 8
    with pytest.raises(ValueError, match="channels: expected a multiple of 8 or 12.*got 20"):
        CyCTR(build_backbone("resnet18", width=2), channels=20)


# the model


def test_masks_without_object_or_rest():
    nothing, everything = torch.zeros(1, 6, 7).bool(), torch.ones(1, 6, 7).bool()
    assert _with_both(nothing)[0].nonzero().tolist() == [[2, 2], [2, 3], [3, 2], [3, 3]]
    assert (~_with_both(everything))[0].nonzero().tolist() == [[0, 0], [0, 6], [5, 0], [5, 6]]
    some = torch.eye(6).bool()[None]
    assert torch.equal(_with_both(some), some)


def test_the_canvas_of_the_query_is_not_looked_at():
    """Values of padded tokens are 0, and positions count what is not padding."""
    model, batch = small().eval(), episodes()
    unpadded = logits(model, batch, query_padding=None)
    nothing = torch.zeros_like(batch["query_padding"])
    assert torch.equal(logits(model, batch, query_padding=nothing), unpadded)
    assert (logits(model, batch) - unpadded).abs().max() > 1e-6


def test_the_prior_is_of_the_whole_support_masked_afterwards():
    model, batch = small().eval(), episodes(batch=1)
    features = model.features(*(batch[name] for name in model.inputs[:3]))
    high = model.backbone(batch["support_images"][0])
    mask = (batch["support_masks"][0] == 1).double()[:, None]
    mask = functional.interpolate(mask, high.shape[2:], mode="bilinear", align_corners=True)
    keys = (high * mask)[0].flatten(1)
    query = model.backbone(batch["query_image"])[0].flatten(1)
    scores = (query.T @ keys) / (query.norm(dim=0)[:, None] * keys.norm(dim=0) + 1e-7)
    best = scores.amax(dim=1)
    expected = (best - best.min()) / (best.max() - best.min() + 1e-7)
    torch.testing.assert_close(features.priors.flatten(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shots", [1, 3])
def test_the_way_back_is_of_training_alone(shots):
    model, batch = small(), episodes(shots=shots)
    inputs = [batch[name] for name in model.inputs]
    assert model.eval()(*inputs).auxiliary == ()
    assert torch.equal(model(*inputs[:3], None, *inputs[4:]).logits, model(*inputs).logits)
    prediction = model.train()(*inputs)
    (back,) = prediction.auxiliary
    assert back.shape == (2 * shots, 2, 6, 6)
    with pytest.raises(
        TypeError, match=r"query_mask: expected uint8 or int64 \[2, 41, 41\], got N"
    ):
        model(*inputs[:3])
    loss = model.loss(prediction, batch["query_mask"], batch["support_masks"])
    main = model.loss(prediction._replace(auxiliary=()), batch["query_mask"], None)
    each = back.unflatten(0, (2, shots)).unbind(1)
    parts = [dice(one, mask) for one, mask in zip(each, batch["support_masks"].unbind(1))]
    torch.testing.assert_close(loss, main + sum(parts) / shots)
    other = logits(model, batch)
    changed = model(*inputs[:3], 1 - batch["query_mask"].clamp(max=1), *inputs[4:])
    assert torch.equal(changed.logits, other)
    assert (changed.auxiliary[0] - back).abs().max() > 1e-6


def test_inputs_are_checked():
    model, batch = small().eval(), episodes()
    for name, wrong, error, message in (
        ("sampling", torch.zeros(2), TypeError, r"sampling: expected int64 \[2\], got torch.flo"),
        ("sampling", torch.zeros(3).long(), ValueError, r"expected \[2\] on cpu, got \[3\] on cpu"),
        ("query_padding", batch["query_mask"], TypeError, "query_padding: expected bool"),
        ("query_padding", torch.zeros(2, 6, 6).bool(), ValueError, r"\[2, 41, 41\] on cpu, got"),
    ):
        with pytest.raises(error, match=message):
            logits(model, batch, **{name: wrong})
    model.train()
    prediction = model(*(batch[name] for name in model.inputs))
    with pytest.raises(ValueError, match=r"support_masks: expected \[2, 41, 41\]"):
        model.loss(prediction, batch["query_mask"], batch["support_masks"][..., :9])


def test_dice_against_loops():
    """Ignored pixels are pushed to neither; of weights only the ratio counts."""
    scores = torch.randn(2, 2, 3, 4, dtype=torch.float64)
    mask = torch.randint(0, 2, (2, 3, 4))
    mask[:, 0] = 255
    losses = torch.zeros(2, dtype=torch.float64)
    for channel in (0, 1):
        for b in range(2):
            both = sums = 0.0
            for value, label in zip(scores[b, channel].flatten(), mask[b].flatten()):
                p, t = 1 / (1 + math.exp(-value)), float(label == channel)
                both, sums = both + p * t, sums + p * p + t
            losses[channel] += (1 - 2 * both / sums) / 2
    assert dice(scores, mask).item() == pytest.approx(losses.sum().item(), rel=1e-9)
    weight = torch.tensor([1.0, 3.0])
    weighted = (losses * torch.tensor([0.5, 1.5])).sum().item()
    assert dice(scores, mask, weight).item() == pytest.approx(weighted, rel=1e-9)
    scores.requires_grad_()
    dice(scores, mask).backward()
    assert (scores.grad[:, :, 0] > 0).all()  # less is better, in both channels


def test_the_transformer_has_its_own_optimizer():
    model = small()
    config = OptimizerConfig(
        lr=0.0025, lr_factor=15, schedule="poly", transformer_lr=1e-4,
        transformer_schedule="constant",
    )  # fmt: skip
    optimizer = build_optimizer(model, config)
    scheduler = build_scheduler(optimizer, config, 100)
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert groups["head"]["lr"] == pytest.approx(0.0375)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decaying = [names[id(p)] for p in groups["transformer"]["params"]]
    assert "cycle_transformer.level" in decaying
    assert "cycle_transformer.layers.1.norms.3.weight" in decaying
    assert groups["transformer"]["weight_decay"] == 0.01
    biases = [names[id(p)] for p in groups["transformer biases"]["params"]]
    assert len(biases) == 2 * (4 + 2) and all(name.endswith("bias") for name in biases)
    assert groups["transformer biases"]["weight_decay"] == 0
    others = [names[id(p)] for p in groups["head"]["params"]]
    assert others and not any("cycle_transformer" in name for name in others)
    for _ in range(50):
        optimizer.step()
        scheduler.step()
    assert groups["head"]["lr"] == pytest.approx(0.0375 * 0.5**0.9)
    assert groups["transformer"]["lr"] == 1e-4


# the authors' files


def _shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published ResNet-50 model, without `module.`."""
    shapes: dict[str, tuple[int, ...]] = {}

    def norm(name: str, width: int) -> None:
        for tensor in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"backbone.body.{name}.{tensor}"] = (width,)

    for n, (out, into) in enumerate(((64, 3), (64, 64), (128, 64)), 1):
        shapes[f"backbone.body.conv{n}.weight"] = (out, into, 3, 3)
        norm(f"bn{n}", out)
    into = 128
    for n, (depth, width) in enumerate(zip((3, 4, 6, 3), (64, 128, 256, 512)), 1):
        for block in range(depth):
            name = f"layer{n}.{block}"
            convs = {
                "conv1": (width, into, 1, 1),
                "conv2": (width, width, 3, 3),
                "conv3": (4 * width, width, 1, 1),
            }
            if block == 0:
                convs["downsample.0"] = (4 * width, into, 1, 1)
            for conv, shape in convs.items():
                shapes[f"backbone.body.{name}.{conv}.weight"] = shape
                batch_norm = "downsample.1" if "down" in conv else conv.replace("conv", "bn")
                norm(f"{name}.{batch_norm}", shape[0])
            into = 4 * width
    for name, width in {
        "adjust_feature_supp.0": 1536,
        "adjust_feature_qry.0": 1536,
        "qry_merge_feat.0": 513,
        "supp_merge_feat.0": 512,
        "addtional_proj.0": 256,
        "addtional_proj.2": 256,
        "merge_multi_lvl_reduce.0": 256,
        "pred_supp_qry_proj.0": 256,
        "supp_init_merge.0": 512,
    }.items():
        shapes[f"{name}.weight"] = (256, width, 1, 1)
    for name in ("merge_multi_lvl_sum", "supp_beta_conv"):
        shapes |= {f"{name}.{n}.weight": (256, 256, 3, 3) for n in (0, 2)}
    for name in ("cls", "supp_cls"):
        shapes[f"{name}.0.weight"] = (256, 256, 3, 3)
        shapes |= {f"{name}.3.weight": (2, 256, 1, 1), f"{name}.3.bias": (2,)}
    shapes["transformer.level_embed"] = (1, 256)
    for n in range(2):
        for name in ("q_fc", "k_fc", "v_fc", "proj"):
            shapes[f"transformer.cross_layers.{n}.{name}.weight"] = (256, 256)
        own = f"transformer.qry_self_layers.{n}"
        for name, width in (("sampling_offsets", 144), ("attention_weights", 72)):
            shapes |= {f"{own}.{name}.weight": (width, 256), f"{own}.{name}.bias": (width,)}
        shapes |= {f"{own}.{name}_proj.weight": (256, 256) for name in ("value", "output")}
    for n in range(8):
        shapes |= {f"transformer.layer_norms.{n}.{t}": (256,) for t in ("weight", "bias")}
    for n in range(4):
        shapes[f"transformer.ffns.{n}.layers.0.0.weight"] = (768, 256)
        shapes[f"transformer.ffns.{n}.layers.1.weight"] = (256, 768)
    return shapes


def test_a_checkpoint_of_the_authors(tmp_path):
    shapes = _shapes()
    head = {name: shape for name, shape in shapes.items() if not name.startswith("backbone")}
    assert sum(math.prod(shape) for shape in head.values()) == 7_456_692
    # each tensor has a value of its own
    state = {f"module.{k}": torch.full(s, float(n)) for n, (k, s) in enumerate(shapes.items())}
    torch.save({"epoch": 3, "state_dict": state, "optimizer": {"state": {}}}, tmp_path / "x.pth")
    config = ModelConfig(name="cyctr", stem="deep", official=str(tmp_path / "x.pth"))
    model = build_model(config)
    own = model.state_dict()
    places = {name: n for n, name in enumerate(shapes)}

    def value(name: str) -> float:
        (number,) = own[name].unique().tolist()
        return number

    layers = "cycle_transformer.layers"
    for ours, theirs in {
        "backbone.layer3.5.conv2.weight": "backbone.body.layer3.5.conv2.weight",
        "backbone.bn3.running_var": "backbone.body.bn3.running_var",
        "query_reduce.0.weight": "adjust_feature_qry.0.weight",
        "support_merge.0.weight": "supp_merge_feat.0.weight",
        f"{layers}.0.self_attention.offsets.bias": (
            "transformer.qry_self_layers.0.sampling_offsets.bias"
        ),
        f"{layers}.1.cross_attention.key.weight": "transformer.cross_layers.1.k_fc.weight",
        f"{layers}.1.cross_attention.project.weight": "transformer.cross_layers.1.proj.weight",
        f"{layers}.1.norms.2.weight": "transformer.layer_norms.6.weight",
        f"{layers}.1.feed_forward.0.3.weight": "transformer.ffns.2.layers.1.weight",
        "cycle_transformer.level": "transformer.level_embed",
        "back_classifier.3.bias": "supp_cls.3.bias",
    }.items():
        assert value(ours) == places[theirs], ours
    kept = [value(k) for k in own if not k.endswith("num_batches_tracked")]
    unused = [n for name, n in places.items() if name.startswith("addtional_proj.")]
    assert sorted([*kept, *unused]) == list(range(len(shapes)))

    dilations = [
        [block.conv2.dilation[0] for block in layer]
        for layer in (model.backbone.layer3, model.backbone.layer4)
    ]
    assert dilations == [[1, 2, 2, 2, 2, 2], [2, 4, 4]]

    del state["module.supp_beta_conv.2.weight"]
    torch.save({"state_dict": state}, tmp_path / "y.pth")
    with pytest.raises(ValueError, match="1 missing: supp_beta_conv.2.weight"):
        load_official(model, str(tmp_path / "y.pth"))
