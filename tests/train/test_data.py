import io
import os
import struct
import tarfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import write_images, write_pets

from dysurgery import DysurgeryError, UsageError
from dysurgery.train.data import Batches, Drawn, open_data, open_images, train_loader, train_transform, val_loader
from dysurgery.train.recipe import Augment, Distill, Recipe

PREPROCESSING = {
    "input_size": [3, 16, 16], "mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear", "crop_pct": 1.0,
    "crop_mode": "center",
}  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path):
    return write_pets(tmp_path / "pets")


def test_a_folder_of_classes(folder):
    data = open_data(str(folder), Recipe("x"))
    assert data.classes == ("cat", "dog")
    assert (len(data.train), len(data.val)) == (12, 8)
    image, target = data.train[11]
    assert image.size == (20, 20)
    assert target == 1


def test_images_to_look_at_need_no_training_part_and_no_classes(folder, tmp_path):
    for name in (folder, folder / "val"):
        data = open_images(str(name), Recipe("x"))
        assert (len(data.val), data.classes, data.labelled) == (8, ("cat", "dog"), True)
    write_images(tmp_path / "only" / "val" / "cat", 3)
    assert len(open_images(str(tmp_path / "only"), Recipe("x")).val) == 3
    write_images(tmp_path / "flat", 3)
    flat = open_images(str(tmp_path / "flat"), Recipe("x"))
    assert (len(flat.val), flat.classes, flat.labelled) == (3, (), False)
    assert open_images("digits", Recipe("x", val_part="odd")).val[0][0].size == (8, 8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DysurgeryError, match="no images"):
        open_images(str(tmp_path / "empty"), Recipe("x"))
    (tmp_path / "half" / "train").mkdir(parents=True)
    with pytest.raises(DysurgeryError, match="no folder val/"):
        open_images(str(tmp_path / "half"), Recipe("x"))


def test_halves_of_the_validation_images_and_part_of_the_training_images(folder):
    even, odd = (open_data(str(folder), Recipe("x", val_part=part, train_images=4)) for part in ("even", "odd"))
    assert not set(even.val.indices) & set(odd.val.indices)
    assert sorted([*even.val.indices, *odd.val.indices]) == list(range(8))
    assert [target for _, target in (even.train[i] for i in range(4))] == [0, 0, 1, 1]
    with pytest.raises(UsageError, match="12"):
        open_data(str(folder), Recipe("x", train_images=13))


def test_digits_are_always_the_same_split():
    data = open_data("digits", Recipe("x"))
    assert (len(data.train), len(data.val), len(data.classes)) == (1197, 600, 10)
    image, _ = data.train[0]
    assert (image.mode, image.size) == ("L", (8, 8))


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda f: (f / "train" / "empty").mkdir(), "train/empty has no image"),
        (lambda f: write_images(f / "val" / "bird", 1), "bird only in val"),
        (lambda f: write_images(f / "train" / "bird", 1), "bird only in train"),
        (lambda f: os.rename(f / "val", f / "tests"), "no folder val/.*found tests, train"),
        (lambda f: [os.remove(p) for p in f.glob("val/*/*")], "has no image"),
    ],
)
def test_a_broken_folder_is_named(folder, break_it, words):
    break_it(folder)
    with pytest.raises(DysurgeryError, match=words):
        open_data(str(folder), Recipe("x"))


def test_images_without_classes_are_refused_unless_no_labels_are_wanted(folder):
    write_images(folder / "flat" / "train", 3)
    os.rename(folder / "val", folder / "flat" / "val")
    with pytest.raises(DysurgeryError, match="no class folders"):
        open_data(str(folder / "flat"), Recipe("x"))
    assert len(open_data(str(folder / "flat"), Recipe("x", distill=Distill(labels=False))).train) == 3


def test_a_data_set_of_torchvision_by_its_name(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 6), ("t10k", 4)):
        pixels, classes = np.arange(count * 784, dtype=np.uint32) % 251, np.arange(count, dtype=np.uint8) % 10
        images = struct.pack(">iiii", 0x803, count, 28, 28) + pixels.astype(np.uint8).tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(images)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">ii", 0x801, count) + classes.tobytes())
    data = open_data("torch/mnist", Recipe("x", data_dir=str(tmp_path), val_part="even"))
    assert (len(data.train), len(data.val)) == (6, 2)
    assert data.classes[3] == "3 - three"
    image, target = data.train[5]
    assert (image.size, target) == ((28, 28), 5)


@pytest.fixture
def shards(folder):
    """The images of ``folder`` as WebDataset shards of five images."""
    for part in ("train", "val"):
        paths = sorted((folder / part).glob("*/*.png"))
        for number in range(0, len(paths), 5):
            with tarfile.open(folder / f"{part}-{number // 5}.tar", "w") as tar:
                for index, path in enumerate(paths[number : number + 5], number):
                    tar.add(path, f"deep/{index}.png")
                    label = str(int(path.parent.name == "dog")).encode()
                    entry = tarfile.TarInfo(f"deep/{index}.cls")
                    entry.size = len(label)
                    tar.addfile(entry, io.BytesIO(label))
    return folder


def of_shards(folder, train="train-{0..2}.tar"):
    recipe = Recipe("x", data_dir=str(folder), train_split=train, val_split="val-{0..1}.tar")
    return open_data("wds/pets", recipe)


