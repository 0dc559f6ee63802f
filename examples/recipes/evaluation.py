"""What a language model answers: greedy, in batches, and how much of it is right on GSM8K, MATH, MBPP and HumanEval."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from . import answers, programs
from .text import prompt_ids, read_rows


class Problem(NamedTuple):
    query: str
    # Says of an answer whether it is right.
    right: Callable[[str], bool]


class Benchmark(NamedTuple):
    # On the hub: name, configuration and split.
    source: tuple[str, str | None, str]
    columns: tuple[str, ...]
    problem: Callable[[dict], Problem]
    runs_programs: bool = False


def _gsm8k(row: dict) -> Problem:
    wanted = answers.gsm8k(row["answer"])
    return Problem(row["question"], lambda text: answers.gsm8k(text) == wanted)


def _math(row: dict) -> Problem:
    wanted = answers.math(row["solution"])
    return Problem(row["problem"], lambda text: answers.math(text) == wanted)


def _mbpp(row: dict) -> Problem:
    tests = "\n".join([*row.get("test_imports", []), row.get("test_setup_code", ""), *row["test_list"]])
    query = f"{row.get('text') or row.get('prompt')}\nYour code should pass this test:\n{row['test_list'][0]}\n"
    return Problem(query, lambda text: programs.passes(f"{programs.code_of(text)}\n{tests}"))


def _humaneval(row: dict) -> Problem:
    def right(text: str) -> bool:
        code = programs.code_of(text)
        # A body goes on from the prompt; a whole function stands for itself, after the prompt's imports.
        whole = f"def {row['entry_point']}" in code
        head = row["prompt"][: row["prompt"].rindex(f"def {row['entry_point']}")] if whole else row["prompt"]
        return programs.passes(f"{head}{code}\n{row['test']}\ncheck({row['entry_point']})")

    return Problem(f"Complete this Python function:\n{row['prompt']}", right)


BENCHMARKS = {
    "gsm8k": Benchmark(("openai/gsm8k", "main", "test"), ("question", "answer"), _gsm8k),
    "math": Benchmark(("DigitalLearningGmbH/MATH-lighteval", None, "test"), ("problem", "solution"), _math),
    "mbpp": Benchmark(("google-research-datasets/mbpp", "full", "test"), ("test_list",), _mbpp, True),
    "humaneval": Benchmark(
        ("openai/openai_humaneval", None, "test"), ("prompt", "test", "entry_point"), _humaneval, True
    ),
}


def load(name: str, file: str | None, size: int | None) -> list[Problem]:
    """The problems of a benchmark, of a JSONL file or from the hub."""
    benchmark = BENCHMARKS[name]
    rows = read_rows(file or benchmark.source[0], "--eval-data", *benchmark.source[1:])
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or (missing := [column for column in benchmark.columns if column not in row]):
            got = missing[0] if isinstance(row, dict) else "a JSON object"
            raise SystemExit(f"--eval {name}: problem {number} must have {', '.join(benchmark.columns)}, lacks {got}")
    if not rows:
        raise SystemExit(f"--eval {name}: {file or benchmark.source[0]} has no problems")
    return [benchmark.problem(row) for row in rows[:size]]


def generate(model, tokenizer, queries: list[str], prompt: str | None, *, tokens: int, batch_size: int) -> list[str]:
    """Greedy answers of at most so many tokens, in batches of queries of like length, padded on the left."""
    import torch
    from tqdm.auto import tqdm

    ids = [prompt_ids(tokenizer, query, prompt) for query in queries]
    order = sorted(range(len(ids)), key=lambda n: len(ids[n]))
    written = [""] * len(ids)
    for start in tqdm(range(0, len(order), batch_size), desc="answers", leave=False):
        chosen = order[start : start + batch_size]
        width = max(len(ids[n]) for n in chosen)
        pad = tokenizer.pad_token_id
        rows = torch.tensor([[pad] * (width - len(ids[n])) + ids[n] for n in chosen], device=model.device)
        mask = torch.tensor([[0] * (width - len(ids[n])) + [1] * len(ids[n]) for n in chosen], device=model.device)
        with torch.no_grad():
            out = model.generate(
                input_ids=rows, attention_mask=mask, do_sample=False, max_new_tokens=tokens, pad_token_id=pad
            )
        for n, row in zip(chosen, out[:, width:], strict=True):
            written[n] = tokenizer.decode(row, skip_special_tokens=True)
    return written


def accuracy(problems: list[Problem], texts: list[str], kept: Path | None = None) -> float:
    """The share of right answers: exact match, or pass@1 where they are programs."""
    import json

    from tqdm.auto import tqdm

    right = [
        problem.right(text) for problem, text in zip(tqdm(problems, desc="checking", leave=False), texts, strict=True)
    ]
    if kept:
        lines = [
            json.dumps({"query": problem.query, "answer": text, "right": ok})
            for problem, text, ok in zip(problems, texts, right, strict=True)
        ]
        kept.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return sum(right) / len(right)
