"""RAR: orders, cached decoding in raster order, and what a prediction may depend on."""

import pytest
import torch
from peft import LoraConfig

from dinotok import RandomAutoregressiveTransformer2DModel, config_path
from dinotok.models.transformer_random_autoregressive import random_share_at, sample_orders

GRID = (2, 4)


def tiny_transformer(**config) -> RandomAutoregressiveTransformer2DModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    values = {"codebook_sizes": [20], "num_classes": 5, "sample_size": GRID, **sizes}
    model = RandomAutoregressiveTransformer2DModel(**{**values, **config}).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def model() -> RandomAutoregressiveTransformer2DModel:
    return tiny_transformer()


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randint(0, 20, (3, 1, *GRID), generator=generator),
        torch.tensor([0, 4, 5]),
        sample_orders(3, 8, 1.0, generator),
    )


@torch.no_grad()
def test_cached_logits_are_those_of_the_whole_grid(model, batch):
    indices, labels, _ = batch
    expected = model(indices, labels).logits[0].flatten(1, 2)
    tokens, cache = indices.flatten(1), model.allocate_cache(3)
    rows = [model(class_labels=labels, cache=cache).logits[0]]
    rows += [model(tokens[:, i : i + 1], cache=cache).logits[0] for i in range(7)]
    torch.testing.assert_close(torch.stack(rows, dim=1), expected, atol=1e-5, rtol=0)
    cache = model.allocate_cache(3)
    model(tokens[:, :2], labels, cache)
    torch.testing.assert_close(model(tokens[:, 2:5], cache=cache).logits[0], expected[:, 5], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="5 more tokens do not fit: the cache has room for 9 and holds 7"):
        model(tokens[:, :5], cache=cache)
    with pytest.raises(ValueError, match="class_labels start a sequence"):
        model(class_labels=labels, cache=cache)


def test_a_prediction_depends_on_what_is_earlier_in_the_order_alone(model, batch):
    indices, labels, orders = batch
    before = model(indices, labels, orders=orders).logits[0].flatten(1, 2)
    step = 3
    changed = indices.flatten(1).clone()
    changed.scatter_add_(1, orders[:, step : step + 1], torch.ones(3, 1, dtype=torch.long)).remainder_(20)
    after = model(changed.view_as(indices), labels, orders=orders).logits[0].flatten(1, 2)
    moved = (before != after).any(-1).gather(1, orders)  # in the order
    assert not moved[:, : step + 1].any()
    assert moved[:, step + 1 :].all()


def test_raster_is_the_order_by_default(model, batch):
    indices, labels, orders = batch
    default = model(indices, labels).logits[0]
    assert torch.equal(default, model(indices, labels, orders=torch.arange(8).expand(3, -1)).logits[0])
    assert not torch.equal(default, model(indices, labels, orders=orders).logits[0])


def test_orders_are_permutations_and_as_random_as_they_should_be():
    orders = sample_orders(400, 8, 0.25, torch.Generator().manual_seed(0))
    assert torch.equal(orders.sort(dim=1).values, torch.arange(8).expand(400, -1))
    random = (orders != torch.arange(8)).any(1).float().mean()
    assert 0.18 < random < 0.32
    assert torch.equal(sample_orders(3, 5, 0.0), torch.arange(5).expand(3, -1))
    first = sample_orders(4000, 8, 1.0, torch.Generator().manual_seed(0))[:, 0]
    assert (first.bincount(minlength=8) / 4000 - 1 / 8).abs().max() < 0.02


def test_the_share_of_random_orders_falls_in_a_line():
    shares = [random_share_at(step, 100, 200) for step in (0, 100, 150, 200, 300)]
    assert shares == [1.0, 1.0, 0.5, 0.0, 0.0]
    with pytest.raises(ValueError, match="start=5, end=5"):
        random_share_at(0, 5, 5)


def test_gradient_checkpointing_changes_nothing(batch):
    indices, labels, orders = batch
    model = tiny_transformer(dropout=0.0, attention_dropout=0.0).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        model(indices, labels, orders=orders).logits[0].square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second)


def test_low_rank_adapters_are_added(model, batch):
    indices, labels, _ = batch
    before = model(indices, labels).logits[0]
    model.add_adapter(LoraConfig(r=2, target_modules=["to_qkv", "to_out"], init_lora_weights=False))
    assert not torch.equal(model(indices, labels).logits[0], before)


def test_what_does_not_fit_is_refused(model, batch):
    indices, labels, orders = batch
    for call, message in (
        (lambda: tiny_transformer(codebook_sizes=[20, 20]), "one index per position"),
        (lambda: tiny_transformer(hidden_size=30), "hidden_size=30 is not a multiple"),
        (lambda: model.allocate_cache(1, (4, 2)), r"must be \(2, 4\), got \(4, 2\)"),
        (lambda: model(indices.mT, labels), r"must be \(2, 4\), got \(4, 2\)"),
        (lambda: model(indices[:, 0], labels), r"shape \(B, 1, h, w\)"),
        (lambda: model(indices), "both indices and class_labels"),
        (lambda: model(indices, labels, orders=orders[:, 1:]), r"Orders must have shape \(3, 8\), got \(3, 7\)"),
        (lambda: model(None, labels, model.allocate_cache(3), orders), "With a cache the order is raster order"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# Measured on the official code with 16,384 codes, without the rows of its tables that no token reaches.
@pytest.mark.parametrize(("name", "millions"), [("l", 493.1), ("xl", 910.8), ("xxl", 1541.8)])
def test_published_sizes(name, millions):
    config = RandomAutoregressiveTransformer2DModel.load_config(config_path(f"random_autoregressive_vfmtok_{name}"))
    with torch.device("meta"):
        model = RandomAutoregressiveTransformer2DModel.from_config(config)
    unreached = (2 * 1024 - 2 + 2 + 99 + 1) * config["hidden_size"]
    parameters = sum(parameter.numel() for parameter in model.parameters()) + unreached
    assert parameters / 1e6 == pytest.approx(millions, abs=0.06)
