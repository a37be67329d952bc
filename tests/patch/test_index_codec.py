"""Coded indices: round trips, the bytes of the format, and hostile input."""

from __future__ import annotations

import math
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_graft.patch.index_codec import MAX_NUMEL, PatchError, decode_indices, encode_indices


def blob_of(text: str) -> torch.Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)


@st.composite
def index_lists(draw: st.DrawFn) -> list[int]:
    """Sorted indices of many characters: uniform, clustered, runs, one, none, far apart."""
    gaps = draw(
        st.one_of(
            st.lists(st.integers(0, 3), max_size=200),
            st.lists(st.integers(0, 5000), max_size=100),
            st.lists(st.sampled_from([0, 0, 0, 0, 0, 1, 100_000]), max_size=200),
            st.lists(st.integers(0, 2**40), max_size=20),
            st.integers(0, 300).map(lambda n: [7] + [0] * n),
        )
    )
    return (np.cumsum(np.array(gaps, dtype=np.int64) + 1) - 1).tolist()


class TestIndexCode:
    @given(index_lists())
    def test_round_trip(self, listed: list[int]) -> None:
        indices = torch.tensor(listed, dtype=torch.int64)
        blob = encode_indices(indices)
        assert blob.dtype == torch.uint8 and blob.dim() == 1
        numel = listed[-1] + 1 if listed else 0
        decoded = decode_indices(blob, len(listed), numel)
        assert decoded.dtype == torch.int64 and torch.equal(decoded, indices)
        assert torch.equal(decode_indices(blob, len(listed)), indices)
        if listed:
            with pytest.raises(PatchError, match=r"below|at most"):
                decode_indices(blob, len(listed), numel - 1)
        for other in (len(listed) + 1, len(listed) - 1):
            if blob[0] != 0 and other >= 0:
                with pytest.raises(PatchError):
                    decode_indices(blob, other, numel + 1)

    # The bytes of the format; docs/patch_format.md works out the fifth and the last by hand.
    GOLDEN = [
        ("0000", []),
        ("0000", [0, 1, 2, 3]),
        ("008501", [133]),
        ("00e807", [1000, 1001]),
        ("01006120", [1, 2, 7, 10]),
        ("010098", [0, 3, 4]),
        ("010785c4404e02", [5, 100, 101, 1000]),
    ]

    @pytest.mark.parametrize(("text", "listed"), GOLDEN)
    def test_golden_bytes(self, text: str, listed: list[int]) -> None:
        indices = torch.tensor(listed, dtype=torch.int64)
        assert bytes(encode_indices(indices).tolist()).hex() == text
        assert torch.equal(decode_indices(blob_of(text), len(listed), MAX_NUMEL), indices)

    def test_golden_bytes_of_deflated_varints(self) -> None:
        # A zlib stream of one stored block; how well a writer compresses is its own affair.
        varints = bytes([5, 0x5E, 0, 0x82, 0x07])
        stored = (
            b"\x78\x01\x01" + struct.pack("<HH", 5, 5 ^ 0xFFFF) + varints + struct.pack(">I", zlib.adler32(varints))
        )
        blob = torch.tensor(list(b"\x02" + stored), dtype=torch.uint8)
        assert decode_indices(blob, 4, 1001).tolist() == [5, 100, 101, 1000]
        indices = (torch.arange(40)[:, None] * 300 + torch.tensor([0, 1])).reshape(-1)
        blob = encode_indices(indices)
        assert blob[0] == 2
        assert zlib.decompress(bytes(blob[1:].tolist())) == b"\x00\x00" + b"\xaa\x02\x00" * 39

    def test_codec_is_the_shortest(self) -> None:
        generator = torch.Generator().manual_seed(0)
        uniform = torch.randperm(10_000, generator=generator)[:500].sort().values
        clustered = (torch.arange(50)[:, None] * 1000 + torch.arange(16)).reshape(-1)
        assert encode_indices(uniform)[0] == 1
        assert encode_indices(clustered)[0] == 2
        assert len(encode_indices(torch.arange(1_000_000))) == 2

    def test_size_is_near_the_entropy(self) -> None:
        numel, count = 1_000_000, 1_000
        indices = torch.randperm(numel, generator=torch.Generator().manual_seed(0))[:count].sort().values
        density = count / numel
        entropy = -numel * (density * math.log2(density) + (1 - density) * math.log2(1 - density)) / 8
        assert len(encode_indices(indices)) <= 1.05 * entropy

    @pytest.mark.parametrize(
        ("indices", "words"),
        [
            (torch.tensor([3, 3]), "strictly increasing"),
            (torch.tensor([3, 2]), "strictly increasing"),
            (torch.tensor([-1, 2]), r"in \[0, "),
            (torch.tensor([MAX_NUMEL]), r"in \[0, "),
            (torch.tensor([1, 2], dtype=torch.int32), "int64"),
            (torch.tensor([[1, 2]]), "int64 of shape"),
        ],
    )
    def test_refuses_to_encode(self, indices: torch.Tensor, words: str) -> None:
        with pytest.raises(PatchError, match=words):
            encode_indices(indices)


