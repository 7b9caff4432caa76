"""How fast dynamic networks run: the commands of the tables in README.md, and the tables made of what they wrote.

python benchmarks/latency/study.py show          # the commands
python benchmarks/latency/study.py run RUNS      # those that RUNS does not hold yet, one after the other
python benchmarks/latency/study.py collect RUNS  # results.json, the tables, latency.png
python benchmarks/latency/study.py apart         # what it brings that a layer does the activation behind it
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import timm
import torch

import dysurgery
from dysurgery.latency import latency
from dysurgery.nn.conv import DynamicConvNd

HERE = Path(__file__).parent
NETWORKS = ("resnet18", "mobilenetv2_100", "mobilenetv3_small_100")
PARTS = {
    "one thread, training": "--batch 8 --train --threads 1 --seconds 8",
    "one thread": "--batch 1,32 --threads 1 --seconds 8",
    "two threads": "--batch 1,8 --threads 2 --seconds 8",
    "one thread, compiled": "--batch 1 --compile --layout nhwc --threads 1 --seconds 8",
}
AIMS = {("infer", 1): 1.25, ("infer", 8): 1.25, ("infer", 32): 1.2, ("train", 8): 1.35}


def commands(runs: Path) -> dict[Path, list[str]]:
    """Return the file that each command writes, and the command."""
    found = {}
    for part, options in PARTS.items():
        for network in NETWORKS:
            file = runs / f"{network}-{part.replace(', ', '-').replace(' ', '_')}.json"
            found[file] = ["dysurgery", "bench", network, *options.split(), "--quiet", "--json", str(file)]
    return found


def run(runs: Path) -> None:
    """Run what RUNS does not hold yet; a command that fails is shown and the next one tried."""
    runs.mkdir(parents=True, exist_ok=True)
    for file, command in commands(runs).items():
        if file.exists():
            continue
        print(shlex.join(command), flush=True)
        done = subprocess.run([sys.executable, "-m", "dysurgery.cli", *command[1:]], check=False)
        if done.returncode:
            print(f"exit code {done.returncode}", flush=True)


def collect(runs: Path) -> None:
    """Write results.json, the tables and the picture; rows that RUNS does not hold stay as they were."""
    path = HERE / "results.json"
    known = json.loads(path.read_text())["benches"] if path.exists() else {}
    for file, command in commands(Path("RUNS")).items():
        measured = runs / file.name
        if measured.exists():
            known[file.stem] = {"command": shlex.join(command), **json.loads(measured.read_text())}
    benches = {file.stem: known[file.stem] for file in commands(runs) if file.stem in known}
    path.write_text(json.dumps({"rows": rows(benches), "benches": benches}, indent=1) + "\n")
    text = (HERE / "README.md").read_text()
    for name, table in {"times": times_table(benches), "layers": layers_table(benches)}.items():
        before, _, rest = text.partition(f"<!-- {name} -->\n")
        text = f"{before}<!-- {name} -->\n{table}<!-- end of {name} -->{rest.partition(f'<!-- end of {name} -->')[2]}"
    (HERE / "README.md").write_text(text)
    draw(benches)


def apart() -> None:
    """Print a table: networks whose layers do what is behind them, and the same with that apart, relative to static."""
    torch.set_num_threads(1)
    print("| network | images | dynamic / static | with activation and mean apart |\n" + "|---" * 4 + "|")
    for name in NETWORKS:
        example = torch.randn(1, 3, 224, 224)
        dynamic = dysurgery.convert(timm.create_model(name).eval(), example)
        networks = {
            "static": dysurgery.fuse_bn(dysurgery.freeze(dynamic), example),
            "dynamic": dysurgery.fuse_bn(dynamic, example),
            "apart": dysurgery.fuse_bn(dynamic, example),
        }
        for module in networks["apart"].modules():
            if isinstance(module, DynamicConvNd):
                module.epilogue = None
        networks = {form: network.to(memory_format=torch.channels_last) for form, network in networks.items()}
        for batch in (1, 8, 32):
            images = torch.randn(batch, 3, 224, 224).contiguous(memory_format=torch.channels_last)
            found = latency(networks, images, seconds=15)
            ratios = [found[form] / found["static"] for form in ("dynamic", "apart")]
            print(f"| {name} | {batch} | {ratios[0]:.2f} | {ratios[1]:.2f} |", flush=True)


def rows(benches: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows in the best layout of each, with what they were measured with."""
    found = []
    for bench in benches.values():
        machine = {key: bench["machine"][key] for key in ("threads", "compile", "autotune")}
        only = len({row["layout"] for row in bench["rows"]}) == 1
        found += [machine | row for row in bench["rows"] if only or row["layout"] == "best"]
    return found


