"""Replacing the Pod object: rule, delete, successor. Effects on the API server.

Every function may be repeated at any time; names follow from the migration's
UID, and UIDs are checked before anything is deleted or changed.
"""

from __future__ import annotations

import base64
import logging
from dataclasses import dataclass
from typing import Any

import msgspec

from godwit_api.errors import Aborted, Retryable
from godwit_api.migration import MIGRATION_KEY, PodMigration
from godwit_api.pods import Pod
from godwit_api.reasons import Reason
from godwit_operator.kube import (
    BINDINGS,
    PODS,
    POLICIES,
    REPLICA_SETS,
    SECRETS,
    STATEFUL_SETS,
    ConflictError,
    KubeApi,
    NotFoundError,
    find,
    remove,
)
from godwit_operator.manifest import (
    bare_manifest,
    gated,
    pin_and_release,
    placeholder,
    release_unchanged,
)
from godwit_operator.rule import MANAGED_BY, Rule, admitted, binding, policy, probe

Object = dict[str, Any]
log = logging.getLogger(__name__)
_OWNERS = {"StatefulSet": STATEFUL_SETS, "ReplicaSet": REPLICA_SETS}


def rule_of(migration: PodMigration) -> Rule:
    """By owner for ReplicaSets, whose pods get new names; else by name."""
    note = migration.status.handover
    by_owner = note.owner_kind == "ReplicaSet"
    return Rule(
        migration=migration.metadata.uid,
        namespace=migration.metadata.namespace,
        pod_name="" if by_owner else migration.spec.pod_name,
        owner_uid=note.owner_uid if by_owner else "",
    )


