"""The one reader of pictures: upright, RGB, alike whatever the file holds."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from coordexp.errors import RecordError
from coordexp.pictures import PictureFacts, open_picture, picture_bytes, picture_facts, upright_rgb

ORIENTATION = 0x0112
WIDTH, HEIGHT = 30, 20
RED, WHITE = (255, 0, 0), (255, 255, 255)
# EXIF 2.3, tag Orientation: which corner of the upright picture shows the first pixel of the file.
CORNER_OF_FIRST_PIXEL = {
    1: (0, 0),
    2: (1, 0),
    3: (1, 1),
    4: (0, 1),
    5: (0, 0),
    6: (1, 0),
    7: (1, 1),
    8: (0, 1),
}


def scene(width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """Smooth colours, and a red mark of 8 x 8 pixels at the first pixel."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([40 + 0 * x, 60 + 3 * x, 60 + 3 * y], axis=-1).astype(np.uint8)
    pixels[:8, :8] = RED
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str, orientation: int | None = None, **options: object) -> bytes:
    stream = io.BytesIO()
    if orientation is not None:
        options["exif"] = exif(orientation)
    image.save(stream, kind, **options)
    return stream.getvalue()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    return tags


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_the_mark_is_where_exif_says_and_the_facts_give_the_upright_size(kind: str, orientation: int):
    data = encoded(
        scene(), kind, orientation, **({"quality": 95} if kind != "PNG" and kind != "TIFF" else {})
    )
    picture = open_picture(data)
    size = (HEIGHT, WIDTH) if orientation >= 5 else (WIDTH, HEIGHT)
    assert (picture.mode, picture.size) == ("RGB", size)
    facts = picture_facts(data)
    assert (facts.width, facts.height) == size
    if kind != "AVIF":  # its decoder may say the same turn by another tag
        assert facts.exif_orientation == orientation
    right, bottom = CORNER_OF_FIRST_PIXEL[orientation]
    middle_of_mark = (size[0] - 4 if right else 3, size[1] - 4 if bottom else 3)
    pixel = picture.getpixel(middle_of_mark)
    assert np.abs(np.subtract(pixel, RED)).max() < 40


def test_what_was_turned_carries_no_orientation_that_another_reader_would_apply_again():
    picture = open_picture(encoded(scene(), "JPEG", 6))
    assert picture.info == {}
    assert picture.getexif() == {}
    assert upright_rgb(picture).tobytes() == picture.tobytes()


