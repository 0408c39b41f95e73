import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from lexel.data.images import load_image, read_pixels, to_image, to_pixels, varied_pixels, verify_image
from lexel.errors import LexelError


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(height=40, width=60, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png_of_claimed_size(width, height):
    """A PNG whose header promises width x height pixels, with next to no data behind it."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 10)) + chunk(b"IEND", b"")


def test_pixels_and_pictures_are_inverse():
    image = noise()
    pixels = to_pixels(image, (40, 60))
    assert pixels.dtype == torch.float32
    assert pixels.min() >= -1
    assert pixels.max() <= 1
    assert np.array_equal(np.asarray(to_image(pixels)), np.asarray(image))


def test_values_outside_the_range_are_clipped():
    assert np.asarray(to_image(torch.tensor([-3.0, 0.0, 3.0]).view(3, 1, 1))).tolist() == [[[0, 128, 255]]]


def test_the_centre_is_kept_when_a_wide_picture_is_cropped():
    array = np.zeros((10, 30, 3), dtype=np.uint8)
    array[:, 10:20] = 255
    assert torch.equal(to_pixels(Image.fromarray(array), 10), torch.ones(3, 10, 10))


def test_camera_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    image = noise(8, 16)
    upright = load_image(encoded(image, exif=exif.tobytes()))
    assert np.array_equal(np.asarray(upright), np.rot90(np.asarray(image), -1))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_white(mode):
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0)).convert(mode)
    options = {"transparency": 0} if mode == "P" else {}
    assert np.asarray(load_image(encoded(image, **options))).min() == 255


def test_sixteen_bit_greys_are_scaled_not_clipped():
    grey = np.array([[0, 257 * 100, 65535]], dtype=np.uint16)
    image = load_image(encoded(Image.fromarray(grey)))
    assert np.asarray(image)[0, :, 0].tolist() == [0, 100, 255]


@pytest.mark.parametrize("size", [(8100, 8100), (10_000, 10_000), (60_000, 60_000)])
@pytest.mark.parametrize("read", [load_image, verify_image])
def test_decompression_bombs_are_refused_before_decoding(size, read):
    with pytest.raises(LexelError, match=r"bomb\.png is refused"):
        read(png_of_claimed_size(*size), "bomb.png")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("read", [load_image, verify_image])
def test_truncated_pictures_are_found(kind, read):
    data = encoded(noise(200, 200), kind)
    read(data, "whole")
    with pytest.raises(LexelError, match="half cannot be read as a picture"):
        read(data[: len(data) // 2], "half")


@pytest.mark.parametrize(
    "data", [b"", b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"]
)
def test_what_is_no_picture_is_refused_in_one_sentence(data):
    with pytest.raises(LexelError, match="cannot be read as a picture") as caught:
        load_image(data)
    assert "\n" not in str(caught.value)


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(LexelError, match=r"nothing\.png does not exist"):
        load_image(tmp_path / "nothing.png")
    with pytest.raises(LexelError, match="is a folder"):
        read_pixels(tmp_path, 8)


class TestVariation:
    """Random crops of training pictures."""

    def ramp(self, height, width):
        """Red grows to the right, green downwards, so that a crop tells where it was taken."""
        rows, columns = np.mgrid[0:height, 0:width]
        layers = [columns * 255 // (width - 1), rows * 255 // (height - 1), np.zeros_like(rows)]
        return Image.fromarray(np.stack(layers, -1).astype(np.uint8))

    def test_a_seed_is_a_variation_and_seeds_differ(self):
        image = noise(80, 100)
        first = varied_pixels(image, 32, 0.5, True, 1)
        assert torch.equal(first, varied_pixels(image, 32, 0.5, True, 1))
        assert not torch.equal(first, varied_pixels(image, 32, 0.5, True, 2))

    def test_without_crop_and_flip_it_is_the_centre(self):
        assert torch.equal(varied_pixels(noise(), 16, 1.0, False, 7), to_pixels(noise(), 16))

    def test_half_of_the_pictures_are_mirrored(self):
        plain = to_pixels(noise(), 16)
        drawn = [varied_pixels(noise(), 16, 1.0, True, seed) for seed in range(40)]
        mirrored = sum(torch.equal(one, plain.flip(-1)) for one in drawn)
        assert 10 <= mirrored <= 30
        assert all(torch.equal(one, plain) or torch.equal(one, plain.flip(-1)) for one in drawn)

    def test_a_crop_spans_between_the_share_and_all_of_the_shorter_side(self):
        image = self.ramp(128, 128)
        drawn = [varied_pixels(image, 64, 0.5, False, seed) for seed in range(60)]
        spans = torch.stack([(one[0].max() - one[0].min()) / 2 for one in drawn])
        assert spans.min() == pytest.approx(0.5, abs=0.05)
        assert spans.max() == pytest.approx(1.0, abs=0.05)
        # Windows reach every edge of the picture.
        lowest = torch.stack([one.amin((1, 2))[:2] for one in drawn]).amin(0)
        highest = torch.stack([one.amax((1, 2))[:2] for one in drawn]).amax(0)
        assert (lowest < -0.95).all()
        assert (highest > 0.95).all()

    @pytest.mark.parametrize("shape", [(7, 10), (400, 90), (33, 32)])
    def test_any_picture_fills_any_window(self, shape):
        for seed in range(5):
            assert varied_pixels(noise(*shape), (32, 48), 0.8, True, seed).shape == (3, 32, 48)
