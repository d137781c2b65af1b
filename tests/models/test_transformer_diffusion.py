"""The denoiser: laws of its architecture, precision, memory options and adapters."""

import json

import pytest
import torch
from diffusers.training_utils import EMAModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from dinotok import DiffusionTransformer2DModel, config_path
from dinotok.models.transformer_diffusion import _turn
from dinotok.models.transformer_layers import rotary_angles, rotate, sincos_positions
from tests.conftest import randomize

TINY = {
    "in_channels": 6,
    "num_classes": 10,
    "sample_size": 4,
    "hidden_size": 32,
    "num_layers": 2,
    "num_attention_heads": 2,
}
HEAD = {"head_hidden_size": 48, "head_num_layers": 2, "head_num_attention_heads": 3}
VARIANTS = {
    "body": {},
    "head": HEAD,
    "head of the same width": {**HEAD, "head_hidden_size": 32, "head_num_attention_heads": 4},
    "patches": {"patch_size": 2, "qk_norm": True},
    "head on patches": {**HEAD, "patch_size": 2, "qk_norm": True},
}
each_variant = pytest.mark.parametrize("values", VARIANTS.values(), ids=VARIANTS)


def tiny(**values) -> DiffusionTransformer2DModel:
    torch.manual_seed(0)
    return randomize(DiffusionTransformer2DModel(**{**TINY, **values})).eval()


def inputs(batch: int = 2, height: int = 4, width: int = 6, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, 6, height, width, generator=generator),
        "timestep": torch.rand(batch, generator=generator),
        "class_labels": torch.randint(11, (batch,), generator=generator),
    }


@each_variant
def test_an_untrained_denoiser_predicts_zero(values):
    torch.manual_seed(0)
    model = DiffusionTransformer2DModel(**{**TINY, **values})
    assert torch.equal(model(**inputs()).sample, torch.zeros(2, 6, 4, 6))


@each_variant
def test_untrained_blocks_are_the_identity(values):
    model = DiffusionTransformer2DModel(**{**TINY, **values})
    for blocks in (model.blocks, getattr(model, "head_blocks", [])):
        for block in blocks:
            width = block.attention_norm.weight.shape[0]
            heads = block.attention.num_heads
            tokens, condition = torch.randn(2, 12, width), torch.randn(2, 1, width)
            turns = torch.ones(12, 1, width // heads), torch.zeros(12, 1, width // heads)
            assert torch.equal(block(tokens, condition, *turns), tokens)


@each_variant
def test_time_class_and_place_matter(values):
    model, given = tiny(**values), inputs()
    velocity = model(**given).sample
    assert velocity.shape == (2, 6, 4, 6) and velocity.isfinite().all()
    changed = {
        "timestep": given["timestep"] + 0.05,
        "class_labels": (given["class_labels"] + 1) % 11,
        "hidden_states": given["hidden_states"].flip(3),
    }
    for name, value in changed.items():
        other = model(**{**given, name: value}).sample
        assert (velocity - other.flip(3)).abs().max() > 1e-3 and (velocity - other).abs().max() > 1e-3


def test_positions_come_from_the_grid_and_not_from_the_number_of_tokens():
    model = tiny()
    wide, tall = inputs(height=2, width=6), inputs(height=6, width=2)
    same = {**tall, "hidden_states": wide["hidden_states"].reshape(2, 6, 6, 2)}
    difference = model(**wide).sample.reshape(2, 6, 6, 2) - model(**same).sample
    assert difference.abs().max() > 1e-3


@each_variant
def test_rows_of_a_batch_do_not_meet(values):
    model, given = tiny(**values), inputs(batch=3)
    alone = [model(**{name: value[i : i + 1] for name, value in given.items()}).sample for i in range(3)]
    torch.testing.assert_close(model(**given).sample, torch.cat(alone), atol=2e-5, rtol=1e-4)


def test_a_scalar_time_holds_for_the_batch_and_a_tuple_on_request():
    model, given = tiny(), inputs()
    scalar = model(**{**given, "timestep": torch.tensor(0.3)}, return_dict=False)[0]
    torch.testing.assert_close(scalar, model(**{**given, "timestep": torch.full((2,), 0.3)}).sample)


@each_variant
def test_gradient_checkpointing_changes_no_gradient(values):
    gradients = []
    for checkpointing in (False, True):
        model = tiny(**values).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(**inputs()).sample.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(gradient is not None for gradient in gradients[0].values())
    torch.testing.assert_close(gradients[0], gradients[1])


@each_variant
def test_bfloat16_keeps_the_time_in_float32(values):
    model, given = tiny(**values), inputs()
    exact = model(**given).sample
    half = tiny(**values).to(torch.bfloat16)
    assert {p.dtype for p in half.time_embedding.parameters()} == {torch.float32}
    assert half.dtype == torch.bfloat16
    velocity = half(**{**given, "hidden_states": given["hidden_states"].bfloat16()}).sample
    assert velocity.dtype == torch.bfloat16
    assert (velocity.float() - exact).norm() / exact.norm() < 0.05
    times = given["timestep"]
    assert torch.equal(half.time_embedding(times), model.time_embedding(times))


def test_save_and_load(tmp_path):
    model = tiny(**HEAD)
    model.save_pretrained(tmp_path)
    loaded = DiffusionTransformer2DModel.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(**inputs()).sample, model(**inputs()).sample)
    half = DiffusionTransformer2DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    frequencies = half.time_embedding.features.frequencies
    assert torch.equal(frequencies, model.time_embedding.features.frequencies) and half.dtype == torch.bfloat16


