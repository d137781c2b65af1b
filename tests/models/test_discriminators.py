import copy
import math

import pytest
import torch
from torch import nn

from dinotok.losses import discriminator_loss, generator_loss
from dinotok.models.discriminators import AUGMENTATIONS, FeatureDiscriminator, PatchDiscriminator, augment
from dinotok.models.encoders import FrozenEncoder
from tests.conftest import TINY_ENCODERS, random_pixels


def tiny_encoder(family: str = "dinov3_vit", **arguments) -> FrozenEncoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return FrozenEncoder(TINY_ENCODERS[family], **arguments)


def make(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return PatchDiscriminator(hidden_size=8) if name == "patch" else FeatureDiscriminator(tiny_encoder())


both = pytest.mark.parametrize("name", ["patch", "feature"])


# Shapes


@pytest.mark.parametrize(("num_layers", "height", "width"), [(3, 24, 48), (3, 70, 101), (2, 33, 12), (1, 6, 9)])
def test_patch_logits_have_their_shape(num_layers, height, width):
    logits = PatchDiscriminator(8, num_layers)(random_pixels(2, 3, height, width))
    scale = 2**num_layers
    assert logits.shape == (2, 1, height // scale - 2, width // scale - 2)
    assert logits.dtype == torch.float32


def test_a_patch_logit_sees_70_pixels():
    discriminator = make("patch").eval()
    for index, module in enumerate(discriminator.layers):
        if isinstance(module, nn.GroupNorm):  # it sees everything
            discriminator.layers[index] = nn.Identity()
    pixels = random_pixels(1, 3, 144, 152).requires_grad_()
    logits = discriminator(pixels)
    logits[0, 0, 8, 8].backward()
    rows, columns = (pixels.grad.abs().sum(dim=(0, 1, d)).nonzero().flatten() for d in (3, 2))
    assert (rows.max() - rows.min() + 1).item() == (columns.max() - columns.min() + 1).item() == 70


def test_the_patch_discriminator_is_that_of_vqgan_but_for_its_norm():
    discriminator = PatchDiscriminator()
    # pix2pix: 4x4 kernels of C64-C128-C256-C512, then one logit; no bias before a norm.
    expected = 16 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512) + 64 + 1 + 2 * (128 + 256 + 512)
    assert sum(p.numel() for p in discriminator.parameters()) == expected
    weights = torch.cat([m.weight.flatten() for m in discriminator.modules() if isinstance(m, nn.Conv2d)])
    assert weights.std().item() == pytest.approx(0.02, rel=0.01)


@pytest.mark.parametrize("family", TINY_ENCODERS)
def test_feature_logits_have_their_shape(family):
    encoder = tiny_encoder(family, patch_size=16)
    logits = FeatureDiscriminator(encoder, layers=[3, 1])(random_pixels(2, 3, 64, 96))
    assert logits.shape == (2, 2, 4, 6)
    assert logits.dtype == torch.float32


def test_the_default_layers_go_from_the_embedding_to_the_last():
    assert FeatureDiscriminator(tiny_encoder()).layers == (0, 1, 2, 3)
    deep = FrozenEncoder({**TINY_ENCODERS["vit"], "num_hidden_layers": 12})
    assert FeatureDiscriminator(deep).layers == (0, 3, 6, 9, 12)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="23x40 is below 24"):
        make("patch")(torch.zeros(1, 3, 23, 40))
    with pytest.raises(ValueError, match="40x64 is not a multiple of patch_size=16"):
        make("feature")(torch.zeros(1, 3, 40, 64))
    for layers in ([], [4], [-1]):
        with pytest.raises(ValueError, match="must name some of the hidden states 0 to 3"):
            FeatureDiscriminator(tiny_encoder(), layers)
    with pytest.raises(ValueError, match="num_layers=0 must be at least 1"):
        PatchDiscriminator(num_layers=0)


# Laws


