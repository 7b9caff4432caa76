"""Does conversion pay? Every row below is one ``dysurgery finetune``; this runs rows, collects and draws them.

    python benchmarks/finetune/study.py run INPUTS RUNS [ROW ...]    # what RUNS does not hold yet; goes on
    python benchmarks/finetune/study.py show                         # the command of every row
    python benchmarks/finetune/study.py collect RUNS             # results.json, tables of README.md, gain.png

INPUTS is a folder with ``cifar10/`` and ``flowers/`` (folders of images with train/ and val/),
``resnet20_cifar10.safetensors`` and ``keras_mobilenetv1_025_224.safetensors``. Rows of the ablations start
from what ``narrow, first defaults`` pretrained, so that row comes first; they are measured on the even validation
images, on which settings are chosen, the others on the odd ones.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent

RESNET20 = "--data cifar10 --recipe cifar10-resnet20 --set finetune.channels_last=true"
CIFAR = f"{RESNET20} --seeds 0,1,2 --set val_part=odd"
# What the recipes said first, and after the first ablation; what they say now came out of the second and of flowers.
ADAMW = "--set finetune.bank_lr=1 --set finetune.opt=adamw --set finetune.weight_decay=0.05 --set finetune.lr"
SECOND = "--set surgery.calibrate=0.5 --set finetune.bank_lr=4"
FIRST = f"{SECOND} --set finetune.attention_lr=0.1 --set temperature.start=30 --set temperature.warmup"
PRETRAIN = (
    "--set pretrain.epochs=8 --set pretrain.batch_size=128 --set pretrain.lr=0.1 --set pretrain.weight_decay=5e-4 "
    "--set pretrain.warmup_epochs=1"
)
NARROW = "--set finetune.epochs=8 --set finetune.lr=0.1 --set finetune.warmup_epochs=1"
DIGITS = "--recipe digits --seeds 0,1,2,3,4,5,6,7,8,9"
PRETRAINED = "cifar_resnet20 --weights resnet20_cifar10.safetensors"
HEADLINE = f"{PRETRAINED} {CIFAR} --set finetune.epochs=5 --set finetune.lr=0.05 --set finetune.warmup_epochs=0.5"
ABLATION = (
    f"{{runs}}/narrow-first_defaults/seed-0/before {RESNET20} --seeds 0 --set val_part=even "
    "--set train_images=25000 --set finetune.epochs=4 --set finetune.warmup_epochs=0.5"
)
FLOWERS = (
    f"{HERE}/mobilenetv1.py:mobilenetv1_025 --weights keras_mobilenetv1_025_224.safetensors --data flowers "
    "--recipe folder --seeds 0,1,2 --set val_part=odd --input-size 3 128 128 --set finetune.epochs=8 "
    "--set finetune.workers=0"
)
FULL = "--set finetune.attention_lr=1"

# group, row -> the arguments of ``dysurgery finetune``
ROWS: dict[str, dict[str, str]] = {
    "1 the headline": {
        "resnet20": f"{HEADLINE} --set finetune.amp=bf16 --no-control",
        "resnet20, first defaults": f"{HEADLINE} {FIRST}=2 --set finetune.amp=bf16",
    },
    "1 its learning rate, on 20 000 images": {
        f"resnet20, first defaults, lr {lr}": f"{PRETRAINED} {RESNET20} --seeds 0 --set val_part=even "
        f"--set train_images=20000 --set finetune.epochs=3 --set finetune.warmup_epochs=0.5 {FIRST}=1 "
        f"--set finetune.lr={lr}"
        for lr in (0.02, 0.05, 0.1)
    },
    "3 narrower": {
        # Go on from what the last row pretrained, one run for each seed.
        "narrow": f"{{runs}}/narrow-first_defaults/seed-{{seed}}/before {RESNET20} --seeds {{seed}} "
        f"--set val_part=odd {NARROW} --no-control",
        "narrow, second defaults": f"{{runs}}/narrow-first_defaults/seed-{{seed}}/before {RESNET20} --seeds {{seed}} "
        f"--set val_part=odd {NARROW} --no-control {SECOND}",
        "narrow, first defaults": f"cifar_resnet20 --model-arg width=4 {CIFAR} {PRETRAIN} {NARROW} {FIRST}=2",
    },
    "4 from random weights": {
        "random": f"cifar_resnet20 --model-arg width=4 --weights random {CIFAR} {NARROW}",
        "random, half width, 4 epochs": f"cifar_resnet20 --model-arg width=8 --weights random {RESNET20} "
        "--seeds {seed} --set val_part=odd --set finetune.epochs=4 --set finetune.lr=0.1 "
        "--set finetune.warmup_epochs=0.5",
    },
    "5 transfer": {
        "flowers": f"{FLOWERS} --no-control",
        "flowers, second defaults": f"{FLOWERS} {SECOND}",
    },
    "digits": {
        "digits": DIGITS,
        "digits, second defaults": f"{DIGITS} {SECOND}",
        "digits, first defaults": f"{DIGITS} {FIRST}=10",
    },
    "2 ablation": {
        "default": f"{ABLATION} --no-control",
        "deviation 0.5": f"{ABLATION} --no-control --set surgery.calibrate=0.5",
        "deviation 1": f"{ABLATION} --no-control --set surgery.calibrate=1",
    },
    "2 ablation of the second defaults": {
        f"second defaults{', ' if name else ''}{name}": f"{ABLATION} {SECOND} {options}"
        for name, options in {
            "": "",
            "lr 0.05": "--set finetune.lr=0.05",
            "lr 0.2": "--set finetune.lr=0.2",
            "AdamW, lr 0.001": f"{ADAMW}=0.001",
            "AdamW, lr 0.004": f"{ADAMW}=0.004",
            "distilled from the static network": "--set distill.weight=1 --set distill.temperature=2",
            "only the dynamic layers train": "--set finetune.train=dynamic",
            "tau 30 to 1 in 1 epoch": "--no-control --set temperature.start=30 --set temperature.warmup=1",
            "tau 30 to 1 over all epochs": "--no-control --set temperature.start=30 --set temperature.warmup=4",
            "tau 30": "--no-control --set temperature.start=30 --set temperature.end=30",
            "sigmoid": "--no-control --set surgery.gate=sigmoid",
            "zero-sum, not calibrated": "--no-control --set surgery.calibrate=0 --set surgery.start=zero-sum",
            "copies, not calibrated": "--no-control --set surgery.calibrate=0",
            "K = 2": "--no-control --set surgery.k=2 --set finetune.bank_lr=2",
            "K = 8": "--no-control --set surgery.k=8 --set finetune.bank_lr=8",
            "deviation 0.25": "--no-control --set surgery.calibrate=0.25",
            "deviation 1": "--no-control --set surgery.calibrate=1",
            "kernels at lr x 1": "--no-control --set finetune.bank_lr=1",
            "kernels at lr x 2": "--no-control --set finetune.bank_lr=2",
            "kernels at lr x 8": "--no-control --set finetune.bank_lr=8",
            "attention at lr x 0.1": "--no-control --set finetune.attention_lr=0.1",
        }.items()
    },
    "2 ablation of the first defaults": {
        f"first defaults{', ' if name else ''}{name}": f"{ABLATION} {FIRST}=1 {options}"
        for name, options in {
            "": "",
            "K = 2": "--no-control --set surgery.k=2 --set finetune.bank_lr=2",
            "K = 8": "--no-control --set surgery.k=8 --set finetune.bank_lr=8",
            "copies, not calibrated": "--no-control --set surgery.calibrate=0",
            "decorrelated": "--no-control --set surgery.calibrate_by=decorrelated",
            "by clusters": "--no-control --set surgery.calibrate_by=clusters",
            "deviation 1": "--no-control --set surgery.calibrate=1",
            "deviation 1.5": "--no-control --set surgery.calibrate=1.5",
            "kernels at lr x 2": "--no-control --set finetune.bank_lr=2",
            "attention at lr x 0.01": "--no-control --set finetune.attention_lr=0.01",
            "attention at lr x 4": "--no-control --set finetune.attention_lr=4",
            "attention at lr x 1, not calibrated": f"--no-control {FULL} --set surgery.calibrate=0",
            "attention at lr x 1, deviation 1": f"--no-control {FULL} --set surgery.calibrate=1",
            "attention at lr x 1, kernels at lr x 8": f"--no-control {FULL} --set finetune.bank_lr=8",
            "attention at lr x 1, kernels at lr x 2, deviation 1": f"--no-control {FULL} --set finetune.bank_lr=2 "
            "--set surgery.calibrate=1",
            "attention at lr x 1, kernels at lr x 1, deviation 1.5": f"--no-control {FULL} --set finetune.bank_lr=1 "
            "--set surgery.calibrate=1.5",
        }.items()
    },
}

# Rows whose control is that of another row: what differs has no effect on the static network.
CONTROLS = {
    "resnet20": "resnet20, first defaults",
    "narrow": "narrow, first defaults",
    "narrow, second defaults": "narrow, first defaults",
    "flowers": "flowers, second defaults",
}


def group_of(row: str) -> str:
    return next(group for group, rows in ROWS.items() if row in rows)


def folder_of(row: str) -> str:
    return row.replace(", ", "-").replace(" ", "_").replace("=", "")


def commands(row: str, runs: Path) -> dict[Path, list[str]]:
    """Return folder -> command: one, or one for each seed where the row says so."""
    text, folder = ROWS[group_of(row)][row], runs / folder_of(row)
    folders = {seed: folder / f"seed-{seed}" for seed in range(3)} if "{seed}" in text else {0: folder}
    arguments = {path: shlex.split(text.format(runs=runs, seed=seed)) for seed, path in folders.items()}
    return {path: ["dysurgery", "finetune", *given, "--out", str(path)] for path, given in arguments.items()}


def run(inputs: Path, runs: Path, rows: list[str]) -> None:
    todo = [(row, folder, command) for row in rows for folder, command in commands(row, runs).items()]
    for row, folder, command in todo:
        if (folder / "result.json").exists():
            continue
        resume = ["--resume"] if (folder / "run.json").exists() else []
        print(row, flush=True)
        module = [sys.executable, "-m", "dysurgery.cli"]
        done = subprocess.run([*module, *command[1:], *resume], cwd=inputs)
        if done.returncode:
            print(f"{row}: exit code {done.returncode}", flush=True)
            if done.returncode < 0 or done.returncode > 128:
                sys.exit(done.returncode)


def collected(row: str, runs: Path) -> dict[str, Any] | None:
    """Return what a row came to, in the seeds that are finished."""
    paths = [path for folder in commands(row, runs) if (path := folder / "result.json").exists()]
    if not paths:
        return None
    results = [json.loads(path.read_text()) for path in paths]
    result = results[0]
    history = [epoch for each in results for epoch in each["history"]]
    if row in CONTROLS:
        static = json.loads((runs / folder_of(CONTROLS[row]) / "result.json").read_text())
        history += [epoch for epoch in static["history"] if epoch["phase"] == "control"]
        controls = {seed["seed"]: seed["control"] for seed in static["seeds"]}
        for seed in (seed for each in results for seed in each["seeds"]):
            seed["control"] = controls[seed["seed"]]
    last = {(e["phase"], e["seed"]): e for e in history if e["number"] == e["of"]}
    seeds = [seed for each in results for seed in each["seeds"]]

    def each(phase: str, figure: str) -> list[float | None]:
        return [last[phase, seed["seed"]][figure] if (phase, seed["seed"]) in last else None for seed in seeds]

    shown = "; ".join(shlex.join(command) for command in commands(row, Path("RUNS")).values())
    return {
        "name": row,
        "group": group_of(row),
        "command": shown,
        "seeds": [seed["seed"] for seed in seeds],
        "val_images": result["val_images"],
        "before": [seed["before"] for seed in seeds],
        "control": [seed["control"] for seed in seeds],
        "dynamic": [seed["dynamic"] for seed in seeds],
        "control_loss": each("control", "loss"),
        "dynamic_loss": each("dynamic", "loss"),
        "entropy": each("dynamic", "entropy"),
        "spread": each("dynamic", "spread"),
        "params": result["params"],
        "mult_adds": result["mult_adds"],
        "seconds": [seed["seconds"] for seed in seeds],
    }


def collect(runs: Path) -> None:
    """Rewrite the results: rows that RUNS holds, and those that were collected before, elsewhere."""
    path = HERE / "results.json"
    by_name = {row["name"]: row for row in json.loads(path.read_text())["rows"]} if path.exists() else {}
    names = [row for group in ROWS.values() for row in group]
    by_name |= {row: found for row in names if (found := collected(row, runs)) is not None}
    rows = [by_name[row] for row in names if row in by_name]
    results: dict[str, Any] = {"machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, no GPU", "rows": rows}
    if headline := by_name.get("resnet20") or by_name.get("resnet20, first defaults"):
        setting = (
            "CIFAR ResNet-20 from pretrained weights, all 50 000 JPEG training images with crop and flip, 5 epochs of "
            "SGD (a CPU's version of the setting), 2 500 odd validation images, seeds 0, 1, 2; row "
            f"{headline['name']!r}"
        )
        figures = {"setting": setting, "control": headline["control"], "dynamic": headline["dynamic"]}
        results = {"headline": figures, **results}
    path.write_text(json.dumps(results, indent=1) + "\n")
    text = (HERE / "README.md").read_text()
    tables = {
        "main": main_table(rows),
        "ablation": ablation_table(rows, "2 ablation"),
        "second ablation": ablation_table(rows, "2 ablation of the second defaults"),
        "first ablation": ablation_table(rows, "2 ablation of the first defaults"),
    }
    for name, table in tables.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, _, rest = text.partition(begin)
        text = before + begin + table + end + rest.partition(end)[2]
    (HERE / "README.md").write_text(text)
    draw(rows)


def mean(values: list[Any]) -> float | None:
    there = [value for value in values if value is not None]
    return fmean(there) if there else None


def figure(values: list[Any], digits: int = 2) -> str:
    there = [value for value in values if value is not None]
    if not there:
        return ""
    return f"{fmean(there):.{digits}f}" + (f" ± {stdev(there):.{digits}f}" if len(there) > 1 else "")


def differences(row: dict[str, Any]) -> list[float]:
    pairs = zip(row["control"], row["dynamic"], strict=True)
    return [dynamic - control for control, dynamic in pairs if control is not None]


def main_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| row | seeds | before | control | dynamic | **difference** | each | loss: control, dynamic | entropy | "
        "spread |",
        "|" + "---|" * 10,
    ]
    for row in rows:
        if "ablation" in row["group"]:
            continue
        gains = differences(row)
        lines.append(
            f"| {row['name']} | {len(row['seeds'])} | {figure(row['before'])} | {figure(row['control'])} | "
            f"{figure(row['dynamic'])} | **{fmean(gains):+.2f}**{f' ± {stdev(gains):.2f}' if len(gains) > 1 else ''} | "
            f"{', '.join(f'{gain:+.2f}' for gain in gains)} | {figure(row['control_loss'], 3)}, "
            f"{figure(row['dynamic_loss'], 3)} | {figure(row['entropy'])} | {figure(row['spread'], 3)} |"
        )
    return "\n".join(lines) + "\n"


def ablation_table(rows: list[dict[str, Any]], group: str) -> str:
    lines = [
        "| what differs | accuracy | training loss | control: accuracy, loss | entropy | spread |",
        "|" + "---|" * 6,
    ]
    for row in rows:
        if row["group"] == group:
            control = f"{figure(row['control'])}, {figure(row['control_loss'], 3)}" if mean(row["control"]) else ""
            lines.append(
                f"| {row['name']} | {figure(row['dynamic'])} | {figure(row['dynamic_loss'], 3)} | {control} | "
                f"{figure(row['entropy'])} | {figure(row['spread'], 3)} |"
            )
    return "\n".join(lines) + "\n"


def draw(rows: list[dict[str, Any]]) -> None:
    """Draw the difference of every row that has a control, a point for each seed."""
    shown = [row for row in rows if "ablation" not in row["group"]]
    figure, axis = plt.subplots(figsize=(7.5, 0.45 * len(shown) + 1.2), layout="constrained")
    for place, row in enumerate(shown):
        gains = differences(row)
        axis.plot(gains, [place] * len(gains), "o", color="#1f77b4", alpha=0.5, markersize=5)
        axis.plot([fmean(gains)] * 2, [place - 0.3, place + 0.3], color="#d62728", linewidth=2)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(shown)), [row["name"] for row in shown])
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.3)
    axis.set_xlabel("dynamic minus control, points of accuracy (dots: seeds; bar: mean)")
    figure.savefig(HERE / "gain.png", dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    runs = actions.add_parser("run")
    runs.add_argument("inputs", type=Path)
    runs.add_argument("runs", type=Path)
    runs.add_argument("rows", nargs="*", metavar="ROW")
    actions.add_parser("show")
    actions.add_parser("collect").add_argument("runs", type=Path)
    options = parser.parse_args()
    every = [row for group in ROWS.values() for row in group]
    if options.action == "run":
        if unknown := set(options.rows) - set(every):
            parser.error(f"unknown rows {', '.join(sorted(unknown))}; see show")
        run(options.inputs, options.runs.resolve(), options.rows or every)
    elif options.action == "show":
        for row in every:
            print(f"{row}: {'; '.join(shlex.join(command) for command in commands(row, Path('RUNS')).values())}")
    else:
        collect(options.runs)


if __name__ == "__main__":
    main()
