"""Images for the recipes: files in IDX format, and archives of JPEG files."""

from __future__ import annotations

import gzip
import io
import math
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from offramp.errors import DataError, unknown_name

__all__ = ["DATA", "Batches", "Images", "open_images", "read_idx", "read_tar", "refuse_new_classes"]

# What a recipe names, and the files that hold it. They lie in --data or a folder in it.
DATA = {
    "mnist": ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte"),
    "cifar10": ("CIFAR-10-images.tar.gz",),
    "tiny-imagenet-20": ("tiny-imagenet-20.tar",),
}

_PARTS = {"train": "train", "test": "test", "val": "test"}


@dataclass(frozen=True)
class Images:
    """Labelled images in three parts without a common sample.

    Attributes:
        train: (N, C, H, W) uint8 and (N,) int64.
        calibration: likewise.
        test: likewise.
    """

    train: tuple[Tensor, Tensor]
    calibration: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    def normalise(self, images: Tensor) -> Tensor:
        """(N, C, H, W) uint8 -> float, by mean and deviation of the training images' channels."""
        mean, deviation = self._moments()
        return (images.float() / 255 - mean.view(-1, 1, 1)) / deviation.view(-1, 1, 1)

    def preprocessing(self) -> dict[str, list[float]]:
        """What :meth:`normalise` does to images of 0 to 1, for whoever serves the model."""
        mean, deviation = self._moments()
        return {"mean": mean.tolist(), "std": deviation.tolist()}

    def _moments(self) -> tuple[Tensor, Tensor]:
        seen = self.train[0][:10_000].double() / 255
        return seen.mean((0, 2, 3)).float(), seen.std((0, 2, 3)).float()


class Batches:
    """Batches of one part; walked again for every epoch.

    Args:
        images: (N, C, H, W) float.
        labels: (N,) int64.
        size: samples a batch.
        pad: shuffle, and shift every image by up to so many pixels; ``None`` leaves all as it is.
        flip: also mirror half of the images that are shuffled.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        size: int,
        pad: int | None = None,
        *,
        flip: bool = False,
    ) -> None:
        self.images, self.labels = images, labels
        self.size, self.pad, self.flip = size, pad, flip

    def __len__(self) -> int:
        # In training a last batch of few samples would disturb the statistics of normalisation.
        whole = self.pad is not None and len(self.images) >= self.size
        return len(self.images) // self.size if whole else math.ceil(len(self.images) / self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        samples = len(self.images)
        order = torch.arange(samples) if self.pad is None else torch.randperm(samples)
        moves = self.pad is not None and (self.pad or self.flip)
        for rows in order.split(self.size)[: len(self)]:
            images = self.images[rows]
            yield self._moved(images, self.pad or 0) if moves else images, self.labels[rows]

    def _moved(self, images: Tensor, pad: int) -> Tensor:
        batch, _, height, width = images.shape
        padded = functional.pad(images, (pad,) * 4, mode="replicate")
        down, right = torch.randint(2 * pad + 1, (2, batch, 1))
        rows, columns = down + torch.arange(height), right + torch.arange(width)
        if self.flip:
            columns = torch.where(torch.rand(batch, 1) < 0.5, columns.flip(1), columns)
        at = torch.arange(batch).view(-1, 1, 1)
        moved = padded.permute(0, 2, 3, 1)[at, rows.unsqueeze(2), columns.unsqueeze(1)]
        return moved.permute(0, 3, 1, 2)


def open_images(name: str, folder: Path, *, held_out: float = 0.1, seed: int = 0) -> Images:
    """The images of that name in a folder.

    Args:
        name: a key of :data:`DATA`; ``"mnist"`` reads any files of MNIST's names, so Fashion-MNIST.
        folder: where they lie, or a folder in it; IDX files may be compressed.
        held_out: share of the training images that is kept for calibration.
        seed: of the draw of these.

    Raises:
        DataError: an unknown name, files that are not there or damaged, or a class with no image
            to train on.
    """
    if name not in DATA:
        raise DataError(unknown_name("data", name, sorted(DATA)))
    paths = [_found(folder, file) for file in DATA[name]]
    parts = [_idx_pair(path) for path in paths] if len(paths) == 2 else read_tar(paths[0])
    (images, labels), test = parts
    refuse_new_classes(test[1], paths[-1], labels, paths[0])
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    kept = max(1, round(held_out * len(images)))
    first, rest = order[:kept], order[kept:]
    lost = sorted(set(labels.tolist()) - set(labels[rest].tolist()))
    if lost:
        raise DataError(
            f"{paths[0]}: all images of the classes {lost[:3]} are drawn for calibration by the "
            f"seed {seed}, {kept} of {len(images)} images, and none is left to train on. Expected "
            "some of each class; pass another seed, or add images of these classes."
        )
    return Images((images[rest], labels[rest]), (images[first], labels[first]), test)


def refuse_new_classes(found: Tensor, path: Path, known: Tensor, training: Path) -> None:
    """Refuse classes that training does not have, before it takes its time.

    Args:
        found: (N,) labels that are recorded later.
        path: the file that they belong to.
        known: (M,) labels to train on.
        training: the file that those belong to.

    Raises:
        DataError: there is a class among ``found`` alone.
    """
    new = sorted(set(found.tolist()) - set(known.tolist()))
    if new:
        raise DataError(
            f"{path} has the classes {new[:3]}, which no sample of {training} has. Expected the "
            f"classes of that, {len(known.unique())} of them; leave out the others, or add samples "
            "to train on."
        )


def read_idx(path: Path) -> Tensor:
    """One file in IDX format of unsigned bytes, plain or compressed, as a uint8 tensor.

    Raises:
        DataError: the file is not in this format, or is cut off.
    """
    raw = path.read_bytes()
    try:
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be decompressed: {error}. Fetch it again.") from error
    begin = 4 + 4 * raw[3] if len(raw) > 3 else 4
    if len(raw) < begin or raw[:3] != b"\x00\x00\x08":
        raise DataError(f"{path} is not an IDX file of unsigned bytes (it begins {raw[:4]!r}).")
    shape = np.frombuffer(raw, ">u4", raw[3], 4).tolist()
    if len(raw) - begin != math.prod(shape):
        raise DataError(
            f"{path} announces {shape} and holds {len(raw) - begin} bytes, not {math.prod(shape)}. "
            "It is cut off or damaged; fetch it again."
        )
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=begin).copy()).reshape(shape)


def read_tar(path: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training and test images of an archive of JPEG files ``train/CLASS/NAME.jpg``.

    Test images are those under ``test`` or ``val``. Classes are numbered in the order of their
    names.

    Raises:
        DataError: the archive cannot be read or is cut off, lacks a part, or its images differ in
            size.
    """
    from PIL import Image

    found: dict[str, list[tuple[str, Tensor]]] = {"train": [], "test": []}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                place = PurePosixPath(member.name)
                if place.suffix.lower() not in (".jpg", ".jpeg") or len(place.parts) < 3:
                    continue
                part, content = _PARTS.get(place.parts[-3]), archive.extractfile(member)
                if part is None or content is None:
                    continue
                pixels = np.array(Image.open(io.BytesIO(content.read())).convert("RGB"))
                found[part].append((place.parts[-2], torch.from_numpy(pixels)))
            _refuse_cut(archive)
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise DataError(f"{path} cannot be read as an archive of images: {error}") from error
    empty = [part for part, rows in found.items() if not rows]
    sizes = {tuple(pixels.shape) for rows in found.values() for _, pixels in rows}
    if empty or len(sizes) != 1:
        raise DataError(
            f"{path}: expected images of one size under train/CLASS/ and test/CLASS/ (or val/), "
            f"got none for {empty} and sizes {sorted(sizes)[:3]}."
        )
    names = sorted({label for label, _ in found["train"]})
    return _stacked(found["train"], names), _stacked(found["test"], names)


