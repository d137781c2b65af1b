"""Pictures from strangers: opened with few decoders and within limits, or refused with a sentence."""

import io
import os
from dataclasses import dataclass

from PIL import Image, UnidentifiedImageError

from dinotok.image_processor import read_rgb

MAX_BYTES = 20 * 2**20
MAX_PIXELS = 50_000_000
MAX_RATIO = 8
MIN_SIDE = 16
Image.init()
# What Pillow reads of these: before 11.3 it had no AVIF.
FORMATS = tuple(name for name in ("AVIF", "BMP", "GIF", "JPEG", "PNG", "WEBP") if name in Image.OPEN)


class UploadError(ValueError):
    """A file that is not taken; the message says why, and what to do."""


@dataclass(frozen=True)
class Upload:
    """A picture that was taken.

    Attributes:
        picture: RGB, upright, reduced.
        num_bytes: Of the file.
        size: `(width, height)` that the file states, before it was turned upright and reduced.
        notes: What was done to the picture that its owner might not expect.
    """

    picture: Image.Image
    num_bytes: int
    size: tuple[int, int]
    notes: tuple[str, ...]


def read_upload(path: str | os.PathLike[str], max_side: int = 512) -> Upload:
    """Read a picture from a file that may hold anything.

    The size that the file states is checked before a pixel is decoded; nothing but the first picture of an animation
    is.

    Args:
        path: The file; its name and suffix do not count.
        max_side: Larger pictures are reduced to it.

    Returns:
        The picture.

    Raises:
        UploadError: If the file is empty, too large, of another kind, damaged, or the picture's shape is extreme.
        OSError: If the file cannot be read.
    """
    num_bytes = os.path.getsize(path)
    if num_bytes == 0:
        raise UploadError("The file is empty.")
    if num_bytes > MAX_BYTES:
        raise UploadError(
            f"The file has {num_bytes / 2**20:.1f} MB; up to {MAX_BYTES // 2**20} MB are taken. Save it smaller."
        )
    with open(path, "rb") as file:
        data = file.read(MAX_BYTES)
    image = _open(data)
    size = image.size
    _check_size(*size)
    notes = _notes(image)
    try:
        picture = Image.fromarray(read_rgb("The picture", _reduced(image, max_side)))
    except MemoryError:
        raise
    except Exception as error:  # decoders raise many types on corrupt bytes
        raise UploadError(f"The picture is damaged or incomplete ({_short(error)}).") from error
    return Upload(picture, num_bytes, size, notes)


def _open(data: bytes) -> Image.Image:
    """Read the header, with the decoders of a few formats."""
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise UploadError(
            f"The picture claims far more than the {_millions(MAX_PIXELS)} pixels that are taken."
        ) from None
    except UnidentifiedImageError:
        raise UploadError(_unknown(data)) from None
    except Exception as error:
        raise UploadError(f"The picture is damaged or incomplete ({_short(error)}).") from error


def _unknown(data: bytes) -> str:
    taken = ", ".join(FORMATS)
    if b"<svg" in data[:4096].lower():
        return f"This is an SVG drawing, not a picture of pixels: export it as PNG. Taken are {taken}."
    return f"The file is not a picture of a kind that is taken ({taken}), whatever its name says."


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise UploadError(
            f"The picture has {width}x{height} pixels; up to {_millions(MAX_PIXELS)} are taken. Save it smaller."
        )
    if min(width, height) < MIN_SIDE or max(width, height) > MAX_RATIO * min(width, height):
        raise UploadError(
            f"The picture is {width}x{height}: both sides must have {MIN_SIDE} pixels or more, and the longer one "
            f"at most {MAX_RATIO} times as many as the shorter."
        )


def _notes(image: Image.Image) -> tuple[str, ...]:
    notes = []
    if image.format != "MPO" and getattr(image, "is_animated", False):
        notes.append("Of the animation, the first picture.")
    if image.mode == "CMYK":
        notes.append("Converted from CMYK without its colour profile.")
    return tuple(notes)


def _reduced(image: Image.Image, max_side: int) -> Image.Image:
    """Reduce before anything else, so that no full-size copy in another mode is made."""
    image.draft(None, (2 * max_side, 2 * max_side))  # a JPEG can be decoded at an eighth to a half of its size
    image.load()
    scale = max_side / max(image.size)
    if scale >= 1:
        return image
    if image.mode in ("1", "P"):  # has no colours between its colours
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    width, height = (max(round(side * scale), 1) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)


def _millions(count: int) -> str:
    return f"{count // 1_000_000} million"


def _short(error: Exception) -> str:
    """What a decoder says, in one line and without the addresses of objects."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.split(" <")[0].removeprefix("The picture is not a readable image: ")[:120]
