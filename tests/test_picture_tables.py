import io
import time

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.table import embed_table_storage
from PIL import Image

from dinotok.folders import find_pictures, read_pictures
from dinotok.image_processor import ImageProcessor
from dinotok.picture_tables import PictureTable
from tests.tiny_tokenizers import save_picture


def encoded(value, size=(20, 10)):
    stream = io.BytesIO()
    Image.new("RGB", size, (value, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def red(picture):
    return round((picture.values[0, 0, 0].item() + 1) * 127.5)


def read(paths, failures=None, **options):
    def fail(name, error):
        if failures is None:
            raise error
        failures.append((name, str(error)))

    files = find_pictures(paths, fail, **options)
    return list(read_pictures(files, ImageProcessor(16), fail))


@pytest.mark.parametrize("kind", ["bytes", "struct", "large"])
def test_rows_are_pictures_in_their_order(tmp_path, kind):
    cells = [encoded(i) for i in range(50)]
    column = {
        "bytes": pa.array(cells),
        "large": pa.array(cells, pa.large_binary()),
        "struct": pa.array([{"bytes": cell, "path": f"a/{49 - i}.jpg"} for i, cell in enumerate(cells)]),
    }[kind]
    pq.write_table(pa.table({"n": list(range(50)), "photo": column}), tmp_path / "train.parquet", row_group_size=20)
    pictures = read([tmp_path], column="photo")
    assert [red(picture) for picture in pictures] == list(range(50))
    assert all(picture.size == (10, 20) for picture in pictures)
    expected = [f"a/{49 - i}.jpg" if kind == "struct" else f"train-{i:06d}" for i in range(50)]
    assert [picture.name for picture in pictures] == expected


def test_a_data_set_that_datasets_wrote_is_read_beside_pictures(tmp_path):
    paths = [str(save_picture(tmp_path / "raw" / f"{i}.jpg", 30 + i, 20, seed=i)) for i in range(3)]
    rows = datasets.Dataset.from_dict({"image": paths}).cast_column("image", datasets.Image())
    rows.to_parquet(tmp_path / "paths.parquet")  # which does not embed files
    embedded = rows.with_format("arrow").map(embed_table_storage, batched=True, keep_in_memory=True)
    embedded.to_parquet(tmp_path / "in" / "sub" / "train.parquet")
    save_picture(tmp_path / "in" / "z.png", 16, 16)
    pictures = read([tmp_path / "in"], recursive=True)
    assert [picture.name for picture in pictures] == ["z.png", "sub/0.jpg", "sub/1.jpg", "sub/2.jpg"]
    for path, picture in zip(paths, pictures[1:], strict=True):
        np.testing.assert_array_equal(picture.values, ImageProcessor(16).preprocess(path)[0])
    failures = []
    assert read([tmp_path / "paths.parquet"], failures) == [] and len(failures) == 3
    assert "only the path" in failures[0][1] and "pass the picture files themselves" in failures[0][1]


def test_rows_can_be_chosen_in_any_order(tmp_path):
    pq.write_table(pa.table({"image": [encoded(i) for i in range(50)]}), tmp_path / "x.parquet", row_group_size=20)
    table = PictureTable(tmp_path / "x.parquet")
    for row in (49, 3, 4, 39, 20, 19, 0):
        assert table.picture(row).getpixel((0, 0))[0] == row


def test_names_of_rows_are_unique_and_stay_in_the_folder(tmp_path):
    names = ["x.jpg", "x.jpg", "../x.jpg", "/etc/x.jpg", None, ""]
    cells = pa.array([{"bytes": encoded(i), "path": name} for i, name in enumerate(names)])
    pq.write_table(pa.table({"image": cells}), tmp_path / "t.parquet")
    found = [picture.name for picture in read([tmp_path / "t.parquet"])]
    assert found == ["x.jpg", "x-2.jpg", "t-000002", "t-000003", "t-000004", "t-000005"]


def test_ten_thousand_rows_of_one_name_are_named_quickly(tmp_path):
    cells = pa.array([{"bytes": b"", "path": "image.jpg"}] * 10_000)
    pq.write_table(pa.table({"image": cells}), tmp_path / "t.parquet")
    start = time.perf_counter()
    assert find_pictures([tmp_path], lambda *_: None)[-1].name == "image-10000.jpg"
    assert time.perf_counter() - start < 5


def test_bad_rows_and_files_are_reported_and_the_others_read(tmp_path):
    cells = [encoded(0), b"no picture", None, encoded(3)[:45], encoded(4)]
    pq.write_table(pa.table({"image": pa.array(cells, pa.binary())}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"image": [1, 2]}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"photo": cells}), tmp_path / "c.parquet")
    (tmp_path / "d.parquet").write_bytes(b"no table")
    failures = []
    assert [red(picture) for picture in read([tmp_path], failures)] == [0, 4]
    reasons = dict(failures)
    assert list(reasons) == ["b.parquet", "c.parquet", "d.parquet", "a-000001", "a-000002", "a-000003"]
    assert "is int64, not the bytes of pictures" in reasons["b.parquet"]
    assert "no column 'image', only photo: pass --image-column" in reasons["c.parquet"]
    assert "not a parquet file" in reasons["d.parquet"]
    assert "not a readable image" in reasons["a-000001"] and "not a readable image" in reasons["a-000003"]
    assert "has no bytes" in reasons["a-000002"]


def test_damaged_pages_fail_and_the_next_row_group_is_read(tmp_path):
    generator = np.random.default_rng(0)
    noise = [Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(6)]
    cells = []
    for picture in noise:
        stream = io.BytesIO()
        picture.save(stream, "PNG")
        cells.append(stream.getvalue())
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"image": cells}), path, row_group_size=3, use_dictionary=False)
    content = bytearray(path.read_bytes())
    start = pq.ParquetFile(path).metadata.row_group(0).column(0).data_page_offset
    content[start : start + 30] = b"\xff" * 30
    path.write_bytes(content)
    failures = []
    assert [picture.name for picture in read([path], failures)] == ["x-000003", "x-000004", "x-000005"]
    assert [name for name, _ in failures] == ["x-000000", "x-000001", "x-000002"]
    assert all("is damaged" in reason for _, reason in failures)
