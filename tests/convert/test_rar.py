"""Official RAR checkpoints become our model: the logits and greedy tokens of the reference code, at random weights.

`rar_golden.safetensors` was made with the code of CVMI-Lab/VFMTok-RAR (commit f36db70, Apache-2.0): random weights of
a small model, its logits of given indices in given orders, and what its `generate` gives greedily. Table rows that its
tokens never reach are left out of the file; here they are NaN, which would spread.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dinotok.convert.rar import convert_rar
from dinotok.decoding import guidance_at, guide

GOLDEN = load_file(Path(__file__).parent / "rar_golden.safetensors")
FULL_ROWS = {"pos_embed": 9 + 1024, "target_aware_pos_embed": 9 + 1024, "timesteps_embeddings": 9 + 100}


def official_weights() -> dict[str, torch.Tensor]:
    weights = {name.removeprefix("weights."): value for name, value in GOLDEN.items() if name.startswith("weights.")}
    for name, rows in FULL_ROWS.items():
        padding = torch.full((1, rows - weights[name].shape[1], 16), torch.nan)
        weights[name] = torch.cat([weights[name], padding], dim=1)
    return weights


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    save_file(official_weights(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_logits_are_those_of_the_reference(checkpoint):
    model, reader = convert_rar(checkpoint)
    assert sorted(reader.used.values()) == sorted(official_weights())
    orders = GOLDEN["orders"]
    logits = model(GOLDEN["indices"].view(3, 1, 3, 3), GOLDEN["class_labels"], orders=orders).logits[0]
    in_order = logits.flatten(1, 2).gather(1, orders[..., None].expand(-1, -1, 20))
    torch.testing.assert_close(in_order, GOLDEN["logits"], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("scale", "power"), [(0, 1.0), (4.0, 1.0), (16.0, 2.75)])
@torch.no_grad()
def test_greedy_tokens_are_those_of_the_reference(checkpoint, scale, power):
    """Their scale 0 means no guidance, as our 1 does."""
    model, _ = convert_rar(checkpoint)
    labels = GOLDEN["generate.class_labels"]
    labels = torch.cat([labels, torch.full_like(labels, model.config.num_classes)])
    cache, tokens = model.allocate_cache(len(labels)), []
    logits = model(class_labels=labels, cache=cache).logits[0]
    for position in range(9):
        scale_here = guidance_at(position / 9, scale or 1.0, "rising", power)
        tokens.append(guide(logits, scale_here).argmax(-1, keepdim=True))
        if position < 8:
            logits = model(tokens[-1].repeat(2, 1), cache=cache).logits[0]
    assert torch.equal(torch.cat(tokens, dim=1), GOLDEN[f"generate.{scale}.{power}"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.1.attn.proj.bias": None}, "no tensor 'blocks.1.attn.proj.bias'"),
        ({"lm_head.weight": None}, "no tensor 'lm_head.weight'"),
        ({"extra": torch.zeros(1)}, "first 'extra'"),
        ({"pos_embed": torch.zeros(1, 9, 16)}, r"'pos_embed' has shape \(1, 9, 16\)"),
        ({"timesteps_embeddings": torch.zeros(1, 106, 16)}, "6 positions, which is no grid"),
    ],
)
def test_other_checkpoints_are_refused(tmp_path, change, message):
    changed = {name: value for name, value in {**official_weights(), **change}.items() if value is not None}
    save_file(changed, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        convert_rar(tmp_path / "model.safetensors")


def test_a_grid_that_is_not_square_has_to_be_told(tmp_path):
    weights = official_weights()
    del weights["timesteps_embeddings"], weights["pos_embed"], weights["target_aware_pos_embed"]
    weights["timesteps_embeddings"] = torch.zeros(1, 6 + 100, 16)
    weights["pos_embed"] = weights["target_aware_pos_embed"] = torch.zeros(1, 6 + 1024, 16)
    weights = {name: value.clone() for name, value in weights.items()}
    save_file(weights, tmp_path / "model.safetensors")
    assert convert_rar(tmp_path / "model.safetensors", sample_size=(2, 3))[0].config.sample_size == [2, 3]