@both
def test_logits_depend_on_no_other_picture(name):
    discriminator, pixels = make(name).eval(), random_pixels(3, 3, 48, 64)
    torch.testing.assert_close(discriminator(pixels)[1:2], discriminator(pixels[1:2]), rtol=1e-4, atol=1e-5)


@both
def test_gradients_reach_the_pixels_and_the_trainable_weights(name):
    discriminator, pixels = make(name), random_pixels(2, 3, 48, 64).requires_grad_()
    generator_loss(discriminator(pixels)).backward()
    assert pixels.grad.isfinite().all() and (pixels.grad.abs().sum(dim=1) > 0).float().mean() > 0.9
    assert all(p.grad is not None and p.grad.isfinite().all() for p in discriminator.parameters())


def test_the_encoder_is_frozen_not_saved_and_may_be_shared():
    encoder = tiny_encoder()
    before = copy.deepcopy(encoder.state_dict())
    discriminator = FeatureDiscriminator(encoder).train()
    assert discriminator.encoder is encoder and not encoder.training
    own = {id(p) for p in discriminator.parameters()}
    assert not own & {id(p) for p in encoder.parameters()}
    assert all(key.startswith("heads.") for key in discriminator.state_dict())
    optimizer = torch.optim.SGD(discriminator.parameters(), lr=1.0)
    generator_loss(discriminator(random_pixels(2, 3, 48, 64))).backward()
    optimizer.step()
    assert all(p.grad is None for p in encoder.parameters())
    assert all(torch.equal(values, before[key]) for key, values in encoder.state_dict().items())


def test_the_encoder_moves_along():
    discriminator = make("feature").double()
    assert {p.dtype for p in discriminator.encoder.model.parameters()} == {torch.float64}
    assert discriminator.to("meta").encoder.model.device.type == "meta"


@both
def test_saving_and_loading_gives_the_same_logits(name):
    discriminator, pixels = make(name), random_pixels(2, 3, 48, 64)
    discriminator(pixels)  # moves the vectors of the spectral norm
    torch.manual_seed(5)
    other = PatchDiscriminator(hidden_size=8) if name == "patch" else FeatureDiscriminator(tiny_encoder())
    assert not torch.equal(other.eval()(pixels), discriminator.eval()(pixels))
    other.load_state_dict(discriminator.state_dict())
    assert torch.equal(other(pixels), discriminator(pixels))


def test_every_convolution_of_a_head_has_norm_one():
    discriminator = make("feature")
    convolutions = [m for m in discriminator.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 3 * 4
    with torch.no_grad():
        for convolution in convolutions:
            convolution.parametrizations.weight.original.mul_(7)
    for _ in range(30):  # each pass in training mode is a power iteration
        discriminator(random_pixels(1, 3, 32, 48))
    for convolution in convolutions:
        norm = torch.linalg.matrix_norm(convolution.weight.flatten(1), 2).item()
        assert norm == pytest.approx(1, abs=0.05)


@both
def test_it_runs_under_autocast(name):
    discriminator, pixels = make(name).eval(), random_pixels(2, 3, 48, 64).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        logits = discriminator(pixels)
    assert logits.dtype == torch.float32
    logits.mean().backward()
    assert pixels.grad.isfinite().all()
    with torch.no_grad():
        expected = discriminator(pixels)
    assert (logits - expected).abs().max() < 0.1 * expected.abs().max()


@both
@pytest.mark.parametrize("kind", ["hinge", "non_saturating"])
def test_it_learns_to_tell_smooth_pictures_from_noisy_ones(name, kind):
    discriminator = make(name)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=2e-3, betas=(0.5, 0.9))

    def pair(seed):
        real = random_pixels(4, 3, 48, 32, seed=seed)
        noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(seed))
        return real, (real + 0.5 * noise).clamp(-1, 1)

    for step in range(25):
        real, fake = pair(step)
        loss = discriminator_loss(discriminator(real), discriminator(fake), kind)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        real, fake = (discriminator.eval()(p).mean(dim=(1, 2, 3)) for p in pair(99))
    assert real.min() > fake.max()


