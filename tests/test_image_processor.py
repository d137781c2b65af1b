from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dinotok.image_processor import ImageProcessor

sides = st.integers(1, 70)


def random_array(height=37, width=50, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def to_unit_interval(pixels):
    """`(1, 3, H, W)` pixels to an `(H, W, 3)` array in [0, 1]."""
    return (pixels[0].permute(1, 2, 0).numpy() + 1) / 2


def preprocess_unpadded(image):
    processor = ImageProcessor(patch_size=1)
    return to_unit_interval(processor.preprocess(image))


# Laws


@settings(deadline=None, max_examples=40)
@given(height=sides, width=sides, patch_size=st.integers(1, 20), seed=st.integers(0, 99))
def test_an_8bit_picture_of_any_size_comes_back_identical(height, width, patch_size, seed):
    processor = ImageProcessor(patch_size=patch_size)
    array = random_array(height, width, seed=seed)
    pixels = processor.preprocess(Image.fromarray(array))
    assert pixels.shape[0] == 1 and pixels.dtype == torch.float32 and pixels.is_contiguous()
    assert pixels.shape[2] % patch_size == 0 and 0 <= pixels.shape[2] - height < patch_size
    assert pixels.shape[3] % patch_size == 0 and 0 <= pixels.shape[3] - width < patch_size
    (picture,) = processor.postprocess(pixels)
    assert picture.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(picture), array)


