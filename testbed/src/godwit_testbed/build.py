"""Builds what a testbed needs, once, into the cache: roots, Kubernetes, helm, CoreDNS.

Every result is a directory or file whose name carries what it was made from;
it is made under a temporary name and renamed, so that an interrupted build
leaves no half result.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from godwit_testbed import shell
from godwit_testbed.paths import CACHE, SOURCE, TestbedError, locked

DEFAULT_KUBERNETES = "1.37.2"
HELM = "v4.3.1"
COREDNS = "v1.15.0"
# For tests only, and made when one of them asks for it.
VERSITYGW = "v1.8.0"
CHECKPOINTCTL = "v1.6.0"
SUITE = "forky"
# What a node of a distribution has; neither Python nor CRIU: the product brings its own.
NODE_PACKAGES = [
    "apparmor",
    "containerd",
    "runc",
    "containernetworking-plugins",
    "iproute2",
    "iptables",
    "nftables",
    "conntrack",
    "ethtool",
    "kmod",
    "procps",
    "util-linux",
    "ca-certificates",
    "etcd-server",
    "strace",
    "tcpdump",
    "psmisc",
]
BUILDER_PACKAGES = [
    "buildah",
    "podman",
    "runc",
    "crun",
    "criu",
    "python3-pycriu",
    "ca-certificates",
    "iproute2",
    "netavark",
    "procps",
    "util-linux",
    "redis-server",
    "openssl",
]
IMAGE_PACKAGES = ["ca-certificates"]
COMPONENTS = (
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kubelet",
    "kube-proxy",
    "kubectl",
)
_NEEDED = {
    "mmdebstrap": "mmdebstrap",
    "ip": "iproute2",
    "nft": "nftables",
    "nsenter": "util-linux",
    "openssl": "openssl",
}


def prerequisites() -> None:
    """Install the few host tools that are missing."""
    if os.geteuid() != 0:
        raise TestbedError("the testbed makes namespaces and mounts: run it as root")
    missing = [package for tool, package in _NEEDED.items() if not shutil.which(tool)]
    if not Path("/usr/share/keyrings/debian-archive-keyring.gpg").exists():
        missing.append("debian-archive-keyring")
    if missing:
        shell.say(f"installing {' '.join(missing)}")
        shell.run("apt-get", "update", "-qq")
        shell.run(
            "apt-get",
            "install",
            "-y",
            "-qq",
            "--no-install-recommends",
            *missing,
            env={"DEBIAN_FRONTEND": "noninteractive"},
        )


def mirror() -> str:
    """The Debian mirror that this machine uses itself."""
    sources = Path("/etc/apt")
    for file in [
        *sources.glob("sources.list.d/*.sources"),
        *sources.glob("sources.list.d/*.list"),
        sources / "sources.list",
    ]:
        if not file.exists():
            continue
        for line in file.read_text(errors="replace").splitlines():
            if line.lstrip().startswith("#"):
                continue
            found = re.search(r"https?://\S+/debian/?(?=\s|$)", line)
            if found:
                return found.group(0)
    raise TestbedError("no Debian mirror in /etc/apt: add one to /etc/apt/sources.list")


def make(path: Path, what: str, recipe: Callable[[Path], None]) -> Path:
    """``path``, made by ``recipe`` under a temporary name unless it is there."""
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(CACHE / "locks" / f"{path.name}.lock"):
        if path.exists():
            return path
        shell.say(what)
        part = path.with_name(path.name + ".part")
        if part.is_dir():
            shutil.rmtree(part)
        part.unlink(missing_ok=True)
        recipe(part)
        part.rename(path)
    return path


def _key(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def _root(name: str, packages: Sequence[str]) -> Path:
    def recipe(part: Path) -> None:
        shell.logged(
            CACHE / "logs" / f"root-{name}.log",
            [
                "mmdebstrap",
                "--variant=minbase",
                f"--include={','.join(packages)}",
                '--aptopt=Acquire::Check-Valid-Until "false"',
                "--skip=cleanup/tmp",
                SUITE,
                part,
                mirror(),
            ],
        )
        # Registries may be reached through an authority that only this machine knows.
        bundle = Path(os.environ.get("SSL_CERT_FILE", "/etc/ssl/certs/ca-certificates.crt"))
        if bundle.exists():
            shutil.copyfile(bundle, part / "etc/ssl/certs/ca-certificates.crt")

    path = CACHE / "roots" / f"{name}-{_key(SUITE, *sorted(packages))}"
    return make(path, f"Debian {SUITE} root for {name}", recipe)


def node_root() -> Path:
    """Root file system of nodes."""
    return _root("node", NODE_PACKAGES)


def builder_root() -> Path:
    """Root file system in which images are built."""
    return _root("builder", BUILDER_PACKAGES)


def image_root() -> Path:
    """Root file system that becomes the base image."""
    return _root("image", IMAGE_PACKAGES)


def _go(argv: Sequence[str | Path], log: str, cwd: Path, env: dict[str, str]) -> None:
    """Run the machine's Go, or Debian's inside the builder root when that is too old."""
    found = shutil.which("go")
    version = shell.run("go", "version") if found else ""
    match = re.search(r"go1\.(\d+)", version)
    if match and int(match.group(1)) >= 26:
        shell.logged(CACHE / "logs" / log, ["go", *argv], env=env, cwd=cwd)
        return
    root = builder_root()
    if not (root / "usr/bin/go").exists():
        shell.say("installing Go in the builder root (this machine has none that is new enough)")
        in_root(root, ["apt-get", "update", "-qq"], log=log)
        in_root(root, ["apt-get", "install", "-y", "-qq", "golang-go"], log=log)
    in_root(root, ["/usr/bin/go", *argv], log=log, cwd=cwd, env=env)


def in_root(
    root: Path,
    argv: Sequence[str | Path],
    *,
    log: str,
    cwd: Path = Path("/"),
    env: dict[str, str] | None = None,
) -> None:
    """Run a command in a root, with the cache and the checkout at their own paths."""
    script = """
