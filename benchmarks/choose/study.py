"""Does a budgeted plan keep the gain of the full one? Full, chosen by score, by shape and at random, same budget.

    python benchmarks/choose/study.py plans INPUTS RUNS            # RUNS/plans/*.json
    python benchmarks/choose/study.py run INPUTS RUNS [ROW ...]    # what RUNS does not hold yet
    python benchmarks/choose/study.py collect RUNS                 # results.json, and the tables of README.md

INPUTS is a folder with ``cifar10/`` (images in train/ and val/), and ``narrow/seed-N/before``: what the row
``narrow, first defaults`` of ``benchmarks/finetune`` pretrained.
"""

import json
import random
import shlex
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

import dysurgery
from dysurgery.budget import best
from dysurgery.checkpoint import open_model
from dysurgery.choose import added, choose
from dysurgery.plan import Plan
from dysurgery.planfile import to_json

HERE = Path(__file__).parent
SHARES = {"half": 0.5, "quarter": 0.25}
RANDOM = 3
COMMON = (
    "--data cifar10 --recipe cifar10-resnet20 --set finetune.channels_last=true --set val_part=odd "
    "--set train_images=25000 --set finetune.epochs=4 --set finetune.warmup_epochs=0.5"
)


def network(inputs: Path, seed: int) -> str:
    return str(inputs / "narrow" / f"seed-{seed}" / "before")


def plans(inputs: Path, runs: Path) -> None:
    """Write one plan for every network, budget and way to choose."""
    folder = runs / "plans"
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(3):
        built = open_model(network(inputs, seed))
        full = dysurgery.plan(built.model, torch.zeros(1, *built.input_size))
        found: dict[str, dict[str, Any]] = {"full": to_json(full)}
        for name, share in SHARES.items():
            before, after = full.params
            budget = before + int((after - before) * share)
            data = str(inputs / "cifar10")
            chosen = choose(built, full, data, budget_params=budget)
            found[f"score, {name}"] = chosen.to_json()
            found[f"unlabelled, {name}"] = choose(built, full, data, budget_params=budget, labels=False).to_json()
            found[f"variance, {name}"] = by_variance(full, chosen.scores, budget)
            found[f"shape, {name}"] = choose(built, full, budget_params=budget).to_json()
            scores = {entry["path"]: entry.get("score") or 0 for entry in found[f"score, {name}"]["sites"]}
            for number in range(RANDOM):
                found[f"random {number}, {name}"] = at_random(full, budget, 100 * seed + number)
            for plan in found.values():
                paths = [entry["path"] for entry in plan["sites"] if entry["decision"] == "dynamic"]
                plan["share_of_score"] = sum(scores[path] for path in paths)
        for name, plan in found.items():
            (folder / f"{slug(name)}-{seed}.json").write_text(json.dumps(plan, indent=1) + "\n")


def narrowed(full: Plan, chosen: Collection[str]) -> dict[str, Any]:
    """Return the full plan as JSON with only these sites dynamic."""
    data = to_json(full)
    for entry in data["sites"]:
        entry["decision"] = "dynamic" if entry["path"] in chosen else "static"
    return data


def by_variance(full: Plan, scores: dict[str, float], budget: int) -> dict[str, Any]:
    """Choose by the variance in place of the deviation: by the squares of the scores."""
    candidates = [planned for planned in full.sites if planned.decision.dynamic]
    paths = [planned.site.path for planned in candidates]
    taken = best([scores[path] ** 2 for path in paths], [added(p)[:1] for p in candidates], [budget - full.params[0]])
    return narrowed(full, {paths[index] for index in taken})


def at_random(full: Plan, budget: int, seed: int) -> dict[str, Any]:
    """Return the full plan as JSON with sites left in, in random order, as long as they fit."""
    room = budget - full.params[0]
    candidates = [planned for planned in full.sites if planned.decision.dynamic]
    random.Random(seed).shuffle(candidates)
    chosen = set()
    for planned in candidates:
        cost = added(planned)[0]
        if cost <= room:
            chosen.add(planned.site.path)
            room -= cost
    return narrowed(full, chosen)


def slug(name: str) -> str:
    return name.replace(", ", "-").replace(" ", "_")


def command(row: str, seed: int, inputs: Path, runs: Path) -> list[str]:
    control = [] if row == "full" else ["--no-control"]
    plan = runs / "plans" / f"{slug(row)}-{seed}.json"
    given = [network(inputs, seed), "--plan", str(plan), *shlex.split(COMMON), "--seeds", str(seed), *control]
    return ["dysurgery", "finetune", *given, "--out", str(runs / slug(row) / f"seed-{seed}")]
