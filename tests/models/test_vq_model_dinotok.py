"""VQModelDINOTok: indices are the picture; fit, updates, checkpoints and processes agree."""

import copy
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from dinotok import AutoencoderDINOTok, VQModelDINOTok
from dinotok.models.discrete import DiscreteTokenizer
from dinotok.models.quantizers import CodeCounter
from tests.conftest import random_pixels, randomize, save_tiny_encoder, tiny_autoencoder

SIZES = {"semantic_codebook_size": 24, "texture_codebook_size": 16, "rank": 8}
# Arguments of the autoencoder, and what the VQ model adds.
VARIANTS = {
    "two codebooks": ({}, {}),
    "no texture codebook": ({}, {"texture_codebook_size": 0}),
    "first texture channels": ({}, {"texture_rank": 3}),
    "a linear path that reads all": ({}, {"texture_rank": 3, "linear_kernel_size": 3, "linear_reads_deep": True}),
    "joint codebook": ({}, {"joint_codebook": True}),
    "deep features only": ({"texture_channels": 0}, {}),
    "cosine": ({}, {"cosine": True}),
    "reweighted": ({}, {"rank": None, "eigenvalue_power": 0.25}),
}
each_variant = pytest.mark.parametrize("variant", VARIANTS)


def batches(count: int = 4) -> list[torch.Tensor]:
    return [random_pixels(4, 3, 48, 80, seed=seed) for seed in range(count)]


@cache
def _autoencoder(texture_channels: int) -> AutoencoderDINOTok:
    model = tiny_autoencoder(texture_channels=texture_channels).fit(batches())
    randomize(model.linear_decoder)
    return model


@cache
def _model(variant: str) -> VQModelDINOTok:
    autoencoder, options = VARIANTS[variant]
    return VQModelDINOTok.from_autoencoder(fitted_autoencoder(**autoencoder), **{**SIZES, **options}).fit(batches())


def fitted_autoencoder(texture_channels: int = 8) -> AutoencoderDINOTok:
    return copy.deepcopy(_autoencoder(texture_channels))


def build(variant: str = "two codebooks") -> VQModelDINOTok:
    """A tiny model with fitted codebooks and random weights in every trained layer."""
    return copy.deepcopy(_model(variant))


def quantizer_state(model: VQModelDINOTok) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items() if "_quantizer." in key}


