"""Official DiT-DH checkpoints become our denoiser, tensor by tensor, or are refused.

`dit_dh_golden.safetensors` holds random weights of the reference implementation (github.com/CVMI-Lab/VFMTok2,
Apache-2.0, `denoise/models/DDT.py`) at a tiny size, an input, and the reference's output for it.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dinotok import DiffusionTransformer2DModel
from dinotok.convert.dit_dh import convert_dit_dh

GOLDEN = load_file(Path(__file__).with_name("dit_dh_golden.safetensors"))
WEIGHTS = {name.removeprefix("model."): value for name, value in GOLDEN.items() if name.startswith("model.")}
INPUT = [GOLDEN[f"input.{name}"] for name in ("latents", "timestep", "class_labels")]
ROTARY_TABLES = [f"{part}_feat_rope.freqs_{name}" for part in ("enc", "dec") for name in ("cos", "sin")]


def save(folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    torch.save({"ema": weights, "model": {"raw": torch.zeros(1)}, "train_steps": 3}, folder / "model.pt")
    return folder / "model.pt"


@torch.no_grad()
def test_the_converted_model_agrees_with_the_reference(tmp_path):
    converted = convert_dit_dh(save(tmp_path, WEIGHTS))
    torch.testing.assert_close(converted.model(*INPUT).sample, GOLDEN["output.velocity"], atol=1e-5, rtol=1e-5)
    config = converted.model.config
    assert (config.hidden_size, config.num_layers, config.num_attention_heads) == (16, 2, 2)
    assert (config.head_hidden_size, config.head_num_layers, config.head_num_attention_heads) == (24, 1, 3)
    assert (config.in_channels, config.num_classes, config.sample_size, config.mlp_ratio) == (3, 5, 3, 4)


def test_every_tensor_is_accounted_for(tmp_path):
    converted = convert_dit_dh(save(tmp_path, WEIGHTS))
    assert set(converted.sources) == {name for name, _ in converted.model.named_parameters()}
    assert sorted({*converted.sources.values(), *converted.dropped}) == sorted(WEIGHTS)
    assert set(converted.dropped) == {"pos_embed", *ROTARY_TABLES}


@torch.no_grad()
def test_the_converted_model_is_saved_with_its_account(tmp_path):
    converted = convert_dit_dh(save(tmp_path, WEIGHTS))
    converted.save(tmp_path / "out")
    loaded = DiffusionTransformer2DModel.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(loaded(*INPUT).sample, converted.model(*INPUT).sample)
    account = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert (account["used"], account["dropped"]) == (converted.sources, converted.dropped)
    assert account["class_name"] == "DiffusionTransformer2DModel"
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "conversion.json", "diffusion_pytorch_model.safetensors"}


@torch.no_grad()
def test_files_without_rotary_tables_need_the_heads(tmp_path):
    path = save(tmp_path, {name: value for name, value in WEIGHTS.items() if name not in ROTARY_TABLES})
    with pytest.raises(ValueError, match=r"lacks enc_feat_rope.freqs_cos"):
        convert_dit_dh(path)
    model = convert_dit_dh(path, num_attention_heads=2, head_num_attention_heads=3).model
    torch.testing.assert_close(model(*INPUT).sample, GOLDEN["output.velocity"], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_body_alone_converts_as_lightning_dit(tmp_path):
    """Without a head and on patches of 2: the layout within a patch is channels last there."""
    torch.manual_seed(0)
    source = {
        name: value
        for name, value in WEIGHTS.items()
        if not name.startswith(("s_", "blocks.2.", "final_layer", "x_embedder", "enc_", "dec_"))
    }
    source |= {f"feat_rope.freqs_{name}": WEIGHTS[f"enc_feat_rope.freqs_{name}"] for name in ("cos", "sin")}
    source |= {
        "x_embedder.proj.weight": torch.randn(16, 3, 2, 2),
        "x_embedder.proj.bias": torch.randn(16),
        "final_layer.norm_final.weight": torch.ones(16),
        "final_layer.linear.weight": torch.zeros(12, 16),
        "final_layer.linear.bias": torch.arange(12.0),  # the output, whatever the input: (row, column, channel)
        "final_layer.adaLN_modulation.1.weight": torch.zeros(32, 16),
        "final_layer.adaLN_modulation.1.bias": torch.zeros(32),
    }
    model = convert_dit_dh(save(tmp_path, source)).model
    assert model.config.head_hidden_size is None and model.config.patch_size == 2 and model.config.sample_size == 6
    patch = model(torch.randn(1, 3, 6, 6), torch.tensor([0.5]), torch.tensor([0])).sample[0, :, 2:4, 4:6]
    assert torch.equal(patch, torch.arange(12.0).view(2, 2, 3).permute(2, 0, 1))


def broken(change):
    weights = dict(WEIGHTS)
    change(weights)
    return weights


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("t_embedder.W"), "no tensor 't_embedder.W'"),
        (lambda w: w.pop("y_embedder.embedding_table.weight"), "no DiT-DH or LightningDiT"),
        (lambda w: w.update(extra=torch.zeros(1)), "1 tensors that the model does not, first 'extra'"),
        (lambda w: w.update({"s_projector.weight": torch.zeros(24, 17)}), "'s_projector.weight' gives"),
        (lambda w: w.update({"pos_embed": w["pos_embed"] + 0.1}), "table 'pos_embed' of the checkpoint is not"),
        (lambda w: w.update({ROTARY_TABLES[0]: -w[ROTARY_TABLES[0]]}), "table 'enc_feat_rope.freqs_cos'"),
    ],
)
def test_other_architectures_are_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        convert_dit_dh(save(tmp_path, broken(change)))
