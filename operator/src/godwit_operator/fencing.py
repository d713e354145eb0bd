"""A source node that is gone for good: its target may run the copy without its word."""

from __future__ import annotations

import msgspec

from godwit_api.errors import Rejected, Retryable
from godwit_api.migration import Failure, PodMigration
from godwit_api.pb import agent_pb2 as pb
from godwit_api.pods import Node
from godwit_api.reasons import Reason
from godwit_operator.agents import AgentPool
from godwit_operator.kube import NODES, KubeApi, find
from godwit_operator.messages import reference
from godwit_operator.plan import Committed, Failed, Result

OUT_OF_SERVICE = "node.kubernetes.io/out-of-service"
_AWAY = frozenset({Reason.AGENT_UNREACHABLE, Reason.AGENT_MISSING})


async def is_fenced(api: KubeApi, node: str) -> bool:
    """Whether nothing runs on ``node`` any more: there is no such Node object, or it has the
    taint by which an administrator says that the machine is off (Kubernetes' documentation,
    "Non-graceful node shutdown handling")."""
    body = await find(api, NODES, None, node)
    if body is None:
        return True
    return any(taint.key == OUT_OF_SERVICE for taint in msgspec.convert(body, Node).spec.taints)


async def without_source(
    api: KubeApi, agents: AgentPool, migration: PodMigration, failure: Retryable
) -> Result:
    """How an attempt ends whose source agent does not answer (``failure``).

    A copy that the target has not refused is complete or lost with its source: the source is
    asked for its decision all the time, and a rollback is told to the target at once. The copy
    may be older than the source's last reply only if the source was cut off, thawed, and died
    before it could be heard again. Raises ``Retryable`` with the way out while it is not known
    that the source cannot run.
    """
    source, target = migration.status.source_node, migration.status.target_node
    if failure.reason not in _AWAY:
        raise failure
    if not await is_fenced(api, source):
        message = (
            f"{failure.message}. The pod is safe as long as node {source} can come back. If it "
            f"cannot, delete the Node, or taint it with {OUT_OF_SERVICE}: then the copy on node "
            f"{target} runs"
        )
        raise Retryable(failure.reason, message, delay_seconds=1.0) from failure
    if source != target:
        request = pb.RunRequest(migration=reference(migration))
        try:
            await (await agents.agent(target)).run_fenced(request)
        except Rejected as answer:
            failure = Retryable(answer.reason, answer.message)
        else:
            return Committed()
    message = f"Node {source} is gone and with it the pod's process: {failure.message}"
    return Failed(Failure(reason=Reason.NODE_LOST, message=message))
