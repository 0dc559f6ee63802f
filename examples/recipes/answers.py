"""Final answers of worked solutions, read as the field reads them: GSM8K's last number, MATH's box."""

import re

# With thousands set apart by commas, and a sign.
_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?|-?\$?\.\d+")


def gsm8k(text: str) -> str | None:
    """The number after "####" or "The answer is:", else the last of the text, without commas, "$" or a bare ".0"."""
    for mark in ("####", "answer is"):
        _, found, rest = text.rpartition(mark)
        if found and (numbers := _NUMBER.findall(rest)):
            return _plain(numbers[0])
    numbers = _NUMBER.findall(text)
    return _plain(numbers[-1]) if numbers else None


def math(text: str) -> str | None:
    r"""The content of the last \boxed{…}, else what follows "The answer is:"; in one spelling."""
    if (boxed := _boxed(text)) is None:
        _, found, rest = text.rpartition("answer is")
        boxed = rest.lstrip(": ").split("\n")[0].rstrip(". ") if found else None
    return None if boxed is None else _normal(boxed)


def _plain(number: str) -> str:
    number = number.replace(",", "").replace("$", "")
    if "." in number:
        number = number.rstrip("0").rstrip(".")
    return "0" if number in ("", "-", "-0") else number


def _boxed(text: str) -> str | None:
    start = max(text.rfind(r"\boxed{"), text.rfind(r"\fbox{"))
    if start < 0:
        return None
    start = text.index("{", start) + 1
    depth = 1
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start:end]
    return None


# What MATH's own comparison takes for spelling: spaces, sizes of brackets, units, degrees, kinds of fractions.
_DROPPED = (r"\!", r"\,", r"\ ", r"\left", r"\right", r"^\circ", r"^{\circ}", r"\$", "$", r"\%", "%", "\n", " ")


def _normal(answer: str) -> str:
    answer = re.sub(r"\\text\{\s*[^}]*\}$", "", answer) if not answer.startswith(r"\text") else answer
    answer = re.sub(r"\\text\{([^}]*)\}", r"\1", answer)
    for piece in _DROPPED:
        answer = answer.replace(piece, "")
    answer = answer.replace("tfrac", "frac").replace("dfrac", "frac").rstrip(".")
    answer = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", answer)
    answer = re.sub(r"\\sqrt(\w)", r"\\sqrt{\1}", answer)
    answer = re.sub(r"^(-?\d+)/(\d+)$", r"\\frac{\1}{\2}", answer)
    answer = re.sub(r"(?<!\d)\.(\d)", r"0.\1", answer)
    answer = re.sub(r"^(-?\d+)\.0+$", r"\1", answer)
    if re.fullmatch(r"-?\d{1,3}(,\d{3})+", answer):
        answer = answer.replace(",", "")
    # x = 5 is an answer of 5.
    name, found, value = answer.partition("=")
    return value if found and len(name) <= 2 else answer
