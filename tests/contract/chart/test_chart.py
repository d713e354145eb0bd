"""The chart as the real helm renders it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from godwit_agent import config as agent_config
from godwit_api.identity import ENROLLMENT_AUDIENCE, OPERATOR_ENROLLMENT_PORT

ROOT = Path(__file__).resolve().parents[3]
CHART = ROOT / "charts" / "godwit"
CACHES = ("/var/cache/godwit/testbed/bin", "/var/cache/godwit/seed/bin2")
Object = dict[str, Any]


def find_helm() -> str | None:
    """``$HELM``, the one in PATH, or the testbed's."""
    if given := os.environ.get("HELM"):
        return given
    if found := shutil.which("helm"):
        return found
    cache = os.environ.get("GODWIT_TESTBED_CACHE")
    for directory in ([f"{cache}/bin"] if cache else []) + list(CACHES):
        for file in sorted(Path(directory).glob("helm*"), reverse=True):
            if os.access(file, os.X_OK) and file.is_file():
                return str(file)
    return None


HELM = find_helm()
pytestmark = pytest.mark.skipif(
    HELM is None,
    reason="there is no helm: set HELM, or let `testbed/testbed build` make one",
)


def helm(*words: str) -> subprocess.CompletedProcess[str]:
    assert HELM
    return subprocess.run([HELM, *words], capture_output=True, text=True, check=False)


@dataclass(frozen=True)
class Rendered:
    """All objects of one rendering, hooks too."""

    objects: list[Object]

    def all(self, kind: str) -> Iterator[Object]:
        return (item for item in self.objects if item["kind"] == kind)

    def one(self, kind: str, name: str = "") -> Object:
        (found,) = (item for item in self.all(kind) if name in ("", item["metadata"]["name"]))
        return found


def render(*words: str, namespace: str = "godwit-system") -> Rendered:
    done = helm("template", "godwit", str(CHART), "--namespace", namespace, *words)
    assert done.returncode == 0, done.stderr
    return Rendered([item for item in yaml.safe_load_all(done.stdout) if item])


@pytest.fixture(scope="module")
def default() -> Rendered:
    return render()


@pytest.fixture(scope="module")
def full() -> Rendered:
    """Every optional object, in a namespace with another name."""
    options = "networkPolicy.enabled=true,localVolumes.move=true"
    return render("--set", options, namespace="elsewhere")


def pod_specs(rendered: Rendered) -> dict[str, Object]:
    found = {}
    for kind in ("Deployment", "DaemonSet", "Job"):
        for item in rendered.all(kind):
            found[item["metadata"]["name"]] = item["spec"]["template"]["spec"]
    return found


def environment(container: Object) -> dict[str, Object]:
    return {item["name"]: item for item in container["env"]}


# -- values -----------------------------------------------------------------------------------
def test_lint() -> None:
    done = helm("lint", "--strict", str(CHART))
    assert done.returncode == 0, done.stdout + done.stderr


def test_values_of_the_testbed() -> None:
    rendered = render("--values", str(CHART / "values-testbed.yaml"))
    images = {
        container["image"]
        for spec in pod_specs(rendered).values()
        for container in spec["containers"] + spec.get("initContainers", [])
    }
    assert images == {"godwit.local/godwit-operator:dev", "godwit.local/godwit-node-agent:dev"}


@pytest.mark.parametrize(
    ("value", "field"),
    [
        ("images.operator.digest=sha256:abc", "images/operator/digest"),
        ("images.operator.repository=", "images/operator/repository"),
        ("images.pullPolicy=Sometimes", "images/pullPolicy"),
        ("images.agent.tag=1", "agent"),
        ("operator.concurrency.perNode=0", "perNode"),
        ("operator.concurrency.cluster=many", "cluster"),
        ("operator.logLevel=info", "logLevel"),
        ("operator.replicas=2", "replicas"),
        ("nodeAgent.tolerations=all", "tolerations"),
        ("nodeAgent.installer.containerd.configFile=config.toml", "configFile"),
        ("nodeAgent.installer.containerd.restartCommand=", "restartCommand"),
        ("nodeAgent.installer.containerd.socket=/", "socket"),
        ("networkPolicy.enabled=please", "networkPolicy"),
        ("crds.keep=perhaps", "keep"),
        ("runtimeClass.name=other", "runtimeClass"),
        ("typo=1", "typo"),
    ],
)
def test_values_that_make_no_sense_are_refused_by_name(value: str, field: str) -> None:
    done = helm("template", "godwit", str(CHART), "--set", value)
    assert done.returncode != 0
    assert "values don't meet the specifications" in done.stderr
    assert field.rpartition("/")[2] in done.stderr


