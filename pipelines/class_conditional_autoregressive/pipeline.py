"""Class-conditional pictures from an autoregressive transformer and a discrete tokenizer.

Part of dinotok (Apache-2.0). `save_pretrained` puts this file beside the weights as `pipeline.py`; it needs
`pip install dinotok`.
"""

from collections.abc import Callable, Sequence
from math import prod

import diffusers.pipelines
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput

import dinotok
from dinotok.decoding import (
    check_guidance,
    check_sampling,
    draw,
    guidance_at,
    guide,
    index_probabilities,
    uniform_noise,
)
from dinotok.image_processor import ImageProcessor
from dinotok.models.discrete import DiscreteTokenizer
from dinotok.models.transformer_autoregressive import AutoregressiveTransformer2DModel
from dinotok.models.transformer_random_autoregressive import RandomAutoregressiveTransformer2DModel
from dinotok.pipeline_helpers import ClassLabels, PipelineCodeMixin, class_ids

# Where diffusers looks for the class of a component that `model_index.json` lists as ["dinotok", class].
diffusers.pipelines.dinotok = dinotok


class DINOTokARPipeline(PipelineCodeMixin, DiffusionPipeline):
    """Draw pictures of classes index by index, in raster order, and decode them.

    Args:
        transformer: Scores the next index.
        vqvae: A tokenizer with codebooks: it turns indices to latents, and those to pixels.
        id2label: Names by class id; several names of one class are separated by commas.
    """

    model_cpu_offload_seq = "transformer->vqvae"

    def __init__(
        self,
        transformer: AutoregressiveTransformer2DModel | RandomAutoregressiveTransformer2DModel,
        vqvae: DiscreteTokenizer,
        id2label: dict[int, str] | dict[str, str] | None = None,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, vqvae=vqvae)
        self.register_to_config(id2label=id2label and {str(index): name for index, name in id2label.items()})
        books = list(vqvae.codebook_sizes.values())
        if books != list(transformer.config.codebook_sizes):
            raise ValueError(
                f"The transformer predicts codebooks of {list(transformer.config.codebook_sizes)} codes, but the "
                f"tokenizer has {books}."
            )
        self.image_processor = ImageProcessor(vqvae.config.patch_size)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: ClassLabels,
        guidance_scale: float = 1.0,
        guidance_schedule: str = "constant",
        guidance_power: float = 1.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        height: int | None = None,
        width: int | None = None,
        num_images_per_label: int = 1,
        indices: torch.Tensor | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DiffusionPipeline, int, torch.Tensor], None] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Draw pictures.

        Every random number belongs to a picture and an index: the same generator gives the same picture whatever is
        given in `indices`, and with a generator for each picture, whatever else is in the batch.

        Args:
            class_labels: Class ids, or names that `id2label` knows: one or several.
            guidance_scale: How far the logits are moved away from those of the null class. 1 is no guidance, and
                costs half.
            guidance_schedule: `constant`, or `rising` from 1 at the first position; see `decoding.guidance_at`.
            guidance_power: Of the rising schedule; above 1 the guidance comes later.
            temperature: Divides the logits; 0 takes the most likely index.
            top_k: Draw from that many of the most likely codes; 0 is all.
            top_p: Draw from the most likely codes that have this probability together; 1 is all.
            height: Of the pictures in pixels; what the transformer was trained on by default.
            width: Likewise.
            num_images_per_label: Pictures of each label.
            indices: The first indices of the pictures, to be continued: whole rows `(B, K, rows, w)` or positions in
                raster order `(B, K, n)`; B is 1 or the number of pictures.
            generator: Source of the randomness: one for all, or one for each picture.
            output_type: `pil`, `np` `(B, H, W, 3)` or `pt` `(B, 3, H, W)` in [0, 1], or `latent`: indices
                `(B, K, h, w)`.
            return_dict: Return an output object rather than a tuple.
            callback_on_step_end: Called as `callback(pipeline, step, chosen)` for each index, with the `(B, 1)` that
                was drawn; it changes nothing.

        Returns:
            `.images`: label by label, `num_images_per_label` of each.

        Raises:
            ValueError: If a label, an index, a size or a sampling parameter is invalid.
        """
        check_sampling(temperature, top_k, top_p)
        check_guidance(guidance_scale, guidance_schedule, guidance_power)
        _check_outputs(num_images_per_label, output_type)
        device = self._execution_device
        ids = class_ids(class_labels, self.transformer.config.num_classes, self.config.id2label)
        labels = torch.tensor(ids, device=device).repeat_interleave(num_images_per_label)
        grid = self._grid(height, width)
        chosen = self._first_indices(indices, len(labels), grid).to(device)  # (B, n * K)
        books = len(self.transformer.config.codebook_sizes)
        steps = range(chosen.shape[1], prod(grid) * books)
        noise = uniform_noise(len(labels), steps.stop, generator, device)

        copies = 1 if guidance_scale == 1 else 2
        if copies == 2:
            labels = torch.cat([labels, torch.full_like(labels, self.transformer.config.num_classes)])
        cache = self.transformer.allocate_cache(len(labels), grid)
        found, start = [chosen], labels
        for step in self.progress_bar(steps):
            logits = self.transformer(chosen.repeat(copies, 1), start, cache, return_dict=False)[0][0]
            if copies == 2:
                progress = step // books / prod(grid)
                logits = guide(logits, guidance_at(progress, guidance_scale, guidance_schedule, guidance_power))
            chosen, start = draw(index_probabilities(logits, temperature, top_k, top_p), noise[:, step]), None
            found.append(chosen)
            if callback_on_step_end is not None:
                callback_on_step_end(self, step, chosen)

        images = torch.cat(found, dim=1).unflatten(1, (*grid, books)).movedim(-1, 1)  # (B, K, h, w)
        if output_type != "latent":
            pixels = self.vqvae.decode(self.vqvae.indices_to_latents(images), return_dict=False)[0]
            images = self.image_processor.postprocess(pixels, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _grid(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Return rows and columns of tokens for a size in pixels."""
        fixed_grid = getattr(self.vqvae, "fixed_grid", None)  # of tokenizers whose tokens are no patches
        rows, columns = fixed_grid or self.transformer.config.sample_size
        if height is None and width is None:
            return rows, columns
        if fixed_grid is not None:
            side = self.vqvae.image_size
            if {height or side, width or side} != {side}:
                raise ValueError(f"This tokenizer has pictures of {side}x{side} only, not {height}x{width}.")
            return rows, columns
        unit = self.vqvae.config.patch_size
        size = (rows * unit if height is None else height, columns * unit if width is None else width)
        if any(side <= 0 or side % unit for side in size):
            raise ValueError(f"Height and width must be positive multiples of {unit}, got {size[0]}x{size[1]}.")
        return size[0] // unit, size[1] // unit

    def _first_indices(self, indices: torch.Tensor | None, batch: int, grid: tuple[int, int]) -> torch.Tensor:
        """Return the given indices in the order of decoding, `(B, n * K)`."""
        sizes = self.transformer.config.codebook_sizes
        if indices is None:
            return torch.empty(batch, 0, dtype=torch.long)
        whole_rows = indices.ndim == 4 and indices.shape[3] == grid[1]
        if (
            not (whole_rows or indices.ndim == 3)
            or indices.shape[0] not in (1, batch)
            or indices.shape[1] != len(sizes)
        ):
            raise ValueError(
                f"The first indices must have shape (B, {len(sizes)}, n) or (B, {len(sizes)}, rows, {grid[1]}) with B "
                f"= 1 or {batch}, got {tuple(indices.shape)}."
            )
        if indices.is_floating_point() or indices.dtype == torch.bool:
            raise ValueError(f"Indices must be integers, got {indices.dtype}.")
        flat = indices.flatten(2)
        if flat.shape[2] >= prod(grid):
            raise ValueError(f"{flat.shape[2]} positions are given, which leaves none of {prod(grid)} to draw.")
        for book, size in enumerate(sizes):
            wrong = flat[:, book][(flat[:, book] < 0) | (flat[:, book] >= size)]
            if wrong.numel():
                raise ValueError(f"Indices of codebook {book} must lie in 0..{size - 1}, got {int(wrong[0])}.")
        return flat.transpose(1, 2).flatten(1).expand(batch, -1).long()


def _check_outputs(num_images_per_label: int, output_type: str) -> None:
    if num_images_per_label < 1:
        raise ValueError(f"num_images_per_label={num_images_per_label} must be at least 1.")
    if output_type not in ("pil", "np", "pt", "latent"):
        raise ValueError(f"output_type={output_type!r} is none of 'pil', 'np', 'pt', 'latent'.")
