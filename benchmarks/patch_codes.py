"""Pictures quantized without an encoder: the plain control of a tokenizer."""

from collections.abc import Iterator

import torch
from photographs import load_photographs, to_pixels
from torch.nn.functional import interpolate, pixel_shuffle, pixel_unshuffle

from dinotok.models.nearest import nearest_codes
from dinotok.statistics import StreamingMoments, kmeans

BATCH, PATCH, PATCH_CHANNELS = 32, 16, 96


class PatchCodes:
    """Patches of pixels by their principal components, and by k-means of these and of what each codebook leaves.

    Args:
        sizes: Of the codebooks; none for the components alone.
        grid: Rows and columns of patches.
    """

    def __init__(self, sizes: list[int], grid: list[int]):
        self.grid = grid
        side = tuple(PATCH * length for length in grid)
        self.sets = {}
        for name in ("train", "val"):
            pictures, labels = load_photographs(name)
            pictures = interpolate(pictures, size=side, mode="bicubic", antialias=True)
            if name == "train":
                pictures, labels = torch.cat([pictures, pictures.flip(3)]), labels.repeat(2)
            self.sets[name] = (pictures, labels)
        moments = StreamingMoments(3 * PATCH**2)
        for part in self.sets["train"][0].split(500):
            moments.update(self._patches(part))
        pca = moments.pca()
        self.mean, self.basis = pca.mean.float(), pca.components[:, :PATCH_CHANNELS].float()
        generator, self.code_vectors = torch.Generator().manual_seed(0), {}
        if not sizes:
            return
        rows = torch.cat([self._project(self._patches(part)) for part in self.sets["train"][0].split(500)])
        for book, size in enumerate(sizes):
            codes = kmeans(rows, size, nearest_codes, generator, num_iterations=8)
            self.code_vectors[str(book)] = codes
            rows = rows - codes[nearest_codes(rows, codes)]
        self.indices = {name: self._encode(pictures) for name, (pictures, _) in self.sets.items()}

    def train(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        generator = torch.Generator().manual_seed(0)
        labels = self.sets["train"][1]
        while True:
            for rows in torch.randperm(len(labels), generator=generator).split(BATCH):
                if len(rows) == BATCH:
                    yield self.indices["train"][rows], labels[rows]

    def val(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        yield from zip(self.indices["val"].split(BATCH), self.sets["val"][1].split(BATCH), strict=True)

    def decode(self, indices: torch.Tensor) -> torch.Tensor:
        return self.pixels(sum(table[indices[:, book]] for book, table in enumerate(self.code_vectors.values())))

    def latents(self, pictures: torch.Tensor) -> torch.Tensor:
        """Components `(B, C, h, w)` of uint8 pictures."""
        return self._project(self._patches(pictures)).unflatten(0, (len(pictures), *self.grid)).movedim(-1, 1)

    def pixels(self, components: torch.Tensor) -> torch.Tensor:
        """Pixels in [-1, 1] of components `(B, h, w, C)`."""
        patches = components @ self.basis.T + self.mean
        return pixel_shuffle(patches.permute(0, 3, 1, 2), PATCH).clamp(-1, 1)

    def _patches(self, pictures: torch.Tensor) -> torch.Tensor:
        return pixel_unshuffle(to_pixels(pictures), PATCH).permute(0, 2, 3, 1).flatten(0, 2)

    def _project(self, patches: torch.Tensor) -> torch.Tensor:
        return (patches - self.mean) @ self.basis

    def _encode(self, pictures: torch.Tensor) -> torch.Tensor:
        found = []
        for part in pictures.split(500):
            rest, indices = self._project(self._patches(part)), []
            for codes in self.code_vectors.values():
                indices.append(nearest_codes(rest, codes))
                rest = rest - codes[indices[-1]]
            found.append(torch.stack(indices, 1).unflatten(0, (len(part), *self.grid)).movedim(-1, 1))
        return torch.cat(found)