def assert_same_state(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for key, value in ours.items():
        assert value.dtype == expected[key].dtype and torch.equal(value, expected[key]), key


# --------------------------------------------------------------------------------------------- indices are the picture


def assert_indices_are_the_picture(model: VQModelDINOTok, pixels: torch.Tensor) -> None:
    indices = model.encode_to_indices(pixels)
    height, width = (side // model.patch_size for side in pixels.shape[2:])
    assert indices.shape == (len(pixels), model.num_codebooks, height, width) and indices.dtype == torch.int64
    decoded = model.decode(model.indices_to_latents(indices)).sample
    assert torch.equal(decoded, model(pixels).sample)
    latents = model.encode(pixels).latent
    output = model.quantize(latents)
    codes = model.indices_to_latents(output.indices)
    assert torch.equal(output.indices, indices)
    assert torch.equal(output.latents, codes) and output.latents.dtype == codes.dtype == model.dtype
    assert output.latents.shape == latents.shape


@each_variant
def test_decoding_the_indices_is_the_forward_pass(variant):
    model, pixels = build(variant), random_pixels(3, 3, 64, 48, seed=7)
    assert isinstance(model, DiscreteTokenizer)
    names = {"joint codebook": ["joint"], "no texture codebook": ["semantic"], "deep features only": ["semantic"]}
    assert list(model.codebook_sizes) == names.get(variant, ["semantic", "texture"])
    assert_indices_are_the_picture(model, pixels)
    with torch.no_grad():
        assert_indices_are_the_picture(model, pixels)
    assert_indices_are_the_picture(model.train(), pixels)
    with torch.autocast("cpu", torch.bfloat16):
        assert_indices_are_the_picture(model, pixels)
    model.enable_tiling(32, 16)
    assert_indices_are_the_picture(model, pixels)
    model.disable_tiling()
    model.enable_slicing()
    assert_indices_are_the_picture(model, pixels)
    assert_indices_are_the_picture(model.to(torch.bfloat16), pixels.bfloat16())
    assert model.quantize(torch.zeros(1, model.latent_channels, 2, 3)).latents.dtype == torch.bfloat16


def test_each_part_is_quantized_by_its_own_codebook():
    model, pixels = build(), random_pixels(2, 3, 48, 64, seed=7)
    latents = model.encode(pixels).latent
    features = latents * model.latents_std[:, None, None] + model.latents_mean[:, None, None]
    output = model.quantize(latents)
    semantic, texture = model.semantic_quantizer(features[:, :32]), model.texture_quantizer(features[:, 32:])
    assert torch.equal(output.indices, torch.stack([semantic.indices, texture.indices], 1))
    assert torch.equal(output.loss, texture.loss) and output.loss > 0
    assert torch.equal(model(pixels).commit_loss, output.loss)
    expected = torch.cat([semantic.latents, texture.latents], 1) - model.latents_mean[:, None, None]
    torch.testing.assert_close(output.latents, expected / model.latents_std[:, None, None])


def test_texture_off_decodes_the_mean_texture():
    model = build("no texture codebook")
    output = model.quantize(model.encode(random_pixels(2, 3, 48, 64, seed=7)).latent)
    torch.testing.assert_close(output.latents[:, 32:], torch.zeros(2, 8, 3, 4))
    assert output.latents[:, :32].std() > 0.3


def test_texture_beyond_its_rank_is_at_its_mean():
    model = build("first texture channels")
    with torch.no_grad():
        model.texture_projection.bias.add_(1)  # the mean is 0 otherwise
    model.fit_latents_statistics(batches())
    pixels = random_pixels(2, 3, 48, 80)
    latents = model.encode(pixels).latent
    texture = model.latents_affine.denormalize(model.quantize(latents).latents)[:, 32:]
    mean = model.latents_mean[32:, None, None]
    torch.testing.assert_close(texture[:, 3:], mean[3:].expand_as(texture[:, 3:]), atol=1e-5, rtol=1e-5)
    assert model.texture_quantizer.codebook.shape == (16, 3)
    changed = latents.clone()
    changed[:, 35:] += 1
    assert torch.equal(model.quantize(changed).indices, model.quantize(latents).indices)
    with pytest.raises(ValueError, match="texture_rank=9 must lie between 1 and 8"):
        VQModelDINOTok.from_autoencoder(fitted_autoencoder(), **SIZES, texture_rank=9)


def test_tiled_indices_are_those_of_the_blended_latents():
    model, pixels = build(), random_pixels(1, 3, 64, 96, seed=7)
    untiled = model.encode(pixels).latent
    model.enable_tiling(48, 32)
    tiled = model.encode(pixels).latent
    assert not torch.equal(tiled, untiled)
    assert torch.equal(model.encode_to_indices(pixels), model.quantize(tiled).indices)


@each_variant
def test_the_gradient_goes_straight_through(variant):
    model = build(variant)
    latents = model.encode(random_pixels(1, 3, 48, 64)).latent.detach().requires_grad_()
    upstream = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad((model.quantize(latents).latents * upstream).sum(), latents)
    assert torch.equal(gradient, upstream)


@each_variant
def test_training_reaches_every_trainable_weight(variant):
    """Distributed training needs no search for unused parameters."""
    model = build(variant).train()
    pixels = random_pixels(2, 3, 48, 64)
    output = model(pixels)
    (F.mse_loss(output.sample, pixels) + output.commit_loss).backward()
    unused = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not unused
    assert not any(name.startswith("semantic_quantizer") for name, _ in model.named_parameters())


def test_joint_commitment_loss_is_weighted():
    model = build("joint codebook")
    output = model.quantize(model.encode(random_pixels(1, 3, 48, 64, seed=7)).latent)
    assert output.loss.item() == pytest.approx(0.25 * output.commitment_loss.item()) and output.loss > 0


@each_variant
def test_code_distances_are_least_at_the_chosen_codes(variant):
    model = build(variant)
    latents = model.encode(random_pixels(1, 3, 48, 64, seed=7)).latent
    chosen = model.quantize(latents).indices
    least = model.code_distances(latents, chosen)
    assert least.shape == chosen.shape
    assert (model.code_distances(latents, (chosen + 1) % 16) >= least - 1e-4).all()


def test_gradient_checkpointing_changes_nothing():
    model, pixels = build().train(), random_pixels(2, 3, 48, 64)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        output = model(pixels)
        (output.sample.square().mean() + output.commit_loss).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["two codebooks", "joint codebook", "no texture codebook"])
def test_both_directions_compile_whole(variant):
    torch._dynamo.reset()
    model, pixels = build(variant).requires_grad_(False), random_pixels(2, 3, 48, 80)
    indices = torch.compile(model.encode_to_indices, fullgraph=True)(pixels)
    assert (indices == model.encode_to_indices(pixels)).float().mean() > 0.95  # kernels round differently

    def decode(indices: torch.Tensor) -> torch.Tensor:
        return model.decode(model.indices_to_latents(indices), return_dict=False)[0]

    torch.testing.assert_close(torch.compile(decode, fullgraph=True)(indices), decode(indices), rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------------------------------- from an autoencoder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_autoencoder_copies_and_does_not_share(dtype):
    autoencoder, pixels = fitted_autoencoder().to(dtype), random_pixels(1, 3, 48, 64).to(dtype)
    expected, latents = autoencoder(pixels).sample, autoencoder.encode(pixels).latent
    model = VQModelDINOTok.from_autoencoder(autoencoder, **SIZES)
    assert model.dtype == dtype and not model.training
    assert torch.equal(model.encode(pixels).latent, latents)
    assert torch.equal(model.decode(latents).sample, expected)
    ours = {value.untyped_storage().data_ptr() for value in model.state_dict().values()}
    assert not ours & {value.untyped_storage().data_ptr() for value in autoencoder.state_dict().values()}
    model.fit(batches() if dtype == torch.float32 else [batch.to(dtype) for batch in batches()])
    randomize(model, seed=3)
    assert torch.equal(autoencoder(pixels).sample, expected)


def test_the_linear_path_is_fitted_to_the_codes():
    """It beats the autoencoder's on quantized latents, and neighbours help further."""
    data, errors = batches(), []
    for size in (None, 1, 3):
        model = VQModelDINOTok.from_autoencoder(fitted_autoencoder(), **SIZES, linear_kernel_size=size or 1).fit(data)
        if size:
            model.fit_linear_decoder(data)
        errors.append(torch.cat([model(pixels).sample - pixels for pixels in data]).square().mean().item())
    assert errors[0] > errors[1] > errors[2]


def test_a_wider_linear_path_than_the_autoencoders_begins_alike():
    pixels = random_pixels(1, 3, 48, 64)
    model = VQModelDINOTok.from_autoencoder(fitted_autoencoder(), **SIZES, linear_kernel_size=3)
    latents = model.encode(pixels).latent
    torch.testing.assert_close(model.decode(latents).sample, fitted_autoencoder()(pixels).sample)
    with pytest.raises(ValueError, match="kernel of 3 does not fit into one of 1"):
        VQModelDINOTok.from_autoencoder(tiny_autoencoder(linear_kernel_size=3), **SIZES, linear_kernel_size=1)


def test_from_autoencoder_needs_one_that_fits():
    with pytest.raises(RuntimeError, match="size mismatch"):
        VQModelDINOTok.from_autoencoder(tiny_autoencoder(), **SIZES, shallow_layer=1, block_out_channels=(4,) * 5)


# ----------------------------------------------------------------------------------------------------------------- fit


def test_fit_uses_the_codes_and_keeps_the_statistics():
    model = build()
    data = batches()
    counters = [CodeCounter(24), CodeCounter(16)]
    for pixels in data:
        for counter, indices in zip(counters, model.encode_to_indices(pixels).unbind(1), strict=True):
            counter.update(indices)
    assert all(counter.compute().usage >= 0.95 for counter in counters)
    assert all(counter.compute().num_tokens == 4 * 60 for counter in counters)
    deep = torch.cat([model.encoder(pixels, [3])[0] for pixels in data]).permute(1, 0, 2, 3).flatten(1).double()
    quantizer = model.semantic_quantizer
    torch.testing.assert_close(quantizer.mean.double(), deep.mean(1), rtol=1e-4, atol=1e-4)
    variances, basis = torch.linalg.eigh(torch.cov(deep, correction=0))
    torch.testing.assert_close(quantizer.eigenvalues.double(), variances.flip(0), rtol=1e-3, atol=1e-5)
    overlap = torch.linalg.svdvals(basis[:, -8:].T @ quantizer.components.double())
    torch.testing.assert_close(overlap, torch.ones(8).double(), rtol=0, atol=1e-3)
    assert quantizer.token_count == 240
    assert bytes(quantizer.encoder_digest.tolist()).hex() == model.encoder.digest()


def test_fit_lowers_the_error_and_more_codes_lower_it_further():
    errors = []
    for size in (4, 16, 64):
        model = VQModelDINOTok.from_autoencoder(
            fitted_autoencoder(), semantic_codebook_size=size, texture_codebook_size=size, rank=32
        )
        latents = [model.encode(pixels).latent for pixels in batches()]
        model.fit_codebooks(latents)
        errors.append(sum((model.quantize(batch).latents - batch).square().mean().item() for batch in latents))
    assert errors[2] < 0.8 * errors[1] < 0.8 * 0.95 * errors[0]


@each_variant
def test_fit_from_pictures_and_from_latents_agree_and_repeat(variant):
    model, again = build(variant), build(variant).fit(batches())
    assert_same_state(quantizer_state(model), quantizer_state(again))
    again.fit_codebooks(model.encode(pixels).latent for pixels in batches())
    assert_same_state(quantizer_state(model), quantizer_state(again))
    again.fit(batches(), generator=torch.Generator().manual_seed(1))
    assert not torch.equal(again.semantic_quantizer.codebook, model.semantic_quantizer.codebook)


def test_fit_on_a_sample_of_the_tokens_is_nearly_as_good():
    model, latents = build(), [tiny.latent for tiny in map(build().encode, batches())]

    def error() -> float:
        return sum((model.quantize(batch).latents - batch).square().mean().item() for batch in latents)

    everything = error()
    model.fit_codebooks(latents, max_tokens=120)
    assert model.semantic_quantizer.token_count == 240  # the subspace is that of all tokens
    assert everything < error() < 1.25 * everything


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ([random_pixels(1, 3, 32, 48)], {}, "fit saw 6 tokens; at least one for each of the 24"),
        ([], {}, "fit saw 0 tokens"),
        ([random_pixels(4, 3, 48, 80)], {"max_tokens": 23}, "max_tokens=23 is less than the 24 codes"),
        ([torch.full((1, 3, 32, 32), torch.nan)], {}, "Batch 0: pixels must lie in"),
    ],
)
def test_fit_names_what_is_wrong_and_leaves_the_model_alone(data, options, message):
    model = build()
    before = quantizer_state(model)
    with pytest.raises(ValueError, match=message):
        model.fit(data, **options)
    assert_same_state(quantizer_state(model), before)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 33}, "rank=33 must lie between 1 and the 32"),
        ({"eigenvalue_power": -1.0}, "eigenvalue_power=-1.0"),
        ({"semantic_codebook_size": 0}, "codebook_size=0"),
        ({"ema_decay": 1.5}, "ema_decay=1.5"),
    ],
)
def test_configs_that_do_not_fit_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        VQModelDINOTok.from_autoencoder(fitted_autoencoder(), **{**SIZES, **values})