set -e
root=$1 cwd=$2; shift 2
mount --make-rprivate /
mount -t proc proc $root/proc; mount --rbind /sys $root/sys; mount --rbind /dev $root/dev
cp -L /etc/resolv.conf $root/etc/resolv.conf
for d in "$CACHE" "$SOURCE" "$HOME"; do mkdir -p "$root$d"; mount --rbind "$d" "$root$d"; done
exec chroot $root env -C "$cwd" "$@"
"""
    names = {"CACHE": str(CACHE), "SOURCE": str(SOURCE.parent), "HOME": str(Path.home())}
    shell.logged(
        CACHE / "logs" / log,
        ["unshare", "--mount", "sh", "-c", script, "in-root", root, cwd, *argv],
        env={**names, **(env or {})},
    )


_GO_ENV = {"CGO_ENABLED": "0", "GOFLAGS": "-buildvcs=false -mod=mod", "GOTOOLCHAIN": "local"}


def kubernetes(version: str = DEFAULT_KUBERNETES) -> Path:
    """Directory with the Kubernetes binaries of ``version`` (``1.37.2``)."""
    if not re.fullmatch(r"1\.\d+\.\d+", version):
        raise TestbedError(f"Kubernetes version {version!r}: give it as 1.37.2")

    def recipe(part: Path) -> None:
        module = CACHE / "src" / f"kubernetes-{version}"
        module.mkdir(parents=True, exist_ok=True)
        _kubernetes_module(module, version)
        out = part
        out.mkdir(parents=True)
        major, minor, _ = version.split(".")
        values = {
            "gitVersion": f"v{version}",
            "gitMajor": major,
            "gitMinor": minor,
            "gitTreeState": "clean",
            "gitCommit": "0" * 40,
            "buildDate": "2026-01-01T00:00:00Z",
        }
        flags = ["-s", "-w"]
        for package in ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version"):
            flags += [f"-X {package}.{key}={value}" for key, value in values.items()]
        for component in COMPONENTS:
            shell.say(f"  {component} {version}")
            _go(
                [
                    "build",
                    "-trimpath",
                    "-ldflags",
                    " ".join(flags),
                    "-o",
                    out / component,
                    f"k8s.io/kubernetes/cmd/{component}",
                ],
                f"kubernetes-{version}.log",
                module,
                _GO_ENV,
            )

    return make(
        CACHE / "kubernetes" / version,
        f"Kubernetes {version} from source (about eight minutes on two cores, once)",
        recipe,
    )


def _kubernetes_module(module: Path, version: str) -> None:
    """A module that requires Kubernetes and points its staging modules at released ones."""
    (module / "go.mod").write_text(
        f"module testbed\n\ngo 1.24\n\nrequire k8s.io/kubernetes v{version}\n"
    )
    log = f"kubernetes-{version}.log"
    _go(["mod", "download", "-json", f"k8s.io/kubernetes@v{version}"], log, module, _GO_ENV)
    text = (CACHE / "logs" / log).read_text(errors="replace")
    gomod = Path(re.findall(r'"GoMod": "([^"]+)"', text)[-1])
    own = gomod.read_text()
    staged = re.findall(r"^\s*(?:replace )?(k8s\.io/\S+) => \./staging", own, re.MULTILINE)
    if not staged:  # newer trees name them only as requirements of version v0.0.0
        staged = re.findall(r"^\s*(k8s\.io/\S+) v0\.0\.0", own, re.MULTILINE)
    release = "v0" + version[1:]
    go_line = re.search(r"^go \S+$", own, re.MULTILINE)
    debug = re.search(r"^godebug .*$", own, re.MULTILINE)
    lines = ["module testbed", go_line.group(0) if go_line else "go 1.24"]
    lines += [debug.group(0)] if debug else []
    lines += [f"require k8s.io/kubernetes v{version}"]
    lines += [f"replace {name} => {name} {release}" for name in sorted(set(staged))]
    (module / "go.mod").write_text("\n".join(lines) + "\n")


def _installed(package: str, version: str, name: str) -> Path:
    def recipe(part: Path) -> None:
        bin_dir = CACHE / "src" / f"bin-{name}"
        bin_dir.mkdir(parents=True, exist_ok=True)
        module = CACHE / "src" / f"module-{name}"
        module.mkdir(parents=True, exist_ok=True)
        env = {**_GO_ENV, "GOBIN": str(bin_dir), "GOFLAGS": "-buildvcs=false"}
        _go(["install", f"{package}@{version}"], f"{name}.log", module, env)
        shutil.move(bin_dir / name, part)

    return make(CACHE / "bin" / f"{name}-{version}", f"{name} {version}", recipe)


def helm() -> Path:
    """The helm binary."""
    return _installed("helm.sh/helm/v4/cmd/helm", HELM, "helm")


def coredns() -> Path:
    """The CoreDNS binary."""
    return _installed("github.com/coredns/coredns", COREDNS, "coredns")


def object_store() -> Path:
    """A server that speaks S3 over a directory."""
    package = "github.com/versity/versitygw/cmd/versitygw"
    return _installed(package, VERSITYGW, "versitygw")


def checkpointctl() -> Path:
    """Shows what is in a checkpoint of a container."""
    package = "github.com/checkpoint-restore/checkpointctl"
    return _installed(package, CHECKPOINTCTL, "checkpointctl")


def own_binary(name: str) -> Path:
    """A static binary of the testbed itself (``nodeinit``, ``pause``)."""
    source = SOURCE / name
    key = _key(*(file.read_text() for file in sorted(source.glob("*.go"))))

    def recipe(part: Path) -> None:
        _go(
            ["build", "-trimpath", "-ldflags", "-s -w", "-o", part, "."],
            f"{name}.log",
            source,
            {**_GO_ENV, "GOFLAGS": "-buildvcs=false"},
        )

    return make(CACHE / "bin" / f"{name}-{key}", name, recipe)


def everything(version: str = DEFAULT_KUBERNETES) -> None:
    """Build all that ``up`` and ``image build`` need."""
    prerequisites()
    node_root()
    builder_root()
    image_root()
    for name in ("nodeinit", "pause"):
        own_binary(name)
    kubernetes(version)
    coredns()
    helm()


def versions(version: str) -> str:
    """What is in the cache, as JSON for people."""
    return json.dumps({"kubernetes": version, "helm": HELM, "coredns": COREDNS, "debian": SUITE})
