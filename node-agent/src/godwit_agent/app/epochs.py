"""Fences stale attempts: an epoch lower than the highest journalled one is refused.

What may still come late is listed here, not at the callers:

- cleaning up a lower epoch (``AbortTarget``, ``FinishTarget``) touches nothing
  but what that epoch made, so it is served;
- ``Peer.Run`` is the word of a source that has committed exactly that epoch;
  the commit record outranks any later number.
"""

from __future__ import annotations

from godwit_agent.app.journal import JournalStore, Key, Role, Step
from godwit_api.errors import Rejected
from godwit_api.reasons import Reason


def refuse_stale(journals: JournalStore, uid: str, epoch: int) -> None:
    """Raises ``Rejected(StaleEpoch)`` when a higher epoch is known, and
    ``Rejected(WrongStep)`` when an earlier epoch has already been decided."""
    for key in journals.attempts(uid):
        if key.epoch > epoch:
            message = f"migration {uid}: epoch {key.epoch} is known, {epoch} is over"
            raise Rejected(Reason.STALE_EPOCH, message)
        if key.epoch < epoch and key.role is Role.SOURCE:
            earlier = journals.open(key)
            if earlier.has(Step.COMMITTED):
                message = f"migration {uid}: epoch {key.epoch} has committed; there is no other"
                raise Rejected(Reason.WRONG_STEP, message)


def known(journals: JournalStore, uid: str, epoch: int, role: Role) -> Key:
    """The key of a migration that this agent has a journal of."""
    key = Key(uid, epoch, role)
    if journals.get(key) is None:
        message = f"migration {uid} epoch {epoch} is not known here as {role}"
        raise Rejected(Reason.UNKNOWN_MIGRATION, message)
    return key