def test_averages_keep_the_random_frequencies(tmp_path):
    model = tiny()
    average = EMAModel(model.parameters(), model_cls=DiffusionTransformer2DModel, model_config=model.config)
    average.step(model.parameters())
    average.save_pretrained(tmp_path)
    loaded = DiffusionTransformer2DModel.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(**inputs()).sample, model(**inputs()).sample)
    assert not model.time_embedding.features.frequencies.requires_grad


def test_attention_backends_reach_every_block():
    model, given = tiny(**HEAD), inputs()
    expected = model(**given).sample
    model.set_attention_backend("_native_math")
    assert len(model.attn_processors) == 4
    assert len({p._attention_backend for p in model.attn_processors.values()} - {None}) == 1
    torch.testing.assert_close(model(**given).sample, expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_fused_projections_compute_the_same():
    model, given = tiny(**HEAD), inputs()
    expected = model(**given).sample
    model.fuse_qkv_projections()
    torch.testing.assert_close(model(**given).sample, expected, atol=2e-5, rtol=1e-4)
    assert all(block.attention.to_qkv.out_features == 96 for block in model.blocks)
    model.unfuse_qkv_projections()
    torch.testing.assert_close(model(**given).sample, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_states": torch.zeros(2, 5, 4, 6)}, r"\(B, 6, h, w\), got \(2, 5, 4, 6\)"),
        ({"hidden_states": torch.zeros(2, 6, 3, 6)}, r"\(3, 6\) are no multiple of patch_size=2"),
        ({"timestep": torch.tensor([1, 2])}, "timestep must be a floating-point time"),
    ],
)
def test_wrong_inputs_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        tiny(patch_size=2)(**{**inputs(), **values})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_attention_heads": 3}, "hidden_size=32 does not give 3 heads"),
        ({**HEAD, "head_num_attention_heads": 8}, "head_hidden_size=48 does not give 8 heads"),
    ],
)
def test_widths_that_do_not_fit_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        DiffusionTransformer2DModel(**{**TINY, **values})


