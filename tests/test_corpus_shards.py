import io
import tarfile

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from PIL import Image

from dinotok.corpus_shards import ShardError, class_names, find_shards, read_shard
from tests.tiny_corpora import encoded_pictures, tiny_corpus, write_archive, write_parquet


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def test_shards_are_found_in_an_order_that_depends_on_names_alone(tmp_path):
    for name in ("b/1.tar", "a/2.tar"):
        write_archive(tmp_path / name, [])
    write_parquet(tmp_path / "a" / "1.parquet", [])
    write_parquet(tmp_path / "out" / "tokens.parquet", [])
    (tmp_path / "a" / "notes.txt").touch()
    names = [shard.name for shard in find_shards([tmp_path], exclude=tmp_path / "out")]
    assert names == ["a/1.parquet", "a/2.tar", "b/1.tar"]
    with pytest.raises(ValueError, match="notes.txt' is neither a .parquet nor a .tar file"):
        find_shards([tmp_path / "a" / "notes.txt"], exclude=tmp_path / "out")


def test_files_of_an_archive_are_grouped_as_webdataset_does(tmp_path):
    first, second = encoded_pictures(2)
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("x"), None)
        for name, content in (
            ("x/1.seg.png", b"a mask"),
            ("x/1.JPG", first),
            ("x/1.webp", b"a second picture"),
            ("x/1.cls", b" 7\n"),
            ("__meta__.json", b"{}"),
            ("x/.hidden.jpg", b""),
            ("x.y/1.cls", b"cat"),
            ("x.y/1.jpg", second),
        ):
            add(archive, name, content)
    samples = list(read_shard(tmp_path / "a.tar", "image", "label"))
    assert [(sample.key, sample.picture, sample.label) for sample in samples] == [
        ("x", None, None),
        ("x/1", first, 7),
        ("x.y/1", second, "cat"),
    ]
    assert samples[0].error == "The sample has no picture."
    named = list(read_shard(tmp_path / "a.tar", "seg.png", None))
    assert [(sample.picture, sample.label) for sample in named] == [(None, None), (b"a mask", None), (None, None)]


def test_rows_of_a_table_have_their_paths_or_numbers_as_keys(tmp_path):
    pictures = encoded_pictures(2)
    path = write_parquet(tmp_path / "a.parquet", [pictures[0], None, pictures[1]], [5, 6, 7])
    samples = list(read_shard(path, "image", "label"))
    assert [(sample.key, sample.label) for sample in samples] == [("a/0.jpg", 5), ("a/1.jpg", 6), ("a/2.jpg", 7)]
    assert (
        isinstance(samples[0].picture, Image.Image) and samples[1].picture is None and "no bytes" in samples[1].error
    )
    Dataset.from_dict({"image": pictures}).to_parquet(tmp_path / "b.parquet")
    assert [sample.key for sample in read_shard(tmp_path / "b.parquet", "image", None)] == ["0", "1"]
    with pytest.raises(ShardError, match="has no column 'photo'"):
        list(read_shard(path, "photo", None))
    with pytest.raises(ShardError, match="Column 'class' of"):
        list(read_shard(path, "image", "class"))


def test_a_decompression_bomb_is_one_bad_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    path = write_parquet(tmp_path / "a.parquet", encoded_pictures(1))
    (sample,) = read_shard(path, "image", None)
    assert sample.picture is None and "decompression bomb" in sample.error


def test_classes_come_from_the_file_the_option_or_nowhere(tmp_path):
    features = Features({"image": Value("binary"), "label": ClassLabel(names=["cat", "dog"])})
    Dataset.from_dict({"image": [b""], "label": [1]}, features=features).to_parquet(tmp_path / "named.parquet")
    named = [tmp_path / "named.parquet"]
    assert class_names(named, "label") == ("label", ["cat", "dog"])
    assert class_names(named, None) == (None, ["picture"])
    assert class_names(named, "label", "3") == ("label", ["0", "1", "2"])
    numbered = sorted(tiny_corpus(tmp_path / "in").iterdir())
    for path in numbered[:2]:  # of both kinds
        with pytest.raises(ValueError, match="pass --classes"):
            class_names([path], "label")
    # An empty or damaged first shard does not decide that there are no labels.
    (tmp_path / "damaged.tar").write_bytes(b"x")
    empty = write_archive(tmp_path / "empty.tar", [])
    with pytest.raises(ValueError, match="001.tar' has labels"):
        class_names([empty, tmp_path / "damaged.tar", numbered[1]], "label")
    plain = write_archive(tmp_path / "plain.tar", encoded_pictures(1))
    assert class_names([empty, plain], "label") == (None, ["picture"])
    with pytest.raises(ValueError, match="no labels in 'category'"):
        class_names([plain], "category")
    (tmp_path / "names.txt").write_text("cat\n\ndog\n")
    with pytest.raises(ValueError, match="empty lines"):
        class_names([plain], "label", str(tmp_path / "names.txt"))
