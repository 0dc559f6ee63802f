"""Text to learn from: pairs of a query and a response, or plain text, and their tokens."""

import ast
import json
import math
import random
import sysconfig
import tokenize
from pathlib import Path
from typing import NamedTuple

from .arguments import NEEDS
from .sources import check_on_hub

HELDOUT_SHARE = 0.1
# Characters of an example that is cut out of a plain text.
PASSAGE = 800


class Example(NamedTuple):
    query: str  # empty for plain text, of which every token is learnt
    response: str


def stdlib_examples(root: Path) -> dict[str, list[Example]]:
    """{top-level module: [signature -> first paragraph of its docstring]} of the Python files under root.

    Nothing of it is kept on disk: the text stays under the licence of the Python that is installed.
    """
    skipped = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages"}
    modules: dict[str, list[Example]] = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if skipped.isdisjoint(parts):
            with tokenize.open(path) as file:
                scope = [part for part in parts if part != "__init__"]
                modules.setdefault(parts[0], []).extend(documented_functions(ast.parse(file.read()), scope))
    return {name: examples for name, examples in modules.items() if examples}


def documented_functions(node: ast.AST, scope: list[str]):
    """The examples of all functions and methods below node, whose dotted name is scope."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        name = [*scope, child.name]
        if not isinstance(child, ast.ClassDef):
            summary = " ".join((ast.get_docstring(child) or "").split("\n\n")[0].split())
            if 20 <= len(summary) <= 200:
                yield Example(f"{'.'.join(name)}({ast.unparse(child.args)})", summary)
        yield from documented_functions(child, name)


def split_by_module(modules: dict[str, list[Example]], per_module: int = 40) -> tuple[list[Example], list[Example]]:
    """(train, held-out): a tenth of the modules is held out, with no docstring that a training module has too."""
    names = sorted(modules)
    random.Random(0).shuffle(names)
    count = max(1, round(HELDOUT_SHARE * len(names)))
    # A few modules hold most functions: take so many of each at most.
    heldout, train = (
        [e for name in part for e in random.Random(name).sample(modules[name], min(per_module, len(modules[name])))]
        for part in (names[:count], names[count:])
    )
    known = {e.response for e in train}
    return train, [e for e in heldout if e.response not in known]


def read_rows(source: str, option: str = "--data", configuration: str | None = None, split: str = "train") -> list:
    """The rows of a JSONL file, the passages of a plain text, or the rows of a split of a hub dataset."""
    if source.endswith(".txt"):
        return [{"text": passage} for passage in _passages(source, option)]
    if source.endswith((".json", ".jsonl")) or Path(source).is_file():
        try:
            lines = Path(source).read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise SystemExit(f"{option} {source} cannot be read: {error}") from error
        return [_read_line(source, option, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not Path(source).is_dir():
        check_on_hub(option, source, "dataset")
    try:
        import datasets
    except ImportError as error:
        raise SystemExit(f"{option} {source} needs: {NEEDS}") from error
    try:
        return list(datasets.load_dataset(source, configuration, split=split))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise SystemExit(f"{option} {source} cannot be loaded: {error}") from error


def _passages(source: str, option: str) -> list[str]:
    """Paragraphs, so many together that they make a passage."""
    try:
        paragraphs = Path(source).read_text(encoding="utf-8").split("\n\n")
    except (OSError, ValueError) as error:
        raise SystemExit(f"{option} {source} cannot be read: {error}") from error
    passages = [""]
    for paragraph in paragraphs:
        passages[-1] += paragraph.strip() + "\n\n"
        if len(passages[-1]) >= PASSAGE:
            passages.append("")
    return [passage.strip() for passage in passages if passage.strip()]


def _read_line(source: str, option: str, number: int, line: str):
    try:
        return json.loads(line)
    except ValueError as error:
        raise SystemExit(f"{option} {source}, line {number} is not JSON: {error}") from error


def row_example(number: int, row: dict, query: str, response: str) -> Example:
    columns = (query, response) if isinstance(row, dict) and {query, response} <= row.keys() else ("text",)
    if not isinstance(row, dict) or columns[0] not in row:
        got = ", ".join(row) if isinstance(row, dict) else json.dumps(row)[:40]
        raise SystemExit(f"--data: example {number} must have {query} and {response}, or text, got {got}")
    for column in columns:
        if not isinstance(row[column], str):
            kind = type(row[column]).__name__
            raise SystemExit(f"--data: {column} of example {number} must be a string, got {kind}")
    return Example(row[query], row[response]) if len(columns) == 2 else Example("", row["text"])


def load_examples(args) -> tuple[list[Example], list[Example]]:
    """(train, held-out), each in an order that depends on nothing but the data."""
    if args.data == "stdlib":
        train, heldout = split_by_module(stdlib_examples(Path(sysconfig.get_path("stdlib"))))
    else:
        rows = read_rows(args.data)
        examples = [row_example(number, row, *args.columns) for number, row in enumerate(rows, 1)]
        random.Random(0).shuffle(examples)
        count = min(args.heldout_size, math.ceil(HELDOUT_SHARE * len(examples)))
        train, heldout = examples[count:], examples[:count]
    if not train or not heldout:
        raise SystemExit(f"--data {args.data} has too few examples: {len(train)} to train, {len(heldout)} held out")
    random.Random(0).shuffle(train)
    random.Random(0).shuffle(heldout)
    return train[: args.train_size], heldout[: args.heldout_size]


def prompt_ids(tokenizer, query: str, prompt: str | None) -> list[int]:
    if query and not prompt and tokenizer.chat_template:
        messages = [{"role": "user", "content": query}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        # A chat template writes its special tokens itself.
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    text = (prompt or "{query}\n").replace("\\n", "\n").replace("{query}", query) if query else ""
    return tokenizer(text)["input_ids"]


def encode(tokenizer, example: Example, prompt: str | None, max_length: int) -> dict[str, list[int]]:
    """Token ids, and labels that count the tokens of the response and its end alone."""
    # A prompt that is too long loses its beginning, so that something is left to learn.
    head = prompt_ids(tokenizer, example.query, prompt)[1 - max_length :]
    body = [*tokenizer(example.response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    ids, labels = (row[:max_length] for row in (head + body, [-100] * len(head) + body))
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}
