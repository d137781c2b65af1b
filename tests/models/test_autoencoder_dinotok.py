"""AutoencoderDINOTok: the closed-form start is the optimum it claims to be, and the contracts of a VAE hold."""

import json

import pytest
import torch
import torch.nn.functional as F
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents

from dinotok import AutoencoderDINOTok, config_path
from tests.conftest import TINY_DECODER, TINY_ENCODERS, random_pixels, randomize, tiny_autoencoder

FAMILIES = sorted(TINY_ENCODERS)


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_on_every_encoder_and_non_square_pictures(family):
    model = tiny_autoencoder(family)
    pixels = random_pixels(2, 3, 48, 80)
    latents = model.encode(pixels).latent
    assert latents.shape == (2, 40, 3, 5)
    assert model.decode(latents).sample.shape == (2, 3, 48, 80)
    torch.testing.assert_close(model(pixels).sample, model.decode(latents).sample)
    assert torch.equal(model.encode(pixels, return_dict=False)[0], latents)


def test_latents_are_deep_features_then_projected_shallow_ones():
    model = tiny_autoencoder(shallow_layer=1)
    pixels = random_pixels(1, 3, 48, 64)
    shallow, deep = model.encoder(pixels, [1, 3])
    texture = model.texture_projection(shallow)
    torch.testing.assert_close(model.encode(pixels).latent, torch.cat([deep, texture], 1))


def test_encode_is_the_same_in_training_mode_and_needs_no_gradient():
    model = tiny_autoencoder().requires_grad_(True)
    pixels = random_pixels(1, 3, 32, 48)
    expected = model.eval().encode(pixels).latent
    model.train()
    assert torch.equal(model.encode(pixels).latent, expected)


# ------------------------------------------------------------------------------------------------------------- fit


def batches(count: int = 6, **sizes):
    return [random_pixels(4, 3, sizes.get("height", 48), sizes.get("width", 80), seed=seed) for seed in range(count)]


def test_fitted_latents_have_zero_mean_and_unit_variance():
    data = batches()
    model = tiny_autoencoder().fit(data)
    latents = torch.cat([model.encode(pixels).latent for pixels in data]).double()
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(40).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.var((0, 2, 3), correction=0), torch.ones(40).double(), atol=1e-3, rtol=0)
    texture = latents[:, 32:].permute(1, 0, 2, 3).flatten(1)
    torch.testing.assert_close(torch.cov(texture), torch.eye(8).double(), atol=1e-2, rtol=0)  # decorrelated, too


def test_fitted_linear_path_is_the_least_squares_optimum():
    """No other linear map from the texture channels to pixels has a smaller error on the same data."""
    data = batches()
    model = tiny_autoencoder()
    torch.nn.init.zeros_(model.decoder.conv_out.weight)
    torch.nn.init.zeros_(model.decoder.conv_out.bias)
    model.fit(iter(data), ridge=1e-9)
    rows, targets = [], []
    for pixels in data:
        rows.append(model.encode(pixels).latent[:, 32:].permute(0, 2, 3, 1).flatten(0, 2))
        targets.append(F.pixel_unshuffle(pixels, 16).permute(0, 2, 3, 1).flatten(0, 2))
    rows, targets = torch.cat(rows).double(), torch.cat(targets).double()
    design = torch.cat([rows, torch.ones(len(rows), 1).double()], 1)
    residual = targets - design @ torch.linalg.lstsq(design, targets).solution
    ours = torch.cat([(model(pixels).sample - pixels).flatten() for pixels in data]).double()
    assert ours.square().mean().item() == pytest.approx(residual.square().mean().item(), rel=1e-4)


