"""Answers are read as the field reads them, programs run within limits, and a benchmark is asked end to end."""

import json
import sys
import time

import pytest

from python_tests import ROOT

pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
sys.path.insert(0, str(ROOT / "examples"))
from recipes import answers, evaluation, programs  # noqa: E402

from .models import byte_llama, byte_tokenizer  # noqa: E402


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("48/2 = <<48/2=24>>24 in May.\n#### 72", "72"),
        ("#### 1,234", "1234"),
        ("The answer is: $18.00. It took 3 days.", "18"),
        ("It is 5, no, -7.50 dollars", "-7.5"),
        ("first 1 then .5", "0.5"[1:]),
        ("-0", "0"),
        ("nothing", None),
    ],
)
def test_gsm8k_answers(text, answer):
    assert answers.gsm8k(text) == answer


@pytest.mark.parametrize(
    ("text", "same"),
    [
        (r"so \boxed{\frac{1}{2}}.", r"\boxed{\dfrac12}"),
        (r"\boxed{1} and at last \boxed{\sqrt{3}}", r"\boxed{\sqrt3}"),
        (r"The answer is: 1/2.", r"\boxed{\tfrac{1}{2}}"),
        (r"\boxed{x = 5}", r"\boxed{5}"),
        (r"\boxed{10\text{ cm}}", r"\boxed{10}"),
        (r"\boxed{90^\circ}", r"\boxed{90}"),
        (r"\boxed{\left( 1,\, 2 \right)}", r"\boxed{(1,2)}"),
        (r"\boxed{12,345}", r"\boxed{12345}"),
        (r"\boxed{.5}", r"\boxed{0.5}"),
        (r"\boxed{\text{Tuesday}}", r"\boxed{Tuesday}"),
        (r"\boxed{\{1, 2\}}", r"\boxed{\{1,2\}}"),
    ],
)
def test_math_answers(text, same):
    assert answers.math(text) is not None and answers.math(text) == answers.math(same)


def test_math_answers_that_differ_or_are_none():
    assert answers.math(r"\boxed{12}") != answers.math(r"\boxed{13}")
    assert answers.math(r"\boxed{x + y = 5}") != answers.math(r"\boxed{5}")
    assert answers.math("no box") is None and answers.math(r"\boxed{open") is None


def test_the_real_answers_are_read(real_data):
    rows = [json.loads(line) for line in (real_data / "gsm8k" / "train.jsonl").read_text().splitlines()]
    for row in rows:
        wanted = row["answer"].rpartition("####")[2].strip().replace(",", "")
        assert answers.gsm8k(row["answer"]) == wanted


PROGRAMS = {
    "right": ("assert 1 + 1 == 2", True),
    "wrong": ("assert 1 + 1 == 3", False),
    "no program": ("this is no program", False),
    "leaves early": ("import sys; sys.exit(0)", False),
    "leaves at once": ("import os; os._exit(0)", False),
    "prints": ("print('passed')", True),
    "endless": ("while True: pass", False),
    "asleep": ("import time; time.sleep(60)", False),
    "too large": ("x = bytearray(3 * 2**30)", False),
    "writes too much": ("open('f', 'wb').write(bytes(2**22))", False),
    "reads its input": ("input()", False),
    "leaves a child": ("import subprocess; subprocess.Popen(['sleep', '60'])", True),
}


@pytest.mark.parametrize(("program", "passed"), PROGRAMS.values(), ids=PROGRAMS)
def test_programs_run_within_limits(program, passed):
    start = time.perf_counter()
    # A loaded machine takes seconds to start an interpreter.
    seconds = 3 if "while" in program or "sleep(60)" in program else 60
    assert programs.passes(program, seconds=seconds) == passed
    assert time.perf_counter() - start < 59


def test_programs_see_nothing_of_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("A_SECRET", "1")
    program = "import os\nassert 'A_SECRET' not in os.environ\nassert os.listdir() == []"
    assert programs.passes(program, seconds=60)


def test_code_is_cut_out_of_answers():
    assert programs.code_of("Here:\n```python\nx = 1\n```\nand\n```\ny\n```") == "x = 1\n"
    assert programs.code_of("```\nx = 1\n") == "x = 1\n"
    assert programs.code_of("    return 1\n\ndef other():\n    pass") == "    return 1\n"
    assert programs.code_of("def f():\n    return 1") == "def f():\n    return 1"


