"""Configuration of every component: the services of a node and the files they read."""

from __future__ import annotations

import json
from pathlib import Path

from godwit_testbed import build, images, network, pki
from godwit_testbed.node import Service
from godwit_testbed.paths import Place

_PKI = "/etc/kubernetes/pki"
_STATIC_PODS = "/etc/kubernetes/manifests"
Layout = tuple[dict[str, str | Path], list[Service]]


def _keys(authority: pki.Authority, *names: str) -> dict[str, str | Path]:
    return {f"{_PKI}/{name}": authority.path(name).read_text() for name in names}


def _pair(name: str) -> list[str]:
    return [f"{name}.crt", f"{name}.key"]


def control_plane(
    place: Place, authority: pki.Authority, version: str, *, dual_stack: bool
) -> Layout:
    """etcd, API server, controller manager and scheduler."""
    binaries = build.kubernetes(version)
    address = place.api_address
    components = ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubectl")
    files: dict[str, str | Path] = {
        f"/usr/local/bin/{name}": binaries / name for name in components
    }
    files |= _keys(
        authority,
        "ca.crt",
        "ca.key",
        "sa.key",
        "sa.pub",
        *_pair("apiserver"),
        *_pair("apiserver-kubelet"),
        *_pair("etcd"),
    )
    for user in ("kube-controller-manager", "kube-scheduler", "admin"):
        files[f"/etc/kubernetes/{user}.conf"] = place.kubeconfig(user).read_text()
    services_range = _both(place.service_cidr, place.service_cidr6, dual_stack)
    minor = int(version.split(".")[1])
    gates = {"MutatingAdmissionPolicy=true": minor < 36, "MutablePVNodeAffinity=true": minor >= 35}
    wanted = ",".join(gate for gate, needed in gates.items() if needed)
    runtime = [f"--feature-gates={wanted}"] if wanted else []
    if minor < 36:
        runtime.append("--runtime-config=admissionregistration.k8s.io/v1beta1=true")
    etcd_tls = [
        f"--cert-file={_PKI}/etcd.crt",
        f"--key-file={_PKI}/etcd.key",
        f"--trusted-ca-file={_PKI}/ca.crt",
        "--client-cert-auth",
    ]
    services = [
        Service(
            "etcd",
            [
                "etcd",
                "--data-dir=/var/lib/etcd",
                "--listen-client-urls=https://127.0.0.1:2379",
                "--advertise-client-urls=https://127.0.0.1:2379",
                "--listen-peer-urls=http://127.0.0.1:2380",
                # A testbed's etcd need not survive the machine; fsync would dominate every write.
                "--unsafe-no-fsync",
                "--log-level=warn",
                *etcd_tls,
            ],
        ),
        Service(
            "kube-apiserver",
            [
                "kube-apiserver",
                "--etcd-servers=https://127.0.0.1:2379",
                f"--etcd-cafile={_PKI}/ca.crt",
                f"--etcd-certfile={_PKI}/etcd.crt",
                f"--etcd-keyfile={_PKI}/etcd.key",
                f"--bind-address={address}",
                f"--advertise-address={address}",
                f"--tls-cert-file={_PKI}/apiserver.crt",
                f"--tls-private-key-file={_PKI}/apiserver.key",
                f"--client-ca-file={_PKI}/ca.crt",
                f"--kubelet-certificate-authority={_PKI}/ca.crt",
                f"--kubelet-client-certificate={_PKI}/apiserver-kubelet.crt",
                f"--kubelet-client-key={_PKI}/apiserver-kubelet.key",
                "--kubelet-preferred-address-types=InternalIP",
                "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
                f"--service-account-key-file={_PKI}/sa.pub",
                f"--service-account-signing-key-file={_PKI}/sa.key",
                f"--service-cluster-ip-range={services_range}",
                "--authorization-mode=Node,RBAC",
                "--enable-admission-plugins=NodeRestriction",
                "--allow-privileged",
                "--anonymous-auth=false",
                *runtime,
            ],
        ),
        Service(
            "kube-controller-manager",
            [
                "kube-controller-manager",
                "--kubeconfig=/etc/kubernetes/kube-controller-manager.conf",
                f"--service-account-private-key-file={_PKI}/sa.key",
                f"--root-ca-file={_PKI}/ca.crt",
                "--use-service-account-credentials",
                f"--cluster-signing-cert-file={_PKI}/ca.crt",
                f"--cluster-signing-key-file={_PKI}/ca.key",
                "--bind-address=127.0.0.1",
            ],
        ),
        Service(
            "kube-scheduler",
            [
                "kube-scheduler",
                "--kubeconfig=/etc/kubernetes/kube-scheduler.conf",
                "--bind-address=127.0.0.1",
            ],
        ),
    ]
    return files, services


