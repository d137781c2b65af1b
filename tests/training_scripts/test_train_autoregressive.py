"""Cached tokens and autoregressive training: restarted and resumed runs equal straight ones."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from datasets import load_dataset
from safetensors.torch import load_file

from dinotok import AutoregressiveTransformer2DModel, RandomAutoregressiveTransformer2DModel
from dinotok.autoregressive_training import TokenObjective, TokenSource, build_transformer, conditions
from dinotok.hub import load_tokenizer
from dinotok.pipelines.class_conditional_autoregressive import DINOTokARPipeline
from dinotok.token_caches import TokenLoader, open_token_cache
from tests.tiny_tokenizers import save_picture, tiny_discrete_tokenizer
from training_scripts.cache_tokens import CacheOptions
from training_scripts.cache_tokens import main as cache_tokens
from training_scripts.train_autoregressive import AutoregressiveOptions
from training_scripts.train_autoregressive import main as train

SIZES = {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "dropout": 0.1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tokenizer, labelled pictures, and their tokens."""
    folder = tmp_path_factory.mktemp("training")
    tiny_discrete_tokenizer().save_pretrained(folder / "tokenizer")
    for index in range(10):
        save_picture(folder / "pictures" / ("church", "tench")[index % 2] / f"{index}.png", 60, 50, seed=index)
    (folder / "model.json").write_text(
        json.dumps({"_class_name": "AutoregressiveTransformer2DModel", "head_depth": 1, **SIZES})
    )
    cache_tokens(cache_options(folder))
    return folder


def cache_options(folder: Path, name: str = "tokens", **options) -> CacheOptions:
    values = {"tokenizer": str(folder / "tokenizer"), "dataset": str(folder / "pictures"), "views": 3, "shard_size": 4}
    values |= {"output_dir": str(folder / name), "resolution": 32, "batch_size": 3, "num_workers": 0}
    return CacheOptions(**{**values, **options})


def train_options(folder: Path, output: Path, **options) -> AutoregressiveOptions:
    values = {"model": str(folder / "model.json"), "dataset": str(folder / "tokens"), "output_dir": str(output)}
    values |= {"batch_size": 4, "max_train_steps": 4, "checkpointing_steps": 2, "num_workers": 0, "warmup_steps": 1}
    return AutoregressiveOptions(**{**values, "learning_rate": 1e-3, "ema_decay": 0.5, "resolution": 32, **options})


