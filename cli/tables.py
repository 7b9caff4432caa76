"""Everything that is drawn in a terminal. Standard output carries results, standard error progress."""

import os
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from dysurgery.bench import FORMS, Bench, LayerTime
from dysurgery.choose import Choice
from dysurgery.cost import CostReport, MultAdds
from dysurgery.demote import Demotion
from dysurgery.deployed import Timing
from dysurgery.export import Exported
from dysurgery.figures import change, count
from dysurgery.plan import Plan, PlannedSite
from dysurgery.probe import AVERAGED_ELSEWHERE, INTERVENTIONS, LayerAttention, ProbeReport
from dysurgery.trace import ConvSite
from dysurgery.train import Outcome, Recipe

# Beyond so many layers a table shows the resolutions only: nobody reads two screens of figures.
_LONG = 40

# Wide enough for the longest paths: a pipe has no width of its own, and nothing may be cut there.
_PIPE_WIDTH = 200


def console(quiet: bool = False) -> Console:
    """Return the console for results: coloured in a terminal, plain text elsewhere, silent if ``quiet``."""
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else _PIPE_WIDTH
    return Console(quiet=quiet, highlight=False, width=width, soft_wrap=False)


@contextmanager
def working(text: str, quiet: bool = False) -> Iterator[None]:
    """Show a spinner on standard error while the block runs, in a terminal."""
    with Console(stderr=True, quiet=quiet or not sys.stderr.isatty()).status(text):
        yield


def _table(*columns: str, text: Collection[str] = (), plain: bool, title: str | None = None) -> Table:
    """Return an empty table: columns in ``text`` are words that may wrap, the others figures that may not."""
    style = None if plain else box.SIMPLE_HEAD
    table = Table(title=title, title_justify="left", box=style, pad_edge=False, padding=(0, 1, 0, 0))
    for name in columns:
        words = name in text
        table.add_column(name, justify="left" if words else "right", overflow="fold", no_wrap=not words)
    return table


def plan_table(out: Console, plan: Plan, choice: Choice | None = None) -> None:
    """Print every convolution with its decision, its reason, its cost before and after, and its score if it has one."""
    table = _table(
        "convolution", "kind", "map", "params", "Mult-Adds", *(["score"] if choice else []), "decision",
        text=("convolution", "decision"), plain=not out.is_terminal,
    )  # fmt: skip
    for planned in plan.sites:
        site, dynamic = planned.site, planned.decision.dynamic
        path = site.path or "(the model)"
        params, mult_adds = count(planned.params[0], 3), count(planned.mult_adds[0].total, 3)
        if dynamic:
            params += f" > {count(planned.params[1], 3)}"
            mult_adds += f" {change(*(entry.total for entry in planned.mult_adds))[1]:>6}"
        else:
            mult_adds += " " * 7
        table.add_row(
            f"{path} (+{len(site.aliases)} names)" if site.aliases else path,
            site.kind,
            _map_size(site),
            params,
            mult_adds,
            *([f"{choice.scores[site.path]:.1%}" if site.path in choice.scores else ""] if choice else []),
            _decision(planned),
            style=None if dynamic else "dim",
        )
    out.print(table)
    for note in plan.graph.notes:
        out.print(Text(f"note: {note}", style="dim"))


def _decision(planned: PlannedSite) -> str:
    if planned.decision.dynamic:
        return "dynamic"
    return planned.decision.reason if planned.site.dynamic else f"static: {planned.decision.reason}"


def _map_size(site: ConvSite) -> str:
    sizes = {call.input_shape[2:] for call in site.calls}
    if len(sizes) != 1:
        return "several" if sizes else "-"
    size = sizes.pop()
    return str(size[0]) if len(set(size)) == 1 else "x".join(map(str, size)) or "-"


def totals_table(out: Console, names: Sequence[str], params: Sequence[int], mult_adds: Sequence[MultAdds]) -> None:
    """Print parameters and Mult-Adds of two models, their difference, and what the difference is made of."""
    table = _table("", *names, "change", "%", text=("",), plain=not out.is_terminal)
    table.add_row("parameters", *map(count, params), *change(*params))
    totals = [entry.total for entry in mult_adds]
    table.add_row("Mult-Adds", *map(count, totals), *change(*totals))
    for part in ("pooling", "attention", "aggregation"):
        values = [getattr(entry, part) for entry in mult_adds]
        if any(values):
            table.add_row(f"  {part}", *map(count, values), *change(values[0], values[1]))
    out.print(table)


