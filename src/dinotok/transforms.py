"""From an encoded picture to the uint8 pixels of a training batch: decode, resize, crop, flip."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from .image_processor import read_rgb

CropName = Literal["random", "random_resized", "center"]

# As guided-diffusion's random_crop_arr: at the largest zoom, the crop is this share of the short side.
_MIN_CROP_SHARE = 0.8
# As torchvision's RandomResizedCrop: shares of the area, and its aspect ratios relative to that of the result.
_MIN_AREA_SHARE = 0.08
_MAX_RATIO = 4 / 3
_ATTEMPTS = 10
# A picture of 1x9000 would be resized to 256x2304000 before it is cropped.
_MAX_RESIZED_PIXELS = 2**27


@dataclass(frozen=True)
class PictureTransform:
    """Decode a picture and bring it to one size, in 8 bits from end to end.

    Resizing is bicubic with antialiasing, `F.interpolate` on uint8: torchvision's result, within 1/255 of Pillow's.
    Pictures are upright and RGB, transparency is composited over white, as by `ImageProcessor`; small ones are
    enlarged.

    Args:
        size: Side of the result in pixels, or its `(height, width)`.
        crop: How the picture becomes that large.
            "center": as guided-diffusion's `center_crop_arr` (MIT): halved with a box filter while both sides are at
            least twice the result's, resized until it just covers the result, and cropped in the middle.
            "random": as its `random_crop_arr`: the side that binds (the short one, for a square) is resized to a
            length drawn from `size` to `size / 0.8`, and the place of the crop is drawn.
            "random_resized": the law of torchvision's `RandomResizedCrop`: a part of 8 to 100 % of the area, with 3/4
            to 4/3 times the aspect ratio of the result, log-uniform, is cropped and resized.
        flip: Mirror every second picture, at random.

    Raises:
        ValueError: If `size` is not positive or `crop` is unknown.
    """

    size: int | tuple[int, int]
    crop: CropName
    flip: bool = False

    def __post_init__(self):
        sides = self.size if isinstance(self.size, tuple) else (self.size,)
        if len(sides) not in (1, 2) or not all(isinstance(side, int) and side > 0 for side in sides):
            raise ValueError(f"size={self.size!r} is neither a positive integer nor a tuple (height, width) of two.")
        if self.crop not in get_args(CropName):
            raise ValueError(f"crop={self.crop!r} is not one of {', '.join(map(repr, get_args(CropName)))}.")

    @property
    def height_width(self) -> tuple[int, int]:
        """Of the result, in pixels."""
        return self.size if isinstance(self.size, tuple) else (self.size, self.size)

    def __call__(self, image: bytes | Image.Image | Mapping[str, Any], generator: torch.Generator) -> torch.Tensor:
        """Transform one picture.

        Args:
            image: An encoded picture, a PIL image, or a cell `{"bytes": ..., "path": ...}` of a `datasets.Image`
                column that is not decoded.
            generator: Of the random numbers, on the CPU.

        Returns:
            uint8 `(3, height, width)`, contiguous.

        Raises:
            ValueError: If it is not a readable image, or too elongated.
            OSError: If its file cannot be read.
        """
        picture = read_rgb("The picture", encoded_picture(image))  # (H, W, 3)
        if self.crop == "random_resized":
            pixels = _random_resized(picture, self.height_width, generator)
        else:
            pixels = self._zoom_and_crop(picture, generator)
        if self.flip and torch.rand((), generator=generator) < 0.5:
            pixels = pixels.flip(-1)
        return pixels.contiguous()

    def _zoom_and_crop(self, picture: np.ndarray, generator: torch.Generator) -> torch.Tensor:
        height, width = self.height_width
        zoom_height, zoom_width = height, width
        if self.crop == "random":
            binds_height = height * picture.shape[1] >= width * picture.shape[0]
            side = height if binds_height else width
            zoomed = _integer(side, math.ceil(side / _MIN_CROP_SHARE), generator)
            zoom_height, zoom_width = (zoomed, width) if binds_height else (height, zoomed)
        pixels = _cover(picture, zoom_height, zoom_width)  # (3, >= height, >= width)
        rows, columns = pixels.shape[1] - height, pixels.shape[2] - width
        if self.crop == "random":
            top, left = _integer(0, rows, generator), _integer(0, columns, generator)
        else:
            top, left = rows // 2, columns // 2
        return pixels[:, top : top + height, left : left + width]


def to_pixels(pictures: torch.Tensor) -> torch.Tensor:
    """Convert 8-bit pictures to what models take.

    Args:
        pictures: uint8, any shape.

    Returns:
        float32 in [-1, 1], of the same shape, on the same device.

    Raises:
        ValueError: If the dtype is another.
    """
    if pictures.dtype != torch.uint8:
        raise ValueError(f"pictures have dtype {pictures.dtype}; expected torch.uint8.")
    return pictures.to(torch.float32).div_(127.5).sub_(1)


def encoded_picture(image: bytes | Image.Image | Mapping[str, Any] | None) -> str | bytes | Image.Image:
    """Return what can be opened in a cell of a picture column: its bytes, else its path, a PIL image as it is.

    Raises:
        ValueError: If there is nothing.
        OSError: If a remote file cannot be read.
    """
    if isinstance(image, Mapping):
        path = image.get("path")
        image = image.get("bytes")
        if image is None and path:
            return _remote_bytes(path) if "://" in path else path
    if image is None or image == b"":
        raise ValueError("The picture is missing: its cell is empty.")
    if not isinstance(image, (bytes, Image.Image)):
        raise ValueError(f"The picture is of type {type(image).__name__}; expected bytes, a PIL image or a dict.")
    return image


def _remote_bytes(path: str) -> bytes:
    """A file in a streamed archive or repository."""
    from datasets.utils.file_utils import xopen

    with xopen(path, "rb") as file:
        return file.read()


def _cover(picture: np.ndarray, height: int, width: int) -> torch.Tensor:
    """Resize `(H, W, 3)` until it just covers height x width, by guided-diffusion's two steps."""
    while picture.shape[0] >= 2 * height and picture.shape[1] >= 2 * width:
        half = (picture.shape[1] // 2, picture.shape[0] // 2)
        picture = np.array(Image.fromarray(picture).resize(half, Image.Resampling.BOX))
    rows, columns = picture.shape[:2]
    scale = max(height / rows, width / columns)
    size = (max(height, round(rows * scale)), max(width, round(columns * scale)))
    if size[0] * size[1] > _MAX_RESIZED_PIXELS:
        raise ValueError(f"The picture of {rows}x{columns} is too elongated to be cropped to {height}x{width}.")
    return _resize(picture, size)


def _random_resized(picture: np.ndarray, size: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    rows, columns = picture.shape[:2]
    ratio = size[1] / size[0]
    for _ in range(_ATTEMPTS):
        area = rows * columns * _uniform(_MIN_AREA_SHARE, 1.0, generator)
        aspect = ratio * math.exp(_uniform(-math.log(_MAX_RATIO), math.log(_MAX_RATIO), generator))
        height, width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < height <= rows and 0 < width <= columns:
            top, left = _integer(0, rows - height, generator), _integer(0, columns - width, generator)
            return _resize(picture[top : top + height, left : left + width], size)
    # The largest part of an admitted aspect ratio, in the middle.
    width = max(1, min(columns, round(rows * ratio * _MAX_RATIO)))
    height = max(1, min(rows, round(columns / ratio * _MAX_RATIO)))
    top, left = (rows - height) // 2, (columns - width) // 2
    return _resize(picture[top : top + height, left : left + width], size)


def _resize(picture: np.ndarray, size: tuple[int, int]) -> torch.Tensor:
    """`(H, W, 3)` to `(3, *size)`."""
    pixels = torch.from_numpy(picture).permute(2, 0, 1)
    if tuple(pixels.shape[1:]) == size:
        return pixels
    return F.interpolate(pixels[None], size, mode="bicubic", antialias=True)[0]


def _integer(low: int, high: int, generator: torch.Generator) -> int:
    """Uniform, both ends included."""
    return int(torch.randint(low, high + 1, (), generator=generator))


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))
