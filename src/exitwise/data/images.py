"""Loads images by the names that `Sample.image` holds, lists folders of images and makes thumbnails.

    photo:<name>               a photograph shipped in the scikit-image wheel
    easy-vqa:<split>/<number>  a picture of the easy-vqa package
    file:<path>                relative to the images folder, with forward slashes
    <set>:<path>               relative to the folder of the images of that data set
    unpacked:<sha256>          came inside a Parquet file and is kept in the cache
    control:<blank or noise>   mid-grey, or uniform noise that is the same every time
    ""                         no image (never loaded)

Nothing is downloaded. A broken image is an error that names it.
"""

import hashlib
import importlib.util
import io
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import UserError
from .hub import cache_dir

BUILTIN_PHOTOGRAPHS = (
    "astronaut",
    "camera",
    "chelsea",
    "clock_motion",
    "coffee",
    "coins",
    "hubble_deep_field",
    "moon",
    "retina",
    "rocket",
)
TRAINING_PHOTOGRAPHS = (
    "brick",
    "cell",
    "grass",
    "gravel",
    "ihc",
    "motorcycle_left",
    "motorcycle_right",
    "page",
    "text",
)
"""Photographs for training: no audit with built-in images uses them."""
EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # no others: some of Pillow's readers start programs
MAX_PIXELS = 50_000_000
Roots = Path | Mapping[str, Path] | None
"""Folders of images: the folder of `file:`, or one folder for each scheme."""
CONTROL_SIDE = 336  # pixels, the input of the commonest encoders


def load_image(name: str, images_root: Roots) -> Image.Image:
    """The image of that name: mode RGB, upright (EXIF), alpha over white, the first frame of an animation.

    16-bit grey is divided by 257; 32-bit integers and floats have no agreed range and are stretched from their
    minimum to their maximum.

    Raises:
        UserError: unknown name, no such file, outside `images_root`, broken, or above 50 megapixels.
    """
    shown = repr(name if len(name) <= 200 else name[:200] + "...")
    try:
        return _control(name) if name.startswith("control:") else _decode(_locate(name, images_root))
    except _ImageFaultError as fault:
        raise UserError(f"image {shown} {fault}") from None


def find_image(folder: Path, path: str) -> str | None:
    """`path` as it is in `folder`, or with another image extension (sets say .jpg and ship .png); None where none is.

    Nothing is decoded. A path that leads out of the folder is None as well.
    """
    tidy = path.replace("\\", "/").removeprefix("./")
    whole = Path(tidy)
    bare = whole.with_suffix("") if whole.suffix.lower() in EXTENSIONS else whole
    for candidate in (tidy, *(f"{bare.as_posix()}{extension}" for extension in EXTENSIONS)):
        try:
            if candidate and _inside(folder, candidate).is_file():
                return candidate
        except (_ImageFaultError, OSError, ValueError):
            continue
    return None


def keep_image(content: bytes) -> str:
    """Keeps an image that came inside a table, under the sha256 of its bytes; its name."""
    name, folder = hashlib.sha256(content).hexdigest(), _unpacked()
    if not (folder / name).exists():
        folder.mkdir(parents=True, exist_ok=True)
        scratch = folder / f"{name}.{os.getpid()}.tmp"
        scratch.write_bytes(content)
        os.replace(scratch, folder / name)
    return f"unpacked:{name}"


def _unpacked() -> Path:
    return cache_dir() / "images"


def list_paths(folder: Path) -> list[str]:
    """Paths of all files below `folder` that look like images, sorted; none is opened."""
    paths = [Path(parent, file) for parent, _, files in os.walk(folder) for file in files]
    return sorted(p.relative_to(folder).as_posix() for p in paths if p.name.lower().endswith(EXTENSIONS))


def list_images(folder: Path) -> tuple[list[str], list[tuple[str, str]]]:
    """All images below `folder`, by extension (any case): (names that load, [(path, reason)] of those that do not).

    Both are in order of the path. Every file is decoded once, which is the only way to find a truncated one. Links to
    folders are not followed; links to files that lead outside `folder` are refused like any other escape.

    Raises:
        UserError: `folder` is not a folder. One without images is not an error here: ([], []).
    """
    if not folder.is_dir():
        raise UserError(f"images folder {str(folder)!r} is not a folder; give the path of a folder with images")
    names, skipped, paths = [], [], []
    for parent, _, files in os.walk(folder, onerror=lambda e: skipped.append((str(e.filename), f"{e.strerror}"))):
        paths += [Path(parent, file) for file in files if file.lower().endswith(EXTENSIONS)]
    for path in paths:
        relative = path.relative_to(folder).as_posix()
        try:
            relative.encode("utf-8")  # a run's records are UTF-8
            _decode(_inside(folder, relative))
            names.append(f"file:{relative}")
        except UnicodeEncodeError:
            skipped.append((ascii(relative)[1:-1], "has a file name that is not UTF-8; rename it"))
        except _ImageFaultError as fault:
            skipped.append((relative, str(fault)))
    return sorted(names), sorted(skipped)


def thumbnail(image: Image.Image, side: int = 96) -> bytes:
    """JPEG of `image` shrunk (never enlarged) to fit `side` x `side` pixels; same image, same bytes."""
    small = image.convert("RGB")  # a copy: the caller's image keeps its size
    small.info = {}
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


