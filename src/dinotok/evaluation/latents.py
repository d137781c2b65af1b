"""Latents as pictures: each part of them in colours, beside the picture and its reconstruction."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from ..folders import FoundFile, OnFailure, Picture
from ..image_processor import ImageProcessor
from ..models.tokenizer_model import TokenizerModel
from ..pictures import SheetEntry, pca_colors, sheet
from ..reports import to_pictures
from ..transcoding import decode_batch, encoded_batches, quantize_batch


def latent_parts(model: TokenizerModel, latents: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the `deep` and the `texture` channels of latents `(B, C, h, w)`; nothing if the model has no parts."""
    deep = getattr(model, "deep_channels", None)
    if deep is None or deep >= latents.shape[1]:
        return {}
    return {"deep": latents[:, :deep], "texture": latents[:, deep:]}


def draw_latents(
    model: TokenizerModel, files: Sequence[FoundFile], on_failure: OnFailure, batch_size: int = 8
) -> tuple[Image.Image | None, int]:
    """Draw pictures, their latents and their reconstructions side by side.

    The colours are the first three principal components of all pictures' latents together (see `pca_colors`): equal
    colours are equal components, in whichever picture. Those of a part are its own.

    Args:
        model: Any tokenizer; a discrete one reconstructs from its codes.
        files: From `find_pictures`; all their latents are kept in memory.
        on_failure: Called with the name and the error of a picture that cannot be read or encoded.
        batch_size: Consecutive pictures of one padded size that go through the model together, at most.

    Returns:
        The sheet, with columns picture, deep, texture (or latents, where there are no such parts) and reconstruction;
        and how many pictures it shows. None if no picture could be used.
    """
    processor = ImageProcessor.from_model(model)
    pictures: list[Picture] = []
    samples: list[Image.Image] = []
    grids: dict[str, list[torch.Tensor]] = {}
    for batch, latents in encoded_batches(model, files, on_failure, batch_size):
        decoded = decode_batch(model, quantize_batch(model, latents)[1])
        samples += to_pictures(processor, decoded, [picture.size for picture in batch])
        pictures += batch
        for name, part in (latent_parts(model, latents) or {"latents": latents}).items():
            grids.setdefault(name, []).extend(part.float().cpu())
    if not pictures:
        return None, 0
    columns = [
        [_enlarged(*pair) for pair in zip(shared_colors(part), pictures, strict=True)] for part in grids.values()
    ]
    originals = [to_pictures(processor, picture.values[None], [picture.size])[0] for picture in pictures]
    titles = ["picture", *(f"{name}, {len(part[0])} channels" for name, part in grids.items()), "reconstruction"]
    rows = zip(pictures, originals, *columns, samples, strict=True)
    return sheet(titles, [SheetEntry([picture.name], row) for picture, *row in rows]), len(pictures)


def shared_colors(grids: Sequence[torch.Tensor]) -> list[np.ndarray]:
    """Show grids of different sizes in the same colours: those of `pca_colors` of all positions together.

    Args:
        grids: Each `(C, h, w)`.

    Returns:
        For each, uint8 `(h, w, 3)`.
    """
    rows = torch.cat([grid.flatten(1) for grid in grids], 1)  # (C, N)
    colors = pca_colors(rows[:, :, None])[:, 0]  # (N, 3)
    ends = np.cumsum([grid[0].numel() for grid in grids])[:-1]
    parts = zip(np.split(colors, ends), grids, strict=True)
    return [part.reshape(*grid.shape[1:], 3) for part, grid in parts]


def _enlarged(colors: np.ndarray, picture: Picture) -> Image.Image:
    """A grid over its padded picture, cropped as the picture is. A grid of region tokens covers it evenly too."""
    height, width = picture.values.shape[1:]
    whole = Image.fromarray(colors).resize((width, height), Image.Resampling.NEAREST)
    return whole.crop((0, 0, picture.size[1], picture.size[0]))
