import json
import math

import pytest
import torch

from dinotok.folders import Picture
from dinotok.transcoding import _finite, scores_text, write_report


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
