"""The fast part of ``benchmarks/zoo.py``: the smallest model of each family."""

import csv
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def load_zoo():
    spec = importlib.util.spec_from_file_location("zoo", BENCHMARKS / "zoo.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["zoo"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


zoo = load_zoo()


def smallest(limit):
    """The smallest model of each family, up to ``limit`` parameters, of those that the zoo has examined."""
    with (BENCHMARKS / "zoo" / "results.tsv").open() as file:
        rows = sorted(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE), key=lambda row: int(row["params"]))
    firsts = {row["family"]: row for row in reversed(rows)}
    return [
        zoo.Entry(r["name"], r["family"], int(r["params"]), True) for r in firsts.values() if int(r["params"]) < limit
    ]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("entry", smallest(10e6), ids=lambda entry: entry.name)
def test_a_model_of_each_family_computes_what_it_did(entry, tmp_path):
    with torch.no_grad():
        row = zoo.examine(entry, tmp_path, lambda stage: None, ("eval", "train", "keys"))
    assert row["status"] == "ok", row["reason"]
    assert row["converted"] > 0
    for check in ("eval", "train", "keys"):
        assert row[check].startswith("ok")