class _ImageFaultError(Exception):
    """Why an image cannot be loaded, worded to follow its name."""


def _control(name: str) -> Image.Image:
    shape = (CONTROL_SIDE, CONTROL_SIDE, 3)
    if name == "control:blank":
        return Image.fromarray(np.full(shape, 128, np.uint8))
    if name == "control:noise":
        return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    raise _ImageFaultError("is not a control; expected control:blank or control:noise")


def _locate(name: str, images_root: Roots) -> Path:
    scheme, _, rest = name.partition(":")
    roots = {"file": images_root} if isinstance(images_root, Path) else images_root or {}
    if scheme == "photo":
        return _photograph(rest)
    if scheme == "easy-vqa" and (match := re.fullmatch(r"(train|test)/(\d{1,6})", rest, re.ASCII)):
        return _package_folder("easy_vqa") / "data" / match[1] / "images" / f"{int(match[2])}.png"
    if scheme == "unpacked" and re.fullmatch(r"[0-9a-f]{64}", rest):
        return _unpacked() / rest
    if scheme in roots and rest:
        return _inside(roots[scheme], rest)
    if scheme == "file" and rest:
        raise _ImageFaultError("needs an images folder and none was given; name the folder it is relative to")
    raise _ImageFaultError(
        "is not an image name; expected photo:NAME, easy-vqa:test/NUMBER, control:blank, control:noise, file:PATH or "
        "SET:PATH"
    )


def _photograph(name: str) -> Path:
    # Straight from the wheel's folder: skimage.data.<name>() would go to the network where pooch is installed and the
    # file is missing.
    if name not in BUILTIN_PHOTOGRAPHS + TRAINING_PHOTOGRAPHS:
        raise _ImageFaultError(f"is not a built-in photograph; expected one of {', '.join(BUILTIN_PHOTOGRAPHS)}")
    folder = _package_folder("skimage") / "data"
    return next((p for p in (folder / f"{name}.png", folder / f"{name}.jpg") if p.is_file()), folder / f"{name}.png")


def _package_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)  # does not import it
    if spec is None or spec.origin is None:
        raise _ImageFaultError(f"needs the package {package}, which comes with exitwise; run: pip install exitwise")
    return Path(spec.origin).parent


def _inside(root: Path, relative: str) -> Path:
    """The file at `relative` in `root`, links resolved; refused where that leads out of `root`.

    In the cache of the hub every file of a snapshot is a link into `blobs` beside `snapshots`; there that is inside.
    """
    try:
        base = root.resolve()
        path = (base / relative).resolve()
    except (OSError, ValueError, RuntimeError):  # too long, a NUL byte, a loop of links
        raise _ImageFaultError("is not a usable path; expected one relative to the images folder") from None
    store = next((p.parent for p in (base, *base.parents) if p.name == "snapshots"), None)
    blobs = store / "blobs" if store else base
    if not path.is_relative_to(base) and not path.is_relative_to(blobs):
        raise _ImageFaultError("leads outside the images folder; move the file into it")
    return path


def _decode(path: Path) -> Image.Image:
    try:
        if path.exists() and not path.is_file():  # reading a pipe would never end
            raise _ImageFaultError("is not a regular file; give the path of an image")
        # Pillow warns of odd metadata and of sizes we refuse below; neither is news to the user.
        with warnings.catch_warnings(), open(path, "rb") as handle:
            warnings.simplefilter("ignore")
            with Image.open(handle, formats=FORMATS) as image:
                _check_size(image)
                return to_rgb(ImageOps.exif_transpose(image))
    except _ImageFaultError:
        raise
    except UnidentifiedImageError:
        raise _ImageFaultError(f"is not a {', '.join(FORMATS)} image; convert or remove it") from None
    except Image.DecompressionBombError:
        raise _ImageFaultError("is larger than 50 megapixels; shrink it") from None
    except FileNotFoundError:
        raise _ImageFaultError("does not exist; check the name") from None
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, EOFError, IndexError, ...
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
        raise _ImageFaultError(f"cannot be read ({' '.join(reason.split())}); replace or remove it") from None


def _check_size(image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise _ImageFaultError(f"has {image.width} x {image.height} pixels; expected at most 50 megapixels, shrink it")


def to_rgb(image: Image.Image) -> Image.Image:
    """A new RGB image without metadata."""
    if image.mode.startswith("I;16"):  # Pillow's own conversion clips at 255
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        image = Image.fromarray(_stretched(np.asarray(image)))
    if image.has_transparency_data:
        over = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", over.size, "white"), over)
    result = image.convert("RGB")
    result.info = {}
    return result


def _stretched(values: np.ndarray) -> np.ndarray:
    """(height, width) of any range to uint8; a constant, NaN or infinity is black."""
    values = values.astype(np.float64)
    finite = np.isfinite(values)
    low, high = (values[finite].min(), values[finite].max()) if finite.any() else (0.0, 0.0)
    if high <= low:
        return np.zeros(values.shape, np.uint8)
    return np.where(finite, (np.where(finite, values, low) - low) / (high - low) * 255, 0).round().astype(np.uint8)
