"""Laws of training data: what comes when does not depend on who reads it, and every picture is used."""

import io
import json
import multiprocessing
import os
import signal
import tarfile
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate import PartialState, debug_launcher
from accelerate.state import AcceleratorState
from PIL import Image

from dinotok.data import PictureLoader, PictureTransform, aspect_ratio_buckets, load_pictures, pixel_batches, to_pixels
from tests.tiny_tokenizers import save_picture


@pytest.fixture(autouse=True)
def quiet_datasets(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    datasets.disable_progress_bars()


def encoded(seed: int, size: tuple[int, int] = (24, 20), form: str = "PNG", **options) -> bytes:
    array = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, form, **options)
    return stream.getvalue()


def table(num_rows: int = 23, damaged: tuple[int, ...] = ()) -> datasets.Dataset:
    pictures = [b"damaged" if row in damaged else encoded(row) for row in range(num_rows)]
    return datasets.Dataset.from_dict({"image": pictures, "label": [row % 5 for row in range(num_rows)]})


def shards(folder: Path, lengths=(5, 1, 7, 4, 6, 3, 2, 9), damaged: tuple[int, ...] = ()) -> Path:
    """Write tar files whose pictures have ascending numbers as labels."""
    number = 0
    folder.mkdir(exist_ok=True)
    for shard, length in enumerate(lengths):
        with tarfile.open(folder / f"{shard:03d}.tar", "w") as archive:
            for _ in range(length):
                content = b"damaged" if number in damaged else encoded(number)
                for suffix, data in (("png", content), ("cls", str(number).encode())):
                    member = tarfile.TarInfo(f"{number:06d}.{suffix}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
                number += 1
    return folder


def source(kind: str, folder: Path) -> datasets.Dataset | datasets.IterableDataset:
    return table() if kind == "table" else load_pictures(str(shards(folder / "tars")), streaming=True)


TRANSFORM = PictureTransform((16, 12), "random_resized", flip=True)
both_kinds = pytest.mark.parametrize("kind", ["table", "stream"])


def take(loader: PictureLoader, start: int, number: int) -> list[dict]:
    return list(islice(loader.batches(start), number))


def assert_same(batches: list[dict], expected: list[dict]) -> None:
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert batch.keys() == other.keys()
        for key, value in batch.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[key])), key


def joined(parts: list[dict]) -> dict:
    tensors = {key: torch.cat([part[key] for part in parts]) for key in ("pixel_values", "labels", "indices")}
    return {**tensors, "num_skipped": sum(part["num_skipped"] for part in parts)}


# What comes when


@both_kinds
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_run_goes_on_with_exactly_the_batches_that_were_left(kind, num_workers, tmp_path):
    dataset = source(kind, tmp_path)
    straight = take(PictureLoader(dataset, TRANSFORM, 4, seed=3), 0, 24)  # four epochs and a bit
    resumed = PictureLoader(dataset, TRANSFORM, 4, seed=3, num_workers=num_workers)
    assert_same(take(resumed, 0, 8), straight[:8])
    assert_same(take(resumed, 19, 5), straight[19:])


@both_kinds
def test_the_shares_of_two_processes_are_the_batch_of_one(kind, tmp_path):
    dataset = source(kind, tmp_path)
    whole = take(PictureLoader(dataset, TRANSFORM, 8), 2, 4)
    shares = [take(PictureLoader(dataset, TRANSFORM, 4, rank=rank, world_size=2), 2, 4) for rank in (0, 1)]
    assert_same([joined(list(parts)) for parts in zip(*shares, strict=True)], whole)


def _write_batches(folder: Path, num_workers: int, start: int) -> None:
    rank = PartialState(cpu=True).process_index
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    loader = PictureLoader(table(), TRANSFORM, 4, rank=rank, world_size=2, num_workers=num_workers)
    torch.save(take(loader, start, 3), folder / f"{rank}.pt")


def test_two_real_processes_with_workers_resume_as_one_process_goes_straight(tmp_path):
    AcceleratorState._reset_state(True)  # of other tests: the processes would inherit that they are alone
    debug_launcher(partial(_write_batches, tmp_path, 2, 5), num_processes=2)
    shares = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    straight = take(PictureLoader(table(), TRANSFORM, 8), 0, 8)
    assert_same([joined(list(parts)) for parts in zip(*shares, strict=True)], straight[5:])