# Augmentation


@pytest.mark.parametrize("policy", [AUGMENTATIONS, *([name] for name in AUGMENTATIONS)])
def test_augmentation_depends_on_its_generator_alone(policy):
    pixels = random_pixels(3, 3, 40, 56)

    def run(seed):
        return augment(pixels, torch.Generator().manual_seed(seed), policy)

    torch.manual_seed(0)
    first = run(7)
    torch.manual_seed(1)
    assert torch.equal(run(7), first)
    assert not torch.equal(run(8), first)
    assert first.shape == pixels.shape
    same = augment(pixels[:1].expand(3, -1, -1, -1), torch.Generator().manual_seed(7), policy)
    assert not torch.equal(same[0], same[1])  # each picture has its own draw


def test_no_policy_changes_nothing_and_unknown_ones_are_named():
    pixels = random_pixels(1, 3, 40, 56)
    assert torch.equal(augment(pixels, torch.Generator(), []), pixels)
    with pytest.raises(ValueError, match=r"\['flip'\] is not among color, translation, cutout"):
        augment(pixels, torch.Generator(), ["color", "flip"])


def test_color_changes_are_affine_in_each_picture():
    generator = torch.Generator().manual_seed(0)
    gray = random_pixels(4, 1, 20, 30).expand(-1, 3, -1, -1)
    changed = augment(gray, generator, ["color"])
    torch.testing.assert_close(changed[:, 0], changed[:, 2])  # saturation does not touch grey
    slopes = []
    for one, other in zip(gray, changed, strict=True):
        slopes.append((other.std() / one.std()).item())
        centered = (other - other.mean()) / other.std()
        torch.testing.assert_close(centered, (one - one.mean()) / one.std(), rtol=1e-3, atol=1e-4)
        assert abs(other.mean() - one.mean()) <= 0.5
    assert all(0.5 <= slope <= 1.5 for slope in slopes)


def test_translation_moves_whole_pixels_by_up_to_an_eighth():
    size = (40, 56)
    position = torch.arange(1.0, 40 * 56 + 1).view(1, 1, *size).expand(200, 3, -1, -1)
    moved = augment(position, torch.Generator().manual_seed(0), ["translation"])
    shifts = set()
    for image in moved[:, 0]:
        inside = image.nonzero()
        origin = image[inside[:, 0], inside[:, 1]].long() - 1
        offsets = torch.stack([inside[:, 0] - origin // size[1], inside[:, 1] - origin % size[1]], dim=1)
        assert (offsets == offsets[0]).all()
        dy, dx = offsets[0].tolist()
        assert len(inside) == (size[0] - abs(dy)) * (size[1] - abs(dx))
        shifts.add((dy, dx))
    assert {dy for dy, _ in shifts} == set(range(-5, 6))
    assert {dx for _, dx in shifts} == set(range(-7, 8))


def test_cutout_removes_a_rectangle_of_half_of_each_side():
    height, width = 21, 30
    cut = augment(torch.ones(200, 3, height, width), torch.Generator().manual_seed(0), ["cutout"])
    assert torch.equal(cut[:, 0], cut[:, 1])
    heights, widths = set(), set()
    for image in cut[:, 0] == 0:
        rows, columns = image.any(dim=1), image.any(dim=0)
        assert torch.equal(image, rows[:, None] & columns[None, :])
        heights.add(int(rows.sum()))
        widths.add(int(columns.sum()))
    assert (max(heights), max(widths)) == (math.ceil(height / 2), width // 2)
    assert min(heights) >= height // 4 and min(widths) >= width // 4  # the centre lies in the picture


def test_gradients_flow_through_augmentation():
    pixels = random_pixels(2, 3, 40, 56).requires_grad_()
    augment(pixels, torch.Generator().manual_seed(0)).square().sum().backward()
    assert pixels.grad.isfinite().all() and pixels.grad.abs().sum() > 0