def basis(out: Console, input_shape: Sequence[int]) -> None:
    """Print what the figures refer to."""
    size = "x".join(map(str, input_shape)) or "the example"
    out.print(f"input {size}, batch 1; 1 Mult-Add = 2 FLOPs, counted in convolutions, Linear and matrix products")


def plan_report(out: Console, plan: Plan, name: str, choice: Choice | None = None) -> None:
    """Print the whole plan: sites, totals, basis, and what was chosen by."""
    chosen, total = len(plan.chosen), len(plan.sites)
    settings = plan.settings
    plan_table(out, plan, choice)
    out.print(
        f"{name}: {chosen} of {total} convolutions become dynamic "
        f"(K={settings.k}, {settings.gate} gate, start {settings.start})"
    )
    totals_table(out, ("before", "after"), plan.params, plan.mult_adds)
    basis(out, plan.before.input_shape)
    if choice is not None:
        out.print(_about_choice(choice), soft_wrap=True)


def _about_choice(choice: Choice) -> str:
    """Say what the scores are and how much of them was chosen."""
    by = {
        "labels": f"the deviation of the gradient over {choice.images} images",
        "predictions": f"the deviation of the gradient over {choice.images} images, with the network's own predictions",
        "shape": "a rule of shape (without --data): the square root of a kernel's weights",
    }[choice.by]
    limits = (("parameters", choice.budget.params), ("Mult-Adds", choice.budget.mult_adds))
    most = " and ".join(f"{count(limit)} {what}" for what, limit in limits if limit is not None)
    chosen = f"; within {most} the chosen hold {choice.kept:.1%}, the most there is" if most else ""
    return f"score: {by}, as a share of their sum{chosen}"


def cost_table(out: Console, name: str, report: CostReport) -> None:
    """Print the cost of every convolution of one model, and the total."""
    words = ("convolution", "kind")
    table = _table(*words, "params", "Mult-Adds", "share", text=words, plain=not out.is_terminal, title=name)
    for site in report.sites:
        kind = f"{site.kind}, dynamic" if site.dynamic else site.kind
        share = site.mult_adds.total / max(report.mult_adds.total, 1)
        table.add_row(site.path, kind, count(site.params), count(site.mult_adds.total), f"{share:.1%}")
    table.add_section()
    table.add_row("the whole model", "", count(report.params), count(report.mult_adds.total), "100.0%")
    out.print(table)
    basis(out, report.input_shape)


def checks_table(out: Console, done: Exported) -> None:
    """Print what an exported file was run on and how far it is from the model, and where it is."""
    table = _table("input", "largest difference", "of the largest output", plain=not out.is_terminal)
    for check in done.checks:
        sizes = ", ".join("x".join(map(str, shape)) for shape in check.shapes)
        table.add_row(sizes, f"{check.max_abs_diff:.1e}", f"{check.relative_diff:.1e}")
    out.print(table)
    where = "a process of its own" if done.opset is None else f"onnxruntime, opset {done.opset}"
    names = f"{', '.join(done.inputs)} -> {', '.join(done.outputs)}"
    out.print(f"Run in {where}: {names}.\nSaved to {done.path} ({count(done.size)}B)", soft_wrap=True)


def timings_table(out: Console, timings: Sequence[Timing]) -> None:
    """Print how long a network takes in torch and as a file, dynamic and static, for some numbers of images."""
    counts = list(dict.fromkeys(timing.images for timing in timings))
    heads = [f"{count} image{'s' * (count > 1)}" for count in counts]
    table = _table("network", "runs in", *heads, text=("network", "runs in"), plain=not out.is_terminal)
    rows: dict[tuple[str, str], dict[int, float]] = {}
    for timing in timings:
        rows.setdefault((timing.network, timing.runtime), {})[timing.images] = timing.milliseconds
    for (network, runtime), times in rows.items():
        table.add_row(network, runtime, *(f"{times[count]:.2f} ms" for count in counts))
    out.print(table)
    out.print("latency: median on this machine, all in turns; static: every layer frozen to its mean kernel")


