import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from dinotok.codebooks import (
    NearestPatches,
    Place,
    _cut,
    draw_codes,
    draw_usage,
    study_codebooks,
    write_codebook_study,
)
from dinotok.folders import find_pictures, read_pictures
from dinotok.image_processor import ImageProcessor
from tests.tiny_tokenizers import save_picture, tiny_discrete_tokenizer, tiny_tokenizer


def fail(name, error):
    raise error


def test_nearest_patches_are_those_of_a_sort_one_of_a_picture():
    generator = torch.Generator().manual_seed(0)
    nearest, seen = NearestPatches(5, 3), []
    for picture in range(40):
        indices = torch.randint(4, (3, 5), generator=generator)  # code 4 is never used
        distances = torch.rand(3, 5, generator=generator)
        nearest.update(picture, indices, distances)
        for row, column in np.ndindex(3, 5):
            seen.append((indices[row, column].item(), distances[row, column].item(), picture, row, column))
    for code in range(5):
        expected = {}
        for _, distance, *place in sorted(entry for entry in seen if entry[0] == code):
            expected.setdefault(place[0], (tuple(place), distance))  # the nearest of a picture
        found = [((p.picture, p.row, p.column), distance) for p, distance in nearest.of(code)]
        assert found == list(expected.values())[:3]
    assert nearest.of(4) == []


@pytest.mark.parametrize("config", [{}, {"texture_codebook_size": 0}, {"joint_codebook": True}, {"cosine": True}])
def test_a_study_counts_all_tokens_and_finds_their_nearest(tmp_path, config):
    model = tiny_discrete_tokenizer(**config)
    for index in range(6):
        save_picture(tmp_path / f"{index}.png", 48 + 16 * (index % 2), 32, seed=index)
    files = find_pictures([tmp_path], fail)
    study = study_codebooks(model, files, fail, batch_size=2, patches=2)
    assert study.num_pictures == 6 and list(study.counters) == list(model.codebook_sizes)
    pixels = {p.name: p.values for p in read_pictures(files, ImageProcessor(16), fail)}
    indices = {name: model.encode_to_indices(values[None])[0] for name, values in pixels.items()}
    for codebook, (name, counter) in enumerate(study.counters.items()):
        flat = torch.cat([grid[codebook].flatten() for grid in indices.values()])
        assert torch.equal(counter.counts, torch.bincount(flat, minlength=16))
        for code in range(16):
            found = study.nearest[name].of(code)
            assert bool(found) == bool(counter.counts[code])
            for place, distance in found:
                assert indices[files[place.picture].name][codebook, place.row, place.column] == code
                assert 0 <= distance < math.inf


def test_the_distance_is_least_for_the_code_that_is_chosen():
    for config in ({}, {"cosine": True}, {"eigenvalue_power": 0.5, "rank": None}):
        model = tiny_discrete_tokenizer(**config)
        latents = torch.randn(2, model.latent_channels, 3, 4, generator=torch.Generator().manual_seed(0))
        indices = model.quantize(latents).indices
        least = model.code_distances(latents, indices)
        for code in range(16):
            other = model.code_distances(latents, torch.full_like(indices, code))
            assert other.shape == (2, 2, 3, 4) and (other >= least - 1e-4 * least.abs().max()).all()


def test_a_study_is_written_as_pictures_and_numbers(tmp_path):
    model = tiny_discrete_tokenizer()
    for index in range(5):
        save_picture(tmp_path / "in" / f"{index}.png", 48, 40, seed=index)
    files = find_pictures([tmp_path / "in"], fail)
    study = study_codebooks(model, files, fail)
    paths = write_codebook_study(study, files, ImageProcessor(16), tmp_path / "out", fail, {"model": "m"}, codes=5)
    names = ["semantic-codes.png", "semantic-usage.png", "texture-codes.png", "texture-usage.png", "codebooks.json"]
    assert [path.name for path in paths] == names
    report = json.loads(paths[-1].read_text())
    assert report["model"] == "m" and report["num_pictures"] == 5
    for name, entry in report["codebooks"].items():
        counts = study.counters[name].counts
        assert entry["num_tokens"] == 45 == counts.sum() and entry["codebook_size"] == 16
        assert [row["count"] for row in entry["codes"]] == counts.sort(descending=True).values[:5].tolist()
        for row in entry["codes"]:
            distances = [patch["distance"] for patch in row["patches"]]
            assert distances == sorted(distances) and row["patches"][0]["file"].endswith(".png")
        with Image.open(tmp_path / "out" / f"{name}-codes.png") as image:
            assert image.height > 5 * 96


def test_patches_are_cut_with_their_surroundings_and_framed(tmp_path):
    array = np.zeros((32, 48, 3), np.uint8)
    array[16:32, 16:32] = (255, 0, 0)  # patch (1, 1)
    Image.fromarray(array).save(tmp_path / "x.png")
    files = find_pictures([tmp_path], fail)
    model = tiny_discrete_tokenizer()
    study = study_codebooks(model, files, fail)
    code = model.encode_to_indices(ImageProcessor(16).preprocess(tmp_path / "x.png"))[0, 1, 1, 1].item()
    assert [(p.row, p.column) for p, _ in study.nearest["texture"].of(code)] == [(1, 1)]
    crops = _cut({Place(0, 1, 1), Place(0, 0, 2)}, files, ImageProcessor(16), fail)
    padded = np.pad(array, ((16, 16), (16, 16), (0, 0)), constant_values=230)
    np.testing.assert_array_equal(crops[Place(0, 1, 1)], padded[16:, 16:64])
    np.testing.assert_array_equal(crops[Place(0, 0, 2)], padded[:48, 32:])
    image = np.asarray(draw_codes("t", [(code, 1, [crops[Place(0, 1, 1)]])]))
    red = (image == (255, 0, 0)).all(-1)
    assert sorted({red.any(axis).sum() for axis in (0, 1)}) == [32]  # the frame is around it


def test_a_model_without_codebooks_is_refused(tmp_path):
    save_picture(tmp_path / "x.png", 16, 16)
    with pytest.raises(ValueError, match="AutoencoderDINOTok has no codebooks"):
        study_codebooks(tiny_tokenizer(), find_pictures([tmp_path], fail), fail)


@pytest.mark.parametrize("counts", [[1], [7, 0, 0], [10_000, 100, 1, *[0] * 16381], list(range(3000, 0, -1))])
def test_usage_is_drawn_on_a_logarithmic_scale(counts):
    image = np.asarray(draw_usage("a title", counts)).astype(int)
    bars = (image == (0x44, 0x77, 0xAA)).all(-1).sum(0)
    heights = bars[bars > 0]
    assert len(heights) >= 0.9 * 960 * sum(count > 0 for count in counts) / len(counts) - 1
    assert heights[0] == max(heights)
    decade = 360 / (len(str(counts[0])) - math.log10(0.5))
    assert heights[0] == pytest.approx(decade * (math.log10(counts[0]) - math.log10(0.5)), abs=4)


def test_codes_are_drawn_in_columns_of_sixteen():
    patch = Image.new("RGB", (48, 48), "red")
    few, many = (draw_codes("t", [(i, 1, [patch] * 2) for i in range(count)]) for count in (16, 17))
    assert few.height == many.height and many.width > few.width + 190
    assert draw_codes("t", []).width > 0
