"""One page of an evaluation: tables, plots, example episodes, and what each figure may be used for.

    python -m ivt_agents.evaluation.report runs/evaluation
    python -m ivt_agents.evaluation.report runs/evaluation --swaps runs/swaps

``evaluate.py`` writes the page itself; the command writes it again, for example with the overlay swaps of the
same policies. The page is one HTML file without scripts, which needs neither a server nor a network.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from tyro.conf import Positional

from ivt_agents.command import run_command
from ivt_agents.vlm.prompts import DEFAULT
from ivt_env.data.sample import DataError, DataMissingError, ImageArray
from ivt_env.episodes import Episode, Step, load_episodes
from ivt_env.failures import read_json
from ivt_env.files import asked_of, write_whole
from ivt_env.metrics.swaps import RIGHT_FROM as RIGHT
from ivt_env.metrics.swaps import SHARES
from ivt_env.metrics.table import difference, each_seed, headline, interval, number, own_gains, p_value, verdict
from ivt_env.viewer.images import ImageFinder
from ivt_env.viewer.page import image_jpeg

KINDS: tuple[tuple[str, str, Callable[[Episode], bool]], ...] = (
    ("corrected", "the first box was wrong, the answer is correct", lambda e: _first(e) < RIGHT <= e.final_iou),
    ("regressed", "the first box was correct, the answer is wrong", lambda e: e.final_iou < RIGHT <= _first(e)),
    ("refined", "correct from the start, and closer at the end", lambda e: RIGHT <= _first(e) < e.final_iou - 0.02),
    ("stopped too early", "stopped on a wrong box", lambda e: e.terminated and e.final_iou < RIGHT),
    ("missed", "the oracle's best box was correct, the answer is not", lambda e: e.final_iou < RIGHT <= _best(e)),
    ("unparsable", "an action that held no usable box", lambda e: any(s.parse_failure or s.invalid for s in e.steps)),
)
"""Outcomes that a reader should see: name, meaning, and which episodes are of it. An episode may be of several."""
PLOTS = {
    "accuracy_by_step.png": "Accuracy by step, every refinement made. Where refinement helps, it does not fall.",
    "before_after.png": "IoU of the first box against IoU of the answer. Below the diagonal refinement hurt.",
    "reliability.png": "What the policy states about its boxes against how often they were correct.",
    "groups.png": "By data set, size of the target's box and number of same-class distractors: "
    "first box and learned stop.",
    "training.png": "Training runs.",
}
COLUMNS = {
    "step_0": ("the first box", "what a single shot gives; the base of every difference", "-"),
    "last_step": ("the box after the last action, none left out", "what iterating blindly does", "a policy that stops"),
    "learned_stop": ("the current box when the policy stopped", "the headline", "-"),
    "box_stability": (
        "the first box that hardly differs from the one before it",
        "a rule that needs nothing but boxes",
        "-",
    ),
    "confidence_gated": (
        "the box shown when the stop probability first reached 0.5",
        "the stop at another threshold",
        "choosing that threshold on the split that is scored",
    ),
    "verifier_gated": (
        "the first box, unless the policy judged a later one better",
        "whether it can tell its boxes apart",
        "-",
    ),
    "random_step": ("each proposal with equal chance", "the baseline of every rule that chooses", "-"),
    "oracle_best": (
        "the box nearest to the target",
        "what was there to be chosen",
        "any claim of a gain: it looks at the target, and rises with every further step, of noise too",
    ),
}
"""Each column: which box is the answer, what it may be used for, and what not."""


@dataclass
class Args:
    """Write the report page of an evaluation."""

    folder: Positional[Path]
    """Where `evaluate.py` wrote: `results.json`, plots and `episodes/`."""
    swaps: Path | None = None
    """Where `python -m ivt_agents.evaluation.swaps` wrote; None: the page has no part about swaps."""
    data_root: Path | None = None
    """Folder of the real data sets, for the images of the examples."""
    out: Path | None = None
    """File of the page. None: `report.html` in the folder."""
    examples: int = 3
    """Episodes of each outcome and policy, the first ones of the split."""


def main(args: Args) -> Path:
    """Write the page; returns its path."""
    results = _read(args.folder / "results.json", "evaluate.py")
    folders = episode_folders(args.folder, results)
    runs = {name: load_episodes(folder) for name, folder in folders.items()}
    find = ImageFinder(runs, folders, args.data_root or results["args"]["data_root"])
    path = write_report(args.folder, runs, find, swaps=args.swaps, out=args.out, examples=args.examples)
    print(last_screen(results, path))
    return path


def last_screen(results: Mapping[str, Any], page: Path) -> str:
    """What a command ends with: what was played, a verdict for each policy, and where everything else is."""
    source = "saved episodes" if results["args"]["episodes"] else results["args"]["env"]
    return (
        f"{source}, served: {results['served']}, n = {_count(results)}\n\n{headline(results['audits'])}\n\n"
        f"report: {page}\nevery table, figure and episode: {results['args']['out']}"
    )


def write_report(
    folder: Path,
    episodes: Mapping[str, Sequence[Episode]],
    image_of: Callable[[Episode], ImageArray],
    *,
    swaps: Path | None = None,
    out: Path | None = None,
    examples: int = 3,
) -> Path:
    """Write the page of the evaluation in ``folder``, with ``examples`` of each outcome and policy; returns its path.

    ``episodes`` are those of the policies that examples are wanted of, by name, in the order of the split. Where
    ``image_of`` raises ``DataMissingError`` the page says so. ``swaps`` is a folder of overlay swaps.
    """
    results = _read(folder / "results.json", "evaluate.py")
    behaviour = _table(["figure", *results["audits"]], results["behaviour"])
    parts = [_verdicts(results), _made_of(results), _scores(results), _section("How the steps are used", behaviour)]
    parts.append(_plots(folder, PLOTS))
    if swaps is not None:
        parts.append(_swaps(swaps, results))
    parts += [_examples(episodes, image_of, examples), _methods()]
    head = f"served: {results['served']}, n = {_count(results)} samples. Intervals: 95 %, over images."
    title = f"Evaluation: {', '.join(results['policies'])}"
    template = Template(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    page = template.substitute(title=_text(title), head=_text(head), parts="\n".join(parts))
    path = out or folder / "report.html"
    write_whole(path, page.encode("utf-8", "xmlcharrefreplace"))
    return path


def _count(results: Mapping[str, Any]) -> int:
    return int(results["audits"][next(iter(results["audits"]))]["episodes"])


def _verdicts(results: Mapping[str, Any]) -> Html:
    """What a reader wants to know first: does refinement help, without labels?"""
    rows: list[list[Any]] = []
    for name, audit in results["audits"].items():
        gains = own_gains(audit)
        broke = [v for run in audit["runs"] if (v := run["broke"]["learned_stop"]["value"]) is not None]
        best = [g for g in audit["gains"] if g["oracle"] and g["metric"] == "Acc@0.5"]
        cells = [_difference(gains[m]) for m in ("Acc@0.5", "Acc@0.9", "mIoU")]
        oracle = Html(f'<span class="oracle">{_difference(best[0])}</span>') if best else "-"
        rows.append([name, "learned_stop", *cells, number(sum(broke) / len(broke)) if broke else "-", oracle])
    head = ["policy", "its answer", "Acc@0.5", "Acc@0.9", "mIoU", "regressed, % of correct", "oracle, Acc@0.5 *"]
    note = (
        "Each policy's answer minus its own first box, in points (IoU: as it is). n.s.: not significant, the interval "
        "holds zero. n too small: fewer than 10 images, too few to tell. * The oracle chooses with the target: the "
        "distance to it is what choosing costs, and it is never a result."
    )
    return _section("Does refinement help?", _table(head, rows, left=2, key=True), note)


def _made_of(results: Mapping[str, Any]) -> Html:
    """Where the figures come from: enough to make them again."""
    args, policies = results["args"], results["policies"]
    view = args["view"] or "own"
    played = f"{args['env']}, split {args['split']}, at most {args['episode_steps']} actions, view {view}"
    asks_servers = any("openai:" in source for sources in policies.values() for source in sources)
    lines = [
        *([f"policy {name}", ", ".join(sources)] for name, sources in policies.items()),
        *([["asked", f"prompts {args['prompt_file'] or DEFAULT}"]] if asks_servers else []),
        ["environment", "saved episodes" if args["episodes"] else played],
        ["served", results["served"]],
        ["samples", str(_count(results))],
        ["seed", str(args["seed"])],
        ["version", f"ivt-env {results.get('version', '-')}"],
        ["commit", results.get("commit") or "-"],
        ["date", results.get("date", "-")],
        ["machine", results.get("machine", "-")],
    ]
    return _section("Provenance", _table(["", ""], lines, left=2))


def _scores(results: Mapping[str, Any]) -> Html:
    rows: list[dict[str, Any]] = results["rows"]
    rules = list(dict.fromkeys(r["column"] for r in rows))
    policies = list(dict.fromkeys(r["policy"] for r in rows))
    tables = []
    for metric in rows[0]["scores"]:
        found = {(r["policy"], r["column"]): r for r in rows}
        lines = [
            [name, *(_value(found[name, r]["scores"][metric], metric) if (name, r) in found else "-" for r in rules)]
            for name in policies
        ]
        body = _table([metric, *(f"{r} *" if r == "oracle_best" else r for r in rules)], lines)
        shown = " open" if metric in ("Acc@0.5", "Acc@0.9") else ""
        tables.append(f"<details{shown}><summary>{_text(metric)}</summary>{body}</details>")
    against = [
        [c["a"], c["b"], c["metric"], _difference(c), number(c["difference"]["detectable"], c["metric"])]
        + [p_value(c["mcnemar"]), each_seed(c["by_seed"], c["metric"], sign=True)]
        for c in results["comparisons"]
        if not c["oracle"]
    ]
    head = ["a", "b", "metric", "a - b", "detectable", "McNemar p", "each seed"]
    tables.append(f"<details><summary>All paired differences</summary>{_table(head, against, left=3)}</details>")
    note = "In percent (mIoU: as it is), with 95 % intervals. * Chosen with the target box."
    return _section("Every rule", Html("".join(tables)), note)


def _plots(folder: Path, plots: Mapping[str, str]) -> Html:
    figures = []
    for name, caption in plots.items():
        if (folder / name).exists():
            encoded = base64.b64encode((folder / name).read_bytes()).decode("ascii")
            image = f'<div class="wide many"><img src="data:image/png;base64,{encoded}" alt="{_text(caption)}"></div>'
            figures.append(f"<figure>{image}<figcaption>{_text(caption)}</figcaption></figure>")
    return _section("Plots", Html("".join(figures)))


def _check_swaps(folder: Path, swaps: Mapping[str, Any], results: Mapping[str, Any]) -> None:
    """Refuse swaps of other policies or data than those of the page: they would be read as its own."""
    if swaps["served"] != results["served"]:
        raise DataError(
            f"{folder} holds swaps on {swaps['served']}, and the evaluation is of {results['served']}: make them with"
            f" --split {results['served'].rpartition('/')[2]}, or give another --swaps"
        )
    known = [source for of_name in results["policies"].values() for source in of_name]
    if results["args"]["episodes"]:  # saved episodes, which may not say of whom they are
        known = [(asked_of(folder) or {}).get("policy") for folder in known]
    for name, spec in swaps["policies"].items():
        bare = spec.removeprefix("vlm:")
        if None not in known and bare not in (one.removeprefix("vlm:") for one in known):
            raise DataError(
                f"{folder} holds swaps of {name}={spec}, and the evaluation is of {', '.join(known)}: make"
                " them of the same policies, or give another --swaps"
            )


def _swaps(folder: Path, evaluation: Mapping[str, Any]) -> Html:
    results = _read(folder / "results.json", "python -m ivt_agents.evaluation.swaps")
    _check_swaps(folder, results, evaluation)
    lines = [
        [row["policy"], row["step"], row["variant"], row["num"], number(row["shown_iou"], "IoU", digits=2)]
        + [_value(row[key], "share", digits=0) for key in SHARES]
        for row in results["variants"]
    ]
    head = ["policy", "step", "box drawn", "n", "its IoU", "stops", "keeps", "leaves", "towards target", "then correct"]
    depends = [
        [d["policy"], d["step"], d["name"], d["measure"], _value(d["value"], "IoU", digits=2)]
        + [number(d["null"], "IoU", digits=1), verdict(d["shown"], d["value"]["num_clusters"]) or "significant"]
        for d in results["dependence"]
    ]
    body: str = _table(head, lines, left=3)
    body += "<h3>Does the answer depend on how good the drawn box is?</h3>"
    body += _table(["policy", "step", "statistic", "of", "value", "if it did not", ""], depends, left=4)
    body += _plots(folder, {"swaps.png": "What the policy does, by the box that is drawn for it."})
    note = f"Another box is drawn for one action; served: {results['served']}. Shares in percent with 95 % intervals."
    return _section("Overlay swaps", Html(body), note)


def _examples(episodes: Mapping[str, Sequence[Episode]], image_of: Callable[[Episode], ImageArray], count: int) -> Html:
    blocks = []
    for place, (name, played) in enumerate(episodes.items()):
        found = []
        for kind, meaning, is_of in KINDS:
            of_kind = [e for e in played if is_of(e)]
            if not of_kind:
                continue
            share = f"{len(of_kind)} of {len(played)}"
            name_of_kind = f"p{place}-{kind.replace(' ', '-')}"
            strips = "".join(_strip(e, image_of, f"{name_of_kind}-{k}") for k, e in enumerate(of_kind[:count]))
            found.append(f"<h4>{_text(kind)}: {share}</h4><p>{_text(meaning)}</p>{strips}")
        shown = " open" if place == min(1, len(episodes) - 1) else ""  # the first that is not the base
        blocks.append(f"<details{shown}><summary>{_text(name)}</summary>{''.join(found)}</details>")
    note = "The first episodes of each outcome in the order of the split; nobody has chosen them. Green: the target."
    return _section("Episodes", Html("".join(blocks)), note)


def _strip(episode: Episode, image_of: Callable[[Episode], ImageArray], name: str) -> str:
    """One episode: the image once for each action, with the target, the box before and the box after it."""
    height, width = episode.size
    try:
        jpeg = base64.b64encode(image_jpeg(image_of(episode), episode, 384)).decode("ascii")
    except DataMissingError as error:
        return f'<p class="missing">{_text(str(error))}</p>'
    # The page holds the image once; every panel refers to it.
    source = f'<image id="{name}" width="{width}" height="{height}" href="data:image/jpeg;base64,{jpeg}"/>'
    panels, before = [], episode.initial_box
    for place, step in enumerate(episode.steps):
        image = source if place == 0 else f'<use href="#{name}"/>'
        drawn = _rectangle(episode.target, episode.size, "target")
        drawn += _rectangle(before, episode.size, "before") + _rectangle(step.box, episode.size, "after")
        label = f"step {place}: {_said(step)}, IoU {step.iou:.2f}"
        panels.append(
            f'<figure class="panel"><svg viewBox="0 0 {width} {height}" role="img" aria-label="{_text(label)}">'
            f"{image}{drawn}</svg><figcaption>{_text(label)}</figcaption></figure>"
        )
        before = step.box
    return f'<div class="episode"><p>“{_text(episode.expression)}”</p><div class="strip">{"".join(panels)}</div></div>'


def _said(step: Step) -> str:
    if step.parse_failure or step.invalid is not None:
        return "unparsable" if step.parse_failure else f"refused ({step.invalid})"
    return "stop" if step.stop else "box"


def _rectangle(box: Sequence[float] | None, size: tuple[int, int], kind: str) -> str:
    if box is None:
        return ""
    height, width = size
    x1, y1, x2, y2 = (v * side for v, side in zip(box, (width, height) * 2, strict=True))
    place = f'x="{x1:.1f}" y="{y1:.1f}" width="{max(0.0, x2 - x1):.1f}" height="{max(0.0, y2 - y1):.1f}"'
    return f'<rect class="{kind}" {place}/>'


def _methods() -> Html:
    lines = [[Html(f"<code>{_text(name)}</code>"), *said] for name, said in COLUMNS.items()]
    body: str = _table(["column", "the answer", "use it for", "not for"], lines, left=4)
    body += (
        "<p>Every policy is played twice on the same samples: with its stop honoured, and made to take every "
        "refinement. A box is correct from IoU 0.5 on, unless a metric names another threshold. An action that cannot "
        "be parsed or whose box is refused keeps the current box and uses up the action; no episode is left out. "
        "<em>Regressed</em>: of the correct first boxes, the answers that are wrong. Intervals are "
        "percentile bootstraps over whole images, paired for differences; of several seeds the mean is taken "
        "first, so the interval is for these seeds on other images, and how seeds differ stands under <em>each "
        "seed</em>. McNemar's test takes samples as independent: where several share an image, go by the interval. "
        "Many comparisons stand on this page without correction: name beforehand the one that matters.</p>"
    )
    return _section("What each column may be used for", Html(body))


def episode_folders(folder: Path, results: Mapping[str, Any]) -> dict[str, Path]:
    """The stopping episodes of each policy's first seed, where they were saved."""
    found = {name: Path(seeds[0]) for name, seeds in results["policies"].items()}
    if not results["args"]["episodes"]:  # they were played, not given
        for name, seeds in results["policies"].items():
            found[name] = folder / "episodes" / (name if len(seeds) == 1 else f"{name}-seed0")
    return {name: path for name, path in found.items() if path.exists()}