class TestHostileCode:
    BAD = {
        "empty": ("", 1),
        "unknown codec": ("0300", 1),
        "run: no start": ("00", 1),
        "run: start cut off": ("0080", 1),
        "run: byte after start": ("000000", 1),
        "run: start with needless bytes": ("008000", 1),
        "run: start too large": ("00" + "ff" * 9 + "01", 1),
        "run: past the end": ("00f807", 1),
        "run: more than there are": ("0000", 1001),
        "rice: no r": ("01", 1),
        "rice: r too large": ("01ff" + "ff" * 64, 1),
        "rice: truncated planes": ("010785c4", 4),
        "rice: truncated unary": ("010785c4404e", 4),
        "rice: byte after the end": ("010785c4404e0200", 4),
        "rice: one entry too many": ("010785c4404e03", 4),
        "rice: fewer entries than said": ("010785c4404e02", 3),
        "rice: index past the end": ("012eff" + "ff" * 5 + "80", 1),
        "varint: not zlib": ("02ffff", 1),
        "varint: no bytes": ("02", 1),
    }

    @pytest.mark.parametrize("case", BAD)
    def test_refused_by_name(self, case: str) -> None:
        text, count = self.BAD[case]
        with pytest.raises(PatchError, match=r"in 'layer\.weight'"):
            decode_indices(blob_of(text), count, 1000, where="layer.weight")

    @pytest.mark.parametrize(
        ("stream", "count"),
        [
            (zlib.compress(b"\x05\x00"), 1),  # more varints than values
            (zlib.compress(b"\x05"), 2),  # fewer
            (zlib.compress(b"\x05\x85"), 2),  # the last one cut off
            (zlib.compress(b"\x85\x00"), 1),  # not the shortest form
            (zlib.compress(b"\xff\xff\x01"), 1),  # longer than an index below 1000 can be
            (zlib.compress(b"\xe8\x07"), 1),  # 1000
            (zlib.compress(b"\x05")[:-1], 1),  # truncated
            (zlib.compress(b"\x05") + b"\x00", 1),  # trailing byte
            (zlib.compress(b"\x05") + zlib.compress(b"\x05"), 2),  # two streams
            (zlib.compress(b"\x05")[:-1] + b"\x00", 1),  # wrong checksum
        ],
    )
    def test_deflated_varints(self, stream: bytes, count: int) -> None:
        blob = torch.tensor(list(b"\x02" + stream), dtype=torch.uint8)
        with pytest.raises(PatchError):
            decode_indices(blob, count, 1000)

    def test_wrong_tensor_for_a_code(self) -> None:
        for blob in (torch.zeros(2, dtype=torch.int8), torch.zeros(2), torch.zeros(1, 2, dtype=torch.uint8)):
            with pytest.raises(PatchError, match="vector of uint8"):
                decode_indices(blob, 1, 10)

    def test_gaps_cannot_wrap_around(self) -> None:
        # Every gap is below numel, but 2**18 of them add up past 2**63 and back to small numbers.
        count, r = 2**18, 47
        planes = np.ones(r * count, dtype=np.uint8)
        packed = np.packbits(np.concatenate([planes, np.ones(count, dtype=np.uint8)]))
        blob = torch.from_numpy(np.concatenate([np.array([1, r], dtype=np.uint8), packed]))
        with pytest.raises(PatchError, match="below"):
            decode_indices(blob, count, MAX_NUMEL)

    def test_bomb_costs_no_memory(self) -> None:
        bomb = torch.frombuffer(bytearray(b"\x02" + zlib.compress(bytes(50_000_000), 9)), dtype=torch.uint8)
        unary = torch.cat([torch.tensor([1, 0], dtype=torch.uint8), torch.full((4_000_000,), 255, dtype=torch.uint8)])
        for blob, room in ((bomb, 1_000_000), (unary, 10_000_000)):
            tracemalloc.start()
            with pytest.raises(PatchError):
                decode_indices(blob, 10, MAX_NUMEL)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < room

    @settings(max_examples=400)
    @given(st.data())
    def test_mutations_decode_to_valid_indices_or_are_refused(self, data: st.DataObject) -> None:
        listed = data.draw(index_lists())
        blob = bytearray(encode_indices(torch.tensor(listed, dtype=torch.int64)).tolist())
        for _ in range(data.draw(st.integers(1, 3))):
            at = data.draw(st.integers(0, len(blob)))
            kind = data.draw(st.sampled_from(["flip", "insert", "delete", "cut", "codec"]))
            if kind == "flip" and at < len(blob):
                blob[at] ^= 1 << data.draw(st.integers(0, 7))
            elif kind == "insert":
                blob[at:at] = data.draw(st.binary(min_size=1, max_size=4))
            elif kind == "delete":
                del blob[at : at + 1]
            elif kind == "cut":
                del blob[at:]
            elif blob:
                blob[0] = data.draw(st.integers(0, 3))
        self.check_any(bytes(blob), len(listed), listed[-1] + 1 if listed else 5)

    @settings(max_examples=400)
    @given(st.binary(max_size=40), st.integers(0, 40), st.integers(0, 2000))
    def test_random_bytes_decode_to_valid_indices_or_are_refused(self, blob: bytes, count: int, numel: int) -> None:
        self.check_any(bytes([blob[0] % 3]) + blob[1:] if blob else blob, count, numel)

    def check_any(self, blob: bytes, count: int, numel: int) -> None:
        try:
            indices = decode_indices(torch.tensor(list(blob), dtype=torch.uint8), count, numel, "x")
        except PatchError:
            return
        assert indices.dtype == torch.int64 and indices.shape == (count,)
        assert bool((indices[1:] > indices[:-1]).all())
        assert count == 0 or (0 <= int(indices[0]) and int(indices[-1]) < numel)


@pytest.mark.parametrize(("numel", "codec"), [(1 << 24, 1), (1 << 19, 2)], ids=["rice", "varint"])
def test_decoding_takes_little_more_memory_than_the_indices(numel: int, codec: int) -> None:
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(1 << 24, (300_000,), generator=generator).unique()
    if codec == 2:  # clusters, so that deflating pays
        indices = (torch.arange(0, numel, 64)[:, None] + torch.arange(40)).reshape(-1)
    blob = encode_indices(indices)
    assert int(blob[0]) == codec
    tracemalloc.start()
    found = decode_indices(blob, len(indices), numel, "tensor")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert torch.equal(found, indices)
    assert peak < 8 * len(indices) + (1 if codec == 1 else 2) * len(indices) + (4 << 20)