def test_every_value_is_in_the_schema() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    schema = json.loads((CHART / "values.schema.json").read_text())

    def walk(value: Any, node: Object, path: str) -> None:
        while "$ref" in node:
            node = schema["definitions"][node["$ref"].rpartition("/")[2]]
        if not isinstance(value, dict) or "properties" not in node:
            return
        assert node.get("additionalProperties") is False, path
        for key, inner in value.items():
            assert key in node["properties"], f"{path}.{key}"
            walk(inner, node["properties"][key], f"{path}.{key}")

    walk(values, schema, "values")


def test_a_digest_is_used_instead_of_the_tag() -> None:
    digest = f"sha256:{'a' * 64}"
    rendered = render("--set", f"images.operator.digest={digest},images.operator.tag=x")
    (container,) = rendered.one("Deployment")["spec"]["template"]["spec"]["containers"]
    assert container["image"] == f"godwit-operator@{digest}"


def test_pull_secrets_reach_every_pod() -> None:
    rendered = render("--set", "images.pullSecrets[0].name=key")
    assert all(
        spec["imagePullSecrets"] == [{"name": "key"}] for spec in pod_specs(rendered).values()
    )
    retire = environment(pod_specs(rendered)["godwit-retire"]["containers"][0])
    template = json.loads(retire["GODWIT_RETIRE_POD"]["value"])
    assert template["spec"]["imagePullSecrets"] == [{"name": "key"}]


# -- all objects ------------------------------------------------------------------------------
def test_objects_have_what_every_object_has(full: Rendered) -> None:
    seen = set()
    for item in full.objects:
        meta = item["metadata"]
        key = (item["kind"], meta.get("namespace"), meta["name"])
        assert key not in seen
        seen.add(key)
        if item["kind"] == "CustomResourceDefinition":
            continue
        assert meta["name"].startswith("godwit"), key
        labels = meta["labels"]
        assert labels["app.kubernetes.io/name"] == "godwit"
        assert labels["app.kubernetes.io/instance"] == "godwit"
        # The one thing outside its own namespace: Events about nodes.
        assert meta.get("namespace", "elsewhere") in ("elsewhere", "default"), key


def test_selectors_find_their_pods(full: Rendered) -> None:
    pods = {
        name: item["spec"]["template"]["metadata"]["labels"]
        for kind in ("Deployment", "DaemonSet")
        for item in full.all(kind)
        for name in [item["metadata"]["name"]]
    }

    def found(selector: dict[str, str]) -> list[str]:
        return [name for name, labels in pods.items() if selector.items() <= labels.items()]

    for kind in ("Deployment", "DaemonSet"):
        for item in full.all(kind):
            assert found(item["spec"]["selector"]["matchLabels"]) == [item["metadata"]["name"]]
    assert found(full.one("Service")["spec"]["selector"]) == ["godwit-operator"]
    policy = full.one("NetworkPolicy")["spec"]["podSelector"]["matchLabels"]
    assert found(policy) == ["godwit-operator"]


def test_mounted_volumes_exist_and_ports_have_names(full: Rendered) -> None:
    for name, spec in pod_specs(full).items():
        volumes = {volume["name"] for volume in spec.get("volumes", [])}
        mounted = {
            mount["name"]
            for container in spec["containers"] + spec.get("initContainers", [])
            for mount in container.get("volumeMounts", [])
        }
        assert mounted == volumes, name


# -- permissions ------------------------------------------------------------------------------
def rules(rendered: Rendered) -> Iterator[tuple[str, Object]]:
    for kind in ("ClusterRole", "Role"):
        for item in rendered.all(kind):
            for rule in item["rules"]:
                yield f"{kind} {item['metadata']['name']}", rule


def test_no_wildcards_and_nothing_that_leads_to_more(full: Rendered) -> None:
    for name, rule in rules(full):
        assert not {"*"} & {*rule["apiGroups"], *rule["resources"], *rule["verbs"]}, name
        assert not {"escalate", "bind", "impersonate"} & set(rule["verbs"]), name
        groups = {"rbac.authorization.k8s.io", "certificates.k8s.io"}
        assert not groups & set(rule["apiGroups"]), name
        forbidden = {
            "nodes/proxy",
            "pods/exec",
            "serviceaccounts/token",
            "pods/ephemeralcontainers",
        }
        assert not forbidden & set(rule["resources"]), name


