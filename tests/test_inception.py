from importlib import resources

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torchmetrics.image.fid import FrechetInceptionDistance

from dinotok.inception import InceptionFeatures
from tests.conftest import random_pixels

WEIGHTS = "fid_inception_v3_2015_to_mixed7a_fp16.safetensors"


@pytest.fixture(scope="module")
def features() -> InceptionFeatures:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = InceptionFeatures()
        for name, parameter in model.named_parameters():
            if name.endswith("weight"):
                torch.nn.init.kaiming_normal_(parameter)
        return model.requires_grad_(False)


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return random_pixels(*shape, seed=seed) * 0.5 + 0.5


def recompute(weights: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """The features from the weights alone: sizes of kernels from their shapes, padding "same" unless stated."""

    def convolve(hidden, *names, stride=1, same=True):
        for name in names:
            weight = weights[f"{name}.weight"]
            padding = [k // 2 for k in weight.shape[2:]] if same else 0
            hidden = F.conv2d(hidden, weight, weights[f"{name}.bias"], stride, padding).clamp(min=0)
        return hidden

    def average(hidden):
        ones = torch.ones_like(hidden[:1, :1])
        kernel = torch.ones(hidden.shape[1], 1, 3, 3)
        return F.conv2d(hidden, kernel, padding=1, groups=hidden.shape[1]) / F.conv2d(ones, kernel[:1], padding=1)

    def mixed(hidden, name, *rows):
        outputs = [convolve(hidden, *(f"{name}.{part}" for part in row)) for row in rows]
        return torch.cat([*outputs, convolve(average(hidden), f"{name}.branch_pool")], dim=1)

    hidden = F.interpolate(images, (299, 299), mode="bilinear") * 2 - 1
    hidden = convolve(hidden, "Conv2d_1a_3x3", stride=2, same=False)
    hidden = convolve(hidden, "Conv2d_2a_3x3", same=False)
    hidden = F.max_pool2d(convolve(hidden, "Conv2d_2b_3x3"), 3, 2)
    hidden = convolve(hidden, "Conv2d_3b_1x1")
    hidden = F.max_pool2d(convolve(hidden, "Conv2d_4a_3x3", same=False), 3, 2)
    for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        row = [f"branch3x3dbl_{i}" for i in (1, 2, 3)]
        hidden = mixed(hidden, name, ["branch1x1"], ["branch5x5_1", "branch5x5_2"], row)
    row = convolve(hidden, "Mixed_6a.branch3x3dbl_1", "Mixed_6a.branch3x3dbl_2")
    outputs = [convolve(hidden, "Mixed_6a.branch3x3", stride=2, same=False)]
    outputs += [convolve(row, "Mixed_6a.branch3x3dbl_3", stride=2, same=False), F.max_pool2d(hidden, 3, 2)]
    hidden = torch.cat(outputs, dim=1)
    for name in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        rows = [f"branch7x7_{i}" for i in range(1, 4)], [f"branch7x7dbl_{i}" for i in range(1, 6)]
        hidden = mixed(hidden, name, ["branch1x1"], *rows)
    return hidden.flatten(2).mean(2)


def test_it_is_the_published_architecture(features):
    pictures = images(1, 3, 90, 120)
    expected = recompute(features.state_dict(), pictures)
    assert expected.shape == (1, features.num_features) == (1, 768)
    assert expected.std() > 1e-2
    torch.testing.assert_close(features(pictures), expected, rtol=1e-4, atol=1e-5)


def test_bytes_and_unit_floats_agree_and_pictures_are_independent(features):
    levels = (images(2, 3, 40, 56) * 255).round().to(torch.uint8)
    result = features(levels)
    torch.testing.assert_close(features(levels.double() / 255), result)
    torch.testing.assert_close(features(levels[1:]), result[1:])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(features(levels), result)


def test_wrong_input_is_named(features):
    for pictures, message in (
        (torch.zeros(3, 8, 9), r"\(3, 8, 9\); expected \(B, 3, H, W\)"),
        (torch.zeros(1, 3, 8, 9, dtype=torch.int64), "dtype torch.int64; expected uint8"),
        (-torch.ones(1, 3, 8, 9), r"\[-1.0, -1.0\], not in \[0, 1\]"),
        (torch.full((1, 3, 8, 9), torch.nan), "not in"),
    ):
        with pytest.raises(ValueError, match=message):
            features(pictures)


def test_a_file_gives_the_same_features_and_may_hold_the_next_block(features, tmp_path):
    weights = {**features.state_dict(), "Mixed_7a.branch3x3_1.weight": torch.zeros(192, 768, 1, 1)}
    save_file({key: values.half() for key, values in weights.items()}, tmp_path / "inception.safetensors")
    state = torch.get_rng_state()
    loaded = InceptionFeatures.from_file(tmp_path / "inception.safetensors").train()
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(p.requires_grad or p.dtype != torch.float32 for p in loaded.parameters())
    assert not any(module.training for module in loaded.modules())
    pictures = images(1, 3, 40, 56)
    torch.testing.assert_close(loaded(pictures), features(pictures), rtol=0.02, atol=0.02)


def test_files_that_do_not_fit_are_refused(features, tmp_path):
    path = tmp_path / "inception.safetensors"
    weights = features.state_dict()
    bias = weights.pop("Mixed_6e.branch_pool.bias")
    save_file({**weights, "fc.bias": bias}, path)
    with pytest.raises(
        ValueError, match="1 tensors are missing .first 'Mixed_6e.branch_pool.bias'. and 1 unexpected .first 'fc.bias'"
    ):
        InceptionFeatures.from_file(path)
    save_file({**weights, "Mixed_6e.branch_pool.bias": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"\(3,\); expected \(192,\)"):
        InceptionFeatures.from_file(path)


def test_torchmetrics_takes_it_as_a_feature_extractor(features):
    metric = FrechetInceptionDistance(feature=features)
    metric.update((images(2, 3, 30, 40) * 255).byte(), real=True)
    assert metric.real_features_sum.shape == (768,)
    metric.update((images(2, 3, 30, 40, seed=1) * 255).byte(), real=False)
    assert metric.fake_features_num_samples == 2


def photograph(name: str) -> torch.Tensor:
    with Image.open(resources.files("dinotok") / "assets" / "photographs" / name) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None]


@pytest.mark.data
def test_trained_weights_give_the_features_of_pytorch_fid(data_folder):
    # Computed with pytorch-fid 0.3.0, InceptionV3([2]), given the same weights.
    expected = {
        "chelsea.jpg": ([0.0933580548, 0.0054311231, 0.0733082667, 0.0506085195, 0.0472872145], 2.4599566460),
        "coffee.jpg": ([0.0166345648, 0.0831234828, 0.0489798747, 0.0313306153, 0.1233647764], 2.4026987553),
    }
    features = InceptionFeatures.from_file(data_folder / "weights" / WEIGHTS)
    for name, (first, norm) in expected.items():
        result = features(photograph(name))[0]
        assert result[:5].tolist() == pytest.approx(first, abs=2e-6)
        assert result.norm().item() == pytest.approx(norm, abs=2e-5)
