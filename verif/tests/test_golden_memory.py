"""golden.memory: round trips, the bytes of known blocks, every kind of malformed block, tensor layouts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from golden.fgmp import CODE_FP8, CODE_FP16, CODE_PADDING, Policy, quantize
from golden.memory import (
    DecodeError,
    TensorLayout,
    block_addresses,
    decode_block,
    decode_blocks,
    decode_slots,
    encode_block,
    encode_blocks,
    encode_slots,
)

ONE, NAN8 = 0x3C00, 0x7F
POLICIES = ["fp16", "fp8", Policy.between(0.0625, 64.0, below="zero"), Policy.between(0.0625, 64.0, below="fp16")]


def random_blocks(rng, blocks, policy, density):
    values = rng.integers(0, 1 << 16, (blocks, 64)).astype(np.uint16)
    values[rng.random((blocks, 64)) >= density] = 0
    bits, codes, _ = quantize(values, policy)
    return bits, codes


def block_of(**elements):
    """A block with FP8 (`e`) or FP16 (`h`) elements at indices, for example e0=0x3C00."""
    bits, codes = np.zeros(64, np.uint16), np.zeros(64, np.uint8)
    for name, pattern in elements.items():
        bits[int(name[1:])] = pattern
        codes[int(name[1:])] = CODE_FP8 if name[0] == "e" else CODE_FP16
    return bits, codes


def test_bytes_of_known_blocks():
    assert encode_block(*block_of()) == bytes([0xA2])
    assert encode_block(*block_of(e0=ONE)) == bytes([0xA1, 1, 0, 0, 0, 0, 0, 0, 0, 0x38])
    assert encode_block(*block_of(h9=0x1234)) == bytes([0xA5, 0, 2, 0, 0, 0, 0, 0, 0, 0x34, 0x12])
    mixed = encode_block(*block_of(e0=ONE, h1=0xBC01, e63=0xC000))
    assert mixed == bytes([0xA9, 3, 0, 0, 0, 0, 0, 0, 0x80, 0b010, 0x38, 0x01, 0xBC, 0xC0])
    dense8 = encode_block(np.full(64, ONE), np.full(64, CODE_FP8))
    assert dense8 == bytes([0xA0]) + bytes([0x38]) * 64
    dense16 = encode_block(np.full(64, ONE), np.full(64, CODE_FP16))
    assert dense16 == bytes([0xA4]) + bytes([0x00, 0x3C]) * 64
    codes = np.full(64, CODE_FP16)
    codes[5] = CODE_FP8
    dense_mixed = encode_block(np.full(64, ONE), codes)
    assert dense_mixed[:9] == bytes([0xA8, 0xDF]) + bytes([0xFF]) * 7
    assert len(dense_mixed) == 136
    codes = np.full(64, CODE_FP8)
    codes[[0, 17, 63]] = CODE_FP16
    few = encode_block(np.full(64, ONE), codes)
    assert few[:4] == bytes([0xAC, 0, 17, 63 | 0x80]) and few[4:7] == bytes([0x00, 0x3C, 0x38])
    codes[:9] = CODE_FP16  # 11 in all: a mask of 8 bytes is shorter
    assert encode_block(np.full(64, ONE), codes)[0] == 0xA8
    codes[:4] = CODE_FP8  # 7: a list is
    assert encode_block(np.full(64, ONE), codes)[:8] == bytes([0xAC, 4, 5, 6, 7, 8, 17, 63 | 0x80])


def test_longest_block():
    codes = np.full(64, CODE_FP16)
    codes[63] = CODE_FP8
    bits = np.full(64, ONE)
    codes[0], bits[0] = 0, 0
    raw = encode_block(bits, codes)  # 1 + 8 + 8 + 62 * 2 + 1
    assert len(raw) == 142
    codes[0], bits[0] = CODE_FP16, ONE
    assert len(encode_block(bits, codes)) == 136


@pytest.mark.parametrize("policy", POLICIES, ids=range(len(POLICIES)))
@pytest.mark.parametrize("density", [0.0, 0.03, 0.5, 0.97, 1.0])
def test_round_trip(policy, density):
    rng = np.random.default_rng(int(density * 100))
    bits, codes = random_blocks(rng, 40, policy, density)
    blocks = encode_blocks(bits, codes)
    for index, raw in enumerate(blocks):
        assert raw == encode_block(bits[index], codes[index])
        assert len(raw) <= 145
        one_bits, one_codes = decode_block(raw)
        assert np.array_equal(one_bits, bits[index])
        assert np.array_equal(one_codes, codes[index])
    all_bits, all_codes = decode_blocks(blocks)
    assert np.array_equal(all_bits, bits)
    assert np.array_equal(all_codes, codes)


payloads = st.one_of(
    st.just((0, 0)),
    st.integers(0, 255).filter(lambda byte: byte & 0x7F not in (0, 0x7F)).map(lambda byte: (_expand(byte), CODE_FP8)),
    st.integers(0, 0xFFFF).filter(lambda pattern: pattern & 0x7FFF).map(lambda pattern: (pattern, CODE_FP16)),
)


def _expand(byte):
    import ml_dtypes

    return int(np.array(byte, np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float16).view(np.uint16))


@settings(max_examples=60, deadline=None)
@given(st.lists(payloads, min_size=64, max_size=64))
def test_every_block_survives(elements):
    bits = np.array([pattern for pattern, _ in elements], np.uint16)
    codes = np.array([code for _, code in elements], np.uint8)
    raw = encode_block(bits, codes)
    assert raw == encode_blocks(bits, codes)[0]
    one_bits, one_codes = decode_block(raw)
    assert np.array_equal(one_bits, bits)
    assert np.array_equal(one_codes, codes)


def test_padding_is_encoded_as_zeros():
    bits, codes = block_of(e3=ONE)
    padded = codes.copy()
    padded[40:] = CODE_PADDING
    assert encode_block(bits, padded) == encode_block(bits, codes) == encode_blocks(bits, padded)[0]


def _malformed():
    masked8 = encode_block(*block_of(e0=ONE, e1=ONE, e2=ONE))
    masked16 = encode_block(*block_of(h0=ONE))
    mixed = encode_block(*block_of(e0=ONE, h1=ONE))
    wide = {f"e{k}": ONE for k in range(20)}
    few = encode_block(*block_of(**wide, h30=ONE, h31=ONE))  # 22 non-zeros: a mask has 3 bytes
    assert few[0] == 0xAD and few[9:11] == bytes([20, 21 | 0x80])
    masked = encode_block(*block_of(**wide, h30=ONE, h31=ONE, h32=ONE))
    assert masked[0] == 0xA9
    dense = encode_block(np.full(64, ONE), np.full(64, CODE_FP8))

    def changed(raw, **at):
        raw = bytearray(raw)
        for name, byte in at.items():
            raw[int(name[1:])] = byte
        return bytes(raw)

    return {
        "magic": ("magic must be 0b1010, not 0b1011", changed(masked8, b0=0xB1)),
        "zeros": ("magic", bytes(8)),
        "nonzero mode": ("non-zero mode 3", changed(masked8, b0=0xA3)),
        "list not ascending": ("must ascend", changed(few, b9=21)),
        "list beyond": ("must ascend to less than 22", changed(few, b10=22 | 0x80)),
        "list bit 6": ("must ascend", changed(few, b9=20 | 0x40)),
        "list too long": ("must end", changed(few, b10=21)),
        "list cut short": ("must be 33 bytes by its contents, not 35", changed(few, b9=20 | 0x80)),
        "list of uniform": ("must end", changed(masked8, b0=0xAD)),
        "mask longer than a list": ("must not be longer than a list", changed(masked, b9=3, b10=0, b11=0)[:-1]),
        "empty with precision": ("empty block must be 0, not 1", bytes([0xA6])),
        "no mask": ("at least 9 bytes", bytes([0xA1]) + bytes(7)),
        "mask empty": ("neither empty nor full", bytes([0xA1]) + bytes(15)),
        "mask full": ("neither empty nor full", bytes([0xA1]) + bytes([255] * 8) + bytes([0x38] * 64) + bytes(7)),
        "too long": ("must be 12 bytes by its contents, not 13", masked8 + bytes(1)),
        "too short": ("must be 65 bytes by its contents, not 64", dense[:-1]),
        "empty too long": ("must be 1 bytes", bytes([0xA2]) + bytes(1)),
        "no bytes": ("1 to 145 bytes, not 0", b""),
        "beyond the longest": ("1 to 145 bytes, not 146", dense + bytes(81)),
        "e4m3 nan": ("element 1 is an E4M3 NaN", changed(masked8, b10=0x7F)),
        "e4m3 -nan": ("element 1 is an E4M3 NaN", changed(masked8, b10=0xFF)),
        "e4m3 zero": ("element 2 is an E4M3 zero", changed(masked8, b11=0x00)),
        "e4m3 -0": ("element 2 is an E4M3 zero", changed(masked8, b11=0x80)),
        "fp16 zero": ("element 0 is an FP16 zero", changed(masked16, b10=0)),
        "fp16 -0": ("element 0 is an FP16 zero", changed(masked16, b10=0x80)),
        "mixed all fp8": ("both precisions", changed(mixed, b9=0)[:-1]),
        "mixed all fp16": ("both precisions", changed(mixed, b9=3) + bytes(1)),
        "mixed bits beyond": ("beyond the precision mask", changed(mixed, b9=2 | 4)),
    }


MALFORMED = _malformed()


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_block(kind):
    reason, raw = MALFORMED[kind]
    with pytest.raises(DecodeError, match=reason) as error:
        decode_block(raw)
    assert error.value.block is None
    good = encode_block(*block_of(e0=ONE))
    with pytest.raises(DecodeError, match=reason) as error:
        decode_blocks([good, raw, good])
    assert error.value.block == 1
    assert str(error.value).startswith("block 1: ")


def test_malformed_block_gives_zeros_on_request():
    bits, codes = block_of(e0=ONE, h1=ONE)
    slots, lengths = encode_slots(np.stack([bits] * 4), np.stack([codes] * 4))
    slots[1, 0] = 0
    lengths[2] = 146
    out_bits, out_codes, bad = decode_slots(slots, lengths, on_error="zeros")
    assert bad.tolist() == [False, True, True, False]
    assert np.array_equal(out_bits, np.stack([bits, bits * 0, bits * 0, bits]))
    assert np.array_equal(out_codes, np.stack([codes, codes * 0, codes * 0, codes]))
    slots[1, 0] = slots[0, 0]
    with pytest.raises(DecodeError, match="block 2: length must be 1 to 145 bytes, not 146"):
        decode_slots(slots, lengths)


def test_decoders_agree_on_damaged_blocks():
    rng = np.random.default_rng(5)
    blocks = [raw for policy in POLICIES for raw in encode_blocks(*random_blocks(rng, 6, policy, 0.6))]
    accepted = 0
    for _ in range(800):
        raw = bytearray(blocks[rng.integers(len(blocks))])
        for _ in range(rng.integers(1, 3)):
            raw[rng.integers(0, len(raw))] ^= 1 << rng.integers(8)
        raw = bytes(raw)
        try:
            bits, codes = decode_block(raw)
        except DecodeError as error:
            with pytest.raises(DecodeError) as other:
                decode_blocks([raw])
            assert other.value.reason == error.reason
        else:
            accepted += 1
            fast_bits, fast_codes = decode_blocks([raw])
            assert np.array_equal(fast_bits[0], bits)
            assert np.array_equal(fast_codes[0], codes)
            assert encode_block(bits, codes) == raw  # only what the encoder can write
    assert accepted > 50


@pytest.mark.parametrize(
    ("channels", "beat", "padded", "planes", "block_pixels", "line_blocks"),
    [
        (1, 4, 4, 1, 16, 1),
        (3, 4, 4, 1, 16, 1),
        (3, 1, 4, 1, 16, 1),
        (1, 1, 1, 1, 64, 1),
        (5, 4, 8, 1, 8, 2),
        (3, 16, 16, 1, 4, 3),
        (33, 4, 64, 1, 1, 10),
        (64, 4, 64, 1, 1, 10),
        (65, 4, 128, 2, 1, 10),
        (128, 4, 128, 2, 1, 10),
        (130, 4, 192, 3, 1, 10),
    ],
)
def test_layout(channels, beat, padded, planes, block_pixels, line_blocks):
    layout = TensorLayout(3, 10, channels, beat)
    assert layout.padded_channels == padded
    assert layout.planes == planes
    assert layout.block_pixels == block_pixels
    assert layout.line_blocks == line_blocks
    assert layout.blocks == 3 * planes * line_blocks
    assert layout.slot_bytes == 160 * layout.blocks
    assert layout.table_bytes % 32 == 0
    assert 0 <= layout.table_bytes - layout.blocks < 32
    numbers = np.arange(1, 30 * channels + 1).reshape(layout.shape)
    blocks = layout.to_blocks(numbers)
    where = layout.index_maps()
    assert np.array_equal(blocks[where], numbers)
    assert (blocks != 0).sum() == numbers.size
    assert np.array_equal(layout.from_blocks(blocks), numbers)


def test_planes_and_runs():
    layout = TensorLayout(4, 3, 128, image_lines=2, line_blocks=4, log2_run=2)
    assert (layout.planes, layout.used_blocks, layout.blocks) == (2, 3, 32)
    # Image, plane, line of the image, pixel.
    assert layout.block_of(3, 2, 64) == ((1 * 2 + 1) * 2 + 1) * 4 + 2
    assert layout.used().reshape(8, 4).tolist() == [[True, True, True, False]] * 8
    lengths = np.where(layout.used(), 10, 0)
    assert block_addresses(lengths, layout.log2_run)[:8].tolist() == [0, 10, 20, 30, 640, 650, 660, 670]


@pytest.mark.parametrize("log2_run", [0, 1, 3, 4])
@pytest.mark.parametrize("channels", [3, 8, 40, 64, 130])
def test_pack_and_unpack(channels, log2_run):
    layout = TensorLayout(4, 7, channels, image_lines=2, line_blocks=16 if log2_run else 0, log2_run=log2_run)
    rng = np.random.default_rng(channels)
    values = np.maximum(rng.normal(size=layout.shape), 0).astype(np.float16).view(np.uint16)
    bits, codes, _ = quantize(values, Policy.between(0.25, 1.0, below="zero"))
    slots, table = layout.pack(bits, codes)
    assert (len(slots), len(table)) == (layout.slot_bytes, layout.table_bytes)
    out_bits, out_codes = layout.unpack(slots, table)
    assert np.array_equal(out_bits, bits)
    assert np.array_equal(out_codes, codes)
    assert np.array_equal(layout.lengths(codes), np.frombuffer(table, np.uint8, layout.blocks))
    blocks = encode_blocks(layout.to_blocks(bits), layout.to_blocks(codes))
    blocks = [raw if used else b"" for raw, used in zip(blocks, layout.used(), strict=True)]
    run = 1 << log2_run
    for first in range(0, layout.blocks, run):
        packed = b"".join(blocks[first : first + run])
        slot = slots[160 * first : 160 * (first + run)]
        assert slot == packed + bytes(len(slot) - len(packed))
    assert list(table) == [len(raw) for raw in blocks] + [0] * (len(table) - layout.blocks)
    assert layout.bus_bytes(table) == sum(len(raw) for raw in blocks)


def test_only_used_bytes_count():
    layout = TensorLayout(1, 4, 64)
    bits, codes = random_blocks(np.random.default_rng(1), 4, POLICIES[2], 0.5)
    slots, table = layout.pack(bits.reshape(layout.shape), codes.reshape(layout.shape))
    noise = np.frombuffer(slots, np.uint8).reshape(-1, 160).copy()
    noise[np.arange(160) >= np.frombuffer(table, np.uint8, 4)[:, None]] = 0xEE
    assert np.array_equal(layout.unpack(noise.tobytes(), table)[0].reshape(4, 64), bits)


def test_no_blocks():
    slots, lengths = encode_slots(np.zeros((0, 64), np.uint16), np.zeros((0, 64), np.uint8))
    assert slots.shape == (0, 160)
    assert decode_slots(slots, lengths)[0].shape == (0, 64)


@pytest.mark.parametrize(
    "make",
    [
        lambda: encode_block([0] * 63, [0] * 63),
        lambda: encode_block([0x3C01] * 64, [CODE_FP8] * 64),
        lambda: encode_block([0] * 64, [CODE_FP8] * 64),
        lambda: encode_block([0x8000] * 64, [CODE_FP16] * 64),
        lambda: encode_block([0] * 64, [4] * 64),
        lambda: encode_slots(np.full((1, 64), 0x3C01, np.uint16), np.full((1, 64), CODE_FP8, np.uint8)),
        lambda: encode_slots(np.full((1, 64), 0x8000, np.uint16), np.full((1, 64), CODE_FP16, np.uint8)),
        lambda: encode_slots(np.zeros((1, 64), np.uint16), np.full((1, 64), 4, np.uint8)),
        lambda: encode_slots(np.zeros((1, 63), np.uint16), np.zeros((1, 63), np.uint8)),
        lambda: encode_slots(np.zeros((1, 64), np.uint16), np.zeros((2, 64), np.uint8)),
        lambda: decode_slots(np.zeros((1, 159), np.uint8), np.zeros(1, np.uint8)),
        lambda: decode_slots(np.zeros((1, 160), np.uint8), np.zeros(2, np.uint8)),
        lambda: decode_slots(np.zeros((1, 160), np.uint8), np.zeros(1, np.uint8), on_error="no"),
        lambda: TensorLayout(0, 1, 1),
        lambda: TensorLayout(1, 1, 1, beat=3),
        lambda: TensorLayout(4, 1, 1, image_lines=3),
        lambda: TensorLayout(4, 3, 64, line_blocks=2),
        lambda: TensorLayout(4, 3, 64, line_blocks=6, log2_run=2),
        lambda: TensorLayout(4, 3, 64, log2_run=5),
        lambda: TensorLayout(1, 2, 3).to_blocks(np.zeros((1, 3, 2))),
        lambda: TensorLayout(1, 2, 3).from_blocks(np.zeros((2, 64))),
        lambda: TensorLayout(1, 2, 3).unpack(b"", b""),
        lambda: TensorLayout(1, 2, 3).unpack(bytes(160), b""),
    ],
)
def test_wrong_values(make):
    with pytest.raises(ValueError, match=r"not "):
        make()


def test_wrong_types():
    with pytest.raises(TypeError, match="uint16"):
        encode_slots(np.zeros((1, 64), np.int64), np.zeros((1, 64), np.uint8))
    with pytest.raises(TypeError, match="uint8"):
        encode_slots(np.zeros((1, 64), np.uint16), np.zeros((1, 64), np.int64))
    with pytest.raises(TypeError, match="uint8"):
        decode_slots(np.zeros((1, 160), np.int64), np.zeros(1, np.uint8))