# DiT-S, DiT-B and LightningDiT-XL as published (other latents, so about); the reference implementation of DiT-DH with
# VFMAE's 32 channels, counted, without its table of 256 positions.
PARAMETERS = {
    "diffusion_transformer_s": (33.0e6, 0.03),
    "diffusion_transformer_b": (130.5e6, 0.03),
    "diffusion_transformer_xl": (675e6, 0.01),
    "diffusion_transformer_dh_s": (193_157_748 - 256 * 384, 0),
    "diffusion_transformer_dh_xl": (834_812_532 - 256 * 1152, 0),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_bundled_configs_build_models_of_published_size(name):
    count, tolerance = PARAMETERS[name]
    config = json.loads(config_path(name).read_text())
    assert config["in_channels"] == 832
    with torch.device("meta"):
        model = DiffusionTransformer2DModel.from_config(config, in_channels=32)
    assert model.num_parameters() == pytest.approx(count, rel=tolerance)


@pytest.mark.parametrize("head", [False, True])
def test_queries_and_keys_turn_as_everywhere_in_the_library(head):
    values, angles = torch.randn(2, 6, 3, 16), rotary_angles(2, 3, 16)[:, None]
    turned = _turn(values, *tiny(**HEAD)._turns(2, 3, head))
    torch.testing.assert_close(turned, rotate(values, angles.cos(), angles.sin()))
    assert _turn(values.bfloat16(), angles.cos().repeat(1, 1, 2), angles.repeat(1, 1, 2)).dtype == torch.bfloat16


def test_the_sine_cosine_table_is_that_of_mae():
    table = sincos_positions(2, 3, 8)
    assert table.shape == (6, 8)
    assert torch.equal(table[0], torch.tensor([0.0, 0, 1, 1, 0, 0, 1, 1]))
    torch.testing.assert_close(table[1, :4], torch.tensor([1.0, 0.01, 0, 0]).sin() + torch.tensor([0, 0, 0.5403, 1.0]),
                               atol=1e-4, rtol=0)  # fmt: skip
    assert torch.equal(table[3, 4:], table[1, :4])  # the row's half follows the column's
    with pytest.raises(ValueError, match="hidden_size=6"):
        sincos_positions(2, 3, 6)


# LoRA

LORA = LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0", "gate_up", "down"])


def adapted(seed: int = 1) -> DiffusionTransformer2DModel:
    model = tiny()
    model.add_adapter(LORA, adapter_name="style")
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def test_a_new_adapter_changes_nothing_and_is_all_that_trains():
    model = tiny()
    expected = model(**inputs()).sample
    model.requires_grad_(False)
    model.add_adapter(LORA)
    torch.testing.assert_close(model(**inputs()).sample, expected)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_" in name for name in trained)


def test_adapters_save_load_scale_and_go_away(tmp_path):
    model = adapted()
    with_adapter, without = model(**inputs()).sample, tiny()(**inputs()).sample
    assert (with_adapter - without).abs().max() > 1e-2
    model.save_lora_adapter(tmp_path, adapter_name="style")
    loaded = tiny()
    file = {"weight_name": "pytorch_lora_weights.safetensors"}  # diffusers does not guess it offline
    loaded.load_lora_adapter(tmp_path, prefix=None, adapter_name="again", **file)
    torch.testing.assert_close(loaded(**inputs()).sample, with_adapter)
    loaded.set_adapters("again", 0.0)
    torch.testing.assert_close(loaded(**inputs()).sample, without)
    loaded.set_adapters(["again"], [1.0])
    torch.testing.assert_close(loaded(**inputs()).sample, with_adapter)
    loaded.disable_lora()
    torch.testing.assert_close(loaded(**inputs()).sample, without)
    assert get_peft_model_state_dict(model, adapter_name="style").keys()


def test_adapters_that_are_not_there_are_named():
    model = adapted()
    with pytest.raises(ValueError, match=r"no adapter 'nope'; loaded are \['style'\]"):
        model.set_adapters("nope")
    with pytest.raises(ValueError, match="1 adapters were named, but 2 weights"):
        model.set_adapters("style", [1.0, 2.0])


@pytest.mark.slow
@pytest.mark.parametrize("values", [{}, HEAD], ids=["body", "head"])
def test_compile_takes_the_whole_graph(values):
    model, given = tiny(**values), inputs()
    expected = model(**given).sample
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(**given).sample, expected, atol=1e-4, rtol=1e-4)
