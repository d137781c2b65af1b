"""From pictures of any kind to pixels and back, by padding and cropping: nothing is ever resized."""

import io
import os
from collections.abc import Sequence
from contextlib import nullcontext
from typing import IO, Any, Self

import numpy as np
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageOps

ImageInput = str | os.PathLike[str] | Image.Image | np.ndarray | torch.Tensor

_INTEGER_MAXIMUM = {"bool": 1, "uint8": 255, "uint16": 65535}


class ImageProcessor(VaeImageProcessor):
    """Turn pictures of any size into pixels of whole patches, and decoded pixels back into pictures of the old size.

    A picture lies top-left in its pixels; the rest is its last row and column repeated. For every 8-bit RGB picture,
    `postprocess(preprocess(picture))` is the picture itself.

    Args:
        patch_size: Side of a patch in pixels; the height and width of `preprocess` are multiples of it.

    Attributes:
        sizes: `(height, width)` of every picture of the last `preprocess`, before padding.
        padded_size: `(height, width)` they were padded to, None before the first call.

    Raises:
        ValueError: If `patch_size` is not a positive integer.
    """

    # Beside a model's config.json, not over it.
    config_name = "preprocessor_config.json"

    @register_to_config
    def __init__(self, patch_size: int = 16):
        # The parent's __init__ only registers resizing options, which a saved config would then warn about.
        if not isinstance(patch_size, int) or patch_size < 1:
            raise ValueError(f"patch_size={patch_size!r} is not a positive integer.")
        self.sizes: list[tuple[int, int]] = []
        self.padded_size: tuple[int, int] | None = None

    @classmethod
    def from_model(cls, model: Any) -> Self:
        """Make the processor of a tokenizer.

        Args:
            model: Any model whose config has a `patch_size`.

        Returns:
            A processor that pads to this patch size.
        """
        return cls(patch_size=model.config.patch_size)

    def preprocess(self, images: ImageInput | Sequence[ImageInput]) -> torch.Tensor:
        """Read, check, convert to RGB and pad one picture or several; remember their sizes for `postprocess`.

        Pictures of one call may differ in kind and size; all are padded to the largest. EXIF orientation is applied,
        transparency is composited over white, 16-bit gray keeps its precision (Pillow reads 16-bit colour as 8-bit).

        Args:
            images: A path, a PIL image, a numpy array `(H, W)`, `(H, W, C)` or `(B, H, W, C)`, a tensor `(H, W)`,
                `(C, H, W)` or `(B, C, H, W)`, or a list of these. Arrays and tensors are uint8, uint16, bool or floats
                in [0, 1]; C is 1 (gray), 2 (gray, alpha), 3 (RGB) or 4 (RGB, alpha).

        Returns:
            Pixels `(B, 3, H, W)`, float32 in [-1, 1], on the CPU.

        Raises:
            ValueError: If an image is of another type, shape, dtype or range, empty, or not readable.
            OSError: If a file is missing or may not be read.
        """
        pictures = _read_all(images)
        self.sizes = [(picture.shape[0], picture.shape[1]) for picture in pictures]
        height, width = (_round_up(max(sides), self.config["patch_size"]) for sides in zip(*self.sizes, strict=True))
        self.padded_size = (height, width)
        padded = [np.pad(p, ((0, height - p.shape[0]), (0, width - p.shape[1]), (0, 0)), "edge") for p in pictures]
        return torch.from_numpy(np.stack(padded)).permute(0, 3, 1, 2).contiguous() * 2 - 1  # (B, 3, H, W)

    def postprocess(
        self,
        pixels: torch.Tensor,
        output_type: str = "pil",
        sizes: Sequence[tuple[int, int]] | None = None,
    ) -> list[Image.Image] | np.ndarray | torch.Tensor | list[np.ndarray] | list[torch.Tensor]:
        """Clamp pixels to [-1, 1], crop away the padding and convert them.

        Args:
            pixels: `(B, 3, H, W)`, floats; values outside [-1, 1] are clamped.
            output_type: "pil" (rounded to 8 bits), "np" or "pt" (floats in [0, 1]).
            sizes: `(height, width)` of every picture. By default those of the last `preprocess`, if that call had as
                many pictures and the same padded size; else nothing is cropped. Pass them when batches interleave.

        Returns:
            For "pil" a list of PIL images. For "np" an array `(B, H, W, 3)`, for "pt" a tensor `(B, 3, H, W)`; if the
            pictures differ in size, a list of `(H, W, 3)` arrays or `(3, H, W)` tensors.

        Raises:
            ValueError: If `output_type` is unknown, `pixels` are of another shape, dtype or not finite, or `sizes` do
                not fit the pixels.
        """
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f'output_type={output_type!r} is not one of "pil", "np", "pt".')
        _check_pixels(pixels)
        sizes = self._crop_sizes(pixels) if sizes is None else sizes
        _check_sizes(sizes, pixels)

        pictures = (pixels.float() * 0.5 + 0.5).clamp(0, 1)
        if len(set(sizes)) == 1:
            height, width = sizes[0]
            batches = [pictures[:, :, :height, :width]]
        else:
            batches = [pictures[i : i + 1, :, :height, :width] for i, (height, width) in enumerate(sizes)]

        if output_type == "pt":
            return batches[0] if len(batches) == 1 else [batch[0] for batch in batches]
        arrays = [self.pt_to_numpy(batch.detach()) for batch in batches]
        if output_type == "np":
            return arrays[0] if len(arrays) == 1 else [array[0] for array in arrays]
        return [picture for array in arrays for picture in self.numpy_to_pil(array)]

    def _crop_sizes(self, pixels: torch.Tensor) -> list[tuple[int, int]]:
        batch_size, _, height, width = pixels.shape
        if len(self.sizes) == batch_size and self.padded_size == (height, width):
            return self.sizes
        return [(height, width)] * batch_size


