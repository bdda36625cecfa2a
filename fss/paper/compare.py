"""The numbers of runs next to those of a table of the paper."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from fss.paper.plan import PlannedRun
from fss.paper.runs import origin
from fss.paper.tables import FOLDS, Published, Table


def compared_rows(table: Table, runs: list[PlannedRun]) -> Iterator[dict[str, Any]]:
    """Yield the rows of the result: ours and the paper's by shots and fold, in percent."""
    for row in table.rows:
        for shots, published in row.paper.items():
            own = [run for run in runs if run.row is row and run.shots == shots]
            if not own:
                continue
            found = {run.fold: run.test[table.metric] for run in own if run.test is not None}
            scores = {fold: 100 * score["mean"] for fold, score in found.items()}
            stds = {fold: score["std"] for fold, score in found.items()}
            yield {
                "label": row.label,
                "run": row.run,
                "shots": shots,
                "note": row.note,
                "paper": published._asdict(),
                "folds": scores,
                "folds_std": {fold: 100 * std for fold, std in stds.items() if std is not None},
                "mean": statistics.fmean(scores.values()) if scores else None,
                **_difference(scores, published),
                "not_run": {
                    run.fold: run.reason or "not run yet" for run in own if run.test is None
                },
            }


def _difference(scores: dict[int, float], published: Published) -> dict[str, Any]:
    """Subtract the paper's numbers from ours: by fold, and the means over the folds that ran.

    What the paper does not give is left out, or None.
    """
    by_fold = published.folds and {f: score - published.folds[f] for f, score in scores.items()}
    if len(scores) == FOLDS:
        theirs: float | None = published.mean
    elif scores and published.folds is not None:
        theirs = statistics.fmean(published.folds[fold] for fold in scores)
    else:
        theirs = None
    ours = statistics.fmean(scores.values()) if scores else None
    known = ours is not None and theirs is not None
    return {
        "folds_difference": by_fold or {},
        "paper_of_these_folds": theirs,
        "difference": ours - theirs if known else None,
    }


def markdown(result: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of the table, from what `fss.paper.reproduce.reproduce` returns."""
    metric = {"miou": "mIoU", "fb_iou": "FB-IoU"}[result["metric"]]
    yield f"# {result['table']}: {result['title']}"
    yield ""
    if result["scaled_down"]:
        yield (
            f"**Scaled down: {result['scaled_down']}. This shows that the table works; the numbers "
            "say nothing of the paper's.**"
        )
        yield ""
    yield f"| | shots | fold 0 | fold 1 | fold 2 | fold 3 | {metric} | paper | difference |"
    yield "| --- | ---: |" + " ---: |" * 7
    for row in result["rows"]:
        theirs, differences = row["paper"]["folds"] or [None] * FOLDS, row["folds_difference"]
        cells = [
            f"{_number(row['folds'].get(fold))} / {_number(theirs[fold])}"
            + (f" ({differences[fold]:+.2f})" if fold in differences else "")
            for fold in range(FOLDS)
        ]
        mean = f"**{_number(row['mean'])}**"
        difference = _number(row["difference"], "+")
        cells += [mean, _number(row["paper"]["mean"]), difference]
        mark = " (scaled down)" if result["scaled_down"] else ""
        yield f"| {row['label']}{mark} | {row['shots']} | {' | '.join(cells)} |"
    yield ""
    yield (
        "Percent, ours / the paper's (difference); the mean is over the folds that ran, the last "
        "column its difference to the paper's mean over the same ones."
    )
    if result["settings"]:
        changed = ", ".join(f"{name} {value}" for name, value in result["settings"].items())
        yield f"Set in every run, whatever the table says: {changed}."
    for row in result["rows"]:
        if row["note"]:
            yield f"{row['label']}: {row['note']}."
    for name, scores in result["base_learners"].items():
        folds = ", ".join(f"fold {fold} {miou:.2f}" for fold, miou in scores.items())
        yield f"BAM's base learner {name}, mIoU of the base classes: {folds}."
    reasons: dict[str, list[str]] = {}
    for row in result["rows"]:
        for fold, reason in row["not_run"].items():
            reasons.setdefault(reason, []).append(f"{row['label']} {row['shots']}-shot fold {fold}")
    if reasons:
        yield ""
        yield "Not run:"
        yield ""
        for reason, names in reasons.items():
            yield f"- {'; '.join(names)}: {reason}"
    yield from origin(result)


def _number(value: float | None, sign: str = "") -> str:
    return "–" if value is None else f"{value:{sign}.2f}"
