"""Whether another round of copying is worth it. Pure.

A round finds what was written since the one before began, and sends it. What
a freeze would still have to send is what is written while the round lasts.
Programs write the same pages again, so the pages written within a time grow
less than the time does: what a shorter round leaves is at most what it found,
what a longer one leaves at most that in proportion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

MAX_ROUNDS = 12
# What a freeze costs without a single byte: CRIU's dump and restore of a container of one
# process, measured. What more processes and another node add: ``freezes``.
FIXED_FREEZE_MS = 150
# What CRIU does itself with shared memory that is not copied before, beside sending it: 0.3 s
# to dump and 0.5 s to restore 512 MiB, measured.
CARRIED_BYTES_PER_S = 640 << 20
# A rest that is sent while CRIU dumps anyway: fewer bytes make the freeze no shorter.
SMALL_BYTES = 8 << 20
# That long CRIU's dump takes of a process that has nothing for it.
_DUMP_S = 0.020
# Less than a tenth is noise.
_FALLS = 0.9
# Rounds without a fall after which a budget is given up: a burst of writes ends, a load stays.
_PATIENCE = 3
# What is left of the CPU time that the pod used before it was slowed down, step by step.
THROTTLE_STEPS = (0.6, 0.35, 0.2, 0.1)


class Verdict(Enum):
    """What follows a round."""

    AGAIN = auto()
    SWITCH = auto()
    THROTTLE = auto()
    REFUSE = auto()


@dataclass(frozen=True, slots=True)
class Round:
    """Facts of one round.

    ``dirty_bytes`` were found written; ``sent_bytes`` went over the wire in ``seconds``, at
    ``bandwidth`` bytes/s (0: not known); ``since_s``: from the start of the round before to
    the start of this one, 0 for the first, which finds everything. ``fixed_ms``: what a freeze
    of this pod lasts longer than of one without shared memory, however little is written.
    ``bound_bytes`` of ``dirty_bytes`` are what no post-copy leaves for later.
    """

    dirty_bytes: int
    sent_bytes: int
    seconds: float
    since_s: float
    bandwidth: int
    fixed_ms: int = 0
    bound_bytes: int = 0

    @property
    def first(self) -> bool:
        return self.since_s <= 0

    @property
    def left_bytes(self) -> int:
        """At most this much is there to send after the round; 0 where it is not known yet."""
        return self._left(self.dirty_bytes)

    @property
    def bound_left_bytes(self) -> int:
        """Of ``left_bytes``, what no post-copy leaves for later."""
        return self._left(self.bound_bytes)

    def _left(self, dirty_bytes: int) -> int:
        if self.first:
            return 0
        return round(dirty_bytes * max(1.0, self.seconds / self.since_s))

    @property
    def dirty_rate(self) -> int:
        """Bytes of pages written per second, each page counted once; 0 where not known yet."""
        return 0 if self.first else round(self.dirty_bytes / self.since_s)


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do, and the freeze that a switch at this moment would bring."""

    verdict: Verdict
    predicted_freeze_ms: int


def fixed_ms(freeze_us: int, carried_bytes: int, bandwidth: int) -> int:
    """``freeze_us`` is spent anyway; ``carried_bytes`` CRIU dumps, sends and restores."""
    carried_s = carried_bytes / CARRIED_BYTES_PER_S
    if bandwidth:
        carried_s += carried_bytes / bandwidth
    return round(freeze_us / 1000 + carried_s * 1000)


def predicted_freeze_ms(left_bytes: int, bandwidth: int, base_ms: int = FIXED_FREEZE_MS) -> int:
    """The bytes left over, at the bandwidth seen so far, and what is paid anyway."""
    return base_ms + round(left_bytes * 1000 / bandwidth if bandwidth else 0)


