import base64
import html.parser
import json
import re
import shutil
import subprocess

import pytest
import torch
from click.testing import CliRunner
from dysurgery.cli import main

import dysurgery
from dysurgery.models import build
from dysurgery.report import gather
from dysurgery.train import finetune, load_recipe

BROWSERS = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome", "chrome-headless-shell")
SHORT = {"pretrain.epochs": 1, "finetune.epochs": 1, "temperature.warmup": 1, "train_images": 128}


class Page(html.parser.HTMLParser):
    """The tags, the text and the pictures of a page; every tag has to be closed."""

    VOID = ("meta", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text, self.attributes = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    @property
    def pictures(self):
        return [value for name, value in self.attributes if name == "src"]


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A run of the digits recipe with its control and two seeds, and a probe of the first."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    origin = {"data": "digits", "model": "digits_net"}
    outcome = finetune(recipe=load_recipe("digits", SHORT), out=folder, seeds=(3, 4), origin=origin)
    out = CliRunner().invoke(main, ["probe", str(folder), "--images", "64", "--out", str(folder / "probe"), "--quiet"])
    assert out.exit_code == 0, out.output
    return folder, outcome


def written(folder, tmp_path, *args):
    result = CliRunner().invoke(main, ["report", str(folder), "--html", str(tmp_path / "a.html"), *map(str, args)])
    assert result.exit_code == 0, result.output
    return (tmp_path / "a.html").read_text()


def test_a_run_becomes_one_page_with_everything_inside(kept, tmp_path):
    folder, outcome = kept
    timing = {"network": "dynamic", "runtime": "onnxruntime", "images": 1, "milliseconds": 1.25}
    export = {"format": "onnx", "size": 1234, "opset": 20, "relative_diff": 1e-7, "latency": [timing]}
    (tmp_path / "export.json").write_text(json.dumps(export))
    text = written(folder, tmp_path, "--export", tmp_path / "export.json")
    page = Page(text)
    said = " ".join(" ".join(page.text).split())
    for key in ("before", "control", "dynamic"):
        assert f"{outcome.mean(key):.2f} %" in said
    for words in (
        "over 2 seeds",
        "1.25 ms",
        "shuffled across",
        "3 of 4 convolutions are dynamic",
        "dysurgery finetune",
    ):
        assert words in said
    assert 'dysurgery.load("digits/seed-3/dynamic")' in said
    assert len(page.pictures) == 6
    for picture in page.pictures:
        assert base64.b64decode(picture.removeprefix("data:image/png;base64,")).startswith(b"\x89PNG")
    assert not re.search(r"https?://|<script|<link|@import", text)


def test_the_static_figures_are_those_of_the_static_network(kept):
    folder, outcome = kept
    report = gather(folder)
    assert report.params == (outcome.costs[0].params, outcome.costs[1].params)
    assert [mult_adds.total for mult_adds in report.mult_adds] == [cost.mult_adds.total for cost in outcome.costs]


def test_the_command_of_a_run_makes_the_same_run(kept, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, outcome = kept
    command = gather(folder).command.split()
    assert command[:2] == ["dysurgery", "finetune"]
    result = CliRunner().invoke(main, [*command[1:], "--quiet", "--json", "-"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["accuracy"]["dynamic"] == outcome.mean("dynamic")


def test_a_converted_folder_has_a_page_too_and_its_command_makes_it_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = [
        "convert",
        "cifar_resnet20",
        "--weights",
        "random",
        "--model-arg",
        "width=4",
        "--k",
        "2",
        "--exclude",
        "layer3",
    ]
    assert CliRunner().invoke(main, [*args, "--out", "net", "--quiet"]).exit_code == 0
    text = written("net", tmp_path)
    assert Page(text).pictures == []
    assert "of 22 convolutions are dynamic" in text or "convolutions are dynamic" in text
    command = gather("net").command.split()
    assert CliRunner().invoke(main, [*command[1:], "--out", "again", "--quiet"]).exit_code == 0
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(dysurgery.load("again")(x), dysurgery.load("net")(x))


def test_what_files_say_is_escaped(tmp_path):
    built = build("digits_net", weights="random")
    dynamic = dysurgery.convert(built.model, torch.randn(1, 1, 8, 8))
    evil = "<script>alert(1)</script>"
    dysurgery.save(
        dynamic, tmp_path / "net", input_size=(1, 8, 8), preprocessing={evil: evil}, report={"relative_diff": 0}
    )
    text = written(tmp_path / "net", tmp_path)
    assert evil not in text
    assert text.count("&lt;script&gt;") == 2


def test_a_network_that_cannot_be_built_here_still_has_a_page(tmp_path):
    model = dysurgery.convert(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)), torch.randn(1, 3, 8, 8), layers="all")
    dysurgery.save(model, tmp_path / "own", input_size=(3, 8, 8))
    assert "the cost of each layer is missing" in written(tmp_path / "own", tmp_path)


def test_a_mistake_is_answered_by_one_sentence(kept, tmp_path):
    folder = shutil.copytree(kept[0], tmp_path / "unfinished")
    (folder / "result.json").unlink()
    for args, code, words in (
        ([tmp_path], 2, "neither a saved network nor a run"),
        ([folder], 1, "is not finished"),
        ([kept[0], "--probe", tmp_path], 1, "probe.json cannot be read"),
        ([kept[0], "--export", tmp_path / "none.json"], 1, "none.json cannot be read"),
    ):
        result = CliRunner().invoke(main, ["report", *map(str, args), "--html", str(tmp_path / "a.html")])
        assert result.exit_code == code, result.output
        assert words in result.output
        assert not (tmp_path / "a.html").exists()


def test_a_browser_shows_the_page(kept, tmp_path):
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no browser is installed: none of {', '.join(BROWSERS)}")
    written(kept[0], tmp_path)
    common = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    address = f"file://{tmp_path}/a.html"
    shot = tmp_path / "page.png"
    done = subprocess.run(
        [*common, f"--screenshot={shot}", "--window-size=1000,4000", address],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Refused" not in done.stderr
    assert shot.stat().st_size > 50_000