@settings(deadline=None, max_examples=20)
@given(sizes=st.lists(st.tuples(sides, sides), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_a_list_of_mixed_sizes_comes_back_identical(sizes, seed):
    processor = ImageProcessor(patch_size=8)
    arrays = [random_array(*size, seed=seed + i) for i, size in enumerate(sizes)]
    pixels = processor.preprocess(arrays)
    assert processor.sizes == sizes
    assert processor.padded_size == tuple(pixels.shape[2:])
    assert processor.padded_size == tuple(-(-max(side) // 8) * 8 for side in zip(*sizes, strict=True))
    for array, picture in zip(arrays, processor.postprocess(pixels), strict=True):
        np.testing.assert_array_equal(np.asarray(picture), array)


@settings(deadline=None, max_examples=20)
@given(height=sides, width=sides)
def test_padding_repeats_the_edge_below_and_to_the_right(height, width):
    array = random_array(height, width)
    pixels = ImageProcessor(patch_size=16).preprocess(array)
    rows = np.minimum(np.arange(pixels.shape[2]), height - 1)
    columns = np.minimum(np.arange(pixels.shape[3]), width - 1)
    np.testing.assert_allclose(to_unit_interval(pixels), array[rows][:, columns] / 255, atol=1e-6)


def test_black_and_white_are_the_ends_of_the_range():
    array = np.array([[[0, 0, 0], [255, 255, 255]]], dtype=np.uint8)
    assert ImageProcessor(patch_size=1).preprocess(array)[0, 0].tolist() == [[-1, 1]]


@settings(deadline=None, max_examples=20)
@given(height=sides, width=sides, channels=st.sampled_from([1, 2, 3, 4]))
def test_every_kind_of_the_same_picture_gives_the_same_pixels(tmp_path_factory, height, width, channels):
    array = random_array(height, width, channels)
    image = Image.fromarray(array[..., 0] if channels == 1 else array)
    path = tmp_path_factory.mktemp("pictures") / "picture.png"
    image.save(path)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    kinds = [image, path, str(path), array, tensor, tensor.float() / 255, tensor.double() / 255]
    kinds += [array / 255, (array / 255).astype(np.float32), array[None], tensor[None], (array,), [tensor]]
    kinds += [array.astype(np.uint16) * 257, array[::-1].copy()[::-1]]
    kinds += [array[..., 0], tensor[0]] if channels == 1 else []
    processor = ImageProcessor(patch_size=4)
    expected = processor.preprocess(array)
    for kind in kinds:
        torch.testing.assert_close(processor.preprocess(kind), expected, rtol=0, atol=1e-6)
        assert processor.sizes == [(height, width)]


def test_kinds_mix_in_one_call_and_batches_count_as_their_pictures(tmp_path):
    array = random_array(20, 33)
    Image.fromarray(array).save(tmp_path / "picture.png")
    batch = np.stack([array, array])
    processor = ImageProcessor(patch_size=16)
    tensor = torch.from_numpy(batch).permute(0, 3, 1, 2)
    pixels = processor.preprocess([tmp_path / "picture.png", Image.fromarray(array), tensor, batch, array])
    assert pixels.shape == (7, 3, 32, 48)
    assert (pixels == pixels[:1]).all()


# PIL modes and files


@pytest.mark.parametrize("mode", ["RGB", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "L", "P", "1"])
def test_opaque_modes_are_those_of_pillow(mode):
    rgb = Image.fromarray(random_array())
    image = Image.merge("LAB", rgb.split()) if mode == "LAB" else rgb.convert(mode)
    np.testing.assert_allclose(preprocess_unpadded(image), np.asarray(image.convert("RGB")) / 255, atol=1e-6)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGBa", "La"])
@pytest.mark.parametrize(("alpha", "expected"), [(0, 1.0), (255, 51 / 255), (102, 0.4 * 51 / 255 + 0.6)])
def test_transparency_is_composited_over_white(mode, alpha, expected):
    color = (51, 51, 51, alpha) if mode.startswith("RGB") else (51, alpha)
    image = Image.new(mode.upper(), (5, 3), color).convert(mode)
    np.testing.assert_allclose(preprocess_unpadded(image), expected, atol=2 / 255)


def test_a_palette_with_an_alpha_channel_is_composited_over_white():
    image = Image.new("P", (5, 3), 1)
    image.putpalette([255, 0, 0, 51, 51, 51])
    image.putalpha(102)
    assert image.mode == "PA"
    np.testing.assert_allclose(preprocess_unpadded(image), 0.4 * 51 / 255 + 0.6, atol=1e-6)


def test_a_transparent_palette_colour_is_white(tmp_path):
    image = Image.new("P", (7, 4), 1)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((0, 0), 0)
    image.save(tmp_path / "palette.png", transparency=1)
    pixels = preprocess_unpadded(tmp_path / "palette.png")
    assert pixels[0, 0].tolist() == [1, 0, 0]
    assert (pixels[1:] == 1).all()


@pytest.mark.parametrize(("mode", "value"), [("L", 51), ("RGB", (51, 51, 51)), ("I;16", 51 * 257)])
def test_a_transparent_colour_of_a_png_is_white(tmp_path, mode, value):
    image = Image.new(mode, (7, 4), 0)
    image.paste(value, (0, 0, 3, 4))
    image.save(tmp_path / "key.png", transparency=value)
    pixels = preprocess_unpadded(tmp_path / "key.png")
    assert (pixels[:, :3] == 1).all() and (pixels[:, 3:] == 0).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    array = np.kron(random_array(2, 3), np.ones((16, 16, 1), dtype=np.uint8))  # survives JPEG
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(array).save(tmp_path / "photo.jpg", exif=exif, quality=100, subsampling=0)
    upright = {
        1: array,
        2: array[:, ::-1],
        3: array[::-1, ::-1],
        4: array[::-1],
        5: array.swapaxes(0, 1),
        6: np.rot90(array, -1),
        7: np.rot90(array, 2).swapaxes(0, 1),
        8: np.rot90(array),
    }[orientation]
    np.testing.assert_allclose(preprocess_unpadded(tmp_path / "photo.jpg"), upright / 255, atol=4 / 255)


def test_a_cmyk_jpeg_is_read(tmp_path):
    Image.new("RGB", (40, 24), (200, 100, 50)).convert("CMYK").save(tmp_path / "print.jpg", quality=100)
    with Image.open(tmp_path / "print.jpg") as image:
        assert image.mode == "CMYK"
    pixels = preprocess_unpadded(tmp_path / "print.jpg")
    np.testing.assert_allclose(pixels, np.broadcast_to([200, 100, 50], pixels.shape) / 255, atol=4 / 255)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16bit_gray_keeps_its_precision(tmp_path, suffix):
    gray = np.arange(65536, dtype=np.uint16).reshape(128, 512)
    path = tmp_path / f"gray{suffix}"
    Image.fromarray(gray).save(path)
    pixels = preprocess_unpadded(path)
    assert len(np.unique(pixels)) == 65536
    np.testing.assert_allclose(pixels[..., 0], gray / 65535, atol=1e-7)
    np.testing.assert_array_equal(pixels, preprocess_unpadded(gray))


@pytest.mark.parametrize("mode", ["I", "I;16", "I;16L", "I;16B", "I;16N"])
def test_16bit_modes_are_scaled_by_65535(mode):
    np.testing.assert_allclose(preprocess_unpadded(Image.new(mode, (5, 3), 13107)), 0.2, atol=1e-6)


def test_float_modes_are_in_the_unit_interval():
    np.testing.assert_allclose(preprocess_unpadded(Image.new("F", (5, 3), 0.3)), 0.3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_float_dtype_of_a_tensor_is_taken(dtype):
    tensor = torch.full((3, 5, 7), 0.25, dtype=dtype, requires_grad=True)
    assert (preprocess_unpadded(tensor) == 0.25).all()


@pytest.mark.parametrize("value", [np.ones((5, 7), dtype=bool), torch.ones(5, 7, dtype=torch.bool)])
def test_bool_is_black_and_white(value):
    assert (preprocess_unpadded(value) == 1).all()


# Back to pictures


def test_output_types():
    processor = ImageProcessor(patch_size=8)
    arrays = np.stack([random_array(20, 30, seed=i) for i in range(2)])
    pixels = processor.preprocess(arrays)
    tensor = processor.postprocess(pixels, output_type="pt")
    array = processor.postprocess(pixels, output_type="np")
    assert tensor.shape == (2, 3, 20, 30) and array.shape == (2, 20, 30, 3)
    np.testing.assert_allclose(array, arrays / 255, atol=1e-6)
    np.testing.assert_array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)


def test_crops_of_several_sizes_come_as_a_list():
    processor = ImageProcessor(patch_size=8)
    pixels = processor.preprocess([random_array(20, 30), random_array(9, 33)])
    assert [tuple(p.shape) for p in processor.postprocess(pixels, output_type="pt")] == [(3, 20, 30), (3, 9, 33)]
    assert [p.shape for p in processor.postprocess(pixels, output_type="np")] == [(20, 30, 3), (9, 33, 3)]
    assert [p.size for p in processor.postprocess(pixels)] == [(30, 20), (33, 9)]


def test_pil_pictures_are_rounded_and_clamped():
    pixels = torch.tensor([-3.0, 100.4 / 127.5 - 1, 100.6 / 127.5 - 1, 3.0]).expand(1, 3, 1, 4)
    (picture,) = ImageProcessor().postprocess(pixels)
    assert np.asarray(picture)[0, :, 0].tolist() == [0, 100, 101, 255]


def test_given_sizes_win_over_remembered_ones():
    processor = ImageProcessor(patch_size=16)
    pixels = processor.preprocess(random_array(20, 30))
    assert processor.postprocess(pixels, sizes=[(5, 32)])[0].size == (32, 5)


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (1, 3, 32, 48), (1, 3, 64, 64)])
def test_pixels_of_another_call_are_not_cropped(shape):
    processor = ImageProcessor(patch_size=16)
    processor.preprocess(random_array(20, 30))
    assert processor.postprocess(torch.zeros(shape), output_type="pt").shape == shape


def test_pixels_of_a_model_are_taken_with_gradient_and_in_half_precision():
    pixels = torch.zeros(1, 3, 16, 32, dtype=torch.bfloat16, requires_grad=True)
    processor = ImageProcessor()
    assert processor.postprocess(pixels)[0].size == (32, 16)
    assert processor.postprocess(pixels, output_type="np").dtype == np.float32
    assert processor.postprocess(pixels, output_type="pt").requires_grad


# Configuration


def test_the_config_is_saved_and_loaded_beside_that_of_a_model(tmp_path, caplog):
    ImageProcessor(patch_size=14).save_config(tmp_path)
    assert not (tmp_path / "config.json").exists()
    processor = ImageProcessor.from_config(ImageProcessor.load_config(tmp_path))
    assert processor.config.patch_size == 14
    assert not caplog.records
    assert processor.preprocess(random_array(20, 30)).shape == (1, 3, 28, 42)


def test_the_patch_size_comes_from_a_model():
    model = SimpleNamespace(config=SimpleNamespace(patch_size=12))
    assert ImageProcessor.from_model(model).config.patch_size == 12


@pytest.mark.parametrize("patch_size", [0, -16, 16.0, "16", None])
def test_a_patch_size_is_a_positive_integer(patch_size):
    with pytest.raises(ValueError, match=f"patch_size={patch_size!r}"):
        ImageProcessor(patch_size=patch_size)


# Wrong input

VALID = np.zeros((4, 6, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (None, "type NoneType; expected a path"),
        (7, "type int"),
        (b"bytes", "type bytes"),
        ([VALID], "type list"),
        (np.zeros((0, 5, 3), dtype=np.uint8), r"shape \(0, 5, 3\); no side may be zero"),
        (np.zeros((0, 5, 6, 3), dtype=np.uint8), r"shape \(0, 5, 6, 3\); no side"),
        (torch.zeros(3, 5, 0), r"shape \(3, 5, 0\); no side"),
        (Image.new("RGB", (0, 5)), "size is 0x5, no side may be zero"),
        (np.zeros(5, dtype=np.uint8), r"shape \(5,\); expected \(H, W\)"),
        (np.zeros((1, 1, 4, 6, 3), dtype=np.uint8), r"expected \(H, W\), \(H, W, C\)"),
        (torch.zeros(()), r"shape \(\); expected \(H, W\), \(C, H, W\)"),
        (np.zeros((3, 40, 60), dtype=np.uint8), "60 channels.*arrays are channels-last"),
        (torch.zeros(40, 60, 3), "40 channels.*tensors channels-first"),
        (torch.zeros(2, 40, 60, 3), "40 channels"),
        (np.zeros((40, 60, 5), dtype=np.uint8), "5 channels; expected .* with 1 to 4 channels"),
        (np.zeros((4, 6, 3), dtype=np.int64), "dtype int64; expected uint8, uint16, bool or floats"),
        (torch.zeros(3, 4, 6, dtype=torch.int32), "dtype int32"),
        (np.zeros((4, 6, 3), dtype=np.complex64), "dtype complex64"),
        (np.full((4, 6, 3), np.nan), "NaN or infinite"),
        (torch.full((3, 4, 6), float("inf")), "NaN or infinite"),
        (Image.new("F", (6, 4), float("nan")), "NaN or infinite"),
        (torch.linspace(-1, 0.5, 72).reshape(3, 4, 6), r"\[-1.0, 0.5\], not in \[0, 1\].*\[-1, 1\] go to the model"),
        (np.full((4, 6, 3), 255.0), r"\[255.0, 255.0\].*Divide 8-bit values by 255"),
        (Image.new("F", (6, 4), 1.5), r"\[1.5, 1.5\]"),
        (Image.new("I", (6, 4), 65536), r"\[65536, 65536\], not 16-bit ones"),
        (Image.new("I", (6, 4), -1), r"\[-1, -1\]"),
    ],
)
def test_a_wrong_image_is_named_with_its_rule_and_position(image, message):
    processor = ImageProcessor()
    with pytest.raises(ValueError, match=rf"images\[1\].*{message}"):
        processor.preprocess([VALID, image])
    if not isinstance(image, list):
        with pytest.raises(ValueError, match=rf"images .*{message}"):
            processor.preprocess(image)
    assert processor.sizes == []


@pytest.mark.parametrize("images", [[], ()])
def test_an_empty_list_is_refused(images):
    with pytest.raises(ValueError, match="empty list"):
        ImageProcessor().preprocess(images)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".gif", ".webp", ".tif"])
