"""Caches of latents: whole or not there, gone on with or refused, read in an order that resumes."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from dinotok.latent_caches import (
    LatentCacheDescription,
    LatentLoader,
    begin_latent_cache,
    is_latent_cache,
    open_latent_cache,
    write_latent_shard,
)

DESCRIPTION = LatentCacheDescription(
    tokenizer="user/tokenizer",
    tokenizer_digest="sha256:0",
    shape=[3, 2, 4],
    dataset="photos",
    num_pictures=5,
    label_names=["a", "b"],
    resolution=64,
    crop="center",
    flip=True,
    views=2,
    seed=0,
    shard_size=2,
    mixed_precision="no",
    dtype="float32",
)


def latents_of(view: int, picture: int) -> torch.Tensor:
    return torch.full((3, 2, 4), view + picture / 10)


def fill(folder, description=DESCRIPTION, skip=(), limit=None):
    """Write what is missing, as the script does; pictures to skip could not be read."""
    for view, pictures in begin_latent_cache(folder, description)[:limit]:
        rows = [(p, p % 2, latents_of(view, p)) for p in pictures if p not in skip]
        write_latent_shard(folder, description, view, pictures, rows)


def test_every_view_of_every_picture_is_there_once(tmp_path):
    fill(tmp_path)
    assert len(list(tmp_path.glob("latents-*.safetensors"))) == 6
    cache = open_latent_cache(tmp_path)
    assert len(cache) == 10 and cache.description == DESCRIPTION and is_latent_cache(tmp_path)
    for index, (view, picture) in enumerate((v, p) for v in range(2) for p in range(5)):
        latents, label = cache.row(index)
        assert torch.equal(latents, latents_of(view, picture)) and label == picture % 2


def test_pictures_that_could_not_be_read_are_left_out(tmp_path):
    fill(tmp_path, skip=(0, 1, 4))
    cache = open_latent_cache(tmp_path)
    assert [float(cache.row(i)[0][0, 0, 0]) for i in range(len(cache))] == pytest.approx([0.2, 0.3, 1.2, 1.3])
    with pytest.raises(ValueError, match="none of its pictures could be read"):
        fill(tmp_path / "empty", skip=range(5))
        open_latent_cache(tmp_path / "empty")


def test_an_interrupted_cache_is_gone_on_with_and_not_read_before(tmp_path):
    fill(tmp_path, limit=2)
    with pytest.raises(ValueError, match="4 of 6 files are missing, first 'latents-00-00002.safetensors'"):
        open_latent_cache(tmp_path)
    moved = replace(DESCRIPTION, tokenizer="elsewhere", dataset="elsewhere")
    assert len(begin_latent_cache(tmp_path, moved)) == 4
    fill(tmp_path)
    assert len(open_latent_cache(tmp_path)) == 10


@pytest.mark.parametrize("change", [{"resolution": 32}, {"tokenizer_digest": "sha256:1"}, {"dtype": "float16"}])
def test_latents_of_something_else_are_not_mixed_in(tmp_path, change):
    fill(tmp_path, limit=1)
    with pytest.raises(ValueError, match=f"has latents with {next(iter(change))}="):
        begin_latent_cache(tmp_path, replace(DESCRIPTION, **change))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_numbers_are_stored_as_asked_and_read_as_float32(tmp_path, dtype):
    fill(tmp_path, replace(DESCRIPTION, dtype=dtype))
    stored = load_file(tmp_path / "latents-00-00000.safetensors")["latents"]
    assert str(stored.dtype) == f"torch.{dtype}"
    batch = next(LatentLoader(open_latent_cache(tmp_path), 3).batches())
    assert batch["latents"].dtype == torch.float32 and batch["labels"].dtype == torch.int64


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((0, 0, torch.zeros(3, 4, 2)), r"picture 0 have shape \(3, 4, 2\)"),
        ((1, 2, torch.zeros(3, 2, 4)), r"Picture 1 has the label 2, not in 0\.\.1"),
        ((0, 0, torch.full((3, 2, 4), 1e6)), "picture 0 are not finite in float16"),
    ],
)
def test_rows_that_do_not_fit_are_named(tmp_path, row, message):
    description = replace(DESCRIPTION, dtype="float16")
    with pytest.raises(ValueError, match=message):
        write_latent_shard(tmp_path, description, 0, range(2), [row])
    assert list(tmp_path.iterdir()) == []


def test_unknown_dtypes_damaged_files_and_other_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match="dtype='int8' is none of"):
        begin_latent_cache(tmp_path, replace(DESCRIPTION, dtype="int8"))
    with pytest.raises(ValueError, match="is no cache of latents"):
        open_latent_cache(tmp_path)
    fill(tmp_path)
    (tmp_path / "latents-00-00000.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="'.*latents-00-00000.safetensors' is truncated"):
        open_latent_cache(tmp_path)


def values(batch) -> list[float]:
    return batch["latents"][:, 0, 0, 0].tolist()


def test_batches_resume_and_join_over_processes(tmp_path):
    fill(tmp_path)
    cache = open_latent_cache(tmp_path)
    straight = LatentLoader(cache, 4, seed=1).batches()
    batches = [values(next(straight)) for _ in range(5)]
    assert sorted(sum(batches, []))[::2] == pytest.approx(sorted(v + p / 10 for v in range(2) for p in range(5)))
    resumed = LatentLoader(cache, 4, seed=1).batches(start=3)
    assert values(next(resumed)) == batches[3]
    parts = [LatentLoader(cache, 2, seed=1, rank=rank, world_size=2).batches() for rank in range(2)]
    assert values(next(parts[0])) + values(next(parts[1])) == batches[0]
    other = LatentLoader(cache, 4, seed=2).batches()
    assert values(next(other)) != batches[0]


def test_one_pass_reads_every_row_once_over_all_processes(tmp_path):
    fill(tmp_path)
    cache = open_latent_cache(tmp_path)
    found = [v for rank in range(3) for b in LatentLoader(cache, 2, rank=rank, world_size=3).once() for v in values(b)]
    assert sorted(found) == pytest.approx(sorted(v + p / 10 for v in range(2) for p in range(5)))


def test_datasets_reads_it(tmp_path):
    fill(tmp_path)
    rows = list(open_latent_cache(tmp_path).to_dataset().with_format("torch"))
    assert len(rows) == 10 and torch.equal(rows[3]["latents"], latents_of(0, 3)) and rows[3]["label"] == 1


@pytest.mark.parametrize("values", [{"batch_size": 0}, {"batch_size": 1, "rank": 2, "world_size": 2}])
def test_numbers_out_of_range_are_named(tmp_path, values):
    fill(tmp_path)
    with pytest.raises(ValueError, match="batch_size=0|rank=2"):
        LatentLoader(open_latent_cache(tmp_path), **values)
