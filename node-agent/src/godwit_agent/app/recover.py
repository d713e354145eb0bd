"""At the start of the agent: every journal that is not over is taken up again.

=====================  =====================================================
source's journal says  what is done
=====================  =====================================================
no ``Switching``       nothing: the pod runs; its guard is renewed
``Switching`` only     rollback: the pod may be frozen, and was not given away
``Committed``          forward: run the target until it answers, then kill
``Running``            nothing: ``FinishSource`` repeats the killing
=====================  =====================================================

A target that may hold a stopped copy asks its source; one that was told to run
makes sure that it does; any other copy or store is of no use any more.
"""

from __future__ import annotations

from godwit_agent import log
from godwit_agent.app.journal import JournalStore, Key, Role, Step
from godwit_agent.app.source import Source
from godwit_agent.app.target import Target
from godwit_api.errors import Aborted, GodwitError
from godwit_api.reasons import Reason


def recover(journals: JournalStore, source: Source, target: Target) -> None:
    """Blocks only for what needs no other agent."""
    for key in journals.attempts():
        try:
            if journals.open(key).terminal:
                continue
            if key.role is Role.SOURCE:
                _recover_source(source, journals, key)
            else:
                _recover_target(target, key)
        except (GodwitError, OSError) as error:
            log.error("recovery failed", journal=key, error=error)
        except Exception:
            log.exception("recovery failed", journal=key)


def _recover_source(source: Source, journals: JournalStore, key: Key) -> None:
    journal = journals.open(key)
    if not journal.has(Step.SWITCHING) or journal.find(Step.RUNNING, Step.THAWED):
        return
    session = source.resume_session(key)
    if session is None:
        return
    if journal.has(Step.COMMITTED):
        log.warning("found a committed switch; going on", journal=key)
        source.go_on(session)
    else:
        log.warning("found a switch without a decision; rolling back", journal=key)
        why = Aborted(Reason.AGENT_RESTARTED, "the source's agent was restarted in the switch")
        source.roll_back(session, why)


def _recover_target(target: Target, key: Key) -> None:
    session = target.resume_session(key)
    if session is not None:
        log.info("taking up target", journal=key, step=session.journal.last)
        target.recover(session)
