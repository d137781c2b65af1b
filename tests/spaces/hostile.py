"""Files that strangers could upload, and what of the message they get must be right; None if they are taken."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def png_header(width: int, height: int) -> bytes:
    """A PNG file of a few bytes that claims any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def smooth(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


def hostile_files() -> dict[str, tuple[bytes, str | None]]:
    """Name, content, and words of the message."""
    photograph = smooth(96, 64)
    deep = (np.arange(64 * 96, dtype=np.uint16) * 10).reshape(64, 96)
    frames = [smooth(96, 64), photograph.rotate(180)]
    svg = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'
    return {
        "bomb.png": (png_header(60_000, 60_000), "pixels"),
        "large.png": (png_header(9_000, 9_000), "9000x9000"),
        "drawing.svg": (svg, "SVG"),
        "drawing.png": (svg, "SVG"),
        "text.png": (b"not a picture at all\n" * 50, "not a picture"),
        "script.jpg": (b"<html><script>alert(1)</script></html>", "not a picture"),
        "thin.png": (encoded(Image.new("RGB", (1, 20_000)), "PNG"), "1x20000"),
        "strip.png": (encoded(Image.new("RGB", (900, 100)), "PNG"), "900x100"),
        "empty.png": (b"", "empty"),
        "truncated.jpg": (encoded(photograph, "JPEG")[:900], "damaged"),
        "truncated.png": (encoded(photograph, "PNG")[:900], "damaged"),
        "claims.png": (png_header(64, 64), "damaged"),
        "document.tif": (encoded(photograph, "TIFF"), "not a picture of a kind"),
        "cmyk.jpg": (encoded(photograph.convert("CMYK"), "JPEG"), None),
        "deep.png": (encoded(Image.fromarray(deep), "PNG"), None),
        "animated.gif": (encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), None),
        "transparent.png": (encoded(photograph.convert("RGBA"), "PNG"), None),
        "palette.png": (encoded(photograph.convert("P"), "PNG"), None),
        "misnamed.gif": (encoded(photograph, "WEBP"), None),
    }


def write_hostile_files(folder: Path) -> dict[str, tuple[Path, str | None]]:
    """Write them all, and return where."""
    result = {}
    for name, (data, words) in hostile_files().items():
        (folder / name).write_bytes(data)
        result[name] = (folder / name, words)
    return result
