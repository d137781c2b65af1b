"""diffusers' own tester mixins on our models. They are not part of its wheel: point DIFFUSERS_TESTS to a copy.

    git clone --depth 1 --branch v0.42.1 https://github.com/huggingface/diffusers
    mkdir vendor && cp -r diffusers/tests vendor/diffusers_tests
    DIFFUSERS_TESTS=vendor make test-compatibility

Many tests carry a mark that skips them on a CPU although they run there: those marks are removed. What needs an
accelerator indeed (streams, several devices) is skipped.
"""

import os
import sys

import pytest
import torch

from dinotok import AutoencoderDINOTok, AutoencoderVFMTok, VQModelVFMTok
from tests.conftest import TINY_DECODER, TINY_ENCODERS

if "DIFFUSERS_TESTS" not in os.environ:
    pytest.skip("DIFFUSERS_TESTS does not name a copy of diffusers' tests", allow_module_level=True)
sys.path.insert(0, os.environ["DIFFUSERS_TESTS"])

from diffusers_tests.models.testing_utils import (  # noqa: E402
    AttentionTesterMixin,
    BaseModelTesterConfig,
    LayerwiseCastingTesterMixin,
    MemoryTesterMixin,
    ModelTesterMixin,
    TorchCompileTesterMixin,
    TrainingTesterMixin,
)
from diffusers_tests.testing_utils import enable_full_determinism, torch_device  # noqa: E402

try:
    from diffusers_tests.models.autoencoders.testing_utils import AutoencoderTesterMixin
except ImportError:  # its name up to 0.40
    from diffusers_tests.models.autoencoders.testing_utils import NewAutoencoderTesterMixin as AutoencoderTesterMixin

enable_full_determinism()


def on_cpu(mixin: type) -> type:
    """Remove the marks that skip a mixin's tests on a CPU."""
    for base in mixin.__mro__:
        for owner in (base, *(f for n, f in vars(base).items() if n.startswith("test_"))):
            marks = getattr(owner, "pytestmark", None)
            if isinstance(marks, list):
                owner.pytestmark = [mark for mark in marks if mark.name != "skipif"]
    return mixin


needs_accelerator = pytest.mark.skipif(torch_device == "cpu", reason="needs an accelerator")


class Config(BaseModelTesterConfig):
    model_class = AutoencoderDINOTok
    output_shape = (3, 32, 48)
    main_input_name = "sample"
    different_shapes_for_compilation = [(32, 32), (32, 64), (48, 48)]

    def get_init_dict(self):
        return {"encoder_config": TINY_ENCODERS["dinov3_vit"], "texture_channels": 8, **TINY_DECODER}

    def get_dummy_inputs(self, height=32, width=48):
        generator = torch.Generator("cpu").manual_seed(0)
        return {"sample": torch.rand(2, 3, height, width, generator=generator).to(torch_device) * 2 - 1}


class TestModel(Config, on_cpu(ModelTesterMixin)):
    @pytest.mark.xfail(
        reason="the test wants the message of the fallback to a pickle, which we do not have", strict=True
    )
    def test_from_save_pretrained_variant(self, base_model_output, tmp_path):
        super().test_from_save_pretrained_variant(base_model_output, tmp_path)

    @needs_accelerator
    def test_model_parallelism(self, *arguments, **named):
        super().test_model_parallelism(*arguments, **named)


class TestAutoencoder(Config, AutoencoderTesterMixin):
    def get_init_dict(self):  # the mixin tries two resolutions, so two pixels a patch
        return {**super().get_init_dict(), "patch_size": 2, "block_out_channels": (8, 8)}


class TestAttention(Config, AttentionTesterMixin):
    pass


class TestTraining(Config, TrainingTesterMixin):
    def test_gradient_checkpointing_is_applied(self):
        super().test_gradient_checkpointing_is_applied(expected_set={"Decoder", "UNetMidBlock2D", "DINOv3ViTLayer"})