def how(row: dict[str, Any]) -> str:
    threads = f"{row['threads']} thread{'s' * (row['threads'] > 1)}"
    return f"{threads}, {'compiled' if row['compile'] else 'eager, autotuned' if row['autotune'] else 'eager'}"


def times_table(benches: dict[str, Any]) -> str:
    lines = [
        "| network | with | mode | images | static | dynamic | grouped trick | **dynamic / static** | aim | grouped / "
        "static | peak MB: static, dynamic, grouped |",
        "|" + "---|" * 11,
    ]
    for row in sorted(rows(benches), key=lambda row: (row["model"], how(row), row["mode"], row["batch"])):
        cells = [f"{row[f'{form}_ms']:.1f} ms {row[f'{form}_layout']}" for form in ("static", "dynamic", "grouped")]
        aim = AIMS.get((row["mode"], row["batch"]), "")
        memory = ", ".join(f"{row[f'{form}_mb']:.0f}" for form in ("static", "dynamic", "grouped"))
        lines.append(
            f"| {row['model']} | {how(row)} | {row['mode']} | {row['batch']} | {' | '.join(cells)} | "
            f"**{row['ratio']:.2f}** | {aim} | {row['ratio_grouped']:.2f} | {memory} |"
        )
    return "\n".join(lines) + "\n"


def layers_table(benches: dict[str, Any]) -> str:
    """Return the layers that cost most beyond a static one, at batch 8 with one thread."""
    lines = ["| network | mode | layer | way | static | dynamic | grouped trick |", "|" + "---|" * 7]
    for name, bench in benches.items():
        if not name.endswith("-one_thread-training"):
            continue
        for mode in ("infer", "train"):
            for layer in [layer for layer in bench["layers"] if layer["mode"] == mode][:4]:
                lines.append(
                    f"| {bench['model']} | {mode} | {layer['path']} | {layer['way']} | {layer['static_ms']:.1f} ms | "
                    f"{layer['dynamic_ms']:.1f} ms | {layer['grouped_ms']:.1f} ms |"
                )
    return "\n".join(lines) + "\n"


def draw(benches: dict[str, Any]) -> None:
    """Draw the ratios to the static network, those of dynamic and of the grouped trick, and the aims."""
    shown = sorted(rows(benches), key=lambda row: (row["model"], how(row), row["mode"], row["batch"]))
    figure, axis = plt.subplots(figsize=(8, 0.3 * len(shown) + 1.3), layout="constrained")
    for place, row in enumerate(shown):
        axis.barh(place - 0.2, row["ratio"], 0.4, color="tab:orange", label="dynamic" if place == 0 else None)
        axis.barh(
            place + 0.2, row["ratio_grouped"], 0.4, color="tab:red", alpha=0.6,
            label="grouped trick" if place == 0 else None,
        )  # fmt: skip
        if (aim := AIMS.get((row["mode"], row["batch"]))) is not None:
            axis.plot([aim] * 2, [place - 0.45, place + 0.45], color="black", label="aim" if place == 0 else None)
    names = [f"{row['model']}, {how(row)}, {row['mode']} {row['batch']}" for row in shown]
    axis.set_yticks(range(len(shown)), names, fontsize=8)
    axis.axvline(1, color="gray", linewidth=0.8)
    axis.invert_yaxis()
    axis.set_xlabel("time relative to the static network, each in its best layout")
    axis.legend(loc="upper right", fontsize=8)
    figure.savefig(HERE / "latency.png", dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("show")
    actions.add_parser("apart")
    for name in ("run", "collect"):
        actions.add_parser(name).add_argument("runs", type=Path)
    arguments = parser.parse_args()
    if arguments.action == "show":
        print("\n".join(shlex.join(command) for command in commands(Path("RUNS")).values()))
    elif arguments.action == "apart":
        apart()
    elif arguments.action == "run":
        run(arguments.runs)
    else:
        collect(arguments.runs)


if __name__ == "__main__":
    main()
