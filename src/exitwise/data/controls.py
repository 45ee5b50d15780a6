"""Makes controls: the same harmful requests with a blank image, with a noise image, and without an image.

A request that is answered without a photograph too is not answered because of the photograph. Controls are samples
like any other for engines and judges; the end of their id marks them, and no figure of the real images counts them.
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
    """Which control a sample is ("blank", "noise", "none"); None for any other sample, whatever its id looks like."""
    match = SUFFIX.search(sample.id)
    return match[1] if match and IMAGES.get(match[1]) == sample.image else None
