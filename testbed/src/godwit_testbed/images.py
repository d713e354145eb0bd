"""Container images without a registry: made from files, built with buildah, loaded by import."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import resource
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from godwit_testbed import build, shell
from godwit_testbed.node import Node
from godwit_testbed.paths import CACHE, TestbedError, locked

BASE_IMAGE = "godwit.local/debian:forky"
PAUSE_IMAGE = "godwit.local/pause:1"
COREDNS_IMAGE = "godwit.local/coredns:1"
ARCHIVES = CACHE / "images"


def archive(tag: str) -> Path:
    """Where the OCI archive of an image is kept."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9./-]*:[\w.-]+", tag):
        raise TestbedError(f"image name {tag!r}: give it as name:tag")
    return ARCHIVES / (re.sub(r"[/:]", "_", tag) + ".tar")


def _digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def pack(tag: str, files: dict[str, Path], command: list[str]) -> Path:
    """An image of single files, without a distribution."""
    key = hashlib.sha256("".join(f"{k}{v.name}" for k, v in files.items()).encode()).hexdigest()

    def recipe(part: Path) -> None:
        layer_file = io.BytesIO()
        with tarfile.open(fileobj=layer_file, mode="w") as tar:
            for name, source in files.items():
                info = tar.gettarinfo(str(source), name)
                info.mode, info.uid, info.gid = 0o755, 0, 0
                with source.open("rb") as content:
                    tar.addfile(info, content)
        _write_archive(part, tag, layer_file.getvalue(), {"Entrypoint": command})

    return build.make(ARCHIVES / f"{archive(tag).stem}-{key[:12]}.tar", f"image {tag}", recipe)


def _write_archive(part: Path, tag: str, layer: bytes, config: dict[str, object]) -> None:
    machine = {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine]
    image = json.dumps(
        {
            "architecture": machine,
            "os": "linux",
            "config": config,
            "rootfs": {"type": "layers", "diff_ids": [_digest(layer)]},
            # buildah finds no layer of its cache again when an image has layers without history.
            "created": "2026-01-01T00:00:00Z",
            "history": [{"created": "2026-01-01T00:00:00Z", "created_by": "godwit testbed"}],
        }
    ).encode()
    oci = "application/vnd.oci.image."
    manifest = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": oci + "manifest.v1+json",
            "config": {
                "mediaType": oci + "config.v1+json",
                "digest": _digest(image),
                "size": len(image),
            },
            "layers": [
                {"mediaType": oci + "layer.v1.tar", "digest": _digest(layer), "size": len(layer)}
            ],
        }
    ).encode()
    index = json.dumps(
        {
            "schemaVersion": 2,
            "manifests": [
                {
                    "mediaType": oci + "manifest.v1+json",
                    "digest": _digest(manifest),
                    "size": len(manifest),
                    "annotations": {
                        "io.containerd.image.name": tag,
                        "org.opencontainers.image.ref.name": tag,
                    },
                }
            ],
        }
    ).encode()
    with tarfile.open(part, "w") as tar:
        blobs = {f"blobs/sha256/{_digest(data)[7:]}": data for data in (layer, image, manifest)}
        for name, data in {
            "oci-layout": b'{"imageLayoutVersion":"1.0.0"}',
            "index.json": index,
            **blobs,
        }.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def base() -> Path:
    """The base image: a minimal Debian root as one layer."""
    root = build.image_root()

    def recipe(part: Path) -> None:
        layer = io.BytesIO()
        with tarfile.open(fileobj=layer, mode="w") as tar:
            for item in sorted(root.iterdir()):
                if item.name not in ("proc", "sys", "dev"):
                    tar.add(item, arcname=item.name)
            for name in ("proc", "sys", "dev"):
                info = tarfile.TarInfo(name)
                info.type, info.mode = tarfile.DIRTYPE, 0o755
                tar.addfile(info)
        _write_archive(
            part,
            BASE_IMAGE,
            layer.getvalue(),
            {
                "Env": [f"PATH={'/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin'}"],
                "Cmd": ["bash"],
            },
        )

    return build.make(ARCHIVES / f"base2-{root.name}.tar", f"image {BASE_IMAGE}", recipe)


