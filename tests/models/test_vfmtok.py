"""VFMTok and VFMAE: contracts of all tokenizers, one resolution, regions, semantics, codebook."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from dinotok import AutoencoderVFMTok, EncoderUnavailableError, VQModelVFMTok
from dinotok.hub import load_tokenizer
from dinotok.models.discrete import DiscreteTokenizer
from dinotok.models.vfmtok_layers import grid_centres, resize_for_encoder, resize_positions
from tests.conftest import TINY_ENCODERS, random_pixels, randomize, save_tiny_encoder
from tests.tiny_tokenizers import tiny_discrete_tokenizer, tiny_region_tokenizer

SIZES = {
    "image_size": 64,
    "query_grid": (3, 5),
    "hidden_size": 32,
    "sampler_num_layers": 2,
    "sampler_num_attention_heads": 4,
    "sampler_num_points": 2,
    "sampler_intermediate_size": 24,
    "decoder_num_layers": 2,
    "decoder_num_attention_heads": 4,
    "decoder_intermediate_size": 24,
    "block_out_channels": (8, 8, 8, 8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
CLASSES = {
    "vae": (AutoencoderVFMTok, {"projector_num_groups": 4, "latent_channels": 8}),
    "vq": (VQModelVFMTok, {"codebook_size": 24, "latent_channels": 6}),
}
each_class = pytest.mark.parametrize("kind", CLASSES)


def tiny(kind: str, family: str = "dinov2_with_registers", **config):
    """A small model of real classes with random weights everywhere."""
    model_class, sizes = CLASSES[kind]
    torch.manual_seed(0)
    return randomize(model_class(encoder_config=TINY_ENCODERS[family], **{**SIZES, **sizes, **config})).eval()


def pixels(batch: int = 2, size: int = 64, seed: int = 0) -> torch.Tensor:
    return random_pixels(batch, 3, size, size, seed=seed)


# Contracts


@torch.no_grad()
@each_class
@pytest.mark.parametrize("family", ["dinov2_with_registers", "vit", "siglip_vision_model"])
def test_shapes_and_sizes_follow_from_the_encoder(kind, family):
    model = tiny(kind, family, use_class_token=kind == "vae" and family != "siglip_vision_model")
    latents = model.encode(pixels()).latent
    assert latents.shape == (2, model.latent_channels, 3, 5) == (2, model.latent_channels, *model.latent_grid(64, 64))
    assert model.decode(latents).sample.shape == (2, 3, 64, 64)
    # a patch-14 encoder sees 4 x 14 = 56 pixels, one of 16 the picture itself
    assert model.config.encoder_image_size == (56 if family == "dinov2_with_registers" else 64)
    assert model.config.position_grid == 4 and model.config.feature_channels == 32
    assert model.predict_features(latents).shape == model.target_features(pixels()).shape == (2, 32, 4, 4)
    tokens = model.predict_feature_tokens(latents)
    assert tokens.shape == model.target_feature_tokens(pixels()).shape == (2, 16 + model.config.use_class_token, 32)


@torch.no_grad()
@each_class
def test_both_checkpoint_forms_reproduce_the_model(tmp_path, kind):
    encoder = save_tiny_encoder(tmp_path / "encoder", seed=3, family="dinov2_with_registers")
    model_class, sizes = CLASSES[kind]
    model = randomize(model_class.from_encoder(str(encoder), **{**SIZES, **sizes})).eval()
    x = pixels()
    expected = model(x).sample
    model.save_pretrained(tmp_path / "whole")
    assert torch.equal(load_tokenizer(str(tmp_path / "whole"))(x).sample, expected)
    model.save_pretrained(tmp_path / "slim", include_encoder=False)
    assert torch.equal(model_class.from_pretrained(tmp_path / "slim", encoder=encoder)(x).sample, expected)
    with pytest.raises(EncoderUnavailableError, match="digest"):
        other = save_tiny_encoder(tmp_path / "other", seed=4, family="dinov2_with_registers")
        model_class.from_pretrained(tmp_path / "slim", encoder=other)


@torch.no_grad()
@each_class
def test_slicing_training_mode_and_batches_change_nothing(kind):
    model, x = tiny(kind), pixels(3)
    expected = model(x).sample
    torch.testing.assert_close(torch.cat([model(row).sample for row in x.split(1)]), expected, rtol=0, atol=1e-5)
    model.enable_slicing()
    torch.testing.assert_close(model(x).sample, expected, rtol=0, atol=1e-5)
    model.disable_slicing()
    torch.testing.assert_close(model.train()(x).sample, expected, rtol=0, atol=1e-5)
    assert torch.equal(model.encode(x).latent, model.eval().encode(x).latent)


@torch.no_grad()
@each_class
def test_autocast_and_bfloat16(kind):
    model, x = tiny(kind), pixels()
    latents = model.encode(x).latent
    expected = model.decode(latents).sample
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model.decode(model.encode(x).latent).sample
    half = model.bfloat16()
    assert half.encode(x.bfloat16()).latent.dtype == half(x.bfloat16()).sample.dtype == torch.bfloat16
    for sample in (mixed, half.decode(half.encode(x.bfloat16()).latent).sample):
        assert (sample.float() - expected).abs().mean() < 0.1 * expected.abs().mean()
    if kind == "vq":
        assert half.quantizer.codebook.dtype == torch.float32


@each_class
def test_gradient_checkpointing_changes_no_gradient(kind):
    model, x = tiny(kind), pixels()

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        latents = model.encode(x).latent
        (model.decode(latents).sample.square().mean() + model.predict_features(latents).square().mean()).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    # without its codes, only the codebook has nothing to learn
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained - set(expected) == ({"quantizer.codebook"} if kind == "vq" else set())
    model.train().enable_gradient_checkpointing()
    found = gradients()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.slow
@torch.no_grad()
@each_class
def test_it_compiles_whole(kind):
    model, x = tiny(kind), pixels()
    expected = model(x).sample
    torch.testing.assert_close(torch.compile(model, fullgraph=kind == "vae")(x).sample, expected, rtol=0, atol=1e-4)


# One resolution


@each_class
def test_other_sizes_and_tiles_are_refused_with_the_reason(kind):
    model = tiny(kind)
    with pytest.raises(ValueError, match="80x80: this .* takes pictures of 64x64 pixels only.*Resize or crop"):
        model.encode(pixels(1, 80))
    with pytest.raises(ValueError, match="64x64 pixels only"):
        model.fit_latents_statistics([random_pixels(1, 3, 64, 80)])
    with pytest.raises(ValueError, match="regions of a whole picture: there is no tiling"):
        model.enable_tiling()
    with pytest.raises(ValueError, match=rf"\(B, {model.latent_channels}, 3, 5\), got"):
        model.decode(torch.zeros(1, model.latent_channels, 5, 3))
    with pytest.raises(ValueError, match=r"\(B, .*, 3, 5\), got"):
        model.predict_features(torch.zeros(1, model.latent_channels, 4, 4))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"image_size": 72}, "image_size=72 is not a multiple of patch_size=16"),
        ({"patch_size": 8}, "patch_size=8 needs"),
        ({"encoder_image_size": 60}, "encoder_image_size=60 is not a multiple of the encoder's patch size 14"),
        ({"levels": [1, 4]}, "Level 4 does not exist: hidden states are 0 to 3"),
        ({"query_grid": (4,)}, "two positive numbers"),
        ({"sampler_num_attention_heads": 5}, "hidden_size=32 is not a multiple of num_heads=5"),
        ({"latents_mean": [0.0] * 7}, "latents_mean has 7 values"),
    ],
)
def test_numbers_that_do_not_fit_are_named(config, message):
    with pytest.raises(ValueError, match=message):
        tiny("vae", **config)


def test_an_encoder_without_class_token_cannot_add_it():
    with pytest.raises(ValueError, match="'siglip_vision_model' has no class token"):
        tiny("vae", "siglip_vision_model")


# Parts


def test_grid_centres_are_raster_order_x_first():
    centres = grid_centres((2, 4), torch.device("cpu"))
    assert centres.tolist() == [[x, y] for y in (0.25, 0.75) for x in (0.125, 0.375, 0.625, 0.875)]


def test_positions_are_resized_as_the_release_does():
    table = torch.randn(1, 1 + 24 * 24, 5, generator=torch.Generator().manual_seed(0))
    resized = resize_positions(table, 21)
    grid = table[:, 1:].transpose(1, 2).view(1, 5, 24, 24)
    expected = F.interpolate(grid, scale_factor=(21.1 / 24, 21.1 / 24), mode="bicubic").flatten(2).transpose(1, 2)
    assert torch.equal(resized[:, 1:], expected) and torch.equal(resized[:, :1], table[:, :1])
    by_size = F.interpolate(grid, size=(21, 21), mode="bicubic").flatten(2).transpose(1, 2)
    assert (resized[:, 1:] - by_size).abs().max() > 0.01  # it is not the same
    assert resize_positions(table, 24) is table


def test_the_encoder_s_pictures_are_resized_with_aligned_corners():
    x = random_pixels(1, 3, 256, 256)
    expected = F.interpolate(x, size=(224, 224), mode="bicubic", align_corners=True).clamp(-1, 1)
    torch.testing.assert_close(resize_for_encoder(x, 224), expected, rtol=0, atol=1e-6)
    assert torch.equal(resize_for_encoder(x, 256), x)
    stripes = torch.ones(1, 3, 128, 128)
    stripes[..., ::2] = -1
    assert resize_for_encoder(stripes, 32).abs().max() < 0.1  # blurred, not aliased


@torch.no_grad()
def test_causal_and_adaptive_are_what_they_say():
    for causal in (True, False):
        model = tiny("vae", causal=causal)
        features = [torch.randn(1, 32, 4, 4) for _ in range(4)]
        before = model.sampler(features)
        model.sampler.queries[:, 7] += torch.randn(32)
        changed = (model.sampler(features) - before).abs().amax((0, 2)) > 1e-6
        assert changed.tolist() == [(not causal) or index >= 7 for index in range(15)]
    fixed = tiny("vae", region_adaptive=False)
    assert fixed.sampler.layers[0].cross_attention.sampling_offsets is None
    assert fixed(pixels()).sample.shape == (2, 3, 64, 64)


@torch.no_grad()
def test_registers_are_inert_in_a_causal_decoder_only():
    for causal in (True, False):
        model = tiny("vq", causal=causal, num_register_tokens=3)
        latents = torch.randn(1, 6, 3, 5)
        before = model.decode(latents).sample, model.predict_features(latents)
        model.token_decoder.register_tokens += 1
        after = model.decode(latents).sample, model.predict_features(latents)
        assert all(torch.equal(a, b) == causal for a, b in zip(before, after, strict=True))


@torch.no_grad()
def test_the_class_token_reaches_the_latents():
    model = tiny("vae")
    tokens = model._tokens(pixels(), model.config.levels)
    for level, sequence in zip(model._levels(pixels()), tokens, strict=True):
        expected = sequence[:, 5:] + sequence[:, :1]  # one class token, four registers
        assert torch.equal(level.flatten(2).transpose(1, 2), expected)


def test_the_feature_branch_can_be_left_out_of_training():
    model = tiny("vae")
    model.freeze_feature_branch()
    model(pixels()).sample.square().mean().backward()
    assert {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None} == set()
    assert model.last_layer is model.decoder.conv_out.weight and model.last_layer.grad is not None


# Statistics of latents


@torch.no_grad()
@pytest.mark.parametrize("per_position", [False, True])
def test_latents_are_normalised_per_channel_or_position(tmp_path, per_position):
    model = tiny("vae")
    batches = [pixels(8, seed=seed) for seed in range(4)]
    before = model(batches[0]).sample
    model.fit_latents_statistics(batches, per_position=per_position)
    latents = torch.cat([model.encode(batch).latent for batch in batches])
    dims = (0,) if per_position else (0, 2, 3)
    assert latents.mean(dims).abs().max() < 1e-3
    torch.testing.assert_close(latents.std(dims), torch.ones_like(latents.std(dims)), rtol=0.05, atol=0)
    torch.testing.assert_close(model(batches[0]).sample, before, rtol=0, atol=1e-4)
    model.save_pretrained(tmp_path)
    loaded = AutoencoderVFMTok.from_pretrained(tmp_path)
    assert torch.equal(loaded.encode(batches[0]).latent, model.encode(batches[0]).latent)
    assert loaded.latents_std.shape == ((8, 3, 5) if per_position else (8,))


# Codes


@torch.no_grad()
def test_indices_are_the_picture():
    model, x = tiny("vq"), pixels()
    assert isinstance(model, DiscreteTokenizer) and model.codebook_sizes == {"region": 24}
    latents = model.encode(x).latent
    found = model.quantize(latents)
    assert found.indices.shape == (2, 1, 3, 5) and found.indices.dtype == torch.int64
    assert torch.equal(model.indices_to_latents(found.indices), found.latents)
    assert torch.equal(model.quantize(found.latents).indices, found.indices)
    expected = model.decode(model.indices_to_latents(model.encode_to_indices(x))).sample
    assert torch.equal(model(x).sample, expected)
    codebook = F.normalize(model.quantizer.codebook, dim=1)
    cosines = torch.einsum("bchw,kc->bkhw", F.normalize(latents, dim=1), codebook)
    assert torch.equal(cosines.argmax(1, keepdim=True), found.indices)
    torch.testing.assert_close(model.code_distances(latents, found.indices), 2 - 2 * cosines.amax(1, keepdim=True))
    torch.testing.assert_close(model.decode(latents * 3).sample, model.decode(latents).sample, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match=r"Indices must have shape \(B, 1, 3, 5\)"):
        model.indices_to_latents(found.indices[:, 0])


def test_the_loss_is_codebook_plus_commitment_on_the_sphere():
    model = tiny("vq", commitment_weight=0.5)
    latents = torch.randn(2, 6, 3, 5, requires_grad=True)
    found = model.quantize(latents)
    distance = F.mse_loss(F.normalize(latents, dim=1), found.latents)
    torch.testing.assert_close(found.loss, 1.5 * distance)
    torch.testing.assert_close(model(pixels()).commit_loss, model.quantize(model.encode(pixels()).latent).loss)
    scale = torch.randn(2, 6, 3, 5)
    (ours,) = torch.autograd.grad((found.latents * scale).sum(), latents)
    (expected,) = torch.autograd.grad((F.normalize(latents, dim=1) * scale).sum(), latents)  # straight through
    torch.testing.assert_close(ours, expected)


@torch.no_grad()
def test_fit_starts_the_codebook_with_k_means():
    model = tiny("vq")
    batches = [pixels(8, seed=seed) for seed in range(3)]

    def distance() -> float:
        latents = [model.encode(batch).latent for batch in batches]
        return sum(model.code_distances(x, model.quantize(x).indices).mean().item() for x in latents)

    before = distance()
    again = copy.deepcopy(model).fit(batches)
    assert model.fit(batches) is model and distance() < 0.5 * before
    assert torch.equal(again.quantizer.codebook, model.quantizer.codebook)
    torch.testing.assert_close(model.quantizer.codebook.norm(dim=1), torch.ones(24))
    with pytest.raises(ValueError, match="saw 15 tokens; at least one for each of the 24"):
        model.fit([pixels(1)])
    with pytest.raises(ValueError, match="max_tokens=10 is less than the 24 codes"):
        model.fit(batches, max_tokens=10)
    assert math.isfinite(distance())


@pytest.mark.parametrize("make", [tiny_discrete_tokenizer, tiny_region_tokenizer])
def test_frozen_coding_leaves_nothing_to_train_before_the_codes(make):
    model = make().train()
    side = model.image_size or 32
    pixels = torch.rand(1, 3, side, side) * 2 - 1
    assert model.encode(pixels).latent.requires_grad
    model.freeze_coding()
    latents = model.encode(pixels).latent
    found = model.quantize(latents)
    assert not latents.requires_grad and not found.latents.requires_grad
    assert model.decode(found.latents).sample.requires_grad
