"""A denoiser for other latents: what it keeps, what is new, and that it can be trained."""

import pytest
import torch
from diffusers import DiTTransformer2DModel

from dinotok import DiffusionTransformer2DModel
from dinotok.adaptation import adapt_denoiser
from tests.conftest import randomize, tiny_autoencoder
from tests.test_vae_swap import flux, stable_diffusion, stable_diffusion_3


def tiny_dit() -> DiTTransformer2DModel:
    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=4,
        patch_size=2, num_embeds_ada_norm=10, norm_num_groups=2,
    )  # fmt: skip


def own_dit() -> DiffusionTransformer2DModel:
    return DiffusionTransformer2DModel(4, hidden_size=32, num_layers=1, num_attention_heads=2, num_classes=4)


DENOISERS = {
    "UNet": (lambda: stable_diffusion(tiny_autoencoder())["unet"], {"conv_in"}, {"conv_out"}),
    "DiT": (tiny_dit, {"pos_embed"}, {"proj_out_2"}),
    "SD3": (lambda: stable_diffusion_3(tiny_autoencoder())["transformer"], {"pos_embed"}, {"proj_out"}),
    "Flux": (lambda: flux(tiny_autoencoder())["transformer"], {"x_embedder"}, {"proj_out"}),
    "own": (own_dit, {"patch_embedding"}, {"output"}),
}


def top(names) -> set[str]:
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("kind", DENOISERS)
def test_only_the_projections_from_and_to_latents_are_new(kind):
    build, first, last = DENOISERS[kind]
    denoiser = randomize(build())
    torch.manual_seed(1)
    copy, new = adapt_denoiser(denoiser, in_channels=12)
    before, after = denoiser.state_dict(), copy.state_dict()
    assert top(new) == first | last and before.keys() == after.keys()
    for name, value in after.items():
        if name not in new:
            assert torch.equal(value, before[name]), name
        elif top([name]) == last:
            assert not value.any(), name
        else:
            assert value.isfinite().all() and value.std() > 1e-3, name
    assert copy.config.in_channels == 12 and denoiser.config.in_channels != 12


def test_channels_and_patches_may_change_together_and_saved_defaults_do_not_undo_that(tmp_path):
    tiny_dit().save_pretrained(tmp_path)
    loaded = DiTTransformer2DModel.from_pretrained(tmp_path)
    copy, new = adapt_denoiser(loaded, in_channels=12, out_channels=24, patch_size=1, sample_size=8)
    copy.save_pretrained(tmp_path / "copy")
    again = DiTTransformer2DModel.from_pretrained(tmp_path / "copy")
    labels = torch.zeros(1, dtype=torch.long)
    assert again(torch.zeros(1, 12, 8, 8), timestep=labels, class_labels=labels).sample.shape == (1, 24, 8, 8)
    assert sorted(new) == ["pos_embed.proj.weight", "proj_out_2.bias", "proj_out_2.weight"]


def test_the_copy_has_the_dtypes_and_mode_of_the_original_and_no_memory_in_common(tmp_path):
    own_dit().save_pretrained(tmp_path)
    denoiser = DiffusionTransformer2DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    copy, _ = adapt_denoiser(denoiser, in_channels=12)
    before = {name: (value.dtype, value.data_ptr()) for name, value in denoiser.named_parameters()}
    assert {dtype for dtype, _ in before.values()} == {torch.bfloat16, torch.float32}
    for name, value in copy.named_parameters():
        assert value.dtype == before[name][0] and value.data_ptr() != before[name][1]
    assert not copy.training


def test_the_same_latents_need_nothing_new():
    denoiser = tiny_dit()
    copy, new = adapt_denoiser(denoiser, in_channels=4, out_channels=8)
    assert new == [] and copy is not denoiser


def test_what_a_config_lacks_cannot_be_changed():
    with pytest.raises(ValueError, match="DiffusionTransformer2DModel has no out_channels"):
        adapt_denoiser(own_dit(), in_channels=4, out_channels=8)