def test_secrets_are_read_in_the_own_namespace_only(full: Rendered) -> None:
    for item in full.all("ClusterRole"):
        assert all("secrets" not in rule["resources"] for rule in item["rules"])
    for item in full.all("Role"):
        if any("secrets" in rule["resources"] for rule in item["rules"]):
            assert item["metadata"]["namespace"] == "elsewhere"


def test_node_agents_may_do_three_things(full: Rendered) -> None:
    (nodes, status) = full.one("ClusterRole", "godwit-node-agent")["rules"]
    assert nodes == {"apiGroups": [""], "resources": ["nodes"], "verbs": ["get", "patch"]}
    assert status == {"apiGroups": [""], "resources": ["nodes/status"], "verbs": ["patch"]}
    (events,) = full.one("Role", "godwit-node-agent")["rules"]
    assert (events["resources"], events["verbs"]) == (["events"], ["create"])
    (authority,) = full.one("Role", "godwit-node-agent-ca")["rules"]
    assert (authority["resourceNames"], authority["verbs"]) == (["godwit-ca"], ["get"])


def test_bindings_bind_roles_that_exist_to_accounts_that_exist(full: Rendered) -> None:
    accounts = {item["metadata"]["name"] for item in full.all("ServiceAccount")}
    for kind in ("ClusterRoleBinding", "RoleBinding"):
        for item in full.all(kind):
            full.one(item["roleRef"]["kind"], item["roleRef"]["name"])
            (subject,) = item["subjects"]
            assert subject["namespace"] == "elsewhere"
            assert subject["name"] in accounts
            assert item["metadata"]["name"].startswith(subject["name"])
    for name, spec in pod_specs(full).items():
        assert spec["serviceAccountName"] in accounts, name


def test_the_policy_of_node_agents_fails_closed(full: Rendered) -> None:
    policy = full.one("ValidatingAdmissionPolicy", "godwit-node-agent-own-node")
    assert policy["spec"]["failurePolicy"] == "Fail"
    (condition,) = policy["spec"]["matchConditions"]
    assert '"system:serviceaccount:elsewhere:godwit-node-agent"' in condition["expression"]
    (resources,) = policy["spec"]["matchConstraints"]["resourceRules"]
    assert resources["resources"] == ["nodes", "nodes/status"]
    binding = full.one("ValidatingAdmissionPolicyBinding", policy["metadata"]["name"])
    assert binding["spec"] == {
        "policyName": policy["metadata"]["name"],
        "validationActions": ["Deny"],
    }


def test_persistent_volumes_are_changed_only_where_that_is_wanted(
    default: Rendered, full: Rendered
) -> None:
    def may_patch(rendered: Rendered) -> list[str]:
        return [
            name
            for name, rule in rules(rendered)
            if "persistentvolumes" in rule["resources"] and "patch" in rule["verbs"]
        ]

    assert may_patch(default) == []
    assert may_patch(full) == ["ClusterRole godwit-operator-local-volumes"]
    policy = full.one("ValidatingAdmissionPolicy", "godwit-operator-local-volumes")
    assert policy["spec"]["failurePolicy"] == "Fail"
    (condition,) = policy["spec"]["matchConditions"]
    assert '"system:serviceaccount:elsewhere:godwit-operator"' in condition["expression"]
    binding = full.one("ValidatingAdmissionPolicyBinding", policy["metadata"]["name"])
    assert binding["spec"] == {
        "policyName": policy["metadata"]["name"],
        "validationActions": ["Deny"],
    }


def test_operator_permissions_are_those_of_its_source(default: Rendered) -> None:
    source = ROOT / "operator" / "rbac.yaml"
    wanted = {
        (item["kind"], item["metadata"]["name"]): item["rules"]
        for item in yaml.safe_load_all(source.read_text())
        if item and item["kind"] in ("ClusterRole", "Role")
    }
    assert wanted
    for (kind, name), expected in wanted.items():
        assert default.one(kind, name)["rules"] == expected


# -- operator ---------------------------------------------------------------------------------
def restricted(spec: Object) -> None:
    """As the Pod Security Standard ``restricted`` has it."""
    context = spec["securityContext"]
    assert context["runAsNonRoot"] is True
    assert context["runAsUser"] > 0
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not any(spec.get(key) for key in ("hostNetwork", "hostPID", "hostIPC"))
    assert not any("hostPath" in volume for volume in spec.get("volumes", []))
    for container in spec["containers"]:
        own = container["securityContext"]
        assert own["allowPrivilegeEscalation"] is False
        assert own["readOnlyRootFilesystem"] is True
        assert own["capabilities"] == {"drop": ["ALL"]}