@dataclass(frozen=True)
class Handover:
    """Effects of one migration; ``secrets`` is the operator's own namespace."""

    api: KubeApi
    secrets: str
    migration: PodMigration

    @property
    def namespace(self) -> str:
        return self.migration.metadata.namespace

    @property
    def uid(self) -> str:
        return self.migration.metadata.uid

    @property
    def bare(self) -> bool:
        return self.migration.status.handover.owner_kind == ""

    # -- the rule -------------------------------------------------------------------------
    async def announce(self) -> None:
        """Make the rule's objects. The API server looks for new ones once a second, so the earlier
        they are there the less is waited for it; by itself this proves nothing."""
        rule = rule_of(self.migration)
        for kind, body in ((POLICIES, policy(rule)), (BINDINGS, binding(rule))):
            try:
                await self.api.create(kind, None, body)
            except ConflictError:
                continue  # the name has our UID in it: it is the same rule

    async def arm(self) -> None:
        """Put the rule in force and prove it; Retryable until the API server has it."""
        await self.announce()
        rule = rule_of(self.migration)
        pod = await find(self.api, PODS, self.namespace, self.migration.spec.pod_name)
        body = probe(rule, pod or self._like(rule))
        answer = msgspec.convert(
            await self.api.create(PODS, self.namespace, body, dry_run=True), Pod
        )
        if not admitted(rule, answer):
            raise Retryable(
                Reason.SUCCESSOR_NOT_ADMITTED,
                f"The API server does not apply admission rule {rule.name} yet",
                delay_seconds=0.05,
            )

    def _like(self, rule: Rule) -> Object:
        """A pod as the owner would make it, when none is left to copy."""
        body = placeholder(self.namespace)
        note = self.migration.status.handover
        if rule.owner_uid:
            owner = {"apiVersion": "apps/v1", "kind": note.owner_kind, "name": note.owner_name}
            body["metadata"]["ownerReferences"] = [
                owner | {"uid": note.owner_uid, "controller": True}
            ]
        return body

    async def disarm(self) -> None:
        name = rule_of(self.migration).name
        await remove(self.api, BINDINGS, None, name)
        await remove(self.api, POLICIES, None, name)

    # -- the pod that goes ----------------------------------------------------------------
    async def delete_pod(self, name: str, uid: str) -> None:
        """Delete exactly that pod, at once; done when it is not there any more."""
        try:
            await self.api.delete(PODS, self.namespace, name, uid=uid, grace_seconds=0)
        except (NotFoundError, ConflictError):
            return

    # -- bare pods ------------------------------------------------------------------------
    @property
    def manifest_name(self) -> str:
        return f"godwit-manifest-{self.uid}"

    async def store_manifest(self) -> None:
        """Keep what the pod is made of: nobody else would create it again."""
        pod = await find(self.api, PODS, self.namespace, self.migration.spec.pod_name)
        if pod is None or pod["metadata"]["uid"] != self.migration.status.pod_uid:
            raise Aborted(Reason.SOURCE_DELETED, "The pod was deleted or replaced meanwhile")
        data = base64.b64encode(msgspec.json.encode(bare_manifest(pod))).decode()
        body = {
            "apiVersion": "v1",
            "kind": "Secret",
            "type": "godwit.io/manifest",
            "metadata": {"name": self.manifest_name, "labels": MANAGED_BY},
            "data": {"pod.json": data},
        }
        try:
            await self.api.create(SECRETS, self.secrets, body)
        except ConflictError:
            return

    async def _manifest(self) -> Object:
        secret = await self.api.get(SECRETS, self.secrets, self.manifest_name)
        found: Object = msgspec.json.decode(base64.b64decode(secret["data"]["pod.json"]))
        return found

    async def create_bare(self, *, gate: bool = True) -> None:
        """Create a bare pod's successor, unless it is there already."""
        manifest = await self._manifest()
        body = gated(manifest, self.uid) if gate else manifest
        try:
            await self.api.create(PODS, self.namespace, body)
        except ConflictError:
            return

    async def forget_manifest(self) -> None:
        if self.bare:
            await remove(self.api, SECRETS, self.secrets, self.manifest_name)

    # -- the pod that comes ---------------------------------------------------------------
    async def marked(self) -> list[Object]:
        """Pods that our rule has marked, the oldest first."""
        pods = await self.api.list(PODS, self.namespace, labels=f"{MIGRATION_KEY}={self.uid}")
        return sorted(
            pods, key=lambda p: (p["metadata"]["creationTimestamp"], p["metadata"]["name"])
        )

    async def find_successor(self) -> Pod:
        """The successor: gated and marked. Retryable while there is none."""
        rule = rule_of(self.migration)
        for body in await self.marked():
            pod = msgspec.convert(body, Pod)
            if admitted(rule, pod) and not pod.terminating:
                return pod
        await self._remove_unadmitted(rule)
        await self._owner_wants_it()
        raise Retryable(
            Reason.SUCCESSOR_NOT_CREATED,
            "The pod's owner has not created the successor yet",
            delay_seconds=0.03,
        )

    async def _remove_unadmitted(self, rule: Rule) -> None:
        """A pod of that name that slipped past the rule would start empty: not that one."""
        if rule.owner_uid:
            return
        body = await find(self.api, PODS, self.namespace, rule.pod_name)
        if body is None:
            return
        pod = msgspec.convert(body, Pod)
        known = {self.migration.status.pod_uid, self.migration.status.successor_uid}
        if pod.metadata.uid not in known and not admitted(rule, pod):
            log.warning("removing a pod that was not admitted", extra={"pod": rule.pod_name})
            await self.delete_pod(rule.pod_name, pod.metadata.uid)

    async def _owner_wants_it(self) -> None:
        note = self.migration.status.handover
        kind = _OWNERS.get(note.owner_kind)
        if kind is None:
            return
        owner = await find(self.api, kind, self.namespace, note.owner_name)
        what = f"{note.owner_kind} {note.owner_name}"
        if owner is None or owner["metadata"]["uid"] != note.owner_uid:
            raise Aborted(Reason.SOURCE_DELETED, f"{what} was deleted meanwhile")
        if "deletionTimestamp" in owner["metadata"] or not _wanted(owner, self.migration):
            raise Aborted(Reason.SOURCE_DELETED, f"{what} does not want the pod any more")

    async def release(self, node: str) -> None:
        """Pin the successor to its node and let it go; others of the rule go as they are."""
        status = self.migration.status
        try:
            body = await self.api.get(PODS, self.namespace, status.successor_name)
        except NotFoundError as cause:
            raise Aborted(Reason.SUCCESSOR_FAILED, "The successor was deleted") from cause
        pod = msgspec.convert(body, Pod)
        if pod.metadata.uid != status.successor_uid or pod.terminating:
            raise Aborted(Reason.SUCCESSOR_FAILED, "The successor was deleted or replaced")
        if pod.gated:
            patch = pin_and_release(body, node)
            try:
                await self.api.patch(PODS, self.namespace, status.successor_name, patch)
            except ConflictError as cause:
                raise Retryable(Reason.API_UNAVAILABLE, str(cause), delay_seconds=0.02) from cause
        if rule_of(self.migration).owner_uid:
            # others must not wait for us; a rule by name concerns nobody else
            await self.disarm()
            await self.release_bystanders()

    async def release_bystanders(self) -> None:
        """Lift the gate of every pod that the rule has caught beside the successor."""
        for body in await self.marked():
            pod = msgspec.convert(body, Pod)
            if pod.gated and pod.metadata.uid != self.migration.status.successor_uid:
                patch = release_unchanged(body)
                try:
                    await self.api.patch(PODS, self.namespace, pod.metadata.name, patch)
                except (NotFoundError, ConflictError):
                    continue  # gone, or changed: the next round sees it

    async def successor(self) -> Pod | None:
        """The recorded successor, while it exists."""
        status = self.migration.status
        body = await find(self.api, PODS, self.namespace, status.successor_name)
        if body is None or body["metadata"]["uid"] != status.successor_uid:
            return None
        return msgspec.convert(body, Pod)


def _wanted(owner: Object, migration: PodMigration) -> bool:
    replicas = owner.get("spec", {}).get("replicas", 1)
    if owner.get("kind") == "ReplicaSet" or migration.status.handover.owner_kind == "ReplicaSet":
        return bool(replicas > 0)
    start = (owner["spec"].get("ordinals") or {}).get("start", 0)
    ordinal = migration.spec.pod_name.rpartition("-")[2]
    return not ordinal.isdecimal() or start <= int(ordinal) < start + replicas
