"""Files from strangers are read, or refused with a sentence; nothing else happens."""

import os
import time

import numpy as np
import pytest
import uploads
from PIL import Image
from uploads import UploadError, read_upload

from tests.spaces.hostile import encoded, hostile_files, smooth


def write(folder, data: bytes, name: str = "upload"):
    path = folder / name
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("name", hostile_files())
def test_a_hostile_file_gets_a_sentence_or_is_read(tmp_path, name):
    data, words = hostile_files()[name]
    path = write(tmp_path, data, name)
    if words is None:
        upload = read_upload(path)
        assert (upload.picture.mode, upload.picture.size, upload.num_bytes) == ("RGB", (96, 64), len(data))
        return
    start = time.perf_counter()
    with pytest.raises(UploadError, match=words) as caught:
        read_upload(path)
    message = str(caught.value)
    assert message.endswith(".") and len(message) < 200 and "\n" not in message and " at 0x" not in message
    assert time.perf_counter() - start < 2


def test_a_file_beyond_the_limit_is_not_even_read(tmp_path):
    path = tmp_path / "huge.png"
    with path.open("wb") as file:
        os.truncate(file.fileno(), uploads.MAX_BYTES + 1)
    with pytest.raises(UploadError, match="20.0 MB; up to 20 MB"):
        read_upload(path)


def test_a_small_picture_comes_out_as_it_is(tmp_path):
    picture = smooth(90, 61)
    upload = read_upload(write(tmp_path, encoded(picture, "PNG")))
    assert np.array_equal(np.asarray(upload.picture), np.asarray(picture)) and upload.notes == ()


@pytest.mark.parametrize(
    ("kind", "mode"), [("JPEG", "RGB"), ("PNG", "RGB"), ("PNG", "P"), ("PNG", "1"), ("WEBP", "RGB")]
)
def test_a_large_picture_is_reduced_and_keeps_its_looks(tmp_path, kind, mode):
    picture = smooth(1500, 1000).convert(mode)
    upload = read_upload(write(tmp_path, encoded(picture, kind)), max_side=120)
    expected = picture.convert("RGB").resize((120, 80), Image.Resampling.LANCZOS)
    assert upload.picture.size == (120, 80) and upload.size == (1500, 1000)
    difference = np.asarray(upload.picture).astype(int) - np.asarray(expected)
    assert np.abs(difference).mean() < 3


def test_a_turned_photograph_is_upright_after_reduction(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned right
    picture = smooth(640, 320)
    for kind in ("JPEG", "PNG", "WEBP"):
        upload = read_upload(write(tmp_path, encoded(picture, kind, exif=exif)), max_side=64)
        expected = picture.resize((64, 32)).transpose(Image.Transpose.ROTATE_270)
        assert upload.picture.size == (32, 64), kind
        assert np.abs(np.asarray(upload.picture).astype(int) - np.asarray(expected)).mean() < 5, kind


def test_sixteen_bits_keep_their_gradations_and_transparency_lies_on_white(tmp_path):
    deep = np.linspace(0, 65535, 96 * 64).astype(np.uint16).reshape(64, 96)
    upload = read_upload(write(tmp_path, encoded(Image.fromarray(deep), "PNG")))
    assert np.abs(np.asarray(upload.picture)[..., 0] - deep / 257).max() < 0.51
    clear = Image.new("RGBA", (900, 600), (0, 0, 0, 0))
    assert np.asarray(read_upload(write(tmp_path, encoded(clear, "PNG"))).picture).min() == 255


def test_what_was_done_to_a_picture_is_said(tmp_path):
    files = hostile_files()
    assert "first picture" in read_upload(write(tmp_path, files["animated.gif"][0])).notes[0]
    assert "CMYK" in read_upload(write(tmp_path, files["cmyk.jpg"][0])).notes[0]
