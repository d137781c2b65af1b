"""Our numbers beside those of torchmetrics, torch-fidelity, scikit-image and scipy, on the same pictures.

    python benchmarks/metric_agreement.py [--torch-fidelity FOLDER]

400 crops of 64 x 64 pixels of the package's photographs: half of them the references, half, blurred and noisy, the
samples. The features are those of a small random convolutional network, called on 8-bit pictures by each library in
its own way: agreement is a matter of arithmetic, not of the network. KID of whole sets and the Inception score of one
part leave no room for different random subsets.

torch-fidelity imports torchvision, which in turn breaks where its compiled part does not fit torch. `--torch-fidelity`
names a folder that `pip install --no-deps --target FOLDER torch-fidelity torchvision` filled; the two operators that
torchvision's import asks for are then declared first. Without torch-fidelity its rows are left out.
"""

import argparse
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
import with_torch_fidelity
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import nn
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore

import dinotok
from dinotok.data import to_pixels
from dinotok.evaluation.distances import inception_score, kernel_distance, precision_recall
from dinotok.evaluation.extractors import from_module
from dinotok.evaluation.feature_statistics import Gaussian, frechet_distance
from dinotok.metrics import SSIM_WINDOW, mean_squared_error, pooled_psnr, psnr, ssim
from dinotok.statistics import StreamingMoments

RESULTS = Path(__file__).parent / "results" / "metric_agreement.json"
PHOTOGRAPHS = Path(dinotok.__file__).parent / "assets" / "photographs"
SIDE, COUNT = 64, 200
# How far apart numbers may be, relative to theirs; SSIM is convolved in float32.
TOLERANCES = {"ssim": 1e-4}
TOLERANCE = 1e-6


class RandomFeatures(nn.Module):
    """Features and logits of a small random network, for uint8 pictures."""

    num_features = 48

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.second = nn.Conv2d(3, 32, 5, 2), nn.Conv2d(32, self.num_features, 5, 2)
            self.classifier = nn.Linear(self.num_features, 10, bias=False)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.second(self.first(images.float() / 127.5 - 1).relu()).relu()
        features = 30 * hidden.mean((2, 3))
        return {"features": features, "logits": self.classifier(features)}


class One(nn.Module):
    """One of the outputs, as torchmetrics wants it."""

    num_features = RandomFeatures.num_features

    def __init__(self, output: str) -> None:
        super().__init__()
        self.network, self.output = RandomFeatures(), output

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(images)[self.output]


def make_pictures(count: int = COUNT) -> tuple[torch.Tensor, torch.Tensor]:
    """References and samples, uint8 `(N, 3, 64, 64)`."""
    generator = torch.Generator().manual_seed(0)
    photographs = [np.asarray(Image.open(path).convert("RGB")) for path in sorted(PHOTOGRAPHS.glob("*.jpg"))]
    crops = []
    for number in range(2 * count):
        photograph = photographs[number % len(photographs)]
        top, left = (int(torch.randint(side - SIDE + 1, (), generator=generator)) for side in photograph.shape[:2])
        crops.append(torch.from_numpy(photograph[top : top + SIDE, left : left + SIDE].copy()).permute(2, 0, 1))
    pictures = torch.stack(crops)
    return pictures[:count], distort(pictures[count:], generator)


