import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dinotok import latent_files
from dinotok.folders import Picture
from dinotok.latent_files import open_shard, read_latents, write_shards
from dinotok.shards import ModelOrigin

ORIGIN = ModelOrigin("user/model", "c0ffee", "sha256:12", "AutoencoderDINOTok", 16, {"dtype": "float32"})


def random_pictures(count):
    generator = torch.Generator().manual_seed(0)
    # Not in alphabetical order, and slices of one tensor as a batch gives them.
    latents = torch.randn(count, 5, 2, 3, generator=generator)
    return [Picture(f"sub/{-i % count}.png", (30 - i, 48), latents[i]) for i in range(count)]


def read_all(paths):
    return [picture for path in paths for picture in read_latents(open_shard(path))]


def test_a_name_that_comes_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'sub/0\.png' comes twice"):
        list(write_shards(random_pictures(1) * 2, tmp_path, ORIGIN))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_latents_come_back_identical_and_in_order(tmp_path, dtype):
    pictures = random_pictures(5)
    paths = list(write_shards(iter(pictures), tmp_path / "new", ORIGIN, shard_size=2, dtype=dtype))
    assert [path.name for path in paths] == [f"latents-0000{i}.safetensors" for i in range(3)]
    assert open_shard(paths[2]).origin == ORIGIN
    for before, after in zip(pictures, read_all(paths), strict=True):
        assert (after.name, after.size, after.values.dtype) == (before.name, before.size, dtype)
        assert torch.equal(after.values, before.values.to(dtype))


def test_metadata_is_what_a_stranger_needs(tmp_path):
    (path,) = write_shards(random_pictures(2), tmp_path, ORIGIN)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "dinotok-latents" and metadata["format_version"] == "1"
    assert (metadata["model"], metadata["model_revision"], metadata["patch_size"]) == ("user/model", "c0ffee", "16")
    assert json.loads(metadata["pictures"])["sub/0.png"] == {"size": [30, 48], "padded_size": [32, 48]}


def test_a_shard_ends_when_it_is_large(tmp_path, monkeypatch):
    monkeypatch.setattr(latent_files, "MAX_SHARD_BYTES", 3 * 5 * 2 * 3 * 4)
    paths = list(write_shards(random_pictures(7), tmp_path, ORIGIN))
    assert [len(open_shard(path).sizes) for path in paths] == [3, 3, 1]


def test_shards_of_another_run_are_not_mixed_in(tmp_path):
    list(write_shards(random_pictures(1), tmp_path, ORIGIN))
    with pytest.raises(ValueError, match=r"has 1 shards already, first 'latents-00000\.safetensors'"):
        list(write_shards(random_pictures(1), tmp_path, ORIGIN))


def rewrite(path, tensors=None, **metadata):
    """Write the shard again with other metadata or tensors; None removes an entry."""
    with safe_open(path, framework="pt") as file:
        values = file.metadata() | metadata
        tensors = tensors or {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata={key: value for key, value in values.items() if value is not None})


def entries(name="sub/0.png", size=(30, 48), padded=(32, 48)):
    return json.dumps({name: {"size": size, "padded_size": padded}})


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format": None}, "without latents"),
        ({"format_version": "2"}, "format_version='2', this dinotok .* reads '1'"),
        ({"model_digest": None}, "damaged: it lacks 'model_digest'"),
        ({"patch_size": "x"}, "damaged: invalid literal"),
        ({"pictures": "{"}, "damaged"),
        ({"pictures": "[1]"}, "damaged"),
        ({"pictures": entries(name="other.png")}, "damaged: it lists 1 pictures, the file has other ones"),
        ({"pictures": entries(size=(33, 48))}, "damaged: 'sub/0.png' is 33x48, which does not fit"),
        ({"pictures": entries(size=(0, 48))}, "damaged: 'sub/0.png' is 0x48"),
        ({"pictures": entries(padded=(48, 48))}, "damaged: 'sub/0.png'"),
    ],
)
def test_a_shard_that_contradicts_itself_is_refused(tmp_path, metadata, message):
    (path,) = write_shards(random_pictures(1), tmp_path, ORIGIN)
    rewrite(path, **metadata)
    with pytest.raises(ValueError, match=message) as error:
        open_shard(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", ["/etc/x.png", "../x.png", "a/../../x.png", "a\\..\\x.png", "C:/x.png"])
def test_a_shard_cannot_name_files_outside_the_output(tmp_path, name):
    (path,) = write_shards(random_pictures(1), tmp_path, ORIGIN)
    rewrite(path, {name: torch.zeros(5, 2, 3)}, pictures=entries(name))
    with pytest.raises(ValueError, match="not a relative path inside a folder"):
        open_shard(path)


def test_truncated_and_foreign_files_are_refused(tmp_path):
    (path,) = write_shards(random_pictures(3), tmp_path, ORIGIN)
    content = path.read_bytes()
    for length in (0, 7, 100, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="truncated or not a safetensors file"):
            open_shard(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="without latents"):
        open_shard(path)