def test_a_truncated_file_is_named(tmp_path, suffix):
    path = tmp_path / f"half{suffix}"
    Image.fromarray(random_array(64, 80)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"images\[0\].*half{suffix}.*not a readable image"):
        ImageProcessor().preprocess([path])


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@settings(deadline=None, max_examples=60)
@given(suffix=st.sampled_from(["png", "jpg", "gif", "tif"]), position=st.integers(0, 999), byte=st.integers(0, 255))
def test_a_corrupt_file_is_read_or_refused_by_name(tmp_path_factory, suffix, position, byte):
    path = tmp_path_factory.mktemp("corrupt") / f"broken.{suffix}"
    Image.fromarray(random_array(8, 9)).save(path)
    content = bytearray(path.read_bytes())
    content[position % len(content)] = byte
    path.write_bytes(content)
    try:
        ImageProcessor().preprocess(path)
    except ValueError as error:
        assert "broken" in str(error)


def test_a_file_of_something_else_is_named(tmp_path):
    (tmp_path / "notes.txt").write_text("not a picture")
    with pytest.raises(ValueError, match=r"images.*notes\.txt.*not a readable image"):
        ImageProcessor().preprocess(tmp_path / "notes.txt")


def test_a_missing_file_stays_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.png"):
        ImageProcessor().preprocess([tmp_path / "missing.png"])
    with pytest.raises(IsADirectoryError):
        ImageProcessor().preprocess(tmp_path)


