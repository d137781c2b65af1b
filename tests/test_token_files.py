import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from dinotok import token_files
from dinotok.folders import Picture
from dinotok.shards import ModelOrigin
from dinotok.token_files import open_token_shard, read_tokens, write_token_shards

ORIGIN = ModelOrigin("user/model", "c0ffee", "sha256:12", "VQModelDINOTok", 16, {"dtype": "float32"})
SIZES = {"semantic": 100, "texture": 50}


def random_pictures(count, grids=((2, 3),), size=50, seed=0):
    """Pictures whose grids alternate, not in alphabetical order."""
    generator = torch.Generator().manual_seed(seed)
    pictures = []
    for i in range(count):
        rows, columns = grids[i % len(grids)]
        indices = torch.randint(size, (2, rows, columns), generator=generator)
        pictures.append(Picture(f"sub/{-i % count}.png", (rows * 16 - 2, columns * 16), indices))
    return pictures


def read_all(paths):
    return [picture for path in paths for picture in read_tokens(open_token_shard(path))]


def test_tokens_come_back_identical_whatever_the_order_of_their_grids(tmp_path):
    pictures = random_pictures(11, grids=[(2, 3), (3, 2), (1, 6)])
    paths = list(write_token_shards(iter(pictures), tmp_path / "new", ORIGIN, SIZES, shard_size=3))
    names = ["tokens-1x6-00000", "tokens-2x3-00000", "tokens-2x3-00001", "tokens-3x2-00000", "tokens-3x2-00001"]
    assert sorted(path.stem for path in paths) == names
    found = {picture.name: picture for picture in read_all(paths)}
    assert len(found) == 11
    for before in pictures:
        after = found[before.name]
        assert (after.size, after.values.dtype) == (before.size, torch.int64)
        assert torch.equal(after.values, before.values)
    first = open_token_shard(tmp_path / "new" / "tokens-2x3-00000.parquet")
    assert (first.origin, first.codebook_sizes, first.shape) == (ORIGIN, SIZES, (2, 2, 3))
    assert list(first.sizes) == [picture.name for picture in pictures[::3][:3]]  # the order of writing


@pytest.mark.parametrize(("size", "dtype"), [(2**16, pa.uint16()), (2**16 + 1, pa.int32())])
def test_the_largest_index_fits_the_type(tmp_path, size, dtype):
    picture = Picture("x", (16, 16), torch.tensor([0, size - 1]).view(2, 1, 1))
    (path,) = write_token_shards([picture], tmp_path, ORIGIN, {"semantic": 4, "texture": size})
    assert pq.read_schema(path).field("indices").type.value_type == dtype
    assert torch.equal(read_all([path])[0].values, picture.values)


def test_datasets_reads_the_shards_of_a_grid(tmp_path, monkeypatch):
    pictures = random_pictures(5)
    list(write_token_shards(pictures, tmp_path / "tokens", ORIGIN, SIZES, shard_size=2))
    pattern = str(tmp_path / "tokens" / "tokens-2x3-*.parquet")
    rows = datasets.load_dataset("parquet", data_files=pattern, split="train", cache_dir=str(tmp_path / "cache"))
    assert rows.features["indices"] == datasets.List(datasets.Value("uint16"), length=12)
    for row, picture in zip(rows.with_format("torch"), pictures, strict=True):
        assert row["file"] == picture.name and (row["height"], row["width"]) == picture.size
        assert torch.equal(row["indices"].view(2, row["grid_height"], row["grid_width"]), picture.values)


def test_metadata_is_what_a_stranger_needs(tmp_path):
    (path,) = write_token_shards(random_pictures(2), tmp_path, ORIGIN, SIZES)
    metadata = {key.decode(): value.decode() for key, value in pq.read_schema(path).metadata.items()}
    assert metadata["format"] == "dinotok-tokens" and metadata["format_version"] == "1"
    assert (metadata["model"], metadata["model_revision"], metadata["patch_size"]) == ("user/model", "c0ffee", "16")
    assert json.loads(metadata["codebook_sizes"]) == SIZES and json.loads(metadata["shape"]) == [2, 2, 3]


def test_memory_is_bounded_where_every_picture_has_another_grid(tmp_path, monkeypatch):
    monkeypatch.setattr(token_files, "MAX_BUFFERED_BYTES", 100)
    pictures = random_pictures(20, grids=[(1, n) for n in range(1, 11)])
    written = []
    shards = write_token_shards(pictures, tmp_path, ORIGIN, SIZES)
    first = next(shards)
    assert len(list(tmp_path.iterdir())) == 1  # long before the end
    written = [first, *shards]
    assert sorted(p.name for p in read_all(written)) == sorted(p.name for p in pictures)