@pytest.mark.parametrize("reads_deep", [False, True])
def test_linear_path_with_neighbours_is_the_least_squares_optimum(reads_deep):
    """Beside the convolutional path as it is, no linear map of what it reads has a smaller error on the same data."""
    data = batches()
    model = tiny_autoencoder(linear_kernel_size=3, linear_reads_deep=reads_deep).fit(data)
    own_patch = torch.cat([model(pixels).sample - pixels for pixels in data]).square().mean().item()
    randomize(model.decoder)
    model.fit_linear_decoder(iter(data), ridge=1e-9)
    rows, targets = [], []
    for pixels in data:
        latents = model.encode(pixels).latent
        padded = F.pad(latents[:, 32:], (1, 1, 1, 1), mode="replicate")
        windows = padded.unfold(2, 3, 1).unfold(3, 3, 1)  # (B, C, h, w, 3, 3)
        rows.append(windows.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(0, 2))
        if reads_deep:  # one channel less: after the layer norm they sum to zero
            rows[-1] = torch.cat([rows[-1], latents[:, :31].permute(0, 2, 3, 1).flatten(0, 2)], 1)
        lacking = pixels - model.decoder(latents)
        targets.append(F.pixel_unshuffle(lacking, 16).permute(0, 2, 3, 1).flatten(0, 2))
    rows, targets = torch.cat(rows).double(), torch.cat(targets).double()
    design = torch.cat([rows, torch.ones(len(rows), 1).double()], 1)
    best = (targets - design @ torch.linalg.lstsq(design, targets).solution).square().mean().item()
    ours = torch.cat([model(pixels).sample - pixels for pixels in data]).square().mean().item()
    assert ours == pytest.approx(best, rel=1e-4, abs=1e-6)
    assert ours < own_patch


def test_a_wide_linear_path_starts_as_the_narrow_one():
    pixels = random_pixels(2, 3, 48, 80)
    narrow, wide = (tiny_autoencoder(linear_kernel_size=size).fit(batches()) for size in (1, 3))
    wide.decoder.load_state_dict(narrow.decoder.state_dict())
    torch.testing.assert_close(wide(pixels).sample, narrow(pixels).sample)


def test_no_projection_of_the_same_width_loses_less_of_the_pixels():
    """The error is the smallest of any rank-8 map, and that of the PCA projection is larger."""
    data = batches()
    model = tiny_autoencoder(shallow_layer=1)
    torch.nn.init.zeros_(model.decoder.conv_out.weight)
    torch.nn.init.zeros_(model.decoder.conv_out.bias)
    errors = {}
    for projection in ("regression", "pca"):
        model.fit(data, ridge=1e-10, projection=projection)
        errors[projection] = torch.cat([(model(p).sample - p).flatten() for p in data]).square().mean().item()
    rows = lambda grid: grid.permute(0, 2, 3, 1).flatten(0, 2).double()  # noqa: E731
    x = torch.cat([rows(model.encoder(pixels, [1])[0]) for pixels in data])
    y = torch.cat([rows(F.pixel_unshuffle(pixels, 16)) for pixels in data])
    x, y = x - x.mean(0), y - y.mean(0)
    fitted = x @ torch.linalg.lstsq(x, y).solution
    dropped = torch.linalg.svdvals(fitted)[8:].square().sum()  # Eckart and Young
    best = ((y - fitted).square().sum() + dropped).item() / y.numel()
    assert errors["regression"] == pytest.approx(best, rel=1e-3)
    assert errors["pca"] > 1.02 * best


def test_pca_projection_spans_the_principal_components():
    data = batches()
    model = tiny_autoencoder(shallow_layer=2).fit(data, projection="pca")
    shallow = torch.cat([model.encoder(pixels, [2])[0] for pixels in data]).permute(1, 0, 2, 3).flatten(1).double()
    _, vectors = torch.linalg.eigh(torch.cov(shallow))
    principal = vectors[:, -8:]
    span = torch.linalg.qr(model.texture_projection.weight[:, :, 0, 0].double().T)[0]
    torch.testing.assert_close(torch.linalg.svdvals(principal.T @ span), torch.ones(8).double(), atol=1e-4, rtol=0)


def test_deep_only_is_the_same_model_without_texture():
    model = tiny_autoencoder(texture_channels=0)
    assert model.config.latent_channels == 32 and not hasattr(model, "texture_projection")
    torch.nn.init.zeros_(model.decoder.conv_out.weight)
    torch.nn.init.zeros_(model.decoder.conv_out.bias)
    data = batches()
    before = F.mse_loss(model(data[0]).sample, data[0])
    model.fit(data)
    after = F.mse_loss(model(data[0]).sample, data[0])
    assert after < data[0].var() < before
    assert model.encode(data[0]).latent.shape == (4, 32, 3, 5)


def test_deep_part_can_be_the_sum_of_the_last_layers():
    model = tiny_autoencoder(deep_layers=2, texture_channels=0)
    pixels = random_pixels(1, 3, 32, 48)
    torch.testing.assert_close(model.encode(pixels).latent, model.encoder.last_layers_sum(pixels, 2)[0])


