"""What a pod's volumes refer to, read from the API."""

from __future__ import annotations

from godwit_api.errors import Rejected
from godwit_api.pods import Pod
from godwit_operator.kube import CLAIMS, VOLUMES, KubeApi, NotFoundError, Object, find
from godwit_operator.volumes import (
    Storage,
    affinity_to,
    claim_names,
    named_nodes,
    names_its_node,
)

# A label's value that no node has.
_NOWHERE = "godwit-asks"


async def storage_of(api: KubeApi, pod: Pod) -> Storage:
    """Claims of the pod's namespace and the volumes that are bound to the pod's."""
    wanted = set(claim_names(pod))
    if not wanted:
        return Storage()
    listed = await api.list(CLAIMS, pod.metadata.namespace)
    claims = {one["metadata"]["name"]: one for one in listed}
    names = {claims[name]["spec"].get("volumeName") for name in wanted & claims.keys()}
    found = [await find(api, VOLUMES, None, name) for name in names if name]
    volumes = {one["metadata"]["name"]: one for one in found if one}
    fixed = {
        name: why
        for name, one in volumes.items()
        if names_its_node(one) and (why := await _fixed(api, one))
    }
    return Storage(claims, volumes, fixed)


async def _fixed(api: KubeApi, volume: Object) -> str:
    """What the API server has against another node for this volume; "": nothing."""
    names = named_nodes(volume) or []
    body = {"spec": {"nodeAffinity": affinity_to(*names, _NOWHERE)}}
    try:
        await api.patch(VOLUMES, None, volume["metadata"]["name"], body, dry_run=True)
    except Rejected as refusal:
        return (
            "its node affinity cannot be changed, which takes the chart's localVolumes.move and "
            f"the feature gate MutablePVNodeAffinity of Kubernetes ({refusal.message})"
        )
    except NotFoundError:
        return "it has been deleted"
    return ""