def test_every_row_comes_once_per_epoch_each_time_in_another_order():
    loader = PictureLoader(table(), TRANSFORM, 4)
    rows = torch.cat([batch["indices"] for batch in take(loader, 0, 23)]).view(4, 23)
    assert torch.equal(rows.sort(dim=1).values, torch.arange(23).expand(4, 23))
    assert len({tuple(epoch) for epoch in rows.tolist()}) == 4
    other = torch.cat([batch["indices"] for batch in take(PictureLoader(table(), TRANSFORM, 4, seed=1), 0, 23)])
    assert not torch.equal(other.view(4, 23), rows)


def test_every_sample_of_a_stream_comes_once_per_epoch_of_its_lane(tmp_path):
    stream = load_pictures(str(shards(tmp_path / "tars", (6,) * 4)), streaming=True)
    loader = PictureLoader(stream, TRANSFORM, 4)
    labels = torch.cat([batch["labels"] for batch in take(loader, 0, 18)]).view(3, 24)
    assert torch.equal(labels.sort(dim=1).values, torch.arange(24).expand(3, 24))
    assert len({tuple(epoch) for epoch in labels.tolist()}) == 3
    assert loader.shard_lengths == dict.fromkeys(range(4), 6)


def test_known_shard_lengths_change_nothing_but_the_reading(tmp_path):
    stream = load_pictures(str(shards(tmp_path / "tars")), streaming=True)
    straight = PictureLoader(stream, TRANSFORM, 4)
    expected = take(straight, 0, 40)[35:]
    resumed = PictureLoader(stream, TRANSFORM, 4, num_workers=1)
    resumed.shard_lengths.update(json.loads(json.dumps([*straight.shard_lengths.items()])))
    assert len(resumed.shard_lengths) == 8
    assert_same(take(resumed, 35, 5), expected)


def test_augmentation_differs_between_epochs_and_not_between_batches_sizes():
    small, large = (PictureLoader(table(4), TRANSFORM, size, shuffle=False) for size in (2, 4))
    epochs = [batch["pixel_values"] for batch in take(large, 0, 2)]
    assert not torch.equal(*epochs)
    parts = [batch["pixel_values"] for batch in take(small, 0, 4)]
    assert torch.equal(torch.cat(parts), torch.cat(epochs))


@both_kinds
def test_global_random_states_are_neither_read_nor_changed(kind, tmp_path):
    dataset = source(kind, tmp_path)
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)
        before = torch.get_rng_state(), np.random.get_state()[1].tolist()
        results.append(take(PictureLoader(dataset, TRANSFORM, 4, num_workers=1), 0, 2))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert np.random.get_state()[1].tolist() == before[1]
    assert_same(*results)


def test_workers_do_the_reading_and_end_with_the_iterator():
    batches = PictureLoader(table(), TRANSFORM, 4, num_workers=2).batches()
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    batches.close()
    assert multiprocessing.active_children() == []


@both_kinds
def test_workers_leave_ctrl_c_to_the_process_that_started_them(kind, tmp_path, request):
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored where tests run
    request.addfinalizer(partial(signal.signal, signal.SIGINT, previous))
    batches = PictureLoader(source(kind, tmp_path), TRANSFORM, 4, num_workers=2).batches()
    assert len(list(islice(batches, 2))) == 2  # one of each worker: both have started
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGINT)
    assert len(list(islice(batches, 10))) == 10
    batches.close()
    assert multiprocessing.active_children() == []


@both_kinds
@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 0), (3, 0), (2, 2)])
def test_once_gives_every_sample_once_over_all_processes(kind, world_size, num_workers, tmp_path):
    dataset = source(kind, tmp_path)
    options = {"world_size": world_size, "num_workers": num_workers}
    passes = [list(PictureLoader(dataset, TRANSFORM, 4, rank=rank, **options).once()) for rank in range(world_size)]
    rows = [batch["indices"].tolist() for batches in passes for batch in batches]
    expected = torch.cat([batch["indices"] for batch in PictureLoader(dataset, TRANSFORM, 50).once()]).tolist()
    assert sorted(sum(rows, [])) == expected == sorted(set(expected))
    assert len(expected) == (23 if kind == "table" else 37)
    if kind == "table":
        assert len({len(batches) for batches in passes}) == 1
    assert all(batch.tolist() == sorted(batch.tolist()) for p in passes for batch in [q["indices"] for q in p])