def late_exif(orientation: int) -> bytes:
    """A PNG whose EXIF comes after its pixels, as some programs write it."""
    data = encoded(scene(), "PNG")
    body = exif(orientation).tobytes().removeprefix(b"Exif\0\0")
    chunk = b"eXIf" + body
    chunk = struct.pack(">I", len(body)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    end = data.rindex(b"IEND") - 4
    return data[:end] + chunk + data[end:]


def test_exif_after_the_pixels_of_a_png_counts_for_header_and_pixels():
    data = late_exif(6)
    assert open_picture(data).size == (HEIGHT, WIDTH)
    assert picture_facts(data) == PictureFacts(HEIGHT, WIDTH, "RGB", 6, False, 8)


TRANSPARENT = [
    ("RGBA", (255, 0, 0, 0), WHITE),
    ("RGBA", (255, 0, 0, 128), (255, 127, 127)),
    ("RGBA", (255, 0, 0, 255), RED),
    ("LA", (0, 0), WHITE),
    ("LA", (0, 255), (0, 0, 0)),
]


@pytest.mark.parametrize(("mode", "colour", "expected"), TRANSPARENT)
def test_transparency_is_laid_on_white(mode: str, colour: tuple[int, ...], expected: tuple[int, ...]):
    data = encoded(Image.new(mode, (4, 3), colour), "PNG")
    assert open_picture(data).getpixel((1, 1)) == expected
    assert picture_facts(data) == PictureFacts(4, 3, mode, 1, True, 8)


def test_a_transparent_colour_of_a_palette_is_white():
    image = Image.new("P", (4, 3), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    assert open_picture(encoded(image, "PNG")).getpixel((0, 0)) == RED
    data = encoded(image, "PNG", transparency=1)
    assert open_picture(data).getpixel((0, 0)) == WHITE
    assert picture_facts(data).has_alpha


@pytest.mark.parametrize("value", [0, 255, 256, 12_800, 65_535])
def test_sixteen_bits_give_their_high_byte_in_gray_as_in_colour(value: int):
    gray = encoded(Image.fromarray(np.full((3, 4), value, dtype=np.uint16)), "PNG")
    assert open_picture(gray).getpixel((2, 1)) == (value >> 8,) * 3
    assert picture_facts(gray).bits == 16
    colour = png_16_bit_rgb(value)
    assert open_picture(colour).getpixel((2, 1)) == (value >> 8,) * 3
    assert picture_facts(colour) == PictureFacts(4, 3, "RGB", 1, False, 16)


def png_16_bit_rgb(value: int) -> bytes:
    """A PNG of 4 x 3 pixels that Pillow can read but not write."""
    rows = b"".join(b"\0" + struct.pack(">H", value) * 12 for _ in range(3))
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 4, 3, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_thirty_two_bits_are_refused(tmp_path: Path, kind: type):
    path = tmp_path / "depth.tiff"
    Image.fromarray(np.full((3, 4), 7, dtype=kind)).save(path)
    assert picture_facts(path).bits == 32
    with pytest.raises(RecordError, match=r"depth\.tiff has 32 bits a channel"):
        open_picture(path)


@pytest.mark.parametrize("mode", ["L", "CMYK", "1"])
def test_other_modes_become_rgb_as_pillow_converts_them(mode: str):
    image = scene().convert(mode)
    data = encoded(image, "TIFF")
    assert open_picture(data).tobytes() == image.convert("RGB").tobytes()
    assert picture_facts(data).mode == mode


def test_the_first_frame_of_several_counts():
    frames = [Image.new("RGB", (4, 3), colour) for colour in (RED, WHITE)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert open_picture(data).getpixel((0, 0)) == RED


def broken_files() -> dict[str, bytes]:
    whole = encoded(scene(300, 200), "JPEG")
    return {
        "cut": whole[: len(whole) // 2],
        "text": b"no picture at all",
        "empty": b"",
        "program": b"%!PS-Adobe-3.0 EPSF",
    }


@pytest.mark.parametrize("name", broken_files())
def test_a_broken_file_is_an_error_that_names_it(tmp_path: Path, name: str):
    path = tmp_path / f"{name}.jpg"
    path.write_bytes(broken_files()[name])
    with pytest.raises(RecordError, match=rf"{name}\.jpg"):
        open_picture(path)


def test_a_missing_file_is_named(tmp_path: Path):
    for read in (open_picture, picture_facts, picture_bytes):
        with pytest.raises(RecordError, match=r"none\.jpg does not exist"):
            read(tmp_path / "none.jpg")


@given(st.sampled_from(["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "GIF"]), st.data())
@settings(max_examples=150, deadline=None)
def test_damage_anywhere_gives_a_picture_or_a_record_error(kind: str, data: st.DataObject):
    whole = bytearray(encoded(scene(), kind))
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(whole[: data.draw(st.integers(len(whole) // 2, len(whole)))])
    try:
        picture = open_picture(damaged)
    except RecordError:
        return
    facts = picture_facts(damaged)
    assert picture.mode == "RGB"
    assert picture.size == (facts.width, facts.height)


def test_bytes_for_others_are_the_file_only_where_any_reader_sees_the_same(tmp_path: Path):
    cases = {
        "plain.jpg": (encoded(scene(), "JPEG"), True),
        "upright.jpg": (encoded(scene(), "JPEG", 1), True),
        "plain.png": (encoded(scene(), "PNG"), True),
        "turned.jpg": (encoded(scene(), "JPEG", 6), False),
        "turned.png": (encoded(scene(), "PNG", 8), False),
        "late.png": (late_exif(6), False),
        "transparent.png": (encoded(Image.new("RGBA", (4, 3), (9, 9, 9, 9)), "PNG"), False),
        "sixteen.png": (png_16_bit_rgb(300), False),
        "cmyk.jpg": (encoded(scene().convert("CMYK"), "JPEG"), False),
        "plain.webp": (encoded(scene(), "WEBP"), False),
    }
    for name, (content, as_it_is) in cases.items():
        path = tmp_path / name
        path.write_bytes(content)
        data, media_type = picture_bytes(path)
        assert (data == content) == as_it_is, name
        assert media_type == ("image/jpeg" if as_it_is and name.endswith("jpg") else "image/png"), name
        naive = Image.open(io.BytesIO(data)).convert("RGB")
        assert naive.tobytes() == open_picture(path).tobytes(), name
