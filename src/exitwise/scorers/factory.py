"""Makes a scorer from its name and options."""

from ..errors import UserError
from .base import Scorer

NAMES = ("perspective", "detoxify", "granite-guardian-hap", "reward:<model>", "vqa-v2", "vqa-v2-always")


def make_scorer(
    name: str,
    *,
    model: str | None = None,
    batch_size: int | None = None,
    base_url: str | None = None,
    queries_per_second: float = 1.0,
    template: str | None = None,
    trust_remote_code: bool = False,
) -> Scorer:
    """The scorer of one of NAMES, ready to score.

    Args:
        model: folder, file or hub id of the weights of detoxify and granite-guardian-hap.
        batch_size: answers in a forward pass, for scorers with weights.
        base_url: address of a server with the Perspective API; Google's by default.
        queries_per_second: rate limit of perspective.
        template: text format of a published reward model whose id is not known (rewards/published.py).
        trust_remote_code: load detoxify's pickle files.

    Raises:
        UserError: there is no such scorer, or it cannot be loaded.
    """
    size = {} if batch_size is None else {"batch_size": batch_size}
    if name == "perspective":
        from .perspective import GOOGLE, PerspectiveScorer

        return PerspectiveScorer(base_url or GOOGLE, queries_per_second)
    if name == "detoxify":
        from .detoxify import DetoxifyScorer

        return DetoxifyScorer(model, trust_remote_code=trust_remote_code, **size)
    if name == "granite-guardian-hap":
        from .granite_hap import GraniteHapScorer

        return GraniteHapScorer(model, **size)
    if name in ("vqa-v2", "vqa-v2-always"):
        from .vqa_v2 import VqaV2Scorer

        return VqaV2Scorer("official" if name == "vqa-v2" else "always")
    if name.startswith("reward:") and name != "reward:":
        from ..rewards.loading import load_reward
        from .reward import RewardScorer

        spec = name.removeprefix("reward:")
        reward = load_reward(spec, template=template) if template else load_reward(spec)
        return RewardScorer(spec, reward, **size)
    raise UserError(f"--scorer got {name!r}; expected one of: {', '.join(NAMES)}")
