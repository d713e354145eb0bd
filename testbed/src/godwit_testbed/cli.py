"""The command line of the testbed."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from godwit_testbed import build, cgroups, images, network, paths, shell, tools
from godwit_testbed.cluster import Cluster
from godwit_testbed.node import Node
from godwit_testbed.paths import CACHE, TestbedError

# their options are theirs, also before their first word
_PASS_THROUGH = frozenset({"kubectl", "helm"})


def _cluster(options: argparse.Namespace) -> Cluster:
    return Cluster(paths.place(options.name))


def _exec(argv: list[str]) -> int:
    sys.stdout.flush()
    os.execvp(argv[0], argv)


def _build(options: argparse.Namespace) -> int:
    build.everything(options.kubernetes)
    return 0


def _up(options: argparse.Namespace) -> int:
    build.prerequisites()
    cluster = Cluster(paths.place(options.name, create=True))
    cluster.up(
        nodes=options.nodes,
        version=options.kubernetes,
        cni=options.cni,
        dual_stack=options.dual_stack,
    )
    return 0


def _down(options: argparse.Namespace) -> int:
    for name in paths.names() if options.all else [options.name]:
        index = paths.RUN / name / "index"
        number = int(index.read_text()) if index.exists() else 0
        Cluster(paths.Place(name, number)).down()
        shell.say(f"testbed {name} is gone")
    return 0


def _status(options: argparse.Namespace) -> int:
    cluster = _cluster(options)
    print(
        f"testbed {options.name}: {'up' if cluster.healthy() else 'NOT complete'}, "
        f"{cluster.facts()}"
    )
    for node in [Node(cluster.place, "cp"), *cluster.workers()]:
        print(
            f"{node.name:<4} {network.node_address(cluster.place, node.name):<14} "
            f"{f'pid {node.pid}' if node.pid else 'not running'}"
        )
        if node.pid:
            for line in node.run("systemctl", "status", check=False).splitlines():
                name, pid, started = line.split()
                state = f"pid {pid} in the node" if pid != "0" else "DOWN"
                print(f"       {name:<26} {state}, started {started} times")
    if cluster.healthy():
        print(cluster.kubectl("get", "nodes", check=False))
    return 0


def _kubectl(options: argparse.Namespace) -> int:
    return _exec(_cluster(options).kubectl_argv(*options.words))


def _helm(options: argparse.Namespace) -> int:
    cluster = _cluster(options)
    os.environ["KUBECONFIG"] = str(cluster.place.kubeconfig())
    netns = cluster.place.netns("ext")
    return _exec(network.inside(netns, str(build.helm()), *options.words))


def _kubeconfig(options: argparse.Namespace) -> int:
    print(_cluster(options).place.kubeconfig())
    return 0


def _node(options: argparse.Namespace) -> int:
    cluster = _cluster(options)
    node = cluster.node(options.node)
    argv = node.argv(*_command(options.words))
    cgroups.enter(cluster.place, node.name)
    return _exec(argv)


def _client(options: argparse.Namespace) -> int:
    netns = _cluster(options).place.netns("ext")
    return _exec(network.inside(netns, *_command(options.words)))


def _command(words: list[str]) -> list[str]:
    command = words[1:] if words[:1] == ["--"] else words
    if not command:
        raise TestbedError("no command given: … exec -- COMMAND")
    return command


def _tools(options: argparse.Namespace) -> int:
    return tools.execute(_command(options.words))


def _image(options: argparse.Namespace) -> int:
    if options.action == "build":
        file = images.build_image(
            options.tag,
            Path(options.source),
            dockerfile=options.file,
            target=options.target,
            arguments=options.build_arg,
        )
        print(file)
        return 0
    source = Path(options.source)
    is_file = source.exists()
    images.load(
        _cluster(options).workers(),
        source if is_file else images.archive(options.source),
        None if is_file else options.source,
    )
    return 0


def _logs(options: argparse.Namespace) -> int:
    cluster = _cluster(options)
    nodes = (
        [cluster.node(options.node)]
        if options.node
        else [Node(cluster.place, "cp"), *cluster.workers()]
    )
    files = sorted(
        str(file)
        for node in nodes
        for file in (node.data / "bind/var/log/node").glob(f"{options.service or '*'}.log")
    )
    if not files:
        raise TestbedError(
            f"no log of {options.service or 'any service'}; `testbed status` lists the services"
        )
    return _exec(["tail", "-n", str(options.lines), *(["-F"] if options.follow else []), *files])


def _reboot(options: argparse.Namespace) -> int:
    cluster = _cluster(options)
    everything = ["cp", *(node.name for node in cluster.workers())]
    cluster.reboot(options.nodes or everything)
    return 0


def _service(options: argparse.Namespace) -> int:
    node = _cluster(options).node(options.node)
    return _exec(node.argv("systemctl", options.command, options.service))


def _power(options: argparse.Namespace) -> int:
    cluster = _cluster(options)
    (cluster.crash if options.command == "crash" else cluster.boot)(options.node)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="testbed",
        description="A real Kubernetes of several nodes on this machine, as root, without a "
        "virtual machine or a container engine.",
        epilog=f"Built things are kept in {CACHE} (GODWIT_TESTBED_CACHE).",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, help_: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help_, description=help_)
        sub.add_argument(
            "--name",
            default=os.environ.get("GODWIT_TESTBED", "godwit"),
            help="which testbed (default: $GODWIT_TESTBED or godwit)",
        )
        return sub

    sub = add("build", "Build all that is needed into the cache, without starting anything.")
    sub.add_argument("--kubernetes", default=build.DEFAULT_KUBERNETES, metavar="VERSION")
    sub.set_defaults(run=_build)
    sub = add("up", "Bring a cluster up, building what is missing; does nothing if it stands.")
    sub.add_argument("--nodes", type=int, default=2, help="worker nodes (default 2)")
    sub.add_argument("--kubernetes", default=build.DEFAULT_KUBERNETES, metavar="VERSION")
    sub.add_argument("--cni", choices=("ptp", "bridge"), default="ptp", help="main CNI plugin")
    sub.add_argument("--dual-stack", action="store_true", help="IPv6 addresses beside IPv4")
    sub.set_defaults(run=_up)
    sub = add("down", "Remove a cluster and every trace of it, whatever state it is in.")
    sub.add_argument("--all", action="store_true", help="every testbed on this machine")
    sub.set_defaults(run=_down)
    add("status", "Show nodes, addresses and services.").set_defaults(run=_status)
    sub = add("kubectl", "Run kubectl as administrator: testbed kubectl get pods -A")
    sub.add_argument("words", nargs=argparse.REMAINDER)
    sub.set_defaults(run=_kubectl)
    sub = add("helm", "Run helm: testbed helm list -A")
    sub.add_argument("words", nargs=argparse.REMAINDER)
    sub.set_defaults(run=_helm)
    sub = add("kubeconfig", "Print the path of the administrator's kubeconfig.")
    sub.set_defaults(run=_kubeconfig)
    sub = add("node", "Run a command on a node: testbed node exec n1 -- ip route")
    sub.add_argument("action", choices=("exec",))
    sub.add_argument("node")
    sub.add_argument("words", nargs=argparse.REMAINDER)
    sub.set_defaults(run=_node)
    sub = add(
        "client",
        "Run a command outside the cluster, where pod addresses and Services are "
        "reached: testbed client exec -- redis-cli -h ADDRESS",
    )
    sub.add_argument("action", choices=("exec",))
    sub.add_argument("words", nargs=argparse.REMAINDER)
    sub.set_defaults(run=_client)
    sub = add(
        "tools",
        "Run a command beside podman, runc, crun and CRIU as Debian has them, in namespaces of "
        "its own: testbed tools exec -- podman load -i /images/NAME.tar",
    )
    sub.add_argument("action", choices=("exec",))
    sub.add_argument("words", nargs=argparse.REMAINDER)
    sub.set_defaults(run=_tools)
    sub = add("image", "Build an image from a Dockerfile, or give one to every node.")
    sub.add_argument("action", choices=("build", "load"))
    sub.add_argument("source", help="build: context directory; load: image name or OCI archive")
    sub.add_argument("-t", "--tag", help="name of the image that is built")
    sub.add_argument("-f", "--file", help="Dockerfile, relative to the context")
    sub.add_argument("--target", help="stage to build")
    sub.add_argument("--build-arg", action="append", default=[], metavar="KEY=VALUE")
    sub.set_defaults(run=_image)
    sub = add("logs", "Show the end of service logs: testbed logs n1 kubelet -f")
    sub.add_argument("node", nargs="?")
    sub.add_argument("service", nargs="?")
    sub.add_argument("-f", "--follow", action="store_true")
    sub.add_argument("-n", "--lines", type=int, default=20)
    sub.set_defaults(run=_logs)
    for name in ("start", "stop", "restart"):
        sub = add(name, f"{name.capitalize()} a service of a node: testbed {name} n1 kubelet")
        sub.add_argument("node")
        sub.add_argument("service")
        sub.set_defaults(run=_service)
    sub = add("crash", "A node loses its power: testbed crash n1")
    sub.add_argument("node")
    sub.set_defaults(run=_power)
    sub = add("boot", "Start a node that has crashed, with the disk that it had: testbed boot n1")
    sub.add_argument("node")
    sub.set_defaults(run=_power)
    sub = add("reboot", "Cut the power of all nodes (or some) at once, and start them again.")
    sub.add_argument("nodes", nargs="*", metavar="NODE")
    sub.set_defaults(run=_reboot)
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line; ``words`` of kubectl and helm as they are, ``--name`` right behind the
    command apart."""
    own = len(argv)
    if argv and argv[0] in _PASS_THROUGH:
        name = argv[1] if len(argv) > 1 else ""
        own = 3 if name == "--name" else 2 if name.startswith("--name=") else 1
        if name in ("-h", "--help"):
            own = 2
    options = _parser().parse_args(argv[:own])
    if own < len(argv):
        options.words = argv[own + 1 :] if argv[own] == "--" else argv[own:]
    return options


def main() -> int:
    """Entry; an error is one line that names the object and the way out."""
    options = parse(sys.argv[1:])
    if os.geteuid() != 0:
        sys.stderr.write("testbed: the testbed makes namespaces and mounts: run it as root\n")
        return 1
    if options.command == "image" and options.action == "build" and not options.tag:
        sys.stderr.write("testbed: image build needs -t NAME:TAG\n")
        return 2
    try:
        code = options.run(options)
    except TestbedError as error:
        sys.stderr.write(f"testbed: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    return int(code)
