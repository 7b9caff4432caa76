"""Rules: which sites become dynamic, and the reason for every yes and no.

A rule is a function ``(site, graph, selection) -> reason to stay static, or None`` in :data:`RULES`; the first that
speaks decides. Called by :mod:`dysurgery.plan`; knows nothing of the operator.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import fx

from dysurgery.errors import UsageError, did_you_mean
from dysurgery.graph import is_global_pool, join
from dysurgery.trace import ConvGraph, ConvSite

PRESETS = {
    "all-but-first": "every convolution but the first (the paper's text)",
    "blocks": "also static: a 1x1 whose output goes straight to the global pool (the paper's MobileNetV2 table)",
    "all": "every convolution, those on 1x1 maps too",
}
KINDS = ("pointwise", "depthwise", "dense")


@dataclass(frozen=True)
class Selection:
    """What to select.

    Args:
        layers: a preset, a key of :data:`PRESETS`.
        include: regular expressions; if any is given, a site's path (or an alias) must match one (``re.search``).
        exclude: regular expressions; a match stays static.
        kinds: which of :data:`KINDS`.
        linear: whether Linear layers are selected too, the classifier among them (except under ``blocks``).

    Raises:
        UsageError: for an unknown preset or kind, or an invalid expression.
    """

    layers: str = "all-but-first"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    kinds: tuple[str, ...] = KINDS
    linear: bool = False

    def __post_init__(self) -> None:
        if self.layers not in PRESETS:
            hint = did_you_mean(self.layers, PRESETS)
            raise UsageError(f"unknown preset {self.layers!r}: expected one of {', '.join(PRESETS)}{hint}")
        for kind in self.kinds:
            if kind not in KINDS:
                hint = did_you_mean(kind, KINDS)
                raise UsageError(f"unknown kind {kind!r}: expected one of {', '.join(KINDS)}{hint}")
        if not self.kinds:
            raise UsageError(f"no kind is named: expected some of {', '.join(KINDS)}")
        for pattern in (*self.include, *self.exclude):
            try:
                re.compile(pattern)
            except re.error as error:
                raise UsageError(f"{pattern!r} is no regular expression: {error}") from error


@dataclass(frozen=True)
class Decision:
    """Whether one site becomes dynamic, and why or why not."""

    site: ConvSite
    dynamic: bool
    reason: str


Rule = Callable[[ConvSite, ConvGraph, Selection], str | None]


def already_dynamic(site: ConvSite, graph: ConvGraph, selection: Selection) -> str | None:
    """A second conversion finds nothing to do."""
    return "already dynamic" if site.dynamic else None


def refused(site: ConvSite, graph: ConvGraph, selection: Selection) -> str | None:
    """What no handler covers is skipped, never guessed."""
    return site.refusal


def never_called(site: ConvSite, graph: ConvGraph, selection: Selection) -> str | None:
    """An auxiliary head that only training uses: it could not be verified."""
    return None if site.calls else "not called on the example"


def filtered(site: ConvSite, graph: ConvGraph, selection: Selection) -> str | None:
    """The person's own patterns; exclude wins."""
    for pattern in selection.exclude:
        if _matches(pattern, site):
            return f"excluded by {pattern!r}"
    if selection.include and not any(_matches(pattern, site) for pattern in selection.include):
        return "not included"
    return None


def other_kind(site: ConvSite, graph: ConvGraph, selection: Selection) -> str | None:
    """The person's own kinds; they do not speak of Linear layers."""
    return None if site.kind == "linear" or site.kind in selection.kinds else f"kind {site.kind}"


def first(site: ConvSite, graph: ConvGraph, selection: Selection) -> str | None:
    """The first convolution sees the image: three channels tell an attention little."""
    if selection.layers == "all" or site.kind == "linear":
        return None
    stem = next(s for s in graph.sites if s.kind != "linear")
    return "first convolution" if site is stem else None


def on_one_pixel(site: ConvSite, graph: ConvGraph, selection: Selection) -> str | None:
    """Squeeze-excite layers and heads after the pool: K kernels to mix for a single pixel never pay."""
    return "sees a 1x1 map" if selection.layers != "all" and site.sees_one_pixel else None


def head(site: ConvSite, graph: ConvGraph, selection: Selection) -> str | None:
    """Under ``blocks``, what follows the blocks: the last 1x1 before the global pool, and the classifier."""
    if selection.layers != "blocks":
        return None
    if site.kind == "linear":
        return "classifier" if site is [s for s in graph.sites if s.calls][-1] else None
    return "last 1x1 before the global pool" if site.path == _feeds_the_pool(graph) else None


RULES: tuple[Rule, ...] = (
    already_dynamic, refused, never_called, filtered, other_kind, first, on_one_pixel, head,
)  # fmt: skip


def select(graph: ConvGraph, selection: Selection) -> tuple[Decision, ...]:
    """Decide every site of ``graph``.

    Raises:
        UsageError: if a pattern matches no site.
    """
    _check_patterns(graph.sites, selection)
    decisions = []
    for site in graph.sites:
        reason = next((why for rule in RULES if (why := rule(site, graph, selection))), None)
        decisions.append(Decision(site, reason is None, reason or _why_dynamic(site, selection)))
    return tuple(decisions)


def _why_dynamic(site: ConvSite, selection: Selection) -> str:
    pattern = next((p for p in selection.include if _matches(p, site)), None)
    return f"included by {pattern!r}" if pattern else selection.layers


def _matches(pattern: str, site: ConvSite) -> bool:
    return any(re.search(pattern, name) for name in site.names)


def _check_patterns(sites: Iterable[ConvSite], selection: Selection) -> None:
    sites = tuple(sites)
    patterns = (*selection.include, *selection.exclude)
    counts = {pattern: sum(_matches(pattern, site) for site in sites) for pattern in patterns}
    for pattern, count in counts.items():
        if count == 0:
            raise UsageError(
                f"no convolution matches {pattern!r}{_near(pattern, sites)}; "
                f"matches per pattern: {', '.join(f'{p!r} {n}' for p, n in counts.items())} "
                f"of {len(sites)} convolutions"
            )


def _near(pattern: str, sites: tuple[ConvSite, ...]) -> str:
    """Name the module paths that resemble the pattern, with how many convolutions each holds."""
    parents: dict[str, int] = {}
    for site in sites:
        parts = site.path.split(".")
        for i in range(len(parts)):
            for name in {".".join(parts[: i + 1]), parts[i]}:
                parents[name] = parents.get(name, 0) + 1
    plain = re.sub(r"\\.", ".", pattern).strip("^$.*+?()[]|\\ ")
    hint = did_you_mean(plain, parents, count=1)
    name = hint[len(" (did you mean '") : -len("'?)")]
    return f"{hint[:-1]} {parents[name]} convolutions)" if hint else f"; the modules are named like {sites[0].path!r}"


def _feeds_the_pool(graph: ConvGraph) -> str | None:
    """Return the path of the pointwise convolution whose output reaches the last global pool alone, if there is one."""
    paths = {name: site for site in graph.sites for name in site.names if site.kind == "pointwise"}
    for prefix, module in reversed(list(graph.graphs.items())):
        pools = [node for node in module.graph.nodes if is_global_pool(node)]
        node: fx.Node | None = pools[-1] if pools else None
        while node is not None:
            inputs = node.all_input_nodes
            node = inputs[0] if len(inputs) == 1 and len(inputs[0].users) == 1 else None
            if node is None:
                break
            target = join(prefix, str(node.target))
            if node.op == "call_module" and target in paths:
                return paths[target].path
    return None
