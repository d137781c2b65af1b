"""What the demo shows of a tokenizer is what the library computes."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from tokenizing import FIRST, NOTHING, SECOND, check_mixable, code_maps, mix, mix_latents, reconstruct, table

from dinotok import ImageProcessor
from dinotok.metrics import ReconstructionMetrics
from dinotok.pictures import enlarge, pca_colors
from tests.spaces.hostile import smooth
from tests.tiny_tokenizers import tiny_discrete_tokenizer, tiny_region_tokenizer, tiny_tokenizer

BUILDERS = {"continuous": tiny_tokenizer, "discrete": tiny_discrete_tokenizer, "regions": tiny_region_tokenizer}


@pytest.fixture(scope="module", params=BUILDERS)
def model(request):
    return BUILDERS[request.param]()


@pytest.fixture(scope="module")
def discrete():
    return tiny_discrete_tokenizer()


@torch.no_grad()
def decoded(model, latents, size):
    processor = ImageProcessor.from_model(model)
    return np.asarray(processor.postprocess(model.decode(latents).sample, sizes=[size])[0])


def test_every_kind_of_tokenizer_shows_pictures_of_one_size_and_its_numbers(model):
    shown = reconstruct(model, smooth(75, 50))
    size = (64, 64) if model.image_size else (75, 50)
    pictures = [shown.original, shown.reconstruction, *(picture for picture, _ in shown.maps)]
    assert {picture.size for picture in pictures} == {size}
    original, reconstruction = (
        torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1 for picture in pictures[:2]
    )
    (scores,) = ReconstructionMetrics().update(reconstruction, original)
    assert shown.facts["PSNR"] == f"{scores['psnr']:.2f} dB"


def test_maps_of_a_tokenizer_are_its_parts_and_its_codes(discrete):
    shown = reconstruct(discrete, smooth(75, 50))
    assert [name for _, name in shown.maps] == [
        "semantic latents",
        "texture latents",
        "semantic codes",
        "texture codes",
    ]
    with torch.no_grad():
        latents = discrete.encode(ImageProcessor.from_model(discrete).preprocess(smooth(75, 50))).latent[0]
    texture = enlarge(pca_colors(latents[discrete.deep_channels :]), discrete.patch_size, (50, 75))
    assert np.array_equal(np.asarray(shown.maps[1][0]), np.asarray(texture))


def test_equal_codes_have_equal_colours_in_all_pictures(discrete):
    indices = torch.randint(0, 16, (2, 3, 4), generator=torch.Generator().manual_seed(0))
    one, other = code_maps(discrete, indices), code_maps(discrete, indices.flip(-1))
    for name in one:
        assert one[name].shape == (3, 4, 3) and np.array_equal(one[name], other[name][:, ::-1])
    colors = one["texture codes"].reshape(-1, 3)
    same = indices[1].flatten()[:, None] == indices[1].flatten()
    assert (colors[:, None] == colors).all(-1)[same.numpy()].all()


def test_bits_are_those_of_the_indices(discrete):
    facts = reconstruct(discrete, smooth(75, 50)).facts  # 5 x 4 positions of 4 + 4 bits
    assert facts["Bits"] == f"160, that is 20 bytes or {160 / (75 * 50):.3f} bits per pixel"
    assert facts["Codes"].startswith("5 x 4 positions, 4 bits (semantic, 16 codes) + 4 bits (texture, 16 codes)")


def test_a_mixture_is_the_picture_of_mixed_codes(discrete):
    first, second = smooth(75, 50), smooth(80, 70).transpose(Image.Transpose.ROTATE_90)
    mixture = mix(discrete, first, second)
    pixels = ImageProcessor.from_model(discrete).preprocess([first, ImageOps.fit(second, first.size)])
    with torch.no_grad():
        indices = discrete.encode_to_indices(pixels)
        mixed = discrete.indices_to_latents(torch.stack([indices[:1, 0], indices[1:, 1]], 1))
    expected = decoded(discrete, mixed, (50, 75))
    assert np.abs(np.asarray(mixture.result).astype(int) - expected).max() <= 1  # batches round differently
    assert [name for _, name in mixture.pictures] == ["A", "B", "mixture"]
    assert mixture.result.size == (75, 50)


@pytest.mark.parametrize("kind", ["continuous", "discrete"])
def test_mixing_a_picture_with_itself_is_its_reconstruction(kind):
    model, picture = BUILDERS[kind](), smooth(75, 50)
    mixture = mix(model, picture, picture)
    expected = np.asarray(reconstruct(model, picture).reconstruction).astype(int)
    assert np.abs(np.asarray(mixture.result) - expected).max() <= 1


def test_a_part_left_out_is_at_its_mean(discrete):
    latents = torch.randn(2, discrete.latent_channels, 3, 4)
    deep = discrete.deep_channels
    mixed = mix_latents(discrete, latents, SECOND, NOTHING)
    assert torch.equal(mixed[:, :deep], latents[1:, :deep]) and not mixed[:, deep:].any()
    assert torch.equal(mix_latents(discrete, latents, FIRST, FIRST), latents[:1])


def test_tokenizers_without_two_parts_are_refused(discrete):
    with pytest.raises(ValueError, match="VQModelVFMTok has no texture apart"):
        mix(tiny_region_tokenizer(), smooth(64, 64), smooth(64, 64))
    with pytest.raises(ValueError, match="no texture apart"):
        check_mixable(tiny_discrete_tokenizer(joint_codebook=True), FIRST, SECOND)
    with pytest.raises(ValueError, match="'picture C' is none of"):
        check_mixable(discrete, "picture C", FIRST)


def test_facts_become_a_table():
    assert table({"PSNR": "20 dB"}) == "| | |\n|---|---|\n| PSNR | 20 dB |"
