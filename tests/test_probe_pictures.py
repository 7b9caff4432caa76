import dataclasses
import json

import pytest
import torch
from PIL import Image
from torch import nn

import dysurgery
from dysurgery import DysurgeryError, UsageError
from dysurgery.probe_pictures import check_folder, images_figure, save_pictures

NAMES = ["probe.json", "attention.png", "entropy.png", "interventions.png", "images.png"]


def network(*kernels, size=3):
    layers = [dysurgery.DynamicConv2d(size if n == 0 else 4, 4, 3, padding=1, k=k) for n, k in enumerate(kernels)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


@pytest.fixture
def report():
    torch.manual_seed(0)
    return dysurgery.probe(network(4, 2), torch.randn(9, 3, 8, 8))


def test_pictures_and_figures_are_written_and_written_again(report, tmp_path):
    folder = tmp_path / "new" / "probe"
    assert [path.name for path in save_pictures(report, folder)] == NAMES
    assert json.loads((folder / "probe.json").read_text()) == json.loads(json.dumps(report.to_json()))
    for name in NAMES[1:]:
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 100
    before = (folder / "images.png").read_bytes()
    save_pictures(report, folder, "0" if report.layer().path == "1" else "1")
    assert (folder / "images.png").read_bytes() != before
    assert sorted(path.name for path in folder.iterdir()) == sorted(NAMES)


def test_without_pictures_of_images_the_others_are_written(tmp_path, report):
    save_pictures(report, tmp_path)
    blind = dysurgery.probe(network(3), torch.randn(9, 3, 8, 8), layer_images=0)
    assert [path.name for path in save_pictures(blind, tmp_path)] == NAMES[:-1]
    assert not (tmp_path / "images.png").exists()  # the earlier probe's
    with pytest.raises(DysurgeryError, match="no pictures to show"):
        images_figure(blind)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_images_of_any_number_of_channels_are_shown(channels):
    report = dysurgery.probe(network(4, size=channels), torch.randn(20, channels, 8, 8))
    figure = images_figure(report)
    assert len(figure.axes) == 4 * 12


def test_more_layers_can_be_drawn_than_an_axis_has_room_for(report, tmp_path):
    layer = report.layers[0]
    layers = tuple(dataclasses.replace(layer, path=f"block{n}.conv") for n in range(70))
    effects = [effect for effect in report.effects if effect.scope == "all"]
    effects += [
        dataclasses.replace(effect, scope="layer", name=layer.path) for effect in effects[:4] for layer in layers
    ]
    deep = dataclasses.replace(report, layers=layers, effects=tuple(effects), thumbnails=None)
    assert len(save_pictures(deep, tmp_path)) == 4


def test_a_folder_that_cannot_be_written_is_said_at_once(report, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(DysurgeryError, match="it exists and is no folder"):
        check_folder(file / "below")
    (tmp_path / "entropy.png").write_text("mine")
    with pytest.raises(DysurgeryError, match=r"holds entropy.png, which is of no probe"):
        save_pictures(report, tmp_path)
    assert (tmp_path / "entropy.png").read_text() == "mine"
    with pytest.raises(UsageError, match="no dynamic layer 'x'"):
        save_pictures(report, tmp_path / "other", "x")
    assert not (tmp_path / "other").exists()


def test_no_permission_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(DysurgeryError, match="no permission to write in"):
        check_folder(tmp_path / "new")
