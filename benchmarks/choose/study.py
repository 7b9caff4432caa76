"""Does a budgeted plan keep the gain of the full one? Full, chosen by score, by shape and at random, same budget.

    python benchmarks/choose/study.py plans INPUTS RUNS                           # RUNS/plans/*.json
    python benchmarks/choose/study.py run INPUTS RUNS [ROW ...] [--seeds N ...]   # what RUNS does not hold yet
    python benchmarks/choose/study.py collect RUNS                                # results.json, table of README.md

INPUTS is a folder with ``cifar10/`` (images in train/ and val/), and ``narrow/seed-N/before``: what the row
``narrow, first defaults`` of ``benchmarks/finetune`` pretrained. Rows *from random weights* train that network anew,
with the plans that were chosen for the pretrained one; their ``full`` and ``control`` are the row ``random`` of
``benchmarks/finetune``, whose folder is looked for as RUNS/random.
"""

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from statistics import fmean
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
RANDOMS = tuple(f"random {number}" for number in range(RANDOM))
COMMON = "--data cifar10 --recipe cifar10-resnet20 --set finetune.channels_last=true --set val_part=odd"
PRETRAINED = "--set train_images=25000 --set finetune.epochs=4 --set finetune.warmup_epochs=0.5"
ANEW = ", from random weights"
RANDOM_WEIGHTS = (
    "--model-arg width=4 --weights random --set finetune.epochs=8 --set finetune.lr=0.1 --set finetune.warmup_epochs=1"
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
    anew = row.endswith(ANEW)
    model = ["cifar_resnet20", *RANDOM_WEIGHTS.split()] if anew else [network(inputs, seed), *PRETRAINED.split()]
    control = [] if row.removesuffix(ANEW) == "full" else ["--no-control"]
    given = [*model, "--plan", str(plan_file(row, seed, runs)), *COMMON.split(), "--seeds", str(seed), *control]
    return ["dysurgery", "finetune", *given, "--out", str(runs / slug(row) / f"seed-{seed}")]


def plan_file(row: str, seed: int, runs: Path) -> Path:
    return runs / "plans" / f"{slug(row.removesuffix(ANEW))}-{seed}.json"


def run(inputs: Path, runs: Path, rows: list[str], seeds: list[int]) -> None:
    for row in rows:
        for seed in seeds:
            if not (runs / slug(row) / f"seed-{seed}" / "result.json").exists():
                done = command(row, seed, inputs, runs)
                subprocess.run([sys.executable, "-m", "dysurgery.cli", *done[1:]], cwd=inputs, check=True)


def collect(runs: Path) -> None:
    """Rewrite results.json and the tables of README.md from the runs that are finished."""
    path = HERE / "results.json"
    known = json.loads(path.read_text())["runs"] if path.exists() else []
    found = {(entry["row"], entry["seed"]): entry for entry in known}
    for row in ROWS:
        for seed in range(3):
            file = runs / slug(row) / f"seed-{seed}" / "result.json"
            if not file.exists() and row == f"full{ANEW}":
                file = runs / "random" / "result.json"
            if not file.exists():
                continue
            result = json.loads(file.read_text())
            for phase in ("control", "dynamic"):
                epochs = [e for e in result["history"] if e["phase"] == phase and e["seed"] == seed]
                if epochs:
                    name = row if phase == "dynamic" else f"control{ANEW if row.endswith(ANEW) else ''}"
                    plan = json.loads(plan_file(row, seed, runs).read_text())
                    chosen = [entry["path"] for entry in plan["sites"] if entry["decision"] == "dynamic"]
                    last = epochs[-1]
                    found[name, seed] = {
                        "row": name,
                        "seed": seed,
                        "sites": [] if phase == "control" else chosen,
                        "params": result["params"]["static" if phase == "control" else "dynamic"],
                        "mult_adds": result["mult_adds"]["static" if phase == "control" else "dynamic"],
                        **{key: last[key] for key in ("loss", "val_loss", "accuracy")},
                    }
    order = [f"{row}{setting}" for setting in ("", ANEW) for row in ("control", *PLANS)]
    entries = [found[key] for key in sorted(found, key=lambda key: (order.index(key[0]), key[1]))]
    path.write_text(json.dumps({"runs": entries}, indent=1) + "\n")
    text = (HERE / "README.md").read_text()
    for mark, setting in (("table", ""), ("table from random weights", ANEW)):
        before, _, rest = text.partition(f"<!-- {mark} -->\n")
        text = before + f"<!-- {mark} -->\n" + table(found, setting) + rest[rest.index("<!-- end -->") :]
    (HERE / "README.md").write_text(text)


PLANS = ("full", *(f"{way}, {name}" for name in SHARES for way in ("score", "variance", "shape", *RANDOMS)))
ROWS = (*PLANS, *(f"{row}{ANEW}" for row in PLANS))


def table(found: dict[tuple[str, int], dict[str, Any]], setting: str) -> str:
    lines = [
        "| plan | seeds | sites | params | training loss | **gain kept** | each | accuracy | validation loss |",
        "|" + "---|" * 9,
    ]
    for row in ("control", *PLANS):
        entries = [found[row + setting, seed] for seed in range(3) if (row + setting, seed) in found]
        if not entries:
            continue
        kept = [share(found, entry, setting) for entry in entries]
        known = [value for value in kept if value is not None]
        each = ", ".join(f"{value:.0%}" for value in known) if row not in ("control", "full") else ""
        lines.append(
            f"| {row} | {', '.join(str(entry['seed']) for entry in entries)} | "
            f"{', '.join(str(len(entry['sites'])) for entry in entries)} | "
            f"{fmean(entry['params'] for entry in entries):,.0f} | "
            f"{', '.join(format(entry['loss'], '.4f') for entry in entries)} | "
            f"{f'**{fmean(known):.0%}**' if known else ''} | {each} | "
            f"{', '.join(format(entry['accuracy'], '.2f') for entry in entries)} | "
            f"{', '.join(format(entry['val_loss'], '.3f') for entry in entries)} |"
        )
    return "\n".join(lines) + "\n"


def share(found: dict[tuple[str, int], dict[str, Any]], entry: dict[str, Any], setting: str) -> float | None:
    """Return how much of the drop in training loss from the control to the full plan a plan keeps."""
    ends = [found.get((row + setting, entry["seed"])) for row in ("control", "full")]
    if ends[0] is None or ends[1] is None:
        return None
    return (ends[0]["loss"] - entry["loss"]) / (ends[0]["loss"] - ends[1]["loss"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    for name in ("plans", "run"):
        action = actions.add_parser(name)
        action.add_argument("inputs", type=Path)
        action.add_argument("runs", type=Path)
    action.add_argument("rows", nargs="*", metavar="ROW", help=f"of {'; '.join(ROWS)}")
    action.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    actions.add_parser("collect").add_argument("runs", type=Path)
    options = parser.parse_args()
    if options.action == "plans":
        plans(options.inputs.absolute(), options.runs.absolute())
    elif options.action == "run":
        run(options.inputs.absolute(), options.runs.absolute(), options.rows or list(ROWS), options.seeds)
    else:
        collect(options.runs)


if __name__ == "__main__":
    main()