def test_bad_latents_and_indices_are_named():
    model = build()
    with pytest.raises(ValueError, match=r"\(B, 40, h, w\), got \(1, 39, 2, 2\)"):
        model.quantize(torch.zeros(1, 39, 2, 2))
    with pytest.raises(ValueError, match=r"\(B, 2, h, w\), got \(1, 1, 2, 2\)"):
        model.indices_to_latents(torch.zeros(1, 1, 2, 2, dtype=torch.int64))
    for bad in ([24, 0], [0, 16], [-1, 0]):
        with pytest.raises(ValueError, match="Indices must lie in"):
            model.indices_to_latents(torch.tensor(bad).view(1, 2, 1, 1))


# ---------------------------------------------------------------------------------------------- precision, checkpoints


@each_variant
def test_self_contained_checkpoints_round_trip(tmp_path, variant):
    model, pixels = build(variant), random_pixels(1, 3, 48, 64, seed=7)
    model.update_codebook(model.encode(pixels).latent)
    model.save_pretrained(tmp_path)
    loaded = VQModelDINOTok.from_pretrained(tmp_path)
    assert_same_state(loaded.state_dict(), model.state_dict())
    assert torch.equal(loaded(pixels).sample, model(pixels).sample)
    latents = model.encode(pixels).latent
    assert loaded.update_codebook(latents) == model.update_codebook(latents)  # moving averages go on as before
    assert_same_state(quantizer_state(loaded), quantizer_state(model))


