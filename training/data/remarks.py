"""Sentences about a set of images before it is trained on: the same in a run and in check-data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

MASK = "masks beside their pictures"
MUCH = 1 / 3  # of a picture that cropping may remove before it is said
SHOWN = 3


def remarks(ignored: Mapping[str, int], cropped: Mapping[str, float], count: int) -> list[str]:
    """Sentences about files that were left out and pictures that lose much; none where there is nothing to say.

    ignored: files by ending and what else was left out by its name (`sources.Found.ignored`). cropped: the share that
    cropping removes, 0..1, of the pictures that lose more than MUCH. count: of all images that are used.
    """
    said = []
    if ignored:
        counts = {kind or "without ending": number for kind, number in ignored.items()}
        said.append(
            f"left out: {_counts(counts)}; pictures of other kinds can be saved as PNG or JPEG, archives unpacked, and "
            "captions and masks have no effect here."
        )
    if cropped:
        worst = [f"{name} {share:.0%}" for name, share in _most_first(cropped)]
        named = ", ".join(worst[:SHOWN]) + (" ..." if len(worst) > SHOWN else "")
        said.append(
            f"{len(cropped)} of {count} images lose more than a third to cropping: {named}; a larger bucket_max_ratio "
            "adds longer shapes."
        )
    return said


def skipped_remark(skipped: Sequence[tuple[str, str]], kinds: Mapping[str, int]) -> str:
    """One sentence about images that cannot be used. kinds: how many for which reason ("too large")."""
    return f"{len(skipped)} images cannot be used and are left out ({_counts(kinds)}): {named_first(skipped)}."


def named_first(skipped: Sequence[tuple[str, str]]) -> str:
    """The first few of (name, reason), and how many more there are."""
    named = "; ".join(f"{name} {reason}" for name, reason in skipped[:SHOWN])
    return named + (f"; and {len(skipped) - SHOWN} more" if len(skipped) > SHOWN else "")


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {kind}" for kind, number in _most_first(counts))


def _most_first(numbers: Mapping[str, float]) -> list[tuple[str, float]]:
    return sorted(numbers.items(), key=lambda item: (-item[1], item[0]))
