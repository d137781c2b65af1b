"""Class-conditional pictures from an autoregressive transformer and a discrete tokenizer."""

from .pipeline import DINOTokARPipeline as DINOTokARPipeline