def test_statistics_can_be_measured_again_without_changing_reconstructions():
    data = batches()
    model = tiny_autoencoder().fit(data)
    randomize(model.texture_projection, seed=3)
    reconstruction = model(data[0]).sample
    model.fit_latents_statistics(data)
    torch.testing.assert_close(model(data[0]).sample, reconstruction, atol=1e-4, rtol=1e-4)
    latents = torch.cat([model.encode(pixels).latent for pixels in data]).double()
    torch.testing.assert_close(latents.std((0, 2, 3), correction=0), torch.ones(40).double(), atol=1e-3, rtol=0)
    assert model.config.latents_mean == model.latents_mean.tolist()


def test_channels_that_never_vary_keep_their_scale():
    """Pictures of one colour: there is nothing to fit, and nothing may be divided by zero."""
    model = tiny_autoencoder()
    model.fit_latents_statistics([torch.full((8, 3, 48, 80), 0.25)])
    model.texture_projection.weight.data.zero_()
    model.fit_latents_statistics(batches(2))
    assert torch.equal(model.latents_std[32:], torch.ones(8))
    assert model.encode(batches()[0]).latent.isfinite().all()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([torch.zeros(1, 3, 48, 50)], "Batch 0: Image size 48x50"),
        ([random_pixels(2, 3, 32, 48), torch.full((1, 3, 32, 32), 1.5)], r"Batch 1: pixels must lie in \[-1, 1\]"),
        ([torch.full((1, 3, 32, 32), torch.nan)], "Batch 0: pixels must lie in"),
        (["photo.jpg"], "Batch 0: Pixels are a str"),
        ([torch.zeros(0, 3, 32, 32)], r"Batch 0: Pixels must have shape .* got \(0, 3, 32, 32\)"),
        ([random_pixels(1, 3, 32, 32)], "fit saw 4 tokens; at least 33"),
        ([], "0 tokens"),
    ],
)
def test_fit_names_what_is_wrong(data, message):
    with pytest.raises(ValueError, match=message):
        tiny_autoencoder().fit(data)


# ---------------------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"patch_size": 8}, "patch_size=8 needs"),
        ({"shallow_layer": 4}, "shallow_layer=4 does not exist"),
        ({"deep_layers": 0}, "deep_layers=0"),
        ({"linear_kernel_size": 2}, "linear_kernel_size=2 must be odd"),
        ({"linear_reads_deep": True, "texture_channels": 0}, "linear_reads_deep=True needs texture_channels"),
        ({"texture_channels": -1}, "texture_channels=-1"),
        ({"texture_channels": 33}, "texture_channels=33 must lie between 0 and 32"),
        ({"latent_channels": 7}, "latent_channels=7"),
        ({"latents_mean": [0.0]}, "latents_mean has 1 values"),
        ({"latents_std": [0.0] * 40}, "latents_std must be positive"),
        ({"latents_mean": [float("nan")] * 40}, "latents_mean contains NaN"),
        ({"latents_std": [float("inf")] * 40}, "latents_std contains NaN or infinite"),
    ],
)
def test_configs_that_do_not_fit_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        AutoencoderDINOTok(**{"encoder_config": TINY_ENCODERS["vit"], "texture_channels": 8, **TINY_DECODER, **values})


@pytest.mark.parametrize(
    ("name", "encoder"),
    [
        ("autoencoder_dinotok_dinov3_base", "dinov3_vit"),
        ("autoencoder_dinotok_dinov2_base", "dinov2"),
        ("autoencoder_dinotok_dinov2_with_registers_base", "dinov2_with_registers"),
    ],
)
def test_paper_size_configs_build(name, encoder):
    with torch.device("meta"):
        model = AutoencoderDINOTok.from_config(json.loads(config_path(name).read_text()))
    assert model.config.latent_channels == 832
    assert model.encoder.model.config.model_type == encoder
    assert sum(parameter.numel() for parameter in model.encoder.parameters()) == pytest.approx(86e6, rel=0.02)
    assert model.decoder.conv_in.weight.shape == (512, 832, 3, 3)
    assert [block.resnets[0].conv1.out_channels for block in model.decoder.up_blocks] == [512, 256, 256, 128, 128]