def test_batches_larger_than_the_data_set_span_epochs():
    loader = PictureLoader(table(3), TRANSFORM, 7)
    assert loader.steps_per_epoch == 1 and loader.num_samples == 3
    assert torch.bincount(next(loader.batches())["indices"]).tolist() == pytest.approx([2, 2, 2], abs=1)


def test_without_shuffling_rows_ascend():
    loader = PictureLoader(table(6), TRANSFORM, 4, shuffle=False)
    assert [batch["indices"].tolist() for batch in take(loader, 0, 3)] == [[0, 1, 2, 3], [4, 5, 0, 1], [2, 3, 4, 5]]


def test_pixel_batches_are_the_first_pictures_as_floats():
    loader = PictureLoader(table(), TRANSFORM, 4)
    pixels = torch.cat(list(pixel_batches(loader, 10)))
    assert pixels.shape == (10, 3, 16, 12)
    expected = torch.cat([batch["pixel_values"] for batch in take(loader, 0, 3)])[:10]
    assert torch.equal(((pixels + 1) * 127.5).round().to(torch.uint8), expected)
    with pytest.raises(ValueError, match="num_pictures=0"):
        next(pixel_batches(loader, 0))


# Damaged samples


@both_kinds
@pytest.mark.parametrize("num_workers", [0, 2])
def test_damaged_samples_are_replaced_and_counted_always_alike(kind, num_workers, tmp_path):
    damaged = (3, 11)
    dataset = table(damaged=damaged)
    if kind == "stream":
        dataset = load_pictures(str(shards(tmp_path / "tars", damaged=damaged)), streaming=True)
    loader = PictureLoader(dataset, TRANSFORM, 4, num_workers=num_workers, max_skipped_share=0.5)
    batches = take(loader, 0, 12)
    assert loader.num_skipped == sum(batch["num_skipped"] for batch in batches) >= 2
    assert loader.num_seen == 48 + loader.num_skipped
    assert all(batch["pixel_values"].shape == (4, 3, 16, 12) for batch in batches)
    if kind == "table":
        assert not set(damaged) & set(torch.cat([batch["indices"] for batch in batches]).tolist())
    assert_same(take(PictureLoader(dataset, TRANSFORM, 4, max_skipped_share=0.5), 5, 7), batches[5:])


def test_once_leaves_damaged_samples_out():
    loader = PictureLoader(table(9, damaged=(1, 4, 5)), TRANSFORM, 2)
    batches = list(loader.once())
    assert [batch["indices"].tolist() for batch in batches] == [[0], [2, 3], [6, 7], [8]]
    assert (loader.num_seen, loader.num_skipped) == (9, 3)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_too_many_damaged_samples_stop_the_run(num_workers):
    loader = PictureLoader(table(20, damaged=(3,)), TRANSFORM, 4, num_workers=num_workers)
    with pytest.raises(ValueError, match=r"6 of \d+ samples .* share of 4.76%; max_skipped_share=0.01 .* row 3: .*"):
        take(loader, 0, 200)
    with pytest.raises(ValueError, match="30 substitutes .* The picture is not a readable image"):
        take(PictureLoader(table(4, damaged=(0, 1, 2, 3)), TRANSFORM, 4, max_skipped_share=1), 0, 1)


def test_empty_cells_missing_files_and_absurd_sizes_are_damaged_samples(tmp_path):
    huge = encoded(0, (1, 2)).replace((1).to_bytes(4) + (2).to_bytes(4), (60_000).to_bytes(4) * 2)
    cells = [None, {"bytes": None, "path": str(tmp_path / "none.png")}, {"bytes": huge, "path": None}]
    elongated = {"bytes": encoded(0, (1, 3000)), "path": None}
    transform = PictureTransform(512, "center")
    for cell in (*cells, elongated, {"bytes": b"", "path": None}, "text"):
        with pytest.raises((ValueError, OSError)):
            transform(cell, torch.Generator())
    rows = [*cells, elongated, {"bytes": encoded(1), "path": None}]
    dataset = datasets.Dataset.from_dict(
        {"image": rows}, features=datasets.Features({"image": datasets.Image(decode=False)})
    )
    batches = list(PictureLoader(dataset, transform, 8).once())
    assert [batch["num_skipped"] for batch in batches] == [4]
    assert batches[0]["indices"].tolist() == [4]
    assert "labels" not in batches[0]


