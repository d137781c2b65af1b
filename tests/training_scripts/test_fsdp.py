"""Tokenizers under FSDP2: a sharded training step is the whole model's."""

import copy

import pytest
import torch
from accelerate import debug_launcher
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.conftest import random_pixels, tiny_autoencoder


def step(model: torch.nn.Module, pixels: torch.Tensor) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    (model(pixels).sample - pixels).square().mean().backward()
    optimizer.step()


def sharded_step_equals_whole() -> None:
    torch.set_num_threads(1)
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    whole = tiny_autoencoder().train()
    sharded = copy.deepcopy(whole)
    mesh = init_device_mesh("cpu", (2,))
    for part in (sharded.decoder, sharded.linear_decoder, sharded.texture_projection, sharded):
        fully_shard(part, mesh=mesh)
    pixels = random_pixels(4, 3, 32, 48)
    rank = torch.distributed.get_rank()
    step(whole, pixels)
    step(sharded, pixels[2 * rank : 2 * rank + 2])
    for (name, expected), found in zip(whole.named_parameters(), sharded.parameters(), strict=True):
        full = found.full_tensor() if hasattr(found, "full_tensor") else found
        torch.testing.assert_close(full, expected, rtol=1e-4, atol=1e-6, msg=name)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_a_sharded_step_is_the_whole_models():
    debug_launcher(sharded_step_equals_whole, num_processes=2)