def test_operator(default: Rendered) -> None:
    deployment = default.one("Deployment")
    assert deployment["spec"]["replicas"] == 1
    assert deployment["spec"]["strategy"] == {"type": "Recreate"}
    spec = deployment["spec"]["template"]["spec"]
    restricted(spec)
    (container,) = spec["containers"]
    assert {"livenessProbe", "readinessProbe", "resources"} <= set(container)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports["enrollment"] == OPERATOR_ENROLLMENT_PORT
    (port,) = default.one("Service")["spec"]["ports"]
    assert (port["port"], port["targetPort"]) == (OPERATOR_ENROLLMENT_PORT, "enrollment")


def test_operator_settings_exist(default: Rendered) -> None:
    config = pytest.importorskip("godwit_operator.config", reason="the operator is not there yet")
    spec = pod_specs(default)["godwit-operator"]
    given = {
        name: item.get("value", "from-the-pod")
        for name, item in environment(spec["containers"][0]).items()
    }
    known = {f"GODWIT_{field.upper()}" for field in config.Config.__dataclass_fields__}
    assert set(given) <= known
    config.load(given)


# -- node agent -------------------------------------------------------------------------------
def test_node_agent(default: Rendered) -> None:
    daemon_set = default.one("DaemonSet")
    assert daemon_set["spec"]["updateStrategy"]["type"] == "RollingUpdate"
    spec = daemon_set["spec"]["template"]["spec"]
    assert spec["hostNetwork"] is True
    assert spec["hostPID"] is True
    assert spec["priorityClassName"] == "system-node-critical"
    assert spec["tolerations"] == [{"operator": "Exists"}]
    assert "nodeSelector" not in spec, "agents run on unprepared nodes too, and say so"
    # The agent gets no token of the API server; only its installer does.
    assert spec["automountServiceAccountToken"] is False
    (agent,) = spec["containers"]
    assert "api-token" not in {mount["name"] for mount in agent["volumeMounts"]}
    assert agent["securityContext"]["privileged"] is True


def test_node_agent_settings_exist(default: Rendered) -> None:
    (agent,) = pod_specs(default)["godwit-node-agent"]["containers"]
    fields = {"spec.nodeName": "n1", "status.hostIP": "10.0.0.1"}
    given = {
        name: item.get("value") or fields[item["valueFrom"]["fieldRef"]["fieldPath"]]
        for name, item in environment(agent).items()
    }
    known = {f"GODWIT_{field.upper()}" for field in agent_config.Config.__dataclass_fields__}
    assert set(given) <= known
    loaded = agent_config.load(given)
    mounts = {mount["name"]: Path(mount["mountPath"]) for mount in agent["volumeMounts"]}
    assert loaded.ca_file.parent == mounts["ca"]
    assert loaded.token_file.parent == mounts["enrollment-token"]
    assert mounts["state"] in loaded.journal_dir.parents
    assert (
        loaded.enrollment_address == f"godwit-operator.godwit-system.svc:{OPERATOR_ENROLLMENT_PORT}"
    )
    for probe in ("livenessProbe", "startupProbe"):
        assert agent[probe]["grpc"]["port"] == loaded.health_port


def test_node_agent_proves_itself_with_a_token_for_the_operator_only(default: Rendered) -> None:
    volumes = {item["name"]: item for item in pod_specs(default)["godwit-node-agent"]["volumes"]}
    (source,) = volumes["enrollment-token"]["projected"]["sources"]
    assert source["serviceAccountToken"]["audience"] == ENROLLMENT_AUDIENCE
    assert volumes["ca"]["configMap"] == {"name": "godwit-ca", "optional": True}


def test_installer_stays_beside_the_agent(default: Rendered) -> None:
    (installer,) = pod_specs(default)["godwit-node-agent"]["initContainers"]
    assert installer["restartPolicy"] == "Always"
    assert installer["command"] == ["python3", "-m", "godwit_agent.install", "keep"]
    started = environment(installer)["GODWIT_STARTED_FILE"]["value"]
    assert installer["startupProbe"]["exec"]["command"] == ["test", "-e", started]