def test_checkpoints_without_the_encoder_round_trip(tmp_path):
    folder = save_tiny_encoder(tmp_path / "encoder", seed=5)
    config = {"texture_channels": 8, "block_out_channels": (8, 8, 8, 8, 8), "norm_num_groups": 4}
    autoencoder = AutoencoderDINOTok.from_encoder(str(folder), **config).fit(batches())
    model = VQModelDINOTok.from_autoencoder(autoencoder, **SIZES).fit(batches())
    model.save_pretrained(tmp_path / "slim", include_encoder=False)
    keys = load_file(tmp_path / "slim" / "diffusion_pytorch_model.safetensors").keys()
    assert not any(key.startswith("encoder.") for key in keys)
    loaded = VQModelDINOTok.from_pretrained(tmp_path / "slim", encoder=folder)
    assert_same_state(loaded.state_dict(), model.state_dict())
    digest = bytes(loaded.semantic_quantizer.encoder_digest.tolist()).hex()
    assert digest == loaded.config.encoder_digest == loaded.encoder.digest()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_quantizers_whole(tmp_path, dtype):
    model = build()
    state, latents = quantizer_state(model), model.encode(random_pixels(2, 3, 48, 64, seed=7)).latent
    expected = model.quantize(latents)
    model.save_pretrained(tmp_path)
    for half in (VQModelDINOTok.from_pretrained(tmp_path, torch_dtype=dtype), model.to(dtype)):
        assert half.dtype == dtype and half.decoder.conv_in.weight.dtype == dtype
        assert_same_state(quantizer_state(half), state)
        output = half.quantize(latents)
        assert torch.equal(output.indices, expected.indices)
        assert output.latents.dtype == dtype and torch.equal(output.latents, expected.latents.to(dtype))


