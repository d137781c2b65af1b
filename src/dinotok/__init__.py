"""Image tokenizers on frozen vision foundation models, for diffusers and transformers."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_LOCATIONS = {
    "AutoencoderDINOTok": "models.autoencoder_dinotok",
    "AutoencoderVFMTok": "models.autoencoder_vfmtok",
    "DINOTokARPipeline": "pipelines.class_conditional_autoregressive",
    "DINOTokDiTPipeline": "pipelines.class_conditional_diffusion",
    "DiffusionTransformer2DModel": "models.transformer_diffusion",
    "AutoregressiveTransformer2DModel": "models.transformer_autoregressive",
    "EncoderUnavailableError": "models.encoders",
    "FiniteScalarQuantizer": "models.finite_scalar_quantizer",
    "FrozenEncoder": "models.encoders",
    "DominantSubspaceQuantizer": "models.quantizers",
    "ImageProcessor": "image_processor",
    "InpaintingCallback": "inpainting",
    "QuantizerOutput": "models.quantizers",
    "RandomAutoregressiveTransformer2DModel": "models.transformer_random_autoregressive",
    "VQModelDINOTok": "models.vq_model_dinotok",
    "VQModelVFMTok": "models.vq_model_vfmtok",
    "VectorQuantizer": "models.quantizers",
    "config_path": "configs",
}

__all__ = ["__version__", *sorted(_LOCATIONS)]

if TYPE_CHECKING:
    from .configs import config_path as config_path
    from .image_processor import ImageProcessor as ImageProcessor
    from .inpainting import InpaintingCallback as InpaintingCallback
    from .models.autoencoder_dinotok import AutoencoderDINOTok as AutoencoderDINOTok
    from .models.autoencoder_vfmtok import AutoencoderVFMTok as AutoencoderVFMTok
    from .models.encoders import EncoderUnavailableError as EncoderUnavailableError
    from .models.encoders import FrozenEncoder as FrozenEncoder
    from .models.finite_scalar_quantizer import FiniteScalarQuantizer as FiniteScalarQuantizer
    from .models.quantizers import DominantSubspaceQuantizer as DominantSubspaceQuantizer
    from .models.quantizers import QuantizerOutput as QuantizerOutput
    from .models.quantizers import VectorQuantizer as VectorQuantizer
    from .models.transformer_autoregressive import AutoregressiveTransformer2DModel as AutoregressiveTransformer2DModel
    from .models.transformer_diffusion import DiffusionTransformer2DModel as DiffusionTransformer2DModel
    from .models.transformer_random_autoregressive import (
        RandomAutoregressiveTransformer2DModel as RandomAutoregressiveTransformer2DModel,
    )
    from .models.vq_model_dinotok import VQModelDINOTok as VQModelDINOTok
    from .models.vq_model_vfmtok import VQModelVFMTok as VQModelVFMTok
    from .pipelines.class_conditional_autoregressive import (  # type: ignore[import-not-found, unused-ignore]
        DINOTokARPipeline as DINOTokARPipeline,
    )
    from .pipelines.class_conditional_diffusion import (  # type: ignore[import-not-found, unused-ignore]
        DINOTokDiTPipeline as DINOTokDiTPipeline,
    )


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import dinotok` costs nothing."""
    if name not in _LOCATIONS:
        raise AttributeError(f"module 'dinotok' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_LOCATIONS[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