def test_a_new_model_normalises_as_told_and_its_convolutional_decoder_starts_at_zero():
    statistics = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    model = AutoencoderDINOTok(TINY_ENCODERS["vit"], texture_channels=8, **statistics, **TINY_DECODER)
    assert model.encoder.normalization.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert model.encoder.normalization.std.flatten().tolist() == pytest.approx([0.4, 0.5, 0.6])
    assert model.decoder(torch.randn(1, 40, 2, 3)).abs().max() == 0


def test_unknown_config_names_the_known_ones():
    with pytest.raises(ValueError, match="autoencoder_dinotok_dinov3_base"):
        config_path("nope")


# ------------------------------------------------------------------------------------------- contracts of diffusers


def test_retrieve_latents_of_diffusers_reads_the_output(autoencoder):
    output = autoencoder.encode(random_pixels(1, 3, 32, 48))
    for mode in ("sample", "argmax"):
        assert torch.equal(retrieve_latents(output, torch.Generator().manual_seed(0), mode), output.latent)
    assert torch.equal(output.latents, output.latent)


def test_what_pipelines_read_from_the_config(autoencoder):
    config = autoencoder.config
    assert 2 ** (len(config.block_out_channels) - 1) == config.patch_size
    assert (config.scaling_factor, config.shift_factor, config.force_upcast) == (1.0, 0.0, False)
    assert config.latent_channels == 40


def test_bad_latents_are_named(autoencoder):
    with pytest.raises(ValueError, match=r"\(B, 40, h, w\), got \(1, 4, 3, 5\)"):
        autoencoder.decode(torch.zeros(1, 4, 3, 5))
    with pytest.raises(ValueError, match="33x48"):
        autoencoder.encode(torch.zeros(1, 3, 33, 48))


def test_slicing_gives_the_same_and_sees_one_picture_at_a_time(autoencoder):
    pixels = random_pixels(3, 3, 32, 48)
    expected = autoencoder(pixels).sample
    seen = []
    autoencoder.decoder.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[0]))
    autoencoder.enable_slicing()
    torch.testing.assert_close(autoencoder(pixels).sample, expected, rtol=1e-4, atol=1e-5)
    assert seen == [1, 1, 1]
    autoencoder.disable_slicing()
    autoencoder(pixels)
    assert seen[3:] == [3]


def test_tiling_bounds_what_every_part_sees(autoencoder):
    pixels = random_pixels(1, 3, 96, 160)
    shapes = []
    autoencoder.decoder.register_forward_hook(lambda _, inputs, __: shapes.append(tuple(inputs[0].shape[2:])))
    autoencoder.encoder.register_forward_hook(lambda _, inputs, __: shapes.append(tuple(inputs[0].shape[2:])))
    autoencoder.enable_tiling(64, 32)
    assert autoencoder(pixels).sample.shape == (1, 3, 96, 160)
    assert set(shapes) <= {(4, 4)} and len(shapes) == 8
    autoencoder.disable_tiling()
    shapes.clear()
    autoencoder(pixels)
    assert (6, 10) in shapes


def test_tiling_leaves_a_picture_of_one_tile_alone(autoencoder):
    pixels = random_pixels(1, 3, 48, 64)
    expected = autoencoder(pixels).sample
    autoencoder.enable_tiling(64)
    assert torch.equal(autoencoder(pixels).sample, expected)


def test_tiled_closed_form_reconstruction_is_close_to_the_untiled_one():
    """The fitted linear path looks at one patch only, so tiles can only differ through position embeddings."""
    data = batches(height=64, width=64)
    model = tiny_autoencoder().fit(data)
    torch.nn.init.zeros_(model.decoder.conv_out.weight)
    torch.nn.init.zeros_(model.decoder.conv_out.bias)
    pixels = random_pixels(1, 3, 96, 144, seed=9)
    expected = model(pixels).sample
    model.enable_tiling(64, 16)
    torch.testing.assert_close(model(pixels).sample, expected, atol=1e-4, rtol=1e-3)


def test_default_tiles_are_512_pixels_and_share_a_quarter(autoencoder):
    autoencoder.enable_tiling()
    assert (autoencoder.tile_size, autoencoder.tile_overlap) == (512, 128)
    autoencoder.enable_tiling(96)
    assert autoencoder.tile_overlap == 16  # whole patches
    assert autoencoder(random_pixels(1, 3, 16, 240)).sample.shape == (1, 3, 16, 240)