def _both(first: str, second: str, dual_stack: bool) -> str:
    return f"{first},{second}" if dual_stack else first


def worker(
    place: Place, node: str, authority: pki.Authority, version: str, cni: str, *, dual_stack: bool
) -> Layout:
    """containerd, kubelet and kube-proxy."""
    binaries = build.kubernetes(version)
    address = _both(
        network.node_address(place, node), network.node_address6(place, node), dual_stack
    )
    files: dict[str, str | Path] = {
        f"/usr/local/bin/{name}": binaries / name for name in ("kubelet", "kube-proxy")
    }
    files |= _keys(authority, "ca.crt", *_pair(f"node-{node}"))
    files |= {
        "/etc/kubernetes/kubelet.conf": place.kubeconfig(f"node-{node}").read_text(),
        "/etc/kubernetes/kube-proxy.conf": place.kubeconfig("kube-proxy").read_text(),
        f"{_STATIC_PODS}/.keep": "",  # the kubelet overlooks names that begin with a dot
        "/etc/kubernetes/kubelet.json": json.dumps(_kubelet(place, node), indent=1),
        "/etc/containerd/config.toml": _CONTAINERD,
        "/etc/cni/net.d/10-podnet.conflist": json.dumps(
            _cni(place, node, cni, dual_stack), indent=1
        ),
    }
    services = [
        Service("containerd", ["containerd", "--config=/etc/containerd/config.toml"]),
        Service(
            "kubelet",
            [
                "kubelet",
                "--config=/etc/kubernetes/kubelet.json",
                "--kubeconfig=/etc/kubernetes/kubelet.conf",
                f"--hostname-override={node}",
                f"--node-ip={address}",
            ],
        ),
        Service(
            "kube-proxy",
            [
                "kube-proxy",
                "--kubeconfig=/etc/kubernetes/kube-proxy.conf",
                "--proxy-mode=nftables",
                f"--cluster-cidr={_both(place.pod_cidr, place.pod_cidr6, dual_stack)}",
                f"--hostname-override={node}",
                "--bind-address=127.0.0.1",
                "--conntrack-max-per-core=0",
                "--conntrack-tcp-timeout-established=0",
                "--conntrack-tcp-timeout-close-wait=0",
                "--oom-score-adj=0",
            ],
        ),
    ]
    return files, services


def _kubelet(place: Place, node: str) -> dict[str, object]:
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": f"{_PKI}/ca.crt"},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": f"{_PKI}/node-{node}.crt",
        "tlsPrivateKeyFile": f"{_PKI}/node-{node}.key",
        "cgroupDriver": "cgroupfs",
        "failCgroupV1": False,
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        "clusterDNS": [place.dns_address],
        "clusterDomain": "cluster.local",
        "resolvConf": "/etc/resolv.conf",
        "failSwapOn": False,
        "localStorageCapacityIsolation": False,
        "enforceNodeAllocatable": [],
        "evictionHard": {"memory.available": "100Mi"},
        "oomScoreAdj": 0,
        "makeIPTablesUtilChains": False,
        "serializeImagePulls": False,
        "nodeStatusUpdateFrequency": "5s",
        "staticPodPath": _STATIC_PODS,
    }