def _read(path: Path, maker: str) -> Any:
    if not path.exists():
        raise DataError(f"{path} is not there: give a folder that {maker} has written")
    found = read_json(path, f"was {maker} cut off?", DataError)
    if "episode_steps" not in found.get("args", {}):
        raise DataError(f"{path} is of another version of this project: run {maker} again")
    return found


def _first(episode: Episode) -> float:
    return episode.steps[0].iou if episode.steps else 0.0


def _best(episode: Episode) -> float:
    return max((s.iou for s in episode.steps), default=0.0)


def _value(value: Mapping[str, Any], metric: str, digits: int | None = None) -> Html:
    """A score, its interval below it."""
    ends = interval(value["low"], value["high"], metric, digits=digits)
    return Html(f"{number(value['value'], metric, digits=digits)} <small>{'' if ends == '-' else ends}</small>")


def _difference(comparison: Mapping[str, Any]) -> Html:
    """A difference with its verdict and interval."""
    d, metric = comparison["difference"], comparison["metric"]
    kind = ("gain" if d["diff"] > 0 else "loss") if d["shown"] else "open"
    value = difference(d["diff"], d["shown"], d["num_clusters"], metric)
    ends = interval(d["low"], d["high"], metric, sign=True)
    return Html(f'<span class="{kind}">{value} <small>{ends}</small></span>')


