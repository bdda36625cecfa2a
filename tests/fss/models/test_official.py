"""The authors' checkpoints: synthetic state dicts of their names and shapes, and a small functional
forward written from the papers and from facts about the published code, straight on such a dict."""

import pytest
import torch
from torch.nn import functional as F

from fss.config import DataConfig, ModelConfig, RegimeConfig, TrainConfig
from fss.models import BAM, PFENet, PSPNet, build_backbone, build_model, load_backbone
from fss.models.official import load_base_learner, load_official, official_keys
from fss.models.regimes import apply_regime
from svf_fast.layers.factored import svf_layers

VGG_LAYERS = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))


def _conv(shapes, name, out, into, kernel, bias=False):
    shapes[f"{name}.weight"] = (out, into, kernel, kernel)
    if bias:
        shapes[f"{name}.bias"] = (out,)


def _bn(shapes, name, channels):
    for tensor in ("weight", "bias", "running_mean", "running_var"):
        shapes[f"{name}.{tensor}"] = (channels,)
    shapes[f"{name}.num_batches_tracked"] = ()


def _resnet50_shapes():
    shapes = {}
    for i, (out, into) in zip((0, 3, 6), ((64, 3), (64, 64), (128, 64))):
        _conv(shapes, f"layer0.{i}", out, into, 3)
        _bn(shapes, f"layer0.{i + 1}", out)
    into = 128
    for n, (depth, width) in enumerate(zip((3, 4, 6, 3), (64, 128, 256, 512)), 1):
        for block in range(depth):
            name = f"layer{n}.{block}"
            for i, (o, c, k) in enumerate(
                ((width, into, 1), (width, width, 3), (4 * width, width, 1)), 1
            ):
                _conv(shapes, f"{name}.conv{i}", o, c, k)
                _bn(shapes, f"{name}.bn{i}", o)
            if block == 0:
                _conv(shapes, f"{name}.downsample.0", 4 * width, into, 1)
                _bn(shapes, f"{name}.downsample.1", 4 * width)
            into = 4 * width
    return shapes


def _vgg_shapes():
    shapes, into = {}, 3
    for n, (depth, width) in enumerate(VGG_LAYERS):
        # a layer begins with convolution 0; the max-pool is the last of each but layer 4
        for i in range(depth):
            _conv(shapes, f"layer{n}.{3 * i}", width, into, 3, bias=True)
            _bn(shapes, f"layer{n}.{3 * i + 1}", width)
            into = width
    return shapes


def _head(shapes, name, channels=256, classes=2):
    _conv(shapes, f"{name}.0", channels, channels, 3)
    _conv(shapes, f"{name}.3", classes, channels, 1, bias=True)


def _reductions(shapes, vgg):
    for name in ("down_query", "down_supp"):
        _conv(shapes, f"{name}.0", 256, 768 if vgg else 1536, 1)


def _pfenet_shapes(vgg):
    shapes = _vgg_shapes() if vgg else _resnet50_shapes()
    _head(shapes, "cls")
    _reductions(shapes, vgg)
    for n in range(4):
        _conv(shapes, f"init_merge.{n}.0", 256, 513, 1)
        _conv(shapes, f"beta_conv.{n}.0", 256, 256, 3)
        _conv(shapes, f"beta_conv.{n}.2", 256, 256, 3)
        _head(shapes, f"inner_cls.{n}")
        if n < 3:
            _conv(shapes, f"alpha_conv.{n}.0", 256, 512, 1)
    _conv(shapes, "res1.0", 256, 1024, 1)
    _conv(shapes, "res2.0", 256, 256, 3)
    _conv(shapes, "res2.2", 256, 256, 3)
    return shapes


