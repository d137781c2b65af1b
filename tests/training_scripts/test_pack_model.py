"""A packed tokenizer has half the bytes, computes in float32, and makes the same pictures to float16's precision."""

import pytest
import torch

from dinotok.hub import load_tokenizer
from tests.conftest import random_pixels
from tests.tiny_tokenizers import tiny_discrete_tokenizer
from training_scripts.pack_model import PackingOptions, main, to_half


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
