"""Load exported repositories as a stranger would, and compare with what their models made where they come from.

    python tests/load_repositories.py {with,without} PREFIX EXPECTED

`without` makes `import dinotok` fail first. PREFIX is a folder of repositories, or their owner on a Hub. Only
diffusers is used, as a stranger knows nothing else. EXPECTED is a safetensors file: what goes in, and what each
repository makes of it.
"""

import sys

import torch
from diffusers import AutoModel, DiffusionPipeline
from safetensors.torch import load_file

MODELS = ("autoencoder", "discrete", "regions")
PIPELINES = ("diffusion", "autoregressive")


@torch.no_grad()
def output_of(name: str, model, pixels: torch.Tensor) -> torch.Tensor:
    """Reconstructions of a tokenizer, or pictures that a pipeline draws."""
    if name in MODELS:
        return model(pixels).sample
    model.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2} if name == "diffusion" else {"top_k": 4}
    return model([1, 2], generator=torch.Generator().manual_seed(0), output_type="pt", **options).images


def main() -> None:
    mode, prefix, file = sys.argv[1:]
    if mode == "without":
        sys.modules["dinotok"] = None
        try:
            import dinotok
        except ModuleNotFoundError:
            pass
        else:
            raise SystemExit(f"{dinotok} can be imported")
    expected = load_file(file)
    loaded = {}
    for name in (*MODELS, *PIPELINES, "autoencoder"):  # one of them twice
        loader = AutoModel if name in MODELS else DiffusionPipeline
        again = loader.from_pretrained(f"{prefix}/{name}", trust_remote_code=True)
        assert name not in loaded or type(again) is type(loaded[name]), "a second load made a second class"
        loaded[name] = again
    for name, model in loaded.items():  # each still works when the others are there
        owner = type(model).__module__.split(".")[0]
        assert (owner == "dinotok") == (mode == "with"), f"{name} is of {owner}"
        torch.testing.assert_close(output_of(name, model, expected["pixels"]), expected[name])
    again = f"{sys.argv[3]}.{mode}"
    loaded["diffusion"].save_pretrained(again)
    saved = DiffusionPipeline.from_pretrained(again, trust_remote_code=True)
    torch.testing.assert_close(output_of("diffusion", saved, expected["pixels"]), expected["diffusion"])
    print("all as expected", flush=True)


if __name__ == "__main__":
    main()
