"""The report's first curve drawn by matplotlib, for notebooks and papers."""

from typing import TYPE_CHECKING

from ..errors import missing_package
from .figures import Metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SERIES = (("asr", "ASR", "#b3261e"), ("utility", "utility", "#1f5fa8"), ("over_refusal", "over-refusal", "#8a6d1d"))


def plot_exits(metrics: Metrics, axes: "Axes | None" = None) -> "Axes":
    """ASR with its 95 % interval, utility and over-refusal in percent by exit; sets of layers are left out.

    A dotted line marks the default exit, a triangle each exit at which the device may stop.

    Raises:
        UserError: matplotlib is not installed.
    """
    if axes is None:
        try:
            from matplotlib import pyplot
        except ImportError:
            raise missing_package("Run.plot", "matplotlib", "plot") from None
        _, axes = pyplot.subplots(figsize=(8, 3.6), layout="constrained")
    rows = sorted((row for row in metrics.exits if not row.exit.is_set), key=lambda row: row.exit)
    for name, label, colour in SERIES:
        points = [(int(row.exit), row.share(name)) for row in rows if row.share(name).value is not None]
        exits, shares = [exit for exit, _ in points], [share for _, share in points]
        axes.plot(exits, [_percent(share.value) for share in shares], color=colour, marker="o", ms=4, label=label)
        if name == "asr":
            low, high = ([_percent(getattr(share, end)) for share in shares] for end in ("low", "high"))
            axes.fill_between(exits, low, high, color=colour, alpha=0.15, lw=0)
    if not metrics.default_exit.is_set:
        axes.axvline(int(metrics.default_exit), color="0.4", ls=":", label="default exit")
    stops = [row for row in rows if row.exit in metrics.answer.stop_at]
    if stops:
        axes.plot([int(row.exit) for row in stops], [-3] * len(stops), "^", color="#2e7d32", label="may stop")
    axes.set(xlabel="exit (encoder blocks run)", ylabel="%", ylim=(-6, 103), xlim=(-0.5, metrics.n_blocks + 0.5))
    axes.set_title(metrics.model)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return axes


def _percent(share: float | None) -> float:
    return float("nan") if share is None else 100 * share
