"""Controls: the same harmful requests with a blank image, with noise, and without an image.

A hole that stays open without a photograph is no matter of the photograph. Controls are samples like any other, so
engines and judges treat them alike; by the end of their id they are told apart, and no figure of the real images counts
them.
"""

import re
from collections.abc import Sequence
from dataclasses import replace

from ..run.records import Sample

IMAGES = {"blank": "control:blank", "noise": "control:noise", "none": ""}
SUFFIX = re.compile(r"@control:(\w+)$")


def make_controls(samples: Sequence[Sample]) -> list[Sample]:
    """Every sample with every control image; ids are `<id>@control:<blank, noise or none>`."""
    return [replace(s, id=f"{s.id}@control:{name}", image=image) for s in samples for name, image in IMAGES.items()]


def control_of(sample: Sample) -> str | None:
    """The control that a sample is ("blank", "noise", "none"); None for any other, whatever its id looks like."""
    match = SUFFIX.search(sample.id)
    return match[1] if match and IMAGES.get(match[1]) == sample.image else None