# Buckets


def test_bucket_shapes_are_whole_patches_of_about_as_many_pixels():
    shapes = aspect_ratio_buckets(256, 16, max_ratio=2)
    assert (256, 256) in shapes and shapes == [(width, height) for height, width in reversed(shapes)]
    assert all(height % 16 == width % 16 == 0 for height, width in shapes)
    assert all(0.85 * 256**2 <= height * width <= 256**2 for height, width in shapes)
    assert all(max(shape) <= 2 * min(shape) for shape in shapes)
    with pytest.raises(ValueError, match="size=250 is not a positive multiple of patch_size=16"):
        aspect_ratio_buckets(250)
    with pytest.raises(ValueError, match="max_ratio=0.5"):
        aspect_ratio_buckets(256, max_ratio=0.5)


def mixed_shapes(counts=(9, 6, 13, 1)) -> datasets.Dataset:
    """Tall, square, wide pictures and one very wide one; a wide one says so in its EXIF only."""
    exif = Image.Exif()
    exif[0x0112] = 6
    shapes = [(20, 30), (24, 24), (36, 20), (90, 20)]
    sizes = [size for size, number in zip(shapes, counts, strict=True) for _ in range(number)]
    pictures = [encoded(row, size) for row, size in enumerate(sizes)]
    pictures[20] = encoded(20, (20, 36), "JPEG", exif=exif)
    return datasets.Dataset.from_dict({"image": pictures})


def test_buckets_hold_pictures_of_their_shape_and_nearly_all_of_them():
    buckets = [(24, 16), (16, 16), (16, 24), (8, 32)]
    loader = PictureLoader(mixed_shapes(), PictureTransform(16, "center"), 4, buckets=buckets)
    # 9 tall, 6 square and 14 wide ones: the widest alone fills no batch.
    assert loader.steps_per_epoch == 2 + 1 + 3
    kinds = {(24, 16): range(9), (16, 16): range(9, 15), (16, 24): range(15, 29)}
    for epoch in range(3):
        batches = take(loader, epoch * 6, 6)
        for batch in batches:
            assert set(batch["indices"].tolist()) <= set(kinds[tuple(batch["pixel_values"].shape[2:])])
        rows = torch.cat([batch["indices"] for batch in batches]).tolist()
        assert len(rows) == len(set(rows)) == 24
    assert len({tuple(b["pixel_values"].shape) for b in take(loader, 0, 6)}) == 3


def test_batches_in_buckets_resume_and_divide_like_others():
    make = partial(
        PictureLoader,
        mixed_shapes(),
        PictureTransform(16, "random", flip=True),
        buckets=[(24, 16), (16, 16), (16, 24)],
    )
    straight = take(make(4), 0, 14)
    assert_same(take(make(4, num_workers=2), 9, 5), straight[9:])
    shares = [take(make(2, rank=rank, world_size=2), 9, 5) for rank in (0, 1)]
    for parts, batch in zip(zip(*shares, strict=True), straight[9:], strict=True):
        assert torch.equal(torch.cat([part["pixel_values"] for part in parts]), batch["pixel_values"])


def test_buckets_need_enough_pictures_and_their_sizes(tmp_path):
    with pytest.raises(ValueError, match="29 pictures do not fill one batch of 30"):
        PictureLoader(mixed_shapes(), PictureTransform(16, "center"), 30, buckets=[(16, 16)])
    stream = load_pictures(str(shards(tmp_path / "tars")), streaming=True)
    with pytest.raises(ValueError, match="not streamed"):
        PictureLoader(stream, TRANSFORM, 4, buckets=[(16, 16)])


# What becomes of a picture