class TestCompile(Config, on_cpu(TorchCompileTesterMixin)):
    @needs_accelerator
    def test_compile_with_group_offloading(self):
        super().test_compile_with_group_offloading()


class TestLayerwiseCasting(Config, on_cpu(LayerwiseCastingTesterMixin)):
    pass


class TestMemory(Config, MemoryTesterMixin):
    pass


# The tokenizers of regions take pictures of one size.

CHECKPOINTED_PARTS = {"Decoder", "UNetMidBlock2D", "DINOv3ViTLayer", "RegionSampler", "TokenDecoder"}


class RegionConfig(BaseModelTesterConfig):
    output_shape = (3, 64, 64)
    main_input_name = "sample"
    different_shapes_for_compilation = None  # there is one

    def get_init_dict(self):
        sizes = {f"{part}_intermediate_size": 24 for part in ("sampler", "decoder")}
        sizes |= {f"{part}_num_attention_heads": 2 for part in ("sampler", "decoder")}
        sizes |= {f"{part}_num_layers": 2 for part in ("sampler", "decoder")}
        return {
            "encoder_config": TINY_ENCODERS["dinov3_vit"],
            "image_size": 64,
            "query_grid": (4, 4),
            "hidden_size": 32,
            **sizes,
            **TINY_DECODER,
        }

    def get_dummy_inputs(self):
        generator = torch.Generator("cpu").manual_seed(0)
        return {"sample": torch.rand(2, 3, 64, 64, generator=generator).to(torch_device) * 2 - 1}


class ContinuousConfig(RegionConfig):
    model_class = AutoencoderVFMTok

    def get_init_dict(self):
        return {**super().get_init_dict(), "latent_channels": 8, "projector_num_groups": 4}


class DiscreteConfig(RegionConfig):
    model_class = VQModelVFMTok

    def get_init_dict(self):
        return {**super().get_init_dict(), "codebook_size": 32}


class RegionAutoencoder(AutoencoderTesterMixin):
    def get_init_dict(self):  # the mixin tries two resolutions, so two pixels a patch
        return {**super().get_init_dict(), "patch_size": 2, "block_out_channels": (8, 8)}

    def test_enable_disable_tiling(self):
        with pytest.raises(ValueError, match="there is no tiling"):
            self.model_class(**self.get_init_dict()).enable_tiling()


class TestContinuousRegionsModel(ContinuousConfig, TestModel):
    pass


class TestDiscreteRegionsModel(DiscreteConfig, TestModel):
    pass


class TestContinuousRegionsAutoencoder(RegionAutoencoder, ContinuousConfig):
    pass


class TestDiscreteRegionsAutoencoder(RegionAutoencoder, DiscreteConfig):
    pass


class TestContinuousRegionsTraining(ContinuousConfig, TrainingTesterMixin):
    def test_gradient_checkpointing_is_applied(self):
        super().test_gradient_checkpointing_is_applied(expected_set=CHECKPOINTED_PARTS)


class TestDiscreteRegionsTraining(DiscreteConfig, TrainingTesterMixin):
    def test_gradient_checkpointing_is_applied(self):
        super().test_gradient_checkpointing_is_applied(expected_set=CHECKPOINTED_PARTS)


class TestContinuousRegionsCompile(ContinuousConfig, TestCompile):
    pass


class TestDiscreteRegionsCompile(DiscreteConfig, TestCompile):
    pass


class TestContinuousRegionsLayerwiseCasting(ContinuousConfig, on_cpu(LayerwiseCastingTesterMixin)):
    pass


class TestDiscreteRegionsLayerwiseCasting(DiscreteConfig, on_cpu(LayerwiseCastingTesterMixin)):
    pass


class TestContinuousRegionsMemory(ContinuousConfig, MemoryTesterMixin):
    pass


class TestDiscreteRegionsMemory(DiscreteConfig, MemoryTesterMixin):
    pass


class TestContinuousRegionsAttention(ContinuousConfig, AttentionTesterMixin):
    pass


class TestDiscreteRegionsAttention(DiscreteConfig, AttentionTesterMixin):
    pass
