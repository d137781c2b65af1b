"""FrozenEncoder: the grids are the backbone's own hidden states, for every family it is meant for."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModel

from dinotok import EncoderUnavailableError, FrozenEncoder
from dinotok.models.encoders import config_to_dict, load_pretrained_encoder, weights_digest
from tests.conftest import TINY_ENCODERS, random_pixels, save_tiny_encoder

FAMILIES = sorted(TINY_ENCODERS)


def build(family: str, **arguments) -> FrozenEncoder:
    torch.manual_seed(0)
    encoder = FrozenEncoder(TINY_ENCODERS[family], (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), **arguments)
    for parameter in encoder.parameters():  # several families start with zero position or class embeddings
        if parameter.abs().max() == 0:
            parameter.data.normal_(std=0.1)
    return encoder


def own_hidden_states(encoder: FrozenEncoder, pixels: torch.Tensor) -> list[torch.Tensor]:
    """The backbone's own `output_hidden_states`, the last after the final norm."""
    model = encoder.model
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])
    inputs = (pixels / 2 + 0.5 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    arguments = {"output_hidden_states": True}
    if model.config.model_type in ("vit", "siglip_vision_model", "clip_vision_model", "vit_mae"):
        arguments["interpolate_pos_encoding"] = True
    if model.config.model_type == "vit_mae":
        count = (inputs.shape[2] // 16) * (inputs.shape[3] // 16)
        arguments["noise"] = torch.arange(count).float().expand(len(inputs), -1)
    with torch.no_grad():
        states = list(model(inputs, **arguments).hidden_states)
    norm = getattr(model, "layernorm", None) or getattr(model, "norm", None) or model.post_layernorm
    states[-1] = norm(states[-1])
    return states


@pytest.mark.parametrize("family", FAMILIES)
def test_grids_are_the_backbones_hidden_states(family):
    encoder = build(family)
    patch = encoder.patch_size
    pixels = random_pixels(2, 3, 3 * patch, 5 * patch)
    layers = [2, 0, 3, 1]
    with torch.no_grad():
        grids = encoder(pixels, layers)
    states = own_hidden_states(encoder, pixels)
    for layer, grid in zip(layers, grids, strict=True):
        assert grid.shape == (2, 32, 3, 5)
        tokens = states[layer][:, -15:]
        for row, column in ((0, 0), (2, 4), (1, 3)):
            torch.testing.assert_close(grid[:, :, row, column], tokens[:, row * 5 + column], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_agrees_with_the_backbone_at_its_own_size(family):
    build(family).check_against_backbone()


def test_a_backbone_whose_blocks_need_more_is_refused(monkeypatch):
    encoder = build("dinov3_vit")
    own = type(encoder.model).forward

    def shifted(self, *args, **kwargs):
        output = own(self, *args, **kwargs)
        output.last_hidden_state = output.last_hidden_state + 1
        return output

    monkeypatch.setattr(type(encoder.model), "forward", shifted)
    with pytest.raises(ValueError, match="not supported"):
        encoder.check_against_backbone()


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_after_the_last_layer_wanted_are_not_computed(family):
    encoder = build(family)
    calls = []
    for index, block in enumerate(encoder.model.get_submodule(encoder._blocks_path), start=1):
        block.register_forward_hook(lambda *_, index=index: calls.append(index))
    side = 2 * encoder.patch_size
    encoder(random_pixels(1, 3, side, side), [0, 2])
    assert calls == [1, 2]
    calls.clear()
    encoder(random_pixels(1, 3, side, side), [0])
    assert calls == []


@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_in_eval_deterministic_and_transparent_to_gradients(family):
    encoder = build(family).train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    patch = encoder.patch_size
    pixels = random_pixels(1, 3, 2 * patch, 3 * patch).requires_grad_()
    first, second = encoder(pixels)[0], encoder(pixels)[0]
    assert torch.equal(first, second)
    first.square().sum().backward()
    assert pixels.grad.abs().amax((0, 1)).min() > 0  # every pixel is seen


def test_sdpa_is_used():
    assert build("dinov2").model.config._attn_implementation == "sdpa"


def test_patch_14_behind_16_pixel_tokens():
    encoder = build("dinov2_with_registers", patch_size=16)
    pixels = random_pixels(1, 3, 48, 80)
    (grid,) = encoder(pixels)
    assert grid.shape == (1, 32, 3, 5)
    resized = torch.nn.functional.interpolate(pixels, size=(42, 70), mode="bicubic", antialias=True)
    (expected,) = build("dinov2_with_registers")(resized)
    torch.testing.assert_close(grid, expected, rtol=1e-4, atol=1e-4)


def test_sum_of_the_last_layers():
    encoder = build("dinov2")
    pixels = random_pixels(1, 3, 32, 48)
    norm = encoder.model.layernorm
    second, last = encoder(pixels, [2, 3])
    expected = norm(second.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) + last
    deep, shallow = encoder.last_layers_sum(pixels, 2, also=(0,))
    torch.testing.assert_close(deep, expected)
    torch.testing.assert_close(shallow, encoder(pixels, [0])[0])
    torch.testing.assert_close(encoder.last_layers_sum(pixels, 1)[0], last)


def test_statistics_stay_float32_in_half_precision():
    encoder = build("dinov3_vit").to(torch.bfloat16)
    assert encoder.normalization.mean.dtype == torch.float32
    assert torch.equal(encoder.normalization.mean.flatten(), torch.tensor([0.4, 0.5, 0.6]))
    assert encoder(random_pixels(1, 3, 32, 48).bfloat16())[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (torch.zeros(1, 3, 60, 64), "Image size 60x64 is not a multiple of patch_size=16"),
        (torch.zeros(1, 4, 64, 64), r"\(1, 4, 64, 64\)"),
        (torch.zeros(3, 64, 64), r"\(3, 64, 64\)"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "uint8"),
        (torch.zeros(0, 3, 64, 64), r"\(0, 3, 64, 64\)"),
        (torch.zeros(1, 3, 64, 64).numpy(), "Pixels are a ndarray"),
    ],
)
def test_bad_pixels_are_named(pixels, message):
    with pytest.raises(ValueError, match=message):
        build("vit")(pixels)


def test_bad_layers_and_configs_are_named():
    with pytest.raises(ValueError, match="Layer 4 does not exist: the encoder has hidden states 0 to 3"):
        build("vit")(torch.zeros(1, 3, 32, 32), [4])
    with pytest.raises(ValueError, match="layers is empty"):
        build("vit")(torch.zeros(1, 3, 32, 32), [])
    with pytest.raises(ValueError, match="needs a 'model_type'"):
        FrozenEncoder({"hidden_size": 32})
    with pytest.raises(ValueError, match="'no_such_model' is unknown"):
        FrozenEncoder({"model_type": "no_such_model"})
    with pytest.raises(ValueError, match="not a plain vision transformer"):
        FrozenEncoder({"model_type": "convnextv2"})


def save_encoder(folder, family="dinov2", processor=True, **config):
    torch.manual_seed(1)
    model = AutoModel.from_config(AutoConfig.for_model(**{**TINY_ENCODERS[family], **config}))
    model.save_pretrained(folder)
    if processor:
        values = {"image_processor_type": "BitImageProcessor", "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5] * 3}
        (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_from_encoder_loads_weights_and_normalization(tmp_path, family):
    model = save_encoder(tmp_path, family)
    encoder = FrozenEncoder.from_encoder(str(tmp_path))
    assert encoder.normalization.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    ours = encoder.model.state_dict()
    assert ours and all(torch.equal(ours[key], model.state_dict()[key]) for key in ours)
    rebuilt = FrozenEncoder(config_to_dict(model.config))
    assert set(rebuilt.model.state_dict()) == set(ours)


def test_a_float16_checkpoint_is_computed_in_float32_and_has_its_twins_digest(tmp_path):
    encoder = FrozenEncoder.from_encoder(str(save_tiny_encoder(tmp_path, seed=5)))
    encoder.model.half().save_pretrained(tmp_path)
    loaded = FrozenEncoder.from_encoder(str(tmp_path))
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert loaded.digest() == encoder.digest()


def test_a_whole_clip_or_siglip_checkpoint_gives_its_vision_tower(tmp_path):
    vision = {key: value for key, value in TINY_ENCODERS["siglip_vision_model"].items() if key != "model_type"}
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model("siglip", vision_config=vision, text_config={**text, "vocab_size": 64})
    whole = AutoModel.from_config(config)
    whole.save_pretrained(tmp_path)
    encoder = FrozenEncoder.from_encoder(str(tmp_path), image_mean=[0.5] * 3, image_std=[0.5] * 3)
    expected = whole.vision_model.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in encoder.model.state_dict().items())


def test_missing_normalization_is_the_familys_and_said(tmp_path, caplog):
    save_encoder(tmp_path, processor=False)
    with caplog.at_level("WARNING"):
        found = load_pretrained_encoder(str(tmp_path))
    assert found.image_mean == [0.485, 0.456, 0.406]


def test_missing_and_incomplete_encoders_are_explained(tmp_path):
    with pytest.raises(EncoderUnavailableError, match="pass encoder="):
        FrozenEncoder.from_encoder(str(tmp_path / "nowhere"))
    save_encoder(tmp_path)
    from safetensors.torch import load_file, save_file

    weights = load_file(tmp_path / "model.safetensors")
    removed = next(key for key in weights if key.endswith("norm1.weight"))
    save_file({k: v for k, v in weights.items() if k != removed}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(EncoderUnavailableError, match="incomplete: 1 tensors are missing"):
        FrozenEncoder.from_encoder(str(tmp_path))


def test_digest_does_not_depend_on_precision_or_module_moves():
    encoder = build("dinov3_vit").half()
    weights = encoder.model.state_dict()
    digest = encoder.digest()
    assert digest == encoder.float().digest()
    moved = {key.replace("model.layer.", "layer."): value for key, value in weights.items()}
    assert moved.keys() != weights.keys()
    assert digest == weights_digest(moved)
    key = next(iter(weights))
    assert digest != weights_digest({**weights, key: weights[key] + 1})


@pytest.mark.data
def test_real_encoder_matches_transformers(data_folder):
    encoder = FrozenEncoder.from_encoder(str(data_folder / "encoder-vit-tiny"))
    assert encoder.normalization.mean.flatten().tolist() == [0.5, 0.5, 0.5]
    assert encoder(torch.zeros(1, 3, 96, 160), [0, 12])[1].shape == (1, 192, 6, 10)


@pytest.mark.parametrize("family", TINY_ENCODERS)
def test_class_tokens_are_known_before_any_pass(family):
    encoder = FrozenEncoder(TINY_ENCODERS[family])
    assert encoder.has_class_token == (family != "siglip_vision_model")
    size = encoder.patch_size * 2
    prefix = encoder.tokens(torch.zeros(1, 3, size, size))[0].shape[1] - 4
    assert (prefix > 0) == encoder.has_class_token
