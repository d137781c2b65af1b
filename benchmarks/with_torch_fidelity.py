"""torch-fidelity's numbers, and how to import it where the compiled part of torchvision does not fit torch."""

import sys

import torch
from torch import nn
from torch.utils.data import Subset

_KEPT: list[torch.library.Library] = []  # its operators live as long as it does


def find_torch_fidelity(folder: str | None) -> bool:
    """Make torch-fidelity importable, from a folder of its own if one is named; say whether it is."""
    if folder is not None:
        library = torch.library.Library("torchvision", "DEF")  # what torchvision's import asks its compiled part for
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)
        sys.path.append(folder)
    try:
        import torch_fidelity  # noqa: F401
    except (ImportError, RuntimeError):
        return False
    return True


def measure(network: nn.Module, real: torch.Tensor, fake: torch.Tensor) -> dict[str, float]:
    """Return FD, KID, precision, recall and Inception score of uint8 pictures by torch-fidelity."""
    import torch_fidelity
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    class Extractor(FeatureExtractorBase):
        def __init__(self, name, features_list, **_):
            super().__init__(name, features_list)
            self.network = network

        @staticmethod
        def get_provided_features_list():
            return "features", "logits"

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "logits" if metric == "isc" else "features"

        def forward(self, images):
            outputs = self.network(images)
            return tuple(outputs[name].double() for name in self.features_list)  # sums are as exact as features

    if "random" not in FEATURE_EXTRACTORS_REGISTRY:
        torch_fidelity.register_feature_extractor("random", Extractor)
    wanted = {"isc": True, "fid": True, "kid": True, "prc": True}
    whole = {"isc_splits": 1, "kid_subsets": 2, "kid_subset_size": len(real)}
    options = {"cuda": False, "save_cpu_ram": True, "verbose": False}
    found = torch_fidelity.calculate_metrics(
        input1=Subset(fake, range(len(fake))),
        input2=Subset(real, range(len(real))),
        feature_extractor="random",
        **wanted,
        **whole,
        **options,
    )
    return {
        "FD": found["frechet_inception_distance"],
        "KID": found["kernel_inception_distance_mean"],
        "precision": found["precision"],
        "recall": found["recall"],
        "inception_score": found["inception_score_mean"],
    }
