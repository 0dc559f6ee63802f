"""rank_pattern and alpha_pattern of PEFT: regular expressions for the end of a layer's name, of which the first counts.

PEFT saves them sorted, so that another one may be the first when the adapter is loaded.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any


def exact(name: str) -> str:
    """The pattern of one layer alone, whatever other patterns and layers there are."""
    return f"^{re.escape(name)}$"


def lookup(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value for a layer, by its name in the base model, as PEFT finds it."""
    from peft.utils.other import get_pattern_key

    return patterns.get(get_pattern_key(patterns.keys(), name), default)


def overridden(patterns: Mapping[str, Any], values: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """The patterns with values of single layers before them, less those that then count for none of the names."""
    of = {name: lookup({key: key for key in patterns}, name, None) for name in names}
    idle = {of[name] for name in values} - {of[name] for name in names if name not in values}
    kept = {key: value for key, value in patterns.items() if key not in idle}
    return {exact(name): value for name, value in values.items()} | kept


def in_any_order(patterns: Mapping[str, Any]) -> dict[str, Any]:
    """The same patterns, such that no layer has two of them if sorting them would change which one counts."""
    keys = list(patterns)
    earlier = {key: [other for other in keys[:index] if _overlap(other, key)] for index, key in enumerate(keys)}
    if all(other < key for key, others in earlier.items() for other in others):
        return dict(patterns)

    def alone(key: str) -> str:
        if not earlier[key]:
            return key
        none = "".join(rf"(?!(?:.*\.)?(?:{other})$)" for other in earlier[key])
        return rf"^{none}(?:.*\.)?(?:{key})"

    return {alone(key): value for key, value in patterns.items()}


def _overlap(one: str, other: str) -> bool:
    """Whether a name may match both. Only of words with dots, which stand for any letter, it can be known not to."""
    short, long = sorted((one, other), key=len)
    if not all(re.fullmatch(r"[\w.-]+", key) for key in (one, other)):
        return True
    if len(short) < len(long) and long[-len(short) - 1] != ".":
        return False
    return all(a == b or "." in (a, b) for a, b in zip(reversed(short), reversed(long), strict=False))
