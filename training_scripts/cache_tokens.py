"""Compute the tokens of a labelled data set once, for `train_autoregressive.py`.

    python training_scripts/cache_tokens.py --tokenizer TOKENIZER --dataset PICTURES --output_dir tokens/train \
        --views 10

Every picture is tokenized `views` times, cropped and flipped anew: LlamaGen stores ten views, VFMTok draws new ones in
every epoch. A single centred view (`--views 1 --crop center --flip False`) is for validation. An interrupted run goes
on with the same command, under `accelerate launch` on several devices too.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from dinotok.caches import common_fields, shard_loader
from dinotok.data import PictureTransform, load_pictures, to_pixels
from dinotok.hub import find_tokenizer
from dinotok.token_caches import CacheDescription, begin_token_cache, write_cache_shard
from dinotok.training import new_accelerator, parse_options


@dataclass(frozen=True)
class CacheOptions:
    """Options of a run.

    Attributes:
        tokenizer: Folder or Hub repository of a tokenizer with codebooks.
        dataset: Folder, parquet file or name of a labelled data set of pictures.
        output_dir: For the tokens.
        split: Of the data set.
        resolution: Side of the square crops in pixels.
        crop: random, random_resized or center; see `PictureTransform`.
        flip: Mirror every second view.
        views: Of every picture.
        shard_size: Pictures of a file, which is what an interrupted run loses at most.
        batch_size: Pictures tokenized together.
        mixed_precision: no or bf16.
        num_workers: Processes that decode pictures.
        seed: Of crops and flips.
    """

    tokenizer: str
    dataset: str
    output_dir: str
    split: str = "train"
    resolution: int = 256
    crop: str = "random"
    flip: bool = True
    views: int = 10
    shard_size: int = 4096
    batch_size: int = 32
    mixed_precision: str = "no"
    num_workers: int = 2
    seed: int = 0


@torch.no_grad()
def main(options: CacheOptions) -> Path:
    """Write what is missing, and return the folder."""
    accelerator = new_accelerator(mixed_precision=options.mixed_precision)
    files = find_tokenizer(options.tokenizer)
    tokenizer = files.load().to(accelerator.device)
    dataset = load_pictures(options.dataset, split=options.split)
    transform = PictureTransform(options.resolution, options.crop, options.flip)
    blank = torch.zeros(1, 3, options.resolution, options.resolution, device=accelerator.device)
    description = CacheDescription(
        **common_fields(options, files.digest, dataset),
        codebook_sizes=dict(tokenizer.codebook_sizes),
        grid=list(tokenizer.encode_to_indices(blank).shape[2:]),
    )
    with accelerator.main_process_first():
        missing = begin_token_cache(options.output_dir, description)
    accelerator.wait_for_everyone()
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    for view, pictures in tqdm(mine, unit="file", disable=not accelerator.is_main_process):
        rows = []
        for batch in shard_loader(options, dataset, transform, view, pictures).once():
            with accelerator.autocast():
                indices = tokenizer.encode_to_indices(to_pixels(batch["pixel_values"].to(accelerator.device)))
            places = [pictures[row] for row in batch["indices"].tolist()]
            rows += list(zip(places, batch["labels"].tolist(), indices.cpu(), strict=True))
        write_cache_shard(options.output_dir, description, view, pictures, rows)
    accelerator.wait_for_everyone()
    return Path(options.output_dir)


if __name__ == "__main__":
    main(parse_options(CacheOptions))