def system_images() -> dict[str, Path]:
    """What every node needs before the first pod."""
    return {
        PAUSE_IMAGE: pack(PAUSE_IMAGE, {"pause": build.own_binary("pause")}, ["/pause"]),
        COREDNS_IMAGE: pack(COREDNS_IMAGE, {"coredns": build.coredns()}, ["/coredns"]),
    }


_BUILD = """
set -e
root=$1 context=$2 base=$3 base_tag=$4 out=$5 tag=$6; shift 6
mount --make-rprivate /
mount -t overlay overlay -o "lowerdir=$root,upperdir=$WORK/upper,workdir=$WORK/work" "$WORK/root"
cd "$WORK/root"
mount -t proc proc proc; mount --rbind /sys sys; mount --rbind /dev dev
mount -t tmpfs tmpfs run; mkdir -p var/tmp var/lib/containers images context
mount --bind "$WORK/containers" var/lib/containers
mount --bind "$WORK/tmp" var/tmp
mount --bind "$IMAGES" images
mount --bind "$context" context
cp -L /etc/resolv.conf etc/resolv.conf
mkdir -p etc/containers
[ -e etc/containers/policy.json ] || echo '{"default":[{"type":"insecureAcceptAnything"}]}' \
  > etc/containers/policy.json
buildah="chroot . buildah --storage-driver overlay"
if ! grep -qx "$base" "$WORK/base" 2>/dev/null; then
  id=$($buildah pull -q "oci-archive:/images/$base")
  $buildah tag "$id" "$base_tag"
  echo "$base" > "$WORK/base"
fi
$buildah bud --isolation chroot --layers --pull-never --ulimit "nofile=$NOFILE:$NOFILE" \
  --ulimit "nproc=$NPROC:$NPROC" -t "$tag" "$@" /context
id=$($buildah inspect --type image --format '{{.FromImageID}}' "$tag")
if [ -e "images/$out" ] && [ "$(cat "images/$out.id" 2>/dev/null)" = "$id" ]; then
  exit 0
fi
rm -f "images/$out.part" "images/$out.id"
$buildah push -q --compression-format zstd --compression-level 1 \\
  "$tag" "oci-archive:/images/$out.part:$tag"
mv "images/$out.part" "images/$out"
echo "$id" > "images/$out.id"
"""


def build_image(
    tag: str, context: Path, *, dockerfile: str | None, target: str | None, arguments: list[str]
) -> Path:
    """Build a Dockerfile with buildah inside the builder root; returns the OCI archive."""
    if not context.is_dir():
        raise TestbedError(f"{context}: no such directory to build from")
    out = archive(tag)
    first = base()
    work = CACHE / "buildah"
    for name in ("upper", "work", "root", "containers", "tmp"):
        (work / name).mkdir(parents=True, exist_ok=True)
    words: list[str] = []
    if dockerfile:
        words += ["-f", f"/context/{dockerfile}"]
    if target:
        words += ["--target", target]
    for argument in arguments:
        words += ["--build-arg", argument]
    limits = {
        "NOFILE": str(resource.getrlimit(resource.RLIMIT_NOFILE)[1]),
        "NPROC": str(resource.getrlimit(resource.RLIMIT_NPROC)[1]),
    }
    log = CACHE / "logs" / f"image-{out.stem}.log"
    log.unlink(missing_ok=True)
    with locked(CACHE / "locks" / "buildah.lock"):
        shell.logged(
            log,
            [
                "unshare",
                "--mount",
                "sh",
                "-c",
                _BUILD,
                "build",
                build.builder_root(),
                context.resolve(),
                first.name,
                BASE_IMAGE,
                out.name,
                tag,
                *words,
            ],
            env={"WORK": str(work), "IMAGES": str(ARCHIVES), **limits},
        )
    return out


def load(nodes: list[Node], file: Path, tag: str | None = None) -> None:
    """Import an archive into the containerd of every node at once."""
    if not file.exists():
        raise TestbedError(f"{file} does not exist; `testbed image build -t NAME …` makes images")
    words = ["ctr", "-n", "k8s.io", "images", "import"]
    if tag:
        words += ["--index-name", tag]

    def one(node: Node) -> None:
        node.run(*words, "-", stdin_file=file)

    with ThreadPoolExecutor() as pool:
        list(pool.map(one, nodes))