def test_webdataset_shards_are_read_by_number(shards):
    data, plain = of_shards(shards), open_data(str(shards), Recipe("x"))
    for found, expected in ((data.train, plain.train), (data.val, plain.val)):
        assert len(found) == len(expected)
        for index in range(len(found)):
            assert found[index][1] == expected[index][1]
            assert np.array_equal(np.asarray(found[index][0]), np.asarray(expected[index][0]))


def test_a_broken_shard_is_named(shards):
    with pytest.raises(DysurgeryError, match=r"train-3\.tar cannot be read: No such file"):
        of_shards(shards, "train-{0..3}.tar")
    with pytest.raises(UsageError, match="on the network"):
        open_data("wds/x", Recipe("x", data_dir="http://localhost/x", train_split="a.tar", val_split="a.tar"))
    (shards / "train-1.tar").write_bytes(b"half a tar")
    with pytest.raises(DysurgeryError, match=r"train-1\.tar cannot be read"):
        of_shards(shards)
    with tarfile.open(shards / "train-1.tar", "w") as tar:
        tar.add(shards / "train" / "cat" / "0.png", "0.png")
    with pytest.raises(DysurgeryError, match="0 has no class"):
        of_shards(shards)


@pytest.mark.parametrize("name", ["nowhere", "digit", "torch/nothing", "hfds/no/such/thing", "wds/nothing"])
def test_unknown_data_is_one_sentence(name, offline):
    with pytest.raises(DysurgeryError) as caught:
        open_data(name, Recipe("x", data_dir="/nonexistent"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named_and_not_skipped(folder, workers):
    (folder / "train" / "cat" / "3.png").write_bytes(b"no image at all")
    data = open_data(str(folder), Recipe("x"))
    batches = Batches(12, 4, 1, 0, 0, 1)
    with pytest.raises(DysurgeryError, match=r"train/cat/3\.png cannot be read"):
        list(train_loader(data, PREPROCESSING, Augment(), batches, workers, CPU))


sizes = st.tuples(st.integers(1, 60), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))


@given(sizes, st.integers(0, 5), st.integers(0, 3))
def test_batches_cover_the_images_once_for_any_number_of_processes_and_parts(case, seed, epoch):
    extra, share, world, accumulate = case
    batch = share * world * accumulate
    size = batch + extra

    def of(rank, start=0, world=world, accumulate=accumulate):
        batches = Batches(size, batch, accumulate, seed, rank, world)
        batches.epoch, batches.start = epoch, start
        found = list(batches)
        assert len(found) == len(batches)
        return found

    alone = of(0, world=1, accumulate=1)
    seen = [index for part in alone for _, index in part]
    assert len(set(seen)) == len(seen) == size // batch * batch
    shares = [of(rank) for rank in range(world)]
    for step, whole in enumerate(alone):
        together = [
            key for rank in shares for part in rank[step * accumulate : (step + 1) * accumulate] for key in part
        ]
        assert sorted(together) == sorted(whole)
    if len(alone) > 1:  # a run that goes on sees what is left
        assert of(0, start=1) == of(0)[accumulate:]


def test_batches_that_cannot_be_shared_are_refused():
    with pytest.raises(UsageError, match="multiple of 6"):
        Batches(100, 16, 2, 0, 0, 3)
    with pytest.raises(DysurgeryError, match="at most 10"):
        Batches(10, 16, 1, 0, 0, 1)


@pytest.mark.parametrize("crop", ["rrc", "rkrc", "rkrr", "pad", "none"])
def test_augmentation_depends_on_seed_epoch_and_image_alone(folder, crop):
    data = open_data(str(folder), Recipe("x"))
    augment = Augment(crop=crop, color_jitter=0.4, auto_augment="rand-m9-mstd0.5", vflip=0.5)
    drawn = Drawn(data.train, train_transform(PREPROCESSING, augment), 3, 7)
    first, _ = drawn[(2, 5)]
    drawn[(2, 6)]
    torch.rand(3)
    again, _ = drawn[(2, 5)]
    assert first.shape == (3, 16, 16)
    assert np.array_equal(np.asarray(first), np.asarray(again))
    assert any(not np.array_equal(np.asarray(first), np.asarray(drawn[(epoch, 5)][0])) for epoch in range(3, 9))


def test_workers_change_nothing(folder):
    data = open_data(str(folder), Recipe("x"))

    def load(workers):
        batches = Batches(12, 4, 1, 3, 0, 1)
        batches.epoch = 1
        return list(train_loader(data, PREPROCESSING, Augment(), batches, workers, CPU))

    for (left, a), (right, b) in zip(load(0), load(2), strict=True):
        assert torch.equal(left, right)
        assert torch.equal(a, b)
        assert left.dtype == torch.float32


def test_validation_is_sharded_among_processes(folder):
    data = open_data(str(folder), Recipe("x", val_part="even", train_images=2))
    counts = [len(torch.cat([y for _, y in val_loader(data.val, PREPROCESSING, 2, 0, CPU, r, 3)])) for r in range(3)]
    assert counts == [2, 2, 2]  # 4 images, padded; the evaluator leaves the padding out


def test_images_are_brought_to_the_channels_of_the_model(folder):
    data = open_data(str(folder), Recipe("x"))
    grey = {**PREPROCESSING, "input_size": [1, 16, 16], "mean": [0.5], "std": [0.5]}
    (images, _), *_ = val_loader(data.val, grey, 2, 0, CPU)
    assert images.shape == (2, 1, 16, 16)
    with pytest.raises(UsageError, match="takes 5"):
        val_loader(data.val, {**grey, "input_size": [5, 16, 16]}, 2, 0, CPU)