def allowance(
    bandwidth: int, budget_ms: int = 0, base_ms: int = FIXED_FREEZE_MS, bound_bytes: int = 0
) -> int:
    """Bytes of pages that the freeze of a post-copy sends: what its budget lets through, without
    one what costs nothing, less ``bound_bytes``, which it sends anyway. ``base_ms``: of this
    freeze without any of them."""
    most = max(budget_ms - base_ms, 0) * bandwidth // 1000 if budget_ms else SMALL_BYTES
    return max(most - bound_bytes, 0)


def worth_another(dirty_rate: int, since_s: float, bandwidth: int) -> bool:
    """Whether a last round shortens the freeze that is about to begin: what was written at
    ``dirty_rate`` bytes/s in ``since_s`` takes longer to send than the dump beside it, and the
    round leaves less than it finds."""
    if not bandwidth or dirty_rate >= bandwidth * _FALLS:
        return False
    return dirty_rate * since_s > min(SMALL_BYTES, bandwidth * _DUMP_S)


def decide(
    done: Sequence[Round],
    *,
    budget_ms: int = 0,
    steps_left: int = 0,
    base_ms: int = FIXED_FREEZE_MS,
    post_copy: bool = False,
) -> Decision:
    """After the rounds ``done``, oldest first; ``budget_ms`` 0: none.

    A budget below ``base_ms`` is refused before the first round, and one below the least that
    shared memory has added to it after that: no round can help, and no slower pod.
    ``steps_left``: how often the pod may still be slowed down before a budget is refused;
    ``done`` then begins anew with the last round before the step. ``post_copy``: instead of a
    refusal, what the freeze cannot send comes after it; what else it costs must fit. Where no
    budget asks for patience, nor does it wait for a load that writes everything in each round.
    """
    last = done[-1] if done else None
    least = base_ms + min((one.fixed_ms for one in done if not one.first), default=0)
    base_ms += last.fixed_ms if last else 0
    predicted = predicted_freeze_ms(last.left_bytes, last.bandwidth, base_ms) if last else base_ms
    if budget_ms and least > budget_ms:
        return Decision(Verdict.REFUSE, predicted)
    verdict = _verdict(done, predicted, budget_ms)
    if verdict is Verdict.REFUSE and steps_left > 0:
        verdict = Verdict.THROTTLE
    if last and post_copy:
        bound = last.bound_left_bytes
        sent = min(last.left_bytes, bound + allowance(last.bandwidth, budget_ms, base_ms, bound))
        predicted = predicted_freeze_ms(sent, last.bandwidth, base_ms)
        refused = verdict is Verdict.REFUSE and predicted <= budget_ms
        if refused or (verdict is Verdict.AGAIN and not budget_ms and _all_again(done)):
            verdict = Verdict.SWITCH
    return Decision(verdict, predicted)


def _verdict(done: Sequence[Round], predicted: int, budget_ms: int) -> Verdict:
    if not done or done[-1].first:
        return Verdict.AGAIN
    if budget_ms:
        if predicted <= budget_ms:
            return Verdict.SWITCH
        hopeless = len(done) >= MAX_ROUNDS or _without_fall(done) >= _PATIENCE
        return Verdict.REFUSE if hopeless else Verdict.AGAIN
    small = done[-1].left_bytes <= SMALL_BYTES
    over = len(done) >= MAX_ROUNDS or _without_fall(done) > 0
    return Verdict.SWITCH if small or over else Verdict.AGAIN


def _all_again(done: Sequence[Round]) -> bool:
    """Whether the last round has found written what the first one had sent: another one would
    find it again, and what it sends need not wait for the freeze."""
    first, last = done[0], done[-1]
    few_bound = last.bound_left_bytes <= SMALL_BYTES
    return not last.first and few_bound and last.dirty_bytes >= first.dirty_bytes * _FALLS


def _without_fall(done: Sequence[Round]) -> int:
    """How many rounds at the end have left no less than the best before them."""
    best: float | None = None
    count = 0
    for one in done:
        if one.first:
            continue
        if best is None or one.left_bytes < best * _FALLS:
            best, count = one.left_bytes, 0
        else:
            count += 1
    return count
