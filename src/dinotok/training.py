"""What the training scripts share and is easy to get wrong: checkpoints, averages, stopping, records.

The loops themselves are in `training_scripts/`, one written out in each script.
"""

import dataclasses
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers.training_utils import EMAModel
from huggingface_hub import ModelCardData
from PIL import Image
from safetensors import safe_open
from torch import nn
from transformers import HfArgumentParser

from . import __version__
from .hub_upload import push_folder
from .models.encoders import FrozenEncoder

Options = TypeVar("Options")

RECORD_NAME = "training.json"
_PREFIX = "checkpoint-"
_UNFINISHED = ".unfinished-"
_RECORDED_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "datasets")


# ------------------------------------------------------------------------------------------------------ options


def parse_options(options_class: type[Options], arguments: Sequence[str] | None = None) -> Options:
    """Read a script's options from the command line, or from the JSON file that an earlier run left.

    Args:
        options_class: A dataclass, one field an option.
        arguments: By default those of the process. A single one that ends in `.json` is the file: options by name, or
            a `training.json` with them under `options`.

    Returns:
        The options.

    Raises:
        ValueError: If the file is no JSON or has an option that the script does not know.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = HfArgumentParser(options_class)
    if len(arguments) != 1 or not arguments[0].endswith(".json"):
        return parser.parse_args_into_dataclasses(arguments)[0]
    values = read_json(arguments[0])
    values = values.get("options", values)
    known = {field.name for field in dataclasses.fields(options_class)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"{arguments[0]!r} has the unknown option {unknown[0]!r}; the script knows {sorted(known)}.")
    return options_class(**values)


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the dictionary in a JSON file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds something else.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not valid JSON: {error}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{str(path)!r} holds a {type(values).__name__}, not a dictionary.")
    return values


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a dictionary as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(json.dumps(values, indent=2, default=str) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def training_record(options: Any, **values: Any) -> dict[str, Any]:
    """Return what is saved as `training.json` beside trained weights, enough to run the training again.

    Args:
        options: The script's dataclass.
        **values: What else is to be known, such as the steps done and the last validation.
    """
    return {
        "script": Path(sys.argv[0]).name,
        "options": dataclasses.asdict(options),
        **values,
        "environment": {
            "dinotok": __version__,
            "commit": _commit(),
            "python": platform.python_version(),
            **{name: version(name) for name in _RECORDED_PACKAGES},
        },
    }


def _commit() -> str | None:
    """The commit of the source tree this package runs from; None for an installed one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


# --------------------------------------------------------------------------------------------------- accelerator


class RunOptions(Protocol):
    """The options that every training script has."""

    seed: int
    mixed_precision: str
    report_to: str | None


def new_accelerator(**options: Any) -> Accelerator:
    """Build an accelerator, told where there is none: else the processes of a `torchrun` on CPUs are each alone."""
    return Accelerator(cpu=not torch.accelerator.is_available(), **options)


def make_accelerator(output_dir: str | os.PathLike[str], options: RunOptions) -> Accelerator:
    """Build the accelerator of a run, seed everything (equally on all ranks) and start the trackers.

    Args:
        output_dir: Of the run; trackers write to its `logs`.
        options: The script's dataclass. `mixed_precision` is "no" or "bf16": under fp16 loss scaling, overflow is
            normal and cannot be told from what went wrong. `report_to` names trackers, separated by commas.

    Raises:
        ValueError: If the precision is another.
    """
    if options.mixed_precision not in ("no", "bf16"):
        raise ValueError(f"mixed_precision={options.mixed_precision!r} is neither 'no' nor 'bf16'.")
    project = ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(Path(output_dir) / "logs"))
    accelerator = new_accelerator(
        mixed_precision=options.mixed_precision,
        log_with=options.report_to.split(",") if options.report_to else None,
        project_config=project,
    )
    set_seed(options.seed)
    if options.report_to:
        values = dataclasses.asdict(options).items()  # type: ignore[call-overload]
        accelerator.init_trackers("dinotok", {k: v for k, v in values if isinstance(v, int | float | str | bool)})
    return accelerator


def sum_over_processes(accelerator: Accelerator) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function that adds up a tensor over all processes."""
    return lambda tensor: accelerator.reduce(tensor, "sum")


def mean_over_processes(accelerator: Accelerator) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function that averages a tensor over all processes."""
    return lambda tensor: accelerator.reduce(tensor, "mean")