@pytest.mark.parametrize(
    ("arguments", "message"), [((60,), "tile_size=60"), ((64, 8), "tile_overlap=8"), ((64, 64), "less")]
)
def test_bad_tiles_are_named(autoencoder, arguments, message):
    with pytest.raises(ValueError, match=message):
        autoencoder.enable_tiling(*arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_statistics_and_stays_close(dtype):
    data = batches(2)
    model = tiny_autoencoder().fit([*data, *batches()])
    expected = model(data[0]).sample
    mean = model.latents_mean.clone()
    model.to(dtype)
    assert model.latents_mean.dtype == model.decoder_input.std.dtype == torch.float32
    assert torch.equal(model.latents_mean, mean)
    sample = model(data[0].to(dtype)).sample
    assert sample.dtype == model.encode(data[0].to(dtype)).latent.dtype == dtype
    assert (sample.float() - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_gradient_checkpointing_of_the_decoder_changes_nothing():
    pixels = random_pixels(1, 3, 32, 48)
    gradients = []
    for checkpointing in (False, True):
        model = tiny_autoencoder().train()
        if checkpointing:
            model.enable_gradient_checkpointing()
            assert model.decoder.gradient_checkpointing
        model(pixels).sample.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert "texture_projection.weight" in gradients[0] and not any(name.startswith("encoder") for name in gradients[0])
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["dinov3_vit", "dinov2_with_registers", "vit_mae"])
def test_encode_and_decode_compile_whole(family):
    torch._dynamo.reset()
    model = tiny_autoencoder(family).requires_grad_(False)
    pixels = random_pixels(1, 3, 48, 80)
    latents = torch.compile(model.encode, fullgraph=True)(pixels, return_dict=False)[0]
    torch.testing.assert_close(latents, model.encode(pixels).latent, rtol=1e-3, atol=1e-4)
    sample = torch.compile(model.decode, fullgraph=True)(latents, return_dict=False)[0]
    torch.testing.assert_close(sample, model.decode(latents).sample, rtol=1e-3, atol=1e-3)


def test_training_reduces_the_error_below_the_closed_form_start():
    data = batches(3)
    model = tiny_autoencoder().fit(data)
    torch.nn.init.zeros_(model.decoder.conv_out.weight)
    torch.nn.init.zeros_(model.decoder.conv_out.bias)
    start = F.mse_loss(model(data[0]).sample, data[0]).item()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-3)
    model.train()
    for _ in range(30):
        loss = F.mse_loss(model(data[0]).sample, data[0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert F.mse_loss(model.eval()(data[0]).sample, data[0]).item() < 0.9 * start


@pytest.mark.data
def test_closed_form_start_on_real_photographs(data_folder):
    """The number of the README, on fewer pictures: fitted on 60 training photographs, scored on 20 others."""
    import io

    import numpy as np
    import pyarrow.parquet as pq
    from PIL import Image

    def pictures(split: str, count: int) -> torch.Tensor:
        table = pq.read_table(data_folder / "imagenette" / f"imagenette_224_{split}.parquet", columns=["image"])
        rows = table.column("image").take(list(range(0, table.num_rows, table.num_rows // count)))[:count].to_pylist()
        images = [
            Image.open(io.BytesIO(row["bytes"] if isinstance(row, dict) else row)).convert("RGB") for row in rows
        ]
        return torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1) for i in images]).float() / 127.5 - 1

    model = AutoencoderDINOTok.from_encoder(str(data_folder / "encoder-vit-tiny"), **TINY_DECODER)
    model.fit(pictures("train", 60).split(20))
    held_out = pictures("val", 20)
    with torch.no_grad():
        error = ((model(held_out).sample.clamp(-1, 1) - held_out) / 2).square().mean((1, 2, 3))
    assert -10 * error.log10().mean() > 25


def test_an_average_of_weights_by_diffusers_keeps_the_decoders_statistics(tmp_path):
    """`EMAModel.save_pretrained` rebuilds the model from its config and copies parameters only."""
    from diffusers.training_utils import EMAModel

    model = tiny_autoencoder().fit(batches())
    ema = EMAModel(model.parameters(), model_cls=AutoencoderDINOTok, model_config=model.config)
    ema.save_pretrained(tmp_path)
    pixels = random_pixels(1, 3, 48, 32)
    loaded = AutoencoderDINOTok.from_pretrained(tmp_path)
    assert torch.equal(loaded(pixels).sample, model(pixels).sample)
