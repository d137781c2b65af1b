"""Model cards: valid headers, snippets that run, and numbers that are those of the committed results."""

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from dinotok.bundled import bundled_models

ROOT = Path(__file__).parents[1]
CARDS = sorted((ROOT / "model_cards").glob("*.md"))
RESULTS = json.loads((ROOT / "benchmarks" / "results" / "dinotok_tiny.json").read_text("utf-8"))


def test_every_bundled_model_has_a_card():
    assert [card.stem for card in CARDS] == bundled_models()


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.stem)
def test_the_header_is_valid_and_the_snippet_runs(card):
    data = ModelCard.load(card, ignore_metadata_errors=False).data
    assert data.license == "apache-2.0" and data.datasets and "dinotok" in data.tags
    for snippet in re.findall(r"```python\n(.*?)```", card.read_text("utf-8"), re.DOTALL):
        exec(compile(snippet, card.name, "exec"), {})


@pytest.mark.parametrize("name", RESULTS["reconstruction"])
def test_numbers_are_those_of_the_benchmark(name):
    text = "".join(card.read_text("utf-8") for card in CARDS)
    for row in RESULTS["reconstruction"][name].values():
        assert f"{row['psnr']:.2f}" in text and f"{row['lpips_alex']:.3f}" in text