def log_picture(accelerator: Accelerator, name: str, picture: Image.Image, step: int) -> None:
    """Give a picture to the trackers that show pictures: tensorboard and wandb. Trackio's tracker takes none."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({name: np.asarray(picture)[None]}, step=step, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({name: [picture]}, step=step)


class StopRequest:
    """Turns Ctrl-C and SIGTERM into a wish that the loop sees after its step, so that nothing is lost.

    A second Ctrl-C interrupts at once. Use it as a context manager, around the loop; it must be in the main thread.
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self):
        self._asked = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        self._previous = {number: signal.signal(number, self._ask) for number in self._SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _) -> None:
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = True

    def made(self, accelerator: Accelerator) -> bool:
        """Whether any process was asked to stop: all see the same answer."""
        flag = torch.tensor([float(self._asked)], device=accelerator.device)
        return bool(accelerator.reduce(flag, "sum").item())


# --------------------------------------------------------------------------------------------------- checkpoints


class Checkpoints:
    """The checkpoints of a run: whole or not there, and only the newest ones.

    A checkpoint is a folder `checkpoint-STEP` of `accelerate`'s files: model weights as safetensors, optimizers,
    random number generators and whatever was registered with `accelerator.register_for_checkpointing`. The weights of
    `FrozenEncoder`s are left out. It is written under another name and renamed when all of it is on disk, so a killed
    run leaves no damaged one.

    Args:
        folder: Of the run.
        accelerator: What was prepared and registered with it is saved.
        limit: How many to keep.
    """

    def __init__(self, folder: str | os.PathLike[str], accelerator: Accelerator, limit: int = 2):
        self.folder = Path(folder)
        self.accelerator = accelerator
        self.limit = limit
        accelerator.register_save_state_pre_hook(_leave_out_frozen)
        if accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            for unfinished in self.folder.glob(f"{_UNFINISHED}*"):
                shutil.rmtree(unfinished)
        accelerator.wait_for_everyone()

    def save(self, step: int) -> Path:
        """Write the checkpoint of a step and remove the oldest beyond the limit; to be called by every process."""
        target = self.folder / f"{_PREFIX}{step}"
        unfinished = self.folder / f"{_UNFINISHED}{step}"
        self.accelerator.save_state(str(unfinished))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            if target.exists():
                shutil.rmtree(target)
            os.replace(unfinished, target)
            for old in self.steps()[: -self.limit]:
                shutil.rmtree(self.folder / f"{_PREFIX}{old}")
        self.accelerator.wait_for_everyone()
        return target

    def steps(self) -> list[int]:
        """Return the steps there are checkpoints of, in order."""
        numbers = (path.name.removeprefix(_PREFIX) for path in self.folder.glob(f"{_PREFIX}*"))
        return sorted(int(number) for number in numbers if number.isdigit())

    def find(self, which: str | None) -> Path | None:
        """Find the checkpoint that a run is to go on from; cheap, so a wrong one is known before anything is built.

        Args:
            which: "latest", a checkpoint's folder, or None to start anew.

        Returns:
            Its folder; None to start anew, which "latest" means where there is none yet.

        Raises:
            FileNotFoundError: If the folder does not exist.
            FileExistsError: If the run starts anew where there are checkpoints, which it would overwrite.
        """
        steps = self.steps()
        if which is None and steps:
            raise FileExistsError(
                f"{str(self.folder)!r} has a checkpoint of step {steps[-1]}: pass --resume_from_checkpoint latest "
                "to go on, or another --output_dir."
            )
        if which is None or (which == "latest" and not steps):
            return None
        path = self.folder / f"{_PREFIX}{steps[-1]}" if which == "latest" else Path(which)
        if not path.is_dir() or not path.name.removeprefix(_PREFIX).isdigit():
            raise FileNotFoundError(f"{which!r} is not the folder of a checkpoint ({_PREFIX}STEP).")
        return path

    def load(self, path: Path | None) -> int:
        """Load a checkpoint into what was prepared and registered.

        Args:
            path: From `find`.

        Returns:
            How many steps are done.

        Raises:
            ValueError: If the checkpoint is of another model.
        """
        if path is None:
            return 0
        self._check_fits(path)
        self.accelerator.load_state(str(path), strict=False)
        return int(path.name.removeprefix(_PREFIX))

    def _check_fits(self, path: Path) -> None:
        for index, model in enumerate(self.accelerator._models):
            file = path / f"model{f'_{index}' if index else ''}.safetensors"
            if not file.is_file():  # sharded, by a plugin that checks for itself
                continue
            model = self.accelerator.unwrap_model(model)
            expected = set(model.state_dict()) - frozen_keys(model)
            with safe_open(file, "pt") as stored:
                found = set(stored.keys())
            if found != expected:
                raise ValueError(
                    f"{str(path)!r} is of another model: {sorted(found ^ expected)[0]!r} is in one of them only."
                )


