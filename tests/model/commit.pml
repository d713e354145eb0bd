/*
 * The commit of one switch, as docs/protocol.md has it: source agent, target agent, the two
 * processes, a source node that may die, and an operator that fences it. `make model` looks at
 * every interleaving.
 *
 * A message that was sent once may be delivered at any later time, any number of times, or never:
 * `m_...` is whether it has been sent. A journal survives its agent; what the agent knew besides
 * does not. Agents end and come back at any moment (CRASHES times in all). The processes outlive
 * their agents, and die with their node.
 */
#define CRASHES 3

mtype = { RUNS, FROZEN, DEAD, NONE, STOPPED,		/* processes */
	  BLANK, SWITCHING, COMMITTED, RUNNING, THAWED,	/* source's journal */
	  ARMED, RESUMED, FENCED, REFUSED };		/* target's journal */

mtype source = RUNS, copy = NONE, s_journal = BLANK, t_journal = ARMED;
bool s_node = true;		/* the source's node lives */
bool s_switches, t_asks;	/* known to the agents' present processes only */
bool m_restore, m_restored, m_run, m_ran, m_abort, m_ask, m_committed, m_aborted;
bool lost;			/* the operator was told that there is no complete copy */
byte crashes;

#define ONE_RUNS (!(source == RUNS && copy == RUNS))
#define NONE_LOST (!s_node || source != DEAD || copy == RUNS)
#define RECORDED (copy != RUNS || s_journal == COMMITTED || s_journal == RUNNING \
		  || t_journal == FENCED)
#define AT_REST (source == RUNS && copy == NONE || source == DEAD && copy == RUNS \
		 || !s_node && lost && copy == NONE)

active proctype source_agent()
{
	do
	:: atomic { s_node && s_journal == BLANK ->
		s_journal = SWITCHING; s_switches = true }
	:: atomic { s_node && s_switches && s_journal == SWITCHING && source == RUNS ->
		source = FROZEN }
	:: atomic { s_node && s_switches && source == FROZEN && !m_restore -> m_restore = true }
	:: atomic { s_node && s_switches && s_journal == SWITCHING && m_restored ->
		s_journal = COMMITTED }
	/* whatever fails before the record, or an agent that finds a switch without it */
	:: atomic { s_node && s_journal == SWITCHING -> s_switches = false; source = RUNS }
	:: atomic { s_node && s_journal == SWITCHING && !s_switches && source == RUNS ->
		s_journal = THAWED; m_abort = true }
	:: atomic { s_node && s_journal == COMMITTED && !m_run -> m_run = true }
	:: atomic { s_node && s_journal == COMMITTED && m_ran -> s_journal = RUNNING }
	:: atomic { s_node && s_journal == RUNNING && source == FROZEN -> source = DEAD }
	:: atomic { s_node && m_ask && (s_journal == COMMITTED || s_journal == RUNNING) &&
		!m_committed -> m_committed = true }
	:: atomic { s_node && m_ask && s_journal == THAWED && !m_aborted -> m_aborted = true }
	:: atomic { s_node && crashes < CRASHES -> crashes++; s_switches = false }
	od
}

active proctype target_agent()
{
	do
	:: atomic { m_restore && t_journal == ARMED && copy == NONE ->
		copy = STOPPED; t_asks = true }
	:: atomic { m_restore && t_journal == ARMED && copy == STOPPED && !m_restored ->
		m_restored = true }
	/* resumed, and only then written down: an agent that ends between the two does it again */
	:: atomic { (m_run || m_committed) && t_journal == ARMED && copy == STOPPED ->
		copy = RUNS }
	:: atomic { (m_run || m_committed) && t_journal == ARMED && copy == RUNS ->
		t_journal = RESUMED }
	:: atomic { t_journal == RESUMED && !m_ran -> m_ran = true }
	:: atomic { t_asks && t_journal == ARMED && !m_ask -> m_ask = true }
	:: atomic { (m_abort || m_aborted) && t_journal == ARMED ->
		copy = NONE; t_journal = REFUSED }
	/* the operator's word: the source's node is fenced */
	:: atomic { !s_node && t_journal == ARMED && copy == STOPPED -> t_journal = FENCED }
	:: atomic { t_journal == FENCED && copy == STOPPED -> copy = RUNS }
	:: atomic { !s_node && copy == NONE && !lost -> lost = true }
	:: atomic { crashes < CRASHES -> crashes++; t_asks = false }
	:: atomic { !t_asks && t_journal == ARMED -> t_asks = true }	/* it has started again */
	od
}

active proctype node()
{
	if
	:: atomic { s_node = false; source = DEAD }
	:: skip
	fi
}

/* Once nothing more can happen, and every message has had its chance, somebody runs, or nobody
 * can any more. */
active proctype end()
{
	timeout -> assert(AT_REST)
}

ltl one_runs { [] ONE_RUNS }
ltl none_lost { [] NONE_LOST }
ltl recorded { [] RECORDED }
