"""Text encoders that are real, small and untrained, built without files."""

import string

import torch
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

_LETTERS = string.ascii_lowercase
_WORDS = [*_LETTERS, *(f"{letter}</w>" for letter in _LETTERS), "<|startoftext|>", "<|endoftext|>"]
_PIECES = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), *((letter, -2.0) for letter in _LETTERS)]


def tiny_clip(projection: bool = False) -> CLIPTextModel | CLIPTextModelWithProjection:
    """Build a text encoder of 16 tokens, 16 wide."""
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(_WORDS), hidden_size=16, intermediate_size=16, projection_dim=16, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=16, bos_token_id=len(_WORDS) - 2,
        eos_token_id=len(_WORDS) - 1, pad_token_id=1,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def tiny_clip_tokenizer() -> CLIPTokenizer:
    """Build a tokenizer that knows lower-case letters only."""
    return CLIPTokenizer(vocab={word: index for index, word in enumerate(_WORDS)}, merges=[], model_max_length=16)


def tiny_t5() -> T5EncoderModel:
    """Build a text encoder 32 wide, which is twice the CLIP's, as `StableDiffusion3Pipeline` joins two of those."""
    torch.manual_seed(0)
    return T5EncoderModel(
        T5Config(vocab_size=len(_PIECES), d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    ).eval()


def tiny_t5_tokenizer() -> T5Tokenizer:
    """Likewise."""
    return T5Tokenizer(vocab=_PIECES, extra_ids=0)
