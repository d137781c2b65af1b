"""Distillation: the student learns, is an encoder like any other, and a resumed run equals a straight one."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from dinotok import AutoencoderDINOTok, FrozenEncoder
from dinotok.training import frozen_keys
from tests.conftest import TINY_DECODER, TINY_ENCODERS, random_pixels, save_tiny_encoder
from tests.tiny_tokenizers import save_picture
from training_scripts import distill_encoder
from training_scripts.distill_encoder import Distillation, DistillationOptions, class_and_patches


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Labelled pictures, a teacher with other patches, and a student's configuration of another width."""
    folder = tmp_path_factory.mktemp("distillation")
    for index in range(24):
        save_picture(folder / "pictures" / "abc"[index % 3] / f"{index}.png", 64, 48, seed=index % 3)
    save_tiny_encoder(folder / "teacher", seed=0, family="dinov2_with_registers")  # patch 14
    student = TINY_ENCODERS["dinov3_vit"] | {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    (folder / "student.json").write_text(json.dumps(student))
    return folder


@pytest.fixture(autouse=True)
def few_statistics(monkeypatch):
    monkeypatch.setattr(distill_encoder, "STATISTICS_PICTURES", 16)
    yield
    AcceleratorState._reset_state(True)


def options(folder: Path, output: Path, **values) -> DistillationOptions:
    defaults = DistillationOptions(
        teacher=str(folder / "teacher"),
        dataset=str(folder / "pictures"),
        output_dir=str(output),
        student=str(folder / "student.json"),
        resolution=32,
        batch_size=4,
        max_train_steps=4,
        warmup_steps=1,
        checkpointing_steps=2,
        num_workers=0,
    )
    return replace(defaults, **values)


def run(chosen: DistillationOptions) -> FrozenEncoder:
    AcceleratorState._reset_state(True)
    return distill_encoder.main(chosen)


def test_a_resumed_run_is_bit_identical_to_a_straight_one(folder, tmp_path):
    run(options(folder, tmp_path / "straight"))
    resumed = tmp_path / "resumed"
    run(options(folder, resumed))
    shutil.rmtree(resumed / "checkpoint-4")
    run(options(folder, resumed, resume_from_checkpoint="latest"))
    one, other = (load_file(tmp_path / name / "encoder" / "model.safetensors") for name in ("straight", "resumed"))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_the_student_is_an_encoder_and_trained(folder, tmp_path):
    chosen = options(folder, tmp_path, max_train_steps=60, learning_rate=3e-3, ema_decay=0.9, checkpointing_steps=60)
    returned = run(replace(chosen, validation_dataset=str(folder / "pictures")))
    record = json.loads((tmp_path / "encoder" / "training.json").read_text())
    assert record["validation/patches_unexplained"] < 0.9  # 1 is a student that knows the mean alone
    assert {"validation/student_knn_class", "validation/teacher_knn_patches"} <= set(record)
    tokenizer = AutoencoderDINOTok.from_encoder(str(tmp_path / "encoder"), texture_channels=8, **TINY_DECODER)
    pixels = random_pixels(1, 3, 32, 48)
    with torch.no_grad():
        torch.testing.assert_close(tokenizer.encoder(pixels)[0], returned(pixels)[0])
    assert tokenizer.config.image_mean == pytest.approx([0.485, 0.456, 0.406])


def test_a_student_can_go_on_from_a_folder(folder, tmp_path):
    first = run(options(folder, tmp_path / "first", max_train_steps=2))
    start = distill_encoder.build_student(str(tmp_path / "first" / "encoder"))
    assert torch.equal(start.model.norm.weight, first.model.norm.weight)


def test_the_loss_is_the_unexplained_share(folder):
    teacher = FrozenEncoder.from_encoder(str(folder / "teacher"), patch_size=16)
    objective = Distillation(FrozenEncoder(TINY_ENCODERS["dinov3_vit"]), teacher)
    pixels = random_pixels(6, 3, 32, 48)
    targets = class_and_patches(teacher, pixels)
    for kind, target in enumerate(targets):
        objective.mean[kind, 0], objective.std[kind, 0] = target.mean((0, 1)), target.std((0, 1), correction=0)

    errors = [((objective.mean[k] - targets[k]) / objective.std[k]).square().mean() for k in range(2)]
    assert [float(error) for error in errors] == pytest.approx([1, 1], abs=1e-4)

    assert objective(pixels, *class_and_patches(objective.student, pixels)).shape == (2,)


def test_a_trained_encoder_is_saved_with_the_checkpoints_and_a_frozen_one_is_not(folder):
    teacher = FrozenEncoder.from_encoder(str(folder / "teacher"))
    student = FrozenEncoder(TINY_ENCODERS["dinov3_vit"])
    assert frozen_keys(teacher) == set(teacher.state_dict())
    assert frozen_keys(Distillation(student, teacher)) == set()
