"""The eight GLUE tasks: their official files, labels and metrics."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Task(NamedTuple):
    folder: str
    # Columns by their names in a header, or by their numbers where a file has none.
    texts: tuple[str, ...] | tuple[int, ...]
    label: str | int
    # None for a regression.
    labels: tuple[str, ...] | None
    # The first is what the papers report.
    metrics: tuple[str, ...]
    # {suffix of a metric's name: file}
    heldout: dict[str, str] = {"": "dev.tsv"}


BINARY = ("0", "1")
ENTAILMENT = ("entailment", "not_entailment")
TASKS = {
    "cola": Task("CoLA", (3,), 1, BINARY, ("matthews",)),
    "sst2": Task("SST-2", ("sentence",), "label", BINARY, ("accuracy",)),
    "mrpc": Task("MRPC", ("#1 String", "#2 String"), "Quality", BINARY, ("accuracy", "f1")),
    "qqp": Task("QQP", ("question1", "question2"), "is_duplicate", BINARY, ("accuracy", "f1")),
    "stsb": Task("STS-B", ("sentence1", "sentence2"), "score", None, ("pearson", "spearman")),
    "mnli": Task(
        "MNLI",
        ("sentence1", "sentence2"),
        "gold_label",
        ("entailment", "neutral", "contradiction"),
        ("accuracy",),
        {"_m": "dev_matched.tsv", "_mm": "dev_mismatched.tsv"},
    ),
    "qnli": Task("QNLI", ("question", "sentence"), "label", ENTAILMENT, ("accuracy",)),
    "rte": Task("RTE", ("sentence1", "sentence2"), "label", ENTAILMENT, ("accuracy",)),
}


class Part(NamedTuple):
    texts: list[tuple[str, ...]]
    # Numbers of classes, or scores.
    labels: list[int] | list[float]


def read(task: Task, path: Path) -> Part:
    """A file of a task, refused in one line where it is not one. Lines that lack columns, as QQP has, are left out."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path} cannot be read: {error}") from error
    columns = (*task.texts, task.label)
    if isinstance(task.label, str):
        # Some of the published files begin with a byte-order mark.
        header = [name.lstrip("\ufeff") for name in rows.pop(0)] if rows else []
        if missing := [name for name in columns if name not in header]:
            raise SystemExit(f"{path} must have the columns {', '.join(map(str, columns))}, got none of {missing[0]}")
        columns = tuple(header.index(name) for name in columns)
    texts, labels = [], []
    for number, row in enumerate(rows, 1):
        if len(row) > max(columns):
            texts.append(tuple(row[column] for column in columns[:-1]))
            labels.append(_label(task, row[columns[-1]], path, number))
    if not texts:
        raise SystemExit(f"{path} must have at least one row of {max(columns) + 1} columns, got none")
    return Part(texts, labels)


def _label(task: Task, text: str, path: Path, number: int) -> int | float:
    try:
        return float(text) if task.labels is None else task.labels.index(text)
    except ValueError:
        expected = "a number" if task.labels is None else f"one of {', '.join(task.labels)}"
        raise SystemExit(f"{path}, row {number}: the label must be {expected}, got {text!r}") from None


def files(task: Task, root: Path) -> dict[str, Path]:
    """{"train" or the suffix of a held-out part: its file}; `root` holds the tasks' folders, or is one of them."""
    folder = root if root.name == task.folder else root / task.folder
    found = {"train": folder / "train.tsv"} | {suffix: folder / name for suffix, name in task.heldout.items()}
    if missing := [str(path) for path in found.values() if not path.is_file()]:
        raise SystemExit(f"--data must be a folder with {task.folder}'s official files, got none at {missing[0]}")
    return found


def score(task: Task, predictions, labels, suffix: str = "") -> dict[str, float]:
    """{metric: value} of a held-out part; predictions are logits (n, classes), or (n, 1) for a regression."""
    chosen = predictions.argmax(-1) if task.labels else predictions.reshape(-1)
    return {f"{name}{suffix}": float(_METRICS[name](labels, chosen)) for name in task.metrics}


def _sklearn(name: str) -> Callable[[Any, Any], float]:
    def metric(labels, predictions):
        import sklearn.metrics

        return getattr(sklearn.metrics, name)(labels, predictions)

    return metric


def _scipy(name: str) -> Callable[[Any, Any], float]:
    def metric(labels, predictions):
        import scipy.stats

        return getattr(scipy.stats, name)(labels, predictions).statistic

    return metric


_METRICS = {
    "accuracy": _sklearn("accuracy_score"),
    "f1": _sklearn("f1_score"),
    "matthews": _sklearn("matthews_corrcoef"),
    "pearson": _scipy("pearsonr"),
    "spearman": _scipy("spearmanr"),
}