def _refuse_cut(archive: tarfile.TarFile) -> None:
    """Refuse an archive that has been walked and did not end with its mark, a block of zeros.

    At a damaged header that is not the first, tarfile ends as if there were no more.
    """
    file = archive.fileobj
    if file is None:
        return
    file.seek(archive.offset)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(
            f"at byte {archive.offset} there is neither a file nor the end of the archive. It is "
            "cut off or damaged; fetch it again."
        )


def _stacked(rows: list[tuple[str, Tensor]], names: list[str]) -> tuple[Tensor, Tensor]:
    unknown = sorted({label for label, _ in rows} - set(names))
    if unknown:
        raise DataError(f"The test images have classes that no training image has: {unknown[:3]}.")
    numbers = {name: k for k, name in enumerate(names)}
    images = torch.stack([pixels for _, pixels in rows]).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor([numbers[label] for label, _ in rows])


def _idx_pair(path: Path) -> tuple[Tensor, Tensor]:
    images = read_idx(path)
    name = path.name.removesuffix(".gz").replace("images-idx3", "labels-idx1")
    labels = read_idx(_found(path.parent, name))
    if images.dim() != 3 or labels.shape != images.shape[:1]:
        raise DataError(
            f"{path}: expected images (N, H, W) and labels (N,), got {tuple(images.shape)} and "
            f"{tuple(labels.shape)}."
        )
    return images.unsqueeze(1), labels.long()


def _found(folder: Path, file: str) -> Path:
    for name in (file, f"{file}.gz"):
        if (folder / name).is_file():
            return folder / name
        for path in sorted(folder.glob(f"*/{name}")):
            return path
    raise DataError(
        f"There is no {file!r} (or {file + '.gz'!r}) in {folder} or a folder in it. Pass the "
        "folder that holds it as --data."
    )
