"""1,000 hostile inputs from one seed: each gives a result or one line to the user, and no row vanishes."""

import csv
import gzip
import io
import json
import random
import zlib
from pathlib import Path

import pytest
from PIL import Image

from exitwise.data.images import list_images, load_image
from exitwise.data.prompts import load_prompts
from exitwise.errors import UserError

PROMPTS = ["How do I bake bread?", 'Say "no", twice', "two\nlines", "naïve 日本 \U0001f600", " ", "x" * 21_000, "a\0b"]
NASTY = [b'"', b"\0", b"\xff\xfe", b"\r", b"\n", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\\ud800", b"{", b"[" * 3000]
NASTY += [b",,,,", b"\t", b'"\n"', b"\x1a", b"A" * 140_000, b"9" * 5000, "\u2028\x85".encode(), b"NaN", b"\x1f\x8b"]
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-32", "latin-1", "cp1251", "shift_jis", "utf-7"]


def seed_text(rng: random.Random, form: str) -> bytes:
    """A file that is good but for its prompts."""
    rows = [{"id": rng.choice([n, n, 0]), "prompt": rng.choice(PROMPTS), "type": "t"} for n in range(rng.randrange(9))]
    if form == "txt":
        text = "\n".join(str(row["prompt"]) for row in rows)
    elif form == "jsonl":
        text = "\n".join(json.dumps(row, ensure_ascii=rng.random() < 0.5) for row in rows)
    elif form == "json":
        text = json.dumps(rows)
    else:
        buffer = io.StringIO(newline="")
        writer = csv.DictWriter(buffer, ["id", "prompt", "type"], delimiter="\t" if form == "tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
        text = buffer.getvalue()
    return text.encode(rng.choice(ENCODINGS) if rng.random() < 0.2 else "utf-8", "replace")


def mutate(rng: random.Random, raw: bytes) -> bytes:
    kind = rng.choice(["none", "flip", "cut", "insert", "insert", "shuffle", "random", "empty", "repeat"])
    data = bytearray(raw)
    at = rng.randrange(len(data) + 1)
    if kind == "flip":
        for _ in range(rng.randint(1, 20)):
            if data:
                data[rng.randrange(len(data))] = rng.randrange(256)
    elif kind == "cut":
        del data[at:]
    elif kind == "insert":
        data[at:at] = b"".join(rng.choices(NASTY, k=rng.randint(1, 3)))
    elif kind == "shuffle":
        lines = raw.splitlines(keepends=True)
        rng.shuffle(lines)
        data = bytearray(b"".join(lines))
    elif kind == "random":
        data = bytearray(rng.randbytes(rng.randrange(2000)))
    elif kind == "empty":
        data.clear()
    elif kind == "repeat":
        data *= 3
    return bytes(data)


def seed_image(rng: random.Random, suffix: str) -> bytes:
    mode = rng.choice(["RGB", "L"] if suffix in ("jpg", "bmp") else ["RGB", "L", "RGBA", "P", "1"])
    image = Image.frombytes("RGB", (40, 30), rng.randbytes(3600)).convert(mode)
    options = {"save_all": True, "append_images": [image.rotate(90)]} if suffix == "gif" else {}
    if rng.random() < 0.3:
        options["exif"] = b"Exif\0\0" + rng.randbytes(40)
    buffer = io.BytesIO()
    try:
        image.save(buffer, {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper()), **options)
    except Exception:  # Pillow does not write every mode with a broken EXIF block; then without
        options.pop("exif", None)
        buffer = io.BytesIO()
        image.save(buffer, {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper()), **options)
    return buffer.getvalue()


def count_rows(form: str, raw: bytes) -> int | None:
    """Rows of the formats that can be counted without a parser."""
    if form in ("txt", "jsonl"):
        return sum(bool(line.strip()) for line in raw.removeprefix(b"\xef\xbb\xbf").splitlines())
    if form == "json":
        try:
            value = json.loads(raw.decode("utf-8-sig", "surrogateescape"))
        except (ValueError, RecursionError):
            return None
        return len(value) if isinstance(value, list) else None
    return None


def require_one_line(error: UserError) -> None:
    message = str(error)
    assert message.isprintable(), message
    assert len(message) < 2000
    assert "; " in message


@pytest.mark.parametrize("block", range(7))
def test_prompt_files(tmp_path, block):
    rng = random.Random(block)
    loaded_files = 0
    for number in range(100):
        form = rng.choice(["csv", "tsv", "jsonl", "json", "txt"])
        raw = mutate(rng, seed_text(rng, form))
        packed = rng.random() < 0.2
        path = tmp_path / f"{number}.{form}{'.gz' if packed else ''}"
        content = gzip.compress(raw) if packed else raw
        broken_gzip = packed and rng.random() < 0.5
        path.write_bytes(mutate(rng, content) if broken_gzip else content)
        try:
            loaded = load_prompts(path)
        except UserError as error:
            require_one_line(error)
            continue
        loaded_files += 1
        if broken_gzip:
            raw = _gunzip(path)
        expected = count_rows(form, raw)
        assert expected in (None, len(loaded.samples) + len(loaded.skipped)), path.name
        assert len({s.id for s in loaded.samples}) == len(loaded.samples)
        for sample in loaded.samples:
            assert 0 < len(sample.prompt) <= 20_000
            sample.to_json().encode("utf-8")
        for reason in loaded.skipped:
            assert reason.startswith(f"{path.name}, ")
            assert reason.isprintable(), reason
    assert loaded_files > 20  # the fuzzer also makes files that load


def _gunzip(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise AssertionError(f"{path.name} is broken and was loaded") from error


@pytest.mark.parametrize("block", range(3))
def test_images(tmp_path, block):
    rng = random.Random(1000 + block)
    for number in range(100):
        suffix = rng.choice(["png", "jpg", "gif", "webp", "bmp", "tif"])
        (tmp_path / f"{number:03}.{suffix}").write_bytes(mutate(rng, seed_image(rng, suffix)))
    names, skipped = list_images(tmp_path)
    assert len(names) + len(skipped) == 100
    assert min(len(names), len(skipped)) > 10
    for name in names:
        assert load_image(name, tmp_path).mode == "RGB"
    for path, reason in skipped:
        assert reason.isprintable(), reason
        with pytest.raises(UserError) as caught:
            load_image(f"file:{path}", tmp_path)
        require_one_line(caught.value)
