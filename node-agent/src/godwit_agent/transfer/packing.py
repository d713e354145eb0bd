"""Compression of pages on the stream: zstd, one frame of it in one frame of ours."""

from __future__ import annotations

import zstandard

from godwit_agent.transfer.frames import MAX_BODY, FrameError

Buffer = bytes | bytearray | memoryview

# The fastest that is not a toy: a link that needs compression is slower than it.
_LEVEL = 1
# What shrinks less costs the target more than it saves the link.
_WORTH = 0.9


class Packer:
    """Holds its working memory from one call to the next. One thread at a time."""

    def __init__(self) -> None:
        self._compressor = zstandard.ZstdCompressor(
            level=_LEVEL, write_content_size=True, write_checksum=False
        )

    def pack(self, data: Buffer) -> bytes | None:
        """None where it is not worth it."""
        packed = self._compressor.compress(data)
        return packed if len(packed) < len(data) * _WORTH else None


class Unpacker:
    """Trusts nothing: a frame must say its length before memory is taken for it."""

    def __init__(self) -> None:
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=2 * MAX_BODY)

    def unpack(self, body: memoryview, length: int) -> memoryview:
        """``length`` bytes. Raises FrameError for anything else."""
        try:
            said = zstandard.get_frame_parameters(body).content_size
            if said != length or length > MAX_BODY:
                raise FrameError(f"packed pages of {said} bytes where {length} were due")
            data = self._decompressor.decompress(
                body, max_output_size=length, read_across_frames=False, allow_extra_data=False
            )
        except zstandard.ZstdError as error:
            raise FrameError(f"packed pages: {error}") from None
        if len(data) != length:
            raise FrameError(f"packed pages of {len(data)} bytes where {length} were due")
        return memoryview(data)