def bench_tables(out: Console, name: str, found: Bench) -> None:
    """Print a line for each measurement, the slowest layers, and what the figures refer to."""
    plain = not out.is_terminal
    table = _table(
        "mode", "images", "layout", *FORMS, "dynamic / static", "grouped / static", "peak MB",
        text=("mode", "layout"), plain=plain, title=name,
    )  # fmt: skip
    for row in found.rows:
        measured = (row.static, row.dynamic, row.grouped)
        table.add_row(
            row.mode,
            str(row.batch),
            " ".join(each.layout for each in measured) if row.layout == "best" else row.layout,
            *(f"{each.ms:.2f} ms ± {(each.quartiles[1] - each.quartiles[0]) / 2:.2f}" for each in measured),
            f"{row.ratio:.2f}",
            f"{row.ratio_grouped:.2f}",
            " ".join(f"{each.mb:.3g}" for each in measured),
        )
    out.print(table)
    static, dynamic = found.mult_adds
    machine = found.machine
    threads = f", {machine['threads']} thread{'s' * (machine['threads'] > 1)}" if machine["device"] == "cpu" else ""
    how = "".join(f", {name}" for key, name in (("compile", "compiled"), ("autotune", "autotuned")) if machine[key])
    size = "x".join(map(str, found.input_size))
    out.print(
        f"Mult-Adds: {count(static)} > {count(dynamic)}, {dynamic / max(static, 1):.2f} times; input {size}, "
        f"{machine['dtype']}{how}, torch {machine['torch']} on {machine['name']}{threads}",
        soft_wrap=True,
    )
    out.print(
        "medians, all in turns; ±: half the interquartile range; layout and peak MB: of static, dynamic and grouped; "
        "grouped: one convolution with a group for every image, as others do",
        soft_wrap=True,
    )
    for mode in dict.fromkeys(layer.mode for layer in found.layers):
        _layer_times_table(out, [layer for layer in found.layers if layer.mode == mode], plain)
    for note in found.notes:
        out.print(Text(f"note: {note}", style="dim"), soft_wrap=True)


def _layer_times_table(out: Console, layers: Sequence[LayerTime], plain: bool) -> None:
    mode, batch = layers[0].mode, layers[0].batch
    title = f"slowest dynamic layers, each alone, {mode}, {batch} image{'s' * (batch > 1)}"
    table = _table("layer", "way", "layout", *FORMS, "more", text=("layer", "way", "layout"), plain=plain, title=title)
    for layer in layers:
        grouped = "" if layer.grouped_ms is None else f"{layer.grouped_ms:.3f} ms"
        more = f"{layer.dynamic_ms - layer.static_ms:+.3f} ms"
        times = (f"{layer.static_ms:.3f} ms", f"{layer.dynamic_ms:.3f} ms", grouped)
        table.add_row(layer.path or "(the model)", layer.way, layer.layout, *times, more)
    out.print(table)