def test_settings_of_containerd_reach_install_and_uninstall() -> None:
    prefix = "nodeAgent.installer.containerd"
    rendered = render(
        *("--set", f"{prefix}.configFile=/c/config.toml,{prefix}.socket=/c/sock"),
        *("--set", f"{prefix}.restartCommand=restart c"),
    )
    specs = pod_specs(rendered)
    retire = environment(specs["godwit-retire"]["containers"][0])
    template = json.loads(retire["GODWIT_RETIRE_POD"]["value"])
    for container in (
        specs["godwit-node-agent"]["initContainers"][0],
        template["spec"]["containers"][0],
    ):
        given = environment(container)
        assert given["GODWIT_CONTAINERD_CONFIG"]["value"] == "/c/config.toml"
        assert given["GODWIT_CONTAINERD_SOCKET"]["value"] == "/c/sock"
        assert given["GODWIT_RESTART_COMMAND"]["value"] == "restart c"
        assert "GODWIT_NODE_NAME" in given


# -- the rest ---------------------------------------------------------------------------------
def test_runtime_class_leads_to_prepared_nodes(default: Rendered) -> None:
    found = default.one("RuntimeClass")
    assert (found["metadata"]["name"], found["handler"]) == ("godwit", "godwit")
    assert found["scheduling"] == {"nodeSelector": {"godwit.io/node": "ready"}}
    assert not list(render("--set", "runtimeClass.create=false").all("RuntimeClass"))


def test_retirement_exists_for_the_time_of_the_uninstall_only(full: Rendered) -> None:
    parts = [item for item in full.objects if item["metadata"]["name"] == "godwit-retire"]
    assert len(parts) == 6
    for item in parts:
        notes = item["metadata"]["annotations"]
        assert notes["helm.sh/hook"] == "pre-delete"
        assert notes["helm.sh/hook-delete-policy"] == "before-hook-creation,hook-succeeded"
        weight = int(notes["helm.sh/hook-weight"])
        assert (weight == 0) is (item["kind"] == "Job")
    job = full.one("Job")
    assert job["spec"]["backoffLimit"] == 0
    restricted(job["spec"]["template"]["spec"])
    given = environment(job["spec"]["template"]["spec"]["containers"][0])
    assert given["GODWIT_DAEMON_SET"]["value"] == full.one("DaemonSet")["metadata"]["name"]
    labels = full.one("DaemonSet")["spec"]["template"]["metadata"]["labels"]
    selector = dict(part.split("=") for part in given["GODWIT_AGENT_SELECTOR"]["value"].split(","))
    assert selector.items() <= labels.items()
    template = json.loads(given["GODWIT_RETIRE_POD"]["value"])
    # Or the job would wait for its own pods as if they were agents.
    assert not selector.items() <= template["metadata"]["labels"].items()
    assert template["spec"]["serviceAccountName"] == "godwit-node-agent"
    assert template["spec"]["containers"][0]["command"][-1] == "uninstall"


def test_crds_are_the_source(default: Rendered) -> None:
    source = {file.name: file.read_text() for file in (ROOT / "crds").iterdir()}
    copies = {file.name: file.read_text() for file in (CHART / "files" / "crds").iterdir()}
    assert copies == source, "run scripts/sync-crds"
    wanted = {name: yaml.safe_load(text) for name, text in source.items()}
    rendered = list(default.all("CustomResourceDefinition"))
    assert len(rendered) == len(wanted)
    for crd in rendered:
        notes = crd["metadata"].pop("annotations")
        assert notes == {"helm.sh/resource-policy": "keep"}
        assert crd in wanted.values()


def test_crds_can_be_left_out_or_given_up() -> None:
    assert not list(render("--set", "crds.enabled=false").all("CustomResourceDefinition"))
    crds = list(render("--set", "crds.keep=false").all("CustomResourceDefinition"))
    assert crds
    assert all("annotations" not in crd["metadata"] for crd in crds)


def test_notes_teach_the_next_steps() -> None:
    done = helm("install", "godwit", str(CHART), "--dry-run=client", "--namespace", "x")
    assert done.returncode == 0, done.stderr
    notes = done.stdout.partition("NOTES:")[2]
    for word in ("kubectl get nodes", "godwit.io/node", "runtimeClassName: godwit", "PodMigration"):
        assert word in notes
    assert not re.search(r"\{\{|<no value>|%!", notes)


def test_failpoints_need_their_value(default: Rendered) -> None:
    name = "GODWIT_FAILPOINTS"
    assert name not in yaml.safe_dump(default.objects)
    asked = render("--set", "failpoints=true")
    for kind in ("DaemonSet", "Deployment"):
        assert name in yaml.safe_dump(next(asked.all(kind)))