def frozen_keys(model: nn.Module) -> set[str]:
    """Return the names of a model's state that belong to encoders without a trainable parameter."""
    encoders = ((name, module) for name, module in model.named_modules() if isinstance(module, FrozenEncoder))
    prefixes = [f"{name}." if name else "" for name, module in encoders if not trainable(module)]
    return {key for key in model.state_dict() if key.startswith(tuple(prefixes))} if prefixes else set()


def _leave_out_frozen(models: list[nn.Module], weights: list[dict[str, torch.Tensor]], _output_dir: str) -> None:
    for model, state in zip(models, weights, strict=True):
        for key in frozen_keys(model) & set(state):
            del state[key]


# ------------------------------------------------------------------------------------------------------- averages


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that take gradients."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def make_ema(model: nn.Module, decay: float) -> EMAModel:
    """Return moving averages of a model's trainable parameters, warmed up as `min(decay, (1 + n) / (10 + n))`."""
    return EMAModel(trainable(model), decay=decay, use_ema_warmup=False)


@contextmanager
def averaged(model: nn.Module, ema: EMAModel | None) -> Iterator[nn.Module]:
    """Give a model its averaged parameters, and evaluation mode, for a while; buffers stay the current ones.

    Args:
        model: Not wrapped by an accelerator.
        ema: From `make_ema`; None leaves the parameters as they are.
    """
    training, parameters = model.training, trainable(model)
    if ema is not None:
        ema.store(parameters)
        ema.copy_to(parameters)
    model.eval()
    try:
        yield model
    finally:
        if ema is not None:
            ema.restore(parameters)
        model.train(training)


# -------------------------------------------------------------------------------------------------------- results


def publish(model: Any, folder: Path, record: Mapping[str, Any], repo_id: str | None = None) -> None:
    """Save a trained model with its record and a card, and upload it if a repository is named.

    A frozen encoder that came from the Hub is left out: the config names it, and its licence stays with its owner.

    Args:
        model: With `save_pretrained`.
        folder: For the model; `training.json` and `README.md` are written beside its weights.
        record: From `training_record`.
        repo_id: Of the Hub; None uploads nothing.
    """
    model.save_pretrained(folder, include_encoder=model.config.get("encoder_repository") is None)
    write_json(folder / RECORD_NAME, record)
    card = training_card(type(model).__name__, model.config.get("encoder_repository"), record)
    (folder / "README.md").write_text(card, encoding="utf-8")
    if repo_id is not None:
        push_folder(folder, repo_id, message="Trained model")


def training_card(class_name: str, base_model: str | None, record: Mapping[str, Any]) -> str:
    """Return the model card of a training run: what it is, how it was made, what was measured on which data."""
    data = ModelCardData(
        library_name="diffusers", pipeline_tag="image-to-image", base_model=base_model, tags=["dinotok", class_name]
    )
    options = record["options"]
    command = " ".join(f"--{key} {_shell(value)}" for key, value in options.items() if value not in (None, False))
    rows = [f"| {name.removeprefix('validation/')} | {value:.4g} |" for name, value in _scores(record)]
    results = ["| metric | value |", "|---|---|", *rows] if rows else ["No validation was run."]
    return "\n".join(
        [
            f"---\n{data.to_yaml()}\n---",
            f"# {class_name} trained on {Path(str(options['dataset'])).name}\n",
            f"```python\nfrom dinotok import {class_name}\n",
            f'model = {class_name}.from_pretrained("path/or/repository")\n```\n',
            f"Trained for {record['steps']} steps by `{record['script']}` of dinotok "
            f"{record['environment']['dinotok']}; `{RECORD_NAME}` beside the weights runs it again:\n",
            f"```bash\npython training_scripts/{record['script']} {command}\n```\n",
            "Measured on the validation pictures of the run, with the averaged weights:\n",
            *results,
            "\nThe licence is for you to state: it depends on the pictures and on the frozen encoder.\n",
        ]
    )


def _scores(record: Mapping[str, Any]) -> list[tuple[str, float]]:
    return [(name, value) for name, value in record.items() if name.startswith("validation/")]


def _shell(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