@pytest.mark.parametrize(
    ("pixels", "options", "message"),
    [
        (torch.zeros(1, 3, 16, 32), {"output_type": "latent"}, "output_type='latent'"),
        (np.zeros((1, 3, 16, 32)), {}, "type ndarray"),
        (torch.zeros(3, 16, 32), {}, r"shape \(3, 16, 32\)"),
        (torch.zeros(1, 4, 16, 32), {}, r"shape \(1, 4, 16, 32\)"),
        (torch.zeros(0, 3, 16, 32), {}, r"shape \(0, 3, 16, 32\)"),
        (torch.zeros(1, 3, 16, 32, dtype=torch.uint8), {}, "dtype torch.uint8"),
        (torch.full((1, 3, 16, 32), float("nan")), {}, "NaN or infinite"),
        (torch.zeros(1, 3, 16, 32), {"sizes": []}, "0 sizes for 1 pictures"),
        (torch.zeros(1, 3, 16, 32), {"sizes": [(16, 16), (16, 16)]}, "2 sizes for 1 pictures"),
        (torch.zeros(1, 3, 16, 32), {"sizes": [(17, 32)]}, r"sizes\[0\]=17x32 does not fit pixels of 16x32"),
        (torch.zeros(2, 3, 16, 32), {"sizes": [(16, 32), (16, 0)]}, r"sizes\[1\]=16x0"),
    ],
)
def test_wrong_pixels_are_named(pixels, options, message):
    with pytest.raises(ValueError, match=message):
        ImageProcessor().postprocess(pixels, **options)
