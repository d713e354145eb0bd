"""What a pod's volumes refer to, read from the API."""

from __future__ import annotations

from godwit_api.pods import Pod
from godwit_operator.kube import CLAIMS, VOLUMES, KubeApi, find
from godwit_operator.volumes import Storage, claim_names


async def storage_of(api: KubeApi, pod: Pod) -> Storage:
    """Claims of the pod's namespace and the volumes that are bound to the pod's."""
    wanted = set(claim_names(pod))
    if not wanted:
        return Storage()
    listed = await api.list(CLAIMS, pod.metadata.namespace)
    claims = {one["metadata"]["name"]: one for one in listed}
    names = {claims[name]["spec"].get("volumeName") for name in wanted & claims.keys()}
    found = [await find(api, VOLUMES, None, name) for name in names if name]
    return Storage(claims, {one["metadata"]["name"]: one for one in found if one})
