"""README and docs: every code block runs or is checked, links lead somewhere, and the site builds without a warning."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from nlora_kernels import cli
from python_tests import ROOT

pytest.importorskip("sybil", reason="the code blocks are run by sybil")
from sybil import Sybil  # noqa: E402
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser  # noqa: E402

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# Run here; the rest is text to read, but for C++, which python_tests/cuda/test_docs.py runs.
RUN = {"python", "bash"}
READ = {"text", "bibtex", "cpp", "sh", "py"}
# Commands whose arguments are checked and that are not run: they measure.
MEASURING = {"tune", "verify"}
NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


def names(paths):
    return [path.relative_to(ROOT).as_posix() for path in paths]


@pytest.fixture
def hub(monkeypatch):
    """Under the name of the model that pages use, a tiny one of the same kind, whose tokenizer reads bytes."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    from python_tests.examples import models

    def read_bytes(**_):
        tokenizer = models.byte_tokenizer()
        tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def named(original, made):
        def from_pretrained(name, *args, **kwargs):
            return made(**kwargs) if name == NAME else original(name, *args, **kwargs)

        return from_pretrained

    def model(quantization_config=None):
        torch.manual_seed(0)
        # bitsandbytes packs 64 values of a row together.
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = transformers.LlamaConfig(vocab_size=len(read_bytes()), initializer_range=0.2, **sizes)
        made = transformers.LlamaForCausalLM(config).eval()
        if quantization_config is None:
            return made
        made.save_pretrained("tiny")
        return transformers.LlamaForCausalLM.from_pretrained("tiny", quantization_config=quantization_config)

    causal, tokenizer = transformers.AutoModelForCausalLM, transformers.AutoTokenizer
    monkeypatch.setattr(causal, "from_pretrained", named(causal.from_pretrained, model))
    monkeypatch.setattr(tokenizer, "from_pretrained", named(tokenizer.from_pretrained, read_bytes))


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_every_code_block_of_a_page_runs(page, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parsers = [PythonCodeBlockParser(), CodeBlockParser("bash", lambda example: check_commands(example.parsed))]
    document = Sybil(parsers=parsers, path=str(page.parent)).parse(page)
    # What a page takes as given: the user's data, and what a loop of their own is fed with.
    batch = {"input_ids": torch.randint(5, 60, (2, 12)), "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(5, 60, (8, 12))]
    document.namespace.update(batch=batch, train_dataset=rows)
    for example in document.examples():
        example.evaluate()


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_every_code_block_says_what_it_is(page):
    fences = re.findall(r"^ *```(.*)$", page.read_text(), re.MULTILINE)
    assert len(fences) % 2 == 0 and not any(fences[1::2])
    assert set(fences[::2]) <= RUN | READ, f"{page.name} has blocks that no test knows"
    # Four spaces make a block that no parser here sees.
    outside = re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert not re.search(r"\n\n    \S(?<![-*\d])", outside), f"{page.name} has an indented block"


def check_commands(text: str) -> None:
    """Runs the commands of this package; of others it is looked up that what they name is there."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words = words[1:]
        if words:
            check_command(words)


def check_command(words: list[str]) -> None:
    program, *arguments = words
    if words[:3] == ["python", "-m", "nlora_kernels"]:
        program, arguments = "nlora-kernels", words[3:]
    if program == "nlora-kernels":
        if arguments[0] in MEASURING:
            arguments = [arguments[0], "--help"]
        try:
            assert cli.main(arguments) == 0, words
        except SystemExit as done:
            assert not done.code, words
    elif program == "make":
        targets = [word for word in arguments if "=" not in word]
        done = subprocess.run(["make", "-n", *arguments, "PYTHON=python3"], cwd=ROOT, capture_output=True, text=True)
        assert targets and done.returncode == 0, f"{words}: {done.stderr}"
    elif program == "pip":
        check_packages([word for word in arguments[1:] if not word.startswith("-")])
    elif words[1:3] == ["-m", "pytest"] or program == "pytest":
        paths = [word for word in words if "/" in word and not program.startswith(word)]
        assert all((ROOT / path).exists() for path in paths), words
    elif words[1:3] == ["-m", "bench.report"]:
        assert words[3] in ("docs", "save"), words
    elif program == "python" and arguments[0].startswith("examples/"):
        script = Path(arguments[0]).stem
        code = f"import sys; sys.argv = {arguments!r}; import {script}; {script}.parse_args()"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "examples", capture_output=True, text=True)
        assert done.returncode == 0, f"{words}: {done.stderr}"
    elif program == "python":
        assert (ROOT / arguments[0]).is_file(), words
    else:
        assert (program, *arguments) in {("pre-commit", "install"), ("git", "clone")}, f"no test knows {words}"


def check_packages(packages: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pinned = re.findall(r"^([^=]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    for package in packages:
        local = re.fullmatch(r"\.(?:\[([\w,]+)\])?", package)
        if local:
            assert set((local[1] or "").split(",")) - {""} <= extras.keys(), package
        else:
            assert package in pinned, f"constraints.txt pins no {package}"


def anchors(page: Path) -> set[str]:
    """Of headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


TEXTS = [*PAGES, *(path for path in ROOT.glob("*.md") if path not in PAGES), *ROOT.glob(".github/**/*.md")]


@pytest.mark.parametrize("page", TEXTS, ids=names(TEXTS))
def test_every_link_leads_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    # A page that another names by its path would be no link on the site.
    named = re.findall(r"docs/\w+\.md", text) if page.parent == ROOT / "docs" else []
    assert not named, f"{page.name} names {named} and has no link there"
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset|href)="([^"]+)"', text)
    for link in links:
        if link.startswith(("https://", "mailto:")):
            # The papers; anything else on the web is gone one day.
            assert re.match(r"https://(arxiv\.org|keepachangelog\.com|semver\.org)/", link), link
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{page.name} leads to {link}"
        assert not anchor or anchor in anchors(target), f"{page.name} leads to {link}"


def test_the_site_builds_without_a_warning_and_needs_no_other(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", tmp_path / "site"]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    # That of an address which is not there is served from any folder.
    pages = [page for page in (tmp_path / "site").rglob("*.html") if page.name != "404.html"]
    assert {"index.html", "api.html", "results.html"} <= {page.name for page in pages}
    for page in pages:
        loaded = re.findall(r'<(?:script|img|source|link)[^>]+(?:src|srcset|href)="([^"]+)"', page.read_text())
        away = [link for link in loaded if link.startswith(("http:", "https:", "//"))]
        assert not away, f"{page.name} loads {away}"
        for link in (link for link in loaded if not link.startswith("data:")):
            assert (page.parent / link.partition("?")[0].partition("#")[0]).exists(), f"{page.name} loads {link}"
    api = (tmp_path / "site" / "api.html").read_text()
    for name in ("lora_linear", "NLoraLinear", "NLoraConfig", "RankAllocator", "to_lora"):
        assert f"nlora_kernels.{name}" in api or f".{name}" in api, f"the API has no {name}"


def test_the_readme_is_short_and_shows_few_tables():
    lines = (ROOT / "README.md").read_text().splitlines()
    tables = sum(line.startswith("|") for line in lines)
    assert len(lines) <= 140 and tables / len(lines) <= 0.2
