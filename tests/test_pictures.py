import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from dinotok.pictures import SheetEntry, _shorten, enlarge, pca_colors, sheet, spread


def random_latents(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Colours


@pytest.mark.parametrize("shape", [(7, 4, 6), (2, 7, 4, 6), (3, 1, 1), (1, 4, 6), (2, 4, 6)])
def test_colors_are_8bit_rgb_on_the_grid_of_the_latents(shape):
    colors = pca_colors(random_latents(*shape))
    assert colors.dtype == np.uint8
    assert colors.shape == (*shape[:-3], *shape[-2:], 3)


def test_the_first_components_fill_the_range_in_order_of_variance():
    components = random_latents(3, 40, 50) * torch.tensor([9.0, 5.0, 2.0])[:, None, None]
    rotation = torch.linalg.qr(random_latents(8, 8, seed=1))[0][:, :3]
    latents = torch.einsum("cd,dhw->chw", rotation, components) + 3
    colors = pca_colors(latents).astype(float)
    assert colors.min() == 0 and colors.max() == 255
    for color, component in enumerate(components):
        correlation = np.corrcoef(colors[..., color].ravel(), component.numpy().ravel())[0, 1]
        assert abs(correlation) > 0.98


def test_an_outlier_does_not_darken_the_rest():
    latents = random_latents(3, 40, 50)
    latents[:, 0, 0] = 1e4
    assert pca_colors(latents).std() > 5


def test_latents_that_do_not_vary_are_gray():
    np.testing.assert_array_equal(pca_colors(torch.full((5, 2, 2), 7.0)), 128)
    np.testing.assert_array_equal(pca_colors(random_latents(1, 8, 8))[..., 1:], 128)


def test_pictures_of_a_batch_share_their_colors():
    first = random_latents(5, 6, 6)
    colors = pca_colors(torch.stack([first, random_latents(5, 6, 6, seed=1), first]))
    np.testing.assert_array_equal(colors[0], colors[2])


def test_colors_need_finite_grids():
    with pytest.raises(ValueError, match=r"shape \(4, 5\)"):
        pca_colors(torch.zeros(4, 5))
    with pytest.raises(ValueError, match="NaN"):
        pca_colors(torch.full((3, 2, 2), float("nan")))


def test_enlarge_repeats_and_crops():
    colors = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    picture = np.asarray(enlarge(colors, 4, (7, 8)))
    assert picture.shape == (7, 8, 3)
    np.testing.assert_array_equal(picture[6, 3], colors[1, 0])


# Sheets


def test_nothing_on_a_sheet_touches_its_edge():
    entries = [
        SheetEntry(["a name that is much longer than the picture is wide " * 3, "12x900"], [Image.new("L", size)] * 2)
        for size in [(5, 5), (900, 12), (300, 900), (1, 3000)]
    ]
    for columns in (1, 2, 3, 9):
        array = np.asarray(sheet(["original", "a title"], entries, columns))
        edges = (array[:4], array[-4:], array[:, :4], array[:, -4:])
        assert all((edge == 255).all() for edge in edges)
        assert (array < 128).any()


def test_pictures_of_moderate_size_are_shown_as_they_are():
    array = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    result = np.asarray(sheet(["original"], [SheetEntry(["x"], [Image.fromarray(array)])]))
    windows = np.lib.stride_tricks.sliding_window_view(result[..., 0], array.shape[:2])
    assert (windows[:, :, ::50, ::50] == array[::50, ::50, 0]).all(axis=(2, 3)).sum() == 1


def test_a_sheet_needs_entries_that_fit_its_titles():
    with pytest.raises(ValueError, match="at least one entry"):
        sheet(["original"], [])
    with pytest.raises(ValueError, match=r"\[1\] pictures; .* 2 pictures each"):
        sheet(["a", "b"], [SheetEntry([], [Image.new("L", (2, 2))])])


@pytest.mark.parametrize("width", [100, 200, 300])
def test_long_lines_keep_both_ends(width):
    font = ImageFont.load_default(size=17)
    line = "folder/" + "x" * 200 + "/name.jpg"
    short = _shorten(line, font, width)
    assert font.getlength(short) <= width
    assert short[0] == "f" and short[-1] == "g" and "..." in short
    assert _shorten("short.jpg", font, width) == "short.jpg"


def test_spread_goes_from_the_first_to_the_last():
    assert spread(3, 8) == [0, 1, 2]
    assert spread(101, 5) == [0, 25, 50, 75, 100]
    assert spread(9, 1) == [0]
    assert spread(0, 8) == []
