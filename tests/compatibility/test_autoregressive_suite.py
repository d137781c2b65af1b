"""diffusers' own tester mixins on the autoregressive transformers: run as `test_diffusers_suite.py` says.

The mixins want a model with a single tensor as output, so they get the logits of the first codebook.
"""

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from dinotok import AutoregressiveTransformer2DModel, RandomAutoregressiveTransformer2DModel
from tests.compatibility.test_diffusers_suite import (
    BaseModelTesterConfig,
    LayerwiseCastingTesterMixin,
    MemoryTesterMixin,
    ModelTesterMixin,
    TrainingTesterMixin,
    needs_accelerator,
    on_cpu,
    torch_device,
)

SIZES = {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "dropout": 0.0}


class FirstCodebook(AutoregressiveTransformer2DModel):
    def forward(self, indices, class_labels, return_dict=True):
        logits = super().forward(indices, class_labels).logits[0]
        return Transformer2DModelOutput(sample=logits) if return_dict else (logits,)


class RandomFirstCodebook(RandomAutoregressiveTransformer2DModel):
    def forward(self, indices, class_labels, return_dict=True):
        logits = super().forward(indices, class_labels).logits[0]
        return Transformer2DModelOutput(sample=logits) if return_dict else (logits,)


class AutoregressiveConfig(BaseModelTesterConfig):
    model_class = FirstCodebook
    output_shape = (3, 4, 20)
    main_input_name = "indices"

    def get_init_dict(self):
        return {"codebook_sizes": [20, 13], "num_classes": 5, "sample_size": [3, 4], "head_depth": 1, **SIZES}

    def get_dummy_inputs(self):
        generator = torch.Generator("cpu").manual_seed(0)
        books = len(self.get_init_dict()["codebook_sizes"])
        return {
            "indices": torch.randint(0, 13, (2, books, 3, 4), generator=generator).to(torch_device),
            "class_labels": torch.tensor([1, 5], device=torch_device),
        }


class RandomAutoregressiveConfig(AutoregressiveConfig):
    model_class = RandomFirstCodebook

    def get_init_dict(self):
        sizes = {"codebook_sizes": [20], "num_classes": 5, "sample_size": [3, 4]}
        return {**sizes, **SIZES, "attention_dropout": 0.0}


class ModelTests(on_cpu(ModelTesterMixin)):
    @needs_accelerator
    def test_model_parallelism(self, *arguments, **named):
        super().test_model_parallelism(*arguments, **named)


class TrainingTests(TrainingTesterMixin):
    def test_gradient_checkpointing_is_applied(self):
        super().test_gradient_checkpointing_is_applied(expected_set={self.model_class.__name__})


class TestAutoregressiveModel(AutoregressiveConfig, ModelTests):
    pass


class TestAutoregressiveTraining(AutoregressiveConfig, TrainingTests):
    pass


class TestAutoregressiveLayerwiseCasting(AutoregressiveConfig, on_cpu(LayerwiseCastingTesterMixin)):
    pass


class TestAutoregressiveMemory(AutoregressiveConfig, MemoryTesterMixin):
    pass


class TestRandomAutoregressiveModel(RandomAutoregressiveConfig, ModelTests):
    pass


class TestRandomAutoregressiveTraining(RandomAutoregressiveConfig, TrainingTests):
    pass
