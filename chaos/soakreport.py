"""The soak's part of docs/reliability.md from ``chaos/results/soak.jsonl``: its last run."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from chaos import flat
from chaos.report import PAGE
from chaos.soak import RESULTS
from lab.marks import between

BEGIN, END = "<!-- soak: make soak-report -->", "<!-- end of soak -->"
_OURS = {"rss_kib": "memory (RSS, MiB)", "fds": "file descriptors", "threads": "threads"}


def last_run(lines: Iterable[str]) -> list[dict[str, Any]]:
    """From its ``begin`` on."""
    run: list[dict[str, Any]] = []
    for line in lines:
        found = json.loads(line)
        run = [found] if found["kind"] == "begin" else [*run, found]
    return run


def render(lines: Iterable[str]) -> str:
    """What was done, what was found, what has grown."""
    run = last_run(lines)
    begin, minutes = run[0], [line for line in run if line["kind"] == "minute"]
    end = next((line for line in run if line["kind"] == "end"), None)
    moves = [move for line in minutes for move in line["moves"]]
    wrong = [f"minute {line['minute']}: {one}" for line in minutes for one in line["wrong"]]
    ends = Counter(str(move["phase"]) for move in moves)
    reasons = Counter(str(move["reason"]) for move in moves if move["phase"] == "Aborted")
    faults = Counter(line["fault"] for line in minutes)
    gaps = sorted(line["gap_ms"] for line in minutes)
    replies = minutes[-1]["replies"] if minutes else 0
    seconds = sum(max(line["seconds"], 60.0) for line in minutes)
    verdicts = flat.verdicts(minutes)
    over = "" if end else " It has not come to its end."
    text = [
        f"Begun {begin['at']}, commit {begin['commit']}, seed {begin['seed']}, "
        f"{begin['minutes']} minutes asked for, {seconds / 60:.0f} made.{over}",
        "",
        f"- {len(moves)} migrations: {_list(ends)}."
        + (f" Reasons of those aborted: {_list(reasons)}." if reasons else ""),
        f"- {len(minutes)} faults: {_list(faults)}.",
        f"- {replies} replies on one connection, each checked; the longest wait of a minute: "
        f"median {gaps[len(gaps) // 2]:.0f} ms, at most {gaps[-1]:.0f} ms."
        if gaps
        else "- no minute was completed.",
        f"- **{len(wrong)} violations**" + (":" if wrong else "."),
        *(f"  - {one}" for one in wrong),
        "",
        *_growth(verdicts),
    ]
    return "\n".join(text)


def _list(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.most_common())


def _growth(verdicts: list[flat.Verdict]) -> list[str]:
    """Each kind of thing with its worst series."""
    grown = [verdict for verdict in verdicts if not verdict.flat]
    lines = [
        f"{len(verdicts)} series were long enough to be judged, {len(grown)} of them have grown"
        + (":" if grown else "."),
        *(f"- {' '.join(one.name)}: {one.growth:+.1f} at {one.median:.0f}" for one in grown),
        "",
        "| what | series | samples | median | largest growth of a series | allowed |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for kind in dict.fromkeys(_kind(verdict) for verdict in verdicts):
        those = [verdict for verdict in verdicts if _kind(verdict) == kind]
        worst = max(those, key=lambda one: one.growth / one.allowed)
        unit = 1024 if worst.name[-1] == "rss_kib" else 1
        lines.append(
            f"| {kind} | {len(those)} | {sum(one.samples for one in those)} "
            f"| {worst.median / unit:.1f} | {worst.growth / unit:+.2f} "
            f"| {worst.allowed / unit:.1f} |"
        )
    return lines


def _kind(verdict: flat.Verdict) -> str:
    if verdict.name[-1] in _OURS:
        return f"{verdict.name[0]}: {_OURS[verdict.name[-1]]}"
    return f"{'API' if verdict.name[0] == 'API' else 'node'}: {verdict.name[-1].replace('_', ' ')}"


def main() -> None:
    """Rewrite the page, or print the part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--file", type=Path, default=RESULTS)
    parser.add_argument("--print", action="store_true", help="to standard output only")
    options = parser.parse_args()
    text = render(options.file.read_text().splitlines())
    if options.print:
        print(text)
    else:
        PAGE.write_text(between(PAGE.read_text(), BEGIN, END, text))


if __name__ == "__main__":
    main()