def weights_of(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


# Cached tokens


def test_a_cache_is_read_by_datasets(folder):
    rows = load_dataset(str(folder / "tokens"), split="train", cache_dir=str(folder / "hf"))
    assert len(rows) == 30
    assert len(list((folder / "tokens").glob("*.parquet"))) == 9
    assert sorted(zip(rows["view"], rows["picture"], strict=True)) == [(v, p) for v in range(3) for p in range(10)]
    cache = open_token_cache(folder / "tokens")
    assert cache.shape == (2, 2, 2)
    assert cache.description.label_names == ["church", "tench"]
    assert max(max(row) for row in rows["indices"]) < 16


def test_an_interrupted_cache_goes_on_and_equals_a_straight_one(folder):
    cache_tokens(cache_options(folder, "again", batch_size=2))
    lost = sorted((folder / "again").glob("*.parquet"))[4]
    times = {path: path.stat().st_mtime_ns for path in (folder / "again").glob("*.parquet")}
    lost.unlink()
    with pytest.raises(ValueError, match="1 of 9 files are missing, first 'tokens-01-00001.parquet'"):
        open_token_cache(folder / "again")
    cache_tokens(cache_options(folder, "again"))
    changed = [path for path, time in times.items() if path.stat().st_mtime_ns != time]
    assert changed == [lost]
    first, second = (open_token_cache(folder / name).dataset for name in ("tokens", "again"))
    assert first.to_dict() == second.to_dict()


def test_another_cache_is_not_mixed_in(folder):
    with pytest.raises(ValueError, match="tokens with seed=0, not 1"):
        cache_tokens(cache_options(folder, seed=1))


def test_views_differ_and_a_centred_view_is_that_of_the_tokenizer(folder):
    cache = open_token_cache(folder / "tokens").dataset
    views = {view: [row["indices"] for row in cache if row["view"] == view] for view in range(3)}
    assert views[0] != views[1] != views[2]
    cache_tokens(cache_options(folder, "centred", views=1, crop="center", flip=False))
    row = open_token_cache(folder / "centred").dataset[0]

    from dinotok.data import PictureTransform, to_pixels
    from dinotok.hub import load_tokenizer

    picture = (folder / "pictures" / "church" / "0.png").read_bytes()
    pixels = to_pixels(PictureTransform(32, crop="center")(picture, torch.Generator())[None])
    indices = load_tokenizer(str(folder / "tokenizer")).encode_to_indices(pixels)
    assert row["indices"] == indices.flatten().tolist()
    assert row["label"] == 0


def test_batches_do_not_depend_on_the_number_of_processes(folder):
    cache = open_token_cache(folder / "tokens")
    whole = TokenLoader(cache, 6, seed=3).batches(start=4)
    halves = [TokenLoader(cache, 3, seed=3, rank=rank, world_size=2).batches(start=4) for rank in range(2)]
    for _ in range(6):
        batch, parts = next(whole), [next(half) for half in halves]
        assert batch["indices"].shape == (6, 2, 2, 2)
        for name in ("indices", "labels"):
            assert torch.equal(batch[name], torch.cat([part[name] for part in parts]))
    shares = [TokenLoader(cache, 4, rank=rank, world_size=2).once() for rank in range(2)]
    assert sum(len(batch["labels"]) for share in shares for batch in share) == 30


# Training


def test_a_resumed_run_equals_a_straight_one_and_its_pipeline_draws(folder, tmp_path):
    options = train_options(
        folder, tmp_path / "a", tokenizer=str(folder / "tokenizer"), validation_dataset=str(folder / "tokens")
    )
    straight = train(options)
    train(dataclasses.replace(options, output_dir=str(tmp_path / "b"), max_train_steps=2))
    resumed = train(dataclasses.replace(options, output_dir=str(tmp_path / "b"), resume_from_checkpoint="latest"))
    assert torch.equal(weights_of(straight), weights_of(resumed))
    assert {path.name for path in (tmp_path / "a" / "samples").iterdir()} == {
        "step-00000002.png",
        "step-00000004.png",
    }
    pipeline = DINOTokARPipeline.from_pretrained(tmp_path / "a" / "pipeline")
    assert pipeline.transformer.config.codebook_sizes == [16, 16]
    assert torch.equal(weights_of(pipeline.transformer), weights_of(straight))
    assert pipeline("tench").images[0].size == (32, 32)
    record = json.loads((tmp_path / "a" / "pipeline" / "training.json").read_text())
    assert record["steps"] == 4
    assert 0 < record["validation/bits_per_position"] < 16


def test_training_learns_the_tokens(folder, tmp_path):
    options = {"max_train_steps": 150, "checkpointing_steps": 150, "learning_rate": 1e-2, "batch_size": 30}
    model = train(train_options(folder, tmp_path, class_dropout=0.0, ema_decay=0.0, **options))
    batch = next(TokenLoader(open_token_cache(folder / "tokens"), 30).once())
    logits = model(batch["indices"], batch["labels"]).logits
    losses = [
        torch.nn.functional.cross_entropy(book.flatten(0, 2), batch["indices"][:, k].flatten()).item()
        for k, book in enumerate(logits)
    ]
    assert max(losses) < 0.7 * torch.log(torch.tensor(16.0)), losses


@torch.no_grad()
def test_a_new_model_of_the_right_widths_starts_from_the_code_vectors(folder, tmp_path):
    """Distances between its code vectors are those of the tokenizer's, up to one factor for each codebook."""
    tokenizer = load_tokenizer(folder / "tokenizer")
    widths = [vectors.shape[1] for vectors in tokenizer.code_vectors.values()]
    for code_dims, equal in ((widths, True), ([4, 4], False)):
        (tmp_path / "model.json").write_text(
            json.dumps({"_class_name": "AutoregressiveTransformer2DModel", "code_dims": code_dims, **SIZES})
        )
        options = train_options(folder, tmp_path, model=str(tmp_path / "model.json"))
        source = TokenSource(options.dataset, options, Accelerator(), tokenizer, training=True)
        model = build_transformer(options, source, tokenizer)
        for embedding, codes in zip(model.code_embeddings, tokenizer.code_vectors.values(), strict=True):
            ratio = torch.pdist(embedding.weight) / torch.pdist(codes)
            assert bool(ratio.std() < 1e-4 * ratio.mean()) == equal
            assert not equal or embedding.weight.square().mean().item() == pytest.approx(1, rel=1e-4)


def test_pictures_are_tokenized_on_the_way(folder, tmp_path):
    options = train_options(folder, tmp_path, dataset=str(folder / "pictures"), max_train_steps=2)
    with pytest.raises(ValueError, match="need a --tokenizer"):
        train(options)
    options = dataclasses.replace(options, tokenizer=str(folder / "tokenizer"))
    assert train(options).config.sample_size == [2, 2]


def test_adapters_alone_are_trained_and_saved(folder, tmp_path):
    base = train(train_options(folder, tmp_path / "base"))
    assert isinstance(base, AutoregressiveTransformer2DModel)
    options = train_options(folder, tmp_path / "lora", model=str(tmp_path / "base" / "transformer"), lora_rank=2)
    train(options)
    adapters = load_file(tmp_path / "lora" / "lora" / "pytorch_lora_weights.safetensors")
    assert all("lora" in name for name in adapters)
    fresh = AutoregressiveTransformer2DModel.from_pretrained(tmp_path / "base" / "transformer")
    batch = next(TokenLoader(open_token_cache(folder / "tokens"), 4).once())
    before = fresh(batch["indices"], batch["labels"]).logits[0]
    fresh.load_lora_adapter(tmp_path / "lora" / "lora", weight_name="pytorch_lora_weights.safetensors", prefix=None)
    assert not torch.equal(fresh(batch["indices"], batch["labels"]).logits[0], before)


def test_a_model_in_random_orders_is_trained_on_one_codebook(folder, tmp_path):
    tiny_discrete_tokenizer(texture_codebook_size=0).save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "model.json").write_text(
        json.dumps({"_class_name": "RandomAutoregressiveTransformer2DModel", **SIZES, "attention_dropout": 0.1})
    )
    options = train_options(
        folder,
        tmp_path / "run",
        model=str(tmp_path / "model.json"),
        tokenizer=str(tmp_path / "tokenizer"),
        dataset=str(folder / "pictures"),
        anneal_steps=[1, 3],
    )
    assert isinstance(train(options), RandomAutoregressiveTransformer2DModel)
    assert DINOTokARPipeline.from_pretrained(tmp_path / "run" / "pipeline")(0).images[0].size == (32, 32)


