"""Class-conditional pictures from a denoiser and a tokenizer."""

from .pipeline import DINOTokDiTPipeline as DINOTokDiTPipeline
