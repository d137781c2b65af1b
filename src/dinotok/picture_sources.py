"""Data sets of pictures, by the name of a repository or by a path to whatever holds them."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .folders import PICTURE_SUFFIXES
from .picture_samples import DEFAULT_LABEL_COLUMN, check_columns

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

_DEFAULT_IMAGE_COLUMN = "image"
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_STREAM_SHARDS = 64  # of a saved data set that is streamed


def load_pictures(
    name_or_path: str,
    *,
    split: str = "train",
    image_column: str = _DEFAULT_IMAGE_COLUMN,
    label_column: str | None = DEFAULT_LABEL_COLUMN,
    streaming: bool = False,
    revision: str | None = None,
    token: str | None = None,
) -> "Dataset | IterableDataset":
    """Open a data set of pictures, which stay encoded.

    Unless it is streamed or saved, `datasets` converts tables and archives to Arrow files in its cache, once.

    Args:
        name_or_path: A repository of the Hub, or a path:
            a folder of pictures, where folders of one level become labels, in alphabetical order;
            a `.parquet` or `.tar` (WebDataset) file, or a folder of such;
            a folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote.
        split: Its part. Locally that is the folder (for pictures) or the files with that word in their name, where
            "val", "valid", "dev" and "validation" are one, and so are "test" and "eval". Without such names everything
            is "train". `datasets`' slices work, such as "train[:1000]", unless it was saved by `save_to_disk`.
        image_column: Where its pictures are. The default, if absent, stands for the only column of pictures, which is
            renamed to it (`jpg` of WebDataset).
        label_column: Where its labels are; None to ignore them. The default may be absent, or `cls` of WebDataset,
            which is renamed to it. Texts become numbers in alphabetical order, unless streamed.
        streaming: Whether to read it as it comes; nothing is downloaded or copied first.
        revision: Branch, tag or commit of the repository.
        token: For a private repository; by default the one of this machine.

    Returns:
        The data set with `image_column`, not decoded, and `label_column`, if there is one, among its columns.

    Raises:
        ValueError: If the path holds no pictures, lacks the split or a column, or is given a revision.
        OSError: If there is no such path or repository, or it cannot be reached.
    """
    path = Path(name_or_path).expanduser()
    if path.exists():
        if revision is not None:
            raise ValueError(f"revision={revision!r} is for repositories of the Hub; {name_or_path!r} is a path.")
        dataset = _load_saved(path, split, streaming) if _is_saved(path) else _load_files(path, split, streaming)
    else:
        dataset = _load_repository(name_or_path, split, streaming, revision, token)
    return _named_columns(dataset, image_column, label_column)


def label_names(dataset: Any) -> list[str]:
    """Return the names of a data set's classes: of its label feature, or of a column `class_name`, else numbers.

    Raises:
        ValueError: If it has no labels.
    """
    if "label" not in dataset.column_names:
        raise ValueError("The data set has no column 'label', and the generator is class-conditional.")
    names = getattr(dataset.features["label"], "names", None)
    if names:
        return list(names)
    labels = dataset["label"]
    found = dict(zip(labels, dataset["class_name"], strict=True)) if "class_name" in dataset.column_names else {}
    return [str(found.get(label, label)) for label in range(max(labels) + 1)]


def _load_repository(name: str, split: str, streaming: bool, revision: str | None, token: str | None) -> Any:
    from datasets import load_dataset

    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.endswith((".parquet", ".tar")):
        raise FileNotFoundError(f"There is no file or folder {name!r}, and it is not the name of a repository.")
    return load_dataset(name, split=split, streaming=streaming, revision=revision, token=token)


def _is_saved(path: Path) -> bool:
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _load_saved(path: Path, split: str, streaming: bool) -> Any:
    from datasets import DatasetDict, load_from_disk

    dataset = load_from_disk(path)
    if isinstance(dataset, DatasetDict):
        key = next((key for key in dataset if _word_split(key) == _word_split(split)), None)
        if key is None:
            raise ValueError(f"{str(path)!r} has no split {split!r}, only {', '.join(map(repr, dataset))}.")
        dataset = dataset[key]
    elif _word_split(split) != "train":
        raise ValueError(f"{str(path)!r} is one data set without splits, so it has no split {split!r}.")
    return dataset.to_iterable_dataset(num_shards=min(_STREAM_SHARDS, len(dataset))) if streaming else dataset


def _load_files(path: Path, split: str, streaming: bool) -> Any:
    from datasets import load_dataset

    key = re.split(r"[^\w.-]", split, maxsplit=1)[0]
    builder, files = _data_files(path, key)
    return load_dataset(builder, data_files={key: [str(file) for file in files]}, split=split, streaming=streaming)


def _data_files(path: Path, split: str) -> tuple[str, list[Path]]:
    """The builder of `datasets` for what is at a path, and the files of a split."""
    if path.is_file():
        if path.suffix.lower() not in (".parquet", ".tar"):
            raise ValueError(f"{str(path)!r} is neither a folder nor a .parquet or .tar file.")
        return ("parquet" if path.suffix.lower() == ".parquet" else "webdataset"), [path]
    found = sorted(file for file in path.rglob("*") if not _is_hidden(file.relative_to(path)) and file.is_file())
    for builder, suffix in (("parquet", ".parquet"), ("webdataset", ".tar")):
        shards = [file for file in found if file.suffix.lower() == suffix and file.name != "metadata.parquet"]
        if shards:
            return builder, _of_split(path, {file: file.relative_to(path).as_posix() for file in shards}, split)
    pictures = [file for file in found if file.suffix.lower() in PICTURE_SUFFIXES]
    if not pictures:
        raise ValueError(f"{str(path)!r} has no pictures, no .parquet and no .tar files.")
    metadata = [file for file in found if file.stem == "metadata" and file.suffix in (".csv", ".jsonl", ".parquet")]
    files = [*pictures, *metadata]
    # Folders tell splits if all are named by one: a class may be called "train", a picture test.jpg.
    names = {file: file.relative_to(path).parts[0] for file in files if file.parent != path}
    if not names or not all(_word_split(name, whole=True) for name in names.values()):
        names = dict.fromkeys(files, "train")
    return "imagefolder", _of_split(path, names, split)


def _of_split(path: Path, names: dict[Path, str], split: str) -> list[Path]:
    """The files of a split by their names; without a word of any split in them, they are all "train"."""
    splits = {file: _word_split(name) for file, name in names.items()}
    if not any(splits.values()):
        splits = dict.fromkeys(names, "train")
    chosen = [file for file, name in splits.items() if name == (_word_split(split) or split)]
    if not chosen:
        known = ", ".join(repr(name) for name in sorted({name for name in splits.values() if name}))
        raise ValueError(f"{str(path)!r} has no split {split!r}, only {known}.")
    return chosen


def _word_split(name: str, whole: bool = False) -> str | None:
    """The split that a name has a word of, or (`whole`) is a word of."""
    words = re.findall(r"[a-z]+", name.lower())
    if whole and len(words) != 1:
        return None
    return next((split for split, known in _SPLIT_WORDS.items() if any(word in known for word in words)), None)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _named_columns(dataset: Any, image_column: str, label_column: str | None) -> Any:
    """Rename the columns that stand for the defaults, number labels that are texts, leave pictures encoded."""
    from datasets import Dataset, Value
    from datasets import Image as ImageFeature

    if dataset.features is None:
        return dataset
    pictures = [name for name, feature in dataset.features.items() if isinstance(feature, ImageFeature)]
    for name in pictures:  # before anything else: renaming a streamed column decodes it
        dataset = dataset.cast_column(name, ImageFeature(decode=False))
    if image_column == _DEFAULT_IMAGE_COLUMN and image_column not in dataset.features and len(pictures) == 1:
        dataset = dataset.rename_column(pictures[0], image_column)
    if label_column == DEFAULT_LABEL_COLUMN and label_column not in dataset.features and "cls" in dataset.features:
        dataset = dataset.rename_column("cls", label_column)
    label_column = check_columns(dataset.features, image_column, label_column)
    text = isinstance(dataset.features.get(label_column), Value) and dataset.features[label_column].dtype == "string"
    if text and isinstance(dataset, Dataset):
        dataset = dataset.class_encode_column(label_column)
    return dataset
