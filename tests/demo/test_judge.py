"""The demo's judge: what it recognises, its Frechet distances, and what it is trained on."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from smoothcache_fx.demo.data import load_fashion
from smoothcache_fx.demo.judge import JUDGE, Judge, frechet_distance, load_judge, statistics_of
from smoothcache_fx.demo.sampler import initial_noise
from smoothcache_fx.demo.train_judge import each_class, shifted, train_judge

#: 200 held-out images of Fashion-MNIST (MIT licence), 20 of each class.
IMAGES = Path(__file__).parents[1] / "helpers" / "fashion.npz"


@pytest.fixture(scope="module")
def judge() -> Judge:
    return load_judge()


@pytest.fixture(scope="module")
def real() -> tuple[Tensor, Tensor]:
    kept = np.load(IMAGES)
    return torch.from_numpy(kept["images"]).float().unsqueeze(1) / 127.5 - 1, torch.from_numpy(kept["labels"]).long()


def test_real_images_are_recognised(judge, real):
    images, labels = real
    assert judge.held_out_accuracy > 0.9
    assert judge.accuracy(images, labels) == pytest.approx(judge.held_out_accuracy, abs=0.05)
    assert judge.accuracy(images * 3, labels) == pytest.approx(judge.held_out_accuracy, abs=0.2), "clamped as pictures"
    assert judge.accuracy(initial_noise(200, (1, 28, 28), seed=0), labels) < 0.3
    assert JUDGE.stat().st_size < 1_000_000


def test_the_distance_grows_with_what_is_wrong(judge, real):
    images, _ = real
    floor = judge.real_frechet_distance(200)
    assert 0 < judge.real_frechet_distance(1000) < floor
    own = judge.frechet_distance(images)
    assert own < 1.5 * floor
    blurred = [judge.frechet_distance(images + noise * torch.randn_like(images)) for noise in (0.1, 0.3, 0.6)]
    assert own < blurred[0] < blurred[1] < blurred[2]
    collapsed = images[::10].repeat(10, 1, 1, 1)
    assert judge.frechet_distance(collapsed) > 1.5 * own
    assert judge.frechet_distance(initial_noise(200, (1, 28, 28), seed=0)) > 10 * floor


def test_the_distance_of_gaussians_is_their_closed_form():
    """Independent features of known means and deviations: the sum of both differences, squared."""
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(64, 64)))[0] * 8
    centred = np.concatenate((basis, -basis))
    a, b = statistics_of(centred * 3 + 1), statistics_of(centred - 2)
    expected = 64 * 3**2 + ((2 * centred.std(axis=0, ddof=1)) ** 2).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(40, 28, 28), r"\[n, 1, 28, 28\].*got \[40, 28, 28\]"),
        (torch.full((80, 1, 28, 28), float("nan")), "NaN or infinity"),
        (torch.zeros(64, 1, 28, 28), "more images than the 64 features, got 64"),
    ],
)
def test_what_cannot_be_judged_is_refused(judge, images, message):
    with pytest.raises(ValueError, match=message):
        judge.frechet_distance(images)


def test_labels_that_are_not_one_an_image_are_refused(judge):
    with pytest.raises(ValueError, match=r"got \[3\] for 2 images"):
        judge.accuracy(torch.zeros(2, 1, 28, 28), torch.zeros(3, dtype=torch.long))


def test_a_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"no judge at '.*none'.*demo.train_judge"):
        load_judge("none")


def write_dataset(folder: Path, images: Tensor, labels: Tensor) -> None:
    """As the dataset is distributed: the first half to train on."""
    pixels = ((images[:, 0] + 1) * 127.5).round().to(torch.uint8).numpy()
    half = len(images) // 2
    for split, part in (("train", slice(half)), ("t10k", slice(half, None))):
        for kind, values in (("images-idx3", pixels[part]), ("labels-idx1", labels[part].numpy().astype(np.uint8))):
            header = struct.pack(f">{1 + values.ndim}I", 0x800 + values.ndim, *values.shape)
            with gzip.open(folder / f"{split}-{kind}-ubyte.gz", "wb") as file:
                file.write(header + values.tobytes())


def test_a_judge_is_trained_on_the_files_of_the_dataset(tmp_path, real):
    images, labels = real
    mixed = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    write_dataset(tmp_path, images[mixed], labels[mixed])
    data = load_fashion(tmp_path)
    assert data.images.equal(images[mixed][:100]) and data.held_out_labels.equal(labels[mixed][100:])
    train_judge(data, 12, 0, tmp_path / "judge.safetensors")
    trained = load_judge(tmp_path / "judge.safetensors")
    assert trained.held_out_accuracy == trained.accuracy(data.held_out_images, data.held_out_labels) > 0.4
    assert trained.real_frechet_distance(90) < trained.frechet_distance(-images)


def test_files_that_are_missing_or_of_another_format_are_told(tmp_path, real):
    with pytest.raises(FileNotFoundError, match=r"train-images-idx3-ubyte.gz.*dataset-fashion-mnist"):
        load_fashion(tmp_path)
    write_dataset(tmp_path, *real)
    for wrong in (b"", struct.pack(">4I", 0x803, 100, 28, 28), struct.pack(">2I", 0x801, 0)):
        with gzip.open(tmp_path / "train-images-idx3-ubyte.gz", "wb") as file:
            file.write(wrong)
        with pytest.raises(ValueError, match=r"no IDX file of bytes in 3 dimensions"):
            load_fashion(tmp_path)
    write_dataset(tmp_path, *real)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes((tmp_path / "t10k-labels-idx1-ubyte.gz").read_bytes())
    load_fashion(tmp_path)
    with gzip.open(tmp_path / "train-labels-idx1-ubyte.gz", "wb") as file:
        file.write(struct.pack(">2I", 0x801, 1) + b"1")
    with pytest.raises(ValueError, match="100 images and 1 labels of the split train"):
        load_fashion(tmp_path)


def test_images_are_shifted_by_up_to_two_pixels():
    images = torch.full((500, 1, 28, 28), -1.0)
    images[:, 0, 10, 20] = 1.0
    moved = shifted(images, torch.Generator().manual_seed(0))
    (_, _, rows, columns) = moved.eq(1).nonzero().T
    assert len(rows) == 500 and {*rows.tolist()} == {*range(8, 13)} and {*columns.tolist()} == {*range(18, 23)}
    assert moved.count_nonzero() == moved.numel() and moved.ne(1).sum() == moved.eq(-1).sum()


def test_the_first_of_each_class_in_turn():
    labels = torch.tensor([1, 0, 1, 1, 0, 2, 2, 2])
    assert each_class(labels, 1).tolist() == [1, 0, 5]
    assert each_class(labels, 9).tolist() == [1, 0, 5, 4, 2, 6], "as many of each as of the rarest"


def test_the_floor_is_of_as_many_images_of_each_class(judge, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "smoothcache_fx.demo.judge.statistics_of", lambda values: drawn.append(values) or statistics_of(values)
    )
    judge.real_frechet_distance(200, draws=2)
    logits = [judge.network.head(torch.from_numpy(values * judge._scale).float()) for values in drawn]
    for values, logit in zip(drawn, logits, strict=True):
        assert len(values) == 200
        assert float((logit.argmax(1) == torch.arange(200) % 10).float().mean()) > 0.85
    assert not np.array_equal(*drawn)
