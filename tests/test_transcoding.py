import json
import math

import pytest
import torch

from dinotok import transcoding
from dinotok.folders import Picture, find_pictures
from dinotok.metrics import ReconstructionMetrics
from dinotok.reports import scores_text, write_report
from dinotok.shards import ModelOrigin
from dinotok.transcoding import (
    _finite,
    code_counters,
    encode_batch,
    encode_files,
    encode_files_to_tokens,
    open_shard_file,
    reconstruct_files,
)
from tests.tiny_tokenizers import save_picture, tiny_discrete_tokenizer


def row(psnr, ssim):
    return {"file": "x", "height": 9, "width": 8, "psnr": psnr, "ssim": ssim}


def test_numbers_that_json_lacks_are_null_with_a_note(tmp_path):
    rows = [row(30.0, 0.5), row(math.inf, math.nan)]
    summary = {"psnr": math.inf, "psnr_pooled": 33.0, "ssim": 0.5, "num_images": 2}
    write_report(tmp_path / "metrics.json", rows, [{"file": "y", "reason": "z"}], summary, {"model": "m"})

    def refuse(constant):
        pytest.fail(f"{constant} is not JSON")

    report = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=refuse)
    assert report["pictures"] == [rows[0], row(None, None)]
    assert report["summary"] == summary | {"psnr": None}
    assert set(report["notes"]) == {"psnr", "ssim"} and "infinite" in report["notes"]["psnr"]
    assert report["model"] == "m" and report["failures"] == [{"file": "y", "reason": "z"}]


def test_a_report_without_nulls_has_no_notes(tmp_path):
    write_report(tmp_path / "metrics.json", [row(30.0, 0.5)], [], None, {})
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert report["notes"] == {} and report["summary"] is None


def test_pictures_the_model_cannot_handle_are_reported_and_the_others_kept():
    batch = [Picture(name, (1, 1), torch.zeros(3, 1, 1)) for name in "abc"]
    results = torch.zeros(3, 3, 1, 1, dtype=torch.float16)
    results[1, 0] = math.inf
    failures = []
    kept = [p.name for p, _ in _finite(batch, results, lambda name, error: failures.append((name, str(error))))]
    assert kept == ["a", "c"]
    assert failures == [("b", "The model's output has NaN or infinite values (it runs in torch.float16).")]


def test_scores_are_said_in_words():
    assert scores_text(row(30.123, 0.5)) == "8x9, PSNR 30.12 dB, SSIM 0.500"
    assert scores_text(row(math.inf, math.nan)) == "8x9, PSNR inf dB, SSIM not defined"


@pytest.mark.parametrize("encode", [encode_files, encode_files_to_tokens])
def test_a_picture_whose_latents_are_not_finite_is_reported_and_its_batch_goes_on(tmp_path, monkeypatch, encode):
    def poisoned(model, pixels):
        latents = encode_batch(model, pixels).clone()
        latents[1] = math.nan
        return latents

    monkeypatch.setattr(transcoding, "encode_batch", poisoned)
    model, failures = tiny_discrete_tokenizer(), []
    for index in range(3):
        save_picture(tmp_path / "in" / f"{index}.png", 16, 32, seed=index)
    files = find_pictures([tmp_path / "in"], None)
    counters, metrics = code_counters(model), ReconstructionMetrics()
    arguments = (tmp_path / "out", metrics, lambda name, error: failures.append(name), 3, counters)
    assert [row["file"] for row in reconstruct_files(model, files, *arguments)] == ["0.png", "2.png"]
    assert failures == ["1.png"] and metrics.num_images == 2
    assert [int(counter.counts.sum()) for counter in counters.values()] == [4, 4]
    origin = ModelOrigin("m", "r", "d", "VQModelDINOTok", 16, {})
    (path,) = encode(model, files, tmp_path / "shards", origin, lambda name, error: failures.append(name))
    assert list(open_shard_file(path).sizes) == ["0.png", "2.png"] and failures == ["1.png"] * 2