def smooth(width: int, height: int, seed: int = 0) -> Image.Image:
    array = np.random.default_rng(seed).integers(0, 256, (max(height // 6, 2), max(width // 6, 2), 3), dtype=np.uint8)
    return Image.fromarray(array).resize((width, height), Image.Resampling.BICUBIC)


def as_tensor(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def adm_center_crop(picture: Image.Image, size: int) -> Image.Image:
    """The definition that ADM's paper and all that compare with it use, in Pillow."""
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return picture.crop((left, top, left + size, top + size))


@pytest.mark.parametrize("width_height", [(500, 375), (375, 501), (133, 300), (40, 70), (64, 64), (1025, 777)])
def test_center_crop_is_that_of_adm(width_height):
    picture = smooth(*width_height)
    pixels = PictureTransform(64, "center")(picture, torch.Generator())
    difference = (pixels.int() - as_tensor(adm_center_crop(picture, 64)).int()).abs()
    assert difference.max() <= 1 and difference.float().mean() < 0.3


def test_a_picture_that_fits_is_cropped_and_not_resized():
    picture = smooth(60, 40)
    assert torch.equal(PictureTransform((40, 60), "center")(picture, torch.Generator()), as_tensor(picture))
    pixels = PictureTransform((40, 32), "center")(picture, torch.Generator())
    assert torch.equal(pixels, as_tensor(picture)[:, :, 14:46])


def test_flip_mirrors_half_of_the_pictures_and_nothing_else():
    picture = smooth(20, 24)
    plain = PictureTransform((24, 20), "center")(picture, torch.Generator())
    transform = PictureTransform((24, 20), "center", flip=True)
    results = [transform(picture, torch.Generator().manual_seed(seed)) for seed in range(200)]
    mirrored = [torch.equal(result, plain.flip(-1)) for result in results]
    assert all(mirror or torch.equal(result, plain) for mirror, result in zip(mirrored, results, strict=True))
    assert 70 < sum(mirrored) < 130


def coordinates(width: int, height: int) -> Image.Image:
    """A picture whose red is the column and whose green is the row."""
    array = np.zeros((height, width, 3), dtype=np.uint8)
    array[..., 0] = np.arange(width)
    array[..., 1] = np.arange(height)[:, None]
    return Image.fromarray(array)


def spans(crop: str, size: tuple[int, int], picture: Image.Image, number: int = 600) -> np.ndarray:
    """What parts of a picture are shown: rows of (height, width, top, left), in its pixels."""
    transform = PictureTransform(size, crop)
    results = []
    for seed in range(number):
        red, green, _ = transform(picture, torch.Generator().manual_seed(seed)).float()
        inner = slice(4, -4)  # away from the borders the slope is the zoom
        width = (red[:, inner].diff(dim=1).mean()) * size[1]
        height = (green[inner].diff(dim=0).mean()) * size[0]
        results.append((float(height), float(width), float(green.min()), float(red.min())))
    return np.array(results)


def test_random_crop_shows_80_to_100_percent_of_the_binding_side():
    height, width, top, left = spans("random", (64, 64), coordinates(200, 150)).T
    share = height / 150
    assert 0.78 < share.min() < 0.83 and 0.97 < share.max() < 1.02
    np.testing.assert_allclose(height, width, rtol=0.05)
    assert top.min() < 2 and top.max() > 20 and left.min() < 3 and left.max() > 60
    zoomed = 64 / share  # uniform over 64, ..., 80
    assert abs(zoomed.mean() - 72) < 1


@pytest.mark.parametrize("size", [(64, 64), (48, 96)])
def test_random_resized_crop_follows_the_law_of_torchvision(size):
    picture = coordinates(250, 250 * size[0] // size[1])
    height, width, _, _ = spans("random_resized", size, picture).T
    area = height * width / (picture.width * picture.height)
    ratio = np.log(width / height * size[0] / size[1])
    # Uniform area in [0.08, 1], but large ones of an extreme ratio do not fit, and are drawn again.
    assert 0.07 < area.min() < 0.1 and 0.85 < area.max() < 1.05
    small = area[area < 0.7]
    assert abs(np.mean(small) - 0.39) < 0.03
    assert abs(np.abs(ratio).max() - np.log(4 / 3)) < 0.06
    assert abs(ratio.mean()) < 0.03
    assert abs(ratio[area < 0.5].std() - np.log(4 / 3) / 3**0.5) < 0.03


def test_random_resized_crop_of_a_strip_is_the_widest_admitted_part_in_its_middle():
    pixels = PictureTransform(30, "random_resized")(coordinates(250, 30), torch.Generator().manual_seed(0))
    assert tuple(pixels.shape) == (3, 30, 30)
    assert pixels[0].min() == 105 and pixels[0].max() == 144  # 40 columns


def test_every_mode_and_orientation_becomes_upright_rgb_over_white(tmp_path):
    transform = PictureTransform((20, 30), "center")
    picture = smooth(30, 20)
    for mode in ("L", "P", "CMYK", "RGBA", "1", "I;16", "LA"):
        pixels = transform(
            picture.convert("L").convert(mode) if mode != "P" else picture.convert("P"), torch.Generator()
        )
        assert pixels.shape == (3, 20, 30) and pixels.dtype == torch.uint8 and pixels.is_contiguous()
    transparent = Image.new("RGBA", (30, 20), (10, 20, 30, 0))
    assert (transform(transparent, torch.Generator()) == 255).all()
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "rotated.png"
    picture.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    for cell in ({"bytes": None, "path": str(path)}, {"bytes": path.read_bytes(), "path": None}, path.read_bytes()):
        assert torch.equal(transform(cell, torch.Generator()), as_tensor(picture))


def test_pixels_span_minus_one_to_one():
    pictures = torch.tensor([0, 51, 255], dtype=torch.uint8)
    assert to_pixels(pictures).tolist() == pytest.approx([-1, -0.6, 1])
    with pytest.raises(ValueError, match="torch.float32; expected torch.uint8"):
        to_pixels(pictures.float())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"size": 0}, "size=0"), ({"size": (8, 8, 8)}, "size="), ({"crop": "middle"}, "crop='middle' is not one of")],
)
def test_bad_transforms_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        replace(TRANSFORM, **options)


# Where pictures come from


def picture_folder(folder: Path, *names: str) -> Path:
    for seed, name in enumerate(names):
        save_picture(folder / name, 20 + seed, 16, seed=seed)
    return folder


def widths(dataset) -> list[int]:
    batches = PictureLoader(dataset, PictureTransform(8, "center"), 1).once()
    assert all(batch["pixel_values"].shape == (1, 3, 8, 8) for batch in batches)
    cells = [row["image"] for row in dataset]
    sources = [
        io.BytesIO(c) if isinstance(c, bytes) else io.BytesIO(c["bytes"]) if c["bytes"] else c["path"] for c in cells
    ]
    return [Image.open(source).width for source in sources]


@pytest.mark.parametrize("streaming", [False, True])
def test_folders_of_pictures(tmp_path, streaming):
    load = partial(load_pictures, streaming=streaming)
    flat = picture_folder(tmp_path / "flat", "b_test.png", "val_1.jpg", "train.PNG")
    (flat / "notes.txt").write_text("not a picture")
    assert sorted(widths(load(str(flat)))) == [20, 21, 22]
    assert load(str(flat)).column_names == ["image"]

    classes = picture_folder(tmp_path / "classes", "cat/0.png", "cat/1.png", "test/0.png")
    dataset = load(str(classes))
    assert dataset.features["label"].names == ["cat", "test"]
    assert sorted((row["label"], Image.open(row["image"]["path"]).width) for row in dataset) == [
        (0, 20),
        (0, 21),
        (1, 22),
    ]
    assert load(str(classes), label_column=None).features["image"] == datasets.Image(decode=False)

    splits = picture_folder(tmp_path / "splits", "train/a/0.png", "train/b/0.png", "val/a/0.png", "val/b/1.png")
    assert sorted(widths(load(str(splits)))) == [20, 21]
    for split in ("val", "validation"):
        assert sorted(widths(load(str(splits), split=split))) == [22, 23]
    with pytest.raises(ValueError, match="no split 'test', only 'train', 'validation'"):
        load(str(splits), split="test")
    with pytest.raises(ValueError, match="no split 'validation', only 'train'"):
        load(str(flat), split="validation")


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_files(tmp_path, streaming):
    folder = tmp_path / "tables"
    folder.mkdir()
    names = datasets.Dataset.from_dict({"picture": [encoded(0), encoded(1)], "name": ["dog", "cat"]})
    decoded = names.cast_column("picture", datasets.Image())
    names.to_parquet(folder / "photos_train-0.parquet")
    decoded.to_parquet(tmp_path / "one.parquet")
    names.select([0]).to_parquet(folder / "photos_val.parquet")
    load = partial(load_pictures, streaming=streaming, image_column="picture")
    rows = list(load(str(folder)))
    assert [row["picture"] for row in rows] == [encoded(0), encoded(1)]
    assert len(list(load(str(folder), split="val"))) == 1
    single = load(str(tmp_path / "one.parquet"))
    assert [row["picture"]["bytes"] for row in single] == [encoded(0), encoded(1)]
    assert next(iter(load_pictures(str(tmp_path / "one.parquet"), streaming=streaming)))["image"]["bytes"] == encoded(
        0
    )
    for column in ("image_column", "label_column"):
        with pytest.raises(ValueError, match="no column 'nothing', only picture, name"):
            load(str(folder), **{column: "nothing"})
    if streaming:
        with pytest.raises(ValueError, match="not whole numbers"):
            PictureLoader(load(str(folder)), TRANSFORM, 2, image_column="picture", label_column="name")
    else:
        assert load(str(folder), label_column="name").features["name"].names == ["cat", "dog"]
        assert len(load(str(folder), split="train[:1]")) == 1


def test_tar_files_have_their_default_names_or_their_own(tmp_path):
    folder = str(shards(tmp_path / "tars"))
    for options in ({}, {"streaming": True}):
        row = next(iter(load_pictures(folder, **options)))
        assert row["image"]["bytes"] == encoded(0) and row["label"] == 0
        row = next(iter(load_pictures(folder, image_column="png", label_column="cls", **options)))
        assert row["png"]["bytes"] == encoded(0) and row["cls"] == 0


@pytest.mark.parametrize("streaming", [False, True])
def test_saved_data_sets(tmp_path, streaming):
    dataset = table(6).cast_column("image", datasets.Image())
    dataset.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": dataset, "validation": dataset.select([4, 5])}).save_to_disk(tmp_path / "parts")
    load = partial(load_pictures, streaming=streaming)
    assert [row["image"]["bytes"] for row in load(str(tmp_path / "one"))] == [encoded(row) for row in range(6)]
    assert len(list(load(str(tmp_path / "parts"), split="val"))) == 2
    for name, message in (("one", "without splits"), ("parts", "only 'train', 'validation'")):
        with pytest.raises(ValueError, match=message):
            load(str(tmp_path / name), split="test")


def test_what_is_no_data_set_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("text")
    with pytest.raises(ValueError, match="has no pictures, no .parquet and no .tar files"):
        load_pictures(str(tmp_path))
    with pytest.raises(ValueError, match="neither a folder nor"):
        load_pictures(str(tmp_path / "notes.txt"))
    with pytest.raises(FileNotFoundError, match="is not the name of a repository"):
        load_pictures(str(tmp_path / "missing"))
    with pytest.raises(ValueError, match="revision='main' is for repositories"):
        load_pictures(str(tmp_path), revision="main")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"rank": 2, "world_size": 2}, "rank=2"),
        ({"max_skipped_share": 2}, "max_skipped_share=2"),
        ({"image_column": "picture"}, "no column 'picture', only image, label"),
        ({"image_column": "label"}, "Column 'label' has .* not pictures"),
        ({"label_column": "class"}, "no column 'class'"),
    ],
)
def test_bad_loaders_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PictureLoader(table(), TRANSFORM, **{"batch_size": 4, **options})


def test_empty_sets_negative_starts_and_too_few_shards_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no rows"):
        PictureLoader(table().select([]), TRANSFORM, 4)
    with pytest.raises(ValueError, match="start=-1"):
        PictureLoader(table(), TRANSFORM, 4).batches(-1)
    stream = load_pictures(str(shards(tmp_path / "tars", (2, 2))), streaming=True)
    with pytest.raises(ValueError, match="2 shards, fewer than world_size=3"):
        PictureLoader(stream, TRANSFORM, 4, world_size=3)


@pytest.mark.data
def test_real_photographs_pass_whole(data_folder):
    dataset = load_pictures(str(data_folder / "imagenette"), split="val")
    loader = PictureLoader(dataset, PictureTransform(224, "center"), 8, num_workers=2)
    batch = next(loader.batches())
    assert loader.num_samples == 2000 and batch["num_skipped"] == 0
    for row, label, pixels in zip(batch["indices"], batch["labels"], batch["pixel_values"], strict=True):
        stored = dataset[int(row)]
        assert stored["label"] == label
        assert torch.equal(as_tensor(Image.open(io.BytesIO(stored["image"])).convert("RGB")), pixels)
