"""What several data processes answer to one request, as one answer: whoever asks sees one node.

Rules
- A page ends where the first of them ends; what is behind that is asked for again.
- Of what is only looked at, the answer of those that answer is better than none (`PARTIAL`); a change is made by all.
"""

from collections.abc import Sequence
from typing import Any

PARTIAL = frozenset({"volumes", "counters", "clients", "replicas"})

_LARGEST = frozenset({"loop_longest_turn_seconds"})  # gauges that are no sums


def merged(request: str, answers: Sequence[Any]) -> Any:
    """One answer from those of all processes, of which there is at least one."""
    if request == "volumes":
        return {"families": _union([answer["families"] for answer in answers]), "last": _last(answers)}
    if request == "counters":
        return {
            "node": _node([answer["node"] for answer in answers]),
            "workers": {str(answer["worker"]): answer["node"] for answer in answers},
            "volumes": _union([answer["volumes"] for answer in answers]),
            "last": _last(answers),
        }
    if request in ("room", "replicas"):
        return _union(answers)
    if request == "clients":
        return sorted((client for answer in answers for client in answer), key=lambda client: int(client["id"]))
    if request == "disconnect":
        return any(answers)
    return answers[0]


def _union(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {key: value for answer in answers for key, value in answer.items()}


def _last(answers: Sequence[dict[str, Any]]) -> str:
    return min((answer["last"] for answer in answers if answer["last"]), default="")


def _node(nodes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counters and gauges of the node."""
    found: dict[str, dict[str, Any]] = {"counters": {}, "gauges": {}}
    for kind, figures in found.items():
        for name in nodes[0][kind]:
            values = [node[kind][name] for node in nodes]
            figures[name] = max(values) if name in _LARGEST else sum(values)
    return found