def test_scoring_a_share_of_the_positions_has_the_expected_loss_and_gradient_of_scoring_all(folder, tmp_path):
    torch.manual_seed(0)
    model = AutoregressiveTransformer2DModel([5, 7], num_classes=2, sample_size=[2, 3], **SIZES, head_depth=1).eval()
    for output in model.head.outputs:
        torch.nn.init.normal_(output.weight)
    objective, indices = TokenObjective(model), torch.randint(5, (4, 2, 2, 3))

    def loss_and_gradient(labels, **conditioned):
        losses = objective(indices, labels, **conditioned)
        return torch.cat([losses.detach(), *(g.flatten() for g in torch.autograd.grad(losses.sum(), weights))])

    weights = [model.class_embedding.weight, model.head.outputs[1].weight]
    labels = torch.tensor([0, 1, 2, 0])
    options = train_options(folder, tmp_path, scored_share=0.4, class_dropout=0.0)
    drawn = [conditions(options, labels, model, step, rank=0)[1] for step in range(400)]
    assert all(row["positions"].shape == (4, 3) for row in drawn)  # 3 of 6: what 0.4 needs
    assert all(len(set(row)) == 3 for row in drawn[0]["positions"].tolist())
    mean = torch.stack([loss_and_gradient(labels, **row) for row in drawn]).mean(0)
    whole = loss_and_gradient(labels)
    assert (mean - whole).norm() < 0.05 * whole.norm()
    assert (loss_and_gradient(labels, **drawn[0]) - whole).norm() > 0.2 * whole.norm()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scored_share": 0.0}, r"scored_share=0\.0 must be in \(0, 1\]"),
        ({"scored_share": 1.5}, r"scored_share=1\.5 must be in \(0, 1\]"),
        ({"anneal_steps": [3]}, r"anneal_steps=\[3\] must be two steps"),
    ],
)
def test_options_that_cannot_be_are_refused(folder, tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        train(train_options(folder, tmp_path / "run", **values))


def test_a_model_of_other_data_is_refused(folder, tmp_path):
    model = AutoregressiveTransformer2DModel(codebook_sizes=[16, 16], num_classes=3, **SIZES)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="has num_classes=3, but the data has 2"):
        train(train_options(folder, tmp_path / "run", model=str(tmp_path / "model")))
