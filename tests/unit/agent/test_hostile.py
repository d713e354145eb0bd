"""Whatever another node sends: no crash, an error that is ours, and nothing outside the store."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from godwit_agent.hostops import filerecords
from godwit_agent.hostops.filerecords import Kind, Record
from godwit_agent.hostops.files.filetarget import TreeWriter
from godwit_agent.hostops.layout import Layout
from godwit_agent.hostops.model import HostPath
from godwit_agent.hostops.store import HostTargetStore
from godwit_agent.memory import mappings, pagemap, timers, tree
from godwit_agent.memory.protobuf import ImageError
from godwit_agent.server import decode
from godwit_agent.transfer import frames
from godwit_agent.transfer.receiver import receive
from godwit_agent.transfer.wire import FrameWriter
from godwit_api.errors import GodwitError, Rejected
from godwit_api.pb import agent_pb2 as pb
from godwit_api.reasons import Reason

UID = "01234567-89ab-cdef-0123-456789abcdef"
NAMES = st.sampled_from([b"a", b"b", b"way", b"way/x", b"a/b", b".", b"b/c/d", b"\xff\n"])
HOSTILE = st.sampled_from([b"..", b"../x", b"/etc/x", b"a/../../x", b"a//b", b"", b"a\0b", b"./a"])
SIZES = st.one_of(st.integers(0, 9000), st.sampled_from([1 << 40, 1 << 62, (1 << 63) - 1]))
BODIES = st.one_of(
    st.binary(max_size=64),
    st.sampled_from([b"../outside", b"/", b"a", b"way", b"\0"]),
    st.dictionaries(st.text(max_size=4), st.binary(max_size=8), max_size=2).map(
        filerecords.pack_attributes
    ),
)
# fifos are the only nodes that a test may leave on a machine
MODES = st.sampled_from([0o644, 0o755, 0o4755, stat.S_IFIFO | 0o600, stat.S_IFREG | 0o600, 0])
RECORDS = st.builds(
    Record, st.sampled_from(Kind), st.sampled_from(["upper", "/data", "log", "\0", "t" * 300]),
    NAMES, MODES, st.integers(0, 3), st.integers(0, 3), SIZES, SIZES, SIZES,
)  # fmt: skip


@contextlib.contextmanager
def scratch() -> Iterator[tuple[Path, Callable[[], object]]]:
    """A directory with a link that leads out of it, and how what lies outside looks."""
    with tempfile.TemporaryDirectory(prefix="godwit-hostile-") as name:
        outside, inside = Path(name, "outside"), Path(name, "inside")
        outside.mkdir()
        inside.mkdir()
        (outside / "x").write_text("as it was")
        (inside / "way").symlink_to("../outside")

        def look() -> object:
            about = outside.stat()
            there = [(p.name, p.read_bytes(), p.stat().st_mode) for p in outside.iterdir()]
            return sorted(os.listdir(name)), there, about.st_mode, about.st_uid, about.st_mtime_ns

        yield inside, look


@given(st.lists(st.tuples(RECORDS, BODIES), max_size=12))
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
def test_file_records_stay_in_their_tree(records: list[tuple[Record, bytes]]) -> None:
    with scratch() as (inside, look):
        before = look()
        writer = TreeWriter(os.open(inside, os.O_RDONLY | os.O_DIRECTORY), raw=False)
        for record, body in records:
            with contextlib.suppress(OSError, GodwitError):
                writer.apply(filerecords.decode(filerecords.encode(record)), memoryview(body))
        writer.close()
        assert look() == before


@given(RECORDS, HOSTILE)
def test_paths_that_lead_out_are_malformed(record: Record, path: bytes) -> None:
    bad = msgspec.structs.replace(record, path=path)
    with pytest.raises(Rejected) as caught:
        filerecords.decode(filerecords.encode(bad))
    assert caught.value.reason is Reason.MALFORMED


_ANY = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(1 << 63), (1 << 64) - 1), st.binary(max_size=8),
        st.text(max_size=8), st.floats(allow_nan=False),
    ),
    lambda inner: st.lists(inner, max_size=9),
    max_leaves=12,
)  # fmt: skip


@given(_ANY)
def test_any_message_pack_is_a_record_or_refused(value: object) -> None:
    data = msgspec.msgpack.encode(value)
    for parse in (filerecords.decode, filerecords.unpack_attributes):
        with contextlib.suppress(GodwitError):
            parse(data)


@given(st.lists(st.integers(-(1 << 63), (1 << 64) - 1), min_size=6, max_size=6), st.data())
def test_numbers_of_a_record_are_bounded(numbers: list[int], data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(Kind))
    header = msgspec.msgpack.encode([kind, "upper", b"a", *numbers])
    try:
        record = filerecords.decode(header)
    except Rejected:
        return
    with tempfile.TemporaryDirectory() as name:
        writer = TreeWriter(os.open(name, os.O_RDONLY | os.O_DIRECTORY), raw=False)
        if not stat.S_ISCHR(record.mode) and not stat.S_ISBLK(record.mode):
            with contextlib.suppress(OSError, GodwitError):
                writer.apply(record, memoryview(b""))
        writer.close()


# -- the stream, into a real store ------------------------------------------------------------
CONTAINER = st.integers(0, 3)
VPID = st.integers(1, 3)
VADDR = st.sampled_from([0, 1 << 12, 1 << 30, 1 << 46, (1 << 57) - 8192])
PAGES = st.integers(1, 2).map(lambda count: count * frames.PAGE)
IMAGES = st.sampled_from(["core-1.img", "bootstrap-tree.img", "pstree.img", "a.b"])
FRAMES = st.one_of(
    st.tuples(st.builds(frames.Pages, CONTAINER, VPID, VADDR), PAGES.map(bytes)),
    st.tuples(st.builds(frames.Zero, CONTAINER, VPID, VADDR, PAGES), st.just(b"")),
    st.tuples(st.builds(frames.Packed, CONTAINER, VPID, VADDR, PAGES), st.binary(max_size=40)),
    st.tuples(
        st.builds(frames.Image, CONTAINER, SIZES, st.just((1 << 64) - 1), IMAGES),
        st.binary(max_size=40),
    ),
    st.tuples(st.builds(frames.File, CONTAINER, RECORDS.map(filerecords.encode)), BODIES),
    st.tuples(st.builds(frames.File, CONTAINER, st.binary(max_size=40)), BODIES),
    st.tuples(st.builds(frames.Packet, st.integers(0, 1 << 63)), st.binary(max_size=40)),
    st.tuples(st.builds(frames.RoundEnd, st.integers(0, 9)), st.just(b"")),
    st.tuples(st.builds(frames.Ack, st.integers(0, 9)), st.just(b"")),
    st.tuples(st.builds(frames.Failure, st.sampled_from(Reason)), st.just(b"text")),
)


class Sink:
    """A real store; packets go nowhere."""

    def __init__(self, store: HostTargetStore) -> None:
        self.pages, self.zero = store.pages, store.zero
        self.image, self.file = store.image, store.file

    def packet(self, at_ns: int, data: memoryview) -> None:
        return


@given(st.lists(FRAMES, max_size=8), st.binary(max_size=40))
@settings(max_examples=40, suppress_health_check=list(HealthCheck))
def test_any_stream_ends_with_a_word_and_leaves_the_rest_alone(
    sent: list[tuple[frames.Head, bytes]], rest: bytes
) -> None:
    with scratch() as (inside, look):
        before = look()
        layout = Layout(host_pid=os.getpid(), run_dir=HostPath(str(inside)))
        store = HostTargetStore(layout, UID, ("app",))
        store.make()
        left, right = socket.socketpair()
        right.settimeout(10)
        failures: list[BaseException] = []

        def serve() -> None:
            try:
                receive(right, "a", lambda *_: Sink(store))
            except BaseException as error:
                failures.append(error)
            right.close()

        thread = threading.Thread(target=serve)
        thread.start()
        writer = FrameWriter(left)
        hello = frames.Hello(UID, 1, 0, 1, ("app",))
        with contextlib.suppress(OSError):  # it ends where it has had enough
            writer.send(hello, frames.hello_body(hello.containers), flush=True)
            for head, body in sent:
                writer.send(head, body, flush=True)
            left.sendall(rest)
            left.shutdown(socket.SHUT_WR)
        thread.join(20)
        assert not thread.is_alive()
        assert all(isinstance(error, GodwitError | OSError) for error in failures), failures
        answered = b""
        with contextlib.suppress(OSError):
            while data := left.recv(65536):
                answered += data
        left.close()
        refused = [error for error in failures if isinstance(error, GodwitError)]
        if refused and sent and not rest:
            assert refused[0].reason.value.encode() in answered or b"Malformed" in answered
        assert look() == before


# -- images of CRIU ---------------------------------------------------------------------------
_TIMER = (
    bytes.fromhex("1943565438313056")
    + b"\x0c\x00\x00\x00\x08\x11\x62\x08\x08\x01\x18\x01\x20\x01\x28\x05"
)
_GOOD = {
    "tree": tree.encode([tree.Process(1, 0, 1, 1, (1, 2)), tree.Process(7, 1, 7, 1, (7,))]),
    "pagemap": pagemap.encode(3, [pagemap.Entry(4096, 2, 6), pagemap.Entry(1 << 30, 9, 4)]),
    "timers": _TIMER,
}
_PARSE: dict[str, Callable[[bytes], object]] = {
    "tree": tree.decode,
    "pagemap": lambda data: pagemap.lazy_ranges(pagemap.decode(data)[1]),
    "timers": timers.mend,
}


@pytest.mark.parametrize("kind", sorted(_GOOD))
def test_the_images_to_be_changed_are_good(kind: str) -> None:
    assert _PARSE[kind](_GOOD[kind])


@given(st.sampled_from(sorted(_GOOD)), st.data())
def test_a_changed_image_is_read_or_an_image_error(kind: str, data: st.DataObject) -> None:
    raw = bytearray(_GOOD[kind])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        match data.draw(st.sampled_from(["change", "cut", "insert", "repeat"])):
            case "change":
                raw[at] = data.draw(st.integers(0, 255))
            case "cut":
                del raw[at : at + data.draw(st.integers(1, 4))]
            case "insert":
                raw[at:at] = data.draw(st.binary(min_size=1, max_size=6))
            case _:
                raw += raw[at:]
        if not raw:
            break
    with contextlib.suppress(ImageError):
        _PARSE[kind](bytes(raw))


@given(st.binary(max_size=300))
def test_mappings_are_searched_in_anything(data: bytes) -> None:
    list(mappings.entries(b"\x72" + data))
    mappings.droppable(data)
    mappings.eager(data)


# -- requests ---------------------------------------------------------------------------------
TEXT = st.one_of(st.text(max_size=12), st.sampled_from([UID, "redis-0", "n1", "10.0.0.1", "::1"]))
I64 = st.integers(-(1 << 63), (1 << 63) - 1)
U32 = st.integers(0, (1 << 32) - 1)
REF = st.builds(pb.MigrationRef, uid=TEXT, epoch=I64, namespace=TEXT, name=TEXT)
POD = st.builds(pb.PodRef, namespace=TEXT, name=TEXT, uid=TEXT, ip=TEXT)
PEER = st.builds(pb.PeerNode, name=TEXT, address=TEXT, control_port=U32, transfer_port=U32)
OUTGOING = st.builds(
    pb.Outgoing, protocol=U32, client_address=st.binary(max_size=17), client_port=U32,
    service_address=st.binary(max_size=17), service_port=U32,
    server_address=st.binary(max_size=17), server_port=U32, status=U32, timeout_seconds=U32,
    tcp=st.binary(max_size=70),
)  # fmt: skip
COMMANDS = st.builds(
    pb.Commands, container=TEXT, post_start=st.lists(TEXT, max_size=3),
    startup=st.lists(TEXT, max_size=3),
)  # fmt: skip


@given(st.data())
def test_any_request_is_decoded_or_refused(data: st.DataObject) -> None:
    def call(parse: Callable[..., object], *arguments: object) -> None:
        with contextlib.suppress(Rejected):
            parse(*arguments)

    call(decode.migration, data.draw(REF))
    call(decode.pod, data.draw(POD))
    call(decode.peer, data.draw(PEER), "target")
    call(decode.containers, data.draw(st.lists(TEXT, max_size=4)))
    call(decode.outgoing, data.draw(st.lists(OUTGOING, max_size=3)))
    moved = st.builds(pb.MovedAddress, ip=TEXT, node_address=TEXT, node=TEXT, pod_uid=TEXT)
    call(decode.addresses, data.draw(st.lists(moved, max_size=3)))
    report = st.builds(
        pb.NodeReport, kernel=TEXT, architecture=TEXT, versions=st.dictionaries(TEXT, TEXT),
        cpu_features=st.lists(TEXT, max_size=3), dirty_tracking=TEXT,
    )  # fmt: skip
    call(decode.node_report, data.draw(report))
    expect = st.builds(
        pb.ExpectPodRequest, migration=REF, pod=POD, done=st.lists(TEXT, max_size=3),
        commands=st.lists(COMMANDS, max_size=3),
    )  # fmt: skip
    call(decode.plan, data.draw(expect))
    call(decode.uid, data.draw(TEXT), "uid")
    call(decode.size, data.draw(I64), "size")
    call(decode.milliseconds, data.draw(I64), "ms")


@given(st.binary(max_size=60))
def test_what_a_message_may_hold_is_what_decode_sees(data: bytes) -> None:
    """Bytes that protobuf takes for a message are decoded or refused, too."""
    parsers: list[tuple[Callable[[bytes], object], Callable[..., object], tuple[object, ...]]] = [
        (pb.MigrationRef.FromString, decode.migration, ()),
        (pb.PodRef.FromString, decode.pod, ()),
        (pb.PeerNode.FromString, decode.peer, ("target",)),
        (pb.NodeReport.FromString, decode.node_report, ()),
        (pb.ExpectPodRequest.FromString, decode.plan, ()),
        (pb.CopyRequest.FromString, decode.copy_policy, ()),
    ]
    for parse, check, more in parsers:
        with contextlib.suppress(Exception):  # protobuf's own error ends the call in gRPC
            message = parse(data)
            try:
                check(message, *more)
            except Rejected:
                continue