def test_a_name_that_comes_twice_and_shards_of_another_run_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'sub/0\.png' comes twice"):
        list(write_token_shards(random_pictures(1) * 2, tmp_path, ORIGIN, SIZES))
    assert list(tmp_path.iterdir()) == []
    list(write_token_shards(random_pictures(1), tmp_path, ORIGIN, SIZES))
    with pytest.raises(ValueError, match=r"has 1 shards already, first 'tokens-2x3-00000\.parquet'"):
        list(write_token_shards(random_pictures(1), tmp_path, ORIGIN, SIZES))


# Damage


@pytest.fixture
def shard(tmp_path):
    (path,) = write_token_shards(random_pictures(3), tmp_path, ORIGIN, SIZES)
    return path


def rewrite(path, columns=None, **metadata):
    """Write a shard again with other metadata or columns; None removes an entry."""
    table = pq.read_table(path)
    entries = {key.decode(): value.decode() for key, value in table.schema.metadata.items()} | metadata
    for name, values in (columns or {}).items():
        table = table.set_column(table.schema.get_field_index(name), name, values)
    pq.write_table(table.replace_schema_metadata({k: v for k, v in entries.items() if v is not None}), path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format": None}, "without tokens"),
        ({"format_version": "2"}, "format_version='2', this dinotok .* reads '1'"),
        ({"model_digest": None}, "damaged: it lacks 'model_digest'"),
        ({"patch_size": "x"}, "damaged: invalid literal"),
        ({"patch_size": "4"}, "damaged: 'sub/0.png' is 30x48, which does not fit into 8x12"),
        ({"shape": "[2, 2, 4]"}, "damaged: indices are .*which does not fit the shape"),
        ({"shape": "[12]"}, "damaged"),
        ({"codebook_sizes": '{"semantic": 100}'}, "damaged: it names 1 codebooks, the indices are of 2"),
        ({"codebook_sizes": "[100, 50]"}, "damaged"),
    ],
)
def test_metadata_that_contradicts_the_rows_is_refused(shard, metadata, message):
    rewrite(shard, **metadata)
    with pytest.raises(ValueError, match=message) as error:
        open_token_shard(shard)
    assert str(shard) in str(error.value)


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("file", ["a", "../b", "c"], "'../b' is not a relative path inside a folder"),
        ("file", ["a", "b", "a"], "its 3 rows have only 2 names"),
        ("file", ["a", None, "b"], "damaged"),
        ("height", [30, None, 30], "damaged"),
        ("width", [48, 49, 48], "is 30x49, which does not fit into 32x48"),
    ],
)
def test_rows_that_cannot_be_pictures_are_refused(shard, column, values, message):
    rewrite(shard, {column: pa.array(values)})
    with pytest.raises(ValueError, match=message):
        open_token_shard(shard)


@pytest.mark.parametrize("index", [100, -1])
def test_an_index_outside_its_codebook_is_refused(shard, index):
    rows = torch.stack([picture.values.flatten() for picture in read_all([shard])])
    rows[1, 5] = index  # the last of the semantic codebook
    values = pa.FixedSizeListArray.from_arrays(pa.array(rows.flatten().numpy(), pa.int32()), 12)
    rewrite(shard, {"indices": values})
    pictures = read_tokens(open_token_shard(shard))
    assert next(pictures).name == "sub/0.png"
    with pytest.raises(ValueError, match=f"'sub/2.png' has the index {index} in codebook 0; .* {{'semantic': 100"):
        next(pictures)


def test_rows_without_indices_are_refused(shard):
    values = pa.array([[0] * 12, None, [0] * 12], pa.list_(pa.uint16(), 12))
    rewrite(shard, {"indices": values})
    with pytest.raises(ValueError, match="rows without indices"):
        read_all([shard])


def test_truncated_foreign_and_missing_files_are_refused(shard, tmp_path):
    content = shard.read_bytes()
    for length in (0, 7, 100, len(content) - 1):
        shard.write_bytes(content[:length])
        with pytest.raises(ValueError, match="truncated, damaged or not a parquet file"):
            open_token_shard(shard)
    pq.write_table(pa.table({"image": [b"x"]}), shard)
    with pytest.raises(ValueError, match="is a parquet file without tokens"):
        open_token_shard(shard)
    with pytest.raises(FileNotFoundError):
        open_token_shard(tmp_path / "missing.parquet")
    with pytest.raises(IsADirectoryError):
        open_token_shard(tmp_path)


def test_a_flipped_bit_does_not_pass_for_other_tokens(tmp_path):
    (path,) = write_token_shards(random_pictures(50), tmp_path, ORIGIN, SIZES)
    column = pq.ParquetFile(path).metadata.row_group(0).column(5)
    content = bytearray(path.read_bytes())
    content[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged: .*CRC"):
        read_all([path])