class Html(str):
    """Markup. Whatever else reaches the page is text, and ``_text`` escapes it."""


def _text(value: Any) -> str:
    return value if isinstance(value, Html) else html.escape(str(value))


def _table(head: Sequence[Any], lines: Sequence[Sequence[Any]], left: int = 1, key: bool = False) -> Html:
    """A table; the first ``left`` columns are text. On a phone a ``key`` table stands as cards, others scroll."""
    kinds = ["text" if k < left else "number" for k in range(len(head))]
    names = [_text(name) for name in head]
    top = "".join(f'<th class="{kind}">{name}</th>' for kind, name in zip(kinds, names, strict=True))
    body = ""
    for cells in lines:
        named = zip(kinds, names, cells, strict=True)
        row = "".join(f'<td class="{kind}" data-name="{name}">{_text(cell)}</td>' for kind, name, cell in named)
        body += f"<tr>{row}</tr>"
    table = f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    kind = "key" if key else "wide many" if len(head) > 3 else "wide"
    return Html(f'<div class="{kind}">{table}</div>')


def _section(title: str, body: Html, note: str = "") -> Html:
    under = f"<p>{_text(note)}</p>" if note else ""
    return Html(f"<section><h2>{_text(title)}</h2>{under}{_text(body)}</section>")


if __name__ == "__main__":
    run_command(main, Args)
