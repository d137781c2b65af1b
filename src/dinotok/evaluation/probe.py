"""What a tokenizer's latents know of the classes of pictures: k-NN and linear accuracy of each part."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..data import to_pixels
from ..models.discrete import DiscreteTokenizer
from ..models.tokenizer_model import TokenizerModel
from ..probes import knn_accuracy, linear_accuracy
from ..transcoding import encode_batch
from .latents import latent_parts
from .passes import MeasuredRows, PassOptions, Rows, measure_pictures
from .reference import pass_identity, recipe_of_pictures

if TYPE_CHECKING:
    from datasets import Dataset


@torch.inference_mode()
def pooled_latents(model: TokenizerModel, images: torch.Tensor) -> Rows:
    """Return the mean over positions of the latents of pictures, part by part.

    Args:
        model: Any tokenizer.
        images: uint8 `(B, 3, H, W)`.

    Returns:
        `both`, all channels, `(B, C)`; `deep` and `texture` of a model that has them; `quantized`, all channels after
        the codebooks, of a discrete one. float32, on the CPU.
    """
    latents = encode_batch(model, to_pixels(images))
    grids = {"both": latents, **latent_parts(model, latents)}
    if isinstance(model, DiscreteTokenizer):
        grids["quantized"] = model.quantize(latents).latents
    return {name: grid.float().mean((2, 3)).cpu() for name, grid in grids.items()}


def evaluate_probe(
    model: TokenizerModel,
    train: "Dataset",
    validation: "Dataset",
    resolution: int,
    folder: Path,
    options: PassOptions | None = None,
    *,
    identity: dict[str, Any] | None = None,
    num_neighbours: int = 20,
    epochs: int = 20,
) -> dict[str, Any]:
    """Measure k-NN and linear accuracy of a tokenizer's latents.

    Args:
        model: Any tokenizer, on its device.
        train: With labels, from `load_pictures`: the bank, and what the linear probe is trained on.
        validation: With the same labels.
        resolution: Pictures are cropped to this many pixels a side.
        folder: Of partial results; see `measure_pictures`.
        options: Of the passes.
        identity: What the latents depend on beyond the data, such as the model's digest.
        num_neighbours: Voters of the k-NN probe, at most as many as there are pictures to train on.
        epochs: Of the linear probe.

    Returns:
        `metrics`, named `knn_both`, `linear_both` and so on; `probes`, with the best learning rates; and the pictures
        of both sets.

    Raises:
        ValueError: If a data set has no labels, or as `measure_pictures`.
    """
    found: list[MeasuredRows] = []
    for name, dataset in (("train", train), ("validation", validation)):
        if "label" not in dataset.column_names:
            raise ValueError(f"The {name} pictures have no column 'label', and probes compare labels.")
        key = pass_identity(dataset, resolution, None) | {"model": identity}

        def measure(images: torch.Tensor) -> Rows:
            return pooled_latents(model, images)

        part = folder / name
        found.append(measure_pictures(dataset, resolution, measure, part, key, options or PassOptions()))
    bank, queries = found
    labels = bank.all("labels"), queries.all("labels")
    metrics: dict[str, float] = {}
    probes = {}
    for name in ("both", "deep", "texture", "quantized"):
        if name in bank.names:
            sets = (bank.all(name), labels[0], queries.all(name), labels[1])
            probe = linear_accuracy(*sets, epochs=epochs)
            metrics[f"knn_{name}"] = knn_accuracy(*sets, min(num_neighbours, len(labels[0])))
            metrics[f"linear_{name}"] = probe.accuracy
            probes[name] = {"learning_rate": probe.learning_rate, "accuracies": probe.accuracies}
    pictures = {
        "train": recipe_of_pictures(train, resolution, bank),
        "validation": recipe_of_pictures(validation, resolution, queries),
    }
    return {"metrics": metrics, "probes": probes, "pictures": pictures, "warnings": []}
