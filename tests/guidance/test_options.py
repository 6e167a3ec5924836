"""Options: dataclass fields with help, in their order."""

from __future__ import annotations

from dataclasses import dataclass

from indomain_guidance.guidance.options import option, options_of


def test_options_are_the_fields_with_help():
    @dataclass
    class Example:
        scale: float = option(1.5, "how strong it is", min=0.0, max=2.0)
        inner: int = 3
        kind: str = option("soft", "how it is done", choices=("soft", "hard"))

    scale, kind = options_of(Example)
    assert (scale.name, scale.default, kind.name) == ("scale", 1.5, "kind")
    assert scale.metadata == {"help": "how strong it is", "min": 0.0, "max": 2.0}
    assert Example(kind="hard") == Example(1.5, 3, "hard")