def _base_shapes(shapes, vgg, ppm, cls, classes=16):
    channels = 512 if vgg else 2048
    for n in range(4):
        _conv(shapes, f"{ppm}.features.{n}.1", channels // 4, channels, 1)
        _bn(shapes, f"{ppm}.features.{n}.2", channels // 4)
    _conv(shapes, f"{cls}.0", 512, 2 * channels, 3)
    _bn(shapes, f"{cls}.1", 512)
    _conv(shapes, f"{cls}.4", classes, 512, 1, bias=True)


def _bam_shapes(vgg, shots):
    shapes = _vgg_shapes() if vgg else _resnet50_shapes()
    _base_shapes(shapes, vgg, "learner_base.0", "learner_base.1")
    _reductions(shapes, vgg)
    _conv(shapes, "init_merge.0", 256, 513, 1)
    for n in range(5):
        _conv(shapes, f"ASPP_meta.layer6_{n}.0", 256, 256, 1 if n < 2 else 3, bias=True)
    _conv(shapes, "res1_meta.0", 256, 1280, 1)
    _conv(shapes, "res2_meta.0", 256, 256, 3)
    _conv(shapes, "res2_meta.2", 256, 256, 3)
    _head(shapes, "cls_meta")
    _conv(shapes, "gram_merge", 1, 2, 1)
    _conv(shapes, "cls_merge", 1, 2, 1)
    if shots > 1:
        _conv(shapes, "kshot_rw.0", 2, shots, 1, bias=True)
        _conv(shapes, "kshot_rw.2", shots, 2, 1, bias=True)
    return shapes


def _pspnet_shapes(vgg):
    layers = _vgg_shapes() if vgg else _resnet50_shapes()
    shapes = dict(layers)
    shapes |= {f"encoder.{key.removeprefix('layer')}": shape for key, shape in layers.items()}
    _base_shapes(shapes, vgg, "ppm", "cls")
    return shapes


def _state(shapes, seed=0):
    """Random tensors that keep the scale of what passes through them."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        if key.startswith("encoder."):
            state[key] = state[f"layer{key.removeprefix('encoder.')}"]
        elif key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(7)
        elif key.endswith("running_var"):
            state[key] = 0.5 + values.abs()
        elif len(shape) == 4 and "merge.weight" not in key:
            state[key] = values * (2 / (shape[1] * shape[2] * shape[3])) ** 0.5
        elif len(shape) == 4:
            state[key] = torch.tensor([0.9, 0.3]).reshape(shape) + 0.1 * values
        else:
            state[key] = 1 + 0.2 * values if key.endswith("weight") else 0.1 * values
    return state


class Theirs:
    """Forward of PFENet and BAM on a state dict with the authors' names; float64, in evaluation."""

    def __init__(self, state, vgg):
        self.state = {key: value.double() for key, value in state.items()}
        self.vgg = vgg

    def conv(self, name, x, **options):
        return F.conv2d(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"), **options)

    def bn(self, name, x):
        mean, var, weight, bias = (
            self.state[f"{name}.{t}"] for t in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, var, weight, bias, False, eps=1e-5)

    def layer(self, n, x):
        if self.vgg:
            for i in range(VGG_LAYERS[n][0]):
                name = f"layer{n}."
                x = self.bn(f"{name}{3 * i + 1}", self.conv(f"{name}{3 * i}", x, padding=1)).relu()
            return F.max_pool2d(x, 2, ceil_mode=True) if n < 4 else x
        if n == 0:
            for i, stride in ((0, 2), (3, 1), (6, 1)):
                x = self.conv(f"layer0.{i}", x, stride=stride, padding=1)
                x = self.bn(f"layer0.{i + 1}", x).relu()
            return F.max_pool2d(x, 3, 2, 1)
        dilation = {3: 2, 4: 4}.get(n, 1)
        for block in range({1: 3, 2: 4, 3: 6, 4: 3}[n]):
            name, stride = f"layer{n}.{block}", 2 if (n, block) == (2, 0) else 1
            y = self.bn(f"{name}.bn1", self.conv(f"{name}.conv1", x)).relu()
            y = self.conv(f"{name}.conv2", y, stride=stride, padding=dilation, dilation=dilation)
            y = self.bn(f"{name}.bn3", self.conv(f"{name}.conv3", self.bn(f"{name}.bn2", y).relu()))
            if block == 0:
                x = self.conv(f"{name}.downsample.0", x, stride=stride)
                x = self.bn(f"{name}.downsample.1", x)
            x = (x + y).relu()
        return x

    def layers23(self, images):
        x = images
        for n in range(3):
            x = self.layer(n, x)
        layer3 = self.layer(3, x)
        return _up(x, layer3.shape[2:]), layer3

    def episode(self, query, supports, masks):
        """Features, and prototype, prior and low-level support map of each shot."""
        low, middle = self.layers23(query)
        high = self.layer(4, middle)
        reduced = self.conv("down_query.0", torch.cat([middle, low], 1)).relu()
        shots = []
        for k in range(supports.shape[1]):
            s_low, s_middle = self.layers23(supports[:, k])
            mask = _up((masks[:, k] == 1).double()[:, None], s_middle.shape[2:])
            s = self.conv("down_supp.0", torch.cat([s_middle, s_low], 1)).relu()
            prototype = (s * mask).sum((2, 3), True) / (mask.sum((2, 3), True) + 0.0005)
            a, b = high.flatten(2), (self.layer(4, s_middle * mask) * mask).flatten(2)
            cosine = torch.einsum("bci,bcj->bij", a, b)
            cosine = cosine / (a.norm(dim=1)[:, :, None] * b.norm(dim=1)[:, None] + 1e-7)
            best = cosine.max(2).values
            span = best.amax(1, True) - best.amin(1, True)
            prior = ((best - best.amin(1, True)) / (span + 1e-7)).reshape(-1, 1, *high.shape[2:])
            shots.append((prototype, prior, s_low))
        return low, high, reduced, shots

    def classify(self, name, x):
        return self.conv(f"{name}.3", self.conv(f"{name}.0", x, padding=1).relu())

    def residual(self, name, x):
        y = self.conv(f"{name}.0", x, padding=1).relu()
        return x + self.conv(f"{name}.2", y, padding=1).relu()

    def pfenet(self, query, supports, masks):
        _, _, reduced, shots = self.episode(query, supports, masks)
        prototype = sum(shot[0] for shot in shots) / len(shots)
        prior = sum(shot[1] for shot in shots) / len(shots)
        maps, inner = [], []
        for n, bins in enumerate((60, 30, 15, 8)):
            size = (bins, bins)
            x = [F.adaptive_avg_pool2d(reduced, size), prototype.expand(-1, -1, *size)]
            x = self.conv(f"init_merge.{n}.0", torch.cat([*x, _up(prior, size)], 1)).relu()
            if n:
                before = torch.cat([x, _up(maps[-1], size)], 1)
                x = x + self.conv(f"alpha_conv.{n - 1}.0", before).relu()
            x = self.residual(f"beta_conv.{n}", x)
            inner.append(_up(self.classify(f"inner_cls.{n}", x), query.shape[2:]))
            maps.append(_up(x, reduced.shape[2:]))
        x = self.residual("res2", self.conv("res1.0", torch.cat(maps, 1)).relu())
        return _up(self.classify("cls", x), query.shape[2:]), inner

    def base(self, high, ppm, cls):
        parts = [high]
        for n, bins in enumerate((1, 2, 3, 6)):
            x = self.conv(f"{ppm}.features.{n}.1", F.adaptive_avg_pool2d(high, bins))
            parts.append(_up(self.bn(f"{ppm}.features.{n}.2", x).relu(), high.shape[2:]))
        x = self.bn(f"{cls}.1", self.conv(f"{cls}.0", torch.cat(parts, 1), padding=1)).relu()
        return self.conv(f"{cls}.4", x)

    def bam(self, query, supports, masks, base_class=None):
        low, high, reduced, shots = self.episode(query, supports, masks)
        grams = [_gram(shot[2]) for shot in shots]
        channels = low.shape[1]
        psi = torch.stack([(_gram(low) - g).norm(dim=(1, 2)) / channels for g in grams], 1)
        weight = torch.ones_like(psi)
        if len(shots) > 1:
            value, order = psi.sort(1)
            hidden = self.conv("kshot_rw.0", value[:, :, None, None]).relu()
            score = self.conv("kshot_rw.2", hidden)[:, :, 0, 0]
            weight = torch.empty_like(psi).scatter(1, order, score).softmax(1)
        psi = (psi * weight).sum(1)[:, None, None, None]
        mixed = [
            sum(shot[i] * weight[:, k, None, None, None] for k, shot in enumerate(shots))
            for i in (0, 1)
        ]
        x = torch.cat([reduced, mixed[0].expand_as(reduced), mixed[1]], 1)
        x = self.conv("init_merge.0", x).relu()
        views = [self.conv("ASPP_meta.layer6_0.0", x.mean((2, 3), True)).expand_as(x)]
        views.append(self.conv("ASPP_meta.layer6_1.0", x))
        for n, dilation in ((2, 6), (3, 12), (4, 18)):
            name = f"ASPP_meta.layer6_{n}.0"
            views.append(self.conv(name, x, padding=dilation, dilation=dilation))
        x = self.residual("res2_meta", self.conv("res1_meta.0", torch.cat(views, 1).relu()).relu())
        meta = self.classify("cls_meta", x)
        base = self.base(high, "learner_base.0", "learner_base.1")
        others = base.softmax(1)[:, 1:].clone()
        for b, own in enumerate(base_class if base_class is not None else ()):
            if own >= 0:
                others[b, own] = 0
        g, c = self.state["gram_merge.weight"].flatten(), self.state["cls_merge.weight"].flatten()
        bg, fg = (g[0] * p + g[1] * psi for p in meta.softmax(1).split(1, 1))
        final = torch.cat([c[0] * bg + c[1] * others.sum(1, True), fg], 1)
        return _up(final, query.shape[2:]), meta, base


def _up(x, size):
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=True)


def _gram(x):
    x = x.flatten(2)
    norm = x.norm(dim=2)
    return torch.einsum("bin,bjn->bij", x, x) / (norm[:, :, None] * norm[:, None] + 1e-7)


def _episodes(shots, size=33):
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(2, 3, size, size, generator=generator)
    supports = torch.randn(2, shots, 3, size, size, generator=generator)
    masks = (torch.rand(2, shots, size, size, generator=generator) > 0.4).long()
    masks[:, :, :9, 5:] = 255
    return query, supports, masks


def _backbone(vgg):
    return build_backbone("vgg16_bn") if vgg else build_backbone("resnet50", stem="deep")


def _save(tmp_path, state, name="theirs.pth", prefix="module."):
    path = tmp_path / name
    torch.save({"epoch": 3, "state_dict": {prefix + k: v for k, v in state.items()}}, path)
    return str(path)


def _relative_error(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.fixture(params=[False, True], ids=["resnet50", "vgg16_bn"])
def vgg(request):
    return request.param


@pytest.mark.parametrize("vgg, shots", [(False, 1), (True, 5)], ids=["resnet50", "vgg16_bn"])
@torch.no_grad()
def test_pfenet(tmp_path, vgg, shots):
    state = _state(_pfenet_shapes(vgg))
    model = PFENet(_backbone(vgg), dropout=0.0)
    load_official(model, _save(tmp_path, state))
    query, supports, masks = _episodes(shots)
    logits, inner = Theirs(state, vgg).pfenet(query.double(), supports.double(), masks)
    assert _relative_error(model.eval()(query, supports, masks).logits, logits) < 1e-4
    prediction = model.train()(query, supports, masks)
    assert [tuple(a.shape[2:]) for a in prediction.auxiliary] == [(n, n) for n in (60, 30, 15, 8)]
    target = masks[:, 0]
    loss = F.cross_entropy(logits, target, ignore_index=255)
    loss += sum(F.cross_entropy(i, target, ignore_index=255) for i in inner) / 4
    assert model.loss(prediction, target).item() == pytest.approx(loss.item(), rel=1e-4)


@pytest.mark.parametrize("vgg, shots", [(False, 1), (True, 5)], ids=["resnet50", "vgg16_bn"])
@torch.no_grad()
def test_bam(tmp_path, vgg, shots):
    state = _state(_bam_shapes(vgg, shots))
    model = BAM(_backbone(vgg), base_classes=15, shots=shots, dropout=0.0)
    load_official(model, _save(tmp_path, state))
    query, supports, masks = _episodes(shots)
    theirs, inputs = Theirs(state, vgg), (query.double(), supports.double(), masks)
    final, _, _ = theirs.bam(*inputs)
    assert _relative_error(model.eval()(query, supports, masks).logits, final) < 1e-4
    base_class, target, base_target = torch.tensor([4, -1]), masks[:, 0], masks[:, 0] * 5
    base_target[masks[:, 0] == 255] = 255
    prediction = model.train()(query, supports, masks, base_class)
    final, meta, base = theirs.bam(*inputs, base_class=base_class.tolist())
    for ours, expected in zip((prediction.logits, *prediction.auxiliary), (final, meta, base)):
        assert _relative_error(ours, expected) < 1e-4
    loss = F.cross_entropy(final, target, ignore_index=255)
    loss += F.cross_entropy(_up(meta, query.shape[2:]), target, ignore_index=255)
    loss += F.cross_entropy(_up(base, query.shape[2:]), base_target, ignore_index=255)
    ours = model.loss(prediction, target, base_target)
    assert ours.item() == pytest.approx(loss.item(), rel=1e-4)


@torch.no_grad()
def test_pspnet_and_bam_from_it(tmp_path, vgg):
    state = _state(_pspnet_shapes(vgg))
    path = _save(tmp_path, state)
    pspnet, images = PSPNet(_backbone(vgg), classes=15).eval(), torch.randn(2, 3, 41, 41)
    load_official(pspnet, path)
    theirs = Theirs(state, vgg)
    high = theirs.layer(4, theirs.layers23(images.double())[1])
    expected = _up(theirs.base(high, "ppm", "cls"), (41, 41))
    assert _relative_error(pspnet(images), expected) < 1e-4
    config = ModelConfig(
        name="bam",
        backbone="vgg16_bn" if vgg else "resnet50",
        stem="plain" if vgg else "deep",
        base_weights=path,
    )
    bam = build_model(config, {c: f"class {c}" for c in range(6, 21)})
    for name in ("backbone", "base_learner"):
        pairs = zip(getattr(bam, name).parameters(), getattr(pspnet, name).parameters())
        assert all(torch.equal(a, b) for a, b in pairs)
    assert not any(p.requires_grad for p in bam.base_learner.parameters())


def _with_svf_layers(state, listed=False):
    """The authors' SVF layers in place of the convolutions of layers 0-4, with S as trained.

    From facts about their code: names, shapes, ranks rounded down to a multiple of 4.
    """
    factored, ranks = {}, {}
    generator = torch.Generator().manual_seed(3)
    for key, value in state.items():
        layer = key.removesuffix(".weight")
        if key.startswith("layer") and value.ndim == 4:
            U, S, V = torch.linalg.svd(value.double().flatten(1), full_matrices=False)
            full = len(S)
            rank = max(full // 4 * 4, 1)
            scale = 1 + 0.2 * torch.randn(rank, generator=generator, dtype=torch.float64)
            factored[f"{layer}.conv_V.weight"] = V[:rank].reshape(rank, *value.shape[1:]).float()
            name = f"{layer}.vector_S.0" if listed else f"{layer}.vector_S"
            factored[name] = (S[:rank] * scale).reshape(1, rank, 1, 1)[0 if listed else ...].float()
            factored[f"{layer}.conv_U.weight"] = U[:, :rank].reshape(-1, rank, 1, 1).float()
            if f"{layer}.bias" in state:
                factored[f"{layer}.conv_U.bias"] = state[f"{layer}.bias"]
            if rank < full:
                ranks[layer] = (rank, full)
        elif not (key.startswith("layer") and f"{layer.removesuffix('.bias')}.weight" in state) or (
            state[f"{layer.removesuffix('.bias')}.weight"].ndim != 4
        ):
            factored[key] = value
    return factored, ranks


def _composed(factored):
    """The weights that the SVF layers stand for, in float64."""
    state = {}
    for key, value in factored.items():
        layer, part, _ = key.partition(".conv_V.weight")
        if part:
            S = factored.get(f"{layer}.vector_S", factored.get(f"{layer}.vector_S.0"))
            U = factored[f"{layer}.conv_U.weight"].double().flatten(1) * S.double().flatten()
            state[f"{layer}.weight"] = (U @ value.double().flatten(1)).reshape(-1, *value.shape[1:])
            if f"{layer}.conv_U.bias" in factored:
                state[f"{layer}.bias"] = factored[f"{layer}.conv_U.bias"]
        elif ".conv_U." not in key and ".vector_S" not in key:
            state[key] = value
    return state


@pytest.mark.parametrize(("vgg", "listed"), [(False, False), (True, True)])
@torch.no_grad()
def test_a_checkpoint_of_svf_layers(tmp_path, vgg, listed):
    factored, cut = _with_svf_layers(_state(_pfenet_shapes(vgg)), listed)
    assert list(cut.values()) == [(24, 27)]  # the first convolution, of three channels
    config = ModelConfig(
        name="pfenet",
        backbone="vgg16_bn" if vgg else "resnet50",
        stem="plain" if vgg else "deep",
        official=_save(tmp_path, factored),
        bins=(60, 30, 15, 8),
    )
    with pytest.warns(UserWarning, match=rf"{next(iter(cut))} \(24 of 27\)\. The authors' code"):
        model = build_model(config)
    query, supports, masks = _episodes(1)
    theirs = Theirs(_composed(factored), vgg)
    expected = theirs.pfenet(query.double(), supports.double(), masks)[0]
    assert _relative_error(model.eval()(query, supports, masks).logits, expected) < 1e-4
    apply_regime(model, RegimeConfig())
    layers = svf_layers(model.backbone)
    assert len(layers) == (9 if vgg else 42) and not model.backbone.factors
    names = official_keys(PFENet(_backbone(vgg)))
    for name, layer in layers.items():
        their = names[f"backbone.{name}.weight"].removesuffix(".weight")
        S = factored.get(f"{their}.vector_S", factored.get(f"{their}.vector_S.0"))
        assert torch.equal(layer.S, S.flatten())
        assert torch.equal(layer.U, factored[f"{their}.conv_U.weight"].flatten(1))
        assert torch.equal(layer.V, factored[f"{their}.conv_V.weight"])
    assert _relative_error(model.eval()(query, supports, masks).logits, expected) < 1e-4


@pytest.mark.parametrize("regime", ["freeze", "full", "svf_scale"])
@torch.no_grad()
def test_svf_layers_under_other_regimes(tmp_path, regime):
    factored, _ = _with_svf_layers(_small_state())
    torch.save(factored, tmp_path / "w.pth")
    config = ModelConfig(backbone="resnet18", width=4, weights=str(tmp_path / "w.pth"), channels=8)
    model = build_model(config)
    apply_regime(model, RegimeConfig(name=regime))
    composed = _composed(factored)
    for name, module in model.backbone.named_modules():
        weight = getattr(module, "composed_weight", lambda module=module: module.weight)
        if f"{name}.weight" in composed and composed[f"{name}.weight"].ndim == 4:
            expected = composed[f"{name}.weight"].double()
            torch.testing.assert_close(weight().double(), expected, rtol=1e-5, atol=1e-6)


def _small_state():
    return build_backbone("resnet18", width=4).state_dict()


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("vector_S", "lacks conv_U.weight or vector_S of the SVF layer layer2.0.conv1"),
        ("conv_U.weight", "lacks conv_U.weight or vector_S of the SVF layer layer2.0.conv1"),
        ("conv_V.weight", "lacks layer2.0.conv1.conv_V.weight, the V of an SVF layer"),
    ],
)
def test_svf_layers_that_lack_a_part(tmp_path, lost, message):
    factored, _ = _with_svf_layers(_small_state())
    del factored[f"layer2.0.conv1.{lost}"]
    torch.save(factored, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=message):
        load_backbone(build_backbone("resnet18", width=4), str(tmp_path / "w.pth"))


def test_svf_layers_whose_ranks_disagree(tmp_path):
    factored, _ = _with_svf_layers(_small_state())
    factored["layer2.0.conv1.vector_S"] = torch.ones(1, 5, 1, 1)
    torch.save(factored, tmp_path / "w.pth")
    with pytest.raises(
        ValueError, match=r"U \[Co, R\], S \[R\], V .*layer2.0.conv1, got \[8, 8\], \[5\]"
    ):
        load_backbone(build_backbone("resnet18", width=4), str(tmp_path / "w.pth"))


def test_names_are_the_published_ones(vgg):
    for model, shapes in (
        (PFENet(_backbone(vgg)), _pfenet_shapes(vgg)),
        (BAM(_backbone(vgg), 15, 5), _bam_shapes(vgg, 5)),
    ):
        assert sorted(official_keys(model).values()) == sorted(shapes)


def test_what_does_not_fit_is_named_and_nothing_is_loaded(tmp_path):
    state = _state(_bam_shapes(True, 1))
    del state["ASPP_meta.layer6_3.0.bias"]
    state["query_merge.0.weight"] = torch.zeros(1)
    state["learner_base.1.4.weight"] = torch.zeros(61, 512, 1, 1)
    model = BAM(build_backbone("vgg16_bn"), base_classes=15)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError) as error:
        load_official(model, _save(tmp_path, state))
    message = str(error.value)
    assert "1 missing: ASPP_meta.layer6_3.0.bias" in message
    assert "1 unexpected: query_merge.0.weight" in message
    assert "learner_base.1.4.weight (expected [16, 512, 1, 1], got [61, 512, 1, 1])" in message
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_another_number_of_shots_is_named(tmp_path):
    path = _save(tmp_path, _state(_bam_shapes(True, 5)))
    with pytest.raises(ValueError, match="4 unexpected: kshot_rw.0.weight.*\n.*fold and shots"):
        load_official(BAM(build_backbone("vgg16_bn"), base_classes=15), path)


def test_an_encoder_of_its_own_is_refused(tmp_path):
    state = _state(_pspnet_shapes(True))
    state["encoder.2.0.weight"] = state["encoder.2.0.weight"] + 1
    with pytest.raises(ValueError, match="encoder.2.0.weight is not the same as layer2.0.weight"):
        load_official(PSPNet(build_backbone("vgg16_bn"), 15), _save(tmp_path, state))


def test_other_models_and_files(tmp_path):
    bam = BAM(build_backbone("resnet18", width=4), 3, channels=8)
    with pytest.raises(FileNotFoundError, match="model.official: .*absent.pth"):
        load_official(bam, str(tmp_path / "absent.pth"))
    with pytest.raises(FileNotFoundError, match="model.base_weights: .*base.pt"):
        load_base_learner(bam, str(tmp_path))
    with pytest.raises(TypeError, match="whose authors have published a checkpoint, got Linear"):
        load_official(torch.nn.Linear(1, 1), "x.pth")


PASCAL, COCO = (60, 30, 15, 8), (1.0, 0.5, 0.25, 0.125)


@pytest.mark.parametrize(
    ("source", "bins", "expected"),
    [
        ("coco", None, COCO),
        ("pascal", None, PASCAL),
        ("folder", COCO, COCO),
        ("folder", None, None),
        ("coco", PASCAL, PASCAL),
    ],
)
def test_the_scales_of_pfenet_follow_the_data_or_are_asked_for(tmp_path, source, bins, expected):
    """The tensors of a Pascal and a COCO file are alike; only settings tell them apart."""
    file = _save(tmp_path, _state(_pfenet_shapes(vgg=False)), "coco_split0.pth")
    model = ModelConfig("pfenet", stem="deep", official=file, bins=bins)
    config = TrainConfig(DataConfig(source=source, root="x"), model)
    assert config.model.bins == expected
    if expected is None:
        with pytest.raises(ValueError, match="model.bins: expected the scales of .*give model.bin"):
            build_model(config.model)
    elif expected == PASCAL:
        with pytest.warns(UserWarning, match="is named after COCO, and is used with .60, 30, 15"):
            assert build_model(config.model).enrich.bins == PASCAL
    else:
        assert build_model(config.model).enrich.bins == expected


@pytest.mark.parametrize("name", ["baseline", "bam"])
def test_other_models_have_no_scales_to_ask_for(name):
    model = ModelConfig(name, base_weights="none" if name == "bam" else None)
    assert TrainConfig(DataConfig(source="coco", root="x"), model).model.bins == PASCAL