def outcome_table(out: Console, name: str, outcome: Outcome) -> None:
    """Print the accuracy before, of the control and of the dynamic network, with what each costs."""
    many = len(outcome.seeds) > 1
    table = _table(
        "network", "accuracy", "change", "params", "Mult-Adds", "latency", "training",
        text=("network",), plain=not out.is_terminal, title=name,
    )  # fmt: skip
    static, dynamic = outcome.costs
    rows = (
        ("static, before", "before", static or dynamic, "static", None),
        ("dynamic, converted", "converted", dynamic, "dynamic", None),
        ("control: static, trained on", "control", static, "static", "control"),
        ("dynamic, trained on", "dynamic", dynamic, "dynamic", "dynamic"),
    )
    before = outcome.mean("before")
    for label, key, report, form, phase in rows:
        accuracy = outcome.mean(key)
        if accuracy is None or report is None or before is None:
            continue
        latency = outcome.latency.get(form)
        seconds = [seed.seconds[phase] for seed in outcome.seeds] if phase else []
        table.add_row(
            label if outcome.costs[0] is not None or key != "before" else "dynamic, before",
            f"{accuracy:.2f} %" + (f" ± {outcome.spread(key):.2f}" if many else ""),
            f"{accuracy - before:+.2f}",
            count(report.params),
            count(report.mult_adds.total),
            "" if latency is None else f"{latency:.2f} ms",
            f"{sum(seconds) / len(seconds):.1f} s" if seconds else "",
        )
    out.print(table)
    difference, image = outcome.mean("difference"), 100 / outcome.val_images
    basis_of_it = f"{outcome.val_images} validation images: one image is {image:.2f} points"
    if difference is None:
        out.print(f"no control ({basis_of_it})")
    elif many:
        each = ", ".join(f"{value:+.2f}" for value in outcome.values("difference"))
        out.print(
            f"dynamic against control: {difference:+.2f} points, standard deviation {outcome.spread('difference'):.2f} "
            f"over {len(outcome.seeds)} seeds ({each}; {basis_of_it})"
        )
    else:
        out.print(f"dynamic against control: {difference:+.2f} points (one seed, {basis_of_it})")
    for note in outcome.notes:
        out.print(Text(f"note: {note}", style="dim"))
    out.print("latency: median for one image on this machine, both in turns; ± is the standard deviation over seeds")
    basis(out, dynamic.input_shape)


def probe_tables(out: Console, report: ProbeReport, data: str) -> None:
    """Print what interventions on pi do, in all layers and place by place, and what pi looks like."""
    plain = not out.is_terminal
    kernels = _range([layer.k for layer in report.layers])
    tau = _range([layer.tau for layer in report.layers])
    out.print(f"{report.label} on {data}: {len(report.layers)} dynamic layers, K = {kernels}, tau = {tau}")
    out.print(f"{report.images} images: one image is {100 / report.images:.2g} points")
    table = _table("attention, all layers", report.measure, "change", text=("attention, all layers",), plain=plain)
    table.add_row("learned", f"{report.learned:.2f} %", "")
    for name in INTERVENTIONS:
        effect = report.effect(name)
        table.add_row(_ATTENTION[name], f"{getattr(effect, report.measure):.2f} %", f"{report.difference(name):+.2f}")
    out.print(table)
    brief = len(report.layers) > _LONG
    _effects_table(out, report, brief, plain)
    _attention_table(out, report, brief, plain)
    for note in report.notes:
        out.print(Text(f"note: {note}", style="dim"))


_ATTENTION = {
    "averaged": "averaged over the kernels",
    "argmax": "largest kernel only (argmax)",
    "shuffled_within": "shuffled within each image",
    "shuffled_across": "shuffled across images",
}


def _effects_table(out: Console, report: ProbeReport, brief: bool, plain: bool) -> None:
    """Print the difference that each intervention makes in one place alone."""
    places = [place for place in report.places if place[0] != "all"]
    if not places:
        return
    groups = len(report.resolutions) > 1
    heads = [name.replace("shuffled_", "shuffled ") for name in INTERVENTIONS]
    title = f"replaced in one place alone: points of {report.measure} against learned, on {report.layer_images} images"
    table = _table("place", *heads, *(["elsewhere averaged"] * groups), text=("place",), plain=plain, title=title)
    for index, (scope, name) in enumerate(places):
        if brief and groups and scope == "layer":
            continue
        figures = [f"{report.difference(intervention, scope, name):+.2f}" for intervention in INTERVENTIONS]
        if scope == "resolution":
            figures.append(f"{report.difference(AVERAGED_ELSEWHERE, scope, name):+.2f}")
        last = index + 1 < len(places) and places[index + 1][0] != scope
        place = f"all that see {name}" if scope == "resolution" else name or "(the model)"
        table.add_row(place, *figures, end_section=last)
    out.print(table)