def read_rgb(name: str, source: str | os.PathLike[str] | bytes | Image.Image) -> np.ndarray:
    """Decode one picture as `ImageProcessor.preprocess` does, to 8 bits: upright, RGB, transparency over white.

    Args:
        name: What errors call it.
        source: A path, an encoded picture, or a PIL image.

    Returns:
        uint8 `(H, W, 3)`, writable.

    Raises:
        ValueError: If it is not a readable image.
        OSError: If a file is missing or may not be read.
    """
    image = _load_upright(name, io.BytesIO(source) if isinstance(source, bytes) else source)
    if image.mode == "RGB" and not image.has_transparency_data:
        return np.array(image)
    values = _to_unit_interval(name, _pil_to_array(name, image))
    values = values[..., None] if values.ndim == 2 else values
    return (_to_rgb(values) * 255).round().astype(np.uint8)


def _round_up(side: int, multiple: int) -> int:
    return -(-side // multiple) * multiple


def _read_all(images: Any) -> list[np.ndarray]:
    """Every single picture of a call as `(H, W, 3)`, float32 in [0, 1]."""
    if not isinstance(images, (list, tuple)):
        return _read("images", images)
    if not images:
        raise ValueError("images is an empty list; expected at least one image.")
    return [picture for i, image in enumerate(images) for picture in _read(f"images[{i}]", image)]


def _read(name: str, image: Any) -> list[np.ndarray]:
    """The pictures in one entry: several for a batched array or tensor."""
    if isinstance(image, (str, os.PathLike)):
        name = f"{name} ({os.fspath(image)!r})"
        values = _pil_to_array(name, _load_upright(name, image))
    elif isinstance(image, Image.Image):
        values = _pil_to_array(name, _load_upright(name, image))
    elif isinstance(image, np.ndarray):
        _check_layout(name, image.shape, channel_axis=-1)
        values = image
    elif isinstance(image, torch.Tensor):
        _check_layout(name, tuple(image.shape), channel_axis=-3)
        image = image.detach().cpu()
        image = image.float() if image.is_floating_point() else image  # numpy has no bfloat16
        values = (image if image.ndim == 2 else image.movedim(-3, -1)).numpy()
    else:
        raise ValueError(
            f"{name} is of type {type(image).__name__}; expected a path, a PIL image, a numpy array or a torch tensor."
        )
    values = _to_unit_interval(name, values)
    values = values[..., None] if values.ndim == 2 else values
    return [_to_rgb(picture) for picture in values.reshape(-1, *values.shape[-3:])]


def _load_upright(name: str, source: str | os.PathLike[str] | IO[bytes] | Image.Image) -> Image.Image:
    """Decode a file, or a PIL image that may still be lazy, and apply its EXIF orientation."""
    try:
        with nullcontext(source) if isinstance(source, Image.Image) else Image.open(source) as image:
            image.load()
            if 0 in image.size:
                raise ValueError(f"its size is {image.width}x{image.height}, no side may be zero")
            return ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise many types on corrupt bytes
        # An error number means the file (missing, no permission), not what is in it.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{name} is not a readable image: {error}") from error


def _pil_to_array(name: str, image: Image.Image) -> np.ndarray:
    """`(H, W)` for 16-bit and float gray, `(H, W, 2)` with a transparent gray value, else 8-bit `(H, W, 3 or 4)`."""
    if image.mode == "F":
        return np.asarray(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        gray = np.asarray(image)
        if gray.min() < 0 or gray.max() > 65535:
            raise ValueError(f"{name} has values in [{gray.min()}, {gray.max()}], not 16-bit ones in [0, 65535].")
        if "transparency" not in image.info:
            return gray.astype(np.uint16)
        alpha = np.where(gray == image.info["transparency"], 0, 65535)
        return np.stack([gray, alpha], axis=-1).astype(np.uint16)
    if image.mode == "La":  # Pillow converts premultiplied gray to nothing but LA
        image = image.convert("LA")
    return np.asarray(image.convert("RGBA" if image.has_transparency_data else "RGB"))


def _to_unit_interval(name: str, values: np.ndarray) -> np.ndarray:
    """Check dtype and range, and scale integers to float32 in [0, 1]."""
    if values.dtype.kind != "f":
        if values.dtype.name not in _INTEGER_MAXIMUM:
            raise ValueError(f"{name} has dtype {values.dtype}; expected uint8, uint16, bool or floats in [0, 1].")
        return values.astype(np.float32) / _INTEGER_MAXIMUM[values.dtype.name]
    if not np.isfinite(values).all():
        raise ValueError(f"{name} contains NaN or infinite values.")
    if values.min() < 0 or values.max() > 1:
        raise ValueError(
            f"{name} has floats in [{values.min()}, {values.max()}], not in [0, 1]. Divide 8-bit values by 255, clamp "
            "what rounding left outside; pixels in [-1, 1] go to the model directly."
        )
    return values.astype(np.float32)


def _to_rgb(picture: np.ndarray) -> np.ndarray:
    """`(H, W, 1 to 4)` to `(H, W, 3)`: composite alpha over white, repeat gray."""
    if picture.shape[-1] in (2, 4):
        alpha = picture[..., -1:]
        picture = picture[..., :-1] * alpha + (1 - alpha)
    return np.broadcast_to(picture, (*picture.shape[:2], 3))


def _check_layout(name: str, shape: tuple[int, ...], channel_axis: int) -> None:
    layout = "(H, W), (H, W, C) or (B, H, W, C)" if channel_axis == -1 else "(H, W), (C, H, W) or (B, C, H, W)"
    if len(shape) not in (2, 3, 4):
        raise ValueError(f"{name} has shape {shape}; expected {layout}.")
    if 0 in shape:
        raise ValueError(f"{name} has shape {shape}; no side may be zero.")
    if len(shape) > 2 and shape[channel_axis] not in (1, 2, 3, 4):
        raise ValueError(
            f"{name} has shape {shape}, so {shape[channel_axis]} channels; expected {layout} with 1 to 4 channels. "
            "Numpy arrays are channels-last, torch tensors channels-first."
        )


def _check_pixels(pixels: Any) -> None:
    if not isinstance(pixels, torch.Tensor):
        raise ValueError(f"pixels are of type {type(pixels).__name__}; expected a torch tensor.")
    if pixels.ndim != 4 or pixels.shape[1] != 3 or 0 in pixels.shape:
        raise ValueError(f"pixels have shape {tuple(pixels.shape)}; expected (B, 3, H, W), no side zero.")
    if not pixels.is_floating_point():
        raise ValueError(f"pixels have dtype {pixels.dtype}; expected floats in [-1, 1].")
    if not pixels.isfinite().all():
        raise ValueError("pixels contain NaN or infinite values.")


def _check_sizes(sizes: Sequence[tuple[int, int]], pixels: torch.Tensor) -> None:
    batch_size, _, padded_height, padded_width = pixels.shape
    if len(sizes) != batch_size:
        raise ValueError(f"Got {len(sizes)} sizes for {batch_size} pictures; expected one (height, width) each.")
    for i, (height, width) in enumerate(sizes):
        if not (1 <= height <= padded_height and 1 <= width <= padded_width):
            raise ValueError(f"sizes[{i}]={height}x{width} does not fit pixels of {padded_height}x{padded_width}.")
