"""Official GPT checkpoints become our model: the logits and greedy tokens of the reference code, at random weights.

`gpt_golden.safetensors` was made with the code of CVMI-Lab/VFMTok2 (commit 6bc7af4, Apache-2.0): random weights
of a small model, its logits of given indices, and what its `generate` gives greedily for three guidance scales.
"""

import argparse
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dinotok import AutoregressiveTransformer2DModel
from dinotok.convert.gpt import convert_gpt, gpt_config
from dinotok.decoding import guide

GOLDEN = load_file(Path(__file__).parent / "gpt_golden.safetensors")
WEIGHTS = {name.removeprefix("weights."): value for name, value in GOLDEN.items() if name.startswith("weights.")}
SIZES = {"num_attention_heads": 2, "sample_size": (4, 4)}


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    path = tmp_path / "GPT.pt"
    torch.save({"model": {}, "ema": WEIGHTS, "args": argparse.Namespace(gpt_model="tiny"), "steps": 9}, path)
    return path


def test_logits_are_those_of_the_reference(checkpoint):
    model, _ = convert_gpt(checkpoint, **SIZES)
    logits = model(GOLDEN["indices"].view(2, 1, 4, 4), GOLDEN["class_labels"]).logits[0]
    torch.testing.assert_close(logits.flatten(1, 2), GOLDEN["logits"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("scale", [1.0, 1.5, 4.0])
@torch.no_grad()
def test_greedy_tokens_are_those_of_the_reference(checkpoint, scale):
    model, _ = convert_gpt(checkpoint, **SIZES)
    labels = GOLDEN["generate.class_labels"]
    labels = torch.cat([labels, torch.full_like(labels, model.config.num_classes)])
    cache, tokens = model.allocate_cache(len(labels)), []
    logits = model(class_labels=labels, cache=cache).logits[0]
    for _ in range(16):
        tokens.append(guide(logits, scale).argmax(-1, keepdim=True))
        if len(tokens) < 16:
            logits = model(tokens[-1].repeat(2, 1), cache=cache).logits[0]
    assert torch.equal(torch.cat(tokens, dim=1), GOLDEN[f"generate.scale_{scale}"])


def test_every_tensor_is_accounted_for_and_the_model_can_be_saved(checkpoint, tmp_path):
    model, reader = convert_gpt(checkpoint, **SIZES)
    assert sorted(reader.used.values()) == sorted(WEIGHTS)
    assert reader.dropped == {}
    assert not model.training
    model.save_pretrained(tmp_path / "model")
    again = AutoregressiveTransformer2DModel.from_pretrained(tmp_path / "model")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_safetensors_are_read_too(tmp_path):
    save_file(WEIGHTS, tmp_path / "GPT.safetensors")
    assert convert_gpt(tmp_path / "GPT.safetensors", **SIZES)[0].config.codebook_sizes == [20]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers.1.attention.wo.weight": None}, "no tensor 'layers.1.attention.wo.weight'"),
        ({"tok_embeddings.weight": None}, "no tensor 'tok_embeddings.weight'"),
        ({"extra": torch.zeros(1)}, "1 tensors that the model does not, first 'extra'"),
        ({"output.weight": torch.zeros(3, 16)}, r"'output.weight' has shape \(3, 16\)"),
    ],
)
def test_other_checkpoints_are_refused(tmp_path, change, message):
    changed = {name: value for name, value in {**WEIGHTS, **change}.items() if value is not None}
    save_file(changed, tmp_path / "GPT.safetensors")
    with pytest.raises(ValueError, match=message):
        convert_gpt(tmp_path / "GPT.safetensors", **SIZES)


def test_heads_of_an_unpublished_size_have_to_be_told(checkpoint):
    with pytest.raises(ValueError, match="pass num_attention_heads"):
        convert_gpt(checkpoint)


@pytest.mark.parametrize("name", ["b", "l", "xl", "xxl", "2b", "3b"])
def test_published_sizes_are_recognised_by_their_tensors(name):
    from dinotok import config_path

    expected = AutoregressiveTransformer2DModel.load_config(config_path(f"autoregressive_vfmtok_{name}"))
    width, layers, inside = (expected[key] for key in ("hidden_size", "num_layers", "intermediate_size"))
    tensors = {
        "tok_embeddings.weight": torch.empty(16384, width, device="meta"),
        "cls_embedding.embedding_table.weight": torch.empty(1001, width, device="meta"),
        **{f"layers.{i}.feed_forward.w1.weight": torch.empty(inside, width, device="meta") for i in range(layers)},
    }
    config = gpt_config(tensors)
    assert config == {key: expected[key] for key in config}
