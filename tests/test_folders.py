import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dinotok.folders import (
    FoundFile,
    Picture,
    check_output,
    equal_batches,
    find_files,
    png_names,
    read_pictures,
    write_png,
    writing,
)
from dinotok.image_processor import ImageProcessor
from tests.tiny_tokenizers import save_picture


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def found_names(*paths: Path, **options) -> list[str]:
    return [file.name for file in find_files(paths, **options)]


# Finding


def test_pictures_of_a_folder_are_sorted_and_nothing_else_is_taken(tmp_path):
    touch(tmp_path, "b.JPG", "a.png", "notes.txt", ".hidden.png", "sub/c.webp", ".cache/d.png")
    assert found_names(tmp_path) == ["a.png", "b.JPG"]
    assert found_names(tmp_path, recursive=True) == ["a.png", "b.JPG", "sub/c.webp"]


def test_names_are_relative_to_what_all_inputs_have_in_common(tmp_path):
    touch(tmp_path, "a/x.jpg", "b/x.png", "b/c/y.png")
    assert found_names(tmp_path / "a" / "x.jpg") == ["x.jpg"]
    assert found_names(tmp_path / "a" / "x.jpg", tmp_path / "b" / "x.png") == ["a/x.jpg", "b/x.png"]
    assert found_names(tmp_path / "b", tmp_path / "a", recursive=True) == ["b/x.png", "b/c/y.png", "a/x.jpg"]


def test_a_file_named_twice_is_taken_once(tmp_path, monkeypatch):
    touch(tmp_path, "x.jpg")
    monkeypatch.chdir(tmp_path)
    assert found_names(tmp_path, tmp_path / "x.jpg", Path("x.jpg")) == ["x.jpg"]


def test_a_file_that_is_named_may_have_any_suffix(tmp_path):
    touch(tmp_path, "photo.v2")
    assert found_names(tmp_path / "photo.v2") == ["photo.v2"]


def test_the_output_folder_is_not_searched(tmp_path):
    touch(tmp_path, "x.jpg", "out/x.png")
    assert found_names(tmp_path, recursive=True, exclude=tmp_path / "out") == ["x.jpg"]


def test_a_name_that_is_not_utf8_becomes_printable(tmp_path):
    names = [b"caf\xe9.png", b"caf\xe8.png"]
    try:
        for name in names:
            Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).touch()
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    assert found_names(tmp_path) == ["caf\ufffd.png", "caf\ufffd-2.png"]


def test_missing_paths_and_empty_folders_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere' does not exist"):
        find_files([tmp_path / "nowhere"])
    touch(tmp_path, "sub/x.jpg")
    with pytest.raises(ValueError, match=r"No .*\.jpg.* files in .*--recursive"):
        find_files([tmp_path])


# Naming


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a/x.jpg", "b/x.png"], ["a/x.png", "b/x.png"]),
        (["x.jpg", "x.png", "y.gif"], ["x.jpg.png", "x.png.png", "y.png"]),
        (["X.jpg", "x.tif"], ["X.jpg.png", "x.tif.png"]),
        (["x.jpg", "x.png", "x.jpg.png"], ["x.jpg.png", "x.png.png", "x.jpg-2.png"]),
        (["x.jpg", "x.jpg"], ["x.jpg.png", "x.jpg-2.png"]),
        (["photo.v2", "archive.tar"], ["photo.v2.png", "archive.tar.png"]),
        (["sheet.jpg"], ["sheet.jpg.png"]),
    ],
)
def test_names_of_results(names, expected):
    assert png_names(names) == expected


@given(st.lists(st.sampled_from(["a", "A", "a-2", "a.png", "a.jpg", "A.jpg", "a.jpg.png", "sheet.png", "b/a.jpg"])))
def test_no_two_results_share_a_name(names):
    results = [name.casefold() for name in png_names(names)]
    assert len({*results, "sheet.png"}) == len(names) + 1
    assert all(name.endswith(".png") for name in results)


# Batches


@given(shapes=st.lists(st.integers(1, 3)), batch_size=st.integers(1, 4))
def test_batches_keep_order_and_have_one_shape(shapes, batch_size):
    pictures = [Picture(str(i), (1, 1), torch.zeros(side)) for i, side in enumerate(shapes)]
    batches = list(equal_batches(pictures, batch_size))
    assert [picture for batch in batches for picture in batch] == pictures
    assert all(len({p.values.shape for p in batch}) == 1 and len(batch) <= batch_size for batch in batches)
    for batch, following in zip(batches, batches[1:], strict=False):
        assert len(batch) == batch_size or batch[0].values.shape != following[0].values.shape


def test_a_batch_is_handed_on_before_more_is_read():
    read = []

    def pictures():
        for i in range(100):
            read.append(i)
            yield Picture(str(i), (1, 1), torch.zeros(1))

    next(equal_batches(pictures(), 3))
    assert len(read) == 3


def test_pictures_that_cannot_be_read_are_reported_and_left_out(tmp_path):
    save_picture(tmp_path / "good.png", 20, 10)
    (tmp_path / "bad.png").write_text("no picture")
    failures = []
    files = [*find_files([tmp_path]), FoundFile(tmp_path / "gone.png", "gone.png")]
    pictures = list(read_pictures(files, ImageProcessor(16), lambda name, error: failures.append(name)))
    assert [(p.name, p.size, tuple(p.values.shape)) for p in pictures] == [("good.png", (10, 20), (3, 16, 32))]
    assert failures == ["bad.png", "gone.png"]


# Writing


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "new" / "x.txt"
    with writing(path) as temporary:
        temporary.write_text("old")
    with pytest.raises(RuntimeError), writing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["x.txt"]


def test_write_png_ignores_the_suffix(tmp_path):
    write_png(Image.new("RGB", (3, 2)), tmp_path / "a" / "x.jpg")
    with Image.open(tmp_path / "a" / "x.jpg") as image:
        assert (image.format, image.size) == ("PNG", (3, 2))


def test_sources_are_never_overwritten(tmp_path):
    touch(tmp_path, "x.png", "y.jpg")
    with pytest.raises(ValueError, match=r"x\.png' is an input and would be overwritten"):
        check_output(tmp_path, find_files([tmp_path]))
    check_output(tmp_path / "out", find_files([tmp_path]))
    with pytest.raises(ValueError, match=r"y\.jpg' is a file"):
        check_output(tmp_path / "y.jpg")