MBPP = {"text": "Add.", "test_list": ["assert add(1, 2) == 3", "assert add(2, 2) == 4"], "test_setup_code": ""}
HUMANEVAL = {
    "prompt": "import math\n\ndef root(x):\n    '''The root.'''\n",
    "entry_point": "root",
    "test": "def check(candidate):\n    assert candidate(4) == 2",
}


@pytest.mark.parametrize(
    ("name", "row", "text", "right"),
    [
        ("gsm8k", {"question": "?", "answer": "#### 1,000"}, "It is 1000.", True),
        ("gsm8k", {"question": "?", "answer": "#### 10"}, "It is 1000.", False),
        ("math", {"problem": "?", "solution": r"\boxed{\frac12}"}, r"\boxed{1/2}", True),
        ("mbpp", MBPP, "```python\ndef add(a, b):\n    return a + b\n```", True),
        ("mbpp", MBPP, "def add(a, b):\n    return 3", False),
        ("humaneval", HUMANEVAL, "    return math.sqrt(x)\n\nprint(1)", True),
        ("humaneval", HUMANEVAL, "```\ndef root(x):\n    return math.sqrt(x)\n```", True),
        ("humaneval", HUMANEVAL, "    return 0", False),
    ],
)
def test_answers_are_right_or_wrong(name, row, text, right, monkeypatch):
    monkeypatch.setattr(programs.passes, "__kwdefaults__", {"seconds": 60, "memory": programs.MEMORY})
    assert evaluation.BENCHMARKS[name].problem(row).right(text) == right


def test_the_real_programs_pass_their_tests(real_data):
    rows = [json.loads(line) for line in (real_data / "mbpp" / "mbpp_train_601-974.jsonl").read_text().splitlines()]
    for row in rows[:3]:
        assert evaluation.BENCHMARKS["mbpp"].problem(row).right(row["code"])


def test_batches_do_not_change_greedy_answers():
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    model = byte_llama(tokenizer)
    queries = ["a", "a longer query", "another", "the longest of all queries"]
    options = {"tokens": 12}
    together = evaluation.generate(model, tokenizer, queries, "{query}", batch_size=3, **options)
    alone = [evaluation.generate(model, tokenizer, [q], "{query}", batch_size=1, **options)[0] for q in queries]
    assert together == alone and len(set(together)) == 4


def test_a_benchmark_end_to_end(tmp_path, capsys, request):
    import finetune

    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    byte_llama(tokenizer).save_pretrained(tmp_path / "model")
    rows = [{"query": f"What is {i}+{j}?", "response": f"It is {i + j}."} for i in range(6) for j in range(6)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    problems = [{"question": row["query"], "answer": f"#### {row['response'][6:-1]}"} for row in rows[:5]]
    (tmp_path / "gsm8k.jsonl").write_text("\n".join(map(json.dumps, problems)))
    argv = ["--model", tmp_path / "model", "--data", tmp_path / "data.jsonl", "--steps", "12", "--rank", "4", "--eval"]
    argv += ["gsm8k", "--eval-data", tmp_path / "gsm8k.jsonl", "--eval-tokens", "8", "--optim", "rmsprop"]
    argv += ["--output", tmp_path / "out", "--result", tmp_path / "result.json"]
    assert finetune.main(list(map(str, argv))) == 0
    out = capsys.readouterr().out
    assert out.count("gsm8k: ") == 2 and "of 5" in out
    [entry] = json.loads((tmp_path / "result.json").read_text())
    answered = [json.loads(line) for line in (tmp_path / "out" / "nlora" / "gsm8k.jsonl").read_text().splitlines()]
    assert entry["metrics"]["gsm8k"] == sum(row["right"] for row in answered) / 5
    (tmp_path / "gsm8k.jsonl").write_text('{"question": "?"}')
    with pytest.raises(SystemExit) as caught:
        finetune.main(list(map(str, argv)))
    assert caught.value.code == "--eval gsm8k: problem 1 must have question, answer, lacks answer"


def test_generated_code_is_only_run_when_asked_for(capsys):
    import finetune

    with pytest.raises(SystemExit):
        finetune.parse_args(["--eval", "mbpp"])
    message = "argument --eval: mbpp runs what the model writes, and that needs --run-generated-code"
    assert message in capsys.readouterr().err
    assert finetune.parse_args(["--eval", "mbpp", "--run-generated-code"]).eval == ["mbpp"]
