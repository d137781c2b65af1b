"""What the demo offers of a generator, and the pictures that it draws."""

import numpy as np
import pytest
import torch
from generating import generate, offer_of
from library import Library

from dinotok.generation import find_pipeline
from tests.tiny_pipelines import NAMES, save_tiny_pipelines, tiny_ar_pipeline, tiny_dit_pipeline


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_tiny_pipelines(tmp_path_factory.mktemp("pipelines"))


def test_a_generator_offers_its_classes_and_its_options_only(folders):
    diffusion, autoregressive = (offer_of(find_pipeline(folders[kind])) for kind in ("diffusion", "autoregressive"))
    assert diffusion.classes == autoregressive.classes == [(name, index) for index, name in NAMES.items()]
    assert set(diffusion.options) == {"num_inference_steps", "guidance_scale"}
    assert set(autoregressive.options) == {"guidance_scale", "temperature", "top_k"}


def test_the_generator_of_the_package_comes_with_what_it_draws_best_with():
    offer = offer_of(Library().find_generator("dinotok-tiny-dit"))
    assert offer.options == {"num_inference_steps": 25, "guidance_scale": 3.0}
    assert offer.classes[4] == ("church", 4)


def test_classes_without_names_have_numbers(tmp_path):
    pipeline = tiny_dit_pipeline()
    type(pipeline)(pipeline.transformer, pipeline.vae, pipeline.scheduler).save_pretrained(tmp_path)
    assert offer_of(find_pipeline(tmp_path)).classes[3] == ("class 3", 3)


@pytest.mark.parametrize(
    ("build", "options", "steps"),
    [(tiny_dit_pipeline, {"num_inference_steps": 3}, 3), (tiny_ar_pipeline, {"top_k": 5}, 2 * 3 * 2)],
    ids=["diffusion", "autoregressive"],
)
def test_pictures_are_those_of_their_seeds_and_progress_reaches_the_end(build, options, steps):
    pipeline = build()
    pipeline.set_progress_bar_config(disable=True)
    seen: list[tuple[int, int]] = []
    pictures = generate(pipeline, 1, 2, 7, options, lambda done, total: seen.append((done, total)))
    assert seen == [(step, steps) for step in range(1, steps + 1)]
    alone = pipeline(1, generator=[torch.Generator().manual_seed(8)], **options).images[0]
    assert np.abs(np.asarray(pictures[1]).astype(int) - np.asarray(alone)).max() <= 1


@pytest.mark.parametrize(
    ("number", "seed", "options", "words"),
    [
        (0, 0, {}, "0 pictures"),
        (5, 0, {}, "5 pictures"),
        (1, -1, {}, "seed -1"),
        (1, 0, {"num_inference_steps": 101}, "101 steps"),
    ],
)
def test_more_than_a_share_of_the_machine_is_refused(number, seed, options, words):
    with pytest.raises(ValueError, match=words):
        generate(tiny_dit_pipeline(), 1, number, seed, options)