def _attention_table(out: Console, report: ProbeReport, brief: bool, plain: bool) -> None:
    """Print entropy and spread of pi and the distance of the kernels, by resolution and layer."""
    shares = "images by largest kernel, %"
    table = _table(
        "layer", "map", "entropy", "spread", "of classes", "distance", *([] if brief else [shares]),
        text=("layer",), plain=plain,
    )  # fmt: skip
    for resolution in report.resolutions:
        group = [layer for layer in report.layers if layer.resolution == resolution]
        if brief:
            table.add_row(f"mean of {len(group)} layers", resolution, *_figures(group))
            continue
        for number, layer in enumerate(group):
            share = " ".join(f"{100 * part:3.0f}" for part in layer.share)
            end = number + 1 == len(group) and resolution != report.resolutions[-1]
            table.add_row(layer.path or "(the model)", resolution, *_figures([layer]), share, end_section=end)
    out.print(table)
    out.print(
        "entropy of pi / log K: 1 is uniform; spread: standard deviation of pi over images, and of its class means; "
        "distance: of two kernels, relative to their mean" + "; every layer: --json, --out" * brief
    )


def _figures(layers: Sequence[LayerAttention]) -> list[str]:
    """Return the mean of each figure of the attention over layers."""
    figures = []
    for name, digits in (("entropy", 2), ("spread", 3), ("class_spread", 3), ("distance", 2)):
        values = [value for layer in layers if (value := getattr(layer, name)) is not None]
        figures.append(f"{sum(values) / len(values):.{digits}f}" if values else "-")
    return figures


def _range(values: Sequence[float]) -> str:
    least, most = min(values), max(values)
    return f"{least:g}" if least == most else f"{least:g} to {most:g}"


@dataclass(frozen=True)
class Step:
    """A line of :func:`steps_table`: a network, what it costs, and its accuracy in percent if it was measured."""

    name: str
    model: nn.Module
    report: CostReport
    accuracy: float | None


def steps_table(out: Console, name: str, steps: Sequence[Step], latency: Mapping[str, float]) -> None:
    """Print what each step made of a network."""
    measured = steps[0].accuracy is not None
    columns = ("network", *(("accuracy",) if measured else ()), "params", "Mult-Adds", "latency")
    table = _table(*columns, text=("network",), plain=not out.is_terminal, title=name)
    for step in steps:
        table.add_row(
            step.name,
            *((f"{step.accuracy:.2f} %",) if measured else ()),
            count(step.report.params),
            count(step.report.mult_adds.total),
            f"{latency[step.name]:.2f} ms",
        )
    out.print(table)
    out.print("latency: median for one image on this machine, all in turns")
    basis(out, steps[0].report.input_shape)


def demotion_table(out: Console, demotion: Demotion) -> None:
    """Print every dynamic layer with how much its kernel varies, and whether it is static now."""
    table = _table(
        "dynamic layer", "variation", "decision", text=("dynamic layer", "decision"), plain=not out.is_terminal
    )
    for path, varies in demotion.variation.items():
        dynamic = path in demotion.kept
        decision = "dynamic" if dynamic else "static"
        if dynamic and path == demotion.kept[0]:
            decision += f": {demotion.one_more:.2f} % as a static one"
        table.add_row(path or "(the model)", f"{varies:.2%}", decision, style=None if dynamic else "dim")
    out.print(table)
    out.print("variation: of the mixed kernel over images, relative to the mean one")
    out.print(
        f"{len(demotion.demoted)} of {len(demotion.variation)} dynamic layers are static now, which is approximate: "
        f"{demotion.measure} {demotion.before:.2f} % before and {demotion.after:.2f} % after, tolerance "
        f"{demotion.tolerance:g}; chosen and measured on the same {demotion.images} images, of which one is "
        f"{100 / demotion.images:.2f} points",
        soft_wrap=True,
    )


def recipes_table(out: Console, recipes: Sequence[Recipe]) -> None:
    """Print the recipes, a line each."""
    table = _table(
        "recipe", "model", "data", "epochs", "description",
        text=("recipe", "model", "data", "description"), plain=not out.is_terminal,
    )  # fmt: skip
    for recipe in recipes:
        epochs = str(recipe.finetune.epochs)
        table.add_row(recipe.name, recipe.model or "any", recipe.data or "any", epochs, recipe.description)
    out.print(table)