def _cni(place: Place, node: str, cni: str, dual_stack: bool) -> dict[str, object]:
    subnets = [network.pod_cidr(place, node)]
    routes = ["0.0.0.0/0"]
    if dual_stack:
        subnets.append(network.pod_cidr6(place, node))
        routes.append("::/0")
    ipam = {
        "type": "host-local",
        "ranges": [[{"subnet": subnet}] for subnet in subnets],
        "dataDir": "/var/lib/cni/networks",
        "routes": [{"dst": route} for route in routes],
    }
    if cni == "bridge":
        main: dict[str, object] = {
            "type": "bridge",
            "bridge": "cni0",
            "isGateway": True,
            "ipMasq": False,
            "ipam": ipam,
        }
    else:
        main = {"type": "ptp", "ipMasq": False, "ipam": ipam}
    portmap = {"type": "portmap", "capabilities": {"portMappings": True}}
    return {"cniVersion": "1.0.0", "name": "podnet", "plugins": [main, portmap]}


_CONTAINERD = f"""\
version = 3
imports = ["/etc/containerd/conf.d/*.toml"]
[plugins.'io.containerd.cri.v1.images']
  snapshotter = "overlayfs"
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = "{images.PAUSE_IMAGE}"
[plugins.'io.containerd.cri.v1.runtime']
  # Without CAP_SYS_RESOURCE an oom_score_adj cannot be lowered, and without the hugetlb
  # controller limits of huge pages cannot be set.
  restrict_oom_score_adj = true
  disable_hugetlb_controller = true
[plugins.'io.containerd.cri.v1.runtime'.cni]
  bin_dirs = ["/usr/lib/cni"]
  conf_dir = "/etc/cni/net.d"
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
"""


def system_manifests(place: Place) -> str:
    """CoreDNS and its permissions, as JSON for ``kubectl apply``."""
    corefile = (
        ".:53 {\n  errors\n  health\n  ready\n"
        "  kubernetes cluster.local in-addr.arpa {\n    pods insecure\n  }\n  cache 30\n}\n"
    )
    meta = {"name": "coredns", "namespace": "kube-system"}
    labels = {"k8s-app": "kube-dns"}
    container = {
        "name": "coredns",
        "image": images.COREDNS_IMAGE,
        "imagePullPolicy": "Never",
        "args": ["-conf", "/etc/coredns/Corefile"],
        "ports": [
            {"containerPort": 53, "protocol": "UDP", "name": "dns"},
            {"containerPort": 53, "protocol": "TCP", "name": "dns-tcp"},
        ],
        "readinessProbe": {"httpGet": {"path": "/ready", "port": 8181}, "periodSeconds": 2},
        "volumeMounts": [{"name": "config", "mountPath": "/etc/coredns"}],
    }
    items: list[dict[str, object]] = [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": meta},
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": {"Corefile": corefile}},
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRole",
            "metadata": {"name": "testbed:coredns"},
            "rules": [
                {
                    "apiGroups": [""],
                    "resources": ["endpoints", "services", "pods", "namespaces"],
                    "verbs": ["list", "watch"],
                },
                {
                    "apiGroups": ["discovery.k8s.io"],
                    "resources": ["endpointslices"],
                    "verbs": ["list", "watch"],
                },
            ],
        },
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": "testbed:coredns"},
            "roleRef": {
                "apiGroup": "rbac.authorization.k8s.io",
                "kind": "ClusterRole",
                "name": "testbed:coredns",
            },
            "subjects": [{"kind": "ServiceAccount", **meta}],
        },
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": meta,
            "spec": {
                "replicas": 1,
                "selector": {"matchLabels": labels},
                "template": {
                    "metadata": {"labels": labels},
                    "spec": {
                        "serviceAccountName": "coredns",
                        "dnsPolicy": "Default",
                        "priorityClassName": "system-cluster-critical",
                        "containers": [container],
                        "volumes": [{"name": "config", "configMap": {"name": "coredns"}}],
                    },
                },
            },
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "kube-dns", "namespace": "kube-system"},
            "spec": {
                "clusterIP": place.dns_address,
                "selector": labels,
                "ports": [
                    {"name": "dns", "port": 53, "protocol": "UDP"},
                    {"name": "dns-tcp", "port": 53, "protocol": "TCP"},
                ],
            },
        },
    ]
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": items})
