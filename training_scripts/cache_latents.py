"""Compute the latents of a labelled data set once, for `train_diffusion.py`.

    python training_scripts/cache_latents.py --tokenizer TOKENIZER --dataset PICTURES --output_dir latents/train

Every picture is encoded `views` times, cropped and flipped anew; the second view of a centred crop is its mirror
image, which is what the recipes of LightningDiT store. A single centred view (`--views 1 --flip False`) is for
validation. An interrupted run goes on with the same command, under `accelerate launch` on several devices too.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from dinotok.caches import common_fields, shard_loader
from dinotok.data import PictureTransform, load_pictures, to_pixels
from dinotok.hub import find_tokenizer
from dinotok.latent_caches import LatentCacheDescription, begin_latent_cache, write_latent_shard
from dinotok.models.discrete import DiscreteTokenizer
from dinotok.training import new_accelerator, parse_options


@dataclass(frozen=True)
class CacheOptions:
    """Options of a run.

    Attributes:
        tokenizer: Folder or Hub repository of a continuous tokenizer.
        dataset: Folder, parquet file or name of a labelled data set of pictures.
        output_dir: For the latents.
        split: Of the data set.
        resolution: Side of the square crops in pixels.
        crop: center, random or random_resized; see `PictureTransform`.
        flip: Mirror pictures: every second view of centred crops, views at random of others.
        views: Of every picture.
        shard_size: Pictures of a file, which is what an interrupted run loses at most.
        batch_size: Pictures encoded together.
        mixed_precision: no or bf16.
        dtype: Of the stored latents: float16, bfloat16 or float32.
        num_workers: Processes that decode pictures.
        seed: Of crops and flips.
    """

    tokenizer: str
    dataset: str
    output_dir: str
    split: str = "train"
    resolution: int = 256
    crop: str = "center"
    flip: bool = True
    views: int = 2
    shard_size: int = 1024
    batch_size: int = 32
    mixed_precision: str = "no"
    dtype: str = "float16"
    num_workers: int = 2
    seed: int = 0


@torch.no_grad()
def main(options: CacheOptions) -> Path:
    """Write what is missing, and return the folder."""
    accelerator = new_accelerator(mixed_precision=options.mixed_precision)
    files = find_tokenizer(options.tokenizer)
    tokenizer = files.load().to(accelerator.device)
    if isinstance(tokenizer, DiscreteTokenizer):
        raise ValueError(f"{options.tokenizer!r} is discrete: its tokens are cached by cache_tokens.py.")
    dataset = load_pictures(options.dataset, split=options.split)
    centred = options.crop == "center"
    transform = PictureTransform(options.resolution, options.crop, options.flip and not centred)
    blank = torch.zeros(1, 3, options.resolution, options.resolution, device=accelerator.device)
    description = LatentCacheDescription(
        **common_fields(options, files.digest, dataset),
        shape=list(tokenizer.encode(blank).latent.shape[1:]),
        dtype=options.dtype,
    )
    with accelerator.main_process_first():
        missing = begin_latent_cache(options.output_dir, description)
    accelerator.wait_for_everyone()
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    for view, pictures in tqdm(mine, unit="file", disable=not accelerator.is_main_process):
        mirrored = options.flip and centred and view % 2 == 1
        rows = []
        for batch in shard_loader(options, dataset, transform, view, pictures).once():
            pixels = to_pixels(batch["pixel_values"].to(accelerator.device))
            with accelerator.autocast():
                latents = tokenizer.encode(pixels.flip(3) if mirrored else pixels).latent
            places = [pictures[row] for row in batch["indices"].tolist()]
            rows += list(zip(places, batch["labels"].tolist(), latents.cpu(), strict=True))
        write_latent_shard(options.output_dir, description, view, pictures, rows)
    accelerator.wait_for_everyone()
    return Path(options.output_dir)


if __name__ == "__main__":
    main(parse_options(CacheOptions))