def distort(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    blurred = F.avg_pool2d(pictures.float(), 5, 1, 2, count_include_pad=False)
    noise = 20 * torch.randn(pictures.shape, generator=generator)
    return (0.8 * blurred + noise).clamp(0, 255).round().to(torch.uint8)


def measure_ours(real: torch.Tensor, fake: torch.Tensor) -> dict[str, float]:
    pixels, target = to_pixels(distort(real, torch.Generator().manual_seed(1))), to_pixels(real)
    extractor = from_module(RandomFeatures())
    sets = [extractor(images) for images in (real, fake)]
    shards = [
        StreamingMoments(RandomFeatures.num_features).update(p) for p in sets[0]["features"].tensor_split([7, 50])
    ]
    merged = Gaussian.from_moments(shards[2].merge(shards[0]).merge(shards[1]))
    precision, recall = precision_recall(sets[0]["features"], sets[1]["features"])
    return {
        "psnr": psnr(pixels, target).mean().item(),
        "psnr_pooled": pooled_psnr(mean_squared_error(pixels, target)),
        "ssim": ssim(pixels, target).mean().item(),
        "FD": frechet_distance(merged, Gaussian.fit(sets[1]["features"].split(31))),
        "KID": kernel_distance(sets[0]["features"], sets[1]["features"])[0],
        "precision": precision,
        "recall": recall,
        "inception_score": inception_score(sets[1]["logits"], splits=1)[0],
    }


def measure_torchmetrics(real: torch.Tensor, fake: torch.Tensor) -> dict[str, float]:
    pixels, target = distort(real, torch.Generator().manual_seed(1)) / 255, real / 255
    metrics = {
        "psnr": PeakSignalNoiseRatio(data_range=1.0, dim=(1, 2, 3), reduction="elementwise_mean"),
        "psnr_pooled": PeakSignalNoiseRatio(data_range=1.0),
        "ssim": StructuralSimilarityIndexMeasure(data_range=1.0),
    }
    found = {name: metric(pixels, target).item() for name, metric in metrics.items()}
    distance, score = FrechetInceptionDistance(One("features")), InceptionScore(One("logits"), splits=1)
    for images, is_real in ((real, True), (fake, False)):
        distance.update(images, real=is_real)
    score.update(fake)
    return found | {"FD": distance.compute().item(), "inception_score": score.compute()[0].item()}


def measure_skimage(real: torch.Tensor, fake: torch.Tensor) -> dict[str, float]:
    """Windows across the border are left out by scikit-image; after reflection it has the same ones as we."""
    pixels = distort(real, torch.Generator().manual_seed(1))
    margin = SSIM_WINDOW // 2
    pairs = [[image.permute(1, 2, 0).numpy() for image in pair] for pair in zip(pixels, real, strict=True)]
    widths = ((margin, margin), (margin, margin), (0, 0))
    similarities = [
        structural_similarity(
            *(np.pad(image, widths, "reflect") for image in pair),
            data_range=255,
            channel_axis=2,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for pair in pairs
    ]
    decibels = [peak_signal_noise_ratio(target, image, data_range=255) for image, target in pairs]
    return {"psnr": float(np.mean(decibels)), "ssim": float(np.mean(similarities))}


def measure_scipy(real: torch.Tensor, fake: torch.Tensor) -> dict[str, float]:
    network = RandomFeatures()
    one, other = (network(images)["features"].double().numpy() for images in (real, fake))
    covariances = [np.cov(rows, rowvar=False) for rows in (one, other)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    difference = one.mean(0) - other.mean(0)
    return {"FD": float(difference @ difference + np.trace(covariances[0] + covariances[1] - 2 * root))}


def measure_torch_fidelity(real: torch.Tensor, fake: torch.Tensor) -> dict[str, float]:
    return with_torch_fidelity.measure(RandomFeatures(), real, fake)


LIBRARIES: dict[str, Callable[[torch.Tensor, torch.Tensor], dict[str, float]]] = {
    "torchmetrics": measure_torchmetrics,
    "torch-fidelity": measure_torch_fidelity,
    "scikit-image": measure_skimage,
    "scipy": measure_scipy,
}


def compare(libraries: list[str], count: int = COUNT) -> list[dict]:
    """One row for every number that a library has too."""
    pictures = make_pictures(count)
    ours, rows = measure_ours(*pictures), []
    for library in libraries:
        for metric, theirs in LIBRARIES[library](*pictures).items():
            difference = abs(ours[metric] - theirs) / abs(theirs)
            rows.append(
                {
                    "metric": metric,
                    "library": f"{library} {version(library)}",
                    "ours": ours[metric],
                    "theirs": theirs,
                    "difference": difference,
                    "tolerance": TOLERANCES.get(metric, TOLERANCE),
                }
            )
    return rows


def table(rows: list[dict]) -> list[str]:
    lines = ["| number | library | ours | theirs | relative difference | tolerance |", "|---|---|---|---|---|---|"]
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    for row in sorted(rows, key=lambda row: metrics.index(row["metric"])):
        values = f"{row['ours']:.8g} | {row['theirs']:.8g} | {row['difference']:.1g} | {row['tolerance']:g}"
        lines.append(f"| {row['metric']} | {row['library']} | {values} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-fidelity", help="folder that it and torchvision were installed to")
    arguments = parser.parse_args()
    libraries = list(LIBRARIES)
    if not with_torch_fidelity.find_torch_fidelity(arguments.torch_fidelity):
        libraries.remove("torch-fidelity")
    rows = compare(libraries)
    print("\n".join(table(rows)))
    worse = [row for row in rows if not row["difference"] <= row["tolerance"]]
    if worse:
        raise SystemExit(f"Beyond the tolerance: {worse}")
    RESULTS.write_text(json.dumps({"pictures": [2 * COUNT, SIDE], "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
