"""The autoregressive transformer: cached decoding, causality, the factorisation of a position's indices."""

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig

from dinotok import AutoregressiveTransformer2DModel, config_path

GRID = (3, 5)
BOOKS = {"one": [20], "two": [20, 13], "three": [20, 13, 7]}


def tiny_transformer(books: str = "two", head_depth: int | None = None, **config) -> AutoregressiveTransformer2DModel:
    """A small model with random weights everywhere, which `__init__` would leave at zero."""
    torch.manual_seed(0)
    depth = (0 if books == "one" else 2) if head_depth is None else head_depth
    sizes = {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    values = {"codebook_sizes": BOOKS[books], "num_classes": 5, "sample_size": GRID, "head_depth": depth, **sizes}
    model = AutoregressiveTransformer2DModel(**{**values, **config}).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def random_indices(model: AutoregressiveTransformer2DModel, batch: int = 2, grid: tuple[int, int] = GRID):
    generator = torch.Generator().manual_seed(1)
    books = [torch.randint(0, size, (batch, *grid), generator=generator) for size in model.config.codebook_sizes]
    return torch.stack(books, dim=1), torch.arange(batch)


def flat(indices: torch.Tensor) -> torch.Tensor:
    """`(B, K, h, w)` to `(B, h * w * K)`: the order of decoding."""
    return indices.flatten(2).transpose(1, 2).flatten(1)


variants = pytest.mark.parametrize(("books", "depth"), [("one", 0), ("one", 1), ("two", 2), ("two", 0), ("three", 1)])


@variants
@pytest.mark.parametrize("grid", [GRID, (4, 2)])
@torch.no_grad()
def test_cached_logits_are_those_of_the_whole_grid(books, depth, grid):
    model = tiny_transformer(books, depth)
    indices, labels = random_indices(model, grid=grid)
    whole = [logits.flatten(1, 2) for logits in model(indices, labels).logits]
    cache = model.allocate_cache(2, grid)
    logits = model(class_labels=labels, cache=cache).logits[0]
    for step in range(flat(indices).shape[1]):
        position, book = divmod(step, len(whole))
        torch.testing.assert_close(logits, whole[book][:, position], atol=1e-5, rtol=0)
        if step + 1 < flat(indices).shape[1]:
            logits = model(flat(indices)[:, step : step + 1], cache=cache).logits[0]


@variants
@torch.no_grad()
def test_chosen_positions_have_the_logits_of_the_whole_grid(books, depth):
    model = tiny_transformer(books, depth)
    indices, labels = random_indices(model)
    positions = torch.tensor([[5, 0, 3], [1, 1, 4]])
    chosen = model(indices, labels, positions=positions).logits
    for part, whole in zip(chosen, model(indices, labels).logits, strict=True):
        torch.testing.assert_close(part, whole.flatten(1, 2).take_along_dim(positions[..., None], 1))
    with pytest.raises(ValueError, match="with a cache there is one at a time"):
        model(class_labels=labels, cache=model.allocate_cache(2), positions=positions)


@variants
@torch.no_grad()
def test_a_start_with_indices_goes_on_as_if_they_had_come_singly(books, depth):
    model = tiny_transformer(books, depth)
    indices, labels = random_indices(model)
    tokens = flat(indices)
    single, chunks = model.allocate_cache(2), model.allocate_cache(2)
    model(class_labels=labels, cache=single)
    for step in range(7):
        expected = model(tokens[:, step : step + 1], cache=single).logits[0]
    model(tokens[:, :3], labels, cache=chunks)
    torch.testing.assert_close(model(tokens[:, 3:7], cache=chunks).logits[0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("books", "depth"), [("one", 0), ("two", 2), ("two", 0)])
@torch.no_grad()
def test_tied_codes_are_scored_by_their_vectors(books, depth, tmp_path):
    """Equal vectors get equal scores, decoding agrees with whole grids, and a saved model is the same one."""
    model = tiny_transformer(books, depth, tie_codes=True, code_dims=[6] * len(BOOKS[books]))
    indices, labels = random_indices(model)
    for book in model.code_embeddings:
        book.weight[3] = book.weight[4]
    whole = [logits.flatten(1, 2) for logits in model(indices, labels).logits]
    assert all(torch.equal(logits[..., 3], logits[..., 4]) for logits in whole)
    assert not any(torch.equal(logits[..., 4], logits[..., 5]) for logits in whole)
    cache = model.allocate_cache(2)
    logits = model(class_labels=labels, cache=cache).logits[0]
    for step in range(flat(indices).shape[1] - 1):
        position, book = divmod(step, len(whole))
        torch.testing.assert_close(logits, whole[book][:, position], atol=1e-5, rtol=0)
        logits = model(flat(indices)[:, step : step + 1], cache=cache).logits[0]
    names = [name for name, parameter in model.named_parameters() if len(parameter) in BOOKS[books]]
    assert names == [f"code_embeddings.{k}.weight" for k in range(len(BOOKS[books]))]
    model.save_pretrained(tmp_path)
    loaded = AutoregressiveTransformer2DModel.from_pretrained(tmp_path)
    for ours, theirs in zip(copy.deepcopy(loaded)(indices, labels).logits, whole, strict=True):
        assert torch.equal(ours.flatten(1, 2), theirs)


@torch.no_grad()
def test_a_full_cache_and_a_missing_start_are_errors():
    model = tiny_transformer()
    indices, labels = random_indices(model)
    cache = model.allocate_cache(2)
    with pytest.raises(ValueError, match="class_labels start a sequence"):
        model(flat(indices)[:, :1], cache=cache)
    model(flat(indices)[:, :-1], labels, cache=cache)
    with pytest.raises(ValueError, match="class_labels start a sequence"):
        model(class_labels=labels, cache=cache)
    with pytest.raises(ValueError, match="1 more tokens do not fit: the cache has room for 15 and holds 15"):
        model(flat(indices)[:, -1:], cache=cache)


@variants
def test_an_index_depends_on_those_before_it_alone(books, depth):
    model = tiny_transformer(books, depth)
    indices, labels = random_indices(model, batch=1)
    reference = model(indices, labels).logits
    position, book = (1, 2), 0
    changed = indices.clone()
    changed[0, book][position] += 1
    for k, (before, after) in enumerate(zip(reference, model(changed, labels).logits, strict=True)):
        moved = (before != after).any(-1)[0].flatten()
        at = position[0] * GRID[1] + position[1]
        assert not moved[:at].any()
        assert bool(moved[at]) == (k > book and depth > 0)  # the head sees the semantic index, parallel heads do not
        assert moved[at + 1 :].all()


@torch.no_grad()
def test_probabilities_of_a_position_multiply():
    """The head's joint probability of all index pairs of a position sums to 1: it is a chain rule."""
    model = tiny_transformer()
    indices, labels = random_indices(model, batch=1)
    first, second = BOOKS["two"]
    pairs = torch.cartesian_prod(torch.arange(first), torch.arange(second))  # (260, 2)
    many = indices.repeat(len(pairs), 1, 1, 1)
    many[:, :, 1, 2] = pairs
    semantic, texture = model(many, labels.expand(len(pairs))).logits
    log_semantic = semantic[:, 1, 2].log_softmax(-1).gather(1, pairs[:, :1])
    log_texture = texture[:, 1, 2].log_softmax(-1).gather(1, pairs[:, 1:])
    joint = (log_semantic + log_texture).exp().view(first, second)
    torch.testing.assert_close(joint.sum(), torch.tensor(1.0))
    torch.testing.assert_close(joint.sum(1), semantic[0, 1, 2].softmax(-1))
    conditional = joint / joint.sum(1, keepdim=True)
    assert (conditional - conditional[:1]).abs().max() > 0.01, "texture must depend on the semantic index"


@torch.no_grad()
def test_renaming_the_codes_renames_the_logits():
    model = tiny_transformer()
    indices, labels = random_indices(model)
    before = model(indices, labels).logits
    order = torch.randperm(20, generator=torch.Generator().manual_seed(2))
    renamed = order.argsort()[indices[:, 0]]
    for table in (model.code_embeddings[0], model.head.embeddings[0], model.head.outputs[0]):
        table.weight.copy_(table.weight[order])
    after = model(torch.stack([renamed, indices[:, 1]], dim=1), labels).logits
    torch.testing.assert_close(after[0], before[0][..., order])
    torch.testing.assert_close(after[1], before[1])


@torch.no_grad()
def test_the_class_token_has_zero_queries_and_keys():
    """As in the released weights: its rotary row is zero, so it meets every query with a score of 0."""
    model = tiny_transformer("one")
    cos, sin = model.allocate_cache(1).rotary
    assert not cos[0].any() and not sin[0].any()
    assert (cos[1:] ** 2 + sin[1:] ** 2 - 1).abs().max() < 1e-6


@pytest.mark.parametrize("tie_codes", [False, True])
def test_an_untrained_model_guesses_uniformly(tie_codes):
    sizes = {"codebook_sizes": [11, 7], "head_depth": 1, "hidden_size": 48, "num_layers": 1}
    model = AutoregressiveTransformer2DModel(**sizes, tie_codes=tie_codes)
    indices, labels = random_indices(model)
    for logits in model(indices, labels).logits:
        torch.testing.assert_close(logits.softmax(-1), torch.full_like(logits, 1 / logits.shape[-1]))


def cross_entropy(model, indices, labels) -> torch.Tensor:
    logits = model(indices, labels).logits
    return sum(F.cross_entropy(book.movedim(-1, 1), indices[:, k]) for k, book in enumerate(logits))


def test_gradient_checkpointing_changes_nothing():
    model = tiny_transformer(dropout=0.0).train()
    indices, labels = random_indices(model)
    cross_entropy(model, indices, labels).backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.enable_gradient_checkpointing()
    cross_entropy(model, indices, labels).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=name)


def test_dropout_acts_in_training_mode_alone():
    model = tiny_transformer()
    indices, labels = random_indices(model)
    once, twice = (model(indices, labels).logits[0] for _ in range(2))
    assert torch.equal(once, twice)
    model.train()
    assert not torch.equal(model(indices, labels).logits[0], once)


@torch.no_grad()
def test_bfloat16_is_close_and_its_logits_are_float32():
    model = tiny_transformer()
    indices, labels = random_indices(model)
    expected = model(indices, labels).logits[1]
    logits = model.to(torch.bfloat16)(indices, labels).logits[1]
    assert logits.dtype == torch.float32
    assert (logits - expected).norm() < 0.05 * expected.norm()
    cache = model.allocate_cache(2)
    stepwise = model(class_labels=labels, cache=cache).logits[0]
    assert (stepwise - model(indices, labels).logits[0][:, 0, 0]).norm() < 0.02 * stepwise.norm()


def test_low_rank_adapters_are_added_saved_and_loaded(tmp_path):
    model = tiny_transformer()
    indices, labels = random_indices(model)
    before = model(indices, labels).logits[0]
    model.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_qkv", "to_out"], init_lora_weights=False))
    adapted = model(indices, labels).logits[0]
    assert not torch.equal(adapted, before)
    model.save_lora_adapter(tmp_path)
    fresh = tiny_transformer()
    fresh.load_lora_adapter(tmp_path, weight_name="pytorch_lora_weights.safetensors", prefix=None)
    torch.testing.assert_close(fresh(indices, labels).logits[0], adapted)
    fresh.disable_adapters()
    torch.testing.assert_close(fresh(indices, labels).logits[0], before)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"codebook_sizes": []}, "at least one codebook"),
        ({"hidden_size": 36}, "hidden_size=36 is not a multiple of 4 x num_attention_heads=4"),
        ({"code_dims": [4]}, "does not have a width for each of 2 codebooks"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        tiny_transformer(**config)


def test_shapes_that_do_not_fit_are_refused():
    model = tiny_transformer()
    indices, labels = random_indices(model)
    with pytest.raises(ValueError, match=r"shape \(B, 2, h, w\), got \(2, 1, 3, 5\)"):
        model(indices[:, :1], labels)
    with pytest.raises(ValueError, match="both indices and class_labels"):
        model(indices)


# The sizes of the dossier on VFMTok, which was measured on the official code.
PARAMETERS = {
    "b": 110_888_448,
    "l": 342_910_976,
    "xl": 774_699_520,
    "xxl": 1_410_972_672,
    "2b": 2_188_389_120,
    "3b": 3_096_659_200,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_sizes_have_the_published_number_of_parameters(name):
    config = AutoregressiveTransformer2DModel.load_config(config_path(f"autoregressive_vfmtok_{name}"))
    with torch.device("meta"):
        model = AutoregressiveTransformer2DModel.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("head_dim", [60, 100])
@torch.no_grad()
def test_head_widths_of_the_largest_models_work(head_dim):
    model = tiny_transformer(hidden_size=2 * head_dim, num_attention_heads=2)
    indices, labels = random_indices(model)
    assert model(indices, labels).logits[0].isfinite().all()


@pytest.mark.slow
@torch.no_grad()
def test_compiled_decoding_is_the_same_with_few_graphs():
    model = tiny_transformer()
    indices, labels = random_indices(model)
    tokens = flat(indices)

    def decode(forward) -> torch.Tensor:
        cache = model.allocate_cache(2)
        rows = [forward(class_labels=labels, cache=cache).logits[0]]
        rows += [forward(tokens[:, step : step + 1], cache=cache).logits[0] for step in range(tokens.shape[1] - 2)]
        return torch.cat(rows, dim=1)

    expected = decode(model)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=True):
        compiled = torch.compile(model, fullgraph=True)
        for _ in range(2):
            torch.testing.assert_close(decode(compiled), expected, atol=1e-5, rtol=0)
