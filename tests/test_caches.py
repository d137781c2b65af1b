"""What caches of latents and of tokens share: one kind is never taken for the other."""

from dataclasses import fields, replace

import pytest
from datasets import Dataset

from dinotok.caches import begin_cache, open_files
from dinotok.latent_caches import LatentCacheDescription
from dinotok.picture_sources import label_names
from dinotok.token_caches import CacheDescription

COMMON = {
    "tokenizer": "tokenizer",
    "tokenizer_digest": "digest",
    "dataset": "pictures",
    "num_pictures": 5,
    "label_names": ["a", "b"],
    "resolution": 32,
    "crop": "center",
    "flip": True,
    "views": 2,
    "seed": 0,
    "shard_size": 2,
    "mixed_precision": "no",
}
LATENTS = LatentCacheDescription(**COMMON, shape=[3, 2, 4], dtype="float16")
TOKENS = CacheDescription(**COMMON, codebook_sizes={"semantic": 8}, grid=[2, 4])


@pytest.mark.parametrize(("there", "wanted"), [(LATENTS, TOKENS), (TOKENS, LATENTS)])
def test_one_kind_of_cache_is_not_taken_for_the_other(tmp_path, there, wanted):
    begin_cache(tmp_path, there)
    with pytest.raises(ValueError, match=rf"is not of this version's format \({wanted.FORMAT_NAME}, 1\)"):
        begin_cache(tmp_path, wanted)
    with pytest.raises(ValueError, match="is not of this version's format"):
        open_files(tmp_path, type(wanted))


@pytest.mark.parametrize("description", [LATENTS, TOKENS])
def test_a_description_is_read_as_it_was_written(tmp_path, description):
    missing = begin_cache(tmp_path, description)
    assert missing == [(view, pictures) for view in (0, 1) for pictures in (range(2), range(2, 4), range(4, 5))]
    for shard in missing:
        description.shard_path(tmp_path, *shard).touch()
    assert open_files(tmp_path, type(description))[0] == description
    assert begin_cache(tmp_path, description) == []


@pytest.mark.parametrize("description", [LATENTS, TOKENS])
def test_every_difference_counts_but_where_things_lie(tmp_path, description):
    begin_cache(tmp_path, description)
    begin_cache(tmp_path, replace(description, tokenizer="moved", dataset="moved"))
    for name in {field.name for field in fields(description)} - {"tokenizer", "dataset"}:
        with pytest.raises(ValueError, match=f"has {description.CONTENT} with {name}="):
            begin_cache(tmp_path, replace(description, **{name: "other"}))


def test_classes_without_names_are_numbered_and_pictures_without_labels_refused():
    assert label_names(Dataset.from_dict({"label": [0, 2]})) == ["0", "1", "2"]
    named = Dataset.from_dict({"label": [2, 0, 2], "class_name": ["tench", "church", "tench"]})
    assert label_names(named) == ["church", "1", "tench"]
    with pytest.raises(ValueError, match="no column 'label'"):
        label_names(Dataset.from_dict({"image": [0]}))
