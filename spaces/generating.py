"""Pictures of classes, with whichever generator is there: what it offers, and drawing with progress."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from diffusers import DiffusionPipeline
from PIL import Image

from dinotok.generate_cli import PRESETS, SHORT_NAMES
from dinotok.generation import PipelineFiles, draw_pictures
from dinotok.hub import read_config

OnStep = Callable[[int, int], None]
OPTIONS = ("num_inference_steps", "guidance_scale", "temperature", "top_k")
MAX_PICTURES = 4
MAX_STEPS = 100


@dataclass(frozen=True)
class Offer:
    """What a generator lets one choose.

    Attributes:
        classes: Names and ids.
        options: Those of `OPTIONS` that it has, with what it draws best with.
    """

    classes: list[tuple[str, int]]
    options: dict[str, float]


def offer_of(files: PipelineFiles) -> Offer:
    """Read what a generator offers from its configs.

    Args:
        files: From `find_pipeline`.

    Raises:
        ValueError: If a config is not JSON.
        OSError: If a config is missing.
    """
    names = read_config(files.folder / "model_index.json", files.name, "pipeline").get("id2label") or {}
    count = read_config(files.folder / "transformer" / "config.json", files.name, "pipeline")["num_classes"]
    classes = [(str(names.get(str(index), f"class {index}")), index) for index in range(count)]
    short = {name: short for short, name in SHORT_NAMES.items()}.get(files.name, "")
    values = {**files.defaults, **PRESETS.get(short, {})}
    return Offer(classes, {name: values[name] for name in OPTIONS if name in values})


def generate(
    pipeline: DiffusionPipeline,
    class_id: int,
    num_images: int,
    seed: int,
    options: Mapping[str, Any],
    on_step: OnStep | None = None,
) -> list[Image.Image]:
    """Draw pictures of one class; picture k has the seed `seed` + k, as in `dinotok generate`.

    Args:
        pipeline: A `DINOTokDiTPipeline` or a `DINOTokARPipeline`.
        class_id: Which class.
        num_images: 1 to `MAX_PICTURES`.
        seed: Of the first picture, not negative.
        options: Of the pipeline's `__call__`.
        on_step: Called with the steps done and all steps, after every step.

    Raises:
        ValueError: If a number is out of range, or the pipeline refuses an option.
    """
    if not 1 <= num_images <= MAX_PICTURES:
        raise ValueError(f"{num_images} pictures were asked for; 1 to {MAX_PICTURES} are drawn at once.")
    if not 0 <= seed < 2**62:
        raise ValueError(f"The seed {seed} is not between 0 and 2^62.")
    steps = options.get("num_inference_steps", 1)
    if not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"{steps} steps were asked for; 1 to {MAX_STEPS} are taken.")

    def step_done(running: DiffusionPipeline, step: int, *_: Any) -> dict[str, Any]:
        if on_step is not None:
            on_step(step + 1, count_steps(running))
        return {}  # changes nothing

    seeds = list(range(seed, seed + num_images))
    options = {**options, "callback_on_step_end": step_done}
    return list(draw_pictures(pipeline, [class_id] * num_images, seeds, num_images, options))


def count_steps(pipeline: DiffusionPipeline) -> int:
    """Return the steps of the running call: evaluations of a denoiser, or indices of a picture of the usual size."""
    if hasattr(pipeline, "num_timesteps"):
        return pipeline.num_timesteps
    config = pipeline.transformer.config
    grid = getattr(pipeline.vqvae, "fixed_grid", None) or config.sample_size
    return prod(grid) * len(config.codebook_sizes)
