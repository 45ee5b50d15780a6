"""Images by name: formats, orientation, limits, and what is refused."""

import gzip
import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from exitwise.data.images import BUILTIN_PHOTOGRAPHS, list_images, load_image, thumbnail
from exitwise.errors import UserError

REPO = Path(__file__).parents[2]
CONTROLS = "".join(map(chr, {*range(32)} - {9, 10, 13}))  # a file full of them is taken for a binary
SHARED = Path(os.environ.get("EXITWISE_SHARED_DATA", REPO.parent / "shared" / "data"))


def write(path: Path, content: str | bytes) -> Path:
    raw = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


@pytest.mark.parametrize("name", BUILTIN_PHOTOGRAPHS)
def test_builtin_photographs_are_in_the_wheel(name):
    image = load_image(f"photo:{name}", None)
    assert image.mode == "RGB"
    assert min(image.size) >= 300


def test_easy_vqa_image():
    assert load_image("easy-vqa:test/0", None).size == (64, 64)


@pytest.mark.parametrize(
    "name",
    [
        *("", "coffee", "photo:horse", "photo:../coins", "easy-vqa:test/1000", "easy-vqa:../0", "file:", "file:."),
        *(
            "file:missing.png",
            "file:../out.png",
            "file:link.png",
            "file:/out.png",
            "file:a\0.png",
            "file:" + "x" * 5000,
        ),
    ],
)
def test_bad_names_are_refused(tmp_path, name):
    (tmp_path / "in").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "out.png")
    (tmp_path / "in" / "link.png").symlink_to(tmp_path / "out.png")
    with pytest.raises(UserError, match=r"^image '.*' .*[;,] ") as caught:
        load_image(name, tmp_path / "in")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_file_images_need_a_folder():
    with pytest.raises(UserError, match="needs an images folder"):
        load_image("file:a.png", None)


def corner(folder: Path, image: Image.Image, name: str = "a.png", **options) -> tuple[int, ...]:
    image.save(folder / name, **options)
    loaded = load_image(f"file:{name}", folder)
    assert (loaded.mode, loaded.info) == ("RGB", {})
    return tuple(np.asarray(loaded)[0, 0].tolist())


def test_modes(tmp_path):
    assert corner(tmp_path, Image.new("1", (1, 1), 1)) == (255,) * 3
    assert corner(tmp_path, Image.new("L", (3, 2), 7)) == (7,) * 3
    assert corner(tmp_path, Image.new("RGBA", (1, 1), (255, 0, 0, 0))) == (255, 255, 255)
    assert corner(tmp_path, Image.new("RGBA", (1, 1), (255, 0, 0, 128)))[1] == pytest.approx(127, abs=1)
    assert corner(tmp_path, Image.new("LA", (1, 1), (0, 0))) == (255, 255, 255)
    assert corner(tmp_path, Image.new("P", (1, 1), 0), transparency=0) == (255, 255, 255)
    assert corner(tmp_path, Image.new("CMYK", (1, 1), (0, 0, 0, 0)), "a.jpg") == (255, 255, 255)
    assert corner(tmp_path, Image.fromarray(np.full((2, 2), 257 * 9, np.uint16))) == (9,) * 3
    assert corner(tmp_path, Image.fromarray(np.full((2, 2), 257 * 9, np.uint16)), "a.tif") == (9,) * 3
    assert corner(tmp_path, Image.fromarray(np.array([[1.5, 0], [np.nan, 0]], np.float32)), "a.tif") == (255,) * 3
    assert corner(tmp_path, Image.fromarray(np.array([[70_000, 0]], np.int32)), "a.tif") == (255,) * 3
    assert corner(tmp_path, Image.fromarray(np.zeros((1, 1), np.int32)), "a.tif") == (0,) * 3


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.webp"])
def test_exif_orientation_is_applied(tmp_path, name):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10)).save(tmp_path / name, exif=exif)
    assert load_image(f"file:{name}", tmp_path).size == (10, 20)


def test_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for name in ("a.gif", "a.webp"):
        assert corner(tmp_path, frames[0], name, save_all=True, append_images=frames[1:])[0] > 240


def test_size_limit(tmp_path, monkeypatch):
    Image.new("1", (10_000, 5_001)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="10000 x 5001 pixels"):
        load_image("file:a.png", tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    with pytest.raises(UserError, match="larger than 50 megapixels"):
        load_image("file:a.png", tmp_path)


def test_list_images_reports_everything(tmp_path):
    (tmp_path / "sub.png").mkdir()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    for name in ("b.PNG", "sub.png/a.jpeg", "a.webp", "c.bmp"):
        noise.save(tmp_path / name)
    (tmp_path / "cut.png").write_bytes((tmp_path / "b.PNG").read_bytes()[:4000])
    (tmp_path / "empty.gif").touch()
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "gone.tiff").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.jpg")
    odd_name = os.fsencode(tmp_path) + b"/\xff.png"
    try:
        Path(os.fsdecode(odd_name)).touch()
        odd = ["\\udcff.png"]
    except OSError:  # a file system that takes only UTF-8 names
        odd = []
    names, skipped = list_images(tmp_path)
    assert names == ["file:a.webp", "file:b.PNG", "file:c.bmp", "file:sub.png/a.jpeg"]
    assert [path for path, _ in skipped] == [*odd, "cut.png", "empty.gif", "gone.tiff", "pipe.jpg"]
    assert all(reason and "\n" not in reason for _, reason in skipped)
    assert all(load_image(name, tmp_path).size == (64, 64) for name in names)
    with pytest.raises(UserError, match="not a folder"):
        list_images(tmp_path / "notes.txt")


def test_thumbnail_fits_and_repeats():
    image = load_image("photo:coffee", None)
    small = thumbnail(image)
    assert small == thumbnail(load_image("photo:coffee", None))
    assert image.size == (600, 400)
    with Image.open(io.BytesIO(small)) as opened:
        assert (opened.format, opened.size) == ("JPEG", (96, 64))
    with Image.open(io.BytesIO(thumbnail(Image.new("RGB", (1, 1))))) as opened:
        assert opened.size == (1, 1)
    with Image.open(io.BytesIO(thumbnail(Image.new("RGB", (3000, 1)), side=10))) as opened:
        assert opened.size == (10, 1)
