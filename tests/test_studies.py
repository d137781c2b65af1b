"""The studies of docs/studies.md: its tables are the committed results, and their arithmetic is the tokenizers'."""

import importlib
import json
import os

import pytest
import torch

from dinotok import AutoencoderDINOTok
from dinotok.data import to_pixels
from dinotok.lpips import LPIPS
from dinotok.metrics import ReconstructionMetrics
from tests.conftest import TINY_DECODER, TINY_ENCODERS
from tests.test_readme import RESULTS, ROOT


@pytest.fixture
def benchmark(monkeypatch):
    """Import a module of the folder of benchmarks, as they import each other."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


def test_tables_of_the_page_are_the_committed_results(benchmark):
    results = json.loads((RESULTS / "tokenizer_studies.json").read_text("utf-8"))
    page = (ROOT / "docs" / "studies.md").read_text("utf-8")
    studies = benchmark("tokenizer_studies")
    assert set(results["studies"]) <= set(studies.TITLES)
    for study, table in studies.tables(results).items():
        assert len(table) > 2 and "\n".join(table) + "\n\n" in page, study


def test_the_page_is_written_anew_with_the_results(benchmark, tmp_path, monkeypatch):
    studies = benchmark("tokenizer_studies")
    monkeypatch.setattr(studies, "PAGE", tmp_path / "studies.md")
    studies.PAGE.write_text("Before\n<!-- rank -->\n| head |\n| old |\n\nAfter\n\n<!-- fusion -->\n| other |\n")
    row = {"error": 0.5, "usage": 1.0, "perplexity": 900.0, "k-NN": 0.75, "psnr": 20.0, "psnr_pooled": 19.0}
    studies.update_page({"settings": {"encoder": "x"}, "studies": {"rank": {"8": row}}})
    line = "| 8 | 0.500 | 100.0% of 1024 | 900 | 75.0% | 20.00 (19.00) dB |"
    table = f"| {studies.TITLES['rank']} |\n|---|---|---|---|---|---|\n{line}"
    text = f"Before\n<!-- rank -->\n{table}\n\nAfter\n\n<!-- fusion -->\n| other |\n"
    assert studies.PAGE.read_text() == text


@pytest.mark.parametrize(("channels", "layer"), [(8, 1), (0, 0)])
def test_a_row_is_the_tokenizer_that_fit_makes(benchmark, channels, layer):
    closed_form = benchmark("closed_form")
    torch.manual_seed(0)
    model = AutoencoderDINOTok(
        encoder_config=TINY_ENCODERS["dinov3_vit"], shallow_layer=layer, texture_channels=channels, **TINY_DECODER
    ).eval()
    train, validation = (torch.randint(0, 256, (12, 3, 48, 64), dtype=torch.uint8) for _ in range(2))
    labels = torch.arange(12) % 2
    photographs = closed_form.Photographs((train, labels), (validation, labels), 5)

    @torch.no_grad()
    def measure(pixels):
        names = ("deep", "shallow") if channels else ("deep",)
        return dict(zip(names, model.encoder(pixels, [3, layer][: len(names)]), strict=True))

    survey = closed_form.Survey(measure, photographs)
    model.fit([to_pixels(train)], ridge=closed_form.RIDGE)
    if channels:
        projection, *linear = closed_form.texture_of(survey.moments["shallow"], channels)
        parts, linear = [("deep", None), ("shallow", projection)], ("shallow", *linear)
    else:
        parts, linear = [("deep", None)], ("deep", *survey.moments["deep"].ridge(alpha=closed_form.RIDGE))
    lpips, expected = LPIPS("squeeze"), ReconstructionMetrics()
    pixels = to_pixels(closed_form.spread(validation, 5))
    with torch.no_grad():
        latents = model.encode(to_pixels(validation)).latent.mean((2, 3))
        expected.update(model(pixels).sample, pixels, lpips)
    found = survey.reconstruct({"row": linear}, lpips)["row"]
    assert found == pytest.approx(expected.compute(), rel=1e-4)
    means = survey.means["validation"]
    normalized = [closed_form.normalize(survey.moments[name], means[name], part) for name, part in parts]
    torch.testing.assert_close(torch.cat(normalized, 1), latents, rtol=1e-3, atol=1e-3)


def test_ranks_order_the_error_of_the_codes(benchmark):
    studies = benchmark("tokenizer_studies")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(3000, 8, generator=generator) * torch.tensor([9.0, 5, 3, 2, 1, 1, 1, 1])
    moments = studies.StreamingMoments(8).update(tokens)
    errors = []
    for rank in (1, 2, 4):
        quantizer = studies.DominantSubspaceQuantizer(8, studies.CODES, rank).set_pca(moments.pca(), moments.count)
        quantizer.fit(tokens, generator, num_iterations=2)
        errors.append(studies.usage(quantizer, tokens)["error"])
    assert 1 > errors[0] > errors[1] > errors[2] > 0


# Agreement with other libraries, and what it costs


def test_no_number_was_further_from_another_librarys_than_its_tolerance(benchmark):
    agreement = benchmark("metric_agreement")
    rows = json.loads((RESULTS / "metric_agreement.json").read_text("utf-8"))["rows"]
    assert {row["library"].split()[0] for row in rows} == set(agreement.LIBRARIES)
    assert all(row["difference"] <= row["tolerance"] <= 1e-4 for row in rows)
    page = (ROOT / "docs" / "evaluation.md").read_text("utf-8")
    assert "\n".join(agreement.table(rows)) in page


def test_what_an_evaluation_costs_is_what_was_measured(benchmark):
    rows = json.loads((RESULTS / "evaluation_overhead.json").read_text("utf-8"))
    page = (ROOT / "docs" / "evaluation.md").read_text("utf-8")
    assert "\n".join(benchmark("evaluation_overhead").table(rows)) in page


def test_numbers_are_those_of_the_other_libraries_again(benchmark):
    agreement = benchmark("metric_agreement")
    libraries = [name for name in agreement.LIBRARIES if name != "torch-fidelity"]
    for row in agreement.compare(libraries, count=60):
        assert row["difference"] <= row["tolerance"], row


def test_numbers_are_those_of_torch_fidelity_again(benchmark):
    agreement = benchmark("metric_agreement")
    if not benchmark("with_torch_fidelity").find_torch_fidelity(os.environ.get("TORCH_FIDELITY")):
        pytest.skip("no torch-fidelity: TORCH_FIDELITY names the folder it was installed to")
    for row in agreement.compare(["torch-fidelity"], count=60):
        assert row["difference"] <= row["tolerance"], row