def test_checkpoints_of_the_other_class_are_named(tmp_path):
    fitted_autoencoder().save_pretrained(tmp_path / "autoencoder")
    build().save_pretrained(tmp_path / "vq")
    with pytest.raises(ValueError, match="holds a AutoencoderDINOTok, not a VQModelDINOTok"):
        VQModelDINOTok.from_pretrained(tmp_path / "autoencoder")
    with pytest.raises(ValueError, match="holds a VQModelDINOTok, not a AutoencoderDINOTok"):
        AutoencoderDINOTok.from_pretrained(tmp_path / "vq")


# ----------------------------------------------------------------------------------------------------------- processes


def _fit_on_my_share(rank: int, address: str, folder: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    model = VQModelDINOTok.from_pretrained(folder / "model")
    model.fit(batches()[3 * rank :][:3], generator=torch.Generator().manual_seed(rank))  # 180 and 60 tokens
    torch.save(quantizer_state(model), folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_fit_the_same_codebooks(tmp_path):
    model = build()
    model.save_pretrained(tmp_path / "model")
    torch.multiprocessing.spawn(_fit_on_my_share, (f"file://{tmp_path / 'rendezvous'}", tmp_path), nprocs=2)
    states = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    assert_same_state(*states)
    assert states[0]["semantic_quantizer.token_count"] == 240
    torch.testing.assert_close(states[0]["semantic_quantizer.eigenvalues"], model.semantic_quantizer.eigenvalues)
    latents = [model.encode(pixels).latent for pixels in batches()]

    def error() -> float:
        return sum((model.quantize(batch).latents - batch).square().mean().item() for batch in latents)

    expected = error()
    model.load_state_dict({**model.state_dict(), **states[0]})
    assert 0.8 * expected < error() < 1.2 * expected
