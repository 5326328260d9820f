"""``ivt score``: score a file of predictions without the model that made them.

    ivt score predictions.jsonl --dataset refcocog --split test --format xyxy --frame px
    ivt score cogvlm_grounding_pred.json --layout refl4 --extra ignore --dataset refl4 --split test
    ivt score qwen3a4b_direct_predictions.jsonl --layout refadv --dataset refadv --split test --json

It prints one common rule for every data set and, beside it, the rule under which the benchmark's
published numbers were made; ``ivt_env.metrics.benchmarks`` says what they are. What the numbers of a
box mean is declared, never guessed; ``ivt_env.metrics.predictions`` says what a file looks like.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ivt_env.data import NAMES, load_dataset
from ivt_env.data.sample import Sample
from ivt_env.failures import read_json
from ivt_env.metrics.benchmarks import OWN_RULES, RULES, legend, results_table, score
from ivt_env.metrics.predictions import FORMATS, FRAMES, LAYOUTS, PredictionError, match, read_predictions
from ivt_env.metrics.table import as_json

_MOST_SAMPLES = 500_000
"""More samples than this are not meant to be scored whole (the embedded scenes have no end)."""
_MOST_RESAMPLES = 100_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``ivt score`` to ``parser``."""
    parser.add_argument("predictions", type=Path, metavar="PREDICTIONS", help="JSON lines, or one JSON array")
    data = parser.add_argument_group("data set")
    data.add_argument("--dataset", required=True, choices=NAMES, metavar="NAME", help=f"one of {', '.join(NAMES)}")
    data.add_argument("--split", required=True, help="its split; never assumed")
    data.add_argument(
        "--data-root", type=Path, metavar="FOLDER", help="folder of the real data sets (default: the variable IVT_DATA)"
    )
    data.add_argument("--samples", type=int, metavar="N", help="the first N samples only (default: the whole split)")
    file = parser.add_argument_group("what the file holds (declared, never guessed)")
    file.add_argument("--format", choices=FORMATS, dest="box_format", help="what the numbers are")
    file.add_argument(
        "--frame",
        metavar=f"{{{','.join(FRAMES)},N}}",
        help="what they are measured in; N: 0 to N, such as 999; resized needs input_size in each row",
    )
    file.add_argument("--layout", choices=LAYOUTS, default="ivt", help="a published layout (default: %(default)s)")
    file.add_argument("--id-field", help="field of the sample's id (default: the layout's)")
    file.add_argument("--box-field", help="field of the box (default: the layout's)")
    file.add_argument("--missing", choices=("error", "miss"), default="error", help="samples without a prediction")
    file.add_argument("--extra", choices=("error", "ignore"), default="error", help="predictions without a sample")
    file.add_argument(
        "--trust-declaration",
        action="store_true",
        help="score even where many boxes contradict the declared format or frame",
    )
    rules = parser.add_argument_group("rules and output")
    rules.add_argument(
        "--rule",
        choices=("auto", *RULES),
        default="auto",
        help="the rule beside the common one; auto: the benchmark's own (default: %(default)s)",
    )
    rules.add_argument("--category-map", type=Path, help="JSON object refcoco_k -> o365_m, for refl4's class averages")
    rules.add_argument(
        "--resamples", type=int, default=1000, help="bootstrap resamples of the intervals, 0 for none (%(default)s)"
    )
    rules.add_argument("--seed", type=int, default=0, help="of the intervals (default: %(default)s)")
    rules.add_argument("--json", action="store_true", help="print JSON and nothing else")


def run(args: argparse.Namespace) -> int:
    """Score and print; the exit status."""
    for option, value, least in (
        ("--samples", args.samples, 1),
        ("--resamples", args.resamples, 0),
        ("--seed", args.seed, 0),
    ):
        if value is not None and value < least:
            raise PredictionError(f"{option} {value}: give {least} or more")
    if args.resamples > _MOST_RESAMPLES:
        raise PredictionError(f"--resamples {args.resamples}: give {_MOST_RESAMPLES} or fewer; 1000 are plenty")
    # Before the data set, which may take a minute to open.
    file = read_predictions(
        args.predictions,
        args.layout,
        box_format=args.box_format,
        frame=args.frame,
        id_field=args.id_field,
        box_field=args.box_field,
    )
    mapping = _category_map(args.category_map) if args.category_map else None
    samples, total = _samples(args)
    matched = match(file, samples, missing=args.missing, extra=args.extra, trust=args.trust_declaration)
    own = OWN_RULES.get(args.dataset, ()) if args.rule == "auto" else (args.rule,)
    results = [
        score(name, matched.boxes_px, samples, category_map=mapping, resamples=args.resamples, seed=args.seed)
        # A point overlaps nothing.
        for name in (["hit"] if file.rows[0].box_format == "xy" else dict.fromkeys(("common", *own)))
    ]
    dataset, split, images = samples[0].dataset, samples[0].split, len({sample.image_id for sample in samples})
    if args.json:
        record = {
            "dataset": dataset,
            "split": split,
            "samples": len(samples),
            "samples_of_split": total,
            "images": images,
            "predictions": str(file.path),
            "layout": args.layout,
            "declared": file.declared,
            "missing": matched.missing,
            "parse_failures": matched.parse_failures,
            "without_area": matched.without_area,
            "ignored": matched.ignored,
            "interval": {"level": 0.95, "resamples": args.resamples, "seed": args.seed, "clusters": "image"},
            "rules": {result.name: result for result in results},
        }
        print(json.dumps(as_json(record), indent=2, allow_nan=False))
        return 0
    part = "" if len(samples) == total else f" (the first of {total})"
    print(f"{dataset} {split}: {len(samples)} samples{part}, {images} images")
    print(f"{file.path}: {len(file.rows)} predictions, boxes declared as {file.declared}")
    print(
        f"counted as misses: {matched.missing} missing, {matched.parse_failures} parse failures; "
        f"boxes without area: {matched.without_area}; rows of no sample, ignored: {matched.ignored}"
    )
    if args.rule == "auto" and args.dataset not in OWN_RULES:
        print(f"{args.dataset} has no rule of its own; --rule names another")
    if args.resamples:
        print(f"[intervals]: 95 %, bootstrap over whole images, {args.resamples} resamples")
    print("\n".join([*legend(results), "", results_table(results)]))
    return 0


def _samples(args: argparse.Namespace) -> tuple[list[Sample], int]:
    """The samples to score, and how many the split has."""
    dataset = load_dataset(args.dataset, args.split, args.data_root, strict=True)
    total = len(dataset)
    count = total if args.samples is None else args.samples
    if count > total:
        raise PredictionError(f"--samples {count}: {args.dataset} {args.split} has {total}")
    if args.samples is None and total > _MOST_SAMPLES:
        raise PredictionError(f"{args.dataset} {args.split} has {total} samples: say how many with --samples N")
    return [dataset[number] for number in range(count)], total


def _category_map(path: Path) -> dict[str, str]:
    content = read_json(path, "write an object refcoco_k -> o365_m", PredictionError)
    if not content:
        raise PredictionError(f"{path}: not a JSON object with entries; write one of refcoco_k -> o365_m")
    for key, value in content.items():
        if not key.startswith("refcoco_") or not isinstance(value, str) or not value.startswith("o365_"):
            raise PredictionError(f"{path}: {key!r}: {value!r} does not map a refcoco_k to an o365_m; correct it")
    return content
