"""A packed tokenizer has half the bytes, computes in float32, and makes the same pictures to float16's precision."""

import json

import pytest
import torch

from dinotok.generation import draw_pictures, find_pipeline, load_pipeline
from dinotok.hub import load_tokenizer
from tests.conftest import random_pixels
from tests.tiny_pipelines import tiny_ar_pipeline, tiny_dit_pipeline
from tests.tiny_tokenizers import tiny_discrete_tokenizer
from training_scripts.pack_model import PackingOptions, main, same_latents, to_half


def test_a_packed_tokenizer_is_the_same_to_float16s_precision(tmp_path):
    tokenizer = tiny_discrete_tokenizer()
    tokenizer.save_pretrained(tmp_path / "whole")
    packed = load_tokenizer(str(main(PackingOptions(str(tmp_path / "whole"), str(tmp_path / "packed")))))
    sizes = [(tmp_path / n / "diffusion_pytorch_model.safetensors").stat().st_size for n in ("whole", "packed")]
    assert sizes[1] < 0.65 * sizes[0]
    assert {p.dtype for p in packed.parameters()} == {torch.float32}
    assert packed.semantic_quantizer.codebook.dtype == torch.float32
    pixels = random_pixels(1, 3, 48, 64)
    with torch.no_grad():
        torch.testing.assert_close(packed.encode(pixels).latent, tokenizer.encode(pixels).latent, rtol=0.02, atol=0.02)
        difference = packed(pixels).sample - tokenizer(pixels).sample
    assert difference.abs().mean() < 0.02
    assert packed.encode_to_indices(pixels).shape == (1, 2, 3, 4)


def test_what_float16_cannot_hold_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'w' has values up to 1e\\+05"):
        to_half("w", torch.tensor([1e5]))
    assert to_half("i", torch.tensor([70000])).dtype == torch.int64
    with pytest.raises(FileNotFoundError, match="no diffusion_pytorch_model"):
        main(PackingOptions(str(tmp_path), str(tmp_path / "x")))


@pytest.mark.parametrize("kind", ["diffusion", "autoregressive"])
def test_a_packed_pipeline_names_its_tokenizer_and_draws_the_same(kind, tmp_path, capsys):
    """On the tokenizers of the package, with random transformers."""
    build, tokenizer = {
        "diffusion": (tiny_dit_pipeline, "dinotok-tiny-ae"),
        "autoregressive": (tiny_ar_pipeline, "dinotok-tiny-vq"),
    }[kind]
    build(load_tokenizer(tokenizer)).save_pretrained(tmp_path / "whole")
    packed = main(PackingOptions(str(tmp_path / "whole"), str(tmp_path / "packed")))
    files = {path.relative_to(packed).as_posix() for path in packed.rglob("*") if path.is_file()}
    transformer = {"transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"}
    scheduler = {"scheduler/scheduler_config.json"} if kind == "diffusion" else set()
    assert files == {"model_index.json"} | transformer | scheduler
    assert json.loads(capsys.readouterr().out)["bytes"] == sum((packed / name).stat().st_size for name in files)
    assert find_pipeline(packed).tokenizer == tokenizer
    options = {"num_inference_steps": 2} if kind == "diffusion" else {"temperature": 0}
    whole, thin = (
        next(draw_pictures(load_pipeline(folder), [1], [0], options={**options, "output_type": "pt"}))
        for folder in (tmp_path / "whole", packed)
    )
    assert (whole - thin).abs().mean() < 0.02
    assert {p.dtype for p in load_pipeline(packed).transformer.parameters()} == {torch.float32}


def test_a_pipeline_on_another_tokenizer_is_not_packed(tmp_path):
    tiny_dit_pipeline().save_pretrained(tmp_path / "whole")
    with pytest.raises(ValueError, match="makes other latents than dinotok-tiny-ae, "):
        main(PackingOptions(str(tmp_path / "whole"), str(tmp_path / "packed")))
    assert not (tmp_path / "packed").exists()


def test_tokenizers_that_differ_in_their_decoders_make_the_same_latents(tmp_path):
    tokenizer = tiny_discrete_tokenizer()
    tokenizer.save_pretrained(tmp_path / "a")
    torch.nn.init.normal_(tokenizer.decoder.conv_out.weight)
    tokenizer.save_pretrained(tmp_path / "b")
    assert same_latents(tmp_path / "a", tmp_path / "b")
    tokenizer.texture_quantizer.codebook.data[0, 0] += 1
    tokenizer.save_pretrained(tmp_path / "c")
    assert not same_latents(tmp_path / "a", tmp_path / "c")
